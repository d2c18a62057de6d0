"""A session: one launch of train.py, whether the run is new, resumed or restarted."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastai.callback.core import Callback
from fastai.torch_core import num_distrib, set_seed
from fastai.vision.all import Learner

from cifar10.cli import import_extra
from cifar10.data import SIZE, ImageTable, Reading, describe
from cifar10.errors import UserError
from cifar10.files import write
from cifar10.options import Options
from cifar10.processes import (
    check_same,
    from_rank0,
    is_restart,
    launch_id,
    local_rank0_first,
    on_rank0,
    process_group,
)
from cifar10.recipes import Recipe
from cifar10.runs.checkpoint import SaveCheckpoint, last_checkpoint
from cifar10.runs.run import PRETRAINED, Run, check_folder, find_run, places, weights_file
from cifar10.training import StopAtNaN, StopAtSignal, TimeEstimate

MIN_SHARE_FOR_HINT = 0.25  # of images that another option would suit better
WEIGHTS_HERE = "results/cifar10-best"  # seen from the clone
FEW = 5_000  # training images, for which it is worth mentioning that training need not start from scratch


class Session:
    """One launch of train.py, across all its processes.

    `options` are those of the run. `recipe` is set by `open_images`, and has learning rates as far as they are known.
    `run` is the run's folder: from the start if it `is_resumed`, from `open_run` on if it is new. `started` is when it
    would have started without interruptions. `checkpoint` is what it resumes from, after `start_epoch` epochs.
    """

    recipe: Recipe
    run: Run
    is_resumed = is_finished = False
    checkpoint: Any = None
    start_epoch = 0

    def __init__(self, options: Options, resources: ExitStack):
        self.options, self.resources, self.started = options, resources, time.time()

    @classmethod
    @contextmanager
    def start(cls, typed: dict[str, Any]) -> Iterator["Session"]:
        """Join the processes, and open and lock the run to resume. `typed`: the options given on the command line.

        Raises `UserError` for invalid options, and for options that can't change on resume.
        """
        options = Options(**typed)
        if options.weights == "last":  # which will soon be this run
            options = replace(options, weights=str(find_run("last", options.runs_dir)))
        with process_group(options.device, options.timeout), ExitStack() as resources:
            session = cls(options, resources)
            resume = options.resume or (find_restarted(options) if is_restart() else None)
            if resume is not None:
                session.resume(resume, typed)
            else:
                from_rank0(check_folder)(Path(options.runs_dir), options.name)
                if options.weights and not weights_file(options.weights).is_file():
                    what = "is neither the folder of a finished run nor its model.safetensors; give either"
                    raise UserError(f"weights is {options.weights}, which {what}")
            set_seed(session.options.seed, reproducible=True)
            yield session

    def resume(self, path: str, typed: dict[str, Any]):
        run = from_rank0(Run.open)(path, self.options.runs_dir)
        self.options = run.check_options(typed)
        self.resources.enter_context(run.lock())
        self.is_resumed = True
        self.run = from_rank0(Run.open)(run.path)  # again, because another process may have trained it before the lock
        self.is_finished = from_rank0(lambda: run.is_finished)()
        if self.is_finished:
            print(f"{run.path} is finished; there is nothing to resume")

    def open_images(self) -> ImageTable:
        """The images that the options name, decoded once on each host. The recipe's defaults depend on them."""
        options = self.options
        with local_rank0_first():
            images = ImageTable.open(options.data, Reading.of(options), options.valid)
        check_same(images.hash, "the data set")
        self.recipe = self.run.recipe if self.is_resumed else options.resolve(images)
        if options.weights and not self.is_resumed:
            print(
                f"All layers but the last start from {options.weights}; the last one is fitted before the first epoch."
            )
        for hint in self.hints(images) if not self.is_resumed else ():
            print(f"{images.name}: {hint}")
        return images

    def hints(self, images: ImageTable) -> Iterator[str]:
        """Options that may be better for these images."""
        options, count = self.options, len(images.split_rows(self.options.valid)[0])
        plain = (options.weights, options.width, options.norm, options.recipe) == (None, None, "batch", None)
        if plain and count < FEW and not images.defaults and Path(WEIGHTS_HERE).is_dir():
            yield f"{count:,} training images are few; --weights {WEIGHTS_HERE} is likely to be more accurate"
        if images.resize == "crop" and images.long > MIN_SHARE_FOR_HINT:
            yield f"{images.long:.0%} of the images are long, and their ends are cut off; --resize squish keeps them"
        if images.size == SIZE and images.large > MIN_SHARE_FOR_HINT:
            yield f"--size {2 * SIZE} shows finer details, which may help, and takes four times as long"

    def open_run(self, learn: Learner) -> Run:
        """Create and lock the folder of a new run, or check that a resumed run has the same images.

        If interrupted before the session ends, it prints how to resume.
        """
        options, images = self.options, learn.dls.train.table
        check_same(repr([self.recipe, learn.precision, options.norm]), "an option or the precision")
        if self.is_resumed:
            self.run.check_data(learn)
        else:
            self.recipe = learn.recipe
            self.run = from_rank0(Run.create)(options, self.recipe, learn)
            self.resources.enter_context(self.run.lock())
            if self.weights:
                on_rank0(write)(self.run.path / PRETRAINED, weights_file(self.weights).read_bytes())
        run = self.run
        run.config["options"] |= places(images)  # where they are now
        run.update()
        print(f"{describe(learn.dls)}; {run.path}")
        self.checkpoint = from_rank0(last_checkpoint)(run)
        if self.checkpoint:
            self.continue_from_checkpoint(run)
        else:
            summary = learn.summary()  # in every process: fastai gathers from all
            on_rank0(write)(run.path / "summary.txt", f"{summary}\n")
        learn.add_cbs([StopAtSignal(), TimeEstimate(self.recipe, self.start_epoch)])
        return run

    def continue_from_checkpoint(self, run: Run):
        _, state = self.checkpoint
        self.recipe = replace(self.recipe, lr_min=run.config["lr_min"], lr_max=run.config["lr_max"])
        self.start_epoch, self.started = state["epochs"], self.started - state["elapsed"]
        print(f"Resuming after epoch {self.start_epoch} of {self.recipe.epochs}")
        before, now = run.config["hardware"].get("processes", 1), max(1, num_distrib())
        if before != now:
            print(f"Started with {before} and resumed with {now} processes: the result is the same only up to rounding")

    @property
    def weights(self) -> str | Path | None:
        """The weights to start from. A resumed run has a copy, because the original may have changed or moved."""
        copy = self.run.path / PRETRAINED if self.is_resumed else None
        return copy if copy and copy.is_file() else self.options.weights

    def set_lrs(self, recipe: Recipe):
        """Continue with a recipe whose learning rates are set, and record them in config.json."""
        self.recipe = recipe
        self.run.update(lr_min=recipe.lr_min, lr_max=recipe.lr_max)

    def callbacks(self) -> list[Callback]:
        """The callbacks that monitor and record training."""
        first_step = 1 + (len(self.checkpoint[0]["losses"]) if self.checkpoint else 0)
        trackers = on_rank0(tracker_callbacks)(self.run, first_step) or []
        return [StopAtNaN(), SaveCheckpoint(self.run, self.started, self.checkpoint), *trackers]


@from_rank0
def find_restarted(options: Options) -> str | None:
    """The folder of the run that torchrun is restarting after losing a process, or `None`."""
    path = Path(options.runs_dir, options.name or "")
    if options.name and (path / "config.json").is_file() and Run.open(path).config.get("launch") == launch_id():
        return str(path)
    return None


def tracker_callbacks(run: Run, first_step: int) -> list[Callback]:
    """The callbacks for the tracker chosen in the run's options. Raises `UserError` if it is not installed.

    `first_step` is the next step to train; TensorBoard drops anything logged from that step on.

    TensorBoard's files are in the run's folder, below tensorboard/. W&B names its run after the folder, and keeps its
    files there, below wandb/; with the environment variable WANDB_MODE=offline, nothing is sent.
    """
    tracker = run.options.tracker
    if tracker == "tensorboard":
        import_extra("tensorboard", "trackers")
        from fastai.callback.tensorboard import TensorBoardCallback
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        SummaryWriter(folder, purge_step=first_step).close()  # fastai's callback has no such argument
        return [TensorBoardCallback(folder, trace_model=False, log_preds=False)]
    if tracker == "wandb":
        wandb = import_extra("wandb", "trackers")
        from fastai.callback import wandb as integration

        integration._format_config = lambda config: None  # breaks with fastcore 2.2; run.config has more
        name = run.path.name
        key = run.config.get("id") or re.sub(r"[^\w.-]", "-", name)  # older runs have none
        settings = dict(id=key, resume="allow", dir=run.path, config=run.config)
        try:
            wandb.init(project="cifar10", name=name, **settings)
        except wandb.Error as reason:
            ways = "log in, or set WANDB_MODE=offline, then resume with"
            raise UserError(f"W&B can't log the run ({reason}); {ways}: {run.resume_command()}") from None
        return [integration.WandbCallback(log_preds=False)]
    return []
