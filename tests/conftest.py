"""Fixtures: a fastai home of the tests' own, the digits, a tiny image folder, and CIFAR-10 where it is at hand."""

import os
import signal
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

HOME = tempfile.TemporaryDirectory(prefix="tests-fastai-")
os.environ["FASTAI_HOME"] = HOME.name  # before fastai is imported: caches of the tests stay out of the user's
for place in (
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "IPYTHONDIR",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "GRADIO_TEMP_DIR",
):
    os.environ[place] = f"{HOME.name}/{place.lower()}"
os.environ["no_proxy"] = ",".join([os.environ.get("no_proxy", ""), "127.0.0.1", "localhost"]).strip(",")
os.environ["TMPDIR"] = HOME.name
os.environ["MPLBACKEND"] = "Agg"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the CPU, on a machine with a GPU as well
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # each worker has a core; threads of two workers would wait for each other

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from commandline import ROOT  # noqa: E402, F401
from fastai.vision.all import Learner, set_seed  # noqa: E402
from PIL import Image  # noqa: E402

from cifar10.files import save_tensors  # noqa: E402
from cifar10.interpretation.predictions import Interpretation  # noqa: E402
from cifar10.recipes import ASSIGNMENT  # noqa: E402
from cifar10.runs.run import FORMAT, WEIGHTS  # noqa: E402
from cifar10.signals import SIGNALS  # noqa: E402
from cifar10.training.learner import build_learner  # noqa: E402
from model import ResNet, split_by_depth  # noqa: E402
from train import get_dls, get_learner  # noqa: E402


@pytest.fixture(autouse=True)
def signal_handlers():
    """A program that ends ignores signals; the tests and what they start go on."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cifar10_path() -> str:
    """The path of CIFAR-10, from the environment variable of that name."""
    path = os.environ.get("CIFAR10")
    if not path:
        pytest.skip("needs CIFAR-10: set CIFAR10 to the path of cifar10.tgz or of its folder")
    return os.path.abspath(path)


@pytest.fixture(scope="session")
def digits():
    """DataLoaders of the digits."""
    return get_dls("digits")


def make_images(folder: Path, train: int = 24, test: int = 8, classes=("cross", "ring"), size: int = 32) -> Path:
    """An image folder of a cross or a ring on noise; `train` and `test` images per class."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    shapes = {"cross": (abs(x) < 2) | (abs(y) < 2), "ring": abs(np.hypot(x, y) - size / 4) < 2, "bar": abs(x) < 3}
    for split, count in (("train", train), ("test", test)):
        for number, label in enumerate(classes):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (size, size, 3), dtype=np.uint8)
                pixels[shapes.get(label, list(shapes.values())[number % 3])] += 120
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


def save_classifier(folder: Path, classes=("cross", "ring"), size: int = 32, resize: str = "crop", half=False) -> Path:
    """The folder of a run that holds nothing but weights, of a small model at its random beginning."""
    set_seed(0)
    model = ResNet(len(classes), width=4, logit_scale=4)  # large logits: probabilities that depend on the pixels
    data = dict(name=folder.name, classes=classes, size=size, resize=resize, ranges={}, mean=[0.5] * 3, std=[0.25] * 3)
    about = dict(format=FORMAT, model=model.args, data=data, recipe=asdict(ASSIGNMENT), precision="fp32")
    folder.mkdir(parents=True)
    save_tensors(folder / WEIGHTS, (model.half() if half else model).state_dict(), **about)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """An image folder of two classes, 48 training and 16 test images."""
    return make_images(tmp_path_factory.mktemp("images") / "shapes")


@pytest.fixture
def dls(shapes):
    set_seed(1)
    return get_dls(shapes, batch_size=16)


def small(dls, width: int = 4, precision: str = "fp32", path=None, **hyperparameters) -> Learner:
    """A Learner with a small model, in fp32 unless told otherwise, so that it learns the same on every machine."""
    recipe = replace(ASSIGNMENT, **hyperparameters)
    return build_learner(
        dls, ResNet(len(dls.vocab), width=width), recipe, precision, path=path, splitter=split_by_depth
    )


@pytest.fixture(scope="session")
def trained(digits):
    """A small model after one epoch of digits: some images are still wrong."""
    set_seed(0)
    digits.train.rng.seed(0)
    learn = get_learner(digits, width=8, precision="fp32")
    learn.fit_one_cycle(1, 0.1)
    return learn


@pytest.fixture(scope="session")
def interp(trained):
    return Interpretation(trained)
