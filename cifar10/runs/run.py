"""A run: a folder with its config, history, metrics, plots, weights and checkpoints, used by one process at a time."""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from fastai.vision.all import Learner, Normalize, default_device, get_model
from filelock import FileLock, Timeout
from torch import nn

from cifar10.errors import Stopped, UserError, WriteError
from cifar10.files import (
    LEFTOVERS,
    acquire,
    read_json,
    remove_leftovers,
    save_tensors,
    write_csv,
    write_json,
)
from cifar10.hardware import collect_env
from cifar10.options import Options
from cifar10.processes import from_rank0, host_count, launch_command, launch_id, on_rank0, stopped_by
from cifar10.recipes import Recipe
from cifar10.signals import ignore_signals, is_distributed

FORMAT = 3  # of config.json, the weights and the checkpoints; raise it when this code can no longer read older files
WEIGHTS = "model.safetensors"
CHANGEABLE = ("data", "images", "timeout")  # options that may change when a run is resumed
PRETRAINED = "pretrained.safetensors"  # a copy of the weights that the run started from, with which it can be resumed
HISTORY = ["epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds"]


class Run:
    """The folder `path` of a run, and what config.json says about it.

    `options` and `recipe` are those it was started with, `model_args` the arguments of its model, `classes` the names
    of the outputs, `size` the images' side in pixels, `data` what the model's inputs and outputs depend on.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, json.loads(json.dumps(config))  # as a reader of config.json sees it
        self.options, self.recipe = Options(**config["options"]), Recipe.from_json(config["recipe"])
        self.model_args: dict[str, Any] = dict(config["model"])
        data = config["data"]
        self.sha256, self.classes, self.size = str(data["sha256"]), list(data["classes"]), int(data["size"])
        self.data = {name: data[name] for name in ("name", "classes", "size", "ranges", "mean", "std")}

    @classmethod
    def create(cls, options: Options, recipe: Recipe, learn: Learner) -> "Run":
        """Make a run's folder and its config.json. Raises `UserError` if the name is taken or it can't be written."""
        dls, images = learn.dls, learn.dls.train.table
        normalize = next(tfm for tfm in dls.after_batch.fs if isinstance(tfm, Normalize))
        mean, std = (values.flatten().tolist() for values in (normalize.mean, normalize.std))
        data = dict(
            name=images.name, train=len(dls.train_ds), valid=len(dls.valid_ds),
            test=len(dls[2].dataset) if len(dls.loaders) > 2 else None, classes=list(dls.vocab),
            size=images.size, resize=images.resize, mean=mean, std=std, ranges=images.ranges, sha256=images.hash,
        )  # fmt: skip
        weights = options.weights and home_relative(options.weights)
        options = replace(options, **places(images), weights=weights, device=dls.device.type, precision=learn.precision)
        about = dict(options=asdict(options), recipe=asdict(recipe), model=get_model(learn.model).args, data=data)
        config = dict(format=FORMAT, id=uuid4().hex, **about, **collect_env(), launch=launch_id())
        run = cls(make_folder(Path(options.runs_dir), options.name, f"{images.name[:50]}-{recipe.name}"), config)
        run.update()
        return run

    @classmethod
    def open(cls, path: str | Path, runs_dir: str | Path = "runs") -> "Run":
        """The run in a folder; `"last"` is the latest one in `runs_dir`. Raises `UserError` if it can't be read."""
        path = find_run(path, runs_dir)
        file = path / "config.json"
        try:
            config = read_json(file)
            if config.get("format", 1) == FORMAT:
                return cls(path, config)
        except OSError:
            raise UserError(f"{path} is not the folder of a run: it has no config.json that can be read") from None
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as reason:
            raise UserError(f"{file} is not the config of a run ({type(reason).__name__}: {reason})") from None
        found = config.get("format", 1)  # the first version had none
        raise UserError(f"{path} has format {found}, not {FORMAT}; train again, or use the version that made it")

    @property
    def is_finished(self) -> bool:
        return (self.path / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json says, which a finished run has."""
        return read_json(self.path / "metrics.json") if self.is_finished else {}

    def check_options(self, typed: dict[str, Any]) -> Options:
        """The options to resume with. Raises `UserError` if one of the `typed` ones would change the result."""
        typed = {name: value for name, value in typed.items() if value != "auto"}  # which makes no demand
        if "weights" in typed:
            typed["weights"] = home_relative(typed["weights"])
        started_with = {name: value for name, value in vars(self.options).items() if value is not None}
        known = asdict(self.recipe) | started_with | {"name": self.path.name, "recipe": self.recipe.name}
        for name, value in typed.items():
            if name not in (*CHANGEABLE, "resume", "runs_dir") and value != known.get(name):
                was = f"with {name}={known[name]}" if name in known else "without it"
                raise UserError(f"can't change --{name} on resume: this run was started {was}")
        return replace(self.options, **{name: typed[name] for name in CHANGEABLE if name in typed})

    def check_data(self, learn: Learner):
        """Raise `UserError` unless the Learner has the images that the run was started with."""
        images = learn.dls.train.table
        if images.hash != self.sha256:
            raise UserError(f"the images in {images.folder} are not those of {self.path}; give --data another path")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, and say how to resume if this process is interrupted. Raises `UserError` if it is locked."""
        lock = FileLock(self.path / ".lock", mode=0o666)
        self.acquire(lock)
        try:
            yield
        except (KeyboardInterrupt, Exception) as reason:
            if by := stopped_by(reason):
                if is_distributed():
                    ignore_signals()
                raise Stopped(by, f"; resume with: {self.resume_command()}") from None
            if isinstance(reason, WriteError):
                raise UserError(f"{reason}, then resume with: {self.resume_command()}") from None
            if isinstance(reason, OSError):
                raise UserError(f"{reason}; fix this, then resume with: {self.resume_command()}") from reason
            raise
        finally:
            lock.release()

    @from_rank0
    def acquire(self, lock: FileLock):
        """Acquire the lock, and remove what a process left that was killed while it was writing."""
        try:
            acquire(lock, timeout=0)
        except Timeout:
            raise UserError(f"{self.path} is locked by another process; wait until it ends, or stop it") from None
        remove_leftovers(self.path.rglob(LEFTOVERS))

    def resume_command(self, script: str = "") -> str:
        """What to type to resume this run."""
        resume = ["--resume", str(self.path)]
        if host_count() > 1:
            return f"the same command on each host, with {shlex.join(resume)} in place of --name"
        # The processes join before they read the run, on the fastest device.
        device = ["--device", "cpu"] if is_distributed() and self.options.device != default_device().type else []
        return shlex.join([*launch_command(script or sys.argv[0]), *resume, *device])

    def update(self, **values):
        """Add or replace entries of config.json."""
        self.config |= values
        on_rank0(write_json)(self.path / "config.json", self.config)

    @on_rank0
    def write_history(self, learn: Learner):
        """history.csv, a row per epoch, and batches.csv, a row per step."""
        recorder, steps = learn.recorder, len(learn.dls.train)
        epochs = enumerate(zip(recorder.values, recorder.extra, recorder.seconds), start=1)
        rows = [
            (epoch, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, round(seconds, 3))
            for epoch, ((train_loss, valid_loss, valid_accuracy), (train_accuracy, lr), seconds) in epochs
        ]
        write_csv(self.path / "history.csv", HISTORY, rows)
        losses = zip(recorder.lrs, torch.stack(recorder.step_losses).tolist())
        batches = [(step + 1, step // steps + 1, float(lr), loss) for step, (lr, loss) in enumerate(losses)]
        write_csv(self.path / "batches.csv", ["step", "epoch", "lr", "loss"], batches)

    def write_metrics(self, **metrics):
        """Add or replace entries of metrics.json, which a finished run has."""
        write_json(self.path / "metrics.json", self.metrics | metrics)

    def save_weights(self, model: nn.Module, temperature: float | None = None):
        """`WEIGHTS`: parameters, buffers, and what it takes to use them without this folder.

        `temperature` is the number to divide logits by for probabilities, `None` if none was fitted.
        """
        data = self.data | dict(resize=self.options.resize)
        about = dict(format=FORMAT, model=self.model_args, data=data, recipe=self.config["recipe"])
        about |= dict(precision=self.options.precision, weights=self.options.weights, temperature=temperature)
        save_tensors(self.path / WEIGHTS, get_model(model).state_dict(), **about)


def find_run(run: str | Path, runs_dir: str | Path = "runs") -> Path:
    """The path of a run; `"last"` is the one in `runs_dir` that was started or resumed last."""
    if run != "last":
        return Path(run).expanduser()
    configs = sorted(Path(runs_dir).glob("*/config.json"), key=lambda config: config.stat().st_mtime)
    if not configs:
        raise UserError(f"{runs_dir} holds no run, so there is no last one; name the folder of a run")
    return configs[-1].parent


def weights_file(run: str | Path) -> Path:
    """The weights of a finished run, which are named by its folder, by themselves, or as the `"last"` ones."""
    path = find_run(run)
    return path / WEIGHTS if path.is_dir() else path


def check_folder(runs_dir: Path, name: str | None):
    """Raise `UserError` if the folder of a run can't be made. It is also asked before long work."""
    if name and (runs_dir / name).exists():
        raise UserError(f"{runs_dir / name} exists already; choose another --name or --runs_dir")
    nearest = next(path for path in (runs_dir, *runs_dir.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"{nearest} is no folder to write to; choose another --runs_dir")


def make_folder(runs_dir: Path, name: str | None, default: str) -> Path:
    """Make `runs_dir/name`, or a new folder named after date, time and `default`."""
    check_folder(runs_dir, name)
    path = runs_dir / (name or f"{datetime.now():%Y%m%d-%H%M%S}-{default}")
    while name is None and path.is_dir():  # of another run of this second
        path = path.with_name(path.name + "-2")
    try:
        path.mkdir(parents=True)
    except OSError as reason:
        raise UserError(f"{path} can't be made ({reason.strerror}); choose another --runs_dir") from None
    return path


def places(images) -> dict[str, Any]:
    """The options that say where the images of an `ImageTable` are."""
    folder = images.reading.images
    return dict(
        data=home_relative(images.data), images=folder and home_relative(str(Path(folder).expanduser().absolute()))
    )


def home_relative(path: str) -> str:
    """A path below the home folder with `~` for it, so that a config can be shown to others."""
    home = str(Path.home() / "_")[:-1]
    return f"~/{path.removeprefix(home)}" if path.startswith(home) else path
