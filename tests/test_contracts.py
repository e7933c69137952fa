"""The twelve contracts of the README's table, each on every backend by the same test."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import Mask, dispatch
from fastattn.attention import _attention_with_seed
from fastattn.testing import (
    Case,
    TermSpec,
    build_problem,
    check_attention,
    check_loss,
    poisoned_buffers,
    random_loss_cases,
    same_bits,
    verify,
)
from fastattn.testing.adapters import own_target
from fastattn.testing.cases import TERM_KINDS
from fastattn.testing.checks import FAIL, Check
from fastattn.testing.oracle import allowed_in, attention_oracle, dropout_keep
from fastattn.testing.runner import in_able_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = (fastattn.masked_mse_loss, fastattn.masked_l1_loss, fastattn.masked_smooth_l1_loss)
NAN, INF = float("nan"), float("inf")

# Smaller random problems, where kernels for GPUs are executed on the CPU.
EMULATED = dispatch.CUDA_EMULATED or dispatch.TRITON_INTERPRETED

# Two tiles of the CPU kernels and a bit in both directions.
L, S = 101, 137


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_()


def inputs(B: int = 2, H: int = 4, Hkv: int = 2, D: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [make(B, H, L, D, dtype=dtype), make(B, Hkv, S, D, dtype=dtype), make(B, Hkv, S, D, dtype=dtype)]


def gradients(out: Tensor | tuple[Tensor, ...], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients for fixed random upstream gradients."""
    outs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
    return torch.autograd.grad(outs, tensors, upstream)


def assert_passes(checks: list[Check]) -> None:
    failed = [f"{check.name}: {check.detail}" for check in checks if check.status == FAIL]
    assert not failed, "\n".join(failed)


# ----------------------------------------------------------------------------------------------------------- 1 polarity


def one_key_masks(j: int) -> dict[str, Mask | Tensor]:
    """Masks of every kind that let each query attend to key j alone (of S), in two batches."""
    only = torch.arange(S) == j
    return {
        "bool tensor": only,
        "dense": Mask.dense(only.expand(L, S)),
        "key_padding": Mask.key_padding(only.expand(2, S)),
        "segments": Mask.segments(torch.ones(2, L, dtype=torch.int64), only.long().expand(2, S)),
        "key_lengths": Mask.key_lengths(torch.full((2,), j + 1))
        & Mask.key_padding((torch.arange(S) >= j).expand(2, S)),
    }


@pytest.mark.parametrize("kind", list(one_key_masks(0)))
def test_contract_1_true_means_may_attend(backend: str, kind: str) -> None:
    query, key, value = inputs()
    out = fastattn.attention(query, key, value, mask=one_key_masks(70)[kind], backend=backend)
    # The softmax over one key is 1: the output is its value.
    torch.testing.assert_close(out, value[:, :, 70:71].repeat_interleave(2, dim=1).expand_as(out))


def test_contract_1_analytic_masks_mean_what_they_say(backend: str) -> None:
    query, key, _ = inputs(B=1, H=1, Hkv=1)
    value = torch.eye(S).view(1, 1, S, S)  # the output is the weights
    i, j = torch.arange(L).view(L, 1), torch.arange(S)
    meanings = {
        Mask.causal(): j <= i,
        Mask.causal(align="bottom_right"): j <= i + S - L,
        Mask.window(5, 2): (i - 5 <= j) & (j <= i + 2),
        Mask.window(None, 0, align="bottom_right"): j <= i + S - L,
        Mask.prefix(torch.tensor([60])): (j <= i) | (j < 60),
    }
    for mask, allowed in meanings.items():
        weights = fastattn.attention(query, key, value, mask=mask, backend=backend)
        assert torch.equal(weights[0, 0] > 0, allowed.expand(L, S)), str(mask)


def test_contract_1_multihead_attention_keeps_torchs_polarity(backend: str) -> None:
    module = fastattn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 10, 32)
    ignored = torch.zeros(2, 10, dtype=torch.bool)
    ignored[:, 7:] = True
    with fastattn.use_backend(backend), torch.no_grad():
        padded, weights = module(x, x, x, key_padding_mask=ignored)
        cut, _ = module(x, x[:, :7], x[:, :7])
    assert not weights[:, :, 7:].any()
    torch.testing.assert_close(padded, cut)


# -------------------------------------------------------------------------------------------------------- 2 composition


@pytest.mark.parametrize("pair", list(itertools.combinations(TERM_KINDS, 2)), ids=" & ".join)
def test_contract_2_masks_compose_by_and_with_bias_and_dropout(backend: str, pair: tuple[str, str]) -> None:
    def spec(kind: str, align: str) -> TermSpec:
        return TermSpec(kind, align=align, left=40, right=20, shape=(2, 1, 70, 90), pattern="random")

    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "len_q": 70, "len_k": 90, "dim_qk": 16, "dim_v": 24}
    terms = (spec(pair[0], "top_left"), spec(pair[1], "bottom_right"))
    case = Case(seed=11, index=2, **sizes, terms=terms, bias_shape=(4, 1, 90), dropout_p=0.3, lse_grad=True)
    assert_passes(check_attention(own_target(backend), case))


def test_contract_2_all_terms_at_once(backend: str) -> None:
    kinds = (*TERM_KINDS, "segments", "dense")
    terms = tuple(TermSpec(kind, left=90, right=90, shape=(70, 90), pattern="blocks") for kind in kinds)
    case = Case(seed=1, index=3, batch=2, len_q=70, len_k=90, terms=terms)
    assert_passes(check_attention(own_target(backend), case))


def test_contract_2_the_order_of_composition_does_not_matter(backend: str) -> None:
    query, key, value = inputs()
    keep = torch.rand(2, 1, L, S) < 0.7
    a, b = Mask.causal(align="bottom_right"), Mask.dense(keep)
    outs = [fastattn.attention(query, key, value, mask=mask, backend=backend) for mask in (a & b, b & a, b & a & b)]
    assert same_bits(outs[0], outs[1]) and same_bits(outs[0], outs[2])


# --------------------------------------------------------------------------------------------------------- 3 empty rows


def empty_row_masks() -> dict[str, tuple[Mask, Tensor]]:
    """Masks with the rows (2, L) that they close."""
    keep = torch.ones(L, S, dtype=torch.bool)
    keep[::3] = False
    rows = (torch.arange(L) % 3 == 0).expand(2, L)
    batch = torch.tensor([[True], [False]]).expand(2, L)
    first = (torch.arange(L) < 40).expand(2, L)
    ids = torch.where(rows, -1, 5)
    everything = torch.ones(2, L, dtype=torch.bool)
    return {
        "dense": (Mask.dense(keep), rows),
        "key_lengths": (Mask.key_lengths(torch.tensor([0, S])), batch),
        "key_lengths out of range": (Mask.key_lengths(torch.tensor([-7, S + 99])), batch),
        "key_padding": (Mask.key_padding(torch.tensor([[False], [True]]).expand(2, S)), batch),
        "segments": (Mask.segments(ids, torch.full((2, S), 5)), rows),
        "causal & key_padding": (Mask.causal() & Mask.key_padding((torch.arange(S) >= 40).expand(2, S)), first),
        "contradiction": (Mask.window(None, -1) & Mask.window(0, None), everything),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(empty_row_masks()))
def test_contract_3_empty_rows_are_zero(backend: str, poisoned: None, kind: str, dtype: torch.dtype) -> None:
    mask, empty = empty_row_masks()[kind]
    query, key, value = inputs(dtype=dtype)
    bias = make(4, 1, S, dtype=dtype)
    out, lse = fastattn.attention(query, key, value, mask=mask, bias=bias, return_lse=True, backend=backend)
    empty = empty[:, None, :].expand(2, 4, L)
    assert not out[empty].any() and (lse[empty] == -INF).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[~empty]).all()
    dq, dk, dv, dbias = gradients((out, lse), [query, key, value, bias])
    assert not dq[empty].any()
    for gradient in (dq, dk, dv, dbias):
        assert torch.isfinite(gradient).all()
    if empty.all():
        assert not (dk.any() or dv.any() or dbias.any())

    options = {"mask": mask, "bias": bias, "backend": backend}
    for average_heads in (True, False):
        weights = fastattn.attention_weights(query, key, lse.detach(), average_heads=average_heads, **options)
        assert not weights[empty[:, 0] if average_heads else empty].any()
        for gradient in gradients(weights, [query, key, bias]):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)], ids=str)
def test_contract_3_empty_tensors(backend: str, poisoned: None, sizes: tuple[int, int, int]) -> None:
    B, length, keys = sizes
    query, key, value, bias = make(B, 4, length, 8), make(B, 2, keys, 8), make(B, 2, keys, 16), make(1, 4, 1, 1)
    out, lse = fastattn.attention(query, key, value, bias=bias, return_lse=True, backend=backend)
    assert out.shape == (B, 4, length, 16) and not out.any()
    assert (lse == -INF).all()
    for gradient in gradients((out, lse), [query, key, value, bias]):
        assert not gradient.any()


# ------------------------------------------------------------------------------------------------------------ 4 no leak


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("kind", ["key_lengths", "key_padding", "dense", "window", "segments"])
def test_contract_4_no_leak(backend: str, kind: str, poison: float) -> None:
    keep = torch.rand(2, S) < 0.6
    keep[:, 64:128] = False  # a whole tile of the kernels
    if kind == "key_lengths":
        keep = torch.arange(S).expand(2, S) < torch.tensor([[70], [S - 1]])
    elif kind == "window":
        keep = (torch.arange(S) < L + 3).expand(2, S)
    mask = {
        "key_lengths": Mask.key_lengths(torch.tensor([70, S - 1])),
        "key_padding": Mask.key_padding(keep),
        "dense": Mask.dense(keep[:, None, None, :] & (torch.rand(1, 1, L, 1) < 0.9)),
        "window": Mask.window(7, 3),
        "segments": Mask.segments(torch.ones(2, L, dtype=torch.int64), keep.long()),
    }[kind]
    query, key, value = inputs()
    bias = make(1, 1, S)
    results = []
    for hidden in (0.0, poison):
        k, v = (x.detach().masked_fill(~keep[:, None, :, None], hidden).requires_grad_() for x in (key, value))
        out, lse = fastattn.attention(query, k, v, mask=mask, bias=bias, return_lse=True, backend=backend)
        weights = fastattn.attention_weights(query, k, lse, mask=mask, bias=bias, backend=backend)
        results.append([out, lse, weights, *gradients((out, lse, weights), [query, k, v, bias])])
    for clean, hidden in zip(*results, strict=True):
        assert same_bits(clean.detach(), hidden.detach())


# ---------------------------------------------------------------------------------------------------------------- 5 lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_5_lse_is_natural_log_float32(backend: str, dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype=dtype)
    out, lse = fastattn.attention(query, key, value, scale=0.3, return_lse=True, backend=backend)
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, L) and out.dtype == dtype
    scores = 0.3 * query.double() @ key.double().repeat_interleave(2, dim=1).transpose(-1, -2)
    torch.testing.assert_close(lse.double(), scores.logsumexp(dim=-1), rtol=1e-6, atol=2e-6)


def test_contract_5_lse_is_of_the_softmax_before_dropout(backend: str) -> None:
    query, key, value = inputs()
    _, plain = fastattn.attention(query, key, value, return_lse=True, backend=backend)
    _, dropped = fastattn.attention(query, key, value, dropout_p=0.5, return_lse=True, backend=backend)
    assert same_bits(plain.detach(), dropped.detach())


# ------------------------------------------------------------------------------------------------------------ 6 dropout


def test_contract_6_dropout_is_philox_by_absolute_position(backend: str) -> None:
    query, key, _ = inputs(B=2, H=4, Hkv=2)
    value = torch.eye(S).expand(2, 2, S, S)  # the output is the weights
    options = {"mask": None, "bias": None, "scale": None, "backend": backend}
    for seed in (7, 2**40 + 7):
        seed_tensor = torch.tensor(seed)
        weights, _ = _attention_with_seed(query, key, value, dropout_p=0.4, dropout_seed=seed_tensor, **options)
        assert torch.equal(weights != 0, dropout_keep(2, 4, L, S, 0.4, seed))
    # Fewer queries and keys: the same elements.
    part = (query[:1, :2, :50], key[:1, :1, :90], value[:1, :1, :90])
    weights, _ = _attention_with_seed(*part, dropout_p=0.4, dropout_seed=seed_tensor, **options)
    assert torch.equal(weights[..., :90] != 0, dropout_keep(2, 4, L, S, 0.4, seed)[:1, :2, :50, :90])


def test_contract_6_manual_seed_reproduces_dropout(backend: str) -> None:
    query, key, value = inputs()
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(fastattn.attention(query, key, value, dropout_p=0.2, backend=backend).detach())
        outs.append(fastattn.attention(query, key, value, dropout_p=0.2, backend=backend).detach())
    assert same_bits(outs[0], outs[2]) and same_bits(outs[1], outs[3])
    assert not same_bits(outs[0], outs[1]) and not same_bits(outs[0], outs[4])


def test_contract_6_dropout_keeps_the_expectation(backend: str) -> None:
    query, key, _ = inputs()
    value = torch.ones(2, 2, S, 1)
    out = fastattn.attention(query, key, value, dropout_p=0.25, backend=backend)
    # 808 rows; the deviation of one is below 0.15.
    assert abs(out.mean().item() - 1.0) < 0.03


# -------------------------------------------------------------------------------------------------------- 7 determinism


@pytest.mark.parametrize("threads", [1, 3], ids=lambda threads: f"{threads} threads", indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_7_two_runs_are_bitwise_equal(backend: str, threads: int, dtype: torch.dtype) -> None:
    def run(fill: float) -> list[Tensor]:
        torch.manual_seed(5)
        query, key, value = inputs(H=6, Hkv=2, dtype=dtype)
        bias = make(1, 1, L, S, dtype=dtype)  # many heads and batches add to one element
        with poisoned_buffers(fill):
            out, lse = fastattn.attention(
                query,
                key,
                value,
                mask=Mask.causal("bottom_right"),
                bias=bias,
                dropout_p=0.1,
                return_lse=True,
                backend=backend,
            )
            weights = fastattn.attention_weights(query, key, lse, bias=bias, backend=backend)
            grads = gradients((out, lse, weights), [query, key, value, bias])
        return [t.detach() for t in (out, lse, weights, *grads)]

    first = run(NAN)
    for _ in range(3):
        for a, b in zip(first, run(1.0), strict=True):
            assert same_bits(a, b)


# ------------------------------------------------------------------------------------------------------ 8 bias gradient


@pytest.mark.parametrize("broadcast", range(16), ids=lambda bits: f"{bits:04b}")
def test_contract_8_bias_gradient_has_the_shape_of_the_bias(backend: str, broadcast: int) -> None:
    full = (2, 4, 70, 90)
    shape = tuple(1 if broadcast >> d & 1 else size for d, size in enumerate(full))
    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "len_q": 70, "len_k": 90}
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(seed=2, index=broadcast, **sizes, dtype=dtype, bias_shape=shape, terms=(TermSpec("prefix"),))
        assert_passes(check_attention(own_target(backend), case))


@pytest.mark.parametrize("shape", [(), (S,), (L, 1), (4, 1, 1)], ids=str)
def test_contract_8_bias_of_fewer_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    query, key, value = inputs()
    bias = make(*shape)
    (dbias,) = gradients(fastattn.attention(query, key, value, bias=bias, backend=backend), [bias])
    assert dbias.shape == shape and dbias.dtype == bias.dtype


def test_contract_8_bias_gradient_is_accumulated_in_float32(backend: str) -> None:
    # 4096 contributions to one element. Their sum in bfloat16 would stop growing at 256 of them.
    query, key = torch.zeros(8, 8, 64, 8, dtype=torch.bfloat16), torch.zeros(8, 8, 2, 8, dtype=torch.bfloat16)
    value = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).view(1, 1, 2, 1).expand(8, 8, 2, 1)
    bias = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    fastattn.attention(query, key, value, bias=bias, backend=backend).sum().backward()
    # p = 1/2; d out / d bias = p (v - out) = +- 1/2 for each of the 4096 rows.
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad.flatten().float(), torch.tensor([2048.0, -2048.0]))


# ------------------------------------------------------------------------------------------------------------- 9 memory


def test_contract_9_nothing_of_size_l_s_is_kept_for_the_backward(backend: str) -> None:
    """On the reference too: it is dense inside, but keeps no more between forward and backward than a fused kernel."""
    length, kept = 512, []
    query, key, value = make(1, 2, length, 8), make(1, 2, length, 8), make(1, 2, length, 8)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fastattn.attention(query, key, value, mask=Mask.causal(), dropout_p=0.1, backend=backend)
    assert kept and max(kept) < length * length


def test_contract_9_results_are_no_aliases_and_inputs_stay(backend: str) -> None:
    query, key, value = inputs()
    before = [t.detach().clone() for t in (query, key, value)]
    out = fastattn.attention(query, key, value, backend=backend)
    grads = gradients(out, [query, key, value])
    for tensor, copy in zip((query, key, value), before, strict=True):
        assert same_bits(tensor.detach(), copy)
    storages = {t.untyped_storage().data_ptr() for t in (query, key, value, out, *grads)}
    assert len(storages) == 7


# Peak memory of a fresh process, in bytes above what it held before the call.
MEASURE = """
    import sys, torch, fastattn
    from fastattn import Mask
    torch.set_num_threads(2)

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def peak_of(function):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmRSS")
        function()
        return status("VmHWM") - before

    def warm_up():
        x, bias = torch.randn(1, 1, 64, 32, requires_grad=True), torch.zeros(1, requires_grad=True)
        out = fastattn.attention(x, x, x, bias=bias, mask=Mask.causal(), dropout_p=0.1, backend="cpu")
        out.sum().backward()

    warm_up()
"""


def peak_memory(program: str) -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak is read from /proc/self/status, which is Linux's")
    script = textwrap.dedent(MEASURE) + textwrap.dedent(program)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


needs_native = pytest.mark.skipif(
    dispatch.NATIVE_FAILURE is not None, reason="the fused CPU backend is the native library, which is not there"
)


@needs_native
def test_contract_9_no_tensor_of_size_l_s_on_the_fused_backend() -> None:
    """L * S is 64 MiB in bytes and 256 MiB in floats; each tensor of the problem has 2 MiB. Only the fused backends
    promise this: the reference is dense by intent, as the specification that they are compared with."""
    peak = peak_memory("""
        length = 8192
        query, key, value = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3))
        bias = torch.randn(1, 1, 1, length, requires_grad=True)
        mask = Mask.causal() & Mask.key_lengths(torch.tensor([length - 100])) & Mask.window(4000, None)

        def run():
            out, lse = fastattn.attention(
                query, key, value, mask=mask, bias=bias, dropout_p=0.1, return_lse=True, backend="cpu")
            (out.sum() + lse.sum()).backward()

        print(peak_of(run))
    """)
    assert peak < 48 * 2**20, f"{peak / 2**20:.0f} MiB"


@needs_native
def test_contract_9_no_copy_of_an_input_on_the_fused_backend() -> None:
    """Inputs of 64 MiB, strided as a projection leaves them. Forward makes out; backward makes three gradients. What
    else is there is the scratch of two threads, which does not grow with the number of heads."""
    peak = peak_memory("""
        heads, length, unit = 64, 2048, 2**26
        packed = torch.randn(1, length, 3, heads, 128)
        query, key, value = (packed[:, :, n].transpose(1, 2).requires_grad_() for n in range(3))
        grad = torch.randn(1, heads, length, 128)
        mask = Mask.window(64, 0)
        result = []
        forward = peak_of(lambda: result.append(fastattn.attention(query, key, value, mask=mask, backend="cpu")))
        backward = peak_of(lambda: result.append(torch.autograd.grad(result[0], (query, key, value), grad)))
        # In percent of an input: beyond out, and beyond the three gradients.
        print(max(forward * 100 // unit - 100, backward * 100 // unit - 300))
    """)
    assert peak < 75, f"{peak} % of the size of an input beyond the results"


# ---------------------------------------------------------------------------------------------------------- 10 backends


def test_contract_10_a_named_backend_runs_and_explain_says_so(backend: str) -> None:
    query, key, value = inputs()
    assert fastattn.explain(query, key, value, backend=backend).chosen == backend
    with fastattn.use_backend(backend):
        assert fastattn.explain(query, key, value).chosen == backend


def test_contract_10_a_named_backend_never_falls_back(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the kernel failed")

    query, key, value = inputs()
    monkeypatch.setattr(dispatch.load(backend), "attention_forward", broken)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        fastattn.attention(query, key, value, backend=backend)
    with fastattn.use_backend(backend), pytest.raises(RuntimeError, match="the kernel failed"):
        fastattn.attention(query, key, value)


def test_contract_10_a_backend_that_cannot_run_raises_with_every_reason() -> None:
    query, key, value = make(1, 1, 4, 520), make(1, 1, 4, 520), make(1, 1, 4, 520)
    with pytest.raises(RuntimeError, match="cpu.*520"):
        fastattn.attention(query, key, value, backend="cpu")
    with pytest.raises(RuntimeError, match="cuda.*largest head dim is 256, this one is 520"):
        fastattn.attention(query, key, value, backend="cuda")
    with pytest.raises(RuntimeError, match="triton.*largest head dim is 256, this one is 520"):
        fastattn.attention(query, key, value, backend="triton")
    with pytest.raises(ValueError, match="backend.*'metal'"):
        fastattn.attention(query, key, value, backend="metal")
    # Without a name the first able one runs, and the explanation has the reason for each other.
    explanation = fastattn.explain(query, key, value)
    assert explanation.chosen == "reference" and "520" in str(explanation)
    assert fastattn.attention(query, key, value).shape == (1, 1, 4, 520)


# ----------------------------------------------------------------------------------------------------------- 11 numbers


def test_contract_11_numbers(backend: str) -> None:
    """Random problems by the harness: out, dq, dk, dv, dbias against float64, SDPA's error setting the bound."""
    verify(backend, n=30, seed=31, small=EMULATED).raise_on_failure()


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_contract_11_numbers_with_several_threads(backend: str, threads: int) -> None:
    """Few heads and several threads: the work of a head is shared out."""
    verify(backend, n=15, seed=32, dtype=torch.float32, small=EMULATED).raise_on_failure()
    sizes = {"batch": 1, "heads_q": 1, "heads_kv": 1, "len_q": 203, "len_k": 511}
    for bias_shape in (None, (1, 511), (203, 1)):
        case = Case(seed=4, index=1, **sizes, bias_shape=bias_shape, terms=(TermSpec("causal", "bottom_right"),))
        assert_passes(check_attention(own_target(backend), case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 59, 64, 80, 128, 256])
def test_contract_11_head_dims_and_odd_lengths(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    sizes = {"batch": 1, "heads_q": 2, "heads_kv": 1, "len_q": 113, "len_k": 203, "dim_qk": head_dim, "dim_v": head_dim}
    for layout in ("contiguous", "sliced"):
        case = Case(
            seed=4, index=head_dim, **sizes, dtype=dtype, layout=layout, terms=(TermSpec("causal", "bottom_right"),)
        )
        assert_passes(check_attention(own_target(backend), case))


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_contract_11_any_finite_scale(backend: str, scale: float) -> None:
    terms = (TermSpec("causal"), TermSpec("key_padding", pattern="random"))
    case = Case(seed=4, index=0, batch=2, len_q=70, len_k=70, scale=scale, terms=terms, bias_shape=(70, 70))
    assert_passes(check_attention(own_target(backend), case))


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", [1e6, 1e9, 1e12, 1e30])
def test_contract_11_scores_of_any_size(backend: str, size: float, with_bias: bool) -> None:
    """Each query takes one key: its probability is 1, forward and backward, however large the score is."""
    query, key, value = (torch.randn(2, 2, 96, 24) for _ in range(3))
    query, key = query * size**0.5, key * size**0.5
    bias = torch.randn(96, 96) if with_bias else None
    scores = query.double() @ key.double().mT * 24**-0.5
    chosen = torch.nn.functional.one_hot(scores.argmax(-1), 96).double()
    value.requires_grad_()
    out, lse = fastattn.attention(query, key, value, bias=bias, return_lse=True, backend=backend)
    upstream = torch.randn_like(out)
    (grad_value,) = torch.autograd.grad(out, value, upstream)
    weights = fastattn.attention_weights(query, key, lse, bias=bias, average_heads=False, backend=backend)
    torch.testing.assert_close(out.detach().double(), chosen @ value.detach().double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_value.double(), chosen.mT @ upstream.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), chosen, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), scores.amax(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("len_q", [2, 101])
def test_contract_11_the_lowest_finite_bias_is_no_mask(backend: str, len_q: int) -> None:
    """A row whose bias is the lowest number everywhere is not empty: its weights are equal, as with SDPA."""
    query, key, value = torch.randn(1, 2, len_q, 24), torch.randn(1, 2, S, 24), torch.randn(1, 2, S, 24)
    bias = torch.full((len_q, S), torch.finfo(torch.float32).min)
    out = fastattn.attention(query, key, value, bias=bias, backend=backend)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value, bias))
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [101, 102])
def test_contract_11_numbers_at_length(backend: str, seed: int) -> None:
    verify(backend, n=150, seed=seed).raise_on_failure()


# --------------------------------------------------------------------------------------------------------- 12 bad input


def bad_calls() -> dict[str, tuple[dict[str, object], type[Exception], str]]:
    """Changes to a good call, the exception, and what its message has to name."""
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    good_keep = torch.ones(2, 7, dtype=torch.bool)
    return {
        "rank": ({"query": q[0]}, ValueError, r"query.*\(4, 5, 8\)"),
        "not a tensor": ({"key": [1.0]}, TypeError, "key.*list"),
        "integers": ({"query": q.long(), "key": k.long(), "value": v.long()}, TypeError, "query.*int64"),
        "mixed dtypes": ({"key": k.half()}, TypeError, "key.*float16"),
        "batch": ({"key": k[:1]}, ValueError, "batch"),
        "head dim": ({"key": k[..., :4]}, ValueError, "head dim"),
        "heads": ({"key": k[:, :3], "value": v[:, :3]}, ValueError, "heads"),
        "key and value heads": ({"value": v[:, :2]}, ValueError, "heads"),
        "lengths": ({"value": v[:, :, :3]}, ValueError, "length"),
        "device": ({"key": k.to("meta")}, ValueError, "key.*meta"),
        "mask shape": ({"mask": torch.ones(3, 5, 5, dtype=torch.bool)}, ValueError, "mask"),
        "mask dtype": ({"mask": torch.ones(5, 5)}, TypeError, "mask|keep"),
        "mask type": ({"mask": "causal"}, TypeError, "mask"),
        "padding batch": ({"mask": Mask.key_padding(good_keep)}, ValueError, "mask|keep"),
        "lengths batch": ({"mask": Mask.key_lengths(torch.tensor([1, 2, 3]))}, ValueError, "mask|lengths"),
        "bias shape": ({"bias": torch.zeros(3, 5, 5)}, ValueError, "bias"),
        "bias dtype": ({"bias": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "bias"),
        "dropout 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p.*1\.0"),
        "dropout negative": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        "dropout text": ({"dropout_p": "half"}, TypeError, "dropout_p"),
        "scale NaN": ({"scale": NAN}, ValueError, "scale.*nan"),
        "scale infinite": ({"scale": INF}, ValueError, "scale.*inf"),
        "scale text": ({"scale": "1"}, TypeError, "scale"),
    }


@pytest.mark.parametrize("what", list(bad_calls()))
def test_contract_12_bad_input_names_the_argument(backend: str, what: str) -> None:
    good = dict(zip(("query", "key", "value"), (torch.randn(2, 4, 5, 8) for _ in range(3)), strict=True))
    changes, exception, message = bad_calls()[what]
    with pytest.raises(exception, match=message):
        fastattn.attention(**{**good, **changes}, backend=backend)
    fastattn.attention(**good, backend=backend)


@pytest.mark.parametrize(
    ("build", "exception", "message"),
    [
        (lambda: Mask.causal(align="middle"), ValueError, "align.*middle"),
        (lambda: Mask.window("3", None), TypeError, "left"),
        (lambda: Mask.prefix(torch.tensor([1.5])), TypeError, "lengths"),
        (lambda: Mask.key_padding(torch.ones(2, 3)), TypeError, "keep"),
        (lambda: Mask.key_padding(torch.ones(3, dtype=torch.bool)), ValueError, "keep"),
        (lambda: Mask.dense(torch.ones(2, 3)), TypeError, "keep"),
        (lambda: Mask.segments(torch.ones(2, 3), torch.ones(2, 3)), TypeError, "query_ids"),
    ],
)
def test_contract_12_bad_masks_name_the_argument(build, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        build()


def test_contract_12_values_out_of_range_are_harmless(backend: str) -> None:
    """Lengths and ids are data, and any integer has a meaning: none is read out of bounds."""
    far = 2**40
    terms = {
        Mask.key_lengths(torch.tensor([far, -far])): (torch.tensor([S, 0])),
        Mask.prefix(torch.tensor([far, far])): torch.tensor([S, S]),
    }
    query, key, value = inputs()
    for mask, lengths in terms.items():
        out = fastattn.attention(query, key, value, mask=mask, backend=backend)
        expected = fastattn.attention(query, key, value, mask=Mask.key_lengths(lengths), backend=backend)
        torch.testing.assert_close(out, expected)
    smallest = Mask.key_lengths(torch.full((2,), -(2**63))) & Mask.window(3, None)
    out = fastattn.attention(query, key, value, mask=smallest, backend=backend)
    assert not out.any() and not any(gradient.any() for gradient in gradients(out, [query, key, value]))
    ids = torch.randint(-far, far, (2, S))
    out = fastattn.attention(query, key, value, mask=Mask.segments(ids[:, :L], ids), backend=backend)
    torch.testing.assert_close(out, value[:, :, :L].repeat_interleave(2, dim=1))


# --------------------------------------------------------------------------------------------------------------- losses


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return make(2, 3, 8, 12), make(2, 3, 8, 12), torch.rand(2, 2, 3) < 0.5


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_loss_contract_1_true_means_counted(backend: str, loss) -> None:
    input, target = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    input[:, :, :4, 4:] = 2.0  # patch (0, 1)
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert loss(input, target, mask, patch_size=4, backend=backend) == 0.0
    mask[0, 0, 1] = True
    per_element = {"masked_mse_loss": 4.0, "masked_l1_loss": 2.0, "masked_smooth_l1_loss": 1.5}[loss.__name__]
    assert loss(input, target, mask, patch_size=4, backend=backend) == per_element
    assert loss(input, target, mask, patch_size=4, reduction="sum", backend=backend) == per_element * 48
    assert loss(input, target, mask, patch_size=4, reduction="mean", backend=backend) == per_element / 4


@pytest.mark.parametrize("reduction", ["masked_mean", "sum", "mean", "none"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_loss_contract_3_nothing_counted_is_zero(backend: str, poisoned: None, loss, reduction: str) -> None:
    input, target, mask = loss_inputs()
    value = loss(input, target, torch.zeros_like(mask), patch_size=4, reduction=reduction, backend=backend)
    assert not value.any()
    for gradient in gradients(value, [input, target]):
        assert not gradient.any()
    empty = loss(input[:0], target[:0], mask[:0], patch_size=4, reduction=reduction, backend=backend)
    assert not empty.any()


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
@pytest.mark.parametrize("normalize_target", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_loss_contract_4_no_leak(backend: str, loss, normalize_target: bool, poison: float) -> None:
    input, target, mask = loss_inputs()
    counted = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    results = []
    for hidden in (0.0, poison):
        x, t = (tensor.detach().masked_fill(~counted, hidden) for tensor in (input, target))
        x.requires_grad_()
        value = loss(x, t, mask, patch_size=4, normalize_target=normalize_target, backend=backend)
        results.append((value, *gradients(value, [x])))
    for clean, hidden in zip(*results, strict=True):
        assert same_bits(clean.detach(), hidden.detach())


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_loss_contract_7_two_runs_are_bitwise_equal_whatever_the_threads(backend: str, loss, threads: int) -> None:
    input, target = make(4, 3, 96, 96), make(4, 3, 96, 96)
    mask = torch.rand(4, 6, 6) < 0.6

    def run() -> tuple[Tensor, ...]:
        value = loss(input, target, mask, patch_size=16, backend=backend)
        return (value.detach(), *gradients(value, [input, target]))

    first = run()
    assert all(same_bits(a, b) for a, b in zip(first, run(), strict=True))
    if backend == "reference":  # it sums by torch, whose order may follow the number of threads
        return
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        assert all(same_bits(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_loss_contract_10_a_named_backend_never_falls_back(backend: str, monkeypatch: pytest.MonkeyPatch, loss) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the kernel failed")

    input, target, mask = loss_inputs()
    monkeypatch.setattr(dispatch.load(backend), "masked_loss", broken)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        loss(input, target, mask, patch_size=4, backend=backend)
    monkeypatch.setattr(dispatch, "CUDA_FAILURE", "it was never built")
    with pytest.raises(RuntimeError, match="it was never built"):
        loss(input, target, mask, patch_size=4, backend="cuda")


def test_loss_contract_11_numbers(backend: str) -> None:
    for case in random_loss_cases(60, seed=8):
        case = in_able_dtype(own_target(backend), case)
        assert_passes(check_loss(backend, case))


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"target": torch.zeros(2, 3, 8, 8)}, ValueError, "target"),
        ({"target": torch.zeros(2, 3, 8, 12, dtype=torch.float64)}, TypeError, "target"),
        ({"input": torch.zeros(2, 3, 8, 12, dtype=torch.int32)}, TypeError, "input"),
        ({"mask": torch.ones(2, 2, 3)}, TypeError, "mask"),
        ({"mask": torch.ones(2, 3, 3, dtype=torch.bool)}, ValueError, "mask"),
        ({"mask": torch.ones(2, 2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask.*meta"),
        ({"patch_size": 5}, ValueError, "patch_size"),
        ({"patch_size": 0}, ValueError, "patch_size"),
        ({"reduction": "average"}, ValueError, "reduction.*average"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"backend": "metal"}, ValueError, "backend.*metal"),
    ],
)
def test_loss_contract_12_bad_input_names_the_argument(
    backend: str, changes: dict[str, object], exception: type[Exception], message: str
) -> None:
    input, target, mask = loss_inputs()
    good = {"input": input, "target": target, "mask": mask, "patch_size": 4, "backend": backend}
    with pytest.raises(exception, match=message):
        fastattn.masked_mse_loss(**{**good, **changes})


# --------------------------------------------------------------------------------------------- the oracle behind it all


def test_the_oracle_is_reached_by_no_backend() -> None:
    """What the backends are compared with shares no code with them."""
    problem = build_problem(Case(seed=0, index=0, terms=(TermSpec("causal"),)))
    with poisoned_buffers():
        expected = attention_oracle(problem, allowed_in(problem), None)
    assert all(torch.isfinite(value).all() for value in expected.values.values())
    source = sys.modules["fastattn.testing.oracle"].__file__
    assert source is not None
    with open(source) as file:
        text = file.read()
    assert "fastattn.backends" not in text and "fastattn.masks" not in text and "fastattn.ops" not in text
