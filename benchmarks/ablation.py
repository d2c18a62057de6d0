"""The effect of single hyperparameters of a recipe on held-out images: `python -m benchmarks.ablation faster --seeds 4`

Each row of its table is the recipe with one thing changed. A narrow model is trained from scratch on nine tenths of the
training images and evaluated on the other tenth; the test split is left alone. As many models are trained in parallel
as there are cores, with one thread each, because a narrow model can't use more than one.
"""

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, NamedTuple

import torch
from fastcore.basics import num_cpus

from benchmarks.seeds import train_once
from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.files import read_json, write_json
from cifar10.hardware import collect_env
from cifar10.interpretation import markdown_table
from cifar10.recipes import RECIPES, Recipe, choices
from train import get_dls

BASELINE = "nothing"
PLAIN = dict(init="default", whiten=False)
SMALLER = ((20, 0.25), (24, 0.5), (28, 0.7), (32, 1.0))  # which save about what a sixth epoch takes
BOTH = dict(peak_epoch=0.4, muon_lr_scale=0.13)  # an earlier peak, and convolutions at 0.13 × the learning rate


class Column(NamedTuple):
    """Of the table: a metric, its title, what it is multiplied by, and its decimals."""

    metric: str
    title: str
    scale: float
    decimals: int


COLUMNS = (
    Column("accuracy", "accuracy in %", 100, 2),
    Column("tta_accuracy", "with TTA", 100, 2),
    Column("nll", "NLL", 1, 4),
)

# Recipe → what is changed in all of its rows, because 24 epochs would take too long, and what in each: title → fields.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "faster": (
        {},
        {
            BASELINE: {},
            "no whitening": dict(whiten=False),
            "no whitening, prep not frozen": dict(whiten=False, freeze=(("layer1", 0.8),)),
            "no Dirac filters": dict(init="default"),
            "PyTorch's initialization": PLAIN,
            "images mirrored at random": dict(alternate_flips=False),
            "label smoothing 0.2": dict(label_smoothing=0.2),
            "momentum 0.7, with learning rates to match": dict(
                momentum=0.7, lr_max=1.0, lr_min=0.2, muon_lr_scale=0.12
            ),
            "16×16 until 10%": dict(sizes=((16, 0.1), (24, 0.35), (28, 0.5), (32, 1.0))),
            "6 epochs, on smaller images": dict(epochs=6, peak_epoch=1.2, sizes=SMALLER),
            "peak at epoch 0.4": dict(peak_epoch=0.4),
            "peak at epoch 0.15": dict(peak_epoch=0.15),
            "convolutions at 0.25 ×": dict(muon_lr_scale=0.25),
            "convolutions at 0.13 ×": dict(muon_lr_scale=0.13),
            "both": BOTH,
            "both, convolutions at 0.1 ×": BOTH | dict(muon_lr_scale=0.1),
            "both, biases at 16 ×": BOTH | dict(norm_bias_lr_scale=16),
            "both, FC layer and scales at 0.5 ×": BOTH
            | dict(lr_max=0.25, lr_min=0.05, muon_lr_scale=0.26, norm_bias_lr_scale=64),
            "both, momentum 0.9": BOTH | dict(momentum=0.9),
            "both, momentum 0.75": BOTH | dict(momentum=0.75),
            "both, shifts up to 3 pixels": BOTH | dict(crop_padding=3),
            "both, shifts up to 1 pixel": BOTH | dict(crop_padding=1),
            "both, 6 epochs, on smaller images": BOTH | dict(epochs=6, peak_epoch=0.48, sizes=SMALLER),
        },
    ),
    "assignment": (
        dict(epochs=6, lr_max=0.1),
        {
            BASELINE: {},
            "PyTorch's initialization": PLAIN,
            "no whitening": dict(whiten=False),
            "half the learning rate for convolutions": dict(muon_lr_scale=0.2),
            "twice the learning rate for convolutions": dict(muon_lr_scale=0.8),
            "SGD for all parameters": dict(optimizer="sgd"),
            "momentum 0.9": dict(momentum=0.9),
            "annihilation: down to a learning rate near zero": dict(annihilate=True),
            "no label smoothing": dict(label_smoothing=0.0),
            "black padding": dict(crop_mode="constant"),
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


def changed(base: Recipe, changes: dict[str, Any], train_images: int) -> Recipe:
    """A row's recipe; its batches hold at most `train_images`."""
    return replace(base, **changes | dict(batch_size=min(changes.get("batch_size", base.batch_size), train_images)))


def train(recipe: Recipe, data: str, width: int, seed: int) -> dict[str, Any]:
    """What training by the recipe gives on the held-out images, and what it takes."""
    metrics = train_once(get_dls(data, recipe, valid="holdout", device="cpu"), recipe, seed, width)
    names = [*(column.metric for column in COLUMNS), "pflop"]
    return {name: metrics[name] for name in names} | dict(commit=collect_env()["commit"])


def difference(values: list[float], before: list[float], decimals: int) -> str:
    """The mean of the paired differences ± its standard error."""
    differences = [value - other for value, other in zip(values, before, strict=True)]
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.{decimals}f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.{decimals}f}{error}"


def table(results: dict[str, Any]) -> str:
    """Each variant's accuracy and NLL on the held-out images, and their distance from the recipe's, seed by seed."""
    rows, header, recipe, base = [], ["change", "seeds"], results["recipe"], results["runs"][BASELINE]
    every = [set(metrics) for runs in results["runs"].values() for metrics in runs.values()]
    measured = set.intersection(*every) if every else set()
    columns = [column for column in COLUMNS if column.metric in measured]
    for column in columns:
        header += [column.title, "difference in points" if column.scale == 100 else "difference"]
    for change, runs in results["runs"].items():
        if seeds := sorted({*runs} & {*base}, key=int):
            row = [change, len(seeds)]
            for metric, _, scale, decimals in columns:
                ours, others = ([scale * found[seed][metric] for seed in seeds] for found in (runs, base))
                compared = difference(ours, others, decimals) if change != BASELINE else ""
                row += [f"{mean(ours):.{decimals}f}", compared]
            rows.append([*row, f"{runs[seeds[0]]['pflop']:.4f}"] if "pflop" in measured else row)
    header += ["PFLOP"] * ("pflop" in measured)
    when = f", {results['when']}" if "when" in results else ""  # of runs that are no longer added to
    title = f"`{recipe['name']}`, {recipe['epochs']} epochs, width {results['width']}{when}: `{results['command']}`"
    return f"{title}\n\n{markdown_table(header, rows, right=len(header) - 1)}"


def is_same(before: dict[str, Any], recipe: Recipe, sha256: str) -> bool:
    """Whether results are of this recipe and these images. A field that was added since has its default."""
    try:
        return Recipe.from_json(before["recipe"]) == recipe and before["data"]["sha256"] == sha256
    except TypeError:  # a field that is gone
        return False


def read_results(file: str | None) -> dict[str, Any]:
    """What a file of results holds, if it is there."""
    return read_json(Path(file)) if file and Path(file).is_file() else {}


def main(
    recipe: Annotated[str, choices(*VARIANTS)],  # whose hyperparameters are varied
    data: str = "cifar10",  # as for train.py
    width: int = 32,  # width of the ResNet
    seeds: int = 1,  # runs per row
    out: OutputFile = None,  # JSON file for the results of all recipes, where an interrupted run goes on
):
    "Train a small model by a recipe, and by the same recipe with one thing changed, and compare them."
    changes, variants = VARIANTS[recipe]
    images = ImageTable.open(data)  # decoded here, before all processes need them
    train_images = len(images.split_rows("holdout")[0])
    base = RECIPES[recipe].adapted(train_images, **dict(images.defaults) | dict(validate="last") | changes)
    results = read_results(out)
    name, data_set = f"{recipe}-{width}", dict(name=images.name, sha256=images.hash)
    before = results.get(name, dict(changes={}, runs={}))
    if name in results and not is_same(before, base, images.hash):
        raise UserError(f"{out} holds results of another {recipe}, or of other images; choose another --out")
    as_json = json.loads(json.dumps(variants))  # with lists in the place of tuples, as in the file
    runs = {title: {} for title in variants} | before["runs"]
    runs |= {title: {} for title in variants if before["changes"].get(title) != as_json[title]}
    command = f"python -m benchmarks.ablation {recipe} --data {data} --width {width} --seeds {seeds}"
    found = dict(recipe=asdict(base), width=width, data=data_set, command=command) | collect_env()
    found |= dict(changes=before["changes"] | as_json, runs=runs)
    recipes = {title: changed(base, fields, train_images) for title, fields in variants.items()}
    with ProcessPoolExecutor(num_cpus(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        trainings = {
            pool.submit(train, recipes[title], data, width, seed): (title, str(seed))
            for seed in range(seeds)
            for title in variants
            if str(seed) not in runs[title]
        }
        try:
            for done, training in enumerate(as_completed(trainings), 1):
                title, seed = trainings[training]
                runs[title][seed] = training.result()
                print(f"{done} of {len(trainings)}: {title}, seed {seed}, {runs[title][seed]['accuracy']:.2%}")
                if out:
                    write_json(Path(out), read_results(out) | {name: found})  # which others may have written to
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the others would still be trained before the error is seen
            raise
    print(table(found))


if __name__ == "__main__":
    cli.run(main)
