"""The programs that measure: that they run, and that their results fit together; how large those are is not tested."""

import json
import math
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from commandline import ROOT, warm_python
from torch import nn

from benchmarks import ablation, gpu, seeds, steps
from benchmarks.speed import CONVOLUTIONS
from cifar10.errors import UserError
from cifar10.files import write_json
from cifar10.recipes import RECIPES
from cifar10.training.tricks import count_flop
from model import ResNet
from train import get_dls


def module(name: str, *arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run one of the benchmarks as README says."""
    words = [warm_python(), "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=1800)


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
    assert figures["peak_gib"] > 0


def test_the_operations_of_the_model():
    """Counted by hand: 2 for each weight of a convolution at each place, forward, and twice that backward."""
    forward = sum(
        2 * 9 * (inputs * 64 if layer else inputs) * outputs * 64 * side**2
        for layer, (inputs, outputs, side) in enumerate(CONVOLUTIONS)
    ) + 2 * 512 * 10  # fmt: skip
    first = 2 * 9 * 3 * 64 * 32**2  # whose input needs no gradient, which the backward pass of the first layer saves
    assert count_flop(ResNet(), (3, 32, 32)) == 3 * forward - first


def test_a_step_against_the_bare_loop(tmp_path):
    """The benchmark runs and measures; its committed result is within the bound."""
    tiny = ("--bs", 8, "--steps", 4, "--rounds", 1, "--width", 4)
    done = module("steps", *tiny, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["ratio"] == pytest.approx(figures["ours_ms"] / figures["bare_ms"]) and figures["ratio"] > 0
    assert figures["data_share"] == pytest.approx(1 - figures["one_batch_ms"] / figures["ours_ms"])
    assert figures["one_batch_ms"] > 0 and figures["steps"] == 4
    assert json.loads(done.stdout[done.stdout.index("{") :])["ratio"] == figures["ratio"]
    committed = json.loads((ROOT / "results/overhead.json").read_text())
    assert committed["one_batch_ms"] / committed["bare_ms"] <= 1.05


def test_too_few_steps_are_refused(digits):
    """In the words of the user, before anything is measured."""
    with pytest.raises(UserError, match=rf"an epoch has {len(digits.train)} steps, too few to time 100 after 2 others"):
        steps.compare_with_bare_loop(digits, width=2, steps=100, rounds=1)


def test_all_ways_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert steps.take_turns(ways, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]} and calls == [*"ababab"]


@pytest.mark.slow
def test_the_scale_benchmark(tmp_path):
    tiny = ("--data", "digits", "--steps", 2, "--rounds", 1, "--batch_size", 300, "--width", 2)
    done = module("scale", *tiny, "--out", tmp_path / "scale.json")
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "scale.json").read_text())["seconds"]
    assert (one["processes"], two["processes"], one["speedup"], one["reducing"]) == (1, 2, 1, 0)
    assert two["speedup"] == pytest.approx(one["step"] / two["step"]) and two["reducing"] > 0 and two["loading"] > 0


@pytest.mark.slow
def test_the_memory_benchmark(tmp_path):
    tiny = ("--images", 60, "--size", 32, "--width", 2)
    done = module("memory", *tiny, "--processes", 2, "--out", tmp_path / "memory.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "memory.json").read_text())
    assert 0.2 < figures["peak_gib"] < 3 and figures["pixels_gb"] == pytest.approx(60 * 3 * 32 * 32 / 1e9)
    assert len(figures["proportional_gib"]) == 2 and min(figures["proportional_gib"]) > 0.1


# ---- Ablation


def test_each_variant_changes_what_it_says():
    """The variants are recipes, with only the named fields changed."""
    for name, (changes, variants) in ablation.VARIANTS.items():
        base = replace(RECIPES[name], **changes)
        assert variants[ablation.BASELINE] == {}
        for title, fields in variants.items():
            assert (ablation.changed(base, fields, 45_000) != base) == (title != ablation.BASELINE), title


@pytest.mark.slow
def test_the_ablation(shapes, tmp_path):
    """From the command line: each variant is trained by its own recipe."""
    done = module("ablation", "faster", "--data", shapes, "--width", 2, "--out", tmp_path / "ablation.json")
    assert done.returncode == 0, done.stderr
    assert "| no whitening | 1 | " in done.stdout
    found = json.loads((tmp_path / "ablation.json").read_text())["faster-2"]
    assert set(found["runs"]) == set(ablation.VARIANTS["faster"][1])
    for runs in found["runs"].values():
        assert 0 <= runs["0"]["accuracy"] <= 1 and runs["0"]["nll"] > 0 and runs["0"]["pflop"] > 0
    small_first, plain = (found["runs"][title]["0"]["pflop"] for title in ("16×16 until 10%", ablation.BASELINE))
    assert small_first < plain
    done = module("ablation", "faster", "--data", "digits", "--width", 2, "--out", tmp_path / "ablation.json")
    assert done.returncode == 2 and "holds results of another faster, or of other images" in done.stderr


def test_results_of_another_recipe_are_not_continued():
    """A field that was added since has its default; with one that is gone, it is another recipe."""
    base = RECIPES["faster"]
    fields = json.loads(json.dumps(asdict(base)))
    older = {name: value for name, value in fields.items() if name != "weighted"}
    for recipe, same in (
        (fields, True),
        (older, True),
        (older | dict(whiten=False), False),
        (fields | dict(gone=1), False),
    ):
        assert ablation.is_same(dict(recipe=recipe, data=dict(sha256="x")), base, "x") == same
    assert not ablation.is_same(dict(recipe=fields, data=dict(sha256="y")), base, "x")


def test_an_ablation_goes_on_where_it_was_interrupted(shapes, tmp_path, monkeypatch):
    """What is there already stays, but not that of a variant whose fields have changed since."""
    out, trained = tmp_path / "ablation.json", []
    variants = {"nothing": {}, "no frozen layers": dict(freeze=()), "momentum": dict(momentum=0.9)}
    monkeypatch.setitem(ablation.VARIANTS, "faster", ({}, variants))
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(ablation, "as_completed", list)  # in order

    def train(recipe, *_):
        trained.append(recipe)
        if len(trained) == 1:  # another ablation, at the same time
            write_json(out, json.loads(out.read_text()) | {"assignment-2": "meanwhile"})
        if len(trained) == 2:
            raise KeyboardInterrupt
        return dict(accuracy=0.5, nll=1.0)

    monkeypatch.setattr(ablation, "train", train)
    out.write_text('{"best-2": "of another recipe"}')
    with pytest.raises(KeyboardInterrupt):
        ablation.main("faster", data=str(shapes), width=2, out=str(out))
    done = len(trained)
    ablation.main("faster", data=str(shapes), width=2, out=str(out))
    found = json.loads(out.read_text())
    assert found["best-2"] == "of another recipe" and found["assignment-2"] == "meanwhile"
    assert {*found["faster-2"]["runs"]} == {*variants}
    assert all(runs == {"0": dict(accuracy=0.5, nll=1.0)} for runs in found["faster-2"]["runs"].values())
    assert trained[0].momentum == 0.85 and len(trained) - done == 2 and trained[0] not in trained[done:]

    done = len(trained)
    monkeypatch.setitem(ablation.VARIANTS, "faster", ({}, {"nothing": {}, "momentum": dict(momentum=0.8)}))
    ablation.main("faster", data=str(shapes), width=2, out=str(out))
    assert [recipe.momentum for recipe in trained[done:]] == [0.8]
    assert {*json.loads(out.read_text())["faster-2"]["runs"]} == {*variants}


def test_the_table_of_the_ablation():
    """Differences are paired, with their standard errors."""
    runs = {
        "nothing": {"1": dict(accuracy=0.81, nll=0.6), "0": dict(accuracy=0.8, nll=0.7)},
        "SGD": {"0": dict(accuracy=0.79, nll=0.71), "1": dict(accuracy=0.78, nll=0.63)},
        "one seed": {"0": dict(accuracy=0.81, nll=0.6)},
        "not done": {},
    }
    results = dict(recipe=dict(name="faster", epochs=5), width=16, command="python x", runs=runs)
    text = ablation.table(results)
    assert "PFLOP" not in text
    assert "`faster`, 5 epochs, width 16: `python x`" in text and "not done" not in text
    assert "| nothing | 2 | 80.50 |  | 0.6500 |  |\n" in text
    assert "| SGD | 2 | 78.50 | -2.00 ± 1.00 | 0.6700 | +0.0200 ± 0.0100 |\n" in text
    assert text.endswith("| one seed | 1 | 81.00 | +1.00 | 0.6000 | -0.1000 |")
    counted = dict(runs={"nothing": {"0": dict(accuracy=0.5, pflop=0.1)}, "SGD": {"0": dict(accuracy=0.4, pflop=0.2)}})
    assert ablation.table(results | counted).endswith("| SGD | 1 | 40.00 | -10.00 | 0.2000 |")
    older = ablation.table(results | dict(when="in version 3.0.0"))
    assert "`faster`, 5 epochs, width 16, in version 3.0.0: `python x`" in older
    # Runs of an older version, which measured less, continued by today's.
    runs["SGD"]["2"] = runs["nothing"]["2"] = dict(accuracy=0.8)
    assert "| SGD | 3 | 79.00 | -1.33 ± 0.88 |\n" in ablation.table(results)
    assert ablation.table(results | dict(runs={"nothing": {}})).endswith("---: |")


def test_the_nll_is_that_of_the_best_temperature():
    """So it is the same if all logits are three times as large, and no other temperature gives a lower one."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 5, generator=generator)
    targs = (logits / 2).softmax(dim=1).multinomial(1, generator=generator)[:, 0]
    found = [seeds.nll(SimpleNamespace(preds=(scale * logits).softmax(dim=1), targs=targs)) for scale in (1, 3)]
    others = [nn.functional.cross_entropy(logits / t, targs).item() for t in (0.5, 1, 1.5, 2, 2.5, 4)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] <= min(others) + 1e-5 and found[0] == pytest.approx(others[3], abs=1e-3)


# ---- GPU


def test_without_a_gpu_the_program_says_so(tmp_path):
    done = module("gpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "CUDA GPU" in done.stderr


def test_steps_with_and_without_a_compiler(digits, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    figures = gpu.compiled_results(digits, width=4, steps=3, rounds=1)
    assert figures["times_as_fast"] == pytest.approx(figures["off_ms"] / figures["on_ms"])


def test_training_from_several_seeds():
    """On the same DataLoaders, whose flip alternates: what was trained before makes no difference."""
    recipe = replace(RECIPES["faster"], epochs=1, peak_epoch=0.2)
    dls = get_dls("digits", recipe, flip=True, device="cpu")
    results = [seeds.train_once(dls, recipe, seed, width=4) for seed in (0, 0, 1)]
    accuracies = [metrics["accuracy"] for metrics in results]
    assert results[0]["loss"] == results[1]["loss"] != results[2]["loss"]
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


@pytest.mark.slow
def test_the_gpu_benchmark_with_a_cpu_in_the_place_of_the_gpu(shapes, tmp_path, monkeypatch):
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
        return train_once(dls, recipe, seed, width)

    train_once = gpu.train_once
    monkeypatch.setattr(gpu, "train_once", train)
    monkeypatch.setattr(nn.Module, "compile", fail)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", warn_once)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(gpu, "BETWEEN_SYNCS", 4)
    for name, recipe in RECIPES.items():
        short = dict(epochs=1, peak_epoch=0.2, batch_size=8, lr_max=recipe.lr_max or 0.1)
        monkeypatch.setitem(RECIPES, name, replace(recipe, **short))
    dls = get_dls(shapes, batch_size=8)
    gpu.measure(dls, steps=3, rounds=1, seeds=2, width=4, end=math.inf, out=str(out))
    figures = json.loads(out.read_text())
    assert figures["step"]["ratio"] > 0 and "no compiler" in figures["compile"]
    from_scratch = ("assignment", "fast", "faster", "best")
    assert figures["waits"] == {name: {"fastai/learner.py/7": 1} for name in from_scratch}
    assert modes == ["warn", "default", "default"] * len(from_scratch)
    assert "blows up" in figures["assignment with seed 0"]
    for name in from_scratch:
        assert figures[name]["seeds"] == ([1] if name == "assignment" else [0, 1])
        assert len(figures[name]["accuracy"]["values"]) == len(figures[name]["seeds"])
        assert figures[name]["peak_memory_gib"] == 1
    gpu.measure(dls, steps=3, rounds=1, seeds=2, width=4, end=time.perf_counter(), out=str(out))
    figures = json.loads(out.read_text())
    assert not set(RECIPES) & set(figures) and figures["compile"] == "no time was left"
