"""The effect of single hyperparameters of a recipe on held-out images: `python -m benchmarks.ablation faster`

Each row of its table is the recipe with one thing changed. A model of a quarter of the usual width is trained from
scratch on nine tenths of the training images and evaluated on the other tenth; the test split is left alone. As many
models are trained in parallel as there are cores, with one thread each, because a small model can't use more than one.
"""

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
from fastcore.basics import num_cpus

from benchmarks.seeds import train_once
from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.data.table import ImageTable
from cifar10.files import write_json
from cifar10.hardware import collect_env
from cifar10.interpretation import markdown_table
from cifar10.recipes import RECIPES, Recipe, choices
from train import get_dls

BASELINE = "nothing"
SGD, PLAIN = dict(optimizer="sgd"), dict(init="default", whiten=False)

# Recipe → what is changed in all of its rows, because 24 epochs would take too long, and what in each: title → fields.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "assignment": (
        dict(epochs=6, lr_max=0.1),
        {
            BASELINE: {},
            "PyTorch's initialization": PLAIN,
            "no whitening": dict(whiten=False),
            "half the learning rate for convolutions": dict(muon_lr_scale=0.2),
            "twice the learning rate for convolutions": dict(muon_lr_scale=0.8),
            "SGD for all parameters": SGD,
            "momentum 0.9": dict(momentum=0.9),
            "annihilation: down to a learning rate near zero": dict(annihilate=True),
            "no label smoothing": dict(label_smoothing=0.0),
            "black padding": dict(crop_mode="constant"),
        },
    ),
    "faster": (
        {},
        {
            BASELINE: {},
            "PyTorch's initialization": PLAIN,
            "no whitening": dict(whiten=False),
            "half the learning rate for convolutions": dict(muon_lr_scale=0.09),
            "normalization's biases at the same learning rate": dict(norm_bias_lr_scale=1),
            "scales of normalization trained": dict(train_norm_scales=True),
            "SGD for all parameters": SGD,
            "momentum 0.9": dict(momentum=0.9),
            "a cosine instead of straight lines": dict(anneal_strategy="cos"),
            "label smoothing 0.1": dict(label_smoothing=0.1),
            "shifts up to 4 pixels": dict(crop_padding=4),
            "Cutout 8×8": dict(cutout=8),
            "full-size images from the start": dict(sizes=((32, 1.0),)),
            "no frozen layers": dict(freeze=()),
            "all learning rates halved": dict(lr_max=0.25, lr_min=0.05),
            "start at a hundredth of the peak learning rate": dict(lr_min=0.005),
            "no annihilation": dict(annihilate=False),
            "weight decay 0.0005": dict(weight_decay=5e-4),
            "batches of 256, with learning rates to match": dict(
                batch_size=256, lr_max=0.25, lr_min=0.05, muon_lr_scale=0.25
            ),
        },
    ),
    "best": (
        dict(epochs=12),
        {
            BASELINE: {},
            "batches of 512, with learning rates to match": dict(batch_size=512, lr_max=0.168, muon_lr_scale=0.202),
            "half the learning rate for convolutions": dict(muon_lr_scale=0.143),
            "twice the learning rate for convolutions": dict(muon_lr_scale=0.572),
            "no annihilation": dict(annihilate=False),
            "a cosine instead of straight lines": dict(anneal_strategy="cos"),
            "Cutout 8×8": dict(cutout=8),
            "label smoothing 0.2": dict(label_smoothing=0.2),
            "PyTorch's initialization": PLAIN,
        },
    ),
}


def holdout_accuracy(recipe: Recipe, data: str, width: int, seed: int) -> float:
    """The accuracy on the held-out images after training by the recipe."""
    return train_once(get_dls(data, recipe, valid="holdout", device="cpu"), recipe, seed, width)["accuracy"]


def table(name: str, results: dict) -> str:
    """The hold-out accuracy of each variant that is done, and its distance from the recipe's, seed by seed."""
    found = {title: [runs[seed] for seed in sorted(runs)] for title, runs in results["accuracies"].items()}
    done = {title: values for title, values in found.items() if len(values) == results["seeds"]}
    rows = []
    for change, values in done.items() if BASELINE in done else []:
        points = [100 * (value - before) for value, before in zip(values, done[BASELINE], strict=True)]
        spread = f" ± {stdev(points):.2f}" if len(points) > 1 else ""
        rows.append([change, f"{mean(values):.2%}", "" if change == BASELINE else f"{mean(points):+.2f}{spread}"])
    seeds = f"{results['seeds']} seed{'s' * (results['seeds'] > 1)}"
    title = f"`{name}`, {results['epochs']} epochs, width {results['width']}, {seeds}: `{results['command']}`"
    return f"{title}\n\n{markdown_table(['change', 'hold-out accuracy', 'difference in points'], rows, right=2)}"


def main(
    recipe: Annotated[str, choices(*VARIANTS)],  # whose hyperparameters are varied
    data: str = "cifar10",  # as for train.py
    width: int = 16,  # width of the ResNet
    seeds: int = 1,  # runs per row
    out: OutputFile = None,  # JSON file for the results of all recipes
):
    "Train a small model by a recipe, and by the same recipe with one thing changed, and compare them."
    changes, variants = VARIANTS[recipe]
    images = ImageTable.open(data)  # decoded here, before all processes need them
    train_images = len(images.split_rows("holdout")[0])
    base = RECIPES[recipe].adapted(train_images, **dict(images.defaults) | dict(validate="last") | changes)
    command = f"python -m benchmarks.ablation {recipe} --data {data} --width {width} --seeds {seeds}"
    schedule = dict(epochs=base.epochs, peak_epoch=base.peak_epoch, lr_max=base.lr_max)
    about = schedule | dict(width=width, seeds=seeds, command=command) | collect_env()
    recipes = {
        title: replace(base, **fields | dict(batch_size=min(fields.get("batch_size", base.batch_size), train_images)))
        for title, fields in variants.items()
    }
    settings, part = repr([about, recipes]), Path(f"{out}.part")  # the latter of a run that was interrupted
    before = json.loads(part.read_text(encoding="utf-8")) if out and part.is_file() else {}
    accuracies = before.get(settings) or {title: {} for title in variants}
    with ProcessPoolExecutor(num_cpus(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        trainings = {
            pool.submit(holdout_accuracy, changed, data, width, seed): (title, seed)
            for seed in range(seeds)
            for title, changed in recipes.items()
            if str(seed) not in accuracies[title]
        }
        try:
            for done, training in enumerate(as_completed(trainings), 1):
                (title, seed), accuracy = trainings[training], training.result()
                accuracies[title][str(seed)] = accuracy
                print(f"{done} of {len(trainings)}: {title}, {accuracy:.2%}")
                if out:
                    write_json(part, {settings: accuracies})
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the others would still be trained before the error is seen
            raise
    results = about | dict(accuracies=accuracies)
    print(table(recipe, results))
    if out:
        before = json.loads(Path(out).read_text(encoding="utf-8")) if Path(out).is_file() else {}
        write_json(Path(out), before | {recipe: results})
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
