"""Modules: drop-ins for torch's and the SimMIM framework."""

from fastattn.nn.additive import AdditiveAttention
from fastattn.nn.loss import MaskedL1Loss, MaskedMSELoss, MaskedSmoothL1Loss
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.simmim import PatchMask, SimMIM, ViTEncoder

__all__ = [
    "AdditiveAttention",
    "MaskedL1Loss",
    "MaskedMSELoss",
    "MaskedSmoothL1Loss",
    "MultiheadAttention",
    "PatchMask",
    "SimMIM",
    "ViTEncoder",
]
