"""Checkpoints restore everything, and a damaged one is never used."""

import json
import time

import pytest
import torch
from conftest import small
from fastai.vision.all import Callback, set_seed

from cifar10.errors import UserError
from cifar10.files import load_tensors, read_csv
from cifar10.options import Options
from cifar10.recipes import ASSIGNMENT
from cifar10.runs.checkpoint import SaveCheckpoint, last_checkpoint, list_checkpoints, load_state_dict, state_dict
from cifar10.runs.run import Run
from cifar10.training.callbacks import StopAtNaN
from train import get_dls


@pytest.fixture
def learn(shapes):
    set_seed(0)
    return small(get_dls(shapes, batch_size=16), clip=1.0)


@pytest.fixture
def run(tmp_path, learn) -> Run:
    return Run.create(Options(runs_dir=str(tmp_path), name="run"), ASSIGNMENT, learn)


def test_history_has_a_row_per_epoch_and_a_row_per_step(run, learn):
    learn.fit_one_cycle(2, 0.01, cbs=SaveCheckpoint(run, time.time()))
    history, batches = read_csv(run.path / "history.csv"), read_csv(run.path / "batches.csv")
    assert list(history) == [
        "epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds",
    ]  # fmt: skip
    assert (
        history["epoch"] == [1, 2] and batches["step"] == [1, 2, 3, 4, 5, 6] and batches["epoch"] == [1] * 3 + [2] * 3
    )
    assert history["train_loss"][1] == pytest.approx(sum(batches["loss"][3:]) / 3, rel=1e-5)
    assert batches["lr"] == pytest.approx([float(lr) for lr in learn.recorder.lrs])


def state(learn) -> list:
    """All that `state_dict` sees, as JSON brings it back."""
    tensors, state = state_dict(learn)
    return json.loads(json.dumps([{name: tensor.tolist() for name, tensor in tensors.items()}, state]))


def test_the_last_two_checkpoints_are_kept_and_restore_everything(run, learn, shapes):
    learn.fit_one_cycle(3, 0.01, cbs=SaveCheckpoint(run, time.time()))
    assert [file.name for file in list_checkpoints(run)] == ["epoch-00003.safetensors", "epoch-00002.safetensors"]
    before = state(learn)
    tensors, restored = last_checkpoint(run)
    set_seed(9)
    other = small(get_dls(shapes, batch_size=16), clip=1.0)
    other.create_opt()
    other.recorder.before_fit()
    load_state_dict(other, tensors, restored)
    assert state(other) == before
    strides = [
        [values["momentum_buffer"].stride() for _, _, values, _ in one.opt.all_params() if "momentum_buffer" in values]
        for one in (other, learn)
    ]
    assert strides[0] == strides[1] and strides[0]


def test_momentum_is_stored_by_the_parameters_place_in_the_model(run, shapes):
    """So are the files of older runs. What is not trained, like whitening filters, counts but has none."""
    learn = small(get_dls(shapes, batch_size=16), train_norm_scales=False)
    learn.model.prep[0].weight.requires_grad_(False)
    learn.fit(1, 0.01, cbs=SaveCheckpoint(run, time.time()))
    tensors, _ = last_checkpoint(run)
    expected = {
        f"optimizer.{index}.momentum_buffer": learn.opt.state[p]["momentum_buffer"]
        for index, p in enumerate(learn.model.parameters())
        if p.requires_grad
    }
    assert {name for name in tensors if name.startswith("optimizer.")} == expected.keys() and len(expected) == 21
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_a_training_that_is_complete_trains_no_more(run, learn, shapes):
    """Resumed after its last epoch, because only plots are missing: the weights and the history stay."""
    learn.fit_one_cycle(2, 0.01, cbs=SaveCheckpoint(run, time.time()))
    before = state(learn)
    set_seed(9)
    other = small(get_dls(shapes, batch_size=16), clip=1.0)
    other.fit_one_cycle(2, 0.01, cbs=SaveCheckpoint(run, time.time(), last_checkpoint(run)), start_epoch=2)
    after = state(other)
    assert other.train_iter == learn.train_iter == 6  # where TensorBoard goes on
    assert after[0] == before[0] and after[1]["values"] == before[1]["values"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:9000] + b"~" + b[9001:], None])
def test_damaged_checkpoints(run, learn, capsys, damage):
    learn.fit_one_cycle(2, 0.01, cbs=SaveCheckpoint(run, time.time()))
    newest, older = list_checkpoints(run)
    if damage is None:
        newest.unlink()
    else:
        newest.write_bytes(damage(newest.read_bytes()))
    _, found = last_checkpoint(Run.open(run.path))
    assert found["epochs"] == 1 and (damage is None or newest.name in capsys.readouterr().out)
    older.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        last_checkpoint(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(lr_min=0.1),
        lambda config: config.update(lr_max=0.3),
        lambda config: config["recipe"].update(momentum=0.8),
        lambda config: config["model"].update(norm="layer"),
        lambda config: config["options"].update(valid="holdout"),
        lambda config: config["options"].update(precision="bf16"),
        lambda config: config["options"].update(seed=1),
        lambda config: config["options"].pop("width"),
        lambda config: config["data"].update(mean=[0.5] * 3),
        lambda config: config["data"].update(classes=["ring", "cross"]),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(run, learn, change):
    """Whatever is edited in config.json, but for the place of the images: nothing else is trained silently."""
    learn.fit_one_cycle(1, 0.01, cbs=SaveCheckpoint(run, time.time()))
    run.config["options"]["data"] = "elsewhere"
    run.update()
    assert last_checkpoint(Run.open(run.path))
    change(run.config)
    run.update()
    with pytest.raises(UserError, match="does not belong to this run"):
        last_checkpoint(Run.open(run.path))


def test_the_scale_of_fp16_gradients_is_restored(learn):
    """fp16 is for CUDA only, but the state of its scaler is in every checkpoint."""
    learn.create_opt()
    learn.recorder.before_fit()
    learn.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    tensors, captured = state_dict(learn)
    learn.scaler = torch.amp.GradScaler("cpu")
    load_state_dict(learn, tensors, captured)
    assert learn.scaler.get_scale() == 128


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_random_state_of_a_gpu_is_restored(learn, monkeypatch, device):
    """With another module in the place of the GPU's, whose random state is the CPU's."""
    learn.create_opt()
    learn.recorder.before_fit()
    module = getattr(torch, device)
    states = [torch.tensor([1, 2], dtype=torch.uint8)]
    monkeypatch.setattr(module, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(module, "set_rng_state", states.append)
    monkeypatch.setattr(type(learn.dls), "device", property(lambda dls: torch.device(device)))
    tensors, captured = state_dict(learn)
    tensors["losses"] = torch.empty(0, device="meta")  # stays away from the device
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    load_state_dict(learn, tensors, captured)
    assert torch.equal(states[1], states[0]) and len(states) == 2


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training(run, learn, loss):
    class Spoil(Callback):
        def after_loss(self):
            if self.training and self.epoch == 1 and self.iter == 1:
                self.learn.loss_grad, self.learn.loss = self.loss_grad * loss, self.loss * loss

    with pytest.raises(UserError, match=f"became {loss} in epoch 2, batch 2 of 3, at a learning rate of 0.0") as told:
        learn.fit_one_cycle(3, 0.01, cbs=[StopAtNaN(), Spoil(), SaveCheckpoint(run, time.time())])
    assert "lower --lr_max" in str(told.value)
    tensors, kept = load_tensors(list_checkpoints(run)[0])
    assert kept["epochs"] == 1 and all(tensor.isfinite().all() for tensor in tensors.values())
