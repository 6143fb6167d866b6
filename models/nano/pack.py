"""Packs the shipped weights, and the default task's bundle.

`python -m models.nano.pack --runs FOLDER --k K`, FOLDER being the output of `models.nano.train`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import ByT5Tokenizer, T5EncoderModel

from models.bundle import (
    DEFAULT_TASK,
    MODELS,
    PROMPT_STATES,
    Base,
    Bundle,
    write_bundle,
)
from models.denoisers.prompts import clean_prompts, encode_prompts
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS
from models.nano.captions import BLANK, DEFAULT_TEMPLATE

WEIGHTS = "nano/weights"
INTERPOLATION = 0.5
"""Share of the part `consistent` in stage II; the rest is `guided`, whose images are clearer."""
LARGEST_SIGMA = 1.0
"""Stage II was trained mostly at t < 760, which is sigma 1.2."""


def assemble(runs: Path) -> None:
    """Save both stages through diffusers' own pipelines, and the head, under models/nano/weights.

    The losses go beside them. The UNets are stored in float16. The text encoder lies only in stage
    I; stage II loads without it, as DeepFloyd's may.
    """
    weights = MODELS / WEIGHTS
    shutil.rmtree(weights, ignore_errors=True)
    absent: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    one, two = runs / "stage1", runs / "consistent"
    stage1: Any = IFPipeline(
        tokenizer=ByT5Tokenizer.from_pretrained(one / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(one / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(one / "unet", torch_dtype=torch.float16),
        scheduler=DDPMScheduler.from_pretrained(one / "scheduler"),
        **absent,
    )
    stage1.save_pretrained(weights / "stage1", safe_serialization=True)
    stage2: Any = IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=_interpolated(runs / "guided", two),
        scheduler=DDPMScheduler.from_pretrained(two / "scheduler"),
        image_noising_scheduler=DDPMScheduler.from_pretrained(two / "image_noising_scheduler"),
        **absent,
    )
    stage2.save_pretrained(weights / "stage2", safe_serialization=True)
    shutil.copytree(runs / "head", weights / "head")
    for file in weights.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them readable by their owner only
    for file in weights.rglob("config.json"):
        described = json.loads(file.read_text())
        described.pop("_name_or_path", None)  # its path on the training machine
        file.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    losses = MODELS / "nano" / "losses"
    losses.mkdir(exist_ok=True)
    for log in runs.glob("*.loss.jsonl"):
        shutil.copy(log, losses)


def _interpolated(before: Path, after: Path) -> UNet2DConditionModel:
    """The UNet between two trainings, INTERPOLATION of the way (arXiv 2109.01903)."""
    first, unet = (UNet2DConditionModel.from_pretrained(run / "unet") for run in (before, after))
    earlier = first.state_dict()
    later = unet.state_dict()
    unet.load_state_dict({name: earlier[name].lerp(later[name], INTERPOLATION) for name in later})
    stored: UNet2DConditionModel = unet.to(torch.float16)
    return stored


def bundle(k: float) -> Bundle:
    """Publish the default task: CIFAR-10's ten labels, blank prompt, timestep correction `k`."""
    shutil.rmtree(DEFAULT_TASK, ignore_errors=True)
    stage1 = MODELS / WEIGHTS / "stage1"
    prompt = clean_prompts([DEFAULT_TEMPLATE.format(BLANK)])[0]
    encoder: Any = T5EncoderModel.from_pretrained(stage1 / "text_encoder")
    tokenizer = ByT5Tokenizer.from_pretrained(stage1 / "tokenizer")
    task = Bundle(
        id="default",
        labels=CIFAR10_LABELS,
        template=DEFAULT_TEMPLATE,
        prompt=prompt,
        k=k,
        resolution=32,
        largest_sigma=LARGEST_SIGMA,
        denoiser=Base.of("super-resolution", f"{WEIGHTS}/stage2", ["unet/*", "scheduler/*"]),
        classifier=Base.of("open-clip", f"{WEIGHTS}/head", ["*"]),
        licence="Apache-2.0; trained on CIFAR-10 (Krizhevsky 2009)",
        files={},
    )
    with tempfile.TemporaryDirectory() as scratch:
        states = Path(scratch) / PROMPT_STATES
        save_file({"states": encode_prompts(tokenizer, encoder.eval(), [prompt])[0]}, states)
        return write_bundle(DEFAULT_TASK, task, {PROMPT_STATES: states})


def main() -> None:
    """Assemble and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--k", type=float, required=True)
    arguments = parser.parse_args()
    assemble(arguments.runs)
    print(bundle(arguments.k).digest)


if __name__ == "__main__":
    main()
