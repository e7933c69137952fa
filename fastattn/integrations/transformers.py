"""Hugging Face transformers: ``attn_implementation="fastattn"``, and the losses of its masked image models.

transformers asks an implementation for two functions: one makes the mask of a forward pass, once, and one computes the
attention of a layer from it. `register` adds both under one name. A mask travels between them as an `AttentionMask`, a
tensor of shape (B, 1, L, S) to the model and a `fastattn.Mask` of bands, lengths and segments to the kernel, or, where
there is nothing but padding, as an expanded (B, 1, 1, S); neither holds L x S elements.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.attention import _attention_with_seed, _draw_seed, _segment_ids, attention_weights
from fastattn.losses import masked_l1_loss, masked_mse_loss
from fastattn.masks import UNLIMITED, Band, KeyKeep, Mask, Segments, Term

NAME = "fastattn"

_MISSING: ImportError | None = None
try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers import __version__ as _VERSION
    from transformers.utils.import_utils import is_tracing
    from transformers.utils.output_capturing import _active_collector

    # Before these arguments, mask functions got the positions of the queries as a tensor.
    _PARAMETERS = set(inspect.signature(masking_utils.sdpa_mask).parameters)
    if not {"q_length", "q_offset", "allow_is_causal_skip"} <= _PARAMETERS:
        raise ImportError(f"transformers {_VERSION} makes its masks in another way")
except ImportError as error:
    _MISSING = error


def register() -> None:
    """Makes ``attn_implementation="fastattn"`` work in transformers, for models made before and after.

    Adds the attention function to `transformers.AttentionInterface` and the mask function to
    `transformers.AttentionMaskInterface`. Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or too old for a mask function of one's own.
    """
    if _MISSING is not None:
        raise ImportError(
            "fastattn.integrations.transformers needs transformers 5.23 or newer (pip install -U transformers): "
            f"{_MISSING}"
        ) from _MISSING
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# The mask ------------------------------------------------------------------------------------------------------------


class AttentionMask(Tensor):
    """A bool mask (B, 1, L, S), True = may attend, that is held as what it is made of.

    Query i may attend to key j when -left <= j - i <= right, key_keep[b, j], and
    query_segments[b, i] == key_segments[b, j]; a part that is None forbids nothing. Moving and slicing keep the parts;
    any other operation sees the bool tensor, which is made for it. Adding it to scores, as eager attention does with
    its own masks, raises ValueError, and writing into it RuntimeError.
    """

    left: int
    right: int
    anchor: Tensor  # empty: what it is a tensor of for torch.compile where every part is None
    key_keep: Tensor | None  # bool (B|1, S)
    query_segments: Tensor | None  # int64 (B|1, L)
    key_segments: Tensor | None  # int64 (B|1, S)

    _TENSORS = ("key_keep", "query_segments", "key_segments")
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[AttentionMask],
        shape: tuple[int, ...],
        anchor: Tensor,
        left: int,
        right: int,
        key_keep: Tensor | None,
        query_segments: Tensor | None,
        key_segments: Tensor | None,
    ) -> AttentionMask:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=anchor.device)
        self.left, self.right, self.anchor = left, right, anchor
        self.key_keep, self.query_segments, self.key_segments = key_keep, query_segments, key_segments
        return self

    def expanded(self) -> Tensor:
        """The mask as a bool tensor (B, 1, L, S)."""
        batch, heads, len_q, len_k = self.shape
        return _mask_of(self).to_dense(batch, heads, len_q, len_k, self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AttentionMask({tuple(self.shape)}: {_mask_of(self)!r})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, int]]:
        parts = [name for name in self._TENSORS if getattr(self, name) is not None]
        return ["anchor", *parts], (self.left, self.right)

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], limits: tuple[int, int], shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> AttentionMask:
        parts = [tensors.get(name) for name in AttentionMask._TENSORS]
        return AttentionMask(shape, tensors["anchor"], *limits, *parts)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kept = cls._kept(func, args, kwargs)
        if kept is not None:
            return kept
        aten = torch.ops.aten
        added = func.overloadpacket in (aten.add, aten.add_)
        if added or (func.overloadpacket in (aten.masked_fill, aten.masked_fill_) and isinstance(args[1], cls)):
            raise ValueError(
                "attention_mask is bool, True where attention is allowed, and cannot be added to scores or fill them: "
                "this model does not ask transformers' AttentionInterface; use attn_implementation='eager'"
            )
        if func._schema.is_mutable and args and isinstance(args[0], cls):
            _refuse_write()
        args, kwargs = pytree.tree_map_only(AttentionMask, AttentionMask.expanded, (args, kwargs))
        return func(*args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        _refuse_write()

    @classmethod
    def _kept(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionMask | None:
        """The result of an operation that keeps the parts; None when it does not."""
        aten = torch.ops.aten
        if not args or not isinstance(args[0], cls):
            return None
        mask = args[0]
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return mask._with(lambda part: part)
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            device = torch.device(kwargs.get("device") or mask.device)
            return mask._with(lambda part: part.to(device, non_blocking=kwargs.get("non_blocking", False)))
        if func is aten.slice.Tensor:
            return mask._sliced(*args[1:], **kwargs)
        return None

    def _with(self, change: Callable[[Tensor], Tensor]) -> AttentionMask:
        parts = (getattr(self, name) for name in self._TENSORS)
        changed = (None if part is None else change(part) for part in parts)
        return AttentionMask(tuple(self.shape), change(self.anchor), self.left, self.right, *changed)

    def _sliced(
        self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> AttentionMask | None:
        dim = dim % 4
        size = self.shape[dim]
        first, last, _ = slice(start, end).indices(size)
        last = max(first, last)
        if step != 1:
            return None
        shape = (*self.shape[:dim], last - first, *self.shape[dim + 1 :])
        left, right, parts = self.left, self.right, {name: getattr(self, name) for name in self._TENSORS}
        if dim == 0:
            parts = {k: x if x is None or x.shape[0] == 1 else x[first:last] for k, x in parts.items()}
        elif dim == 2:
            left, right = _moved(left, -first), _moved(right, first)
            parts["query_segments"] = _columns(parts["query_segments"], first, last)
        elif dim == 3:
            left, right = _moved(left, first), _moved(right, -first)
            parts["key_keep"] = _columns(parts["key_keep"], first, last)
            parts["key_segments"] = _columns(parts["key_segments"], first, last)
        return AttentionMask(shape, self.anchor, left, right, *parts.values())


def _refuse_write() -> NoReturn:
    raise RuntimeError(
        "attention_mask cannot be changed in place, since it holds no elements: combine masks "
        "by operators that make new ones (&, |), or use attn_implementation='eager'"
    )


def _mask_of(parts: AttentionMask) -> Mask:
    """The mask as the kernels take it."""
    # Not a method: Dynamo traces a method of a tensor as an operator.
    if parts.left == UNLIMITED and parts.right == 0 and parts.key_keep is None and parts.query_segments is None:
        return Mask.causal()
    terms: list[Term] = []
    if parts.left != UNLIMITED or parts.right != UNLIMITED:
        terms.append(Band(parts.left, parts.right, "top_left"))
    if parts.key_keep is not None:
        terms.append(KeyKeep(parts.key_keep))
    if parts.query_segments is not None and parts.key_segments is not None:
        terms.append(Segments(parts.query_segments, parts.key_segments))
    return Mask(tuple(terms))


def _moved(limit: int, by: int) -> int:
    return limit if limit == UNLIMITED else limit + by


def _columns(part: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if part is None else part[:, first:last]


def _check_model(config: Any) -> None:
    """Raises ValueError for a model whose attention does not ask the interface: it would misread the mask."""
    module = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    if module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return
    for name, value in vars(module).items():
        if "Attention" in name and inspect.isclass(value) and value.__module__ == module.__name__:
            raise ValueError(
                f"attn_implementation='fastattn' is not for {module.__name__}: its attention is its own and does not "
                "ask transformers' AttentionInterface; use 'eager'"
            )


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, with the arguments of transformers' `sdpa_mask`.

    Query i stands at position q_offset + i, key j at kv_offset + j. `attention_mask` is the padding, bool
    (B, positions). Padding alone gives (B, 1, 1, S) expanded to (B, 1, L, S); causal, sliding window, chunked and
    packed masks, with or without padding and a cache, an `AttentionMask`. One query, mask functions of the user's own,
    and tracing with anything but padding give the bool tensor (B, 1, L, S). None is no mask at all, or a single query
    that sees every key. Raises ValueError for a model (by its `config`) that computes its attention in its own way.
    """
    _check_model(config)
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be (B, positions), True = a real token, or a prepared (B, 1, L, S), got "
            f"{tuple(attention_mask.shape)}"
        )
    keep = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keep is not None:
        keep = keep[:, kv_offset : kv_offset + kv_length].bool()
    tracing = is_tracing(keep) or (isinstance(q_offset, Tensor) and is_tracing(q_offset))
    if keep is not None and not tracing and not keep.is_meta and bool(keep.all()):
        keep = None

    if mask_function is masking_utils.bidirectional_mask_function:
        if keep is None and allow_is_bidirectional_skip:
            return None
        if keep is None:
            keep = torch.ones(1, kv_length, dtype=torch.bool, device=device)
        return keep[:, None, None, :].expand(batch_size, 1, q_length, kv_length)

    pattern = None
    if not tracing and not use_vmap and q_length > 1:
        pattern = _Pattern.of(mask_function, q_length, kv_length, int(q_offset), kv_offset, device)
    if pattern is None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor where the cache is static
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            # Models may drop queries afterwards, and then the first one is not at position 0 any more.
            allow_is_causal_skip=allow_is_causal_skip and q_length == 1,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    unlimited = pattern.left >= q_length - 1 and pattern.right >= kv_length - 1 and not pattern.ids
    if allow_is_bidirectional_skip and keep is None and unlimited:
        return None
    shape = (batch_size, 1, q_length, kv_length)
    anchor = torch.empty(0, dtype=torch.bool, device=device)
    return AttentionMask(shape, anchor, pattern.left, pattern.right, keep, *pattern.segments())


@dataclass
class _Pattern:
    """What a mask function of transformers says: the AND of a band in indices and of segments.

    Mask functions are closures over what they were made of. They are told apart by their code, so that a function that
    merely looks alike, or one of a version that means something else by it, is not mistaken for one of these.
    """

    offset: int  # of the position of query i over that of key i
    queries: Tensor  # positions (L,)
    keys: Tensor  # positions (S,)
    left: int = UNLIMITED
    right: int = UNLIMITED
    ids: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of queries (B|1, L) and keys (B|1, S)
    packed: list[Tensor] = field(default_factory=list)  # the sequence that each position is in, (B, positions)
    restarting: list[Tensor] = field(default_factory=list)  # position_ids that start anew in each sequence

    @staticmethod
    def of(
        function: Callable, q_length: int, kv_length: int, q_offset: int, kv_offset: int, device: torch.device | str
    ) -> _Pattern | None:
        """The pattern of `function`; None when it has none."""
        queries = torch.arange(q_length, device=device) + q_offset
        keys = torch.arange(kv_length, device=device) + kv_offset
        pattern = _Pattern(q_offset - kv_offset, queries, keys)
        return pattern if pattern._read(function, None) and pattern._restarts_with_sequences() else None

    def segments(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """One id for each query (B|1, L) and key (B|1, S), equal where all ids are."""
        form = Mask(tuple(Segments(*pair) for pair in self.ids)).kernel_form(
            max((ids.shape[0] for pair in self.ids for ids in pair), default=1),
            1,
            len(self.queries),
            len(self.keys),
            self.queries.device,
        )
        if form.query_segments is None or form.key_segments is None:
            return None, None
        return form.query_segments, form.key_segments

    def _read(self, function: Callable, position_ids: Tensor | None) -> bool:
        if function is masking_utils.causal_mask_function:
            self.right = min(self.right, self.offset)
            return True
        if function is masking_utils.bidirectional_mask_function:
            return True
        kind = _KINDS.get(getattr(function, "__code__", None))
        if kind is None:
            return False
        held = dict(
            zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True)
        )
        if kind == "and":
            return all(self._read(part, position_ids) for part in held["mask_functions"])
        if kind == "window":
            self.left = min(self.left, held["sliding_window"] - 1 - self.offset)
        elif kind == "both":
            self.left = min(self.left, held["sliding_window"] - self.offset)
            self.right = min(self.right, held["sliding_window"] + self.offset)
        elif kind == "chunked":
            starts, size = held["left_padding"][:, None], held["chunk_size"]
            queries, keys = (
                at[None] if position_ids is None else position_ids[:, at] for at in (self.queries, self.keys)
            )
            self.ids.append(((queries - starts) // size, (keys - starts) // size))
        elif kind == "packed":
            sequences = held["packed_sequence_mask"]
            self.packed.append(sequences)
            self.ids.append((sequences[:, self.queries], sequences[:, self.keys]))
        elif kind == "restarting":
            self.restarting.append(held["position_ids"])
            return self._read(held["mask_function"], held["position_ids"])
        return True

    def _restarts_with_sequences(self) -> bool:
        """Whether positions that start anew are as far apart as their indices, in each sequence: then a band is one."""
        for position_ids in self.restarting:
            step = position_ids.diff(dim=-1) == 1
            if not any(bool((step | (s.diff(dim=-1) > 0)).all() & (s.diff(dim=-1) >= 0).all()) for s in self.packed):
                return False
        return True


def _kinds() -> dict[Any, str]:
    some = torch.zeros(1, dtype=torch.int64)
    causal = masking_utils.causal_mask_function
    functions = {
        "and": masking_utils.and_masks(causal),
        "window": masking_utils.sliding_window_overlay(1),
        "both": masking_utils.sliding_window_bidirectional_overlay(1),
        "chunked": masking_utils.chunked_overlay(1, some),
        "packed": masking_utils.packed_sequence_mask_function(some),
        "restarting": masking_utils.remap_positions_for_packed_sequence(causal, some),
    }
    return {function.__code__: kind for kind, function in functions.items()}


_KINDS = _kinds() if _MISSING is None else {}


# The attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer, with the arguments of transformers' attention functions.

    query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv). attention_mask: what the mask function gave, a bool
    mask (True = may attend) or a float one, added to the scores; broadcastable to (B, Hq, L, S). Without one, a module
    that is causal (`is_causal`, else ``module.is_causal``) is masked from the top left. position_bias: float, added to
    the scores. Both may have a gradient. s_aux: attention sinks, one score for each head (Hq,), in the denominator of
    the softmax. sliding_window: a mask holds it already; without one, it narrows the causal band.

    Returns out (B, L, Hq, Dv), contiguous, and the weights (B, Hq, L, S), after dropout and differentiable, where
    ``output_attentions`` asks for them, else None.

    Raises ValueError for what cannot be computed: softcap, head_mask, sparse attention by indices, a paged cache.
    """
    _refuse(softcap, cache, kwargs)
    if query.shape[0] != key.shape[0]:
        # Learned queries that all of the batch shares.
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in (query, key, value))
    len_q, len_k = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    mask: Mask | Tensor | None = None
    bias = position_bias
    if attention_mask is None:
        if is_causal and len_q > 1:
            mask = Mask.causal() if sliding_window is None else Mask.window(sliding_window - 1, 0)
    elif isinstance(attention_mask, AttentionMask):
        if tuple(attention_mask.shape[2:]) != (len_q, len_k):
            raise ValueError(
                f"attention_mask is for {attention_mask.shape[2]} queries and {attention_mask.shape[3]} keys, got "
                f"query {tuple(query.shape)} and key {tuple(key.shape)}"
            )
        mask = _mask_of(attention_mask)
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        raise TypeError(
            "attention_mask must be bool (True = may attend) or float (added to the scores), got "
            f"{attention_mask.dtype}"
        )
    mask = _within_sequences(mask, len_q, len_k, kwargs)

    if dropout == 1.0:
        # Every weight dropped: what a query that may attend to nothing gives.
        mask, dropout = Mask.key_lengths(torch.zeros(1, dtype=torch.int64, device=query.device)), 0.0
    seed = _draw_seed(dropout, query.device) if dropout else None
    wanted = _wants_weights(kwargs)
    sinks = kwargs.get("sinks") if s_aux is None else s_aux
    options: dict[str, Any] = {"mask": mask, "bias": bias, "scale": scaling, "dropout_p": dropout, "dropout_seed": seed}
    need_lse = wanted or sinks is not None
    out, lse = _attention_with_seed(query, key, value, **options, backend=None, need_lse=need_lse)
    weights = attention_weights(query, key, lse, average_heads=False, **options) if wanted else None
    if sinks is not None:
        # A sink adds exp(sink) to the denominator exp(lse): everything shrinks by exp(lse) / (exp(lse) + exp(sink)).
        sinks = sinks.view(1, -1, 1) if sinks.dim() == 1 else sinks.squeeze(-1)
        share = torch.sigmoid(lse - sinks).unsqueeze(-1)
        out = (out * share).to(out.dtype)
        weights = None if weights is None else (weights * share).to(weights.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _refuse(softcap: float | None, cache: Any, kwargs: dict[str, Any]) -> None:
    if softcap is not None:
        raise ValueError(
            f"softcap must be None, got {softcap}: attn_implementation='fastattn' has no soft-capping of scores; use "
            "'eager' or 'flex_attention', or a config without attn_logit_softcapping"
        )
    if cache is not None:
        raise ValueError(
            f"cache must be None, got {type(cache).__name__}: attn_implementation='fastattn' does not read paged "
            "caches; use 'sdpa' or 'paged|eager' for continuous batching"
        )
    for name, instead in (("head_mask", "'eager'"), ("indices", "'sdpa'"), ("block_indices", "'sdpa'")):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None: attn_implementation='fastattn' would ignore it; use {instead}")


def _within_sequences(
    mask: Mask | Tensor | None, len_q: int, len_k: int, kwargs: dict[str, Any]
) -> Mask | Tensor | None:
    """`mask` within the sequences of a pack, where the model is told their starts."""
    starts_q, starts_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if starts_q is None:
        return mask
    starts_k = starts_q if starts_k is None else starts_k
    # With keys from a cache the mask speaks of other positions than the starts do.
    if mask is not None and len_q != len_k:
        raise ValueError(
            f"cu_seq_lens_q must be None where keys come from a cache, got {len_q} queries and {len_k} keys"
        )
    sequences = Mask.segments(_segment_ids(starts_q, len_q, outside=-1), _segment_ids(starts_k, len_k, outside=-2))
    if mask is None:
        return sequences
    return (Mask.dense(mask) if isinstance(mask, Tensor) else mask) & sequences


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    # Some attention modules do not hand the flag on. What collects the weights knows.
    compiling = torch.compiler.is_compiling()  # Dynamo does not trace a context variable; this is its stand-in there
    collected = _active_collector.global_var if compiling else _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


# The losses ----------------------------------------------------------------------------------------------------------


def simmim_loss(outputs: Any, pixel_values: Tensor, bool_masked_pos: Tensor, patch_size: int) -> Tensor:
    """The loss of `ViTForMaskedImageModeling` and `SwinForMaskedImageModeling`, (l1 * mask).sum() / (mask.sum() + 1e-5)
    / C with the mask in pixels (Xie et al. 2022, "SimMIM", equation 1, as published with its code).

    Args:
        outputs: the model's outputs, or its reconstruction (B, C, H, W).
        pixel_values: the images (B, C, H, W).
        bool_masked_pos: bool (B, patches) or (B, H/p, W/p), True = masked.
        patch_size: p, ``config.patch_size`` of the model.

    Returns:
        A scalar of the dtype of the reconstruction or float32, whichever is wider, differentiable in it.

    Raises:
        TypeError, ValueError: as `fastattn.masked_l1_loss`, and where `bool_masked_pos` is not the patch grid.
    """
    reconstruction = getattr(outputs, "reconstruction", outputs)
    _check_images("pixel_values", pixel_values, patch_size)
    if not isinstance(bool_masked_pos, Tensor) or bool_masked_pos.dtype != torch.bool:
        seen = bool_masked_pos.dtype if isinstance(bool_masked_pos, Tensor) else type(bool_masked_pos).__name__
        raise TypeError(f"bool_masked_pos must be a bool tensor, True = masked, got {seen}")
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    if tuple(bool_masked_pos.shape) not in ((batch, rows * columns), (batch, rows, columns)):
        raise ValueError(
            f"bool_masked_pos must be (B, patches) = {(batch, rows * columns)} or (B, H/p, W/p) = "
            f"{(batch, rows, columns)}, got {tuple(bool_masked_pos.shape)}"
        )
    grid = bool_masked_pos.reshape(batch, rows, columns)
    total = masked_l1_loss(reconstruction, pixel_values, grid, patch_size=patch_size, reduction="sum")
    pixels = grid.sum() * patch_size**2
    return total / (pixels + 1e-5) / channels


def mae_loss(outputs: Any, pixel_values: Tensor, patch_size: int, *, norm_pix_loss: bool = False) -> Tensor:
    """The loss of `ViTMAEForPreTraining`: the squared error of the masked patches, a mean over their elements (He et
    al. 2022, "Masked autoencoders are scalable vision learners", section 3).

    Args:
        outputs: the model's outputs, with `logits` (B, patches, p * p * C) and `mask` (B, patches), 1 = masked.
        pixel_values: the images (B, C, H, W).
        patch_size: p, ``config.patch_size`` of the model.
        norm_pix_loss: ``config.norm_pix_loss``: each target patch less its mean, over the root of its unbiased variance
            + 1e-6.

    Returns:
        A scalar of the dtype of the logits, differentiable in them; 0 when no patch is masked.

    Raises:
        TypeError, ValueError: as `fastattn.masked_mse_loss`, and where `pixel_values` has no such patches.
    """
    _check_images("pixel_values", pixel_values, patch_size)
    # (B, C, H, W) -> (B, H/p, p, W/p, p, C) -> (B, patches, p * p * C)
    patches = pixel_values.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    target = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return masked_mse_loss(outputs.logits, target, outputs.mask.bool(), normalize_target=norm_pix_loss)


def _check_images(name: str, images: Tensor, patch_size: int) -> None:
    if isinstance(patch_size, bool) or not isinstance(patch_size, int):
        raise TypeError(f"patch_size must be an int, got {type(patch_size).__name__}")
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor (B, C, H, W), got {type(images).__name__}")
    if images.dim() != 4 or patch_size < 1 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"{name} must be images (B, C, H, W) with sides that patch_size = {patch_size} divides, got "
            f"{tuple(images.shape)}"
        )
