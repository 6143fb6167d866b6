"""Votes: fixed batches, independence of packing, and coverage of the whole chain."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom, norm
from torch import Tensor

from models.certificates.rules import certify
from models.denoisers.base import NoDenoiser
from models.denoisers.super_resolution import SuperResolutionDenoiser
from models.noise import discrete_gaussian
from models.rows import Rows
from models.runtime import numerics_of
from models.smoothing import SmoothedModel, best_dtype, votes
from tests.support import miniatures

CPU = torch.device("cpu")


class LinearClassifier:
    """A linear module in float64: label 1 where the mean of all values exceeds `threshold`."""

    labels = ("below", "above")

    def __init__(self, threshold: float, values: int) -> None:
        self.module = torch.nn.Linear(values, 2).double()
        with torch.no_grad():
            self.module.weight.copy_(torch.tensor([[0.0], [1.0 / values]]).expand(2, values))
            self.module.bias.copy_(torch.tensor([0.0, -threshold]))
        self.batches: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        logits: Tensor = self.module(x.double().flatten(1))
        return logits


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Emulation is slower than float32, and less exact."""
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):

        def supported(including_emulation: bool = True, native: bool = native) -> bool:
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert best_dtype(torch.device("cuda")) == dtype


def linear_model(
    threshold: float, batch_rows: int, values: int = 48, cpu_threads: int = 0
) -> SmoothedModel:
    numerics = numerics_of(CPU, torch.float32, batch_rows)
    head = LinearClassifier(threshold, values)
    return SmoothedModel(NoDenoiser(), head, numerics, CPU, cpu_threads=cpu_threads)


def miniature_model(batch_rows: int) -> SmoothedModel:
    """The diffusers UNet, narrow and random, before a random linear head of five classes."""
    dtype = best_dtype(CPU)
    denoiser = SuperResolutionDenoiser(
        miniatures.unet().to(dtype).to(memory_format=torch.channels_last),
        miniatures.reference_scheduler().alphas_cumprod,
        miniatures.states(),
        1.8,
    )
    head = torch.randn(3 * 32 * 32, 5, generator=torch.Generator().manual_seed(5))

    class Head:
        labels = tuple("abcde")

        def __call__(self, x: Tensor) -> Tensor:
            return (x - 0.5).flatten(1) @ head

    return SmoothedModel(denoiser, Head(), numerics_of(CPU, dtype, batch_rows), CPU)


def image(seed: int, shape: tuple[int, int, int] = (3, 32, 32)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_every_device_batch_has_one_shape() -> None:
    """Whatever the number of rows, the networks only ever see batches of the fixed size."""
    model = linear_model(0.5, batch_rows=8)
    for stop in (1, 7, 8, 9, 30):
        total = votes(model, Rows(image(0, (3, 4, 4)), b"k" * 32, 0, stop, 0.25))
        assert total.sum() == stop
    assert set(model.classifier.batches) == {8}


def test_votes_do_not_depend_on_the_cut() -> None:
    """A range of rows has the votes of its parts, through the real network at serving precision."""
    model = miniature_model(batch_rows=8)
    pixels, key = image(1), b"0123456789abcdef" * 2
    whole = votes(model, Rows(pixels, key, 3, 43, 0.5))
    parts = [votes(model, Rows(pixels, key, *cut, 0.5)) for cut in ((3, 4), (4, 21), (21, 43))]
    assert np.array_equal(whole, np.sum(parts, axis=0))
    assert (whole > 0).sum() > 1


@pytest.mark.parametrize("cpu_threads", [1, 2, 3])
def test_votes_do_not_depend_on_the_lanes(cpu_threads: int) -> None:
    """However many threads share a device batch, every row is counted once and for its own part,
    in batches of the fixed shape; what is said of padding is what was computed for nothing."""
    alone, shared = linear_model(0.5, 8), linear_model(0.5, 8, cpu_threads=cpu_threads)
    assert shared.batch_rows == 32 * cpu_threads
    small = (3, 4, 4)
    parts = [
        Rows(image(0, small), b"k" * 32, 3, 3 + 9, 0.25),
        Rows(image(1, small), b"l" * 32, 0, 1, 0.5),
        Rows(image(2, small), b"m" * 32, 40, 43, 1.0),
    ]
    wanted = [alone.votes([Rows(p.pixels, p.key, i, i + 1, p.sigma)])[0]
              for p in parts for i in range(p.start, p.stop)]  # fmt: skip
    told = shared.votes(parts)
    assert told.sum(1).tolist() == [9, 1, 3]
    assert np.array_equal(told[0], np.sum(wanted[:9], 0))
    assert np.array_equal(told[1:], [wanted[9], np.sum(wanted[10:], 0)])
    assert set(shared.classifier.batches) == {8}
    assert 8 * len(shared.classifier.batches) == 13 + shared.padding(13)


def test_an_error_in_a_lane_reaches_the_caller() -> None:
    """What fails in one lane fails the whole device batch."""
    model = linear_model(float("nan"), 4, cpu_threads=2)
    with pytest.raises(FloatingPointError, match="not finite"):
        model.votes([Rows(image(0, (3, 4, 4)), b"k" * 32, 0, 10, 0.25)])


def test_labels_do_not_depend_on_companions_or_place() -> None:
    """A row's label is the same alone, first or last, beside other images, keys and sigmas."""
    model = miniature_model(batch_rows=8)
    mine = Rows(image(1), b"0123456789abcdef" * 2, 0, 3, 0.5)
    others = [Rows(image(seed), bytes([seed]) * 32, 5, 7, 0.25) for seed in (2, 3)]
    alone = model.labels([mine])
    assert np.array_equal(model.labels([mine, *others])[:3], alone)
    assert np.array_equal(model.labels([others[1], mine, others[0]])[2:5], alone)


def test_noise_is_added_to_the_grid_and_not_clipped() -> None:
    """The batch holds (pixel + noise) / 255, values beyond [0,1] included, then black padding."""
    model = linear_model(0.5, batch_rows=4)
    rows = Rows(image(4, (3, 8, 8)), b"a" * 32, 10, 13, 1.0)
    x_hat, sigma = model.noisy([rows])
    noise = discrete_gaussian(rows.key, 10, 13, (3, 8, 8), 1.0)
    assert torch.equal(x_hat[:3], (noise + torch.tensor(rows.pixels)) / 255)
    assert float(x_hat.min()) < 0
    assert float(x_hat.max()) > 1
    assert not x_hat[3].any()
    assert sigma.tolist() == [1.0] * 4


def test_logits_that_are_not_finite_are_an_error() -> None:
    """A network gone NaN raises, where argmax would call every row label 0 and certify it."""
    with pytest.raises(FloatingPointError, match="not finite"):
        linear_model(float("nan"), batch_rows=4).votes(
            [Rows(image(0, (3, 4, 4)), b"k" * 32, 0, 1, 0.25)]
        )


def test_batches_that_do_not_fit_are_refused() -> None:
    """No rows, too many, and images of several shapes are errors, not silent cuts."""
    model = linear_model(0.5, batch_rows=4)
    small, large = image(0, (3, 4, 4)), image(0, (3, 8, 8))
    with pytest.raises(ValueError, match="5 rows requested; a device batch holds 1 to 4"):
        model.votes([Rows(small, b"k" * 32, 0, 5, 0.25)])
    with pytest.raises(ValueError, match="0 rows"):
        model.votes([])
    with pytest.raises(ValueError, match="different shapes"):
        model.votes([Rows(small, b"k" * 32, 0, 1, 0.25), Rows(large, b"k" * 32, 0, 1, 0.25)])


def sum_distribution(sigma: float, pixels: int) -> tuple[int, NDArray[np.float64]]:
    """P(sum of `pixels` discrete Gaussians = offset + index), by convolution; (offset, P)."""
    reach = int(40 * sigma * 255 / 2)
    steps = np.arange(-reach, reach + 1)
    upper, lower = (2 * steps + 1) / (510 * sigma), (2 * steps - 1) / (510 * sigma)
    one = np.where(steps > 0, norm.sf(lower) - norm.sf(upper), norm.cdf(upper) - norm.cdf(lower))
    size = 1 << (pixels * (len(one) - 1)).bit_length()
    spread = np.fft.irfft(np.fft.rfft(one, size) ** pixels, size)
    return -reach * pixels, np.clip(spread[: pixels * (len(one) - 1) + 1], 0, None)


def test_coverage_through_noise_and_votes() -> None:
    """2,000 certifications of a linear classifier through noise.py and votes: the radius exceeds
    the exact margin no more often than the 1 - 1e-6 quantile of Binomial(2000, alpha)."""
    sigma, alpha, n0, n, trials = 0.25, 0.05, 4, 60, 2_000
    pixels = np.full((3, 4, 4), 128, np.uint8)
    offset, chances = sum_distribution(sigma, pixels.size)
    sums = offset + np.arange(len(chances)) + int(pixels.sum(dtype=np.int64))
    boundary = Fraction(int(pixels.sum(dtype=np.int64)) - 340)
    probability = float(chances[sums > boundary].sum())
    assert 0.7 < probability < 0.85
    model = linear_model(float(boundary + Fraction(1, 2)) / 255 / pixels.size, batch_rows=n)
    exceeded = 0
    for trial, domain in itertools.product(range(trials), (b"s", b"e")):
        key = trial.to_bytes(8, "little") + domain * 24
        counted = votes(model, Rows(pixels, key, 0, n0 if domain == b"s" else n, sigma))
        if domain == b"s":
            selection = counted.tolist()
            continue
        certificate = certify(selection, counted.tolist(), sigma, alpha, method="cohen")
        truth = probability if certificate.label == 1 else 1 - probability
        assert certificate.p_lower is not None
        exceeded += certificate.p_lower > truth
        if not certificate.abstained and certificate.p_lower <= truth:
            assert certificate.radius <= sigma * norm.ppf(truth)
    assert 0 < exceeded <= binom.ppf(1 - 1e-6, trials, alpha)
