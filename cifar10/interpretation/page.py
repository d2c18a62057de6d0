"""The report as a web page, report.html: one file that holds everything and loads nothing from a server."""

import base64
import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastai.vision.all import Learner
from fastcore import xml

from cifar10.data import eval_split_name
from cifar10.files import read_csv, write
from cifar10.interpretation.predictions import Interpretation, tta_accuracy
from cifar10.interpretation.report import NOTES, TEXTS, percent, statements, tables, write_report
from cifar10.processes import on_rank0
from cifar10.runs.run import Run
from cifar10.text import printable
from cifar10.training.options import Options

NOTEBOOK = Path(__file__).parents[2] / "results/notebook/log.csv"  # of the assignment
CIFAR10_SHA256 = "2ebad64464aa84e29315dc092b00cf79fb98223a601e0112bf2a17411e9908bc"  # `ImageTable.hash` of CIFAR-10
STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa); }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; background: light-dark(#fff, #16181c);
  color: light-dark(#1a1a1a, #e8e8e8); overflow-wrap: anywhere; }
main { max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; min-width: 40rem; height: auto; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; } .number { text-align: right; }
th { white-space: nowrap; } td:first-child { min-width: 4.5rem; } code { font-size: .9em; }
"""
CAPTIONS = {
    "lr_find": ("LR finder", "Loss of each step while the learning rate rises, and the learning rates chosen from it."),
    "curves": ("Training", "Loss and accuracy after each epoch, and the learning rate of each step."),
    "confusion_matrix": ("Confusion matrix", "How often each class is predicted for each actual class."),
    "misclassified": ("Hardest images", "The worst misclassified images and, if they are few, the least certain ones."),
    "gradcam": ("Grad-CAM", "Where the evidence for the predicted class lies, and for the actual one (or runner-up)."),
    "calibration": ("Calibration", "Accuracy of the predictions with each probability; below, how many there are."),
}


def table(header: list[str], rows: list[list[str]]) -> xml.FT:
    kinds = [None if name in TEXTS else "number" for name in header]

    def row(tag, cells: list[str]) -> xml.FT:
        return xml.Tr(*(tag(cell, cls=kind) for cell, kind in zip(cells, kinds, strict=True)))

    head, body = [xml.Thead(row(xml.Th, header))] * any(header), xml.Tbody(*(row(xml.Td, cells) for cells in rows))
    return xml.Div(xml.Table(*head, body), cls="wide", tabindex="0")  # so that keys can scroll it


def plot(file: Path, title: str, caption: str) -> xml.FT:
    data = base64.b64encode(file.read_bytes()).decode()
    picture = xml.Img(src=f"data:image/png;base64,{data}", alt=f"{title}: {caption}")
    return xml.Section(xml.H2(title), xml.Figure(picture, xml.Figcaption(caption)))


def command(options: Options) -> str:
    """The command that makes such a run, with the options that are not the default."""
    unimportant = {"device", "precision", "runs_dir", "name", "resume"}
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name not in unimportant:
            flag = f"--{'no_' * (value is False)}{field.name}"
            words += [flag] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(["python", "train.py", *words])


def facts(run: Run, metrics: dict[str, Any]) -> list[list[str]]:
    """What was trained, on which data, with which settings and hardware."""
    config, data, hardware = run.config, run.config["data"], run.config["hardware"]
    splits = ", ".join(f"{data[name]:,} {name}" for name in ("train", "valid", "test") if data.get(name))
    side, recipe, low, high = data["size"], run.recipe, config["lr_min"], config["lr_max"]
    last = 0 if recipe.annihilate else low
    cpu = f"{hardware.get('cpu_model') or 'a CPU'}, {hardware['cpu']}, threads: {hardware['threads']}"
    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}"
    versions = (f"{name} {version}" for name, version in config["versions"].items())
    return [
        ["name", run.path.name],
        ["command", command(run.options)],
        ["data", f"{printable(data['name'])}: {splits} images of {len(data['classes'])} classes, {side}×{side} pixels"],
        ["training", f"{epochs} by the recipe {recipe.name}, {metrics['pflop']:.3g} PFLOP"],
        ["learning rate", f"{low:.2g} → {high:.2g} at epoch {recipe.peak_epoch:.3g} → {last:.2g}"],
        ["duration", f"{metrics['seconds']:,.0f} seconds, {metrics['images_per_second']:,.0f} images per second"],
        ["hardware", hardware["gpu"] if run.options.device == "cuda" else cpu],
        ["precision", run.options.precision],
        ["versions", ", ".join(versions)],
        ["commit", str(config["commit"])],
    ]


def results(run: Run, metrics: dict[str, Any], own: bool) -> xml.FT:
    """The accuracies and the loss; for CIFAR-10, also the accuracy of the assignment's notebook."""
    rows = [["accuracy", percent(metrics["accuracy"], 2)]]
    if "tta_accuracy" in metrics:
        rows.append(["accuracy with test-time augmentation", percent(metrics["tta_accuracy"], 2)])
    rows.append(["cross-entropy loss", f"{metrics['loss']:.4f}"])
    if own and run.sha256 == CIFAR10_SHA256 and run.options.valid == "test" and NOTEBOOK.is_file():
        notebook = read_csv(NOTEBOOK)["test_accuracy_percent"][-1]
        rows.append(["accuracy of the assignment's notebook", f"{notebook:.2f}%"])
    return table(["", "result"], rows)


def write_html(interp: Interpretation, metrics: dict[str, Any], run: Run, folder: Path, images: str):
    """Write report.html into the folder, with the plots that are there. `images` says which ones were classified."""
    title = f"{metrics['accuracy']:.2%} of {metrics['images']:,} {images} correct"
    parts = [xml.Section(results(run, metrics, folder == run.path), *map(xml.P, statements(metrics)))]
    plots = {folder / f"{name}.png": about for name, about in CAPTIONS.items()}
    parts += [plot(file, *about) for file, about in plots.items() if file.is_file()]
    for name, (header, rows) in tables(interp, metrics).items():
        parts.append(xml.Section(xml.H2(name), *map(xml.P, NOTES.get(name, [])), table(header, rows)))
    parts.append(xml.Section(xml.H2("The run"), table(["", ""], facts(run, run.metrics | metrics))))
    metas = xml.Meta(charset="utf-8"), xml.Meta(name="viewport", content="width=device-width, initial-scale=1")
    head, body = xml.Head(*metas, xml.Title(title), xml.Style(STYLE)), xml.Body(xml.Main(xml.H1(title), *parts))
    write(folder / "report.html", xml.to_xml(xml.Html(head, body, lang="en")))


@on_rank0
def report_run(learn: Learner, run: Run, started: float):
    """Save the weights of a trained run, its plots and its report; metrics.json, which ends it, comes last.

    `started` is when the run would have started if it had never been interrupted, in seconds.
    """
    run.save_weights(learn.model)
    seconds, flop = learn.recorder.train_seconds, learn.recorder.flop  # the report starts the recorder anew
    data, recipe = run.config["data"], run.recipe
    images = f"{data['name']} {eval_split_name(learn.dls.train.table, run.options.valid)} images"
    interp, metrics = write_report(learn, run.path, images)
    metrics |= dict(
        tta_accuracy=tta_accuracy(interp, recipe.flip),
        epochs=recipe.epochs,
        seconds=time.time() - started,  # without the time between an interruption and the resumption
        seconds_training=seconds,  # without validation
        pflop=flop / 1e15,  # of the training steps
        images_per_second=recipe.epochs * len(learn.dls.train) * learn.dls.bs / seconds,
    )
    write_html(interp, metrics, run, run.path, images)
    run.write_metrics(**metrics)
    print(f"{data['name']}: {metrics['accuracy']:.2%} of {metrics['images']:,} images correct,"
          f" {metrics['tta_accuracy']:.2%} with test-time augmentation. See {run.path / 'report.html'}")  # fmt: skip
