"""Tile sizes, warps and pipeline stages: a table by kernel, device generation, head dim, dtype and kind of mask.

Nothing is measured at run time, unless FASTATTN_AUTOTUNE=1 asks for it: then the first launch of each kind tries the
candidates (`CANDIDATES`) and prints the line to paste here. tests/test_triton_compile.py compiles every line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.backends.triton.common import block_dim, is_listed
from fastattn.masks import KernelMask

LOG2E = 1.4426950408889634
SHORT_KEYS = 256  # up to this many keys are one tile
FEW_QUERIES = 16  # up to this many queries share out their keys over programs: no tile has fewer rows
PART_TILES = 2  # tiles of keys that are worth a program of their own
MAX_PARTS = 64
CAPABILITIES = (80, 90, 100)
AUTOTUNE = os.environ.get("FASTATTN_AUTOTUNE") == "1"


@dataclass(frozen=True)
class Config:
    """How a kernel is launched."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    def constants(self) -> dict[str, int]:
        """As keyword arguments of a launch.

        Products and sums are not fused: scale S is to be rounded before lse, which was rounded too, is subtracted.
        Fused they would differ by the rounding of lse, which for large scores is anything.
        """
        sizes = dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, num_warps=self.num_warps, num_stages=self.num_stages)
        return sizes | dict(enable_fp_fusion=False)


# (kernel, generation, head dim as a tile holds it) -> configuration of 16-bit problems. The generations before 9.0 have
# 163 KB of shared memory a block, the later ones 227 KB. "general" is for what a tile has to read beside keys and
# values: a bias, or a mask whose live tiles are listed. A generation without such a line takes its plain one.
_HALF: dict[tuple[str, int, int], Config] = {
    ("forward", 80, 64): Config(128, 64, 8, 3),
    ("forward", 80, 128): Config(128, 64, 8, 3),
    ("forward", 80, 256): Config(64, 64, 8, 2),
    ("forward", 90, 64): Config(128, 64, 4, 3),
    ("forward", 90, 128): Config(128, 128, 8, 2),
    ("forward", 90, 256): Config(128, 64, 8, 2),
    ("forward general", 90, 128): Config(128, 64, 8, 3),
    ("forward general", 100, 256): Config(64, 64, 8, 2),
    ("dq", 80, 64): Config(64, 64, 4, 2),
    ("dq", 80, 128): Config(64, 64, 8, 2),
    ("dq", 80, 256): Config(64, 32, 8, 2),
    ("dq general", 80, 64): Config(64, 64, 8, 2),
    ("dq general", 80, 256): Config(32, 32, 8, 2),
    ("dq", 90, 64): Config(128, 64, 8, 3),
    ("dq", 90, 128): Config(128, 64, 8, 2),
    ("dq", 90, 256): Config(64, 32, 8, 2),
    ("dkv", 80, 64): Config(64, 128, 8, 2),
    ("dkv", 80, 128): Config(32, 128, 8, 2),
    ("dkv", 80, 256): Config(32, 64, 8, 2),
    ("dkv general", 80, 64): Config(32, 128, 8, 2),
    ("dkv general", 80, 128): Config(64, 64, 8, 2),
    ("dkv", 90, 64): Config(64, 128, 8, 2),
    ("dkv", 90, 128): Config(32, 128, 8, 2),
    ("dkv", 90, 256): Config(32, 64, 8, 2),
    ("dbias", 80, 64): Config(64, 64, 4, 2),
    ("dbias", 80, 128): Config(64, 64, 8, 2),
    ("dbias", 80, 256): Config(32, 64, 8, 1),
    ("dbias", 90, 256): Config(64, 64, 8, 1),
}
# float32 is computed by the ordinary arithmetic units, whose tiles hold operands in registers: small ones.
_FLOAT32: dict[tuple[str, int, int], Config] = {
    ("forward", 80, 64): Config(64, 32, 8, 2),
    ("forward", 80, 128): Config(64, 32, 8, 2),
    ("forward", 80, 256): Config(16, 32, 4, 2),
    ("forward", 90, 128): Config(32, 16, 8, 2),
    ("forward", 90, 256): Config(32, 16, 8, 2),
    ("dq", 80, 64): Config(32, 32, 4, 2),
    ("dq", 80, 128): Config(32, 32, 8, 2),
    ("dq", 80, 256): Config(32, 16, 8, 2),
    ("dkv", 80, 64): Config(32, 32, 4, 2),
    ("dkv", 80, 128): Config(32, 32, 8, 2),
    ("dkv", 80, 256): Config(16, 32, 8, 2),
    ("dkv", 90, 128): Config(16, 32, 8, 2),
    ("dbias", 80, 64): Config(32, 32, 4, 2),
    ("dbias", 80, 128): Config(32, 32, 8, 2),
    ("dbias", 80, 256): Config(16, 16, 8, 2),
}
# In the interpreter: few elements, and tiles whose two sides differ.
_INTERPRETED = {
    "forward": Config(64, 64),
    "dq": Config(32, 64),
    "dkv": Config(64, 32),
    "dbias": Config(64, 64),
}
# Bytes that a thread may spill, of up to 1020 in its registers, by the head dim of its tile; for additive attention by
# its features, and by them alone: checked with values as wide, at 64 and 256.
SPILL_ALLOWANCE: dict[tuple[str, int], int] = {
    ("additive_forward_kernel", 256): 32,  # 16 bits with a listed mask, outside the loop over features
    ("additive_backward_dq_kernel", 64): 16,
    ("additive_backward_dkv_kernel", 64): 72,  # float32 on 8.0
    ("additive_backward_dq_kernel", 256): 208,  # outside the loops over features and rows
    ("additive_backward_dkv_kernel", 256): 288,
    ("attention_forward_kernel", 64): 8,  # tf32 on 8.0
    ("attention_forward_kernel", 128): 32,
    ("attention_forward_kernel", 256): 32,
    ("attention_forward_split_kernel", 64): 8,  # Triton 3.6 on 8.0
    ("attention_forward_short_kernel", 64): 64,
    ("attention_forward_short_kernel", 128): 16,
    ("attention_backward_dq_kernel", 64): 8,  # tf32 on 9.0
    ("attention_backward_dq_kernel", 256): 8,  # float32 with a bias on 8.0
    ("attention_backward_dkv_kernel", 64): 16,
    ("attention_backward_dkv_kernel", 128): 16,
    ("attention_backward_dkv_kernel", 256): 160,
    ("attention_backward_short_kernel", 256): 32,
}


# What FASTATTN_AUTOTUNE=1 tries in place of a line of the tables: (block_m, block_n, num_warps, num_stages).
CANDIDATES = {
    "forward": (
        *((64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2)),
        *((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 32, 8, 2), (32, 32, 4, 2)),
    ),
    "dq": (
        *((64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2)),
        *((128, 32, 8, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (32, 32, 4, 2)),
    ),
    "dkv": (
        *((32, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
        *((64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2), (32, 32, 4, 2)),
    ),
}


def capability(tensor: Tensor) -> int:
    """80, 90, 100: the generation of the tensor's device; 0 in the interpreter."""
    if not tensor.is_cuda:
        return 0
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return 80 if major < 9 else 90 if major == 9 else 100


def table(kernel: str, query: Tensor, head_dim: int, mask: KernelMask | None, bias: Tensor | None) -> Config:
    """The line for a kernel: "forward", "dq", "dkv" or "dbias"."""
    generation = capability(query)
    if not generation:
        return _INTERPRETED[kernel]
    lines = _FLOAT32 if query.dtype == torch.float32 else _HALF
    dim = max(64, block_dim(head_dim))
    names = (kernel + " general", kernel) if is_listed(mask) or bias is not None else (kernel,)
    for known in (100, 90, 80):  # a generation without a line of its own takes the one before
        for name in names:
            if known <= generation and (name, known, dim) in lines:
                return lines[name, known, dim]
    raise KeyError((kernel, generation, dim))


def tuned(
    kernel: str,
    query: Tensor,
    head_dim: int,
    mask: KernelMask | None,
    bias: Tensor | None,
    launch: Callable[[Config], Any],
) -> None:
    """Launches a kernel with the table's configuration; or, with FASTATTN_AUTOTUNE=1, with the best of the candidates,
    which the first launch of each kind times and prints as a line of the table.

    `launch` may be called many times, and writes the same results each time.
    """
    line = table(kernel, query, head_dim, mask, bias)
    if not AUTOTUNE or not query.is_cuda:
        launch(line)
        return
    name = kernel + (" general" if is_listed(mask) or bias is not None else "")
    key = (name, capability(query), max(64, block_dim(head_dim)))
    kind = (*key, query.dtype == torch.float32)
    if kind not in _found:
        _found[kind] = _fastest(launch, (line, *(Config(*c) for c in CANDIDATES[kernel])))
        lines = "_FLOAT32" if query.dtype == torch.float32 else "_HALF"
        best = _found[kind]
        sizes = f"{best.block_m}, {best.block_n}, {best.num_warps}, {best.num_stages}"
        print(f"{lines}:    {key}: Config({sizes}),".replace("'", '"'), flush=True)
    launch(_found[kind])


_found: dict[tuple[Any, ...], Config] = {}


def _fastest(launch: Callable[[Config], Any], candidates: Iterable[Config]) -> Config:
    best: tuple[float, Config] | None = None
    for candidate in candidates:
        try:
            seconds = triton.testing.do_bench(functools.partial(launch, candidate), warmup=10, rep=50)
        except triton.runtime.errors.OutOfResources:  # more shared memory than the device has
            continue
        if best is None or seconds < best[0]:
            best = seconds, candidate
    if best is None:
        raise RuntimeError("FASTATTN_AUTOTUNE: no candidate runs on this device")
    return best[1]


def forward_short(query: Tensor, len_k: int, head_dim: int) -> Config | None:
    """None where the keys and values do not fit."""
    if not 0 < len_k <= SHORT_KEYS:
        return None
    block_n = max(16, triton.next_power_of_2(len_k))
    elements = block_n * block_dim(head_dim)
    if query.dtype == torch.float32:
        return Config(16, block_n, 4, 1) if elements <= 8192 else None
    # Before 9.0 a product's accumulators lie in registers with its operands: 256 keys do not fit. Nor do 128 keys of
    # head dim 256 in its shared memory.
    if elements > 32768 or (capability(query) == 80 and (block_n > 128 or elements > 16384)):
        return None
    return Config(64, block_n, 8 if block_n > 128 or elements > 8192 else 4, 1 if elements > 16384 else 2)


def forward_split(query: Tensor, key: Tensor, head_dim: int) -> tuple[Config, int] | None:
    """For few queries: the configuration, and how many tiles of keys make a part. None where no part would be left over
    for more programs. By sizes and the device alone: the same problem is always summed in the same order."""
    batch, heads_kv, len_k, _ = key.shape
    rows = query.shape[1] // heads_kv * query.shape[2]
    if query.shape[2] > FEW_QUERIES or len_k <= SHORT_KEYS:
        return None
    dim = block_dim(head_dim)
    if query.dtype == torch.float32:
        chosen = Config(16, 32 if dim <= 64 else 16, 4, 2)
    else:
        block_m = min(64, max(16, triton.next_power_of_2(rows)))
        chosen = Config(block_m, 128 if dim <= 64 else 64, 8 if block_m * dim > 4096 else 4, 3 if dim <= 128 else 2)
    tiles = triton.cdiv(len_k, chosen.block_n)
    programs = batch * heads_kv * triton.cdiv(rows, chosen.block_m)
    parts = min(programs_wanted(query) // programs, tiles // PART_TILES, MAX_PARTS)
    return (chosen, triton.cdiv(tiles, parts)) if parts > 1 else None


def backward_short(query: Tensor, len_k: int, head_dim: int) -> Config | None:
    """None where the keys, the values and their gradients do not fit."""
    block_n = max(16, triton.next_power_of_2(len_k))
    elements = block_n * block_dim(head_dim)
    if len_k > SHORT_KEYS or elements > (4096 if query.dtype == torch.float32 else 16384):
        return None
    if block_n > 128 and capability(query) == 80:  # as in the forward
        return None
    if query.dtype == torch.float32:
        return Config(16, block_n, 4, 1)
    return Config(32, block_n, 4 if elements <= 4096 else 8, 2)


def weights(query: Tensor, head_dim: int) -> Config:
    return table("dbias", query, head_dim, None, None)


def additive(kernel: str, features: int) -> Config:
    """For a kernel of additive attention, on every device: "forward", "dq" or "dkv".

    features: those that a program of the backward holds, a power of two up to 256: its own rows are so many that a
    thread has 8 of them. There have to be more threads than features: the compiler then lets each thread load the
    numbers of the other side that it needs, and does not send them through shared memory.
    """
    if kernel == "forward":
        return Config(32, 32, 8, 1)
    own, num_warps = (16, 16) if features > 128 else (min(64, 2048 // features), 8)
    return Config(own, 32, num_warps, 1) if kernel == "dq" else Config(32, own, num_warps, 1)


def linear_loss(kernel: str, dtype: torch.dtype) -> Config:
    """For a product of the linear head with its loss: "slopes", or "gradients", which are made of the slopes.

    32 tokens for the slopes: the offsets of 64 in the target take more registers than there are, and for 10.0 Triton
    3.7.1 fails to compile them.
    """
    if kernel == "slopes":
        return Config(32, 64, 8, 2)
    return Config(64, 64, 8, 2) if dtype == torch.float32 else Config(64, 128, 8, 2)


def programs_wanted(tensor: Tensor) -> int:
    """Enough programs to fill the device twice."""
    return 2 * _multiprocessors(tensor.device.index or 0) if tensor.is_cuda else 8


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
