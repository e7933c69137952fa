"""Runs tests/triton_kernels and the quick ones of the contracts in processes of their own, where Triton interprets
kernels on CPU tensors. `make test-triton` runs every contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import dispatch

FOLDER = Path(__file__).parent / "triton_kernels"
QUICK = "contract_1_ or contract_5 or contract_10 or contract_12 or lowest"

pytestmark = pytest.mark.skipif(dispatch.TRITON_FAILURE is not None, reason=f"{dispatch.TRITON_FAILURE}")


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name):
    run(str(FOLDER / name))


def test_quick_contracts_in_the_interpreter():
    run(str(FOLDER.parent / "test_contracts.py"), "-k", QUICK)


def run(*arguments):
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider"]
    settings = {"TRITON_INTERPRET": "1", "FASTATTN_TEST_BACKENDS": "triton"}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
