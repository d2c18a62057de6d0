"""Does a killed and resumed run end like one that is not? `python -m benchmarks.resume --out results/resume.json`

Trains one run without interruption. Then trains others with the same options, each of which is killed with SIGKILL at a
random moment of a random step of a phase, every second one a second time, and resumed. At the end the weights of all
must be equal to the last byte, and what was found and logged as well, apart from times.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from fastai.vision.all import Learner

import train
from cifar10 import cli, files
from cifar10.files import OutputFile, read_csv, write_json
from cifar10.hardware import collect_env
from cifar10.runs import checkpoint

ROOT = Path(__file__).parents[1]
OPTIONS = {"data": "digits", "width": 8, "epochs": 2}
EPOCH_STEPS, EPOCH_VALID_STEPS = 22, 6  # of the digits in batches of 64


def is_training(learn: Learner) -> bool:
    return learn.training and not hasattr(learn, "lr_finder")


# Phase → what is called at each of its steps, which of these calls count, how many there are in a run, and how many
# seconds one takes at most, about.
PHASES = {
    "LR finder": (Learner, "one_batch", lambda learn, *_: hasattr(learn, "lr_finder"), 50, 0.1),
    "training": (Learner, "one_batch", lambda learn, *_: is_training(learn), 2 * EPOCH_STEPS, 0.1),
    "validation": (Learner, "one_batch", lambda learn, *_: not learn.training, 2 * EPOCH_VALID_STEPS, 0.05),
    "writing a checkpoint": (checkpoint, "save_tensors", lambda *_: True, 3, 0.05),
    "plotting": (files, "save_figure", lambda *_: True, 4, 0.5),
}  # fmt: skip


def die(phase: str, step: int, delay: float, options: dict):
    """Train, and be killed `delay` seconds after the beginning of the phase's `step`-th step."""
    owner, name, counts, *_ = PHASES[phase]
    function, calls = getattr(owner, name), itertools.count(1)

    def watched(*args, **kwargs):
        if counts(*args) and next(calls) == step:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **kwargs)

    setattr(owner, name, watched)
    train.main(**options)


def command(*arguments) -> int:
    """Run Python with these arguments, without its output; its exit status, negative for a signal."""
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode not in (0, -signal.SIGKILL):
        sys.exit(done.stderr.decode())
    return done.returncode


def outcome(run: Path) -> list:
    """What must be the same in every run."""
    history = read_csv(run / "history.csv")
    del history["seconds"]
    same = [(run / name).read_bytes() for name in ("model.safetensors", "batches.csv", "lr_find.csv", "report.md")]
    return [*same, history]


def main(
    runs: int = 20,  # runs to kill
    seed: int = 0,  # random seed of the moments
    out: OutputFile = None,  # JSON file for the record
    victim: str = "",  # for internal use
):
    "Kill runs at random moments, resume them, and compare them with one that ran without interruption."
    if victim:
        die(**json.loads(victim))
        return
    rng = random.Random(seed)
    record = []
    with tempfile.TemporaryDirectory() as runs_dir:
        options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        command("train.py", *options, "--runs_dir", runs_dir, "--name", "uninterrupted")
        expected = outcome(Path(runs_dir) / "uninterrupted")
        for number in range(runs):
            run, kills = Path(runs_dir) / f"{number:02}", []
            todo = OPTIONS | {"runs_dir": runs_dir, "name": run.name}
            first = number % len(PHASES)
            for second in range(1 + number % 2):
                # The second kill comes in the same phase or later, and early in it, because less of the run is left.
                phase = rng.choice(list(PHASES)[first:]) if second else list(PHASES)[first]
                *_, steps, seconds = PHASES[phase]
                step = rng.randint(1, max(1, steps // 4) if second else steps)
                kill = dict(phase=phase, step=step, delay=round(rng.uniform(0, seconds), 4))
                status = command("-m", "benchmarks.resume", "--victim", json.dumps(kill | {"options": todo}))
                kills.append(kill | {"killed": status == -signal.SIGKILL})  # unless it ended before the delay
                todo = {"resume": str(run)}
            command("train.py", "--resume", run)
            identical = outcome(run) == expected
            record.append({"kills": kills, "identical": identical})
            print(f"run {number + 1}: {'identical' if identical else 'DIFFERENT'} after {kills}", flush=True)
    counts = [sum(kill["killed"] for kill in run["kills"]) for run in record]
    summary = dict(
        runs=runs,
        killed=sum(count > 0 for count in counts),
        killed_twice=sum(count > 1 for count in counts),
        identical=sum(run["identical"] for run in record),
    )
    print(summary)
    if out:
        write_json(Path(out), summary | {"record": record, **collect_env()})
    if summary["identical"] < runs:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
