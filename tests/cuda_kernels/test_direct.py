"""The direct way of CUDA tensors against the operators: who takes it, and that nobody can tell."""

import pytest
import torch

import fastattn
from fastattn import Mask, ops
from fastattn.attention import _attention_packed, _attention_with_seed

B, H, L, S, D = 2, 4, 20, 70, 16


@pytest.fixture
def by_operator(monkeypatch):
    """The names of the calls that went the operators' way."""
    calls = []

    def spied(name):
        original = getattr(ops, name)

        def call(*arguments):
            calls.append(name)
            return original(*arguments)

        return call

    for name in ("attention", "attention_packed", "attention_backward", "attention_packed_backward"):
        monkeypatch.setattr(ops, name, spied(name))
    return calls


def tensors(device, dtype=torch.bfloat16, heads_kv=H, needs_grad=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_(needs_grad)

    return normal(B, H, L, D), normal(B, heads_kv, S, D), normal(B, heads_kv, S, D)


def masks(device):
    keep = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(1)).to(device) < 0.7
    keep[0, 0, 3] = False
    return {
        "none": None,
        "causal": Mask.causal("bottom_right"),
        "padding": Mask.key_padding(keep[:, 0, 0]) & Mask.window(30, 60),
        "lengths": Mask.key_lengths(torch.tensor([5, 70], device=device)),
        "dense": Mask.dense(keep) & Mask.causal("bottom_right"),
        "tensor": keep,
    }


def differentiated(attend, leaves, with_lse=True):
    """The outputs and the gradients of what needs one."""
    out, lse = attend()
    loss = out.float().square().sum() + (lse.where(lse > -torch.inf, 0).sum() if with_lse else 0)
    return out, lse, *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])


def assert_same_both_ways(monkeypatch, by_operator, attend, leaves, **options):
    direct = differentiated(attend, leaves, **options)
    assert by_operator == []
    monkeypatch.setattr(ops, "direct_attention", lambda *_: None)
    monkeypatch.setattr(ops, "direct_attention_packed", lambda *_: None)
    operators = differentiated(attend, leaves, **options)
    assert len(by_operator) == 2
    for ours, theirs in zip(direct, operators, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "lengths", "dense", "tensor"])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_same_bits(monkeypatch, by_operator, device, kind, heads_kv):
    leaves = tensors(device, heads_kv=heads_kv)
    mask = masks(device)[kind]

    def attend():
        return fastattn.attention(*leaves, mask=mask, return_lse=True, backend="cuda")

    assert_same_both_ways(monkeypatch, by_operator, attend, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, H, L, S), (L, S), (B, 1, 1, S)], ids=str)
@pytest.mark.parametrize("of_bias", [True, False])
def test_same_bits_with_a_bias_and_dropout(monkeypatch, by_operator, device, dtype, shape, of_bias):
    leaves = tensors(device, dtype)
    bias = torch.randn(shape, device=device).requires_grad_(of_bias)
    seed = torch.tensor(2**40 + 7, device=device)

    def attend():
        options = {"mask": None, "bias": bias, "dropout_p": 0.3, "scale": 0.2, "dropout_seed": seed}
        return _attention_with_seed(*leaves, **options, backend="cuda")

    assert_same_both_ways(monkeypatch, by_operator, attend, (*leaves, bias), with_lse=of_bias)


def test_same_bits_of_a_packed_projection(monkeypatch, by_operator, device):
    qkv = torch.randn(B, L, 3, H, D, device=device).bfloat16().requires_grad_()
    mask = Mask.key_lengths(torch.tensor([5, 20], device=device))

    def attend():
        options = {"mask": mask, "bias": None, "dropout_p": 0.0, "scale": None, "dropout_seed": None}
        return _attention_packed(qkv, **options, backend="cuda")

    assert_same_both_ways(monkeypatch, by_operator, attend, (qkv,))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_of_some(monkeypatch, by_operator, device, wanted):
    leaves = [x.detach().requires_grad_(n == wanted) for n, x in enumerate(tensors(device))]

    def attend():
        return fastattn.attention(*leaves, return_lse=True, backend="cuda")

    assert_same_both_ways(monkeypatch, by_operator, attend, leaves)


def test_transposed_inputs_are_read_in_place(monkeypatch, by_operator, device):
    leaves = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors(device)]

    def attend():
        return fastattn.attention(*leaves, return_lse=True, backend="cuda")

    assert_same_both_ways(monkeypatch, by_operator, attend, leaves)


def test_use_backend(by_operator, device):
    query, key, value = tensors(device, needs_grad=False)
    with fastattn.use_backend("cuda"):
        out = fastattn.attention(query, key, value)
        with torch.no_grad():
            assert torch.equal(fastattn.scaled_dot_product_attention(query, key, value), out)
        assert by_operator == []
        fastattn.attention(query, key, value, backend="reference")
    assert by_operator == ["attention"]


def test_what_the_operators_do(by_operator, device):
    query, key, value = tensors(device)
    attend = fastattn.attention
    expected = attend(query, key, value, backend="cuda")
    assert by_operator == []
    # A last dimension that is not contiguous is copied.
    columns = key.detach().transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attend(query, columns, value, backend="cuda"), expected) and len(by_operator) == 1
    # What watches, and other backends.
    with torch.profiler.profile():
        assert torch.equal(attend(query, key, value, backend="cuda"), expected) and len(by_operator) == 2
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(attend(query, key, value, backend="cuda"), expected) and len(by_operator) == 3
    torch.func.grad(lambda x: attend(x, key, value, backend="cuda").float().sum())(query)
    assert by_operator[3] == "attention"
    del by_operator[:]
    attend(query, key, value, backend="reference")
    attend(query.double(), key.double(), value.double(), backend="reference")
    assert by_operator == ["attention"] * 2
    with pytest.raises(RuntimeError, match="float64"):
        attend(query.double(), key.double(), value.double(), backend="cuda")


def test_second_derivatives(by_operator, device):
    leaves = tensors(device, torch.float32)

    def second(backend):
        out = fastattn.attention(*leaves, mask=masks(device)["padding"], backend=backend)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    found = second("cuda")
    assert by_operator == ["attention_backward"]  # its formula is differentiable
    for ours, wanted in zip(found, second("reference"), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_batched_gradients(device):
    leaves = tensors(device)
    out = fastattn.attention(*leaves, backend="cuda")
    upstream = torch.randn(3, *out.shape, device=device).to(out.dtype)
    batched = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        for ours, wanted in zip(batched, torch.autograd.grad(out, leaves, upstream[n], retain_graph=True), strict=True):
            torch.testing.assert_close(ours[n], wanted, rtol=2e-2, atol=2e-2)


def test_saved_tensors_are_watched(device):
    leaves = tensors(device)
    mask = masks(device)["padding"]
    out = fastattn.attention(*leaves, mask=mask, backend="cuda")
    mask.tensors()[0].logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


def test_bad_inputs_are_named(device):
    query, key, value = tensors(device)
    cases = [
        ((query, key[:, :3], value[:, :3]), {}),
        ((query, key, value[:, :, 1:]), {}),
        ((query[0], key, value), {}),
        ((query, key.float(), value), {}),
        ((query, key, value), {"bias": torch.zeros(L, S, device=device).half()}),
        ((query, key, value), {"bias": torch.zeros(L, S + 1, device=device)}),
        ((query, key, value), {"mask": torch.ones(L, S + 1, dtype=torch.bool, device=device)}),
        ((query, key, value), {"mask": torch.ones(L, S, device=device)}),
        ((query, key, value), {"mask": Mask.key_lengths(torch.ones(3, dtype=torch.int64, device=device))}),
        ((query, key, value), {"scale": float("inf")}),
        ((query, key, value), {"dropout_p": 1.0}),
        ((query.to("meta"), key, value), {}),
    ]
    for arguments, options in cases:
        messages = []
        for backend in ("cuda", "reference"):
            with pytest.raises((TypeError, ValueError)) as error:
                fastattn.attention(*arguments, **options, backend=backend)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
