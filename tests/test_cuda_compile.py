"""Every CUDA source, compiled by nvcc for GPUs that need not be there, and what came out of the compiler.

Checked: no warnings, registers spilled within what is allowed here, the instructions that make each path what it is,
and that no wgmma was serialised (ptxas C75xx). How much dynamic shared memory a launch asks for is held to the limit of
each capability by the emulator (tests/test_cuda.py). Results are kept in build/cuda-compile, by what went into them.
"""

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda-compile"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xptxas", "-v")
STATIC_SHARED_LIMIT = 48 * 1024

# Bytes that a kernel may spill, by (source, architecture): outside of its loop over tiles, or rare in it.
SPILL_ALLOWANCE: dict[tuple[str, str], int] = {
    ("attention_forward_hopper", "90a"): 96,  # at head dim 64, in the load warps: 32 registers
    # At head dim 192 with bias or dropout, and 96.
    ("attention_backward_dkv", "80"): 16,
    ("attention_backward_dkv", "90a"): 132,
    ("attention_backward_float32", "80"): 24,  # with bias or dropout at head dims 128 and 256
}

# What must be among the instructions of a source. The loads of the portable path overlap with computing (LDGSTS is
# cp.async), its products and those of the Hopper path are of tensor cores (HMMA is mma, HGMMA wgmma, UTMALDG TMA).
INSTRUCTIONS = {
    "attention_forward": ("HMMA", "LDGSTS", "LDSM"),
    "attention_backward_dq": ("HMMA", "LDGSTS", "LDSM"),
    "attention_backward_dkv": ("HMMA", "LDGSTS", "LDSM"),
    "attention_forward_hopper": ("HGMMA", "UTMALDG"),
    "attention_backward_hopper_dkv": ("HGMMA", "UTMALDG"),
    "attention_backward_hopper_dq": ("HGMMA", "UTMALDG"),
    "attention_backward_hopper_short": ("HGMMA", "UTMALDG"),
    "attention_backward_short": ("HMMA", "LDSM"),
    "masked_loss": (r"LDG\.E\.128",),
}

# These take seconds; the others minutes.
QUICK = {
    *("attention_backward", "attention_backward_delta", "attention_backward_hopper", "attention_backward_hopper_dkv"),
    *("attention_backward_hopper_dq", "attention_backward_hopper_short", "attention_forward_hopper", "mask_tiles"),
    *("masked_loss", "platform"),
}


def problems():
    for source in sorted(FOLDER.glob("*.cu")):
        architectures = ["90a"] if "hopper" in source.stem else ["80", "90a"]
        if source.stem in QUICK | {"attention_forward"} and "hopper" not in source.stem:
            # 10.0 runs what 8.0 runs: a part of the sources shows that its compiler takes them.
            architectures.append("100")
        for architecture in architectures:
            quick = source.stem in QUICK and architecture != "100"
            yield pytest.param(source, architecture, marks=() if quick else pytest.mark.slow)


@cache
def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = (
        shutil.which(str(name)) for name in ("nvcc", *(f"{home}/bin/nvcc" for home in (*homes, "/usr/local/cuda")))
    )
    return next((path for path in found if path), None)


@cache
def known_architectures():
    listing = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"compute_(\d+)", listing))


@cache
def find_cuobjdump():
    """From the toolkit, or the copy that Triton carries."""
    triton = find_spec("triton")
    folders = (
        [Path(location, "backends", "nvidia", "bin") for location in triton.submodule_search_locations]
        if triton
        else []
    )
    path = os.pathsep.join((*map(str, folders), str(Path(find_nvcc()).parent), os.environ.get("PATH", os.defpath)))
    return shutil.which("cuobjdump", path=path)


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack: int
    spilled: int
    shared: int


def kernels_of(report):
    """The kernels of what `ptxas -v` printed."""
    for part in re.split(r"Compiling entry function '", report)[1:]:
        stack, *spills = map(
            int, re.search(r"(\d+) bytes stack.*?(\d+) bytes spill stores, (\d+) bytes", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        yield Kernel(part[: part.index("'")], registers, stack, max(spills), int(shared[1]) if shared else 0)


def compiled(source, architecture):
    """(what the compiler printed, the cubin)"""
    digest = hashlib.sha256(subprocess.run([find_nvcc(), "--version"], capture_output=True, check=True).stdout)
    for file in (*sorted((ROOT / "csrc" / "core").glob("*.h")), *sorted(FOLDER.glob("*.h")), source):
        digest.update(file.name.encode() + file.read_bytes())
    digest.update(repr((FLAGS, architecture)).encode())
    cubin = CACHE / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        for stale in CACHE.glob(f"{source.stem}-{architecture}-*"):
            stale.unlink()
        code = f"--generate-code=arch=compute_{architecture},code=[sm_{architecture}]"
        command = [find_nvcc(), *FLAGS, "-cubin", code, str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        report.write_text(done.stdout + done.stderr)
    return report.read_text(), cubin


@pytest.mark.parametrize("source, architecture", list(problems()), ids=lambda value: getattr(value, "stem", value))
def test_sources_compile(source, architecture):
    if find_nvcc() is None:
        pytest.skip("no nvcc, on PATH or in CUDA_HOME or /usr/local/cuda")
    if architecture.rstrip("a") not in known_architectures():
        pytest.skip(f"this nvcc does not know compute_{architecture}")
    report, cubin = compiled(source, architecture)
    assert not re.search(r"\bC75\d\d\b", report), report
    assert "warning" not in report, report
    kernels = list(kernels_of(report))
    allowed = SPILL_ALLOWANCE.get((source.stem, architecture), 0)
    for kernel in kernels:
        print(f"{kernel.name}: {kernel.registers} registers, {kernel.spilled} bytes spilled")
        assert kernel.spilled <= allowed, f"{kernel.name} spills {kernel.spilled} bytes"
        assert kernel.shared <= STATIC_SHARED_LIMIT, kernel.name
    wanted = INSTRUCTIONS.get(source.stem, ())
    assert kernels or not wanted, "no kernel came out"
    if not wanted:
        return
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump to read the instructions, in the toolkit or in Triton's wheel")
    listing = subprocess.run([find_cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for instruction in wanted:
        assert re.search(rf"\b{instruction}\b", listing), f"no {instruction} in {source.name} for sm_{architecture}"


@pytest.mark.slow
def test_softmax_overlaps_with_the_product_in_the_hopper_forward():
    """ptxas may move the wait for P V in front of the exponentials that should run beside it: no error, only slow."""
    if find_nvcc() is None or find_cuobjdump() is None:
        pytest.skip("no nvcc or no cuobjdump")
    _, cubin = compiled(FOLDER / "attention_forward_hopper.cu", "90a")
    listing = subprocess.run([find_cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = [
        part for part in listing.split("Function : ")[1:] if "attention_forward_hopper_kernel" in part.split()[0]
    ]
    assert kernels
    for kernel in kernels:
        scores_waited = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", kernel)
        assert scores_waited, "one product is left in flight"
        overlapped = re.split(r"WARPGROUP\.DEPBAR", kernel[scores_waited.end() :])[0]
        assert overlapped.count("MUFU.EX2") > 32, kernel.split()[0]


def test_a_spill_would_be_seen():
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    512 bytes stack frame, 96 bytes spill stores, 128 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 512 bytes cumulative stack size, 64 bytes smem, 360 bytes cmem[0]
"""
    assert list(kernels_of(report)) == [Kernel("_Z1kPf", 32, 512, 128, 64)]
