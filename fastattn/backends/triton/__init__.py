"""The Triton backend: one file an operation, the functions and arguments that every backend has.

Runs on CUDA devices of capability 8.0 or later, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).
Nothing synchronises with the host; every reduction has a fixed order.
"""

from fastattn.backends.triton.attention_backward import attention_backward
from fastattn.backends.triton.attention_forward import attention_forward

__all__ = ["attention_backward", "attention_forward"]
