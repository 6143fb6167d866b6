"""Attacks: exact gradients, closed forms, and the sanity that a miniature and nano show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import DEFAULT_TASK, read_bundle
from models.denoisers.base import NoDenoiser
from models.denoisers.super_resolution import SuperResolutionDenoiser
from models.evaluation.attacks.grid import distance, rounded, rounded_linf
from models.evaluation.attacks.pgd import pgd, pgd_linf, random_noise
from models.evaluation.attacks.pipeline import Pipeline, smoothed, undefended
from models.evaluation.attacks.registry import Strength, Target, attacked
from models.evaluation.datasets.cifar10 import SLICE, evaluation_slice
from models.noise import discrete_gaussian
from models.rows import Rows
from models.runtime import Torch, numerics_of
from models.smoothing import SmoothedModel, load
from tests.support import miniatures

CPU = torch.device("cpu")
KEY = b"0123456789abcdef" * 2
SHAPE = (3, 32, 32)
SIGMA = 0.25


class Linear:
    """Logits of two classes, 0 and `scale` * (w . x - threshold), with w of length 1."""

    labels = ("below", "above")

    def __init__(self, weights: Tensor, threshold: float, scale: float = 1.0) -> None:
        self.weights = weights / weights.norm()
        self.threshold, self.scale = threshold, scale

    def __call__(self, x: Tensor) -> Tensor:
        above = self.scale * ((x * self.weights.to(x.dtype)).sum((1, 2, 3)) - self.threshold)
        return torch.stack([torch.zeros_like(above), above], 1)


@pytest.fixture(scope="module")
def miniature() -> SmoothedModel:
    """The diffusers UNet, narrow and random, before a random head of five classes; float64."""
    scheduler = miniatures.reference_scheduler()
    denoiser = SuperResolutionDenoiser(
        miniatures.unet().double().requires_grad_(False),
        scheduler.alphas_cumprod,
        miniatures.states(),
        1.8,
    )
    head = torch.randn(3 * 32 * 32, 5, generator=torch.Generator().manual_seed(5))

    class Head:
        labels = tuple("abcde")

        def __call__(self, x: Tensor) -> Tensor:
            return (x - 0.5).flatten(1) @ head.to(x.dtype) / 20

    return SmoothedModel(denoiser, Head(), numerics_of(CPU, torch.float64, 4), CPU)


@pytest.fixture(scope="module")
def nano() -> SmoothedModel:
    return load(
        read_bundle(DEFAULT_TASK), dtype=torch.float32, batch_rows=8, cpu_threads=0, runtime=Torch()
    )


def image(index: int) -> tuple[NDArray[np.uint8], int]:
    data = evaluation_slice(SLICE)
    return np.ascontiguousarray(data.images[index].transpose(2, 0, 1)), int(data.labels[index])


def tensor(pixels: NDArray[np.uint8], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(pixels, dtype=dtype) / 255


def rows(model: SmoothedModel, count: int, batch_rows: int, fresh: bool = False) -> Pipeline:
    return smoothed(
        model, SIGMA, SHAPE, CPU, key=KEY, rows=count, batch_rows=batch_rows, fresh=fresh
    )


def test_the_gradient_is_that_of_the_continuous_pipeline(miniature: SmoothedModel) -> None:
    """Through the rows of discrete noise, the denoiser and the head, autograd agrees with central
    differences of the continuous pipeline in float64, at an image off the grid."""
    pipeline = rows(miniature, 3, 2)
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    loss, gradient = pipeline.gradient(x, 2)
    assert loss == pytest.approx(pipeline.loss(x, 2), abs=1e-12)
    for _ in range(4):
        towards = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        towards, h = towards / towards.norm(), 1e-5
        slope = (pipeline.loss(x + h * towards, 2) - pipeline.loss(x - h * towards, 2)) / (2 * h)
        assert slope == pytest.approx(float((gradient * towards).sum()), rel=1e-5, abs=1e-9)
    assert float(gradient.norm()) > 0


def test_the_loss_is_smooth_adversarial_whatever_the_batches(miniature: SmoothedModel) -> None:
    """It is -log of the rows' mean probability, with the gradient of all rows at once."""
    x = tensor(image(0)[0], torch.float64)
    pipeline = rows(miniature, 6, 6)
    noise = discrete_gaussian(KEY, 0, 6, SHAPE, SIGMA) / 255
    at = x.clone().requires_grad_()
    direct = -pipeline.logits(at, noise).softmax(1)[:, 3].mean().log()
    wanted = torch.autograd.grad(direct, at)[0]
    for batch_rows in (1, 4, 6):
        loss, gradient = rows(miniature, 6, batch_rows).gradient(x, 3)
        assert loss == pytest.approx(direct.item(), abs=1e-12)
        assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_the_pipeline_labels_rows_as_the_service_does(nano: SmoothedModel) -> None:
    """At an image of the grid, a row's largest logit is the label that the votes count."""
    pixels, _ = image(3)
    noise = discrete_gaussian(KEY, 0, 8, SHAPE, SIGMA) / 255
    with torch.no_grad():
        logits = rows(nano, 8, 8).logits(tensor(pixels), noise)
    assert np.array_equal(logits.argmax(1), nano.labels([Rows(pixels, KEY, 0, 8, SIGMA)]))


def test_fresh_rows_change_with_the_step_and_fixed_ones_do_not(miniature: SmoothedModel) -> None:
    """Expectation over transformation draws the next rows of the same key at each step."""
    x = tensor(image(0)[0], torch.float64)
    fixed, fresh = rows(miniature, 2, 2), rows(miniature, 2, 2, fresh=True)
    assert fixed.loss(x, 0, 0) == fixed.loss(x, 0, 1) == fresh.loss(x, 0, 0) != fresh.loss(x, 0, 1)


def test_linf_attacks_reach_the_worst_point_of_a_linear_classifier() -> None:
    """That is x - eps sign(w), and on the grid a whole number of gray levels."""
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    head, pixels = Linear(weights, 0.0), np.full(SHAPE, 128, np.uint8)
    found = pgd_linf(undefended(head, SHAPE, CPU), tensor(pixels), 1, 8 / 255, 10, KEY)
    torch.testing.assert_close(found, tensor(pixels) - 8 / 255 * head.weights.sign())
    on_grid = rounded_linf(pixels, found.numpy(), 8 / 255).astype(int)
    assert set(np.unique(on_grid - 128)) == {-8, 8}
    cut = rounded_linf(pixels, found.numpy(), 2.9 / 255).astype(int)
    assert set(np.unique(cut - 128)) == {-2, 2}
    model = SmoothedModel(NoDenoiser(), head, numerics_of(CPU, torch.float32, 4), CPU)
    strength = Strength(8 / 255, 10, 2, 2, seed=0)
    for name in ("pgd-linf", "eot-linf"):
        by_name = attacked(name, Target(model, SIGMA, pixels, 1, 0), strength)
        assert np.array_equal(by_name, on_grid)


def test_pgd_nears_the_worst_point_of_a_linear_classifier() -> None:
    """Inside [0,1] that is x - eps w, under noise too. A label falls beyond the margin only."""
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    x = torch.full(SHAPE, 0.5)
    head = Linear(weights, float((0.5 * weights / weights.norm()).sum()) - 0.3)
    model = SmoothedModel(NoDenoiser(), head, numerics_of(CPU, torch.float32, 4), CPU)
    for pipeline in (undefended(head, SHAPE, CPU), rows(model, 4, 4)):
        for key in (KEY, KEY[::-1]):
            found = pgd(pipeline, x, 1, 0.4, 50, key)
            assert 0.95 * 0.4 < float(((x - found) * head.weights).sum()) < 0.4 + 1e-4
    alone = undefended(head, SHAPE, CPU)
    labels = [int(head(pgd(alone, x, 1, eps, 50, KEY)[None]).argmax()) for eps in (0.299, 0.32)]
    assert labels == [1, 0]


def test_a_sure_classifier_still_gives_a_direction() -> None:
    """A probability that is 1 in float32 does not stop the attack."""
    head = Linear(torch.ones(SHAPE), 0.0, scale=1.0)
    x = torch.full(SHAPE, 0.9)
    assert float(head(x[None]).softmax(1)[0, 1]) == 1.0
    found = pgd(undefended(head, SHAPE, CPU), x, 1, 1.0, 20, KEY)
    assert float(((x - found) * head.weights).sum()) > 0.95


def test_attacks_stay_in_the_ball_and_the_cube() -> None:
    """Images near black and white are cut to [0,1], and no change is longer than eps."""
    head = Linear(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), 0.0)
    x = torch.zeros(SHAPE)
    x[:, 16:] = 1.0
    for attack in (pgd, random_noise):
        found = attack(undefended(head, SHAPE, CPU), x, 1, 2.0, 5, KEY)
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1 + 1e-6
        assert 0 < float((found - x).norm()) <= 2.0 + 1e-5


def test_networks_without_gradients_are_refused() -> None:
    """The message says which attack remains, and that one works."""

    class Opaque:
        labels = ("a", "b")

        def __call__(self, x: Tensor) -> Tensor:
            sums = torch.tensor(x.detach().numpy().sum((1, 2, 3)))
            return torch.stack([sums, -sums], 1)

    opaque = undefended(Opaque(), SHAPE, CPU)
    with pytest.raises(ValueError, match="give no gradients: only --attack random"):
        pgd(opaque, torch.full(SHAPE, 0.5), 0, 0.5, 2, KEY)
    assert opaque.loss(random_noise(opaque, torch.full(SHAPE, 0.5), 0, 0.5, 3, KEY), 0) >= 0


def test_logits_that_are_not_finite_are_an_error() -> None:
    """A network gone NaN raises, where the attack would return an image of NaNs."""
    head = Linear(torch.ones(SHAPE), float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        pgd(undefended(head, SHAPE, CPU), torch.full(SHAPE, 0.5), 0, 0.5, 2, KEY)


STRENGTH = Strength(eps=0.5, steps=8, rows=4, batch_rows=4, seed=0)


@pytest.mark.parametrize("sigma", [None, SIGMA])
def test_more_steps_and_gradients_of_the_right_pipeline_attack_harder(
    nano: SmoothedModel, sigma: float | None
) -> None:
    """On nano the loss grows with the steps; random noise is weaker than PGD, and so is an attack
    of the classifier alone on the smoothed one."""
    losses: dict[str, float] = {"none": 0.0, "one step": 0.0, "pgd": 0.0, "eot": 0.0,
                                "random": 0.0, "transfer": 0.0}  # fmt: skip
    for index in (1, 2):
        target = Target(nano, sigma, *image(index), index)
        judge = target.pipeline(replace(STRENGTH, rows=16, seed=1))

        def loss(
            pixels: NDArray[np.uint8], judge: Pipeline = judge, to: int = target.label
        ) -> float:
            return judge.loss(tensor(pixels), to)

        losses["none"] += loss(target.pixels)
        losses["one step"] += loss(attacked("pgd", target, replace(STRENGTH, steps=1)))
        for name in ("pgd", "eot", "random", "transfer"):
            losses[name] += loss(attacked(name, target, STRENGTH))
    assert losses["none"] < losses["random"] < losses["one step"] < losses["pgd"]
    assert losses["random"] < losses["eot"]
    if sigma is None:
        assert losses["pgd"] == losses["eot"] == losses["transfer"]
    else:
        assert losses["random"] < losses["transfer"] < min(losses["pgd"], losses["eot"])


@pytest.mark.parametrize("sigma", [None, SIGMA])
def test_an_unbounded_attack_always_succeeds(nano: SmoothedModel, sigma: float | None) -> None:
    """With eps beyond the cube's diagonal every label falls."""
    strength = replace(STRENGTH, eps=60.0, steps=20)
    for index in (1, 2, 4):
        target = Target(nano, sigma, *image(index), index)
        found = attacked("pgd", target, strength)
        judge = target.pipeline(replace(strength, rows=8, seed=1))
        assert judge.loss(tensor(found), target.label) > np.log(2)


def test_an_attack_can_be_repeated_to_the_pixel(nano: SmoothedModel) -> None:
    """The same seed gives the same image, another seed another; attacks have keys of their own."""
    target = Target(nano, SIGMA, *image(2), 2)
    quick = replace(STRENGTH, steps=2)
    runs = [attacked("pgd", target, replace(quick, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert target.key(quick, "rows") != target.key(quick, "start")


pictures = arrays(np.uint8, (3, 4, 4))
changes = arrays(np.float64, (3, 4, 4), elements=st.floats(-1, 1, width=32))


@given(pictures, changes, st.floats(0.001, 2))
def test_rounding_keeps_to_the_ball(
    pixels: NDArray[np.uint8], change: NDArray[np.float64], eps: float
) -> None:
    """The rounded image lies within eps and one level of the attacked one, on the same side."""
    change = change * min(1.0, eps / max(1e-9, float(np.linalg.norm(change))))
    wanted = np.clip(pixels / 255 + change, 0, 1)
    found = rounded(pixels, wanted, eps)
    assert distance(pixels, found) <= eps * (1 + 1e-9)
    moved = found.astype(float) - pixels
    assert np.all(moved * (wanted * 255 - pixels) >= 0)
    assert np.abs(moved - (wanted * 255 - pixels)).max() < 1 + 1e-6


@given(pictures, pictures)
def test_an_image_of_the_grid_stays_as_it_is(
    pixels: NDArray[np.uint8], wanted: NDArray[np.uint8]
) -> None:
    """Rounding in float32 units takes no level away, and adds none where eps would allow more."""
    assert np.array_equal(rounded(pixels, np.float32(wanted) / np.float32(255), 9.0), wanted)


def test_rounding_spends_what_cutting_would_lose() -> None:
    """Changes below one level are not lost: the largest become whole levels, up to eps."""
    generator = np.random.default_rng(0)
    pixels = np.full((3, 64, 64), 128, np.uint8)
    change = generator.standard_normal(pixels.shape)
    change *= 0.4 / np.linalg.norm(change)
    assert np.quantile(np.abs(change), 0.6) < 1 / 255
    cut = np.trunc(change * 255) / 255
    assert (cut * change).sum() / 0.4**2 < 0.7
    found = rounded(pixels, pixels / 255 + change, 0.4)
    assert 0.398 < distance(pixels, found) <= 0.4
    moved = (found.astype(float) - pixels) / 255
    assert (moved * change).sum() / 0.4**2 > 0.9
