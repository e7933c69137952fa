"""Backends: who can run a problem, and who will.

A backend is one record below. The first able one of `preference` runs; a backend that the caller names runs or raises,
it never falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

import torch

from fastattn.backends import native

MAX_HEAD_DIM_CPU = 512
MAX_HEAD_DIM_GPU = 256
MIN_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_DTYPES = KERNEL_DTYPES[:3]


class Problem(NamedTuple):
    """What a backend has to know to tell whether it can run."""

    # "attention", "attention_weights", "mask_tiles", "masked_loss", "linear_masked_loss", "additive_attention"
    operation: str
    device: str  # the type, such as "cpu"
    dtype: torch.dtype
    head_dim: int = 0  # the larger of D and Dv; 0 where there are no heads


@dataclass(frozen=True)
class Backend:
    """One backend: its name, what gives the object that has its functions, and every reason why it cannot run a
    problem."""

    name: str
    load: Callable[[], Any]
    why_not: Callable[[Problem], list[str]]
    tile: tuple[int, int] = (48, 64)  # queries by keys, of the tile map of a dense mask


def _cpu_why_not(problem: Problem) -> list[str]:
    reasons = []
    if NATIVE_FAILURE is not None:
        reasons.append(f"the native library is not there: {NATIVE_FAILURE}")
    if problem.device != "cpu":
        reasons.append(f"it computes on CPU tensors, these are on {problem.device!r}")
    if problem.dtype not in KERNEL_DTYPES:
        reasons.append(f"it has no {problem.dtype} kernels")
    if problem.head_dim > MAX_HEAD_DIM_CPU and problem.operation != "additive_attention":
        reasons.append(f"its largest head dim is {MAX_HEAD_DIM_CPU}, this one is {problem.head_dim}")
    return reasons


def _cuda_why_not(problem: Problem) -> list[str]:
    reasons = []
    if CUDA_FAILURE is not None:
        reasons.append(CUDA_FAILURE)
    elif CUDA_EMULATED:
        if problem.device != "cpu":
            reasons.append("its kernels are emulated (FASTATTN_CUDA_LIBRARY), which takes CPU tensors")
    elif problem.device == "cuda":
        capability = _cuda_capability()
        reasons.extend(_capability_reasons(capability))
        if capability is not None and capability >= MIN_CAPABILITY and not _has_code_for(capability):
            built = ", ".join(f"{each // 10}.{each % 10}" for each in CUDA_ARCHITECTURES)
            reasons.append(f"it was built for capability {built}, this GPU has {capability[0]}.{capability[1]}")
    if problem.operation == "additive_attention":
        reasons.append("it has no kernel of additive attention")
    if problem.operation == "linear_masked_loss":
        reasons.append("it has no kernel of the linear head with its loss")
    if problem.device != "cuda" and not (CUDA_EMULATED and problem.device == "cpu"):
        reasons.append(f"it computes on CUDA tensors, these are on {problem.device!r}")
    return reasons + _gpu_kernel_reasons(problem)


def _has_code_for(capability: tuple[int, int]) -> bool:
    """Machine code runs on later minor versions of its generation, the PTX of the last architecture on all later."""
    major, minor = capability
    number = 10 * major + minor
    return number >= max(CUDA_ARCHITECTURES) or any(
        each // 10 == major and each <= number for each in CUDA_ARCHITECTURES
    )


def _triton_why_not(problem: Problem) -> list[str]:
    reasons = []
    if TRITON_FAILURE is not None:
        reasons.append(TRITON_FAILURE)
    if problem.device == "cuda":
        reasons.extend(_capability_reasons(_cuda_capability()))
        if TRITON_INTERPRETED:
            reasons.append("Triton's interpreter is on (TRITON_INTERPRET=1), which takes CPU tensors")
    elif problem.device != "cpu" or not TRITON_INTERPRETED:
        reasons.append(
            f"it computes on CUDA tensors, these are on {problem.device!r} (CPU tensors: only with TRITON_INTERPRET=1)"
        )
    return reasons + _gpu_kernel_reasons(problem)


def _capability_reasons(capability: tuple[int, int] | None) -> list[str]:
    if capability is None:
        return ["torch sees no CUDA device"]
    if capability < MIN_CAPABILITY:
        return [f"it needs a GPU of capability 8.0 or later, this one has {capability[0]}.{capability[1]}"]
    return []


def _gpu_kernel_reasons(problem: Problem) -> list[str]:
    reasons = []
    if problem.dtype not in GPU_DTYPES:
        reasons.append(f"it has no {problem.dtype} kernels")
    if problem.head_dim > MAX_HEAD_DIM_GPU and problem.operation != "additive_attention":
        reasons.append(f"its largest head dim is {MAX_HEAD_DIM_GPU}, this one is {problem.head_dim}")
    return reasons


def _cuda_capability() -> tuple[int, int] | None:
    """That of the current device; None where torch sees no device."""
    # torch takes longer over these two questions than the rest of a call takes; torch.compile asks once.
    if not torch.compiler.is_compiling() and torch.cuda.is_initialized():
        return _capability_of(torch.cuda.current_device())
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()  # unlike get_device_capability a constant to torch.compile
    return properties.major, properties.minor


@cache
def _capability_of(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def _reference_why_not(problem: Problem) -> list[str]:
    return []


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cuda", lambda: native.library("cuda"), _cuda_why_not, tile=(64, 64)),
        Backend("triton", lambda: importlib.import_module("fastattn.backends.triton"), _triton_why_not, tile=(64, 64)),
        Backend("cpu", lambda: native.library("cpu"), _cpu_why_not),
        Backend("reference", lambda: importlib.import_module("fastattn.backends.reference"), _reference_why_not),
    )
}


def preference(problem: Problem) -> tuple[str, ...]:
    """The backends that are tried when none is named; the first able one runs.

    For GPU tensors this is the one place that decides between cuda and triton: for each problem, the one that the
    results in bench/results show to be faster comes first. None of a GPU are recorded yet, so cuda comes first.
    """
    if problem.device == "cpu":
        # Not cuda: its emulated kernels take CPU tensors, for tests that name it.
        return "triton", "cpu", "reference"
    return tuple(BACKENDS)


def _failure(backend: str) -> str | None:
    try:
        native.library(backend)
    except ImportError as error:
        return str(error)
    return None


# Why a compiled library cannot be loaded; None when it can. Tried once, at import: what torch.compile traces must be
# plain data.
NATIVE_FAILURE: str | None = _failure("cpu")
CUDA_FAILURE: str | None = _failure("cuda")
# Whether the CPU kernels multiply pairs of bfloat16 numbers at the instruction level in use.
CPU_MULTIPLIES_PAIRS: bool = NATIVE_FAILURE is None and native.library("cpu").info()["level"] == "avx512bf16"
CUDA_EMULATED: bool = CUDA_FAILURE is None and isinstance(native.library("cuda"), native.EmulatedCudaLibrary)
CUDA_ARCHITECTURES: tuple[int, ...] = () if CUDA_FAILURE else tuple(native.library("cuda").info()["architectures"])
# Triton itself is imported when a kernel first runs: it takes longer than all of fastattn.
TRITON_FAILURE: str | None = None if importlib.util.find_spec("triton") else "Triton is not installed"
TRITON_INTERPRETED: bool = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def load(name: str) -> Any:
    """The module or library with the functions of a backend."""
    return BACKENDS[name].load()


def _check_name(name: object) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


# The backend asked for by `use_backend`, or by the environment at import. A plain global, as torch's own switches are:
# torch.compile guards on it, so that a compiled function is compiled anew when it changes.
_requested: str | None = os.environ.get("FASTATTN_BACKEND") or None


class use_backend:
    """Context manager: every operation inside runs on the named backend, or raises with every reason why it cannot.

    name: "reference", "cpu", "cuda" or "triton". It holds for the whole process, all threads included. An explicit
    `backend=` argument wins over it. The environment variable FASTATTN_BACKEND, read when fastattn is imported, does
    the same for a whole run.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name(name)
        self._previous: list[str | None] = []

    def __enter__(self) -> use_backend:
        global _requested
        self._previous.append(_requested)
        _requested = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous.pop()


def select(problem: Problem, backend: str | None = None) -> str:
    """The name of the backend that runs `problem`.

    backend: the name that the caller gave; without one, that of `use_backend` or FASTATTN_BACKEND; without one, the
    first able backend. ValueError for an unknown name; RuntimeError with every reason when a named one cannot run.
    """
    name = _requested if backend is None else backend
    if name is None:
        return _first_able(problem)
    reasons = BACKENDS[_check_name(name)].why_not(problem)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot run this {problem.operation}: {'; '.join(reasons)}")
    return name


def has_kernel(problem: Problem) -> bool:
    """Whether `select`, with no backend named, answers with a kernel and not with the reference, and does not raise."""
    names = preference(problem) if _requested is None else (_check_name(_requested),)
    return any(name != "reference" and not BACKENDS[name].why_not(problem) for name in names)


def chooses_cpu() -> bool:
    """Whether CPU tensors, with no backend named, go to the CPU kernels if they can run them. Cheaper than `select`."""
    return _requested is None and NATIVE_FAILURE is None and not TRITON_INTERPRETED


def _first_able(problem: Problem) -> str:
    for name in preference(problem):
        if not BACKENDS[name].why_not(problem):
            return name
    raise RuntimeError(f"no backend can run this {problem.operation}: {explain_problem(problem)}")


@dataclass(frozen=True)
class Explanation:
    """Which backend runs, and why the others do not. `str()` gives it as text.

    chosen: the name, or None when the backend that was asked for cannot run.
    reasons: for each backend, every reason why it cannot run this problem; empty when it can.
    notes: what the chosen one has to do beyond computing, such as copying an input.
    """

    problem: Problem
    chosen: str | None
    requested: str | None
    reasons: dict[str, list[str]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "asked for" if self.requested else "the first able one"
        lines = [f"{self.problem.operation}: {self.chosen or 'no backend'}" + (f" ({kind})" if self.chosen else "")]
        for name, reasons in self.reasons.items():
            if name == self.chosen:
                continue
            if reasons:
                text = "; ".join(reasons)
            elif name not in preference(self.problem):
                text = "able, but only when it is named"
            elif self.requested:
                text = f"able, but {self.requested!r} was asked for"
            else:
                text = f"able, but {self.chosen!r} comes first"
            lines.append(f"  {name}: {text}")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)


def explain_problem(problem: Problem, backend: str | None = None, notes: tuple[str, ...] = ()) -> Explanation:
    """What `select` would answer, with the reasons; an unknown name raises, a backend that cannot run does not."""
    requested = _requested if backend is None else backend
    reasons = {name: record.why_not(problem) for name, record in BACKENDS.items()}
    chosen: str | None
    if requested is None:
        chosen = next((name for name in preference(problem) if not reasons[name]), None)
    else:
        chosen = _check_name(requested)
        if reasons[chosen]:
            chosen = None
    return Explanation(problem, chosen, requested, reasons, notes)
