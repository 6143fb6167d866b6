"""JPEG files: the full decode at any size, and damage that libjpeg warns of."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidImage
from service.predictions.images.reader import decode
from tests.support.pictures import RESOLUTION, encoded, random_pixels

NOISE = Image.fromarray(random_pixels(100, 100))
PLAIN = encoded(NOISE, "JPEG", quality=90)
PROGRESSIVE = encoded(NOISE, "JPEG", quality=90, progressive=True)
SCAN, END = b"\xff\xda", b"\xff\xd9"


def scan_start(data: bytes, scan: int = 0) -> int:
    """The first byte of a scan's data."""
    place = -1
    for _ in range(scan + 1):
        place = data.index(SCAN, place + 1)
    return place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def cut(data: bytes, kept: float) -> bytes:
    """The JPEG with so much of its file, and an end marker."""
    return data[: int(len(data) * kept)].rstrip(b"\xff") + END


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize(
    "size", [(513, 513), (512, 512), (1000, 777), (129, 400), (256, 256), (2049, 65)]
)
def test_large_jpeg_is_decoded_in_full(size: tuple[int, int], subsampling: str) -> None:
    """At any size the array is that of the full decode, resized once, pixel for pixel."""
    width, height = size
    data = encoded(
        Image.fromarray(random_pixels(height, width)), "JPEG", quality=80, subsampling=subsampling
    )
    shorter = min(size)
    scaled = tuple(max(RESOLUTION, round(side * RESOLUTION / shorter)) for side in size)
    full = Image.open(BytesIO(data)).convert("RGB")
    resized = full.resize(scaled, Image.Resampling.BICUBIC)
    left, top = ((side - RESOLUTION) // 2 for side in scaled)
    square = resized.crop((left, top, left + RESOLUTION, top + RESOLUTION))
    np.testing.assert_array_equal(decode(data, RESOLUTION), np.asarray(square).transpose(2, 0, 1))


KINDS: dict[str, Any] = {
    "baseline": PLAIN,
    "progressive": PROGRESSIVE,
    "gray": encoded(NOISE.convert("L"), "JPEG"),
    "cmyk": encoded(NOISE.convert("CMYK"), "JPEG"),
    "restarts": encoded(NOISE, "JPEG", restart_marker_blocks=3),
    "optimized": encoded(NOISE, "JPEG", optimize=True),
    "rgb": encoded(NOISE, "JPEG", keep_rgb=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8, 0.95])
def test_scan_data_that_end_early_are_refused(kind: str, kept: float) -> None:
    """An end marker does not make a whole picture of a part: gray rows are never certified."""
    assert decode(KINDS[kind], RESOLUTION).shape == (3, RESOLUTION, RESOLUTION)
    with pytest.raises(InvalidImage, match=r"truncated|broken"):
        decode(cut(KINDS[kind], kept), RESOLUTION)


@pytest.mark.parametrize("scan", range(4))
def test_every_scan_is_checked(scan: int) -> None:
    """A hole in any scan of a progressive JPEG is refused, also where later scans are whole."""
    start = scan_start(PROGRESSIVE, scan)
    end = PROGRESSIVE.index(b"\xff\xc4", start)
    half = (start + end) // 2
    with pytest.raises(InvalidImage, match="broken"):
        decode(PROGRESSIVE[:half].rstrip(b"\xff") + PROGRESSIVE[end:], RESOLUTION)


@pytest.mark.parametrize("scans", range(1, PROGRESSIVE.count(SCAN)))
def test_a_progressive_jpeg_without_its_last_scans_is_refused(scans: int) -> None:
    """A file that was cut between two scans shows a coarse picture, and is not the whole one."""
    assert decode(PROGRESSIVE, RESOLUTION).shape == (3, RESOLUTION, RESOLUTION)
    whole_scans = PROGRESSIVE[: PROGRESSIVE.index(b"\xff\xc4", scan_start(PROGRESSIVE, scans - 1))]
    with pytest.raises(InvalidImage, match=r"truncated|broken"):
        decode(whole_scans + END, RESOLUTION)


def test_garbled_scan_data_are_refused() -> None:
    """A hole, foreign bytes and a lost restart in the middle of the scan data are refused."""
    middle = (scan_start(PLAIN) + len(PLAIN)) // 2
    hole = PLAIN[: middle - 1000] + PLAIN[middle + 1000 :]
    foreign = (
        PLAIN[:middle] + bytes(random_pixels(1, 700, 1)).replace(b"\xff", b"") + PLAIN[middle:]
    )
    restarts = KINDS["restarts"]
    place = restarts.index(b"\xff\xd3")
    lost = restarts[:place] + restarts[restarts.index(b"\xff\xd5", place) :]
    for data in (hole, foreign, lost):
        with pytest.raises(InvalidImage, match="Corrupt JPEG data"):
            decode(data, RESOLUTION)


def test_component_without_data_is_refused() -> None:
    """A color component that no scan holds would be gray all over: refused, without a warning."""
    gray = KINDS["gray"]
    place = gray.index(b"\xff\xc0")
    end = place + 2 + int.from_bytes(gray[place + 2 : place + 4], "big")
    frame = gray[place + 4 : place + 9] + b"\3" + b"\1\x11\0\2\x11\0\3\x11\0"
    with pytest.raises(InvalidImage, match="component has no data"):
        decode(gray[:place] + segment(0xC0, frame) + gray[end:], RESOLUTION)


@pytest.mark.parametrize(
    "data",
    [
        PLAIN[:-2] + bytes(500) + END,
        PLAIN[:-2] + b"\x20" * 3 + END,
        PLAIN[:-2] + b"some bytes" + END,
        PLAIN[:-2] + b"\xff" * 500 + END,
        PLAIN[:-2] + bytes(40) + b"\xff" * 3 + END,
        PLAIN[:2] + b"\xff\xff" + PLAIN[2:],
        PLAIN.replace(b"\xff\xdb", b"between\xff\xdb", 1),
        PLAIN[:2] + segment(0xFE, b"a comment") + PLAIN[2:],
        PLAIN[:2] + segment(0xE1, b"Exif\0\0garbage") + PLAIN[2:],
        PLAIN[:2] + segment(0xE2, b"MPF\0garbage") + PLAIN[2:],
        PLAIN[:2] + segment(0xED, b"Photoshop 3.0\0garbage") + PLAIN[2:],
        PLAIN[:2] + segment(0xE1, b"x" * 65_000) * 100 + PLAIN[2:],
        PLAIN.replace(b"JFIF\0\1\1", b"JFIF\0\7\7"),
        PLAIN[: scan_start(PLAIN) - 3] + bytes(3) + PLAIN[scan_start(PLAIN) :],
        PLAIN + b"\0\0\0\x18ftypmp42" + SCAN * 200 + END + b"\xff\xc0\xff",
        PLAIN + PLAIN * 20,
    ],
)
def test_harmless_bytes_are_overlooked(data: bytes) -> None:
    """Padding, metadata, odd versions and a video behind the end leave the pixels as they are."""
    np.testing.assert_array_equal(decode(data, RESOLUTION), decode(PLAIN, RESOLUTION))


def test_scans_of_a_preview_do_not_count() -> None:
    """Scans inside a segment, as of an embedded thumbnail, are not the picture's."""
    data = PLAIN[:2] + segment(0xE1, SCAN * 1000) + PLAIN[2:]
    assert decode(data, RESOLUTION).shape == (3, RESOLUTION, RESOLUTION)


def test_scan_bombs_are_refused() -> None:
    """A JPEG with hundreds of scans, each costing a pass over all pixels, is refused unread."""
    start = PROGRESSIVE.index(SCAN)
    with pytest.raises(InvalidImage, match="more than 100 scans"):
        decode(PROGRESSIVE[:start] + PROGRESSIVE[start:-2] * 101, RESOLUTION)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (PLAIN[:-2], "no end marker"),
        (PLAIN[:40], "cut off"),
        (PLAIN[:2] + segment(0xFE, b"") * 10_001 + PLAIN[2:], "more than 10000 segments"),
        (PLAIN[:2] + PLAIN[2:].replace(b"\xff\xc0", b"\xff\xf0"), "unknown marker 0xf0"),
        (PLAIN[:2] + segment(0xC0, b"\x08\0\x10\0\x10\1\1\x11\0") + PLAIN[2:], "two frame headers"),
        (b"\xff\xd8" + END, "no data"),
        (PLAIN[:2] + b"\xff\xe0\0\1" + PLAIN[2:], "cut off"),
    ],
)
def test_broken_structure_is_refused(data: bytes, why: str) -> None:
    """Segments that are cut off, unknown or one too many are named."""
    with pytest.raises(InvalidImage, match=why):
        decode(data, RESOLUTION)


def test_unsupported_subsampling_is_named() -> None:
    """A subsampling whose damage cannot be told is refused by name."""
    data = encoded(NOISE, "JPEG", subsampling="4:4:4")
    frame = data.index(b"\xff\xc0") + 11
    with pytest.raises(InvalidImage, match="chroma subsampling"):
        decode(data[:frame] + b"\x31" + data[frame + 1 :], RESOLUTION)


@pytest.mark.parametrize("kind", ["baseline", "progressive"])
def test_orientation_is_that_of_exif_alone(kind: str) -> None:
    """EXIF turns the picture; an orientation in XMP, alone or beside it, does not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    options = {"progressive": kind == "progressive", "quality": 95}
    plain = decode(encoded(NOISE, "JPEG", **options), RESOLUTION)
    marked = encoded(NOISE, "JPEG", xmp=xmp, **options)
    np.testing.assert_array_equal(decode(marked, RESOLUTION), plain)
    turned = decode(encoded(NOISE, "JPEG", xmp=xmp, exif=exif, **options), RESOLUTION)
    assert np.abs(turned.astype(int) - np.rot90(plain, -1, (1, 2))).max() <= 1
