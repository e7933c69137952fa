"""The prediction head fused with the masked loss, on every backend that has it, against plain torch in float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import dispatch, linear_masked_l1_loss, linear_masked_mse_loss, linear_masked_smooth_l1_loss
from fastattn.dispatch import Problem
from fastattn.losses import fuses_head
from fastattn.testing import poisoned_buffers
from fastattn.testing.cases import random_linear_loss_case
from fastattn.testing.checks import FAIL, check_linear_loss

FUNCTIONS = {"l2": linear_masked_mse_loss, "l1": linear_masked_l1_loss, "smooth_l1": linear_masked_smooth_l1_loss}
# Rounding of what is stored, times a little for the sums; the comparison is relative to the largest element.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (B, N, E, P): smaller than a vector, odd, beyond a block of tokens, of features and of columns
SIZES = [(1, 1, 1, 1), (2, 7, 5, 3), (3, 17, 40, 50), (5, 113, 59, 203), (2, 197, 97, 96), (1, 300, 48, 193)]


def problem(
    sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0, share: float = 0.6
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, E, P = sizes
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias, target = draw(B, N, E), draw(P, E) / E**0.5, draw(P), draw(B, N, P)
    mask = torch.rand(B, N, generator=generator) < share
    return *(x.to(dtype) for x in (hidden, weight, bias, target)), mask


def patches(images: Tensor, p: int) -> Tensor:
    """(B, N, C p p), by slicing."""
    B, _, H, W = images.shape
    rows = [images[:, :, y : y + p, x : x + p].reshape(B, -1) for y in range(0, H, p) for x in range(0, W, p)]
    return torch.stack(rows, 1)


def oracle(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    kind: str = "l2",
    reduction: str = "masked_mean",
    normalize_target: bool = False,
    patch_size: int | None = None,
) -> tuple[Tensor, ...]:
    """The loss and its gradients by hidden, weight, bias and target, by autograd in float64 over the counted tokens."""
    given = [x.detach().double().requires_grad_() for x in (hidden, weight, *([] if bias is None else [bias]), target)]
    h, w, *b, t = given
    goal = patches(t, patch_size) if patch_size else t
    counted = mask.flatten(1)
    goal = goal[counted]
    if normalize_target:
        goal = (goal - goal.mean(-1, keepdim=True)) / (goal.var(-1, keepdim=True) + 1e-6).sqrt()
        goal = goal.detach()
    difference = F.linear(h[counted], w, b[0] if b else None) - goal
    values = difference**2 if kind == "l2" else difference.abs()
    if kind == "smooth_l1":
        values = torch.where(values < 1, difference**2 / 2, values - 0.5)
    elements = {"sum": 1, "mean": max(counted.numel() * len(w), 1), "masked_mean": max(values.numel(), 1)}[reduction]
    loss = values.sum() / elements
    gradients = torch.autograd.grad(loss, given, allow_unused=True)
    return loss.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, given, strict=True))


def compute(tensors: tuple[Tensor | None, ...], mask: Tensor, kind: str = "l2", **options) -> tuple[Tensor, ...]:
    """The same by fastattn; the target has a gradient unless it is normalised."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    if options.get("normalize_target"):
        leaves[3] = leaves[3].detach()
    with poisoned_buffers():
        loss = FUNCTIONS[kind](*leaves, mask, **options)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        return loss.detach(), *torch.autograd.grad(loss, wanted)


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for n, (a, b) in enumerate(zip(got, expected, strict=False)):
        assert a.dtype == dtype and a.shape == b.shape
        error = (a.double() - b).abs().max().item() if b.numel() else 0.0
        scale = b.abs().max().item() if b.numel() else 0.0
        assert error <= TOLERANCE[dtype] * scale + 1e-300, f"result {n}: {error} of {scale}"


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_sizes(sizes, kind, backend):
    *tensors, mask = problem(sizes)
    got = compute(tensors, mask, kind, backend=backend)
    # The sign of a difference that is nearly 0 may differ from float64's: for l1 the slopes are compared by their own.
    expected = oracle(*tensors, mask, kind)
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["masked_mean", "sum", "mean"])
def test_dtypes_and_reductions(dtype, reduction, backend):
    *tensors, mask = problem((3, 67, 40, 131), dtype)
    got = compute(tensors, mask, reduction=reduction, backend=backend)
    assert_close(got, oracle(*tensors, mask, reduction=reduction), dtype)


@pytest.mark.skipif(dispatch.NATIVE_FAILURE is not None, reason="the compiled library is not there")
@pytest.mark.parametrize("index", range(10))
def test_random_bfloat16_problems(index):
    """By contract 11; where the CPU multiplies pairs of bfloat16 numbers, kernels of their own."""
    checks = check_linear_loss("cpu", random_linear_loss_case(3, index, torch.bfloat16))
    failed = [f"{check.name}: {check.detail}" for check in checks if check.status == FAIL]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize_target", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_images(dtype, normalize_target, kind, backend):
    B, C, H, W, p, E = 2, 3, 24, 40, 8, 29
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    tensors = draw(B, 15, E), draw(C * p * p, E) / 5, draw(C * p * p), draw(B, C, H, W) + 3
    mask = torch.rand(B, 3, 5, generator=generator) < 0.6
    options = {"patch_size": p, "normalize_target": normalize_target}
    expected = oracle(*tensors, mask, kind, **options)
    got = compute(tensors, mask, kind, backend=backend, **options)
    assert_close(got, expected[: len(got)], dtype)
    # The grid in row order, and images whose pixels do not lie side by side
    flat = compute(tensors, mask.flatten(1), kind, backend=backend, **options)
    strided = tensors[3].to(memory_format=torch.channels_last)
    again = compute((*tensors[:3], strided), mask, kind, backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, flat, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_normalized_tokens(backend):
    *tensors, mask = problem((2, 50, 24, 100))
    tensors[3] = tensors[3] * 0.1 + 10  # a spread that is small beside the mean
    got = compute(tensors, mask, normalize_target=True, backend=backend)
    expected = oracle(*tensors, mask, normalize_target=True)
    for a, b in zip(got, expected, strict=False):
        assert (a.double() - b).abs().max() <= 2e-5 * b.abs().max()


def test_without_bias_and_layouts(backend):
    *tensors, mask = problem((3, 41, 33, 70))
    tensors[2] = None
    expected = oracle(*tensors, mask)
    straight = compute(tensors, mask, backend=backend)
    assert_close(straight, expected, torch.float32)
    hidden, weight, _, target = tensors
    turned = (
        hidden.transpose(1, 2).contiguous().transpose(1, 2),
        weight.T.contiguous().T,
        None,
        target.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    other = compute(turned, mask.T.contiguous().T, backend=backend)
    assert_close(other, expected, torch.float32)


def test_what_does_not_count_may_be_anything(backend):
    *tensors, mask = problem((3, 67, 40, 131))
    clean = compute(tensors, mask, backend=backend)
    hidden, weight, bias, target = (x.clone() for x in tensors)
    hidden[~mask] = float("nan")
    target[~mask] = float("inf")
    dirty = compute((hidden, weight, bias, target), mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[1][~mask].any() and not dirty[4][~mask].any()


def test_nan_that_counts_is_seen(backend):
    *tensors, mask = problem((1, 5, 8, 9), share=1.1)
    tensors[0][0, 3, 2] = float("nan")
    assert compute(tensors, mask, backend=backend)[0].isnan()


@pytest.mark.parametrize("reduction", ["masked_mean", "sum", "mean"])
def test_nothing_counted(reduction, backend):
    *tensors, mask = problem((2, 33, 24, 40), share=-1.0)
    assert all(not x.any() for x in compute(tensors, mask, reduction=reduction, backend=backend))


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)])
def test_empty_tensors(sizes, backend):
    *tensors, mask = problem(sizes)
    got = compute(tensors, mask, backend=backend)
    for a, b in zip(got, oracle(*tensors, mask), strict=True):
        assert a.shape == b.shape and torch.allclose(a.double(), b)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("normalize_target", [False, True])
def test_gradcheck(normalize_target, dtype, backend):
    *tensors, mask = problem((2, 6, 5, 4), dtype)
    leaves = [x.requires_grad_() for x in tensors[: 3 if normalize_target else 4]]

    def loss(*leaves: Tensor) -> Tensor:
        target = tensors[3] if normalize_target else leaves[3]
        return linear_masked_mse_loss(*leaves[:3], target, mask, normalize_target=normalize_target, backend=backend)

    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=not normalize_target, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_every_choice_of_gradients(backend):
    *tensors, mask = problem((2, 37, 24, 50))
    full = compute(tensors, mask, backend=backend)[1:]
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        leaves = [x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
        linear_masked_mse_loss(*leaves, mask, backend=backend).backward()
        for leaf, want, expected in zip(leaves, wanted, full, strict=True):
            assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


def test_upstream_gradient_and_accumulation(backend):
    *tensors, mask = problem((2, 37, 24, 50))
    full = compute(tensors, mask, backend=backend)[1:]
    leaves = [x.detach().requires_grad_() for x in tensors]
    (linear_masked_mse_loss(*leaves, mask, backend=backend) * 3).backward(retain_graph=True)
    assert all(torch.allclose(x.grad, 3 * g, rtol=1e-6) for x, g in zip(leaves, full, strict=True))


def test_no_gradient_wanted(backend):
    *tensors, mask = problem((2, 37, 24, 50))
    with_gradient = compute(tensors, mask, backend=backend)[0]
    loss = linear_masked_mse_loss(*tensors, mask, backend=backend)
    assert not loss.requires_grad and torch.equal(loss, with_gradient)


@pytest.mark.skipif(dispatch.TRITON_INTERPRETED, reason="Triton's interpreter computes on one thread")
@pytest.mark.parametrize("patch_size", [None, 4])
def test_bitwise_the_same_with_any_number_of_threads(patch_size):
    *tensors, mask = problem((4, 160, 48, 192))
    if patch_size:
        tensors[1], tensors[2], tensors[3] = tensors[1][:48], tensors[2][:48], torch.randn(4, 3, 40, 64)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(compute(tensors, mask, patch_size=patch_size, normalize_target=patch_size is None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_beta_whose_inverse_is_infinite(backend):
    hidden, weight, _, target, mask = problem((2, 7, 5, 3))
    hidden, target = torch.zeros_like(hidden).requires_grad_(), target.where(target > 0, 0)
    loss = linear_masked_smooth_l1_loss(hidden, weight, None, target, mask, beta=1e-40, backend=backend)
    expected = linear_masked_l1_loss(hidden, weight, None, target, mask, backend=backend)
    assert loss == expected
    gradients = (torch.autograd.grad(x, hidden)[0] for x in (loss, expected))
    assert torch.equal(*gradients)


def test_reference_predicts_once(monkeypatch):
    hidden, weight, bias, target, mask = problem((2, 7, 5, 3))
    predictions = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *arguments: predictions.append(arguments) or linear(*arguments))
    loss = linear_masked_mse_loss(hidden, weight.requires_grad_(), bias, target, mask, backend="reference")
    loss.backward()
    assert len(predictions) == 1 and weight.grad.abs().max() > 0


def test_agrees_with_linear_and_masked_loss(backend):
    *tensors, mask = problem((3, 67, 40, 131))
    hidden, weight, bias, target = tensors
    apart = fastattn.masked_l1_loss(F.linear(hidden, weight, bias), target, mask, backend=backend)
    assert torch.allclose(linear_masked_l1_loss(*tensors, mask, backend=backend), apart, rtol=2e-6)


def test_operator(backend):
    *tensors, mask = problem((2, 9, 8, 12))
    tensors = [x.requires_grad_() for x in tensors]
    options = ("l2", "masked_mean", 0, 1.0, False, 1e-6, [True] * 4, backend)
    torch.library.opcheck(torch.ops.fastattn.linear_masked_loss, (*tensors, mask.unsqueeze(1), *options))


def test_compiled_without_a_break(backend):
    *tensors, mask = problem((2, 9, 8, 12))
    compiled = torch.compile(linear_masked_mse_loss, backend="aot_eager", fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss = compiled(*leaves, mask, backend=backend)
    loss.backward()
    expected = compute(tensors, mask, backend=backend)
    assert torch.equal(loss.detach(), expected[0])
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, expected[1:], strict=True))


def test_autocast(backend):
    *tensors, mask = problem((2, 40, 24, 36))
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_masked_mse_loss(*leaves, mask, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32 and all(x.grad.dtype == torch.float32 for x in leaves)
    rounded = [x.bfloat16() for x in tensors[:3]]
    expected = oracle(*rounded, tensors[3], mask)
    assert abs(loss.item() - expected[0].item()) < 1e-5 * expected[0].item()


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_func_transforms(dtype, backend):
    *tensors, mask = problem((2, 9, 8, 12), dtype)
    hidden, *rest = tensors
    gradient = torch.func.grad(lambda x: linear_masked_mse_loss(x, *rest, mask, backend=backend))(hidden)
    assert torch.allclose(gradient, oracle(*tensors, mask)[1])
    many = torch.stack([hidden, hidden + 1])
    losses = torch.func.vmap(lambda x: linear_masked_mse_loss(x, *rest, mask, backend=backend))(many)
    assert torch.allclose(losses[1], oracle(hidden + 1, *rest, mask)[0])


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    *tensors, mask = problem((2, 9, 8, 12))
    with FlopCounterMode(display=False) as counter:
        linear_masked_mse_loss(*(x.requires_grad_() for x in tensors), mask)
    assert counter.get_total_flops() == 3 * 2 * 2 * 9 * 8 * 12


MEMORY = """
import resource, torch, fastattn
torch.set_num_threads(1)
hidden, weight = torch.randn(16, 256, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
target, mask = torch.zeros(1, 1, 1).expand(16, 256, 4096), torch.rand(16, 256) < 0.9
def step(B): fastattn.linear_masked_mse_loss(hidden[:B], weight, None, target[:B], mask[:B]).backward()
step(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_predictions_are_never_stored():
    # 64 MB of predictions; what a block of tokens takes does not grow with their number.
    command, env = [sys.executable, "-c", MEMORY], os.environ | {"TRITON_INTERPRET": "0"}
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
    assert grown < 16 * 1024, f"{grown} KB more"


def test_where_the_fused_head_is_the_faster_one():
    with FakeTensorMode():
        on_cpu, on_gpu = (torch.empty(2, 3, 4, device=device) for device in ("cpu", "cuda"))
        assert fuses_head(on_cpu) == (dispatch.NATIVE_FAILURE is None or dispatch.TRITON_INTERPRETED)
        assert fuses_head(on_cpu.bfloat16()) == dispatch.CPU_MULTIPLIES_PAIRS
        assert not fuses_head(on_cpu.half())
        assert not fuses_head(on_gpu)


def test_backends_without_the_kernel_say_so():
    reasons = dispatch.BACKENDS["cuda"].why_not(Problem("linear_masked_loss", "cpu", torch.float32))
    assert "it has no kernel of the linear head with its loss" in reasons


GOOD = {
    "hidden": torch.zeros(2, 6, 4),
    "weight": torch.zeros(12, 4),
    "bias": torch.zeros(12),
    "target": torch.zeros(2, 6, 12),
    "mask": torch.ones(2, 6, dtype=torch.bool),
}
IMAGES = {"target": torch.zeros(2, 3, 4, 6), "patch_size": 2}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hidden": 1}, TypeError, "hidden must be a tensor"),
        ({"bias": 1}, TypeError, "bias must be a tensor or None"),
        ({"mask": torch.ones(2, 6)}, TypeError, "mask must be of dtype bool"),
        ({"weight": torch.zeros(12, 4, dtype=torch.int64)}, TypeError, "weight must be of dtype"),
        ({"weight": torch.zeros(12, 4, dtype=torch.float64)}, TypeError, "weight must have the dtype of hidden"),
        ({"target": torch.zeros(2, 6, 12, dtype=torch.float64)}, TypeError, "target must have the dtype of hidden"),
        ({"hidden": torch.zeros(12, 4)}, ValueError, r"hidden must be \(B, N, E\)"),
        ({"weight": torch.zeros(12, 5)}, ValueError, r"weight must be \(P, 4\)"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must be \(P,\) = \(12,\)"),
        ({"target": torch.zeros(2, 6, 11)}, ValueError, r"target must be \(B, N, P\)"),
        ({"mask": torch.ones(1, 6, dtype=torch.bool)}, ValueError, r"mask must be \(B, N\)"),
        ({"mask": torch.ones(2, 6, device="meta", dtype=torch.bool)}, ValueError, "mask must be on the device"),
        ({"reduction": "none"}, ValueError, "reduction must be 'masked_mean', 'sum' or 'mean'"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"backend": "abacus"}, ValueError, "backend must be one of"),
        (
            {"normalize_target": True, "target": torch.zeros(2, 6, 12, requires_grad=True)},
            ValueError,
            "target must not",
        ),
        ({"patch_size": 2}, ValueError, "target must be images"),
        ({**IMAGES, "target": torch.zeros(2, 3, 5, 6)}, ValueError, "patch_size must divide"),
        ({**IMAGES, "target": torch.zeros(2, 3, 4, 4)}, ValueError, "target must have the 6 patches"),
        ({**IMAGES, "target": torch.zeros(2, 2, 4, 6)}, ValueError, "weight must predict the 8 numbers"),
        ({**IMAGES, "mask": torch.ones(2, 3, 2, dtype=torch.bool)}, ValueError, "mask must be .* the patch grid"),
    ],
)
def test_bad_input(changes, error, words):
    with pytest.raises(error, match=words):
        linear_masked_mse_loss(**{**GOOD, **changes})


def test_operator_refuses_what_its_kernel_cannot_read():
    arguments = [GOOD[name] for name in ("hidden", "weight", "bias", "target")]
    options = ("l2", "masked_mean", 0, 1.0, False, 1e-6, [False] * 4, "cpu")
    with pytest.raises(ValueError, match="mask"):
        torch.ops.fastattn.linear_masked_loss(*arguments, GOOD["mask"][:, :3].unsqueeze(1), *options)
    with pytest.raises(ValueError, match="target"):
        torch.ops.fastattn.linear_masked_loss(*arguments[:3], torch.zeros(2, 6, 3), GOOD["mask"].unsqueeze(1), *options)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_gradients_of_several_upstream_gradients_at_once(dtype, backend):
    *given, mask = problem((2, 7, 5, 3), dtype)
    given = [x.requires_grad_() for x in given]
    upstream = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    loss = linear_masked_mse_loss(*given, mask, backend=backend)
    singles = torch.autograd.grad(loss, given, retain_graph=True)
    batched = torch.autograd.grad(loss, given, upstream, is_grads_batched=True)
    for several, single in zip(batched, singles, strict=True):
        torch.testing.assert_close(several, upstream.view(-1, *[1] * single.dim()) * single)


def test_gradient_for_a_second_one_within_an_autocast_region(backend):
    hidden, weight, _, target, mask = problem((2, 50, 64, 48))
    given = [x.requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_masked_mse_loss(*given, None, target, mask, backend=backend)
        within = torch.autograd.grad(loss, given, create_graph=True)
    for seen, expected in zip(within, torch.autograd.grad(loss, given, create_graph=True), strict=True):
        assert torch.equal(seen, expected)
