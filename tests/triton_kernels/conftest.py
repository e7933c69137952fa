"""The Triton kernels in Triton's interpreter: a process of its own, since Triton reads TRITON_INTERPRET when imported.

`tests/test_triton.py` starts it; by hand: TRITON_INTERPRET=1 python -m pytest tests/triton_kernels
"""

import gc

import pytest
import torch

from fastattn.testing import triton_interpreter

triton_interpreter.install()
# Collecting garbage in the middle of a run has crashed the interpreter now and then; why is not known.
gc.disable()


@pytest.fixture(autouse=True)
def _one_thread():
    # Tiles are far too small to share out.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
