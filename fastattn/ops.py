"""Every operator of the library `fastattn`: schema, kernel, fake kernel, derivatives, and its rules for vmap, autocast
and the FLOP counter.

The kernel of an operator asks `dispatch` for the backend named in its last arguments and calls the function of the same
name there. Operators take validated arguments: the public functions check. Masks travel flattened (`flatten_mask`),
since a schema has no records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fastattn import dispatch
from fastattn.backends import derivatives, reference, reference_loss
from fastattn.backends.derivatives import Inputs
from fastattn.masks import UNLIMITED, KernelMask, Mask
from fastattn.tiles import TileMap

NAMESPACE = "fastattn"

# Five optional tensors and no Tensor[] for the tile map: autograd flattens list arguments in Python at every call.
_MASK = (
    "int[] band, Tensor? prefix_lengths, Tensor? key_lengths, Tensor? key_keep, Tensor? query_segments, "
    "Tensor? key_segments, Tensor? tile_bits, Tensor? tile_live, Tensor? tile_full, Tensor? tile_live_t, "
    "Tensor? tile_full_t, int block_m, int block_n"
)
_NUM_MASK = 13
_DROPOUT = "float dropout_p, Tensor? dropout_seed"
_TANGENTS = "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor? tangent_bias"
_OTHERS = _TANGENTS.replace("tangent_", "other_")
_WEIGHTS_TANGENTS = _TANGENTS.replace("value", "lse")
_WEIGHTS_OTHERS = _OTHERS.replace("value", "lse")

SCHEMAS: dict[str, str] = {
    "attention": f"(Tensor query, Tensor key, Tensor value, Tensor? bias, {_MASK}, float scale, {_DROPOUT}, "
    "str backend) -> (Tensor out, Tensor lse)",
    "attention_backward": "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? bias, {_MASK}, float scale, {_DROPOUT}, str backend, bool need_grad_bias) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
    "attention_packed": f"(Tensor qkv, Tensor? bias, {_MASK}, float scale, {_DROPOUT}, str backend) "
    "-> (Tensor out, Tensor lse)",
    "attention_packed_backward": "(Tensor grad_out, Tensor? grad_lse, Tensor qkv, Tensor out, Tensor lse, "
    f"Tensor? bias, {_MASK}, float scale, {_DROPOUT}, str backend, bool need_grad_bias) "
    "-> (Tensor grad_qkv, Tensor grad_bias)",
    "attention_weights": f"(Tensor query, Tensor key, Tensor lse, Tensor? bias, {_MASK}, float scale, "
    f"bool average_heads, {_DROPOUT}, str backend) -> Tensor",
    "attention_weights_backward": "(Tensor grad_weights, Tensor query, Tensor key, Tensor lse, Tensor? bias, "
    f"{_MASK}, float scale, bool average_heads, {_DROPOUT}, str backend, bool need_grad_bias) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_bias, Tensor grad_lse)",
    # Derivatives of the operators above; derivatives.py has the formulas. `out` and `lse`, which attention_jvp's own
    # gradient takes, are what attention returned.
    "attention_jvp": f"(Tensor query, Tensor key, Tensor value, Tensor? bias, {_TANGENTS}, Tensor out, Tensor lse, "
    f"{_MASK}, float scale, {_DROPOUT}, str backend) -> (Tensor tangent_out, Tensor tangent_lse)",
    "attention_jvp_jvp": f"(Tensor query, Tensor key, Tensor value, Tensor? bias, {_TANGENTS}, {_OTHERS}, {_MASK}, "
    f"float scale, {_DROPOUT}, str backend) -> (Tensor second_out, Tensor second_lse)",
    "attention_backward_jvp": "(Tensor? grad_out, Tensor? grad_lse, Tensor? tangent_grad_out, "
    f"Tensor? tangent_grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias, {_TANGENTS}, {_MASK}, "
    f"float scale, {_DROPOUT}, str backend, bool need_grad_bias) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
    "attention_weights_jvp": f"(Tensor query, Tensor key, Tensor lse, Tensor? bias, {_WEIGHTS_TANGENTS}, {_MASK}, "
    f"float scale, bool average_heads, {_DROPOUT}, str backend) -> Tensor",
    "attention_weights_jvp_jvp": f"(Tensor query, Tensor key, Tensor lse, Tensor? bias, {_WEIGHTS_TANGENTS}, "
    f"{_WEIGHTS_OTHERS}, {_MASK}, float scale, bool average_heads, {_DROPOUT}, str backend) -> Tensor",
    "attention_weights_backward_jvp": "(Tensor? grad_weights, Tensor? tangent_grad_weights, Tensor query, Tensor key, "
    f"Tensor lse, Tensor? bias, {_WEIGHTS_TANGENTS}, {_MASK}, float scale, bool average_heads, {_DROPOUT}, "
    "str backend, bool need_grad_bias) -> (Tensor grad_query, Tensor grad_key, Tensor grad_bias, Tensor grad_lse)",
    "mask_tiles": "(Tensor[] masks, SymInt len_q, SymInt len_k, int block_m, int block_n, str backend) "
    "-> (Tensor bits, Tensor live, Tensor full, Tensor live_t, Tensor full_t)",
    "masked_loss": "(Tensor input, Tensor target, Tensor mask, str kind, str reduction, int patch_size, float beta, "
    "bool normalize_target, float eps, bool need_grad, str backend) -> (Tensor loss, Tensor grad_input)",
    "linear_masked_loss": "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor mask, str kind, "
    "str reduction, int patch_size, float beta, bool normalize_target, float eps, bool[] need_grad, str backend) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_target)",
    "masked_loss_backward": "(Tensor grad_loss, Tensor input, Tensor target, Tensor mask, str kind, int patch_size, "
    "float beta, bool normalize_target, float eps, str backend) -> Tensor",
    "additive_attention": f"(Tensor query, Tensor key, Tensor value, Tensor score_weight, {_MASK}, str backend) "
    "-> (Tensor out, Tensor lse)",
    "additive_attention_backward": "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor score_weight, Tensor out, Tensor lse, {_MASK}, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_score_weight)",
}


def flatten_mask(mask: KernelMask | None) -> tuple[Any, ...]:
    """The mask as the arguments that every attention operator takes."""
    # AOTInductor hands an empty list of an exported program over as None, which the operators refuse.
    exporting = torch.compiler.is_exporting()
    if mask is None:
        return _NO_MASK_EXPORTED if exporting else _NO_MASK
    tiles = mask.tile_map
    tile_arguments: tuple[Any, ...] = (None, None, None, None, None, 0, 0)
    if tiles is not None:
        tile_arguments = (
            *(tiles.bits, tiles.live, tiles.full, tiles.live_t, tiles.full_t),
            *(tiles.block_m, tiles.block_n),
        )
    return (
        list(mask.band or (_WHOLE_BAND if exporting else ())),
        mask.prefix_lengths,
        mask.key_lengths,
        mask.key_keep,
        mask.query_segments,
        mask.key_segments,
        *tile_arguments,
    )


_WHOLE_BAND = (UNLIMITED,) * 4  # excludes nothing
_NO_MASK: tuple[Any, ...] = ([], *[None] * 10, 0, 0)
_NO_MASK_EXPORTED: tuple[Any, ...] = (list(_WHOLE_BAND), *_NO_MASK[1:])


def unflatten_mask(arguments: tuple[Any, ...], len_q: int, len_k: int, backend: str) -> KernelMask | None:
    """The inverse of `flatten_mask`."""
    band, prefix_lengths, key_lengths, key_keep, query_segments, key_segments, bits = arguments[:7]
    band = None if not band or tuple(band) == _WHOLE_BAND else tuple(band)
    present = (prefix_lengths, key_lengths, key_keep, query_segments, key_segments, bits)
    if band is None and all(x is None for x in present):
        return None
    tile_map = None
    if bits is not None:
        live, full, live_t, full_t, block_m, block_n = arguments[7:]
        if bits.dtype == torch.bool:  # an exported program carries the mask itself; see `dense_for_export`
            sizes = (len_q, len_k, block_m, block_n)
            bits, live, full, live_t, full_t = dispatch.load(backend).mask_tiles([bits], *sizes)
        tile_map = TileMap(bits, live, full, live_t, full_t, block_m, block_n, len_q, len_k)
    return KernelMask(
        band=band,
        prefix_lengths=prefix_lengths,
        key_lengths=key_lengths,
        key_keep=key_keep,
        query_segments=query_segments,
        key_segments=key_segments,
        tile_map=tile_map,
    )


def dense_for_export(dense: list[Tensor]) -> tuple[Any, ...]:
    """What stands in an exported program for the five tensors of mask_tiles: the mask, packed when the operator runs.

    The sizes of a tile map depend on whether a length fills one word of 64 bits or more, which would bind an exported
    program to one side of that limit.
    """
    keep = dense[0]
    for other in dense[1:]:
        keep = keep & other
    return keep, None, None, None, None


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype of a problem, in which the operators hold lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Attention -----------------------------------------------------------------------------------------------------------


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # (B, L, 3, H, D) -> three views (B, H, L, D), read in place
    return qkv.select(2, 0).transpose(1, 2), qkv.select(2, 1).transpose(1, 2), qkv.select(2, 2).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    scale, dropout_p, dropout_seed, backend = rest[_NUM_MASK:]
    mask = unflatten_mask(rest[:_NUM_MASK], query.shape[2], key.shape[2], backend)
    return dispatch.load(backend).attention_forward(query, key, value, bias, mask, scale, dropout_p, dropout_seed)


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, len_q, _ = query.shape
    # Laid out as (B, L, H, Dv), so that merging the heads is a view.
    out = query.new_empty((batch, len_q, heads, value.shape[3])).transpose(1, 2)
    return out, query.new_empty((batch, heads, len_q), dtype=lse_dtype(query.dtype))


def _attention_packed(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _attention(*_split(qkv), *rest)


def _attention_packed_fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _attention_fake(*_split(qkv), *rest)


def _run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, ...],
    rest: tuple[Any, ...],
    gradients: tuple[Tensor, ...],
) -> Tensor:
    query, key, value, out, lse = tensors
    bias, *tail = rest
    scale, dropout_p, dropout_seed, backend, need_grad_bias = tail[_NUM_MASK:]
    mask = unflatten_mask(tuple(tail[:_NUM_MASK]), query.shape[2], key.shape[2], backend)
    grad_bias = dispatch.load(backend).attention_backward(
        *(grad_out, grad_lse, query, key, value, out, lse, bias, mask, scale, dropout_p, dropout_seed),
        *gradients,
        need_grad_bias,
    )
    return query.new_empty(0) if grad_bias is None else grad_bias


def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    return *gradients, _run_backward(grad_out, grad_lse, (query, key, value, out, lse), rest, gradients)


def _grad_bias_fake(query: Tensor, bias: Tensor | None, need_grad_bias: bool) -> Tensor:
    if bias is None or not need_grad_bias:
        return query.new_empty(0)
    return bias.new_empty(bias.shape)


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        _grad_bias_fake(query, rest[2], rest[-1]),
    )


def _attention_packed_backward(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    # One gradient in the layout of qkv, written through views: nothing is concatenated.
    grad_qkv = torch.empty_like(qkv)
    return grad_qkv, _run_backward(grad_out, grad_lse, (*_split(qkv), out, lse), rest, _split(grad_qkv))


def _attention_packed_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), _grad_bias_fake(qkv, bias, rest[-1])


def _attention_weights(query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    scale, average_heads, dropout_p, dropout_seed, backend = rest[_NUM_MASK:]
    mask = unflatten_mask(rest[:_NUM_MASK], query.shape[2], key.shape[2], backend)
    return dispatch.load(backend).attention_weights(
        query, key, lse, bias, mask, scale, average_heads, dropout_p, dropout_seed
    )


def _attention_weights_fake(query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    average_heads = rest[_NUM_MASK + 1]
    batch, heads, len_q, _ = query.shape
    shape = (batch, len_q, key.shape[2]) if average_heads else (batch, heads, len_q, key.shape[2])
    return query.new_empty(shape)


def _attention_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, average_heads, dropout_p, dropout_seed, backend, need_grad_bias = rest[_NUM_MASK:]
    mask = unflatten_mask(rest[:_NUM_MASK], query.shape[2], key.shape[2], backend)
    grad_query, grad_key, grad_bias, grad_lse = dispatch.load(backend).attention_weights_backward(
        *(grad_weights, query, key, lse, bias, mask, scale, average_heads, dropout_p, dropout_seed, need_grad_bias)
    )
    return grad_query, grad_key, query.new_empty(0) if grad_bias is None else grad_bias, grad_lse


def _attention_weights_backward_fake(
    grad_weights: Tensor, query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        _grad_bias_fake(query, bias, rest[-1]),
        lse.new_empty(lse.shape),
    )


# Derivatives of attention: the same plain PyTorch serves every backend ------------------------------------------------


def _problem(query: Tensor, key: Tensor, rest: Sequence[Any]) -> tuple[Any, ...]:
    """rest: the mask, scale, what the operator has of its own, dropout and backend; returns it with the mask whole."""
    *own, backend = rest[_NUM_MASK:]
    return unflatten_mask(tuple(rest[:_NUM_MASK]), query.shape[2], key.shape[2], backend), *own


def _attention_jvp(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, t, rest = Inputs(*arguments[:4]), Inputs(*arguments[4:8]), arguments[10:]
    return derivatives.attention_jvp(x, t, *_problem(arguments[0], arguments[1], rest))


def _attention_jvp_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _attention_fake(query, key, value)


def _attention_jvp_jvp(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, t, u = (Inputs(*arguments[first : first + 4]) for first in (0, 4, 8))
    return derivatives.attention_jvp_jvp(x, t, u, *_problem(arguments[0], arguments[1], arguments[12:]))


def _attention_backward_jvp(*arguments: Any) -> tuple[Tensor, ...]:
    *most, need_grad_bias = arguments
    x, t = Inputs(*most[4:8]), Inputs(*most[8:12])
    mask, scale, *dropout = _problem(most[4], most[5], most[12:])
    gradients = derivatives.attention_backward_jvp(*(*most[:4], x, t, mask, scale, *dropout, need_grad_bias))
    return tuple(arguments[4].new_empty(0) if gradient is None else gradient for gradient in gradients)


def _attention_backward_jvp_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, key, value, bias = arguments[4:8]
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    return *gradients, _grad_bias_fake(query, bias, arguments[-1])


def _without_value(query: Tensor | None, key: Tensor | None, lse: Any, bias: Tensor | None) -> Inputs:
    return Inputs(query, key, None, bias)


def _attention_weights_jvp(*arguments: Any) -> Tensor:
    x, t = arguments[:4], arguments[4:8]
    problem = _problem(x[0], x[1], arguments[8:])
    return derivatives.attention_weights_jvp(_without_value(*x), x[2], _without_value(*t), t[2], *problem)


def _attention_weights_jvp_fake(query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return _attention_weights_fake(query, key, lse, bias, *rest[4:])


def _attention_weights_jvp_jvp(*arguments: Any) -> Tensor:
    x, t, u = arguments[:4], arguments[4:8], arguments[8:12]
    tangents = _without_value(*t), t[2], _without_value(*u), u[2]
    problem = _problem(x[0], x[1], arguments[12:])
    return derivatives.attention_weights_jvp_jvp(_without_value(*x), x[2], *tangents, *problem)


def _attention_weights_jvp_jvp_fake(query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return _attention_weights_fake(query, key, lse, bias, *rest[8:])


def _attention_weights_backward_jvp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *most, need_grad_bias = arguments
    x, t = most[2:6], most[6:10]
    mask, scale, _, *dropout = _problem(x[0], x[1], most[10:])
    grad_query, grad_key, grad_bias, grad_lse = derivatives.attention_weights_backward_jvp(
        *(*most[:2], _without_value(*x), x[2], _without_value(*t), t[2], mask, scale, *dropout, need_grad_bias)
    )
    return grad_query, grad_key, x[0].new_empty(0) if grad_bias is None else grad_bias, grad_lse


def _attention_weights_backward_jvp_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attention_weights_backward_fake(arguments[0], *arguments[2:6], *arguments[10:])


# Autograd ------------------------------------------------------------------------------------------------------------
# For each operator: what its derivatives need (setup), its vector-Jacobian product (gradients) and its Jacobian-vector
# product (tangents). Those of the gradient are again operators with derivatives of their own, and so on up to the
# second order. A gradient or a tangent that is None is zero.


_THIRD = (
    "attention has derivatives up to the second order, and this is the third; where you need it, use torch's own "
    "functions. For a product with the Hessian take torch.func.jvp of torch.func.grad, or vhp of "
    "torch.autograd.functional, whose hvp goes through the third"
)


def _save(ctx: Any, values: Sequence[Any]) -> None:
    # Only tensors go through save_for_backward, which keeps hooks and checkpointing working; a gradient that nobody
    # uses stays None.
    ctx.set_materialize_grads(False)
    others = list(values)
    places = [n for n, x in enumerate(values) if isinstance(x, Tensor)]
    tensors = [values[n] for n in places]
    for n in places:
        others[n] = None
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)
    ctx.places, ctx.others = places, others


def _saved(ctx: Any) -> list[Any]:
    values = list(ctx.others)
    for n, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        values[n] = tensor
    return values


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs)


def _save_inputs_and_output(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, (*output, *inputs))


def _wanted(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of the first arguments, as far as they are needed, and None for the others."""
    needs = ctx.needs_input_grad
    wanted = tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=False))
    return *wanted, *(None,) * (len(needs) - len(wanted))


def _any(tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None for tensor in tensors)


def _sum(first: Sequence[Tensor] | None, second: Sequence[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if first is None or second is None:
        return tuple(first or second or (None, None))  # type: ignore[return-value]
    return first[0] + second[0], first[1] + second[1]


def _attention_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return _wanted(ctx, ())
    out, lse, query, key, value, bias, *rest = _saved(ctx)
    gradients = attention_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        *(grad_lse, query, key, value, out, lse, bias, *rest, ctx.needs_input_grad[3]),
    )
    return _wanted(ctx, gradients)


def _attention_tangents(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *inputs = _saved(ctx)
    return attention_jvp(*inputs[:4], *tangents[:4], out, lse, *inputs[4:])


def _attention_packed_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return _wanted(ctx, ())
    out, lse, qkv, bias, *rest = _saved(ctx)
    gradients = attention_packed_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        *(grad_lse, qkv, out, lse, bias, *rest, ctx.needs_input_grad[1]),
    )
    return _wanted(ctx, gradients)


def _split_tangent(tangent: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if tangent is None else _split(tangent)


def _attention_packed_tangents(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, qkv, bias, *rest = _saved(ctx)
    return attention_jvp(*_split(qkv), bias, *_split_tangent(tangents[0]), tangents[1], out, lse, *rest)


def _attention_weights_gradients(ctx: Any, grad_weights: Tensor | None) -> tuple[Any, ...]:
    if grad_weights is None:
        return _wanted(ctx, ())
    grad_query, grad_key, grad_bias, grad_lse = attention_weights_backward(
        grad_weights, *_saved(ctx), ctx.needs_input_grad[3]
    )
    return _wanted(ctx, (grad_query, grad_key, grad_lse, grad_bias))


def _attention_weights_tangents(ctx: Any, *tangents: Tensor | None) -> Tensor:
    inputs = _saved(ctx)
    return attention_weights_jvp(*inputs[:4], *tangents[:4], *inputs[4:])


# The gradients' own derivatives. Their inputs `out` and `lse` are functions of the others, whose derivatives count the
# whole dependence: they get none themselves.


def _attention_backward_gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad_out, grad_lse, query, key, value, out, lse, bias, *rest, need_grad_bias = _saved(ctx)
    cotangents = (*cotangents[:3], cotangents[3] if need_grad_bias and bias is not None else None)
    if not _any(cotangents):
        return _wanted(ctx, ())
    needs = ctx.needs_input_grad
    of_grads: Sequence[Any] = (None, None)
    of_inputs: Sequence[Any] = (None, None, None, None)
    if needs[0] or needs[1]:
        of_grads = attention_jvp(query, key, value, bias, *cotangents, out, lse, *rest)
    if any(needs[2:5]) or needs[7]:
        of_inputs = attention_backward_jvp(
            *(grad_out, grad_lse, None, None, query, key, value, bias, *cotangents, *rest, needs[7])
        )
    return _wanted(ctx, (*of_grads, *of_inputs[:3], None, None, of_inputs[3]))


def _attention_backward_tangents(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    grad_out, grad_lse, query, key, value, _, _, bias, *rest = _saved(ctx)
    of_inputs = (*tangents[2:5], tangents[7])
    return attention_backward_jvp(grad_out, grad_lse, *tangents[:2], query, key, value, bias, *of_inputs, *rest)


def _joined(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of query, key and value as that of qkv, and that of bias."""
    return torch.stack([gradient.transpose(1, 2) for gradient in gradients[:3]], 2), gradients[3]


def _attention_packed_backward_gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad_out, grad_lse, qkv, out, lse, bias, *rest, need_grad_bias = _saved(ctx)
    cotangents = (cotangents[0], cotangents[1] if need_grad_bias and bias is not None else None)
    if not _any(cotangents):
        return _wanted(ctx, ())
    needs = ctx.needs_input_grad
    inputs, along = (*_split(qkv), bias), (*_split_tangent(cotangents[0]), cotangents[1])
    of_grads: Sequence[Any] = (None, None)
    of_inputs: Sequence[Any] = (None, None)
    if needs[0] or needs[1]:
        of_grads = attention_jvp(*inputs, *along, out, lse, *rest)
    if needs[2] or needs[5]:
        of_inputs = _joined(attention_backward_jvp(grad_out, grad_lse, None, None, *inputs, *along, *rest, needs[5]))
    return _wanted(ctx, (*of_grads, of_inputs[0], None, None, of_inputs[1]))


def _attention_packed_backward_tangents(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_out, grad_lse, qkv, _, _, bias, *rest = _saved(ctx)
    along = (*_split_tangent(tangents[2]), tangents[5])
    return _joined(attention_backward_jvp(grad_out, grad_lse, *tangents[:2], *_split(qkv), bias, *along, *rest))


def _attention_weights_backward_gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    grad_weights, query, key, lse, bias, *rest, need_grad_bias = _saved(ctx)
    inputs = query, key, lse, bias
    of_query, of_key, of_bias, of_lse = cotangents
    along = (of_query, of_key, of_lse, of_bias if need_grad_bias and bias is not None else None)
    if not _any(along):
        return _wanted(ctx, ())
    needs = ctx.needs_input_grad
    of_grad, of_inputs = None, (None, None, None, None)
    if needs[0]:
        of_grad = attention_weights_jvp(*inputs, *along, *rest)
    if any(needs[1:5]):
        of_inputs = attention_weights_backward_jvp(grad_weights, None, *inputs, *along, *rest, needs[4])
    grad_query, grad_key, grad_bias, grad_lse = of_inputs
    return _wanted(ctx, (of_grad, grad_query, grad_key, grad_lse, grad_bias))


def _attention_weights_backward_tangents(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    grad_weights, *inputs = _saved(ctx)
    return attention_weights_backward_jvp(grad_weights, tangents[0], *inputs[:4], *tangents[1:5], *inputs[4:])


def _attention_jvp_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return _wanted(ctx, ())
    inputs = _saved(ctx)
    x, t, (out, lse), rest = inputs[:4], inputs[4:8], inputs[8:10], inputs[10:]
    needs = ctx.needs_input_grad
    of_inputs: Sequence[Any] = (None,) * 4
    of_tangents: Sequence[Any] = (None,) * 4
    if any(needs[:4]):
        of_inputs = attention_backward_jvp(grad_out, grad_lse, None, None, *x, *t, *rest, needs[3])
    if any(needs[4:8]):
        grad = torch.zeros_like(out) if grad_out is None else grad_out
        of_tangents = attention_backward(grad, grad_lse, *x[:3], out, lse, x[3], *rest, needs[7])
    return _wanted(ctx, (*of_inputs, *of_tangents))


def _attention_jvp_tangents(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    inputs = _saved(ctx)
    x, t, saved, rest = inputs[:4], inputs[4:8], inputs[8:10], inputs[10:]
    along, of_tangents = tangents[:4], tangents[4:8]
    second = attention_jvp_jvp(*x, *t, *along, *rest) if _any(along) and _any(t) else None
    first = attention_jvp(*x, *of_tangents, *saved, *rest) if _any(of_tangents) else None
    return _sum(second, first)


def _attention_weights_jvp_gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return _wanted(ctx, ())
    inputs = _saved(ctx)
    x, t, rest = inputs[:4], inputs[4:8], inputs[8:]
    needs = ctx.needs_input_grad
    of_inputs: Sequence[Any] = (None,) * 4
    of_tangents: Sequence[Any] = (None,) * 4
    if any(needs[:4]):
        query, key, bias, lse = attention_weights_backward_jvp(grad, None, *x, *t, *rest, needs[3])
        of_inputs = query, key, lse, bias
    if any(needs[4:8]):
        query, key, bias, lse = attention_weights_backward(grad, *x, *rest, needs[7])
        of_tangents = query, key, lse, bias
    return _wanted(ctx, (*of_inputs, *of_tangents))


def _attention_weights_jvp_tangents(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
    inputs = _saved(ctx)
    x, t, rest = inputs[:4], inputs[4:8], inputs[8:]
    along, of_tangents = tangents[:4], tangents[4:8]
    second = attention_weights_jvp_jvp(*x, *t, *along, *rest) if _any(along) and _any(t) else None
    first = attention_weights_jvp(*x, *of_tangents, *rest) if _any(of_tangents) else None
    return second + first if second is not None and first is not None else first if second is None else second


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For derivatives that are refused anyway."""


def _refuse_third_derivative(name: str) -> Callable:
    def derivative(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"fastattn::{name}: {_THIRD}")

    return derivative


# Mask tiles ----------------------------------------------------------------------------------------------------------


def _mask_tiles(masks: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *sizes, backend = rest
    return dispatch.load(backend).mask_tiles(masks, *sizes)


def _mask_tiles_fake(
    masks: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int, backend: str
) -> tuple[Tensor, ...]:
    batch, heads = torch.broadcast_shapes(*(mask.shape[:2] for mask in masks))
    tiles_q, tiles_k = -(-len_q // block_m), -(-len_k // block_n)
    words_q, words_k = -(-tiles_q // 64), -(-tiles_k // 64)

    def words(rows: int, columns: int) -> Tensor:
        return masks[0].new_empty((batch, heads, rows, columns), dtype=torch.int64)

    return (
        words(len_q, -(-len_k // 64)),
        words(tiles_q, words_k),
        words(tiles_q, words_k),
        words(tiles_k, words_q),
        words(tiles_k, words_q),
    )


# Masked loss ---------------------------------------------------------------------------------------------------------


def _masked_loss(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = rest
    loss, grad_input = dispatch.load(backend).masked_loss(input, *arguments)
    return loss, input.new_empty(0) if grad_input is None else grad_input


def _has_gradient(reduction: str, need_grad: bool) -> bool:
    # The gradient of "none" depends on the upstream gradient, element by element.
    return need_grad and reduction != "none"


def _masked_loss_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    reduction, need_grad = rest[3], rest[8]
    loss = torch.empty_like(input) if reduction == "none" else input.new_empty(())
    return loss, torch.empty_like(input) if _has_gradient(reduction, need_grad) else input.new_empty(0)


def _masked_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, mask, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.rest = tuple(rest)
    ctx.has_gradient = _has_gradient(rest[1], rest[6])
    if ctx.has_gradient:
        # An output that is not marked as non-differentiable: in a second derivative its gradient arrives in the
        # backward. Only the curvature of "smooth_l1" depends on the difference, and has to keep it alive.
        curved = rest[0] == "smooth_l1"
        ctx.save_for_backward(output[1], mask, input if curved else None, target if curved else None)
    else:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, target, mask)


def _masked_loss_gradients(ctx: Any, grad_loss: Tensor | None, grad_grad_input: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if grad_loss is None and grad_grad_input is None:
        return None, None, *nothing
    kind, reduction, patch_size, beta, normalize_target, eps, _, backend = ctx.rest
    gradient: Tensor | None = None
    if ctx.has_gradient:
        grad_input, mask, input, target = ctx.saved_tensors
        if grad_loss is not None:
            gradient = _scaled(grad_input, grad_loss)
        if grad_grad_input is not None:
            options = kind, reduction, patch_size, beta, normalize_target, eps
            second = reference_loss.times_curvature(grad_grad_input, input, target, mask, *options)
            gradient = second if gradient is None else gradient + second
    elif grad_loss is None:
        return None, None, *nothing
    elif reduction == "none":
        input, target, mask = ctx.saved_tensors
        gradient = masked_loss_backward(
            grad_loss, input, target, mask, kind, patch_size, beta, normalize_target, eps, backend
        )
    else:
        # Traced without a gradient in sight, such as an exported evaluation that is now trained: compute it here.
        input, target, mask = ctx.saved_tensors
        _, grad_input = masked_loss(
            input, target, mask, kind, reduction, patch_size, beta, normalize_target, eps, True, backend
        )
        gradient = grad_input * grad_loss
    assert gradient is not None
    return *_of_difference(ctx, gradient, normalize_target), *nothing


def _of_difference(ctx: Any, gradient: Tensor, normalize_target: bool, first: int = 0) -> tuple[Any, Any]:
    """The gradient of input - target as those of input and of target, arguments number `first` and the next."""
    need_input, need_target = ctx.needs_input_grad[first : first + 2]
    if need_target and normalize_target:
        raise RuntimeError("fastattn::masked_loss: no gradient reaches a target that is normalised")
    return gradient if need_input else None, -gradient if need_target else None


def _masked_loss_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _masked_loss_backward_gradients(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    grad_loss, input, target, mask = ctx.saved_tensors
    kind, patch_size, beta, normalize_target, eps, _ = ctx.rest
    options = kind, patch_size, beta, normalize_target, eps
    of_grad_loss = reference_loss.times_slope(cotangent, input, target, mask, *options)
    both = cotangent * grad_loss
    second = reference_loss.times_curvature(both, input, target, mask, kind, "none", *options[1:])
    need = ctx.needs_input_grad[0]
    return of_grad_loss if need else None, *_of_difference(ctx, second, normalize_target, 1), *(None,) * 7


def _scaled(grad_input: Tensor, grad_loss: Tensor) -> Tensor:
    # The plain `loss.backward()` needs no pass over the gradient at all. Only where reading the scalar is free, nothing
    # traces or differentiates this, and the graph is not kept: the caller gets the saved tensor itself.
    if (
        type(grad_loss) is Tensor
        and grad_loss.device.type == "cpu"
        and torch._C._has_storage(grad_loss)  # not so with torch.autograd.grad(is_grads_batched=True)
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and grad_loss.item() == 1.0
    ):
        return grad_input.detach()
    return grad_input * grad_loss


def _masked_loss_backward(grad_loss: Tensor, *rest: Any) -> Tensor:
    *arguments, backend = rest
    return dispatch.load(backend).masked_loss_backward_none(grad_loss, *arguments)


def _masked_loss_backward_fake(grad_loss: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


# Additive attention --------------------------------------------------------------------------------------------------
# query (B, L, A), key (B, S, A), value (B, S, Dv), score_weight (A,), out (B, L, Dv), lse (B, L). Outputs and gradients
# are contiguous. The mask has one head.


def _additive_mask(query: Tensor, key: Tensor, rest: Sequence[Any]) -> KernelMask | None:
    """rest: the mask and the backend."""
    return unflatten_mask(tuple(rest[:_NUM_MASK]), query.shape[1], key.shape[1], rest[_NUM_MASK])


def _additive_attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    mask = _additive_mask(query, key, rest)
    return dispatch.load(rest[-1]).additive_attention_forward(query, key, value, score_weight, mask)


def _additive_attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, len_q, _ = query.shape
    out = query.new_empty((batch, len_q, value.shape[2]))
    return out, query.new_empty((batch, len_q), dtype=lse_dtype(query.dtype))


def _additive_attention_backward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    tensors, tail = rest[:6], rest[6:]
    mask = _additive_mask(tensors[0], tensors[1], tail)
    return dispatch.load(tail[-1]).additive_attention_backward(grad_out, grad_lse, *tensors, mask)


def _additive_attention_backward_fake(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in rest[:4])


def _additive_attention_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return _wanted(ctx, ())
    out, lse, query, key, value, score_weight, *rest = _saved(ctx)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    gradients = additive_attention_backward(grad_out, grad_lse, query, key, value, score_weight, out, lse, *rest)
    return _wanted(ctx, gradients)


def _additive_attention_backward_gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    # Through the plain formula of the gradient, which can be differentiated any number of times.
    grad_out, grad_lse, *tensors = _saved(ctx)
    inputs, rest = tensors[:4], tensors[4:]
    given = [grad_out, *inputs] if grad_lse is None else [grad_out, *inputs, grad_lse]

    def gradients(grad_out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _differentiable_additive_backward(
            grad_out, tensors[4] if len(tensors) > 4 else None, *tensors[:4], *rest
        )

    with _without_autocast(grad_out.device.type):
        outputs, product, *_ = torch.func.vjp(gradients, *given)
        filled = tuple(torch.zeros_like(x) if c is None else c for c, x in zip(cotangents, outputs, strict=True))
        of_grad_out, *of_inputs = product(filled)
    of_grad_lse = of_inputs.pop() if grad_lse is not None else None
    return _wanted(ctx, (of_grad_out, of_grad_lse, *of_inputs))


def _differentiable_additive(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    value, score_weight, *tail = rest
    mask = _additive_mask(query, key, tail)
    return reference.additive_attention_forward(query, key, value, score_weight, mask)


def _differentiable_additive_backward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    query, key, value, score_weight, out, lse, *tail = rest
    mask = _additive_mask(query, key, tail)
    return reference.additive_attention_backward(grad_out, grad_lse, query, key, value, score_weight, out, lse, mask)


def additive_attention_weights(query: Tensor, key: Tensor, lse: Tensor, score_weight: Tensor, *rest: Any) -> Tensor:
    """exp(score - lse) (B, L, S), in plain PyTorch for every backend; `rest` is the mask and the backend."""
    if autocasts(query.device):
        # Of what the operator compared, and as exactly: autocast would round the scores.
        query, key, _ = _cast("additive_attention", (query, key, key), query.device.type)
        with _without_autocast(query.device.type):
            return additive_attention_weights(query, key, lse, score_weight, *rest)
    return reference.additive_weights(query, key, lse, score_weight, _additive_mask(query, key, rest))


# Linear head with its masked loss -------------------------------------------------------------------------------------
# hidden (B, N, E), weight (P, E), bias (P,), target (B, N, P) with mask (B, 1, N), or images with a patch grid. All
# gradients come out of the forward, for an upstream gradient of 1: nothing of the predictions is left for a backward.


def _linear_masked_loss(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, backend = rest
    loss, *gradients = dispatch.load(backend).linear_masked_loss(hidden, *arguments)
    return loss, *(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _linear_masked_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    need_grad = rest[7]
    gradients = (
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias, target), need_grad, strict=True)
    )
    return target.new_empty(()), *gradients


def _linear_masked_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.rest = tuple(inputs[5:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _linear_masked_loss_gradients(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if grad_loss is None:
        return *(None,) * 4, *nothing
    tensors, gradients = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    *options, need_grad, backend = ctx.rest
    wanted = ctx.needs_input_grad[:4]
    if wanted[3] and options[4]:
        raise RuntimeError("fastattn::linear_masked_loss: no gradient reaches a target that is normalised")
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Someone differentiates the gradient: through its plain formula, any number of times.
        with _without_autocast(grad_loss.device.type):
            formula = reference_loss.linear_masked_loss(*(*tensors, *options, wanted))[1:]
        return *(None if g is None else g * grad_loss for g in formula), *nothing
    if any(want and not need for want, need in zip(wanted, need_grad, strict=True)):
        # Traced without a gradient in sight, such as an exported evaluation that is now trained: compute it here.
        _, *gradients = linear_masked_loss(*tensors, *options, list(wanted), backend)
    return *(_scaled(g, grad_loss) if want else None for g, want in zip(gradients, wanted, strict=True)), *nothing


def _differentiable_linear_loss(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, target, mask, *options, _, _ = rest
    target = _fixed_target(target, options[4])
    arguments = hidden, weight, bias, target, mask, *options, (False,) * 4
    loss = reference_loss.linear_masked_loss(*arguments)[0]
    return loss, *(hidden.new_empty(0) for _ in range(4))


# FLOPs: what torch counts for its own attention, dense, less what a band excludes. Everything else that a mask excludes
# depends on the values of tensors, which a formula does not see: an upper bound.


def _pairs(band: list[int], len_q: int, len_k: int) -> int:
    """How many (i, j) a band allows."""
    if not band:
        return len_q * len_k
    left_top, right_top, left_bottom, right_bottom = band
    low = max(-left_top, -left_bottom + len_k - len_q)
    high = min(right_top, right_bottom + len_k - len_q)

    def up_to(limit: int) -> int:  # pairs with j - i <= limit: the sum over i of clamp(i + limit + 1, 0, S)
        def total(n: int) -> int:
            whole = max(n - 1 - len_k, 0)
            ramp = min(max(n, 0), len_k + 1)
            return ramp * (ramp - 1) // 2 + whole * len_k

        return total(limit + 1 + len_q) - total(limit + 1)

    return max(up_to(high) - up_to(low - 1), 0)


def _flops(query: Any, key: Any, value: Any, mask: tuple[Any, ...], of_dim: int, of_dim_v: int) -> int:
    batch, heads, len_q, dim = query
    return 2 * batch * heads * _pairs(mask[0], len_q, key[2]) * (of_dim * dim + of_dim_v * value[3])


def _packed_shape(qkv: Any) -> tuple[int, int, int, int]:
    batch, length, _, heads, dim = qkv
    return batch, heads, length, dim


def _attention_flops(query: Any, key: Any, value: Any, bias: Any, *rest: Any, **kwargs: Any) -> int:
    return _flops(query, key, value, rest[:_NUM_MASK], 1, 1)


def _attention_backward_flops(grad_out: Any, grad_lse: Any, *rest: Any, **kwargs: Any) -> int:
    query, key, value, out, lse, bias, *mask = rest
    return _flops(query, key, value, tuple(mask[:_NUM_MASK]), 3, 2)


def _attention_packed_flops(qkv: Any, bias: Any, *rest: Any, **kwargs: Any) -> int:
    shape = _packed_shape(qkv)
    return _flops(shape, shape, shape, rest[:_NUM_MASK], 1, 1)


def _attention_packed_backward_flops(grad_out: Any, grad_lse: Any, qkv: Any, *rest: Any, **kwargs: Any) -> int:
    shape = _packed_shape(qkv)
    return _flops(shape, shape, shape, rest[3 : 3 + _NUM_MASK], 3, 2)


def _attention_weights_flops(query: Any, key: Any, lse: Any, bias: Any, *rest: Any, **kwargs: Any) -> int:
    return _flops(query, key, key, rest[:_NUM_MASK], 1, 0)


def _attention_weights_backward_flops(grad_weights: Any, query: Any, key: Any, *rest: Any, **kwargs: Any) -> int:
    return _flops(query, key, key, rest[2 : 2 + _NUM_MASK], 3, 0)


def _with_head(shape: Any) -> tuple[int, ...]:
    return shape[0], 1, *shape[1:]


def _additive_flops(query: Any, key: Any, value: Any, score_weight: Any, *rest: Any, **kwargs: Any) -> int:
    # The products with the weight and with the values; a tanh counts for none, as in torch's own formulas.
    return _flops(_with_head(query), _with_head(key), _with_head(value), rest[:_NUM_MASK], 1, 1)


def _additive_backward_flops(
    grad_out: Any, grad_lse: Any, query: Any, key: Any, value: Any, *rest: Any, **_: Any
) -> int:
    return _flops(_with_head(query), _with_head(key), _with_head(value), rest[3 : 3 + _NUM_MASK], 4, 2)


def _derivative_flops(query: int, band: int, shared: bool, of_dim: int, of_dim_v: int) -> Callable:
    """For a derivative: where its query and its band stand, whether it has no value, its products if all is given."""

    def flops(*shapes: Any, **kwargs: Any) -> int:
        of_query, of_key, of_value = shapes[query : query + 3]
        return _flops(of_query, of_key, of_key if shared else of_value, (shapes[band],), of_dim, of_dim_v)

    return flops


def _linear_loss_flops(hidden: Any, weight: Any, *rest: Any, **kwargs: Any) -> int:
    # The dense products, as of torch's linear: which tokens count is in the values of the mask.
    need_grad = rest[9]
    return 2 * hidden[0] * hidden[1] * weight[0] * weight[1] * (1 + need_grad[0] + need_grad[1])


# Autocast: attention runs in the autocast dtype, with lse in its own; the losses run in float32, as torch's do. Inside
# an operator nothing is cast again, nor in a backward that runs within the region.


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the tensors of a device."""
    # Asking about the meta device, which has no autocast, raises.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator computes on `x`: that of autocast where it is on, which leaves float64 alone."""
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _cast(name: str, arguments: tuple[Any, ...], device_type: str) -> list[Any]:
    positions, dtype = _AUTOCAST[name]
    cast = list(arguments)
    for position in positions:
        x = cast[position]
        if x is not None and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device_type:
            cast[position] = x.to(dtype or torch.get_autocast_dtype(device_type))
    return cast


def _without_autocast(device_type: str) -> AbstractContextManager:
    """For a formula in plain PyTorch, which a backward within the region would otherwise compute in half precision."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _autocast_kernel(name: str, key: str, device_type: str) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*arguments: Any) -> Any:
        cast = _cast(name, arguments, device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.fastattn, name)(*cast)

    return kernel


# Registration --------------------------------------------------------------------------------------------------------


_LAST = ("attention_jvp_jvp", "attention_backward_jvp", "attention_weights_jvp_jvp", "attention_weights_backward_jvp")
_KERNELS: dict[str, tuple[Callable, Callable]] = {  # the kernel and its fake
    "attention": (_attention, _attention_fake),
    "attention_backward": (_attention_backward, _attention_backward_fake),
    "attention_packed": (_attention_packed, _attention_packed_fake),
    "attention_packed_backward": (_attention_packed_backward, _attention_packed_backward_fake),
    "attention_weights": (_attention_weights, _attention_weights_fake),
    "attention_weights_backward": (_attention_weights_backward, _attention_weights_backward_fake),
    "attention_jvp": (_attention_jvp, _attention_jvp_fake),
    "attention_jvp_jvp": (_attention_jvp_jvp, _attention_jvp_fake),
    "attention_backward_jvp": (_attention_backward_jvp, _attention_backward_jvp_fake),
    "attention_weights_jvp": (_attention_weights_jvp, _attention_weights_jvp_fake),
    "attention_weights_jvp_jvp": (_attention_weights_jvp_jvp, _attention_weights_jvp_jvp_fake),
    "attention_weights_backward_jvp": (_attention_weights_backward_jvp, _attention_weights_backward_jvp_fake),
    "mask_tiles": (_mask_tiles, _mask_tiles_fake),
    "masked_loss": (_masked_loss, _masked_loss_fake),
    "masked_loss_backward": (_masked_loss_backward, _masked_loss_backward_fake),
    "linear_masked_loss": (_linear_masked_loss, _linear_masked_loss_fake),
    "additive_attention": (_additive_attention, _additive_attention_fake),
    "additive_attention_backward": (_additive_attention_backward, _additive_attention_backward_fake),
}
_AUTOGRAD: dict[str, tuple[Callable, Callable]] = {  # the backward and what it saves
    "attention": (_attention_gradients, _save_inputs_and_output),
    "attention_packed": (_attention_packed_gradients, _save_inputs_and_output),
    "attention_weights": (_attention_weights_gradients, _save_inputs),
    "attention_backward": (_attention_backward_gradients, _save_inputs),
    "attention_packed_backward": (_attention_packed_backward_gradients, _save_inputs),
    "attention_weights_backward": (_attention_weights_backward_gradients, _save_inputs),
    "attention_jvp": (_attention_jvp_gradients, _save_inputs),
    "attention_weights_jvp": (_attention_weights_jvp_gradients, _save_inputs),
    **{name: (_refuse_third_derivative(name), _save_nothing) for name in _LAST},
    "masked_loss": (_masked_loss_gradients, _masked_loss_setup),
    "masked_loss_backward": (_masked_loss_backward_gradients, _masked_loss_backward_setup),
    "linear_masked_loss": (_linear_masked_loss_gradients, _linear_masked_loss_setup),
    "additive_attention": (_additive_attention_gradients, _save_inputs_and_output),
    "additive_attention_backward": (_additive_attention_backward_gradients, _save_inputs),
}
_TANGENT_RULES: dict[str, Callable] = {  # forward mode; the losses have it from torch
    "attention": _attention_tangents,
    "attention_packed": _attention_packed_tangents,
    "attention_weights": _attention_weights_tangents,
    "attention_backward": _attention_backward_tangents,
    "attention_packed_backward": _attention_packed_backward_tangents,
    "attention_weights_backward": _attention_weights_backward_tangents,
    "attention_jvp": _attention_jvp_tangents,
    "attention_weights_jvp": _attention_weights_jvp_tangents,
    **{name: _refuse_third_derivative(name) for name in _LAST},
}
_AUTOCAST: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {  # what is cast; the dtype unless autocast's own
    "attention": ((0, 1, 2, 3), None),
    "attention_packed": ((0, 1), None),
    "attention_weights": ((0, 1, 3), None),
    "masked_loss": ((0, 1), torch.float32),
    "linear_masked_loss": ((0, 1, 2), None),  # the target stays as it is, and gives the dtype of the loss
    "additive_attention": ((0, 1, 2), None),  # the score weight may stay in float32
    **{name: ((), None) for name in SCHEMAS if name.endswith(("_backward", "_jvp"))},
}
_FLOPS: dict[str, Callable] = {
    "attention": _attention_flops,
    "attention_backward": _attention_backward_flops,
    "attention_packed": _attention_packed_flops,
    "attention_packed_backward": _attention_packed_backward_flops,
    "attention_weights": _attention_weights_flops,
    "attention_weights_backward": _attention_weights_backward_flops,
    "additive_attention": _additive_flops,
    "additive_attention_backward": _additive_backward_flops,
    "attention_jvp": _derivative_flops(0, 10, False, 3, 2),
    "attention_jvp_jvp": _derivative_flops(0, 12, False, 7, 3),
    "attention_backward_jvp": _derivative_flops(4, 12, False, 7, 5),
    "attention_weights_jvp": _derivative_flops(0, 8, True, 3, 0),
    "attention_weights_jvp_jvp": _derivative_flops(0, 12, True, 7, 0),
    "attention_weights_backward_jvp": _derivative_flops(2, 10, True, 7, 0),
    "linear_masked_loss": _linear_loss_flops,
}


# vmap: the vmapped dimension becomes part of the batch. With dropout, whose random numbers depend on the index in the
# batch, every sample is a call of its own: "same" then drops the same elements in all of them.

_REPEATING = {  # of batch B or 1
    *("bias", "tangent_bias", "other_bias", "prefix_lengths", "key_lengths", "key_keep"),
    *("query_segments", "key_segments", "tile_bits", "tile_live", "tile_full", "tile_live_t", "tile_full_t"),
}
_CONTIGUOUS = _REPEATING | {"lse", "grad_lse", "tangent_grad_lse", "tangent_lse", "other_lse"}


def unit_stride(x: Tensor) -> Tensor:
    """A tensor as the kernels read it, along the last dimension; a copy where that is not contiguous."""
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def _folded(x: Tensor, dim: int | None, samples: int, batch: int) -> Tensor:
    """(batch | 1, ...) with `samples` in front at `dim`, or without them, as (samples * batch, ...)."""
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(samples, batch, *x.shape[2:]).flatten(0, 1)


def _fold_rule(name: str) -> Callable:
    operator = getattr(torch.ops.fastattn, name).default
    names = [argument.name for argument in operator._schema.arguments]
    returned = [value.name for value in operator._schema.returns]
    of_batch = names.index("qkv" if "qkv" in names else "query")
    each_sample = _each_sample_rule(name)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        given = dict(zip(names, arguments, strict=True))
        if given["dropout_p"] > 0:
            return each_sample(info, in_dims, *arguments)
        samples, bias = info.batch_size, given["bias"]
        first = arguments[of_batch]
        batch = first.shape[1 if in_dims[of_batch] == 0 else 0]
        of_bias = bias is not None and given.get("need_grad_bias", False)
        folded = []
        for argument, x, dim in zip(names, arguments, in_dims, strict=True):
            if isinstance(x, Tensor) and argument != "dropout_seed":
                repeats = argument in _REPEATING and dim is None and x.shape[0] == 1
                if not repeats or (of_bias and argument == "bias"):  # every sample has its own gradient of the bias
                    x = _folded(x, dim, samples, batch)
                x = x.contiguous() if argument in _CONTIGUOUS and argument != "bias" else unit_stride(x)
            folded.append(x)
        outputs = operator(*folded)
        alone = isinstance(outputs, Tensor)
        results: list[Tensor] = []
        dims: list[int | None] = []
        for output, label in zip((outputs,) if alone else outputs, returned, strict=True):
            if label == "grad_bias" and not of_bias:
                results.append(output)
                dims.append(None)
                continue
            output = output.unflatten(0, (samples, batch))
            if label == "grad_bias" and batch != 1 and bias.shape[1 if in_dims[names.index("bias")] == 0 else 0] == 1:
                output = output.sum(1, keepdim=True)
            results.append(output)
            dims.append(0)
        return (results[0], dims[0]) if alone else (tuple(results), tuple(dims))

    return rule


def _each_sample_rule(name: str) -> Callable:
    operator = getattr(torch.ops.fastattn, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        samples = []
        for n in range(info.batch_size):
            chosen = (
                unit_stride(x.select(dim, n)) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(arguments, in_dims, strict=True)
            )
            samples.append(operator(*chosen))
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


def _mask_tiles_rule(info: Any, in_dims: tuple[Any, ...], masks: list[Tensor], *rest: Any) -> Any:
    # (B|1, H|1, L|1, S|1) each, with the vmapped dimension at its place
    of_batch = [x.shape[1 if dim == 0 else 0] for x, dim in zip(masks, in_dims[0], strict=True)]
    batch = max(of_batch)
    folded = [
        x if dim is None and size == 1 else _folded(x, dim, info.batch_size, batch)
        for x, dim, size in zip(masks, in_dims[0], of_batch, strict=True)
    ]
    outputs = torch.ops.fastattn.mask_tiles(folded, *rest)
    return tuple(output.unflatten(0, (info.batch_size, batch)) for output in outputs), (0,) * len(outputs)


_VMAP_RULES: dict[str, Callable[[str], Callable]] = {
    **{name: _fold_rule for name in SCHEMAS if name.startswith("attention")},
    "mask_tiles": lambda name: _mask_tiles_rule,
    "masked_loss": _each_sample_rule,
    "masked_loss_backward": _each_sample_rule,
    "linear_masked_loss": _each_sample_rule,
    "additive_attention": _each_sample_rule,
    "additive_attention_backward": _each_sample_rule,
}


# Transforms. The autograd that torch.library generates leaves tangents at zero, and so does torch.compile even where an
# autograd.Function knows better (pytorch #192985). The functions at the end of this file take another way.


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(
        f"fastattn: {what} is there for the functions of fastattn, called outside torch.compile; not for an operator "
        "and not in compiled code"
    )


_FORWARD_MODE = "forward-mode differentiation (jvp, jacfwd, hessian, dual numbers)"


def _refuse_transforms(arguments: Sequence[Any]) -> None:
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        raise _refusal(_FORWARD_MODE)
    if (
        torch._C._are_functorch_transforms_active()
        and torch.is_grad_enabled()
        and torch._C._any_requires_grad(*arguments)
    ):
        raise _refusal("a gradient under the transforms of torch.func (grad, vjp, jacrev, vmap)")


def _autograd_kernel(name: str) -> Callable:
    # torch.library.register_autograd, which would leave tangents at zero.
    backward, setup = _AUTOGRAD[name]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup(ctx, inputs, output)

    generated = make_autograd_impl(getattr(torch.ops.fastattn, name).default, Info(backward, setup_context))

    def kernel(keyset: Any, *arguments: Any, **named: Any) -> Any:
        _refuse_transforms(arguments)
        return generated(keyset, *arguments, **named)

    return kernel


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        kernel, fake = _KERNELS[name]
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        if name in _AUTOGRAD:
            library.impl(name, _autograd_kernel(name), "Autograd", with_keyset=True)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", _VMAP_RULES[name](name), lib=library)
        if name in _AUTOCAST:
            for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
                library.impl(name, _autocast_kernel(name, key, device_type), key)
        if name in _FLOPS:
            register_flop_formula(getattr(torch.ops.fastattn, name))(_FLOPS[name])
    return library


# A process has one set of operators: when this module is imported or reloaded a second time, the first one serves.
if not hasattr(torch.ops.fastattn, "attention"):
    _library = _register()


# Calls ---------------------------------------------------------------------------------------------------------------
# What the public functions call. The dispatcher, and above all the autograd that torch.library generates, cost more
# than a small problem's kernel. Where nobody would see the difference, the kernel is called directly, or an
# autograd.Function with the same formulas; everything that traces, counts or intercepts gets the operator.


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_watched() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


# Loops, which cost half of what any() and all() over a generator do.


def _are_plain(tensors: Sequence[Tensor | None]) -> bool:
    # The numbers of a lazy negation, such as x.conj().imag, are not those in memory: the operator resolves it.
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return False
    return True


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    return False


def _call(name: str, num_tensors: int, anchor: int = 0, differentiable: Callable | None = None) -> Callable:
    """The operator as a function; its first `num_tensors` arguments are the tensors that may need a gradient.

    anchor: the number of one that is never None. differentiable: the same made of torch's functions, for forward mode
    and vmap; without it the operator has rules for both.
    """
    operator = getattr(torch.ops.fastattn, name).default
    kernel = _KERNELS[name][0]
    gradients, setup = _AUTOGRAD[name]
    # A gradient of torch.autograd.grad(is_grads_batched=True) is batched in a way that is no transform of torch.func.
    in_backward = name.endswith(("_backward", "_jvp"))

    class Function(torch.autograd.Function):
        """Takes what follows the tensors as one tuple, as torch spends time on every argument. `gradients` returns a
        None for each part of it; torch drops those beyond the arguments."""

        @staticmethod
        def forward(ctx: Any, *tensors_and_rest: Any) -> Any:
            *tensors, rest = tensors_and_rest
            arguments = (*tensors, *rest)
            output = kernel(*arguments)
            setup(ctx, arguments, output)
            return output

        backward = staticmethod(gradients)

    class Transformed(torch.autograd.Function):
        """The form that torch.func and forward mode take. It costs more: torch inspects the signature at every call."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*_opened(arguments))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, _opened(inputs), output)

        backward = staticmethod(gradients)
        if name in _TANGENT_RULES:
            jvp = staticmethod(_TANGENT_RULES[name])

    Function.__name__ = Function.__qualname__ = Transformed.__name__ = Transformed.__qualname__ = f"fastattn_{name}"

    def run(arguments: Sequence[Any]) -> Any:
        needs_grad = torch.is_grad_enabled() and _any_requires_grad(arguments[:num_tensors])
        return Function.apply(*arguments[:num_tensors], arguments[num_tensors:]) if needs_grad else kernel(*arguments)

    def transform(arguments: Sequence[Any]) -> Any:
        if torch.compiler.is_compiling():  # a frame that torch.compile entered on its own, below one that was refused
            raise _refusal(_FORWARD_MODE)
        if differentiable is not None and _is_beyond_gradients():
            return differentiable(*arguments)
        return Transformed.apply(*(_Closed(x) if isinstance(x, list) else x for x in arguments))

    def without_autocast(function: Callable, arguments: Sequence[Any]) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(arguments)
        device = arguments[anchor].device
        cast = _cast(name, tuple(arguments), device.type) if autocasts(device) else arguments
        with _without_autocast(device.type):
            return function(cast)

    def call(*arguments: Any) -> Any:
        tensors = arguments[:num_tensors]
        if forward_ad._current_level >= 0:
            if torch.compiler.is_compiling():
                raise _refusal(_FORWARD_MODE)
            if torch._C._is_fwd_grad_enabled():
                return without_autocast(transform, arguments)
        if (
            _is_watched()
            or not _are_plain(tensors)
            or tensors[anchor].is_meta
            or (in_backward and not all(x is None or torch._C._has_storage(x) for x in tensors))
        ):
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                return without_autocast(transform, arguments)
            return operator(*arguments)
        if torch._C._are_functorch_transforms_active():
            return without_autocast(transform, arguments)
        return without_autocast(run, arguments) if torch._C._is_any_autocast_enabled() else run(arguments)

    return call


class _Closed:
    """A list as one argument: torch's vmap of a jvp miscounts the arguments of a Function that has lists among them."""

    def __init__(self, values: list[int]) -> None:
        self.values = values


def _opened(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.values if isinstance(x, _Closed) else x for x in arguments)


def _is_beyond_gradients() -> bool:
    """Whether forward mode or vmap is at work, and not only gradients."""
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() != torch._C._functorch.TransformType.Grad for interpreter in stack)


class _WithoutDerivative(torch.autograd.Function):
    """The identity, for a tensor that no derivative reaches."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("fastattn::masked_loss: no derivative reaches a target that is normalised")

    jvp = backward


def _fixed_target(target: Tensor, normalize_target: bool) -> Tensor:
    return _WithoutDerivative.apply(target) if normalize_target else target


def _differentiable_loss(input: Tensor, target: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kind, reduction, patch_size, beta, normalize_target, eps, _, _ = rest
    target = _fixed_target(target, normalize_target)
    loss = reference_loss.differentiable_loss(
        input, target, mask, kind, reduction, patch_size, beta, normalize_target, eps
    )
    return loss, input.new_empty(0)


def _differentiable_loss_backward(grad_loss: Tensor, input: Tensor, target: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    kind, patch_size, beta, normalize_target, eps, _ = rest
    target = _fixed_target(target, normalize_target)
    return reference_loss.times_slope(grad_loss, input, target, mask, kind, patch_size, beta, normalize_target, eps)


def mask_tiles(dense: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int, backend: str) -> Any:
    """The operator mask_tiles, or its kernel where nobody would see the difference."""
    if (
        torch.compiler.is_compiling()
        or _is_watched()
        or torch._C._are_functorch_transforms_active()
        or not all(type(x) in _PLAIN and not x.is_meta for x in dense)
    ):
        return torch.ops.fastattn.mask_tiles(dense, len_q, len_k, block_m, block_n, backend)
    return _mask_tiles(dense, len_q, len_k, block_m, block_n, backend)


# Gradients of what the functions below have computed: one call again where nobody would see the difference, else the
# operator, whose derivatives are differentiable.


def _save_direct(ctx: Any, inputs: tuple[Tensor, ...], bias: Tensor | None, solved: tuple[Any, ...]) -> Any:
    out, lse, mask, parts, scale, dropout_p, dropout_seed, backend = solved
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bias, out, lse, dropout_seed, *inputs, *parts)
    ctx.problem = mask, scale, dropout_p, backend
    return out, lse


def _direct_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, packed: bool) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    if grad_out is None and grad_lse is None:
        return (None,) * len(needs)
    bias, out, lse, dropout_seed, *saved = ctx.saved_tensors
    mask, scale, dropout_p, backend = ctx.problem
    inputs, parts = (saved[:1], saved[1:]) if packed else (saved[:3], saved[3:])
    query, key, value = _split(*inputs) if packed else inputs
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if len(parts) == 1:
        (mask,) = parts  # the bool tensor itself
    elif parts:
        band, blocks = mask
        mask = unflatten_mask((band, *parts, *blocks), query.shape[2], key.shape[2], backend)
    gradients: Sequence[Tensor] = ()
    of_bias = None
    if not (torch.is_grad_enabled() or _is_transformed() or _is_watched()):
        gradients = [torch.empty_like(x) for x in inputs]
        arguments = (
            *(grad_out, grad_lse, query, key, value, out, lse, bias, mask, scale, dropout_p, dropout_seed),
            *(_split(*gradients) if packed else gradients),
            needs[-2],
        )
        if backend == "cpu":
            of_bias = dispatch.load("cpu").attention_backward_direct(*arguments)
        elif _are_in_memory((grad_out, grad_lse)):
            of_bias = (dispatch.load("cuda").attention_backward(*arguments),)
    if of_bias is None:
        if isinstance(mask, Tensor):
            (batch, heads, len_q, _), len_k = query.shape, key.shape[2]
            mask = Mask.dense(mask).kernel_form(batch, heads, len_q, len_k, query.device, build=_cpu_tiles)
        operator = attention_packed_backward if packed else attention_backward
        *gradients, grad_bias = operator(
            *(grad_out, grad_lse, *inputs, out, lse, bias, *flatten_mask(mask), scale, dropout_p, dropout_seed),
            *(backend, needs[-2]),
        )
        of_bias = (grad_bias,)
    return *(x if need else None for x, need in zip((*gradients, *of_bias), needs, strict=False)), None


class _DirectAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, solved: Any) -> Any:
        return _save_direct(ctx, (query, key, value), bias, solved)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        return _direct_gradients(ctx, grad_out, grad_lse, packed=False)


class _DirectAttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, solved: Any) -> Any:
        return _save_direct(ctx, (qkv,), bias, solved)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        return _direct_gradients(ctx, grad_out, grad_lse, packed=True)


def _is_transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def direct_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    bias: Any,
    dropout_p: Any,
    scale: Any,
    dropout_seed: Tensor | None,
    backend: Any,
    need_lse: bool,
    qkv: Tensor | None = None,
) -> tuple[Tensor, Any] | None:
    """`attention` straight to the CPU or CUDA kernel, where these tensors go to it and nobody would see the difference.
    None elsewhere, also for arguments that are wrong: they are as the public function got them. lse may be None unless
    `need_lse`. qkv: what query, key and value are views of that know of no gradient; it gets the gradient."""
    if (
        torch.compiler.is_compiling()
        or not (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN)
        or not (bias is None or (type(bias) in _PLAIN and not bias.is_neg()))
        or not (
            (by_cuda := _may_go_to_cuda(query, backend))
            or (query.is_cpu and backend is None and dispatch.chooses_cpu())
        )
        or not (scale is None or (type(scale) is float and -math.inf < scale < math.inf))
        or type(dropout_p) is not float
        or not (dropout_p == 0.0 or (0.0 < dropout_p < 1.0 and _is_seed(dropout_seed, query)))
        or _is_watched()
        or _is_transformed()
        or torch._C._is_any_autocast_enabled()
    ):
        return None
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (bias is not None and bias.requires_grad)
        or (qkv is not None and qkv.requires_grad)
    )
    if by_cuda and not _fits_cuda(query, key, value, bias, backend):
        return None
    held = False  # whether the mask has tensors
    if mask is not None:
        if type(mask) is Tensor and (needs_grad or by_cuda):
            if mask.dtype != torch.bool or mask.dim() > 4 or mask.layout is not torch.strided or mask.is_nested:
                return None
            if by_cuda or mask.numel() > _PACKED_AGAIN or not mask.is_contiguous():
                mask = Mask.dense(mask)
        if type(mask) is Mask:
            form = mask.band_form
            if form is None:
                if query.dim() != 4 or key.dim() != 4 or query.is_nested or key.is_nested:
                    return None
                (batch, heads, len_q, _), len_k = query.shape, key.shape[2]
                tile = dispatch.BACKENDS["cuda" if by_cuda else "cpu"].tile
                build = _cuda_tiles if by_cuda else _cpu_tiles
                try:
                    form = mask.kernel_form(batch, heads, len_q, len_k, query.device, *tile, build=build)
                except ValueError:  # which the public function raises once more, after looking at the rest
                    return None
                held = True
            mask = form
        elif type(mask) is not Tensor:
            return None
    need_lse = need_lse or needs_grad
    if by_cuda:
        if bias is not None and bias.dim() < 4:
            bias = bias[(None,) * (4 - bias.dim())]
        if scale is None:
            scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
    try:
        solved = (
            dispatch.load("cuda").attention_forward(query, key, value, bias, mask, scale, dropout_p, dropout_seed)
            if by_cuda
            else dispatch.load("cpu").attention_direct(
                query, key, value, bias, mask, scale, dropout_p, dropout_seed, need_lse
            )
        )
    except (TypeError, ValueError):  # of the CUDA library before it launches: the public function names the argument
        if by_cuda:
            return None
        raise
    except RuntimeError:
        # torch's, that a sparse or quantized tensor cannot have strides and a nested one has no shape, becomes the
        # public function's own. To ask first would cost every call.
        if query.layout is torch.strided and not (query.is_quantized or query.is_nested or value.is_nested):
            raise
        return None
    if solved is None or not needs_grad:
        return solved
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    if scale is None:
        scale = query.shape[3] ** -0.5
    parts: Sequence[Tensor | None] = ()
    if held:
        band, *parts, block_m, block_n = flatten_mask(mask)
        mask = band, (block_m, block_n)
    elif type(mask) is Tensor:
        mask, parts = None, (mask.clone(),)  # as it is now: a map would not follow it either
    solved = (*solved, mask, parts, scale, dropout_p, dropout_seed, "cuda" if by_cuda else "cpu")
    if qkv is not None:
        return _DirectAttentionPacked.apply(qkv, bias, solved)
    return _DirectAttention.apply(query, key, value, bias, solved)


def direct_attention_packed(
    qkv: Tensor,
    mask: Any,
    bias: Any,
    dropout_p: Any,
    scale: Any,
    dropout_seed: Tensor | None,
    backend: Any,
    need_lse: bool,
) -> tuple[Tensor, Any] | None:
    """`direct_attention` for qkv (B, L, 3, H, D)."""
    if (
        torch.compiler.is_compiling()
        or type(qkv) is not Tensor
        or not (qkv.is_cpu or _may_go_to_cuda(qkv, backend))
        or _is_watched()
        or _is_transformed()
    ):
        return None
    views = _split(qkv.detach())
    return direct_attention(*views, mask, bias, dropout_p, scale, dropout_seed, backend, need_lse, qkv)


_PACKED_AGAIN = 2**14  # pairs that the backward packs anew sooner than their tile map is allocated and carried over


def _is_seed(seed: Any, query: Tensor) -> bool:
    return type(seed) is Tensor and seed.dtype == torch.int64 and seed.dim() == 0 and seed.device == query.device


def _may_go_to_cuda(query: Tensor, backend: Any) -> bool:
    if dispatch.CUDA_FAILURE is not None:
        return False
    named = dispatch._requested if backend is None else backend
    if query.is_cuda:
        return named is None or (type(named) is str and named == "cuda")
    return dispatch.CUDA_EMULATED and query.is_cpu and type(named) is str and named == "cuda"


def _fits_cuda(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, backend: str | None) -> bool:
    """Whether the CUDA kernels are chosen and take the tensors as they are, as far as their library does not look
    itself. The operator copies or refuses all others."""
    for x in (query, key, value):
        if x.layout is not torch.strided or x.is_nested or x.dim() != 4 or x.stride(3) != 1 or x.is_neg():
            return False
    if not (query.shape[1] and key.shape[1]):
        return False
    if bias is not None and (
        bias.layout is not torch.strided
        or bias.is_nested
        or bias.dim() > 4
        or not (bias.dtype == query.dtype or bias.dtype == torch.float32)
    ):
        return False
    problem = dispatch.Problem("attention", query.device.type, query.dtype, max(query.shape[3], value.shape[3]))
    try:
        return dispatch.select(problem, backend) == "cuda"
    except RuntimeError:
        return False


def _are_in_memory(gradients: Sequence[Tensor | None]) -> bool:
    return _are_plain(gradients) and all(x is None or torch._C._has_storage(x) for x in gradients)


def _cpu_tiles(dense: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int) -> Any:
    return mask_tiles(dense, len_q, len_k, block_m, block_n, "cpu")


def _cuda_tiles(dense: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int) -> Any:
    return mask_tiles(dense, len_q, len_k, block_m, block_n, "cuda")


attention = _call("attention", 4)
attention_backward = _call("attention_backward", 8)
attention_packed = _call("attention_packed", 2)
attention_packed_backward = _call("attention_packed_backward", 6)
attention_weights = _call("attention_weights", 4)
attention_weights_backward = _call("attention_weights_backward", 5)
attention_jvp = _call("attention_jvp", 10)
attention_jvp_jvp = _call("attention_jvp_jvp", 12)
attention_backward_jvp = _call("attention_backward_jvp", 12, anchor=4)
attention_weights_jvp = _call("attention_weights_jvp", 8)
attention_weights_jvp_jvp = _call("attention_weights_jvp_jvp", 12)
attention_weights_backward_jvp = _call("attention_weights_backward_jvp", 10, anchor=2)
masked_loss = _call("masked_loss", 2, differentiable=_differentiable_loss)
masked_loss_backward = _call("masked_loss_backward", 3, differentiable=_differentiable_loss_backward)
additive_attention = _call("additive_attention", 4, differentiable=_differentiable_additive)
additive_attention_backward = _call(
    "additive_attention_backward", 8, anchor=2, differentiable=_differentiable_additive_backward
)
linear_masked_loss = _call("linear_masked_loss", 4, differentiable=_differentiable_linear_loss)
