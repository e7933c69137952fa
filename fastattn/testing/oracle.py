"""What the answers are: dense float64 evaluations that share no code with any backend.

The mask is materialised here from the words of the specification (`allowed_pairs`, with the scalar `may_attend` as its
double check), not by `Mask.to_dense`; gradients come from torch's autograd over plain float64 formulas; dropout comes
from a second writing of Philox.

Beside each expected value stands its *noise*: how far a computation without any fault may be from it. The noise is a
first-order majorant of the rounding of one straightforward evaluation of the formula, element by element:

* every intermediate is a sum of products, and a rounding at relative size ``u`` in it moves the result by at most
  ``u`` times the sum of the absolute values of the products: the formula is evaluated once more with those;
* a score ``s`` enters through ``exp``, which turns its absolute error ``u * |s|`` into a relative one of the
  probability: so every probability carries the weight ``EXP_ULPS + size of the score + |bias|``, where the size of a
  score is that of `dot_size`;
* storing the result in its dtype adds ``u_store * |value|``, or half the smallest subnormal;
* a kernel of tensor cores rounds the 16-bit operands of its second products, the probabilities and dS: those roundings
  are independent, so they add up as the root of the sum of squares. CPU kernels that multiply bfloat16 pairs do so too;
  for them only the noise of single elements has this part, since torch's SDPA on the CPU rounds likewise.

``u`` is the unit roundoff of the arithmetic (float64 for float64, else float32: bfloat16 and float16 are storage
formats here, and a kernel that accumulates in them is faulty), ``u_store`` that of the tensor's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.testing.cases import LinearLossCase, LossCase, Problem, Term

# A float32 exp2 by a short polynomial has a relative error of a few units (degree 5: 2.1e-7, which is 3.5 u).
EXP_ULPS = 4.0


@dataclass
class Expected:
    """Expected float64 values and their noise, by name (out, lse, dq, dk, dv, dbias, weights, ...)."""

    values: dict[str, Tensor] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)
    element_noise: dict[str, Tensor] = field(default_factory=dict)  # for single elements, where that is more


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------- masks


def may_attend(terms: Sequence[Term], b: int, h: int, i: int, j: int, len_q: int, len_k: int) -> bool:
    """The specification of every mask term, for one (batch, query head, query, key). True = may attend."""
    for term in terms:
        spec = term.spec
        offset = len_k - len_q if spec.align == "bottom_right" else 0
        if spec.kind == "causal":
            allowed = j <= i + offset
        elif spec.kind == "window":
            allowed = (spec.left is None or i + offset - spec.left <= j) and (
                spec.right is None or j <= i + offset + spec.right
            )
        elif spec.kind == "prefix":
            allowed = j <= i or j < int(term.tensors[0][b])
        elif spec.kind == "key_lengths":
            allowed = j < int(term.tensors[0][b])
        elif spec.kind == "key_padding":
            allowed = bool(term.tensors[0][b, j])
        elif spec.kind == "dense":
            keep = term.tensors[0]
            position = (b, h, i, j)[4 - keep.dim() :]
            allowed = bool(keep[tuple(0 if keep.shape[d] == 1 else position[d] for d in range(keep.dim()))])
        elif spec.kind == "segments":
            allowed = int(term.tensors[0][b, i]) == int(term.tensors[1][b, j])
        else:
            raise ValueError(f"term kind {spec.kind!r} is unknown")
        if not allowed:
            return False
    return True


def allowed_pairs(terms: Sequence[Term], batch: int, heads_q: int, len_q: int, len_k: int) -> Tensor:
    """The AND of all terms as a dense bool tensor (B, Hq, L, S)."""
    allowed = torch.ones(batch, heads_q, len_q, len_k, dtype=torch.bool)
    rows = torch.arange(len_q).view(len_q, 1)
    columns = torch.arange(len_k)
    for term in terms:
        spec = term.spec
        tensors = [t.detach().cpu() for t in term.tensors]
        diagonal = rows + (len_k - len_q if spec.align == "bottom_right" else 0)
        if spec.kind == "causal":
            allowed &= ~(columns > diagonal)
        elif spec.kind == "window":
            if spec.left is not None:
                allowed &= ~(columns < diagonal - spec.left)
            if spec.right is not None:
                allowed &= ~(columns > diagonal + spec.right)
        elif spec.kind == "prefix":
            allowed &= ~((columns > rows) & (columns >= tensors[0].view(-1, 1, 1, 1)))
        elif spec.kind == "key_lengths":
            allowed &= ~(columns >= tensors[0].view(-1, 1, 1, 1))
        elif spec.kind == "key_padding":
            allowed &= tensors[0][:, None, None, :]
        elif spec.kind == "dense":
            allowed &= tensors[0]
        elif spec.kind == "segments":
            allowed &= tensors[0][:, None, :, None] == tensors[1][:, None, None, :]
        else:
            raise ValueError(f"term kind {spec.kind!r} is unknown")
    return allowed


def allowed_in(problem: Problem) -> Tensor:
    case = problem.case
    return allowed_pairs(problem.terms, case.batch, case.heads_q, case.len_q, case.len_k)


def attended_keys(allowed: Tensor, heads_kv: int) -> Tensor:
    """Which keys some query attends to: bool (B, Hkv, S)."""
    B, Hq, _, S = allowed.shape
    return allowed.any(dim=2).view(B, heads_kv, Hq // max(heads_kv, 1), S).any(dim=2)


# -------------------------------------------------------------------------------------------------------------- dropout


def philox_4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), on int64 tensors that hold
    32-bit words."""
    low32 = 0xFFFFFFFF
    c0, c1, c2, c3 = (c & low32 for c in counter)
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64; its bits 32..63 are the high word all the same.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & low32, (product1 >> 32) & low32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & low32, high0 ^ c3 ^ k1, product0 & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return [c0, c1, c2, c3]


def dropout_keep(batch: int, heads_q: int, len_q: int, len_k: int, p: float, seed: int) -> Tensor:
    """Which elements dropout keeps, bool (B, Hq, L, S): key = seed, counter = (j // 4, i, h, b), word j % 4, dropped
    when the word is below floor(p * 2^32)."""
    groups = -(-len_k // 4)
    grid = torch.meshgrid(
        torch.arange(batch), torch.arange(heads_q), torch.arange(len_q), torch.arange(groups), indexing="ij"
    )
    b, h, i, j4 = grid
    words = torch.stack(philox_4x32((j4, i, h, b), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)), dim=-1)
    return words.reshape(batch, heads_q, len_q, groups * 4)[..., :len_k] >= int(p * 2**32)


# ------------------------------------------------------------------------------------------------------------ attention


def attention_oracle(
    problem: Problem,
    allowed: Tensor,
    keep: Tensor | None,
    gradients: bool = True,
    tensor_cores: bool = False,
    pairs: bool = False,
) -> Expected:
    """Expected out, lse, dq, dk, dv, dbias of `problem`. `allowed` and `keep` (dropout) are (B, Hq, L, S).

    `tensor_cores`, `pairs`: the kernel rounds the operands P and dS, on a GPU or on a CPU that multiplies pairs.
    """
    case = problem.case
    q, k, v = (t.detach().cpu().double().requires_grad_(gradients) for t in (problem.query, problem.key, problem.value))
    bias = None if problem.bias is None else problem.bias.detach().cpu().double().requires_grad_(gradients)
    group = case.heads_q // case.heads_kv
    drop = None if keep is None else keep.double() / (1.0 - case.dropout_p)

    key_per_head, value_per_head = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    probabilities, lse = _softmax(_scores(q, key_per_head, bias, allowed, case.effective_scale))
    dropped = probabilities if drop is None else probabilities * drop
    out = dropped @ value_per_head

    expected = Expected({"out": out.detach(), "lse": lse.detach()})
    inputs = {"dq": q, "dk": k, "dv": v} | ({} if bias is None else {"dbias": bias})
    grad_out = problem.grad_out.detach().cpu().double()
    grad_lse = None if problem.grad_lse is None else problem.grad_lse.cpu().double()
    if gradients:
        outputs, upstream = [out], [grad_out]
        if grad_lse is not None:
            outputs.append(lse)
            upstream.append(grad_lse)
        computed = torch.autograd.grad(outputs, list(inputs.values()), upstream, allow_unused=True)
        for (name, tensor), gradient in zip(inputs.items(), computed, strict=True):
            expected.values[name] = torch.zeros_like(tensor) if gradient is None else gradient

    with torch.no_grad():
        _attention_noise(problem, expected, probabilities.detach(), dropped.detach(), drop, grad_out, grad_lse)
        if (tensor_cores or pairs) and case.dtype in (torch.bfloat16, torch.float16):
            plain = dict(expected.noise)
            _operand_noise(problem, expected, probabilities.detach(), dropped.detach(), drop, grad_out, grad_lse)
            if pairs:
                _delta_noise(problem, expected, probabilities.detach(), dropped.detach(), grad_out)
                expected.noise, expected.element_noise = plain, expected.noise
    return expected


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, allowed: Tensor, scale: float) -> Tensor:
    scores = scale * (q @ k.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~allowed, float("-inf"))


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and natural-log lse; a row of -inf gives probabilities 0 and lse -inf, and gradients 0."""
    if scores.shape[-1] == 0:
        return scores, scores.sum(dim=-1) + float("-inf")
    highest = scores.detach().amax(dim=-1, keepdim=True)
    empty = highest == float("-inf")
    exponentials = torch.exp(scores - highest.masked_fill(empty, 0.0))
    total = exponentials.sum(dim=-1, keepdim=True).masked_fill(empty, 1.0)
    lse = (highest.masked_fill(empty, 0.0) + total.log()).masked_fill(empty, float("-inf"))
    return exponentials / total, lse.squeeze(-1)


def dot_size(q: Tensor, k: Tensor) -> Tensor:
    """How far, in units of u, a dot product summed in one chain may be off: (B, Hq, L, S).

    The chain's partial sums are rounded one by one. For random terms they are a random walk, and the largest of some
    thousand results is off by 2 u sum |q_d| |k_d|. Where the terms agree in sign, and these scores are the large ones
    that decide a softmax, the partial sums grow to the score: u sqrt(sum_n (n / D score)^2) = u sqrt(D / 3) |score|.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)
    return 2.0 * (q.abs() @ k.abs()) + math.sqrt(q.shape[-1] / 3) * (q @ k).abs()


def _attention_noise(
    problem: Problem,
    expected: Expected,
    p: Tensor,
    dropped: Tensor,
    drop: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> None:
    """Fills `expected.noise`, as the head of this file explains."""
    case, values = problem.case, expected.values
    u = unit_roundoff(arithmetic_dtype(case.dtype))
    group = case.heads_q // case.heads_kv
    q = problem.query.detach().cpu().double().abs()
    k = problem.key.detach().cpu().double().abs().repeat_interleave(group, dim=1)
    v = problem.value.detach().cpu().double().abs().repeat_interleave(group, dim=1)
    scale = abs(case.effective_scale)
    weight = EXP_ULPS + scale * dot_size(*(t.detach().cpu().double() for t in (problem.query, problem.key)))
    if problem.bias is not None:
        bias = problem.bias.detach().cpu().double().abs()
        weight = weight + bias.masked_fill(bias == float("inf"), 0.0)
    out_size = (dropped * weight) @ v
    noise = expected.noise
    noise["out"] = _store(values["out"], case.dtype) + u * out_size
    # lse is float32 whatever the inputs are; its error is that of the scores of the row, weighted by probability.
    lse_size = (p * weight).sum(dim=-1) + EXP_ULPS
    finite_lse = values["lse"].masked_fill(values["lse"] == float("-inf"), 0.0).abs()
    noise["lse"] = unit_roundoff(torch.float32) * (finite_lse + 1.0) + u * lse_size
    if "dq" not in values:
        return

    do = grad_out.abs()
    dp = do @ v.transpose(-1, -2)
    if drop is not None:
        dp = dp * drop
    delta = (p * dp).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta = delta + grad_lse.abs().unsqueeze(-1)
    ds = u * (p * weight * (dp + delta))
    # A fused kernel forms delta = rowsum(dO * out) from the stored out: each product carries the store's rounding. The
    # roundings are independent, so they add up as the root of the sum of squares: 0.58 of it in the root mean square,
    # and three to four times that in the largest of some thousand rows.
    stored = _store(values["out"], case.dtype)
    ds = ds + p * 2.0 * (grad_out * stored).square().sum(dim=-1, keepdim=True).sqrt()
    noise["dq"] = _store(values["dq"], case.dtype) + scale * (ds @ k)
    noise["dk"] = _store(values["dk"], case.dtype) + _sum_groups(scale * (ds.transpose(-1, -2) @ q), group)
    noise["dv"] = _store(values["dv"], case.dtype) + _sum_groups(u * ((dropped * weight).transpose(-1, -2) @ do), group)
    if problem.bias is not None:
        noise["dbias"] = _store(values["dbias"], problem.bias.dtype) + ds.sum_to_size(problem.bias.shape)


def _operand_noise(
    problem: Problem,
    expected: Expected,
    p: Tensor,
    dropped: Tensor,
    drop: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> None:
    """Adds what rounding the operands P and dS to the dtype of the problem may cost."""
    case, noise = problem.case, expected.noise
    group = case.heads_q // case.heads_kv
    q, k, v = (t.detach().cpu().double() for t in (problem.query, problem.key, problem.value))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    rounded_p = _store(dropped, case.dtype).square()
    noise["out"] = noise["out"] + (rounded_p @ v.square()).sqrt()
    if "dq" not in expected.values:
        return
    dp = grad_out @ v.transpose(-1, -2)
    if drop is not None:
        dp = dp * drop
    ds = dp - (p * dp).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        ds = ds + grad_lse.unsqueeze(-1)
    noise["dv"] = noise["dv"] + _sum_groups(rounded_p.transpose(-1, -2) @ grad_out.square(), group).sqrt()
    _add_rounded_ds(noise, p * ds, q, k, case.dtype, abs(case.effective_scale), group)


def _delta_noise(problem: Problem, expected: Expected, p: Tensor, dropped: Tensor, grad_out: Tensor) -> None:
    """Adds what the rounding of P makes of delta = rowsum(dO * out), and so of dS. With few columns, Dv = 1 say, that
    is more than the store of out makes of it."""
    if "dq" not in expected.values:
        return
    case, noise = problem.case, expected.noise
    group = case.heads_q // case.heads_kv
    q, k, v = (t.detach().cpu().double() for t in (problem.query, problem.key, problem.value))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    dp = grad_out @ v.transpose(-1, -2)
    ds = p * 2.0 * (_store(dropped, case.dtype) * dp).square().sum(dim=-1, keepdim=True).sqrt()
    scale = abs(case.effective_scale)
    noise["dq"] = noise["dq"] + scale * (ds @ k.abs())
    noise["dk"] = noise["dk"] + _sum_groups(scale * (ds.transpose(-1, -2) @ q.abs()), group)
    if problem.bias is not None:
        noise["dbias"] = noise["dbias"] + ds.sum_to_size(problem.bias.shape)


def _add_rounded_ds(
    noise: dict[str, Tensor], ds: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype, scale: float, group: int
) -> None:
    rounded = _store(ds, dtype).square()
    noise["dq"] = noise["dq"] + scale * (rounded @ k.square()).sqrt()
    noise["dk"] = noise["dk"] + scale * _sum_groups(rounded.transpose(-1, -2) @ q.square(), group).sqrt()


def _store(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding a value to `dtype` may cost. Zero is exact."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return (unit_roundoff(dtype) * value.abs()).clamp_min(smallest / 2) * (value != 0)


def _sum_groups(per_head: Tensor, group: int) -> Tensor:
    B, Hq, S, D = per_head.shape
    return per_head.view(B, Hq // group, group, S, D).sum(dim=2)


# -------------------------------------------------------------------------------------------------------------- weights


def weights_oracle(
    problem: Problem,
    allowed: Tensor,
    keep: Tensor | None,
    lse: Tensor,
    average_heads: bool,
    grad_weights: Tensor,
    tensor_cores: bool = False,
) -> Expected:
    """Expected weights = exp(scores - lse) (B, L, S) or (B, Hq, L, S), and dq, dk, dbias, dlse. `lse` is taken as
    given: an independent input, -inf on empty rows."""
    case = problem.case
    q, k = (t.detach().cpu().double().requires_grad_() for t in (problem.query, problem.key))
    bias = None if problem.bias is None else problem.bias.detach().cpu().double().requires_grad_()
    given_lse = lse.detach().cpu().double().requires_grad_()
    group = case.heads_q // case.heads_kv
    scores = _scores(q, k.repeat_interleave(group, dim=1), bias, allowed, case.effective_scale)
    empty = given_lse.detach() == float("-inf")
    possible = (scores.detach() > float("-inf")) & ~empty.unsqueeze(-1)
    shift = given_lse.masked_fill(empty, 0.0).unsqueeze(-1)
    p = torch.exp((scores - shift).masked_fill(~possible, float("-inf")))
    drop = None if keep is None else keep.double() / (1.0 - case.dropout_p)
    dropped = p if drop is None else p * drop
    weights = dropped.mean(dim=1) if average_heads else dropped
    expected = Expected({"weights": weights.detach()})
    inputs = {"dq": q, "dk": k, "dlse": given_lse} | ({} if bias is None else {"dbias": bias})
    upstream = grad_weights.detach().cpu().double()
    computed = torch.autograd.grad(weights, list(inputs.values()), upstream, allow_unused=True)
    for (name, tensor), gradient in zip(inputs.items(), computed, strict=True):
        expected.values[name] = torch.zeros_like(tensor) if gradient is None else gradient

    with torch.no_grad():
        u = unit_roundoff(arithmetic_dtype(case.dtype))
        q_size, k_size = q.abs(), k.abs().repeat_interleave(group, dim=1)
        scale = abs(case.effective_scale)
        size = scale * dot_size(q, k) + shift.abs()
        if bias is not None:
            size = size + bias.abs().masked_fill(bias.abs() == float("inf"), 0.0)
        size = EXP_ULPS + size
        per_head = u * dropped * size
        noise, values = expected.noise, expected.values
        noise["weights"] = _store(values["weights"], case.dtype) + (per_head.mean(dim=1) if average_heads else per_head)
        upstream_size = upstream.abs()
        if average_heads:
            upstream_size = upstream_size.unsqueeze(1) / case.heads_q
        ds = per_head * upstream_size
        noise["dq"] = _store(values["dq"], case.dtype) + scale * (ds @ k_size)
        noise["dk"] = _store(values["dk"], case.dtype) + _sum_groups(scale * (ds.transpose(-1, -2) @ q_size), group)
        if tensor_cores and case.dtype in (torch.bfloat16, torch.float16):
            signed = dropped * (upstream.unsqueeze(1) / case.heads_q if average_heads else upstream)
            heads = k.repeat_interleave(group, dim=1)
            _add_rounded_ds(noise, signed, q, heads, case.dtype, scale, group)
        # lse is float32 outside, and so is its gradient.
        noise["dlse"] = _store(values["dlse"], torch.float32) + ds.sum(dim=-1)
        if problem.bias is not None and bias is not None:
            noise["dbias"] = _store(values["dbias"], problem.bias.dtype) + ds.sum_to_size(bias.shape)
    return expected


# ------------------------------------------------------------------------------------------------------------- additive

TANH_ULPS = 2.0  # of 1, since tanh(x) may be taken as 1 - 2 / (1 + e^(2 x))


def additive_oracle(problem: Problem, allowed: Tensor, score_weight: Tensor) -> Expected:
    """Expected out, lse, dq, dk, dv, dw of additive attention on a problem of one head. `allowed` is (B, 1, L, S)."""
    case, keep = problem.case, allowed.squeeze(1)
    tensors = (problem.query.squeeze(1), problem.key.squeeze(1), problem.value.squeeze(1), score_weight)
    q, k, v, w = inputs = [t.detach().cpu().double().requires_grad_() for t in tensors]
    features = torch.tanh(q.unsqueeze(2) + k.unsqueeze(1))  # (B, L, S, A)
    scores = (features @ w).masked_fill(~keep, float("-inf"))
    p, lse = _softmax(scores)
    out = p @ v
    expected = Expected({"out": out.detach(), "lse": lse.detach()})
    grad_out = problem.grad_out.detach().cpu().double().squeeze(1)
    outputs, upstream = [out], [grad_out]
    grad_lse = None if problem.grad_lse is None else problem.grad_lse.cpu().double().squeeze(1)
    if grad_lse is not None:
        outputs.append(lse)
        upstream.append(grad_lse)
    gradients = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    for name, tensor, gradient in zip(("dq", "dk", "dv", "dw"), inputs, gradients, strict=True):
        expected.values[name] = torch.zeros_like(tensor) if gradient is None else gradient

    with torch.no_grad():
        u, values, noise = unit_roundoff(arithmetic_dtype(case.dtype)), expected.values, expected.noise
        size_w, slope = w.abs(), 1 - features * features
        chain = 2.0 * (features.abs() @ size_w) + math.sqrt(w.shape[0] / 3) * (features @ w).abs()
        weight = EXP_ULPS + chain + TANH_ULPS * size_w.sum()
        noise["out"] = _store(values["out"], case.dtype) + u * ((p * weight) @ v.abs())
        finite_lse = values["lse"].masked_fill(values["lse"] == float("-inf"), 0.0).abs()
        lse_size = (p * weight).sum(dim=-1) + EXP_ULPS
        noise["lse"] = unit_roundoff(torch.float32) * (finite_lse + 1.0) + u * lse_size
        dp, dp_size = grad_out @ v.transpose(-1, -2), grad_out.abs() @ v.abs().transpose(-1, -2)
        delta, delta_size = (p * dp).sum(-1, keepdim=True), (p * dp_size).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta, delta_size = delta - grad_lse.unsqueeze(-1), delta_size + grad_lse.abs().unsqueeze(-1)
        ds = p * (dp - delta)
        stored = _store(values["out"], case.dtype)  # delta is formed from the stored out, as in attention
        of_ds = u * (p * weight * (dp_size + delta_size))
        of_ds = of_ds + p * 2.0 * (grad_out * stored).square().sum(dim=-1, keepdim=True).sqrt()
        # What dS is off by, and what the slope is.
        of_slope = TANH_ULPS * u
        both = (of_ds.unsqueeze(-1) * (slope + of_slope) + of_slope * ds.abs().unsqueeze(-1)) * size_w
        noise["dq"] = _store(values["dq"], case.dtype) + both.sum(2)
        noise["dk"] = _store(values["dk"], case.dtype) + both.sum(1)
        noise["dv"] = _store(values["dv"], case.dtype) + u * ((p * weight).transpose(-1, -2) @ grad_out.abs())
        size_dw = of_ds.unsqueeze(-1) * features.abs() + TANH_ULPS * u * ds.abs().unsqueeze(-1)
        noise["dw"] = _store(values["dw"], score_weight.dtype) + size_dw.sum((0, 1, 2))
    return expected


# ----------------------------------------------------------------------------------------------------------------- loss


def counted_elements(case: LossCase, mask: Tensor) -> Tensor:
    """The mask of a loss case as a bool tensor of the input's shape: True = this element counts."""
    if case.layout == "image":
        assert case.patch_size is not None
        B, C, H, W = case.shape
        rows = torch.arange(H) // case.patch_size
        columns = torch.arange(W) // case.patch_size
        return mask[:, None, rows][..., columns].expand(B, C, H, W)
    if case.layout == "token":
        return mask[..., None].expand(case.shape)
    return mask.expand(case.shape)


def loss_oracle(
    case: LossCase,
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    eps: float,
    upstream: Tensor,
    input_size: Tensor | None = None,
) -> Expected:
    """Expected loss (float64) and gradients to input and, without normalisation, to target. `eps` is added to the
    variance of a normalised target; `upstream` is the gradient of the loss; `input_size` is the size of what was added
    up to make the input, where it is a sum."""
    x = input.detach().double().requires_grad_()
    t = target.detach().double().requires_grad_()
    counted = counted_elements(case, mask)
    goal, goal_size = _loss_target(case, t, eps)
    elementwise = _elementwise_loss(case, x - goal)
    loss = _reduce_loss(case.reduction, torch.where(counted, elementwise, 0.0), counted)
    value = loss.detach()
    # A sum beyond the range of float16 is infinite there.
    value = torch.where(value > torch.finfo(case.dtype).max, float("inf"), value)
    expected = Expected({"loss": value})
    gradients = torch.autograd.grad(loss, [x, t], upstream.double())
    expected.values["dinput"] = gradients[0]
    if not case.normalize_target:
        expected.values["dtarget"] = gradients[1]

    with torch.no_grad():
        u = unit_roundoff(arithmetic_dtype(case.dtype))
        difference = x - goal
        # The difference is off by u times the sizes that were subtracted, and by whatever normalising cost.
        off = u * ((x.abs() if input_size is None else input_size) + goal_size)
        slope = torch.where(
            counted, _loss_slope(case, difference) + off * (2.0 if case.kind == "l2" else 1 / case.beta), 0.0
        )
        if case.kind == "l1":
            slope = torch.where(counted, torch.ones_like(off), 0.0)
        loss_size = torch.where(counted, 2 * u * elementwise, 0.0) + slope * off
        noise, values = expected.noise, expected.values
        noise["loss"] = _store(values["loss"], case.dtype) + _reduce_loss(case.reduction, loss_size, counted)
        if case.reduction != "none":
            # Sums are made in float64; a chain of n additions that grows to the value is off by u sqrt(n / 3) of it.
            chain = unit_roundoff(torch.float64) * math.sqrt(counted.numel() / 3)
            noise["loss"] = noise["loss"] + chain * values["loss"].abs()
        share = _reduce_loss_share(case, counted, upstream.double().abs())
        gradient_off = {"l2": 2 * off, "l1": 0 * off, "smooth_l1": off / case.beta}[case.kind]
        if case.kind == "l1":
            # The sign of a difference within its own rounding is anybody's guess.
            gradient_off = torch.where(difference.abs() <= off, 2.0, 0.0)
        size = torch.where(counted, gradient_off, 0.0) * share
        # The gradient is stored as it is for an upstream gradient of 1; scaling it rounds once more.
        stores = 1 if case.reduction == "none" or bool((upstream == 1).all()) else 2
        for name in ("dinput", "dtarget"):
            if name in values:
                noise[name] = stores * _store(values[name], case.dtype) + 4 * u * values[name].abs() + size
    return expected


def from_tokens(case: LinearLossCase, tokens: Tensor) -> Tensor:
    """Predictions (B, N, P) in the shape of the target."""
    p = case.loss.patch_size
    if p is None or not tokens.shape[0]:
        return tokens.reshape(case.loss.shape)
    return F.fold(tokens.transpose(1, 2), case.loss.shape[-2:], p, stride=p)


def _to_tokens(case: LinearLossCase, images: Tensor) -> Tensor:
    p = case.loss.patch_size
    if p is None or not images.shape[0]:
        return images.reshape(case.tokens)
    return F.unfold(images, p, stride=p).transpose(1, 2)


def linear_loss_oracle(
    case: LinearLossCase,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    eps: float,
    upstream: Tensor,
    pairs: bool = False,
) -> Expected:
    """Expected loss (float64) of a linear prediction, and gradients to hidden, weight, bias and, without normalisation,
    to target. `pairs`: the kernel rounds the slopes for the products that make the gradients, as torch's linear does in
    16 bits; that counts as noise of single elements alone."""
    h, w = hidden.detach().double(), weight.detach().double()
    b = torch.zeros(len(w), dtype=torch.float64) if bias is None else bias.detach().double()
    prediction, size = from_tokens(case, F.linear(h, w, b)), from_tokens(case, F.linear(h.abs(), w.abs(), b.abs()))
    if case.loss.dtype == torch.float64:
        size = 2 * size  # the prediction above is rounded just as the one that is judged
    given = target, mask, eps, upstream, size
    expected = loss_oracle(case.loss, prediction, *given)
    # The slopes, which are never stored: in the arithmetic dtype.
    inner = loss_oracle(replace(case.loss, dtype=arithmetic_dtype(case.loss.dtype)), prediction, *given)
    slopes, off = (_to_tokens(case, x["dinput"]).flatten(0, 1) for x in (inner.values, inner.noise))
    del expected.values["dinput"], expected.noise["dinput"]
    rows = h.flatten(0, 1)
    u = unit_roundoff(arithmetic_dtype(case.loss.dtype))
    stores = 1 if bool((upstream == 1).all()) else 2
    gradients = {
        "dhidden": ((slopes @ w).view(h.shape), (off @ w.abs()).view(h.shape), (slopes.abs() @ w.abs()).view(h.shape)),
        "dweight": (slopes.T @ rows, off.T @ rows.abs(), slopes.abs().T @ rows.abs()),
        "dbias": (slopes.sum(0), off.sum(0), slopes.abs().sum(0)),
    }
    for name, (value, from_slopes, added) in gradients.items():
        if name != "dbias" or bias is not None:
            expected.values[name] = value
            expected.noise[name] = stores * _store(value, case.loss.dtype) + from_slopes + 2 * u * added
    if pairs:
        rounded = _store(slopes, case.loss.dtype).square()
        by_hidden, by_weight = (rounded @ w.square()).sqrt().view(h.shape), (rounded.T @ rows.square()).sqrt()
        expected.element_noise["dhidden"] = expected.noise["dhidden"] + by_hidden
        expected.element_noise["dweight"] = expected.noise["dweight"] + by_weight
    return expected


def _loss_target(case: LossCase, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The target as compared with, and the size of what was added up to make it (for the noise)."""
    if not case.normalize_target:
        return target, target.detach().abs()
    if case.layout == "image":
        assert case.patch_size is not None
        B, C, H, W = case.shape
        p = case.patch_size
        patches = (
            target.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, H // p, W // p, C * p * p)
        )
        normalised, size = _normalise(patches, eps)

        def unfold(x: Tensor) -> Tensor:
            return x.view(B, H // p, W // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)

        return unfold(normalised), unfold(size)
    return _normalise(target, eps)


def _normalise(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = rows.mean(dim=-1, keepdim=True)
    variance = (rows - mean).square().sum(dim=-1, keepdim=True) / (rows.shape[-1] - 1)
    deviation = (variance + eps).sqrt()
    normalised = (rows - mean) / deviation
    # The mean is rounded at the size of what is added up: the elements, or where they lie far from 0 their distances
    # from one of them, which keeps the digits of a small spread.
    spread = (rows - mean).abs()
    added = rows.abs().mean(dim=-1, keepdim=True) + (spread.amax(dim=-1, keepdim=True) if rows.numel() else 0.0)
    size = (rows.abs() + added) / deviation + 4 * normalised.abs()
    return normalised, size.detach()


def _elementwise_loss(case: LossCase, difference: Tensor) -> Tensor:
    if case.kind == "l2":
        return difference.square()
    if case.kind == "l1":
        return difference.abs()
    size = difference.abs()
    return torch.where(size < case.beta, 0.5 * difference.square() / case.beta, size - 0.5 * case.beta)


def _loss_slope(case: LossCase, difference: Tensor) -> Tensor:
    if case.kind == "l2":
        return 2 * difference.abs()
    if case.kind == "l1":
        return torch.ones_like(difference)
    return (difference.abs() / case.beta).clamp(max=1.0)


def _reduce_loss(reduction: str, elementwise: Tensor, counted: Tensor) -> Tensor:
    if reduction == "none":
        return elementwise
    if reduction == "sum":
        return elementwise.sum()
    if reduction == "mean":
        return elementwise.sum() / max(elementwise.numel(), 1)
    return elementwise.sum() / max(int(counted.sum()), 1)


def _reduce_loss_share(case: LossCase, counted: Tensor, upstream: Tensor) -> Tensor:
    """d loss / d elementwise loss, times the upstream gradient."""
    if case.reduction == "mean":
        return upstream / max(counted.numel(), 1)
    if case.reduction == "masked_mean":
        return upstream / max(int(counted.sum()), 1)
    return upstream
