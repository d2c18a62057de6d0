"""Everything about a CUDA GPU, measured in one go: `python -m benchmarks.gpu --data cifar10.tgz --out gpu.json`

First a training step: ours, with loading and augmentation, against a plain PyTorch loop over one batch that is on the
GPU already, with the same model, precision and batch size; ours over one batch as well, which shows what loading and
augmentation add; how often the host waits for the GPU. Then full training runs by each recipe with several seeds. Last,
what `torch.compile` changes. No training and no compilation starts that would probably exceed the time limit.
"""

import gc
import itertools
import statistics
import time
import warnings
from pathlib import Path

import torch
from fastai.vision.all import Callback, CancelFitException, DataLoaders, Learner, set_seed

from benchmarks.overhead import OneBatch, plain_step
from benchmarks.seeds import now, train_once
from cifar10 import cli
from cifar10.errors import UserError
from cifar10.files import OutputFile, write_json
from cifar10.hardware import collect_env, resolve_precision
from cifar10.training.callbacks import SYNC_EVERY, StopAtNaN
from cifar10.training.recipes import RECIPES
from train import get_dls, get_learner

LR = 0.01
WARM_UP = 5  # steps before each measurement
BETWEEN_SYNCS = SYNC_EVERY - WARM_UP - 1  # steps after those in which nothing should make the host wait
WAIT = "called a synchronizing"  # PyTorch's warning
COMPILING = 120  # seconds that torch.compile needs, about


# ---- A training step -----------------------------------------------------------------------------------------------


class TimeSteps(Callback):
    """Time `steps` training steps after some to warm up, calling `begin` and `end` around them, and then stop."""

    order, run_valid = 1000, False

    def __init__(self, steps: int):
        self.steps = steps

    def after_batch(self):
        if self.iter + 1 == WARM_UP:
            self.begin()
        elif self.iter + 1 == WARM_UP + self.steps:
            self.end()
            raise CancelFitException

    def begin(self):
        self.seconds = -now(self.dls.device)

    def end(self):
        self.seconds += now(self.dls.device)


class WarnOfWaits(TimeSteps):
    """Have PyTorch warn of each call that makes the host wait for the GPU."""

    def begin(self):
        torch.cuda.set_sync_debug_mode("warn")

    def end(self):
        torch.cuda.set_sync_debug_mode("default")


def our_step(learn: Learner, steps: int) -> float:
    """Seconds of a step of a Learner, with its data, its progress bar and its records, as train.py trains."""
    learn.fit_one_cycle(1, LR, cbs=[StopAtNaN(), timer := TimeSteps(steps)])
    return timer.seconds / steps


def bare_step(learn: Learner, width: int, steps: int) -> float:
    """Seconds of a step of a bare loop over one batch of the Learner's."""
    batch = tuple(t.as_subclass(torch.Tensor) for t in learn.dls.train.one_batch())
    step = plain_step(batch, len(learn.dls.vocab), width, learn.precision)
    for _ in range(WARM_UP):
        step()
    begin = now(learn.dls.device)
    for _ in range(steps):
        step()
    return (now(learn.dls.device) - begin) / steps


def one_batch(dls: DataLoaders) -> DataLoaders:
    """DataLoaders of nothing but one batch, loaded and augmented, in epochs as long as before."""
    batch = dls.train.one_batch()
    same = DataLoaders(OneBatch(batch, len(dls.train)), OneBatch(batch, 1), device=dls.device)
    same.vocab = dls.vocab
    return same


def waits(learn: Learner) -> dict[str, int]:
    """Where the host waits for the GPU in the steps between two reads of the loss → how often. Needs CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            learn.fit_one_cycle(1, LR, cbs=[StopAtNaN(), WarnOfWaits(BETWEEN_SYNCS)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = ["/".join([*Path(w.filename).parts[-2:], str(w.lineno)]) for w in caught if WAIT in str(w.message)]
    return {place: places.count(place) for place in sorted(set(places))}


def step_results(dls: DataLoaders, width: int, steps: int, rounds: int) -> dict:
    """Ours, ours over one batch and the bare loop take turns; of each the median of the rounds, in milliseconds."""
    learn, fed = get_learner(dls, width=width), get_learner(one_batch(dls), width=width)
    ways = {
        "ours": lambda: our_step(learn, steps),
        "one_batch": lambda: our_step(fed, steps),
        "bare": lambda: bare_step(learn, width, steps),
    }
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(1000 * way())
    results = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    ours = results["ours_ms"]
    ratios = dict(ratio=ours / results["bare_ms"], data_share=1 - results["one_batch_ms"] / ours)
    return dict(precision=learn.precision, batch_size=dls.bs, steps=steps * rounds) | results | ratios


def compiled_results(dls: DataLoaders, width: int, steps: int, rounds: int) -> dict:
    """Milliseconds of a step with `torch.compile` and without, in turn; how long compiling took."""
    usual, compiled = get_learner(dls, width=width), get_learner(dls, width=width)
    compiled.model.compile()
    begin = time.perf_counter()
    our_step(compiled, 1)
    seconds = time.perf_counter() - begin
    times = [(1000 * our_step(compiled, steps), 1000 * our_step(usual, steps)) for _ in range(rounds)]
    on, off = (statistics.median(values) for values in zip(*times, strict=True))
    return dict(on_ms=on, off_ms=off, times_as_fast=off / on, seconds_to_compile=seconds)


# ---- Whole trainings -----------------------------------------------------------------------------------------------


def summarize(trainings: dict[int, dict]) -> dict:
    """Mean, standard deviation and all values of seconds and accuracies of trainings by their seeds."""
    results: dict = {"seeds": list(trainings)}
    for quantity in ("seconds", "accuracy", "tta_accuracy"):
        values = [metrics[quantity] for metrics in trainings.values()]
        spread = statistics.stdev(values) if len(values) > 1 else None
        results[quantity] = dict(mean=statistics.mean(values), standard_deviation=spread, values=list(values))
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
    note("step", step_results(dls, width, steps, rounds))
    note("waits", {name: waits(get_learner(dls, recipe, width=width)) for name, recipe in RECIPES.items()})
    trainings = {name: {} for name in RECIPES}
    epoch = len(dls.train) * results["step"]["ours_ms"] / 1000
    expected = {name: 1.5 * epoch * recipe.epochs for name, recipe in RECIPES.items()}
    for seed, name in itertools.product(range(seeds), RECIPES):
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
    rounds: int = 5,  # rounds, in which the variants alternate
    seeds: int = 5,  # runs by each recipe
    width: int = 64,  # width of the ResNet
    minutes: float = 9.0,  # time limit for everything
    out: OutputFile = None,  # JSON file for the results
):
    "Measure steps and whole trainings on a CUDA GPU."
    end = time.perf_counter() + 60 * minutes
    if not torch.cuda.is_available():
        raise UserError("this program measures a CUDA GPU, and there is none that PyTorch can use here")
    dls = get_dls(data)
    if resolve_precision("auto", dls.device) == "fp16":
        raise UserError("this GPU computes no bf16 in hardware, and in fp16 each step waits for its gradients' scale")
    if WARM_UP + max(steps, BETWEEN_SYNCS) > len(dls.train):
        raise UserError(f"an epoch of {dls.train.table.name} has {len(dls.train)} steps, too few to measure")
    measure(dls, steps, rounds, seeds, width, end, out)


if __name__ == "__main__":
    cli.run(main)
