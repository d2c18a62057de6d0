"""Runs side by side: `python -m benchmarks.compare RUN RUN …`, a table over seeds and the curves in one plot.

Runs of the same recipe, data and options but the seed are one row, with mean and standard deviation. Runs on CIFAR-10's
test split are drawn beside the assignment's notebook.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from cifar10 import cli
from cifar10.errors import UserError
from cifar10.files import OutputFile, read_csv, save_figure
from cifar10.interpretation.fonts import shorten_middle

LOG = Path(__file__).parents[1] / "results/notebook/log.csv"
NOTEBOOK = "the assignment's notebook"
ZOOM = 5  # percentage points on either side of the best final accuracy, in the right half of the plot
OWN = ("seed", "name", "runs_dir", "device", "resume", "data")  # options that may differ within a row


def load(folder: str) -> dict:
    """What a finished run says about itself. Raises `UserError` if it does not."""
    try:
        config, metrics = (
            json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "metrics")
        )
        history = read_csv(Path(folder) / "history.csv")
        settings = {name: value for name, value in config["options"].items() if name not in OWN}
        settings |= dict(recipe=config.get("recipe"))
        return dict(name=Path(folder).name, metrics=metrics, history=history, settings=settings, data=config["data"])
    except (OSError, ValueError, LookupError):
        raise UserError(f"{folder} is not the folder of a finished run") from None


def grouped(runs: list[dict]) -> list[list[dict]]:
    """Runs that differ in the seed only, together."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run["settings"], run["data"].get("sha256")], sort_keys=True), []).append(run)
    return list(groups.values())


def spread(values: list[float]) -> str:
    """Mean in percent, with the standard deviation if there are several values."""
    return f"{mean(values):.2%}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def table(groups: list[list[dict]]) -> str:
    """A row for each group, in Markdown."""
    lines = [
        "| runs | data | n | epochs | accuracy of the report | with TTA | PFLOP | minutes, as run |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for runs in groups:
        metrics = [run["metrics"] for run in runs]
        tta = [m["tta_accuracy"] for m in metrics if "tta_accuracy" in m]
        pflop = [m["pflop"] for m in metrics if "pflop" in m]
        cells = [
            ", ".join(run["name"] for run in runs), runs[0]["data"]["name"], len(runs), metrics[0]["epochs"],
            spread([m["accuracy"] for m in metrics]), spread(tta) if tta else "",
            f"{mean(pflop):.3g}" if pflop else "", f"{mean(m['seconds'] for m in metrics) / 60:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def curves(groups: list[list[dict]]) -> list[tuple[str, list[float], list[float], list[float]]]:
    """Name, epochs, valid and train accuracy in percent: each run's, and the notebook's where it can be compared."""
    runs = [run for group in groups for run in group]
    drawn = []
    for run in runs:
        history = run["history"]
        valid, train = ([100 * value for value in history[f"{split}_accuracy"]] for split in ("valid", "train"))
        drawn.append((run["name"], history["epoch"], valid, train))
    if all(run["data"]["name"] == "cifar10" and run["settings"]["valid"] == "test" for run in runs):
        log = read_csv(LOG)
        drawn.append((NOTEBOOK, log["epoch"], log["test_accuracy_percent"], log["train_accuracy_percent"]))
    return drawn


def plot(drawn: list[tuple[str, list[float], list[float], list[float]]]):
    """Accuracy after each epoch: on the left the whole, on the right a close-up of the end."""
    figure, (whole, close_up) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    for number, (name, epochs, valid, train) in enumerate(drawn):
        color, marker = "tab:gray" if name == NOTEBOOK else f"C{number % 7}", ("os^vD" * 9)[number // 7]
        label = f"{shorten_middle(name, 50)}: {valid[-1]:.2f}%"
        for ax in (whole, close_up):
            ax.plot(epochs, valid, f"{marker}-", color=color, markersize=4, label=label)
            ax.plot(epochs, train, "--", color=color, alpha=0.5)
    top = max(valid[-1] for _, _, valid, _ in drawn)
    close_up.set_ylim(top - ZOOM, min(top + ZOOM, 100.5))
    starts = [next((e for e, v in zip(epochs, valid) if v > top - ZOOM), epochs[-1]) for _, epochs, valid, _ in drawn]
    close_up.set_xlim(left=min(starts) - 1)
    whole.set_title("Accuracy after each epoch: valid, and train (dashed)")
    close_up.set_title("Close-up of the last epochs")
    for ax in (whole, close_up):
        ax.set(xlabel="Epoch", ylabel="Accuracy (%)")
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines, labels = whole.get_legend_handles_labels()
    for text in figure.legend(lines, labels, loc="outside lower center", ncols=2).get_texts():
        text.set_parse_math(False)  # a name may hold dollar signs


def main(
    runs: Annotated[str, {"nargs": "+"}],  # folders of finished runs
    out: OutputFile = "compare.png",  # PNG file for the curves
):
    "Compare finished runs: a table with mean and standard deviation over seeds, and the curves in one plot."
    folders = dict.fromkeys(str(Path(folder)) for folder in ([runs] if isinstance(runs, str) else runs))
    groups = grouped([load(folder) for folder in folders])
    print(table(groups))
    plot(curves(groups))
    save_figure(Path(out))
    print(f"The curves are in {out}")


if __name__ == "__main__":
    cli.run(main)
