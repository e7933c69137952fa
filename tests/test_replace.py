"""`replace_multihead_attention`: the models that it changes, and that the changed modules are really reached."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastattn
from fastattn.integrations import replace

E, H, N, L, S = 16, 2, 3, 6, 5


class Custom(nn.MultiheadAttention):
    """A subclass of somebody else's."""


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
