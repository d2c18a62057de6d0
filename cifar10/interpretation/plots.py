"""Plots of a run: training curves, confusion matrix, misclassified images, Grad-CAM."""

from pathlib import Path

import matplotlib
import numpy as np
import sklearn.metrics as skm
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cifar10.files import read_csv
from cifar10.interpretation.classifier import ImageClassifier
from cifar10.interpretation.fonts import display_names, fonts_for, shorten_middle, width, with_fonts, wrap
from cifar10.interpretation.gradcam import GRADCAM_LAYERS, grad_cam
from cifar10.interpretation.metrics import BINS, calibration_error, reliability, wilson
from cifar10.interpretation.predictions import Interpretation
from cifar10.text import plural

N_MISCLASSIFIED = 20  # the assignment asks for 20
N_GRADCAM = 10  # of them get a Grad-CAM
MAX_CONFUSION = 25  # classes; of more, the confusion matrix is too large to read
LEVELS = ["Image", *(f"After {name.capitalize()}" for name in GRADCAM_LAYERS)]  # the panels of a Grad-CAM
TRAIN_COLOR, VALID_COLOR, LR_COLOR = "tab:blue", "tab:orange", "tab:green"


def show_image(ax, image: Tensor, title: str = ""):
    ax.imshow(image.permute(1, 2, 0))
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])


def plot_curves(folder: Path):
    """Loss and accuracy per epoch, train and valid, and the learning rate of each step, from a run's folder."""
    history, batches = read_csv(folder / "history.csv"), read_csv(folder / "batches.csv")
    steps_per_epoch = len(batches["step"]) / len(history["epoch"])
    figure, (loss, accuracy, lr) = plt.subplots(
        3, 1, figsize=(9, 10), sharex=True, height_ratios=[2, 2, 1], layout="constrained"
    )
    at = [step / steps_per_epoch for step in batches["step"]]
    marker = "." if len(at) < 50 else None
    loss.plot(at, batches["loss"], marker=marker, color=TRAIN_COLOR, alpha=0.4, label="train, each step")
    for ax, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for split, color in (("train", TRAIN_COLOR), ("valid", VALID_COLOR)):
            values = [scale * value for value in history[f"{split}_{quantity}"]]
            label = "train, mean of the epoch" if split == "train" else "valid"
            ax.plot(history["epoch"], values, "o-", color=color, markersize=4, label=label)
        ax.grid(alpha=0.3)
        ax.legend()
    loss.set_ylabel("Cross-entropy loss")
    accuracy.set_ylabel("Accuracy (%)")
    lr.plot(at, batches["lr"], marker=marker, color=LR_COLOR)
    lr.set(xlabel="Epoch", ylabel="Learning rate", xlim=(0, None), ylim=(0, None))
    lr.grid(alpha=0.3)
    lr.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    final, epochs = history["valid_accuracy"][-1], len(history["epoch"])
    figure.suptitle(f"Training: valid accuracy {final:.2%} after {plural(epochs, 'epoch')}")


@with_fonts
def plot_confusion(interp: Interpretation):
    """The confusion matrix: counts, and colors by their share of the actual class.

    Of many classes, the most confused ones, beside the whole in colors.
    """
    matrix, names = interp.confusion_matrix(), np.array(display_names(interp.names, 24))
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(1)  # of the actual class, which may have few images
    many = len(names) > MAX_CONFUSION
    size = (17, 9.6) if many else (9, 9)  # inches
    figure, axes = plt.subplots(1, 1 + many, figsize=size, layout="compressed", squeeze=False)
    if many:
        whole = axes[0, 0]
        whole.imshow(shares, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.3))  # shows small ones, too
        whole.set(xlabel="Predicted class, by number", ylabel="Actual class, by number")
        whole.set_title("All classes; the darker, the larger the share of the actual class")
        part = most_confused_classes(matrix, MAX_CONFUSION)
        axes[0, 1].set_title(f"The {len(part)} most confused classes")
        matrix, shares, names = matrix[np.ix_(part, part)], shares[np.ix_(part, part)], names[part]
    display = skm.ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(ax=axes[0, -1], cmap="Blues", colorbar=False, xticks_rotation="vertical",
                 text_kw={"fontsize": 10 if len(names) <= 12 else 8})  # fmt: skip
    for text, count in zip(display.text_.flat, matrix.flat, strict=True):
        text.set_text(str(count or ""))  # a zero is an empty cell
    axes[0, -1].set(xlabel="Predicted class", ylabel="Actual class")
    figure.suptitle(f"Confusion matrix: {interp.accuracy:.2%} of {len(interp.targs):,} images correct")


def most_confused_classes(matrix: np.ndarray, count: int) -> list[int]:
    """The `count` classes with the largest numbers off the diagonal, in order."""
    order = np.argsort(-np.triu(matrix + matrix.T, 1), axis=None, kind="stable")
    classes = np.stack(divmod(order, len(matrix)), axis=1).flatten()  # of one pair after the other
    return sorted(list(dict.fromkeys(classes.tolist()))[:count])


def caption(interp: Interpretation, names: list[str], row: int, limit: int) -> list[str]:
    """The two classes of an image with their probabilities; in lines of `limit` columns if they are longer."""
    captions = []
    for kind, label in interp.two_classes(row):
        start, name = f"{kind} {interp.preds[row, label]:.0%}:", names[label]
        whole = f"{start} {name}"
        captions.append(whole if width(whole) <= limit else "\n".join([start, *wrap(name, limit)]))
    return captions


def title_of_hardest(interp: Interpretation, shown: int) -> str:
    """What the `shown` hardest images are, to be written after "the"."""
    wrong = len(interp.misclassified())
    if wrong > shown:
        return f"{shown} worst of {wrong:,} misclassified images"
    if wrong == shown:
        return f"{wrong} misclassified images"
    if not wrong:
        return f"{shown} least certain images, none of them misclassified"
    return f"{wrong} misclassified and {shown - wrong} least certain correct images"


@with_fonts
def plot_misclassified(interp: Interpretation):
    """The worst misclassified images with the probabilities of the actual and of the predicted class.

    If there are fewer than 20, the least certain correct images follow.
    """
    shown = interp.hardest(N_MISCLASSIFIED)
    names = display_names(interp.names, 22)
    rows = -(-len(shown) // 5)
    figure, axes = plt.subplots(rows, 5, figsize=(10, 0.3 + 2.3 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax, image, row in zip(axes.flat, interp.images(shown)[1].cpu(), shown):
        show_image(ax, image, "\n".join(caption(interp, names, row, 29)))
        ax.title.set_color("black" if interp.decoded[row] != interp.targs[row] else "tab:green")
    green = "; green: correct" if len(interp.misclassified()) < len(shown) else ""
    figure.suptitle(f"The {title_of_hardest(interp, len(shown))} (out of {len(interp.targs):,}{green})")


def overlay(pixels: Tensor, heat: Tensor, opacity: float) -> Image.Image:
    """An image, uint8 `(3, H, W)`, under the colors of a heat map `(H, W)`."""
    colors = Image.fromarray(matplotlib.colormaps["jet"](heat.numpy(), bytes=True)).convert("RGB")
    return Image.blend(to_pil_image(pixels), colors, opacity)


def show_levels(axes, image: Tensor, heat: Tensor, titles: list[str]):
    """The image, and the image under the heat map `(H, W)` of each layer. Returns the last one, for a color bar."""
    for ax, title in zip(axes, titles, strict=True):
        show_image(ax, image, title)
    for ax, level in zip(axes[1:], heat, strict=True):
        shown = ax.imshow(level, cmap="jet", alpha=0.5, vmin=0, vmax=1)
    return shown


def add_evidence_bar(figure, shown, label: str, **place):
    bar = figure.colorbar(shown, ticks=[0, 1], **place)
    bar.ax.set_yticklabels(["none", "most"])
    bar.set_label(label, labelpad=-18)


@with_fonts
def plot_grad_cam(interp: Interpretation):
    """For the images that `plot_misclassified` begins with: Grad-CAM after each layer, for two classes.

    They are the predicted and the actual class, or the runner-up if both are the same.
    """
    rows = interp.hardest(N_GRADCAM)
    names = display_names(interp.names, 26)
    inputs, images = interp.images(rows)
    classes = torch.tensor([label for row in rows for _, label in interp.two_classes(row)])
    heat = grad_cam(interp.learn.model, inputs.repeat_interleave(2, dim=0), classes).cpu().unflatten(1, (-1, 2))
    across = 5  # images side by side; more would be too small to see
    bands = -(-len(rows) // across)
    figure = plt.figure(figsize=(14, 0.3 + 5.4 * bands), layout="compressed")
    pairs = [1, 1, 0.1] * across  # columns: two for each image, and a gap
    grid = figure.subplots(len(LEVELS) * bands, len(pairs), squeeze=False, width_ratios=pairs)
    for i, (row, image) in enumerate(zip(rows, images.cpu())):
        band, column = divmod(i, across)
        for side, text in enumerate(caption(interp, names, row, 13)):
            axes = grid[len(LEVELS) * band : len(LEVELS) * (band + 1), 3 * column + side]
            shown = show_levels(axes, image, heat[:, i, side], [text, "", "", ""])
    for ax, level in zip(grid[:, 0], LEVELS * bands):
        ax.set_ylabel(level)
    for ax in grid.flat:
        if not ax.images:
            ax.axis("off")
    place = dict(ax=grid, shrink=1 / bands, aspect=40, pad=0)  # as long as its label, in one band, too
    add_evidence_bar(figure, shown, "evidence, relative to the map's maximum", **place)
    figure.suptitle(f"Grad-CAM, the evidence for each class, of the {title_of_hardest(interp, len(rows))}")


def plot_image_grad_cam(classifier: ImageClassifier, pixels: Tensor, probabilities: Tensor, file: str):
    """The Grad-CAM of an image's likeliest class. The image is uint8 `(3, size, size)`; `file` is its name."""
    fonts, missing = fonts_for("".join([*classifier.names, file]))
    label = int(probabilities.argmax())
    with plt.rc_context({"font.family": fonts, "text.parse_math": False}):
        figure, axes = plt.subplots(1, len(LEVELS), figsize=(10, 3.4), layout="constrained")
        title = "Image" if missing & {*file} else shorten_middle(file, 30)
        shown = show_levels(axes, pixels, classifier.grad_cam(pixels, label), [title, *LEVELS[1:]])
        add_evidence_bar(figure, shown, "evidence", ax=axes, shrink=0.6)
        name = display_names(classifier.names, 40)[label]
        figure.suptitle(f"Grad-CAM: the evidence for {name}, the likeliest class ({probabilities[label]:.0%})")


def plot_calibration(interp: Interpretation):
    """The reliability diagram: accuracy against the probability of the predicted class."""
    bins = reliability(interp.preds, interp.targs)
    figure, (ax, below) = plt.subplots(2, 1, figsize=(6, 6.5), sharex=True, height_ratios=[3, 1], layout="constrained")
    ax.plot([0, 100], [0, 100], "--", color="gray", label="perfectly calibrated")
    intervals = np.array([wilson(*counts) for counts in zip(bins.correct, bins.images)]).T
    errors = 100 * np.abs(intervals - bins.accuracy.to_numpy())
    ax.errorbar(100 * bins.confidence, 100 * bins.accuracy, errors, fmt="o", capsize=3, color=VALID_COLOR,
                label="this model, with 95% confidence intervals", clip_on=False)  # fmt: skip
    ax.set(ylabel="Accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)  # above, where no interval is
    below.bar(100 * (bins.index + 0.5) / BINS, bins.images, width=90 / BINS, color=TRAIN_COLOR)
    below.set(xlabel="Probability of the predicted class (%)", ylabel="Images", yscale="log")
    below.set_ylim(0.5, max(12, 1.5 * bins.images.max()))  # labels at 1 and 10 at least
    below.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    below.grid(alpha=0.3)
    error = calibration_error(interp.preds, interp.targs)
    figure.suptitle(f"Calibration: expected calibration error {error:.1%}, {len(interp.targs):,} images")
