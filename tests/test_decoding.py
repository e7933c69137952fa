"""Few queries against many keys: kernels share the keys out and merge the parts."""

import os

import pytest
import torch
from torch.testing import assert_close

import fastattn
from fastattn import Mask
from fastattn.testing import Case, TermSpec, check_attention, same_bits
from fastattn.testing.adapters import TENSOR_CORE_BACKENDS, own_target
from fastattn.testing.checks import FAIL

KERNELS = [name for name in os.environ.get("FASTATTN_TEST_BACKENDS", "cpu").split(",") if name != "reference"]
PART = 512  # keys of a part on the CPU


@pytest.fixture(params=KERNELS)
def kernels(request):
    with fastattn.use_backend(request.param):
        yield request.param


def cache(B, Hq, Hkv, L, S, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, D)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "case",
    [
        dict(heads_q=4, heads_kv=1, len_q=1, len_k=1300, dim_qk=64, dim_v=64),
        dict(heads_q=4, heads_kv=4, len_q=1, len_k=1030, dim_qk=40, dim_v=24, layout="blhd"),
        dict(batch=3, heads_q=8, heads_kv=2, len_q=2, len_k=1025, terms=(TermSpec("key_lengths"),), layout="packed"),
        dict(
            heads_q=6,
            heads_kv=2,
            len_q=8,
            len_k=1100,
            terms=(TermSpec("causal", "bottom_right"),),
            bias_shape=(6, 1, 1100),
        ),
        dict(
            heads_q=2,
            heads_kv=1,
            len_q=4,
            len_k=2000,
            terms=(TermSpec("window", "bottom_right", 700, 0),),
            lse_grad=True,
        ),
        dict(
            batch=2,
            heads_q=4,
            heads_kv=2,
            len_q=3,
            len_k=777,
            terms=(TermSpec("dense", shape=(1, 4, 3, 777), pattern="empty_rows"),),
        ),
        dict(
            batch=2,
            heads_q=2,
            heads_kv=1,
            len_q=5,
            len_k=1200,
            terms=(TermSpec("key_padding"), TermSpec("segments")),
            dropout_p=0.3,
        ),
        dict(
            heads_q=2,
            heads_kv=1,
            len_q=1,
            len_k=700,
            dim_qk=256,
            dim_v=128,
            dtype=torch.bfloat16,
            terms=(TermSpec("key_lengths"),),
        ),
        dict(
            heads_q=16, heads_kv=1, len_q=7, len_k=600, dim_qk=128, dim_v=64, dtype=torch.float16, bias_shape=(7, 600)
        ),
        dict(
            heads_q=3,
            heads_kv=1,
            len_q=2,
            len_k=1111,
            dtype=torch.float64,
            terms=(TermSpec("prefix"),),
            layout="expanded",
            batch=2,
        ),
        dict(heads_q=2, heads_kv=2, len_q=4, len_k=40, dim_qk=80, dim_v=80, terms=(TermSpec("causal"),)),
    ],
    ids=lambda case: str(Case(0, 0, **case)),
)
def test_matches_the_definition(case, kernels):
    """Values and gradients against float64; empty rows, leaks from dead keys, poisoned memory, two runs."""
    if case.get("dtype") == torch.float64 and kernels in TENSOR_CORE_BACKENDS:
        pytest.skip(f"the {kernels} backend has no float64 kernels")
    checks = check_attention(own_target(kernels), Case(seed=11, index=3, **case))
    failed = [f"{check.name}: {check.detail}" for check in checks if check.status == FAIL]
    assert not failed, "\n".join(failed)


def test_a_long_cache():
    checks = check_attention(own_target("cpu"), Case(0, 0, heads_q=2, len_k=32768, len_q=1, dim_qk=32, dim_v=32))
    assert not [check for check in checks if check.status == FAIL]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    query, key, value = cache(3, 8, 2, 2, 1700, 64, dtype)
    mask = Mask.key_lengths(torch.tensor([1700, 0, 900]))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastattn.attention(query, key, value, mask=mask, return_lse=True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert same_bits(out, results[0][0]) and same_bits(lse, results[0][1])


def test_the_rest_of_the_batch_does_not_change_a_bit():
    query, key, value = cache(4, 4, 2, 1, 1500, 64)
    lengths = torch.tensor([3, 1500, 0, 1200])
    together = fastattn.attention(query, key, value, mask=Mask.key_lengths(lengths), backend="cpu")
    for b, length in enumerate(lengths.tolist()):
        alone = fastattn.attention(
            query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length], backend="cpu"
        )
        assert same_bits(alone, together[b : b + 1])


def test_a_growing_cache_gives_the_rows_of_causal_attention(kernels):
    steps = [*range(1, 8), *range(60, 68), *range(PART - 3, PART + 4), *range(2 * PART - 1, 2 * PART + 3)]
    query, key, value = cache(2, 4, 2, steps[-1], steps[-1], 40)
    whole, whole_lse = fastattn.attention(query, key, value, mask=Mask.causal(), return_lse=True)
    for S in steps if kernels == "cpu" else steps[-3:]:
        keys, values = key[:, :, :S], value[:, :, :S]  # in place, as a cache of a fixed size is read
        out, lse = fastattn.attention(query[:, :, S - 1 : S], keys, values, return_lse=True)
        assert_close(out, whole[:, :, S - 1 : S], atol=2e-6, rtol=1e-5)
        assert_close(lse, whole_lse[:, :, S - 1 : S], atol=2e-6, rtol=1e-6)
    # Several new tokens at once.
    for new in (2, 5, 8):
        out = fastattn.attention(query[:, :, -new:], key, value, mask=Mask.causal(align="bottom_right"))
        assert_close(out, whole[:, :, -new:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("L", [1, 4, 8, 50])
def test_large_scores_are_the_same_in_forward_and_backward(L):
    """One key holds all of the probability, and lse is its score, of some 1e6. The backward finds a probability of 1
    only when it computes the score to the last bit as the forward did. L = 50 leaves 2 rows to the forward's last tile.
    """
    query, key, value = cache(1, 2, 1, L, 3, 200)
    query, key, value = (x.requires_grad_() for x in (query * 1e3, key * 1e3, value))
    mask = Mask.key_lengths(torch.tensor([1]))
    out, lse = fastattn.attention(query, key, value, mask=mask, return_lse=True, backend="cpu")
    assert lse.abs().max() > 1e4
    grad_out = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(1)).float()
    out.backward(grad_out)
    assert torch.equal(value.grad[:, :, :1], grad_out.sum((1, 2), keepdim=True))
    assert torch.equal(value.grad[:, :, 1:], torch.zeros(1, 1, 2, 200))
