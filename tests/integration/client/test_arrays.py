"""`certify` on arrays: against a closed form, the service's own statistics, and bad arguments."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from models.certificates import rules
from models.noise import total_variation
from service.client import certify
from tests.support.paths import ROOT


class Half(nn.Module):
    """Class 1 where the mean of x lies above 1/2: the smoothed label's true radius is known."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.shape)
        above = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-above, above], 1)


def uniform(level: int, side: int = 4) -> np.ndarray:
    return np.full((3, side, side), level, np.uint8)


@pytest.fixture
def model() -> nn.Module:
    return Half().eval()


@pytest.mark.parametrize("method", ["two-sided", "cohen"])
def test_radii_lie_below_the_true_distance(model: nn.Module, method: str) -> None:
    """The hyperplane is |mean - 1/2| sqrt(d) away; radii are below, and close for many rows."""
    images = np.stack([uniform(level) for level in (120, 134, 136, 255)])
    labels, radii = certify(model, images, 0.25, n0=50, n=4000, method=method, seed=1)
    distance = np.abs(images[:, 0, 0, 0] / 255 - 0.5) * np.sqrt(3 * 4 * 4)
    assert labels.tolist() == [0, 1, 1, 1]
    assert (radii <= distance).all()
    assert (radii[:3] > 0.75 * distance[:3]).all()
    blur = total_variation(0.25, (3, 4, 4))
    best = rules.certify([0, 50], [0, 4000], 0.25, 0.001, method=method, total_variation=blur)
    assert radii[3] == best.radius


def test_the_votes_are_those_of_the_gaussian(model: nn.Module) -> None:
    """The radius goes to sigma Phi^-1(p), p the share of the Gaussian on the label's side."""
    sigma = 0.5
    level = round((0.5 + 0.3 * sigma / np.sqrt(48)) * 255)
    p = norm.cdf((level / 255 - 0.5) * np.sqrt(48) / sigma)
    labels, radii = certify(model, uniform(level)[None], sigma, n0=100, n=20_000, seed=0)
    assert labels.tolist() == [1]
    assert radii[0] == pytest.approx(sigma * norm.ppf(p), abs=0.03)


def test_an_abstention_is_minus_one_without_radius(model: nn.Module) -> None:
    """A picture on the boundary has no label; a torch tensor is an array, too."""
    images = torch.from_numpy(np.stack([uniform(127), uniform(0)]))
    images[0, :, :, :2] = 128
    labels, radii = certify(model, images, 1.0, n=100)
    assert labels.tolist() == [-1, 0]
    assert radii[0] == 0.0 < radii[1]
    assert (labels.dtype, radii.dtype) == (np.int64, np.float64)


def test_batches_have_one_shape_and_seeds_repeat(model: Half) -> None:
    """The module always gets `batch_rows` rows; a seed repeats the radii, no seed does not."""
    image = uniform(140)[None]
    question = {"n0": 10, "n": 300, "batch_rows": 32}
    first, again = (certify(model, image, 0.5, seed=3, **question)[1] for _ in range(2))  # type: ignore[arg-type]
    assert first == again
    assert set(model.batches) == {torch.Size((32, 3, 4, 4))}
    fresh = {certify(model, image, 0.5, **question)[1][0] for _ in range(8)}  # type: ignore[arg-type]
    assert len(fresh) > 1


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"images": np.zeros((1, 3, 4, 4))}, TypeError, "float64: must be uint8"),
        ({"images": np.zeros((4, 4, 3), np.uint8)}, ValueError, r"\(4, 4, 3\): must be \(N,3"),
        ({"sigma": 9.0}, ValueError, "sigma"),
        ({"n": 5}, ValueError, "n = 5 at alpha = 0.001 can only ever abstain"),
        ({"alpha": 2.0}, ValueError, "alpha = 2.0"),
        ({"method": "anytime"}, ValueError, "method = 'anytime': must be one of two-sided, cohen"),
        ({"batch_rows": 0}, ValueError, "batch_rows = 0: must be at least 1"),
        ({"model": nn.Flatten().train()}, ValueError, "training mode"),
        ({"model": lambda x: x.mean((1, 2, 3))}, ValueError, r"returns \(64,\): must be \(B,K\)"),
        ({"model": lambda x: torch.full((len(x), 2), torch.nan)}, FloatingPointError, "finite"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    model: nn.Module, change: dict[str, Any], error: type[Exception], reason: str
) -> None:
    """A message has the argument, its value and its limit."""
    question = {"model": model, "images": uniform(0)[None], "sigma": 0.25, **change}
    with pytest.raises(error, match=reason):
        certify(**question)


def test_without_torch_the_error_names_the_extra() -> None:
    """The client itself imports without torch; certify says what to install."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\nfrom service.client import Client, certify\n"
        "certify(print, np.zeros((1, 3, 4, 4), np.uint8), 0.25)\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert run.stderr.splitlines()[-1].startswith("ImportError: certify needs torch")
    assert "pip install '.[torch]' in the checkout" in run.stderr


def test_the_client_imports_nothing_else_of_the_service() -> None:
    """A fresh interpreter loads no module of the service but the client's, and no torch."""
    code = (
        "import sys, service.client\n"
        "odd = [m for m in sys.modules if m.startswith(('service.', 'models', 'torch'))"
        " and not m.startswith('service.client')]\n"
        "sys.exit(str(odd) if odd else 0)"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert run.stderr == ""
