"""How figures are written, and the table of a case: shared by the terminal and the report."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.bench.contenders import OURS
from fastattn.bench.records import Record

COLUMNS = {
    "attention": ("time", "useful", "executed", "÷ sentinel", "fastattn is", "mask prep.", "memory", "error"),
    "weights": ("time", "useful", "÷ sentinel", "fastattn is", "memory", "error"),
    "mha": ("time", "useful", "÷ sentinel", "fastattn is", "memory", "error"),
    "loss": ("time", "GB/s", "fastattn is", "memory", "error"),
    "additive": ("time", "a second", "fastattn is", "memory", "error"),
    "head": ("time", "useful", "÷ sentinel", "fastattn is", "memory", "error"),
    "transformers": ("time", "a second", "fastattn is", "memory", "error"),
}
SCALING_COLUMNS = ("time", "a pair", "useful", "÷ sentinel", "fastattn is", "error")
MEMORY_COLUMNS = ("memory", "error")
SPEED = {  # of these columns
    "attention": "useful",
    "weights": "useful",
    "mha": "useful",
    "loss": "GB/s",
    "additive": "a second",
    "head": "useful",
    "transformers": "a second",
}
LEGEND = (
    "time: median (p20 to p80) of a step. useful: FLOP/s over the pairs that may attend; executed: over the tiles that "
    "are run. ÷ sentinel: useful FLOP/s over that of a plain float32 matrix product at the same moment. fastattn is: "
    "how many times faster than this peer, round by round, median (p20 to p80). mask prep.: expanding or packing the "
    "mask, not part of time. a pair: time over the pairs that may attend. memory: peak beyond inputs and outputs. "
    "error: largest error against float64, over the largest magnitude. GB/s: counted elements read once, gradient "
    "written once. a second: tokens "
    "(padding does not count), pictures, or the tanh of a query, a key and a feature. ~: fewer than 3 samples were "
    "undisturbed, all are used."
)


def columns(records: Sequence[Record]) -> tuple[str, ...]:
    """Those of a table of records of one suite."""
    if records[0].get("scaling"):
        return SCALING_COLUMNS
    if any(record["status"] == "ok" for record in records) and not any("time" in record for record in records):
        return MEMORY_COLUMNS
    return COLUMNS[records[0]["suite"]]


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def spread(summary: Record) -> str:
    """Median and p20 to p80 of a timing's summary."""
    return f"{seconds(summary['median_s'])} ({seconds(summary['p20_s'])} to {seconds(summary['p80_s'])})"


def times(ratio: Record) -> str:
    """A ratio's median and p20 to p80."""
    return f"{ratio['median']:.2f} × ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def size(value: float) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def rate(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def cell(record: Record, column: str) -> str:
    """One figure of a record, as text; empty where the record has none."""
    time = record.get("time")
    if column == "error":
        worst = record.get("worst_error")
        return "" if worst is None else f"{worst:.1e}"
    if column == "memory":
        peak = record.get("memory")
        return "" if peak is None else size(peak["extra"])
    if time is None:
        return ""
    if column == "time":
        text = spread(time)
        if time["cold_l2_graph_s"] is not None:
            text += f", {seconds(time['cold_l2_graph_s'])} from a graph with cold L2"
        return ("~" if time["noisy"] else "") + text
    if column == "useful":
        return rate(record["useful_flops"]) if "useful_flops" in record else ""
    if column == "a pair":
        return f"{1e9 * time['median_s'] / record['attending_pairs']:.3g} ns"
    if column == "executed":
        return rate(record["executed_flops"]) if "executed_flops" in record else ""
    if column == "÷ sentinel":
        return f"{record['sentinel_share']:.2f}" if "sentinel_share" in record else ""
    if column == "GB/s":
        return f"{record['bytes_per_s'] / 1e9:.3g}" if "bytes_per_s" in record else ""
    if column == "a second" and "elements_per_s" in record:
        return f"{record['elements_per_s']['median'] / 1e9:.3g} G elements"
    if column == "a second":
        return (
            f"{record['items_per_s']:.3g} {record['item']}"
            if record["items_per_s"] < 1000
            else (f"{record['items_per_s'] / 1e3:.3g} k {record['item']}")
        )
    if column == "mask prep.":
        return seconds(record["prepare"]["median_s"]) if "prepare" in record else ""
    if column == "fastattn is" and "ratio" in record:
        return times(record["ratio"])
    return ""


def remark(record: Record) -> str:
    """What stands in place of the figures of a contender without any."""
    return "" if record["status"] == "ok" else f"{record['status']}: {record['reason']}"


SIMMIM_COLUMNS = ("", "time a step", "peak memory of a step", "loss, first to last step")


def simmim_row(record: Record, variant: str) -> list[str]:
    """One variant of the SimMIM run, under `SIMMIM_COLUMNS`."""
    peak, losses = record["memory"].get(variant, {}), record["losses"][variant]
    return [
        variant,
        spread(record["time_per_step"][variant]),
        size(peak["extra"]) if "extra" in peak else peak.get("reason", ""),
        f"{losses[0]:.4f} to {losses[-1]:.4f}",
    ]


def simmim_findings(record: Record) -> str:
    """The comparison of the two variants in words."""
    agreement = record["agreement"]
    return (
        f"fastattn takes a step {times(record['ratio'])} as fast. The losses of the first "
        f"{agreement['compared_steps']} steps differ by at most {agreement['largest_relative_difference']:.1e} of "
        f"their value (criterion {agreement['criterion']:g}; stock beside stock with each parameter moved by one "
        f"rounding: {agreement['noise']:.1e}; the 1e-5 that the authors add to the number of hidden pixels accounts "
        f"for {agreement['authors_denominator_offset']:.0e})"
    )


def verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def conditions(records: Sequence[Record]) -> list[Record]:
    """The records of the promised speeds; one that could not be measured has not been kept."""
    return [
        {
            "record": "condition",
            "title": record["title"],
            "contender": OURS,
            "peer": record["contender"],
            **record["condition"],
        }
        for record in records
        if record.get("condition")
    ]
