"""What all tests share: the backends, the `slow` marker, poisoned memory and the number of threads."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from fastattn import dispatch
from fastattn.testing import poisoned_buffers
from fastattn.testing.adapters import TENSOR_CORE_BACKENDS

# FASTATTN_TEST_BACKENDS=triton runs the same tests on that backend alone.
BACKENDS = tuple(os.environ.get("FASTATTN_TEST_BACKENDS", "cpu,reference").split(","))

# Kernels in Triton's interpreter and CUDA kernels in the emulator need processes of their own: tests/test_triton.py and
# tests/test_cuda.py start them.
collect_ignore = [
    *([] if dispatch.TRITON_INTERPRETED else ["triton_kernels"]),
    *([] if dispatch.CUDA_FAILURE is None else ["cuda_kernels"]),
]

if dispatch.TRITON_INTERPRETED and dispatch.TRITON_FAILURE is None:
    from fastattn.testing import triton_interpreter

    triton_interpreter.install()
    # Now and then a process that interprets kernels ends in a segmentation fault inside a collection of garbage. The
    # cause is not known: collecting after every 30 allocations, through forward and backward passes, did not bring it
    # about. A test process is over before it needs a collection.
    gc.disable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked slow too (also: FASTATTN_FULL_TESTS=1)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: a longer sweep, only run with --full or FASTATTN_FULL_TESTS=1")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # One thread for each worker: the workers already share out the cores.
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full") or os.environ.get("FASTATTN_FULL_TESTS") == "1":
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs once on every backend of this build."""
    if request.param == "cpu" and dispatch.NATIVE_FAILURE is not None:
        pytest.skip(f"the native library is not there: {dispatch.NATIVE_FAILURE}")
    params = request.node.callspec.params
    if request.param in TENSOR_CORE_BACKENDS and params.get("dtype") == torch.float64:
        pytest.skip(f"the {request.param} backend has no float64 kernels")
    if dispatch.TRITON_INTERPRETED and params.get("threads", 1) != 1:
        pytest.skip("Triton's interpreter computes on one thread, whatever torch is set to")
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN while the test runs."""
    with poisoned_buffers():
        yield


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with as many threads as its (indirect) parameter says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20240229)
