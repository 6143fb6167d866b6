"""Decodes uploads to the uint8 arrays that are certified, within limits on size and time."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import Backlog, InvalidImage, Problem, TooLarge, UnsupportedMedia
from service.predictions.images.color import to_srgb
from service.predictions.images.jpeg import Jpeg
from service.predictions.images.png import Png
from service.predictions.images.webp import WebP

MOST_ELONGATED = 100
"""Longest side over shortest: bounds the resized image of a thin strip."""

PREPROCESSING = {
    "resize": "shorter side to the resolution, bicubic, antialiased; none if it has that size",
    "crop": "center square",
    "color": "sRGB, 8 bits a channel, transparency on white, upright by EXIF",
}
"""The steps of `decode`, as certificates state them."""

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
    """Limits of one image: encoded bytes, decoded pixels."""

    bytes: int = 10 * 2**20
    pixels: int = 25_000_000


def decode(data: bytes, resolution: int, limits: ImageLimits = ImageLimits()) -> NDArray[np.uint8]:
    """The image as uint8 (3, resolution, resolution), RGB: shorter side resized, center cropped.

    `data` is a JPEG, PNG or WebP, recognized by its content. The decoder works at full size.

    - 16-bit samples are rounded to 8 bits.
    - CMYK, gray and palettes become RGB; the colors of an embedded ICC profile become sRGB.
    - Transparent pixels are laid on white, and the EXIF orientation is applied.
    - An image of the right size is not resampled.

    Raises UnsupportedMedia for another format, TooLarge beyond the `limits`, and InvalidImage for
    a broken, truncated, animated or extremely elongated image; nothing else.
    """
    _check_bytes(data, limits.bytes)
    try:
        return _decode(_parse(data), resolution, limits.pixels)
    except Problem:
        raise
    except Exception as error:  # A decoder may raise any class; the image is at fault.
        raise InvalidImage("The image is truncated or broken: it cannot be decoded") from error


def _check_bytes(data: bytes, max_bytes: int) -> None:
    if not data:
        raise InvalidImage("The image is empty: it has 0 bytes")
    if len(data) > max_bytes:
        detail = f"The image has {len(data)} bytes: at most {max_bytes} are read"
        raise TooLarge(detail, limit=max_bytes)


def _parse(data: bytes) -> Jpeg | Png | WebP:
    if data.startswith(b"\xff\xd8\xff"):
        return Jpeg.parse(data)
    if data.startswith(b"\x89PNG"):
        return Png.parse(data)
    if (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return WebP.parse(data)
    raise UnsupportedMedia("The image is not a JPEG, PNG or WebP")


def _decode(source: Jpeg | Png | WebP, resolution: int, max_pixels: int) -> NDArray[np.uint8]:
    image = _open(source, max_pixels)
    if getattr(image, "is_animated", False):
        raise InvalidImage("The image is animated: send one frame")
    if max(image.size) > MOST_ELONGATED * min(image.size):
        raise InvalidImage(
            f"The image is {image.width} by {image.height} pixels: the longer side may be at most "
            f"{MOST_ELONGATED} times the shorter"
        )
    source.check()
    image.load()
    colors, opacity = source.layers(image)
    shown = _on_white(to_srgb(colors, source.icc), opacity)
    return _fit(_upright(shown, source.exif), resolution)


def _open(source: Jpeg | Png | WebP, max_pixels: int) -> Image.Image:
    """The image with only its header read; its size is checked before any pixel is decoded."""
    try:
        image = Image.open(BytesIO(source.file), formats=(source.format,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(max_pixels) from error
    if image.width * image.height > max_pixels:
        raise _too_many_pixels(max_pixels)
    return image


def _too_many_pixels(limit: int) -> TooLarge:
    return TooLarge(f"The image has too many pixels: at most {limit} are decoded", limit=limit)


def _on_white(image: Image.Image, opacity: Image.Image | None) -> Image.Image:
    if opacity is None:
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=opacity)  # Exact where a pixel is opaque.
    return white


def _upright(image: Image.Image, block: bytes | None) -> Image.Image:
    """The image in its EXIF orientation; an EXIF block that cannot be read is ignored."""
    if block is None:
        return image
    exif = Image.Exif()
    try:
        exif.load(block)
        turn = _UPRIGHT.get(exif.get(_ORIENTATION, 1))
    except Exception:
        return image  # Unreadable metadata do not spoil readable pixels.
    return image if turn is None else image.transpose(turn)


def _fit(image: Image.Image, resolution: int) -> NDArray[np.uint8]:
    """The center square after the shorter side is resized (bicubic, antialiased)."""
    shorter = min(image.size)
    if shorter != resolution:
        width, height = (max(resolution, round(side * resolution / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - resolution) // 2 for side in image.size)
    square = image.crop((left, top, left + resolution, top + resolution))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


class ImageReader:
    """Decodes images in a pool of `threads`, each image within `seconds`.

    A thread cannot be stopped. A late thread occupies its place until it is done, so at most
    `threads` images are in memory.
    """

    def __init__(self, limits: ImageLimits, seconds: float, threads: int) -> None:
        self._limits = limits
        self._seconds = seconds
        self._places = asyncio.Semaphore(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image")

    async def read(self, data: bytes, resolution: int) -> NDArray[np.uint8]:
        """The image, as `decode` returns it.

        Raises as `decode` does, Backlog while no thread is free, and InvalidImage when decoding
        takes too long.
        """
        try:
            # Not by `wait_for`, which loses a cancellation that comes with the place.
            async with asyncio.timeout(self._seconds):
                await self._places.acquire()
        except TimeoutError:
            raise Backlog("Too many images are being decoded", retry_after=1) from None
        loop = asyncio.get_running_loop()
        decoding = loop.run_in_executor(self._pool, decode, data, resolution, self._limits)
        decoding.add_done_callback(self._release)
        await asyncio.wait({decoding}, timeout=self._seconds)
        if not decoding.done():
            raise InvalidImage(f"The image took longer than {self._seconds:g} s to decode")
        return decoding.result()

    def _release(self, decoding: asyncio.Future[NDArray[np.uint8]]) -> None:
        self._places.release()
        if not decoding.cancelled():
            decoding.exception()  # Else asyncio logs a late failure as unretrieved.

    def close(self) -> None:
        """Take no more images; those being decoded are finished and dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
