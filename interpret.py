"""Regenerate the plots and the report of a finished run: `python interpret.py RUN`."""

from cifar10 import cli
from cifar10.cli import UserError
from cifar10.data import get_dls
from cifar10.images import ImageTable
from cifar10.interpretation import tta_accuracy
from cifar10.learner import get_learner
from cifar10.report import write_report
from cifar10.run import Run
from model import ResNet


def main(
    run: str,  # folder of a finished run
    data: str | None = None,  # where its images are now (default: where they were in training)
    tta: bool = False,  # also measure the accuracy with test-time augmentation, into metrics.json
):
    "Regenerate the plots and the report of a finished run."
    finished = Run.open(run)
    options, recipe = finished.options, finished.recipe
    if not finished.is_finished:
        raise UserError(f"{run} is not a finished run; finish it with {finished.resume_command('train.py')}")
    try:
        model = ResNet(**finished.model_args)
    except (TypeError, ValueError) as reason:
        raise UserError(f"{run}/config.json does not describe a model ({reason})") from None
    finished.load_weights(model)
    stats = finished.mean, finished.std
    images = ImageTable.open(data or options.data, options.skip_broken)
    dls = get_dls(images, bs=recipe.batch_size, valid=options.valid, stats=stats)
    # In fp32 if it was trained so; otherwise in whatever is fastest here, because not every device has fp16.
    learn = get_learner(dls, model, recipe, "fp32" if options.precision == "fp32" else "auto")
    finished.check_data(learn)
    interp = write_report(learn, finished.path)
    print(f"{run}: {interp.accuracy:.2%} of {len(interp.targs):,} images correct; plots and report.md written")
    if tta:
        accuracy = tta_accuracy(interp, recipe.flip)
        finished.write_metrics(tta_accuracy=accuracy)
        print(f"With test-time augmentation: {accuracy:.2%}")


if __name__ == "__main__":
    cli.run(main)
