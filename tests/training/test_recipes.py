"""Recipes hold every hyperparameter, and refuse values that make no sense."""

import json
from dataclasses import asdict, replace

import pytest

from cifar10.errors import UserError
from cifar10.recipes import ASSIGNMENT, FAST, RECIPES, Recipe
from train import get_dls, get_learner

SMALL_FIRST = replace(ASSIGNMENT, sizes=((16, 0.5), (32, 1.0)))


def test_the_assignment_is_as_written():
    recipe = RECIPES["assignment"]
    assert (recipe.epochs, recipe.peak_epoch, recipe.lr_max, recipe.annihilate) == (24, 5, None, False)
    assert (recipe.batch_size, recipe.crop_padding, recipe.flip, recipe.cutout) == (512, 4, True, 8)
    assert recipe.sizes == ((32, 1.0),) and recipe.validate == "each"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_ends_with_full_size_images(recipe):
    assert recipe.sizes[-1] == (32, 1.0) and recipe.side(0.9999) == recipe.side(1.0) == 32
    assert 0 < recipe.peak_epoch < recipe.epochs


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_survives_json(recipe):
    values = json.loads(json.dumps(asdict(recipe)))
    assert Recipe.from_json(values) == recipe
    del values["clip"]  # a field that an older version did not have
    assert Recipe.from_json(values) == recipe
    for name in ("init", "whiten", "freeze", "anneal_strategy", "norm_bias_lr_scale", "train_norm_scales", "weighted"):
        older = {key: value for key, value in values.items() if key != name}  # of version 2.1, which had no such trick
        assert getattr(Recipe.from_json(older), name) == getattr(Recipe(name="plain"), name)
    assert values["freeze"] == [list(pair) for pair in recipe.freeze]
    with pytest.raises(TypeError):
        Recipe.from_json(values | {"unknown": 1})


def test_a_recipe_that_does_not_exist(dls):
    for wrong in (lambda: get_dls("digits", "fastest"), lambda: get_learner(dls, "fastest")):
        with pytest.raises(UserError, match="recipe is 'fastest'; it must be one of assignment, fast, faster, "):
            wrong()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(sizes=((32, 0.5),)), "sizes"),
        (dict(sizes=((22, 1.0),)), "sizes"),
        (dict(sizes=((16, 0.5), (24, 0.2), (32, 1.0))), "sizes"),
        (dict(freeze=(("fc", 0.5),)), "freeze is .* it must pair prep, layer1"),
        (dict(freeze=(("prep", 1.5),)), "with parts from 0 to 1"),
        (dict(anneal_strategy="step"), "anneal_strategy is 'step'; it must be one of cos, linear"),
        (dict(norm_bias_lr_scale=0), "norm_bias_lr_scale is 0; it must be above 0"),
        (dict(crop_mode="mirror"), "crop_mode is 'mirror'; it must be one of reflect"),
        (dict(momentum=1.5), "momentum is 1.5; it must be at least 0 and at most 1"),
        (dict(ns_steps=0), "ns_steps is 0; it must be at least 1"),
        (dict(optimizer="adam"), "it must be one of muon, sgd"),
        (dict(weight_decay=float("inf")), "weight_decay is inf"),
        (dict(label_smoothing="0.1"), "it must be a number"),
    ],
)
def test_wrong_values(changes, says):
    with pytest.raises(UserError, match=says):
        replace(ASSIGNMENT, **changes)


def test_it_adapts_to_the_data():
    assert ASSIGNMENT.adapted(50_000) == ASSIGNMENT
    assert [ASSIGNMENT.adapted(images).batch_size for images in (9_999, 1_280, 1_279, 30, 5)] == [64, 64, 32, 16, 5]
    assert ASSIGNMENT.adapted(9_999, batch_size=100).batch_size == 100
    assert FAST.adapted(50_000, epochs=40).peak_epoch == 8
    assert FAST.adapted(50_000, lr_max=0.05).lr_min == pytest.approx(0.01)
    assert FAST.adapted(50_000, lr_max=0.05, lr_min=0.02).lr_min == 0.02
    assert ASSIGNMENT.adapted(50_000, lr_max=0.05).lr_min is None


def test_sides():
    assert [SMALL_FIRST.side(done) for done in (0, 0.49, 0.5, 0.99)] == [16, 16, 32, 32]
