"""Atomic writes and tables."""

import os
import random
import subprocess
import tempfile
import time
from importlib import import_module
from inspect import signature
from pathlib import Path
from threading import Thread

import pytest
import torch
from commandline import ROOT, warm_python

from cifar10.cli import parse
from cifar10.errors import UserError
from cifar10.files import (
    LEFTOVERS,
    read_csv,
    remove_leftovers,
    replacing,
    save_tensors,
    write,
    write_csv,
    write_json,
)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def write_image_folder(folder: Path, content: str):
    with replacing(folder) as new:
        new.mkdir()
        (new / "a.txt").write_text(content)


WRITERS = {
    "text": write,
    "json": write_json,
    "table": lambda path, content: write_csv(path, ["column"], [[content]]),
    "tensors": lambda path, content: save_tensors(path, {"x": torch.zeros(3)}, content=content),
    "folder": write_image_folder,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_processes_with_the_same_id_write_to_places_of_their_own(tmp_path, monkeypatch, writer):
    """As in two containers: while one is about to finish, another one writes the same file, and neither is mixed."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    random.seed(0)
    path, replace, seen = tmp_path / "file", Path.replace, []

    def meanwhile(new, target):
        if len(seen) < 2:
            seen.append(new)
            random.seed(0)  # names must not depend on the seed of a training either
            WRITERS[writer](path, "other" * 1000)
        return replace(new, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    WRITERS[writer](path, "first")
    content = (path / "a.txt" if writer == "folder" else path).read_bytes()
    # The last one to finish is the first that began; a folder that is there stays.
    assert (b"first" in content) == (writer != "folder") and (b"other" in content) == (writer == "folder")
    assert len({*seen}) == 2 and [*tmp_path.iterdir()] == [path]


def test_permissions_are_those_of_other_new_files(tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "plain_folder").mkdir()
    write(tmp_path / "file", "")
    write_image_folder(tmp_path / "folder", "")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain_folder").stat().st_mode


def test_leftovers_are_removed_unless_somebody_may_still_write_them(tmp_path):
    long_ago = time.time() - 10_000
    for name in (".old.part", ".new.part", "old.part", ".old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half of it")
        os.utime(tmp_path / name, (long_ago, long_ago))
        if "old" in name:
            os.utime(tmp_path / name / "file", (long_ago, long_ago))
    (tmp_path / ".name.1.part").write_text("of an earlier version")
    os.utime(tmp_path / ".name.1.part", (long_ago, long_ago))
    remove_leftovers(tmp_path.glob(LEFTOVERS), 9_000)
    assert {path.name for path in tmp_path.iterdir()} == {".new.part", "old.part", ".old"}
    remove_leftovers(tmp_path.glob(LEFTOVERS))
    assert {path.name for path in tmp_path.iterdir()} == {"old.part", ".old"}


def test_a_pipe_is_written_to_and_a_link_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    read: list[str] = []
    reader.start()
    write(tmp_path / "pipe", "text")
    reader.join(600)
    assert read == ["text"] and (tmp_path / "pipe").is_fifo()
    (tmp_path / "table").write_text("before\n")
    code = "from pathlib import Path; from cifar10.files import write; write(Path('/dev/stdout'), 'after')"
    with (tmp_path / "table").open("a") as table:
        subprocess.run([warm_python(), "-c", code], stdout=table, cwd=ROOT, check=True)
    assert (tmp_path / "table").read_text() == "before\nafter"
    with pytest.raises(UserError, match=r"/dev/full can't be written .*; free some disk space"):
        write(Path("/dev/full"), "text")
    if Path("/dev/shm").is_dir():  # a folder like any other
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for text in ("before", "after"):
                write(Path(folder) / "config.json", text)
            assert (Path(folder) / "config.json").read_text() == "after"
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"


def test_a_table_comes_back_as_it_was_written(tmp_path):
    """To the last digit, with missing values."""
    rows = [(1, 0.1 + 0.2, float("nan")), (2, 1e-17, 3.0)]
    write_csv(tmp_path / "a.csv", ["epoch", "loss", "accuracy"], rows)
    assert (tmp_path / "a.csv").read_text() == "epoch,loss,accuracy\n1,0.30000000000000004,nan\n2,1e-17,3.0\n"
    table = read_csv(tmp_path / "a.csv")
    assert table["epoch"] == [1, 2] and table["loss"] == [0.1 + 0.2, 1e-17] and table["accuracy"][1] == 3


@pytest.mark.parametrize("content", [b"", b"epoch\n", b"epoch\nfirst\n", b"\xff,\n\n"])
def test_no_table_of_numbers(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv can't be read as a table of numbers"):
        read_csv(tmp_path / "a.csv")


SCRIPTS = [import_module(name).Options for name in ("predict", "export", "compare")]
BENCHMARKS = [import_module(f"benchmarks.{path.stem}") for path in (ROOT / "benchmarks").glob("[a-z]*.py")]
OUTPUTS = [
    (schema, name)
    for schema in [*SCRIPTS, *(program.main for program in BENCHMARKS if hasattr(program, "main"))]
    for name in signature(schema).parameters
    if name in ("out", "csv", "json", "onnx", "torch")
    and schema.__module__ != "benchmarks.seeds"  # a folder, made at once
]


@pytest.mark.parametrize(("target", "says"), [("no/file", "make its folder first"), (".", "give the name of a file")])
@pytest.mark.parametrize(("schema", "option"), OUTPUTS)
def test_an_output_file_that_can_not_be_written_is_refused_before_the_work(schema, option, target, says, capsys):
    with pytest.raises(SystemExit):
        parse(schema, [f"--{option}", target])
    assert f"argument --{option}: {target} can't be written" in (said := capsys.readouterr().err) and says in said


def test_all_output_files_are_known():
    assert len(OUTPUTS) == 12, OUTPUTS
