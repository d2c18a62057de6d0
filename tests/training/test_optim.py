"""Muon: orthogonal steps for convolutions, plain SGD with Nesterov momentum for the rest."""

from contextlib import nullcontext

import pytest
import torch
from conftest import small
from fastai.vision.all import Callback, CancelFitException, L, MixedPrecision, set_seed
from torch import nn

from cifar10.training.optim import Muon, zeropower_via_newtonschulz
from model import ResNet, split_by_depth


@pytest.mark.parametrize("shape", [(64, 300), (300, 64), (40, 40)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    [result] = zeropower_via_newtonschulz([torch.randn(shape)])
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.max() < 1.3
    assert (values > 0.5).float().mean() > 0.9  # the smallest ones are still on their way


def test_bfloat16_is_precise_enough():
    torch.manual_seed(0)
    matrix = torch.randn(64, 300)
    [exact], [rounded] = (
        zeropower_via_newtonschulz([matrix], dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() / exact.norm() < 0.01


def test_it_keeps_the_directions():
    torch.manual_seed(0)
    matrix = torch.randn(20, 50)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    within = u.T @ zeropower_via_newtonschulz([matrix])[0] @ vh.T
    assert (within - within.diag().diag()).abs().max() < 1e-4 and (within.diag() > 0).all()


def test_other_parameters_are_trained_as_by_sgd():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    options = dict(lr=0.1, momentum=0.9)
    groups = [{"params": [theirs.weight], "weight_decay": 0.01}, {"params": [theirs.bias]}]
    muon = Muon(ours.parameters(), weight_decay=0.01, **options)
    sgd = torch.optim.SGD(groups, nesterov=True, **options)
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


class Scaled(MixedPrecision):
    """fastai's callback for fp16, with the gradient scaler on the CPU and without autocast."""

    def before_fit(self):
        self.autocast, self.scales = nullcontext(), L()
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_scaled_gradients_of_fp16_give_the_same_steps(dls):
    """A power of two changes no bit. A step whose gradients overflow is left out."""

    def train(*cbs) -> list[torch.Tensor]:
        set_seed(0)
        learn = small(dls)
        learn.dls.train.rng.seed(0)
        learn.fit(1, 0.01, cbs=cbs)
        return list(learn.model.parameters())

    def overflow(cb):
        if cb.training:
            cb.learn.loss_grad = cb.loss_grad * float("inf")

    plain, scaled = train(), train(Scaled())
    assert all(map(torch.equal, plain, scaled))
    initial, skipped = train(Callback(before_fit=cancel)), train(Scaled(), Callback(after_loss=overflow))
    assert all(map(torch.equal, initial, skipped)) and not all(map(torch.equal, initial, plain))


def cancel(cb):
    raise CancelFitException


def test_the_weights_of_a_convolution_keep_their_length():
    conv = nn.Conv2d(8, 16, 3)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer = Muon([conv.weight], lr=0.01, use_muon=True, lr_scale=0.2)
    for _ in range(20):
        optimizer.step()
    assert conv.weight.norm().item() == pytest.approx(4, rel=0.01)


def test_single_parameters_have_learning_rates_of_their_own():
    model = ResNet(width=2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(model.parameters(), lr=0.01)
    optimizer.lr_scales = {model.prep[1].bias: 5.0}
    optimizer.step()
    moved = {name: (before[name] - p.detach()).mean().item() for name, p in model.named_parameters() if p.ndim < 4}
    assert moved.pop("prep.1.bias") == pytest.approx(5 * 0.019, rel=1e-4)
    assert list(moved.values()) == pytest.approx([0.019] * len(moved), rel=1e-3)


def test_matrices_of_one_size_are_orthogonalized_like_single_ones():
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((8, 30), (30, 8), (5, 9), (8, 8))]
    for one, together in zip(matrices, zeropower_via_newtonschulz(matrices), strict=True):
        torch.testing.assert_close(zeropower_via_newtonschulz([one])[0], together)
    assert zeropower_via_newtonschulz([]) == []


def test_weight_decay_is_for_weights_that_are_not_rescaled():
    """Whatever the parameter groups are: with a zero gradient, only the FC layer's weights shrink."""
    model = ResNet(width=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Muon(
        split_by_depth(model)[2] + split_by_depth(model)[0] + split_by_depth(model)[1], lr=0.5, weight_decay=0.1
    ).step()
    for name, p in model.named_parameters():
        if p.ndim == 4:  # only rescaled
            torch.testing.assert_close(p / p.norm(), before[name] / before[name].norm())
        else:
            shrunk = 1 - 0.5 * 0.1 * 1.9 if name == "fc.weight" else 1  # 1.9: Nesterov's first step
            torch.testing.assert_close(p, before[name] * shrunk)


def test_the_whole_model_can_be_trained_by_sgd():
    """Without Muon: the same steps as torch's SGD with weight decay on all weights."""
    torch.manual_seed(0)
    ours, theirs = ResNet(width=2), ResNet(width=2)
    theirs.load_state_dict(ours.state_dict())
    weights, free = ([p for p in theirs.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    torch_groups = [{"params": weights, "weight_decay": 0.01}, {"params": free, "weight_decay": 0.0}]
    optimizers = (
        Muon(ours.parameters(), lr=0.1, weight_decay=0.01, use_muon=False),
        torch.optim.SGD(torch_groups, lr=0.1, momentum=0.9, nesterov=True),
    )
    for _ in range(3):
        x = torch.randn(4, 3, 16, 16)
        for model, optimizer in zip((ours, theirs), optimizers):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], msg=name)
