"""Predictions agree with fastai's, Grad-CAM with the reference implementation."""

import numpy as np
import pytest
import torch
from fastai.vision.all import ClassificationInterpretation, set_seed
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch.nn import functional as F

from cifar10.interpretation.gradcam import GRADCAM_LAYERS, grad_cam
from cifar10.interpretation.predictions import Interpretation, tta_accuracy, tta_preds
from model import ResNet
from train import get_dls, get_learner


def layers_of(model):
    return [getattr(model, name) for name in GRADCAM_LAYERS]


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_grad_cam_equals_the_grad_cam_package(weights, trained, interp):
    torch.manual_seed(0)
    model = ResNet(width=8) if weights == "random" else trained.model
    images = interp.images(torch.arange(12))[0].clone()
    classes = torch.arange(12) % 10
    ours = grad_cam(model, images, classes, layers_of(model))
    model.eval()
    for layer, heat in zip(layers_of(model), ours, strict=True):
        assert heat.shape == (12, 32, 32) and heat.min() >= 0 and heat.max() == 1
        with GradCAM(model, [layer]) as package:
            theirs = package(images, [ClassifierOutputTarget(int(c)) for c in classes])
        assert np.abs(heat.numpy() - theirs).max() < 1e-4


def hooks_in(model) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_grad_cam_leaves_no_trace():
    model = ResNet(width=4).train()
    running = model.prep[1].running_mean.clone()
    grad_cam(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), layers_of(model))
    assert hooks_in(model) == 0 and model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.prep[1].running_mean, running)
    with pytest.raises(RuntimeError):  # the class doesn't exist
        grad_cam(model, torch.randn(1, 3, 32, 32), torch.tensor([99]), layers_of(model))
    with pytest.raises(RuntimeError):  # two channels
        grad_cam(model, torch.randn(1, 2, 32, 32), torch.tensor([0]), layers_of(model))
    assert hooks_in(model) == 0 and model.training


def test_grad_cam_takes_one_forward_and_one_backward_pass_for_a_batch():
    model = ResNet(width=4)
    passes = []
    model.prep[0].register_forward_hook(lambda *_: passes.append("forward"))
    model.layer2[0].register_full_backward_hook(lambda *_: passes.append("backward"))
    grad_cam(model, torch.randn(6, 3, 32, 32), torch.arange(6), layers_of(model))
    assert passes == ["forward", "backward"]


def test_grad_cam_where_nothing_speaks_for_the_class():
    model = ResNet(width=4)
    torch.nn.init.zeros_(model.fc.weight)
    for heat in grad_cam(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), layers_of(model)):
        assert (heat == 0).all()


@pytest.mark.slow
def test_grad_cam_points_at_the_object(tmp_path):
    """One colored object on a textured background: the heat map's maximum lies in the object's box."""
    rng = np.random.default_rng(0)
    boxes = {}
    for split, count in (("train", 64), ("test", 16)):
        for number, label in enumerate(("red", "green", "blue")):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, 160, (32, 32, 1)).repeat(3, axis=2)
                top, left = rng.integers(0, 21, 2)
                pixels[top : top + 12, left : left + 12, number] += 90
                file = tmp_path / split / label / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(file)
                boxes[file] = (top, left)
    set_seed(0)
    dls = get_dls(tmp_path, batch_size=16)
    learn = get_learner(dls, width=16, precision="fp32")
    learn.fit_one_cycle(8, 0.02)
    interp = Interpretation(learn)
    assert interp.accuracy > 0.9  # 1.0 with each of 12 seeds
    images = interp.images(torch.arange(len(dls.valid_ds)))[0]
    heats = dict(zip(GRADCAM_LAYERS, grad_cam(learn.model, images, interp.targs, layers_of(learn.model)), strict=True))
    for layer in GRADCAM_LAYERS:
        hits = 0
        for heat, file in zip(heats[layer], dls.valid_ds.items):
            row, column = divmod(int(heat.argmax()), 32)
            top, left = boxes[file]
            hits += top <= row < top + 12 and left <= column < left + 12
        assert hits >= 24, layer  # of 48; with 12 seeds 37 to 48, and 7 if the maximum were anywhere


def test_numbers_agree_with_fastai(interp, trained):
    theirs = ClassificationInterpretation.from_learner(trained)
    assert np.array_equal(interp.confusion_matrix(), theirs.confusion_matrix())
    assert torch.allclose(interp.losses, theirs.losses)
    assert interp.accuracy == pytest.approx(trained.validate()[1])


def test_misclassified_are_wrong_and_sorted(interp):
    wrong = interp.misclassified()
    assert len(wrong) == (interp.decoded != interp.targs).sum() > 0
    assert (interp.decoded[wrong] != interp.targs[wrong]).all()
    probabilities = interp.preds[wrong, interp.targs[wrong]]
    assert (probabilities.diff() >= 0).all()


@pytest.mark.parametrize("flip", [True, False])
def test_tta(interp, flip):
    """The weighted mean of the views' logits, as by hand; the Learner is left as it was."""
    images = interp.images(torch.arange(len(interp.targs)))[0]
    wide = F.pad(images, (1, 1, 1, 1), "reflect")
    views = {0.5: [images], 0.25: [wide[:, :, :-2, :-2], wide[:, :, 2:, 2:]]}
    with torch.no_grad():
        model = interp.learn.model.eval()
        logits = sum(
            weight * (model(x) + flip * model(x.flip(-1))) for weight, shifted in views.items() for x in shifted
        ) / (1 + flip)
    torch.testing.assert_close(tta_preds(interp, flip), logits.softmax(dim=1), atol=1e-5, rtol=1e-4)
    accuracy = (logits.argmax(dim=1) == interp.targs).double().mean().item()
    assert tta_accuracy(interp, flip) == pytest.approx(accuracy, abs=1.5 / len(images))  # one may be a tie
    assert interp.learn.model is model and not model.training
