"""The commands `fastattn bench` and `fastattn demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastattn.bench import compare as comparison
from fastattn.bench import models, report, runner, scaling, simmim, suites, tables, targets
from fastattn.bench import records as recording
from fastattn.bench.contenders import OURS, Contender, user_contender
from fastattn.bench.images import photographs, read_directory
from fastattn.bench.records import Record
from fastattn.bench.timing import Sentinel
from fastattn.bench.workloads import MASK_KINDS

SUITES = ("attention", "mha", "additive", "loss", "simmim", "transformers", "targets", "scaling", "memory", "all")
DTYPES = ("float32", "bfloat16", "float16", "float64")
WIDTH_WITHOUT_TERMINAL = 190
QUICK_ROUNDS, FULL_ROUNDS = 5, 9
QUICK_SECONDS, FULL_SECONDS = 6.0, 60.0  # a case gets this long to make up for disturbed samples


class BadOption(click.ClickException):
    """Bad usage: one line that names the option and what was seen, exit code 2."""

    exit_code = 2

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {' '.join(message.split())}")


def parse_shapes(text: str) -> list[suites.Shape]:
    """``B,Hq[/Hkv],L[xS],D;...`` to (B, Hq, Hkv, L, S, D) each."""
    shapes = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        fields = item.split(",")
        try:
            batch, heads, lengths, dim = fields
            heads_q, _, heads_kv = heads.partition("/")
            len_q, _, len_k = lengths.partition("x")
            numbers = [int(n) for n in (batch, heads_q, heads_kv or heads_q, len_q, len_k or len_q, dim)]
        except ValueError:
            raise BadOption("--shapes", f"expected B,Hq[/Hkv],L[xS],D separated by ';', got {item!r}") from None
        if min(numbers) < 1:
            raise BadOption("--shapes", f"every size must be at least 1, got {item!r}")
        if numbers[1] % numbers[2]:
            raise BadOption("--shapes", f"Hq must be a multiple of Hkv, got {item!r}")
        shapes.append((numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]))
    if not shapes:
        raise BadOption("--shapes", f"expected B,Hq[/Hkv],L[xS],D separated by ';', got {text!r}")
    return shapes


def parse_masks(text: str, accepted: Sequence[str]) -> list[str]:
    masks = [part.strip() for part in text.split(",") if part.strip()]
    for mask in masks or [text]:
        if mask not in accepted:
            raise BadOption("--masks", f"expected some of {', '.join(accepted)}, got {mask!r}")
    return masks


def _simmim_settings(steps: int | None, size: int | None, seed: int | None) -> simmim.Settings:
    given = {"steps": steps, "size": size, "seed": seed}
    settings = simmim.Settings(**{name: value for name, value in given.items() if value is not None})
    if settings.steps < 1:
        raise BadOption("--steps", f"must be at least 1, got {settings.steps}")
    if settings.size < simmim.MASK_PATCH or settings.size % simmim.MASK_PATCH:
        raise BadOption("--size", f"must be a multiple of {simmim.MASK_PATCH}, got {settings.size}")
    if settings.seed < 0:
        raise BadOption("--seed", f"must not be negative, got {settings.seed}")
    return settings


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:  # a log file has no width of its own
        console = Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL)
    return console


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _check_writable(option: str, path: Path | None, directory: bool) -> None:
    """Finds out before hours of measuring, not after."""
    if path is None:
        return
    try:
        if directory:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    except OSError as error:
        raise BadOption(option, f"cannot write {path}: {error.strerror or error}") from error


@click.command("bench")
@click.argument("suite", type=click.Choice(SUITES), default="all")
@click.option("--quick", is_flag=True, help="The short suite: minutes on two cores.")
@click.option("--shapes", metavar="B,Hq[/Hkv],L[xS],D;...", help="Attention problems in place of the suite's.")
@click.option("--masks", metavar="KIND,...", help=f"Mask kinds: {', '.join(MASK_KINDS)}.")
@click.option("--dtype", type=click.Choice(DTYPES), help="float32 when not given.")
@click.option("--backward", is_flag=True, help="Forward with backward only.")
@click.option("--contender", "contenders", multiple=True, metavar="MODULE:FUNCTION", help="Attention to compare with.")
@click.option("--rounds", type=click.IntRange(min=3), help="Undisturbed samples wanted of each contender.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of both sides.  [default: torch's own]")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option("--rows", multiple=True, metavar="TEXT", help="Targets: only rows with it in their name; repeatable.")
@click.option("--repeat", type=click.IntRange(min=1), help="Targets: so many runs, each in a process of its own.")
@click.option(
    "--level", type=click.Choice(tuple(targets.LEVELS)), help="Targets: both sides held to these instructions."
)
@click.option("--steps", type=int, help="SimMIM: training steps.")
@click.option("--size", type=int, help="SimMIM: side of the crops in pixels.")
@click.option("--seed", type=int, help="SimMIM: seed of parameters, crops and masks.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write JSON lines here.")
@click.option("--report", "report_dir", type=click.Path(path_type=Path), help="Write report.html into this directory.")
@click.option(
    "--compare",
    "compared",
    nargs=2,
    metavar="OLD NEW",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: tell where NEW, written by --json, is slower than OLD. Exit code 1 if it is anywhere.",
)
@click.option(
    "--tolerated",
    type=click.FloatRange(0, 1, min_open=True),
    help=f"--compare: the share of OLD's speed that is still well. [default: {comparison.TOLERATED}]",
)
@click.pass_context
def bench(
    context: click.Context,
    suite: str,
    quick: bool,
    shapes: str | None,
    masks: str | None,
    dtype: str | None,
    backward: bool,
    contenders: tuple[str, ...],
    rounds: int | None,
    threads: int | None,
    device: str,
    rows: tuple[str, ...],
    repeat: int | None,
    level: str | None,
    steps: int | None,
    size: int | None,
    seed: int | None,
    json_path: Path | None,
    report_dir: Path | None,
    compared: tuple[Path, Path] | None,
    tolerated: float | None,
) -> None:
    """Measure throughput, time and memory beside every peer that is there.

    Every contender is checked against float64 first; one that is wrong gets no speed. Suites: attention, mha
    (layers), additive, loss, simmim, transformers (models; needs that package); targets: each CPU kernel beside torch
    with its target, met when all runs are; scaling: time over the length, the share of live keys and the threads;
    memory: the peak of training steps; all: the suites without additive, transformers, targets and memory.
    """
    if compared is not None:
        _compare(context, compared, tolerated)
        return
    if tolerated is not None:
        raise BadOption("--tolerated", "has a meaning only with --compare")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadOption("--device", "cuda was asked for, but torch sees no GPU")
    _refuse_unused(suite, {"--shapes": shapes, "--masks": masks}, ("attention", "mha", "all"))
    _refuse_unused(suite, {"--contender": contenders}, ("attention", "all"))
    _refuse_unused(suite, {"--dtype": dtype}, ("attention", "mha", "additive", "loss", "all"))
    _refuse_unused(suite, {"--steps": steps, "--size": size, "--seed": seed}, ("simmim", "all"))
    _refuse_unused(suite, {"--rows": rows, "--repeat": repeat, "--level": level}, ("targets",))
    if suite in ("targets", "scaling", "memory") and device != "cpu":
        raise BadOption("--device", f"{suite} is about the CPU, got {device!r}")
    settings = _simmim_settings(steps, size, seed)
    chosen_shapes = None if shapes is None else parse_shapes(shapes)
    chosen_masks = None if masks is None else parse_masks(masks, suites.MHA_MASKS if suite == "mha" else MASK_KINDS)
    user: list[Contender] = []
    for text in contenders:
        try:
            user.append(user_contender(text))
        except ValueError as error:
            raise BadOption("--contender", str(error)) from error
    _check_writable("--json", json_path, directory=False)
    _check_writable("--report", report_dir, directory=True)

    if threads is not None:
        torch.set_num_threads(threads)
    plans: list[runner.Plan] = []
    if suite == "targets":
        for text in rows:
            if not targets.target_plans(named=(text,)):
                raise BadOption("--rows", f"no row contains {text!r}")
        plans += targets.target_plans(quick, rows)
    if suite == "memory":
        plans += suites.memory_plans()
    if suite in ("attention", "all"):
        plans += suites.attention_plans(quick, chosen_shapes, chosen_masks, dtype, backward, device)
    if suite == "mha":
        plans += suites.mha_plans(quick, chosen_shapes, chosen_masks, dtype, device=device)
    if suite == "all":
        plans += suites.mha_plans(quick, dtype=dtype, device=device)
    if suite == "transformers":
        missing = models.why_missing()
        if missing is not None:
            raise click.UsageError(missing)
        plans += suites.model_plans(quick, device)
    if suite == "scaling" or (suite == "all" and device == "cpu"):
        plans += scaling.scaling_plans(quick, threads)
    if backward:
        plans = [plan for plan in plans if getattr(plan.case, "backward", False)]
    if suite in ("loss", "all"):
        plans += suites.loss_plans(quick, dtype, backward, device)
    if suite == "additive":
        plans += suites.additive_plans(quick, dtype, backward, device)

    pictures = _pictures(None) if suite in ("simmim", "all") else []
    console = _console()
    environment = recording.environment()
    _print_environment(console, environment)
    records: list[Record] = []
    if repeat is not None or level is not None:
        given = [*(("--rows", text) for text in rows), ("--rounds", rounds), ("--threads", threads)]
        options = [text for name, value in given if value is not None for text in (name, str(value))]
        options += ["--quick"] * quick + ["--backward"] * backward
        try:
            for run in range(1, (repeat or 1) + 1):
                console.print(f"run {run}")
                records += targets.run_fresh(options, level, run)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
        # The runs know their level; the command is the one that a person typed.
        environment = {**{name: records[0].get(name) for name in environment}, "command": environment["command"]}
        records = [{**record, "command": environment["command"]} for record in records]
    elif plans:
        records = _run_plans(console, plans, quick, rounds, user, torch.device(device))
    picture = None
    if pictures:
        outcome = _run_simmim(console, settings, pictures)
        records.append(outcome.record)
        picture = report.png(report.picture_grid(outcome.pictures))
    _finish(console, environment, records, picture, json_path, report_dir)


def _compare(context: click.Context, compared: tuple[Path, Path], tolerated: float | None) -> None:
    """Prints the regressions; exit code 1 when there are any."""
    for name, value in context.params.items():
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if given and name not in ("compared", "tolerated"):
            raise BadOption("--compare", f"measures nothing, so {value!r} has no meaning beside it")
    try:
        old, new = (recording.read(path) for path in compared)
        lost = comparison.regressions(old, new, comparison.TOLERATED if tolerated is None else tolerated)
    except ValueError as error:
        raise BadOption("--compare", str(error)) from error
    for line in lost or ["no regression"]:
        click.echo(line)
    if lost:
        raise SystemExit(1)


def _pictures(directory: Path | None) -> list[torch.Tensor]:
    try:
        return photographs() if directory is None else read_directory(directory)
    except ValueError as error:
        raise BadOption("--images", str(error)) from error


def _refuse_unused(suite: str, options: Mapping[str, object], accepted: Sequence[str]) -> None:
    for option, value in options.items():
        if value not in (None, ()) and suite not in accepted:
            raise BadOption(option, f"has no meaning for {suite!r}, only for {', '.join(accepted)}")


def _print_environment(console: Console, environment: Record) -> None:
    machine = f"{environment['cpu']}, {environment['threads']} threads"
    if environment["cpu_level"]:
        machine += f", kernels at {environment['cpu_level']}"
    if environment["gpu"]:
        machine += f", {environment['gpu']}"
    console.print(f"{machine}; fastattn {environment['version']}, torch {environment['torch']}", soft_wrap=True)


def _run_plans(
    console: Console,
    plans: Sequence[runner.Plan],
    quick: bool,
    rounds: int | None,
    user: Sequence[Contender],
    device: torch.device,
) -> list[Record]:
    default_rounds = QUICK_ROUNDS if quick else FULL_ROUNDS
    default_seconds = QUICK_SECONDS if quick else FULL_SECONDS
    sentinel = Sentinel(device)
    collected: list[Record] = []
    with _progress(console) as progress:
        task = progress.add_task("", total=len(plans))
        for plan in plans:
            title = plan.case.title

            def tell(what: str, title: str = title) -> None:
                progress.update(task, description=f"{title}: {what}")

            mine = user if str(plan.case.describe()["suite"]) == "attention" else ()
            wanted = rounds or plan.rounds or default_rounds
            found = runner.run_case(plan, sentinel, wanted, plan.seconds or default_seconds, mine, tell)
            judged = targets.judge(plan, found)
            collected += [*found, *judged]
            if judged:
                _print_row(console, found, judged)
            else:
                _print_case(console, found)
            progress.advance(task)
    if not judged:
        console.print(tables.LEGEND, style="dim", soft_wrap=True)
    return collected


def _print_row(console: Console, found: Sequence[Record], judged: Sequence[Record]) -> None:
    for cells, met in targets.rows(judged):
        console.print("  ".join(filter(None, cells)), style="green" if met else "red", soft_wrap=True, markup=False)
    for record in found:
        if tables.remark(record):
            console.print(f"{record['contender']}: {tables.remark(record)}", soft_wrap=True, markup=False)


def _print_case(console: Console, found: Sequence[Record]) -> None:
    columns = tables.columns(found)
    table = Table(title=found[0]["title"], title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("", *columns):
        table.add_column(column, overflow="fold")
    remarks = []
    for record in found:
        style = "green" if record["contender"] == OURS else None
        remark = tables.remark(record)
        if remark:
            remarks.append(f"{record['contender']}: {remark}")
        else:
            table.add_row(record["contender"], *(tables.cell(record, column) for column in columns), style=style)
    console.print(table)
    for remark in remarks:
        console.print(remark, soft_wrap=True, markup=False)


def _run_simmim(console: Console, settings: simmim.Settings, pictures: Sequence[torch.Tensor]) -> simmim.Outcome:
    with _progress(console) as progress:
        task = progress.add_task("SimMIM", total=settings.steps)

        def on_step(step: int, losses: Mapping[str, float]) -> None:
            shown = ", ".join(f"{variant} {loss:.4f}" for variant, loss in losses.items())
            progress.update(task, completed=step, description=f"SimMIM loss: {shown}")

        outcome = simmim.run(settings, pictures, on_step=on_step)
    _print_simmim(console, outcome.record)
    return outcome


def _print_simmim(console: Console, record: Record) -> None:
    table = Table(title="SimMIM on photographs", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in tables.SIMMIM_COLUMNS:
        table.add_column(column)
    for variant in simmim.VARIANTS:
        table.add_row(*tables.simmim_row(record, variant), style="green" if variant == OURS else None)
    console.print(table)
    console.print(f"{tables.simmim_findings(record)}: {tables.verdict(record['agreement']['pass'])}", soft_wrap=True)


def _finish(
    console: Console,
    environment: Record,
    records: list[Record],
    picture: bytes | None,
    json_path: Path | None,
    report_dir: Path | None,
) -> None:
    """Prints the promised speeds and writes the files. Exit code 1 when our own results were wrong."""
    promised = tables.conditions(records)
    records = [*records, *promised]
    if promised:
        table = Table(title="Promised speeds", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("case", "promise", "measured", ""):
            table.add_column(column)
        for record in promised:
            measured = "not measured" if record["measured"] is None else f"{record['measured']:.2f} ×"
            style = "green" if record["pass"] else "red"
            table.add_row(record["title"], record["promise"], measured, tables.verdict(record["pass"]), style=style)
        console.print(table)
    judged = [record for record in records if record["record"] == "target"]
    if judged:
        lines = targets.rows(judged)
        met = sum(passed for _, passed in lines)
        table = Table(title=f"Targets: {met} of {len(lines)} met", title_justify="left", title_style="bold", box=None)
        for column in targets.HEADER:
            table.add_column(column, overflow="fold")
        for cells, passed in lines:
            table.add_row(*cells, style="green" if passed else "red")
        console.print(table)
    if json_path is not None:
        recording.write(json_path, [{**environment, **record} for record in records])
        console.print(f"records: {json_path}", soft_wrap=True)
    if report_dir is not None:
        console.print(f"report: {report.write(report_dir, environment, records, picture)}", soft_wrap=True)
    wrong = [r for r in records if r.get("contender") == OURS and r.get("status") in ("failed check", "failed")]
    differ = [r for r in records if r["record"] == "simmim" and not r["agreement"]["pass"]]
    if wrong or differ:
        raise SystemExit(1)


@click.command("demo")
@click.option("--images", type=click.Path(path_type=Path), help="Directory of .png or .jpg pictures.")
@click.option("--steps", type=int, help="Training steps.")
@click.option("--size", type=int, help="Side of the crops in pixels, a multiple of 32.")
@click.option("--seed", type=int, help="Seed of parameters, crops and masks.")
@click.option(
    "--report",
    "report_dir",
    type=click.Path(path_type=Path),
    default=Path("bench-report"),
    show_default=True,
    help="Directory for report.html and simmim.png.",
)
def demo(images: Path | None, steps: int | None, size: int | None, seed: int | None, report_dir: Path) -> None:
    """Train SimMIM on pictures, with stock modules and with ours, and show what it learned to fill in.

    Without --images: on the photographs that scikit-image carries.
    """
    settings = _simmim_settings(steps, size, seed)
    pictures = _pictures(images)
    _check_writable("--report", report_dir, directory=True)
    console = _console()
    environment = recording.environment()
    _print_environment(console, environment)
    outcome = _run_simmim(console, settings, pictures)
    picture = report.png(report.picture_grid(outcome.pictures))
    _finish(console, environment, [outcome.record], picture, None, report_dir)
    console.print(f"picture: {report_dir / 'simmim.png'}", soft_wrap=True)
