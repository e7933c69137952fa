"""What the Triton backend does on the host: it launches, and never waits for the device nor copies between the two.

The public functions run on meta tensors, which have no values that anybody could wait for, operators as their Triton
implementations instead of their fakes, and every call of torch that they make is looked at; launches do nothing. A wait
would also end the capture of a CUDA graph.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn import Mask, dispatch, ops

if dispatch.TRITON_FAILURE is not None:
    pytest.skip(dispatch.TRITON_FAILURE, allow_module_level=True)
if dispatch.TRITON_INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not launched", allow_module_level=True)

from triton.runtime.jit import JITFunction

from fastattn.backends.triton import config

# What has to see values, and so waits for them.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "repeat_interleave")


class Wait(AssertionError):
    """The host would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Refuses what waits, and runs the operators' implementations in place of their fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == ops.NAMESPACE:
            with self:
                return ops._KERNELS[name][0](*args, **(kwargs or {}))
        if name.startswith(WAITS):
            raise Wait(str(func))
        wanted = [kwargs["device"]] if kwargs and kwargs.get("device") else []
        devices = {x.device for x in tree_leaves(args) if isinstance(x, torch.Tensor)} | set(wanted)
        if len(devices) > 1:
            raise Wait(f"{func} works on {' and '.join(sorted(map(str, devices)))}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Watches; the names of the kernels launched."""
    names = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: names.append(self.__name__))
    monkeypatch.setattr(config, "capability", lambda tensor: 90)
    record = replace(dispatch.BACKENDS["triton"], why_not=lambda problem: [])
    monkeypatch.setitem(dispatch.BACKENDS, "triton", record)
    with NoWaits(), fastattn.use_backend("triton"):
        yield names


def on_gpu(*shape, dtype=torch.float16, **more):
    return torch.zeros(*shape, dtype=dtype, device="meta", **more)


def masks(B, H, L, S):
    lengths = on_gpu(B, dtype=torch.int32)
    keep, ids = on_gpu(B, S, dtype=torch.bool), (on_gpu(B, L, dtype=torch.int64), on_gpu(B, S, dtype=torch.int64))
    dense = Mask.dense(on_gpu(B, 1, L, S, dtype=torch.bool))
    return {
        "none": None,
        "causal": Mask.causal("bottom_right"),
        "lengths": Mask.prefix(lengths) & Mask.key_lengths(lengths) & Mask.window(9, None),
        "padding": Mask.key_padding(keep),
        "segments": Mask.segments(*ids) & Mask.segments(*ids),
        "dense": dense,
        "many": Mask.causal() & dense & Mask.dense(on_gpu(1, H, L, 1, dtype=torch.bool)) & Mask.segments(*ids),
        "bool": on_gpu(L, S, dtype=torch.bool),
    }


@pytest.mark.parametrize("kind", ["none", "causal", "lengths", "padding", "segments", "dense", "many", "bool"])
@pytest.mark.parametrize("length", [300, 49], ids=["long", "short"])
def test_attention_never_waits(launched, kind, length):
    query, key, value = (on_gpu(2, h, length, 64, requires_grad=True) for h in (4, 2, 2))
    bias = on_gpu(1, 4, 1, length, requires_grad=True)
    mask = masks(2, 4, length, length)[kind]
    options = dict(mask=mask, bias=bias, dropout_p=0.1)
    out, lse = fastattn.attention(query, key, value, return_lse=True, **options)
    weights = fastattn.attention_weights(query, key, lse, mask=mask, bias=bias)
    assert out.shape == query.shape and lse.shape == query.shape[:3] and weights.shape == (2, length, length)
    loss = out.float().sum() + lse.sum() + weights.float().sum()
    gradients = torch.autograd.grad(loss, (query, key, value, bias))
    assert [x.shape for x in gradients] == [x.shape for x in (query, key, value, bias)]
    path = "short" if length <= config.SHORT_KEYS else "dkv"
    assert {f"attention_backward_{path}_kernel", "attention_backward_dbias_kernel"} <= set(launched)
    assert ("mask_tiles_kernel" in launched) == (kind in ("dense", "many", "bool"))


def test_packed_sequences_and_modules_never_wait(launched):
    x = on_gpu(60, 2, 32)
    lengths = on_gpu(4, dtype=torch.int32)
    fastattn.attention_varlen(x, x, x, lengths, lengths, mask=Mask.causal())
    tokens = on_gpu(2, 70, 64, dtype=torch.float32)
    module = fastattn.MultiheadAttention(64, 4, batch_first=True, device="meta", dtype=torch.float32)
    out, weights = module(tokens, tokens, tokens, key_padding_mask=on_gpu(2, 70, dtype=torch.bool))
    assert out.shape == tokens.shape and weights.shape == (2, 70, 70)
    (out.sum() + weights.sum()).backward()
    assert {"attention_forward_short_kernel", "attention_weights_kernel"} <= set(launched)


@pytest.mark.parametrize("reduction", ["masked_mean", "mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [False, True])
def test_losses_never_wait(launched, reduction, normalize):
    input, target = (on_gpu(2, 3, 8, 8, dtype=torch.float32, requires_grad=grad) for grad in (True, False))
    mask = on_gpu(2, 2, 2, dtype=torch.bool)
    options = dict(patch_size=4, reduction=reduction, normalize_target=normalize)
    loss = fastattn.masked_mse_loss(input, target, mask, **options)
    assert loss.shape == (input.shape if reduction == "none" else ())
    loss.backward(torch.ones_like(loss))
    assert input.grad.shape == input.shape
    assert set(launched) == {"masked_loss_kernel"}


@pytest.mark.parametrize("kind", ["none", "causal", "lengths", "padding", "dense"])
def test_additive_attention_never_waits(launched, kind):
    query, key = (on_gpu(2, length, 64, requires_grad=True) for length in (70, 300))
    value, weight = on_gpu(2, 300, 32, requires_grad=True), on_gpu(64, dtype=torch.float32, requires_grad=True)
    mask = masks(2, 1, 70, 300)[kind]
    out, lse = fastattn.additive_attention(query, key, value, weight, mask=mask, return_lse=True)
    assert out.shape == (2, 70, 32) and lse.shape == (2, 70)
    gradients = torch.autograd.grad(out.float().sum() + lse.sum(), (query, key, value, weight))
    assert [x.shape for x in gradients] == [x.shape for x in (query, key, value, weight)]
    assert {f"additive_backward_{name}_kernel" for name in ("dq", "dkv")} <= set(launched)


@pytest.mark.parametrize("reduction", ["masked_mean", "mean", "sum"])
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_losses_never_wait(launched, reduction, normalize):
    hidden, weight, bias = (on_gpu(*shape, requires_grad=True) for shape in ((2, 9, 24), (40, 24), (40,)))
    target, mask = on_gpu(2, 9, 40), on_gpu(2, 9, dtype=torch.bool)
    options = dict(reduction=reduction, normalize_target=normalize)
    loss = fastattn.linear_masked_mse_loss(hidden, weight, bias, target, mask, **options)
    loss.backward()
    assert loss.shape == () and bias.grad.shape == bias.shape
    assert {f"linear_loss_{name}_kernel" for name in ("slopes", "hidden", "weight")} <= set(launched)
    assert ("linear_loss_moments_kernel" in launched) == normalize


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x.cpu(),
        lambda x: x.view(1).tolist(),
        lambda x: x.view(1).nonzero(),
        lambda x: torch.tensor([3.0]).to(x.device),
    ],
    ids=["item", "bool", "cpu", "tolist", "nonzero", "from the host"],
)
def test_the_watch_sees_a_wait(launched, wait):
    with pytest.raises(Wait):
        wait(on_gpu(()))
