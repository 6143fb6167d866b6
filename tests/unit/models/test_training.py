"""The training loop: resumed runs make the same steps, and only what is asked for learns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.training import Diverged, Profile, disagreement, fit

CPU = torch.device("cpu")
PROFILE = Profile(steps=8, batch=4, learning_rate=0.1, ema=0.9, log_every=2, checkpoint_every=1)


def trained(out: Path, profile: Profile, steps: int, optimized: bool = False) -> nn.Linear:
    """A linear layer after so many of the profile's steps, checkpointed at each."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def losses(step: int) -> Iterator[Tensor]:
        if step == steps:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        yield model(x).float().square().mean()

    optimizer = torch.optim.SGD([{"params": [model.bias], "scale": 2.0}], momentum=0.9)
    try:
        fit("part", model, losses, out, profile, CPU, optimizer if optimized else None)
    except KeyboardInterrupt:
        assert steps < profile.steps
    return model


@pytest.mark.parametrize("optimized", [False, True])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, optimized: bool) -> None:
    """Weights, averages and the optimizer's state come back to the bit."""
    for out in ("whole", "broken"):
        (tmp_path / out).mkdir()
    whole = trained(tmp_path / "whole", PROFILE, 8, optimized)
    trained(tmp_path / "broken", PROFILE, 3, optimized)
    resumed = trained(tmp_path / "broken", PROFILE, 8, optimized)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_what_the_optimizer_was_not_given_stays(tmp_path: Path) -> None:
    """A parameter outside the optimizer's groups keeps its value; the others learn."""
    torch.manual_seed(0)
    before = nn.Linear(3, 2)
    after = trained(tmp_path, replace(PROFILE, ema=0.0), 8, optimized=True)
    assert torch.equal(before.weight, after.weight)
    assert not torch.equal(before.bias, after.bias)


def test_the_rate_warms_up_falls_to_nothing_and_begins_anew() -> None:
    """A cosine after the warm-up's share; after `restart` another at half the rate."""
    profile = Profile(steps=300, batch=1, learning_rate=1, restart=100, warm_up=0.2, clip=inf)
    rates = [profile.rate(step) for step in range(300)]
    assert max(range(100), key=rates.__getitem__) in range(15, 25)
    assert rates[99] < 0.01 < rates[110]
    assert max(rates[100:]) == pytest.approx(max(rates[:100]) / 2, rel=0.05)
    assert rates[299] < 0.01


def test_a_resumed_run_logs_what_an_uninterrupted_one_logs(tmp_path: Path) -> None:
    """Steps made twice are logged once, with the same losses; a line cut short is dropped."""
    for out in ("whole", "broken"):
        (tmp_path / out).mkdir()
    trained(tmp_path / "whole", PROFILE, 8)
    trained(tmp_path / "broken", replace(PROFILE, checkpoint_every=2), 5)
    log = tmp_path / "broken" / "part.loss.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "loss": 9.0, "seconds": 1}\n{"step": 8, "lo')
    trained(tmp_path / "broken", PROFILE, 8)
    logs = [
        [json.loads(line) for line in (tmp_path / out / "part.loss.jsonl").read_text().splitlines()]
        for out in ("whole", "broken")
    ]
    whole, broken = ([(entry["step"], entry["loss"]) for entry in log] for log in logs)
    assert [step for step, _ in whole] == [2, 4, 6, 8]
    assert whole == broken


def test_only_what_learns_is_in_a_checkpoint(tmp_path: Path) -> None:
    """A frozen parameter is neither saved nor needed to go on; buffers are saved."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    x = torch.randn(4, 3)
    fit("part", model, lambda step: [model(x).square().mean()], tmp_path, PROFILE, CPU)
    with safe_open(tmp_path / "part.checkpoint.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert "model.0.bias" in names
    assert "model.1.running_mean" in names
    assert "model.0.weight" not in names


def test_parts_of_a_loss_add_up(tmp_path: Path) -> None:
    """A batch in two halves teaches what the whole batch does."""
    x, ended = torch.randn(8, 3), []
    for cut in (8, 4):
        torch.manual_seed(0)
        model, out = nn.Linear(3, 2), tmp_path / str(cut)
        out.mkdir()
        profile = replace(PROFILE, ema=0.0)
        fit("part", model, lambda _, c=cut, m=model: _halves(m, x, c), out, profile, CPU)
        ended.append(model.weight.detach())
    assert torch.allclose(*ended, atol=2e-3)


def _halves(model: nn.Linear, x: Tensor, cut: int) -> Iterator[Tensor]:
    for part in x.split(cut):
        yield model(part).float().square().mean() * len(part) / len(x)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    """What diverged is named with its step, before the weights are spoiled."""
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()

    def losses(step: int) -> list[Tensor]:
        return [model.weight.sum() * (math.nan if step else 0.0)]

    with pytest.raises(Diverged, match="part: the loss of step 2 is nan"):
        fit("part", model, losses, tmp_path, replace(PROFILE, ema=0.0), CPU)
    assert torch.equal(model.weight, before)


def test_disagreement_is_the_divergence_from_the_average() -> None:
    """Shares .9 and .3 of the first of two labels: their average is .6. Equal draws agree."""
    shares = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7], [0.5, 0.5]]])
    first = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    second = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    found = disagreement(shares.log() + 7.0)
    assert found.tolist() == pytest.approx([(first + second) / 2, 0.0], abs=1e-6)
