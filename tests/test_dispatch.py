"""The choice of a backend: explicit names never fall back, every reason is told."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.backends import native
from fastattn.dispatch import Problem

PROBLEM = Problem("attention", "cpu", torch.float32, 64)
NATIVE = dispatch.NATIVE_FAILURE is None


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE_FAILURE", "it was never built")


@pytest.fixture
def with_native(monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE_FAILURE", None)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        capture_output=True,
        text=True,
        timeout=120,
    )


def gpu(monkeypatch, capability, failure=None, emulated=False, architectures=(80, 90)):
    monkeypatch.setattr(dispatch, "CUDA_FAILURE", failure)
    monkeypatch.setattr(dispatch, "CUDA_EMULATED", emulated)
    monkeypatch.setattr(dispatch, "CUDA_ARCHITECTURES", architectures)
    monkeypatch.setattr(dispatch, "_cuda_capability", lambda: capability)


def test_order_of_preference():
    assert list(dispatch.BACKENDS) == ["cuda", "triton", "cpu", "reference"]


def test_first_able_backend_runs(with_native, monkeypatch):
    gpu(monkeypatch, None)
    assert dispatch.select(PROBLEM) == "cpu"
    assert dispatch.select(PROBLEM._replace(head_dim=512)) == "cpu"
    assert dispatch.select(PROBLEM._replace(head_dim=513)) == "reference"
    assert dispatch.select(PROBLEM._replace(device="cuda")) == "reference"
    assert dispatch.select(PROBLEM._replace(dtype=torch.complex64)) == "reference"


def test_without_the_library_the_reference_runs(without_native):
    assert dispatch.select(PROBLEM) == "reference"
    with pytest.raises(RuntimeError, match="the native library is not there: it was never built"):
        dispatch.select(PROBLEM, "cpu")


def test_a_named_backend_never_falls_back(without_native):
    problem = PROBLEM._replace(device="cuda", dtype=torch.complex64, head_dim=700)
    with pytest.raises(RuntimeError) as error:
        dispatch.select(problem, "cpu")
    # Every reason, not the first one.
    for reason in ("it was never built", "'cuda'", "torch.complex64", "largest head dim is 512, this one is 700"):
        assert reason in str(error.value)
    with fastattn.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run this attention"):
        dispatch.select(problem)


def test_cuda_tells_every_reason(monkeypatch):
    why_not = dispatch.BACKENDS["cuda"].why_not
    problem = PROBLEM._replace(device="cuda")
    gpu(monkeypatch, None, "it was never built")
    reasons = why_not(Problem("attention", "cpu", torch.float64, 300))
    expected = ("it was never built", "these are on 'cpu'", "no torch.float64 kernels", "largest head dim is 256")
    assert len(reasons) == len(expected) and all(e in r for e, r in zip(expected, reasons, strict=True))
    gpu(monkeypatch, None)
    assert why_not(problem) == ["torch sees no CUDA device"]
    gpu(monkeypatch, (7, 5))
    assert why_not(problem) == ["it needs a GPU of capability 8.0 or later, this one has 7.5"]
    for capability, architectures in {(8, 0): (80, 90), (8, 9): (80, 90), (10, 0): (80, 90), (12, 1): (90,)}.items():
        gpu(monkeypatch, capability, architectures=architectures)
        assert why_not(problem) == [], capability
    gpu(monkeypatch, (8, 6), architectures=(90, 100))
    assert why_not(problem) == ["it was built for capability 9.0, 10.0, this GPU has 8.6"]


def test_cuda_comes_first_for_gpu_tensors_and_emulated_only_by_name(with_native, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_FAILURE", None)
    monkeypatch.setattr(dispatch, "TRITON_INTERPRETED", False)
    gpu(monkeypatch, (9, 0))
    assert dispatch.select(PROBLEM._replace(device="cuda")) == "cuda"
    gpu(monkeypatch, (9, 0), failure="it was never built")
    assert dispatch.select(PROBLEM._replace(device="cuda")) == "triton"
    gpu(monkeypatch, None, emulated=True)
    assert dispatch.select(PROBLEM) == "cpu" == dispatch.explain_problem(PROBLEM).chosen
    assert dispatch.select(PROBLEM, "cuda") == "cuda"
    assert "cuda: able, but only when it is named" in str(dispatch.explain_problem(PROBLEM))
    with pytest.raises(RuntimeError, match="emulated"):
        dispatch.select(PROBLEM._replace(device="cuda"), "cuda")


def test_triton_tells_every_reason(monkeypatch):
    why_not = dispatch.BACKENDS["triton"].why_not
    monkeypatch.setattr(dispatch, "TRITON_FAILURE", "Triton is not installed")
    monkeypatch.setattr(dispatch, "TRITON_INTERPRETED", False)
    reasons = why_not(dispatch.Problem("attention", "cpu", torch.float64, 300))
    expected = ("not installed", "these are on 'cpu'", "no torch.float64 kernels", "largest head dim is 256")
    assert len(reasons) == len(expected) and all(e in r for e, r in zip(expected, reasons, strict=True))
    monkeypatch.setattr(dispatch, "TRITON_FAILURE", None)
    monkeypatch.setattr(dispatch, "_cuda_capability", lambda: (7, 5))
    assert why_not(PROBLEM._replace(device="cuda")) == ["it needs a GPU of capability 8.0 or later, this one has 7.5"]
    monkeypatch.setattr(dispatch, "_cuda_capability", lambda: (9, 0))
    assert why_not(PROBLEM._replace(device="cuda")) == []
    monkeypatch.setattr(dispatch, "TRITON_INTERPRETED", True)
    assert why_not(PROBLEM) == []
    assert "interpreter is on" in why_not(PROBLEM._replace(device="cuda"))[0]


@pytest.mark.parametrize("name", ["gpu", "", "CPU", 3, True])
def test_unknown_names(name):
    for function in (fastattn.use_backend, lambda name: dispatch.select(PROBLEM, name)):
        with pytest.raises(ValueError, match="backend must be one of 'cuda', 'triton', 'cpu', 'reference', got"):
            function(name)


def test_use_backend_nests_and_restores(with_native):
    assert dispatch.select(PROBLEM) == "cpu"
    with fastattn.use_backend("reference") as outer:
        assert dispatch.select(PROBLEM) == "reference"
        with fastattn.use_backend("cpu"):
            assert dispatch.select(PROBLEM) == "cpu"
            with outer:  # one object, entered twice
                assert dispatch.select(PROBLEM) == "reference"
            assert dispatch.select(PROBLEM) == "cpu"
        assert dispatch.select(PROBLEM) == "reference"
        assert dispatch.select(PROBLEM, "cpu") == "cpu"  # the argument wins
    assert dispatch.select(PROBLEM) == "cpu"
    with pytest.raises(KeyError), fastattn.use_backend("reference"):
        raise KeyError
    assert dispatch.select(PROBLEM) == "cpu"


def test_use_backend_holds_for_every_thread():
    seen = []
    with fastattn.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.select(PROBLEM)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_environment_names_a_backend():
    code = (
        "import torch, fastattn; x = torch.ones(1, 1, 2, 4); print(fastattn.explain(x, x, x).chosen);"
        "print(fastattn.explain(x, x, x, backend='cpu').requested)"
    )
    result = run(code, FASTATTN_BACKEND="reference")
    assert result.stdout.split() == ["reference", "cpu"], result.stderr
    result = run(
        "import torch, fastattn; x = torch.ones(1, 1, 2, 4); fastattn.attention(x, x, x)", FASTATTN_BACKEND="gpu"
    )
    assert "ValueError: backend must be one of" in result.stderr and "'gpu'" in result.stderr
    assert run("import fastattn", FASTATTN_BACKEND="").returncode == 0


def test_the_named_backend_is_the_one_that_computes(monkeypatch):
    called = []
    for name in ("reference", "cpu") if NATIVE else ("reference",):
        module = dispatch.load(name)
        original = module.attention_forward
        monkeypatch.setattr(
            module,
            "attention_forward",
            lambda *arguments, name=name, original=original: called.append(name) or original(*arguments),
        )
        x = torch.randn(1, 2, 3, 4)
        fastattn.attention(x, x, x, backend=name)
        with fastattn.use_backend(name):
            fastattn.scaled_dot_product_attention(x, x, x)
        assert called == [name] * 2
        called.clear()


def test_explain_tells_what_runs_and_why_not_the_others(with_native):
    query = torch.randn(2, 4, 7, 8)
    explanation = fastattn.explain(query, query, query)
    assert explanation.chosen == "cpu"
    assert explanation.reasons["cpu"] == [] == explanation.reasons["reference"]
    text = str(explanation)
    assert text.splitlines()[0] == "attention: cpu (the first able one)"
    assert "cuda: " in text and "these are on 'cpu'" in text
    assert "reference: able, but 'cpu' comes first" in text
    asked = str(fastattn.explain(query, query, query, backend="reference"))
    assert asked.splitlines()[0] == "attention: reference (asked for)"
    assert "cpu: able, but 'reference' was asked for" in asked


def test_explain_does_not_raise_for_a_backend_that_cannot_run():
    query = torch.randn(2, 4, 7, 600)
    explanation = fastattn.explain(query, query, query, backend="cpu")
    assert explanation.chosen is None
    assert any("largest head dim" in reason for reason in explanation.reasons["cpu"])
    assert str(explanation).startswith("attention: no backend")
    assert fastattn.explain(query, query, query).chosen == "reference"


def test_explain_tells_of_copies():
    query = torch.randn(2, 4, 8, 7).transpose(-1, -2)
    key = torch.randn(2, 4, 7, 8)
    explanation = fastattn.explain(query, key, key)
    assert len(explanation.notes) == 1 and "query is copied first" in str(explanation)
    assert not fastattn.explain(key, key, key).notes


def test_explain_follows_autocast(with_native):
    query = torch.randn(2, 4, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.explain(query, query, query).problem.dtype == torch.bfloat16


def test_every_backend_of_this_build_has_every_function():
    functions = (
        "attention_forward",
        "attention_backward",
        "attention_weights",
        "attention_weights_backward",
        "mask_tiles",
        "masked_loss",
        "masked_loss_backward_none",
    )
    for name in ("reference", "cpu") if NATIVE else ("reference",):
        for function in functions:
            assert callable(getattr(dispatch.load(name), function))


def test_a_missing_library_is_a_reason_and_not_an_error():
    # The package imports without its compiled part and runs on the reference.
    code = (
        "import sys; sys.modules['fastattn._native'] = None\n"
        "import torch, fastattn\n"
        "x = torch.ones(1, 1, 2, 4)\n"
        "print(fastattn.attention(x, x, x).sum().item())\n"
        "print(fastattn.explain(x, x, x))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("8.0\nattention: reference")
    assert "the native library is not there" in result.stdout


# What a call on a GPU asks torch --------------------------------------------------------------------------------------


def test_the_capability_is_asked_for_once_a_device(monkeypatch):
    current, asked = [0], []
    capabilities = [(9, 0), (7, 5)]

    def properties(device):
        asked.append(device)
        return SimpleNamespace(major=capabilities[device][0], minor=capabilities[device][1])

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    dispatch._capability_of.cache_clear()
    try:
        for device in (0, 1, 1, 0):
            current[0] = device
            assert dispatch._cuda_capability() == capabilities[device]
    finally:
        dispatch._capability_of.cache_clear()
    assert asked == [0, 1]


def test_no_gpu_is_started_to_learn_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("starts CUDA"))
    assert dispatch._cuda_capability() is None


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, tensor):
            self.device = tensor.get_device()

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    operation = native._on_its_device(lambda tensors, *rest: (tuple(entered), rest))
    on = [SimpleNamespace(is_cuda=True, get_device=lambda device=device: device) for device in (0, 1)]
    assert operation(on[:1], 5) == ((0,), (5,))
    assert entered == [0, "left"]
    entered.clear()
    assert operation(on[1:], 5) == ((), (5,))


def test_the_stream_is_that_of_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    assert native.CudaLibrary._executor() == 101
