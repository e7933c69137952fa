"""The direction of imports, what importing costs, and that C++ knows nothing of torch (ARCHITECTURE: layout)."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastattn"

# For each part, the parts of fastattn that it may import besides its own modules. Nothing imports upward.
MASKS = {"masks", "tiles"}
PUBLIC = {"additive", "attention", "losses"}
ALLOWED = {
    "masks": {"tiles"},
    "tiles": {"masks"},
    "backends": MASKS,
    "dispatch": {"backends"} | MASKS,
    "ops": {"dispatch", "backends"} | MASKS,  # backends.derivatives serves every backend
    "attention": {"ops", "dispatch"} | MASKS,
    "additive": {"attention", "ops", "dispatch"} | MASKS,
    "losses": {"ops", "dispatch"} | MASKS,
    "nn": PUBLIC | MASKS,
    "integrations": PUBLIC | MASKS | {"nn", "dispatch", "ops", "backends"},  # export: the formulas of the reference
    "testing": PUBLIC | MASKS | {"backends", "dispatch", "ops"},
    "bench": PUBLIC | MASKS | {"nn", "integrations", "testing", "dispatch"},
    "cli": PUBLIC | MASKS | {"nn", "integrations", "testing", "dispatch", "bench"},
}
ALLOWED["__main__"] = {"cli"}


def sources():
    yield from sorted(PACKAGE.rglob("*.py"))
    yield from sorted((ROOT / "bench").rglob("*.py"))


def part_of(path):
    """The part a source file belongs to: its first name below fastattn."""
    relative = path.relative_to(ROOT)
    return "bench" if relative.parts[0] == "bench" else relative.parts[1].removesuffix(".py")


def module_of(path):
    relative = path.relative_to(ROOT).with_suffix("")
    parts = ("fastattn", *relative.parts) if relative.parts[0] == "bench" else relative.parts
    return parts[:-1] if parts[-1] == "__init__" else parts


PUBLIC_NAMES = set(fastattn.__all__)


def imported_modules(path):
    """Dotted names of everything that a file imports, wherever in the file it does."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(x for x in (base, node.module) if x)
            if module == "fastattn":  # names of the package: modules, or public names that stand for all of it
                yield from (f"fastattn.{alias.name}" for alias in node.names)
            else:
                yield module


def test_autocast_is_asked_about_in_one_place():
    asked = {path.name: path.read_text().count("is_autocast_enabled(") for path in sorted(PACKAGE.rglob("*.py"))}
    assert {name: count for name, count in asked.items() if count} == {"ops.py": 1}


def ours(path):
    for name in imported_modules(path):
        if name == "fastattn":
            yield "the package itself"
        elif name.startswith("fastattn."):
            yield name.split(".")[1]


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upward(path):
    if path == PACKAGE / "__init__.py":
        return
    part = part_of(path)
    # The harness, the benchmark and the command line use the package as its users do.
    as_users = {"the package itself"} | PUBLIC_NAMES if part in {"testing", "bench", "cli"} else set()
    upward = set(ours(path)) - ALLOWED[part] - {part} - as_users
    assert not upward, f"{path.relative_to(ROOT)} must not import {sorted(upward)}"


def test_layering_would_notice(tmp_path, monkeypatch):
    module = sys.modules[__name__]
    for code in ("from fastattn import attention", "import fastattn.nn.loss", "from .attention import attention"):
        (tmp_path / "fastattn").mkdir(exist_ok=True)
        path = tmp_path / "fastattn" / "ops.py"
        path.write_text(code)
        monkeypatch.setattr(module, "ROOT", tmp_path)
        with pytest.raises(AssertionError, match="must not import"):
            test_nothing_imports_upward(path)


def test_the_package_holds_the_public_names_and_nothing_else():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_names = isinstance(node, ast.Assign) and [t.id for t in node.targets] in (["__all__"], ["__version__"])
        assert is_docstring or is_names or isinstance(node, ast.ImportFrom), ast.unparse(node)
    imported = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(imported) == sorted(fastattn.__all__)
    assert fastattn.__all__ == sorted(fastattn.__all__)
    for name in fastattn.__all__:
        public = getattr(fastattn, name)
        assert public.__doc__, f"{name} has no docstring"


def test_the_names_of_the_architecture_are_public():
    for name in (
        "AdditiveAttention Mask MaskedMSELoss MultiheadAttention PatchMask SimMIM additive_attention attention "
        "attention_varlen attention_weights explain "
        "masked_l1_loss masked_mse_loss masked_smooth_l1_loss replace_multihead_attention scaled_dot_product_attention "
        "use_backend"
    ).split():
        assert name in fastattn.__all__


def test_kernels_know_no_framework():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(files) > 5
    for path in files:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        torchs = [name for name in includes if re.match(r"(torch|ATen|c10|caffe2)\b", name)]
        pythons = [name for name in includes if re.match(r"(pybind11|Python\.h)", name)]
        assert not torchs, f"{path.relative_to(ROOT)} includes {torchs}"
        if path.name != "bindings.cpp":
            assert not pythons, f"{path.relative_to(ROOT)} includes {pythons}"


HEAVY = (
    "triton matplotlib rich click numpy.testing scipy pandas skimage PIL tqdm hypothesis pytest torch._dynamo "
    "torch._inductor"
)


def test_importing_is_light():
    code = (
        # torch's own FLOP counter imports Triton where that is installed.
        "import sys, time, json, torch, torch.utils.flop_counter\n"
        "before = set(sys.modules); start = time.process_time()\n"
        "import fastattn\n"
        "print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))"
    )
    runs = []
    for _ in range(2):  # the machine may be busy: the quicker of two
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        runs.append(json.loads(result.stdout))
    loaded = set(runs[0][1])
    heavy = {name for name in loaded if any(name == h or name.startswith(h + ".") for h in HEAVY.split())}
    assert not heavy, f"importing fastattn loads {sorted(heavy)}"
    assert not {name for name in loaded if name.startswith(("fastattn.testing", "fastattn.bench", "fastattn.cli"))}
    assert min(seconds for seconds, _ in runs) < 2.0
