"""fastattn: fused, tiled, masked attention and masked reconstruction loss for PyTorch. True in a mask = may attend."""

from fastattn.attention import (
    attention,
    attention_varlen,
    attention_weights,
    explain,
    scaled_dot_product_attention,
)
from fastattn.dispatch import use_backend
from fastattn.masks import Mask
from fastattn.tiles import TileMap

__all__ = [
    "Mask",
    "TileMap",
    "attention",
    "attention_varlen",
    "attention_weights",
    "explain",
    "scaled_dot_product_attention",
    "use_backend",
]
