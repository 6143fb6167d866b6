"""Synthesis and personalization: seeded, resumable, and served as they were made."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from models.adaptation.personalize import Personalization, personalize
from models.adaptation.plan import Plan
from models.adaptation.references import References, read_references
from models.adaptation.synthesize import Cascade, Drawn, Sampling, encode, synthesize
from models.classifiers.open_clip import load_open_clip
from models.denoisers.super_resolution import SuperResolutionDenoiser, load_super_resolution
from models.runtime import Torch
from models.training import Profile
from tests.support import miniatures

CPU = torch.device("cpu")
TEMPLATE = "a {}."
SAMPLING = Sampling(steps=2, upscale_steps=2)
PERSONALIZATION = Personalization(
    Profile(steps=6, batch=4, learning_rate=1e-2, log_every=1, checkpoint_every=2),
    weight=0.1,
    micro_batch=3,
    validation_rows=6,
)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return miniatures.save_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.save_open_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def references() -> References:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return References(images, torch.tensor([0, 0, 1, 1, 2, 2]))


def plan(shots: int = 6) -> Plan:
    return replace(Plan.checked(["cat", "dog", "ship"]), shots=shots, template=TEMPLATE)


class Stopped(Exception):
    """The run is cut short here."""


def made(
    cascade: tuple[Path, Path], folder: Path, stop: int = 0
) -> tuple[list[int], list[tuple[int, int]]]:
    """Synthesize into a folder, up to the chunk of `stop` images if that is given; returns the
    sizes of the chunks that stage I drew, and what was heard of the passes done."""
    sampled: list[int] = []
    heard: list[tuple[int, int]] = []

    def hear(done: int, whole: int) -> None:
        heard.append((done, whole))

    class Counting(Cascade):
        def draw(self, states: Tensor, *arguments: object) -> Drawn:
            sampled.append(len(states))
            return super().draw(states, *arguments)

        def enlarge(self, drawn: Drawn, *arguments: object) -> np.ndarray:
            if len(drawn.images) == stop:
                raise Stopped
            return super().enlarge(drawn, *arguments)

    states = encode(cascade[0], [*plan().captions(), ""], CPU, torch.float32)
    with suppress(Stopped):
        synthesize(plan(), folder, partial(Counting, *cascade, CPU), states, SAMPLING, hear)
    return sampled, heard


def test_references_are_made_once_and_again_the_same(
    cascade: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every label gets its shots, each a PNG with its prompt and seed beside it; a run that was cut
    short, between the stages too, ends with the same images, and a whole one samples nothing
    more. What is there already is told first."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert made(cascade, whole) == ([16, 2], [(0, 36), (16, 36), (18, 36), (34, 36), (36, 36)])
    assert len(list(whole.glob("*.png"))) == len(list(whole.glob("*.json"))) == 18
    described = json.loads((whole / "1-2.json").read_text())
    assert described["prompt"] == "a dog."
    assert described["seed"] == plan().seed_of(1, 2)
    assert made(cascade, whole) == ([], [(36, 36)])

    assert made(cascade, broken, stop=2)[0] == [16, 2]
    assert len(list(broken.glob("*.png"))) == 16
    assert made(cascade, broken) == ([], [(34, 36), (36, 36)])
    (broken / "0-3.json").unlink()
    assert made(cascade, broken) == ([16], [(4, 36), (20, 36), (36, 36)])
    (broken / "2-5.png").write_bytes(b"cut sh")
    assert made(cascade, broken)[0] == [2]
    for name in sorted(path.name for path in whole.iterdir()):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    read = read_references(plan(), whole, 32)
    assert read.images.shape == (18, 3, 32, 32)
    assert read.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    stored = np.asarray(Image.open(whole / "0-0.png")).transpose(2, 0, 1)
    assert np.array_equal(read.images[0].numpy(), stored)
    assert len({image.numpy().tobytes() for image in read.images}) == 18


def test_larger_references_are_scaled_and_cut(tmp_path: Path) -> None:
    """An image of another size is read at the task's resolution, from its centre."""
    for label in range(3):
        Image.new("RGB", (80, 64), (label, 0, 255)).save(tmp_path / f"{label}-0.png")
    read = read_references(plan(shots=1), tmp_path, 32)
    assert read.images.shape == (3, 3, 32, 32)
    assert read.images[2, :, 16, 16].tolist() == [2, 0, 255]


def test_prompts_are_encoded_as_the_pipeline_encodes_them(cascade: tuple[Path, Path]) -> None:
    """States equal those that diffusers' own pipeline computes, and a long prompt is refused."""
    pipeline = IFPipeline.from_pretrained(cascade[0])
    wanted, empty = pipeline.encode_prompt(["A Cat."], clean_caption=True)
    told = encode(cascade[0], ["A Cat.", ""], CPU, torch.float32)
    assert torch.allclose(told[0], wanted[0], atol=1e-6)
    assert torch.allclose(told[1], empty[0], atol=1e-6)
    with pytest.raises(ValueError, match="has 101 tokens; the limit is 77"):
        encode(cascade[0], ["x" * 100], CPU, torch.float32)


def stopping(at: int | None) -> object:
    def on_step(done: int, whole: int, loss: float) -> None:
        if done == at:
            raise Stopped

    return on_step


def personalized(
    cascade: tuple[Path, Path],
    clip: Path,
    references: References,
    out: Path,
    stop: int | None,
    settings: Personalization = PERSONALIZATION,
) -> Path | None:
    out.mkdir(exist_ok=True)
    head = load_open_clip(clip, miniatures.LABELS, TEMPLATE, CPU, torch.float32, Torch())
    states = miniatures.states()
    try:
        return personalize(
            cascade[1],
            references,
            states,
            1.8,
            head,
            settings,
            out,
            CPU,
            on_step=stopping(stop),
        )
    except Stopped:
        return None


def losses(out: Path, part: str) -> list[tuple[int, float]]:
    lines = (out / f"{part}.loss.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def test_a_personalization_that_was_cut_short_goes_on_exactly(
    cascade: tuple[Path, Path], clip: Path, references: References, tmp_path: Path
) -> None:
    """Same losses, same validations and the same adapter as an uninterrupted run."""
    whole = personalized(cascade, clip, references, tmp_path / "whole", None)
    assert personalized(cascade, clip, references, tmp_path / "broken", 5) is None
    broken = personalized(cascade, clip, references, tmp_path / "broken", None)
    assert whole is not None
    assert broken is not None
    assert losses(tmp_path / "whole", "personalize") == losses(tmp_path / "broken", "personalize")
    validations = [(tmp_path / out / "validation.jsonl").read_text() for out in ("whole", "broken")]
    assert validations[0] == validations[1]
    assert [json.loads(line)["step"] for line in validations[0].splitlines()] == [2, 4, 6]
    assert whole.read_bytes() == broken.read_bytes()


def test_consistency_pairs_the_rows_of_a_reference(
    cascade: tuple[Path, Path], clip: Path, references: References, tmp_path: Path
) -> None:
    """A pair has one reference and one timestep, micro-batches do not split it, and the loss grows
    by lambda eta times what the classifier disagrees about."""
    found = {}
    profile = replace(PERSONALIZATION.profile, steps=1)
    for micro_batch, eta in ((4, 1e-9), (4, 1e4), (4, 2e4), (3, 2e4)):
        out = tmp_path / f"{micro_batch}-{eta}"
        settings = replace(
            PERSONALIZATION, profile=profile, micro_batch=micro_batch, consistency=eta, weight=1.0
        )
        personalized(cascade, clip, references, out, None, settings)
        found[micro_batch, eta] = losses(out, "personalize")[0][1]
    once, twice = (found[4, eta] - found[4, 1e-9] for eta in (1e4, 2e4))
    assert once > 1e-3
    assert twice == pytest.approx(2 * once, rel=0.02)
    assert found[3, 2e4] == pytest.approx(found[4, 2e4], rel=1e-2)


def test_only_the_adapter_learns_and_it_lowers_the_error(
    cascade: tuple[Path, Path], clip: Path, references: References, tmp_path: Path
) -> None:
    """Rank-4 factors of attention alone are stored, and the more steps, the smaller the error
    under noise that was not trained on."""
    settings = replace(
        PERSONALIZATION, weight=0.0, profile=replace(PERSONALIZATION.profile, steps=40, batch=12)
    )
    adapter = personalized(cascade, clip, references, tmp_path, None, settings)
    assert adapter is not None
    stored = load_file(adapter)
    assert all("lora_A" in name or "lora_B" in name for name in stored)
    assert all(4 in tensor.shape for tensor in stored.values())
    assert any("add_k_proj" in name for name in stored)
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    errors = [json.loads(line)["error"] for line in lines]
    assert errors[-1] < 0.98 * errors[0]


def test_an_adapter_is_served_as_it_was_trained(
    cascade: tuple[Path, Path], clip: Path, references: References, tmp_path: Path
) -> None:
    """The denoiser with the adapter in its weights equals the UNet with the adapter beside them,
    and differs from the one without."""
    adapter = personalized(cascade, clip, references, tmp_path, None)
    assert adapter is not None
    denoisers = [
        load_super_resolution(cascade[1], miniatures.states(), 1.8, CPU, torch.float32, Torch(), a)
        for a in (None, adapter)
    ]
    unet = UNet2DConditionModel.from_pretrained(cascade[1] / "unet")
    unet.load_lora_adapter(str(tmp_path), prefix=None, weight_name=adapter.name)
    assert {known.lora_alpha / known.r for known in unet.peft_config.values()} == {1.0}
    x_hat = references.images[:2].float() / 255
    sigma = torch.full((2,), 0.5, dtype=torch.float64)
    scheduler = miniatures.reference_scheduler()
    beside = SuperResolutionDenoiser(unet, scheduler.alphas_cumprod, miniatures.states(), 1.8)
    with torch.no_grad():
        plain, within = (denoise(x_hat, sigma) for denoise in denoisers)
        assert torch.allclose(within, beside(x_hat, sigma), atol=1e-5)
        assert not torch.allclose(within, plain, atol=1e-3)
