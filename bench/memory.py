"""Peak memory of one step, beyond its inputs and outputs.

On a CPU the step runs in a fresh process: the peak of its resident set is reset (5 written to /proc/self/clear_refs)
and read back as VmHWM, because allocator statistics miss plain malloc. On a GPU it is torch's max_memory_allocated.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch import Tensor

TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class PeakMemory:
    """Bytes. ``extra`` is the rise of the peak over what was resident before the step, less ``outputs``."""

    peak: int
    extra: int
    outputs: int


def measure_here(step: Callable[[], object], device: torch.device) -> PeakMemory:
    """Measures a step in this process. Its inputs must exist already; what it returns counts as output."""
    step()  # the first call loads code and starts threads
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        before = _status_bytes("VmRSS")
        result = step()
        peak = _status_bytes("VmHWM")
    outputs = tensor_bytes(result)
    return PeakMemory(peak=peak, extra=max(0, peak - before - outputs), outputs=outputs)


def tensor_bytes(tree: object) -> int:
    """Bytes of the distinct storages of the tensors in a structure."""
    tensors = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure_fresh(job: Mapping[str, object]) -> PeakMemory | str:
    """Measures a job in a fresh process; a string says why there is no figure.

    job: the arguments of `fastattn.bench.runner.memory_job`, as JSON can hold them.
    """
    if not Path("/proc/self/clear_refs").exists():
        return "peak memory is read from /proc, which this system lacks"
    environment = dict(os.environ)
    # The same modules as here, and an allocator that gives freed blocks back, so that none of the step's memory is
    # hidden in blocks that were resident before.
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    command = [sys.executable, "-m", "fastattn.bench.memory", json.dumps({**job, "threads": torch.get_num_threads()})]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"the measuring process took more than {TIMEOUT_SECONDS} s"
    if done.returncode != 0:
        return "the measuring process failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    return PeakMemory(**json.loads(done.stdout.strip().splitlines()[-1]))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _return_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _main() -> None:
    from fastattn.bench.runner import memory_job

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job.pop("threads"))
    step, device = memory_job(**job)
    print(json.dumps(asdict(measure_here(step, device))))


if __name__ == "__main__":
    _main()
