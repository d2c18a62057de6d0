"""Trackers are told what the run's own files say."""

import csv
import json
import os
import subprocess
import sys

import pytest
from commandline import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

QUICK = ("--data", "digits", "--epochs", "2", "--peak_epoch", "1", "--width", "2", "--lr_max", "0.1")


def train(tracker, cwd, name="run", **environment):
    words = [sys.executable, ROOT / "train.py", *QUICK, "--tracker", tracker, "--name", name]
    done = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / name


@pytest.mark.slow
def test_tensorboard(tmp_path):
    run = train("tensorboard", tmp_path)
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
