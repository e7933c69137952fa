"""The two routes from torch's scaled_dot_product_attention to our kernels: who is reached, and what comes out."""

import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import bias as attention_bias
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.integrations import sdpa
from fastattn.integrations.sdpa import register_flash_attention_impl, replace_scaled_dot_product_attention
from fastattn.testing import Target, verify

aten = torch.ops.aten
needs_registry = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="this torch has no registry of flash attention implementations",
)


def by_attribute(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # the signature that the harness reads
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@replace_scaled_dot_product_attention()
def decorated(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return by_attribute(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def heads(*shape, **options):
    return torch.randn(*(shape or (2, 3, 7, 8)), dtype=torch.float64, **options)


def counting(monkeypatch, name):
    """The number of calls of a function of the module, in a list of one."""
    counter, function = [0], getattr(sdpa, name)

    def counted(*args, **kwargs):
        counter[0] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(sdpa, name, counted)
    return counter


@pytest.fixture
def attended(monkeypatch):
    """Counts the calls that the context manager sends to ours."""
    return counting(monkeypatch, "scaled_dot_product_attention")


def judged(report, at_least):
    report.raise_on_failure()
    assert report.judged >= at_least


# The context manager --------------------------------------------------------------------------------------------------


def test_numbers_inside():
    judged(verify(Target("decorated", decorated, "sdpa", on_ours=True), n=30, loss=False), 25)


def test_every_name_of_the_function_is_replaced_inside_and_only_there(attended):
    query, key, value = heads(), heads(), heads()
    functions = F.scaled_dot_product_attention, imported_by_name, torch._C._nn.scaled_dot_product_attention
    before = [function(query, key, value) for function in functions]
    with replace_scaled_dot_product_attention():
        inside = [function(query, key, value) for function in functions]
    assert attended[0] == 3
    after = [function(query, key, value) for function in functions]
    assert attended[0] == 3 and F.scaled_dot_product_attention is imported_by_name
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    for result in inside:
        torch.testing.assert_close(result, before[0], rtol=1e-12, atol=1e-12)


def test_nesting_exceptions_and_reuse(attended):
    query = heads()
    route = replace_scaled_dot_product_attention()
    with route:
        with route, replace_scaled_dot_product_attention():
            by_attribute(query, query, query)
        by_attribute(query, query, query)
        with pytest.raises(ZeroDivisionError), route:
            raise ZeroDivisionError
        by_attribute(query, query, query)
    assert attended[0] == 3  # once for each call, however deep
    by_attribute(query, query, query)
    assert attended[0] == 3

    @route
    def recursive(depth):
        by_attribute(query, query, query)
        return recursive(depth - 1) if depth else None

    recursive(2)
    by_attribute(query, query, query)
    assert attended[0] == 6 and recursive.__name__ == "recursive"


def test_what_runs_later_cannot_be_decorated():
    def generator():
        yield

    async def coroutine():
        return None

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match="generator or coroutine"):
            replace_scaled_dot_product_attention()(function)


def test_another_thread_is_not_affected(attended):
    query, results = heads(), []
    expected = by_attribute(query, query, query)
    with replace_scaled_dot_product_attention():
        thread = threading.Thread(target=lambda: results.append(by_attribute(query, query, query)))
        thread.start()
        thread.join()
    assert attended[0] == 0 and torch.equal(results[0], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_modules_of_torch_reach_ours(training, attended):
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).train(training)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    x, padding = heads(3, 5, 8), torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]

    def call():
        with torch.set_grad_enabled(training):
            return attention(x, x, x, need_weights=False)[0], encoder(x, src_key_padding_mask=padding)[~padding]

    expected = call()
    with replace_scaled_dot_product_attention():
        results = call()
    assert attended[0] == 3
    torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-11)


def test_backward_outside_and_checkpoint_inside(attended):
    query, key, value = (heads(requires_grad=True) for _ in range(3))

    def gradients(function, dropout_p):
        torch.manual_seed(1)
        out = function(by_attribute, query, key, value, None, dropout_p)
        return torch.autograd.grad(out.square().sum(), (query, key, value))

    def plain(function, *args):
        return function(*args)

    def checkpointed(function, *args):
        return checkpoint(function, *args, use_reentrant=False)

    expected = gradients(plain, 0.0)
    with replace_scaled_dot_product_attention():
        out = by_attribute(query, key, value)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), (query, key, value)), expected, rtol=1e-10, atol=1e-10
    )
    with replace_scaled_dot_product_attention():
        dropped, again = gradients(plain, 0.5), gradients(checkpointed, 0.5)
    assert attended[0] == 4 and all(torch.equal(x, y) for x, y in zip(dropped, again, strict=True))


def targets_of(graphs):
    return ["fastattn" in str([node.target for node in graph.graph.nodes]) for graph in graphs]


@pytest.mark.parametrize("function", [by_attribute, lambda *args: imported_by_name(*args)], ids=["attribute", "name"])
def test_compiled_code_follows_the_context(function):
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    query, key, value = (heads(requires_grad=True) for _ in range(3))
    compiled = torch.compile(function, backend=record, fullgraph=True)
    expected = compiled(query, key, value)
    with replace_scaled_dot_product_attention():
        inside = compiled(query, key, value)
    assert torch.equal(compiled(query, key, value), expected)
    assert targets_of(graphs) == [False, True]
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(out.sum(), (query, key, value)) for out in (inside, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_modules_inside(training):
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)

        def forward(self, x):
            x = x.unflatten(1, (1, 5)).flatten(1, 2)  # a method that torch.compile cannot trace below every mode
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = Model().train(training), heads(3, 5, 8)
    with replace_scaled_dot_product_attention():
        result = torch.compile(model, backend=record, fullgraph=True)(x)
    assert targets_of(graphs) == [True]
    torch.testing.assert_close(result, model(x), rtol=1e-12, atol=1e-12)


def test_the_context_inside_compiled_code():
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=record, fullgraph=True)
    def both(query):
        with replace_scaled_dot_product_attention():
            ours = F.scaled_dot_product_attention(query, query, query)
        return ours, F.scaled_dot_product_attention(query, query, query)

    query = heads()
    ours, stock = both(query)
    assert torch.equal(stock, by_attribute(query, query, query))
    assert torch.equal(ours, decorated(query, query, query))
    assert torch.equal(torch.compile(decorated, backend=record, fullgraph=True)(query, query, query), ours)
    assert targets_of(graphs) == [True, True]


def test_masks_of_torch_nn_attention_bias(attended):
    query, key = heads(), heads(2, 3, 9, 8)
    for make in (attention_bias.causal_upper_left, attention_bias.causal_lower_right):
        mask = make(7, 9)
        expected = by_attribute(query, key, key, mask)
        with replace_scaled_dot_product_attention():
            torch.testing.assert_close(by_attribute(query, key, key, mask), expected, rtol=1e-12, atol=1e-12)
            with pytest.raises(RuntimeError, match="is_causal"):
                by_attribute(query, key, key, mask, is_causal=True)
    assert attended[0] == 2


def test_everything_dropped():
    query, key, value = (heads(requires_grad=True) for _ in range(3))
    out = decorated(query, key, value, dropout_p=1.0)
    assert torch.equal(out, by_attribute(query, key, value, dropout_p=1.0)) and not out.any()
    assert torch.equal(out, fastattn.scaled_dot_product_attention(query, key, value, dropout_p=1.0))
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), (query, key, value)))


def test_a_query_that_may_attend_to_nothing_gets_zero():
    query, mask = heads(requires_grad=True), torch.ones(7, 7, dtype=torch.bool).tril(-1)
    for each in (mask, torch.zeros(7, 7, dtype=torch.float64).masked_fill(~mask, float("-inf"))):
        out = decorated(query, query, query, each)
        assert not out[:, :, 0].any() and bool(out[:, :, 1:].all())
        assert bool(torch.autograd.grad(out.square().sum(), query)[0].isfinite().all())


BAD = {
    "not a tensor": ((1, 2, 3), {}),
    "mask is a list": ((heads(), heads(), heads()), {"attn_mask": [True]}),
    "an argument too many": ((heads(), heads(), heads(), None, 0.0, False, 0.1), {}),
    "one dimension": ((heads(3), heads(), heads()), {}),
    "dtypes differ": ((heads(), heads().float(), heads()), {}),
    "integers": ((torch.ones(2, 3, 4, 8, dtype=torch.long),) * 3, {}),
    "complex": ((heads().cfloat(),) * 3, {}),
    "bool mask of another shape": ((heads(),) * 3, {"attn_mask": torch.ones(7, 5, dtype=torch.bool)}),
    "float mask of another shape": ((heads(),) * 3, {"attn_mask": heads(7, 5)}),
    "integer mask": ((heads(),) * 3, {"attn_mask": torch.ones(7, 7, dtype=torch.long)}),
    "head dims differ": ((heads(), heads(2, 3, 7, 9), heads()), {}),
    "heads differ": ((heads(), heads(2, 2, 7, 8), heads(2, 2, 7, 8)), {}),
    "heads do not divide": ((heads(), heads(2, 2, 7, 8), heads(2, 2, 7, 8)), {"enable_gqa": True}),
    "devices differ": ((heads(), heads(device="meta"), heads()), {}),
    "dropout": ((heads(),) * 3, {"dropout_p": 1.5}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_as_torch(name):
    args, options = BAD[name]
    with pytest.raises((RuntimeError, TypeError)) as stock:
        F.scaled_dot_product_attention(*args, **options)
    # NotImplementedError is a RuntimeError of torch's kernels about dtypes.
    expected = TypeError if stock.type is TypeError else RuntimeError
    with replace_scaled_dot_product_attention(), pytest.raises(expected):
        F.scaled_dot_product_attention(*args, **options)


def test_what_torch_takes_and_ours_does_not_raises():
    query = heads()
    nested = torch.nested.nested_tensor([heads(3, 2, 8), heads(4, 2, 8)], layout=torch.jagged).transpose(1, 2)
    cases = [
        ((nested, nested, nested), {}, "varlen"),
        ((query, query, query), {"scale": float("inf")}, "scale"),
        ((query, query, query, torch.ones(7, 7, dtype=torch.bool)), {"is_causal": True}, "is_causal"),
        ((query, query, heads(2, 3, 5, 8)), {}, "length"),
    ]
    with replace_scaled_dot_product_attention():
        for args, options, words in cases:
            with pytest.raises(RuntimeError, match=words):
                F.scaled_dot_product_attention(*args, **options)


def test_tensors_with_a_meaning_of_their_own_keep_it(attended):
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "own" if func is F.scaled_dot_product_attention else super().__torch_function__(func, types, args)

    class Plain(torch.Tensor):
        pass

    query = heads()
    with replace_scaled_dot_product_attention():
        assert F.scaled_dot_product_attention(query.as_subclass(Own), query, query) == "own"
        traced = torch.fx.symbolic_trace(lambda q: F.scaled_dot_product_attention(q, q, q))
        assert attended[0] == 0
        assert type(F.scaled_dot_product_attention(query.as_subclass(Plain), query, query)) is Plain
        assert attended[0] == 1
    assert torch.equal(traced(query), by_attribute(query, query, query))


def test_fake_and_meta_tensors():
    with FakeTensorMode(), replace_scaled_dot_product_attention():
        assert by_attribute(heads(), heads(), heads()).shape == (2, 3, 7, 8)
    assert decorated(*(heads(device="meta"),) * 3).shape == (2, 3, 7, 8)


def test_attention_of_transformers_reaches_ours(attended):
    module = pytest.importorskip("transformers.integrations.sdpa_attention")
    owner = nn.Module()
    owner.is_causal = True
    query, key = heads(2, 4, 7, 8), heads(2, 2, 7, 8)
    owner.num_key_value_groups = 2
    expected, _ = module.sdpa_attention_forward(owner, query, key, key, None)
    with replace_scaled_dot_product_attention():
        result, _ = module.sdpa_attention_forward(owner, query, key, key, None)
    assert attended[0] == 1
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


# The registry of flash attention implementations ----------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch):
    """Counts the forwards that torch's operators hand to ours."""
    return counting(monkeypatch, "_forward")


@pytest.fixture
def backwards(monkeypatch):
    return counting(monkeypatch, "_backward")


@pytest.fixture
def active():
    register_flash_attention_impl()
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    yield
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()


@pytest.fixture
def on_cpu():
    """The kernels for CUDA, run for CPU tensors: torch has none of its own there for these operators."""
    library = torch.library.Library("aten", "IMPL")
    for operator, kernel in sdpa._KERNELS["CUDA"].items():
        library.impl(operator, kernel, "CPU")
    yield
    library._destroy()


def results(options, query, key, value):
    out = by_attribute(query, key, value, **options)
    return out, *torch.autograd.grad(out.square().sum(), (query, key, value))


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.arange(49).view(7, 7) % 3 > 0},
    "padding": {"attn_mask": (torch.arange(7) < torch.tensor([7, 3])[:, None])[:, None, None, :]},
    "float mask": {"attn_mask": torch.linspace(-2, 2, 98, dtype=torch.float64).view(2, 1, 7, 7)},
    "scale": {"scale": 0.3},
}


@needs_registry
def test_activating_and_restoring(forwards, backwards):
    leaves = [heads(requires_grad=True) for _ in range(3)]
    before = {name: results(options, *leaves) for name, options in CALLS.items()}
    register_flash_attention_impl()
    assert "fastattn" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None and torch.backends.mha.get_fastpath_enabled()
    results({}, *leaves)
    assert forwards[0] == 0
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "fastattn"
        torch.nn.attention.activate_flash_attention_impl("fastattn")  # as torch does: the old one goes first
        for name, options in CALLS.items():
            inside = results(options, *leaves)
            torch.testing.assert_close(inside, before[name], rtol=1e-10, atol=1e-10, msg=name)
            assert [x.stride() for x in inside] == [x.stride() for x in before[name]]
        assert forwards[0] == backwards[0] == len(CALLS)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert torch.backends.mha.get_fastpath_enabled()
    for name, options in CALLS.items():
        assert all(torch.equal(x, y) for x, y in zip(results(options, *leaves), before[name], strict=True))
    assert forwards[0] == len(CALLS)


@needs_registry
def test_numbers_of_the_active_implementation(active, forwards):
    judged(verify(Target("by_attribute", by_attribute, "sdpa", on_ours=True), n=30, loss=False), 25)
    assert (
        forwards[0] > 30
    )  # each problem is called more than once; what torch sends to its formula is the smaller part


@needs_registry
def test_the_fast_path_setting_of_the_user_comes_back():
    register_flash_attention_impl("under another name")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.nn.attention.activate_flash_attention_impl("under another name")
        torch.nn.attention.restore_flash_attention_impl()
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@needs_registry
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_modules_of_torch_run_the_active_implementation(training, active, forwards, backwards):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    with torch.inference_mode(not training):
        out = attention(x, x, x, need_weights=False)[0].sum() + encoder(x, src_key_padding_mask=padding).sum()
    assert forwards[0] == 3
    if training:
        out.backward()
        assert backwards[0] == 3


@needs_registry
def test_what_torch_keeps_for_itself(active, forwards):
    query = heads()
    mask = heads(7, 7, requires_grad=True)
    by_attribute(query, query, query, mask).sum().backward()
    by_attribute(query, query, query, dropout_p=0.5)
    by_attribute(query, query, heads(2, 3, 7, 9))
    by_attribute(query[0], query[0], query[0])
    assert forwards[0] == 0 and bool(mask.grad.any())
    by_attribute(query, query, query)
    assert forwards[0] == 1


@needs_registry
def test_compiled_code_runs_the_active_implementation(active, forwards):
    torch._dynamo.reset()
    query = heads(requires_grad=True)
    compiled = torch.compile(by_attribute, backend="aot_eager", fullgraph=True)
    out = compiled(query, query, query)
    assert forwards[0] == 1
    torch.testing.assert_close(out, decorated(query, query, query), rtol=1e-12, atol=1e-12)
    torch.autograd.grad(out.sum(), query)


@needs_registry
def test_rows_that_may_attend_to_nothing(active, forwards):
    query, mask = heads(requires_grad=True), torch.ones(7, 7, dtype=torch.bool).tril(-1)
    out = by_attribute(query, query, query, mask)
    assert forwards[0] == 1 and not out[:, :, 0].any() and bool(out[:, :, 1:].all())
    assert bool(torch.autograd.grad(out.square().sum(), query)[0].isfinite().all())


@needs_registry
def test_importing_registers_and_activates_nothing():
    code = (
        "import torch, fastattn, fastattn.integrations.sdpa; from torch.nn import attention; "
        "assert 'fastattn' not in attention.list_flash_attention_impls(); "
        "assert attention.current_flash_attention_impl() is None; "
        # Overriding is asked for: torch's warning about it must not reach the user.
        "import warnings; warnings.simplefilter('error'); "
        "fastattn.integrations.sdpa.register_flash_attention_impl(); "
        "attention.activate_flash_attention_impl('fastattn')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Overriding" not in done.stderr, done.stderr


def test_a_torch_without_the_registry(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match="replace_scaled_dot_product_attention"):
        register_flash_attention_impl()


def additive(attn_mask, query, key):
    """A mask as torch hands it to the efficient operator: float, with -inf, expanded to every batch and head."""
    if attn_mask is None:
        return None
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return attn_mask.expand(*query.shape[:3], key.shape[2])


def efficient(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    mask = additive(attn_mask, query, key)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


def flash(query, key, value, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def test_numbers_of_the_operators_for_cuda(on_cpu):
    # strict: our rules on empty rows and leaks too.
    judged(verify(Target("efficient", efficient, "sdpa", on_ours=True), n=20, strict=True, loss=False), 15)
    judged(verify(Target("flash", flash, "sdpa", on_ours=True), n=40, strict=True, loss=False), 5)


def layouts(results):
    return [(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_length", [False, True], ids=["BHLD", "BLHD"])
def test_results_are_laid_out_as_torch_promises(on_cpu, active, dtype, by_length):
    """Compiled code relies on the shapes, strides and dtypes of the meta kernels."""

    def make(length, fill=torch.randn):
        shape = (2, length, 3, 8) if by_length else (2, 3, length, 8)
        return fill(*shape, dtype=dtype).transpose(1, 2) if by_length else fill(*shape, dtype=dtype)

    query, key, mask = make(40), make(50), torch.randn(2, 3, 40, 50, dtype=dtype)
    cpu = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, lse = cpu[0](query, key, key, attn_mask=mask)
    flash = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward
    flashed = flash[0](query, key, key)
    efficient = aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_efficient_attention_backward
    found = efficient[0](query, key, key, mask, True, 0.5)
    calls = [
        (cpu[0], (query, key, key), {"attn_mask": mask}),
        (cpu[1], (out, query, key, key, out, lse, 0.0, False), {"attn_mask": mask}),
        (flash[1], (out, query, key, key, *flashed[:6], 0.0, False, *flashed[6:8]), {}),
        (efficient[0], (query, key, key, mask, True), {}),
        (efficient[0], (query, key, key, None, False), {}),
        (efficient[1], (out, query, key, key, mask, *found, 0.5, [True] * 4), {}),
    ]
    to_meta = torch.utils._pytree.tree_map_only
    for operator, args, options in calls:
        ours = operator(*args, **options)
        promised = operator(
            *to_meta(torch.Tensor, lambda x: x.to("meta"), args), **{k: v.to("meta") for k, v in options.items()}
        )
        assert layouts(ours) == layouts(promised), operator
    promised = flash[0](*(x.to("meta") for x in (query, key, key)))
    assert layouts(flashed[:7]) == layouts(promised[:7]) and flashed[8].shape == promised[8].shape


def test_the_log_sum_exp_of_the_operators(on_cpu, active):
    query, key = torch.randn(2, 3, 40, 8), torch.randn(2, 3, 50, 8)
    mask = torch.zeros(2, 3, 40, 50)
    mask[:, :, 3] = float("-inf")
    scores = query.double() @ key.double().transpose(-1, -2) / 8**0.5
    plain, masked = scores.logsumexp(-1), (scores + mask).logsumexp(-1)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(aten._scaled_dot_product_flash_attention(query, key, key)[1], plain, **close)
    found = aten._scaled_dot_product_efficient_attention(query, key, key, mask, True)[1]
    torch.testing.assert_close(found[..., :40], masked, **close)
    assert bool((found[..., 40:] == float("inf")).all())
    found = aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, attn_mask=mask)[1]
    torch.testing.assert_close(found, masked, **close)


def test_the_operators_refuse_what_they_cannot_do_right(on_cpu, active):
    query = torch.randn(2, 3, 7, 8)
    with pytest.raises(RuntimeError, match="dropout_p"):
        aten._scaled_dot_product_flash_attention_for_cpu(query, query, query, 0.5)
    with pytest.raises(RuntimeError, match="return_debug_mask"):
        aten._scaled_dot_product_flash_attention(query, query, query, 0.5, False, True)


def test_dropout_of_the_operators_is_reproduced_in_the_backward(on_cpu):
    query, key, value = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    expected = {}
    for name in ("efficient", "flash"):
        for p in (0.4, 1.0):
            torch.manual_seed(3)
            out = {"efficient": efficient, "flash": flash}[name](query, key, value, dropout_p=p)
            expected[name, p] = out, *torch.autograd.grad(out.square().sum(), (query, key, value))
    torch.manual_seed(3)
    out = fastattn.attention(query, key, value, dropout_p=0.4)
    same = out, *torch.autograd.grad(out.square().sum(), (query, key, value))
    for name in ("efficient", "flash"):
        assert all(torch.equal(x, y) for x, y in zip(expected[name, 0.4], same, strict=True))
        assert not any(x.any() for x in expected[name, 1.0])
