"""train.py, but at each of its first three starts a process is killed: `torchrun tests/killed.py OPTIONS`."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar10 import cli
from cifar10.options import Options
from cifar10.runs import checkpoint
from cifar10.training.callbacks import EpochRecorder
from train import main


def kill_in(owner, name: str, rank: int, epoch: int):
    """Kill the process `rank` in the epoch when it calls a function."""
    function = getattr(owner, name)

    def killed(*args, **kwargs):
        here = getattr(args[0], "epoch", None) == epoch or f"epoch-{epoch:05}" in str(args[0])
        if os.environ["RANK"] == str(rank) and here:
            if owner is checkpoint:
                args[0].with_name(f".{args[0].name}.1.part").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, killed)


match os.environ["TORCHELASTIC_RESTART_COUNT"]:
    case "0":
        kill_in(EpochRecorder, "after_train", 1, 0)  # fastai's summary calls after_batch, too
    case "1":
        kill_in(EpochRecorder, "after_validate", 0, 1)
    case "2":
        kill_in(checkpoint, "save_tensors", 0, 2)
cli.run(main, cli.start(Options, distributed=True))
