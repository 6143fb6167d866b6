"""Photographs of the shipped slice."""

from __future__ import annotations

import io

from PIL import Image

from models.evaluation.datasets.cifar10 import SLICE, evaluation_slice


def png(index: int) -> bytes:
    """Image `index` of the slice as a PNG file of its own."""
    stream = io.BytesIO()
    Image.fromarray(evaluation_slice(SLICE).images[index]).save(stream, "PNG")
    return stream.getvalue()
