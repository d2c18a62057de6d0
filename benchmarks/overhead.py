"""What our Learner adds to a plain PyTorch loop: `python -m benchmarks.overhead`

Both train the same model with the same optimizer on batches of the same size in the same precision and memory format,
in one process, alternately: a step of the one, a step of the other. The result is the ratio of their median durations.
Both get random images, so only the training step is measured; the augmentation is outside of it on either side.
"""

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from fastai.vision.all import Callback, CancelFitException, DataLoader, DataLoaders, set_seed
from torch import nn

from cifar10 import cli
from cifar10.data.loaders import TensorDL
from cifar10.files import OutputFile, write_json
from cifar10.hardware import collect_env
from cifar10.training.optim import Muon
from cifar10.training.recipes import ASSIGNMENT
from model import ResNet
from train import get_learner


class OneBatch(DataLoader):
    """The same batch, `steps` times."""

    def __init__(self, batch: tuple, steps: int):
        super().__init__([0], bs=1)
        self.batch, self.steps = batch, steps

    to_detach = TensorDL.to_detach  # or fastai would fetch each metric from a GPU

    def __len__(self):
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            yield self.batch


class Alternate(Callback):
    """Time each step of the Learner, and a step of `other` after it."""

    order = 1000  # the last one, so that the work of the other callbacks counts as the Learner's

    def __init__(self, other, times: list):
        self.other, self.times = other, times

    def before_train(self):
        self.start = time.perf_counter()

    def after_batch(self):
        if not self.training:
            return
        middle = time.perf_counter()
        self.other()
        end = time.perf_counter()
        self.times.append((middle - self.start, end - middle))
        self.start = time.perf_counter()

    def before_validate(self):
        raise CancelFitException


def plain_step(batch: tuple, classes: int, width: int, precision: str):
    """A function that trains a ResNet of its own for one step on `batch`, on the device of the batch."""
    device = batch[0].device
    model = ResNet(classes, width=width).to(device, memory_format=torch.channels_last).train()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    optimizer = Muon(
        model.parameters(), lr=0.01, momentum=ASSIGNMENT.momentum, weight_decay=ASSIGNMENT.weight_decay,
        lr_scale=ASSIGNMENT.muon_lr_scale, ns_steps=ASSIGNMENT.ns_steps, dtype=dtype,
    )  # fmt: skip
    loss_func = nn.CrossEntropyLoss(label_smoothing=ASSIGNMENT.label_smoothing)

    def step():
        x, y = batch
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            prediction = model(x)
        loss = loss_func(prediction.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(bs: int, steps: int, width: int, warmup: int = 2) -> dict:
    """Median seconds per step of ours and of the plain loop, and their ratio, over `steps` steps after a warm-up."""
    set_seed(0)
    batch = torch.randn(bs, 3, 32, 32), torch.randint(10, (bs,))
    dls = DataLoaders(OneBatch(batch, steps + warmup), OneBatch(batch, 1), device=torch.device("cpu"))
    dls.vocab = list(range(10))
    learn = get_learner(dls, width=width)

    other = plain_step(batch, 10, width, learn.precision)
    times = []
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.01, cbs=Alternate(other, times))
    ours, plain = (statistics.median(column) for column in zip(*times[warmup:], strict=True))
    return {
        "batch_size": bs, "width": width, "steps": steps, "precision": learn.precision,
        "ours_seconds": ours, "plain_seconds": plain, "ratio": ours / plain,
    }  # fmt: skip


def main(
    bs: int = 128,  # batch size
    steps: int = 20,  # measured steps of each
    width: int = 64,  # width of the ResNet
    out: OutputFile = None,  # JSON file for the results
):
    "Compare a training step of our Learner with one of a plain PyTorch loop."
    results = measure(bs, steps, width)
    print(
        f"{results['ours_seconds'] * 1000:.1f} ms per step against {results['plain_seconds'] * 1000:.1f} ms in a plain"
        f" loop: ratio {results['ratio']:.3f} ({results['precision']}, batch {bs}, width {width}, {steps} steps each)"
    )
    if out:
        write_json(Path(out), results | collect_env())


if __name__ == "__main__":
    cli.run(main)
