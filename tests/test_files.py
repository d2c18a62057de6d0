"""Atomic writes and tables."""

import os
import subprocess
import sys
import tempfile
from importlib import import_module
from inspect import signature
from pathlib import Path
from threading import Thread

import pytest
from commandline import ROOT

from cifar10.cli import parse
from cifar10.errors import UserError
from cifar10.files import read_csv, write, write_csv


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_pipe_is_written_to_and_a_link_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    read: list[str] = []
    reader.start()
    write(tmp_path / "pipe", "text")
    reader.join(10)
    assert read == ["text"] and (tmp_path / "pipe").is_fifo()
    (tmp_path / "table").write_text("before\n")
    code = "from pathlib import Path; from cifar10.files import write; write(Path('/dev/stdout'), 'after')"
    with (tmp_path / "table").open("a") as table:
        subprocess.run([sys.executable, "-c", code], stdout=table, cwd=ROOT, check=True)
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


PROGRAMS = ["predict", "export", *(f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("[a-z]*.py"))]
OUTPUTS = [
    (program.main, name)
    for program in map(import_module, PROGRAMS)
    for name in (signature(program.main).parameters if hasattr(program, "main") else ())
    if name in ("out", "csv", "json", "onnx", "torch")
    and program.__name__ != "benchmarks.seeds"  # a folder, made at once
]


@pytest.mark.parametrize(("target", "says"), [("no/file", "make its folder first"), (".", "give the name of a file")])
@pytest.mark.parametrize(("main", "option"), OUTPUTS)
def test_an_output_file_that_can_not_be_written_is_refused_before_the_work(main, option, target, says, capsys):
    with pytest.raises(SystemExit):
        parse(main, [f"--{option}", target])
    assert f"argument --{option}: {target} can't be written" in (said := capsys.readouterr().err) and says in said


def test_all_output_files_are_known():
    assert len(OUTPUTS) == 12, OUTPUTS
