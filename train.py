"""Train the hand-written ResNet and show what it learned: `python train.py --help` lists the options.

The assignment: DataLoaders with three transforms → ResNet → Learner → LR finder → one cycle of 24 epochs, with its peak
at epoch 5 → plots. What it leaves open is chosen in cifar10/recipes.py. In a REPL: `from train import *`, then
`learn = get_learner(get_dls())`, `learn.lr_find()` and the rest of fastai.
"""

from cifar10 import cli  # first, because `cifar10` corrects matplotlib's backend
from cifar10.options import Options

if __name__ == "__main__":
    typed = cli.start(Options, distributed=True)  # before what takes seconds to import: a mistake is answered at once

from dataclasses import fields, replace
from pathlib import Path

from fastai.vision.all import ClassificationInterpretation, DataLoaders, Learner  # noqa: F401 (for a REPL)

from augment import Cutout, FlipLR, RandomCrop
from cifar10.data import ImageTable, Reading, build_dls, with_stats
from cifar10.errors import UserError
from cifar10.interpretation import ImageClassifier, report_run
from cifar10.recipes import RECIPES, REFERENCE_SIDE, Recipe
from cifar10.runs import Session
from cifar10.training import ValidateLast, build_learner, find_lrs, fit_head, init_pretrained, initialize
from model import ResNet, split_by_depth


def get_dls(data="auto", recipe: str | Recipe = "assignment", valid="test", device="auto", bs: int | None = None,
            **changes) -> DataLoaders:  # fmt: skip
    """DataLoaders of `data` with the assignment's three transforms.

    `changes` are those to the recipe, like `flip=False`, and how to read the images, like `size=64`: see `Reading`.
    Raises `UserError` if there are fewer training images than a batch has, and for data that can't be used.
    """
    reading = {name: changes.pop(name) for name in {field.name for field in fields(Reading)} & {*changes}}
    images = ImageTable.open(data, valid=valid, **reading)
    if isinstance(recipe, str):
        recipe = RECIPES[recipe].adapted(len(images.split_rows(valid)[0]), **images.defaults)
    recipe = replace(recipe, **changes | ({"batch_size": bs} if bs else {}))
    if recipe.batch_size > (count := len(images.split_rows(valid)[0])):
        raise UserError(f"batch_size is {recipe.batch_size}, above the {count:,} training images; lower it")
    padding, cutout = (pixels * images.size // REFERENCE_SIDE for pixels in (recipe.crop_padding, recipe.cutout))
    transforms = [
        RandomCrop(images.size, padding=padding, pad_mode=recipe.crop_mode),
        *([FlipLR()] if recipe.flip else []),
        *([Cutout(cutout, cutout)] if cutout else []),
    ]
    settings = dict(bs=recipe.batch_size, valid=valid, device=device, weighted=recipe.weighted)
    return build_dls(images, transforms, **settings)


def get_learner(dls, recipe: str | Recipe | None = None, norm="batch", width: int | None = None, precision="auto",
                weights: str | Path | None = None, **kw) -> Learner:  # fmt: skip
    """A Learner that trains the ResNet on `dls`, as the recipe says; `kw` is passed on to fastai's Learner.

    `width` is the number of channels of the first layer, by default the recipe's. `weights`, the folder of a finished
    run or its model.safetensors, is where all layers but the last start from, and whose width, mean and standard
    deviation are used. The default recipe is then "finetune" (give it to `get_dls`, too), and otherwise "assignment".
    Raises `UserError` for weights of another width or normalization.
    """
    recipe = recipe or ("finetune" if weights else "assignment")
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    if weights:
        trained = ImageClassifier.load(weights, ResNet, device="cpu")
        model, recipe = init_pretrained(trained.model, trained.recipe, recipe, len(dls.vocab), norm, width)
        dls = with_stats(dls, trained.mean, trained.std)
    else:
        recipe = replace(recipe, width=width or recipe.width)
        model = ResNet(len(dls.vocab), norm=norm, width=recipe.width, logit_scale=recipe.logit_scale)
        initialize(model, recipe, (batch[0] for batch in dls.train))
    return build_learner(dls, model, recipe, precision, **dict(splitter=split_by_depth) | kw)


def choose_lrs(learn: Learner, recipe: Recipe, folder: Path | None = None) -> Recipe:
    """The recipe with its learning rates filled in: its own, or the LR finder's, whose curve is saved in `folder`."""
    if recipe.lr_max is not None:
        return replace(recipe, lr_min=recipe.lr_min or recipe.lr_max / 100)
    curve = find_lrs(learn)
    curve = curve._replace(lr_min=recipe.lr_min or curve.lr_min)
    if folder:
        curve.save(folder)
    return replace(recipe, lr_min=curve.lr_min, lr_max=curve.lr_max)


def fit(learn: Learner, recipe: Recipe, cbs=(), start_epoch: int = 0):
    """One cycle from `lr_min` up to `lr_max` and back; in the assignment, 24 epochs with the peak at epoch 5."""
    div = recipe.lr_max / recipe.lr_min
    learn.fit_one_cycle(
        recipe.epochs,  # assigned: 24
        recipe.lr_max,
        div=div,
        div_final=1e5 if recipe.annihilate else div,  # assigned: no annihilation, so it ends at lr_min
        pct_start=recipe.peak_epoch / recipe.epochs,  # assigned: 5 / 24
        anneal_strategy=recipe.anneal_strategy,
        cbs=[*cbs, *([ValidateLast()] if recipe.validate == "last" else [])],
        start_epoch=start_epoch,
    )


def main(**typed):
    """Train or resume. `typed`: the options given on the command line, by name (see `Options`)."""
    with Session.start(typed) as session:  # joins the processes; opens the run when resuming
        if session.is_finished:
            return
        options, images = session.options, session.open_images()
        dls = get_dls(images, session.recipe, options.valid, options.device)
        learn = get_learner(dls, session.recipe, options.norm, options.width, options.precision, session.weights)
        run = session.open_run(learn)  # from here on, an interrupted run prints how to resume
        if not session.checkpoint:
            if session.weights:
                fit_head(learn)
            session.set_lrs(choose_lrs(learn, session.recipe, run.path))
        print(f"One cycle: {session.recipe.describe_cycle()}, width {run.model_args['width']}, {learn.precision}")
        fit(learn, session.recipe, session.callbacks(), session.start_epoch)
        report_run(learn, run, session.started)


if __name__ == "__main__":
    cli.run(main, typed)
