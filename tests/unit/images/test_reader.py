from __future__ import annotations

import asyncio
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile

from service.errors import Backlog, InvalidImage, TooLarge, UnsupportedMedia
from service.predictions.images import reader as images
from service.predictions.images.reader import ImageLimits, ImageReader, decode
from tests.support.pictures import RESOLUTION, encoded, png, random_pixels


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exact_size_is_untouched(kind: str) -> None:
    """An image already at the resolution comes back bit for bit, channel first."""
    pixels = random_pixels()
    decoded = decode(encoded(Image.fromarray(pixels), kind, lossless=True), RESOLUTION)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, pixels.transpose(2, 0, 1))


def test_jpeg_is_read_as_pillow_reads_it() -> None:
    """A JPEG of the right size is decoded and nothing else happens to it."""
    data = encoded(Image.fromarray(random_pixels()), "JPEG", quality=90)
    expected = np.asarray(Image.open(BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(data, RESOLUTION), expected)


def test_one_side_right_is_only_cropped() -> None:
    """Where the shorter side is right, the centre square is cut out without resampling."""
    pixels = random_pixels(height=RESOLUTION, width=RESOLUTION + 10)
    decoded = decode(encoded(Image.fromarray(pixels)), RESOLUTION)
    np.testing.assert_array_equal(decoded, pixels[:, 5:-5].transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (5, 3), (1, 1), (33, 32), (97, 1)])
def test_every_shape_becomes_the_square(size: tuple[int, int]) -> None:
    """Large, small and narrow images of one colour become a square of that colour."""
    decoded = decode(encoded(Image.new("RGB", size, (10, 200, 30))), RESOLUTION)
    assert decoded.shape == (3, RESOLUTION, RESOLUTION)
    assert np.unique(decoded.reshape(3, -1), axis=1).T.tolist() == [[10, 200, 30]]


def test_resize_is_antialiased_bicubic() -> None:
    """The shorter side is resized by Pillow's bicubic filter before the crop."""
    source = Image.fromarray(random_pixels(80, 96))
    expected = source.resize((38, 32), Image.Resampling.BICUBIC).crop((3, 0, 35, 32))
    decoded = decode(encoded(source), RESOLUTION)
    np.testing.assert_array_equal(decoded, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, "nw"), (2, "ne"), (3, "se"), (4, "sw"), (5, "nw"), (6, "ne"), (7, "se"), (8, "sw")],
)
def test_orientation_is_applied(kind: str, orientation: int, corner: str) -> None:
    """The stored top left corner lands where the EXIF standard says for all eight values."""
    pixels = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    pixels[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), kind, exif=exif)
    decoded = decode(data, RESOLUTION)[0]
    bright = {"nw": (4, 4), "ne": (4, 28), "sw": (28, 4), "se": (28, 28)}
    for name, place in bright.items():
        assert (decoded[place] > 128) == (name == corner), name


@pytest.mark.parametrize(("orientation", "expected"), [(5, "transposed"), (6, "clockwise")])
def test_orientation_turns_the_right_way(orientation: int, expected: str) -> None:
    """Values 5 and 6, which share a corner with 1 and 2, move every pixel as the standard says."""
    pixels = random_pixels()
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(Image.fromarray(pixels), exif=exif), RESOLUTION)
    turned = {"transposed": pixels.swapaxes(0, 1), "clockwise": np.rot90(pixels, -1)}[expected]
    np.testing.assert_array_equal(decoded, turned.transpose(2, 0, 1))


def test_broken_metadata_is_overlooked() -> None:
    """EXIF that cannot be read does not spoil pixels that can."""
    data = encoded(Image.fromarray(random_pixels()), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data, RESOLUTION).shape == (3, RESOLUTION, RESOLUTION)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    """One-bit, grey and palette images come back as the colours that they show."""
    source = Image.fromarray(random_pixels()).convert(mode)
    expected = np.asarray(source.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(encoded(source), RESOLUTION), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_opaque_alpha_is_dropped(kind: str) -> None:
    """An alpha channel that hides nothing leaves the colours bit for bit."""
    pixels = random_pixels()
    source = Image.fromarray(np.dstack([pixels, np.full((32, 32), 255, np.uint8)]))
    decoded = decode(encoded(source, kind, lossless=True, exact=True), RESOLUTION)
    np.testing.assert_array_equal(decoded, pixels.transpose(2, 0, 1))


def test_transparency_is_laid_on_white() -> None:
    """Transparent pixels show white, half transparent ones the mean with white."""
    source = Image.new("RGBA", (32, 32), (100, 0, 50, 0))
    source.paste((100, 0, 50, 51), (0, 0, 32, 16))
    decoded = decode(encoded(source), RESOLUTION)
    assert decoded[:, 31, 0].tolist() == [255, 255, 255]
    assert decoded[:, 0, 0].tolist() == [224, 204, 214]


def test_grey_alpha_and_transparent_palette() -> None:
    """Grey with alpha, and a palette with a transparent entry, are laid on white as well."""
    grey = Image.merge("LA", (Image.new("L", (32, 32), 10), Image.new("L", (32, 32), 0)))
    assert decode(encoded(grey), RESOLUTION).min() == 255
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert decode(encoded(palette, transparency=b"\x00\xff"), RESOLUTION).min() == 255
    assert decode(encoded(palette, transparency=1), RESOLUTION).max() == 0


def test_cmyk_jpeg_has_the_colours_it_shows() -> None:
    """A CMYK JPEG becomes RGB, not inverted."""
    source = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    decoded = decode(encoded(source, "JPEG", quality=100), RESOLUTION)
    assert np.abs(decoded[:, 0, 0].astype(int) - [255, 0, 0]).max() <= 3


def test_sixteen_bit_grey_is_scaled() -> None:
    """16-bit grey is divided by 257 and rounded to nearest, not clipped."""
    values = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    decoded = decode(encoded(Image.fromarray(values)), RESOLUTION)
    expected = np.rint(values / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(decoded, np.broadcast_to(expected, (3, 32, 32)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation_is_refused(kind: str) -> None:
    """More than one frame is refused: there is no single image to certify."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidImage, match="animated"):
        decode(data, RESOLUTION)


def test_camera_jpeg_with_a_preview_is_read() -> None:
    """A JPEG that carries further pictures (MPO, as telephones write it) shows its first."""
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("white", "black"))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert decode(data, RESOLUTION).min() == 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
def test_truncation_is_refused(kind: str, kept: float) -> None:
    """A file that ends early is refused, wherever it ends: grey rows are never certified."""
    data = encoded(Image.fromarray(random_pixels(100, 100)), kind)
    with pytest.raises(InvalidImage, match=r"truncated|broken"):
        decode(data[: int(len(data) * kept)], RESOLUTION)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_not_supported(kind: str) -> None:
    """Formats that Pillow could read, but the service does not promise, are a 415."""
    with pytest.raises(UnsupportedMedia, match="JPEG, PNG or WebP"):
        decode(encoded(Image.new("RGB", (32, 32)), kind), RESOLUTION)


@pytest.mark.parametrize(
    "data", [b"hello", b"%PDF-1.7", b"RIFF\0\0\0\0WAVE", b"<svg/>", b"\0" * 99]
)
def test_no_image_is_not_supported(data: bytes) -> None:
    """Bytes that are no image are a 415."""
    with pytest.raises(UnsupportedMedia):
        decode(data, RESOLUTION)


def test_nothing_is_refused() -> None:
    """Zero bytes are named as such."""
    with pytest.raises(InvalidImage, match="0 bytes"):
        decode(b"", RESOLUTION)


def test_bytes_are_bounded() -> None:
    """One byte more than the limit is too large, and the document names the limit."""
    data = encoded(Image.new("RGB", (32, 32)))
    assert decode(data, RESOLUTION, ImageLimits(bytes=len(data))).shape[0] == 3
    with pytest.raises(TooLarge) as refused:
        decode(data, RESOLUTION, ImageLimits(bytes=len(data) - 1))
    assert refused.value.document()["limit"] == len(data) - 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_bounded_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image above the pixel limit is refused from its header; its pixels are never decoded."""
    data = encoded(Image.new("RGB", (64, 33)), kind)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded the pixels"))
    with pytest.raises(TooLarge, match="at most 2111"):
        decode(data, RESOLUTION, ImageLimits(pixels=64 * 33 - 1))


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_bombs_are_refused(side: int) -> None:
    """A few bytes that claim a gigantic image are too large, below and above Pillow's own limit."""
    with pytest.raises(TooLarge):
        decode(png(side, side, b"\0" * 100, depth=8, colour=2), RESOLUTION)


def test_strips_are_refused() -> None:
    """A strip that would grow out of all bounds when its short side is resized is refused."""
    with pytest.raises(InvalidImage, match="100 times"):
        decode(encoded(Image.new("L", (101, 1))), RESOLUTION)


async def test_reader_decodes() -> None:
    """The reader answers and refuses as `decode` does."""
    reader = ImageReader(ImageLimits(), seconds=5.0, threads=1)
    data = encoded(Image.fromarray(random_pixels()))
    np.testing.assert_array_equal(await reader.read(data, 32), decode(data, 32))
    with pytest.raises(UnsupportedMedia):
        await reader.read(b"hello", 32)
    reader.close()


async def test_reader_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow image is refused in time, keeps its thread meanwhile, and gives it back after."""
    slow, release = threading.Event(), threading.Event()

    def decode_slowly(*_: object) -> str:
        slow.set()
        release.wait(60)
        return "decoded"

    monkeypatch.setattr(images, "decode", decode_slowly)
    reader = ImageReader(ImageLimits(), seconds=0.05, threads=1)
    with pytest.raises(InvalidImage, match="longer than"):
        await reader.read(b"", 32)
    assert await asyncio.to_thread(slow.wait, 60)
    with pytest.raises(Backlog) as refused:
        await reader.read(b"", 32)
    assert refused.value.retry_after == 1
    monkeypatch.setattr(reader, "_seconds", 60.0)
    release.set()
    assert await reader.read(b"", 32) == "decoded"
    reader.close()


async def test_a_cancellation_that_comes_with_the_place_is_kept() -> None:
    """A caller that is cancelled as its turn comes is cancelled, and its place is free again."""
    reader = ImageReader(ImageLimits(), seconds=5.0, threads=1)
    await reader._places.acquire()
    waiting = asyncio.create_task(reader.read(b"", 8))
    for _ in range(3):
        await asyncio.sleep(0)
    reader._places.release()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not reader._places.locked()
    reader.close()
