"""Every operator of the library `fastattn`: schema, kernel, fake kernel, autograd, autocast rule and FLOP formula.

The kernel of an operator asks `dispatch` for the backend named in its last arguments and calls the function of the same
name there. Operators take validated arguments: the public functions check. Masks travel flattened (`flatten_mask`),
since a schema has no records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fastattn import dispatch
from fastattn.masks import KernelMask
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
    "mask_tiles": "(Tensor[] masks, SymInt len_q, SymInt len_k, int block_m, int block_n, str backend) "
    "-> (Tensor bits, Tensor live, Tensor full, Tensor live_t, Tensor full_t)",
    "masked_loss": "(Tensor input, Tensor target, Tensor mask, str kind, str reduction, int patch_size, float beta, "
    "bool normalize_target, float eps, bool need_grad, str backend) -> (Tensor loss, Tensor grad_input)",
    "masked_loss_backward": "(Tensor grad_loss, Tensor input, Tensor target, Tensor mask, str kind, int patch_size, "
    "float beta, bool normalize_target, float eps, str backend) -> Tensor",
}


def flatten_mask(mask: KernelMask | None) -> tuple[Any, ...]:
    """The mask as the arguments that every attention operator takes."""
    if mask is None:
        return _NO_MASK
    tiles = mask.tile_map
    tile_arguments: tuple[Any, ...] = (None, None, None, None, None, 0, 0)
    if tiles is not None:
        tile_arguments = (
            *(tiles.bits, tiles.live, tiles.full, tiles.live_t, tiles.full_t),
            *(tiles.block_m, tiles.block_n),
        )
    return (
        list(mask.band or ()),
        mask.prefix_lengths,
        mask.key_lengths,
        mask.key_keep,
        mask.query_segments,
        mask.key_segments,
        *tile_arguments,
    )


_NO_MASK: tuple[Any, ...] = ([], *[None] * 10, 0, 0)


def unflatten_mask(arguments: tuple[Any, ...], len_q: int, len_k: int, backend: str) -> KernelMask | None:
    """The inverse of `flatten_mask`."""
    band, prefix_lengths, key_lengths, key_keep, query_segments, key_segments, bits = arguments[:7]
    present = (prefix_lengths, key_lengths, key_keep, query_segments, key_segments, bits)
    if not band and all(x is None for x in present):
        return None
    tile_map = None
    if bits is not None:
        live, full, live_t, full_t, block_m, block_n = arguments[7:]
        if bits.dtype == torch.bool:  # an exported program carries the mask itself; see `dense_for_export`
            sizes = (len_q, len_k, block_m, block_n)
            bits, live, full, live_t, full_t = dispatch.load(backend).mask_tiles([bits], *sizes)
        tile_map = TileMap(bits, live, full, live_t, full_t, block_m, block_n, len_q, len_k)
    return KernelMask(
        band=tuple(band) if band else None,
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


# Autograd ------------------------------------------------------------------------------------------------------------


_ONCE = (
    "the gradient cannot be differentiated again: fastattn has no second derivatives; where you need them, use torch's "
    "own functions"
)


def _save(ctx: Any, tensors: tuple[Tensor, ...], bias: Tensor | None, rest: tuple[Any, ...]) -> None:
    # rest: the mask, then what follows it. Only tensors go through save_for_backward, which keeps hooks and
    # checkpointing working; a gradient that nobody uses stays None.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, bias, *(x for x in rest if isinstance(x, Tensor)))
    ctx.num_tensors = len(tensors)
    ctx.rest = tuple(None if isinstance(x, Tensor) else x for x in rest)
    ctx.is_tensor = tuple(isinstance(x, Tensor) for x in rest)


def _saved(ctx: Any) -> tuple[tuple[Tensor, ...], Tensor | None, tuple[Any, ...]]:
    saved = ctx.saved_tensors
    tensors, bias = saved[: ctx.num_tensors], saved[ctx.num_tensors]
    following = iter(saved[ctx.num_tensors + 1 :])
    return tensors, bias, tuple(next(following) if held else x for held, x in zip(ctx.is_tensor, ctx.rest, strict=True))


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, *rest = inputs
    _save(ctx, (query, key, value, *output), bias, tuple(rest))


def _attention_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (_NUM_MASK + 4)
    if grad_out is None and grad_lse is None:
        return None, None, None, None, *nothing
    (query, key, value, out, lse), bias, rest = _saved(ctx)
    needs = ctx.needs_input_grad
    gradients = attention_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        *(grad_lse, query, key, value, out, lse, bias, *rest, needs[3]),
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=False)), *nothing


def _attention_packed_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, *rest = inputs
    _save(ctx, (qkv, *output), bias, tuple(rest))


def _attention_packed_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (_NUM_MASK + 4)
    if grad_out is None and grad_lse is None:
        return None, None, *nothing
    (qkv, out, lse), bias, rest = _saved(ctx)
    needs = ctx.needs_input_grad
    gradients = attention_packed_backward(
        torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, qkv, out, lse, bias, *rest, needs[1]
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=False)), *nothing


def _attention_weights_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, lse, bias, *rest = inputs
    _save(ctx, (query, key, lse), bias, tuple(rest))


def _attention_weights_gradients(ctx: Any, grad_weights: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (_NUM_MASK + 5)
    if grad_weights is None:
        return None, None, None, None, *nothing
    (query, key, lse), bias, rest = _saved(ctx)
    needs = ctx.needs_input_grad
    grad_query, grad_key, grad_bias, grad_lse = attention_weights_backward(
        grad_weights, query, key, lse, bias, *rest, needs[3]
    )
    gradients = (grad_query, grad_key, grad_lse, grad_bias)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=False)), *nothing


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
        # An output that is not marked as non-differentiable: a second derivative then arrives in the backward as its
        # gradient, and is refused there instead of being silently zero.
        ctx.save_for_backward(output[1])
    else:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, target, mask)


def _masked_loss_gradients(ctx: Any, grad_loss: Tensor | None, grad_grad_input: Tensor | None) -> tuple[Any, ...]:
    if grad_grad_input is not None:
        raise RuntimeError("fastattn::masked_loss: " + _ONCE)
    nothing = (None,) * 9
    if grad_loss is None:
        return None, None, *nothing
    kind, reduction, patch_size, beta, normalize_target, eps, _, backend = ctx.rest
    if ctx.has_gradient:
        (grad_input,) = ctx.saved_tensors
        grad_input = _scaled(grad_input, grad_loss)
    elif reduction == "none":
        input, target, mask = ctx.saved_tensors
        grad_input = masked_loss_backward(
            grad_loss, input, target, mask, kind, patch_size, beta, normalize_target, eps, backend
        )
    else:
        # Traced without a gradient in sight, such as an exported evaluation that is now trained: compute it here.
        input, target, mask = ctx.saved_tensors
        _, grad_input = masked_loss(
            input, target, mask, kind, reduction, patch_size, beta, normalize_target, eps, True, backend
        )
        grad_input = grad_input * grad_loss
    need_input, need_target = ctx.needs_input_grad[:2]
    if need_target and normalize_target:
        raise RuntimeError("fastattn::masked_loss: no gradient reaches a target that is normalised")
    return grad_input if need_input else None, -grad_input if need_target else None, *nothing


def _scaled(grad_input: Tensor, grad_loss: Tensor) -> Tensor:
    # The plain `loss.backward()` needs no pass over the gradient at all. Only where reading the scalar is free, nothing
    # traces or differentiates this, and the graph is not kept: the caller gets the saved tensor itself.
    if (
        type(grad_loss) is Tensor
        and grad_loss.device.type == "cpu"
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


# Autocast: attention runs in the autocast dtype, with lse in its own; the losses run in float32, as torch's do. Inside
# an operator nothing is cast again, nor in a backward that runs within the region.


def _cast(name: str, arguments: tuple[Any, ...], device_type: str) -> list[Any]:
    positions, dtype = _AUTOCAST[name]
    cast = list(arguments)
    for position in positions:
        x = cast[position]
        if x is not None and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device_type:
            cast[position] = x.to(dtype or torch.get_autocast_dtype(device_type))
    return cast


def _autocast_kernel(name: str, key: str, device_type: str) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*arguments: Any) -> Any:
        cast = _cast(name, arguments, device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.fastattn, name)(*cast)

    return kernel


# Registration --------------------------------------------------------------------------------------------------------


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For a derivative that is refused anyway."""


def _refuse_second_derivative(name: str) -> Callable:
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"fastattn::{name}: {_ONCE}")

    return backward


_KERNELS: dict[str, tuple[Callable, Callable]] = {  # the kernel and its fake
    "attention": (_attention, _attention_fake),
    "attention_backward": (_attention_backward, _attention_backward_fake),
    "attention_packed": (_attention_packed, _attention_packed_fake),
    "attention_packed_backward": (_attention_packed_backward, _attention_packed_backward_fake),
    "attention_weights": (_attention_weights, _attention_weights_fake),
    "attention_weights_backward": (_attention_weights_backward, _attention_weights_backward_fake),
    "mask_tiles": (_mask_tiles, _mask_tiles_fake),
    "masked_loss": (_masked_loss, _masked_loss_fake),
    "masked_loss_backward": (_masked_loss_backward, _masked_loss_backward_fake),
}
_AUTOGRAD: dict[str, tuple[Callable, Callable]] = {  # the backward and what it saves
    "attention": (_attention_gradients, _attention_setup),
    "attention_packed": (_attention_packed_gradients, _attention_packed_setup),
    "attention_weights": (_attention_weights_gradients, _attention_weights_setup),
    "masked_loss": (_masked_loss_gradients, _masked_loss_setup),
    **{
        name: (_refuse_second_derivative(name), _save_nothing)
        for name in (
            "attention_backward",
            "attention_packed_backward",
            "attention_weights_backward",
            "masked_loss_backward",
        )
    },
}
_AUTOCAST: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {  # what is cast; the dtype unless autocast's own
    "attention": ((0, 1, 2, 3), None),
    "attention_packed": ((0, 1), None),
    "attention_weights": ((0, 1, 3), None),
    "masked_loss": ((0, 1), torch.float32),
    "attention_backward": ((), None),
    "attention_packed_backward": ((), None),
    "attention_weights_backward": ((), None),
    "masked_loss_backward": ((), None),
}
_FLOPS: dict[str, Callable] = {
    "attention": _attention_flops,
    "attention_backward": _attention_backward_flops,
    "attention_packed": _attention_packed_flops,
    "attention_packed_backward": _attention_packed_backward_flops,
    "attention_weights": _attention_weights_flops,
    "attention_weights_backward": _attention_weights_backward_flops,
}


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        kernel, fake = _KERNELS[name]
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        if name in _AUTOGRAD:
            backward, setup = _AUTOGRAD[name]
            torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=library)
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


def _refuse_forward_mode(name: str, tensors: tuple[Any, ...]) -> None:
    # torch gives an operator without a rule for tangents tangents of zero.
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"fastattn::{name} has no forward-mode derivative (jvp, jacfwd, hessian)")


def _call(name: str, num_tensors: int) -> Callable:
    """The operator as a function; its first `num_tensors` arguments are the tensors that may need a gradient."""
    operator = getattr(torch.ops.fastattn, name).default
    kernel = _KERNELS[name][0]
    gradients, setup = _AUTOGRAD[name]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = kernel(*arguments)
            setup(ctx, arguments, output)
            return output

        backward = staticmethod(gradients)

    class Transformed(torch.autograd.Function):
        """The form that torch.func takes. It costs more: torch inspects the signature at every call."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        setup_context = staticmethod(setup)
        backward = staticmethod(gradients)

    Function.__name__ = Function.__qualname__ = Transformed.__name__ = Transformed.__qualname__ = f"fastattn_{name}"

    def run(arguments: Sequence[Any]) -> Any:
        needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:num_tensors])
        if torch._C._are_functorch_transforms_active():
            return Transformed.apply(*arguments) if needs_grad else operator(*arguments)
        return Function.apply(*arguments) if needs_grad else kernel(*arguments)

    def call(*arguments: Any) -> Any:
        tensors = arguments[:num_tensors]
        if forward_ad._current_level >= 0:
            _refuse_forward_mode(name, tensors)
        if _is_watched() or not all(x is None or type(x) in _PLAIN for x in tensors) or tensors[0].is_meta:
            return operator(*arguments)
        if torch._C._is_any_autocast_enabled():
            device_type = tensors[0].device.type
            cast = _cast(name, arguments, device_type) if torch.is_autocast_enabled(device_type) else arguments
            with torch.autocast(device_type, enabled=False):
                return run(cast)
        return run(arguments)

    return call


attention = _call("attention", 4)
attention_backward = _call("attention_backward", 8)
attention_packed = _call("attention_packed", 2)
attention_packed_backward = _call("attention_packed_backward", 6)
attention_weights = _call("attention_weights", 4)
attention_weights_backward = _call("attention_weights_backward", 5)
masked_loss = _call("masked_loss", 2)
masked_loss_backward = _call("masked_loss_backward", 3)
