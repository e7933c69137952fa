"""What rewrites a module's parameters, copies it or wraps it does to ours what it does to torch's."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils

import fastattn

E, H, N, L = 12, 3, 2, 7

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
]


class Block(nn.Module):
    """A model that trains its attention's output and weights."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
        self.projection = nn.Linear(E, E, dtype=torch.float64)

    def forward(self, x, padding):
        out, weights = self.attention(x, x, x, key_padding_mask=padding)
        return self.projection(out), weights


def make(**options):
    torch.manual_seed(1)
    return Block(**options)


def make_inputs():
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 4:] = True
    return torch.randn(N, L, E, generator=generator, dtype=torch.float64), padding


def converted(model):
    report = fastattn.replace_multihead_attention(model)
    assert len(report.replaced) == 1, str(report)
    assert isinstance(model.attention, fastattn.MultiheadAttention)
    return model


def loss_of(model):
    x, padding = make_inputs()
    out, weights = model(x, padding)
    return out.square().sum() + weights.square().sum()


def results(model):
    """Outputs, and by name every parameter's gradient and every buffer."""
    model.zero_grad()
    outputs = model(*make_inputs())
    sum(y.square().sum() for y in outputs).backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return found | dict(model.named_buffers())


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                *(actual[name], value), rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


# Parameters that are computed ----------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x - x.mean()


def both(wrap, *arguments, **options):
    def apply(attention):
        wrap(attention, "in_proj_weight", *arguments, **options)
        wrap(attention.out_proj, "weight", *arguments, **options)

    return apply


def parametrize_each(attention):
    for name in ("in_proj_weight", "in_proj_bias"):
        parametrize.register_parametrization(attention, name, Doubled())
    parametrize.register_parametrization(attention.out_proj, "weight", Doubled())


def prune_and_remove(attention):
    both(prune.l1_unstructured, amount=0.3)(attention)
    prune.remove(attention, "in_proj_weight")
    prune.remove(attention.out_proj, "weight")


# Both spectral norms take steps of the power iteration whenever the weight is read in training, and torch reads
# it several times a call: only with the iteration converged are the two comparable.
STEPS = {"n_power_iterations": 300}
WRAPPERS = {
    "parametrize": parametrize_each,
    "weight_norm": both(parametrizations.weight_norm),
    "spectral_norm": both(parametrizations.spectral_norm, **STEPS),
    "orthogonal": both(parametrizations.orthogonal),
    "old weight_norm": both(nn.utils.weight_norm),
    "old spectral_norm": both(nn.utils.spectral_norm, **STEPS),
    "prune": both(prune.l1_unstructured, amount=0.3),
    "prune and remove": prune_and_remove,
}
# Hooks of out_proj compute its weight, and torch's module does not call them either: what was computed when they were
# attached serves for one backward.
COMPUTED_BY_HOOKS = ("old weight_norm", "old spectral_norm", "prune")


@pytest.mark.parametrize("first", ["wrapped", "converted"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_parameters(name, first):
    stock, ours = make(), make()
    if first == "converted":
        converted(ours)
    for model in (stock, ours):
        torch.manual_seed(3)
        WRAPPERS[name](model.attention)
    if first == "wrapped":
        converted(ours)
    tolerance = 1e-6 if "spectral" in name else 1e-9
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (stock, ours)]
    for _ in range(1 if name in COMPUTED_BY_HOOKS else 2):
        assert_same(results(ours), results(stock), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    stock.eval(), ours.eval()
    with torch.no_grad():
        for mine, theirs in zip(ours(*make_inputs()), stock(*make_inputs()), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["parametrize", "weight_norm", "orthogonal"])
def test_parametrizations_removed(name):
    stock, ours = make(), converted(make())
    for model in (stock, ours):
        torch.manual_seed(3)
        WRAPPERS[name](model.attention)
        for held in list(model.attention.parametrizations):
            parametrize.remove_parametrizations(model.attention, held)
        parametrize.remove_parametrizations(model.attention.out_proj, "weight")
    assert type(ours.attention) is fastattn.MultiheadAttention
    assert_same(results(ours), results(stock))


@pytest.mark.parametrize("name", WRAPPERS)
def test_copies_of_wrapped_modules(name):
    ours = converted(make())
    WRAPPERS[name](ours.attention)
    if name in ("old weight_norm", "prune"):
        # torch refuses to copy the weight that these hooks computed, which is no leaf.
        with pytest.raises(RuntimeError, match="graph leaves"):
            copy.deepcopy(ours)
        return
    ours.eval()  # in training the spectral norm would move on
    other = copy.deepcopy(ours)
    assert_same(results(other), results(ours))
    assert other.attention.out_proj is not ours.attention.out_proj


def test_a_computed_weight_is_read_once_a_call():
    reads = []

    class Counted(nn.Module):
        def forward(self, x):
            reads.append(x)
            return x

    ours = converted(make())
    parametrize.register_parametrization(ours.attention, "in_proj_weight", Counted())
    for key_differs, need_weights in itertools.product((False, True), (False, True)):
        reads.clear()
        x, padding = make_inputs()
        ours.attention(x, x + 1 if key_differs else x, x, key_padding_mask=padding, need_weights=need_weights)
        assert len(reads) == 1


# Averages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models(average):
    averaged = []
    for model in (make(), converted(make())):
        options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)} if average == "ema" else {}
        mean = swa_utils.AveragedModel(model, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            mean.update_parameters(model)
        averaged.append((mean, model))
    (stock, _), (ours, trained) = averaged
    assert type(ours.module.attention) is fastattn.MultiheadAttention
    assert_same(results(ours), results(stock), 1e-7)
    assert not torch.allclose(ours.module.attention.in_proj_weight, trained.attention.in_proj_weight)


# Saving --------------------------------------------------------------------------------------------


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


def test_state_dicts_through_a_file():
    stock, ours = make(), converted(make())
    for one, other in ((stock, ours), (ours, stock)):
        with torch.no_grad():
            one.attention.in_proj_weight.mul_(1.5)
        other.load_state_dict(torch.load(saved(one.state_dict()), weights_only=True))
        assert_same(results(other), results(one))


def test_a_whole_model_through_a_file():
    ours = converted(make())
    expected = results(ours)
    loaded = torch.load(saved(ours), weights_only=False)
    assert type(loaded.attention) is fastattn.MultiheadAttention
    assert_same(results(loaded), expected)
    # With weights_only, the classes of the model have to be named, ours like any other.
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(saved(ours), weights_only=True)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(saved(ours))
    assert "fastattn.nn.multihead_attention.MultiheadAttention" in names
    classes = [Block, fastattn.MultiheadAttention, nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear]
    with torch.serialization.safe_globals([*classes, set]):
        assert_same(results(torch.load(saved(ours), weights_only=True)), expected)


def test_models_saved_before_they_were_converted():
    stock = make()
    loaded = converted(pickle.loads(pickle.dumps(stock)))
    assert_same(results(loaded), results(stock))
    assert_same(results(pickle.loads(pickle.dumps(loaded))), results(stock))


def test_the_optimizer_of_before_goes_on():
    stock, ours = make(), make()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (stock, ours)]
    for step in range(3):
        if step == 1:
            converted(ours)
        if step == 2:  # the order of the parameters is what an optimizer's state goes by
            optimizers[1] = torch.optim.AdamW(ours.parameters(), lr=0.01)
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for model, optimizer in zip((stock, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert_same(results(ours), results(stock), 1e-7)


# LoRA ----------------------------------------------------------------------------------------------


def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def adapted(model, target="attention"):
    lora = peft()
    torch.manual_seed(4)
    # Both matrices random: with the usual zeros the adapter would do nothing.
    config = lora.LoraConfig(target_modules=[target], r=4, lora_alpha=8, init_lora_weights=False)
    return lora.get_peft_model(model, config).double()


@pytest.mark.parametrize("first", ["adapted", "converted"])
def test_lora(first, tmp_path):
    lora = peft()
    stock = adapted(make())
    ours = make()
    if first == "converted":
        ours = adapted(converted(ours))
    else:
        ours = adapted(ours)
        report = fastattn.replace_multihead_attention(ours)
        assert len(report.replaced) == 1, str(report)
    base = ours.base_model.model.attention.base_layer
    assert isinstance(base, fastattn.MultiheadAttention)
    plain = results(converted(make()))["output 0"]

    def trainable(model):
        return [p for p in model.parameters() if p.requires_grad]

    optimizers = [torch.optim.SGD(trainable(model), lr=0.01) for model in (stock, ours)]
    assert len(trainable(ours)) == 4  # A and B of in_proj, A and B of out_proj
    for _ in range(2):
        expected = results(stock)
        assert_same(results(ours), expected)
        assert all(p.grad.abs().max() > 1e-6 for p in trainable(ours))
        for optimizer in optimizers:
            optimizer.step()
    assert not torch.allclose(expected["output 0"], plain, atol=1e-3)

    stock.eval(), ours.eval()
    expected = stock(*make_inputs())
    ours.save_pretrained(tmp_path)
    loaded = lora.PeftModel.from_pretrained(converted(make()), tmp_path).double()
    for model in (ours, loaded):
        torch.testing.assert_close(model(*make_inputs()), expected, rtol=1e-5, atol=1e-5)
    ours.merge_adapter()
    torch.testing.assert_close(ours(*make_inputs()), expected, rtol=1e-9, atol=1e-9)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(*make_inputs()), expected, rtol=1e-9, atol=1e-9)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(*make_inputs())[0], plain, rtol=1e-9, atol=1e-9)
    merged = ours.merge_and_unload()
    assert type(merged.attention) is fastattn.MultiheadAttention
    torch.testing.assert_close(merged(*make_inputs()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", ["adapted", "converted"])
@pytest.mark.parametrize("training", [True, False])
def test_lora_within_an_encoder(first, training, monkeypatch):
    """In evaluation torch's fused layer would call neither the adapter nor us."""
    calls = []
    forward = fastattn.MultiheadAttention.forward
    monkeypatch.setattr(
        fastattn.MultiheadAttention,
        "forward",
        lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs),
    )
    torch.manual_seed(1)
    stock = nn.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64)
    model = copy.deepcopy(stock)
    if first == "converted":
        fastattn.replace_multihead_attention(model)
    model = adapted(model, "self_attn").train(training)
    if first == "adapted":
        fastattn.replace_multihead_attention(model)
    stock = adapted(stock, "self_attn").train()
    x, padding = make_inputs()
    expected = stock(x, src_key_padding_mask=padding)
    with torch.set_grad_enabled(training):
        result = model(x, src_key_padding_mask=padding)
    assert len(calls) == 1
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
