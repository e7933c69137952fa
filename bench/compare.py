"""Two runs beside each other, and the table of the README.

``python -m fastattn.bench.compare OLD NEW`` tells where NEW is slower; ``python -m fastattn.bench.compare --readme
README.md RESULTS`` writes the measured table of RESULTS. Two runs are compared by their ratios to the peers of the same
run, never in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from fastattn.bench import records as recording
from fastattn.bench import tables
from fastattn.bench.contenders import OURS
from fastattn.bench.records import Record

TOLERATED = 0.9  # slower than this share of before is a regression
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def speeds(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """How many times faster than each peer we were, by case and peer."""
    return {
        (r["title"], r["contender"]): r["ratio"]["median"] for r in records if r["record"] == "result" and "ratio" in r
    }


def regressions(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """One line for each case of both runs in which we lost against a peer."""
    before, after = speeds(old), speeds(new)
    return [
        f"{title}, beside {peer}: {before[title, peer]:.2f} × then, {after[title, peer]:.2f} × now"
        for title, peer in before
        if (title, peer) in after and after[title, peer] < TOLERATED * before[title, peer]
    ]


def markdown(records: Sequence[Record]) -> str:
    """The table of a run: our time, speed and memory in each case, and the ratio to each peer."""
    first = records[0]
    machine = f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}"
    lines = [f"`{first['command']}` on {machine}:", ""]
    lines += ["| case | time | useful | memory | beside |", "|---|---|---|---|---|"]
    for ours in (r for r in records if r["record"] == "result" and r["contender"] == OURS and "time" in r):
        peers = [
            f"{r['ratio']['median']:.2f} × {r['contender']}"
            for r in records
            if r["record"] == "result" and r["title"] == ours["title"] and "ratio" in r
        ]
        speed = tables.cell(ours, "GB/s") + " GB/s" if ours["suite"] == "loss" else tables.cell(ours, "useful")
        time = tables.seconds(ours["time"]["median_s"])
        lines.append(f"| {ours['title']} | {time} | {speed} | {tables.cell(ours, 'memory')} | {', '.join(peers)} |")
    lines += [f"\nSimMIM: {tables.simmim_findings(r)}." for r in records if r["record"] == "simmim"]
    return "\n".join(lines)


def write_readme(readme: Path, records: Sequence[Record]) -> None:
    """Replaces what stands between the two marks. A ValueError tells when they, or records, are not there."""
    if not records:
        raise ValueError(f"no records to write into {readme}")
    text = readme.read_text()
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        raise ValueError(f"{readme} has no {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    readme.write_text(f"{head}{BEGIN}\n{markdown(records)}\n{END}{tail}")


@click.command()
@click.argument("results", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Write the table there.")
def main(results: tuple[Path, ...], readme: Path | None) -> None:
    """Compare two runs (OLD NEW), or write the measured table of one into a README."""
    wanted = 2 if readme is None else 1
    if len(results) != wanted:
        raise click.UsageError(f"expected {wanted} files of JSON lines, got {len(results)}")
    try:
        runs = [recording.read(path) for path in results]
        if readme is not None:
            write_readme(readme, runs[0])
            return
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    lost = regressions(*runs)
    for line in lost or ["no regression"]:
        click.echo(line)
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
