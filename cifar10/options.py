"""The options of train.py: types, bounds, choices and help, for the command line, for config.json and for checks."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cifar10.cli import YesNo
from cifar10.errors import UserError
from cifar10.recipes import POSITIVE, RECIPES, Bounds, Recipe, check_fields, choices

YES_NO = {"action": YesNo}
SEVERAL = {"nargs": "+", "type": str}


# fastcore makes the command line of this: the comments are the help texts.
@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the assignment's ResNet with the one-cycle policy; write metrics and plots to a run folder."""

    data: str = "auto"  # auto (CIFAR-10 if available, else the digits), cifar10, digits, or a path
    recipe: Annotated[str | None, choices(*RECIPES)] = None  # hyperparameters (default: assignment, or finetune)
    weights: str | None = None  # finished run to start from, its model.safetensors, or last (default: from scratch)
    size: Annotated[int, Bounds(16, 1024)] = 32  # side of the images in pixels, a multiple of 8
    valid: Annotated[str, choices("test", "holdout")] = "test"  # validate on the test split, or on a part of train
    valid_pct: float | None = None  # part of train to hold out (default: 0.1; 0.2 for a folder without splits)
    weighted: Annotated[bool | None, YES_NO] = None  # train on all classes equally often (default: no)
    skip_broken: bool = False  # leave out images that can't be read, and train on the rest
    skip_classes: Annotated[list[str] | None, SEVERAL] = None  # names of classes, or of other folders, to leave out
    resize: Annotated[str, choices("crop", "squish", "pad")] = "crop"  # use the central square, or all of the image
    image_column: str | None = None  # of a table: the column of paths or ids (default: image, or the only one)
    label_column: str | None = None  # of a table: the column of classes (default: label, or the only one)
    split_column: str | None = None  # of a table: the column of splits (default: split, or the only one)
    images: str | None = None  # folder that a table's paths are relative to (default: the table's)
    epochs: int | None = None  # passes over the training images (default: the recipe's; 6 on the digits)
    peak_epoch: float | None = None  # epoch with the highest learning rate (default: the recipe's, scaled with epochs)
    batch_size: int | None = None  # images per step (default: the recipe's; from 16 to 64 for fewer than 10,000 images)
    lr_max: float | None = None  # highest learning rate (default: the recipe's, or from the LR finder)
    lr_min: float | None = None  # initial learning rate (default: in proportion to lr_max, found, or lr_max / 100)
    annihilate: Annotated[bool | None, YES_NO] = None  # end near zero instead of at lr_min (default: the recipe's)
    flip: Annotated[bool | None, YES_NO] = None  # mirror half of the training images (default: yes; no on the digits)
    clip: float | None = None  # limit for each value of a gradient; 0 for none (default: 0; the notebook uses 0.1)
    l1: float | None = None  # weight of an L1 penalty on all parameters (default: 0)
    norm: Annotated[str, choices("batch", "layer")] = "batch"  # normalization layer
    width: int | None = None  # channels of the first layer (default: 64; 32 on the digits); 8 is for a quick try
    precision: Annotated[str, choices("auto", "fp32", "bf16", "fp16")] = "auto"  # auto picks the fastest
    device: Annotated[str, choices("auto", "cpu", "cuda", "mps")] = "auto"  # device to train on
    tracker: Annotated[str, choices("none", "tensorboard", "wandb")] = "none"  # also log to an experiment tracker
    timeout: Annotated[float, POSITIVE] = 120  # seconds after which a process that does not answer counts as lost
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 42  # random seed; on the same CPU it gives the same weights
    runs_dir: str = "runs"  # folder that holds the runs
    name: str | None = None  # name of the run folder (default: <date>-<time>-<data>-<recipe>)
    resume: str | None = None  # resume a run that was stopped: its folder, or last

    def __post_init__(self):
        check_fields(self)
        name = self.name
        if name is not None and (
            not name or Path(name).name != name or name.startswith(".") or len(os.fsencode(name)) > 200
        ):
            raise UserError(f"name is {name!r}; it must be a plain folder name of at most 200 bytes")
        if self.size % 8:
            raise UserError(f"size is {self.size}; it must be a multiple of 8")
        if self.valid_pct is not None and not 0 < self.valid_pct < 1:
            raise UserError(f"valid_pct is {self.valid_pct}; it must be above 0 and below 1")
        if self.recipe == "finetune" and not self.weights:
            raise UserError("recipe is 'finetune', which starts from trained weights; add --weights")
        RECIPES[self.recipe_name].adapted(10**6, **self.changes)  # raises for a hyperparameter that makes no sense

    @property
    def recipe_name(self) -> str:
        return self.recipe or ("finetune" if self.weights else "assignment")

    @property
    def changes(self) -> dict[str, Any]:
        """The hyperparameters that were given, which replace the recipe's."""
        names = {field.name for field in fields(Recipe)} - {"name"}
        return {name: value for name, value in vars(self).items() if name in names and value is not None}

    def resolve(self, images) -> Recipe:
        """The recipe for an `ImageTable`."""
        train_images = len(images.split_rows(self.valid)[0])
        return RECIPES[self.recipe_name].adapted(train_images, **(dict(images.defaults) | self.changes))
