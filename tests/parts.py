"""What each process of a training run does, as test_distributed.py starts them: `torchrun tests/parts.py FOLDER`."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fastai.vision.all import Callback, get_model, set_seed
from torch import nn

from cifar10.data.table import ImageTable
from cifar10.processes import local_rank0_first, process_group
from cifar10.recipes import ASSIGNMENT, FASTER
from cifar10.training.callbacks import ValidateLast
from cifar10.training.distributed import SyncBatchNorm2d
from model import ResNet
from train import fit, get_dls, get_learner

# Batches of 359 can be shared evenly by neither two nor three; the last one to validate on has a single image.
PLAIN = replace(ASSIGNMENT, batch_size=359, epochs=2, peak_epoch=1, lr_max=0.1, lr_min=1e-3)


class Watch(Callback):
    """Note the images of each batch, and the gradients of the first one."""

    def before_fit(self):
        self.trained, self.validated, self.gradients = [], [], {}

    def before_batch(self):
        (self.trained if self.training else self.validated).append([crc32(x.numpy().tobytes()) for x in self.x])

    def before_step(self):
        if not self.gradients:
            named = get_model(self.model).named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def train_watched(norm: str) -> dict:
    """Two epochs on the digits, in all processes together."""
    set_seed(0, reproducible=True)
    dls = get_dls(ImageTable.open("digits"), PLAIN, device="cpu")
    learn, watch = get_learner(dls, PLAIN, norm, width=8, precision="fp32"), Watch()
    with learn.no_bar(), learn.no_logging():
        fit(learn, PLAIN, [watch])
    recorder, batch = learn.recorder, dls.train.batch(torch.arange(5, device=dls.device))
    return dict(
        augmented=len(dls.train.after_batch(batch)[0]),
        trained=watch.trained, validated=watch.validated, gradients=watch.gradients,
        losses=torch.stack(recorder.step_losses), values=[list(row) for row in recorder.values],
        extra=recorder.extra, flop=recorder.flop, state=learn.model.state_dict(),
    )  # fmt: skip


def batch_norm_gradients() -> torch.Tensor:
    """Of the ResNet with batch normalization and a batch of noise, in float64; the mean over all processes."""
    torch.manual_seed(0)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model, images, labels = ResNet(width=8).double(), torch.randn(62, 3, 32, 32).double(), torch.randint(10, (62,))
    for norm in [module for module in model.modules() if type(module) is nn.BatchNorm2d]:
        norm.__class__ = SyncBatchNorm2d if world > 1 else nn.BatchNorm2d
    logits = model(images[rank::world])
    (nn.functional.cross_entropy(logits, labels[rank::world], reduction="sum") / len(labels)).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    if world > 1:
        torch.distributed.all_reduce(gradients)
    return gradients


def statistics() -> torch.Tensor:
    """Running mean and variance after a batch in bfloat16, whose mean is large beside its deviation."""
    torch.manual_seed(0)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    norm, images = nn.BatchNorm2d(4), (torch.randn(62, 4, 8, 8) / 10 + torch.rand(4, 1, 1) * 5).bfloat16()
    norm.__class__ = SyncBatchNorm2d if world > 1 else nn.BatchNorm2d
    norm(images[rank::world])
    return torch.stack([norm.running_mean, norm.running_var])


def accuracies() -> list[float]:
    """Of three seeds, by a recipe that freezes layers and resizes images."""
    recipe, found = replace(FASTER, batch_size=128, epochs=2, peak_epoch=0.4, flip=False), []
    for seed in range(3):
        set_seed(seed, reproducible=True)
        learn = get_learner(get_dls("digits", recipe, device="cpu"), recipe, width=8, precision="fp32")
        with learn.no_bar(), learn.no_logging():
            fit(learn, recipe, [ValidateLast()])
        found.append(learn.recorder.values[-1][-1])
    return found


def number_blocks(folder: Path, group: int) -> list[str]:
    """What each process finds in blocks in which the first process of the host writes a file slowly."""
    found = []
    for block in range(3):
        file = folder / f"{os.environ['WORLD_SIZE']}-{group}-{block}.txt"
        with local_rank0_first():
            if os.environ["LOCAL_RANK"] == "0":
                time.sleep(0.3)
                file.write_text(str(block))
            found.append(file.read_text())
    return found


def main(folder: Path):
    blocks = []
    for group in range(3):
        with process_group("cpu", timeout=900):
            blocks.append(number_blocks(folder, group))
    left = not torch.distributed.is_initialized()
    with process_group("cpu", timeout=900):
        found = {norm: train_watched(norm) for norm in ("layer", "batch")}
        found |= dict(blocks=blocks[0], groups=sum(block == blocks[0] for block in blocks), left=left)
        found["batch norm"], found["statistics"] = batch_norm_gradients(), statistics()
        if os.environ["WORLD_SIZE"] != "3":
            found["accuracies"] = accuracies()
        torch.save(found, folder / f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
