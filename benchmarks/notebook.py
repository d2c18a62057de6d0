"""A run beside the assignment's notebook, epoch by epoch: `python benchmarks/notebook.py RUN`"""

import sys
from pathlib import Path

from fastcore.script import call_parse
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))

from errors import UserError, command_line
from runs import read_config, read_csv, save_figure

LOG = Path(__file__).parents[1] / "results/notebook/log.csv"
CLOSE = 5  # percentage points on either side of the notebook's last accuracy, in the picture's second half


def percent(parts: list[float]) -> list[float]:
    return [100 * part for part in parts]


def plot_beside_notebook(run: Path):
    """Accuracy of the run and of the notebook after each epoch, whole on the left, the last points on the right."""
    config, ours, notebook = read_config(run), read_csv(run / "history.csv"), read_csv(LOG)
    if config["data"]["name"] != "cifar10" or config["options"]["valid"] != "test":
        raise UserError(f"{run} was not tested on CIFAR-10's test split, so the notebook is no match for it")
    test, train = notebook["test_accuracy_percent"], notebook["train_accuracy_percent"]
    curves = [
        ("notebook", "tab:gray", notebook["epoch"], test, train),
        ("ours", "tab:orange", ours["epoch"], percent(ours["valid_accuracy"]), percent(ours["train_accuracy"])),
    ]
    _, (whole, closer) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for ax in (whole, closer):
        for name, colour, epochs, test, train in curves:
            ax.plot(epochs, test, "o-", color=colour, markersize=4, label=f"{name}, test: {test[-1]:.2f} % at the end")
            ax.plot(epochs, train, "--", color=colour, alpha=0.6, label=f"{name}, train")
        ax.set_xlabel("Epoch")
        ax.set_ylabel("Accuracy (%)")
        ax.grid(alpha=0.3)
    bottom = notebook["test_accuracy_percent"][-1] - CLOSE
    closer.set_ylim(bottom, bottom + 2 * CLOSE)
    closer.set_xlim(
        min(epoch for *_, epochs, test, _ in curves for epoch, value in zip(epochs, test) if value > bottom) - 1
    )
    whole.set_title("After each epoch")
    closer.set_title("The same, closer")
    whole.legend(loc="lower right")


@call_parse
@command_line
def main(
    run: str,  # folder of a finished run on CIFAR-10
    out: str = "",  # PNG file (default: notebook.png in the folder)
):
    "Draw the accuracy of a run and of the assignment's notebook after each epoch."
    plot_beside_notebook(Path(run))
    save_figure(Path(out or Path(run) / "notebook.png"))
