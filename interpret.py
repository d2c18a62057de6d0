"""Plots and report of a finished run, again or on other labeled images: `python interpret.py RUN [--data photos/]`."""

from dataclasses import dataclass
from typing import Annotated

from cifar10 import cli


@dataclass(frozen=True)
class Options:
    """Write the plots and the report of a finished run, on its own images or on others."""

    run: Annotated[str, "folder of a finished run, or last"]
    data: Annotated[str | None, "other labeled images, or where the run's own are (default: where they were)"] = None
    split: Annotated[str | None, "train, valid, test or all (default: the run's; for other images the last)"] = None
    out: Annotated[str | None, "folder for the report (default: the run's, or one in it for other images)"] = None
    skip_broken: Annotated[bool, "leave out images that can't be read"] = False
    image_column: Annotated[str | None, "of a table: the column of paths or ids (default: the run's)"] = None
    label_column: Annotated[str | None, "of a table: the column of classes (default: the run's)"] = None
    split_column: Annotated[str | None, "of a table: the column of splits (default: the run's)"] = None
    images: Annotated[
        str | None, "folder that a table's paths are relative to (default: the run's, or the table's)"
    ] = None
    tta: Annotated[bool, "also measure the accuracy with test-time augmentation"] = False


if __name__ == "__main__":
    typed = cli.start(Options)  # before what takes seconds to import: a mistake is answered at once

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cifar10.data import ImageTable, Reading, build_dls, eval_split_name
from cifar10.errors import UserError
from cifar10.files import read_json, write_json
from cifar10.interpretation import ImageClassifier, write_report
from cifar10.runs import Run, home_relative
from cifar10.training import build_learner
from model import ResNet


def main(**typed):
    """Write a report. `typed`: the options given on the command line, by name (see `Options`)."""
    options = Options(**typed)
    run = Run.open(options.run)
    recipe, valid = run.recipe, run.options.valid
    if not run.is_finished:
        raise UserError(f"{options.run} is not a finished run; finish it with {run.resume_command('train.py')}")
    trained = ImageClassifier.load(run.path, ResNet, device="cpu")
    if (trained.model.args, trained.classes) != (run.model_args, run.classes):
        raise UserError(f"{options.run} holds the weights of another model; copy those of the run there")
    data, reading = options.data or run.options.data, choose_reading(options, run)
    table = ImageTable.open(data, reading)
    own = not options.split and (not options.data or table.hash == run.sha256)
    only = classes = None
    if own:
        split, default = eval_split_name(table, valid), run.path
    else:
        if any(limits != trained.ranges.get(kind, limits) for kind, limits in table.ranges.items()):
            table = ImageTable.open(data, reading, fixed_ranges=trained.ranges)  # values are scaled as in training
        split = only = options.split or ("all" if table.flat else table.split_names[-1])
        default, classes = free_folder(run.path / f"{table.name}-{split}", home_relative(table.data)), trained.classes
    folder = choose_folder(Path(options.out or default), run, own)
    stats = [values.flatten().tolist() for values in (trained.mean, trained.std)]
    dls = build_dls(table, bs=recipe.batch_size, valid=valid, weighted=recipe.weighted, stats=stats, only=only,
                    classes=classes)  # fmt: skip
    # In fp32 if it was trained so; otherwise in whatever is fastest here, because not every device has fp16.
    learn = build_learner(dls, trained.model, recipe, "fp32" if run.options.precision == "fp32" else "auto")
    if own:
        run.check_data(learn)
    folder.mkdir(parents=True, exist_ok=True)
    temperature = trained.temperature if trained.temperature != 1 else None  # none was fitted
    metrics = write_report(learn, run, folder, split, temperature, options.tta)
    if folder != run.path:
        write_json(folder / "metrics.json", metrics | dict(data=home_relative(table.data)))
    elif options.tta:
        run.write_metrics(tta_accuracy=metrics["tta_accuracy"])


def choose_reading(options: Options, run: Run) -> Reading:
    """How to read the images: as the run did, but for the options that were given."""
    names = ("skip_broken", "images", "image_column", "label_column", "split_column")
    reading = replace(Reading.of(run.options), **{name: value for name in names if (value := getattr(options, name))})
    if options.data:  # the run's --images is the folder of its own data set, not of this one
        reading = replace(reading, images=options.images)
    return reading


def choose_folder(folder: Path, run: Run, own: bool) -> Path:
    """The folder for the report. Raises `UserError` if it is that of a run which the report is not about."""
    if folder.resolve() == run.path.resolve():
        if not own:
            raise UserError(f"{folder} is the run's own folder; choose another --out")
        return run.path
    if (folder / "config.json").exists():
        raise UserError(f"{folder} is the folder of another run; choose another --out")
    return folder


def free_folder(folder: Path, data: str) -> Path:
    """`folder`, or one with a number if it holds the report on other images than those of the path `data`."""
    name, number = folder.name, 1
    while (file := folder / "metrics.json").is_file():
        with suppress(ValueError, AttributeError):  # the file is damaged
            if read_json(file).get("data", data) == data:
                break
        folder, number = folder.with_name(f"{name}-{number}"), number + 1
    return folder


if __name__ == "__main__":
    cli.run(main, typed)
