"""models/noise.py: the generator, the law of the noise, its independence and its error bound."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import chisquare

from models import noise
from models.noise import discrete_gaussian, slivers, total_variation
from service.jobs import NOISE_FORMAT
from service.predictions import results as answers
from tests.support.paths import DATA

KEY = bytes(range(32))
CIFAR = (3, 32, 32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's own threads would only contend in tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def integer_words(key: bytes, row: int, pixel: int, attempt: int) -> tuple[int, int]:
    """High and low 32 bits of one random word, from AES of the documented counter."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    counters = (row * 2**64 + attempt * 2**40 + half * 2**32 + pixel // 4 for half in (0, 1))
    blocks = (cipher.update(counter.to_bytes(16, "big")) for counter in counters)
    place = 4 * (pixel % 4)
    high, low = (int.from_bytes(block[place : place + 4], "little") for block in blocks)
    return high, low


def integer_draw(
    key: bytes, row: int, pixel: int, sigma: float, bits: int
) -> tuple[int, list[tuple[int, int]]]:
    """One pixel's value and the halves of every word it took, by bisection on Python's integers."""
    boundaries = slivers(sigma, bits)
    taken = []
    for attempt in range(128):
        high, low = integer_words(key, row, pixel, attempt)
        taken.append((high, low))
        word = (high << 32 | low) >> (64 - bits)
        position = bisect_left(boundaries, word)
        if boundaries[position] != word:
            return position - len(boundaries) // 2, taken
    raise AssertionError("every attempt was rejected")


def drawn_counts(sigma: float, bits: int) -> dict[int, int]:
    """Words that draw each value: those whose cell lies between two neighbouring thresholds."""
    with mpmath.workdps(60):
        bound = next(i for i in range(20000) if 2**bits * upper_tail(i, sigma) < 1)
        cuts = [2**bits * (1 - upper_tail(i, sigma)) for i in range(-bound - 1, bound + 1)]
        counts = {
            value: int(mpmath.floor(upper)) - int(mpmath.ceil(lower))
            for value, lower, upper in zip(range(-bound, bound + 1), cuts, cuts[1:], strict=False)
        }
    return {value: count for value, count in counts.items() if count > 0}


def upper_tail(i: int, sigma: float) -> mpmath.mpf:
    """1 - F(i) in mpmath's working precision."""
    return mpmath.ncdf(-mpmath.mpf(2 * i + 1) / (510 * mpmath.mpf(sigma)))


def exact_probabilities(values: np.ndarray, sigma: float) -> np.ndarray:
    """P(i) in double precision."""
    return ndtr((2 * values + 1) / (510 * sigma)) - ndtr((2 * values - 1) / (510 * sigma))


def goodness_of_fit(drawn: np.ndarray, values: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of Pearson's test, values expected below ten times in the last bin."""
    observed = np.array([np.count_nonzero(drawn == value) for value in values])
    expected = probabilities * drawn.size
    common = expected >= 10
    observed, expected = observed[common], expected[common]
    observed[-1] += drawn.size - observed.sum()
    expected[-1] += drawn.size - expected.sum()
    return float(chisquare(observed, expected).pvalue)


def test_the_words_are_the_keystream_of_the_published_standard() -> None:
    """NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt): the library and the noise give its answers."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    encrypted = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    library = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
    assert library.update(plain).hex() == encrypted
    cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305
    row, first = (int.from_bytes(half, "big") for half in (counter[:8], counter[8:]))
    addresses = np.array([first + block for block in range(4)], np.uint64)
    words = noise._words(cipher, np.array([row], np.uint64), addresses)
    stream = words.astype("<u4").tobytes()
    assert bytes(a ^ b for a, b in zip(plain, stream, strict=True)).hex() == encrypted


def test_both_halves_of_a_word_have_their_documented_counters() -> None:
    """All 63 bits of scattered words, of which a draw hardly ever needs the last 31."""
    cipher = Cipher(algorithms.AES256(KEY), modes.ECB()).encryptor()  # noqa: S305
    rows, pixels = np.array([0, 5, 2**32 - 1]), np.array([2, 3071, 2**26 - 1])
    for attempt in (0, 1, 127):
        places = zip(rows.tolist(), pixels.tolist(), strict=True)
        halves = [integer_words(KEY, row, pixel, attempt) for row, pixel in places]
        wanted = [high << 31 | low >> 1 for high, low in halves]
        assert noise._random_words(cipher, rows, pixels, attempt).tolist() == wanted


def test_published_vectors_are_drawn() -> None:
    """Words and values of tests/data/noise, which other implementations can be checked against."""
    published = json.loads((DATA / "noise/vectors.json").read_text())
    assert published["format"] == NOISE_FORMAT
    for vector in published["vectors"]:
        key, row, pixel = bytes.fromhex(vector["key"]), vector["row"], vector["pixel"]
        law = vector["sigma"], vector["bits"]
        value, words = integer_draw(key, row, pixel, *law)
        assert [[f"{high:08x}", f"{low:08x}"] for high, low in words] == vector["words"]
        drawn = discrete_gaussian(key, row, row + 1, (pixel + 1,), law[0], bits=law[1])
        assert drawn[0, pixel] == value == vector["value"]


@pytest.mark.parametrize(
    ("sigma", "bits"), [(0.12, 12), (0.25, 12), (0.25, 16), (1.0, 20), (1.0, 33), (4.0, 63)]
)
def test_every_draw_follows_from_the_documented_counter(sigma: float, bits: int) -> None:
    """Table look-up, open cells and redraws together equal a bisection on Python integers."""
    rows, shape, first = 4, (3, 7, 5), (1 << 31) - 2
    drawn = discrete_gaussian(KEY, first, first + rows, shape, sigma, bits=bits).view(rows, -1)
    for row in range(rows):
        expected = [integer_draw(KEY, first + row, pixel, sigma, bits)[0] for pixel in range(105)]
        assert drawn[row].tolist() == expected


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
def test_values_follow_the_exact_law(sigma: float) -> None:
    """Chi-square against P(i) finds nothing in 1.2 million draws."""
    drawn = discrete_gaussian(KEY, 0, 400, CIFAR, sigma).numpy()
    values = np.arange(-int(1275 * sigma), int(1275 * sigma) + 1)
    assert goodness_of_fit(drawn, values, exact_probabilities(values, sigma)) > 1e-3


def test_short_words_are_redrawn_to_the_law_of_the_words_that_remain() -> None:
    """With 12 bits some draws are redrawn, and the values follow the accepted words exactly."""
    counts = drawn_counts(0.12, 12)
    assert sum(counts.values()) + len(set(slivers(0.12, 12))) == 4096
    assert any(len(integer_draw(KEY, 0, pixel, 0.12, 12)[1]) > 1 for pixel in range(300))
    drawn = discrete_gaussian(KEY, 0, 300, CIFAR, 0.12, bits=12).numpy()
    assert set(np.unique(drawn).tolist()) == set(counts)
    shares = np.array(list(counts.values())) / sum(counts.values())
    assert goodness_of_fit(drawn, np.array(list(counts)), shares) > 1e-3


def test_endless_rejection_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw still rejected at the last attempt raises rather than loops or bends the law."""
    monkeypatch.setattr(noise, "_ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match="rejected 1 times"):
        discrete_gaussian(KEY, 0, 4, CIFAR, 0.12, bits=12)


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 2**32 - 40),
    length=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    shape=st.sampled_from([(1,), (3, 5, 5), (3, 8, 8)]),
)
def test_rows_are_the_same_however_the_range_is_cut(
    start: int, length: int, cuts: list[int], shape: tuple[int, ...]
) -> None:
    """A row is a function of its index: any partition of a range yields the same rows."""
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    parts = [
        discrete_gaussian(KEY, start + low, start + high, shape, 0.25)
        for low, high in pairwise(edges)
    ]
    whole = discrete_gaussian(KEY, start, start + length, shape, 0.25)
    assert whole.shape == (length, *shape)
    assert whole.dtype == torch.int16
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("tile_blocks", [1, 7, 500])
def test_tiles_leave_no_trace(tile_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many blocks are computed at a time, part of a row or many rows, changes nothing."""
    whole = discrete_gaussian(KEY, 3, 12, (3, 5, 7), 0.25, bits=16)
    monkeypatch.setattr(noise, "_TILE_BLOCKS", tile_blocks)
    assert torch.equal(discrete_gaussian(KEY, 3, 12, (3, 5, 7), 0.25, bits=16), whole)


@pytest.mark.parametrize("start", [2**31 - 1, 2**32 - 2])
def test_far_rows_are_rows_like_any_other(start: int) -> None:
    """Around 2^31 and at the last index the rows differ from each other and from the first two."""
    far = discrete_gaussian(KEY, start, start + 2, CIFAR, 0.25)
    near = discrete_gaussian(KEY, 0, 2, CIFAR, 0.25)
    assert len({row.numpy().tobytes() for row in (*far, *near)}) == 4
    assert far.double().std().item() == pytest.approx(63.75, rel=0.05)


def test_large_images_have_rows() -> None:
    """A row of 3x1024x1024 is drawn in full, each quarter of it with the right spread."""
    row = discrete_gaussian(KEY, 0, 1, (3, 1024, 1024), 0.25).view(4, -1).double()
    assert row.std(dim=1).tolist() == pytest.approx([63.75] * 4, rel=0.01)


def test_no_row_is_used_twice() -> None:
    """A hundred thousand rows are pairwise distinct: every one is fresh noise (method.md 2)."""
    rows = discrete_gaussian(KEY, 0, 100_000, (3, 8, 8), 0.25).numpy()
    assert len({row.tobytes() for row in rows}) == 100_000


def test_noise_is_uncorrelated() -> None:
    """Products across keys, rows, pixels, channels and lags vanish within 5 standard errors."""
    count = 300
    drawn = discrete_gaussian(KEY, 0, count, CIFAR, 0.25).double() / 63.75
    other_key = discrete_gaussian(bytes([1, *KEY[1:]]), 0, count, CIFAR, 0.25).double() / 63.75
    other_end = discrete_gaussian(KEY[:31] + b"\0", 0, count, CIFAR, 0.25).double() / 63.75
    flat = drawn.view(count, -1)
    pairs = [
        (drawn, other_key),
        (drawn, other_end),
        (drawn[:-1], drawn[1:]),
        (drawn[..., :-1], drawn[..., 1:]),
        (drawn[..., :-1, :], drawn[..., 1:, :]),
        (drawn[:, :-1], drawn[:, 1:]),
        *((flat[:, :-lag], flat[:, lag:]) for lag in (2, 3, 4, 5, 8)),
    ]
    for left, right in pairs:
        assert abs((left * right).sum().item()) < 5 * math.sqrt(left.numel())
        squares = (left**2 - 1) * (right**2 - 1)
        assert abs(squares.sum().item()) < 5 * 2 * math.sqrt(left.numel())


@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.25, 1.0, 4.0])
def test_thresholds_are_exact(sigma: float) -> None:
    """Each sliver is the cell of 2^63 F(i) at 60 digits, and int16 holds all that lies between."""
    boundaries = slivers(sigma)
    half = len(boundaries) // 2
    with mpmath.workdps(60):
        for index in [*range(0, len(boundaries), max(1, len(boundaries) // 150)), half - 1, half]:
            cut = 2**63 * (1 - upper_tail(index - half, sigma))
            assert boundaries[index] == int(mpmath.floor(cut))
    assert (boundaries[0], boundaries[-1]) == (0, 2**63 - 1)
    assert list(boundaries) == sorted(boundaries)
    assert half < 2**15


def test_threads_that_need_a_new_sigma_compute_its_thresholds_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four threads that draw with one new sigma together compute its slivers once."""
    together = threading.Barrier(2)
    computed: list[float] = []

    def watched(sigma: float, bits: int) -> tuple[int, ...]:
        computed.append(sigma)
        with suppress(threading.BrokenBarrierError):
            together.wait(0.5)  # A second thread would come here meanwhile.
        return slivers(sigma, bits)

    monkeypatch.setattr(noise, "slivers", watched)
    with ThreadPoolExecutor(4) as threads:
        drawing = [threads.submit(discrete_gaussian, KEY, 0, 2, CIFAR, 0.123456) for _ in range(4)]
        rows = [each.result() for each in drawing]
    assert computed == [0.123456]
    assert all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize(("sigma", "bits"), [(0.02, 8), (0.05, 9), (0.12, 10), (0.12, 12)])
def test_total_variation_bounds_the_true_distance(sigma: float, bits: int) -> None:
    """For one pixel of short words the bound is not below the distance summed value by value."""
    counts = drawn_counts(sigma, bits)
    accepted = sum(counts.values())
    with mpmath.workdps(60):
        inside = mpmath.mpf(0)
        distance = mpmath.mpf(0)
        for value, count in counts.items():
            exact = upper_tail(value - 1, sigma) - upper_tail(value, sigma)
            inside += exact
            distance += abs(exact - mpmath.mpf(count) / accepted)
        distance = (distance + 1 - inside) / 2
    assert 0 < distance <= total_variation(sigma, (1,), bits=bits) < 1


def test_total_variation_is_a_price_nobody_feels() -> None:
    """At full length the bound is the share of slivers, tiny, and it grows with the pixels."""
    bound = total_variation(0.25, CIFAR)
    assert 0 < bound < 1e-11
    assert Fraction(bound) >= Fraction(3072 * len(set(slivers(0.25))), 2**63)
    sides = [total_variation(0.25, (3, side, side)) for side in (1, 2, 32, 224, 1024)]
    assert sides == sorted(set(sides))
    assert total_variation(0.12, (3, 224, 224), bits=12) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": bytes(31)}, "key has 31 bytes; it must have 32"),
        ({"key": bytes(33)}, "key has 33 bytes"),
        ({"start": -1}, "rows -1 to 2"),
        ({"start": 3}, "rows 3 to 2"),
        ({"start": 2**32 - 1, "stop": 2**32 + 1}, "4294967296"),
        ({"shape": (3, 0, 4)}, "shape is"),
        ({"shape": (3, -1, -4)}, "shape is"),
        ({"shape": (3, 5000, 5000)}, "67108864"),
        ({"sigma": 0.019}, r"sigma is 0\.019; it must be between 0\.02 and 4\.0"),
        ({"sigma": 4.01}, "sigma is"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"bits": 7}, "bits is 7"),
        ({"bits": 64}, "bits is 64; it must be between 8 and 63"),
        ({"sigma": 4.0, "bits": 12}, "too few"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, object], message: str) -> None:
    """A bad argument is a ValueError that names the field, its value and the limit."""
    arguments = {"key": KEY, "start": 0, "stop": 2, "shape": (3, 4, 4), "sigma": 0.25, **changes}
    with pytest.raises(ValueError, match=message):
        discrete_gaussian(**arguments)  # type: ignore[arg-type]


def test_every_byte_of_a_key_counts() -> None:
    """Another byte anywhere in the key is other noise."""
    keys = [bytes(byte ^ (index == place) for place, byte in enumerate(KEY)) for index in range(33)]
    drawn = {discrete_gaussian(key, 0, 2, (3, 4, 4), 0.25).numpy().tobytes() for key in keys}
    assert len(drawn) == 33


def test_an_empty_range_has_no_rows() -> None:
    """Nothing asked is nothing drawn, in the shape of rows."""
    assert discrete_gaussian(KEY, 5, 5, CIFAR, 0.25).shape == (0, *CIFAR)


def test_the_noise_never_changes_silently() -> None:
    """Rows of a fixed key keep the hash that `integer_draw` gave when the format was made."""
    digest = hashlib.sha256()
    for sigma in (0.12, 0.25, 1.0):
        rows = discrete_gaussian(KEY, 10**9, 10**9 + 20, CIFAR, sigma)
        digest.update(rows.numpy().astype("<i2").tobytes())
    assert digest.hexdigest()[:16] == "f5d9ff6644288fe1"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_has_the_same_noise() -> None:
    """Rows for a GPU lie there, and are those of the CPU."""
    on_gpu = discrete_gaussian(KEY, 7, 207, CIFAR, 0.25, "cuda")
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), discrete_gaussian(KEY, 7, 207, CIFAR, 0.25))


@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.25, 0.5, 1.0, 4.0])
def test_the_answers_bound_covers_the_noise(sigma: float) -> None:
    """The torch-free bound that certificates subtract is never under the noise's own."""
    shape = (3, 32, 32)
    assert total_variation(sigma, shape) <= answers.total_variation(shape, sigma)
