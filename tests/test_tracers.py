"""What traces, compiles, exports or counts a model sees our operator, and gives the numbers of torch's own module."""

import copy
import functools
import io
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

import fastattn

E, H, N, L = 16, 2, 3, 7
FORWARDS = {"fastattn::attention", "fastattn::attention_packed"}


class Attention(nn.Module):
    """Self-attention and a projection, with the attention weights."""

    def __init__(self, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, dropout, batch_first=True, dtype=torch.float64)
        self.projection = nn.Linear(E, E, dtype=torch.float64)

    def forward(self, x: torch.Tensor, padding: torch.Tensor):
        out, weights = self.attention(x, x, x, key_padding_mask=padding)
        return self.projection(out), weights


class WithoutWeights(Attention):
    """Not a tuple: a tracer takes no None."""

    def forward(self, x: torch.Tensor, padding: torch.Tensor):
        return self.projection(self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0])


class Layers(nn.Module):
    """One of torch's own layers, called as it wants to be."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers


class Encoder(Layers):
    def forward(self, x: torch.Tensor, padding: torch.Tensor):
        return self.layers(x, src_key_padding_mask=padding)


class Decoder(Layers):
    def forward(self, x: torch.Tensor, padding: torch.Tensor):
        return self.layers(x, 2 * x, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)


class Transformer(Layers):
    def forward(self, x: torch.Tensor, padding: torch.Tensor):
        return self.layers(
            *(x, 2 * x),
            src_key_padding_mask=padding,
            tgt_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )


def encoder_layer(dropout):
    return nn.TransformerEncoderLayer(E, H, 32, dropout, batch_first=True, dtype=torch.float64)


def decoder_layer(dropout):
    return nn.TransformerDecoderLayer(E, H, 32, dropout, batch_first=True, dtype=torch.float64)


KINDS = {  # how each is made, and how many attentions it has
    "weights": (Attention, 1),
    "no_weights": (WithoutWeights, 1),
    "encoder_layer": (lambda dropout: Encoder(encoder_layer(dropout)), 1),
    "encoder": (lambda dropout: Encoder(nn.TransformerEncoder(encoder_layer(dropout), 2)), 2),
    "decoder_layer": (lambda dropout: Decoder(decoder_layer(dropout)), 2),
    "transformer": (
        lambda dropout: Transformer(nn.Transformer(E, H, 1, 1, 32, dropout, batch_first=True, dtype=torch.float64)),
        3,
    ),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:.norm. was found in ScriptModule constants"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def make(kind, dropout=0.0):
    """Torch's model in training, where none of its shortcuts are taken, and ours with the same parameters."""
    torch.manual_seed(1)
    stock = KINDS[kind][0](dropout)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = copy.deepcopy(stock)
    fastattn.replace_multihead_attention(ours)
    return stock, ours


def make_inputs(batch=N, length=L):
    """x, and the padding mask; every sequence keeps its first token."""
    lengths = torch.arange(batch) % (length - 1) + 1
    return torch.randn(batch, length, E, dtype=torch.float64), torch.arange(length) >= lengths[:, None]


def tensors(outputs):
    return [x for x in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if x is not None]


def assert_same(actual, expected, tolerance=1e-10):
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def gradients(model, inputs, seed=3):
    """The outputs, and the gradients of x and of every parameter."""
    x, padding = inputs[0].detach().clone().requires_grad_(), inputs[1]
    torch.manual_seed(seed)
    outputs = tensors(model(x, padding))
    generator = torch.Generator().manual_seed(4)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    parameters = dict(model.named_parameters())  # which an exported program has in another order
    return (*outputs, *torch.autograd.grad(loss, (x, *(parameters[name] for name in sorted(parameters)))))


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))

    @property
    def attentions(self):
        return sum(name in FORWARDS for name in self.names)


def attentions(function, *inputs):
    with Operators() as operators:
        function(*inputs)
    return operators.attentions


def in_graph(graph):
    return sum(getattr(node.target, "_schema", None) is not None and node.target._schema.name in FORWARDS
               for node in graph.nodes)  # fmt: skip


# Reached -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_operator_is_reached(kind, training):
    stock, ours = make(kind)
    ours.train(training)
    inputs = make_inputs()
    assert attentions(stock, *inputs) == 0
    with torch.set_grad_enabled(training), Operators() as operators:
        outputs = tensors(ours(*inputs))
        if training:
            sum(x.sum() for x in outputs).backward()
    assert operators.attentions == KINDS[kind][1]
    backwards = sum(name + "_backward" in operators.names and operators.names.count(name + "_backward")
                    for name in FORWARDS)  # fmt: skip
    assert backwards == (KINDS[kind][1] if training else 0)


# TorchScript and fx --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(kind, training):
    stock, ours = make(kind)
    ours.train(training)
    traced = torch.jit.trace(ours, make_inputs())
    others = make_inputs(N + 2, L + 80)
    assert_same(traced(*others), stock(*others))
    assert attentions(traced, *others) == KINDS[kind][1]
    if training:
        assert_same(gradients(traced, others), gradients(stock, others), 1e-9)


@pytest.mark.parametrize("kind", ["weights", "encoder", "transformer"], indirect=True)
def test_jit_script_compiles_torchs_module_and_leaves_ours_in_the_model(kind):
    stock, ours = make(kind)
    inputs = make_inputs()
    expected = stock(*inputs)
    if kind == "weights":
        scripted = torch.jit.script(ours)
        assert_same(scripted(*inputs), expected)
        with torch.no_grad():
            ours.attention.in_proj_weight.mul_(2)
        assert_same(scripted(*inputs), ours(*inputs))
    elif kind == "encoder":
        scripted = torch.jit.script(ours.layers)
        assert_same(scripted(inputs[0], src_key_padding_mask=inputs[1]), expected)
    else:
        scripted = torch.jit.script(ours.layers)
        assert_same(scripted(inputs[0], 2 * inputs[0]), stock.layers(inputs[0], 2 * inputs[0]))
    # Scripting puts what it compiled into the model: calls there must still be ours, in evaluation too.
    for training in (False, True):
        ours.train(training)
        with torch.set_grad_enabled(training):
            assert attentions(ours, *inputs) == KINDS[kind][1]
    held = [module for module in ours.modules() if isinstance(module, nn.MultiheadAttention)]
    assert {type(module) for module in held} == {fastattn.MultiheadAttention}


def test_fx(kind):
    stock, ours = make(kind)
    inputs = make_inputs()
    traced = torch.fx.symbolic_trace(ours)
    assert attentions(traced, *inputs) == KINDS[kind][1]
    assert_same(gradients(traced, inputs), gradients(stock, inputs), 1e-9)
    again = torch.fx.symbolic_trace(copy.deepcopy(traced))
    assert_same(again(*inputs), stock(*inputs))


def test_fx_traces_into_a_layer():
    stock, ours = make("decoder_layer")
    x = make_inputs()[0]
    traced = torch.fx.symbolic_trace(ours.layers)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [name for name in called if "attn" in name] == ["self_attn", "multihead_attn"]
    assert_same(traced(x, 2 * x), stock.layers(x, 2 * x))


# torch.export --------------------------------------------------------------------------------------


def export(model, strict):
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    return torch.export.export(model, make_inputs(), dynamic_shapes=shapes, strict=strict)


def check_export(kind, strict, training):
    stock, ours = make(kind)
    ours.train(training)
    with torch.set_grad_enabled(training):
        program = export(ours, strict)
        assert in_graph(program.graph) == KINDS[kind][1]
        decomposed = program.run_decompositions()
        assert in_graph(decomposed.graph) == KINDS[kind][1]
        # AOTInductor would hand an empty list over as None.
        called = [node for node in program.graph.nodes if str(node.target).startswith("fastattn.")]
        assert called and not any(argument == [] for node in called for argument in node.args)
        for inputs in (make_inputs(1, 2), make_inputs(5, 130)):
            expected = stock(*inputs)
            assert_same(program.module()(*inputs), expected)
            assert_same(decomposed.module()(*inputs), expected)
    if training:
        assert_same(gradients(program.module(), inputs), gradients(stock, inputs), 1e-9)


@pytest.mark.parametrize(
    "kind, strict, training",
    [("weights", False, True), ("no_weights", True, False), ("encoder", False, False)],
    indirect=["kind"],
)
def test_export(kind, strict, training):
    check_export(kind, strict, training)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, strict, training",
    [
        ("weights", True, False),
        ("no_weights", False, True),
        ("encoder_layer", True, True),
        ("encoder", True, False),
        ("decoder_layer", True, True),
        ("decoder_layer", False, False),
        ("transformer", False, True),
        ("transformer", True, False),
    ],
    indirect=["kind"],
)
def test_export_of_every_layer(kind, strict, training):
    check_export(kind, strict, training)


def test_exported_and_traced_programs_through_a_file():
    stock, ours = make("weights")
    ours.eval()
    inputs, others = make_inputs(), make_inputs(5, 130)
    file = io.BytesIO()
    torch.export.save(export(ours, strict=False), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, inputs), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for program in (loaded, traced, torch.jit.freeze(traced)):
        for each in (inputs, others):
            assert_same(program(*each), stock(*each))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "encoder"], indirect=True)
def test_aot_inductor(kind, tmp_path):
    """A compiled library: our operators are called back from it, in a process that has imported fastattn."""
    stock, ours = make(kind)
    with torch.no_grad():
        program = export(ours.eval(), strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for inputs in (make_inputs(), make_inputs(5, 130)):
            assert_same(compiled(*inputs), stock(*inputs))


# torch.compile -------------------------------------------------------------------------------------


def check_compile(kind, training, backend):
    """Two lengths in one graph, dropout included; gradients where there are any."""
    stock, ours = make(kind, dropout=0.2)
    ours.train(training)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for inputs in (make_inputs(), make_inputs(N + 2, L + 80)):
        if training:
            assert_same(gradients(compiled, inputs), gradients(ours, inputs), 1e-9)
        else:
            with torch.no_grad():
                assert_same(compiled(*inputs), ours(*inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if not training:
        with warnings.catch_warnings():  # nested tensors
            warnings.simplefilter("ignore")
            real = ~inputs[1] if kind not in ("weights", "no_weights") else slice(None)
            out, expected = tensors(compiled(*inputs))[0], tensors(stock.eval()(*inputs))[0]
        assert_same(out[real], expected[real])


@pytest.mark.parametrize("kind, training", [("weights", True), ("no_weights", False)], indirect=["kind"])
def test_compile(kind, training):
    check_compile(kind, training, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, training",
    [("weights", False), ("no_weights", True), ("encoder_layer", True), ("encoder", False), ("decoder_layer", True),
     ("transformer", True), ("transformer", False)],
    indirect=["kind"],
)  # fmt: skip
def test_compile_of_every_layer(kind, training):
    check_compile(kind, training, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind, training", [("weights", True), ("encoder_layer", False)], indirect=["kind"])
def test_compile_with_inductor(kind, training):
    # Inductor draws random numbers of its own unless told not to; the seed of the dropout is one.
    with torch._inductor.config.patch(fallback_random=True):
        check_compile(kind, training, "inductor")


@pytest.mark.slow
def test_compiled_autograd():
    stock, ours = make("weights")
    inputs = make_inputs()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        actual = gradients(ours, inputs)
    assert_same(actual, gradients(stock, inputs), 1e-9)


def test_compile_within_autocast():
    _, ours = make("weights", dropout=0.2)
    ours.float()
    x, padding = make_inputs()

    def run(x, padding):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x, padding)

    def results(function):
        torch.manual_seed(5)
        out, weights = function(x.float(), padding)
        (out.float().square().sum() + weights.float().square().sum()).backward()
        found = [parameter.grad for parameter in ours.parameters()]
        ours.zero_grad()
        return out, weights, *found

    expected = results(run)
    actual = results(torch.compile(run, fullgraph=True, backend="aot_eager"))
    assert expected[0].dtype == actual[0].dtype == actual[1].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in actual[2:])
    assert_same(actual, expected, 1e-2)


# Without numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["fake", "meta"])
def test_fake_and_meta_tensors(kind, device, training):
    stock, ours = make(kind)
    ours.train(training)
    inputs = make_inputs()
    expected = tensors(stock(*inputs))
    mode = FakeTensorMode()

    def hollow(x):
        return mode.from_tensor(x) if device == "fake" else torch.empty_like(x, device="meta")

    parameters = {name: hollow(p.detach()).requires_grad_(training) for name, p in ours.named_parameters()}
    with mode if device == "fake" else torch.device("meta"):
        outputs = tensors(torch.func.functional_call(ours, parameters, tuple(hollow(x) for x in inputs)))
        if training:
            sum(out.sum() for out in outputs).backward()
    for out, reference in zip(outputs, expected, strict=True):
        assert out.shape == reference.shape and out.dtype == reference.dtype and out.is_contiguous()
        assert out.device.type == ("cpu" if device == "fake" else "meta")
    if training:
        assert all(p.grad.shape == p.shape for p in parameters.values())
    # What ran without numbers has left nothing behind: real tensors give real ones.
    assert_same(ours(*inputs), expected)


def test_functional_call_of_a_converted_model(kind):
    stock, ours = make(kind)
    inputs = make_inputs()
    parameters = {name: 1.5 * p.detach() for name, p in ours.named_parameters()}

    def run(model):
        return lambda x, padding: torch.func.functional_call(model, parameters, (x, padding))

    assert attentions(run(ours), *inputs) == KINDS[kind][1]
    assert_same(run(ours)(*inputs), run(stock)(*inputs))


# FLOPs ---------------------------------------------------------------------------------------------


def flops(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("kind", ["no_weights", "encoder_layer", "decoder_layer"], indirect=True)
def test_flops_are_those_of_torch(kind):
    """Torch's attention for the CPU has no formula, but its matrix products have one; its backward has one product
    less than that of the fused kernels, which compute the scores a second time."""
    stock, ours = make(kind)
    x = make_inputs()[0].requires_grad_()
    padding = torch.zeros(N, L, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):
        expected, theirs = flops(lambda: tensors(stock(x, padding))[0].sum())
        expected_backward, _ = flops(theirs.backward)
    forward, loss = flops(lambda: tensors(ours(x, padding))[0].sum())
    backward, _ = flops(loss.backward)
    shape = (N, H, L, E // H)
    product = 2 * N * H * L * L * (E // H)
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == 5 * product
    assert forward == expected
    assert backward == expected_backward + KINDS[kind][1] * product


def test_flops_count_the_weights_once_more():
    _, ours = make("weights")
    _, without = make("no_weights")
    inputs = make_inputs()
    product = 2 * N * H * L * L * (E // H)
    assert flops(lambda: ours(*inputs))[0] == flops(lambda: without(*inputs))[0] + product


# Activation checkpointing --------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_with_dropout(kind, use_reentrant):
    _, ours = make(kind, dropout=0.3)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.ours = ours

        def forward(self, x, padding):
            return torch.utils.checkpoint.checkpoint(ours, x, padding, use_reentrant=use_reentrant)

    def results(model):
        # backward() and not grad(), which the reentrant variant refuses.
        x, padding = inputs[0].detach().clone().requires_grad_(), inputs[1]
        torch.manual_seed(7)
        sum(out.square().sum() for out in tensors(model(x, padding))).backward()
        found = [x.grad, *(p.grad for p in model.parameters())]
        ours.zero_grad()
        return found

    inputs = make_inputs()
    expected = results(ours)
    with Operators() as operators:
        actual = results(Checkpointed())
    assert operators.attentions == 2 * KINDS[kind][1]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_selective_checkpointing_keeps_the_attention():
    _, ours = make("encoder", dropout=0.3)
    kept = functools.partial(
        torch.utils.checkpoint.create_selective_checkpoint_contexts, [torch.ops.fastattn.attention_packed.default]
    )

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = ours.layers

        def forward(self, x, padding):
            return torch.utils.checkpoint.checkpoint(ours, x, padding, use_reentrant=False, context_fn=kept)

    inputs = make_inputs()
    expected = gradients(ours, inputs)
    with Operators() as operators:
        actual = gradients(Checkpointed(), inputs)
    assert operators.attentions == KINDS["encoder"][1]  # not computed a second time in the backward
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
