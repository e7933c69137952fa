"""Attention forward: tiled online softmax (Dao 2023, "FlashAttention-2", algorithm 1), a single-tile path for short key
sequences, and for few queries (decoding) a path that shares the keys out over programs (Dao et al. 2023,
"Flash-Decoding")."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.triton import config
from fastattn.backends.triton.common import (
    LN2,
    NEG_INF,
    TileOperands,
    attended_keys,
    block_dim,
    dot,
    dot_precision,
    dropout_factors,
    dropout_keep,
    dropout_keep_rows,
    dropout_limit,
    full_tile,
    is_listed,
    key_tile_range,
    load_bias,
    load_rows,
    mask_operands,
    may_attend,
    on_device,
    partial_tile,
    rows_of,
    store_rows,
    strides_of,
    tile_plan,
)
from fastattn.backends.triton.live_tiles import live_tiles
from fastattn.masks import KernelMask


@triton.jit
def _scores(
    q, k, bias_ptr, stride_bias, b, h, rows, cols, len_q, len_k, scale, FOLD: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores [BLOCK_M, BLOCK_N]; FOLD: still without the scale, which the exponential takes in."""
    s = dot(q, tl.trans(k), None, PRECISION)
    if not FOLD:
        s = s * scale
    if bias_ptr is not None:
        s += load_bias(bias_ptr, stride_bias, b, h, rows[:, None], cols[None, :], len_q, len_k)
    return s


@triton.jit
def _softmax_step(s, m_i, l_i, to_log2, MASKED: tl.constexpr):
    """One tile of the online softmax: (p, new maximum, factor for what was accumulated, new sum).

    The maximum is subtracted before the product with `to_log2`: the difference is exactly 0 at the maximum however
    large the scores are, where the rounding of a product of them would decide.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    shift = m_new
    if MASKED:
        # A row that has seen nothing: -inf - -inf would be NaN.
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)
    p = tl.math.exp2((s - shift[:, None]) * to_log2)
    alpha = tl.math.exp2((m_i - shift) * to_log2)
    return p, m_new, alpha, l_i * alpha + tl.sum(p, 1)


@triton.jit
def _forward_tiles(
    acc,  # [BLOCK_M, BLOCK_DV]
    m_i,  # [BLOCK_M]
    l_i,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    bias_ptr,
    stride_bias,
    mask,
    tiles,
    plan,
    seed,
    dropout_limit,
    dropout_scale,
    b,
    h,
    m0,
    rows,
    len_q,
    len_k,
    scale,
    to_log2,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if MASKED:
        count = plan[1]
    else:
        count = plan[0]
    for t in range(0, count):
        if MASKED:
            n0 = partial_tile(t, plan, tiles) * BLOCK_N
        else:
            n0 = full_tile(t, plan, tiles) * BLOCK_N
        cols = n0 + tl.arange(0, BLOCK_N)
        if MASKED:
            live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
        else:
            live = cols < len_k
        k = load_rows(k_ptr, stride_kn, cols, live, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        s = _scores(q, k, bias_ptr, stride_bias, b, h, rows, cols, len_q, len_k, scale, FOLD, PRECISION)
        if MASKED:
            keep = may_attend(mask, b, h, rows[:, None], cols[None, :], n0, len_q, len_k, BLOCK_N)
            s = tl.where(keep, s, NEG_INF)
        p, m_i, alpha, l_i = _softmax_step(s, m_i, l_i, to_log2, MASKED or bias_ptr is not None)
        acc = acc * alpha[:, None]
        if HAS_DROPOUT:
            p = tl.where(dropout_keep(seed, dropout_limit, b, h, m0, n0, BLOCK_M, BLOCK_N), p * dropout_scale, 0.0)
        v = load_rows(v_ptr, stride_vn, cols, live, HEAD_DIM_V, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
        acc = dot(p.to(v.dtype), v, acc, PRECISION)
    return acc, m_i, l_i


@triton.jit
def _store_output(
    acc,
    m_i,
    l_i,
    out_ptr,
    stride_om,
    lse_ptr,
    rows,
    len_q,
    scale,
    dropout_rest,
    FOLD: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    valid = rows < len_q
    empty = l_i == 0.0  # NaN is not empty
    out = acc * (dropout_rest / tl.where(empty, 1.0, l_i))[:, None]
    store_rows(out_ptr, stride_om, rows, valid, out, HEAD_DIM_V, BLOCK_DV)
    if FOLD:
        m_i = m_i * scale
    lse = tl.where(empty, NEG_INF, m_i + tl.math.log2(tl.where(empty, 1.0, l_i)) * LN2)
    tl.store(lse_ptr + rows, lse, mask=valid)


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_forward_kernel(
    q_ptr,  # [B, Hq, L, D]
    k_ptr,  # [B, Hkv, S, D]
    v_ptr,  # [B, Hkv, S, Dv]
    bias_ptr,  # broadcast to [B, Hq, L, S], or None
    out_ptr,  # [B, Hq, L, Dv]
    lse_ptr,  # [B, Hq, L] contiguous
    seed_ptr,
    mask,
    tiles,
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_o,
    heads_q,
    group,
    len_q,
    len_k,
    num_m,
    scale,
    to_log2,  # log2 e, with FOLD times the scale
    dropout_limit,
    dropout_scale,  # see dropout_factors
    dropout_rest,
    FOLD: tl.constexpr,
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
    # Under a causal mask the last queries have the longest rows: they start first.
    tile_m = num_m - 1 - pid % num_m
    b = bh // heads_q
    h = bh % heads_q
    m0 = tile_m * BLOCK_M
    rows = m0 + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_q[0] + h * stride_q[1]
    k_ptr += b * stride_k[0] + h // group * stride_k[1]
    v_ptr += b * stride_v[0] + h // group * stride_v[1]
    out_ptr += b * stride_o[0] + h * stride_o[1]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    q = load_rows(q_ptr, stride_q[2], rows, rows < len_q, HEAD_DIM, BLOCK_D, True)
    m_i = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    plan = tile_plan(mask, tiles, b, h, tile_m, len_q, len_k, BLOCK_M, BLOCK_N, False)
    for masked in tl.static_range(2):
        acc, m_i, l_i = _forward_tiles(
            *(acc, m_i, l_i, q, k_ptr, v_ptr, stride_k[2], stride_v[2], bias_ptr, stride_bias, mask, tiles, plan, seed),
            *(dropout_limit, dropout_scale, b, h, m0, rows, len_q, len_k, scale, to_log2, FOLD, masked, HAS_DROPOUT),
            *(HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION),
        )
    _store_output(
        *(acc, m_i, l_i, out_ptr, stride_o[2], lse_ptr + bh * len_q, rows, len_q, scale, dropout_rest),
        *(FOLD, HEAD_DIM_V, BLOCK_DV),
    )


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_forward_short_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    seed_ptr,
    mask,
    tiles,  # no lists
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_o,
    heads_q,
    group,
    len_q,
    len_k,
    num_parts,
    rows_per_program,  # a multiple of BLOCK_M
    scale,
    to_log2,  # log2 e, with FOLD times the scale
    dropout_limit,
    dropout_scale,  # see dropout_factors
    dropout_rest,
    FOLD: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # holds every key
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every key in one tile, read once: a plain softmax, no running maximum."""
    pid = tl.program_id(0)
    bh = (pid // num_parts).to(tl.int64)
    first_row = pid % num_parts * rows_per_program
    b = bh // heads_q
    h = bh % heads_q
    q_ptr += b * stride_q[0] + h * stride_q[1]
    k_ptr += b * stride_k[0] + h // group * stride_k[1]
    v_ptr += b * stride_v[0] + h // group * stride_v[1]
    out_ptr += b * stride_o[0] + h * stride_o[1]
    lse_ptr += bh * len_q
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    cols = tl.arange(0, BLOCK_N)
    n0 = pid * 0
    live = attended_keys(mask, tiles, b, h, cols, len_q, len_k)
    k = load_rows(k_ptr, stride_k[2], cols, live, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, stride_v[2], cols, live, HEAD_DIM_V, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    for m0 in range(first_row, tl.minimum(first_row + rows_per_program, len_q), BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, stride_q[2], rows, rows < len_q, HEAD_DIM, BLOCK_D, True)
        s = _scores(q, k, bias_ptr, stride_bias, b, h, rows, cols, len_q, len_k, scale, FOLD, PRECISION)
        keep = may_attend(mask, b, h, rows[:, None], cols[None, :], n0, len_q, len_k, BLOCK_N)
        s = tl.where(keep, s, NEG_INF)
        m_i = tl.max(s, 1)
        shift = tl.where(m_i == NEG_INF, 0.0, m_i)
        p = tl.math.exp2((s - shift[:, None]) * to_log2)
        l_i = tl.sum(p, 1)
        if HAS_DROPOUT:
            p = tl.where(dropout_keep(seed, dropout_limit, b, h, m0, n0, BLOCK_M, BLOCK_N), p * dropout_scale, 0.0)
        v_seen = v
        if (mask.query_segments is not None) or (mask.bits is not None):
            # Here no arithmetic tells which keys nobody attends to: 0 * NaN would be NaN.
            v_seen = tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], v, 0.0)
        acc = dot(p.to(v.dtype), v_seen, None, PRECISION)
        _store_output(
            *(acc, m_i, l_i, out_ptr, stride_o[2], lse_ptr, rows, len_q, scale, dropout_rest),
            *(FOLD, HEAD_DIM_V, BLOCK_DV),
        )


@triton.jit(do_not_specialize=["dropout_limit"])
def attention_forward_split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    part_out_ptr,  # [parts, B, Hq, L, BLOCK_DV] float32: sums of 2^((s - m) to_log2) v
    part_max_ptr,  # [parts, B, Hq, L] float32: m
    part_sum_ptr,  # [parts, B, Hq, L] float32: sums of 2^((s - m) to_log2)
    seed_ptr,
    mask,
    tiles,  # no lists
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    heads_q,
    group,
    len_q,  # at most BLOCK_M
    len_k,
    num_m,  # tiles of the group's rows
    total_rows,  # B * Hq * L
    tiles_per_part,
    scale,
    to_log2,  # log2 e, with FOLD times the scale
    dropout_limit,
    dropout_scale,  # see dropout_factors
    FOLD: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the keys for the rows of one key head: row r is query r % L of the group's head r // L, so that each
    tile of keys and values is read once for the whole group."""
    pid = tl.program_id(0)
    part = tl.program_id(1)
    bh = (pid // num_m).to(tl.int64)
    heads_kv = heads_q // group
    b = bh // heads_kv
    h_kv = bh % heads_kv
    r = pid % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = r < group * len_q
    # A row beyond the last is a query beyond the last: no mask lets it attend, and nothing of it is read.
    i = tl.where(valid, r % len_q, len_q)
    h = h_kv * group + tl.where(valid, r // len_q, 0)
    rows = i[:, None]
    heads = h[:, None]
    k_ptr += b * stride_k[0] + h_kv * stride_k[1]
    v_ptr += b * stride_v[0] + h_kv * stride_v[1]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    q = load_rows(q_ptr + b * stride_q[0] + heads * stride_q[1], stride_q[2], i, valid, HEAD_DIM, BLOCK_D, True)
    m_i = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first, full_first, full_last, last = key_tile_range(mask, b, pid * 0, len_q, len_k, BLOCK_M, BLOCK_N)
    begin = tl.maximum(first, part * tiles_per_part)
    end = tl.minimum(last, (part + 1) * tiles_per_part)
    for tile in range(begin, end):
        n0 = tile * BLOCK_N
        cols = n0 + tl.arange(0, BLOCK_N)
        live = attended_keys(mask, tiles, b, h_kv, cols, len_q, len_k)
        k = load_rows(k_ptr, stride_k[2], cols, live, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        s = dot(q, tl.trans(k), None, PRECISION)
        if not FOLD:
            s = s * scale
        if bias_ptr is not None:
            s += load_bias(bias_ptr, stride_bias, b, heads, rows, cols[None, :], len_q, len_k)
        keep = may_attend(mask, b, heads, rows, cols[None, :], n0, len_q, len_k, BLOCK_N)
        s = tl.where(keep, s, NEG_INF)
        p, m_i, alpha, l_i = _softmax_step(s, m_i, l_i, to_log2, True)
        acc = acc * alpha[:, None]
        if HAS_DROPOUT:
            kept = dropout_keep_rows(seed, dropout_limit, b, heads, rows, n0, BLOCK_M, BLOCK_N)
            p = tl.where(kept, p * dropout_scale, 0.0)
        if (mask.query_segments is not None) or (mask.bits is not None):
            # Here no arithmetic tells which keys nobody attends to: 0 * NaN would be NaN.
            live = tl.max(keep.to(tl.int32), 0) > 0
        v = load_rows(v_ptr, stride_v[2], cols, live, HEAD_DIM_V, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
        acc = dot(p.to(v.dtype), v, acc, PRECISION)

    at = part * total_rows + (b * heads_q + h) * len_q + i
    tl.store(part_max_ptr + at, m_i, mask=valid)
    tl.store(part_sum_ptr + at, l_i, mask=valid)
    dims = tl.arange(0, BLOCK_DV)
    tl.store(part_out_ptr + at[:, None] * BLOCK_DV + dims[None, :], acc, mask=valid[:, None])


@triton.jit
def attention_forward_merge_kernel(
    part_out_ptr,  # of attention_forward_split_kernel
    part_max_ptr,
    part_sum_ptr,
    out_ptr,
    lse_ptr,
    stride_o,
    heads_q,
    len_q,
    total_rows,
    num_parts,
    scale,
    to_log2,
    dropout_rest,
    FOLD: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,  # holds every part
):
    """One row: its parts in their order."""
    row = tl.program_id(0).to(tl.int64)
    b = row // (heads_q * len_q)
    h = row // len_q % heads_q
    i = row % len_q
    parts = tl.arange(0, BLOCK_PARTS)
    m = tl.load(part_max_ptr + parts * total_rows + row, mask=parts < num_parts, other=NEG_INF)
    top = tl.max(m, 0)
    shift = tl.where(top == NEG_INF, 0.0, top)
    dims = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    l_i = shift * 0.0
    for part in range(0, num_parts):
        at = part * total_rows + row
        factor = tl.math.exp2((tl.load(part_max_ptr + at) - shift) * to_log2)
        l_i += tl.load(part_sum_ptr + at) * factor
        acc += tl.load(part_out_ptr + at * BLOCK_DV + dims) * factor
    empty = l_i == 0.0  # NaN is not empty
    out = acc * (dropout_rest / tl.where(empty, 1.0, l_i))
    out_ptr += b * stride_o[0] + h * stride_o[1] + i * stride_o[2]
    tl.store(out_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM_V)
    if FOLD:
        top = top * scale
    lse = tl.where(empty, NEG_INF, top + tl.math.log2(tl.where(empty, 1.0, l_i)) * LN2)
    tl.store(lse_ptr + row, lse)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: KernelMask | None,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, L, Dv) over memory (B, L, Hq, Dv), and lse (B, Hq, L) float32 of the undropped scores."""
    B, Hq, L, D = query.shape
    S, Dv = value.shape[2:]
    out = query.new_empty((B, L, Hq, Dv)).transpose(1, 2)
    lse = query.new_empty((B, Hq, L), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    operands = mask_operands(mask, L, S)
    limit = dropout_limit(dropout_p)
    tensors = (query, key, value, bias, out, lse, dropout_seed if limit >= 0 else None, operands)
    strides = (rows_of(query), rows_of(key), rows_of(value), strides_of(bias), rows_of(out))
    sizes = (Hq, Hq // key.shape[1], L, S)
    # The exponential takes the scale in when the order of the scores does not depend on it; a product with log2 e that
    # a GPU takes for 0 would make NaN of an infinite difference.
    fold = bias is None and scale * config.LOG2E >= torch.finfo(torch.float32).tiny
    scalars = (scale, scale * config.LOG2E if fold else config.LOG2E, limit, *dropout_factors(dropout_p))
    constants = dict(
        FOLD=fold,
        HAS_DROPOUT=limit >= 0,
        HEAD_DIM=D,
        HEAD_DIM_V=Dv,
        BLOCK_D=block_dim(D),
        BLOCK_DV=block_dim(Dv),
        PRECISION=dot_precision(query.dtype),
    )

    def launch_short(chosen: config.Config) -> None:
        # One program a head keeps its keys; few heads are split, so that the device is full.
        num_m = triton.cdiv(L, chosen.block_m)
        tiles_per_program = max(1, min(num_m, B * Hq * num_m // config.programs_wanted(query)))
        num_parts = triton.cdiv(num_m, tiles_per_program)
        rows_per_program = tiles_per_program * chosen.block_m
        attention_forward_short_kernel[(B * Hq * num_parts,)](
            *(*tensors, TileOperands(), *strides, *sizes, num_parts, rows_per_program, *scalars),
            **constants,
            **chosen.constants(),
        )

    def launch(chosen: config.Config) -> None:
        tiles = TileOperands()
        if mask is not None and is_listed(mask):
            tiles = live_tiles(mask, operands, L, S, chosen.block_m, chosen.block_n).rows
        num_m = triton.cdiv(L, chosen.block_m)
        attention_forward_kernel[(B * Hq * num_m,)](
            *tensors, tiles, *strides, *sizes, num_m, *scalars, **constants, **chosen.constants()
        )

    def launch_split(chosen: config.Config, tiles_per_part: int) -> None:
        group = Hq // key.shape[1]
        num_m = triton.cdiv(group * L, chosen.block_m)
        num_parts = triton.cdiv(triton.cdiv(S, chosen.block_n), tiles_per_part)
        part_out = query.new_empty((num_parts, lse.numel(), block_dim(Dv)), dtype=torch.float32)
        part_max, part_sum = query.new_empty((2, num_parts, lse.numel()), dtype=torch.float32)
        attention_forward_split_kernel[(B * key.shape[1] * num_m, num_parts)](
            *(query, key, value, bias, part_out, part_max, part_sum, tensors[-2], operands, TileOperands()),
            *(*strides[:-1], *sizes, num_m, lse.numel(), tiles_per_part, *scalars[:-1]),
            **constants,
            **chosen.constants(),
        )
        attention_forward_merge_kernel[(lse.numel(),)](
            *(part_out, part_max, part_sum, out, lse, strides[-1], Hq, L, lse.numel(), num_parts),
            *(scale, scalars[1], scalars[-1], fold, Dv, block_dim(Dv), triton.next_power_of_2(num_parts)),
            num_warps=1,
            enable_fp_fusion=False,
        )

    with on_device(query):
        split = config.forward_split(query, key, max(D, Dv))
        short = config.forward_short(query, S, max(D, Dv))
        if split is not None:
            launch_split(*split)
        elif short is not None:
            launch_short(short)
        else:
            config.tuned("forward", query, max(D, Dv), mask, bias, launch)
    return out, lse
