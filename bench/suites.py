"""Which cases are run: the quick suite, the full one, and what the command line asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from fastattn.bench.contenders import OUR_BACKENDS, OURS, STOCK, STOCK_SLOW
from fastattn.bench.runner import Plan
from fastattn.bench.workloads import (
    MASK_KINDS,
    AdditiveCase,
    AttentionCase,
    Condition,
    HeadCase,
    LossCase,
    MhaCase,
    ModelCase,
)

Shape = tuple[int, int, int, int, int, int]  # batch, query heads, key heads, L, S, head dim

BASE: Shape = (2, 8, 8, 1024, 1024, 64)
VIT: Shape = (32, 12, 12, 197, 197, 64)
FULL_SHAPES: tuple[Shape, ...] = (BASE, VIT, (2, 8, 8, 1024, 1024, 128), (1, 8, 8, 4096, 4096, 64))
CURVE_LENGTHS_QUICK = (256, 512, 2048)  # beside the 1024 of the base shape
CURVE_LENGTHS_FULL = (256, 512, 2048, 4096)
DECODE: Shape = (1, 32, 8, 1, 8192, 64)  # one token against a long cache, grouped queries
LAYER_SHAPE: Shape = (4, 8, 8, 512, 512, 64)
MHA_MASKS = ("dense", "padded", "causal")
MODEL_ROUNDS = 5
LAYER_SECONDS, QUICK_LAYER_SECONDS = 5.0, 3.0  # what a case gets to make up for disturbed samples

# What the kernels are held to: against torch's SDPA, float32, forward and forward with backward.
CONDITIONS = {"dense": Condition("sdpa", 1.0), "padded": Condition("sdpa", 2.0)}

_PLAIN = frozenset({"sdpa", "eager"})
_EVERYONE = _PLAIN | {*OUR_BACKENDS, "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "compile", "flex"}
_MEASURED = frozenset({OURS, "sdpa", "eager"})
_LAYERS = frozenset({OURS, STOCK})


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
    plans += _decoding(device)
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
    return plans + _decoding(device)


def _decoding(device: str) -> list[Plan]:
    """With the whole cache, and with half of it in use."""
    return [
        Plan(_attention(DECODE, mask, dtype, False, device), frozenset({"sdpa"}))
        for mask, dtype in product(("dense", "padded"), ("float32", "bfloat16"))
    ]


def mha_plans(
    quick: bool,
    shapes: Sequence[Shape] | None = None,
    masks: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> list[Plan]:
    """Layers, training and inference. A shape B,H,L[xS],D stands for queries (B, L, H · D), and keys (B, S, H · D).

    With shapes, masks or a dtype given: every combination of these; else the suite.
    """
    every = list(product((True, False), (True, False)))  # training or not, with weights or not
    if shapes is not None or masks is not None or dtype is not None:
        cases = []
        for shape, mask, (backward, weights) in product(shapes or (LAYER_SHAPE,), masks or MHA_MASKS[:2], every):
            batch, heads, _, len_q, len_k, dim = shape
            case = MhaCase(batch, len_q, heads * dim, heads, mask, dtype or "float32", backward, device, weights)
            cases.append(case if len_q == len_k else replace(case, len_k=len_k))
        extra: frozenset[str] = frozenset() if quick else frozenset({"compile"})
        return [Plan(case, _layer_peers(case) | extra, seconds=LAYER_SECONDS) for case in cases]
    base, vit = MhaCase(4, 512, 512, 8, device=device), MhaCase(8, 197, 384, 6, device=device)
    if quick:
        cases = [
            base,
            replace(base, mask="padded", need_weights=False),
            replace(base, mask="padded", need_weights=False, backward=False),
            replace(vit, need_weights=False),
        ]
        return [Plan(case, _layer_peers(case), seconds=QUICK_LAYER_SECONDS) for case in cases]
    cases = [
        replace(size, mask=mask, backward=backward, need_weights=weights)
        for size, mask, (backward, weights) in product((base, vit), ("dense", "padded"), every)
    ]
    cases += [
        replace(base, length=128, len_k=1024, mask="padded", need_weights=False),
        replace(base, need_weights=False, autocast=True),
    ]
    cases += [
        replace(base, encoder_layer=True, mask=mask, backward=backward)
        for mask, backward in (("dense", True), ("dense", False), ("padded", False))
    ]
    measured = {base, replace(base, need_weights=False)}
    return [
        Plan(case, _layer_peers(case), _LAYERS if case in measured else frozenset(), seconds=LAYER_SECONDS)
        for case in cases
    ]


def _layer_peers(case: MhaCase) -> frozenset[str]:
    """Stock has a fast path in inference, for self-attention without autocast."""
    return _LAYERS if case.backward or case.autocast or case.len_k is not None else _LAYERS | {STOCK_SLOW}


def model_plans(quick: bool, device: str = "cpu") -> list[Plan]:
    """Models of transformers: training and inference, padded where there are sequences, and generation."""
    cases = []
    for name, length in (("bert", 512), ("llama", 1024), ("gpt2", 512), ("t5", 512)):
        for padded, backward in product((False, True), (True, False)):
            if not quick or (name in ("bert", "llama") and padded):
                cases.append(ModelCase(name, 2, length, padded, backward, device=device))
    for name, size in (("vit", 256), ("swin", 224), ("mae", 256)):
        cases += [ModelCase(name, 4, size, False, backward, device=device) for backward in (True, False)[: 2 - quick]]
    if not quick:
        cases.append(ModelCase("bert", 2, 512, backward=False, attentions=True, device=device))
    for name in ("llama", "gpt2")[: 2 - quick]:
        cases.append(ModelCase(name, 1, 512, backward=False, new_tokens=8 if quick else 32, device=device))
    measured = {ModelCase("bert", 2, 512, device=device)}
    return [
        Plan(case, None, _MEASURED if case in measured else frozenset(), rounds=MODEL_ROUNDS, seconds=LAYER_SECONDS)
        for case in cases
    ]


def loss_plans(quick: bool, dtype: str | None = None, backward: bool = False, device: str = "cpu") -> list[Plan]:
    """The masked losses of SimMIM (L1) and MAE (squared error) over pictures, and the head fused with one; forward and
    with the gradient."""
    sizes = [(32, 3, 192, 32)] + ([] if quick else [(64, 3, 224, 32), (64, 3, 224, 16)])
    plans = []
    for size, kind, with_gradient in product(sizes, ("l1", "mse"), (False, True)):
        case = LossCase(*size, kind=kind, dtype=dtype or "float32", backward=with_gradient, device=device)
        peers = frozenset({"eager", "compile"} if with_gradient or not quick else {"eager"})
        if with_gradient or not backward:
            plans.append(Plan(case, peers, frozenset({OURS, "eager"}) if with_gradient else frozenset()))
    # The head of SimMIM's Swin, which predicts 32 x 32 pixels, and of a ViT-B with patches of 16.
    heads = [(32, 36, 768, 3072), (16, 196, 768, 768)]
    if device != "cpu":
        heads = [(256, 36, 768, 3072), (128, 196, 768, 768)]
    for head, with_gradient in product(heads[quick:], (False, True)):
        if with_gradient or not backward:
            fused = HeadCase(*head, dtype=dtype or "float32", backward=with_gradient, device=device)
            peers = frozenset({"eager"} if quick else {"eager", "compile"})
            plans.append(Plan(fused, peers, frozenset({OURS, "eager"}) if with_gradient else frozenset()))
    return plans


def additive_plans(quick: bool, dtype: str | None = None, backward: bool = False, device: str = "cpu") -> list[Plan]:
    """Additive attention, forward and with the backward."""
    sizes = [(1, 512, 256)] if device == "cpu" else [(32, 512, 256), (64, 197, 64)]
    plans = []
    for size, with_backward in product(sizes[: 1 if quick else None], (False, True)):
        if with_backward or not backward:
            case = AdditiveCase(*size, dtype=dtype or "float32", backward=with_backward, device=device)
            measured = frozenset({OURS, "eager"}) if with_backward else frozenset()
            plans.append(Plan(case, frozenset({"eager"} if quick else {"eager", "compile"}), measured))
    return plans


def memory_plans() -> list[Plan]:
    """Training steps whose peak memory is measured, each in a fresh process: SDPA's fused kernels store no scores, and
    its plain path, which dropout or a bias with a gradient takes, does, as eager attention and torch's module do."""

    def attention(length: int, heads: int, mask: str, *peers: str) -> Plan:
        case = AttentionCase(1, heads, heads, length, length, 64, mask, backward=True)
        return Plan(case, frozenset(peers), frozenset({OURS, *peers}), timed=False)

    plans = [
        attention(4096, 8, "dense", "sdpa", "eager"),
        *(attention(4096, 8, mask, "sdpa") for mask in ("causal", "random", "dropout", "bias")),
        # One head, of which torch's plain path stores 1 GiB a tensor.
        attention(16384, 1, "dense", "sdpa", "eager"),
        *(attention(16384, 1, mask, "sdpa") for mask in ("causal", "dropout")),
    ]
    layer = MhaCase(1, 4096, 512, 8)
    return plans + [
        Plan(replace(layer, need_weights=weights), _LAYERS, _LAYERS, timed=False) for weights in (True, False)
    ]
