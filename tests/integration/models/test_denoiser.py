"""Denoisers against the paper's table, diffusers' own step, and their shared contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import IFPipeline

from models.denoisers.prompts import PROMPT_TOKENS, clean_prompts, encode_prompts
from models.denoisers.registry import DENOISERS
from models.denoisers.schedule import noise_ratios, timesteps
from models.denoisers.super_resolution import SuperResolutionDenoiser
from models.runtime import Torch
from tests.support import miniatures

TABLE = (
    (0.12, 143, 0.2411, 257.4),
    (0.25, 289, 0.5007, 520.2),
    (0.50, 496, 1.0030, 892.8),
    (0.75, 622, 1.5015, 1000.0),
    (1.00, 702, 2.0039, 1000.0),
)


@pytest.mark.parametrize(("sigma", "t", "strength", "level"), TABLE)
def test_timestep_table(sigma: float, t: int, strength: float, level: float) -> None:
    """Timestep, true noise strength and k*t are those of method.md 1.3."""
    ratios = noise_ratios(miniatures.reference_scheduler().alphas_cumprod)
    found = int(timesteps(ratios, torch.tensor([sigma], dtype=torch.float64)))
    assert found == t
    assert float(ratios[found]) == pytest.approx(strength, abs=5e-5)
    assert min(1.8 * found, 1000.0) == pytest.approx(level)


def test_timestep_is_at_least_one() -> None:
    """However little the noise, the timestep is never 0 (method.md 1.2)."""
    ratios = noise_ratios(miniatures.reference_scheduler().alphas_cumprod)
    assert int(timesteps(ratios, torch.tensor([1e-9], dtype=torch.float64))) == 1


def test_sigma_past_the_schedule_names_the_largest() -> None:
    """A sigma that no timestep reaches is refused with the largest one that is."""
    ratios = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"0\.6 exceeds the denoiser's largest, 0\.5"):
        timesteps(ratios, torch.tensor([0.1, 0.6], dtype=torch.float64))


@pytest.mark.parametrize("k", [1.0, 1.8, 3.0])
def test_one_step_equals_diffusers(k: float) -> None:
    """In float64 the estimate equals UNet and scheduler of diffusers called by hand, to 1e-6."""
    network, scheduler = miniatures.unet().double(), miniatures.reference_scheduler()
    states = miniatures.states().double()
    denoise = SuperResolutionDenoiser(network, scheduler.alphas_cumprod, states, k)
    x_hat = torch.randn(4, 3, 32, 32, dtype=torch.float64) * 0.7 + 0.5
    sigma = torch.tensor([0.12, 0.25, 0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        ours = denoise(x_hat, sigma)
        for row, t in enumerate((143, 289, 496, 702)):
            x_t = (2 * x_hat[row : row + 1] - 1) * scheduler.alphas_cumprod[t].double() ** 0.5
            epsilon = network(
                torch.cat([x_t, x_t], 1),
                t,
                states[None],
                class_labels=torch.tensor([min(k * t, 1000.0)], dtype=torch.float64),
            ).sample[:, :3]
            theirs = scheduler.step(epsilon, t, x_t).pred_original_sample
            assert torch.allclose(2 * ours[row] - 1, theirs[0], rtol=0, atol=1e-6)


def test_rows_do_not_touch_one_another() -> None:
    """A row's estimate is the same beside other images at other noise levels."""
    network, scheduler = miniatures.unet().double(), miniatures.reference_scheduler()
    denoise = SuperResolutionDenoiser(
        network, scheduler.alphas_cumprod, miniatures.states().double(), 1.8
    )
    x_hat = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    sigma = torch.tensor([0.25, 0.5, 0.12], dtype=torch.float64)
    with torch.no_grad():
        together = denoise(x_hat, sigma)
        alone = torch.cat([denoise(x_hat[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)


def test_prompt_states_equal_diffusers() -> None:
    """Prompt states are those that DeepFloyd's pipeline makes of the same words."""
    tokenizer, encoder = miniatures.text_encoder()
    pipeline = IFPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    words = ["This is a photo of a Ship.", "This is a photo of a  ."]
    theirs, _ = pipeline.encode_prompt(words, clean_caption=True, do_classifier_free_guidance=False)
    ours = encode_prompts(tokenizer, encoder, words)
    assert ours.shape == (2, PROMPT_TOKENS, encoder.config.d_model)
    assert torch.equal(ours, theirs)


def test_prompts_are_lower_cased() -> None:
    """Training and serving read prompts through the same cleaning, which lower-cases."""
    assert clean_prompts(["This is a photo of a SHIP."]) == ["this is a photo of a ship."]


def test_long_prompt_is_refused() -> None:
    """A prompt past 77 tokens is refused, where diffusers would cut it in silence."""
    tokenizer, encoder = miniatures.text_encoder()
    with pytest.raises(ValueError, match="has 101 tokens; the limit is 77"):
        encode_prompts(tokenizer, encoder, ["a" * 100])


@pytest.mark.parametrize("kind", DENOISERS)
def test_denoiser_contract(kind: str, tmp_path: Path) -> None:
    """Every denoiser keeps shape and dtype, takes a sigma a row, and accepts values past [0,1]."""
    folder = miniatures.DENOISER_FOLDERS[kind](tmp_path)
    denoise = DENOISERS[kind](
        folder, miniatures.states(), 1.8, torch.device("cpu"), torch.float32, Torch()
    )
    x_hat = torch.randn(2, 3, 32, 32) * 2
    with torch.inference_mode():
        x_0 = denoise(x_hat, torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert x_0.shape == x_hat.shape
    assert x_0.dtype == torch.float32
    assert denoise.largest_sigma >= 1
    if kind == "none":
        assert torch.equal(x_0, x_hat)
    else:
        assert 0 <= float(x_0.min()) <= float(x_0.max()) <= 1
