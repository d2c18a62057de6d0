"""Plots have titles and labels, nothing overlaps, and nothing is cut off."""

import copy
import re
import warnings
from itertools import combinations
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import font_manager
from matplotlib import pyplot as plt

from cifar10.files import read_csv
from cifar10.interpretation.classifier import ImageClassifier
from cifar10.interpretation.fonts import display_names, fonts_for, letters_in, shorten_middle, width, wrap
from cifar10.interpretation.metrics import BINS
from cifar10.interpretation.plots import (
    N_GRADCAM,
    plot_calibration,
    plot_confusion,
    plot_curves,
    plot_grad_cam,
    plot_image_grad_cam,
    plot_misclassified,
)
from cifar10.interpretation.predictions import Interpretation
from cifar10.recipes import ASSIGNMENT
from cifar10.training.lr_finder import LRCurve, plot_lr_curve, suggest_lrs
from model import ResNet


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


def test_misclassified_plot(interp):
    plot_misclassified(interp)
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.axison]
    first = interp.misclassified()[0]
    assert re.match(rf"predicted \d+%: .\nactual \d+%: {interp.names[interp.targs[first]]}$", titles[0])
    check_figure(20)


def test_grad_cam_plot(interp):
    plot_grad_cam(interp)
    check_figure(80)


def with_wrong(interp, count: int):
    """The same predictions, of which only the `count` worst misclassified are wrong."""
    other = copy.copy(interp)
    other.targs = interp.decoded.clone()
    worst = interp.misclassified()[:count]
    other.targs[worst] = interp.targs[worst]
    assert len(other.misclassified()) == count
    return other


@pytest.mark.parametrize(
    ("wrong", "title", "cam_title"),
    [
        (0, "The 20 least certain images, none of them misclassified (out of 360; green: correct)",
         "of the 10 least certain images, none of them misclassified"),
        (3, "The 3 misclassified and 17 least certain correct images (out of 360; green: correct)",
         "of the 3 misclassified and 7 least certain correct images"),
        (20, "The 20 misclassified images (out of 360)", "of the 10 worst of 20 misclassified images"),
        (21, "The 20 worst of 21 misclassified images (out of 360)", "of the 10 worst of 21 misclassified images"),
    ],
)  # fmt: skip
def test_correct_images_fill_up_the_plots(interp, wrong, title, cam_title):
    """There is something to see even if nothing is misclassified: first what is wrong, then what is least certain."""
    interp = with_wrong(interp, wrong)
    rows = interp.hardest(20)
    assert len(rows) == 20 and torch.equal(rows[:wrong], interp.misclassified()[:20])
    certainty = interp.preds[rows[wrong:], interp.targs[rows[wrong:]]].tolist()
    correct = interp.preds[interp.decoded == interp.targs].max(dim=1).values
    assert certainty == sorted(correct.tolist())[: 20 - min(wrong, 20)]
    plot_misclassified(interp)
    assert plt.gcf().get_suptitle() == title
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.axison]
    assert ["actual" in text for text in titles] == [True] * min(wrong, 20) + [False] * (20 - min(wrong, 20))
    assert ["runner-up" in text for text in titles] == ["actual" not in text for text in titles]
    check_figure(20)
    plot_grad_cam(interp)
    assert plt.gcf().get_suptitle().endswith(cam_title)
    if wrong < N_GRADCAM:  # otherwise all of its captions are as in `test_grad_cam_plot`
        check_figure(80)
    plt.close()


def test_fewer_images_than_places(interp):
    few = copy.copy(interp)
    few.preds, few.targs, few.decoded = interp.preds[:7], interp.targs[:7], interp.decoded[:7]
    plot_misclassified(few)
    check_figure(7)
    plot_grad_cam(few)
    check_figure(56)


# ---- Names of classes


LONG = ["Tomato___Tomato_Yellow_Leaf_Curl_Virus", "Corn_(maize)___Cercospora_leaf_spot Gray_leaf_spot"]
NAMES = {
    "long": [f"{LONG[i % 2]} {i}" for i in range(10)],
    "long and alike": [f"a very long name with number {i} in its very middle, of ten" for i in range(10)],
    "one word": ["W" * 30 + str(i) for i in range(10)],
    "dollars": [f"$x_{i}$ costs $5" for i in range(10)],
    "no font": ["猫", "犬", "ship", *"abcdefg"],
    "wide": [f"wide {chr(0xFF21 + i) * 9}" for i in range(10)],
}


@pytest.mark.parametrize("names", NAMES)
def test_any_class_names(interp, monkeypatch, names):
    """Nothing overlaps, and no letter is missing; with names in one line or two, one row of Grad-CAMs is like both."""
    images = N_GRADCAM if names == "long" else 5
    monkeypatch.setattr("cifar10.interpretation.plots.N_GRADCAM", images)
    other = copy.copy(interp)
    other.names = NAMES[names]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing letters
        plot_confusion(other)
        check_figure()
        plot_misclassified(other)
        check_figure(20)
        plot_grad_cam(other)
        check_figure(8 * images)


def test_shortened_names():
    assert shorten_middle("automobile", 11) == "automobile" and width("automobile") + len("predicted:  (100%)") <= 29
    assert shorten_middle("tomato yellow leaf curl virus", 15) == "tomato…l virus"
    assert shorten_middle("猫" * 9, 9) == "猫猫…猫猫"
    assert wrap("yellow leaf curl", 8) == ["yellow ", "leaf cur", "l"]
    alike = display_names(["a" * 30 + "1" + "b" * 30, "a" * 30 + "2" + "b" * 30, "cat"], 12)
    assert len({*alike}) == 3 and alike[2] == "cat" and all(len(name) <= 12 for name in alike)


@pytest.fixture
def matplotlibs_fonts(monkeypatch):
    """The system has no fonts but those that come with matplotlib."""
    own = [font for font in font_manager.fontManager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def test_another_font_of_the_system_is_used_where_the_default_lacks_letters(matplotlibs_fonts):
    """Here matplotlib's Computer Modern is the default: it has no Greek letters, DejaVu Sans has."""
    with plt.rc_context({"font.family": ["cmr10"]}):
        families, missing = fonts_for("cat λ")
        assert families[0] == "cmr10" and len(families) == 2 and not missing
        assert display_names(["λ", "猫"], 9) == ["λ", "class 1"]
    assert fonts_for("cat λ") == (plt.rcParams["font.family"], set())


def test_a_font_that_was_removed_or_is_damaged_has_no_letters(tmp_path):
    (tmp_path / "damaged.ttf").write_text("not a font")
    assert letters_in(str(tmp_path / "damaged.ttf")) == letters_in(str(tmp_path / "removed.ttf")) == set()


# ---- Many classes


def of_classes(count: int, seed: int = 0) -> Interpretation:
    """Predictions for ten images a class, of which a fifth is wrong, most often class 3 taken for class 7."""
    interp, generator = Interpretation.__new__(Interpretation), torch.Generator().manual_seed(seed)
    interp.targs = torch.arange(count).repeat(10)
    other = torch.randint(0, count, (len(interp.targs),), generator=generator)
    interp.decoded = torch.where(torch.rand(len(other), generator=generator) < 0.8, interp.targs, other)
    interp.decoded[interp.targs == 3] = 7
    interp.names = [f"class {i:03}" for i in range(count)]
    return interp


@pytest.mark.parametrize("count", [2, 25, 26, 100])
def test_confusion_of_many_classes(count):
    interp = of_classes(max(count, 8))
    plot_confusion(interp)
    axes = plt.gcf().axes
    assert len(axes) == (2 if count > 25 else 1)
    names = [label.get_text() for label in axes[-1].get_yticklabels()]
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes[-1].texts}
    assert len(names) == min(len(interp.names), 25) and {"class 003", "class 007"} <= {*names}
    assert texts[names.index("class 003"), names.index("class 007")] == "10"
    matrix = interp.confusion_matrix()
    shown = [interp.names.index(name) for name in names]
    for (row, column), text in texts.items():
        assert int(text or 0) == matrix[shown[row], shown[column]]
    shares = matrix / matrix.sum(axis=1, keepdims=True)  # so that small classes are seen, too
    np.testing.assert_allclose(axes[-1].images[0].get_array(), shares[np.ix_(shown, shown)])
    if count > 25:
        np.testing.assert_allclose(axes[0].images[0].get_array(), shares)
    check_figure()


def test_the_confusion_of_a_thousand_classes_is_not_quadratic_in_texts():
    """By the number of texts and not by the clock: the matrix has a million cells."""
    plot_confusion(of_classes(1000))
    assert len(plt.gcf().findobj(matplotlib.text.Text)) < 1000
    plt.close()


def test_curves_plot():
    plot_curves(ROOT / "results/cifar10-assignment")
    loss, accuracy, rate = plt.gcf().axes
    assert [ax.get_ylabel() for ax in (loss, accuracy, rate)] == [
        "Cross-entropy loss", "Accuracy (%)", "Learning rate",
    ]  # fmt: skip
    assert rate.get_xlabel() == "Epoch" and rate.get_xlim()[1] < 27  # epochs, not batches
    check_figure()


@pytest.mark.parametrize("epochs", [1, 2])
def test_curves_of_few_epochs(tmp_path, epochs):
    for name in ("history.csv", "batches.csv"):
        rows = (ROOT / "results/cifar10-assignment" / name).read_text().splitlines()
        steps = 97 if name == "batches.csv" else 1
        (tmp_path / name).write_text("\n".join(rows[: 1 + epochs * steps]))
    plot_curves(tmp_path)
    assert plt.gcf().get_suptitle().endswith(f"after {epochs} epoch{'s' * (epochs > 1)}")
    check_figure()


def test_lr_curve_plot():
    columns = read_csv(ROOT / "results/cifar10-assignment/lr_find.csv")
    plot_lr_curve(LRCurve(columns["lr"], columns["loss"], *suggest_lrs(columns["lr"], columns["loss"])))
    labels = plt.gca().get_legend_handles_labels()[1]
    assert any(label.startswith("lr_min = ") for label in labels) and any(
        label.startswith("lr_max = ") for label in labels
    )
    check_figure()


@pytest.mark.parametrize("confidences", [[0.6, 0.66, 0.9, 0.95, 1.0], torch.linspace(0.51, 1, 500).tolist()])
def test_each_bar_of_the_calibration_plot_stands_in_its_bin(confidences):
    likeliest = torch.tensor(confidences)
    preds = torch.stack([likeliest, 1 - likeliest], dim=1)
    targs = torch.zeros(len(preds), dtype=torch.long)
    plot_calibration(SimpleNamespace(preds=preds, targs=targs, decoded=targs, names=["a", "b"]))
    ax, below = plt.gcf().axes
    bars = [bar for bar in below.patches if bar.get_height()]
    middles = [(bar.get_x() + bar.get_width() / 2) * BINS / 100 for bar in bars]
    assert middles == pytest.approx(sorted({min(int(p * BINS), BINS - 1) + 0.5 for p in likeliest.tolist()}))
    assert sum(bar.get_height() for bar in bars) == len(preds) and all(bar.get_width() < 100 / BINS for bar in bars)
    assert not ax.lines[1].get_clip_on() and below.get_ylim()[0] < 1 and below.get_ylim()[1] > 10


@pytest.mark.parametrize("file, title", [("cat.jpg", "cat.jpg"), ("a" * 50, None), ("\U0001f9ff.png", "Image")])
def test_a_grad_cam_names_its_file(matplotlibs_fonts, file, title):
    model, pixels = ResNet(width=2).eval(), torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    data = dict(name="", classes=list("abcdefghij"), size=32, ranges={}, mean=[0.5] * 3, std=[0.25] * 3)
    classifier = ImageClassifier(model, data, ASSIGNMENT, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a letter that no font has
        plot_image_grad_cam(classifier, pixels, torch.eye(10)[3], file)
        plt.gcf().canvas.draw()
    shown = plt.gcf().axes[0].get_title()
    assert shown == title if title else len(shown) == 30 and "…" in shown
