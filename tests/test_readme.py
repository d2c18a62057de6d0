"""The README claims nothing that isn't in a file, and shows nothing that isn't there."""

import csv
import json
import re
from statistics import mean, stdev

from conftest import ROOT
from recipes import RECIPES
from runs import read_csv

README = (ROOT / "README.md").read_text()


def read_json(path: str):
    return json.loads((ROOT / path).read_text())


def test_figures_equal_their_files():
    rows = re.findall(r"\| (\d+) \| ([\d.]+) % \| (?:([\d.]+) % )?\| \[([\w.-]+)\]", README)
    names = ("assignment", "layer", "fast", "faster")
    runs = {name: read_json(f"results/cifar10-{name}/metrics.json") for name in names}
    notebook = read_csv(ROOT / "results/notebook/log.csv")["test_accuracy_percent"]
    assert rows == [
        *(
            (
                str(run["epochs"]),
                f"{100 * run['accuracy']:.2f}",
                f"{100 * read_json(f'results/cifar10-{name}/two_views.json')['accuracy']:.2f}",
                f"cifar10-{name}",
            )
            for name, run in runs.items()
        ),
        ("24", f"{notebook[23]:.2f}", "", "log.csv"),
    ]
    for name in ("fast", "faster"):
        others = sorted((ROOT / "results/seeds").glob(f"{name}-*/metrics.json"))
        each = [100 * run["accuracy"] for run in (runs[name], *map(read_json, others))]
        words = ", ".join(f"{accuracy:.2f} %" for accuracy in each)
        assert f"| `{name}` | {len(each)} | {mean(each):.2f} % | {stdev(each):.2f} | {words} |" in README
    text = " ".join(README.split())
    seed_43 = read_json("results/seeds/fast-43/metrics.json")["seconds"] / 60
    assert f"with today's code, {seed_43:.0f} minutes for `fast`" in text
    fast, faster = (runs[name]["seconds"] / 60 for name in ("fast", "faster"))
    assert f"took {fast:.0f} minutes for `fast` and {faster:.0f} for `faster`" in text
    assert f"{100 * runs['assignment']['accuracy']:.2f} % after the 24 epochs as assigned" in README
    lr_max = read_json("results/cifar10-assignment/config.json")["lr_max"]
    assert f"smoothed loss is lowest, {lr_max:.2f} in the run below" in text
    overhead = read_json("results/overhead.json")
    assert f"takes {overhead['ratio']:.3f} × the time" in text
    assert f"and precision, in {overhead['precision']} on two CPU cores" in text
    speed = read_json("results/speed.json")
    whole_epoch = 50_000 // 512 * 512 * speed["flops_per_image"] / 1e15  # PFLOP; the last images make no whole batch
    fast, faster = (
        whole_epoch * recipe.epochs * recipe.work_left(0) * (recipe.side(0) / 32) ** 2
        for recipe in (RECIPES["fast"], RECIPES["faster"])
    )
    assert f"these are {fast:.2f} and {faster:.2f} PFLOP of training" in text
    convolutions = sum(part for name, part in speed["operators"].items() if "convolution" in name)
    for figure in (
        f"{convolutions:.0%} of a step's time are the convolutions, forward and backward,"
        f" computed at {speed['part_of_limit'] / convolutions:.2f} × the rate",
        f"workers | {speed['times_plain']:.2f} × as fast |",
        f"tutorials | {speed['times_stock_fastai']:.2f} × as fast |",
        f"precision | {speed['part_of_limit']:.0%} of it |",
        f"takes {speed['data_part_of_step']:.1%} of a step",
        f"needs {speed['peak_gib']:.1f} GiB at most",
        f"two CPU cores, {speed['precision']}, batches of {speed['batch_size']}",
    ):
        assert figure in text
    kill = read_json("results/kill.json")
    killed = f"{kill['identical']} of {kill['killed']} runs that were killed at random moments"
    assert f"{killed}, {kill['killed_twice']} of them twice" in text and kill["runs"] == 20


def test_the_recipes_are_as_the_tables_say():
    recipes = RECIPES.values()
    end = {False: "the rate that it began with", True: "a rate near zero"}
    for row in (
        ["", *(f"`{name}`" for name in RECIPES)],
        ["epochs, highest rate at", *(f"{recipe.epochs}, {recipe.peak_epoch}" for recipe in recipes)],
        ["learning rates", *(f"{recipe.lr_max} at most" if recipe.lr_max else "found" for recipe in recipes)],
        ["ends with", *(end[recipe.annihilate] for recipe in recipes)],
        ["training images", *(", then ".join(f"{side}×{side}" for side, _ in recipe.sizes) for recipe in recipes)],
        ["validation", *(f"after {'each' if recipe.validate == 'each' else 'the last'} epoch" for recipe in recipes)],
    ):
        assert " | ".join(row) + " |\n" in README
    assignment, fast, faster = recipes
    assert f"| `--epochs` | {assignment.epochs} |" in README
    assert f"(`fast` {fast.epochs}, `faster` {faster.epochs};" in README
    assert f"| `--peak_epoch` | {assignment.peak_epoch} of {assignment.epochs} |" in README
    assert f"(`fast` {fast.lr_max}, `faster` {faster.lr_max})" in README


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all(link.startswith("https:") or (ROOT / link).is_file() for link in links)


def test_every_option_is_in_the_table():
    import train

    options = set(train.main.__wrapped__.__wrapped__.__annotations__)
    assert set(re.findall(r"`--(\w+)`", README.split("## Options")[1].split("A path given")[0])) == options


def test_the_notebooks_figures_are_whole():
    with (ROOT / "results/notebook/log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 24
