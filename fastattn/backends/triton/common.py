"""What the attention kernels share: operands, the mask rule, ranges of tiles, dropout, products.

Shapes in comments: BLOCK_M query rows, BLOCK_N keys. Positions within a head are int32 (L and S stay below 2**31);
every offset into memory is int64. A mask part that is absent is None, and None is a compile-time constant, so that a
kernel is compiled for the parts that are there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.masks import UNLIMITED, KernelMask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
WORD = tl.constexpr(64)


class MaskOperands(NamedTuple):
    """The parts of a mask as the kernels read them, `MaskParams` of csrc/core/params.h. Strides count elements."""

    band_low: Any = None  # band_low <= j - i <= band_high, clipped to what the lengths allow
    band_high: Any = None
    prefix_lengths: Any = None
    stride_prefix: Any = 0
    key_lengths: Any = None
    stride_lengths: Any = 0
    key_keep: Any = None  # uint8
    stride_keep: Any = (0, 0)  # (b, j)
    query_segments: Any = None
    key_segments: Any = None
    stride_qseg: Any = (0, 0)  # (b, i)
    stride_kseg: Any = (0, 0)  # (b, j)
    bits: Any = None
    stride_bits: Any = (0, 0, 0)  # (b, h, i)
    end: Any = None  # see below


# Triton 3.6 sees the constants in the tuples of a tuple once the outer one gets a constant of its own behind them:
# without, a stride of 1, which is a constant, is None in a loop. Hence `end` in every tuple that has tuples.


class TileOperands(NamedTuple):
    """Compact lists of the live tiles of each row (or column) of tiles; all None where arithmetic gives the ranges.

    `index` [Bt, Ht, own, other]: full tiles in ascending order from the front, partial ones in ascending order from the
    back. `counts` [Bt, Ht, own, 2]: how many full and partial ones. `key_live` uint8 [Bt, Ht, S]: keys that some query
    may attend to. Strides count rows of tiles, and keys.
    """

    index: Any = None
    counts: Any = None
    stride_b: Any = 0
    stride_h: Any = 0
    num_other: Any = 0
    key_live: Any = None
    stride_live: Any = (0, 0)  # (b, h)
    end: Any = None


# Host ----------------------------------------------------------------------------------------------------------------


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides with 0 in dimensions of size 1, which repeat over the problem's size."""
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def rows_of(tensor: Tensor | None) -> tuple[int, int, int]:
    """Strides (b, h, row) of a tensor whose last dimension is contiguous."""
    return (0, 0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1), tensor.stride(2))


def _batched(tensor: Tensor) -> tuple[int, int]:
    """Strides of (B|1, N): only the batch repeats."""
    return (tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1))


def mask_operands(mask: KernelMask | None, len_q: int, len_k: int) -> MaskOperands:
    """The mask as kernel operands. Band limits are clipped to [-L, S], which decides every pair as before."""
    if mask is None:
        return MaskOperands()
    parts: dict[str, Any] = {}
    if mask.band is not None:
        left_top, right_top, left_bottom, right_bottom = mask.band
        low, high = -left_top, right_top
        if left_bottom < UNLIMITED:
            low = max(low, len_k - len_q - left_bottom)
        if right_bottom < UNLIMITED:
            high = min(high, len_k - len_q + right_bottom)
        parts.update(band_low=min(max(low, -len_q), len_k), band_high=min(max(high, -len_q), len_k))
    if mask.prefix_lengths is not None:
        parts.update(prefix_lengths=mask.prefix_lengths, stride_prefix=strides_of(mask.prefix_lengths)[0])
    if mask.key_lengths is not None:
        parts.update(key_lengths=mask.key_lengths, stride_lengths=strides_of(mask.key_lengths)[0])
    if mask.key_keep is not None:
        parts.update(key_keep=mask.key_keep.view(torch.uint8), stride_keep=_batched(mask.key_keep))
    if mask.query_segments is not None and mask.key_segments is not None:
        parts.update(query_segments=mask.query_segments, stride_qseg=_batched(mask.query_segments))
        parts.update(key_segments=mask.key_segments, stride_kseg=_batched(mask.key_segments))
    if mask.tile_map is not None:
        bits = mask.tile_map.bits
        assert bits is not None
        parts.update(bits=bits, stride_bits=leading_strides(bits))
    return MaskOperands(**parts)


def leading_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides (b, h, row) of contiguous (Bm, Hm, rows, words), 0 where the batch or the head repeats."""
    batch, heads, rows, words = tensor.shape
    return (heads * rows * words if batch > 1 else 0, rows * words if heads > 1 else 0, words)


def is_listed(mask: KernelMask | None) -> bool:
    """Whether the live tiles have to be listed, because no arithmetic on the tile's position gives them."""
    return mask is not None and not (mask.key_keep is None and mask.query_segments is None and mask.tile_map is None)


def block_dim(head_dim: int) -> int:
    """The head dim as a tile holds it: a power of two, at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are made: in full, unless torch's own switch allows tf32."""
    # `fp32_precision` follows the older switches too; those raise once a program has set the newer one.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dropout_limit(dropout_p: float) -> int:
    """An element is dropped when its random word is at most this; -1 drops none (p is 0, or below 2**-32)."""
    return min(int(dropout_p * 2**32), 2**32) - 1


def dropout_factors(dropout_p: float) -> tuple[float, float]:
    """1 / (1 - p) as two factors: for a probability before it is rounded to the dtype of the problem, and for the sums.

    The first is all of it as far as float16 can hold the product: a small probability that is scaled only after it was
    rounded has lost 1 / (1 - p) times what the dtype allows, or has become 0.
    """
    scale = 1 / (1 - dropout_p)
    first = min(scale, 2.0**15)
    return first, scale / first


# Mask ----------------------------------------------------------------------------------------------------------------


@triton.jit
def load_length(lengths_ptr, stride, b, limit):
    # Lengths come from the user as int64: clamped before they are narrowed.
    return tl.minimum(tl.maximum(tl.load(lengths_ptr + b * stride), 0), limit).to(tl.int32)


@triton.jit
def may_attend(mask, b, h, rows, cols, n0, len_q, len_k, BLOCK_N: tl.constexpr):
    """The mask rule: may query i of (b, h) attend to key j. False outside the problem.

    rows and cols hold positions and broadcast together: [BLOCK_M, 1] and [1, BLOCK_N], or transposed. n0 is the first
    of cols, a multiple of BLOCK_N.
    """
    keep = (rows < len_q) & (cols < len_k)
    if mask.band_low is not None:
        keep &= (cols - rows >= mask.band_low) & (cols - rows <= mask.band_high)
    if mask.prefix_lengths is not None:
        keep &= (cols <= rows) | (cols < load_length(mask.prefix_lengths, mask.stride_prefix, b, len_k))
    if mask.key_lengths is not None:
        keep &= cols < load_length(mask.key_lengths, mask.stride_lengths, b, len_k)
    if mask.key_keep is not None:
        kept_ptr = mask.key_keep + b * mask.stride_keep[0] + cols.to(tl.int64) * mask.stride_keep[1]
        keep &= tl.load(kept_ptr, mask=cols < len_k, other=0) != 0
    if mask.query_segments is not None:
        q_ptr = mask.query_segments + b * mask.stride_qseg[0] + rows.to(tl.int64) * mask.stride_qseg[1]
        k_ptr = mask.key_segments + b * mask.stride_kseg[0] + cols.to(tl.int64) * mask.stride_kseg[1]
        keep &= tl.load(q_ptr, mask=rows < len_q, other=0) == tl.load(k_ptr, mask=cols < len_k, other=0)
    if mask.bits is not None:
        # One word of 64 keys a row is loaded and broadcast; a load for each element would cost more than the product.
        row_ptr = mask.bits + b * mask.stride_bits[0] + h * mask.stride_bits[1]
        row_ptr += rows.to(tl.int64) * mask.stride_bits[2]
        for g in tl.static_range((BLOCK_N + 63) // 64):
            number = n0 // WORD + g
            word = tl.load(row_ptr + number, mask=(rows < len_q) & (number < mask.stride_bits[2]), other=0)
            bit = (word >> (cols % WORD)) & 1
            if BLOCK_N > 64:
                keep &= (bit != 0) | (cols // WORD != number)
            else:
                keep &= bit != 0
    return keep


@triton.jit
def attended_keys(mask, tiles, b, h, cols, len_q, len_k):
    """Which keys any query of (b, h) may attend to: the others are never loaded, so that NaN in them stays outside."""
    live = cols < len_k
    if tiles.key_live is not None:
        live_ptr = tiles.key_live + b * tiles.stride_live[0] + h * tiles.stride_live[1] + cols
        live &= tl.load(live_ptr, mask=live, other=0) != 0
    else:
        first = cols * 0  # the first and the last query that the band and the prefix leave to the key
        last = first + (len_q - 1)
        if mask.band_low is not None:
            first = tl.maximum(first, cols - mask.band_high)
            last = tl.minimum(last, cols - mask.band_low)
        if mask.prefix_lengths is not None:
            prefix = load_length(mask.prefix_lengths, mask.stride_prefix, b, len_k)
            first = tl.where(cols < prefix, first, tl.maximum(first, cols))
        live &= first <= last
        if mask.key_lengths is not None:
            live &= cols < load_length(mask.key_lengths, mask.stride_lengths, b, len_k)
        if mask.key_keep is not None:
            kept_ptr = mask.key_keep + b * mask.stride_keep[0] + cols.to(tl.int64) * mask.stride_keep[1]
            live &= tl.load(kept_ptr, mask=live, other=0) != 0
    return live


@triton.jit
def key_tile_range(mask, b, m0, len_q, len_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys for the queries [m0, m0 + BLOCK_M), by arithmetic: live ones are [first, last), and of these
    [full_first, full_last) need no mask."""
    m_last = tl.minimum(m0 + BLOCK_M, len_q) - 1
    first = m0 * 0  # keys of the first row, of the last row, ...
    last = first + len_k
    full_first = first
    full_last = last
    if mask.band_low is not None:
        first = tl.maximum(first, m0 + mask.band_low)
        last = tl.minimum(last, m_last + mask.band_high + 1)
        full_first = tl.maximum(full_first, m_last + mask.band_low)
        full_last = tl.minimum(full_last, m0 + mask.band_high + 1)
    if mask.prefix_lengths is not None:
        prefix = load_length(mask.prefix_lengths, mask.stride_prefix, b, len_k)
        last = tl.minimum(last, tl.maximum(m_last + 1, prefix))
        full_last = tl.minimum(full_last, tl.maximum(m0 + 1, prefix))
    if mask.key_lengths is not None:
        length = load_length(mask.key_lengths, mask.stride_lengths, b, len_k)
        last = tl.minimum(last, length)
        full_last = tl.minimum(full_last, length)
    return _tiles_of(first, full_first, full_last, last, BLOCK_N)


@triton.jit
def query_tile_range(mask, b, n0, len_q, len_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of queries for the keys [n0, n0 + BLOCK_N): as `key_tile_range`. Rows beyond the last count as full: their
    lse is read as +inf, which makes their probabilities 0."""
    padded_q = tl.cdiv(len_q, BLOCK_M) * BLOCK_M
    n_last = tl.minimum(n0 + BLOCK_N, len_k) - 1
    first = n0 * 0
    last = first + len_q
    full_first = first
    full_last = first + padded_q
    if mask.band_low is not None:
        first = tl.maximum(first, n0 - mask.band_high)
        last = tl.minimum(last, n_last - mask.band_low + 1)
        full_first = tl.maximum(full_first, n_last - mask.band_high)
        full_bottom = n0 - mask.band_low + 1
        full_last = tl.where(full_bottom >= len_q, full_last, full_bottom)
    if mask.prefix_lengths is not None:
        prefix = load_length(mask.prefix_lengths, mask.stride_prefix, b, len_k)
        first = tl.where(n0 < prefix, first, tl.maximum(first, n0))
        full_first = tl.where(n_last < prefix, full_first, tl.maximum(full_first, n_last))
    if mask.key_lengths is not None:
        length = load_length(mask.key_lengths, mask.stride_lengths, b, len_k)
        last = tl.where(n0 < length, last, 0)
        full_last = tl.where(n_last < length, full_last, 0)
    full_last = tl.where(n0 + BLOCK_N <= len_k, full_last, 0)  # the tile that runs over the last key needs its mask
    return _tiles_of(first, full_first, full_last, last, BLOCK_M)


@triton.jit
def _tiles_of(first, full_first, full_last, last, BLOCK: tl.constexpr):
    # Limits may lie before 0 (a negative full_last): clamped first, since / rounds towards zero.
    first_tile = tl.maximum(first, 0) // BLOCK
    last_tile = tl.maximum(tl.cdiv(tl.maximum(last, 0), BLOCK), first_tile)
    full_first_tile = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_first, 0), BLOCK), first_tile), last_tile)
    full_last_tile = tl.minimum(tl.maximum(tl.maximum(full_last, 0) // BLOCK, full_first_tile), last_tile)
    return first_tile, full_first_tile, full_last_tile, last_tile


@triton.jit
def tile_plan(
    mask, tiles, b, h, own, len_q, len_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The walk along tile `own` of queries (TRANSPOSED: of keys): (number of full tiles, number of partial tiles,
    first full tile, first tile, pointer to the list). `full_tile` and `partial_tile` tell the k-th of each."""
    if tiles.index is not None:
        row = b * tiles.stride_b + h * tiles.stride_h + own
        num_full = tl.load(tiles.counts + row * 2)
        num_partial = tl.load(tiles.counts + row * 2 + 1)
        return num_full, num_partial, num_full, num_partial, tiles.index + row * tiles.num_other
    else:
        if TRANSPOSED:
            first, full_first, full_last, last = query_tile_range(
                mask, b, own * BLOCK_N, len_q, len_k, BLOCK_M, BLOCK_N
            )
        else:
            first, full_first, full_last, last = key_tile_range(mask, b, own * BLOCK_M, len_q, len_k, BLOCK_M, BLOCK_N)
        num_full = full_last - full_first
        return num_full, last - first - num_full, full_first, first, own


@triton.jit
def full_tile(k, plan, tiles):
    """The k-th tile without mask."""
    num_full, num_partial, full_first, first, list_ptr = plan
    if tiles.index is not None:
        return tl.load(list_ptr + k)
    else:
        return full_first + k


@triton.jit
def partial_tile(k, plan, tiles):
    """The k-th tile with a mask: those before the full ones, then those behind them."""
    num_full, num_partial, full_first, first, list_ptr = plan
    if tiles.index is not None:
        return tl.load(list_ptr + (tiles.num_other - 1 - k))
    else:
        tile = first + k
        return tl.where(tile < full_first, tile, tile + num_full)


# Dropout -------------------------------------------------------------------------------------------------------------


@triton.jit
def dropout_keep(seed, limit, b, h, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of the tile at (m0, n0) survive, [BLOCK_M, BLOCK_N]: the rule of csrc/core/philox.h."""
    return dropout_keep_rows(seed, limit, b, h, (m0 + tl.arange(0, BLOCK_M))[:, None], n0, BLOCK_M, BLOCK_N)


@triton.jit
def dropout_keep_rows(seed, limit, b, h, rows, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for any queries: rows [BLOCK_M, 1], and h a number or [BLOCK_M, 1].

    One block of Philox gives the words of four neighbouring keys, so a quarter of the tile is drawn.
    """
    group = (n0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zero = rows * 0 + group * 0  # [BLOCK_M, BLOCK_N / 4]
    w0, w1, w2, w3 = tl.philox(seed, zero + group, zero + rows, zero + h.to(tl.int32), zero + b.to(tl.int32))
    last_dropped = limit.to(tl.uint32)
    even = tl.join((w0 > last_dropped).to(tl.int8), (w2 > last_dropped).to(tl.int8))
    odd = tl.join((w1 > last_dropped).to(tl.int8), (w3 > last_dropped).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N)) != 0


# Products and loads --------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(ptr, stride, rows, valid, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of one head, [rows, BLOCK_DIM]: 0 where `valid` is false and beyond DIM. Not MASKED: every row is valid."""
    dims = tl.arange(0, BLOCK_DIM)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if MASKED:
        if DIM == BLOCK_DIM:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0)
    else:
        if DIM == BLOCK_DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride, rows, valid, x, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dims = tl.arange(0, BLOCK_DIM)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=valid[:, None] & (dims < DIM)[None, :])


@triton.jit
def load_bias(bias_ptr, stride, b, h, rows, cols, len_q, len_k):
    """A tile of the bias; rows and cols broadcast together."""
    pointers = bias_ptr + b * stride[0] + h * stride[1] + rows.to(tl.int64) * stride[2] + cols.to(tl.int64) * stride[3]
    return tl.load(pointers, mask=(rows < len_q) & (cols < len_k), other=0.0).to(tl.float32)


@triton.jit
def shift_of(lse):
    """The shift for e^(score - shift) = probability, from lse: an empty row (-inf) has no probability."""
    return tl.where(lse == NEG_INF, POS_INF, lse)


@triton.jit
def probability(s, shift):
    """e^(s - shift). The difference is taken first: where one key takes all of a row, lse is its score, and the
    probability is exactly 1 however large the score is."""
    return tl.math.exp2((s - shift) * LOG2E)
