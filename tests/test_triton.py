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


# The long one by itself; starting a process takes longer than most of the others.
ALONE = FOLDER / "test_attention.py"


def test_attention_in_the_interpreter():
    run(str(ALONE))


def test_the_others_in_the_interpreter():
    run(*(str(path) for path in sorted(FOLDER.glob("test_*.py")) if path != ALONE))


def test_quick_contracts_in_the_interpreter():
    run(str(FOLDER.parent / "test_contracts.py"), "-k", QUICK)


def run(*arguments):
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider"]
    settings = {"TRITON_INTERPRET": "1", "FASTATTN_TEST_BACKENDS": "triton"}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
