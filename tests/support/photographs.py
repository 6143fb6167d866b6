"""Photographs of the shipped slice."""

from __future__ import annotations

import io

from PIL import Image

from models.evaluation.datasets import evaluation_slice
from tests.support.paths import DATA


def png(index: int) -> bytes:
    """Image `index` of the slice as a PNG file of its own."""
    stream = io.BytesIO()
    Image.fromarray(evaluation_slice(DATA / "cifar10-slice.png").images[index]).save(stream, "PNG")
    return stream.getvalue()
