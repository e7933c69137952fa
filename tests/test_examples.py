"""The examples, run briefly: each learns what its docstring says, and bad input is an error of one line."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/NAME.py` does

import common  # noqa: E402

SIMPLE = click.command(name="simple")(click.argument("path")(lambda path: print(len(common.read_text(path)))))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"", "is empty"), (b"\xff\xfe", "not a text file")]
)
def test_bad_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str) -> None:
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        common.run(SIMPLE, [str(path)])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and message in lines[0] and str(path) in lines[0]
