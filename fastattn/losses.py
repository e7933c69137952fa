"""Masked reconstruction losses: only the elements that the mask counts are read, and they alone have a gradient.

The loss of masked image modelling: SimMIM (Xie et al. 2022, "SimMIM: a simple framework for masked image modeling",
section 3.4, equation 1: L1 over the masked pixels, divided by their number) and MAE (He et al. 2022, "Masked
autoencoders are scalable vision learners", section 3: squared error over the masked patches, with the pixels of each
target patch normalised if wanted).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, masks, ops
from fastattn.dispatch import KERNEL_DTYPES, Problem

REDUCTIONS = ("masked_mean", "sum", "mean", "none")
_ACCEPTED_DTYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
_MAX_DIMS = 4  # of the operator's tensors


def masked_mse_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int | None = None,
    reduction: str = "masked_mean",
    normalize_target: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Squared error (input - target)^2 over the elements that `mask` counts.

    Loss and gradient come out of one pass over the counted elements; what is not counted is never read into either, so
    it may hold NaN or Inf. Sums are made in a fixed order: two runs are bitwise equal, whatever the number of threads.

    Args:
        input: the prediction; float32, bfloat16, float16 or float64, any strides. Images (B, C, H, W), tokens
            (B, N, D), or any shape.
        target: of the shape, dtype and device of `input`.
        mask: bool, True = this element counts. With `patch_size`, the patch grid (B, H/p, W/p) of images; for tokens
            (B, N, D), also (B, N); otherwise anything that broadcasts to `input`. It is never expanded.
        patch_size: p, side of the patches in pixels, which divides H and W; None when the mask is not a patch grid.
        reduction: "masked_mean" (sum over the counted elements, divided by their number; 0 when there are none),
            "sum" (over the counted elements), "mean" (that sum divided by the number of all elements; 0 when there are
            none) or "none" (the shape of `input`, 0 where not counted).
        normalize_target: replace each target patch x by (x - mean) / sqrt(variance + eps), with the unbiased variance,
            as MAE does: over the C * p * p elements of a patch, or without `patch_size` over the last dimension, along
            which the mask must then not vary. No gradient can flow to such a target.
        eps: added to the variance; positive.
        backend: "cpu", "reference", ...; None takes the first able one.

    Returns:
        A scalar, or a tensor of the shape of `input` for "none"; of the dtype of `input`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, tensors on different devices, or an unknown `reduction` or `backend`.
        RuntimeError: `backend` is named and cannot run.
    """
    return _masked_loss("l2", input, target, mask, patch_size, reduction, 1.0, normalize_target, eps, backend)


def masked_l1_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int | None = None,
    reduction: str = "masked_mean",
    normalize_target: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Absolute error |input - target| over the elements that `mask` counts: SimMIM's published loss.

    The gradient is 0 where input = target. Arguments, result and errors: `masked_mse_loss`.
    """
    return _masked_loss("l1", input, target, mask, patch_size, reduction, 1.0, normalize_target, eps, backend)


def masked_smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int | None = None,
    reduction: str = "masked_mean",
    beta: float = 1.0,
    normalize_target: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """With d = |input - target|: d^2 / (2 beta) below beta, d - beta / 2 above, over the elements that `mask` counts.

    Args:
        beta: where the square turns into the absolute value, in the units of `input`; not negative, 0 is
            `masked_l1_loss`.

    The other arguments, result and errors: `masked_mse_loss`.
    """
    beta = check_beta(beta)
    kind = "smooth_l1" if beta > 0 else "l1"
    return _masked_loss(kind, input, target, mask, patch_size, reduction, beta, normalize_target, eps, backend)


def linear_masked_mse_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int | None = None,
    reduction: str = "masked_mean",
    normalize_target: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Prediction head and loss in one: `masked_mse_loss` of the prediction hidden @ weight.T + bias.

    Only the counted tokens are predicted, a block of them at a time: the predictions are never stored, and the products
    of forward and backward run at the counted share of their size. What is not counted, in `hidden` and in `target`,
    may hold NaN or Inf. Sums are made in a fixed order: two runs are bitwise equal, whatever the number of threads.

    Args:
        hidden: features of the tokens, (B, N, E); float32, bfloat16, float16 or float64.
        weight: (P, E), as of `torch.nn.Linear`; dtype and device of `hidden`.
        bias: (P,), or None.
        target: tokens (B, N, P); or with `patch_size` images (B, C, H, W), whose patches in row order are the tokens:
            P = C * p * p, and prediction (c, y, x), in this order, is pixel (y, x) of channel c of the patch. Any
            strides; dtype and device of `hidden`, under autocast any dtype.
        mask: bool, True = this token counts; (B, N), or with `patch_size` also the patch grid (B, H/p, W/p).
        patch_size: p, side of the patches in pixels, which divides H and W; None when the target is tokens.
        reduction: "masked_mean" (sum over the counted elements, divided by their number; 0 when there are none),
            "sum" (over the counted elements) or "mean" (that sum divided by the number of all elements, B * N * P).
        normalize_target: replace the target x of each token by (x - mean) / sqrt(variance + eps), with the unbiased
            variance over its P elements, as MAE does. No gradient can flow to such a target.
        eps: added to the variance; positive.
        backend: "cpu", "reference", ...; None takes the first able one.

    Returns:
        A scalar of the dtype of `target`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, tensors on different devices, or an unknown `reduction` or `backend`.
        RuntimeError: `backend` is named and cannot run.

    Source: the head and loss of SimMIM (Xie et al. 2022, sections 3.3 and 3.4) and of MAE (He et al. 2022, section 3).
    """
    return _linear_masked_loss(
        "l2", hidden, weight, bias, target, mask, patch_size, reduction, 1.0, normalize_target, eps, backend
    )


def linear_masked_l1_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int | None = None,
    reduction: str = "masked_mean",
    normalize_target: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Prediction head and loss in one: `masked_l1_loss` of the prediction hidden @ weight.T + bias, SimMIM's own.

    Arguments, result and errors: `linear_masked_mse_loss`.
    """
    return _linear_masked_loss(
        "l1", hidden, weight, bias, target, mask, patch_size, reduction, 1.0, normalize_target, eps, backend
    )


def linear_masked_smooth_l1_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int | None = None,
    reduction: str = "masked_mean",
    beta: float = 1.0,
    normalize_target: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Prediction head and loss in one: `masked_smooth_l1_loss` of the prediction hidden @ weight.T + bias.

    beta: as there. The other arguments, result and errors: `linear_masked_mse_loss`.
    """
    beta = check_beta(beta)
    kind = "smooth_l1" if beta > 0 else "l1"
    return _linear_masked_loss(
        kind, hidden, weight, bias, target, mask, patch_size, reduction, beta, normalize_target, eps, backend
    )


def _masked_loss(
    kind: str,
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    patch_size: int | None,
    reduction: str,
    beta: float,
    normalize_target: bool,
    eps: float,
    backend: str | None,
) -> Tensor:
    check_options(patch_size, reduction, normalize_target, eps)
    dtype = _check_tensors(input, target, mask)
    beta = _divisor(beta, dtype)
    mask = _fit_patches(mask, input, patch_size) if patch_size else _fit(mask, input)
    if normalize_target:
        _check_normalizable(input, target, mask, patch_size)
    name = dispatch.select(Problem("masked_loss", input.device.type, dtype), backend)
    need_grad = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    shape = input.shape
    if input.dim() > _MAX_DIMS:
        # Where the mask differs between the leading dimensions they have to be one in the mask as well: a copy of the
        # mask alone, and as small as its last three dimensions are.
        mask = mask.expand(*shape[:-3], *mask.shape[-3:]).flatten(0, -_MAX_DIMS)
        input, target = input.flatten(0, -_MAX_DIMS), target.flatten(0, -_MAX_DIMS)
    loss, _ = ops.masked_loss(
        input, target, mask, kind, reduction, patch_size or 0, beta, normalize_target, float(eps), need_grad, name
    )
    return loss.view(shape) if reduction == "none" and len(shape) > _MAX_DIMS else loss


def _linear_masked_loss(
    kind: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    patch_size: int | None,
    reduction: str,
    beta: float,
    normalize_target: bool,
    eps: float,
    backend: str | None,
) -> Tensor:
    check_options(patch_size, reduction, normalize_target, eps)
    if reduction == "none":
        raise ValueError("reduction must be 'masked_mean', 'sum' or 'mean': a fused head has no losses of elements")
    dtype = _check_head(hidden, weight, bias, target, mask)
    beta = _divisor(beta, dtype)
    mask = _check_tokens(hidden, weight, target, mask, patch_size)
    if normalize_target:
        if target.requires_grad:
            raise ValueError("target must not require grad with normalize_target: no gradient is defined through it")
        if weight.shape[0] < 2:
            raise ValueError(
                "weight must predict at least 2 elements to normalise over with normalize_target, "
                f"got {tuple(weight.shape)}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (P,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    name = dispatch.select(Problem("linear_masked_loss", hidden.device.type, dtype), backend)
    grad = torch.is_grad_enabled()
    need_grad = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias, target)]
    return ops.linear_masked_loss(
        *(hidden, weight, bias, target, mask),
        *(kind, reduction, patch_size or 0, beta, normalize_target, float(eps), need_grad, name),
    )[0]


def fuses_head(hidden: Tensor) -> bool:
    """Whether the fused head is the faster one on tensors like `hidden`: a kernel of it runs, not its plain formula.

    On a CPU not in 16 bits, unless the kernel multiplies pairs of bfloat16 numbers as torch's linear does. On a GPU
    never: two of the kernel's three products are of float32 slopes, at a sixth of the speed of 16 bits at the most, and
    float32 does not reach that of cuBLAS; that only 0.6 of the tokens count makes up for neither. There the fused head
    saves memory.
    """
    device = hidden.device.type
    if device == "cuda":
        return False
    dtype = ops.computed_dtype(hidden)
    if device == "cpu" and dtype.itemsize == 2 and not (dtype == torch.bfloat16 and dispatch.CPU_MULTIPLIES_PAIRS):
        return False
    return dispatch.has_kernel(Problem("linear_masked_loss", device, dtype))


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor) -> torch.dtype:
    """Checks types, dtypes and devices; returns the dtype that the operator will see."""
    head = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in {**head, "target": target, "mask": mask}.items():
        if not isinstance(tensor, Tensor):
            also = " or None" if name == "bias" else ""
            raise TypeError(f"{name} must be a tensor{also}, got {type(tensor).__name__}")
        masks.check_layout(name, tensor)
    for name, tensor in {**head, "target": target}.items():
        if tensor.dtype not in KERNEL_DTYPES:
            raise TypeError(f"{name} must be of dtype {_ACCEPTED_DTYPES}, got {tensor.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be of dtype bool, True = counts; got {mask.dtype}: pass mask.bool()")
    # Autocast brings the head to its own dtype, as it does for torch's linear; float64 it leaves alone.
    autocast = ops.autocasts(hidden.device)
    for name, tensor in {**head, "target": target}.items():
        cast = autocast and torch.float64 not in (tensor.dtype, hidden.dtype)
        if tensor.dtype != hidden.dtype and not cast:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    for name, tensor in {**head, "target": target, "mask": mask}.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    return ops.computed_dtype(hidden)


def _check_tokens(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor, patch_size: int | None) -> Tensor:
    """Checks the shapes but that of bias; returns the mask as (B, 1, N), or as the patch grid (B, H/p, W/p)."""
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be (B, N, E), got {tuple(hidden.shape)}")
    batch, tokens, dim = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != dim:
        raise ValueError(f"weight must be (P, {dim}) for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}")
    size = weight.shape[0]
    if patch_size is None:
        if target.shape != (batch, tokens, size):
            raise ValueError(f"target must be (B, N, P) = {(batch, tokens, size)}, got {tuple(target.shape)}")
        if mask.shape != (batch, tokens):
            raise ValueError(f"mask must be (B, N) = {(batch, tokens)}, got {tuple(mask.shape)}")
        return mask.unsqueeze(1)
    if target.dim() != 4 or target.shape[0] != batch:
        raise ValueError(f"target must be images ({batch}, C, H, W) with patch_size, got {tuple(target.shape)}")
    _, channels, height, width = target.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size must divide the height and width of target, got {patch_size} for {height} x {width}"
        )
    rows, columns = height // patch_size, width // patch_size
    if rows * columns != tokens:
        raise ValueError(
            f"target must have the {tokens} patches that hidden has tokens, got {rows} x {columns} of side {patch_size}"
        )
    if channels * patch_size**2 != size:
        raise ValueError(
            f"weight must predict the {channels * patch_size**2} numbers of a patch of {channels} x {patch_size} x "
            f"{patch_size}, got {tuple(weight.shape)}"
        )
    if mask.shape == (batch, tokens):
        return mask.unflatten(1, (rows, columns))
    if mask.shape != (batch, rows, columns):
        raise ValueError(
            f"mask must be (B, N) = {(batch, tokens)} or the patch grid {(batch, rows, columns)}, got "
            f"{tuple(mask.shape)}"
        )
    return mask


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # also under torch.compile, which does not trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def check_beta(beta: float) -> float:
    """Raises for a `beta` that no input could be right for."""
    beta = _number("beta", beta)
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta!r}")
    return beta


def _divisor(beta: float, dtype: torch.dtype) -> float:
    # The kernels multiply by 1 / beta, which is infinite for the smallest of all numbers.
    return max(beta, torch.finfo(ops.lse_dtype(dtype)).tiny)


def check_options(patch_size: int | None, reduction: str, normalize_target: bool, eps: float) -> None:
    """Raises for an option that no input could be right for."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if patch_size is not None:
        if isinstance(patch_size, bool) or not isinstance(patch_size, int):
            raise TypeError(f"patch_size must be an int or None, got {type(patch_size).__name__}")
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if not isinstance(normalize_target, bool):
        raise TypeError(f"normalize_target must be a bool, got {type(normalize_target).__name__}")
    if _number("eps", eps) <= 0:
        raise ValueError(f"eps must be positive, got {eps!r}")


def _check_tensors(input: Tensor, target: Tensor, mask: Tensor) -> torch.dtype:
    """Checks what can be checked without the layout of the mask; returns the dtype that the operator will see."""
    for name, tensor in (("input", input), ("target", target), ("mask", mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        masks.check_layout(name, tensor)
    for name, tensor in (("input", input), ("target", target)):
        if tensor.dtype not in KERNEL_DTYPES:
            raise TypeError(f"{name} must be of dtype {_ACCEPTED_DTYPES}, got {tensor.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be of dtype bool, True = counts; got {mask.dtype}: pass mask.bool()")
    # Autocast brings both to float32, as it does for torch's own losses.
    autocast = ops.autocasts(input.device)
    if target.dtype != input.dtype and not autocast:
        raise TypeError(f"target must have the dtype of input, {input.dtype}, got {target.dtype}")
    if target.shape != input.shape:
        raise ValueError(f"target must have the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}")
    for name, tensor in (("target", target), ("mask", mask)):
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")
    return torch.float32 if autocast and input.dtype != torch.float64 else input.dtype


def _fit_patches(mask: Tensor, input: Tensor, patch_size: int) -> Tensor:
    """Checks a mask on the patch grid of images."""
    if input.dim() != 4:
        raise ValueError(f"input must be images (B, C, H, W) when patch_size is given, got {tuple(input.shape)}")
    batch, _, height, width = input.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size must divide the height and width of input, got {patch_size} for {height} x {width}"
        )
    grid = (height // patch_size, width // patch_size)
    if mask.dim() != 3 or mask.shape[0] not in (1, batch) or mask.shape[1] != grid[0] or mask.shape[2] != grid[1]:
        raise ValueError(
            f"mask must be the patch grid (B, H/p, W/p) = {(batch, *grid)} of input {tuple(input.shape)} with "
            f"patch_size {patch_size}, got {tuple(mask.shape)}"
        )
    return mask


def _fit(mask: Tensor, input: Tensor) -> Tensor:
    """The mask with as many dimensions as `input`, each of its size or 1."""
    # (B, N) counts tokens of (B, N, D), also where it could broadcast to (N, D).
    if input.dim() == 3 and mask.dim() == 2 and mask.shape == input.shape[:2]:
        return mask.unsqueeze(-1)
    fits = mask.dim() <= input.dim() and all(
        size in (1, of_input) for size, of_input in zip(reversed(mask.shape), reversed(input.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask must broadcast to input {tuple(input.shape)}, or be (B, N) for tokens (B, N, D), or come with "
            f"patch_size for images; got {tuple(mask.shape)}"
        )
    return mask.view((1,) * (input.dim() - mask.dim()) + tuple(mask.shape))


def _check_normalizable(input: Tensor, target: Tensor, mask: Tensor, patch_size: int | None) -> None:
    if target.requires_grad:
        raise ValueError("target must not require grad with normalize_target: no gradient is defined through it")
    if patch_size:
        size = input.shape[1] * patch_size**2
    elif input.dim() == 0:
        size = 1
    else:
        size = input.shape[-1]
        if mask.shape[-1] != 1:
            raise ValueError(
                "mask must not vary along the last dimension of input with normalize_target, which normalises over it; "
                f"got {tuple(mask.shape)} for {tuple(input.shape)}"
            )
    if size < 2 and input.numel():
        raise ValueError(
            f"input must have at least 2 elements to normalise over with normalize_target, got {tuple(input.shape)}"
        )
