"""Who runs: our operations, every peer in torch, and the user's own function."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import dispatch
from fastattn.bench.workloads import (
    COPY,
    FEEDFORWARD,
    AdditiveCase,
    AdditiveInputs,
    AttentionCase,
    AttentionInputs,
    Case,
    HeadCase,
    HeadInputs,
    LossCase,
    MhaCase,
    MhaInputs,
    WeightsCase,
    WeightsInputs,
    additive_inputs,
    attention_inputs,
    head_inputs,
    loss_inputs,
    mha_inputs,
    torch_dtype,
    weights_inputs,
)
from fastattn.testing.adapters import foreign_target

OURS = "fastattn"
PROJECTIONS = "projections alone"
STOCK, STOCK_SLOW = "nn.MultiheadAttention", "no fast path"  # torch's module, and without its path for inference
OUR_BACKENDS = ("cuda", "cuda-portable", "triton")  # contenders of their own for GPU tensors


@dataclass
class Bound:
    """A contender with its inputs in place.

    ``forward`` gives the output first. ``leaves`` get a gradient, by the name the check knows them under (empty:
    forward only). ``grad_out`` is the upstream gradient (None: the output is a scalar loss). ``prepare`` builds anew
    what ``forward`` takes in place of the mask, when that is any work. ``environment`` holds while a step runs.
    """

    forward: Callable[[], Any]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    grad_out: Tensor | None = None
    prepare: Callable[[], object] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    allow_unused: bool = False  # some leaves may have no part in the output
    grad_second: Tensor | None = None  # the upstream gradient of the second output, where that has one
    backward_alone: bool = False  # a step is the backward; the forward is run once
    bytes: int | None = None  # that a step of a yardstick of bandwidth reads and writes
    _result: Any = None

    def step(self) -> object:
        """What is timed: the forward, and the backward when there are leaves."""
        if not self.environment:  # a small call is not to be timed with anything about it
            return self._step()
        with _environment(self.environment):
            return self._step()

    def _step(self) -> object:
        if not self.leaves:
            with torch.no_grad():
                return self.forward()
        if self.backward_alone:
            if self._result is None:
                self._result = self.forward()
            return self._gradients(self._result, retain_graph=True)
        result = self.forward()
        return (result[0] if isinstance(result, tuple) else result), self._gradients(result)

    def _gradients(self, result: Any, retain_graph: bool = False) -> tuple[Tensor | None, ...]:
        leaves = list(self.leaves.values())
        outputs = list(result) if isinstance(result, tuple) else [result]
        upstream = [self.grad_out] if self.grad_second is None else [self.grad_out, self.grad_second]
        return torch.autograd.grad(
            outputs[: len(upstream)], leaves, upstream, retain_graph=retain_graph, allow_unused=self.allow_unused
        )

    def results(self) -> dict[str, Tensor]:
        """Everything that a step computes, by name, for the check."""
        with _environment(self.environment):
            return self._results()

    def _results(self) -> dict[str, Tensor]:
        with torch.set_grad_enabled(bool(self.leaves)):
            result = self.forward()
        out, *rest = result if isinstance(result, tuple) else (result,)
        named = {"out": out.detach()}
        if rest and rest[0] is not None:
            weights = torch.stack(rest[0]) if isinstance(rest[0], tuple) else rest[0]  # of each layer
            named["weights"] = weights.detach()
        if self.leaves:
            grads = zip(self.leaves, self._gradients(result), strict=True)
            named.update({name: grad for name, grad in grads if grad is not None})
        return named


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Contender:
    """A name, a binder of inputs, and a function that tells why it cannot run a case (None: it can)."""

    name: str
    bind: Callable[[Case], Bound]
    why_not: Callable[[Case], str | None] = lambda case: None
    slow_to_start: bool = False  # compiles on first use; the quick suite asks for such peers by name
    yardstick: bool = False  # does another piece of work, to hold ours against: asked for by name, and not checked


def _attention(
    name: str,
    make: Callable[[AttentionCase, AttentionInputs], tuple[Callable[[], Tensor], Callable[[], object] | None]],
    why_not: Callable[[AttentionCase], str | None] = lambda case: None,
    slow_to_start: bool = False,
    environment: dict[str, str] | None = None,
) -> Contender:
    def bind(case: Case) -> Bound:
        assert isinstance(case, AttentionCase)
        inputs = attention_inputs(case)
        forward, prepare = make(case, inputs)
        leaves: dict[str, Tensor] = {}
        if case.backward:
            leaves = {"dq": inputs.query, "dk": inputs.key, "dv": inputs.value}
            if inputs.bias is not None:
                leaves["dbias"] = inputs.bias
        return Bound(forward, leaves, inputs.grad_out, prepare, environment or {}, backward_alone=case.backward_alone)

    def reason(case: Case) -> str | None:
        assert isinstance(case, AttentionCase)
        return why_not(case)

    return Contender(name, bind, reason, slow_to_start)


Made = tuple[Callable[[], Tensor], Callable[[], object] | None]


def _ours(case: AttentionCase, x: AttentionInputs, backend: str | None = None) -> Made:
    mask: Any = None if x.make_mask is None else x.make_mask()
    if case.raw_mask:
        assert x.make_keep is not None
        mask = x.make_keep()
    named = backend
    backend = backend or fastattn.explain(x.query, x.key, x.value, bias=x.bias).chosen

    def forward() -> Any:
        return fastattn.attention(x.query, x.key, x.value, mask=mask, bias=x.bias, dropout_p=x.dropout_p, backend=named)

    def pack(dense: list[Tensor], *sizes: int) -> Any:
        return torch.ops.fastattn.mask_tiles(dense, *sizes, backend)

    def prepare() -> None:
        nonlocal mask
        assert x.make_mask is not None
        mask = x.make_mask()
        # The first call with a mask makes the form that the kernels take, and the mask keeps it.
        sizes = (case.batch, case.heads_q, case.len_q, case.len_k)
        mask.kernel_form(*sizes, x.query.device, *dispatch.BACKENDS[backend or "reference"].tile, build=pack)

    return forward, None if x.make_mask is None or case.raw_mask else prepare


def _ours_on(name: str, backend: str, **environment: str) -> Contender:
    """One of our backends for GPUs, beside the one that runs by default."""

    def why_not(case: AttentionCase) -> str | None:
        problem = dispatch.Problem("attention", torch.device(case.device).type, torch_dtype(case.dtype), case.dim)
        return "; ".join(dispatch.BACKENDS[backend].why_not(problem)) or None

    return _attention(name, partial(_ours, backend=backend), why_not, environment=environment)


def _masked_by_keep(
    case: AttentionCase, x: AttentionInputs, run: Callable[[Tensor | None], Tensor]
) -> tuple[Callable[[], Tensor], Callable[[], object] | None]:
    """For functions that take the mask as a bool tensor: expanding it is their preparation."""
    keep = None if x.make_keep is None else x.make_keep()

    def prepare() -> None:
        nonlocal keep
        assert x.make_keep is not None
        keep = x.make_keep()

    needs_work = x.make_keep is not None and not x.given_dense
    return lambda: run(keep), prepare if needs_work else None


def _sdpa(case: AttentionCase, x: AttentionInputs) -> Made:
    gqa = case.heads_q != case.heads_kv

    def run(keep: Tensor | None) -> Tensor:
        mask = x.bias if keep is None else keep
        return F.scaled_dot_product_attention(x.query, x.key, x.value, mask, x.dropout_p, enable_gqa=gqa)

    if x.is_causal:  # torch's fastest way to say it
        return lambda: F.scaled_dot_product_attention(
            x.query, x.key, x.value, dropout_p=x.dropout_p, is_causal=True, enable_gqa=gqa
        ), None
    return _masked_by_keep(case, x, run)


def _sdpa_on(backend: SDPBackend) -> Callable[[AttentionCase, AttentionInputs], Made]:
    def make(case: AttentionCase, x: AttentionInputs) -> Made:
        forward, prepare = _sdpa(case, x)

        def on_backend() -> Tensor:
            with sdpa_kernel(backend):
                return forward()

        return on_backend, prepare

    return make


def _gpu_sdpa_why_not(name: str, takes_a_mask: bool) -> Callable[[AttentionCase], str | None]:
    def why_not(case: AttentionCase) -> str | None:
        if case.device == "cpu":
            return f"SDPA's {name} kernels are for GPUs"
        if name != "EFFICIENT" and case.dtype not in ("bfloat16", "float16"):
            return f"SDPA's {name} kernels take 16-bit tensors"
        if not takes_a_mask and case.mask not in ("dense", "causal", "dropout"):
            return f"SDPA's {name} kernels take no mask and no bias"
        return None

    return why_not


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, bias: Tensor | None, dropout_p: float
) -> Tensor:
    """Attention as it is written by hand, with the (B, H, L, S) scores in memory."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if dropout_p:
        probabilities = F.dropout(probabilities, dropout_p)
    return probabilities @ value


def _eager(case: AttentionCase, x: AttentionInputs, function: Callable[..., Tensor] = eager_attention) -> Made:
    return _masked_by_keep(case, x, lambda keep: function(x.query, x.key, x.value, keep, x.bias, x.dropout_p))


def _compiled_eager(case: AttentionCase, x: AttentionInputs) -> Made:
    return _eager(case, x, torch.compile(eager_attention, dynamic=False))


def _flex_why_not(case: AttentionCase) -> str | None:
    if case.device == "cpu" and case.backward:
        return "FlexAttention has no backward on the CPU"
    if case.mask == "dropout":
        return "FlexAttention has no dropout"
    if case.device == "cpu" and case.dtype == "float64":
        return "FlexAttention has no float64 on the CPU"
    return None


def _flex(case: AttentionCase, x: AttentionInputs) -> Made:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask: BlockMask | None = None
    bias = x.bias

    def prepare() -> None:
        nonlocal block_mask
        assert x.mask_mod is not None
        batch = case.batch if x.mask_of_batch else None
        block_mask = create_block_mask(x.mask_mod, batch, None, case.len_q, case.len_k, device=case.device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, i, j]

    if x.mask_mod is not None:
        prepare()

    def forward() -> Tensor:
        out = compiled(
            x.query,
            x.key,
            x.value,
            score_mod=None if bias is None else score_mod,
            block_mask=block_mask,
            enable_gqa=case.heads_q != case.heads_kv,
        )
        assert isinstance(out, Tensor)
        return out

    return forward, None if x.mask_mod is None else prepare


def attention_contenders(device: str) -> list[Contender]:
    """Ours first, then for GPUs each of our backends, then the peers."""
    backends = [
        _ours_on("cuda", "cuda"),
        _ours_on("cuda-portable", "cuda", FASTATTN_CUDA_PATH="portable"),
        _ours_on("triton", "triton"),
    ]
    return [
        _attention(OURS, _ours),
        *(backends if device != "cpu" else []),
        _attention("sdpa", _sdpa),
        _attention("sdpa-math", _sdpa_on(SDPBackend.MATH)),
        _attention("sdpa-flash", _sdpa_on(SDPBackend.FLASH_ATTENTION), _gpu_sdpa_why_not("FLASH", False)),
        _attention("sdpa-efficient", _sdpa_on(SDPBackend.EFFICIENT_ATTENTION), _gpu_sdpa_why_not("EFFICIENT", True)),
        _attention("sdpa-cudnn", _sdpa_on(SDPBackend.CUDNN_ATTENTION), _gpu_sdpa_why_not("CUDNN", True)),
        _attention("eager", _eager),
        _attention("compile", _compiled_eager, slow_to_start=True),
        _attention("flex", _flex, _flex_why_not, slow_to_start=True),
    ]


def user_contender(text: str) -> Contender:
    """The function named ``module:function``, with SDPA's signature or ours (see `fastattn.testing.adapters`).

    Raises ValueError when it cannot be loaded.
    """
    target = foreign_target(text)
    function = target.function

    def make(case: AttentionCase, x: AttentionInputs) -> Made:
        options: dict[str, Any] = {} if not x.dropout_p else {"dropout_p": x.dropout_p}
        if target.signature == "fastattn":
            mask = None if x.make_mask is None else x.make_mask()
            options |= {} if mask is None else {"mask": mask}
            options |= {} if x.bias is None else {"bias": x.bias}
            return lambda: function(x.query, x.key, x.value, **options), None
        if case.heads_q != case.heads_kv:
            options["enable_gqa"] = True
        if x.is_causal and "is_causal" in _parameter_names(function):
            return lambda: function(x.query, x.key, x.value, is_causal=True, **options), None

        def run(keep: Tensor | None) -> Tensor:
            attn_mask = x.bias if keep is None else keep
            given = options if attn_mask is None else {**options, "attn_mask": attn_mask}
            out: Tensor = function(x.query, x.key, x.value, **given)
            return out

        return _masked_by_keep(case, x, run)

    return _attention(text, make)


def _parameter_names(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature, as torch's own is
        return {"is_causal"}


def _mha(
    name: str,
    make: Callable[[MhaCase], nn.Module],
    slow_to_start: bool = False,
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Contender:
    def bind(case: Case) -> Bound:
        assert isinstance(case, MhaCase)
        inputs = mha_inputs(case)
        module = make(case)
        forward = mha_forward(module, case, inputs)

        def inside() -> Any:
            with around():
                return forward()

        return Bound(inside, mha_leaves(module, case, inputs), inputs.grad_out)

    return Contender(name, bind, slow_to_start=slow_to_start)


def mha_leaves(module: nn.Module, case: MhaCase, inputs: MhaInputs) -> dict[str, Tensor]:
    """What gets a gradient, by name."""
    if not case.backward:
        return {}
    memory = {} if inputs.memory is None else {"memory": inputs.memory}
    return {"x": inputs.x, **memory, **dict(module.named_parameters())}


def mha_forward(module: nn.Module, case: MhaCase, inputs: MhaInputs) -> Callable[[], Any]:
    """The call of ``nn.MultiheadAttention`` or ``nn.TransformerEncoderLayer`` on these inputs."""

    def forward() -> Any:
        if case.encoder_layer:
            return module(inputs.x, src_mask=inputs.attn_mask, src_key_padding_mask=inputs.key_padding_mask)
        memory = inputs.x if inputs.memory is None else inputs.memory
        masks = {"key_padding_mask": inputs.key_padding_mask, "attn_mask": inputs.attn_mask}
        return module(inputs.x, memory, memory, **masks, need_weights=case.need_weights)

    if not case.autocast:
        return forward
    return torch.autocast(torch.device(case.device).type, torch.bfloat16)(forward)


def make_mha(case: MhaCase, cls: type[nn.Module] = nn.MultiheadAttention) -> nn.Module:
    """The layer; the same seed gives every class the same parameters."""
    torch.manual_seed(0)
    module: nn.Module
    if case.encoder_layer:
        inner = FEEDFORWARD * case.embed_dim
        module = nn.TransformerEncoderLayer(case.embed_dim, case.heads, inner, dropout=0.0, batch_first=True)
        if cls is fastattn.MultiheadAttention:
            fastattn.replace_multihead_attention(module)
    else:
        module = cls(case.embed_dim, case.heads, batch_first=True)  # type: ignore[call-arg]
    return module.to(torch.device(case.device), torch_dtype(case.dtype)).train(case.backward)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _projections(case: Case) -> Bound:
    """The products of a self-attention layer's step with its weights, and nothing between them."""
    assert isinstance(case, MhaCase)
    inputs = mha_inputs(case)
    module = make_mha(case)
    inner = torch.randn_like(inputs.grad_out).requires_grad_(case.backward)  # in place of what attention gives
    grad_packed = torch.randn(case.batch, case.length, 3 * case.embed_dim).to(inputs.grad_out)

    def forward() -> tuple[Tensor, Tensor]:
        packed = F.linear(inputs.x, module.in_proj_weight, module.in_proj_bias)  # type: ignore[arg-type]
        return module.out_proj(inner), packed  # type: ignore[operator]

    leaves = mha_leaves(module, case, inputs)
    leaves |= {"inner": inner} if leaves else {}
    return Bound(forward, leaves, inputs.grad_out, grad_second=grad_packed)


def mha_contenders() -> list[Contender]:
    """Our module first, then torch's, with the fast path that its inference takes and without."""

    def compiled(case: MhaCase) -> nn.Module:
        module = make_mha(case)
        module.compile(dynamic=False)
        return module

    return [
        _mha(OURS, lambda case: make_mha(case, fastattn.MultiheadAttention)),
        _mha(STOCK, make_mha),
        _mha(STOCK_SLOW, make_mha, around=_without_fast_path),
        _mha("compile", compiled, slow_to_start=True),
        Contender(PROJECTIONS, _projections, yardstick=True),
    ]


def _weights(name: str, function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Contender:
    def bind(case: Case) -> Bound:
        assert isinstance(case, WeightsCase)
        return bind_weights(case, weights_inputs(case), function)

    return Contender(name, bind)


def bind_weights(
    case: WeightsCase, x: WeightsInputs, function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Bound:
    """The step of a function that gives (output, averaged weights)."""
    leaves = {"dq": x.query, "dk": x.key, "dv": x.value} if case.backward else {}
    return Bound(lambda: function(x.query, x.key, x.value), leaves, x.grad_out, grad_second=x.grad_weights)


def eager_weights(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as it is written by hand, and its weights averaged over the heads."""
    probabilities = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), dim=-1)
    return probabilities @ value, probabilities.mean(1)


def _our_weights(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = fastattn.attention(query, key, value, return_lse=True)
    return out, fastattn.attention_weights(query, key, lse)


def weights_contenders() -> list[Contender]:
    """Ours first, then attention as written by hand; SDPA gives no weights."""
    return [_weights(OURS, _our_weights), _weights("eager", eager_weights)]


def _loss(name: str, make: Callable[[LossCase], Callable[..., Tensor]], slow_to_start: bool = False) -> Contender:
    def bind(case: Case) -> Bound:
        assert isinstance(case, LossCase)
        x = loss_inputs(case)
        function = make(case)
        leaves = {"dinput": x.prediction} if case.backward else {}
        return Bound(lambda: function(x.prediction, x.target, x.mask, x.patch), leaves)

    return Contender(name, bind, slow_to_start=slow_to_start)


def authors_l1_loss(prediction: Tensor, target: Tensor, mask: Tensor, patch: int) -> Tensor:
    """SimMIM's loss as its authors publish it: the patch mask expanded to pixels, L1 everywhere, then masked."""
    pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1).contiguous()
    recon = F.l1_loss(target, prediction, reduction="none")
    return (recon * pixels).sum() / (pixels.sum() + 1e-5) / prediction.shape[1]


def eager_mse_loss(prediction: Tensor, target: Tensor, mask: Tensor, patch: int) -> Tensor:
    """The same with the squared error."""
    pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1).contiguous()
    recon = F.mse_loss(prediction, target, reduction="none")
    return (recon * pixels).sum() / (pixels.sum() + 1e-5) / prediction.shape[1]


def _eager_loss(case: LossCase) -> Callable[..., Tensor]:
    return authors_l1_loss if case.kind == "l1" else eager_mse_loss


def _our_loss(case: LossCase) -> Callable[..., Tensor]:
    function = fastattn.masked_l1_loss if case.kind == "l1" else fastattn.masked_mse_loss
    return lambda prediction, target, mask, patch: function(prediction, target, mask, patch_size=patch)


def _copy(case: Case) -> Bound:
    """A copy of the prediction: the bandwidth that torch reaches on as much memory."""
    assert isinstance(case, LossCase)
    source = loss_inputs(case).prediction.detach()
    copied = torch.empty_like(source)
    return Bound(lambda: copied.copy_(source), bytes=2 * source.numel() * source.element_size())


def loss_contenders() -> list[Contender]:
    """Ours first, then the loss as written by hand, eager and compiled."""
    return [
        _loss(OURS, _our_loss),
        _loss("eager", _eager_loss),
        _loss("compile", lambda case: torch.compile(_eager_loss(case), dynamic=False), slow_to_start=True),
        Contender(COPY, _copy, yardstick=True),
    ]


def bind_additive(case: AdditiveCase, x: AdditiveInputs, function: Callable[..., Any]) -> Bound:
    """The step of a function of query, key, value and score weight."""
    leaves = x.leaves if case.backward else {}
    return Bound(lambda: function(x.query, x.key, x.value, x.score_weight), leaves, x.grad_out)


def eager_additive(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor) -> Tensor:
    """Additive attention as it is written by hand, with its L x S x A features in memory."""
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ score_weight
    return torch.softmax(scores, dim=-1) @ value


def additive_contenders() -> list[Contender]:
    """Ours first, then additive attention as written by hand, eager and compiled."""

    def contender(name: str, make: Callable[[], Callable[..., Any]], slow_to_start: bool = False) -> Contender:
        def bind(case: Case) -> Bound:
            assert isinstance(case, AdditiveCase)
            return bind_additive(case, additive_inputs(case), make())

        return Contender(name, bind, slow_to_start=slow_to_start)

    return [
        contender(OURS, lambda: fastattn.additive_attention),
        contender("eager", lambda: eager_additive),
        contender("compile", lambda: torch.compile(eager_additive, dynamic=False), slow_to_start=True),
    ]


def bind_head(case: HeadCase, x: HeadInputs, function: Callable[..., Tensor]) -> Bound:
    """The step of a function of hidden states, weight, bias, target and mask."""
    leaves = x.leaves if case.backward else {}
    return Bound(lambda: function(x.hidden, x.weight, x.bias, x.target, x.mask), leaves)


def eager_head(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Every token's prediction, then the masked squared error of them as it is written by hand."""
    error = (F.linear(hidden, weight, bias) - target).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def head_contenders() -> list[Contender]:
    """Ours first, then the head and the loss as written by hand."""

    def contender(name: str, function: Callable[..., Any]) -> Contender:
        def bind(case: Case) -> Bound:
            assert isinstance(case, HeadCase)
            return bind_head(case, head_inputs(case), function)

        return Contender(name, bind)

    return [contender(OURS, fastattn.linear_masked_mse_loss), contender("eager", eager_head)]
