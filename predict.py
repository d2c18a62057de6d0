"""Classify images with a finished run: `python predict.py RUN photos/ cat.jpg`; in Python, `Classifier.load(RUN)`."""

from dataclasses import dataclass
from typing import Annotated

from cifar10 import cli
from cifar10.recipes import Bounds, check_fields


@dataclass(frozen=True)
class Options:
    """Classify images with a finished run."""

    run: Annotated[str, "folder of a finished run, its model.safetensors, or last"]
    images: Annotated[list[str], {"nargs": "+", "type": str}, "files, folders, or - for a list from standard input"]
    topk: Annotated[int, Bounds(1), "classes to show for each image"] = 3
    tta: Annotated[bool, "average the predictions for shifted and mirrored views of each image"] = False
    gradcam: Annotated[str | None, "folder for plots that show where the evidence for the likeliest class lies"] = None
    json: Annotated[cli.OutputFile, "JSON file for the probabilities of all classes, and their temperature"] = None
    csv: Annotated[cli.OutputFile, "CSV file for the table"] = None

    def __post_init__(self):
        check_fields(self)


if __name__ == "__main__":
    typed = cli.start(Options)  # before what takes seconds to import: a mistake is answered at once

import os
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
from fastcore.basics import chunked

from cifar10.data import images_at_once, kinds, list_images
from cifar10.errors import UserError
from cifar10.files import save_figure, write_csv, write_json
from cifar10.interpretation import ImageClassifier, plot_image_grad_cam
from cifar10.text import plural, printable
from model import ResNet


class Classifier(ImageClassifier):
    """`Classifier.load("runs/my-run").predict(["cat.jpg"])` → probabilities `(1, classes)`."""

    @classmethod
    def load(cls, run, model_class=ResNet, device="auto"):
        return super().load(run, model_class, device)


def find_files(images: list[str]) -> list[Path]:
    """The files that `images` names, in order: those in a folder sorted by path, for `-` those that stdin lists."""
    files: list[Path] = []
    ignored = Counter[str]()
    for name in images:
        if name == "-":
            sys.stdin.reconfigure(errors="surrogateescape")
            listed = sys.stdin.read()
            if "\0" in listed:
                raise UserError("the standard input holds no list of files, a name in each line; name the image itself")
            files += [Path(line) for line in listed.splitlines() if line]
        elif Path(name).is_dir():
            found = list(list_images(Path(name), ignored))
            if not found:
                others = f" (ignored files: {kinds(ignored)})" if ignored.total() else ""
                raise UserError(f"{name} holds no images{others}")
            files += found
        else:
            files.append(Path(name))
    if ignored.total():
        print(f"{plural(ignored.total(), 'file')} ignored: {kinds(ignored)}", file=sys.stderr)
    return files


def main(**typed):
    """Classify images. `typed`: the options given on the command line, by name (see `Options`)."""
    options = Options(**typed)
    classifier = Classifier.load(options.run)
    topk = min(options.topk, len(classifier.classes))
    files = find_files(options.images)
    if not files:
        raise UserError("no images were named; give files, folders, or a list on the standard input")
    if options.gradcam:
        make_folder(Path(options.gradcam))
    names, probabilities, failed = [], [torch.empty(0, len(classifier.classes))], 0
    for some in chunked(files, images_at_once(classifier.size)):
        preds, good, broken = classifier.predict_files(some, options.tta)
        for i, why in broken.items():
            print(f"{printable(some[i])} can't be used as an image ({why})", file=sys.stderr)
        failed += len(broken)
        names += [printable(some[i]) for i in good]
        probabilities.append(preds)
        if options.gradcam:
            for i, row in zip(good, preds, strict=True):
                write_grad_cam(classifier, some[i], row, Path(options.gradcam))
    if classifier.temperature_note:
        print(classifier.temperature_note, file=sys.stderr)
    preds = torch.cat(probabilities)
    table = top_classes(names, preds, classifier.classes, topk)
    if options.json:
        by_class = (dict(zip(classifier.classes, row, strict=True)) for row in preds.tolist())
        images = dict(zip(names, by_class, strict=True))
        write_json(Path(options.json), dict(temperature=classifier.temperature, probabilities=images))
    if options.csv:
        write_csv(Path(options.csv), list(table), table.values)
    if options.json or options.csv:
        written = " and ".join(filter(None, (options.csv, options.json)))  # one may be the standard output
        print(f"{len(names):,} images classified; see {written}", file=sys.stderr)
    elif names:
        texts = table.select_dtypes(exclude="number")
        aligned = {name: f"{{:<{texts[name].str.len().max()}}}".format for name in texts}  # left
        print(table.to_string(index=False, justify="left", formatters=aligned, float_format="{:.1%}".format))
    if options.gradcam and names:
        print(f"Grad-CAM plots: see {options.gradcam}", file=sys.stderr)
    if failed:
        cli.fail(f"{failed:,} of {len(files):,} images can't be used", 1)


def top_classes(names: list[str], preds: torch.Tensor, classes: list[str], topk: int) -> pd.DataFrame:
    """A row for each image: its name, and its `topk` likeliest classes, each with its probability."""
    table, best = pd.DataFrame({"image": names}), preds.topk(topk)
    ranks = zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
    for rank, (numbers, probabilities) in enumerate(ranks, start=1):
        table[f"class {rank}"] = [classes[number] for number in numbers]
        table[f"probability {rank}"] = probabilities
    return table


def make_folder(folder: Path):
    """Make the folder of the plots, if it is not there. Raises `UserError` if it can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise UserError(f"{folder} can't be made ({reason.strerror}); give another folder for the plots") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} can't be written to; give another folder for the plots")


def write_grad_cam(classifier: Classifier, file: Path, probabilities: torch.Tensor, folder: Path):
    """Write a Grad-CAM of an image into the folder, under the image's name."""
    pixels = torch.from_numpy(classifier.decode(file))
    plot_image_grad_cam(classifier, pixels, probabilities, printable(file.name))
    target, number = folder / f"{file.stem}.png", 1
    while target.exists():  # of another image with the same name
        target, number = folder / f"{file.stem}-{number}.png", number + 1
    save_figure(target)


if __name__ == "__main__":
    cli.run(main, typed)
