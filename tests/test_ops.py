"""The operators under torch's own machinery: opcheck, autograd, torch.compile, torch.export, autocast, FLOP counter."""

import importlib
import sys
import warnings

import pytest
import torch
import torch._dynamo.utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fastattn
from fastattn import Mask, dispatch, ops
from fastattn.attention import _BUILDERS, _attention_packed, _attention_with_seed
from fastattn.backends import reference
from fastattn.losses import masked_mse_loss

FASTATTN = torch.ops.fastattn


@pytest.fixture
def backend(backend):
    with fastattn.use_backend(backend):
        yield backend


@pytest.fixture
def first_able():
    """For what never sees a kernel, such as tracing: one backend is enough."""
    name = "cpu" if dispatch.NATIVE_FAILURE is None else "reference"
    with fastattn.use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def every_mask(B, H, L, S):
    """All parts of the kernel form at once."""
    return (
        Mask.window(L, 9)
        & Mask.causal("bottom_right")
        & Mask.prefix(torch.arange(B) + 3)
        & Mask.key_lengths(torch.arange(B) + S - 2)
        & Mask.key_padding(torch.rand(B, S) > 0.1)
        & Mask.segments(torch.randint(0, 2, (B, L)), torch.randint(0, 2, (B, S)))
        & Mask.dense(torch.rand(B, 1, L, S) > 0.2)
    )


class Sample:
    """Arguments of the attention operators for one problem."""

    def __init__(self, B=2, Hq=4, Hkv=2, L=7, S=11, D=8, Dv=5, dtype=torch.float32, mask=None, bias=None, dropout=0.0):
        self.query = torch.randn(B, L, Hq, D, dtype=dtype).transpose(1, 2)
        self.key = torch.randn(B, Hkv, S, D, dtype=dtype)
        self.value = torch.randn(B, Hkv, S, Dv, dtype=dtype)
        self.bias = None if bias is None else torch.randn(bias, dtype=dtype)
        self.mask = mask(B, Hq, L, S) if mask else None
        self.seed = torch.tensor(1234) if dropout else None
        self.dropout = dropout

    def flat_mask(self, backend):
        if self.mask is None:
            return ops.flatten_mask(None)
        sizes = (self.query.shape[0], self.query.shape[1], self.query.shape[2], self.key.shape[2])
        return ops.flatten_mask(self.mask.kernel_form(*sizes, self.query.device, build=_BUILDERS[backend]))

    def tail(self, backend):
        return self.flat_mask(backend), (0.3, self.dropout, self.seed, backend)

    def attention(self, backend, grad=True):
        mask, rest = self.tail(backend)
        tensors = [None if x is None else x.clone() for x in (self.query, self.key, self.value, self.bias)]
        for x in tensors:
            if x is not None:
                x.requires_grad_(grad)
        return (*tensors, *mask, *rest)

    def weights(self, backend, average, grad=True):
        mask, (scale, *rest) = self.tail(backend)
        with torch.no_grad():
            lse = FASTATTN.attention(*self.attention(backend, False))[1]
        query, key, lse = (x.clone().requires_grad_(grad) for x in (self.query, self.key, lse))
        bias = None if self.bias is None else self.bias.clone().requires_grad_(grad)
        return query, key, lse, bias, *mask, scale, average, *rest


SAMPLES = {
    "plain": {},
    "causal": {"mask": lambda B, H, L, S: Mask.causal()},
    "every mask": {"mask": every_mask, "bias": (2, 4, 7, 11), "dropout": 0.3},
    "row bias": {"bias": (1, 4, 1, 11)},
    "float64": {"dtype": torch.float64, "bias": (1, 1, 7, 1)},
    "bfloat16": {"dtype": torch.bfloat16, "bias": (1, 4, 7, 11)},
    "empty": {"B": 0},
    "no keys": {"S": 0, "L": 3},
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_attention(name, backend):
    sample = Sample(**SAMPLES[name])
    opcheck(FASTATTN.attention.default, sample.attention(backend))


@pytest.mark.parametrize(
    ("name", "with_grad_lse"), [*((name, True) for name in SAMPLES), ("plain", False), ("every mask", False)]
)
def test_opcheck_attention_backward(name, with_grad_lse, backend):
    sample = Sample(**SAMPLES[name])
    arguments = sample.attention(backend, False)
    out, lse = FASTATTN.attention(*arguments)
    grad_lse = torch.randn_like(lse) if with_grad_lse else None
    opcheck(
        FASTATTN.attention_backward.default,
        (torch.randn_like(out), grad_lse, *arguments[:3], out, lse, *arguments[3:], with_grad_lse),
    )


@pytest.mark.parametrize("layout", ["batch first", "sequence first"])
def test_opcheck_attention_packed(layout, backend):
    shape = (2, 7, 3, 4, 8)
    qkv = torch.randn(shape)
    if layout == "sequence first":
        qkv = torch.randn(7, 2, 3, 4, 8).transpose(0, 1)
    sample = Sample(Hkv=4, S=7, Dv=8, mask=every_mask, bias=(1, 4, 7, 7), dropout=0.2)
    mask, rest = sample.tail(backend)
    bias = sample.bias
    arguments = (qkv.clone().requires_grad_(), bias.clone().requires_grad_(), *mask, *rest)
    opcheck(FASTATTN.attention_packed.default, arguments)
    out, lse = FASTATTN.attention_packed(qkv, bias, *mask, *rest)
    opcheck(
        FASTATTN.attention_packed_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), qkv, out, lse, bias, *mask, *rest, True),
    )


@pytest.mark.parametrize(
    ("name", "average"),
    [("plain", True), ("every mask", True), ("every mask", False), ("float64", False), ("no keys", True)],
)
def test_opcheck_attention_weights(name, average, backend):
    sample = Sample(**SAMPLES[name])
    arguments = sample.weights(backend, average)
    opcheck(FASTATTN.attention_weights.default, arguments)
    arguments = sample.weights(backend, average, False)
    weights = FASTATTN.attention_weights(*arguments)
    opcheck(
        FASTATTN.attention_weights_backward.default,
        (torch.randn_like(weights), *arguments, sample.bias is not None),
    )


def test_opcheck_mask_tiles(backend):
    for shapes in ([(1, 1, 7, 11)], [(2, 1, 7, 11), (1, 3, 1, 11)], [(2, 1, 100, 130)]):
        len_q, len_k = shapes[0][2:]
        masks = [torch.rand(shape) > 0.5 for shape in shapes]
        opcheck(FASTATTN.mask_tiles.default, (masks, len_q, len_k, 48, 64, backend))


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        ("l2", "masked_mean"),
        ("l1", "sum"),
        ("smooth_l1", "mean"),
        ("l2", "none"),
        ("l1", "none"),
        ("smooth_l1", "none"),
    ],
)
def test_opcheck_masked_loss(kind, reduction, backend):
    image, target, grid = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.rand(2, 4, 4) > 0.4
    options = (kind, reduction, 2, 0.7, False, 1e-6)
    differentiable = (image.clone().requires_grad_(), target.clone().requires_grad_())
    opcheck(FASTATTN.masked_loss.default, (*differentiable, grid, *options, False, backend))
    opcheck(FASTATTN.masked_loss.default, (image, target, grid, *options, True, backend))
    if reduction == "none":  # the one with a backward of its own
        opcheck(FASTATTN.masked_loss_backward.default, (image, image, target, grid, kind, 2, 0.7, False, 1e-6, backend))


# Autograd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, (2, 4, 4, 5), (1, 4, 1, 5), (1, 1, 4, 1)])
def test_gradcheck_attention(bias, backend):
    sample = Sample(L=4, S=5, D=3, Dv=2, dtype=torch.float64, mask=every_mask, bias=bias, dropout=0.2)
    query, key, value, bias, *rest = sample.attention(backend)

    def function(query, key, value, *bias):
        out, lse = FASTATTN.attention(query, key, value, *(bias or (None,)), *rest)
        return out, lse.where(lse != -torch.inf, 0)

    inputs = (query, key, value) if bias is None else (query, key, value, bias)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gradcheck_attention_packed(backend):
    sample = Sample(Hq=2, Hkv=2, L=4, S=4, Dv=8, dtype=torch.float64, mask=lambda *sizes: Mask.causal(), dropout=0.2)
    mask, rest = sample.tail(backend)
    qkv = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda qkv, bias: FASTATTN.attention_packed(qkv, bias, *mask, *rest), (qkv, bias), fast_mode=True
    )


@pytest.mark.parametrize("average", [True, False])
def test_gradcheck_attention_weights(average, backend):
    sample = Sample(
        L=4, S=5, D=3, dtype=torch.float64, mask=lambda *sizes: Mask.causal(), bias=(1, 4, 4, 1), dropout=0.2
    )
    query, key, lse, bias, *rest = sample.weights(backend, average)
    assert torch.autograd.gradcheck(
        lambda *inputs: FASTATTN.attention_weights(*inputs, *rest), (query, key, lse, bias), fast_mode=True
    )


@pytest.mark.parametrize("reduction", ["masked_mean", "none"])
@pytest.mark.parametrize("need_grad", [True, False])
def test_gradcheck_masked_loss(reduction, need_grad, backend):
    input, target = (torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 5, 1) > 0.4

    def function(input, target):
        return FASTATTN.masked_loss(input, target, mask, "l2", reduction, 0, 1.0, False, 1e-6, need_grad, backend)[0]

    # Also with need_grad False: a program exported for evaluation can still be trained.
    assert torch.autograd.gradcheck(function, (input, target), fast_mode=True)


@pytest.mark.parametrize("wanted", ["query", "key", "value", "bias"])
def test_gradients_only_of_what_needs_one(wanted, backend):
    sample = Sample(bias=(1, 4, 1, 11))
    arguments = dict(zip(("query", "key", "value", "bias"), sample.attention(backend, False)[:4], strict=True))
    everything = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    fastattn.attention(**everything).square().sum().backward()
    arguments[wanted] = arguments[wanted].clone().requires_grad_()
    fastattn.attention(**arguments).square().sum().backward()
    for name, tensor in arguments.items():
        if name == wanted:
            assert_close(tensor.grad, everything[name].grad, rtol=0, atol=0)
        else:
            assert tensor.grad is None


def test_gradient_through_lse_alone(backend):
    sample = Sample(mask=every_mask)
    query, key, value = sample.attention(backend)[:3]
    _, lse = fastattn.attention(query, key, value, mask=sample.mask, return_lse=True)
    lse.where(lse != -torch.inf, 0).sum().backward()
    dense = sample.mask.to_dense(2, 4, 7, 11)
    expected_query, expected_key = (x.detach().clone().requires_grad_() for x in (query, key))
    scores = expected_query @ expected_key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    expected = scores.masked_fill(~dense, -1e30).logsumexp(-1)
    expected.where(dense.any(-1), 0).sum().backward()
    assert_close(query.grad, expected_query.grad)
    assert_close(key.grad, expected_key.grad)
    assert not value.grad.any()


def test_packed_is_attention_of_its_parts(backend):
    for sequence_first in (False, True):
        qkv = torch.randn(6, 2, 3, 4, 8).transpose(0, 1) if sequence_first else torch.randn(2, 6, 3, 4, 8)
        qkv.requires_grad_()
        parts = qkv.detach().clone().requires_grad_()
        bias = torch.randn(4, 6, 1, requires_grad=True)
        bias_parts = bias.detach().clone().requires_grad_()
        options = {"mask": Mask.causal(), "dropout_p": 0.2, "scale": 0.5, "dropout_seed": torch.tensor(3)}
        out, lse = _attention_packed(qkv, bias=bias, **options, backend=None)
        split = [x.transpose(1, 2) for x in parts.unbind(2)]
        expected, expected_lse = _attention_with_seed(*split, bias=bias_parts, **options, backend=None)
        assert_close(out, expected)
        assert_close(lse, expected_lse)
        (out.square().sum() + lse.sum()).backward()
        (expected.square().sum() + expected_lse.sum()).backward()
        assert_close(qkv.grad, parts.grad)
        assert_close(bias.grad, bias_parts.grad)


def test_packed_gradient_has_the_layout_of_the_projection(backend):
    qkv = torch.randn(6, 2, 3, 4, 8).transpose(0, 1).requires_grad_()
    out, _ = _attention_packed(qkv, mask=None, bias=None, dropout_p=0.0, scale=None, dropout_seed=None, backend=None)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient.stride() == qkv.stride()


def test_outputs_share_no_memory_with_inputs(backend):
    sample = Sample(L=1, S=1, Dv=8)
    inputs = sample.attention(backend, False)[:3]
    outputs = FASTATTN.attention(*sample.attention(backend, False))
    pointers = {x.untyped_storage().data_ptr() for x in inputs}
    assert not pointers & {x.untyped_storage().data_ptr() for x in outputs}


def test_a_kept_graph_survives_changes_of_the_gradient(backend):
    # The gradient of a plain backward is the saved tensor itself, but not while the graph is kept.
    prediction = torch.randn(2, 5, 3, requires_grad=True)
    loss = masked_mse_loss(prediction, torch.randn(2, 5, 3), torch.ones(2, 5, dtype=bool))
    loss.backward(retain_graph=True)
    first = prediction.grad.clone()
    prediction.grad.zero_()
    loss.backward()
    assert_close(prediction.grad, first, rtol=0, atol=0)


def test_upstream_gradient_of_the_loss(backend):
    prediction = torch.randn(2, 5, 3, requires_grad=True)
    arguments = (torch.randn(2, 5, 3), torch.rand(2, 5) > 0.3)
    (plain,) = torch.autograd.grad(masked_mse_loss(prediction, *arguments), prediction)
    assert not plain.requires_grad
    (scaled,) = torch.autograd.grad(masked_mse_loss(prediction, *arguments) * 3, prediction)
    assert_close(scaled, plain * 3)


# Transforms ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:.*batching rule")
def test_func_grad_and_vmap_of_grad(backend):
    query, key, value = (torch.randn(2, 4, 7, 8) for _ in range(3))

    def function(query):
        return fastattn.attention(query, key, value, mask=Mask.causal()).square().sum()

    leaf = query.clone().requires_grad_()
    function(leaf).backward()
    assert_close(torch.func.grad(function)(query), leaf.grad)
    queries = torch.stack((query, 2 * query))
    batched = torch.func.vmap(torch.func.grad(function))(queries)
    assert_close(batched, torch.stack([torch.func.grad(function)(x) for x in queries]))


@pytest.mark.filterwarnings("error:.*batching rule")
def test_vmap(backend):
    queries, keys = torch.randn(3, 2, 4, 7, 8), torch.randn(3, 2, 4, 11, 8)
    got = torch.func.vmap(lambda query, key: fastattn.attention(query, key, key, mask=Mask.causal()))(queries, keys)
    expected = [
        fastattn.attention(query, key, key, mask=Mask.causal()) for query, key in zip(queries, keys, strict=True)
    ]
    assert_close(got, torch.stack(expected))


@pytest.mark.filterwarnings("error:.*batching rule")
def test_backward_through_vmap(backend):
    prediction, target = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 4)
    counted = torch.rand(5, 1) > 0.3

    def loss(prediction, target):
        return masked_mse_loss(prediction, target, counted)

    torch.func.vmap(loss)(prediction, target).sum().backward()
    separate = prediction.detach().clone().requires_grad_()
    sum(loss(x, y) for x, y in zip(separate, target, strict=True)).backward()
    assert_close(prediction.grad, separate.grad)


@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_what_watches_sees_the_operator(backend):
    query, key, value = (torch.randn(2, 4, 7, 8, requires_grad=True) for _ in range(3))
    with torch.profiler.profile() as profile:
        fastattn.attention(query, key, value).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastattn::attention", "fastattn::attention_backward"} <= names
    plain_query, plain_key, plain_value = (x.detach() for x in (query, key, value))
    traced = torch.jit.trace(lambda x: fastattn.attention(x, plain_key, plain_value), (plain_query,), check_trace=False)
    assert "fastattn::attention" in str(traced.graph)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(query)
        assert isinstance(fastattn.attention(fake, fake, fake), type(fake))


def test_the_short_way_is_the_operator(backend):
    sample = Sample(mask=every_mask, bias=(2, 4, 7, 11), dropout=0.3)
    outputs = []
    for function in (ops.attention, FASTATTN.attention):
        arguments = sample.attention(backend)
        out, lse = function(*arguments)
        loss = out.square().sum() + lse.where(lse != -torch.inf, 0).sum()
        outputs.append((out, lse, *torch.autograd.grad(loss, arguments[:4])))
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_checkpointing_and_saved_tensor_hooks(backend):
    query, key, value = (torch.randn(2, 4, 7, 8, requires_grad=True) for _ in range(3))

    def function(query, key, value):
        return fastattn.attention(query, key, value, mask=torch.ones(7, 7, dtype=torch.bool).tril(), dropout_p=0.3)

    torch.manual_seed(1)
    expected = torch.autograd.grad(function(query, key, value).sum(), (query, key, value))
    for use_reentrant in (False, True):
        torch.manual_seed(1)
        out = checkpoint(function, query, key, value, use_reentrant=use_reentrant)
        out.sum().backward()
        for tensor, gradient in zip((query, key, value), expected, strict=True):
            assert_close(tensor.grad, gradient)
            tensor.grad = None
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        function(query, key, value)
    assert len(packed) > 5


# torch.compile -------------------------------------------------------------------------------------------------------


def plain(query, key, value, extra):
    return fastattn.attention(query, key, value)


def composed_masks(query, key, value, extra):
    mask = Mask.key_lengths(extra["lengths"]) & Mask.key_padding(extra["keep"]) & Mask.causal("bottom_right")
    return fastattn.attention(query, key, value, mask=mask, bias=extra["bias"])


def dense_mask(query, key, value, extra):
    return fastattn.attention(query, key, value, mask=extra["dense"], bias=extra["bias"], dropout_p=0.1)


def sdpa(query, key, value, extra):
    return fastattn.scaled_dot_product_attention(
        query, key, value, attn_mask=extra["bias"], scale=extra["scale"], enable_gqa=True
    )


def weights_and_lse(query, key, value, extra):
    mask = Mask.window(4, 4)
    out, lse = fastattn.attention(query, key, value, mask=mask, bias=extra["bias"], return_lse=True)
    weights = fastattn.attention_weights(query, key, lse, mask=mask, bias=extra["bias"])
    return out.square().sum() + weights.square().sum() + lse.square().sum()


def packed(query, key, value, extra):
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key.repeat_interleave(2, 1)[:, :, : query.shape[2]])], 2)
    qkv = torch.cat((qkv, qkv[:, :, :1]), 2)
    return _attention_packed(
        qkv, mask=Mask.causal(), bias=None, dropout_p=0.0, scale=None, dropout_seed=None, backend=None
    )[0]


def loss(query, key, value, extra):
    return masked_mse_loss(query * 2, torch.zeros_like(query), extra["keep"][:, None, : query.shape[2], None])


def inside_use_backend(query, key, value, extra):
    with fastattn.use_backend("reference"):
        return fastattn.attention(query, key, value, mask=Mask.causal())


COMPILED = (plain, composed_masks, dense_mask, sdpa, weights_and_lse, packed, loss, inside_use_backend)


def compile_inputs(B, L, S):
    query = torch.randn(B, 4, L, 8, requires_grad=True)
    key, value = (torch.randn(B, 2, S, 8, requires_grad=True) for _ in range(2))
    extra = {
        "lengths": torch.randint(1, S, (B,)),
        "keep": torch.rand(B, S) > 0.2,
        "dense": torch.rand(B, 1, L, S) > 0.3,
        "bias": torch.randn(4, L, S, requires_grad=True),
        "scale": 0.25,
    }
    return query, key, value, extra


def results(function, query, key, value, extra):
    torch.manual_seed(7)
    inputs = (query, key, value, extra["bias"])
    out = function(query, key, value, extra)
    return out, *torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)


def compare_compiled(function, sizes, **options):
    compiled = torch.compile(function, fullgraph=True, **options)
    for size in sizes:
        inputs = compile_inputs(*size)
        for got, expected in zip(results(compiled, *inputs), results(function, *inputs), strict=True):
            if expected is None:
                assert got is None
            else:
                assert_close(got, expected)


@pytest.mark.parametrize("function", COMPILED, ids=lambda function: function.__name__)
def test_compile(function, first_able):
    compare_compiled(function, [(3, 17, 23), (5, 20, 130)], backend="aot_eager", dynamic=True)


def test_compile_with_inductor(first_able):
    compare_compiled(composed_masks, [(3, 17, 23)], backend="inductor", dynamic=True)


def test_compile_does_not_recompile_with_the_length(first_able):
    compiled = torch.compile(composed_masks, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for size in ((3, 17, 23), (5, 31, 40), (6, 100, 130)):  # no two sizes alike, which would be taken for one
        compiled(*compile_inputs(*size))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_use_backend_outside_recompiles():
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    inputs = compile_inputs(2, 5, 6)
    with fastattn.use_backend("reference"):
        compiled(*inputs)
    with fastattn.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        compiled(*inputs)


# torch.export --------------------------------------------------------------------------------------------------------


class Exported(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.projection = torch.nn.Linear(32, 96)

    def forward(self, x, lengths, dense):
        batch, length, _ = x.shape
        qkv = self.projection(x).view(batch, length, 3, 4, 8)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.kind == "lengths":
            return fastattn.attention(query, key, value, mask=Mask.causal() & Mask.key_lengths(lengths))
        if self.kind == "dense":
            return fastattn.attention(query, key, value, mask=dense, dropout_p=0.1)
        if self.kind == "packed":
            return _attention_packed(
                qkv, mask=Mask.causal(), bias=None, dropout_p=0.0, scale=None, dropout_seed=None, backend=None
            )[0]
        return masked_mse_loss(self.projection(x), torch.zeros(1, 1, 96).expand(batch, length, 96), dense[:, 0, 0])


def export_inputs(batch, length):
    dense = torch.rand(batch, 1, length, length) > 0.3
    return torch.randn(batch, length, 32), torch.randint(1, length, (batch,)), dense


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "dense", "packed", "loss"])
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")
def test_export(kind, strict, first_able):
    module = Exported(kind)
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=4096)
    shapes = ({0: batch, 1: length}, {0: batch}, {0: batch, 2: length, 3: length})
    program = torch.export.export(module, export_inputs(2, 16), dynamic_shapes=shapes, strict=strict)
    exported = program.module()
    inputs = export_inputs(5, 70)
    gradients, outputs = [], []
    for run in (module, exported):
        torch.manual_seed(3)
        out = run(*inputs)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out.square().sum(), run.projection.weight)[0])
    assert_close(*outputs)
    assert_close(*gradients)
    torch.manual_seed(3)
    assert_close(program.run_decompositions().module()(*inputs).detach(), outputs[0])


class MaskedBy(torch.nn.Module):
    def forward(self, query, key, mask):
        return fastattn.attention(query, key, key, mask=mask)


def trace(module, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch.jit.trace itself, and the shapes that it takes for fixed
        return torch.jit.trace(module, inputs, check_trace=False)


@pytest.mark.parametrize(
    "record", [trace, lambda *x: torch.export.export(*x[:1], x[1:]).module()], ids=("trace", "export")
)
def test_a_program_recorded_with_an_expanded_mask_takes_any(record, first_able):
    query, keep = torch.randn(2, 4, 6, 8), torch.rand(2, 4, 6, 6) < 0.5
    program = record(MaskedBy(), query, query, keep[:, :1, :1].expand(2, 4, 6, 6))
    assert_close(program(query, query, keep), fastattn.attention(query, query, query, mask=keep))


@pytest.mark.parametrize("shape", [(2, 1, 6, 1), (1, 4, 1, 6), (2, 1, 6, 6), (2, 1, 1, 1)])
def test_a_traced_mask_takes_any_length(shape, first_able):
    query, keep = torch.randn(2, 4, 6, 8), torch.rand(shape) < 0.5
    program = trace(MaskedBy(), query, query, keep)
    for len_q, len_k in (6, 60), (3, 6), (90, 130):
        query, key = torch.randn(2, 4, len_q, 8, requires_grad=True), torch.randn(2, 4, len_k, 8)
        keep = torch.rand(*shape[:2], len_q if shape[2] > 1 else 1, len_k if shape[3] > 1 else 1) < 0.5
        outputs = program(query, key, keep), fastattn.attention(query, key, key, mask=keep)
        assert_close(*outputs)
        assert_close(*(torch.autograd.grad(out.square().sum(), query) for out in outputs))


def test_a_traced_mask_of_one_query_takes_several(first_able):
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8)
    keep = torch.rand(2, 1, 6, 9) < 0.5
    program = trace(MaskedBy(), query[:, :, :1], key, keep[:, :, :1])
    assert_close(program(query, key, keep), fastattn.attention(query, key, key, mask=keep))


def test_a_trace_holds_no_map_that_was_made_before(first_able):
    mask = Mask.dense(torch.rand(1, 1, 6, 1) < 0.5)
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 60, 8)

    def function(query, key):
        return fastattn.attention(query, key, key, mask=mask)

    function(query, query)
    assert_close(trace(function, query, query)(query, key), function(query, key))


# Autocast ------------------------------------------------------------------------------------------------------------


def test_autocast_runs_attention_in_its_dtype(backend):
    sample = Sample(bias=(1, 4, 7, 11))
    query, key, value, bias = sample.attention(backend)[:4]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = fastattn.attention(query, key.detach().bfloat16(), value, bias=bias, return_lse=True)
        weights = fastattn.attention_weights(query, key, lse, bias=bias)
        qkv = torch.randn(2, 6, 3, 4, 8)
        packed_out, packed_lse = _attention_packed(
            qkv, mask=None, bias=None, dropout_p=0.0, scale=None, dropout_seed=None, backend=None
        )
    assert out.dtype == weights.dtype == packed_out.dtype == torch.bfloat16
    assert lse.dtype == packed_lse.dtype == torch.float32
    cast = [x.detach().bfloat16() for x in (query, key, value, bias)]
    assert_close(out, fastattn.attention(*cast[:3], bias=cast[3]), rtol=0, atol=0)
    out.sum().backward()
    assert query.grad.dtype == bias.grad.dtype == torch.float32


def test_backward_within_autocast_is_not_cast(backend):
    sample = Sample(bias=(1, 4, 7, 11))
    gradients = []
    for within in (False, True):
        query, key, value, bias = sample.attention(backend)[:4]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            out = fastattn.attention(query, key, value, bias=bias)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            gradients.append(torch.autograd.grad(out, (query, key, value, bias), torch.ones_like(out)))
    for outside, inside in zip(*gradients, strict=True):
        assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("watched", [False, True])
def test_autocast_is_the_same_by_either_way(watched, backend):
    sample = Sample(bias=(1, 4, 7, 11), mask=every_mask, dropout=0.3)
    query, key, value, bias, *rest = sample.attention(backend)
    function = FASTATTN.attention if watched else ops.attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = function(query, key, value, bias, *rest)
    cast = [x.detach().bfloat16().requires_grad_() for x in (query, key, value, bias)]
    expected, expected_lse = FASTATTN.attention(*cast, *rest)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    out.sum().backward()
    expected.sum().backward()
    assert all(torch.equal(x.grad, y.grad.float()) for x, y in zip((query, key, value, bias), cast, strict=True))


def test_autocast_leaves_float64_alone(backend):
    sample = Sample(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.attention(sample.query, sample.key, sample.value).dtype == torch.float64


def test_autocast_runs_losses_in_float32(backend):
    prediction = torch.randn(2, 5, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_mse_loss(prediction, torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))
    assert loss.dtype == torch.float32
    loss.backward()
    assert prediction.grad.dtype == torch.bfloat16


def test_autocast_under_compile(first_able):
    def function(query, key, value, extra):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastattn.attention(query, key, value)

    compare_compiled(function, [(3, 17, 23)], backend="aot_eager")


# FLOPs ---------------------------------------------------------------------------------------------------------------


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
def test_flops(causal, backend):
    sample = Sample(B=2, Hq=4, Hkv=2, L=7, S=11, D=8, Dv=6)
    query, key, value = sample.attention(backend)[:3]
    mask = Mask.causal() if causal else None
    pairs = 2 * 4 * (sum(range(1, 8)) if causal else 7 * 11)
    assert counted(lambda: fastattn.attention(query, key, value, mask=mask)) == 2 * pairs * (8 + 6)
    out = fastattn.attention(query, key, value, mask=mask).sum()
    assert counted(out.backward) == 2 * pairs * (3 * 8 + 2 * 6)
    lse = torch.zeros(2, 4, 7, requires_grad=True)
    assert counted(lambda: fastattn.attention_weights(query, key, lse, mask=mask)) == 2 * pairs * 8
    weights = fastattn.attention_weights(query, key, lse, mask=mask).sum()
    assert counted(weights.backward) == 2 * pairs * 3 * 8


def test_flops_of_the_packed_operator(backend):
    qkv = torch.randn(2, 7, 3, 4, 8, requires_grad=True)
    options = {"mask": None, "bias": None, "dropout_p": 0.0, "scale": None, "dropout_seed": None, "backend": None}
    assert counted(lambda: _attention_packed(qkv, **options)) == 2 * 2 * 4 * 7 * 7 * 16
    out = _attention_packed(qkv, **options)[0].sum()
    assert counted(out.backward) == 2 * 2 * 4 * 7 * 7 * 40


def test_dense_flops_are_those_of_torch(backend):
    shapes = (2, 4, 9, 8), (2, 4, 11, 8), (2, 4, 11, 6)
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    assert counted(lambda: fastattn.attention(query, key, value)) == sdpa_flop_count(*shapes)
    out = fastattn.attention(query, key, value)
    assert counted(out.sum().backward) == sdpa_backward_flop_count(out.shape, *shapes)


@pytest.mark.parametrize("lengths", [(1, 1), (5, 5), (7, 3), (3, 7), (0, 4), (4, 0)])
def test_flops_count_the_pairs_of_a_band(lengths):
    L, S = lengths
    bands = [Mask.causal(), Mask.causal("bottom_right"), Mask.window(2, 1), Mask.window(-1, 3), Mask.window(1, -2)]
    bands += [Mask.window(0, None, "bottom_right") & Mask.window(None, 2), Mask.window(None, None) & Mask.causal()]
    for mask in bands:
        form = mask.kernel_form(1, 1, L, S, torch.device("cpu"))
        assert ops._pairs(list(form.band), L, S) == int(mask.to_dense(1, 1, L, S).sum())


# Registration --------------------------------------------------------------------------------------------------------


def test_every_operator_is_functional_and_documented_by_its_schema():
    for name in ops.SCHEMAS:
        schema = getattr(FASTATTN, name).default._schema
        assert not schema.is_mutable
        assert all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))


def test_importing_twice_keeps_the_operators(backend):
    sample = Sample()
    expected = fastattn.attention(sample.query, sample.key, sample.value)
    importlib.reload(ops)
    assert_close(fastattn.attention(sample.query, sample.key, sample.value), expected)
    kept = sys.modules.pop("fastattn.ops")
    try:
        importlib.import_module("fastattn.ops")
        assert_close(fastattn.attention(sample.query, sample.key, sample.value), expected)
    finally:
        sys.modules["fastattn.ops"] = kept
        fastattn.__dict__["ops"] = kept


def test_meta_tensors_have_shapes_only():
    query = torch.empty(2, 4, 7, 8, device="meta")
    out, lse = fastattn.attention(query, query, query, mask=Mask.causal(), return_lse=True)
    assert out.shape == (2, 4, 7, 8) and out.is_meta
    assert lse.shape == (2, 4, 7) and lse.dtype == torch.float32


def test_masks_survive_flattening():
    mask = every_mask(2, 4, 7, 11)
    restored = ops.unflatten_mask(
        ops.flatten_mask(mask.kernel_form(2, 4, 7, 11, torch.device("cpu"))), 7, 11, "reference"
    )
    assert torch.equal(reference.expand(restored, 2, 4, 7, 11, torch.device("cpu")), mask.to_dense(2, 4, 7, 11))
    assert ops.unflatten_mask(ops.flatten_mask(None), 7, 11, "reference") is None
