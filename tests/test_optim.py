"""Muon: orthogonal steps for convolutions, plain SGD with Nesterov momentum for the rest."""

from dataclasses import replace

import pytest
import torch
from conftest import small
from torch import nn

from cifar10.optim import Muon, param_groups_weight_decay, zeropower_via_newtonschulz
from cifar10.recipes import ASSIGNMENT
from model import ResNet


@pytest.mark.parametrize("shape", [(64, 300), (300, 64), (40, 40)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    result = zeropower_via_newtonschulz(torch.randn(shape))
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.max() < 1.3
    assert (values > 0.5).float().mean() > 0.9  # the smallest ones are still on their way


def test_bfloat16_is_precise_enough():
    torch.manual_seed(0)
    matrix = torch.randn(64, 300)
    exact, rounded = zeropower_via_newtonschulz(matrix), zeropower_via_newtonschulz(matrix, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() / exact.norm() < 0.01


def test_it_keeps_the_directions():
    torch.manual_seed(0)
    matrix = torch.randn(20, 50)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    within = u.T @ zeropower_via_newtonschulz(matrix) @ vh.T
    assert (within - within.diag().diag()).abs().max() < 1e-4 and (within.diag() > 0).all()


def test_other_parameters_are_trained_as_by_sgd():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    muon, sgd = Muon(ours.parameters(), **options), torch.optim.SGD(theirs.parameters(), nesterov=True, **options)
    for _ in range(5):
        x = torch.randn(8, 4)
        for model, optimizer in ((ours, muon), (theirs, sgd)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolutions_step_has_a_length_of_its_own(memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3).to(memory_format=memory_format)
    before = conv.weight.detach() * (4 / conv.weight.norm())
    conv.weight.grad = 1e-6 * torch.randn_like(conv.weight)
    Muon([conv.weight], lr=0.5, use_muon=True, lr_scale=0.2).step()
    values = torch.linalg.svdvals((conv.weight.detach() - before).flatten(1)) / (0.5 * 0.2)
    assert 0.5 < values.median() < 1.3


def test_the_weights_of_a_convolution_keep_their_length():
    conv = nn.Conv2d(8, 16, 3)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer = Muon([conv.weight], lr=0.01, use_muon=True, lr_scale=0.2)
    for _ in range(20):
        optimizer.step()
    assert conv.weight.norm().item() == pytest.approx(4, rel=0.01)


def test_the_groups_say_what_they_are(dls):
    learn = small(dls)
    learn.create_opt()
    conv, weights, free = learn.opt.opt.param_groups
    assert [(g["use_muon"], g["lr_scale"], g["weight_decay"]) for g in (conv, weights, free)] == [
        (True, ASSIGNMENT.muon_lr_scale, 0.0), (False, 1.0, ASSIGNMENT.weight_decay), (False, 1.0, 0.0),
    ]  # fmt: skip
    assert [{p.ndim for p in group["params"]} for group in (conv, weights, free)] == [{4}, {2}, {1}]
    assert sum(len(g["params"]) for g in (conv, weights, free)) == len(list(learn.model.parameters()))
    assert isinstance(learn.opt.opt, Muon) and {g["momentum"] for g in (conv, weights, free)} == {0.9}


def test_the_whole_model_can_be_trained_by_sgd():
    """By the recipe's `optimizer`: the same steps as torch's SGD with weight decay on all weights."""
    torch.manual_seed(0)
    ours, theirs = ResNet(width=2), ResNet(width=2)
    theirs.load_state_dict(ours.state_dict())
    groups = param_groups_weight_decay(ours, replace(ASSIGNMENT, optimizer="sgd", weight_decay=0.01))
    weights, free = ([p for p in theirs.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    torch_groups = [{"params": weights, "weight_decay": 0.01}, {"params": free, "weight_decay": 0.0}]
    optimizers = Muon(groups, lr=0.1), torch.optim.SGD(torch_groups, lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        x = torch.randn(4, 3, 16, 16)
        for model, optimizer in zip((ours, theirs), optimizers):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], msg=name)
