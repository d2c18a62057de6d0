"""Small images side by side, for the convolutions of a CPU with AMX.

AMX multiplies 16 rows of a matrix at a time, which are pixels of one row of an image. Where such a row has only four or
eight pixels, most of that would be wasted.
"""

import math

from fastai.callback.core import Callback
from torch import Tensor, nn
from torch.nn import functional as F

WIDEST = 8  # pixels, of an image that is small
FEWEST, MOST = 4, 32  # images in a strip


class StripConv2d(nn.Conv2d):
    """A 3×3 convolution with stride 1 and padding 1: `(N, C, H, W)` → `(N, C', H, W)`, in memory channels last.

    Small images are laid side by side, with a column of zeros between them, which is the padding of both neighbors.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        images = math.gcd(n, MOST)  # in a strip
        if w > WIDEST or images < FEWEST:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1).reshape(-1, images, h, w, c), (0, 0, 0, 1))
        strips = padded.transpose(1, 2).reshape(-1, h, images * (w + 1), c)
        y = super().forward(strips.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y.reshape(-1, h, images, w + 1, y.shape[-1])[:, :, :, :w].transpose(1, 2)
        return y.reshape(n, h, w, -1).permute(0, 3, 1, 2)


def can_use_strips(conv: nn.Module) -> bool:
    """Whether a module is a convolution that `StripConv2d` computes."""
    usual = dict(kernel_size=(3, 3), padding=(1, 1), stride=(1, 1), dilation=(1, 1), groups=1, padding_mode="zeros")
    return type(conv) is nn.Conv2d and usual.items() <= vars(conv).items()


class Strips(Callback):
    """Train with small images in strips. All numbers are the same, up to the order of sums."""

    def before_fit(self):
        for module in filter(can_use_strips, self.model.modules()):
            # Not a new module, which would be without the hooks that callbacks have registered.
            module.__class__ = StripConv2d

    def after_fit(self):
        for module in self.model.modules():
            if type(module) is StripConv2d:
                module.__class__ = nn.Conv2d
