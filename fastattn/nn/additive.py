"""Additive attention as a module, with its projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.additive import additive_attention, additive_attention_weights
from fastattn.masks import Mask


class AdditiveAttention(nn.Module):
    """Bahdanau attention: softmax over the keys of vᵀ tanh(W₁ h + W₂ s + b), times the values (Bahdanau, Cho and
    Bengio 2015, "Neural machine translation by jointly learning to align and translate", appendix A.1.2: s the states
    of the decoder, h the annotations, which are keys and values at once).

    Args:
        query_dim: size of a query s.
        key_dim: size of a key h.
        hidden_dim: A, the number of tanh units that compare them.
        bias: whether there is a b.
        backend: as in `fastattn.additive_attention`.

    Parameters: `query_projection` (W₂ and b) and `key_projection` (W₁), linear layers to A, and `score_weight` (A,), v.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("hidden_dim", hidden_dim)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.query_dim, self.key_dim, self.hidden_dim, self.backend = query_dim, key_dim, hidden_dim, backend
        self.query_projection = nn.Linear(query_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.key_projection = nn.Linear(key_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.score_weight = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` initialises: uniform in ±1 / sqrt(fan in)."""
        self.query_projection.reset_parameters()
        self.key_projection.reset_parameters()
        bound = self.hidden_dim**-0.5
        nn.init.uniform_(self.score_weight, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, L, query_dim), key (B, S, key_dim), value (B, S, Dv), the keys themselves when it is None.

        mask: a `Mask`, or a bool tensor broadcastable to (B, L, S); True = may attend.

        Returns out (B, L, Dv), and the attention weights (B, L, S) if `need_weights`, else None. A query that may
        attend to nothing gets 0. Without the weights nothing of size L x S is stored; they are computed beside the
        output and are differentiable (`fastattn.additive_attention_weights`).

        Raises ValueError or TypeError for arguments that do not fit.
        """
        _check_input("query", query, self.query_dim)
        _check_input("key", key, self.key_dim)
        if value is None:
            value = key
        q, k = self.query_projection(query), self.key_projection(key)
        out, lse = additive_attention(q, k, value, self.score_weight, mask=mask, return_lse=True, backend=self.backend)
        if not need_weights:
            return out, None
        return out, additive_attention_weights(q, k, lse, self.score_weight, mask=mask, backend=self.backend)

    def extra_repr(self) -> str:
        parts = f"{self.query_dim}, {self.key_dim}, {self.hidden_dim}"
        return parts if self.backend is None else f"{parts}, backend={self.backend!r}"


def _check_input(name: str, tensor: object, size: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 3 or tensor.shape[2] != size:
        letter = "L" if name == "query" else "S"
        raise ValueError(f"{name} must have shape (B, {letter}, {size}), got {tuple(tensor.shape)}")
