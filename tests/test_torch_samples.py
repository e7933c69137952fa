"""Ours on the data that torch tests its own with: ModuleInfo and OpInfo, as they come with torch."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from stock_reference import FusedAttention, disagreements, evaluate, failures
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.testing.oracle import dropout_keep

pytest.importorskip("expecttest", reason="torch's test data needs expecttest")
SEED = 7


def converted(stock):
    ours = copy.deepcopy(stock)
    ours.__class__ = fastattn.MultiheadAttention
    return ours


def describe(*values):
    def text(value):
        return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)

    return ", ".join(
        f"{name}={text(x)}" for value in values for name, x in value.items() if x is not None and x is not False
    )


def operator(name):
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (info for info in op_db if info.name == name)
    return info


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_module_samples(dtype):
    """Every ModuleInput for nn.MultiheadAttention. Some of their masks leave a query with nothing to attend to."""
    from torch.testing._internal.common_modules import module_db

    (info,) = (info for info in module_db if info.module_cls is nn.MultiheadAttention)
    assert info.module_error_inputs_func is None  # else they would belong here
    found, count = [], 0
    for training in (True, False):
        samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
        for sample in samples:
            torch.manual_seed(SEED)
            made = sample.constructor_input
            stock = nn.MultiheadAttention(*made.args, **made.kwargs, dtype=dtype).train(training)
            torch.manual_seed(SEED)
            ours = fastattn.MultiheadAttention(*made.args, **made.kwargs, dtype=dtype).train(training)
            inputs = dict(zip(("query", "key", "value"), sample.forward_input.args, strict=True))
            for message in disagreements(ours, stock, inputs, sample.forward_input.kwargs):
                found.append(f"{describe(made.kwargs, sample.forward_input.kwargs)} {dtype} {training}: {message}")
            count += 1
    assert not found, "\n".join(found)
    assert count >= 128


def as_module(arguments):
    """Torch's module with the parameters of a call of F.multi_head_attention_forward."""
    module = nn.MultiheadAttention(
        arguments["embed_dim_to_check"],
        arguments["num_heads"],
        dropout=arguments["dropout_p"],
        bias=arguments["in_proj_bias"] is not None,
        add_zero_attn=arguments["add_zero_attn"],
        dtype=arguments["query"].dtype,
    ).train(arguments["training"])
    module._qkv_same_embed_dim = not arguments["use_separate_proj_weight"]
    for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        value = arguments[name]
        setattr(module, name, None if value is None else nn.Parameter(value))
    for name in ("bias_k", "bias_v"):
        setattr(module, name, nn.Parameter(arguments[name]))
    module.out_proj.weight = nn.Parameter(arguments["out_proj_weight"])
    module.out_proj.bias = nn.Parameter(arguments["out_proj_bias"])
    return module


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.bfloat16))],
    ids=str,
)
def test_multi_head_attention_forward_samples(dtype):
    """Every sample, by a module with its parameters. With dropout, torch's module drops what ours drops."""
    info = operator("nn.functional.multi_head_attention_forward")
    assert info.error_inputs_func is None  # else they would belong here
    signature = inspect.signature(F.multi_head_attention_forward)
    found, count = [], 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
        bound = signature.bind(sample.input, *sample.args, **sample.kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        assert arguments["static_k"] is None and arguments["static_v"] is None  # which a module has no place for
        stock = as_module(arguments)
        inputs = {name: arguments[name] for name in ("query", "key", "value")}
        names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        options = {name: arguments[name] for name in names}
        if arguments["dropout_p"] == 0:  # that the module is that call
            expected = F.multi_head_attention_forward(*bound.args, **bound.kwargs)
            torch.testing.assert_close(stock(*inputs.values(), **options), expected, rtol=0, atol=0)
        for message in disagreements(converted(stock), stock, inputs, options, dropout_seed=SEED):
            found.append(f"{describe(arguments)}: {message}")
        count += 1
    assert not found, "\n".join(found)
    assert count >= 192


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scaled_dot_product_attention_samples(dtype):
    """Every sample. With dropout the answer drops what ours drops, and its formula in that dtype is the peer."""
    info = operator("nn.functional.scaled_dot_product_attention")
    assert info.error_inputs_func is None  # else they would belong here
    found, count = [], 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
        leaves = dict(zip(("query", "key", "value"), (sample.input, *sample.args), strict=True))
        options = dict(sample.kwargs)
        if options.get("attn_mask") is not None:
            leaves["attn_mask"] = options.pop("attn_mask")
        dropout_p = options.pop("dropout_p")
        keep = None
        if dropout_p > 0:
            lead = torch.broadcast_shapes(leaves["query"].shape[:-2], leaves["key"].shape[:-2])
            torch.manual_seed(SEED)
            seed = int(torch.randint(2**63 - 1, ()))
            sizes = ((1, 1, *lead)[-2:], leaves["query"].shape[-2], leaves["key"].shape[-2])
            keep = dropout_keep(*sizes[0], *sizes[1:], dropout_p, seed).view(*lead, *sizes[1:])

        def ours(leaves, options=options, dropout_p=dropout_p):
            torch.manual_seed(SEED)
            return {"out": fastattn.scaled_dot_product_attention(**leaves, **options, dropout_p=dropout_p)}

        def formula(leaves, options=options, dropout_p=dropout_p, keep=keep):
            return {"out": fused(**leaves, **options, dropout_p=dropout_p, keep=keep)}

        def peer(leaves, options=options):
            return {"out": F.scaled_dot_product_attention(**leaves, **options)}

        doubled = {name: leaf.double() for name, leaf in leaves.items()}
        expected = evaluate(formula, doubled, dtype)
        if dropout_p == 0:  # that the formula is torch's
            with sdpa_kernel(SDPBackend.MATH):
                torch.testing.assert_close(evaluate(peer, doubled, dtype), expected, rtol=1e-9, atol=1e-9)
        theirs = evaluate(formula if dropout_p > 0 else peer, leaves, dtype)
        for message in failures(evaluate(ours, leaves, dtype), theirs, expected, formula, doubled, dtype):
            found.append(f"{describe(leaves, options)}, dropout_p={dropout_p}: {message}")
        count += 1
    assert not found, "\n".join(found)
    assert count >= 25


@pytest.mark.parametrize(
    "change, error",
    [
        ({"key": (2, 5, 8)}, ValueError),
        ({"value": (2, 5, 4)}, ValueError),
        ({"key": (3, 6, 4)}, ValueError),
        ({"attn_mask": (3, 5)}, ValueError),
        ({"dropout_p": 1.5}, ValueError),
        ({"dtype": torch.float64}, TypeError),
    ],
)
def test_scaled_dot_product_attention_names_what_does_not_fit(change, error):
    """Torch raises a RuntimeError for each of them: a row of the README's table of differences."""
    shapes = {"query": (2, 3, 4), "key": (2, 6, 4), "value": (2, 6, 4)} | change
    arguments = {name: torch.randn(shape) for name, shape in shapes.items() if isinstance(shape, tuple)}
    if "dtype" in change:
        arguments["value"] = arguments["value"].to(change["dtype"])
    if "dropout_p" in change:
        arguments["dropout_p"] = change["dropout_p"]
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(**arguments)
    with pytest.raises(error, match=next(iter(change)).replace("dtype", "value")):
        fastattn.scaled_dot_product_attention(**arguments)


def fused(query, key, value, attn_mask=None, is_causal=False, dropout_p=0.0, keep=None):
    bias = attn_mask
    if is_causal:
        future = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
        bias = torch.zeros(future.shape, dtype=query.dtype).masked_fill(future, float("-inf"))
    dropped = None if keep is None else keep.to(query.dtype) / (1 - dropout_p)
    return FusedAttention.apply(query, key, value, bias, dropped, query.shape[-1] ** -0.5)
