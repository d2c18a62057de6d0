"""Images are decoded once, correctly, into a cache that is never trusted blindly."""

import errno
import os
import shutil
import time

import pytest
import torch
from conftest import make_images
from fastai.vision.all import fastai_cfg, fastai_path
from PIL import Image

from cifar10.data import cache
from cifar10.data.decode import decode_image
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from train import get_dls


@pytest.fixture
def folder(tmp_path):
    return make_images(tmp_path / "images")


def test_images_are_decoded_once(folder, monkeypatch):
    first = ImageTable(folder)
    assert len(first.pixels) == 64
    assert first.cache.parent.parent == fastai_path("data")
    monkeypatch.setattr(cache, "decode_files", lambda *_: pytest.fail("decoded again"))
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


def test_an_interrupted_cache_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    before = set((fastai_path("data") / "decoded").glob("*"))
    with pytest.raises(ZeroDivisionError):
        _ = ImageTable(folder).pixels
    assert set((fastai_path("data") / "decoded").glob("*")) == before


def test_an_image_in_another_class_is_another_data_set(folder):
    first = ImageTable(folder).hash
    (folder / "train/ring/0.png").rename(folder / "train/cross/r0.png")
    (folder / "train/cross/1.png").rename(folder / "train/ring/1b.png")
    assert ImageTable(folder).hash != first


def test_the_rows_of_the_splits(folder):
    table = ImageTable(folder)
    train, valid = table.split_rows("test")
    assert {table.splits[row] for row in train} == {"train"} and {table.splits[row] for row in valid} == {"test"}


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


def test_processes_with_the_same_id_share_a_cache(folder, monkeypatch):
    """While one decodes, another one, as in another container, decodes and finishes; and so the other way around."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    expected, decode, tables = ImageTable(folder), cache.decode_files, []
    expected.cache.unlink()

    def meanwhile(*args):
        if len(tables) < 2:
            tables.append(None)
            tables.append(ImageTable(folder))
        return decode(*args)

    monkeypatch.setattr(cache, "decode_files", meanwhile)
    for table in (ImageTable(folder), ImageTable(folder), *filter(None, tables)):
        assert table.hash == expected.hash and torch.equal(table.pixels[:], expected.pixels[:])
    assert not [*expected.cache.parent.glob(".*")]


def test_pixels_and_state_of_two_processes_are_never_mixed(folder, monkeypatch):
    """Between the two files that one writes, another one writes both, of other pixels; or the pixels only."""
    write_json, others = cache.write_json, []

    def meanwhile(path, state):
        if not others:
            others.append(None)
            Image.new("RGB", (32, 32), "red").save(folder / "train/cross/0.png")
            others.append(ImageTable(folder))
        write_json(path, state)

    before = decode_image(folder / "train/cross/0.png")
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    monkeypatch.setattr(cache, "write_json", meanwhile)
    first = ImageTable(folder)
    row = first.row[folder / "train/cross/0.png"]
    assert (first.pixels[row].numpy() == before).all() and first.hash != others[1].hash
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    for table in (others[1], ImageTable(folder)):
        assert torch.equal(table.pixels[row], red) and table.hash == others[1].hash


@pytest.mark.parametrize("data", ["folder", "digits", "archive", "auto"])
def test_a_home_that_can_not_be_written_names_the_way_out(folder, tmp_path, monkeypatch, data):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    fastai_cfg.cache_clear()
    data = {"folder": folder, "archive": shutil.make_archive(str(tmp_path / "a"), "zip", folder)}.get(data, data)
    try:
        with pytest.raises(UserError, match="or set FASTAI_HOME to another folder"):
            ImageTable(data)
    finally:
        monkeypatch.undo()
        fastai_cfg.cache_clear()


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_can_not_be_written_names_the_way_out(folder, monkeypatch, reason):
    def refuse(descriptor):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"can't be written .{os.strerror(reason)}.*, or set FASTAI_HOME to another"):
        ImageTable(folder)


def test_leftovers_of_a_killed_process_are_removed(folder):
    decoded = fastai_path("data") / "decoded"
    for name, age in ((".old.part", 2 * 24 * 3600), (".new.part", 0)):
        (decoded / name).mkdir(parents=True)
        (decoded / name / "set.pixels").write_bytes(b"half of it")
        for path in (decoded / name / "set.pixels", decoded / name):
            os.utime(path, (time.time() - age, time.time() - age))
    ImageTable(folder)
    assert not (decoded / ".old.part").exists() and (decoded / ".new.part").exists()
    shutil.rmtree(decoded / ".new.part")


def test_images_that_are_decoded_already_can_not_be_read_in_another_way(shapes):
    images = ImageTable(shapes)
    assert get_dls(images, size=32, batch_size=8).train.table is images
    for changes in (dict(size=64), dict(resize="pad"), dict(valid_pct=0.5)):
        with pytest.raises(UserError, match=r"was .* when the images were read; pass their path to read them anew"):
            get_dls(images, batch_size=8, **changes)
