"""Convolutions of small images side by side: the same numbers, only while training, and only where they are faster."""

import pytest
import torch
from torch import nn

from cifar10.training.learner import precision_callbacks
from cifar10.training.strips import StripConv2d, Strips, can_use_strips
from train import get_dls, get_learner


@pytest.mark.parametrize("shape", [(64, 3, 8, 8), (12, 5, 4, 4), (12, 5, 6, 3), (7, 5, 4, 4), (4, 3, 16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_that_of_a_convolution(shape, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], 6, 3, padding=1, bias=bias).double()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    found = []
    for kind in (nn.Conv2d, StripConv2d):
        conv.__class__ = kind
        y = conv(x)
        found.append([y, *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), [x, *conv.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_small_images_are_computed_in_strips(monkeypatch):
    seen, conv = [], StripConv2d(3, 3, 3, padding=1)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: seen.append(tuple(x.shape)) or x)
    for shape in ((512, 3, 4, 4), (40, 3, 8, 8), (512, 3, 16, 16), (2, 3, 4, 4)):
        conv(torch.zeros(shape))
    assert seen == [(16, 3, 4, 160), (5, 3, 8, 72), (512, 3, 16, 16), (2, 3, 4, 4)]


OTHERS = dict(kernel_size=1, padding=0, stride=2, dilation=2, groups=2, padding_mode="reflect")


@pytest.mark.parametrize("other", [{name: value} for name, value in OTHERS.items()], ids=list(OTHERS))
def test_other_convolutions_stay_as_they_are(other):
    usual = dict(kernel_size=3, padding=1)
    assert can_use_strips(nn.Conv2d(4, 4, **usual)) and not can_use_strips(nn.Conv2d(4, 4, **(usual | other)))


def test_a_training_is_the_same_and_leaves_the_model_as_it_was(digits):
    losses = []
    for strips in ([], [Strips()]):
        torch.manual_seed(0)
        dls = get_dls("digits", batch_size=64, device="cpu")
        dls.train.rng.seed(0)
        learn = get_learner(dls, width=4, precision="fp32", cbs=strips)
        learn.fit(1, 0.01)
        losses.append(torch.stack(learn.recorder.step_losses))
        assert {type(m) for m in learn.model.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)


def test_they_are_for_bf16_on_a_cpu_with_amx(monkeypatch):
    for amx, precision, expected in ((True, "bf16", 1), (False, "bf16", 0), (True, "fp32", 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_tile": amx})
        callbacks = precision_callbacks(precision, torch.device("cpu"))
        assert sum(isinstance(callback, Strips) for callback in callbacks) == expected
