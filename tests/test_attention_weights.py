"""attention_weights and its gradients, on every backend: against float64 written out, and against attention itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastattn import Mask, attention, attention_weights
from fastattn.testing.oracle import dropout_keep

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = tuple(TOLERANCE)
SIZES = [  # B, Hq, Hkv, L, S, D
    (1, 1, 1, 1, 1, 8),
    (2, 4, 2, 17, 113, 40),
    (1, 6, 2, 113, 17, 59),
    (2, 3, 3, 197, 203, 64),
    (1, 4, 1, 48, 64, 128),
    (2, 2, 1, 65, 130, 80),
]


def masks(B: int, H: int, L: int, S: int) -> dict[str, Mask | None]:
    keep = torch.rand(B, H, L, S) < 0.4
    keep[:, :, L // 2] = False  # a row without keys
    keep[..., S // 2] = False  # a key without queries
    lengths = torch.randint(0, S + 1, (B,))
    return {
        "none": None,
        "causal": Mask.causal("bottom_right"),
        "window": Mask.window(20, 5),
        "lengths": Mask.key_lengths(lengths),
        "prefix": Mask.prefix(lengths),
        "padding": Mask.key_padding(torch.rand(B, S) < 0.7),
        "dense": Mask.dense(keep),
        "segments": Mask.segments(torch.arange(L).expand(B, L) // 40, torch.arange(S).expand(B, S) // 50),
        "composed": Mask.causal("bottom_right") & Mask.key_lengths(lengths) & Mask.dense(keep[:1]),
    }


MASK_NAMES = tuple(masks(1, 1, 4, 4))


def inputs(sizes: tuple[int, ...], dtype: torch.dtype, rows_first: bool = False) -> tuple[Tensor, Tensor]:
    B, Hq, Hkv, L, S, D = sizes
    query, key = torch.randn(B, Hq, L, D).to(dtype), torch.randn(B, Hkv, S, D).to(dtype)
    if rows_first:
        query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    return query, key


def allowed(mask: Mask | None, B: int, H: int, L: int, S: int) -> Tensor:
    return torch.ones(B, H, L, S, dtype=torch.bool) if mask is None else mask.to_dense(B, H, L, S).expand(B, H, L, S)


def scores(query: Tensor, key: Tensor, bias: Tensor | None, keep: Tensor, scale: float) -> Tensor:
    """Float64, -inf where masked. A select before the product too, since what is masked may be NaN."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    key = key.where(keep.any(2).unsqueeze(-1), 0)
    query = query.double().where(keep.any(3).unsqueeze(-1), 0)
    x = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        x = x + bias.double()
    return x.where(keep, -math.inf)


def oracle(
    query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, keep: Tensor, scale: float, average: bool
) -> Tensor:
    lse = lse.double().unsqueeze(-1)
    weights = torch.exp(scores(query, key, bias, keep, scale) - lse.where(lse > -math.inf, 0))
    return weights.mean(1) if average else weights


def lse_of(query: Tensor, key: Tensor, bias: Tensor | None, keep: Tensor, scale: float) -> Tensor:
    lse = torch.logsumexp(scores(query, key, bias, keep, scale), -1)
    return lse if query.dtype == torch.float64 else lse.float()


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    largest = max(wanted.abs().max().item(), 1e-2) if wanted.numel() else 1.0
    torch.testing.assert_close(
        found.detach().double(), wanted.detach(), rtol=0, atol=scale * TOLERANCE[dtype] * largest
    )


@pytest.mark.parametrize("name", MASK_NAMES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("average", [True, False])
def test_every_mask(average, sizes, name, backend, poisoned):
    B, Hq, Hkv, L, S, D = sizes
    mask = masks(B, Hq, L, S)[name]
    keep, scale = allowed(mask, B, Hq, L, S), 1 / math.sqrt(D)
    query, key = inputs(sizes, torch.float32)
    lse = lse_of(query, key, None, keep, scale)
    found = attention_weights(query, key, lse, mask=mask, average_heads=average, backend=backend)
    assert found.shape == ((B, L, S) if average else (B, Hq, L, S)) and found.is_contiguous()
    check(found, oracle(query, key, lse, None, keep, scale, average), torch.float32)
    assert (found[~(keep.any(1) if average else keep)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [True, False])
def test_gradients(average, dtype, backend, poisoned):
    """With a mask, a bias of every broadcast shape, a negative scale, grouped heads and strided inputs."""
    sizes = (2, 4, 2, 50, 70, 24)
    B, Hq, Hkv, L, S, D = sizes
    scale = -0.3
    for name, bias_shape in (
        ("none", (B, Hq, L, S)),
        ("dense", (1, Hq, L, S)),
        ("composed", (B, 1, L, 1)),
        ("causal", (1, 1, 1, S)),
        ("lengths", (1, 1, 1, 1)),
        ("padding", None),
    ):
        mask = masks(B, Hq, L, S)[name]
        keep = allowed(mask, B, Hq, L, S)
        query, key = inputs(sizes, dtype, rows_first=True)
        bias = None if bias_shape is None else torch.randn(bias_shape).to(dtype)
        lse = lse_of(query, key, bias, keep, scale)
        given = [x for x in (query, key, lse, bias) if x is not None]
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in given]
        wide = [x.detach().double().requires_grad_() for x in given]
        bias_of = (lambda x: x[3]) if bias is not None else (lambda x: None)
        found = attention_weights(
            *leaves[:3], bias=bias_of(leaves), mask=mask, scale=scale, average_heads=average, backend=backend
        )
        wanted = oracle(*wide[:3], bias_of(wide), keep, scale, average)
        check(found, wanted, dtype)
        upstream = torch.randn(wanted.shape).to(dtype)
        gradients = torch.autograd.grad(found, leaves, upstream)
        expected = torch.autograd.grad(wanted, wide, upstream.double())
        for gradient, want, leaf in zip(gradients, expected, leaves, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
            check(gradient, want, dtype, scale=3)


@pytest.mark.parametrize("average", [True, False])
def test_upstream_gradients_of_any_layout(average, backend):
    sizes = (2, 4, 2, 50, 70, 24)
    query, key = inputs(sizes, torch.float32)
    query.requires_grad_()
    lse = lse_of(query.detach(), key, None, allowed(None, 2, 4, 50, 70), 24**-0.5)
    weights = attention_weights(query, key, lse, average_heads=average, backend=backend)
    upstream = torch.randn(weights.shape)
    (wanted,) = torch.autograd.grad(weights, query, upstream, retain_graph=True)
    (found,) = torch.autograd.grad(
        weights, query, upstream.transpose(-1, -2).contiguous().transpose(-1, -2), retain_graph=True
    )
    torch.testing.assert_close(found, wanted)
    # An expanded gradient, such as that of a sum.
    (ones,) = torch.autograd.grad(weights.sum(), query, retain_graph=True)
    torch.testing.assert_close(ones, torch.autograd.grad(weights, query, torch.ones_like(weights))[0])


@pytest.mark.parametrize("average", [True, False])
def test_dropout(average, backend, poisoned):
    """The weights after dropout are those that attention used: the same elements, with the same factor."""
    sizes = (2, 4, 2, 50, 70, 24)
    B, Hq, Hkv, L, S, D = sizes
    p, seed = 0.3, torch.tensor(2**62 + 12345)
    keep = allowed(None, B, Hq, L, S)
    kept = dropout_keep(B, Hq, L, S, p, int(seed))
    query, key = inputs(sizes, torch.float32)
    lse = lse_of(query, key, None, keep, D**-0.5)
    leaves = [x.requires_grad_() for x in (query, key, lse)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found = attention_weights(*leaves, average_heads=average, dropout_p=p, dropout_seed=seed, backend=backend)
    wanted = oracle(*wide, None, keep, D**-0.5, False).where(kept, 0) / (1 - p)
    wanted = wanted.mean(1) if average else wanted
    check(found, wanted, torch.float32)
    upstream = torch.randn(wanted.shape)
    gradients = torch.autograd.grad(found, leaves, upstream)
    for gradient, want in zip(gradients, torch.autograd.grad(wanted, wide, upstream.double()), strict=True):
        check(gradient, want, torch.float32, scale=3)


def test_weights_of_attention(backend):
    """Through lse: the weights of every head times the values are the output, and rows sum to 1."""
    query, key = inputs((2, 4, 2, 50, 70, 24), torch.float32)
    value = torch.randn(2, 2, 70, 16)
    mask = Mask.causal("bottom_right") & Mask.key_padding(torch.rand(2, 70) < 0.8)
    out, lse = attention(query, key, value, mask=mask, return_lse=True, backend=backend)
    weights = attention_weights(query, key, lse, mask=mask, average_heads=False, backend=backend)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), out, rtol=1e-5, atol=1e-5)
    live = lse > -math.inf
    torch.testing.assert_close(weights.sum(-1), live.float(), rtol=1e-5, atol=1e-5)
    mean = attention_weights(query, key, lse, mask=mask, backend=backend)
    torch.testing.assert_close(mean, weights.mean(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("average", [True, False])
def test_gradient_through_lse_sums_to_zero(average, backend):
    """The weights of a row sum to 1 whatever query and key are: with lse from attention, that sum has no gradient."""
    query, key = (x.requires_grad_() for x in inputs((1, 2, 2, 20, 30, 16), torch.float64))
    _, lse = attention(query, key, torch.randn(1, 2, 30, 4, dtype=torch.float64), return_lse=True, backend=backend)
    # attention gives lse in float32, the gradient goes through it all the same
    weights = attention_weights(query, key, lse, average_heads=average, backend=backend)
    for gradient in torch.autograd.grad(weights.sum(), (query, key)):
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("average", [True, False])
def test_gradcheck(average, backend):
    query, key = (x.requires_grad_() for x in inputs((1, 4, 2, 5, 7, 8), torch.float64))
    bias = torch.randn(1, 4, 1, 7, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(1, 1, 5, 7) < 0.7
    keep[..., 2, :] = False
    lse = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)

    def weights(query, key, lse, bias):
        return attention_weights(query, key, lse, bias=bias, mask=keep, average_heads=average, backend=backend)

    torch.autograd.gradcheck(weights, (query, key, lse, bias))


def test_nan_where_nobody_attends(backend, poisoned):
    sizes = (2, 4, 2, 113, 130, 40)
    B, Hq, Hkv, L, S, D = sizes
    keep = torch.rand(B, Hq, L, S) < 0.5
    keep[..., 20:90] = False
    keep[..., ::7] = False
    keep[:, :, 30:100:3] = False
    mask = Mask.dense(keep)
    dead_keys = ~keep.any(2).unflatten(1, (Hkv, -1)).any(2)
    dead_rows = ~keep.any(3)
    query, key = inputs(sizes, torch.float32)
    lse = lse_of(query, key, None, keep, D**-0.5)
    upstream = torch.randn(B, Hq, L, S)
    results = []
    for bad in (0.0, float("nan"), float("inf")):
        leaves = [
            query.masked_fill(dead_rows.unsqueeze(-1), bad).requires_grad_(),
            key.masked_fill(dead_keys.unsqueeze(-1), bad).requires_grad_(),
            lse.clone().requires_grad_(),
        ]
        weights = attention_weights(*leaves, mask=mask, average_heads=False, backend=backend)
        gradients = torch.autograd.grad(weights, leaves, upstream.masked_fill(~keep, bad))
        results.append((weights.detach(), *gradients))
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            assert torch.equal(found, wanted) and not found.isnan().any()
    weights, grad_query, grad_key, grad_lse = results[0]
    assert (weights[~keep] == 0).all() and (grad_query[dead_rows] == 0).all() and (grad_lse[dead_rows] == 0).all()
    assert (grad_key[dead_keys] == 0).all()


@pytest.mark.parametrize("B, L, S", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty(B, L, S, backend, poisoned):
    query, key = (x.requires_grad_() for x in inputs((B, 4, 2, L, S, 8), torch.float32))
    lse = torch.full((B, 4, L), -math.inf if S == 0 else 0.0, requires_grad=True)
    bias = torch.randn(1, 4, L, 1, requires_grad=True)
    for average in (True, False):
        weights = attention_weights(query, key, lse, bias=bias, average_heads=average, backend=backend)
        assert weights.shape == ((B, L, S) if average else (B, 4, L, S))
        for gradient, leaf in zip(
            torch.autograd.grad(weights.sum(), (query, key, lse, bias)), (query, key, lse, bias), strict=True
        ):
            assert gradient.shape == leaf.shape and (gradient == 0).all()


def test_bitwise_the_same_twice(backend):
    sizes = (2, 4, 2, 113, 203, 40)
    query, key = inputs(sizes, torch.float32)
    bias = torch.randn(1, 1, 113, 203)
    mask = Mask.causal("bottom_right")
    keep = allowed(mask, 2, 4, 113, 203)
    leaves = [query, key, lse_of(query, key, bias, keep, 40**-0.5), bias]
    for leaf in leaves:
        leaf.requires_grad_()
    for average in (True, False):
        results = []
        for _ in range(2):
            weights = attention_weights(*leaves[:3], bias=bias, mask=mask, average_heads=average, backend=backend)
            results.append((weights, *torch.autograd.grad(weights.square().sum(), leaves)))
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lse": torch.zeros(2, 4, 49)}, ValueError, ("lse", "(2, 4, 49)", "(2, 4, 50)")),
        ({"lse": torch.zeros(2, 4, 50, dtype=torch.int64)}, TypeError, ("lse", "int64")),
        ({"lse": None}, TypeError, ("lse", "NoneType")),
        ({"key": torch.zeros(2, 3, 70, 24)}, ValueError, ("heads", "(2, 3, 70, 24)")),
        ({"key": torch.zeros(2, 2, 70, 23)}, ValueError, ("head dim", "(2, 2, 70, 23)")),
        ({"mask": torch.ones(2, 4, 50, 71, dtype=torch.bool)}, ValueError, ("mask", "71")),
        ({"bias": torch.ones(3, 1, 1, 1)}, ValueError, ("bias", "(3, 1, 1, 1)")),
        ({"scale": float("nan")}, ValueError, ("scale", "nan")),
        ({"dropout_p": 1.0}, ValueError, ("dropout_p", "1.0")),
        ({"backend": "fast"}, ValueError, ("backend", "fast")),
    ],
)
def test_bad_input(change, error, words):
    query, key = inputs((2, 4, 2, 50, 70, 24), torch.float32)
    arguments = {"query": query, "key": key, "lse": torch.zeros(2, 4, 50), **change}
    with pytest.raises(error) as caught:
        attention_weights(**arguments)
    for word in words:
        assert word in str(caught.value)
