"""A run's folder: its name, config, history, metrics and weights. Every file in it is written whole or not at all."""

import csv
import io
import json
import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.vision.all import Callback, DataLoaders, Learner, ProgressCallback
from matplotlib import pyplot as plt
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from errors import UserError
from learner import get_learner

PACKAGES = ("torch", "torchvision", "fastai", "fastcore", "numpy", "pillow", "scikit-learn", "safetensors")


def new_run(runs_dir: str | Path, name: str | None, data: str, recipe: str) -> Path:
    """Make and return the folder `runs_dir/name`; without a name, `<date>-<time>-<data>-<recipe>`.

    Raises `UserError` for a name that is taken or no plain folder name, and for a `runs_dir` that can't be written to.
    """
    if name is not None and (not name or Path(name).name != name or name.startswith(".")):
        raise UserError(
            f"name is {name!r}; it must be a plain folder name, without slashes, that doesn't begin with a dot"
        )
    base = name or f"{datetime.now():%Y%m%d-%H%M%S}-{data}-{recipe}"
    for attempt in range(1, 1000):
        run = Path(runs_dir) / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            if name is not None or not run.is_dir():
                raise UserError(f"{run} exists already; choose another --name or --runs_dir") from None
        except OSError as reason:
            raise UserError(f"{run} can't be made ({reason.strerror}); choose another --runs_dir") from None
    raise UserError(f"{runs_dir} holds a thousand runs of this second; choose a --name")


def write(path: Path, content: str | bytes):
    """Write `path` whole or not at all: a reader never sees a part of it, not even after a power failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_figure(path: Path):
    """Write matplotlib's current figure as PNG and close it."""
    png = io.BytesIO()
    plt.savefig(png, dpi=100, format="png")
    plt.close()
    write(path, png.getvalue())


def write_json(path: Path, value):
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, header: list[str], rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write(path, text.getvalue())


def read_csv(path: Path) -> dict[str, list[float]]:
    """Column name → numbers."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) for row in rows] for column in rows[0]}


def at_home(source: str) -> str:
    """A path below the home folder with `~` for that, so that a config can be shown to others."""
    path = Path(source)
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else source


def surroundings() -> dict:
    """What a result may depend on beside the options: versions, hardware, and the commit of this repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        if subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip():
            commit += " with changes"
    except (OSError, subprocess.CalledProcessError):
        commit = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "hardware": {
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "commit": commit,
    }


def save_weights(model: nn.Module, path: Path):
    """The model's parameters and buffers as safetensors, in the usual contiguous layout."""
    write(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}))


def load_run(run: str | Path, dls: DataLoaders) -> Learner:
    """The Learner of a finished run on `dls`, with its weights, which are never unpickled.

    Raises `UserError` for a folder that is not a finished run, for data that isn't the run's, and for weights that
    don't fit the net.
    """
    config = read_config(run)
    options, table = config["options"], dls.train.table
    if table.hash != config["data"]["sha256"]:
        raise UserError(f"the images in {table.folder} are not those of {run}: they have changed since it was trained")
    learn = get_learner(dls, norm=options["norm"], path=run)
    weights = Path(run) / "model.safetensors"
    try:
        learn.model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as reason:
        raise UserError(f"{weights} doesn't hold the weights of this net: {str(reason).splitlines()[0]}") from None
    return learn


def read_config(run: str | Path) -> dict:
    """config.json of a run. Raises `UserError` for a folder that is not a finished run."""
    run = Path(run)
    for file in ("config.json", "model.safetensors"):
        if not (run / file).is_file():
            raise UserError(f"{run} is not the folder of a finished run: it has no {file}")
    try:
        return json.loads((run / "config.json").read_text())
    except ValueError as reason:
        raise UserError(f"config.json in {run} is not JSON ({reason})") from None


class RunLog(Callback):
    """After each epoch, write history.csv (a row an epoch) and batches.csv (a row a step) into the run's folder."""

    order = ProgressCallback.order + 1

    def __init__(self, run: Path):
        self.run_folder = run

    def after_epoch(self):
        recorder, steps = self.recorder, len(self.dls.train)
        epochs = [
            (epoch, *values, round(seconds, 3))
            for epoch, (values, seconds) in enumerate(zip(recorder.values, recorder.seconds), start=1)
        ]
        write_csv(self.run_folder / "history.csv", [*recorder.metric_names[:-1], "seconds"], epochs)
        losses = torch.stack(recorder.step_losses).tolist()
        batches = [
            (step + 1, step // steps + 1, float(lr), loss) for step, (lr, loss) in enumerate(zip(recorder.lrs, losses))
        ]
        write_csv(self.run_folder / "batches.csv", ["step", "epoch", "lr", "loss"], batches)
