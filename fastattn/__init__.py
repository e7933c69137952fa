"""fastattn: fused, tiled, masked attention and masked reconstruction loss for PyTorch. True in a mask = may attend."""

from fastattn.additive import additive_attention, additive_attention_weights
from fastattn.attention import (
    attention,
    attention_varlen,
    attention_weights,
    explain,
    scaled_dot_product_attention,
    varlen_attn,
)
from fastattn.dispatch import use_backend
from fastattn.integrations.replace import ReplacementReport, replace_multihead_attention
from fastattn.integrations.sdpa import register_flash_attention_impl, replace_scaled_dot_product_attention
from fastattn.losses import (
    linear_masked_l1_loss,
    linear_masked_mse_loss,
    linear_masked_smooth_l1_loss,
    masked_l1_loss,
    masked_mse_loss,
    masked_smooth_l1_loss,
)
from fastattn.masks import Mask
from fastattn.nn import (
    AdditiveAttention,
    MaskedL1Loss,
    MaskedMSELoss,
    MaskedSmoothL1Loss,
    MultiheadAttention,
    PatchMask,
    SimMIM,
    ViTEncoder,
)
from fastattn.tiles import TileMap

__all__ = [
    "AdditiveAttention",
    "Mask",
    "MaskedL1Loss",
    "MaskedMSELoss",
    "MaskedSmoothL1Loss",
    "MultiheadAttention",
    "PatchMask",
    "ReplacementReport",
    "SimMIM",
    "TileMap",
    "ViTEncoder",
    "additive_attention",
    "additive_attention_weights",
    "attention",
    "attention_varlen",
    "attention_weights",
    "explain",
    "linear_masked_l1_loss",
    "linear_masked_mse_loss",
    "linear_masked_smooth_l1_loss",
    "masked_l1_loss",
    "masked_mse_loss",
    "masked_smooth_l1_loss",
    "register_flash_attention_impl",
    "replace_multihead_attention",
    "replace_scaled_dot_product_attention",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attn",
]
