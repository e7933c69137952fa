"""Additive attention on the Triton backend, by the harness: values, gradients, memory, leaks, determinism."""

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.testing import Case, TermSpec, check_additive, random_additive_case
from fastattn.testing.cases import TERM_KINDS, AdditiveCase
from fastattn.testing.checks import FAIL

SIZE = dict(batch=2, len_q=21, len_k=70, dim_qk=13, dim_v=5)


def assert_passes(case):
    failed = [f"{check.name}: {check.detail}" for check in check_additive("triton", case) if check.status == FAIL]
    assert not failed, "\n".join(failed)


def case(spread=1.0, weight_float32=False, **more):
    return AdditiveCase(Case(seed=5, index=1, **(SIZE | more)), spread, weight_float32)


def term(kind, **more):
    return TermSpec(kind, left=20, right=9, **({"shape": (21, 70), "pattern": "random"} | more))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TERM_KINDS)
def test_mask_kinds(kind):
    assert_passes(case(terms=(term(kind),), lse_grad=True))


@pytest.mark.slow
def test_rows_without_keys_in_tiles_with_others():
    assert_passes(case(terms=(term("dense", pattern="empty_rows"), term("key_lengths"))))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_half_precision(dtype):
    dense = term("dense", shape=(21, 33))
    assert_passes(case(dtype=dtype, batch=1, len_k=33, terms=(dense,), weight_float32=True, layout="sliced"))


# Products that are cut off, and exponentials that float32 does not hold.
@pytest.mark.parametrize("spread", [pytest.param(12.0, marks=pytest.mark.slow), 40.0])
def test_large_numbers(spread):
    assert_passes(case(spread, batch=1, len_k=40, terms=(term("window"),)))


# More features, and more of a value, than a program holds; in 16 bits it holds two tiles of a value.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(300, 9), (7, 270), (7, 140), (1, 1)], ids=str)
def test_chunks(dims, dtype):
    assert_passes(case(batch=1, len_q=9, len_k=11, dim_qk=dims[0], dim_v=dims[1], dtype=dtype, lse_grad=True))


@pytest.mark.parametrize("empty", ["batch", "len_q", "len_k"])
def test_empty_tensors(empty):
    assert_passes(case(**{empty: 0}, terms=(term("causal"),)))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(8))
def test_random_problems(index):
    assert_passes(random_additive_case(31, index, torch.bfloat16 if index % 4 == 3 else torch.float32, small=True))


def test_tiles_of_large_numbers_beside_others():
    # Only some tiles hold a number beyond the guard, and the two ways through the code must agree where they meet.
    torch.manual_seed(4)
    query, key, value = torch.randn(1, 40, 6), torch.randn(1, 100, 6), torch.randn(1, 100, 3)
    query[0, 35, 2], key[0, 70, 3] = 60.0, -1e30
    results = []
    for backend in ("triton", "reference"):
        tensors = [x.clone().requires_grad_() for x in (query, key, value, torch.linspace(-1, 1, 6))]
        out = fastattn.additive_attention(*tensors, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_reasons():
    problem = dispatch.Problem("additive_attention", "cpu", torch.float32, 1000)
    assert dispatch.BACKENDS["triton"].why_not(problem) == []
    assert "no torch.float64" in dispatch.BACKENDS["triton"].why_not(problem._replace(dtype=torch.float64))[0]
