"""Forward-mode and second derivatives of attention, in plain PyTorch, for every backend and device.

One block of the scores at a time: a few tens of MB whatever the lengths. A block holds whole rows of the scores as far
as the mask lets them reach, so that its softmax is exact and needs no lse. Half precision is computed in float32,
float64 in float64.

With z = the factor of dropout (keep / (1 - p), or 1), s = scale Q Kᵀ + bias, p = softmax(s), out = (z p) V and a
tangent x' of each input x:

    s' = scale (Q' Kᵀ + Q K'ᵀ) + bias'     lse' = rowsum(p s')     p' = p (s' - lse')     out' = (z p') V + (z p) V'

The gradient for G = d/d out and g = d/d lse has dP = z (G Vᵀ), delta = rowsum(p dP) and dS = p (dP - delta + g)
(FlashAttention-2, Dao 2023, section 3.1); its tangent follows by the product rule. The Hessian is symmetric: the
gradient's own vector-Jacobian product is the same tangent, along the vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.backends import reference
from fastattn.masks import KernelMask
from fastattn.tiles import WORD

_BLOCK_ELEMENTS = 2**19  # of the scores; about ten such tensors live at a time
_LEAST_ROWS = 16


class Inputs(NamedTuple):
    """query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv), bias 4-D broadcastable; or their tangents.

    A tangent that is None is zero. The weights of attention have no value.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class _Problem:
    """What a walk over the blocks needs besides the tensors."""

    batch: int
    heads: int
    heads_kv: int
    len_q: int
    len_k: int
    dtype: torch.dtype  # of the arithmetic
    device: torch.device
    scale: float
    mask: KernelMask | None
    dropout_p: float
    dropout_seed: Tensor | None

    @staticmethod
    def of(
        query: Tensor, key: Tensor, mask: KernelMask | None, scale: float, dropout_p: float, seed: Tensor | None
    ) -> _Problem:
        batch, heads, len_q, _ = query.shape
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        sizes = batch, heads, key.shape[1], len_q, key.shape[2]
        return _Problem(*sizes, dtype, query.device, scale, mask, dropout_p, seed)

    @property
    def group(self) -> int:
        return self.heads // self.heads_kv if self.heads_kv else 1

    def blocks(self) -> Iterator[_Block]:
        """The blocks of the scores, together all that the mask may allow."""
        if not (self.batch and self.heads and self.len_q and self.len_k):
            return
        per_head = self.group * self.len_k
        rows = min(self.len_q, max(_LEAST_ROWS, _BLOCK_ELEMENTS // per_head))
        heads = min(self.heads_kv, max(1, _BLOCK_ELEMENTS // (rows * per_head)))
        batch = min(self.batch, max(1, _BLOCK_ELEMENTS // (heads * rows * per_head))) if heads == self.heads_kv else 1
        for b in range(0, self.batch, batch):
            for h in range(0, self.heads_kv, heads):
                part = slice(b, min(b + batch, self.batch)), slice(h, min(h + heads, self.heads_kv))
                mask = self._sliced_mask(*part)
                longest = self.len_k
                if mask is not None and mask.key_lengths is not None and self.device.type == "cpu":
                    # Elsewhere reading it would wait for the device.
                    longest = min(longest, int(mask.key_lengths.max()))
                for i in range(0, self.len_q, rows):
                    last = min(i + rows, self.len_q)
                    keys = self._reach(i, last, longest)
                    if keys[0] < keys[1]:
                        yield _Block(self, *part, (i, last), keys, mask)

    def _reach(self, first: int, last: int, longest: int) -> tuple[int, int]:
        """Which keys the rows [first, last) may attend to, as far as lengths and band tell."""
        start, stop = 0, longest
        if self.mask is not None and self.mask.band is not None:
            left_top, right_top, left_bottom, right_bottom = self.mask.band
            shift = self.len_k - self.len_q
            start = max(start, first + max(-left_top, shift - left_bottom))
            stop = min(stop, last + min(right_top, shift + right_bottom))
        return start // WORD * WORD, stop

    def _sliced_mask(self, batch: slice, heads: slice) -> KernelMask | None:
        """The mask of a part of the batch and of the key heads."""
        mask = self.mask
        if mask is None:
            return None

        def cut(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[batch]

        tile_map = mask.tile_map
        if tile_map is not None and tile_map.bits is not None:
            bits = tile_map.bits if tile_map.bits.shape[0] == 1 else tile_map.bits[batch]
            if bits.shape[1] != 1:
                bits = bits[:, self.query_heads(heads)]
            tile_map = replace(tile_map, bits=bits)
        lengths = cut(mask.prefix_lengths), cut(mask.key_lengths)
        per_token = cut(mask.key_keep), cut(mask.query_segments), cut(mask.key_segments)
        return KernelMask(mask.band, *lengths, *per_token, tile_map)

    def query_heads(self, heads: slice) -> slice:
        return slice(heads.start * self.group, heads.stop * self.group)


class _Block:
    """A block of the scores, as (b, h, g * rows, keys): the query heads that share a key head are one matrix.

    Products with keys then need no repeated keys, and sums over the group come by themselves.
    """

    def __init__(
        self,
        problem: _Problem,
        batch: slice,
        heads: slice,
        rows: tuple[int, int],
        keys: tuple[int, int],
        mask: KernelMask | None,
    ) -> None:
        self.problem = problem
        self.batch, self.heads, self.rows, self.keys = batch, heads, slice(*rows), slice(*keys)
        self.heads_q = problem.query_heads(heads)
        self.shape = batch.stop - batch.start, heads.stop - heads.start, problem.group, rows[1] - rows[0]
        self.keep: Tensor | None = None
        self.live_query: Tensor | None = None
        self.live_key: Tensor | None = None
        if mask is not None:
            keep = reference.expand_range(mask, problem.len_q, problem.len_k, rows, keys, problem.device)
            self.keep = self._fold_scores(keep)
            # NaN and Inf where nobody may attend must not reach a product, where 0 * NaN = NaN: such rows are replaced.
            self.live_query = self.keep.any(-1, keepdim=True)
            self.live_key = self.keep.any(-2).unsqueeze(-1)
        self.dropout_keep: Tensor | None = None
        if problem.dropout_p > 0 and problem.dropout_seed is not None:
            first = batch.start, self.heads_q.start, rows[0], keys[0]
            sizes = self.shape[0], self.shape[1] * self.shape[2], self.shape[3], keys[1] - keys[0]
            kept = reference.philox_keep(problem.dropout_seed, problem.dropout_p, *sizes, first)
            self.dropout_keep = self._fold_scores(kept)

    def _fold_scores(self, x: Tensor) -> Tensor:
        """(b|1, Hq|1, rows|1, keys|1) as (b, h, g * rows, keys)."""
        b, h, g, rows = self.shape
        x = x.expand(b, h * g, rows, self.keys.stop - self.keys.start)
        return x.reshape(b, h, g * rows, -1)

    def of_queries(self, x: Tensor) -> Tensor:
        """(B, Hq, L, n), or (B, Hq, L), cut to the block as (b, h, g * rows, n), 0 in rows that attend to nothing."""
        x = x[self.batch, self.heads_q, self.rows]
        if x.dim() == 3:
            x = x.unsqueeze(-1)
        b, h, g, rows = self.shape
        return _selected(x.to(self.problem.dtype).reshape(b, h, g * rows, x.shape[-1]), self.live_query)

    def of_keys(self, x: Tensor) -> Tensor:
        """(B, Hkv, S, n) cut to the block, 0 in keys that no row of it may attend to."""
        return _selected(x[self.batch, self.heads, self.keys].to(self.problem.dtype), self.live_key)

    def of_scores(self, x: Tensor) -> Tensor:
        """Anything that broadcasts to (B, Hq, L, S) cut to the block."""
        return self._fold_scores(self.cut(x))

    def cut(self, x: Tensor) -> Tensor:
        """The view of x, which broadcasts to (B, Hq, L, S), that the block covers."""
        whole = self.batch, self.heads_q, self.rows, self.keys
        return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, whole, strict=True))]

    def unfold(self, x: Tensor) -> Tensor:
        """(b, h, g * rows, n) as (b, Hq, rows, n)."""
        b, h, g, rows = self.shape
        return x.reshape(b, h * g, rows, x.shape[-1])

    def zeros(self) -> Tensor:
        """Scores of 0."""
        b, h, g, rows = self.shape
        sizes = b, h, g * rows, self.keys.stop - self.keys.start
        return torch.zeros(sizes, dtype=self.problem.dtype, device=self.problem.device)

    def scores(self, x: Inputs) -> Tensor:
        """scale Q Kᵀ + bias, -inf where the mask forbids."""
        assert x.query is not None and x.key is not None
        s = self.of_queries(x.query) @ self.of_keys(x.key).transpose(-1, -2) * self.problem.scale
        if x.bias is not None:
            s = s + self.of_scores(x.bias).to(s.dtype)
        return _selected(s, self.keep, -torch.inf)

    def tangent_scores(self, x: Inputs, t: Inputs) -> Tensor:
        """scale (Q' Kᵀ + Q K'ᵀ) + bias', 0 where the mask forbids."""
        assert x.query is not None and x.key is not None
        ts = self.zeros()
        if t.query is not None:
            ts = self.of_queries(t.query) @ self.of_keys(x.key).transpose(-1, -2) * self.problem.scale
        if t.key is not None:
            ts = ts + self.of_queries(x.query) @ self.of_keys(t.key).transpose(-1, -2) * self.problem.scale
        if t.bias is not None:
            ts = ts + self.of_scores(t.bias).to(ts.dtype)
        return _selected(ts, self.keep)

    def mixed_scores(self, t: Inputs, u: Inputs) -> Tensor:
        """The second derivative of the scores along two tangents, scale (Q' K*ᵀ + Q* K'ᵀ), 0 where forbidden."""
        ts = self.zeros()
        for a, b in ((t.query, u.key), (u.query, t.key)):
            if a is not None and b is not None:
                ts = ts + self.of_queries(a) @ self.of_keys(b).transpose(-1, -2) * self.problem.scale
        return _selected(ts, self.keep)

    def probabilities(self, s: Tensor) -> Tensor:
        """softmax(s), before dropout; 0 on a row without keys."""
        largest = s.amax(-1, keepdim=True)
        p = torch.exp(s - largest.where(largest != -torch.inf, 0))
        total = p.sum(-1, keepdim=True)
        return p / total.where(total != 0, 1)

    def against_values(self, grad_out: Tensor, value: Tensor) -> Tensor:
        """z (G Vᵀ), 0 where the mask forbids."""
        return _selected(self.drop(self.of_queries(grad_out) @ self.of_keys(value).transpose(-1, -2)), self.keep)

    def drop(self, x: Tensor) -> Tensor:
        """z x; linear, hence also its own derivative."""
        if self.dropout_keep is None:
            return x
        return (x * (1 / (1 - self.problem.dropout_p))).where(self.dropout_keep, 0)


def _selected(x: Tensor, keep: Tensor | None, value: float = 0) -> Tensor:
    """x where `keep` holds, everywhere when it is None; a select, since 0 * NaN is NaN."""
    return x if keep is None else x.where(keep, value)


def _zeros_like_query(query: Tensor, dim_v: int) -> Tensor:
    batch, heads, len_q, _ = query.shape
    return query.new_zeros(batch, len_q, heads, dim_v).transpose(1, 2)


class _Gradients:
    """Sums of the blocks' gradients, in the dtype of the arithmetic."""

    def __init__(self, problem: _Problem, x: Inputs, need_bias: bool) -> None:
        self.problem, self.x = problem, x
        self.query, self.key, self.value, self.bias = (
            None if tensor is None else torch.zeros_like(tensor, dtype=problem.dtype)
            for tensor in (*x[:3], x.bias if need_bias else None)
        )
        if self.bias is not None:
            self.bias = self.bias.contiguous()

    def add_queries(self, block: _Block, x: Tensor) -> None:
        assert self.query is not None
        self.query[block.batch, block.heads_q, block.rows] += block.unfold(x) * self.problem.scale

    def add_keys(self, block: _Block, x: Tensor) -> None:
        assert self.key is not None
        self.key[block.batch, block.heads, block.keys] += x * self.problem.scale

    def add_values(self, block: _Block, x: Tensor) -> None:
        assert self.value is not None
        self.value[block.batch, block.heads, block.keys] += x

    def add_bias(self, block: _Block, ds: Tensor) -> None:
        if self.bias is None:
            return
        repeated = [dim for dim, size in enumerate(self.bias.shape) if size == 1]
        ds = block.unfold(ds)
        target = block.cut(self.bias)
        target += ds.sum(repeated, keepdim=True) if repeated else ds

    def add_scores(self, block: _Block, ds: Tensor, x: Inputs) -> None:
        """What dS gives to the inputs of S: dS K, dSᵀ Q and, reduced, dS itself."""
        assert x.query is not None and x.key is not None
        self.add_queries(block, ds @ block.of_keys(x.key))
        self.add_keys(block, ds.transpose(-1, -2) @ block.of_queries(x.query))
        self.add_bias(block, ds)

    def add_tangent_scores(self, block: _Block, ds: Tensor, t: Inputs) -> None:
        """What dS gives to the tangent of dQ = dS K and dK = dSᵀ Q through the tangents of K and Q."""
        if t.key is not None:
            self.add_queries(block, ds @ block.of_keys(t.key))
        if t.query is not None:
            self.add_keys(block, ds.transpose(-1, -2) @ block.of_queries(t.query))

    def results(self) -> list[Tensor | None]:
        """In the dtype and the layout of the inputs; bias contiguous."""
        return [
            None if sums is None or tensor is None else sums.to(tensor.dtype)
            for sums, tensor in zip((self.query, self.key, self.value, self.bias), self.x, strict=True)
        ]


def attention_jvp(
    x: Inputs, t: Inputs, mask: KernelMask | None, scale: float, dropout_p: float, dropout_seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tangents of out (B, Hq, L, Dv) over memory (B, L, Hq, Dv), and of lse (B, Hq, L); 0 on rows without keys."""
    assert x.query is not None and x.key is not None and x.value is not None
    problem = _Problem.of(x.query, x.key, mask, scale, dropout_p, dropout_seed)
    tangent_out = _zeros_like_query(x.query, x.value.shape[3])
    tangent_lse = x.query.new_zeros(x.query.shape[:3], dtype=problem.dtype)
    for block in problem.blocks():
        p = block.probabilities(block.scores(x))
        ts = block.tangent_scores(x, t)
        lse = (p * ts).sum(-1, keepdim=True)
        out = block.drop(p * (ts - lse)) @ block.of_keys(x.value)
        if t.value is not None:
            out = out + block.drop(p) @ block.of_keys(t.value)
        _put(block, tangent_out, out)
        _put(block, tangent_lse, lse)
    return tangent_out, tangent_lse


def _put(block: _Block, whole: Tensor, part: Tensor) -> None:
    part = block.unfold(part)
    whole[block.batch, block.heads_q, block.rows] = (part if whole.dim() == 4 else part.squeeze(-1)).to(whole.dtype)


def attention_jvp_jvp(
    x: Inputs,
    t: Inputs,
    u: Inputs,
    mask: KernelMask | None,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The second derivatives of out and lse along two tangents."""
    assert x.query is not None and x.key is not None and x.value is not None
    problem = _Problem.of(x.query, x.key, mask, scale, dropout_p, dropout_seed)
    second_out = _zeros_like_query(x.query, x.value.shape[3])
    second_lse = x.query.new_zeros(x.query.shape[:3], dtype=problem.dtype)
    for block in problem.blocks():
        p = block.probabilities(block.scores(x))
        deviations = []
        for tangent in (t, u):
            ts = block.tangent_scores(x, tangent)
            deviations.append(ts - (p * ts).sum(-1, keepdim=True))
        # p'* = p (w' w* + s'* - lse'*), with w' = s' - lse', and lse'* makes its rows sum to 0.
        both = deviations[0] * deviations[1] + block.mixed_scores(t, u)
        lse = (p * both).sum(-1, keepdim=True)
        out = block.drop(p * (both - lse)) @ block.of_keys(x.value)
        for deviation, tangent in ((deviations[0], u), (deviations[1], t)):
            if tangent.value is not None:
                out = out + block.drop(p * deviation) @ block.of_keys(tangent.value)
        _put(block, second_out, out)
        _put(block, second_lse, lse)
    return second_out, second_lse


def attention_backward_jvp(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tangent_grad_out: Tensor | None,
    tangent_grad_lse: Tensor | None,
    x: Inputs,
    t: Inputs,
    mask: KernelMask | None,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_grad_bias: bool,
) -> list[Tensor | None]:
    """The tangents of the gradients of query, key, value and, if needed, bias.

    grad_out, grad_lse: what the gradients are of; their tangents and those of the inputs may each be None, for zero.
    """
    assert x.query is not None and x.key is not None and x.value is not None
    problem = _Problem.of(x.query, x.key, mask, scale, dropout_p, dropout_seed)
    sums = _Gradients(problem, x, need_grad_bias)
    for block in problem.blocks():
        p = block.probabilities(block.scores(x))
        ts = block.tangent_scores(x, t)
        tp = p * (ts - (p * ts).sum(-1, keepdim=True))
        dp = tangent_dp = torch.zeros_like(p)
        if grad_out is not None:
            dp = block.against_values(grad_out, x.value)
            if t.value is not None:
                tangent_dp = block.against_values(grad_out, t.value)
            sums.add_values(block, block.drop(tp).transpose(-1, -2) @ block.of_queries(grad_out))
        if tangent_grad_out is not None:
            tangent_dp = tangent_dp + block.against_values(tangent_grad_out, x.value)
            sums.add_values(block, block.drop(p).transpose(-1, -2) @ block.of_queries(tangent_grad_out))
        inner = dp - (p * dp).sum(-1, keepdim=True)
        tangent_inner = tangent_dp - (tp * dp + p * tangent_dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            inner = inner + block.of_queries(grad_lse)
        if tangent_grad_lse is not None:
            tangent_inner = tangent_inner + block.of_queries(tangent_grad_lse)
        sums.add_scores(block, tp * inner + p * tangent_inner, x)
        sums.add_tangent_scores(block, p * inner, t)
    return sums.results()


# The weights ---------------------------------------------------------------------------------------------------------
# w = z exp(s - lse), of every head or averaged over them; lse is an input of its own.


def _weights(block: _Block, x: Inputs, lse: Tensor) -> Tensor:
    """exp(s - lse), before dropout; 0 on a row without keys, where lse is -inf."""
    shift = block.of_queries(lse)
    return torch.exp(block.scores(x) - shift.where(shift != -torch.inf, 0))


def _deviation(block: _Block, x: Inputs, t: Inputs, tangent_lse: Tensor | None) -> Tensor:
    """s' - lse', 0 where the mask forbids."""
    ts = block.tangent_scores(x, t)
    return ts if tangent_lse is None else _selected(ts - block.of_queries(tangent_lse), block.keep)


def _empty_weights(x: Inputs, average_heads: bool) -> Tensor:
    assert x.query is not None and x.key is not None
    batch, heads, len_q, _ = x.query.shape
    shape = (batch, len_q, x.key.shape[2]) if average_heads else (batch, heads, len_q, x.key.shape[2])
    # The mean over the heads is summed in the dtype of the arithmetic, block by block.
    half = x.query.dtype not in (torch.float32, torch.float64)
    return x.query.new_zeros(shape, dtype=torch.float32 if average_heads and half else x.query.dtype)


def _put_weights(block: _Block, whole: Tensor, part: Tensor) -> None:
    part = block.unfold(part)
    if whole.dim() == 4:
        whole[block.batch, block.heads_q, block.rows, block.keys] = part.to(whole.dtype)
    else:
        whole[block.batch, block.rows, block.keys] += part.sum(1) / block.problem.heads


def _of_weights(block: _Block, x: Tensor) -> Tensor:
    """(B, Hq, L, S), or (B, L, S) for the mean over the heads, as a gradient of every head's weights."""
    return block.of_scores(x) if x.dim() == 4 else block.of_scores(x.unsqueeze(1)) / block.problem.heads


def attention_weights_jvp(
    x: Inputs,
    lse: Tensor,
    t: Inputs,
    tangent_lse: Tensor | None,
    mask: KernelMask | None,
    scale: float,
    average_heads: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """The tangent of the weights, (B, L, S) averaged or (B, Hq, L, S): w (s' - lse')."""
    assert x.query is not None and x.key is not None
    problem = _Problem.of(x.query, x.key, mask, scale, dropout_p, dropout_seed)
    tangent = _empty_weights(x, average_heads)
    for block in problem.blocks():
        _put_weights(block, tangent, block.drop(_weights(block, x, lse) * _deviation(block, x, t, tangent_lse)))
    return tangent.to(x.query.dtype)


def attention_weights_jvp_jvp(
    x: Inputs,
    lse: Tensor,
    t: Inputs,
    tangent_lse: Tensor | None,
    u: Inputs,
    other_lse: Tensor | None,
    mask: KernelMask | None,
    scale: float,
    average_heads: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """The second derivative of the weights along two tangents: w ((s' - lse') (s* - lse*) + s'*)."""
    assert x.query is not None and x.key is not None
    problem = _Problem.of(x.query, x.key, mask, scale, dropout_p, dropout_seed)
    second = _empty_weights(x, average_heads)
    for block in problem.blocks():
        both = _deviation(block, x, t, tangent_lse) * _deviation(block, x, u, other_lse) + block.mixed_scores(t, u)
        _put_weights(block, second, block.drop(_weights(block, x, lse) * both))
    return second.to(x.query.dtype)


def attention_weights_backward_jvp(
    grad_weights: Tensor | None,
    tangent_grad_weights: Tensor | None,
    x: Inputs,
    lse: Tensor,
    t: Inputs,
    tangent_lse: Tensor | None,
    mask: KernelMask | None,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The tangents of the gradients of query, key, bias (or None) and lse."""
    assert x.query is not None and x.key is not None
    problem = _Problem.of(x.query, x.key, mask, scale, dropout_p, dropout_seed)
    sums = _Gradients(problem, x, need_grad_bias)
    tangent_grad_lse = torch.zeros_like(lse, memory_format=torch.contiguous_format)
    for block in problem.blocks():
        w = _weights(block, x, lse)
        tangent_ds = torch.zeros_like(w)
        if grad_weights is not None:
            # dS = w z C, and w' = w (s' - lse')
            ds = _selected(w * block.drop(_of_weights(block, grad_weights).to(w.dtype)), block.keep)
            tangent_ds = ds * _deviation(block, x, t, tangent_lse)
            sums.add_tangent_scores(block, ds, t)
        if tangent_grad_weights is not None:
            dropped = block.drop(_of_weights(block, tangent_grad_weights).to(w.dtype))
            tangent_ds = tangent_ds + _selected(w * dropped, block.keep)
        sums.add_scores(block, tangent_ds, x)
        _put(block, tangent_grad_lse, -tangent_ds.sum(-1, keepdim=True))
    query, key, _, bias = sums.results()
    assert query is not None and key is not None
    return query, key, bias, tangent_grad_lse
