"""The CUDA kernels, in the emulator or on a GPU: collected where the library of either is loaded.

In the emulator (tests/test_cuda.py starts it; by hand with FASTATTN_CUDA_LIBRARY) the tensors are on the CPU.
"""

import pytest
import torch

from fastattn import dispatch


@pytest.fixture
def device():
    if not dispatch.CUDA_EMULATED and not torch.cuda.is_available():
        pytest.skip("the CUDA library is there, and no GPU")
    return torch.device("cpu" if dispatch.CUDA_EMULATED else "cuda")


@pytest.fixture(autouse=True)
def _one_thread():
    # Tiles are far too small to share out.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
