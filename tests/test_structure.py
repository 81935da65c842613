"""The rules of the house: a spec, a kernel and a benchmark for each operator, imports in one direction, small files."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from specs import all_specs

import bigmodel_fast as bmf

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")

# What each layer may import of the package, lowest first; benchmarks/ is installed as bigmodel_fast.benchmarks.
LAYERS = (
    "_C",
    "_library",
    "_packed_weights",
    "_dispatch",
    "_machine",
    "kernels",
    "ops",
    "nn",
    "optim",
    "data",
    "models",
    "_accelerate",
    "train",
    "plan",
    "benchmarks",
    "cli",
)
SIDE_BY_SIDE = ({"models", "data", "optim", "_accelerate"},)
CPP_MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "ops": {"core", "cpu", "cuda", "ops"},
}
KERNELS_OF = {"attention_varlen": "attention"}  # a second front to the same kernels
SHARED_STEMS = {"common", "targets", "optim", "peak", "microkernel", "finish"}  # in csrc, beside the operators
PYTHON_LINES, CPP_LINES = 400, 500


def operators() -> list[str]:
    """One file in bigmodel_fast/ops for each."""
    return sorted(f.stem for f in (ROOT / "bigmodel_fast" / "ops").glob("*.py") if not f.stem.startswith("_"))


def sources(*patterns: str) -> list[Path]:
    return sorted(f for pattern in patterns for f in ROOT.glob(pattern))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


PACKAGE = sources("bigmodel_fast/**/*.py", "benchmarks/*.py", "kernels/**/*.py")
NATIVE = sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.cuh")


# ---- operators ----


def test_every_public_operator_has_a_spec() -> None:
    assert {spec.name for spec in all_specs()} == set(bmf.ops.__all__)


@pytest.mark.parametrize("op", operators())
def test_one_stem_in_every_folder(op: str) -> None:
    """An operator may take several kernel files, each beginning with its name."""
    assert op in bmf.ops.__all__
    stem = KERNELS_OF.get(op, op)
    assert (ROOT / "csrc" / "ops" / f"{stem}.cpp").is_file()
    assert sources(f"csrc/cpu/{stem}.cpp", f"csrc/cpu/{stem}_*.cpp")
    assert (ROOT / "tests" / "specs" / f"{stem}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{stem}.py").is_file()


def test_no_kernel_without_an_operator() -> None:
    for path in sources("csrc/ops/*.cpp", "csrc/cpu/*.cpp"):
        known = [*operators(), *SHARED_STEMS]
        assert any(path.stem == stem or path.stem.startswith(f"{stem}_") for stem in known), relative(path)


def test_every_raw_operator_has_a_fake_kernel() -> None:
    """Those that return tensors; one that works in place, or returns a number, has nothing to fake."""
    raw = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bigmodel_fast::")]
    assert len(raw) >= 2 * len(operators()) - 2
    for name in raw:
        returns = torch._C._get_schema(name, "").returns
        if any("Tensor" in str(r.type) for r in returns) and not any(r.alias_info for r in returns):
            assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None, name


# ---- Python ----


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "bigmodel_fast" else ("bigmodel_fast", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules, and of the names in them, that a file imports anywhere."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(module: str) -> str | None:
    """The part of the package a module belongs to; None for the package itself and for what is outside."""
    parts = module.split(".")
    return parts[1] if parts[0] == "bigmodel_fast" and len(parts) > 1 and parts[1] in LAYERS else None


def may_import(importer: str, other: str) -> bool:
    apart = any({importer, other} <= group for group in SIDE_BY_SIDE)
    return importer == other or (LAYERS.index(other) < LAYERS.index(importer) and not apart)


def test_every_part_of_the_package_is_in_a_layer() -> None:
    parts = {module_name(path).split(".")[1] for path in PACKAGE if module_name(path) != "bigmodel_fast"}
    assert parts - {"__main__"} <= set(LAYERS)


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    importer = layer(module_name(path))
    others = {other for name in imported(path) if (other := layer(name))}
    if importer:
        assert not {other for other in others if not may_import(importer, other)}


def test_import_loads_torch_and_numpy_only() -> None:
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import bigmodel_fast; "
        "print(*sorted(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = found.stdout.split()
    assert "bigmodel_fast.ops" in loaded
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "bigmodel_fast"}
    assert {name.partition(".")[0] for name in loaded} <= allowed
    late = {"nn", "optim", "data", "models", "train", "plan", "cli", "benchmarks", "_accelerate"}
    assert not {name for name in loaded if layer(name) in late}


@pytest.mark.parametrize("name", bmf.ops.__all__)
def test_operators_are_documented(name: str) -> None:
    function = getattr(bmf.ops, name)
    text = inspect.getdoc(function) or ""
    assert text.partition("\n")[0].endswith((".", ":"))
    for section in ("Args:", "Returns:", "Raises:"):
        assert f"\n{section}\n" in text, section
    elsewhere = getattr(bmf.ops, KERNELS_OF[name]) if name in KERNELS_OF else None
    shared = inspect.signature(elsewhere).parameters if elsewhere else {}
    for argument in inspect.signature(function).parameters.keys() - shared.keys():
        assert re.search(rf"\b{argument}\b", text.partition("Args:")[2]), argument


def test_public_names_are_documented() -> None:
    for module in (bmf, bmf.ops, bmf.nn, bmf.optim, bmf.data, bmf.models):
        assert module.__doc__
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                assert value.__doc__, f"{module.__name__}.{name}"


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_nothing_is_unpickled(path: Path) -> None:
    """What a file holds is data: pickles, and YAML beyond plain values, can hold code."""
    loaders = r"torch\.load\(|yaml\.(unsafe_|full_)?load(_all)?\(|\b(Unsafe|Full)Loader\b|allow_pickle=True"
    modules = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    assert not re.search(loaders, path.read_text())
    assert not {name.partition(".")[0] for name in imported(path)} & modules


# ---- C++ ----


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_includes_run_one_way(path: Path) -> None:
    names = re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE)
    folder = path.parent.name
    assert not [n for n in names if re.match(r"ATen/|c10/|torch/extension|torch/torch\.h|torch/all\.h", n)]
    if folder == "csrc":  # module.cpp
        return
    ours = {n.partition("/")[0] for n in names if n.partition("/")[0] in CPP_MAY_INCLUDE}
    assert ours <= CPP_MAY_INCLUDE[folder]
    if folder != "ops":
        assert not [n for n in names if n.startswith("torch/")], "kernels know nothing of torch"
    if folder == "cpu":  # one instance of a template is kept for all instruction sets
        containers = {"vector", "string", "map", "unordered_map", "algorithm", "functional", "memory", "array", "cmath"}
        assert not containers & set(names), "no library templates in what is compiled once per instruction set"


# ---- files ----


@pytest.mark.parametrize("path", [*PACKAGE, *NATIVE, *sources("tests/**/*.py", "tests/cpp/*")], ids=relative)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (PYTHON_LINES if path.suffix == ".py" else CPP_LINES)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"CXX": "no-such-compiler"}, "bigmodel_fast: no-such-compiler was not found: install a C++20 compiler"),
        ({"BMF_CUDA": "maybe"}, "bigmodel_fast: BMF_CUDA must be auto, on or off, not 'maybe'"),
    ],
    ids=["compiler", "BMF_CUDA"],
)
def test_a_build_that_cannot_work_says_why_in_one_line(missing: dict[str, str], message: str, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("bigmodel_fast", "kernels", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("__version__ = '0'\n")
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, env={**os.environ, **missing}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert build.returncode != 0
    assert build.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in build.stderr
