"""The public attention functions: they check their arguments, draw the dropout seed and call the operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, masks, ops
from fastattn.dispatch import KERNEL_DTYPES, Explanation, Problem
from fastattn.masks import Mask
from fastattn.ops import autocasts, computed_dtype

_ACCEPTED_DTYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)


class _Sizes(NamedTuple):
    batch: int
    heads_q: int
    len_q: int
    len_k: int
    dim_qk: int
    dim_v: int


def _describe(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _refuse_inputs(query: Any, key: Any, value: Any) -> NoReturn:
    """Says what is wrong with inputs that `_check_inputs` found wrong."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        masks.check_layout(name, tensor)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions: query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv); "
                f"got {tuple(tensor.shape)}"
            )
    seen = _describe(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have the same batch size, got {seen}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must have the same number of heads, got {seen}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"key and value must have the same length, got {seen}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"query and key must have the same head dim, got {seen}")
    raise ValueError(f"the heads of query must be a multiple of the heads of key and value, got {seen}")


def _divides(heads_kv: int, heads_q: int) -> bool:
    return heads_q == heads_kv or (heads_kv != 0 and heads_q % heads_kv == 0)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> _Sizes:
    # One condition on the way that good inputs take; what exactly is wrong is worked out only when something is.
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dim() == key.dim() == value.dim() == 4
        and query.device == key.device == value.device
        and query.layout is key.layout is value.layout is torch.strided
        and not (query.is_nested or key.is_nested or value.is_nested)
    ):
        _refuse_inputs(query, key, value)
    batch, heads_q, len_q, dim = query.shape
    batch_k, heads_kv, len_k, dim_k = key.shape
    batch_v, heads_v, len_v, dim_v = value.shape
    if not (
        batch == batch_k
        and batch == batch_v
        and heads_kv == heads_v
        and len_k == len_v
        and dim == dim_k
        and _divides(heads_kv, heads_q)
    ):
        _refuse_inputs(query, key, value)
    return _Sizes(batch, heads_q, len_q, len_k, dim, dim_v)


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype:
    """The dtype that the operator computes in."""
    dtype = query.dtype
    if dtype in KERNEL_DTYPES and dtype == key.dtype and dtype == value.dtype:
        return computed_dtype(query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in KERNEL_DTYPES:
            raise TypeError(f"{name} must be {_ACCEPTED_DTYPES}, got {tensor.dtype}")
    computed = {computed_dtype(tensor) for tensor in (query, key, value)}
    if len(computed) == 1:
        return computed.pop()
    raise TypeError(
        f"query, key and value must have the same dtype, got query {query.dtype}, key {key.dtype}, value {value.dtype}"
    )


def _check_bias(bias: Any, query: Tensor, sizes: _Sizes, name: str = "bias") -> Tensor:
    """The bias with 4 dimensions. `name` is the argument that the caller gave it as."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name} must be a float tensor, got {type(bias).__name__}")
    masks.check_layout(name, bias)
    accepted = f"{name} must be broadcastable to (B, Hq, L, S)"
    wanted = sizes[:4]
    if bias.dim() > 4:
        raise ValueError(f"{accepted} = {wanted}, got {tuple(bias.shape)}")
    if bias.dtype != query.dtype and bias.dtype != torch.float32:
        autocast = autocasts(query.device) and bias.dtype in KERNEL_DTYPES
        if not autocast:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, or be float32, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {bias.device}")
    if bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    for size, full in zip(bias.shape, wanted, strict=True):
        if size != 1 and size != full:
            raise ValueError(f"{accepted} = {wanted}, got a tensor viewed as {tuple(bias.shape)}")
    return bias


def _check_scale(scale: Any, dim: int) -> float:
    if scale is None:
        if isinstance(dim, Tensor):
            dim = int(dim)  # a size under torch.jit.trace, whose power would come in float32
        return dim**-0.5 if dim else 1.0  # without dimensions every score is 0 whatever the scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None (1 / sqrt(D)), got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # also under torch.compile, which does not trace math.isfinite
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def _check_dropout(dropout_p: Any) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number in [0, 1), got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return float(dropout_p)


def _check_seed(dropout_p: float, seed: Any, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.dim() != 0:
        raise TypeError(f"dropout_seed must be an int64 tensor of shape () when dropout_p > 0, got {seed!r}")
    if seed.device != device:
        raise ValueError(f"dropout_seed must be on the device of query, {device}, got {seed.device}")
    return seed


def _draw_seed(dropout_p: Any, device: torch.device) -> Tensor | None:
    """The seed of one call, from torch's generator, so that torch.manual_seed reproduces it."""
    if _check_dropout(dropout_p) == 0.0:
        return None
    return torch.randint(2**63 - 1, (), device=device, dtype=torch.int64)


def _tile_builder(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def build(dense: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int) -> tuple[Tensor, ...]:
        if masks.is_recorded():
            return ops.dense_for_export(dense)
        return ops.mask_tiles(dense, len_q, len_k, block_m, block_n, backend)

    return build


_BUILDERS = {name: _tile_builder(name) for name in dispatch.BACKENDS}


def _flat_mask(mask: Any, sizes: _Sizes, device: torch.device, backend: str) -> tuple[Any, ...]:
    mask = masks.coerce(mask)
    if mask is None:
        return ops.flatten_mask(None)
    batch, heads, len_q, len_k = sizes[:4]
    tile = dispatch.BACKENDS[backend].tile
    return ops.flatten_mask(mask.kernel_form(batch, heads, len_q, len_k, device, *tile, build=_BUILDERS[backend]))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, softmax(scale Q Kᵀ + bias, over the keys the mask allows) V, tiled and fused
    (Vaswani et al. 2017, eq. 1; computed as in Dao 2023, "FlashAttention-2").

    query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv); float32, bfloat16, float16 or float64; Hq is a
    multiple of Hkv (grouped queries). Any strides are read in place, except that a tensor whose last dimension is not
    contiguous is copied first.
    mask: a `Mask`, or a bool tensor broadcastable to (B, Hq, L, S); True = may attend.
    bias: a float tensor broadcastable to (B, Hq, L, S), of query's dtype or float32, added to the scaled scores. Its
    gradient has its own shape.
    dropout_p: the probability in [0, 1) with which an attention weight is dropped; kept ones are scaled by 1 / (1 - p).
    scale: 1 / sqrt(D) unless given.
    backend: run on this one or raise; without it, the first able one (`explain` tells which).

    Returns out (B, Hq, L, Dv), and with return_lse also the natural log of the softmax's denominator, (B, Hq, L)
    float32, which is differentiable. A query that may attend to nothing gets out 0 and lse -inf.

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError when `backend` cannot run them.
    """
    # Whatever else query may be is refused below.
    seed = _draw_seed(dropout_p, query.device) if dropout_p and isinstance(query, Tensor) else None
    direct = ops.direct_attention(query, key, value, mask, bias, dropout_p, scale, seed, backend, return_lse)
    out, lse = direct or _attention_by_operator(query, key, value, mask, bias, dropout_p, scale, seed, backend)
    return (out, lse.float()) if return_lse else out


def _attention_with_seed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    scale: float | None,
    dropout_seed: Tensor | None,
    backend: str | None,
    need_lse: bool = True,
) -> tuple[Tensor, Any]:
    """`attention` with the seed given by the caller; returns lse in the dtype of the operator, or anything for it where
    it is not needed."""
    arguments = query, key, value, mask, bias, dropout_p, scale, dropout_seed, backend
    return ops.direct_attention(*arguments, need_lse) or _attention_by_operator(*arguments)


def _attention_by_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    scale: float | None,
    dropout_seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    sizes = _check_inputs(query, key, value)
    dtype = _check_dtypes(query, key, value)
    if bias is not None:
        bias = _check_bias(bias, query, sizes)
    scale = _check_scale(scale, sizes.dim_qk)
    dropout_p = _check_dropout(dropout_p)
    device = query.device
    dropout_seed = _check_seed(dropout_p, dropout_seed, device)
    name = dispatch.select(Problem("attention", device.type, dtype, max(sizes.dim_qk, sizes.dim_v)), backend)
    return ops.attention(
        ops.unit_stride(query),
        ops.unit_stride(key),
        ops.unit_stride(value),
        bias,
        *_flat_mask(mask, sizes, device, name),
        scale,
        dropout_p,
        dropout_seed,
        name,
    )


def _attention_packed(
    qkv: Tensor,
    *,
    mask: Mask | Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    scale: float | None,
    dropout_seed: Tensor | None,
    backend: str | None,
    need_lse: bool = True,
) -> tuple[Tensor, Any]:
    """Self-attention straight out of a packed projection (B, L, 3, H, D), any strides with a contiguous last
    dimension; the gradient comes in the same layout. Returns out (B, H, L, D) and lse as `_attention_with_seed`."""
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a tensor, got {type(qkv).__name__}")
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape (B, L, 3, H, D), got {tuple(qkv.shape)}")
    direct = ops.direct_attention_packed(qkv, mask, bias, dropout_p, scale, dropout_seed, backend, need_lse)
    if direct is not None:
        return direct
    batch, length, _, heads, dim = qkv.shape
    sizes = _Sizes(batch, heads, length, length, dim, dim)
    dtype = _check_dtypes(qkv, qkv, qkv)
    if bias is not None:
        bias = _check_bias(bias, qkv, sizes)
    scale = _check_scale(scale, dim)
    dropout_p = _check_dropout(dropout_p)
    device = qkv.device
    dropout_seed = _check_seed(dropout_p, dropout_seed, device)
    name = dispatch.select(Problem("attention", device.type, dtype, dim), backend)
    return ops.attention_packed(
        ops.unit_stride(qkv), bias, *_flat_mask(mask, sizes, device, name), scale, dropout_p, dropout_seed, name
    )


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    average_heads: bool = True,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The attention weights exp(scale Q Kᵀ + bias - lse) of an `attention` whose lse is known.

    query (B, Hq, L, D), key (B, Hkv, S, D), lse (B, Hq, L) as `attention(..., return_lse=True)` returns it; mask, bias
    and scale as given there. average_heads: the mean over the heads, (B, L, S), computed without the tensor of every
    head; else (B, Hq, L, S). dropout_p and dropout_seed (int64, shape ()) give the weights after dropout.

    Differentiable in query, key, lse and bias. A row that may attend to nothing is 0. Raises as `attention` does.
    """
    sizes = _check_inputs(query, key, key)
    dtype = _check_dtypes(query, key, key)
    accumulated = ops.lse_dtype(query.dtype)
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a tensor, got {type(lse).__name__}")
    masks.check_layout("lse", lse)
    if lse.dtype != torch.float32 and lse.dtype != accumulated:
        raise TypeError(f"lse must be float32, got {lse.dtype}")
    if tuple(lse.shape) != (sizes.batch, sizes.heads_q, sizes.len_q):
        raise ValueError(f"lse must have shape (B, Hq, L) = {tuple(query.shape[:3])}, got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse must be on the device of query, {query.device}, got {lse.device}")
    if bias is not None:
        bias = _check_bias(bias, query, sizes)
    scale = _check_scale(scale, sizes.dim_qk)
    dropout_p = _check_dropout(dropout_p)
    device = query.device
    dropout_seed = _check_seed(dropout_p, dropout_seed, device)
    name = dispatch.select(Problem("attention_weights", device.type, dtype, sizes.dim_qk), backend)
    return ops.attention_weights(
        ops.unit_stride(query),
        ops.unit_stride(key),
        lse.to(accumulated).contiguous(),
        bias,
        *_flat_mask(mask, sizes, device, name),
        scale,
        average_heads,
        dropout_p,
        dropout_seed,
        name,
    )


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend `attention` would run on with the same arguments, and why each other one would not.

    Nothing is computed. Arguments that `attention` refuses are refused here. A backend that is named but cannot run
    gives an `Explanation` whose `chosen` is None. `str()` of the result is for people.
    """
    sizes = _check_inputs(query, key, value)
    dtype = _check_dtypes(query, key, value)
    if bias is not None:
        _check_bias(bias, query, sizes)
    _check_scale(scale, sizes.dim_qk)
    _check_dropout(dropout_p)
    coerced = masks.coerce(mask)
    if coerced is not None:
        coerced.validate(*sizes[:4], query.device)
    notes = tuple(
        f"{name} is copied first: its last dimension has stride {tensor.stride(-1)}, kernels read it with stride 1"
        for name, tensor in (("query", query), ("key", key), ("value", value))
        if ops.unit_stride(tensor) is not tensor
    )
    problem = Problem("attention", query.device.type, dtype, max(sizes.dim_qk, sizes.dim_v))
    return dispatch.explain_problem(problem, backend, notes)


# Packed sequences ----------------------------------------------------------------------------------------------------


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    mask: Mask | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences of different lengths, packed end to end without padding.

    query (Tq, Hq, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv). Sequence n is query[cu_seqlens_q[n]:cu_seqlens_q[n + 1]]
    with the same of key and value by cu_seqlens_k; both int32 or int64 (N + 1,), from 0 to Tq or Tk, not decreasing.
    mask: None, or `Mask.causal`, `Mask.window` and their `&`: they hold within each sequence, in its own indices.

    Returns out (Tq, Hq, Dv), and with return_lse also lse (Hq, Tq) float32. Queries of a sequence without keys get 0.

    A causal or window mask over sequences whose queries and keys differ in length runs sequence by sequence and has to
    know the lengths on the host: not under torch.compile. Pass one and the same tensor as both cu_seqlens there.
    """
    _check_packs(query, key, value)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask or None, got {type(mask).__name__}")
    if mask is not None and not all(isinstance(term, masks.Band) for term in mask.terms):
        raise ValueError(f"mask must be made of Mask.causal and Mask.window for packed sequences, got {mask!r}")
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must count the same sequences, got {tuple(cu_seqlens_q.shape)} and "
            f"{tuple(cu_seqlens_k.shape)}"
        )
    out, lse = _attention_of_packs(
        *(query, key, value, cu_seqlens_q, cu_seqlens_k),
        mask=mask,
        dropout_p=dropout_p,
        scale=scale,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.attention.varlen.varlen_attn`, with the same arguments and meaning, computed by `attention_varlen`:
    on every device, in float32 and float64 too, for any head dims.

    query (Tq, Hq, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv); cu_seq_q, cu_seq_k: int32 or int64 (N + 1,), where each
    sequence begins, and the total. max_q, max_k: at least the longest sequence's lengths. window_size (left, right): a
    query may attend from `left` keys before its own position to `right` keys after it, negative = unlimited; the last
    query of a sequence stands at its last key. (-1, 0) is causal. enable_gqa: Hq may be a multiple of Hkv.
    seqused_k (N,): only the first seqused_k[n] keys of sequence n count. Gradients flow here, where torch has none.
    block_table (N, pages): key and value are pools (total_pages, page_size, Hkv, D), and block_table[n] lists the pages
    of sequence n, seqused_k[n] keys long; cu_seq_k is not read. The keys in use are gathered into a packed copy first.
    num_splits: 1 runs each sequence alone, so that its numbers are bitwise the same whatever the others are. Any other
    value is only about speed, and the choice is made here.

    Returns out (Tq, Hq, Dv), and when return_aux.lse is true also lse (Hq, Tq) float32, which is differentiable. A
    query without keys gets 0 and lse -inf.

    block_table, num_splits=1, and a window over sequences whose queries and keys differ in length need the lengths on
    the host: not under torch.compile, except for causal attention with max_q = 1.

    Raises ValueError or TypeError for arguments that do not fit together.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, Tensor):
            masks.check_layout(name, tensor)
    left, right = _check_varlen_options(max_q, max_k, return_aux, window_size, block_table, seqused_k, num_splits)
    if block_table is not None:
        heads = key.shape[2] if isinstance(key, Tensor) and key.dim() == 4 else None
    else:
        heads = key.shape[1] if isinstance(key, Tensor) and key.dim() == 3 else None
    if heads is not None and isinstance(query, Tensor) and query.dim() == 3:
        if not enable_gqa and query.shape[1] != heads:
            raise ValueError(
                "query and key/value must have the same number of heads, got "
                f"Hq={query.shape[1]} and Hkv={heads}; enable_gqa=True shares each key/value head out"
            )
        if not _divides(heads, query.shape[1]):
            raise ValueError(
                f"the heads of query must be a multiple of the heads of key and value, got Hq={query.shape[1]} and "
                f"Hkv={heads}"
            )
    if block_table is not None:
        assert seqused_k is not None
        key, value, cu_seq_k = _gather_pages(query, key, value, block_table, seqused_k)
        seqused_k = None
    _check_packs(query, key, value)
    if cu_seq_k is None:
        raise ValueError("cu_seq_k must be given: it may be None with block_table alone")
    starts_q = _check_cu_seqlens("cu_seq_q", cu_seq_q, query)
    starts_k = _check_cu_seqlens("cu_seq_k", cu_seq_k, key)
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            f"cu_seq_q and the key lengths must count the same sequences, got {cu_seq_q.shape[0] - 1} and "
            f"{cu_seq_k.shape[0] - 1}"
        )
    if seqused_k is not None:
        _check_seqused(seqused_k, cu_seq_k, starts_k)
    for name, longest, starts in (("max_q", max_q, starts_q), ("max_k", max_k, starts_k)):
        found = max(_differences(starts), default=0) if starts is not None else 0
        if found > longest and not (name == "max_k" and seqused_k is not None):
            raise ValueError(f"{name} must be at least the longest sequence, {found}, got {longest}")
    if left is None and right is not None and max_q == 1:
        right = None  # the one query of a sequence stands at its last key
    out, lse = _attention_of_packs(
        *(query, key, value, cu_seq_q, cu_seq_k),
        mask=None if left is None and right is None else Mask.window(left, right, align="bottom_right"),
        dropout_p=0.0,
        scale=scale,
        backend=None,
        used_k=seqused_k,
        apart=num_splits == 1,
    )
    return (out, lse) if return_aux is not None and return_aux.lse else out


def _check_packs(query: Any, key: Any, value: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        masks.check_layout(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have 3 dimensions: query (Tq, Hq, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv); got "
                f"{tuple(tensor.shape)}"
            )


def _check_cu_seqlens(name: str, cu_seqlens: Any, pack: Tensor) -> list[int] | None:
    """Where the sequences of a pack (T, H, D) begin, when that can be known at no cost."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        seen = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor (N + 1,), got {seen}")
    masks.check_layout(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must have shape (N + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != pack.device:
        raise ValueError(f"{name} must be on the device of query, {pack.device}, got {cu_seqlens.device}")
    # Elsewhere wrong values select wrong pairs, not wrong memory.
    return _starts(name, cu_seqlens, pack.shape[0]) if _is_on_host(cu_seqlens) else None


def _is_on_host(tensor: Tensor) -> bool:
    """Whether its values can be read at no cost."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not masks.is_recorded()  # whose values would be constants of the program
    )


def _starts(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    starts: list[int] = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total or min(_differences(starts), default=0) < 0:
        raise ValueError(f"{name} must go from 0 to the number of tokens, {total}, without decreasing, got {starts}")
    return starts


def _differences(starts: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(starts)]


def _check_varlen_options(
    max_q: Any, max_k: Any, return_aux: Any, window_size: Any, block_table: Any, seqused_k: Any, num_splits: Any
) -> tuple[int | None, int | None]:
    """The window (left, right), None = unlimited."""
    for name, number in (("max_q", max_q), ("max_k", max_k), ("num_splits", num_splits)):
        if name == "num_splits" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
    if num_splits is not None and num_splits < 0:
        raise ValueError(f"num_splits must not be negative, got {num_splits}")
    if return_aux is not None:
        if not hasattr(return_aux, "lse"):
            raise TypeError(f"return_aux must be an AuxRequest, with a field lse, got {type(return_aux).__name__}")
        if getattr(return_aux, "max_scores", False):
            raise ValueError(
                "return_aux: lse is the one auxiliary output of packed sequences, max_scores was asked for"
            )
    window_size = (-1, -1) if window_size is None else tuple(window_size)
    if len(window_size) != 2:
        raise ValueError(f"window_size must have length 2, got {len(window_size)}")
    for side in window_size:
        if isinstance(side, bool) or not isinstance(side, int):
            raise TypeError(f"window_size must be two ints (left, right), got {window_size}")
    if block_table is not None and seqused_k is None:
        raise ValueError("block_table needs seqused_k, the number of keys of each sequence")
    left, right = (None if side < 0 else side for side in window_size)
    return left, right


def _check_seqused(seqused_k: Any, cu_seq_k: Tensor, starts_k: list[int] | None) -> None:
    if not isinstance(seqused_k, Tensor) or seqused_k.dtype not in (torch.int32, torch.int64):
        seen = seqused_k.dtype if isinstance(seqused_k, Tensor) else type(seqused_k).__name__
        raise TypeError(f"seqused_k must be an int32 or int64 tensor (N,), got {seen}")
    if tuple(seqused_k.shape) != (cu_seq_k.shape[0] - 1,):
        raise ValueError(f"seqused_k must have shape (N,) = {(cu_seq_k.shape[0] - 1,)}, got {tuple(seqused_k.shape)}")
    if seqused_k.device != cu_seq_k.device:
        raise ValueError(f"seqused_k must be on the device of query, {cu_seq_k.device}, got {seqused_k.device}")
    if starts_k is not None:
        used = seqused_k.tolist()
        if any(not 0 <= n <= length for n, length in zip(used, _differences(starts_k), strict=True)):
            raise ValueError(
                f"seqused_k must be between 0 and the lengths of the sequences, {_differences(starts_k)}, got {used}"
            )


def _gather_pages(query: Any, key: Any, value: Any, block_table: Any, seqused_k: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values in use (Tk, Hkv, D), out of their pools of pages, and where each sequence begins."""
    for name, pool in (("key", key), ("value", value)):
        if not isinstance(pool, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(pool).__name__}")
        if pool.dim() != 4 or pool.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"{name} must be a pool (total_pages, page_size, Hkv, D) with block_table, key and value alike; got "
                f"{tuple(pool.shape)}"
            )
    if key.shape[1] == 0:
        raise ValueError(f"key must be a pool of pages that hold a token or more, got {tuple(key.shape)}")
    for name, tensor, dims in (("block_table", block_table, 2), ("seqused_k", seqused_k, 1)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            seen = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {seen}")
        if tensor.dim() != dims or tensor.shape[0] != block_table.shape[0]:
            shape = "(N, pages)" if dims == 2 else "(N,)"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if torch.compiler.is_compiling():
        raise ValueError(
            "block_table needs the key lengths on the host, so it does not go under torch.compile: gather the pages "
            "outside, or keep each sequence's cache in one piece and pass it to attention with Mask.key_lengths"
        )
    total_pages, page_size = key.shape[:2]
    used, capacity = seqused_k.tolist(), block_table.shape[1] * page_size
    if any(not 0 <= n <= capacity for n in used):
        raise ValueError(f"seqused_k must be between 0 and what the pages of block_table hold, {capacity}, got {used}")
    pages = [-(-n // page_size) for n in used]
    listed = torch.cat([block_table[n, :count] for n, count in enumerate(pages)] or [block_table.flatten()])
    if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < total_pages:
        raise ValueError(f"block_table must name pages of the pool, 0 to {total_pages - 1}, got {listed.tolist()}")
    inside = torch.arange(page_size, device=listed.device)
    tokens = (listed.long()[:, None] * page_size + inside).split(pages)
    index = torch.cat([rows.flatten()[:n] for rows, n in zip(tokens, used, strict=True)] or [listed.long()])
    starts = F.pad(seqused_k.cumsum(0, dtype=torch.int64), (1, 0))
    return key.flatten(0, 1)[index], value.flatten(0, 1)[index], starts


# What a call of its own costs, in floating-point operations that the kernels could do meanwhile.
_CALL_FLOPS = 1e7


def _attention_of_packs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    mask: Mask | None,
    dropout_p: float,
    scale: float | None,
    backend: str | None,
    used_k: Tensor | None = None,
    apart: bool = False,
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, Dv) and lse (Hq, Tq) float32. used_k (N,): how many keys of each sequence count; apart: every
    sequence in a call of its own."""
    # (T, H, D) -> (1, H, T, D)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
        return _attention_with_seed(
            *(query, key, value),
            mask=mask,
            bias=None,
            dropout_p=dropout_p,
            scale=scale,
            dropout_seed=_draw_seed(dropout_p, query.device),
            backend=backend,
        )

    # Without a band there are no indices to compare; with one, those of the pack serve when both packs lie alike.
    alike = mask is None or (used_k is None and (cu_q is cu_k or _equal_on_host(cu_q, cu_k)))
    if cu_q.shape[0] == 1 or (alike and not apart and not _cheaper_apart(query, cu_q, cu_k, used_k)):
        segments = Mask.segments(
            _segment_ids(cu_q, query.shape[2], outside=-1),
            _segment_ids(cu_k, key.shape[2], outside=-2, used=used_k),
        )
        out, lse = run(query, key, value, segments if mask is None else segments & mask)
    else:
        if torch.compiler.is_compiling():
            raise ValueError(
                "num_splits=1 and seqused_k with a window need the sequences' lengths on the host, so they do not go "
                "under torch.compile"
            )
        lengths_q = _differences(_starts("cu_seqlens_q", cu_q, query.shape[2]))
        lengths_k = _differences(_starts("cu_seqlens_k", cu_k, key.shape[2]))
        if used_k is not None:  # used and unused keys in turn
            lengths_k = [n for used, full in zip(used_k.tolist(), lengths_k, strict=True) for n in (used, full - used)]
        step = 1 if used_k is None else 2
        # One split for all: its backward writes every piece's gradient once, where slices would each add a whole pack.
        pieces = [
            run(*parts, mask)
            for parts in zip(
                query.split(lengths_q, 2),
                key.split(lengths_k, 2)[::step],
                value.split(lengths_k, 2)[::step],
                strict=True,
            )
        ]
        out = torch.cat([piece.transpose(1, 2) for piece, _ in pieces], dim=1).transpose(1, 2)
        lse = torch.cat([piece for _, piece in pieces], dim=2)
    return out[0].transpose(0, 1), lse[0].float()


def _cheaper_apart(query: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None) -> bool:
    """Whether short queries over long keys, as in decoding, are better run one sequence at a time: in one launch the
    sequences that share a tile of queries each see the keys of all of them."""
    if not (_is_on_host(cu_q) and _is_on_host(cu_k) and type(query) is Tensor):
        return False
    lengths_q = _differences(cu_q.tolist())
    lengths_k = _differences(cu_k.tolist()) if used_k is None else used_k.tolist()
    rows = dispatch.BACKENDS["cpu"].tile[0]
    together = alone = 0
    first = 0  # the first query of the sequence
    keys_of_tile: dict[int, int] = {}
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        alone += length_q * length_k
        for tile in range(first // rows, -(-(first + length_q) // rows) if length_q else 0):
            keys_of_tile[tile] = keys_of_tile.get(tile, 0) + length_k
        first += length_q
    together = sum(min(rows, first - tile * rows) * keys for tile, keys in keys_of_tile.items())
    heads, dim = query.shape[1], query.shape[3]
    return 4.0 * dim * heads * (together - alone) > _CALL_FLOPS * len(lengths_q)


def _equal_on_host(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling():
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be one and the same tensor under torch.compile with a causal or window "
            "mask: sequences whose queries and keys differ in length need the values on the host"
        )
    return torch.equal(a, b)


def _segment_ids(cu_seqlens: Tensor, total: int, outside: int, used: Tensor | None = None) -> Tensor:
    """The sequence that each token is in, (1, total); `outside` for tokens in none, and for those of sequence n that
    follow its first used[n]."""
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    if used is None:
        ids = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        inside = (ids >= 0) & (ids < cu_seqlens.shape[0] - 1)
    else:
        first = cu_seqlens[:-1]
        edges = torch.stack((first, first + used.to(first.dtype)), 1).flatten()  # used tokens follow the even ones
        edge = torch.searchsorted(edges, tokens, right=True) - 1
        ids, inside = edge // 2, (edge >= 0) & (edge % 2 == 0)
    return torch.where(inside, ids, outside).unsqueeze(0)


# torch's signature ---------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with the same arguments and meaning, computed by `attention`.

    query (..., Hq, L, E), key (..., H, S, E), value (..., H, S, Ev); leading dimensions broadcast, and there may be
    none. attn_mask: bool, True = may attend, or float, added to the scores (and differentiable); broadcastable to
    (..., Hq, L, S). is_causal: top-left; not together with attn_mask (RuntimeError, as in torch). enable_gqa: Hq may be
    a multiple of H. A query that may attend to nothing gets 0. dropout_p: in [0, 1], 1 drops everything.
    """
    if dropout_p == 1.0:
        # Zeros, with zero gradients, for each shape that the other arguments give.
        return scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa).mul(0.0)
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dim() >= 2
        and key.dim() >= 2
        and value.dim() >= 2
    ):
        _refuse_sdpa_inputs(query, key, value)
    if is_causal and attn_mask is not None:
        raise RuntimeError("attn_mask must be None when is_causal is set: give the mask or the flag, not both")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a bool or float tensor, got {type(attn_mask).__name__}")
    mask: Mask | Tensor | None = Mask.causal() if is_causal else None
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    seed = _draw_seed(dropout_p, query.device) if dropout_p else None
    try:
        shape_q, shape_k, shape_v = query.shape, key.shape, value.shape
    except RuntimeError:  # of a nested tensor
        _refuse_sdpa_inputs(query, key, value)
        raise
    if enable_gqa or shape_q[:-2] == shape_k[:-2]:  # else the heads are not shared out, but broadcast
        direct = ops.direct_attention(query, key, value, mask, bias, dropout_p, scale, seed, None, False)
        if direct is not None:
            return direct[0]
    _refuse_sdpa_inputs(query, key, value)
    if attn_mask is not None:
        masks.check_layout("attn_mask", attn_mask)
    lead: tuple[int, ...] | None = None
    head = 1 if enable_gqa else 2  # with enable_gqa the heads may differ: they are shared out, not broadcast
    if not (len(shape_q) == len(shape_k) == len(shape_v) == 4 and shape_q[:head] == shape_k[:head] == shape_v[:head]):
        query, key, value, lead = _to_four(query, key, value, enable_gqa)
        if attn_mask is not None:
            attn_mask = _mask_to_four(attn_mask, lead)
            mask, bias = (attn_mask, None) if bias is None else (None, attn_mask)
    if bias is not None:
        bias = _check_bias(bias, query, _check_inputs(query, key, value), "attn_mask")
    arguments = query, key, value, mask, bias, dropout_p, scale, seed, None
    # What was not reshaped was declined above.
    direct = None if lead is None else ops.direct_attention(*arguments, False)
    out, _ = direct or _attention_by_operator(*arguments)
    return out if lead is None or len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _refuse_sdpa_inputs(query: Any, key: Any, value: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        masks.check_layout(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions (..., L, E), got {tuple(tensor.shape)}")


def _to_four(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The inputs with 4 dimensions, and the leading dimensions of the output."""
    heads = 1 if enable_gqa else 0
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError(
            f"query, key and value must have at least 3 dimensions with enable_gqa, got {_describe(query, key, value)}"
        )
    try:
        lead = torch.broadcast_shapes(*(x.shape[: x.dim() - 2 - heads] for x in (query, key, value)))
    except RuntimeError as error:
        raise ValueError(
            f"the leading dimensions of query, key and value must broadcast, got {_describe(query, key, value)}"
        ) from error

    def four(x: Tensor) -> Tensor:
        own = x.shape[x.dim() - 2 - heads :]
        return _fold(x.expand(*lead, *own))

    out_lead = (*lead, query.shape[-3]) if heads else lead
    return four(query), four(key), four(value), tuple(out_lead)


def _fold(x: Tensor) -> Tensor:
    """(..., H, L, E) -> (B, H, L, E); (H, L, E) -> (1, H, L, E); (L, E) -> (1, 1, L, E)."""
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _mask_to_four(attn_mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """The mask as it broadcasts to folded scores."""
    if len(lead) + 2 < attn_mask.dim():
        raise ValueError(
            f"attn_mask must broadcast to (..., L, S) with leading dimensions {lead}, got {tuple(attn_mask.shape)}"
        )
    if len(lead) <= 2 or attn_mask.dim() <= 3:
        return attn_mask
    try:
        return attn_mask.expand(*lead[:-1], *attn_mask.shape[-3:]).flatten(0, -4)
    except RuntimeError as error:
        raise ValueError(
            f"attn_mask must broadcast to (..., L, S) with leading dimensions {lead}, got {tuple(attn_mask.shape)}"
        ) from error
