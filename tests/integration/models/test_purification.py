"""models/purification: the reverse process, guidance, the auxiliary network, nano purified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from models.bundle import DEFAULT_TASK, read_bundle
from models.evaluation.attacks.pipeline import purified
from models.evaluation.datasets.cifar10 import SLICE, evaluation_slice
from models.nano.architectures import if_scheduler
from models.purification.auxiliary import Auxiliary, read_auxiliary
from models.purification.guidance import Guidance
from models.purification.keyed import Row, keyed_noise
from models.purification.loading import load_purifier
from models.purification.purifier import Purifier, Settings
from models.purification.reverse import Schedule, cifar_schedule, diffused, schedule_of
from models.purification.train import BETA, BUDGET, adversary, trades
from models.rows import Rows
from models.smoothing import load

KEY, SMALL = b"k" * 32, (8, 8, 16, 16)


class Blurring:
    """A denoiser that moves every pixel halfway to gray; differentiable, and keeps no row apart."""

    largest_sigma = float("inf")

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        return (x_hat / 2 + 0.25).clamp(0, 1)


class Brightness(nn.Module):
    """Two labels: dark and bright, by the mean pixel; the same for images in any units."""

    labels = ("dark", "bright")

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([-mean, mean], 1)


def purifier(settings: Settings, network: Auxiliary | None = None) -> Purifier:
    return Purifier(Blurring(), Brightness(), cifar_schedule(), settings, network)


# --- The reverse process -------------------------------------------------------------------------


@pytest.mark.parametrize("t", [2, 70, 500, 999])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_a_step_is_that_of_diffusers(t: int, beta_schedule: str) -> None:
    """Mean and variance in float64, from the same estimate of x_0 and the same noise."""
    theirs: Any = DDPMScheduler(
        beta_schedule=beta_schedule, prediction_type="sample", clip_sample=False
    )
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    x_t, x_0 = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    expected = theirs.step(x_0, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    of_x_0, of_x_t, variance = Schedule(theirs.alphas_cumprod).posterior(t)
    found = of_x_0 * x_0 + of_x_t * x_t + variance**0.5 * noise
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_last_step_is_the_estimate_itself() -> None:
    """alpha_bar_0 is 1."""
    assert cifar_schedule().posterior(1) == (1.0, 0.0, 0.0)


def test_t_star_is_as_noisy_as_on_cifar() -> None:
    """70 of DDPM's schedule, and on nano's the last one that is no noisier."""
    assert cifar_schedule().t_star(None) == 70
    nano = Schedule(if_scheduler(sample_max_value=1.0).alphas_cumprod)
    t = nano.t_star(None)
    assert nano.ratio(t) <= cifar_schedule().ratio(70) < nano.ratio(t + 1)
    assert nano.t_star(1) == 1
    for bad in (0, 1000):
        with pytest.raises(ValueError, match=f"t_star is {bad}; this schedule has 1 to 999"):
            nano.t_star(bad)


def test_a_denoiser_without_a_schedule_is_refused() -> None:
    """A regression denoiser has none."""
    with pytest.raises(ValueError, match="Blurring has no schedule; only a diffusion model can"):
        schedule_of(Blurring())


def test_settings_are_checked() -> None:
    """The message has the field, the value and the limit."""
    for field, value in (("guidance", -1.0), ("constraint", 0.0)):
        with pytest.raises(ValueError, match=f"{field} is {value}; it must be"):
            Settings(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"guidance is 1\.0 without an auxiliary network"):
        purifier(Settings(guidance=1.0))
    with pytest.raises(ValueError, match=r"t_star is 71, of noise ratio 0\.2\d+; the auxiliary"):
        purifier(Settings(t_star=71, guidance=1.0), Auxiliary(2, SMALL, cifar_schedule().ratio(70)))


# --- Noise ---------------------------------------------------------------------------------------


def test_noise_is_a_function_of_key_image_draw_and_step() -> None:
    """Each of them changes it; what else is in the batch does not."""
    shape = (3, 8, 8)
    both = keyed_noise(KEY, [Row(0, 0), Row(1, 2)], shape)(5)
    assert torch.equal(both[1:], keyed_noise(KEY, [Row(1, 2)], shape)(5))
    others = [
        keyed_noise(KEY, [Row(1, 2)], shape)(6),
        keyed_noise(KEY, [Row(1, 3)], shape)(5),
        keyed_noise(KEY, [Row(2, 2)], shape)(5),
        keyed_noise(bytes(32), [Row(1, 2)], shape)(5),
    ]
    assert all(float((both[1:] - other).abs().mean()) > 0.5 for other in others)
    many = keyed_noise(KEY, [Row(0, draw) for draw in range(64)], shape)(0)
    assert abs(float(many.mean())) < 5 / many.numel() ** 0.5
    assert float(many.std()) == pytest.approx(1, abs=0.03)
    with pytest.raises(ValueError, match="draw is 65536; it must be 0 to 65535"):
        keyed_noise(KEY, [Row(0, 65536)], shape)


# --- Guidance ------------------------------------------------------------------------------------


def auxiliary() -> Auxiliary:
    torch.manual_seed(0)
    network = Auxiliary(2, SMALL, largest_ratio=1.0)
    return network.eval().requires_grad_(False)


def test_guidance_raises_its_objective() -> None:
    """A short step along the gradient raises log p - D, whose norm is bounded."""
    network = auxiliary()
    given, x_t = torch.rand(2, 4, 3, 16, 16) * 2 - 1
    guidance = Guidance(network, given)
    free = guidance.gradient(x_t, torch.full((4,), float("inf")))
    before, after = guidance.objective(x_t), guidance.objective(x_t + 1e-3 * free)
    assert bool((after > before).all())
    longest = free.flatten(1).norm(dim=1) * torch.tensor([0.1, 0.5, 1.0, 2.0])
    bounded = guidance.gradient(x_t, longest).flatten(1).norm(dim=1)
    expected = torch.minimum(longest, free.flatten(1).norm(dim=1))
    torch.testing.assert_close(bounded, expected)


def test_without_guidance_the_process_is_the_plain_one() -> None:
    """s = 0 gives the same image to the bit, with or without an auxiliary network."""
    x = torch.rand(2, 3, 16, 16)
    noise = keyed_noise(KEY, [Row(0, 0), Row(0, 1)], (3, 16, 16))
    plain = purifier(Settings(t_star=4)).purified(x, noise)
    assert torch.equal(plain, purifier(Settings(t_star=4)).purified(x, noise))
    assert torch.equal(plain, purifier(Settings(t_star=4), auxiliary()).purified(x, noise))
    guided = purifier(Settings(t_star=4, guidance=2.0), auxiliary()).purified(x, noise)
    assert not torch.equal(plain, guided)


def test_the_gradient_passes_through_every_step() -> None:
    """Checkpointed, it is the derivative of the whole process, guidance included (float64)."""
    network = auxiliary().double()
    process = purifier(Settings(t_star=3, guidance=1.0), network)
    noise = keyed_noise(KEY, [Row(0, 0)], (3, 8, 8))

    def bright(x: Tensor) -> Tensor:
        return process.logits(x, lambda step: noise(step).double())[0, 1]

    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bright(x), x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        change = (bright(x + 1e-5 * direction) - bright(x - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(change), rel=1e-4)


def test_an_attack_sees_purification_as_it_is() -> None:
    """The loss is that of the draws' mean probability; fresh draws change with the step."""
    process, x = purifier(Settings(t_star=3)), torch.rand(3, 8, 8)
    noise = keyed_noise(KEY, [Row(0, draw) for draw in range(4)], (3, 8, 8))
    mean = process.logits(x.expand(4, 3, 8, 8), noise).softmax(1)[:, 1].mean()
    fixed = purified(process, key=KEY, rows=4, batch_rows=3)
    fresh = purified(process, key=KEY, rows=4, batch_rows=4, fresh=True)
    assert fixed.loss(x, 1) == pytest.approx(float(-mean.log()), rel=1e-5)
    assert fixed.loss(x, 1, 0) == fixed.loss(x, 1, 1)
    assert fresh.loss(x, 1, 0) == pytest.approx(fixed.loss(x, 1), rel=1e-5)
    assert fresh.loss(x, 1, 1) != fresh.loss(x, 1, 0)
    loss, gradient = fixed.gradient(x, 1)
    assert fixed.loss(x + 0.1 * gradient / gradient.norm(), 1) > loss


# --- The auxiliary network -----------------------------------------------------------------------


def test_trades_by_hand() -> None:
    """Cross-entropy at x, plus beta times the divergence from x's labels to the attacked ones."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, moved = torch.randn(2, 5, 3, 2, 2)
    labels = torch.tensor([0, 1, 2, 0, 1])
    p, q = linear(x).softmax(1), linear(moved).softmax(1)
    cross_entropy = -p[torch.arange(5), labels].log().mean()
    divergence = (p * (p / q).log()).sum(1).mean()
    found = trades(linear, x, moved, labels)
    torch.testing.assert_close(found, cross_entropy + BETA * divergence)


def test_the_adversary_moves_labels_within_its_ball() -> None:
    """More than noise of the same size does; the network trains again afterwards."""
    network, generator = Auxiliary(3, SMALL, 1.0), torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    found = adversary(network, x, generator, steps=5)
    assert network.training
    network.eval()
    assert float((found - x).abs().max()) <= BUDGET + 1e-6
    noise = BUDGET * torch.sign(torch.randn_like(x))

    def moved(other: Tensor) -> float:
        with torch.no_grad():
            before = network(x).softmax(1)
            return float(F.kl_div(network(other).log_softmax(1), before, reduction="batchmean"))

    assert moved(found) > 2 * moved(x + noise)


def test_an_auxiliary_network_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Logits to the bit; other folders and other numbers of classes are refused."""
    network, x = auxiliary(), torch.rand(2, 3, 16, 16)
    network.save(tmp_path / "own")
    read = read_auxiliary(tmp_path / "own", 2, torch.device("cpu"))
    assert torch.equal(read(x), network(x))
    assert read.largest_ratio == 1.0
    with pytest.raises(ValueError, match="has 2 classes; the task has 10"):
        read_auxiliary(tmp_path / "own", 10, torch.device("cpu"))
    with pytest.raises(ValueError, match="has no auxiliary network"):
        read_auxiliary(tmp_path, 2, torch.device("cpu"))


# --- Nano ----------------------------------------------------------------------------------------


def test_nano_keeps_labels_of_purified_images() -> None:
    """A few steps of noise leave most images their labels; the same key, the same answer."""
    data = evaluation_slice(SLICE)[:6]
    process = load_purifier(read_bundle(DEFAULT_TASK), Settings(t_star=6))
    labels = [
        process.labels(torch.from_numpy(image.transpose(2, 0, 1).copy()), KEY, 0, 2)
        for image in data.images
    ]
    assert (
        sum(bool((own == truth).all()) for own, truth in zip(labels, data.labels, strict=True)) >= 4
    )
    first = torch.from_numpy(data.images[0].transpose(2, 0, 1).copy())
    assert np.array_equal(process.labels(first, KEY, 0, 2), labels[0])
    assert np.array_equal(process.labels(first, KEY, 1, 2, batch_rows=4), labels[0][1:])


def test_a_served_model_purifies_rows() -> None:
    """Its purified rows are the purifier's draws, padded to its batch, whatever threads it has."""
    image = np.ascontiguousarray(evaluation_slice(SLICE).images[3].transpose(2, 0, 1))
    rows = Rows(image, KEY, 0, 3, 0.02, purified=True)
    found = [
        load(read_bundle(DEFAULT_TASK), batch_rows=4, cpu_threads=threads).labels([rows])
        for threads in (0, 2)
    ]
    assert found[0].shape == (3,)
    assert np.array_equal(*found)


def test_diffused_images_have_the_schedules_noise() -> None:
    """x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, for one number or one a row."""
    x, noise = torch.rand(2, 2, 3, 4, 4)
    one = diffused(x, 0.64, noise)
    torch.testing.assert_close(one, 0.8 * x + 0.6 * noise)
    several = diffused(x, torch.tensor([0.64, 1.0])[:, None, None, None], noise)
    torch.testing.assert_close(several, torch.stack([one[0], x[1]]))
