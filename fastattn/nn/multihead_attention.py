"""`torch.nn.MultiheadAttention` on fastattn's kernels, with the same constructor, state dict and meaning."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from fastattn.attention import _attention_packed, _attention_with_seed, _draw_seed, attention_weights, autocasts
from fastattn.masks import Mask


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for :class:`torch.nn.MultiheadAttention`: attention is tiled, masks are skipped instead of added.

    The arguments of the constructor and of :meth:`forward`, the shapes, the names and order of the parameters, their
    initialisation and the generator's state afterwards are torch's. In particular the masks keep torch's polarity:
    True in a bool mask means *ignore*. ``module.__class__ = fastattn.MultiheadAttention`` converts an existing module
    in place; :func:`fastattn.replace_multihead_attention` does it for a model.

    Self-attention (``query is key is value``) reads query, key and value straight out of the packed projection and
    returns one gradient for it, so none of them is ever copied. Nothing of size heads · L · S is allocated unless the
    weights of every head are asked for.

    Differences from torch, all deliberate: a query that may attend to nothing gets zero attention and zero weights
    instead of NaN; a causal hint on a module that appends keys (``add_bias_kv``, ``add_zero_attn``) follows
    ``attn_mask``; the output is contiguous; evaluation runs the same code as training; ``attn_mask`` may also be 4-D
    and broadcast to (N, num_heads, L, S). The README has them all in one table.

    Source: "Attention Is All You Need", https://arxiv.org/abs/1706.03762.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (L, N, E), with ``batch_first`` (N, L, E), unbatched (L, E).
            key: (S, N, kdim), with ``batch_first`` (N, S, kdim), unbatched (S, kdim).
            value: as `key`, with vdim features.
            key_padding_mask: (N, S), unbatched (S,). bool: True = ignore the key; float: added to its scores.
            need_weights: return the attention weights too.
            attn_mask: (L, S), (N · num_heads, L, S) or 4-D broadcastable to (N, num_heads, L, S). bool: True = ignore;
                float: added to the scores, and given its gradient.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: promise that `attn_mask` is the causal mask (j <= i). It is then not read, provided that there
                is no `key_padding_mask`, no appended key, and weights are not asked for.

        Returns:
            The output, of the shape of `query`, and the weights (after dropout, in training): (N, L, S), or
            (N, num_heads, L, S) without averaging, without N when unbatched; None if not asked for.

        Raises:
            AssertionError: ranks, embedding sizes, mask dtypes or the shape of `key_padding_mask` do not fit.
            RuntimeError: `attn_mask`'s shape, a dtype or the batch does not fit; `is_causal` without `attn_mask`.
        """
        if isinstance(query, torch.fx.Proxy):
            return self._record_call(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        if (self.bias_k is None) != (self.bias_v is None):
            raise AssertionError("bias_k and bias_v must both be set, or both be None")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is None; pass the causal attn_mask as well")

        sequence_first = batched and not self.batch_first
        is_self_attention, is_key_value_shared = query is key and key is value, key is value
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        batch, len_q = query.shape[int(sequence_first)], query.shape[int(not sequence_first)]
        len_k = key.shape[int(not sequence_first)]

        appended = int(self.bias_k is not None) + int(self.add_zero_attn)
        causal_hint = is_causal and key_padding_mask is None and not need_weights and not appended
        mask, bias = _combine_masks(
            None if causal_hint else attn_mask, key_padding_mask, batch, self.num_heads, len_q, len_k, appended
        )
        if causal_hint:
            mask = Mask.causal()

        dropout_p = float(self.dropout) if self.training else 0.0
        if dropout_p > 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1], got {dropout_p}")
        if dropout_p == 1.0:
            # Every weight dropped: the same zeros, with zero gradients, as a row that may attend to nothing.
            mask, dropout_p = Mask.key_lengths(torch.zeros(1, dtype=torch.int64, device=query.device)), 0.0
        dropout_p = max(dropout_p, 0.0)  # as torch, for which a negative probability drops nothing
        options: dict[str, Any] = {"mask": mask, "dropout_p": dropout_p, "scale": None, "backend": None}
        options["dropout_seed"] = _draw_seed(dropout_p, query.device)

        packed = is_self_attention and self._qkv_same_embed_dim and not appended
        if packed:
            projected = _linear("query", query, self.in_proj_weight, self.in_proj_bias)
            qkv = self._split_heads(projected, 3, sequence_first)  # (N, L, 3, H, D)
            options["bias"] = _checked_bias(bias, qkv)
            out, lse = _attention_packed(qkv, **options)
        else:
            q, k, v = self._project(query, key, value, is_self_attention, is_key_value_shared, sequence_first)
            if appended:
                k, v = self._append_keys(k, self.bias_k), self._append_keys(v, self.bias_v)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (N, H, L | S, D)
            options["bias"] = _checked_bias(bias, q)
            out, lse = _attention_with_seed(q, k, v, **options)

        # Memory order of `out` is (N, L, H, D): merging the heads is a view.
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if sequence_first:
            # After the projection rather than before it, so that the backward holds no second copy of its input.
            out = out.transpose(0, 1).contiguous()
        elif not batched:
            out = out.squeeze(0)
        if not need_weights:
            return out, None

        if packed:
            q, k = qkv.select(2, 0).transpose(1, 2), qkv.select(2, 1).transpose(1, 2)
        weights = attention_weights(q, k, lse, average_heads=average_attn_weights, **options)
        return out, weights if batched else weights.squeeze(0)

    def _split_heads(self, projected: Tensor, parts: int, sequence_first: bool) -> Tensor:
        """View (N, L, parts · E), or (L, N, parts · E), as (N, L, parts, H, D)."""
        heads = projected.unflatten(-1, (parts, self.num_heads, self.embed_dim // self.num_heads))
        return heads.transpose(0, 1) if sequence_first else heads

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, is_self: bool, is_shared: bool, sequence_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections as (N, L | S, H, D), with one matrix product for inputs that are the same tensor."""
        bias, size = self.in_proj_bias, self.embed_dim
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight
            if is_self:
                q, k, v = self._split_heads(_linear("query", query, weight, bias), 3, sequence_first).unbind(2)
                return q, k, v
            if is_shared:
                query_weight, key_value_weight = weight.split([size, 2 * size])
                query_bias, key_value_bias = (None, None) if bias is None else bias.split([size, 2 * size])
                q = self._split_heads(_linear("query", query, query_weight, query_bias), 1, sequence_first)
                projected = _linear("key", key, key_value_weight, key_value_bias)
                k, v = self._split_heads(projected, 2, sequence_first).unbind(2)
                return q.squeeze(2), k, v
            weights = weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = {"query": query, "key": key, "value": value}
        q, k, v = (
            self._split_heads(_linear(name, x, w, b), 1, sequence_first).squeeze(2)
            for (name, x), w, b in zip(inputs.items(), weights, biases, strict=True)
        )
        return q, k, v

    def _append_keys(self, x: Tensor, extra: Tensor | None) -> Tensor:
        """Append to `x` (N, S, H, D) the learned key or value, then the zero one, as far as the module has them."""
        batch, _, heads, dim = x.shape
        parts = [x]
        if extra is not None:
            # Under autocast x is of the lower precision and the parameter is not; cat would promote the whole of x.
            parts.append(extra.to(x.dtype).view(1, 1, heads, dim).expand(batch, 1, heads, dim))
        if self.add_zero_attn:
            parts.append(x.new_zeros(batch, 1, heads, dim))
        return torch.cat(parts, dim=1)

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Raise torch's exception types for inputs that do not fit; tell whether the call is batched."""
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
        if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=3,
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError(
                "MultiheadAttention does not support NestedTensor; pass padded tensors and a mask, and give "
                "nn.TransformerEncoder enable_nested_tensor=False"
            )

        rank = query.dim()
        if rank not in (2, 3):
            raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {rank}-D")
        batched = rank == 3
        if key.dim() != rank or value.dim() != rank:
            raise AssertionError(
                f"key and value must be {rank}-D as query is, but found {key.dim()}-D and {value.dim()}-D"
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"query: was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}"
            )
        if self._qkv_same_embed_dim:
            if key.shape != value.shape:
                raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
            if key.shape[-1] != self.embed_dim:
                raise RuntimeError(f"expecting key with {self.embed_dim} features, but got {key.shape[-1]}")
        else:
            if key.shape[:-1] != value.shape[:-1]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
                )
            for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
                if x.shape[-1] != size:
                    raise AssertionError(f"expecting {name} with {size} features, but got {x.shape[-1]}")

        batch_dim, length_dim = (0, 1) if self.batch_first else (1, 0)
        if batched and key.shape[batch_dim] != query.shape[batch_dim]:
            raise RuntimeError(
                f"key and value have batch size {key.shape[batch_dim]}, but query has {query.shape[batch_dim]}"
            )
        batch = query.shape[batch_dim] if batched else 1
        len_k = key.shape[length_dim] if batched else key.shape[0]
        if key_padding_mask is not None:
            expected = torch.Size((batch, len_k) if batched else (len_k,))
            if key_padding_mask.shape != expected:
                raise AssertionError(
                    f"Expected key_padding_mask of shape {tuple(expected)}, but got {tuple(key_padding_mask.shape)}"
                )
        if attn_mask is not None and attn_mask.dim() not in (2, 3, 4):
            raise AssertionError(f"Expected attn_mask to be 2-D, 3-D or 4-D, but found {attn_mask.dim()}-D")
        if not batched and attn_mask is not None and attn_mask.dim() == 3:
            expected = torch.Size((self.num_heads, query.shape[0], len_k))
            if attn_mask.shape != expected:
                raise AssertionError(f"Expected attn_mask of shape {tuple(expected)}, but got {tuple(attn_mask.shape)}")
        return batched

    def _record_call(self, query: Any, *args: Any) -> Any:
        """Record the call as one node of the fx graph, as torch's tracer does for its own modules."""
        if type(self).forward is not MultiheadAttention.forward:
            # The node would call that forward again, which has run up to here already.
            raise torch.fx.proxy.TraceError(
                f"{type(self).__qualname__} has a forward of its own, which fx cannot trace: "
                "make it a leaf by Tracer.is_leaf_module"
            )
        tracer = query.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (query, *args), {})

    def __prepare_scriptable__(self) -> torch.nn.MultiheadAttention:
        """What torch.jit.script compiles in place of this module: torch's forward over the same state."""
        if type(self) is not MultiheadAttention:
            return self  # what a subclass does, TorchScript takes or refuses
        scriptable = _Scriptable.__new__(_Scriptable)
        object.__setattr__(scriptable, "__dict__", self.__dict__)
        if keep_attention_called in self._forward_pre_hooks.values():
            self._forward_pre_hooks = _QuietHooks(self._forward_pre_hooks)  # type: ignore[assignment]
        return scriptable


class _Scriptable(MultiheadAttention):
    """TorchScript cannot compile our forward, so that it gets torch's.

    torch.jit.script leaves this object in the model that it was given, in our module's place. It turns into our module
    again at the first call there, so that the model computes what it did before.
    """

    forward = torch.nn.MultiheadAttention.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._forward_pre_hooks, _QuietHooks):
            self._forward_pre_hooks = self._forward_pre_hooks.hooks
        self.__class__ = MultiheadAttention  # type: ignore[assignment]
        return self(*args, **kwargs)


class _QuietHooks(dict):
    """The hooks of a module, all counted by len(), but in values() none that TorchScript would fail to compile."""

    def __init__(self, hooks: Any) -> None:
        super().__init__(hooks)
        self.hooks = hooks

    def values(self) -> Any:
        return [hook for hook in super().values() if hook is not keep_attention_called]


def keep_attention_called(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: where one is attached, torch's fused encoder layer steps aside."""


def _combine_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    len_q: int,
    len_k: int,
    appended: int,
) -> tuple[Mask | None, Tensor | None]:
    """Turn torch's masks (True = ignore, float = added) into a Mask (True = may attend) and a bias.

    The one place where the polarity changes. No mask covers the `appended` keys at the end.
    """
    mask: Mask | None = None
    biases: list[Tensor] = []
    if attn_mask is not None:
        attn_mask = _view_attn_mask(attn_mask, batch, heads, len_q, len_k, appended)
        if attn_mask.dtype == torch.bool:
            mask = Mask.dense(_append(attn_mask.logical_not(), appended, True))
        else:
            biases.append(_append(attn_mask, appended, 0.0))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(batch, len_k)
        if key_padding_mask.dtype == torch.bool:
            keep = key_padding_mask.logical_not()
        else:
            biases.append(_append(key_padding_mask, appended, 0.0)[:, None, None, :])
            # nn.TransformerEncoder turns a bool padding mask into -inf and 0 before it calls. Such keys can be skipped
            # as well as added to: the numbers are the same, and what stands in a padded key or value cannot leak.
            keep = key_padding_mask != float("-inf")
        padding = Mask.key_padding(_append(keep, appended, True))
        mask = padding if mask is None else mask & padding
    if not biases:
        return mask, None
    return mask, biases[0] if len(biases) == 1 else biases[0] + biases[1]


def _append(mask: Tensor, appended: int, value: float) -> Tensor:
    """`mask` with `appended` more keys of `value`; itself when there are none (F.pad would copy it)."""
    return F.pad(mask, (0, appended), value=value) if appended else mask


def _view_attn_mask(attn_mask: Tensor, batch: int, heads: int, len_q: int, len_k: int, appended: int) -> Tensor:
    """View `attn_mask` as 4-D, broadcastable to (N, H, L, S)."""
    if attn_mask.dim() == 2:
        if attn_mask.shape != (len_q, len_k):
            raise RuntimeError(
                f"The shape of the 2D attn_mask is {tuple(attn_mask.shape)}, but should be {(len_q, len_k)}."
            )
        return attn_mask[None, None]
    if attn_mask.dim() == 3:
        if attn_mask.shape != (batch * heads, len_q, len_k):
            raise RuntimeError(
                f"The shape of the 3D attn_mask is {tuple(attn_mask.shape)}, "
                f"but should be {(batch * heads, len_q, len_k)}."
            )
        return attn_mask.view(batch, heads, len_q, len_k)
    full = (batch, heads, len_q, len_k)
    if any(size not in (1, whole) for size, whole in zip(attn_mask.shape, full, strict=True)):
        raise RuntimeError(
            f"The shape of the 4D attn_mask is {tuple(attn_mask.shape)}, but should be broadcastable to {full}."
        )
    # A mask that broadcasts along the keys would also cover an appended key.
    return attn_mask.expand(-1, -1, -1, len_k) if appended else attn_mask


def _linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The projection of an input; a dtype that it refuses raises torch's exception type with the input's name."""
    if x.dtype != weight.dtype and not autocasts(x.device):
        raise RuntimeError(f"{name} must have the dtype of the module's weight, {weight.dtype}, got {x.dtype}")
    return F.linear(x, weight, bias)


def _checked_bias(bias: Tensor | None, projected: Tensor) -> Tensor | None:
    """Refuse float masks of a dtype that cannot be added to the scores, with torch's exception type."""
    if bias is None or bias.dtype in (projected.dtype, torch.float32):
        return bias
    half = (torch.bfloat16, torch.float16)
    if bias.dtype in half and autocasts(projected.device):
        return bias
    raise RuntimeError(
        f"Expected float masks (attn_mask, key_padding_mask) of the query's dtype {projected.dtype} or float32, "
        f"got {bias.dtype}"
    )
