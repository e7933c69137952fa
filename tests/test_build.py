"""The build: one library of several instruction levels, one OpenMP runtime, safe with threads and fork, optional."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import dispatch

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("baseline", "avx2", "avx512", "avx512bf16", "neon")

needs_native = pytest.mark.skipif(
    dispatch.NATIVE_FAILURE is not None, reason=f"the native library is not there: {dispatch.NATIVE_FAILURE}"
)


def run_python(program: str, cwd: Path = ROOT, **environment: str) -> str:
    """Runs a program in a fresh process in the folder `cwd`; returns what it prints."""
    # One worker of a parallel test run must not decide for the others how many threads the program sees.
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "FASTATTN_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# Forward and backward on the native library alone. Tensors are below the 32768 elements from which torch starts threads
# of its own (and hangs in a forked child).
ATTEND = """
import torch
from fastattn import dispatch
native = dispatch.load("cpu")

def attend(seed=0, length=97):
    torch.manual_seed(seed)
    q, k, v, grad = (torch.randn(2, 4, length, 32) for _ in range(4))
    out, lse = native.attention_forward(q, k, v, None, None, 0.2, 0.0, None)
    grads = tuple(map(torch.empty_like, (q, k, v)))
    native.attention_backward(grad, None, q, k, v, out, lse, None, None, 0.2, 0.0, None, *grads, False)
    return (out, *grads)
"""


@needs_native
def test_no_symbol_leaks_from_a_wider_level() -> None:
    """A function with external linkage outside its level's namespace could replace the baseline's own at link time."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not there to read the object files")
    objects = {
        level: sorted(ROOT.glob(f"build/native-*/CMakeFiles/fastattn_cpu_{level}.dir/**/*.o")) for level in LEVELS
    }
    if not any(objects.values()):
        pytest.skip("the native library was not built in this source tree, so there are no object files to read")
    for level, files in objects.items():
        for file in files:
            listing = subprocess.run(
                [nm, "-C", "--defined-only", str(file)], capture_output=True, text=True, check=True
            )
            for line in listing.stdout.splitlines():
                match = re.match(r"[0-9a-f]+ (\S) (.*)", line)
                # Lower case is local to the object; "u" (unique), "v" and "w" (weak) are not.
                if match is None or (match[1].islower() and match[1] not in "uvw"):
                    continue
                own = match[1] == "T" and match[2].startswith(f"fastattn::cpu::{level}::")
                assert own, f"{file.name} of level {level} exports {line}"


def test_no_source_includes_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 10
    for path in sources:
        included = re.findall(
            r"^\s*#\s*include\s*[<\"]((?:torch|ATen|c10|caffe2)/.*)[>\"]", path.read_text(), re.MULTILINE
        )
        assert not included, f"{path.relative_to(ROOT)} includes {included}"


def test_only_the_bindings_know_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.name != "bindings.cpp":
            assert not re.search(r"#\s*include\s*[<\"](pybind11/|Python\.h)", path.read_text()), path.relative_to(ROOT)


@needs_native
@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="/proc tells which libraries are mapped, on Linux only"
)
def test_one_openmp_runtime() -> None:
    program = (
        ATTEND
        + """
attend()
torch.randn(500, 500) @ torch.randn(500, 500)
import re
print("\\n".join({line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(g|i|)omp\\d*[-.]", line)}))
"""
    )
    runtimes = run_python(program).split()
    assert len(runtimes) <= 1, f"several OpenMP runtimes, each with threads of its own: {runtimes}"


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc lists the threads of a process, on Linux only")
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_of_torch_are_honoured(threads: int) -> None:
    program = (
        ATTEND
        + f"""
import os
torch.set_num_threads({threads})
before = len(os.listdir("/proc/self/task"))
attend()
attend()
print(len(os.listdir("/proc/self/task")) - before)
"""
    )
    assert int(run_python(program)) == threads - 1


@needs_native
def test_omp_num_threads_is_honoured() -> None:
    program = "from fastattn import dispatch; print(dispatch.load('cpu').info()['threads'])"
    assert int(run_python(program, OMP_NUM_THREADS="1")) == 1


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child_computes() -> None:
    """After fork the threads of the parent's OpenMP are gone; waiting for them would never end."""
    program = (
        ATTEND
        + """
import os, signal
torch.set_num_threads(2)
expected = attend()
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = attend()
    os._exit(0 if all((a == b).all() for a, b in zip(found, expected)) else 1)
print(os.waitpid(child, 0)[1])
assert all((a == b).all() for a, b in zip(attend(), expected)), "the parent computes as before"
"""
    )
    assert run_python(program).strip() == "0"


@needs_native
def test_several_python_threads_at_once() -> None:
    native = dispatch.load("cpu")

    torch.manual_seed(1)
    inputs = [tuple(torch.randn(1, 2, 70 + 11 * n, 24) for _ in range(3)) for n in range(8)]

    def attend(qkv: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return native.attention_forward(*qkv, None, None, 0.2, 0.0, None)

    expected = [attend(qkv) for qkv in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(attend, inputs), expected, strict=True):
                assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@needs_native
def test_tensors_without_memory_are_refused() -> None:
    """A meta tensor has no address that a kernel could read."""
    native = dispatch.load("cpu")

    x, meta = torch.randn(1, 2, 9, 16), torch.empty(1, 2, 9, 16, device="meta")
    mask = torch.ones(x.shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="target"):
        native.masked_loss(x, meta, mask, "l2", "sum", 0, 1.0, False, 1e-6, True)
    with pytest.raises(ValueError, match="grad_loss"):
        native.masked_loss_backward_none(meta, x, x, mask, "l2", 0, 1.0, False, 1e-6)
    out, lse = native.attention_forward(x, x, x, None, None, 0.2, 0.0, None)
    with pytest.raises(ValueError, match="grad_weights"):
        weights = torch.empty(1, 9, 9, device="meta")
        native.attention_weights_backward(weights, x, x, lse, None, None, 0.2, True, 0.0, None, False)
    grads = [torch.empty_like(x) for _ in range(3)]
    with pytest.raises(ValueError, match="grad_lse"):
        native.attention_backward(
            x, lse.to("meta"), x, x, x, out, lse, None, None, 0.2, 0.0, None, *grads, need_grad_bias=False
        )


def supported_levels() -> tuple[str, ...]:
    if dispatch.NATIVE_FAILURE is not None:
        return ()
    native = dispatch.load("cpu")

    return native.info()["levels"]


@needs_native
def test_the_widest_level_is_used() -> None:
    if os.environ.get("FASTATTN_CPU_LEVEL"):
        pytest.skip("FASTATTN_CPU_LEVEL asks for a certain level")
    native = dispatch.load("cpu")

    assert native.info()["level"] == native.info()["levels"][-1]


@pytest.mark.parametrize("level", supported_levels())
def test_every_level_is_right(level: str) -> None:
    """Every operation of the library at one level, against the reference."""
    program = """
import torch, fastattn
from fastattn import Mask, dispatch
torch.set_num_threads(1)
print(dispatch.load("cpu").info()["level"])

def same(backend_to_tensors, rtol=1e-4, atol=2e-5):
    for found, wanted in zip(backend_to_tensors("cpu"), backend_to_tensors("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)

def attend(backend, dtype=torch.float32):
    torch.manual_seed(3)
    q = torch.randn(2, 4, 70, 40, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 2, 90, 40, dtype=dtype, requires_grad=True) for _ in range(2))
    bias = torch.randn(4, 1, 90, requires_grad=True)
    mask = Mask.causal("bottom_right") & Mask.key_lengths([90, 61]) & Mask.dense(torch.rand(70, 90) < 0.8)
    out, lse = fastattn.attention(q, k, v, mask=mask, bias=bias, dropout_p=0.2, return_lse=True, backend=backend)
    weights = fastattn.attention_weights(q, k, lse, mask=mask, bias=bias, backend=backend)
    loss = out.square().sum() + lse.sum() + weights.square().sum()
    loss.backward()
    return out, lse, weights, q.grad, k.grad, v.grad, bias.grad

def loss(backend):
    torch.manual_seed(4)
    x, y = torch.randn(2, 3, 32, 32, requires_grad=True), torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, 4, 4) < 0.6
    loss = fastattn.masked_l1_loss(x, y, mask, patch_size=8, normalize_target=True, backend=backend)
    loss.backward()
    return loss, x.grad

same(attend)
same(lambda backend: attend(backend, torch.bfloat16), 2e-2, 2e-2)
same(loss)
"""
    assert run_python(program, FASTATTN_CPU_LEVEL=level).strip() == level


@needs_native
def test_a_level_that_cannot_be_had_is_refused() -> None:
    program = "import fastattn"
    environment = {**os.environ, "FASTATTN_CPU_LEVEL": "avx9000"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "FASTATTN_CPU_LEVEL" in done.stderr and "avx9000" in done.stderr and supported_levels()[0] in done.stderr


def test_installs_and_runs_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools, the build backend, is not installed here")
    source, library, empty = tmp_path / "source", tmp_path / "library", tmp_path / "empty"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("fastattn", "bench", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / file, source / file)
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "FASTATTN_CUDA")}
    environment["PATH"] = str(empty)
    build = [sys.executable, "setup.py", "build", "--build-lib", str(library)]
    done = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "without the native library" in done.stdout + done.stderr
    assert not list(library.rglob("*.so"))
    program = """
import sys
# An editable install of this very package would lend its compiled library.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, fastattn
from fastattn import dispatch
print(fastattn.__file__)
print(dispatch.NATIVE_FAILURE)
q = torch.randn(1, 2, 5, 8)
torch.testing.assert_close(fastattn.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
print(fastattn.explain(q, q, q).chosen)
"""
    path, failure, chosen = run_python(program, empty, PYTHONPATH=str(library)).splitlines()
    assert Path(path).is_relative_to(library)
    assert "without its compiled library" in failure
    assert chosen == "reference"


def test_a_library_of_other_sources_is_named() -> None:
    """As after `git pull` in an editable installation: the package works without it and says what to do."""
    program = """
import sys, types
sys.modules["fastattn._native"] = types.ModuleType("fastattn._native")
import torch, fastattn
print(fastattn.dispatch.NATIVE_FAILURE)
print(fastattn.explain(*[torch.randn(1, 2, 5, 8)] * 3).chosen)
"""
    failure, chosen = run_python(program, FASTATTN_CUDA_LIBRARY="").splitlines()
    assert "compiled from other sources: build it again" in failure
    assert chosen == "reference"


@pytest.fixture
def build_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of setup.py, which does not build anything here."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools, the build backend, is not installed here")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    for name in ("FASTATTN_CUDA", "FASTATTN_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    # Its functions look each other up among these names: replacing one replaces it for all.
    yield runpy.run_path(str(ROOT / "setup.py"))["wants_cuda"].__globals__


@pytest.mark.parametrize("setting", ["auto", "on", "off", ""])
@pytest.mark.parametrize("nvcc", ["/usr/bin/nvcc", None])
@pytest.mark.parametrize("gpus", [[], [75], [90]])
def test_when_the_cuda_library_is_built(
    build_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, setting: str, nvcc: str | None, gpus: list[int]
) -> None:
    monkeypatch.setitem(build_script, "find_nvcc", lambda: nvcc)
    monkeypatch.setitem(build_script, "gpu_capabilities", lambda: gpus)
    monkeypatch.setenv("FASTATTN_CUDA", setting)
    if setting == "on" and nvcc is None:
        with pytest.raises(RuntimeError, match="FASTATTN_CUDA=on needs nvcc"):
            build_script["wants_cuda"]()
        return
    expected = {"on": True, "off": False}.get(setting, nvcc is not None and gpus == [90])
    assert build_script["wants_cuda"]() == expected


def test_a_wrong_setting_is_refused(build_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CUDA", "yes")
    with pytest.raises(ValueError, match="FASTATTN_CUDA must be auto, on or off, got 'yes'"):
        build_script["wants_cuda"]()


@pytest.mark.parametrize(
    "gpus, asked, expected",
    [
        ([], "", [80, 90]),
        ([90], "", [90]),
        ([80, 90, 90], "", [80, 90]),
        ([75, 89], "", [89]),
        ([121], "", [90]),  # later than this nvcc: the PTX of the last one it knows
        ([90], "8.0;9.0", [80, 90]),
        ([], "86 80", [80, 86]),
    ],
    ids=str,
)
def test_the_architectures_that_are_compiled_for(
    build_script: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpus: list[int],
    asked: str,
    expected: list[int],
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nfor number in 75 80 86 89 90; do echo compute_$number; done\n")
    nvcc.chmod(0o755)
    monkeypatch.setitem(build_script, "gpu_capabilities", lambda: gpus)
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", asked)
    assert build_script["cuda_architectures"](str(nvcc)) == expected


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_a_failing_nvcc_costs_the_cuda_library_alone(
    build_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    from setuptools import Distribution

    monkeypatch.setenv("FASTATTN_CUDA", setting)
    monkeypatch.setitem(build_script, "find_nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setitem(build_script, "cuda_architectures", lambda nvcc: [90])
    command = build_script["BuildNative"](Distribution({"name": "fastattn"}))
    command.ensure_finalized()
    built = []

    def build_module(ext: Any, name: str, options: list[str]) -> None:
        if name == "cuda":
            assert "-DFASTATTN_CUDA_ARCHITECTURES=90" in options
            raise subprocess.CalledProcessError(1, "cmake")
        built.append(ext.name)

    monkeypatch.setattr(command, "build_module", build_module)
    for name in ("fastattn._native", "fastattn._cuda"):
        extension = build_script["Extension"](name, sources=[])
        if setting == "on" and name == "fastattn._cuda":
            with pytest.raises(subprocess.CalledProcessError):
                command.build_extension(extension)
        else:
            command.build_extension(extension)
    assert built == ["fastattn._native"]
