"""What each choice is worth on images that are held out of training: `python benchmarks/choices.py faster`

Every line of its table is a recipe of which one thing is changed. A net of a quarter of the usual width is trained from
scratch on nine tenths of the training images and asked about the other tenth; the test split is left alone. As many
nets are trained at a time as there are cores, on one thread each, because a small net keeps no more than one core busy.
"""

import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
from fastai.vision.all import Learner, set_seed
from fastcore.script import call_parse

sys.path.insert(0, str(Path(__file__).parents[1]))

from augment import RandomCrop
from data import get_dls
from errors import command_line
from files import write
from learner import ValidateLast, get_learner
from muon import CONV_LR
from recipes import RECIPES, Recipe
from runs import surroundings, write_json


class Change(NamedTuple):
    words: str
    recipe: dict[str, Any]  # field → value
    constant: tuple[str, Any] | None = None  # of the code: name → value


def sgd(params, dtype, **options) -> torch.optim.SGD:
    """SGD with Nesterov momentum in the place of Muon."""
    return torch.optim.SGD(params, nesterov=True, **options)


UNCHANGED = "nothing"
SGD = Change("SGD for all parameters", {}, ("learner.Muon", sgd))
SMALL_STEPS = Change("steps half as large for convolutions", {}, ("muon.CONV_LR", CONV_LR / 2))
SMOOTHING_OFF = Change("labels not smoothed", {}, ("learner.LABEL_SMOOTHING", 0.0))

# What is compared: a recipe's name → what it is changed to first, because 24 epochs are too many for this; the changes.
CHANGES: dict[str, tuple[dict[str, Any], list[Change]]] = {
    "assignment": (
        dict(epochs=6, peak_epoch=1.25, lr_max=0.3),
        [
            Change("rates up to 0.15", dict(lr_max=0.15)),
            Change("rates up to 0.6", dict(lr_max=0.6)),
            SMALL_STEPS,
            SGD,
            Change("down to a rate near zero", dict(annihilate=True)),
            SMOOTHING_OFF,
            Change("black padding", {}, ("data.RandomCrop", partial(RandomCrop, pad_mode="constant"))),
        ],
    ),
    "faster": (
        {},
        [
            SGD,
            Change("rates up to 0.15", dict(lr_max=0.15)),
            Change("rates up to 0.6", dict(lr_max=0.6)),
            SMALL_STEPS,
            Change("16×16 instead of 24×24", dict(sizes=((16, 0.5), (32, 1.0)))),
            Change("highest rate at the end of epoch 2", dict(peak_epoch=2)),
            Change("whole images from the start", dict(sizes=((32, 1.0),))),
        ],
    ),
}


def one_cycle(learn: Learner, recipe: Recipe, lr_min: float, lr_max: float) -> float:
    """Train from scratch as the recipe says; return the accuracy on the validation images."""
    learn.fit_one_cycle(
        recipe.epochs,
        lr_max,
        div=lr_max / lr_min,
        div_final=1e5 if recipe.annihilate else lr_max / lr_min,
        pct_start=recipe.peak_epoch / recipe.epochs,
        cbs=[ValidateLast()] if recipe.validate == "last" else [],
    )
    return learn.recorder.values[-1][-1]


def holdout_accuracy(name: str, change: Change, data: str, width: int, seed: int) -> float:
    """Of the held-out images, the part that a net gets right which was trained by the changed recipe."""
    recipe = RECIPES[name]._replace(**dict(validate="last") | CHANGES[name][0] | change.recipe)
    with ExitStack() as patches:
        patches.enter_context(patch.dict(RECIPES, {name: recipe}))
        if change.constant:
            patches.enter_context(patch(*change.constant))
        set_seed(seed, reproducible=True)
        learn = get_learner(get_dls(data, valid="holdout", device="cpu"), width=width, recipe=name)
        with learn.no_bar(), learn.no_logging():
            return one_cycle(learn, recipe, recipe.lr_max / 100, recipe.lr_max)


def table(recipe: str, figures: dict) -> str:
    """The figures of a recipe's changes as a table in Markdown."""
    seeds = figures["seeds"]
    means = {
        words: statistics.mean(by_seed.values())
        for words, by_seed in figures["accuracies"].items()
        if len(by_seed) == seeds
    }
    before = means.pop(UNCHANGED, None)
    lines = [
        f"## `{recipe}`",
        "",
        f"{figures['epochs']} epochs, rates up to {figures['lr_max']:g} at the end of epoch {figures['peak_epoch']:g},"
        f" width {figures['width']}, the mean of {seeds} seed{'s' * (seeds > 1)} a line: `{figures['command']}`.",
        "",
        "| change | hold-out accuracy before | after | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    if before is not None:
        for words, after in means.items():
            lines.append(f"| {words} | {before:.2%} | {after:.2%} | {100 * (after - before):+.2f} |")
    return "\n".join(lines) + "\n"


def tables(figures: dict[str, dict]) -> str:
    """The tables of all recipes: name → figures."""
    return "\n".join(["# What each choice was worth\n", *(table(name, figures[name]) for name in sorted(figures))])


def save(out: Path, recipe: str, figures: dict):
    """Put a recipe's figures beside those of the others in `out`, and all of them into tables."""
    everything = (json.loads(out.read_text()) if out.is_file() else {}) | {recipe: figures}
    write_json(out, everything)
    write(out.with_suffix(".md"), tables(everything))


@call_parse
@command_line
def main(
    recipe: Annotated[str, {"choices": list(CHANGES)}],  # whose choices are compared
    data: str = "cifar10",  # as of train.py
    width: int = 16,  # of the ResNet
    seeds: int = 1,  # trainings of each line
    out: str = "",  # JSON file for the figures of all recipes; a table of them comes beside it
):
    "Train a small net by a recipe, and by the same recipe with one thing changed, and compare them."
    before, changes = CHANGES[recipe]
    changes = [Change(UNCHANGED, {}), *changes]
    begun = RECIPES[recipe]._replace(**before)
    figures = dict(
        epochs=begun.epochs,
        peak_epoch=begun.peak_epoch,
        lr_max=begun.lr_max,
        width=width,
        seeds=seeds,
        command=f"python benchmarks/choices.py {recipe} --data {data} --width {width} --seeds {seeds}",
        accuracies={change.words: {} for change in changes},
        **surroundings(),
    )
    get_dls(data)  # decodes the images once, before all processes want them
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        trainings = {
            pool.submit(holdout_accuracy, recipe, change, data, width, seed): (change.words, seed)
            for seed in range(seeds)
            for change in changes
        }
        try:
            for done, training in enumerate(as_completed(trainings), 1):
                (words, seed), accuracy = trainings[training], training.result()
                figures["accuracies"][words][str(seed)] = accuracy
                print(f"{done} of {len(trainings)}: {words}, {accuracy:.2%}")
                if out:
                    save(Path(out), recipe, figures)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the others would be trained before anybody heard of it
            raise
    print(table(recipe, figures))
