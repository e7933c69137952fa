"""Exported programs for runtimes that do not have the operators of fastattn, such as ONNX.

`torch.export` keeps them as `torch.ops.fastattn.*`. With `decompositions` they become plain aten operations:

    from fastattn.integrations.export import decompositions

    program = torch.export.export(model.eval(), inputs, dynamic_shapes=...)
    program = program.run_decompositions(decompositions())

and with the packages onnx and onnxscript that program becomes one of ONNX's own operators:

    torch.onnx.export(program, dynamo=True).save("model.onnx")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import tiles
from fastattn.backends import reference, reference_loss
from fastattn.masks import UNLIMITED
from fastattn.ops import lse_dtype

_NUM_MASK = 13  # arguments of an operator that make up the mask
_AXES = ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))  # of b, h, i and j
_LOW_32_BITS = 0xFFFFFFFF


def decompositions() -> dict[Any, Callable]:
    """The table for `torch.export.ExportedProgram.run_decompositions`: operator → formula in aten operations.

    `torch.export.default_decompositions()`, and for the forward operators of fastattn the formulas of the "reference"
    backend, free of writes in place: every mask, bias and grouping of heads, dropout with the elements that the
    operator drops, lse; zeros, never NaN, for a query that may attend to nothing, also in the gradients of the program.
    Dynamic sizes stay dynamic. The scores (B, Hq, L, S) are stored; half precision is computed in float32.

    The operators of gradients have no entry: torch.export records forward programs.
    """
    table = torch.export.default_decompositions()
    for name, formula in _FORMULAS.items():
        table[getattr(torch.ops.fastattn, name).default] = formula
    return table


# The sizes of an exported program are symbols: nothing here compares them, which would bind the program to one outcome.


def _keep(mask: Sequence[Any], L: int, S: int, device: torch.device) -> Tensor | None:
    """Who may attend, bool (B|1, H|1, L|1, S|1); None is everybody."""
    band, prefix_lengths, key_lengths, key_keep, query_segments, key_segments, bits = mask[:7]
    i, j = torch.arange(L, device=device).unsqueeze(-1), torch.arange(S, device=device)
    terms: list[Tensor] = []
    for number, limit in enumerate(band or ()):
        if abs(limit) < UNLIMITED:
            difference = j - i if number < 2 else j - i - (S - L)
            terms.append(difference >= -limit if number % 2 == 0 else difference <= limit)
        elif limit < 0:
            terms.append((j < 0) & (i < 0))  # excludes everything
    if prefix_lengths is not None:
        terms.append((j <= i) | (j < prefix_lengths.view(-1, 1, 1, 1)))
    if key_lengths is not None:
        terms.append(j < key_lengths.view(-1, 1, 1, 1))
    if key_keep is not None:
        terms.append(key_keep[:, None, None])
    if query_segments is not None and key_segments is not None:
        terms.append(query_segments[:, None, :, None] == key_segments[:, None, None])
    if bits is not None:  # the mask itself where torch.export recorded it (`ops.dense_for_export`)
        terms.append(bits if bits.dtype == torch.bool else tiles.unpack_bits(bits, S))
    if not terms:
        return None
    keep = terms[0]
    for term in terms[1:]:
        keep = keep & term
    return keep[(None,) * (4 - keep.dim())]


def _per_query_head(x: Tensor, heads: int, live: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values (B, Hkv, S, D) as (B, Hq, S, D), 0 where nobody may attend: 0 * NaN would be NaN."""
    x = x.to(dtype)
    if x.shape[1] != heads:
        x = x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)
    return x if live is None else torch.where(live, x, 0.0)


def _scores(
    query: Tensor, key: Tensor, bias: Tensor | None, keep: Tensor | None, live_key: Tensor | None, scale: float
) -> Tensor:
    """(B, Hq, L, S), -inf where a query may not attend."""
    dtype = lse_dtype(query.dtype)
    query = query.to(dtype)
    if keep is not None:
        query = torch.where(keep.any(-1, keepdim=True), query, 0.0)
    scores = (query @ _per_query_head(key, query.shape[1], live_key, dtype).transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    return scores if keep is None else torch.where(keep, scores, -torch.inf)


def _live_key(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.any(-2).unsqueeze(-1)  # (B|1, H|1, S|1, 1)


def _dropout(p: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_p == 0 or seed is None:
        return p
    b, h, i, j = (torch.arange(size, device=p.device).view(s) for size, s in zip(p.shape, _AXES, strict=True))
    # Not reference.philox_keep: its S / 4 counters are a size that the program would be bound to. Here each element
    # draws all four words of its counter and takes its own.
    counter = torch.broadcast_tensors(j >> 2, i, h, b)
    drawn = reference.philox(counter, (seed & _LOW_32_BITS, (seed >> 32) & _LOW_32_BITS))
    word = drawn[3]
    for number in range(3):
        word = torch.where((j & 3) == number, drawn[number], word)
    return torch.where(word >= int(dropout_p * 2**32), p * (1 / (1 - dropout_p)), 0.0)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    scale, dropout_p, seed, _ = rest[_NUM_MASK:]
    keep = _keep(rest[:_NUM_MASK], query.shape[2], key.shape[2], query.device)
    live_key = _live_key(keep)
    scores = _scores(query, key, bias, keep, live_key, scale)
    if keep is None and bias is None:
        p, lse = torch.softmax(scores, dim=-1), torch.logsumexp(scores, dim=-1)
    else:
        # A bias of -inf, too, can leave a row without keys. Such a row is made one of zeros before the softmax: what
        # follows would undo a NaN in the output and not in its gradient.
        live = (scores != -torch.inf).any(-1, keepdim=True)
        scores = torch.where(live, scores, 0.0)
        p = torch.where(live, torch.softmax(scores, dim=-1), 0.0)
        lse = torch.where(live.squeeze(-1), torch.logsumexp(scores, dim=-1), -torch.inf)
    out = _dropout(p, dropout_p, seed) @ _per_query_head(value, query.shape[1], live_key, scores.dtype)
    # Laid out as the operator's output, (B, L, Hq, Dv), of which the program may go on to make views.
    return out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def _attention_packed(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    query, key, value = (qkv.select(2, part).transpose(1, 2) for part in range(3))
    return _attention(query, key, value, *rest)


def _attention_weights(query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    scale, average_heads, dropout_p, seed, _ = rest[_NUM_MASK:]
    keep = _keep(rest[:_NUM_MASK], query.shape[2], key.shape[2], query.device)
    scores = _scores(query, key, bias, keep, _live_key(keep), scale)
    p = torch.exp(scores - torch.where(lse != -torch.inf, lse.to(scores.dtype), 0.0).unsqueeze(-1))
    p = _dropout(p, dropout_p, seed)
    return (p.mean(1) if average_heads else p).to(query.dtype)


def _mask_tiles(masks: list[Tensor], len_q: int, len_k: int, block_m: int, block_n: int, _: str) -> tuple[Tensor, ...]:
    return tiles.pack_dense(masks, len_q, len_k, block_m, block_n)


def _masked_loss(input: Tensor, target: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *options, need_grad, _ = rest
    loss = reference_loss.differentiable_loss(input, target, mask, *options)
    if not need_grad or options[1] == "none":
        return loss, input.new_empty(0)
    return loss, reference_loss.differentiable_gradient(input, target, mask, *options)


def _linear_masked_loss(*arguments: Any) -> tuple[Tensor, ...]:
    loss, *gradients = reference_loss.linear_masked_loss(*arguments[:-1])
    return loss, *(arguments[0].new_empty(0) if gradient is None else gradient for gradient in gradients)


def _additive_attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    keep = _keep(rest[:_NUM_MASK], query.shape[1], key.shape[1], query.device)
    live_key = _live_key(keep)
    dtype = lse_dtype(query.dtype)
    q = query.to(dtype)
    if keep is not None:
        q = torch.where(keep[:, 0].any(-1, keepdim=True), q, 0.0)
    k, v = (_per_query_head(x.unsqueeze(1), 1, live_key, dtype).squeeze(1) for x in (key, value))
    scores = (torch.tanh(q.unsqueeze(2) + k.unsqueeze(1)) * score_weight.to(dtype)).sum(-1)  # (B, L, S)
    if keep is None:
        p, lse = torch.softmax(scores, dim=-1), torch.logsumexp(scores, dim=-1)
    else:
        scores = torch.where(keep[:, 0], scores, -torch.inf)
        live = (scores != -torch.inf).any(-1, keepdim=True)
        scores = torch.where(live, scores, 0.0)
        p = torch.where(live, torch.softmax(scores, dim=-1), 0.0)
        lse = torch.where(live.squeeze(-1), torch.logsumexp(scores, dim=-1), -torch.inf)
    return (p @ v).to(query.dtype), lse


_FORMULAS: dict[str, Callable] = {
    "attention": _attention,
    "attention_packed": _attention_packed,
    "attention_weights": _attention_weights,
    "mask_tiles": _mask_tiles,
    "masked_loss": _masked_loss,
    "linear_masked_loss": _linear_masked_loss,
    "additive_attention": _additive_attention,
}
