from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from fastai.vision.all import set_seed
from matplotlib import pyplot as plt
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from data import get_dls
from interpret import (
    LAYERS,
    Interpretation,
    grad_cam,
    per_class_accuracy,
    plot_confusion,
    plot_curves,
    plot_grad_cam,
    plot_lr_curve,
    plot_misclassified,
    report,
    two_view_accuracy,
)
from learner import LRCurve, get_learner, suggest_lrs
from model import ResNet
from runs import read_csv


@pytest.fixture(scope="module")
def trained(digits):
    """A small net after one epoch of digits: some images are still wrong."""
    set_seed(0)
    learn = get_learner(digits, width=8, precision="fp32")
    learn.fit_one_cycle(1, 0.1)
    return learn


@pytest.fixture(scope="module")
def interp(trained):
    return Interpretation(trained)


# ---- Grad-CAM


def layers_of(model):
    return [getattr(model, name) for name in LAYERS]


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


def test_grad_cam_points_at_the_object(tmp_path):
    """One coloured object on a textured background: the heat map's maximum lies in the object's box."""
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
    dls = get_dls(tmp_path, bs=16)
    learn = get_learner(dls, width=16)
    learn.fit_one_cycle(8, 0.02)
    interp = Interpretation(learn)
    assert interp.accuracy > 0.9
    images = interp.images(torch.arange(len(dls.valid_ds)))[0]
    heats = dict(zip(LAYERS, grad_cam(learn.model, images, interp.targs, layers_of(learn.model)), strict=True))
    for layer in LAYERS:
        hits = 0
        for heat, file in zip(heats[layer], dls.valid_ds.items):
            row, column = divmod(int(heat.argmax()), 32)
            top, left = boxes[file]
            hits += top <= row < top + 12 and left <= column < left + 12
        assert hits >= 0.9 * len(images), layer


# ---- Interpretation


def test_numbers_agree_with_fastai(interp, trained):
    from fastai.vision.all import ClassificationInterpretation

    theirs = ClassificationInterpretation.from_learner(trained)
    assert np.array_equal(interp.confusion_matrix(), theirs.confusion_matrix())
    assert torch.allclose(interp.losses, theirs.losses)
    assert interp.accuracy == pytest.approx(trained.validate()[1])
    matrix = interp.confusion_matrix()
    assert per_class_accuracy(interp)["3"] == matrix[3, 3] / matrix[3].sum()


def test_misclassified_are_wrong_and_sorted(interp):
    wrong = interp.misclassified()
    assert len(wrong) == (interp.decoded != interp.targs).sum() > 0
    assert (interp.decoded[wrong] != interp.targs[wrong]).all()
    probabilities = interp.preds[wrong, interp.targs[wrong]]
    assert (probabilities.diff() >= 0).all()


def test_report_names_the_most_confused_pair(interp):
    text = report(interp)
    actual, predicted, count = interp.most_confused()[0]
    assert f"| {actual} | {predicted} | {count} |" in text and f"{interp.accuracy:.2%}" in text


# ---- Pictures


def check_figure(panels: int | None = None):
    """Titles and labels are there, no two texts overlap, none is cut off, all image panels are of the same size."""
    figure = plt.gcf()
    figure.canvas.draw()
    not_drawn = {  # labels of ticks beyond the limits
        id(label)
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    texts = [
        t.get_window_extent()
        for t in figure.findobj(matplotlib.text.Text)
        if t.get_visible() and t.get_text().strip() and (t.axes is None or t.axes.axison) and id(t) not in not_drawn
    ]
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height
    for a, b in combinations(texts, 2):
        inner = matplotlib.transforms.Bbox.intersection(a, b)
        assert inner is None or inner.width < 1.5 or inner.height < 1.5
    images = [ax for ax in figure.axes if ax.images and ax.axison]
    sizes = {tuple(np.round(ax.get_window_extent().size)) for ax in images}
    if panels is not None:
        assert len(images) == panels
        assert len(sizes) == 1
    plt.close(figure)


def test_misclassified_picture(interp):
    plot_misclassified(interp)
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.axison]
    first = interp.misclassified()[0]
    assert f"actual {interp.vocab[interp.targs[first]]}" in titles[0] and "predicted" in titles[0] and "%" in titles[0]
    check_figure(min(20, len(interp.misclassified())))


def test_grad_cam_picture(interp):
    plot_grad_cam(interp)
    check_figure(min(10, len(interp.misclassified())) * 8)


def test_pictures_of_a_perfect_net(interp):
    import copy

    perfect = copy.copy(interp)
    perfect.targs = interp.decoded
    for plot in (plot_misclassified, plot_grad_cam):
        plot(perfect)
        assert "No image was misclassified" in plt.gcf()._suptitle.get_text()
        plt.close()


def test_curves_picture():
    plot_curves(ROOT / "results/cifar10-assignment")
    loss, accuracy, rate = plt.gcf().axes
    assert [ax.get_ylabel() for ax in (loss, accuracy, rate)] == [
        "Cross-entropy with smoothed labels", "Accuracy (%)", "Learning rate",
    ]  # fmt: skip
    assert rate.get_xlabel() == "Epoch" and rate.get_xlim()[1] < 27  # epochs, not batches
    check_figure()


def test_confusion_picture(interp):
    plot_confusion(interp)
    check_figure()


def test_lr_curve_picture():
    columns = read_csv(ROOT / "results/cifar10-assignment/lr_find.csv")
    plot_lr_curve(LRCurve(columns["lr"], columns["loss"], *suggest_lrs(columns["lr"], columns["loss"])))
    labels = plt.gca().get_legend_handles_labels()[1]
    assert any(label.startswith("lr_min = ") for label in labels) and any(
        label.startswith("lr_max = ") for label in labels
    )
    check_figure()


def test_two_views(interp):
    """The mean of the two views' probabilities, as by hand; the Learner is left as it was."""
    images = interp.images(torch.arange(len(interp.targs)))[0]
    with torch.no_grad():
        views = [interp.learn.model.eval()(x).softmax(dim=1) for x in (images, images.flip(-1))]
    accuracy = (sum(views).argmax(dim=1) == interp.targs).double().mean().item()
    assert two_view_accuracy(interp) == accuracy != interp.accuracy
    assert not hasattr(interp.learn, "mirror_images")
