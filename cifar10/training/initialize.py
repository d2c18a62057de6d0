"""How the ResNet is initialized: as a recipe says, or with the layers of a trained model."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.errors import UserError
from cifar10.recipes import Recipe

WHITENING_EPS = 5e-4  # added to each variance, in units of a normalized image; below it there is mostly noise
MIN_VARIANCE = 1e-4  # of an eigenvector that becomes a filter; gray or enlarged images have fainter ones
WHITENED = 256  # images to look at, at least: in a few, a rare color may be missing, which the filters would not see
PIXELS_AT_ONCE = 2**19  # in a channel; there are 27 numbers for each


def initialize(model: Any, recipe: Recipe, batches: Iterable[Tensor]):
    """Initialize the ResNet as the recipe says, see `init_dirac` and `init_whitening`.

    Raises `UserError` for a recipe that starts from trained weights.
    """
    if not recipe.train_norm_stats:
        raise UserError(f"recipe {recipe.name} starts from trained weights; pass weights, the folder of a finished run")
    if recipe.init == "dirac":
        init_dirac(model)
    if recipe.whiten:
        init_whitening(model.prep[0], model.prep[1], batches)


def init_pretrained(trained: Any, trained_by: Recipe, recipe: Recipe, classes: int, norm: str, width: int | None):
    """A ResNet with all layers of a trained one but the last, and the recipe for it: what was fixed stays so.

    Raises `UserError` if it has another normalization than `norm`, or another `width` than one that is given.
    """
    for name, ours in (("norm", norm), ("width", width)):
        if ours and ours != (theirs := trained.args[name]):
            raise UserError(f"the weights are of a model with {name} {theirs}, not {ours}; give --{name} {theirs}")
    model = type(trained)(**trained.args | dict(num_classes=classes))
    body = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    model.load_state_dict(body, strict=False)
    model.prep[0].weight.requires_grad_(not trained_by.whiten)
    recipe = replace(recipe, whiten=trained_by.whiten, train_norm_scales=trained_by.train_norm_scales)
    return model, replace(recipe, width=trained.args["width"], logit_scale=trained.args["logit_scale"])


@torch.no_grad()
def init_dirac(model: nn.Module):
    """The first filters of each convolution but the first pass their input on; the others stay as they are.

    So an image's whitened patches reach the head from the start.
    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
    """
    _, *others = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    for conv in others:
        nn.init.dirac_(conv.weight.data[: conv.in_channels])


@torch.no_grad()
def init_whitening(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.GroupNorm, batches: Iterable[Tensor]):
    """Make a convolution's filters the whitening transform of its patches, and keep them so.

    The first `batches` `(N, C, H, W)` with `WHITENED` images are used, which must be normalized: their mean counts as
    0. The filters are the eigenvectors of the patches' covariance and their negatives, each scaled to unit variance,
    and random mixtures of them if there are more. Batch normalization would bring even the faintest eigenvectors, which
    are noise, up to unit variance, so its scales keep what `WHITENING_EPS` takes from them; those below `MIN_VARIANCE`
    are left out, because the normalizations of all layers together would amplify rounding errors.
    Source: Page, "How to Train Your ResNet 8: Bag of Tricks", 2019.
    """
    k, out = conv.kernel_size[0], conv.out_channels
    products, count, seen = torch.zeros(()), 0, 0
    for batch in batches:
        images = batch.cpu().as_subclass(Tensor)  # some devices have no float64
        for some in images.split(max(1, PIXELS_AT_ONCE // images[0, 0].numel())):
            patches = nn.functional.unfold(some.double(), k).transpose(1, 2).flatten(0, 1)
            products, count = products + patches.T @ patches, count + len(patches)
        seen += len(images)
        if seen >= WHITENED:
            break
    variances, vectors = torch.linalg.eigh(products / count)  # columns, the smallest variance first
    rank = max(1, int((variances > MIN_VARIANCE).sum()))
    variances, vectors = variances.flip(0)[:rank].clamp_min(0), vectors.flip(1).T[:rank]
    filters, kept = vectors / (variances + WHITENING_EPS).sqrt()[:, None], variances / (variances + WHITENING_EPS)
    pairs = min(len(filters), out // 2)
    mixtures = nn.functional.normalize(torch.randn(out - 2 * pairs, len(filters)).double())
    weight = torch.cat([filters[:pairs], -filters[:pairs], mixtures @ filters])
    conv.weight.copy_(weight.view_as(conv.weight))
    conv.weight.requires_grad_(False)
    if conv.bias is not None:
        conv.bias.zero_()  # the normalization cancels it
    norm.weight.copy_(torch.cat([kept[:pairs], kept[:pairs], mixtures.square() @ kept]).sqrt())
