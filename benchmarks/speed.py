"""How fast we train on a CPU, against other ways and against the machine's limit: `python -m benchmarks.speed`

A few steps of each in turn, the others in processes of their own: our Learner; a plain PyTorch loop as people write it
(fp32, contiguous tensors, torchvision's transforms of one image after the other in a DataLoader with workers); fastai
as its tutorials use it (PNG files, item and batch transforms, fp32). All train the same ResNet. There are two limits,
both in the precision that our Learner uses: the rate at which torch multiplies matrices of the model's own sizes, which
a convolution's own kernel may exceed, and the time that the model's convolutions take by themselves.
"""

import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain, repeat
from multiprocessing import get_context
from statistics import median

import torch
from fastai.vision import all as fastai
from fastai.vision.all import DataLoaders, set_seed
from fastai.vision.augment import Flip
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.memory import largest_child_gib
from benchmarks.steps import LR, learner_step, save, seconds_of, take_turns
from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.data.decode import SIZE
from cifar10.training.strips import StripConv2d
from cifar10.training.tricks import count_flop
from model import ResNet
from train import get_dls, get_learner

CPU = torch.device("cpu")
WORKERS = 2
ROWS = 2**14  # at most, of a matrix; those of a whole batch would take half a gigabyte and more
REPEATS = 3  # of each matrix product and of each convolution, of which the fastest counts
# Of the model's convolutions: channels in, in widths or 3; channels out, in widths; pixels along each side.
CONVOLUTIONS = ((3, 1, 32), (1, 2, 32), (2, 2, 16), (2, 2, 16), (2, 4, 16), (4, 8, 8), (8, 8, 4), (8, 8, 4))


# ---- The ways to train ---------------------------------------------------------------------------------------------


def plain_loop(dls: DataLoaders, width: int) -> Callable[[int], float]:
    table = dls.train.table
    transform = transforms.Compose([
        transforms.RandomCrop(SIZE, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*table.stats(dls.train.rows)),
        transforms.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1)),
    ])  # fmt: skip
    train_images = ImageFolder(table.folder / table.split_names[0], transform)
    loader = DataLoader(train_images, dls.bs, shuffle=True, drop_last=True, num_workers=WORKERS)
    model = ResNet(len(dls.vocab), width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)

    def step(images: Tensor, labels: Tensor):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def turn(steps: int) -> float:
        batches = iter(loader)  # anew, so that its workers rest while it is the turn of another way
        return seconds_of(lambda: step(*next(batches)), steps, CPU)

    return turn


def stock_fastai(dls: DataLoaders, width: int) -> Callable[[int], float]:
    table = dls.train.table
    stock = fastai.ImageDataLoaders.from_folder(
        table.folder, table.split_names[0], table.split_names[-1], bs=dls.bs, num_workers=WORKERS, device=CPU,
        item_tfms=fastai.RandomCrop(SIZE),
        batch_tfms=[
            Flip(), fastai.RandomErasing(p=1, max_count=1), fastai.Normalize.from_stats(*fastai.imagenet_stats),
        ],
    )  # fmt: skip
    return partial(learner_step, fastai.Learner(stock, ResNet(len(dls.vocab), width=width)))


@cache
def prepared(way: Callable, data: str, bs: int, width: int) -> Callable[[int], float]:
    return way(get_dls(data, bs=bs, device="cpu"), width)


def step_of_other_way(way: Callable, data: str, bs: int, width: int, steps: int) -> float:
    return prepared(way, data, bs, width)(steps)


# ---- The limits ----------------------------------------------------------------------------------------------------


def fastest(function: Callable, *args) -> float:
    """Seconds of the fastest of a few calls."""
    return min(timeit.repeat(partial(function, *args), number=1, repeat=REPEATS))


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
            seconds += fastest(torch.matmul, a, b) * pixels / rows
            operations += 2 * pixels * inner * outputs
    return operations / seconds


def forward_and_backward(conv: nn.Module, x: Tensor, gradient: Tensor):
    conv(x).backward(gradient)


def convolution_seconds(width: int, bs: int, dtype: torch.dtype) -> float:
    """Seconds that the model's convolutions take by themselves, forward and backward, each in the fastest way seen."""
    seconds, layout = 0.0, dict(dtype=dtype, memory_format=torch.channels_last)
    for layer, (inputs, outputs, side) in enumerate(CONVOLUTIONS):
        inputs, outputs = inputs * width if layer else inputs, outputs * width
        x = torch.randn(bs, inputs, side, side).to(**layout).requires_grad_(layer > 0)
        gradient = torch.randn(bs, outputs, side, side).to(**layout)
        convs = [kind(inputs, outputs, 3, padding=1, bias=False).to(**layout) for kind in (nn.Conv2d, StripConv2d)]
        seconds += min(fastest(forward_and_backward, conv, x, gradient) for conv in convs)
    return seconds


def train_and_validate(data: str, bs: int, width: int):
    """Train for four steps, and validate on all images."""
    learn = get_learner(get_dls(data, bs=bs, device="cpu"), width=width)
    learner_step(learn, 2)
    with learn.no_bar():
        learn.validate()


def main(
    data: str = "cifar10",  # as for train.py
    bs: int = 512,  # batch size
    steps: int = 2,  # measured steps of each way in a round
    rounds: int = 4,  # in which all ways take turns
    width: int = 64,  # width of the ResNet
    out: OutputFile = None,  # JSON file for the results
):
    "Compare our training with other ways and with the machine's limit."
    set_seed(0)
    child = partial(ProcessPoolExecutor, 1, get_context("spawn"))
    with child() as pool:
        pool.submit(train_and_validate, data, bs, width).result()
    memory = largest_child_gib()
    dls = get_dls(data, bs=bs, device="cpu")
    learn, batches = get_learner(dls, width=width), chain.from_iterable(repeat(dls.train))
    dtype = torch.bfloat16 if learn.precision == "bf16" else torch.float32
    with child() as first, child() as second:
        turns = take_turns({
            "ours": lambda: learner_step(learn, steps),
            "plain": lambda: first.submit(step_of_other_way, plain_loop, data, bs, width, steps).result(),
            "stock_fastai": lambda: second.submit(step_of_other_way, stock_fastai, data, bs, width, steps).result(),
            "matrix_rate": lambda: matrix_rate(width, bs, dtype),
            "convolutions": lambda: convolution_seconds(width, bs, dtype),
            "loading": lambda: seconds_of(lambda: next(batches), steps, CPU),
        }, rounds)  # fmt: skip
    step = {name: median(turns[name]) for name in ("ours", "plain", "stock_fastai")}
    loading, limit = median(turns["loading"]), max(turns["matrix_rate"])
    per_image = count_flop(ResNet(len(dls.vocab), width=width), (3, SIZE, SIZE))
    rate = bs / step["ours"] * per_image
    results = dict(
        batch_size=bs, width=width, steps=steps * rounds, precision=learn.precision,
        images_per_second={name: bs / seconds for name, seconds in step.items()},
        times_plain=step["plain"] / step["ours"],
        times_stock_fastai=step["stock_fastai"] / step["ours"],
        flops_per_image=per_image,
        model_flops_per_second=rate,
        matrix_flops_per_second=limit,
        part_of_limit=rate / limit,
        convolutions_part_of_step=min(turns["convolutions"]) / step["ours"],
        data_images_per_second=bs / loading,
        data_part_of_step=loading / step["ours"],
        peak_gib=memory,
    )  # fmt: skip
    save(results, out)


if __name__ == "__main__":
    cli.run(main)
