"""Imports run one way, and everything can be imported on any system."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LEAVES = {"model", "augment"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - LEAVES
PACKAGE = sorted((ROOT / "cifar10").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
# Each imports only those before it; up to the options, none imports what takes long.
BASE = ("errors", "text", "signals", "cli", "recipes", "options", "processes", "files", "hardware")
# Wing → the wings that it may import, beside the base.
WINGS = {"data": (), "training": (), "runs": ("data", "training"), "interpretation": ("data", "training", "runs")}


def module(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path) -> set[str]:
    """The modules that a file imports, by their full names."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in froms} | {f"{n.module}.{alias.name}" for n in froms for alias in n.names}


def tops(path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def rooms(path) -> set[str]:
    """The wings and base modules that a file imports, like {"data", "errors"}."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("cifar10.")}


def test_the_leaves_import_nothing_of_ours():
    for name in LEAVES:
        assert not tops(ROOT / f"{name}.py") & (SCRIPTS | LEAVES | {"cifar10", "benchmarks"})


def test_the_package_imports_no_script_and_no_leaf():
    for path in PACKAGE:
        assert not tops(path) & (SCRIPTS | LEAVES | {"benchmarks"}), path


def test_no_script_imports_another():
    for name in SCRIPTS:
        assert not tops(ROOT / f"{name}.py") & (SCRIPTS | {"benchmarks"}), name


def test_every_module_has_its_place():
    assert {path.relative_to(ROOT / "cifar10").parts[0].removesuffix(".py") for path in PACKAGE} == {
        "__init__", *BASE, *WINGS
    }  # fmt: skip


def test_the_wings_import_one_way():
    for path in PACKAGE:
        wing = path.parent.name
        if wing in WINGS:
            assert rooms(path) <= {wing, *BASE, *WINGS[wing]}, path


def test_the_base_modules_import_only_those_before_them():
    for number, name in enumerate(BASE):
        assert rooms(ROOT / "cifar10" / f"{name}.py") <= {*BASE[:number]}, name


def test_scripts_import_from_the_face_of_a_wing():
    for name in SCRIPTS | LEAVES:
        inside = [found for found in imported(ROOT / f"{name}.py") if re.match(r"cifar10\.\w+\.\w+\.", found)]
        assert not inside, (name, inside)


def test_no_cycles_in_the_package():
    """There is an order in which each module imports only those before it."""
    names = {module(path): path for path in PACKAGE if path.name != "__init__.py"}
    left = {name: imported(path) & set(names) - {name} for name, path in names.items()}
    while left:
        ready = {name for name, needs in left.items() if not needs & set(left)}
        assert ready, f"a cycle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in ready}


MODULES = [
    *(path.stem for path in ROOT.glob("*.py")),
    *map(module, PACKAGE),
    *(f"benchmarks.{path.stem}" for path in BENCHMARKS),
]


@pytest.mark.slow
def test_every_module_imports_on_windows_and_macos():
    """There, `fcntl` and `resource` or the C library's functions are missing; the libraries know how to do without."""
    code = f"""
import ctypes, sys
import fastai.vision.all, filelock, pandas, scipy.ndimage, sklearn.metrics, sklearn.datasets, torch.utils.flop_counter
sys.modules["fcntl"] = sys.modules["resource"] = None
def unavailable(*args, **kwargs):
    raise OSError("no C library")
ctypes.CDLL = unavailable
for module in {MODULES}:
    __import__(module)
sys.platform = "win32"
from cifar10.hardware import keep_freed_memory
keep_freed_memory()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_names_a_place_of_one_machine():
    """Only CI knows where its copy of CIFAR-10 is."""
    place, texts = "../" + "shared", (".py", ".md", ".json", ".toml", ".yml", ".csv", ".txt")
    files = [p for p in ROOT.rglob("*") if p.suffix in texts and p.relative_to(ROOT).parts[0] not in (".venv", "runs")]
    assert len(files) > 150 and [str(p) for p in files if place in p.read_text(errors="replace")] == []
