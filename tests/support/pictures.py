"""Image files for tests: written by Pillow or by hand, and the distance of two arrays."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from tests.support.paths import SHARED

RESOLUTION = 32
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FIELD = SHARED / "field"


def l2(first: Any, second: Any) -> float:
    """The l2 distance of two uint8 arrays, in units of [0, 1]."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return float(np.linalg.norm(difference.ravel()) / 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image file that Pillow writes."""
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def random_pixels(height: int = RESOLUTION, width: int = RESOLUTION, planes: int = 3) -> Any:
    """Pixels (height, width, planes) of uniform noise, always the same."""
    drawn = np.random.default_rng(7).integers(0, 256, (height, width, planes), dtype=np.uint8)
    return drawn if planes > 1 else drawn[..., 0]


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    """A chunk with its length and checksum."""
    checked = kind + payload
    return struct.pack(">I", len(payload)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(
    width: int,
    height: int,
    rows: bytes,
    *,
    depth: int,
    colour: int,
    more: bytes = b"",
    interlace: int = 0,
) -> bytes:
    """A PNG written by hand, for the kinds that Pillow reads but does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = png_chunk(b"IHDR", header) + more + png_chunk(b"IDAT", zlib.compress(rows))
    return PNG_SIGNATURE + body + png_chunk(b"IEND", b"")
