"""The masked reconstruction losses, on every backend: against float64, SimMIM's and MAE's published code, and torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import (
    MaskedL1Loss,
    MaskedMSELoss,
    MaskedSmoothL1Loss,
    masked_l1_loss,
    masked_mse_loss,
    masked_smooth_l1_loss,
)

KINDS = {"l2": masked_mse_loss, "l1": masked_l1_loss, "smooth_l1": masked_smooth_l1_loss}
REDUCTIONS = ("masked_mean", "sum", "mean", "none")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
BETA = 0.7


def expand(mask: Tensor, like: Tensor, patch_size: int | None = None) -> Tensor:
    """Which elements count, in the shape of `like`."""
    if patch_size is None:
        if like.dim() == 3 and mask.shape == like.shape[:2]:
            mask = mask.unsqueeze(-1)
        return mask.expand(like.shape)
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return pixels.unsqueeze(1).expand(like.shape)


def normalized(target: Tensor, patch_size: int | None = None, eps: float = 1e-6) -> Tensor:
    """MAE's target, over patches (B, H/p, W/p, C * p * p) or tokens."""
    if patch_size is None:
        patches = target
    else:
        B, C, H, W = target.shape
        p = patch_size
        patches = target.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
    patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + eps) ** 0.5
    if patch_size is None:
        return patches
    return patches.reshape(B, H // p, W // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def oracle(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    kind: str,
    reduction: str = "masked_mean",
    patch_size: int | None = None,
    normalize_target: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient, by autograd in float64 over the counted elements alone."""
    x = input.detach().double().requires_grad_()
    target = normalized(target.double(), patch_size) if normalize_target else target.double()
    counted = expand(mask, x, patch_size)
    difference = x[counted] - target[counted]
    if kind == "l2":
        values = difference**2
    elif kind == "l1":
        values = difference.abs()
    else:
        values = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=BETA)
    if reduction == "none":
        loss = torch.zeros_like(x).masked_scatter(counted, values)
    else:
        loss = values.sum() / {"sum": 1, "mean": max(x.numel(), 1), "masked_mean": max(len(values), 1)}[reduction]
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


def call(kind: str, *tensors: Tensor, **options) -> Tensor:
    if kind == "smooth_l1":
        options["beta"] = BETA
    return KINDS[kind](*tensors, **options)


def check(kind: str, input: Tensor, target: Tensor, mask: Tensor, backend: str, **options) -> None:
    input = input.detach().requires_grad_()
    loss = call(kind, input, target, mask, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    expected, expected_gradient = oracle(input, target, mask, kind, **options)
    assert loss.dtype == gradient.dtype == input.dtype
    assert loss.shape == expected.shape and gradient.shape == input.shape
    for found, wanted in ((loss, expected), (gradient, expected_gradient)):
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        smallest = 6e-8 if input.dtype == torch.float16 else 0.0  # the spacing of its smallest numbers
        torch.testing.assert_close(
            found.detach().double(), wanted, rtol=0, atol=TOLERANCE[input.dtype] * largest + smallest
        )


def images(p: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, y = torch.randn(2, 3, 3, 5 * p, 2 * p).to(dtype).unbind(0)[:2]
    return x, y, torch.rand(3, 5, 2) < 0.6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_patch_grid(kind, reduction, dtype, backend, poisoned):
    for p, normalize_target in itertools.product((1, 3, 16), (False, True)):
        x, y, mask = images(p, dtype)
        check(kind, x, y, mask, backend, reduction=reduction, patch_size=p, normalize_target=normalize_target)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens(kind, reduction, dtype, backend, poisoned):
    x, y = torch.randn(2, 3, 17, 113).to(dtype).unbind(0)
    for mask, normalize_target in itertools.product((torch.rand(3, 17) < 0.6, torch.rand(17, 1) < 0.6), (False, True)):
        check(kind, x, y, mask, backend, reduction=reduction, normalize_target=normalize_target)


@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [
        ((), ()),
        ((1,), (1,)),
        ((1023,), (1023,)),
        ((70001,), (70001,)),  # longer than a work unit
        ((70001,), (1,)),
        ((5, 113), (5, 1)),
        ((5, 113), (113,)),
        ((2, 3, 197), (3, 1)),
        ((2, 3, 197), (2, 1, 197)),
        ((2, 3, 5, 7), (2, 1, 5, 7)),
        ((2, 3, 5, 7), (3, 1, 1)),
        ((2, 3, 5, 7), (1,)),
        ((2, 3, 2, 5, 7), (2, 1, 2, 1, 7)),
        ((2, 3, 2, 5, 7, 3), (5, 1, 1)),
        ((2, 1, 2, 5, 1, 3), (2, 1, 2, 5, 1, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_broadcast_masks(shape, mask_shape, reduction, backend, poisoned):
    x, y, mask = torch.randn(shape), torch.randn(shape), torch.rand(mask_shape) < 0.6
    check("l2", x, y, mask, backend, reduction=reduction)
    check("l1", x, y, ~mask, backend, reduction=reduction)


def test_square_token_mask_counts_tokens(backend):
    x, y, mask = torch.randn(4, 4, 4), torch.randn(4, 4, 4), torch.rand(4, 4) < 0.5
    found = masked_mse_loss(x, y, mask, backend=backend)
    torch.testing.assert_close(found, ((x - y)[mask] ** 2).mean())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layouts(reduction, backend, poisoned):
    for p in (None, 4):
        for lay_out in (
            lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
            lambda x: torch.stack([x, x], -1)[..., 1],
            lambda x: F.pad(x, (3, 2))[..., 3:-2],
            lambda x: x[:, :1].expand(x.shape),
            lambda x: x.flip(0),
        ):
            x, y, mask = images(4)
            mask = mask if p else expand(mask, x, 4).transpose(1, 2).contiguous().transpose(1, 2)
            for normalize_target in (False, True) if p else (False,):
                options = {"reduction": reduction, "patch_size": p, "normalize_target": normalize_target}
                check("l2", lay_out(x), y, mask, backend, **options)
                check("l1", x, lay_out(y), mask, backend, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_does_not_count_may_be_anything(kind, reduction, backend, poisoned):
    x, y, mask = images(4)
    for normalize_target, p in ((False, 4), (True, 4), (False, None)):
        counted = expand(mask, x, 4)
        grid = mask if p else counted
        options = {"reduction": reduction, "patch_size": p, "normalize_target": normalize_target, "backend": backend}
        results = []
        for bad in (0.0, float("nan"), float("inf"), -float("inf")):
            input = x.where(counted, bad).requires_grad_()
            loss = call(kind, input, y.where(counted, -bad), grid, **options)
            upstream = torch.ones_like(x).where(counted, bad) if reduction == "none" else None
            results.append((loss.detach(), *torch.autograd.grad(loss, input, upstream)))
        assert (results[0][1][~counted] == 0).all()
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])


def test_nan_that_counts_is_seen(backend):
    x, y, mask = torch.randn(2, 8), torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.bool)
    x[1, 3] = float("nan")
    assert masked_mse_loss(x, y, mask, backend=backend).isnan()
    elements = masked_mse_loss(x, y, mask, reduction="none", backend=backend)
    assert elements[1, 3].isnan() and elements.isnan().sum() == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_counted(kind, reduction, backend, poisoned):
    x, y, mask = images(4)
    x.requires_grad_()
    for grid, p in ((mask & False, 4), (torch.zeros(1, dtype=torch.bool), None)):
        loss = call(kind, x, y, grid, patch_size=p, reduction=reduction, backend=backend)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_tensors(shape, reduction, backend):
    x = torch.randn(shape, requires_grad=True)
    masks = [(torch.ones(shape, dtype=torch.bool), None)]
    if len(shape) == 4:
        masks.append((torch.ones(shape[0], shape[2] // 4, shape[3] // 4, dtype=torch.bool), 4))
    for mask, p in masks:
        loss = masked_mse_loss(x, x.detach(), mask, patch_size=p, reduction=reduction, backend=backend)
        assert loss.shape == (shape if reduction == "none" else ()) and (loss == 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.shape == shape


def test_simmim_loss(backend):
    """The loss that SimMIM's authors publish, up to the 1e-5 that they add to the number of masked patches' pixels."""
    x, y, mask = images(8)
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1).contiguous().double()
    recon = F.l1_loss(y.double(), x.double(), reduction="none")
    published = (recon * pixels).sum() / (pixels.sum() + 1e-5) / 3
    found = masked_l1_loss(x, y, mask, patch_size=8, backend=backend)
    torch.testing.assert_close(found.double(), published, rtol=1e-6, atol=0)


def test_mae_loss(backend):
    """The loss of MAE's published code, over patchified pixels (B, N, p * p * C), with normalised targets."""
    prediction, target, mask = torch.randn(2, 16, 48), torch.randn(2, 16, 48) * 3 + 5, torch.rand(2, 16) < 0.75
    wide = target.double()
    wide = (wide - wide.mean(dim=-1, keepdim=True)) / (wide.var(dim=-1, keepdim=True) + 1.0e-6) ** 0.5
    loss = ((prediction.double() - wide) ** 2).mean(dim=-1)
    published = (loss * mask).sum() / mask.sum()
    found = masked_mse_loss(prediction, target, mask, normalize_target=True, backend=backend)
    torch.testing.assert_close(found.double(), published, rtol=1e-6, atol=0)


def test_normalized_target_far_from_zero(backend):
    """A small spread about a large mean keeps the digits that its target has, and a flat patch gives 0, not NaN."""
    x, y = torch.randn(2, 3, 8, 8), 1000 + torch.randn(2, 3, 8, 8)
    y[0] = 77.7
    mask = torch.ones(2, 2, 2, dtype=torch.bool)
    found = masked_mse_loss(x, y, mask, patch_size=4, normalize_target=True, reduction="none", backend=backend)
    wanted = (x.double() - normalized(y.double(), 4)) ** 2
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0], x[0] ** 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_torch_where_all_counts(kind, backend):
    x, y = torch.randn(5, 113).requires_grad_(), torch.randn(5, 113).requires_grad_()
    peer = {
        "l2": F.mse_loss,
        "l1": F.l1_loss,
        "smooth_l1": lambda x, y, reduction: F.smooth_l1_loss(x, y, reduction=reduction, beta=BETA),
    }[kind]
    y.data[0, :5] = x.data[0, :5]  # where the slope of |x - y| is anybody's choice
    for ours, theirs in (("masked_mean", "mean"), ("mean", "mean"), ("sum", "sum"), ("none", "none")):
        results = []
        everything = torch.ones(1, dtype=torch.bool)
        for loss in (call(kind, x, y, everything, reduction=ours, backend=backend), peer(x, y, reduction=theirs)):
            results.append((loss, *torch.autograd.grad(loss.sum(), (x, y))))
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted)


def test_smooth_l1_without_a_square_is_l1(backend):
    x, y, mask = images(4)
    smooth = masked_smooth_l1_loss(x, y, mask, patch_size=4, beta=0.0, backend=backend)
    assert torch.equal(smooth, masked_l1_loss(x, y, mask, patch_size=4, backend=backend))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, reduction, backend):
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 2, 3) < 0.6

    def loss(x, y):
        return call(kind, x, y, mask, patch_size=2, reduction=reduction, backend=backend)

    torch.autograd.gradcheck(loss, (x, y))
    torch.autograd.gradcheck(
        lambda x: call(kind, x, y.detach(), mask, patch_size=2, normalize_target=True, backend=backend), (x,)
    )


def test_upstream_gradient(backend):
    x, y, mask = images(4)
    x.requires_grad_()
    (plain,) = torch.autograd.grad(masked_l1_loss(x, y, mask, patch_size=4, backend=backend), x)
    (scaled,) = torch.autograd.grad(-2.5 * masked_l1_loss(x, y, mask, patch_size=4, backend=backend), x)
    torch.testing.assert_close(scaled, -2.5 * plain)
    elements = masked_l1_loss(x, y, mask, patch_size=4, reduction="none", backend=backend)
    upstream = torch.randn_like(x).transpose(2, 3).contiguous().transpose(2, 3)
    (weighted,) = torch.autograd.grad(elements, x, upstream)
    torch.testing.assert_close(weighted, (x - y).sign() * upstream * expand(mask, x, 4))


@pytest.mark.parametrize("normalize_target", [False, True])
def test_bitwise_the_same_with_any_number_of_threads(normalize_target):
    x, y = torch.randn(2, 8, 3, 96, 96).unbind(0)
    mask = torch.rand(8, 6, 6) < 0.6
    x.requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 3):
            torch.set_num_threads(count)
            loss = masked_mse_loss(x, y, mask, patch_size=16, normalize_target=normalize_target)
            results.append((loss, *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape, patch",
    [
        ((3, 3, 64, 96), 32),
        ((5, 2, 48, 80), 16),
        ((2, 1, 64, 1088), 32),  # a row of patches in two work units
        ((40, 3, 512), None),  # tokens
        ((2, 70, 4096), None),
    ],
)
def test_forward_alone(kind, dtype, shape, patch):
    # In a forward pass alone the CPU kernel reads by cache lines, and asks early for those of the next patches.
    x, y = (torch.randn(shape).to(dtype) for _ in range(2))
    mask = torch.rand(shape[0], shape[2] // patch, shape[3] // patch) < 0.6 if patch else torch.rand(shape[:2]) < 0.6
    counted = expand(mask, x, patch)
    wanted = oracle(x, y, mask, kind, patch_size=patch)[0]
    y = y.where(counted, float("nan"))
    apart = torch.full((*shape[:-2], shape[-2], shape[-1] + 64), float("nan"), dtype=dtype)[..., : shape[-1]]
    apart.copy_(x.where(counted, float("inf")))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(call(kind, apart, y, mask, patch_size=patch))
    finally:
        torch.set_num_threads(threads)
    assert abs(found[0].double().item() / wanted.item() - 1) < TOLERANCE[dtype]
    assert all(torch.equal(loss, found[0]) for loss in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 3])
def test_large_gradients(dtype, offset):
    # The CPU kernel writes gradients of 4 MB and more past the caches, where they lie at whole vectors.
    shape, p = (2, 3, 640, 1216), 32
    storage = torch.randn(2 * 3 * 640 * 1216 + offset, dtype=dtype)
    x = storage[offset:].view(shape).requires_grad_()
    target, mask = torch.randn(shape, dtype=dtype), torch.rand(2, 20, 38) < 0.6
    (gradient,) = torch.autograd.grad(masked_mse_loss(x, target, mask, patch_size=p, reduction="sum"), x)
    expected = (2 * (x.detach().float() - target.float())).where(expand(mask, x, p), 0.0).to(dtype)
    assert torch.equal(gradient, expected)
    elements = torch.rand(shape[2:]) < 0.5
    (gradient,) = torch.autograd.grad(masked_mse_loss(x, target, elements, reduction="sum"), x)
    assert torch.equal(gradient, (2 * (x.detach().float() - target.float())).where(elements, 0.0).to(dtype))


def test_sum_of_many_keeps_its_digits(backend):
    """Ten million equal elements: a running float32 sum would be off by percents."""
    x = torch.full((1 << 23,), 0.1)
    found = masked_mse_loss(x, torch.zeros_like(x), torch.ones(1, dtype=torch.bool), reduction="sum", backend=backend)
    wanted = (x[:1].double() ** 2 * x.numel()).item()
    assert abs(found.item() / wanted - 1) < 2e-7


def test_no_gradient_wanted(backend):
    x, y, mask = images(4)
    assert not masked_mse_loss(x, y, mask, patch_size=4, backend=backend).requires_grad
    with torch.no_grad():
        assert not masked_mse_loss(x.requires_grad_(), y, mask, patch_size=4, backend=backend).requires_grad


def test_inputs_are_left_alone(backend):
    x, y, mask = images(4)
    copies = x.clone(), y.clone(), mask.clone()
    masked_mse_loss(x.requires_grad_(), y, mask, patch_size=4, normalize_target=True, backend=backend).backward()
    assert all(torch.equal(a, b) for a, b in zip((x, y, mask), copies, strict=True))


def test_modules(backend):
    x, y, mask = images(4)
    options = {"patch_size": 4, "reduction": "sum", "normalize_target": True, "eps": 1e-4, "backend": backend}
    assert torch.equal(MaskedMSELoss(**options)(x, y, mask), masked_mse_loss(x, y, mask, **options))
    assert torch.equal(MaskedL1Loss(**options)(x, y, mask), masked_l1_loss(x, y, mask, **options))
    found = MaskedSmoothL1Loss(beta=0.3, **options)(x, y, mask)
    assert torch.equal(found, masked_smooth_l1_loss(x, y, mask, beta=0.3, **options))
    assert not list(MaskedMSELoss().parameters())


def test_module_representation():
    assert repr(MaskedMSELoss(patch_size=16)) == "MaskedMSELoss(patch_size=16, reduction='masked_mean')"
    assert "beta=0.5" in repr(MaskedSmoothL1Loss(beta=0.5))
    text = repr(MaskedL1Loss(normalize_target=True, backend="reference"))
    assert "normalize_target=True" in text and "backend='reference'" in text


IMAGE = torch.zeros(2, 3, 8, 12)
GRID = torch.ones(2, 2, 3, dtype=torch.bool)
TOKENS = torch.zeros(2, 5, 7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((None, IMAGE, GRID), {}, TypeError, ("input", "NoneType")),
        ((IMAGE, [1.0], GRID), {}, TypeError, ("target", "list")),
        ((IMAGE, IMAGE, 1), {}, TypeError, ("mask", "int")),
        ((IMAGE.int(), IMAGE.int(), GRID), {}, TypeError, ("input", "int32", "float32")),
        ((IMAGE.cfloat(), IMAGE.cfloat(), GRID), {}, TypeError, ("input", "complex64")),
        ((IMAGE, IMAGE.double(), GRID), {}, TypeError, ("target", "float64", "float32")),
        ((IMAGE, IMAGE[:1], GRID), {}, ValueError, ("target", "(1, 3, 8, 12)", "(2, 3, 8, 12)")),
        ((IMAGE, IMAGE, GRID.int()), {"patch_size": 4}, TypeError, ("mask", "int32", ".bool()")),
        ((IMAGE, IMAGE, GRID.float()), {"patch_size": 4}, TypeError, ("mask", "float32", ".bool()")),
        ((IMAGE, IMAGE, GRID), {}, ValueError, ("mask", "(2, 2, 3)", "patch_size")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 5}, ValueError, ("patch_size", "5", "8 x 12")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 2}, ValueError, ("mask", "(2, 4, 6)", "(2, 2, 3)")),
        ((IMAGE, IMAGE, GRID[0]), {"patch_size": 4}, ValueError, ("mask", "(2, 3)")),
        ((TOKENS, TOKENS, GRID), {"patch_size": 4}, ValueError, ("input", "(2, 5, 7)", "patch_size")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 0}, ValueError, ("patch_size", "0")),
        ((IMAGE, IMAGE, GRID), {"patch_size": -4}, ValueError, ("patch_size", "-4")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4.0}, TypeError, ("patch_size", "float")),
        ((IMAGE, IMAGE, GRID), {"patch_size": True}, TypeError, ("patch_size", "bool")),
        ((TOKENS, TOKENS, torch.ones(2, 7, dtype=torch.bool)), {}, ValueError, ("mask", "(2, 7)", "(2, 5, 7)")),
        ((TOKENS, TOKENS, torch.ones(1, 2, 5, 7, dtype=torch.bool)), {}, ValueError, ("mask", "(1, 2, 5, 7)")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4, "reduction": "average"}, ValueError, ("reduction", "average", "sum")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4, "eps": 0.0}, ValueError, ("eps", "0.0")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4, "eps": float("nan")}, ValueError, ("eps", "nan")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4, "eps": "small"}, TypeError, ("eps", "str")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4, "normalize_target": 1}, TypeError, ("normalize_target", "int")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4, "backend": "gpu"}, ValueError, ("backend", "gpu")),
        ((IMAGE, IMAGE, GRID), {"patch_size": 4, "backend": "triton"}, RuntimeError, ("triton",)),
        (
            (TOKENS, TOKENS, torch.ones(2, 5, 7, dtype=torch.bool)),
            {"normalize_target": True},
            ValueError,
            ("mask", "(2, 5, 7)", "normalize_target"),
        ),
        (
            (TOKENS[..., :1], TOKENS[..., :1], torch.ones(2, 5, 1, dtype=torch.bool)),
            {"normalize_target": True},
            ValueError,
            ("input", "at least 2", "(2, 5, 1)"),
        ),
        (
            (TOKENS, TOKENS.clone().requires_grad_(), torch.ones(2, 5, dtype=torch.bool)),
            {"normalize_target": True},
            ValueError,
            ("target", "normalize_target"),
        ),
        ((TOKENS, TOKENS.to("meta"), torch.ones(2, 5, dtype=torch.bool)), {}, ValueError, ("target", "meta", "cpu")),
        ((TOKENS, TOKENS, torch.ones(2, 5, dtype=torch.bool, device="meta")), {}, ValueError, ("mask", "meta", "cpu")),
    ],
)
def test_bad_input(arguments, options, error, words):
    for loss in KINDS.values():
        with pytest.raises(error) as caught:
            loss(*arguments, **options)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(("dtype", "beta"), [(torch.float32, 1e-40), (torch.bfloat16, 1e-45), (torch.float64, 1e-310)])
def test_beta_whose_inverse_is_infinite(dtype, beta, backend):
    input = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=dtype, requires_grad=True)
    counted = torch.ones(4, dtype=torch.bool)
    loss = masked_smooth_l1_loss(input, torch.zeros(4, dtype=dtype), counted, beta=beta, backend=backend)
    loss.backward()
    assert loss == 1.5
    assert input.grad.tolist() == [0, 0.25, -0.25, 0.25]


@pytest.mark.parametrize(
    ("beta", "error"), [(-1.0, ValueError), (float("inf"), ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_bad_beta(beta, error):
    with pytest.raises(error, match="beta"):
        masked_smooth_l1_loss(IMAGE, IMAGE, GRID, patch_size=4, beta=beta)
    with pytest.raises(error, match="beta"):
        MaskedSmoothL1Loss(beta=beta)


def test_modules_refuse_bad_options_at_once():
    for module in (MaskedMSELoss, MaskedL1Loss, MaskedSmoothL1Loss):
        with pytest.raises(ValueError, match="reduction"):
            module(reduction="average")
        with pytest.raises(TypeError, match="patch_size"):
            module(patch_size="16")


@pytest.mark.parametrize("loss", KINDS.values())
def test_gradients_of_several_upstream_gradients_at_once(loss, backend):
    x, upstream = TOKENS.clone().requires_grad_(), torch.tensor([1.0, -2.0, 1.0])
    value = loss(x, TOKENS + 1, torch.ones(2, 5, dtype=torch.bool), backend=backend)
    (single,) = torch.autograd.grad(value, x, retain_graph=True)
    (batched,) = torch.autograd.grad(value, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(batched, upstream.view(-1, 1, 1, 1) * single)


@pytest.mark.parametrize("loss", KINDS.values())
def test_input_that_is_negated_lazily(loss, backend):
    spectrum = torch.randn(2, 5, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    x, target, mask = spectrum.conj().imag, spectrum.real.contiguous(), torch.ones(2, 5, dtype=torch.bool)
    assert x.is_neg()
    assert torch.equal(loss(x, target, mask, backend=backend), loss(x.resolve_neg(), target, mask, backend=backend))
    assert torch.equal(loss(target, x, mask, backend=backend), loss(target, x.resolve_neg(), mask, backend=backend))
