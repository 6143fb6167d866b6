"""models/noise.py: the generator, the law of the noise, its independence and its error bound."""

from __future__ import annotations

import hashlib
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
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import chisquare

from models import noise
from models.noise import discrete_gaussian, philox4x32, slivers, total_variation
from service.predictions import results as answers

KEY = bytes(range(16))
CIFAR = (3, 32, 32)
WORD = 0xFFFFFFFF


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's own threads would only contend in tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def integer_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. state it, on Python's unbounded integers."""
    for turn in range(10):
        key0, key1 = key[0] + turn * 0x9E3779B9 & WORD, key[1] + turn * 0xBB67AE85 & WORD
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key0,
            second & WORD,
            first >> 32 ^ counter[3] ^ key1,
            first & WORD,
        ]
    return counter


def integer_draw(key: bytes, row: int, pixel: int, sigma: float, bits: int) -> tuple[int, int]:
    """One pixel's value and its number of redraws, from the documented counter and by bisection."""
    key0, key1, word2, word3 = (int.from_bytes(key[i : i + 4], "little") for i in range(0, 16, 4))
    boundaries = slivers(sigma, bits)
    for attempt in range(128):
        high, low = (
            integer_philox(
                [row, attempt << 25 | half << 24 | pixel // 4, word2, word3], [key0, key1]
            )[pixel % 4]
            for half in (0, 1)
        )
        word = (high << 32 | low) >> (64 - bits)
        position = bisect_left(boundaries, word)
        if boundaries[position] != word:
            return position - len(boundaries) // 2, attempt
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


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    """The generator answers Random123's kat_vectors for philox4x32 with 10 rounds."""
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    key0, key1 = (int(word, 16) for word in key.split())
    drawn = philox4x32((words[0], words[1], words[2], words[3]), (key0, key1))
    assert [f"{int(word):08x}" for word in drawn] == answer.split()
    integers = integer_philox([int(word) for word in words], [key0, key1])
    assert [f"{word:08x}" for word in integers] == answer.split()


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
    assert sum(integer_draw(KEY, 0, pixel, 0.12, 12)[1] > 0 for pixel in range(300)) > 0
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
    monkeypatch.setattr(noise, "_CPU_TILE_BLOCKS", tile_blocks)
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
    other_counter = discrete_gaussian(KEY[:15] + b"\0", 0, count, CIFAR, 0.25).double() / 63.75
    flat = drawn.view(count, -1)
    pairs = [
        (drawn, other_key),
        (drawn, other_counter),
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
        ({"key": bytes(15)}, "key has 15 bytes"),
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


def test_only_the_first_sixteen_bytes_of_a_key_count() -> None:
    """A longer key draws as its first 16 bytes do, each of which changes the noise."""
    whole = discrete_gaussian(KEY, 0, 2, (3, 4, 4), 0.25)
    assert torch.equal(discrete_gaussian(KEY + b"tail", 0, 2, (3, 4, 4), 0.25), whole)
    for index in range(16):
        other = bytes(byte ^ (index == place) for place, byte in enumerate(KEY))
        assert not torch.equal(discrete_gaussian(other, 0, 2, (3, 4, 4), 0.25), whole)


def test_an_empty_range_has_no_rows() -> None:
    """Nothing asked is nothing drawn, in the shape of rows."""
    assert discrete_gaussian(KEY, 5, 5, CIFAR, 0.25).shape == (0, *CIFAR)


def test_the_noise_never_changes_silently() -> None:
    """Rows of a fixed key keep the hash that `integer_draw` gave when the format was made."""
    digest = hashlib.sha256()
    for sigma in (0.12, 0.25, 1.0):
        rows = discrete_gaussian(KEY, 10**9, 10**9 + 20, CIFAR, sigma)
        digest.update(rows.numpy().astype("<i2").tobytes())
    assert digest.hexdigest()[:16] == "57d41f1eb6bdd2c1"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("sigma", "bits"), [(0.12, 12), (0.25, 63), (1.0, 63), (4.0, 63)])
def test_the_gpu_draws_the_same_noise(sigma: float, bits: int) -> None:
    """CPU and GPU agree on every value, redraws and far rows included."""
    start = 2**32 - 200
    on_gpu = discrete_gaussian(KEY, start, 2**32, CIFAR, sigma, "cuda", bits=bits)
    assert torch.equal(on_gpu.cpu(), discrete_gaussian(KEY, start, 2**32, CIFAR, sigma, bits=bits))


@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.25, 0.5, 1.0, 4.0])
def test_the_answers_bound_covers_the_noise(sigma: float) -> None:
    """The torch-free bound that certificates subtract is never under the noise's own."""
    shape = (3, 32, 32)
    assert total_variation(sigma, shape) <= answers.total_variation(shape, sigma)
