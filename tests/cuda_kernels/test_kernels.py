"""What only the CUDA kernels have: two paths, launches, streams, the seed on the device; and the bits of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import Mask, dispatch
from fastattn.attention import _attention_with_seed
from fastattn.backends import native, reference

EMULATED = Path(__file__).parents[2] / "build" / "emulator" / "_cuda.so"
cuda = dispatch.load("cuda")
needs_cpu = pytest.mark.skipif(dispatch.NATIVE_FAILURE is not None, reason=f"{dispatch.NATIVE_FAILURE}")
needs_emulator = pytest.mark.skipif(not dispatch.CUDA_EMULATED, reason="the library is for GPUs, not the emulator's")
needs_gpu = pytest.mark.skipif(
    dispatch.CUDA_EMULATED or not torch.cuda.is_available(), reason="needs a GPU: streams, nothing asynchronous without"
)

NAMES = ("bits", "live", "full", "live_t", "full_t")


def qkv(device, dtype=torch.bfloat16, L=70, S=130, D=64, heads=2):
    return [torch.randn(1, heads, n, D).to(device, dtype).requires_grad_() for n in (L, S, S)]


def attend(tensors, **options):
    out = fastattn.attention(*tensors, backend="cuda", **options)
    return out, *torch.autograd.grad(out.float().square().sum(), tensors)


@needs_cpu
@pytest.mark.parametrize("sizes", [(1, 1), (64, 64), (65, 129), (197, 203), (70, 4200), (4200, 3)], ids=str)
def test_tile_maps_are_those_of_the_cpu(device, sizes):
    L, S = sizes
    masks = [
        torch.rand(2, 1, L, S) < 0.9,
        torch.rand(1, 3, 1, S) < 0.95,
        torch.ones(1, 1, L, S, dtype=torch.bool).tril(S - L),
    ]
    expected = dispatch.load("cpu").mask_tiles(masks, L, S, 64, 64)
    found = cuda.mask_tiles([mask.to(device) for mask in masks], L, S, 64, 64)
    for name, ours, wanted in zip(NAMES, found, expected, strict=True):
        assert torch.equal(ours.cpu(), wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 128])
def test_the_same_elements_drop(device, dim, dtype):
    """Forward, and the weights that the backward uses: with value the identity the output is the weights."""
    L, S = 70, dim
    query, key, _ = qkv(device, dtype, L, S, dim)
    value = torch.eye(S, device=device, dtype=dtype).expand(1, 2, S, S)
    for seed in (7, 2**40 + 7):
        seed_tensor = torch.tensor(seed, device=device)
        options = {"mask": None, "bias": None, "scale": 0.02, "dropout_p": 0.4, "dropout_seed": seed_tensor}
        out, lse = _attention_with_seed(query, key, value, **options, backend="cuda")
        keep = reference.philox_keep(torch.tensor(seed), 0.4, 1, 2, L, S)
        assert torch.equal((out != 0).cpu(), keep)
        if dispatch.NATIVE_FAILURE is None:
            assert torch.equal(dispatch.load("cpu").philox_keep(torch.tensor(seed), 0.4, 1, 2, L, S), keep)
        weights = fastattn.attention_weights(
            query, key, lse, scale=0.02, dropout_p=0.4, dropout_seed=seed_tensor, average_heads=False, backend="cuda"
        )
        assert torch.equal((weights != 0).cpu(), keep)
        # d out / d value: a value that a query dropped gets nothing from it.
        leaf = value.clone().requires_grad_()
        out, _ = _attention_with_seed(query, key, leaf, **options, backend="cuda")
        grad = torch.zeros_like(out)
        grad[:, :, 5] = 1
        (dv,) = torch.autograd.grad(out, leaf, grad)
        assert torch.equal((dv != 0).cpu(), keep[:, :, 5, :, None].expand_as(dv))


def test_both_paths_agree(device, monkeypatch):
    """Where the Hopper path runs a problem, the portable one gives the same up to the order of its sums."""
    torch.manual_seed(1)
    tensors = qkv(device)
    mask = Mask.causal("bottom_right")
    default = attend(tensors, mask=mask)
    monkeypatch.setenv("FASTATTN_CUDA_PATH", "portable")
    portable = attend(tensors, mask=mask)
    for ours, other in zip(default, portable, strict=True):
        torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-2)
    monkeypatch.setenv("FASTATTN_CUDA_PATH", "hopper")
    capability = os.environ.get("FASTATTN_EMULATE_CAPABILITY", "90")
    if dispatch.CUDA_EMULATED and capability == "90":
        for ours, other in zip(attend(tensors, mask=mask), default, strict=True):
            assert torch.equal(ours, other)
    elif dispatch.CUDA_EMULATED:
        with pytest.raises(RuntimeError, match="attention_forward.*FASTATTN_CUDA_PATH=hopper"):
            attend(tensors, mask=mask)


def test_few_queries_are_the_portable_path_s(device, monkeypatch):
    """It shares their keys out over blocks, where the Hopper path has one block for a head."""
    capability = os.environ.get("FASTATTN_EMULATE_CAPABILITY", "90")
    if (capability if dispatch.CUDA_EMULATED else torch.cuda.get_device_capability()) not in ("90", (9, 0)):
        pytest.skip("the Hopper path needs capability 9.0")
    for length, path in ((8, "portable"), (16, "portable"), (17, "hopper")):
        tensors = qkv(device, L=length, S=1100)
        monkeypatch.delenv("FASTATTN_CUDA_PATH", raising=False)
        default = fastattn.attention(*tensors, return_lse=True, backend="cuda")
        lse = {}
        for name in ("portable", "hopper"):
            monkeypatch.setenv("FASTATTN_CUDA_PATH", name)
            out, lse[name] = fastattn.attention(*tensors, return_lse=True, backend="cuda")
            if name == path:
                assert torch.equal(out, default[0]) and torch.equal(lse[name], default[1])
        assert not torch.equal(lse["portable"], lse["hopper"])  # so that the bits tell the paths apart


def test_a_path_that_cannot_be_had_is_refused(device, monkeypatch):
    tensors = qkv(device, torch.float32)  # float32 is the portable path's
    monkeypatch.setenv("FASTATTN_CUDA_PATH", "hopper")
    with pytest.raises(RuntimeError, match="attention_forward: FASTATTN_CUDA_PATH=hopper"):
        attend(tensors)
    monkeypatch.setenv("FASTATTN_CUDA_PATH", "tensor")
    with pytest.raises(ValueError, match="FASTATTN_CUDA_PATH must be portable or hopper, got 'tensor'"):
        attend(tensors)


def test_two_runs_are_bitwise_equal(device):
    torch.manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = qkv(device, dtype)
        for first, second in zip(attend(tensors), attend(tensors), strict=True):
            assert torch.equal(first, second)


@needs_emulator
def test_the_schedule_changes_no_bit():
    """Warps, blocks and copies in another order: the same sums in the same order."""
    program = """
import hashlib, torch, fastattn
torch.manual_seed(3)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    tensors = [torch.randn(1, 2, n, 40).to(dtype).requires_grad_() for n in (70, 130, 130)]
    bias = torch.randn(1, 2, 1, 130, requires_grad=True)
    mask = fastattn.Mask.dense(torch.rand(70, 130) < 0.7)
    out = fastattn.attention(*tensors, bias=bias, mask=mask, backend="cuda")
    for tensor in (out, *torch.autograd.grad(out.float().sum(), [*tensors, bias])):
        digest.update(tensor.detach().float().numpy().tobytes())
print(digest.hexdigest())
"""
    seen = set()
    for seed in range(3):
        environment = os.environ | {"FASTATTN_EMULATE_SEED": str(seed)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1


@needs_emulator
def test_a_failed_launch_is_an_exception(device, monkeypatch):
    monkeypatch.setenv("FASTATTN_EMULATE_CAPABILITY", "70")
    with pytest.raises(RuntimeError, match="FASTATTN_EMULATE_CAPABILITY is 70"):
        attend(qkv(device))


def test_tensors_elsewhere_are_refused(device):
    x = torch.randn(1, 2, 9, 16, device=device)
    elsewhere = x.to("meta")
    with pytest.raises(ValueError, match="query must be where the kernels of"):
        cuda.attention_forward(elsewhere, elsewhere, elsewhere, None, None, 0.2, 0.0, None)
    with pytest.raises(ValueError, match="key"):
        cuda.attention_forward(x, elsewhere, x, None, None, 0.2, 0.0, None)
    with pytest.raises(ValueError, match="dropout_seed must be one int64"):
        cuda.attention_forward(x, x, x, None, None, 0.2, 0.5, torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match="input must be where"):
        mask = torch.ones(9, dtype=torch.bool, device=device)
        cuda.masked_loss(elsewhere[0], elsewhere[0], mask, "l2", "sum", 0, 1.0, False, 1e-6, True)


def test_dtypes_and_head_dims_without_kernels_are_refused(device):
    x = torch.randn(1, 1, 4, 8, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match="query must be float32, bfloat16 or float16 for the CUDA kernels"):
        cuda.attention_forward(x, x, x, None, None, 0.2, 0.0, None)
    x = torch.randn(1, 1, 4, 264, device=device)
    with pytest.raises(ValueError, match="head dims up to 256"):
        cuda.attention_forward(x, x, x, None, None, 0.2, 0.0, None)


@needs_gpu
def test_no_call_waits_for_the_gpu():
    query, key, value = qkv("cuda")
    bias = torch.randn(1, 2, 1, 130, device="cuda", requires_grad=True)
    mask = Mask.causal() & Mask.key_padding(torch.rand(1, 130, device="cuda") < 0.9)

    def run():
        out = fastattn.attention(query, key, value, bias=bias, mask=mask, dropout_p=0.2, backend="cuda")
        torch.autograd.grad(out, [query, key, value, bias], torch.ones_like(out))

    run()  # allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_the_current_stream_is_used():
    """A kernel that waits on its stream reads what was written there before it, and nothing earlier."""
    tensors = [torch.zeros(4, 8, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    values = [torch.randn_like(x) for x in tensors]
    expected = fastattn.attention(*values, backend="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        out = fastattn.attention(*tensors, backend="cuda")
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used():
    tensors = [x.detach().to("cuda:1") for x in qkv("cuda")]
    assert torch.cuda.current_device() == 0
    out = fastattn.attention(*tensors, backend="cuda")
    expected = fastattn.attention(*(x.to("cuda:0") for x in tensors), backend="cuda")
    assert out.device == tensors[0].device and torch.equal(out.cpu(), expected.cpu())


@needs_gpu
@pytest.mark.skipif(not EMULATED.is_file(), reason=f"no {EMULATED}: `make emulator` builds it")
@pytest.mark.parametrize("path", ["portable", "hopper"])
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
def test_the_emulator_computes_what_the_gpu_does(monkeypatch, dim, path):
    """The same sources under two compilers: they differ by ex2.approx and the order of tensor-core sums alone."""
    if path == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper path needs capability 9.0")
    emulator = native.cuda_library(str(EMULATED))
    torch.manual_seed(dim)
    keep = torch.rand(100, 257) < 0.6
    keep[:, 64:128] = False
    for dtype in (
        (torch.bfloat16, torch.float16) if path == "hopper" else (torch.bfloat16, torch.float16, torch.float32)
    ):
        inputs = [torch.randn(1, 3, n, dim).to(dtype) for n in (100, 257, 257)]
        upstream = torch.randn(1, 3, 100, dim).to(dtype)
        results = []
        for library, device in ((cuda, "cuda"), (emulator, "cpu")):
            query, key, value, grad = (x.to(device) for x in (*inputs, upstream))
            mask = Mask.dense(keep.to(device)) & Mask.causal("bottom_right")
            form = mask.kernel_form(1, 3, 100, 257, query.device, 64, 64, build=library.mask_tiles)
            monkeypatch.setenv("FASTATTN_CUDA_PATH", path)
            out, lse = library.attention_forward(query, key, value, None, form, 0.3, 0.0, None)
            grads = [torch.empty_like(x) for x in (query, key, value)]
            if dim > 128:  # the Hopper backward has no wider heads
                monkeypatch.setenv("FASTATTN_CUDA_PATH", "portable")
            library.attention_backward(
                grad, None, query, key, value, out, lse, None, form, 0.3, 0.0, None, *grads, False
            )
            results.append([x.float().cpu() for x in (out, lse, *grads)])
        unit = torch.finfo(dtype).eps
        for name, gpu, emulated in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
            difference = (gpu - emulated)[torch.isfinite(emulated)].abs().max().item()
            print(f"{path} {dtype} {dim} {name}: {difference:.2e}")
            tolerance = 2e-5 if name == "lse" else max(2 * unit, 2e-5) * emulated[torch.isfinite(emulated)].abs().max()
            assert difference <= tolerance, name
