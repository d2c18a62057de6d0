"""The command line, end to end, as a user types it; and the REPL lines of the README."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from runs import read_csv

FILES = {
    "config.json", "summary.txt", "history.csv", "batches.csv", "lr_find.png", "lr_find.csv", "model.safetensors",
    "metrics.json", "misclassified.png", "gradcam.png", "curves.png", "confusion_matrix.png", "report.md",
}  # fmt: skip


def command(script, *arguments, cwd):
    """Run a script of ours as a user would; the process when it has ended."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A run on the tiny image folder with everything found and drawn: its folder, and what the command printed."""
    cwd = tmp_path_factory.mktemp("cwd")
    short = ("--epochs", 2, "--peak_epoch", 1, "--batch_size", 8)
    done = command("train.py", "--data", shapes, *short, cwd=cwd)
    assert done.returncode == 0, done.stderr
    (folder,) = (cwd / "runs").iterdir()
    return folder, done.stdout


def test_a_run_leaves_every_file(run):
    folder, said = run
    assert {file.name for file in folder.iterdir()} == FILES
    assert re.fullmatch(r"\d{8}-\d{6}-shapes-assignment", folder.name)
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    assert lines[-1].startswith("shapes: ") and folder.name in lines[-1]
    assert said.count("2 epochs and the LR finder will take about") == 1 and "█" not in said
    assert sum(bool(re.match(r"[12] +0\.\d+ ", line)) for line in lines) == 2


def test_its_figures_agree(run):
    folder, said = run
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    history, batches = read_csv(folder / "history.csv"), read_csv(folder / "batches.csv")
    assert metrics["accuracy"] == pytest.approx(history["valid_accuracy"][-1])
    assert metrics["loss"] == pytest.approx(history["valid_loss"][-1], rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(sum(metrics["per_class_accuracy"].values()) / 2)
    assert f"{metrics['accuracy']:.2%}" in said
    assert metrics["seconds"] > metrics["seconds_training"] > 0
    assert metrics["images_per_second"] == pytest.approx(2 * 48 / metrics["seconds_training"])
    options = config["options"]
    assert (options["epochs"], options["peak_epoch"], options["batch_size"], options["seed"]) == (2, 1, 8, 42)
    assert batches["lr"][0] == pytest.approx(options["lr_min"]) and max(batches["lr"]) == pytest.approx(
        options["lr_max"]
    )
    peak = batches["lr"].index(max(batches["lr"]))
    assert peak == 6 and max(batches["lr"][:peak]) < max(batches["lr"])  # six steps an epoch
    assert options["lr_min"] < batches["lr"][-1] < 0.2 * options["lr_max"]  # the step before it is back at lr_min
    assert (
        config["data"]["classes"] == ["cross", "ring"]
        and config["data"]["train"] == 48
        and len(config["data"]["sha256"]) == 64
    )
    assert config["versions"]["fastai"] and config["hardware"]["threads"]
    assert "Total params: 6,569,986" in (folder / "summary.txt").read_text()  # two classes
    for picture in folder.glob("*.png"):
        assert min(Image.open(picture).size) >= 300


def test_interpret_makes_the_pictures_again(run):
    folder, _ = run
    pictures = ["misclassified.png", "gradcam.png", "curves.png", "confusion_matrix.png", "report.md"]
    before = {name: (folder / name).read_bytes() for name in pictures}
    for name in pictures:
        (folder / name).unlink()
    done = command("interpret.py", folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {name: (folder / name).read_bytes() for name in pictures} == before


def test_the_same_command_gives_the_same_weights(shapes, tmp_path):
    arguments = ("--data", shapes, "--epochs", 2, "--peak_epoch", 1, "--batch_size", 24, "--lr_max", 0.01)
    for name in ("a", "b"):
        done = command("train.py", *arguments, "--runs_dir", "here", "--name", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / "here" / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not (tmp_path / "here/a/lr_find.csv").exists()  # a given rate needs no finder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epoch_count", "3"], "there is no option --epoch-count"),
        (["--epoch", "3", "--peek_epoch", "1"], "did you mean --peak-epoch?"),
        (["--epochs", "abc"], "invalid int value: 'abc'"),
        (["--epochs", "0"], "epochs is 0; it must be above 0"),
        (["--batch_size", "-4"], "batch_size is -4; it must be above 0"),
        (["--lr_max", "nan"], "lr_max is nan"),
        (["--lr_max", "0.1", "--lr_min", "0.2"], "lr_min (0.2) is above lr_max (0.1)"),
        (["--epochs", "3", "--peak_epoch", "5"], "peak_epoch is 5"),
        (["--batch_size", "1000"], "batch_size is 1000, more than the 48 training images"),
        (["--norm", "group"], "choose from"),
        (["--precision", "fp16"], "fp16 needs a CUDA GPU"),
        (["--data", "nowhere"], "there is no"),
        (["--runs_dir", "file"], "choose another --runs_dir"),
        (["--name", "a/b"], "plain folder name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_with_one_sentence(shapes, tmp_path, arguments, says):
    (tmp_path / "file").write_text("")
    data = [] if "--data" in arguments else ["--data", shapes]
    done = command("train.py", *data, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interpreting_no_run(tmp_path):
    done = command("interpret.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and "is not the folder of a finished run" in done.stderr


def test_help_explains_each_option_with_its_default(tmp_path):
    done = command("train.py", "--help", cwd=tmp_path)
    text = " ".join(done.stdout.split())
    options = re.findall(r"--([a-z0-9-]+)", text.split("options:")[1])
    assert {"data", "epochs", "peak-epoch", "batch-size", "seed", "lr-max", "lr-min", "norm", "precision"} <= set(
        options
    )
    assert text.count("(default: ") >= 13


def test_ctrl_c_ends_with_one_line(shapes, tmp_path):
    arguments = ["--data", str(shapes), "--lr_max", "0.01", "--epochs", "100"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("One cycle"):
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip() == "stopped by Ctrl-C"


def test_the_readmes_repl_lines(tmp_path):
    (lines,) = re.findall(r"```python\n(from train import \*.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    check = "\nassert learn.validate()[1] > 0.9, learn.validate()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", lines + check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_bare_loop(tmp_path):
    """benchmarks/overhead.py runs and measures; its committed figures are within the bound."""
    done = command("benchmarks/overhead.py", "--bs", 8, "--steps", 4, "--width", 4, "--out", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (
        figures["ratio"] == pytest.approx(figures["ours_seconds"] / figures["plain_seconds"]) and figures["ratio"] > 0
    )
    assert json.loads((ROOT / "results/overhead.json").read_text())["ratio"] <= 1.05
