"""Embedded ICC profiles: converted to sRGB, or ignored where they are of no use."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from service.predictions.images import color
from service.predictions.images.reader import decode
from tests.support.pictures import RESOLUTION, encoded, random_pixels

PIXELS = random_pixels()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """A version 2 profile of these tags, their content padded to whole words."""
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", start + len(content), len(body))
        content += body
    header = struct.pack(">I4sI4s4s4s", start + len(content), b"lcms", 0x02400000, kind, space, pcs)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + content


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


WHITE = xyz(0.9642, 1.0, 0.8249)
LINEAR_GRAY = profile(b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": curve(1.0)})
SWAPPED = profile(
    b"RGB ",
    b"XYZ ",
    {
        b"wtpt": WHITE,
        b"rXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.4361, 0.2225, 0.0139),
        b"rTRC": curve(2.2),
        b"gTRC": curve(2.2),
        b"bTRC": curve(2.2),
    },
)
LUT = (
    b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).flat)
)
RAMP = bytes(range(256))
MIDDLE_INK = profile(
    b"CMYK",
    b"Lab ",
    {b"wtpt": WHITE, b"A2B0": LUT + RAMP * 4 + bytes([128, 128, 128]) * 16 + RAMP * 3},
    kind=b"prtr",
)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_srgb_leaves_every_pixel(kind: str) -> None:
    """An image that says it is sRGB is bit for bit the one that says nothing."""
    data = encoded(Image.fromarray(PIXELS), kind, lossless=True, icc_profile=SRGB)
    np.testing.assert_array_equal(decode(data, RESOLUTION), PIXELS.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_profile_is_converted(kind: str) -> None:
    """A profile of swapped channels swaps them back, from each of the three formats."""
    source = Image.new("RGB", (32, 32), (80, 140, 220))
    plain = decode(encoded(source, kind, lossless=True, quality=100), RESOLUTION).astype(int)
    data = encoded(source, kind, lossless=True, quality=100, icc_profile=SWAPPED)
    assert np.abs(decode(data, RESOLUTION)[::-1] - plain).max() <= 6


def test_profile_is_relative_colorimetric() -> None:
    """The result is littleCMS's own, at full size and before any resizing."""
    data = encoded(Image.fromarray(random_pixels(90, 90)), icc_profile=SWAPPED)
    image = Image.open(BytesIO(data))
    source = ImageCms.ImageCmsProfile(BytesIO(SWAPPED))
    target = ImageCms.createProfile("sRGB")
    right = ImageCms.profileToProfile(
        image, source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"
    )
    assert right is not None
    resized = np.asarray(right.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(data, RESOLUTION), resized)


def test_white_ground_is_not_converted() -> None:
    """Colors are converted before transparent pixels are laid on white."""
    source = Image.new("RGBA", (32, 32), (20, 120, 220, 102))
    opaque = decode(encoded(source.convert("RGB"), icc_profile=SWAPPED), RESOLUTION)[:, 0, 0]
    decoded = decode(encoded(source, icc_profile=SWAPPED), RESOLUTION)[:, 0, 0]
    assert np.abs(decoded - (255 * 0.6 + opaque * 0.4)).max() <= 1


def test_gray_profile() -> None:
    """Linear gray becomes the gray of sRGB, in 8 and in 16 bits."""
    ramp = np.arange(32, dtype=np.uint16)[None].repeat(32, 0) * 8
    linear = ramp / 255
    right = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    for values in (ramp.astype(np.uint8), (ramp * 257).astype(np.uint16)):
        decoded = decode(encoded(Image.fromarray(values), icc_profile=LINEAR_GRAY), RESOLUTION)
        assert np.abs(decoded - right).max() <= 1.5


def test_cmyk_profile() -> None:
    """A CMYK profile says what its inks look like."""
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", icc_profile=MIDDLE_INK)
    decoded = decode(data, RESOLUTION)
    assert np.abs(decoded.astype(int) - 119).max() <= 3


@pytest.mark.parametrize(
    ("mode", "icc"),
    [
        ("RGB", b"no profile"),
        ("RGB", SWAPPED[:200]),
        ("RGB", LINEAR_GRAY),
        ("RGB", MIDDLE_INK),
        ("RGB", SWAPPED.replace(b"mntr", b"link")),
        ("RGB", SWAPPED.replace(b"mntr", b"abst")),
        ("RGB", SWAPPED + b"mpet"),
        ("L", SWAPPED),
        ("L", SRGB),
    ],
)
def test_useless_profile_is_ignored(mode: str, icc: bytes) -> None:
    """A profile that is broken, unbounded or of another color space changes no pixel."""
    source = Image.fromarray(PIXELS).convert(mode)
    expected = np.asarray(source.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(encoded(source, icc_profile=icc), RESOLUTION), expected)


def test_profile_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile of more bytes than the bound is ignored."""
    data = encoded(Image.fromarray(PIXELS), icc_profile=SWAPPED)
    monkeypatch.setattr(color, "MAX_PROFILE_BYTES", len(SWAPPED) - 1)
    np.testing.assert_array_equal(decode(data, RESOLUTION), PIXELS.transpose(2, 0, 1))


def test_large_profile_is_read_from_many_segments() -> None:
    """A profile that a JPEG holds in several segments is put together in their order."""
    large = SWAPPED + bytes(150_000)
    source = Image.new("RGB", (32, 32), (20, 120, 220))
    data = encoded(source, "JPEG", quality=100, icc_profile=large)
    assert data.count(b"ICC_PROFILE\0") == 3
    assert decode(data, RESOLUTION)[0].min() > 200
