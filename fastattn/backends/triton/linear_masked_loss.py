"""A linear prediction head fused with the masked loss: prediction = hidden weight^T + bias of the counted tokens alone.

`counted_tokens_kernel` lists the tokens that count, on the device: programs beyond the last one find nothing to do, so
the three products run at the counted share of their size and the host never waits for that number. The list is taken
in blocks of `_BLOCK_TOKENS`: one kernel makes the predictions of a block, their losses and slopes in tiles of tokens x
features, and keeps the slopes, float32, for the other two, grad_hidden = slopes weight and grad_weight += slopes^T
hidden. Nothing else of the predictions exists, and no more of them than a block. Every sum has a fixed order: the parts
of the loss have slots of their own, and so have the shares of the tokens that grad_weight is split into.

Design, for one H200 at 25088 tokens (60 % counted), E = P = 768, bfloat16: three products of 18 GFLOP. The first is of
16-bit numbers in tiles of 32 x 64, which the reads of the second cache bind (21 FLOP a byte): 0.15 ms. The slopes are
not rounded to 16 bits: the others are three tf32 products each, of 165 TFLOP/s at the most, 0.2 ms. Eager makes three
16-bit products of full size, 0.13 ms, and moves the predictions about 8 times, 0.07 ms: expected is a third of its
speed, without its memory. None of this has been measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton import config
from fastattn.backends.triton.common import dot, dot_precision, on_device
from fastattn.backends.triton.masked_loss import (
    KINDS,
    Layout,
    group_offsets,
    load_elements,
    moments,
    value_and_slope,
)

_BLOCK_TOKENS = 8192  # a multiple of every tile


@triton.jit
def counted_tokens_kernel(
    mask_ptr,  # uint8 [tokens]
    index_ptr,  # int32 [tokens]: the counted ones in ascending order, then nothing
    count_ptr,  # int32: how many
    tokens,
    BLOCK: tl.constexpr,
):
    """One program: the list is a prefix sum."""
    count = 0
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        counted = (tl.load(mask_ptr + token, mask=token < tokens, other=0) != 0).to(tl.int32)
        tl.store(index_ptr + count + tl.cumsum(counted, 0) - counted, token, mask=counted != 0)
        count += tl.sum(counted, 0)
    tl.store(count_ptr, count)


@triton.jit
def _load_tokens(index_ptr, slots, count):
    """(tokens, which exist) of slots of the list."""
    valid = slots < count
    return tl.load(index_ptr + slots, mask=valid, other=0).to(tl.int64), valid


@triton.jit
def _rows_of_tokens(ptr, stride, token, tokens_per_sample):
    return ptr + token // tokens_per_sample * stride[0] + token % tokens_per_sample * stride[1]


@triton.jit
def linear_loss_moments_kernel(
    target_ptr,
    index_ptr,
    count_ptr,
    moments_ptr,  # float32 [2, tokens]: of each slot of the list
    target_strides,
    group_sizes,
    element_sizes,
    tokens,
    elements,
    eps,
    GROUPS: tl.constexpr,
    ELEMS: tl.constexpr,
):
    slots = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    token, valid = _load_tokens(index_ptr, slots, tl.load(count_ptr))
    mean, inverse = moments(
        target_ptr, target_strides, token, valid, group_sizes, element_sizes, elements, eps, GROUPS, ELEMS
    )
    tl.store(moments_ptr + slots, mean, mask=valid)
    tl.store(moments_ptr + tokens + slots, inverse, mask=valid)


@triton.jit
def linear_loss_slopes_kernel(
    hidden_ptr,  # [B, N, E]
    weight_ptr,  # [P, E]
    bias_ptr,  # [P], or None
    target_ptr,
    index_ptr,
    count_ptr,
    moments_ptr,  # of a normalised target, or None
    scale_ptr,  # float32: factor of the sum
    partial_ptr,  # float32: the sum of each tile
    slopes_ptr,  # float32 [block, P], or None
    grad_target_ptr,  # or None
    stride_h,  # (b, n)
    stride_w,
    target_strides,
    grad_strides,
    group_sizes,
    element_sizes,
    tokens,
    tokens_per_sample,
    first,  # slot of the list where the block begins
    dim_in,
    dim_out,
    beta,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m = tl.program_id(0)
    count = tl.load(count_ptr)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token, valid = _load_tokens(index_ptr, first + rows, count)
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptr = _rows_of_tokens(hidden_ptr, stride_h, token, tokens_per_sample)
    column_ptr = weight_ptr + features.to(tl.int64) * stride_w
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tl.where(first + tile_m * BLOCK_M < count, dim_in, 0), BLOCK_K):
        dims = start + tl.arange(0, BLOCK_K)
        h = tl.load(row_ptr[:, None] + dims[None, :], mask=valid[:, None] & (dims < dim_in)[None, :], other=0.0)
        inside_w = (features < dim_out)[:, None] & (dims < dim_in)[None, :]
        w = tl.load(column_ptr[:, None] + dims[None, :], mask=inside_w, other=0.0)
        acc = dot(h, tl.trans(w), acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + features, mask=features < dim_out, other=0.0).to(tl.float32)[None, :]

    inside = valid[:, None] & (features < dim_out)[None, :]
    element = features.to(tl.int64)
    target = load_elements(target_ptr, target_strides, token, element, group_sizes, element_sizes, inside)
    if moments_ptr is not None:
        mean = tl.load(moments_ptr + first + rows, mask=valid, other=0.0)
        inverse = tl.load(moments_ptr + tokens + first + rows, mask=valid, other=0.0)
        target = (target - mean[:, None]) * inverse[:, None]
    difference = tl.where(inside, acc - target, 0.0)
    value, slope = value_and_slope(difference, beta, KIND)
    tile = (first // BLOCK_M + tile_m) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + tile, tl.sum(tl.sum(value, 1), 0))
    slope = slope * tl.load(scale_ptr)
    if slopes_ptr is not None:
        tl.store(slopes_ptr + rows.to(tl.int64)[:, None] * dim_out + features[None, :], slope, mask=inside)
    if grad_target_ptr is not None:
        offsets = group_offsets(token, group_sizes, grad_strides.group)[:, None]
        offsets += group_offsets(element, element_sizes, grad_strides.element)[None, :]
        tl.store(grad_target_ptr + offsets, (-slope).to(grad_target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_loss_hidden_kernel(
    slopes_ptr,
    weight_ptr,
    index_ptr,
    count_ptr,
    grad_ptr,  # [B N, E] contiguous
    stride_w,
    first,
    dim_in,
    dim_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_hidden of a block: slopes weight."""
    tile_m = tl.program_id(0)
    count = tl.load(count_ptr)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token, valid = _load_tokens(index_ptr, first + rows, count)
    dims = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptr = slopes_ptr + rows.to(tl.int64) * dim_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tl.where(first + tile_m * BLOCK_M < count, dim_out, 0), BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)
        inside_s = valid[:, None] & (features < dim_out)[None, :]
        s = tl.load(row_ptr[:, None] + features[None, :], mask=inside_s, other=0.0)
        inside_w = (features < dim_out)[:, None] & (dims < dim_in)[None, :]
        w = tl.load(weight_ptr + features.to(tl.int64)[:, None] * stride_w + dims[None, :], mask=inside_w, other=0.0)
        acc = dot(s, w.to(tl.float32), acc, PRECISION)
    inside = valid[:, None] & (dims < dim_in)[None, :]
    tl.store(grad_ptr + token[:, None] * dim_in + dims[None, :], acc.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_loss_weight_kernel(
    slopes_ptr,
    hidden_ptr,
    index_ptr,
    count_ptr,
    weight_parts_ptr,  # float32 [splits, P, E], or None
    bias_parts_ptr,  # float32 [splits, P], or None
    stride_h,
    tokens_per_sample,
    first,
    length,  # of the block
    split_tokens,  # of a split, a multiple of BLOCK_K; the last one is cut off at the end of the block
    dim_in,
    dim_out,
    ADD: tl.constexpr,  # to what the blocks before have left
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of a block's tokens for a tile of grad_weight, slopes^T hidden, and for its share of grad_bias."""
    split = tl.program_id(2)
    features = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.load(count_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin = split * split_tokens
    end = tl.minimum(tl.minimum(begin + split_tokens, length), count - first)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        token, valid = _load_tokens(index_ptr, first + rows, count)
        inside_s = valid[:, None] & (features < dim_out)[None, :]
        row_ptr = slopes_ptr + rows.to(tl.int64)[:, None] * dim_out
        s = tl.load(row_ptr + features[None, :], mask=inside_s, other=0.0)  # [BLOCK_K, BLOCK_M]
        if weight_parts_ptr is not None:
            row_ptr = _rows_of_tokens(hidden_ptr, stride_h, token, tokens_per_sample)
            inside_h = valid[:, None] & (dims < dim_in)[None, :]
            h = tl.load(row_ptr[:, None] + dims[None, :], mask=inside_h, other=0.0)
            acc = dot(tl.trans(s), h.to(tl.float32), acc, PRECISION)
        if bias_parts_ptr is not None:
            total += tl.sum(s, 0)
    if weight_parts_ptr is not None:
        offsets = (split.to(tl.int64) * dim_out + features)[:, None] * dim_in + dims[None, :]
        inside = (features < dim_out)[:, None] & (dims < dim_in)[None, :]
        if ADD:
            acc += tl.load(weight_parts_ptr + offsets, mask=inside, other=0.0)
        tl.store(weight_parts_ptr + offsets, acc, mask=inside)
    if bias_parts_ptr is not None:
        its_own = (features < dim_out) & (tl.program_id(1) == 0)
        if ADD:
            total += tl.load(bias_parts_ptr + split * dim_out + features, mask=its_own, other=0.0)
        tl.store(bias_parts_ptr + split * dim_out + features, total, mask=its_own)


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
    need_grad: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The loss of the prediction hidden weight^T + bias, and its gradients by hidden, weight, bias and target, or None
    where `need_grad` has False."""
    if bias is None:
        need_grad = [*need_grad[:2], False, need_grad[3]]
    inputs = (hidden, weight, bias, target)
    of_hidden, of_weight, of_bias, of_target = (
        x.new_zeros(x.shape) if need and x is not None else None for x, need in zip(inputs, need_grad, strict=True)
    )
    tokens, dim_in, dim_out = hidden.shape[0] * hidden.shape[1], hidden.shape[2], weight.shape[0]
    if not tokens * dim_out:
        return target.new_zeros(()), of_hidden, of_weight, of_bias, of_target
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    if bias is not None:
        bias = bias.contiguous()
    with on_device(hidden):
        index = torch.empty(tokens, dtype=torch.int32, device=hidden.device)
        count = torch.empty((), dtype=torch.int32, device=hidden.device)
        counted_tokens_kernel[(1,)](mask.reshape(-1).view(torch.uint8), index, count, tokens, BLOCK=4096, num_warps=8)
        if reduction == "masked_mean":
            # Nothing counted gives 0.
            scale = 1 / (count.to(torch.int64) * dim_out).clamp(min=1).to(torch.float32)
        else:
            elements = tokens * dim_out if reduction == "mean" else 1
            scale = torch.full((), 1 / elements, dtype=torch.float32, device=hidden.device)
        layout = Layout(target, patch_size)
        its_moments = _moments(target, layout, index, count, eps) if normalize_target else None

        chosen, larger = (config.linear_loss(kernel, hidden.dtype) for kernel in ("slopes", "gradients"))
        depth = 16 if hidden.dtype == torch.float32 else 32  # of a step of a product
        constants, of_larger = (each.constants() | dict(BLOCK_K=depth) for each in (chosen, larger))
        precision = dot_precision(hidden.dtype)
        # Slopes are not rounded to 16 bits: they enter products as three terms of tf32.
        precision_slopes = precision if hidden.dtype == torch.float32 else "tf32x3"
        block = min(_BLOCK_TOKENS, triton.cdiv(tokens, chosen.block_m) * chosen.block_m)
        tiles_out, tiles_in = triton.cdiv(dim_out, chosen.block_n), triton.cdiv(dim_in, larger.block_n)
        partial = hidden.new_empty((triton.cdiv(tokens, chosen.block_m), tiles_out), dtype=torch.float32)
        backward = any(need_grad[:3])
        slopes = hidden.new_empty((block, dim_out), dtype=torch.float32) if backward else None
        rows_out = triton.cdiv(dim_out, larger.block_m)
        splits = max(1, min(config.programs_wanted(hidden) // (rows_out * max(tiles_in, 1)), block // 256))
        split_tokens = triton.cdiv(triton.cdiv(block, splits), depth) * depth
        weight_parts, bias_parts = (
            hidden.new_empty((splits, *x.shape), dtype=torch.float32) if x is not None else None
            for x in (of_weight, of_bias)
        )
        stride_h = (hidden.stride(0), hidden.stride(1))
        for first in range(0, tokens, block):
            length = min(block, tokens - first)
            linear_loss_slopes_kernel[(triton.cdiv(length, chosen.block_m), tiles_out)](
                *(hidden, weight, bias, target, index, count, its_moments, scale, partial, slopes, of_target),
                *(stride_h, weight.stride(0), layout.strides(target), layout.strides(of_target)),
                *(layout.group_sizes, layout.element_sizes, tokens, hidden.shape[1], first, dim_in, dim_out, beta),
                **(constants | dict(KIND=KINDS["l1" if kind == "smooth_l1" and beta == 0 else kind])),
                PRECISION=precision,
            )
            if of_hidden is not None and dim_in:
                linear_loss_hidden_kernel[(triton.cdiv(length, larger.block_m), tiles_in)](
                    *(slopes, weight, index, count, of_hidden, weight.stride(0), first, dim_in, dim_out),
                    **of_larger,
                    PRECISION=precision_slopes,
                )
            if of_weight is not None or of_bias is not None:
                linear_loss_weight_kernel[(rows_out, max(tiles_in, 1), splits)](
                    *(slopes, hidden, index, count, weight_parts, bias_parts, stride_h, hidden.shape[1], first),
                    *(length, split_tokens, dim_in, dim_out, first > 0),
                    **of_larger,
                    PRECISION=precision_slopes,
                )
        loss = (partial.sum(dtype=torch.float64) * scale).to(target.dtype)
    if weight_parts is not None:
        of_weight = weight_parts.sum(0).to(weight.dtype)
    if bias_parts is not None:
        of_bias = bias_parts.sum(0).to(weight.dtype)
    return loss, of_hidden, of_weight, of_bias, of_target


def _moments(target: Tensor, layout: Layout, index: Tensor, count: Tensor, eps: float) -> Tensor:
    """Mean and 1 / sqrt(variance + eps) of the target of each slot of the list, float32 [2, tokens]."""
    tokens = index.numel()
    its_moments = torch.empty((2, tokens), dtype=torch.float32, device=target.device)
    linear_loss_moments_kernel[(triton.cdiv(tokens, layout.groups_per_program),)](
        *(target, index, count, its_moments, layout.strides(target), layout.group_sizes, layout.element_sizes),
        *(tokens, layout.elements, eps, layout.groups_per_program, layout.elems),
        num_warps=4,
    )
    return its_moments
