import json
import os
import re
import time

import pytest
import torch
from conftest import ROOT
from fastai.vision.all import Callback, set_seed

from data import get_dls
from errors import Terminated, UserError
from files import load_tensors, write
from learner import StopAtNaN, get_learner
from runs import RunLog, capture, checkpoints, held_run, last_checkpoint, new_run, read_csv, restore, surroundings


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


# ---- Logs and checkpoints


@pytest.fixture
def learn(shapes):
    set_seed(0)
    return get_learner(get_dls(shapes, bs=16), width=4, clip=1.0)


def test_log_has_a_row_an_epoch_and_a_row_a_step(tmp_path, learn):
    learn.fit_one_cycle(2, 0.01, cbs=RunLog(tmp_path, time.time(), {}))
    history, batches = read_csv(tmp_path / "history.csv"), read_csv(tmp_path / "batches.csv")
    assert list(history) == [
        "epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds",
    ]  # fmt: skip
    assert (
        history["epoch"] == [1, 2] and batches["step"] == [1, 2, 3, 4, 5, 6] and batches["epoch"] == [1] * 3 + [2] * 3
    )
    assert history["train_loss"][1] == pytest.approx(sum(batches["loss"][3:]) / 3, rel=1e-5)
    assert batches["lr"] == pytest.approx([float(lr) for lr in learn.recorder.lrs])


def state(learn) -> list:
    """All that `capture` sees, as JSON brings it back."""
    tensors, state = capture(learn)
    return json.loads(json.dumps([{name: tensor.tolist() for name, tensor in tensors.items()}, state]))


def test_the_last_two_checkpoints_are_kept_and_restore_everything(tmp_path, learn, shapes):
    learn.fit_one_cycle(3, 0.01, cbs=RunLog(tmp_path, time.time(), {"options": {"data": ""}}))
    after = state(learn)
    assert [file.name for file in checkpoints(tmp_path)] == ["epoch-00003.safetensors", "epoch-00002.safetensors"]
    other = get_learner(get_dls(shapes, bs=16), width=4)
    other.fit_one_cycle(1, 0.1)
    assert state(other) != after
    restore(other, *last_checkpoint(tmp_path, {"data": ""}))
    assert state(other) == after
    strides = [
        {index: values["momentum_buffer"].stride() for index, values in one.opt.state_dict()["state"].items()}
        for one in (other, learn)
    ]
    assert strides[0] == strides[1]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:9000] + b"~" + b[9001:], None])
def test_damaged_checkpoints(tmp_path, learn, capsys, damage):
    learn.fit_one_cycle(2, 0.01, cbs=RunLog(tmp_path, time.time(), {"options": {"data": ""}}))
    newest, older = checkpoints(tmp_path)
    if damage is None:
        newest.unlink()
    else:
        newest.write_bytes(damage(newest.read_bytes()))
    _, found = last_checkpoint(tmp_path, {"data": ""})
    assert found["epochs"] == 1 and (damage is None or newest.name in capsys.readouterr().out)
    older.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        last_checkpoint(tmp_path, {"data": ""})


def test_scaled_gradients_go_on_as_they_were(learn, tmp_path):
    """fp16 is for CUDA only, but the state of its scaler is in every checkpoint."""
    learn.create_opt()
    learn.recorder.before_fit()
    learn.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    tensors, captured = capture(learn)
    learn.scaler = torch.amp.GradScaler("cpu")
    restore(learn, tensors, captured)
    assert learn.scaler.get_scale() == 128
    del learn.scaler
    restore(learn, tensors, captured)  # of a run that was trained to its end, whose pictures are missing
    assert not hasattr(learn, "scaler")


def test_one_process_holds_a_run(tmp_path):
    with held_run(tmp_path), pytest.raises(UserError, match="being trained by another process"), held_run(tmp_path):
        pytest.fail("held twice")
    with held_run(tmp_path):
        pass


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Terminated])
def test_a_stop_names_the_command_to_go_on_with(tmp_path, interrupt):
    with pytest.raises(interrupt, match=f"to go on: .* --resume {tmp_path}"), held_run(tmp_path):
        raise interrupt


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training(tmp_path, learn, loss):
    class Spoil(Callback):
        def after_loss(self):
            if self.training and self.epoch == 1 and self.iter == 1:
                self.learn.loss_grad, self.learn.loss = self.loss_grad * loss, self.loss * loss

    with pytest.raises(UserError, match=f"became {loss} in epoch 2, batch 2 of 3, at a learning rate of 0.0") as told:
        learn.fit_one_cycle(3, 0.01, cbs=[StopAtNaN(), Spoil(), RunLog(tmp_path, time.time(), {})])
    assert "lower --lr_max" in str(told.value)
    tensors, kept = load_tensors(checkpoints(tmp_path)[0])
    assert kept["epochs"] == 1 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_committed_run_is_complete():
    files = {file.name for file in (ROOT / "results/cifar10-assignment").iterdir()}
    assert files >= {
        "README.md", "config.json", "summary.txt", "history.csv", "batches.csv", "lr_find.csv", "lr_find.png",
        "metrics.json", "misclassified.png", "gradcam.png", "curves.png", "confusion_matrix.png", "report.md",
    }  # fmt: skip
