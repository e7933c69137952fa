"""Exported programs without operators of ours: the same numbers, dynamic sizes, and nothing but aten in them."""

import math

import pytest
import torch
from torch import nn

import fastattn
from fastattn import Mask
from fastattn.integrations.export import decompositions
from fastattn.masks import UNLIMITED
from fastattn.ops import SCHEMAS

E, HEADS = 16, 4
SIZES = [(3, 7), (1, 2), (5, 130)]  # batch and length; the first is exported
BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)
TOKENS, ROWS = {0: BATCH, 1: LENGTH}, {0: BATCH, 2: LENGTH}  # (B, L, ...) and (B, H, L, ...)
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
]


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def padded(batch, length, dead=()):
    """torch's key padding mask; every sequence but the dead ones keeps its first token."""
    lengths = torch.arange(batch) % (length - 1) + 1
    lengths[list(dead)] = 0
    return torch.arange(length) >= lengths[:, None]


def qkv(batch, length):
    """Two query heads to each head of keys and values."""
    return random(batch, HEADS, length, 8), random(batch, 2, length, 8), random(batch, 2, length, 6)


def names(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def lowered(function, inputs, dynamic):
    """The program of `function` with and then without operators of ours."""
    model = function if isinstance(function, nn.Module) else Called(function)
    shapes = (dynamic,) if type(model) is Called else dynamic
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        assert any(name.startswith("fastattn.") for name in names(program))
        program = program.run_decompositions(decompositions())
    assert all(name.startswith(("aten.", "<built-in")) for name in names(program)), names(program)
    return program.module()


def check(function, make, dynamic):
    program = lowered(function, make(*SIZES[0]), dynamic)
    for size in SIZES:
        inputs = make(*size)
        torch.manual_seed(3)
        expected = function(*inputs)
        torch.manual_seed(3)
        torch.testing.assert_close(program(*inputs), expected, **TOLERANCE)
    return program


# Programs ------------------------------------------------------------------------------------------------------------


def attention(dropout_p=0.0, **named):
    """out and lse of one call; what is callable is made of the tensors that follow query, key and value."""

    def run(query, key, value, *tensors):
        arguments = {name: make(*tensors) if callable(make) else make for name, make in named.items()}
        return fastattn.attention(query, key, value, **arguments, dropout_p=dropout_p, return_lse=True)

    return run


CALLS = {  # the call, what it takes besides query, key and value, and which of its sizes are dynamic
    "plain": (attention(), lambda b, n: (), ()),
    "bands": (attention(mask=Mask.causal("bottom_right") & Mask.window(3, None), scale=0.3), lambda b, n: (), ()),
    "dropout": (attention(0.3, mask=Mask.causal()), lambda b, n: (), ()),
    "lengths, segments, bias": (
        attention(
            mask=lambda lengths, ids, bias: (
                Mask.key_lengths(lengths) & Mask.prefix(lengths - 1) & Mask.segments(ids, ids)
            ),
            bias=lambda lengths, ids, bias: bias,
        ),
        # Some sequences have no key at all, and one query has a bias of -inf everywhere.
        lambda b, n: (
            torch.arange(b) % (n + 1),
            torch.arange(n).expand(b, n) // 3,
            torch.where(torch.arange(n)[:, None] == 1, -math.inf, random(1, HEADS, n, n)),
        ),
        ({0: BATCH}, TOKENS, {2: LENGTH, 3: LENGTH}),
    ),
    "dense": (
        attention(mask=lambda keep: keep),
        lambda b, n: (torch.rand(b, 1, n, n) < 0.4,),
        ({0: BATCH, 2: LENGTH, 3: LENGTH},),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_attention(name):
    function, more, dynamic = CALLS[name]
    check(function, lambda b, n: (*qkv(b, n), *more(b, n)), (ROWS, ROWS, ROWS, *dynamic))


class SelfAttention(nn.Module):
    """The module's calls with a padding mask: with a float mask and weights; causal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64)
        fastattn.replace_multihead_attention(self)

    def forward(self, x, padding, bias):
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (
            *self.attention(x, x, x, padding, attn_mask=bias),
            self.attention(x, 2 * x, x, padding, attn_mask=causal, is_causal=True, need_weights=False)[0],
        )


def module_inputs(batch, length, dead=()):
    return random(batch, length, E), padded(batch, length, dead), random(length, length)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_module():
    model = SelfAttention().eval()
    program = check(model, module_inputs, (TOKENS, TOKENS, {0: LENGTH, 1: LENGTH}))

    # A sequence without a token: zeros, so that the output is the projection's bias; and no NaN in a gradient.
    x, padding, bias = module_inputs(3, 9, dead=[1])
    x[1, 4] = math.nan
    x.requires_grad_()
    out, weights, causal = program(x, padding, bias)
    projection = model.attention.out_proj.bias.expand(9, E)
    torch.testing.assert_close(out[1], projection, **TOLERANCE)
    torch.testing.assert_close(causal[1], projection, **TOLERANCE)
    assert (weights[1] == 0).all() and weights[0].any()
    others = torch.tensor([0, 2])
    actual = torch.autograd.grad((out[others].square().sum() + weights[others].square().sum()), x)[0]
    out, weights, causal = model(x, padding, bias)
    expected = torch.autograd.grad((out[others].square().sum() + weights[others].square().sum()), x)[0]
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def images(batch, length):
    return random(batch, 3, 2 * length, 6), random(batch, 3, 2 * length, 6), torch.rand(batch, length, 3) < 0.5


def test_masked_loss():
    def losses(prediction, target, mask):
        arguments = prediction, target, mask
        return (
            fastattn.masked_l1_loss(*arguments, patch_size=2),
            fastattn.masked_mse_loss(*arguments, patch_size=2, normalize_target=True, reduction="mean"),
            fastattn.masked_smooth_l1_loss(*arguments, patch_size=2, beta=0.5, reduction="none"),
        )

    pixels = {0: BATCH, 2: 2 * LENGTH}
    check(losses, images, (pixels, pixels, TOKENS))


# Formulas, called as functions: what programs seldom hold ------------------------------------------------------------


def both(name, *arguments):
    operator = getattr(torch.ops.fastattn, name).default
    return decompositions()[operator](*arguments), operator(*arguments)


def arguments_of(query, key, value, bias=None, mask=None, dropout_p=0.0, seed=None):
    flat = mask or [[], *[None] * 10, 0, 0]
    return query, key, value, bias, *flat, 0.5, dropout_p, seed, "reference"


def band(*limits):
    return [list(limits), *[None] * 10, 0, 0]


@pytest.mark.parametrize("average_heads", [True, False])
def test_weights_and_their_dropout(average_heads):
    query, key, value = qkv(2, 70)
    dropout = (0.4, torch.tensor(2**62 + 12345))
    mask = [[], None, torch.tensor([70, 0]), *[None] * 8, 0, 0]
    actual, expected = both("attention", *arguments_of(query, key, value, None, mask, *dropout))
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    lse = expected[1]
    actual, expected = both(
        "attention_weights", query, key, lse, None, *mask, 0.5, average_heads, *dropout, "reference"
    )
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert expected.any() and not expected[1].any()


@pytest.mark.parametrize(
    "limits",
    [(UNLIMITED, -UNLIMITED, UNLIMITED, UNLIMITED), (2, 5, UNLIMITED, 1), (UNLIMITED, UNLIMITED, -1, UNLIMITED)],
)
@pytest.mark.parametrize("len_k", [0, 3, 90])
def test_every_side_of_a_band(limits, len_k):
    query, _, _ = qkv(2, 40)
    _, key, value = qkv(2, len_k)
    torch.testing.assert_close(*both("attention", *arguments_of(query, key, value, None, band(*limits))), **TOLERANCE)


def test_tile_maps():
    masks = [torch.rand(2, 1, 50, 90) < 0.5, torch.rand(1, HEADS, 1, 90) < 0.7]
    actual, expected = both("mask_tiles", masks, 50, 90, 48, 64, "reference")
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    query, _, _ = qkv(2, 50)
    _, key, value = qkv(2, 90)
    mask = [[], *[None] * 5, *expected, 48, 64]
    torch.testing.assert_close(*both("attention", *arguments_of(query, key, value, None, mask)), **TOLERANCE)


def test_half_precision_is_computed_in_single():
    query, key, value = (x.bfloat16() for x in qkv(2, 40))
    actual, expected = both("attention", *arguments_of(query, key, value, torch.randn(1, 1, 40, 40)))
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    assert actual[0].stride() == expected[0].stride()
    torch.testing.assert_close(actual, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("reduction", ["masked_mean", "sum", "mean"])
def test_the_gradient_that_a_loss_returns(reduction):
    loss = (*images(2, 4), "smooth_l1", reduction, 2, 0.7, True, 1e-6, True, "reference")
    actual, expected = both("masked_loss", *loss)
    assert expected[1].any()
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_every_forward_operator_has_a_formula():
    forwards = {name for name in SCHEMAS if not name.endswith("_jvp") and "_backward" not in name}
    table = decompositions()
    assert {name for name in SCHEMAS if getattr(torch.ops.fastattn, name).default in table} == forwards


# ONNX ----------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx():
    reason = "ONNX needs the packages onnx and onnxscript"
    evaluator = pytest.importorskip("onnx.reference", reason=reason).ReferenceEvaluator
    pytest.importorskip("onnxscript", reason=reason)
    torch.manual_seed(1)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True), 1).eval()
    fastattn.replace_multihead_attention(model)

    def inputs(batch, length, dead=()):
        return torch.randn(batch, length, E), padded(batch, length, dead)

    encoder = Encoder(model).eval()
    program = torch.export.export(encoder, inputs(*SIZES[0]), dynamic_shapes=(TOKENS, TOKENS))
    program = program.run_decompositions(decompositions())
    session = evaluator(torch.onnx.export(program, dynamo=True, verbose=False).model_proto)
    for size in (*SIZES, (3, 5, [1])):  # the last has a sequence without a token
        x, padding = inputs(*size)
        found = session.run(None, dict(zip(session.input_names, (x.numpy(), padding.numpy()), strict=True)))
        torch.testing.assert_close(torch.from_numpy(found[0]), encoder(x, padding), rtol=1e-4, atol=1e-5)
