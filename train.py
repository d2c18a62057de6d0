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

from augment import AlternatingFlip, Cutout, FlipLR, RandomCrop
from cifar10.data import ImageTable, Reading, build_dls, with_stats
from cifar10.errors import UserError
from cifar10.interpretation import ImageClassifier, report_run
from cifar10.recipes import REFERENCE_SIDE, Recipe, find_recipe
from cifar10.runs import Session
from cifar10.training import ValidateLast, build_learner, find_lrs, fit_head, init_pretrained, initialize
from model import ResNet, split_by_depth


def get_dls(data="auto", recipe: str | Recipe = "assignment", valid="test", device="auto", bs: int | None = None,
            **changes) -> DataLoaders:  # fmt: skip
    """DataLoaders of `data` with the assignment's three transforms: images `(N, 3, size, size)` and labels `(N,)`.

    `data`, `valid` and `device` are as for train.py. `changes` are fields of the `Recipe`, like `flip=False`, and of
    `Reading`, like `size=64`; `bs` is short for `batch_size`. Raises `UserError` if there are fewer training images
    than a batch has, and for data that can't be used.
    """
    reading = {field.name: changes.pop(field.name) for field in fields(Reading) if field.name in changes}
    images = ImageTable.open(data, valid=valid, **reading)
    train_images = len(images.split_rows(valid)[0])
    if isinstance(recipe, str):
        recipe = find_recipe(recipe).adapted(train_images, **images.defaults)
    if bs:
        changes["batch_size"] = bs
    recipe = replace(recipe, **changes)
    if recipe.batch_size > train_images:
        raise UserError(f"batch_size is {recipe.batch_size}, above the {train_images:,} training images; lower it")
    padding = recipe.crop_padding * images.size // REFERENCE_SIDE
    cutout = recipe.cutout * images.size // REFERENCE_SIDE
    tfms = [RandomCrop(images.size, padding=padding, pad_mode=recipe.crop_mode)]
    if recipe.flip:
        # Weighted, an image may be drawn several times in an epoch.
        tfms.append(AlternatingFlip() if recipe.alternate_flips and not recipe.weighted else FlipLR())
    if cutout:
        tfms.append(Cutout(cutout, cutout))
    return build_dls(images, tfms, bs=recipe.batch_size, valid=valid, device=device, weighted=recipe.weighted)


def get_learner(dls, recipe: str | Recipe | None = None, norm="batch", width: int | None = None, precision="auto",
                weights: str | Path | None = None, splitter=split_by_depth, **kw) -> Learner:  # fmt: skip
    """A Learner that trains the ResNet on `dls` as the recipe says, which should be the one that `get_dls` got.

    `width` is the number of channels of the first layer, by default the recipe's. `weights`, the folder of a finished
    run or its model.safetensors, is where all layers but the last start from, and whose width, mean and standard
    deviation are used. The default recipe is then "finetune", and otherwise "assignment". `splitter` and `kw` are
    arguments of fastai's Learner. Raises `UserError` for weights of another width or normalization.
    """
    recipe = recipe or ("finetune" if weights else "assignment")
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if weights:
        trained = ImageClassifier.load(weights, ResNet, device="cpu")
        model, recipe = init_pretrained(trained.model, trained.recipe, recipe, len(dls.vocab), norm, width)
        dls = with_stats(dls, trained.mean, trained.std)
    else:
        recipe = replace(recipe, width=width or recipe.width)
        model = ResNet(len(dls.vocab), norm=norm, width=recipe.width, logit_scale=recipe.logit_scale)
        initialize(model, recipe, (batch[0] for batch in dls.train))
    return build_learner(dls, model, recipe, precision, splitter=splitter, **kw)


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
    """One cycle from `lr_min` up to `lr_max` and back down, or to near zero if the recipe says `annihilate`."""
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
