"""Training steps in one and in several processes: `python -m benchmarks.scale --data cifar10.tgz --out scale.json`

On a CPU, all numbers of processes share the same cores; on GPUs, each process has its own. They take turns, a few steps
each. Beside a step, two parts of it are timed alone: loading and augmenting a process's part of the batch, and the
all-reduce of gradients and of statistics of batch normalization. Last comes a projection for many GPUs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import chain, count
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.torch_core import num_distrib, rank_distrib
from fastcore.basics import num_cpus
from torch import nn

from benchmarks.seeds import now
from benchmarks.speed import Timer, durations
from cifar10 import cli
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.files import OutputFile, write_json
from cifar10.hardware import collect_env, get_device
from cifar10.processes import is_distributed, is_rank0, local_rank0_first, process_group
from model import ResNet
from train import get_dls, get_learner

LR = 0.01
NORMS = sum(isinstance(module, nn.BatchNorm2d) for module in ResNet().modules())
REPEATS = 10  # of what is timed alone
# Of the projection. Eight GPUs of a host are connected by NVLink, hosts by one 400 Gbit/s network card for each GPU.
GPUS_A_HOST = 8
BANDWIDTH = {"host": 300e9, "network": 40e9}  # bytes per second and GPU that an all-reduce reaches
LATENCY = {"host": 20e-6, "network": 50e-6}  # seconds for each all-reduce


def seconds_of(action, device: torch.device) -> float:
    """The median duration of an action."""
    action()
    ends = [now(device)]
    for _ in range(REPEATS):
        action()
        ends.append(now(device))
    return statistics.median(durations(ends))


def measure(data: str, steps: int, batch_size: int, width: int, device: str) -> dict[str, float]:
    """Seconds of a training step, of loading, and of all-reduce."""
    with local_rank0_first():
        images = ImageTable.open(data)
    dls = get_dls(images, bs=batch_size, device=device)
    learn, timer = get_learner(dls, width=width), Timer(steps)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1 + steps // len(dls.train), LR, cbs=timer)
    dls.train.share = slice(rank_distrib(), None, max(1, num_distrib()))
    batches = chain.from_iterable(dls.train for _ in count())
    loading = seconds_of(lambda: next(batches), dls.device)
    model, reducing = learn.model, 0.0
    if is_distributed():
        gradients = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad), device=dls.device)
        norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
        moments = [torch.zeros(3, norm.num_features, dtype=torch.double, device=dls.device) for norm in norms] * 2

        def reduce():
            for tensor in [gradients, *moments]:
                dist.all_reduce(tensor)

        reducing = seconds_of(reduce, dls.device)
    return dict(step=statistics.median(durations(timer.ends)), loading=loading, reducing=reducing)


def run(processes: int, words: list[str], gpus: bool) -> dict[str, float]:
    """`measure` in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launch, "-m", "benchmarks.scale", *words, "--worker", "--out", str(out)]
        threads = {} if gpus else {"OMP_NUM_THREADS": str(max(1, num_cpus() // processes))}
        if subprocess.run(command, env=os.environ | threads).returncode:
            raise UserError(f"the measurement with {processes} processes failed, see above")
        return json.loads(out.read_text(encoding="utf-8"))


def project(step: float, loading: float, parameters: int, norms: int, gpus: int) -> dict[str, float]:
    """Milliseconds of a step of the same batch on many GPUs, and their efficiency.

    `step` is that of one GPU. Of it, `loading` stays the same, because a GPU takes longer to start such small
    operations than to do them; the rest is divided by the number of GPUs, which is the best case. Gradients are
    float32, and reduced in a ring after the backward pass; so are the loss, and two sums of each normalization.
    """
    if gpus == 1:
        return dict(gpus=1, step_ms=1000 * step, loading=loading / step, reducing=0.0, efficiency=1.0)
    link = "host" if gpus <= GPUS_A_HOST else "network"
    reducing = 2 * (gpus - 1) / gpus * 4 * parameters / BANDWIDTH[link] + LATENCY[link] * (2 + 2 * norms)
    total = (step - loading) / gpus + loading + reducing
    return dict(gpus=gpus, step_ms=1000 * total, loading=loading / total, reducing=reducing / total,
                efficiency=step / total / gpus)  # fmt: skip


def main(
    data: str = "cifar10",  # as for train.py
    processes: str = "1,2",  # numbers of processes
    steps: int = 8,  # to time in each turn, after one to warm up
    rounds: int = 3,  # turns of each number
    batch_size: int = 512,  # of all processes together
    width: int = 64,  # width of the ResNet
    device: str = "auto",  # as for train.py
    gpu: str = "results/gpu.json",  # what benchmarks.gpu measured on one GPU, for the projection
    worker: bool = False,  # be one of the processes; for internal use
    out: OutputFile = None,  # JSON file for the results
):
    "Compare training steps in one and in several processes."
    if worker:
        with process_group(device, timeout=120):
            found = measure(data, steps, batch_size, width, device)
        if is_rank0():
            write_json(Path(out), found)
        return
    numbers, gpus = [int(number) for number in processes.split(",")], get_device(device).type == "cuda"
    words = ["--data", data, "--steps", steps, "--batch_size", batch_size, "--width", width, "--device", device]
    turns: dict[int, list] = {number: [] for number in numbers}
    for _ in range(rounds):
        for number in numbers:
            turns[number].append(run(number, [*map(str, words)], gpus))
            print(f"{number} processes: {turns[number][-1]['step']:.3f} s", flush=True)
    rows = []
    for number in numbers:
        row = {key: statistics.median(turn[key] for turn in turns[number]) for key in ("step", "loading", "reducing")}
        speedup = statistics.median(one["step"] / n["step"] for one, n in zip(turns[numbers[0]], turns[number]))
        rows.append(dict(processes=number, **row, speedup=speedup, steps=[turn["step"] for turn in turns[number]]))
    results: dict = dict(batch_size=batch_size, width=width, seconds=rows)
    if Path(gpu).is_file():
        one = json.loads(Path(gpu).read_text(encoding="utf-8"))
        step, loading = one["step"]["ours_ms"] / 1000, one["step"]["data_share"] * one["step"]["ours_ms"] / 1000
        assumed = dict(gpu=one["hardware"]["gpu"], bandwidth=BANDWIDTH, latency=LATENCY, gpus_a_host=GPUS_A_HOST)
        results["projection"] = assumed | dict(rows=[project(step, loading, 6_574_090, NORMS, n) for n in (1, 8, 64)])
    print(json.dumps(results, indent=2))
    if out:
        write_json(Path(out), results | collect_env())


if __name__ == "__main__":
    cli.run(main, distributed=True)
