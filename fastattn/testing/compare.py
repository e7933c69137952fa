"""The numerical criterion (contract 11) and the peer that sets it.

For each of out, dq, dk, dv, dbias, with ``e = |actual - float64|`` element by element, a result passes when

* its maximum error is at most ``1.5 * max(peer error) + max(noise)``,
* its mean error is at most ``1.5 * mean(peer error) + mean(noise)``, and
* no element is out of line with its own size:  ``max(e / noise) <= 1.5 * max(peer error / noise) + OUTLIER_NOISE``.

The peer is torch's own scaled_dot_product_attention on the same inputs in the same dtype. The noise is the rounding of
one evaluation of the formula as `fastattn.testing.oracle` derives it; without it a peer that happens to be exact (one
key: its output *is* the value) would forbid even the correctly rounded result. The third line is stricter than the
contract: the first two are set by the largest elements, and would let an element that should be small be wrong by its
own size, as a dropped tile in a long row makes it. A kernel that rounds the probabilities has a larger noise there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.testing.cases import LinearLossCase, LossCase, Problem
from fastattn.testing.oracle import arithmetic_dtype, counted_elements, from_tokens

PEER_FACTOR = 1.5
# A sound kernel's errors stay within about one noise unit of an element; summation over a few hundred terms in another
# order than the peer's may double that on one element of thousands.
OUTLIER_NOISE = 2.0


@dataclass(frozen=True)
class Comparison:
    """One quantity against float64. `message` is empty when it passes. `ratio` is the largest of error / bound."""

    name: str
    max_error: float
    max_bound: float
    mean_error: float
    mean_bound: float
    ratio: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.message


def compare(
    name: str,
    actual: Tensor,
    expected: Tensor,
    noise: Tensor,
    peer: Tensor | None,
    select: Tensor | None = None,
    element_noise: Tensor | None = None,
) -> Comparison:
    """Judges `actual` (any dtype) against `expected` (float64) with `noise` and the `peer`'s result.

    `peer=None` means no peer: the noise alone is the bound, with the factor OUTLIER_NOISE. `select` (bool, broadcast
    over trailing dimensions) restricts the judgement to some rows. `element_noise` is the noise of the third line,
    where that is not `noise`. Infinities must sit exactly where expected has them.
    """
    if tuple(actual.shape) != tuple(expected.shape):
        return _failure(name, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    seen = actual.detach().cpu().double()
    element_noise = noise if element_noise is None else element_noise
    if select is not None:
        seen, expected, noise, element_noise = seen[select], expected[select], noise[select], element_noise[select]
        peer = None if peer is None else peer[select]
    if seen.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0)
    finite = torch.isfinite(expected)
    if not bool((seen[~finite] == expected[~finite]).all()):
        wrong = int((seen[~finite] != expected[~finite]).sum())
        return _failure(name, f"{wrong} elements should be {expected[~finite][0].item()} and are not")
    seen, expected, noise, element_noise = seen[finite], expected[finite], noise[finite], element_noise[finite]
    if seen.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0)
    if not bool(torch.isfinite(seen).all()):
        return _failure(name, f"{int((~torch.isfinite(seen)).sum())} of {seen.numel()} elements are NaN or Inf")

    error = (seen - expected).abs()
    if peer is None:
        peer_error = torch.zeros_like(error)
    else:
        peer_error = (peer.detach().cpu().double()[finite] - expected).abs()
        # A peer that is not finite somewhere says nothing there.
        peer_error = peer_error.nan_to_num(0.0, 0.0, 0.0)
    slack = OUTLIER_NOISE if peer is None else 1.0
    # An element whose noise is 0 must be exact; the tiny floor only avoids 0 / 0.
    units = element_noise.clamp_min(torch.finfo(torch.float64).tiny)
    bounds = (
        ("maximum error", error.max(), PEER_FACTOR * peer_error.max() + slack * noise.max()),
        ("mean error", error.mean(), PEER_FACTOR * peer_error.mean() + slack * noise.mean()),
        (
            "error / noise of one element",
            (error / units).max(),
            PEER_FACTOR * (peer_error / units).max() + OUTLIER_NOISE,
        ),
    )
    ratio, message = 0.0, ""
    for what, measured, bound in ((w, float(m), float(b)) for w, m, b in bounds):
        relative = 0.0 if measured == 0.0 else (measured / bound if bound > 0.0 else math.inf)
        if relative > 1.0 and relative > ratio:
            at = int((error / units).argmax()) if "element" in what else int(error.argmax())
            message = (
                f"{what} {measured:.3e} over the bound {bound:.3e}; worst element {float(seen[at]):.6g},"
                f" expected {float(expected[at]):.6g}"
            )
        ratio = max(ratio, relative)
    (_, max_error, max_bound), (_, mean_error, mean_bound), _ = bounds
    return Comparison(name, float(max_error), float(max_bound), float(mean_error), float(mean_bound), ratio, message)


def _failure(name: str, message: str) -> Comparison:
    return Comparison(name, math.nan, math.nan, math.nan, math.nan, math.inf, message)


# ---------------------------------------------------------------------------------------------------------------- peers


def sdpa_peer(
    problem: Problem, allowed: Tensor, keep: Tensor | None, gradients: bool = True, tensor_cores: bool = False
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv, dbias of torch's SDPA on the problem in its own dtype.

    SDPA gets the mask as a dense tensor. It has no rule for empty rows that is the same on all its paths, so those rows
    see every key and get a zero gradient; their output is not compared. Its public function has no way to say which
    elements drop, no lse, and no bias in a dtype of its own: there the formula of its math path is evaluated with
    torch's operators, as that path does, in the arithmetic dtype. The same is done for a kernel of `tensor_cores`,
    whose peer is what SDPA's fused kernels compute on a GPU: see `_Rounded`.
    """
    case = problem.case
    round_to = case.dtype if tensor_cores and case.dtype in (torch.bfloat16, torch.float16) else None
    inputs = {"dq": problem.query, "dk": problem.key, "dv": problem.value}
    if problem.bias is not None:
        inputs["dbias"] = problem.bias
    inputs = {name: tensor.detach().cpu().requires_grad_(gradients) for name, tensor in inputs.items()}
    query, key, value, bias = inputs["dq"], inputs["dk"], inputs["dv"], inputs.get("dbias")
    empty, attn_mask = open_empty_rows(allowed, bias, plain=not problem.terms)
    grad_out = problem.grad_out.detach().cpu().masked_fill(empty.unsqueeze(-1), 0.0)
    upstream = [grad_out]
    if problem.grad_lse is not None or keep is not None or case.bias_float32 or round_to is not None:
        out, lse = _composite(query, key, value, attn_mask, keep, case.dropout_p, case.effective_scale, round_to)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, scale=case.effective_scale, enable_gqa=case.heads_q != case.heads_kv
        )
        with torch.no_grad():
            _, lse = _composite(query, key, value, attn_mask, None, 0.0, case.effective_scale)
    outputs = [out]
    if problem.grad_lse is not None:
        outputs.append(lse)
        upstream.append(problem.grad_lse.cpu().to(lse.dtype).masked_fill(empty, 0.0))
    results = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        computed = torch.autograd.grad(outputs, list(inputs.values()), upstream, allow_unused=True)
        for (name, tensor), gradient in zip(inputs.items(), computed, strict=True):
            results[name] = torch.zeros_like(tensor) if gradient is None else gradient
    return results


def open_empty_rows(allowed: Tensor, bias: Tensor | None, plain: bool) -> tuple[Tensor, Tensor | None]:
    """The rows that may attend to nothing (B, Hq, L), and SDPA's attn_mask with those rows opened to every key.

    The mask is None without mask and bias (`plain` and no bias), the bias in its own shape without a mask, a bool mask
    without a bias, and otherwise a float tensor with -inf where the mask forbids. A row that the bias alone closes is
    empty too.
    """
    attended = allowed if bias is None else allowed & (bias.detach() > float("-inf")).cpu()
    empty = ~attended.any(dim=-1)
    closed = empty.unsqueeze(-1)
    if bias is None:
        return empty, None if plain else allowed | closed
    if plain and not bool(empty.any()):
        return empty, bias
    return empty, torch.where(closed, 0.0, torch.where(allowed, bias, float("-inf"))).to(bias.dtype)


class _Rounded(torch.autograd.Function):
    """The value rounded to one dtype, its gradient to another; None rounds nothing.

    A tensor core takes 16-bit operands, so fused kernels on a GPU (FlashAttention-2 and those of SDPA) round the
    probabilities before P V and Pᵀ dO, and dS before dS K and dSᵀ Q. CPU kernels, computing in float32, do not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: torch.dtype | None, gradient: torch.dtype | None) -> Tensor:
        ctx.gradient = gradient
        return x if value is None else x.to(value).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient if ctx.gradient is None else gradient.to(ctx.gradient).to(gradient.dtype), None, None


def _composite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
    scale: float,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    arithmetic = arithmetic_dtype(query.dtype)
    group = query.shape[1] // key.shape[1]
    q, k, v = query.to(arithmetic), key.to(arithmetic), value.to(arithmetic)
    scores = _Rounded.apply(q @ k.repeat_interleave(group, dim=1).transpose(-1, -2), None, round_to) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask.to(arithmetic)
    lse = scores.logsumexp(dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if keep is not None:
        weights = weights * keep / (1.0 - dropout_p)
    weights = _Rounded.apply(weights, round_to, None)
    return (weights @ v.repeat_interleave(group, dim=1)).to(query.dtype), lse


def weights_peer(
    problem: Problem,
    allowed: Tensor,
    keep: Tensor | None,
    lse: Tensor,
    average_heads: bool,
    grad_weights: Tensor,
    tensor_cores: bool = False,
) -> dict[str, Tensor]:
    """attention_weights and its gradients with torch's operators in the arithmetic dtype. SDPA has no such output."""
    case = problem.case
    inputs = {"dq": problem.query, "dk": problem.key, "dlse": lse}
    if problem.bias is not None:
        inputs["dbias"] = problem.bias
    inputs = {name: tensor.detach().cpu().requires_grad_() for name, tensor in inputs.items()}
    arithmetic = arithmetic_dtype(case.dtype)
    q, k = inputs["dq"].to(arithmetic), inputs["dk"].to(arithmetic)
    scores = q @ k.repeat_interleave(case.heads_q // case.heads_kv, dim=1).transpose(-1, -2)
    scores = _Rounded.apply(scores, None, case.dtype if tensor_cores else None) * case.effective_scale
    if problem.bias is not None:
        scores = scores + inputs["dbias"].to(arithmetic)
    shift = inputs["dlse"].to(arithmetic).masked_fill(lse.cpu() == float("-inf"), 0.0)
    weights = torch.exp((scores - shift.unsqueeze(-1)).masked_fill(~allowed, float("-inf")))
    if keep is not None:
        weights = weights * keep / (1.0 - case.dropout_p)
    weights = (weights.mean(dim=1) if average_heads else weights).to(case.dtype)
    gradients = torch.autograd.grad(weights, list(inputs.values()), grad_weights.cpu())
    return {"weights": weights.detach(), **dict(zip(inputs, gradients, strict=True))}


def additive_peer(problem: Problem, allowed: Tensor, score_weight: Tensor) -> dict[str, Tensor]:
    """Additive attention with torch's operators in the arithmetic dtype. Rows that may attend to nothing are opened, as
    for `sdpa_peer`, and their output, lse and gradient set to what they must be."""
    case = problem.case
    names, arithmetic = ("dq", "dk", "dv", "dw"), arithmetic_dtype(case.dtype)
    tensors = (problem.query.squeeze(1), problem.key.squeeze(1), problem.value.squeeze(1), score_weight)
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in tensors]
    q, k, v, w = (tensor.to(arithmetic) for tensor in inputs)
    keep = allowed.squeeze(1)
    empty = ~keep.any(-1)
    scores = torch.tanh(q.unsqueeze(2) + k.unsqueeze(1)) @ w
    scores = scores.masked_fill(~(keep | empty.unsqueeze(-1)), float("-inf"))
    out = (torch.softmax(scores, -1) @ v).to(case.dtype)
    lse = scores.logsumexp(-1)
    outputs, upstream = [out], [problem.grad_out.detach().cpu().squeeze(1).masked_fill(empty.unsqueeze(-1), 0.0)]
    if problem.grad_lse is not None:
        outputs.append(lse)
        upstream.append(problem.grad_lse.cpu().squeeze(1).to(lse.dtype).masked_fill(empty, 0.0))
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    results = {"out": out.detach().masked_fill(empty.unsqueeze(-1), 0.0)}
    results["lse"] = lse.detach().masked_fill(empty, float("-inf"))
    return results | dict(zip(names, gradients, strict=True))


def eager_loss_peer(
    case: LossCase, input: Tensor, target: Tensor, mask: Tensor, eps: float, upstream: Tensor
) -> dict[str, Tensor]:
    """The masked loss as its authors write it, with torch's operators in the arithmetic dtype."""
    x = input.detach().clone().requires_grad_()
    t = target.detach().clone().requires_grad_()
    counted = counted_elements(case, mask)
    arithmetic = arithmetic_dtype(case.dtype)
    goal = t.to(arithmetic)
    if case.normalize_target and case.layout == "image":
        assert case.patch_size is not None
        p = case.patch_size
        patches = F.unfold(goal, p, stride=p)  # (B, C*p*p, patches)
        patches = (patches - patches.mean(dim=1, keepdim=True)) / (patches.var(dim=1, keepdim=True) + eps).sqrt()
        goal = F.fold(patches, case.shape[-2:], p, stride=p) if case.shape[0] else goal
    elif case.normalize_target:
        goal = (goal - goal.mean(dim=-1, keepdim=True)) / (goal.var(dim=-1, keepdim=True) + eps).sqrt()
    if case.kind == "l2":
        elementwise = F.mse_loss(x.to(arithmetic), goal, reduction="none")
    elif case.kind == "l1":
        elementwise = F.l1_loss(x.to(arithmetic), goal, reduction="none")
    else:
        elementwise = F.smooth_l1_loss(x.to(arithmetic), goal, reduction="none", beta=case.beta)
    elementwise = elementwise * counted
    if case.reduction == "none":
        loss = elementwise
    elif case.reduction == "masked_mean":
        loss = elementwise.sum() / counted.sum().clamp(min=1)
    else:
        loss = elementwise.sum() / (elementwise.numel() if case.reduction == "mean" and elementwise.numel() else 1)
    loss = loss.to(case.dtype)
    gradients = torch.autograd.grad(loss, [x, t], upstream.to(loss.dtype))
    results = {"loss": loss.detach(), "dinput": gradients[0]}
    if not case.normalize_target:
        results["dtarget"] = gradients[1]
    return results


def eager_linear_loss_peer(
    case: LinearLossCase,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    eps: float,
    upstream: Tensor,
) -> dict[str, Tensor]:
    """torch's linear over all tokens, then the masked loss as its authors write it, in the arithmetic dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, *([] if bias is None else [bias]))]
    prediction = from_tokens(case, F.linear(*(x.to(arithmetic_dtype(case.loss.dtype)) for x in leaves)))
    results = eager_loss_peer(case.loss, prediction.detach(), target, mask, eps, upstream)
    gradients = torch.autograd.grad(prediction, leaves, results.pop("dinput"))
    return {**results, **dict(zip(("dhidden", "dweight", "dbias"), gradients, strict=False))}
