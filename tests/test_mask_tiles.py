"""The operator that packs dense masks: bits and tile bitmaps against the definition, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import Mask, attention
from fastattn.tiles import unpack_bits

NAMES = ("bits", "live", "full", "live_t", "full_t")


def pack(masks: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int, backend: str) -> tuple[Tensor, ...]:
    return torch.ops.fastattn.mask_tiles(masks, len_q, len_k, block_m, block_n, backend)


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def check(masks: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int, backend: str) -> None:
    keep = torch.ones(1, 1, len_q, len_k, dtype=torch.bool)
    for mask in masks:
        keep = keep & mask
    bits, live, full, live_t, full_t = pack(masks, len_q, len_k, block_m, block_n, backend)
    n_q, n_k = blocks(len_q, block_m), blocks(len_k, block_n)
    assert torch.equal(unpack_bits(bits, len_k), keep)
    for word_bits, length in ((bits, len_k), (live, n_k), (full, n_k), (live_t, n_q), (full_t, n_q)):
        assert word_bits.dtype == torch.int64 and word_bits.shape[-1] == blocks(length, 64)
        # What lies beyond the last key or tile is 0.
        assert not unpack_bits(word_bits, 64 * word_bits.shape[-1])[..., length:].any()
    pad = (0, n_k * block_n - len_k, 0, n_q * block_m - len_q)
    exists = F.pad(torch.ones(1, 1, len_q, len_k), pad)
    pairs = exists.unflatten(-1, (n_k, block_n)).unflatten(2, (n_q, block_m)).sum((3, 5))
    attending = F.pad(keep.float(), pad).unflatten(-1, (n_k, block_n)).unflatten(2, (n_q, block_m)).sum((3, 5))
    for found, transposed, wanted in ((live, live_t, attending > 0), (full, full_t, attending == pairs)):
        assert torch.equal(unpack_bits(found, n_k), wanted)
        assert torch.equal(unpack_bits(transposed, n_q), wanted.transpose(-1, -2))


@pytest.mark.parametrize("block_m, block_n", [(48, 64), (1, 64), (50, 128), (128, 192)])
@pytest.mark.parametrize("len_q, len_k", [(1, 1), (17, 113), (48, 64), (197, 203), (49, 65), (100, 1023)])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.999, 1.0])
def test_random_masks(len_q, len_k, block_m, block_n, density, backend, poisoned):
    check([torch.rand(2, 3, len_q, len_k) < density], len_q, len_k, block_m, block_n, backend)


def test_more_than_a_word_of_tiles(backend, poisoned):
    for len_q, len_k in ((3300, 70), (70, 4096 + 130)):
        keep = torch.ones(1, 1, len_q, len_k, dtype=torch.bool).tril(len_k - len_q)
        check([keep], len_q, len_k, 48, 64, backend)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_masks_are_combined(count, backend, poisoned):
    shapes = [(2, 1, 1, 203), (1, 3, 197, 1), (1, 1, 197, 203), (2, 3, 1, 1), (2, 1, 197, 203), (1, 3, 1, 203)]
    shapes += [(1, 1, 1, 1), (2, 3, 197, 203)]
    check([torch.rand(shape) < 0.9 for shape in shapes[-count:]], 197, 203, 48, 64, backend)


def test_layouts(backend, poisoned):
    keep = torch.rand(2, 3, 197, 203) < 0.7
    for lay_out in (
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: torch.stack([x, ~x], -1)[..., 0],
        lambda x: F.pad(x, (5, 3))[..., 5:-3],
        lambda x: x[:, :1].expand(x.shape),
    ):
        check([lay_out(keep)], 197, 203, 48, 64, backend)


@pytest.mark.parametrize("len_q, len_k, batch", [(0, 7, 2), (7, 0, 2), (7, 7, 0), (0, 0, 1)])
def test_empty(len_q, len_k, batch, backend):
    keep = torch.ones(batch, 2, len_q, len_k, dtype=torch.bool)
    bits, live, full, live_t, full_t = pack([keep], len_q, len_k, 48, 64, backend)
    n_q, n_k = blocks(len_q, 48), blocks(len_k, 64)
    assert bits.shape == (batch, 2, len_q, n_k)
    assert live.shape == full.shape == (batch, 2, n_q, min(n_k, 1))
    assert live_t.shape == full_t.shape == (batch, 2, n_k, min(n_q, 1))


def test_threads_change_nothing():
    masks = [torch.rand(2, 1, 500, 700) < 0.9, torch.rand(1, 2, 1, 700) < 0.9]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(pack(masks, 500, 700, 48, 64, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for name, one, two, five in zip(NAMES, *results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, five), name


def test_bad_input():
    keep = torch.ones(1, 1, 5, 70, dtype=torch.bool)
    for masks, blocks_of, words in (
        ([keep.int()], (48, 64), "mask"),
        ([keep], (48, 60), "block_n"),
        ([keep], (0, 64), "block_m"),
        ([keep[..., :5]], (48, 64), "mask"),
    ):
        with pytest.raises(ValueError, match=words):
            pack(masks, 5, 70, *blocks_of, "cpu")


def test_more_masks_than_the_operator_takes(backend):
    """Nine dense masks on one attention: the mask combines some of them first."""
    query, key, value = torch.randn(3, 1, 2, 50, 16).unbind(0)
    keeps = [torch.rand(1, 1, 50, 50) < 0.97 for _ in range(9)]
    mask = Mask.dense(keeps[0])
    for keep in keeps[1:]:
        mask = mask & Mask.dense(keep)
    together = torch.stack(keeps).all(0)
    found = attention(query, key, value, mask=mask, backend=backend)
    torch.testing.assert_close(found, attention(query, key, value, mask=together, backend=backend), rtol=0, atol=0)
