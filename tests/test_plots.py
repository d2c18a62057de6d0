"""Plots have titles and labels, nothing overlaps, and nothing is cut off."""

from itertools import combinations

import matplotlib
import numpy as np
from conftest import ROOT
from matplotlib import pyplot as plt

from cifar10.files import read_csv
from cifar10.lr_finder import LRCurve, plot_lr_curve, suggest_lrs
from cifar10.plots import plot_confusion, plot_curves, plot_grad_cam, plot_misclassified


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
    assert f"actual: {interp.vocab[interp.targs[first]]}" in titles[0] and "predicted" in titles[0] and "%" in titles[0]
    check_figure(min(20, len(interp.misclassified())))


def test_grad_cam_plot(interp):
    plot_grad_cam(interp)
    check_figure(min(10, len(interp.misclassified())) * 8)


def test_plots_of_a_perfect_model(interp):
    import copy

    perfect = copy.copy(interp)
    perfect.targs = interp.decoded
    for plot in (plot_misclassified, plot_grad_cam):
        plot(perfect)
        assert "No misclassified images" in plt.gcf()._suptitle.get_text()
        plt.close()


def test_curves_plot():
    plot_curves(ROOT / "results/cifar10-assignment")
    loss, accuracy, rate = plt.gcf().axes
    assert [ax.get_ylabel() for ax in (loss, accuracy, rate)] == [
        "Cross-entropy loss", "Accuracy (%)", "Learning rate",
    ]  # fmt: skip
    assert rate.get_xlabel() == "Epoch" and rate.get_xlim()[1] < 27  # epochs, not batches
    check_figure()


def test_confusion_plot(interp):
    plot_confusion(interp)
    check_figure()


def test_lr_curve_plot():
    columns = read_csv(ROOT / "results/cifar10-assignment/lr_find.csv")
    plot_lr_curve(LRCurve(columns["lr"], columns["loss"], *suggest_lrs(columns["lr"], columns["loss"])))
    labels = plt.gca().get_legend_handles_labels()[1]
    assert any(label.startswith("lr_min = ") for label in labels) and any(
        label.startswith("lr_max = ") for label in labels
    )
    check_figure()
