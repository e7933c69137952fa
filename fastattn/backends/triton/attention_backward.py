"""Attention backward (Dao 2023, "FlashAttention-2", algorithm 2), without atomics: one kernel owns dq, one owns dk and
dv, one owns the bias gradient, each adding in a fixed order. Short key sequences take one kernel with every key
resident.

The same kernels serve the backward of the attention weights: there dp is the gradient of the weights themselves, read
from memory (`weights_ptr`), and delta is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton import config
from fastattn.backends.triton.common import (
    NEG_INF,
    POS_INF,
    TileOperands,
    attended_keys,
    block_dim,
    dot,
    dot_precision,
    dropout_factors,
    dropout_keep,
    dropout_limit,
    full_tile,
    is_listed,
    load_bias,
    load_rows,
    mask_operands,
    may_attend,
    on_device,
    partial_tile,
    probability,
    rows_of,
    shift_of,
    store_rows,
    strides_of,
    tile_plan,
)
from fastattn.backends.triton.live_tiles import live_tiles
from fastattn.masks import KernelMask


@triton.jit
def attention_backward_delta_kernel(
    out_ptr,
    do_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,  # [B, Hq, L] contiguous
    stride_o,
    stride_do,
    stride_glse,
    heads_q,
    len_q,
    num_m,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = rowsum(do * out) - grad_lse: what is subtracted from dp. 0 for a row without keys."""
    pid = tl.program_id(0)
    bh = (pid // num_m).to(tl.int64)
    b = bh // heads_q
    h = bh % heads_q
    rows = pid % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < len_q
    out_ptr += b * stride_o[0] + h * stride_o[1]
    do_ptr += b * stride_do[0] + h * stride_do[1]
    out = load_rows(out_ptr, stride_o[2], rows, valid, HEAD_DIM_V, BLOCK_DV, True)
    do = load_rows(do_ptr, stride_do[2], rows, valid, HEAD_DIM_V, BLOCK_DV, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    delta = _less_grad_lse(delta, grad_lse_ptr, stride_glse, lse_ptr + bh * len_q, b, h, rows, valid)
    tl.store(delta_ptr + bh * len_q + rows, delta, mask=valid)


@triton.jit
def _less_grad_lse(delta, grad_lse_ptr, stride_glse, lse_ptr, b, h, rows, valid):
    if grad_lse_ptr is not None:
        pointers = grad_lse_ptr + b * stride_glse[0] + h * stride_glse[1] + rows.to(tl.int64) * stride_glse[2]
        delta -= tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
        # The gradient that reaches the lse of a row without keys, -inf, may itself be NaN.
        delta = tl.where(tl.load(lse_ptr + rows, mask=valid, other=0.0) == NEG_INF, 0.0, delta)
    return delta


@triton.jit
def _load_grad_weights(weights_ptr, stride, weight_scale, b, h, rows, cols, len_q, len_k):
    pointers = (
        weights_ptr + b * stride[0] + h * stride[1] + rows.to(tl.int64) * stride[2] + cols.to(tl.int64) * stride[3]
    )
    loaded = tl.load(pointers, mask=(rows < len_q) & (cols < len_k), other=0.0)
    return loaded.to(tl.float32) * weight_scale


@triton.jit
def _grad_scores(
    q,  # [BLOCK_M, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_DV]
    do,  # [BLOCK_M, BLOCK_DV]
    shift,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    weights_ptr,
    stride_w,
    weight_scale,
    bias_ptr,
    stride_bias,
    mask,
    seed,
    dropout_limit,
    dropout_scale,
    dropout_rest,
    b,
    h,
    m0,
    n0,
    len_q,
    len_k,
    scale,
    MASKED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OWN_DELTA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(p after dropout but for `dropout_rest`, ds before the scale): [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M].

    OWN_DELTA: every key is in the tile, so the row sum of p dp is at hand, and `delta` holds only what comes on top.
    """
    if TRANSPOSED:
        rows = (m0 + tl.arange(0, BLOCK_M))[None, :]
        cols = (n0 + tl.arange(0, BLOCK_N))[:, None]
        s = dot(k, tl.trans(q), None, PRECISION) * scale
    else:
        rows = (m0 + tl.arange(0, BLOCK_M))[:, None]
        cols = (n0 + tl.arange(0, BLOCK_N))[None, :]
        s = dot(q, tl.trans(k), None, PRECISION) * scale
    if bias_ptr is not None:
        s += load_bias(bias_ptr, stride_bias, b, h, rows, cols, len_q, len_k)
    if MASKED:
        keep = may_attend(mask, b, h, rows, cols, n0, len_q, len_k, BLOCK_N)
        s = tl.where(keep, s, NEG_INF)
    if TRANSPOSED:
        p = probability(s, shift[None, :])
    else:
        p = probability(s, shift[:, None])
    if weights_ptr is not None:
        dp = _load_grad_weights(weights_ptr, stride_w, weight_scale, b, h, rows, cols, len_q, len_k)
    elif TRANSPOSED:
        dp = dot(v, tl.trans(do), None, PRECISION)
    else:
        dp = dot(do, tl.trans(v), None, PRECISION)
    dropped_p = p
    if HAS_DROPOUT:
        survives = dropout_keep(seed, dropout_limit, b, h, m0, n0, BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            survives = tl.trans(survives)
        dp = tl.where(survives, dp * (dropout_scale * dropout_rest), 0.0)
        dropped_p = tl.where(survives, p * dropout_scale, 0.0)
    if OWN_DELTA:
        product = p * dp
        if MASKED:
            product = tl.where(keep, product, 0.0)
        if TRANSPOSED:
            delta += tl.sum(product, 0)
        else:
            delta += tl.sum(product, 1)
    if TRANSPOSED:
        ds = p * (dp - delta[None, :])
    else:
        ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(keep, ds, 0.0)  # a select: dp may be NaN where nobody attends
    return dropped_p, ds


@triton.jit
def _load_row_state(lse_ptr, delta_ptr, row_base, rows, len_q):
    """(shift, delta); a row beyond the last has shift +inf, so its probabilities are 0."""
    valid = rows < len_q
    shift = shift_of(tl.load(lse_ptr + row_base + rows, mask=valid, other=POS_INF))
    if delta_ptr is not None:
        return shift, tl.load(delta_ptr + row_base + rows, mask=valid, other=0.0)
    else:
        return shift, tl.zeros_like(shift)


@triton.jit
def _load_do(do_ptr, stride, b, h, rows, len_q, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    if do_ptr is not None:
        return load_rows(do_ptr + b * stride[0] + h * stride[1], stride[2], rows, rows < len_q, DIM, BLOCK_DIM, True)
    else:
        return rows


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,  # None in the backward of the weights, as are do_ptr and delta_ptr
    bias_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    weights_ptr,  # gradient of the weights, or None
    seed_ptr,
    mask,
    tiles,
    dq_ptr,
    grad_lse_ptr,  # gradient of the weights' lse, or None
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_do,
    stride_w,
    stride_dq,
    heads_q,
    group,
    len_q,
    len_k,
    num_m,
    scale,
    weight_scale,
    dropout_limit,
    dropout_scale,
    dropout_rest,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    bh = (pid // num_m).to(tl.int64)
    tile_m = num_m - 1 - pid % num_m  # the longest rows of a causal mask first
    b = bh // heads_q
    h = bh % heads_q
    m0 = tile_m * BLOCK_M
    rows = m0 + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_q[0] + h * stride_q[1]
    k_ptr += b * stride_k[0] + h // group * stride_k[1]
    dq_ptr += b * stride_dq[0] + h * stride_dq[1]
    if v_ptr is not None:
        v_ptr += b * stride_v[0] + h // group * stride_v[1]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    q = load_rows(q_ptr, stride_q[2], rows, rows < len_q, HEAD_DIM, BLOCK_D, True)
    do = _load_do(do_ptr, stride_do, b, h, rows, len_q, HEAD_DIM_V, BLOCK_DV)
    shift, delta = _load_row_state(lse_ptr, delta_ptr, bh * len_q, rows, len_q)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ds_sum = tl.zeros([BLOCK_M], tl.float32)
    plan = tile_plan(mask, tiles, b, h, tile_m, len_q, len_k, BLOCK_M, BLOCK_N, False)
    for masked in tl.static_range(2):
        for t in range(0, plan[masked]):
            if masked:
                n0 = partial_tile(t, plan, tiles) * BLOCK_N
            else:
                n0 = full_tile(t, plan, tiles) * BLOCK_N
            cols = n0 + tl.arange(0, BLOCK_N)
            if masked:
                live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
            else:
                live = cols < len_k
            k = load_rows(k_ptr, stride_k[2], cols, live, HEAD_DIM, BLOCK_D, masked)
            v = k
            if v_ptr is not None:
                v = load_rows(v_ptr, stride_v[2], cols, live, HEAD_DIM_V, BLOCK_DV, masked)
            _, ds = _grad_scores(
                *(q, k, v, do, shift, delta, weights_ptr, stride_w, weight_scale, bias_ptr, stride_bias, mask, seed),
                *(dropout_limit, dropout_scale, dropout_rest, b, h, m0, n0, len_q, len_k, scale),
                *(masked, HAS_DROPOUT, False, False, BLOCK_M, BLOCK_N, PRECISION),
            )
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)
            if grad_lse_ptr is not None:
                ds_sum += tl.sum(ds, 1)
    store_rows(dq_ptr, stride_dq[2], rows, rows < len_q, dq * scale, HEAD_DIM, BLOCK_D)
    if grad_lse_ptr is not None:
        tl.store(grad_lse_ptr + bh * len_q + rows, -ds_sum, mask=rows < len_q)


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_backward_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    weights_ptr,
    seed_ptr,
    mask,
    tiles,
    dk_ptr,
    dv_ptr,  # None in the backward of the weights
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_do,
    stride_w,
    stride_dk,
    stride_dv,
    heads_q,
    group,
    len_q,
    len_k,
    num_n,
    scale,
    weight_scale,
    dropout_limit,
    dropout_scale,
    dropout_rest,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    bh = (pid // num_n).to(tl.int64)  # of keys: the first tiles have the longest columns of a causal mask
    tile_n = pid % num_n
    heads_kv = heads_q // group
    b = bh // heads_kv
    h_kv = bh % heads_kv
    n0 = tile_n * BLOCK_N
    cols = n0 + tl.arange(0, BLOCK_N)
    k_ptr += b * stride_k[0] + h_kv * stride_k[1]
    dk_ptr += b * stride_dk[0] + h_kv * stride_dk[1]
    q_ptr += b * stride_q[0]
    if v_ptr is not None:
        v_ptr += b * stride_v[0] + h_kv * stride_v[1]
        dv_ptr += b * stride_dv[0] + h_kv * stride_dv[1]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    live = attended_keys(mask, tiles, b, h_kv * group, cols, len_q, len_k)
    if tiles.key_live is not None:
        # A key is read when any of the query heads that share it attends to it.
        for g in range(1, group):
            live |= attended_keys(mask, tiles, b, h_kv * group + g, cols, len_q, len_k)
    k = load_rows(k_ptr, stride_k[2], cols, live, HEAD_DIM, BLOCK_D, True)
    v = k
    if v_ptr is not None:
        v = load_rows(v_ptr, stride_v[2], cols, live, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(0, group):
        h = h_kv * group + g
        row_base = (b * heads_q + h) * len_q
        q_head = q_ptr + h * stride_q[1]
        plan = tile_plan(mask, tiles, b, h, tile_n, len_q, len_k, BLOCK_M, BLOCK_N, True)
        for masked in tl.static_range(2):
            for t in range(0, plan[masked]):
                if masked:
                    m0 = partial_tile(t, plan, tiles) * BLOCK_M
                else:
                    m0 = full_tile(t, plan, tiles) * BLOCK_M
                rows = m0 + tl.arange(0, BLOCK_M)
                q = load_rows(q_head, stride_q[2], rows, rows < len_q, HEAD_DIM, BLOCK_D, True)
                do = _load_do(do_ptr, stride_do, b, h, rows, len_q, HEAD_DIM_V, BLOCK_DV)
                shift, delta = _load_row_state(lse_ptr, delta_ptr, row_base, rows, len_q)
                p, ds = _grad_scores(
                    *(q, k, v, do, shift, delta, weights_ptr, stride_w, weight_scale, bias_ptr, stride_bias, mask),
                    *(seed, dropout_limit, dropout_scale, dropout_rest, b, h, m0, n0, len_q, len_k, scale),
                    *(masked, HAS_DROPOUT, True, False, BLOCK_M, BLOCK_N, PRECISION),
                )  # [BLOCK_N, BLOCK_M]
                if do_ptr is not None:
                    dv = dot(p.to(do.dtype), do, dv, PRECISION)
                dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    store_rows(dk_ptr, stride_dk[2], cols, cols < len_k, dk * scale, HEAD_DIM, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr, stride_dv[2], cols, cols < len_k, dv * dropout_rest, HEAD_DIM_V, BLOCK_DV)


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_backward_dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    weights_ptr,
    seed_ptr,
    mask,
    tiles,  # holds key_live where the mask's live tiles are listed
    dbias_ptr,  # float32 [splits, Bb, Hb, Lb, Sb] contiguous, Bb in {1, B} and so on
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_do,
    stride_w,
    heads_q,
    group,
    len_q,
    len_k,
    bias_heads,
    bias_len_q,
    bias_len_k,
    own_m,  # tiles of the bias's own shape
    own_n,
    sum_h,  # how many of each are added into one tile
    sum_m,
    sum_n,
    sum_all,
    sum_per_split,
    num_own,
    split_size,
    scale,
    weight_scale,
    dropout_limit,
    dropout_scale,
    dropout_rest,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    ROWS_SHARED: tl.constexpr,  # Lb == 1
    COLS_SHARED: tl.constexpr,  # Sb == 1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Owns one tile of the bias, and adds the gradient of everything it is broadcast to, in a fixed order. What is
    added into few tiles is split over programs, whose partial tiles are added up afterwards."""
    pid = tl.program_id(0)
    split = pid // num_own
    own = pid % num_own
    tile_n = own % own_n
    tile_m = own // own_n % own_m
    own_bh = (own // own_n // own_m).to(tl.int64)
    bias_b = own_bh // bias_heads
    bias_h = own_bh % bias_heads
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = split * sum_per_split
    last = tl.minimum(first + sum_per_split, sum_all)
    if mask.band_low is not None:
        if (not ROWS_SHARED) and (not COLS_SHARED):
            m_begin, n_begin = tile_m * BLOCK_M, tile_n * BLOCK_N
            outside = (n_begin > m_begin + BLOCK_M - 1 + mask.band_high) | (
                n_begin + BLOCK_N - 1 < m_begin + mask.band_low
            )
            last = tl.where(outside, first, last)
    for t in range(first, last):
        # Of the dimensions that the bias has itself, sum_* is 1 and the own index is taken.
        n0 = (tile_n + t % sum_n) * BLOCK_N
        m0 = (tile_m + t // sum_n % sum_m) * BLOCK_M
        h = bias_h + t // sum_n // sum_m % sum_h
        b = bias_b + t // sum_n // sum_m // sum_h
        rows = m0 + tl.arange(0, BLOCK_M)
        cols = n0 + tl.arange(0, BLOCK_N)
        row_base = (b * heads_q + h) * len_q
        live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
        q_head = q_ptr + b * stride_q[0] + h * stride_q[1]
        k_head = k_ptr + b * stride_k[0] + h // group * stride_k[1]
        q = load_rows(q_head, stride_q[2], rows, rows < len_q, HEAD_DIM, BLOCK_D, True)
        k = load_rows(k_head, stride_k[2], cols, live, HEAD_DIM, BLOCK_D, True)
        v = k
        if v_ptr is not None:
            v_head = v_ptr + b * stride_v[0] + h // group * stride_v[1]
            v = load_rows(v_head, stride_v[2], cols, live, HEAD_DIM_V, BLOCK_DV, True)
        do = _load_do(do_ptr, stride_do, b, h, rows, len_q, HEAD_DIM_V, BLOCK_DV)
        shift, delta = _load_row_state(lse_ptr, delta_ptr, row_base, rows, len_q)
        _, ds = _grad_scores(
            *(q, k, v, do, shift, delta, weights_ptr, stride_w, weight_scale, bias_ptr, stride_bias, mask, seed),
            *(dropout_limit, dropout_scale, dropout_rest, b, h, m0, n0, len_q, len_k, scale),
            *(True, HAS_DROPOUT, False, False, BLOCK_M, BLOCK_N, PRECISION),
        )
        acc += ds

    dbias_ptr += split.to(tl.int64) * split_size + own_bh * bias_len_q * bias_len_k
    own_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    own_cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ROWS_SHARED:
        summed = tl.sum(acc, 0)
        if COLS_SHARED:
            tl.store(dbias_ptr, tl.sum(summed, 0))
        else:
            tl.store(dbias_ptr + own_cols, summed, mask=own_cols < bias_len_k)
    elif COLS_SHARED:
        tl.store(dbias_ptr + own_rows, tl.sum(acc, 1), mask=own_rows < bias_len_q)
    else:
        pointers = dbias_ptr + own_rows.to(tl.int64)[:, None] * bias_len_k + own_cols[None, :]
        tl.store(pointers, acc, mask=(own_rows < bias_len_q)[:, None] & (own_cols < bias_len_k)[None, :])


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_backward_short_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    do_ptr,
    lse_ptr,
    grad_lse_ptr,
    seed_ptr,
    mask,
    tiles,  # no lists
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_do,
    stride_glse,
    stride_dq,
    stride_dk,
    stride_dv,
    heads_q,
    group,
    len_q,
    len_k,
    scale,
    dropout_limit,
    dropout_scale,
    dropout_rest,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # holds every key
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every gradient of one head of keys, which stay resident; delta comes from the whole rows in the tile, so the
    output is not read."""
    bh = tl.program_id(0).to(tl.int64)
    heads_kv = heads_q // group
    b = bh // heads_kv
    h_kv = bh % heads_kv
    n0 = tl.program_id(0) * 0
    cols = n0 + tl.arange(0, BLOCK_N)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    live = attended_keys(mask, tiles, b, h_kv * group, cols, len_q, len_k)
    k_head = k_ptr + b * stride_k[0] + h_kv * stride_k[1]
    v_head = v_ptr + b * stride_v[0] + h_kv * stride_v[1]
    k = load_rows(k_head, stride_k[2], cols, live, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_head, stride_v[2], cols, live, HEAD_DIM_V, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(0, group):
        h = h_kv * group + g
        row_base = (b * heads_q + h) * len_q
        q_head = q_ptr + b * stride_q[0] + h * stride_q[1]
        do_head = do_ptr + b * stride_do[0] + h * stride_do[1]
        dq_head = dq_ptr + b * stride_dq[0] + h * stride_dq[1]
        for m0 in range(0, len_q, BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            valid = rows < len_q
            q = load_rows(q_head, stride_q[2], rows, valid, HEAD_DIM, BLOCK_D, True)
            do = load_rows(do_head, stride_do[2], rows, valid, HEAD_DIM_V, BLOCK_DV, True)
            shift, delta = _load_row_state(lse_ptr, None, row_base, rows, len_q)
            delta = _less_grad_lse(delta, grad_lse_ptr, stride_glse, lse_ptr + row_base, b, h, rows, valid)
            p, ds = _grad_scores(
                *(q, k, v, do, shift, delta, None, stride_bias, 1.0, bias_ptr, stride_bias, mask, seed),
                *(dropout_limit, dropout_scale, dropout_rest, b, h, m0, n0, len_q, len_k, scale),
                *(True, HAS_DROPOUT, True, True, BLOCK_M, BLOCK_N, PRECISION),
            )  # [BLOCK_N, BLOCK_M]
            ds = ds.to(k.dtype)
            dv = dot(p.to(do.dtype), do, dv, PRECISION)
            dk = dot(ds, q, dk, PRECISION)
            k_seen = k
            if (mask.query_segments is not None) or (mask.bits is not None):
                # No arithmetic tells which keys nobody attends to: 0 * NaN would be NaN.
                keep = may_attend(mask, b, h, rows[None, :], cols[:, None], n0, len_q, len_k, BLOCK_N)
                k_seen = tl.where((tl.max(keep.to(tl.int32), 1) > 0)[:, None], k, 0.0)
            dq = dot(tl.trans(ds), k_seen, None, PRECISION)  # [BLOCK_M, BLOCK_D]
            store_rows(dq_head, stride_dq[2], rows, valid, dq * scale, HEAD_DIM, BLOCK_D)
    dk_head = dk_ptr + b * stride_dk[0] + h_kv * stride_dk[1]
    store_rows(dk_head, stride_dk[2], cols, cols < len_k, dk * scale, HEAD_DIM, BLOCK_D)
    dv_head = dv_ptr + b * stride_dv[0] + h_kv * stride_dv[1]
    store_rows(dv_head, stride_dv[2], cols, cols < len_k, dv * dropout_rest, HEAD_DIM_V, BLOCK_DV)


class Launch:
    """The arguments that the backward kernels of one problem share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        lse: Tensor,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        dropout_p: float,
        dropout_seed: Tensor | None,
        grad_out: Tensor | None = None,
        delta: Tensor | None = None,
        grad_weights: Tensor | None = None,
        stride_weights: tuple[int, ...] = (0, 0, 0, 0),
        weight_scale: float = 1.0,
    ) -> None:
        self.B, self.Hq, self.L, self.D = query.shape
        self.Hkv, self.S = key.shape[1:3]
        self.group = self.Hq // self.Hkv
        self.Dv = self.D if value is None else value.shape[3]
        self.query, self.mask, self.bias = query, mask, bias
        self.operands = mask_operands(mask, self.L, self.S)
        limit = dropout_limit(dropout_p)
        seed = dropout_seed if limit >= 0 else None
        self.seed = seed
        self.tensors = (query, key, value, bias, grad_out, lse, delta, grad_weights, seed, self.operands)
        self.strides = (
            *(rows_of(query), rows_of(key), rows_of(value), strides_of(bias), rows_of(grad_out)),
            stride_weights,
        )
        self.sizes = (self.Hq, self.group, self.L, self.S)
        self.scale = scale
        self.weights_and_dropout = (weight_scale, limit, *dropout_factors(dropout_p))
        self.constants: dict[str, Any] = dict(
            HAS_DROPOUT=limit >= 0,
            HEAD_DIM=self.D,
            HEAD_DIM_V=self.Dv,
            BLOCK_D=block_dim(self.D),
            BLOCK_DV=block_dim(self.Dv),
            PRECISION=dot_precision(query.dtype),
        )

    def _constants(self, chosen: config.Config) -> dict[str, Any]:
        return self.constants | chosen.constants()

    def tiles(self, chosen: config.Config, rows: bool) -> TileOperands:
        if self.mask is None or not is_listed(self.mask):
            return TileOperands()
        lists = live_tiles(self.mask, self.operands, self.L, self.S, chosen.block_m, chosen.block_n, want_rows=rows)
        return lists.rows if rows else lists.columns

    def dq(self, grad_query: Tensor, grad_lse: Tensor | None = None) -> None:
        if not grad_query.numel():
            return

        def launch(chosen: config.Config) -> None:
            num_m = triton.cdiv(self.L, chosen.block_m)
            attention_backward_dq_kernel[(self.B * self.Hq * num_m,)](
                *(*self.tensors, self.tiles(chosen, True), grad_query, grad_lse, *self.strides, rows_of(grad_query)),
                *(*self.sizes, num_m, self.scale, *self.weights_and_dropout),
                **self._constants(chosen),
            )

        config.tuned("dq", self.query, max(self.D, self.Dv), self.mask, self.bias, launch)

    def dkv(self, grad_key: Tensor, grad_value: Tensor | None) -> None:
        if not self.B * self.Hkv * self.S:
            return

        def launch(chosen: config.Config) -> None:
            num_n = triton.cdiv(self.S, chosen.block_n)
            attention_backward_dkv_kernel[(self.B * self.Hkv * num_n,)](
                *(*self.tensors, self.tiles(chosen, False), grad_key, grad_value, *self.strides),
                *(rows_of(grad_key), rows_of(grad_value), *self.sizes, num_n, self.scale),
                *self.weights_and_dropout,
                **self._constants(chosen),
            )

        config.tuned("dkv", self.query, max(self.D, self.Dv), self.mask, self.bias, launch)

    def dbias(self) -> Tensor:
        """The gradient of the bias in its own shape and dtype."""
        bias = self.bias
        assert bias is not None
        if not bias.numel() or not self.B * self.Hq * self.L * self.S:
            return torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
        chosen = config.table("dbias", self.query, max(self.D, self.Dv), self.mask, bias)
        Bb, Hb, Lb, Sb = bias.shape
        num_m, num_n = triton.cdiv(self.L, chosen.block_m), triton.cdiv(self.S, chosen.block_n)
        # A length of 1 that is also the problem's is its own: nothing to add.
        shared = [own != size for own, size in zip(bias.shape, (self.B, self.Hq, self.L, self.S), strict=True)]
        own_m, sum_m = (1, num_m) if shared[2] else (num_m, 1)
        own_n, sum_n = (1, num_n) if shared[3] else (num_n, 1)
        sum_b, sum_h = (self.B if shared[0] else 1), (self.Hq if shared[1] else 1)
        num_own, sum_all = Bb * Hb * own_m * own_n, sum_b * sum_h * sum_m * sum_n
        splits = max(1, min(sum_all, config.programs_wanted(self.query) // num_own))
        per_split = triton.cdiv(sum_all, splits)
        splits = triton.cdiv(sum_all, per_split)
        partial = torch.empty((splits, *bias.shape), dtype=torch.float32, device=bias.device)
        attention_backward_dbias_kernel[(num_own * splits,)](
            *(*self.tensors, self.tiles(chosen, False), partial, *self.strides, *self.sizes),
            *(Hb, Lb, Sb, own_m, own_n, sum_h, sum_m, sum_n, sum_all, per_split, num_own, bias.numel()),
            *(self.scale, *self.weights_and_dropout),
            **self._constants(chosen),
            ROWS_SHARED=shared[2],
            COLS_SHARED=shared[3],
        )
        return (partial[0] if splits == 1 else partial.sum(0)).to(bias.dtype)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: KernelMask | None,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    need_grad_bias: bool,
) -> Tensor | None:
    """Writes the gradients of query, key and value; returns that of bias, or None."""
    if grad_out.stride(-1) != 1:  # an expanded gradient, such as that of a sum
        grad_out = grad_out.contiguous()
    B, Hq, L, D = query.shape
    S, Dv = value.shape[2:]
    with on_device(query):
        chosen = config.backward_short(query, S, max(D, Dv)) if B * Hq * L * S else None
        delta = None
        if lse.numel() and (chosen is None or need_grad_bias):
            delta = _delta(out, grad_out, lse, grad_lse)
        launch = Launch(
            query, key, value, lse, bias, mask, scale, dropout_p, dropout_seed, grad_out=grad_out, delta=delta
        )
        if chosen is None:
            if not lse.numel():  # no queries: nothing flows into keys and values
                grad_key.zero_()
                grad_value.zero_()
            else:
                launch.dq(grad_query)
                launch.dkv(grad_key, grad_value)
        else:
            _short(launch, chosen, key, value, grad_out, lse, grad_lse, grad_query, grad_key, grad_value)
        return launch.dbias() if need_grad_bias and bias is not None else None


def _delta(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    B, Hq, L, Dv = out.shape
    delta = torch.empty_like(lse)
    block_dv = block_dim(Dv)
    block_m = max(16, 4096 // block_dv)
    num_m = triton.cdiv(L, block_m)
    attention_backward_delta_kernel[(B * Hq * num_m,)](
        *(out, grad_out, lse, grad_lse, delta, rows_of(out), rows_of(grad_out), rows_of(grad_lse), Hq, L, num_m),
        **dict(HEAD_DIM_V=Dv, BLOCK_M=block_m, BLOCK_DV=block_dv, num_warps=4),
    )
    return delta


def _short(
    launch: Launch,
    chosen: config.Config,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    query, bias = launch.query, launch.bias
    _, limit, *factors = launch.weights_and_dropout
    attention_backward_short_kernel[(launch.B * launch.Hkv,)](
        *(query, key, value, bias, grad_out, lse, grad_lse, launch.seed, launch.operands, TileOperands()),
        *(grad_query, grad_key, grad_value, *launch.strides[:5], rows_of(grad_lse)),
        *(rows_of(grad_query), rows_of(grad_key), rows_of(grad_value), *launch.sizes),
        *(launch.scale, limit, *factors),
        **launch.constants,
        **chosen.constants(),
    )
