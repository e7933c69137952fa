"""What `fastattn.testing.triton_interpreter` repairs and adds."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty))


@triton.jit
def add_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(a_ptr + at) + tl.load(b_ptr + at))


@triton.jit
def accumulate_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(out_ptr) + tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def sum_kernel(x_ptr, count_ptr, out_ptr):
    total = 0.0
    for i in range(0, tl.load(count_ptr)):
        total += tl.load(x_ptr + i)
    tl.store(out_ptr, total)


def test_bfloat16_products_and_casts():
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, out, SIZE=16)
    expected = a.double() @ b.double()
    # One rounding to nearest: half a unit, of 8 significant bits.
    assert ((out.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()


def test_bfloat16_arithmetic_rounds_to_nearest_even():
    a, b = torch.randn(2, 64).bfloat16()
    b[:3] = torch.tensor([float("inf"), float("nan"), 2.0**-8])
    a[2] = 1.0  # 1 + 2^-8 lies half way: the even neighbour is 1
    out = torch.empty(64, dtype=torch.bfloat16)
    add_kernel[(1,)](a, b, out, SIZE=64)
    torch.testing.assert_close(out, a + b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("short", ["a", "b", "out"])
def test_access_out_of_bounds(short):
    tensors = {name: torch.zeros(100)[: 63 if name == short else 64] for name in ("a", "b", "out")}
    with pytest.raises(Exception, match="out of bounds: a (load|store) of 1 of 64 elements"):
        add_kernel[(1,)](*tensors.values(), SIZE=64)


def test_programs_that_share_an_element():
    with pytest.raises(Exception, match="race: a load by program"):
        accumulate_kernel[(2,)](torch.ones(2), torch.zeros(1))
    out = torch.zeros(1)
    accumulate_kernel[(1,)](torch.ones(1), out)
    assert out.item() == 1


def test_loop_over_a_loaded_count():
    out = torch.zeros(1)
    sum_kernel[(1,)](torch.arange(8.0), torch.tensor([5]), out)
    assert out.item() == 10
