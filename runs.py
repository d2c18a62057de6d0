"""A run's folder: its name, config, history, metrics, weights and checkpoints; how a run that was stopped goes on."""

import csv
import io
import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import Callback, DataLoaders, L, Learner, ProgressCallback
from matplotlib import pyplot as plt
from torch import Tensor, nn

from data import DEVICES, VALIDS
from errors import UserError
from files import Damaged, NotWritten, held, load_tensors, save_tensors, write
from learner import PRECISIONS, get_learner
from model import NORMS
from recipes import RECIPES

PACKAGES = ("torch", "torchvision", "fastai", "fastcore", "numpy", "pillow", "scikit-learn", "safetensors")
HISTORY = ["epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds"]
CHECKPOINTS = 2  # that are kept, so that there is another one if the newest is damaged


# ---- Options -------------------------------------------------------------------------------------------------------

WORDS = {"recipe": RECIPES, "valid": VALIDS, "norm": NORMS, "precision": PRECISIONS, "device": DEVICES}
ABOVE_ZERO = {"epochs": int, "peak_epoch": float, "batch_size": int, "width": int, "lr_max": float, "lr_min": float}
ZERO_OR_MORE = {"clip": float, "l1": float, "seed": int}
CHOSEN_LATER = {"epochs", "peak_epoch", "batch_size", "lr_max", "lr_min"}  # where they aren't given
AT_MOST = {"epochs": 99_999, "width": 4096, "lr_max": 1e30, "lr_min": 1e30, "clip": 1e30, "l1": 1e30, "seed": 2**32 - 1}


def check_options(options: dict):
    """Raise `UserError` for the first of train.py's options that can't be; `None` stands for one not yet chosen."""
    for name, words in WORDS.items():
        if options[name] not in words:
            raise UserError(f"{name} is {options[name]!r}; it must be one of {', '.join(words)}")
    for name, kind in (ABOVE_ZERO | ZERO_OR_MORE).items():
        value = options[name]
        if value is None and name in CHOSEN_LATER:
            continue
        if not isinstance(value, (int, kind)) or isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; it must be a number")
        if not 0 <= value < float("inf") or (value == 0 and name in ABOVE_ZERO):
            raise UserError(f"{name} is {value}; it must be {'above 0' if name in ABOVE_ZERO else '0 or more'}")
        if value > AT_MOST.get(name, value):
            raise UserError(f"{name} is {value}; it must be at most {AT_MOST[name]}")
    if not isinstance(options["annihilate"], bool):
        raise UserError(f"annihilate is {options['annihilate']!r}; it must be true or false")
    epochs, peak_epoch = options["epochs"], options["peak_epoch"]
    if epochs and peak_epoch and peak_epoch > epochs:
        raise UserError(f"peak_epoch is {peak_epoch:g}; it must be at most the number of epochs, {epochs}")
    lr_min, lr_max = options["lr_min"], options["lr_max"]
    if lr_min and lr_max and lr_min > lr_max:
        raise UserError(f"lr_min ({lr_min:g}) is above lr_max ({lr_max:g}); give a lower --lr_min or a higher --lr_max")


# ---- The folder ----------------------------------------------------------------------------------------------------


def new_run(runs_dir: str | Path, name: str | None, data: str, recipe: str) -> Path:
    """Make and return the folder `runs_dir/name`; without a name, `<date>-<time>-<data>-<recipe>`.

    Raises `UserError` for a name that is taken or no plain folder name, and for a `runs_dir` that can't be written to.
    """
    check_name(name)
    base = name or f"{datetime.now():%Y%m%d-%H%M%S}-{data[:50]}-{recipe}"
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


def check_name(name: str | None):
    if name is not None and (
        not name or Path(name).name != name or name.startswith(".") or len(os.fsencode(name)) > 200
    ):
        raise UserError(
            f"name is {name!r}; it must be a plain folder name, without slashes, of at most 200 letters, that doesn't"
            " begin with a dot"
        )


def find_run(run: str | Path, runs_dir: str | Path) -> Path:
    """The folder of a run that was begun; `"last"` is the one in `runs_dir` last begun or gone on with."""
    if run == "last":
        configs = sorted(Path(runs_dir).glob("*/config.json"), key=lambda config: config.stat().st_mtime)
        if not configs:
            raise UserError(f"{runs_dir} holds no run; give --resume a run's folder, or its --runs_dir")
        run = configs[-1].parent
    read_config(run)
    return Path(run)


def read_config(run: str | Path) -> dict:
    """config.json of a run that was begun. Raises `UserError` for a folder without one, or with something else."""
    config = Path(run) / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        options = content["options"]
        if not isinstance(content["data"]["sha256"], str) or not isinstance(options["data"], str):
            raise TypeError("data is no text")
        check_options(options)
        return content
    except OSError:
        raise UserError(f"{run} is not the folder of a run: it has no config.json that can be read") from None
    except (LookupError, TypeError, ValueError, RecursionError) as reason:
        raise UserError(f"{config} is not the config of a run ({type(reason).__name__}: {reason})") from None


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
    """Column name → numbers. Raises `UserError` for a file that isn't as `write_csv` left it."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {column: [float(row[column]) for row in rows] for column in rows[0]}
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as reason:
        raise UserError(f"{path} can't be read as a table of numbers ({reason}); resume or repeat the run") from None


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


# ---- Weights -------------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, path: Path):
    """The model's parameters and buffers as safetensors, in the usual contiguous layout."""
    save_tensors(path, model.state_dict())


def load_run(run: str | Path, dls: DataLoaders) -> Learner:
    """The Learner of a finished run on `dls`, with its weights, which are never unpickled.

    Raises `UserError` for a folder that is not a finished run, for data that isn't the run's, and for weights that
    don't fit the net.
    """
    config = read_config(run)
    check_data(run, config, dls)
    options, weights = config["options"], Path(run) / "model.safetensors"
    precision = "fp32" if options["precision"] == "fp32" else "auto"  # fp16 isn't to be had everywhere
    learn = get_learner(dls, norm=options["norm"], width=options["width"], precision=precision, path=run)
    try:
        learn.model.load_state_dict(load_tensors(weights)[0])
    except FileNotFoundError:
        raise UserError(f"{run} is not the folder of a finished run: it has no {weights.name}") from None
    except RuntimeError as reason:
        raise UserError(f"{weights} doesn't hold the weights of this net: {one_line(reason)}") from None
    return learn


def one_line(reason: Exception) -> str:
    return " ".join(str(reason).split())[:200]


def check_data(run: str | Path, config: dict, dls: DataLoaders):
    """Raise `UserError` unless `dls` hold the images that the run was begun with."""
    table = dls.train.table
    if table.hash != config["data"]["sha256"]:
        raise UserError(f"the images in {table.folder} are not those of {run}: they have changed since it was begun")


# ---- Going on ------------------------------------------------------------------------------------------------------


def resume_command(run: Path) -> str:
    """What to type to go on with `run`."""
    python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
    if python.startswith(".." + os.sep):
        python = sys.executable
    return shlex.join([python, sys.argv[0], "--resume", str(run)])


@contextmanager
def held_run(run: Path) -> Iterator[None]:
    """Hold the run's folder for this process; whatever stops it, say how to go on.

    Raises `UserError` if another process is training this run.
    """
    with held(run):
        for part in run.rglob(".*.part"):  # what a process left that was killed while it wrote
            part.unlink()
        try:
            yield
        except KeyboardInterrupt as stopped:
            raise type(stopped)(f"; to go on: {resume_command(run)}") from None
        except NotWritten as full:
            raise UserError(f"{full}, then go on: {resume_command(run)}") from None
        except OSError as reason:
            raise UserError(f"{reason}; put that right, then go on: {resume_command(run)}") from None


def capture(learn: Learner) -> tuple[dict[str, Tensor], dict]:
    """Everything that the rest of a training depends on, and its history so far, as tensors and as JSON."""
    recorder, loaders = learn.recorder, (learn.dls.train, learn.dls.valid)
    tensors = {f"model.{name}": value for name, value in learn.model.state_dict().items()}
    for index, values in learn.opt.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items() if value is not None}
    tensors["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    tensors["lrs"] = torch.tensor(recorder.lrs, dtype=torch.float64)
    tensors["losses"] = torch.stack(recorder.step_losses) if recorder.step_losses else torch.empty(0)
    kind, key, *rest = np.random.get_state()
    state = dict(
        epochs=len(recorder.values),
        # The memory layout decides on the order of computation, which could change the last bit.
        channels_last=[name for name, value in tensors.items() if value.ndim == 4 and not value.is_contiguous()],
        python=random.getstate(),
        numpy=[kind, key.tolist(), *rest],
        loaders=[loader.rng.getstate() for loader in loaders],
        scaler=learn.scaler.state_dict() if getattr(learn, "scaler", None) else {},  # fp16 only
        values=[list(row) for row in recorder.values],
        seconds=recorder.seconds,
        train_seconds=recorder.train_seconds,
    )
    return tensors, state


def restore(learn: Learner, tensors: dict[str, Tensor], state: dict):
    """Put a Learner with its optimiser into the state that `capture` saw."""
    prefix = "model."
    learn.model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    optimizer = learn.opt.state_dict() | {"state": {}}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            if key in state["channels_last"]:
                value = value.contiguous(memory_format=torch.channels_last)
            optimizer["state"].setdefault(int(index), {})[name] = value
    learn.opt.load_state_dict(optimizer)
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    random.setstate(python_state(state["python"]))
    np.random.set_state(tuple(state["numpy"]))
    for loader, position in zip((learn.dls.train, learn.dls.valid), state["loaders"], strict=True):
        loader.rng.setstate(python_state(position))
    if state["scaler"] and hasattr(learn, "scaler"):  # a Learner that will not train any more has none
        learn.scaler.load_state_dict(state["scaler"])
    recorder = learn.recorder
    recorder.lrs = tensors["lrs"].tolist()
    recorder.step_losses = list(tensors["losses"].to(learn.dls.device))
    recorder.values, recorder.seconds = [L(row) for row in state["values"]], state["seconds"]
    recorder.train_seconds = state["train_seconds"]


def python_state(position: list) -> tuple:
    """JSON has no tuples, and `random` takes nothing else."""
    kind, numbers, gauss = position
    return kind, tuple(numbers), gauss


def write_history(learn: Learner, run: Path):
    """history.csv, a row an epoch, and batches.csv, a row a step."""
    recorder, steps = learn.recorder, len(learn.dls.train)
    epochs = [
        (epoch, *values, round(seconds, 3))
        for epoch, (values, seconds) in enumerate(zip(recorder.values, recorder.seconds), start=1)
    ]
    write_csv(run / "history.csv", HISTORY, epochs)
    losses = torch.stack(recorder.step_losses).tolist()
    batches = [
        (step + 1, step // steps + 1, float(lr), loss) for step, (lr, loss) in enumerate(zip(recorder.lrs, losses))
    ]
    write_csv(run / "batches.csv", ["step", "epoch", "lr", "loss"], batches)


class RunLog(Callback):
    """After each epoch, write history.csv, batches.csv and a checkpoint.

    `begun` is the time at which the run would have begun without interruptions, `extra` what the checkpoints should
    hold beside the Learner's state, `resumed` the checkpoint to go on from.
    """

    order = ProgressCallback.order + 20  # after fastai has skipped the epochs that are done already

    def __init__(self, run: Path, begun: float, extra: dict, resumed: tuple | None = None):
        self.run_folder, self.begun, self.extra, self.resumed = run, begun, extra, resumed

    def before_epoch(self):
        if self.resumed:
            restore(self.learn, *self.resumed)
            self.resumed = None
        elif self.epoch == 0:
            self.save()

    def after_epoch(self):
        if self.recorder.skipped:
            return
        write_history(self.learn, self.run_folder)
        self.save()

    def save(self):
        tensors, state = capture(self.learn)
        folder = self.run_folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        save_tensors(
            folder / f"epoch-{state['epochs']:05}.safetensors",
            tensors, **state, **self.extra, elapsed=time.time() - self.begun,
        )  # fmt: skip
        for old in checkpoints(self.run_folder)[CHECKPOINTS:]:
            old.unlink()


def checkpoints(run: Path) -> list[Path]:
    """Newest first."""
    return sorted((run / "checkpoints").glob("epoch-*.safetensors"), reverse=True)


def last_checkpoint(run: Path, options: dict) -> tuple[dict[str, Tensor], dict] | None:
    """The newest checkpoint that is whole; `None` where the run had come to none yet.

    A damaged one is named. Raises `UserError` where all are damaged, and for one made with other options.
    """
    damaged = []
    for checkpoint in checkpoints(run):
        try:
            tensors, state = load_tensors(checkpoint)
        except Damaged as damage:
            print(damage)
            damaged.append(checkpoint.name)
            continue
        before = state.get("options", {}) | {"data": options["data"]}  # whose place may change
        if before != options:
            raise UserError(
                f"{checkpoint} doesn't belong to this run: it was made with other options than config.json has"
            )
        return tensors, state
    if damaged:
        raise UserError(f"no checkpoint in {run} is whole ({', '.join(damaged)}); start a new run")
    return None
