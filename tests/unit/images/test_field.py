"""The pictures of ../shared/field, by `decode` and over HTTP, and mutations of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.errors import InvalidImage, Problem
from service.predictions.images.reader import decode
from tests.support.pictures import FIELD, RESOLUTION, l2
from tests.support.serving import problem, serving

pytestmark = pytest.mark.skipif(not FIELD.exists(), reason="../shared/field is absent")

WHITE = ("rgb16-transparent.png", "grey2-trns.png")
REFUSED = ("second-ihdr.png", "cut60-eoi.jpg", "hole.jpg")
SAME = ("rgb16-plain.png", "ztxt-2mb.png", "iccp-2mb.png", "phys-crc.png")
NEARLY = (
    ("icc-p3.png", "plain.png", 0.1),
    ("icc-bgr.png", "plain.png", 0.1),
    ("odd513.jpg", "odd513.png", 0.2),
    ("xmp6.jpg", "plain256.jpg", 0.2),
)


def picture(name: str) -> bytes:
    return (FIELD / name).read_bytes()


@pytest.mark.parametrize("name", WHITE)
def test_transparent_pictures_are_white(name: str) -> None:
    """Pixels of the transparent color in 2 and 16 bits show white."""
    assert decode(picture(name), RESOLUTION).min() == 255


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_pictures_are_refused(name: str) -> None:
    """A second header and scan data that end early are no image."""
    with pytest.raises(InvalidImage, match=r"broken|truncated"):
        decode(picture(name), RESOLUTION)


@pytest.mark.parametrize("name", SAME)
def test_metadata_do_not_change_the_picture(name: str) -> None:
    """Two megabytes of unused metadata, a wrong ancillary checksum and 16 bits: the picture."""
    plain = decode(picture("plain.png"), RESOLUTION)
    np.testing.assert_array_equal(decode(picture(name), RESOLUTION), plain)


@pytest.mark.parametrize(("name", "like", "most"), NEARLY)
def test_pictures_are_near_the_right_one(name: str, like: str, most: float) -> None:
    """Profiles are converted, an odd JPEG is not stretched, XMP does not turn."""
    right = decode(picture(like), RESOLUTION)
    assert l2(decode(picture(name), RESOLUTION), right) < most


async def test_table_holds_over_http() -> None:
    """POST /predict refuses what is damaged as `invalid-image` and answers everything else."""
    names = sorted(path.name for path in FIELD.iterdir() if path.suffix in (".png", ".jpg"))
    assert {*WHITE, *REFUSED, *SAME} < set(names)
    async with serving() as service:
        for name in names:
            response = await service.ask(picture(name), n=100, n0=10)
            if name in REFUSED:
                problem(response, 422, "invalid-image")
            else:
                assert response.status_code == 200, (name, response.text)


def mutated(data: bytes, generator: Any) -> bytes:
    """The file with a few bytes changed, cut out, put in, or cut off at the end."""
    changed = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        place = int(generator.integers(min(len(changed), generator.choice([200, 10_000]))))
        length = int(generator.integers(1, 30))
        match generator.integers(4):
            case 0:
                changed[place] = int(generator.integers(256))
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = generator.bytes(length)
            case _:
                changed = changed[: max(place, 1)]
        if not changed:
            return b"\0"
    return bytes(changed)


def test_nothing_but_problems_escapes() -> None:
    """However a file is damaged, `decode` returns the array or raises a Problem below 500."""
    generator = np.random.default_rng(20)
    files = [path.read_bytes() for path in sorted(FIELD.glob("*.*g")) if "odd" not in path.name]
    read, refused = 0, set()
    for turn in range(4000):
        try:
            array = decode(mutated(files[turn % len(files)], generator), RESOLUTION)
        except Problem as raised:
            refused.add(raised.status)
        else:
            assert array.shape == (3, RESOLUTION, RESOLUTION)
            read += 1
    assert refused <= {413, 415, 422}
    assert 100 < read < 2000
