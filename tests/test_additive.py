"""Additive attention on every backend: against the formula in float64, its derivatives, masks, and what it refuses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import AdditiveAttention, Mask, additive_attention, additive_attention_weights, dispatch, ops
from fastattn.dispatch import Problem
from fastattn.testing import check_additive, random_additive_case, same_bits
from fastattn.testing.adapters import own_target
from fastattn.testing.runner import in_able_dtype

NAMES = ("query", "key", "value", "score_weight")
# rtol and atol of values, and of gradients: delta and lse are stored in float32
VALUES = {torch.float64: (1e-11, 1e-12), torch.float32: (1e-5, 2e-6)}
GRADIENTS = {torch.float64: (1e-6, 1e-7), torch.float32: (1e-4, 2e-5)}
DTYPES = pytest.mark.parametrize("dtype", VALUES, ids=str)


def tensors(B: int, L: int, S: int, A: int, Dv: int, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    """query, key, value and score_weight; scores spread over a few units."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, L, A), (B, S, A), (B, S, Dv), (A,)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[3] *= 3 / max(A, 1) ** 0.5
    return [x.to(dtype) for x in drawn]


def formula(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, keep: Tensor | None = None):
    """out and lse in one line each; rows without keys: 0 and -inf."""
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ weight
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.softmax(scores, -1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return p @ value, lse


def assert_near(actual: Tensor, expected: Tensor, tolerance: dict[torch.dtype, tuple[float, float]]) -> None:
    """expected: in float64."""
    rtol, atol = tolerance[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@DTYPES
def test_values(backend, dtype):
    inputs = tensors(2, 17, 23, 8, 5, dtype)
    out, lse = additive_attention(*inputs, return_lse=True, backend=backend)
    expected, expected_lse = formula(*(x.double() for x in inputs))
    assert_near(out, expected, VALUES)
    assert lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", range(16))
def test_random_problems(backend, index):
    """Values and gradients by contract 11, masks, empty rows, NaN in dead keys, determinism, uninitialised memory."""
    case = in_able_dtype(own_target(backend), random_additive_case(1, index, small=dispatch.TRITON_INTERPRETED))
    checks = check_additive(backend, case)
    assert not [f"{check.name}: {check.detail}" for check in checks if check.status == "fail"]


SIZES = [(1, 1, 1), (17, 1, 8), (1, 113, 59), (113, 203, 8), (203, 17, 59), (49, 65, 256), (5, 7, 33)]


@DTYPES
@pytest.mark.parametrize(("L", "S", "A"), SIZES)
def test_odd_sizes(backend, L, S, A, dtype):
    inputs = [x.requires_grad_() for x in tensors(2, L, S, A, 11, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    keep = torch.rand(2, L, S, generator=torch.Generator().manual_seed(2)) < 0.7
    keep[0, L // 2] = False
    for mask in (None, keep):
        out, lse = additive_attention(*inputs, mask=mask, return_lse=True, backend=backend)
        expected, expected_lse = formula(*exact, mask)
        assert_near(out, expected, VALUES)
        torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)
        upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        gradients = torch.autograd.grad(out, inputs, upstream)
        for actual, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
            assert_near(actual, wanted, GRADIENTS)


MASKS = {
    "causal": Mask.causal("bottom_right"),
    "window": Mask.window(3, 9),
    "prefix": Mask.prefix([0, 40]),
    "key_lengths": Mask.key_lengths([70, 0]),
    "key_padding": Mask.key_padding(torch.arange(99).remainder(5).gt(1).expand(2, 99)),
    "segments": Mask.segments(torch.arange(67).div(20).long()[None], torch.arange(99).div(30).long()[None]),
    "dense": Mask.dense(torch.arange(67 * 99).remainder(7).gt(3).view(1, 1, 67, 99)),
    "both": Mask.causal() & Mask.key_lengths([99, 30]),
}


@DTYPES
@pytest.mark.parametrize("kind", MASKS)
def test_masks(backend, kind, dtype):
    inputs = [x.requires_grad_() for x in tensors(2, 67, 99, 8, 5, dtype)]
    keep = MASKS[kind].to_dense(2, 1, 67, 99)[:, 0]
    out, lse = additive_attention(*inputs, mask=MASKS[kind], return_lse=True, backend=backend)
    expected, _ = formula(*(x.double() for x in inputs), keep)
    assert_near(out, expected, VALUES)
    empty = ~keep.any(-1)
    assert not out[empty].any() and (lse[empty] == -torch.inf).all() and torch.isfinite(lse[~empty]).all()
    gradients = torch.autograd.grad(out.square().sum() + lse[~empty].sum(), inputs)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][empty].any() and not gradients[1][~keep.any(1)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_inputs(backend, dtype):
    # Products of four exponentials beyond float32: 5, beyond float64: 30; of two: 30, 100; exponentials: 100, 400.
    for size in (5.0, 30.0, 100.0, 400.0):
        q, k, v, w = tensors(1, 50, 70, 16, 3, dtype)
        q, k = (q * size).round(), (-q[:, :1] * size).round() + k  # sums that cancel, and sums that saturate
        inputs = [x.requires_grad_() for x in (q, k, v, w)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out, expected = additive_attention(*inputs, backend=backend), formula(*exact)[0]
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)
        gradients = torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), exact)
        for actual, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(dispatch.NATIVE_FAILURE is not None, reason="the compiled library is not there")
def test_weights_of_any_size():
    """Weights near the largest number: a softmax that picks one key each; and near the smallest."""
    q, k, v, w = tensors(1, 5, 70, 16, 3, torch.float32)
    for size in (1e-42, 1e-30, 1e25, 1e37):
        inputs = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone(), (w.double() * size).float())]
        out, lse = additive_attention(*inputs, return_lse=True, backend="cpu")
        expected, expected_lse = formula(*(x.detach().double() for x in inputs))
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), inputs))


def test_infinite_and_nan_inputs(backend):
    q, k, v, w = tensors(1, 3, 5, 4, 2, torch.float32)
    k[0, 2, 1] = torch.inf
    out = additive_attention(q, k, v, w, backend=backend)
    torch.testing.assert_close(out, formula(q, k, v, w)[0])  # tanh(inf) is 1
    k[0, 2, 1] = torch.nan
    assert additive_attention(q, k, v, w, backend=backend).isnan().all()
    dead = torch.tensor([True, True, False, True, True])
    seen = additive_attention(q, k, v, w, mask=dead[None], backend=backend)
    torch.testing.assert_close(seen, formula(q, k[:, dead], v[:, dead], w)[0])


def test_sizes_of_zero(backend):
    for B, L, S, A, Dv in ((0, 3, 5, 4, 2), (2, 0, 5, 4, 2), (2, 3, 0, 4, 2), (2, 3, 5, 0, 2), (2, 3, 5, 4, 0)):
        inputs = [x.float().requires_grad_() for x in tensors(B, L, S, A, Dv)]
        out, lse = additive_attention(*inputs, return_lse=True, backend=backend)
        assert out.shape == (B, L, Dv) and lse.shape == (B, L)
        if S == 0:
            assert not out.any() and (lse == -torch.inf).all()
        if A == 0 and S:
            torch.testing.assert_close(out, inputs[2].mean(1, keepdim=True).expand_as(out))
        out.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape and x.grad.isfinite().all() for x in inputs)


@pytest.mark.skipif(dispatch.NATIVE_FAILURE is not None, reason="the compiled library is not there")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_value(threads, masked, large):
    """A large query or key takes another formula: how many others share it must not depend on the threads."""
    inputs = [x.float() for x in tensors(1, 700, 300, 24, 8)]
    if large:
        inputs[0][:, 40] *= 12
        inputs[1][:, 100] *= 12
    inputs = [x.requires_grad_() for x in inputs]
    mask = Mask.causal() if masked else None

    def run():
        out = additive_attention(*inputs, mask=mask, backend="cpu")
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    before, expected = torch.get_num_threads(), run()
    try:
        torch.set_num_threads(threads)
        first, second = run(), run()
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    assert all(same_bits(a, b) for a, b in zip(first, expected, strict=True))


@pytest.mark.skipif(dispatch.NATIVE_FAILURE is not None, reason="the compiled library is not there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strides_and_half_precision(dtype):
    """Inputs in any layout give the bits of contiguous ones; a float32 weight goes with half precision."""
    q, k, v, w = tensors(2, 33, 70, 24, 17, dtype)
    expected = additive_attention(q, k, v, w.float(), backend="cpu")
    torch.testing.assert_close(expected.double(), formula(*(x.double() for x in (q, k, v, w)))[0], rtol=1e-2, atol=1e-2)
    wide = [torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[-1]] for x in (q, k, v)]
    assert same_bits(additive_attention(*wide, w.float(), backend="cpu"), expected)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert same_bits(additive_attention(*turned, w.float(), backend="cpu"), expected)
    columns = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert same_bits(additive_attention(*columns, w.float(), backend="cpu"), expected)


def test_memory():
    """Forward and backward at L = S = 4096, A = 64 within a fraction of L x S floats, let alone L x S x A."""
    if dispatch.NATIVE_FAILURE is not None:
        pytest.skip("the compiled library is not there")
    code = (
        "import torch, fastattn\n"
        "def peak():\n"
        "    return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM')) * 1024\n"
        "def run(n):\n"
        "    q, k, v = (torch.randn(1, n, 64, requires_grad=True) for _ in range(3))\n"
        "    w = torch.randn(64, requires_grad=True)\n"
        "    fastattn.additive_attention(q, k, v, w, backend='cpu').sum().backward()\n"
        "torch.set_num_threads(2)\n"
        "run(64); before = peak(); run(4096)\n"
        "print(peak() - before)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of the memory is read from /proc")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    inputs = 4 * 4096 * 64
    # Three inputs, the output and their gradients; e^(2 q); tiles.
    assert int(result.stdout) < 12 * inputs < 4 * 4096 * 4096


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_gradcheck(backend, dtype):
    inputs = [x.requires_grad_() for x in tensors(2, 3, 5, 4, 3, dtype)]
    mask = Mask.causal("bottom_right") & Mask.key_padding(torch.tensor([[1, 0, 1, 1, 1], [0, 0, 1, 0, 1]]).bool())

    def function(*inputs: Tensor) -> Tensor:
        return additive_attention(*inputs, mask=mask, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_weights_sum_the_values():
    q, k, v, w = tensors(2, 7, 9, 8, 3)
    keep = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[0, 3] = False
    out, lse = additive_attention(q, k, v, w, mask=keep, return_lse=True)
    weights = additive_attention_weights(q, k, lse, w, mask=keep)
    assert weights.shape == (2, 7, 9) and not weights[~keep].any()
    torch.testing.assert_close(weights @ v, out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_is_bahdanau(bias):
    torch.manual_seed(0)
    module = AdditiveAttention(6, 4, 8, bias=bias)
    states, annotations = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    out, weights = module(states, annotations, need_weights=True)
    hidden = annotations @ module.key_projection.weight.T
    compared = states @ module.query_projection.weight.T
    if bias:
        compared = compared + module.query_projection.bias
    scores = torch.tanh(compared[:, :, None] + hidden[:, None]) @ module.score_weight
    expected = torch.softmax(scores, -1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, expected @ annotations)
    assert module(states, annotations)[1] is None
    out.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in module.parameters())


def test_relatives_of_the_textbooks():
    q, k, v, w = tensors(2, 3, 5, 4, 3)
    dot = fastattn.attention(*(x.unsqueeze(1) for x in (q, k, v)), scale=1.0).squeeze(1)
    torch.testing.assert_close(dot, torch.softmax(q @ k.transpose(1, 2), -1) @ v)
    pooled = additive_attention(k.new_zeros(2, 1, 4), k, v, w)
    torch.testing.assert_close(pooled.squeeze(1), (torch.softmax(torch.tanh(k) @ w, -1).unsqueeze(-1) * v).sum(1))


@pytest.mark.parametrize(("position", "shape"), list(itertools.product(range(3), [(2, 3), (3, 7, 4), (2, 7, 5)])))
def test_shapes_that_do_not_fit(position, shape):
    inputs = tensors(2, 7, 7, 4, 4)
    inputs[position] = torch.zeros(shape, dtype=torch.float64)
    if position == 2 and shape == (2, 7, 5):
        additive_attention(*inputs)  # Dv is free
        return
    with pytest.raises(ValueError, match=NAMES[position]):
        additive_attention(*inputs)


def test_bad_input():
    q, k, v, w = tensors(2, 3, 5, 4, 3)
    with pytest.raises(TypeError, match="key must be a tensor, got list"):
        additive_attention(q, [1], v, w)
    with pytest.raises(TypeError, match="score_weight must be a tensor"):
        additive_attention(q, k, v, 1.0)
    with pytest.raises(ValueError, match=r"score_weight must have shape \(A,\) = \(4,\).* got \(5,\)"):
        additive_attention(q, k, v, w.new_zeros(5))
    with pytest.raises(TypeError, match="score_weight must have the dtype of query"):
        additive_attention(q.float(), k.float(), v.float(), w)
    with pytest.raises(TypeError, match="the same dtype"):
        additive_attention(q, k.float(), v, w)
    with pytest.raises(TypeError, match="query must be float32"):
        additive_attention(q.int(), k, v, w)
    with pytest.raises(ValueError, match=r"mask must broadcast to \(B, L, S\) = \(2, 3, 5\), got .*\(3, 4\)"):
        additive_attention(q, k, v, w, mask=torch.ones(3, 4).bool())
    with pytest.raises(TypeError, match="mask must be a Mask or a bool tensor"):
        additive_attention(q, k, v, w, mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="mask must broadcast"):
        additive_attention(q, k, v, w, mask=Mask.dense(torch.ones(2, 4, 3, 5).bool()))
    with pytest.raises(ValueError, match="backend must be one of"):
        additive_attention(q, k, v, w, backend="none")
    with pytest.raises(RuntimeError, match="it has no kernel of additive attention"):
        additive_attention(q, k, v, w, backend="cuda")
    with pytest.raises(ValueError, match=r"lse must have shape \(B, L\) = \(2, 3\)"):
        additive_attention_weights(q, k, q.new_zeros(2, 4), w)
    with pytest.raises(TypeError, match="lse must be float32"):
        additive_attention_weights(q, k, q.new_zeros(2, 3).half(), w)
    with pytest.raises(ValueError, match="hidden_dim must be at least 1"):
        AdditiveAttention(4, 4, 0)
    with pytest.raises(TypeError, match="key_dim must be an int"):
        AdditiveAttention(4, 4.0, 8)
    with pytest.raises(ValueError, match=r"query must have shape \(B, L, 6\)"):
        AdditiveAttention(6, 4, 8)(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))


# The operator --------------------------------------------------------------------------------------------------------


def operator_arguments(backend: str, dtype=torch.float32) -> tuple:
    mask = Mask.causal() & Mask.dense(torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(4)) < 0.8)
    inputs = [x.requires_grad_() for x in tensors(2, 7, 9, 8, 5, dtype)]
    tile = dispatch.BACKENDS[backend].tile
    return *inputs, *ops.flatten_mask(mask.kernel_form(2, 1, 7, 9, torch.device("cpu"), *tile)), backend


def test_opcheck(backend):
    arguments = operator_arguments(backend)
    torch.library.opcheck(torch.ops.fastattn.additive_attention.default, arguments)
    out, lse = torch.ops.fastattn.additive_attention(*arguments)
    inputs, rest = [x.detach() for x in arguments[:4]], arguments[4:]
    for grad_lse in (None, torch.randn(2, 7)):
        backward = (torch.randn(2, 7, 5), grad_lse, *inputs, out.detach(), lse.detach(), *rest)
        torch.library.opcheck(torch.ops.fastattn.additive_attention_backward.default, backward)


def test_compile(backend):
    module = AdditiveAttention(6, 4, 8, backend=backend)
    states, annotations = torch.randn(2, 3, 6), torch.randn(2, 5, 4)

    def run(module):
        out, weights = module(states, annotations, mask=Mask.key_lengths([5, 2]), need_weights=True)
        return out, weights, *torch.autograd.grad(out.square().sum(), list(module.parameters()))

    for actual, expected in zip(
        run(torch.compile(module, fullgraph=True, backend="aot_eager")), run(module), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_transforms(backend, dtype):
    q, k, v, w = tensors(2, 3, 5, 4, 3, dtype)

    def function(q: Tensor, w: Tensor) -> Tensor:
        return additive_attention(q, k, v, w, backend=backend).square().sum()

    def plain(q: Tensor, w: Tensor) -> Tensor:
        return formula(q, k, v, w)[0].square().sum()

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(q, w),
        lambda f: torch.func.jvp(f, (q, w), (q.cos(), w.sin())),
        lambda f: torch.func.hessian(lambda w: f(q, w))(w),
        lambda f: torch.vmap(f, (None, 0))(q, torch.stack((w, 2 * w))),
    ):
        torch.testing.assert_close(transform(function), transform(plain), rtol=1e-6, atol=1e-9)


def test_autocast(backend):
    module = AdditiveAttention(6, 4, 8, backend=backend)
    states, annotations = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = module(states, annotations)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(states, annotations)[0], rtol=3e-2, atol=3e-2)
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in module.parameters())


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [x.requires_grad_() for x in tensors(2, 7, 9, 8, 5)]
    with FlopCounterMode(display=False) as counter:
        out = additive_attention(*inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 2 * 7 * 9 * (8 + 5)
    assert counter.get_total_flops() - forward == 2 * 2 * 7 * 9 * (4 * 8 + 2 * 5)


def test_the_formula_of_exported_programs():
    from fastattn.integrations.export import decompositions

    arguments = operator_arguments("reference", torch.float64)
    keep = Mask.key_lengths([4, 0]).kernel_form(2, 1, 7, 9, torch.device("cpu"))
    for mask in (arguments[4:-1], ops.flatten_mask(keep), ops.flatten_mask(None)):
        actual = decompositions()[torch.ops.fastattn.additive_attention.default](*arguments[:4], *mask, "reference")
        expected = torch.ops.fastattn.additive_attention(*arguments[:4], *mask, "reference")
        torch.testing.assert_close(actual, expected)


def test_dispatch_names_what_lacks_it():
    explanation = dispatch.explain_problem(Problem("additive_attention", "cpu", torch.float32))
    assert explanation.chosen in ("triton", "cpu", "reference")
    assert "it has no kernel of additive attention" in str(explanation)


def test_weights_under_autocast_are_those_of_the_output():
    query, key, value, weight = tensors(1, 8, 200, 64, 4, torch.float32)
    inputs = query * 2, key * 2, value, weight * 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, lse = additive_attention(*inputs, return_lse=True)
        weights = additive_attention_weights(*inputs[:2], lse, inputs[3])
    cast = [x.bfloat16() for x in inputs[:3]]
    _, lse = additive_attention(*cast, inputs[3], return_lse=True)
    assert torch.equal(weights, additive_attention_weights(*cast[:2], lse, inputs[3]))
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(1, 8), rtol=0, atol=1e-2)


def test_second_derivative_within_an_autocast_region_is_that_outside():
    def second(within: bool) -> tuple[Tensor, ...]:
        inputs = [x.requires_grad_() for x in tensors(1, 8, 20, 64, 4, torch.float32)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = additive_attention(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            first = torch.autograd.grad(out.float().square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    assert all(torch.equal(x, y) for x, y in zip(second(True), second(False), strict=True))
