"""Uploaded bytes -> the uint8 array that is certified, within bounds on bytes, pixels and time."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import Backlog, InvalidImage, TooLarge, UnsupportedMedia

MOST_JPEG_SCANS = 100
"""A usual progressive JPEG has ten scans; thousands cost minutes of decoding in a few kilobytes."""

MOST_ELONGATED = 100
"""Longest side over shortest: what a thin strip becomes at the resolution is bounded by this."""

_JPEG = b"\xff\xd8\xff"
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may cost: encoded bytes, decoded pixels."""

    bytes: int = 10 * 2**20
    pixels: int = 25_000_000


def decode(data: bytes, resolution: int, limits: ImageLimits = ImageLimits()) -> NDArray[np.uint8]:
    """The image as uint8 (3, resolution, resolution), RGB: shorter side resized, centre cropped.

    JPEG, PNG or WebP, told by content. The EXIF orientation is applied; transparent pixels are laid
    on white; 16-bit grey is rounded to 8; CMYK, grey and palettes become RGB; colour profiles are
    ignored. An image of the right size is not resampled: its pixels stay as they are. A JPEG whose
    sides are four times too large, or more, is read at a half, a quarter or an eighth.

    Raises UnsupportedMedia for anything else, TooLarge beyond the limits, and InvalidImage for
    a broken, animated or extremely elongated one.
    """
    _check_bytes(data, limits.bytes)
    image = _open(data, limits.pixels)
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise InvalidImage("The image is animated: send one frame")
    if max(image.size) > MOST_ELONGATED * min(image.size):
        raise InvalidImage(
            f"The image is {image.width} by {image.height} pixels: the longer side may be at most "
            f"{MOST_ELONGATED} times the shorter"
        )
    image.draft(None, (2 * resolution, 2 * resolution))
    upright = _load(image)
    return _fit(_as_rgb(upright), resolution)


def _check_bytes(data: bytes, most: int) -> None:
    if not data:
        raise InvalidImage("The image is empty: it has 0 bytes")
    if len(data) > most:
        raise TooLarge(f"The image has {len(data)} bytes: at most {most} are read", limit=most)
    # Entropy-coded data escapes 0xFF, so this counts scans (and those of an embedded thumbnail).
    if data.startswith(_JPEG) and data.count(b"\xff\xda") > MOST_JPEG_SCANS:
        raise InvalidImage(f"The JPEG has more than {MOST_JPEG_SCANS} scans")


def _open(data: bytes, most_pixels: int) -> Image.Image:
    """Read the header alone; the size is checked before any pixel is decoded."""
    try:
        image = Image.open(BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(most_pixels) from error
    except Exception as error:  # A decoder's failure, of whatever class, is the image's.
        if data.startswith((_JPEG, b"\x89PNG")) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
            raise InvalidImage("The image is broken: its header cannot be read") from error
        raise UnsupportedMedia("The image is not a JPEG, PNG or WebP") from error
    if image.width * image.height > most_pixels:
        raise _too_many_pixels(most_pixels)
    return image


def _too_many_pixels(most: int) -> TooLarge:
    return TooLarge(f"The image has too many pixels: at most {most} are decoded", limit=most)


def _load(image: Image.Image) -> Image.Image:
    """Decode the pixels and turn them upright."""
    try:
        image.load()
    except Exception as error:  # As above: OSError, SyntaxError, ValueError, EOFError and others.
        raise InvalidImage("The image is truncated or broken: it cannot be decoded") from error
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        turn = None  # Unreadable metadata does not spoil readable pixels.
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        image = _as_eight_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    seen = image if image.mode == "RGBA" else image.convert("RGBA")
    on_white = Image.new("RGB", seen.size, "white")
    on_white.paste(seen, mask=seen)  # Exact where a pixel is opaque.
    return on_white


def _as_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (v / 257, to nearest) as 8-bit grey, its transparent value kept transparent."""
    values = np.array(image, dtype=np.uint32)
    opaque = values != image.info.get("transparency", -1)
    values += 128
    values //= 257
    grey = Image.fromarray(values.astype(np.uint8))
    if opaque.all():
        return grey
    return Image.merge("LA", (grey, Image.fromarray(opaque.astype(np.uint8) * 255)))


def _fit(image: Image.Image, resolution: int) -> NDArray[np.uint8]:
    """Shorter side to the resolution (bicubic, antialiased), then the centre square."""
    shorter = min(image.size)
    if shorter != resolution:
        width, height = (max(resolution, round(side * resolution / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - resolution) // 2 for side in image.size)
    square = image.crop((left, top, left + resolution, top + resolution))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


class ImageReader:
    """Decodes in a few threads of its own, each image within a time limit.

    A thread cannot be stopped: one that is late keeps its place until it is done, so that never
    more than `threads` images are in memory.
    """

    def __init__(self, limits: ImageLimits, seconds: float, threads: int) -> None:
        self._limits = limits
        self._seconds = seconds
        self._places = asyncio.Semaphore(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image")

    async def read(self, data: bytes, resolution: int) -> NDArray[np.uint8]:
        """What `decode` returns or raises.

        Raises Backlog where no thread is free, and InvalidImage where decoding takes too long.
        """
        try:
            await asyncio.wait_for(self._places.acquire(), self._seconds)
        except TimeoutError:
            raise Backlog("Too many images are being decoded", retry_after=1) from None
        loop = asyncio.get_running_loop()
        decoding = loop.run_in_executor(self._pool, decode, data, resolution, self._limits)
        decoding.add_done_callback(self._leave)
        await asyncio.wait({decoding}, timeout=self._seconds)
        if not decoding.done():
            raise InvalidImage(f"The image took longer than {self._seconds:g} s to decode")
        return decoding.result()

    def _leave(self, decoding: asyncio.Future[NDArray[np.uint8]]) -> None:
        self._places.release()
        if not decoding.cancelled():
            decoding.exception()  # Read, so that a late failure is not reported as forgotten.

    def close(self) -> None:
        """Take no more images; those in hand are finished and dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
