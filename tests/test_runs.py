import json
import os
import pickle
import re

import pytest
import torch
from conftest import ROOT
from fastai.vision.all import set_seed

from data import get_dls
from errors import UserError
from learner import get_learner
from model import ResNet
from runs import RunLog, load_run, new_run, read_config, read_csv, save_weights, surroundings, write, write_json


def test_names(tmp_path):
    first, second = (new_run(tmp_path / "runs", None, "digits", "assignment") for _ in range(2))
    assert re.fullmatch(r"\d{8}-\d{6}-digits-assignment", first.name)
    assert first.is_dir() and second.is_dir() and first != second
    assert new_run(tmp_path, "mine", "digits", "assignment") == tmp_path / "mine"


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "/tmp/x"])
def test_names_that_are_no_folder_names(tmp_path, name):
    with pytest.raises(UserError, match="plain folder name"):
        new_run(tmp_path, name, "digits", "assignment")
    assert list(tmp_path.iterdir()) == []


def test_places_where_no_run_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --runs_dir"):
        new_run(tmp_path / "file", None, "digits", "assignment")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        new_run(tmp_path, "taken", "digits", "assignment")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_surroundings_name_versions_hardware_and_commit():
    found = surroundings()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}( with changes)?", found["commit"])
    json.dumps(found)


@pytest.fixture
def run(tmp_path, shapes):
    """A finished run without pictures."""
    set_seed(0)
    learn = get_learner(get_dls(shapes, bs=16))
    save_weights(learn.model, tmp_path / "model.safetensors")
    data = {"sha256": learn.dls.train.table.hash}
    write_json(tmp_path / "config.json", {"options": {"norm": "batch", "precision": "fp32"}, "data": data})
    return tmp_path, learn


def test_weights_come_back(run, shapes):
    folder, learn = run
    again = load_run(folder, get_dls(shapes, bs=16))
    for name, value in learn.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_weights_are_never_unpickled(run, shapes, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    folder, _ = run
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_run(folder, get_dls(shapes, bs=16))
    assert not (tmp_path / "sprung").exists()


def test_weights_of_another_net(run, shapes):
    folder, _ = run
    save_weights(ResNet(width=8), folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_run(folder, get_dls(shapes, bs=16))


def test_other_images_than_the_runs(run, digits):
    with pytest.raises(UserError, match="have changed"):
        load_run(run[0], digits)


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(tmp_path)


def test_log_has_a_row_an_epoch_and_a_row_a_step(tmp_path, shapes):
    learn = get_learner(get_dls(shapes, bs=16), width=4)
    learn.fit_one_cycle(2, 0.01, cbs=RunLog(tmp_path))
    history, batches = read_csv(tmp_path / "history.csv"), read_csv(tmp_path / "batches.csv")
    assert list(history) == [
        "epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds",
    ]  # fmt: skip
    assert (
        history["epoch"] == [1, 2] and batches["step"] == [1, 2, 3, 4, 5, 6] and batches["epoch"] == [1] * 3 + [2] * 3
    )
    assert history["train_loss"][1] == pytest.approx(sum(batches["loss"][3:]) / 3, rel=1e-5)
    assert batches["lr"] == pytest.approx([float(lr) for lr in learn.recorder.lrs])


def test_the_committed_run_is_complete():
    files = {file.name for file in (ROOT / "results/cifar10-3-epochs").iterdir()}
    assert files >= {
        "README.md", "config.json", "summary.txt", "history.csv", "batches.csv", "lr_find.csv", "lr_find.png",
        "metrics.json", "misclassified.png", "gradcam.png", "curves.png", "confusion_matrix.png", "report.md",
    }  # fmt: skip
