"""The learning rate finder: fastai's sweep, the rule that turns its curve into lr_min and lr_max, and its plot."""

import math
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.callback.schedule import LRFinder, minimum, steep, valley
from fastai.vision.all import Learner, get_model
from matplotlib import pyplot as plt
from scipy.ndimage import uniform_filter1d

from cifar10.errors import UserError
from cifar10.files import save_figure, write_csv
from cifar10.processes import on_rank0

START, END = 1e-3, 3.0  # from where nothing happens yet to where every model diverges
STEPS = 50  # of a sweep at least
MOST_SMOOTHED = 20  # steps in a moving average
IMAGES = 3_200  # of a sweep at least: the losses of small batches are noisy, so there are more of them to average
BLOW_UP = 1.1  # a curve is cut off where the loss exceeds this multiple of the loss at the start,
RISE = 0.3  # or where it has risen again by this fraction of what it fell
NORMAL_DIFFERENCE = 0.954  # median distance of two draws from a normal distribution, in standard deviations
FEWEST = 10  # steps to draw conclusions from


class LRCurve(NamedTuple):
    """The learning rate and loss of each step of a sweep, and what follows from them."""

    lrs: list[float]
    losses: list[float]
    lr_min: float
    lr_max: float
    suggestions: dict[str, float]  # of fastai's functions, on the smoothed curve before any blow-up

    @on_rank0
    def save(self, folder: Path):
        """Write lr_find.csv and lr_find.png into the folder of a run."""
        write_csv(folder / "lr_find.csv", ["lr", "loss"], zip(self.lrs, self.losses, strict=True))
        plot_lr_curve(self)
        save_figure(folder / "lr_find.png")


def suggest_lrs(lrs: list[float], losses: list[float]) -> tuple[float, float, dict[str, float]]:
    """`(lr_min, lr_max, suggestions)` from the losses of a sweep with rising learning rates.

    The curve is smoothed and cut off where it first blows up, or has risen by a good part of what it fell: at very high
    learning rates, a model may learn to always predict a frequent class, whose loss is low. On the rest, three of
    fastai's functions make their suggestions: `minimum` (a tenth of the LR with the lowest loss), `steep` and `valley`.
    Then

    - lr_max is the LR with the lowest loss: the geometric mean of all whose loss can't be told from it, which are many
      if batches are small, so that another seed gives about the same. It is not divided by ten, because a cycle warms
      up to it, and because it is the FC layer that blows up, while Muon's steps for the convolutions have a size of
      their own;
    - lr_min is a tenth of the lowest of the three: safe to start from, and, without annihilation, small enough to
      end with.

    Raises `UserError` if fewer than `FEWEST` steps come before the blow-up.
    """
    smooth = smoothed(losses)
    blown_up = np.flatnonzero(~(smooth <= BLOW_UP * smooth[0]))  # negated, so that it includes a NaN
    end = int(blown_up[0]) if len(blown_up) else len(lrs)
    rise, fall = smooth[:end] - np.minimum.accumulate(smooth[:end]), smooth[0] - smooth[:end].min()
    risen = np.flatnonzero(rise > RISE * fall)
    risen = risen[risen >= FEWEST]
    end = int(risen[0]) if len(risen) else end
    if end < FEWEST:
        raise UserError(f"the loss blows up at a learning rate of {lrs[end]:.2g} already; set --lr_max and --lr_min")
    # From a step to the next, losses differ by noise; the median of the differences does not see outliers.
    noise = np.median(np.abs(np.diff(losses[:end]))) / NORMAL_DIFFERENCE
    standard_error = noise / window(losses) ** 0.5
    lowest = smooth[:end] <= smooth[:end].min() + 2 * standard_error
    lr_max = float(np.exp(np.log(lrs[:end])[lowest].mean()))
    x, y = torch.tensor(lrs[:end]), torch.tensor(smooth[:end])
    suggestions = {function.__name__: float(function(x, y, end)[0]) for function in (minimum, steep, valley)}
    return min(suggestions.values()) / 10, lr_max, suggestions


def window(losses: list[float]) -> int:
    """Steps in the moving average: a tenth of them, but no more than `MOST_SMOOTHED`."""
    return min(max(1, len(losses) // 10), MOST_SMOOTHED)


def smoothed(losses: list[float]) -> np.ndarray:
    """The moving average."""
    values = np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf)
    return uniform_filter1d(values, window(losses), mode="nearest")


@contextmanager
def restored(learn: Learner):
    """Afterwards, weights, optimizer state and hyperparameters are as before, whatever happens in between."""
    if learn.opt is None:
        learn.create_opt()
    before = deepcopy([get_model(learn.model).state_dict(), learn.opt.state_dict()])
    try:
        yield
    finally:
        for part, state in zip((get_model(learn.model), learn.opt), before, strict=True):
            part.load_state_dict(state)


class InMemoryLRFinder(LRFinder):
    """fastai's LRFinder without its file: our Learner restores the weights from memory."""

    name = "lr_finder"

    def before_fit(self):
        super(LRFinder, self).before_fit()
        self.best_loss = math.inf

    def after_fit(self):
        self.opt.zero_grad()


def sweep_steps(batch_size: int) -> int:
    return max(STEPS, math.ceil(IMAGES / batch_size))


def find_lrs(learn: Learner) -> LRCurve:
    """Sweep as fastai's `lr_find` does; the model keeps its weights. Raises like `suggest_lrs`."""
    steps = sweep_steps(learn.dls.train.bs)
    print(f"LR finder: {steps} steps, learning rate {START:g} → {END:g}")
    with learn.no_logging():
        learn.fit(1 + steps // len(learn.dls.train), cbs=InMemoryLRFinder(START, END, steps))
    lrs, losses = [float(lr) for lr in learn.recorder.lrs], torch.stack(learn.recorder.step_losses).tolist()
    return LRCurve(lrs, losses, *suggest_lrs(lrs, losses))


def plot_lr_curve(curve: LRCurve):
    """The loss of each step of a sweep, with lr_min, lr_max and fastai's suggestions."""
    _, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    ax.plot(curve.lrs, curve.losses, ".", color="tab:blue", label="loss of each step")
    ax.plot(curve.lrs, smoothed(curve.losses), color="tab:blue", alpha=0.5, label="smoothed")
    for name, lr, style in (("lr_min", curve.lr_min, "--"), ("lr_max", curve.lr_max, "-")):
        ax.axvline(lr, color="tab:green", linestyle=style, label=f"{name} = {lr:.2g}")
    for (name, lr), marker in zip(curve.suggestions.items(), "ov^"):
        name = name.replace("minimum", "minimum / 10")  # the LR with the lowest loss, divided by ten
        height = np.interp(np.log(lr), np.log(curve.lrs), curve.losses)
        ax.plot(lr, height, marker, color="tab:orange", markersize=9, label=f"fastai's {name}: {lr:.2g}")
    ax.set(xscale="log", xlabel="Learning rate", ylabel="Cross-entropy loss")
    ax.set_ylim(0.9 * min(curve.losses), 1.5 * curve.losses[0])  # a blow-up at the end would flatten all the rest
    ax.set_title("LR finder: lr_max is the middle of the learning rates whose smoothed loss is lowest")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
