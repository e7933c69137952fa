"""Targets of the harness: one of our backends, or anybody's attention function as `module:function`.

Two signatures are understood, told apart by the parameter names (or by `--signature`):

* ``sdpa``: ``f(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)``, as
  ``torch.nn.functional.scaled_dot_product_attention``. Masks arrive as a dense bool tensor (True = may attend), with a
  bias as a float tensor; a plain causal mask now as `is_causal`, now as a tensor.
* ``fastattn``: ``f(query, key, value, *, mask=None, bias=None, dropout_p=0.0, scale=None, return_lse=False)``, as
  ``fastattn.attention``. `mask` is a `fastattn.Mask`.

Parameters other than the three tensors may be missing; a case that needs a missing one is not supported. The same holds
for a case that the function refuses by raising one of `REFUSALS`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.masks import Mask
from fastattn.testing.cases import Case, Problem, Term
from fastattn.testing.compare import open_empty_rows
from fastattn.testing.oracle import allowed_in

SIGNATURES = ("sdpa", "fastattn")
# Backends of ours whose products of 16-bit tensors take 16-bit operands.
TENSOR_CORE_BACKENDS = ("cuda", "triton")
# What a function may raise to say that it does not take a problem.
REFUSALS = (NotImplementedError, ValueError, TypeError, RuntimeError, AssertionError)


class Unsupported(Exception):
    """The target does not take this problem."""


def level_multiplies_pairs(dtype: torch.dtype) -> bool:
    """Whether the CPU kernels multiply pairs of numbers of this dtype at the instruction level in use."""
    return dtype == torch.bfloat16 and dispatch.CPU_MULTIPLIES_PAIRS


def multiplies_pairs(case: Case) -> bool:
    """Whether the CPU kernels multiply pairs of bfloat16 numbers for a problem like this. Decoding does not."""
    return case.len_q > 8 and level_multiplies_pairs(case.dtype)


@dataclass(frozen=True)
class Target:
    """A function under test. `own` is set for our backends: they may refuse nothing, and drop what Philox says.
    `on_ours` tells that a function runs on our kernels, where its module does not."""

    name: str
    function: Callable[..., Any]
    signature: str
    own: bool = False
    on_ours: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def call(
        self, problem: Problem, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, open_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the function; returns out and, where the signature has it, lse. `open_rows` lets rows that may attend
        to nothing see every key (SDPA's signature only)."""
        if self.signature == "sdpa":
            return self._call_sdpa(problem, query, key, value, bias, open_rows), None
        return self._call_fastattn(problem, query, key, value, bias)

    @property
    def tensor_cores(self) -> bool:
        return self.own and self.name in TENSOR_CORE_BACKENDS

    def multiplies_pairs(self, case: Case) -> bool:
        """Whether the problem meets our CPU kernels that multiply pairs of bfloat16 numbers."""
        if self.own:
            return self.name == "cpu" and multiplies_pairs(case)
        ours = self.on_ours or getattr(self.function, "__module__", "").startswith("fastattn.")
        return ours and multiplies_pairs(case)

    @property
    def gives_lse(self) -> bool:
        return self.signature == "fastattn" and "return_lse" in _parameters(self.function)

    def _call_fastattn(
        self, problem: Problem, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        wanted: dict[str, Any] = dict(self.extra)
        if problem.terms:
            wanted["mask"] = mask_of(problem.terms)
        if bias is not None:
            wanted["bias"] = bias
        if problem.case.dropout_p:
            wanted["dropout_p"] = problem.case.dropout_p
        if problem.case.scale is not None:
            wanted["scale"] = problem.case.scale
        if self.gives_lse:
            wanted["return_lse"] = True
        result = self._invoke(query, key, value, wanted)
        if self.gives_lse:
            return result
        return result, None

    def _call_sdpa(
        self, problem: Problem, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, open_rows: bool
    ) -> Tensor:
        case = problem.case
        wanted: dict[str, Any] = {}
        kinds = [(term.spec.kind, term.spec.align) for term in problem.terms]
        # A plain causal mask is given in both of the ways that SDPA takes it, half of the cases each.
        if kinds == [("causal", "top_left")] and bias is None and case.index % 2:
            wanted["is_causal"] = True
        elif open_rows:
            _, attn_mask = open_empty_rows(allowed_in(problem).to(query.device), bias, plain=not problem.terms)
            wanted["attn_mask"] = attn_mask
        else:
            allowed = allowed_in(problem).to(query.device)
            wanted["attn_mask"] = allowed if bias is None else bias.masked_fill(~allowed, float("-inf"))
        if wanted.get("attn_mask") is None:
            wanted.pop("attn_mask", None)
        if case.dropout_p:
            wanted["dropout_p"] = case.dropout_p
        if case.scale is not None:
            wanted["scale"] = case.scale
        if case.heads_q != case.heads_kv:
            wanted["enable_gqa"] = True
        return self._invoke(query, key, value, wanted)

    def _invoke(self, query: Tensor, key: Tensor, value: Tensor, wanted: dict[str, Any]) -> Any:
        accepted = _parameters(self.function)
        missing = [] if accepted == {"**"} else sorted(set(wanted) - accepted - {"**"})
        if missing and "**" not in accepted:
            raise Unsupported(f"it takes no {', '.join(missing)}")
        return self.function(query, key, value, **wanted)


def own_target(backend: str) -> Target:
    """fastattn.attention on one of our backends."""
    # By name, like anybody else's function: the harness sits below the public functions and imports none of them.
    attention = importlib.import_module("fastattn").attention
    return Target(backend, attention, "fastattn", own=True, extra={"backend": backend})


def foreign_target(text: str, signature: str | None = None) -> Target:
    """The function named ``module:function``. ValueError when it cannot be loaded or its signature is not clear."""
    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"target must be a backend or module:function, got {text!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a kernel under work lies in the current directory
    try:
        function: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:  # whatever a module under work raises while it is imported
        raise ValueError(f"target {text!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"target {text!r} is a {type(function).__name__}, not a function")
    return function_target(text, function, signature)


def function_target(name: str, function: Callable[..., Any], signature: str | None = None) -> Target:
    """A target of a function at hand, its signature told by its parameter names."""
    if signature is not None and signature not in SIGNATURES:
        raise ValueError(f"signature must be one of {', '.join(SIGNATURES)}, got {signature!r}")
    return Target(name, function, signature or _detect_signature(name, function))


def mask_of(terms: tuple[Term, ...]) -> Mask:
    """The `fastattn.Mask` of a problem's terms."""
    return reduce(and_, (_mask_of_term(term) for term in terms))


def _mask_of_term(term: Term) -> Mask:
    spec = term.spec
    if spec.kind == "causal":
        return Mask.causal(align=spec.align)
    if spec.kind == "window":
        return Mask.window(spec.left, spec.right, align=spec.align)
    constructor: Callable[..., Mask] = getattr(Mask, spec.kind)
    return constructor(*term.tensors)


def _detect_signature(name: str, function: Callable[..., Any]) -> str:
    names = _parameters(function)
    if "attn_mask" in names or "is_causal" in names:
        return "sdpa"
    if "mask" in names or "bias" in names or "return_lse" in names:
        return "fastattn"
    if names == {"**"}:
        raise ValueError(f"the parameters of {name} cannot be seen: give --signature {' or '.join(SIGNATURES)}")
    return "sdpa"


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names of the parameters; "**" stands for any keyword."""
    if function is torch.nn.functional.scaled_dot_product_attention:  # a builtin without a signature
        return {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {"**"}
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
