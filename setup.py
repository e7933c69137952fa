"""Builds the native library: CMake over csrc, one module fastattn._native. Metadata is in pyproject.toml.

Environment: MAX_JOBS limits the compile jobs; CXX names the compiler. torch is not needed to build.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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


class BuildNative(build_ext):
    def run(self) -> None:
        missing = missing_for_native()
        if missing:
            # The package is whole without it: every operation runs on the reference, and `fastattn info` says so.
            self.warn(f"no {', no '.join(missing)}: fastattn is installed without the native library")
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake, ninja = str(find_tool("cmake")), find_tool("ninja")
        # Beside the sources, whichever command builds: pip's own folders are gone afterwards.
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}{'' if ninja else '-make'}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build)),
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
            configure.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


setup(
    packages=[
        *find_packages(include=["fastattn", "fastattn.*"]),
        "fastattn.bench",
        *(f"fastattn.bench.{name}" for name in find_packages("bench")),
    ],
    package_dir={"fastattn": "fastattn", "fastattn.bench": "bench"},
    package_data={"fastattn": ["py.typed"]},
    ext_modules=[Extension("fastattn._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
