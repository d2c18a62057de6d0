"""Candidates for a recipe that are more than a change to one of its fields: callbacks, which ablation.py tries."""

import torch
from fastai.vision.all import Callback, TensorImage
from torch import Tensor

from augment import BatchTransform, FlipLR
from cifar10.recipes import RECIPES, Recipe


class AlternatingFlip(Callback):
    """Mirror each image in every second epoch, and half of the images in the first one, instead of at random.

    Which half it is depends on an image's pixels, so that nothing else has to know which image it is.
    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
    """

    class Flip(BatchTransform):
        order = 0  # before the crop, which changes the sum of the pixels
        epoch = 0

        def encodes(self, x: TensorImage):
            sums = x.as_subclass(Tensor).long().sum(dim=(1, 2, 3), keepdim=True)
            return torch.where((sums + self.epoch) % 2 == 1, x.flip(-1), x)

    def __init__(self, recipe: Recipe):
        self.flip = self.Flip()

    def before_fit(self):
        others = [tfm for tfm in self.dls.train.after_batch.fs if not isinstance(tfm, FlipLR)]
        self.dls.train.after_batch.fs = [self.flip, *others]  # type: ignore

    def before_epoch(self):
        self.flip.epoch = self.epoch


class Windows(Callback):
    """Train on windows at random places of the images, as large as the recipe's resized images before it was changed.

    The changed recipe must not resize images, too.
    """

    run_valid = False

    def __init__(self, recipe: Recipe):
        self.recipe = RECIPES[recipe.name]

    def before_batch(self):
        side = self.recipe.side(self.pct_train)
        if side < self.x.shape[-1]:
            windows = self.x.unfold(2, side, 1).unfold(3, side, 1)
            n, _, rows, cols = windows.shape[:4]
            top, left = torch.randint(rows, (n,)), torch.randint(cols, (n,))
            self.learn.xb = (windows[torch.arange(n), :, top, left].contiguous(memory_format=torch.channels_last),)


class Jitter(Callback):
    """Change brightness and contrast by up to a tenth in the last 30% of the training run."""

    order, run_valid = 80, False

    def __init__(self, recipe: Recipe):
        self.strength = 0.1

    def before_batch(self):
        if self.pct_train >= 0.7:
            contrast, brightness = (2 * torch.rand(2, len(self.x), 1, 1, 1) - 1) * self.strength
            means = self.x.mean(dim=(1, 2, 3), keepdim=True)
            self.learn.xb = ((self.x - means) * (1 + contrast) + means + 4 * brightness,)  # a std is about ¼


class Patches(Callback):
    """Replace a 3×3 patch of each image by that of another one, in a quarter of the batches of the last third."""

    order, run_valid = 80, False

    def __init__(self, recipe: Recipe):
        self.side = 3

    def before_batch(self):
        if self.pct_train >= 2 / 3 and torch.rand(()) < 0.25:
            height, width = self.x.shape[-2:]
            top, left = torch.randint(height - self.side + 1, ()), torch.randint(width - self.side + 1, ())
            rows, cols = slice(top, top + self.side), slice(left, left + self.side)
            x = self.x.clone()
            x[..., rows, cols] = x[torch.randperm(len(x))][..., rows, cols]
            self.learn.xb = (x,)


class Grow(Callback):
    """Leave the two residual blocks out in the first 15% of the training run, and their operations uncounted."""

    order, run_valid = 95, False  # after CountFlop

    def __init__(self, recipe: Recipe):
        self.begin = 0.15

    def before_fit(self):
        self.blocks = {2: self.model.layer1[-1], 8: self.model.layer3[-1]}  # by the factor that sides are smaller
        for block in self.blocks.values():
            block.forward = lambda x: x

    def before_batch(self):
        if self.pct_train >= self.begin:
            for block in self.blocks.values():
                vars(block).pop("forward", None)
            return
        for factor, block in self.blocks.items():
            for conv in (block.conv1, block.conv2):
                positions = len(self.x) * (self.x.shape[-1] // factor) ** 2
                self.learn.recorder.flop -= 3 * 2 * positions * conv.weight.numel()  # forward, and backward twice
