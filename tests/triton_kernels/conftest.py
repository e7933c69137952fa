"""The Triton kernels in Triton's interpreter: a process of its own, since Triton reads TRITON_INTERPRET when imported.

`tests/test_triton.py` starts it; by hand: TRITON_INTERPRET=1 python -m pytest tests/triton_kernels
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    # Tiles are far too small to share out.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
