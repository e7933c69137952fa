"""Second derivatives, forward mode and vmap of attention, its weights and the masked losses."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import Mask, dispatch, ops
from fastattn.attention import _attention_packed, _attention_with_seed
from fastattn.backends import derivatives, reference
from fastattn.testing.compare import compare

pytestmark = pytest.mark.filterwarnings("error:.*batching rule")

# The formulas are the same for every backend: once with the native library where it is there.
BACKEND = "cpu" if dispatch.NATIVE_FAILURE is None else "reference"
SEED = torch.tensor(5)


@pytest.fixture(autouse=True)
def first_able():
    with fastattn.use_backend(BACKEND):
        yield


def tensors(*shapes, dtype=torch.float64, grad=False):
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def plain(query, key, value, bias, keep, scale=None, dropout=0.0, seed=SEED):
    """out, lse (0 on empty rows) and weights, written with torch's differentiable functions."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    alive = keep.any(-1, keepdim=True)
    scores = torch.where(keep, scores, -torch.inf).where(alive, 0)
    lse = scores.logsumexp(-1).where(alive[..., 0], 0)
    weights = scores.softmax(-1).where(alive, 0)
    if dropout:
        shape = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
        weights = weights * reference.philox_keep(seed, dropout, *shape) / (1 - dropout)
    return weights @ value, lse, weights


B, HQ, HKV, L, S, D, DV = 2, 4, 2, 4, 5, 3, 2


def every_mask():
    dense = torch.rand(B, 1, L, S) > 0.2
    dense[0, 0, 1] = False  # an empty row
    return (
        Mask.causal("bottom_right")
        & Mask.prefix(torch.tensor([1, 2]))
        & Mask.key_lengths(torch.tensor([4, 5]))
        & Mask.key_padding(torch.tensor([[True] * 5, [True, False, True, True, True]]))
        & Mask.segments(torch.tensor([[1, 1, 2, 2]]), torch.tensor([[1, 1, 1, 2, 2]]))
        & Mask.dense(dense)
    )


CASES = {  # the mask, the bias's shape, the probability of dropout
    "plain": (lambda: None, None, 0.0),
    "every mask": (every_mask, (B, HQ, L, S), 0.3),
    "window": (lambda: Mask.window(1, 2), (1, HQ, 1, S), 0.0),
    "bias of rows": (lambda: Mask.key_lengths(torch.tensor([3, 0])), (1, 1, L, 1), 0.3),
}


def problem(case):
    make_mask, bias, dropout = CASES[case]
    inputs = tensors((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, DV), *([bias] if bias else []), grad=True)
    mask = make_mask()
    keep = Mask.dense(torch.ones(1, 1, L, S, dtype=torch.bool)) if mask is None else mask
    options = {"mask": mask, "scale": 0.7, "dropout_p": dropout, "dropout_seed": SEED}
    return inputs, keep.to_dense(B, HQ, L, S), options


def attend(options):
    def function(query, key, value, bias=None):
        out, lse = _attention_with_seed(query, key, value, bias=bias, backend=None, **options)
        return out, lse.where(lse != -torch.inf, 0)

    return function


def check_both_orders(function, inputs):
    """Gradients, tangents and batched gradients; then reverse over reverse and forward over reverse."""
    assert gradcheck(
        function,
        inputs,
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=False,
    )
    assert gradgradcheck(function, inputs, fast_mode=True, check_fwd_over_rev=True)


# gradcheck -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_attention(case):
    inputs, _, options = problem(case)
    check_both_orders(attend(options), tuple(inputs))


@pytest.mark.parametrize("sequence_first", [False, True])
def test_derivatives_of_packed_attention(sequence_first):
    (qkv,) = tensors((4, 2, 3, 2, 3) if sequence_first else (2, 4, 3, 2, 3), grad=True)
    (bias,) = tensors((1, 2, 4, 1), grad=True)

    def function(qkv, bias):
        qkv = qkv.transpose(0, 1) if sequence_first else qkv
        options = {"mask": Mask.causal(), "dropout_p": 0.2, "scale": None, "dropout_seed": SEED}
        return _attention_packed(qkv, bias=bias, backend=None, **options)

    check_both_orders(function, (qkv, bias))


@pytest.mark.parametrize("average", [True, False])
def test_derivatives_of_the_weights(average):
    query, key, lse, bias = tensors((B, HQ, L, D), (B, HKV, S, D), (B, HQ, L), (1, HQ, 1, S), grad=True)
    mask = every_mask()

    def function(query, key, lse, bias):
        options = {"average_heads": average, "dropout_p": 0.2, "dropout_seed": SEED}
        return fastattn.attention_weights(query, key, lse, mask=mask, bias=bias, **options)

    check_both_orders(function, (query, key, lse, bias))


LOSSES = {
    "l2": fastattn.masked_mse_loss,
    "l1": fastattn.masked_l1_loss,
    "smooth_l1": lambda *given, **named: fastattn.masked_smooth_l1_loss(*given, beta=0.8, **named),
}


@pytest.mark.parametrize("reduction", ["masked_mean", "sum", "mean", "none"])
@pytest.mark.parametrize("kind", LOSSES)
def test_derivatives_of_the_losses(kind, reduction):
    image, target = tensors((2, 2, 4, 4), (2, 2, 4, 4), grad=True)
    grid = torch.tensor([[[True, False], [True, True]]])
    check_both_orders(lambda x, y: LOSSES[kind](x, y, grid, patch_size=2, reduction=reduction), (image, target))


def test_derivatives_of_the_loss_of_a_normalised_target():
    image, target = tensors((2, 2, 4, 4), (2, 2, 4, 4))
    grid = torch.rand(2, 2, 2) > 0.3

    def function(x):
        return fastattn.masked_mse_loss(x, target, grid, patch_size=2, normalize_target=True)

    check_both_orders(function, (image.requires_grad_(),))
    with pytest.raises(RuntimeError, match="no derivative reaches a target"):
        jvp(
            lambda y: fastattn.masked_mse_loss(image.detach(), y, grid, patch_size=2, normalize_target=True),
            (target,),
            (target,),
        )


# Against torch's own derivatives of the plain formula ----------------------------------------------------------------


def scalar(outputs):
    return sum((x * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum() for x in outputs)


def with_weights(options):
    def function(query, key, value, bias):
        out, lse = attend(options)(query, key, value, bias)
        return out, lse, fastattn.attention_weights(query, key, lse, bias=bias, average_heads=False, **options)

    return function


def test_jvp_hvp_and_vjp_are_those_of_the_formula():
    inputs, keep, options = problem("every mask")
    inputs = tuple(x.detach() for x in inputs)
    along = tuple(torch.randn_like(x) for x in inputs)
    ours = with_weights(options)

    def theirs(*inputs):
        return plain(*inputs, keep, 0.7, 0.3)

    for got, expected in zip(jvp(ours, inputs, along)[1], jvp(theirs, inputs, along)[1], strict=True):
        assert_close(got, expected)

    def hvp(function):
        return jvp(grad(lambda inputs: scalar(function(*inputs)).sin()), (inputs,), (along,))[1]

    for got, expected in zip(hvp(ours), hvp(theirs), strict=True):
        assert_close(got, expected)
    # The gradient of a directional derivative, by the inputs and by the direction.
    for argument in (0, 1):

        def of_tangent(function, argument=argument):
            return grad(lambda *both: scalar(jvp(function, *both)[1]).sin(), argument)(inputs, along)

        for got, expected in zip(of_tangent(ours), of_tangent(theirs), strict=True):
            assert_close(got, expected)


ORDERS = {
    "forward over reverse": lambda f: jacfwd(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
    "hessian": hessian,
}


@pytest.mark.parametrize("order", ORDERS)
def test_hessians_in_every_order(order):
    query, key, value = tensors((1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2))
    bias = torch.randn(1, 1, 1, 3, dtype=torch.float64)
    # A mask that lives longer than the transform, and whose tile map is made within it.
    options = {"mask": Mask.dense(torch.rand(3, 3) > 0.3), "scale": 0.7, "dropout_p": 0.0, "dropout_seed": None}
    keep = options["mask"].to_dense(1, 2, 3, 3)
    counted, target = torch.tensor([[True, False, True]] * 3), value[0, 0]

    def ours(key, bias):
        outputs = with_weights(options)(query, key, value + key, bias)
        loss = fastattn.masked_mse_loss(outputs[0][0, 0], target[:, :2], counted[:, :2])
        return scalar(outputs).sin() + loss

    def theirs(key, bias):
        outputs = plain(query, key, value + key, bias, keep, 0.7)
        difference = (outputs[0][0, 0] - target[:, :2]).where(counted[:, :2], 0)
        return scalar(outputs).sin() + difference.square().sum() / counted[:, :2].sum()

    for argument, x in enumerate((key, bias)):
        given = [key, bias]

        def of_one(function, argument=argument, given=given):
            return lambda one: function(*given[:argument], one, *given[argument + 1 :])

        assert_close(ORDERS[order](of_one(ours))(x), hessian(of_one(theirs))(x))
    attend(options)(query, key, value)  # the mask is still of use outside


def test_dual_numbers():
    inputs, keep, options = problem("window")
    along = [torch.randn_like(x) for x in inputs]
    results = []
    for function in (with_weights(options), lambda *x: plain(*x, keep, 0.7)):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, t) for x, t in zip(inputs, along, strict=True)]
            outputs = function(*dual)
            gradients = torch.autograd.grad(scalar(outputs).sin(), dual)
            results.append([forward_ad.unpack_dual(x).tangent for x in (*outputs, *gradients)])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_penalty_on_every_backend(backend, dtype):
    inputs, keep, options = problem("every mask")
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with fastattn.use_backend(backend):
        penalties = []
        for function in (with_weights(options), lambda *x: plain(*x, keep, 0.7, 0.3)):
            gradients = torch.autograd.grad(scalar(function(*inputs)), inputs, create_graph=True)
            penalties.append(torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs))
    for got, expected in zip(*penalties, strict=True):
        assert_close(
            got,
            expected,
            rtol=1e-10 if dtype == torch.float64 else 1e-4,
            atol=1e-10 if dtype == torch.float64 else 1e-4,
        )


def test_hessian_products_of_autograd_functional():
    inputs, _, options = problem("window")
    query, *others = (x.detach() for x in inputs)
    (along,) = tensors((B, HQ, L, D))

    def function(query):
        return scalar(attend(options)(query, *others)).sin()

    expected = jvp(grad(function), (query,), (along,))[1]
    assert_close(torch.autograd.functional.vhp(function, query, along)[1], expected)
    whole = torch.autograd.functional.hessian(function, query, vectorize=True)
    assert_close(torch.tensordot(whole, along, 4), expected)
    assert_close(torch.autograd.functional.jvp(function, query, along)[1], jvp(function, (query,), (along,))[1])
    with pytest.raises(RuntimeError, match="take torch.func.jvp of torch.func.grad"):
        torch.autograd.functional.hvp(function, query, along)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_half_and_single_precision(dtype):
    """Contract 11: against float64, at most 1.5 times the error of the formula written with torch's functions."""
    shapes = (2, 4, 40, 16), (2, 2, 50, 16), (2, 2, 50, 16)
    inputs = [x.to(dtype) for x in tensors(*shapes)]
    keep = Mask.causal("bottom_right").to_dense(2, 4, 40, 50)
    upstream, *along = (x.to(dtype) for x in tensors((2, 4, 40, 16), *shapes))

    def second(function, inputs, upstream, along):
        leaves = [x.clone().requires_grad_() for x in inputs]
        gradients = torch.autograd.grad(function(*leaves), leaves, upstream, create_graph=True)
        tangent = jvp(function, tuple(inputs), tuple(along))[1]
        return [tangent, *torch.autograd.grad(gradients, leaves, along)]

    def formula(query, key, value):
        single = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
        return plain(*single, None, keep)[0].to(query.dtype)

    ours = second(
        lambda q, k, v: fastattn.attention(q, k, v, mask=Mask.causal("bottom_right")), inputs, upstream, along
    )
    peer = second(formula, inputs, upstream, along)
    expected = second(formula, [x.double() for x in inputs], upstream.double(), [x.double() for x in along])
    for name, actual, exact, other in zip(("jvp", "ddq", "ddk", "ddv"), ours, expected, peer, strict=True):
        noise = torch.full_like(exact, float(torch.finfo(torch.float32).eps * exact.abs().max()))
        result = compare(name, actual, exact, noise + torch.finfo(dtype).eps / 2 * exact.abs(), other)
        assert result.ok, result.message


# What must not be read, and how much memory --------------------------------------------------------------------------


def test_masked_keys_empty_rows_and_their_tangents_are_never_read():
    mask = Mask.key_lengths(torch.tensor([3, 0])) & Mask.dense(torch.tensor([True, False, True, True])[:, None])
    clean = tensors((2, 2, 4, 3), (2, 1, 6, 3), (2, 1, 6, 3), (2, 2, 4, 6))
    keep = mask.to_dense(2, 2, 4, 6)

    def poison(x, number):
        x = x.clone()
        for b in range(2):
            if number == 0:
                x[b].masked_fill_(~keep[b].any(-1, keepdim=True), torch.nan)
            elif number == 3:
                x[b].masked_fill_(~keep[b], torch.nan)
            else:
                x[b].masked_fill_(~keep[b].any(1).any(0)[:, None], torch.inf if number == 1 else torch.nan)
        return x

    along = [torch.randn_like(x) for x in clean]
    results = []
    for change in (lambda x, number: x, poison):
        inputs, t = (tuple(change(x, n) for n, x in enumerate(given)) for given in (clean, along))

        def function(query, key, value, bias):
            out, lse = fastattn.attention(query, key, value, mask=mask, bias=bias, return_lse=True)
            weights = fastattn.attention_weights(query, key, lse, mask=mask, bias=bias)
            return scalar((out, lse.double().where(lse != -torch.inf, 0), weights)).sin()

        gradients, second = jvp(grad(lambda inputs: function(*inputs)), (inputs,), (t,))
        _, once = jvp(function, inputs, t)

        def along_t(*inputs, t=t, function=function):
            return jvp(function, inputs, t)[1]

        _, twice = jvp(along_t, inputs, t)
        back = grad(lambda inputs, along_t=along_t: along_t(*inputs))(inputs)
        results.append([*gradients, *second, once, twice, *back])
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.isfinite(got).all()
        assert_close(got, expected)
    assert not results[1][0][:, :, 1].any() and not results[1][4][1].any()


def test_not_counted_elements_are_never_read():
    clean, target, along = tensors((2, 5, 3), (2, 5, 3), (2, 5, 3))
    counted = torch.rand(2, 5) > 0.5
    for kind, reduction in (("l2", "masked_mean"), ("smooth_l1", "none"), ("l1", "sum"), ("smooth_l1", "mean")):
        results = []
        for x in (clean, clean.masked_fill(~counted[..., None], torch.nan)):
            poisoned = along.masked_fill(~counted[..., None], torch.inf) if x is not clean else along

            def loss(x, kind=kind, reduction=reduction):
                return LOSSES[kind](x, target, counted, reduction=reduction).sum().sin()

            gradient, second = jvp(grad(loss), (x,), (poisoned,))
            leaf = x.clone().requires_grad_()
            (once,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            (twice,) = torch.autograd.grad(once, leaf, along) if once.requires_grad else (second,)
            results.append((gradient, second, jvp(loss, (x,), (poisoned,))[1], once, twice))
        for got, expected in zip(results[1], results[0], strict=True):
            assert_close(got, expected)


MEASURE = """
    import torch, fastattn
    torch.set_num_threads(1)

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def penalty(length, half):
        query, key, value = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
        bias = torch.randn(1, 1, 1, length, requires_grad=True)
        inputs = query, key, value, bias
        out = fastattn.attention(query, key, value, bias=bias, mask=fastattn.Mask.window(half, 0))
        gradients = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)
        tangents = tuple(x.detach() for x in inputs)
        torch.func.jvp(lambda q, k, v, b: fastattn.attention(q, k, v, bias=b), tangents, tangents)

    penalty(128, 64)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    penalty(4096, 2048)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc/self/status")
def test_no_tensor_of_size_l_s():
    """The scores of both heads have 128 MiB."""
    environment = {**os.environ, "FASTATTN_BACKEND": BACKEND}
    command = [sys.executable, "-c", textwrap.dedent(MEASURE)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout)
    if BACKEND != "reference":
        assert peak < 64 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_blocks_of_every_size_give_the_same(monkeypatch):
    """Parts of the batch, of the heads, of the rows and of the keys; words of a tile map and random numbers are cut."""
    shape = 3, 4, 37, 150
    query, key, value = tensors((3, 4, 37, 3), (3, 2, 150, 3), (3, 2, 150, 3))
    bias = torch.randn(3, 1, 37, 1, dtype=torch.float64)
    mask = Mask.window(20, 9, "bottom_right") & Mask.dense(torch.rand(3, 4, 37, 150) > 0.3)
    mask = mask & Mask.key_lengths(torch.tensor([150, 140, 90])) & Mask.key_padding(torch.rand(3, 150) > 0.1)
    options = {"mask": mask, "scale": None, "dropout_p": 0.2, "dropout_seed": SEED}
    along = tuple(torch.randn_like(x) for x in (query, key, value, bias))

    def results():
        function = with_weights(options)
        inputs = query, key, value, bias
        _, tangents = jvp(function, inputs, along)
        _, second = jvp(grad(lambda inputs: scalar(function(*inputs)).sin()), (inputs,), (along,))
        return *tangents, *second

    whole = results()
    _, expected = jvp(lambda *x: plain(*x, mask.to_dense(*shape), None, 0.2), (query, key, value, bias), along)
    for got, exact in zip(whole[:3], expected, strict=True):
        assert_close(got, exact)
    for elements in (2 * 150 * 16, 2 * 150 * 37 * 2, 1):
        monkeypatch.setattr(derivatives, "_BLOCK_ELEMENTS", elements)
        for got, once in zip(results(), whole, strict=True):
            assert_close(got, once)


# vmap ----------------------------------------------------------------------------------------------------------------


def loop(function, in_dims, arguments):
    """What vmap has to give."""
    n = next(x.shape[dim] for x, dim in zip(arguments, in_dims, strict=True) if dim is not None)
    samples = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
        for i in range(n)
    ]
    if isinstance(samples[0], torch.Tensor):
        return torch.stack(samples)
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))


VMAPPED = {  # which arguments, and along which dimension: query, key, value, bias, dense mask, key padding
    "all": (0, 0, 0, 0, 0, 0),
    "inner": (1, 2, 3, -1, 1, 1),
    "query alone": (0, None, None, None, None, None),
    "values alone": (None, None, 1, None, None, None),
    "bias alone": (None, None, None, 0, None, None),
    "dense mask alone": (None, None, None, None, 2, None),
    "padding alone": (None, None, None, None, None, 0),
}


@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("case", VMAPPED)
def test_vmap_is_a_loop(case, batch):
    in_dims = VMAPPED[case]
    arguments = [
        *tensors((batch, 4, 3, 2), (batch, 2, 5, 2), (batch, 2, 5, 2), (1, 4, 1, 5)),
        torch.rand(1, 1, 3, 5) > 0.3,
    ]
    arguments.append(torch.rand(batch, 5) > 0.2)
    arguments = [
        x if dim is None else torch.stack([x, x.flip(-1), x.roll(1, -1)], dim)
        for x, dim in zip(arguments, in_dims, strict=True)
    ]

    def function(query, key, value, bias, dense, padding):
        mask = Mask.dense(dense) & Mask.key_padding(padding) & Mask.causal("bottom_right")
        out, lse = fastattn.attention(query, key, value, bias=bias, mask=mask, return_lse=True)
        weights = fastattn.attention_weights(query, key, lse.double(), bias=bias, mask=mask)
        return out, weights

    def gradients(*arguments):
        return grad(lambda x: scalar(function(*x, *arguments[4:])).sin())(arguments[:4])

    def second(*arguments):
        one = tuple(torch.ones_like(x) for x in arguments[:4])
        return jvp(lambda *x: gradients(*x, *arguments[4:]), arguments[:4], one)[1]

    for run in (function, gradients, second):
        for got, expected in zip(vmap(run, in_dims)(*arguments), loop(run, in_dims, arguments), strict=True):
            assert_close(got, expected)


def test_vmap_of_packed_attention_and_of_the_losses():
    qkv, bias = tensors((3, 2, 4, 3, 2, 3), (3, 2, 1, 4))
    options = {"mask": Mask.causal(), "dropout_p": 0.0, "scale": None, "dropout_seed": None, "backend": None}

    def packed(qkv, bias):
        return grad(lambda x, y: _attention_packed(x, bias=y, **options)[0].sin().sum(), (0, 1))(qkv, bias)

    for got, expected in zip(vmap(packed)(qkv, bias), loop(packed, (0, 0), (qkv, bias)), strict=True):
        assert_close(got, expected)
    image, target = tensors((3, 2, 2, 4, 4), (2, 2, 4, 4))
    grids = torch.rand(3, 2, 2, 2) > 0.3
    for kind, reduction in (("l2", "masked_mean"), ("smooth_l1", "none"), ("l1", "mean")):

        def loss(image, target, grid, kind=kind, reduction=reduction):
            return LOSSES[kind](image, target, grid, patch_size=2, reduction=reduction)

        def of_loss(image, target, grid, loss=loss):
            return grad(lambda *x: loss(*x, grid).sin().sum(), (0, 1))(image, target)

        in_dims, arguments = (0, None, 0), (image, target, grids)
        assert_close(vmap(loss, in_dims)(*arguments), loop(loss, in_dims, arguments))
        for got, expected in zip(vmap(of_loss, in_dims)(*arguments), loop(of_loss, in_dims, arguments), strict=True):
            assert_close(got, expected)


def test_vmap_with_dropout_follows_its_randomness():
    query, key, value = tensors((2, 2, 6, 3), (2, 2, 6, 3), (2, 2, 6, 3))

    def function(scale):
        weights = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
        return fastattn.attention(query * scale, key, weights, dropout_p=0.5) != 0

    scales = torch.ones(3, dtype=torch.float64)
    same = vmap(function, randomness="same")(scales)
    assert (same == same[:1]).all() and not same.all()
    different = vmap(function, randomness="different")(scales)
    assert all((different[i] != different[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function)(scales)

    def seeded(query, seed):
        options = {"mask": None, "bias": None, "scale": None, "backend": None}
        run = lambda x: _attention_with_seed(x, key, value, dropout_p=0.5, dropout_seed=seed, **options)[0]  # noqa: E731
        return run(query), grad(lambda x: run(x).sin().sum())(query)

    seeds, queries = torch.tensor([1, 2]), torch.stack((query, query))
    for in_dims in ((0, 0), (None, 0), (0, None)):
        given = (queries if in_dims[0] == 0 else query, seeds if in_dims[1] == 0 else seeds[0])
        for got, expected in zip(vmap(seeded, in_dims)(*given), loop(seeded, in_dims, given), strict=True):
            assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_batched_gradients_are_those_of_a_loop():
    inputs, _, options = problem("window")
    out, _ = attend(options)(*inputs)
    upstream = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, retain_graph=True)
    separate = [torch.autograd.grad(out, inputs, x, retain_graph=True) for x in upstream]
    for got, expected in zip(batched, zip(*separate, strict=True), strict=True):
        assert_close(got, torch.stack(expected))


# torch.compile, operators, what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["attention", pytest.param("loss", marks=pytest.mark.slow)])
def test_compiled_forward_mode_is_right_or_refused(operation):
    """Never tangents of zero: torch.compile goes back to eager code, or says that it cannot."""
    query, key, value, along = tensors(*[(1, 2, 4, 3)] * 4)
    counted = torch.tensor([True, False, True, True])[:, None]

    def attention(x):
        return fastattn.attention(x, key, value)

    def loss(x):
        return fastattn.masked_mse_loss(x, value, counted)

    def dual(function):
        def run(x):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(function(forward_ad.make_dual(x, along))).tangent

        return run

    def compiled(function, fullgraph):
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)

    def warmed(function, fullgraph):
        run = compiled(function, fullgraph)
        run(query)
        return run

    def run_jvp(function):
        return lambda x: jvp(function, (x,), (along,))[1]

    function = {"attention": attention, "loss": loss}[operation]
    expected = run_jvp(function)(query)
    assert expected.abs().max() > 1e-3
    runs = {
        "jvp inside": lambda full: compiled(run_jvp(function), full)(query),
        "jvp around": lambda full: run_jvp(compiled(function, full))(query),
        "jvp around, compiled before": lambda full: run_jvp(warmed(function, full))(query),
        "dual inside": lambda full: compiled(dual(function), full)(query),
        "dual around, compiled before": lambda full: dual(warmed(function, full))(query),
    }
    for name, run in runs.items():
        assert_close(run(False), expected, msg=lambda text, name=name: f"{name}: {text}")
        with pytest.raises(torch._dynamo.exc.Unsupported):
            run(True)
    # Gradients within compiled code are refused as well: torch's tracer takes the operators alone.
    with pytest.raises(RuntimeError, match="called outside torch.compile"):
        compiled(grad(lambda x: attention(x).sum()), True)(query)
    # vmap is not.
    assert_close(compiled(vmap(attention), True)(query[None]), attention(query)[None])
    torch._dynamo.reset()


def test_an_operator_refuses_forward_mode():
    query, key, value = tensors(*[(1, 2, 4, 3)] * 3)

    def operator(x):
        return torch.ops.fastattn.attention(x, key, value, None, *ops.flatten_mask(None), 0.5, 0.0, None, BACKEND)[0]

    with pytest.raises(RuntimeError, match="functions of fastattn, called outside torch.compile"):
        jvp(operator, (query,), (query,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="functions of fastattn"):
        operator(forward_ad.make_dual(query, query))
    with pytest.raises(RuntimeError, match="functions of fastattn"):
        grad(lambda x: operator(x).sum())(query)
    assert_close(vmap(operator)(query[None]), operator(query)[None])


def test_third_derivatives_are_refused():
    query, key, value = tensors(*[(1, 1, 3, 2)] * 3)
    lse = torch.zeros(1, 1, 3, dtype=torch.float64)
    functions = (
        lambda x: fastattn.attention(x, key, value).sin().sum(),
        lambda x: fastattn.attention_weights(x, key, lse).sin().sum(),
        lambda x: _attention_packed(
            torch.stack([y.transpose(1, 2) for y in (x, key, value)], 2),
            **{"mask": None, "bias": None, "dropout_p": 0.0, "scale": None, "dropout_seed": None, "backend": None},
        )[0].sin().sum(),
    )  # fmt: skip
    for function in functions:
        for order in ORDERS.values():
            second = order(function)
            for third in (jacfwd, jacrev):
                with pytest.raises(RuntimeError, match="this is the third"):
                    third(second)(query)
    # Those of the losses are torch's, of every order.
    cube = jacfwd(jacrev(jacrev(lambda x: LOSSES["l2"](x, value, torch.tensor(True)).square())))(query)
    assert_close(cube, jacfwd(jacrev(jacrev(lambda x: (x - value).square().mean().square())))(query))


@pytest.mark.parametrize("case", ["every mask", "bias of rows"])
def test_opcheck(case):
    inputs, _, options = problem(case)
    query, key, value, bias = (x.detach() for x in inputs)
    t = [torch.randn_like(x) for x in (query, key, value, bias)]
    mask = ops.flatten_mask(options["mask"].kernel_form(B, HQ, L, S, torch.device("cpu")))
    tail = 0.7, options["dropout_p"], SEED, BACKEND
    out, lse = attend(options)(query, key, value, bias)
    operators = torch.ops.fastattn
    opcheck(operators.attention_jvp.default, (query, key, value, bias, *t, out, lse, *mask, *tail))
    opcheck(operators.attention_jvp_jvp.default, (query, key, value, bias, *t, *t, *mask, *tail))
    first = (out, lse, out, lse, query, key, value, bias)
    opcheck(operators.attention_backward_jvp.default, (*first, *t, *mask, *tail, True))
    opcheck(operators.attention_backward_jvp.default, (*first, None, t[1], None, None, *mask, *tail, False))
    weights_tail = 0.7, True, options["dropout_p"], SEED, BACKEND
    inputs, t = (query, key, lse, bias), (t[0], t[1], lse, t[3])
    opcheck(operators.attention_weights_jvp.default, (*inputs, *t, *mask, *weights_tail))
    opcheck(operators.attention_weights_jvp_jvp.default, (*inputs, *t, *t, *mask, *weights_tail))
    (c,) = tensors((B, L, S))
    opcheck(operators.attention_weights_backward_jvp.default, (c, c, *inputs, *t, *mask, *weights_tail, True))


def test_what_surrounds_a_second_derivative():
    """Checkpointing with dropout, autocast, the FLOP counter and an empty batch."""
    query, key, value = tensors(*[(2, 2, 5, 4)] * 3, dtype=torch.float32, grad=True)

    def penalty(run):
        torch.manual_seed(3)
        (gradient,) = torch.autograd.grad(run(query).square().sum(), query, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (query, key, value))

    def attention(x):
        return fastattn.attention(x, key, value, dropout_p=0.3)

    for got, expected in zip(
        penalty(lambda x: checkpoint(attention, x, use_reentrant=False)), penalty(attention), strict=True
    ):
        assert_close(got, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, tangent = jvp(lambda x: fastattn.attention(x, key, value), (query,), (query,))
        under = vmap(lambda x: fastattn.attention(x, key, value))(query[None])
    assert tangent.dtype == under.dtype == torch.bfloat16
    exact = jvp(lambda x: fastattn.attention(x, key, value), (query,), (query,))[1]
    assert_close(tangent.float(), exact, rtol=0.05, atol=0.05)
    with FlopCounterMode(display=False) as counter:
        jvp(lambda x: fastattn.attention(x, key, value), (query.detach(),), (query.detach(),))
    pairs = 2 * 2 * 5 * 5 * 4
    assert counter.get_total_flops() == 2 * pairs * (2 + 5)
    empty = torch.zeros(0, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: fastattn.attention(x, x, x), (empty,))


def test_saved_tensors_of_a_loss_are_no_more_than_before():
    """Squared and absolute errors need their input no more once the gradient is known."""
    for kind, held in (("l2", False), ("l1", False), ("smooth_l1", True)):
        kept = []
        prediction = torch.randn(2, 5, 3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            LOSSES[kind](prediction, torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))
        assert any(x.data_ptr() == prediction.data_ptr() for x in kept) == held


# The module ----------------------------------------------------------------------------------------------------------


def modules(**options):
    stock = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **options)
    ours = copy.deepcopy(stock)
    ours.__class__ = fastattn.MultiheadAttention
    return stock, ours


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("is_self", [True, False])
def test_gradient_penalty_and_jvp_of_the_module(need_weights, is_self):
    stock, ours = modules(add_bias_kv=not is_self)
    (x, memory, along) = tensors((2, 5, 8), (2, 6, 8), (2, 5, 8))
    mask = torch.rand(5, 5 if is_self else 6) > 0.6
    mask[:, 0] = False
    results = []
    for module in (stock, ours):
        # Stock has second derivatives only on the path that makes the weights.
        weights = need_weights or module is stock

        def run(x, parameters, module=module, weights=weights):
            other = x if is_self else memory
            options = {"need_weights": weights, "attn_mask": mask}
            out, given = functional_call(module, parameters, (x, other, other), options)
            return scalar((out, given) if need_weights else (out,)).sin()

        parameters = dict(module.named_parameters())
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(leaf, parameters), leaf, create_graph=True)
        penalty = torch.autograd.grad(gradient.square().sum(), [leaf, *parameters.values()], allow_unused=True)
        plain_parameters = {name: value.detach() for name, value in parameters.items()}
        forward = jvp(lambda x: run(x, plain_parameters), (x,), (along,))[1]  # noqa: B023
        mixed = jvp(lambda x: grad(run, 1)(x, plain_parameters), (x,), (along,))[1]  # noqa: B023
        results.append([gradient, *penalty, forward, *mixed.values()])
    for got, expected in zip(results[1], results[0], strict=True):
        if expected is None:  # such as the output projection's bias, for one of which nothing is left in the penalty
            assert got is None or not got.any()
        else:
            assert_close(got, expected)


def test_per_sample_gradients_and_ensembles_of_the_module():
    _, module = modules()
    (x,) = tensors((3, 5, 8))
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters, x):
        out, weights = functional_call(module, parameters, (x[None],) * 3)
        return out.square().sum() + weights.square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for n in range(3):
        for name, expected in grad(loss)(parameters, x[n]).items():
            assert_close(per_sample[name][n], expected)
    several = [modules()[1] for _ in range(3)]
    stacked, buffers = stack_module_state(several)
    together = vmap(lambda p, b: functional_call(several[0], (p, b), (x,) * 3)[0])(stacked, buffers)
    assert_close(together, torch.stack([each(x, x, x)[0] for each in several]))


def test_vjp_and_jacobians_of_the_module():
    _, module = modules()
    (x,) = tensors((1, 3, 8))
    run = lambda x: module(x, x, x, need_weights=False)[0]  # noqa: E731
    by_rows, by_columns = jacrev(run)(x), jacfwd(run)(x)
    assert_close(by_rows, by_columns)
    _, pull = vjp(run, x)
    assert_close(pull(torch.ones_like(x))[0], by_rows.sum((0, 1, 2)))
