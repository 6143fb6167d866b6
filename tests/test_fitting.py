"""The training loop: resumed runs make the same steps, and only what is asked for learns."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.nano.fitting import Profile, fit

CPU = torch.device("cpu")
PROFILE = Profile(steps=8, batch=4, learning_rate=0.1, ema=0.9)


def trained(out: Path, profile: Profile, steps: int, optimized: bool = False) -> nn.Linear:
    """A linear layer after so many of the profile's steps, checkpointed at each."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss(step: int) -> Tensor:
        if step == steps:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return model(x).float().square().mean()

    optimizer = torch.optim.SGD([{"params": [model.bias], "scale": 2.0}], momentum=0.9)
    try:
        fit("part", model, loss, out, profile, CPU, 1, optimizer if optimized else None)
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
