"""Does a run that is killed and resumed end like one that was not?

Trains one run without interruption. Then trains others with the same options, each of which is killed with SIGKILL at a
random moment of a random step of a phase, every second one a second time, and resumed. At the end the weights of all
must be equal to the last byte, and what was found and logged as well, apart from times. The environment variable
RUNS_TO_KILL is the number of runs (default: 2), RECORD a JSON file to write with what was killed when.
"""

import itertools
import os
import random
import signal
import threading
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from commandline import ROOT, SERVER, command
from fastai.vision.all import Learner
from matplotlib.figure import Figure

import train
from cifar10.files import read_csv, write_json
from cifar10.hardware import collect_env
from cifar10.runs import checkpoint

RUNS_TO_KILL = int(os.environ.get("RUNS_TO_KILL", "2"))
OPTIONS = dict(data="digits", width=8, epochs=2)
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
    "plotting": (Figure, "savefig", lambda *_: True, 6, 0.5),
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
    with redirect_stdout(StringIO()):
        train.main(**options)
    assert next(calls) > step, f"a run has no step {step} of {phase}"


def outcome(run) -> list:
    """What must be the same in every run."""
    history = read_csv(run / "history.csv")
    del history["seconds"]
    same = [(run / name).read_bytes() for name in ("model.safetensors", "batches.csv", "lr_find.csv", "report.md")]
    return [*same, history]


def resume(run):
    done = command("train.py", "--resume", run, cwd=ROOT, drawn=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The outcome of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    words = [f"--{name}={value}" for name, value in OPTIONS.items()]
    done = command("train.py", *words, "--runs_dir", folder, "--name", "run", cwd=ROOT, drawn=False)
    assert done.returncode == 0, done.stderr
    return outcome(folder / "run")


@pytest.fixture(scope="module")
def record():
    """The kills of each run that ended like the uninterrupted one; written to the file RECORD at the end."""
    runs: list[list[dict]] = []
    yield runs
    if file := os.environ.get("RECORD"):
        counts = [sum(kill["killed"] for kill in kills) for kills in runs]
        summary = dict(runs=RUNS_TO_KILL, killed=sum(n > 0 for n in counts), killed_twice=sum(n > 1 for n in counts))
        write_json(Path(file), summary | dict(identical=len(runs), record=runs) | collect_env())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS_TO_KILL))
def test_a_killed_run_resumes_exactly(number, expected, record, tmp_path):
    rng, run, kills = random.Random(number), tmp_path / "run", []
    todo = OPTIONS | dict(runs_dir=str(tmp_path), name="run")
    first = number % len(PHASES)
    for second in range(1 + number % 2):
        # The second kill comes in the same phase or later, and early in it, because less of the run is left.
        phase = rng.choice(list(PHASES)[first:]) if second else list(PHASES)[first]
        *_, steps, seconds = PHASES[phase]
        kill = dict(phase=phase, step=rng.randint(1, max(1, steps // 4) if second else steps))
        kill |= dict(delay=round(rng.uniform(0, seconds), 4))
        process = SERVER.Process(target=die, kwargs=kill | dict(options=todo))
        process.start()
        process.join()
        kills.append(kill | dict(killed=process.exitcode == -signal.SIGKILL))
        # A run may end before the delay, and a resumed one may have no such step left.
        assert process.exitcode == -signal.SIGKILL or second or (phase == "plotting" and process.exitcode == 0)
        todo = dict(resume=str(run))
    resume(run)
    assert outcome(run) == expected
    record.append(kills)
