"""The masked reconstruction loss in plain PyTorch: the specification of every backend's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _expand(mask: Tensor, input: Tensor, patch_size: int) -> Tensor:
    """Which elements count, bool, in the shape of `input`."""
    if patch_size:  # (B|1, H/p, W/p) -> (B|1, 1, H, W)
        mask = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2).unsqueeze(1)
    return mask.expand(input.shape)


def _normalize(target: Tensor, patch_size: int, eps: float) -> Tensor:
    """(target - mean) / sqrt(variance + eps), over each patch's C * p * p elements or over the last dimension.

    The variance is the unbiased one (He et al. 2022, "Masked autoencoders are scalable vision learners", section 4.1,
    and the code that the authors published).
    """
    if not target.numel():
        return target  # torch would warn about the variance of nothing
    dims = [-1]
    if patch_size:
        batch, channels, height, width = target.shape
        # (B, C, H/p, p, W/p, p)
        grid = target.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
        dims = [1, 3, 5]
    else:
        grid = target
    variance, mean = torch.var_mean(grid, dims, correction=1, keepdim=True)
    return ((grid - mean) / (variance + eps).sqrt()).reshape(target.shape)


def _difference(
    input: Tensor, target: Tensor, mask: Tensor, patch_size: int, normalize_target: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """input - target where it counts and 0 elsewhere, and which elements count."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    input, target = input.to(dtype), target.to(dtype)
    if normalize_target:
        target = _normalize(target, patch_size, eps)
    counted = _expand(mask, input, patch_size)
    # A select and not a product: 0 * NaN is NaN, and what does not count may be anything.
    return (input - target).where(counted, 0), counted


def _value(difference: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "l2":
        return difference * difference
    size = difference.abs()
    if kind == "l1" or beta == 0:
        return size
    return torch.where(size < beta, 0.5 * difference * difference / beta, size - 0.5 * beta)


def _slope(difference: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "l2":
        return 2 * difference
    if kind == "l1" or beta == 0:
        return difference.sign()
    return torch.where(difference.abs() < beta, difference / beta, difference.sign())


def _scale(counted: Tensor, input: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the sum over the counted elements is multiplied by."""
    if reduction == "masked_mean":
        count = counted.sum().to(dtype)
    else:
        # Not torch.tensor, which would freeze the number of elements of an exported program.
        count = torch.full((), input.numel() if reduction == "mean" else 1, dtype=dtype, device=input.device)
    return 1 / count.clamp(min=1)  # nothing counted: the sum is 0, and so is the mean


def masked_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    kind: str,
    reduction: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and d loss / d input unless `reduction` is "none".

    input, target: any shape, or (B, C, H, W) when patch_size > 0. mask: bool, broadcastable to input; or the patch grid
    (B|1, H/p, W/p).
    """
    difference, counted = _difference(input, target, mask, patch_size, normalize_target, eps)
    value = _value(difference, kind, beta)
    if reduction == "none":
        # Laid out like the gradient: as `input` is.
        return torch.empty_like(input).copy_(value), None
    scale = _scale(counted, input, reduction, value.dtype)
    loss = (value.sum(dtype=torch.float64) * scale).to(input.dtype)
    if not need_grad:
        return loss, None
    return loss, torch.empty_like(input).copy_(_slope(difference, kind, beta) * scale)


def masked_loss_backward_none(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    kind: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
) -> Tensor:
    """d loss / d input for reduction "none", with grad_loss in the shape of `input`."""
    gradient = times_slope(grad_loss, input, target, mask, kind, patch_size, beta, normalize_target, eps)
    return torch.empty_like(input).copy_(gradient)  # laid out as `input` is


# What follows is made of torch's own differentiable functions, without any write in place: it serves forward mode, vmap
# and derivatives of every order.


def differentiable_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    kind: str,
    reduction: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
) -> Tensor:
    """The loss of `masked_loss`, for torch to differentiate."""
    difference, counted = _difference(input, target, mask, patch_size, normalize_target, eps)
    value = _value(difference, kind, beta)
    if reduction == "none":
        return value.to(input.dtype)
    scale = _scale(counted, input, reduction, value.dtype)
    return (value.sum(dtype=torch.float64) * scale).to(input.dtype)


def differentiable_gradient(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    kind: str,
    reduction: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
) -> Tensor:
    """The gradient of `masked_loss`, for torch to differentiate; `reduction` is not "none"."""
    difference, counted = _difference(input, target, mask, patch_size, normalize_target, eps)
    scale = _scale(counted, input, reduction, difference.dtype)
    return (_slope(difference, kind, beta) * scale).to(input.dtype)


def times_slope(
    x: Tensor,
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    kind: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
) -> Tensor:
    """`masked_loss_backward_none` with `x` as grad_loss, for torch to differentiate."""
    difference, counted = _difference(input, target, mask, patch_size, normalize_target, eps)
    return (_slope(difference, kind, beta) * x.to(difference.dtype)).where(counted, 0).to(input.dtype)


def times_curvature(
    x: Tensor,
    input: Tensor | None,
    target: Tensor | None,
    mask: Tensor,
    kind: str,
    reduction: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
) -> Tensor:
    """`x`, in the shape of the input, times the second derivative of the loss by that input, which is diagonal.

    Only "smooth_l1" reads `input` and `target`.
    """
    if kind == "l1" or (kind == "smooth_l1" and beta == 0):
        return torch.zeros_like(x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    counted = _expand(mask, x, patch_size)
    curved, curvature = counted, 2.0
    if kind == "smooth_l1":
        assert input is not None and target is not None
        difference, _ = _difference(input, target, mask, patch_size, normalize_target, eps)
        curved, curvature = counted & (difference.abs() < beta), 1 / beta
    return (x.to(dtype) * (_scale(counted, x, reduction, dtype) * curvature)).where(curved, 0).to(x.dtype)


# The linear head with its loss. target: tokens (B, N, P), or with patch_size > 0 images (B, C, H, W) whose patches are
# the tokens: P = C p p, feature (c, y, x) in this order is pixel (y, x) of channel c. mask: (B, 1, N), or the patch
# grid (B, H/p, W/p). It too is made of torch's own differentiable functions.


def _tokens(target: Tensor, patch_size: int) -> Tensor:
    """The target as tokens (B, N, P)."""
    if not patch_size:
        return target
    # (B, C, H/p, p, W/p, p) -> (B, H/p, W/p, C, p, p)
    grid = target.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _from_tokens(tokens: Tensor, target: Tensor, patch_size: int) -> Tensor:
    """The inverse of `_tokens`, in the shape of `target`."""
    if not patch_size:
        return tokens
    _, channels, height, width = target.shape
    rows, columns = height // patch_size, width // patch_size
    grid = tokens.unflatten(2, (channels, patch_size, patch_size)).unflatten(1, (rows, columns))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    patch_size: int,
    normalize_target: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prediction - target (B, N, P) where it counts and 0 elsewhere, which elements count, and hidden and weight as the
    products take them."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = mask.flatten(1).unsqueeze(-1)
    hidden, weight = hidden.to(dtype).where(counted, 0), weight.to(dtype)
    prediction = F.linear(hidden, weight, None if bias is None else bias.to(dtype))
    difference, elements = _difference(prediction, _tokens(target, patch_size), counted, 0, normalize_target, eps)
    return difference, elements, hidden, weight


def linear_masked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor,
    kind: str,
    reduction: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
    need_grad: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The loss of the prediction hidden weight^T + bias, and its gradients by hidden, weight, bias and target, each
    contiguous, or None where `need_grad` has False. `reduction` is not "none".

    hidden: (B, N, E). weight: (P, E). bias: (P,). The loss has the dtype of `target`.
    """
    difference, counted, rows, matrix = _head(hidden, weight, bias, target, mask, patch_size, normalize_target, eps)
    value = _value(difference, kind, beta)
    scale = _scale(counted, difference, reduction, value.dtype)
    loss = (value.sum(dtype=torch.float64) * scale).to(target.dtype)
    if not any(need_grad):
        return loss, None, None, None, None
    slopes = _slope(difference, kind, beta) * scale  # (B, N, P)
    by_hidden, by_weight, by_bias, by_target = need_grad
    return (
        loss,
        (slopes @ matrix).to(hidden.dtype).contiguous() if by_hidden else None,
        (slopes.flatten(0, 1).T @ rows.flatten(0, 1)).to(weight.dtype).contiguous() if by_weight else None,
        slopes.sum((0, 1)).to(bias.dtype) if by_bias and bias is not None else None,
        _from_tokens(-slopes, target, patch_size).to(target.dtype).contiguous() if by_target else None,
    )
