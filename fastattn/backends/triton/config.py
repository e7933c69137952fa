"""Tile sizes, warps and pipeline stages: a table by kernel, device generation, head dim, dtype and kind of mask.

Tests never tune. `FASTATTN_AUTOTUNE=1` makes `choose` time the candidates on the first call of each kind and print the
lines to paste here.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastattn.backends.triton.common import block_dim, is_listed
from fastattn.masks import KernelMask

LOG2E = 1.4426950408889634
SHORT_KEYS = 256  # up to this many keys are one tile
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Config:
    """How a kernel is launched. `short`: every key is in one tile of block_n."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    short: bool = False

    def constants(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return dict(
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, num_warps=self.num_warps, num_stages=self.num_stages
        )


def forward(query: Tensor, len_k: int, head_dim: int, mask: KernelMask | None) -> Config:
    dim = block_dim(head_dim)
    if 0 < len_k <= SHORT_KEYS:
        return Config(64, max(16, triton.next_power_of_2(len_k)), 4, 2, short=True)
    return Config(64, 64, 4 if dim <= 128 else 8, 2)


def backward_dq(query: Tensor, head_dim: int, mask: KernelMask | None) -> Config:
    return Config(64, 64, 4 if block_dim(head_dim) <= 64 else 8, 2)


def backward_dkv(query: Tensor, head_dim: int, mask: KernelMask | None) -> Config:
    return Config(64, 64, 4 if block_dim(head_dim) <= 64 else 8, 2)


def backward_dbias(query: Tensor, head_dim: int, mask: KernelMask | None) -> Config:
    return Config(64, 64, 4 if block_dim(head_dim) <= 64 else 8, 2)


def backward_short(query: Tensor, len_k: int, head_dim: int) -> Config | None:
    """None where the keys and their gradients do not fit."""
    block_n = max(16, triton.next_power_of_2(len_k))
    if len_k > SHORT_KEYS or block_n * block_dim(head_dim) > 16384:
        return None
    return Config(32, block_n, 4 if block_n <= 64 else 8, 2, short=True)


def programs_wanted(tensor: Tensor) -> int:
    """Enough programs to fill the device twice."""
    if not tensor.is_cuda:
        return 8
    return 2 * _multiprocessors(tensor.device.index or 0)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def weights(query: Tensor, head_dim: int) -> Config:
    return Config(64, 64, 4, 2)
