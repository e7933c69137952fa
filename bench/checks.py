"""Every contender is held against a float64 evaluation before any speed is printed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from fastattn.bench.contenders import (
    Bound,
    bind_additive,
    bind_head,
    bind_weights,
    eager_additive,
    eager_head,
    eager_weights,
    make_mha,
    mha_forward,
    mha_leaves,
)
from fastattn.bench.models import bind_model, make_model, model_inputs, real_positions, row_length
from fastattn.bench.workloads import (
    DROPOUT_P,
    AdditiveCase,
    AdditiveInputs,
    AttentionCase,
    Case,
    HeadCase,
    HeadInputs,
    LossCase,
    MhaCase,
    ModelCase,
    WeightsCase,
    WeightsInputs,
    additive_inputs,
    attention_inputs,
    head_inputs,
    loss_inputs,
    mha_inputs,
    torch_dtype,
    weights_inputs,
)
from fastattn.testing import cases as problems
from fastattn.testing.adapters import multiplies_pairs
from fastattn.testing.compare import compare
from fastattn.testing.oracle import arithmetic_dtype, attention_oracle, loss_oracle, unit_roundoff

MAX_CHECKED_PAIRS = 1 << 22  # (b, h, i, j) evaluated in float64; the check looks at as many heads as that allows
MAX_HEAD_PAIRS = 1 << 22  # a problem with more (i, j) in a head is evaluated at a shorter length: so many tokens
CHECKED_LENGTH = 1024
CHECKED_ADDITIVE_LENGTH = 128  # whose float64 features take 32 MB for each 256 of them
DROPOUT_SIGMAS = 6.0
VANISHING = 1e-10  # of the output


@dataclass(frozen=True)
class Verdict:
    """``errors``: largest error of each quantity over its largest magnitude. ``message`` is empty when all pass."""

    errors: dict[str, float] = field(default_factory=dict)
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.message

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=math.nan)


class Check:
    """The float64 answer to one case; judges what contenders computed.

    The criterion is that of `fastattn.testing.compare`: at most 1.5 times the error that torch's own operation makes on
    the same inputs in the same dtype, plus the rounding noise of one evaluation. Large problems are judged on some of
    their heads, over the whole batch, and those too large for that as `checked_form`. Dropout is judged switched off,
    and by the mean of what it leaves.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.heads: list[int] | None = None
        self.peer: dict[str, Tensor] | None = None
        self.element_noise: dict[str, Tensor] = {}  # of single elements, where that is more
        if isinstance(case, AttentionCase):
            self._attention(case)
        elif isinstance(case, WeightsCase):
            self._by_hand(bind_weights(case, _double(weights_inputs(case)), eager_weights))
        elif isinstance(case, AdditiveCase):
            # A score adds up as many terms as there are features.
            terms = math.sqrt(case.features)
            self._by_hand(bind_additive(case, _double(additive_inputs(case)), eager_additive), terms)
        elif isinstance(case, HeadCase):
            # A prediction adds up as many terms as it has inputs, a gradient of the weight one from each token.
            terms = math.sqrt(max(case.width, case.batch * case.tokens))
            self._by_hand(bind_head(case, _double(head_inputs(case)), eager_head), terms)
        elif isinstance(case, MhaCase):
            self._mha(case)
        elif isinstance(case, ModelCase):
            self._model(case)
        else:
            self._loss(case)

    def set_peer(self, results: dict[str, Tensor]) -> None:
        """Takes torch's results, whose error sets the bound of the others."""
        self.peer = self._selected(results)

    def judge(self, results: dict[str, Tensor], by_torch: bool = False) -> Verdict:
        """Compares the results of a contender. torch's own eager code rounds every intermediate to the tensors' dtype,
        so the noise it is allowed (``by_torch``) is that of arithmetic in this dtype."""
        dtype = _computed_dtype(self.case)
        allowance = unit_roundoff(dtype) / unit_roundoff(arithmetic_dtype(dtype)) if by_torch else 1.0
        errors: dict[str, float] = {}
        messages = []
        selected = self._selected(results)
        for name, expected in self.values.items():
            if name not in selected:
                messages.append(f"{name} is missing")
                continue
            peer = None if self.peer is None else self.peer[name]
            noise = self.noise[name] * allowance
            element_noise = self.element_noise[name].maximum(noise) if name in self.element_noise else None
            comparison = compare(name, selected[name], expected, noise, peer, element_noise=element_noise)
            largest = float(expected.abs().max()) if expected.numel() else 0.0
            errors[name] = comparison.max_error / largest if largest else comparison.max_error
            if not comparison.ok:
                messages.append(f"{name}: {comparison.message}")
        return Verdict(errors, "; ".join(messages))

    def _selected(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is judged: of attention some heads, of a model's output the positions of tokens."""
        if isinstance(self.case, ModelCase):
            return real_positions(self.case, results)
        if self.heads is None:
            return results
        assert isinstance(self.case, AttentionCase)
        groups = self.case.heads_q // self.case.heads_kv
        per_query = [h * groups + g for h in self.heads for g in range(groups)]
        picked = {}
        for name, tensor in results.items():
            if tensor.dim() != 4:  # a wrong rank is for the comparison to tell
                picked[name] = tensor
            else:
                heads = self.heads if name in ("dk", "dv") else per_query
                picked[name] = tensor[:, [h for h in heads if h < tensor.shape[1]]].detach()
        return picked

    def _attention(self, case: AttentionCase) -> None:
        x = attention_inputs(case)
        groups = case.heads_q // case.heads_kv
        pairs = max(1, case.batch * groups * case.len_q * case.len_k)
        count = max(1, min(case.heads_kv, MAX_CHECKED_PAIRS // pairs))
        self.heads = sorted({round(n * (case.heads_kv - 1) / max(1, count - 1)) for n in range(count)})
        tensors = {"dq": x.query, "dk": x.key, "dv": x.value, "out": x.grad_out}
        if x.bias is not None:
            tensors["dbias"] = x.bias
        picked = self._selected(tensors)
        problem = problems.Problem(
            case=problems.Case(
                seed=0,
                index=0,
                batch=case.batch,
                heads_q=len(self.heads) * groups,
                heads_kv=len(self.heads),
                len_q=case.len_q,
                len_k=case.len_k,
                dim_qk=case.dim,
                dim_v=case.dim,
                dtype=torch_dtype(case.dtype),
            ),
            query=picked["dq"],
            key=picked["dk"],
            value=picked["dv"],
            bias=picked.get("dbias"),
            terms=(),
            grad_out=picked["out"],
            grad_lse=None,
        )
        keep = torch.ones(1, 1, 1, 1, dtype=torch.bool) if x.make_keep is None else x.make_keep().cpu()
        allowed = keep.expand(case.batch, len(self.heads) * groups, case.len_q, case.len_k)
        rounds = x.query.device.type == "cpu" and multiplies_pairs(problem.case)
        expected = attention_oracle(problem, allowed, keep=None, gradients=case.backward, pairs=rounds)
        names = ["out"] + ([n for n in ("dq", "dk", "dv", "dbias") if n in expected.values] if case.backward else [])
        self.values = {name: expected.values[name] for name in names}
        self.noise = {name: expected.noise[name] for name in names}
        self.element_noise = expected.element_noise

    def _by_hand(self, bound: Bound, roundings: float = 1.0) -> None:
        """The float64 results of an operation written by hand. roundings: how many add up in an element."""
        self.values = bound.results()
        self.noise = {name: roundings * noise for name, noise in self._plain_noise(self.values).items()}

    def _mha(self, case: MhaCase) -> None:
        inputs = mha_inputs(case)
        module = make_mha(case).double().cpu()
        inputs.x = inputs.x.detach().double().cpu().requires_grad_(case.backward)
        if inputs.memory is not None:
            inputs.memory = inputs.memory.detach().double().cpu().requires_grad_(case.backward)
        inputs.grad_out = inputs.grad_out.double().cpu()
        for mask in ("key_padding_mask", "attn_mask"):
            tensor = getattr(inputs, mask)
            setattr(inputs, mask, None if tensor is None else tensor.cpu())
        leaves = mha_leaves(module, case, inputs)
        self.values = Bound(mha_forward(module, case, inputs), leaves, inputs.grad_out).results()
        self.noise = self._plain_noise(self.values)

    def _model(self, case: ModelCase) -> None:
        # Norms and rotary embeddings of transformers compute in float32 whatever the model's dtype, here too.
        model = make_model(case, "eager" if case.attentions else "sdpa").double().cpu()
        inputs = {
            name: x.cpu().double() if x.is_floating_point() else x.cpu() for name, x in model_inputs(case).items()
        }
        self.values = self._selected(bind_model(case, model, inputs).results())
        # A gradient that is 0 but for rounding, as that of a key's bias, says nothing.
        sizes = {name: float(value.square().mean().sqrt()) for name, value in self.values.items()}
        self.values = {name: value for name, value in self.values.items() if sizes[name] > VANISHING * sizes["out"]}
        # Roundings add up from block to block, and back; and since a row of the scores' gradient sums to nothing, what
        # it leaves of the keys is smaller than its terms by the root of their number.
        roundings = 0.0 if case.new_tokens else 2.0 * case.layers
        if case.backward:
            roundings *= 2 * math.sqrt(row_length(case))
        self.noise = {name: roundings * noise for name, noise in self._plain_noise(self.values).items()}

    def _plain_noise(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """A few roundings of an element, and of a typical one where it cancels to less."""
        u = unit_roundoff(_computed_dtype(self.case))
        return {name: 4 * u * (value.abs() + value.square().mean().sqrt()) for name, value in values.items()}

    def _loss(self, case: LossCase) -> None:
        x = loss_inputs(case)
        grid = case.size // case.patch
        problem = problems.LossCase(
            seed=0,
            index=0,
            layout="image",
            shape=(case.batch, case.channels, case.size, case.size),
            mask_shape=(case.batch, grid, grid),
            patch_size=case.patch,
            kind="l2" if case.kind == "mse" else case.kind,
            dtype=torch_dtype(case.dtype),
        )
        prediction, target, mask = x.prediction.detach().cpu(), x.target.cpu(), x.mask.cpu()
        expected = loss_oracle(problem, prediction, target, mask, eps=0.0, upstream=torch.ones(()))
        names = {"out": "loss"} | ({"dinput": "dinput"} if case.backward else {})
        self.values = {name: expected.values[source] for name, source in names.items()}
        self.noise = {name: expected.noise[source] for name, source in names.items()}


Inputs = TypeVar("Inputs", WeightsInputs, AdditiveInputs, HeadInputs)


def _double(x: Inputs) -> Inputs:
    """The inputs in float64 on the CPU, each a leaf where it was one."""
    changed = {}
    for name, tensor in vars(x).items():
        copied = tensor.detach().cpu()
        changed[name] = copied.double().requires_grad_(tensor.requires_grad) if copied.is_floating_point() else copied
    return replace(x, **changed)


def checked_form(case: Case) -> Case:
    """What is checked in place of a case: it without dropout, and shorter where it has too many pairs to evaluate."""
    if isinstance(case, AdditiveCase):
        return replace(case, length=min(case.length, CHECKED_ADDITIVE_LENGTH))
    if isinstance(case, MhaCase) and case.length > 2 * CHECKED_LENGTH:
        return replace(case, length=CHECKED_LENGTH)
    if not isinstance(case, AttentionCase):
        return case
    if case.mask == "dropout":
        case = replace(case, mask="dense")
    if case.len_q * case.len_k > MAX_HEAD_PAIRS:
        case = replace(case, len_q=min(case.len_q, CHECKED_LENGTH), len_k=min(case.len_k, CHECKED_LENGTH))
    return case


def _computed_dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if isinstance(case, MhaCase) and case.autocast else torch_dtype(case.dtype)


def check_dropout(out: Tensor) -> str:
    """Judges the output of dropout over values of 1: each row is a sum of probabilities of which dropout took some and
    enlarged the rest, so the mean over the rows stays 1. Returns what is wrong, or an empty string."""
    rows = out.detach().double().mean(-1).flatten()
    mean, spread = float(rows.mean()), float(rows.std())
    if not math.isfinite(mean) or spread == 0.0:
        return f"dropout {DROPOUT_P} left every row sum at {mean:.4g}: nothing was dropped"
    allowed = DROPOUT_SIGMAS * spread / math.sqrt(rows.numel())
    if abs(mean - 1) > allowed:
        return f"the mean row sum under dropout is {mean:.5f}, should be 1 within {allowed:.5f}"
    return ""
