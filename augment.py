"""The assignment's training transforms, RandomCrop → FlipLR → Cutout, each on a whole batch at once.

A transform draws its random numbers for all images at once, on the batch's own device and from torch's generator there,
so `torch.manual_seed` makes it repeatable. Validation batches pass untouched (`split_idx = 0`). The orders put the crop
and the flips before fastai's `IntToFloatTensor` (10), where a batch is a quarter of the size, and Cutout after
`Normalize` (99), where the data set's mean is 0. Some recipes have `AlternatingFlip` in the place of `FlipLR`.
"""

from collections.abc import Callable

import torch
from fastai.vision.all import DisplayedTransform, TensorImage
from torch import Tensor
from torchvision.transforms.v2.functional import pad


class BatchTransform(DisplayedTransform):
    """A random transform of training batches, or of the shard of a batch that one of several processes has.

    `shard` is then the size of the whole batch, and the slice of it that is here. All processes draw the same random
    numbers, those for the whole batch, and each uses the ones for its own images.
    """

    split_idx = 0
    shard: tuple[int, slice] | None = None

    def draw(self, x: TensorImage, sample: Callable[[int], Tensor]) -> Tensor:
        """Random numbers for the images of `x`, `(N, …)`; `sample(bs)` draws those for a whole batch, `(bs, …)`."""
        bs, here = self.shard or (len(x), slice(None))
        return sample(bs)[here]


class RandomCrop(BatchTransform):
    """A `size`×`size` window at a random place of the padded image: `(N, C, H, W)` → `(N, C, size, size)`.

    Offsets are uniform from 0 to H + 2·`padding` − `size`. `pad_mode` is torchvision's: "reflect" (no artificial
    border), "constant" (black), "edge" or "symmetric".
    """

    order = 1

    def __init__(self, size: int = 32, padding: int = 4, pad_mode: str = "reflect"):
        self.size, self.padding, self.pad_mode = size, padding, pad_mode

    def encodes(self, x: TensorImage):
        padded = pad(x, self.padding, padding_mode=self.pad_mode)
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)  # a view (N, C, rows, cols, size, size)
        rows, cols = windows.shape[2:4]
        top = self.draw(x, lambda bs: torch.randint(rows, (bs,), device=x.device))
        left = self.draw(x, lambda bs: torch.randint(cols, (bs,), device=x.device))
        return windows[torch.arange(len(x), device=x.device), :, top, left]


class FlipLR(BatchTransform):
    """The mirror image with probability `p`: `(N, C, H, W)` → the same shape."""

    order = 2

    def __init__(self, p: float = 0.5):
        self.p = p

    def encodes(self, x: TensorImage):
        flip = self.draw(x, lambda bs: torch.rand(bs, 1, 1, 1, device=x.device)) < self.p
        return torch.where(flip, x.flip(-1), x)


class AlternatingFlip(BatchTransform):
    """The mirror image of some images in one epoch, of the others in the next: uint8 `(N, C, H, W)` → the same shape.

    In two epochs, each image is seen both ways. Those with an odd sum of pixels, usually half of them, are mirrored in
    even epochs of a fit; so this comes before the crop, which changes the sum. The callback `TellEpoch`, which
    `get_learner` adds, sets `epoch` during a fit; without it, images are mirrored at random.
    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
    """

    order = 0
    epoch: int | None = None

    def encodes(self, x: TensorImage):
        if self.epoch is None:
            odd = self.draw(x, lambda bs: torch.randint(2, (bs, 1, 1, 1), device=x.device))
        else:
            sums = x.as_subclass(Tensor).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
            odd = (sums + self.epoch) % 2
        return torch.where(odd == 1, x.flip(-1), x)


class Cutout(BatchTransform):
    """Fill one `height`×`width` rectangle wholly inside the image with `fill`: `(N, C, H, W)` → the same shape.

    Every position is equally likely. The default `fill` of 0 is the data set's mean once `Normalize` has run.
    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, where the
    square may stick out of the image; the assignment's 8×8 here never does.
    """

    order = 100

    def __init__(self, height: int = 8, width: int = 8, fill: float = 0.0):
        self.height, self.width, self.fill = height, width, fill

    def encodes(self, x: TensorImage):
        (h, w), device = x.shape[-2:], x.device
        top = self.draw(x, lambda bs: torch.randint(h - self.height + 1, (bs, 1), device=device))
        left = self.draw(x, lambda bs: torch.randint(w - self.width + 1, (bs, 1), device=device))
        row, col = torch.arange(h, device=device), torch.arange(w, device=device)
        rows = (row >= top) & (row < top + self.height)
        cols = (col >= left) & (col < left + self.width)
        return x.masked_fill((rows[:, :, None] & cols[:, None, :])[:, None], self.fill)
