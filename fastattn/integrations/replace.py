"""Swap `torch.nn.MultiheadAttention` for ours inside an existing model, in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.nn.multihead_attention import MultiheadAttention


@dataclass
class ReplacementReport:
    """What `replace_multihead_attention` did. Names are those of ``model.named_modules()``; the model itself is "".

    Attributes:
        replaced: modules that are now `fastattn.MultiheadAttention`.
        left: modules derived from `torch.nn.MultiheadAttention` that were not touched, with the reason.
        notes: what else was changed in the model, so that the replaced modules are really called.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} MultiheadAttention module(s)"]
        lines += [f"  {_shown(name)}" for name in self.replaced]
        if self.left:
            lines += [f"left {len(self.left)}", *(f"  {_shown(name)}: {reason}" for name, reason in self.left.items())]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def replace_multihead_attention(model: torch.nn.Module) -> ReplacementReport:
    """Turn every `torch.nn.MultiheadAttention` in `model` (or `model` itself) into `fastattn.MultiheadAttention`.

    In place: parameters, hooks, dtype, device and training mode are those of before, so an optimizer made before stays
    valid. Subclasses other than ours are left, since what they override is unknown.

    In evaluation, `torch.nn.TransformerEncoderLayer` runs a fused path that never calls its attention module, and
    `torch.nn.TransformerEncoder` feeds it nested tensors. Both are switched off around replaced modules (by a forward
    pre-hook that does nothing, and by ``enable_nested_tensor = False``); the report's notes say where.

    Args:
        model: any module.

    Returns:
        A report to print or inspect.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = ReplacementReport()
    for name, module in model.named_modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
            report.replaced.append(name)
        elif type(module) is MultiheadAttention:
            report.left[name] = "is fastattn.MultiheadAttention already"
        elif isinstance(module, torch.nn.MultiheadAttention):
            kind = type(module)
            report.left[name] = f"is a subclass, {kind.__module__}.{kind.__qualname__}, which may do something else"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer) and _block_fused_layer(module):
            report.notes.append(f"{_shown(name)}: the layer's fused evaluation path is off, it would bypass self_attn")
        elif isinstance(module, torch.nn.TransformerEncoder) and _block_nested_tensors(module):
            report.notes.append(f"{_shown(name)}: enable_nested_tensor is off, nested tensors would bypass self_attn")
    return report


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _keep_attention_called(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: where one is attached, torch's fused layer steps aside."""


def _block_fused_layer(layer: torch.nn.TransformerEncoderLayer) -> bool:
    attention = layer.self_attn
    if type(attention) is not MultiheadAttention or _keep_attention_called in attention._forward_pre_hooks.values():
        return False
    attention.register_forward_pre_hook(_keep_attention_called)
    return True


def _block_nested_tensors(encoder: torch.nn.TransformerEncoder) -> bool:
    ours = any(type(getattr(layer, "self_attn", None)) is MultiheadAttention for layer in encoder.layers)
    # use_nested_tensor is what forward reads; enable_nested_tensor is what the user gave, and may read back.
    if not ours or not (encoder.enable_nested_tensor or encoder.use_nested_tensor):
        return False
    encoder.enable_nested_tensor = encoder.use_nested_tensor = False
    return True
