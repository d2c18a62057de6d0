"""Ctrl-C at any event of a fit, and what the Learner is like afterwards."""

import copy
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from conftest import small
from fastai.callback.all import ActivationStats, CSVLogger, MixUp
from fastai.vision.all import Callback, event, set_seed
from torch import nn

from cifar10.training.distributed import Distributed
from cifar10.training.lr_finder import find_lrs
from cifar10.training.strips import Strips
from train import get_dls

EVENTS = [name for name in vars(event) if not name.startswith("_") and name != "after_create"]
STEP = ("batch", "pred", "loss", "backward", "step")  # events of each step
FIRST, LAST = -1000, 1000  # orders
# After all callbacks at an event is before all at the next one; but at the first and last there is none.
PLACES = [(name, LAST) for name in EVENTS] + [(name, FIRST) for name in ("before_fit", "after_cancel_fit", "after_fit")]


class CtrlC(Callback):
    """Interrupts the fit at an event; at those of each step, in the second one."""

    def __init__(self, event: str, order: int):
        self.order, self.left = order, 2 if event.split("_")[-1] in STEP else 1
        setattr(self, event, self.stop)

    def stop(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def kept(learn) -> dict:
    """What no fit changes for good, even if it is interrupted."""
    modules = list(learn.model.modules())
    loaders = [vars(loader).get("share") for loader in learn.dls.loaders]
    transforms = [(t, getattr(t, "shard", None)) for loader in learn.dls.loaders for t in loader.after_batch.fs]
    return dict(
        modules=modules, kinds=[type(module) for module in modules], hooks=hooks(learn),
        trained=[p.requires_grad for p in learn.model.parameters()],
        gradients=[p.grad for p in learn.model.parameters() if p.grad is not None],
        loss_func=learn.loss_func, logger=learn.logger, cbs=list(learn.cbs), loaders=loaders, transforms=transforms,
        autocast=torch.is_autocast_enabled("cpu"), grad=torch.is_grad_enabled(), scaler=getattr(learn, "scaler", None),
        bar=hasattr(learn.progress, "mbar"), groups=[list(group) for group in learn.opt.param_lists],
    )  # fmt: skip


def hooks(learn) -> int:
    """How often a forward pass in training calls hooks of fastai's callbacks."""
    calls = ActivationStats.hook
    count = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ActivationStats, "hook", lambda self, *args: count.append(1) or calls(self, *args))
        learn.model.eval()(torch.randn(2, 3, 32, 32))
    return len(count)


def assert_same(one: dict, other: dict, when):
    for name, value in one.items():
        assert len(value) == len(other[name]) if isinstance(value, list) else value == other[name], (name, when)
        if isinstance(value, list):
            assert all(a is b or a == b for a, b in zip(value, other[name])), (name, when)


def numbers(learn) -> tuple:
    """Weights, running statistics, momentum and hyperparameters."""
    momentum = [{k: v for k, v in state.items() if v is not True} for _, _, state, _ in learn.opt.all_params()]
    return copy.deepcopy((learn.model.state_dict(), momentum, [dict(hyper) for hyper in learn.opt.hypers]))


def interrupt(learn, act, restored: bool):
    """Call `act` with a callback that interrupts it, at each event in turn, with the same Learner."""
    learn.fit(1, 0.01)
    before, values, stopped = kept(learn), numbers(learn), []
    for place in PLACES:
        learn.add_cb(ctrl_c := CtrlC(*place))
        with suppress(KeyboardInterrupt):
            act(learn)
        learn.remove_cb(ctrl_c)
        stopped += [place[0]] * (ctrl_c.left <= 0)
        assert_same(before, kept(learn), place)
        if restored:
            torch.testing.assert_close(numbers(learn), values, rtol=0, atol=0, msg=str(place))
    learn.fit(1, 0.01)
    assert_same(before, kept(learn), "a fit after all of them")
    assert {"before_fit", "before_batch", "after_loss", "before_step", "after_batch", "after_fit"} <= {*stopped}


FINDERS = {
    "lr_find": lambda learn: learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None),
    "find_lrs": find_lrs,
}


@pytest.mark.parametrize("finder", FINDERS)
def test_an_lr_finder_restores_weights_momentum_and_hyperparameters(shapes, tmp_path, monkeypatch, finder):
    monkeypatch.setattr("cifar10.training.lr_finder.sweep_steps", lambda batch_size: 6)
    monkeypatch.setattr("cifar10.training.lr_finder.suggest_lrs", lambda lrs, losses: (0, 1, {}))
    learn = small(get_dls(shapes, batch_size=16), path=tmp_path, freeze=(("prep", 0.0),))
    with learn.no_logging():
        interrupt(learn, FINDERS[finder], restored=True)
    assert not hasattr(learn, "lr_finder")


@pytest.mark.slow
def test_every_callback_undoes_what_it_changed_for_a_fit(shapes, tmp_path):
    """In bfloat16, with all tricks, and with callbacks of fastai's that replace something or register hooks."""
    tricks = dict(clip=0.1, l1=1e-4, sizes=((24, 0.5), (32, 1.0)), freeze=(("prep", 0.0), ("layer1", 0.0)))
    learn = small(get_dls(shapes, batch_size=16), precision="bf16", path=tmp_path, **tricks)
    learn.add_cb(Strips())

    def act(learn):
        learn.fit_one_cycle(1, 0.01, moms=(0.9, 0.8, 0.9), cbs=[MixUp(), CSVLogger(), ActivationStats()])

    interrupt(learn, act, restored=False)


def test_several_processes_leave_the_model_and_the_loaders_as_they_were(shapes, monkeypatch):
    """With a single process in the place of several."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        learn = small(get_dls(shapes, batch_size=16), freeze=(("prep", 0.0),))
        learn.add_cb(Distributed())
        interrupt(learn, lambda learn: learn.fit_one_cycle(1, 0.01), restored=False)
        assert {type(m) for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)} == {nn.BatchNorm2d}
    finally:
        dist.destroy_process_group()


def test_training_that_was_interrupted_goes_on_like_any_other(shapes):
    """From the weights and the momentum where it stopped, as if the Learner had been new."""
    set_seed(0)
    learn = small(get_dls(shapes, batch_size=16), freeze=(("layer1", 0.5),))
    with suppress(KeyboardInterrupt):
        learn.fit(2, 0.01, cbs=CtrlC("after_batch", LAST))
    weights = copy.deepcopy([learn.model.state_dict(), learn.opt.state_dict()])
    other = small(get_dls(shapes, batch_size=16), freeze=(("layer1", 0.5),))
    other.create_opt()
    for part, state in zip((other.model, other.opt), weights, strict=True):
        part.load_state_dict(state)
    losses = []
    for each in (learn, other):
        set_seed(1)
        each.dls.train.rng.seed(1)
        each.fit(2, 0.02)
        losses.append(torch.stack(each.recorder.step_losses))
    assert torch.equal(*losses)
