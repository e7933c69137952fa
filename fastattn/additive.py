"""Additive attention: queries and keys are compared by a layer of tanh units instead of by their dot product.

Bahdanau, Cho and Bengio 2015, "Neural machine translation by jointly learning to align and translate", section 3.1 and
appendix A.1.2. Its relatives of the textbooks are had through the same functions:

* dot-product attention (Luong et al. 2015, "Effective approaches to attention-based neural machine translation", the
  score "dot"): `fastattn.attention` with scale=1 and one head, `x.unsqueeze(1)` for tensors (B, L, D); the score
  "general", qᵀ W k, is the same with `key @ W.T` for the key. Scaled dot-product attention: without the scale=1.
* weighted-sum attention (attention pooling: Yang et al. 2016, "Hierarchical attention networks for document
  classification", equations 5 to 7; the weights w · tanh(k) depend on the key alone): `additive_attention` with one
  query of zeros, query = key.new_zeros(B, 1, A). A sum with weights that are there already is `weights @ value`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn import dispatch, masks, ops
from fastattn.attention import _check_dtypes, _flat_mask, _Sizes
from fastattn.dispatch import Problem
from fastattn.masks import Mask


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax_j(w · tanh(q_i + k_j), over the keys the mask allows) V, fused: no tensor of L x S, with or without the
    features, exists in forward or backward (Bahdanau et al. 2015, appendix A.1.2, where q = W s, k = U h, w = v_a).

    query (B, L, A), key (B, S, A), value (B, S, Dv): float32, bfloat16, float16 or float64, all alike, and computed in
    float32 (float64 in float64). Any strides are read in place, except that a tensor whose last dimension is not
    contiguous is copied first. The projections W and U are the caller's: `AdditiveAttention` has them.
    score_weight (A,): w, of query's dtype or float32.
    mask: a `Mask` of one head, or a bool tensor broadcastable to (B, L, S); True = may attend.
    backend: run on this one or raise; without it, the first able one.

    Returns out (B, L, Dv), and with return_lse also the natural log of the softmax's denominator, (B, L) float32, which
    is differentiable. A query that may attend to nothing gets out 0 and lse -inf. Every tensor has its gradient, the
    same bits in every run.

    The weights (B, L, S), for drawing: `additive_attention_weights`. Relatives: dot-product attention (Luong et al.
    2015, "dot") is `fastattn.attention` with scale=1 and one head; weighted-sum attention, or attention pooling (Yang
    et al. 2016), is this function with one query of zeros; a sum with given weights is `weights @ value`.

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError when `backend` cannot run them.
    """
    out, lse = ops.additive_attention(*_arguments(query, key, value, score_weight, mask, backend))
    return (out, lse.float()) if return_lse else out


def additive_attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    score_weight: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weights exp(w · tanh(q_i + k_j) - lse_i) of an `additive_attention` whose lse is known, (B, L, S).

    lse (B, L) as `additive_attention(..., return_lse=True)` returns it; the other arguments as given there. Meant for
    looking at an alignment: plain PyTorch, a few queries at a time. Differentiable, at the price of keeping the
    features of every pair, L x S x A. A query that may attend to nothing has weights 0.

    Raises as `additive_attention` does.
    """
    query, key, _, score_weight, *rest = _arguments(query, key, key, score_weight, mask, backend)
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a tensor, got {type(lse).__name__}")
    masks.check_layout("lse", lse)
    if lse.dtype != torch.float32 and lse.dtype != ops.lse_dtype(query.dtype):
        raise TypeError(f"lse must be float32, got {lse.dtype}")
    if lse.shape != query.shape[:2]:
        raise ValueError(f"lse must have shape (B, L) = {tuple(query.shape[:2])}, got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse must be on the device of query, {query.device}, got {lse.device}")
    return ops.additive_attention_weights(query, key, lse, score_weight, *rest)


def _arguments(query: Any, key: Any, value: Any, score_weight: Any, mask: Any, backend: str | None) -> tuple[Any, ...]:
    """The arguments of the operator, checked."""
    tensors = query, key, value
    if not (
        all(isinstance(x, Tensor) and x.dim() == 3 for x in tensors)
        and query.device == key.device == value.device
        and query.layout is key.layout is value.layout is torch.strided
        and not (query.is_nested or key.is_nested or value.is_nested)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and query.shape[2] == key.shape[2]
    ):
        _refuse_inputs(query, key, value)
    dtype = _check_dtypes(query, key, value)
    _check_score_weight(score_weight, query)
    batch, len_q, features = query.shape
    len_k, dim_v = value.shape[1:]
    name = dispatch.select(Problem("additive_attention", query.device.type, dtype, max(features, dim_v)), backend)
    sizes = _Sizes(batch, 1, len_q, len_k, features, dim_v)
    flat_mask = _flat_mask(_with_head(mask, batch, len_q, len_k), sizes, query.device, name)
    return (*map(ops.unit_stride, tensors), score_weight.contiguous(), *flat_mask, name)


def _refuse_inputs(query: Any, key: Any, value: Any) -> NoReturn:
    """Says what is wrong with inputs that `_arguments` found wrong."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        masks.check_layout(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have 3 dimensions: query (B, L, A), key (B, S, A), value (B, S, Dv); "
                f"got {tuple(tensor.shape)}"
            )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
    seen = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have the same batch size, got {seen}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must have the same length, got {seen}")
    raise ValueError(f"query and key must have the same number of features, got {seen}")


def _check_score_weight(score_weight: Any, query: Tensor) -> None:
    if not isinstance(score_weight, Tensor):
        raise TypeError(f"score_weight must be a tensor, got {type(score_weight).__name__}")
    masks.check_layout("score_weight", score_weight)
    if score_weight.dtype != query.dtype and score_weight.dtype != torch.float32:
        autocast = ops.autocasts(query.device) and score_weight.dtype in dispatch.KERNEL_DTYPES
        if not autocast:
            raise TypeError(
                f"score_weight must have the dtype of query, {query.dtype}, or be float32, got {score_weight.dtype}"
            )
    if score_weight.dim() != 1 or score_weight.shape[0] != query.shape[2]:
        raise ValueError(
            f"score_weight must have shape (A,) = {(query.shape[2],)}, one number for each feature of query, got "
            f"{tuple(score_weight.shape)}"
        )
    if score_weight.device != query.device:
        raise ValueError(f"score_weight must be on the device of query, {query.device}, got {score_weight.device}")


def _with_head(mask: Any, batch: int, len_q: int, len_k: int) -> Any:
    """A bool tensor broadcastable to (B, L, S) with the dimension that masks have for the heads; the rest unchanged."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    masks.check_layout("mask", mask)
    fits = mask.dim() <= 3 and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), (len_k, len_q, batch), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask must broadcast to (B, L, S) = {(batch, len_q, len_k)}, got a bool mask of shape {tuple(mask.shape)}"
        )
    return mask.unsqueeze(1) if mask.dim() == 3 else mask
