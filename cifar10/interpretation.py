"""What a model has learned: its predictions on the validation images, Grad-CAM, test-time augmentation."""

import numpy as np
import sklearn.metrics as skm
import torch
from fastai.callback.hook import hook_outputs
from fastai.vision.all import Callback, ClassificationInterpretation, Learner
from torch import Tensor, nn
from torch.nn import functional as F

from cifar10.images import printable


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """Where each image has evidence for a class: for each layer a heat map `(N, H, W)` in [0, 1].

    `images` is `(N, 3, H, W)`, normalized; `classes` int64 `(N,)`, the class to explain for each. The heat map is the
    sum of the layer's channels weighted by the mean gradient of the class's logit, without its negative part, resized
    to the images and scaled to [0, 1]; all zero if nothing is positive. One forward and one backward pass serve all
    images and layers; the model's mode and gradients are restored, and hooks are removed whatever happens.
    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks", 2017.
    """
    training = model.training
    model.eval()
    try:
        with hook_outputs(layers, detach=False) as hooks, torch.enable_grad():
            logits = model(images)
            activations = list(hooks.stored)
            # An image's logit depends on no other image, so the gradient of the sum is each image's own.
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


class Interpretation(ClassificationInterpretation):
    """fastai's ClassificationInterpretation, with the predictions kept: one pass over the images serves every plot.

    `preds` are probabilities `(N, classes)`, `targs` the actual and `decoded` the predicted classes, int64 `(N,)`.
    """

    def __init__(self, learn: Learner):
        self.preds, targs, losses = learn.get_preds(dl=learn.dls.valid, with_loss=True)
        self.targs, self.decoded = torch.as_tensor(targs), self.preds.argmax(dim=1)
        super().__init__(learn, learn.dls.valid, losses)
        # For display: to matplotlib, dollar signs begin a formula.
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
        """Images `(n, 3, H, W)`: normalized, as the model takes them, and in [0, 1], to be displayed."""
        self.dl.before_iter()  # sets the transforms to validation
        batch = self.dl.batch(rows)
        return torch.Tensor(self.dl.after_batch(batch)[0]), torch.Tensor(batch[0]).float() / 255

    def caption(self, row: int, kind: str, separator: str = " ") -> str:
        label = self.targs[row] if kind == "actual" else self.decoded[row]
        return separator.join([f"{kind}:", self.vocab[label], f"({self.preds[row, label]:.0%})"])


class HorizontalFlip(Callback):
    """Show the model every image mirrored."""

    def before_batch(self):
        self.learn.xb = (self.x.flip(-1),)


def tta_accuracy(interp: Interpretation) -> float:
    """Accuracy with horizontal-flip test-time augmentation: of the mean probabilities of image and mirror image."""
    mirrored, _ = interp.learn.get_preds(dl=interp.dl, cbs=HorizontalFlip())
    return ((interp.preds + mirrored).argmax(dim=1) == interp.targs).double().mean().item()
