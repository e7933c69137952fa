"""Every line of the Triton configuration table, compiled for its GPUs without one.

A fake driver names the GPU, and the backend's own launches compile instead of running. Checked in what comes out:
shared memory within the device's limit, registers spilled within what the table allows, copies that overlap with
computing (LDGSTS) in every loop over tiles, and the tensor cores of the generation. Triton caches the results by source
and version in TRITON_CACHE_DIR (by default ~/.triton/cache).
"""

import contextlib
import gc
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastattn import Mask, dispatch

if dispatch.TRITON_FAILURE is not None:
    pytest.skip(dispatch.TRITON_FAILURE, allow_module_level=True)
if dispatch.TRITON_INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastattn.backends.triton as backend
from fastattn.backends.triton import common, config, live_tiles
from fastattn.backends.triton.additive_attention import Side
from fastattn.backends.triton.masked_loss import Strides

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
TENSOR_CORES = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b|\bHMMA\b"}
LENGTH = 512


class FakeDriver:
    """Answers what the compiler asks a driver."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def compiling_for(capability):
    """Launches compile for the capability; yields the list of (kernel name, compiled kernel) that fills up."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # by device, and the fake ones are all device 0
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    driver = triton.runtime.driver.active if torch.cuda.is_available() else None
    triton.runtime.driver.set_active(FakeDriver(capability))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(config, "capability", lambda tensor: capability),
        ):
            yield compiled
    finally:
        if driver is not None:
            triton.runtime.driver.set_active(driver)


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_collection():
    # The compiler's objects must not be freed half way through another compilation: Triton 3.7.1 then crashes.
    gc.disable()
    yield
    gc.enable()


def tool(name, *arguments):
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def inspect(kernel, tmp_path):
    """(registers, bytes spilled, instructions) of a compiled kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage, instructions = tool("cuobjdump", "-res-usage", str(cubin)), tool("nvdisasm", "-c", str(cubin))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    # A frame without stores holds nothing.
    return registers, stack if re.search(r"\bSTL\b", instructions) else 0, instructions


def launch(operation, dtype, dim, length, masked, with_bias=False):
    """Calls the backend as a problem of that kind does."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    dtype = torch.float32 if dtype == "tf32" else dtype
    x = torch.zeros(1, 2, length, dim, dtype=dtype)
    mask = None
    if masked == "causal":
        mask = Mask.causal().kernel_form(1, 2, length, length, x.device, 64, 64)
    elif masked == "dense":
        keep = torch.ones(length, length, dtype=torch.bool)
        mask = Mask.dense(keep).kernel_form(1, 2, length, length, x.device, 64, 64)
    bias = torch.zeros(1, 2, length, length, dtype=dtype) if with_bias else None
    if operation == "forward":
        backend.attention_forward(x, x, x, bias, mask, 0.1, 0.0, None)
    elif operation == "decode":
        query = torch.zeros(1, 64, 1, dim, dtype=dtype)  # 32 rows a key head: the largest tile of float32 twice
        backend.attention_forward(query, x, x, bias, mask, 0.1, 0.0, None)
    elif operation == "backward":
        lse, gradients = torch.zeros(1, 2, length), [torch.empty_like(x) for _ in range(3)]
        backend.attention_backward(x, None, x, x, x, x, lse, bias, mask, 0.1, 0.0, None, *gradients, with_bias)
    else:
        backend.attention_weights(x, x, torch.zeros(1, 2, length), bias, mask, 0.1, True, 0.0, None)


def problems():
    """Every line of the table on every generation, and the largest of the short problems."""
    for capability in config.CAPABILITIES:
        for dim in (64, 128, 256):
            for masked in ("causal", "dense", "bias"):
                yield capability, "forward", torch.bfloat16, dim, LENGTH, masked
                yield capability, "backward", torch.bfloat16, dim, LENGTH, masked
            yield capability, "weights", torch.bfloat16, dim, LENGTH, "causal"
            yield capability, "forward", torch.float32, dim, LENGTH, "causal"
            yield capability, "decode", torch.bfloat16, dim, LENGTH, None
            yield capability, "backward", torch.float32, dim, LENGTH, "bias"
        for dim, length in ((64, 49), (64, 113), (64, 197), (128, 113), (256, 49)):
            yield capability, "forward", torch.bfloat16, dim, length, None
            yield capability, "backward", torch.bfloat16, dim, length, None
        yield capability, "forward", torch.bfloat16, 128, 197, None
        yield capability, "forward", torch.bfloat16, 256, 113, None
        yield capability, "forward", torch.float32, 64, 113, None
        yield capability, "backward", torch.float32, 64, 49, None
        yield capability, "decode", torch.float32, 128, LENGTH, None
        yield capability, "forward", "tf32", 64, LENGTH, "causal"
        yield capability, "backward", "tf32", 64, LENGTH, "bias"
    yield 90, "forward", torch.float16, 64, LENGTH, None


def name_of(problem):
    capability, operation, dtype, dim, length, masked = problem
    return f"sm{capability}-{operation}-{str(dtype).removeprefix('torch.')}-d{dim}-s{length}-{masked}"


@pytest.fixture(autouse=True)
def _float32_precision():
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


class Recorder(dict):
    """A table that knows which of its lines were read."""

    def __init__(self, lines):
        super().__init__(lines)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def test_the_problems_below_need_every_line_of_the_table():
    half, single = Recorder(config._HALF), Recorder(config._FLOAT32)
    with (
        mock.patch.object(config, "_HALF", half),
        mock.patch.object(config, "_FLOAT32", single),
        mock.patch.object(JITFunction, "run", lambda *args, **kwargs: None),
    ):
        for capability, operation, dtype, dim, length, masked in problems():
            with mock.patch.object(config, "capability", lambda tensor, capability=capability: capability):
                launch(operation, dtype, dim, length, None if masked == "bias" else masked, masked == "bias")
    assert half.read == set(half) and single.read == set(single)


def takes_long(problem):
    """What only the long run compiles: ptxas takes many times as long over wide heads and full precision."""
    capability, operation, dtype, dim, length, masked = problem
    return (
        capability == 100
        or dim == 256
        or (dim == 128 and operation == "backward")
        or masked == "bias"
        or length != LENGTH
    )


@pytest.mark.parametrize(
    "problem",
    [pytest.param(p, marks=[pytest.mark.slow] if takes_long(p) else [], id=name_of(p)) for p in problems()],
)
def test_configurations_compile(problem, tmp_path):
    capability, operation, dtype, dim, length, masked = problem
    with compiling_for(capability) as compiled:
        launch(operation, dtype, dim, length, None if masked == "bias" else masked, masked == "bias")
    assert compiled
    for name, kernel in compiled:
        assert kernel.metadata.target.arch == capability
        registers, stack, instructions = inspect(kernel, tmp_path)
        print(f"{name}: {registers} registers, {stack} bytes spilled, {kernel.metadata.shared} bytes shared")
        assert kernel.metadata.shared <= SHARED_LIMIT[capability], name
        assert stack <= config.SPILL_ALLOWANCE.get((name, dim), 0), f"{name} spills {stack} bytes"
        if not name.startswith("attention") or "delta" in name or "merge" in name:
            continue
        if "short" not in name and kernel.metadata.num_stages > 1:
            assert re.search(r"\bLDGSTS\b|\bUTMALDG\b", instructions), f"{name}: loads do not overlap with computing"
        if isinstance(dtype, torch.dtype) and dtype != torch.float32 and "attended" not in name:
            # The few rows of decoding do not fill a wgmma: the product of a warp takes them.
            wanted = r"\bHMMA\b" if "split" in name else TENSOR_CORES[capability]
            assert re.search(wanted, instructions), f"{name} does not use the tensor cores"


@pytest.mark.parametrize("capability", config.CAPABILITIES)
def test_losses_and_tile_maps_compile(capability, tmp_path):
    images, patches = torch.zeros(2, 3, 64, 64), torch.ones(2, 4, 4, dtype=torch.bool)
    keep = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    with compiling_for(capability) as compiled:
        backend.masked_loss(images, images, patches, "l1", "masked_mean", 16, 1.0, True, 1e-6, True)
        backend.mask_tiles([keep, keep[:, :, :1]], LENGTH, LENGTH, 64, 64)
    assert {name for name, _ in compiled} == {"masked_loss_kernel", "mask_tiles_kernel", "mask_bitmaps_kernel"}
    for name, kernel in compiled:
        _, stack, instructions = inspect(kernel, tmp_path)
        assert stack == 0, name
        if name == "masked_loss_kernel":
            # Neighbouring elements of a patch travel four at a time.
            assert re.search(r"\bLDG\.E\.128", instructions), name


ADDITIVE = [
    (capability, dtype, features, masked)
    for capability in config.CAPABILITIES
    for dtype in (torch.bfloat16, torch.float32)
    for features, masked in ((64, None), (256, None), (256, "dense"))
    if masked or capability < 100  # the largest alone for 10.0: each takes twelve seconds
]


@pytest.mark.slow
@pytest.mark.parametrize("capability,dtype,features,masked", ADDITIVE)
def test_additive_attention_compiles(capability, dtype, features, masked, tmp_path):
    query, weight, lse = torch.zeros(2, 130, features, dtype=dtype), torch.zeros(features), torch.zeros(2, 130)
    mask = None
    if masked is not None:
        keep = torch.ones(130, 130, dtype=torch.bool)
        mask = Mask.dense(keep).kernel_form(2, 1, 130, 130, query.device, 64, 64)
    inputs = (query, query, query, weight)
    with compiling_for(capability) as compiled:
        backend.additive_attention_forward(*inputs, mask)
        backend.additive_attention_backward(query, lse, *inputs, query, lse, mask)
    names = {name for name, _ in compiled if name.startswith("additive")}
    assert names == {f"additive_{name}_kernel" for name in ("prepare", "forward", "backward_dq", "backward_dkv")}
    for name, kernel in compiled:
        registers, stack, _ = inspect(kernel, tmp_path)
        print(f"{name}: {registers} registers, {stack} bytes spilled, {kernel.metadata.shared} bytes shared")
        assert kernel.metadata.shared <= SHARED_LIMIT[capability], name
        assert stack <= config.SPILL_ALLOWANCE.get((name, features), 0), f"{name} spills {stack} bytes"


LINEAR = [
    pytest.param(
        *(capability, dtype, normalize),
        marks=[] if (capability, dtype, normalize) == (90, torch.bfloat16, True) else pytest.mark.slow,
    )
    for capability in config.CAPABILITIES
    for dtype in (torch.bfloat16, torch.float32)
    for normalize in (True, False)
]


@pytest.mark.parametrize("capability,dtype,normalize", LINEAR)
def test_linear_losses_compile(capability, dtype, normalize, tmp_path):
    hidden, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((2, 16, 96), (192, 96), (192,)))
    images, mask = torch.zeros(2, 3, 32, 32, dtype=dtype), torch.ones(2, 4, 4, dtype=torch.bool)
    with compiling_for(capability) as compiled:
        options = ("l1", "masked_mean", 8, 1.0, normalize, 1e-6, [True, True, True, not normalize])
        backend.linear_masked_loss(hidden, weight, bias, images, mask, *options)
    kernels = {"counted_tokens_kernel"} | {f"linear_loss_{name}_kernel" for name in ("slopes", "hidden", "weight")}
    assert {name for name, _ in compiled} == kernels | ({"linear_loss_moments_kernel"} if normalize else set())
    for name, kernel in compiled:
        registers, stack, instructions = inspect(kernel, tmp_path)
        print(f"{name}: {registers} registers, {stack} bytes spilled, {kernel.metadata.shared} bytes shared")
        assert kernel.metadata.shared <= SHARED_LIMIT[capability], name
        assert stack == 0, f"{name} spills {stack} bytes"
        if name == "linear_loss_slopes_kernel" and dtype != torch.float32:
            assert re.search(r"\bHMMA\b", instructions), f"{name} does not use the tensor cores"


# (B, Hq, Hkv, L, S, D, Dv): a size of 1 is a compile-time constant to Triton, and takes another way through the code.
SIZES = {
    "long": (2, 4, 2, 130, 600, 40, 64),
    "short": (2, 4, 2, 130, 113, 40, 64),
    "ones, long": (1, 1, 1, 1, 300, 16, 1),
    "ones": (1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize(
    "size,listed",
    [
        pytest.param(size, listed, marks=[] if (size, listed) == ("ones", True) else pytest.mark.slow)
        for size in SIZES
        for listed in (False, True)
    ],
)
def test_every_option_compiles(size, listed):
    B, Hq, Hkv, L, S, D, Dv = SIZES[size]
    query, key, value = (
        torch.zeros(shape, dtype=torch.float16) for shape in ((B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
    )
    mask = Mask.window(9, 3) & Mask.prefix(torch.ones(B, dtype=torch.int64)) & Mask.key_lengths(torch.tensor([1] * B))
    if listed:
        ids = torch.zeros(B, L, dtype=torch.int64), torch.zeros(B, S, dtype=torch.int64)
        keep = torch.ones(B, S, dtype=torch.bool)
        mask = (
            mask & Mask.segments(*ids) & Mask.key_padding(keep) & Mask.dense(torch.ones(B, Hq, L, S, dtype=torch.bool))
        )
    form = mask.kernel_form(B, Hq, L, S, query.device, 64, 64)
    bias, seed = torch.zeros(1, Hq, L, 1, dtype=torch.float16), torch.tensor(1)
    out, lse = torch.zeros(B, Hq, L, Dv, dtype=torch.float16), torch.zeros(B, Hq, L)
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    with compiling_for(90) as compiled:
        for dropout_p, its_bias in ((0.25, bias), (0.0, None)):
            rest = (its_bias, form, -0.5, dropout_p, seed)
            backend.attention_forward(query, key, value, *rest)
            inputs = (query, key, value, out, lse)
            backend.attention_backward(out, lse, *inputs, *rest, *gradients, its_bias is not None)
            rest = (its_bias, form, 0.5, True, dropout_p, seed)
            backend.attention_weights(query, key, lse, *rest)
            backend.attention_weights_backward(torch.zeros(B, L, S), query, key, lse, *rest, its_bias is not None)
    assert {"attention_weights_kernel", "attention_backward_dbias_kernel"} <= {name for name, _ in compiled}


@pytest.mark.slow
@pytest.mark.parametrize("listed", [False, True])
def test_additive_attention_of_ones_compiles(listed):
    x, weight, lse = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(1), torch.zeros(1, 1)
    mask = Mask.window(9, 3) & Mask.prefix(torch.tensor([1])) & Mask.key_lengths(torch.tensor([1]))
    if listed:
        ids = torch.zeros(1, 1, dtype=torch.int64)
        mask = mask & Mask.segments(ids, ids) & Mask.dense(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    form = mask.kernel_form(1, 1, 1, 1, x.device, 64, 64)
    with compiling_for(90) as compiled:
        backend.additive_attention_forward(x, x, x, weight, form)
        backend.additive_attention_backward(x, lse, x, x, x, weight, x, lse, form)
    assert {f"additive_backward_{name}_kernel" for name in ("dq", "dkv")} <= {name for name, _ in compiled}


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_losses_of_ones_compile(normalize):
    outputs = 1 + normalize  # what is normalised has at least two
    hidden, weight = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(outputs, 1, dtype=torch.bfloat16)
    bias, target = weight[:, 0], torch.zeros(1, 1, outputs, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    with compiling_for(90) as compiled:
        options = ("smooth_l1", "masked_mean", 0, 1.0, normalize, 1e-6, [True, True, True, not normalize])
        backend.linear_masked_loss(hidden, weight, bias, target, mask, *options)
    assert len(compiled) == 4 + normalize


@pytest.mark.parametrize("kind", ["l2", "l1", "smooth_l1"])
def test_every_loss_compiles(kind):
    tokens, mask = torch.zeros(2, 7, 48, dtype=torch.bfloat16), torch.ones(2, 7, 1, dtype=torch.bool)
    with compiling_for(90) as compiled:
        for normalize in (False, True):
            for reduction in ("masked_mean", "sum", "none"):
                backend.masked_loss(tokens, tokens, mask, kind, reduction, 0, 1.0, normalize, 1e-6, True)
            backend.masked_loss_backward_none(tokens, tokens, tokens, mask, kind, 0, 1.0, normalize, 1e-6)
        backend.masked_loss(
            torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), kind, "mean", 0, 1.0, False, 0.0, False
        )
    assert len(compiled) == 9


def test_every_kind_of_mask_compiles_to_the_parts_it_has():
    # What is absent is a compile-time None: a causal kernel must not carry the code of the other kinds.
    with compiling_for(90) as compiled:
        launch("forward", torch.bfloat16, 64, LENGTH, None)
        launch("forward", torch.bfloat16, 64, LENGTH, "dense")
    plain, dense = (k for name, k in compiled if name == "attention_forward_kernel")
    assert len(plain.asm["ttgir"]) < len(dense.asm["ttgir"])


def test_tuples_of_tuples_end_in_a_constant():
    # Triton 3.6 needs it (common.py), and these tests may run with a later one.
    for operands in (common.MaskOperands, common.TileOperands, live_tiles._MapOperands, Side, Strides):
        assert operands._fields[-1] == "end" and operands._field_defaults["end"] is None


def test_report_of_a_spill_would_fail(tmp_path):
    with compiling_for(80) as compiled, mock.patch.object(config, "table", lambda *_: config.Config(128, 128, 4, 2)):
        launch("forward", torch.bfloat16, 128, LENGTH, "causal")
    assert inspect(compiled[-1][1], tmp_path)[1] > 0
