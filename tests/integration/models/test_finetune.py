"""Fine-tuning: resumable, learning what it says it learns, and served as it was made."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.adaptation.finetune import Finetuning, finetune
from models.adaptation.references import References
from models.adaptation.tunables import TUNABLES
from models.classifiers.base import Classifier
from models.classifiers.registry import CLASSIFIERS
from models.denoisers.base import NoDenoiser
from models.runtime import Torch
from models.training import Profile
from tests.support import miniatures, own_networks

CPU = torch.device("cpu")
TEMPLATE = "a {}."
PAPERS = Finetuning(
    Profile(steps=0, batch=0, learning_rate=1e-2, log_every=1, checkpoint_every=1),
    sigmas=(0.1, 0.5),
    largest_batch=4,
    micro_batch=3,
)
DISTILLED = replace(PAPERS, soft_targets=True, mixing=0.5)
CONSISTENT = replace(PAPERS, consistency=10.0)


class Stopped(Exception):
    """The run is cut short here."""


@pytest.fixture
def references() -> References:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return References(images, torch.tensor([0, 0, 1, 1, 2, 2]))


HEADS = {
    "open-clip": ("open-clip", miniatures.save_open_clip),
    "timm": ("timm", miniatures.save_timm),
    "vit": ("transformers", own_networks.save_vit),
    "siglip": ("transformers", own_networks.save_siglip),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    kind, save = HEADS[request.param]
    return kind, save(tmp_path / "head")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return miniatures.save_open_clip(tmp_path / "clip")


def finetuned(
    head: tuple[str, Path],
    references: References,
    out: Path,
    settings: Finetuning = PAPERS,
    epochs: int = 3,
) -> Path:
    out.mkdir(exist_ok=True)
    kind, folder = head
    tunable = TUNABLES[kind](folder, miniatures.LABELS, TEMPLATE, CPU)
    return finetune(tunable, NoDenoiser(), references, settings, epochs, out, CPU)


def cut_short(
    head: tuple[str, Path], references: References, out: Path, settings: Finetuning, stop: int
) -> None:
    """The same run, that ends before step `stop` is checkpointed."""

    def on_step(done: int, whole: int, loss: float) -> None:
        if done == stop:
            raise Stopped

    out.mkdir(exist_ok=True)
    tunable = TUNABLES[head[0]](head[1], miniatures.LABELS, TEMPLATE, CPU)
    with suppress(Stopped):
        finetune(tunable, NoDenoiser(), references, settings, 3, out, CPU, on_step=on_step)
    assert not (out / "classifier.safetensors").exists()


def losses(out: Path) -> list[tuple[int, float]]:
    lines = (out / "finetune.loss.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def served(head: tuple[str, Path], tuned: Path | None) -> Classifier:
    kind, folder = head
    load = CLASSIFIERS[kind]
    return load(folder, miniatures.LABELS, TEMPLATE, CPU, torch.float32, Torch(), tuned)


@pytest.mark.parametrize(
    "settings", [PAPERS, DISTILLED, CONSISTENT], ids=["labels", "soft targets", "consistent"]
)
def test_a_fine_tuning_goes_on_exactly_and_is_served_as_it_was_made(
    head: tuple[str, Path], references: References, tmp_path: Path, settings: Finetuning
) -> None:
    """Same losses and weights as an uninterrupted run; the weights, in float32, load into the
    served classifier, whose logits they change."""
    whole = finetuned(head, references, tmp_path / "whole", settings)
    cut_short(head, references, tmp_path / "broken", settings, stop=4)
    broken = finetuned(head, references, tmp_path / "broken", settings)
    assert [step for step, _ in losses(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert whole.read_bytes() == broken.read_bytes()
    stored = load_file(whole)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float32}
    x = references.images.float() / 255
    assert not torch.allclose(served(head, None)(x), served(head, whole)(x), atol=1e-2)


def test_both_towers_of_a_clip_learn(clip: Path, references: References, tmp_path: Path) -> None:
    """Image and text encoder change; the scale of the logits, which neither owns, rests."""
    tuned = finetuned(("open-clip", clip), references, tmp_path / "tuned")
    before, after = load_file(clip / "open_clip_model.safetensors"), load_file(tuned)
    changed = {name for name in after if not torch.equal(before[name].float(), after[name].float())}
    assert any(name.startswith("visual.") for name in changed)
    assert "token_embedding.weight" in changed
    assert "logit_scale" not in changed
    assert not any("running_mean" in name for name in changed)


def test_logits_are_not_rounded_to_bfloat16(clip: Path, references: References) -> None:
    """A training's steps run under autocast; a CLIP's cosines are multiplied by up to 100 there."""
    tunable = TUNABLES["open-clip"](clip, miniatures.LABELS, TEMPLATE, CPU)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = tunable(references.images.float() / 255)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_the_papers_loss_is_the_cross_entropy_of_the_labels(
    head: tuple[str, Path], references: References, tmp_path: Path
) -> None:
    """Without noise, the first step's loss is that of the resting classifier, up to bfloat16."""
    settings = replace(PAPERS, sigmas=(0.0, 0.0), largest_batch=6)
    finetuned(head, references, tmp_path / "out", settings, epochs=1)
    logits = served(head, None)(references.images.float() / 255)
    wanted = torch.nn.functional.cross_entropy(logits, references.labels)
    assert losses(tmp_path / "out")[0][1] == pytest.approx(float(wanted), rel=5e-3)


def test_soft_targets_are_what_the_resting_classifier_says(
    head: tuple[str, Path], references: References, tmp_path: Path
) -> None:
    """Labels play no part; without noise, the first step's loss is the targets' entropy."""
    settings = replace(DISTILLED, sigmas=(0.0, 0.0), largest_batch=6)
    others = replace(references, labels=references.labels.flip(0))
    told = [
        finetuned(head, these, tmp_path / str(place), settings, epochs=1).read_bytes()
        for place, these in enumerate((references, others))
    ]
    assert told[0] == told[1]
    shares = served(head, None)(references.images.float() / 255).softmax(-1)
    wanted = -(shares * shares.log()).sum(-1).mean()
    assert losses(tmp_path / "0")[0][1] == pytest.approx(float(wanted), rel=5e-3)


def test_stored_is_the_mean_of_resting_and_tuned_weights(
    head: tuple[str, Path], references: References, tmp_path: Path
) -> None:
    """With a quarter of the tuned ones; a run that was cut mixes in the same resting weights."""
    tuned = load_file(finetuned(head, references, tmp_path / "tuned"))
    settings = replace(PAPERS, mixing=0.25)
    cut_short(head, references, tmp_path / "mixed", settings, stop=4)
    mixed = load_file(finetuned(head, references, tmp_path / "mixed", settings))
    network = TUNABLES[head[0]](head[1], miniatures.LABELS, TEMPLATE, CPU).network
    resting = {name: tensor.float() for name, tensor in network.state_dict().items()}
    assert any(not torch.equal(tuned[name].float(), tensor) for name, tensor in resting.items())
    for name, tensor in resting.items():
        expected = 0.75 * tensor + 0.25 * tuned[name]
        assert torch.allclose(mixed[name].float(), expected, atol=1e-6), name
    assert losses(tmp_path / "mixed") == losses(tmp_path / "tuned")


def test_consistency_adds_the_disagreement_of_two_draws(
    clip: Path, references: References, tmp_path: Path
) -> None:
    """Without noise two draws are alike and the loss is the paper's; with noise it is larger by
    eta times what the draws disagree about."""
    head = ("open-clip", clip)
    calm = replace(PAPERS, sigmas=(0.0, 0.0), largest_batch=6)
    noisy = replace(PAPERS, sigmas=(0.5, 0.5), largest_batch=6)
    found = {}
    for name, settings in (("calm", calm), ("noisy", noisy)):
        for eta in (0.0, 1e-9, 1e4, 2e4):
            out = tmp_path / f"{name}-{eta}"
            finetuned(head, references, out, replace(settings, consistency=eta), epochs=1)
            found[name, eta] = losses(out)[0][1]
    assert found["calm", 2e4] == pytest.approx(found["calm", 0.0], rel=1e-3)
    once, twice = (found["noisy", eta] - found["noisy", 1e-9] for eta in (1e4, 2e4))
    assert once > 1e-3
    assert twice == pytest.approx(2 * once, rel=0.02)
