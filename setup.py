"""Builds the compiled libraries: CMake over csrc, fastattn._native always and fastattn._cuda for GPUs. Metadata is in
pyproject.toml. torch is not needed to build.

Environment: MAX_JOBS limits the compile jobs; CXX and CUDACXX name the compilers.
FASTATTN_CUDA=auto|on|off: auto builds fastattn._cuda where nvcc and a GPU are found, and goes on without it when that
fails; on builds it or fails. FASTATTN_CUDA_ARCHS="80 90" lists the compute capabilities to compile for, by default
those of the GPUs here, 80 and 90 without any.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA = "fastattn._cuda"


def find_tool(*names: str) -> str | None:
    """The first of the programs that exists, on PATH or beside the interpreter of a virtual environment."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def pybind11_include() -> Path | None:
    """pybind11's headers, from its own package or from the copy that torch carries."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            include = Path(location, folder)
            if (include / "pybind11" / "pybind11.h").is_file():
                return include
    return None


def missing_for_native() -> list[str]:
    """What keeps the native library from being built here."""
    missing = []
    if not find_tool(*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"):
        missing.append("C++ compiler")
    if not find_tool("cmake"):
        missing.append("cmake")
    if not find_tool("ninja", "make"):
        missing.append("ninja or make")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python headers")
    if pybind11_include() is None:
        missing.append("pybind11")
    return missing


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home, "bin", "nvcc")) for home in (*homes, "/usr/local/cuda")]
    return find_tool(*os.environ.get("CUDACXX", "").split()[:1], "nvcc", *places)


def gpu_capabilities() -> list[int]:
    """The compute capabilities of the GPUs here, such as [90], as the driver tells them; empty without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, capabilities = ctypes.c_int(0), set()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for device in range(count.value):
        major, minor = ctypes.c_int(0), ctypes.c_int(0)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; devices are numbered from 0
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        capabilities.add(10 * major.value + minor.value)
    return sorted(capabilities)


def cuda_architectures(nvcc: str) -> list[int]:
    """What to compile for: FASTATTN_CUDA_ARCHS, or the GPUs here, by the closest name that nvcc knows."""
    asked = re.findall(r"\d+", os.environ.get("FASTATTN_CUDA_ARCHS", "").replace(".", ""))
    if asked:
        return sorted({int(number) for number in asked})
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [int(number) for number in re.findall(r"compute_(\d+)\s", listing)]
    able = [number for number in gpu_capabilities() if number >= 80] or [80, 90]
    return sorted({max((each for each in known if each <= number), default=number) for number in able})


def wants_cuda() -> bool:
    """Whether fastattn._cuda is built; ValueError or RuntimeError when FASTATTN_CUDA cannot be followed."""
    wanted = os.environ.get("FASTATTN_CUDA") or "auto"
    if wanted not in ("auto", "on", "off"):
        raise ValueError(f"FASTATTN_CUDA must be auto, on or off, got {wanted!r}")
    if wanted == "auto":
        return find_nvcc() is not None and any(number >= 80 for number in gpu_capabilities())
    if wanted == "on" and find_nvcc() is None:
        raise RuntimeError("FASTATTN_CUDA=on needs nvcc, on PATH or in CUDACXX, CUDA_HOME or /usr/local/cuda")
    return wanted == "on"


class BuildNative(build_ext):
    def run(self) -> None:
        missing = missing_for_native()
        if missing and os.environ.get("FASTATTN_CUDA") == "on":
            raise RuntimeError(f"FASTATTN_CUDA=on, and there is no {', no '.join(missing)}")
        if missing:
            # The package is whole without it: every operation runs on the reference, and `fastattn info` says so.
            self.warn(f"no {', no '.join(missing)}: fastattn is installed without the native library")
            self.extensions = []
        elif not wants_cuda():
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA]
        # An earlier build may have left one behind.
        for stale in Path(ROOT, "fastattn").glob("_cuda.*.so"):
            stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA:
            self.build_module(ext, "native", ["-DFASTATTN_MODULE=cpu"])
            return
        nvcc = str(find_nvcc())
        try:
            architectures = ";".join(map(str, cuda_architectures(nvcc)))
            options = ["-DFASTATTN_MODULE=cuda", f"-DFASTATTN_CUDA_ARCHITECTURES={architectures}"]
            self.build_module(ext, "cuda", [*options, f"-DCMAKE_CUDA_COMPILER={nvcc}"])
        except subprocess.CalledProcessError as error:
            if os.environ.get("FASTATTN_CUDA") == "on":
                raise
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.warn(f"{error}: fastattn is installed without the CUDA library; FASTATTN_CUDA=off leaves it out")

    def build_module(self, ext: Extension, name: str, options: list[str]) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake, ninja = str(find_tool("cmake")), find_tool("ninja")
        # Beside the sources, whichever command builds: pip's own folders are gone afterwards.
        build = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}{'' if ninja else '-make'}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build)),
            *options,
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DFASTATTN_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DFASTATTN_PYBIND11_INCLUDE={pybind11_include()}",
            f"-DFASTATTN_MODULE_DIR={target.parent}",
            f"-DFASTATTN_MODULE_FILE={target.name}",
        ]
        if ninja:
            # Named each time: the one of an earlier, isolated build is gone by now.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if ccache := find_tool("ccache"):
            configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("CXX", "CUDA")]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "fastattn_module", "--parallel", jobs], check=True)


setup(
    packages=[
        *find_packages(include=["fastattn", "fastattn.*"]),
        "fastattn.bench",
        *(f"fastattn.bench.{name}" for name in find_packages("bench")),
    ],
    package_dir={"fastattn": "fastattn", "fastattn.bench": "bench"},
    package_data={"fastattn": ["py.typed"]},
    # Optional: an installation goes on without it.
    ext_modules=[Extension("fastattn._native", sources=[]), Extension(CUDA, sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
