"""The mask rule, the tile map, the lists of live tiles and the dropout, element by element against the others."""

import pytest
import torch
import triton
import triton.language as tl

from fastattn import Mask, dispatch
from fastattn.backends import reference
from fastattn.backends.triton import common
from fastattn.backends.triton import mask_tiles as triton_mask_tiles
from fastattn.backends.triton.live_tiles import live_tiles

native = dispatch.load("cpu") if dispatch.NATIVE_FAILURE is None else None
B, H, L, S = 2, 2, 70, 150
CPU = torch.device("cpu")


def keep(*shape, share=0.5):
    return torch.rand(shape) < share


def masks():
    torch.manual_seed(7)
    lengths = torch.tensor([0, 97])
    return {
        "causal": Mask.causal(),
        "causal, bottom right": Mask.causal(align="bottom_right"),
        "window": Mask.window(9, 3),
        "window right of the diagonal": Mask.window(-5, 30),
        "one-sided window": Mask.window(None, -60, align="bottom_right"),
        "prefix": Mask.prefix(torch.tensor([40, 300])),
        "key lengths": Mask.key_lengths(lengths),
        "wild lengths": Mask.key_lengths(torch.tensor([-(2**40), 2**40])) & Mask.prefix(torch.tensor([2**40, -7])),
        "key padding": Mask.key_padding(keep(B, S)),
        "padded tail": Mask.key_padding(torch.arange(S).expand(B, S) < 70),
        "segments": Mask.segments(torch.arange(L).expand(B, L) // 30, torch.arange(S).expand(B, S) // 40),
        "scattered segments": Mask.segments(torch.randint(0, 3, (1, L)), torch.randint(0, 4, (1, S))),
        "dense": Mask.dense(keep(B, H, L, S)),
        "dense of one head": Mask.dense(keep(L, S, share=0.02)),
        "dense blocks": Mask.dense((keep(B, 1, 2, 3)).repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :L, :S]),
        "everything": Mask.dense(keep(1, H, L, S, share=0.9))
        & Mask.causal(align="bottom_right")
        & Mask.key_padding(keep(B, S, share=0.9))
        & Mask.prefix(lengths)
        & Mask.segments(torch.arange(L).expand(1, L) // 40, torch.arange(S).expand(1, S) // 90),
    }


@triton.jit
def may_attend_kernel(
    out_ptr, mask, heads, len_q, len_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, T: tl.constexpr
):
    b = tl.program_id(1).to(tl.int64) // heads
    h = tl.program_id(1).to(tl.int64) % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    for n0 in range(0, len_k, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        if T:
            kept = common.may_attend(mask, b, h, rows[None, :], cols[:, None], n0, len_q, len_k, BLOCK_N)
            kept = tl.trans(kept)
        else:
            kept = common.may_attend(mask, b, h, rows[:, None], cols[None, :], n0, len_q, len_k, BLOCK_N)
        at = (tl.program_id(1) * len_q + rows[:, None]) * len_k + cols[None, :]
        tl.store(out_ptr + at, kept.to(tl.uint8), mask=(rows < len_q)[:, None] & (cols < len_k)[None, :])


@pytest.mark.parametrize("name", masks())
def test_mask_rule(name):
    mask = masks()[name]
    form = mask.kernel_form(B, H, L, S, CPU, 64, 64)
    expected = mask.to_dense(B, H, L, S)
    if native is not None:
        assert torch.equal(native.mask_elements(form, B, H, L, S), expected)
    for block_n, transposed in ((32, False), (64, True), (128, False)):
        out = torch.empty(B, H, L, S, dtype=torch.uint8)
        operands = common.mask_operands(form, L, S)
        may_attend_kernel[(triton.cdiv(L, 32), B * H)](
            out, operands, H, L, S, BLOCK_M=32, BLOCK_N=block_n, T=transposed
        )
        assert torch.equal(out.bool(), expected)


@triton.jit
def plan_kernel(
    out_ptr, mask, tiles, heads, len_q, len_k, own, other, T: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    pid = tl.program_id(0)
    bh = (pid // own).to(tl.int64)
    plan = common.tile_plan(mask, tiles, bh // heads, bh % heads, pid % own, len_q, len_k, M, N, T)
    for k in range(0, plan[0]):
        tl.store(out_ptr + pid * other + common.full_tile(k, plan, tiles), 2)
    for k in range(0, plan[1]):
        tl.store(out_ptr + pid * other + common.partial_tile(k, plan, tiles), 1)


@pytest.mark.parametrize(
    "blocks", [(64, 64), *(pytest.param(b, marks=pytest.mark.slow) for b in ((32, 128), (16, 32), (128, 32)))], ids=str
)
@pytest.mark.parametrize("name", masks())
def test_walks_visit_every_live_tile_and_trust_only_full_ones(name, blocks):
    mask = masks()[name]
    dense = mask.to_dense(B, H, L, S)
    block_m, block_n = blocks
    form = mask.kernel_form(B, H, L, S, CPU, 64, 64)
    operands = common.mask_operands(form, L, S)
    num_q, num_k = triton.cdiv(L, block_m), triton.cdiv(S, block_n)
    lists = None
    if common.is_listed(form):
        lists = live_tiles(form, operands, L, S, block_m, block_n)
    for transposed, own, other in ((False, num_q, num_k), (True, num_k, num_q)):
        tiles = common.TileOperands()
        if lists is not None:
            tiles = lists.columns if transposed else lists.rows
        seen = torch.zeros(B, H, own, other, dtype=torch.int32)
        sizes = dict(M=block_m, N=block_n, T=transposed)
        plan_kernel[(B * H * own,)](seen, operands, tiles, H, L, S, own, other, **sizes)
        if transposed:
            seen = seen.transpose(2, 3)
        for q in range(num_q):
            for k in range(num_k):
                tile = dense[:, :, q * block_m : (q + 1) * block_m, k * block_n : (k + 1) * block_n]
                live, full = tile.any(-1).any(-1), tile.all(-1).all(-1)
                assert (seen[:, :, q, k] > 0)[live].all(), "a live tile is left out"
                assert full[seen[:, :, q, k] == 2].all(), "a tile with holes is taken for full"
                if (k + 1) * block_n > S:
                    assert (seen[:, :, q, k] < 2).all(), "a tile over the edge is taken for full"
    if lists is not None:
        key_live = lists.columns.key_live.bool()
        assert torch.equal(key_live.expand(B, H, S), dense.any(2))


def test_causal_walks_are_tight():
    form = Mask.causal().kernel_form(1, 1, 256, 256, CPU)
    seen = torch.zeros(1, 1, 4, 4, dtype=torch.int32)
    sizes = dict(M=64, N=64, T=False)
    operands = common.mask_operands(form, 256, 256)
    plan_kernel[(4,)](seen, operands, common.TileOperands(), 1, 256, 256, 4, 4, **sizes)
    assert torch.equal(seen[0, 0], torch.tensor([[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]))


@pytest.mark.parametrize(
    "shapes,size,blocks",
    [
        (((2, 1, 130, 300),), (130, 300), (48, 64)),
        (((1, 2, 1, 300), (2, 1, 130, 1), (1, 1, 130, 300)), (130, 300), (64, 64)),
        (((1, 1, 70, 190),), (70, 190), (128, 128)),
        (((1, 1, 5, 64),), (5, 64), (64, 64)),
        (((1, 1, 20, 4200),), (20, 4200), (16, 64)),
        (((0, 1, 20, 30),), (20, 30), (16, 64)),
        (((1, 1, 0, 30),), (0, 30), (16, 64)),
    ],
    ids=str,
)
def test_tile_maps_are_equal_on_every_backend(shapes, size, blocks):
    masks = [keep(*shape, share=0.97) for shape in shapes]
    if masks[0].shape[2] > 64:
        masks[0][:, :, :64, :64] = True
        masks[0][:, :, 64:, 64:128] = False
    expected = reference.mask_tiles(masks, *size, *blocks)
    results = [triton_mask_tiles(masks, *size, *blocks)]
    if native is not None:
        results.append(native.mask_tiles(masks, *size, *blocks))
    for result in results:
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)


@triton.jit
def dropout_kernel(out_ptr, seed_ptr, limit, heads, len_q, len_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    b = tl.program_id(1).to(tl.int64) // heads
    h = tl.program_id(1).to(tl.int64) % heads
    m0 = tl.program_id(0) * BLOCK_M
    rows = m0 + tl.arange(0, BLOCK_M)
    for n0 in range(0, len_k, BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N)
        kept = common.dropout_keep(tl.load(seed_ptr), limit, b, h, m0, n0, BLOCK_M, BLOCK_N)
        at = (tl.program_id(1) * len_q + rows[:, None]) * len_k + cols[None, :]
        tl.store(out_ptr + at, kept.to(tl.uint8), mask=(rows < len_q)[:, None] & (cols < len_k)[None, :])


@pytest.mark.parametrize("seed", [0, 12345, 2**62 + 2**33 + 9, 2**63 - 2])
@pytest.mark.parametrize(
    "p", [pytest.param(0.1, marks=pytest.mark.slow), 0.5, pytest.param(0.97, marks=pytest.mark.slow)]
)
def test_dropped_elements_are_equal_on_every_backend(seed, p):
    seed_tensor = torch.tensor(seed)
    expected = reference.philox_keep(seed_tensor, p, B, H, 37, 75)
    if native is not None:
        assert torch.equal(native.philox_keep(seed_tensor, p, B, H, 37, 75), expected)
    for block_m, block_n in ((16, 16), (64, 64), (16, 128)):
        out = torch.empty(B, H, 37, 75, dtype=torch.uint8)
        grid = (triton.cdiv(37, block_m), B * H)
        limit = common.dropout_limit(p)
        dropout_kernel[grid](out, seed_tensor, limit, H, 37, 75, BLOCK_M=block_m, BLOCK_N=block_n)
        assert torch.equal(out.bool(), expected)


def test_dropout_limits():
    assert common.dropout_limit(0.0) == -1
    assert common.dropout_limit(2.0**-33) == -1
    assert common.dropout_limit(0.5) == 2**31 - 1
    assert common.dropout_limit(1 - 2.0**-53) == 2**32 - 2
