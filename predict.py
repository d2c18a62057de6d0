"""Classify images with a finished run: `python predict.py RUN photos/ cat.jpg`; in Python, `Classifier.load(RUN)`."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
from fastcore.basics import chunked

from cifar10 import cli
from cifar10.data import images_at_once, list_images
from cifar10.errors import UserError
from cifar10.files import OutputFile, save_figure, write_csv, write_json
from cifar10.interpretation import ImageClassifier, plot_image_grad_cam
from cifar10.text import printable
from model import ResNet


class Classifier(ImageClassifier):
    """`Classifier.load("runs/my-run").predict(["cat.jpg"])` → probabilities `(1, classes)`."""

    @classmethod
    def load(cls, run, model_class=ResNet, device="auto"):
        return super().load(run, model_class, device)


def find_files(images: list[str]) -> list[Path]:
    """The files that `images` names, in order: those in a folder sorted by path, for `-` those that stdin lists."""
    files: list[Path] = []
    for name in images:
        if name == "-":
            sys.stdin.reconfigure(errors="surrogateescape")
            listed = sys.stdin.read()
            if "\0" in listed:
                raise UserError("the standard input holds no list of files, a name in each line; name the image itself")
            files += [Path(line) for line in listed.splitlines() if line]
        elif Path(name).is_dir():
            found = list(list_images(Path(name), Counter()))
            if not found:
                raise UserError(f"{name} holds no images")
            files += found
        else:
            files.append(Path(name))
    return files


def main(
    run: str,  # folder of a finished run, or its model.safetensors
    images: Annotated[str, {"nargs": "+"}],  # files, folders, or - for a list of files from the standard input
    topk: int = 3,  # classes to show for each image
    tta: bool = False,  # average the predictions for shifted and mirrored views of each image
    gradcam: str | None = None,  # folder for plots that show where the evidence for the likeliest class lies
    json: OutputFile = None,  # JSON file for the probabilities of all classes
    csv: OutputFile = None,  # CSV file for the table
):
    "Classify images with a finished run."
    classifier = Classifier.load(run)
    if topk < 1:
        raise UserError(f"topk is {topk}; it must be at least 1")
    topk = min(topk, len(classifier.classes))
    files = find_files(images)
    if not files:
        raise UserError("no images were named; give files, folders, or a list on the standard input")
    if gradcam and Path(gradcam).is_file():
        raise UserError(f"{gradcam} is a file; give a folder for the plots")
    names, probabilities, failed = [], [torch.empty(0, len(classifier.classes))], 0
    for some in chunked(files, images_at_once(classifier.size)):
        preds, good, broken = classifier.predict_files(some, tta)
        for i, why in broken.items():
            print(f"{printable(some[i])} can't be used as an image ({why})", file=sys.stderr)
        failed += len(broken)
        names += [printable(some[i]) for i in good]
        probabilities.append(preds)
        if gradcam:
            for i, row in zip(good, preds, strict=True):
                write_grad_cam(classifier, some[i], row, Path(gradcam))
    preds = torch.cat(probabilities)
    table = pd.DataFrame({"image": names})
    for k, (values, numbers) in enumerate(zip(*(best.T.tolist() for best in preds.topk(topk))), start=1):
        table[f"class {k}"], table[f"probability {k}"] = [classifier.classes[number] for number in numbers], values
    if json:
        by_class = (dict(zip(classifier.classes, row, strict=True)) for row in preds.tolist())
        write_json(Path(json), dict(zip(names, by_class, strict=True)))
    if csv:
        write_csv(Path(csv), list(table), table.values)
    if json or csv:
        print(f"{len(names):,} images classified; see {' and '.join(filter(None, (csv, json)))}")
    elif names:
        texts = table.select_dtypes(exclude="number")
        aligned = {name: f"{{:<{texts[name].str.len().max()}}}".format for name in texts}  # left
        print(table.to_string(index=False, justify="left", formatters=aligned, float_format="{:.1%}".format))
    if failed:
        cli.fail(f"{failed:,} of {len(files):,} images can't be used", 1)


def write_grad_cam(classifier: Classifier, file: Path, probabilities: torch.Tensor, folder: Path):
    """Write a Grad-CAM of an image into the folder, under the image's name."""
    pixels = torch.from_numpy(classifier.decode(file))
    plot_image_grad_cam(classifier, pixels, probabilities, printable(file.name))
    folder.mkdir(parents=True, exist_ok=True)
    target, number = folder / f"{file.stem}.png", 1
    while target.exists():  # of another image with the same name
        target, number = folder / f"{file.stem}-{number}.png", number + 1
    save_figure(target)


if __name__ == "__main__":
    cli.run(main)
