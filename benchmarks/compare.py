"""A run beside the assignment's notebook, epoch by epoch: `python -m benchmarks.compare RUN`"""

import json
from pathlib import Path

from matplotlib import pyplot as plt

from cifar10 import cli
from cifar10.cli import UserError
from cifar10.files import read_csv
from cifar10.plots import save_figure

LOG = Path(__file__).parents[1] / "results/notebook/log.csv"
ZOOM = 5  # percentage points on either side of the notebook's final accuracy, in the right half of the plot


def percent(fractions: list[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]


def plot_beside_notebook(run: Path):
    """Accuracy of the run and of the notebook after each epoch: on the left the whole, on the right a close-up."""
    config, ours, notebook = json.loads((run / "config.json").read_text()), read_csv(run / "history.csv"), read_csv(LOG)
    if config["data"]["name"] != "cifar10" or config["options"]["valid"] != "test":
        raise UserError(f"{run} was not evaluated on CIFAR-10's test split, so it can't be compared with the notebook")
    test, train = notebook["test_accuracy_percent"], notebook["train_accuracy_percent"]
    curves = [
        ("notebook", "tab:gray", notebook["epoch"], test, train),
        ("ours", "tab:orange", ours["epoch"], percent(ours["valid_accuracy"]), percent(ours["train_accuracy"])),
    ]
    _, (whole, close_up) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for ax in (whole, close_up):
        for name, color, epochs, test, train in curves:
            ax.plot(epochs, test, "o-", color=color, markersize=4, label=f"{name}, test: {test[-1]:.2f}% at the end")
            ax.plot(epochs, train, "--", color=color, alpha=0.6, label=f"{name}, train")
        ax.set_xlabel("Epoch")
        ax.set_ylabel("Accuracy (%)")
        ax.grid(alpha=0.3)
    bottom = notebook["test_accuracy_percent"][-1] - ZOOM
    close_up.set_ylim(bottom, bottom + 2 * ZOOM)
    close_up.set_xlim(
        min(epoch for *_, epochs, test, _ in curves for epoch, value in zip(epochs, test) if value > bottom) - 1
    )
    whole.set_title("Accuracy after each epoch")
    close_up.set_title("Close-up of the last epochs")
    whole.legend(loc="lower right")


def main(
    run: str,  # folder of a finished run on CIFAR-10
    out: str = "",  # PNG file (default: notebook.png in the folder)
):
    "Plot the accuracy of a run and of the assignment's notebook after each epoch."
    plot_beside_notebook(Path(run))
    save_figure(Path(out or Path(run) / "notebook.png"))


if __name__ == "__main__":
    cli.run(main)
