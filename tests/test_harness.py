"""The harness itself: it must pass sound functions and catch every planted fault."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.masks import Band, Mask
from fastattn.testing import (
    Case,
    LossCase,
    TermSpec,
    build_problem,
    check_attention,
    check_loss,
    check_weights,
    function_target,
    poisoned_buffers,
    random_cases,
    random_loss_cases,
    random_weights_cases,
    same_bits,
    verify,
)
from fastattn.testing.adapters import Target, mask_of
from fastattn.testing.cases import ALIGNMENTS, DTYPES, LAYOUTS, TERM_KINDS, carve
from fastattn.testing.checks import FAIL, NOTE, PASS, UNSUPPORTED, Check
from fastattn.testing.compare import compare
from fastattn.testing.oracle import (
    allowed_in,
    allowed_pairs,
    arithmetic_dtype,
    attention_oracle,
    dot_size,
    dropout_keep,
    may_attend,
    philox_4x32,
    weights_oracle,
)

SDPA = "torch.nn.functional:scaled_dot_product_attention"


# ----------------------------------------------------------------------------------- a sound function, and its faults


class Attention:
    """A sound attention in torch's operators, with fastattn's signature. Each planted fault overrides one step."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Mask | None = None,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        B, H, L, D = query.shape
        S = key.shape[2]
        query, key, value = self.inputs(query, key, value)
        allowed = torch.ones(B, H, L, S, dtype=torch.bool) if mask is None else self.allowed(mask, B, H, L, S)
        dtype = self.arithmetic(query.dtype)
        dead = ~allowed.view(B, key.shape[1], -1, S).any(dim=2)
        q, k, v = query.to(dtype), self.clear(key, dead).to(dtype), self.clear_value(value, dead).to(dtype)
        k, v = self.repeat_heads(k, H), self.repeat_heads(v, H)
        scores = self.scores(q, k, D**-0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + self.expand_bias(bias, scores.shape).to(dtype)
        p, lse = self.softmax(scores.masked_fill(~allowed, -math.inf))
        if dropout_p:
            p = self.dropout(p, dropout_p)
        out = self.output(p, v).to(query.dtype)
        return (out, self.lse(lse, query.dtype)) if return_lse else out

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value

    def arithmetic(self, dtype: torch.dtype) -> torch.dtype:
        return arithmetic_dtype(dtype)

    def allowed(self, mask: Mask, B: int, H: int, L: int, S: int) -> Tensor:
        return mask.to_dense(B, H, L, S)

    def clear(self, x: Tensor, dead: Tensor) -> Tensor:
        return x.masked_fill(dead.unsqueeze(-1), 0.0)

    def clear_value(self, x: Tensor, dead: Tensor) -> Tensor:
        return self.clear(x, dead)

    def repeat_heads(self, x: Tensor, heads: int) -> Tensor:
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return scale * (q @ k.transpose(-1, -2))

    def expand_bias(self, bias: Tensor, shape: torch.Size) -> Tensor:
        return bias.expand(shape)

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if scores.shape[-1] == 0:
            return scores, scores.sum(dim=-1) - math.inf
        empty = (scores == -math.inf).all(dim=-1, keepdim=True)
        safe = scores.masked_fill(empty, 0.0)
        lse = safe.logsumexp(dim=-1, keepdim=True)
        p = (safe - lse).exp().masked_fill(empty, 0.0)
        return p, lse.masked_fill(empty, -math.inf).squeeze(-1)

    def dropout(self, p: Tensor, dropout_p: float) -> Tensor:
        return p * (torch.rand(p.shape) >= dropout_p) / (1.0 - dropout_p)

    def output(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ v

    def lse(self, lse: Tensor, dtype: torch.dtype) -> Tensor:
        return lse.float()


class _WithBackward(torch.autograd.Function):
    """The inputs unchanged, their gradients through `change(grads) -> grads`."""

    @staticmethod
    def forward(ctx, change, *tensors):
        ctx.change = change
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *ctx.change(grads)


class MaskTransposed(Attention):
    def allowed(self, mask, B, H, L, S):
        keep = super().allowed(mask, B, H, L, S)
        return keep.transpose(-1, -2) if L == S else keep


class MaskPolarityFlipped(Attention):
    def allowed(self, mask, B, H, L, S):
        return ~super().allowed(mask, B, H, L, S)


class CausalOffByOne(Attention):
    def allowed(self, mask, B, H, L, S):
        terms = (replace(t, right=1) if isinstance(t, Band) and t.right == 0 else t for t in mask.terms)
        return Mask(tuple(terms)).to_dense(B, H, L, S)


class WindowStartExcluded(Attention):
    def allowed(self, mask, B, H, L, S):
        terms = (replace(t, left=t.left - 1) if isinstance(t, Band) and t.left < L else t for t in mask.terms)
        return Mask(tuple(terms)).to_dense(B, H, L, S)


class BottomRightTakenForTopLeft(Attention):
    def allowed(self, mask, B, H, L, S):
        terms = (replace(t, align="top_left") if isinstance(t, Band) else t for t in mask.terms)
        return Mask(tuple(terms)).to_dense(B, H, L, S)


class OnlyTheFirstTermOfTheMask(Attention):
    def allowed(self, mask, B, H, L, S):
        return Mask(mask.terms[:1]).to_dense(B, H, L, S)


class ScaleMissing(Attention):
    def scores(self, q, k, scale):
        return super().scores(q, k, 1.0)


class ScaleAppliedTwice(Attention):
    def scores(self, q, k, scale):
        return super().scores(q, k, scale * scale)


class DqWithoutScale(Attention):
    def inputs(self, query, key, value):
        (query,) = _WithBackward.apply(lambda grads: [grads[0] * query.shape[-1] ** 0.5], query)
        return query, key, value


class BaseTwoLse(Attention):
    def lse(self, lse, dtype):
        return super().lse(lse / math.log(2.0), dtype)


class LseInTheDtypeOfTheQuery(Attention):
    def lse(self, lse, dtype):
        return lse.to(dtype)


class LseGradientForgotten(Attention):
    def lse(self, lse, dtype):
        (lse,) = _WithBackward.apply(lambda grads: [torch.zeros_like(grads[0])], lse)
        return super().lse(lse, dtype)


class DropoutNotRescaled(Attention):
    def dropout(self, p, dropout_p):
        return p * (torch.rand(p.shape) >= dropout_p)


class DropoutKeepsWhatItShouldDrop(Attention):
    def dropout(self, p, dropout_p):
        return p * (torch.rand(p.shape) < dropout_p) / (1.0 - dropout_p)


class BiasGradientNotReduced(Attention):
    """The gradient of one of the elements that share a bias, not their sum."""

    def expand_bias(self, bias, shape):
        full = bias.view((1,) * (4 - bias.dim()) + tuple(bias.shape))
        first = tuple(slice(0, 1) if size == 1 else slice(None) for size in full.shape)

        def unreduced(grads):
            return [grads[0][first].reshape(bias.shape)]

        class Expand(torch.autograd.Function):
            @staticmethod
            def forward(ctx, bias):
                return bias.expand(shape).clone()

            @staticmethod
            def backward(ctx, grad):
                return unreduced([grad])[0]

        return Expand.apply(bias)


class BiasGradientMissing(Attention):
    def expand_bias(self, bias, shape):
        return super().expand_bias(bias.detach(), shape)


class NanOnAnEmptyRow(Attention):
    def softmax(self, scores):
        return torch.softmax(scores, dim=-1), scores.logsumexp(dim=-1)


class MeanOfValuesOnAnEmptyRow(Attention):
    def softmax(self, scores):
        p, lse = super().softmax(scores)
        return p.masked_fill((lse == -math.inf).unsqueeze(-1), 1.0 / max(scores.shape[-1], 1)), lse


class KeyTileDropped(Attention):
    """The second tile of 64 keys is skipped."""

    def scores(self, q, k, scale):
        scores = super().scores(q, k, scale).clone()
        if k.shape[2] > 128:
            scores[..., 64:128] = -math.inf
        return scores


class TailKeysIgnored(Attention):
    """Keys beyond the last multiple of 64 are skipped."""

    def scores(self, q, k, scale):
        scores = super().scores(q, k, scale).clone()
        if k.shape[2] > 64:
            scores[..., k.shape[2] // 64 * 64 :] = -math.inf
        return scores


class DkAndDvSwapped(Attention):
    def inputs(self, query, key, value):
        if key.shape == value.shape:
            key, value = _WithBackward.apply(lambda grads: grads[::-1], key, value)
        return query, key, value


class NanLeaksFromMaskedValues(Attention):
    def clear_value(self, x, dead):
        return x


class NanLeaksFromMaskedKeys(Attention):
    """The masked scores are overwritten, and so the output is fine: NaN comes back through dq = ds @ k with ds = 0."""

    def clear(self, x, dead):
        return x

    def clear_value(self, x, dead):
        return super().clear(x, dead)


class WrongKvHead(Attention):
    def repeat_heads(self, x, heads):
        return x.repeat(1, heads // x.shape[1], 1, 1)


class HalfPrecisionAccumulation(Attention):
    def output(self, p, v):
        half = torch.bfloat16
        return (p.to(half) @ v.to(half)).to(v.dtype) if p.dtype == torch.float32 else p @ v


class ArithmeticInTheStorageDtype(Attention):
    def arithmetic(self, dtype):
        return dtype


class ProbabilitiesRoundedToHalf(Attention):
    def output(self, p, v):
        return super().output(p.half().to(p.dtype), v)


class FloatArithmeticForDouble(Attention):
    def arithmetic(self, dtype):
        return torch.float32


class Nondeterministic(Attention):
    """The sum over the keys starts at another place in every call, as with atomic additions."""

    calls = 0

    def output(self, p, v):
        self.calls += 1
        start = self.calls % max(p.shape[-1], 1)
        return p.roll(start, -1) @ v.roll(start, -2)


class ReadsBeyondTheValues(Attention):
    """A read past the end, with a weight so small that only another guard value shows it."""

    def output(self, p, v):
        out = super().output(p, v)
        return out + self.beyond.to(out.dtype) * 1e-9

    def inputs(self, query, key, value):
        last = value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        with torch.no_grad():
            self.beyond = value.as_strided((), (), last + 1).nan_to_num() if value.numel() else torch.zeros(())
        return query, key, value


class ReadsUninitialisedMemory(Attention):
    def output(self, p, v):
        out = super().output(p, v)
        return out + torch.empty(()).nan_to_num().to(out.dtype) * 1e-9


class OutputNotWrittenEverywhere(Attention):
    """The last row of the output is left as it was allocated."""

    def output(self, p, v):
        out = super().output(p, v)
        result = torch.empty_like(out)
        result[:, :, :-1] = out[:, :, :-1]
        return result


class ModifiesItsInput(Attention):
    def inputs(self, query, key, value):
        query.detach().mul_(1.0 + 2.0**-7)
        return query, key, value


# What has to name each fault; more checks may complain too.
FAULTS: dict[type[Attention], set[str]] = {
    MaskTransposed: {"out"},
    MaskPolarityFlipped: {"out"},
    CausalOffByOne: {"out"},
    WindowStartExcluded: {"out"},
    BottomRightTakenForTopLeft: {"out"},
    OnlyTheFirstTermOfTheMask: {"out"},
    ScaleMissing: {"out"},
    ScaleAppliedTwice: {"out"},
    DqWithoutScale: {"dq"},
    BaseTwoLse: {"lse"},
    LseInTheDtypeOfTheQuery: {"lse"},
    LseGradientForgotten: {"dq", "dk"},
    DropoutNotRescaled: {"out"},
    DropoutKeepsWhatItShouldDrop: {"dropout"},
    BiasGradientNotReduced: {"dbias"},
    BiasGradientMissing: {"dbias"},
    NanOnAnEmptyRow: {"empty rows"},
    MeanOfValuesOnAnEmptyRow: {"empty rows"},
    KeyTileDropped: {"out"},
    TailKeysIgnored: {"out"},
    DkAndDvSwapped: {"dk", "dv"},
    NanLeaksFromMaskedValues: {"leak"},
    NanLeaksFromMaskedKeys: {"leak"},
    WrongKvHead: {"out"},
    HalfPrecisionAccumulation: {"out"},
    ArithmeticInTheStorageDtype: {"out"},
    ProbabilitiesRoundedToHalf: {"out"},
    FloatArithmeticForDouble: {"out"},
    Nondeterministic: {"determinism"},
    ReadsBeyondTheValues: {"out of bounds"},
    ReadsUninitialisedMemory: {"uninitialised memory"},
    OutputNotWrittenEverywhere: {"out"},
    ModifiesItsInput: {"inputs"},
}


def failures_of(target: Target, cases: list[Case]) -> list[Check]:
    """The failing checks of the first case that shows any."""
    for case in cases:
        failed = [check for check in check_attention(target, case) if check.status == FAIL]
        if failed:
            return failed
    return []


def test_a_sound_function_passes() -> None:
    report = verify(function_target("sound", Attention()), n=60, seed=5)
    report.raise_on_failure()
    assert report.judged >= 45


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault: type[Attention]) -> None:
    failed = failures_of(function_target(fault.__name__, fault()), random_cases(100, seed=1))
    assert failed, f"{fault.__name__} passed 100 cases"
    assert {check.name for check in failed} & FAULTS[fault], [f"{check.name}: {check.detail}" for check in failed]


def test_verify_fails_on_a_fault_and_gives_the_command_that_repeats_it() -> None:
    report = verify(function_target("module:faulty", CausalOffByOne()), n=30, seed=1)
    assert not report.ok
    failed = report.with_status(FAIL)[0]
    assert failed.command == f"fastattn verify module:faulty --seed 1 --case {failed.label} --signature fastattn"
    again = verify(function_target("module:faulty", CausalOffByOne()), seed=1, case=failed.label)
    assert [result.status for result in again.results] == [FAIL]
    assert str(again.results[0].case) == str(failed.case)
    with pytest.raises(AssertionError, match="run|out|--case"):
        report.raise_on_failure()
    assert json.loads(report.to_json())["ok"] is False


# -------------------------------------------------------------------------------------------------- functions like SDPA


def test_sdpa_passes_with_notes_and_fails_when_held_to_our_rules() -> None:
    report = verify(SDPA, n=60, seed=2)
    report.raise_on_failure()
    assert {"leak"} <= {check.name for result in report.results for check in result.checks if check.status == NOTE}
    assert verify(SDPA, n=60, seed=2, strict=True).with_status(FAIL)


def test_a_faulty_function_like_sdpa_is_caught() -> None:
    def ignores_is_causal(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, False, scale=scale, enable_gqa=enable_gqa
        )

    case = Case(seed=0, index=1, len_q=17, len_k=17, terms=(TermSpec("causal"),))
    assert failures_of(function_target("f", ignores_is_causal), [case])


def test_our_sdpa_passes_every_rule_that_a_bool_mask_can_express() -> None:
    target = function_target("ours", fastattn.scaled_dot_product_attention)
    for case in random_cases(40, seed=4):
        if case.bias_shape is None:
            assert not [check for check in check_attention(target, case, strict=True) if check.status == FAIL], str(
                case
            )


def test_what_a_function_does_not_take_is_listed_and_not_passed() -> None:
    def plain(query, key, value):
        if query.dtype != torch.float32:
            raise NotImplementedError("float32 only")
        return F.scaled_dot_product_attention(query, key, value)

    report = verify(function_target("plain", plain), n=40, seed=0)
    report.raise_on_failure()
    unsupported = report.with_status(UNSUPPORTED)
    assert 0 < report.judged < 40
    assert report.judged + len(unsupported) == 40
    reasons = {check.detail for result in unsupported for check in result.checks}
    assert "NotImplementedError: float32 only" in reasons
    assert any("attn_mask" in reason for reason in reasons)


def test_nothing_judged_is_no_success() -> None:
    def refuses(query, key, value, attn_mask=None):
        raise NotImplementedError("not today")

    report = verify(function_target("refuses", refuses), n=5)
    assert not report.ok
    assert "nothing could be judged" in report.verdict


def test_a_function_without_gradient_is_judged_forward_and_said_to_have_none() -> None:
    def detached(query, key, value):
        return F.scaled_dot_product_attention(query, key, value).detach()

    checks = check_attention(function_target("detached", detached), Case(seed=0, index=0))
    assert Check("gradients", UNSUPPORTED, "its output has no gradient") in checks
    assert {check.name for check in checks if check.status == PASS} >= {"out", "inputs", "determinism"}


def test_a_crash_is_a_finding() -> None:
    def crashes(query, key, value):
        raise KeyError("lost")

    report = verify(function_target("crashes", crashes), case="0")
    assert [result.status for result in report.results] == [FAIL]
    assert "KeyError" in report.results[0].checks[0].detail


# ------------------------------------------------------------------------------------------------- losses and weights


def _loss_fault(monkeypatch: pytest.MonkeyPatch, name: str, fault) -> list[Check]:
    sound = getattr(fastattn, name)
    monkeypatch.setattr(fastattn, name, lambda *args, **kwargs: fault(sound, *args, **kwargs))
    kind = {"masked_mse_loss": "l2", "masked_l1_loss": "l1", "masked_smooth_l1_loss": "smooth_l1"}[name]
    for case in random_loss_cases(200, seed=0):
        if case.kind == kind:
            failed = [check for check in check_loss("reference", case) if check.status == FAIL]
            if failed:
                return failed
    return []


def _mean_over_everything(sound, *args, reduction, **kwargs):
    return sound(*args, reduction="mean" if reduction == "masked_mean" else reduction, **kwargs)


def _mask_inverted(sound, input, target, mask, **kwargs):
    return sound(input, target, ~mask, **kwargs)


def _beta_ignored(sound, *args, beta, **kwargs):
    return sound(*args, beta=1.0, **kwargs)


def _not_normalised(sound, *args, normalize_target=False, **kwargs):
    return sound(*args, normalize_target=False, **kwargs)


def _biased_variance(sound, input, target, mask, *, normalize_target=False, **kwargs):
    if normalize_target and target.dim() == 3 and kwargs["patch_size"] is None:
        variance = target.double().var(dim=-1, keepdim=True, unbiased=False)
        target = (
            (target.double() - target.double().mean(dim=-1, keepdim=True)) / (variance + kwargs["eps"]).sqrt()
        ).to(target.dtype)
        normalize_target = False
    return sound(input, target, mask, normalize_target=normalize_target, **kwargs)


def _gradient_not_scaled(sound, input, *args, reduction, **kwargs):
    (input,) = _WithBackward.apply(lambda grads: [grads[0] * 2], input)
    return sound(input, *args, reduction=reduction, **kwargs)


def _accumulates_in_half(sound, input, target, mask, *, reduction, **kwargs):
    loss = sound(input, target, mask, reduction="none", **kwargs)
    if reduction == "sum" and input.dtype == torch.float32:
        return loss.bfloat16().sum().float()
    return sound(input, target, mask, reduction=reduction, **kwargs)


def _leaks(sound, input, target, mask, *, reduction, **kwargs):
    # A product with the mask instead of a selection: 0 * NaN is NaN.
    return sound(input, target, mask, reduction=reduction, **kwargs) + (0.0 * input).sum()


@pytest.mark.parametrize(
    ("name", "fault", "expected"),
    [
        ("masked_mse_loss", _mean_over_everything, "loss"),
        ("masked_mse_loss", _mask_inverted, "loss"),
        ("masked_mse_loss", _not_normalised, "loss"),
        ("masked_mse_loss", _biased_variance, "dinput"),
        ("masked_mse_loss", _gradient_not_scaled, "dinput"),
        ("masked_l1_loss", _accumulates_in_half, "loss"),
        ("masked_l1_loss", _leaks, "leak"),
        ("masked_smooth_l1_loss", _beta_ignored, "loss"),
    ],
)
def test_a_planted_loss_fault_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, fault, expected: str) -> None:
    failed = _loss_fault(monkeypatch, name, fault)
    assert expected in {check.name for check in failed}, [f"{check.name}: {check.detail}" for check in failed]


def _weights_sum_of_heads(weights, lse, **kwargs):
    return weights * 1.25 if kwargs["average_heads"] else weights


def _weights_squared(weights, lse, **kwargs):
    return weights.square()


@pytest.mark.parametrize("fault", [_weights_sum_of_heads, _weights_squared])
def test_a_planted_weights_fault_is_caught(monkeypatch: pytest.MonkeyPatch, fault) -> None:
    sound = fastattn.attention_weights

    def faulty(query, key, lse, **kwargs):
        return fault(sound(query, key, lse, **kwargs), lse, **kwargs)

    monkeypatch.setattr(fastattn, "attention_weights", faulty)
    case = random_weights_cases(2, seed=0)[1]
    case = replace(case, attention=Case(seed=0, index=1, len_q=17, len_k=33), average_heads=True)
    names = {check.name for check in check_weights("reference", case) if check.status == FAIL}
    assert {"weights", "sum of weights"} <= names


# ---------------------------------------------------------------------------------------------------- oracle and cases


def test_the_two_writings_of_the_mask_rule_and_mask_to_dense_agree() -> None:
    seen = set()
    for case in random_cases(400, seed=9):
        # Small enough for a Python loop over every pair.
        if case.batch * case.heads_q * case.len_q * case.len_k > 3000 or not case.terms:
            continue
        terms = build_problem(case).terms
        B, H, L, S = case.batch, case.heads_q, case.len_q, case.len_k
        dense = allowed_pairs(terms, B, H, L, S)
        looped = torch.tensor(
            [
                may_attend(terms, b, h, i, j, L, S)
                for b in range(B)
                for h in range(H)
                for i in range(L)
                for j in range(S)
            ],
            dtype=torch.bool,
        )
        assert torch.equal(dense, looped.view(B, H, L, S)), str(case)
        assert torch.equal(dense, mask_of(terms).to_dense(B, H, L, S)), str(case)
        seen |= {term.kind for term in case.terms}
    assert seen == set(TERM_KINDS)


def test_philox_known_answers() -> None:
    # Known-answer vectors of Random123, philox4x32-10.
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in vectors:
        words = philox_4x32([torch.tensor(c) for c in counter], key)
        assert tuple(int(word) for word in words) == expected


def test_dropout_keep_depends_on_the_absolute_position_alone() -> None:
    whole = dropout_keep(2, 3, 40, 50, 0.3, seed=2**61 + 5)
    assert torch.equal(whole[:1, :2, :7, :11], dropout_keep(1, 2, 7, 11, 0.3, seed=2**61 + 5))
    assert abs(float((~whole).float().mean()) - 0.3) < 0.03
    assert not torch.equal(whole, dropout_keep(2, 3, 40, 50, 0.3, seed=5))  # the high word of the seed counts


def test_the_oracle_agrees_with_sdpa_in_float64() -> None:
    case = Case(
        seed=3, index=0, batch=2, heads_q=4, heads_kv=2, len_q=19, len_k=33, dtype=torch.float64, bias_shape=(4, 19, 33)
    )
    problem = build_problem(case)
    expected = attention_oracle(problem, allowed_in(problem), None)
    inputs = [t.detach().requires_grad_() for t in (problem.query, problem.key, problem.value, problem.bias)]
    out = F.scaled_dot_product_attention(*inputs[:3], attn_mask=inputs[3], enable_gqa=True)
    torch.testing.assert_close(out, expected.values["out"])
    gradients = torch.autograd.grad(out, inputs, problem.grad_out)
    for name, gradient in zip(("dq", "dk", "dv", "dbias"), gradients, strict=True):
        torch.testing.assert_close(gradient, expected.values[name])


def test_the_weights_oracle_agrees_with_the_attention_oracle() -> None:
    case = Case(seed=3, index=1, batch=2, heads_q=2, heads_kv=1, len_q=9, len_k=70, terms=(TermSpec("key_lengths"),))
    problem = build_problem(replace(case, dtype=torch.float64))
    allowed = allowed_in(problem)
    attention = attention_oracle(problem, allowed, None)
    upstream = torch.zeros(2, 2, 9, 70)
    weights = weights_oracle(problem, allowed, None, attention.values["lse"], False, upstream).values["weights"]
    torch.testing.assert_close(weights @ problem.value.repeat_interleave(2, dim=1), attention.values["out"])


@pytest.mark.parametrize("dim", [8, 64, 256])
def test_the_noise_of_a_score_is_that_of_a_chain_of_additions(dim: int) -> None:
    q, k = torch.randn(1, 1, 4000, dim), torch.randn(1, 1, 4000, dim)
    k[:, :, :1000] += q[:, :, :1000]  # large scores, whose terms agree in sign
    chain = torch.zeros(4000)
    for d in range(dim):
        chain += q[0, 0, :, d] * k[0, 0, :, d]
    q, k = q.double().view(4000, 1, 1, dim), k.double().view(4000, 1, 1, dim)
    error = (chain.double() - (q * k).sum(dim=(1, 2, 3))).abs() / 2.0**-24
    for rows in (slice(0, 1000), slice(1000, None)):
        worst = float((error[rows] / dot_size(q, k).flatten()[rows]).max())
        assert 0.3 < worst < 1.3


def test_cases_cover_what_they_should_and_repeat() -> None:
    cases = random_cases(500, seed=0)
    assert [str(case) for case in cases] == [str(case) for case in random_cases(500, seed=0)]
    assert str(cases[17]) != str(random_cases(18, seed=1)[17])
    assert {term.kind for case in cases for term in case.terms} == set(TERM_KINDS)
    assert {term.align for case in cases for term in case.terms if term.kind == "causal"} == set(ALIGNMENTS)
    assert {case.dtype for case in cases} == set(DTYPES.values())
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert any(case.heads_kv == 1 < case.heads_q for case in cases)
    assert any(1 < case.heads_kv < case.heads_q for case in cases)
    assert any(case.dim_v != case.dim_qk for case in cases)
    assert {0, 1} <= {case.batch for case in cases} & {case.len_q for case in cases} & {case.len_k for case in cases}
    assert max(case.len_k for case in cases) > 500 and max(case.dim_qk for case in cases) == 256
    assert any(case.dropout_p and case.bias_shape and case.terms for case in cases)
    assert any(len(case.terms) == 3 for case in cases)
    assert sum(not case.terms and not case.bias_shape and not case.dropout_p for case in cases) >= 100
    patterns = {
        tuple(size == 1 for size in (1,) * (4 - len(case.bias_shape)) + case.bias_shape)
        for case in cases
        if case.bias_shape and min(case.batch, case.heads_q, case.len_q, case.len_k) > 1
    }
    assert len(patterns) == 16  # every subset of broadcast dimensions
    tensors = build_problem(cases[7]), build_problem(cases[7])
    assert same_bits(tensors[0].query, tensors[1].query)


def test_loss_cases_cover_what_they_should() -> None:
    cases = random_loss_cases(300, seed=0)
    assert {case.layout for case in cases} == {"image", "token", "element"}
    assert {case.reduction for case in cases} == {"masked_mean", "sum", "mean", "none"}
    assert {case.kind for case in cases} == {"l2", "l1", "smooth_l1"}
    assert any(case.normalize_target for case in cases) and any(case.channels_last for case in cases)
    assert any(isinstance(case, LossCase) and case.density == 0.0 for case in cases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_carved_tensors_hold_the_data_among_guards(layout: str) -> None:
    data = torch.randn(2, 3, 5, 4)
    if layout == "expanded":
        data = data[:1].expand(2, 3, 5, 4)
    view, buffer = carve(data, layout, float("nan"))
    assert torch.equal(view, data) and view.stride(-1) == 1
    assert int(torch.isnan(buffer).sum()) == buffer.numel() - (60 if layout == "expanded" else 120)


# ------------------------------------------------------------------------------------------------ comparison and poison


def test_poisoned_buffers_fills_and_restores() -> None:
    with poisoned_buffers():
        assert torch.isnan(torch.empty(3)).all()
        assert torch.isnan(torch.empty_like(torch.zeros(2, 2))).all()
        assert torch.isnan(torch.zeros(1).new_empty(4)).all()
        assert torch.isnan(torch.empty_strided((2, 2), (1, 2))).all()
        assert torch.isnan(torch.empty(16, dtype=torch.uint8).view(torch.float32)).all()
        assert torch.empty(2, dtype=torch.int64).eq(2**63 - 1).all()
    assert "poison" not in repr(torch.empty)


def test_compare_accepts_the_rounded_result_and_refuses_what_is_off() -> None:
    expected = torch.randn(1000, dtype=torch.float64)
    noise = 2.0**-8 * expected.abs()
    rounded = expected.bfloat16()
    assert compare("out", rounded, expected, noise, peer=expected).ok  # the peer is exact, and still
    one_off = rounded.clone()
    smallest = int(expected.abs().argmin())
    one_off[smallest] = float(expected[smallest]) * 1.5 + 1e-6
    result = compare("out", one_off, expected, noise, peer=rounded)
    assert not result.ok and "one element" in result.message
    assert not compare("out", rounded * 1.01, expected, noise, peer=rounded).ok
    assert not compare("out", rounded[:-1], expected, noise, peer=rounded).ok
    assert not compare("out", rounded.clone().fill_(math.nan), expected, noise, peer=rounded).ok


def test_compare_wants_infinities_where_they_belong() -> None:
    expected = torch.tensor([-math.inf, 1.0], dtype=torch.float64)
    noise = torch.tensor([0.0, 1e-7], dtype=torch.float64)
    assert compare("lse", torch.tensor([-math.inf, 1.0]), expected, noise, None).ok
    assert not compare("lse", torch.tensor([math.nan, 1.0]), expected, noise, None).ok
    assert not compare("lse", torch.tensor([0.0, 1.0]), expected, noise, None).ok
    assert not compare("lse", torch.tensor([-math.inf, -math.inf]), expected, noise, None).ok


def test_same_bits() -> None:
    assert same_bits(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))
