"""Runs the CUDA kernels in the emulator: processes of their own, where the emulated library is `fastattn._cuda`.

By hand: FASTATTN_CUDA_LIBRARY=build/emulator/_cuda.so python -m pytest tests/cuda_kernels, or the contract tests on the
backend with FASTATTN_TEST_BACKENDS=cuda as well. Emulating capability 8.0 runs the portable path alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LIBRARY = TESTS.parent / "build" / "emulator" / "_cuda.so"

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason=f"no {LIBRARY}: `make emulator` builds it")

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "FASTATTN_BACKEND"}
    settings = {"FASTATTN_CUDA_LIBRARY": str(LIBRARY), "FASTATTN_TEST_BACKENDS": "cuda", **environment}
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=inherited | settings)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def run_tests(capability, name, *options):
    arguments = (str(TESTS / name), "-q", "-p", "no:cacheprovider", *options)
    run("pytest", *arguments, FASTATTN_EMULATE_CAPABILITY=str(capability))


def verify(capability, cases, seed):
    arguments = ("verify", "--backend", "cuda", "--emulate", "--cases", str(cases), "--seed", str(seed))
    run("fastattn", *arguments, FASTATTN_EMULATE_CAPABILITY=str(capability))


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels(capability):
    run_tests(capability, "cuda_kernels")


def test_contracts():
    """All but the longer sweeps, and the memory of the CPU kernels."""
    longer = "head_dims or bias_gradient_has or contract_2_masks or contract_7 or several_threads or at_length"
    run_tests(90, "test_contracts.py", "-k", f"not ({longer} or contract_9)")


@pytest.mark.slow
@CAPABILITIES
def test_every_contract(capability):
    run_tests(capability, "test_contracts.py", "-k", "not contract_9")


@CAPABILITIES
def test_random_problems(capability):
    verify(capability, 8, seed=capability)


@pytest.mark.slow
@CAPABILITIES
def test_many_random_problems(capability):
    verify(capability, 150, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_mask_tiles.py", "test_varlen.py", "test_decoding.py"])
def test_more(name):
    run_tests(90, name)
