"""A recipe from several seeds: `python -m benchmarks.seeds fast --seeds 5 --out results/seeds`

Each seed's metrics go to a folder `<recipe>-<seed>`, as those of a run by train.py do; the images stay in memory.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from fastai.vision.all import DataLoaders, set_seed
from torch.nn.functional import nll_loss

from benchmarks.steps import now
from cifar10 import cli
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.files import read_json, write_json
from cifar10.hardware import collect_env
from cifar10.interpretation.metrics import fit_temperature, log_probabilities, with_temperature
from cifar10.interpretation.predictions import Interpretation, tta_accuracy
from cifar10.options import Options
from cifar10.recipes import RECIPES, Recipe, choices
from cifar10.training import StopAtNaN, fit_head
from compare import mean_and_std
from train import choose_lrs, fit, get_dls, get_learner


def train_once(dls: DataLoaders, recipe: Recipe, seed: int, width: int | None = None, weights=None) -> dict[str, Any]:
    """The metrics of a training run by a recipe: with the LR finder, if it has one, and validation. Needs no folder."""
    begin = now(dls.device)
    set_seed(seed, reproducible=True)
    dls.train.rng.seed(seed)  # which draws the order of the images
    learn = get_learner(dls, recipe, width=width, weights=weights)
    with learn.no_bar(), learn.no_logging():
        if weights:
            fit_head(learn)
        chosen = choose_lrs(learn, recipe)
        fit(learn, chosen, [StopAtNaN()])
        seconds, recorder = now(dls.device) - begin, learn.recorder
        seconds_training, pflop = recorder.train_seconds, recorder.flop / 1e15
        history = [[*row, *extra] for row, extra in zip(recorder.values, recorder.extra, strict=True)]
        interp = Interpretation(learn)
        tta = tta_accuracy(interp, recipe.flip)
    return dict(
        accuracy=interp.accuracy, tta_accuracy=tta, loss=interp.losses.mean().item(), nll=nll(interp),
        epochs=recipe.epochs, seconds=seconds, seconds_training=seconds_training, pflop=pflop,
        lr_min=chosen.lr_min, lr_max=chosen.lr_max, history=history,
    )  # fmt: skip


def nll(interp: Interpretation) -> float:
    """The cross-entropy at the best temperature, which ranks recipes with less noise than accuracy does."""
    preds = with_temperature(interp.preds, fit_temperature(interp.preds, interp.targs) or 1)
    return nll_loss(log_probabilities(preds), interp.targs).item()


def is_of(folder: Path, **about) -> bool:
    """Whether the result in a folder is of these settings."""
    config = read_json(folder / "config.json")
    config["recipe"] = asdict(Recipe.from_json(config["recipe"]))  # with the fields that were added since
    return all(config.get(name) == value for name, value in about.items())


def main(
    recipe: Annotated[str, choices(*RECIPES)],  # how to train
    data: str = "cifar10",  # as for train.py
    seeds: int = 5,  # runs
    first: int = 0,  # seed of the first of them
    valid: Annotated[str, choices("test", "holdout")] = "test",  # as for train.py
    changes: str = "{}",  # to the recipe, in JSON: '{"label_smoothing": 0}'
    width: int | None = None,  # of the ResNet (default: as for train.py)
    out: str = "",  # folder for the results
):
    "Train by a recipe from several seeds, and write the metrics of each."
    images = ImageTable.open(data)
    try:
        fields = json.loads(changes)
        changed = Recipe.from_json(asdict(Options(recipe=recipe, valid=valid).resolve(images)) | fields)
    except (TypeError, ValueError) as reason:
        raise UserError(f"changes is {changes!r}; it must be a recipe's fields in JSON ({reason})") from None
    width = width or changed.width
    about = dict(recipe=asdict(replace(changed, name=recipe)), valid=valid, width=width)
    about |= dict(data=dict(name=images.name, sha256=images.hash))
    folders = {seed: Path(out) / f"{recipe}-{seed}" for seed in range(first, first + seeds) if out}
    for folder in folders.values():
        if (folder / "config.json").is_file() and not is_of(folder, **about):
            raise UserError(f"{folder} holds a result of other settings; choose another --out")
    dls = get_dls(images, changed, valid)
    accuracies = []
    for seed in range(first, first + seeds):
        metrics = train_once(dls, changed, seed, width)
        accuracies.append(metrics["accuracy"])
        print(f"{recipe}, seed {seed}: {metrics['accuracy']:.2%}, {metrics['tta_accuracy']:.2%} with test-time"
              f" augmentation, {metrics['pflop']:.3f} PFLOP, {metrics['seconds']:.1f} s", flush=True)  # fmt: skip
        if folder := folders.get(seed):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "metrics.json", metrics)
            write_json(folder / "config.json", about | dict(seed=seed) | collect_env())
    print(f"mean {mean_and_std(accuracies)}")


if __name__ == "__main__":
    cli.run(main)
