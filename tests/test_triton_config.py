"""The configuration table and its search (FASTATTN_AUTOTUNE=1), with a clock of ours; reasons not to run."""

from types import SimpleNamespace

import pytest
import torch

from fastattn import Mask, dispatch

if dispatch.TRITON_FAILURE is not None:
    pytest.skip(dispatch.TRITON_FAILURE, allow_module_level=True)

import triton

from fastattn.backends.triton import common, config
from fastattn.backends.triton.config import Config


def query(dtype=torch.bfloat16, is_cuda=True):
    return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device=torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch):
    """A capability to set, and a fresh search."""
    seen = SimpleNamespace(capability=90)
    monkeypatch.setattr(config, "capability", lambda tensor: seen.capability)
    monkeypatch.setattr(config, "_found", {})
    return seen


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv", "dbias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_problem_has_a_line(gpu, kernel, dtype):
    keep = Mask.key_padding(torch.ones(1, 9, dtype=torch.bool)).kernel_form(1, 1, 9, 9, torch.device("cpu"))
    for gpu.capability in config.CAPABILITIES:
        for dim in (1, 16, 40, 64, 65, 128, 160, 256):
            for mask in (None, keep):
                for bias in (None, torch.zeros(1, 1, 1, 1)):
                    line = config.table(kernel, query(dtype), dim, mask, bias)
                    assert all(size >= 16 and size & (size - 1) == 0 for size in (line.block_m, line.block_n))


def test_a_generation_prefers_its_own_plain_line_to_an_older_general_one(gpu):
    bias = torch.zeros(1, 1, 1, 1)
    gpu.capability = 80
    assert config.table("dkv", query(), 64, None, bias) == config._HALF["dkv general", 80, 64]
    gpu.capability = 100
    assert config.table("dkv", query(), 64, None, bias) == config._HALF["dkv", 90, 64]
    assert config.table("forward", query(), 128, None, bias) == config._HALF["forward general", 90, 128]


def search(monkeypatch, seconds, kernel="forward", dtype=torch.bfloat16, bias=None):
    """Tunes with a clock that knows how long each configuration takes; returns what was launched."""
    launched, timed = [], []

    def clock(run, warmup, rep):
        run()
        timed.append(launched.pop())
        result = seconds(timed[-1])
        if result is None:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return result

    monkeypatch.setattr(config, "AUTOTUNE", True)
    monkeypatch.setattr(triton.testing, "do_bench", clock)
    for _ in range(2):  # the second time nothing is measured
        config.tuned(kernel, query(dtype), 100, None, bias, launched.append)
    assert len(timed) == 1 + len(config.CANDIDATES[kernel])
    return launched


@pytest.mark.parametrize("kernel", config.CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [None, torch.zeros(1, 1, 1, 1)], ids=["plain", "general"])
def test_the_search_takes_the_fastest_and_prints_its_line(gpu, monkeypatch, capsys, kernel, dtype, bias):
    best = Config(*config.CANDIDATES[kernel][3])
    launched = search(monkeypatch, lambda line: 1.0 if line == best else 2.0, kernel, dtype, bias)
    assert launched == [best, best]
    (printed,) = capsys.readouterr().out.splitlines()
    where, _, line = printed.partition(":")
    assert where == ("_FLOAT32" if dtype == torch.float32 else "_HALF")
    pasted = eval("{" + line + "}", {"Config": Config})
    assert pasted == {(kernel + ("" if bias is None else " general"), 90, 128): best}
    # Pasted, the table gives it.
    table = config._FLOAT32 if dtype == torch.float32 else config._HALF
    monkeypatch.setattr(config, where, table | pasted)
    assert config.table(kernel, query(dtype), 100, None, bias) == best


def test_the_search_keeps_the_line_of_the_table_when_nothing_is_faster(gpu, monkeypatch):
    line = config.table("dq", query(), 100, None, None)
    assert search(monkeypatch, lambda each: 1.0, "dq") == [line, line]


def test_the_search_passes_over_what_does_not_fit(gpu, monkeypatch):
    fits = Config(*config.CANDIDATES["forward"][-1])
    assert search(monkeypatch, lambda line: 5.0 if line == fits else None) == [fits, fits]
    config._found.clear()
    with pytest.raises(RuntimeError, match="no candidate runs on this device"):
        search(monkeypatch, lambda line: None)


def test_without_the_switch_nothing_is_measured(gpu, monkeypatch):
    def clock(*args, **kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr(triton.testing, "do_bench", clock)
    launched = []
    config.tuned("forward", query(), 64, None, None, launched.append)
    assert not config.AUTOTUNE and launched == [config._HALF["forward", 90, 64]]


def test_float32_products_follow_torchs_switches():
    try:
        for precision, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert common.dot_precision(torch.float32) == expected
            assert common.dot_precision(torch.bfloat16) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert common.dot_precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert common.dot_precision(torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_dropout_factors():
    assert common.dropout_factors(0.0) == (1.0, 1.0)
    assert common.dropout_factors(0.9) == (1 / (1 - 0.9), 1.0)
    first, rest = common.dropout_factors(1 - 2.0**-53)
    assert first * rest == 2.0**53 and torch.tensor(first).half().isfinite()


@pytest.mark.parametrize("capability", [(7, 5), (6, 0)])
def test_an_old_gpu_is_a_reason(monkeypatch, capability):
    monkeypatch.setattr(dispatch, "_cuda_capability", lambda: capability)
    problem = dispatch.Problem("attention", "cuda", torch.float16, 300)
    reasons = dispatch.BACKENDS["triton"].why_not(problem)
    old = f"it needs a GPU of capability 8.0 or later, this one has {capability[0]}.{capability[1]}"
    assert old in reasons and any("largest head dim is 256, this one is 300" in reason for reason in reasons)
    assert old in str(dispatch.explain_problem(problem))
    with pytest.raises(RuntimeError, match="capability 8.0 or later"):
        dispatch.select(problem, "triton")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_a_new_gpu_is_none(monkeypatch, capability):
    monkeypatch.setattr(dispatch, "_cuda_capability", lambda: capability)
    monkeypatch.setattr(dispatch, "TRITON_INTERPRETED", False)
    assert dispatch.BACKENDS["triton"].why_not(dispatch.Problem("attention", "cuda", torch.float16, 256)) == []


def test_no_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = dispatch.BACKENDS["triton"].why_not(dispatch.Problem("attention", "cuda", torch.float16, 64))
    assert "torch sees no CUDA device" in reasons
