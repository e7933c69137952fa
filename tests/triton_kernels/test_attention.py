"""Attention and its weights on the Triton backend, by the harness: values, memory, empty rows, leaks, determinism."""

import pytest
import torch

import fastattn
from fastattn import Mask, dispatch
from fastattn.backends.triton import config
from fastattn.testing import (
    Case,
    TermSpec,
    WeightsCase,
    build_problem,
    check_attention,
    check_loss,
    check_weights,
    random_loss_cases,
)
from fastattn.testing.adapters import own_target
from fastattn.testing.cases import TERM_KINDS, random_case
from fastattn.testing.checks import FAIL
from fastattn.testing.runner import verify

# Beyond the keys that one tile holds, with an odd rest; and within.
LONG, SHORT = dict(len_q=70, len_k=275), dict(len_q=70, len_k=49)
SIZES = pytest.mark.parametrize("size", [LONG, SHORT], ids=["long", "short"])
LONG_IS_SLOW = pytest.mark.parametrize(
    "size", [pytest.param(LONG, marks=pytest.mark.slow), SHORT], ids=["long", "short"]
)


def assert_passes(checks):
    failed = [f"{check.name}: {check.detail}" for check in checks if check.status == FAIL]
    assert not failed, "\n".join(failed)


def term(kind, **more):
    return TermSpec(kind, left=60, right=20, shape=(70, 275), pattern="random", **more)


def case(size, **more):
    shape = dict(batch=1, heads_q=2, heads_kv=1, dim_qk=24, dim_v=24) | size | more
    terms = tuple(
        TermSpec(t.kind, t.align, t.left, t.right, (shape["len_q"], shape["len_k"]), t.pattern)
        for t in more.get("terms", ())
    )
    return Case(seed=5, index=1, **(shape | dict(terms=terms)))


@SIZES
@pytest.mark.parametrize("kind", TERM_KINDS)
def test_mask_kinds(kind, size):
    assert_passes(check_attention(own_target("triton"), case(size, heads_q=1, terms=(term(kind),))))


# Few queries share out their keys over programs, and the heads of a group are rows of one tile.
DECODING = [
    dict(heads_q=4, terms=(TermSpec("key_lengths"),), len_q=1, layout="blhd"),
    dict(heads_q=6, heads_kv=2, terms=(TermSpec("window", "bottom_right", 150, 0),), len_q=3, bias_shape=(6, 3, 1)),
    dict(heads_q=4, terms=(TermSpec("dense", pattern="empty_rows"), TermSpec("segments")), len_q=2, dropout_p=0.3),
    dict(
        heads_q=20, terms=(TermSpec("causal", "bottom_right"), TermSpec("key_padding")), len_q=1, dim_v=40, scale=-0.3
    ),
    dict(heads_q=2, terms=(TermSpec("prefix"),), len_q=2, len_k=600, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("more", DECODING, ids=[str(case(LONG, **more)) for more in DECODING])
def test_decoding(more):
    problem = build_problem(case(LONG, **more))
    assert config.forward_split(problem.query, problem.key, 24) is not None
    assert_passes(check_attention(own_target("triton"), problem.case, forward_only=True))


@LONG_IS_SLOW
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, size):
    assert_passes(check_attention(own_target("triton"), case(size, dtype=dtype, terms=(term("causal"),), dim_v=40)))


@LONG_IS_SLOW
def test_dense_blocks_with_bias_and_dropout(size):
    blocks = TermSpec("dense", pattern="blocks")
    problem = case(size, terms=(blocks, term("causal", align="bottom_right")), bias_shape=(2, 1, 1), dropout_p=0.3)
    assert_passes(check_attention(own_target("triton"), problem))


@SIZES
@pytest.mark.parametrize(
    "broadcast", ["hij", *(pytest.param(dims, marks=pytest.mark.slow) for dims in ("i", "j", "1"))]
)
def test_bias_gradients(broadcast, size):
    dims = dict(b=2, h=2, i=size["len_q"], j=size["len_k"])
    shape = tuple(n if name in broadcast else 1 for name, n in dims.items())
    problem = case(size, batch=2, bias_shape=shape, bias_has_inf=broadcast == "hij", lse_grad=True)
    assert_passes(check_attention(own_target("triton"), problem))


@LONG_IS_SLOW
@pytest.mark.parametrize("dim", [1, 59, 111])
def test_head_dims_and_layouts(dim, size):
    layout = {1: "blhd", 59: "sliced", 111: "packed"}[dim]
    assert_passes(check_attention(own_target("triton"), case(size, dim_qk=dim, dim_v=dim + 2, layout=layout)))


def test_largest_head_dim():
    problem = case(dict(len_q=20, len_k=33), heads_q=1, dim_qk=256, dim_v=256, terms=(term("causal"),))
    assert_passes(check_attention(own_target("triton"), problem))


@pytest.mark.parametrize("empty", ["batch", "len_q", "len_k"])
@pytest.mark.parametrize("kind", [None, "causal", "dense", "key_padding"])
def test_empty_tensors(empty, kind):
    problem = case(SHORT | {empty: 0}, terms=() if kind is None else (term(kind),), bias_shape=(1, 2, 1, 1))
    assert_passes(check_attention(own_target("triton"), problem))


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per head"])
@pytest.mark.parametrize(
    "kind", ["causal", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dense", "segments"))]
)
def test_attention_weights(kind, average):
    problem = case(dict(len_q=70, len_k=90), heads_q=4, heads_kv=2, terms=(term(kind),), bias_shape=(4, 1, 90))
    assert_passes(check_weights("triton", WeightsCase(problem, average)))


def test_attention_weights_with_dropout_in_half_precision():
    problem = case(dict(len_q=40, len_k=90), dtype=torch.bfloat16, dropout_p=0.4)
    assert_passes(check_weights("triton", WeightsCase(problem, True)))


@pytest.mark.parametrize("index", range(24))
def test_masked_losses(index):
    (problem,) = random_loss_cases(index + 1, 3, torch.float32 if index % 3 else torch.bfloat16)[-1:]
    assert_passes(check_loss("triton", problem))


def test_random_problems():
    verify("triton", 2, seed=23, small=True).raise_on_failure()


def test_probabilities_that_float16_holds_only_once_dropout_has_scaled_them():
    assert_passes(check_attention(own_target("triton"), random_case(29, 117, small=True)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(29, 35))  # in parts, for several processes
def test_many_random_problems(seed):
    verify("triton", 25, seed=seed, small=True).raise_on_failure()


def test_several_query_heads_see_different_keys():
    # A key that only one of the query heads attends to must be read for that one, whatever the others do.
    torch.manual_seed(3)
    query, key, value = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    keep = torch.zeros(1, 4, 40, 300, dtype=torch.bool)
    for head in range(4):
        keep[:, head, :, head * 70 : (head + 1) * 70] = True
    results = []
    for backend in ("triton", "reference"):
        tensors = [x.clone().requires_grad_() for x in (query, key, value)]
        out = fastattn.attention(*tensors, mask=Mask.dense(keep), backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_reasons():
    def reasons(device="cpu", dtype=torch.float32, dim=64):
        return dispatch.BACKENDS["triton"].why_not(dispatch.Problem("attention", device, dtype, dim))

    assert reasons() == []
    assert "no torch.float64 kernels" in reasons(dtype=torch.float64)[0]
    assert "largest head dim is 256, this one is 257" in reasons(dim=257)[0]
    assert len(reasons(device="mps", dtype=torch.float64, dim=300)) == 3
