"""Plots of a run: training curves, confusion matrix, misclassified images, Grad-CAM."""

import io
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from cifar10.files import read_csv, write
from cifar10.interpretation import Interpretation, grad_cam

N_MISCLASSIFIED = 20  # the assignment asks for 20
N_GRADCAM = 10  # of them get a Grad-CAM
GRADCAM_LAYERS = ("layer1", "layer2", "layer3")  # as in the assignment's notebook
TRAIN_COLOR, VALID_COLOR, LR_COLOR = "tab:blue", "tab:orange", "tab:green"


def save_figure(path: Path):
    """Write matplotlib's current figure as PNG and close it."""
    png = io.BytesIO()
    plt.savefig(png, dpi=100, format="png")
    plt.close()
    write(path, png.getvalue())


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
    loss.plot(at, batches["loss"], color=TRAIN_COLOR, alpha=0.25, label="train, each step")
    for ax, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for split, color in (("train", TRAIN_COLOR), ("valid", VALID_COLOR)):
            values = [scale * value for value in history[f"{split}_{quantity}"]]
            ax.plot(history["epoch"], values, "o-", color=color, markersize=4, label=split)
        ax.grid(alpha=0.3)
        ax.legend()
    loss.set_ylabel("Cross-entropy loss")
    accuracy.set_ylabel("Accuracy (%)")
    lr.plot(at, batches["lr"], color=LR_COLOR)
    lr.set(xlabel="Epoch", ylabel="Learning rate")
    lr.grid(alpha=0.3)
    lr.set_ylim(bottom=0)
    lr.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    final = history["valid_accuracy"][-1]
    figure.suptitle(f"Training: valid accuracy {final:.2%} after {len(history['epoch'])} epochs")


def plot_confusion(interp: Interpretation):
    """fastai's confusion matrix, with the accuracy and the number of images in the title."""
    title = f"Confusion matrix: {interp.accuracy:.2%} of {len(interp.targs):,} images correct"
    interp.plot_confusion_matrix(title=title, figsize=(8, 8))
    plt.tight_layout()  # once more, for the axis labels that fastai sets after its own call


def plot_misclassified(interp: Interpretation):
    """The worst misclassified images with the probabilities of the actual and of the predicted class."""
    wrong = interp.misclassified()
    shown = wrong[:N_MISCLASSIFIED]
    rows = max(1, -(-len(shown) // 5))
    figure, axes = plt.subplots(rows, 5, figsize=(10, 0.5 + 2.5 * rows), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, row, image in zip(axes.flat, shown, interp.images(shown)[1].cpu() if len(shown) else ()):
        ax.axis("on")
        show_image(ax, image, f"{interp.caption(row, 'actual')}\n{interp.caption(row, 'predicted')}")
    part = f"The {len(shown)} worst of {len(wrong):,}" if len(wrong) > len(shown) else f"All {len(wrong)}"
    figure.suptitle(f"{part if len(wrong) else 'No'} misclassified images (out of {len(interp.targs):,})")


def plot_grad_cam(interp: Interpretation):
    """For the worst misclassified images: Grad-CAM after each layer, for the predicted and for the actual class."""
    rows = interp.misclassified()[:N_GRADCAM]
    per_band = 5  # images side by side; more would be too small to see
    bands = max(1, -(-len(rows) // per_band))
    figure = plt.figure(figsize=(14, 6.4 * bands))
    if not len(rows):
        figure.suptitle("No misclassified images")
        return
    inputs, images = interp.images(rows)
    layers = [getattr(interp.learn.model, name) for name in GRADCAM_LAYERS]
    classes = torch.cat([interp.decoded[rows], interp.targs[rows]]).to(inputs.device)
    heat = torch.stack(grad_cam(interp.learn.model, torch.cat([inputs, inputs]), classes, layers)).cpu()
    images = images.cpu()
    grid = figure.add_gridspec(
        bands * 5 - 1, per_band * 3 - 1,
        width_ratios=([1, 1, 0.15] * per_band)[:-1],
        height_ratios=([1] * 4 + [0.6]) * (bands - 1) + [1] * 4,
        left=0.06, right=0.93, top=1 - 0.95 / (6.4 * bands), bottom=0.02, wspace=0.05, hspace=0.05,
    )  # fmt: skip
    for i, row in enumerate(rows):
        band, place = divmod(i, per_band)
        for side, kind in enumerate(("predicted", "actual")):
            for level in range(4):
                ax = figure.add_subplot(grid[band * 5 + level, place * 3 + side])
                show_image(ax, images[i], interp.caption(row, kind, "\n") if level == 0 else "")
                if level:  # heat is (layers, 2n, H, W)
                    shown = ax.imshow(heat[level - 1, side * len(rows) + i], cmap="jet", alpha=0.5, vmin=0, vmax=1)
                if place == side == 0:
                    ax.set_ylabel(["Image", "After Layer1", "After Layer2", "After Layer3"][level])
    bar = figure.colorbar(shown, cax=figure.add_axes((0.95, 0.25, 0.012, 0.5)), ticks=[0, 1])
    bar.ax.set_yticklabels(["none", "most"])
    bar.set_label("evidence for the class named above", labelpad=-18)
    figure.suptitle("Grad-CAM of the worst misclassified images: evidence for the predicted and the actual class")
