"""Each callback does what its name says, and nothing else."""

import math
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from conftest import small
from fastai.vision.all import Callback, ProgressCallback

from cifar10 import signals
from cifar10.errors import Stopped
from cifar10.recipes import ASSIGNMENT, RECIPES
from cifar10.training import callbacks
from cifar10.training.callbacks import StopAtSignal, TimeEstimate, ValidateLast
from train import get_dls, get_learner


def test_rows_hold_the_means_over_the_images(dls):
    learn = small(dls)
    learn.fit_one_cycle(2, 0.01)
    recorder, values = learn.recorder, list(learn.recorder.values)
    assert list(recorder.metric_names) == [
        "epoch", "train_loss", "valid_loss", "accuracy", "time",
    ]  # fmt: skip
    losses = torch.stack(recorder.step_losses)
    assert len(losses) == 6 and len(recorder.seconds) == 2
    assert values[1][0] == pytest.approx(losses[3:].mean().item(), rel=1e-5)
    probabilities, targets, each = learn.get_preds(with_loss=True)
    assert values[1][1] == pytest.approx(each.mean().item(), rel=1e-5)
    assert values[1][2] == pytest.approx((probabilities.argmax(1) == targets).float().mean().item())


class Sizes(Callback):
    """The side of each batch's images."""

    order = 1000

    def __init__(self):
        self.train, self.valid = [], []

    def before_batch(self):
        (self.train if self.training else self.valid).append(self.x.shape[-1])


@pytest.mark.parametrize("recipe", ["fast", "faster"])
def test_images_grow_and_validation_sees_full_size_ones(dls, recipe, capsys):
    learn = get_learner(dls, RECIPES[recipe], width=4, precision="fp32")
    learn.fit_one_cycle(10, 0.1, cbs=[sizes := Sizes(), ValidateLast()])
    assert "nan" not in capsys.readouterr().out
    expected = [RECIPES[recipe].side(step / 30) for step in range(30)]
    assert sizes.train == expected and sizes.train[0] == 24 and sizes.train[-1] == 32
    assert sizes.valid == [32]
    *before, last = learn.recorder.values
    assert len(before) == 9 and all(math.isnan(row[1]) and math.isnan(row[2]) and row[0] > 0 for row in before)
    assert last[1] > 0 and last[2] > 0.5  # 1.0 with each of 12 seeds


@pytest.mark.parametrize(
    ("recipe", "start_epoch", "work"), [("assignment", 0, 6), ("assignment", 2, 4), ("fast", 0, 9)]
)
def test_the_time_estimate_is_given_once_and_right(dls, monkeypatch, recipe, start_epoch, work):
    """By a clock on which a step takes a second: 800 of the LR finder, `work` epochs of 12, validation of 4 thirds."""
    dls = get_dls(dls.train.table.folder, batch_size=4)
    recipe = replace(RECIPES[recipe], epochs=6, peak_epoch=1)
    learn = get_learner(dls, recipe, width=2, precision="fp32")
    learn.remove_cb(ProgressCallback)
    learn.add_cb(estimate := TimeEstimate(recipe, start_epoch))
    estimates = []
    estimate.report = lambda step, epochs, seconds: estimates.append((step, epochs, seconds))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(estimate.steps))
    with learn.no_logging():
        learn.fit_one_cycle(6 - start_epoch, 0.01)
    full_size = (32 / recipe.side(0)) ** 2 / 3
    validation = 4 * full_size * (6 - start_epoch if recipe.validate == "each" else 1)
    sweep = 800 if recipe.lr_max is None else 0
    assert estimates == [(1, 6 - start_epoch, pytest.approx(sweep + 12 * work + validation, rel=1e-3))]


@pytest.mark.parametrize(("epochs", "seconds", "short"), [(24, 7200, 4), (24, 3000, None), (1, 7200, None)])
def test_a_long_time_on_a_cpu_comes_with_a_short_command(dls, capsys, epochs, seconds, short):
    estimate = TimeEstimate(ASSIGNMENT)
    estimate.learn = small(dls)
    estimate.learn.remove_cb(ProgressCallback)
    estimate.report(step=3.0, epochs=epochs, seconds=seconds)
    said = capsys.readouterr().out
    assert f"{epochs} epoch" in said and "and the LR finder will take about" in said
    assert ("--epochs 4 --peak_epoch 1 takes about 20 minutes" in said) == bool(short)


class SwallowSignal(Callback):
    """A signal arrives in the second step, and its exception is lost."""

    def before_batch(self):
        if self.training and self.train_iter == 1:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)


def test_a_lost_signal_stops_training_at_the_next_batch(dls, monkeypatch):
    monkeypatch.setattr(signals, "received", "")
    before = signal.signal(signal.SIGTERM, signals.stop)
    learn = small(dls)
    try:
        with pytest.raises(Stopped) as stopped:
            learn.fit(2, 0.01, cbs=[SwallowSignal(), StopAtSignal()])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.by == "SIGTERM" and learn.train_iter == 2
