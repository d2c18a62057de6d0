"""What a model has learned: its predictions on the validation images, Grad-CAM, test-time augmentation."""

from collections.abc import Callable
from functools import partial

import numpy as np
import sklearn.metrics as skm
import torch
from fastai.vision.all import Callback, ClassificationInterpretation, Learner
from torch import Tensor
from torch.nn import functional as F

from cifar10.text import printable


class Interpretation(ClassificationInterpretation):
    """fastai's ClassificationInterpretation, with the predictions kept: one pass over the images serves every plot.

    `preds` are probabilities `(N, classes)`, `targs` the actual and `decoded` the predicted classes, int64 `(N,)`.
    """

    def __init__(self, learn: Learner, dl=None, act=None):
        dl = learn.dls.valid if dl is None else dl
        self.preds, targs, losses = learn.get_preds(dl=dl, with_loss=True, act=act)
        self.targs, self.decoded = torch.as_tensor(targs), self.preds.argmax(dim=1)
        super().__init__(learn, dl, losses, act)
        self.names = [printable(label) for label in self.vocab]

    @classmethod
    def from_learner(cls, learn: Learner, ds_idx: int = 1, dl=None, act=None) -> "Interpretation":
        """As in fastai: of the DataLoader `dl`, or of the training (0) or validation images (1)."""
        return cls(learn, learn.dls[ds_idx].new(shuffle=False, drop_last=False) if dl is None else dl, act)

    def confusion_matrix(self) -> np.ndarray:
        return skm.confusion_matrix(self.targs, self.decoded, labels=range(len(self.names)))

    @property
    def accuracy(self) -> float:
        return (self.decoded == self.targs).double().mean().item()

    def misclassified(self) -> Tensor:
        """Rows of the misclassified images, worst first: lowest probability of the actual class."""
        wrong = (self.decoded != self.targs).nonzero().flatten()
        return wrong[self.preds[wrong, self.targs[wrong]].argsort()]

    def hardest(self, count: int) -> Tensor:
        """Rows of `count` images: the misclassified ones, then the correct ones with the least certain prediction."""
        correct = (self.decoded == self.targs).nonzero().flatten()
        least_certain = correct[self.preds[correct, self.targs[correct]].argsort()]
        return torch.cat([self.misclassified(), least_certain])[:count]

    def two_classes(self, row: int) -> list[tuple[str, int]]:
        """What to show of an image: its predicted and its actual class, or the runner-up if both are the same."""
        predicted, actual = int(self.decoded[row]), int(self.targs[row])
        if predicted != actual:
            return [("predicted", predicted), ("actual", actual)]
        return [("predicted", predicted), ("runner-up", int(self.preds[row].topk(2).indices[1]))]

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(n, 3, H, W)`: normalized, as the model takes them, and in [0, 1], to be displayed."""
        self.dl.before_iter()  # sets the transforms to validation
        batch = self.dl.batch(rows)
        return torch.Tensor(self.dl.after_batch(batch)[0]), torch.Tensor(batch[0]).float() / 255


def view(images: Tensor, shift: int, mirror: bool) -> Tensor:
    """`(N, 3, H, W)` shifted down and to the right by `shift` pixels, reflected at the border, and mirrored."""
    pad, (height, width) = abs(shift), images.shape[-2:]
    top = pad - shift
    shifted = F.pad(Tensor(images), (pad,) * 4, "reflect")[:, :, top : top + height, top : top + width]
    return shifted.flip(-1) if mirror else shifted


def views(flip: bool = True) -> list[tuple[float, Callable[[Tensor], Tensor]]]:
    """Weights and functions of the views for test-time augmentation; the first one shows the images as they are.

    They are the image and the mirror image, each as it is (together ½) and shifted by one pixel along the diagonal, up
    and down (¼ each); only the first of them if the model was trained without `flip`.
    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
    """
    mirrors = (False, True)[: 1 + flip]
    return [
        (weight / len(mirrors), partial(view, shift=shift, mirror=mirror))
        for shift, weight in ((0, 0.5), (-1, 0.25), (1, 0.25))
        for mirror in mirrors
    ]


class ShowView(Callback):
    """Show the model one of the `views` of every image."""

    def __init__(self, view: Callable[[Tensor], Tensor]):
        self.view = view

    def before_batch(self):
        self.learn.xb = (self.view(self.x),)


def tta_preds(interp: Interpretation, flip: bool = True) -> Tensor:
    """Probabilities `(N, classes)` with test-time augmentation: of the weighted mean of the logits for six views."""
    (first, _), *others = views(flip)
    logits = first * log_probabilities(interp.preds)  # they are the logits up to a constant for each image
    for weight, show in others:
        logits += weight * log_probabilities(interp.learn.get_preds(dl=interp.dl, cbs=ShowView(show))[0])
    return logits.softmax(dim=1)


def log_probabilities(preds: Tensor) -> Tensor:
    return preds.clamp_min(torch.finfo(preds.dtype).tiny).log()


def tta_accuracy(interp: Interpretation, flip: bool = True) -> float:
    """Accuracy with test-time augmentation, see `views`."""
    return (tta_preds(interp, flip).argmax(dim=1) == interp.targs).double().mean().item()
