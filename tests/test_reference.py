"""The reference backend against published vectors, autograd in float64 and PyTorch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import dispatch
from fastattn.backends import reference
from fastattn.masks import Mask

CPU = torch.device("cpu")
B, HQ, L, S, D, DV = 2, 4, 7, 13, 6, 5
SCALE = 0.3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(Hkv=2, L=L, S=S, dtype=torch.float64, seed=0):
    g = generator(seed)
    shapes = [(B, HQ, L, D), (B, Hkv, S, D), (B, Hkv, S, DV)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def random_bias(*shape):
    return torch.randn(shape, generator=generator(5), dtype=torch.float64)


def random_keep(*shape, p=0.6):
    return torch.rand(shape, generator=generator(3)) < p


MASKS = {
    "none": None,
    "causal": Mask.causal(),
    "bottom_right": Mask.causal("bottom_right"),
    "lengths": Mask.key_lengths([5, -1]),
    "padding_window": Mask.key_padding(random_keep(B, S)) & Mask.window(3, 4, align="bottom_right"),
    "dense": Mask.dense(random_keep(B, HQ, L, S)) & Mask.prefix([4, 9]),
    "segments": Mask.segments(torch.arange(L)[None] // 3, torch.arange(S)[None] // 3),
    "nothing": Mask.key_lengths([0, 0]),
}


def oracle(query, key, value, *, keep, bias=None, dropped_scale=None):
    """Attention under autograd: the textbook formula, and 0 for rows without keys. Returns out, lse, p."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = SCALE * torch.einsum("bhid,bhjd->bhij", query, key)
    if bias is not None:
        scores = scores + bias
    weight = scores.exp() * keep  # small scores: no need to subtract the maximum
    total = weight.sum(-1, keepdim=True)
    p = weight / torch.where(total == 0, 1, total)
    lse = torch.where(total == 0, 1, total).log().squeeze(-1).where(keep.any(-1), -torch.inf)
    if dropped_scale is not None:
        p = p * dropped_scale
    return torch.einsum("bhij,bhjd->bhid", p, value), lse, p


def forms(mask, L=L, S=S):
    if mask is None:
        return None, torch.ones(B, HQ, L, S, dtype=torch.bool)
    return mask.kernel_form(B, HQ, L, S, CPU), mask.to_dense(B, HQ, L, S)


def forward(q, k, v, form, bias=None, p=0.0, seed=None):
    return reference.attention_forward(q, k, v, bias, form, SCALE, p, seed)


def backward(do, dlse, q, k, v, out, lse, form, bias=None, p=0.0, seed=None):
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    dbias = reference.attention_backward(
        do, dlse, q, k, v, out, lse, bias, form, SCALE, p, seed, *grads, bias is not None
    )
    return *grads, dbias


# Dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers_of_random123(counter, key, words):
    as_tensors = tuple(torch.tensor(x) for x in counter), tuple(torch.tensor(x) for x in key)
    assert " ".join(f"{int(word):08x}" for word in reference.philox(*as_tensors)) == words


def philox_word(seed, b, h, i, j):
    """Philox4x32-10 in Python integers, one element at a time."""
    c, k = [j >> 2, i, h, b], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high & 0xFFFFFFFF, low >> 32 ^ c[3] ^ k[1], low & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[j & 3]


@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 2, -7])
def test_philox_keep_is_keyed_by_the_absolute_position(seed):
    p = 0.3
    keep = reference.philox_keep(torch.tensor(seed), p, 2, 3, 4, 7)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, keep.shape)).tolist():
        assert bool(keep[b, h, i, j]) == (philox_word(seed, b, h, i, j) >= math.floor(p * 2**32))


@pytest.mark.parametrize("seed", [0, 2**63 - 2, -7])
def test_philox_keep_is_that_of_the_kernels(seed):
    if dispatch.NATIVE_FAILURE is not None:
        pytest.skip(f"the native library is not there: {dispatch.NATIVE_FAILURE}")
    native = dispatch.load("cpu")
    for p in (0.1, 0.5, 0.999):
        arguments = torch.tensor(seed), p, 2, 3, 21, 67
        assert torch.equal(native.philox_keep(*arguments), reference.philox_keep(*arguments))


def test_philox_keep_does_not_depend_on_the_size_and_has_the_rate_asked_for():
    seed = torch.tensor(99)
    keep = reference.philox_keep(seed, 0.2, 2, 2, 64, 64)
    assert torch.equal(reference.philox_keep(seed, 0.2, 1, 2, 5, 9), keep[:1, :, :5, :9])
    assert abs(float(keep.double().mean()) - 0.8) < 5 * math.sqrt(0.2 * 0.8 / keep.numel())
    assert reference.philox_keep(seed, 0.0, 1, 1, 3, 0).shape == (1, 1, 3, 0)


# Forward


@pytest.mark.parametrize("name", ["none", "causal", "bottom_right", "dense", "segments"])
@pytest.mark.parametrize("Hkv", [4, 2, 1])
def test_forward_is_scaled_dot_product_attention(name, Hkv):
    q, k, v = problem(Hkv)
    form, keep = forms(MASKS[name])
    bias = random_bias(1, HQ, L, S)
    out, lse = forward(q, k, v, form, bias)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.masked_fill(~keep, -torch.inf), scale=SCALE, enable_gqa=True
    )
    live = keep.any(-1)
    torch.testing.assert_close(out[live], expected[live], rtol=0, atol=1e-14)
    assert out[~live].eq(0).all() and lse[~live].eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_dtypes(dtype):
    q, k, v = problem(dtype=dtype)
    out, lse = forward(q, k, v, None)
    assert out.dtype == dtype and out.shape == (B, HQ, L, DV) and out.transpose(1, 2).is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.is_contiguous()
    exact, exact_lse = forward(q.double(), k.double(), v.double(), None)
    # One rounding of the result to its dtype; lse and the sums are in float32.
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = (x.float() for x in problem())
    out, lse = forward(q * 1e4, k, v, None)
    assert out.isfinite().all() and lse.isfinite().all()


# Gradients


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias_shape", [None, (B, HQ, L, S), (1, HQ, 1, S), (B, 1, L, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_autograd(name, bias_shape, dropout_p):
    form, keep = forms(MASKS[name])
    inputs = problem()
    bias = None if bias_shape is None else random_bias(*bias_shape)
    seed = torch.tensor(2**40 + 3)
    dropped = reference.philox_keep(seed, dropout_p, B, HQ, L, S).double() / (1 - dropout_p)
    leaves = [x.clone().requires_grad_() for x in inputs]
    bias_leaf = None if bias is None else bias.clone().requires_grad_()
    expected, expected_lse, p = oracle(*leaves, keep=keep, bias=bias_leaf, dropped_scale=dropped)

    out, lse = forward(*inputs, form, bias, dropout_p, seed)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=0, atol=1e-13)

    do, dlse = random_bias(B, HQ, L, DV), random_bias(B, HQ, L)
    wanted = [*leaves, *([] if bias_leaf is None else [bias_leaf])]
    total = (expected * do).sum() + (expected_lse.where(keep.any(-1), 0) * dlse).sum()
    ours = backward(do, dlse, *inputs, out, lse, form, bias, dropout_p, seed)
    for gradient, autograd in zip(ours, torch.autograd.grad(total, wanted, retain_graph=True), strict=bias is not None):
        assert gradient.shape == autograd.shape and gradient.is_contiguous()
        torch.testing.assert_close(gradient, autograd, rtol=0, atol=1e-12)

    # Weights: lse is a function of the inputs in the oracle, hence its gradient is carried through backward's dlse.
    for average_heads in (True, False):
        weights = reference.attention_weights(*inputs[:2], lse, bias, form, SCALE, average_heads, dropout_p, seed)
        model = p.mean(1) if average_heads else p
        torch.testing.assert_close(weights, model.detach(), rtol=0, atol=1e-13)
        assert weights.is_contiguous()
        dw = random_bias(*weights.shape)
        dq, dk, dbias, dlse_of_weights = reference.attention_weights_backward(
            dw, *inputs[:2], lse, bias, form, SCALE, average_heads, dropout_p, seed, bias is not None
        )
        through = backward(torch.zeros_like(do), dlse_of_weights, *inputs, out, lse, form, bias, dropout_p, seed)
        sums = [dq + through[0], dk + through[1], *([] if dbias is None else [dbias + through[3]])]
        autograd = torch.autograd.grad((model * dw).sum(), [w for w in wanted if w is not leaves[2]], retain_graph=True)
        for gradient, theirs in zip(sums, autograd, strict=True):
            torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_keep_dtype_layout_and_precision(dtype):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem(dtype=dtype))
    bias = random_bias(HQ, 1, S).to(dtype)[None]
    form, _ = forms(MASKS["dense"])
    out, lse = forward(q, k, v, form, bias)
    do = random_bias(B, HQ, L, DV).to(dtype)
    ours = backward(do, None, q, k, v, out, lse, form, bias)
    exact_inputs = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = forward(*exact_inputs, form, bias.double())
    exact = backward(do.double(), None, *exact_inputs, exact_out, exact_lse, form, bias.double())
    for gradient, x, expected in zip(ours, (q, k, v, bias), exact, strict=True):
        assert gradient.dtype == dtype and gradient.stride() == x.stride()
        torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


# Contracts


def test_without_any_attending_query_nothing_leaks():
    q, k, v = problem()
    keep = random_keep(B, 1, L, S)
    keep[:, :, :, [2, 5]] = False  # keys that nobody may attend to
    keep[:, :, 3] = False  # a query that may attend to nothing
    form, _ = forms(Mask.dense(keep))
    bias = random_bias(B, HQ, L, S)
    do, dlse = random_bias(B, HQ, L, DV), random_bias(B, HQ, L)
    out, lse = forward(q, k, v, form, bias)
    clean = (out, lse, *backward(do, dlse, q, k, v, out, lse, form, bias))
    for poison in (torch.nan, torch.inf, -torch.inf):
        q[:, :, 3] = do[:, :, 3] = dlse[:, :, 3] = poison
        k[:, :, [2, 5]] = v[:, :, [2, 5]] = poison
        bias = bias.masked_fill(~keep, poison)
        out, lse = forward(q, k, v, form, bias)
        poisoned = (out, lse, *backward(do, dlse, q, k, v, out, lse, form, bias))
        for ours, expected in zip(poisoned, clean, strict=True):
            assert torch.equal(ours, expected)
        weights = reference.attention_weights(q, k, lse, bias, form, SCALE, True, 0.0, None)
        dw = torch.where(keep[:, 0], 1.0, poison).double()
        gradients = reference.attention_weights_backward(dw, q, k, lse, bias, form, SCALE, True, 0.0, None, True)
        assert all(x.isfinite().all() for x in (weights, *gradients))
    assert clean[0][:, :, 3].eq(0).all() and clean[1][:, :, 3].eq(-torch.inf).all() and weights[:, 3].eq(0).all()
    assert clean[2][:, :, 3].eq(0).all() and clean[3][:, :, [2, 5]].eq(0).all() and clean[4][:, :, [2, 5]].eq(0).all()


def test_a_bias_of_minus_infinity_empties_a_row():
    q, k, v = problem()
    bias = torch.zeros(1, 1, L, S, dtype=torch.float64)
    bias[:, :, 2] = -torch.inf
    out, lse = forward(q, k, v, None, bias)
    gradients = backward(random_bias(B, HQ, L, DV), random_bias(B, HQ, L), q, k, v, out, lse, None, bias)
    assert out[:, :, 2].eq(0).all() and lse[:, :, 2].eq(-torch.inf).all() and gradients[0][:, :, 2].eq(0).all()
    assert all(x.isfinite().all() for x in gradients)


def test_two_runs_are_bitwise_equal():
    q, k, v = problem(dtype=torch.float32)
    form, _ = forms(MASKS["padding_window"])
    bias, do, seed = random_bias(1, HQ, 1, S).float(), random_bias(B, HQ, L, DV).float(), torch.tensor(4)

    def run():
        out, lse = forward(q, k, v, form, bias, 0.5, seed)
        return out, lse, *backward(do, None, q, k, v, out, lse, form, bias, 0.5, seed)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("L", "S"), [(0, 5), (5, 0), (0, 0)])
def test_empty_problems(L, S):
    q, k, v = problem(L=L, S=S)
    form, _ = forms(Mask.causal() & Mask.key_lengths([1, 2]), L, S)
    out, lse = forward(q, k, v, form)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    gradients = backward(torch.ones_like(out), None, q, k, v, out, lse, form, torch.zeros(1, 1, 1, 1).double())
    assert all(x.eq(0).all() for x in gradients)
    empty = [x[:0] for x in (q, k, v)]
    assert forward(*empty, Mask.causal().kernel_form(0, HQ, L, S, CPU))[0].shape == (0, HQ, L, DV)


def test_no_heads():
    q, k, v = (x[:, :0] for x in problem())
    out, lse = forward(q, k, v, None)
    gradients = backward(out, None, q, k, v, out, lse, None, torch.zeros(1, 1, 1, 1).double())
    assert out.shape == (B, 0, L, DV) and gradients[1].shape == k.shape and gradients[3].eq(0).all()
    weights = reference.attention_weights(q, k, lse, None, None, SCALE, True, 0.0, None)
    assert weights.shape == (B, L, S) and weights.eq(0).all()
