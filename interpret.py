"""Plots and report of a finished run, again or on other labeled images: `python interpret.py RUN [--data photos/]`."""

from dataclasses import replace
from pathlib import Path

from cifar10 import cli
from cifar10.data import ImageTable, Reading, build_dls, eval_split_name
from cifar10.errors import UserError
from cifar10.files import write_json
from cifar10.interpretation import write_report
from cifar10.runs import Run
from cifar10.training import build_learner
from model import ResNet


def main(
    run: str,  # folder of a finished run
    data: str | None = None,  # other labeled images, or where the run's own are now (default: where they were)
    split: str | None = None,  # train, valid, test or all (default: as in the run; for other images, the last one)
    out: str | None = None,  # folder for the report (default: the run's, or one in it for other images or splits)
    skip_broken: bool = False,  # leave out images that can't be read
    image_column: str | None = None,  # of a table: the column of paths or ids (default: the run's)
    label_column: str | None = None,  # of a table: the column of classes (default: the run's)
    split_column: str | None = None,  # of a table: the column of splits (default: the run's)
    images: str | None = None,  # folder that a table's paths are relative to (default: as in the run, or the table's)
    tta: bool = False,  # also measure the accuracy with test-time augmentation
):
    "Write the plots and the report of a finished run, on its own images or on others."
    finished = Run.open(run)
    options, recipe = finished.options, finished.recipe
    if not finished.is_finished:
        raise UserError(f"{run} is not a finished run; finish it with {finished.resume_command('train.py')}")
    try:
        model = ResNet(**finished.model_args)
    except (TypeError, ValueError) as reason:
        raise UserError(f"{run}/config.json does not describe a model ({reason})") from None
    finished.load_weights(model)
    typed = dict(skip_broken=skip_broken, images=images)
    typed |= dict(image_column=image_column, label_column=label_column, split_column=split_column)
    reading = replace(Reading.of(options), **{name: value for name, value in typed.items() if value})
    if data:  # whose images are not in the folder of the run's
        reading = replace(reading, images=images)
    table = ImageTable.open(data or options.data, reading)
    settings = dict(bs=recipe.batch_size, valid=options.valid, weighted=recipe.weighted)
    settings |= dict(stats=(finished.mean, finished.std))
    own = not split and (not data or table.hash == finished.sha256)
    if own:
        folder, about = Path(out or finished.path), f"{table.name} {eval_split_name(table, options.valid)} images"
    else:
        if table.ranges and table.ranges != finished.ranges:
            table = ImageTable.open(
                data or options.data, reading, fixed_ranges=finished.ranges
            )  # as the model knows them
        split = split or ("all" if table.flat else table.split_names[-1])
        folder, about = Path(out or finished.path / f"{table.name}-{split}"), f"{table.name} images ({split})"
        settings |= dict(only=split, classes=finished.classes)
    if folder.resolve() == finished.path.resolve():
        if not own:
            raise UserError(f"{folder} is the run's own folder; choose another --out")
        folder = finished.path
    dls = build_dls(table, **settings)
    # In fp32 if it was trained so; otherwise in whatever is fastest here, because not every device has fp16.
    learn = build_learner(dls, model, recipe, "fp32" if options.precision == "fp32" else "auto")
    if own:
        finished.check_data(learn)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = write_report(learn, finished, folder, about, tta)
    if folder != finished.path:
        write_json(folder / "metrics.json", metrics)
    elif tta:
        finished.write_metrics(tta_accuracy=metrics["tta_accuracy"])


if __name__ == "__main__":
    cli.run(main)
