"""`replace_multihead_attention`: the models that it changes, and that the changed modules are really reached."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.ao.nn.quantizable import MultiheadAttention as QuantizableAttention
from torch.nn.utils import parametrizations, parametrize, prune

import fastattn
from fastattn.integrations import replace

E, H, N, L, S = 16, 2, 3, 6, 5


class Custom(nn.MultiheadAttention):
    """A subclass of somebody else's."""


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, dtype=torch.float64)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.fixture
def calls(monkeypatch):
    """The number of calls of our forward, in a list of one."""
    counter = [0]
    forward = fastattn.MultiheadAttention.forward

    def counted(self, *args, **kwargs):
        counter[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(fastattn.MultiheadAttention, "forward", counted)
    return counter


def make_layer(**options):
    return nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64, **options)


def test_report_tells_what_was_replaced_and_what_was_left():
    model = nn.ModuleDict(
        {
            "plain": nn.MultiheadAttention(E, H),
            "custom": Custom(E, H),
            "ours": fastattn.MultiheadAttention(E, H),
            "other": nn.Linear(E, E),
            "inner": nn.Sequential(nn.MultiheadAttention(E, H)),
        }
    )
    report = fastattn.replace_multihead_attention(model)
    assert report.replaced == ["plain", "inner.0"]
    assert set(report.left) == {"custom", "ours"}
    assert "Custom" in report.left["custom"] and "already" in report.left["ours"]
    assert report.notes == []
    assert type(model["plain"]) is type(model["inner"][0]) is fastattn.MultiheadAttention
    assert type(model["custom"]) is Custom
    assert all(name in str(report) for name in ("plain", "inner.0", "custom", "Custom"))


def test_the_model_itself():
    model = nn.MultiheadAttention(E, H)
    report = fastattn.replace_multihead_attention(model)
    assert report.replaced == [""] and type(model) is fastattn.MultiheadAttention
    assert "the model itself" in str(report)


@pytest.mark.parametrize("model", [None, "model", nn.MultiheadAttention])
def test_not_a_module(model):
    with pytest.raises(TypeError, match="model"):
        fastattn.replace_multihead_attention(model)


def test_parameters_hooks_and_mode_stay():
    model = nn.Sequential(nn.MultiheadAttention(E, H, dtype=torch.bfloat16), nn.Linear(E, E)).eval()
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(args))
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastattn.replace_multihead_attention(model)
    assert all(after is before[name] for name, after in model.named_parameters())
    assert not model[0].training and model[0].in_proj_weight.dtype == torch.bfloat16
    x = torch.randn(L, N, E, dtype=torch.bfloat16)
    weight = model[0].in_proj_weight.detach().clone()
    model[0](x, x, x)[0].float().sum().backward()
    optimizer.step()
    assert len(seen) == 1 and not torch.equal(model[0].in_proj_weight, weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_reaches_ours(training, mask, norm_first, calls):
    torch.manual_seed(0)
    stock = nn.TransformerEncoder(make_layer(norm_first=norm_first), 3).train(training)
    ours = copy.deepcopy(stock)
    report = fastattn.replace_multihead_attention(ours)
    assert len(report.replaced) == 3 and len([note for note in report.notes if "fused" in note]) == 3
    x = torch.randn(N, L, E, dtype=torch.float64)
    options = {}
    if mask in ("padding", "both"):
        options["src_key_padding_mask"] = torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]
    if mask in ("causal", "both"):
        options["mask"] = torch.ones(L, L).tril() == 0
    with torch.set_grad_enabled(training):
        expected, result = stock(x, **options), ours(x, **options)
    assert calls[0] == 3
    real = ~options["src_key_padding_mask"] if "src_key_padding_mask" in options else slice(None)
    torch.testing.assert_close(result[real], expected[real], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_padded_positions_in_the_output_of_an_encoder():
    """A row of the README's table: torch fills them with zeros in evaluation alone."""
    stock = nn.TransformerEncoder(make_layer(), 2)
    ours = copy.deepcopy(stock)
    fastattn.replace_multihead_attention(ours)
    x = torch.randn(N, L, E, dtype=torch.float64)
    padding = torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]
    trained = stock(x, src_key_padding_mask=padding)
    with torch.no_grad():
        expected, result = (model.eval()(x, src_key_padding_mask=padding) for model in (stock, ours))
    assert not expected[padding].any()
    torch.testing.assert_close(result, trained, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_every_layer_reaches_ours_in_every_mode(mode, training, calls):
    """The layers by themselves, sequence first too, with a padding mask and the causal hint."""
    options = {"dropout": 0.0, "dtype": torch.float64}
    stock = nn.ModuleList(
        [
            nn.TransformerEncoderLayer(E, H, 32, batch_first=True, **options),
            nn.TransformerEncoderLayer(E, H, 32, batch_first=False, **options),
            nn.TransformerDecoderLayer(E, H, 32, batch_first=True, **options),
            nn.TransformerDecoderLayer(E, H, 32, batch_first=False, **options),
        ]
    ).train(training)
    ours = copy.deepcopy(stock)
    assert len(fastattn.replace_multihead_attention(ours).replaced) == 6
    x = torch.randn(N, L, E, dtype=torch.float64)
    padding = torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(L).isneginf()

    def call(layers):
        for layer in layers:
            first = layer.self_attn.batch_first
            given = x if first else x.transpose(0, 1)
            if isinstance(layer, nn.TransformerEncoderLayer):
                yield layer(given, src_key_padding_mask=padding)
                yield layer(given, src_mask=causal, is_causal=True)
            else:
                masks = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
                yield layer(given, given, **masks)
                yield layer(given, given, tgt_mask=causal, tgt_is_causal=True)

    with mode():
        expected, results = list(call(stock)), list(call(ours))
    assert calls[0] == 2 * 2 + 2 * 2 * 2
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_reaches_ours(training, calls):
    torch.manual_seed(0)
    stock = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    ours = copy.deepcopy(stock)
    fastattn.replace_multihead_attention(ours)
    source, target = torch.randn(N, S, E, dtype=torch.float64), torch.randn(N, L, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = torch.zeros(N, S, dtype=torch.float64)
    padding[1, 3:] = float("-inf")
    options = {
        "tgt_mask": causal,
        "tgt_is_causal": True,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    with torch.set_grad_enabled(training):
        expected, result = stock(source, target, **options), ours(source, target, **options)
    assert calls[0] == 2 + 2 * 2  # the encoder's layers, and both attentions of the decoder's
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_torchs_own_name_stays_torchs():
    """Else modules that exist already would not be instances of it any more."""
    stock = nn.MultiheadAttention(E, H)
    fastattn.replace_multihead_attention(nn.MultiheadAttention(E, H))
    for owner in (nn, nn.modules, nn.modules.activation, nn.modules.transformer):
        assert owner.MultiheadAttention is type(stock) and owner.MultiheadAttention is not fastattn.MultiheadAttention


def test_a_layer_whose_attention_has_another_name():
    layer = make_layer()
    layer.attention = layer.self_attn
    del layer.self_attn
    assert fastattn.replace_multihead_attention(layer).replaced == ["attention"]


def test_twice_is_once():
    model = nn.TransformerEncoder(make_layer(), 2)
    fastattn.replace_multihead_attention(model)
    again = fastattn.replace_multihead_attention(model)
    assert again.replaced == [] and again.notes == [] and len(again.left) == 2
    assert all(len(layer.self_attn._forward_pre_hooks) == 1 for layer in model.layers)


def test_replaced_models_can_be_copied(calls):
    model = nn.TransformerEncoder(make_layer(), 2).eval()
    fastattn.replace_multihead_attention(model)
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            calls[0] = 0
            assert torch.equal(other(x), expected) and calls[0] == 2


def test_layers_without_ours_are_left_alone():
    layer = make_layer()
    layer.self_attn = Custom(E, H, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2)
    report = fastattn.replace_multihead_attention(model)
    assert report.replaced == [] and report.notes == []
    assert model.enable_nested_tensor and not model.layers[0].self_attn._forward_pre_hooks


def test_one_training_step_gives_the_parameters_of_torch():
    torch.manual_seed(0)
    stock = nn.TransformerEncoder(make_layer(), 2)
    ours = copy.deepcopy(stock)
    replace.replace_multihead_attention(ours)
    x = torch.randn(N, L, E, dtype=torch.float64)
    for model in (stock, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().mean().backward()
        optimizer.step()
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=name)


def test_a_shared_module_is_replaced_once(calls):
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict({"first": shared, "second": shared, "weights": nn.Linear(E, E)})
    model["weights"].weight = shared.out_proj.weight
    report = fastattn.replace_multihead_attention(model)
    assert report.replaced == ["first"] and report.left == {}
    assert model["first"] is model["second"] is shared
    assert model["weights"].weight is shared.out_proj.weight


def test_hooks_on_the_replaced_module_still_run():
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    seen = []
    model[0].register_forward_pre_hook(lambda *args: seen.append("before"))
    model[0].register_forward_hook(lambda *args: seen.append("after"))
    model[0].register_full_backward_hook(lambda *args: seen.append("backward"))
    model[0].in_proj_weight.register_hook(lambda gradient: seen.append("parameter"))
    fastattn.replace_multihead_attention(model)
    x = torch.randn(L, N, E, requires_grad=True)
    model[0](x, x, x)[0].sum().backward()
    assert sorted(seen) == ["after", "backward", "before", "parameter"]


def test_a_parametrized_module_is_replaced_and_stays_parametrized(calls):
    stock = nn.MultiheadAttention(E, H, dtype=torch.float64)
    parametrizations.weight_norm(stock, "in_proj_weight")
    parametrizations.orthogonal(stock.out_proj, "weight")
    ours = copy.deepcopy(stock)
    parameters = dict(ours.named_parameters())
    report = fastattn.replace_multihead_attention(ours)
    assert report.replaced == [""] and isinstance(ours, fastattn.MultiheadAttention)
    assert parametrize.is_parametrized(ours, "in_proj_weight")
    assert {name: id(p) for name, p in ours.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    x = torch.randn(L, N, E, dtype=torch.float64)
    expected, result = stock(x, x, x)[0], ours(x, x, x)[0]
    assert calls[0] == 1
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    result.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert torch.equal(copy.deepcopy(ours)(x, x, x)[0], result)
    parametrize.remove_parametrizations(ours, "in_proj_weight")
    assert type(ours) is fastattn.MultiheadAttention
    torch.testing.assert_close(ours(x, x, x)[0], expected, rtol=1e-10, atol=1e-10)
    # One whose class below the parametrization is somebody else's is left.
    custom = Custom(E, H)
    parametrizations.weight_norm(custom, "in_proj_weight")
    assert "may do something else" in fastattn.replace_multihead_attention(custom).left[""]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_computed_by_hooks(calls):
    """prune, and weight_norm in its older form, compute the weight in a forward pre-hook."""
    x = torch.randn(L, N, E, dtype=torch.float64)
    for prepare in (
        lambda module: prune.l1_unstructured(module, "in_proj_weight", 0.3),
        lambda module: torch.nn.utils.weight_norm(module, "in_proj_weight"),
    ):
        model = nn.MultiheadAttention(E, H, dtype=torch.float64)
        prepare(model)
        expected = model(x, x, x)[0]
        assert fastattn.replace_multihead_attention(model).replaced == [""]
        torch.testing.assert_close(model(x, x, x)[0], expected, rtol=1e-10, atol=1e-10)
    assert calls[0] == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_left_has_its_reason():
    patched = nn.MultiheadAttention(E, H)
    patched.forward = patched.forward
    scripted = torch.jit.script(Wrapped())
    model = nn.ModuleDict({"patched": patched, "scripted": scripted, "quantizable": QuantizableAttention(E, H)})
    report = fastattn.replace_multihead_attention(model)
    assert report.replaced == [] and set(report.left) == {"patched", "scripted.attention", "quantizable"}
    assert "forward of its own" in report.left["patched"]
    assert "TorchScript" in report.left["scripted.attention"]
    assert "quantizable" in report.left["quantizable"]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantization_leaves_the_attention_to_us():
    """It replaces Linear, and not the projections of MultiheadAttention."""
    model = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(L, N, E)
    expected = quantized(x, x)
    assert len(fastattn.replace_multihead_attention(quantized).replaced) == 2
    # The quantized layers after it round to steps, which a rounding error before them may cross.
    torch.testing.assert_close(quantized(x, x), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "attention.compile"])
def test_compiled_models_are_compiled_anew(how, calls):
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append("fastattn" in str([node.target for node in graph.graph.nodes]))
        return graph

    model = compiled = Wrapped()
    if how == "torch.compile":
        compiled = torch.compile(model, backend=record)
    else:
        (model if how == "model.compile" else model.attention).compile(backend=record)
    x = torch.randn(L, N, E, dtype=torch.float64)
    expected = compiled(x)
    # Of a module of torch's own, compiled by itself, torch compiles nothing.
    assert graphs == ([] if how == "attention.compile" else [False])
    report = fastattn.replace_multihead_attention(compiled)
    assert [name.removeprefix("_orig_mod.") for name in report.replaced] == ["attention"]
    torch.testing.assert_close(compiled(x), expected, rtol=1e-10, atol=1e-10)
    assert graphs[-1] and graphs.count(True) == 1


def test_a_converted_module_put_in_by_hand(calls):
    """Nothing to replace, but the layer around it must be made to call it."""
    layer = make_layer()
    layer.self_attn = fastattn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2).eval()
    report = fastattn.replace_multihead_attention(model)
    assert report.replaced == [] and len(report.notes) == 3
    padding = torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]
    with torch.no_grad():
        model(torch.randn(N, L, E, dtype=torch.float64), src_key_padding_mask=padding)
    assert calls[0] == 2
