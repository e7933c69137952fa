"""The gradient of a bias on the CPU: tiles written past the caches, rows asked for ahead, memory in huge pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import native

# Whole tiles with rows of whole cache lines, which go past the caches; ragged ones, and one whose rows start anywhere.
SIZES = [(96, 320), (101, 330), (48, 65)]


def gradients(tensors: list[Tensor], grad: Tensor, backend: str, **options: object) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in tensors]
    query, key, value, bias = inputs
    out = fastattn.attention(query, key, value, bias=bias, backend=backend, **options)
    return list(torch.autograd.grad(out, inputs, grad))


def problem(shape: tuple[int, ...], len_q: int, len_k: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    query, grad = torch.randn(2, 2, 2, len_q, 32)
    key, value = torch.randn(2, 2, 2, len_k, 32)
    return [query, key, value, torch.randn(*shape, len_q, len_k)], grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize(("len_q", "len_k"), SIZES)
def test_gradient_of_whole_tiles(len_q: int, len_k: int, shape: tuple[int, int], causal: bool) -> None:
    tensors, grad = problem(shape, len_q, len_k)
    mask = fastattn.Mask.causal() if causal else None
    got = gradients(tensors, grad, "cpu", mask=mask)
    want = gradients([x.double() for x in tensors], grad.double(), "reference", mask=mask)
    for name, ours, exact in zip(("query", "key", "value", "bias"), got, want, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=5e-6), name
    again = gradients(tensors, grad, "cpu", mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_huge_pages_are_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, grad = problem((2, 2), 96, 320)
    small = gradients(tensors, grad, "cpu")
    advised = []
    library = native.library("cpu")
    advise = library._module.advise_huge_pages
    monkeypatch.setattr(native, "_MAPPED_BYTES", 1)
    prepare = library._prepare_output
    monkeypatch.setattr(library, "_prepare_output", lambda x: advised.append(x) or prepare(x))
    advise(tensors[3].data_ptr(), tensors[3].nbytes)  # what lies there stays
    large = gradients(tensors, grad, "cpu")
    assert len(advised) == 1 and advised[0].shape == tensors[3].shape
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))
