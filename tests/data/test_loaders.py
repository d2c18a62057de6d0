"""Batches hold the right images and labels, and fastai's DataLoaders behave as in fastai."""

import gc
import itertools
import sys
import types

import numpy as np
import pytest
import torch
from conftest import make_images
from fastai.vision.all import PILImage, TensorCategory, TensorImage, Transform
from PIL import Image

from augment import AlternatingFlip, Cutout, FlipLR, RandomCrop
from cifar10.data.loaders import build_dls, describe
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.hardware import get_device
from cifar10.interpretation.report import CIFAR10_SHA256
from train import get_dls


def table_of(dls) -> ImageTable:
    return dls.train.table


def test_batches_hold_the_images_and_their_labels(shapes):
    dls = get_dls(shapes, batch_size=8)
    dls.valid.before_iter()
    seen = 0
    for xb, yb in dls.valid:
        assert isinstance(xb, TensorImage) and isinstance(yb, TensorCategory) and yb.dtype == torch.int64
        for x, y in zip(xb, yb, strict=True):
            file = dls.valid_ds.items[seen]
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in table_of(dls).stats(dls.train.rows))
            pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
            torch.testing.assert_close(torch.Tensor(x), (pixels - mean) / std, atol=1e-4, rtol=0)
            assert dls.vocab[y] == file.parent.name
            seen += 1
    assert seen == 16


def test_an_epoch_goes_once_through_the_training_images_in_a_new_order(shapes):
    dls = get_dls(shapes, batch_size=12)
    assert len(dls.train) == 4
    orders = []
    for _ in range(2):
        orders.append([])
        batch = dls.train.batch
        dls.train.batch = lambda indices, order=orders[-1], batch=batch: (
            order.extend(indices.tolist()) or batch(indices)
        )
        assert sum(len(x) for x, _ in dls.train) == 48
        del dls.train.batch
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(48)) and orders[0] != orders[1]


def test_a_batch_decodes_no_file(shapes, monkeypatch):
    dls = get_dls(shapes, batch_size=8)
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened a file"))
    assert sum(len(x) for x, _ in dls.train) == 48


def test_a_batch_is_freed_when_nothing_needs_it_any_more(digits):
    def alive() -> int:
        return sum(isinstance(thing, TensorImage) and thing.shape[0] == digits.bs for thing in gc.get_objects())

    next(iter(digits.train))
    gc.collect()
    gc.disable()  # nothing may depend on when it runs
    try:
        before = alive()
        for _ in zip(range(5), digits.train):
            pass
        del _
        assert alive() == before
    finally:
        gc.enable()


class Noise(Transform):
    """A transform that knows nothing of parts."""

    split_idx, order = 0, 101

    def encodes(self, x: TensorImage):
        return x + torch.randn(len(x), 1, 1, 1)


@pytest.mark.parametrize("epoch_number", (None, 1))
@pytest.mark.parametrize("others", ([], [Noise()]))
def test_the_part_of_a_process_is_what_it_would_be_in_the_whole_batch(others, epoch_number):
    flip = AlternatingFlip()
    flip.epoch = epoch_number
    tfms = [RandomCrop(32, padding=4), FlipLR(), flip, *others, Cutout(8, 8)]
    dl = build_dls("digits", tfms, bs=50, device="cpu").train

    def epoch(share):
        torch.manual_seed(0)
        dl.rng.seed(0)
        dl.share = share
        assert dl.takes_shards == (share is not None and not others)
        return list(dl)

    parts = [epoch(slice(rank, None, 3)) for rank in range(3)]
    for whole, *batches in zip(epoch(None), *parts, strict=True):
        for rank, part in enumerate(batches):
            assert all(torch.equal(mine, all_of_them[rank::3]) for mine, all_of_them in zip(part, whole, strict=True))


def test_items_of_the_data_sets_are_pil_images(shapes):
    image, label = get_dls(shapes, batch_size=8).train_ds[0]
    assert isinstance(image, PILImage) and image.size == (32, 32) and int(label) == 0


def test_new_files(shapes, tmp_path):
    dls = get_dls(shapes, batch_size=8)
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "red.png")
    inside, outside = dls.train_ds.items[0], tmp_path / "red.png"
    (batch,) = dls.test_dl([inside, outside]).one_batch()
    assert batch.shape == (2, 3, 32, 32)
    (from_table,) = dls.test_dl([inside]).one_batch()
    assert torch.equal(batch[:1], from_table)
    x, y = dls.test_dl(dls.valid_ds.items[:3], with_labels=True).one_batch()
    assert len(x) == len(y) == 3 and [dls.vocab[i] for i in y] == ["cross"] * 3


def test_holdout_is_a_balanced_seeded_tenth_of_the_training_images(digits):
    dls = get_dls("digits", valid="holdout")
    train, valid = set(dls.train_ds.items), set(dls.valid_ds.items)
    assert train | valid == set(digits.train_ds.items) and not train & valid
    assert len(valid) == 144
    counts = [sum(file.parent.name == label for file in valid) for label in dls.vocab]
    assert max(counts) - min(counts) <= 1
    assert set(get_dls("digits", valid="holdout").valid_ds.items) == valid


@pytest.mark.parametrize(
    ("name", "valid", "says"),
    [
        ("test", "test", "48 training and 16 test images"),
        ("valid", "test", "48 training and 16 validation images"),
        ("test", "holdout", "43 training and 5 validation images"),
    ],
)
def test_the_images_are_described_as_what_they_are_used_for(tmp_path, name, valid, says):
    (make_images(tmp_path / "images") / "test").rename(tmp_path / "images" / name)
    assert says in describe(get_dls(tmp_path / "images", valid=valid, batch_size=8))


def test_a_wrong_kind_of_validation():
    with pytest.raises(UserError, match="must be one of test, holdout"):
        get_dls("digits", valid="houldout")


def test_batch_size():
    assert get_dls("digits").bs == 64 and get_dls("digits", batch_size=100).bs == 100


@pytest.mark.slow
@pytest.mark.cifar10
def test_cifar10(cifar10_path):
    dls = get_dls(cifar10_path)
    table = table_of(dls)
    assert (table.name, len(dls.train_ds), len(dls.valid_ds), dls.bs) == ("cifar10", 50_000, 10_000, 512)
    assert dls.vocab == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert table.hash == CIFAR10_SHA256
    mean, std = table.stats(range(50_000))
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=5e-5)
    np.testing.assert_allclose(std, [0.24703223, 0.24348513, 0.26158784], atol=5e-5)
    for row in (0, 12_345, 59_999):
        assert np.array_equal(table.pixels[row], np.array(Image.open(table.files[row])).transpose(2, 0, 1))
    holdout = get_dls(cifar10_path, valid="holdout")
    assert (len(holdout.train_ds), len(holdout.valid_ds)) == (45_000, 5_000)
    assert (
        torch.bincount(torch.tensor([int(holdout.vocab.o2i[f.parent.name]) for f in holdout.valid_ds.items])).tolist()
        == [500] * 10
    )


def test_the_package_takes_any_transforms_and_statistics(shapes):
    dls = build_dls(shapes, bs=8, stats=([0.5] * 3, [0.25] * 3))
    x, _ = dls.valid.one_batch()
    pixels = dls.train.table.pixels[dls.valid.rows[:8]].float() / 255
    torch.testing.assert_close(torch.Tensor(x), (pixels - 0.5) / 0.25)
    assert not any("Cutout" in type(tfm).__name__ for tfm in dls.train.after_batch.fs)


def test_loading_leaves_the_random_numbers_alone(shapes):
    """An epoch without random transforms draws nothing from PyTorch's global generator."""
    dls = build_dls(shapes, bs=8)
    before = torch.get_rng_state()
    assert sum(len(x) for x, _ in dls.train) == 48
    assert torch.equal(torch.get_rng_state(), before)


def test_fastais_other_loaders_go_through_the_same_batches(shapes, monkeypatch):
    """DistributedDL reads half of the images on each of two ranks; it bypasses `__iter__`."""
    with monkeypatch.context() as patch:  # its module wants a package that its loader does not need
        patch.setitem(sys.modules, "accelerate", types.SimpleNamespace(Accelerator=object))
        from fastai.distributed import DistributedDL

    dls = build_dls(shapes, bs=8)
    seen = []
    for rank in (0, 1):
        loader = DistributedDL(dls.valid, rank=rank, world_size=2)
        loader._broadcast = lambda idxs, rank: idxs  # no process group here
        seen += [x.sum().item() for batch, _ in loader for x in batch]
    expected = [x.sum().item() for batch, _ in dls.valid for x in batch]
    assert seen == pytest.approx(expected)
    dls.train.get_idxs = lambda: itertools.repeat(3)  # as `show_batch(unique=True)` does
    x, _ = dls.train.one_batch()
    assert len(x) == 8 and (x == x[0]).all()


def test_flips_can_be_switched(shapes, digits):
    """An explicit option, off by default for the digits."""
    names = lambda dls: [type(tfm).__name__ for tfm in dls.train.after_batch.fs]  # noqa: E731
    assert "FlipLR" in names(get_dls(shapes)) and "FlipLR" not in names(digits)
    assert "FlipLR" not in names(get_dls(shapes, flip=False)) and "FlipLR" in names(get_dls("digits", flip=True))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match="and PyTorch finds none here"):
        get_device(device)
