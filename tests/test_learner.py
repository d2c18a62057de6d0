import itertools
import math
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_images
from fastai.vision.all import Callback, Learner, load_learner, set_seed
from torch.utils._python_dispatch import TorchDispatchMode

import learner
from data import get_dls
from errors import UserError
from learner import (
    SWEEP,
    StopAtNaN,
    TimeEstimate,
    ValidateLast,
    find_lrs,
    get_learner,
    resolve_precision,
    suggest_lrs,
)
from muon import Muon
from recipes import RECIPES
from runs import read_csv

CPU = torch.device("cpu")


@pytest.fixture
def dls(shapes):
    set_seed(1)
    return get_dls(shapes, bs=16)


def small(dls, **kwargs) -> Learner:
    return get_learner(dls, width=4, **kwargs)


# ---- LR finder


def curve(name: str) -> tuple[list[float], list[float]]:
    columns = read_csv(ROOT / name)
    return columns["lr"], columns["loss"]


HEALTHY = ("results/cifar10-assignment/lr_find.csv", "tests/curves/cifar10_width32.csv")


@pytest.mark.parametrize("name", HEALTHY)
def test_lrs_of_a_healthy_curve(name):
    lrs, losses = curve(name)
    lr_min, lr_max, suggestions = suggest_lrs(lrs, losses)
    assert 0 < lr_min < lr_max and set(suggestions) == {"minimum", "steep", "valley"}
    assert 0.05 < lr_max < 0.6 and lr_max == pytest.approx(10 * suggestions["minimum"])
    before = [loss for lr, loss in zip(lrs, losses) if lr < lr_max]
    assert np.convolve(before, np.ones(5) / 5, "valid").max() <= 1.1 * losses[0]  # apart from single steps


def blow_up(up_to: float, at: float, flat: float = 2.3, n: int = 480) -> tuple[list[float], list[float]]:
    """The shape of the notebook's curve: flat, then a peak of the loss, then down again."""
    lrs = np.linspace(1e-3, 0.5, n)
    peak = up_to * np.exp(-((np.log(lrs / (1.5 * at)) / 0.3) ** 2))
    noise = np.random.default_rng(0).normal(0, 0.02, n)
    return lrs.tolist(), (flat + peak + noise).tolist()


def infinite(at: float) -> tuple[list[float], list[float]]:
    """Flat, then infinite."""
    lrs, losses = blow_up(0, at)
    return lrs, [float("inf") if lr > at else loss for lr, loss in zip(lrs, losses)]


@pytest.mark.parametrize(
    ("lrs", "losses", "blown"),
    [
        (*blow_up(87, 0.03), 0.03),
        (*blow_up(87, 0.2), 0.2),
        (*infinite(0.3), 0.3),
    ],
    ids=["notebook", "late", "infinite"],
)
def test_no_suggestion_at_or_behind_a_blow_up(lrs, losses, blown):
    lr_min, lr_max, suggestions = suggest_lrs(lrs, losses)
    assert max(lr_min, lr_max, *suggestions.values()) < blown


@pytest.mark.parametrize(
    ("lrs", "losses"),
    [curve("tests/curves/cifar10_plain.csv"), (np.geomspace(1e-3, 1, 50).tolist(), [2.3] * 4 + [float("nan")] * 46)],
    ids=["recorded", "not a number"],
)
def test_nothing_is_suggested_where_everything_blows_up(lrs, losses):
    with pytest.raises(UserError, match=r"blows up at a learning rate.* give --lr_max"):
        suggest_lrs(lrs, losses)


def test_find_lrs_leaves_the_model_as_it_was(dls):
    learn = small(dls)
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    found = find_lrs(learn)
    assert 0 < found.lr_min < found.lr_max <= SWEEP["end_lr"]
    assert found.lrs[0] == pytest.approx(SWEEP["start_lr"]) and len(found.lrs) == len(found.losses)
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())


def test_find_lrs_leaves_the_learners_folder(dls):
    learn = small(dls)
    find_lrs(learn)
    assert learn.model_dir == "models"


# ---- One cycle


def test_schedule_of_the_notebook(tmp_path):
    """lr_max 0.0416, div 8, annihilation, 98 steps an epoch: the notebook's learning rate after each epoch."""
    expected = read_csv(ROOT / "results/notebook/log.csv")["lr_after_last_batch"]
    dls = get_dls(make_images(tmp_path / "images", train=49, test=1), bs=1)
    learn = get_learner(dls, width=1, norm="layer")
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
    assert set(learn.recorder.hps["mom"]) == {0.9}


# ---- Recorder


def test_rows_hold_the_means_over_the_images(dls):
    learn = small(dls)
    learn.fit_one_cycle(2, 0.01)
    recorder, values = learn.recorder, list(learn.recorder.values)
    assert list(recorder.metric_names) == [
        "epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "time",
    ]  # fmt: skip
    losses = torch.stack(recorder.step_losses)
    assert len(losses) == 6 and len(recorder.seconds) == 2
    assert values[1][1] == pytest.approx(losses[3:].mean().item(), rel=1e-5)
    probabilities, targets, each = learn.get_preds(with_loss=True)
    assert values[1][3] == pytest.approx(each.mean().item(), rel=1e-5)
    assert values[1][4] == pytest.approx((probabilities.argmax(1) == targets).float().mean().item())


def test_same_seed_same_weights(shapes):
    def weights(seed):
        set_seed(seed, reproducible=True)
        learn = small(get_dls(shapes, bs=16))
        learn.fit_one_cycle(2, 0.05)
        return learn.model.state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


# ---- What a fastai user expects of a Learner


def test_the_learner_learns_and_answers_like_any_fastai_learner(dls, tmp_path):
    from fastai.vision.all import ClassificationInterpretation
    from matplotlib import pyplot as plt

    learn = get_learner(dls, width=8, path=tmp_path)
    learn.fit_one_cycle(8, 0.1)
    assert learn.recorder.values[-1][4] > 0.9
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
    assert f"Total params: {sum(p.numel() for p in learn.model.parameters()):,}" in learn.summary()


def test_lr_find_after_training(dls, tmp_path):
    learn = small(dls, path=tmp_path)
    learn.fit_one_cycle(1, 0.01)
    assert learn.lr_find(num_it=20, show_plot=False).valley > 0


# ---- Optimiser, options, precision


def test_weight_decay_is_for_weights_only(dls):
    learn = small(dls)
    learn.create_opt()
    decayed, free = learn.opt.opt.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (learner.WEIGHT_DECAY, 0)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(learn.model.parameters()))
    assert isinstance(learn.opt.opt, Muon) and decayed["momentum"] == 0.9


def gradients(learn) -> torch.Tensor:
    """All gradients of one training step."""
    kept = []

    class Keep(learner.Callback):
        order = 100

        def before_step(self):
            kept.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))

    set_seed(3)
    learn.dls.train.rng.seed(3)
    learn.fit(1, 0.0, cbs=Keep())
    return kept[0]


def test_clip_limits_each_value(dls):
    assert gradients(small(dls)).abs().max() > 0.01
    assert gradients(small(dls, clip=0.01)).abs().max() == pytest.approx(0.01)


def test_clip_comes_after_the_scaling_of_fp16(dls):
    learn = small(dls, clip=0.01)
    order = [type(cb).__name__ for cb in (learn.cbs + learner.MixedPrecision()).sorted("order")]
    assert order.index("GradientValueClip") > order.index("MixedPrecision")


def test_export_holds_no_image(dls, tmp_path):
    learn = small(dls, path=tmp_path)
    expected = learn.predict(dls.valid_ds.items[0])[2]
    learn.export()
    assert (tmp_path / "export.pkl").stat().st_size < 4 * 26_146 + 60_000
    again = load_learner(tmp_path / "export.pkl")
    assert torch.allclose(again.predict(dls.valid_ds.items[0])[2], expected, atol=1e-5)


def test_l1_adds_its_factor_to_each_gradient(dls):
    set_seed(5)
    plain = small(dls)
    set_seed(5)
    penalised = small(dls, l1=0.5)
    signs = torch.cat([p.detach().sign().flatten() for p in plain.model.parameters()])
    torch.testing.assert_close(gradients(penalised) - gradients(plain), 0.5 * signs, atol=1e-4, rtol=1e-3)


def test_precisions(monkeypatch):
    assert [resolve_precision(p, CPU) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
        resolve_precision("fp16", CPU)
    with pytest.raises(UserError, match="must be one of"):
        resolve_precision("fp64", CPU)
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
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


# ---- Recipes


class Sizes(Callback):
    """The side of each batch's images."""

    order = 1000

    def __init__(self):
        self.train, self.valid = [], []

    def before_batch(self):
        (self.train if self.training else self.valid).append(self.x.shape[-1])


@pytest.mark.parametrize("recipe", ["fast", "faster"])
def test_images_grow_and_validation_sees_whole_ones(dls, recipe):
    learn = get_learner(dls, width=4, recipe=recipe)
    learn.fit_one_cycle(10, 0.1, cbs=[sizes := Sizes(), ValidateLast()])
    expected = [RECIPES[recipe].side(step / 30) for step in range(30)]
    assert sizes.train == expected and sizes.train[0] == 24 and sizes.train[-1] == 32
    assert sizes.valid == [32]
    *before, last = learn.recorder.values
    assert len(before) == 9 and all(math.isnan(row[3]) and math.isnan(row[4]) and row[1] > 0 for row in before)
    assert last[3] > 0 and last[4] >= 0.5


def test_muon_learns(dls):
    learn = get_learner(dls, width=8, recipe="fast")
    learn.fit_one_cycle(12, 0.3)
    assert isinstance(learn.opt.opt, Muon) and learn.recorder.values[-1][4] == 1


# ---- What a GPU would have to wait for


class Reads(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor, which on a GPU makes the host wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("recipe", RECIPES)
def test_few_steps_fetch_a_number_from_the_device(digits, monkeypatch, recipe):
    counts = []
    monkeypatch.setattr(learner, "may_look", lambda device, step: step % 10 == 0)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: pytest.fail("a copy to the host"))
    learn = get_learner(digits, width=4, recipe=recipe)
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


# ---- Time


def test_the_time_estimate_speaks_once_and_is_right(dls, capsys):
    dls = get_dls(dls.train.table.folder, bs=4)
    learn = get_learner(dls, width=16)
    learn.remove_cb(learner.ProgressCallback)
    learn.add_cb(TimeEstimate(RECIPES["assignment"], epochs=6))
    said_seconds = []
    learn.time_estimate.say = lambda step, epochs, seconds: said_seconds.append(seconds)
    start = time.perf_counter()
    with learn.no_logging():
        learn.fit_one_cycle(6, 0.01)
    (seconds,) = said_seconds
    assert 0.5 < seconds / (time.perf_counter() - start) < 2


@pytest.mark.parametrize(("epochs", "seconds", "short"), [(24, 7200, 4), (24, 3000, None), (1, 7200, None)])
def test_a_long_time_on_a_cpu_comes_with_a_short_command(dls, capsys, epochs, seconds, short):
    estimate = TimeEstimate(RECIPES["assignment"], epochs, sweep=50)
    estimate.learn = small(dls)
    estimate.learn.remove_cb(learner.ProgressCallback)
    estimate.say(step=3.0, epochs=epochs, seconds=seconds)
    said = capsys.readouterr().out
    assert f"{epochs} epoch" in said and "and the LR finder will take about" in said
    assert ("--epochs 4 --peak_epoch 1 takes about 20:00" in said) == bool(short)
