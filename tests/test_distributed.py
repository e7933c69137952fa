"""Two processes that talk through gloo: data parallel, fully sharded and DTensor runs equal those of one process.

One pair of processes serves every check (importing torch takes longer than the checks): they run this file, go through
`CHECKS` together and write down what each rank found.
"""

import copy
import datetime
import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastattn
from fastattn import Mask

WORLD = 2
SECONDS = 240  # for both processes and all checks, on a busy machine; they take about 10
E, H, N, L, S = 16, 4, 4, 7, 9


# What the processes run ---------------------------------------------------------------------------


class Model(nn.Module):
    """Self-attention with weights, an encoder layer and a decoder layer, all converted."""

    def __init__(self):
        super().__init__()
        options = {"batch_first": True, "dtype": torch.float64}
        self.attention = nn.MultiheadAttention(E, H, **options)
        self.encoder = nn.TransformerEncoderLayer(E, H, 32, 0.0, **options)
        self.decoder = nn.TransformerDecoderLayer(E, H, 32, 0.0, **options)
        fastattn.replace_multihead_attention(self)

    def forward(self, x, padding):
        out, weights = self.attention(x, x, x, key_padding_mask=padding)
        memory = self.encoder(out, src_key_padding_mask=padding)
        return self.decoder(x, memory, memory_key_padding_mask=padding), weights


def make_model():
    torch.manual_seed(1)
    return Model()


def make_batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, L, E, generator=generator, dtype=torch.float64)
    return x, torch.arange(L) >= torch.tensor([7, 3, 5, 6])[:, None]


def loss_of(model, x, padding):
    out, weights = model(x, padding)
    return out.square().mean() + weights.square().mean()


def own_share(x):
    return x.chunk(WORLD)[dist.get_rank()]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def check_ddp():
    single = make_model()
    loss_of(single, *make_batch()).backward()
    model = nn.parallel.DistributedDataParallel(make_model())
    loss_of(model, *map(own_share, make_batch())).backward()
    for ours, reference in zip(model.parameters(), single.parameters(), strict=True):
        assert_close(ours.grad, reference.grad)


def check_fsdp():
    """Forward, backward and two steps of the optimizer, each attention sharded by itself and within its model."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    single, model = make_model(), make_model()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.attention, fastattn.MultiheadAttention)
    steps = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (single, model)]
    for _ in range(2):
        for m, optimizer, batch in (
            (single, steps[0], make_batch()),
            (model, steps[1], tuple(map(own_share, make_batch()))),
        ):
            optimizer.zero_grad()
            loss_of(m, *batch).backward()
        for ours, reference in zip(model.parameters(), single.parameters(), strict=True):
            assert_close(whole(ours.grad), reference.grad)
        for optimizer in steps:
            optimizer.step()
    for ours, reference in zip(model.parameters(), single.parameters(), strict=True):
        assert_close(whole(ours), reference)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def compare_dtensor(query, key_value, mask=None, bias=None, heads_kv=H, heads=H, out=None, length=L, **options):
    """Attention and its gradients on DTensors against the same on tensors.

    query, key_value, bias: (axis name or None): how each is sharded. mask: a function of `wrap`, which shards a tensor.
    out: how the result must be sharded; a result that was gathered although it need not be would pass otherwise.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))

    def placed(dim):
        return [Replicate() if dim is None else Shard(dim)]

    torch.manual_seed(3)
    tensors = [draw(N - 1, heads, length, 8), draw(N - 1, heads_kv, S, 8), draw(N - 1, heads_kv, S, 6)]
    dims = [query, key_value, key_value]
    if bias is not None:
        tensors.append(draw(*bias[0]))
        dims.append(bias[1])

    def run(wrap):
        inputs = [wrap(x, dim).requires_grad_() for x, dim in zip(tensors, dims, strict=True)]
        torch.manual_seed(4)
        out, lse = fastattn.attention(
            *inputs[:3],
            mask=None if mask is None else mask(wrap),
            bias=inputs[3] if bias is not None else None,
            return_lse=True,
            **options,
        )
        loss = out.sin().sum() + lse.where(lse > -1e9, 0.0).square().sum()
        return out, lse, *torch.autograd.grad(loss, inputs)

    expected = run(lambda x, dim: x.clone())
    actual = run(lambda x, dim: distribute_tensor(x, mesh, placed(dim)))
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(whole(ours), reference)
    assert actual[0].placements[0] == actual[1].placements[0] == placed(out)[0], actual[0].placements
    return [x.placements[0] for x in actual]


def keep(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[..., 0] = True
    return mask


def check_dtensor_batch():
    """Of a batch of 3 the first process has 2; masks per sequence are sharded with it, a shared bias is not."""
    compare_dtensor(0, 0, out=0)
    placements = compare_dtensor(
        *(0, 0),
        lambda wrap: (
            Mask.key_padding(wrap(keep(N - 1, S), 0))
            & Mask.prefix(wrap(torch.tensor([2, 5, 1]), 0))
            & Mask.dense(wrap(keep(N - 1, 1, L, S), 0))
        ),
        ((1, H, 1, S), None),
        out=0,
    )
    assert placements[-1].is_partial()
    compare_dtensor(0, 0, lambda wrap: Mask.causal(), ((N - 1, 1, L, S), 0), out=0)


def check_dtensor_heads():
    compare_dtensor(1, 1, lambda wrap: Mask.window(3, 2) & Mask.key_lengths(wrap(torch.tensor([2, 9, 5]), None)), out=1)
    compare_dtensor(1, 1, lambda wrap: Mask.dense(wrap(keep(1, H, L, S), 1)), ((N - 1, H, L, S), 1), out=1)
    compare_dtensor(1, 1, heads=3, heads_kv=3, out=1)  # 2 and 1


def check_dtensor_grouped_heads():
    compare_dtensor(1, 1, heads_kv=2, out=1)
    placements = compare_dtensor(1, None, heads_kv=1, out=1)
    assert placements[3].is_partial() and placements[4].is_partial()
    # 3 key heads do not fall in halves with 6 query heads: gathered.
    compare_dtensor(1, 1, heads=6, heads_kv=3, out=None)


def check_dtensor_queries():
    placements = compare_dtensor(2, None, out=2)
    assert [p.is_partial() for p in placements] == [False, False, False, True, True]
    compare_dtensor(2, None, lambda wrap: Mask.key_padding(wrap(keep(N - 1, S), None)), ((1, H, L, 1), 2), out=2)
    ids = torch.arange(L) // 3, torch.arange(S) // 4
    segments = compare_dtensor(
        *(2, None),
        lambda wrap: Mask.segments(wrap(ids[0][None], 1), wrap(ids[1][None], None)),
        ((1, H, 1, S), None),
        out=2,
    )
    assert segments[-1].is_partial()


def check_dtensor_positions():
    """Masks and dropout that depend on the position are not cut at the shard; right after problems that are."""
    compare_dtensor(2, None, out=2)
    compare_dtensor(2, None, lambda wrap: Mask.causal(), out=None)
    compare_dtensor(2, None, lambda wrap: Mask.window(2, 1, "bottom_right"), out=None)
    lengths = torch.tensor([2, 5, 1])
    compare_dtensor(2, None, lambda wrap: Mask.key_lengths(wrap(lengths, None)), out=2)
    compare_dtensor(2, None, lambda wrap: Mask.prefix(wrap(lengths, None)), out=None)
    compare_dtensor(2, None, lambda wrap: Mask.dense(wrap(keep(1, 1, L, S), 2)), out=None)
    for dim in (0, 1):
        compare_dtensor(dim, dim, dropout_p=0.3, out=None)
    compare_dtensor(2, None, dropout_p=0.3, out=None)
    compare_dtensor(None, 2, out=None)  # keys


def check_dtensor_two_dimensions():
    """Batch by heads on a mesh of 1 x 2 and 2 x 1, and heads over both at once."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(3)
    query, key = draw(2, H, L, 8), draw(2, 2, S, 8)
    expected = fastattn.attention(query, key, key, mask=Mask.causal())
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape)
        for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(1)]):
            q, k = (distribute_tensor(x, mesh, placements) for x in (query, key))
            out = fastattn.attention(q, k, k, mask=Mask.causal())
            assert list(out.placements) == placements
            assert_close(out.full_tensor(), expected)


def check_dtensor_module():
    """The packed operator and the weights, by the module itself."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    x, padding = make_batch()

    def run(wrap, module):
        results = []
        for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            module.zero_grad()
            own = wrap(x).requires_grad_()
            outputs = [y for y in module(own, own, own, key_padding_mask=wrap(padding), **options) if y is not None]
            sum(y.square().sum() for y in outputs).backward()
            results += [*outputs, own.grad, *(p.grad.clone() for p in module.parameters())]
        return results

    torch.manual_seed(1)
    module = fastattn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    expected = run(lambda y: y.clone(), module)
    distributed = distribute_module(copy.deepcopy(module), mesh)
    actual = run(lambda y: distribute_tensor(y, mesh, [Shard(0)]), distributed)
    assert actual[0].placements == (Shard(0),)
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(whole(ours), reference)


def check_dtensor_packed_heads_and_weights():
    """The packed operator by heads; weights by batch, heads and queries, averaged ones not by heads."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    from fastattn.attention import _attention_packed

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(3)
    qkv, query, key, bias = draw(N, L, 3, H, 8), draw(N, H, L, 8), draw(N, H, S, 8), draw(1, H, L, L)
    lse = torch.logsumexp(query @ key.transpose(2, 3) / 8**0.5, dim=-1)
    options = {"mask": Mask.causal(), "dropout_p": 0.0, "scale": None, "dropout_seed": None, "backend": None}

    def packed(*tensors):
        return _attention_packed(tensors[0], bias=tensors[1], **options)

    def weights(average_heads):
        return lambda *tensors: (fastattn.attention_weights(*tensors, average_heads=average_heads),)

    def run(function, tensors):
        outputs = function(*(x.requires_grad_() for x in tensors))
        return *outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), tensors)

    everywhere = Replicate()
    for function, tensors, placements, out in (
        (packed, (qkv, bias), (Shard(3), Shard(1)), Shard(1)),
        (packed, (qkv, bias), (Shard(1), Shard(2)), everywhere),
        (weights(True), (query, key, lse), (Shard(0),) * 3, Shard(0)),
        (weights(True), (query, key, lse), (Shard(1),) * 3, everywhere),
        (weights(True), (query, key, lse), (Shard(2), everywhere, Shard(2)), Shard(1)),
        (weights(False), (query, key, lse), (Shard(1),) * 3, Shard(1)),
        (weights(False), (query, key, lse), (Shard(2), everywhere, Shard(2)), Shard(2)),
    ):
        expected = run(function, [x.clone() for x in tensors])
        actual = run(function, [distribute_tensor(x, mesh, [p]) for x, p in zip(tensors, placements, strict=True)])
        assert actual[0].placements == (out,)
        for ours, reference in zip(actual, expected, strict=True):
            assert_close(whole(ours), reference)


def check_dtensor_refuses_mixed_tensors():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    query = distribute_tensor(draw(N, H, L, 8), mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        fastattn.attention(query, query, query, mask=Mask.key_padding(keep(N, L)))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def run_checks(rank, folder):
    from fastattn.integrations import dtensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=SECONDS // 4),
    )
    dtensor.register()
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# The tests ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_equal_one(tmp_path):
    """One test for all checks: spread over test workers, each part would start a pair of processes of its own."""
    logs = [(tmp_path / f"{rank}.log").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(rank), str(tmp_path)], stdout=log, stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pass  # the checks that were not reached are told below
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    problems = []
    for rank in range(WORLD):
        path = tmp_path / f"{rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        problems += [f"rank {rank}, {check}: {problem}" for check, problem in found.items() if problem]
        missing = CHECKS.keys() - found.keys()
        if missing:
            log = (tmp_path / f"{rank}.log").read_text()[-2000:]
            problems.append(f"rank {rank} did not get to {sorted(missing)}: {log}")
    assert not problems, "\n\n".join(problems)


if __name__ == "__main__":
    run_checks(int(sys.argv[1]), Path(sys.argv[2]))
