"""`fastattn.MultiheadAttention` against torch's over the whole space of arguments, by random search."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from stock_reference import disagreements
from torch import nn

import fastattn

# Beyond single tiles of 48 queries and 64 keys too.
LENGTHS = st.one_of(st.integers(1, 9), st.sampled_from([0, 17, 49, 65, 97]))
MASK_KINDS = ("none", "2d_bool", "2d_float", "3d_bool", "3d_float", "causal_bool", "causal_float")


@st.composite
def cases(draw):
    """A call, as plain values: hypothesis prints and shrinks those well."""
    layout = draw(st.sampled_from(["sequence_first", "batch_first", "unbatched"]))
    sharing = draw(st.sampled_from(["self", "shared_kv", "separate"]))
    heads, head_dim = draw(st.sampled_from([(1, 1), (1, 8), (2, 4), (3, 5), (4, 16), (2, 33)]))
    embed_dim = heads * head_dim
    kdim = vdim = None
    if sharing != "self" and draw(st.booleans()):
        kdim = draw(st.integers(1, 12))
        vdim = kdim if sharing == "shared_kv" else draw(st.integers(1, 12))
    len_q = draw(LENGTHS)
    attn_mask = draw(st.sampled_from(MASK_KINDS))
    return {
        "layout": layout,
        "sharing": sharing,
        "batch": 1 if layout == "unbatched" else draw(st.integers(1, 3)),
        "len_q": len_q,
        "len_k": len_q if sharing == "self" else draw(LENGTHS),
        "module": {
            **{"embed_dim": embed_dim, "num_heads": heads, "kdim": kdim, "vdim": vdim},
            **{name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn")},
            "dropout": draw(st.sampled_from([0.0, 0.0, 0.3])),
            "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
            "batch_first": layout == "batch_first" or (layout == "unbatched" and draw(st.booleans())),
        },
        "training": draw(st.booleans()),
        "attn_mask": attn_mask,
        "padding": draw(st.sampled_from(["none", "none", "bool", "float"])),
        "masked": draw(st.sampled_from([0.1, 0.5, 0.9])),
        "is_causal": attn_mask.startswith("causal") and draw(st.booleans()),
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
        "contiguous": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


def build(case):
    """Torch's module, ours, the inputs and the options of the call."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype, batch_first = case["module"]["dtype"], case["module"]["batch_first"]
    unbatched = case["layout"] == "unbatched"

    def draw(*shape, strided=not case["contiguous"]):
        whole = (*shape[:-1], 2 * shape[-1]) if strided else shape
        return torch.randn(whole, generator=generator, dtype=dtype)[..., :: 2 if strided else 1]

    stock = nn.MultiheadAttention(**case["module"]).train(case["training"])
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(parameter.shape[-1] ** -0.5 * draw(*parameter.shape, strided=False))
    ours = copy.deepcopy(stock)
    ours.__class__ = fastattn.MultiheadAttention

    def sequence(length, features):
        batch = case["batch"]
        return draw(*((length,) if unbatched else (batch, length) if batch_first else (length, batch)), features)

    inputs = {"query": sequence(case["len_q"], stock.embed_dim)}
    if case["sharing"] != "self":
        inputs["key"] = sequence(case["len_k"], stock.kdim)
    if case["sharing"] == "separate":
        inputs["value"] = sequence(case["len_k"], stock.vdim)

    def mask(kind, *shape):
        # A random part is masked, and sometimes a whole row, which may leave queries with nothing to attend to.
        masked = torch.rand(shape, generator=generator) < case["masked"]
        masked |= torch.rand((*shape[:-1], 1), generator=generator) < 0.1
        if kind == "bool":
            return masked
        return draw(*shape).masked_fill(masked, float("-inf"))

    options = {name: case[name] for name in ("need_weights", "average_attn_weights", "is_causal")}
    shape, kind = case["attn_mask"].split("_") if case["attn_mask"] != "none" else (None, None)
    pairs = (case["len_q"], case["len_k"])
    if shape == "causal":
        future = torch.ones(pairs, dtype=torch.bool).triu(1)
        filled = torch.zeros(pairs, dtype=dtype).masked_fill(future, float("-inf"))
        options["attn_mask"] = future if kind == "bool" else filled
    elif shape is not None:
        heads = (case["batch"] * stock.num_heads,) if shape == "3d" else ()
        options["attn_mask"] = mask(kind, *heads, *pairs)
    if case["padding"] != "none":
        batch = () if unbatched else (case["batch"],)
        options["key_padding_mask"] = mask(case["padding"], *batch, case["len_k"])
    return ours, stock, inputs, options


def check(case):
    ours, stock, inputs, options = build(case)
    found = disagreements(ours, stock, inputs, options, dropout_seed=case["seed"])
    assert not found, "\n".join(found)


common = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=75, **common)
@given(cases())
def test_any_call_gives_the_numbers_of_torch(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=600, **common)
@given(cases())
def test_many_calls_give_the_numbers_of_torch(case):
    check(case)


class ScaledOutput(fastattn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out * (1 + 1e-5), weights


class DetachedMask(fastattn.MultiheadAttention):
    def forward(self, *args, attn_mask=None, **kwargs):
        return super().forward(*args, attn_mask=attn_mask.detach(), **kwargs)


class UndroppedWeights(fastattn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, _ = super().forward(*args, **kwargs)
        self.eval()
        _, weights = super().forward(*args, **kwargs)
        self.train()
        return out, weights


class OpenDeadRows(fastattn.MultiheadAttention):
    def forward(self, *args, key_padding_mask=None, **kwargs):
        dead = key_padding_mask.all(-1, keepdim=True)
        return super().forward(*args, key_padding_mask=key_padding_mask & ~dead, **kwargs)


@pytest.mark.parametrize(
    "fault, change, name",
    [
        (ScaledOutput, {}, "out"),
        (DetachedMask, {}, "d attn_mask"),
        (UndroppedWeights, {"dropout": 0.3}, "weights"),
        (OpenDeadRows, {"attn_mask": "none", "padding": "bool", "masked": 1.0}, "out"),
    ],
)
def test_faults_are_found(fault, change, name):
    case = {
        **{"layout": "batch_first", "sharing": "self", "batch": 2, "len_q": 7, "len_k": 7, "training": True},
        **{"attn_mask": "2d_float", "padding": "none", "masked": 0.3, "is_causal": False, "need_weights": True},
        **{"average_attn_weights": True, "contiguous": True, "seed": 1, **change},
        "module": {"embed_dim": 8, "num_heads": 2, "dropout": change.get("dropout", 0.0), "batch_first": True},
    }
    case["module"]["dtype"] = torch.float32
    ours, stock, inputs, options = build(case)
    assert not disagreements(ours, stock, inputs, options)
    ours.__class__ = fault
    found = disagreements(ours, stock, inputs, options)
    assert any(message.startswith(name + ":") for message in found), found
