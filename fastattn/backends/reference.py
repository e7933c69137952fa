"""The specification in plain PyTorch: any device, any float dtype, any mask, every formula written out.

Half-precision inputs are computed in float32, float64 in float64. The L x S scores are stored; this is the only backend
that expands a mask. Gradients are explicit, as the kernels compute them (FlashAttention-2, Dao 2023, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import tiles
from fastattn.backends.reference_loss import linear_masked_loss, masked_loss, masked_loss_backward_none
from fastattn.masks import KernelMask

__all__ = [
    "additive_attention_backward",
    "additive_attention_forward",
    "additive_weights",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "attention_weights_backward",
    "expand",
    "expand_range",
    "linear_masked_loss",
    "mask_tiles",
    "masked_loss",
    "masked_loss_backward_none",
    "philox",
    "philox_keep",
]

mask_tiles = tiles.pack_dense

_LOW_32_BITS = 0xFFFFFFFF


def expand(mask: KernelMask | None, B: int, H: int, L: int, S: int, device: torch.device) -> Tensor:
    """Who may attend, bool (B, H, L, S)."""
    return expand_range(mask, L, S, (0, L), (0, S), device).expand(B, H, L, S)


def expand_range(
    mask: KernelMask | None, L: int, S: int, rows: tuple[int, int], keys: tuple[int, int], device: torch.device
) -> Tensor:
    """Who may attend among a range of the queries and a range of the keys, bool (B|1, H|1, rows|1, keys|1).

    The ranges are half open; the keys begin at a multiple of 64, a word of a tile map.
    """
    keep = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if mask is None:
        return keep
    i, j = torch.arange(*rows, device=device).unsqueeze(-1), torch.arange(*keys, device=device)
    if mask.band is not None:
        left_top, right_top, left_bottom, right_bottom = mask.band
        low, high = max(-left_top, S - L - left_bottom), min(right_top, S - L + right_bottom)
        keep = keep & (j - i >= low) & (j - i <= high)
    if mask.prefix_lengths is not None:
        keep = keep & ((j <= i) | (j < mask.prefix_lengths.view(-1, 1, 1, 1)))
    if mask.key_lengths is not None:
        keep = keep & (j < mask.key_lengths.view(-1, 1, 1, 1))
    if mask.key_keep is not None:
        keep = keep & mask.key_keep[:, None, None, slice(*keys)]
    if mask.query_segments is not None and mask.key_segments is not None:
        query_ids, key_ids = mask.query_segments[:, None, slice(*rows), None], mask.key_segments[:, None, None]
        keep = keep & (query_ids == key_ids[..., slice(*keys)])
    if mask.tile_map is not None and mask.tile_map.bits is not None:
        words = mask.tile_map.bits[:, :, slice(*rows), keys[0] // tiles.WORD : -(-keys[1] // tiles.WORD)]
        keep = keep & tiles.unpack_bits(words, keys[1] - keys[0])
    return keep


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words of 32 bits, each held in an int64, for every counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32 x 32-bit product may wrap to a negative int64; its 64 bits are right, and the masks drop the copied sign.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _LOW_32_BITS) ^ c1 ^ k0, b & _LOW_32_BITS
        c2, c3 = ((a >> 32) & _LOW_32_BITS) ^ c3 ^ k1, a & _LOW_32_BITS
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32_BITS, (k1 + 0xBB67AE85) & _LOW_32_BITS
    return c0, c1, c2, c3


def philox_keep(
    seed: Tensor, p: float, B: int, H: int, L: int, S: int, first: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Tensor:
    """Which elements dropout keeps, bool (B, H, L, S); `first` holds their first b, h, i and j, a multiple of 4.

    Counter (j >> 2, i, h, b), key = the low and high half of `seed`; element j takes word j & 3 and drops below
    floor(p * 2**32).
    """
    words = (S + 3) // 4
    b, h, i, j = first
    i0, i1, i2, i3 = (
        torch.arange(start, start + size, dtype=torch.int64, device=seed.device).view(shape)
        for start, size, shape in (
            (j // 4, words, (1, 1, 1, -1)),
            (i, L, (1, 1, -1, 1)),
            (h, H, (1, -1, 1, 1)),
            (b, B, (-1, 1, 1, 1)),
        )
    )
    counter = torch.broadcast_tensors(i0, i1, i2, i3)
    drawn = philox(counter, (seed & _LOW_32_BITS, (seed >> 32) & _LOW_32_BITS))
    return torch.stack(drawn, dim=-1).flatten(-2)[..., :S] >= int(p * 2**32)


class _Problem:
    """The scores of one attention problem, with what no query may attend to taken out."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: KernelMask | None,
        scale: float,
        dropout_p: float,
        dropout_seed: Tensor | None,
    ) -> None:
        B, Hq, L, _ = query.shape
        self.heads_kv = key.shape[1]
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.scale = scale
        self.group = Hq // self.heads_kv if self.heads_kv else 1
        self.keep = expand(mask, B, Hq, L, key.shape[2], query.device)  # (B, Hq, L, S)
        # NaN and Inf where nobody may attend must not reach a product, where 0 * NaN = NaN: rows are replaced, not
        # multiplied by 0.
        self.live_query = self.keep.any(-1).unsqueeze(-1)  # (B, Hq, L, 1)
        self.live_key = self.keep.any(-2).unsqueeze(-1)  # (B, Hq, S, 1)
        self.query = query.to(self.dtype).where(self.live_query, 0)
        self.key = self.per_query_head(key)
        scores = (self.query @ self.key.transpose(-1, -2)) * scale
        if bias is not None:
            scores = scores + bias.to(self.dtype)
        self.scores = scores.where(self.keep, -torch.inf)  # (B, Hq, L, S)
        self.dropout_scale = 1 / (1 - dropout_p)
        self.dropout_keep = None
        if dropout_p > 0 and dropout_seed is not None:
            self.dropout_keep = philox_keep(dropout_seed, dropout_p, *self.keep.shape)

    def per_query_head(self, x: Tensor) -> Tensor:
        """Keys or values (B, Hkv, S, D) as (B, Hq, S, D), with the rows that nobody may attend to set to 0."""
        return x.to(self.dtype).repeat_interleave(self.group, dim=1).where(self.live_key, 0)

    def per_kv_head(self, x: Tensor) -> Tensor:
        """Sums the query heads that share a key head: (B, Hq, S, D) -> (B, Hkv, S, D)."""
        return x.unflatten(1, (self.heads_kv, self.group)).sum(2)

    def probabilities(self, lse: Tensor) -> Tensor:
        """softmax(scores), before dropout; 0 on a row without keys, where lse is -inf and s - lse would be NaN."""
        lse = lse.to(self.dtype).unsqueeze(-1)
        return torch.exp(self.scores - lse.where(lse != -torch.inf, 0))

    def dropout(self, x: Tensor) -> Tensor:
        """Drops and rescales; linear, hence also its own gradient."""
        return x if self.dropout_keep is None else (x * self.dropout_scale).where(self.dropout_keep, 0)

    def input_gradients(self, grad_scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of query (B, Hq, L, D), key (B, Hkv, S, D) and, unless None, bias (its own shape and dtype)."""
        grad_query = (grad_scores @ self.key) * self.scale
        grad_key = self.per_kv_head(grad_scores.transpose(-1, -2) @ self.query) * self.scale
        grad_bias = None if bias is None else grad_scores.sum_to_size(bias.shape).to(bias.dtype).contiguous()
        return grad_query, grad_key, grad_bias


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
    """out (B, Hq, L, Dv) over memory (B, L, Hq, Dv), and lse (B, Hq, L) of the undropped scores."""
    problem = _Problem(query, key, bias, mask, scale, dropout_p, dropout_seed)
    lse = torch.logsumexp(problem.scores, dim=-1)
    # Not from lse: beside a score of 1e9 the rounding of lse would leave the sum of a row far from 1.
    p = torch.softmax(problem.scores, dim=-1).where((lse != -torch.inf).unsqueeze(-1), 0)
    p = problem.dropout(p)
    B, Hq, L, _ = query.shape
    out = query.new_empty(B, L, Hq, value.shape[-1]).transpose(1, 2)
    out.copy_(p @ problem.per_query_head(value))
    return out, lse


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
    problem = _Problem(query, key, bias, mask, scale, dropout_p, dropout_seed)
    p = problem.probabilities(lse)  # (B, Hq, L, S)
    do = grad_out.to(problem.dtype).where(problem.live_query, 0)  # (B, Hq, L, Dv)
    grad_value.copy_(problem.per_kv_head(problem.dropout(p).transpose(-1, -2) @ do))
    dp = problem.dropout(do @ problem.per_query_head(value).transpose(-1, -2)).where(problem.keep, 0)
    # rowsum(p * dp) is rowsum(do * out), the kernels' delta, without the rounding of out to its own dtype.
    ds = dp - (p * dp).sum(-1, keepdim=True)
    if grad_lse is not None:
        ds = ds + grad_lse.to(problem.dtype).unsqueeze(-1)  # d lse / d s = p
    # A select, because the gradient that reaches the -inf of an empty row's lse may itself be NaN.
    ds = (p * ds).where(problem.keep, 0)
    dq, dk, grad_bias = problem.input_gradients(ds, bias if need_grad_bias else None)
    grad_query.copy_(dq)
    grad_key.copy_(dk)
    return grad_bias


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
    problem = _Problem(query, key, bias, mask, scale, dropout_p, dropout_seed)
    p = problem.dropout(problem.probabilities(lse))
    # Not mean(1), which is NaN without heads.
    return (p.sum(1) / max(query.shape[1], 1) if average_heads else p).to(query.dtype).contiguous()


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
    problem = _Problem(query, key, bias, mask, scale, dropout_p, dropout_seed)
    dp = grad_weights.to(problem.dtype)
    if average_heads:
        dp = (dp / max(query.shape[1], 1)).unsqueeze(1).expand(problem.keep.shape)
    ds = (problem.probabilities(lse) * problem.dropout(dp)).where(problem.keep, 0)
    dq, dk, grad_bias = problem.input_gradients(ds, bias if need_grad_bias else None)
    grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
    grad_query.copy_(dq)
    grad_key.copy_(dk)
    return grad_query, grad_key, grad_bias, -ds.sum(-1).to(lse.dtype)


# Additive attention ---------------------------------------------------------------------------------------------------
# A few queries at a time: no tensor has more than _MAX_ELEMENTS elements, or those of a single query, for all pairs and
# features. Nothing is written in place, so that forward and gradient can themselves be differentiated.

_MAX_ELEMENTS = 2**21


class _AdditiveProblem:
    """The inputs in the dtype of the arithmetic, with what no query may attend to set to 0: 0 * NaN is NaN."""

    def __init__(self, query: Tensor, key: Tensor, score_weight: Tensor, mask: KernelMask | None) -> None:
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.len_q, self.len_k = query.shape[1], key.shape[1]
        self.mask = mask
        self.query, self.key = query.to(self.dtype), key.to(self.dtype)
        self.weight = score_weight.to(self.dtype)
        self.live_key: Tensor | None = None  # (B|1, S, 1)
        if mask is not None:
            for rows in self.blocks():
                keep = self.keep(rows).any(-2).unsqueeze(-1)
                self.live_key = keep if self.live_key is None else self.live_key | keep
            self.key = self.of_live_keys(self.key)

    def blocks(self) -> Iterator[slice]:
        """Ranges of the queries."""
        batch, len_k, features = self.key.shape
        step = max(1, _MAX_ELEMENTS // max(1, batch * len_k * features))
        yield from (slice(i, min(i + step, self.len_q)) for i in range(0, self.len_q, step))

    def keep(self, rows: slice) -> Tensor:
        """Who may attend among these queries, bool (B|1, rows, S)."""
        keep = expand_range(
            self.mask, self.len_q, self.len_k, (rows.start, rows.stop), (0, self.len_k), self.key.device
        )
        return keep[:, 0].expand(-1, rows.stop - rows.start, self.len_k)

    def of_live_keys(self, x: Tensor) -> Tensor:
        return x if self.live_key is None else x.where(self.live_key, 0)

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """tanh(q + k) (B, rows, S, A), the scores (B, rows, S), -inf where the mask forbids, and who may attend."""
        keep = self.keep(rows)
        query = self.query[:, rows].where(keep.any(-1, keepdim=True), 0)
        features = torch.tanh(query.unsqueeze(2) + self.key.unsqueeze(1))
        return features, (features @ self.weight).where(keep, -torch.inf), keep


def _probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax (B, rows, S) and the log of its denominator (B, rows); 0 and -inf on a row without keys, whose gradients
    are 0."""
    if scores.shape[-1] == 0:
        return scores, scores.sum(-1) - torch.inf
    largest = scores.detach().amax(-1, keepdim=True)
    empty = largest == -torch.inf
    shift = largest.masked_fill(empty, 0)
    p = torch.exp(scores - shift)
    total = p.sum(-1, keepdim=True).masked_fill(empty, 1)
    return p / total, (total.log() + shift).masked_fill(empty, -torch.inf).squeeze(-1)


def additive_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, mask: KernelMask | None
) -> tuple[Tensor, Tensor]:
    """out (B, L, Dv) in the dtype of query, and lse (B, L) in that of the arithmetic, both contiguous.

    query (B, L, A), key (B, S, A), value (B, S, Dv), score_weight (A,); the heads of the mask are 1.
    """
    problem = _AdditiveProblem(query, key, score_weight, mask)
    value = problem.of_live_keys(value.to(problem.dtype))
    out = [query.new_empty(query.shape[0], 0, value.shape[2], dtype=problem.dtype)]
    lse = [query.new_empty(query.shape[0], 0, dtype=problem.dtype)]
    for rows in problem.blocks():
        p, row_lse = _probabilities(problem.rows(rows)[1])
        out.append(p @ value)
        lse.append(row_lse)
    return torch.cat(out, 1).to(query.dtype), torch.cat(lse, 1)


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
    """Gradients of query, key, value and score_weight, contiguous, each in the dtype of its input."""
    problem = _AdditiveProblem(query, key, score_weight, mask)
    live_value = problem.of_live_keys(value.to(problem.dtype))
    grad_query = [torch.zeros_like(problem.query[:, :0])]
    grad_key = torch.zeros_like(problem.key)
    grad_value = torch.zeros_like(live_value)
    grad_weight = torch.zeros_like(problem.weight)
    for rows in problem.blocks():
        features, scores, keep = problem.rows(rows)
        p, _ = _probabilities(scores)
        live_row = keep.any(-1, keepdim=True)
        do = grad_out[:, rows].to(problem.dtype).where(live_row, 0)
        dp = do @ live_value.transpose(-1, -2)
        # From the scores, not from `out` and `lse`: the derivative of this function counts the whole dependence.
        inner = dp - (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            inner = inner + grad_lse[:, rows].to(problem.dtype).unsqueeze(-1).where(live_row, 0)
        ds = (p * inner).where(keep, 0)
        # d tanh(x) / dx = 1 - tanh(x)²
        through = ds.unsqueeze(-1) * (1 - features * features)  # (B, rows, S, A)
        grad_query.append(through.sum(2) * problem.weight)
        grad_key = grad_key + through.sum(1) * problem.weight
        grad_value = grad_value + p.transpose(-1, -2) @ do
        grad_weight = grad_weight + (ds.unsqueeze(-1) * features).sum((0, 1, 2))
    return (
        torch.cat(grad_query, 1).to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        grad_weight.to(score_weight.dtype),
    )


def additive_weights(query: Tensor, key: Tensor, lse: Tensor, score_weight: Tensor, mask: KernelMask | None) -> Tensor:
    """exp(score - lse), (B, L, S) in the dtype of query; 0 where the mask forbids."""
    problem = _AdditiveProblem(query, key, score_weight, mask)
    weights = [query.new_empty(query.shape[0], 0, key.shape[1])]
    for rows in problem.blocks():
        shift = lse[:, rows].to(problem.dtype).unsqueeze(-1)
        scores = problem.rows(rows)[1]
        weights.append(torch.exp(scores - shift.where(shift != -torch.inf, 0)).to(query.dtype))
    return torch.cat(weights, 1)
