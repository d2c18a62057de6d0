"""The report of a run, with all plots: report.md and PNG files. run.py saves everything else."""

from pathlib import Path

from fastai.vision.all import Learner

from cifar10.decode import printable
from cifar10.files import write
from cifar10.interpretation import Interpretation
from cifar10.names import fonts_for
from cifar10.plots import plot_confusion, plot_curves, plot_grad_cam, plot_misclassified, save_figure


def per_class_accuracy(interp: Interpretation) -> dict[str, float | None]:
    """Class → the fraction of its images that are classified correctly; `None` for a class without images."""
    matrix = interp.confusion_matrix()
    return {name: matrix[i, i] / matrix[i].sum() if matrix[i].sum() else None for i, name in enumerate(interp.names)}


def markdown_report(interp: Interpretation) -> str:
    """Accuracy, per-class accuracy and the most confused pairs as Markdown."""
    lines = [f"# {interp.accuracy:.2%} of {len(interp.targs):,} images correct"]
    values = [(i, label, v) for i, (label, v) in enumerate(per_class_accuracy(interp).items()) if v is not None]
    for header, rows in (
        ("| number | class | accuracy |\n| ---: | --- | ---: |", [(i, label, f"{v:.1%}") for i, label, v in values]),
        ("| actual | predicted | images |\n| --- | --- | ---: |", interp.most_confused(min_val=1)[:10]),
    ):
        if rows:
            cells = ([printable(cell).replace("|", r"\|") for cell in row] for row in rows)
            lines += ["", header, *(f"| {' | '.join(row)} |" for row in cells)]
    return "\n".join(lines) + "\n"


def write_report(learn: Learner, folder: Path) -> Interpretation:
    """Write curves.png, confusion_matrix.png, misclassified.png, gradcam.png and report.md into a run's folder."""
    interp = Interpretation(learn)
    if missing := fonts_for("".join(interp.names))[1]:
        print(
            f"No font here has {''.join(sorted(missing)[:20])}: plots show these classes by their number in report.md"
        )
    plot_curves(folder)
    save_figure(folder / "curves.png")
    plots = {"confusion_matrix": plot_confusion, "misclassified": plot_misclassified, "gradcam": plot_grad_cam}
    for name, plot in plots.items():
        plot(interp)
        save_figure(folder / f"{name}.png")
    write(folder / "report.md", markdown_report(interp))
    return interp
