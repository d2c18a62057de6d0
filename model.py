"""The assignment's ResNet for 32×32 images, written by hand.

With the defaults it has 6,574,090 parameters:

    prep    Conv 3×3 → BN → ReLU                                          64 × 32 × 32
    layer1  X = Conv 3×3 → MaxPool → BN → ReLU,  Add(X, ResBlock(X))     128 × 16 × 16
    layer2  Conv 3×3 → MaxPool → BN → ReLU                               256 ×  8 ×  8
    layer3  X = Conv 3×3 → MaxPool → BN → ReLU,  Add(X, ResBlock(X))     512 ×  4 ×  4
    head    MaxPool 4 → FC (the softmax belongs to the loss function)     10
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = {"batch": nn.BatchNorm2d, "layer": lambda channels: nn.GroupNorm(1, channels)}


def conv3x3(ni: int, nf: int, bias: bool = True) -> nn.Conv2d:
    """3×3 convolution, stride 1, padding 1: `(N, ni, H, W)` → `(N, nf, H, W)`."""
    return nn.Conv2d(ni, nf, kernel_size=3, padding=1, bias=bias)


class ResBlock(nn.Module):
    """x + R(x) with R = Conv-BN-ReLU-Conv-BN-ReLU: `(N, C, H, W)` → the same shape."""

    def __init__(self, channels: int, norm_layer):
        super().__init__()
        # Without bias: the normalization that follows cancels it.
        self.conv1, self.norm1 = conv3x3(channels, channels, bias=False), norm_layer(channels)
        self.conv2, self.norm2 = conv3x3(channels, channels, bias=False), norm_layer(channels)

    def forward(self, x: Tensor) -> Tensor:
        r = F.relu(self.norm1(self.conv1(x)))
        r = F.relu(self.norm2(self.conv2(r)))
        return x + r


class ResNet(nn.Module):
    """Images `(N, 3, H, W)`, normalized, H and W multiples of 8 from 16 up → logits `(N, num_classes)`.

    `norm` is "batch" for batch normalization, or "layer" for layer normalization over channels and positions, that is
    `GroupNorm` with one group. `width` is the number of channels after `prep`; after layer1, layer2 and layer3 there
    are 2, 4 and 8 times as many. The logits are multiplied by `logit_scale`. `ResNet(**model.args)` builds the same
    model again. Raises `ValueError` for another `norm`, and if `num_classes` or `width` is below 1.
    """

    def __init__(self, num_classes: int = 10, norm: str = "batch", width: int = 64, logit_scale: float = 1 / 8):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(NORMS)}")
        if num_classes < 1 or width < 1:
            raise ValueError(f"num_classes ({num_classes}) and width ({width}) must be at least 1")
        self.args = dict(num_classes=num_classes, norm=norm, width=width, logit_scale=logit_scale)
        self.logit_scale = logit_scale
        w, norm_layer = width, NORMS[norm]
        self.prep = nn.Sequential(conv3x3(3, w), norm_layer(w), nn.ReLU())
        self.layer1 = nn.Sequential(*self.downsample(w, 2 * w, norm_layer), ResBlock(2 * w, norm_layer))
        self.layer2 = nn.Sequential(*self.downsample(2 * w, 4 * w, norm_layer))
        self.layer3 = nn.Sequential(*self.downsample(4 * w, 8 * w, norm_layer), ResBlock(8 * w, norm_layer))
        self.pool = nn.AdaptiveMaxPool2d(1)  # on 32×32 images: MaxPool with kernel 4
        self.fc = nn.Linear(8 * w, num_classes)

    @staticmethod
    def downsample(ni: int, nf: int, norm_layer) -> list[nn.Module]:
        """Conv → MaxPool → norm → ReLU: `(N, ni, H, W)` → `(N, nf, H/2, W/2)`."""
        return [conv3x3(ni, nf), nn.MaxPool2d(2), norm_layer(nf), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.prep(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = torch.flatten(self.pool(x), start_dim=1)
        return self.fc(x) * self.logit_scale


def split_by_depth(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameter groups for fastai's `freeze` and discriminative learning rates: prep, layers, head and all the rest."""
    group_of = {"prep": 0, "layer1": 1, "layer2": 1, "layer3": 1}
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, p in model.named_parameters():
        child = name.split(".")[0]
        groups[group_of.get(child, 2)].append(p)
    return [group for group in groups if group]
