"""Packs dense masks and marks their tiles: the masks are read once, by programs of one tile each; a second, small
kernel gathers the classes of the tiles into the bitmaps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.common import on_device, strides_of


@triton.jit
def mask_tiles_kernel(
    masks,  # uint8, each broadcast to [B, H, L, S]
    strides,  # of each mask
    bits_ptr,  # int64 [B, H, L, words]
    class_ptr,  # uint8 [B, H, tiles of queries, tiles of keys]: 0 empty, 1 partial, 2 full
    heads,
    len_q,
    len_k,
    num_m,
    num_n,
    words,
    block_m,
    NUM_MASKS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # block_m rounded up to a power of two
    WORDS: tl.constexpr,  # of a tile
):
    pid = tl.program_id(0).to(tl.int64)
    tile_n = pid % num_n
    tile_m = pid // num_n % num_m
    bh = pid // num_n // num_m
    b = bh // heads
    h = bh % heads
    row = tl.arange(0, BLOCK_M)
    i = tile_m * block_m + row
    valid_row = (row < block_m) & (i < len_q)
    any_pair = tile_n.to(tl.int32) * 0
    every_pair = any_pair + 1
    for w in tl.static_range(WORDS):
        # [BLOCK_M, 8, 8]: eight bytes of eight bits; only sums of eight are made for every element.
        j0 = (tile_n * WORDS + w) * 64
        j = j0 + tl.arange(0, 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = valid_row[:, None, None] & (j < len_k)[None, :, :]
        keep = inside
        for n in tl.static_range(NUM_MASKS):
            offsets = (
                b * strides[n][0] + h * strides[n][1] + i[:, None, None] * strides[n][2] + j[None, :, :] * strides[n][3]
            )
            keep &= tl.load(masks[n] + offsets, mask=inside, other=0) != 0
        in_byte = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, None, :], 2)
        word = tl.sum(in_byte.to(tl.int64) << (tl.arange(0, 8) * 8)[None, :], 1)  # [BLOCK_M]
        exists = tl.minimum(tl.maximum(len_k - j0, 0), 64)
        # All the pairs that exist: 2^exists - 1, where a shift by 64 would be undefined.
        wanted = tl.where(exists >= 64, -1, (tl.full([1], 1, tl.int64) << (exists % 64)) - 1)
        any_pair = tl.maximum(any_pair, tl.max(((word != 0) & valid_row).to(tl.int32), 0))
        every_pair = tl.minimum(every_pair, tl.min(((word == wanted) | ~valid_row).to(tl.int32), 0))
        number = tile_n * WORDS + w
        tl.store(bits_ptr + (bh * len_q + i) * words + number, word, mask=valid_row & (number < words))
    tl.store(class_ptr + pid, (any_pair + any_pair * every_pair).to(tl.uint8))


@triton.jit
def mask_bitmaps_kernel(
    class_ptr,
    live_ptr,  # int64 [B, H, own, words]
    full_ptr,
    num_own,
    num_other,
    words,
    stride_own,
    stride_other,
    stride_bh,
):
    """One word of both bitmaps: 64 tiles along a row (or, by the strides, a column) of tiles."""
    pid = tl.program_id(0).to(tl.int64)
    other = pid % words * 64 + tl.arange(0, 64)
    own = pid // words % num_own
    bh = pid // words // num_own
    pointers = class_ptr + bh * stride_bh + own * stride_own + other * stride_other
    tile_class = tl.load(pointers, mask=other < num_other, other=0)
    shift = tl.arange(0, 64).to(tl.int64)
    tl.store(live_ptr + pid, tl.sum((tile_class != 0).to(tl.int64) << shift, 0))
    tl.store(full_ptr + pid, tl.sum((tile_class == 2).to(tl.int64) << shift, 0))


def mask_tiles(
    masks: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packs the AND of bool masks, each (B|1, H|1, L|1, S|1): bits, live, full, live_t, full_t of `TileMap`."""
    batch, heads = torch.broadcast_shapes(*(mask.shape[:2] for mask in masks))
    num_m, num_n = triton.cdiv(len_q, block_m), triton.cdiv(len_k, block_n)
    words = triton.cdiv(len_k, 64)
    device = masks[0].device

    def bitmap(rows: int, columns: int) -> Tensor:
        return torch.empty((batch, heads, rows, columns), dtype=torch.int64, device=device)

    bits = bitmap(len_q, words)
    words_m, words_n = triton.cdiv(num_m, 64), triton.cdiv(num_n, 64)
    live, full, live_t, full_t = (
        bitmap(*shape) for shape in ((num_m, words_n), (num_m, words_n), (num_n, words_m), (num_n, words_m))
    )
    if not batch * heads * num_m * num_n:
        return bits, live, full, live_t, full_t
    classes = torch.empty((batch, heads, num_m, num_n), dtype=torch.uint8, device=device)
    with on_device(masks[0]):
        mask_tiles_kernel[(classes.numel(),)](
            *(tuple(mask.view(torch.uint8) for mask in masks), tuple(strides_of(mask) for mask in masks)),
            *(bits, classes, heads, len_q, len_k, num_m, num_n, words, block_m),
            NUM_MASKS=len(masks),
            BLOCK_M=triton.next_power_of_2(block_m),
            WORDS=block_n // 64,
            num_warps=4,
        )
        for pair, own, other, stride_own, stride_other in (
            ((live, full), num_m, num_n, num_n, 1),
            ((live_t, full_t), num_n, num_m, 1, num_n),
        ):
            mask_bitmaps_kernel[(pair[0].numel(),)](
                *(classes, *pair, own, other, triton.cdiv(other, 64), stride_own, stride_other, num_m * num_n),
                num_warps=1,
            )
    return bits, live, full, live_t, full_t
