"""The one place where a Learner is built: model + recipe → optimizer, loss, callbacks, precision."""

from collections import namedtuple
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from fastai import learner
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import HookCallback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedLin, combine_scheds
from fastai.torch_core import get_model, norm_types
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, L, accuracy
from torch import nn

from cifar10.hardware import keep_freed_memory, resolve_precision
from cifar10.recipes import Recipe
from cifar10.signals import is_distributed
from cifar10.training.callbacks import EpochRecorder, Progress
from cifar10.training.distributed import Distributed
from cifar10.training.lr_finder import find_lrs, plot_lr_curve, restored
from cifar10.training.optim import Muon
from cifar10.training.strips import Strips
from cifar10.training.transfer import fit_head
from cifar10.training.tricks import (
    CountFlop,
    FreezeLayers,
    FreezeNormStats,
    GradientValueClip,
    L1Penalty,
    ProgressiveResize,
    TellEpoch,
)


class CPUMixedPrecision(MixedPrecision):
    """bfloat16 on the CPU: fastai's own callback autocasts on CUDA only."""

    name = "mixed_precision"  # the name that `load_learner` looks for

    def __init__(self):
        super().__init__(amp_mode="bf16")

    def before_fit(self):  # without fastai's, which warns that there is no GPU
        self.autocast, self.scales = torch.autocast("cpu", dtype=torch.bfloat16), L()
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=False)  # bfloat16 has the range of float32


def precision_callbacks(precision: str, device: torch.device) -> list[Callback]:
    if precision == "fp32":
        return []
    if device.type == "cuda":
        return [MixedPrecision(amp_mode=precision)]
    keep_freed_memory()  # in bf16 only: in fp32 the process would grow beyond 3 GiB
    return [CPUMixedPrecision(), *([Strips()] if torch.cpu.get_capabilities().get("amx_tile") else [])]


# Callbacks whose `after_fit` only undoes what they changed for the duration of a fit.
TEMPORARY = (ProgressCallback, MixedPrecision, HookCallback, FreezeLayers, TellEpoch, Strips, Distributed)


class Learner(learner.Learner):
    """fastai's Learner, but after an exception, including Ctrl-C, nothing carries over that would change the next fit.

    Only weights, momentum and hyperparameters stay where training stopped; an LR finder restores them as usual.
    The parameters in `fixed` are never trained, not even after `unfreeze`; `lr_scales` are factors for the learning
    rates of single parameters. Without further arguments, `fine_tune` and `lr_find` follow the recipe.
    Events go only to the callbacks that handle them; calling all of them would be slower.
    """

    fixed: Collection[nn.Parameter] = ()
    lr_scales: Mapping[nn.Parameter, float] = {}
    recipe: Recipe

    def __call__(self, event_name: str | list[str]):
        for name in L(event_name):
            for cb in self.cbs.sorted("order"):
                own = type(cb).__call__ is not Callback.__call__
                if own or hasattr(type(cb), name) or name in vars(cb) or name == "after_fit":
                    cb(name)

    def create_opt(self):
        super().create_opt()
        if isinstance(self.opt, Muon):  # not among the arguments of `opt_func`, which a summary prints
            self.opt.lr_scales = self.lr_scales

    def freeze_to(self, n: int):
        super().freeze_to(n)
        for p in self.fixed:
            p.requires_grad_(False)

    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        loss_func, logger = self.loss_func, self.logger
        with self.added_cbs(cbs), restored(self) if hasattr(self, "lr_finder") else nullcontext():
            try:
                super().fit(n_epoch, lr, wd, reset_opt=reset_opt, start_epoch=start_epoch)
            except BaseException:
                for cb in self.cbs:
                    if isinstance(cb, TEMPORARY):
                        cb.after_fit()
                self.loss_func = loss_func  # MixUp replaces it
                self.model.zero_grad()
                raise
            finally:
                self.logger = logger  # CSVLogger leaves the logger of the progress bar in place

    def fit_one_cycle(self, n_epoch, lr_max=None, div=25.0, div_final=1e5, pct_start=0.25, wd=None, moms=None, cbs=None,
                      anneal_strategy: str = "cos", **kwargs):  # fmt: skip
        """fastai's cycle; with `anneal_strategy="linear"`, learning rate and momentum change linearly."""
        if anneal_strategy == "cos":
            return super().fit_one_cycle(n_epoch, lr_max, div, div_final, pct_start, wd, moms, cbs, **kwargs)
        if anneal_strategy != "linear":
            raise ValueError(f"anneal_strategy is {anneal_strategy!r}; it must be 'cos' or 'linear'")
        if self.opt is None:
            self.create_opt()
        self.opt.set_hyper("lr", self.lr if lr_max is None else lr_max)
        peaks = np.array([hyper["lr"] for hyper in self.opt.hypers])

        def cycle(start, middle, end):
            return combine_scheds([pct_start, 1 - pct_start], [SchedLin(start, middle), SchedLin(middle, end)])

        scheds = dict(lr=cycle(peaks / div, peaks, peaks / div_final), mom=cycle(*(moms or self.moms)))
        self.fit(n_epoch, wd=wd, cbs=[ParamScheduler(scheds), *L(cbs)], **kwargs)

    def fine_tune(self, epochs, *args, cbs=None, **kwargs):
        """Fit the last layer by logistic regression, then train all layers for `epochs` in the recipe's cycle.

        With more arguments, like `base_lr`, and for a model without `fc`, it is fastai's method.
        """
        if args or kwargs or not hasattr(get_model(self.model), "fc"):
            return super().fine_tune(epochs, *args, cbs=cbs, **kwargs)
        recipe, lr = self.recipe, self.recipe.lr_max or self.lr
        self.unfreeze()
        fit_head(self)
        div = lr / recipe.lr_min if recipe.lr_min else 100
        settings = dict(pct_start=recipe.peak_epoch / recipe.epochs, anneal_strategy=recipe.anneal_strategy)
        self.fit_one_cycle(epochs, lr, div, 1e5 if recipe.annihilate else div, cbs=cbs, **settings)

    def lr_find(self, *args, show_plot: bool = True, **kwargs):
        """The sweep of train.py, which returns `lr_max`, `lr_min` and fastai's `minimum`, `steep` and `valley`.

        With arguments, the sweep and what it returns are fastai's.
        """
        if args or kwargs:
            return super().lr_find(*args, show_plot=show_plot, **kwargs)
        curve = find_lrs(self)
        if show_plot:
            plot_lr_curve(curve)
        values = dict(lr_max=curve.lr_max, lr_min=curve.lr_min) | curve.suggestions
        return namedtuple("SuggestedLRs", values)(**values)  # as in fastai

    def one_batch(self, i, b):  # fastai's leaves autocast on after an exception
        device = torch.device(self.dls.device).type
        before = torch.is_autocast_enabled(device)
        try:
            super().one_batch(i, b)
        finally:
            if torch.is_autocast_enabled(device) and not before and hasattr(self, "mixed_precision"):
                self.mixed_precision.autocast.__exit__(None, None, None)

    def add_cb(self, cb):
        if isinstance(cb, MixedPrecision) and hasattr(self, "mixed_precision"):  # `to_fp16()`, `to_bf16()`
            if torch.device(self.dls.device).type != "cuda":
                return self  # fastai's callback would do nothing
            self.remove_cb(self.mixed_precision)
        return super().add_cb(cb)

    def no_bar(self):  # fastai's would put its own progress bar back, not ours
        return self.removed_cbs(L(cb for cb in self.cbs if isinstance(cb, Progress)))


def build_learner(dls: DataLoaders, model: nn.Module, recipe: Recipe, precision: str = "auto", cbs=(),
                **kwargs) -> Learner:  # fmt: skip
    """A fastai Learner that trains `model` on `dls` with cross-entropy, as `recipe` says.

    `precision` is "auto" (the fastest), "fp32", "bf16" or "fp16". Raises `UserError` if the device does not support it.
    `kwargs` are arguments of fastai's Learner, like `path` or `splitter`; they override the recipe.
    """
    device = torch.device(dls.device)  # `dls.to("cpu")` makes it a string
    precision = resolve_precision(precision, device)
    norms: list = [m for m in model.modules() if isinstance(m, (*norm_types, nn.GroupNorm)) and m.weight is not None]
    for norm in norms:
        norm.weight.requires_grad_(recipe.train_norm_scales)
    optimizer = partial(
        Muon, lr=kwargs.get("lr", recipe.lr_max or 0.1),  # used when `fit` gets none; fastai's default is for Adam
        momentum=recipe.momentum, weight_decay=recipe.weight_decay, use_muon=recipe.optimizer == "muon",
        lr_scale=recipe.muon_lr_scale, ns_steps=recipe.ns_steps,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )  # fmt: skip
    # Convolutions run faster with the channels last, but not on an Apple GPU.
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    model = model.to(device, memory_format=layout)  # type: ignore
    callbacks = [TrainEvalCallback(), EpochRecorder(), learner.CastToTensor(), Progress(), TellEpoch()]
    callbacks += precision_callbacks(precision, device)
    if recipe.clip:
        callbacks.append(GradientValueClip(recipe.clip))
    if recipe.l1:
        callbacks.append(L1Penalty(recipe.l1))
    if len(recipe.sizes) > 1:
        callbacks.append(ProgressiveResize(recipe))
    if recipe.freeze:
        callbacks.append(FreezeLayers(recipe))
    if not recipe.train_norm_stats:
        callbacks.append(FreezeNormStats())
    callbacks.append(CountFlop())
    if is_distributed():
        callbacks.append(Distributed())
    settings = dict(
        loss_func=CrossEntropyLossFlat(label_smoothing=recipe.label_smoothing),
        opt_func=optimizer,
        metrics=accuracy,
        moms=(recipe.momentum,) * 3,  # the assignment cycles only the learning rate
        default_cbs=False,
        cbs=[*callbacks, *L(cbs)],
    )
    learn = Learner(dls, model, **(settings | kwargs))
    learn.recipe, learn.precision = replace(recipe, lr_max=kwargs.get("lr", recipe.lr_max)), precision
    learn.fixed = [p for p in model.parameters() if not p.requires_grad]
    learn.lr_scales = {norm.bias: recipe.norm_bias_lr_scale for norm in norms if recipe.norm_bias_lr_scale != 1}
    return learn
