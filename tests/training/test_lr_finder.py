"""The LR finder: its rule on recorded and constructed curves, and what it leaves behind."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, small
from fastai.vision.all import set_seed

from cifar10.errors import UserError
from cifar10.files import read_csv
from cifar10.training.lr_finder import END, START, find_lrs, smoothed, suggest_lrs, sweep_steps
from train import get_learner


def curve(name: str) -> tuple[list[float], list[float]]:
    columns = read_csv(ROOT / name)
    return columns["lr"], columns["loss"]


HEALTHY = ("results/cifar10-assignment/lr_find.csv", "tests/curves/cifar10_width32.csv")


@pytest.mark.parametrize("name", HEALTHY)
def test_lrs_of_a_healthy_curve(name):
    lrs, losses = curve(name)
    lr_min, lr_max, suggestions = suggest_lrs(lrs, losses)
    assert 0 < lr_min < lr_max and set(suggestions) == {"minimum", "steep", "valley"}
    assert 0.05 < lr_max < 0.6 and lr_max == pytest.approx(10 * suggestions["minimum"], rel=0.3)
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


def test_a_low_loss_behind_a_rise_is_not_the_answer():
    """Nine images of ten are of one class: a model that has been destroyed learns to predict it again."""
    lrs = np.geomspace(1e-3, 3, 200)
    losses = np.interp(np.log10(lrs), [-3, -1.5, -1, -0.5, 0.4], [1.6, 1.1, 1.4, 1.3, 1.05])
    _, lr_max, suggestions = suggest_lrs(lrs.tolist(), losses.tolist())
    assert lr_max == pytest.approx(10**-1.5, rel=0.2) and max(suggestions.values()) < 0.1


def test_another_seed_gives_about_the_same():
    """The lowest losses alone are at learning rates from 0.014 to 0.075."""
    curves = read_csv(ROOT / "tests/curves/small_batches.csv")
    lrs = curves.pop("lr")
    low = sum(lr < 0.1 for lr in lrs)  # where no curve has blown up yet
    lowest = [lrs[smoothed(losses)[:low].argmin()] for losses in curves.values()]
    found = [suggest_lrs(lrs, losses)[1] for losses in curves.values()]
    assert len(found) == 5 and max(lowest) / min(lowest) > 5 and max(found) / min(found) < 2


@pytest.mark.parametrize(
    ("lrs", "losses"),
    [curve("tests/curves/cifar10_plain.csv"), (np.geomspace(1e-3, 1, 50).tolist(), [2.3] * 4 + [float("nan")] * 46)],
    ids=["recorded", "not a number"],
)
def test_nothing_is_suggested_where_everything_blows_up(lrs, losses):
    with pytest.raises(UserError, match=r"blows up at a learning rate.* set --lr_max"):
        suggest_lrs(lrs, losses)


def momentum(learn) -> dict[str, torch.Tensor]:
    """Of each parameter that has been trained, by its name."""
    state = {name: learn.opt.state[p] for name, p in learn.model.named_parameters()}
    return {name: values["momentum_buffer"] for name, values in state.items() if "momentum_buffer" in values}


def test_find_lrs_leaves_the_model_as_it_was(dls):
    learn = small(dls)
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    found = find_lrs(learn)
    assert 0 < found.lr_min < found.lr_max <= END
    assert found.lrs[0] == pytest.approx(START) and len(found.lrs) == len(found.losses)
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())


def test_find_lrs_writes_nothing_and_leaves_a_fresh_optimizer(dls, tmp_path):
    learn = small(dls, path=tmp_path)
    find_lrs(learn)
    assert list(tmp_path.iterdir()) == [] and momentum(learn) == {}


def test_find_lrs_restores_everything(dls):
    """After training: weights, running statistics and momentum."""
    learn = small(dls)
    learn.fit_one_cycle(1, 0.01)
    before = copy.deepcopy([learn.model.state_dict(), momentum(learn)])
    find_lrs(learn)
    after = [learn.model.state_dict(), momentum(learn)]
    for values, same in zip(before, after, strict=True):
        assert values and values.keys() == same.keys()
        assert all(torch.equal(value, same[name]) for name, value in values.items())
    assert not hasattr(learn, "lr_finder")


def test_lr_find_after_training(dls, tmp_path):
    learn = small(dls, path=tmp_path)
    learn.fit_one_cycle(1, 0.01)
    assert learn.lr_find(num_it=20, show_plot=False).valley > 0


def test_small_batches_are_seen_for_more_steps(dls):
    """As many images as in a sweep with batches of 64; large batches have the assignment's 50 steps."""
    assert [sweep_steps(bs) for bs in (512, 64, 32, 16)] == [50, 50, 100, 200]
    assert len(find_lrs(small(dls)).lrs) == 200


@pytest.mark.slow
def test_the_first_value_of_a_learners_lr_find(digits):
    """It is that of train.py; fastai's suggestions follow, and with arguments, all is fastai's."""
    found = []
    for find in (lambda learn: learn.lr_find(show_plot=False), find_lrs):
        set_seed(0)
        digits.train.rng.seed(0)
        found.append(find(get_learner(digits, width=2, precision="fp32")))
    values, curve = found
    assert values._fields == ("lr_max", "lr_min", "minimum", "steep", "valley")
    assert values == (curve.lr_max, curve.lr_min, *curve.suggestions.values())
