"""The prediction head fused with its loss on the Triton backend, by the harness and against the reference."""

import importlib
from unittest import mock

import pytest
import torch

import fastattn
from fastattn.testing.cases import random_linear_loss_case
from fastattn.testing.checks import FAIL, check_linear_loss

backend = importlib.import_module("fastattn.backends.triton.linear_masked_loss")


# The others are larger.
@pytest.mark.parametrize(
    "index", [pytest.param(n, marks=[] if n in (0, 2, 3, 4) else pytest.mark.slow) for n in range(24)]
)
def test_random_problems(index):
    dtype = (torch.float32, torch.bfloat16, torch.float32, torch.float16)[index % 4]
    checks = check_linear_loss("triton", random_linear_loss_case(7, index, dtype, small=True))
    failed = [f"{check.name}: {check.detail}" for check in checks if check.status == FAIL]
    assert not failed, "\n".join(failed)


def problem(tokens, dim_in, dim_out):
    """hidden, weight, bias, target and the mask; predictions are of the size of the target."""
    torch.manual_seed(6)
    shapes = (2, tokens, dim_in), (dim_out, dim_in), (dim_out,), (2, tokens, dim_out)
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[1] /= dim_in**0.5
    return tensors, torch.rand(2, tokens) < 0.6


def losses(name, *sizes, dtype=torch.float32):
    """Loss and gradients of one problem."""
    tensors, mask = problem(*sizes)
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    loss = fastattn.linear_masked_smooth_l1_loss(*tensors, mask, backend=name)
    return loss.detach(), *torch.autograd.grad(loss, tensors)


def assert_right(*sizes):
    for ours, exact in zip(losses("triton", *sizes), losses("reference", *sizes, dtype=torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def test_blocks_of_tokens():
    # 90 tokens count: the second block holds some of them, the third none.
    with mock.patch.object(backend, "_BLOCK_TOKENS", 64):
        assert_right(75, 20, 33)


def test_splits_end_with_their_block():
    # Three splits of 288 tokens in a block of 832, and more tokens than that count.
    with mock.patch.object(backend, "_BLOCK_TOKENS", 832):
        assert_right(750, 3, 2)


@pytest.mark.slow
def test_splits_of_the_tokens():
    assert_right(400, 40, 70)


def test_each_gradient_alone():
    _, *expected = losses("triton", 9, 8, 12)
    for n in range(4):
        tensors, mask = problem(9, 8, 12)
        tensors[n].requires_grad_()
        fastattn.linear_masked_smooth_l1_loss(*tensors, mask, backend="triton").backward()
        assert torch.equal(tensors[n].grad, expected[n])
