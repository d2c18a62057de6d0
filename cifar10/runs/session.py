"""Experiment trackers, through fastai's own callbacks: TensorBoard, Weights & Biases."""

import re

from fastai.callback.core import Callback

from cifar10.cli import import_extra
from cifar10.errors import UserError
from cifar10.runs.run import Run


def tracker_callbacks(run: Run) -> list[Callback]:
    """The callbacks of the tracker that the run's options name. Raises `UserError` if it is not installed.

    TensorBoard's files are in the run's folder, below tensorboard/. W&B names its run after the folder, and keeps its
    files there, below wandb/; with the environment variable WANDB_MODE=offline, nothing is sent.
    """
    tracker = run.options.tracker
    if tracker == "tensorboard":
        import_extra("tensorboard", "trackers")
        from fastai.callback.tensorboard import TensorBoardCallback

        return [TensorBoardCallback(run.path / "tensorboard", trace_model=False, log_preds=False)]
    if tracker == "wandb":
        wandb = import_extra("wandb", "trackers")
        from fastai.callback import wandb as integration

        integration._format_config = lambda config: None  # fails with fastcore 2.2; run.config says more
        name = run.path.name
        settings = dict(id=re.sub(r"[^\w.-]", "-", name), resume="allow", dir=run.path, config=run.config)
        try:
            wandb.init(project="cifar10", name=name, **settings)
        except wandb.Error as reason:
            ways = "log in, or set WANDB_MODE=offline, then resume with"
            raise UserError(f"W&B can't log the run ({reason}); {ways}: {run.resume_command()}") from None
        return [integration.WandbCallback(log_preds=False)]
    return []
