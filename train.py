"""Train the hand-written ResNet and show what it learned: `python train.py --help` lists the options.

DataLoaders with three transforms → ResNet → Learner → LR finder → one cycle → run folder with plots. In a REPL,
`from train import *` gives `learn = get_learner(get_dls())`, and then `learn.lr_find()` and all the rest of fastai.
"""

import time
from dataclasses import replace
from pathlib import Path

# isort: split
from fastai.callback.schedule import ParamScheduler, SchedLin, combine_scheds
from fastai.torch_core import num_distrib, set_seed
from fastai.vision.all import ClassificationInterpretation, DataLoaders, Learner  # noqa: F401 (for a REPL)

from augment import Cutout, FlipLR, RandomCrop
from cifar10 import cli
from cifar10.data.decode import SIZE
from cifar10.data.loaders import build_dls, describe, eval_split_name
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.files import save_figure, write, write_csv
from cifar10.interpretation.page import write_html
from cifar10.interpretation.predictions import tta_accuracy
from cifar10.interpretation.report import write_report
from cifar10.processes import check_same, from_rank0, is_rank0, is_restart, launch_id, local_rank0_first, process_group
from cifar10.runs.checkpoint import SaveCheckpoint, last_checkpoint
from cifar10.runs.run import Run, check_folder, home_relative
from cifar10.runs.session import tracker_callbacks
from cifar10.training.callbacks import StopAtNaN, TimeEstimate, ValidateLast
from cifar10.training.initialize import init_dirac, init_whitening
from cifar10.training.learner import build_learner
from cifar10.training.lr_finder import SWEEP, find_lrs, plot_lr_curve
from cifar10.training.options import Options
from cifar10.training.recipes import RECIPES, Recipe
from model import ResNet, split_by_depth


def get_dls(data="auto", recipe: str | Recipe = "assignment", valid="test", device="auto", skip_broken=False,
            bs: int | None = None, size=SIZE, valid_pct: float | None = None, **changes) -> DataLoaders:  # fmt: skip
    """DataLoaders of `data` with the assignment's three transforms, and with `changes` to the recipe: `flip=False`.

    Raises `UserError` if there are fewer training images than a batch has, and for data that can't be used.
    """
    images = ImageTable.open(data, skip_broken, size, valid_pct)
    if isinstance(recipe, str):
        recipe = Options(recipe=recipe, valid=valid).resolve(images)
    recipe = replace(recipe, **changes | ({"batch_size": bs} if bs else {}))
    if recipe.batch_size > (count := len(images.split_rows(valid)[0])):
        raise UserError(f"batch_size is {recipe.batch_size}, above the {count:,} training images; lower it")
    padding, cutout = (pixels * images.size // SIZE for pixels in (recipe.crop_padding, recipe.cutout))
    transforms = [
        RandomCrop(images.size, padding=padding, pad_mode=recipe.crop_mode),
        *([FlipLR()] if recipe.flip else []),
        Cutout(cutout, cutout),
    ]
    settings = dict(bs=recipe.batch_size, valid=valid, device=device, weighted=recipe.weighted)
    return build_dls(images, transforms, **settings)


def get_learner(dls, recipe: str | Recipe = "assignment", norm="batch", width=64, precision="auto", **kw) -> Learner:
    """A Learner that trains the ResNet on `dls`, as the recipe says; `kw` are other arguments of fastai's Learner."""
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    model = ResNet(len(dls.vocab), norm=norm, width=width, logit_scale=recipe.logit_scale)
    if recipe.init == "dirac":
        init_dirac(model)
    if recipe.whiten:
        init_whitening(model.prep[0], model.prep[1], (batch[0] for batch in dls.train))
    return build_learner(dls, model, recipe, precision, **dict(splitter=split_by_depth) | kw)


def fit(learn: Learner, recipe: Recipe, cbs=(), done: int = 0):
    """One cycle from `recipe.lr_min` up to `recipe.lr_max` and back, of which `done` epochs are trained already."""
    cbs = [*cbs, *([ValidateLast()] if recipe.validate == "last" else [])]
    div, pct_start = recipe.lr_max / recipe.lr_min, recipe.peak_epoch / recipe.epochs  # 5 / 24
    div_final = 1e5 if recipe.annihilate else div  # no annihilation: it ends where it began
    if recipe.anneal_strategy == "linear":
        up, down = SchedLin(recipe.lr_min, recipe.lr_max), SchedLin(recipe.lr_max, recipe.lr_max / div_final)
        cycle = ParamScheduler({"lr": combine_scheds([pct_start, 1 - pct_start], [up, down])})
        learn.fit(recipe.epochs, recipe.lr_max, cbs=[cycle, *cbs], start_epoch=done)
    else:
        learn.fit_one_cycle(
            recipe.epochs, recipe.lr_max, div=div, div_final=div_final, pct_start=pct_start, cbs=cbs, start_epoch=done
        )


def choose_lrs(learn: Learner, recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with `lr_min` and `lr_max`, which are found by a sweep if need be; it is plotted into the folder."""
    if recipe.lr_max is not None:
        return replace(recipe, lr_min=recipe.lr_min or recipe.lr_max / 100)
    print(f"LR finder: {SWEEP['num_it']} steps, learning rate {SWEEP['start_lr']:g} → {SWEEP['end_lr']:g}")
    curve = find_lrs(learn)
    if is_rank0():
        write_csv(folder / "lr_find.csv", ["lr", "loss"], zip(curve.lrs, curve.losses, strict=True))
        plot_lr_curve(curve._replace(lr_min=recipe.lr_min or curve.lr_min))
        save_figure(folder / "lr_find.png")
    return replace(recipe, lr_min=recipe.lr_min or curve.lr_min, lr_max=curve.lr_max)


def train(learn: Learner, run: Run, started: float):
    """Train in the run's folder, from its last checkpoint if there is one, and report what was learned."""
    recipe, data = run.recipe, run.config["data"]
    print(f"{describe(learn.dls)}; {run.path}")
    checkpoint, done = from_rank0(last_checkpoint, run), 0
    if checkpoint:
        recipe = replace(recipe, lr_min=run.config["lr_min"], lr_max=run.config["lr_max"])
        done, started = checkpoint[1]["epochs"], started - checkpoint[1]["elapsed"]
        print(f"Resuming after epoch {done} of {recipe.epochs}")
        before, now = run.config["hardware"].get("processes", 1), max(1, num_distrib())
        if before != now:
            print(f"Started with {before} and resumed with {now} processes: the result is the same only up to rounding")
        learn.add_cb(TimeEstimate(recipe, done))
    else:
        summary = learn.summary()  # in all processes: fastai gathers what it finds
        if is_rank0():
            write(run.path / "summary.txt", f"{summary}\n")
        learn.add_cb(TimeEstimate(recipe, sweep=SWEEP["num_it"] if recipe.lr_max is None else 0))
        recipe = choose_lrs(learn, recipe, run.path)
        run.update(lr_min=recipe.lr_min, lr_max=recipe.lr_max)

    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}"
    print(f"One cycle: {epochs}, learning rate {recipe.lr_min:.2g} → {recipe.lr_max:.2g} at epoch"
          f" {recipe.peak_epoch:.3g} → {0 if recipe.annihilate else recipe.lr_min:.2g}, {learn.precision}")  # fmt: skip
    tracking = tracker_callbacks(run) if is_rank0() else []
    fit(learn, recipe, [StopAtNaN(), SaveCheckpoint(run, started, checkpoint), *tracking], done)
    if not is_rank0():
        return
    run.save_weights(learn.model)

    seconds, flop = learn.recorder.train_seconds, learn.recorder.flop  # the report starts the recorder anew
    images = f"{data['name']} {eval_split_name(learn.dls.train.table, run.options.valid)} images"
    interp, metrics = write_report(learn, run.path, images)
    metrics |= dict(
        tta_accuracy=tta_accuracy(interp, recipe.flip),
        epochs=recipe.epochs,
        seconds=time.time() - started,  # without the time between a stop and the resume
        seconds_training=seconds,  # without validation
        pflop=flop / 1e15,  # of these
        images_per_second=recipe.epochs * len(learn.dls.train) * learn.dls.bs / seconds,
    )
    write_html(interp, metrics, run, run.path, images)
    run.write_metrics(**metrics)  # last, because with it the run is finished
    print(f"{data['name']}: {metrics['accuracy']:.2%} of {metrics['images']:,} images correct,"
          f" {metrics['tta_accuracy']:.2%} with test-time augmentation. See {run.path / 'report.html'}")  # fmt: skip


def main(**given):
    """Train or resume; `given` are the options that were typed, by name (see `Options`)."""
    options = Options(**given)
    with process_group(options.device, options.timeout):
        start(options, given)


def resumable(path: Path) -> str | None:
    """The run's folder, if there is one that this torchrun started."""
    ours = (path / "config.json").is_file() and Run.open(path).config.get("launch") == launch_id()
    return str(path) if ours else None


def start(options: Options, given):
    """`main`, once the processes have joined, if torchrun started several."""
    started, run = time.time(), None
    if options.resume is None and options.name and is_restart():
        path = Path(options.runs_dir, options.name)
        options = replace(options, resume=from_rank0(resumable, path))
    if options.resume is not None:
        run = from_rank0(Run.open, options.resume, options.runs_dir)
        options = run.check_options(given)
        if from_rank0(lambda: run.is_finished):
            print(f"{run.path} is finished; there is nothing to resume")
            return
    else:
        from_rank0(check_folder, Path(options.runs_dir), options.name)
    set_seed(options.seed, reproducible=True)

    with local_rank0_first():
        images = ImageTable.open(options.data, options.skip_broken, options.size, options.valid_pct)
    check_same(images.hash, "the data set")
    recipe = run.recipe if run else options.resolve(images)
    dls = get_dls(images, recipe, options.valid, options.device)
    learn = get_learner(dls, recipe, options.norm, options.width, options.precision)
    check_same(repr([recipe, learn.precision, options.norm, options.width]), "an option or the precision")
    if run:
        run.check_data(learn)
    else:
        run = from_rank0(Run.create, options, recipe, learn)
    with run.lock():
        run = from_rank0(Run.open, run.path)  # again, because another process may have trained it in the meantime
        if not from_rank0(lambda: run.is_finished):
            run.config["options"]["data"] = home_relative(images.data)  # where they are now
            run.update()
            train(learn, run, started)


if __name__ == "__main__":
    cli.run(main, Options, distributed=True)
