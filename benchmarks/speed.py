"""How fast we train on a CPU, against other ways and against the machine's limit: `python -m benchmarks.speed`

Alternately, a few steps of each, in a process of its own: our Learner; a plain PyTorch loop as people write it (fp32,
contiguous tensors, torchvision's transforms of one image after the other in a DataLoader with workers); fastai as its
tutorials use it (ImageBlock from PNG files, item and batch transforms, fp32). All train the same ResNet. There are two
limits, both in the precision that our Learner uses: the rate at which torch multiplies matrices of the model's own
sizes, which a convolution's own kernel may exceed, and the time that the model's convolutions take by themselves.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from fastai.vision.all import (
    Callback,
    CancelFitException,
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    FuncSplitter,
    ImageBlock,
    Learner,
    Normalize,
    RandomCrop,
    RandomErasing,
    get_image_files,
    imagenet_stats,
    parent_label,
    set_seed,
    setup_aug_tfms,
)
from fastai.vision.augment import Flip
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.seeds import now
from cifar10 import cli
from cifar10.data.decode import SIZE
from cifar10.files import OutputFile, write_json
from cifar10.hardware import collect_env
from cifar10.training.strips import StripConv2d
from cifar10.training.tricks import count_flop
from model import ResNet
from train import get_dls, get_learner

LR = 0.01
WORKERS = 2
ROWS = 2**14  # at most, of a matrix; those of a whole batch would take half a gigabyte and more
REPEATS = 3  # of each matrix product, of which the fastest counts


class Timer(Callback):
    """The duration of each training step but the first; ends after `steps` more."""

    order, run_valid = 1000, False

    def __init__(self, steps: int):
        self.steps, self.ends = steps, []

    def after_batch(self):
        self.ends.append(now(self.dls.device))
        if len(self.ends) > self.steps:
            raise CancelFitException


def durations(ends: list[float]) -> list[float]:
    return [end - begin for begin, end in itertools.pairwise(ends)]


def steps_of(learn: Learner, steps: int) -> list[float]:
    """Seconds of each of `steps` training steps of a Learner."""
    timer = Timer(steps)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, LR, cbs=timer)
    return durations(timer.ends)


# ---- The ways to train ---------------------------------------------------------------------------------------------


class Images(Dataset):
    """The training images as PIL images, with torchvision's transforms, as CIFAR10 in torchvision is used."""

    def __init__(self, dls):
        table = dls.train.table
        self.pixels = table.pixels[dls.train.rows].permute(0, 2, 3, 1).numpy()
        self.labels = dls.train.targets[0]
        self.transform = transforms.Compose([
            transforms.RandomCrop(SIZE, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*table.stats(dls.train.rows)),
            transforms.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1)),
        ])  # fmt: skip

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class PlainLoop:
    def __init__(self, dls, width: int):
        self.loader = DataLoader(Images(dls), dls.bs, shuffle=True, drop_last=True, num_workers=WORKERS)
        self.model = ResNet(len(dls.vocab), width=width)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)

    def __call__(self, steps: int) -> list[float]:
        ends = []
        for images, labels in self.loader:
            loss = nn.functional.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            ends.append(time.perf_counter())
            if len(ends) > steps:
                break
        return durations(ends)


def stock_fastai(dls, width: int) -> Learner:
    folder = dls.train.table.folder
    valid = dls.train.table.split_names[-1]
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_items=get_image_files,
        splitter=FuncSplitter(lambda file: file.parents[1].name == valid),
        get_y=parent_label,
        item_tfms=RandomCrop(SIZE),
        batch_tfms=setup_aug_tfms([Flip(), RandomErasing(p=1, max_count=1), Normalize.from_stats(*imagenet_stats)]),
    )
    stock = block.dataloaders(folder, bs=dls.bs, num_workers=WORKERS, device=torch.device("cpu"))
    return Learner(stock, ResNet(len(dls.vocab), width=width), loss_func=CrossEntropyLossFlat())


@cache
def other_way(name: str, data: str, bs: int, width: int):
    """A function from a number of steps to their durations."""
    dls = get_dls(data, batch_size=bs, device="cpu")
    return PlainLoop(dls, width) if name == "plain" else partial(steps_of, stock_fastai(dls, width))


def steps_of_other_way(name: str, data: str, bs: int, width: int, steps: int) -> list[float]:
    return other_way(name, data, bs, width)(steps)


# ---- The limits ----------------------------------------------------------------------------------------------------


# Of the model's convolutions: channels in, in widths or 3; channels out, in widths; pixels along each side.
CONVOLUTIONS = ((3, 1, 32), (1, 2, 32), (2, 2, 16), (2, 2, 16), (2, 4, 16), (4, 8, 8), (8, 8, 4), (8, 8, 4))


def matrix_rate(width: int, bs: int, dtype: torch.dtype) -> float:
    """Operations per second in matrix products of the sizes of the model's convolutions, forward and backward.

    The images themselves need no gradient, so that the first convolution has two products and the others have three.
    """
    operations = seconds = 0.0
    for layer, (inputs, outputs, side) in enumerate(CONVOLUTIONS):
        pixels = bs * side * side
        rows, inner, outputs = min(ROWS, pixels), 9 * (inputs * width if layer else inputs), outputs * width
        image, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, outputs, dtype=dtype)
        gradient = image @ weight
        for a, b in ((image, weight), (image.T, gradient), *([(gradient, weight.T)] if layer else [])):
            times = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                a @ b
                times.append(time.perf_counter() - begin)
            seconds += min(times) * pixels / rows
            operations += 2 * pixels * inner * outputs
    return operations / seconds


def convolution_seconds(width: int, bs: int, dtype: torch.dtype) -> float:
    """Seconds that the model's convolutions take by themselves, forward and backward, each in the fastest way seen."""
    seconds = 0.0
    for layer, (inputs, outputs, side) in enumerate(CONVOLUTIONS):
        inputs, outputs, times = inputs * width if layer else inputs, outputs * width, []
        layout = dict(dtype=dtype, memory_format=torch.channels_last)
        x = torch.randn(bs, inputs, side, side).to(**layout).requires_grad_(layer > 0)
        gradient = torch.randn(bs, outputs, side, side).to(**layout)
        for kind in (nn.Conv2d, StripConv2d):
            conv = kind(inputs, outputs, 3, padding=1, bias=False).to(**layout)
            for _ in range(REPEATS):
                begin = time.perf_counter()
                conv(x).backward(gradient)
                times.append(time.perf_counter() - begin)
        seconds += min(times)
    return seconds


# ---- The rest ------------------------------------------------------------------------------------------------------


def data_seconds(dls, steps: int) -> list[float]:
    """Seconds of loading and augmenting each of so many batches, alone."""
    ends = [time.perf_counter()]
    for _ in dls.train:
        ends.append(time.perf_counter())
        if len(ends) > steps:
            break
    return durations(ends)


def operators(learn: Learner, top: int = 8) -> dict[str, float]:
    """Where the time of a training step goes: operator → its own part of it, the largest ones."""
    with torch.profiler.profile() as profile:
        steps_of(learn, 1)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    whole = sum(times.values())
    return {name: times[name] / whole for name in sorted(times, key=times.get, reverse=True)[:top]}


def peak_gib(data: str, bs: int, width: int) -> float:
    """The largest resident size, in GiB, of a process that trains for four steps and validates on all images."""
    code = (
        "from benchmarks import speed\n"
        f"learn = speed.get_learner(speed.get_dls({data!r}, batch_size={bs}, device='cpu'), width={width})\n"
        "speed.steps_of(learn, 3); learn.validate()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
    return largest_child_gib()


def largest_child_gib() -> float:
    """The largest resident size that a child process had."""
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def main(
    data: str = "cifar10",  # as for train.py
    bs: int = 512,  # batch size
    steps: int = 2,  # measured steps of each way in a round
    rounds: int = 4,  # in which all ways alternate
    width: int = 64,  # width of the ResNet
    out: OutputFile = None,  # JSON file for the results
):
    "Compare our training with other ways and with the machine's limit."
    set_seed(0)
    dls = get_dls(data, batch_size=bs, device="cpu")
    memory = peak_gib(data, bs, width)
    learn = get_learner(dls, width=width)
    others = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in ("plain", "stock_fastai")}
    ways = {"ours": lambda: steps_of(learn, steps)} | {
        name: lambda name=name, pool=pool: pool.submit(steps_of_other_way, name, data, bs, width, steps).result()
        for name, pool in others.items()
    }
    dtype = torch.bfloat16 if learn.precision == "bf16" else torch.float32
    seconds = {name: [] for name in ways}
    rates, convolutions, loading = [], [], []
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name] += way()
        rates.append(matrix_rate(width, bs, dtype))
        convolutions.append(convolution_seconds(width, bs, dtype))
        loading += data_seconds(dls, steps)
    step = {name: statistics.median(values) for name, values in seconds.items()}
    per_image = count_flop(ResNet(len(dls.vocab), width=width), (3, SIZE, SIZE))
    rate = bs / step["ours"] * per_image
    results = dict(
        batch_size=bs, width=width, steps=steps * rounds, precision=learn.precision,
        images_per_second={name: bs / value for name, value in step.items()},
        times_plain=step["plain"] / step["ours"],
        times_stock_fastai=step["stock_fastai"] / step["ours"],
        flops_per_image=per_image,
        model_flops_per_second=rate,
        matrix_flops_per_second=max(rates),
        part_of_limit=rate / max(rates),
        convolutions_part_of_step=min(convolutions) / step["ours"],
        data_images_per_second=bs / statistics.median(loading),
        data_part_of_step=statistics.median(loading) / step["ours"],
        operators=operators(learn),
        peak_gib=memory,
    )  # fmt: skip
    print(f"| {learn.precision}, batches of {bs} | images/s | ours is |\n| --- | ---: | ---: |")
    for name, value in results["images_per_second"].items():
        print(f"| {name} | {value:.1f} | {step[name] / step['ours']:.2f} × as fast |")
    print(f"the limit: {results['part_of_limit']:.1%} of {max(rates) / 1e9:.0f} GFLOP/s in matrix products")
    print(f"the convolutions by themselves: {results['convolutions_part_of_step']:.1%} of a step")
    print("a step: " + ", ".join(f"{part:.1%} {name}" for name, part in results["operators"].items()))
    print(f"data: {results['data_images_per_second']:,.0f} images/s, {results['data_part_of_step']:.2%} of a step")
    print(f"memory: {memory:.2f} GiB at most")
    if out:
        write_json(Path(out), results | collect_env())


if __name__ == "__main__":
    cli.run(main)
