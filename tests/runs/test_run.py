"""A run's folder: created, opened, locked, and self-sufficient."""

import errno
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from cifar10.errors import Stopped, UserError
from cifar10.files import load_tensors
from cifar10.options import Options
from cifar10.recipes import ASSIGNMENT, RECIPES
from cifar10.runs import run as run_module
from cifar10.runs.run import FORMAT, Run, collect_env
from model import ResNet
from train import get_learner


@pytest.fixture
def learn(dls):
    return get_learner(dls, width=4, precision="fp32")


def create(learn, runs_dir: Path, name: str | None = None) -> Run:
    return Run.create(Options(runs_dir=str(runs_dir), name=name), ASSIGNMENT, learn)


def test_names(tmp_path, learn):
    first, second = (create(learn, tmp_path / "runs") for _ in range(2))
    assert re.match(r"\d{8}-\d{6}-shapes-assignment", first.path.name)
    assert first.path.is_dir() and second.path.is_dir() and first.path != second.path
    assert create(learn, tmp_path, "mine").path == tmp_path / "mine"


def test_places_where_no_run_can_be(tmp_path, learn):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --runs_dir"):
        create(learn, tmp_path / "file")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        create(learn, tmp_path, "taken")


def test_a_run_describes_all_that_its_model_needs(tmp_path, learn, dls):
    """The weights alone rebuild the model, without any data set."""
    run = create(learn, tmp_path, "run")
    run.save_weights(learn.model)
    again = Run.open(tmp_path / "run")
    assert again.recipe == ASSIGNMENT and again.model_args == learn.model.args and again.classes == list(dls.vocab)
    assert again.options == replace(run.options, data=str(dls.train.table.folder), device="cpu", precision="fp32")
    mean, std = dls.train.table.stats(dls.train.rows)
    tensors, about = load_tensors(tmp_path / "run/model.safetensors")
    model = ResNet(**about["model"])
    model.load_state_dict(tensors)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), learn.model.eval()(x))
    assert set(tensors) == set(model.state_dict()) and about["format"] == FORMAT and about["model"] == again.model_args
    data = dict(name="shapes", classes=again.classes, size=again.size, resize="crop", ranges={})
    data |= dict(mean=pytest.approx(mean), std=pytest.approx(std))
    assert about["data"] == data and again.size == 32 and about["recipe"] == json.loads(json.dumps(asdict(ASSIGNMENT)))


def test_a_changed_recipe_does_not_change_a_run(tmp_path, learn, monkeypatch):
    create(learn, tmp_path, "run")
    monkeypatch.setitem(RECIPES, "assignment", replace(ASSIGNMENT, epochs=9, label_smoothing=0.5))
    assert Run.open(tmp_path / "run").recipe == ASSIGNMENT != RECIPES["assignment"]


@pytest.mark.parametrize("found", [1, FORMAT + 1])
def test_another_format_is_refused(tmp_path, learn, found):
    run = create(learn, tmp_path, "run")
    if found == 1:  # before there were formats
        del run.config["format"]
        run.update()
    else:
        run.update(format=found)
    with pytest.raises(UserError, match=f"run has format {found}, not {FORMAT}"):
        Run.open(tmp_path / "run")


def test_a_path_below_home_is_shown_with_a_tilde(tmp_path, learn, dls, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: dls.train.table.folder.parent)
    assert create(learn, tmp_path, "run").options.data == "~/shapes"


def test_collect_env_names_versions_hardware_and_commit():
    found = collect_env()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}( with changes)?", found["commit"])
    json.dumps(found)


# ---- Lock


def test_one_process_at_a_time(tmp_path, learn):
    run = create(learn, tmp_path, "run")
    with run.lock(), pytest.raises(UserError, match="is locked by another process"), Run.open(run.path).lock():
        pytest.fail("locked twice")
    with run.lock():
        pass


def test_a_file_system_without_locks(tmp_path, learn, monkeypatch):
    run = create(learn, tmp_path, "run")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(run_module.FileLock, "acquire", fail)
    error = OSError(errno.ENOLCK, "No locks available")
    with run.lock():
        pass
    error = PermissionError(errno.EACCES, "Permission denied")  # the lock of another user
    with pytest.raises(PermissionError), run.lock():
        pytest.fail("locked")


@pytest.mark.parametrize(
    ("interrupt", "by"),
    [(KeyboardInterrupt(), "Ctrl-C"), (Stopped("SIGTERM"), "SIGTERM"), (BrokenPipeError(), "a closed pipe")],
)
def test_an_interruption_names_the_command_to_resume_with(tmp_path, learn, interrupt, by):
    run = create(learn, tmp_path, "run")
    with pytest.raises(Stopped) as stopped, run.lock():
        raise interrupt
    assert stopped.value.by == by and f" --resume {run.path}" in stopped.value.hint


def test_several_processes_resume_on_the_device_of_the_run(tmp_path, learn, monkeypatch):
    run = create(learn, tmp_path, "run")
    monkeypatch.setattr(run_module, "is_distributed", lambda: True)
    assert not run.resume_command().endswith("--device cpu")
    monkeypatch.setattr(run_module, "default_device", lambda: torch.device("mps"))
    assert run.resume_command().endswith(f"--resume {run.path} --device cpu")


def test_the_committed_run_is_complete():
    files = {file.name for file in (ROOT / "results/cifar10-assignment").iterdir()}
    assert files >= {
        "README.md", "config.json", "summary.txt", "history.csv", "batches.csv", "lr_find.csv", "lr_find.png",
        "metrics.json", "misclassified.png", "gradcam.png", "curves.png", "confusion_matrix.png", "report.md",
    }  # fmt: skip
