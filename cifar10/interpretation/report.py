"""The report of a model on labeled images: report.md and plots. page.py makes a web page of it."""

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from fastai.vision.all import Learner
from torchvision.transforms.v2.functional import to_pil_image

from cifar10.files import save_figure, write
from cifar10.interpretation import plots
from cifar10.interpretation.fonts import fonts_for
from cifar10.interpretation.metrics import fit_temperature, likely_label_errors, summarize
from cifar10.interpretation.predictions import Interpretation
from cifar10.text import printable

TEXTS = ("", "class", "actual", "predicted", "image", "label")  # columns of the tables; the others are numbers
N_SUSPECTS, N_EXAMPLES = 20, 10
PLOTS = {
    "confusion_matrix": plots.plot_confusion,
    "misclassified": plots.plot_misclassified,
    "gradcam": plots.plot_grad_cam,
    "calibration": plots.plot_calibration,
}
NOTES = {  # title of a table → paragraphs above it
    "Labels to check": [
        "Misclassified images, ordered by how much likelier the model finds another class than the label. Some of"
        " these labels may be wrong. The list says little about images that the model was trained on."
    ]
}


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def tables(interp: Interpretation, metrics: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title → header and rows of each table that has rows."""
    rows = [
        [str(number), name, str(int(row["images"])), *(percent(row[key]) for key in ("precision", "recall", "f1"))]
        for number, (name, row) in enumerate(metrics["per_class"].items())
    ]
    averages = [percent(metrics["macro"].get(key)) for key in ("precision", "recall", "f1")]
    rows.append(["", "mean of the classes", str(metrics["images"]), *averages])
    pairs = [[printable(a), printable(b), str(n)] for a, b, n in interp.most_confused(min_val=1)[:10]]
    files = interp.dl.dataset.items
    suspects = [
        [printable("/".join(files[row].parts[-2:])),
         interp.names[interp.targs[row]], percent(interp.preds[row, interp.targs[row]].item()),
         interp.names[interp.decoded[row]], percent(interp.preds[row].max().item())]
        for row in likely_label_errors(interp, N_SUSPECTS).tolist()
    ]  # fmt: skip
    found = {
        "Classes": (["number", "class", "images", "precision", "recall", "F1"], rows),
        "Most confused": (["actual", "predicted", "images"], pairs),
        "Labels to check": (["image", "label", "its probability", "predicted", "its probability"], suspects),
    }
    return {title: table for title, table in found.items() if table[1]}


def statements(metrics: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    low, high = metrics["accuracy_interval"]
    said = [
        f"The 95% confidence interval of the accuracy (Wilson's) is {low:.2%} to {high:.2%}.",
        f"The expected calibration error, the mean difference between probability and accuracy, is"
        f" {metrics['calibration_error']:.1%}.",
    ]
    if metrics["temperature"]:
        said.append(
            f"With a temperature of {metrics['temperature']:.2f}, fitted on the validation images, it is"
            f" {metrics['calibration_error_with_temperature']:.1%}."
        )
    return said


def markdown_report(interp: Interpretation, metrics: dict[str, Any], images: str) -> str:
    """Accuracy, what it means, and all tables as Markdown."""
    blocks = [f"# {metrics['accuracy']:.2%} of {metrics['images']:,} {images} correct", "\n".join(statements(metrics))]
    for title, (header, rows) in tables(interp, metrics).items():
        rules = ["---" if name in TEXTS else "---:" for name in header]
        cells = ([re.sub(r"([\\`*_{}\[\]<>$|~#])", r"\\\1", cell) for cell in row] for row in rows)
        table = "\n".join(f"| {' | '.join(row)} |" for row in (header, rules, *cells))
        blocks += [f"## {title}", *NOTES.get(title, []), table]
    return "\n\n".join(blocks) + "\n"


def save_images(interp: Interpretation, folder: Path):
    """PNG files for app.py: ten examples, of as many classes as there are, and the misclassified images."""
    by_class = [(interp.targs == label).nonzero().flatten().tolist() for label in range(len(interp.names))]
    examples = [row for same in zip_longest(*by_class) for row in same if row is not None][:N_EXAMPLES]
    wrong = interp.misclassified()[: plots.N_MISCLASSIFIED].tolist()
    for name, rows in (("examples", examples), ("misclassified", wrong)):
        (folder / name).mkdir(exist_ok=True)
        for old in (folder / name).glob("[0-9][0-9]-*.png"):  # of an earlier report; other files are not ours
            old.unlink()
        for number, row in enumerate(rows):
            title = interp.names[interp.targs[row]]
            if name == "misclassified":
                title += f", predicted {interp.names[interp.decoded[row]]}"
            pixels = interp.images(torch.tensor([row]))[1][0].cpu()
            to_pil_image(pixels).save(folder / name / f"{number:02}-{title.replace('/', '_')[:60]}.png")


def write_report(learn: Learner, folder: Path, images: str = "images") -> tuple[Interpretation, dict[str, Any]]:
    """Write report.md and plots into a folder, with curves if it is the folder of a run.

    The report is on the test images, or on the validation images if there are no others; then no temperature is
    fitted. `images` says which ones they are. Returns the predictions and their metrics.
    """
    interp = Interpretation(learn, learn.dls[len(learn.dls.loaders) - 1])
    temperature = None
    if len(learn.dls.loaders) > 2:
        preds, targs = learn.get_preds(dl=learn.dls.valid)
        if (preds.argmax(dim=1) != targs).any():  # or the best temperature would be zero
            temperature = fit_temperature(preds, targs)
    if missing := fonts_for("".join(interp.names))[1]:
        letters = "".join(sorted(missing)[:20])
        print(f"No font here has {letters}: plots show these classes by their number in report.md")
    if (folder / "history.csv").is_file():
        plots.plot_curves(folder)
        save_figure(folder / "curves.png")
    for name, plot in PLOTS.items():
        plot(interp)
        save_figure(folder / f"{name}.png")
    save_images(interp, folder)
    metrics = summarize(interp, temperature)
    write(folder / "report.md", markdown_report(interp, metrics, images))
    return interp, metrics
