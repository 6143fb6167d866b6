"""PNG files: transparency and depth in every kind, metadata, and damage that libpng warns of."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidImage
from service.predictions.images.reader import decode
from tests.support.pictures import PNG_SIGNATURE, RESOLUTION, encoded, png, png_chunk, random_pixels

SIZE = (RESOLUTION, RESOLUTION)
ROWS = b"".join(b"\0" + row.tobytes() for row in random_pixels())
HEADER = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *SIZE, 8, 2, 0, 0, 0))
END = png_chunk(b"IEND", b"")
PLAIN = PNG_SIGNATURE + HEADER + png_chunk(b"IDAT", zlib.compress(ROWS)) + END
MEGABYTES = zlib.compress(bytes(8 * 2**20))


def packed(values: Any, depth: int) -> bytes:
    """Unfiltered PNG rows of samples (height, width, planes), each packed into `depth` bits."""
    rows = []
    for row in values.reshape(len(values), -1):
        if depth == 16:
            rows.append(row.astype(">u2").tobytes())
        else:
            bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
            rows.append(np.packbits(bits.astype(np.uint8)).tobytes())
    return b"".join(b"\0" + row for row in rows)


def with_rows(*compressed: bytes) -> bytes:
    """An 8-bit RGB PNG with these IDAT chunks."""
    return PNG_SIGNATURE + HEADER + b"".join(png_chunk(b"IDAT", part) for part in compressed) + END


def with_chunk(chunk: bytes) -> bytes:
    """The plain PNG with one more chunk before its rows."""
    return PNG_SIGNATURE + HEADER + chunk + PLAIN[len(PNG_SIGNATURE + HEADER) :]


def rounded(values: Any, depth: int) -> Any:
    return np.rint(values * (255 / (2**depth - 1))).astype(np.uint8)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_gray(depth: int) -> None:
    """The gray value that tRNS names is white in every depth; all others stay as they are."""
    values = np.random.default_rng(1).integers(0, 2**depth, (*SIZE, 1))
    key = int(values[3, 3, 0])
    values[5, 5] = key ^ 1
    named = png_chunk(b"tRNS", struct.pack(">H", key))
    decoded = decode(png(*SIZE, packed(values, depth), depth=depth, colour=0, more=named), 32)
    expected = np.where(values == key, 255, rounded(values, depth))
    np.testing.assert_array_equal(decoded, np.broadcast_to(expected[..., 0], (3, *SIZE)))


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_color(depth: int) -> None:
    """The color that tRNS names is white; one that differs in the last bit of a sample is not."""
    values = np.random.default_rng(2).integers(0, 2**depth, (*SIZE, 3))
    key = np.array([10, 20, 30]) * (257 if depth == 16 else 1)
    values[:8] = key
    values[0, 0] = key ^ [0, 0, 1]
    named = png_chunk(b"tRNS", struct.pack(">HHH", *key))
    decoded = decode(png(*SIZE, packed(values, depth), depth=depth, colour=2, more=named), 32)
    expected = np.where((values == key).all(-1, keepdims=True), 255, rounded(values, depth))
    np.testing.assert_array_equal(decoded, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_palette(depth: int) -> None:
    """Palette entries of opacity 0 are white, of opacity 51 four fifths white, others exact."""
    indices = np.random.default_rng(3).integers(0, 2**depth, (*SIZE, 1))
    palette = np.random.default_rng(4).integers(0, 256, (2**depth, 3), dtype=np.uint8)
    more = png_chunk(b"PLTE", palette.tobytes()) + png_chunk(b"tRNS", b"\x00\x33"[: 2**depth - 1])
    decoded = decode(png(*SIZE, packed(indices, depth), depth=depth, colour=3, more=more), 32)
    shown = palette.astype(float)
    shown[0] = 255
    if depth > 1:
        shown[1] = 255 * 0.8 + shown[1] * 0.2
    expected = np.rint(shown)[indices[..., 0]].transpose(2, 0, 1)
    assert np.abs(decoded - expected).max() <= (1 if depth > 1 else 0)
    assert (decoded == expected)[:, indices[..., 0] != 1].all()


@pytest.mark.parametrize(("colour", "planes"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_rounded(colour: int, planes: int) -> None:
    """Every 16-bit sample is divided by 257 and rounded to nearest, with and without alpha."""
    values = np.random.default_rng(5).integers(0, 65536, (*SIZE, planes))
    if planes % 2 == 0:
        values[..., -1] = 65535
    decoded = decode(png(*SIZE, packed(values, 16), depth=16, colour=colour), RESOLUTION)
    shown = rounded(values[..., : 1 if planes < 3 else 3], 16).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded, np.broadcast_to(shown, (3, *SIZE)))


@pytest.mark.parametrize(("colour", "planes"), [(4, 2), (6, 4)])
def test_sixteen_bit_alpha_is_laid_on_white(colour: int, planes: int) -> None:
    """Alpha of 16 bits hides and mixes as one of 8 bits does."""
    values = np.zeros((*SIZE, planes), int)
    values[:16, :, -1] = 51 * 257
    decoded = decode(png(*SIZE, packed(values, 16), depth=16, colour=colour), RESOLUTION)
    assert decoded[:, 0, 0].tolist() == [204, 204, 204]
    assert decoded[:, 31, 0].tolist() == [255, 255, 255]


def test_interlaced_sixteen_bits() -> None:
    """An interlaced 16-bit PNG of one color is whole; one with a pass missing is refused."""
    rows = b""
    for width, height in [(4, 4), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16), (32, 16)]:
        rows += packed(np.full((height, width, 3), 5 * 257), 16)
    decoded = decode(png(*SIZE, rows, depth=16, colour=2, interlace=1), RESOLUTION)
    assert (decoded == 5).all()
    with pytest.raises(InvalidImage, match="too few rows"):
        decode(png(*SIZE, rows[:-1], depth=16, colour=2, interlace=1), RESOLUTION)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (4, 9), (33, 2)])
@pytest.mark.parametrize("depth", [1, 8])
def test_small_interlaced_passes(size: tuple[int, int], depth: int) -> None:
    """Passes that are empty in a small image count no bytes: one byte less is refused."""
    width, height = size
    rows = 0
    for left, top, across, down in [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]:
        columns, lines = len(range(left, width, across)), len(range(top, height, down))
        rows += lines * (1 + (columns * depth + 7) // 8) if columns else 0
    assert decode(png(*size, bytes(rows), depth=depth, colour=0, interlace=1), 32).max() == 0
    with pytest.raises(InvalidImage, match="too few rows"):
        decode(png(*size, bytes(rows - 1), depth=depth, colour=0, interlace=1), 32)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + MEGABYTES),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + MEGABYTES),
        png_chunk(b"iCCP", b"profile\0\0" + MEGABYTES),
        png_chunk(b"iCCP", b"profile\0\0not compressed"),
        png_chunk(b"iCCP", b"profile"),
        png_chunk(b"zTXt", b"Comment\0\7method"),
        png_chunk(b"tRNS", b"short"),
        png_chunk(b"acTL", bytes(8)),
        png_chunk(b"acTL", struct.pack(">II", 1, 0)),
        png_chunk(b"gAMA", b""),
        png_chunk(b"eXIf", b"MM\0*"),
        png_chunk(b"pHYs", bytes(9))[:-1] + b"?",
        png_chunk(b"tRNS", bytes(6))[:-1] + b"?",
    ],
)
def test_metadata_do_not_decide(chunk: bytes) -> None:
    """Metadata of 8 MB, without sense or with a wrong checksum leave the pixels as they are."""
    np.testing.assert_array_equal(decode(with_chunk(chunk), 32), decode(PLAIN, 32))


@pytest.mark.parametrize(
    "data",
    [
        PLAIN + b"a video",
        with_rows(zlib.compress(ROWS + bytes(2**20))),
        with_rows(zlib.compress(ROWS), b"more"),
        with_rows(*(zlib.compress(ROWS)[i : i + 7] for i in range(0, 3200, 7))),
        with_rows(zlib.compress(ROWS), b""),
    ],
)
def test_more_bytes_than_needed_are_harmless(data: bytes) -> None:
    """Bytes behind the end and behind the last row, and rows in many chunks, change nothing."""
    np.testing.assert_array_equal(decode(data, 32), decode(PLAIN, 32))


def test_rows_of_one_color_compress_well() -> None:
    """A row count is right where a few bytes inflate to many megabytes."""
    assert decode(encoded(Image.new("RGB", (3000, 2000), "red")), RESOLUTION)[0].min() == 255


DAMAGED = {
    "no rows at all": PNG_SIGNATURE + HEADER + END,
    "rows missing": with_rows(zlib.compress(ROWS[: 97 * 20])),
    "last byte missing": with_rows(zlib.compress(ROWS[:-1])),
    "rows cut": with_rows(zlib.compress(ROWS)[:-300]),
    "rows garbled": with_rows(zlib.compress(ROWS, 0)[:500] + b"?" + zlib.compress(ROWS, 0)[501:]),
    "rows no zlib": with_rows(b"rows"),
    "unknown filter": with_rows(zlib.compress(b"\x09" + ROWS[1:])),
    "rows in two places": PNG_SIGNATURE
    + HEADER
    + png_chunk(b"IDAT", zlib.compress(ROWS)[:900])
    + png_chunk(b"tEXt", b"a\0b")
    + png_chunk(b"IDAT", zlib.compress(ROWS)[900:])
    + END,
    "wrong checksum": PLAIN[:-13] + b"?" + PLAIN[-12:],
    "no end": PLAIN[: -len(END)],
    "end cut": PLAIN[:-1],
    "two headers": with_chunk(HEADER),
    "no header first": PNG_SIGNATURE + png_chunk(b"tEXt", b"a\0b") + PLAIN[8:],
    "short header": PNG_SIGNATURE + png_chunk(b"IHDR", b"short") + PLAIN[8 + len(HEADER) :],
    "unknown critical chunk": with_chunk(png_chunk(b"ABCD", b"")),
    "color type": png(*SIZE, ROWS, depth=8, colour=5),
    "depth": png(*SIZE, ROWS, depth=3, colour=2),
    "interlace": png(*SIZE, ROWS, depth=8, colour=2, interlace=2),
    "no palette": png(*SIZE, bytes(33 * 32), depth=8, colour=3),
    "palette cut": png(*SIZE, bytes(33 * 32), depth=8, colour=3, more=png_chunk(b"PLTE", b"ab")),
    "beyond the palette": png(
        *SIZE,
        bytes(33 * 31) + b"\0" + b"\7" * 32,
        depth=8,
        colour=3,
        more=png_chunk(b"PLTE", b"abc"),
    ),
    "too many chunks": with_chunk(png_chunk(b"tEXt", b"") * 100_001),
    "no pixels": png(0, 5, bytes(5), depth=8, colour=2),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_refused(data: bytes) -> None:
    """Rows that are missing, garbled or of no known meaning are never certified."""
    with pytest.raises(InvalidImage):
        decode(data, RESOLUTION)


def test_second_frame_is_refused() -> None:
    """An animation of one frame that is not the picture itself has no single picture either."""
    control = png_chunk(b"acTL", struct.pack(">II", 1, 0))
    frame = png_chunk(b"fdAT", bytes(4) + zlib.compress(ROWS))
    data = with_chunk(control)[: -len(END)] + frame + END
    with pytest.raises(InvalidImage, match="animated"):
        decode(data, RESOLUTION)
