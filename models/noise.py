"""Rows of exact discrete Gaussian noise as a pure function of (key, row index).

A pixel's noise is i/255 with P(i) = F(i) - F(i-1), F(i) = Phi((2i+1) / (510 sigma)). That is N(0,
sigma^2) rounded to the 1/255 grid, on an image of that grid (Voracek and Hein, ICLR 2023; method.md
3). Integers alone decide a draw, and the host draws for every device, so CPU and GPU agree.

The random bits are blocks of AES-256-CTR under the key. The counter of a block is a big-endian
128-bit number, and no two addresses share one:

    bits 64 to 127      row index
    bits 40 to 63       attempt
    bits 32 to 39       half
    bits 0 to 31        pixel // 4

A block is four little-endian 32-bit words, one for each of four neighboring pixels of a row. Half 0
holds the high 32 bits of a pixel's random word and half 1 the low 32. Only where the top 16 bits
leave the draw open are the others computed.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import NamedTuple

import mpmath  # type: ignore[import-untyped]
import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
"""Bytes of a key, an AES-256 key."""

RANDOM_BITS = 63
"""Random bits behind one draw, the most that a signed 64-bit word holds."""

MAX_ROWS = 1 << 32
"""Rows of one key."""

MAX_PIXELS = 1 << 26
"""Values (channels x height x width) of one row."""

SIGMA_RANGE = (0.02, 4.0)
"""Smallest and largest sigma, in [0,1] pixel units; int16 holds every value drawn up to there."""

_MIN_BITS = 8
_DECIMAL_DIGITS = 50
_TABLE_BITS = 16
_OPEN = -(1 << 15)  # a table entry whose cell of random words does not settle the value
_ATTEMPTS = 128  # at most half of the words are rejected, so a pixel fails with chance <= 2^-128
_HALF_SHIFT = 32
_ATTEMPT_SHIFT = 40
_TILE_BLOCKS = 1 << 16  # larger ones leave the cache, smaller ones pay for each numpy call

_computing = threading.Lock()


@lru_cache(maxsize=8)  # Those of sigma 4.0 take 0.8 MB; the tables are cached, not these.
def slivers(sigma: float, bits: int = RANDOM_BITS) -> tuple[int, ...]:
    """Random words below 2^bits that straddle a threshold 2^bits F(i), one a threshold, ascending.

    Entry j belongs to i = j - len/2. A word strictly between entries j-1 and j draws j - len/2; a
    word equal to an entry is rejected. The first and last are 0 and 2^bits - 1 and stand for both
    cut tails. Raises ValueError for sigma or bits out of range, or if most of the words are
    slivers.
    """
    _check_between("sigma", sigma, *SIGMA_RANGE)
    _check_between("bits", bits, _MIN_BITS, RANDOM_BITS)
    context = mpmath.MPContext()  # mpmath's shared one would race between threads
    context.dps = _DECIMAL_DIGITS
    step = 1 / (510 * context.sqrt(2) * context.mpf(sigma))
    half = context.ldexp(1, bits - 1)
    upper = [int(context.floor(half * context.erfc(step)))]
    while upper[-1] > 0:
        upper.append(int(context.floor(half * context.erfc((2 * len(upper) + 1) * step))))
    last = (1 << bits) - 1
    words = (*reversed(upper), *(last - word for word in upper))
    if 2 * len(set(words)) > 1 << bits:
        raise ValueError(f"bits is {bits}, too few for sigma {sigma}: most draws would be redrawn")
    return words


def total_variation(sigma: float, shape: tuple[int, ...], *, bits: int = RANDOM_BITS) -> float:
    """Upper bound on the total variation between a row of this shape as drawn and the exact one.

    Uniform random bits are assumed. Let s be the share of words that are slivers and a_i the share
    that draws i. Those words' cells lie inside [F(i-1), F(i)], so a_i <= P(i), and the a_i sum to
    1 - s. Redrawing turns a_i into a_i / (1-s) >= a_i, hence the distance of one pixel, the sum of
    the positive parts of P(i) - a_i / (1-s), is at most the sum of P(i) - a_i, which is s. Values
    in the cut tails have a_i = 0 and are in that sum. The pixels of a row are independent, so their
    distances add. Rounding the result up covers the thresholds' own 50 digits.
    Raises ValueError as `discrete_gaussian` does.
    """
    rejected = len(set(slivers(float(sigma), bits)))
    bound = math.ldexp(_count_pixels(shape) * rejected, -bits)
    return min(1.0, math.nextafter(bound, math.inf))


def discrete_gaussian(
    key: bytes,
    start: int,
    stop: int,
    shape: tuple[int, ...],
    sigma: float,
    device: torch.device | str = "cpu",
    *,
    bits: int = RANDOM_BITS,
) -> Tensor:
    """Rows start to stop-1 of the noise: (stop-start, *shape) int16 in units of 1/255.

    A row depends only on the key, its index, sigma, bits, and the row-major position of its
    pixels. sigma is in [0,1] pixel units, taken as the exact double. `bits` is the number of random
    bits behind a draw. Each row lies within `total_variation` of the law in method.md 3. The host
    draws, and the result is copied to `device`.

    Raises ValueError for a key that is not 32 bytes, a range outside [0, 2^32], a shape with an
    empty dimension or more than 2^26 values, a sigma outside `SIGMA_RANGE`, or bits outside
    [8, 63].
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"key has {len(key)} bytes; it must have {KEY_BYTES}")
    if not 0 <= start <= stop <= MAX_ROWS:
        raise ValueError(f"rows {start} to {stop} do not lie in order between 0 and {MAX_ROWS}")
    noise = np.empty((stop - start, _count_pixels(shape)), np.int16)
    # ECB of explicit counters is the CTR keystream, at addresses in any order.
    cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305
    _fill(noise, _Source(cipher, _table(float(sigma), bits)), start)
    return torch.from_numpy(noise).view(stop - start, *shape).to(device)


class _Table(NamedTuple):
    """Draws of one sigma."""

    slivers: NDArray[np.int64]
    """`slivers`."""

    values: NDArray[np.int16]
    """Value by the top 16 bits of the random word, or `_OPEN` where they do not settle it."""

    bits: int
    """Length of the random word."""


class _Source(NamedTuple):
    """All that the noise of one row and pixel depends on."""

    cipher: CipherContext
    table: _Table


def _table(sigma: float, bits: int) -> _Table:
    """The table of one sigma, computed once even if several threads request it together."""
    with _computing:
        return _computed_table(sigma, bits)


@lru_cache(maxsize=128)
def _computed_table(sigma: float, bits: int) -> _Table:
    boundaries = np.array(slivers(sigma, bits), np.int64)
    unused = RANDOM_BITS - _TABLE_BITS
    first = np.arange(1 << _TABLE_BITS) << unused
    last = first | ((1 << unused) - 1)
    below = np.searchsorted(boundaries, first >> (RANDOM_BITS - bits))
    through = np.searchsorted(boundaries, last >> (RANDOM_BITS - bits), side="right")
    values = np.where(below == through, below - len(boundaries) // 2, _OPEN).astype(np.int16)
    return _Table(boundaries, values, bits)


def _fill(noise: NDArray[np.int16], source: _Source, start: int) -> None:
    """Write rows `start` and on, (rows, pixels), in tiles that bound the memory."""
    blocks = -(-noise.shape[1] // 4)
    tile_blocks = min(blocks, _TILE_BLOCKS)
    tile_rows = _TILE_BLOCKS // tile_blocks
    for top in range(0, noise.shape[0], tile_rows):
        rows = np.arange(len(noise[top : top + tile_rows])) + (start + top)
        for block in range(0, blocks, tile_blocks):
            tile = _tile(source, rows, np.arange(block, min(block + tile_blocks, blocks)))
            part = noise[top : top + tile_rows, 4 * block : 4 * (block + tile_blocks)]
            part[:] = tile[:, : part.shape[1]]


def _tile(source: _Source, rows: NDArray[np.int64], blocks: NDArray[np.int64]) -> NDArray[np.int16]:
    """Noise of some rows in some neighboring blocks, (rows, 4 x blocks)."""
    top = _words(source.cipher, rows[:, None], blocks).view("<u2")[..., 1::2]
    tile = np.take(source.table.values, top).reshape(len(rows), -1)
    _settle(source, tile, rows, 4 * int(blocks[0]))
    return tile


def _settle(source: _Source, tile: NDArray[np.int16], rows: NDArray[np.int64], offset: int) -> None:
    """Draw the open pixels of a tile, whose columns begin at pixel `offset`, from whole words."""
    boundaries, _, bits = source.table
    # numpy's two-dimensional nonzero takes several times as long.
    row, column = np.divmod(np.flatnonzero(tile == _OPEN), tile.shape[1])
    attempt = 0
    while len(row):
        if attempt == _ATTEMPTS:
            raise RuntimeError(f"{len(row)} pixels were rejected {attempt} times: broken noise")
        word = _random_words(source.cipher, rows[row], column + offset, attempt)
        word >>= RANDOM_BITS - bits
        position = np.searchsorted(boundaries, word)
        tile[row, column] = position - len(boundaries) // 2
        rejected = boundaries[position] == word
        row, column = row[rejected], column[rejected]
        attempt += 1


def _random_words(
    cipher: CipherContext, row: NDArray[np.int64], pixel: NDArray[np.int64], attempt: int
) -> NDArray[np.int64]:
    """The 63-bit random words of single pixels, (pixels,)."""
    halves = np.arange(2)[:, None] << _HALF_SHIFT
    blocks = _words(cipher, row, attempt << _ATTEMPT_SHIFT | halves | pixel >> 2)
    high, low = blocks[:, np.arange(len(pixel)), pixel & 3].astype(np.int64)
    whole: NDArray[np.int64] = high << 31 | low >> 1
    return whole


def _words(
    cipher: CipherContext, row: NDArray[np.int64], address: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """The four words of each counter row x 2^64 + address, (..., 4); the arguments broadcast."""
    counters = np.empty((*np.broadcast_shapes(row.shape, address.shape), 2), ">u8")
    counters[..., 0] = row.astype(">u8")
    counters[..., 1] = address.astype(">u8")
    encrypted = np.empty(counters.nbytes + 15, np.uint8)  # update_into demands 15 bytes of room
    cipher.update_into(counters.view(np.uint8).data, encrypted.data)
    return encrypted[: counters.nbytes].view("<u4").reshape(*counters.shape[:-1], 4)


def _count_pixels(shape: tuple[int, ...]) -> int:
    pixels = math.prod(shape)
    if min(shape, default=1) < 1 or pixels > MAX_PIXELS:
        raise ValueError(f"shape is {shape}; dimensions start at 1, values end at {MAX_PIXELS}")
    return pixels


def _check_between(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} is {value}; it must be between {low} and {high}")
