"""Images are decoded once, correctly, into a cache that is never trusted blindly."""

import os
import shutil

import pytest
import torch
from conftest import make_images
from fastai.vision.all import fastai_path
from PIL import Image

from cifar10 import files
from cifar10.data import table as images
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from train import get_dls


@pytest.fixture
def folder(tmp_path):
    return make_images(tmp_path / "images")


@pytest.mark.parametrize("name", ["test", "valid", "val"])
def test_names_of_the_second_split(tmp_path, name):
    make_images(tmp_path / "images")
    (tmp_path / "images/test").rename(tmp_path / "images" / name)
    assert len(get_dls(tmp_path / "images", batch_size=8).valid_ds) == 16


def test_no_test_split(tmp_path):
    shutil.rmtree(make_images(tmp_path / "images") / "test")
    with pytest.raises(UserError, match="valid holdout"):
        get_dls(tmp_path / "images")
    assert len(get_dls(tmp_path / "images", batch_size=8, valid="holdout").valid_ds) == 5


def test_images_are_decoded_once(folder, monkeypatch):
    first = ImageTable(folder)
    assert len(first.pixels) == 64
    assert first.cache.parent.parent == fastai_path("data")
    monkeypatch.setattr(images, "decode_files", lambda *_: pytest.fail("decoded again"))
    again = ImageTable(folder)
    assert torch.equal(again.pixels, first.pixels) and again.hash == first.hash
    assert [file.name for file in first.cache.parent.iterdir() if file.suffix == ".part"] == []


def test_the_cache_follows_its_source(folder):
    first = ImageTable(folder)
    assert len(first.pixels) == 64
    Image.new("RGB", (32, 32), (1, 2, 3)).save(first.files[0])
    changed = ImageTable(folder)
    assert changed.pixels[0, :, 0, 0].tolist() == [1, 2, 3] and changed.hash != first.hash
    changed.files[0].unlink()
    assert len(ImageTable(folder).pixels) == len(first.pixels) - 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-5] + b"\0" + b[-4:]])
def test_a_damaged_cache_is_made_anew(folder, damage):
    first = ImageTable(folder)
    assert len(first.pixels) == 64
    first.cache.write_bytes(damage(first.cache.read_bytes()))
    again = ImageTable(folder)
    assert torch.equal(again.pixels, first.pixels) and again.hash == first.hash


def test_other_tensors_in_the_caches_place(folder):
    first = ImageTable(folder)
    whole = first.pixels
    files.save_tensors(first.cache, {"weight": torch.zeros(3)})
    assert torch.equal(ImageTable(folder).pixels, whole)
    state = dict(fingerprint=first.fingerprint, sha256=first.hash, broken=[], one_color=[], ranges={})
    files.save_tensors(first.cache, {"pixels": whole[1:]}, **state)
    assert torch.equal(ImageTable(folder).pixels, whole)


def test_an_interrupted_cache_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    before = set((fastai_path("data") / "decoded").glob("*"))
    with pytest.raises(ZeroDivisionError):
        _ = ImageTable(folder).pixels
    assert set((fastai_path("data") / "decoded").glob("*")) == before


def test_other_sizes_and_modes_become_32_pixels_rgb(folder):
    Image.new("RGB", (64, 48), (10, 20, 30)).save(folder / "train/cross/0.png")
    Image.new("L", (32, 32), 40).save(folder / "train/cross/1.png")
    Image.new("RGBA", (20, 20), (50, 60, 70, 255)).save(folder / "train/cross/2.png")
    (folder / "train/cross/.hidden.png").write_text("not an image")
    (folder / "train/cross/Thumbs.db").write_text("not an image")
    table = ImageTable(folder)
    for name, color in (("0", [10, 20, 30]), ("1", [40, 40, 40]), ("2", [50, 60, 70])):
        row = table.row[folder / f"train/cross/{name}.png"]
        assert (table.pixels[row] == torch.tensor(color).view(3, 1, 1)).all()


def test_an_image_in_another_class_is_another_data_set(folder):
    first = ImageTable(folder).hash
    (folder / "train/ring/0.png").rename(folder / "train/cross/r0.png")
    (folder / "train/cross/1.png").rename(folder / "train/ring/1b.png")
    assert ImageTable(folder).hash != first


def test_the_rows_of_the_splits(folder):
    table = ImageTable(folder)
    train, valid = table.split_rows("test")
    assert {table.splits[row] for row in train} == {"train"} and {table.splits[row] for row in valid} == {"test"}
    with pytest.raises(UserError, match="must be one of test, holdout"):
        table.split_rows("tset")


@pytest.mark.parametrize("what", ["files", "classes"])
def test_the_cache_notices_a_swap_of_equal_sizes_and_times(tmp_path, what):
    folder = make_images(tmp_path / "images")
    for file in [*folder.rglob("*.png")]:
        Image.open(file).save(file.with_suffix(".bmp"))  # all of the same size
        file.unlink()
        os.utime(file.with_suffix(".bmp"), (1e9, 1e9))
    first = ImageTable(folder)
    one, other = (folder / ("train/cross/0.bmp", "train/ring/0.bmp")[i] for i in (0, 1))
    one, other = (one, other) if what == "files" else (one.parent, other.parent)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    again = ImageTable(folder)
    assert again.hash != first.hash
    row = again.row[folder / "train/cross/0.bmp"]
    assert torch.equal(again.pixels[row], first.pixels[first.row[folder / "train/ring/0.bmp"]])
