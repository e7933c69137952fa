"""The compiled libraries: fills the parameter structs of csrc/core/params.h from torch tensors and calls the kernels.

One `Library` each for the CPU kernels (`fastattn._native`) and the CUDA kernels (`fastattn._cuda`), with the functions
of fastattn/backends/reference.py as methods; `library` gives them. The kernels read tensors in place, by pointer and
strides. What they rely on is checked here, once (`_check_problem`, `_check_mask`), so that no call of an operator,
however it was made, reads out of bounds.

FASTATTN_CUDA_LIBRARY=path loads another file as `fastattn._cuda`. `make emulator` builds one whose kernels are executed
on the CPU, by csrc/cuda/emulator: it takes CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

# Before the libraries: the OpenMP runtime that torch brought serves the kernels too, so there is one pool of threads.
import torch
from torch import Tensor

from fastattn.masks import UNLIMITED, KernelMask
from fastattn.tiles import WORD, TileMap

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # DType of params.h
_KINDS = {"l2": 0, "l1": 1, "smooth_l1": 2}  # LossKind
_REDUCTIONS = {"masked_mean": 0, "sum": 1, "mean": 2, "none": 3}  # Reduction

_MAPPED_BYTES = 2**25  # the largest block that glibc's malloc may keep for the next use
_CPU = torch.device("cpu")

_Ref = tuple[int, tuple[int, ...], int]  # a TensorRef: data pointer, strides in elements, dtype code


# Tensors as the kernels see them ------------------------------------------------------------------------------------


def _ref(tensor: Tensor | None) -> _Ref | None:
    """None stays None. The dtype code of bools and ints is not looked at."""
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(), _DTYPE_CODES.get(tensor.dtype, 0))


def _broadcast_ref(tensor: Tensor | None) -> _Ref | None:
    """As `_ref`, with stride 0 in dimensions of size 1: these repeat over the problem's size."""
    if tensor is None:
        return None
    strides = tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), strides, _DTYPE_CODES.get(tensor.dtype, 0)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Checks -------------------------------------------------------------------------------------------------------------


def _require(condition: bool, name: str, tensor: Tensor, wanted: str, *values: object) -> None:
    if not condition:
        # Formatted only here: these checks are on the way of every call.
        seen = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"{name} must be {wanted.format(*values)}, got {seen}")


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """A tensor of the problem that the kernels read or write along a contiguous last dimension."""
    fits = (
        tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.device == device
        and (tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 or not tensor.numel())
    )
    _require(fits, name, tensor, "{} {} with last stride 1 on {}", dtype, shape, device)


def _fits(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """On the device, of the dtype, and each dimension of the wanted size or 1."""
    return (
        tensor.dtype == dtype
        and tensor.device == device
        and tensor.dim() == len(shape)
        and all(size == 1 or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True))
    )


def _check_problem(query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    """The sizes (B, Hq, Hkv, L, S, D, Dv) of the problem; Dv is 0 without a value."""
    B, Hq, L, D = query.shape
    Hkv, S = key.shape[1:3]
    Dv = 0 if value is None else value.shape[3]
    if query.dtype not in _DTYPE_CODES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {query.dtype}")
    if Hq and (not Hkv or Hq % Hkv):
        raise ValueError(f"the heads of query must be a multiple of those of key, got {Hq} and {Hkv}")
    device = query.device
    fits = query.stride(-1) == 1 or D <= 1 or not query.numel()  # the rest of query is what the others are held to
    _require(fits, "query", query, "of last stride 1")
    _check_like("key", key, (B, Hkv, S, D), query.dtype, device)
    if value is not None:
        _check_like("value", value, (B, Hkv, S, Dv), query.dtype, device)
    if bias is not None:
        fits = bias.dtype in _DTYPE_CODES and _fits(bias, (B, Hq, L, S), bias.dtype, device)
        _require(fits, "bias", bias, "a float tensor broadcastable to {} on {}", (B, Hq, L, S), device)
    return B, Hq, Hkv, L, S, D, Dv


def _check_mask(mask: KernelMask, B: int, H: int, L: int, S: int, device: torch.device) -> None:
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...], torch.dtype], ...] = (
        ("prefix lengths", mask.prefix_lengths, (B,), torch.int64),
        ("key lengths", mask.key_lengths, (B,), torch.int64),
        ("key padding", mask.key_keep, (B, S), torch.bool),
        ("query segments", mask.query_segments, (B, L), torch.int64),
        ("key segments", mask.key_segments, (B, S), torch.int64),
    )
    for name, tensor, shape, dtype in expected:
        if tensor is not None:
            fits = _fits(tensor, shape, dtype, device) and tensor.shape[1:] == shape[1:]
            _require(fits, f"mask: {name}", tensor, "{} {} on {}, batch size 1 allowed", dtype, shape, device)
    if (mask.query_segments is None) != (mask.key_segments is None):
        raise ValueError("mask: segments need the ids of the queries and of the keys")
    if mask.tile_map is not None:
        _check_tile_map(mask.tile_map, B, H, L, S, device)


def _check_tile_map(tile_map: TileMap, B: int, H: int, L: int, S: int, device: torch.device) -> None:
    if tile_map.bits is None:
        raise ValueError("mask: the tile map of a dense mask must carry its bits")
    if tile_map.block_m < 1 or tile_map.block_n < 1 or tile_map.block_n % WORD:
        raise ValueError(
            f"mask: tiles of {tile_map.block_m} x {tile_map.block_n}: block_n must be a multiple of {WORD}"
        )
    tiles_q, tiles_k = -(-L // tile_map.block_m), -(-S // tile_map.block_n)
    shapes = {
        "bits": (L, -(-S // WORD)),
        "live": (tiles_q, -(-tiles_k // WORD)),
        "full": (tiles_q, -(-tiles_k // WORD)),
        "live_t": (tiles_k, -(-tiles_q // WORD)),
        "full_t": (tiles_k, -(-tiles_q // WORD)),
    }
    leading = tile_map.bits.shape[:2]
    for name, shape in shapes.items():
        tensor: Tensor = getattr(tile_map, name)
        fits = (
            _fits(tensor, (B, H, *shape), torch.int64, device)
            and tensor.shape[:2] == leading
            and tensor.shape[2:] == shape
            and tensor.is_contiguous()
        )
        _require(fits, f"mask: {name} of the tile map", tensor, "contiguous int64 {} on {}", (B, H, *shape), device)


# The shared arguments -----------------------------------------------------------------------------------------------


def _mask_arguments(
    mask: KernelMask | None, B: int, H: int, L: int, S: int, device: torch.device
) -> tuple[Any, ...] | None:
    """The MaskParams, as csrc/bindings.cpp reads them."""
    if mask is None:
        return None
    _check_mask(mask, B, H, L, S, device)
    low, high = -UNLIMITED, UNLIMITED
    if mask.band is not None:
        left_top, right_top, left_bottom, right_bottom = mask.band
        low, high = -left_top, right_top
        if left_bottom < UNLIMITED:
            low = max(low, S - L - left_bottom)
        if right_bottom < UNLIMITED:
            high = min(high, S - L + right_bottom)
    tiles: tuple[Any, ...] = (None, None, None, None, None, 0, 0)
    if mask.tile_map is not None:
        maps = mask.tile_map
        tiles = (
            *(_broadcast_leading(x) for x in (maps.bits, maps.live, maps.full, maps.live_t, maps.full_t)),
            *(maps.block_m, maps.block_n),
        )
    vectors = (mask.prefix_lengths, mask.key_lengths)
    rows = (mask.key_keep, mask.query_segments, mask.key_segments)
    return low, high, *map(_broadcast_ref, vectors), *map(_broadcast_row, rows), *tiles


def _broadcast_leading(tensor: Tensor | None) -> _Ref:
    """(Bm, Hm, rows, words) contiguous: only the batch and the head repeat, a single row has its stride."""
    assert tensor is not None
    batch, heads, rows, words = tensor.shape
    strides = (heads * rows * words if batch > 1 else 0, rows * words if heads > 1 else 0, words)
    return tensor.data_ptr(), strides, 0


def _broadcast_row(tensor: Tensor | None) -> _Ref | None:
    """(B|1, N): only the batch repeats."""
    if tensor is None:
        return None
    return tensor.data_ptr(), (tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1)), 0


def _unit_stride(tensor: Tensor) -> Tensor:
    # An expanded gradient, such as that of a sum: no input of the user's, so copying it is no hidden copy.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _run(launch: Any, tensor: Tensor) -> None:
    """Launches with a workspace on the device of `tensor`."""
    size = launch.workspace_bytes
    if size:
        workspace = tensor.new_empty(size, dtype=torch.uint8)
        launch.run(workspace.data_ptr(), size)
    else:
        launch.run()


def _new_grad_bias(bias: Tensor | None, query: Tensor, key: Tensor, wanted: bool) -> Tensor | None:
    """Contiguous, in bias's own shape and in the accumulation dtype."""
    if bias is None or not wanted:
        return None
    # Without queries or keys the kernels have nothing to write, but a broadcast bias still has elements.
    allocate = bias.new_empty if query.shape[:3].numel() * key.shape[2] else bias.new_zeros
    return allocate(bias.shape, dtype=_accumulation_dtype(query.dtype))


def _weights_ref(weights: Tensor) -> _Ref | None:
    # (B, L, S) is (B, 1, L, S) with stride 0 for the head.
    return _ref(weights if weights.dim() == 4 else weights.unsqueeze(1).expand(-1, 2, -1, -1))


def _four_dims(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())]


# The operations -----------------------------------------------------------------------------------------------------


class Library(ABC):
    """The operations of one compiled library. Its subclasses say where the kernels compute."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.file = str(module.__file__)

    def info(self) -> dict[str, Any]:
        """What was built, as `build_info` of csrc/bindings.cpp tells."""
        return dict(self._module.build_info())

    @staticmethod
    @abstractmethod
    def _is_here(tensor: Tensor) -> bool:
        """Whether a tensor is where the kernels compute."""

    @staticmethod
    @abstractmethod
    def _executor() -> int:
        """What the kernels run on: the number of threads, or the stream."""

    @abstractmethod
    def _seed(self, seed: Tensor, device: torch.device) -> int:
        """The dropout seed as the kernels take it."""

    def _prepare_output(self, tensor: Tensor | None) -> Tensor | None:
        """Called with a fresh output of size L · S before it is written."""
        return tensor

    def _check_device(self, name: str, tensor: Tensor) -> None:
        """The first tensor of an operation; every other one must be on the same device."""
        _require(self._is_here(tensor), name, tensor, "where the kernels of {} compute", self.file)

    def _shared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        dropout_p: float,
        dropout_seed: Tensor | None,
        lse: Tensor,
    ) -> tuple[Any, ...]:
        """The arguments that every attention launch begins with (csrc/bindings.cpp, attention_params)."""
        self._check_device("query", query)
        sizes = _check_problem(query, key, value, bias)
        B, Hq, _, L, S, _, _ = sizes
        lse_dtype = _accumulation_dtype(query.dtype)
        device = query.device
        fits = lse.shape == (B, Hq, L) and lse.dtype == lse_dtype and lse.is_contiguous() and lse.device == device
        _require(fits, "lse", lse, "contiguous {} {} on {}", lse_dtype, (B, Hq, L), device)
        seed = 0
        if dropout_p > 0:
            if dropout_seed is None:
                raise ValueError("dropout_seed must be given when dropout_p > 0")
            seed = self._seed(dropout_seed, device)
        arguments = (
            *(sizes, scale, _ref(query), _ref(key), _ref(value), _broadcast_ref(bias)),
            *(_mask_arguments(mask, B, Hq, L, S, device), dropout_p, seed, _ref(lse), self._executor()),
        )
        return arguments

    # Attention ----------------------------------------------------------------------------------------------------

    def attention_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        dropout_p: float,
        dropout_seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """out (B, Hq, L, Dv) over memory (B, L, Hq, Dv), and lse (B, Hq, L) of the undropped scores."""
        B, Hq, L, _ = query.shape
        Dv = value.shape[3]
        out = query.new_empty_strided((B, Hq, L, Dv), (L * Hq * Dv, Dv, Hq * Dv, 1))
        lse = query.new_empty((B, Hq, L), dtype=_accumulation_dtype(query.dtype))
        shared = self._shared(query, key, value, bias, mask, scale, dropout_p, dropout_seed, lse)
        _run(self._module.AttentionForward(*shared, _ref(out)), query)
        return out, lse

    def attention_backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        dropout_p: float,
        dropout_seed: Tensor | None,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
        need_grad_bias: bool,
    ) -> Tensor | None:
        """Writes the gradients of query, key and value; returns that of bias, or None."""
        shared = self._shared(query, key, value, bias, mask, scale, dropout_p, dropout_seed, lse)
        device = query.device
        grad_out, out = _unit_stride(grad_out), _unit_stride(out)
        shape_out = (*query.shape[:3], value.shape[3])
        for name, tensor, shape in (
            ("out", out, shape_out),
            ("grad_out", grad_out, shape_out),
            ("grad_query", grad_query, query.shape),
            ("grad_key", grad_key, key.shape),
            ("grad_value", grad_value, value.shape),
        ):
            _check_like(name, tensor, shape, query.dtype, device)
        if grad_lse is not None:
            fits = grad_lse.shape == lse.shape and grad_lse.device == device
            _require(fits, "grad_lse", grad_lse, "of lse's shape {} on {}", tuple(lse.shape), device)
            grad_lse = grad_lse.to(lse.dtype)
        grad_bias = self._prepare_output(_new_grad_bias(bias, query, key, need_grad_bias))
        launch = self._module.AttentionBackward(
            *shared,
            *(_ref(out), _ref(grad_out), _ref(grad_lse), _ref(grad_query), _ref(grad_key), _ref(grad_value)),
            _broadcast_ref(grad_bias),
        )
        _run(launch, query)
        return None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)

    def attention_weights(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        average_heads: bool,
        dropout_p: float,
        dropout_seed: Tensor | None,
    ) -> Tensor:
        """The attention probabilities after dropout: (B, L, S), or (B, Hq, L, S) when `average_heads` is False."""
        shared = self._shared(query, key, None, bias, mask, scale, dropout_p, dropout_seed, lse)
        B, Hq, L, _ = query.shape
        weights = query.new_empty((B, L, key.shape[2]) if average_heads else (B, Hq, L, key.shape[2]))
        self._prepare_output(weights)
        _run(self._module.AttentionWeights(*shared, _weights_ref(weights), average_heads), query)
        return weights

    def attention_weights_backward(
        self,
        grad_weights: Tensor,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        average_heads: bool,
        dropout_p: float,
        dropout_seed: Tensor | None,
        need_grad_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Gradients of query, key, bias (or None) and lse; lse is an input of its own here: p = exp(s - lse)."""
        shared = self._shared(query, key, None, bias, mask, scale, dropout_p, dropout_seed, lse)
        B, Hq, L, _ = query.shape
        shape = (B, L, key.shape[2]) if average_heads else (B, Hq, L, key.shape[2])
        fits = grad_weights.shape == shape and grad_weights.dtype == query.dtype and grad_weights.device == query.device
        _require(fits, "grad_weights", grad_weights, "{} {} on {}", query.dtype, shape, query.device)
        grad_query, grad_key, grad_lse = torch.empty_like(query), torch.empty_like(key), torch.empty_like(lse)
        grad_bias = self._prepare_output(_new_grad_bias(bias, query, key, need_grad_bias))
        launch = self._module.AttentionWeightsBackward(
            *(*shared, _weights_ref(grad_weights), average_heads, _ref(grad_query), _ref(grad_key), _ref(grad_lse)),
            _broadcast_ref(grad_bias),
        )
        _run(launch, query)
        return grad_query, grad_key, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype), grad_lse

    # Mask tiles ---------------------------------------------------------------------------------------------------

    def mask_tiles(
        self, masks: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Packs the AND of bool masks (B|1, H|1, L|1, S|1): bits, live, full, live_t, full_t of `TileMap`."""
        B, H = torch.broadcast_shapes(*(mask.shape[:2] for mask in masks))
        if block_m < 1 or block_n < 1 or block_n % WORD:
            raise ValueError(f"block_m must be positive and block_n a multiple of {WORD}, got {block_m} and {block_n}")
        self._check_device("mask", masks[0])
        device = masks[0].device
        for mask in masks:
            fits = _fits(mask, (B, H, len_q, len_k), torch.bool, device)
            _require(fits, "mask", mask, "a bool tensor broadcastable to {} on {}", (B, H, len_q, len_k), device)
        tiles_q, tiles_k = -(-len_q // block_m), -(-len_k // block_n)
        words_q, words_k = -(-tiles_q // WORD), -(-tiles_k // WORD)
        shapes = (
            (len_q, -(-len_k // WORD)),
            (tiles_q, words_k),
            (tiles_q, words_k),
            (tiles_k, words_q),
            (tiles_k, words_q),
        )
        bits, live, full, live_t, full_t = (masks[0].new_empty((B, H, *shape), dtype=torch.int64) for shape in shapes)
        self._module.mask_tiles(
            [_broadcast_ref(mask) for mask in masks],
            (B, H, len_q, len_k),
            block_m,
            block_n,
            tuple(map(_ref, (bits, live, full, live_t, full_t))),
            self._executor(),
        )
        return bits, live, full, live_t, full_t

    # Masked loss --------------------------------------------------------------------------------------------------

    def _loss_launch(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor,
        kind: str,
        reduction: str,
        patch_size: int,
        beta: float,
        normalize_target: bool,
        eps: float,
        loss: Tensor | None,
        grad_input: Tensor | None,
        grad_loss: Tensor | None,
    ) -> None:
        """Fills MaskedLossParams: with patches input is (B, C, H, W), else it has at most 4 dimensions, led by ones."""
        self._check_device("input", input)
        device = input.device
        fits = input.dtype in _DTYPE_CODES and input.dim() <= 4
        _require(fits, "input", input, "a float tensor of at most 4 dimensions")
        fits = target.shape == input.shape and target.dtype == input.dtype and target.device == device
        _require(fits, "target", target, "{} {} on {}", input.dtype, tuple(input.shape), device)
        if patch_size:
            B, _, height, width = input.shape
            grid = (B, height // patch_size, width // patch_size)
            fits = _fits(mask, grid, torch.bool, device) and height % patch_size == 0 and width % patch_size == 0
            _require(fits and mask.shape[1:] == grid[1:], "mask", mask, "a bool patch grid {} on {}", grid, device)
            mask_ref: _Ref | None = (
                mask.data_ptr(),
                (mask.stride(0) if mask.shape[0] > 1 else 0, *mask.stride()[1:]),
                0,
            )
        else:
            fits = _fits(mask, tuple(input.shape), torch.bool, device)
            _require(fits, "mask", mask, "a bool tensor broadcastable to {} on {}", tuple(input.shape), device)
            mask_ref = _broadcast_ref(_four_dims(mask))
        refs = (None if x is None else _ref(_four_dims(x)) for x in (loss, grad_input, grad_loss))
        launch = self._module.MaskedLoss(
            *(_KINDS[kind], _REDUCTIONS[reduction], beta, tuple(_four_dims(input).shape), patch_size),
            *(_ref(_four_dims(input)), _ref(_four_dims(target)), mask_ref, normalize_target, eps),
            *(*refs, self._executor()),
        )
        _run(launch, input)

    def masked_loss(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor,
        kind: str,
        reduction: str,
        patch_size: int,
        beta: float,
        normalize_target: bool,
        eps: float,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and d loss / d input unless `reduction` is "none"."""
        if reduction == "none":
            loss = torch.empty_like(input)
            self._loss_launch(
                input, target, mask, kind, reduction, patch_size, beta, normalize_target, eps, loss, None, None
            )
            return loss, None
        loss = input.new_empty((), dtype=_accumulation_dtype(input.dtype))
        grad_input = torch.empty_like(input) if need_grad else None
        self._loss_launch(
            input, target, mask, kind, reduction, patch_size, beta, normalize_target, eps, loss, grad_input, None
        )
        return loss.to(input.dtype), grad_input

    def masked_loss_backward_none(
        self,
        grad_loss: Tensor,
        input: Tensor,
        target: Tensor,
        mask: Tensor,
        kind: str,
        patch_size: int,
        beta: float,
        normalize_target: bool,
        eps: float,
    ) -> Tensor:
        """d loss / d input for the upstream gradient of each element, for `reduction` "none"."""
        fits = grad_loss.shape == input.shape and grad_loss.dtype == input.dtype and grad_loss.device == input.device
        _require(fits, "grad_loss", grad_loss, "{} {} on {}", input.dtype, tuple(input.shape), input.device)
        grad_input = torch.empty_like(input)
        self._loss_launch(
            input, target, mask, kind, "none", patch_size, beta, normalize_target, eps, None, grad_input, grad_loss
        )
        return grad_input


class CpuLibrary(Library):
    """The CPU kernels: torch's number of threads, the seed by value."""

    _executor = staticmethod(torch.get_num_threads)

    @staticmethod
    def _is_here(tensor: Tensor) -> bool:
        return tensor.is_cpu

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module)
        module.level()  # one that cannot be had is a ValueError that names FASTATTN_CPU_LEVEL, not a quiet fall back
        module.set_torch((Tensor, torch.nn.Parameter), (*_DTYPE_CODES, torch.int64, torch.bool))

    def info(self) -> dict[str, Any]:
        """The "level" in use, the "levels" this CPU can run, "compiler", "openmp" (version or None) and "threads"."""
        return {**super().info(), "threads": torch.get_num_threads()}

    def _seed(self, seed: Tensor, device: torch.device) -> int:
        return int(seed.item()) % 2**64

    def _prepare_output(self, tensor: Tensor | None) -> Tensor | None:
        # glibc maps a block of this size anew each time, so that every page of it is a fault: a fifth of the time of
        # a backward that fills 64 MB.
        if tensor is not None and tensor.nbytes >= _MAPPED_BYTES:
            self._module.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    # Attention and its gradient in one call into the library, for plain CPU tensors. None or False, and nothing was
    # computed, where something does not fit: csrc/bindings.cpp looks at all that the kernels rely on.

    def attention_direct(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: KernelMask | Tensor | None,
        scale: float | None,
        dropout_p: float,
        dropout_seed: Tensor | None,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """`attention_forward`; `mask` may also be a bool tensor broadcastable to (B, Hq, L, S)."""
        query_shape, value_shape = query.shape, value.shape
        if len(query_shape) != 4 or len(value_shape) != 4:
            return None
        batch, heads, length, dim = query_shape
        if scale is None:
            if not dim:
                return None
            scale = dim**-0.5
        dim_v = value_shape[3]
        row = heads * dim_v
        out = query.new_empty_strided((batch, heads, length, dim_v), (length * row, dim_v, row, 1))
        lse = query.new_empty((batch, heads, length), dtype=_accumulation_dtype(query.dtype)) if need_lse else None
        fits = self._module.attention_direct(
            *(query, key, value, bias, mask, scale, dropout_p),
            0 if dropout_seed is None else self._seed(dropout_seed, _CPU),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            torch.get_num_threads(),
        )
        return (out, lse) if fits else None

    def attention_backward_direct(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        dropout_p: float,
        dropout_seed: Tensor | None,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
        need_grad_bias: bool,
    ) -> tuple[Tensor | None] | None:
        """`attention_backward`; the gradient of bias comes in a tuple."""
        grad_bias = self._prepare_output(_new_grad_bias(bias, query, key, need_grad_bias))
        fits = self._module.attention_backward_direct(
            *(_unit_stride(grad_out), grad_lse, query, key, value, out, lse, bias, mask, scale, dropout_p),
            0 if dropout_seed is None else self._seed(dropout_seed, _CPU),
            *(grad_query, grad_key, grad_value, grad_bias),
            torch.get_num_threads(),
        )
        return (None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),) if fits else None

    # Additive attention

    def _additive_shared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_weight: Tensor,
        mask: KernelMask | None,
        lse: Tensor,
    ) -> tuple[Any, ...]:
        """The arguments that both launches begin with (csrc/bindings.cpp, additive_attention_params)."""
        self._check_device("query", query)
        B, L, A = query.shape
        S, Dv = value.shape[1:]
        dtype, device = query.dtype, query.device
        if dtype not in _DTYPE_CODES:
            raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {dtype}")
        _check_like("query", query, (B, L, A), dtype, device)
        _check_like("key", key, (B, S, A), dtype, device)
        _check_like("value", value, (B, S, Dv), dtype, device)
        fits = score_weight.dtype in _DTYPE_CODES
        _require(fits, "score_weight", score_weight, "a float tensor")
        _check_like("score_weight", score_weight, (A,), score_weight.dtype, device)
        _check_like("lse", lse, (B, L), _accumulation_dtype(dtype), device)
        _require(lse.is_contiguous(), "lse", lse, "contiguous")
        arguments = _mask_arguments(mask, B, 1, L, S, device)
        inputs = _ref(query), _ref(key), _ref(value), _ref(score_weight)
        return (B, L, S, A, Dv), *inputs, arguments, _ref(lse), self._executor()

    def additive_attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, mask: KernelMask | None
    ) -> tuple[Tensor, Tensor]:
        """out (B, L, Dv) and lse (B, L), contiguous."""
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        lse = query.new_empty(query.shape[:2], dtype=_accumulation_dtype(query.dtype))
        shared = self._additive_shared(query, key, value, score_weight, mask, lse)
        _run(self._module.AdditiveAttentionForward(*shared, _ref(out)), query)
        return out, lse

    def additive_attention_backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_weight: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: KernelMask | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of query, key, value and score_weight, contiguous."""
        shared = self._additive_shared(query, key, value, score_weight, mask, lse)
        grad_out, out = _unit_stride(grad_out), _unit_stride(out)
        for name, tensor in (("grad_out", grad_out), ("out", out)):
            _check_like(name, tensor, (*query.shape[:2], value.shape[2]), query.dtype, query.device)
        if grad_lse is not None:
            fits = grad_lse.shape == lse.shape and grad_lse.dtype == lse.dtype and grad_lse.device == lse.device
            _require(fits, "grad_lse", grad_lse, "{} {} on {}", lse.dtype, tuple(lse.shape), lse.device)
        grad_query, grad_key, grad_value, grad_weight = (
            x.new_empty(x.shape) for x in (query, key, value, score_weight)
        )
        written = grad_query, grad_key, grad_value, grad_weight
        refs = (_ref(x) for x in (out, grad_out, grad_lse, *written))
        _run(self._module.AdditiveAttentionBackward(*shared, *refs), query)
        return written

    # Linear head with its masked loss

    def linear_masked_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        mask: Tensor,
        kind: str,
        reduction: str,
        patch_size: int,
        beta: float,
        normalize_target: bool,
        eps: float,
        need_grad: list[bool],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The loss of the prediction hidden weight^T + bias, and its gradients by hidden, weight, bias and target, or
        None where `need_grad` has False."""
        self._check_device("hidden", hidden)
        device, dtype = hidden.device, hidden.dtype
        _require(hidden.dtype in _DTYPE_CODES and hidden.dim() == 3, "hidden", hidden, "a float tensor (B, N, E)")
        batch, tokens, dim_in = hidden.shape
        fits = weight.dim() == 2 and weight.shape[1] == dim_in and weight.dtype == dtype and weight.device == device
        _require(fits, "weight", weight, "{} (P, {}) on {}", dtype, dim_in, device)
        dim_out = weight.shape[0]
        if bias is not None:
            fits = bias.shape == (dim_out,) and bias.dtype == dtype and bias.device == device
            _require(fits, "bias", bias, "{} {} on {}", dtype, (dim_out,), device)
        grid: tuple[int, int] = (1, tokens)
        shape: tuple[int, ...] = (batch, tokens, dim_out)
        if patch_size:
            fits = target.dim() == 4 and target.shape[0] == batch and dim_out == target.shape[1] * patch_size**2
            fits = fits and target.shape[2] % patch_size == 0 and target.shape[3] % patch_size == 0
            _require(fits, "target", target, "images ({}, C, H, W) of {} numbers a patch", batch, dim_out)
            grid = (target.shape[2] // patch_size, target.shape[3] // patch_size)
            shape = tuple(target.shape)
            _require(grid[0] * grid[1] == tokens, "target", target, "images of {} patches", tokens)
        # Of the compute type where hidden is float64; a float32 target of a bfloat16 head is one under autocast.
        of_dtype = target.dtype in _DTYPE_CODES and (target.dtype == torch.float64) <= (dtype == torch.float64)
        fits = target.shape == shape and of_dtype and target.device == device
        _require(fits, "target", target, "{} {} on {}", dtype, shape, device)
        fits = mask.shape == (batch, *grid) and mask.dtype == torch.bool and mask.device == device
        _require(fits, "mask", mask, "bool {} on {}", (batch, *grid), device)
        accumulation = _accumulation_dtype(dtype)
        loss = hidden.new_empty((), dtype=accumulation)
        grad_hidden = hidden.new_empty(hidden.shape) if need_grad[0] else None
        grad_weight = hidden.new_empty(weight.shape, dtype=accumulation) if need_grad[1] else None
        grad_bias = hidden.new_empty((dim_out,), dtype=accumulation) if bias is not None and need_grad[2] else None
        grad_target = target.new_empty(shape) if need_grad[3] else None
        # Locals, since the launch holds their addresses alone.
        rows, matrix = _unit_stride(hidden), _unit_stride(weight)
        vector = None if bias is None else _unit_stride(bias)
        launch = self._module.LinearMaskedLoss(
            *(_KINDS[kind], _REDUCTIONS[reduction], beta, (batch, *grid, dim_in, dim_out), patch_size),
            *(_ref(rows), _ref(matrix), _ref(vector), _ref(target), _ref(mask), normalize_target, eps),
            *(_ref(x) for x in (loss, grad_hidden, grad_weight, grad_bias, grad_target)),
            self._executor(),
        )
        _run(launch, hidden)
        grad_weight, grad_bias = (None if x is None else x.to(dtype) for x in (grad_weight, grad_bias))
        return loss.to(target.dtype), grad_hidden, grad_weight, grad_bias, grad_target

    # The rules of csrc/core, for the tests that compare every implementation of them

    def mask_elements(self, mask: KernelMask, B: int, H: int, L: int, S: int) -> Tensor:
        """Who may attend, bool (B, H, L, S), by `may_attend` of csrc/core/mask.h."""
        out = torch.empty(B, H, L, S, dtype=torch.bool)
        self._module.mask_elements(_mask_arguments(mask, B, H, L, S, torch.device("cpu")), B, H, L, S, _ref(out))
        return out

    def mask_tile_classes(self, mask: KernelMask, B: int, H: int, L: int, S: int, block_m: int, block_n: int) -> Tensor:
        """Classes of the tiles, uint8 (B, H, nQ, nK), by `tile_class` of csrc/core: 0 empty, 1 partial, 2 full."""
        out = torch.empty(B, H, -(-L // block_m), -(-S // block_n), dtype=torch.uint8)
        self._module.mask_tile_classes(
            _mask_arguments(mask, B, H, L, S, torch.device("cpu")), B, H, L, S, block_m, block_n, _ref(out)
        )
        return out

    def philox(self, seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
        """The four words of one Philox4x32-10 block, by csrc/core/philox.h."""
        return self._module.philox(seed, c0, c1, c2, c3)

    def philox_keep(self, seed: Tensor, p: float, B: int, H: int, L: int, S: int) -> Tensor:
        """Which elements dropout keeps, bool (B, H, L, S), by `dropout_keeps` of csrc/core/philox.h."""
        out = torch.empty(B, H, L, S, dtype=torch.bool)
        self._module.dropout_elements(p, int(seed.item()) % 2**64, B, H, L, S, _ref(out))
        return out


class CudaLibrary(Library):
    """The CUDA kernels: torch's current stream, the seed by its address, so that no call waits for the GPU."""

    @staticmethod
    def _is_here(tensor: Tensor) -> bool:
        return tensor.is_cuda

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module)
        for name in OPERATIONS:
            setattr(self, name, _on_its_device(getattr(self, name)))

    @staticmethod
    def _executor() -> int:
        # The number in torch.cuda.current_stream().cuda_stream, without the object, as Triton's launcher gets it.
        return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())

    def _check_device(self, name: str, tensor: Tensor) -> None:
        super()._check_device(name, tensor)
        if tensor.dtype == torch.float64:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 for the CUDA kernels, got {tensor.dtype}")

    def _seed(self, seed: Tensor, device: torch.device) -> int:
        fits = seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device
        _require(fits, "dropout_seed", seed, "one int64 on {}", device)
        return seed.data_ptr()


class EmulatedCudaLibrary(CudaLibrary):
    """The CUDA kernels executed on the CPU: they take CPU tensors, and there is no stream."""

    @staticmethod
    def _is_here(tensor: Tensor) -> bool:
        return tensor.is_cpu

    def __init__(self, module: ModuleType) -> None:
        Library.__init__(self, module)

    @staticmethod
    def _executor() -> int:
        return 0


OPERATIONS = (
    "attention_forward",
    "attention_backward",
    "attention_weights",
    "attention_weights_backward",
    "mask_tiles",
    "masked_loss",
    "masked_loss_backward_none",
)


def _on_its_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels are launched on the current device: makes it that of the first tensor."""

    @wraps(operation)
    def run(first: Tensor | list[Tensor], *rest: Any, **named: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        if tensor.is_cuda and tensor.get_device() == torch.cuda.current_device():  # no object where it is already
            return operation(first, *rest, **named)
        with torch.cuda.device_of(tensor):
            return operation(first, *rest, **named)

    return run


# The libraries ------------------------------------------------------------------------------------------------------


def cuda_library(path: str | None = None) -> CudaLibrary:
    """The CUDA kernels of this installation, or those of another file; ImportError when they cannot be loaded."""
    module = _load_module(path) if path else importlib.import_module("fastattn._cuda")
    return EmulatedCudaLibrary(module) if module.EMULATED else CudaLibrary(module)


def _load_module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastattn._cuda", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ImportError(f"there is no compiled module {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_KIND = {"cpu": "compiled library", "cuda": "CUDA library"}


@cache
def library(backend: str) -> Library:
    """The library of the backend "cpu" or "cuda"; ImportError with the reason when it cannot be loaded."""
    try:
        if backend == "cpu":
            return CpuLibrary(importlib.import_module("fastattn._native"))
        return cuda_library(os.environ.get("FASTATTN_CUDA_LIBRARY"))
    except ImportError as error:
        raise ImportError(f"fastattn was installed without its {_KIND[backend]} ({error})") from error
    except AttributeError as error:  # an editable installation whose sources have moved on
        raise ImportError(f"the {_KIND[backend]} was compiled from other sources: build it again ({error})") from error
