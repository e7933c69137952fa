"""Two runs beside each other (``fastattn bench --compare OLD NEW``), and the table of the README.

Two runs are compared by what each measured beside itself, never in seconds: the ratios to the peers, and the share of
the sentinel's rate. ``python -m fastattn.bench.compare --readme README.md RESULTS`` writes the measured
table of RESULTS; the suites mha, transformers, targets and memory have a section of their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import click

from fastattn.bench import records as recording
from fastattn.bench import tables, targets
from fastattn.bench.contenders import OURS
from fastattn.bench.records import Record

TOLERATED = 0.9  # slower than this share of before is a regression
SENTINEL = "sentinel"
OWN_SECTION = ("mha", "transformers")  # suites with a table of their own in the README


def speeds(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """How fast we were, by case and yardstick: so many times a peer, or such a share of the sentinel's rate.

    Of several runs in one file the median. Left out are cases in which too few samples were undisturbed.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        time = record.get("time")
        if record.get("record") != "result" or not isinstance(time, dict) or time.get("noisy"):
            continue
        if record["contender"] == OURS:
            if record.get("sentinel_share"):
                found.setdefault((record["title"], SENTINEL), []).append(record["sentinel_share"])
        elif "ratio" in record:
            found.setdefault((record["title"], record["contender"]), []).append(record["ratio"]["median"])
    return {case: statistics.median(runs) for case, runs in found.items()}


def regressions(old: Sequence[Record], new: Sequence[Record], tolerated: float = TOLERATED) -> list[str]:
    """One line for each case and yardstick of both runs in which NEW reaches less than `tolerated` of OLD.

    A ValueError when the runs have nothing in common.
    """
    before, after = speeds(old), speeds(new)
    shared = [case for case in before if case in after]
    if not shared:
        raise ValueError("the two runs have no measured case in common")
    return [
        f"{title}, beside {yardstick}: {before[title, yardstick]:.2f} × then, {after[title, yardstick]:.2f} × now"
        for title, yardstick in shared
        if after[title, yardstick] < tolerated * before[title, yardstick]
    ]


def _kind(records: Sequence[Record]) -> str:
    """Which section of the README a run belongs to; empty for the one of the attention suite."""
    if any(r["record"] == "target" for r in records):
        return "targets"
    results = [r for r in records if r["record"] == "result"]
    if any("memory" in r for r in results) and not any("time" in r for r in results):
        return "memory"
    suites = {r["suite"] for r in results}
    own = suites.pop() if len(suites) == 1 else ""
    return own if own in OWN_SECTION else ""


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _peaks(records: Sequence[Record]) -> list[list[str]]:
    measured = [r for r in records if r["record"] == "result" and "memory" in r]
    lines = []
    for title in dict.fromkeys(r["title"] for r in measured):
        peaks = {r["contender"]: tables.cell(r, "memory") for r in measured if r["title"] == title}
        ours = peaks.pop(OURS, "")
        lines.append([title, ours, ", ".join(f"{peak} {name}" for name, peak in peaks.items())])
    return lines


def markdown(records: Sequence[Record]) -> str:
    """The table of a run: our time, speed and memory in each case, and the ratio to each peer."""
    first = records[0]
    machine = f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}"
    lines = [f"`{first['command']}` on {machine}:", ""]
    kind = _kind(records)
    if kind == "targets":
        cells = [cells for cells, _ in targets.rows([r for r in records if r["record"] == "target"])]
        return "\n".join([*lines, *_markdown_table(targets.HEADER, cells)])
    if kind == "memory":
        header = ("peak memory beyond inputs and outputs", OURS, "torch")
        return "\n".join([*lines, *_markdown_table(header, _peaks(records))])
    speeds = dict.fromkeys(tables.SPEED[r["suite"]] for r in records if r["record"] == "result")
    lines += [f"| case | time | {', '.join(speeds) or 'useful'} | memory | beside |", "|---|---|---|---|---|"]
    for ours in (r for r in records if r["record"] == "result" and r["contender"] == OURS and "time" in r):
        peers = [
            f"{r['ratio']['median']:.2f} × {r['contender']}"
            for r in records
            if r["record"] == "result" and r["title"] == ours["title"] and "ratio" in r
        ]
        speed = tables.cell(ours, tables.SPEED[ours["suite"]]) + " GB/s" * (ours["suite"] == "loss")
        time = tables.seconds(ours["time"]["median_s"])
        lines.append(f"| {ours['title']} | {time} | {speed} | {tables.cell(ours, 'memory')} | {', '.join(peers)} |")
    lines += [f"\nSimMIM: {tables.simmim_findings(r)}." for r in records if r["record"] == "simmim"]
    return "\n".join(lines)


def marks(records: Sequence[Record]) -> tuple[str, str]:
    """Between which marks of the README a run's table stands: those of its suite, where that has its own."""
    kind = _kind(records)
    name = f"measured-{kind}" if kind else "measured"
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_readme(readme: Path, records: Sequence[Record]) -> None:
    """Replaces what stands between the two marks. A ValueError tells when they, or records, are not there."""
    if not records:
        raise ValueError(f"no records to write into {readme}")
    begin, end = marks(records)
    text = readme.read_text()
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise ValueError(f"{readme} has no {begin} and {end}")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    readme.write_text(f"{head}{begin}\n{markdown(records)}\n{end}{tail}")


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="Write it there."
)
def main(results: Path, readme: Path) -> None:
    """Write the measured table of a run into a README."""
    try:
        write_readme(readme, recording.read(results))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
