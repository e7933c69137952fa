"""Makes Triton's interpreter fit for checking kernels: `install()` before the first launch, with TRITON_INTERPRET=1.

Triton 3.6 and 3.7 interpret bfloat16 wrongly: arithmetic and products work on the raw 16 bits, and the cast from
float32 truncates. Repaired here: bfloat16 is computed in float32 and rounded to nearest even. With numpy >= 2.4, Triton
3.6 also fails on loops over a computed range.

Added: a load or store outside the tensors of the launch raises IndexError (the interpreter reads and writes whatever is
there), and an element that one program writes and another touches raises RuntimeError (programs run one after another
here, at once on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def install(check_memory: bool = True, check_races: bool = True) -> None:
    """Patches the interpreter of this process. A second call does nothing."""
    if getattr(_Builder, "_fastattn_installed", False):
        return
    _Builder._fastattn_installed = True
    _repair_bfloat16()
    _repair_ranges()
    _silence()
    if check_memory or check_races:
        _watch_memory(check_races)


# bfloat16 ------------------------------------------------------------------------------------------------------------


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """A bfloat16 handle, held as 16-bit integers, as a float32 one; any other as it is."""
    if not _is_bfloat16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values: np.ndarray) -> Any:
    """float32 values as a bfloat16 handle, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return _Handle(np.where(nan, (bits >> 16).astype(np.uint16) | np.uint16(0x40), rounded), tl.bfloat16)


def _repair_bfloat16() -> None:
    dot, cast, fp_to_fp = _Builder.create_dot, _Builder.cast_impl, _Builder.create_fp_to_fp
    binary, unary = _Builder.binary_op, _Builder.unary_op

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16:
            return source if _is_bfloat16(source) else _round(source.data.astype(np.float32))
        if _is_bfloat16(source):
            wide = _widen(source)
            return wide if kind.scalar == tl.float32 else cast(self, wide, kind)
        return cast(self, source, kind)

    def create_fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, kind.scalar):
            return cast_impl(self, source, kind)
        return fp_to_fp(self, source, kind, rounding)

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if not _is_bfloat16(left):
            return binary(self, left, right, operation)
        result = operation(_widen(left).data, _widen(right).data)
        return _Handle(result, tl.int1) if result.dtype == bool else _round(result)

    def unary_op(self: Any, value: Any, operation: Callable[..., Any]) -> Any:
        return _round(operation(_widen(value).data)) if _is_bfloat16(value) else unary(self, value, operation)

    _Builder.create_dot, _Builder.cast_impl, _Builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    _Builder.binary_op, _Builder.unary_op = binary_op, unary_op


def _repair_ranges() -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # int() of an array with a dimension fails from numpy 2.4 on.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


def _silence() -> None:
    """Inf and NaN are what masks and poisoned buffers are made of."""
    call = interpreter.GridExecutor.__call__

    def quiet(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = quiet


# Memory --------------------------------------------------------------------------------------------------------------


class _Memory:
    """What the current launch may touch, and who has touched it."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.written: dict[int, np.ndarray] = {}  # by span: the program that wrote each byte, 0 for none
        self.read: dict[int, np.ndarray] = {}

    def begin(self, tensors: Iterator[Any]) -> None:
        spans = set()
        for tensor in tensors:
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                spans.add((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
        # Views of one tensor overlap; joined, each address lies in one span.
        self.spans = []
        for first, last in sorted(spans):
            if self.spans and first < self.spans[-1][1]:
                self.spans[-1] = (self.spans[-1][0], max(last, self.spans[-1][1]))
            else:
                self.spans.append((first, last))
        self.written, self.read = {}, {}

    def check(self, pointers: Any, mask: Any, kind: str, races: bool) -> None:
        wanted = np.broadcast_to(np.asarray(mask.data if isinstance(mask, _Handle) else mask), pointers.data.shape)
        addresses = pointers.data[wanted.astype(bool)]
        if not addresses.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, last in self.spans:
            within = (addresses >= first) & (addresses + np.uint64(width) <= last)
            inside |= within
            if races and within.any():
                self._race(first, last, (addresses[within] - np.uint64(first)).astype(np.int64), kind)
        if not inside.all():
            where = interpreter.interpreter_builder.grid_idx
            count = int((~inside).sum())
            raise IndexError(f"out of bounds: a {kind} of {count} of {addresses.size} elements, program {where}")

    def _race(self, first: int, last: int, at: np.ndarray, kind: str) -> None:
        for shadow in (self.written, self.read):
            if first not in shadow:
                shadow[first] = np.zeros(last - first, dtype=np.int32)
        (x, y, z), (nx, ny, _) = (getattr(interpreter.interpreter_builder, name) for name in ("grid_idx", "grid_dim"))
        me = 1 + x + nx * (y + ny * z)
        written, read = self.written[first], self.read[first]
        clash = (written[at] != 0) & (written[at] != me)
        if kind == "store":
            clash |= (read[at] != 0) & (read[at] != me)
        if clash.any():
            count = int(clash.sum())
            raise RuntimeError(f"race: a {kind} by program {(x, y, z)} of {count} elements that another one touched")
        (written if kind == "store" else read)[at] = me


def _watch_memory(races: bool) -> None:
    memory = _Memory()
    begin = interpreter.GridExecutor._init_args_hst

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        arguments = begin(self, args, kwargs)
        memory.begin(_tensors((*arguments[0], *arguments[1].values())))
        return arguments

    interpreter.GridExecutor._init_args_hst = init_args

    def watch(name: str, kind: str, position: int) -> None:
        access = getattr(_Builder, name)

        def checked(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
            memory.check(pointers, rest[position], kind, races)
            return access(self, pointers, *rest, **named)

        setattr(_Builder, name, checked)

    watch("create_masked_load", "load", 0)
    watch("create_masked_store", "store", 1)


def _tensors(arguments: Any) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, tuple | list):
            yield from _tensors(argument)
        elif hasattr(argument, "data_ptr"):
            yield argument
