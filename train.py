"""Train the hand-written ResNet and show what it learned: options → data → learner → LRs → one cycle → pictures.

`python train.py` trains, `python train.py --help` lists the options. In a REPL the same pieces are the interface:

    from train import *
    learn = get_learner(get_dls())
    learn.lr_find()
    learn.fit_one_cycle(24, 0.3, pct_start=5/24)
"""

import time
from typing import Annotated

from fastai.vision.all import set_seed
from fastcore.script import call_parse

from data import VALIDS, get_dls
from errors import UserError, command_line
from interpret import interpret, per_class_accuracy, plot_lr_curve
from learner import PRECISIONS, SWEEP, TimeEstimate, find_lrs, get_learner
from model import NORMS
from runs import RunLog, at_home, new_run, save_figure, save_weights, surroundings, write, write_csv, write_json

RECIPE = "assignment"  # one cycle over 24 epochs with RandomCrop → FlipLR → Cutout, as the assignment asks
EPOCHS, PEAK_EPOCH = 24, 5  # the assignment's
DIGITS_EPOCHS = 6  # enough for the digits, which are there to try everything out in minutes


def check_order(lr_min: float, lr_max: float):
    if lr_min > lr_max:
        raise UserError(f"lr_min ({lr_min:g}) is above lr_max ({lr_max:g}); give a lower --lr_min or a higher --lr_max")


def choices(values) -> dict:
    """How `call_parse` is told the values that an option can take."""
    return {"choices": list(values)}


@call_parse
@command_line
def main(
    data: str = "auto",  # auto (CIFAR-10 if it can be had, else digits), cifar10, digits, or a folder or archive
    valid: Annotated[str, choices(VALIDS)] = "test",  # report on the test split, or on a tenth of train
    epochs: int = None,  # times to go through the training images (default: 24; 6 on the digits)
    peak_epoch: float = None,  # epoch at which the learning rate is highest (default: 5 of 24)
    batch_size: int = None,  # images a step (default: 512; 64 where there are fewer than 10,000 training images)
    lr_max: float = None,  # highest learning rate (default: found)
    lr_min: float = None,  # learning rate to start and to end with (default: found; a hundredth of a given lr_max)
    annihilate: bool = False,  # end with a learning rate near zero instead of lr_min
    norm: Annotated[str, choices(NORMS)] = "batch",  # kind of all normalisation layers
    precision: Annotated[str, choices(PRECISIONS)] = "auto",  # number format of the convolutions; auto is the fastest
    clip: float = 0.0,  # limit for each value of the gradient, 0 for none; the assignment's notebook has 0.1
    l1: float = 0.0,  # factor of an L1 penalty on all parameters
    seed: int = 42,  # of every random choice: the same seed on the same machine gives the same weights
    runs_dir: str = "runs",  # folder that holds the runs
    name: str = None,  # of this run's folder (default: <date>-<time>-<data>-<recipe>)
):
    "Train the assignment's ResNet with the one-cycle policy; leave a folder of figures and pictures."
    for option, value in {"epochs": epochs, "batch_size": batch_size, "lr_max": lr_max, "lr_min": lr_min}.items():
        if value is not None and not value > 0:
            raise UserError(f"{option} is {value}; it must be above 0")
    if lr_min and lr_max:
        check_order(lr_min, lr_max)
    started = time.time()
    set_seed(seed, reproducible=True)

    dls = get_dls(data, batch_size, valid)
    images = dls.train.table
    epochs = epochs or (DIGITS_EPOCHS if images.is_digits else EPOCHS)
    peak_epoch = epochs * PEAK_EPOCH / EPOCHS if peak_epoch is None else peak_epoch
    if not 0 < peak_epoch <= epochs:
        raise UserError(f"peak_epoch is {peak_epoch:g}; it must be above 0 and at most the number of epochs, {epochs}")
    if not len(dls.train):
        raise UserError(f"batch_size is {batch_size}, more than the {len(dls.train_ds):,} training images; lower it")
    learn = get_learner(dls, norm, precision=precision, clip=clip, l1=l1)

    run = learn.path = new_run(runs_dir, name, images.name, RECIPE)
    print(
        f"{images.name}: {len(dls.train_ds):,} images to train on, {len(dls.valid_ds):,} to validate ({valid}); {run}"
    )
    write(run / "summary.txt", f"{learn.summary()}\n")

    learn.add_cb(TimeEstimate(epochs, sweep=0 if lr_max else SWEEP["num_it"]))
    if lr_max is None:
        print(f"LR finder: {SWEEP['num_it']} steps with rates from {SWEEP['start_lr']:g} to {SWEEP['end_lr']:g}")
        curve = find_lrs(learn)
        write_csv(run / "lr_find.csv", ["lr", "loss"], zip(curve.lrs, curve.losses, strict=True))
        plot_lr_curve(curve)
        save_figure(run / "lr_find.png")
        lr_max, lr_min = curve.lr_max, lr_min or curve.lr_min
    lr_min = lr_min or lr_max / 100
    check_order(lr_min, lr_max)

    options = dict(
        data=at_home(images.source), valid=valid, epochs=epochs, peak_epoch=peak_epoch, batch_size=dls.bs,
        lr_max=lr_max, lr_min=lr_min, annihilate=annihilate, norm=norm, precision=learn.precision, clip=clip, l1=l1,
        seed=seed,
    )  # fmt: skip
    data_set = dict(
        name=images.name, train=len(dls.train_ds), valid=len(dls.valid_ds), classes=list(dls.vocab), sha256=images.hash
    )
    write_json(run / "config.json", dict(recipe=RECIPE, options=options, data=data_set, **surroundings()))

    print(f"One cycle: {epochs} epochs, learning rate {lr_min:.2g} → {lr_max:.2g} at epoch {peak_epoch:g} → "
          f"{0 if annihilate else lr_min:.2g}, {learn.precision}")  # fmt: skip
    div = lr_max / lr_min
    learn.fit_one_cycle(
        epochs,
        lr_max,
        div=div,
        div_final=1e5 if annihilate else div,  # the assignment: no annihilation, so it ends where it began
        pct_start=peak_epoch / epochs,
        cbs=RunLog(run),
    )
    save_weights(learn.model, run / "model.safetensors")
    training = learn.recorder.train_seconds  # without validation

    interp = interpret(learn, run)
    metrics = dict(
        accuracy=interp.accuracy,
        loss=interp.losses.mean().item(),
        epochs=epochs,
        seconds=time.time() - started,
        seconds_training=training,
        images_per_second=epochs * len(dls.train) * dls.bs / training,
        per_class_accuracy=per_class_accuracy(interp),
    )
    write_json(run / "metrics.json", metrics)
    print(f"{images.name}: {interp.accuracy:.2%} of {len(interp.targs):,} images right. Figures and pictures: {run}")
