"""What a CUDA GPU makes of all this, measured in one go: `python benchmarks/gpu.py --out results/gpu.json`

First a training step: ours, with loading and augmentation, against a bare PyTorch loop over one batch that is already
there, with the same model, precision and batch size; what loading and augmentation take alone; how often the host waits
for the GPU; what `torch.compile` changes. Then whole trainings by each recipe from several seeds. It needs no network,
and begins no training that would end after the time given.
"""

import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from fastai.vision.all import Callback, CancelFitException, DataLoaders, Learner, set_seed
from fastcore.script import call_parse

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.choices import one_cycle
from benchmarks.overhead import plain_step
from data import get_dls
from errors import UserError, command_line
from learner import LOOK_EVERY, find_lrs, get_learner
from recipes import RECIPES
from runs import surroundings, write_json

LR = 0.01
WARM_UP = 5  # steps before each measurement


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- A training step -----------------------------------------------------------------------------------------------


class Stretch(Callback):
    """Measure so many training steps in a row, after those to warm up, and end."""

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


class CountWaits(Stretch):
    """Count the calls that make the host wait for the GPU, and where they are made."""

    def begin(self):
        torch.cuda.set_sync_debug_mode("warn")

    def end(self):
        torch.cuda.set_sync_debug_mode("default")


def our_step(learn: Learner, steps: int) -> float:
    """Seconds of a step of a Learner, with its data, its progress bar and its records."""
    learn.fit(1, LR, cbs=(stretch := Stretch(steps)))
    return stretch.seconds / steps


def bare_step(learn: Learner, width: int, steps: int) -> float:
    """Seconds of a step of a bare loop over one batch of the Learner's."""
    batch = tuple(t.as_subclass(torch.Tensor) for t in learn.dls.train.one_batch())
    step = plain_step(batch, width, learn.precision)
    for _ in range(WARM_UP):
        step()
    begin = now(learn.dls.device)
    for _ in range(steps):
        step()
    return (now(learn.dls.device) - begin) / steps


def data_step(dls: DataLoaders, steps: int) -> float:
    """Seconds of loading and augmenting a batch, alone."""
    for i, _ in enumerate(dls.train):
        if i + 1 == WARM_UP:
            begin = now(dls.device)
        elif i + 1 == WARM_UP + steps:
            break
    return (now(dls.device) - begin) / steps


def waits(learn: Learner, steps: int) -> dict[str, int]:
    """Where the host waited for the GPU in so many training steps → how often. Needs CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn.fit(1, LR, cbs=CountWaits(steps))
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {place: places.count(place) for place in sorted(set(places))}


def step_figures(dls: DataLoaders, width: int, steps: int, rounds: int) -> dict:
    """Ours and the bare loop take turns; of each the median over the rounds, in milliseconds."""
    learn = get_learner(dls, width=width)
    ways = {
        "ours": lambda: our_step(learn, steps),
        "bare": lambda: bare_step(learn, width, steps),
        "data": lambda: data_step(dls, steps),
    }
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(1000 * way())
    figures = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    ratios = dict(ratio=figures["ours_ms"] / figures["bare_ms"], data_share=figures["data_ms"] / figures["ours_ms"])
    return dict(precision=learn.precision, batch_size=dls.bs, steps=steps * rounds) | figures | ratios


def compiled_figures(dls: DataLoaders, width: int, steps: int, rounds: int) -> dict:
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


def whole_training(dls: DataLoaders, name: str, seed: int, width: int) -> tuple[float, float]:
    """Seconds and accuracy of a training by a recipe: with the LR finder, if it has one, and validation."""
    recipe = RECIPES[name]
    begin = now(dls.device)
    set_seed(seed, reproducible=True)
    dls.train.rng.seed(seed)  # which draws the order of the images
    learn = get_learner(dls, recipe=name, width=width)
    if recipe.lr_max is None:
        curve = find_lrs(learn)
        lr_min, lr_max = curve.lr_min, curve.lr_max
    else:
        lr_min, lr_max = recipe.lr_max / 100, recipe.lr_max
    accuracy = one_cycle(learn, recipe, lr_min, lr_max)
    return now(dls.device) - begin, accuracy


def summary(values: list[float]) -> dict:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return dict(mean=statistics.mean(values), standard_deviation=spread, values=values)


@call_parse
@command_line
def main(
    data: str = "cifar10",  # as of train.py
    steps: int = 60,  # of each way in a round, all in one epoch
    rounds: int = 5,  # in which the ways take turns
    seeds: int = 5,  # trainings by each recipe
    minutes: float = 9.0,  # after which no more begins
    out: str = "",  # JSON file for the figures
):
    "Measure steps and whole trainings on a CUDA GPU."
    begin = time.perf_counter()
    if not torch.cuda.is_available():
        raise UserError("this program measures a CUDA GPU, and there is none that PyTorch can use here")
    dls, width = get_dls(data), 64
    set_seed(0, reproducible=True)
    figures = surroundings() | dict(step=step_figures(dls, width, steps, rounds))
    figures["waits"] = waits(get_learner(dls), LOOK_EVERY - WARM_UP - 1)
    figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(figures["step"], figures["waits"], flush=True)
    trainings = figures["trainings"] = {name: {} for name in RECIPES}
    longest = dict.fromkeys(RECIPES, 0.0)
    results = {name: [] for name in RECIPES}
    for seed in range(seeds):
        for name in RECIPES:
            if time.perf_counter() - begin + longest[name] > 60 * minutes:
                print(f"no time is left for seed {seed} of {name}")
                continue
            results[name].append(whole_training(dls, name, seed, width))
            seconds, accuracies = map(list, zip(*results[name], strict=True))
            longest[name] = max(seconds)
            trainings[name] = dict(seeds=len(seconds), seconds=summary(seconds), accuracy=summary(accuracies))
            print(f"{name}, seed {seed}: {seconds[-1]:.1f} s, {accuracies[-1]:.2%}", flush=True)
            if out:
                write_json(Path(out), figures)
    if time.perf_counter() - begin < 60 * minutes:  # last, because it may take long, or not work at all
        try:
            figures["compile"] = compiled_figures(dls, width, steps, rounds)
        except Exception as reason:  # of a compiler that isn't ours
            figures["compile"] = f"failed: {type(reason).__name__}"
        print(f"torch.compile: {figures['compile']}")
        if out:
            write_json(Path(out), figures)
