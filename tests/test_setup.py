"""One source of truth for versions, and the running interpreter has exactly those."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, version

import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pip._internal.network.session import PipSession
from pip._internal.req import parse_requirements


def requirements(*names: str) -> dict[str, Requirement]:
    """Package → requirement, as pip itself reads the files."""
    lines = [line for name in names for line in parse_requirements(str(ROOT / name), session=PipSession())]
    parsed = [Requirement(line.requirement) for line in lines]
    return {requirement.name.lower(): requirement for requirement in parsed}


def test_everything_is_pinned_and_installed():
    pins = requirements("requirements-dev.txt", "constraints.txt")
    assert {"torch", "torchvision", "fastai", "fastcore", "matplotlib", "safetensors", "fastdownload"} <= set(pins)
    for requirement in pins.values():
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
    installed = {p: version(p) for p, r in pins.items() if not r.marker or r.marker.evaluate()}
    assert {p: f"=={v}" for p, v in installed.items()} == {p: str(pins[p].specifier) for p in installed}


def test_whatever_is_imported_is_required():
    """Packages that come along with another one are named, too, if the code imports them."""
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "markdown_it": "markdown-it-py"}
    paths = [*ROOT.glob("*.py"), *(ROOT / "cifar10").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {path.stem for path in ROOT.glob("*.py")} | {"cifar10", "benchmarks"}
    tops = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) - ours
    assert {names.get(top, top) for top in tops} <= set(requirements("requirements-extras.txt"))


def test_the_package_can_be_installed(tmp_path):
    """Its metadata allow the versions that were tested, and its wheel holds the package and nothing else."""
    for name in ("pyproject.toml", "README.md", "LICENSE", *(p.name for p in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "cifar10", tmp_path / "cifar10", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("METADATA"))
    package = {str(path.relative_to(ROOT)) for kind in ("py", "html") for path in (ROOT / "cifar10").rglob(f"*.{kind}")}
    assert package == {name for name in names if ".dist-info/" not in name}
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    allowed = {requirement.name: requirement for requirement in map(Requirement, lines)}
    pins = requirements("requirements-extras.txt")
    assert set(allowed) == set(pins)
    for name, pin in pins.items():
        assert allowed[name].specifier.contains(str(pin.specifier).removeprefix("==")), name
    assert "License-Expression: Apache-2.0" in metadata


def test_pre_commit_uses_the_same_ruff():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{version('ruff')}"


def test_nothing_is_pinned_twice():
    pins = [
        line.split("==")[0].lower()
        for name in ("requirements.txt", "requirements-extras.txt", "requirements-dev.txt", "constraints.txt")
        for line in (ROOT / name).read_text().splitlines()
        if "==" in line
    ]
    assert sorted(pins) == sorted(set(pins))


def test_environment_yml():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pinned = {"pip": ["-r requirements.txt", "-c constraints.txt"]}
    assert environment["dependencies"] == ["python=3.11", "pip", pinned]


def test_readme_the_makefile_and_the_workflow_agree_about_python():
    """And all pinned versions can be installed with the oldest Python that README names."""
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    (oldest,) = re.findall(r"You need Python (\S+) or newer", readme)
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in makefile
    assert f"older than Python {oldest};" in makefile
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()
    for name, requirement in requirements("requirements-dev.txt", "constraints.txt").items():
        if not requirement.marker or requirement.marker.evaluate():
            needs = distribution(name).metadata["Requires-Python"] or ""
            assert SpecifierSet(needs).contains(oldest), f"{name} needs Python {needs}"
    (tested,) = re.findall(r"tested with Python (\S+) on", readme)
    (also,) = re.findall(r"pinned versions for Python ([^;]+)\.\n", readme)
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == [tested, re.findall(r"[\d.]+", also)[-1]]
