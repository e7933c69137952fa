"""Timing on machines that are shared and change their speed.

The contenders are interleaved, A B A B, so that a slow spell hits all of them. A matrix product of known size, the
sentinel, is timed before and after every sample; a sample whose sentinel ran at less than 90 % of the best one was
taken while the machine was busy with something else, and is dropped. Ratios are formed round by round from samples
taken next to each other.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

SENTINEL_SHARE = 0.9  # a sample is kept when its sentinel reached this share of the best one
MIN_KEPT = 3  # with fewer kept samples than this all are used, and the result is marked noisy
MIN_SAMPLE_SECONDS = 4e-3  # shorter calls are repeated within a sample
GRAPH_BELOW_SECONDS = 1e-3  # CUDA calls shorter than this are also timed through a graph, without what the host adds


@dataclass(frozen=True)
class Timing:
    """The samples of one contender, one a round.

    ``seconds`` per call, ``sentinel`` in FLOP/s (the slower of the two around the sample), ``kept`` by the rule above,
    ``calls`` in each sample. ``cold_seconds`` is the figure of the CUDA graph with a cold L2, where there is one.
    """

    seconds: tuple[float, ...]
    sentinel: tuple[float, ...]
    kept: tuple[bool, ...]
    calls: int = 1
    cold_seconds: float | None = None

    @property
    def noisy(self) -> bool:
        return sum(self.kept) < MIN_KEPT

    def used(self) -> list[float]:
        """Seconds of the samples that count."""
        return [s for s, keep in zip(self.seconds, self.kept, strict=True) if keep or self.noisy]

    @property
    def median(self) -> float:
        return percentile(self.used(), 50)

    def sentinel_share(self, flops: float) -> float:
        """The median of `sentinel_shares`."""
        return percentile(self.sentinel_shares(flops), 50)

    def sentinel_shares(self, flops: float) -> list[float]:
        """``flops`` a call over the sentinel's FLOP/s at that moment: figures that travel between machines."""
        pairs = zip(self.seconds, self.sentinel, self.kept, strict=True)
        return [flops / s / rate for s, rate, keep in pairs if keep or self.noisy]

    def summary(self) -> dict[str, object]:
        """The record of this timing: percentiles and every raw sample."""
        used = self.used()
        return {
            "median_s": percentile(used, 50),
            "p20_s": percentile(used, 20),
            "p80_s": percentile(used, 80),
            "cold_l2_graph_s": self.cold_seconds,
            "rounds": len(self.seconds),
            "kept": sum(self.kept),
            "noisy": self.noisy,
            "calls_per_sample": self.calls,
            "samples_s": [float(f"{s:.6g}") for s in self.seconds],
            "sentinel_flops": [float(f"{s:.5g}") for s in self.sentinel],
        }


def percentile(values: Sequence[float], q: float) -> float:
    """Percentile ``q`` in [0, 100] with linear interpolation."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), q))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """What a record keeps of a series."""
    return {"median": percentile(values, 50), "p20": percentile(values, 20), "p80": percentile(values, 80)}


def keep_samples(sentinel: Sequence[Sequence[float]], share: float = SENTINEL_SHARE) -> list[list[bool]]:
    """Which samples to keep: those whose sentinel reached ``share`` of the best of all contenders and rounds."""
    best = max((rate for series in sentinel for rate in series), default=0.0)
    return [[rate >= share * best for rate in series] for series in sentinel]


def round_ratios(peer: Timing, ours: Timing) -> list[float]:
    """How many times longer ``peer`` took than ``ours``, round by round, over the rounds where both samples count."""
    rounds = list(zip(peer.seconds, peer.kept, ours.seconds, ours.kept, strict=True))
    both = [p / o for p, keep_p, o, keep_o in rounds if keep_p and keep_o]
    return both if len(both) >= MIN_KEPT else [p / o for p, _, o, _ in rounds]


class Sentinel:
    """A float32 matrix product whose speed tells how much of the machine we have at this moment."""

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.device = device
        n = size or (1024 if device.type == "cpu" else 4096)
        generator = torch.Generator(device=device).manual_seed(0)
        self._a = torch.randn(n, n, device=device, generator=generator)
        self._b = torch.randn(n, n, device=device, generator=generator)
        self._out = torch.empty_like(self._a)
        self._flops = 2.0 * n**3
        for _ in range(3):
            self.rate()

    def rate(self) -> float:
        """Runs the product once and returns its FLOP/s."""
        return self._flops / seconds_of(lambda: torch.mm(self._a, self._b, out=self._out), 1, self.device)


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call of ``calls`` calls in a row: the wall clock on a CPU, CUDA events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def cold_graph_seconds(call: Callable[[], object], device: torch.device, calls: int = 20, rounds: int = 5) -> float:
    """Seconds per call on a GPU without launch overhead and without a warm L2.

    Two CUDA graphs are replayed in turn: one overwrites a buffer twice the size of the L2 before each call, the other
    only overwrites it; the difference is the call.
    """
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)

    def capture(with_call: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                flush.zero_()
                if with_call:
                    call()
        return graph

    # Capture must not meet first-call work such as library handles or autotuning, and those must not happen on the
    # default stream.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    both, only_flush = capture(True), capture(False)
    differences = []
    for _ in range(rounds + 1):
        slow = seconds_of(both.replay, 1, device)
        differences.append((slow - seconds_of(only_flush.replay, 1, device)) / calls)
    return percentile(differences[1:], 50)  # the first round is the warm-up


def measure(
    calls: Mapping[str, Callable[[], object]],
    sentinel: Sentinel,
    rounds: int = 5,
    max_seconds: float = 30.0,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Times the contenders against each other.

    Args:
        calls: name to a function that does one step; it has been called before, so that nothing is compiled here.
        sentinel: the matrix product to hold the samples against.
        rounds: how many samples of each are wanted after dropping. While some are dropped, more rounds are run,
            up to six times as many or until ``max_seconds`` have passed; never fewer than ``rounds`` in all.
        on_round: called with the number of each finished round.
    """
    device = sentinel.device
    repeat: dict[str, int] = {}
    for name, call in calls.items():
        once = seconds_of(call, 1, device)
        repeat[name] = max(1, min(1000, int(np.ceil(MIN_SAMPLE_SECONDS / max(once, 1e-7)))))

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(6 * rounds):
            before = sentinel.rate()
            for name, call in calls.items():
                taken = seconds_of(call, repeat[name], device)
                after = sentinel.rate()
                seconds[name].append(taken)
                rates[name].append(min(before, after))
                before = after
            if on_round is not None:
                on_round(number + 1)
            enough = min((sum(series) for series in keep_samples(list(rates.values()))), default=0) >= rounds
            if number + 1 >= rounds and (enough or time.perf_counter() - start > max_seconds):
                break
    finally:
        if gc_was_on:
            gc.enable()

    kept = dict(zip(rates, keep_samples(list(rates.values())), strict=True))
    result = {}
    for name, call in calls.items():
        short = device.type == "cuda" and percentile(seconds[name], 50) < GRAPH_BELOW_SECONDS
        result[name] = Timing(
            seconds=tuple(seconds[name]),
            sentinel=tuple(rates[name]),
            kept=tuple(kept[name]),
            calls=repeat[name],
            cold_seconds=_cold_or_none(call, device) if short else None,
        )
    return result


def _cold_or_none(call: Callable[[], object], device: torch.device) -> float | None:
    try:
        return cold_graph_seconds(call, device)
    except RuntimeError:  # a contender that cannot be captured has its eager figure only
        torch.cuda.synchronize(device)
        return None
