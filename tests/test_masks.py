"""Mask against a double loop over every pair, and its kernel form against its own meaning."""

import copy
import itertools
import pickle
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from fastattn import attention, dispatch, tiles
from fastattn.backends import reference
from fastattn.masks import UNLIMITED, KernelMask, Mask, coerce

CPU = torch.device("cpu")
B, H = 2, 3
SIZES = [(1, 1), (5, 5), (3, 9), (9, 3), (1, 7), (7, 1), (6, 70), (0, 4), (4, 0)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_keep(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed)) < 0.6


def random_ids(batch, length, seed):
    return torch.randint(-2, 3, (batch, length), generator=generator(seed))


# name -> (L, S) -> (mask, rule(b, h, i, j))
def _causal(align):
    return lambda L, S: (Mask.causal(align), lambda b, h, i, j: j <= i + (S - L if align == "bottom_right" else 0))


def _window(left, right, align):
    def make(L, S):
        o = S - L if align == "bottom_right" else 0

        def rule(b, h, i, j):
            return (left is None or j >= i + o - left) and (right is None or j <= i + o + right)

        return Mask.window(left, right, align), rule

    return make


def _prefix(lengths):
    return lambda L, S: (Mask.prefix(lengths), lambda b, h, i, j: j <= i or j < lengths[b % len(lengths)])


def _key_lengths(lengths, dtype=None):
    given = lengths if dtype is None else torch.tensor(lengths, dtype=dtype)
    return lambda L, S: (Mask.key_lengths(given), lambda b, h, i, j: j < lengths[b % len(lengths)])


def _key_padding(batch, seed=1):
    def make(L, S):
        keep = random_keep(batch, S, seed=seed)
        return Mask.key_padding(keep), lambda b, h, i, j: bool(keep[b % batch, j])

    return make


def _dense(*which, seed=2):
    """`which` names the dimensions of the mask: "B", "H", "L", "S" or 1."""

    def make(L, S):
        sizes = {"B": B, "H": H, "L": L, "S": S, 1: 1}
        keep = random_keep(*(sizes[d] for d in which), seed=seed)

        def rule(b, h, i, j):
            index = {"B": b, "H": h, "L": i, "S": j, 1: 0}
            return bool(keep[tuple(index[d] for d in which)])

        return Mask.dense(keep), rule

    return make


def _segments(batch_q, batch_k, seed):
    def make(L, S):
        q, k = random_ids(batch_q, L, seed), random_ids(batch_k, S, seed + 1).to(torch.int32)
        return Mask.segments(q, k), lambda b, h, i, j: bool(q[b % batch_q, i] == k[b % batch_k, j])

    return make


TERMS = {
    "causal": _causal("top_left"),
    "causal_bottom": _causal("bottom_right"),
    "window": _window(2, 1, "top_left"),
    "window_bottom": _window(1, 0, "bottom_right"),
    "window_left_open": _window(None, 2, "top_left"),
    "window_right_open": _window(3, None, "bottom_right"),
    "window_open": _window(None, None, "top_left"),
    "window_strictly_past": _window(4, -1, "top_left"),
    "window_huge": _window(10**30, 10**30, "bottom_right"),
    "window_nothing": _window(-3, 2, "top_left"),
    "prefix": _prefix([2, 4]),
    "prefix_outside": _prefix([-5, 1000]),
    "key_lengths": _key_lengths([3, 1]),
    "key_lengths_outside": _key_lengths([-1, 10**12]),
    "key_lengths_int32_shared": _key_lengths([2], torch.int32),
    "key_padding": _key_padding(B),
    "key_padding_shared": _key_padding(1),
    "dense_2d": _dense("L", "S"),
    "dense_4d": _dense("B", "H", "L", "S", seed=3),
    "dense_heads": _dense("H", 1, 1, seed=4),
    "dense_padding": _dense("B", 1, 1, "S", seed=5),
    "dense_batch": _dense("B", 1, 1, 1, seed=6),
    "dense_scalar": _dense(seed=8),
    "segments": _segments(B, B, 10),
    "segments_shared": _segments(1, B, 20),
}


def loop(rule, L, S):
    pairs = itertools.product(range(B), range(H), range(L), range(S))
    return torch.tensor([rule(*pair) for pair in pairs], dtype=torch.bool).reshape(B, H, L, S)


def expanded_kernel_form(mask, L, S, **kwargs):
    return reference.expand(mask.kernel_form(B, H, L, S, CPU, **kwargs), B, H, L, S, CPU)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_constructor_follows_its_definition(name, size):
    mask, rule = TERMS[name](*size)
    expected = loop(rule, *size)
    dense = mask.to_dense(B, H, *size)
    assert dense.shape == expected.shape and dense.dtype == torch.bool
    assert torch.equal(dense, expected)
    assert torch.equal(expanded_kernel_form(mask, *size), expected)


@pytest.mark.parametrize("size", [(5, 7), (7, 5)], ids=str)
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(TERMS, 2)))
def test_pairs_compose_by_and(first, second, size):
    (a, rule_a), (b, rule_b) = TERMS[first](*size), TERMS[second](*size)
    expected = loop(rule_a, *size) & loop(rule_b, *size)
    for mask in (a & b, b & a):
        assert torch.equal(mask.to_dense(B, H, *size), expected)
        assert torch.equal(expanded_kernel_form(mask, *size), expected)


@pytest.mark.parametrize("seed", range(40))
def test_random_compositions_reach_the_kernels_unchanged(seed):
    g = generator(seed)
    L, S = (int(torch.randint(1, 80, (), generator=g)) for _ in range(2))
    mask = Mask(())
    for index in torch.randint(len(TERMS), (5,), generator=g).tolist():
        mask = mask & list(TERMS.values())[index](L, S)[0]
    dense = mask.to_dense(B, H, L, S)
    assert torch.equal(expanded_kernel_form(mask, L, S), dense)
    assert torch.equal(expanded_kernel_form(mask, L, S, block_m=16, block_n=128), dense)


def test_many_dense_masks_and_segments_fold_into_one():
    L, S = 6, 11
    mask = Mask(())
    for seed in range(11):
        mask = mask & Mask.dense(torch.rand(1, H, L, S, generator=generator(seed)) < 0.95)
    packed = []

    def build(masks, *args):
        packed.append(len(masks))
        return reference.mask_tiles(masks, *args)

    assert torch.equal(expanded_kernel_form(mask, L, S, build=build), mask.to_dense(B, H, L, S))
    assert packed == [8]
    segments = Mask(())
    for seed in range(4):
        large = 2**61 * random_ids(B, L + S, seed).clamp(0, 1)  # ids whose product would overflow
        segments = segments & Mask.segments(large[:, :L], large[:, L:])
    assert torch.equal(expanded_kernel_form(segments, L, S), segments.to_dense(B, H, L, S))
    assert segments.to_dense(B, H, L, S).any()


def test_analytic_masks_are_never_expanded():
    def build(*args):
        raise AssertionError("an analytic mask was packed as a dense one")

    L = S = 1 << 40  # expanding, even one row of tiles, would not fit any memory
    form = (
        Mask.causal("bottom_right") & Mask.window(5, None) & Mask.key_lengths([3, 4]) & Mask.prefix([1, 2])
    ).kernel_form(B, H, L, S, CPU, build=build)
    assert form.band == (5, UNLIMITED, UNLIMITED, 0)
    padded = Mask.key_padding(random_keep(B, 9)) & Mask.dense(random_keep(B, 1, 1, 9, seed=1))
    assert padded.kernel_form(B, H, 7, 9, CPU, build=build).key_keep.shape == (B, 9)


def test_an_expanded_padding_mask_is_a_padding_mask():
    keep = random_keep(B, 9)
    form = Mask.dense(keep[:, None, None].expand(B, H, 7, 9)).kernel_form(B, H, 7, 9, CPU)
    assert form.tile_map is None and torch.equal(form.key_keep, keep)
    shared = random_keep(1, 1, 7, 9).expand(B, H, 7, 9)
    form = Mask.dense(shared).kernel_form(B, H, 7, 9, CPU)
    assert form.tile_map.bits.shape[:2] == (1, 1)
    assert torch.equal(reference.expand(form, B, H, 7, 9, CPU), shared)


def test_window_that_excludes_nothing_costs_nothing():
    assert Mask.window(None, None).kernel_form(B, H, 4, 4, CPU) == KernelMask()


def test_repr_reads_as_the_expression_that_built_it():
    mask = Mask.causal() & Mask.window(3, None, align="bottom_right") & Mask.key_lengths([1, 2])
    assert repr(mask) == (
        "Mask.causal(align='top_left') & Mask.window(3, None, align='bottom_right') & Mask.key_lengths(<int64 (2,)>)"
    )


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Mask.causal("left"), ValueError, "align .*'left'"),
        (lambda: Mask.causal(None), ValueError, "align"),
        (lambda: Mask.window(1.5, 0), TypeError, "left .*1.5"),
        (lambda: Mask.window(0, float("nan")), TypeError, "right .*nan"),
        (lambda: Mask.window(True, 0), TypeError, "left .*True"),
        (lambda: Mask.window(0, 0, align="centre"), ValueError, "align .*'centre'"),
        (lambda: Mask.prefix(torch.tensor([1.0])), TypeError, "lengths .*float32"),
        (lambda: Mask.prefix(torch.tensor([[1]])), ValueError, r"lengths .*\(1, 1\)"),
        (lambda: Mask.key_lengths([1.0, 2]), TypeError, "lengths .*1.0"),
        (lambda: Mask.key_lengths([float("nan")]), TypeError, "lengths .*nan"),
        (lambda: Mask.key_lengths([True]), TypeError, "lengths .*True"),
        (lambda: Mask.key_lengths(torch.tensor([True])), TypeError, "lengths .*bool"),
        (lambda: Mask.key_lengths(3), TypeError, "lengths .*int"),
        (lambda: Mask.key_lengths("12"), TypeError, "lengths .*str"),
        (lambda: Mask.key_padding(torch.ones(2, 3)), TypeError, "keep .*float32"),
        (lambda: Mask.key_padding(torch.ones(3, dtype=torch.bool)), ValueError, r"keep .*\(3,\)"),
        (lambda: Mask.key_padding([[True]]), TypeError, "keep .*list"),
        (lambda: Mask.dense(torch.zeros(3, 3)), TypeError, "keep .*float32"),
        (lambda: Mask.dense(torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)), ValueError, "keep"),
        (lambda: Mask.segments(torch.zeros(2, 3), torch.zeros(2, 3).long()), TypeError, "query_ids .*float32"),
        (lambda: Mask.segments(torch.zeros(2, 3).long(), torch.zeros(3).long()), ValueError, r"key_ids .*\(3,\)"),
        (lambda: Mask.from_flex(torch.ones(2, 2)), TypeError, "block_mask .*Tensor"),
        (lambda: Mask.causal() & torch.ones(2, 2).bool(), TypeError, "unsupported operand"),
        (lambda: coerce(torch.zeros(2, 2)), TypeError, "mask .*float32"),
        (lambda: coerce([[True]]), TypeError, "mask .*list"),
        (lambda: coerce(torch.ones(1, 1, 1, 1, 1).bool()), ValueError, "mask"),
    ],
)
def test_bad_arguments_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    "mask",
    [
        Mask.prefix([1, 2, 3]),
        Mask.key_lengths([1, 2, 3]),
        Mask.key_padding(random_keep(2, 6)),
        Mask.key_padding(random_keep(3, 7)),
        Mask.dense(random_keep(5, 7)),
        Mask.dense(random_keep(3, 1, 4, 7)),
        Mask.dense(random_keep(2, 2, 1, 7)),
        Mask.segments(random_ids(2, 5, 0), random_ids(2, 7, 0)),
        Mask.segments(random_ids(2, 4, 0), random_ids(2, 6, 0)),
        Mask.segments(random_ids(3, 4, 0), random_ids(2, 7, 0)),
    ],
    ids=repr,
)
def test_a_mask_that_does_not_fit_is_refused(mask):
    for use in (mask.to_dense, mask.validate):
        with pytest.raises(ValueError, match="mask"):
            use(2, 3, 4, 7)
    with pytest.raises(ValueError, match="mask"):
        (Mask.causal() & mask).kernel_form(2, 3, 4, 7, CPU)
    with pytest.raises(ValueError, match="mask"):
        mask.tile_map(4, 7, 2, 3)


def test_a_mask_on_another_device_is_refused_and_can_be_moved():
    mask = Mask.causal() & Mask.key_padding(random_keep(B, 5))
    with pytest.raises(ValueError, match="mask must be on meta .*on cpu"):
        mask.validate(B, H, 5, 5, torch.device("meta"))
    with pytest.raises(ValueError, match="mask must be on meta"):
        mask.kernel_form(B, H, 5, 5, torch.device("meta"))
    moved = mask.to("meta")
    assert [t.device.type for t in moved.tensors()] == ["meta"] and moved.terms[0] == mask.terms[0]
    assert moved.kernel_form(B, H, 5, 5, torch.device("meta")).key_keep.is_meta
    assert mask.to_dense(B, H, 5, 5, device="meta").is_meta


def test_coerce():
    keep = random_keep(4, 7)
    assert coerce(None) is None
    mask = Mask.causal()
    assert coerce(mask) is mask
    assert torch.equal(coerce(keep).to_dense(B, H, 4, 7), keep.expand(B, H, 4, 7))


def test_mask_is_immutable():
    with pytest.raises(AttributeError):
        Mask.causal().terms = ()


class Counted:
    calls = 0

    def __call__(self, *args):
        self.calls += 1
        return reference.mask_tiles(*args)


def test_layers_share_one_map_until_the_mask_changes_in_place():
    keep, build = random_keep(B, H, 5, 7), Counted()
    mask = Mask.causal("bottom_right") & Mask.dense(keep)
    first = mask.kernel_form(B, H, 5, 7, CPU, build=build)
    assert mask.kernel_form(B, H, 5, 7, CPU, build=build) is first and build.calls == 1
    assert mask.kernel_form(B, H, 5, 7, CPU, block_m=16, build=build).tile_map.block_m == 16 and build.calls == 2
    keep.logical_not_()
    changed = expanded_kernel_form(mask, 5, 7, build=build)
    assert build.calls == 3
    assert torch.equal(changed, keep & Mask.causal("bottom_right").to_dense(B, H, 5, 7))


def test_copies_do_not_inherit_the_map():
    keep = random_keep(B, H, 5, 7)
    keep.logical_not_()  # one version on, which a copy does not remember
    mask = Mask.dense(keep)
    mask.kernel_form(B, H, 5, 7, CPU)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        other.terms[0].keep.logical_not_()
        assert torch.equal(expanded_kernel_form(other, 5, 7), ~keep)


def test_a_map_made_in_inference_mode_does_not_reach_training():
    mask = Mask.dense(random_keep(B, H, 5, 7))
    with torch.inference_mode():
        assert mask.kernel_form(B, H, 5, 7, CPU).tile_map.live.is_inference()
        inference_mask = Mask.dense(random_keep(B, H, 5, 7))
        inference_mask.kernel_form(B, H, 5, 7, CPU)
    assert not mask.kernel_form(B, H, 5, 7, CPU).tile_map.live.is_inference()
    assert inference_mask.kernel_form(B, H, 5, 7, CPU) is not inference_mask.kernel_form(B, H, 5, 7, CPU)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mask_made_in_inference_mode_serves_training(backend):
    with torch.inference_mode():
        keep, ids = random_keep(B, 7), torch.randint(0, 2, (B, 7))
        masks = [Mask.key_padding(keep), Mask.key_lengths([3, 4]), Mask.prefix([3, 4]), Mask.segments(ids, ids)]
        masks += [Mask.dense(random_keep(B, 1, 1, 7).expand(B, H, 7, 7)), Mask.dense(random_keep(7, 7))]
    for mask in masks:
        query = torch.randn(B, H, 7, 4, requires_grad=True)
        out = attention(query, query, query, mask=mask, backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), query)
        dense = mask.to_dense(B, H, 7, 7)
        expected = attention(query, query, query, mask=Mask.dense(dense), backend=backend)
        assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), query)[0])


def test_the_cache_stays_small():
    mask = Mask.key_lengths([3, 4])
    for length in range(1, 100):
        mask.kernel_form(B, H, length, length, CPU)
    assert len(mask._cache) <= 8


# The rule of the kernels, csrc/core/mask.h


@pytest.fixture
def native():
    if dispatch.NATIVE_FAILURE is not None:
        pytest.skip(f"the native library is not there: {dispatch.NATIVE_FAILURE}")
    return dispatch.load("cpu")


def check_native(native, mask, L, S):
    form = mask.kernel_form(B, H, L, S, CPU)
    dense = mask.to_dense(B, H, L, S)
    assert torch.equal(native.mask_elements(form, B, H, L, S), dense)
    for block_m, block_n in ((48, 64), (5, 64), (3, 17)):
        classes = native.mask_tile_classes(form, B, H, L, S, block_m, block_n)
        exact = tiles.dense_classes(dense, block_m, block_n)
        proven = classes != tiles.PARTIAL
        assert torch.equal(classes[proven], exact[proven])
    return classes, exact


@pytest.mark.parametrize("size", [*SIZES, (50, 130)], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_the_kernels_follow_every_constructor(native, name, size):
    mask, _ = TERMS[name](*size)
    classes, exact = check_native(native, mask, *size)
    # Arithmetic misses nothing, except that it proves nothing of a band that is empty as a whole.
    if not name.startswith(("segments", "dense", "window_nothing")):
        assert torch.equal(classes, exact)


@pytest.mark.parametrize("seed", range(40))
def test_the_kernels_follow_random_compositions(native, seed):
    g = generator(seed)
    L, S = (int(torch.randint(1, 140, (), generator=g)) for _ in range(2))
    mask = Mask(())
    for index in torch.randint(len(TERMS), (3,), generator=g).tolist():
        mask = mask & list(TERMS.values())[index](L, S)[0]
    check_native(native, mask, L, S)


# torch.compile and torch.export


def masked_sum(x, mask):
    L = x.shape[2]
    form = mask.kernel_form(B, H, L, L, x.device)
    return x + reference.expand(form, B, H, L, L, x.device) + mask.to_dense(B, H, L, L)


def every_constructor(x, lengths, keep, ids):
    mask = Mask.causal("bottom_right") & Mask.window(3, None) & Mask.prefix(lengths) & Mask.key_lengths(lengths)
    mask = (
        mask & Mask.key_padding(keep[:, 0, 0]) & Mask.dense(keep) & Mask.segments(ids, ids) & Mask.segments(ids, -ids)
    )
    return masked_sum(x, mask)


def tensors_for(L):
    return torch.zeros(B, H, L, L), torch.tensor([3, L]), random_keep(B, 1, L, L, seed=L), random_ids(B, L, L)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_compile_traces_building_a_mask(backend):
    compiled = torch.compile(every_constructor, backend=backend, fullgraph=True, dynamic=True)
    for L in (5, 8, 13):
        inputs = tensors_for(L)
        assert torch.equal(compiled(*inputs), every_constructor(*inputs))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_traces_a_mask_from_outside(backend):
    x, lengths, keep, ids = tensors_for(7)
    closed_over = Mask.causal() & Mask.dense(keep) & Mask.segments(ids, ids)
    compiled = torch.compile(lambda x: masked_sum(x, closed_over), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), masked_sum(x, closed_over))
    keep.logical_not_()
    assert torch.equal(compiled(x), masked_sum(x, closed_over))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_takes_a_mask_as_an_argument_without_recompiling(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(masked_sum, backend=counter, fullgraph=True)
    for seed in range(3):
        x, lengths, keep, ids = tensors_for(7)
        mask = Mask.window(2, 2) & Mask.key_lengths(lengths + seed) & Mask.dense(random_keep(7, 7, seed=seed))
        assert torch.equal(compiled(x, mask), masked_sum(x, mask))
        assert not [key for key, (_, form) in mask._cache.items() if form.tile_map and form.tile_map.live.is_meta]
    assert counter.frame_count == 1


@torch.library.custom_op("fastattn_tests::mask_tiles", mutates_args=())
def opaque_mask_tiles(masks: list[torch.Tensor], L: int, S: int, block_m: int, block_n: int) -> list[torch.Tensor]:
    return list(reference.mask_tiles(masks, L, S, block_m, block_n))


@opaque_mask_tiles.register_fake
def _(masks, L, S, block_m, block_n):
    batch, heads = (max(m.shape[d] for m in masks) for d in (0, 1))
    n_q, n_k, words, words_q, words_k = (torch.library.get_ctx().new_dynamic_size() for _ in range(5))
    shapes = [(L, words), *[(n_q, words_k)] * 2, *[(n_k, words_q)] * 2]
    return [masks[0].new_empty(batch, heads, *shape, dtype=torch.int64) for shape in shapes]


class ExportedMask(torch.nn.Module):
    def forward(self, x, mask):
        L = x.shape[2]
        form = mask.kernel_form(B, H, L, L, x.device, build=opaque_mask_tiles)
        return x + mask.to_dense(B, H, L, L) + form.key_lengths.sum() + form.tile_map.bits.sum()


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_a_mask_of_any_length_as_an_argument(strict, tmp_path):
    def inputs(L):
        x, lengths, keep, ids = tensors_for(L)
        return x, Mask.causal() & Mask.key_lengths(lengths) & Mask.dense(keep)

    length = torch.export.Dim("length", min=2)
    shapes = {"x": {2: length, 3: length}, "mask": [[], [None], [{2: length, 3: length}]]}
    exported = torch.export.export(ExportedMask(), inputs(7), dynamic_shapes=shapes, strict=strict)
    torch.export.save(exported, tmp_path / "program.pt2")
    for program in (exported, torch.export.load(tmp_path / "program.pt2")):
        for L in (7, 12, 131):
            assert torch.equal(program.module()(*inputs(L)), ExportedMask()(*inputs(L)))


# FlexAttention's block masks


def flex_dense(block_mask, mask_mod, B, H, L, S):
    """FlexAttention's rule, pair by pair, from the lists of the BlockMask."""
    block_q, block_k = block_mask.BLOCK_SIZE

    def listed(num, indices, b, h, i, j):
        if num is None:
            return False
        row = (b % num.shape[0], h % num.shape[1], i // block_q)
        return j // block_k in indices[row][: num[row]].tolist()

    def rule(b, h, i, j):
        partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices, b, h, i, j)
        full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, b, h, i, j)
        return full or (partial and bool(mask_mod(*map(torch.tensor, (b, h, i, j)))))

    return loop(rule, L, S)


def causal_mod(b, h, i, j):
    return j <= i


def head_window_mod(b, h, i, j):
    return ((i - j).abs() <= 3 * h + b) & (j > 0)


@pytest.mark.parametrize("mask_mod", [causal_mod, head_window_mod])
@pytest.mark.parametrize(("L", "S"), [(32, 32), (21, 45)])
def test_from_flex(mask_mod, L, S):
    block_mask = create_block_mask(mask_mod, B, H, L, S, device="cpu", BLOCK_SIZE=(8, 16))
    mask = Mask.from_flex(block_mask)
    assert torch.equal(mask.to_dense(B, H, L, S), flex_dense(block_mask, mask_mod, B, H, L, S))
    assert torch.equal(mask.to_dense(B, H, L, S), loop(lambda *p: bool(mask_mod(*map(torch.tensor, p))), L, S))


def test_from_flex_follows_the_blocks_and_not_only_the_function():
    L, S = 24, 32
    num = torch.tensor([[[1, 2, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1], [0, 1]]]], dtype=torch.int32)
    full_num = torch.tensor([[[1, 0, 1]]], dtype=torch.int32)
    full_indices = torch.tensor([[[[0, 1], [0, 1], [1, 0]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        num, indices, full_num, full_indices, BLOCK_SIZE=(8, 16), mask_mod=causal_mod, seq_lengths=(L, S)
    )
    dense = Mask.from_flex(block_mask).to_dense(B, H, L, S)
    assert torch.equal(dense, flex_dense(block_mask, causal_mod, B, H, L, S))
    assert dense[0, 0, 0, :16].all() and not dense[0, 0, 16:, :16].any() and dense[0, 0, 16:, 16:].all()
    without_full = BlockMask.from_kv_blocks(num, indices, BLOCK_SIZE=(8, 16), seq_lengths=(L, S))
    expected = flex_dense(without_full, lambda *p: torch.tensor(True), B, H, L, S)
    assert torch.equal(Mask.from_flex(without_full).to_dense(B, H, L, S), expected)


# -------------------------------------------------------------------------------------------------------------- plot


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib", reason="draws the mask")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def drawn(ax):
    return torch.as_tensor(ax.images[0].get_array().data)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot_colours_every_pair_by_its_tile(pyplot):
    L, S, block_m, block_n = 10, 13, 4, 3
    mask = Mask.causal()
    codes = drawn(mask.plot(L, S, block_m=block_m, block_n=block_n))
    assert codes.shape == (L, S)
    for i, j in itertools.product(range(L), range(S)):
        rows, columns = slice(i // 4 * 4, i // 4 * 4 + 4), slice(j // 3 * 3, j // 3 * 3 + 3)
        tile = mask.to_dense(1, 1, L, S)[0, 0, rows, columns]
        expected = 3 if tile.all() else 0 if not tile.any() else 1 + int(j <= i)
        assert codes[i, j] == expected, (i, j)


def test_plot_shows_one_batch_and_head_on_the_axes_given(pyplot):
    keep = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    keep[1, 2] = True
    keep[1, 1, 0, 0] = True
    ax = pyplot.subplots()[1]
    assert Mask.dense(keep).plot(8, 8, 1, 2, block_m=4, block_n=4, ax=ax) is ax
    assert labels(ax) == ["full (4)", "partial (0)", "empty (0)"]
    assert labels(Mask.dense(keep).plot(8, 8, 1, 1, block_m=4, block_n=4)) == ["full (0)", "partial (1)", "empty (3)"]
    assert labels(Mask.dense(keep).plot(8, 8, block_m=4, block_n=4)) == ["full (0)", "partial (0)", "empty (4)"]
    assert len(pyplot.get_fignums()) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch": 2}, r"batch must be an int of \[0, 2\), got 2"),
        ({"head": -1}, r"head must be an int of \[0, 1\), got -1"),
        ({"head": 0.0}, "head must be an int"),
        ({"block_n": 0}, "block_n must be a positive int"),
        ({"L": 0}, "L must be at least 1"),
        ({"S": 5}, "with S = 5 keys"),
    ],
)
def test_plot_names_bad_arguments(pyplot, arguments, says):
    mask = Mask.key_padding(torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=says):
        mask.plot(**{"L": 4, "S": 6} | arguments)
    assert not pyplot.get_fignums()


def test_plot_says_that_it_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="Mask.plot needs matplotlib"):
        Mask.causal().plot(4, 4)
