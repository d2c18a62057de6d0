"""Train the hand-written ResNet and show what it learned: options → data → learner → LRs → one cycle → pictures.

`python train.py` trains, `python train.py --help` lists the options. In a REPL the same pieces are the interface:

    from train import *
    learn = get_learner(get_dls())
    learn.lr_find()
    learn.fit_one_cycle(24, 0.2, pct_start=5/24)
"""

import time
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Annotated

from fastai.vision.all import Learner, set_seed
from fastcore.script import call_parse

from data import DEVICES, VALIDS, get_dls
from errors import UserError, command_line
from files import write
from interpret import interpret, per_class_accuracy, plot_lr_curve
from learner import PRECISIONS, SWEEP, StopAtNaN, TimeEstimate, ValidateLast, find_lrs, get_learner
from model import NORMS
from recipes import RECIPES
from runs import (
    RunLog,
    at_home,
    check_data,
    check_name,
    check_options,
    find_run,
    held_run,
    last_checkpoint,
    new_run,
    read_config,
    restore,
    save_figure,
    save_weights,
    surroundings,
    write_csv,
    write_history,
    write_json,
)

DIGITS_EPOCHS = 6  # enough for the digits, which are there to try everything out in minutes


def choices(values) -> dict:
    """How `call_parse` is told the values that an option can take."""
    return {"choices": list(values)}


def train(learn: Learner, run: Path, config: dict, started: float):
    """Train in the folder `run`, from its last checkpoint if there is one, and show what was learned."""
    options, images = config["options"], learn.dls.train.table
    recipe = RECIPES[options["recipe"]]
    epochs, peak_epoch, annihilate = options["epochs"], options["peak_epoch"], options["annihilate"]
    print(f"{images.name}: {len(learn.dls.train_ds):,} images to train on, {len(learn.dls.valid_ds):,} to validate"
          f" ({options['valid']}); {run}")  # fmt: skip
    learn.path = run
    if checkpoint := last_checkpoint(run, options):
        state = checkpoint[1]
        lr_min, lr_max, done, started = state["lr_min"], state["lr_max"], state["epochs"], started - state["elapsed"]
        print(f"Going on after epoch {done} of {epochs}")
        learn.add_cb(TimeEstimate(recipe, epochs, done))
    else:
        done = 0
        write(run / "summary.txt", f"{learn.summary()}\n")
        find = (options["lr_max"] or recipe.lr_max) is None
        learn.add_cb(TimeEstimate(recipe, epochs, sweep=SWEEP["num_it"] if find else 0))
        lr_min, lr_max = choose_lrs(learn, run, options)
        write_json(run / "config.json", config | {"lr_min": lr_min, "lr_max": lr_max})

    print(f"One cycle: {epochs} epochs, learning rate {lr_min:.2g} → {lr_max:.2g} at epoch {peak_epoch:g} → "
          f"{0 if annihilate else lr_min:.2g}, {learn.precision}")  # fmt: skip
    div = lr_max / lr_min
    if done == epochs:  # only its last files and pictures are missing
        learn.create_opt()
        restore(learn, *checkpoint)
        write_history(learn, run)
    else:
        learn.fit_one_cycle(
            epochs,
            lr_max,
            div=div,
            div_final=1e5 if annihilate else div,  # the assignment: no annihilation, so it ends where it began
            pct_start=peak_epoch / epochs,
            cbs=[
                StopAtNaN(),
                RunLog(run, started, dict(options=options, lr_min=lr_min, lr_max=lr_max), checkpoint),
                *([ValidateLast()] if recipe.validate == "last" else []),
            ],
            start_epoch=done,
        )
    save_weights(learn.model, run / "model.safetensors")
    training = learn.recorder.train_seconds  # without validation

    interp = interpret(learn, run)
    metrics = dict(
        accuracy=interp.accuracy,
        loss=interp.losses.mean().item(),
        epochs=epochs,
        seconds=time.time() - started,  # without the time between a stop and going on
        seconds_training=training,
        images_per_second=epochs * len(learn.dls.train) * learn.dls.bs / training,
        per_class_accuracy=per_class_accuracy(interp),
    )
    write_json(run / "metrics.json", metrics)
    print(f"{images.name}: {interp.accuracy:.2%} of {len(interp.targs):,} images right. Figures and pictures: {run}")


def choose_lrs(learn: Learner, run: Path, options: dict) -> tuple[float, float]:
    """`(lr_min, lr_max)`: as given, as in the recipe, or as found by a sweep that is drawn into the run's folder."""
    lr_min, lr_max = options["lr_min"], options["lr_max"] or RECIPES[options["recipe"]].lr_max
    if lr_max is None:
        print(f"LR finder: {SWEEP['num_it']} steps with rates from {SWEEP['start_lr']:g} to {SWEEP['end_lr']:g}")
        curve = find_lrs(learn)
        write_csv(run / "lr_find.csv", ["lr", "loss"], zip(curve.lrs, curve.losses, strict=True))
        plot_lr_curve(curve)
        save_figure(run / "lr_find.png")
        lr_max, lr_min = curve.lr_max, lr_min or curve.lr_min
    lr_min = lr_min or lr_max / 100
    check_options(options | {"lr_min": lr_min, "lr_max": lr_max})
    return lr_min, lr_max


def options_to_resume(run: Path, name: str | None, options: dict) -> dict:
    """The options of a run that was begun. Raises `UserError` for one typed beside --resume that would change it."""
    begun = read_config(run)["options"]
    parser = ArgumentParser(argument_default=SUPPRESS)
    for option in options:
        parser.add_argument("--" + option.replace("_", "-"), nargs="?")
    for option in vars(parser.parse_known_args()[0]):
        if option != "data" and options[option] != begun[option]:  # the images themselves are compared later
            value = "without" if begun[option] is None else f"with {begun[option]} as"
            raise UserError(
                f"{run} was begun {value} {option}, which a resumed run keeps; leave out --{option}, or start a new run"
            )
    if name is not None:
        raise UserError("a resumed run keeps its name; leave out --name")
    return begun | ({"data": options["data"]} if options["data"] != "auto" else {})


@call_parse
@command_line
def main(
    data: str = "auto",  # auto (CIFAR-10 if it can be had, else digits), cifar10, digits, or a folder or archive
    recipe: Annotated[str, choices(RECIPES)] = "assignment",  # how to train; fast and faster are for CPUs
    valid: Annotated[str, choices(VALIDS)] = "test",  # report on the test split, or on a tenth of train
    epochs: int = None,  # times to go through the training images (default: the recipe's; 6 on the digits)
    peak_epoch: float = None,  # epoch at which the learning rate is highest (default: the recipe's, in proportion)
    batch_size: int = None,  # images a step (default: 512; 64 where there are fewer than 10,000 training images)
    lr_max: float = None,  # highest learning rate (default: the recipe's, or found)
    lr_min: float = None,  # learning rate to start and to end with (default: found; a hundredth of a known lr_max)
    annihilate: bool = False,  # end with a learning rate near zero instead of lr_min
    norm: Annotated[str, choices(NORMS)] = "batch",  # kind of all normalisation layers
    width: int = 64,  # channels of the first layer; fewer make a small net that trains in no time
    precision: Annotated[str, choices(PRECISIONS)] = "auto",  # number format of the convolutions; auto is the fastest
    device: Annotated[str, choices(DEVICES)] = "auto",  # what computes; auto is the fastest
    clip: float = 0.0,  # limit for each value of the gradient, 0 for none; the assignment's notebook has 0.1
    l1: float = 0.0,  # factor of an L1 penalty on all parameters
    seed: int = 42,  # of every random choice: the same seed on the same machine gives the same weights
    runs_dir: str = "runs",  # folder that holds the runs
    name: str = None,  # of this run's folder (default: <date>-<time>-<data>-<recipe>)
    resume: str = None,  # go on with a run that was stopped: its folder, or last
):
    "Train the assignment's ResNet with the one-cycle policy; leave a folder of figures and pictures."
    options = dict(
        data=data, recipe=recipe, valid=valid, epochs=epochs, peak_epoch=peak_epoch, batch_size=batch_size,
        lr_max=lr_max, lr_min=lr_min, annihilate=annihilate, norm=norm, width=width, precision=precision,
        device=device, clip=clip, l1=l1, seed=seed,
    )  # fmt: skip
    check_options(options)
    check_name(name)
    run = None
    if resume is not None:
        run = find_run(resume, runs_dir)
        options = options_to_resume(run, name, options)
        if (run / "metrics.json").is_file():
            print(f"{run} is finished, there is nothing to go on with")
            return
    started = time.time()
    set_seed(options["seed"], reproducible=True)

    recipe = RECIPES[options["recipe"]]
    dls = get_dls(options["data"], options["batch_size"], options["valid"], options["device"])
    images = dls.train.table
    if not len(dls.train):
        raise UserError(f"batch_size is {dls.bs}, more than the {len(dls.train_ds):,} training images; lower it")
    epochs = options["epochs"] or (DIGITS_EPOCHS if images.is_digits else recipe.epochs)
    if options["peak_epoch"] is None:
        options["peak_epoch"] = epochs * recipe.peak_epoch / recipe.epochs
    options["annihilate"] |= recipe.annihilate
    options |= dict(data=at_home(images.source), epochs=epochs, batch_size=dls.bs)
    if dls.device.type in DEVICES:
        options["device"] = dls.device.type
    # Found rates are not known yet, but are within the sweep.
    check_options(options | {"lr_max": options["lr_max"] or recipe.lr_max or SWEEP["end_lr"]})
    learn = get_learner(dls, *(options[name] for name in ("norm", "width", "precision", "clip", "l1", "recipe")))
    options["precision"] = learn.precision

    if run is None:
        data_set = dict(name=images.name, train=len(dls.train_ds), valid=len(dls.valid_ds), classes=list(dls.vocab))
        config = dict(options=options, data=data_set | {"sha256": images.hash}, **surroundings())
        run = new_run(runs_dir, name, images.name, options["recipe"])
    else:
        config = read_config(run)
        check_data(run, config, dls)
        config["options"]["data"] = options["data"]  # where the images are now
    with held_run(run):
        write_json(run / "config.json", config)
        train(learn, run, config, started)
