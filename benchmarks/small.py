"""Small data sets: `python -m benchmarks.small birds/ leaves/labels.csv --out results/small.json`

How well four models classify the validation images of each data set, with the defaults of train.py:
`finetune` starts from the weights of another run; `frozen` is a logistic regression on the features that these weights
give, its regularization chosen by cross-validation on the training images; `scratch` is trained from the beginning; and
`plain` is a plain fastai Learner with the same model and PyTorch's initialization, for as many steps as `scratch`.
"""

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
from fastai import learner
from fastai.vision.all import accuracy, set_seed
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.ablation import read_results
from benchmarks.seeds import train_once
from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.files import write_json
from cifar10.hardware import collect_env
from cifar10.interpretation import markdown_table
from cifar10.options import Options
from cifar10.recipes import Recipe
from cifar10.text import enumerate_names
from cifar10.training import ValidateLast
from cifar10.training.transfer import features
from model import ResNet
from train import get_dls, get_learner

CS = np.logspace(-5, 1, 7)  # inverse regularization strengths of the logistic regression
MODELS = ("frozen", "finetune", "scratch", "plain")


def frozen(images: ImageTable, weights: str) -> float:
    """The accuracy of a logistic regression on the features of the weights."""
    learn = get_learner(get_dls(images, Options(weights=weights).resolve(images)), weights=weights)
    (x, y), (x_valid, y_valid) = (features(learn, part.items) for part in (learn.dls.train_ds, learn.dls.valid_ds))
    model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=CS, cv=5, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about folds without a rare class, and slow convergence
        return model.fit(x, y).score(x_valid, y_valid)


def plain(images: ImageTable, seed: int) -> float:
    """The accuracy of a plain fastai Learner."""
    recipe = Options().resolve(images)
    set_seed(seed, reproducible=True)
    learn = learner.Learner(get_dls(images, recipe), ResNet(len(images.classes), width=recipe.width), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(recipe.epochs, cbs=ValidateLast())
    return float(learn.recorder.values[-1][-1])


def recipe_of(images: ImageTable, model: str, weights: str) -> Recipe:
    """How one of `MODELS` is trained; of the frozen one only the last layer is."""
    options = Options(weights=weights if model in ("frozen", "finetune") else None)
    return replace(options.resolve(images), validate="last")


def measure(images: ImageTable, model: str, seed: int, weights: str) -> float:
    """The accuracy of one of `MODELS`."""
    if model == "frozen":
        return frozen(images, weights)
    if model == "plain":
        return plain(images, seed)
    recipe, start = recipe_of(images, model, weights), weights if model == "finetune" else None
    return train_once(get_dls(images, recipe), recipe, seed, weights=start)["accuracy"]


def about(images: ImageTable) -> dict[str, Any]:
    """What a data set is, and how often its most common class would be right."""
    train, valid, *_ = images.split_rows("test")
    labels = [images.labels[row] for row in train]
    common = max(images.classes, key=labels.count)
    share = mean(images.labels[row] == common for row in valid)
    sizes = dict(classes=len(images.classes), train=len(train), valid=len(valid), size=images.size)
    return sizes | dict(sha256=images.hash, most_common=share, accuracies={})


def table(results: dict) -> str:
    """The mean accuracy of each model that was measured on any data set."""
    measured = [model for model in MODELS if any(found["accuracies"].get(model) for found in results["sets"].values())]
    rows = []
    for name, found in results["sets"].items():
        scores = [list(found["accuracies"].get(model, {}).values()) for model in measured]
        cells = [f"{mean(values):.1%}" if values else "" for values in scores]
        rows.append([name, found["classes"], found["train"], found["valid"], f"{found['most_common']:.1%}", *cells])
    return markdown_table(
        ["images", "classes", "train", "valid", "most common class", *measured], rows, right=4 + len(measured)
    )


def main(
    data: Annotated[str, {"nargs": "+"}],  # data sets, as for train.py
    weights: str = "results/cifar10-best",  # as for train.py
    models: str = ",".join(MODELS),  # which ones to measure
    seeds: int = 3,  # runs of each model
    size: int = 32,  # as for train.py
    out: OutputFile = None,  # JSON file for the results, to which those of other data sets and models are added
):
    "Compare fine-tuning and training from scratch on small data sets."
    if unknown := {*models.split(",")} - {*MODELS}:
        raise UserError(f"models has {enumerate_names(sorted(unknown))}; it may have {', '.join(MODELS)}")
    results = read_results(out) or {"sets": {}}
    for path in data:
        images = ImageTable.open(path, size=size)
        name = images.name if size == 32 else f"{images.name}, {size} pixels"
        found = results["sets"].setdefault(name, about(images))
        if (found["sha256"], results.setdefault("weights", weights)) != (images.hash, weights):
            raise UserError(f"{out} holds results of other images named {name}, or other weights; choose another --out")
        for model in models.split(","):
            accuracies, recipe = found["accuracies"].setdefault(model, {}), recipe_of(images, model, weights)
            before = found.setdefault("recipes", {}).setdefault(model, asdict(recipe))
            if Recipe.from_json(before) != recipe:
                raise UserError(f"{out} holds results of {model} by another recipe; choose another --out")
            for seed in range(1 if model == "frozen" else seeds):
                if str(seed) not in accuracies:
                    accuracies[str(seed)] = measure(images, model, seed, weights)
                    print(f"{name}, {model}, seed {seed}: {accuracies[str(seed)]:.1%}", flush=True)
                    if out:
                        write_json(Path(out), results | collect_env())
    print(table(results))


if __name__ == "__main__":
    cli.run(main)
