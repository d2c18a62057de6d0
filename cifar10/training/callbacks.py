"""Callbacks of the Learner, one small class each."""

import math
import time

import numpy as np
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.learner import AvgLoss, AvgMetric, AvgSmoothLoss, Recorder
from fastai.metrics import accuracy
from fastcore.foundation import L
from torch import Tensor

from cifar10 import signals
from cifar10.errors import Stopped, UserError
from cifar10.recipes import Recipe
from cifar10.text import duration, plural
from cifar10.training.lr_finder import sweep_steps

SYNC_EVERY = 50  # steps on a GPU: reading a number makes the host wait until the GPU is done


def should_sync(device: torch.device | str, step: int) -> bool:
    """Whether to read the loss of this step of an epoch from the device."""
    return torch.device(device).type == "cpu" or step % SYNC_EVERY == 0


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss, but it stays on the device."""

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class Progress(ProgressCallback):
    """fastai's progress bar and table. On a GPU, the loss is shown only now and then.

    The table also shows the accuracy on the training images and the learning rate, and counts epochs from 1.
    """

    def after_batch(self):
        if should_sync(self.dls.device, self.iter):
            super().after_batch()
        else:
            self.pbar.update(self.iter + 1)

    def _write_stats(self, log):
        if log[0] == "epoch":
            epoch, extra = "epoch", ("train_accuracy", "lr")
        else:
            epoch, extra = log[0] + 1, self.recorder.extra[-1]
        row = [epoch, *log[1:-1], *extra, log[-1]]
        super()._write_stats(["" if value != value else value for value in row])  # NaN: not computed


class EpochRecorder(Recorder):
    """fastai's Recorder, whose train loss is the mean over the epoch, so that it is comparable to the valid loss.

    `extra` holds the accuracy on the training images and the last learning rate of each epoch, `seconds` its duration,
    and `step_losses` the loss of each step. An epoch that is skipped, because it was trained before (`start_epoch`),
    leaves no row; what was not computed is NaN.
    """

    name = "recorder"

    def __init__(self):
        super().__init__()
        self.train_loss, self.train_accuracy, self.smooth_loss = AvgLoss(), AvgMetric(accuracy), SmoothLoss()
        self.losses = []  # here already, because a fit may be canceled before this callback's turn

    def before_fit(self):
        super().before_fit()
        self.step_losses, self.seconds, self.extra = [], [], []  # of each step; of each epoch with validation
        self.train_seconds = 0.0  # of all epochs, without validation
        self.flop = 0.0  # see `CountFlop`

    def before_epoch(self):
        super().before_epoch()
        self.train_loss.reset()
        self.train_accuracy.reset()

    @property
    def skipped(self) -> bool:
        """Whether nothing of this epoch was trained or validated."""
        return len(self.log) == 1 and not self.train_loss.count

    def after_batch(self):
        if self.training and self.yb:
            self.step_losses.append(self.learn.loss.detach())
            self.train_loss.accumulate(self.learn)
            pred, y = getattr(self.learn, "pred", None), self.yb[0]
            # Only of logits and classes: a callback may have put something else in their place.
            if isinstance(pred, Tensor) and isinstance(y, Tensor) and pred.shape[:-1] == y.shape:
                self.train_accuracy.accumulate(self.learn)
        super().after_batch()

    def after_train(self):
        super().after_train()
        # In place of fastai's smoothed loss. Reading it waits until a GPU is done.
        self.log = L(self.epoch, mean(self.train_loss)) + self.log[2:]
        self.train_seconds += time.time() - self.start_epoch
        self.fetch_losses()

    def after_validate(self):
        super().after_validate()
        if self.cancel_valid:
            self.log += [math.nan] * (1 + len(self.metrics))

    def after_epoch(self):
        if not self.skipped:
            self.seconds.append(time.time() - self.start_epoch)
            self.extra.append([mean(self.train_accuracy), float(self.lrs[-1]) if self.lrs else math.nan])
            super().after_epoch()

    def fetch_losses(self):
        """Copy the smoothed losses to the host, where fastai's plots look for them."""
        self.losses = [loss.to("cpu") for loss in self.losses]

    after_fit = fetch_losses


def mean(metric: AvgLoss | AvgMetric) -> float:
    return float(metric.value) if metric.count else math.nan


class ValidateLast(Callback):
    """Validate after the last epoch only; the others have no valid loss and accuracy."""

    def before_validate(self):
        if self.epoch + 1 < self.n_epoch:
            raise CancelValidException


class StopAtNaN(Callback):
    """Raise `UserError` at the batch whose loss is not finite, before anything is saved of it."""

    order, run_valid = Recorder.order + 1, False

    def after_batch(self):
        if should_sync(self.dls.device, self.iter):
            self.check()

    def check(self):
        loss = self.loss.item()
        if not math.isfinite(loss):
            finite = torch.stack(self.recorder.step_losses).isfinite().tolist()
            step = finite.index(False) if False in finite else len(finite) - 1  # then the validation loss is not finite
            epoch, batch = divmod(step, len(self.dls.train))
            raise UserError(
                f"the loss became {loss:g} in epoch {epoch + 1}, batch {batch + 1} of {len(self.dls.train)}, at a"
                f" learning rate of {self.recorder.lrs[step]:.2g}; start another run with a lower --lr_max"
            )

    after_train = after_validate = check


class StopAtSignal(Callback):
    """Stop at the next batch after a signal whose exception was lost, see `signals.stop`."""

    def after_batch(self):
        if signals.received:
            raise Stopped(signals.received)


class TimeEstimate(Callback):
    """After the first steps, print how long the rest takes: the LR finder, and the epochs from `start_epoch` on."""

    order, run_valid = ProgressCallback.order + 1, False  # the progress bar must exist to print above it
    SKIP, MEASURE = 2, 6  # steps: the first ones include one-time set-up

    def __init__(self, recipe: Recipe, start_epoch: int = 0):
        self.recipe, self.start_epoch, self.steps = recipe, start_epoch, 0

    def after_batch(self):
        self.steps += 1
        if self.steps == self.SKIP:
            self.loss.item()  # a GPU has only been asked for the steps so far; wait for it
            self.start = time.perf_counter()
        elif self.steps == self.SKIP + self.MEASURE:
            self.loss.item()
            step = (time.perf_counter() - self.start) / self.MEASURE
            recipe, epochs = self.recipe, self.recipe.epochs - self.start_epoch
            done = self.start_epoch / recipe.epochs
            # The work of later steps, in units of a step with images of the present size.
            work = [(recipe.side(part) / recipe.side(done)) ** 2 for part in np.linspace(done, 1, 1000, endpoint=False)]
            sweep = sweep_steps(self.dls.train.bs) if recipe.lr_max is None else 0
            training = sweep + epochs * len(self.dls.train) * np.mean(work)
            # A validation step is a forward pass on full-size images, about a third of the work.
            validation = work[-1] / 3 * len(self.dls.valid) * (epochs if recipe.validate == "each" else 1)
            self.report(step, epochs, step * float(training + validation))

    def report(self, step: float, epochs: int, seconds: float):
        what = plural(epochs, "epoch") + (" and the LR finder" if self.recipe.lr_max is None else "")
        message = f"{what} will take about {duration(seconds)} ({1000 * step:.0f} ms per step)."
        short = 1 + epochs // 8
        on_cpu, by_assignment = torch.device(self.dls.device).type == "cpu", self.recipe.name == "assignment"
        if on_cpu and by_assignment and not self.start_epoch and seconds > 3600 and short < epochs:
            message += (
                f" A GPU is much faster. On this CPU, --epochs {short} --peak_epoch 1 takes about"
                f" {duration(seconds * short / epochs)}; --recipe faster is made for CPUs."
            )
        write = self.progress.mbar.write if hasattr(self, "progress") else print
        write(message)
