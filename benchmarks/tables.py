"""Write the tables of README.md and docs/, from the code and from results/: `python -m benchmarks.tables`

A table is between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a function in `TABLES`.
"""

import re
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from fastcore.script import anno_parser

from benchmarks import ablation as ablations
from benchmarks import small as small_sets
from benchmarks.seeds import is_of
from cifar10 import cli
from cifar10.errors import UserError
from cifar10.files import read_csv, read_json, write
from cifar10.interpretation.report import CIFAR10_SHA256, markdown_table
from cifar10.options import Options
from cifar10.recipes import RECIPES
from compare import mean_and_std

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RUNS = {  # folder in results/ → recipe, what was typed besides it, and the version whose recipe it was if not today's
    "cifar10-best": ("best", "", ""),
    "cifar10-fast": ("fast", "", ""),
    "cifar10-faster": ("faster", "", ""),
    "cifar10-assignment": ("assignment", "", ""),
    "cifar10-layer": ("assignment", " --norm layer", " in version 1"),
}


def result(name: str):
    return read_json(RESULTS / name)


def runs_of(folder: str) -> list[dict]:
    """The metrics of a committed run, and of the same recipe with other seeds."""
    name, options, version = RUNS[folder]
    seeds = [] if options or version else sorted((RESULTS / "seeds").glob(f"{name}-*"))
    about = dict(recipe=asdict(RECIPES[name]), valid="test", width=64, data=dict(name="cifar10", sha256=CIFAR10_SHA256))
    for seed in seeds:
        if not is_of(seed, **about):
            raise UserError(f"{seed} is not of today's recipe, at full width, on CIFAR-10's test split; move it away")
    return [result(f"{folder}/metrics.json"), *(result(f"seeds/{seed.name}/metrics.json") for seed in seeds)]


def petaflops(metrics: dict) -> float:
    """PFLOP of a training run; older runs counted images only."""
    if "pflop" in metrics:
        return metrics["pflop"]
    images = metrics["images_per_second"] * metrics["seconds_training"]
    return images * result("speed.json")["flops_per_image"] / 1e15


def results() -> str:
    """Each committed run on CIFAR-10, and the assignment's notebook."""
    rows, rate = [], result("speed.json")["model_flops_per_second"]
    for folder, (name, options, version) in RUNS.items():
        metrics = runs_of(folder)
        pflop = mean(map(petaflops, metrics))
        rows.append([
            f"[`--recipe {name}{options}`](results/{folder}/README.md){version}",
            metrics[0]["epochs"],
            *(mean_and_std([run[key] for run in metrics]) for key in ("accuracy", "tta_accuracy")),
            len(metrics),
            f"{pflop:.2f}",
            "" if version else f"{1e15 * pflop / rate / 60:.0f}",
        ])  # fmt: skip
    log = read_csv(RESULTS / "notebook/log.csv")["test_accuracy_percent"]
    rows.append(["[the assignment's notebook](results/notebook/log.csv)", len(log), f"{log[-1]:.2f}%", "", 1, "", ""])
    return markdown_table(["run", "epochs", "test accuracy", "with TTA", "runs", "PFLOP", "minutes"], rows, right=6)


def recipes() -> str:
    """What the recipes differ in."""
    described = {
        "epochs": lambda r: r.epochs,
        "batch size": lambda r: r.batch_size,
        "peak learning rate": lambda r: r.lr_max or "found",
        "at epoch": lambda r: f"{r.peak_epoch:g}",
        "at the end": lambda r: "near zero" if r.annihilate else "as at the start",
        "shape of rise and fall": lambda r: {"cos": "cosine", "linear": "linear"}[r.anneal_strategy],
        "learning rate of convolutions": lambda r: f"{r.muon_lr_scale:g} ×",
        "learning rate of normalization's biases": lambda r: f"{r.norm_bias_lr_scale:g} ×",
        "scales of normalization": lambda r: "trained" if r.train_norm_scales else "as initialized",
        "statistics of batch normalization": lambda r: "of each batch" if r.train_norm_stats else "of the weights",
        "weight decay of the FC layer": lambda r: f"{r.weight_decay:g}",
        "label smoothing": lambda r: f"{r.label_smoothing:g}",
        "horizontal flip": lambda r: "alternating" if r.alternate_flips else "random",
        "padding of random crops": lambda r: f"{r.crop_padding} pixels",
        "Cutout": lambda r: f"{r.cutout}×{r.cutout}" if r.cutout else "none",
        "training images": lambda r: ", ".join(f"{side}×{side} until {until:.0%}" for side, until in r.sizes),
        "frozen layers": lambda r: ", ".join(f"{layer} from {begin:.0%}" for layer, begin in r.freeze) or "none",
        "validation": lambda r: "after each epoch" if r.validate == "each" else "at the end",
    }
    rows = [[title, *map(describe, RECIPES.values())] for title, describe in described.items()]
    return markdown_table(["", *(f"`{name}`" for name in RECIPES)], rows)


def options() -> str:
    """Every option of train.py with its help text."""
    rows = []
    for action in anno_parser(Options)._actions:
        if action.dest in ("help", "pdb", "xtra"):
            continue
        names = ", ".join(f"`{name.replace('-', '_').replace('__', '--', 1)}`" for name in action.option_strings)
        values = f" ({', '.join(f'`{value}`' for value in action.choices)})" if action.choices else ""
        rows.append([names, action.help.replace("<", "&lt;") + values])
    return markdown_table(["option", "meaning"], rows)


def speed() -> str:
    """The CPU benchmark."""
    found, overhead = result("speed.json"), result("overhead.json")
    rows = [
        ["training speed against a plain PyTorch loop: fp32, contiguous, torchvision's transforms in two workers",
         f"{found['times_plain']:.2f}×"],
        ["training speed against fastai from PNG files, as in its tutorials", f"{found['times_stock_fastai']:.2f}×"],
        ["operations per second, relative to torch.matmul with the same shapes and precision",
         f"{found['part_of_limit']:.1%}"],
        ["the convolutions by themselves, each in the fastest way seen, as a share of a training step",
         f"{found['convolutions_part_of_step']:.1%}"],
        ["loading and augmenting a batch, as a share of a training step", f"{found['data_part_of_step']:.1%}"],
        ["peak memory of a process that trains four steps and validates", f"{found['peak_gib']:.2f} GiB"],
        ["duration of a training step, against a plain loop with the same model, optimizer and precision",
         f"{overhead['one_batch_ms'] / overhead['bare_ms']:.3f}×"],
    ]  # fmt: skip
    return markdown_table(["two CPU cores, bf16", "measured"], rows, right=1)


def scale() -> str:
    """One and several processes."""
    rows = [
        [row["processes"], f"{row['speedup']:.2f}×", f"{row['loading'] / row['step']:.1%}",
         f"{row['reducing'] / row['step']:.1%}" if row["reducing"] else ""]
        for row in result("scale.json")["seconds"]
    ]  # fmt: skip
    return markdown_table(["processes", "speed", "loading", "all-reduce"], rows, right=4)


def ablation() -> str:
    """What a recipe gains or loses with one thing changed."""
    return "\n\n".join(map(ablations.table, result("ablation.json").values()))


def small() -> str:
    """Small data sets."""
    return small_sets.table(result("small.json"))


TABLES = {function.__name__: function for function in (results, recipes, options, speed, scale, ablation, small)}


def render(page: str) -> str:
    """The text of a page with all of its tables made anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def main():
    "Write the tables of README.md and docs/ from the code and from results/."
    for page in PAGES:
        write(page, render(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    cli.run(main)
