"""Tile maps: which tiles of the score matrix are empty, partly attended and fully attended.

A tile is `block_m` queries by `block_n` keys. Kernels skip empty tiles and run full tiles without mask code. Rows and
columns beyond the lengths are no pairs at all: a tile at the edge is full when every pair *inside* the problem attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.masks import Mask

EMPTY, PARTIAL, FULL = 0, 1, 2
WORD = 64  # bits of a packed word


def _blocks(length: int, block: int) -> int:
    return (length + block - 1) // block


def _check_blocks(block_m: int, block_n: int) -> None:
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"{name} must be a positive int, got {block!r}")


def pack_bits(keep: Tensor) -> Tensor:
    """Packs bool (..., N) into int64 words (..., ceil(N / 64)): bit (n & 63) of word n >> 6; bits beyond N are 0."""
    length = keep.shape[-1]
    words = _blocks(length, WORD)
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, words * WORD - length))
    # Bytes first, then words: the widest intermediate is as large as the mask, not eight times larger.
    bit = torch.ones(8, dtype=torch.uint8, device=keep.device) << torch.arange(8, dtype=torch.uint8, device=keep.device)
    in_bytes = (padded.unflatten(-1, (words, 8, 8)) * bit).sum(-1, dtype=torch.uint8)  # (..., words, 8)
    shift = 8 * torch.arange(8, dtype=torch.int64, device=keep.device)
    return (in_bytes.to(torch.int64) << shift).sum(-1)  # the byte shifted to bit 63 wraps to the sign, as in uint64


def unpack_bits(words: Tensor, length: int) -> Tensor:
    """The inverse of `pack_bits`: int64 words (..., ceil(length / 64)) to bool (..., length)."""
    shift = torch.arange(WORD, dtype=torch.int64, device=words.device)
    bits = (words.unsqueeze(-1) >> shift) & 1  # an arithmetic shift; the & drops the copies of the sign
    return bits.flatten(-2)[..., :length].bool()


@dataclass(frozen=True, eq=False)
class TileMap:
    """Which tiles of a (B, H, L, S) mask have any, and have only, attending pairs, as bitmaps for the kernels.

    `bits` (Bm, Hm, L, ceil(S/64)): the elements of the dense part; None when the mask has no dense part.
    `live`, `full` (Bm, Hm, nQ, ceil(nK/64)): bit (kt & 63) of word [b, h, qt, kt >> 6].
    `live_t`, `full_t` (Bm, Hm, nK, ceil(nQ/64)): the same transposed, for walks along a column of tiles.
    All int64. Bm and Hm are 1 where the mask does not depend on the batch or the head.
    """

    bits: Tensor | None
    live: Tensor
    full: Tensor
    live_t: Tensor
    full_t: Tensor
    block_m: int
    block_n: int
    len_q: int
    len_k: int

    @staticmethod
    def from_classes(
        classes: Tensor, block_m: int, block_n: int, len_q: int, len_k: int, bits: Tensor | None = None
    ) -> TileMap:
        """The map of the tile classes (Bm, Hm, nQ, nK): 0 empty, 1 partial, 2 full."""
        live, full = classes != EMPTY, classes == FULL
        live_t, full_t = live.transpose(-1, -2), full.transpose(-1, -2)
        packed = (pack_bits(live), pack_bits(full), pack_bits(live_t), pack_bits(full_t))
        return TileMap(bits, *packed, block_m, block_n, len_q, len_k)

    def transpose(self) -> TileMap:
        """The map of the transposed problem: queries become keys."""
        bits = self.bits
        if bits is not None:
            bits = pack_bits(unpack_bits(bits, self.len_k).transpose(-1, -2))
        return TileMap(
            bits, self.live_t, self.full_t, self.live, self.full, self.block_n, self.block_m, self.len_k, self.len_q
        )

    def classes(self) -> Tensor:
        """uint8 (Bm, Hm, nQ, nK): 0 empty, 1 partial, 2 full."""
        n_k = _blocks(self.len_k, self.block_n)
        return unpack_bits(self.live, n_k).to(torch.uint8) + unpack_bits(self.full, n_k).to(torch.uint8)

    def counts(self) -> dict[str, int]:
        """How many tiles are of each class, over every (batch, head) that the map holds."""
        classes = self.classes()
        return {
            name: int((classes == number).sum())
            for name, number in (("empty", EMPTY), ("partial", PARTIAL), ("full", FULL))
        }

    def density(self) -> float:
        """The share of tiles that a kernel has to visit; 0.0 for an empty problem."""
        classes = self.classes()
        return float((classes != EMPTY).double().mean()) if classes.numel() else 0.0

    def __repr__(self) -> str:
        if type(self.live) is not Tensor or self.live.is_meta:  # fake: has no values to count
            return f"TileMap({self.len_q} x {self.len_k} in tiles of {self.block_m} x {self.block_n})"
        numbers = ", ".join(f"{number} {name}" for name, number in self.counts().items())
        return f"TileMap({self.len_q} x {self.len_k} in tiles of {self.block_m} x {self.block_n}: {numbers})"


def dense_classes(keep: Tensor, block_m: int, block_n: int) -> Tensor:
    """Classes, uint8 (B, H, nQ, nK), of a bool mask (B, H, L, S)."""
    len_q, len_k = keep.shape[-2:]
    n_q, n_k = _blocks(len_q, block_m), _blocks(len_k, block_n)

    def tiles(fill: bool) -> Tensor:  # (B, H, nQ, block_m, nK, block_n); the fill decides nothing at the edge
        padded = torch.nn.functional.pad(keep, (0, n_k * block_n - len_k, 0, n_q * block_m - len_q), value=fill)
        return padded.unflatten(-1, (n_k, block_n)).unflatten(2, (n_q, block_m))

    live, full = tiles(False).any(-1).any(3), tiles(True).all(-1).all(3)
    return live.to(torch.uint8) + full.to(torch.uint8)


def pack_dense(
    masks: Sequence[Tensor], len_q: int, len_k: int, block_m: int, block_n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packs the AND of bool masks, each (B|1, H|1, L|1, S|1), and marks its tiles; the layout of `csrc/core/params.h`.

    Returns the tensors of `TileMap`: bits, live, full, live_t, full_t.
    """
    _check_blocks(block_m, block_n)
    keep = masks[0]
    for other in masks[1:]:
        keep = keep & other
    keep = keep.expand(keep.shape[0], keep.shape[1], len_q, len_k)
    tiles = TileMap.from_classes(dense_classes(keep, block_m, block_n), block_m, block_n, len_q, len_k)
    return pack_bits(keep), tiles.live, tiles.full, tiles.live_t, tiles.full_t


def tile_classes(
    mask: Mask, B: int, H: int, L: int, S: int, block_m: int, block_n: int, device: torch.device | None = None
) -> Tensor:
    """Classes of a mask's tiles, uint8 (B|1, H|1, nQ, nK): 0 empty, 1 partial, 2 full.

    Analytic terms are classified by arithmetic on the tile's ranges, never expanded. The class of a composition, and of
    segments, is conservative: empty and full are proven, partial may be either.
    """
    _check_blocks(block_m, block_n)
    mask.validate(B, H, L, S, device)
    n_q, n_k = _blocks(L, block_m), _blocks(S, block_n)
    combined = torch.full((1, 1, 1, 1), FULL, dtype=torch.uint8, device=device)
    for term in mask.terms:
        # Empty when any term is empty, full when all are full: with 0 < 1 < 2 that is the minimum.
        combined = torch.minimum(combined, term.tile_classes(L, S, block_m, block_n, device))
    return combined.expand(-1, -1, n_q, n_k)


def tile_ranges(length: int, block: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """First and last index, both included, of each block of `range(length)`: two int64 (n,)."""
    first = torch.arange(0, length, block, dtype=torch.int64, device=device)
    return first, torch.clamp(first + block - 1, max=length - 1)
