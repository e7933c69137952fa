"""The Triton backend: one file an operation, the functions and arguments that every backend has.

Runs on CUDA devices of capability 8.0 or later, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).
Nothing synchronises with the host; every reduction has a fixed order.

To torch.compile each operation is one opaque operator of `fastattn.ops`. `torch.library.wrap_triton` would show it the
launches, but in torch 2.13 it takes a tuple among a kernel's arguments for a constant: the mask's tensors, which travel
in one, would be those of the first call for ever.
"""

from fastattn.backends.triton.additive_attention import additive_attention_backward, additive_attention_forward
from fastattn.backends.triton.attention_backward import attention_backward
from fastattn.backends.triton.attention_forward import attention_forward
from fastattn.backends.triton.attention_weights import attention_weights, attention_weights_backward
from fastattn.backends.triton.linear_masked_loss import linear_masked_loss
from fastattn.backends.triton.mask_tiles import mask_tiles
from fastattn.backends.triton.masked_loss import masked_loss, masked_loss_backward_none

__all__ = [
    "additive_attention_backward",
    "additive_attention_forward",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "attention_weights_backward",
    "linear_masked_loss",
    "mask_tiles",
    "masked_loss",
    "masked_loss_backward_none",
]
