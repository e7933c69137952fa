"""Packed sequences: `attention_varlen` against the padded call and float64, and `varlen_attn` against the meaning of
torch's function of that name, written out sequence by sequence (torch's own runs on GPUs alone)."""

from __future__ import annotations

import inspect
import time
from collections import namedtuple
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from torch.testing import assert_close

import fastattn
from fastattn import Mask, dispatch
from fastattn.attention import varlen_attn
from fastattn.testing import cases
from fastattn.testing.adapters import TENSOR_CORE_BACKENDS, multiplies_pairs
from fastattn.testing.compare import compare, sdpa_peer
from fastattn.testing.oracle import attention_oracle

HEADS_Q, HEADS_KV, DIM, DIM_V = 4, 2, 16, 12
EQUAL = ((5, 1, 0, 70), (5, 1, 0, 70))
DIFFERENT = ((5, 1, 3, 40, 2), (7, 0, 2, 65, 9))
LAST = "bottom_right"


def starts(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def packs(lengths_q, lengths_k, dtype=torch.float32, requires_grad=True, dims=(DIM, DIM_V)) -> list[Tensor]:
    """query (Tq, Hq, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv)."""
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    shapes = ((total_q, HEADS_Q, dims[0]), (total_k, HEADS_KV, dims[0]), (total_k, HEADS_KV, dims[1]))
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def sequences(pack: Tensor, cu: Tensor) -> Iterator[Tensor]:
    return (pack[first:last] for first, last in zip(cu[:-1], cu[1:], strict=True))


def allowed_pairs(lengths_q, lengths_k, left=None, right=None, align="top_left", used=None) -> Tensor:
    """(Tq, Tk): the pairs within one sequence that lie in its window."""
    blocks = []
    for n, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        live = length_k if used is None else used[n]
        offset = 0 if align == "top_left" else live - length_q
        distance = torch.arange(length_k) - torch.arange(length_q)[:, None] - offset
        keep = (torch.arange(length_k) < live).expand(length_q, -1)
        keep = keep if left is None else keep & (distance >= -left)
        blocks.append(keep if right is None else keep & (distance <= right))
    return torch.block_diag(*blocks).bool() if blocks else torch.zeros(0, 0, dtype=torch.bool)


def assert_within_the_bound(tensors, allowed, out, lse, backend):
    """out (Tq, Hq, Dv), lse (Hq, Tq) and the gradients under random upstream ones, by the harness's criterion."""
    query, key, value = tensors
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad([out, lse], tensors, [grad_out, grad_lse])
    sizes = {"heads_q": HEADS_Q, "heads_kv": HEADS_KV, "len_q": len(query), "len_k": len(key), "dtype": query.dtype}
    batched = [x.detach().transpose(0, 1)[None] for x in (*tensors, grad_out)]
    dense = cases.Term(cases.TermSpec("dense", shape=(1, 1, *allowed.shape)), (allowed[None, None],))
    problem = cases.Problem(
        cases.Case(0, 0, dim_qk=DIM, dim_v=DIM_V, lse_grad=True, **sizes),
        *batched[:3],
        bias=None,
        terms=(dense,),
        grad_out=batched[3],
        grad_lse=grad_lse[None],
    )
    pairs = allowed.expand(1, HEADS_Q, -1, -1)
    tensor_cores = backend in TENSOR_CORE_BACKENDS
    rounds = backend == "cpu" and multiplies_pairs(problem.case)
    expected = attention_oracle(problem, pairs, None, tensor_cores=tensor_cores, pairs=rounds)
    peer = sdpa_peer(problem, pairs, None, tensor_cores=tensor_cores)
    seen = {"out": out, "dq": grads[0], "dk": grads[1], "dv": grads[2]}
    seen = {name: x.transpose(0, 1)[None] for name, x in seen.items()} | {"lse": lse[None]}
    for name, actual in seen.items():
        rows = pairs.any(-1) if name in ("out", "lse", "dq") else None
        peer_result = peer[name].float() if name == "lse" else peer[name]
        noise, element_noise = expected.noise[name], expected.element_noise.get(name)
        found = compare(name, actual, expected.values[name], noise, peer_result, rows, element_noise)
        assert found.ok, f"{name}: {found.message}"
    empty = ~pairs[0, 0].any(-1)
    assert not out[empty].any() and not grads[0][empty].any() and bool((lse[:, empty] == float("-inf")).all())


# attention_varlen ----------------------------------------------------------------------------------------------------

MASKS = {
    "none": (None, {}),
    "causal": (Mask.causal(), {"right": 0}),
    "causal at the end": (Mask.causal(LAST), {"right": 0, "align": LAST}),
    "window": (Mask.window(3, 2), {"left": 3, "right": 2}),
    "window at the end": (Mask.window(20, 0, LAST), {"left": 20, "right": 0, "align": LAST}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [EQUAL, DIFFERENT], ids=["equal", "different"])
def test_within_the_bound_of_the_harness(lengths, mask, dtype, backend):
    tensors = packs(*lengths, dtype)
    given, window = MASKS[mask]
    out, lse = fastattn.attention_varlen(
        *tensors, starts(lengths[0]), starts(lengths[1]), mask=given, return_lse=True, backend=backend
    )
    assert_within_the_bound(tensors, allowed_pairs(*lengths, **window), out, lse, backend)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [EQUAL, DIFFERENT], ids=["equal", "different"])
def test_the_padded_call_has_the_same_numbers(lengths, mask, dtype, backend):
    lengths_q, lengths_k = lengths
    tensors = packs(lengths_q, lengths_k, dtype)
    given, window = MASKS[mask]
    packed = fastattn.attention_varlen(*tensors, starts(lengths_q), starts(lengths_k), mask=given, backend=backend)

    def pad(pack: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(pack.split(lengths)), batch_first=True).transpose(1, 2)

    keep = torch.zeros(len(lengths_q), 1, max(lengths_q), max(lengths_k), dtype=torch.bool)
    for n, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        keep[n, 0, :length_q, :length_k] = allowed_pairs((length_q,), (length_k,), **window)
    padded = fastattn.attention(
        *(pad(x, n) for x, n in zip(tensors, (lengths_q, lengths_k, lengths_k), strict=True)),
        mask=keep,
        backend=backend,
    )
    padded = torch.cat([padded[n, :, :length].transpose(0, 1) for n, length in enumerate(lengths_q)])
    upstream = torch.randn_like(packed)
    grads = [torch.autograd.grad(out, tensors, upstream) for out in (packed, padded)]
    for seen, expected in zip((packed, *grads[0]), (padded, *grads[1]), strict=True):
        assert_close(seen, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mask", [None, Mask.causal(LAST)], ids=repr)
@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (0, 0)), ((0, 0), (3, 0)), ((2, 1), (0, 0))])
def test_empty_sequences(lengths, mask, backend):
    tensors = packs(*lengths)
    cu_q, cu_k = starts(lengths[0]), starts(lengths[1])
    out, lse = fastattn.attention_varlen(*tensors, cu_q, cu_k, mask=mask, return_lse=True, backend=backend)
    assert out.shape == (sum(lengths[0]), HEADS_Q, DIM_V) and not out.any()
    assert lse.shape == (HEADS_Q, sum(lengths[0])) and bool((lse == float("-inf")).all())
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert not grad.any()


@pytest.mark.parametrize("mask", [None, Mask.causal(LAST)], ids=repr)
def test_dropout_is_reproducible_and_its_gradient_fits(mask, backend):
    lengths = (6, 4), (6, 7)
    query, key = torch.zeros(10, HEADS_Q, DIM), torch.zeros(13, HEADS_KV, DIM)
    value = torch.eye(13)[:, None].expand(-1, HEADS_KV, -1).clone().requires_grad_()

    def run() -> Tensor:
        torch.manual_seed(3)
        cu_q, cu_k = starts(lengths[0]), starts(lengths[1])
        return fastattn.attention_varlen(query, key, value, cu_q, cu_k, mask=mask, dropout_p=0.5, backend=backend)

    weights = run()  # over one-hot values: (Tq, Hq, Tk)
    assert torch.equal(weights, run())
    kept = weights != 0
    within = allowed_pairs(*lengths, right=None if mask is None else 0, align=LAST)[:, None].expand_as(kept)
    assert not kept[~within].any() and 0.2 < float(kept[within].float().mean()) < 0.8
    # What the forward dropped gets no gradient: dV of head h is the sum of its weights.
    upstream = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, value, upstream)
    grouped = torch.einsum("qhk,qhd->khd", weights.detach(), upstream)
    assert_close(grad, grouped.unflatten(1, (HEADS_KV, -1)).sum(2))


@pytest.mark.parametrize("given", [{}, {"mask": Mask.causal()}, {"mask": Mask.window(4, None)}], ids=str)
def test_compiles_with_one_cu_seqlens(given, backend):
    tensors, cu = packs(*EQUAL), starts(EQUAL[0])

    def function(query: Tensor, key: Tensor, value: Tensor, cu: Tensor) -> Tensor:
        return fastattn.attention_varlen(query, key, value, cu, cu, backend=backend, **given)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, seen = function(*tensors, cu), compiled(*tensors, cu)
    assert torch.equal(seen, expected)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (seen, expected)), strict=True):
        assert torch.equal(a, b)


def test_sequences_apart_leave_one_gradient_a_tensor():
    tensors = packs(*DIFFERENT)
    out = fastattn.attention_varlen(*tensors, *map(starts, DIFFERENT), mask=Mask.causal(LAST))
    seen, waiting, kinds = set(), [out.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            kinds.append(type(node).__name__)
            waiting += [following for following, _ in node.next_functions]
    assert kinds.count("SplitWithSizesBackward0") == 3
    assert not any("Slice" in kind for kind in kinds)


@pytest.mark.parametrize("given", [None, Mask.causal(), "different"], ids=str)
@pytest.mark.skipif(dispatch.NATIVE_FAILURE is not None, reason=f"no native library: {dispatch.NATIVE_FAILURE}")
def test_no_padding_is_computed(given):
    """Time goes with the sum of the squares: 16 sequences of 128 have a sixteenth of what one of 2048 has."""

    def seconds(lengths: tuple[int, ...]) -> float:
        tensors = packs(lengths, lengths, dims=(64, 64))
        mask, cu = (Mask.causal(LAST), starts(lengths)) if given == "different" else (given, starts(lengths))
        other = cu
        if given == "different":  # one query less in the first sequence: all run apart
            tensors[0] = tensors[0].detach()[1:].requires_grad_()
            other = torch.cat((cu[:1], cu[1:] - 1))
        taken = []
        for _ in range(3):
            begin = time.thread_time()
            out = fastattn.attention_varlen(*tensors, other, cu, mask=mask, backend="cpu")
            torch.autograd.grad(out.sum(), tensors)
            taken.append(time.thread_time() - begin)
        return min(taken)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert seconds((128,) * 16) < 0.5 * seconds((2048,))
    finally:
        torch.set_num_threads(before)


# varlen_attn ---------------------------------------------------------------------------------------------------------


def expected_varlen(tensors, lengths_q, lengths_k, window=(-1, -1), used=None, scale=None) -> Tensor:
    """torch's meaning, one sequence after the other: the window is aligned to the last key in use."""
    outs = []
    query, key, value = tensors
    pieces = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    for n, (q, k, v) in enumerate(pieces):
        live = len(k) if used is None else used[n]
        left, right = (None if side < 0 else side for side in window)
        keep = allowed_pairs((len(q),), (live,), left, right, align=LAST)
        empty = ~keep.any(-1)
        batched = (x.transpose(0, 1)[None] for x in (q, k[:live], v[:live]))
        if live == 0:
            outs.append(q.new_zeros(len(q), HEADS_Q, v.shape[-1]))
            continue
        out = F.scaled_dot_product_attention(*batched, keep | empty[:, None], scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1).masked_fill(empty[:, None, None], 0.0))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 0), (3, 5), (0, -1)], ids=str)
@pytest.mark.parametrize("used", [None, (6, 0, 1, 33, 9)], ids=["all keys", "seqused_k"])
@pytest.mark.parametrize("lengths", [DIFFERENT, (DIFFERENT[1],) * 2], ids=["different", "equal"])
def test_means_what_torchs_means(lengths, window, used, backend):
    tensors = packs(*lengths)
    options = {"window_size": window, "enable_gqa": True, "scale": 0.3}
    if used is not None:
        options["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    cu_q, cu_k = map(starts, lengths)
    with fastattn.use_backend(backend):
        out = varlen_attn(*tensors, cu_q, cu_k, max(lengths[0]), max(lengths[1]), **options)
    expected = expected_varlen(tensors, *lengths, window, used, scale=0.3)
    assert_close(out, expected, rtol=2e-5, atol=2e-5)
    upstream = torch.randn_like(out)
    for seen, wanted in zip(
        torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        assert_close(seen, wanted, rtol=2e-4, atol=2e-5)


def test_has_torchs_signature():
    ours, theirs = (inspect.signature(f).parameters for f in (varlen_attn, torch_varlen.varlen_attn))
    for name, parameter in theirs.items():  # older torch has fewer
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    first = list(theirs)[:7]
    assert list(ours)[:7] == first


@pytest.mark.parametrize("request_of", [torch_varlen.AuxRequest, namedtuple("Wish", "lse")])
def test_lse_is_returned_when_asked_for(request_of):
    tensors = packs(*DIFFERENT, requires_grad=False)
    arguments = (*tensors, *map(starts, DIFFERENT), 40, 65)
    plain = varlen_attn(*arguments, enable_gqa=True, return_aux=request_of(lse=False))
    out, lse = varlen_attn(*arguments, enable_gqa=True, return_aux=request_of(lse=True))
    assert torch.equal(out, plain)
    assert lse.shape == (HEADS_Q, 51) and lse.dtype == torch.float32
    scores = torch.einsum("qhd,khd->hqk", tensors[0], tensors[1].repeat_interleave(2, 1)) / DIM**0.5
    expected = scores.masked_fill(~allowed_pairs(*DIFFERENT), float("-inf")).logsumexp(-1)
    assert_close(lse, expected)


def test_a_paged_cache_is_read_through_its_table(backend):
    page, used, lengths_q = 4, (9, 0, 4, 6), (2, 1, 1, 3)
    table = torch.tensor([[7, 2, 5], [-1, -1, -1], [0, 99, 99], [3, 1, -1]], dtype=torch.int32)
    query = torch.randn(sum(lengths_q), HEADS_Q, DIM, requires_grad=True)
    pools = [torch.randn(8, page, HEADS_KV, dim, requires_grad=True) for dim in (DIM, DIM_V)]
    pages = [row[: -(-n // page)].tolist() for row, n in zip(table, used, strict=True)]
    key, value = (
        torch.cat([pool[listed].flatten(0, 1)[:n] for listed, n in zip(pages, used, strict=True)]) for pool in pools
    )
    expected = expected_varlen((query, key, value), lengths_q, used, (-1, 0))
    options = {"seqused_k": torch.tensor(used), "block_table": table, "enable_gqa": True, "window_size": (-1, 0)}
    with fastattn.use_backend(backend):
        out = varlen_attn(query, *pools, starts(lengths_q), None, 3, 12, **options)
    assert_close(out, expected, rtol=2e-5, atol=2e-5)
    tensors = (query, *pools)
    for seen, wanted in zip(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        assert_close(seen, wanted, rtol=2e-4, atol=2e-5)


def test_one_split_makes_a_sequence_independent_of_the_others(backend):
    lengths = (40, 9, 70)
    tensors = packs(lengths, lengths, requires_grad=False)
    cu = starts(lengths)
    options = {"enable_gqa": True, "num_splits": 1}
    with fastattn.use_backend(backend):
        out = varlen_attn(*tensors, cu, cu, 70, 70, **options)
        for seen, *alone in zip(*(sequences(x, cu) for x in (out, *tensors)), strict=True):
            own = starts((len(seen),))
            assert torch.equal(seen, varlen_attn(*alone, own, own, 70, 70, **options))


def test_torchs_call_compiles_for_every_length():
    def function(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        options = {"window_size": (-1, 0), "enable_gqa": True, "return_aux": torch_varlen.AuxRequest(lse=True)}
        return varlen_attn(query, key, value, cu, cu, longest, longest, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9):
        tensors, cu = packs((3, length), (3, length)), starts((3, length))
        expected, seen = function(*tensors, cu, length), compiled(*tensors, cu, length)
        assert torch.equal(seen[0], expected[0]) and torch.equal(seen[1], expected[1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace` is deprecated")
def test_a_traced_call_takes_other_lengths_of_the_same_sum():
    # Few queries and many keys, which are run apart when the lengths are known.
    heads, dim, queries = 16, 64, (1, 1, 1, 1)
    tensors = [torch.randn(total, heads, dim) for total in (4, 12000, 12000)]
    traced = torch.jit.trace(
        fastattn.attention_varlen, (*tensors, starts(queries), starts((1000, 2000, 3000, 6000))), check_trace=False
    )
    cu = starts(queries), starts((7000, 0, 4999, 1))
    assert_close(traced(*tensors, *cu), fastattn.attention_varlen(*tensors, *cu))


def test_decoding_compiles():
    lengths = (1, 1, 1), (5, 9, 70)
    tensors = packs(*lengths, requires_grad=False)
    used = torch.tensor([5, 2, 64])

    def function(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, used: Tensor) -> Tensor:
        return varlen_attn(query, key, value, cu_q, cu_k, 1, 70, window_size=(-1, 0), enable_gqa=True, seqused_k=used)

    arguments = (*tensors, *map(starts, lengths), used)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), expected_varlen(tensors, *lengths, used=used.tolist()))
    with pytest.raises(Exception, match="num_splits=1"):
        apart = torch.compile(lambda *x: varlen_attn(*x, 1, 70, enable_gqa=True, num_splits=1), fullgraph=True)
        apart(*arguments[:5])


CU = starts((5, 7))
POOL = torch.zeros(3, 4, 2, DIM)
TABLE, USED = torch.tensor([[0, 1], [2, 0]]), torch.tensor([8, 3])
BAD = [
    ({"query": torch.zeros(12, 4, 2, DIM)}, ValueError, "query must have 3 dimensions"),
    ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
    ({"enable_gqa": False}, ValueError, r"same number of heads, got Hq=4 and Hkv=2.*enable_gqa=True"),
    ({"query": torch.zeros(12, 3, DIM)}, ValueError, "heads of query must be a multiple.*Hq=3 and Hkv=2"),
    ({"cu_seq_q": CU.float()}, TypeError, "cu_seq_q must be an int32 or int64 tensor"),
    ({"cu_seq_q": CU[:2]}, ValueError, "cu_seq_q must go from 0 to the number of tokens, 12"),
    ({"cu_seq_k": starts((5, 4, 3))}, ValueError, "must count the same sequences, got 2 and 3"),
    ({"cu_seq_k": None}, ValueError, "cu_seq_k must be given"),
    ({"max_q": 6}, ValueError, "max_q must be at least the longest sequence, 7, got 6"),
    ({"max_k": 1}, ValueError, "max_k must be at least the longest sequence, 7, got 1"),
    ({"max_q": 7.0}, TypeError, "max_q must be an int, got float"),
    ({"window_size": (1, 2, 3)}, ValueError, "window_size must have length 2, got 3"),
    ({"window_size": (1.5, 2)}, TypeError, "window_size must be two ints"),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"return_aux": True}, TypeError, "return_aux must be an AuxRequest.*bool"),
    ({"return_aux": namedtuple("R", "lse max_scores")(True, True)}, ValueError, "return_aux.*max_scores"),
    ({"num_splits": -1}, ValueError, "num_splits must not be negative"),
    ({"num_splits": 1.0}, TypeError, "num_splits must be an int"),
    ({"seqused_k": [3, 4]}, TypeError, "seqused_k must be an int32 or int64 tensor"),
    ({"seqused_k": torch.tensor([3])}, ValueError, r"seqused_k must have shape \(N,\) = \(2,\)"),
    ({"seqused_k": torch.tensor([6, 7])}, ValueError, r"seqused_k must be between 0 and.*\[5, 7\], got \[6, 7\]"),
    ({"block_table": TABLE}, ValueError, "block_table needs seqused_k"),
    ({"block_table": TABLE, "seqused_k": USED}, ValueError, "key must be a pool"),
    (
        {"block_table": TABLE, "seqused_k": USED[:1], "key": POOL, "value": POOL},
        ValueError,
        "seqused_k must have shape",
    ),
    ({"block_table": TABLE.float(), "seqused_k": USED, "key": POOL, "value": POOL}, TypeError, "block_table must be"),
    (
        {"block_table": TABLE + 1, "seqused_k": USED, "key": POOL, "value": POOL},
        ValueError,
        "pages of the pool, 0 to 2",
    ),
    ({"block_table": TABLE, "seqused_k": USED + 1, "key": POOL, "value": POOL}, ValueError, "hold, 8, got"),
    (
        {"block_table": TABLE, "seqused_k": 0 * USED, "key": POOL[:, :0], "value": POOL[:, :0]},
        ValueError,
        "pages that hold a token",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    changed, error, message = BAD[case]
    query, key = torch.zeros(12, 4, DIM), torch.zeros(12, 2, DIM)
    arguments = {"query": query, "key": key, "value": key, "cu_seq_q": CU, "cu_seq_k": CU, "max_q": 7, "max_k": 7}
    with pytest.raises(error, match=message):
        varlen_attn(**{**arguments, "enable_gqa": True, **changed})
