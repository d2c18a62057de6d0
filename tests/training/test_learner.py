"""The Learner: schedule, reproducibility, precision, and what fastai users expect of it."""

import itertools
from dataclasses import replace

import fastai.learner
import numpy as np
import pytest
import torch
from conftest import ROOT, make_images, small
from fastai.vision.all import Adam, Callback, event, load_learner, set_seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from augment import AlternatingFlip, Cutout, FlipLR, RandomCrop
from cifar10.errors import UserError
from cifar10.files import read_csv
from cifar10.hardware import resolve_precision
from cifar10.recipes import ASSIGNMENT, RECIPES
from cifar10.training import callbacks
from cifar10.training.callbacks import StopAtNaN
from cifar10.training.learner import Learner, build_learner
from cifar10.training.optim import Muon
from model import ResNet
from train import fit, get_dls, get_learner

CPU = torch.device("cpu")


@pytest.mark.slow
def test_schedule_of_the_notebook(tmp_path):
    """lr_max 0.0416, div 8, annihilation, 98 steps an epoch: the notebook's learning rate after each epoch."""
    expected = read_csv(ROOT / "results/notebook/log.csv")["lr_after_last_batch"]
    dls = get_dls(make_images(tmp_path / "images", train=49, test=1, size=8), size=16, batch_size=1)
    learn = build_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), ASSIGNMENT, "fp32")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(24, 0.0416, div=8, div_final=1e5, pct_start=5 / 24)
    ours = [float(lr) for lr in learn.recorder.lrs[len(dls.train) - 1 :: len(dls.train)]]
    np.testing.assert_allclose(ours, expected, atol=3e-4)


def test_the_rate_starts_and_ends_at_lr_min(dls):
    learn = small(dls)
    learn.fit_one_cycle(8, 0.1, div=50, div_final=50, pct_start=2 / 8)
    lrs = [float(lr) for lr in learn.recorder.lrs]
    assert len(lrs) == 24 and lrs[0] == pytest.approx(0.002) and max(lrs) == pytest.approx(0.1)
    assert lrs.index(max(lrs)) == 6 and lrs[-1] < 0.005
    assert set(learn.recorder.hps["mom"]) == {0.85}


def test_a_linear_cycle(dls):
    """Straight up to lr_max, straight down to near zero, or to lr_min; the same when it is resumed."""
    recipe = replace(RECIPES["best"], epochs=4, peak_epoch=1, lr_min=0.02, lr_max=0.1)
    for annihilate, end in ((True, 1e-6), (False, 0.02)):
        learn = small(dls)
        fit(learn, replace(recipe, annihilate=annihilate))
        up, down = torch.linspace(0.02, 0.1, 4), torch.linspace(0.1, end, 10)
        assert [float(lr) for lr in learn.recorder.lrs] == pytest.approx(
            [*up[:3].tolist(), *down[:9].tolist()], abs=1e-4
        )


def test_a_linear_cycle_of_each_group_and_of_the_momentum(dls):
    """With a learning rate of their own for the layers, and with fastai's arguments by position."""
    learn = small(dls)
    learn.fit_one_cycle(
        4, slice(0.001, 0.1), 5, 10, 0.25, 0.3, (0.9, 0.8, 0.9), [watch := Watch()], anneal_strategy="linear"
    )
    shape = [0.2, *np.linspace(0.2, 1, 4)[1:], *np.linspace(1, 0.1, 10)[1:-1]]
    for group, lr in enumerate((0.001, 0.01, 0.1)):
        assert [hypers[group]["lr"] for hypers in watch.hypers] == pytest.approx([lr * part for part in shape])
    momentum = [0.9, *np.linspace(0.9, 0.8, 4)[1:], *np.linspace(0.8, 0.9, 10)[1:-1]]
    assert [hypers[0]["mom"] for hypers in watch.hypers] == pytest.approx(momentum) and learn.opt.hypers[0]["wd"] == 0.3
    assert [*learn.recorder.hps] == ["lr", "mom"]
    with pytest.raises(ValueError, match="anneal_strategy is 'exp'; it must be 'cos' or 'linear'"):
        learn.fit_one_cycle(1, anneal_strategy="exp")


class Watch(Callback):
    """Note the hyperparameters of each training step."""

    order, run_valid = 1000, False

    def before_fit(self):
        self.hypers = []

    def before_batch(self):
        self.hypers.append([dict(hyper) for hyper in self.opt.hypers])


@pytest.mark.parametrize("options", [{}, {"opt_func": Adam}], ids=["Muon", "Adam"])
def test_what_the_recipe_fixes_is_never_trained(dls, tmp_path, options):
    """Whitening filters and scales of batch normalization: also after unfreezing, and after loading while frozen."""
    learn = get_learner(dls, "fast", width=2, precision="fp32", path=tmp_path, **options)
    fixed = {name: p.detach().clone() for name, p in learn.model.named_parameters() if not p.requires_grad}
    assert len(fixed) == 9
    learn.freeze()
    learn.export()
    for each in (learn, load_learner(tmp_path / "export.pkl")):
        each.dls = dls
        each.unfreeze()
        assert {name for name, p in each.model.named_parameters() if not p.requires_grad} == fixed.keys()
        each.fit(1, 0.01)
        assert all(torch.equal(p, fixed[name]) for name, p in each.model.named_parameters() if name in fixed)
        assert len(each.opt.all_params()) == len(list(each.model.parameters()))


def test_every_event_reaches_the_callbacks(dls):
    """The same ones in the same order as with fastai's Learner, whether the class or the object handles them."""

    def events(learner_class) -> list[str]:
        seen, learn = [], small(dls)
        learn.__class__ = learner_class
        handlers = {name: lambda name=name: seen.append(f"class {name}") for name in vars(event) if name[0] != "_"}
        by_class = type("ByClass", (Callback,), {name: staticmethod(call) for name, call in handlers.items()})()
        by_object = Callback()
        by_object.after_batch = lambda: seen.append("object after_batch")
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0.01, cbs=[by_class, by_object])
        return seen

    ours = events(Learner)
    assert ours == events(fastai.learner.Learner) and len({*ours}) > 15 and ours.count("object after_batch") > 3


def test_same_seed_same_weights(shapes):
    def weights(seed):
        set_seed(seed, reproducible=True)
        learn = small(get_dls(shapes, batch_size=16))
        learn.fit_one_cycle(2, 0.05)
        return learn.model.state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_the_learner_learns_and_answers_like_any_fastai_learner(dls, tmp_path):
    from fastai.vision.all import ClassificationInterpretation
    from matplotlib import pyplot as plt

    learn = small(dls, width=8, path=tmp_path)
    learn.fit_one_cycle(8, 0.1)
    assert learn.recorder.values[-1][2] > 0.8  # 1.0 with each of 12 seeds
    probabilities, targets = learn.get_preds()
    assert probabilities.shape == (16, 2) and torch.allclose(probabilities.sum(1), torch.ones(16))
    augmented, same_targets = learn.tta(n=2)
    assert augmented.shape == (16, 2) and torch.equal(targets, same_targets)
    file = dls.valid_ds.items[0]
    for item in (file, dls.valid_ds[0][0], np.array(dls.valid_ds[0][0])):
        label, number, each = learn.predict(item)
        assert label == dls.vocab[number] and torch.allclose(each, probabilities[0], atol=1e-5)
    dls.show_batch()
    dls.train.show_batch(unique=True)
    learn.show_results()
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == 16
    interp.plot_confusion_matrix()
    interp.plot_top_losses(4)
    learn.save("weights")
    learn.load("weights")
    plt.close("all")
    summary = learn.summary()
    assert f"Total params: {sum(p.numel() for p in learn.model.parameters()):,}" in summary
    assert "Muon'>, lr=0.1, momentum=0.85, " in summary and "tensor" not in summary.lower().replace("casttotensor", "")


def test_export_holds_no_image(dls, tmp_path):
    learn = small(dls, path=tmp_path)
    expected = learn.predict(dls.valid_ds.items[0])[2]
    learn.export()
    assert (tmp_path / "export.pkl").stat().st_size < 4 * 26_146 + 80_000
    again = load_learner(tmp_path / "export.pkl")
    assert torch.allclose(again.predict(dls.valid_ds.items[0])[2], expected, atol=1e-5)


def test_precisions(monkeypatch):
    assert [resolve_precision(p, CPU) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(UserError, match="on cpu it must be auto, fp32 or bf16"):
        resolve_precision("fp16", CPU)
    with pytest.raises(UserError, match="it must be auto, fp32 or bf16"):
        resolve_precision("fp64", CPU)
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_bf16=has_bf16: {"avx512_bf16": has_bf16})
        assert resolve_precision("auto", CPU) == expected


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(dls):
    learn = small(dls, precision="bf16")
    seen = []
    learn.model.layer2[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    learn.fit(1, 0.01)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert learn.get_preds()[0].dtype == torch.float32


def test_channels_last(dls):
    assert small(dls).model.layer1[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_on_an_apple_gpu(dls, monkeypatch):
    """In fp32 and in PyTorch's usual memory layout, with the CPU in the GPU's place."""
    device = torch.device("mps")
    monkeypatch.setattr(type(dls), "device", property(lambda dls: device))
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, *args, **kwargs: moved.append((args, kwargs)) or model)
    learn = small(dls, precision="auto")
    assert moved == [((device,), {"memory_format": torch.contiguous_format})] and learn.precision == "fp32"
    with pytest.raises(UserError, match="on mps it must be auto, fp32"):
        resolve_precision("bf16", device)


def test_muon_learns(dls):
    learn = get_learner(dls, RECIPES["fast"], width=8, precision="fp32")
    learn.fit_one_cycle(12, 0.3)
    assert isinstance(learn.opt, Muon) and learn.recorder.values[-1][2] > 0.8  # 1.0 with each of 12 seeds


class Reads(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor, which on a GPU makes the host wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("recipe", RECIPES)
def test_few_steps_fetch_a_number_from_the_device(digits, monkeypatch, recipe):
    counts = []
    monkeypatch.setattr(callbacks, "should_sync", lambda device, step: step % 10 == 0)
    learn = build_learner(digits, ResNet(width=4), RECIPES[recipe])
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: pytest.fail("a copy to the host"))
    with Reads() as reads:
        learn.fit(1, 0.01, cbs=[StopAtNaN(), Steps(lambda: counts.append(reads.count))])
    fetched = [after > before for before, after in itertools.pairwise(counts)]  # from the second step
    assert fetched == [step % 10 == 0 for step in range(1, len(digits.train))]


class Steps(Callback):
    order, run_valid = 1000, False

    def __init__(self, function):
        self.function = function

    def after_batch(self):
        self.function()


# ---- Every hyperparameter arrives


def test_the_recipe_reaches_the_learner(dls):
    recipe = replace(ASSIGNMENT, momentum=0.7, ns_steps=2, label_smoothing=0.3, weight_decay=0.02, muon_lr_scale=0.4)
    learn = get_learner(dls, replace(recipe, logit_scale=0.5), width=2, precision="fp32")
    learn.create_opt()
    optimizer = learn.opt
    assert {hyper["mom"] for hyper in optimizer.hypers} == {0.7} and set(learn.moms) == {0.7}
    assert optimizer.ns_steps == 2 and optimizer.lr_scale == 0.4 and optimizer.use_muon
    assert {hyper["wd"] for hyper in optimizer.hypers} == {0.02}
    assert learn.loss_func.func.label_smoothing == 0.3 and learn.model.logit_scale == 0.5
    assert not optimizer.lr_scales and all(norm.weight.requires_grad for norm in norms(learn.model))
    learn = get_learner(dls, replace(recipe, optimizer="sgd", norm_bias_lr_scale=5, train_norm_scales=False), width=2)
    learn.create_opt()
    assert not learn.opt.use_muon and not any(norm.weight.requires_grad for norm in norms(learn.model))
    assert learn.opt.lr_scales == {norm.bias: 5 for norm in norms(learn.model)} and len(norms(learn.model)) == 8


def norms(model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizer_multiplies_in_the_precision_of_the_learner(dls, precision):
    learn = small(dls, precision=precision)
    learn.create_opt()
    assert learn.opt.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def test_the_recipe_reaches_the_transforms(shapes):
    dls = get_dls(shapes, crop_padding=2, crop_mode="edge", cutout=6, flip=False, batch_size=8)
    crop, cutout = (next(t for t in dls.train.after_batch.fs if isinstance(t, kind)) for kind in (RandomCrop, Cutout))
    assert (crop.padding, crop.pad_mode, cutout.height, cutout.width, dls.bs) == (2, "edge", 6, 6, 8)
    dls = get_dls(shapes, replace(ASSIGNMENT, cutout=4), batch_size=8)
    assert dls.bs == 8 and next(t for t in dls.train.after_batch.fs if isinstance(t, Cutout)).height == 4
    dls = get_dls("digits", "faster")
    flips = (FlipLR, AlternatingFlip)
    assert dls.bs == 64 and not [t for t in dls.train.after_batch.fs if isinstance(t, (Cutout, *flips))]
    for alternate, kind in enumerate(flips):
        dls = get_dls("digits", "faster", flip=True, alternate_flips=bool(alternate))
        assert [type(t) for t in dls.train.after_batch.fs if isinstance(t, flips)] == [kind]
    dls = get_dls("digits", "faster", flip=True, weighted=True)
    assert [type(t) for t in dls.train.after_batch.fs if isinstance(t, flips)] == [FlipLR]
