"""The one place where a Learner is built: model, optimiser, loss, precision, callbacks; and how its LRs are found."""

import ctypes
import math
import sys
import tempfile
import time
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.vision.all import (
    AvgLoss,
    AvgSmoothLoss,
    Callback,
    CancelValidException,
    CastToTensor,
    CrossEntropyLossFlat,
    DataLoaders,
    L,
    Learner,
    MixedPrecision,
    OptimWrapper,
    ProgressCallback,
    Recorder,
    TrainEvalCallback,
    accuracy,
    minimum,
    norm_bias_params,
    steep,
    valley,
)
from fastprogress.fastprogress import format_time
from scipy.ndimage import uniform_filter1d
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from errors import UserError
from model import ResNet
from muon import Muon
from recipes import ASSIGNMENT, RECIPES, Recipe

MOMENTUM = 0.9  # as in the assignment's notebook; Nesterov's form of it
WEIGHT_DECAY = 5e-4  # of the FC layer's weights; convolutions keep their length, and biases would only be held back
LABEL_SMOOTHING = 0.1  # keeps the net from driving its logits ever further apart on images it already knows
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


# ---- Callbacks -----------------------------------------------------------------------------------------------------


LOOK_EVERY = 50  # steps on a GPU, which has to finish its work before a number can be looked at


def may_look(device: torch.device, step: int) -> bool:
    """Whether to fetch the loss of this step of an epoch from the device."""
    return device.type == "cpu" or step % LOOK_EVERY == 0


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss, but it stays on the device."""

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class Progress(ProgressCallback):
    """fastai's progress bar, but on a GPU it shows the loss only now and then."""

    def after_batch(self):
        if may_look(self.dls.device, self.iter):
            super().after_batch()
        else:
            self.pbar.update(self.iter + 1)


class EpochRecorder(Recorder):
    """fastai's Recorder with a row (epoch from 1, lr, train loss and accuracy, valid loss and accuracy) per epoch.

    The train loss is the mean over the epoch, not the smoothed one, so that it can be set beside the valid loss.
    `step_losses` holds the loss of each step, `seconds` the duration of each epoch. An epoch that is skipped, because
    it was trained before (`start_epoch`), leaves no row.
    """

    name = "recorder"

    def __init__(self):
        super().__init__(train_metrics=True)
        self.train_loss, self.smooth_loss = AvgLoss(), SmoothLoss()

    def before_fit(self):
        super().before_fit()
        self.metric_names = L("epoch", "lr", *self.metric_names[1:])
        self.step_losses: list[Tensor] = []
        self.seconds: list[float] = []  # with the validation
        self.train_seconds = 0.0  # of all epochs, without it

    def before_epoch(self):
        super().before_epoch()
        self.log, self.skipped = L(self.epoch + 1), False

    def after_cancel_epoch(self):
        self.skipped = True

    def before_train(self):
        for metric in self._train_mets:
            metric.reset()
        self.start_train = time.time()

    def after_batch(self):
        if self.training and self.yb:
            self.smooth_loss.accumulate(self.learn)
            self.step_losses.append(self.learn.loss.detach())
        super().after_batch()

    def after_train(self):
        self.log.append(float(self.opt.hypers[-1]["lr"]))
        super().after_train()  # fetches the sums, so that a GPU is done
        self.train_seconds += time.time() - self.start_train

    def after_validate(self):
        super().after_validate()
        self.log += [math.nan] * (len(self.metric_names) - 1 - len(self.log))  # of an epoch without validation

    def after_epoch(self):
        if not self.skipped:
            self.seconds.append(time.time() - self.start_epoch)
            super().after_epoch()

    @property
    def _train_mets(self):
        return L() if getattr(self, "cancel_train", False) else L(self.train_loss) + self.metrics


class CPUMixedPrecision(MixedPrecision):
    """bfloat16 on the CPU: fastai's own callback autocasts on CUDA only."""

    def __init__(self):
        super().__init__(amp_mode="bf16")

    def before_fit(self):  # without fastai's, which warns that there is no GPU
        self.autocast, self.scales = torch.autocast("cpu", dtype=torch.bfloat16), L()
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=False)  # bfloat16 reaches as far as float32


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory():
    """Have glibc keep what the process frees, until it ends.

    Otherwise it gives a step's large tensors back to the system at once, and in the next step each of their pages costs
    a fault. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


class GradientValueClip(Callback):
    """Clip every value of the gradient to [−`limit`, `limit`], as the assignment's notebook does."""

    order = MixedPrecision.order + 1  # after fp16's gradients are scaled back

    def __init__(self, limit: float):
        self.limit = limit

    def before_step(self):
        nn.utils.clip_grad_value_(self.model.parameters(), self.limit)


class L1Penalty(Callback):
    """Train on the loss plus `factor` × the sum of all parameters' absolute values, as the notebook can.

    The recorded loss stays without it, so that it can be set beside the valid loss.
    """

    run_valid = False

    def __init__(self, factor: float):
        self.factor = factor

    def after_loss(self):
        self.learn.loss_grad = self.loss_grad + self.factor * sum(p.abs().sum() for p in self.model.parameters())


class StopAtNaN(Callback):
    """Raise `UserError` at the batch whose loss is no finite number, before anything is made of it."""

    order, run_valid = Recorder.order + 1, False

    def after_batch(self):
        if may_look(self.dls.device, self.iter):
            self.look()

    def after_train(self):
        self.look()

    def after_validate(self):
        self.look()

    def look(self):
        loss = self.loss.item()
        if not math.isfinite(loss):
            finite = torch.stack(self.recorder.step_losses).isfinite().tolist()
            step = finite.index(False) if False in finite else len(finite) - 1
            epoch, batch = divmod(step, len(self.dls.train))
            raise UserError(
                f"the loss became {loss:g} in epoch {epoch + 1}, batch {batch + 1} of {len(self.dls.train)}, at a"
                f" learning rate of {self.recorder.lrs[step]:.2g}; train again with a lower --lr_max"
            )


class Resize(Callback):
    """Train on images of the sizes that a recipe names, one after the other; validate on whole ones.

    Source: Howard, "Training Imagenet in 3 hours for $25; and CIFAR10 for $0.26", 2018.
    """

    run_valid = False

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def before_batch(self):
        side = self.recipe.side(self.pct_train)
        if side < self.x.shape[-1]:
            self.learn.xb = (resize(self.x, [side, side], antialias=True),)


class ValidateLast(Callback):
    """Validate after the last epoch only; the others have no valid loss and accuracy."""

    def before_validate(self):
        if self.epoch + 1 < self.n_epoch:
            raise CancelValidException


class TimeEstimate(Callback):
    """After the first steps, say once how long the rest will take: of the LR finder's `sweep` steps, and of all epochs.

    `done` of the `epochs` epochs were trained before.
    """

    order = ProgressCallback.order + 1  # the progress bar must be there to write above it
    SKIP, MEASURE = 2, 6  # steps: the first ones also set things up

    def __init__(self, recipe: Recipe, epochs: int, done: int = 0, sweep: int = 0):
        self.recipe, self.epochs, self.done, self.sweep = recipe, epochs, done, sweep
        self.steps = 0

    def after_batch(self):
        if not self.training:
            return
        self.steps += 1
        if self.steps not in (self.SKIP, self.SKIP + self.MEASURE):
            return
        if self.dls.device.type == "cuda":
            torch.cuda.synchronize()  # or the steps would only have been asked for
        if self.steps == self.SKIP:
            self.start = time.perf_counter()
        else:
            step = (time.perf_counter() - self.start) / self.MEASURE
            recipe, done, epochs = self.recipe, self.done / self.epochs, self.epochs - self.done
            # A validation step has a forward pass only, about a third of the work.
            whole = step * (recipe.sizes[-1][0] / recipe.side(done)) ** 2 / 3
            validation = whole * len(self.dls.valid) * (epochs if recipe.validate == "each" else 1)
            training = step * (self.sweep + self.epochs * len(self.dls.train) * recipe.work_left(done))
            self.say(step, epochs, training + validation)

    def say(self, step: float, epochs: int, seconds: float):
        end = datetime.now() + timedelta(seconds=seconds)
        what = f"{epochs} epoch{'s' * (epochs > 1)}" + " and the LR finder" * bool(self.sweep)
        message = f"{what} will take about {format_time(seconds)}, until {end:%H:%M} ({1000 * step:.0f} ms a step)."
        short = 1 + epochs // 8
        if self.dls.device.type == "cpu" and seconds > 3600 and short < epochs and self.recipe is ASSIGNMENT:
            message += (
                f" That is long because this is a CPU: --epochs {short} --peak_epoch 1 takes about"
                f" {format_time(seconds * short / epochs)}; --recipe faster is made for CPUs."
            )
        self.progress.mbar.write(message) if hasattr(self, "progress") else print(message)


# ---- Learner -------------------------------------------------------------------------------------------------------


def resolve_precision(precision: str, device: torch.device) -> str:
    """`"auto"` becomes the fastest precision that the device computes in hardware, any other one is checked."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    cuda = device.type == "cuda"
    if precision == "fp16" and not cuda:
        raise UserError(f"fp16 needs a CUDA GPU, and this run is on {device.type}; use --precision bf16 or fp32")
    if precision == "auto":
        if cuda:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if device.type == "cpu" and has_bf16 else "fp32"
    return precision


def precision_callbacks(precision: str, device: torch.device) -> list[Callback]:
    if precision == "fp32":
        return []
    if device.type == "cuda":
        return [MixedPrecision(amp_mode=precision)]
    keep_freed_memory()  # in bf16 only: in fp32 the process would grow beyond 3 GiB
    return [CPUMixedPrecision()]


def decayed_and_not(model: nn.Module) -> list[dict]:
    """Two parameter groups for the optimiser: weights with weight decay; biases and normalisation without.

    Muon leaves the decay out for convolutions.
    """
    free = list(norm_bias_params(model))
    names = {id(p) for p in free}
    weights = [p for p in model.parameters() if id(p) not in names]
    return [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]


def get_learner(
    dls: DataLoaders,
    norm: str = "batch",
    width: int = 64,
    precision: str = "auto",
    clip: float = 0.0,
    l1: float = 0.0,
    recipe: str = "assignment",
    path: str | Path | None = None,
) -> Learner:
    """A fastai Learner that trains the ResNet on `dls` with cross-entropy, as `recipe`, a name in `RECIPES`, says.

    `norm` and `width` are the model's. `precision` is "auto" (the fastest the device has), "fp32", "bf16" or "fp16".
    `clip` limits each value of the gradient and `l1` weighs an L1 penalty; 0 leaves them out. `path` is the Learner's
    folder. Raises `UserError` for a precision that the device doesn't have, `ValueError` for an unknown `norm`.
    """
    precision, recipe = resolve_precision(precision, dls.device), RECIPES[recipe]
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    model = ResNet(num_classes=len(dls.vocab), norm=norm, width=width)
    learn = Learner(
        dls,
        model.to(dls.device, memory_format=torch.channels_last),  # convolutions run faster in this layout
        loss_func=CrossEntropyLossFlat(label_smoothing=LABEL_SMOOTHING),
        opt_func=partial(OptimWrapper, opt=partial(Muon, momentum=MOMENTUM, dtype=products)),
        splitter=decayed_and_not,
        metrics=accuracy,
        moms=(MOMENTUM, MOMENTUM, MOMENTUM),  # the assignment cycles the learning rate only
        path=path,
        default_cbs=False,
        cbs=[
            TrainEvalCallback(),
            EpochRecorder(),
            CastToTensor(),
            Progress(),
            *precision_callbacks(precision, dls.device),
            *([GradientValueClip(clip)] if clip else []),
            *([L1Penalty(l1)] if l1 else []),
            *([Resize(recipe)] if len(recipe.sizes) > 1 else []),
        ],
    )
    learn.precision = precision
    return learn


# ---- Learning rates ------------------------------------------------------------------------------------------------


class LRCurve(NamedTuple):
    """What an LR finder saw, one entry a step, and what follows from it."""

    lrs: list[float]
    losses: list[float]
    lr_min: float
    lr_max: float
    suggestions: dict[str, float]  # of fastai's functions, on the smoothed curve before any blow-up


SWEEP = dict(start_lr=1e-3, end_lr=3.0, num_it=50)  # from where nothing happens yet to where every net diverges
SMOOTHING = 5  # steps that are averaged, two on either side
BLOW_UP = 1.1  # times the loss at the start: from there on a curve tells nothing more about good rates


def suggest_lrs(lrs: list[float], losses: list[float]) -> tuple[float, float, dict[str, float]]:
    """`(lr_min, lr_max, suggestions)` from the losses of an LR sweep with rising rates.

    The curve is smoothed and ends at its first blow-up. On what is left, three of fastai's functions make their
    suggestions: `minimum` (a tenth of the LR with the lowest loss), `steep` and `valley`. Then

    - lr_max is the LR with the lowest loss. It is not divided by ten, because a cycle warms up to it, and because it
      is the FC layer that blows up, while Muon's steps for the convolutions have a size of their own;
    - lr_min is a tenth of the lowest of the three: safe to start from, and, where the LR isn't annihilated, small
      enough to end with.

    Raises `UserError` where fewer than ten steps come before the blow-up.
    """
    smooth = uniform_filter1d(np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf), SMOOTHING, mode="nearest")
    bad = np.flatnonzero(~(smooth <= BLOW_UP * smooth[0]))
    end = int(bad[0]) if len(bad) else len(lrs)
    if end < 10:
        raise UserError(
            f"the loss blows up at a learning rate of {lrs[end]:.2g} already, which leaves nothing to suggest;"
            " give --lr_max and --lr_min"
        )
    x, y = torch.tensor(lrs[:end]), torch.tensor(smooth[:end])
    suggestions = {function.__name__: float(function(x, y, end)[0]) for function in (minimum, steep, valley)}
    return min(suggestions.values()) / 10, lrs[int(smooth[:end].argmin())], suggestions


def find_lrs(learn: Learner) -> LRCurve:
    """Sweep over `SWEEP` with fastai's `lr_find`, which leaves the model as it was. Raises like `suggest_lrs`."""
    model_dir = learn.model_dir
    with tempfile.TemporaryDirectory() as learn.model_dir:  # where fastai keeps the weights in the meantime
        try:
            learn.lr_find(**SWEEP, show_plot=False, suggest_funcs=None)
        except (OSError, RuntimeError) as reason:
            if isinstance(reason, RuntimeError) and "inline_container" not in str(reason):  # torch.save's word for it
                raise
            place = tempfile.gettempdir()
            raise UserError(
                f"the LR finder has no room for the weights in {place}; make some, or give --lr_max"
            ) from None
    learn.model_dir = model_dir
    lrs, losses = [float(lr) for lr in learn.recorder.lrs], torch.stack(learn.recorder.step_losses).tolist()
    return LRCurve(lrs, losses, *suggest_lrs(lrs, losses))
