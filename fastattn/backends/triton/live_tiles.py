"""Compact lists of live tiles, made on the device from the bitmaps of a dense mask, key padding and segments.

An `if live:` around the loads of a key loop would switch software pipelining off; a loop over a list of live tiles
keeps it. Two kernels: `live_tiles_kernel` classifies the tiles, `attended_keys_kernel` marks the keys that any query
may attend to (nothing else is loaded by the attention kernels, so NaN elsewhere is never seen).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.common import (
    MaskOperands,
    TileOperands,
    leading_strides,
    load_length,
    may_attend,
)
from fastattn.masks import KernelMask

_CHUNK = 32


class _MapOperands(NamedTuple):
    """The bitmaps of a dense mask, in tiles of block_m x block_n of their own."""

    live: Any = None
    full: Any = None
    stride: Any = (0, 0, 0)  # (b, h, tile of queries)
    block_m: Any = 1
    block_n: Any = 1
    end: Any = None


@triton.jit
def _classify(
    mask,
    maps,
    b,
    h,
    q_tile,  # [NUM_Q]
    k_tile,  # [NUM_K]; one of the two has one element
    len_q,
    len_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COVER_M: tl.constexpr,
    COVER_N: tl.constexpr,
):
    """(live, full) of the tiles: the AND over the parts of each part's class, proven, so a live tile may be empty."""
    m0 = q_tile * BLOCK_M
    n0 = k_tile * BLOCK_N
    m_end = tl.minimum(m0 + BLOCK_M, len_q)
    n_end = tl.minimum(n0 + BLOCK_N, len_k)
    live = (m0 < len_q) & (n0 < len_k)
    full = live & (n0 + BLOCK_N <= len_k)
    if mask.band_low is not None:
        live &= (n_end > m0 + mask.band_low) & (n0 < m_end + mask.band_high)
        full &= (n0 >= m_end - 1 + mask.band_low) & (n_end - 1 <= m0 + mask.band_high)
    if mask.prefix_lengths is not None:
        prefix = load_length(mask.prefix_lengths, mask.stride_prefix, b, len_k)
        live &= n0 < tl.maximum(m_end, prefix)
        full &= n_end <= tl.maximum(m0 + 1, prefix)
    if mask.key_lengths is not None:
        length = load_length(mask.key_lengths, mask.stride_lengths, b, len_k)
        live &= n0 < length
        full &= n_end <= length
    # Clamped positions repeat the tile's last one, which changes neither `any`, `all`, minimum nor maximum.
    rows = tl.minimum(m0[:, None] + tl.arange(0, BLOCK_M)[None, :], len_q - 1).to(tl.int64)
    cols = tl.minimum(n0[:, None] + tl.arange(0, BLOCK_N)[None, :], len_k - 1).to(tl.int64)
    if mask.key_keep is not None:
        keep = tl.load(mask.key_keep + b * mask.stride_keep[0] + cols * mask.stride_keep[1]).to(tl.int32)
        live &= tl.max(keep, 1) > 0
        full &= tl.min(keep, 1) > 0
    if mask.query_segments is not None:
        q_ids = tl.load(mask.query_segments + b * mask.stride_qseg[0] + rows * mask.stride_qseg[1])
        k_ids = tl.load(mask.key_segments + b * mask.stride_kseg[0] + cols * mask.stride_kseg[1])
        q_low, q_high = tl.min(q_ids, 1), tl.max(q_ids, 1)
        k_low, k_high = tl.min(k_ids, 1), tl.max(k_ids, 1)
        live &= (q_low <= k_high) & (k_low <= q_high)
        full &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if maps.live is not None:
        any_live = live & False
        for r in tl.static_range(COVER_M):
            for c in tl.static_range(COVER_N):
                map_q = m0 // maps.block_m + r
                map_k = n0 // maps.block_n + c
                inside = (map_q * maps.block_m < m_end) & (map_k * maps.block_n < n_end)
                word = b * maps.stride[0] + h * maps.stride[1] + map_q * maps.stride[2] + map_k // 64
                any_live |= inside & ((tl.load(maps.live + word, mask=inside, other=0) >> (map_k % 64)) & 1 != 0)
                full &= (tl.load(maps.full + word, mask=inside, other=-1) >> (map_k % 64)) & 1 != 0
        live &= any_live
    return live, full & live


@triton.jit
def live_tiles_kernel(
    index_ptr,  # int32 [Bt, Ht, own, other]
    counts_ptr,  # int32 [Bt, Ht, own, 2]
    mask,
    maps,
    heads,
    len_q,
    len_k,
    num_own,
    num_other,
    TRANSPOSED: tl.constexpr,  # own tiles are of keys, listed ones of queries
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COVER_M: tl.constexpr,
    COVER_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = (row % num_own).to(tl.int32)
    b = row // num_own // heads
    h = row // num_own % heads
    one = own + tl.arange(0, 1)
    list_ptr = index_ptr + row * num_other
    num_full = 0
    num_partial = 0
    for start in range(0, num_other, CHUNK):
        other = start + tl.arange(0, CHUNK)
        if TRANSPOSED:
            live, full = _classify(mask, maps, b, h, other, one, len_q, len_k, BLOCK_M, BLOCK_N, COVER_M, COVER_N)
        else:
            live, full = _classify(mask, maps, b, h, one, other, len_q, len_k, BLOCK_M, BLOCK_N, COVER_M, COVER_N)
        is_full = full.to(tl.int32)
        is_partial = live.to(tl.int32) - is_full
        at_full = num_full + tl.cumsum(is_full, 0) - is_full
        at_partial = num_partial + tl.cumsum(is_partial, 0) - is_partial
        tl.store(list_ptr + at_full, other, mask=is_full != 0)
        tl.store(list_ptr + (num_other - 1 - at_partial), other, mask=is_partial != 0)
        num_full += tl.sum(is_full, 0)
        num_partial += tl.sum(is_partial, 0)
    tl.store(counts_ptr + row * 2, num_full)
    tl.store(counts_ptr + row * 2 + 1, num_partial)


@triton.jit
def attended_keys_kernel(
    key_live_ptr,  # uint8 [Bt, Ht, S]
    index_ptr,  # the transposed lists
    counts_ptr,
    mask,
    heads,
    len_q,
    len_k,
    num_own,
    num_other,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = (row % num_own).to(tl.int32)
    b = row // num_own // heads
    h = row // num_own % heads
    n0 = own * BLOCK_N
    cols = n0 + tl.arange(0, BLOCK_N)
    exists = (cols < len_k).to(tl.int32)
    live = exists * (tl.load(counts_ptr + row * 2) > 0).to(tl.int32)  # a full tile attends to all of its keys
    num_partial = tl.load(counts_ptr + row * 2 + 1)
    t = 0
    # Mostly the first tile has every key; only keys that hardly anybody attends to make this loop long.
    while (t < num_partial) & (tl.sum(live, 0) < tl.sum(exists, 0)):
        rows = tl.load(index_ptr + row * num_other + (num_other - 1 - t)) * BLOCK_M + tl.arange(0, BLOCK_M)
        keep = may_attend(mask, b, h, rows[:, None], cols[None, :], n0, len_q, len_k, BLOCK_N)
        live = tl.maximum(live, tl.max(keep.to(tl.int32), 0))
        t += 1
    tl.store(key_live_ptr + (b * heads + h) * len_k + cols, live.to(tl.uint8), mask=cols < len_k)


class LiveTiles(NamedTuple):
    """The lists of one launch: `rows` walks keys for a tile of queries, `columns` walks queries for a tile of keys."""

    rows: TileOperands
    columns: TileOperands


def live_tiles(
    mask: KernelMask,
    operands: MaskOperands,
    len_q: int,
    len_k: int,
    block_m: int,
    block_n: int,
    want_rows: bool = True,
) -> LiveTiles:
    """Lists the live tiles of a mask for which `is_listed` holds."""
    batch, heads = _leading(mask)
    tile_map = mask.tile_map
    maps, cover_m, cover_n = _MapOperands(), 1, 1
    if tile_map is not None:
        map_m, map_n = tile_map.block_m, tile_map.block_n
        maps = _MapOperands(tile_map.live, tile_map.full, leading_strides(tile_map.live), map_m, map_n)
        cover_m, cover_n = _cover(block_m, map_m), _cover(block_n, map_n)
    num_q, num_k = triton.cdiv(len_q, block_m), triton.cdiv(len_k, block_n)
    device = _device(mask)
    sizes = dict(BLOCK_M=block_m, BLOCK_N=block_n)

    def lists(own: int, other: int, transposed: bool) -> tuple[Tensor, Tensor]:
        index = torch.empty((batch, heads, own, other), dtype=torch.int32, device=device)
        counts = torch.empty((batch, heads, own, 2), dtype=torch.int32, device=device)
        if counts.numel():
            live_tiles_kernel[(batch * heads * own,)](
                *(index, counts, operands, maps, heads, len_q, len_k, own, other),
                **(sizes | dict(TRANSPOSED=transposed, COVER_M=cover_m, COVER_N=cover_n, CHUNK=_CHUNK)),
                num_warps=4,
            )
        return index, counts

    index_t, counts_t = lists(num_k, num_q, True)
    key_live = torch.empty((batch, heads, len_k), dtype=torch.uint8, device=device)
    if key_live.numel():
        attended_keys_kernel[(batch * heads * num_k,)](
            *(key_live, index_t, counts_t, operands, heads, len_q, len_k, num_k, num_q), **sizes, num_warps=4
        )
    stride_live = (heads * len_k if batch > 1 else 0, len_k if heads > 1 else 0)

    def tile_operands(index: Tensor, counts: Tensor, own: int, other: int) -> TileOperands:
        strides = (heads * own if batch > 1 else 0, own if heads > 1 else 0)
        return TileOperands(index, counts, *strides, other, key_live, stride_live)

    columns = tile_operands(index_t, counts_t, num_k, num_q)
    if not want_rows:
        return LiveTiles(TileOperands(), columns)
    return LiveTiles(tile_operands(*lists(num_q, num_k, False), num_q, num_k), columns)


def _cover(block: int, map_block: int) -> int:
    """How many tiles of the map a tile of the kernel can touch."""
    if block % map_block == 0:
        return block // map_block
    return 1 if map_block % block == 0 else triton.cdiv(block - 1, map_block) + 1


def _leading(mask: KernelMask) -> tuple[int, int]:
    """The batch and the heads that the mask tells apart; 1 where it repeats."""
    parts = (mask.prefix_lengths, mask.key_lengths, mask.key_keep, mask.query_segments, mask.key_segments)
    batch = max((part.shape[0] for part in parts if part is not None), default=1)
    if mask.tile_map is None:
        return batch, 1
    return max(batch, mask.tile_map.live.shape[0]), mask.tile_map.live.shape[1]


def _device(mask: KernelMask) -> torch.device:
    for part in (mask.key_keep, mask.query_segments):
        if part is not None:
            return part.device
    assert mask.tile_map is not None
    return mask.tile_map.live.device
