"""models/demonstrations: what rows look like, and an attack within epsilon, on nano's networks."""

from __future__ import annotations

import json
import math
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from models.demonstrations.limits import LABEL_ROWS, SHOWN_ROWS, STEPS, Demonstration
from models.demonstrations.pictures import Demonstrated, attack, show_rows
from models.denoisers.base import NoDenoiser
from models.evaluation.attacks.pgd import random_noise
from models.evaluation.attacks.pipeline import Pipeline, smoothed
from models.kinds import NoGradients
from models.noise import discrete_gaussian
from models.rows import Rows
from models.runtime import Torch, numerics_of
from models.smoothing import SmoothedModel, load, numerics, votes
from service.engine.protocol import MOST_RESULT_BYTES
from service.predictions.demonstrations import LARGEST_RESOLUTION
from service.processes.runtime import demonstrate
from tests.support.paths import ROOT

CPU = torch.device("cpu")
KEY = bytes(range(32))
SIGMA = 0.25
SHIP = np.array(Image.open(ROOT / "docs" / "ship.png").convert("RGB")).transpose(2, 0, 1)
SHOWN = Rows(SHIP, KEY, 0, SHOWN_ROWS, SIGMA)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEFAULT_TASK)


@pytest.fixture(scope="module")
def nano(bundle: Bundle) -> SmoothedModel:
    return load(bundle, dtype=torch.float32, batch_rows=4, cpu_threads=0, runtime=Torch())


def document(shown: Demonstrated) -> Any:
    return json.loads(shown.document)


def pixels(address: str) -> NDArray[np.uint8]:
    """The pixels (3,H,W) of a PNG's data address."""
    kind, _, text = address.partition(",")
    assert kind == "data:image/png;base64"
    picture = Image.open(BytesIO(b64decode(text)))
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    return np.array(picture).transpose(2, 0, 1)


def exact_noise() -> NDArray[np.int64]:
    """The noise of the shown rows in gray levels, as its key gives it."""
    drawn = discrete_gaussian(KEY, 0, SHOWN_ROWS, SHIP.shape, SIGMA)
    return drawn.numpy().astype(np.int64)


def test_rows_are_those_of_the_key(nano: SmoothedModel) -> None:
    """The noisy images are the image plus the key's noise, cut to 8 bits; labels are the votes."""
    shown = show_rows(nano, SHOWN)
    pictures = document(shown)
    assert np.array_equal(pixels(pictures["seen"]), SHIP)
    noisy = np.stack([pixels(sample["noisy"]) for sample in pictures["samples"]])
    assert np.array_equal(noisy, np.clip(SHIP + exact_noise(), 0, 255))
    labels = [sample["label"] for sample in pictures["samples"]]
    assert np.bincount(labels, minlength=10).tolist() == shown.votes.tolist()
    assert shown.votes.tolist() == votes(nano, SHOWN).tolist()


def test_noise_has_the_length_of_sigma(nano: SmoothedModel) -> None:
    """On an image far from black and white, noise of sigma .1 moves it by sigma sqrt(d), as a
    chi of d = 3072 degrees does, but for a standard deviation of sigma / sqrt(2) times five."""
    gray = np.full_like(SHIP, 128)
    rows = replace(SHOWN, pixels=gray, sigma=0.1)
    for sample in document(show_rows(nano, rows))["samples"]:
        moved = (pixels(sample["noisy"]).astype(float) - gray) / 255
        assert np.linalg.norm(moved) == pytest.approx(
            0.1 * math.sqrt(3072), abs=5 * 0.1 / math.sqrt(2)
        )


def test_denoised_images_are_what_the_classifier_sees(nano: SmoothedModel) -> None:
    """Each is nearer to the image than its noisy one, and of the denoiser to half a gray level."""
    pictures = document(show_rows(nano, SHOWN))
    x_hat, sigmas = nano.noisy([SHOWN])
    with torch.inference_mode():
        x_0 = torch.cat(
            [nano.denoiser(*each) for each in zip(x_hat.split(4), sigmas.split(4), strict=True)]
        )
    for sample, denoised, noisy in zip(pictures["samples"], x_0, x_hat, strict=False):
        found = pixels(sample["denoised"]) / 255
        assert np.abs(found - denoised.numpy()).max() <= 0.5 / 255 + 1e-6
        before = np.linalg.norm(noisy.numpy() - SHIP / 255)
        assert np.linalg.norm(found - SHIP / 255) < before / 2


def fresh_rows(model: SmoothedModel) -> Pipeline:
    """The smoothed classifier by rows that no attack has seen."""
    return smoothed(model, SIGMA, SHIP.shape, CPU, key=bytes(32), rows=64, batch_rows=16)


@pytest.mark.parametrize("epsilon", [0.01, 0.25, 1.0])
def test_attack_stays_within_epsilon(nano: SmoothedModel, epsilon: float) -> None:
    """The image is of 8 bits, its distance is the stated one and nearly all of epsilon."""
    shown = attack(nano, replace(SHOWN, stop=LABEL_ROWS), epsilon)
    pictures = document(shown)
    found = pixels(pictures["image"])
    assert found.shape == SHIP.shape
    distance = np.linalg.norm((found.astype(float) - SHIP).ravel()) / 255
    assert distance == pytest.approx(pictures["l2"], abs=1e-12)
    assert 0.9 * epsilon < distance <= epsilon
    assert pictures["steps"] == STEPS
    assert np.array_equal(pixels(pictures["seen"]), SHIP)
    assert shown.votes.sum() == LABEL_ROWS


def test_attack_lowers_the_label_more_than_chance(nano: SmoothedModel) -> None:
    """By fresh rows, the label is less probable than at the worst of twenty random changes of the
    same length."""
    ship, epsilon = 8, 1.0
    pipeline, x = fresh_rows(nano), torch.tensor(SHIP) / 255
    found = pixels(document(attack(nano, replace(SHOWN, stop=LABEL_ROWS), epsilon))["image"])
    attacked = pipeline.loss(torch.tensor(found) / 255, ship)
    random = pipeline.loss(random_noise(pipeline, x, ship, epsilon, STEPS, KEY), ship)
    assert attacked > random > 0
    assert attacked > 2 * random


def test_attack_follows_from_its_key(nano: SmoothedModel) -> None:
    """The same key finds the same image, another one finds another."""
    rows = replace(SHOWN, stop=LABEL_ROWS)
    first, same, other = (
        document(attack(nano, each, 0.5))["image"]
        for each in (rows, rows, replace(rows, key=bytes(32)))
    )
    assert first == same != other


def test_runtime_without_gradients_attacks_other_networks(
    bundle: Bundle, nano: SmoothedModel
) -> None:
    """Torch loads them once more in float32; the served ones show rows all the same."""

    class Opaque:
        """A runtime that is not torch, without gradients."""

        name = "opaque"

        def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
            return dtype

        def prepare(self, network: Any) -> Any:
            return torch.no_grad()(network.forward)

    served = load(bundle, dtype=torch.float32, batch_rows=4, cpu_threads=0, runtime=Opaque())
    rows = replace(SHOWN, stop=LABEL_ROWS)
    with pytest.raises(NoGradients):
        attack(served, rows, 0.5)
    found = demonstrate(bundle, served, rows, 0.5, runtime=Opaque())
    assert document(found) == document(attack(nano, rows, 0.5))
    shown = demonstrate(bundle, served, SHOWN, None, runtime=Opaque())
    assert document(shown) == document(show_rows(nano, SHOWN))


def test_charge_is_two_device_batches() -> None:
    """Of one CPU thread at most, the fewest rows by default."""
    chosen, _ = numerics(Torch(), device=CPU, cpu_threads=1)
    assert max(kind.charge for kind in Demonstration) <= 2 * chosen.device_rows(1)


def test_largest_pictures_fit() -> None:
    """Six rows at the largest resolution are within the engines' limit of a result."""
    side = LARGEST_RESOLUTION
    image = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)

    class Mean:
        labels = ("dark", "bright")

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean((1, 2, 3))
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    model = SmoothedModel(NoDenoiser(), Mean(), numerics_of(CPU, torch.float32, 2), CPU)
    shown = show_rows(model, Rows(image, KEY, 0, SHOWN_ROWS, 0.02))
    assert 0.9 * MOST_RESULT_BYTES < len(shown.document) <= MOST_RESULT_BYTES
