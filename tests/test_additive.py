"""Additive attention on every backend: against the formula in float64, its derivatives, masks, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import AdditiveAttention, Mask, additive_attention, additive_attention_weights, dispatch
from fastattn.dispatch import Problem

BACKENDS = [
    name
    for name in dispatch.BACKENDS
    if not dispatch.BACKENDS[name].why_not(Problem("additive_attention", "cpu", torch.float32))
]
NAMES = ("query", "key", "value", "score_weight")


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_values(backend):
    inputs = tensors(2, 17, 23, 8, 5)
    out, lse = additive_attention(*inputs, return_lse=True, backend=backend)
    expected, expected_lse = formula(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    assert lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = [x.requires_grad_() for x in tensors(2, 3, 5, 4, 3)]
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
