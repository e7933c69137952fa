"""Masked reconstruction losses: one pass gives the loss and its gradient, and reads only what counts.

Elements come in groups that share their counting as far as the layout allows: a patch of an image, or a row of the
last dimension. A program takes a tile of [GROUPS, ELEMS]; its sum goes to a slot of its own, and the slots are added in
order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton.common import on_device, strides_of

_TILE = 2048  # elements of a program
KINDS = {"l2": 0, "l1": 1, "smooth_l1": 2}


class Strides(NamedTuple):
    """Of one tensor: of a group's three coordinates, and of an element's three within the group."""

    group: tuple[int, ...]
    element: tuple[int, ...]
    end: Any = None  # as that of MaskOperands


@triton.jit
def group_offsets(index, sizes, strides):
    """Where in a tensor, by three coordinates: mixed radix, the last one runs fastest."""
    last = index % sizes[2]
    middle = index // sizes[2] % sizes[1]
    first = index // sizes[2] // sizes[1]
    return first * strides[0] + middle * strides[1] + last * strides[2]


@triton.jit
def _counted(mask_ptr, strides, group, element, groups, elements, group_sizes, element_sizes):
    """Which of the tile's elements count, [GROUPS, ELEMS]."""
    inside = (group < groups)[:, None] & (element < elements)[None, :]
    offsets = (
        group_offsets(group, group_sizes, strides.group)[:, None]
        + group_offsets(element, element_sizes, strides.element)[None, :]
    )
    return inside & (tl.load(mask_ptr + offsets, mask=inside, other=0) != 0)


@triton.jit
def load_elements(ptr, strides, group, element, group_sizes, element_sizes, wanted):
    offsets = (
        group_offsets(group, group_sizes, strides.group)[:, None]
        + group_offsets(element, element_sizes, strides.element)[None, :]
    )
    return tl.load(ptr + offsets, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def value_and_slope(difference, beta, KIND: tl.constexpr):
    """The loss of prediction - target and its derivative; NaN stays."""
    size = tl.abs(difference)
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    if KIND == 0:
        return difference * difference, 2.0 * difference
    elif KIND == 1:
        return size, sign
    else:
        value = tl.where(size < beta, 0.5 * difference * difference / beta, size - 0.5 * beta)
        return value, tl.where(size < beta, difference / beta, sign)


@triton.jit
def moments(
    target_ptr,
    strides,
    group,  # [GROUPS]
    wanted,  # [GROUPS]
    group_sizes,
    element_sizes,
    elements,
    eps,
    GROUPS: tl.constexpr,
    ELEMS: tl.constexpr,
):
    """(mean, 1 / sqrt(variance + eps)) over the elements of each group."""
    mean = tl.zeros([GROUPS], tl.float32)
    for start in range(0, elements, ELEMS):
        element = start + tl.arange(0, ELEMS).to(tl.int64)
        inside = wanted[:, None] & (element < elements)[None, :]
        mean += tl.sum(load_elements(target_ptr, strides, group, element, group_sizes, element_sizes, inside), 1)
    mean = mean / elements
    inverse = tl.zeros([GROUPS], tl.float32)
    for start in range(0, elements, ELEMS):
        element = start + tl.arange(0, ELEMS).to(tl.int64)
        inside = wanted[:, None] & (element < elements)[None, :]
        target = load_elements(target_ptr, strides, group, element, group_sizes, element_sizes, inside)
        deviation = tl.where(inside, target - mean[:, None], 0.0)
        inverse += tl.sum(deviation * deviation, 1)
    return mean, 1.0 / tl.sqrt_rn(inverse / (elements - 1) + eps)


@triton.jit
def masked_loss_kernel(
    input_ptr,
    target_ptr,
    mask_ptr,  # uint8
    grad_loss_ptr,  # upstream gradient of each element, or None
    scale_ptr,  # factor of the sum and of the gradient: one float32, or None for 1
    loss_ptr,  # loss of each element, or None
    partial_ptr,  # float32, one slot a program, or None
    grad_ptr,  # d loss / d input, or None
    input_strides,
    target_strides,
    mask_strides,
    grad_loss_strides,
    loss_strides,
    grad_strides,
    group_sizes,
    element_sizes,
    groups,
    elements,
    num_chunks,
    beta,
    eps,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,  # then a program has whole groups: one chunk
    GROUPS: tl.constexpr,
    ELEMS: tl.constexpr,
):
    pid = tl.program_id(0)
    group = (pid // num_chunks).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    first = pid % num_chunks * ELEMS
    last = tl.minimum(first + ELEMS, elements)
    if NORMALIZE:
        last = elements
        mean, inverse = moments(
            *(target_ptr, target_strides, group, group < groups, group_sizes, element_sizes, elements, eps),
            *(GROUPS, ELEMS),
        )
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)

    total = tl.zeros([GROUPS], tl.float32)
    for start in range(first, last, ELEMS):
        element = start + tl.arange(0, ELEMS).to(tl.int64)
        counted = _counted(mask_ptr, mask_strides, group, element, groups, elements, group_sizes, element_sizes)
        x = load_elements(input_ptr, input_strides, group, element, group_sizes, element_sizes, counted)
        t = load_elements(target_ptr, target_strides, group, element, group_sizes, element_sizes, counted)
        if NORMALIZE:
            t = (t - mean[:, None]) * inverse[:, None]
        # A select: what does not count may be anything, and 0 * NaN is NaN.
        difference = tl.where(counted, x - t, 0.0)
        value, slope = value_and_slope(difference, beta, KIND)
        inside = (group < groups)[:, None] & (element < elements)[None, :]
        if loss_ptr is not None:
            loss_offsets = group_offsets(group, group_sizes, loss_strides.group)[:, None]
            loss_offsets += group_offsets(element, element_sizes, loss_strides.element)[None, :]
            tl.store(loss_ptr + loss_offsets, value.to(loss_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            total += tl.sum(value, 1)
        if grad_ptr is not None:
            gradient = slope * scale
            if grad_loss_ptr is not None:
                upstream = load_elements(
                    grad_loss_ptr, grad_loss_strides, group, element, group_sizes, element_sizes, counted
                )
                gradient = tl.where(counted, gradient * upstream, 0.0)
            grad_offsets = group_offsets(group, group_sizes, grad_strides.group)[:, None]
            grad_offsets += group_offsets(element, element_sizes, grad_strides.element)[None, :]
            tl.store(grad_ptr + grad_offsets, gradient.to(grad_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        tl.store(partial_ptr + pid, tl.sum(total, 0))


class Layout:
    """The groups of one problem."""

    def __init__(self, input: Tensor, patch_size: int) -> None:
        self.patch = patch_size
        if patch_size:
            batch, channels, height, width = input.shape
            self.group_sizes: tuple[int, ...] = (batch, height // patch_size, width // patch_size)
            self.element_sizes: tuple[int, ...] = (channels, patch_size, patch_size)
        else:
            *lead, last = _four_dims(input).shape
            self.group_sizes, self.element_sizes = tuple(lead), (1, 1, last)
        self.groups = self.group_sizes[0] * self.group_sizes[1] * self.group_sizes[2]
        self.elements = self.element_sizes[0] * self.element_sizes[1] * self.element_sizes[2]
        self.elems = min(triton.next_power_of_2(max(self.elements, 1)), _TILE)
        self.groups_per_program = min(_TILE // self.elems, triton.next_power_of_2(max(self.groups, 1)))

    def strides(self, tensor: Tensor | None) -> Strides:
        """Of a tensor in the shape of the input."""
        if tensor is None:
            return Strides((0, 0, 0), (0, 0, 0))
        if self.patch:
            batch, channel, row, column = tensor.stride()
            return Strides((batch, row * self.patch, column * self.patch), (channel, row, column))
        strides = strides_of(_four_dims(tensor))
        return Strides(strides[:3], (0, 0, strides[3]))

    def mask_strides(self, mask: Tensor) -> Strides:
        if self.patch:
            return Strides(strides_of(mask), (0, 0, 0))
        return self.strides(mask)


def _four_dims(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())]


def _launch(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    kind: str,
    patch_size: int,
    beta: float,
    normalize_target: bool,
    eps: float,
    grad_loss: Tensor | None = None,
    scale: Tensor | None = None,
    loss: Tensor | None = None,
    want_sum: bool = False,
    grad_input: Tensor | None = None,
) -> Tensor | None:
    """Runs the kernel on a problem with elements; returns the sum of the loss, float64 of shape (), if wanted."""
    layout = Layout(input, patch_size)
    num_chunks = 1 if normalize_target else triton.cdiv(layout.elements, layout.elems)
    programs = triton.cdiv(layout.groups, layout.groups_per_program) * num_chunks
    partial = torch.empty(programs, dtype=torch.float32, device=input.device) if want_sum else None
    kind = "l1" if kind == "smooth_l1" and beta == 0 else kind
    strides: tuple[Any, ...] = (
        *(layout.strides(input), layout.strides(target), layout.mask_strides(mask)),
        *(layout.strides(grad_loss), layout.strides(loss), layout.strides(grad_input)),
    )
    with on_device(input):
        masked_loss_kernel[(programs,)](
            *(input, target, mask.view(torch.uint8), grad_loss, scale, loss, partial, grad_input, *strides),
            *(layout.group_sizes, layout.element_sizes, layout.groups, layout.elements, num_chunks, beta, eps),
            KIND=KINDS[kind],
            NORMALIZE=normalize_target,
            GROUPS=layout.groups_per_program,
            ELEMS=layout.elems,
            num_warps=4,
        )
    return None if partial is None else partial.sum(dtype=torch.float64)


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
    """The loss, and d loss / d input unless `reduction` is "none"."""
    shared = (input, target, mask, kind, patch_size, beta, normalize_target, eps)
    if reduction == "none":
        loss = torch.empty_like(input)
        if input.numel():
            _launch(*shared, loss=loss)
        return loss, None
    grad_input = torch.empty_like(input) if need_grad else None
    if not input.numel():
        return input.new_zeros(()), grad_input
    scale = None
    if reduction == "masked_mean":
        # How often the mask repeats is the same everywhere; nothing counted gives 0.
        count = mask.sum() * (input.numel() // mask.numel())
        scale = 1 / count.clamp(min=1).to(torch.float32)
    elif reduction == "mean":
        scale = torch.full((), 1 / input.numel(), dtype=torch.float32, device=input.device)
    total = _launch(*shared, scale=scale, want_sum=True, grad_input=grad_input)
    assert total is not None
    return (total if scale is None else total * scale).to(input.dtype), grad_input


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
    """d loss / d input for the upstream gradient of each element, for `reduction` "none"."""
    grad_input = torch.empty_like(input)
    if input.numel():
        _launch(
            *(input, target, mask, kind, patch_size, beta, normalize_target, eps),
            grad_loss=grad_loss,
            grad_input=grad_input,
        )
    return grad_input
