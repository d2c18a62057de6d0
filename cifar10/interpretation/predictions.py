"""The predictions of a model, and test-time augmentation."""

from contextlib import contextmanager

import numpy as np
import sklearn.metrics as skm
import torch
from fastai.vision.all import ClassificationInterpretation, Learner, replacing_yield
from torch import Tensor, nn
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

    def hardest(self, count: int) -> Tensor:
        """Rows of `count` images: the misclassified ones, then the correct ones with the least certain prediction.

        The misclassified images start with the lowest probability of the actual class.
        """
        correct, probability = self.decoded == self.targs, self.preds[range(len(self.targs)), self.targs]
        return torch.from_numpy(np.lexsort((probability, correct)))[:count]

    def misclassified(self) -> Tensor:
        """Rows of the misclassified images, worst first: lowest probability of the actual class."""
        return self.hardest(int((self.decoded != self.targs).sum()))

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


class TTA(nn.Module):
    """A model with test-time augmentation: images `(N, 3, H, W)` → the weighted mean of the logits for several views.

    It sees each image unshifted (weight ½), and shifted by one pixel up and left (¼) and down and right (¼), reflected
    at the border. Each weight is split between the image and its mirror image, or not if it was trained without `flip`.
    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
    """

    def __init__(self, model: nn.Module, flip: bool = True):
        super().__init__()
        self.model, self.flip = model, flip

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(images.as_subclass(Tensor), (1, 1, 1, 1), "reflect")
        logits = torch.zeros((), device=images.device)
        for weight, start in ((0.5, 1), (0.25, 2), (0.25, 0)):
            view = padded[:, :, start : start + height, start : start + width]
            views = [view, view.flip(-1)] if self.flip else [view]
            for shown in views:
                logits = logits + weight / len(views) * self.model(shown).float()
        return logits


def tta_preds(interp: Interpretation, flip: bool = True) -> Tensor:
    """Probabilities `(N, classes)` with test-time augmentation."""
    with contextmanager(replacing_yield)(interp.learn, "model", TTA(interp.learn.model, flip)):
        return interp.learn.get_preds(dl=interp.dl)[0]


def tta_accuracy(interp: Interpretation, flip: bool = True) -> float:
    """Accuracy with test-time augmentation, see `TTA`."""
    return (tta_preds(interp, flip).argmax(dim=1) == interp.targs).double().mean().item()
