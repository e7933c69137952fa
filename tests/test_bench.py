"""The benchmark: its counting and timing rules, the whole path on tiny problems, and what it says of bad usage."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastattn
from fastattn import cli

pytest.importorskip("matplotlib", reason="the bench extra is not installed")
PIL_Image = pytest.importorskip("PIL.Image", reason="the bench extra is not installed")

from fastattn.bench import (  # noqa: E402
    checks,
    compare,
    images,
    memory,
    models,
    records,
    report,
    runner,
    scaling,
    simmim,
    suites,
    tables,
    targets,
    timing,
)
from fastattn.bench import cli as bench_cli  # noqa: E402
from fastattn.bench import workloads as w  # noqa: E402
from fastattn.bench.contenders import (  # noqa: E402
    OURS,
    PROJECTIONS,
    STOCK,
    STOCK_SLOW,
    Bound,
    make_mha,
    user_contender,
)

TINY = w.AttentionCase(1, 2, 2, 40, 40, 8)


class FakeSentinel:
    """Rates by script, then constant."""

    device = torch.device("cpu")

    def __init__(self, rates: list[float] | None = None) -> None:
        self.rates = rates or []

    def rate(self) -> float:
        return self.rates.pop(0) if self.rates else 100.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small only get slower with threads, above all beside other test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the commands without what takes long: fresh processes, the sentinel, extra rounds."""
    peak = memory.PeakMemory(peak=10_000_000, extra=2_000_000, outputs=1_000)
    monkeypatch.setattr(memory, "measure_fresh", lambda job: peak)
    monkeypatch.setattr(bench_cli, "Sentinel", lambda device: FakeSentinel())
    monkeypatch.setattr(simmim, "Sentinel", lambda device: FakeSentinel())
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0.0)


def run_cli(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    return int(left.value.code or 0)


# Timing ---------------------------------------------------------------------------------------------------------------


def test_percentiles_are_interpolated():
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert timing.percentile(values, 50) == 3.0
    assert timing.percentile(values, 20) == pytest.approx(1.8)
    assert timing.percentile(values, 80) == pytest.approx(4.2)


def test_samples_with_a_slow_sentinel_are_dropped():
    kept = timing.keep_samples([[100.0, 89.0, 90.0], [99.0, 50.0, 100.0]])
    assert kept == [[True, False, True], [True, False, True]]


def test_a_timing_counts_its_kept_samples_only():
    seconds, sentinel, kept = (1.0, 2.0, 3.0, 90.0), (10.0, 10.0, 10.0, 5.0), (True, True, True, False)
    result = timing.Timing(seconds, sentinel, kept)
    assert not result.noisy
    assert result.median == 2.0
    assert result.sentinel_share(40.0) == 2.0  # 40 FLOP / 2 s / 10 FLOP/s
    summary = result.summary()
    assert (summary["rounds"], summary["kept"]) == (4, 3)
    assert summary["samples_s"] == [1.0, 2.0, 3.0, 90.0]


def test_a_timing_with_too_few_kept_samples_is_marked_and_uses_all():
    result = timing.Timing((1.0, 2.0, 3.0), (1.0, 1.0, 1.0), (True, False, False))
    assert result.noisy
    assert result.median == 2.0


def test_ratios_are_formed_round_by_round():
    peer = timing.Timing((2.0, 40.0, 6.0, 8.0), (1.0,) * 4, (True, False, True, True))
    ours = timing.Timing((1.0, 1.0, 2.0, 4.0), (1.0,) * 4, (True, True, True, True))
    assert timing.round_ratios(peer, ours) == [2.0, 3.0, 2.0]


def test_contenders_are_interleaved_and_disturbed_rounds_made_up_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0.0)
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
    # One sentinel before each round and one after each sample: the first round is slow throughout.
    result = timing.measure(calls, FakeSentinel([10.0, 10.0, 10.0]), rounds=3)  # type: ignore[arg-type]
    assert result["A"].kept == (False, True, True, True)
    assert "".join(order) == "AB" + "ABABABAB"  # the first of each tells how often to repeat it


# Workloads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "window", "padded", w.RANDOM_KEYS, "random", "block-sparse", "segments"])
@pytest.mark.parametrize("lengths", [(96, 96), (33, 70)])
def test_our_mask_means_what_the_peers_are_given(mask: str, lengths: tuple[int, int]):
    case = replace(TINY, batch=2, len_q=lengths[0], len_k=lengths[1], mask=mask)
    inputs = w.attention_inputs(case)
    keep = inputs.make_keep().expand(2, 2, *lengths)
    assert torch.equal(inputs.make_mask().to_dense(2, 2, *lengths), keep)
    b, i, j = torch.arange(2)[:, None, None], torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    for_flex = inputs.mask_mod(b if inputs.mask_of_batch else torch.zeros_like(b), torch.zeros_like(b), i, j)
    assert torch.equal(for_flex.expand(2, *lengths), keep[:, 0])
    assert w.attending_pairs(case, inputs) == int(keep.sum())
    assert 0 < int(keep.sum()) < keep.numel()
    assert w.executed_pairs(case, inputs) == w.executed_pairs(case, replace(inputs, band=None))


def test_flops_count_attending_pairs_and_executed_tiles():
    case = w.AttentionCase(2, 4, 2, 96, 128, 16, mask="padded", backward=True)
    inputs = w.attention_inputs(case)
    pairs = 2 * 4 * 96 * 64  # half of the keys
    assert w.attending_pairs(case, inputs) == pairs
    assert w.executed_pairs(case, inputs) == pairs  # the half is exactly one column of tiles
    assert w.attention_flops(case, pairs) == pytest.approx(4 * 16 * pairs * 3.5)
    causal = replace(case, mask="causal", len_k=96)
    inputs = w.attention_inputs(causal)
    assert w.attending_pairs(causal, inputs) == 2 * 4 * 96 * 97 // 2
    alone = replace(case, backward_alone=True)
    assert w.attention_flops(alone, pairs) == pytest.approx(4 * 16 * pairs * 2.5) and alone.step == "backward"
    # Tiles of 48 x 64: the upper right one is empty of the four, and the right ones are 32 keys wide.
    assert w.executed_pairs(causal, inputs) == 2 * 4 * (48 * 64 + 48 * 64 + 48 * 32)


def test_loss_bytes_are_the_counted_elements_and_the_gradient():
    case = w.LossCase(2, 3, 160, 32, masked=0.6, backward=True)
    inputs = w.loss_inputs(case)
    assert int(inputs.mask.sum()) == 2 * 15
    assert w.loss_bytes(case, inputs) == pytest.approx(8.8 * 2 * 3 * 160 * 160)
    forward = replace(case, backward=False)
    assert w.loss_bytes(forward, w.loss_inputs(forward)) == pytest.approx(4.8 * 2 * 3 * 160 * 160)


def test_block_sparse_masks_leave_no_row_empty_and_most_tiles():
    case = w.AttentionCase(1, 1, 1, 1024, 1024, 8, mask="block-sparse")
    keep = w.attention_inputs(case).make_keep()
    tiles = keep.unflatten(0, (16, 64)).unflatten(2, (16, 64)).any(3).any(1)
    assert bool(keep.any(1).all())
    assert 0.06 < float(tiles.float().mean()) < 0.16


def test_the_quick_suite_holds_the_promised_speeds():
    promised = {
        (plan.case.mask, plan.case.backward): plan.case.condition
        for plan in suites.attention_plans(quick=True)
        if plan.case.condition is not None
    }
    assert promised == {
        ("dense", False): w.Condition("sdpa", 1.0),
        ("dense", True): w.Condition("sdpa", 1.0),
        ("padded", False): w.Condition("sdpa", 2.0),
        ("padded", True): w.Condition("sdpa", 2.0),
    }
    base = w.AttentionCase(2, 8, 8, 1024, 1024, 64, mask="padded", backward=True, condition=w.Condition("sdpa", 2.0))
    assert base in [plan.case for plan in suites.attention_plans(quick=True)]


# Checks ---------------------------------------------------------------------------------------------------------------

MODULE = """
import torch.nn.functional as F
from torch import Tensor

def right(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)

def unscaled(query, key, value, attn_mask=None, is_causal=False):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=1.0)

def forgets_to_rescale(query, key, value, attn_mask=None, dropout_p=0.0):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p) * (1 - dropout_p)

def raises(query, key, value, attn_mask=None):
    raise RuntimeError("no such head dim\\nand more lines")

def like_ours(query, key, value, *, mask=None, bias=None):
    batch, heads, length, _ = query.shape
    dense = None if mask is None else mask.to_dense(batch, heads, length, key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, dense)

not_a_function = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "kernels_under_work"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def one(plan: runner.Plan, contender: str | None = None) -> dict[str, records.Record]:
    """The records of a case by contender."""
    user = [] if contender is None else [user_contender(contender)]
    found = runner.run_case(plan, FakeSentinel(), rounds=3, max_seconds=1.0, user=user)  # type: ignore[arg-type]
    assert report.render(records.environment(), found).endswith("</html>\n")  # every figure can be written
    return {record["contender"]: record for record in found}


@pytest.mark.parametrize("mask", [*w.MASK_KINDS, w.RANDOM_KEYS, "bias-batch", "bias-shared"])
def test_every_mask_kind_passes_the_check(mask: str):
    found = one(runner.Plan(replace(TINY, mask=mask, backward=True), peers=frozenset({"sdpa", "eager"})))
    for name in (OURS, "sdpa", "eager"):
        assert found[name]["status"] == "ok", found[name]["reason"]
        assert found[name]["time"]["median_s"] > 0
        assert not found[name].keys() & records.environment().keys()  # a written record has both
        assert found[name]["worst_error"] < 1e-5
    assert set(found[OURS]["errors"]) == {"out", "dq", "dk", "dv"} | ({"dbias"} if mask in w.BIASES else set())
    assert found["sdpa"]["ratio"]["median"] > 0


@pytest.mark.parametrize("function", ["right", "like_ours"])
@pytest.mark.parametrize("mask", ["causal", "padded"])
def test_a_users_function_is_timed_when_it_is_right(module: str, function: str, mask: str):
    found = one(runner.Plan(replace(TINY, mask=mask), peers=frozenset({"sdpa"})), f"{module}:{function}")
    record = found[f"{module}:{function}"]
    assert record["status"] == "ok", record["reason"]
    assert record["useful_flops"] > 0


@pytest.mark.parametrize(
    ("function", "mask", "status", "reason"),
    [
        ("unscaled", "dense", "failed check", "out"),
        ("forgets_to_rescale", "dropout", "failed check", "row sum"),
        ("raises", "dense", "failed", "no such head dim"),
        ("like_ours", "dropout", "failed", "dropout_p"),
    ],
)
def test_no_speed_for_a_function_that_is_wrong(module: str, function: str, mask: str, status: str, reason: str):
    found = one(runner.Plan(replace(TINY, mask=mask), peers=frozenset({"sdpa"})), f"{module}:{function}")
    record = found[f"{module}:{function}"]
    assert record["status"] == status
    assert reason in record["reason"] and "\n" not in record["reason"]
    assert not {"time", "useful_flops", "ratio", "prepare", "memory"} & set(record)
    assert tables.cell(record, "time") == ""
    assert found[OURS]["status"] == "ok", found[OURS]["reason"]


def test_the_terminal_shows_the_failure_in_place_of_the_speed(
    module: str, short: None, capsys: pytest.CaptureFixture[str]
):
    arguments = ["bench", "attention", "--quick", "--shapes", "1,2,40,8", "--masks", "dense"]
    assert run_cli([*arguments, "--contender", f"{module}:unscaled"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"unscaled: failed check: out: \S.* over the bound", shown), shown
    assert not re.search(r"unscaled .* ms", shown)


def test_a_condition_is_flagged_and_judged():
    met = replace(TINY, condition=w.Condition("sdpa", 1e-6))
    missed = replace(TINY, condition=w.Condition("sdpa", 1e6))
    found = [one(runner.Plan(case, peers=frozenset({"sdpa"})))["sdpa"] for case in (met, missed)]
    flags = tables.conditions(found)
    assert [flag["pass"] for flag in flags] == [True, False]
    assert flags[0]["measured"] == found[0]["ratio"]["median"]
    assert flags[1]["promise"] == "at least 1e+06 × sdpa"


def test_problems_too_long_for_float64_are_checked_shorter():
    long = w.AttentionCase(1, 1, 1, 16384, 16384, 8, mask="window", window=3)
    assert checks.checked_form(long) == replace(long, len_q=1024, len_k=1024)
    assert checks.checked_form(replace(long, len_q=1)) == replace(long, len_q=1)
    assert checks.checked_form(replace(TINY, mask="dropout")) == TINY
    assert checks.checked_form(w.MhaCase(1, 4096, 512, 8)).length == 1024


def test_the_backward_alone_leaves_the_forward_out_of_the_step():
    forwards = []
    x = torch.ones(3, requires_grad=True)

    def forward() -> torch.Tensor:
        forwards.append(1)
        return x * x

    bound = Bound(forward, {"x": x}, torch.ones(3), backward_alone=True)
    for _ in range(3):
        (gradient,) = bound.step()  # type: ignore[misc]
        assert torch.equal(gradient, 2 * torch.ones(3))
    assert len(forwards) == 1


@pytest.mark.parametrize("mask", suites.MHA_MASKS)
def test_the_module_runs_beside_torchs(mask: str):
    found = one(runner.Plan(w.MhaCase(2, 24, 32, 4, mask=mask)))
    for name in (OURS, "nn.MultiheadAttention"):
        assert found[name]["status"] == "ok", found[name]["reason"]
        assert {"out", "weights", "x", "in_proj_weight"} <= set(found[name]["errors"])
    assert found["nn.MultiheadAttention"]["ratio"]["median"] > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"backward": False, "need_weights": False, "mask": "padded"},
        {"backward": False},
        {"len_k": 40, "need_weights": False, "mask": "padded"},
        {"autocast": True},
        {"encoder_layer": True, "mask": "padded"},
        {"encoder_layer": True, "backward": False},
    ],
    ids=str,
)
def test_every_layer_passes_the_check(changed: dict[str, object]):
    case = w.MhaCase(2, 24, 32, 4, **changed)  # type: ignore[arg-type]
    found = one(runner.Plan(case, suites._layer_peers(case)))
    inference = not case.backward
    assert set(found) == {OURS, STOCK} | ({STOCK_SLOW} if inference else set())
    expected = {"out"} | ({"weights"} if case.need_weights and not case.encoder_layer else set())
    expected |= {"x"} if case.backward else set()
    expected |= {"memory"} if case.backward and case.len_k else set()
    for record in found.values():
        assert record["status"] == "ok", record["reason"]
        assert {name for name in record["errors"] if "_" not in name and "." not in name} == expected
    assert found[STOCK]["ratio"]["median"] > 0 and found[OURS]["useful_flops"] > 0


def test_ours_is_inside_the_encoder_layer():
    case = w.MhaCase(2, 24, 32, 4, encoder_layer=True)
    stock, ours = make_mha(case), make_mha(case, fastattn.MultiheadAttention)
    assert type(stock.self_attn) is torch.nn.MultiheadAttention
    assert type(ours.self_attn) is fastattn.MultiheadAttention
    for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layers_are_counted():
    case = w.MhaCase(2, 10, 16, 4, backward=False)
    assert w.mha_flops(case) == 8 * 2 * 10 * 16**2 + 4 * 2 * 10 * 10 * 16
    cross = replace(case, len_k=30, mask="padded")
    assert w.mha_flops(cross) == 4 * 2 * (10 + 30) * 16**2 + 4 * 2 * 10 * 15 * 16
    inner = 2 * 2 * 2 * 10 * 16 * 64  # two products of width 64
    assert w.mha_flops(replace(case, encoder_layer=True)) == w.mha_flops(case) + inner
    assert w.mha_flops(replace(case, backward=True)) == 3 * 8 * 2 * 10 * 16**2 + 3.5 * 4 * 2 * 10 * 10 * 16


def test_a_gpu_gets_problems_of_its_size():
    for plans in (suites.additive_plans, suites.loss_plans):
        small, large = (plans(False, "bfloat16", device=device) for device in ("cpu", "cuda"))
        assert all(plan.case.device == "cuda" and plan.case.dtype == "bfloat16" for plan in large)
        assert max(plan.case.batch for plan in large) > max(plan.case.batch for plan in small)
    assert {plan.case.backward for plan in suites.additive_plans(True, backward=True)} == {True}
    assert any(isinstance(plan.case, w.HeadCase) for plan in suites.loss_plans(True, device="cuda"))


def test_the_suites_hold_training_and_inference_with_and_without():
    layers = [plan.case for plan in suites.mha_plans(quick=False)]
    seen = {(c.length, c.mask, c.backward, c.need_weights) for c in layers if not c.encoder_layer}
    for length in (197, 512):
        assert {(length, m, b, n) for m in ("dense", "padded") for b in (True, False) for n in (True, False)} <= seen
    assert any(c.len_k for c in layers) and any(c.autocast for c in layers) and any(c.encoder_layer for c in layers)
    assert len({c.title for c in layers}) == len(layers)  # runs are compared by title
    found = [plan.case for plan in suites.model_plans(quick=False)]
    assert {c.model for c in found} == set(models.MODELS)
    assert {(c.padded, c.backward) for c in found if c.model == "t5"} == {(p, b) for p in (0, 1) for b in (0, 1)}
    assert any(c.attentions for c in found) and {c.model for c in found if c.new_tokens} == {"llama", "gpt2"}
    assert len({c.title for c in found}) == len(found)
    decoding = [plan.case for plan in suites.attention_plans(quick=True) if plan.case.len_q == 1]
    assert {(c.mask, c.dtype) for c in decoding} == {
        (m, d) for m in ("dense", "padded") for d in ("float32", "bfloat16")
    }


def test_decoding_runs_beside_sdpa():
    found = one(runner.Plan(w.AttentionCase(1, 8, 2, 1, 96, 16, mask="padded"), peers=frozenset({"sdpa"})))
    assert found[OURS]["status"] == found["sdpa"]["status"] == "ok"


# transformers ---------------------------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TINY_MODEL = w.ModelCase("bert", 2, 24, padded=True, width=32, layers=1)


@needs_transformers
@pytest.mark.parametrize(
    "case",
    [
        TINY_MODEL,
        replace(TINY_MODEL, padded=False, backward=False, attentions=True),
        replace(TINY_MODEL, model="llama"),
        replace(TINY_MODEL, model="llama", backward=False, padded=False, new_tokens=4),
        replace(TINY_MODEL, model="gpt2"),
        replace(TINY_MODEL, model="t5"),
        replace(TINY_MODEL, model="vit", padded=False, length=48),
        replace(TINY_MODEL, model="swin", padded=False, length=56),
        replace(TINY_MODEL, model="mae", padded=False, length=64),
    ],
    ids=lambda case: case.title,
)
def test_a_model_runs_with_every_implementation(case: w.ModelCase):
    found = one(runner.Plan(case))
    assert set(found) == {OURS, "sdpa", "eager"}
    for name, record in found.items():
        if name == "sdpa" and case.attentions:
            assert record["status"] == "unavailable" and "weights" in record["reason"]
            continue
        assert record["status"] == "ok", record["reason"]
        assert "out" in record["errors"] and ("weights" in record["errors"]) == case.attentions
        assert any("q" in n or "attn" in n or "Attention" in n for n in record["errors"]) or not case.backward
        assert record["items_per_s"] > 0 and record["item"] in tables.cell(record, "a second")
    assert found["eager"]["ratio"]["median"] > 0


@needs_transformers
def test_a_model_that_forgets_its_mask_gets_no_speed():
    check = checks.Check(TINY_MODEL)
    model, inputs = models.make_model(TINY_MODEL, OURS), models.model_inputs(TINY_MODEL)
    right = models.bind_model(TINY_MODEL, model, inputs).results()
    check.set_peer(models.bind_model(TINY_MODEL, models.make_model(TINY_MODEL, "eager"), inputs).results())
    assert check.judge(right).ok
    full = torch.ones_like(inputs["attention_mask"])
    wrong = models.bind_model(replace(TINY_MODEL, padded=False), model, {**inputs, "attention_mask": full}).results()
    assert "out" in check.judge({**right, "out": wrong["out"]}).message
    name = "bert.encoder.layer.0.attention.self.value.weight"
    assert name in check.judge({**right, name: right[name] * 1.001}).message


def test_without_transformers_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    integration = importlib.import_module("fastattn.integrations.transformers")
    monkeypatch.setattr(integration, "_MISSING", ImportError("No module named 'transformers'"))
    assert run_cli(["bench", "transformers"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and re.search("pip install .*transformers", message), message


@needs_transformers
def test_the_suites_of_layers_and_models_on_the_command_line(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plan = runner.Plan(replace(TINY_MODEL, backward=False), rounds=3, seconds=0.1)
    monkeypatch.setattr(suites, "model_plans", lambda quick, device: [plan])
    for suite, options in (("mha", ["--quick", "--backward", "--shapes", "1,2,16x24,8"]), ("transformers", [])):
        path = tmp_path / f"{suite}.jsonl"
        assert run_cli(["bench", suite, *options, "--rounds", "3", "--json", str(path)]) == 0
        shown = capsys.readouterr().out
        written = records.read(path)
        assert {r["suite"] for r in written} == {suite} and all(r["title"] in shown for r in written)
        # The first run of a comparison is as good as the second.
        assert CliRunner().invoke(bench_cli.bench, ["--compare", str(path), str(path)]).output == "no regression\n"
        readme = tmp_path / "README.md"
        marks = compare.marks(written)
        assert marks[0] == f"<!-- measured-{suite}:begin -->"
        readme.write_text(f"above\n<!-- measured:begin -->\n<!-- measured:end -->\n{marks[0]}\nold\n{marks[1]}\n")
        compare.write_readme(readme, written)
        text = readme.read_text()
        assert text.startswith("above\n<!-- measured:begin -->\n<!-- measured:end -->\n") and "old" not in text
        ours = [r["title"] for r in written if r["contender"] == OURS]
        assert len(ours) == (4 if suite == "mha" else 1) and all(f"| {title} |" in text for title in ours)


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_the_loss_runs_beside_the_authors(kind: str):
    found = one(runner.Plan(w.LossCase(2, 3, 64, 32, kind=kind)))
    for name in (OURS, "eager"):
        assert found[name]["status"] == "ok", found[name]["reason"]
        assert set(found[name]["errors"]) == {"out", "dinput"}
        assert found[name]["bytes_per_s"] > 0


# Targets --------------------------------------------------------------------------------------------------------------


def test_the_rows_hold_the_table_of_targets():
    plans = targets.target_plans()
    assert len({plan.row for plan in plans}) == len({plan.case.title for plan in plans}) == len(plans)
    asked = {plan.row: {(t.beside, t.at_least) for t in plan.targets} for plan in plans}
    assert asked["forward dense, D = 128"] == {("sdpa", 1.3), ("sentinel", 1.0)}
    assert asked["backward, half of the keys padded"] == {("sdpa", 2.2), ("sentinel", 0.85)}
    assert asked["MultiheadAttention training step (2, 1024, 512)"] == {(STOCK, 2.0)}
    assert asked["masked mse, 60 % masked, forward + backward"] == {("eager", 5.0), ("compile", 2.0), ("copy", 0.8)}
    assert all(plan.targets for plan in plans)
    causal = targets.target_plans(quick=True, named=("causal",))
    assert {plan.rounds for plan in causal} == {3} and all("causal" in plan.row for plan in causal)
    some = [plan.row for plan in targets.target_plans(named=("causal", "Swin"))]
    assert some == [plan.row for plan in plans if "causal" in plan.row or "Swin" in plan.row]
    assert len(some) > len(causal) > 0


BESIDE_SDPA, BESIDE_EAGER = w.Target("sdpa", 1e-9), w.Target("eager", 1e-9)
TINY_ROWS = [
    targets._row(
        "half padded", replace(TINY, mask="padded", backward=True, backward_alone=True), w.Target("sdpa", 1e-9)
    ),
    targets._row("map included", replace(TINY, mask="random", raw_mask=True), w.Target(w.SENTINEL, 1e9)),
    targets._row("layer", w.MhaCase(1, 12, 16, 2), w.Target(STOCK, 1e-9), peers=frozenset({PROJECTIONS})),
    targets._row("layer's memory", w.MhaCase(1, 12, 16, 2, mask="padded"), w.Target(STOCK, 2.0, of="memory")),
    targets._row("loss", w.LossCase(2, 3, 64, 32, backward=False), BESIDE_EAGER, w.Target(w.COPY, 1e-12)),
    targets._row("weights", w.WeightsCase(1, 2, 24, 8, backward=True), BESIDE_EAGER),
    targets._row("additive", w.AdditiveCase(1, 12, 16, backward=True), w.Target(w.ELEMENTS, 1.0), BESIDE_EAGER),
    targets._row("head", w.HeadCase(2, 9, 16, 8), BESIDE_EAGER),
]


def test_the_targets_on_the_command_line(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(targets, "_plans", lambda: TINY_ROWS)
    path = tmp_path / "r.jsonl"
    arguments = ["bench", "targets", "--threads", "1", "--json", str(path), "--report", str(tmp_path / "out")]
    assert run_cli(arguments) == 0
    shown = capsys.readouterr().out
    assert "Targets: 8 of 10 met" in shown, shown
    assert re.search(r"map included +≥ 1e\+09 of the sentinel +\S.* MISSED", shown)
    assert re.search(r"layer's memory +≤ 1/2 of nn.MultiheadAttention +1/1.0 .*MISSED", shown)
    assert "the projections alone leave" in shown

    written = records.read(path)
    assert all(r["status"] == "ok" for r in written if r["record"] == "result"), written
    judged = {(r["row"], r["beside"]): r for r in written if r["record"] == "target"}
    assert len(judged) == 10 and {r["threads"] for r in written} == {1}
    assert judged["half padded", "sdpa"]["measured"]["median"] > 0 and judged["half padded", "sdpa"]["sentinel"]
    # A copy of the pictures moves 2 x 98304 bytes, the loss reads 5 of 8 patches of two pictures.
    by_name = {r["contender"]: r for r in written if r["record"] == "result" and r["suite"] == "loss"}
    share, ratio = judged["loss", "copy"]["measured"]["median"], by_name["copy"]["ratio"]["median"]
    assert share == pytest.approx(ratio * by_name[OURS]["bytes"] / (2 * 98304))
    assert "errors" in by_name["copy"] and by_name["copy"]["errors"] is None

    assert "Targets" in (tmp_path / "out" / "report.html").read_text()
    readme = tmp_path / "README.md"
    begin, end = compare.marks(written)
    assert begin == "<!-- measured-targets:begin -->"
    readme.write_text(f"{begin}\n{end}\n")
    compare.write_readme(readme, written)
    assert "| half padded | ≥ 1e-09 × sdpa | " in readme.read_text()
    assert CliRunner().invoke(bench_cli.bench, ["--compare", str(path), str(path)]).output == "no regression\n"


def target(run: int, median: float | None, at_least: float = 1.2) -> records.Record:
    measured = None if median is None else {"median": median, "p20": median, "p80": median}
    judged = {"record": "target", "row": "dense", "title": "t", "beside": "sdpa", "of": "time", "at_least": at_least}
    judged |= {"measured": measured, "sentinel": {"median": 0.9}, "limit": None, "noisy": False, "run": run}
    return judged | {"pass": median is not None and median >= at_least}


def test_a_row_is_met_when_all_of_its_runs_are():
    (line,) = targets.rows([target(1, 1.3), target(2, 1.25), target(3, 1.2)])
    assert line == (
        ["dense", "≥ 1.2 × sdpa", "1.30 (1.30 to 1.30), 1.25 (1.25 to 1.25), 1.20 (1.20 to 1.20)", "0.90", "met"],
        True,
    )
    assert [met for _, met in targets.rows([target(1, 1.3), target(2, 1.19)])] == [False]
    assert "not measured" in targets.rows([target(1, None)])[0][0][2]


def test_runs_are_processes_of_their_own_held_to_a_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen = []

    def child(command: list[str], env: dict[str, str], check: bool) -> object:
        context = bench_cli.bench.make_context("bench", command[4:])  # what the child would understand
        seen.append((context.params, env))
        records.write(
            context.params["json_path"], [target(0, 1.25 + 0.1 * len(seen)) | {"cpu_level": "avx2", "command": "c"}]
        )
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(targets.subprocess, "run", child)
    path = tmp_path / "r.jsonl"
    arguments = ["targets", "--repeat", "3", "--level", "avx2", "--threads", "1", "--quick"]
    arguments += ["--rows", "dense", "--rows", "causal"]
    assert run_cli(["bench", *arguments, "--json", str(path)]) == 0
    assert len(seen) == 3
    for params, env in seen:
        assert (params["suite"], params["threads"], params["quick"]) == ("targets", 1, True)
        assert params["rows"] == ("dense", "causal")
        assert params["repeat"] is None and params["level"] is None
        assert {name: env[name] for name in records.LEVEL_VARIABLES} == targets.LEVELS["avx2"]
    written = records.read(path)
    assert [r["run"] for r in written] == [1, 2, 3]
    assert "c" not in {r["command"] for r in written} and {r["cpu_level"] for r in written} == {"avx2"}
    assert "Targets: 1 of 1 met" in capsys.readouterr().out

    monkeypatch.setattr(targets.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 2}))
    assert run_cli(["bench", *arguments]) == 2
    assert re.search("run 1 failed: exit code 2", capsys.readouterr().err)


# Scaling and memory ---------------------------------------------------------------------------------------------------


def test_a_peer_runs_while_it_is_affordable():
    plans = {p.case.title: p for p in scaling.scaling_plans(quick=False, cores=4)}
    with_peer = {(p.case.mask, p.case.backward, p.case.len_k) for p in plans.values() if "sdpa" in p.peers}
    assert {p.case.len_k for p in plans.values() if p.scaling == "length"} == set(scaling.LENGTHS)
    assert ("dense", False, 16384) in with_peer and ("dense", False, 32768) not in with_peer
    assert ("window", False, 32768) not in with_peer and ("dense", True, 4096) in with_peer
    every = scaling.scaling_plans(quick=False, cores=6)
    assert [p.threads for p in every if p.scaling == "threads" and p.case.mask == "dense"] == [1, 2, 4, 6]


def test_scaling_on_the_command_line(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in {
        "QUICK_LENGTHS": (48, 96),
        "LIVE_LENGTH": 48,
        "WINDOW": 8,
        "DIM": 8,
        "THREADS_CASE": TINY,
    }.items():
        monkeypatch.setattr(scaling, name, value)
    path = tmp_path / "r.jsonl"
    options = ["--quick", "--threads", "1", "--rounds", "3", "--json", str(path), "--report", str(tmp_path / "out")]
    assert run_cli(["bench", "scaling", *options]) == 0
    assert "a pair" in capsys.readouterr().out
    written = [r for r in records.read(path) if r["contender"] == OURS]
    assert [r["status"] for r in written] == ["ok"] * (3 * 2 + 3 + 2)
    counted = {(r["mask"], r["len_k"]): r["attending_pairs"] for r in written if r["scaling"] == "length"}
    assert counted["dense", 96] == 2 * 96 * 96 and counted["causal", 96] == 96 * 97
    assert counted["window", 96] == 2 * (96 * 17 - 8 * 9)
    live = {r["live"]: r["attending_pairs"] for r in written if r["scaling"] == "live"}
    assert live == {n / 8: 2 * 48 * 6 * n for n in (2, 4, 8)}
    assert {r["case_threads"] for r in written if r["scaling"] == "threads"} == {1}
    assert_self_contained(tmp_path / "out" / "report.html", pictures=2)


def test_memory_on_the_command_line(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    layer = next(p for p in suites.memory_plans() if isinstance(p.case, w.MhaCase))
    assert layer.case.length == 4096 and layer.memory == {OURS, STOCK} and not layer.timed
    monkeypatch.setattr(suites, "memory_plans", lambda: [replace(layer, case=w.MhaCase(1, 12, 16, 2))])
    path = tmp_path / "r.jsonl"
    assert run_cli(["bench", "memory", "--json", str(path), "--report", str(tmp_path / "out")]) == 0
    written = records.read(path)
    assert [r["memory"]["extra"] for r in written] == [2_000_000] * 2 and not any("time" in r for r in written)
    assert compare.marks(written)[0] == "<!-- measured-memory:begin -->"
    assert f"| {written[0]['title']} | 2 MB | 2 MB {STOCK} |" in compare.markdown(written)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_beyond_inputs_and_outputs():
    mebibytes = 1 << 20

    def step() -> torch.Tensor:
        scratch = torch.ones(64 * mebibytes // 4)
        return torch.ones(16 * mebibytes // 4) * scratch[0]

    peak = memory.measure_here(step, torch.device("cpu"))
    assert peak.outputs == 16 * mebibytes
    # ones() and its product: 16 MiB lie beside the output for a moment.
    assert 62 * mebibytes < peak.extra < 90 * mebibytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_a_fresh_process_measures_a_case():
    case = w.AttentionCase(1, 4, 4, 1024, 1024, 16, backward=True)
    job = {"kind": "AttentionCase", "case": case.__dict__ | {"condition": None}, "contender": "eager"}
    peak = memory.measure_fresh(job)
    assert isinstance(peak, memory.PeakMemory), peak
    scores = 4 * 1024 * 1024 * 4  # bytes of one (B, H, L, S) tensor, of which eager attention keeps several
    assert peak.extra > 1.5 * scores
    assert "SystemError" not in str(peak)


def test_a_measuring_process_that_fails_says_why():
    answer = memory.measure_fresh({"kind": "AttentionCase", "case": {}, "contender": OURS})
    assert isinstance(answer, str) and "failed" in answer and "\n" not in answer


# Records and report ---------------------------------------------------------------------------------------------------


def test_records_survive_writing_and_reading(tmp_path: Path):
    path = tmp_path / "deep" / "r.jsonl"
    records.write(path, [{"a": float("nan"), "b": [1, 2.5]}, {"c": (1, 2)}])
    assert records.read(path) == [{"a": None, "b": [1, 2.5]}, {"c": [1, 2]}]
    path.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        records.read(path)


def test_the_whole_path_on_tiny_problems(tmp_path: Path, short: None, capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "attention", "--quick", "--shapes", "1,2,32,8;1,2/1,64x48,8", "--masks", "dense,causal"]
    arguments += ["--backward", "--json", str(tmp_path / "r.jsonl"), "--report", str(tmp_path / "out")]
    assert run_cli(arguments) == 0
    assert "attention causal (1,2/1,64x48,8) float32 forward+backward" in capsys.readouterr().out

    written = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    ours = [record for record in written if record["contender"] == OURS]
    assert [(r["shape"], r["mask"]) for r in ours] == [
        ("1,2,32,8", "dense"),
        ("1,2,32,8", "causal"),
        ("1,2/1,64x48,8", "dense"),
        ("1,2/1,64x48,8", "causal"),
    ]
    for record in written:
        assert {"command", "version", "torch", "cpu", "threads", "shape", "status", "errors"} <= set(record)
    assert ours[0]["memory"]["extra"] == 2_000_000
    assert_self_contained(tmp_path / "out" / "report.html", pictures=2)


def assert_self_contained(path: Path, pictures: int) -> None:
    text = path.read_text()
    assert "http" not in text and "<script" not in text and "<link" not in text
    sources = re.findall(r'src="([^"]{30})', text)
    assert len(sources) == pictures
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)


# Pictures and SimMIM --------------------------------------------------------------------------------------------------


def save_picture(path: Path, height: int = 40, width: int = 56) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    PIL_Image.fromarray(pixels).save(path)


def test_pictures_are_read_as_rgb(tmp_path: Path):
    save_picture(tmp_path / "b.png")
    PIL_Image.new("L", (30, 20), 7).save(tmp_path / "a.JPG", format="JPEG")
    (tmp_path / "notes.txt").write_text("not a picture, and not called one")
    grey, colour = images.read_directory(tmp_path)
    assert grey.shape == (3, 20, 30) and grey.dtype == torch.uint8
    assert colour.shape == (3, 40, 56)
    assert torch.equal(grey[0], grey[2])


def test_scikit_image_carries_photographs():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    found = images.photographs()
    assert len(found) >= 3
    assert all(image.shape[0] == 3 and min(image.shape[1:]) >= 192 for image in found)


def test_crops_depend_on_the_seed_and_the_batch_alone(tmp_path: Path):
    save_picture(tmp_path / "a.png")
    pictures = images.read_directory(tmp_path)
    crops = images.Crops(pictures, size=32, batch_size=3, seed=1)
    first, second = crops.batch(0), crops.batch(1)
    assert first.shape == (3, 3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(images.Crops(pictures, 32, 3, 1).batch(1), second)
    assert not torch.equal(first, second)
    assert not torch.equal(images.Crops(pictures, 32, 3, 2).batch(0), first)
    pixels = crops.to_pixels(crops.centres(2))
    assert pixels.shape == (2, 32, 32, 3) and pixels.dtype == np.uint8


def test_the_authors_loss_is_ours():
    x = w.loss_inputs(w.LossCase(2, 3, 64, 8, masked=0.6))
    model = simmim.make_model(simmim.Settings(size=64, batch_size=2), simmim.STOCK)
    theirs = simmim.stock_loss(x.prediction, x.target, x.mask, patch_size=8)
    counted = x.mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(x.target)
    expected = (x.prediction - x.target).abs()[counted].mean()
    torch.testing.assert_close(theirs, expected)
    assert model.loss is simmim.stock_loss


def test_the_variants_start_equal_and_differ_in_their_attention():
    settings = simmim.Settings(size=64, batch_size=2)
    stock, ours = (simmim.make_model(settings, variant) for variant in simmim.VARIANTS)
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    kinds = [
        {type(m) for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)} for model in (stock, ours)
    ]
    assert len(kinds[0]) == len(kinds[1]) == 1 and kinds[0] != kinds[1]


def test_agreement_is_over_the_first_steps():
    stock, ours = [2.0, 1.0, 1.0], [2.0, 1.001, 3.0]
    assert simmim.agreement(stock, ours, steps=2) == pytest.approx(1e-3)
    assert simmim.agreement(stock, ours, steps=1) == 0.0


def test_demo_trains_on_the_users_pictures(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "pictures").mkdir()
    save_picture(tmp_path / "pictures" / "a.png")
    arguments = ["demo", "--images", str(tmp_path / "pictures"), "--steps", "3", "--size", "64"]
    arguments += ["--report", str(tmp_path / "out")]
    assert run_cli(arguments) == 0
    shown = capsys.readouterr().out
    assert "stock" in shown and re.search(r"first 3 steps differ by at most \S+ .*: pass", shown)
    assert_self_contained(tmp_path / "out" / "report.html", pictures=2)
    with PIL_Image.open(tmp_path / "out" / "simmim.png") as picture:
        assert min(picture.size) > 100
    # The run fails when the curves do not agree.
    monkeypatch.setattr(simmim, "AGREEMENT", 0.0)
    assert run_cli(arguments) == 1
    assert re.search(r": FAIL", capsys.readouterr().out)


def test_report_of_nothing_but_failures_is_still_a_page():
    record = {"record": "result", "suite": "attention", "title": "t", "contender": "<b>", "status": "failed"}
    page = report.render(records.environment(), [record | {"reason": "a < b"}])
    assert "a &lt; b" in page and "<b>" not in page.replace("&lt;b&gt;", "")


# Bad usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["attention", "--shapes", "1,2,3"], "--shapes.*'1,2,3'"),
        (["attention", "--shapes", "1,2,x,8"], "--shapes.*'1,2,x,8'"),
        (["attention", "--shapes", "1,3/2,16,8"], "--shapes.*multiple of Hkv.*'1,3/2,16,8'"),
        (["attention", "--shapes", "0,2,16,8"], "--shapes.*at least 1.*'0,2,16,8'"),
        (["attention", "--shapes", ";"], "--shapes.*';'"),
        (["attention", "--masks", "causal,striped"], "--masks.*'striped'"),
        (["mha", "--masks", "window"], "--masks.*'window'"),
        (["attention", "--dtype", "int8"], "--dtype.*'int8'"),
        (["attention", "--contender", "no_such_module:f"], "--contender.*no_such_module"),
        (["attention", "--contender", "json"], "--contender.*'json'"),
        (["loss", "--contender", "json:dumps"], "--contender.*'loss'"),
        (["loss", "--shapes", "1,2,16,8"], "--shapes.*'loss'"),
        (["attention", "--steps", "3"], "--steps.*'attention'"),
        (["simmim", "--dtype", "float16"], "--dtype.*'simmim'"),
        (["simmim", "--size", "100"], "--size.*100"),
        (["simmim", "--steps", "0"], "--steps.*0"),
        (["transformers", "--masks", "dense"], "--masks.*'transformers'"),
        (["transformers", "--dtype", "float16"], "--dtype.*'transformers'"),
        (["everything"], "everything"),
        (["attention", "--rows", "causal"], "--rows.*'attention'"),
        (["loss", "--repeat", "3"], "--repeat.*'loss'"),
        (["targets", "--level", "sse2"], "--level.*'sse2'"),
        (["targets", "--rows", "no such row"], "--rows.*'no such row'"),
        (["targets", "--rows", "causal", "--rows", "no such row"], "--rows.*'no such row'"),
        (["targets", "--masks", "dense"], "--masks.*'targets'"),
        (["attention", "--threads", "0"], "--threads.*0"),
        (["attention", "--rounds", "1"], "--rounds.*1"),
        (["attention", "--json", "/proc/nowhere/r.jsonl"], "--json.*/proc/nowhere"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_option(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert run_cli(["bench", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(expected, message), message


def test_bad_pictures_are_one_line_that_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "page.png").write_text("text in a file that is called a picture")
    for name, expected in (
        ("missing", "does not exist"),
        ("notes.txt", "is a file"),
        ("empty", "holds no .png or .jpg picture"),
        ("text", "page.png cannot be read as a picture"),
    ):
        assert run_cli(["demo", "--images", str(tmp_path / name)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "--images" in message and str(tmp_path / name) in message and expected in message


def test_a_contender_that_is_no_function_is_refused(module: str, capsys: pytest.CaptureFixture[str]):
    assert run_cli(["bench", "attention", "--contender", f"{module}:not_a_function"]) == 2
    assert re.search("--contender.*not_a_function.*int", capsys.readouterr().err)


# Comparing runs -------------------------------------------------------------------------------------------------------


def result(title: str, contender: str, median: float, ratio: float | None = None) -> records.Record:
    summary = {"median_s": median, "p20_s": median, "p80_s": median, "noisy": False, "cold_l2_graph_s": None}
    record = {"record": "result", "suite": "attention", "title": title, "contender": contender, "time": summary}
    record |= {
        "useful_flops": 1e9,
        "memory": {"extra": 2e6},
        "cpu": "a CPU",
        "threads": 2,
        "torch": "2",
        "command": "c",
    }
    return record if ratio is None else record | {"ratio": {"median": ratio, "p20": ratio, "p80": ratio}}


def test_a_lost_ratio_is_a_regression():
    old = [result("a", OURS, 1.0), result("a", "sdpa", 2.0, 2.0), result("b", "sdpa", 2.0, 2.0)]
    new = [result("a", OURS, 3.0), result("a", "sdpa", 4.5, 1.5), result("b", "sdpa", 9.0, 1.9)]
    assert compare.regressions(old, new) == ["a, beside sdpa: 2.00 × then, 1.50 × now"]
    assert compare.regressions(old, new, tolerated=0.7) == []


def test_a_lost_share_of_the_sentinel_is_a_regression():
    old = [result("a", OURS, 1.0) | {"sentinel_share": 0.9}, result("b", OURS, 1.0) | {"sentinel_share": 0.9}]
    new = [result("a", OURS, 1.0) | {"sentinel_share": 0.5}, result("b", OURS, 1.0) | {"sentinel_share": 0.85}]
    assert compare.regressions(old, new) == ["a, beside sentinel: 0.90 × then, 0.50 × now"]


def test_of_several_runs_the_median_is_compared():
    old = [result("a", "sdpa", 2.0, ratio) for ratio in (1.0, 2.0, 2.1)]
    new = [result("a", "sdpa", 2.0, ratio) for ratio in (1.95, 1.0, 3.0)]
    assert compare.speeds(old) == {("a", "sdpa"): 2.0}
    assert compare.regressions(old, new) == []


def test_disturbed_and_unmatched_cases_are_not_compared():
    old = [result("a", "sdpa", 2.0, 2.0), result("b", "sdpa", 2.0, 2.0)]
    disturbed = result("a", "sdpa", 2.0, 1.0)
    disturbed["time"]["noisy"] = True
    assert compare.regressions(old, [disturbed, result("b", "sdpa", 2.0, 2.0)]) == []
    with pytest.raises(ValueError, match="no measured case in common"):
        compare.regressions(old, [disturbed])


def test_compare_on_the_command_line(tmp_path: Path):
    old, new = str(tmp_path / "old.jsonl"), str(tmp_path / "new.jsonl")
    records.write(Path(old), [result("a", "sdpa", 2.0, 2.0)])
    records.write(Path(new), [result("a", "sdpa", 2.0, 1.5)])
    run, bench = CliRunner().invoke, bench_cli.bench
    slower = run(bench, ["--compare", old, new])
    assert slower.exit_code == 1 and slower.output == "a, beside sdpa: 2.00 × then, 1.50 × now\n"
    assert run(bench, ["--compare", new, old]).output == "no regression\n"
    assert run(bench, ["--compare", old, new, "--tolerated", "0.7"]).exit_code == 0
    refused = run(bench, ["loss", "--quick", "--compare", old, new])
    assert refused.exit_code == 2 and "--compare" in refused.output
    assert "--tolerated" in run(bench, ["--tolerated", "0.7"]).output
    Path(new).write_text("not json\n")
    broken = run(bench, ["--compare", old, new])
    assert broken.exit_code == 2 and "line 1 is not JSON" in broken.output


def test_the_measured_table_replaces_the_marked_part(tmp_path: Path):
    readme = tmp_path / "README.md"
    run = [result("a", OURS, 0.01), result("a", "sdpa", 0.02, 2.0)]
    begin, end = compare.marks(run)
    readme.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    for _ in range(2):  # writing again changes nothing
        compare.write_readme(readme, run)
        text = readme.read_text()
        assert "| a | 10 ms | 1 GFLOP/s | 2 MB | 2.00 × sdpa |" in text and "`c` on a CPU" in text
        assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
        assert text.count("2.00 × sdpa") == 1
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="README.md has no"):
        compare.write_readme(readme, run)
