"""Trackers are told what the run's own files say."""

import csv
import json
import os
import subprocess
import sys

import pytest
import wandb
from commandline import BLANK_PLOTS, ROOT, warm_python
from conftest import small
from fastai.vision.all import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar10.errors import Stopped
from cifar10.options import Options
from cifar10.recipes import ASSIGNMENT
from cifar10.runs.checkpoint import last_checkpoint
from cifar10.runs.run import Run
from cifar10.runs.session import Session, tracker_callbacks
from train import get_dls

QUICK = ("--data", "digits", "--epochs", "2", "--peak_epoch", "1", "--width", "2", "--lr_max", "0.1")


def train(tracker, cwd, name="run", python=sys.executable, **environment):
    words = [python, ROOT / "train.py", *QUICK, "--tracker", tracker, "--name", name]
    about = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # that of another test
    done = subprocess.run(words, cwd=cwd, env=about | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / name


@pytest.mark.slow
def test_tensorboard(tmp_path):
    run = train("tensorboard", tmp_path, python=warm_python(), **BLANK_PLOTS)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("accuracy")]
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert found == pytest.approx([float(row["valid_accuracy"]) for row in rows], abs=1e-5)
    rates = [event.value for event in events.Scalars("lr_0")]
    batches = list(csv.DictReader((run / "batches.csv").open()))
    assert rates[: len(batches) // 2] == pytest.approx(
        [float(row["lr"]) for row in batches][: len(batches) // 2], rel=1e-4
    )


class StopAtStep5(Callback):
    def before_batch(self):
        if self.training and self.train_iter == 5:
            raise Stopped("SIGTERM")


def logged_steps(run: Run) -> list[int]:
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("lr_0")]


def test_tensorboard_has_each_step_of_a_resumed_run_as_often_as_of_another(shapes, tmp_path):
    """Of one that is stopped in its second epoch: what follows its last checkpoint is logged again."""

    def fit(name: str, *cbs) -> Session:
        learn = small(get_dls(shapes, batch_size=16))  # three steps in an epoch
        session = Session(Options(runs_dir=str(tmp_path), name=name, tracker="tensorboard"), resources=None)
        if (tmp_path / name).exists():
            session.run = Run.open(tmp_path / name)
            session.checkpoint = last_checkpoint(session.run)
            session.start_epoch = session.checkpoint[1]["epochs"]
        else:
            session.run = Run.create(session.options, ASSIGNMENT, learn)
        trackers = session.callbacks()
        try:
            learn.fit_one_cycle(3, 0.01, cbs=[*trackers, *cbs], start_epoch=session.start_epoch)
        except Stopped:
            trackers[-1].writer.flush()
            assert max(logged_steps(session.run)) == 5
        return session

    whole = logged_steps(fit("whole").run)
    fit("stopped", StopAtStep5())
    assert logged_steps(fit("stopped").run) == whole and max(whole) == 9


def test_wandb_knows_runs_of_one_name_apart(dls, tmp_path, monkeypatch):
    """Runs of earlier versions have no id of their own: those are known by their folder's name, as before."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def identify(run: Run) -> str:
        tracker_callbacks(run, first_step=1)
        found = wandb.run.id
        wandb.finish()
        return found

    for place in ("here", "there"):
        options = Options(runs_dir=str(tmp_path / place), name="kid's photos, #1", tracker="wandb")
        Run.create(options, ASSIGNMENT, small(dls))
    runs = [Run.open(tmp_path / place / "kid's photos, #1") for place in ("here", "there", "here")]
    ids = [identify(run) for run in runs]
    assert ids[0] == ids[2] != ids[1]
    del runs[0].config["id"]
    assert identify(runs[0]) == "kid-s-photos---1"


@pytest.mark.slow
def test_wandb_without_a_login(tmp_path):
    words = [sys.executable, ROOT / "train.py", *QUICK, "--tracker", "wandb"]
    nobody = dict(HOME=str(tmp_path), WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | nobody, stdin=subprocess.DEVNULL, capture_output=True)
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert said[0].startswith("error: W&B can't log the run (") and " --resume " in said[0]


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    run = train("wandb", tmp_path, "kid's photos, #1", WANDB_MODE="offline", WANDB_SILENT="true")
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb")) and json.loads((run / "metrics.json").read_text())["accuracy"] > 0
