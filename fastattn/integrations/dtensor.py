"""Sharding rules of the attention operators for `torch.distributed.tensor.DTensor`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

import fastattn.attention  # noqa: F401  the operators are defined by what it imports

Rule = tuple[list[Placement], list[Placement]]  # of the outputs, of the tensors among the arguments

# The axis behind each dimension of a tensor: b batch, h query heads, k key and value heads, l queries, s keys; "." is
# never sharded. A dimension of size 1 broadcasts along its axis: every process needs it.
_MASK = {
    "prefix_lengths": "b",
    "key_lengths": "b",
    "key_keep": "bs",
    "query_segments": "bl",
    "key_segments": "bs",
    **dict.fromkeys(("tile_bits", "tile_live", "tile_full", "tile_live_t", "tile_full_t"), "bh.."),
}
_INPUTS = {
    "query": "bhl.",
    "key": "bks.",
    "value": "bks.",
    "qkv": "bl.h.",
    "out": "bhl.",
    "lse": "bhl",
    "bias": "bhls",
    "grad_out": "bhl.",
    "grad_lse": "bhl",
    "dropout_seed": "",
    **_MASK,
}
_TENSORS = {
    "attention": ("out", "lse"),
    "attention_backward": ("grad query", "grad key", "grad value", "grad bias"),
    "attention_packed": ("out", "lse"),
    "attention_packed_backward": ("grad qkv", "grad bias"),
    "attention_weights": ("weights",),
    "attention_weights_backward": ("grad query", "grad key", "grad bias", "grad lse"),
}


@functools.cache
def register() -> None:
    """Let `fastattn.attention`, `attention_weights` and their gradients run on DTensors without gathering them.

    Call it once, before the first use. Supported shardings, in any combination over the dimensions of a mesh:

    * the batch, always;
    * the heads. With fewer key and value heads than query heads (grouped queries), when both numbers are multiples of
      the mesh's size, or when there is one key and value head, which every process then needs. Not for weights that
      are averaged over the heads;
    * the queries (dimension L), with keys and values on every process: each process computes its rows, and the
      gradients of key and value are `Partial` sums. Without a mask, or with `Mask.key_lengths`, `Mask.key_padding` and
      `Mask.segments`. Not for the packed projection, in which the queries cannot be told from the keys.

    Everything else is gathered first, so that the result is right and not fast: causal, window, prefix and dense masks
    when the queries are sharded, since they depend on a query's position in the whole sequence; the key dimension; and
    any problem with dropout, whose pattern depends on the position of every element. As for torch's own random
    operators, all processes must then have the same seed. A bias or mask dimension of size 1 is needed by every
    process, and the gradient of such a bias is a `Partial` sum. `Partial` inputs are summed first.

    Tensors of a mask and the bias must be DTensors too when query, key and value are; torch raises a RuntimeError about
    mixed tensors otherwise. Second derivatives and forward mode have no rules: torch raises NotImplementedError.

    Source: torch.distributed.tensor.experimental.register_sharding.
    """
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, outputs in _TENSORS.items():
        _register(propagator, name, functools.partial(_attention_rules, name, outputs))
    _register(propagator, "mask_tiles", _mask_tiles_rules)


def _register(propagator: Any, name: str, rules: Callable[..., list[Rule]]) -> None:
    operator = getattr(torch.ops.fastattn, name).default
    register_sharding(operator)(rules)
    # Decisions are kept and looked up by the tensors and by what follows the first int argument. The band, a list of
    # ints, stands before that, and so do the mask's tensors that are None. All of it belongs into the key: a causal
    # problem must never get the decision that was made for one without a mask.
    propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)


def _attention_rules(name: str, outputs: tuple[str, ...], *arguments: Any) -> list[Rule]:
    schema = getattr(torch.ops.fastattn, name).default._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=True)}
    dims = {**_INPUTS, "weights": "bls" if given.get("average_heads") else "bhls"}
    dims["grad_weights"] = dims["weights"]
    tensors = {x: spec for x, spec in given.items() if x in dims and spec is not None}

    def placement(axis: str, tensor: str) -> Placement:
        for dim, letter in enumerate(dims[tensor]):
            if letter == axis or (axis, letter) == ("h", "k"):
                broadcasts = tensor in tensors and tensors[tensor].shape[dim] == 1
                return Replicate() if broadcasts else Shard(dim)
        return Replicate()

    def output(axis: str, tensor: str) -> Placement:
        if not tensor.startswith("grad "):
            return placement(axis, tensor)
        of = tensor.removeprefix("grad ")
        if of == "bias" and ("bias" not in tensors or not given["need_grad_bias"]):
            return Replicate()  # an empty tensor
        placed = placement(axis, of)
        return Partial() if isinstance(placed, Replicate) else placed

    rules: list[Rule] = [([Replicate() for _ in outputs], [Replicate() for _ in tensors])]
    for axis in _axes(given):
        rules.append(([output(axis, tensor) for tensor in outputs], [placement(axis, tensor) for tensor in tensors]))
    return rules


def _axes(given: dict[str, Any]) -> str:
    """The axes along which this problem falls apart into problems of the same kind."""
    if given["dropout_p"] > 0.0:
        return ""
    packed = "qkv" in given
    batch, heads = (given["qkv"].shape[i] for i in (0, 3)) if packed else given["query"].shape[:2]
    axes = "b" if batch > 1 else ""
    if heads > 1 and not given.get("average_heads"):
        heads_kv = heads if packed else given["key"].shape[1]
        parts = given["qkv" if packed else "query"].mesh.size()
        if heads_kv in (1, heads) or (heads % parts == 0 and heads_kv % parts == 0):
            axes += "h"
    by_position = given["band"] or any(given[x] is not None for x in ("prefix_lengths", "tile_bits"))
    if not packed and not by_position and given["query"].shape[2] > 1:
        axes += "l"
    return axes


def _mask_tiles_rules(masks: Sequence[Any], *arguments: Any) -> list[Rule]:
    rules: list[Rule] = [([Replicate()] * 5, [Replicate() for _ in masks])]
    for dim in (0, 1):  # batch, heads
        sizes = [mask.shape[dim] for mask in masks]
        if max(sizes) > 1:
            rules.append(([Shard(dim)] * 5, [Shard(dim) if size > 1 else Replicate() for size in sizes]))
    return rules
