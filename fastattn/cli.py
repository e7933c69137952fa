"""The command line: `fastattn info | verify | bench | demo`.

Exit codes: 0 fine, 1 a verification failed, 2 bad usage, with a message of one line.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastattn import dispatch
from fastattn.testing.adapters import SIGNATURES, Target
from fastattn.testing.cases import DTYPES
from fastattn.testing.checks import FAIL
from fastattn.testing.report import CaseResult, Report
from fastattn.testing.runner import parse_case, resolve_target, verify

# Commands that live in the bench extra, with their one-line help: they are imported only when they run.
BENCH_COMMANDS = {
    "bench": "Measure speed and memory against torch's own attention.",
    "demo": "Train SimMIM on photographs, with and without fastattn.",
}


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return [*super().list_commands(context), *BENCH_COMMANDS]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in BENCH_COMMANDS:
            return super().get_command(context, name)
        try:
            return getattr(importlib.import_module("fastattn.bench.cli"), name)
        except ImportError as error:
            raise click.UsageError(
                f"`fastattn {name}` needs the bench extra, pip install 'fastattn[bench]': {error}"
            ) from error

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str()) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows + list(BENCH_COMMANDS.items()))


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Masked attention and masked reconstruction losses for PyTorch: what is installed, is it right, is it fast."""
    if context.invoked_subcommand is None:
        raise click.UsageError("give a command: info, verify, bench or demo (fastattn --help tells more)")


# ----------------------------------------------------------------------------------------------------------------- info


@cli.command()
def info() -> None:
    """Versions, instruction level, threads, and which backends can run."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts():
        table.add_row(f"[bold]{name}[/]", escape(value))
    _console().print(table)


def _facts() -> list[tuple[str, str]]:
    facts = [
        ("fastattn", _version()),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", f"{platform.system()} {platform.machine()}"),
    ]
    failure = dispatch.NATIVE_FAILURE
    if failure is None:
        native = dispatch.load("cpu")
        built = native.info()
        forced = " (FASTATTN_CPU_LEVEL)" if os.environ.get("FASTATTN_CPU_LEVEL") else ""
        facts += [
            ("native library", native.file),
            ("CPU level", f"{built['level']}{forced}; this CPU can run {', '.join(built['levels'])}"),
            ("compiler", built["compiler"]),
        ]
    else:
        facts += [
            ("native library", f"not there: {failure}"),
            ("", "everything runs on the reference backend, in plain PyTorch. To build the library, install a C++"),
            ("", "compiler (gcc or clang), then: pip install --force-reinstall --no-deps fastattn"),
        ]
    facts += _cuda_facts()
    facts += [
        ("OpenMP runtime", ", ".join(_openmp_runtimes()) or "none loaded"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS), {os.cpu_count()} processors"),
    ]
    problem = dispatch.Problem("attention", "cpu", torch.float32, 64)
    for name, reasons in dispatch.explain_problem(problem).reasons.items():
        facts.append((f"backend {name}", "able" if not reasons else "not able: " + "; ".join(reasons)))
    chosen = dispatch.explain_problem(problem).chosen
    facts.append(("used for CPU tensors", chosen or "none: the backend asked for in FASTATTN_BACKEND is not able"))
    return facts


def _cuda_facts() -> list[tuple[str, str]]:
    failure = dispatch.CUDA_FAILURE
    if failure is not None:
        return [
            ("CUDA library", f"not there: {failure}"),
            (
                "",
                "built where nvcc and a GPU are found; installing with FASTATTN_CUDA=on builds it, or tells why not",
            ),
        ]
    library = dispatch.load("cuda")
    built = library.info()
    if dispatch.CUDA_EMULATED:
        return [("CUDA library", f"{library.file}: emulated on the CPU (FASTATTN_CUDA_LIBRARY), for tests")]
    capabilities = ", ".join(f"{number // 10}.{number % 10}" for number in built["architectures"])
    return [("CUDA library", f"{library.file}: CUDA {built['cuda']}, built for capability {capabilities}")]


def _version() -> str:
    try:
        return metadata.version("fastattn")
    except metadata.PackageNotFoundError:
        return "not installed, run from a source tree"


def _openmp_runtimes() -> list[str]:
    """OpenMP runtimes mapped into this process: more than one would mean two thread pools."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return ["unknown on this platform"]
    names = ("libgomp", "libomp", "libiomp")
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(names))


# --------------------------------------------------------------------------------------------------------------- verify


@cli.command(name="verify")
@click.argument("target", required=False)
@click.option("--backend", help="One of our backends; the same as TARGET without a colon.")
@click.option("--cases", default=100, show_default=True, type=click.IntRange(min=1), help="Random attention problems.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the problems.")
@click.option("--case", metavar="K", help="Run only this one: 17, weights:3, additive:2 or loss:5.")
@click.option("--forward-only", is_flag=True, help="Leave the gradients out.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Every problem in this dtype.  [default: a mixture]")
@click.option(
    "--signature", type=click.Choice(SIGNATURES), help="Of module:function.  [default: by its parameter names]"
)
@click.option("--strict", is_flag=True, help="Empty rows and leaks of an SDPA-like function are failures, not notes.")
@click.option("--loss/--no-loss", default=True, show_default=True, help="Also the masked losses (our backends).")
@click.option("--device", default="cpu", show_default=True, help="Where the tensors live.")
@click.option("--small", is_flag=True, help="Smaller problems, for slow targets.")
@click.option("--interpret", is_flag=True, help="Triton kernels on the CPU, in Triton's interpreter; implies --small.")
@click.option("--emulate", is_flag=True, help="CUDA kernels on the CPU, in our emulator; implies --small.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the report there.")
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
@click.pass_context
def verify_command(
    context: click.Context,
    target: str | None,
    backend: str | None,
    cases: int,
    seed: int,
    case: str | None,
    forward_only: bool,
    dtype: str | None,
    signature: str | None,
    strict: bool,
    loss: bool,
    device: str,
    small: bool,
    interpret: bool,
    emulate: bool,
    json_path: str | None,
    verbose: bool,
) -> None:
    """Check an attention kernel against a float64 oracle.

    TARGET is one of our backends (cpu, reference, ...; by default the one that would run) or module:function, anybody's
    attention with one of two signatures:

    \b
      sdpa      f(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                  scale=None, enable_gqa=False)
      fastattn  f(query, key, value, *, mask=None, bias=None, dropout_p=0.0, scale=None,
                  return_lse=False); mask is a fastattn.Mask

    query is (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv). Parameters other than these three may be missing.
    A problem that needs a missing one, or that the function refuses by raising, counts as not supported and is listed;
    one problem in five has no mask, bias or dropout, so that every function is judged.

    The error of the output and of every gradient may be 1.5 times that of torch's own SDPA in the same dtype, plus
    rounding noise. Also checked: lse, dropout, determinism, reads outside the inputs or of uninitialised memory,
    written inputs, and two rules that SDPA does not promise: a query that may attend to nothing gives 0, and NaN in
    keys that nobody may attend to has no effect. An SDPA-like function that breaks these two gets a note; --strict
    makes it a failure.

    Exit code: 0 all passed, 1 something failed or nothing could be judged, 2 bad usage.
    """
    if target and backend:
        raise click.UsageError(f"give TARGET or --backend, not both (got {target!r} and {backend!r})")
    if backend and ":" in backend:
        raise click.UsageError(f"--backend must be one of {', '.join(dispatch.BACKENDS)}, got {backend!r}")
    if interpret:
        small = True
        if not dispatch.TRITON_INTERPRETED:
            # Triton reads the switch when it is imported, and a kernel is what it then is.
            command = [sys.executable, "-m", "fastattn", *context.find_root().obj]
            context.exit(subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"}))
        if dispatch.TRITON_FAILURE is not None:
            raise click.UsageError(f"--interpret: {dispatch.TRITON_FAILURE}")
        from fastattn.testing import triton_interpreter

        triton_interpreter.install()
    if emulate:
        small = True
        if not dispatch.CUDA_EMULATED:
            # The library is loaded when fastattn is imported.
            command = [sys.executable, "-m", "fastattn", *context.find_root().obj]
            context.exit(subprocess.call(command, env=os.environ | {"FASTATTN_CUDA_LIBRARY": _emulated_library()}))
        backend = None if target else backend or "cuda"
    try:
        resolved = _resolve(target or backend, signature, device)
        if case is not None and parse_case(case)[0] != "attention" and not resolved.own:
            raise ValueError(f"--case {case} is for our backends; {resolved.name} is an attention function")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if json_path is not None:
        _check_writable(json_path)

    report = _verify_with_progress(
        resolved,
        cases,
        seed,
        forward_only=forward_only,
        dtype=None if dtype is None else DTYPES[dtype],
        case=case,
        loss=loss,
        strict=True if strict else None,
        device=device,
        small=small,
    )
    console = _console()
    report.print(console, verbose=verbose or case is not None)
    if json_path is not None:
        Path(json_path).write_text(report.to_json() + "\n")
    context.exit(0 if report.ok else 1)


def _emulated_library() -> str:
    """Where `make emulator` leaves the CUDA kernels for the CPU."""
    if dispatch.CUDA_FAILURE is not None and os.environ.get("FASTATTN_CUDA_LIBRARY"):
        raise click.UsageError(f"--emulate: {dispatch.CUDA_FAILURE}")
    path = Path("build", "emulator", "_cuda.so").resolve()
    if not path.is_file():
        raise click.UsageError(f"--emulate: no {path}; `make emulator` in the source tree builds it")
    return str(path)


def _resolve(text: str | None, signature: str | None, device: str) -> Target:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    problem = dispatch.Problem("attention", torch.device(device).type, torch.float32, 64)
    if text is None:
        text = dispatch.explain_problem(problem).chosen
        if text is None:
            raise ValueError(f"no backend can run on device {device!r}")
    if ":" not in text:
        if signature is not None:
            raise ValueError(f"--signature is for module:function, and the target is the backend {text!r}")
        try:
            dispatch.select(problem, text)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    return resolve_target(text, signature)


def _check_writable(path: str) -> None:
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise click.UsageError(f"--json: folder {str(folder)!r} does not exist")


def _verify_with_progress(target: Target, cases: int, seed: int, **options: Any) -> Report:
    columns = (TextColumn("verifying {task.fields[target]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failures = TextColumn("[bold red]{task.fields[failed]}[/]")
    progress = Progress(*columns, failures, console=_console(), transient=True)
    with progress:
        task = progress.add_task("verify", total=None, target=target.name, failed="")
        failed = 0

        def advance(result: CaseResult, total: int) -> None:
            nonlocal failed
            failed += result.status == FAIL
            progress.update(task, total=total, advance=1, failed=f"{failed} failed" if failed else "")

        return verify(target, cases, seed, progress=advance, **options)


def _console() -> Console:
    # Outside a terminal rich would wrap tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `fastattn`: every error of usage is one line on stderr and exit code 2."""
    try:
        words = sys.argv[1:] if arguments is None else arguments
        code = cli.main(args=words, prog_name="fastattn", standalone_mode=False, obj=words)
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        command = where.command_path if where is not None else "fastattn"
        message = " ".join(error.format_message().split())
        print(f"{command}: {message}", file=sys.stderr)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
