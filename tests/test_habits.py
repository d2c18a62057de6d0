"""What fastai users do with a Learner and DataLoaders works on ours, and gives the same as on fastai's own."""

import copy
import pickle
import re
import shutil
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small
from fastai.callback.all import (
    ActivationStats,
    BnFreeze,
    CSVLogger,
    CutMix,
    EarlyStoppingCallback,
    FetchPredsCallback,
    GradientAccumulation,
    GradientClip,
    MixUp,
    ReduceLROnPlateau,
    SaveModelCallback,
    ShortEpochCallback,
    ShowGraphCallback,
    TerminateOnNaNCallback,
    minimum,
    slide,
    steep,
    valley,
)
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import (
    SGD,
    Adam,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CategoryBlock,
    ClassificationInterpretation,
    CrossEntropyLossFlat,
    DataBlock,
    F1Score,
    GrandparentSplitter,
    ImageBlock,
    LabelSmoothingCrossEntropyFlat,
    Lamb,
    Learner,
    OptimWrapper,
    PILImage,
    Precision,
    Resize,
    RMSProp,
    Transform,
    accuracy,
    error_rate,
    get_image_files,
    load_learner,
    noop,
    parent_label,
    ranger,
    set_seed,
)
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cifar10.errors import UserError
from cifar10.interpretation.gradcam import grad_cam
from cifar10.interpretation.predictions import Interpretation
from cifar10.training.strips import StripConv2d, Strips
from cifar10.training.tricks import count_flop
from model import ResNet, split_by_depth
from train import get_dls, get_learner


@pytest.fixture
def learners(shapes, tmp_path):
    """Ours, and fastai's own Learner and DataLoaders with the same weights and images."""
    set_seed(0)
    ours = small(get_dls(shapes, batch_size=16), path=tmp_path, label_smoothing=0.0)
    set_seed(0)
    block = DataBlock(
        (ImageBlock, CategoryBlock), get_items=lambda path: sorted(get_image_files(path)), get_y=parent_label,
        splitter=GrandparentSplitter("train", "test"), batch_tfms=[ours.dls.train.after_batch.normalize],
    )  # fmt: skip
    theirs = Learner(
        block.dataloaders(shapes, bs=16, num_workers=0), ResNet(2, width=4), loss_func=CrossEntropyLossFlat(),
        metrics=accuracy, splitter=split_by_depth, path=tmp_path,
    )  # fmt: skip
    theirs.model.load_state_dict(ours.model.state_dict())
    return ours, theirs


def floats(numbers) -> list[float]:
    return [float(number) for number in numbers]


def trained(learn, *, cbs=None, epochs=1, lr=0.01, **options) -> list[int]:
    """Train, and return how many rows, steps and columns of fastai's were recorded."""
    learn.fit(epochs, lr, cbs=cbs, **options)
    recorder = learn.recorder
    rows = [len(row) for row in recorder.values]
    return [rows, len(recorder.losses), recorder.iters, floats(recorder.lrs), list(recorder.metric_names)]


def assert_same(ours, theirs):
    """Equal, but for the last digits of numbers, which depend on the processor and on the layout of the weights."""
    if isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=1e-4, nan_ok=True)
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same(one, other)
    else:
        assert str(ours) == str(theirs)


# ---- Nothing is left behind


class Fails(Callback):
    """Raises an exception in the third step, in the middle of the forward pass and loss."""

    def __init__(self, reason):
        self.reason = reason

    def fail(self):
        if self.training and self.iter == 2:
            raise self.reason


@pytest.mark.parametrize("event", ["after_pred", "after_backward", "before_fit"])
@pytest.mark.parametrize("reason", [ValueError("of the user"), KeyboardInterrupt(), CancelBatchException()])
def test_an_exception_does_not_change_the_next_fit(shapes, reason, event):
    """In bfloat16, and by a recipe that freezes layers."""
    learn = small(get_dls(shapes, batch_size=16), precision="bf16", freeze=(("prep", 0.0), ("layer1", 0.0)))
    trained = [p.requires_grad for p in learn.model.parameters()]
    learn.add_cb(Strips())
    fails = Fails(reason)
    fails.order, fails.iter = 100, 2  # after all others
    setattr(fails, event, fails.fail)
    with suppress(ValueError, KeyboardInterrupt, CancelBatchException):
        learn.fit(1, 0.01, cbs=fails)
    assert event == "after_backward" or [p.grad for p in learn.model.parameters() if p.grad is not None] == []
    assert not torch.is_autocast_enabled("cpu") and learn.model(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert [p.requires_grad for p in learn.model.parameters()] == trained
    assert not [module for module in learn.model.modules() if type(module) is StripConv2d]
    learn.freeze()
    with learn.no_bar():
        learn.fit(1, 0.01)
    assert not learn.model.prep[0].bias.requires_grad  # as the user said


def test_a_copy_trains_on(shapes):
    learn = small(get_dls(shapes, batch_size=16), norm_bias_lr_scale=8)
    learn.fit(1, 0.01)
    state = [copy.deepcopy(part.state_dict()) for part in (learn.model, learn.opt)]
    ways, losses = (lambda learn: learn, copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))), []
    for way in ways:
        other = way(learn)
        for part, values in zip((other.model, other.opt), state):
            part.load_state_dict(copy.deepcopy(values))
        set_seed(1)
        other.dls.train.rng.seed(1)
        other.fit(1, 0.01)
        losses.append(torch.stack(other.recorder.step_losses).tolist())
    assert losses[0] == losses[1] == losses[2]


def test_functions_are_batch_transforms(shapes):
    dls = get_dls(shapes, batch_size=16)
    before = dls.valid.one_batch()[0]
    dls.add_tfms([Transform(lambda x: x * 2 if x.ndim == 4 else x, order=200)], "after_batch", 1)
    assert torch.equal(dls.valid.one_batch()[0], before * 2)


class Pair(nn.Module):
    """A model of the user's own, with two outputs."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.utils.weight_norm(nn.Linear(3 * 32 * 32, 2))

    def forward(self, x):
        return self.fc(x.flatten(1)), x


def test_operations_are_counted_without_running_the_model(shapes, tmp_path):
    learn = small(get_dls(shapes, batch_size=16), path=tmp_path)
    seen = []
    learn.model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    learn.fit(1, 0.01, cbs=[ActivationStats(), CSVLogger()])
    assert {*seen} == {16} and learn.recorder.flop > 0
    learn.model, learn.loss_func, learn.metrics = Pair(), lambda pair, y: F.cross_entropy(pair[0], y), []
    learn.opt_func = Adam
    learn.create_opt()
    learn.fit(1, 0.01)
    assert learn.recorder.flop == 0
    learn.remove_cbs([learn.progress, learn.recorder])
    learn.fit(1, 0.01)
    changed = ResNet(2, width=4)
    changed.layer3 = nn.Sequential(nn.Conv2d(16, 32, 1), nn.MaxPool2d(2))
    for model in (changed, torch.compile(ResNet(2, width=4), backend="eager")):
        assert count_flop(model, (3, 32, 32)) == 0


def test_a_fit_without_a_learning_rate_learns(shapes):
    set_seed(0)
    learn = small(get_dls(shapes, batch_size=8), width=8)
    learn.fit_one_cycle(4)
    assert (
        learn.opt.hypers[0]["lr"] < 0.1 == max(map(float, learn.recorder.lrs)) and learn.recorder.values[-1][-1] > 0.9
    )
    adam = get_learner(get_dls(shapes, batch_size=8), opt_func=Adam, width=2)
    adam.fit(1)
    assert adam.recorder.lrs[0] == 1e-3


def test_only_the_training_images_are_weighted(shapes):
    dls = get_dls(shapes, batch_size=8, weighted=True)
    assert len({*dls.train.get_idxs()}) < 48 and len({*dls.valid.new(shuffle=True).get_idxs()}) == 16
    assert len(dls.test_dl(dls.valid_ds.items[:9], shuffle=True).one_batch()[0]) == 8


def test_another_precision_replaces_the_one_before(shapes):
    learn = small(get_dls(shapes, batch_size=16), precision="bf16")
    ours = learn.mixed_precision
    assert learn.to_fp16() is learn and [cb for cb in learn.cbs if isinstance(cb, MixedPrecision)] == [
        ours
    ]  # on a CPU there is no other
    learn.dls = SimpleNamespace(device=torch.device("cuda"))
    learn.to_fp16()
    assert [str(cb.amp_mode) for cb in [cb for cb in learn.cbs if isinstance(cb, MixedPrecision)]] == ["AMPMode.FP16"]


def test_no_bar_is_for_once(dls, capsys):
    learn = small(dls)
    progress = learn.progress
    with learn.no_bar():
        assert not hasattr(learn, "progress")
        learn.fit(1, 0.01)
    assert learn.progress is progress


class Cancel(Callback):
    """Cancels at the second step."""

    run_valid = False

    def __init__(self, error):
        self.error = error

    def after_batch(self):
        if self.iter == 1:
            raise self.error


class Change(Callback):
    """Runs a function at an event of each training batch."""

    run_valid = False

    def __init__(self, event, function):
        setattr(self, event, lambda: function(self))


def skip(cb):
    if cb.iter == 0:
        raise CancelBatchException


def soft_labels(cb):
    cb.learn.yb = (F.one_hot(cb.y.as_subclass(torch.Tensor), 2).float(),)


def with_soft_labels(learn):
    learn.loss_func = nn.CrossEntropyLoss()
    learn.metrics = []
    return trained(learn, cbs=Change("before_batch", soft_labels))


def two_outputs(cb):
    cb.learn.pred = cb.pred.chunk(1)


def with_two_outputs(learn):
    learn.loss_func = lambda pred, y: F.cross_entropy(pred[0] if isinstance(pred, tuple) else pred, y)
    return trained(learn, cbs=Change("after_pred", two_outputs))


def halve(cb):
    if cb.iter == 0:
        for hyper in cb.opt.hypers:
            hyper["lr"] *= 0.5


def train_metrics(learn):
    learn.recorder.train_metrics = True
    return trained(learn, cbs=SaveModelCallback(monitor="valid_loss")), learn.recorder.values[0][2] > 0.6


def adding_a_column(learn):
    class Add(Callback):
        order = 55

        def before_fit(self):
            self.recorder.metric_names.insert(-1, "more")

        def after_validate(self):
            self.recorder.log.append(7.0 + len(self.recorder.log))

    return [trained(learn, cbs=Add()), learn.recorder.values[0][-1], learn.recorder.log[0]]


def other_files(learn):
    """Labelled files that are not among those of the DataLoaders, by an exported Learner, too."""
    for label in ("cross", "ring"):
        shutil.copytree(
            learn.dls.valid_ds.items[0].parents[1] / label, learn.path / "other" / label, dirs_exist_ok=True
        )
    files = sorted(get_image_files(learn.path / "other"))
    learn.export("exported.pkl")
    again = load_learner(learn.path / "exported.pkl")
    return [floats(each.validate(dl=each.dls.test_dl(files, with_labels=True))) for each in (learn, again)]


def pickling(learn):
    dls = pickle.loads(pickle.dumps(learn.dls))
    return [len(dls.train), [int(y) for _, y in dls.valid_ds], floats(learn.get_preds(dl=dls.valid)[0].flatten())]


def other_indices(learn):
    learn.dls.train.get_idxs = lambda: list(range(48)) * 2
    shapes = [len(x) for x, _ in learn.dls.train]
    learn.dls.train.get_idxs = lambda: [3, 4]
    subset = learn.dls.valid.new(torch.utils.data.Subset(learn.dls.valid_ds, range(5)))
    return shapes, len(list(learn.dls.train)), [(x.shape, y.tolist()) for x, y in subset]


def own_model(learn):
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    learn.splitter = split_by_depth
    return trained(learn), len(learn.opt.all_params())


def freezing(learn):
    learn.freeze()
    free = [name for name, p in learn.model.named_parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    learn.fit(1, 0.01)
    changed = [name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])]
    learn.unfreeze()
    return free, changed, all(p.requires_grad for p in learn.model.parameters())


def saving(learn):
    learn.fit(1, 0.01)
    learn.save("weights")
    before = learn.get_preds()[0]
    learn.fit(1, 0.1)
    learn.load("weights")
    torch.testing.assert_close(learn.get_preds()[0], before)
    return trained(learn)


def saving_the_best(learn):
    learn.fit_one_cycle(3, 0.02, cbs=SaveModelCallback(monitor="accuracy"))
    best = max(row[learn.recorder.metric_names.index("accuracy") - 1] for row in learn.recorder.values)
    return learn.validate()[1] == best


def exporting(learn):
    learn.export("exported.pkl")
    again, file = load_learner(learn.path / "exported.pkl"), learn.dls.valid_ds.items[0]
    torch.testing.assert_close(again.predict(file)[2], learn.predict(file)[2])
    return again.get_preds(dl=again.dls.test_dl([file] * 3))[0].shape


def logging(learn):
    learn.fit(2, 0.01, cbs=CSVLogger())
    log = pd.read_csv(learn.path / "history.csv")
    return list(log.columns), log["epoch"].tolist(), all(log["valid_loss"] > 0)


def interpreting(learn):
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_confusion_matrix()
    interp.plot_top_losses(4)
    interp.print_classification_report()
    interp.show_results([0, 1])
    of_train = ClassificationInterpretation.from_learner(learn, ds_idx=0)
    return interp.confusion_matrix(), of_train.confusion_matrix().sum(), floats(interp.top_losses(3)[0])


def predicting(learn):
    file = learn.dls.valid_ds.items[0]
    items = (file, str(file), PILImage.create(file), np.array(Image.open(file)))
    return [(label, int(number), floats(each)) for label, number, each in map(learn.predict, items)]


def other_losses(learn):
    losses = (LabelSmoothingCrossEntropyFlat(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])), F.cross_entropy)
    for learn.loss_func in losses:
        learn.fit(1, 0.01)
    return trained(learn)


def other_metrics(learn):
    learn.metrics = [accuracy, error_rate, F1Score(), Precision(average="macro")]
    learn.fit(1, 0.01)
    return list(learn.recorder.metric_names), len(learn.validate())


def optimizer(opt_func, **options):
    def train_with(learn):
        learn.opt_func = opt_func
        return trained(learn, **options), [hyper["lr"] for hyper in learn.opt.hypers]

    return train_with


def finding_learning_rates(learn):
    found = learn.lr_find(suggest_funcs=(minimum, steep, valley, slide))
    return found._fields, [name for name, p in learn.model.named_parameters() if not p.isfinite().all()]


def plotting(learn):
    learn.fit_one_cycle(2, 0.05)
    learn.recorder.plot_loss()
    learn.recorder.plot_sched()
    learn.fit(1, 0.01, cbs=ActivationStats(with_hist=True))
    return [loss.device.type for loss in learn.recorder.losses]


def quiet(learn):
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    return hasattr(learn, "progress")


def loaders(learn):
    dls = learn.dls
    assert dls.to("cpu").device == "cpu"
    dls.show_batch()
    dls.valid.show_batch(max_n=2)
    return [
        dls.c, list(dls.vocab), dls.bs, dls.valid.bs, dls.n, dls.train.n, len(dls.train), len(dls.valid),
        len(dls.train_ds), type(dls.train_ds[0][0]), type(dls.train_ds[0][1]), len(dls.train.new(bs=4)),
        [x.shape for x, _ in dls.train], [x.shape for x, _ in dls.valid], type(dls.one_batch()[0]),
        len(dls.decode_batch(dls.one_batch(), max_n=3)),
        learn.get_preds(dl=dls.test_dl(dls.valid_ds.items, with_labels=True))[1].tolist(), trained(learn),
    ]  # fmt: skip


HABITS = {
    "validate": lambda learn: [floats(learn.validate()), len(learn.validate(ds_idx=0))],
    "validate after training": lambda learn: [trained(learn), len(learn.validate()), len(learn.final_record)],
    "freeze": freezing,
    "fine_tune": lambda learn: [learn.fine_tune(2, 0.01), len(learn.recorder.values)],
    "slice": lambda learn: [trained(learn, lr=slice(1e-4, 1e-2)), floats(h["lr"] for h in learn.opt.hypers)],
    "one cycle with a slice": lambda learn: [learn.fit_one_cycle(1, slice(1e-3, 1e-1)), len(learn.opt.hypers)],
    "wd": lambda learn: [trained(learn, wd=0.3), [hyper["wd"] for hyper in learn.opt.hypers]],
    "flat cosine": lambda learn: learn.fit_flat_cos(2, 0.01),
    "restarts": lambda learn: [learn.fit_sgdr(2, 1, 0.01), len(learn.recorder.values)],
    "save the best": saving_the_best,
    "save each": lambda learn: trained(learn, epochs=2, cbs=SaveModelCallback(every_epoch=True)),
    "early stopping": lambda learn: trained(learn, epochs=9, cbs=EarlyStoppingCallback("accuracy", min_delta=1.0)),
    "plateau": lambda learn: trained(learn, epochs=4, cbs=ReduceLROnPlateau("valid_loss", min_delta=9, patience=1)),
    "assign to hypers": lambda learn: trained(learn, cbs=Change("after_batch", halve)),
    "skip a batch": lambda learn: trained(learn, cbs=Change("before_batch", skip)),
    "soft labels": with_soft_labels,
    "two outputs": with_two_outputs,
    "train metrics": train_metrics,
    "another column": adding_a_column,
    "other files": other_files,
    "pickle": pickling,
    "other indices": other_indices,
    "own model": own_model,
    "csv": logging,
    "graph": lambda learn: trained(learn, epochs=2, cbs=ShowGraphCallback()),
    "accumulation": lambda learn: trained(learn, cbs=GradientAccumulation(32)),
    "mixup": lambda learn: trained(learn, cbs=MixUp()),
    "cutmix": lambda learn: trained(learn, cbs=CutMix()),
    "clip": lambda learn: trained(learn, cbs=[GradientClip(1.0), TerminateOnNaNCallback(), BnFreeze()]),
    "short epoch": lambda learn: trained(learn, epochs=2, cbs=ShortEpochCallback(0.5))[1:],
    "fetch": lambda learn: trained(learn, cbs=FetchPredsCallback()),
    "cancel a batch's epoch": lambda learn: trained(learn, epochs=2, cbs=Cancel(CancelEpochException)),
    "cancel training": lambda learn: trained(learn, epochs=2, cbs=Cancel(CancelTrainException))[1:],
    "cancel the fit": lambda learn: trained(learn, epochs=2, cbs=Cancel(CancelFitException)),
    "Adam": optimizer(Adam),
    "ranger": optimizer(ranger),
    "Lamb": optimizer(Lamb, wd=0.1),
    "RMSProp": optimizer(RMSProp),
    "SGD": optimizer(SGD, lr=slice(1e-3, 1e-2)),
    "AdamW": optimizer(partial(OptimWrapper, opt=torch.optim.AdamW), wd=0.1),
    "lr_find": finding_learning_rates,
    "plots": plotting,
    "show_results": lambda learn: learn.show_results(),
    "tta": lambda learn: [tensor.shape for tensor in learn.tta(n=2)],
    "save and load": saving,
    "export": exporting,
    "interpret": interpreting,
    "predict": predicting,
    "losses": other_losses,
    "metrics": other_metrics,
    "get_preds": lambda learn: [
        len(out) for out in learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    ],
    "get_preds of train": lambda learn: learn.get_preds(ds_idx=0)[0].shape,
    "quiet": quiet,
    "fp16 and back": lambda learn: trained(learn.to_fp16().to_fp32()),
    "summary": lambda learn: learn.summary().splitlines()[3:20],
    "show_training_loop": lambda learn: learn.show_training_loop(),
    "loaders": loaders,
    "copy": lambda learn: [trained(copy.deepcopy(learn)), len(pickle.dumps(learn.model)) > 0],
    "the model alone": lambda learn: learn.model.eval()(learn.dls.valid.one_batch()[0]).shape,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("habit", HABITS)
def test_habit(learners, habit):
    ours, theirs = (HABITS[habit](learn) for learn in learners)
    plt.close("all")
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda dls: dls.add_tfms([Resize(64)], "after_item"), "Resize"),
        (lambda dls: setattr(dls.train, "before_batch", print), "print"),
    ],
)
def test_transforms_that_would_be_left_out(dls, change, says):
    change(dls)
    with pytest.raises(UserError, match=f"(?s){says}.* is for single images"):
        dls.one_batch()


def test_fastais_names_of_arguments(shapes, tmp_path):
    dls = get_dls(shapes, bs=8)
    learn = get_learner(dls, width=2, metrics=[error_rate], opt_func=Adam, cbs=GradientClip(), path=tmp_path)
    assert dls.bs == 8 and learn.path == tmp_path and hasattr(learn, "gradient_clip") and hasattr(learn, "recorder")
    learn.fit(1, 0.01)
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "error_rate", "time"]
    assert not hasattr(learn.opt, "opt")  # fastai's Adam


def test_a_learner_in_bf16_is_one_in_fp32_after_loading(dls, tmp_path):
    learn = small(dls, precision="bf16", path=tmp_path)
    learn.export("exported.pkl")
    assert not hasattr(load_learner(tmp_path / "exported.pkl"), "mixed_precision")


def test_the_table_shows_more_than_the_recorder_keeps(dls, capsys):
    learn = get_learner(dls, width=2, precision="fp32")
    learn.fit(2, 0.25)
    said = capsys.readouterr().out
    assert re.search(r"epoch +train_loss +valid_loss +accuracy +train_accuracy +lr +time", said)
    assert re.search(r"2 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +0\.250000 +00:", said)
    assert [len(row) for row in learn.recorder.values] == [3, 3] and learn.recorder.extra[1][1] == 0.25


def test_groups_by_depth(dls):
    """Prep, layers, head: each parameter once."""
    learn = get_learner(dls, width=2, precision="fp32")
    learn.create_opt()
    names = {id(p): name.split(".")[0] for name, p in learn.model.named_parameters()}
    groups = [{names.pop(id(p)) for p in group} for group in learn.opt.param_lists]
    assert groups == [{"prep"}, {"layer1", "layer2", "layer3"}, {"fc"}] and not names


@pytest.mark.slow
def test_fine_tune_learns(digits):
    """Frozen for an epoch, then with learning rates that rise with depth."""
    set_seed(0)
    learn = get_learner(digits, width=16, precision="fp32")
    learn.fine_tune(4, 0.3)
    assert learn.recorder.values[-1][2] > 0.7  # 0.88 to 0.96 with 12 seeds


def test_grad_cam_of_fastais_tensors_and_of_a_frozen_model(dls):
    learn = get_learner(dls, width=4, precision="fp32")
    x, y = dls.valid.one_batch()
    (heat,) = grad_cam(learn.model, x, y, [learn.model.layer3])
    plain = grad_cam(learn.model, torch.Tensor(x), torch.as_tensor(y).as_subclass(torch.Tensor), [learn.model.layer3])
    assert heat.shape == (16, 32, 32) and torch.equal(heat, plain[0]) and heat.max() > 0
    for p in learn.model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(grad_cam(learn.model, x, y, [learn.model.layer3])[0], heat)
    assert not any(p.requires_grad for p in learn.model.parameters()) and not x.requires_grad


def test_our_interpretation_from_a_learner(dls):
    learn = get_learner(dls, width=4, precision="fp32")
    interp = Interpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == 16 and interp.accuracy == pytest.approx(learn.validate()[1])
    assert Interpretation.from_learner(learn, ds_idx=0).confusion_matrix().sum() == 48
    some = dls.test_dl(dls.valid_ds.items[:5], with_labels=True)
    assert Interpretation.from_learner(learn, dl=some).confusion_matrix().sum() == 5
    interp.plot_top_losses(4)
    interp.print_classification_report()
    assert interp.vocab.o2i == dls.vocab.o2i and Interpretation.from_learner(learn, act=noop).preds.min() < 0
    plt.close("all")
