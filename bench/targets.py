"""The rows of targets: what the CPU kernels are held to beside torch, as one suite (``fastattn bench targets``).

A row is one problem with what is asked of it: so many times the speed of a peer, and such a share of the sentinel's
FLOP/s. It is met when every run of it is, each in a process of its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fastattn.bench import records as recording
from fastattn.bench.contenders import OURS, PROJECTIONS, STOCK
from fastattn.bench.records import Record
from fastattn.bench.runner import Plan
from fastattn.bench.workloads import (
    COPY,
    ELEMENTS,
    RANDOM_KEYS,
    SENTINEL,
    AdditiveCase,
    AttentionCase,
    Case,
    HeadCase,
    LossCase,
    MhaCase,
    Target,
    WeightsCase,
)

ROUNDS, QUICK_ROUNDS = 5, 3
SECONDS, QUICK_SECONDS = 2.0, 0.5  # how long a row may make up for disturbed samples
MEMORY_LENGTH = 4096
# Both sides held to an instruction level: torch and its libraries choose theirs when they are loaded.
LEVELS = {"avx2": dict(zip(recording.LEVEL_VARIABLES, ("avx2", "AVX2", "AVX2", "avx2"), strict=True))}


def _row(name: str, case: Case, *targets: Target, peers: frozenset[str] = frozenset()) -> Plan:
    beside = {target.beside for target in targets if target.of == "time"} - {SENTINEL, ELEMENTS}
    memory = {target.beside for target in targets if target.of == "memory"}
    return Plan(
        case,
        peers | beside | memory,
        frozenset({OURS, *memory} if memory else ()),
        rounds=ROUNDS,
        seconds=SECONDS,
        targets=targets,
        row=name,
        timed=any(target.of == "time" for target in targets),
    )


def _attention(
    name: str, shape: tuple[int, int, int, int], at_least: float, share: float | None = None, **changed: object
) -> Plan:
    """A row beside SDPA. shape: B, H, L = S, D."""
    batch, heads, length, dim = shape
    fields: dict[str, object] = {"backward": bool(changed.get("backward_alone")), **changed}
    case = AttentionCase(batch, heads, heads, length, length, dim, **fields)  # type: ignore[arg-type]
    return _row(name, case, Target("sdpa", at_least), *(() if share is None else (Target(SENTINEL, share),)))


def target_plans(quick: bool = False, named: Sequence[str] = ()) -> list[Plan]:
    """Every row, or those whose name contains one of ``named``; quick takes fewer samples of each."""
    plans = [plan for plan in _plans() if not named or any(text in plan.row for text in named)]
    return [replace(plan, rounds=QUICK_ROUNDS, seconds=QUICK_SECONDS) for plan in plans] if quick else plans


def _plans() -> list[Plan]:
    """Where the table of targets says nothing of a problem, it is to be no slower than the peer."""
    base, long, vit = (2, 8, 1024, 64), (1, 8, 4096, 64), (32, 12, 197, 64)
    plans = [
        _attention("forward dense, D = 64, S = 1024", base, 1.2, 0.95),
        _attention("forward dense, D = 64, S = 4096", long, 1.2, 0.95),
        _attention("forward dense, D = 128", (2, 8, 1024, 128), 1.3, 1.0),
        _attention("forward dense, D = 32", (2, 8, 1024, 32), 1.0),
        _attention("forward dense, D = 80", (2, 8, 1024, 80), 1.0),
        _attention("forward dense, ViT-B", vit, 1.5, 0.80),
        _attention("forward, Swin windows of 49", (256, 6, 49, 32), 1.0),
        _attention("forward, Swin windows of 64", (256, 6, 64, 32), 1.0),
        _attention("forward, Swin windows of 144", (64, 6, 144, 32), 1.0),
        _attention("forward causal, S = 1024", base, 1.6, 0.85, mask="causal"),
        _attention("forward causal, S = 4096", long, 1.3, 0.92, mask="causal"),
        _attention("forward, half of the keys padded", base, 2.3, 0.90, mask="padded"),
        _attention("forward, random 50 % of the keys padded", base, 1.0, mask=RANDOM_KEYS),
        _attention("forward, random 50 % bool mask", base, 1.4, mask="random"),
        _attention("forward, window 256 at S = 4096", long, 8.0, mask="window", window=256),
        _attention("forward, window 256 at S = 16384", (1, 2, 16384, 64), 8.0, mask="window", window=256),
        _attention("forward, bool mask, 10 % of tiles, map included", long, 6.0, mask="block-sparse", raw_mask=True),
        _attention("backward dense", base, 1.2, 0.88, backward_alone=True),
        _attention("backward causal", base, 1.4, 0.80, mask="causal", backward_alone=True),
        _attention("backward, half of the keys padded", base, 2.2, 0.85, mask="padded", backward_alone=True),
        _attention("backward, random 50 % of the keys padded", base, 1.0, mask=RANDOM_KEYS, backward_alone=True),
        _attention("backward dense, D = 128", (2, 8, 1024, 128), 1.2, backward_alone=True),
        _attention("backward dense, ViT-B", vit, 1.2, backward_alone=True),
        _attention("backward, Swin windows of 49", (256, 6, 49, 32), 1.0, backward_alone=True),
    ]
    for dtype in ("bfloat16", "float16"):
        plans.append(_attention(f"{dtype} forward", base, 1.0, dtype=dtype))
        plans.append(_attention(f"{dtype} forward + backward", base, 6.0, dtype=dtype, backward=True))
    plans += [
        _attention("dropout, forward", base, 2.5, mask="dropout"),
        _attention("dropout, forward + backward", base, 2.5, mask="dropout", backward=True),
        _attention("bias (B, H, L, S) with gradient", base, 2.5, mask="bias-batch", backward=True),
        _attention("bias (1, H, L, S) with gradient", base, 2.5, mask="bias", backward=True),
        _attention("bias (1, 1, L, S) with gradient", base, 2.5, mask="bias-shared", backward=True),
    ]
    for batch, length, width, heads, at_least in ((8, 197, 768, 12, 1.5), (2, 1024, 512, 8, 2.0)):
        layer = MhaCase(batch, length, width, heads)
        name = f"MultiheadAttention training step ({batch}, {length}, {width})"
        plans.append(_row(name, layer, Target(STOCK, at_least), peers=frozenset({PROJECTIONS})))
    layer = MhaCase(1, MEMORY_LENGTH, 512, 8)
    plans.append(_row("peak extra memory of that step, S = 4096", layer, Target(STOCK, 8.0, of="memory")))
    for kind, backward in (("mse", False), ("mse", True), ("l1", False), ("l1", True)):
        name = f"masked {kind}, 60 % masked, {'forward + backward' if backward else 'forward'}"
        targets = (Target("eager", 5.0), Target("compile", 2.0), Target(COPY, 0.8))
        plans.append(_row(name, LossCase(32, 3, 192, 32, kind, backward=backward), *targets))
    for backward in (False, True):
        name = f"averaged attention weights, {'forward + backward' if backward else 'forward'}"
        plans.append(_row(name, WeightsCase(2, 8, 1024, 64, backward=backward), Target("eager", 1.0)))
    for mask, dtype in (("dense", "float32"), ("padded", "float32"), ("dense", "bfloat16"), ("padded", "bfloat16")):
        case = AttentionCase(1, 32, 8, 1, 8192, 64, mask=mask, dtype=dtype)
        cache = "a full cache of 8192" if mask == "dense" else "half of a cache of 8192"
        plans.append(_row(f"decoding, {cache}, {dtype}", case, Target("sdpa", 1.0)))
    for backward in (False, True):
        name = f"additive attention, L = S = 512, A = 256, {'forward + backward' if backward else 'forward'}"
        beside = (Target("eager", 8.0), Target("compile", 2.0))
        additive = AdditiveCase(1, 512, 256, backward=backward)
        plans.append(_row(name, additive, *beside, *(() if backward else (Target(ELEMENTS, 15e9),))))
    plans.append(_row("linear + masked mse, 60 % masked", HeadCase(16, 196, 768, 768), Target("eager", 1.3)))
    small = (1, 1, 16, 16)
    plans += [
        _attention("small call, forward", small, 0.5),
        _attention("small call, causal", small, 0.5, mask="causal"),
        _attention("small call, bool mask", small, 0.5, mask="random", raw_mask=True),
        _attention("small call, forward + backward", small, 0.5, backward=True),
    ]
    return plans


def judge(plan: Plan, found: Sequence[Record]) -> list[Record]:
    """A record for each target of a row; one that could not be measured is not met."""
    by_name = {record["contender"]: record for record in found}
    ours = by_name[OURS]
    limit = by_name.get(PROJECTIONS, {}).get("limit")
    judged = []
    for target in plan.targets:
        measured = _measured(target, by_name)
        judged.append(
            {
                "record": "target",
                "row": plan.row,
                "title": plan.case.title,
                "beside": target.beside,
                "of": target.of,
                "at_least": target.at_least,
                "measured": measured,
                "sentinel": ours.get("sentinel_spread"),
                "limit": limit,
                "noisy": bool(ours.get("time", {}).get("noisy")),
                "pass": measured is not None and measured["median"] >= target.at_least,
            }
        )
    return judged


def _measured(target: Target, by_name: Mapping[str, Record]) -> Record | None:
    ours, peer = by_name[OURS], by_name.get(target.beside, {})
    if target.of == "memory":
        if "memory" not in ours or "memory" not in peer:
            return None
        return {"median": peer["memory"]["extra"] / max(1, ours["memory"]["extra"])}
    if target.beside == SENTINEL:
        return ours.get("sentinel_spread")
    if target.beside == ELEMENTS:
        return ours.get("elements_per_s")
    measured = peer.get("copy_share" if target.beside == COPY else "ratio")
    return None if measured is None else {name: measured[name] for name in ("median", "p20", "p80")}


def wanted(target: Record) -> str:
    """What a target asks for, in words."""
    at_least, beside = target["at_least"], target["beside"]
    if target["of"] == "memory":
        return f"≤ 1/{at_least:g} of {beside}"
    if beside == SENTINEL:
        return f"≥ {at_least:g} of the sentinel"
    if beside == COPY:
        return f"≥ {at_least:g} of a copy's bandwidth"
    if beside == ELEMENTS:
        return f"≥ {at_least / 1e9:g} G elements/s"
    return f"≥ {at_least:g} × {beside}"


def figure(target: Record, value: Record | None) -> str:
    """A measured figure of a target: median (p20 to p80)."""
    if value is None:
        return "not measured"
    if target["of"] == "memory":
        return f"1/{value['median']:.1f}"
    unit, scale = (" G/s", 1e-9) if target["beside"] == ELEMENTS else ("", 1.0)
    text = f"{value['median'] * scale:.2f}{unit}"
    return f"{text} ({value['p20'] * scale:.2f} to {value['p80'] * scale:.2f})"


HEADER = ("row", "target", "measured", "÷ sentinel", "")


def rows(judged: Sequence[Record]) -> list[tuple[list[str], bool]]:
    """The table, and whether each row is met: every run is shown, and a target is met when it is in all of them."""
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for target in judged:
        grouped.setdefault((target["row"], target["beside"], target["of"]), []).append(target)
    lines = []
    last = ""
    for (name, beside, _), runs in grouped.items():
        measured = ", ".join(("~" if run["noisy"] else "") + figure(run, run["measured"]) for run in runs)
        shares = [run["sentinel"]["median"] for run in runs if run["sentinel"]]
        limits = [run["limit"]["median"] for run in runs if run["limit"]]
        if limits:
            measured += f"; the projections alone leave {statistics.median(limits):.2f} ×"
        shown = f"{statistics.median(shares):.2f}" if shares and beside != SENTINEL else ""
        met = all(run["pass"] for run in runs)
        cells = [name if name != last else "", wanted(runs[0]), measured, shown, "met" if met else "MISSED"]
        lines.append((cells, met))
        last = name
    return lines


def run_fresh(options: Sequence[str], level: str | None, run: int) -> list[Record]:
    """One run of the command in a process of its own, with both sides held to a level where one is given."""
    environment = {**os.environ, **(LEVELS[level] if level else {})}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        command = [sys.executable, "-m", "fastattn", "bench", "targets", *options, "--json", str(path)]
        code = subprocess.run(command, env=environment, check=False).returncode
        # 1 tells that a contender of ours was wrong, which its records tell too.
        if code not in (0, 1) or not path.exists():
            raise RuntimeError(f"run {run} failed: exit code {code} of {' '.join(command)}")
        return [{**record, "run": run} for record in recording.read(path)]
