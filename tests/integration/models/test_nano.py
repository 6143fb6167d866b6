"""The shipped set: complete, small, read by diffusers and open_clip themselves."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from torch.utils.flop_counter import FlopCounterMode

from models.adaptation.synthesize import Cascade, Sampling, encode
from models.bundle import DEFAULT_TASK, MODELS, read_bundle
from models.denoisers.prompts import encode_prompts
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS, SLICE, evaluation_slice
from models.nano.captions import vocabulary
from models.smoothing import load
from models.zoo.registry import DENOISER_SETS

NANO = MODELS / "nano"


def test_everything_shipped_is_small() -> None:
    """The whole set stays under 40 MB and holds nothing pickled."""
    files = [path for path in NANO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_diffusers_loads_both_stages() -> None:
    """Both stages load with diffusers' own pipelines, stage II with stage I's text encoder."""
    one = IFPipeline.from_pretrained(NANO / "weights" / "stage1")
    two = IFSuperResolutionPipeline.from_pretrained(
        NANO / "weights" / "stage2", text_encoder=one.text_encoder, tokenizer=one.tokenizer
    )
    assert one.unet.config.in_channels == 3
    assert two.unet.config.in_channels == 6
    assert two.unet.config.class_embed_type == "timestep"


def test_default_task_was_made_from_the_shipped_encoder() -> None:
    """The bundle verifies, and its prompt states are the text encoder's for its own prompt."""
    bundle = read_bundle(DEFAULT_TASK)
    assert bundle.labels == CIFAR10_LABELS
    one = IFPipeline.from_pretrained(NANO / "weights" / "stage1")
    made = encode_prompts(one.tokenizer, one.text_encoder, [bundle.prompt])[0]
    model = load(bundle, dtype=torch.float32)
    assert torch.allclose(model.denoiser._epsilon.states[0], made, atol=1e-5)


def test_head_is_cheap_and_its_text_tower_narrow() -> None:
    """One row of the head costs at most 0.15 G multiply-adds; its text width is at most 128."""
    folder = NANO / "weights" / "head"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(torch.zeros(1, 3, *model.visual.image_size))
    assert counter.get_total_flops() / 2 <= 0.15e9
    described = json.loads((folder / "open_clip_config.json").read_text())
    assert described["model_cfg"]["text_cfg"]["width"] <= 128


def test_undefended_head_knows_the_slice() -> None:
    """The head alone gets at least 90 % of the slice in float32 (its card says how many)."""
    data = evaluation_slice(SLICE)
    classifier = load(read_bundle(DEFAULT_TASK), dtype=torch.float32).classifier
    x = torch.tensor(data.images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        right = (classifier(x).argmax(1).numpy() == data.labels).mean()
    assert right >= 0.90


def test_denoiser_comes_nearer_to_the_truth() -> None:
    """At sigma .25 the denoised image is at least 9 dB nearer to the truth than the noisy."""
    data = evaluation_slice(SLICE)[:40]
    denoise = load(read_bundle(DEFAULT_TASK), dtype=torch.float32).denoiser
    x = torch.tensor(data.images).permute(0, 3, 1, 2).float() / 255
    noise = 0.25 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x_0 = denoise(x + noise, torch.full((40,), 0.25, dtype=torch.float64))
    gain = 10 * np.log10(float(noise.square().mean()) / float((x_0 - x).square().mean()))
    assert gain >= 9


@pytest.mark.parametrize("word", ["ship", "cat"])
def test_cascade_draws_what_it_is_told(word: str) -> None:
    """Of four images made from a name, the head recognises at least two; seeds repeat them."""
    bundle = read_bundle(DEFAULT_TASK)
    stages, device = DENOISER_SETS["nano"].folders, torch.device("cpu")
    states = encode(stages[0], [*[bundle.template.format(word)] * 4, ""], device, torch.float32)
    cascade, quick = Cascade(*stages, device), Sampling(steps=15, upscale_steps=10)
    images = cascade(states[:-1], states[-1], range(4), quick)
    assert images.shape == (4, 32, 32, 3)
    assert np.array_equal(images, cascade(states[:-1], states[-1], range(4), quick))
    classifier = load(bundle, dtype=torch.float32).classifier
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        named = classifier(x).argmax(1).numpy()
    assert (named == bundle.labels.index(word)).sum() >= 2


def test_vocabulary_holds_every_label() -> None:
    """Every class is in nano's vocabulary, and no word stands for two classes."""
    words = vocabulary()
    assert set(CIFAR10_LABELS) <= set(words)
    assert len(set(words)) == len(words)


def test_what_loading_computes_does_not_depend_on_threads() -> None:
    """Text prototypes are the same to the bit however many threads torch has."""
    before, prototypes = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            prototypes.append(load(read_bundle(DEFAULT_TASK)).classifier._prototypes)  # type: ignore[attr-defined]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*prototypes)
