"""timm's attention layer on our kernels: `Attention` for ``attn_layer=``, `register` for its name. Needs timm."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.fx
from torch import Tensor

from fastattn.attention import _attention_packed, _attention_with_seed, _draw_seed
from fastattn.masks import Mask


class Attention(timm.layers.Attention):
    """`timm.layers.Attention`, with attention tiled and fused: the same constructor, state dict and numbers.

    ::

        VisionTransformer(..., attn_layer=fastattn.integrations.timm.Attention)

    An existing layer becomes this one by ``layer.__class__ = Attention``. Query, key and value are read straight out of
    the packed projection, unless they are normalised, and never copied. ``fused_attn`` changes nothing: training,
    evaluation and every setting of timm's run the same code.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend from each token to all.

        Args:
            x: (B, N, C).
            attn_mask: broadcastable to (B, num_heads, N, N). bool: True = may attend; float: added to the scores, and
                given its gradient. A token that may attend to nothing gets zero attention.
            is_causal: token i attends to the tokens j <= i. Not together with `attn_mask`.

        Returns:
            (B, N, dim_out).

        Raises:
            RuntimeError: `attn_mask` together with `is_causal`, as torch does.
            ValueError, TypeError: `attn_mask` does not fit.
        """
        if isinstance(x, torch.fx.Proxy):
            if type(self).forward is not Attention.forward:
                # The node would call that forward again, which has run up to here already.
                raise torch.fx.proxy.TraceError(
                    f"{type(self).__qualname__} has a forward of its own, which fx cannot trace: "
                    "make it a leaf by Tracer.is_leaf_module"
                )
            # One node of the graph, as fx records torch's own modules.
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x, attn_mask, is_causal), {})
        mask, bias = _read_masks(attn_mask, is_causal)
        dropout_p = self.attn_drop.p if self.training else 0.0
        if dropout_p == 1.0:
            # Every weight dropped: what a token that may attend to nothing gives.
            mask, bias = Mask.key_lengths(torch.zeros(1, dtype=torch.int64, device=x.device)), None
            dropout_p = 0.0
        options: dict[str, Any] = {
            "mask": mask,
            "bias": bias,
            "dropout_p": dropout_p,
            "dropout_seed": _draw_seed(dropout_p, x.device),
            "scale": self.scale,
            "backend": None,
        }
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, H, D)
        if isinstance(self.q_norm, torch.nn.Identity) and isinstance(self.k_norm, torch.nn.Identity):
            out, _ = _attention_packed(qkv, **options)
        else:
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            out, _ = _attention_with_seed(self.q_norm(query), self.k_norm(key), value, **options)
        out = self.norm(out.transpose(1, 2).flatten(2))  # its memory order is (B, N, H, D): a view
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles in place of this module: timm's forward over the same state."""
        if type(self) is not Attention:
            return self  # what a subclass does, TorchScript takes or refuses
        scriptable = _Scriptable.__new__(_Scriptable)
        object.__setattr__(scriptable, "__dict__", self.__dict__)
        return scriptable


class _Scriptable(Attention):
    """TorchScript cannot compile our forward, so that it gets timm's.

    torch.jit.script leaves this object in the model that it was given, in our module's place. It turns into our module
    again at the first call there.
    """

    forward = timm.layers.Attention.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.__class__ = Attention
        return self(*args, **kwargs)


def _read_masks(attn_mask: Tensor | None, is_causal: bool) -> tuple[Mask | Tensor | None, Tensor | None]:
    """timm's masks, which are those of `F.scaled_dot_product_attention`, as (mask, bias)."""
    if attn_mask is None:
        return (Mask.causal() if is_causal else None), None
    if is_causal:
        raise RuntimeError("attn_mask must be None when is_causal is set: give the mask or the flag, not both")
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


def register(name: str = "fastattn") -> None:
    """Let timm's vision transformers take `name` for `Attention`: ``timm.create_model(..., attn_layer="fastattn")``.

    Raises:
        RuntimeError: this timm has no table of attention layers; pass ``attn_layer=Attention`` where it takes a class.
    """
    from timm.models import vision_transformer

    layers = getattr(vision_transformer, "ATTN_LAYERS", None)
    if layers is None:
        raise RuntimeError(
            f"timm {timm.__version__} has no timm.models.vision_transformer.ATTN_LAYERS; "
            "pass attn_layer=fastattn.integrations.timm.Attention where it takes a class"
        )
    layers[name] = Attention
