"""Runs side by side: which of them are one row, and what is drawn."""

import json
import os
from dataclasses import asdict, replace

import pandas as pd
import pytest
from commandline import ROOT, command
from matplotlib import pyplot as plt

import compare
from cifar10.recipes import RECIPES


def finished(folder, accuracy, seed, old=False, options=(), **changes):
    """The folder of a finished run, by hand."""
    folder.mkdir()
    width = dict(width=64 if old else None)
    options = dict(recipe="fast", seed=seed, valid="test", **width, **dict(options))
    recipe = asdict(replace(RECIPES["fast"], **changes))
    if old:  # what there was not in version 3.0
        del recipe["width"], recipe["train_norm_stats"]
    config = dict(options=options, recipe=recipe, data=dict(name="digits", sha256="x"))
    metrics = dict(accuracy=accuracy, tta_accuracy=accuracy + 0.01, epochs=2, seconds=60, pflop=0.5)
    for name, value in (("config", config), ("metrics", metrics)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "history.csv").write_text(f"epoch,train_accuracy,valid_accuracy\n1,0.5,nan\n2,0.9,{accuracy}\n")
    return folder


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path):
    runs = [finished(tmp_path / f"run{seed}", 0.9 + seed / 100, seed) for seed in (1, 2)]
    runs.append(finished(tmp_path / "old", 0.93, 3, old=True))
    runs.append(finished(tmp_path / "typed", 0.94, 4, options=dict(epochs=8, weighted=False, timeout=5)))
    runs.append(finished(tmp_path / "other", 0.8, 1, width=8))
    runs.append(finished(tmp_path / "changed", 0.7, 1, lr_max=0.4))  # by a recipe that was changed since
    done = command("compare.py", *runs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert rows[0] == ["run1, run2, old, typed", "digits", "4", "2", "92.50% ± 1.29", "93.50% ± 1.29", "0.5", "1.0"]
    others = [["other", "digits", "1", "2", "80.00%"], ["changed", "digits", "1", "2", "70.00%"]]
    assert [row[:5] for row in rows[1:3]] == others
    assert len(rows) == 4  # and where the curves are
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_beside_the_notebook():
    """Only what was evaluated on the same images."""
    run = compare.load(str(ROOT / "results/cifar10-best"))
    drawn = compare.curves([run])
    assert [name for name, _ in drawn] == ["cifar10-best", "the assignment's notebook"]
    (_, ours), (_, notebook) = drawn
    assert ours["valid_accuracy"].iloc[-1] == pytest.approx(100 * run["metrics"]["accuracy"], abs=0.02)
    assert len(notebook) == 24
    compare.plot(drawn)
    both, close_up = plt.gcf().axes
    assert {len(line.get_xdata()) for line in both.lines} == {24} and close_up.get_xlabel() == "Epoch"
    plt.close()
    assert len(compare.curves([run | {"data": "digits"}])) == 1


def test_the_close_up_begins_where_the_first_run_comes_near_the_best_accuracy():
    """Also beside a run that never does, and whose name holds dollar signs."""
    good = pd.DataFrame(dict(valid=[50.0, 89.0, 91.0, 95.0], train=[60.0, 70.0, 80.0, 90.0]), index=[1, 2, 3, 4])
    compare.plot([("good", good), ("$bad$", good / 2)])
    _, close_up = plt.gcf().axes
    assert close_up.get_xlim()[0] == 2 and close_up.get_ylim() == (90, 100)
    assert [text.get_text() for text in plt.gcf().legends[0].get_texts()] == ["good: 95.00%", "$bad$: 47.50%"]
    assert not plt.gcf().legends[0].get_texts()[1].get_parse_math()
    plt.close()


def test_the_latest_run_beside_another(tmp_path):
    """Once, even if it is named as well."""
    (tmp_path / "runs").mkdir()
    for seed, name in enumerate(("older", "newer")):
        finished(tmp_path / "runs" / name, 0.9, seed)
    os.utime(tmp_path / "runs/older/config.json", (0, 0))
    done = command("compare.py", "runs/older", "last", "runs/newer", cwd=tmp_path, drawn=False)
    assert done.returncode == 0 and "| older, newer | digits | 2 | " in done.stdout, done


def test_what_is_not_a_run_is_not_compared(tmp_path):
    done = command("compare.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not the folder of a finished run" in done.stderr
