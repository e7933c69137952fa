"""torch.compile over the Triton backend: one graph, the operators in it, the same bits as without."""

import pytest
import torch

import fastattn
from fastattn import Mask


def attend(query, key, value, bias, keep, lengths):
    mask = Mask.causal("bottom_right") & Mask.dense(keep) & Mask.key_lengths(lengths)
    options = dict(mask=mask, bias=bias, backend="triton")
    out, lse = fastattn.attention(query, key, value, dropout_p=0.2, return_lse=True, **options)
    return out, lse, fastattn.attention_weights(query, key, lse, **options)


@pytest.mark.parametrize("length", [20, pytest.param(270, marks=pytest.mark.slow)], ids=["short", "long"])
def test_attention_in_one_graph(length):
    tensors = [torch.randn(1, heads, length, 16, requires_grad=True) for heads in (2, 1, 1)]
    tensors.append(torch.randn(2, 1, length, requires_grad=True))
    keep, lengths = torch.rand(length, length) < 0.8, torch.tensor([length - 3])
    graphs = []

    def inspect(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch.compile(attend, fullgraph=True, backend=inspect)(*tensors, keep, lengths)
    assert {f"fastattn.{name}" for name in ("mask_tiles", "attention", "attention_weights")} <= {
        name.removesuffix(".default") for name in graphs[0]
    }
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        outs = function(*tensors, keep, lengths)
        results.append((*outs, *torch.autograd.grad(sum(x.sum() for x in outs), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_loss_in_one_graph():
    def loss(input, target, mask):
        return fastattn.masked_l1_loss(input, target, mask, patch_size=4, normalize_target=True, backend="triton")

    input, target = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    mask = torch.rand(2, 2, 2) < 0.5
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(input, target, mask)
        results.append((value, *torch.autograd.grad(value, input)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
