"""Problems for the correctness harness: seeded, reproducible, deliberately awkward.

A case is a description (sizes, dtype, mask terms, layout, ...) that prints on one line; `build_problem` turns it into
tensors. Case ``k`` of seed ``s`` depends on nothing but ``(s, k)``, so one failing case can be run again alone.

Every input tensor is carved out of a larger buffer whose other elements hold a guard value. With NaN as the guard a
read beyond the tensor shows up in the result; running again with another guard and comparing bitwise finds the reads
whose value was merely multiplied by zero.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LENGTHS = (1, 2, 7, 16, 17, 31, 48, 49, 63, 64, 65, 96, 97, 113, 127, 128, 129, 197, 203, 257)
LONG_LENGTHS = (511, 512, 777, 1023)
HEAD_DIMS = (1, 8, 16, 24, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256)
LAYOUTS = ("contiguous", "blhd", "packed", "sliced", "expanded")
TERM_KINDS = ("causal", "window", "prefix", "key_lengths", "key_padding", "dense", "segments")
ALIGNMENTS = ("top_left", "bottom_right")

# Bounds on one case, so that the float64 oracle stays within a fraction of a second on two cores.
MAX_PAIRS = 600_000  # B * Hq * L * S
MAX_WORK = 24_000_000  # B * Hq * L * S * (D + Dv)
# The same for slow targets, such as a kernel in an interpreter.
SMALL_PAIRS = 20_000
SMALL_WORK = 2_000_000

GUARD = 72  # guard elements before and after a carved tensor


@dataclass(frozen=True)
class TermSpec:
    """One mask term, described without tensors."""

    kind: str
    align: str = "top_left"
    left: int | None = None
    right: int | None = None
    shape: tuple[int, ...] = ()  # of a dense mask
    pattern: str = "random"  # of a dense mask: random, blocks or empty_rows; of key_padding: random or tail

    def __str__(self) -> str:
        if self.kind == "causal":
            return f"causal({self.align})"
        if self.kind == "window":
            return f"window({self.left}, {self.right}, {self.align})"
        if self.kind == "dense":
            return f"dense({'x'.join(map(str, self.shape))}, {self.pattern})"
        if self.kind == "key_padding":
            return f"key_padding({self.pattern})"
        return self.kind


@dataclass(frozen=True)
class Term:
    """A mask term with its tensors: `tensors` holds lengths, keep, or the two id tensors, as the kind needs."""

    spec: TermSpec
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """An attention problem: query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv)."""

    seed: int
    index: int
    batch: int = 1
    heads_q: int = 1
    heads_kv: int = 1
    len_q: int = 16
    len_k: int = 16
    dim_qk: int = 16
    dim_v: int = 16
    dtype: torch.dtype = torch.float32
    terms: tuple[TermSpec, ...] = ()
    bias_shape: tuple[int, ...] | None = None
    bias_float32: bool = False  # float32 beside query, key and value in half precision
    bias_has_inf: bool = False  # some entries are -inf, as float masks written for SDPA have
    dropout_p: float = 0.0
    scale: float | None = None
    layout: str = "contiguous"
    lse_grad: bool = False  # a gradient flows into lse too

    @property
    def effective_scale(self) -> float:
        return self.dim_qk**-0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        parts = [
            f"B{self.batch} Hq{self.heads_q} Hkv{self.heads_kv} L{self.len_q} S{self.len_k} D{self.dim_qk}"
            f" Dv{self.dim_v} {dtype_name(self.dtype)} {self.layout}"
        ]
        parts += [str(term) for term in self.terms]
        if self.bias_shape is not None:
            extras = (", float32" if self.bias_float32 else "") + (", -inf" if self.bias_has_inf else "")
            parts.append(f"bias({'x'.join(map(str, self.bias_shape))}{extras})")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p}")
        if self.scale is not None:
            parts.append(f"scale {self.scale}")
        if self.lse_grad:
            parts.append("lse gradient")
        return " ".join(parts)


@dataclass(frozen=True)
class WeightsCase:
    """A call of attention_weights on the problem of `attention`."""

    attention: Case
    average_heads: bool = True

    @property
    def index(self) -> int:
        return self.attention.index

    def __str__(self) -> str:
        return f"weights {'averaged' if self.average_heads else 'per head'} {self.attention}"


@dataclass(frozen=True)
class AdditiveCase:
    """A call of additive_attention on the problem of `attention`, which has one head."""

    attention: Case
    spread: float = 1.0  # standard deviation of query and key
    weight_float32: bool = False  # the score weight, beside inputs in half precision

    @property
    def index(self) -> int:
        return self.attention.index

    def __str__(self) -> str:
        extras = ", float32 weight" if self.weight_float32 else ""
        return f"additive spread {self.spread:g}{extras} {self.attention}"


@dataclass(frozen=True)
class LossCase:
    """A masked reconstruction loss. `layout` names the relation of input and mask.

    image: input (B, C, H, W), mask (B, H/p, W/p); token: input (B, N, D), mask (B, N); element: mask broadcastable to
    the input.
    """

    seed: int
    index: int
    layout: str = "image"
    shape: tuple[int, ...] = (1, 3, 8, 8)
    mask_shape: tuple[int, ...] = (1, 2, 2)
    patch_size: int | None = 4
    kind: str = "l2"
    reduction: str = "masked_mean"
    normalize_target: bool = False
    beta: float = 1.0
    dtype: torch.dtype = torch.float32
    density: float = 0.6
    channels_last: bool = False

    def __str__(self) -> str:
        text = (
            f"{self.kind} {self.layout} {'x'.join(map(str, self.shape))} mask {'x'.join(map(str, self.mask_shape))}"
            f" {self.reduction} {dtype_name(self.dtype)} counted {self.density:g}"
        )
        if self.patch_size is not None:
            text += f" patch {self.patch_size}"
        if self.kind == "smooth_l1":
            text += f" beta {self.beta:g}"
        if self.normalize_target:
            text += " normalised target"
        if self.channels_last:
            text += " channels_last"
        return text


@dataclass(frozen=True)
class LinearLossCase:
    """A prediction head fused with its loss. `loss` says how the target looks (never layout "element") and what is done
    with it; its `shape` is that of the target."""

    loss: LossCase
    dim_in: int = 8
    bias: bool = True

    @property
    def index(self) -> int:
        return self.loss.index

    @property
    def tokens(self) -> tuple[int, int, int]:
        """(B, N, P) of the predictions."""
        if self.loss.layout == "token":
            batch, tokens, size = self.loss.shape
            return batch, tokens, size
        batch, rows, columns = self.loss.mask_shape
        return batch, rows * columns, self.loss.shape[1] * (self.loss.patch_size or 1) ** 2

    def __str__(self) -> str:
        return f"linear from {self.dim_in}{'' if self.bias else ' without bias'} {self.loss}"


@dataclass
class Problem:
    """The tensors of a case. `buffers` are the storages the inputs were carved from, to see whether anything wrote."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    terms: tuple[Term, ...]
    grad_out: Tensor  # (B, Hq, L, Dv)
    grad_lse: Tensor | None  # (B, Hq, L)
    buffers: list[Tensor] = field(default_factory=list)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_cases(n: int, seed: int, dtype: torch.dtype | None = None) -> list[Case]:
    """Cases 0 .. n-1 of `seed`; `dtype` replaces every case's own."""
    return [random_case(seed, index, dtype) for index in range(n)]


def random_case(seed: int, index: int, dtype: torch.dtype | None = None, small: bool = False) -> Case:
    """Case `index` of `seed`; `small` bounds it further. One case in five has neither mask nor bias nor dropout, so
    that any kernel is judged."""
    rng = random.Random(f"attention {seed} {index}")
    case = _random_sizes(rng, seed, index, small)
    case = replace(case, dtype=rng.choice(_DTYPE_BAG), layout=rng.choice(LAYOUTS))
    if rng.random() < 0.2:
        case = replace(case, scale=rng.choice((0.05, 0.3, 1.0, -0.2)))
    if index % 5 == 0:
        return case if dtype is None else replace(case, dtype=dtype)
    term_count = rng.choice((0, 1, 1, 1, 2, 2, 3))
    kinds = [TERM_KINDS[index % len(TERM_KINDS)], *rng.sample(TERM_KINDS, 2)][:term_count]
    case = replace(case, terms=tuple(_random_term(rng, kind, case) for kind in kinds))
    if rng.random() < 0.35:
        case = replace(case, bias_shape=_random_bias_shape(rng, case), bias_has_inf=rng.random() < 0.25)
        half = (dtype or case.dtype) in (torch.bfloat16, torch.float16)
        case = replace(case, bias_float32=rng.random() < 0.25 and half)
    if rng.random() < 0.2:
        case = replace(case, dropout_p=rng.choice((0.1, 0.25, 0.5, 0.9)))
    if rng.random() < 0.2:
        case = replace(case, lse_grad=True)
    return case if dtype is None else replace(case, dtype=dtype)


def random_weights_cases(n: int, seed: int, dtype: torch.dtype | None = None) -> list[WeightsCase]:
    return [random_weights_case(seed, index, dtype) for index in range(n)]


def random_weights_case(seed: int, index: int, dtype: torch.dtype | None = None, small: bool = False) -> WeightsCase:
    attention = random_case(seed + 7_000_003, index, dtype, small)
    return WeightsCase(replace(attention, index=index, lse_grad=False), average_heads=index % 3 != 2)


def random_additive_case(seed: int, index: int, dtype: torch.dtype | None = None, small: bool = False) -> AdditiveCase:
    rng = random.Random(f"additive {seed} {index}")
    sizes = replace(_random_sizes(rng, seed, index, small), heads_q=1, heads_kv=1)
    # The oracle holds every feature of every pair.
    most = MAX_WORK // 16 if not small else SMALL_WORK // 16
    while sizes.batch * sizes.len_q * sizes.len_k * sizes.dim_qk > most:
        if sizes.batch > 1:
            sizes = replace(sizes, batch=sizes.batch - 1)
        elif sizes.dim_qk > 64:
            sizes = replace(sizes, dim_qk=59)
        else:
            sizes = replace(sizes, len_q=rng.choice(LENGTHS), len_k=rng.choice(LENGTHS))
    case = replace(sizes, dtype=dtype or rng.choice(_DTYPE_BAG), layout=rng.choice(LAYOUTS))
    term_count = rng.choice((0, 1, 1, 1, 2))
    kinds = [TERM_KINDS[index % len(TERM_KINDS)], *rng.sample(TERM_KINDS, 1)][:term_count]
    case = replace(case, terms=tuple(_random_term(rng, kind, case) for kind in kinds), lse_grad=rng.random() < 0.3)
    half = case.dtype in (torch.bfloat16, torch.float16)
    # 12: products of exponentials are cut off; 40: exponentials that float32 does not hold, and large sums that cancel.
    spread = rng.choice((1.0, 1.0, 1.0, 0.1, 4.0, 12.0, 40.0))
    return AdditiveCase(case, spread=spread, weight_float32=half and rng.random() < 0.3)


def random_loss_cases(n: int, seed: int, dtype: torch.dtype | None = None) -> list[LossCase]:
    return [random_loss_case(seed, index, dtype) for index in range(n)]


def random_loss_case(seed: int, index: int, dtype: torch.dtype | None = None, small: bool = False) -> LossCase:
    rng = random.Random(f"loss {seed} {index}")
    layout = ("image", "token", "element")[index % 3]
    batch = rng.choice((1, 2, 3, 0 if rng.random() < 0.2 else 2))
    patch_size = None
    if layout == "image":
        patch_size = rng.choice((1, 2, 4, 7, 8, 16))
        grid_h, grid_w = rng.choice((1, 2, 3, 5)), rng.choice((1, 2, 3, 6))
        shape: tuple[int, ...] = (batch, rng.choice((1, 3, 4)), grid_h * patch_size, grid_w * patch_size)
        mask_shape: tuple[int, ...] = (batch, grid_h, grid_w)
    elif layout == "token":
        shape = (batch, rng.choice((1, 7, 49, 196)), rng.choice((2, 17, 48, 192)))
        mask_shape = shape[:2]
    else:
        shape = tuple(rng.choice((1, 2, 5, 17)) for _ in range(rng.choice((0, 1, 2, 3)))) + (rng.choice((2, 33, 100)),)
        mask_shape = tuple(1 if rng.random() < 0.3 else size for size in shape)
        if len(shape) != 3:  # where two dimensions could also be those of tokens
            mask_shape = mask_shape[rng.choice((0, 0, len(shape) // 2)) :]
    normalisable = layout != "image" or shape[1] * (patch_size or 1) ** 2 > 1
    return LossCase(
        seed=seed,
        index=index,
        layout=layout,
        shape=shape,
        mask_shape=mask_shape,
        patch_size=patch_size,
        kind=rng.choice(("l2", "l1", "smooth_l1")),
        reduction=rng.choice(("masked_mean", "masked_mean", "sum", "mean", "none")),
        normalize_target=normalisable and layout != "element" and rng.random() < 0.35,
        beta=rng.choice((1.0, 0.25, 2.0)),
        dtype=dtype or rng.choice(_DTYPE_BAG),
        density=rng.choice((0.6, 0.6, 0.3, 1.0, 0.0)),
        channels_last=layout == "image" and rng.random() < 0.3,
    )


def random_linear_loss_case(
    seed: int, index: int, dtype: torch.dtype | None = None, small: bool = False
) -> LinearLossCase:
    rng = random.Random(f"linear loss {seed} {index}")
    # Of every three cases of the losses the last has a mask of elements.
    loss = random_loss_case(seed + 11_000_003, index // 2 * 3 + index % 2, dtype, small)
    reduction = "masked_mean" if loss.reduction == "none" else loss.reduction
    dim_in = rng.choice((1, 7, 48, 65, 192))
    return LinearLossCase(replace(loss, index=index, reduction=reduction), dim_in, bias=rng.random() < 0.8)


_DTYPE_BAG = (torch.float32,) * 4 + (torch.bfloat16,) * 2 + (torch.float16,) * 2 + (torch.float64,)


def _random_sizes(rng: random.Random, seed: int, index: int, small: bool) -> Case:
    max_pairs, max_work = (SMALL_PAIRS, SMALL_WORK) if small else (MAX_PAIRS, MAX_WORK)
    heads_kv = rng.choice((1, 2, 3))
    group = rng.choice((1, 1, 1, 2, 4))
    len_q, len_k = rng.choice(LENGTHS), rng.choice(LENGTHS)
    if rng.random() < 0.3:
        len_k = len_q
    if rng.random() < 0.06:
        len_q, len_k = rng.choice(LONG_LENGTHS), rng.choice(LONG_LENGTHS)
    dim_qk = rng.choice(HEAD_DIMS)
    dim_v = rng.choice(HEAD_DIMS) if rng.random() < 0.25 else dim_qk
    batch = rng.choice((1, 2, 2, 3))
    if rng.random() < 0.05:
        empty = rng.choice(("batch", "query", "key"))
        batch, len_q, len_k = (
            0 if what == empty else size for what, size in (("batch", batch), ("query", len_q), ("key", len_k))
        )

    # Shrink batch, then heads, then the head dimensions, then the query length until the case is affordable.
    def pairs() -> int:
        return batch * heads_kv * group * len_q * len_k

    while pairs() > max_pairs or pairs() * (dim_qk + dim_v) > max_work:
        if batch > 1:
            batch -= 1
        elif heads_kv > 1:
            heads_kv -= 1
        elif group > 2:
            group = 2
        elif max(dim_qk, dim_v) > 40:
            dim_qk, dim_v = min(dim_qk, 40), min(dim_v, 40)
        else:
            len_q = rng.choice(LENGTHS)
    return Case(
        seed=seed,
        index=index,
        batch=batch,
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim_qk,
        dim_v=dim_v,
    )


def _random_term(rng: random.Random, kind: str, case: Case) -> TermSpec:
    B, H, L, S = case.batch, case.heads_q, case.len_q, case.len_k
    align = rng.choice(ALIGNMENTS)
    if kind == "causal":
        return TermSpec(kind, align=align)
    if kind == "window":
        reach = (0, 1, 5, 16, 63, 64, 100, None)
        left, right = rng.choice(reach), rng.choice(reach)
        if rng.random() < 0.1:
            left, right = -3, 10  # a band that lies wholly to the right of the diagonal
        return TermSpec(kind, align=align, left=left, right=right)
    if kind == "dense":
        shape = rng.choice(
            (
                (L, S),
                (1, 1, L, S),
                (B, 1, 1, S),
                (B, 1, L, S),
                (1, H, L, S),
                (B, H, L, S),
                (H, L, S),
                (S,),
                (B, 1, L, 1),
            )
        )
        return TermSpec(kind, shape=shape, pattern=rng.choice(("random", "blocks", "empty_rows")))
    if kind == "key_padding":
        return TermSpec(kind, pattern=rng.choice(("tail", "random")))
    return TermSpec(kind)


def _random_bias_shape(rng: random.Random, case: Case) -> tuple[int, ...]:
    B, H, L, S = case.batch, case.heads_q, case.len_q, case.len_k
    # Every subset of broadcast dimensions; sometimes with the leading ones left out.
    broadcast = rng.randrange(16)
    shape = tuple(1 if broadcast >> d & 1 else size for d, size in enumerate((B, H, L, S)))
    while len(shape) > 2 and shape[0] == 1 and rng.random() < 0.5:
        shape = shape[1:]
    return shape


def build_problem(case: Case, guard: float = float("nan"), device: torch.device | str = "cpu") -> Problem:
    """Draws the tensors of `case`. The values depend on the case alone; `guard` fills the memory around the inputs."""
    generator = torch.Generator().manual_seed(_tensor_seed(case.seed, case.index))
    buffers: list[Tensor] = []

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(case.dtype)

    def place(data: Tensor, layout: str) -> Tensor:
        view, buffer = carve(data.to(device), layout, guard)
        buffers.append(buffer)
        return view

    B, Hq, Hkv, L, S = case.batch, case.heads_q, case.heads_kv, case.len_q, case.len_k
    query = normal(B, Hq, L, case.dim_qk)
    key = normal(B, Hkv, S, case.dim_qk)
    value = normal(B, Hkv, S, case.dim_v)
    if case.layout == "expanded" and B > 1:
        # One key and value for the whole batch, with stride 0.
        key, value = key[:1].expand_as(key), value[:1].expand_as(value)
    bias = None
    if case.bias_shape is not None:
        bias = normal(*case.bias_shape)
        if case.bias_float32:
            bias = bias.float()
        if case.bias_has_inf:
            bias[torch.rand(case.bias_shape, generator=generator) < 0.3] = float("-inf")
    terms = tuple(_build_term(spec, case, generator) for spec in case.terms)
    grad_out = normal(B, Hq, L, case.dim_v)
    lse_dtype = torch.float32
    grad_lse = torch.randn((B, Hq, L), generator=generator, dtype=lse_dtype).to(device) if case.lse_grad else None
    return Problem(
        case=case,
        query=place(query, "blhd" if case.layout == "expanded" else case.layout),
        key=place(key, case.layout),
        value=place(value, case.layout),
        bias=None if bias is None else place(bias, "sliced" if case.layout == "sliced" else "contiguous"),
        terms=tuple(
            Term(term.spec, tuple(place(t, "contiguous" if t.dim() == 1 else case.layout) for t in term.tensors))
            for term in terms
        ),
        grad_out=place(grad_out, "contiguous" if case.layout == "expanded" else case.layout),
        grad_lse=grad_lse,
        buffers=buffers,
    )


def carve(data: Tensor, layout: str, guard: float) -> tuple[Tensor, Tensor]:
    """Copies `data` into a larger guarded buffer, in the memory order of `layout`.

    Returns the view that holds the data, and the whole buffer (1-D). blhd: (B, H, L, D) over (B, L, H, D) memory;
    packed: one of three interleaved along L, as a packed projection leaves them; sliced: cut out of a larger tensor in
    every dimension, at an odd offset; expanded: batch stride 0. Layouts that do not fit the rank fall back to
    contiguous.
    """
    fill: float | bool = guard
    if data.dtype == torch.bool:
        fill = guard != guard  # True around the mask for a NaN guard, False for any other
    elif not data.dtype.is_floating_point:
        fill = 0 if guard == guard else 3

    def buffer_of(elements: int) -> Tensor:
        return torch.full((elements + 2 * GUARD,), fill, dtype=data.dtype, device=data.device)

    if layout == "sliced" and data.dim() >= 2:
        larger = [size + 2 for size in data.shape[:-1]] + [data.shape[-1] + 3]
        strides = [1]
        for size in reversed(larger[1:]):
            strides.insert(0, strides[0] * size)
        buffer = buffer_of(strides[0] * larger[0])
        view = buffer.as_strided(data.shape, strides, GUARD + 1 + sum(strides[:-1]))
    elif layout in ("blhd", "packed") and data.dim() == 4:
        B, H, L, D = data.shape
        times = 3 if layout == "packed" else 1
        buffer = buffer_of(B * L * times * H * D)
        offset = GUARD + (H * D if times == 3 else 0)
        view = buffer.as_strided(data.shape, (L * times * H * D, D, times * H * D, 1), offset)
    elif layout == "expanded" and data.dim() == 4 and data.shape[0] > 1:
        buffer = buffer_of(data[0].numel())
        view = buffer[GUARD : GUARD + data[0].numel()].view(data.shape[1:]).expand(data.shape)
        view[0].copy_(data[0])
        return view, buffer
    else:
        buffer = buffer_of(data.numel())
        view = buffer[GUARD : GUARD + data.numel()].view(data.shape)
    view.copy_(data)
    return view, buffer


def _tensor_seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % (2**63)


def _build_term(spec: TermSpec, case: Case, generator: torch.Generator) -> Term:
    B, L, S = case.batch, case.len_q, case.len_k

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int64)

    if spec.kind in ("prefix", "key_lengths"):
        # Lengths outside [0, S] are legal and mean none and all.
        lengths = integers(-2, S + 4, B)
        return Term(spec, (lengths.int() if case.index % 3 == 0 else lengths,))
    if spec.kind == "key_padding":
        if spec.pattern == "tail":
            return Term(spec, (torch.arange(S) < integers(0, S + 1, B, 1),))
        return Term(spec, (torch.rand((B, S), generator=generator) < 0.5,))
    if spec.kind == "dense":
        return Term(spec, (_dense_keep(spec, generator),))
    if spec.kind == "segments":
        # Sorted ids make documents; ids may be any integers, and a segment may be missing on either side.
        labels = torch.tensor([-1, 0, 1, 2**40, 7])
        query_ids = labels[integers(0, 5, B, L).sort(dim=-1).values]
        key_ids = labels[integers(0, 5, B, S).sort(dim=-1).values]
        return Term(spec, (query_ids, key_ids))
    return Term(spec)


def _dense_keep(spec: TermSpec, generator: torch.Generator) -> Tensor:
    if spec.pattern == "blocks" and len(spec.shape) >= 2:
        # 32 x 32 blocks, so that empty, full and partial tiles all occur.
        rows, columns = spec.shape[-2:]
        coarse = (*spec.shape[:-2], -(-rows // 32), -(-columns // 32))
        keep = torch.rand(coarse, generator=generator) < 0.6
        return keep.repeat_interleave(32, -2).repeat_interleave(32, -1)[..., :rows, :columns].contiguous()
    keep = torch.rand(spec.shape, generator=generator) < 0.5
    if spec.pattern == "empty_rows" and len(spec.shape) >= 2:
        keep &= torch.rand((*spec.shape[:-1], 1), generator=generator) < 0.7
    return keep
