"""`Mask`: an immutable description of which keys each query may attend to.

True means *may attend*, everywhere. A mask is the AND of terms; analytic terms (causal, window, prefix, lengths,
padding, segments) are never expanded to L x S on the way to a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastattn import tiles
from fastattn.tiles import EMPTY, FULL, PARTIAL, TileMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

UNLIMITED = 2**62  # a band limit that excludes nothing; kUnlimited of csrc/core/params.h
MAX_DENSE_MASKS = 8  # masks that one mask_tiles call packs together; MaskTilesParams::kMaxMasks
_CACHE_ENTRIES = 8
_ALIGNMENTS = ("top_left", "bottom_right")
_LENGTH_DTYPES = (torch.int32, torch.int64)

Lengths = Tensor | Sequence[int]
Segmented = tuple[Tensor, Tensor]  # ids of the queries (B|1, L) and of the keys (B|1, S)
TileBuilder = Callable[[list[Tensor], int, int, int, int], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


class KernelMask(NamedTuple):
    """The canonical form of a `Mask` for one problem: the AND of every part that is not None.

    `band` is (left_top, right_top, left_bottom, right_bottom): -left_top <= j - i <= right_top and
    -left_bottom <= j - i - (S - L) <= right_bottom, for any L and S.
    """

    band: tuple[int, int, int, int] | None = None
    prefix_lengths: Tensor | None = None  # int64 (B|1,)
    key_lengths: Tensor | None = None  # int64 (B|1,)
    key_keep: Tensor | None = None  # bool (B|1, S)
    query_segments: Tensor | None = None  # int64 (B|1, L)
    key_segments: Tensor | None = None  # int64 (B|1, S)
    tile_map: TileMap | None = None  # the dense part, packed


def _indices(L: int, S: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Query indices (L, 1) and key indices (S,)."""
    return torch.arange(L, device=device).unsqueeze(-1), torch.arange(S, device=device)


def _classes(live: Tensor, full: Tensor) -> Tensor:
    """Classes from "may have an attending pair" and "has only attending pairs"."""
    # full without live is the vacuous case of a tile whose allowed range is empty.
    return torch.where(live, torch.where(full, FULL, PARTIAL), EMPTY).to(torch.uint8)


# Each term knows its tensors, its meaning (`to_dense`, broadcastable to (B, H, L, S)) and the classes of its tiles
# (broadcastable (B|1, H|1, nQ, nK)). `check` raises ValueError when it does not fit the problem.


@dataclass(frozen=True)
class Band:
    """-left <= j - i - o <= right with o = 0 (top_left) or S - L (bottom_right)."""

    left: int
    right: int
    align: str

    def check(self, B: int, H: int, L: int, S: int) -> None:
        """Fits every problem."""

    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def _limits(self, L: int, S: int) -> tuple[int, int]:
        offset = 0 if self.align == "top_left" else S - L
        return offset - self.left, offset + self.right

    def to_dense(self, L: int, S: int, device: torch.device | None) -> Tensor:
        i, j = _indices(L, S, device)
        low, high = self._limits(L, S)
        return ((j - i >= low) & (j - i <= high))[None, None]

    def tile_classes(self, L: int, S: int, block_m: int, block_n: int, device: torch.device | None) -> Tensor:
        i0, i1 = (x.unsqueeze(-1) for x in tiles.tile_ranges(L, block_m, device))  # (nQ, 1)
        j0, j1 = tiles.tile_ranges(S, block_n, device)  # (nK,)
        low, high = self._limits(L, S)
        nearest, farthest = j0 - i1, j1 - i0  # (nQ, nK); the tile holds every difference between them
        live = (farthest >= low) & (nearest <= high)
        full = (nearest >= low) & (farthest <= high)
        if low > high:
            live = torch.zeros_like(live)
        return _classes(live, full)[None, None]

    def __repr__(self) -> str:
        if self.left == UNLIMITED and self.right == 0:
            return f"Mask.causal(align={self.align!r})"
        left, right = (None if side == UNLIMITED else side for side in (self.left, self.right))
        return f"Mask.window({left}, {right}, align={self.align!r})"


@dataclass(frozen=True, eq=False)
class PrefixLengths:
    """j <= i, or j < lengths[b]."""

    lengths: Tensor

    def check(self, B: int, H: int, L: int, S: int) -> None:
        _check_batch("prefix lengths", self.lengths, B)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.lengths,)

    def to_dense(self, L: int, S: int, device: torch.device | None) -> Tensor:
        i, j = _indices(L, S, device)
        return (j <= i) | (j < self.lengths.view(-1, 1, 1, 1))

    def tile_classes(self, L: int, S: int, block_m: int, block_n: int, device: torch.device | None) -> Tensor:
        i0, i1 = (x.unsqueeze(-1) for x in tiles.tile_ranges(L, block_m, device))
        j0, j1 = tiles.tile_ranges(S, block_n, device)
        lengths = self.lengths.view(-1, 1, 1, 1)
        return _classes((j0 <= i1) | (j0 < lengths), (j1 <= i0) | (j1 < lengths))

    def __repr__(self) -> str:
        return f"Mask.prefix({_summary(self.lengths)})"


@dataclass(frozen=True, eq=False)
class KeyLengths:
    """j < lengths[b]."""

    lengths: Tensor

    def check(self, B: int, H: int, L: int, S: int) -> None:
        _check_batch("key lengths", self.lengths, B)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.lengths,)

    def to_dense(self, L: int, S: int, device: torch.device | None) -> Tensor:
        return torch.arange(S, device=device) < self.lengths.view(-1, 1, 1, 1)

    def tile_classes(self, L: int, S: int, block_m: int, block_n: int, device: torch.device | None) -> Tensor:
        j0, j1 = tiles.tile_ranges(S, block_n, device)
        lengths = self.lengths.view(-1, 1, 1, 1)
        return _classes(j0 < lengths, j1 < lengths)

    def __repr__(self) -> str:
        return f"Mask.key_lengths({_summary(self.lengths)})"


@dataclass(frozen=True, eq=False)
class KeyKeep:
    """keep[b, j]."""

    keep: Tensor

    def check(self, B: int, H: int, L: int, S: int) -> None:
        _check_batch("key padding", self.keep, B)
        if self.keep.shape[1] != S:
            raise ValueError(f"mask: key padding must be (B, S) with S = {S} keys, got {tuple(self.keep.shape)}")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keep,)

    def to_dense(self, L: int, S: int, device: torch.device | None) -> Tensor:
        return self.keep[:, None, None, :]

    def tile_classes(self, L: int, S: int, block_m: int, block_n: int, device: torch.device | None) -> Tensor:
        return tiles.dense_classes(self.keep[:, None, None, :], 1, block_n)

    def __repr__(self) -> str:
        return f"Mask.key_padding({_summary(self.keep)})"


@dataclass(frozen=True, eq=False)
class Dense:
    """keep[b, h, i, j], broadcast from 4 dimensions."""

    keep: Tensor

    def check(self, B: int, H: int, L: int, S: int) -> None:
        for size, wanted in zip(self.keep.shape, (B, H, L, S), strict=True):
            if size != 1 and size != wanted:
                raise ValueError(
                    f"mask must broadcast to (B, Hq, L, S) = {(B, H, L, S)}, got a bool mask viewed as "
                    f"{tuple(self.keep.shape)}"
                )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keep,)

    def to_dense(self, L: int, S: int, device: torch.device | None) -> Tensor:
        return self.keep

    def tile_classes(self, L: int, S: int, block_m: int, block_n: int, device: torch.device | None) -> Tensor:
        batch, heads = self.keep.shape[:2]
        return tiles.dense_classes(self.keep.expand(batch, heads, L, S), block_m, block_n)

    def __repr__(self) -> str:
        return f"Mask.dense({_summary(self.keep)})"


@dataclass(frozen=True, eq=False)
class Segments:
    """query_ids[b, i] == key_ids[b, j]."""

    query_ids: Tensor
    key_ids: Tensor

    def check(self, B: int, H: int, L: int, S: int) -> None:
        for name, ids, length in (("query_ids", self.query_ids, L), ("key_ids", self.key_ids, S)):
            _check_batch(f"segment {name}", ids, B)
            if ids.shape[1] != length:
                raise ValueError(f"mask: segment {name} must be (B, {length}), got {tuple(ids.shape)}")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.query_ids, self.key_ids)

    def to_dense(self, L: int, S: int, device: torch.device | None) -> Tensor:
        return self.query_ids[:, None, :, None] == self.key_ids[:, None, None, :]

    def tile_classes(self, L: int, S: int, block_m: int, block_n: int, device: torch.device | None) -> Tensor:
        (q_low, q_high), (k_low, k_high) = _block_range(self.query_ids, block_m), _block_range(self.key_ids, block_n)
        q_low, q_high = q_low[:, None, :, None], q_high[:, None, :, None]  # (B, 1, nQ, 1)
        k_low, k_high = k_low[:, None, None, :], k_high[:, None, None, :]  # (B, 1, 1, nK)
        live = (q_low <= k_high) & (k_low <= q_high)
        full = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return _classes(live, full)

    def __repr__(self) -> str:
        return f"Mask.segments({_summary(self.query_ids)}, {_summary(self.key_ids)})"


Term = Band | PrefixLengths | KeyLengths | KeyKeep | Dense | Segments


def _check_batch(what: str, tensor: Tensor, B: int) -> None:
    if tensor.shape[0] != B and tensor.shape[0] != 1:
        raise ValueError(f"mask: {what} must have batch size {B} or 1, got shape {tuple(tensor.shape)}")


def _summary(tensor: Tensor) -> str:
    return f"<{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}>"


def _block_range(ids: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest id of each block: (B, N) -> two (B, blocks)."""
    if ids.shape[-1] == 0:
        return ids, ids
    tail = -ids.shape[-1] % block
    # The last id repeated changes neither the smallest nor the largest.
    padded = torch.cat((ids, ids[:, -1:].expand(-1, tail)), dim=-1).unflatten(-1, (-1, block))
    return padded.amin(-1), padded.amax(-1)


def check_layout(name: str, tensor: Tensor) -> None:
    """Raises for a tensor whose elements do not lie in memory by strides."""
    if tensor.is_nested:
        raise TypeError(f"{name} must not be a nested tensor: pad it; packed sequences go to attention_varlen")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got one of layout {tensor.layout}: pass its to_dense()")


def _check_tensor(name: str, tensor: object, dtypes: tuple[torch.dtype, ...], rank: int, shape: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        seen = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a {accepted} tensor {shape}, got {seen}")
    check_layout(name, tensor)
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    return tensor


def _check_lengths(lengths: Lengths) -> Tensor:
    if isinstance(lengths, (list, tuple)):
        for length in lengths:
            if isinstance(length, bool) or not isinstance(length, int):
                raise TypeError(f"lengths must be ints, got {length!r}")
        lengths = torch.tensor(lengths, dtype=torch.int64)
    return _check_tensor("lengths", lengths, _LENGTH_DTYPES, 1, "(B,)")


def _check_align(align: str) -> str:
    if align not in _ALIGNMENTS:
        raise ValueError(f"align must be one of {', '.join(map(repr, _ALIGNMENTS))}, got {align!r}")
    return align


def _check_side(name: str, side: int | None) -> int:
    if side is None:
        return UNLIMITED
    if isinstance(side, bool) or not isinstance(side, int):
        raise TypeError(f"{name} must be an int or None (unlimited), got {side!r}")
    return max(-UNLIMITED, min(side, UNLIMITED))


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which keys each query may attend to. Immutable; `a & b` composes; built by the constructors below.

    Shapes: B batch, H query heads, L queries, S keys; i is a query's index, j a key's. Tensors are kept, not copied:
    a mask follows an in-place change of its tensors.
    """

    terms: tuple[Term, ...]
    _cache: dict = field(default_factory=dict, init=False)

    @staticmethod
    def causal(align: str = "top_left") -> Mask:
        """j <= i + o, with o = 0 for "top_left" and S - L for "bottom_right"."""
        return _CAUSAL[_check_align(align)]

    @staticmethod
    def window(left: int | None, right: int | None, align: str = "top_left") -> Mask:
        """i + o - left <= j <= i + o + right, both ends included; None is unlimited; o as in `causal`."""
        return Mask((Band(_check_side("left", left), _check_side("right", right), _check_align(align)),))

    @staticmethod
    def prefix(lengths: Lengths) -> Mask:
        """j <= i, or j < lengths[b]. lengths: int (B,). Below 1 is causal, S and more is everything."""
        return Mask((PrefixLengths(_check_lengths(lengths)),))

    @staticmethod
    def key_lengths(lengths: Lengths) -> Mask:
        """j < lengths[b]. lengths: int (B,). Below 1 is no key, S and more is every key."""
        return Mask((KeyLengths(_check_lengths(lengths)),))

    @staticmethod
    def key_padding(keep: Tensor) -> Mask:
        """keep[b, j]. keep: bool (B, S), True = a real key (the opposite of torch's key_padding_mask)."""
        return Mask((KeyKeep(_check_tensor("keep", keep, (torch.bool,), 2, "(B, S)")),))

    @staticmethod
    def dense(keep: Tensor) -> Mask:
        """keep[b, h, i, j]. keep: bool, broadcastable to (B, H, L, S)."""
        shape = "broadcastable to (B, Hq, L, S)"
        if isinstance(keep, Tensor) and keep.dim() < 4:
            check_layout("keep", keep)
            keep = keep[(None,) * (4 - keep.dim())]
        return Mask((Dense(_check_tensor("keep", keep, (torch.bool,), 4, shape)),))

    @staticmethod
    def segments(query_ids: Tensor, key_ids: Tensor) -> Mask:
        """Equal ids attend: query_ids[b, i] == key_ids[b, j]. int (B, L) and (B, S)."""
        return Mask(
            (
                Segments(
                    _check_tensor("query_ids", query_ids, _LENGTH_DTYPES, 2, "(B, L)"),
                    _check_tensor("key_ids", key_ids, _LENGTH_DTYPES, 2, "(B, S)"),
                ),
            )
        )

    @staticmethod
    def from_flex(block_mask: BlockMask) -> Mask:
        """The mask that FlexAttention applies for a `BlockMask`: full blocks attend wholly, partial blocks follow
        `mask_mod`, blocks that are not listed do not attend. Expanded to (B, H, L, S) bool once, here."""
        from torch.nn.attention.flex_attention import BlockMask, create_mask

        if not isinstance(block_mask, BlockMask):
            raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
        L, S = block_mask.seq_lengths
        block_q, block_k = block_mask.BLOCK_SIZE
        n_k = -(-S // block_k)
        B, H = block_mask.kv_num_blocks.shape[:2]

        def listed(num_blocks: Tensor, indices: Tensor) -> Tensor:  # -> bool (B, H, L, S)
            valid = torch.arange(indices.shape[-1], device=indices.device) < num_blocks.unsqueeze(-1)
            blocks = torch.zeros(*indices.shape[:3], n_k + 1, dtype=torch.bool, device=indices.device)
            blocks.scatter_(-1, torch.where(valid, indices, n_k).long(), True)  # the extra column takes the unused ones
            return blocks[..., :n_k].repeat_interleave(block_q, -2)[..., :L, :].repeat_interleave(block_k, -1)[..., :S]

        follows = create_mask(block_mask.mask_mod, B, H, L, S, device=block_mask.kv_num_blocks.device)
        keep = listed(block_mask.kv_num_blocks, block_mask.kv_indices) & follows
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            keep = keep | listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        return Mask.dense(keep)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(self.terms + other.terms)

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.terms)) if self.terms else "Mask(())"

    def __reduce__(self) -> tuple:
        # A copy starts with an empty cache: its tensors count their versions anew.
        return Mask, (self.terms,)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of every term, in order."""
        return tuple(tensor for term in self.terms for tensor in term.tensors())

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on `device`."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), self)

    def validate(self, B: int, H: int, L: int, S: int, device: torch.device | None = None) -> None:
        """Raises ValueError, naming `mask`, unless the mask fits queries (B, H, L) and keys (B, S) on `device`."""
        for term in self.terms:
            for tensor in term.tensors():
                if device is not None and tensor.device != device:
                    raise ValueError(f"mask must be on {device} as the query is, got {term!r} on {tensor.device}")
            term.check(B, H, L, S)

    def to_dense(self, B: int, H: int, L: int, S: int, device: torch.device | str | None = None) -> Tensor:
        """The mask expanded: bool (B, H, L, S). `device` is that of the mask's tensors unless given."""
        mask, device = self._placed(device)
        mask.validate(B, H, L, S)
        keep = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        for term in mask.terms:
            keep = keep & term.to_dense(L, S, device)
        return keep.expand(B, H, L, S)

    def tile_map(
        self,
        L: int,
        S: int,
        B: int | None = None,
        H: int | None = None,
        block_m: int = 64,
        block_n: int = 64,
        device: torch.device | str | None = None,
    ) -> TileMap:
        """The tiles of the whole mask, for L queries and S keys; B and H are the mask's own unless given."""
        mask, device = self._placed(device)
        B = mask._own_batch() if B is None else B
        H = mask._own_heads() if H is None else H
        classes = tiles.tile_classes(mask, B, H, L, S, block_m, block_n, device)
        dense = [term.keep for term in mask.terms if isinstance(term, Dense)]
        bits = tiles.pack_dense(dense, L, S, block_m, block_n)[0] if dense else None
        return TileMap.from_classes(classes, block_m, block_n, L, S, bits)

    def plot(
        self,
        L: int,
        S: int,
        batch: int = 0,
        head: int = 0,
        block_m: int = 64,
        block_n: int = 64,
        ax: Axes | None = None,
    ) -> Axes:
        """Draws the mask of L queries (down) and S keys (across) with matplotlib; returns the axes.

        Each pair is coloured by whether it attends and by its tile: empty tiles are skipped by the kernels, full ones
        run without mask code. A tile of a composition or of segments may be drawn as partial although all or none of
        its pairs attend, where the kernels do not know it either (see `tile_map`).

        batch, head: which to draw; 0 where the mask does not depend on them.
        block_m, block_n: queries and keys of a tile.
        ax: draw here; a new figure of pyplot's unless given.

        Raises ImportError without matplotlib, ValueError for a batch, head or tile that does not exist, or a mask that
        does not fit L and S.
        """
        try:
            from matplotlib import pyplot
            from matplotlib.collections import LineCollection
            from matplotlib.colors import ListedColormap
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError("Mask.plot needs matplotlib, which is not installed") from error
        for name, length in (("L", L), ("S", S)):
            if length < 1:
                raise ValueError(f"{name} must be at least 1 to be drawn, got {length}")
        B, H = self._own_batch(), self._own_heads()
        for name, index, size in (("batch", batch, B), ("head", head, H)):
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
                raise ValueError(f"{name} must be an int of [0, {size}), got {index!r}")
        classes = self.tile_map(L, S, B, H, block_m, block_n).classes().expand(B, H, -1, -1)[batch, head].cpu()
        counts = torch.bincount(classes.flatten(), minlength=3).tolist()
        shown = classes.repeat_interleave(block_m, 0).repeat_interleave(block_n, 1)[:L, :S]
        keep = self.to_dense(B, H, L, S)[batch, head].cpu()
        colours = {"empty": "#e8e8e8", "no pair": "#fde3c2", "partial": "#e68a00", "full": "#2c6fb0"}
        # 0 an empty tile, 1 and 2 the pairs of a partial one without and with attention, 3 a full one
        codes = torch.where(shown == FULL, 3, torch.where(shown == PARTIAL, 1 + keep.long(), 0))

        if ax is None:
            ax = pyplot.subplots()[1]
        extent = (0, S, L, 0)  # so that tile borders are at their indices
        options: dict[str, Any] = {"vmin": 0, "vmax": 3, "extent": extent, "aspect": "auto", "interpolation": "nearest"}
        ax.imshow(codes.numpy(), ListedColormap(list(colours.values())), **options)
        lines = [[(0, i), (S, i)] for i in range(block_m, L, block_m)]
        lines += [[(j, 0), (j, L)] for j in range(block_n, S, block_n)]
        ax.add_collection(LineCollection(lines, colors="white", linewidths=0.6))
        names = (("full", FULL), ("partial", PARTIAL), ("empty", EMPTY))
        patches = [Patch(color=colours[name], label=f"{name} ({counts[number]})") for name, number in names]
        ax.legend(handles=patches, title=f"tiles of {block_m} x {block_n}", fontsize="small", title_fontsize="small")
        ax.set(xlabel="key", ylabel="query", xlim=(0, S), ylim=(L, 0))
        return ax

    def _own_batch(self) -> int:
        return max((tensor.shape[0] for tensor in self.tensors()), default=1)

    def _own_heads(self) -> int:
        return max((term.keep.shape[1] for term in self.terms if isinstance(term, Dense)), default=1)

    def _placed(self, device: torch.device | str | None) -> tuple[Mask, torch.device | None]:
        if device is not None:
            return self.to(device), torch.device(device)
        tensors = self.tensors()
        return self, tensors[0].device if tensors else None

    def kernel_form(
        self,
        B: int,
        H: int,
        L: int,
        S: int,
        device: torch.device,
        block_m: int = 48,
        block_n: int = 64,
        build: TileBuilder = tiles.pack_dense,
    ) -> KernelMask:
        """The mask as the kernels take it; validates it against the problem.

        `build(masks, L, S, block_m, block_n)` packs the dense terms (the mask_tiles operator). The result is kept on
        this object, so that layers that share the mask share one map, until a tensor is changed in place (a change
        that torch does not see, through `.data` or numpy, goes unnoticed).
        """
        tensors = self.tensors()
        # While a program is recorded there is nothing to keep: the tensors are fake, or their map would be a constant
        # of the program. Without tensors, folding is as cheap as looking up.
        if not tensors or torch.compiler.is_compiling() or is_recorded():
            self.validate(B, H, L, S, device)
            return self._fold(L, S, block_m, block_n, build)
        if any(t.is_inference() for t in tensors):  # they count no versions, and autograd does not save them
            self.validate(B, H, L, S, device)
            form = self._fold(L, S, block_m, block_n, build)
            if not torch.is_grad_enabled():
                return form
            return KernelMask._make(x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in form)
        # A map made in inference mode cannot be saved for backward, hence the mode in the key.
        key = (B, H, L, S, device, block_m, block_n, torch.is_inference_mode_enabled())
        versions = tuple(t._version for t in tensors)
        held = self._cache.get(key)
        if held is not None and held[0] == versions:
            return held[1]
        self.validate(B, H, L, S, device)
        form = self._fold(L, S, block_m, block_n, build)
        made = tensors if form.tile_map is None else (*tensors, form.tile_map.live)
        # Within a transform of torch.func, tensors may belong to it and be of no use afterwards.
        if all(type(t) is Tensor for t in made) and not torch._C._are_functorch_transforms_active():
            if len(self._cache) >= _CACHE_ENTRIES:
                self._cache.clear()
            self._cache[key] = (versions, form)
        return form

    @cached_property
    def band_form(self) -> KernelMask | None:
        """The kernel form of a mask of bands alone, which every problem shares; None for any other mask."""
        for term in self.terms:
            if type(term) is not Band:
                return None
        return self._fold(0, 0, 1, 1, tiles.pack_dense)

    def _fold(self, L: int, S: int, block_m: int, block_n: int, build: TileBuilder) -> KernelMask:
        band = [UNLIMITED] * 4
        prefix_lengths: Tensor | None = None
        key_lengths: Tensor | None = None
        key_keep: Tensor | None = None
        segments: Segmented | None = None
        dense: list[Tensor] = []
        for term in self.terms:
            if isinstance(term, Band):
                first = 0 if term.align == "top_left" else 2
                band[first] = min(band[first], term.left)
                band[first + 1] = min(band[first + 1], term.right)
            elif isinstance(term, PrefixLengths):
                # (j <= i or j < a) and (j <= i or j < b) is j <= i or j < min(a, b)
                prefix_lengths = _smaller(prefix_lengths, term.lengths.to(torch.int64))
            elif isinstance(term, KeyLengths):
                key_lengths = _smaller(key_lengths, term.lengths.to(torch.int64))
            elif isinstance(term, Segments):
                ids = (term.query_ids.to(torch.int64), term.key_ids.to(torch.int64))
                segments = ids if segments is None else _joined_segments(segments, ids)
            elif isinstance(term, KeyKeep):
                key_keep = term.keep if key_keep is None else key_keep & term.keep
            else:
                # A recorded program is run with masks of other strides, a traced one with other sizes: nothing checks
                # them there.
                keep = term.keep if is_recorded() else _unexpanded(term.keep)
                if keep.shape[1] != 1 or keep.shape[2] != 1 or _is_traced():
                    dense.append(keep)
                else:  # a padding mask written as a dense one
                    keep = keep[:, 0, 0, :].expand(-1, S)
                    key_keep = keep if key_keep is None else key_keep & keep
        tile_map = None
        if dense:
            first_masks, rest = dense[: MAX_DENSE_MASKS - 1], dense[MAX_DENSE_MASKS - 1 :]
            for keep in rest[1:]:
                rest = [rest[0] & keep]
            bits, live, full, live_t, full_t = build(first_masks + rest, L, S, block_m, block_n)
            tile_map = TileMap(bits, live, full, live_t, full_t, block_m, block_n, L, S)
        limits = None if band == [UNLIMITED] * 4 else (band[0], band[1], band[2], band[3])
        query_segments, key_segments = segments or (None, None)
        return KernelMask(limits, prefix_lengths, key_lengths, key_keep, query_segments, key_segments, tile_map)


_CAUSAL = {align: Mask((Band(UNLIMITED, 0, align),)) for align in _ALIGNMENTS}


def _is_traced() -> bool:
    return torch._C._get_tracing_state() is not None  # torch.jit.trace


def is_recorded() -> bool:
    """Whether this call becomes part of a program that does not check what it has assumed of its inputs."""
    return torch.compiler.is_exporting() or _is_traced()


def _smaller(lengths: Tensor | None, other: Tensor) -> Tensor:
    return other if lengths is None else torch.minimum(lengths, other)


def _unexpanded(keep: Tensor) -> Tensor:
    """Undoes `expand`, so that a padding mask expanded to (B, H, L, S), as SDPA wants it, is a padding mask again."""
    for dim, stride in enumerate(keep.stride()):
        if stride == 0 and keep.shape[dim] > 1:
            keep = keep.narrow(dim, 0, 1)
    return keep


def _joined_segments(first: Segmented, second: Segmented) -> Segmented:
    """Ids that are equal exactly where both pairs are. Ranks stand for ids so that the product cannot overflow."""
    (first_q, first_k), (second_q, second_k) = _ranked(*first), _ranked(*second)
    base = first_q.shape[-1] + first_k.shape[-1]
    return first_q * base + second_q, first_k * base + second_k


def _ranked(query_ids: Tensor, key_ids: Tensor) -> Segmented:
    """Replaces ids by their rank in the row, in [0, L + S); every shape is static, unlike with `torch.unique`."""
    query_ids, key_ids = (ids.expand(max(query_ids.shape[0], key_ids.shape[0]), -1) for ids in (query_ids, key_ids))
    ids = torch.cat((query_ids, key_ids), dim=-1)
    ranks = torch.searchsorted(ids.sort(dim=-1).values, ids)
    return ranks[:, : query_ids.shape[-1]], ranks[:, query_ids.shape[-1] :]


def coerce(mask: object) -> Mask | None:
    """What a public function takes as `mask`: None, a Mask, or a bool tensor broadcastable to (B, Hq, L, S)."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a Mask or a bool tensor (True = may attend), got {mask.dtype}; see bias")
        check_layout("mask", mask)
        if mask.dim() > 4:
            raise ValueError(f"mask must broadcast to (B, Hq, L, S), got shape {tuple(mask.shape)}")
        return Mask.dense(mask)
    raise TypeError(f"mask must be a Mask or a bool tensor (True = may attend), got {type(mask).__name__}")


# A Mask is a container of its tensors, so that torch.export, vmap and the like see through it. The names and
# the safe globals let an exported program that takes a Mask be saved and loaded.
pytree.register_pytree_node(
    Band,
    lambda band: ([], (band.left, band.right, band.align)),
    lambda _, fields: Band(*fields),
    serialized_type_name="fastattn.masks.Band",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda band: ([], (band.left, band.right, band.align)),
)
for _term in (PrefixLengths, KeyLengths, KeyKeep, Dense, Segments):
    pytree.register_dataclass(_term, serialized_type_name=f"fastattn.masks.{_term.__name__}")
pytree.register_pytree_node(
    Mask,
    lambda mask: (list(mask.terms), None),
    lambda terms, _: Mask(tuple(terms)),
    serialized_type_name="fastattn.masks.Mask",
    flatten_with_keys_fn=lambda mask: ([(pytree.SequenceKey(n), t) for n, t in enumerate(mask.terms)], None),
)
torch.serialization.add_safe_globals([Mask, Band, PrefixLengths, KeyLengths, KeyKeep, Dense, Segments])
