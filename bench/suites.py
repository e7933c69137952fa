"""Which cases are run: the quick suite, the full one, and what the command line asks for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from fastattn.bench.contenders import OUR_BACKENDS, OURS
from fastattn.bench.runner import Plan
from fastattn.bench.workloads import MASK_KINDS, AttentionCase, Condition, LossCase, MhaCase

Shape = tuple[int, int, int, int, int, int]  # batch, query heads, key heads, L, S, head dim

BASE: Shape = (2, 8, 8, 1024, 1024, 64)
VIT: Shape = (32, 12, 12, 197, 197, 64)
FULL_SHAPES: tuple[Shape, ...] = (BASE, VIT, (2, 8, 8, 1024, 1024, 128), (1, 8, 8, 4096, 4096, 64))
CURVE_LENGTHS_QUICK = (256, 512, 2048)  # beside the 1024 of the base shape
CURVE_LENGTHS_FULL = (256, 512, 2048, 4096)
MHA_MASKS = ("dense", "padded", "causal")

# What the kernels are held to: against torch's SDPA, float32, forward and forward with backward.
CONDITIONS = {"dense": Condition("sdpa", 1.0), "padded": Condition("sdpa", 2.0)}

_PLAIN = frozenset({"sdpa", "eager"})
_EVERYONE = _PLAIN | {*OUR_BACKENDS, "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "compile", "flex"}
_MEASURED = frozenset({OURS, "sdpa", "eager"})


def _attention(shape: Shape, mask: str, dtype: str, backward: bool, device: str) -> AttentionCase:
    condition = CONDITIONS.get(mask) if shape == BASE and dtype == "float32" and device == "cpu" else None
    return AttentionCase(*shape, mask=mask, dtype=dtype, backward=backward, device=device, condition=condition)


def attention_plans(
    quick: bool,
    shapes: Sequence[Shape] | None = None,
    masks: Sequence[str] | None = None,
    dtype: str | None = None,
    backward: bool = False,
    device: str = "cpu",
) -> list[Plan]:
    """The attention cases. With shapes, masks or a dtype given: every combination of these, with the backward or not;
    else the suite, of which ``backward`` takes the cases that have one."""
    if shapes is not None or masks is not None or dtype is not None:
        combinations = product(shapes or (BASE,), masks or MASK_KINDS)
        cases = [_attention(shape, mask, dtype or "float32", backward, device) for shape, mask in combinations]
        several = len(set(shapes or ())) > 1
        return [Plan(case, None if quick else _EVERYONE, _MEASURED, plots=several) for case in cases]
    plans = _quick_attention(device) if quick else _full_attention(device)
    return [plan for plan in plans if getattr(plan.case, "backward", False) or not backward]


def _quick_attention(device: str) -> list[Plan]:
    def plan(mask: str, backward: bool, *peers: str, memory: frozenset[str] = frozenset(), plots: bool = False) -> Plan:
        return Plan(_attention(BASE, mask, "float32", backward, device), frozenset(peers), memory, plots)

    plans = [
        plan("dense", False, "sdpa", "eager", "flex", "compile"),
        plan("dense", True, "sdpa", "eager", memory=_MEASURED, plots=True),
        plan("padded", False, "sdpa", "flex"),
        plan("padded", True, "sdpa", "eager"),
        plan("causal", False, "sdpa", "flex"),
        *(plan(mask, True, "sdpa") for mask in MASK_KINDS if mask not in ("dense", "padded")),
    ]
    plans += [
        Plan(_attention((2, 8, 8, length, length, 64), "dense", "float32", True, device), _PLAIN, _MEASURED, plots=True)
        for length in CURVE_LENGTHS_QUICK
    ]
    plans.append(Plan(_attention(VIT, "dense", "float32", True, device), frozenset({"sdpa"})))
    plans.append(Plan(_attention(BASE, "dense", "bfloat16", True, device), frozenset({"sdpa"})))
    return plans


def _full_attention(device: str) -> list[Plan]:
    plans = []
    for shape, mask, backward in product(FULL_SHAPES, MASK_KINDS, (False, True)):
        case = _attention(shape, mask, "float32", backward, device)
        # Compiling takes longer than the measuring: the compiled peers run at one shape.
        peers, measured = (_EVERYONE, _MEASURED) if shape == BASE else (_PLAIN, frozenset())
        plans.append(Plan(case, peers, measured))
    for length, mask in product(CURVE_LENGTHS_FULL, ("dense", "causal")):
        case = _attention((2, 8, 8, length, length, 64), mask, "float32", True, device)
        plans.append(Plan(case, _PLAIN, _MEASURED, plots=True))
    for dtype, backward in product(("bfloat16", "float16"), (False, True)):
        plans.append(Plan(_attention(BASE, "dense", dtype, backward, device), _PLAIN))
    return plans


def mha_plans(
    quick: bool,
    shapes: Sequence[Shape] | None = None,
    masks: Sequence[str] | None = None,
    dtype: str | None = None,
    backward: bool = True,
    device: str = "cpu",
) -> list[Plan]:
    """Self-attention layers. A shape B,H,L,D stands for inputs (B, L, H · D)."""
    if shapes is not None:
        sizes = [(batch, length, heads * dim, heads) for batch, heads, _, length, _, dim in shapes]
    else:
        sizes = [(8, 197, 768, 12), (2, 1024, 512, 8)] + ([] if quick else [(1, 4096, 512, 8)])
    kinds = masks or (("dense", "padded") if quick else MHA_MASKS)
    everyone = frozenset({OURS, "nn.MultiheadAttention"})
    plans = []
    for size, mask in product(sizes, kinds):
        if quick and masks is None and mask != "dense" and size[1] < 1024:
            continue
        case = MhaCase(*size, mask=mask, dtype=dtype or "float32", backward=backward, device=device)
        plans.append(
            Plan(case, None if quick else everyone | {"compile"}, everyone if size[1] >= 1024 else frozenset())
        )
    return plans


def loss_plans(quick: bool, dtype: str | None = None, backward: bool = False, device: str = "cpu") -> list[Plan]:
    """The masked losses of SimMIM (L1) and MAE (squared error) over pictures, forward and with the gradient."""
    sizes = [(32, 3, 192, 32)] + ([] if quick else [(64, 3, 224, 32), (64, 3, 224, 16)])
    plans = []
    for size, kind, with_gradient in product(sizes, ("l1", "mse"), (False, True)):
        case = LossCase(*size, kind=kind, dtype=dtype or "float32", backward=with_gradient, device=device)
        peers = frozenset({"eager", "compile"} if with_gradient or not quick else {"eager"})
        if with_gradient or not backward:
            plans.append(Plan(case, peers, frozenset({OURS, "eager"}) if with_gradient else frozenset()))
    return plans
