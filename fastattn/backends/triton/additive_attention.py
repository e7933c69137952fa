"""Additive attention, softmax_j(w · tanh(q_i + k_j)) V, with an online softmax; the mask has one head, number 0.

Nothing is exponentiated for a pair: tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^(2q) e^(2k)), and e^(2q), e^(2k) are made
once (`additive_prepare_kernel`). Scores: a thread holds some pairs and walks the features, in pairs that share one
division, w1 / x1 + w2 / x2 = (w1 x2 + w2 x1) / (x1 x2); x is cut off at 2^60, where 2 r is far below what float32 tells
from 0, and columns of e^(2q) and e^(2k), [A, L] and [A, S], make every load of a feature contiguous. Gradients,
d tanh(x) / dx = 4 r (1 - r): a thread holds some features of its own rows and walks the other side, two rows to a
division, so that no sum crosses threads; ds of a tile passes through memory of the program's own for that. 1 - r is
formed as r e^(2q) e^(2k), which loses no digits where r is close to 1. A tile with a |q| or |k| beyond 43, of which
float32 does not hold e^(2x), takes e^(2 (q + k)) for each pair.

Design, for one H200 at B = 32, L = S = 512, A = Dv = 256 (2.1 G elements). Forward: tiles of 32 x 32, 4 pairs a thread
beside the accumulators of 256 numbers of a value, in float32 of 128; 512 programs of 8 warps, of which a multiprocessor
holds one. Backward: 16 rows of its own (32 for 64
features) with all of up to 256 features, 8 elements a thread and as many accumulators, with dw twice, against 32 of
the other side. Larger A and Dv are cut into chunks over programs, which repeat the scores. Bytes: inputs, their
exponentials twice in float32, gradients: below 0.2 GB, 0.05 ms; so arithmetic decides. An element takes about 5
instructions in the forward and 28 in the backward: at 132 multiprocessors x 128 lanes x 1.75 GHz 0.4 ms and 2.0 ms,
without loads and what waiting costs. Eager writes and reads the 8.6 GB of q + k and of its tanh, 8 ms at the 4.3 TB/s
of a copy. Expected: 10 to 20 times eager. Nothing of this has been measured on a GPU.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from fastattn.backends.triton import config
from fastattn.backends.triton.attention_backward import _delta, _load_row_state
from fastattn.backends.triton.attention_forward import _softmax_step
from fastattn.backends.triton.common import (
    LN2,
    LOG2E,
    NEG_INF,
    TileOperands,
    attended_keys,
    block_dim,
    dot,
    dot_precision,
    full_tile,
    is_listed,
    mask_operands,
    may_attend,
    on_device,
    partial_tile,
    probability,
    rows_of,
    tile_plan,
)
from fastattn.backends.triton.live_tiles import live_tiles
from fastattn.masks import KernelMask

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_CHUNK = tl.constexpr(8)  # features that are summed before they join the score: what cancels stays small
_GUARD = tl.constexpr(43.0)  # e^(2x) is a normal number up to here
_LARGEST = tl.constexpr(float(2**60))  # of 1 + e^(2q) e^(2k): the product of two is finite
_PADDING = 64  # lengths of the columns are multiples of this, as of every tile
_MAX_DIM = 256  # features, and numbers of a value, of one program


class Side(NamedTuple):
    """The queries or the keys, as the kernels read them."""

    raw: Any  # [B, 1, N, A]
    stride: Any  # (b, h, row) of raw
    columns: Any  # float32 [B, padded_features, padded]: e^(2x), 1 in the padding
    rows: Any  # float32 [B, N, A]: e^(2x); None in the forward
    largest: Any  # float32 [B, padded]: of a row of |x|
    length: Any
    padded: Any
    end: Any = None  # as that of MaskOperands


@triton.jit
def _exponential(x):
    """e^(2x) for |x| <= 43. 2x = n ln 2 + y with ln 2 in two parts: the error stays one of rounding for large x."""
    x = tl.where(x > 44.0, 44.0, tl.where(x < -44.0, -44.0, x))  # NaN stays
    n = tl.floor(x * (2 * LOG2E) + 0.5)
    y = (x * 2 - n * 0.693359375) + n * 2.12194440e-4
    power = ((tl.where(n == n, n, 0.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.math.exp2(y * LOG2E) * power


@triton.jit
def _divide(x, y):
    """x / y for y in [1, 2^120], or NaN: without the steps that a y near the ends of float32 takes."""
    if _INTERPRETED:
        return x / y
    else:
        return libdevice.fast_dividef(x, y)


@triton.jit
def _direct_exponential(x):
    """e^(2x) for any x, cut off."""
    x = x * (2 * LOG2E)
    return tl.math.exp2(tl.where(x > 60.0, 60.0, x))  # NaN stays


@triton.jit
def additive_prepare_kernel(
    x_ptr,  # [B, 1, N, A]
    columns_ptr,  # see Side
    rows_ptr,
    largest_ptr,
    stride,
    length,
    padded,
    features,
    padded_features,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = padded // BLOCK_M
    b = (pid // tiles).to(tl.int64)
    rows = (pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    largest = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, padded_features, BLOCK_A):
        dims = first + tl.arange(0, BLOCK_A)
        inside = (rows < length)[:, None] & (dims < features)[None, :]
        pointers = x_ptr + b * stride[0] + rows[:, None] * stride[2] + dims[None, :]
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.where(x == x, tl.abs(x), 0.0), 1))
        e = _exponential(x)
        pointers = columns_ptr + (b * padded_features + dims[None, :]) * padded + rows[:, None]
        tl.store(pointers, e, mask=(dims < padded_features)[None, :] & (rows < padded)[:, None])
        if rows_ptr is not None:
            tl.store(rows_ptr + (b * length + rows[:, None]) * features + dims[None, :], e, mask=inside)
    tl.store(largest_ptr + b * padded + rows, largest, mask=rows < padded)


@triton.jit
def _load_tile(ptr, stride, rows, valid, dims, dim):
    """Rows and a chunk of their numbers; 0 where `valid` is false and beyond `dim`."""
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=valid[:, None] & (dims < dim)[None, :], other=0.0)


@triton.jit
def _store_tile(ptr, stride, rows, valid, dims, dim, x):
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=valid[:, None] & (dims < dim)[None, :])


@triton.jit
def _direct_scores(
    one, other, one_rows, other_rows, b, weight_ptr, features, BLOCK_ONE: tl.constexpr, BLOCK_OTHER: tl.constexpr
):
    s = tl.zeros([BLOCK_ONE, BLOCK_OTHER], tl.float32)
    one_ptr = one.raw + b * one.stride[0] + one_rows.to(tl.int64) * one.stride[2]
    other_ptr = other.raw + b * other.stride[0] + other_rows.to(tl.int64) * other.stride[2]
    for d in range(0, features):
        x = tl.load(one_ptr + d, mask=one_rows < one.length, other=0.0).to(tl.float32)
        y = tl.load(other_ptr + d, mask=other_rows < other.length, other=0.0).to(tl.float32)
        e = _direct_exponential(x[:, None] + y[None, :])
        s += tl.load(weight_ptr + d) * (1.0 - _divide(2.0, 1.0 + e))
    return s


@triton.jit
def _two_features(one_ptr, other_ptr, stride_one, stride_other, weight_ptr):
    """(w1 r1 + w2 r2 of every pair, w1 + w2)."""
    w1, w2 = tl.load(weight_ptr), tl.load(weight_ptr + 1)
    x1 = _one_plus(tl.load(one_ptr)[:, None], tl.load(other_ptr)[None, :])
    x2 = _one_plus(tl.load(one_ptr + stride_one)[:, None], tl.load(other_ptr + stride_other)[None, :])
    return _divide(tl.fma(x2, w1, x1 * w2), x1 * x2), w1 + w2


@triton.jit
def _factored_scores(
    one,
    other,
    one_rows,
    other_rows,
    b,
    weight_ptr,
    padded_features,
    BLOCK_ONE: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    s = tl.zeros([BLOCK_ONE, BLOCK_OTHER], tl.float32)
    one_ptr = one.columns + b * padded_features * one.padded + one_rows
    other_ptr = other.columns + b * padded_features * other.padded + other_rows
    for first in range(0, padded_features, _CHUNK):
        part, weights = _two_features(one_ptr, other_ptr, one.padded, other.padded, weight_ptr + first)
        for step in tl.static_range(2, _CHUNK, 2):
            one_ptr += 2 * one.padded
            other_ptr += 2 * other.padded
            term, more = _two_features(one_ptr, other_ptr, one.padded, other.padded, weight_ptr + first + step)
            part += term
            weights += more
        one_ptr += 2 * one.padded
        other_ptr += 2 * other.padded
        s += tl.fma(part, -2.0, weights)
    return s


@triton.jit
def _scores(
    one,
    other,
    one_rows,
    other_rows,
    b,
    weight_ptr,
    features,
    padded_features,
    direct,
    BLOCK_ONE: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """w · tanh(q + k), [BLOCK_ONE, BLOCK_OTHER]: the same bits whichever side is `one`. The tiles lie in the padded
    lengths."""
    if direct:
        s = _direct_scores(one, other, one_rows, other_rows, b, weight_ptr, features, BLOCK_ONE, BLOCK_OTHER)
    else:
        s = _factored_scores(one, other, one_rows, other_rows, b, weight_ptr, padded_features, BLOCK_ONE, BLOCK_OTHER)
    return s


@triton.jit
def _one_plus(x, y):
    return tl.minimum(tl.fma(x, y, 1.0), _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(side, b, rows, valid):
    """Of |x| in a tile. What nobody attends to has no say: it must not change a bit of the results."""
    return tl.max(tl.load(side.largest + b * side.padded + rows, mask=valid, other=0.0), 0)


@triton.jit
def additive_forward_kernel(
    query,
    key,
    v_ptr,  # [B, 1, S, Dv]
    weight_ptr,  # float32 [padded_features], 0 in the padding
    out_ptr,  # [B, 1, L, Dv]
    lse_ptr,  # [B, L] contiguous
    mask,
    tiles,
    stride_v,
    stride_o,
    features,
    padded_features,
    dim_v,
    num_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PARTS: tl.constexpr,  # so many blocks of a value in one program: the scores are made for all of them at once
    PRECISION_P: tl.constexpr,  # see _Launch
):
    pid = tl.program_id(0)
    chunk = tl.program_id(1)
    b = (pid // num_m).to(tl.int64)
    h = b * 0
    tile_m = num_m - 1 - pid % num_m  # the longest rows of a causal mask first
    len_q, len_k = query.length, key.length
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = chunk * (PARTS * BLOCK_DV) + tl.arange(0, BLOCK_DV)
    largest_q = _largest(query, b, rows, rows < len_q)
    v_ptr += b * stride_v[0]

    m_i = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    accs = ()
    for _ in tl.static_range(PARTS):
        accs = accs + (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),)  # type: ignore[assignment]
    plan = tile_plan(mask, tiles, b, h, tile_m, len_q, len_k, BLOCK_M, BLOCK_N, False)
    for masked in tl.static_range(2):
        for t in range(0, plan[masked]):
            if masked:
                n0 = partial_tile(t, plan, tiles) * BLOCK_N
            else:
                n0 = full_tile(t, plan, tiles) * BLOCK_N
            cols = n0 + tl.arange(0, BLOCK_N)
            live = cols < len_k
            if masked:
                live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
            direct = tl.maximum(largest_q, _largest(key, b, cols, live)) > _GUARD
            s = _scores(query, key, rows, cols, b, weight_ptr, features, padded_features, direct, BLOCK_M, BLOCK_N)
            if masked:
                keep = may_attend(mask, b, h, rows[:, None], cols[None, :], n0, len_q, len_k, BLOCK_N)
                s = tl.where(keep, s, NEG_INF)
            p, m_i, alpha, l_i = _softmax_step(s, m_i, l_i, LOG2E, masked)
            added = ()
            for part in tl.static_range(PARTS):
                v = _load_tile(v_ptr, stride_v[2], cols, live, dims + part * BLOCK_DV, dim_v)  # [BLOCK_N, BLOCK_DV]
                acc = dot(p, v.to(tl.float32), accs[part] * alpha[:, None], PRECISION_P)
                added = added + (acc,)  # type: ignore[assignment]
            accs = added

    valid = rows < len_q
    empty = l_i == 0.0  # NaN is not empty
    total = tl.where(empty, 1.0, l_i)
    for part in tl.static_range(PARTS):
        at = dims + part * BLOCK_DV
        _store_tile(out_ptr + b * stride_o[0], stride_o[2], rows, valid, at, dim_v, accs[part] / total[:, None])
    lse = tl.where(empty, NEG_INF, m_i + tl.math.log2(total) * LN2)
    tl.store(lse_ptr + b * len_q + rows, lse, mask=valid & (chunk == 0))


@triton.jit
def _grad_scores(
    query,
    key,
    v_ptr,
    do_ptr,
    weight_ptr,
    mask,
    stride_v,
    stride_do,
    rows,  # [BLOCK_M]
    cols,  # [BLOCK_N]
    n0,
    live,  # of cols
    shift,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    b,
    h,
    features,
    padded_features,
    dim_v,
    direct,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(p, ds): [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M]."""
    len_q, len_k = query.length, key.length
    if TRANSPOSED:
        s = _scores(key, query, cols, rows, b, weight_ptr, features, padded_features, direct, BLOCK_N, BLOCK_M)
        dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        i, j = rows[None, :], cols[:, None]
        shift, delta = shift[None, :], delta[None, :]
    else:
        s = _scores(query, key, rows, cols, b, weight_ptr, features, padded_features, direct, BLOCK_M, BLOCK_N)
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        i, j = rows[:, None], cols[None, :]
        shift, delta = shift[:, None], delta[:, None]
    BLOCK_P: tl.constexpr = 64 if BLOCK_DV > 64 else BLOCK_DV  # of a step: fewer registers
    for first in range(0, dim_v, BLOCK_P):
        dims = first + tl.arange(0, BLOCK_P)
        v = _load_tile(v_ptr, stride_v[2], cols, live, dims, dim_v)  # [BLOCK_N, BLOCK_P]
        do = _load_tile(do_ptr, stride_do[2], rows, rows < len_q, dims, dim_v)  # [BLOCK_M, BLOCK_P]
        if TRANSPOSED:
            dp = dot(v, tl.trans(do), dp, PRECISION)
        else:
            dp = dot(do, tl.trans(v), dp, PRECISION)
    if MASKED:
        keep = may_attend(mask, b, h, i, j, n0, len_q, len_k, BLOCK_N)
        s = tl.where(keep, s, NEG_INF)
    p = probability(s, shift)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(keep, ds, 0.0)  # a select: dp may be NaN where nobody attends
    return p, ds


@triton.jit
def _add_gradients(
    acc,  # [BLOCK_OWN, BLOCK_A]: += sum over the other rows of ds r (1 - r)
    acc_weight,  # the same of ds (1 - 2 r); anything where not WITH_WEIGHT
    own,  # [BLOCK_OWN, BLOCK_A]: e^(2x), with DIRECT x
    other_ptr,  # of e^(2x), with DIRECT of x
    stride,
    ds_ptr,  # [BLOCK_OTHER, BLOCK_OWN]
    first,
    length,
    dims,
    features,
    DIRECT: tl.constexpr,
    MASKED: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK_OWN)
    for n in range(0, tl.minimum(length - first, BLOCK_OTHER), 2):
        at = first + n
        row_ptr = other_ptr + at.to(tl.int64) * stride + dims
        y1 = tl.load(row_ptr, mask=(dims < features) & (at < length), other=0.0).to(tl.float32)
        y2 = tl.load(row_ptr + stride, mask=(dims < features) & (at + 1 < length), other=0.0).to(tl.float32)
        ds1 = tl.load(ds_ptr + n * BLOCK_OWN + lanes)[:, None]
        ds2 = tl.load(ds_ptr + (n + 1) * BLOCK_OWN + lanes)[:, None]
        if DIRECT:
            e1 = _direct_exponential(own + y1[None, :])
            e2 = _direct_exponential(own + y2[None, :])
        else:
            e1 = tl.minimum(own * y1[None, :], _LARGEST, propagate_nan=tl.PropagateNan.ALL)
            e2 = tl.minimum(own * y2[None, :], _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if MASKED:
            # Of a key that nobody attends to, or a query without keys, it may be NaN, and the other one shares its
            # division.
            e1, e2 = tl.where(ds1 != 0.0, e1, 0.0), tl.where(ds2 != 0.0, e2, 0.0)
        x1, x2 = e1 + 1.0, e2 + 1.0
        inverse = _divide(1.0, x1 * x2)
        r1, r2 = inverse * x2, inverse * x1
        acc = tl.fma(ds1 * r1, r1 * e1, acc)
        acc = tl.fma(ds2 * r2, r2 * e2, acc)
        if WITH_WEIGHT:
            acc_weight = tl.fma(tl.fma(r1, -2.0, 1.0), ds1, acc_weight)
            acc_weight = tl.fma(tl.fma(r2, -2.0, 1.0), ds2, acc_weight)
    return acc, acc_weight


@triton.jit
def _pass_on(ds_ptr, ds, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr):
    """Stores ds [BLOCK_OWN, BLOCK_OTHER], transposed, for every thread of the program."""
    tl.debug_barrier()  # nobody reads the last one any more
    lanes = tl.arange(0, BLOCK_OWN)[:, None]
    tl.store(ds_ptr + tl.arange(0, BLOCK_OTHER)[None, :] * BLOCK_OWN + lanes, ds)
    tl.debug_barrier()


@triton.jit
def additive_backward_dq_kernel(
    query,
    key,
    v_ptr,
    do_ptr,
    weight_ptr,
    lse_ptr,
    delta_ptr,
    mask,
    tiles,
    ds_ptr,  # float32 [programs, BLOCK_N, BLOCK_M]
    dq_ptr,  # [B, L, A] contiguous
    dw_ptr,  # float32 [B, num_m, A]: parts of the gradient of the weight
    stride_v,
    stride_do,
    features,
    padded_features,
    dim_v,
    num_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = tl.program_id(1)
    b = (pid // num_m).to(tl.int64)
    h = b * 0
    tile_m = num_m - 1 - pid % num_m
    len_q, len_k = query.length, key.length
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = chunk * BLOCK_A + tl.arange(0, BLOCK_A)
    valid = rows < len_q
    ds_ptr += (pid + chunk * tl.num_programs(0)).to(tl.int64) * BLOCK_M * BLOCK_N
    v_ptr += b * stride_v[0]
    do_ptr += b * stride_do[0]
    largest_q = _largest(query, b, rows, valid)
    shift, delta = _load_row_state(lse_ptr, delta_ptr, b * len_q, rows, len_q)
    own_ptr = query.raw + b * query.stride[0]
    own = _load_tile(query.rows + b * len_q * features, features, rows, valid, dims, features)
    acc = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
    acc_weight = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
    plan = tile_plan(mask, tiles, b, h, tile_m, len_q, len_k, BLOCK_M, BLOCK_N, False)
    for masked in tl.static_range(2):
        for t in range(0, plan[masked]):
            if masked:
                n0 = partial_tile(t, plan, tiles) * BLOCK_N
            else:
                n0 = full_tile(t, plan, tiles) * BLOCK_N
            cols = n0 + tl.arange(0, BLOCK_N)
            live = cols < len_k
            if masked:
                live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
            direct = tl.maximum(largest_q, _largest(key, b, cols, live)) > _GUARD
            _, ds = _grad_scores(
                *(query, key, v_ptr, do_ptr, weight_ptr, mask, stride_v, stride_do, rows, cols, n0, live, shift, delta),
                *(b, h, features, padded_features, dim_v, direct, masked, False),
                *(BLOCK_M, BLOCK_N, BLOCK_DV, PRECISION),
            )
            _pass_on(ds_ptr, ds, BLOCK_M, BLOCK_N)
            if direct:
                raw = _load_tile(own_ptr, query.stride[2], rows, valid, dims, features).to(tl.float32)
                acc, acc_weight = _add_gradients(
                    *(acc, acc_weight, raw, key.raw + b * key.stride[0], key.stride[2], ds_ptr, n0, len_k),
                    *(dims, features, True, masked, True, BLOCK_M, BLOCK_N),
                )
            else:
                acc, acc_weight = _add_gradients(
                    *(acc, acc_weight, own, key.rows + b * len_k * features, features, ds_ptr, n0, len_k),
                    *(dims, features, False, masked, True, BLOCK_M, BLOCK_N),
                )
    weight = tl.load(weight_ptr + dims, mask=dims < features, other=0.0)
    dq = acc * (4.0 * weight)[None, :]
    _store_tile(dq_ptr + b * len_q * features, features, rows, valid, dims, features, dq)
    part = (b * num_m + tile_m) * features
    tl.store(dw_ptr + part + dims, tl.sum(acc_weight, 0), mask=dims < features)


@triton.jit
def additive_backward_dkv_kernel(
    query,
    key,
    v_ptr,
    do_ptr,
    weight_ptr,
    lse_ptr,
    delta_ptr,
    mask,
    tiles,
    ds_ptr,  # float32 [programs, BLOCK_M, BLOCK_N]
    dk_ptr,  # [B, S, A] contiguous
    dv_ptr,  # [B, S, Dv] contiguous
    stride_v,
    stride_do,
    features,
    padded_features,
    dim_v,
    num_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_P: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = tl.program_id(1)
    b = (pid // num_n).to(tl.int64)
    h = b * 0
    tile_n = pid % num_n
    len_q, len_k = query.length, key.length
    n0 = tile_n * BLOCK_N
    cols = n0 + tl.arange(0, BLOCK_N)
    dims = chunk * BLOCK_A + tl.arange(0, BLOCK_A)
    dims_v = chunk * BLOCK_DV + tl.arange(0, BLOCK_DV)
    live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
    ds_ptr += (pid + chunk * tl.num_programs(0)).to(tl.int64) * BLOCK_M * BLOCK_N
    v_ptr += b * stride_v[0]
    do_ptr += b * stride_do[0]
    largest_k = _largest(key, b, cols, live)
    own_ptr = key.raw + b * key.stride[0]
    own = _load_tile(key.rows + b * len_k * features, features, cols, live, dims, features)
    acc = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    plan = tile_plan(mask, tiles, b, h, tile_n, len_q, len_k, BLOCK_M, BLOCK_N, True)
    for masked in tl.static_range(2):
        for t in range(0, plan[masked]):
            if masked:
                m0 = partial_tile(t, plan, tiles) * BLOCK_M
            else:
                m0 = full_tile(t, plan, tiles) * BLOCK_M
            rows = m0 + tl.arange(0, BLOCK_M)
            direct = tl.maximum(largest_k, _largest(query, b, rows, rows < len_q)) > _GUARD
            shift, delta = _load_row_state(lse_ptr, delta_ptr, b * len_q, rows, len_q)
            p, ds = _grad_scores(
                *(query, key, v_ptr, do_ptr, weight_ptr, mask, stride_v, stride_do, rows, cols, n0, live, shift, delta),
                *(b, h, features, padded_features, dim_v, direct, masked, True),
                *(BLOCK_M, BLOCK_N, BLOCK_DV, PRECISION),
            )  # [BLOCK_N, BLOCK_M]
            do = _load_tile(do_ptr, stride_do[2], rows, rows < len_q, dims_v, dim_v)
            dv = dot(p, do.to(tl.float32), dv, PRECISION_P)
            _pass_on(ds_ptr, ds, BLOCK_N, BLOCK_M)
            if direct:
                raw = _load_tile(own_ptr, key.stride[2], cols, live, dims, features).to(tl.float32)
                acc, _ = _add_gradients(
                    *(acc, acc, raw, query.raw + b * query.stride[0], query.stride[2], ds_ptr, m0, len_q),
                    *(dims, features, True, masked, False, BLOCK_N, BLOCK_M),
                )
            else:
                acc, _ = _add_gradients(
                    *(acc, acc, own, query.rows + b * len_q * features, features, ds_ptr, m0, len_q),
                    *(dims, features, False, masked, False, BLOCK_N, BLOCK_M),
                )
    weight = tl.load(weight_ptr + dims, mask=dims < features, other=0.0)
    dk = acc * (4.0 * weight)[None, :]
    _store_tile(dk_ptr + b * len_k * features, features, cols, cols < len_k, dims, features, dk)
    _store_tile(dv_ptr + b * len_k * dim_v, dim_v, cols, cols < len_k, dims_v, dim_v, dv)


class _Launch:
    """What the launches of one problem share. Tensors come as (B, N, dim); the kernels see one head."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, mask: KernelMask | None, backward: bool
    ) -> None:
        self.B, self.L, self.A = query.shape
        self.S, self.Dv = value.shape[1:]
        self.value, self.mask = value.unsqueeze(1), mask
        self.operands = mask_operands(mask, self.L, self.S)
        self.padded_features = triton.cdiv(self.A, _CHUNK.value) * _CHUNK.value
        self.query, self.key = self._side(query, backward), self._side(key, backward)
        self.weight = F.pad(score_weight.to(torch.float32), (0, self.padded_features - self.A))
        self.precision = dot_precision(query.dtype)
        # Probabilities are not rounded to 16 bits: they enter products as three terms of tf32.
        self.precision_p = self.precision if query.dtype == torch.float32 else "tf32x3"
        self.sizes = (self.A, self.padded_features, self.Dv)

    def _side(self, x: Tensor, backward: bool) -> Side:
        batch, length, features = x.shape
        padded = triton.cdiv(length, _PADDING) * _PADDING
        columns = x.new_empty((batch, self.padded_features, padded), dtype=torch.float32)
        rows = x.new_empty(x.shape, dtype=torch.float32) if backward else None
        largest = x.new_empty((batch, padded), dtype=torch.float32)
        raw = x.unsqueeze(1)
        if largest.numel():
            block = 32
            additive_prepare_kernel[(batch * padded // block,)](
                *(raw, columns, rows, largest, rows_of(raw), length, padded, features, self.padded_features),
                **dict(BLOCK_M=block, BLOCK_A=32, num_warps=4, enable_fp_fusion=False),
            )
        return Side(raw, rows_of(raw), columns, rows, largest, length, padded)

    def tiles(self, chosen: config.Config, rows: bool) -> TileOperands:
        if self.mask is None or not is_listed(self.mask):
            return TileOperands()
        lists = live_tiles(self.mask, self.operands, self.L, self.S, chosen.block_m, chosen.block_n, want_rows=rows)
        return lists.rows if rows else lists.columns


def _chunks(dim: int, largest: int) -> tuple[int, int]:
    """(how many chunks, the size of one) that hold `dim` numbers."""
    block = min(block_dim(dim), largest)
    return max(1, triton.cdiv(dim, block)), block


def additive_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, mask: KernelMask | None
) -> tuple[Tensor, Tensor]:
    """out (B, L, Dv) in the dtype of query, and lse (B, L) float32, both contiguous."""
    B, L, _ = query.shape
    out = query.new_empty((B, L, value.shape[2]))
    lse = query.new_empty((B, L), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    with on_device(query):
        launch = _Launch(query, key, value, score_weight, mask, False)
        chosen = config.additive("forward", launch.A)
        num_m = triton.cdiv(L, chosen.block_m)
        _, block_dv = _chunks(launch.Dv, _MAX_DIM // 2)
        # A product of float32 takes all registers for one block.
        parts = 2 if launch.Dv > block_dv and query.dtype != torch.float32 else 1
        additive_forward_kernel[(B * num_m, max(1, triton.cdiv(launch.Dv, parts * block_dv)))](
            *(launch.query, launch.key, launch.value, launch.weight, out.unsqueeze(1), lse, launch.operands),
            *(launch.tiles(chosen, True), rows_of(launch.value), rows_of(out.unsqueeze(1)), *launch.sizes, num_m),
            **dict(BLOCK_DV=block_dv, PARTS=parts, PRECISION_P=launch.precision_p),
            **chosen.constants(),
        )
    return out, lse


def additive_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: KernelMask | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and score_weight, contiguous, each in the dtype of its input."""
    B, L, A = query.shape
    S, Dv = value.shape[1:]
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    if not lse.numel():  # no queries: nothing flows anywhere
        return grad_query, grad_key.zero_(), grad_value.zero_(), torch.zeros_like(score_weight)
    if grad_out.stride(-1) != 1:  # an expanded gradient, such as that of a sum
        grad_out = grad_out.contiguous()
    with on_device(query):
        launch = _Launch(query, key, value, score_weight, mask, True)
        do = grad_out.unsqueeze(1)
        head_lse = lse.unsqueeze(1)
        delta = _delta(out.unsqueeze(1), do, head_lse, None if grad_lse is None else grad_lse.unsqueeze(1))
        shared = (launch.query, launch.key, launch.value, do, launch.weight, lse, delta, launch.operands)
        strides = rows_of(launch.value), rows_of(do)
        chunks_a, block_a = _chunks(A, _MAX_DIM)
        chunks_v, block_dv = _chunks(Dv, _MAX_DIM)
        constants = dict(BLOCK_A=block_a, BLOCK_DV=block_dv, PRECISION=launch.precision)

        chosen = config.additive("dq", block_a)
        num_m = triton.cdiv(L, chosen.block_m)
        grad_weight = query.new_empty((B, num_m, A), dtype=torch.float32)
        ds = _scratch(query, B * num_m * chunks_a, chosen)
        additive_backward_dq_kernel[(B * num_m, chunks_a)](
            *(*shared, launch.tiles(chosen, True), ds, grad_query, grad_weight, *strides, *launch.sizes, num_m),
            **constants,
            **chosen.constants(),
        )
        if S:
            chosen = config.additive("dkv", block_a)
            num_n, chunks = triton.cdiv(S, chosen.block_n), max(chunks_a, chunks_v)
            ds = _scratch(query, B * num_n * chunks, chosen)
            additive_backward_dkv_kernel[(B * num_n, chunks)](
                *(*shared, launch.tiles(chosen, False), ds, grad_key, grad_value, *strides, *launch.sizes, num_n),
                **(constants | dict(PRECISION_P=launch.precision_p)),
                **chosen.constants(),
            )
    return grad_query, grad_key, grad_value, grad_weight.sum((0, 1)).to(score_weight.dtype)


def _scratch(like: Tensor, programs: int, chosen: config.Config) -> Tensor:
    return like.new_empty((programs, chosen.block_m, chosen.block_n), dtype=torch.float32)
