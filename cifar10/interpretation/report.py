"""The report of a model on labeled images: plots, report.md, and report.html, which holds all of it in one file."""

import base64
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.vision.all import Learner
from markdown_it import MarkdownIt
from torchvision.transforms.v2.functional import to_pil_image

from cifar10.data import eval_split_name
from cifar10.files import read_csv, save_figure, write
from cifar10.interpretation import plots
from cifar10.interpretation.fonts import fonts_for, shorten_middle
from cifar10.interpretation.metrics import fit_temperature, likely_label_errors, summarize
from cifar10.interpretation.predictions import Interpretation, tta_accuracy
from cifar10.options import Options
from cifar10.processes import on_rank0
from cifar10.runs.run import Run
from cifar10.text import plural, printable

N_SUSPECTS, N_EXAMPLES = 20, 10
# Label smoothing is named as the cause of probabilities that are too low by at most this multiple of it: it lowers sure
# predictions by almost as much as itself, and others by more.
SMOOTHED = 1.5
NOTEBOOK_LOG = Path(__file__).parents[2] / "results/notebook/log.csv"  # of the assignment
CIFAR10_SHA256 = "2ebad64464aa84e29315dc092b00cf79fb98223a601e0112bf2a17411e9908bc"  # `ImageTable.hash` of CIFAR-10
PLOTS = {  # file → what draws it from the predictions (the others are drawn in training), its title, its caption
    "lr_find": (None, "LR finder", "Loss while the learning rate rises, and the learning rates chosen from it."),
    "curves": (
        None,
        "Training",
        "Loss and accuracy after each epoch, and the learning rate of each step. Only training images are augmented. If"
        " their accuracy is much higher than the valid one nevertheless, the model overfits; more images help most.",
    ),
    "confusion_matrix": (
        plots.plot_confusion,
        "Confusion matrix",
        "How often each actual class (row) is predicted as each class (column).",
    ),
    "misclassified": (
        plots.plot_misclassified,
        "Hardest images",
        "Misclassified images, the worst mistakes first. If there are few, the least certain correct images follow.",
    ),
    "gradcam": (
        plots.plot_grad_cam,
        "Grad-CAM",
        "The evidence for two classes: the predicted one, and the actual one, or the runner-up if they are the same. A"
        " map that is blue everywhere has no evidence for its class.",
    ),
    "calibration": (
        plots.plot_calibration,
        "Calibration",
        "Accuracy at each probability with its 95% confidence interval, and how many images have this probability.",
    ),
}
STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa); }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; background: light-dark(#fff, #16181c);
  color: light-dark(#1a1a1a, #e8e8e8); overflow-wrap: anywhere; }
main { max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p:has(> img) { overflow-x: auto; } p:has(> img) + p { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; min-width: 40rem; height: auto; background: #fff; border-radius: 4px; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
th { white-space: nowrap; } td:first-child { min-width: 4.5rem; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
{body}</main></body></html>
"""


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def escape(text: str) -> str:
    """Any text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>$~#&])", r"\\\1", text)


def markdown_table(header: list[str], rows, right: int = 0) -> str:
    """A table in Markdown whose last `right` columns are aligned to the right."""
    rules = ["---"] * (len(header) - right) + ["---:"] * right
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (header, rules, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def baseline(metrics: dict[str, Any]) -> str:
    """How the accuracy compares with always predicting the most common class, in a sentence."""
    share, (low, high) = metrics["most_common_class"], metrics["accuracy_interval"]
    verdict = ""
    if high < share:
        verdict = ", which is better than the model"
    elif low <= share < 1:
        verdict = ", which the model does not beat with confidence"
    return f"Always predicting the most common class of these images would give {share:.2%}{verdict}."


def balanced_accuracy(metrics: dict[str, Any]) -> str:
    """The mean recall, in a sentence, unless all classes are equally frequent: then it is the accuracy."""
    if len({row["images"] for row in metrics["per_class"].values() if row["images"]}) == 1:
        return ""
    recall = percent(metrics["macro"]["recall"])
    return f"The mean recall of the classes, in which rare ones count as much as common ones, is {recall}."


def calibration(metrics: dict[str, Any], label_smoothing: float) -> str:
    """How far the probabilities are off, in which direction and why, and what corrects them."""
    said = (
        "The expected calibration error, the mean difference between probability and accuracy, is"
        f" {metrics['calibration_error']:.1%}"
    )
    if metrics["temperature"]:
        error = metrics["calibration_error_with_temperature"]
        return (
            f"{said}, and {error:.1%} with a temperature of {metrics['temperature']:.2f}, which was fitted on the run's"
            " validation images. predict.py, app.py and export.py use it; the plots and the loss are without it."
        )
    if metrics["calibration_error"] <= metrics["calibration_error_by_chance"]:
        images = plural(metrics["images"], "image")
        return f"{said}; with {images}, a perfectly calibrated model can have as much by chance."
    mean = metrics["mean_probability"]
    difference = metrics["accuracy"] - mean
    average = f"{mean:.1%} on average"
    if abs(difference) < metrics["calibration_error"] / 2:  # it would be all of the error if all were off alike
        return f"{said}: some probabilities are too low and some too high; they are {average}."
    if difference < 0:
        return f"{said}: the probabilities are too high, {average}."
    said += f": the probabilities are too low, {average}."
    if label_smoothing:
        by_smoothing = difference <= SMOOTHED * label_smoothing
        cause = "makes them so" if by_smoothing else "is one cause, perhaps a short training another"
        said += f" Label smoothing {cause}; the loss and this error look worse than the model is."
    return said


def statements(run: Run, metrics: dict[str, Any], own: bool) -> str:
    """What the numbers say, as a list; of CIFAR-10's test images, also the accuracy of the assignment's notebook."""
    low, high = metrics["accuracy_interval"]
    said = [
        f"The 95% confidence interval of the accuracy (Wilson's) is {low:.2%} to {high:.2%}.",
        baseline(metrics),
        balanced_accuracy(metrics),
        f"The mean cross-entropy loss, with labels smoothed as in training, is {metrics['loss']:.4f}.",
        calibration(metrics, run.recipe.label_smoothing),
    ]
    if "tta_accuracy" in metrics:
        said.insert(0, f"The accuracy with test-time augmentation is {metrics['tta_accuracy']:.2%}.")
    if own and run.sha256 == CIFAR10_SHA256 and run.options.valid == "test" and NOTEBOOK_LOG.is_file():
        said.append(
            f"The accuracy of the assignment's notebook is {read_csv(NOTEBOOK_LOG)['test_accuracy_percent'][-1]:.2f}%."
        )
    return "\n".join(f"- {sentence}" for sentence in said if sentence)


def class_sections(interp: Interpretation, metrics: dict[str, Any]) -> list[str]:
    """What there is to know about each class, pairs of classes and labels."""
    scores = ("precision", "recall", "f1")
    rows = [
        [number, escape(name), int(row["images"]), *(percent(row[key]) for key in scores)]
        for number, (name, row) in enumerate(metrics["per_class"].items())
    ]
    rows.append(["", "mean of the classes", metrics["images"], *(percent(metrics["macro"][key]) for key in scores)])
    header = ["number", "class", "images", "precision", "recall", "F1"]
    sections = ["## Classes", markdown_table(header, rows, right=4)]
    pairs = [(escape(printable(a)), escape(printable(b)), n) for a, b, n in interp.most_confused(min_val=1)[:10]]
    if pairs:
        sections += ["## Most confused", markdown_table(["actual", "predicted", "images"], pairs, right=1)]
    suspects = []
    for row in likely_label_errors(interp, N_SUSPECTS).tolist():
        file, label, predicted = interp.dl.dataset.items[row], interp.targs[row], interp.decoded[row]
        names = [printable("/".join(file.parts[-2:])), interp.names[label], interp.names[predicted]]
        suspects.append([*map(escape, names), *(percent(interp.preds[row, k].item()) for k in (label, predicted))])
    if suspects:
        wrong = len(interp.misclassified())
        which = f"The first {len(suspects)} of {wrong:,} misclassified" if wrong > len(suspects) else "Misclassified"
        note = (
            f"{which} images, ordered by how much likelier the model finds another class than the label. Some of these"
            " labels may be wrong, and the better the model, the likelier that is. The list says little about images"
            " that the model was trained on."
        )
        header = ["image", "label", "predicted", "probability of the label", "of the prediction"]
        sections += ["## Labels to check", note, markdown_table(header, suspects, right=2)]
    return sections


def command(options: Options) -> str:
    """The command that makes such a run, with the options that are not the default."""
    unimportant = ("device", "precision", "runs_dir", "name", "resume")
    words = ["python", "train.py"]
    for name, value in vars(options).items():
        if value == getattr(Options, name) or name in unimportant:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def facts(run: Run, metrics: dict[str, Any]) -> str:
    """What was trained, on which data, with which settings and hardware."""
    config, data, hardware = run.config, run.config["data"], run.config["hardware"]
    splits = ", ".join(f"{data[name]:,} {name}" for name in ("train", "valid", "test") if data.get(name))
    recipe = replace(run.recipe, lr_min=config["lr_min"], lr_max=config["lr_max"])
    cpu = f"{hardware.get('cpu_model') or 'a CPU'}, {hardware['cpu']}, threads: {hardware['threads']}"
    rows = {
        "name": run.path.name,
        "command": command(run.options),
        "data": f"{printable(data['name'])}: {splits} images of {plural(len(data['classes']), 'class')},"
        f" {run.size}×{run.size} pixels",
        "recipe": f"{recipe.name}: {recipe.describe_cycle()}, width {run.model_args['width']}",
        "duration": f"{metrics['seconds']:,.0f} seconds, {metrics['images_per_second']:,.0f} images per second,"
        f" {metrics['pflop']:.3g} PFLOP",
        "hardware": hardware["gpu"] if run.options.device == "cuda" else cpu,
        "precision": run.options.precision,
        "versions": ", ".join(f"{name} {version}" for name, version in config["versions"].items()),
        "commit": str(config["commit"]),
    }
    if run.options.weights:
        rows["weights"] = f"all layers but the last start from {run.options.weights}"
    return markdown_table(["setting", "value"], ((name, escape(value)) for name, value in rows.items()))


def as_page(markdown: str, folder: Path) -> str:
    """A report in Markdown as a web page that holds the plots of the folder and loads nothing from a server."""

    def embed(source: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / source[1]).read_bytes()).decode()}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    title = re.findall("<h1>(.*)</h1>", body)[0]
    body = re.sub(r'src="(\w+\.png)"', embed, body)
    return PAGE.format(title=title, style=STYLE, body=body)


def save_images(interp: Interpretation, folder: Path):
    """PNG files for app.py: ten examples, of as many classes as there are, and the misclassified images."""
    targs = pd.Series(interp.targs.numpy())
    examples = targs.groupby(targs).cumcount().sort_values(kind="stable").index[:N_EXAMPLES].tolist()
    wrong, both = interp.misclassified()[: plots.N_MISCLASSIFIED].tolist(), [interp.targs, interp.decoded]
    for name, rows, labels in (("examples", examples, [interp.targs]), ("misclassified", wrong, both)):
        (folder / name).mkdir(exist_ok=True)
        for old in (folder / name).glob("[0-9][0-9]-*.png"):  # of an earlier report; other files are not ours
            old.unlink()
        for number, row in enumerate(rows):
            title = ", predicted ".join(shorten_middle(interp.names[label[row]], 25) for label in labels)
            pixels = interp.images(torch.tensor([row]))[1][0].cpu()
            to_pil_image(pixels).save(folder / name / f"{number:02}-{title.replace('/', '_')}.png")


def validation_temperature(learn: Learner) -> float | None:
    """The temperature for the model's probabilities, fitted on the validation images if there are others to test on."""
    if len(learn.dls.loaders) < 3:
        return None
    preds, targs = learn.get_preds(dl=learn.dls.valid)
    # Without a mistake, the best temperature would be zero.
    return fit_temperature(preds, targs) if (preds.argmax(dim=1) != targs).any() else None


def write_report(learn: Learner, run: Run, folder: Path, split: str, temperature: float | None, tta: bool = True,
                 **trained) -> dict[str, Any]:  # fmt: skip
    """Write the report of a run's model into a folder, with plots; with curves if it is the run's own folder.

    The report is on the test images, or on the validation images if there are no others. `split` says which ones they
    are, `temperature` is the one of the saved weights, `trained` are metrics of the training run if it has just ended.
    Returns the metrics, with `trained`.
    """
    interp = Interpretation(learn, learn.dls[len(learn.dls.loaders) - 1])
    if missing := fonts_for("".join(interp.names))[1]:
        letters = "".join(sorted(missing)[:20])
        print(f"No font here has {letters}: plots show these classes by their number in report.md")
    if (folder / "history.csv").is_file():
        plots.plot_curves(folder)
        save_figure(folder / "curves.png")
    for name, (draw, _, _) in PLOTS.items():
        if draw:
            draw(interp)
            save_figure(folder / f"{name}.png")
    save_images(interp, folder)
    metrics = summarize(interp, temperature) | trained
    if tta:
        metrics["tta_accuracy"] = tta_accuracy(interp, run.recipe.flip)
    own = folder == run.path
    table, count = learn.dls.train.table, metrics["images"]
    if split in ("test", "validation"):
        images = f"{count:,} {split} images of {table.name}"
    else:
        mostly = ", mostly trained on" if split in ("train", "all") and table.hash == run.sha256 else ""
        images = f"{count:,} images of {table.name} ({split}{mostly})"
    title = f"{metrics['accuracy']:.2%} of {images} correct"
    blocks = [f"# {escape(title)}", statements(run, run.metrics | metrics if own else metrics, own)]
    for name, (_, heading, caption) in PLOTS.items():
        if (folder / f"{name}.png").is_file():
            blocks += [f"## {heading}", f"![{heading}]({name}.png)", caption]
    blocks += class_sections(interp, metrics)
    about = ["## The run", facts(run, run.metrics | metrics)]  # not in report.md, which is the same after a resume
    write(folder / "report.md", "\n\n".join(blocks) + "\n")
    write(folder / "report.html", as_page("\n\n".join([*blocks, *about]), folder))
    with_tta = f", {metrics['tta_accuracy']:.2%} with test-time augmentation" if tta else ""
    model = "" if own else f"{run.path}: "
    print(f"{model}{title}{with_tta}. {baseline(metrics)} See {folder / 'report.html'}")
    return metrics


@on_rank0
def report_run(learn: Learner, run: Run, started: float):
    """Save the weights of a trained run and its report; metrics.json, which ends it, comes last.

    `started` is when the run would have started if it had never been interrupted, in seconds.
    """
    recipe, seconds = run.recipe, learn.recorder.train_seconds
    trained = dict(  # before predictions reset the recorder
        epochs=recipe.epochs,
        seconds_training=seconds,  # without validation
        pflop=learn.recorder.flop / 1e15,  # of the training steps
        images_per_second=recipe.epochs * len(learn.dls.train) * learn.dls.bs / seconds,
    )
    temperature = validation_temperature(learn)
    run.save_weights(learn.model, temperature)
    trained["seconds"] = time.time() - started  # without the time between an interruption and the resumption
    split = eval_split_name(learn.dls.train.table, run.options.valid)
    run.write_metrics(**write_report(learn, run, run.path, split, temperature, **trained))
