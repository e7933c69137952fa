"""Runs tests/triton_kernels in processes of their own, where Triton interprets kernels on CPU tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import dispatch

FOLDER = Path(__file__).parent / "triton_kernels"

pytestmark = pytest.mark.skipif(dispatch.TRITON_FAILURE is not None, reason=f"{dispatch.TRITON_FAILURE}")


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", str(FOLDER / name), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
