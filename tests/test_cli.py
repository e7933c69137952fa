"""The command line, in the process and as a program of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastattn import cli, dispatch


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fastattn ARGUMENTS`."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


def assert_usage_error(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err


def test_info_tells_versions_levels_threads_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info")
    assert code == 0 and err == ""
    assert torch.__version__ in out and str(torch.get_num_threads()) in out
    for backend in dispatch.BACKENDS:
        assert f"backend {backend}" in out
    assert "CUDA library" in out
    if dispatch.NATIVE_FAILURE is None:
        assert dispatch.load("cpu").info()["level"] in out and "compiler" in out


def test_info_explains_a_missing_cuda_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "CUDA_FAILURE", "No module named 'fastattn._cuda'")
    _, out, _ = run(capsys, "info")
    assert "not there: No module named 'fastattn._cuda'" in out and "FASTATTN_CUDA=on" in out


def test_info_explains_a_missing_native_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "NATIVE_FAILURE", "No module named 'fastattn._native'")
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "not there: No module named 'fastattn._native'" in out
    assert "everything runs on the reference backend" in out and "compiler" in out
    assert "reference" in out.split("used for CPU tensors")[1]


def test_verify_passes_on_a_backend_and_writes_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, backend: str
) -> None:
    report = tmp_path / "report.json"
    code, out, _ = run(capsys, "verify", backend, "--cases", "6", "--seed", "3", "--json", str(report), "--verbose")
    assert code == 0, out
    assert "cases passed" in out and "worst error / bound" in out
    content = json.loads(report.read_text())
    assert content["ok"] and content["target"] == backend and content["seed"] == 3
    counts = Counter(case["label"].rpartition(":")[0] or "attention" for case in content["cases"])
    wanted = {"attention": 6, "weights": 1, "additive": 1, "loss": 3, "linear": 1}
    if backend in ("cuda", "triton"):  # which need not have them
        wanted = {family: n for family, n in wanted.items() if family in counts or family not in ("additive", "linear")}
    assert counts == wanted
    assert {check["name"] for check in content["cases"][0]["checks"]} >= {"out", "lse", "dq", "dk", "dv", "determinism"}


def test_verify_takes_one_case_and_a_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "verify", "--backend", "reference", "--case", "4", "--dtype", "float16", "--forward-only"
    )
    assert code == 0
    assert "1 of 1 cases passed" in out and "float16" in out and "dq" not in out
    code, out, _ = run(capsys, "verify", "reference", "--case", "loss:2")
    assert code == 0 and "loss dinput" in out


def test_verify_judges_a_function_in_the_current_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_kernel.py").write_text(
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n"
        "def good(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):\n"
        "    return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)\n"
        "def bad(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):\n"
        "    return 1.001 * good(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)\n"
        "NUMBER = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "verify", "my_kernel:good", "--cases", "12")
    assert code == 0 and "sdpa signature" in out
    code, out, _ = run(capsys, "verify", "my_kernel:bad", "--cases", "3")
    assert code == 1
    assert "run it again: fastattn verify my_kernel:bad --seed 0 --case 0 --signature sdpa" in out
    assert_usage_error(run(capsys, "verify", "my_kernel:NUMBER"), "my_kernel:NUMBER", "int")
    assert_usage_error(run(capsys, "verify", "my_kernel:absent"), "my_kernel:absent", "absent")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("command",)),
        (("verfiy",), ("verfiy",)),
        (("verify", "metal"), ("backend", "'metal'", "reference")),
        (("verify", "--backend", "metal"), ("'metal'",)),
        (("verify", "cuda"), ("backend 'cuda' cannot run this attention", "these are on 'cpu'")),
        (("verify", "--backend", "a:b"), ("--backend", "'a:b'")),
        (("verify", "cpu", "--backend", "cpu"), ("TARGET", "--backend")),
        (("verify", "no_such_module:f"), ("no_such_module:f", "cannot be loaded")),
        (("verify", "torch:"), ("module:function",)),
        (("verify", "--cases", "0"), ("--cases",)),
        (("verify", "--cases", "many"), ("--cases", "many")),
        (("verify", "--dtype", "float8"), ("--dtype", "float8")),
        (("verify", "--signature", "keras", "torch:f"), ("--signature", "keras")),
        (("verify", "reference", "--signature", "sdpa"), ("--signature",)),
        (("verify", "reference", "--case", "x"), ("case", "'x'")),
        (("verify", "torch.nn.functional:scaled_dot_product_attention", "--case", "loss:1"), ("loss:1",)),
        (("verify", "reference", "--device", "nowhere"), ("nowhere",)),
        (("verify", "reference", "--json", "/no/such/folder/report.json"), ("--json", "/no/such/folder")),
        (("info", "extra"), ("extra",)),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_usage_error(run(capsys, *arguments), *words)


def test_emulating_needs_the_emulator(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dispatch, "CUDA_EMULATED", False)
    monkeypatch.delenv("FASTATTN_CUDA_LIBRARY", raising=False)
    assert_usage_error(run(capsys, "verify", "--emulate"), "--emulate", "make emulator")
    monkeypatch.setenv("FASTATTN_CUDA_LIBRARY", "/no/such/file.so")
    monkeypatch.setattr(dispatch, "CUDA_FAILURE", "there is no compiled module '/no/such/file.so'")
    assert_usage_error(run(capsys, "verify", "--emulate"), "--emulate", "/no/such/file.so")


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_missing_bench_extra_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    # None in sys.modules makes the import fail, as an absent package does.
    monkeypatch.setitem(sys.modules, "fastattn.bench.cli", None)
    assert_usage_error(run(capsys, command), f"fastattn {command}", "fastattn[bench]")


def test_help_lists_every_command_without_importing_the_bench_extra() -> None:
    script = "import sys; from fastattn.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "assert not any(name.startswith(('fastattn.bench', 'matplotlib')) for name in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for command in ("info", "verify", "bench", "demo"):
        assert f"  {command} " in result.stdout


def test_the_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastattn", "verify", "nonsense"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "'nonsense'" in result.stderr
