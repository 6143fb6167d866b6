"""Share of the images that nano's cascade makes from its labels which the head recognizes.

`python -m models.nano.recognized --count 200`
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.adaptation.synthesize import Cascade, Sampling, encode
from models.bundle import DEFAULT_TASK, read_bundle
from models.evaluation.tables import recognised
from models.smoothing import best_device, load
from models.zoo.registry import DENOISER_SETS


def share(count: int) -> float:
    """Of `count` images, spread over the labels, those that the undefended head recognizes."""
    bundle, device = read_bundle(DEFAULT_TASK), best_device()
    each = max(1, count // len(bundle.labels))
    stages = DENOISER_SETS["nano"].folders
    prompts = [*(bundle.template.format(word) for word in bundle.words), ""]
    states = encode(stages[0], prompts, device, torch.float32)
    threads = torch.get_num_threads()
    model = load(bundle)
    torch.set_num_threads(threads)  # A model with cpu_threads leaves torch with one thread.
    generate = partial(_made, Cascade(*stages, device), states, each)
    return recognised(model.classifier, generate, device, each, model.numerics.batch_rows)


def _made(cascade: Cascade, states: Tensor, each: int, label: int) -> NDArray[np.uint8]:
    seeds = [1000 * label + shot for shot in range(each)]
    return cascade(states[[label] * each], states[-1], seeds, Sampling())


def main() -> None:
    """Print the share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    print(f"{share(arguments.count):.1%} of {arguments.count} are recognized")


if __name__ == "__main__":
    main()
