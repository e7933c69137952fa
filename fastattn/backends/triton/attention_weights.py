"""Attention weights exp(scores - lse), averaged over the heads without the tensor of every head, and their backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton import config
from fastattn.backends.triton.attention_backward import Launch
from fastattn.backends.triton.common import (
    NEG_INF,
    attended_keys,
    dot,
    dropout_keep,
    load_bias,
    load_rows,
    may_attend,
    on_device,
    probability,
    shift_of,
    strides_of,
)
from fastattn.masks import KernelMask


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_weights_kernel(
    q_ptr,
    k_ptr,
    bias_ptr,
    lse_ptr,
    seed_ptr,
    mask,
    tiles,
    weights_ptr,  # [B, L, S], or [B, Hq, L, S], contiguous
    stride_q,
    stride_k,
    stride_bias,
    heads_q,
    group,
    len_q,
    len_k,
    num_m,
    num_n,
    heads_out,
    heads_summed,  # heads_q when averaged, else 1
    scale,
    weight_scale,  # what dropout and the mean multiply by
    dropout_limit,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    n0 = pid % num_n * BLOCK_N
    m0 = pid // num_n % num_m * BLOCK_M
    bh = (pid // num_n // num_m).to(tl.int64)
    b = bh // heads_out
    rows = m0 + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(0, heads_summed):  # in the order of the heads: the sum is the same in every run
        h = bh % heads_out + t
        live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
        q_head = q_ptr + b * stride_q[0] + h * stride_q[1]
        k_head = k_ptr + b * stride_k[0] + h // group * stride_k[1]
        q = load_rows(q_head, stride_q[2], rows, rows < len_q, HEAD_DIM, BLOCK_D, True)
        k = load_rows(k_head, stride_k[2], cols, live, HEAD_DIM, BLOCK_D, True)
        s = dot(q, tl.trans(k), None, PRECISION) * scale
        if bias_ptr is not None:
            s += load_bias(bias_ptr, stride_bias, b, h, rows[:, None], cols[None, :], len_q, len_k)
        keep = may_attend(mask, b, h, rows[:, None], cols[None, :], n0, len_q, len_k, BLOCK_N)
        shift = shift_of(tl.load(lse_ptr + (b * heads_q + h) * len_q + rows, mask=rows < len_q, other=NEG_INF))
        p = probability(tl.where(keep, s, NEG_INF), shift[:, None])
        if HAS_DROPOUT:
            p = tl.where(dropout_keep(seed, dropout_limit, b, h, m0, n0, BLOCK_M, BLOCK_N), p, 0.0)
        acc += p
    pointers = weights_ptr + (bh * len_q + rows.to(tl.int64)[:, None]) * len_k + cols[None, :]
    inside = (rows < len_q)[:, None] & (cols < len_k)[None, :]
    tl.store(pointers, (acc * weight_scale).to(weights_ptr.dtype.element_ty), mask=inside)


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: KernelMask | None,
    scale: float,
    average_heads: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """The attention probabilities after dropout: (B, L, S), or (B, Hq, L, S) when `average_heads` is False."""
    B, Hq, L, _ = query.shape
    S = key.shape[2]
    weights = query.new_empty((B, L, S) if average_heads else (B, Hq, L, S))
    if not weights.numel():
        return weights
    if not Hq:
        return weights.zero_()
    with on_device(query):
        launch = Launch(query, key, None, lse, bias, mask, scale, dropout_p, dropout_seed)
        chosen = config.weights(query, launch.D)
        num_m, num_n = triton.cdiv(L, chosen.block_m), triton.cdiv(S, chosen.block_n)
        heads_out, heads_summed = (1, Hq) if average_heads else (Hq, 1)
        _, limit, *factors = launch.weights_and_dropout
        constants = {name: launch.constants[name] for name in ("HAS_DROPOUT", "HEAD_DIM", "BLOCK_D", "PRECISION")}
        attention_weights_kernel[(B * heads_out * num_m * num_n,)](
            *(query, key, bias, lse, launch.seed, launch.operands, launch.tiles(chosen, False), weights),
            *(*launch.strides[:2], strides_of(bias), *launch.sizes, num_m, num_n, heads_out, heads_summed),
            *(launch.scale, factors[0] * factors[1] / heads_summed, limit),
            **constants,
            **chosen.constants(),
        )
    return weights


def attention_weights_backward(
    grad_weights: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: KernelMask | None,
    scale: float,
    average_heads: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of query, key, bias (or None) and lse; lse is an input of its own here: p = exp(s - lse)."""
    grad_query, grad_key, grad_lse = torch.empty_like(query), torch.empty_like(key), torch.empty_like(lse)
    stride_weights = grad_weights.stride()
    if average_heads:
        stride_weights = (stride_weights[0], 0, *stride_weights[1:])
    weight_scale = 1 / max(query.shape[1], 1) if average_heads else 1.0
    with on_device(query):
        if not lse.numel():  # no queries
            grad_key.zero_()
        launch = Launch(
            *(query, key, None, lse, bias, mask, scale, dropout_p, dropout_seed),
            grad_weights=grad_weights,
            stride_weights=stride_weights,
            weight_scale=weight_scale,
        )
        launch.dq(grad_query, grad_lse)
        if lse.numel():
            launch.dkv(grad_key, None)
        grad_bias = launch.dbias() if need_grad_bias and bias is not None else None
    return grad_query, grad_key, grad_bias, grad_lse
