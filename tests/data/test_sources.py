"""CIFAR-10, folders, archives, torchvision's batches, the digits: every source becomes an image folder."""

import errno
import functools
import hashlib
import http.server
import io
import pickle
import shutil
import socket
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fastai.vision.all import URLs, fastai_path
from PIL import Image
from sklearn.datasets import load_digits

from cifar10.data import sources
from cifar10.data.sources import prepare_data
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from train import get_dls


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


def test_digits_are_scikit_learns(digits):
    table = digits.train.table
    assert len(table.files) == 1797 and len(digits.train_ds) == 1437 and len(digits.valid_ds) == 360
    assert list(digits.vocab) == [str(digit) for digit in range(10)]
    original = load_digits()
    for row in (0, 700, 1796):
        number, label = int(table.files[row].stem), int(table.labels[row])
        assert original.target[number] == label
        shrunk = Image.fromarray(table.pixels[row, 0].numpy()).resize((8, 8), Image.Resampling.BOX)
        assert abs(np.asarray(shrunk, dtype=float) - original.images[number] * 255 / 16).max() < 64


@pytest.mark.parametrize("suffix", [".tgz", ".tar.gz", ".zip"])
def test_archives(shapes, tmp_path, suffix):
    dls = get_dls(packed(shapes, tmp_path / f"packed{suffix}"), batch_size=8)
    assert dls.train.table.name == "shapes" and list(dls.vocab) == ["cross", "ring"]
    assert torch.equal(dls.train.table.pixels, get_dls(shapes).train.table.pixels)


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
    table = ImageTable.open(folder)
    assert table.name == "cifar10"
    assert table.labels == ["airplane"] * 3 + ["cat"] * 3 + names
    assert table.splits == ["train"] * 6 + ["test"] * 2
    for row, original in enumerate([0, 2, 4, 1, 3, 5, 6, 7]):
        assert np.array_equal(table.pixels[row].flatten(), pixels[original])

    (folder / "test_batch").write_bytes(pickle.dumps(content["batches.meta"]))  # its MD5 sum is wrong now
    shutil.rmtree(prepare_data(folder).folder.parent)
    with pytest.raises(UserError, match="not the CIFAR-10"):
        prepare_data(folder)


@pytest.fixture
def offline(monkeypatch):
    """Nobody listens at fastai's address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/cifar10.tgz"
    monkeypatch.setattr(URLs, "CIFAR", address)


def test_auto_falls_back_to_the_digits_and_says_how_to_get_cifar10(offline, capsys):
    assert prepare_data("auto") == prepare_data("digits")
    said = capsys.readouterr().out
    assert "handwritten digits instead" in said and "refused" in said and "--data" in said
    assert len(said.splitlines()) == 1


def test_cifar10_never_falls_back(offline):
    with pytest.raises(UserError, match=r"neither in .* nor can it be downloaded"):
        prepare_data("cifar10")


def test_an_unknown_host_is_unreachable(monkeypatch):
    monkeypatch.setattr(URLs, "CIFAR", "http://nowhere.invalid/cifar10.tgz")
    with pytest.raises(UserError, match="nor can it be downloaded"):
        prepare_data("cifar10")


def test_a_silent_server_does_not_hang(monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(URLs, "CIFAR", f"http://127.0.0.1:{silent.getsockname()[1]}/cifar10.tgz")
        with pytest.raises(UserError, match="timed out"):
            prepare_data("cifar10")


def test_digits_never_look_for_cifar10(monkeypatch):
    monkeypatch.setattr(sources, "cifar10_folder", lambda: pytest.fail("looked for CIFAR-10"))
    assert prepare_data("digits").folder.name == "digits"


def test_download(shapes, tmp_path, monkeypatch):
    """From a server of our own, and from its archive when the server is gone; a part of it is never believed."""
    monkeypatch.setattr(sources, "CIFAR10_IMAGES", 64)
    shutil.copytree(shapes, tmp_path / "cifar10")
    packed(tmp_path / "cifar10", tmp_path / "cifar10.tgz")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    whole = fastai_path("data") / "cifar10"  # where fastai's own `untar_data` puts it
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(URLs, "CIFAR", f"http://127.0.0.1:{server.server_port}/cifar10.tgz")
        try:
            folder = prepare_data("auto").folder
            assert folder.name == "cifar10" and len(ImageTable(folder).files) == 64
            server.shutdown()
            assert prepare_data("cifar10").folder == folder
            shutil.copytree(tmp_path / "cifar10", whole)
            assert prepare_data("cifar10").folder == whole
            shutil.rmtree(whole / "test")
            assert prepare_data("cifar10").folder == folder
            (fastai_path("archive") / "cifar10.tgz").write_bytes((tmp_path / "cifar10.tgz").read_bytes()[:-1000])
            with pytest.raises(
                UserError, match=r"cifar10.tgz can't be unpacked: .*; if it is damaged, remove it and get it again"
            ):
                prepare_data("auto")
        finally:
            shutil.rmtree(whole, ignore_errors=True)
            (fastai_path("archive") / "cifar10.tgz").unlink(missing_ok=True)


def test_two_downloads_do_not_write_to_the_same_file(shapes, tmp_path, monkeypatch):
    """The second one waits, and then finds the first one's archive."""
    monkeypatch.setattr(sources, "CIFAR10_IMAGES", 64)
    shutil.copytree(shapes, tmp_path / "cifar10")
    packed(tmp_path / "cifar10", tmp_path / "cifar10.tgz")
    archive, downloads = fastai_path("archive") / "cifar10.tgz", []

    def download(self, url):
        downloads.append(archive.is_file())
        if not archive.is_file():
            time.sleep(0.2)
            shutil.copy(tmp_path / "cifar10.tgz", archive)

    monkeypatch.setattr(sources.FastDownload, "download", download)
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO())
    try:
        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(prepare_data, ["cifar10"] * 2)
    finally:
        archive.unlink(missing_ok=True)
    assert one == other and downloads == [False, True]


def test_an_archive_that_others_share_needs_no_lock(shapes, tmp_path, monkeypatch):
    """Its folder may be read-only; without an archive, there is nothing to train on then."""

    def refuse(self, **kwargs):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(sources, "CIFAR10_IMAGES", 64)
    monkeypatch.setattr(sources.FileLock, "acquire", refuse)
    monkeypatch.setattr(sources.FastDownload, "download", lambda self, url: archive)
    shutil.copytree(shapes, tmp_path / "cifar10")
    archive = packed(tmp_path / "cifar10", fastai_path("archive") / "cifar10.tgz")
    try:
        assert prepare_data("cifar10").folder.name == "cifar10"
    finally:
        archive.unlink()
    with pytest.raises(UserError, match=r"nor can it be downloaded .*denied"):
        prepare_data("cifar10")


def test_wrong_sources(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        prepare_data(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no folders; it needs train"):
        prepare_data(tmp_path)
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(UserError, match="neither a tar nor a zip"):
        prepare_data(tmp_path / "notes.txt")
    for name in ("labels.xlsx", "labels.ODS"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(UserError, match=f"{name} is a spreadsheet; save it as CSV UTF-8"):
            prepare_data(tmp_path / name)
    (tmp_path / "single/cats").mkdir(parents=True)
    with pytest.raises(UserError, match="holds one folder only; it needs train/<class>/, or <class>/ for two classes"):
        prepare_data(tmp_path / "single")
    (tmp_path / "images/train").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        get_dls(tmp_path / "images")


def test_several_data_sets_in_a_folder(tmp_path, shapes):
    for name in ("b", "a", ".old", "__MACOSX"):
        shutil.copytree(shapes, tmp_path / "all" / name)
    with pytest.raises(UserError, match="all holds several data sets, a, b; pass the path of one of them"):
        prepare_data(tmp_path / "all")
    shutil.rmtree(tmp_path / "all/b")
    assert prepare_data(tmp_path / "all").folder == tmp_path / "all/a"


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_folder_with_the_name_of_a_data_set(tmp_path, shapes, monkeypatch, capsys, name):
    shutil.copytree(shapes, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "cifar10_folder", lambda: shapes)
    assert prepare_data(name).folder != tmp_path / name
    assert f"for the {name} in this folder, pass ./{name}" in capsys.readouterr().out
    assert prepare_data(f"./{name}").folder == tmp_path / name


def test_zip_archives_of_other_programs(tmp_path, shapes):
    """Names with backslashes, and in UTF-8 without the flag that says so."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in shapes.rglob("*.png"):
            name = str(file.relative_to(shapes)).replace("ring", "caf??").replace("/", "\\")
            archive.writestr(name, file.read_bytes())
    data = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(data.replace(b"caf??", "café".encode()))
    table = ImageTable.open(tmp_path / "set.zip")
    assert table.classes == ["café", "cross"] and len(table.files) == 64


@pytest.mark.parametrize(
    ("encoding", "names", "said"),
    [
        ("cp932", "赤 緑 青", ""),
        ("cp932", "いぬ データ ねこ（小）", ""),
        ("cp932", "犬 猫", "has file names in cp437 or cp932"),
        ("gbk", "正常 缺陷", ""),
        ("euc_kr", "고양이 강아지", "has file names in euc_kr or gb2312"),
        ("cp437", "größe Äpfel niño", ""),
        ("cp866", "кот собака", "has file names in an unknown encoding"),
        ("utf-8", "größe 猫 кот", ""),
    ],
)
def test_names_in_the_encoding_of_a_country(tmp_path, capsys, encoding, names, said):
    """Recognized if only one is possible; otherwise a line says so, and the classes are still apart."""
    codes = {f"@{number}": name.encode(encoding) for number, name in enumerate(names.split())}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for code, name in codes.items():
            for i in range(2):
                archive.writestr(f"{code}{'_' * (len(name) - 2)}/img{i}.jpg", b"no image")
    data = (tmp_path / "set.zip").read_bytes()
    for code, name in codes.items():
        data = data.replace(code.encode() + b"_" * (len(name) - 2), name)
    (tmp_path / "set.zip").write_bytes(data)
    folders = {path.name for path in prepare_data(tmp_path / "set.zip").folder.iterdir()}
    assert len(folders) == len(codes)
    assert folders == {*names.split()} or said
    line = f"set.zip {said}; if classes are unreadable, unpack it with another program\n"
    assert line in capsys.readouterr().out if said else "program" not in capsys.readouterr().out
