"""Every import runs one way."""

import ast

import pytest
from conftest import ROOT

MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "recipes": set(),
    "model": set(),
    "muon": set(),
    "augment": set(),
    "data": {"errors", "files", "augment"},
    "learner": {"errors", "recipes", "data", "model", "muon"},
    "runs": {"errors", "files", "recipes", "model", "data", "learner"},
    "interpret": {"errors", "files", "data", "learner", "runs"},
    "train": {"errors", "files", "recipes", "model", "augment", "data", "learner", "runs", "interpret"},
}


def test_every_module_is_listed():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported & set(MAY_IMPORT) <= MAY_IMPORT[module]
