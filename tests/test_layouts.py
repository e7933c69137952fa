"""Tensors that do not lie in memory by strides, or hold codes, get a TypeError that names the argument."""

import warnings

import pytest
import torch

import fastattn
from fastattn import Mask
from fastattn.attention import varlen_attn


def nested(x: torch.Tensor, layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor(list(x), layout=layout)


KINDS = {
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
    "quint8": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
}


def can_be(kind: str, x: torch.Tensor) -> bool:
    if kind in ("mkldnn", "quint8"):
        return x.is_floating_point()
    # A CSR tensor of many matrices needs as many elements in each.
    return kind == "sparse_coo" or (x.dim() > 1 and (kind != "sparse_csr" or x.is_floating_point()))


X, KEEP, LSE = torch.randn(2, 2, 5, 4), torch.rand(2, 2, 5, 5) > 0.5, torch.zeros(2, 2, 5)
ROWS, PACK, CU, WEIGHT = torch.randn(2, 5, 4), torch.randn(5, 2, 4), torch.tensor([0, 2, 5]), torch.randn(3, 4)
COUNTS, IDS = torch.rand(2, 5) > 0.5, torch.randint(0, 2, (2, 5))
INPUTS = {"query": X, "key": X, "value": X}
PACKS = {"query": PACK, "key": PACK, "value": PACK}
CALLS = {
    "attention": (fastattn.attention, INPUTS | {"mask": KEEP, "bias": torch.randn(2, 2, 5, 5)}),
    "of two dimensions": (fastattn.attention, INPUTS | {"mask": KEEP[0, 0], "bias": torch.randn(5, 5)}),
    "attention_varlen": (fastattn.attention_varlen, PACKS | {"cu_seqlens_q": CU, "cu_seqlens_k": CU}),
    "varlen_attn": (lambda **given: varlen_attn(**given, max_q=3, max_k=3), PACKS | {"cu_seq_q": CU, "cu_seq_k": CU}),
    "attention_weights": (fastattn.attention_weights, {"query": X, "key": X, "lse": LSE, "mask": KEEP}),
    "explain": (fastattn.explain, INPUTS | {"mask": KEEP}),
    "sdpa": (fastattn.scaled_dot_product_attention, INPUTS | {"attn_mask": KEEP}),
    "sdpa, 3-D": (fastattn.scaled_dot_product_attention, {"query": X[0], "key": X[0], "value": X[0]}),
    "sdpa, bias": (fastattn.scaled_dot_product_attention, INPUTS | {"attn_mask": torch.randn(5, 5)}),
    "additive_attention": (
        fastattn.additive_attention,
        {"query": ROWS, "key": ROWS, "value": ROWS, "score_weight": torch.randn(4), "mask": torch.rand(2, 5, 5) > 0.5},
    ),
    "masked_mse_loss": (fastattn.masked_mse_loss, {"input": ROWS, "target": ROWS, "mask": COUNTS}),
    "linear_masked_mse_loss": (
        fastattn.linear_masked_mse_loss,
        {"hidden": ROWS, "weight": WEIGHT, "bias": torch.randn(3), "target": torch.randn(2, 5, 3), "mask": COUNTS},
    ),
    "Mask.dense": (Mask.dense, {"keep": KEEP}),
    "Mask.key_padding": (Mask.key_padding, {"keep": COUNTS}),
    "Mask.key_lengths": (Mask.key_lengths, {"lengths": torch.tensor([3, 4])}),
    "Mask.prefix": (Mask.prefix, {"lengths": torch.tensor([3, 4])}),
    "Mask.segments": (Mask.segments, {"query_ids": IDS, "key_ids": IDS}),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("call", "kind"), [(c, k) for c in CALLS for k in KINDS if any(can_be(k, x) for x in CALLS[c][1].values())]
)
def test_other_layouts_are_refused_by_name(call, kind, requires_grad):
    function, arguments = CALLS[call]
    if requires_grad:
        arguments = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in arguments.items()}
    for name in [name for name, x in arguments.items() if can_be(kind, x)]:
        other = KINDS[kind](arguments[name].detach())
        with pytest.raises(TypeError, match=f"^{name} must "):
            function(**{**arguments, name: other})
