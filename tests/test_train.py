"""The command line, end to end, as a user types it; and the REPL lines of the README."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from commandline import BLANK_PLOTS, ROOT, command, save_blank, warm_python
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

import train
from cifar10.files import read_csv
from cifar10.runs.run import Run

FILES = {
    "config.json", "summary.txt", "history.csv", "batches.csv", "lr_find.png", "lr_find.csv", "model.safetensors",
    "checkpoints", "metrics.json", "misclassified.png", "gradcam.png", "curves.png", "confusion_matrix.png",
    "report.md", "report.html", "calibration.png", "examples", "misclassified",
}  # fmt: skip


def visible(folder) -> set[str]:
    """The names in a run's folder, without the hidden lock file."""
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A run on the tiny image folder with everything found and drawn: its folder, and what the command printed."""
    cwd = tmp_path_factory.mktemp("cwd")
    short = ("--epochs", 2, "--peak_epoch", 1, "--batch_size", 8, "--width", 8)
    done = command("train.py", "--data", shapes, *short, cwd=cwd)
    assert done.returncode == 0, done.stderr
    (folder,) = (cwd / "runs").iterdir()
    return folder, done.stdout


def test_a_run_leaves_every_file(run):
    folder, said = run
    assert visible(folder) == FILES
    assert re.fullmatch(r"\d{8}-\d{6}-shapes-assignment", folder.name)
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    assert " test images of shapes correct" in lines[-1] and folder.name in lines[-1]
    assert said.count("2 epochs and the LR finder will take about") == 1 and "█" not in said
    assert sum(bool(re.match(r"[12] +0\.\d+ ", line)) for line in lines) == 2


def test_its_metrics_agree(run):
    folder, said = run
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    history, batches = read_csv(folder / "history.csv"), read_csv(folder / "batches.csv")
    assert metrics["accuracy"] == pytest.approx(history["valid_accuracy"][-1])
    assert metrics["loss"] == pytest.approx(history["valid_loss"][-1], rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(metrics["macro"]["recall"])  # as many images of each class
    assert f"{metrics['accuracy']:.2%}" in said
    assert metrics["seconds"] > metrics["seconds_training"] > 0
    assert metrics["images_per_second"] == pytest.approx(2 * 48 / metrics["seconds_training"])
    options, lr_min, lr_max = config["options"], config["lr_min"], config["lr_max"]
    assert options["lr_max"] is config["recipe"]["lr_max"] is None  # not given, but found
    recipe = config["recipe"]
    assert (recipe["epochs"], recipe["peak_epoch"], recipe["batch_size"], options["seed"]) == (2, 1, 8, 42)
    assert batches["lr"][0] == pytest.approx(lr_min) and max(batches["lr"]) == pytest.approx(lr_max)
    peak = batches["lr"].index(max(batches["lr"]))
    assert peak == 6 and max(batches["lr"][:peak]) < max(batches["lr"])  # six steps an epoch
    assert lr_min < batches["lr"][-1] < 0.2 * lr_max  # the step before it is back at lr_min
    assert (
        config["data"]["classes"] == ["cross", "ring"]
        and config["data"]["train"] == 48
        and len(config["data"]["sha256"]) == 64
    )
    assert config["versions"]["fastai"] and config["hardware"]["threads"]
    assert "Total params: 103,554" in (folder / "summary.txt").read_text()  # two classes
    for picture in folder.glob("*.png"):
        assert min(Image.open(picture).size) >= 300


@pytest.mark.slow
def test_interpret_makes_the_plots_again(run):
    folder, _ = run
    plots = ["misclassified.png", "gradcam.png", "curves.png", "confusion_matrix.png", "report.md"]
    before = {name: (folder / name).read_bytes() for name in plots}
    for name in plots:
        (folder / name).unlink()
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").rename(folder / "later.json")
    done = command("interpret.py", folder, "--tta", cwd=folder)
    assert done.returncode == 2 and "is not a finished run; finish it with" in done.stderr
    (folder / "later.json").rename(folder / "metrics.json")
    done = command("interpret.py", folder, "--tta", cwd=folder)
    assert done.returncode == 0, done.stderr
    after = json.loads((folder / "metrics.json").read_text())
    assert 0 <= after["tta_accuracy"] <= 1 and after == metrics and 0 < metrics["pflop"] < 0.001
    assert {name: (folder / name).read_bytes() for name in plots} == before


@pytest.mark.slow
def test_the_same_command_gives_the_same_weights_and_another_does_not(shapes, tmp_path):
    arguments = ("--data", shapes, "--epochs", 2, "--peak_epoch", 1, "--batch_size", 24, "--lr_max", 0.01, "--width", 8)
    others = {"seed": ("--seed", 7), "norm": ("--norm", "layer"), "valid": ("--valid", "holdout")}
    for name, more in ({"a": (), "b": ()} | others).items():
        done = command("train.py", *arguments, *more, "--runs_dir", "here", "--name", name, cwd=tmp_path, drawn=False)
        assert done.returncode == 0, done.stderr
    a, b, *rest = (load_file(tmp_path / "here" / name / "model.safetensors") for name in ("a", "b", *others))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a["fc.weight"], other["fc.weight"]) for other in rest)
    assert "GroupNorm" in (tmp_path / "here/norm/summary.txt").read_text()
    assert json.loads((tmp_path / "here/valid/config.json").read_text())["data"]["valid"] == 5  # of 48
    assert not (tmp_path / "here/a/lr_find.csv").exists()  # a given rate needs no finder


@pytest.mark.slow
@pytest.mark.parametrize(("number", "by", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_run_that_is_stopped_says_how_to_resume_and_does(shapes, tmp_path, number, by, status):
    options = {"--data": shapes, "--lr_max": 0.01, "--epochs": 40, "--width": 4, "--batch_size": 24, "--name": "long"}
    process = subprocess.Popen(
        [warm_python(), ROOT / "train.py", *(str(word) for option in options.items() for word in option)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("3 "):  # the third epoch is over
            break
    second = command("train.py", "--resume", "runs/long", cwd=tmp_path)
    assert second.returncode == 2 and "runs/long is locked by another process" in second.stderr
    process.send_signal(number)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == status, errors
    (how,) = re.findall(rf"^stopped by {by}; resume with: (.*)$", errors.strip())
    how = re.sub(r"^\S+", warm_python(), how)
    environment = os.environ | BLANK_PLOTS
    done = subprocess.run(how, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Resuming after epoch \d+ of 40", done.stdout)
    assert read_csv(tmp_path / "runs/long/history.csv")["epoch"] == list(range(1, 41))
    assert visible(tmp_path / "runs/long") == FILES - {"lr_find.png", "lr_find.csv"}


@pytest.mark.slow
def test_the_fast_recipe_and_how_it_resumes(shapes, tmp_path):
    """Killed by a limit for the size of a file after its first epoch, it ends like the run that wasn't."""
    options = ("--data", shapes, "--recipe", "fast", "--epochs", 4, "--width", 4, "--batch_size", 8)
    assert command("train.py", *options, "--name", "whole", cwd=tmp_path, drawn=False).returncode == 0
    assert command("train.py", *options, "--name", "stopped", cwd=tmp_path, file_size=200_000).returncode == 2
    assert command("train.py", "--resume", "last", cwd=tmp_path, drawn=False).returncode == 0
    whole, stopped = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    for name in ("model.safetensors", "batches.csv", "report.md"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    assert json.loads((whole / "config.json").read_text())["recipe"]["annihilate"] is True
    batches, history = read_csv(whole / "batches.csv"), read_csv(whole / "history.csv")
    assert 0.48 < max(batches["lr"]) <= 0.5 and batches["lr"][-1] < 0.05  # near zero
    assert len([loss for loss in history["valid_loss"] if loss > 0]) == 1


def test_a_full_disk(shapes, tmp_path):
    """A limit for the size of a file stands for it: the first checkpoint, which has no momentum yet, is below it."""
    quick = ("--data", shapes, "--lr_max", 0.01, "--epochs", 2, "--width", 4, "--batch_size", 24, "--name", "full")
    done = command("train.py", *quick, cwd=tmp_path, file_size=200_000)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "epoch-00001.safetensors can't be written (File too large); free some disk space, then resume with: " in line
    (kept,) = (tmp_path / "runs/full/checkpoints").iterdir()
    assert kept.name == "epoch-00000.safetensors"
    done = command("train.py", "--resume", "last", cwd=tmp_path, drawn=False)
    assert done.returncode == 0 and "Resuming after epoch 0 of 2" in done.stdout
    assert visible(tmp_path / "runs/full") == FILES - {"lr_find.png", "lr_find.csv"}


def test_a_loss_that_blows_up(shapes, tmp_path):
    quick = ("--data", shapes, "--epochs", 2, "--width", 4, "--batch_size", 24)
    done = command("train.py", *quick, "--lr_max", "1e30", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.match(
        r"error: the loss became (nan|inf) in epoch 1, batch \d of 2, .*; start another run with a lower", line
    )


@pytest.mark.slow
def test_the_readmes_repl_lines(tmp_path):
    (lines,) = re.findall(r"```python\n(from fastai.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "width=16" in lines
    lines = lines.replace("width=16", "width=8")  # a third of the time
    check = (  # 0.991 and more with each of 10 seeds
        "\nassert learn.validate()[1] > 0.9, learn.validate()"
        "\nassert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum() == 360"
        "\nlearn.fit(1, 0.01, cbs=SaveModelCallback(monitor='accuracy'))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [warm_python(), "-c", lines + check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_changed_recipe_does_not_change_a_resumed_run(shapes, tmp_path):
    """Stopped after its first epoch; then recipes.py is edited, and the run still ends as it would have."""
    quick = ("--data", shapes, "--recipe", "fast", "--epochs", 2, "--width", 4, "--batch_size", 24)
    assert command("train.py", *quick, "--name", "whole", cwd=tmp_path, drawn=False).returncode == 0
    assert command("train.py", *quick, "--name", "stopped", cwd=tmp_path, file_size=200_000).returncode == 2
    code = """
import sys
from dataclasses import replace
from cifar10 import recipes
recipes.RECIPES["fast"] = replace(recipes.FAST, momentum=0.1, label_smoothing=0.5, muon_lr_scale=1.0, flip=False)
import train
train.main(resume="runs/stopped")
"""
    environment = os.environ | BLANK_PLOTS | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([warm_python(), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "batches.csv", "report.md"):
        assert (tmp_path / "runs/whole" / name).read_bytes() == (tmp_path / "runs/stopped" / name).read_bytes()


def test_a_run_that_another_process_has_finished_meanwhile(shapes, tmp_path, monkeypatch):
    """Between the start of a resume and its lock: nothing is trained, and the other's config.json stays."""
    monkeypatch.setattr(Figure, "savefig", save_blank)
    quick = dict(data=str(shapes), epochs=1, width=4, lr_max=0.01, batch_size=24, runs_dir=str(tmp_path), name="run")
    train.main(**quick)
    run = Run.open(tmp_path / "run")
    metrics = (run.path / "metrics.json").read_bytes()
    (run.path / "metrics.json").unlink()

    def finish(lock, *args, **kwargs):
        run.update(changed=True)
        (run.path / "metrics.json").write_bytes(metrics)
        return acquire(lock, *args, **kwargs)

    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", finish)
    monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("trained again"))
    train.main(resume=str(run.path))
    assert Run.open(run.path).config["changed"] is True


def test_the_lines_of_usage_md(run, shapes, tmp_path):
    """A run is used without its data set: the snippet as written, on an image of a known class."""
    (lines,) = re.findall(r"```python\n(from predict.*?)```", (ROOT / "docs/usage.md").read_text(), re.DOTALL)
    folder, _ = run
    shutil.copytree(folder, tmp_path / "results/cifar10-best")
    shutil.copy(shapes / "test/ring/0.png", tmp_path / "cat.png")
    check = "\nassert classifier.classes == ['cross', 'ring']; print(probabilities.tolist())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [warm_python(), "-c", lines + check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    dls = train.get_dls(shapes)
    learn = train.get_learner(dls, width=8, precision="fp32")
    learn.model.load_state_dict(load_file(folder / "model.safetensors"))
    probabilities = learn.predict(shapes / "test/ring/0.png")[2]  # with fastai's own normalization
    torch.testing.assert_close(
        torch.tensor(json.loads(done.stdout.splitlines()[-1])[0]), probabilities, atol=5e-3, rtol=0
    )
