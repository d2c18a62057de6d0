"""The memory that training on many images takes: `python -m benchmarks.memory --out results/memory.json`

Makes JPEG files of two classes, trains a narrow model by train.py for an epoch on four fifths of them, and reports the
peak resident size of its largest process. With `--processes 2`, torchrun starts two of them, and their peak
proportional set sizes are reported, too, in which a page that several processes share counts in equal parts.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from fastcore.basics import num_cpus
from fastcore.parallel import parallel
from PIL import Image

from benchmarks.steps import save
from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.errors import UserError

ROOT = Path(__file__).parents[1]


def make_image(folder: Path, size: int, number: int):
    """A JPEG file `<class>/<number>.jpg`: smooth noise, and in the class "dark" half as bright."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8) // (1 + number % 2)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    image.save(folder / ("bright", "dark")[number % 2] / f"{number:06}.jpg")


def largest_child_gib() -> float:
    """The largest resident size that a child process had."""
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def watch(launcher: subprocess.Popen) -> list[float]:
    """The peak proportional set size of each process that `launcher` starts, in GiB; returns when it ends."""
    peaks: dict[str, float] = {}
    while launcher.poll() is None:
        for children in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
            with suppress(OSError):  # a process that has just ended
                for process in children.read_text(encoding="utf-8").split():
                    memory = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
                    if size := re.search(r"Pss: +(\d+) kB", memory):
                        peaks[process] = max(peaks.get(process, 0.0), int(size[1]) / 2**20)
        time.sleep(0.5)
    return [*peaks.values()]


def main(
    images: int = 200_000,  # files to make
    size: int = 128,  # their side in pixels
    processes: int = 1,  # that train
    width: int = 4,  # width of the ResNet
    out: OutputFile = None,  # JSON file for the results
):
    "Measure the peak memory of training on many images."
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "many"
        for name in ("bright", "dark"):
            (folder / name).mkdir(parents=True)
        print(f"Making {images:,} images …")
        parallel(partial(make_image, folder, size), range(images), n_workers=num_cpus(), chunksize=1000, progress=False)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        words = [sys.executable, *torchrun * (processes > 1), ROOT / "train.py", "--data", folder, "--size", size]
        words += ["--width", width, "--epochs", 1, "--peak_epoch", 0.5, "--lr_max", 0.1]
        words += ["--runs_dir", temporary, "--name", "run"]
        begin = time.perf_counter()
        with subprocess.Popen([*map(str, words)], env=os.environ | {"FASTAI_HOME": temporary}) as training:
            shared = dict(processes=processes, proportional_gib=watch(training)) if processes > 1 else {}
        if training.returncode:
            raise UserError("the training run failed, see above")
        seconds = time.perf_counter() - begin
    command = f"python -m benchmarks.memory --images {images} --size {size} --width {width}"
    if processes > 1:
        command += f" --processes {processes}"
    results = dict(
        images=images, size=size, width=width, pixels_gb=3 * images * size**2 / 1e9, peak_gib=largest_child_gib(),
        seconds=seconds, **shared, command=command,
    )  # fmt: skip
    save(results, out)


if __name__ == "__main__":
    cli.run(main)
