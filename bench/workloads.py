"""What is measured: the problems, their inputs, and how their work is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import Mask

MASK_KINDS = ("dense", "causal", "window", "padded", "random", "block-sparse", "segments", "bias", "dropout")
RANDOM_KEYS = "random-keys"  # half of the keys, at random, are padding
BIASES = {"bias": (False, True), "bias-batch": (True, True), "bias-shared": (False, False)}  # one a batch, one a head
DROPOUT_P = 0.1
DROPOUT_OF_ONES = "dropout-of-ones"  # for the check: with values of 1 the output is what dropout leaves of each row
BACKWARD_FLOPS = 2.5  # of the forward: five products in place of two
FEEDFORWARD = 4  # the width of an encoder layer's inner layer, over that of its input
EXECUTED_TILE = (48, 64)  # queries by keys, the tile of the CPU kernels


@dataclass(frozen=True)
class Condition:
    """A speed that is promised: at least ``at_least`` times the speed of ``peer``."""

    peer: str
    at_least: float


@dataclass(frozen=True)
class Target:
    """What a row of the table of targets asks for: at least ``at_least`` times the speed of ``beside``, a peer.

    Or the share of the sentinel's FLOP/s or of a copy's bytes a second (`SENTINEL`, `COPY`), or elements a second
    (`ELEMENTS`); with ``of`` "memory", the peak of the peer's memory over ours.
    """

    beside: str
    at_least: float
    of: str = "time"  # time | memory


SENTINEL, COPY, ELEMENTS = "sentinel", "copy", "elements/s"


@dataclass(frozen=True)
class AttentionCase:
    """One attention problem: shapes, mask kind, dtype, and whether the backward is part of the step."""

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim: int
    mask: str = "dense"
    dtype: str = "float32"
    backward: bool = False
    device: str = "cpu"
    condition: Condition | None = None
    backward_alone: bool = False  # the forward is not part of the time
    window: int | None = None  # keys to each side of the diagonal; S / 32 when not given
    live: float = 0.5  # the share of the keys that are no padding
    raw_mask: bool = False  # a dense mask comes to us as a bool tensor too: packing it is part of the time

    @property
    def shape(self) -> str:
        heads = f"{self.heads_q}" if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"
        lengths = f"{self.len_q}" if self.len_q == self.len_k else f"{self.len_q}x{self.len_k}"
        return f"{self.batch},{heads},{lengths},{self.dim}"

    @property
    def step(self) -> str:
        return "backward" if self.backward_alone else step_name(self.backward)

    @property
    def title(self) -> str:
        mask = self.mask if self.window is None else f"{self.mask} {self.window}"
        mask += f" {self.live:.4g} live" if self.live != 0.5 else ""
        mask += " as a bool tensor" if self.raw_mask else ""
        return f"attention {mask} ({self.shape}) {self.dtype} {self.step}"

    def describe(self) -> dict[str, object]:
        return {"suite": "attention", "shape": self.shape, "step": self.step, **asdict(self)}


@dataclass(frozen=True)
class WeightsCase:
    """Attention that also gives the weights (B, L, S), averaged over the heads; with the gradient of both."""

    batch: int
    heads: int
    length: int
    dim: int
    dtype: str = "float32"
    backward: bool = False
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.batch},{self.heads},{self.length},{self.dim}"

    @property
    def title(self) -> str:
        return f"attention with averaged weights ({self.shape}) {self.dtype} {step_name(self.backward)}"

    def describe(self) -> dict[str, object]:
        return {"suite": "weights", "shape": self.shape, "step": step_name(self.backward), **asdict(self)}


@dataclass(frozen=True)
class MhaCase:
    """One layer: ``nn.MultiheadAttention`` as users call it, ``need_weights`` left at its default, or
    ``nn.TransformerEncoderLayer``. Training is forward with backward, inference the forward in eval mode."""

    batch: int
    length: int
    embed_dim: int
    heads: int
    mask: str = "dense"  # dense | padded | causal
    dtype: str = "float32"
    backward: bool = True
    device: str = "cpu"
    need_weights: bool = True  # of nn.MultiheadAttention; the encoder layer asks for none
    len_k: int | None = None  # cross-attention to so many keys
    autocast: bool = False  # to bfloat16
    encoder_layer: bool = False

    @property
    def shape(self) -> str:
        length = f"{self.length}" if self.len_k is None else f"{self.length}x{self.len_k}"
        return f"{self.batch},{length},{self.embed_dim} of {self.heads} heads"

    @property
    def title(self) -> str:
        weights = "with weights" if self.need_weights else "without weights"
        what = "TransformerEncoderLayer" if self.encoder_layer else "MultiheadAttention"
        dtype = "bfloat16 autocast" if self.autocast else self.dtype
        parts = [what, self.mask, f"({self.shape})", "" if self.encoder_layer else weights, dtype]
        return " ".join(filter(None, [*parts, step_name(self.backward)]))

    def describe(self) -> dict[str, object]:
        return {"suite": "mha", "shape": self.shape, "step": step_name(self.backward), **asdict(self)}


@dataclass(frozen=True)
class LossCase:
    """A masked reconstruction loss over images with a patch-grid mask."""

    batch: int
    channels: int
    size: int
    patch: int
    kind: str = "l1"  # l1 | mse
    masked: float = 0.6  # share of the patches that count
    dtype: str = "float32"
    backward: bool = True
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.batch},{self.channels},{self.size},{self.size} patch {self.patch}"

    @property
    def title(self) -> str:
        return f"masked {self.kind} ({self.shape}) {self.dtype} {step_name(self.backward)}"

    def describe(self) -> dict[str, object]:
        return {"suite": "loss", "shape": self.shape, "step": step_name(self.backward), **asdict(self)}


@dataclass(frozen=True)
class AdditiveCase:
    """Additive attention of ``length`` queries to as many keys; the values are as wide as the features."""

    batch: int
    length: int
    features: int
    dtype: str = "float32"
    backward: bool = False
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.batch},{self.length},{self.features}"

    @property
    def title(self) -> str:
        return f"additive attention ({self.shape}) {self.dtype} {step_name(self.backward)}"

    def describe(self) -> dict[str, object]:
        return {"suite": "additive", "shape": self.shape, "step": step_name(self.backward), **asdict(self)}


@dataclass(frozen=True)
class HeadCase:
    """A prediction head and the masked squared error of what it predicts, over tokens."""

    batch: int
    tokens: int
    width: int
    outputs: int
    masked: float = 0.6  # share of the tokens that count
    dtype: str = "float32"
    backward: bool = True
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.batch},{self.tokens},{self.width} to {self.outputs}"

    @property
    def title(self) -> str:
        return f"linear + masked mse ({self.shape}) {self.dtype} {step_name(self.backward)}"

    def describe(self) -> dict[str, object]:
        return {"suite": "head", "shape": self.shape, "step": step_name(self.backward), **asdict(self)}


@dataclass(frozen=True)
class ModelCase:
    """A randomly initialised model of Hugging Face transformers: a training step, inference, or generation."""

    model: str  # a key of fastattn.bench.models.MODELS
    batch: int
    length: int  # tokens, or pixels of a picture's side
    padded: bool = False
    backward: bool = True
    attentions: bool = False  # output_attentions
    new_tokens: int = 0  # generate so many after the prompt
    width: int = 256
    layers: int = 2
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.batch},{self.length},{self.width} x {self.layers} layers"

    @property
    def step(self) -> str:
        if self.new_tokens:
            return f"generates {self.new_tokens} tokens"
        return "training" if self.backward else "inference"

    @property
    def title(self) -> str:
        parts = [self.model, "padded" if self.padded else "", f"({self.shape})", "with weights" * self.attentions]
        return " ".join(filter(None, [*parts, self.dtype, self.step]))

    def describe(self) -> dict[str, object]:
        return {"suite": "transformers", "shape": self.shape, "step": self.step, **asdict(self)}


Case = AttentionCase | WeightsCase | AdditiveCase | MhaCase | LossCase | HeadCase | ModelCase


def step_name(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass
class AttentionInputs:
    """The tensors of an attention problem; ``leaves`` are those that get a gradient.

    ``keep`` is the bool mask that torch's functions take, in its smallest broadcastable shape, and ``make_mask`` builds
    ours; ``given_dense`` tells that the mask comes as a bool tensor from the start, so that nobody has to expand it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    bias: Tensor | None = None
    dropout_p: float = 0.0
    make_keep: Callable[[], Tensor] | None = None
    make_mask: Callable[[], Mask] | None = None
    is_causal: bool = False
    given_dense: bool = False
    band: tuple[int, int] | None = None  # i - left <= j <= i + right, where that is the whole mask
    # The mask as FlexAttention takes it, of a batch element, a head, a query and a key; whether batch elements differ.
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    mask_of_batch: bool = False

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.query, self.key, self.value, self.bias) if t is not None and t.requires_grad]


def _documents(length: int, count: int, batch: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Ids (batch, length) of ``count`` documents of random lengths, each at least half of its fair share."""
    jitter = 0.5 * torch.rand(batch, count, generator=generator)
    ends = (torch.arange(count) + 0.5 + jitter) * (length / count)
    positions = torch.arange(length).expand(batch, length)
    return torch.searchsorted(ends.contiguous(), positions.to(ends.dtype).contiguous()).clamp_(max=count - 1).to(device)


def attention_inputs(case: AttentionCase, seed: int = 0) -> AttentionInputs:
    """Random normal inputs; the same seed gives the same tensors to every contender and in every process."""
    device, dtype = torch.device(case.device), torch_dtype(case.dtype)
    generator = torch.Generator().manual_seed(seed)
    # Drawn where they are used: a CPU takes longer over the numbers of a large case than a GPU over the case.
    on_device = generator if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    B, Hq, L, S = case.batch, case.heads_q, case.len_q, case.len_k

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=on_device, device=device).to(dtype)

    query = normal(B, Hq, L, case.dim).requires_grad_(case.backward)
    key = normal(B, case.heads_kv, S, case.dim).requires_grad_(case.backward)
    value = normal(B, case.heads_kv, S, case.dim).requires_grad_(case.backward)
    inputs = AttentionInputs(query, key, value, normal(B, Hq, L, case.dim))

    def within(left: int, right: int) -> Tensor:
        """The band as a bool tensor (L, S), without a tensor of offsets: those are large."""
        i, j = torch.arange(L, device=device)[:, None], torch.arange(S, device=device)
        return (j >= i - left) & (j <= i + right)

    if case.mask == "causal":
        inputs.is_causal = True
        inputs.band = (L, 0)
        inputs.make_keep = lambda: within(L, 0)
        inputs.make_mask = Mask.causal
        inputs.mask_mod = lambda b, h, i, j: j <= i
    elif case.mask == "window":  # S / 16 keys about the diagonal
        left, right = max(1, S // 32), max(0, S // 32 - 1)
        if case.window is not None:
            left = right = case.window
        inputs.band = (left, right)
        inputs.make_keep = lambda: within(left, right)
        inputs.make_mask = lambda: Mask.window(left, right)
        inputs.mask_mod = lambda b, h, i, j: (j >= i - left) & (j <= i + right)
    elif case.mask == "padded":  # the last of the keys are padding
        lengths = torch.full((B,), max(1, int(S * case.live)), device=device)
        inputs.make_keep = lambda: (torch.arange(S, device=device) < lengths[:, None])[:, None, None, :]
        inputs.make_mask = lambda: Mask.key_lengths(lengths)
        inputs.mask_mod, inputs.mask_of_batch = lambda b, h, i, j: j < lengths[b], True
    elif case.mask == RANDOM_KEYS:
        live = _random(B, S, generator).to(device)
        inputs.make_keep = lambda: live[:, None, None, :]
        inputs.make_mask = lambda: Mask.key_padding(live)
        inputs.mask_mod, inputs.mask_of_batch = lambda b, h, i, j: live[b, j], True
    elif case.mask == "segments":  # eight documents in a row
        queries = _documents(L, min(8, L, S), B, device, generator)
        keys = queries if L == S else _documents(S, min(8, L, S), B, device, generator)
        inputs.make_keep = lambda: queries[:, None, :, None] == keys[:, None, None, :]
        inputs.make_mask = lambda: Mask.segments(queries, keys)
        inputs.mask_mod, inputs.mask_of_batch = lambda b, h, i, j: queries[b, i] == keys[b, j], True
    elif case.mask in ("random", "block-sparse"):
        keep = _random(L, S, generator) if case.mask == "random" else _block_sparse(L, S, generator)
        keep = keep.to(device)
        inputs.given_dense = True
        inputs.make_keep = lambda: keep
        inputs.make_mask = lambda: Mask.dense(keep)
        inputs.mask_mod = lambda b, h, i, j: keep[i, j]
    elif case.mask in BIASES:
        each_batch, each_head = BIASES[case.mask]
        inputs.bias = normal(B if each_batch else 1, Hq if each_head else 1, L, S).requires_grad_(case.backward)
    elif case.mask == "dropout":
        inputs.dropout_p = DROPOUT_P
    elif case.mask == DROPOUT_OF_ONES:
        inputs.dropout_p = DROPOUT_P
        inputs.value = torch.ones_like(value)
    elif case.mask != "dense":
        raise ValueError(f"mask kind must be one of {', '.join(MASK_KINDS)}, got {case.mask!r}")
    return inputs


def _random(L: int, S: int, generator: torch.Generator) -> Tensor:
    keep = torch.rand(L, S, generator=generator) < 0.5
    keep[:, 0] = True  # no empty rows: torch's functions give NaN there
    return keep


def _block_sparse(L: int, S: int, generator: torch.Generator) -> Tensor:
    """About 10 % of the tiles, the diagonal among them."""
    block = 128 if S >= 2048 else 64
    rows, columns = -(-L // block), -(-S // block)
    live = torch.rand(rows, columns, generator=generator) < max(0.0, 0.1 - 1 / columns)
    live |= torch.arange(columns) == torch.arange(rows)[:, None] % columns
    return live.repeat_interleave(block, 0).repeat_interleave(block, 1)[:L, :S]


def attending_pairs(case: AttentionCase, inputs: AttentionInputs) -> int:
    """How many (b, h, i, j) may attend."""
    everything = case.batch * case.heads_q * case.len_q * case.len_k
    if inputs.make_keep is None:
        return everything
    if inputs.band is not None:
        return case.batch * case.heads_q * _band_pairs(case.len_q, case.len_k, *inputs.band)
    keep = inputs.make_keep()
    return int(keep.sum()) * (everything // keep.numel())


def _band_pairs(len_q: int, len_k: int, left: int, right: int) -> int:
    rows = torch.arange(len_q)
    ends, starts = (rows + right + 1).clamp(0, len_k), (rows - left).clamp(0, len_k)
    return int((ends - starts).clamp(min=0).sum())


def executed_pairs(case: AttentionCase, inputs: AttentionInputs) -> int:
    """How many (b, h, i, j) lie in tiles that hold an attending pair: the work of a kernel that skips empty tiles."""
    everything = case.batch * case.heads_q * case.len_q * case.len_k
    if inputs.make_keep is None:
        return everything
    rows, columns = EXECUTED_TILE
    if inputs.band is not None:
        left, right = inputs.band
        first_row = torch.arange(0, case.len_q, rows)[:, None]
        last_row = (first_row + rows - 1).clamp(max=case.len_q - 1)
        first_key = torch.arange(0, case.len_k, columns)
        last_key = (first_key + columns - 1).clamp(max=case.len_k - 1)
        live = ((first_key <= last_row + right) & (last_key >= first_row - left))[None, None]
    else:
        keep = inputs.make_keep()
        keep = keep.reshape((1,) * (4 - keep.dim()) + keep.shape).expand(-1, -1, case.len_q, case.len_k)
        padded = F.pad(keep, (0, -case.len_k % columns, 0, -case.len_q % rows))
        live = padded.unflatten(-1, (-1, columns)).unflatten(2, (-1, rows)).any(-1).any(3)  # (B|1, H|1, nQ, nK)
    height = (case.len_q - torch.arange(live.shape[2]) * rows).clamp(max=rows)
    width = (case.len_k - torch.arange(live.shape[3]) * columns).clamp(max=columns)
    pairs = int((live.cpu() * (height[:, None] * width)).sum())
    return pairs * (case.batch * case.heads_q // (live.shape[0] * live.shape[1]))


def attention_flops(case: AttentionCase, pairs: int) -> float:
    """FLOPs of a step over ``pairs``: 4 D forward, and 2.5 times that for the backward."""
    return 4.0 * case.dim * pairs * ((not case.backward_alone) + BACKWARD_FLOPS * case.backward)


def attention_bytes(case: AttentionCase, inputs: AttentionInputs) -> int:
    """Each input read once, each output written once."""
    read = [inputs.query, inputs.key, inputs.value] + ([] if inputs.bias is None else [inputs.bias])
    sizes = sum(t.numel() * t.element_size() for t in read)
    out = inputs.grad_out.numel() * inputs.grad_out.element_size()
    return sizes + out if not case.backward else 2 * sizes + 2 * out


@dataclass
class WeightsInputs:
    """Queries, keys and values (B, H, L, D), and the upstream gradients of the output and of the weights (B, L, L)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_weights: Tensor


def weights_inputs(case: WeightsCase, seed: int = 0) -> WeightsInputs:
    """Random normal inputs."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = torch.device(case.device), torch_dtype(case.dtype)
    shape = (case.batch, case.heads, case.length, case.dim)
    query, key, value, grad_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    leaves = [t.requires_grad_(case.backward) for t in (query, key, value)]
    grad_weights = torch.randn(case.batch, case.length, case.length, generator=generator).to(device, dtype)
    return WeightsInputs(leaves[0], leaves[1], leaves[2], grad_out, grad_weights)


def weights_flops(case: WeightsCase) -> float:
    """Of the attention alone: the products that only make the weights count for nothing."""
    forward = 4.0 * case.batch * case.heads * case.length**2 * case.dim
    return forward * (1 + BACKWARD_FLOPS * case.backward)


@dataclass
class MhaInputs:
    """Queries (B, L, E), the upstream gradient, keys for cross-attention (B, S, E), and the arguments of
    ``nn.MultiheadAttention.forward``."""

    x: Tensor
    grad_out: Tensor
    memory: Tensor | None = None
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None


def mha_inputs(case: MhaCase, seed: int = 0) -> MhaInputs:
    """Random normal input; torch's polarity in the masks: True = ignore."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = torch.device(case.device), torch_dtype(case.dtype)

    def normal(length: int) -> Tensor:
        return torch.randn(case.batch, length, case.embed_dim, generator=generator).to(device, dtype)

    x, grad_out = normal(case.length), normal(case.length)
    inputs = MhaInputs(x.requires_grad_(case.backward), grad_out.bfloat16() if case.autocast else grad_out)
    if case.len_k is not None:
        inputs.memory = normal(case.len_k).requires_grad_(case.backward)
    if case.mask == "padded":
        len_k = case.len_k or case.length
        padding = torch.arange(len_k, device=device) >= max(1, len_k // 2)
        inputs.key_padding_mask = padding.expand(case.batch, -1).contiguous()
    elif case.mask == "causal":
        inputs.attn_mask = torch.ones(case.length, case.length, dtype=torch.bool, device=device).triu(1)
    return inputs


def mha_flops(case: MhaCase) -> float:
    """The projections and the attention over the attending pairs; products that only make the weights count for
    nothing."""
    share = {"dense": 1.0, "padded": 0.5, "causal": 0.5 + 0.5 / case.length}[case.mask]
    len_k = case.len_k or case.length
    projections = 4.0 * case.batch * (case.length + len_k) * case.embed_dim**2
    if case.encoder_layer:
        projections += 4.0 * case.batch * case.length * case.embed_dim * FEEDFORWARD * case.embed_dim
    attention = 4.0 * case.batch * case.length * len_k * case.embed_dim * share
    if not case.backward:
        return projections + attention
    return 3.0 * projections + (1 + BACKWARD_FLOPS) * attention


@dataclass
class LossInputs:
    """Prediction and target (B, C, H, W), mask (B, H/p, W/p) with True = counts."""

    prediction: Tensor
    target: Tensor
    mask: Tensor
    patch: int


def loss_inputs(case: LossCase, seed: int = 0) -> LossInputs:
    """Random normal pictures; the same number of patches counts in each."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = torch.device(case.device), torch_dtype(case.dtype)
    shape = (case.batch, case.channels, case.size, case.size)
    prediction, target = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    grid = case.size // case.patch
    order = torch.rand(case.batch, grid * grid, generator=generator).argsort(1)
    mask = (order < math.ceil(case.masked * grid * grid)).view(case.batch, grid, grid).to(device)
    return LossInputs(prediction.requires_grad_(case.backward), target, mask, case.patch)


def loss_bytes(case: LossCase, inputs: LossInputs) -> float:
    """The counted elements of both pictures read once, and the gradient written once."""
    counted = int(inputs.mask.sum()) * case.channels * case.patch**2
    size = inputs.prediction.element_size()
    return 2.0 * size * counted + (size * inputs.prediction.numel() if case.backward else 0)


@dataclass
class AdditiveInputs:
    """Projected queries, projected keys and values (B, L, A), the score's weight (A,), and the upstream gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_weight: Tensor
    grad_out: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"dq": self.query, "dk": self.key, "dv": self.value, "dw": self.score_weight}


def additive_inputs(case: AdditiveCase, seed: int = 0) -> AdditiveInputs:
    """Random normal inputs; the weight as small as leaves the scores of a size of 1."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = torch.device(case.device), torch_dtype(case.dtype)
    shape = (case.batch, case.length, case.features)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    weight = (torch.randn(case.features, generator=generator) / math.sqrt(case.features)).to(device, dtype)
    leaves = [t.requires_grad_(case.backward) for t in (*tensors[:3], weight)]
    return AdditiveInputs(leaves[0], leaves[1], leaves[2], leaves[3], tensors[3])


def additive_elements(case: AdditiveCase) -> int:
    """How many tanh the textbook's form takes, of query, key and feature; the same count for both directions."""
    return case.batch * case.length**2 * case.features


@dataclass
class HeadInputs:
    """Hidden states (B, N, E), the head's weight (P, E) and bias (P,), target (B, N, P), and mask (B, N) with True =
    counts."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    mask: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"dhidden": self.hidden, "dweight": self.weight, "dbias": self.bias}


def head_inputs(case: HeadCase, seed: int = 0) -> HeadInputs:
    """Random normal hidden states and targets; the same number of tokens counts in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = torch.device(case.device), torch_dtype(case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    hidden, target = normal(case.batch, case.tokens, case.width), normal(case.batch, case.tokens, case.outputs)
    weight, bias = normal(case.outputs, case.width) / math.sqrt(case.width), normal(case.outputs)
    order = torch.rand(case.batch, case.tokens, generator=generator).argsort(1)
    mask = (order < math.ceil(case.masked * case.tokens)).to(device)
    hidden, weight, bias = (t.requires_grad_(case.backward) for t in (hidden, weight, bias))
    return HeadInputs(hidden, weight, bias, target, mask)


def head_flops(case: HeadCase, inputs: HeadInputs) -> float:
    """The products over the counted tokens: one forward, two for the gradients."""
    return 2.0 * int(inputs.mask.sum()) * case.width * case.outputs * (1 + 2 * case.backward)
