"""The README claims nothing that isn't in a file, and shows nothing that isn't there."""

import csv
import json
import re

from conftest import ROOT

from runs import read_csv

README = (ROOT / "README.md").read_text()


def test_figures_equal_their_files():
    fast, short = (
        json.loads((ROOT / f"results/{run}/metrics.json").read_text()) for run in ("cifar10-fast", "cifar10-3-epochs")
    )
    notebook = read_csv(ROOT / "results/notebook/log.csv")["test_accuracy_percent"]
    rows = re.findall(r"\| (\d+) \| ([\d.]+) % \| \[(\w+\.\w+)\]", README)
    assert rows == [
        *((str(run["epochs"]), f"{100 * run['accuracy']:.2f}", "metrics.json") for run in (fast, short)),
        ("3", f"{notebook[2]:.2f}", "log.csv"),
        ("24", f"{notebook[23]:.2f}", "log.csv"),
    ]
    two_views = json.loads((ROOT / "results/cifar10-fast/two_views.json").read_text())
    assert f"`fast` gets {100 * two_views['accuracy']:.2f} % right" in README
    assert f"{100 * fast['accuracy']:.2f} % by [`--recipe fast`](#recipes) in {fast['epochs']} epochs" in README
    overhead = json.loads((ROOT / "results/overhead.json").read_text())
    assert f"{overhead['ratio']:.3f} ×" in README
    speed = json.loads((ROOT / "results/speed.json").read_text())
    convolutions = sum(part for name, part in speed["operators"].items() if "convolution" in name)
    for figure in (
        f"{convolutions:.0%} of a step's time are the convolutions",
        f"workers | {speed['times_plain']:.2f} × as fast |",
        f"tutorials | {speed['times_stock_fastai']:.2f} × as fast |",
        f"precision | {speed['part_of_limit']:.0%} of it |",
        f"takes {speed['data_part_of_step']:.1%} of a step",
        f"needs {speed['peak_gib']:.1f} GiB at most",
        f"two CPU cores, {speed['precision']}, batches of {speed['batch_size']}",
    ):
        assert figure in " ".join(README.split())
    kill = json.loads((ROOT / "results/kill.json").read_text())
    killed = f"{kill['identical']} of {kill['killed']} runs that were killed at random moments"
    assert f"{killed}, {kill['killed_twice']} of them twice" in " ".join(README.split()) and kill["runs"] == 20


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)


def test_every_option_is_in_the_table():
    import train

    options = set(train.main.__wrapped__.__wrapped__.__annotations__)
    assert set(re.findall(r"`--(\w+)`", README.split("## Options")[1].split("A path given")[0])) == options


def test_the_notebooks_figures_are_whole():
    with (ROOT / "results/notebook/log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 24
