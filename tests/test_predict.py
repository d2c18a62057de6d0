"""predict.py and Classifier: what training and validation see, from the weights alone."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from commandline import ROOT, command, warm_python
from conftest import make_images
from PIL import Image

from cifar10.data.loaders import build_dls as package_dls
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.files import load_tensors
from cifar10.interpretation.predictions import Interpretation, tta_preds
from cifar10.runs.run import Run
from cifar10.training.learner import build_learner as package_learner
from model import ResNet
from predict import Classifier, find_files


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("photos") / "photos", size=40)


@pytest.fixture(scope="module")
def run(photos):
    """A finished run on images of 48×48, whose classes are easy to tell apart."""
    short = ("--epochs", 4, "--batch_size", 8, "--width", 4, "--size", 48, "--lr_max", 0.1, "--name", "run")
    done = command("train.py", "--data", photos, *short, cwd=photos.parent, drawn=False)
    assert done.returncode == 0, done.stderr
    return photos.parent / "runs/run"


@pytest.fixture(scope="module")
def learned(run, photos):
    """The same model as a Learner, with the test images."""
    tensors, about = load_tensors(run / "model.safetensors")
    model = ResNet(width=4, num_classes=2)
    model.load_state_dict(tensors)
    dls = package_dls(ImageTable.open(photos, size=48), bs=8, stats=(about["data"]["mean"], about["data"]["std"]))
    return package_learner(dls, model, Run.open(run).recipe)


def table_of(path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.parametrize("tta", [False, True])
def test_the_probabilities_of_the_learner(run, learned, tta):
    files = learned.dls.valid_ds.items
    interp = Interpretation(learned)
    expected = tta_preds(interp) if tta else interp.preds
    found = Classifier.load(run).predict(files, tta=tta)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(found, expected) or tta


def test_the_accuracy_of_the_run(run, photos, tmp_path):
    done = command(
        "predict.py", run, photos / "test", "--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"16 images classified; see {tmp_path / 't.csv'} and {tmp_path / 't.json'}\n"
    assert not done.stdout
    rows, metrics = table_of(tmp_path / "t.csv"), json.loads((run / "metrics.json").read_text())
    correct = [row["class 1"] == row["image"].split("/")[-2] for row in rows]
    assert len(rows) == 16 and sum(correct) / 16 == metrics["accuracy"]
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["temperature"] == 1  # no images to fit it on
    probabilities = found["probabilities"]
    assert {*probabilities} == {row["image"] for row in rows}
    assert all(sum(p.values()) == pytest.approx(1, abs=1e-5) for p in probabilities.values())


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
def test_a_table_on_the_standard_output_is_nothing_but_a_table(run, photos, tmp_path):
    words = [warm_python(), ROOT / "predict.py", run, photos / "test", "--csv", "/dev/stdout"]
    with (tmp_path / "t.csv").open("w") as out:
        done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert done.returncode == 0 and len(table_of(tmp_path / "t.csv")) == 16, done.stderr


def test_a_table_on_the_terminal(run, photos, tmp_path):
    files = [photos / "test/ring/0.png", photos / "test/cross/1.png"]
    done = command("predict.py", run / "model.safetensors", *files, "--topk", 1, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3 and lines[0].split() == ["image", "class", "1", "probability", "1"]
    assert [line.split()[0] for line in lines[1:]] == [str(file) for file in files]


@pytest.mark.slow
def test_a_list_from_the_standard_input(run, photos):
    names = "\n".join(map(str, sorted((photos / "test/ring").iterdir()))) + "\n"
    words = [warm_python(), ROOT / "predict.py", run, "-"]
    done = subprocess.run(words, input=names, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 9, done.stderr
    bytes_of = [photos.parent / os.fsdecode(b"caf\xe9.png"), photos / "test/ring/0.png"]
    bytes_of[0].write_bytes(bytes_of[1].read_bytes())
    listed = b"\n".join(map(os.fsencode, bytes_of))
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, *words[1:]], input=listed, capture_output=True, env=strict)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
    done = subprocess.run(words, input="", capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "no images were named" in done.stderr


def test_a_broken_file_is_named_and_the_rest_is_done(run, photos, tmp_path):
    """So are files in a folder that are no images, and photos in a format that can't be read."""
    folder = tmp_path / "new"
    shutil.copytree(photos / "test/ring", folder / "deep/er")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "deep/notes.txt"):
        (folder / name).write_text("no image")
    (folder / "broken.png").write_text("not an image")
    done = command("predict.py", run, folder, tmp_path / "missing.jpg", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 9
    said = done.stderr.splitlines()
    assert len(said) == 4 and said[0] == "3 files ignored: 2 .heic, 1 .txt"
    assert "broken.png can't be used as an image" in said[1] and "missing.jpg" in said[2]
    assert said[3] == "2 of 10 images can't be used"


def test_grad_cam_of_each_image(run, photos, tmp_path):
    (tmp_path / "0.png").write_bytes((photos / "test/ring/0.png").read_bytes())
    done = command("predict.py", run, photos / "test/ring/0.png", tmp_path / "0.png", "--gradcam", "cam", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "cam").iterdir()} == {"0.png", "0-1.png"}
    assert Image.open(tmp_path / "cam/0.png").size == (1000, 340)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere", "x.png"), "nowhere is neither the folder of a finished run nor its model.safetensors"),
        (("RUN", "empty"), "empty holds no images"),
        (("RUN", "x.png", "--gradcam", "damaged.safetensors"), "damaged.safetensors can't be made (File exists); give"),
        (("RUN", "x.png", "--gradcam", "damaged.safetensors/deep"), "can't be made (Not a directory); give another"),
        (("RUN", "photos"), "photos holds no images (ignored files: 1 .heic)"),
        (("unfinished", "x.png"), "unfinished holds no model.safetensors; finish the run, or copy it there"),
        (("damaged.safetensors", "x.png"), "is damaged or not a safetensors file"),
    ],
)
def test_mistakes(run, tmp_path, words, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.HEIC").touch()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.json").write_text("{}")
    (tmp_path / "damaged.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000])
    done = command("predict.py", *(run if word == "RUN" else word for word in words), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr


def test_from_python(run, photos):
    classifier = Classifier.load(run)
    file = photos / "test/ring/0.png"
    image = Image.open(file)
    one = classifier.predict(file)
    assert one.shape == (1, 2) and classifier.classes == ["cross", "ring"] and classifier.size == 48
    for same in (str(file), image, np.asarray(image), [image], [file]):
        assert torch.equal(classifier.predict(same), one)
    assert classifier.predict([]).shape == (0, 2)
    with pytest.raises(UserError, match="can't be used as an image"):
        classifier.predict(ROOT / "README.md")


def test_weights_of_another_format(run, tmp_path):
    from cifar10.files import load_tensors, save_tensors

    tensors, about = load_tensors(run / "model.safetensors")
    save_tensors(tmp_path / "old.safetensors", tensors, **about | {"format": 2})
    with pytest.raises(UserError, match="has format 2, not 3; train again"):
        Classifier.load(tmp_path / "old.safetensors")
    save_tensors(tmp_path / "odd.safetensors", tensors, **about | {"model": {"depth": 3}})
    with pytest.raises(UserError, match="does not hold a model of this program"):
        Classifier.load(tmp_path / "odd.safetensors")


def test_the_weights_that_come_with_the_clone():
    classifier = Classifier.load(ROOT / "results/cifar10-best")
    assert len(classifier.classes) == 10 and (ROOT / "results/cifar10-best/model.safetensors").stat().st_size < 14e6
    assert classifier.predict(np.zeros((32, 32, 3), np.uint8)).sum() == pytest.approx(1, abs=1e-5)


def test_their_accuracy_is_the_one_that_is_stated():
    """By the recorded predictions for all test images, and by the report."""
    correct = [name.split("/")[1] == label for name, label in recorded_predictions().items()]
    stated = json.loads((ROOT / "results/cifar10-best/metrics.json").read_text())["half_precision"]["accuracy"]
    assert len(correct) == 10_000 and sum(correct) / 10_000 == pytest.approx(stated, abs=5e-5)
    for page in ("docs/usage.md", "results/cifar10-best/report.md"):
        assert f"{stated:.2%}" in (ROOT / page).read_text()


def recorded_predictions() -> dict[str, str]:
    """Path of each test image of CIFAR-10 in its folder → the class that the weights of the clone predict in fp32."""
    return {row["image"]: row["class 1"] for row in table_of(ROOT / "results/cifar10-best/predictions.csv")}


@pytest.mark.slow
@pytest.mark.cifar10
def test_they_predict_what_is_recorded(cifar10_path, tmp_path):
    """For every twentieth test image, 50 of each class: image by image, and in a report."""
    expected = dict(list(recorded_predictions().items())[::20])
    if os.path.isdir(cifar10_path):
        for name in expected:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f"{cifar10_path}/{name}", tmp_path / name)
    else:
        with tarfile.open(cifar10_path) as archive:
            for member in archive:
                if (name := member.name.partition("/")[2]) in expected:
                    archive.extract(member.replace(name=name), tmp_path, filter="data")
    classifier = Classifier.load(ROOT / "results/cifar10-best")
    classifier.precision = "fp32"
    found = classifier.predict([tmp_path / name for name in expected]).argmax(dim=1)
    same = [classifier.classes[number] == label for number, label in zip(found, expected.values(), strict=True)]
    assert sum(same) >= 498  # rounding may decide about an image for which two classes are as likely
    shutil.copytree(ROOT / "results/cifar10-best", tmp_path / "best")
    its_own = ("--data", tmp_path / "test", "--split", "all")
    done = command("interpret.py", tmp_path / "best", *its_own, cwd=tmp_path, drawn=False)
    accuracy = sum(name.split("/")[1] == label for name, label in expected.items()) / 500
    assert float(re.search(r"(\S+)% of 500 ", done.stdout)[1]) / 100 == pytest.approx(accuracy, abs=5e-3), done.stderr


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_image_in_place_of_a_list_is_an_error_in_one_sentence(monkeypatch, format):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, format)
    file.seek(0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
    with pytest.raises(UserError, match="holds no list of files"):
        find_files(["-"])
