"""Torch's own module in float64 as the answer for `fastattn.MultiheadAttention`, and what rounding may do to it.

The answer comes from `torch.nn.MultiheadAttention` itself, with the functions replaced that it calls between the
projections: a row that may attend to nothing gets zeros instead of NaN, dropout drops the elements that ours drops, and
the steps are those of a fused kernel. Wherever torch's own call is sound the two are seen to be equal.

The noise of a value is how far one evaluation with roundings may be from it. It is measured: the same evaluation in
float64, with everything that an operator is given, forward and backward, moved by one unit roundoff in a random
direction. `fastattn.testing.compare` has the criterion.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.testing.compare import compare
from fastattn.testing.oracle import EXP_ULPS, dropout_keep, unit_roundoff

# Few where they suffice; what they take for a fault is looked at again with many: a few may all be small by chance.
NOISE_SAMPLES = (3, 30)
# The error of an exp, and half as much again because those of neighbouring scores do not point in random directions: a
# sum is off by more than the walk that the samples take, though by far less than the sum of all their sizes.
NOISE_FACTOR = 1.5 * EXP_ULPS
MASKS = ("attn_mask", "key_padding_mask")

Leaves = dict[str, Tensor]
Function = Callable[[Leaves], dict[str, Tensor]]  # the tensors that get a gradient, by name, to the outputs by name


def evaluate(function: Function, leaves: Leaves, dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs by name, and under "d " + name the gradient of each leaf, for a fixed random upstream gradient of
    `dtype`."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = function(leaves)
    generator = torch.Generator().manual_seed(len(leaves))
    upstream = [torch.randn(x.shape, generator=generator).to(dtype).to(x.dtype) for x in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream, allow_unused=True)
    results = {name: output.detach() for name, output in outputs.items()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results["d " + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


class _Roundings(TorchDispatchMode):
    """Moves what every operator is given, anew at each use: a sum of products is then off as far as its terms are
    large, even where they cancel."""

    UNIT = 2.0**-24  # float64 resolves it, and it is small enough for its effect to be in proportion

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * (1 + self.UNIT * (1 - 2 * torch.randint(2, x.shape, generator=self.generator)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and not function._schema.is_mutable:
            args = tuple(map(self.moved, args))
        return function(*args, **(kwargs or {}))


def noise_of(
    function: Function, leaves: Leaves, dtype: torch.dtype, expected: dict[str, Tensor], samples: int
) -> dict[str, Tensor]:
    """The noise of each of the `expected` values for an evaluation in `dtype`."""
    largest = {name: torch.zeros_like(value) for name, value in expected.items()}
    for seed in range(samples):
        with _Roundings(seed):
            results = evaluate(function, leaves, dtype)
        for name, value in results.items():
            largest[name] = torch.maximum(largest[name], (value - expected[name]).abs())
    unit = unit_roundoff(dtype)
    factor = NOISE_FACTOR * unit / _Roundings.UNIT
    # A weight below the smallest normal number may be zero, whatever it is multiplied by.
    floor = 2.0**20 * torch.finfo(dtype).tiny
    return {name: factor * largest[name] + unit * value.abs() + floor for name, value in expected.items()}


def failures(
    ours: dict[str, Tensor],
    peer: dict[str, Tensor],
    expected: dict[str, Tensor],
    answer: Function,
    leaves: Leaves,
    dtype: torch.dtype,
) -> list[str]:
    """What in `ours` is not within 1.5 times the error of the `peer` plus noise, in words. `expected` is what `answer`
    gives in float64 at the `leaves`."""
    assert ours.keys() == expected.keys() == peer.keys()
    found = [
        f"{name}: dtype {ours[name].dtype}, torch's is {peer[name].dtype}"
        for name in expected
        if ours[name].dtype != peer[name].dtype
    ]
    suspects = list(expected)
    for samples in NOISE_SAMPLES:
        noise = noise_of(answer, leaves, dtype, expected, samples)
        results = [compare(name, ours[name], expected[name], noise[name], peer[name]) for name in suspects]
        suspects = [result.name for result in results if not result.ok]
        if not suspects:
            return found
    return found + [f"{result.name}: {result.message}" for result in results if not result.ok]


class FusedAttention(torch.autograd.Function):
    """softmax(scale Q Kᵀ + bias) V in the steps of a fused kernel, whose roundings the noise is about: the backward
    makes the weights anew from query, key and lse, and the gradient of the softmax from the output.

    bias may be None; `dropped` (or None) multiplies the weights. All leading dimensions broadcast.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropped: Any, scale: float):
        scores, dead = FusedAttention.scores(query, key, bias, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp().masked_fill(dead, 0.0)
        out = (weights if dropped is None else weights * dropped) @ value
        ctx.save_for_backward(query, key, value, bias, dropped, lse, out)
        ctx.scale = scale
        return out

    @staticmethod
    def scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        scores = query @ key.transpose(-1, -2) * scale
        if bias is not None:
            scores = scores + bias
        dead = (scores == float("-inf")).all(-1, keepdim=True)
        return scores.masked_fill(dead, 0.0), dead

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, bias, dropped, lse, out = ctx.saved_tensors
        scores, dead = FusedAttention.scores(query, key, bias, ctx.scale)
        weights = (scores - lse).exp().masked_fill(dead, 0.0)
        grad_weights = grad_out @ value.transpose(-1, -2)
        grad_value = weights.transpose(-1, -2) @ grad_out
        if dropped is not None:
            grad_weights = grad_weights * dropped
            grad_value = (weights * dropped).transpose(-1, -2) @ grad_out
        grad_scores = weights * (grad_weights - (grad_out * out).sum(-1, keepdim=True))
        scaled = grad_scores * ctx.scale
        gradients = [scaled @ key, scaled.transpose(-1, -2) @ query, grad_value]
        gradients = [g.sum_to_size(x.shape) for g, x in zip(gradients, (query, key, value), strict=True)]
        return *gradients, None if bias is None else grad_scores.sum_to_size(bias.shape), None, None


class Rule:
    """What torch's module calls between the projections, when it is asked for weights. `seen_dead` tells whether a row
    had nothing to attend to."""

    def __init__(self, keep: Tensor | None) -> None:
        self.keep = keep
        self.seen_dead = False

    def baddbmm(self, bias: Tensor, query: Tensor, key_transposed: Tensor) -> Tensor:
        self.operands = (query, key_transposed.transpose(-1, -2), bias)
        return query @ key_transposed + bias

    def softmax(self, scores: Tensor, dim: int) -> Tensor:
        dead = (scores == float("-inf")).all(dim, keepdim=True)
        self.seen_dead = self.seen_dead or bool(dead.any())
        scores = scores.masked_fill(dead, 0.0)
        self.weights = (scores - scores.logsumexp(dim, keepdim=True)).exp().masked_fill(dead, 0.0)
        self.dropped: Tensor | None = None
        return self.weights

    def dropout(self, weights: Tensor, p: float) -> Tensor:
        assert self.keep is not None
        self.dropped = self.keep.view(weights.shape).to(weights.dtype) / (1 - p)
        self.weights = weights * self.dropped
        return self.weights

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        if a is not getattr(self, "weights", None):  # scores without masks
            self.operands = (a, b.transpose(-1, -2), None)
            return a @ b
        query, key, bias = self.operands
        return FusedAttention.apply(query, key, b, bias, self.dropped, 1.0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module, name in ((torch, "bmm"), (torch, "baddbmm"), (F, "softmax"), (F, "dropout")):
                stack.enter_context(mock.patch.object(module, name, getattr(self, name)))
            yield


def disagreements(
    ours: nn.MultiheadAttention,
    stock: nn.MultiheadAttention,
    inputs: Leaves,
    options: dict[str, Any],
    dropout_seed: int = 0,
) -> list[str]:
    """What differs between a call of `ours` and one of `stock`, which has the same parameters; empty when all is well.

    inputs: "query", "key", "value", without those that are the same tensor as the one before. options: the other
    keyword arguments of the call. Compared are the output, the weights, and the gradients of inputs, parameters and
    float masks. With dropout, ours is called after torch.manual_seed(dropout_seed), and torch's drops the same.
    """
    dtype = inputs["query"].dtype
    need_weights = options.get("need_weights", True)
    hinted = options.get("is_causal", False) and not need_weights and options.get("key_padding_mask") is None
    floats = [name for name in MASKS if options.get(name) is not None and options[name].is_floating_point()]
    differentiated = [] if hinted else floats  # under the hint no mask is read
    constants = {name: value for name, value in options.items() if name not in differentiated}
    parameters = dict(stock.named_parameters())
    leaves = {**inputs, **parameters, **{name: options[name] for name in differentiated}}

    def function(module: nn.Module, ruled: Rule | None) -> Function:
        def call(leaves: Leaves) -> dict[str, Tensor]:
            tensors = list({name: leaves[name] for name in inputs}.values())
            tensors += [tensors[-1]] * (3 - len(tensors))
            given = {**constants, **{name: leaves[name] for name in differentiated}}
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", "Support for mismatched")
                if ruled is not None:  # with weights, since that is where torch can be given the rule
                    stack.enter_context(ruled.applied())
                    dtypes = {name: x.to(tensors[0].dtype) for name, x in given.items() if name in floats}
                    given |= {**dtypes, "need_weights": True, "is_causal": False}
                torch.manual_seed(dropout_seed)
                out, weights = torch.func.functional_call(
                    module, {name: leaves[name] for name in parameters}, tuple(tensors), given
                )
            assert (weights is not None) == (need_weights or ruled is not None)
            return {"out": out, "weights": weights} if need_weights else {"out": out}

        return call

    appended = int(stock.bias_k is not None) + int(stock.add_zero_attn)
    dropout_p = stock.dropout if stock.training else 0.0
    keep = None
    if dropout_p > 0:
        torch.manual_seed(dropout_seed)
        seed = int(torch.randint(2**63 - 1, ()))
        batch_first = stock.batch_first
        lengths = [x.shape[-2] if x.dim() == 2 or batch_first else x.shape[0] for x in inputs.values()]
        query = inputs["query"]
        batch = 1 if query.dim() == 2 else query.shape[0 if batch_first else 1]
        keys = lengths[min(1, len(lengths) - 1)] + appended
        keep = dropout_keep(batch, stock.num_heads, lengths[0], keys, dropout_p, seed)

    rule = Rule(keep)
    reference = function(stock, rule)
    doubled = {name: leaf.detach().double() for name, leaf in leaves.items()}
    expected = evaluate(reference, doubled, dtype)
    # Torch's own call is the peer wherever it is right, and possible: masks of no elements fail without weights.
    empty = any(x.numel() == 0 for x in inputs.values())
    sound = keep is None and not rule.seen_dead and not (hinted and appended) and not empty
    if sound:  # a wrong formula would be off by far more than what large scores cancel
        exact = evaluate(function(stock, None), doubled, dtype)
        for name, value in exact.items():
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(expected[name], value, rtol=0, atol=1e-6 * scale, msg=f"the answer for {name}")
    peer = evaluate(function(stock, None) if sound else reference, leaves, dtype)
    return failures(evaluate(function(ours, None), leaves, dtype), peer, expected, reference, doubled, dtype)
