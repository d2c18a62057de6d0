"""Each trick does what its name says, and nothing else."""

from dataclasses import replace

import pytest
import torch
from conftest import small
from fastai.vision.all import Callback, MixedPrecision, set_seed
from torch import nn

from augment import AlternatingFlip
from cifar10.recipes import ASSIGNMENT
from cifar10.training.tricks import count_flop
from model import ResNet
from train import get_dls, get_learner


def gradients(learn) -> torch.Tensor:
    """All gradients of one training step."""
    kept = []

    class Keep(Callback):
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
    order = [type(cb).__name__ for cb in (learn.cbs + MixedPrecision()).sorted("order")]
    assert order.index("GradientValueClip") > order.index("MixedPrecision")


def test_l1_adds_its_factor_to_each_gradient(dls):
    set_seed(5)
    plain = small(dls)
    set_seed(5)
    penalised = small(dls, l1=0.5)
    signs = torch.cat([p.detach().sign().flatten() for p in plain.model.parameters()])
    torch.testing.assert_close(gradients(penalised) - gradients(plain), 0.5 * signs, atol=1e-4, rtol=1e-3)


class Look(Callback):
    """What `look` sees in the Learner before each training step."""

    order, run_valid = 1000, False

    def __init__(self, look):
        self.look, self.seen = look, []

    def before_batch(self):
        self.seen.append(self.look(self.learn))


def trained_layers(learn) -> set[str]:
    return {name.split(".")[0] for name, p in learn.model.named_parameters() if p.requires_grad}


def test_layers_are_frozen_from_their_part_on_and_afterwards_as_before(dls):
    learn = small(dls, freeze=(("prep", 0.5), ("layer1", 0.75)))
    learn.model.prep[0].weight.requires_grad_(False)  # stays so
    weights = {name: p.clone() for name, p in learn.model.named_parameters()}
    learn.fit(4, 0.01, cbs=[look := Look(trained_layers)])
    everything = {"prep", "layer1", "layer2", "layer3", "fc"}
    assert look.seen == [everything] * 6 + [everything - {"prep"}] * 3 + [everything - {"prep", "layer1"}] * 3
    assert [name for name, p in learn.model.named_parameters() if not p.requires_grad] == ["prep.0.weight"]
    assert not torch.equal(weights["layer1.0.weight"], learn.model.layer1[0].weight)  # was trained before
    frozen = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    learn = small(dls, freeze=(("prep", 0), ("layer1", 0)))
    learn.model.load_state_dict(frozen, strict=False)
    learn.fit(1, 0.01)
    changed = {n.split(".")[0] for n, p in learn.model.named_parameters() if not torch.equal(p, frozen[n])}
    assert changed == {"layer2", "layer3", "fc"}


def test_the_operations_of_the_whole_model():
    """As by hand: two for each multiply-add, three times, but no gradient of the images."""
    model, macs = ResNet(), 0
    sides = [32, 32, 16, 16, 16, 8, 4, 4]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    macs = [conv.weight.numel() * side**2 for conv, side in zip(convs, sides, strict=True)] + [model.fc.weight.numel()]
    by_hand = 2 * (3 * sum(macs) - macs[0])
    assert count_flop(model, (3, 32, 32)) == by_hand == 2_272_032_768
    model.prep[0].weight.requires_grad_(False)
    assert count_flop(model, (3, 32, 32)) == by_hand - 2 * macs[0]
    model.prep.requires_grad_(False)
    model.layer1.requires_grad_(False)
    first = sum(macs[:4])
    assert count_flop(model, (3, 32, 32)) == by_hand - 2 * (2 * first - macs[0]) - 2 * macs[4]
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_operations_are_counted_by_size_and_by_what_is_trained(dls):
    learn = small(dls, sizes=((16, 0.5), (32, 1.0)), freeze=(("prep", 0.75), ("layer1", 0.75)))
    learn.fit(4, 0.01)
    model = learn.model
    whole = count_flop(model, (3, 16, 16)), count_flop(model, (3, 32, 32))
    model.prep.requires_grad_(False)
    model.layer1.requires_grad_(False)
    part = count_flop(model, (3, 32, 32))
    assert learn.recorder.flop == 48 * (2 * whole[0] + whole[1] + part)
    learn.validate()
    learn.get_preds()
    assert learn.recorder.flop == 0  # training only


def test_the_flip_alternates_during_a_fit(shapes):
    learn = small(get_dls(shapes, alternate_flips=True, batch_size=16))
    flip = next(tfm for tfm in learn.dls.train.after_batch.fs if isinstance(tfm, AlternatingFlip))
    learn.fit(3, 0.01, cbs=[look := Look(lambda learn: flip.epoch)])
    assert look.seen == [0, 0, 0, 1, 1, 1, 2, 2, 2] and flip.epoch is None  # at random again

    def interrupt(self):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.01, cbs=Callback(after_batch=interrupt))
    assert flip.epoch is None


def test_tricks_are_absent_if_the_recipe_does_without(dls):
    names = {type(cb).__name__ for cb in get_learner(dls, replace(ASSIGNMENT), width=2).cbs}
    assert not names & {"FreezeLayers", "ProgressiveResize", "L1Penalty", "GradientValueClip"} and "CountFlop" in names
