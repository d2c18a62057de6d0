"""README and docs claim nothing that is not in a file, and show nothing that is not there."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from torch import nn

from benchmarks import tables
from benchmarks.ablation import difference
from cifar10.errors import UserError
from cifar10.options import Options
from cifar10.recipes import RECIPES, Recipe
from model import ResNet

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_current(page):
    """If not: python -m benchmarks.tables."""
    assert page.read_text() == tables.render(page.read_text())


def test_a_table_is_made_anew():
    page = "before\n<!-- table: recipes -->\nold\n<!-- end -->\nafter"
    assert tables.render(page) == f"before\n<!-- table: recipes -->\n{tables.recipes()}\n<!-- end -->\nafter"
    assert "| epochs | 24 | 8 | 5 | 24 |" in tables.recipes()


def test_the_results_equal_their_files():
    """Recomputed here from the same files, row by row."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.results().splitlines()[2:]]
    assert len(rows) == len(tables.RUNS) + 1 and rows[-1][1:3] == ["24", "92.69%"]
    for (folder, (name, options, version)), row in zip(tables.RUNS.items(), rows):
        runs = [tables.result(f"{folder}/metrics.json")]
        if not options and not version:
            runs += [tables.result(f"seeds/{p.name}/metrics.json") for p in (ROOT / "results/seeds").glob(f"{name}-*")]
            recipes = [tables.result(f"{p}/config.json")["recipe"] for p in [folder, *seeds_of(name)]]
            assert all(Recipe.from_json(recipe) == RECIPES[name] for recipe in recipes), name
        for column, key in ((2, "accuracy"), (3, "tta_accuracy")):
            found, *deviation = map(float, re.findall(r"[\d.]+", row[column]))
            values = np.array([100 * run[key] for run in runs])
            assert found == pytest.approx(values.mean(), abs=0.0051)
            assert deviation == (pytest.approx([values.std(ddof=1)], abs=0.0051) if len(runs) > 1 else [])
        assert int(row[4]) == len(runs)
        if not version:
            pflop = np.mean([run["pflop"] for run in runs])
            seconds = 1e15 * pflop / tables.result("speed.json")["model_flops_per_second"]
            assert float(row[5]) == pytest.approx(pflop, abs=0.0051) and float(row[6]) == pytest.approx(
                seconds / 60, abs=0.51
            )


def test_a_result_of_other_settings_is_not_averaged(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    other = shutil.copytree(tmp_path / "results/seeds/best-0", tmp_path / "results/seeds/best-7")
    assert len(tables.runs_of("cifar10-best")) == 4
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | dict(valid="holdout")))
    with pytest.raises(UserError, match=r"best-7 is not of today's recipe"):
        tables.runs_of("cifar10-best")


def seeds_of(name: str) -> list[str]:
    return [f"seeds/{path.name}" for path in (ROOT / "results/seeds").glob(f"{name}-*")]


def gain_of_less_smoothing(metric: str, scale: float, decimals: int) -> str:
    """What label smoothing 0.12 gains over 0.2 in both `faster` at width 32, over all seeds."""
    found = tables.result("ablation.json")
    before, now = found["faster-32 before the alternating flip"]["runs"], found["faster-32"]["runs"]
    values = [
        [scale * runs[seed][metric] for runs in both for seed in "0123"]
        for both in (
            (before["label smoothing 0.12"], now["nothing"]),
            (before["nothing"], now["label smoothing 0.2"]),
        )
    ]
    return difference(*values, decimals).removeprefix("+")


def loss_of_high_momentum() -> str:
    """What momentum 0.9 loses with TTA in the recipe of the row that it changes."""
    runs = tables.result("ablation.json")["faster-32"]["runs"]
    higher = runs["both, momentum 0.9"]
    values = [[100 * found[seed]["tta_accuracy"] for seed in higher] for found in (runs["both"], higher)]
    return difference(*values, 2).removeprefix("+")


def test_figures_in_sentences_equal_their_files():
    gpu, memory, shared, search, scale = map(
        tables.result, ("gpu.json", "memory.json", "memory_shared.json", "search.json", "scale.json")
    )
    model = ResNet()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    step, first, second = gpu["step"], *search["trainings"]["as it is now"]
    minutes = [tables.result(f"seeds/faster-{seed}/metrics.json")["seconds"] / 60 for seed in range(4)]
    figures = {
        "benchmarks": [
            *(f"{step[name]:.1f} ms" for name in ("ours_ms", "bare_ms")), f"{step['ratio']:.2f} times as long",
            gpu["hardware"]["gpu"], f"{memory['peak_gib']:.2f} GiB, for {memory['pixels_gb']:.1f} GB of pixels",
            f"{first['accuracy']:.2%} and {second['accuracy']:.2%}",
            f"by {gain_of_less_smoothing('nll', -1, 4)}",
            f"{gain_of_less_smoothing('accuracy', 100, 2)} points higher",
            f"{gain_of_less_smoothing('tta_accuracy', 100, 2)} with TTA",
            f"momentum 0.9 is {loss_of_high_momentum()} points worse",
            f"took {min(minutes):.1f} to {max(minutes):.1f} minutes",
        ],
        "scale": [
            f"{scale['seconds'][1]['speedup']:.2f}× the speed", f"{shared['pixels_gb']:.1f} GB of pixels",
            *(f"{gib:.1f} GiB" for gib in shared["proportional_gib"]), f"l is {step['data_share']:.0%} of t",
            f"g is {4 * n_parameters / 1e6:.0f} MB, and n is {2 + 2 * n_norms}",
        ],
    }  # fmt: skip
    for page, expected in figures.items():
        text = " ".join((ROOT / f"docs/{page}.md").read_text().split())
        assert [figure for figure in expected if figure not in text] == []


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if not link.startswith("https:"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.is_file(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, link


def test_files_that_the_pages_name_are_there():
    for page in PAGES:
        for name in re.findall(r"`?((?:cifar10|docs|results|benchmarks|tests)/[\w./-]+\.\w+)", page.read_text()):
            assert (ROOT / name).exists() or name == "results/gpu.json", f"{page.name}: {name}"


def test_the_layout_lists_every_module():
    layout = README.split("## Layout")[1] + (ROOT / "CONTRIBUTING.md").read_text().split("## Layout")[1]
    assert set(re.findall(r"\w+\.py", layout)) >= {
        path.name for folder in (ROOT, ROOT / "cifar10") for path in folder.glob("*.py") if path.name != "__init__.py"
    }


def test_every_option_is_in_the_table():
    listed = {
        name for line in tables.options().splitlines() for name in re.findall(r"`--(?:no_)?(\w+)`", line.split("|")[1])
    }
    assert listed == set(Options.__dataclass_fields__)


def test_benchmarks_that_the_pages_name_are_there():
    named = {name for page in PAGES for name in re.findall(r"python -m benchmarks\.(\w+)", page.read_text())}
    assert named <= {path.stem for path in (ROOT / "benchmarks").glob("*.py")} and len(named) >= 6


def test_the_spelling_is_american_and_percentages_have_no_space():
    pages = [*PAGES, *(path for place in (".", "cifar10/**", "benchmarks") for path in ROOT.glob(f"{place}/*.py"))]
    for page in pages:
        assert not re.findall(r"optimis|normalis|colour|\d %", page.read_text(), re.IGNORECASE), page
    assert len(pages) > 60
