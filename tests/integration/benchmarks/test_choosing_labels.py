"""benchmarks/choosing_labels.py: the pictures, and the answers by count."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.choosing_labels import answers, pictures
from models.denoisers.base import NoDenoiser
from models.runtime import numerics_of
from models.smoothing import SmoothedModel

CPU = torch.device("cpu")


class Brightness:
    """Says `light` of images whose mean is above one half."""

    labels = ("dark", "light")

    def __call__(self, x: Tensor) -> Tensor:
        above = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-above, above], 1)


def test_pictures_show_what_their_names_say() -> None:
    """As many of each, those of the slice by class, noise without structure, grays of one level."""
    found = pictures(5)
    assert all(images.shape == (5, 32, 32, 3) for images in found.values())
    assert abs(float(found["white noise"].mean()) - 127.5) < 3
    assert [int(image.min()) for image in found["one gray"]] == [0, 63, 127, 191, 255]
    assert all(image.min() == image.max() for image in found["one gray"])


def test_answers_are_counted_with_the_median_radius() -> None:
    """Black and white are certified, the gray between abstains."""
    model = SmoothedModel(NoDenoiser(), Brightness(), numerics_of(CPU, torch.float32, 50), CPU)
    levels = np.array([0, 0, 255, 127], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (4, 4, 4, 3)).copy()
    images[3, :, :2] = 128
    said, radius = answers(model, Brightness.labels, images, 0.25, 20, 60)
    assert said == {"dark": 2, "light": 1, "abstains": 1}
    assert 0.2 < radius < 0.5
