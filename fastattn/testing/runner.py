"""`verify`: many random cases against one target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fastattn import dispatch
from fastattn.testing.adapters import Target, foreign_target, own_target
from fastattn.testing.cases import (
    AdditiveCase,
    Case,
    LinearLossCase,
    LossCase,
    WeightsCase,
    dtype_name,
    random_additive_case,
    random_case,
    random_linear_loss_case,
    random_loss_case,
    random_weights_case,
)
from fastattn.testing.checks import (
    FAIL,
    Check,
    check_additive,
    check_attention,
    check_linear_loss,
    check_loss,
    check_weights,
)
from fastattn.testing.report import CaseResult, Report

_Case = Case | WeightsCase | AdditiveCase | LossCase | LinearLossCase
FAMILIES = ("attention", "weights", "additive", "loss", "linear")


def resolve_target(text: str, signature: str | None = None) -> Target:
    """A target from what the user wrote: a backend of ours, or module:function. ValueError when there is none."""
    if ":" in text:
        return foreign_target(text, signature)
    return own_target(text)


def parse_case(text: str) -> tuple[str, int]:
    """``17`` -> ("attention", 17), ``loss:3`` -> ("loss", 3). ValueError otherwise."""
    family, _, number = text.rpartition(":")
    family = family or "attention"
    if family not in FAMILIES or not number.isdigit():
        raise ValueError(f"case must be K, weights:K, additive:K, loss:K or linear:K with K >= 0, got {text!r}")
    return family, int(number)


def verify(
    target: Target | str,
    n: int = 300,
    seed: int = 0,
    *,
    signature: str | None = None,
    forward_only: bool = False,
    dtype: torch.dtype | None = None,
    case: str | None = None,
    loss: bool = True,
    strict: bool | None = None,
    device: str = "cpu",
    small: bool = False,
    progress: Callable[[CaseResult, int], None] | None = None,
) -> Report:
    """Runs `n` random attention problems of `seed` against `target`, and reports.

    target: a `Target`, the name of one of our backends, or "module:function" (see `fastattn.testing.adapters`).
    One of our backends also gets n / 5 problems of attention_weights and n / 5 of additive_attention, if it has that,
    and, unless `loss` is False, n / 2 of the masked losses and n / 5 of the head fused with them, if it has that. case:
    run only this one ("17", "weights:3", "additive:2", "loss:5", "linear:2"). strict: hold a function with SDPA's
    signature to our rules on empty rows and leaks, which SDPA does not promise (the default for ours, and for
    fastattn's signature).
    small: bound the attention problems further, for slow targets such as a kernel in an interpreter.
    progress: called after each case with its result and the number of cases.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if isinstance(target, str):
        target = resolve_target(target, signature)
    report = Report(target.name, target.signature, seed)
    work = [
        (family, in_able_dtype(target, p, device))
        for family, p in _work(target, n, seed, dtype, case, loss, small, device)
    ]
    for family, problem in work:
        started = time.perf_counter()
        checks = _check(family, target, problem, forward_only, strict is not False and (strict or target.own), device)
        seconds = time.perf_counter() - started
        label = str(problem.index) if family == "attention" else f"{family}:{problem.index}"
        command = _command(target, seed, label, forward_only, dtype, strict, device, small)
        result = CaseResult(problem, label, checks, command, seconds)
        report.results.append(result)
        if progress is not None:
            progress(result, len(work))
    return report


def _work(
    target: Target, n: int, seed: int, dtype: torch.dtype | None, case: str | None, loss: bool, small: bool, device: str
) -> Iterator[tuple[str, _Case]]:
    makers: dict[str, Callable[..., _Case]] = {
        "attention": random_case,
        "weights": random_weights_case,
        "additive": random_additive_case,
        "loss": random_loss_case,
        "linear": random_linear_loss_case,
    }
    if case is not None:
        family, index = parse_case(case)
        if family != "attention" and not target.own:
            raise ValueError(f"case {case!r} is for our backends only; {target.name} is an attention function")
        yield family, makers[family](seed, index, dtype, small)
        return
    for index in range(n):
        yield "attention", random_case(seed, index, dtype, small)
    if target.own:
        for index in range(n // 5):
            yield "weights", random_weights_case(seed, index, dtype, small)
        for index in range(n // 5 if _has(target, "additive_attention", device) else 0):
            yield "additive", random_additive_case(seed, index, dtype, small)
        for index in range(n // 2 if loss else 0):
            yield "loss", random_loss_case(seed, index, dtype, small)
        for index in range(n // 5 if loss and _has(target, "linear_masked_loss", device) else 0):
            yield "linear", random_linear_loss_case(seed, index, dtype, small)


def _has(target: Target, operation: str, device: str) -> bool:
    """Whether a backend of ours has the kernels of an operation; not every one has additive attention or the head."""
    if target.name not in dispatch.BACKENDS:
        return False
    return not dispatch.BACKENDS[target.name].why_not(dispatch.Problem(operation, device, torch.float32))


def in_able_dtype(target: Target, problem: _Case, device: str = "cpu") -> _Case:
    """The problem in float32 where a backend of ours has no kernels for its dtype."""
    if not target.own or target.name not in dispatch.BACKENDS:
        return problem
    why_not = dispatch.BACKENDS[target.name].why_not
    if isinstance(problem, LinearLossCase):
        loss = in_able_dtype(target, problem.loss, device)
        assert isinstance(loss, LossCase)
        return replace(problem, loss=loss)
    dtype = problem.attention.dtype if isinstance(problem, (WeightsCase, AdditiveCase)) else problem.dtype
    wanted, other = (dispatch.Problem("attention", device, each) for each in (dtype, torch.float32))
    if not why_not(wanted) or why_not(other):
        return problem
    if isinstance(problem, (WeightsCase, AdditiveCase)):
        return replace(problem, attention=replace(problem.attention, dtype=torch.float32))
    return replace(problem, dtype=torch.float32)


def _check(
    family: str,
    target: Target,
    problem: _Case,
    forward_only: bool,
    strict: bool,
    device: str,
) -> list[Check]:
    try:
        if isinstance(problem, Case):
            strict = strict or target.signature == "fastattn"
            return check_attention(target, problem, forward_only, strict, device)
        if isinstance(problem, WeightsCase):
            return check_weights(target.name, problem, device)
        if isinstance(problem, AdditiveCase):
            return check_additive(target.name, problem, device)
        if isinstance(problem, LinearLossCase):
            return check_linear_loss(target.name, problem, device)
        return check_loss(target.name, problem, device)
    except Exception as error:  # a crash of the target is a finding about this case, and no reason to stop
        return [Check("run", FAIL, f"{type(error).__name__}: {error}")]


def _command(
    target: Target,
    seed: int,
    label: str,
    forward_only: bool,
    dtype: torch.dtype | None,
    strict: bool | None,
    device: str,
    small: bool,
) -> str:
    words = ["fastattn verify", target.name, f"--seed {seed}", f"--case {label}"]
    if ":" in target.name:
        words.append(f"--signature {target.signature}")
    if forward_only:
        words.append("--forward-only")
    if dtype is not None:
        words.append(f"--dtype {dtype_name(dtype)}")
    if strict:
        words.append("--strict")
    if device != "cpu":
        words.append(f"--device {device}")
    if small:
        words.append("--small")
    return " ".join(words)
