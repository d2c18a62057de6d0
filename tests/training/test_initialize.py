"""Whitening filters whiten, dirac convolutions hand their input on."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cifar10.recipes import ASSIGNMENT
from cifar10.training.initialize import WHITENING_EPS, init_dirac, init_whitening
from model import ResNet
from train import get_learner


def correlated(count: int = 64) -> torch.Tensor:
    """Smooth images, whose neighboring pixels and channels are alike, with little noise."""
    torch.manual_seed(0)
    smooth = F.avg_pool2d(torch.randn(count, 1, 36, 36), 5, stride=1) * 5
    return smooth + 0.2 * torch.randn(count, 3, 32, 32)


def test_whitened_patches_have_unit_variance_and_no_correlation():
    images, conv, norm = correlated(), nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
    init_whitening(conv, norm, [images])
    norm.requires_grad_(False)
    filters = conv.weight[:27].detach().double().flatten(1)
    patches = F.unfold(images.double(), 3).transpose(1, 2).flatten(0, 1)
    covariance = (patches @ filters.T).T @ (patches @ filters.T) / len(patches)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    # What the smallest variances lose to the added one is in the scales of the normalization.
    torch.testing.assert_close(covariance.diag().sqrt().float(), norm.weight[:27].detach(), atol=1e-3, rtol=1e-2)
    assert norm.weight[0] == pytest.approx(1, abs=1e-3)
    assert torch.equal(conv.weight[27:54], -conv.weight[:27]) and conv.weight[54:].flatten(1).norm(dim=1).min() > 0
    assert not conv.weight.requires_grad and conv.bias.abs().max() == 0


def test_directions_without_variance_become_no_filters():
    """Of gray images, two of three channels say nothing; dirac convolutions would amplify their rounding errors."""
    gray = correlated()[:, :1].expand(-1, 3, -1, -1)
    conv, norm = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)
    init_whitening(conv, norm, [gray])
    assert torch.equal(conv.weight[9:18], -conv.weight[:9])
    assert (norm.weight > 0.9).all() and (conv(gray).std((0, 2, 3)) > 0.9).all()
    assert conv.weight[0].norm() <= WHITENING_EPS**-0.5


def test_filters_see_a_color_that_few_batches_have():
    """Small batches, of which only one has any color."""
    gray = correlated(96)[:, :1].repeat(1, 3, 1, 1)
    gray[90, 0] += 1
    conv, norm = nn.Conv2d(3, 54, 3), nn.BatchNorm2d(54)
    init_whitening(conv, norm, gray.split(4))
    assert (conv.weight[:, 0] - conv.weight[:, 1]).abs().max() > 0.1


def test_images_of_a_single_color_give_finite_filters():
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    init_whitening(conv, norm, [torch.zeros(4, 3, 16, 16)])
    assert conv.weight.isfinite().all() and norm.weight.isfinite().all()


def test_fewer_filters_than_patches_have_values():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    init_whitening(conv, norm, [correlated(8)])
    assert torch.equal(conv.weight[2:], -conv.weight[:2])


def test_dirac_hands_the_input_on():
    model = ResNet(width=4)
    prep, wide = model.prep[0].weight.clone(), model.layer2[0].weight.clone()
    init_dirac(model)
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(model.layer1[4].conv1(x), x)  # as wide as its input
    torch.testing.assert_close(F.conv2d(x, model.layer2[0].weight, padding=1)[:, :8], x)
    assert torch.equal(model.layer2[0].weight[8:], wide[8:]) and torch.equal(model.prep[0].weight, prep)


def test_the_recipe_decides(dls):
    def first_filters(**changes):
        torch.manual_seed(0)
        model = get_learner(dls, replace(ASSIGNMENT, **changes), width=4).model
        return model.prep[0].weight, model.layer2[0].weight[0]

    (white, dirac), (plain, default) = first_filters(), first_filters(whiten=False, init="default")
    assert not white.requires_grad and plain.requires_grad
    assert dirac.count_nonzero() == 1 and default.count_nonzero() == default.numel()
