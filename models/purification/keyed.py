"""Standard normal noise of a purification as a pure function of (key, image, draw, step)."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.noise import discrete_gaussian

Noise = Callable[[int], Tensor]
"""Step t of the reverse process -> its noise (B,3,H,W); step 0 is the diffusion's."""

MAX_STEPS = 1 << 16
"""Steps of one draw, and draws of one image."""

_DOMAIN = b"vouchsafe purification 1/"


class Row(NamedTuple):
    """One draw of one image."""

    image: int
    draw: int


def keyed_noise(
    key: bytes, rows: Sequence[Row], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Noise:
    """The noise of some rows of images of `shape` (3,H,W), float32.

    Each image has a key derived from `key` (32 bytes) by HMAC-SHA256 in a domain of purification.
    So no noise row of a certificate occurs here, even under the same key. A value is a multiple of
    1/255, a standard normal one rounded (`models.noise`). Raises ValueError for a draw outside
    [0, 65536).
    """
    for row in rows:
        if not 0 <= row.draw < MAX_STEPS:
            raise ValueError(f"draw is {row.draw}; it must be 0 to {MAX_STEPS - 1}")
    keys = [hmac.digest(key, _DOMAIN + str(row.image).encode(), "sha256") for row in rows]
    places = [row.draw * MAX_STEPS for row in rows]

    def noise(step: int) -> Tensor:
        drawn = [
            discrete_gaussian(own, place + step, place + step + 1, shape, 1.0)
            for own, place in zip(keys, places, strict=True)
        ]
        return (torch.cat(drawn).float() / 255).to(device)

    return noise
