"""Two ways for `torch.nn.functional.scaled_dot_product_attention` to reach our kernels without a change to its callers.

`replace_scaled_dot_product_attention` is a context manager and decorator, for one stretch of one thread's code.
`register_flash_attention_impl` offers our kernels to torch's own registry of flash attention implementations, for a
whole process.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn import dispatch, ops
from fastattn.attention import _draw_seed, _flat_mask, _Sizes, scaled_dot_product_attention
from fastattn.dispatch import Problem
from fastattn.masks import Mask, coerce

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The context manager --------------------------------------------------------------------------------------------------

_STOCK = torch._C._nn.scaled_dot_product_attention  # whoever imported it, under whatever name, calls this object

_CAUSAL_BIAS = "torch.nn.attention.bias"  # not imported here: that takes a second, and who has its masks has it


class replace_scaled_dot_product_attention(contextlib.ContextDecorator, TorchFunctionMode):
    """Context manager and decorator: `torch.nn.functional.scaled_dot_product_attention` is ours inside it.

    Reached are callers of the attribute of `torch.nn.functional`, code that imported the function under its own name,
    and all that rests on it: `torch.nn.MultiheadAttention` with ``need_weights=False`` and torch's transformer layers
    (in evaluation too: inside, their fused C++ path steps aside), timm, transformers with its "sdpa" attention. Use it
    around the forward; the backward belongs to what the forward recorded and may run outside, except that activation
    checkpointing calls the forward again from the backward, which must then run inside as well.

    It is a `torch.overrides.TorchFunctionMode`: it holds for the thread that entered it (and for the autograd threads
    of a backward called inside), can be nested, also in other modes, and leaves nothing behind. `torch.compile` traces
    it, around the compiled function or within it, and compiles anew for code that it compiled outside. The price is one
    call in Python, about 1.3 microseconds, for each torch function called inside; `register_flash_attention_impl` has
    no such price. TorchScript and C++ callers are not reached.

    Arguments mean what they mean in torch: a bool `attn_mask` is True where a query may attend, `is_causal` is aligned
    to the top left, masks made by `torch.nn.attention.bias` work. A query that may attend to nothing gets 0. What we
    cannot compute raises a RuntimeError, as torch does, rather than going back to torch's kernel: nested tensors (use
    `fastattn.attention_varlen`), complex and 8-bit floats, `is_causal` together with `attn_mask`, a scale that is not
    finite. A type with a `__torch_function__` of its own, such as `torch.fx.Proxy`, keeps its own meaning.

    Raises:
        TypeError: decorating a generator or a coroutine function, whose body runs after the decorator has returned.

    Example::

        with replace_scaled_dot_product_attention():
            loss = model(images).square().mean()
        loss.backward()
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, function: _Function) -> _Function:
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(kind(function) for kind in kinds):
            raise TypeError(
                f"function must not be a generator or coroutine function, got {function!r}: its body runs after the "
                "decorator has returned; use the context manager inside it"
            )
        return super().__call__(function)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        instead = _INSTEAD.get(func)
        if instead is None or (types and any(_has_own_meaning(kind) for kind in types)):
            return func(*args, **(kwargs or {}))
        if func in _BACKWARD:
            with self:
                return instead(*args, **(kwargs or {}))
        return instead(*args, **(kwargs or {}))


def _has_own_meaning(kind: type) -> bool:
    """Whether a type's `__torch_function__` is neither Tensor's, nor switched off, nor of a type treated here."""
    if kind.__module__ == _CAUSAL_BIAS or kind.__module__.startswith("torch.nested"):
        return False
    own = kind.__torch_function__  # type: ignore[attr-defined]
    inherited = getattr(own, "__func__", None) is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    return not inherited and own is not torch._C._disabled_torch_function_impl


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Our function, with the types of torch's exceptions."""
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["attn_mask"] = attn_mask
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"scaled_dot_product_attention(): argument {name!r} must be Tensor, not {type(tensor).__name__}"
            )
        if tensor.is_nested:
            raise RuntimeError(f"{name} is a nested tensor, which is not supported: use fastattn.attention_varlen")
    try:
        if type(attn_mask).__module__ == _CAUSAL_BIAS:
            if is_causal:
                raise ValueError("attn_mask must be None when is_causal is set: give the mask or the flag, not both")
            attn_mask, is_causal = _causal_mask(attn_mask, query, key)
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"scaled_dot_product_attention(): {error}") from error


def _causal_mask(attn_mask: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, bool]:
    """A mask of `torch.nn.attention.bias` as (attn_mask, is_causal)."""
    if attn_mask.variant.name == "UPPER_LEFT":
        return None, True
    len_q, len_k = query.shape[-2], key.shape[-2]
    keep = torch.ones(len_q, len_k, dtype=torch.bool, device=query.device)
    return keep.tril(len_k - len_q), False


def _unchecked(function: Any, **instead: Callable[..., Any]) -> FunctionType:
    """The same code, that does not ask whether a mode wants to run in its place; `instead` replaces names in it."""
    names = dict(function.__globals__, has_torch_function=_no, has_torch_function_unary=_no, **instead)
    del names["__name__"]  # by which torch.compile would look for the original names
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _no(*_: Any) -> bool:
    return False


def _unflatten(tensor: Tensor, dim: Any, sizes: Any) -> Tensor:
    # The method calls super(), which torch.compile cannot trace below a mode; what it adds is about named dimensions.
    return torch.unflatten(tensor, dim, sizes) if torch.compiler.is_compiling() else tensor.unflatten(dim, sizes)


# A backward may lead to the second forward of a checkpoint.
_BACKWARD = (Tensor.backward, torch.autograd.grad)

# What runs in the place of torch's functions. Those that are written in Python give way to a mode and then run without
# it, which some must not.
_INSTEAD: dict[Any, Callable[..., Any]] = {
    _STOCK: _attend,
    F.multi_head_attention_forward: _unchecked(F.multi_head_attention_forward, scaled_dot_product_attention=_attend),
    **{function: _unchecked(function) for function in _BACKWARD},
    Tensor.unflatten: _unflatten,
}


# The registry of flash attention implementations ----------------------------------------------------------------------


def register_flash_attention_impl(name: str = "fastattn") -> None:
    """Offer our kernels to torch's registry of flash attention implementations; torch does the rest on request.

    ::

        register_flash_attention_impl()  # changes nothing yet
        torch.nn.attention.activate_flash_attention_impl("fastattn")
        ...  # F.scaled_dot_product_attention, and all that rests on it, forward and backward
        torch.nn.attention.restore_flash_attention_impl()

    Active, it overrides the kernels of these operators for the whole process, every thread and compiled code included:

    * CPU: ``_scaled_dot_product_flash_attention_for_cpu`` and its backward.
    * CUDA: ``_scaled_dot_product_flash_attention``, ``_scaled_dot_product_efficient_attention`` (where torch sends
      calls with a mask) and their backwards.

    It also switches torch's fused evaluation path off (``torch.backends.mha``), with which
    `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoderLayer` would go around these operators. Restoring puts
    all of it back.

    Torch chooses before our kernels are asked, and what it sends elsewhere stays with torch: inputs that are not 4-D,
    a value width other than the query's, leading dimensions that broadcast, on the CPU also dropout and masks that need
    a gradient, on CUDA what ``torch.nn.attention.sdpa_kernel`` and cuDNN take. Torch turns a bool mask into a float one
    on the way; on the CPU it is turned back, which costs one read of the mask, so that masked tiles are skipped. A
    query that may attend to nothing gets 0. The backend is the one of `fastattn.use_backend` or the first able one.

    Args:
        name: the name in the registry.

    Raises:
        RuntimeError: this torch has no such registry; `replace_scaled_dot_product_attention` works without.
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl; "
            "use fastattn.integrations.sdpa.replace_scaled_dot_product_attention instead"
        )
    register(name, register_fn=_Overrides)


class _Overrides:
    """Our kernels in the place of torch's, from construction until `remove`."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # Overriding is what was asked for.
            warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
            for device, kernels in _KERNELS.items():
                for operator, kernel in kernels.items():
                    self._library.impl(operator, kernel, device)
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None
            torch.backends.mha.set_fastpath_enabled(self._fast_path)


class _Call(NamedTuple):
    """One call of an operator of torch, in the terms of a backend."""

    backend: Any
    inputs: tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    mask: Any
    scale: float
    dropout_p: float


def _prepare(
    inputs: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float = 0.0,
    need_grad_mask: bool = False,
) -> _Call:
    query, key, value = inputs
    sizes = _Sizes(query.shape[0], query.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3])
    mask, bias = (Mask.causal() if is_causal else None), None
    if attn_mask is not None:
        if not need_grad_mask:
            attn_mask = _without_copies(attn_mask)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        keep, bias = _split_mask(attn_mask)
        if keep is not None:
            mask = Mask.dense(keep) if mask is None else mask & Mask.dense(keep)
        if need_grad_mask:
            bias = attn_mask
    if dropout_p >= 1.0:
        # Every weight dropped: what a query that may attend to nothing gives.
        nothing = Mask.key_lengths(torch.zeros(1, dtype=torch.int64, device=query.device))
        mask, dropout_p = nothing if mask is None else mask & nothing, 0.0
    problem = Problem("attention", query.device.type, query.dtype, max(sizes.dim_qk, sizes.dim_v))
    name = dispatch.select(problem)
    flat = _flat_mask(coerce(mask), sizes, query.device, name)
    if scale is None:
        scale = 1.0 / math.sqrt(sizes.dim_qk) if sizes.dim_qk else 1.0
    return _Call(
        dispatch.load(name),
        (ops.unit_stride(query), ops.unit_stride(key), ops.unit_stride(value)),
        bias,
        ops.unflatten_mask(flat, sizes.len_q, sizes.len_k, name),
        scale,
        dropout_p,
    )


def _without_copies(attn_mask: Tensor) -> Tensor:
    """The mask without the dimensions along which `expand` repeats it."""
    for dim in range(attn_mask.dim() - 1):
        if attn_mask.shape[dim] > 1 and attn_mask.stride(dim) == 0:
            attn_mask = attn_mask.narrow(dim, 0, 1)
    return attn_mask


def _split_mask(attn_mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask of torch's operators, where a bool mask has become 0 and -inf, as (keep, bias)."""
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    keep = attn_mask != -math.inf
    if attn_mask.device.type != "cpu":
        return keep, attn_mask  # to look at its values would wait for the device
    if not bool((attn_mask == 0).logical_or_(keep.logical_not()).all()):
        return None if bool(keep.all()) else keep, attn_mask
    return None if bool(keep.all()) else keep, None


def _forward(call: _Call, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return call.backend.attention_forward(*call.inputs, call.bias, call.mask, call.scale, call.dropout_p, seed)


def _backward(
    call: _Call,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    need_grad_bias: bool = False,
) -> Tensor | None:
    """Fill `gradients` of query, key and value; return that of the bias."""
    return call.backend.attention_backward(
        *(grad_out, None, *call.inputs, out, lse, call.bias, call.mask, call.scale, call.dropout_p, seed),
        *gradients,
        need_grad_bias,
    )


def _empty_by_length(like: Tensor) -> Tensor:
    """(B, H, L, D) over memory (B, L, H, D), as torch's operators return most of their results."""
    batch, heads, length, dim = like.shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _with_strides_of(query: Tensor, out: Tensor) -> Tensor:
    """The output with the strides that torch promises, on which compiled code relies."""
    promised = torch.empty_like(query)
    return out if promised.stride() == out.stride() else promised.copy_(out)


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    if dropout_p != 0.0:
        # As torch's kernel does. Its backward is not told which weights were dropped.
        raise RuntimeError(f"dropout_p must be 0 in torch's operator for flash attention on the CPU, got {dropout_p}")
    with torch.no_grad():  # the gradient is torch's business, above this kernel
        call = _prepare((query, key, value), attn_mask, is_causal, scale)
        out, lse = _forward(call, None)
        return _with_strides_of(query, out), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        call = _prepare((query, key, value), attn_mask, is_causal, scale)
        gradients = _empty_by_length(query), _empty_by_length(key), _empty_by_length(value)
        _backward(call, grad_out, out, logsumexp.contiguous(), None, gradients)
        return gradients


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if return_debug_mask:
        raise RuntimeError("return_debug_mask is not supported: fastattn never stores the dropped weights")
    with torch.no_grad():
        call = _prepare((query, key, value), None, is_causal, scale, dropout_p)
        seed = _draw_seed(call.dropout_p, query.device)
        out, lse = _forward(call, seed)
        out = _with_strides_of(query, out)
        state = torch.zeros(2, dtype=torch.int64, device=query.device)
        if seed is not None:
            state[0] = seed
        unused = torch.zeros((), dtype=torch.uint64, device=query.device)
        debug_mask = query.new_empty(0)
        lengths = None, None, query.shape[2], key.shape[2]
        return out, lse, *lengths, state.view(torch.uint64), unused, debug_mask


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        call = _prepare((query, key, value), None, is_causal, scale, dropout_p)
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        seed = philox_seed.view(torch.int64)[0] if call.dropout_p else None
        _backward(call, grad_out, out, logsumexp.contiguous(), seed, gradients)
        return gradients


_EFFICIENT_ALIGNMENT = 32  # the efficient operator's log-sum-exp is as long as the next multiple of this


def _efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        call = _prepare((query, key, value), attn_bias, is_causal, scale, dropout_p)
        seed = _draw_seed(call.dropout_p, query.device)
        out, lse = _forward(call, seed)
        batch, heads, length = lse.shape
        padded = -(-length // _EFFICIENT_ALIGNMENT) * _EFFICIENT_ALIGNMENT if compute_log_sumexp else 0
        log_sumexp = lse.new_full((batch, heads, padded), math.inf)
        if compute_log_sumexp:
            log_sumexp[..., :length] = lse
        nothing = torch.zeros((), dtype=torch.int64, device=query.device)
        return out, log_sumexp, nothing if seed is None else seed, nothing.clone()


def _efficient_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    with torch.no_grad():
        need_grad_bias = attn_bias is not None and grad_input_mask[3]
        call = _prepare((query, key, value), attn_bias, is_causal, scale, dropout_p, need_grad_bias)
        gradients = _empty_by_length(query), _empty_by_length(key), _empty_by_length(value)
        lse = logsumexp[..., : query.shape[2]].contiguous()
        seed = philox_seed if call.dropout_p else None
        grad_bias = _backward(call, grad_out, out, lse, seed, gradients, need_grad_bias)
        return *gradients, None if grad_bias is None else _aligned(grad_bias)


def _aligned(grad_bias: Tensor) -> Tensor:
    """The gradient of a mask with the row stride that torch promises: the next multiple of 16."""
    length = grad_bias.shape[-1]
    rows = grad_bias.new_empty((*grad_bias.shape[:-1], -(-length // 16) * 16))[..., :length]
    return grad_bias if rows.stride() == grad_bias.stride() else rows.copy_(grad_bias)


_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
    },
    "CUDA": {
        "_scaled_dot_product_flash_attention": _flash_forward,
        "_scaled_dot_product_flash_attention_backward": _flash_backward,
        "_scaled_dot_product_efficient_attention": _efficient_forward,
        "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    },
}
