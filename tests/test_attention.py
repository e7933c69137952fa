"""The public attention functions: what they compute, against torch, and what they refuse."""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import Mask, dispatch, ops
from fastattn.attention import _attention_packed, _attention_with_seed


@pytest.fixture
def backend(backend):
    with fastattn.use_backend(backend):
        yield backend


def inputs(B=2, Hq=4, Hkv=2, L=7, S=11, D=8, Dv=5, **options):
    shapes = (B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv)
    return [torch.randn(shape, **options) for shape in shapes]


def with_torch(query, key, value, keep=None, bias=None, scale=None):
    """The same by torch, computed in float64; rows without keys are 0."""
    query, key, value = (x.double() for x in (query, key, value))
    added = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
    if keep is not None:
        added = added.masked_fill(~keep, -torch.inf)
    shape = (*query.shape[:3], key.shape[2])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=added.expand(shape), scale=scale, enable_gqa=True)
    return (out if keep is None else out.where(keep.expand(shape).any(-1, keepdim=True), 0)).float()


# attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3, 2])
def test_matches_torch(scale, backend):
    query, key, value = inputs()
    assert_close(fastattn.attention(query, key, value, scale=scale), with_torch(query, key, value, scale=scale))


@pytest.mark.parametrize("shape", [(2, 4, 7, 11), (2, 1, 1, 11), (4, 7, 1), (7, 11), (1,), ()])
def test_mask_and_bias_broadcast(shape, backend):
    query, key, value = inputs()
    keep = torch.rand(shape) > 0.4
    bias = torch.randn(shape)
    expected = with_torch(query, key, value, keep, bias)
    assert_close(fastattn.attention(query, key, value, mask=keep, bias=bias), expected)
    assert_close(fastattn.attention(query, key, value, mask=Mask.dense(keep), bias=bias), expected)


@pytest.mark.parametrize("shape", [(2, 4, 7, 11), (4, 7, 1), (11,), ()])
def test_bias_gradient_has_the_shape_of_the_bias(shape, backend):
    query, key, value = inputs()
    bias = torch.randn(shape, requires_grad=True)
    fastattn.attention(query, key, value, bias=bias).square().sum().backward()
    expected = bias.detach().double().requires_grad_()
    with_torch(query, key, value, bias=expected).square().sum().backward()
    assert bias.grad.shape == shape
    assert_close(bias.grad, expected.grad.float())


def test_bias_may_be_float32_for_half_precision(backend):
    query, key, value = inputs(dtype=torch.bfloat16)
    bias = torch.randn(7, 11, requires_grad=True)
    out = fastattn.attention(query, key, value, bias=bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert bias.grad.dtype == torch.float32


def test_lse_is_the_natural_log_in_float32(backend):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        query, key, value = inputs(Hkv=4, dtype=dtype)
        _, lse = fastattn.attention(query, key, value, return_lse=True)
        assert lse.dtype == torch.float32
        scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(8)
        assert_close(lse, scores.logsumexp(-1).float())


def test_any_strides(backend):
    query, key, value = inputs()
    expected = fastattn.attention(query, key, value)
    last = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value)]
    sliced = [torch.cat((x, x), dim=-1)[..., : x.shape[-1]] for x in (query, key, value)]
    heads_inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    for variant in (last, sliced, heads_inside):
        assert_close(fastattn.attention(*variant), expected)
    expanded = [x[:1].expand(x.shape).requires_grad_() for x in (query, key, value)]
    out = fastattn.attention(*expanded)
    assert_close(out, fastattn.attention(*(x.contiguous() for x in expanded)))
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), expanded))


def test_inputs_are_not_modified(backend):
    tensors = inputs()
    before = [x.clone() for x in tensors]
    bias, keep = torch.randn(7, 11), torch.rand(2, 1, 7, 11) > 0.5
    copies = bias.clone(), keep.clone()
    fastattn.attention(*tensors, mask=keep, bias=bias, dropout_p=0.5)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, bias, keep), (*before, *copies), strict=True))


def test_manual_seed_reproduces_dropout(backend):
    tensors = inputs()
    torch.manual_seed(5)
    first = fastattn.attention(*tensors, dropout_p=0.4)
    second = fastattn.attention(*tensors, dropout_p=0.4)
    torch.manual_seed(5)
    assert torch.equal(fastattn.attention(*tensors, dropout_p=0.4), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    fastattn.attention(*tensors)
    assert torch.equal(torch.get_rng_state(), state)  # without dropout nothing is drawn


@pytest.mark.parametrize("sizes", [{"B": 0}, {"L": 0}, {"S": 0}, {"D": 0}, {"Dv": 0}, {"Hq": 0, "Hkv": 0}])
def test_empty_problems(sizes, backend):
    tensors = inputs(**sizes, requires_grad=True)
    out, lse = fastattn.attention(*tensors, return_lse=True)
    query, key, value = tensors
    assert out.shape == (*query.shape[:3], value.shape[3])
    assert lse.shape == query.shape[:3]
    if "S" in sizes:
        assert not out.any() and (lse == -torch.inf).all()
    if "D" in sizes:  # every score is 0: the mean of the values
        assert_close(out, value.mean(2, keepdim=True).repeat_interleave(2, 1).expand(out.shape))
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(x.shape == g.shape and torch.isfinite(g).all() for x, g in zip(tensors, gradients, strict=True))


def test_the_same_under_grad_and_without(backend):
    tensors = inputs(requires_grad=True)
    with_graph = fastattn.attention(*tensors, mask=Mask.causal())
    with torch.no_grad():
        without = fastattn.attention(*tensors, mask=Mask.causal())
    with torch.inference_mode():
        inference = fastattn.attention(*tensors, mask=Mask.causal())
    assert torch.equal(with_graph, without) and torch.equal(with_graph, inference)
    assert not without.requires_grad


# attention_weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_the_softmax(average, backend):
    query, key, value = inputs(dtype=torch.float64)
    keep = torch.rand(2, 1, 7, 11) > 0.5
    keep[0, :, 3] = False
    bias = torch.randn(4, 7, 11, dtype=torch.float64)
    _, lse = fastattn.attention(query, key, value, mask=keep, bias=bias, scale=0.7, return_lse=True)
    weights = fastattn.attention_weights(query, key, lse, mask=keep, bias=bias, scale=0.7, average_heads=average)
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.7 + bias).masked_fill(~keep, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0)
    assert_close(weights, expected.mean(1) if average else expected, rtol=1e-6, atol=1e-6)  # lse is float32


def test_weights_after_dropout_are_those_of_the_forward(backend):
    query, key, _ = inputs(Hkv=4)
    value = torch.eye(11).expand(2, 4, 11, 11)
    dropout_seed = torch.tensor(99)
    options = {"mask": None, "bias": None, "dropout_p": 0.4, "scale": None, "backend": None}
    out, lse = _attention_with_seed(query, key, value, dropout_seed=dropout_seed, **options)
    weights = fastattn.attention_weights(query, key, lse, average_heads=False, dropout_p=0.4, dropout_seed=dropout_seed)
    assert_close(weights, out)
    assert ((weights == 0).float().mean() - 0.4).abs() < 0.1


# attention_varlen ----------------------------------------------------------------------------------------------------


def packed_inputs(lengths_q, lengths_k, **options):
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    return (
        torch.randn(total_q, 4, 8, **options),
        torch.randn(total_k, 2, 8, **options),
        torch.randn(total_k, 2, 5, **options),
        torch.tensor([0, *lengths_q]).cumsum(0),
        torch.tensor([0, *lengths_k]).cumsum(0),
    )


def one_by_one(query, key, value, cu_q, cu_k, mask):
    outs, lses = [], []
    for n in range(len(cu_q) - 1):
        parts = (query[cu_q[n] : cu_q[n + 1]], key[cu_k[n] : cu_k[n + 1]], value[cu_k[n] : cu_k[n + 1]])
        out, lse = fastattn.attention(*(x.transpose(0, 1)[None] for x in parts), mask=mask, return_lse=True)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


VARLEN_MASKS = [
    None,
    Mask.causal(),
    Mask.causal("bottom_right"),
    Mask.window(2, 1),
    Mask.window(3, None, "bottom_right") & Mask.causal("bottom_right"),
]


@pytest.mark.parametrize("mask", VARLEN_MASKS, ids=repr)
@pytest.mark.parametrize(
    "lengths", [((5, 1, 0, 9), (5, 1, 0, 9)), ((5, 1, 3, 4), (7, 0, 2, 9)), ((), ()), ((0,), (0,))]
)
def test_varlen_is_each_sequence_alone(lengths, mask, backend):
    *tensors, cu_q, cu_k = packed_inputs(*lengths, requires_grad=True)
    out, lse = fastattn.attention_varlen(*tensors, cu_q, cu_k, mask=mask, return_lse=True)
    assert out.shape == (sum(lengths[0]), 4, 5) and lse.shape == (4, sum(lengths[0]))
    if not lengths[0]:
        return
    expected, expected_lse = one_by_one(*tensors, cu_q, cu_k, mask)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    for got, wanted in zip(
        torch.autograd.grad(out.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        assert_close(got, wanted)


def test_varlen_dropout_is_reproducible_and_differs_between_sequences(backend):
    query = torch.zeros(12, 4, 8)
    value = torch.eye(6).repeat(2, 1)[:, None].expand(12, 2, 6)
    same, other = torch.tensor([0, 6, 12]), torch.tensor([0, 6, 12])
    for cu_k, mask in ((same, None), (other, Mask.causal("bottom_right"))):
        torch.manual_seed(1)
        first = fastattn.attention_varlen(query, query[:, :2], value, same, cu_k, mask=mask, dropout_p=0.5)
        torch.manual_seed(1)
        assert torch.equal(
            first, fastattn.attention_varlen(query, query[:, :2], value, same, cu_k, mask=mask, dropout_p=0.5)
        )
        assert not torch.equal(first[:6], first[6:])


def test_varlen_with_different_lengths_and_dropout(backend):
    *tensors, cu_q, cu_k = packed_inputs((4, 4), (6, 6))
    tensors[2] = torch.eye(6).repeat(2, 1)[:, None].expand(12, 2, 6)
    out = fastattn.attention_varlen(*tensors, cu_q, cu_k, mask=Mask.window(None, None) & Mask.causal(), dropout_p=0.5)
    assert not torch.equal(out[:4] == 0, out[4:] == 0)


def test_varlen_compiles_with_one_tensor_of_lengths():
    *tensors, cu, _ = packed_inputs((5, 1, 9), (5, 1, 9))

    def function(query, key, value, cu):
        return fastattn.attention_varlen(query, key, value, cu, cu, mask=Mask.causal())

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tensors, cu), function(*tensors, cu))


# scaled_dot_product_attention ----------------------------------------------------------------------------------------


def test_signature_is_that_of_torch():
    ours = inspect.signature(fastattn.scaled_dot_product_attention).parameters
    expected = {
        "query": inspect.Parameter.empty,
        "key": inspect.Parameter.empty,
        "value": inspect.Parameter.empty,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    assert {name: parameter.default for name, parameter in ours.items()} == expected
    # torch's is a builtin, whose signature stands in its documentation.
    documented = re.sub(r"\s+", " ", F.scaled_dot_product_attention.__doc__.split("->")[0])
    stated = ", ".join(
        name if default is inspect.Parameter.empty else f"{name}={default}" for name, default in expected.items()
    )
    assert documented.strip() == f"scaled_dot_product_attention({stated})"


SDPA_SHAPES = [
    ((7, 8), (11, 8), (11, 5)),
    ((3, 7, 8), (3, 11, 8), (3, 11, 5)),
    ((2, 4, 7, 8), (2, 4, 11, 8), (2, 4, 11, 5)),
    ((3, 2, 4, 7, 8), (3, 2, 4, 11, 8), (3, 2, 4, 11, 5)),
    ((2, 3, 2, 4, 7, 8), (2, 3, 2, 4, 11, 8), (2, 3, 2, 4, 11, 5)),
    ((2, 4, 7, 8), (1, 1, 11, 8), (1, 1, 11, 5)),
    ((1, 4, 7, 8), (2, 1, 11, 8), (2, 1, 11, 5)),
    ((4, 7, 8), (2, 1, 11, 8), (2, 1, 11, 5)),
    ((3, 1, 4, 7, 8), (2, 1, 11, 8), (1, 1, 11, 5)),
]


@pytest.mark.parametrize("shapes", SDPA_SHAPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "causal", "mask", "float", "scale"])
def test_sdpa_is_that_of_torch(shapes, option, backend):
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    lead = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.rand(*lead, 7, 11) > 0.3},
        "float": {"attn_mask": torch.randn(7, 11)},
        "scale": {"scale": 0.1, "attn_mask": torch.randn(*lead[-1:], 1, 11) if lead else None},
    }[option]
    out = fastattn.scaled_dot_product_attention(*tensors, **options)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    assert out.shape == expected.shape
    assert_close(out, expected)
    for got, wanted in zip(
        torch.autograd.grad(out.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
def test_sdpa_shares_heads_as_torch(lead, backend):
    shapes = (*lead, 6, 7, 8), (*lead, 2, 11, 8), (*lead, 2, 11, 5)
    tensors = [torch.randn(shape) for shape in shapes]
    mask = torch.randn(*lead, 6, 7, 11)
    out = fastattn.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    assert_close(out, F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True))
    if lead:
        with pytest.raises(ValueError, match="must broadcast"):
            fastattn.scaled_dot_product_attention(*tensors)


def test_sdpa_float_mask_is_differentiable(backend):
    tensors = [torch.randn(2, 4, 7, 8) for _ in range(3)]
    mask = torch.randn(7, 7, requires_grad=True)
    theirs = mask.detach().clone().requires_grad_()
    fastattn.scaled_dot_product_attention(*tensors, mask).square().sum().backward()
    F.scaled_dot_product_attention(*tensors, theirs).square().sum().backward()
    assert_close(mask.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_sdpa_minus_infinity_masks(backend):
    tensors = [torch.randn(2, 4, 7, 8) for _ in range(3)]
    mask = torch.zeros(7, 7).masked_fill(torch.rand(7, 7) > 0.5, -torch.inf)
    mask[2] = -torch.inf
    out = fastattn.scaled_dot_product_attention(*tensors, mask)
    assert_close(out, fastattn.scaled_dot_product_attention(*tensors, mask == 0))
    assert not out[:, :, 2].any()


# Bad input -----------------------------------------------------------------------------------------------------------

BAD = [
    (lambda q, k, v: fastattn.attention([1.0], k, v), TypeError, "query must be a tensor, got list"),
    (lambda q, k, v: fastattn.attention([1.0], k, v, dropout_p=0.5), TypeError, "query must be a tensor, got list"),
    (lambda q, k, v: fastattn.attention(q, None, v), TypeError, "key must be a tensor, got NoneType"),
    (lambda q, k, v: fastattn.attention(q[0], k, v), ValueError, r"query must have 4 dimensions.*got \(4, 7, 8\)"),
    (lambda q, k, v: fastattn.attention(q, k, v[0]), ValueError, r"value must have 4 dimensions.*got \(2, 11, 5\)"),
    (lambda q, k, v: fastattn.attention(q[:1], k, v), ValueError, r"same batch size, got query \(1, 4, 7, 8\)"),
    (lambda q, k, v: fastattn.attention(q, k, v[:1]), ValueError, "same batch size"),
    (
        lambda q, k, v: fastattn.attention(q, k[:, :1], v),
        ValueError,
        "key and value must have the same number of heads",
    ),
    (lambda q, k, v: fastattn.attention(q[:, :3], k, v), ValueError, "heads of query must be a multiple of the heads"),
    (lambda q, k, v: fastattn.attention(q, k[:, :0], v[:, :0]), ValueError, "heads of query must be a multiple"),
    (lambda q, k, v: fastattn.attention(q, k[:, :, :9], v), ValueError, "key and value must have the same length"),
    (lambda q, k, v: fastattn.attention(q, k[..., :4], v), ValueError, "query and key must have the same head dim"),
    (lambda q, k, v: fastattn.attention(q.int(), k, v), TypeError, "query must be float32, .*, got torch.int32"),
    (lambda q, k, v: fastattn.attention(q.cfloat(), k, v), TypeError, "query must be float32, .*, got torch.complex64"),
    (
        lambda q, k, v: fastattn.attention(q, k.double(), v),
        TypeError,
        "same dtype, got query torch.float32, key torch.f",
    ),
    (lambda q, k, v: fastattn.attention(q, k.to("meta"), v), ValueError, "key must be on the device of query, cpu"),
    (lambda q, k, v: fastattn.attention(q, k, v.to("meta")), ValueError, "value must be on the device of query, cpu"),
    (
        lambda q, k, v: fastattn.attention(q, k, v, mask=torch.ones(3, 11, dtype=bool)),
        ValueError,
        "mask must broadcast",
    ),
    (lambda q, k, v: fastattn.attention(q, k, v, mask=torch.ones(7, 11)), TypeError, "mask must be .* bool"),
    (lambda q, k, v: fastattn.attention(q, k, v, mask="causal"), TypeError, "mask must be a Mask or a bool tensor"),
    (lambda q, k, v: fastattn.attention(q, k, v, mask=Mask.key_lengths([1, 2, 3])), ValueError, "mask: key lengths"),
    (
        lambda q, k, v: fastattn.attention(q, k, v, mask=torch.ones(7, 11, dtype=bool, device="meta")),
        ValueError,
        "mask must be on cpu",
    ),
    (lambda q, k, v: fastattn.attention(q, k, v, bias=1.0), TypeError, "bias must be a float tensor, got float"),
    (lambda q, k, v: fastattn.attention(q, k, v, bias=torch.ones(7, 10)), ValueError, r"bias .*\(1, 1, 7, 10\)"),
    (
        lambda q, k, v: fastattn.attention(q, k, v, bias=torch.ones(1, 1, 1, 7, 11)),
        ValueError,
        "bias must be broadcast",
    ),
    (lambda q, k, v: fastattn.attention(q, k, v, bias=torch.ones(7, 11).half()), TypeError, "bias must have the dtype"),
    (lambda q, k, v: fastattn.attention(q, k, v, bias=torch.ones(7, 11).to("meta")), ValueError, "bias must be on"),
    (lambda q, k, v: fastattn.attention(q, k, v, dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (lambda q, k, v: fastattn.attention(q, k, v, dropout_p=-0.1), ValueError, "dropout_p must be in"),
    (lambda q, k, v: fastattn.attention(q, k, v, dropout_p=math.nan), ValueError, "dropout_p must be in"),
    (lambda q, k, v: fastattn.attention(q, k, v, dropout_p="a"), TypeError, "dropout_p must be a number"),
    (lambda q, k, v: fastattn.attention(q, k, v, dropout_p=None), TypeError, "dropout_p must be a number"),
    (lambda q, k, v: fastattn.attention(q, k, v, scale=math.inf), ValueError, "scale must be finite, got inf"),
    (lambda q, k, v: fastattn.attention(q, k, v, scale=math.nan), ValueError, "scale must be finite, got nan"),
    (lambda q, k, v: fastattn.attention(q, k, v, scale="8"), TypeError, "scale must be a number or None"),
    (lambda q, k, v: fastattn.attention(q, k, v, backend="gpu"), ValueError, "backend must be one of 'cuda', .*'gpu'"),
    (lambda q, k, v: fastattn.attention(q, k, v, backend=3), ValueError, "backend must be one of"),
    (lambda q, k, v: fastattn.attention(q, k, v, backend="cuda"), RuntimeError, "backend 'cuda' cannot run"),
    (lambda q, k, v: fastattn.explain(q, k, v, scale=math.inf), ValueError, "scale must be finite"),
    (lambda q, k, v: fastattn.explain(q, k, v, dropout_p=2), ValueError, "dropout_p must be in"),
    (lambda q, k, v: fastattn.explain(q, k, v, bias=torch.ones(3)), ValueError, "bias must be broadcastable"),
    (lambda q, k, v: fastattn.explain(q, k, v, mask=torch.ones(3, 11, dtype=bool)), ValueError, "mask must broadcast"),
    (lambda q, k, v: fastattn.explain(q, k, v, backend="gpu"), ValueError, "backend must be one of"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_refused_with_what_was_seen(case):
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function(*inputs())


LSE = torch.zeros(2, 4, 7)
BAD_WEIGHTS = [
    ({"lse": None}, TypeError, "lse must be a tensor"),
    ({"lse": LSE.double()}, TypeError, "lse must be float32, got torch.float64"),
    ({"lse": LSE[:, :2]}, ValueError, r"lse must have shape \(B, Hq, L\) = \(2, 4, 7\), got \(2, 2, 7\)"),
    ({"lse": LSE.to("meta")}, ValueError, "lse must be on the device of query"),
    ({"lse": LSE, "dropout_p": 0.5}, TypeError, "dropout_seed must be an int64 tensor"),
    ({"lse": LSE, "dropout_p": 0.5, "dropout_seed": 7}, TypeError, "dropout_seed must be an int64 tensor"),
    (
        {"lse": LSE, "dropout_p": 0.5, "dropout_seed": torch.tensor(1, device="meta")},
        ValueError,
        "dropout_seed must be",
    ),
    ({"lse": LSE, "scale": math.nan}, ValueError, "scale must be finite"),
    ({"lse": LSE, "bias": torch.ones(5)}, ValueError, "bias must be broadcastable"),
]


@pytest.mark.parametrize("case", range(len(BAD_WEIGHTS)))
def test_bad_input_of_weights(case):
    arguments, error, message = BAD_WEIGHTS[case]
    query, key, _ = inputs()
    with pytest.raises(error, match=message):
        fastattn.attention_weights(query, key, **arguments)


CU = torch.tensor([0, 5, 12])
BAD_VARLEN = [
    ({"query": torch.zeros(1, 12, 4, 8)}, ValueError, "query must have 3 dimensions"),
    ({"value": 3}, TypeError, "value must be a tensor, got int"),
    ({"cu_seqlens_q": [0, 5, 12]}, TypeError, "cu_seqlens_q must be an int32 or int64 tensor .*got list"),
    ({"cu_seqlens_k": CU.float()}, TypeError, "cu_seqlens_k must be an int32 or int64 tensor .*float32"),
    ({"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q must have shape \(N \+ 1,\)"),
    ({"cu_seqlens_q": CU[:0]}, ValueError, r"cu_seqlens_q must have shape \(N \+ 1,\)"),
    ({"cu_seqlens_k": torch.tensor([0, 12])}, ValueError, "must count the same sequences"),
    ({"cu_seqlens_k": torch.tensor([0, 5, 13])}, ValueError, r"must go from 0 to the number of tokens, 12, .*13\]"),
    ({"cu_seqlens_k": torch.tensor([0, 5, 9])}, ValueError, "must go from 0"),
    ({"cu_seqlens_k": torch.tensor([1, 5, 12])}, ValueError, "must go from 0"),
    ({"cu_seqlens_q": torch.tensor([0, 13, 12])}, ValueError, "without decreasing"),
    ({"cu_seqlens_q": CU.to("meta")}, ValueError, "cu_seqlens_q must be on the device of query"),
    ({"mask": torch.ones(12, 12, dtype=torch.bool)}, TypeError, "mask must be a Mask or None, got Tensor"),
    ({"mask": Mask.key_lengths([3, 4])}, ValueError, "mask must be made of Mask.causal and Mask.window"),
    ({"mask": Mask.causal() & Mask.prefix([3, 4])}, ValueError, "mask must be made of"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be in"),
]


@pytest.mark.parametrize("case", range(len(BAD_VARLEN)))
def test_bad_input_of_varlen(case):
    changed, error, message = BAD_VARLEN[case]
    query, key, value = torch.zeros(12, 4, 8), torch.zeros(12, 2, 8), torch.zeros(12, 2, 5)
    arguments = {"query": query, "key": key, "value": value, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(**{**arguments, **changed})


def test_wrong_lengths_that_nobody_checks_attend_to_nothing(backend):
    # Under torch.compile and on a GPU the values are not looked at. They must not select memory outside the tensors,
    # nor pairs outside every sequence.
    query = torch.randn(6, 2, 8)
    cu = torch.tensor([1, 3, 9])

    def function(query, cu):
        return fastattn.attention_varlen(query, query, query, cu, cu)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = compiled(query, cu)
    assert not out[0].any()
    assert_close(out[1:3], function(query[1:3], torch.tensor([0, 2])))
    out = compiled(query, torch.tensor([0, 2, 4]))
    assert not out[4:].any()


@pytest.mark.parametrize(
    ("shape", "tries"), [((2, 4, 5, 8), 1), ((4, 5, 8), 2), ((2, 2, 4, 5, 8), 2), ((1, 4, 5, 8), 1)]
)
def test_sdpa_does_not_try_the_direct_way_again_in_vain(shape, tries, monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "direct_attention", lambda *arguments: seen.append(arguments))
    query = torch.randn(shape)
    out = fastattn.scaled_dot_product_attention(query, query, query)
    assert len(seen) == tries
    assert_close(out, F.scaled_dot_product_attention(query, query, query))


BAD_SDPA = [
    ((torch.zeros(8), torch.zeros(3, 8), torch.zeros(3, 8)), {}, ValueError, "query must have at least 2 dimensions"),
    ((torch.zeros(2, 8), 1, torch.zeros(3, 8)), {}, TypeError, "key must be a tensor"),
    ((torch.zeros(3, 2, 8), torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)), {}, ValueError, "must broadcast"),
    ((torch.zeros(2, 8),) * 3, {"attn_mask": [1]}, TypeError, "attn_mask must be a bool or float tensor"),
    ((torch.zeros(2, 8),) * 3, {"attn_mask": torch.ones(3, 2, 2)}, ValueError, "attn_mask must broadcast"),
    (
        (torch.zeros(5, 3, 2, 2, 8),) * 3,
        {"attn_mask": torch.ones(4, 3, 2, 2, 2)},
        ValueError,
        "attn_mask must broadcast",
    ),
    ((torch.zeros(2, 8),) * 3, {"enable_gqa": True}, ValueError, "at least 3 dimensions with enable_gqa"),
]


@pytest.mark.parametrize("case", range(len(BAD_SDPA)))
def test_bad_input_of_sdpa(case):
    tensors, options, error, message = BAD_SDPA[case]
    with pytest.raises(error, match=message):
        fastattn.scaled_dot_product_attention(*tensors, **options)


def test_sdpa_takes_a_mask_or_the_causal_flag():
    tensors = [torch.zeros(1, 1, 2, 8)] * 3
    with pytest.raises(RuntimeError, match="attn_mask must be None when is_causal is set"):
        fastattn.scaled_dot_product_attention(*tensors, attn_mask=torch.ones(2, 2, dtype=torch.bool), is_causal=True)


def test_bad_input_of_the_packed_form():
    options = {"mask": None, "bias": None, "dropout_p": 0.0, "scale": None, "dropout_seed": None, "backend": None}
    with pytest.raises(ValueError, match=r"qkv must have shape \(B, L, 3, H, D\), got \(2, 7, 2, 4, 8\)"):
        _attention_packed(torch.zeros(2, 7, 2, 4, 8), **options)
    with pytest.raises(TypeError, match="qkv must be a tensor"):
        _attention_packed(None, **options)
    with pytest.raises(TypeError, match="query must be float32"):
        _attention_packed(torch.zeros(2, 7, 3, 4, 8, dtype=torch.int64), **options)


# Direct calls --------------------------------------------------------------------------------------------------------
# Plain CPU tensors go to the CPU kernel in one call, past the operator, where nobody would notice.

NATIVE = pytest.mark.skipif(dispatch.NATIVE_FAILURE is not None, reason="the native library is not there")


@pytest.fixture
def direct(monkeypatch):
    """Lists what went to the kernels directly: "forward", "backward", and with "not " what did not fit there."""
    library, calls = dispatch.load("cpu"), []

    def count(name, label):
        original = getattr(library, name)

        def counted(*arguments):
            result = original(*arguments)
            calls.append(label if result is not None else f"not {label}")
            return result

        monkeypatch.setattr(library, name, counted, raising=False)

    count("attention_direct", "forward")
    count("attention_backward_direct", "backward")
    return calls


def packed_views(B, H, L, D, dtype):
    return torch.randn(B, L, 3, H, D).to(dtype).permute(2, 0, 3, 1, 4).unbind()


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_direct_calls_give_the_numbers_and_the_layout_of_the_operator(dtype, direct):
    def some(*shape):
        return torch.randn(shape).to(dtype)

    problems = [
        (some(1, 1, 1, 1), some(1, 1, 1, 1), some(1, 1, 1, 1)),
        (some(2, 6, 17, 40), some(2, 3, 70, 40), some(2, 3, 70, 24)),
        (some(1, 8, 1, 64), some(1, 2, 130, 64), some(1, 2, 130, 64)),
        packed_views(2, 3, 50, 16, dtype),
        tuple(x.expand(2, 4, 9, 8) for x in (some(1, 1, 9, 8), some(2, 1, 9, 8), some(1, 4, 1, 8))),
        (some(1, 1, 2, 300), some(1, 1, 3, 300), some(1, 1, 3, 300)),
        (some(1, 64, 1, 256), some(1, 1, 2049, 256), some(1, 1, 2049, 256)),  # much to merge
    ]
    for tensors in problems:
        for scale in (None, 0.3):
            out, lse = fastattn.attention(*tensors, scale=scale, return_lse=True)
            with FlopCounterMode(display=False):  # a mode that sees operators
                expected, expected_lse = fastattn.attention(*tensors, scale=scale, return_lse=True)
            assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
            assert out.stride() == expected.stride() and lse.dtype == torch.float32
            assert torch.equal(fastattn.attention(*tensors, scale=scale), expected)
    assert direct == ["forward"] * 28


def options_of_direct_calls(B=2, H=6, L=50, S=70):
    """What may be given beside query, key and value of these sizes."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(B, S, generator=generator) < 0.7
    dense = torch.rand(B, H, L, S, generator=generator) < 0.5
    ids = [torch.randint(3, (B, n), generator=generator) for n in (L, S)]
    lengths = torch.tensor([S - 9, 0])
    for align in ("top_left", "bottom_right"):
        yield f"causal {align}", dict(mask=Mask.causal(align))
        yield f"window {align}", dict(mask=Mask.window(7, 3, align))
    yield "causal & window", dict(mask=Mask.causal("bottom_right") & Mask.window(9, None))
    yield "prefix", dict(mask=Mask.prefix(lengths))
    yield "lengths", dict(mask=Mask.key_lengths(lengths.int()))
    yield "one length", dict(mask=Mask.key_lengths([S - 3]))
    yield "padding", dict(mask=Mask.key_padding(keep) & Mask.causal())
    yield "padding of every other key", dict(mask=Mask.key_padding(torch.ones(B, 2 * S, dtype=torch.bool)[:, ::2]))
    yield "segments", dict(mask=Mask.segments(*ids))
    yield "dense mask", dict(mask=Mask.dense(dense) & Mask.key_lengths(lengths))
    for name, tensor in {
        "dense": dense,
        "of heads": dense[:1],
        "of batches": dense[:, :1],
        "(L, S)": dense[0, 0],
        "(H, 1, S)": dense[0, :, :1],
        "keys": keep[:, None, None],
        "(S,)": keep[0],
        "(L, 1)": dense[0, 0, :, :1],
        "()": dense[0, 0, 0, 0],
        "strided": dense.transpose(0, 3).contiguous().transpose(0, 3),
        "expanded": keep[:, None, None].expand(B, H, L, S),
        "rows": dense[:, :1].expand(B, H, L, S),
    }.items():
        yield f"bool {name}", dict(mask=tensor)
    for shape in ((B, H, L, S), (1, H, L, S), (L, S), (B, 1, 1, S), (1,), (H, 1, 1)):
        yield f"bias {shape}", dict(bias=torch.randn(shape, generator=generator))
    yield "all", dict(mask=dense[:, :1], bias=torch.randn(L, S, generator=generator), dropout_p=0.3)
    yield "dropout", dict(dropout_p=0.4)


DIRECT_OPTIONS = dict(options_of_direct_calls())


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DIRECT_OPTIONS)
def test_direct_calls_take_masks_bias_and_dropout_as_the_operator_does(name, dtype, direct, poisoned):
    options = DIRECT_OPTIONS[name]
    query = torch.randn(2, 6, 50, 16).to(dtype)
    key, value = torch.randn(2, 3, 70, 16).to(dtype), torch.randn(2, 3, 70, 24).to(dtype)
    torch.manual_seed(3)
    out, lse = fastattn.attention(query, key, value, **options, return_lse=True)
    assert direct == ["forward"]
    with FlopCounterMode(display=False):
        torch.manual_seed(3)
        expected, expected_lse = fastattn.attention(query, key, value, **options, return_lse=True)
    assert direct == ["forward"]
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@NATIVE
@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("name", [None, *DIRECT_OPTIONS])
def test_direct_gradients_are_those_of_the_operator(name, of_lse, direct, poisoned):
    options = dict(DIRECT_OPTIONS.get(name, {}))
    inputs = [torch.randn(2, 6, 50, 16), torch.randn(2, 3, 70, 16), torch.randn(2, 3, 70, 24)]
    inputs += [options.pop("bias")] if "bias" in options else []
    upstream = torch.randn(2, 6, 50, 24), torch.randn(2, 6, 50)

    def gradients():
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_() for x in inputs]
        bias = leaves[3] if len(leaves) > 3 else None
        out, lse = fastattn.attention(*leaves[:3], bias=bias, **options, return_lse=True)
        return out, *torch.autograd.grad((out, lse) if of_lse else out, leaves, upstream if of_lse else upstream[0])

    found = gradients()
    assert direct == ["forward", "backward"]
    with FlopCounterMode(display=False):
        expected = gradients()
    assert direct == ["forward", "backward"]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert [x.stride() for x in found] == [x.stride() for x in expected]


@NATIVE
@pytest.mark.parametrize("name", ["causal top_left", "lengths", "bool (L, S)", "bias (6, 1, 1)", "all"])
def test_packed_direct_calls_are_those_of_the_operator(name, direct, poisoned):
    options = {
        k: x[..., :50] if isinstance(x, torch.Tensor) and x.shape[-1:] == (70,) else x
        for k, x in DIRECT_OPTIONS[name].items()
    }
    inputs = [torch.randn(2, 50, 3, 6, 16)] + ([options.pop("bias")] if "bias" in options else [])
    options = dict(mask=None, dropout_p=0.0, scale=None, backend=None) | options

    def run():
        leaves = [x.clone().requires_grad_() for x in inputs]
        arguments = options | dict(dropout_seed=torch.tensor(5), bias=leaves[1] if len(leaves) > 1 else None)
        out, lse = _attention_packed(leaves[0], **arguments)
        first = torch.autograd.grad(out.sum() + lse.clamp(-9, 9).sum(), leaves, retain_graph=True)
        again = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(again[0].square().sum(), leaves)
        with torch.no_grad():
            alone, _ = _attention_packed(leaves[0], **arguments, need_lse=False)
        return out, lse, *first, *again, *second, alone

    found = run()
    assert direct == ["forward", "backward", "backward", "forward"]
    with FlopCounterMode(display=False):
        expected = run()
    assert len(direct) == 4 and all(map(torch.equal, found, expected))
    assert [x.stride() for x in found] == [x.stride() for x in expected]


@NATIVE
def test_only_the_gradients_that_are_needed_come(direct):
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    key.requires_grad_()
    bias = torch.randn(9, 9, requires_grad=True)
    out, lse = fastattn.attention(query, key, value, bias=bias, return_lse=True)
    assert out.requires_grad and lse.requires_grad
    assert torch.autograd.grad(lse.sum(), bias, retain_graph=True)[0].shape == bias.shape
    out.sum().backward()
    assert query.grad is None and value.grad is None and key.grad is not None and bias.grad.shape == bias.shape
    assert direct == ["forward", "backward", "backward"]
    with torch.no_grad():
        assert not fastattn.attention(query, key, value, bias=bias).requires_grad


@NATIVE
@pytest.mark.parametrize("name", ["causal top_left", "lengths", "bool (L, S)", "bool expanded", "bias (50, 70)", "all"])
def test_direct_gradients_can_be_differentiated_again(name, direct):
    """As the operators' own, which make them then, to the last bit."""
    options = dict(DIRECT_OPTIONS[name])
    inputs = [torch.randn(2, 6, 50, 8), torch.randn(2, 3, 70, 8), torch.randn(2, 3, 70, 8)]
    inputs += [options.pop("bias")] if "bias" in options else []

    def second():
        torch.manual_seed(3)
        leaves = [x.double().requires_grad_() for x in inputs]
        bias = leaves[3] if len(leaves) > 3 else None
        out = fastattn.attention(*leaves[:3], bias=bias, **options)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    found = second()
    assert direct == ["forward", "backward"]  # the latter along the way from the first gradient's own derivative
    with FlopCounterMode(display=False):
        expected = second()
    assert len(direct) == 2
    assert all(map(torch.equal, found, expected))


@NATIVE
def test_graphs_of_direct_calls_behave_as_any(direct):
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    seen = []
    x.register_hook(lambda gradient: seen.append("x"))
    out = fastattn.attention(x, x, x)
    out.register_hook(lambda gradient: 2 * gradient)
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(first, again) and seen == ["x", "x"]
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), x)
    plain = fastattn.attention(x, x, x)
    assert torch.equal(2 * torch.autograd.grad(plain.sum(), x)[0], first)
    scaled = x * 1.0
    out = fastattn.attention(scaled, x, x)
    scaled.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.numpy(force=True), torch.from_numpy):
        out = fastattn.attention(x, x, x)
    assert len(packed) == 5 and torch.equal(torch.autograd.grad(out.sum(), x)[0], first / 2)
    assert set(direct) == {"forward", "backward"}


@NATIVE
@pytest.mark.parametrize("shape", [(9, 9), (1, 1, 1, 9), (1, 2, 200, 200)])
def test_a_mask_changed_after_the_call_does_not_change_the_gradient(shape, direct):
    x = torch.randn(1, 2, shape[-1], 8, requires_grad=True)
    keep = torch.rand(shape) < 0.5
    (expected,) = torch.autograd.grad(fastattn.attention(x, x, x, mask=keep.clone()).square().sum(), x)
    out = fastattn.attention(x, x, x, mask=keep)
    keep.fill_(True)
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], expected)
    assert direct == ["forward", "backward"] * 2


class Doubled(torch.Tensor):
    """A tensor that means more than its memory."""


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class FunctionWatcher(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@NATIVE
@pytest.mark.parametrize(
    "context",
    [
        Watcher,
        FunctionWatcher,
        FakeTensorMode,
        lambda: torch.autocast("cpu"),
        lambda: fastattn.use_backend("reference"),
        torch.autograd.profiler.profile,
        torch.autograd.forward_ad.dual_level,
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_whoever_watches_sees_operators(context, requires_grad, direct):
    with context():
        x = torch.randn(1, 2, 9, 8, requires_grad=requires_grad)
        out = fastattn.attention(x, x, x, mask=Mask.causal())
        if requires_grad:
            out.sum().backward()
            assert x.grad is not None
    assert direct == []


@NATIVE
def test_transforms_and_tracers_see_operators(direct):
    x = torch.randn(3, 1, 2, 9, 8)
    torch.func.vmap(fastattn.attention)(x, x, x)
    torch.func.grad(lambda y: fastattn.attention(y, y, y).sum())(x[0])
    torch.jit.trace(lambda y: fastattn.attention(y, y, y), x[0], check_trace=False)
    make_fx(lambda y: fastattn.attention(y, y, y))(x[0])
    torch.compile(lambda y: fastattn.attention(y, y, y, mask=Mask.causal()), backend="eager", fullgraph=True)(x[0])
    fastattn.attention(*[x[0].as_subclass(Doubled)] * 3)
    fastattn.attention(x[0], x[0], x[0], mask=torch.ones(9, 9, dtype=torch.bool).as_subclass(Doubled))
    fastattn.attention(x[0], x[0], x[0], bias=torch.ones(9, 9).as_subclass(Doubled))
    assert direct == []
    x = x[0].requires_grad_()
    out = fastattn.attention(x, x, x)
    assert direct == ["forward"]
    with Watcher():
        torch.autograd.grad(out.sum(), x, retain_graph=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert counter.get_total_flops() > 0
    torch.autograd.grad(out, x, torch.ones(2, *out.shape), is_grads_batched=True, retain_graph=True)
    assert "backward" not in direct
    torch.autograd.grad(out.sum(), x)
    assert direct[-1] == "backward"


@NATIVE
def test_what_does_not_fit_takes_the_way_of_every_problem(direct):
    x = torch.randn(1, 2, 9, 8)
    transposed = torch.randn(1, 2, 8, 9).transpose(2, 3)  # its last dimension is not contiguous
    fastattn.attention(transposed, x, x)
    fastattn.attention(x[:, :, :0], x, x)
    fastattn.attention(x, x[:, :, :0], x[:, :, :0])
    fastattn.attention(torch.randn(1, 1, 2, 600), torch.randn(1, 1, 2, 600), torch.randn(1, 1, 2, 600))
    assert direct == ["not forward"] * 4
    for backend in ("reference", "cpu"):
        fastattn.attention(x, x, x, backend=backend)
        with fastattn.use_backend(backend):
            fastattn.attention(x, x, x)
    assert len(direct) == 4


@NATIVE
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "change,error",
    [
        (dict(query=torch.randn(1, 3, 9, 8)), ValueError),
        (dict(key=torch.randn(2, 2, 9, 8)), ValueError),
        (dict(value=torch.randn(1, 2, 8, 8)), ValueError),
        (dict(query=torch.randn(1, 2, 9, 7)), ValueError),
        (dict(query=torch.randn(2, 9, 8)), ValueError),
        (dict(value=torch.randn(9, 8)), ValueError),
        (dict(value=torch.randn(1, 2, 9, 8, dtype=torch.float64)), TypeError),
        (dict(query=torch.ones(1, 2, 9, 8, dtype=torch.int64)), TypeError),
        (dict(query="query"), TypeError),
        (dict(scale=float("inf")), ValueError),
        (dict(scale=True), TypeError),
        (dict(dropout_p=False), TypeError),
        (dict(dropout_p=1.0), ValueError),
        (dict(mask=torch.ones(9, 8, dtype=torch.bool)), ValueError),
        (dict(mask=torch.ones(8, 1).bool().expand(8, 9)), ValueError),
        (dict(mask=torch.ones(1, 1, 1, 9, 9, dtype=torch.bool)), ValueError),
        (dict(mask=torch.ones(9, 9)), TypeError),
        (dict(mask=[[True]]), TypeError),
        (dict(mask=(None,) * 7), TypeError),
        (dict(mask=Mask.key_lengths([1, 2])), ValueError),
        (dict(mask=Mask.key_padding(torch.ones(1, 8, dtype=torch.bool))), ValueError),
        (dict(bias=torch.randn(9, 8)), ValueError),
        (dict(bias=torch.randn(1, 1, 1, 9, 9)), ValueError),
        (dict(bias=torch.randn(9, 9, dtype=torch.float16)), TypeError),
        (dict(bias=1.0), TypeError),
        (dict(backend="gpu"), ValueError),
    ],
)
def test_bad_direct_calls_are_refused_as_any(change, error, requires_grad):
    x = torch.randn(1, 2, 9, 8, requires_grad=requires_grad)
    with pytest.raises(error, match="|".join(name for name in change)):
        fastattn.attention(**(dict(query=x, key=x, value=x) | change))


@pytest.mark.parametrize("name", [None, "cpu", "reference"])
def test_bias_that_is_negated_lazily(name):
    query, key, value = inputs()
    bias = torch.randn(2, 4, 7, 11, dtype=torch.complex64).conj().imag
    assert bias.is_neg()
    out = fastattn.attention(query, key, value, bias=bias, backend=name)
    assert torch.equal(out, fastattn.attention(query, key, value, bias=bias.resolve_neg(), backend=name))


def test_query_that_is_negated_lazily():
    query = torch.randn(2, 4, 7, dtype=torch.complex64).conj().imag.unsqueeze(-1)  # only one column has the stride 1
    key, value = torch.randn(2, 4, 11, 1), torch.randn(2, 4, 11, 8)
    assert query.is_neg() and query.stride(-1) == 1
    assert torch.equal(fastattn.attention(query, key, value), fastattn.attention(query.resolve_neg(), key, value))
