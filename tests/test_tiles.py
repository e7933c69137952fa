"""TileMap: bit-exact packing, and tile classes against the classes of the expanded mask."""

import pytest
import torch

from fastattn.masks import Mask
from fastattn.tiles import (
    EMPTY,
    FULL,
    PARTIAL,
    TileMap,
    dense_classes,
    pack_bits,
    pack_dense,
    tile_classes,
    unpack_bits,
)

B, H = 2, 3
SIZES = [(1, 1), (5, 5), (17, 113), (113, 17), (64, 64), (48, 128), (97, 200), (0, 9), (9, 0)]
BLOCKS = [(48, 64), (16, 128), (7, 5)]


def random_keep(*shape, seed=0, p=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def blockwise_keep(L, S, seed=0):
    """Random squares of 8 x 8, so that tiles of every class appear."""
    squares = random_keep(B, H, L // 8 + 1, S // 8 + 1, seed=seed, p=0.9)
    squares[:, :, : L // 16] &= random_keep(B, H, L // 16, 1, seed=seed + 1)
    return squares.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :L, :S].clone()


def loop_classes(keep, block_m, block_n):
    batch, heads, L, S = keep.shape
    n_q, n_k = -(-L // block_m), -(-S // block_n)
    classes = torch.zeros(batch, heads, n_q, n_k, dtype=torch.uint8)
    for b in range(batch):
        for h in range(heads):
            for qt in range(n_q):
                for kt in range(n_k):
                    tile = keep[b, h, qt * block_m : (qt + 1) * block_m, kt * block_n : (kt + 1) * block_n]
                    classes[b, h, qt, kt] = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
    return classes


def loop_pack(keep):
    """Words as Python ints, unsigned, straight from the definition in csrc/core/params.h."""
    rows = keep.reshape(-1, keep.shape[-1]).tolist()
    return [
        [
            sum(1 << (j & 63) for j, bit in enumerate(row) if bit and j >> 6 == word)
            for word in range(-(-len(row) // 64))
        ]
        for row in rows
    ]


def unsigned(words):
    return [[word % 2**64 for word in row] for row in words.reshape(-1, words.shape[-1]).tolist()]


@pytest.mark.parametrize("length", [1, 8, 63, 64, 65, 113, 200])
def test_pack_bits_is_exact_and_reversible(length):
    keep = random_keep(2, 3, length, seed=length)
    packed = pack_bits(keep)
    assert packed.dtype == torch.int64 and packed.shape == (2, 3, -(-length // 64))
    assert unsigned(packed) == loop_pack(keep)
    assert torch.equal(unpack_bits(packed, length), keep)


def test_pack_bits_of_nothing():
    assert pack_bits(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
    assert unpack_bits(torch.zeros(2, 0, dtype=torch.int64), 0).shape == (2, 0)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pack_dense_follows_the_launch_contract(size, blocks):
    keep = blockwise_keep(*size)
    bits, live, full, live_t, full_t = pack_dense([keep], *size, *blocks)
    classes = loop_classes(keep, *blocks)
    assert unsigned(bits) == loop_pack(keep) if size[1] else bits.numel() == 0
    for words, bitmap in (
        (live, classes != EMPTY),
        (full, classes == FULL),
        (live_t, (classes != EMPTY).mT),
        (full_t, (classes == FULL).mT),
    ):
        assert words.dtype == torch.int64 and words.is_contiguous()
        assert words.shape == (*bitmap.shape[:3], -(-bitmap.shape[3] // 64))
        assert unsigned(words) == loop_pack(bitmap) if bitmap.numel() else words.numel() == 0


def test_pack_dense_ands_and_broadcasts_its_masks():
    L, S = 50, 130
    masks = [random_keep(B, 1, L, 1), random_keep(1, H, 1, S, seed=1), random_keep(1, 1, L, S, seed=2)]
    together = masks[0] & masks[1] & masks[2]
    for ours, expected in zip(pack_dense(masks, L, S, 48, 64), pack_dense([together], L, S, 48, 64), strict=True):
        assert torch.equal(ours, expected)
    shared = pack_dense([masks[2]], L, S, 48, 64)
    assert [x.shape[:2] for x in shared] == [(1, 1)] * 5


@pytest.mark.parametrize("blocks", [(0, 64), (48, -1), (48, 1.5), (True, 64)], ids=str)
def test_bad_blocks_are_named(blocks):
    with pytest.raises(ValueError, match="block_[mn] must be a positive int"):
        Mask.causal().tile_map(9, 9, block_m=blocks[0], block_n=blocks[1])


# Masks whose classes are exact, and those that may call a tile partial although it is not.
def exact_masks(L, S):
    return [
        Mask(()),
        Mask.causal(),
        Mask.causal("bottom_right"),
        Mask.window(20, 3),
        Mask.window(30, -10, align="bottom_right"),
        Mask.window(-40, None),
        Mask.window(-5, 2),
        Mask.prefix([40, -3]),
        Mask.prefix([1000, 64]),
        Mask.key_lengths([S // 2, -1]),
        Mask.key_lengths([64, 1000]),
        Mask.key_padding(random_keep(B, S // 8 + 1, p=0.7).repeat_interleave(8, 1)[:, :S]),
        Mask.dense(blockwise_keep(L, S)),
        Mask.dense(random_keep(B, 1, 1, S, p=0.97)),
        Mask.dense(random_keep(H, L, 1, p=0.97)),
    ]


def sorted_ids(length, seed):
    return torch.randint(0, 4, (B, length), generator=torch.Generator().manual_seed(seed)).sort(-1).values


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_classes_by_arithmetic_are_those_of_the_expanded_mask(size, blocks):
    for mask in exact_masks(*size):
        classes = tile_classes(mask, B, H, *size, *blocks)
        assert classes.dtype == torch.uint8
        expected = loop_classes(mask.to_dense(B, H, *size), *blocks)
        assert torch.equal(classes.expand_as(expected), expected), mask


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_classes_of_compositions_and_segments_are_proven(size, blocks):
    L, S = size
    segments = Mask.segments(sorted_ids(L, 0), sorted_ids(S, 1))
    masks = exact_masks(*size)
    for mask in [segments, *(a & b for a, b in zip(masks, [*masks[1:], segments], strict=True))]:
        classes = tile_classes(mask, B, H, *size, *blocks).expand(B, H, -1, -1)
        expected = loop_classes(mask.to_dense(B, H, *size), *blocks)
        proven = classes != PARTIAL
        assert torch.equal(classes[proven], expected[proven]), mask


def test_segments_find_the_block_diagonal():
    ids = torch.arange(4).repeat_interleave(64)[None]
    classes = tile_classes(Mask.segments(ids, ids), 1, 1, 256, 256, 64, 64)
    assert torch.equal(classes[0, 0], 2 * torch.eye(4, dtype=torch.uint8))


def test_dense_classes_ignore_what_lies_beyond_the_edge():
    assert dense_classes(torch.ones(1, 1, 5, 5, dtype=torch.bool), 4, 4).eq(FULL).all()
    assert dense_classes(torch.zeros(1, 1, 5, 5, dtype=torch.bool), 4, 4).eq(EMPTY).all()


@pytest.mark.parametrize("size", [(17, 113), (113, 17), (97, 200)], ids=str)
def test_transpose_is_the_map_of_the_transposed_mask(size):
    L, S = size
    keep = blockwise_keep(L, S)
    ours = Mask.dense(keep).tile_map(L, S, B, H, 16, 64).transpose()
    expected = Mask.dense(keep.mT).tile_map(S, L, B, H, 64, 16)
    for name in ("bits", "live", "full", "live_t", "full_t"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    assert (ours.block_m, ours.block_n, ours.len_q, ours.len_k) == (64, 16, S, L)
    back = ours.transpose()
    assert torch.equal(back.bits, pack_bits(keep)) and torch.equal(back.classes(), dense_classes(keep, 16, 64))


def test_tile_map_of_an_analytic_mask():
    tiles = Mask.causal().tile_map(256, 256)
    assert isinstance(tiles, TileMap) and tiles.bits is None
    assert tiles.counts() == {"empty": 6, "partial": 4, "full": 6}
    assert tiles.density() == pytest.approx(10 / 16)
    assert repr(tiles) == "TileMap(256 x 256 in tiles of 64 x 64: 6 empty, 4 partial, 6 full)"
    assert tiles.transpose().counts() == tiles.counts()
    assert torch.equal(tiles.transpose().classes(), tiles.classes().mT)


def test_tile_map_of_a_composition_holds_the_whole_mask():
    keep = random_keep(1, H, 100, 130, p=0.9)
    mask = Mask.dense(keep) & Mask.key_lengths([40, 64])
    tiles = mask.tile_map(100, 130, B, H)
    assert torch.equal(tiles.bits, pack_bits(keep))
    assert torch.equal(mask.tile_map(100, 130).live, tiles.live)
    assert torch.equal(tiles.classes(), tile_classes(mask, B, H, 100, 130, 64, 64))
    assert tiles.classes()[..., 1:].eq(EMPTY).all() and tiles.classes()[..., :1].eq(PARTIAL).all()


def test_tile_map_of_an_empty_problem():
    assert Mask.causal().tile_map(0, 10).density() == 0.0
    assert Mask.key_lengths([3]).tile_map(10, 0).counts() == {"empty": 0, "partial": 0, "full": 0}


def test_repr_does_not_read_fake_values():
    assert "12 x 70" in repr(Mask.causal().tile_map(12, 70, device="meta"))
