"""Unconditional diffusion models and FFDNet, each against its library or by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.denoisers.ffdnet import FFDNet, FFDNetDenoiser, load_ffdnet, read_ffdnet
from models.denoisers.schedule import noise_ratios
from models.denoisers.unconditional import UnconditionalDenoiser, load_unconditional
from models.runtime import Torch
from tests.support import own_networks

CPU = torch.device("cpu")
STEPS = (40, 144, 300, 640)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_one_step_equals_diffusers(prediction: str) -> None:
    """In float64 the estimate is that of the library's scheduler at the same timestep, to 1e-6."""
    unet = own_networks.unconditional_unet().double()
    scheduler = DDPMScheduler(prediction_type=prediction)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    sigma = noise_ratios(scheduler.alphas_cumprod)[list(STEPS)] / 2
    x_hat = torch.randn(len(STEPS), 3, 32, 32, dtype=torch.float64) * 0.7 + 0.5
    denoise = UnconditionalDenoiser(unet, scheduler.alphas_cumprod, prediction)
    with torch.no_grad():
        found = denoise(x_hat, sigma)
        for row, t in enumerate(STEPS):
            x_t = (2 * x_hat[row : row + 1] - 1) * scheduler.alphas_cumprod[t] ** 0.5
            output = unet(x_t, t).sample[:, :3]
            theirs = scheduler.step(output, t, x_t).pred_original_sample[0]
            assert torch.allclose(2 * found[row] - 1, theirs, rtol=0, atol=1e-6)


def test_sigma_between_timesteps_is_exact() -> None:
    """Between two timesteps the later one is taken, but scale and estimate are sigma's own."""
    unet = own_networks.unconditional_unet().double()
    alphas = DDPMScheduler().alphas_cumprod.double()
    ratios = noise_ratios(alphas)
    strength = ratios[199].lerp(ratios[200], 0.3)
    x_hat = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found = UnconditionalDenoiser(unet, alphas, "epsilon")(x_hat, strength[None] / 2)
        shrunk = (2 * x_hat - 1) / (1 + strength**2).sqrt()
        epsilon = unet(shrunk, 200).sample[:, :3]
        by_hand = 2 * x_hat - 1 - strength * epsilon
    assert torch.allclose(2 * found - 1, by_hand.clamp(-1, 1), rtol=0, atol=1e-6)


def test_a_zero_terminal_snr_has_a_largest_sigma() -> None:
    """The last step of such a schedule holds no image, and no sigma reaches it."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    unet = own_networks.unconditional_unet()
    denoise = UnconditionalDenoiser(unet, scheduler.alphas_cumprod, "v_prediction")
    assert 1 < denoise.largest_sigma < float("inf")
    with pytest.raises(ValueError, match="exceeds the denoiser's largest"):
        denoise(torch.rand(1, 3, 32, 32), torch.tensor([2 * denoise.largest_sigma]).double())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_class_embeds": 10}, "has 10 classes"),
        ({"in_channels": 4}, "takes 4 channels"),
        ({"time_embedding_type": "fourier"}, "embeds a fourier noise level"),
    ],
)
def test_other_unets_are_refused(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    """A UNet that needs more than an image and a timestep is refused by what it needs."""
    folder = own_networks.save_unconditional(tmp_path)
    own_networks.unconditional_unet(**change).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=reason):
        load_unconditional(folder, None, 1.0, CPU, torch.float32, Torch())


def test_a_scheduler_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A variance-exploding schedule has no alpha_bar to match."""
    folder = own_networks.save_unconditional(tmp_path)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "ScoreSdeVe"}')
    with pytest.raises(ValueError, match="ScoreSdeVe predicts epsilon; it must have a beta_sch"):
        load_unconditional(folder, None, 1.0, CPU, torch.float32, Torch())


def ffdnet_by_hand(weights: dict[str, Tensor], x: Tensor, sigma: float) -> Tensor:
    """KAIR's FFDNet of an even-sided image (1,3,H,W), written out with slices for its shuffles."""
    folded = torch.stack([x[0, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1).flatten(0, 1)
    h = torch.cat([folded, torch.full_like(folded[:1], sigma)])[None]
    numbers = sorted({int(name.split(".")[1]) for name in weights})
    for number in numbers:
        h = F.conv2d(h, weights[f"model.{number}.weight"], weights[f"model.{number}.bias"], 1, 1)
        h = h if number == numbers[-1] else h.relu()
    out = torch.empty_like(x)
    for place, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        out[0, :, i::2, j::2] = h[0, place::4]
    return out


def test_ffdnet_equals_its_definition(tmp_path: Path) -> None:
    """In float64 the estimate is FFDNet's by hand, sigma being given in [0,1] units, to 1e-6."""
    network = read_ffdnet(own_networks.save_ffdnet(tmp_path) / "model.safetensors").double()
    weights = {name: tensor.double() for name, tensor in own_networks.ffdnet_weights().items()}
    x_hat = torch.randn(2, 3, 10, 12, dtype=torch.float64) + 0.5
    sigma = torch.tensor([0.12, 0.25], dtype=torch.float64)
    with torch.no_grad():
        found = FFDNetDenoiser(network, Torch())(x_hat, sigma)
    for row in range(2):
        expected = ffdnet_by_hand(weights, x_hat[row : row + 1], float(sigma[row]))[0]
        assert torch.allclose(found[row], expected.clamp(0, 1), rtol=0, atol=1e-6)


def test_ffdnet_pads_an_odd_side(tmp_path: Path) -> None:
    """An image of an odd side is denoised as if its last row and column were there twice."""
    denoise = load_ffdnet(
        own_networks.save_ffdnet(tmp_path), None, 1.0, CPU, torch.float32, Torch()
    )
    x_hat, sigma = torch.rand(1, 3, 9, 11), torch.tensor([0.25], dtype=torch.float64)
    padded = torch.cat([x_hat, x_hat[..., -1:]], 3)
    padded = torch.cat([padded, padded[:, :, -1:]], 2)
    with torch.inference_mode():
        assert torch.equal(denoise(x_hat, sigma), denoise(padded, sigma)[..., :9, :11])


def test_the_published_color_ffdnet_has_this_shape(tmp_path: Path) -> None:
    """Twelve convolutions of 96 channels are KAIR's color FFDNet: 852,108 parameters."""
    network = FFDNet([13, *[96] * 11, 12])
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    loaded = read_ffdnet(tmp_path / "model.safetensors")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 852_108
    assert set(load_file(tmp_path / "model.safetensors")) == {
        f"model.{2 * index}.{name}" for index in range(12) for name in ("weight", "bias")
    }


def test_a_gray_ffdnet_is_refused(tmp_path: Path) -> None:
    """A network for gray pictures has four folded channels, not twelve."""
    weights = own_networks.ffdnet_weights()
    weights["model.0.weight"] = weights["model.0.weight"][:, :5].contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a color FFDNet in KAIR's layout"):
        read_ffdnet(tmp_path / "model.safetensors")
