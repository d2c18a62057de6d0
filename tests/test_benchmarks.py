"""The programs that measure: that they run, and that their results fit together; how large those are is not tested."""

import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch
from commandline import ROOT
from matplotlib import pyplot as plt
from torch import nn

from benchmarks import ablation, compare, gpu, scale, seeds
from benchmarks.speed import CONVOLUTIONS
from cifar10.errors import UserError
from cifar10.training.recipes import RECIPES
from cifar10.training.tricks import count_flop
from model import ResNet


def module(name: str, *arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run one of the benchmarks as README says."""
    words = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_speed_benchmark(shapes, tmp_path):
    tiny = ("--bs", 8, "--width", 4, "--rounds", 1, "--steps", 2, "--out", tmp_path / "speed.json")
    done = module("speed", "--data", shapes, *tiny)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "speed.json").read_text())
    rates = figures["images_per_second"]
    assert set(rates) == {"ours", "plain", "stock_fastai"}
    assert figures["times_plain"] == pytest.approx(rates["ours"] / rates["plain"])
    assert figures["model_flops_per_second"] == pytest.approx(rates["ours"] * figures["flops_per_image"])
    assert figures["part_of_limit"] == pytest.approx(
        figures["model_flops_per_second"] / figures["matrix_flops_per_second"]
    )
    assert figures["convolutions_part_of_step"] > 0
    assert figures["data_part_of_step"] == pytest.approx(rates["ours"] / figures["data_images_per_second"])
    assert figures["peak_gib"] > 0 and any("conv" in name for name in figures["operators"])


def test_the_operations_of_the_model():
    """Counted by hand: 2 for each weight of a convolution at each place, forward, and twice that backward."""
    forward = sum(
        2 * 9 * (inputs * 64 if layer else inputs) * outputs * 64 * side**2
        for layer, (inputs, outputs, side) in enumerate(CONVOLUTIONS)
    ) + 2 * 512 * 10  # fmt: skip
    first = 2 * 9 * 3 * 64 * 32**2  # whose input needs no gradient, which the backward pass of the first layer saves
    assert count_flop(ResNet(), (3, 32, 32)) == 3 * forward - first


@pytest.mark.slow
def test_killed_runs_resume_exactly(tmp_path):
    """A smaller version of the program's own test; in both records every run was killed and ends identical."""
    done = module("resume", "--runs", 2, "--out", tmp_path / "resume.json")
    assert done.returncode == 0, done.stdout + done.stderr
    for record, runs in ((tmp_path / "resume.json", 2), (ROOT / "results/resume.json", 20)):
        figures = json.loads(record.read_text())
        assert figures["runs"] == figures["identical"] == figures["killed"] == len(figures["record"]) == runs


def test_the_bare_loop(tmp_path):
    """The benchmark runs and measures; its committed result is within the bound."""
    done = module("overhead", "--bs", 8, "--steps", 4, "--width", 4, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (
        figures["ratio"] == pytest.approx(figures["ours_seconds"] / figures["plain_seconds"]) and figures["ratio"] > 0
    )
    assert json.loads((ROOT / "results/overhead.json").read_text())["ratio"] <= 1.05


@pytest.mark.slow
def test_the_scale_benchmark(tmp_path):
    tiny = ("--data", "digits", "--steps", 2, "--rounds", 1, "--batch_size", 600, "--width", 2, "--gpu", "none")
    done = module("scale", *tiny, "--out", tmp_path / "scale.json")
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "scale.json").read_text())["seconds"]
    assert (one["processes"], two["processes"], one["speedup"], one["reducing"]) == (1, 2, 1, 0)
    assert two["speedup"] == pytest.approx(one["step"] / two["step"]) and two["reducing"] > 0 and two["loading"] > 0


def test_the_projection():
    """By hand: a step of 10 ms, 2 of them loading, on 8 GPUs; 300 MB at 300 GB/s, and 12 all-reduces."""
    found = scale.project(0.010, 0.002, parameters=75_000_000, norms=5, gpus=8)
    reducing = 2 * 7 / 8 * 1.0 + 12 * 0.02  # milliseconds
    assert found["step_ms"] == pytest.approx(8 / 8 + 2 + reducing)
    assert found["efficiency"] == pytest.approx(10 / found["step_ms"] / 8)
    assert scale.project(0.010, 0.002, 1, 1, gpus=1)["efficiency"] == 1


@pytest.mark.slow
def test_the_memory_benchmark(tmp_path):
    tiny = ("--images", 60, "--size", 32, "--width", 2)
    done = module("memory", *tiny, "--processes", 2, "--out", tmp_path / "memory.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "memory.json").read_text())
    assert 0.2 < figures["peak_gib"] < 3 and figures["pixels_gb"] == pytest.approx(60 * 3 * 32 * 32 / 1e9)
    assert len(figures["proportional_gib"]) == 2 and min(figures["proportional_gib"]) > 0.1


# ---- Runs side by side


def finished(folder, accuracy, seed, lr_max=0.5, **options):
    """The folder of a finished run, by hand."""
    folder.mkdir()
    config = dict(options=dict(recipe="fast", seed=seed, valid="test") | options, data=dict(name="digits", sha256="x"))
    config |= dict(recipe=asdict(replace(RECIPES["fast"], lr_max=lr_max)))
    metrics = dict(accuracy=accuracy, tta_accuracy=accuracy + 0.01, epochs=2, seconds=60, pflop=0.5)
    for name, value in (("config", config), ("metrics", metrics)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "history.csv").write_text(f"epoch,train_accuracy,valid_accuracy\n1,0.5,nan\n2,0.9,{accuracy}\n")
    return folder


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path):
    runs = [finished(tmp_path / f"run{seed}", 0.9 + seed / 100, seed) for seed in (1, 2)]
    runs.append(finished(tmp_path / "other", 0.8, 1, width=8))
    runs.append(finished(tmp_path / "changed", 0.7, 1, lr_max=0.4))  # by a recipe that was changed since
    done = module("compare", *runs, "--out", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert rows[0] == ["run1, run2", "digits", "2", "2", "91.50% ± 0.71", "92.50% ± 0.71", "0.5", "1.0"]
    others = [["other", "digits", "1", "2", "80.00%"], ["changed", "digits", "1", "2", "70.00%"]]
    assert [row[:5] for row in rows[1:3]] == others
    assert len(rows) == 4  # and where the curves are
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_beside_the_notebook():
    """Only what was evaluated on the same images."""
    run = compare.load(str(ROOT / "results/cifar10-best"))
    drawn = compare.curves([[run]])
    assert [name for name, *_ in drawn] == ["cifar10-best", "the assignment's notebook"]
    assert drawn[0][2][-1] == pytest.approx(100 * run["metrics"]["accuracy"], abs=0.02) and len(drawn[1][1]) == 24
    compare.plot(drawn)
    both, close_up = plt.gcf().axes
    assert {len(line.get_xdata()) for line in both.lines} == {24} and close_up.get_xlabel() == "Epoch"
    plt.close()
    assert len(compare.curves([[run | {"data": {"name": "digits"}}]])) == 1


def test_what_is_not_a_run_is_not_compared(tmp_path):
    done = module("compare", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not the folder of a finished run" in done.stderr


# ---- Ablation


def test_each_variant_changes_what_it_says():
    """The variants are recipes, with only the named fields changed."""
    for name, (changes, variants) in ablation.VARIANTS.items():
        base = replace(RECIPES[name], **changes)
        assert variants[ablation.BASELINE] == {}
        for title, fields in variants.items():
            variant = replace(base, **fields)
            assert (variant != base) == (title != ablation.BASELINE), title


@pytest.mark.slow
def test_the_ablation(shapes, tmp_path):
    """From the command line, with a variant or two: each is trained by its own recipe."""
    done = module("ablation", "faster", "--data", shapes, "--width", 2, "--out", tmp_path / "ablation.json")
    assert done.returncode == 0, done.stderr
    assert "| no frozen layers | " in done.stdout
    accuracies = json.loads((tmp_path / "ablation.json").read_text())["faster"]["accuracies"]
    assert set(accuracies) == set(ablation.VARIANTS["faster"][1])
    assert all(0 <= accuracy <= 1 for by_seed in accuracies.values() for accuracy in by_seed.values())


def test_an_ablation_goes_on_where_it_was_interrupted(shapes, tmp_path, monkeypatch):
    """Until it is complete, the result of before stays."""
    out, trained = tmp_path / "ablation.json", []
    variants = {"nothing": {}, "no frozen layers": dict(freeze=()), "momentum 0.9": dict(momentum=0.9)}
    monkeypatch.setitem(ablation.VARIANTS, "faster", ({}, variants))
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(ablation, "as_completed", list)  # in order

    def train(recipe, *_):
        trained.append(recipe)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(ablation, "holdout_accuracy", train)
    out.write_text('{"faster": "before", "best": "of another recipe"}')
    with pytest.raises(KeyboardInterrupt):
        ablation.main("faster", data=str(shapes), width=2, out=str(out))
    assert json.loads(out.read_text())["faster"] == "before"
    done = len(trained)
    ablation.main("faster", data=str(shapes), width=2, out=str(out))
    found = json.loads(out.read_text())
    assert found["best"] == "of another recipe" and found["faster"]["accuracies"] == {t: {"0": 0.5} for t in variants}
    assert trained[0].momentum == 0.85 and len(trained) - done == 2 and trained[0] not in trained[done:]
    assert not list(tmp_path.glob("*.part"))


def test_the_table_of_the_ablation():
    accuracies = {
        "nothing": {"1": 0.81, "0": 0.8},
        "SGD": {"0": 0.79, "1": 0.78},
        "momentum 0.9": {"0": 0.81, "1": 0.82},
        "not done": {"0": 0.5},
    }
    results = dict(epochs=5, width=16, seeds=2, command="python x", accuracies=accuracies)
    text = ablation.table("faster", results)
    assert "`faster`, 5 epochs, width 16, 2 seeds: `python x`" in text and "not done" not in text
    assert "| nothing | 80.50% |  |\n| SGD | 78.50% | -2.00 ± 1.41 |\n| momentum 0.9 | 81.50% | +1.00 ± 0.00 |" in text
    assert ablation.table("faster", results | dict(accuracies={"nothing": {}})).endswith("---: |")


# ---- GPU


def test_without_a_gpu_the_program_says_so(tmp_path):
    done = module("gpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "CUDA GPU" in done.stderr


def test_the_steps_of_the_gpu_benchmark(digits, monkeypatch):
    figures = gpu.step_results(digits, width=4, steps=3, rounds=1)
    assert figures["ratio"] == pytest.approx(figures["ours_ms"] / figures["bare_ms"]) and figures["bare_ms"] > 0
    assert figures["data_share"] == pytest.approx(1 - figures["one_batch_ms"] / figures["ours_ms"])
    assert figures["one_batch_ms"] > 0
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    figures = gpu.compiled_results(digits, width=4, steps=3, rounds=1)
    assert figures["times_as_fast"] == pytest.approx(figures["off_ms"] / figures["on_ms"])


def test_several_trainings(digits, monkeypatch):
    recipe = replace(RECIPES["faster"], epochs=1, peak_epoch=0.2)
    results = [seeds.train_once(digits, recipe, seed, width=4) for seed in (0, 0, 1)]
    accuracies = [metrics["accuracy"] for metrics in results]
    assert accuracies[0] == accuracies[1] and results[0]["loss"] != results[2]["loss"]
    assert results[0]["pflop"] > 0 and 0 < results[0]["tta_accuracy"] <= 1 and len(results[0]["history"]) == 1
    figures = gpu.summarize(dict(enumerate(results)))
    assert figures["seeds"] == [0, 1, 2] and figures["accuracy"]["values"] == accuracies
    assert figures["seconds"]["mean"] == pytest.approx(sum(metrics["seconds"] for metrics in results) / 3)
    assert figures["accuracy"]["standard_deviation"] == pytest.approx(torch.tensor(accuracies).std().item(), rel=1e-4)
    assert gpu.summarize({5: results[0]})["seconds"]["standard_deviation"] is None


def test_seeds_on_the_command_line(tmp_path):
    """Each seed has a folder with its metrics, and with what they depend on."""
    quick = '{"epochs": 1, "peak_epoch": 0.5, "freeze": []}'
    arguments = ("faster", "--data", "digits", "--seeds", 2, "--first", 7, "--width", 4, "--changes", quick)
    done = module("seeds", *arguments, "--valid", "holdout", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for seed in (7, 8):
        metrics, config = (
            json.loads((tmp_path / f"faster-{seed}" / f"{name}.json").read_text()) for name in ("metrics", "config")
        )
        assert config["seed"] == seed and config["recipe"]["epochs"] == 1 and config["valid"] == "holdout"
        assert f"seed {seed}: {metrics['accuracy']:.2%}" in done.stdout
    done = module("seeds", *arguments, "--out", tmp_path)  # on the test split
    assert done.returncode == 2 and "faster-7 holds a result of other settings; choose another --out" in done.stderr
    done = module("seeds", "fast", "--data", "digits", "--changes", '{"epoch": 1}')
    assert done.returncode == 2 and "must be a recipe's fields in JSON" in done.stderr


def test_the_gpu_benchmark_with_a_cpu_in_the_place_of_the_gpu(digits, tmp_path, monkeypatch):
    """From its first step to its last, so that it doesn't fail on a GPU that is at hand for minutes only."""
    modes, out = [], tmp_path / "gpu.json"

    def fail(model):
        raise RuntimeError("no compiler")

    def warn_once(mode):
        modes.append(mode)
        if mode == "warn":
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "a/fastai/learner.py", 7)
            warnings.warn("something else", stacklevel=1)

    def train(dls, recipe, seed, width):
        if (recipe.name, seed) == ("assignment", 0):
            raise UserError("the loss blows up")
        return train_once(dls, replace(recipe, batch_size=64), seed, width)

    train_once = gpu.train_once
    monkeypatch.setattr(gpu, "train_once", train)
    monkeypatch.setattr(nn.Module, "compile", fail)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", warn_once)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(gpu, "BETWEEN_SYNCS", 4)
    for name, recipe in RECIPES.items():
        monkeypatch.setitem(RECIPES, name, replace(recipe, epochs=1, peak_epoch=0.2, lr_max=recipe.lr_max or 0.1))
    gpu.measure(digits, steps=3, rounds=1, seeds=2, width=4, end=time.perf_counter() + 600, out=str(out))
    figures = json.loads(out.read_text())
    assert figures["step"]["ratio"] > 0 and "no compiler" in figures["compile"]
    assert figures["waits"] == {name: {"fastai/learner.py/7": 1} for name in RECIPES}
    assert modes == ["warn", "default", "default"] * len(RECIPES)
    assert "blows up" in figures["assignment with seed 0"]
    for name in RECIPES:
        assert figures[name]["seeds"] == ([1] if name == "assignment" else [0, 1])
        assert len(figures[name]["accuracy"]["values"]) == len(figures[name]["seeds"])
        assert figures[name]["peak_memory_gib"] == 1
    gpu.measure(digits, steps=3, rounds=1, seeds=2, width=4, end=time.perf_counter(), out=str(out))
    figures = json.loads(out.read_text())
    assert not set(RECIPES) & set(figures) and figures["compile"] == "no time was left"
