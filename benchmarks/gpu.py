"""Everything about a CUDA GPU, measured in one go: `python -m benchmarks.gpu --data cifar10.tgz --out gpu.json`

First a training step, as benchmarks.steps measures it, and how often the host waits for the GPU. Then full training
runs by each recipe with several seeds. Last, what `torch.compile` changes. No training and no compilation starts that
would probably exceed the time limit.
"""

import gc
import itertools
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from fastai.vision.all import DataLoaders, Learner, set_seed

from benchmarks.seeds import train_once
from benchmarks.steps import WARM_UP, TimeSteps, compare_with_bare_loop, learner_step, take_turns
from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.errors import UserError
from cifar10.files import write_json
from cifar10.hardware import collect_env, resolve_precision
from cifar10.recipes import RECIPES
from cifar10.training.callbacks import SYNC_EVERY
from train import get_dls, get_learner

BETWEEN_SYNCS = SYNC_EVERY - WARM_UP - 1  # steps after those to warm up in which nothing should make the host wait
WAIT = "called a synchronizing"  # PyTorch's warning
COMPILING = 120  # seconds that torch.compile needs, about


class WarnOfWaits(TimeSteps):
    """Have PyTorch warn of each call that makes the host wait for the GPU."""

    def begin(self):
        super().begin()
        torch.cuda.set_sync_debug_mode("warn")

    def end(self):
        torch.cuda.set_sync_debug_mode("default")
        super().end()


def waits(learn: Learner) -> dict[str, int]:
    """Where the host waits for the GPU in the steps between two reads of the loss → how often. Needs CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            learner_step(learn, BETWEEN_SYNCS, WarnOfWaits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if WAIT in str(warning.message)]
    return dict(Counter("/".join([*Path(w.filename).parts[-2:], str(w.lineno)]) for w in found))


def compiled_results(dls: DataLoaders, width: int, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step with `torch.compile` and without, in turn; how long compiling took."""
    usual, compiled = get_learner(dls, width=width), get_learner(dls, width=width)
    compiled.model.compile()
    begin = time.perf_counter()
    learner_step(compiled, 1)
    seconds = time.perf_counter() - begin
    ways = {"on_ms": lambda: learner_step(compiled, steps), "off_ms": lambda: learner_step(usual, steps)}
    results = {name: 1000 * median(values) for name, values in take_turns(ways, rounds).items()}
    return results | dict(times_as_fast=results["off_ms"] / results["on_ms"], seconds_to_compile=seconds)


def summarize(trainings: dict[int, dict]) -> dict[str, Any]:
    """Mean, standard deviation and all values of seconds and accuracies of training runs by their seeds."""
    results: dict = {"seeds": list(trainings)}
    for quantity in ("seconds", "accuracy", "tta_accuracy"):
        values = [metrics[quantity] for metrics in trainings.values()]
        spread = stdev(values) if len(values) > 1 else None
        results[quantity] = dict(mean=mean(values), standard_deviation=spread, values=values)
    return results


def measure(dls: DataLoaders, steps: int, rounds: int, seeds: int, width: int, end: float, out: str | None):
    """Measure everything, and write each result to `out` at once.

    No training and no compilation starts that would probably end after `end` of the performance counter.
    """
    results = collect_env()

    def note(name: str, value):
        results[name] = value
        print(f"{name}: {value}")
        if out:
            write_json(Path(out), results)

    set_seed(0, reproducible=True)
    note("step", compare_with_bare_loop(dls, width, steps, rounds))
    from_scratch = {name: recipe for name, recipe in RECIPES.items() if recipe.train_norm_stats}
    note("waits", {name: waits(get_learner(dls, recipe, width=width)) for name, recipe in from_scratch.items()})
    trainings = {name: {} for name in from_scratch}
    epoch = len(dls.train) * results["step"]["ours_ms"] / 1000
    expected = {name: 1.5 * epoch * recipe.epochs for name, recipe in from_scratch.items()}
    for seed, name in itertools.product(range(seeds), from_scratch):
        if time.perf_counter() + expected[name] > end:
            print(f"no time is left for {name} with seed {seed}")
            continue
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        try:
            trainings[name][seed] = train_once(get_dls(dls.train.table, RECIPES[name]), RECIPES[name], seed, width)
        except UserError as reason:  # from the LR finder
            note(f"{name} with seed {seed}", f"failed: {reason}")
            continue
        expected[name] = max(metrics["seconds"] for metrics in trainings[name].values())
        note(name, summarize(trainings[name]) | {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30})
    if time.perf_counter() + COMPILING < end:
        try:
            note("compile", compiled_results(dls, width, steps, rounds))
        except Exception as reason:  # of a compiler that isn't ours
            note("compile", f"failed: {type(reason).__name__}: {str(reason)[:300]}")
    else:
        note("compile", "no time was left")


def main(
    data: str = "cifar10",  # as for train.py
    steps: int = 60,  # steps of each variant per round, all in one epoch
    rounds: int = 5,  # rounds, in which the variants take turns
    seeds: int = 5,  # runs by each recipe
    width: int = 64,  # width of the ResNet
    minutes: float = 9.0,  # time limit for everything
    out: OutputFile = None,  # JSON file for the results
):
    "Measure steps and whole training runs on a CUDA GPU."
    end = time.perf_counter() + 60 * minutes
    if not torch.cuda.is_available():
        raise UserError("this program measures a CUDA GPU, and there is none that PyTorch can use here")
    dls = get_dls(data)
    if resolve_precision("auto", dls.device) == "fp16":
        raise UserError("this GPU computes no bf16 in hardware, and in fp16 each step waits for its gradients' scale")
    measure(dls, steps, rounds, seeds, width, end, out)


if __name__ == "__main__":
    cli.run(main)
