"""`fastattn.MultiheadAttention` against `torch.nn.MultiheadAttention`, argument by argument."""

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn

E, H, N, L, S = 12, 3, 2, 7, 5
KDIM, VDIM = 10, 9

MODULES = {
    "plain": {},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": KDIM, "vdim": VDIM},
    "kdim_vdim_no_bias_appended": {
        "kdim": KDIM,
        "vdim": VDIM,
        "bias": False,
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
}
LAYOUTS = ("sequence_first", "batch_first", "unbatched")
SHARING = ("self", "shared_kv", "separate")
MASKS = (
    "none",
    "padding_bool",
    "padding_float",
    "mask_2d_bool",
    "mask_2d_float",
    "mask_3d_bool",
    "mask_3d_float",
    "both_bool",
    "both_float",
    "padding_bool_mask_float",
    "padding_float_mask_bool",
)
WEIGHTS = {
    "no_weights": {"need_weights": False},
    "averaged": {"need_weights": True},
    "per_head": {"need_weights": True, "average_attn_weights": False},
}


def make_pair(dtype=torch.float64, dropout=0.0, **options):
    """Stock and ours with the same parameters, none of them zero."""
    torch.manual_seed(1)
    stock = nn.MultiheadAttention(E, H, dropout=dropout, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = fastattn.MultiheadAttention(E, H, dropout=dropout, dtype=dtype, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_inputs(layout, sharing, module, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)

    def draw(length, features):
        shape = {
            "sequence_first": (length, N, features),
            "batch_first": (N, length, features),
            "unbatched": (length, features),
        }[layout]
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    query = draw(L, E)
    if sharing == "self":
        return query, query, query
    key = draw(S, module.kdim)
    return query, key, key if sharing == "shared_kv" else draw(S, module.vdim)


def make_masks(kind, layout, len_k, dtype=torch.float64):
    """Keyword arguments; key 0 is never masked by a bool mask, so that no row is dead."""
    generator = torch.Generator().manual_seed(3)
    batch = () if layout == "unbatched" else (N,)
    heads = H if layout == "unbatched" else N * H

    def draw_bool(*shape):
        mask = torch.rand(shape, generator=generator) < 0.4
        mask[..., 0] = False
        return mask

    def draw_float(*shape):
        mask = torch.randn(shape, generator=generator, dtype=dtype)
        mask[..., -1] = float("-inf")
        return mask.requires_grad_()

    padding = {"bool": lambda: draw_bool(*batch, len_k), "float": lambda: draw_float(*batch, len_k)}
    flat = {"bool": lambda: draw_bool(L, len_k), "float": lambda: draw_float(L, len_k)}
    full = {"bool": lambda: draw_bool(heads, L, len_k), "float": lambda: draw_float(heads, L, len_k)}
    return {
        "none": dict,
        "padding_bool": lambda: {"key_padding_mask": padding["bool"]()},
        "padding_float": lambda: {"key_padding_mask": padding["float"]()},
        "mask_2d_bool": lambda: {"attn_mask": flat["bool"]()},
        "mask_2d_float": lambda: {"attn_mask": flat["float"]()},
        "mask_3d_bool": lambda: {"attn_mask": full["bool"]()},
        "mask_3d_float": lambda: {"attn_mask": full["float"]()},
        "both_bool": lambda: {"key_padding_mask": padding["bool"](), "attn_mask": full["bool"]()},
        "both_float": lambda: {"key_padding_mask": padding["float"](), "attn_mask": flat["float"]()},
        "padding_bool_mask_float": lambda: {"key_padding_mask": padding["bool"](), "attn_mask": full["float"]()},
        "padding_float_mask_bool": lambda: {"key_padding_mask": padding["float"](), "attn_mask": flat["bool"]()},
    }[kind]()


def call(module, inputs, options):
    """Run forward and backward; the outputs and every gradient, by name."""
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    key = query if inputs[1] is inputs[0] else key
    value = key if inputs[2] is inputs[1] else value
    options = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    floats = {
        k: v.requires_grad_() for k, v in options.items() if isinstance(v, torch.Tensor) and v.dtype != torch.bool
    }
    module.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        out, weights = module(query, key, value, **options)
    generator = torch.Generator().manual_seed(4)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator, dtype=weights.dtype)).sum()
    loss.backward()
    result = {"out": out.detach(), "weights": weights if weights is None else weights.detach()}
    result |= {"query": query.grad, "key": key.grad, "value": value.grad}
    result |= {name: mask.grad for name, mask in floats.items()}
    return result | {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        assert actual[name].dtype == value.dtype, name
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def is_possible(module, sharing):
    return "kdim" not in MODULES[module] or sharing == "separate"


GRID = [case for case in itertools.product(MODULES, LAYOUTS, SHARING, MASKS) if is_possible(case[0], case[2])]


@pytest.mark.parametrize("module, layout, sharing, masks", GRID, ids=["-".join(case) for case in GRID])
def test_same_numbers_and_gradients_as_torch(module, layout, sharing, masks):
    stock, ours = make_pair(batch_first=layout == "batch_first", **MODULES[module])
    inputs = make_inputs(layout, sharing, stock)
    options = make_masks(masks, layout, L if sharing == "self" else S)
    for weights in WEIGHTS.values():
        assert_same(call(ours, inputs, options | weights), call(stock, inputs, options | weights), 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("masks", MASKS)
def test_same_numbers_and_gradients_in_float32(layout, weights, masks):
    stock, ours = make_pair(torch.float32, batch_first=layout == "batch_first")
    for sharing in SHARING:
        inputs = make_inputs(layout, sharing, stock, torch.float32)
        options = make_masks(masks, layout, L if sharing == "self" else S, torch.float32) | WEIGHTS[weights]
        assert_same(call(ours, inputs, options), call(stock, inputs, options), 2e-5)


@pytest.mark.parametrize("masks", ["none", "padding_bool", "mask_2d_bool", "mask_3d_float"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_gives_the_numbers_of_training(masks, layout):
    stock, ours = make_pair(batch_first=layout == "batch_first")
    inputs = make_inputs(layout, "self", stock)
    options = make_masks(masks, layout, L)
    trained = ours(*inputs, **options)
    ours.eval(), stock.eval()
    with torch.no_grad():
        expected = stock(*inputs, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            evaluated = ours(*inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))
        torch.testing.assert_close(evaluated, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(N, 1, L, S), (1, H, 1, S), (N, H, L, 1), (1, 1, L, S)])
@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_four_dimensional_masks_broadcast(shape, appended, kind):
    stock, ours = make_pair(add_bias_kv=appended)
    inputs = make_inputs("sequence_first", "shared_kv", stock)
    mask = torch.randn(shape, dtype=torch.float64)
    if kind == "bool":
        mask = mask > 0.7
        mask[..., 0] = False
    expanded = mask.expand(N, H, L, S).flatten(0, 1)
    result, expected = ours(*inputs, attn_mask=mask), stock(*inputs, attn_mask=expanded)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_a_mask_of_three_dimensions_for_one_head_of_one_batch():
    torch.manual_seed(16)
    stock = nn.MultiheadAttention(E, 1, batch_first=True)
    ours = copy.deepcopy(stock)
    ours.__class__ = fastattn.MultiheadAttention
    query, key = torch.randn(1, L, E), torch.randn(1, S, E)
    mask = torch.randn(1, L, S)
    torch.testing.assert_close(ours(query, key, key, attn_mask=mask), stock(query, key, key, attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_float32_masks_serve_every_dtype(dtype):
    """Torch takes them without weights; ours with weights too."""
    stock, ours = make_pair(dtype, batch_first=True)
    inputs = make_inputs("batch_first", "shared_kv", stock, dtype)
    mask = torch.randn(L, S)
    expected = call(stock, inputs, {"attn_mask": mask, "need_weights": False})
    tolerance = 1e-6 if dtype == torch.float64 else 5e-2
    assert_same(call(ours, inputs, {"attn_mask": mask, "need_weights": False}), expected, tolerance)
    assert ours(*inputs, attn_mask=mask)[1].dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masks", ["none", "padding_bool", "mask_2d_bool", "mask_2d_float"])
def test_lengths_of_several_tiles(layout, masks, monkeypatch):
    for name, size in (("E", 80), ("H", 2), ("L", 113), ("S", 131)):
        monkeypatch.setitem(globals(), name, size)
    stock, ours = make_pair(torch.float32, batch_first=layout == "batch_first")
    for sharing in ("self", "shared_kv"):
        inputs = make_inputs(layout, sharing, stock, torch.float32)
        options = make_masks(masks, layout, L if sharing == "self" else S, torch.float32)
        assert_same(call(ours, inputs, options), call(stock, inputs, options), 5e-5)


# State --------------------------------------------------------------------------------------------


def test_signatures_are_those_of_torch():
    assert nn.MultiheadAttention.__module__ == "torch.nn.modules.activation"  # never replaced under its own name
    assert fastattn.MultiheadAttention.__init__ is nn.MultiheadAttention.__init__
    ours, stock = (inspect.signature(kind.forward) for kind in (fastattn.MultiheadAttention, nn.MultiheadAttention))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in stock.parameters.values()
    ]


@pytest.mark.parametrize("module", MODULES)
def test_state_is_that_of_torch(module):
    states, generators, modules = [], [], []
    for kind in (nn.MultiheadAttention, fastattn.MultiheadAttention):
        torch.manual_seed(5)
        modules.append(kind(E, H, **MODULES[module]))
        states.append(modules[-1].state_dict())
        generators.append(torch.get_rng_state())
    stock, ours = modules
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*generators)
    assert [name for name, _ in stock.named_parameters()] == [name for name, _ in ours.named_parameters()]
    assert repr(stock) == repr(ours)
    assert isinstance(ours, nn.MultiheadAttention)
    assert vars(stock).keys() == vars(ours).keys()
    torch.manual_seed(5)
    ours._reset_parameters()
    torch.manual_seed(5)
    stock._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("module", MODULES)
def test_state_dicts_are_interchangeable(module):
    stock, ours = nn.MultiheadAttention(E, H, **MODULES[module]), fastattn.MultiheadAttention(E, H, **MODULES[module])
    ours.load_state_dict(stock.state_dict())
    torch.manual_seed(6)
    other = fastattn.MultiheadAttention(E, H, **MODULES[module])
    stock.load_state_dict(other.state_dict(), assign=True)
    for name, value in other.state_dict().items():
        assert torch.equal(stock.state_dict()[name], value)


def test_state_may_be_assigned_to_a_module_without_memory():
    stock, _ = make_pair(batch_first=True)
    ours = fastattn.MultiheadAttention(E, H, batch_first=True, device="meta", dtype=torch.float64)
    state = stock.state_dict()
    ours.load_state_dict(state, assign=True)
    assert all(p.data_ptr() == state[name].data_ptr() and p.requires_grad for name, p in ours.named_parameters())
    inputs = make_inputs("batch_first", "self", ours)
    assert_same(call(ours, inputs, {}), call(stock, inputs, {}), 1e-10)


def test_pickles_older_than_separate_projections_load():
    _, ours = make_pair()
    state = {name: value for name, value in ours.__dict__.items() if name != "_qkv_same_embed_dim"}
    other = fastattn.MultiheadAttention.__new__(fastattn.MultiheadAttention)
    other.__setstate__(state)
    inputs = make_inputs("sequence_first", "self", ours)
    assert all(torch.equal(a, b) for a, b in zip(ours(*inputs), other(*inputs), strict=True))


@pytest.mark.parametrize("masks", ["none", "padding_bool", "mask_2d_bool", "both_bool"])
def test_merge_masks_is_still_there(masks):
    stock, ours = make_pair(batch_first=True)
    query = make_inputs("batch_first", "self", stock)[0]
    options = make_masks(masks, "batch_first", L)
    merged = [m.merge_masks(options.get("attn_mask"), options.get("key_padding_mask"), query) for m in (stock, ours)]
    torch.testing.assert_close(*merged, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, value", [("batch_first", True), ("add_zero_attn", True), ("dropout", 1.0), ("num_heads", 2)]
)
def test_attributes_are_live(name, value):
    stock, ours = make_pair()
    for module in (stock, ours):
        setattr(module, name, value)
    inputs = make_inputs("sequence_first", "self", stock)
    assert_same(call(ours, inputs, {}), call(stock, inputs, {}), 1e-10)


class Counted(nn.Module):
    """A parametrization that counts how often the parameter is read."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def forward(self, weight):
        self.reads += 1
        return weight


@pytest.mark.parametrize("module, sharing", [("plain", s) for s in SHARING] + [("bias_kv", "self")])
def test_the_projection_is_read_once(module, sharing):
    """A weight that is computed at each access, as by spectral_norm, may change from one to the next."""
    stock, ours = make_pair(**MODULES[module])
    inputs = make_inputs("sequence_first", sharing, ours)
    expected = stock(*inputs)
    counted = Counted()
    nn.utils.parametrize.register_parametrization(ours, "in_proj_weight", counted)
    counted.reads = 0
    torch.testing.assert_close(ours(*inputs), expected, rtol=1e-10, atol=1e-10)
    assert counted.reads == 1


def test_backward_survives_a_weight_that_is_taken_away():
    """PEFT puts a merged weight in place for the time of a forward and deletes it before the backward."""
    stock, ours = make_pair()
    inputs = make_inputs("sequence_first", "self", ours)
    gradients = []
    for module in (stock, ours):
        weight = module.in_proj_weight
        del module.in_proj_weight
        module.in_proj_weight = 2 * weight
        out, _ = module(*inputs)
        del module.in_proj_weight
        module.register_parameter("in_proj_weight", weight)
        gradients.append(torch.autograd.grad(out.square().sum(), [weight, inputs[0]]))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_hooks_of_the_output_projection_do_not_fire():
    calls = []
    for module in make_pair():
        module.out_proj.register_forward_hook(lambda *_: calls.append(1))
        module(*make_inputs("sequence_first", "self", module))
    assert not calls


def test_class_swap_needs_nothing_from_init():
    stock, _ = make_pair()
    inputs = make_inputs("sequence_first", "self", stock)
    expected = call(stock, inputs, {})
    stock.__class__ = fastattn.MultiheadAttention
    assert_same(call(stock, inputs, {}), expected, 1e-10)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.load(save(module), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(duplicate):
    _, ours = make_pair()
    inputs = make_inputs("sequence_first", "self", ours)
    other = duplicate(ours)
    assert type(other) is fastattn.MultiheadAttention
    assert all(torch.equal(a, b) for a, b in zip(ours(*inputs), other(*inputs), strict=True))


def save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_meta_device_and_skip_init():
    module = fastattn.MultiheadAttention(E, H, batch_first=True, device="meta")
    x = torch.empty(N, L, E, device="meta")
    out, weights = module(x, x, x)
    assert out.shape == (N, L, E) and weights.shape == (N, L, L) and out.device.type == "meta"
    real, _ = make_pair(torch.float32, batch_first=True)
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    skipped = nn.utils.skip_init(fastattn.MultiheadAttention, E, H, batch_first=True)
    skipped.load_state_dict(real.state_dict())
    x = torch.randn(N, L, E)
    for other in (module, skipped):
        torch.testing.assert_close(other(x, x, x), real(x, x, x), rtol=1e-5, atol=1e-5)


def test_functional_call_takes_parameters_of_the_caller():
    stock, ours = make_pair()
    inputs = make_inputs("sequence_first", "self", ours)
    parameters = {name: 2 * p.detach() for name, p in ours.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, parameters, inputs),
        torch.func.functional_call(stock, parameters, inputs),
        rtol=1e-10,
        atol=1e-10,
    )


# Rows and keys that nobody may see ----------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["padding_bool", "padding_float", "mask_bool", "mask_float"])
def test_dead_rows_are_zero_and_give_no_gradient(kind, need_weights):
    _, ours = make_pair()
    query, key, value = make_inputs("sequence_first", "separate", ours)
    dead = torch.zeros(N, L, dtype=torch.bool)
    if kind.startswith("padding"):
        mask = torch.zeros(N, S, dtype=torch.bool)
        mask[1] = True
        dead[1] = True
    else:
        mask = torch.zeros(L, S, dtype=torch.bool)
        mask[2] = True
        dead[:, 2] = True
    if kind.endswith("float"):
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(mask, float("-inf")).requires_grad_()
    name = "key_padding_mask" if kind.startswith("padding") else "attn_mask"
    out, weights = ours(query, key, value, need_weights=need_weights, **{name: mask})
    rows = out.transpose(0, 1)[dead]
    assert torch.equal(rows, ours.out_proj.bias.expand_as(rows))
    loss = out.square().sum()
    if need_weights:
        assert not weights[dead].any()
        loss = loss + weights.square().sum()
    loss.backward()
    assert not query.grad.transpose(0, 1)[dead].any()
    tensors = [query, key, value, *ours.parameters()] + ([mask] if kind.endswith("float") else [])
    assert all(torch.isfinite(x.grad).all() for x in tensors)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padded_keys_do_not_leak(need_weights, kind):
    _, ours = make_pair()
    query, key, value = (x.detach() for x in make_inputs("sequence_first", "separate", ours))
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[:, 3:] = True
    if kind == "float":
        padding = torch.zeros(N, S, dtype=torch.float64).masked_fill_(padding, float("-inf"))
    clean = ours(query, key, value, key_padding_mask=padding, need_weights=need_weights)
    key[3:], value[3:] = float("nan"), float("inf")
    dirty = ours(query, key, value, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(clean[0], dirty[0])
    assert not need_weights or torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("empty", ["keys", "queries", "batch"])
def test_empty_inputs(empty, need_weights):
    stock, ours = make_pair(batch_first=True)
    query, key, value = make_inputs("batch_first", "separate", stock)
    padding = None
    if empty == "keys":
        key, value = key[:, :0], value[:, :0]
    elif empty == "queries":
        query = query[:, :0]
    else:
        query, key, value = query[:0], key[:0], value[:0]
        padding = torch.zeros(0, S, dtype=torch.bool)
    expected = stock(query, key, value, need_weights=need_weights)
    result = ours(query, key, value, need_weights=need_weights, key_padding_mask=padding)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-10, atol=1e-10)
    assert not need_weights or result[1].shape == expected[1].shape
    result[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_keys_give_the_output_projection_of_zero(layout, bias):
    _, ours = make_pair(batch_first=layout == "batch_first", bias=bias)
    query = make_inputs(layout, "self", ours)[0]
    none = query[:, :0] if layout == "batch_first" else query[:0]
    for need_weights in (True, False):
        out, _ = ours(query, none, none, need_weights=need_weights)
        expected = ours.out_proj.bias.expand_as(out) if bias else torch.zeros_like(out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dead_rows_under_autocast_and_in_evaluation(need_weights):
    _, ours = make_pair(torch.float32, batch_first=True)
    query = make_inputs("batch_first", "self", ours, torch.float32)[0]
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    with torch.autocast("cpu", torch.bfloat16):
        cast, weights = ours(query, query, query, key_padding_mask=padding, need_weights=need_weights)
    cast.float().square().sum().backward()
    assert not query.grad[1].any() and all(torch.isfinite(p.grad).all() for p in ours.parameters())
    with torch.no_grad():
        evaluated, _ = ours.eval()(query, query, query, key_padding_mask=padding, need_weights=need_weights)
    for out in (cast, evaluated):
        assert torch.equal(out[1], ours.out_proj.bias.to(out.dtype).expand_as(out[1]))
    assert not need_weights or not weights[1].any()


# The causal hint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sharing", ["self", "separate"])
def test_causal_hint_stands_for_the_mask(layout, sharing):
    stock, ours = make_pair(batch_first=layout == "batch_first")
    inputs = make_inputs(layout, sharing, stock)
    causal = torch.ones(L, inputs[1].shape[-2] if layout != "sequence_first" else inputs[1].shape[0]).tril() == 0
    hinted = call(ours, inputs, {"attn_mask": causal, "is_causal": True, "need_weights": False})
    assert_same(hinted, call(stock, inputs, {"attn_mask": causal, "need_weights": False}), 1e-10)
    # The hint is a promise about the mask, which is then not read.
    unread = call(
        ours, inputs, {"attn_mask": torch.zeros(1, 1, dtype=torch.bool), "is_causal": True, "need_weights": False}
    )
    assert_same(unread, hinted, 0.0)


@pytest.mark.parametrize("reason", ["weights", "padding", "bias_kv", "zero_attn"])
def test_causal_hint_gives_way_to_the_mask(reason):
    """Torch itself masks the appended key out with `bias_kv` and `zero_attn`: a bug that we do not share."""
    options = {"bias_kv": {"add_bias_kv": True}, "zero_attn": {"add_zero_attn": True}}.get(reason, {})
    stock, ours = make_pair(**options)
    inputs = make_inputs("sequence_first", "self", stock)
    arguments = {"attn_mask": torch.ones(L, L).tril() == 0, "need_weights": reason == "weights"}
    if reason == "padding":
        arguments["key_padding_mask"] = torch.zeros(N, L, dtype=torch.bool)
    assert_same(call(ours, inputs, arguments | {"is_causal": True}), call(stock, inputs, arguments), 1e-10)


# Dropout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["self", "separate"])
def test_dropout_weights_are_those_that_made_the_output(sharing):
    p = 0.4
    _, ours = make_pair(dropout=p, batch_first=True)
    query, key, value = make_inputs("batch_first", sharing, ours)
    torch.manual_seed(7)
    out, weights = ours(query, key, value, average_attn_weights=False)
    torch.manual_seed(7)
    again, averaged = ours(query, key, value)
    torch.manual_seed(8)
    other, _ = ours(query, key, value)
    assert torch.equal(out, again) and not torch.equal(out, other)
    torch.testing.assert_close(averaged, weights.mean(1), rtol=1e-12, atol=1e-12)
    v = nn.functional.linear(value, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    heads = v.unflatten(-1, (H, E // H)).transpose(1, 2)  # (N, H, S, D)
    expected = ours.out_proj((weights @ heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)

    ours.eval()
    undropped = ours(query, key, value, average_attn_weights=False)[1]
    kept = weights != 0
    torch.testing.assert_close(weights[kept], undropped[kept] / (1 - p), rtol=1e-10, atol=1e-10)
    assert 0.2 < 1 - kept.double().mean() < 0.6


def test_dropout_gradients_are_those_of_the_weights():
    _, ours = make_pair(dropout=0.3, batch_first=True)
    inputs = make_inputs("batch_first", "self", ours)

    def function(x):
        torch.manual_seed(9)
        return ours(x, x, x)

    assert torch.autograd.gradcheck(function, (inputs[0],))


def test_activation_checkpointing_repeats_the_dropout():
    _, ours = make_pair(dropout=0.3, batch_first=True)
    x = make_inputs("batch_first", "self", ours)[0]
    gradients = []
    for checkpointed in (False, True):
        ours.zero_grad()
        torch.manual_seed(11)
        if checkpointed:
            out, _ = torch.utils.checkpoint.checkpoint(ours, x, x, x, use_reentrant=False)
        else:
            out, _ = ours(x, x, x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_dropout_of_everything():
    stock, ours = make_pair(dropout=1.0)
    inputs = make_inputs("sequence_first", "self", stock)
    assert_same(call(ours, inputs, {}), call(stock, inputs, {}), 1e-10)


def test_dropout_does_not_move_the_generator_in_evaluation():
    _, ours = make_pair(dropout=0.5)
    inputs = make_inputs("sequence_first", "self", ours)
    ours.eval()
    before = torch.get_rng_state()
    ours(*inputs)
    assert torch.equal(before, torch.get_rng_state())


# Copies, layouts, tracers -------------------------------------------------------------------------


class CountCopies(TorchDispatchMode):
    """Counts operators that copy at least `size` elements."""

    NAMES = (
        "clone",
        "copy_",
        "_to_copy",
        "cat",
        "stack",
        "contiguous",
        "fill",
        "zeros",
        "new_zeros",
        "select_backward",
    )

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in self.NAMES and isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.copies.append(name)
        return result


@pytest.mark.parametrize("masks", ["none", "padding_bool", "mask_2d_bool"])
@pytest.mark.parametrize("layout, copies", [("batch_first", 0), ("unbatched", 0), ("sequence_first", 1)])
def test_self_attention_copies_nothing(layout, copies, masks):
    """Sequence-first output is transposed once, and so is its gradient."""
    _, ours = make_pair(batch_first=layout == "batch_first")
    query = make_inputs(layout, "self", ours)[0]
    options = make_masks(masks, layout, L)
    with CountCopies(query.numel()) as forward:
        out, _ = ours(query, query, query, need_weights=False, **options)
    assert len(forward.copies) == copies, forward.copies
    with CountCopies(query.numel()) as backward:
        out.backward(torch.randn_like(out))
    assert len(backward.copies) == copies, backward.copies


@pytest.mark.parametrize("module, sharing", [("plain", "shared_kv"), ("plain", "separate"), ("kdim_vdim", "separate")])
@pytest.mark.parametrize("layout, copies", [("batch_first", 0), ("unbatched", 0), ("sequence_first", 1)])
def test_cross_attention_copies_nothing_in_the_forward(layout, copies, module, sharing):
    _, ours = make_pair(batch_first=layout == "batch_first", **MODULES[module])
    inputs = make_inputs(layout, sharing, ours)
    with CountCopies(min(x.numel() for x in inputs)) as forward:
        ours(*inputs, need_weights=False)
    assert len(forward.copies) == copies, forward.copies


class Record(TorchDispatchMode):
    """What operators run, on what, and how large their results are."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if not function.is_view:
            self.calls.append((name, args))
            results = result if isinstance(result, tuple) else (result,)
            self.largest = max([self.largest] + [x.numel() for x in results if isinstance(x, torch.Tensor)])
        return result


@pytest.mark.parametrize("sharing", ["self", "separate"])
@pytest.mark.parametrize("masks", ["none", "padding_bool", "mask_2d_float"])
def test_weights_cost_one_kernel_more(masks, sharing, monkeypatch):
    """And the mean over the heads is never made from the weights of every head, forward or backward."""
    monkeypatch.setitem(globals(), "L", 31)
    monkeypatch.setitem(globals(), "S", 29)
    _, ours = make_pair(batch_first=True)
    inputs = make_inputs("batch_first", sharing, ours)
    options = make_masks(masks, "batch_first", L if sharing == "self" else S)
    with Record() as without:
        ours(*inputs, need_weights=False, **options)
    with Record() as record:
        _, weights = ours(*inputs, **options)
        more = [name for name, _ in record.calls]
        weights.square().sum().backward()
    for name, _ in without.calls:
        more.remove(name)
    assert more == ["attention_weights"]
    assert record.largest < N * H * L * inputs[1].shape[1]


@pytest.mark.parametrize("shape", [(N, H, L, S), (1, H, L, S), (N, 1, 1, S), (N, 1, L, 1)])
def test_four_dimensional_masks_are_not_copied(shape, monkeypatch):
    for name, size in (("L", 31), ("S", 29)):
        monkeypatch.setitem(globals(), name, size)
    shape = tuple({7: L, 5: S}.get(size, size) for size in shape)
    _, ours = make_pair(batch_first=True)
    query, key, _ = (x.detach() for x in make_inputs("batch_first", "shared_kv", ours))
    mask = torch.randn(shape, dtype=torch.float64)
    with Record() as record:
        ours(query, key, key, attn_mask=mask, need_weights=False)
    (arguments,) = (args for name, args in record.calls if name == "attention")
    assert arguments[3].data_ptr() == mask.data_ptr() and arguments[3].shape == shape
    # A bool mask is turned over, in its own shape, before it is packed.
    with Record() as record:
        ours(query, key, key, attn_mask=mask > 1, need_weights=False)
    assert [args[0].shape for name, args in record.calls if name == "logical_not"] == [shape]
    assert not {"clone", "copy_", "_to_copy", "bitwise_not"} & {name for name, _ in record.calls}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_output_is_contiguous(layout, training):
    _, ours = make_pair(batch_first=layout == "batch_first")
    inputs = make_inputs(layout, "separate", ours)
    ours.train(training)
    out, weights = ours(*inputs)
    assert out.is_contiguous() and weights.is_contiguous()
    assert ours(*inputs, average_attn_weights=False)[1].is_contiguous()
    assert ours(*inputs, need_weights=False)[0].is_contiguous()


def test_inputs_are_not_modified():
    _, ours = make_pair()
    inputs = make_inputs("sequence_first", "separate", ours)
    options = make_masks("both_float", "sequence_first", S)
    tensors = [*inputs, *options.values()]
    before = [x.detach().clone() for x in tensors]
    out, weights = ours(*inputs, **options)
    out.backward(torch.ones_like(out), retain_graph=True)
    weights.backward(torch.ones_like(weights))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("module", ["plain", "bias_kv", "zero_attn"])
@pytest.mark.parametrize("masks", ["none", "padding_bool", "mask_2d_float"])
def test_autocast(module, masks):
    stock, ours = make_pair(torch.float32, **MODULES[module])
    inputs = make_inputs("sequence_first", "self", ours, torch.float32)
    options = make_masks(masks, "sequence_first", L, torch.float32)
    results = []
    for candidate in (stock, ours):
        with torch.autocast("cpu", torch.bfloat16):
            out, weights = candidate(*inputs, **options)
        assert out.dtype == weights.dtype == torch.bfloat16
        (out.float().square().sum() + weights.float().square().sum()).backward()
        assert all(p.grad.dtype == torch.float32 for p in candidate.parameters())
        results.append((out, weights))
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_masks_under_autocast(dtype, need_weights):
    stock, ours = make_pair(torch.float32, batch_first=True)
    inputs = make_inputs("batch_first", "shared_kv", ours, torch.float32)
    results = []
    for module in (stock, ours):
        masks = {"attn_mask": torch.randn(L, S), "key_padding_mask": torch.randn(N, S)}
        torch.manual_seed(12)
        masks = {name: torch.randn(x.shape).to(dtype).requires_grad_() for name, x in masks.items()}
        with torch.autocast("cpu", torch.bfloat16):
            out, weights = module(*inputs, need_weights=need_weights, **masks)
        assert out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out.float().square().sum(), [*masks.values(), *module.parameters()])
        assert [g.dtype for g in gradients] == [dtype] * 2 + [torch.float32] * 4
        results.append((out, weights, *gradients))
    torch.testing.assert_close(results[1], results[0], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "module, sharing, masks, weights",
    [
        ("plain", "self", "none", "no_weights"),
        ("plain", "self", "padding_bool", "averaged"),
        ("plain", "shared_kv", "mask_3d_float", "per_head"),
        ("bias_kv", "self", "mask_2d_bool", "no_weights"),
        ("kdim_vdim", "separate", "padding_float", "averaged"),
    ],
)
def test_compiles_in_one_graph(module, sharing, masks, weights, training):
    torch._dynamo.reset()
    _, ours = make_pair(torch.float32, batch_first=True, **MODULES[module])
    ours.train(training)
    inputs = make_inputs("batch_first", sharing, ours, torch.float32)
    options = make_masks(masks, "batch_first", L if sharing == "self" else S, torch.float32) | WEIGHTS[weights]
    expected = call(ours, inputs, options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    result = call(compiled, inputs, options)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in result.items()}, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms():
    stock, ours = make_pair(batch_first=True)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    batches = torch.randn(3, N, L, E, dtype=torch.float64)

    def gradients(module):
        def loss(parameters, x):
            return torch.func.functional_call(module, parameters, (x, x, x))[0].square().sum()

        return torch.func.grad(loss)(parameters, batches[0])

    torch.testing.assert_close(gradients(ours), gradients(stock), rtol=1e-9, atol=1e-9)
    mapped = torch.func.vmap(lambda x: ours(x, x, x))(batches)
    expected = [ours(x, x, x) for x in batches]
    for index in range(2):
        torch.testing.assert_close(mapped[index], torch.stack([pair[index] for pair in expected]))


class Block(nn.Module):
    """A model with the module inside."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(E, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, weights = self.attention(x, x, x, need_weights=False)
        return self.norm(x + out)


def test_fx_records_one_call():
    _, ours = make_pair()
    block = Block(ours)
    x = make_inputs("sequence_first", "self", ours)[0]
    traced = torch.fx.symbolic_trace(block)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention", "norm"]
    assert torch.equal(traced(x), block(x))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_jit_script_takes_the_stock_module_over_the_same_parameters():
    _, ours = make_pair()
    block = Block(ours)
    x = make_inputs("sequence_first", "self", ours)[0]
    expected = block(x)
    scripted = torch.jit.script(block)
    torch.testing.assert_close(scripted(x), expected, rtol=1e-10, atol=1e-10)
    assert scripted.attention.in_proj_weight.data_ptr() == ours.in_proj_weight.data_ptr()
    assert type(ours) is fastattn.MultiheadAttention


class Doubled(fastattn.MultiheadAttention):
    def forward(self, query, key, value, need_weights: bool = True):
        return super().forward(2 * query, key, value, need_weights=need_weights)


class Renamed(fastattn.MultiheadAttention):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["forward", "name", "parametrized"])
def test_subclasses_are_not_scripted_as_something_else(kind):
    attention = {"forward": Doubled, "name": Renamed, "parametrized": fastattn.MultiheadAttention}[kind](
        E, 2, dtype=torch.float64
    )
    if kind == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(attention, "in_proj_weight")
    block, x = Block(attention).eval(), torch.randn(3, 2, E, dtype=torch.float64)
    expected = block(x)
    # TorchScript has words of its own for what it cannot compile.
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(block)
    assert block.attention is attention
    assert torch.equal(block(x), expected)


def test_fx_refuses_a_forward_around_ours():
    block = Block(Doubled(E, 2, dtype=torch.float64))
    with pytest.raises(torch.fx.proxy.TraceError, match="Doubled has a forward of its own"):
        torch.fx.symbolic_trace(block)


def test_fx_records_a_subclass_with_our_forward():
    block, x = Block(Renamed(E, 2, dtype=torch.float64)), torch.randn(3, 2, E, dtype=torch.float64)
    assert torch.equal(torch.fx.symbolic_trace(block)(x), block(x))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    _, ours = make_pair()
    block = Block(ours).eval()
    x = make_inputs("sequence_first", "self", ours)[0].detach()
    traced = torch.jit.trace(block, (x,))
    assert torch.equal(traced(x + 1), block(x + 1))


def test_export():
    _, ours = make_pair()
    block = Block(ours).eval()
    x = make_inputs("sequence_first", "self", ours)[0].detach()
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(block, (x,), dynamic_shapes={"x": {0: length}}).module()
    longer = torch.cat([x, x])
    torch.testing.assert_close(exported(longer), block(longer), rtol=1e-10, atol=1e-10)


# The README's table of differences ----------------------------------------------------------------


def test_torch_differs_where_the_table_says():
    """Torch's side of the rows. One that fails here is not a difference any more."""
    torch.manual_seed(13)
    stock = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(N, L, 8)
    everything = torch.ones(N, L, dtype=torch.bool)
    last = everything.clone()
    last[:, :-1] = False
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)

    out, _ = stock(x, x, x, key_padding_mask=everything)
    assert out.isnan().all()
    with torch.no_grad():
        assert stock.eval()(x, x, x, key_padding_mask=everything, need_weights=False)[0].isnan().all()
    stock.train()

    dirty = x.clone()
    dirty[:, -1] = float("nan")
    assert stock(x, dirty, dirty, key_padding_mask=last)[0].isnan().all()

    appended = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    hinted = appended(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    assert (hinted - appended(x, x, x, attn_mask=causal, need_weights=False)[0]).abs().max() > 0.01
    (gradient,) = torch.autograd.grad(hinted.square().sum(), appended.bias_k)
    assert not gradient.any()

    open_mask = torch.zeros_like(causal)
    trained = stock(x, x, x, attn_mask=open_mask, is_causal=True, need_weights=False)[0]
    assert not trained.is_contiguous()
    with torch.no_grad():
        evaluated = stock.eval()(x, x, x, attn_mask=open_mask, is_causal=True, need_weights=False)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)])
        assert stock(nested, nested, nested, need_weights=False)[0].is_nested
    assert (evaluated - trained).abs().max() > 0.01
    stock.train()

    with pytest.raises(AssertionError, match="4-D"):
        stock(x, x, x, attn_mask=torch.zeros(N, 1, L, L))
    with pytest.raises(RuntimeError, match="dtype"):
        stock.double()(*[x.double()] * 3, attn_mask=torch.zeros(L, L))
    stock.float()
    with pytest.raises(RuntimeError, match="reshape"):
        stock(x[:0], x[:0], x[:0], key_padding_mask=everything[:0], need_weights=False)
    leaf = x.clone().requires_grad_()
    out, _ = stock(leaf, leaf, leaf, need_weights=False)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: stock(x, x, x, need_weights=False)[0], (x,), (x,))
    for p in (-0.5, 1.5):
        stock.dropout = p
        with pytest.raises(RuntimeError):
            stock(x, x, x, need_weights=False)


def test_the_hint_is_followed_in_evaluation_as_in_training():
    torch.manual_seed(14)
    ours = fastattn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(N, L, 8)
    options = {"attn_mask": torch.zeros(L, L, dtype=torch.bool), "is_causal": True, "need_weights": False}
    trained, _ = ours(x, x, x, **options)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x, x, x, **options)[0], trained)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert torch.equal(ours(x, x, x, **options)[0], trained)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_nothing_of_torch_is_called_in_between(monkeypatch):
    """Who replaces these functions to reach inside torch's module does not reach inside ours."""

    def fail(*args, **kwargs):
        raise AssertionError("called")

    for name in ("multi_head_attention_forward", "scaled_dot_product_attention"):
        monkeypatch.setattr(nn.functional, name, fail)
    monkeypatch.setattr(torch, "_native_multi_head_attention", fail)
    for training, need_weights in itertools.product((True, False), (True, False)):
        _, ours = make_pair(batch_first=True)
        inputs = make_inputs("batch_first", "self", ours)
        with torch.set_grad_enabled(training):
            ours.train(training)(*inputs, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
def test_derivatives_of_second_order_and_forward_mode(need_weights):
    stock, ours = make_pair(batch_first=True)
    x = make_inputs("batch_first", "self", ours)[0][:1, :3].detach().requires_grad_()
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)

    def function(module):
        def call(x):
            out, weights = module(x, x, x, attn_mask=mask, need_weights=need_weights)
            return (out, weights) if need_weights else (out,)

        return call

    assert torch.autograd.gradgradcheck(function(ours), (x,))
    direction = torch.randn_like(x)
    _, tangents = torch.func.jvp(function(ours), (x.detach(),), (direction,))
    # Torch has them with weights only.
    expected = torch.func.jvp(lambda x: stock(x, x, x, attn_mask=mask), (x.detach(),), (direction,))[1]
    torch.testing.assert_close(tangents, expected[: len(tangents)], rtol=1e-9, atol=1e-9)


def test_dropout_below_zero_drops_nothing():
    _, ours = make_pair(dropout=-0.5)
    inputs = make_inputs("sequence_first", "self", ours)
    trained = ours(*inputs, need_weights=False)[0]
    assert torch.equal(trained, ours.eval()(*inputs, need_weights=False)[0])


def test_weights_of_scores_in_the_thousands():
    """Their relative error is that of lse, which is as large as the scores."""
    torch.manual_seed(15)
    ours = fastattn.MultiheadAttention(8, 2, batch_first=True)
    x = 100 * torch.randn(8, 17, 8)
    q, k, _ = nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).unflatten(-1, (3, 2, 4)).unbind(2)
    largest = torch.einsum("nihd,njhd->nhij", q, k).abs().max() / 2
    assert largest > 1000
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert 0 < (weights.sum(-1) - 1).abs().max() < largest * 2**-23


# Exceptions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error",
    [((0, 1), ValueError), ((E, 0), ValueError), ((-E, 2), ValueError), ((E, 5), AssertionError)],
)
def test_bad_sizes(arguments, error):
    for kind in (nn.MultiheadAttention, fastattn.MultiheadAttention):
        with pytest.raises(error):
            kind(*arguments)


def bools(*shape):
    return torch.zeros(shape, dtype=torch.bool)


BAD_CALLS = {
    "query_rank": (lambda q, k: ((q[None], k, k), {}), AssertionError),
    "key_rank": (lambda q, k: ((q, k[0], k[0]), {}), AssertionError),
    "value_rank": (lambda q, k: ((q, k, k[0]), {}), AssertionError),
    "query_features": (lambda q, k: ((q[..., :4], k, k), {}), AssertionError),
    "key_features": (lambda q, k: ((q, k[..., :4], k[..., :4]), {}), RuntimeError),
    "value_length": (lambda q, k: ((q, k, k[:, :2]), {}), AssertionError),
    "batch": (lambda q, k: ((q, k[:1], k[:1]), {}), RuntimeError),
    "query_dtype": (lambda q, k: ((q.float(), k, k), {}), RuntimeError),
    "key_dtype": (lambda q, k: ((q, k.float(), k.float()), {}), RuntimeError),
    "mask_is_a_list": (lambda q, k: ((q, k, k), {"attn_mask": [1]}), TypeError),
    "padding_is_a_list": (lambda q, k: ((q, k, k), {"key_padding_mask": [1]}), TypeError),
    "mask_int": (lambda q, k: ((q, k, k), {"attn_mask": bools(L, S).int()}), AssertionError),
    "padding_uint8": (lambda q, k: ((q, k, k), {"key_padding_mask": bools(N, S).byte()}), AssertionError),
    "mask_bfloat16": (lambda q, k: ((q, k, k), {"attn_mask": bools(L, S).bfloat16()}), RuntimeError),
    "padding_float16": (lambda q, k: ((q, k, k), {"key_padding_mask": bools(N, S).half()}), RuntimeError),
    "mask_complex": (lambda q, k: ((q, k, k), {"attn_mask": bools(L, S).to(torch.complex64)}), AssertionError),
    "mask_0d": (lambda q, k: ((q, k, k), {"attn_mask": bools()}), AssertionError),
    "mask_1d": (lambda q, k: ((q, k, k), {"attn_mask": bools(S)}), AssertionError),
    "mask_one_row": (lambda q, k: ((q, k, k), {"attn_mask": bools(1, S)}), RuntimeError),
    "mask_one_batch": (lambda q, k: ((q, k, k), {"attn_mask": bools(1, L, S)}), RuntimeError),
    "padding_rank": (lambda q, k: ((q, k, k), {"key_padding_mask": bools(N, S, 1)}), AssertionError),
    "padding_length": (lambda q, k: ((q, k, k), {"key_padding_mask": bools(N, S + 1)}), AssertionError),
    "padding_batch": (lambda q, k: ((q, k, k), {"key_padding_mask": bools(1, S)}), AssertionError),
    "value_dtype": (lambda q, k: ((q, k, k.float()), {}), RuntimeError),
    "hint_alone": (lambda q, k: ((q, k, k), {"is_causal": True}), RuntimeError),
    "unbatched_mask": (lambda q, k: ((q[0], k[0], k[0]), {"attn_mask": bools(N * H, L, S)}), AssertionError),
    "unbatched_key": (lambda q, k: ((q, k[0], k[0]), {}), AssertionError),
    "unbatched_mask_shape": (lambda q, k: ((q[0], k[0], k[0]), {"attn_mask": bools(L, S + 1)}), RuntimeError),
    "unbatched_padding": (lambda q, k: ((q[0], k[0], k[0]), {"key_padding_mask": bools(1, S)}), AssertionError),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_raise_what_torch_raises(case, need_weights):
    make, error = BAD_CALLS[case]
    stock, ours = make_pair(batch_first=True)
    query, key, _ = make_inputs("batch_first", "shared_kv", stock)
    arguments, options = make(query, key)
    with pytest.raises(error):
        stock(*arguments, need_weights=need_weights, **options)
    named = {"mask": "attn_mask", "padding": "key_padding_mask", "hint": "is_causal", "batch": "key and value"}
    word = case.removeprefix("unbatched_").split("_")[0]
    with pytest.raises(error, match=rf"\b{named.get(word, word)}\b"):
        ours(*arguments, need_weights=need_weights, **options)


def test_bad_calls_of_our_own_extensions():
    _, ours = make_pair(dropout=1.5)
    query, key, value = make_inputs("sequence_first", "shared_kv", ours)
    with pytest.raises(RuntimeError, match="4D attn_mask"):
        ours(query, key, value, attn_mask=bools(N, 2, L, S))
    with pytest.raises(ValueError, match="dropout"):
        ours(query, key, value)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("options", [{}, {"kdim": E + 1, "vdim": E + 1}, {"add_zero_attn": True}], ids=str)
def test_dtypes_are_refused_by_name(name, options):
    stock, ours = make_pair(**options)
    inputs = {"query": torch.randn(L, N, E), "key": torch.randn(S, N, ours.kdim), "value": torch.randn(S, N, ours.vdim)}
    inputs = {other: x if other == name else x.double() for other, x in inputs.items()}
    with pytest.raises(RuntimeError):
        stock(**inputs)
    with pytest.raises(RuntimeError, match=rf"{name} must have the dtype of the module's weight, torch.float64, got"):
        ours(**inputs)
    same = torch.randn(L, N, E)
    if ours.kdim == E:
        with pytest.raises(RuntimeError, match="query must have the dtype"):
            ours(same, same, same)


def test_separate_projections_check_the_features():
    stock, ours = make_pair(kdim=KDIM, vdim=VDIM)
    query, key, value = make_inputs("sequence_first", "separate", stock)
    for module in (stock, ours):
        with pytest.raises(AssertionError):
            module(query, value, value)
        with pytest.raises(AssertionError):
            module(query, key, value[:2])


@pytest.mark.parametrize("name", ["bias_k", "bias_v"])
def test_half_of_the_appended_bias(name):
    for module in make_pair():
        setattr(module, name, nn.Parameter(torch.zeros(1, 1, E, dtype=torch.float64)))
        with pytest.raises(AssertionError, match="bias_k"):
            module(*make_inputs("sequence_first", "self", module))


def test_mixed_mask_dtypes_warn():
    stock, ours = make_pair()
    inputs = make_inputs("sequence_first", "shared_kv", stock)
    options = make_masks("padding_bool_mask_float", "sequence_first", S)
    for module in (stock, ours):
        with pytest.warns(UserWarning, match="mismatched"):
            module(*inputs, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_are_refused():
    _, ours = make_pair(batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(4, E)], dtype=torch.float64)
    with pytest.raises(AssertionError, match="NestedTensor.*enable_nested_tensor=False"):
        ours(nested, nested, nested)
