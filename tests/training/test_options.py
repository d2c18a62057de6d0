"""Options: checked once, for the command line and for config.json alike; and what they make of a recipe."""

from dataclasses import asdict, fields, replace

import pytest
from fastcore.docments import docments

from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.options import Options
from cifar10.recipes import ASSIGNMENT, FAST, RECIPES, Recipe
from model import NORMS
from train import get_dls, get_learner


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(epochs=0), "epochs is 0; it must be at least 1"),
        (dict(epochs="abc"), "epochs is 'abc'; it must be a whole number"),
        (dict(epochs=1.5), "epochs is 1.5; it must be a whole number"),
        (dict(epochs=100_000), "epochs is 100000; it must be at least 1 and at most 99999"),
        (dict(epochs=True), "epochs is True; it must be a whole number"),
        (dict(lr_max=0.0), "lr_max is 0.0; it must be above 0"),
        (dict(lr_max=-0.1), "lr_max is -0.1; it must be above 0"),
        (dict(lr_max=float("nan")), "lr_max is nan; it must be above 0"),
        (dict(lr_max=float("inf")), "lr_max is inf; it must be above 0"),
        (dict(lr_max=1e300), "lr_max is 1e+300; it must be above 0 and at most 1e+30"),
        (dict(lr_max=0.1, lr_min=0.2), "lr_min is 0.2; it must be at most lr_max, 0.1"),
        (dict(recipe="fast", lr_min=0.8), "lr_min is 0.8; it must be at most lr_max, 0.5"),
        (dict(epochs=3, peak_epoch=5), "peak_epoch is 5; it must be at most epochs, 3"),
        (dict(peak_epoch=25), "peak_epoch is 25; it must be at most epochs, 24"),
        (dict(peak_epoch=0), "peak_epoch is 0; it must be above 0"),
        (dict(batch_size=-4), "batch_size is -4; it must be at least 1"),
        (dict(clip=-1), "clip is -1; it must be at least 0"),
        (dict(l1=float("nan")), "l1 is nan; it must be at least 0"),
        (dict(norm="group"), "norm is 'group'; it must be one of batch, layer"),
        (dict(annihilate="no"), "annihilate is 'no'; it must be true or false"),
        (dict(flip=1), "flip is 1; it must be true or false"),
        (dict(width=5000), "width is 5000; it must be at least 1 and at most 4096"),
        (dict(width=0), "width is 0; it must be at least 1"),
        (dict(seed=-1), "seed is -1; it must be at least 0"),
        (dict(seed=2**32), "at most 4294967295"),
        (dict(seed=None), "seed is None; it must be a whole number"),
        (dict(data=3), "data is 3; it must be text"),
        (dict(name="a/b"), "plain folder name"),
        (dict(name=""), "plain folder name"),
        (dict(name=".hidden"), "plain folder name"),
        (dict(name=".."), "plain folder name"),
        (dict(name="x" * 300), "plain folder name"),
    ],
)
def test_wrong_values(options, says):
    with pytest.raises(UserError) as told:
        Options(**options)
    assert says in str(told.value)


def test_options_survive_json():
    assert Options(**asdict(Options(epochs=3, flip=False))) == Options(epochs=3, flip=False)


def test_the_norms_are_the_models():
    for norm in NORMS:
        assert Options(norm=norm).norm == norm


def test_what_was_given_replaces_the_recipe(shapes):
    images = ImageTable.open(shapes)
    assert Options().resolve(images) == ASSIGNMENT.adapted(48) and ASSIGNMENT.width == 64
    recipe = Options(recipe="fast", epochs=10, clip=0.1, flip=False, annihilate=False, batch_size=16).resolve(images)
    given = (recipe.epochs, recipe.clip, recipe.flip, recipe.annihilate, recipe.batch_size)
    assert given == (10, 0.1, False, False, 16) and (recipe.lr_max, recipe.sizes) == (FAST.lr_max, FAST.sizes)
    assert recipe.peak_epoch == pytest.approx(FAST.peak_epoch * 10 / 8)
    with pytest.raises(UserError, match="batch_size is 100, above the 48 training images"):
        get_dls(images, bs=100)


def test_data_sets_have_defaults_of_their_own(digits):
    """Digits are not flipped unless asked for, and few epochs and half the width are enough."""
    images = digits.train.table
    recipe = Options().resolve(images)
    assert (recipe.epochs, recipe.flip, recipe.batch_size) == (6, False, 64) and recipe.peak_epoch == 5 / 4
    assert get_learner(digits, recipe).model.args["width"] == 32
    assert get_learner(digits, Options(width=48).resolve(images)).model.args["width"] == 48
    assert get_learner(digits, recipe, width=8).model.args["width"] == 8
    assert Options(flip=True).resolve(images).flip and not Options(flip=False).resolve(images).flip


def test_no_default_of_an_option_hides_the_recipe(monkeypatch, dls):
    """Each field of a recipe that is an option, too, keeps the recipe's value unless it is typed."""
    shared = {field.name for field in fields(Options)} & {field.name for field in fields(Recipe)} - {"name"}
    assert {"weighted", "flip", "annihilate", "clip", "l1", "epochs", "lr_max"} <= shared
    others = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value / 2}
    changed = {name: others[type(value)](value) for name, value in vars(FAST).items() if name in shared}
    changed |= dict(lr_max=0.3, lr_min=0.2, batch_size=7)
    monkeypatch.setitem(RECIPES, "fast", replace(FAST, **changed))
    resolved = Options(recipe="fast").resolve(dls.train.table)
    assert {name: getattr(resolved, name) for name in changed} == changed | dict(batch_size=16)  # of a small data set
    typed = {name: getattr(FAST, name) for name in shared}
    resolved = Options(recipe="fast", **typed).resolve(dls.train.table)
    assert {name: getattr(resolved, name) for name in typed} == typed


def test_every_option_has_a_help_text():
    """fastcore reads the comment in the option's own line only."""
    texts = docments(Options)
    assert [field.name for field in fields(Options) if not texts[field.name]] == []
