import functools
import hashlib
import http.server
import os
import pickle
import shutil
import socket
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import make_images
from fastai.vision.all import PILImage, TensorCategory, TensorImage, URLs, fastai_path
from PIL import Image
from sklearn.datasets import load_digits

import data
import files
from data import ImageTable, find_source, get_dls
from errors import UserError


def table_of(dls) -> ImageTable:
    return dls.train.table


# ---- Sources


def test_digits_are_scikit_learns(digits):
    table = table_of(digits)
    assert len(table.files) == 1797 and len(digits.train_ds) == 1437 and len(digits.valid_ds) == 360
    assert list(digits.vocab) == [str(digit) for digit in range(10)]
    original = load_digits()
    for row in (0, 700, 1796):
        number, label = int(table.files[row].stem), int(table.labels[row])
        assert original.target[number] == label
        shrunk = Image.fromarray(table.pixels[row, 0].numpy()).resize((8, 8), Image.Resampling.BOX)
        assert abs(np.asarray(shrunk, dtype=float) - original.images[number] * 255 / 16).max() < 64


def packed(folder, path):
    """`folder` as an archive at `path`."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.png"):
                archive.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, folder.name)
    return path


@pytest.mark.parametrize("suffix", [".tgz", ".tar.gz", ".zip"])
def test_archives(shapes, tmp_path, suffix):
    dls = get_dls(packed(shapes, tmp_path / f"packed{suffix}"), bs=8)
    assert table_of(dls).name == "shapes" and list(dls.vocab) == ["cross", "ring"]
    assert torch.equal(table_of(dls).pixels, table_of(get_dls(shapes)).pixels)


@pytest.mark.parametrize("name", ["test", "valid", "val"])
def test_names_of_the_second_split(tmp_path, name):
    make_images(tmp_path / "images")
    (tmp_path / "images/test").rename(tmp_path / "images" / name)
    assert len(get_dls(tmp_path / "images", bs=8).valid_ds) == 16


def test_torchvisions_folder(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = ["airplane", "cat"]
    pixels = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
    content = {
        "data_batch_1": {"data": pixels[:6], "labels": [0, 1, 0, 1, 0, 1]},
        "test_batch": {"data": pixels[6:], "labels": [0, 1]},
        "batches.meta": {"label_names": names},
    }
    md5 = {}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    table = ImageTable(find_source(folder))
    assert table.name == "cifar10"
    assert table.labels == ["airplane"] * 3 + ["cat"] * 3 + names
    assert table.split == ["train"] * 6 + ["test"] * 2
    for row, original in enumerate([0, 2, 4, 1, 3, 5, 6, 7]):
        assert np.array_equal(table.pixels[row].flatten(), pixels[original])

    (folder / "test_batch").write_bytes(pickle.dumps(content["batches.meta"]))  # its MD5 sum is wrong now
    shutil.rmtree(find_source(folder).parent)
    with pytest.raises(UserError, match="not the CIFAR-10"):
        find_source(folder)


# ---- CIFAR-10 and the network


@pytest.fixture
def offline(monkeypatch):
    """Nobody listens at fastai's address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/cifar10.tgz"
    monkeypatch.setattr(URLs, "CIFAR", address)


def test_auto_falls_back_to_the_digits_and_says_how_to_get_cifar10(offline, capsys):
    assert find_source("auto") == find_source("digits")
    said = capsys.readouterr().out
    assert "handwritten digits instead" in said and "refused" in said and "--data" in said
    assert len(said.splitlines()) == 1


def test_cifar10_never_falls_back(offline):
    with pytest.raises(UserError, match=r"neither in .* nor can it be downloaded"):
        find_source("cifar10")


def test_an_unknown_host_is_unreachable(monkeypatch):
    monkeypatch.setattr(URLs, "CIFAR", "http://nowhere.invalid/cifar10.tgz")
    with pytest.raises(UserError, match="nor can it be downloaded"):
        find_source("cifar10")


def test_a_silent_server_does_not_hang(monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(URLs, "CIFAR", f"http://127.0.0.1:{silent.getsockname()[1]}/cifar10.tgz")
        with pytest.raises(UserError, match=r"no answer within|timed out"):
            find_source("cifar10")


def test_digits_never_look_for_cifar10(monkeypatch):
    monkeypatch.setattr(data, "cifar10_folder", lambda: pytest.fail("looked for CIFAR-10"))
    assert find_source("digits").name == "digits"


def test_download(shapes, tmp_path, monkeypatch):
    """From a server of our own, and from its archive when the server is gone; a part of it is never believed."""
    monkeypatch.setattr(data, "CIFAR10_IMAGES", 64)
    shutil.copytree(shapes, tmp_path / "cifar10")
    packed(tmp_path / "cifar10", tmp_path / "cifar10.tgz")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    whole = fastai_path("data") / "cifar10"  # where fastai's own `untar_data` puts it
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(URLs, "CIFAR", f"http://127.0.0.1:{server.server_port}/cifar10.tgz")
        try:
            folder = find_source("auto")
            assert folder.name == "cifar10" and len(ImageTable(folder).files) == 64
            server.shutdown()
            assert find_source("cifar10") == folder
            shutil.copytree(tmp_path / "cifar10", whole)
            assert find_source("cifar10") == whole
            shutil.rmtree(whole / "test")
            assert find_source("cifar10") == folder
        finally:
            shutil.rmtree(whole, ignore_errors=True)
            (fastai_path("archive") / "cifar10.tgz").unlink(missing_ok=True)


# ---- Wrong paths


def test_wrong_sources(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        find_source(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no folder train"):
        find_source(tmp_path)
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(UserError, match="neither a tar nor a zip"):
        find_source(tmp_path / "notes.txt")
    (tmp_path / "images/train").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        get_dls(tmp_path / "images")


def test_no_test_split(tmp_path):
    shutil.rmtree(make_images(tmp_path / "images") / "test")
    with pytest.raises(UserError, match="valid holdout"):
        get_dls(tmp_path / "images")
    assert len(get_dls(tmp_path / "images", bs=8, valid="holdout").valid_ds) == 5


# ---- The cache


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def test_images_are_decoded_once(images, monkeypatch):
    first = ImageTable(images)
    assert len(first.pixels) == 64
    assert first.cache.parent.parent == fastai_path("data")
    monkeypatch.setattr(data, "pixels_of", lambda item: pytest.fail("decoded again"))
    again = ImageTable(images)
    assert torch.equal(again.pixels, first.pixels) and again.hash == first.hash
    assert [file.name for file in first.cache.parent.iterdir() if file.suffix == ".part"] == []


def test_the_cache_follows_its_source(images):
    first = ImageTable(images)
    assert len(first.pixels) == 64
    Image.new("RGB", (32, 32), (1, 2, 3)).save(first.files[0])
    changed = ImageTable(images)
    assert changed.pixels[0, :, 0, 0].tolist() == [1, 2, 3] and changed.hash != first.hash
    changed.files[0].unlink()
    assert len(ImageTable(images).pixels) == len(first.pixels) - 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-5] + b"\0" + b[-4:]])
def test_a_damaged_cache_is_made_anew(images, damage):
    first = ImageTable(images)
    assert len(first.pixels) == 64
    first.cache.write_bytes(damage(first.cache.read_bytes()))
    again = ImageTable(images)
    assert torch.equal(again.pixels, first.pixels) and again.hash == first.hash


def test_other_tensors_in_the_caches_place(images):
    first = ImageTable(images)
    whole = first.pixels
    files.save_tensors(first.cache, {"weight": torch.zeros(3)})
    assert torch.equal(ImageTable(images).pixels, whole)
    files.save_tensors(first.cache, {"pixels": whole[1:]}, fingerprint=first.fingerprint, sha256=first.hash)
    assert torch.equal(ImageTable(images).pixels, whole)


def test_the_digits_elsewhere_are_another_data_set(digits, tmp_path):
    """They would be flipped there, so a run can't go on with them."""
    copy = shutil.copytree(table_of(digits).folder, tmp_path / "copy")
    assert ImageTable(copy).hash != table_of(digits).hash


def test_an_interrupted_cache_leaves_nothing(images, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    before = set((fastai_path("data") / "decoded").glob("*"))
    with pytest.raises(ZeroDivisionError):
        _ = ImageTable(images).pixels
    assert set((fastai_path("data") / "decoded").glob("*")) == before


def test_other_sizes_and_modes_become_32_pixels_rgb(images):
    Image.new("RGB", (64, 48), (10, 20, 30)).save(images / "train/cross/0.png")
    Image.new("L", (32, 32), 40).save(images / "train/cross/1.png")
    Image.new("RGBA", (20, 20), (50, 60, 70, 255)).save(images / "train/cross/2.png")
    (images / "train/cross/.hidden.png").write_text("not an image")
    (images / "train/cross/Thumbs.db").write_text("not an image")
    table = ImageTable(images)
    for name, colour in (("0", [10, 20, 30]), ("1", [40, 40, 40]), ("2", [50, 60, 70])):
        row = table.row[images / f"train/cross/{name}.png"]
        assert (table.pixels[row] == torch.tensor(colour).view(3, 1, 1)).all()


# ---- DataLoaders


def test_batches_hold_the_images_and_their_labels(shapes):
    dls = get_dls(shapes, bs=8)
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
    dls = get_dls(shapes, bs=12)
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
    dls = get_dls(shapes, bs=8)
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened a file"))
    assert sum(len(x) for x, _ in dls.train) == 48


def test_items_of_the_data_sets_are_pil_images(shapes):
    image, label = get_dls(shapes, bs=8).train_ds[0]
    assert isinstance(image, PILImage) and image.size == (32, 32) and int(label) == 0


def test_new_files(shapes, tmp_path):
    dls = get_dls(shapes, bs=8)
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


def test_a_wrong_kind_of_validation():
    with pytest.raises(UserError, match="must be one of test, holdout"):
        get_dls("digits", valid="houldout")


def test_batch_size():
    assert get_dls("digits").bs == 64 and get_dls("digits", bs=100).bs == 100


def test_cifar10(cifar10):
    dls = get_dls(cifar10)
    table = table_of(dls)
    assert (table.name, len(dls.train_ds), len(dls.valid_ds), dls.bs) == ("cifar10", 50_000, 10_000, 512)
    assert dls.vocab == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    mean, std = table.stats(range(50_000))
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=5e-5)
    np.testing.assert_allclose(std, [0.24703223, 0.24348513, 0.26158784], atol=5e-5)
    for row in (0, 12_345, 59_999):
        assert np.array_equal(table.pixels[row], np.array(Image.open(table.files[row])).transpose(2, 0, 1))
    holdout = get_dls(cifar10, valid="holdout")
    assert (len(holdout.train_ds), len(holdout.valid_ds)) == (45_000, 5_000)
    assert (
        torch.bincount(torch.tensor([int(holdout.vocab.o2i[f.parent.name]) for f in holdout.valid_ds.items])).tolist()
        == [500] * 10
    )
