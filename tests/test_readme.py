"""The README claims nothing that isn't in a file, and shows nothing that isn't there."""

import csv
import json
import re

from conftest import ROOT

from runs import read_csv

README = (ROOT / "README.md").read_text()


def test_figures_equal_their_files():
    ours = json.loads((ROOT / "results/cifar10-3-epochs/metrics.json").read_text())
    notebook = read_csv(ROOT / "results/notebook/log.csv")["test_accuracy_percent"]
    rows = re.findall(r"\| (\d+) \| ([\d.]+) % \| \[(\w+\.\w+)\]", README)
    assert rows == [
        (str(ours["epochs"]), f"{100 * ours['accuracy']:.2f}", "metrics.json"),
        ("3", f"{notebook[2]:.2f}", "log.csv"),
        ("24", f"{notebook[23]:.2f}", "log.csv"),
    ]
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
