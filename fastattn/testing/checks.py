"""The checks of one case. Every check has a name that the report prints:

out, dq, dk, dv,      shape, dtype and values by contract 11 (`fastattn.testing.compare`); the bias gradient has the
dbias                 bias's own shape
lse                   natural log, float32
empty rows            out 0, lse -inf, dq 0 for queries that may attend to nothing; NaN nowhere
leak                  NaN and Inf in keys and values that no query may attend to change no bit of any result
determinism           a second run gives the same bits, forward and backward
uninitialised memory  what `torch.empty` happens to hold changes no bit
out of bounds         what lies around the inputs in memory changes no bit
inputs                the inputs and the memory around them are not written
dropout               for functions that drop by a generator of their own: the rate is the one asked for
sum of weights        rows of attention weights sum to 1, or to 0 when empty
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastattn.testing.adapters import (
    REFUSALS,
    TENSOR_CORE_BACKENDS,
    Target,
    Unsupported,
    level_multiplies_pairs,
    mask_of,
)
from fastattn.testing.cases import (
    AdditiveCase,
    Case,
    LinearLossCase,
    LossCase,
    Problem,
    WeightsCase,
    build_problem,
    carve,
    dtype_name,
)
from fastattn.testing.compare import (
    additive_peer,
    compare,
    eager_linear_loss_peer,
    eager_loss_peer,
    open_empty_rows,
    sdpa_peer,
    weights_peer,
)
from fastattn.testing.oracle import (
    Expected,
    additive_oracle,
    allowed_in,
    attended_keys,
    attention_oracle,
    counted_elements,
    dropout_keep,
    linear_loss_oracle,
    loss_oracle,
    weights_oracle,
)

PASS, FAIL, NOTE, UNSUPPORTED = "pass", "fail", "note", "unsupported"
NAN = float("nan")
OTHER_GUARD = 3.0e4  # finite in every dtype, and far from any input

# Recovering which elements a foreign function dropped takes one forward run for each Dv keys.
MAX_DROPOUT_PROBES = 16
UNIT = 1024.0  # the value that shows a weight; large, so that float16 weights too small to store are seen


@dataclass(frozen=True)
class Check:
    """The outcome of one check. `ratio` is the largest error over its bound, for the numerical ones."""

    name: str
    status: str
    detail: str = ""
    ratio: float | None = None


@dataclass
class Outcome:
    """What a run returned: values by name (out, lse, dq, ...)."""

    values: dict[str, Tensor] = field(default_factory=dict)
    backward_refusal: str = ""


# ------------------------------------------------------------------------------------------------------------ poisoning


@contextlib.contextmanager
def poisoned_buffers(fill: float = NAN) -> Iterator[None]:
    """While it is active, memory that Python code gets uninitialised from torch (empty, empty_like, empty_strided,
    new_empty, ...) holds `fill`: NaN, or any number. Integers hold their maximum for NaN, bytes 0xff (NaN in every
    float format, should they be a workspace), bools True. What compiled code allocates for itself is not seen."""

    def poison(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                return tensor.fill_(fill)
            if tensor.dtype == torch.bool:
                return tensor.fill_(fill != fill)
            if tensor.dtype == torch.uint8:
                return tensor.fill_(0xFF if fill != fill else 1)
            return tensor.fill_(torch.iinfo(tensor.dtype).max if fill != fill else 1)

    def poisoning(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Any:
            return poison(allocate(*args, **kwargs))

        return allocate_poisoned

    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
            stack.enter_context(mock.patch.object(torch, name, poisoning(getattr(torch, name))))
        for name in ("new_empty", "new_empty_strided"):
            stack.enter_context(mock.patch.object(Tensor, name, poisoning(getattr(Tensor, name))))
        yield


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality: NaN equals the same NaN, 0.0 differs from -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


# ------------------------------------------------------------------------------------------------------------ attention


def check_attention(
    target: Target, case: Case, forward_only: bool = False, strict: bool = True, device: str = "cpu"
) -> list[Check]:
    """Every check of `target` on one case. Without `strict`, an SDPA-like function that breaks the rules on empty rows
    or leaks gets a note and not a failure: SDPA promises neither."""
    if not target.gives_lse:
        case = replace(case, lse_grad=False)  # the rest of the problem can be judged all the same
    run = _AttentionRun(target, case, forward_only, strict, device)
    try:
        return run.checks()
    except Unsupported as refusal:
        return [Check("run", UNSUPPORTED, str(refusal))]


class _AttentionRun:
    def __init__(self, target: Target, case: Case, forward_only: bool, strict: bool, device: str) -> None:
        self.target, self.case, self.gradients, self.device = target, case, not forward_only, device
        # SDPA has no rule for rows that may attend to nothing, so its signature is judged with those rows opened to
        # every key, and the rule itself on a line of its own.
        self.open_rows = target.signature == "sdpa"
        self.broken_promise = FAIL if strict or not self.open_rows else NOTE
        self.seed = case.seed * 1_000_003 + case.index

    def checks(self) -> list[Check]:
        case = self.case
        problem = build_problem(case, NAN, self.device)
        allowed = allowed_in(problem)
        before = [buffer.clone() for buffer in problem.buffers]
        with poisoned_buffers(NAN):
            first = self._run(problem)
        inputs = self._check_inputs(problem, before)
        keep, dropout = self._dropout(problem, allowed)
        checks = self._check_values(problem, allowed, keep, first)
        checks += dropout
        checks.append(inputs)
        checks.append(self._check_repeatable(first))
        checks += self._check_empty_rows(problem, allowed, first)
        checks += self._check_leak(allowed, first)
        return checks

    def _run(self, problem: Problem, open_rows: bool | None = None, gradients: bool | None = None) -> Outcome:
        """One forward and backward run. A refusal of a foreign function raises Unsupported."""
        target, opened = self.target, self.open_rows if open_rows is None else open_rows
        wants_gradients = self.gradients if gradients is None else gradients
        torch.manual_seed(self.seed)
        leaves = {"dq": problem.query, "dk": problem.key, "dv": problem.value}
        if problem.bias is not None:
            leaves["dbias"] = problem.bias
        leaves = {name: tensor.detach().requires_grad_(wants_gradients) for name, tensor in leaves.items()}
        try:
            out, lse = target.call(problem, leaves["dq"], leaves["dk"], leaves["dv"], leaves.get("dbias"), opened)
        except REFUSALS as error:
            if target.own:
                raise
            raise Unsupported(f"{type(error).__name__}: {_first_line(error)}") from error
        outcome = Outcome({"out": out.detach()} if lse is None else {"out": out.detach(), "lse": lse.detach()})
        if not wants_gradients:
            return outcome
        if not out.requires_grad:
            outcome.backward_refusal = "its output has no gradient"
            return outcome
        grad_out = problem.grad_out
        if opened:
            grad_out = grad_out.masked_fill(self._empty_rows(problem).to(grad_out.device).unsqueeze(-1), 0.0)
        outputs, upstream = [out], [grad_out]
        if problem.grad_lse is not None and lse is not None:
            if not lse.requires_grad and not target.own:
                outcome.backward_refusal = "its lse has no gradient"
                return outcome
            outputs.append(lse)
            upstream.append(problem.grad_lse.to(lse.dtype))
        try:
            computed = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
        except REFUSALS as error:
            if target.own:
                raise
            outcome.backward_refusal = f"backward: {type(error).__name__}: {_first_line(error)}"
            return outcome
        for (name, leaf), gradient in zip(leaves.items(), computed, strict=True):
            outcome.values[name] = torch.zeros_like(leaf) if gradient is None else gradient.detach()
        return outcome

    def _empty_rows(self, problem: Problem) -> Tensor:
        return open_empty_rows(allowed_in(problem), None if problem.bias is None else problem.bias.cpu(), plain=False)[
            0
        ]

    # -- dropout

    def _dropout(self, problem: Problem, allowed: Tensor) -> tuple[Tensor | None, list[Check]]:
        """Which elements were dropped. Ours follow Philox with the seed that torch's generator gave; a foreign
        function is asked, by values that are unit vectors."""
        case = self.case
        if not case.dropout_p:
            return None, []
        if self.target.own:
            torch.manual_seed(self.seed)
            seed = int(torch.randint(2**63 - 1, (), device=self.device, dtype=torch.int64))
            return dropout_keep(case.batch, case.heads_q, case.len_q, case.len_k, case.dropout_p, seed), []
        probes = -(-case.len_k // case.dim_v)
        if probes > MAX_DROPOUT_PROBES or not allowed.numel():
            raise Unsupported("dropout of a foreign function is judged only where S <= 16 Dv")
        weights = torch.zeros(allowed.shape, dtype=torch.float64)
        plain = torch.zeros_like(weights)
        undropped = replace(case, dropout_p=0.0)
        for probe in range(probes):
            first = probe * case.dim_v
            width = min(case.dim_v, case.len_k - first)
            units = torch.zeros_like(problem.value)
            units[:, :, range(first, first + width), range(width)] = UNIT
            shown = replace(problem, value=units, grad_lse=None)
            weights[..., first : first + width] = (
                self._run(shown, gradients=False).values["out"].cpu().double()[..., :width]
            )
            shown = replace(shown, case=undropped)
            plain[..., first : first + width] = (
                self._run(shown, gradients=False).values["out"].cpu().double()[..., :width]
            )
        # An element that underflows says nothing, and counts for nothing in any result.
        visible = plain > 0
        keep = (weights != 0) | ~visible
        count = int(visible.sum())
        rate = float((visible & ~keep).sum()) / max(count, 1)
        # Six standard deviations of the binomial.
        tolerance = 6.0 * math.sqrt(case.dropout_p * (1.0 - case.dropout_p) / max(count, 1))
        ok = abs(rate - case.dropout_p) <= tolerance
        detail = f"{rate:.4f} of {count} elements were dropped, {case.dropout_p} +- {tolerance:.4f} expected"
        return keep, [Check("dropout", PASS if ok else FAIL, "" if ok else detail)]

    # -- values

    def _check_values(self, problem: Problem, allowed: Tensor, keep: Tensor | None, seen: Outcome) -> list[Check]:
        case = self.case
        gradients = self.gradients and not seen.backward_refusal
        expected = attention_oracle(
            problem, allowed, keep, gradients, self.target.tensor_cores, self.target.multiplies_pairs(case)
        )
        peer = sdpa_peer(problem, allowed, keep, gradients, self.target.tensor_cores) if allowed.numel() else {}
        select = {"out": ~self._empty_rows(problem)} if self.open_rows else {}
        dtypes = {"lse": torch.float32}
        if problem.bias is not None:
            dtypes["dbias"] = problem.bias.dtype
        if not self.open_rows and "out" in peer:
            # The peer's empty rows were opened, ours must be exact there.
            empty = self._empty_rows(problem)
            peer["out"] = peer["out"].masked_fill(empty.unsqueeze(-1), 0.0)
            peer["lse"] = peer["lse"].masked_fill(empty, float("-inf"))
        checks = []
        for name in expected.values:
            if name in seen.values:
                checks.append(
                    _compare(name, seen.values[name], expected, peer, dtypes.get(name, case.dtype), select.get(name))
                )
        if seen.backward_refusal:
            checks.append(Check("gradients", UNSUPPORTED, seen.backward_refusal))
        return checks

    # -- memory

    def _check_inputs(self, problem: Problem, before: list[Tensor]) -> Check:
        written = sum(not same_bits(b, buffer) for b, buffer in zip(before, problem.buffers, strict=True))
        return Check("inputs", FAIL if written else PASS, f"{written} input tensors were written" if written else "")

    def _check_repeatable(self, first: Outcome) -> Check:
        """One run with everything around the data changed. Only when a bit differs are the causes told apart."""
        different = self._differs(first, OTHER_GUARD, 1.0)
        if not different:
            return Check("determinism", PASS)
        if self._differs(first, NAN, NAN):
            return Check("determinism", FAIL, f"two runs on the same inputs differ in {different}")
        if self._differs(first, NAN, 1.0):
            return Check("uninitialised memory", FAIL, f"{different} depends on what torch.empty held")
        return Check("out of bounds", FAIL, f"{different} depends on memory around the inputs")

    def _differs(self, first: Outcome, guard: float, fill: float) -> str:
        problem = build_problem(self.case, guard, self.device)
        with poisoned_buffers(fill):
            again = self._run(problem)
        return _differences(first.values, again.values)

    # -- contracts 3 and 4

    def _check_empty_rows(self, problem: Problem, allowed: Tensor, first: Outcome) -> list[Check]:
        empty = self._empty_rows(problem)
        if not bool(empty.any()):
            return []
        seen = first
        if self.open_rows:
            try:
                seen = self._run(problem, open_rows=False)
            except Unsupported as refusal:
                return [Check("empty rows", self.broken_promise, f"refused: {refusal}")]
        complaints = []
        if bool((seen.values["out"].cpu()[empty] != 0).any()):
            complaints.append(f"out is {_worst(seen.values['out'].cpu()[empty])}, expected 0")
        if "lse" in seen.values and bool((seen.values["lse"].cpu()[empty] != float("-inf")).any()):
            complaints.append(f"lse is {_worst(seen.values['lse'].cpu()[empty])}, expected -inf")
        if "dq" in seen.values and bool((seen.values["dq"].cpu()[empty] != 0).any()):
            complaints.append(f"dq is {_worst(seen.values['dq'].cpu()[empty])}, expected 0")
        for name in ("out", "dq", "dk", "dv", "dbias"):
            if name in seen.values and not bool(torch.isfinite(seen.values[name]).all()):
                complaints.append(f"{name} is not finite")
        return [Check("empty rows", self.broken_promise if complaints else PASS, "; ".join(complaints))]

    def _check_leak(self, allowed: Tensor, first: Outcome) -> list[Check]:
        case = self.case
        problem = build_problem(case, NAN, self.device)
        if self.open_rows:
            allowed = allowed | self._empty_rows(problem).unsqueeze(-1)
        dead = ~attended_keys(allowed, case.heads_kv)  # (B, Hkv, S)
        if case.layout == "expanded":
            dead = dead.all(dim=0, keepdim=True).expand_as(dead)
        if not bool(dead.any()):
            return []
        # NaN and both infinities, in turn; a buffer that batches share is written once for each, with the same values.
        evil = torch.tensor([NAN, float("inf"), float("-inf")], dtype=case.dtype)
        for tensor in (problem.key, problem.value):
            columns = evil[torch.arange(case.len_k * tensor.shape[-1]) % 3].view(case.len_k, tensor.shape[-1])
            base = tensor[:1] if case.layout == "expanded" and case.batch > 1 else tensor
            where = (dead[: base.shape[0]]).unsqueeze(-1).to(tensor.device)
            base.copy_(torch.where(where, columns.to(tensor.device), base))
        try:
            with poisoned_buffers(NAN):
                seen = self._run(problem)
        except Unsupported as refusal:
            return [Check("leak", self.broken_promise, f"refused: {refusal}")]
        different = _differences(first.values, seen.values)
        detail = f"NaN and Inf in keys that no query may attend to changed {different}"
        return [Check("leak", self.broken_promise if different else PASS, detail if different else "")]


def _compare(
    name: str,
    seen: Tensor,
    expected: Expected,
    peer: dict[str, Tensor],
    dtype: torch.dtype,
    select: Tensor | None = None,
) -> Check:
    if seen.dtype != dtype:
        return Check(name, FAIL, f"dtype {dtype_name(seen.dtype)}, expected {dtype_name(dtype)}")
    result = compare(
        name,
        seen,
        expected.values[name],
        expected.noise[name],
        peer.get(name),
        select,
        expected.element_noise.get(name),
    )
    return Check(name, PASS if result.ok else FAIL, result.message, result.ratio)


def _differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    return ", ".join(name for name in a if name not in b or not same_bits(a[name], b[name]))


def _worst(values: Tensor) -> float:
    flat = values.flatten().float()
    return float(flat[int(flat.nan_to_num(math.inf, math.inf, math.inf).abs().argmax())])


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else "(no message)"


# -------------------------------------------------------------------------------------------------------------- weights


def check_weights(backend: str, weights_case: WeightsCase, device: str = "cpu") -> list[Check]:
    """attention_weights of one of our backends, forward and backward."""
    attention_weights = importlib.import_module("fastattn").attention_weights
    case = weights_case.attention
    problem = build_problem(case, NAN, device)
    allowed = allowed_in(problem)
    generator = torch.Generator().manual_seed(case.index)
    shape = (case.batch, case.len_q, case.len_k) if weights_case.average_heads else tuple(allowed.shape)
    grad_weights = torch.randn(shape, generator=generator).to(case.dtype).to(device)
    keep, dropout_seed = None, None
    if case.dropout_p:
        dropout_seed = torch.tensor(2**62 + case.index * 2**33 + 12345, device=device)
        keep = dropout_keep(case.batch, case.heads_q, case.len_q, case.len_k, case.dropout_p, int(dropout_seed))
    # The lse that attention returns: float32, rounded.
    lse = attention_oracle(problem, allowed, None, gradients=False).values["lse"].float().to(device)

    def run(fill: float) -> dict[str, Tensor]:
        leaves = {"dq": problem.query, "dk": problem.key, "dlse": lse}
        if problem.bias is not None:
            leaves["dbias"] = problem.bias
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        with poisoned_buffers(fill):
            weights = attention_weights(
                leaves["dq"],
                leaves["dk"],
                leaves["dlse"],
                mask=mask_of(problem.terms) if problem.terms else None,
                bias=leaves.get("dbias"),
                scale=case.scale,
                average_heads=weights_case.average_heads,
                dropout_p=case.dropout_p,
                dropout_seed=dropout_seed,
                backend=backend,
            )
            gradients = torch.autograd.grad(weights, list(leaves.values()), grad_weights)
        return {"weights": weights.detach(), **dict(zip(leaves, gradients, strict=True))}

    before = [buffer.clone() for buffer in problem.buffers]
    seen = run(NAN)
    written = any(not same_bits(b, buffer) for b, buffer in zip(before, problem.buffers, strict=True))
    tensor_cores = backend in TENSOR_CORE_BACKENDS
    expected = weights_oracle(problem, allowed, keep, lse, weights_case.average_heads, grad_weights, tensor_cores)
    dtypes = {"dlse": torch.float32}
    if problem.bias is not None:
        dtypes["dbias"] = problem.bias.dtype
    peer = {}
    if allowed.numel():
        peer = weights_peer(problem, allowed, keep, lse, weights_case.average_heads, grad_weights, tensor_cores)
    checks = [_compare(name, seen[name], expected, peer, dtypes.get(name, case.dtype)) for name in expected.values]
    checks.append(Check("inputs", FAIL if written else PASS, "an input tensor was written" if written else ""))
    different = _differences(seen, run(1.0))
    checks.append(
        Check("determinism", FAIL if different else PASS, f"a second run differs in {different}" if different else "")
    )
    if not case.dropout_p and allowed.numel():
        checks.append(_check_weight_sums(seen["weights"], expected))
    return checks


def _check_weight_sums(weights: Tensor, expected: Expected) -> Check:
    # The oracle's own sums: 1, or the share of heads in which the row is not empty.
    sums = weights.cpu().double().sum(dim=-1)
    error = (sums - expected.values["weights"].sum(dim=-1)).abs()
    bound = 2 * expected.noise["weights"].sum(dim=-1)
    ok = bool((error <= bound).all())
    return Check(
        "sum of weights", PASS if ok else FAIL, "" if ok else f"rows are off by up to {float(error.max()):.3e}"
    )


# ------------------------------------------------------------------------------------------------------------- additive


def check_additive(backend: str, additive_case: AdditiveCase, device: str = "cpu") -> list[Check]:
    """additive_attention of one of our backends, forward and backward."""
    additive_attention = importlib.import_module("fastattn").additive_attention
    case = additive_case.attention
    generator = torch.Generator().manual_seed(case.index)
    weight = torch.randn(case.dim_qk, generator=generator) * 3.0 / case.dim_qk**0.5
    weight = weight.to(torch.float32 if additive_case.weight_float32 else case.dtype)

    def build(guard: float) -> Problem:
        problem = build_problem(case, guard, device)
        for tensor in (problem.query, problem.key):
            # A buffer that batches share is scaled once.
            base = tensor[:1] if tensor.stride(0) == 0 else tensor
            base.mul_(additive_case.spread)
        return problem

    def run(problem: Problem, fill: float) -> dict[str, Tensor]:
        tensors = {"dq": problem.query, "dk": problem.key, "dv": problem.value}
        leaves = {name: tensor.detach().squeeze(1).requires_grad_() for name, tensor in tensors.items()}
        leaves["dw"] = weight.to(device).requires_grad_()
        with poisoned_buffers(fill):
            out, lse = additive_attention(
                *leaves.values(),
                mask=mask_of(problem.terms) if problem.terms else None,
                return_lse=True,
                backend=backend,
            )
            outputs, upstream = [out], [problem.grad_out.squeeze(1)]
            if problem.grad_lse is not None:
                outputs.append(lse)
                upstream.append(problem.grad_lse.squeeze(1))
            gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, gradients, strict=True))}

    problem = build(NAN)
    allowed = allowed_in(problem)
    before = [buffer.clone() for buffer in problem.buffers]
    seen = run(problem, NAN)
    written = any(not same_bits(b, buffer) for b, buffer in zip(before, problem.buffers, strict=True))
    expected = additive_oracle(problem, allowed, weight)
    peer = additive_peer(problem, allowed, weight) if allowed.numel() else {}
    dtypes = {"lse": torch.float32, "dw": weight.dtype}
    checks = [_compare(name, seen[name], expected, peer, dtypes.get(name, case.dtype)) for name in expected.values]
    checks.append(Check("inputs", FAIL if written else PASS, "an input tensor was written" if written else ""))
    different = _differences(seen, run(build(OTHER_GUARD), 1.0))
    checks.append(
        Check("determinism", FAIL if different else PASS, f"a second run differs in {different}" if different else "")
    )
    dead = ~attended_keys(allowed, 1).squeeze(1)  # (B, S)
    if case.layout == "expanded":
        dead = dead.all(dim=0, keepdim=True).expand_as(dead)
    if bool(dead.any()):
        poisoned = build(NAN)
        for tensor in (poisoned.key, poisoned.value):
            base = tensor[:1] if tensor.stride(0) == 0 else tensor
            where = dead[: base.shape[0], None, :, None].to(base.device)
            base.masked_fill_(where, NAN if case.index % 2 else float("inf"))
        different = _differences(seen, run(poisoned, NAN))
        detail = f"NaN or Inf in keys that no query may attend to changed {different}" if different else ""
        checks.append(Check("leak", FAIL if different else PASS, detail))
    return checks


# ----------------------------------------------------------------------------------------------------------------- loss


LOSS_FUNCTIONS = {"l2": "masked_mse_loss", "l1": "masked_l1_loss", "smooth_l1": "masked_smooth_l1_loss"}
LOSS_EPS = 1e-6


def check_loss(backend: str, case: LossCase, device: str = "cpu") -> list[Check]:
    """A masked loss of one of our backends, with its gradients."""
    function = getattr(importlib.import_module("fastattn"), LOSS_FUNCTIONS[case.kind])
    generator = torch.Generator().manual_seed(case.seed * 1_000_003 + case.index)
    input, target = (torch.randn(case.shape, generator=generator).to(case.dtype) for _ in range(2))
    mask = torch.rand(case.mask_shape, generator=generator) < case.density
    upstream_value = torch.randn(case.shape if case.reduction == "none" else (), generator=generator).to(case.dtype)
    if case.index % 2 and case.reduction != "none":
        upstream_value = torch.ones_like(upstream_value)  # as loss.backward() has it

    def run(guard: float, fill: float, hidden: float | None = None) -> tuple[dict[str, Tensor], bool]:
        """`hidden` replaces the elements of input and target that do not count."""
        data = [input, target]
        if hidden is not None:
            counted = counted_elements(case, mask)
            data = [torch.where(counted, x, hidden) for x in data]
        if case.channels_last:
            data = [x.contiguous(memory_format=torch.channels_last) for x in data]
            carved = [(x, x) for x in data]
        else:
            carved = [carve(x, "contiguous", guard) for x in data]
        carved_mask = carve(mask, "contiguous", guard)
        x, t = (view.to(device).detach().requires_grad_() for view, _ in carved)
        before = [buffer.clone() for _, buffer in (*carved, carved_mask)]
        options: dict[str, Any] = {"beta": case.beta} if case.kind == "smooth_l1" else {}
        if case.normalize_target:
            options |= {"normalize_target": True, "eps": LOSS_EPS}
            t = t.detach()
        with poisoned_buffers(fill):
            loss = function(
                x,
                t,
                carved_mask[0].to(device),
                patch_size=case.patch_size,
                reduction=case.reduction,
                backend=backend,
                **options,
            )
            wanted = [x] if case.normalize_target else [x, t]
            gradients = torch.autograd.grad(loss, wanted, upstream_value.to(device).to(loss.dtype))
        written = any(not same_bits(b, buffer) for b, (_, buffer) in zip(before, (*carved, carved_mask), strict=True))
        return {"loss": loss.detach(), **dict(zip(("dinput", "dtarget"), gradients, strict=False))}, written

    seen, written = run(NAN, NAN)
    expected = loss_oracle(case, input, target, mask, LOSS_EPS, upstream_value)
    peer = eager_loss_peer(case, input, target, mask, LOSS_EPS, upstream_value) if input.numel() else {}
    checks = [_compare(name, seen[name], expected, peer, case.dtype) for name in expected.values]
    checks.append(Check("inputs", FAIL if written else PASS, "an input tensor was written" if written else ""))
    again, _ = run(OTHER_GUARD, 1.0)
    different = _differences(seen, again)
    checks.append(
        Check("determinism", FAIL if different else PASS, f"a second run differs in {different}" if different else "")
    )
    # A normalised target needs every element of a counted patch, none of another; as the mask is per patch or per
    # token there, hiding what does not count is fair in every layout.
    if not bool(mask.all()) and mask.numel() and input.numel():
        poisoned, _ = run(NAN, NAN, hidden=NAN)
        different = _differences(seen, poisoned)
        detail = f"NaN in elements that do not count changed {different}" if different else ""
        checks.append(Check("leak", FAIL if different else PASS, detail))
    return checks


def check_linear_loss(backend: str, case: LinearLossCase, device: str = "cpu") -> list[Check]:
    """A prediction head fused with its loss of one of our backends, with its gradients."""
    loss_case = case.loss
    function = getattr(importlib.import_module("fastattn"), f"linear_{LOSS_FUNCTIONS[loss_case.kind]}")
    generator = torch.Generator().manual_seed(loss_case.seed * 1_000_003 + case.index)
    batch, tokens, size = case.tokens
    shapes = (batch, tokens, case.dim_in), (size, case.dim_in), (size,), loss_case.shape
    hidden, weight, bias, target = (torch.randn(shape, generator=generator).to(loss_case.dtype) for shape in shapes)
    weight = weight / case.dim_in**0.5
    mask = torch.rand(loss_case.mask_shape, generator=generator) < loss_case.density
    upstream = torch.ones(()) if case.index % 2 else torch.randn((), generator=generator)
    upstream = upstream.to(loss_case.dtype)
    given = {"hidden": hidden, "weight": weight, **({"bias": bias} if case.bias else {}), "target": target}

    def run(guard: float, fill: float, uncounted: float | None = None) -> tuple[dict[str, Tensor], bool]:
        """`uncounted` replaces hidden and target where they do not count."""
        data = dict(given)
        if uncounted is not None:
            counted = mask.flatten(1).unsqueeze(-1)
            data["hidden"] = torch.where(counted, hidden, uncounted)
            data["target"] = torch.where(counted_elements(loss_case, mask), target, uncounted)
        carved = {name: carve(x, "contiguous", guard) for name, x in data.items()}
        carved_mask = carve(mask, "contiguous", guard)
        buffers = [buffer for _, buffer in (*carved.values(), carved_mask)]
        before = [buffer.clone() for buffer in buffers]
        leaves = {name: view.to(device).detach().requires_grad_() for name, (view, _) in carved.items()}
        options: dict[str, Any] = {"beta": loss_case.beta} if loss_case.kind == "smooth_l1" else {}
        if loss_case.normalize_target:
            options |= {"normalize_target": True, "eps": LOSS_EPS}
            leaves["target"] = leaves["target"].detach()
        with poisoned_buffers(fill):
            loss = function(
                *(leaves["hidden"], leaves["weight"], leaves.get("bias"), leaves["target"], carved_mask[0].to(device)),
                patch_size=loss_case.patch_size,
                reduction=loss_case.reduction,
                backend=backend,
                **options,
            )
            wanted = {name: x for name, x in leaves.items() if x.requires_grad}
            gradients = torch.autograd.grad(loss, list(wanted.values()), upstream.to(device))
        written = any(not same_bits(b, buffer) for b, buffer in zip(before, buffers, strict=True))
        return {"loss": loss.detach(), **{f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}}, written

    seen, written = run(NAN, NAN)
    arguments = case, hidden, weight, bias if case.bias else None, target, mask, LOSS_EPS, upstream
    pairs = backend == "cpu" and level_multiplies_pairs(loss_case.dtype)
    expected = linear_loss_oracle(*arguments, pairs)
    peer = eager_linear_loss_peer(*arguments) if target.numel() else {}
    checks = [_compare(name, seen[name], expected, peer, loss_case.dtype) for name in expected.values]
    checks.append(Check("inputs", FAIL if written else PASS, "an input tensor was written" if written else ""))
    again, _ = run(OTHER_GUARD, 1.0)
    different = _differences(seen, again)
    checks.append(
        Check("determinism", FAIL if different else PASS, f"a second run differs in {different}" if different else "")
    )
    if not bool(mask.all()) and target.numel():
        poisoned, _ = run(NAN, NAN, uncounted=NAN)
        different = _differences(seen, poisoned)
        detail = f"NaN in tokens that do not count changed {different}" if different else ""
        checks.append(Check("leak", FAIL if different else PASS, detail))
    return checks
