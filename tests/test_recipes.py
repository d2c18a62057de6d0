"""Recipes: their sizes and the work that is left."""

import pytest

from recipes import RECIPES

SMALL_FIRST = RECIPES["assignment"]._replace(sizes=((16, 0.5), (32, 1.0)))


def test_the_assignment_is_as_written():
    recipe = RECIPES["assignment"]
    assert (recipe.epochs, recipe.peak_epoch, recipe.lr_max, recipe.annihilate) == (24, 5, None, False)
    assert recipe.sizes == ((32, 1.0),)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_ends_with_whole_images(recipe):
    untils = [until for _, until in recipe.sizes]
    assert recipe.sizes[-1] == (32, 1.0) and untils == sorted(set(untils))
    assert recipe.side(0.9999) == recipe.side(1.0) == 32 and 0 < recipe.peak_epoch < recipe.epochs
    assert recipe.validate in ("each", "last")


def test_sides():
    assert [SMALL_FIRST.side(done) for done in (0, 0.49, 0.5, 0.99)] == [16, 16, 32, 32]


def test_the_work_that_is_left():
    """A step on 16×16 is a quarter of one on 32×32."""
    assert SMALL_FIRST.work_left(0) == pytest.approx(0.5 + 0.5 * 4)
    assert SMALL_FIRST.work_left(0.25) == pytest.approx(0.25 + 0.5 * 4)
    assert SMALL_FIRST.work_left(0.75) == pytest.approx(0.25)
    assert RECIPES["assignment"].work_left(0.5) == pytest.approx(0.5)
