"""What a finished run learned: misclassified images, Grad-CAM, curves, confusion matrix, report.

`python interpret.py RUN` makes the pictures of a run again; `train.py` makes them at its end.
"""

from pathlib import Path

import matplotlib
import numpy as np
import sklearn.metrics as skm
import torch
from fastai.callback.hook import hook_outputs
from fastai.vision.all import Callback, ClassificationInterpretation, Learner
from fastcore.script import call_parse
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

from data import get_dls, printable
from errors import UserError, command_line
from files import write
from learner import LRCurve
from runs import load_run, read_config, read_csv, save_figure, write_json

MISCLASSIFIED = 20  # the assignment asks for 20
EXPLAINED = 10  # of them get a Grad-CAM
LAYERS = ("layer1", "layer2", "layer3")  # where the assignment's notebook looks
TRAIN_COLOUR, VALID_COLOUR, LR_COLOUR = "tab:blue", "tab:orange", "tab:green"


# ---- Grad-CAM ------------------------------------------------------------------------------------------------------


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """Which places of each image speak for a class: for each layer a heat map `(N, H, W)` in [0, 1].

    `images` is `(N, 3, H, W)`, normalised; `classes` int64 `(N,)`, the class to explain for each. The heat map is the
    layer's channels weighted by the mean gradient of the class's logit, without what is negative, brought to the
    images' size and stretched to [0, 1]; all zero where nothing is positive. One forward and one backward pass serve
    all images and layers; the model's mode and gradients stay as they were, and hooks are removed whatever happens.
    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks", 2017.
    """
    training = model.training
    model.eval()
    try:
        with hook_outputs(layers, detach=False) as hooks, torch.enable_grad():
            logits = model(images)
            activations = list(hooks.stored)
            # An image's logit depends on no other image, so the sum's gradient is each image's own.
            gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), activations)
    finally:
        model.train(training)
    return [heat_map(a.detach().float(), g.float(), images.shape[-2:]) for a, g in zip(activations, gradients)]


def heat_map(activations: Tensor, gradients: Tensor, size) -> Tensor:
    """Two `(N, C, h, w)` → `(N, *size)` in [0, 1]."""
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    cam = F.relu((weights * activations).sum(dim=1, keepdim=True))
    cam = F.interpolate(cam, size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-7)


# ---- Predictions ---------------------------------------------------------------------------------------------------


class Interpretation(ClassificationInterpretation):
    """fastai's ClassificationInterpretation, with the predictions kept: one pass over the images serves every picture.

    `preds` are probabilities `(N, classes)`, `targs` the actual and `decoded` the predicted classes, int64 `(N,)`.
    """

    def __init__(self, learn: Learner):
        self.preds, targs, losses = learn.get_preds(dl=learn.dls.valid, with_loss=True)
        self.targs, self.decoded = torch.as_tensor(targs), self.preds.argmax(dim=1)
        super().__init__(learn, learn.dls.valid, losses)
        # As they are to be shown: to matplotlib, dollar signs begin a formula.
        self.vocab = [printable(label).replace("$", r"\$") for label in learn.dls.vocab]

    def confusion_matrix(self) -> np.ndarray:
        return skm.confusion_matrix(self.targs, self.decoded, labels=range(len(self.vocab)))

    @property
    def accuracy(self) -> float:
        return (self.decoded == self.targs).double().mean().item()

    def misclassified(self) -> Tensor:
        """Rows of the misclassified images, worst first: lowest probability of the actual class."""
        wrong = (self.decoded != self.targs).nonzero().flatten()
        return wrong[self.preds[wrong, self.targs[wrong]].argsort()]

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(n, 3, 32, 32)`: normalised, as the model takes them, and in [0, 1], as people look at them."""
        self.dl.before_iter()  # sets the transforms to validation
        batch = self.dl.batch(rows)
        return torch.Tensor(self.dl.after_batch(batch)[0]), torch.Tensor(batch[0]).float() / 255

    def caption(self, row: int, kind: str) -> str:
        label = self.targs[row] if kind == "actual" else self.decoded[row]
        return f"{kind} {self.vocab[label]} {self.preds[row, label]:.0%}"


class MirrorImages(Callback):
    """Show the model every image the other way round."""

    def before_batch(self):
        self.learn.xb = (self.x.flip(-1),)


def two_view_accuracy(interp: Interpretation) -> float:
    """Accuracy of the mean of the probabilities that each image and its mirror image get."""
    mirrored, _ = interp.learn.get_preds(dl=interp.dl, cbs=MirrorImages())
    return ((interp.preds + mirrored).argmax(dim=1) == interp.targs).double().mean().item()


# ---- Pictures ------------------------------------------------------------------------------------------------------


def show_image(ax, image: Tensor, title: str = "", **kwargs):
    ax.imshow(image.permute(1, 2, 0), **kwargs)
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])


def plot_misclassified(interp: Interpretation):
    """The worst misclassified images with the probabilities of the actual and of the predicted class."""
    wrong = interp.misclassified()
    shown = wrong[:MISCLASSIFIED]
    rows = max(1, -(-len(shown) // 5))
    figure, axes = plt.subplots(rows, 5, figsize=(10, 0.5 + 2.5 * rows), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, row, image in zip(axes.flat, shown, interp.images(shown)[1].cpu() if len(shown) else ()):
        ax.axis("on")
        show_image(ax, image, f"{interp.caption(row, 'actual')}\n{interp.caption(row, 'predicted')}")
    if not len(wrong):
        which = "No image was misclassified"
    elif len(wrong) == len(shown):
        which = f"All misclassified images, {len(wrong)}"
    else:
        which = f"The {len(shown)} worst of {len(wrong):,} misclassified images"
    figure.suptitle(f"{which} among {len(interp.targs):,}")


def plot_grad_cam(interp: Interpretation):
    """For the worst misclassified images: Grad-CAM after each layer, for the predicted and for the actual class."""
    rows = interp.misclassified()[:EXPLAINED]
    per_band = 5  # images side by side; more would make them too small to see
    bands = max(1, -(-len(rows) // per_band))
    figure = plt.figure(figsize=(14, 6.4 * bands))
    if not len(rows):
        figure.suptitle("No image was misclassified")
        return
    inputs, pictures = interp.images(rows)
    model = interp.learn.model
    layers = [getattr(model, name) for name in LAYERS]
    classes = torch.cat([interp.decoded[rows], interp.targs[rows]]).to(inputs.device)
    heat = torch.stack(grad_cam(model, torch.cat([inputs, inputs]), classes, layers)).cpu()  # (layers, 2n, 32, 32)
    pictures = pictures.cpu()
    gap = 0.15
    grid = figure.add_gridspec(
        bands * 5 - 1,
        per_band * 3 - 1,
        width_ratios=([1, 1, gap] * per_band)[:-1],
        height_ratios=([1] * 4 + [0.6]) * (bands - 1) + [1] * 4,
        left=0.06, right=0.93, top=1 - 0.95 / (6.4 * bands), bottom=0.02, wspace=0.05, hspace=0.05,
    )  # fmt: skip
    for i, row in enumerate(rows):
        band, place = divmod(i, per_band)
        for side, kind in enumerate(("predicted", "actual")):
            for level in range(4):
                ax = figure.add_subplot(grid[band * 5 + level, place * 3 + side])
                show_image(ax, pictures[i], interp.caption(row, kind).replace(" ", "\n") if level == 0 else "")
                if level:
                    shown = ax.imshow(heat[level - 1, side * len(rows) + i], cmap="jet", alpha=0.5, vmin=0, vmax=1)
                if place == side == 0:
                    ax.set_ylabel(["Image", "After Layer1", "After Layer2", "After Layer3"][level])
    bar = figure.colorbar(shown, cax=figure.add_axes((0.95, 0.25, 0.012, 0.5)), ticks=[0, 1])
    bar.ax.set_yticklabels(["none", "most"])
    bar.set_label("evidence for the class named above", labelpad=-18)
    figure.suptitle(
        "Grad-CAM of the worst misclassified images: what speaks for the predicted and for the actual class"
    )


def plot_lr_curve(curve: LRCurve):
    """The loss of each step of an LR sweep, with lr_min, lr_max and fastai's suggestions marked."""
    _, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    ax.plot(curve.lrs, curve.losses, ".-", color=TRAIN_COLOUR, label="loss of each step")
    for name, lr in (("lr_min", curve.lr_min), ("lr_max", curve.lr_max)):
        ax.axvline(lr, color=LR_COLOUR, linestyle="-" if name == "lr_max" else "--", label=f"{name} = {lr:.2g}")
    for (name, lr), marker in zip(curve.suggestions.items(), "ov^"):
        height = np.interp(np.log(lr), np.log(curve.lrs), curve.losses)
        ax.plot(lr, height, marker, color=VALID_COLOUR, markersize=9, label=f"fastai's {name}: {lr:.2g}")
    ax.set_xscale("log")
    ax.set_ylim(0.9 * min(curve.losses), 1.5 * curve.losses[0])  # a blow-up at the end would flatten all the rest
    ax.set_xlabel("Learning rate")
    ax.set_ylabel("Cross-entropy with smoothed labels")
    ax.set_title("LR finder: the learning rate rises at every step")
    ax.grid(alpha=0.3, which="both")
    ax.legend()


def plot_curves(run: Path):
    """Loss and accuracy per epoch, train and valid, and the learning rate of each step below."""
    history, batches = read_csv(run / "history.csv"), read_csv(run / "batches.csv")
    steps_per_epoch = len(batches["step"]) / len(history["epoch"])
    figure, (loss, accuracy, rate) = plt.subplots(
        3, 1, figsize=(9, 10), sharex=True, height_ratios=[2, 2, 1], layout="constrained"
    )
    at = [step / steps_per_epoch for step in batches["step"]]
    loss.plot(at, batches["loss"], color=TRAIN_COLOUR, alpha=0.25, label="train, each step")
    for ax, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for split, colour in (("train", TRAIN_COLOUR), ("valid", VALID_COLOUR)):
            values = [scale * value for value in history[f"{split}_{quantity}"]]
            ax.plot(history["epoch"], values, "o-", color=colour, markersize=4, label=split)
        ax.grid(alpha=0.3)
        ax.legend()
    loss.set_ylabel("Cross-entropy with smoothed labels")
    accuracy.set_ylabel("Accuracy (%)")
    rate.plot(at, batches["lr"], color=LR_COLOUR)
    rate.set_ylabel("Learning rate")
    rate.set_xlabel("Epoch")
    rate.grid(alpha=0.3)
    rate.set_ylim(bottom=0)
    rate.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.suptitle(
        f"Training: valid accuracy {history['valid_accuracy'][-1]:.2%} after {len(history['epoch'])} epochs"
    )


def plot_confusion(interp: Interpretation):
    """fastai's confusion matrix with a title that says how many images it counts."""
    title = f"Confusion matrix: {interp.accuracy:.2%} of {len(interp.targs):,} images right"
    interp.plot_confusion_matrix(title=title, figsize=(8, 8))
    plt.tight_layout()  # once more, for the axis labels that fastai sets after its own call


# ---- Report --------------------------------------------------------------------------------------------------------


def per_class_accuracy(interp: Interpretation) -> dict[str, float | None]:
    """Class → the part of its images that were recognised; `None` for a class without images."""
    matrix = interp.confusion_matrix()
    return {label: matrix[i, i] / matrix[i].sum() if matrix[i].sum() else None for i, label in enumerate(interp.vocab)}


def report(interp: Interpretation) -> str:
    """Accuracy, per-class accuracy and the most confused pairs as Markdown."""
    lines = [f"# {interp.accuracy:.2%} of {len(interp.targs):,} images right", ""]
    accuracies = zip(interp.vocab, per_class_accuracy(interp).values())
    for header, rows in (
        ("| class | accuracy |\n| --- | ---: |", [(label, f"{v:.1%}") for label, v in accuracies if v is not None]),
        ("\n| actual | taken for | images |\n| --- | --- | ---: |", interp.most_confused(min_val=1)[:10]),
    ):
        lines += [header, *("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


def interpret(learn: Learner, run: str | Path) -> Interpretation:
    """Write misclassified.png, gradcam.png, curves.png, confusion_matrix.png and report.md into the run's folder."""
    run = Path(run)
    interp = Interpretation(learn)
    for name, plot, subject in (
        ("curves", plot_curves, run),
        ("confusion_matrix", plot_confusion, interp),
        ("misclassified", plot_misclassified, interp),
        ("gradcam", plot_grad_cam, interp),
    ):
        plot(subject)
        save_figure(run / f"{name}.png")
    write(run / "report.md", report(interp))
    return interp


@call_parse
@command_line
def main(
    run: str,  # folder of a finished run
    two_views: bool = False,  # with each image's mirror image as a second view, too, into two_views.json
):
    "Make the pictures and the report of a finished run again."
    config = read_config(run)
    options = config["options"]
    learn = load_run(run, get_dls(options["data"], options["batch_size"], options["valid"]))
    if two_views and learn.dls.train.table.is_digits:
        raise UserError("a digit's mirror image is no digit; leave out --two_views")
    interp = interpret(learn, run)
    print(f"{run}: {interp.accuracy:.2%} of {len(interp.targs):,} images right; pictures and report.md written")
    if two_views:
        accuracy = two_view_accuracy(interp)
        write_json(Path(run) / "two_views.json", {"accuracy": accuracy})
        print(f"With each image's mirror image as a second view: {accuracy:.2%}")
