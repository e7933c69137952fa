"""What the examples share: the device they run on, their progress bar, and errors of one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class InputError(click.ClickException):
    """Input that an example cannot use: one line on stderr, exit code 2."""

    exit_code = 2


def console() -> Console:
    """For what an example says. Outside a terminal rich would wrap at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def progress(title: str, steps: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar of `steps`, of which `done` are done. Yields what to call after each step, with a few words.

    Drawn on a terminal only.
    """
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    # On stderr, so that what the example says can be piped.
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(title, total=steps, completed=done, words="")

        def advance(words: str) -> None:
            bar.update(task, advance=1, words=words)

        yield advance


def schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int, end: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate goes up over the first steps, then down in a line to the share `end` of it after the last."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup_steps, 1 + end - step / steps)
    )


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; an `InputError` names a file that is missing, not text, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8") from error
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def read_prose(path: Path | None, fewest: int) -> list[str]:
    """The paragraphs of a file, or, without one, of the Python documentation in the standard library; none twice.

    Of the documentation only what is prose: no headings, grammar or code. An `InputError` where there are less than
    `fewest`.
    """
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics.values())
    else:
        text = read_text(path)
    paragraphs = list(dict.fromkeys(" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()))
    if path is None:
        paragraphs = [p for p in paragraphs if re.match(r"[*\"A-Z].*[.:]$", p) and not re.search(r"::=|>>>", p)]
    if len(paragraphs) < fewest:
        raise InputError(
            f"{path} must hold at least {fewest} different paragraphs, with blank lines between, got {len(paragraphs)}"
        )
    return paragraphs


def check_writable(path: str | Path) -> None:
    """An `InputError` before the work rather than after it, when `path` cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory; expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.absolute().parent}")


def run(command: click.Command, arguments: list[str] | None = None) -> None:
    """Run an example's command; bad options and bad input end it with one line on stderr and exit code 2."""
    try:
        command.main(args=arguments, standalone_mode=False)
    except click.ClickException as error:
        print(f"{command.name}: {' '.join(error.format_message().split())}", file=sys.stderr)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
