"""What a recipe adds to fastai's training loop: one small callback for each trick."""

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.torch_core import get_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import resize

from cifar10.recipes import REFERENCE_SIDE, Recipe


class GradientValueClip(Callback):
    """Clip each value of the gradient to [−`limit`, `limit`], as the assignment's notebook does."""

    order = MixedPrecision.order + 1  # after fp16 gradients are unscaled

    def __init__(self, limit: float):
        self.limit = limit

    def before_step(self):
        nn.utils.clip_grad_value_(self.model.parameters(), self.limit)


class L1Penalty(Callback):
    """Train on the loss plus `factor` × the sum of all parameters' absolute values; the recorded loss is without it."""

    run_valid = False

    def __init__(self, factor: float):
        self.factor = factor

    def after_loss(self):
        self.learn.loss_grad = self.loss_grad + self.factor * sum(p.abs().sum() for p in self.model.parameters())


class TellEpoch(Callback):
    """Set the `epoch` of the training transforms that have one, like `AlternatingFlip`, until the end of the fit."""

    def before_train(self):
        self.tell(self.epoch)

    def after_fit(self):
        self.tell(None)

    def tell(self, epoch: int | None):
        pipeline = getattr(self.dls.train, "after_batch", None)  # which PyTorch's DataLoader, for one, does not have
        for tfm in getattr(pipeline, "fs", ()):
            if hasattr(tfm, "epoch"):
                tfm.epoch = epoch


class ProgressiveResize(Callback):
    """Train on images of the recipe's sizes, one after the other; validate on full-size images.

    Source: Howard, "Training Imagenet in 3 hours for $25; and CIFAR10 for $0.26", 2018.
    """

    run_valid = False

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def before_batch(self):
        side = self.recipe.side(self.pct_train) * self.x.shape[-1] // REFERENCE_SIDE
        if side < self.x.shape[-1]:
            self.learn.xb = (resize(self.x, [side, side], antialias=True),)


class FreezeLayers(Callback):
    """Freeze the recipe's `freeze` layers, each from its part of the training run on, until the end of the fit.

    Early layers settle first, and a backward pass that ends behind them is shorter.
    Source: Brock et al., "FreezeOut: Accelerate Training by Progressively Freezing Layers", 2017.
    """

    run_valid = False

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.frozen: list[nn.Parameter] = []

    def before_batch(self):
        for layer, begin in self.recipe.freeze:
            if self.pct_train >= begin:
                for p in getattr(get_model(self.model), layer).parameters():
                    if p.requires_grad:
                        self.frozen.append(p.requires_grad_(False))
                        p.grad = None

    def after_fit(self):
        for p in self.frozen:
            p.requires_grad_(True)
        self.frozen = []


class FreezeNormStats(Callback):
    """Train with the running statistics of batch normalization, and keep them, as for validation.

    A pretrained model's features stay what they are at first, however few and different the images of a batch are.
    """

    run_valid = False

    def before_train(self):
        for module in self.model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                module.eval()


class CountFlop(Callback):
    """Sum up the floating-point operations of the model's forward and backward passes in `learn.recorder.flop`.

    PyTorch counts those of an image whenever the images' size or the trained parameters change; what is not computed
    for a frozen layer is not counted. Of a model without `args` to build it again, nothing is counted.
    """

    order, run_valid = 90, False  # after the images have been resized

    def before_fit(self):
        self.per_image, self.weights = {}, list(self.model.parameters())

    def before_batch(self):
        key = (*self.x.shape[1:], *(p.requires_grad for p in self.weights))
        if key not in self.per_image:
            self.per_image[key] = count_flop(get_model(self.model), self.x.shape[1:])
        if hasattr(self.learn, "recorder"):
            images = getattr(self.dl, "whole", len(self.x))  # in all processes together
            self.recorder.flop += images * self.per_image[key]


def count_flop(model: nn.Module, shape) -> int:
    """Operations of a forward and a backward pass for an image: two for each multiply-add of convolutions and products.

    They are counted on a copy without numbers, so that no hook, buffer or random number of the model changes.
    """
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.enable_grad():
            copy = type(model)(**model.args)  # type: ignore
            for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
                ours.requires_grad_(theirs.requires_grad)
            copy(torch.empty(2, *shape)).sum().backward()
    except Exception:  # a model of the user's, which can't be built again from `args`
        return 0
    return counter.get_total_flops() // 2
