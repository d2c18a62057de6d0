"""Training that starts from the weights of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import ROOT, command
from conftest import make_images
from fastai.vision.all import Callback, ImageDataLoaders, Normalize, Resize, get_model, set_seed
from torch import nn

from benchmarks import small
from cifar10.errors import UserError
from cifar10.files import load_tensors
from cifar10.interpretation import ImageClassifier
from cifar10.options import Options
from cifar10.recipes import FASTER, RECIPES
from cifar10.runs import WEIGHTS, Run, Session, weights_file
from cifar10.runs.run import find_run
from cifar10.training import transfer
from cifar10.training.learner import build_learner
from cifar10.training.transfer import features, fit_head
from model import ResNet
from train import get_dls, get_learner

NORMALIZED = dict(mean=[0.3, 0.4, 0.5], std=[0.2, 0.25, 0.3])


@pytest.fixture(scope="module")
def source(shapes, tmp_path_factory):
    """A run, trained for a few steps by a recipe that keeps the scales of batch normalization."""
    set_seed(0)
    recipe = replace(FASTER, batch_size=16, epochs=2, peak_epoch=1, train_norm_scales=False)
    dls = get_dls(shapes, recipe)
    learn = get_learner(dls, recipe, width=4, precision="fp32")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 0.1)
    run = Run.create(Options(runs_dir=str(tmp_path_factory.mktemp("runs")), name="source"), recipe, learn)
    run.data |= NORMALIZED
    run.save_weights(learn.model, None)
    return run.path


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Images of three classes, one of which is new."""
    folder = tmp_path_factory.mktemp("others") / "others"
    return make_images(folder, train=12, test=8, classes=("bar", "cross", "ring"))


@pytest.fixture
def learn(source, others):
    set_seed(0)
    return get_learner(get_dls(others, "finetune"), weights=source, precision="fp32")


def quiet(learn, function, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return function(*args, **kwargs)


def test_all_layers_but_the_last_are_those_of_the_run(learn, source):
    weights = ImageClassifier.load(source, ResNet).model.state_dict()
    ours = get_model(learn.model).state_dict()
    assert ours["fc.weight"].shape == (3, 32) and weights["fc.weight"].shape == (2, 32)
    assert all(torch.equal(ours[name], weights[name]) for name in weights if not name.startswith("fc."))
    assert learn.recipe.name == "finetune" and not learn.recipe.train_norm_scales and learn.recipe.width == 4


def test_images_are_normalized_as_in_the_run(source, others):
    dls = get_dls(others)
    before = [tfm for tfm in dls.after_batch.fs if isinstance(tfm, Normalize)]
    learn = get_learner(dls, weights=source, width=4)
    for loader in learn.dls.loaders:
        (found,) = [tfm for tfm in loader.after_batch.fs if isinstance(tfm, Normalize)]
        torch.testing.assert_close(found.mean.flatten(), torch.tensor(NORMALIZED["mean"]))
        torch.testing.assert_close(found.std.flatten(), torch.tensor(NORMALIZED["std"]))
    after = [tfm for tfm in dls.after_batch.fs if isinstance(tfm, Normalize)]
    assert after == before and after[0] is not found  # another Learner's images stay as they were


def test_what_the_run_kept_fixed_stays_fixed(learn):
    before = {name: value.clone() for name, value in get_model(learn.model).state_dict().items()}
    quiet(learn, learn.fine_tune, 1)
    learn.freeze()
    learn.unfreeze()
    quiet(learn, learn.fit_one_cycle, 1, 0.05)
    changed = {name for name, v in get_model(learn.model).state_dict().items() if not torch.equal(v, before[name])}
    norms = {name for name, m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert "prep.0.weight" not in changed and not {f"{name}.weight" for name in norms} & changed
    assert {"layer1.0.weight", "layer3.0.weight", "fc.weight"} <= changed


def test_the_statistics_of_batch_normalization_stay(learn):
    before = {name: value.clone() for name, value in learn.model.named_buffers()}
    quiet(learn, learn.fine_tune, 2)
    assert before and all(torch.equal(value, before[name]) for name, value in learn.model.named_buffers())


@pytest.mark.parametrize("changed", [dict(width=8), dict(width=4, norm="layer")])
def test_another_model_is_an_error(source, others, changed):
    with pytest.raises(UserError, match=r"the weights are of a model with (width 4, not 8|norm batch, not layer)"):
        get_learner(get_dls(others), weights=source, **changed)


def test_the_last_layer_is_fitted_to_the_features(learn):
    fit_head(learn)
    x, y = features(learn, learn.dls.train_ds.items)
    fc = get_model(learn.model).fc
    with torch.no_grad():
        predicted = fc(torch.from_numpy(x)).argmax(dim=1).numpy()
    assert (predicted == y).mean() > 0.95  # as many features as images
    preds, targs = quiet(learn, learn.get_preds, dl=learn.dls.test_dl(learn.dls.train_ds.items, with_labels=True))
    assert (preds.argmax(dim=1) == targs).float().mean() > 0.95  # the Learner's own predictions


def test_the_last_layer_of_two_classes_is_that_of_the_logistic_regression(source, shapes):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    learn = get_learner(get_dls(shapes), weights=source, width=4, precision="fp32")
    fit_head(learn)
    x, y = features(learn, learn.dls.train_ds.items)
    scaled = StandardScaler().fit_transform(x)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, y).predict_proba(scaled)
    model = get_model(learn.model)
    with torch.no_grad():
        found = (model.fc(torch.from_numpy(x)) * model.logit_scale).softmax(dim=1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_no_class_is_left_out_of_the_images_that_it_is_fitted_to(learn, monkeypatch):
    """However few of all images are used."""
    monkeypatch.setattr(transfer, "MOST", 1)
    fit_head(learn)
    model, order = get_model(learn.model), np.random.default_rng(0).permutation(36)
    labels = learn.dls.train.targets[0][order].tolist()
    used = [learn.dls.train_ds.items[order[labels.index(label)]] for label in range(3)]
    x, y = features(learn, used)
    with torch.no_grad():
        assert model.fc(torch.from_numpy(x)).argmax(dim=1).tolist() == y.tolist() == [0, 1, 2]


def test_a_class_without_training_images_is_not_predicted(learn):
    dls = learn.dls
    few = [file for file in dls.train_ds.items if file.parent.name != "bar"]
    learn.dls.train_ds.items[:] = few + few[: len(dls.train_ds.items) - len(few)]
    fit_head(learn)
    x, _ = features(learn, learn.dls.train_ds.items)
    with torch.no_grad():
        assert not (get_model(learn.model).fc(torch.from_numpy(x)).argmax(dim=1) == dls.vocab.o2i["bar"]).any()


def test_fine_tuning_learns(learn):
    quiet(learn, learn.fine_tune, 4)
    assert learn.recorder.values[-1][2] >= 0.75  # 1 with each of 10 seeds


def test_a_callback_does_not_change_how_it_is_trained(learn):
    seen = []

    class Watch(Callback):
        def before_batch(self):
            seen.append(self.opt.hypers[-1]["lr"])

    learn.freeze()
    before = learn.model.layer1[0].weight.clone()
    quiet(learn, learn.fine_tune, 2, cbs=Watch())
    assert max(seen) == pytest.approx(RECIPES["finetune"].lr_max, rel=0.2)
    assert not torch.equal(learn.model.layer1[0].weight, before)  # also of a Learner that was frozen


def test_another_model_is_tuned_as_fastai_does(others):
    dls = get_dls(others)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
    learn = build_learner(dls, model, RECIPES["assignment"], "fp32")
    quiet(learn, learn.fine_tune, 1)
    assert len(learn.recorder.values) == 1


def test_the_recipe_needs_weights(others):
    with pytest.raises(UserError, match="starts from trained weights; pass weights"):
        get_learner(get_dls(others), "finetune", width=4)
    with pytest.raises(UserError, match="starts from trained weights; add --weights"):
        Options(recipe="finetune")


def test_images_that_were_not_normalized_are(source, others):
    dls = ImageDataLoaders.from_folder(others, "train", "test", item_tfms=Resize(32), bs=8, num_workers=0)
    learn = get_learner(dls, weights=source, precision="fp32")
    assert [tfm for tfm in learn.dls.train.after_batch.fs if isinstance(tfm, Normalize)]
    quiet(learn, learn.fine_tune, 1)  # also with fastai's own DataLoaders
    assert len(learn.recorder.values) == 1


def test_the_benchmark(source, others, tmp_path, monkeypatch):
    for name in ("assignment", "finetune"):
        short = replace(RECIPES[name], epochs=1, peak_epoch=0.5, lr_max=0.05, width=4)
        monkeypatch.setitem(RECIPES, name, short)
    small.main([str(others)], str(source), seeds=1, out=str(tmp_path / "small.json"))
    results = json.loads((tmp_path / "small.json").read_text())
    (found,) = results["sets"].values()
    assert {*found["accuracies"]} == {"frozen", "finetune", "scratch", "plain"} and found["most_common"] == 1 / 3
    assert all(0 <= accuracy <= 1 for seeds in found["accuracies"].values() for accuracy in seeds.values())
    with pytest.raises(UserError, match="other images named others, or other weights"):
        small.main([str(others)], "elsewhere", seeds=1, out=str(tmp_path / "small.json"))
    with pytest.raises(UserError, match="models has fintune; it may have frozen, finetune"):
        small.main([str(others)], str(source), models="fintune,plain")
    monkeypatch.setitem(RECIPES, "finetune", replace(RECIPES["finetune"], label_smoothing=0.3))
    with pytest.raises(UserError, match=r"small.json holds results of (frozen|finetune) by another recipe"):
        small.main([str(others)], str(source), seeds=2, out=str(tmp_path / "small.json"))


def test_the_options_of_fastai(learn):
    """With more arguments, `fine_tune` is fastai's: it freezes all but the last group for an epoch."""
    quiet(learn, learn.fine_tune, 1, 0.01, freeze_epochs=2)
    assert len(learn.recorder.values) == 1 and not [tfm for tfm in learn.recorder.lrs if tfm > 0.01]


def options(source, others, folder, *more):
    return ("--data", others, "--weights", source, "--epochs", 2, "--precision", "fp32",
            "--runs_dir", folder, *more)  # fmt: skip


@pytest.fixture(scope="module")
def finished(source, others, tmp_path_factory):
    """A finished run, and the place of the weights that it started from, which are gone."""
    folder = tmp_path_factory.mktemp("finetuned")
    copy = shutil.copytree(source, folder / "source")
    done = command("train.py", *options(copy, others, folder, "--name", "run"), cwd=folder)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(copy)
    return folder / "run", str(copy)


def test_last_is_the_latest_run_at_the_start(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "runs/source")
    monkeypatch.chdir(tmp_path)
    here = Path("runs/source")
    assert find_run("last") == here == find_run("runs/source") and weights_file("last") == here / WEIGHTS
    assert ImageClassifier.load("last", ResNet).classes == ImageClassifier.load(here, ResNet).classes
    with Session.start({"weights": "last"}) as session:
        assert session.options.weights == "runs/source"  # and not the run that begins
    (here / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"^runs/source holds no model.safetensors; finish the run"):
        ImageClassifier.load("last", ResNet)
    with pytest.raises(UserError, match="nowhere holds no run, so there is no last one; name the folder of a run"):
        find_run("last", "nowhere")


@pytest.mark.slow
def test_a_run_records_where_it_started(finished):
    run, source = finished
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["weights"] == source and config["recipe"]["name"] == "finetune"
    assert config["data"]["mean"] == pytest.approx(NORMALIZED["mean"])
    _, about = load_tensors(run / "model.safetensors")
    assert about["weights"] == source and about["data"]["std"] == pytest.approx(NORMALIZED["std"])
    assert f"--weights {source}" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [0, 1])
def test_it_resumes_exactly_without_the_run_that_it_started_from(finished, checkpoints, tmp_path):
    """Also before its first checkpoint, when the last layer is still to be fitted."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    expected = (run / "model.safetensors").read_bytes()
    (run / "metrics.json").unlink()
    (run / "model.safetensors").unlink()
    for checkpoint in sorted((run / "checkpoints").iterdir())[checkpoints:]:
        checkpoint.unlink()
    resumed = command("train.py", "--resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("--weights", "nowhere"),
            "weights is nowhere, which is neither the folder of a finished run nor its model.safetensors; give either",
        ),
        (("--width", "8"), "the weights are of a model with width 4, not 8; give --width 4"),
    ],
)
def test_mistakes(source, others, tmp_path, words, error):
    done = command("train.py", *options(source, others, tmp_path), *words, cwd=tmp_path)
    assert done.returncode == 2 and error in done.stderr and done.stderr.count("\n") == 1


def test_the_recipe_is_the_default_with_weights_only():
    assert Options().recipe_name == "assignment" and Options(weights="run").recipe_name == "finetune"
    assert Options(weights="run", recipe="fast").recipe_name == "fast" and set(RECIPES) > {"finetune"}


def test_few_images_are_worth_a_word_about_weights(others, source, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # where these weights are
    for options, said in ((Options(data=str(others)), 1), (Options(data=str(others), weights=str(source)), 0)):
        Session(options, resources=None).open_images()
        assert capsys.readouterr().out.count("36 training images are few; --weights results/cifar10-best") == said
