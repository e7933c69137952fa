"""Records: one JSON object a line, each complete in itself."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastattn import dispatch

Record = dict[str, Any]

# What holds torch, its libraries and our kernels to an instruction level, when set before they are loaded.
LEVEL_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "FASTATTN_CPU_LEVEL")


def environment() -> Record:
    """What a figure depends on beside the code: versions, machine, threads, and the command that made it."""
    return {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": version("fastattn"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_level": cpu_level(),
        "torch_cpu_level": torch.backends.cpu.get_cpu_capability(),
        "level_variables": {name: os.environ[name] for name in LEVEL_VARIABLES if name in os.environ},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def command_line() -> str:
    """The command as a person would type it again."""
    program = Path(sys.argv[0]).name
    program = "python -m fastattn" if program == "__main__.py" else program
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_level() -> str | None:
    """The instruction-set level that the compiled kernels run at; None without them."""
    if dispatch.NATIVE_FAILURE is not None:
        return None
    return str(dispatch.load("cpu").info()["level"])


def plain(value: Any) -> Any:
    """The value as strict JSON can hold it: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(path: Path, records: Iterable[Record]) -> None:
    """Writes a JSON-lines file, with its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records))


def read(path: Path) -> list[Record]:
    """Reads a JSON-lines file. A ValueError names the line that is not a record."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is not a JSON object")
        records.append(record)
    return records
