"""PNG files: the picture's chunks, its metadata, and the damage that libpng warns of."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidImage, as_json
from service.predictions.images.color import MAX_PROFILE_BYTES

MAX_CHUNKS = 100_000
"""A file of 10 MB has some thousand chunks; a million would take seconds to walk."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _RGB, _PALETTE, _GRAY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_SAMPLES = {_GRAY: 1, _RGB: 3, _PALETTE: 1, _GRAY_ALPHA: 2, _RGBA: 4}
_WHOLE = ((0, 0, 1, 1),)
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""First column, first row, and the steps to the next ones, of each pass."""

_LOW_BYTES = {_RGB: "RGB;16L", _RGBA: "RGBA;16L"}
"""Pillow's raw modes that take the second byte of each 16-bit sample."""


@dataclass(frozen=True, slots=True)
class Png:
    """A PNG's critical chunks, with its transparency, EXIF block and ICC profile apart."""

    file: bytes
    rows: bytes
    width: int
    height: int
    depth: int
    color: int
    interlaced: bool
    palette: bytes
    transparency: bytes
    exif: bytes | None
    icc: bytes | None

    format = "PNG"

    @classmethod
    def parse(cls, data: bytes) -> Png:
        """Walk the chunks up to IEND; ancillary chunks with a wrong checksum are skipped.

        Raises InvalidImage for a critical chunk that is damaged, missing or out of place, and for
        an animated PNG.
        """
        chunks = _Chunks(data)
        width, height, depth, color, compression, filtering, interlace = struct.unpack(
            ">IIBBBBB", chunks.header
        )
        if color not in _SAMPLES or compression or filtering or interlace > 1:
            raise InvalidImage("The PNG is broken: its header is not valid")
        entries, rest = divmod(len(chunks.palette), 3)
        if color == _PALETTE and (rest or not 0 < entries <= 256):
            raise InvalidImage("The PNG is broken: its palette is missing or not valid")
        rows = b"".join(chunks.rows)
        palette = _chunk(b"PLTE", chunks.palette) if color == _PALETTE else b""
        header = _SIGNATURE + _chunk(b"IHDR", chunks.header)
        return cls(
            file=header + palette + _chunk(b"IDAT", rows) + _chunk(b"IEND", b""),
            rows=rows,
            width=width,
            height=height,
            depth=depth,
            color=color,
            interlaced=bool(interlace),
            palette=chunks.palette,
            transparency=chunks.transparency,
            exif=chunks.exif,
            icc=_inflate_profile(chunks.profile),
        )

    def check(self) -> None:
        """Raise InvalidImage for compressed rows that are damaged, or fewer than the height."""
        missing, pending, start = self._row_bytes(), b"", 0
        inflater = zlib.decompressobj()
        try:
            while missing and not inflater.eof:
                if not pending:
                    pending, start = self.rows[start : start + 2**16], start + 2**16
                inflated = inflater.decompress(pending, min(missing, 2**20))
                if not inflated and not pending:
                    break
                missing -= len(inflated)
                pending = inflater.unconsumed_tail
            inflater.decompress(pending + self.rows[start:], 1)  # Verifies the rows' checksum.
        except zlib.error as error:
            raise InvalidImage(f"The PNG is broken: rows cannot be inflated: {error}") from error
        if missing:
            raise InvalidImage("The PNG is truncated: it has too few rows for its height")

    def layers(self, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        """The decoded image in 8 bits, gray or RGB, and its opacity or None."""
        if self.color == _PALETTE:
            return self._palette_layers(image)
        if self.depth == 16:
            return self._sixteen_bit_layers(image)
        if image.mode in ("LA", "RGBA"):
            return image.convert(image.mode[:-1]), image.getchannel("A")
        colors = image.convert("L") if image.mode == "1" else image
        if (key := self._key()) is None:
            return colors, None
        scale = 255 // (2**self.depth - 1)
        opaque = np.zeros((image.height, image.width), bool)
        for band, value in zip(colors.split(), key, strict=True):
            opaque |= np.asarray(band) != value * scale
        return colors, _opacity(opaque)

    def _palette_layers(self, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        indices = np.asarray(image)
        if int(indices.max()) >= len(self.palette) // 3:
            raise InvalidImage("The PNG is broken: a pixel's color is not in the palette")
        if not self.transparency:
            return image.convert("RGB"), None
        opacity = np.full(256, 255, np.uint8)
        listed = np.frombuffer(self.transparency[:256], np.uint8)
        opacity[: len(listed)] = listed
        return image.convert("RGB"), Image.fromarray(opacity[indices])

    def _sixteen_bit_layers(self, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        key = self._key()
        opaque = np.zeros((image.height, image.width), bool)
        bands = []
        for index, (high, low) in enumerate(self._samples(image)):
            bands.append(Image.fromarray(_rounded(high, low)))
            if key is not None:
                opaque |= (high != key[index] >> 8) | (low != key[index] & 255)
        opacity = bands.pop() if self.color in (_GRAY_ALPHA, _RGBA) else None
        if key is not None:
            opacity = _opacity(opaque)
        return bands[0] if len(bands) == 1 else Image.merge("RGB", bands), opacity

    def _samples(self, image: Image.Image) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """The high and the low bytes of each 16-bit sample: Pillow's color has the high ones."""
        if self.color == _GRAY:
            values = np.asarray(image)
            yield (values >> 8).astype(np.uint8), values.astype(np.uint8)
        elif self.color == _GRAY_ALPHA:  # A pixel has the four bytes of RGBA in 8 bits.
            gray, gray_low, alpha, alpha_low = self._decoded_as("RGBA").split()
            yield np.asarray(gray), np.asarray(gray_low)
            yield np.asarray(alpha), np.asarray(alpha_low)
        else:
            lower = self._decoded_as(_LOW_BYTES[self.color])
            for band in image.getbands():
                yield np.asarray(image.getchannel(band)), np.asarray(lower.getchannel(band))

    def _decoded_as(self, raw_mode: str) -> Image.Image:
        """The rows decoded again, with their bytes unpacked as `raw_mode`."""
        image = Image.open(BytesIO(self.file), formats=("PNG",))
        image.tile = [image.tile[0]._replace(args=raw_mode)]
        image.load()
        return image

    def _key(self) -> tuple[int, ...] | None:
        """The samples of the color that tRNS makes transparent; higher bits are ignored."""
        samples = _SAMPLES[self.color]
        if self.color not in (_GRAY, _RGB) or len(self.transparency) != 2 * samples:
            return None
        values = struct.unpack(f">{samples}H", self.transparency)
        return tuple(value & (2**self.depth - 1) for value in values)

    def _row_bytes(self) -> int:
        """Bytes of all rows with their filter types, as inflated."""
        bits = self.depth * _SAMPLES[self.color]
        total = 0
        for left, top, across, down in _ADAM7 if self.interlaced else _WHOLE:
            width, height = ceil((self.width - left) / across), ceil((self.height - top) / down)
            total += height * (1 + ceil(width * bits / 8)) if width > 0 and height > 0 else 0
        return total


class _Chunks:
    """The chunks of a PNG that affect its pixels."""

    def __init__(self, data: bytes) -> None:
        self.header = b""
        self.palette = b""
        self.transparency = b""
        self.rows: list[bytes] = []
        self.exif: bytes | None = None
        self.profile = b""
        self._animated = False
        last = b""
        for kind, body in _checked(data):
            self._take(kind, body, last)
            last = kind
        if not self.rows:
            raise InvalidImage("The PNG is broken: it has no rows")

    def _take(self, kind: bytes, body: bytes, last: bytes) -> None:
        if (kind == b"IHDR") != (not last):
            raise InvalidImage("The PNG is broken: its header is not its first and only one")
        match kind:
            case b"IHDR":
                self.header = body
            case b"PLTE" if not self.palette and not self.rows:
                self.palette = body
            case b"IDAT" if not self.rows or last == b"IDAT":
                self.rows.append(body)
            case b"IEND":
                pass
            case b"tRNS" if not self.rows:
                self.transparency = body
            case b"iCCP" if not self.rows:
                self.profile = body
            case b"eXIf":
                self.exif = body
            case b"acTL" if not self.rows:
                self._animated = len(body) == 8 and body[:4] != b"\0\0\0\0"
                self._check_frames(int.from_bytes(body[:4], "big"))
            case b"fdAT":
                self._check_frames(2)
            case _ if _is_critical(kind):
                raise InvalidImage(
                    f"The PNG is broken: the chunk {_name(kind)} is out of its place"
                )

    def _check_frames(self, frames: int) -> None:
        if self._animated and frames > 1:
            raise InvalidImage("The image is animated: send one frame")


def _checked(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of the chunks up to IEND that have a right checksum."""
    if not data.startswith(_SIGNATURE):
        raise InvalidImage("The PNG is broken: its signature is not whole")
    position = len(_SIGNATURE)
    for _ in range(MAX_CHUNKS):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + length]
        position += 12 + length
        if position > len(data):
            raise InvalidImage("The PNG is truncated: a chunk is cut off")
        checksum = int.from_bytes(data[position - 4 : position], "big")
        if zlib.crc32(content, zlib.crc32(kind)) == checksum:
            yield kind, content
        elif _is_critical(kind):
            raise InvalidImage(f"The PNG is broken: the chunk {_name(kind)} has a wrong checksum")
        if kind == b"IEND":
            return
    raise InvalidImage(f"The PNG has more than {MAX_CHUNKS} chunks")


def _is_critical(kind: bytes) -> bool:
    return not kind[0] & 0x20


def _name(kind: bytes) -> str:
    return as_json(kind.decode("latin-1"))


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", checksum)


def _inflate_profile(body: bytes) -> bytes | None:
    """The ICC profile of an iCCP chunk, or None for one that is broken or too large."""
    _, _, packed = body.partition(b"\0")
    try:
        profile = zlib.decompressobj().decompress(packed[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return None
    return profile or None


def _rounded(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(256 high + low) / 257, rounded to nearest: high + (low - high) / 257."""
    more = low > (wide := high.astype(np.int16)) + 128
    less = low < wide - 128
    return high + more.astype(np.uint8) - less.astype(np.uint8)


def _opacity(opaque: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))
