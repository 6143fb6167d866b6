"""Rows of exact discrete Gaussian noise as a pure function of (key, row index).

A pixel's noise is i/255 with P(i) = F(i) - F(i-1), F(i) = Phi((2i+1) / (510 sigma)). That is N(0,
sigma^2) rounded to the 1/255 grid, on an image of that grid (Voracek and Hein, ICLR 2023; method.md
3). Integers alone decide a draw, so CPU and GPU agree to the bit.

Counter of a Philox4x32-10 block, whose four words serve four neighboring pixels of a row:

    word 0      row index
    word 1      attempt << 25 | half << 24 | block     block = pixel // 4, lane = pixel % 4
    words 2, 3  bytes 8 to 15 of the key               (bytes 0 to 7 are Philox's own key)

Half 0 holds the high 32 bits of a pixel's random word and half 1 the low 32. The low half is
computed only where the high half leaves the draw open.
"""

from __future__ import annotations

import math
import struct
import threading
from functools import lru_cache
from typing import NamedTuple

import mpmath  # type: ignore[import-untyped]
import torch
from torch import Tensor

RANDOM_BITS = 63
"""Random bits behind one draw, the most that a signed 64-bit word holds."""

MAX_ROWS = 1 << 32
"""Rows of one key."""

MAX_PIXELS = 1 << 26
"""Values (channels x height x width) of one row."""

SIGMA_RANGE = (0.02, 4.0)
"""Smallest and largest sigma, in [0,1] pixel units; int16 holds every value drawn up to there."""

_MIN_BITS = 8
_MIN_KEY_BYTES = 16
_DECIMAL_DIGITS = 50
_TABLE_BITS = 16
_OPEN = -(1 << 15)  # a table entry whose cell of random words does not settle the value
_ATTEMPTS = 128  # at most half of the words are rejected, so a pixel fails with chance <= 2^-128
_HALF_SHIFT = 24
_ATTEMPT_SHIFT = 25
_CPU_TILE_BLOCKS = 1 << 16  # larger ones leave the cache, smaller ones pay for each torch call
_GPU_TILE_BLOCKS = 1 << 21

_U32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_computing = threading.Lock()

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of a counter and a key (Salmon et al., SC 2011), both unsigned 32-bit words.

    The counter is four int64 tensors that broadcast against each other, word 0 first; the result is
    four int64 tensors of values below 2^32, of the common shape.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], word0)
        high1, low1 = _multiply(_MULTIPLIERS[1], word2)
        word0, word1 = (high1 ^ word1 ^ key0) & _U32, low1
        word2, word3 = (high0 ^ word3 ^ key1) & _U32, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _U32, (key1 + _KEY_STEPS[1]) & _U32
    return word0, word1, word2, word3


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Upper half (its lowest 32 bits count) and lower half of a 32 x 32 bit product.

    (multiplier - 2^32) x word stays within 63 bits where the product itself would overflow int64.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _U32


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

    A row depends only on the key's first 16 bytes, its index, sigma, bits, and the row-major
    position of its pixels. sigma is in [0,1] pixel units, taken as the exact double. `bits` is the
    number of random bits behind a draw. Each row lies within `total_variation` of the law in
    method.md 3.

    Raises ValueError for a key below 16 bytes, a range outside [0, 2^32], a shape with an empty
    dimension or more than 2^26 values, a sigma outside `SIGMA_RANGE`, or bits outside [8, 63].
    """
    if len(key) < _MIN_KEY_BYTES:
        raise ValueError(f"key has {len(key)} bytes; at least {_MIN_KEY_BYTES} are needed")
    if not 0 <= start <= stop <= MAX_ROWS:
        raise ValueError(f"rows {start} to {stop} do not lie in order between 0 and {MAX_ROWS}")
    pixels = _count_pixels(shape)
    noise = torch.empty((stop - start, pixels), dtype=torch.int16, device=device)
    source = _Source(struct.unpack("<4I", key[:16]), _table(float(sigma), bits, noise.device))
    _fill(noise, source, start)
    return noise.view(stop - start, *shape)


class _Table(NamedTuple):
    """Draws of one sigma on one device."""

    slivers: Tensor
    """`slivers`, int64."""

    values: Tensor
    """Value by the top bits of the random word, int16, or `_OPEN` where they do not settle it."""

    bits: int
    """Length of the random word."""


class _Source(NamedTuple):
    """All that the noise of one row and pixel depends on."""

    key: tuple[int, ...]
    table: _Table


def _table(sigma: float, bits: int, device: torch.device) -> _Table:
    """The table of one sigma, computed once even if several threads request it together."""
    with _computing:
        return _computed_table(sigma, bits, device)


@lru_cache(maxsize=128)
def _computed_table(sigma: float, bits: int, device: torch.device) -> _Table:
    boundaries = torch.tensor(slivers(sigma, bits), dtype=torch.int64)
    table_bits = min(bits, _TABLE_BITS)
    first = torch.arange(1 << table_bits) << (bits - table_bits)
    last = first + ((1 << (bits - table_bits)) - 1)
    below = torch.searchsorted(boundaries, first)
    settled = below == torch.searchsorted(boundaries, last, right=True)
    values = torch.where(settled, below - len(boundaries) // 2, _OPEN).to(torch.int16)
    return _Table(boundaries.to(device), values.to(device), bits)


def _fill(noise: Tensor, source: _Source, start: int) -> None:
    """Write rows `start` and on, (rows, pixels) int16, in tiles that bound the memory."""
    blocks = -(-noise.shape[1] // 4)
    tile_size = _CPU_TILE_BLOCKS if noise.device.type == "cpu" else _GPU_TILE_BLOCKS
    tile_blocks = min(blocks, tile_size)
    tile_rows = tile_size // tile_blocks
    for top in range(0, noise.shape[0], tile_rows):
        rows = torch.arange(len(noise[top : top + tile_rows]), device=noise.device) + (start + top)
        for block in range(0, blocks, tile_blocks):
            tile = _tile(source, rows, block, min(block + tile_blocks, blocks))
            part = noise[top : top + tile_rows, 4 * block : 4 * (block + tile_blocks)]
            part.copy_(tile[:, : part.shape[1]])


def _tile(source: _Source, rows: Tensor, first: int, stop: int) -> Tensor:
    """Noise of some rows in blocks first to stop-1, (rows, 4 x blocks) int16."""
    blocks = torch.arange(first, stop, device=rows.device)
    values = source.table.values
    shift = 32 - (len(values).bit_length() - 1)
    high = torch.stack(_block(source, rows[:, None], blocks[None, :]), -1).view(len(rows), -1)
    tile = values.index_select(0, (high >> shift).view(-1)).view(high.shape)
    _settle(source, tile, high, rows, 4 * first)
    return tile


def _settle(source: _Source, tile: Tensor, high: Tensor, rows: Tensor, offset: int) -> None:
    """Draw the open pixels of a tile, whose columns begin at pixel `offset`, from whole words."""
    table = source.table
    row, column = (tile == _OPEN).nonzero(as_tuple=True)
    high = high[row, column]
    for attempt in range(_ATTEMPTS):
        if attempt:
            high = _half(source, rows[row], column + offset, 0, attempt)
        low = _half(source, rows[row], column + offset, 1, attempt)
        word = (high << 31 | low >> 1) >> (RANDOM_BITS - table.bits)
        position = torch.searchsorted(table.slivers, word)
        tile[row, column] = (position - len(table.slivers) // 2).to(torch.int16)
        rejected = table.slivers[position] == word
        row, column = row[rejected], column[rejected]
        if len(row) == 0:
            return
    raise RuntimeError(f"{len(row)} pixels were rejected {_ATTEMPTS} times: the noise is broken")


def _half(source: _Source, row: Tensor, pixel: Tensor, half: int, attempt: int) -> Tensor:
    """The high (0) or low (1) 32 bits of single pixels' random words, int64."""
    words = torch.stack(_block(source, row, pixel >> 2, half, attempt))
    return words.gather(0, (pixel & 3)[None])[0]


def _block(source: _Source, row: Tensor, block: Tensor, half: int = 0, attempt: int = 0) -> Words:
    word1 = block | half << _HALF_SHIFT | attempt << _ATTEMPT_SHIFT
    key0, key1, word2, word3 = source.key
    counter = (row, word1, torch.full_like(block, word2), torch.full_like(block, word3))
    return philox4x32(counter, (key0, key1))


def _count_pixels(shape: tuple[int, ...]) -> int:
    pixels = math.prod(shape)
    if min(shape, default=1) < 1 or pixels > MAX_PIXELS:
        raise ValueError(f"shape is {shape}; dimensions start at 1, values end at {MAX_PIXELS}")
    return pixels


def _check_between(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} is {value}; it must be between {low} and {high}")
