"""Runs side by side: `python compare.py RUN RUN …`, a table over seeds and the curves in one plot.

Runs of the same recipe, data and options but the seed are one row, with mean and standard deviation. Runs on CIFAR-10's
test split are drawn beside the assignment's notebook.
"""

from dataclasses import dataclass
from typing import Annotated

from cifar10 import cli


@dataclass(frozen=True)
class Options:
    """Compare finished runs: a table with mean and standard deviation over seeds, and the curves in one plot."""

    runs: Annotated[list[str], {"nargs": "+", "type": str}, "folders of finished runs, or last"]
    out: Annotated[cli.OutputFile, "PNG file for the curves"] = "compare.png"


if __name__ == "__main__":
    typed = cli.start(Options)  # before what takes seconds to import: a mistake is answered at once

import json
from pathlib import Path
from statistics import mean, stdev

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from cifar10.errors import UserError
from cifar10.files import read_csv, read_json, save_figure
from cifar10.interpretation import NOTEBOOK_LOG, markdown_table, shorten_middle
from cifar10.options import Options as TrainOptions
from cifar10.recipes import ASSIGNMENT
from cifar10.runs import find_run

NOTEBOOK = "the assignment's notebook"
ZOOM = 5  # percentage points on either side of the best final accuracy, in the right half of the plot
# Options that may differ within a row. `recipe` is only a name, its hyperparameters are compared.
IGNORED = ("seed", "name", "runs_dir", "device", "resume", "data", "images", "timeout", "recipe")
HEADER = ["runs", "data", "n", "epochs", "accuracy of the report", "with TTA", "PFLOP", "minutes, as run"]


def load(folder: str | Path) -> dict:
    """A finished run: its name, data, `settings` (all but what may differ in a row), metrics, and accuracies by epoch.

    The accuracies are in percent. Raises `UserError` if the folder is not that of a finished run.
    """
    path = Path(folder)
    try:
        config, metrics = (read_json(path / f"{name}.json") for name in ("config", "metrics"))
        history = pd.DataFrame(read_csv(path / "history.csv")).set_index("epoch")
        # Older runs lack newer options and hyperparameters; the defaults are what these runs did.
        options = vars(TrainOptions()) | config["options"]
        recipe = vars(ASSIGNMENT) | {"width": options["width"]} | config.get("recipe", {"name": options["recipe"]})
        settings = {name: value for name, value in options.items() if name not in (*IGNORED, *recipe)}
        settings |= dict(recipe=recipe, sha256=config["data"].get("sha256"))
        about = dict(name=path.name, data=config["data"]["name"], settings=settings, metrics=metrics)
        return about | dict(accuracies=100 * history[["valid_accuracy", "train_accuracy"]])
    except (OSError, ValueError, LookupError):
        raise UserError(f"{folder} is not the folder of a finished run") from None


def mean_and_std(values: list[float]) -> str:
    """Mean in percent, with the standard deviation if there are several values."""
    return f"{mean(values):.2%}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def table(runs: list[dict]) -> str:
    """A row for the runs that differ in nothing but the seed."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run["settings"], sort_keys=True), []).append(run)
    rows = []
    for group in groups.values():
        found = [run["metrics"] for run in group]
        tta, pflop = ([metrics[key] for metrics in found if key in metrics] for key in ("tta_accuracy", "pflop"))
        rows.append([
            ", ".join(run["name"] for run in group), group[0]["data"], len(group), found[0]["epochs"],
            mean_and_std([metrics["accuracy"] for metrics in found]), mean_and_std(tta) if tta else "",
            f"{mean(pflop):.3g}" if pflop else "", f"{mean(metrics['seconds'] for metrics in found) / 60:.1f}",
        ])  # fmt: skip
    return markdown_table(HEADER, rows, right=6)


def curves(runs: list[dict]) -> list[tuple[str, pd.DataFrame]]:
    """Names, and valid and train accuracy in percent by epoch: of each run, and of the notebook if comparable."""
    drawn = [(run["name"], run["accuracies"]) for run in runs]
    if all((run["data"], run["settings"]["valid"]) == ("cifar10", "test") for run in runs):
        log = pd.DataFrame(read_csv(NOTEBOOK_LOG)).set_index("epoch")
        drawn.append((NOTEBOOK, log[["test_accuracy_percent", "train_accuracy_percent"]]))
    return drawn


@plt.rc_context({"text.parse_math": False})  # a name may hold dollar signs
def plot(drawn: list[tuple[str, pd.DataFrame]]):
    """Accuracy after each epoch: on the left the whole, on the right a close-up of the end."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    for ax, title in zip(axes, ("Accuracy after each epoch: valid, and train (dashed)", "Close-up of the last epochs")):
        for number, (name, accuracies) in enumerate(drawn):
            valid, train = (accuracies[column] for column in accuracies)
            color, marker = "tab:gray" if name == NOTEBOOK else f"C{number % 7}", ("os^vD" * 9)[number // 7]
            label = f"{shorten_middle(name, 50)}: {valid.iloc[-1]:.2f}%"
            ax.plot(valid, f"{marker}-", color=color, markersize=4, label=label)
            ax.plot(train, "--", color=color, alpha=0.5)
        ax.set(title=title, xlabel="Epoch", ylabel="Accuracy (%)")
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    valid = pd.concat([accuracies.iloc[:, 0] for _, accuracies in drawn])
    top = max(accuracies.iloc[-1, 0] for _, accuracies in drawn)
    first = valid.index[valid > top - ZOOM].min()
    axes[1].set(xlim=(first - 1, None), ylim=(top - ZOOM, min(top + ZOOM, 100.5)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def main(**typed):
    """Print the table and draw the curves. `typed`: the options given on the command line, by name (see `Options`)."""
    options = Options(**typed)
    loaded = [load(folder) for folder in dict.fromkeys(map(find_run, options.runs))]
    print(table(loaded))
    plot(curves(loaded))
    save_figure(Path(options.out))
    print(f"The curves are in {options.out}")


if __name__ == "__main__":
    cli.run(main, typed)
