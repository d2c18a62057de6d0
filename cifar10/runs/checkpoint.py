"""Checkpoints: the whole state of a training run, the callback that saves it, and how a run resumes from it."""

import time
from pathlib import Path
from typing import Any

import torch
from fastai.vision.all import Callback, L, Learner, ProgressCallback, get_model
from torch import Tensor

from cifar10.errors import CorruptFileError, UserError
from cifar10.files import load_tensors, save_tensors
from cifar10.processes import on_rank0
from cifar10.runs.run import CHANGEABLE, Run
from cifar10.training.randomness import random_states, set_random_states

KEEP = 2  # checkpoints, so that there is another one if the newest is damaged


def state_dict(learn: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the rest of a training run depends on, and its history so far, as tensors and as JSON."""
    recorder = learn.recorder
    tensors = {f"model.{name}": value for name, value in get_model(learn.model).state_dict().items()}
    for index, (_, _, values, _) in enumerate(learn.opt.all_params()):
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    states = random_states(learn.dls)
    tensors |= {name: states.pop(name) for name in ("torch", "device") if name in states}
    tensors["lrs"] = torch.tensor(recorder.lrs, dtype=torch.float64)
    tensors["losses"] = torch.stack(recorder.step_losses) if recorder.step_losses else torch.empty(0)
    state = dict(
        epochs=len(recorder.values),
        # The memory layout decides the order of computation, which could change the last bit.
        channels_last=sorted(name for name, value in tensors.items() if value.ndim == 4 and not value.is_contiguous()),
        scaler=learn.scaler.state_dict() if getattr(learn, "scaler", None) else {},  # fp16 only
        values=[list(row) for row in recorder.values],
        extra=recorder.extra,
        seconds=recorder.seconds,
        train_seconds=recorder.train_seconds,
        flop=recorder.flop,
        **states,
    )
    return tensors, state


def load_state_dict(learn: Learner, tensors: dict[str, Tensor], state: dict[str, Any]):
    """Put a Learner that has an optimizer into the state that `state_dict` returned."""
    model = {name: value for name, value in tensors.items() if name.startswith("model.")}
    get_model(learn.model).load_state_dict({name.removeprefix("model."): value for name, value in model.items()})
    learn.opt.clear_state()
    params = learn.opt.all_params().itemgot(0)
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            if key in state["channels_last"]:
                value = value.contiguous(memory_format=torch.channels_last)
            p = params[int(index)]
            learn.opt.state[p][name] = value.to(p.device)
    set_random_states(learn.dls, state | tensors)
    if state["scaler"] and hasattr(learn, "scaler"):
        learn.scaler.load_state_dict(state["scaler"])
    recorder = learn.recorder
    recorder.lrs = tensors["lrs"].tolist()
    recorder.step_losses = list(tensors["losses"].to(learn.dls.device))
    recorder.values, recorder.seconds = [L(row) for row in state["values"]], state["seconds"]
    recorder.extra = state["extra"]
    recorder.train_seconds, recorder.flop = state["train_seconds"], state.get("flop", 0.0)
    learn.train_iter = len(tensors["losses"])  # by which TensorBoard goes


class SaveCheckpoint(Callback):
    """Save a checkpoint before the first epoch and after each, with history.csv and batches.csv; keep the last two.

    `started` is when the run would have started without interruptions, `resumed` the checkpoint to resume from.
    """

    order = ProgressCallback.order + 20  # after fastai has set up everything else

    def __init__(self, run: Run, started: float, resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None):
        self.training_run, self.started, self.resumed = run, started, resumed

    def before_fit(self):
        if self.resumed:
            load_state_dict(self.learn, *self.resumed)
        else:
            self.save()

    def after_epoch(self):
        if not self.recorder.skipped:
            self.training_run.write_history(self.learn)
            self.save()

    def after_fit(self):  # also if no epoch was left to train
        self.training_run.write_history(self.learn)

    @on_rank0
    def save(self):
        tensors, state = state_dict(self.learn)
        state |= dict(settings=settings(self.training_run), elapsed=time.time() - self.started)
        folder = self.training_run.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        save_tensors(folder / f"epoch-{state['epochs']:05}.safetensors", tensors, **state)
        for old in list_checkpoints(self.training_run)[KEEP:]:
            old.unlink()


def settings(run: Run) -> dict[str, Any]:
    """What has to be the same in all checkpoints of a run."""
    same = {name: run.config.get(name) for name in ("format", "recipe", "model", "data", "lr_min", "lr_max")}
    options = {name: value for name, value in run.config["options"].items() if name not in CHANGEABLE}
    return same | {"options": options}


def list_checkpoints(run: Run) -> list[Path]:
    """Newest first."""
    return sorted((run.path / "checkpoints").glob("epoch-*.safetensors"), reverse=True)


def last_checkpoint(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest intact checkpoint; `None` if the run has none yet. A damaged one is reported and skipped.

    Raises `UserError` if all are damaged, and for a checkpoint of another run.
    """
    files = list_checkpoints(run)
    for file in files:
        try:
            tensors, state = load_tensors(file)
        except CorruptFileError as damage:
            print(damage)
            continue
        if state.get("settings") != settings(run):
            raise UserError(f"{file} does not belong to this run: it was made with other settings than config.json has")
        return tensors, state
    if files:
        raise UserError(f"no checkpoint in {run.path} is intact; start a new run")
    return None
