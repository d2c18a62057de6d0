"""Muon: orthogonal steps for convolutions, plain SGD with Nesterov momentum for the rest."""

import pytest
import torch
from torch import nn

from muon import CONV_LR, Muon, orthogonalised


@pytest.mark.parametrize("shape", [(64, 300), (300, 64), (40, 40)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    result = orthogonalised(torch.randn(shape))
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.max() < 1.3
    assert (values > 0.5).float().mean() > 0.9  # the smallest ones are still on their way


def test_bfloat16_is_precise_enough():
    torch.manual_seed(0)
    matrix = torch.randn(64, 300)
    exact, rounded = orthogonalised(matrix), orthogonalised(matrix, torch.bfloat16)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() / exact.norm() < 0.01


def test_it_keeps_the_directions():
    torch.manual_seed(0)
    matrix = torch.randn(20, 50)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    within = u.T @ orthogonalised(matrix) @ vh.T
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
    Muon([conv.weight], lr=0.5).step()
    values = torch.linalg.svdvals((conv.weight.detach() - before).flatten(1)) / (0.5 * CONV_LR)
    assert 0.5 < values.median() < 1.3


def test_the_weights_of_a_convolution_keep_their_length():
    conv = nn.Conv2d(8, 16, 3)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer = Muon([conv.weight], lr=0.01)
    for _ in range(20):
        optimizer.step()
    assert conv.weight.norm().item() == pytest.approx(4, rel=0.01)
