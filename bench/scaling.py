"""How time grows: with the sequence length, with the share of the keys that are no padding, and with the threads.

A kernel that skips what may not attend takes time in proportion to the attending pairs: its time a pair is flat.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

from fastattn.bench.contenders import OURS
from fastattn.bench.runner import Plan
from fastattn.bench.workloads import AttentionCase, attention_flops

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
QUICK_LENGTHS = (256, 1024, 4096)
HEADS, DIM, WINDOW = 2, 64, 256  # as few heads as leave a pair of threads work in SDPA's backward
LIVE_LENGTH = 4096
THREADS_CASE = AttentionCase(2, 8, 8, 2048, 2048, DIM)
# A second or two on two cores. A peer with more to do is left out; ours is timed once beside its warm-up.
AFFORDABLE_FLOP, QUICK_FLOP = 3e11, 5e10
AFFORDABLE_MASK = 1 << 28  # bytes of the bool mask that SDPA is given
SECONDS, QUICK_SECONDS = 3.0, 0.5


def scaling_plans(quick: bool, cores: int | None = None) -> list[Plan]:
    """The cases of the three curves. cores: up to how many threads; all when not given."""
    steps = (True,) if quick else (False, True)
    plans = []
    for mask, backward, length in product(("dense", "causal", "window"), steps, QUICK_LENGTHS if quick else LENGTHS):
        window = WINDOW if mask == "window" else None
        case = AttentionCase(1, HEADS, HEADS, length, length, DIM, mask, backward=backward, window=window)
        plans.append(_plan(case, "length", quick))
    eighths = (2, 4, 8) if quick else range(1, 9)
    for backward, live in product(steps, eighths):
        case = AttentionCase(1, HEADS, HEADS, LIVE_LENGTH, LIVE_LENGTH, DIM, "padded", backward=backward, live=live / 8)
        plans.append(_plan(case, "live", quick))
    for mask, threads in product(("dense", "causal"), _thread_counts(cores or os.cpu_count() or 1)):
        case = replace(THREADS_CASE, mask=mask, backward=True)
        plans.append(replace(_plan(case, "threads", quick), threads=threads))
    return plans


def _plan(case: AttentionCase, scaling: str, quick: bool) -> Plan:
    limit = QUICK_FLOP if quick else AFFORDABLE_FLOP
    pairs = case.batch * case.heads_q * case.len_q * case.len_k
    share = {"causal": 0.5, "window": min(1.0, 2 * WINDOW / case.len_k), "padded": case.live}.get(case.mask, 1.0)
    ours = share * attention_flops(case, pairs)
    sdpa = ours if case.mask == "causal" else attention_flops(case, pairs)  # it skips nothing of a bool mask
    small_mask = case.mask != "window" or case.len_q * case.len_k <= AFFORDABLE_MASK
    return Plan(
        case,
        frozenset({"sdpa"} if sdpa <= limit and small_mask else {OURS}),
        rounds=3 if ours <= limit else 1,
        seconds=QUICK_SECONDS if quick else SECONDS,
        scaling=scaling,
    )


def _thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({1 << n for n in range(cores.bit_length()) if 1 << n <= cores} | {cores})
