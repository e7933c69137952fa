"""Runs a case: checks every contender, times those that pass against each other, measures memory, makes the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fastattn.bench import memory
from fastattn.bench.checks import Check, Verdict, check_dropout, checked_form
from fastattn.bench.contenders import (
    OUR_BACKENDS,
    OURS,
    PROJECTIONS,
    STOCK,
    Bound,
    Contender,
    additive_contenders,
    attention_contenders,
    head_contenders,
    loss_contenders,
    mha_contenders,
    user_contender,
    weights_contenders,
)
from fastattn.bench.models import PICTURES, lengths_of, model_contenders
from fastattn.bench.records import Record
from fastattn.bench.timing import Sentinel, Timing, measure, percentiles, round_ratios
from fastattn.bench.workloads import (
    DROPOUT_OF_ONES,
    AdditiveCase,
    AttentionCase,
    Case,
    Condition,
    HeadCase,
    MhaCase,
    ModelCase,
    Target,
    WeightsCase,
    additive_elements,
    attending_pairs,
    attention_bytes,
    attention_flops,
    attention_inputs,
    executed_pairs,
    head_flops,
    head_inputs,
    loss_bytes,
    loss_inputs,
    mha_flops,
    weights_flops,
)

# whose error sets the bound of others
JUDGE = {"attention": "sdpa", "mha": STOCK}  # else eager code

CONDITION_PATIENCE = 4.0  # a promised speed is judged on undisturbed samples, and gets more time to find them


@dataclass(frozen=True)
class Plan:
    """A case, and what is done with it."""

    case: Case
    peers: frozenset[str] | None = None  # None: every peer that does not compile
    memory: frozenset[str] = frozenset()  # whose memory is measured; with any, also that of the user's functions
    plots: bool = False  # belongs to the curves over the sequence length
    rounds: int | None = None  # undisturbed samples wanted, where that is not for the run to say
    seconds: float | None = None  # how long disturbed samples are made up for, where that is not for the run to say
    targets: tuple[Target, ...] = ()  # what the case is held to, as the row of this name
    row: str = ""
    timed: bool = True  # or is it the memory alone that is asked for
    scaling: str = ""  # the curve of the suite scaling that the case belongs to: length | live | threads
    threads: int | None = None  # of the CPU, where that is not for the run to say


@dataclass
class _Entry:
    contender: Contender
    bound: Bound | None = None
    status: str = "ok"
    reason: str = ""
    verdict: Verdict | None = None


def contenders_for(case: Case, user: Sequence[Contender] = ()) -> list[Contender]:
    if isinstance(case, AttentionCase):
        return [*attention_contenders(case.device), *user]
    if isinstance(case, ModelCase):
        return model_contenders()
    if isinstance(case, WeightsCase):
        return weights_contenders()
    if isinstance(case, AdditiveCase):
        return additive_contenders()
    if isinstance(case, HeadCase):
        return head_contenders()
    return mha_contenders() if isinstance(case, MhaCase) else loss_contenders()


def run_case(
    plan: Plan,
    sentinel: Sentinel,
    rounds: int,
    max_seconds: float,
    user: Sequence[Contender] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """The records of one case, ours first. A contender that is wrong, or raises, has a status and a reason in place of
    a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads or before)
    try:
        return _run_case(plan, sentinel, rounds, max_seconds, user, tell)
    finally:
        torch.set_num_threads(before)


def _run_case(
    plan: Plan,
    sentinel: Sentinel,
    rounds: int,
    max_seconds: float,
    user: Sequence[Contender],
    tell: Callable[[str], None],
) -> list[Record]:
    case = plan.case
    suite = str(case.describe()["suite"])
    torch.compiler.reset()  # compiled peers start from nothing in each case, else shapes turn dynamic
    chosen = [
        c
        for c in contenders_for(case, user)
        if c.name == OURS
        or c in user
        or (not (c.slow_to_start or c.yardstick) if plan.peers is None else c.name in plan.peers)
    ]
    tell("checking")
    entries = _checked(case, chosen, JUDGE.get(suite, "eager"))
    calls: dict[str, Callable[[], object]] = {}
    for entry in entries:
        if entry.status == "ok" and entry.bound is not None:
            calls[entry.contender.name] = entry.bound.step
            if entry.bound.prepare is not None:
                calls[_prepare_name(entry.contender.name)] = entry.bound.prepare
    tell("timing")
    if getattr(case, "condition", None) is not None:
        max_seconds *= CONDITION_PATIENCE
    timings = measure(calls, sentinel, rounds, max_seconds) if calls and plan.timed else {}
    tell("memory")
    wanted = plan.memory | {contender.name for contender in user if plan.memory}
    measured = [e for e in entries if e.status == "ok" and e.contender.name in wanted]
    with ThreadPoolExecutor(2 if case.device == "cpu" else 1) as pool:  # fresh processes do not see each other's memory
        results = pool.map(lambda entry: _peak(case, entry), measured)
        peaks = {entry.contender.name: peak for entry, peak in zip(measured, results, strict=True)}
    counts = _counts(case)
    records = []
    for entry in entries:
        record = _record(case, entry, timings, peaks.get(entry.contender.name), counts)
        record["curve"] = plan.plots
        record["scaling"] = plan.scaling
        if plan.threads is not None:
            record["case_threads"] = plan.threads
            record["title"] += f" on {plan.threads} thread{'s' * (plan.threads > 1)}"
        records.append(record)
    return records


def _prepare_name(name: str) -> str:
    return f"{name} (mask preparation)"


def _checked(case: Case, contenders: Sequence[Contender], judge: str) -> list[_Entry]:
    """Binds and checks every contender. The judge goes first: its error is part of the others' bound."""
    check = Check(checked_form(case))
    entries = [_Entry(contender) for contender in contenders]
    peers = {c.name for c in contenders_for(case)} - {OURS, *OUR_BACKENDS}
    for entry in sorted(entries, key=lambda e: e.contender.name != judge):
        contender = entry.contender
        reason = contender.why_not(case)
        if reason is not None:
            entry.status, entry.reason = "unavailable", reason
            continue
        try:
            if contender.yardstick:
                entry.bound = contender.bind(case)
                continue
            results = contender.bind(checked_form(case)).results()
            if contender.name == judge:
                check.set_peer(results)
            entry.verdict = check.judge(results, by_torch=contender.name in peers)
            del results
            entry.bound = contender.bind(case)
            trouble = entry.verdict.message or _dropout_trouble(case, contender)
        except Exception as error:  # a contender's code may raise anything; the others go on
            entry.status, entry.reason = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        if trouble:
            entry.status, entry.reason = "failed check", trouble
    return entries


def _dropout_trouble(case: Case, contender: Contender) -> str:
    if not isinstance(case, AttentionCase) or case.mask != "dropout":
        return ""
    torch.manual_seed(0)
    bound = contender.bind(replace(case, mask=DROPOUT_OF_ONES, backward=False))
    with torch.no_grad():
        out = bound.forward()
    assert isinstance(out, Tensor)
    return check_dropout(out)


def _counts(case: Case) -> Record:
    """The work of a step: useful and executed FLOPs, or bytes."""
    if isinstance(case, AttentionCase):
        inputs = attention_inputs(case)
        useful, executed = attending_pairs(case, inputs), executed_pairs(case, inputs)
        everything = case.batch * case.heads_q * case.len_q * case.len_k
        return {
            "useful_flop": attention_flops(case, useful),
            "executed_flop": attention_flops(case, executed),
            "dense_flop": attention_flops(case, everything),
            "attending_pairs": useful,
            "attending_share": useful / everything if everything else 0.0,
            "bytes": attention_bytes(case, inputs),
        }
    if isinstance(case, MhaCase):
        return {"useful_flop": mha_flops(case)}
    if isinstance(case, WeightsCase):
        return {"useful_flop": weights_flops(case)}
    if isinstance(case, AdditiveCase):
        return {"elements": additive_elements(case)}
    if isinstance(case, HeadCase):
        return {"useful_flop": head_flops(case, head_inputs(case))}
    if isinstance(case, ModelCase):
        pictures = case.model in PICTURES
        items = case.batch * (1 if pictures else case.new_tokens or int(lengths_of(case).sum()) // case.batch)
        return {"items": items, "item": "pictures" if pictures else "tokens"}
    return {"bytes": loss_bytes(case, loss_inputs(case))}


def _record(
    case: Case,
    entry: _Entry,
    timings: dict[str, Timing],
    peak: memory.PeakMemory | str | None,
    counts: Record,
) -> Record:
    name = entry.contender.name
    record: Record = {
        "record": "result",
        **case.describe(),
        "title": case.title,
        "contender": name,
        "status": entry.status,
        "reason": entry.reason,
        "errors": None if entry.verdict is None else entry.verdict.errors,
        "worst_error": None if entry.verdict is None else entry.verdict.worst,
        **counts,
    }
    record["condition"] = None
    timing = timings.get(name)
    if timing is not None:
        record["time"] = timing.summary()
        if not entry.contender.yardstick:
            record.update(_rates(timing, counts, ours=name == OURS))
        preparation = timings.get(_prepare_name(name))
        if preparation is not None:
            record["prepare"] = preparation.summary()
            record["with_prepare_s"] = timing.median + preparation.median
        ours = timings.get(OURS)
        if name != OURS and ours is not None:
            ratios = round_ratios(timing, ours)
            record["ratio"] = {**percentiles(ratios), "rounds": [float(f"{r:.4g}") for r in ratios]}
            if entry.bound is not None and entry.bound.bytes:
                record["bytes_per_s"] = entry.bound.bytes / timing.median
                record["copy_share"] = percentiles([r * counts["bytes"] / entry.bound.bytes for r in ratios])
        if name == PROJECTIONS and STOCK in timings:  # what a layer could reach whose attention took no time
            record["limit"] = percentiles(round_ratios(timings[STOCK], timing))
    condition = getattr(case, "condition", None)
    if isinstance(condition, Condition) and condition.peer == name:
        measured = record["ratio"]["median"] if "ratio" in record else None
        record["condition"] = {
            "promise": f"at least {condition.at_least:g} × {name}",
            "at_least": condition.at_least,
            "measured": measured,
            "pass": measured is not None and measured >= condition.at_least,
        }
    if isinstance(peak, memory.PeakMemory):
        record["memory"] = asdict(peak)
    elif peak is not None:
        record["memory_reason"] = peak
    return record


def _rates(timing: Timing, counts: Record, ours: bool) -> Record:
    rates: Record = {}
    if "useful_flop" in counts:
        rates["useful_flops"] = counts["useful_flop"] / timing.median
        rates["sentinel_share"] = timing.sentinel_share(counts["useful_flop"])
        if ours:
            rates["sentinel_spread"] = percentiles(timing.sentinel_shares(counts["useful_flop"]))
    if ours and "executed_flop" in counts:  # what a peer executes is its own affair
        rates["executed_flops"] = counts["executed_flop"] / timing.median
    if "items" in counts:
        rates["items_per_s"] = counts["items"] / timing.median
    if "bytes" in counts and "useful_flop" not in counts:
        rates["bytes_per_s"] = counts["bytes"] / timing.median
    if "elements" in counts:
        rates["elements_per_s"] = percentiles([counts["elements"] / s for s in timing.used()])
    return rates


def _peak(case: Case, entry: _Entry) -> memory.PeakMemory | str:
    if case.device == "cuda":
        assert entry.bound is not None
        return memory.measure_here(entry.bound.step, torch.device(case.device))
    kind = type(case).__name__
    return memory.measure_fresh({"kind": kind, "case": asdict(case), "contender": entry.contender.name})


def memory_job(**job: Any) -> tuple[Callable[[], object], torch.device]:
    """The step that a fresh process measures: of a case and a contender, or a training step of the SimMIM run."""
    if job["kind"] == "SimMIM":
        from fastattn.bench.simmim import memory_step

        return memory_step(**job["settings"]), torch.device("cpu")
    fields = {**job["case"]}
    fields.pop("condition", None)
    case = {kind.__name__: kind for kind in get_args(Case)}[job["kind"]](**fields)
    known = {contender.name: contender for contender in contenders_for(case)}
    name = job["contender"]
    contender = known[name] if name in known else user_contender(name)
    return contender.bind(case).step, torch.device(case.device)
