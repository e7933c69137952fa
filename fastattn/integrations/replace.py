"""Swap `torch.nn.MultiheadAttention` for ours inside an existing model, in place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.utils import parametrize

from fastattn.nn.multihead_attention import MultiheadAttention, keep_attention_called


@dataclass
class ReplacementReport:
    """What `replace_multihead_attention` did. Names are those of ``model.named_modules()``; the model itself is "".

    A module that stands in several places has the first of its names.

    Attributes:
        replaced: modules that are now `fastattn.MultiheadAttention`.
        left: multi-head attention modules of torch's kind that were not touched, with the reason.
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

    In place: the objects, their parameters, hooks, dtype, device and training mode are those of before, so an optimizer
    made before stays valid. Parametrized modules (`torch.nn.utils.parametrize`) are replaced and stay parametrized.
    What `torch.compile` made of the model is compiled anew at the next call. A second call changes nothing more.

    Left, and named in the report with the reason: subclasses other than ours, since what they override is unknown
    (among them quantizable and quantized ones, and those of `fully_shard`: replace before sharding); modules whose
    `forward` was replaced on the object; modules compiled by TorchScript.

    In evaluation, `torch.nn.TransformerEncoderLayer` runs a fused path that never calls its attention module, and
    `torch.nn.TransformerEncoder` feeds it nested tensors. Both are switched off around replaced modules (by a forward
    pre-hook that does nothing, and by ``enable_nested_tensor = False``); the report's notes say where.

    Args:
        model: any module.

    Returns:
        A report to print or inspect.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.

    Example, as a callback of Lightning::

        class FusedAttention(lightning.pytorch.Callback):
            def setup(self, trainer, pl_module, stage):
                report = fastattn.replace_multihead_attention(pl_module)
                if stage == "fit":
                    lightning.pytorch.utilities.rank_zero_info(str(report))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = ReplacementReport()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            reason = _why_not(module)
            if reason is None:
                module.__class__ = _replacement(module)
                report.replaced.append(name)
            else:
                report.left[name] = reason
        elif isinstance(module, torch.jit.ScriptModule) and module.original_name == "MultiheadAttention":
            report.left[name] = "is compiled by TorchScript; replace before scripting or tracing"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer) and _block_fused_layer(module):
            report.notes.append(f"{_shown(name)}: the layer's fused evaluation path is off, it would bypass self_attn")
        elif isinstance(module, torch.nn.TransformerEncoder) and _block_nested_tensors(module):
            report.notes.append(f"{_shown(name)}: enable_nested_tensor is off, nested tensors would bypass self_attn")
    return report


def _why_not(module: torch.nn.MultiheadAttention) -> str | None:
    """The reason to leave a module; None when there is none."""
    kind = type(module)
    if isinstance(module, MultiheadAttention):
        return "is fastattn.MultiheadAttention already"
    # The class of a parametrized module is made for it alone; the one below it is the user's.
    if (kind.__base__ if parametrize.is_parametrized(module) else kind) is not torch.nn.MultiheadAttention:
        return f"is a subclass, {kind.__module__}.{kind.__qualname__}, which may do something else"
    if "forward" in vars(module):
        return "has a forward of its own, set on the object, which would go on calling torch's"
    return None


def _replacement(module: torch.nn.MultiheadAttention) -> type[MultiheadAttention]:
    """Our class; for a parametrized module, ours with the properties that its own class holds."""
    kind = type(module)
    if kind is torch.nn.MultiheadAttention:
        return MultiheadAttention
    members = {name: member for name, member in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (MultiheadAttention,), members)


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _block_fused_layer(layer: torch.nn.TransformerEncoderLayer) -> bool:
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, MultiheadAttention) or keep_attention_called in attention._forward_pre_hooks.values():
        return False
    attention.register_forward_pre_hook(keep_attention_called)
    return True


def _block_nested_tensors(encoder: torch.nn.TransformerEncoder) -> bool:
    ours = any(isinstance(getattr(layer, "self_attn", None), MultiheadAttention) for layer in encoder.layers)
    # use_nested_tensor is what forward reads; enable_nested_tensor is what the user gave, and may read back.
    if not ours or not (encoder.enable_nested_tensor or encoder.use_nested_tensor):
        return False
    encoder.enable_nested_tensor = encoder.use_nested_tensor = False
    return True
