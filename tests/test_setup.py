"""One source of truth for versions, and the running interpreter has exactly those."""

import sys
from importlib.metadata import version

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from pip._internal.network.session import PipSession
from pip._internal.req import parse_requirements
from rattler import MatchSpec, Version


def requirements(name: str) -> dict[str, Requirement]:
    """Package → requirement, with the constraints, as pip itself reads the file."""
    lines = parse_requirements(str(ROOT / name), session=PipSession())
    parsed = [Requirement(line.requirement) for line in lines]
    return {requirement.name.lower(): requirement for requirement in parsed}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_everything_is_pinned_and_installed(name):
    pins = requirements(name)
    assert {"torch", "torchvision", "fastai", "fastcore", "matplotlib", "safetensors", "fastdownload"} <= set(pins)
    for requirement in pins.values():
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
    if name == "requirements-dev.txt":
        installed = {p: version(p) for p, r in pins.items() if not r.marker or r.marker.evaluate()}
        assert {p: f"=={v}" for p, v in installed.items()} == {p: str(pins[p].specifier) for p in installed}


def test_nothing_is_pinned_twice():
    pins = [
        line.split("==")[0].lower()
        for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt")
        for line in (ROOT / name).read_text().splitlines()
        if "==" in line
    ]
    assert sorted(pins) == sorted(set(pins))


def test_environment_yml():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]}
    specs = {spec.name.normalized: spec for spec in map(MatchSpec, conda)}
    assert set(specs) == {"python", "pip"}
    assert str(specs["python"].version) == "3.11.*"
    assert Version("3.11") <= Version(".".join(map(str, sys.version_info[:3])))
