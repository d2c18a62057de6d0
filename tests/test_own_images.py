"""Own images in every layout: folders with two or three splits, a flat folder, a CSV file; any size; from the disk."""

import copy
import csv
import json
import pickle
import random
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from commandline import ROOT, command
from conftest import make_images
from PIL import Image

from cifar10.data import cache as pixels
from cifar10.data import sources
from cifar10.data.cache import PixelFile
from cifar10.data.loaders import describe
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.files import load_tensors, save_tensors
from cifar10.interpretation.metrics import calibration_error
from cifar10.options import Options
from cifar10.runs.session import Session
from interpret import free_folder
from predict import Classifier
from train import get_dls, get_learner


@pytest.fixture
def flat(tmp_path):
    """A folder for each of two classes, 24 images in each."""
    return make_images(tmp_path / "images") / "train"


@pytest.fixture
def three(tmp_path):
    """24 + 24 training, 8 + 8 validation and 8 + 8 test images."""
    folder = make_images(tmp_path / "images")
    make_images(tmp_path / "more", train=0, test=8)
    (tmp_path / "more/test").rename(folder / "valid")
    for number, file in enumerate(sorted((folder / "valid").rglob("*.png"))):
        Image.open(file).rotate(90 * (number % 3 + 1)).save(file)  # or they would be those of test/
    return folder


def write_table(file, rows):
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(rows)


def test_a_flat_folder_is_split_in_proportion_and_always_alike(flat):
    dls = get_dls(flat, batch_size=8)
    assert [len(dl.dataset) for dl in dls.loaders] == [38, 10] and dls.vocab == ["cross", "ring"]
    assert Counter(file.parent.name for file in dls.valid_ds.items) == {"cross": 5, "ring": 5}
    assert not {*dls.train_ds.items} & {*dls.valid_ds.items}
    again = get_dls(flat, batch_size=8)
    assert again.valid_ds.items == dls.valid_ds.items
    assert len(get_dls(flat, batch_size=8, valid_pct=0.5).valid_ds) == 24
    assert describe(dls) == "train: 2 classes (cross, ring); 38 training and 10 validation images, 32×32 pixels"


def test_a_flat_folder_in_an_archive(flat, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in flat.rglob("*.png"):
            archive.write(file, f"photos/{file.relative_to(flat)}")
    assert get_dls(tmp_path / "photos.zip", batch_size=8).train.table.classes == ["cross", "ring"]


def test_copies_that_may_be_on_both_sides_are_named(flat, capsys):
    (flat / "cross/copy.png").write_bytes((flat / "cross/0.png").read_bytes())
    ImageTable(flat)
    assert "2 of 49 images are identical to others, and may be on both sides of the split" in capsys.readouterr().out


def test_a_class_with_one_image_can_not_be_split(flat):
    """Which is found before anything is decoded."""
    for file in sorted((flat / "ring").iterdir())[1:]:
        file.unlink()
    (flat / "cross/broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"has a single training image of ring; add another, or .* --skip_classes ring"):
        get_dls(flat, batch_size=8)
    (flat / "cross/broken.png").unlink()
    assert ImageTable(flat).labels.count("ring") == 1  # it can be predicted
    (flat / "bar").mkdir()
    for i in range(6):
        Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(flat / f"bar/{i}.png")
    assert get_dls(flat, batch_size=8, skip_classes=["ring"]).vocab == ["bar", "cross"]


def test_the_package_is_not_taken_for_a_data_set(monkeypatch, capsys):
    """In the repository's folder, cifar10/ is not what --data cifar10 could mean."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sources, "cifar10_folder", lambda: ROOT)
    sources.prepare_data("cifar10")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["test", "Training", "VALID"])
def test_splits_without_train_are_not_taken_for_classes(flat, name):
    (flat / "cross").rename(flat / name)
    with pytest.raises(UserError, match=rf"holds {name}, but no (train/|class folders)"):
        ImageTable(flat)


@pytest.mark.slow
def test_three_splits(three, tmp_path):
    """Valid while training, test once at the end; the temperature is fitted on valid, where something is wrong."""
    (three / "valid/cross/0.png").rename(three / "valid/ring/wrong.png")
    dls = get_dls(three, batch_size=8)
    assert [len(dl.dataset) for dl in dls.loaders] == [48, 16, 16]
    assert {file.parent.parent.name for file in dls.valid_ds.items} == {"valid"}
    assert {file.parent.parent.name for file in dls[2].dataset.items} == {"test"}
    assert "48 training, 16 validation and 16 test images" in describe(dls)
    images, labels = next(iter(dls[2]))
    assert images.shape == (8, 3, 32, 32) and (labels == 0).all()
    again = next(iter(dls[2]))[0]
    assert torch.equal(images, again)  # no augmentation
    short = ("--epochs", 2, "--peak_epoch", 1, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--name", "run")
    done = command("train.py", "--data", three, *short, cwd=tmp_path, drawn=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images"] == 16 and metrics["temperature"] > 0
    assert "which was fitted on the run's validation images" in (run / "report.md").read_text()
    assert json.loads((run / "config.json").read_text())["data"]["test"] == 16
    # Killed by a limit for the size of a file after its first epoch, it ends with the same temperature and weights.
    again = ("--data", three, *short[:-1], "again")
    assert command("train.py", *again, cwd=tmp_path, file_size=60_000).returncode == 2
    assert command("train.py", "--resume", "runs/again", cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs/again/model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_predictions_with_the_temperature(three, tmp_path):
    """Probabilities are softmax(logits / temperature) in predict.py, in the exported file, and in all reports."""
    (three / "valid/cross/0.png").rename(three / "valid/ring/wrong.png")
    short = ("--epochs", 2, "--peak_epoch", 1, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--name", "run")
    assert command("train.py", "--data", three, *short, "--precision", "fp32", cwd=tmp_path).returncode == 0
    run = tmp_path / "runs/run"
    metrics, report = json.loads((run / "metrics.json").read_text()), (run / "report.md").read_bytes()
    classifier = Classifier.load(run)
    assert classifier.temperature == metrics["temperature"] != 1
    files = sorted((three / "test").rglob("*.png"))
    with_it = {tta: classifier.predict(files, tta) for tta in (False, True)}
    classifier.temperature = 1.0  # as in a REPL
    for tta, probabilities in with_it.items():
        expected = (classifier.predict(files, tta).log() / metrics["temperature"]).softmax(dim=1)
        torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-4)
    targs = torch.tensor([classifier.classes.index(file.parent.name) for file in files])
    error = calibration_error(with_it[False], targs)
    assert metrics["calibration_error_with_temperature"] == pytest.approx(error, abs=1e-4)
    for tta in (False, True):
        words = ["predict.py", run, three / "test", "--json", "p.json", *["--tta"] * tta]
        done = command(*words, cwd=tmp_path)
        assert "probabilities with a temperature of" in done.stderr
        found = json.loads((tmp_path / "p.json").read_text())
        assert found["temperature"] == metrics["temperature"]
        rows = [list(found["probabilities"][str(file)].values()) for file in files]
        torch.testing.assert_close(torch.tensor(rows), with_it[tta], atol=1e-5, rtol=1e-4)
    done = command("export.py", run, "--torch", "m.pt2", cwd=tmp_path)
    assert "probabilities with a temperature of" in done.stdout, done.stderr
    about = {"temperature": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=about).module()
    pixels = torch.from_numpy(np.stack([classifier.decode(file) for file in files]))
    torch.testing.assert_close(program(pixels), with_it[False], atol=1e-4, rtol=1e-3)
    assert float(about["temperature"]) == metrics["temperature"]
    # The report again, and one on other images, whose numbers can be compared.
    assert command("interpret.py", run, cwd=tmp_path).returncode == 0 and (run / "report.md").read_bytes() == report
    shutil.copytree(three / "test", tmp_path / "other")
    assert command("interpret.py", run, "--data", "other", "--out", "elsewhere", cwd=tmp_path).returncode == 0
    other = json.loads((tmp_path / "elsewhere/metrics.json").read_text())
    for key in ("accuracy", "loss", "calibration_error", "temperature", "calibration_error_with_temperature"):
        assert other[key] == pytest.approx(metrics[key], rel=1e-4)


@pytest.mark.slow
def test_weights_from_before_have_no_temperature(flat, tmp_path):
    short = ("--epochs", 1, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--name", "run")
    assert command("train.py", "--data", flat, *short, cwd=tmp_path).returncode == 0
    weights = tmp_path / "runs/run/model.safetensors"
    tensors, about = load_tensors(weights)
    assert about.pop("temperature") is None
    before = Classifier.load(weights).predict(flat / "ring/0.png")
    save_tensors(weights, tensors, **about)
    classifier = Classifier.load(weights)
    assert classifier.temperature == 1 and torch.equal(classifier.predict(flat / "ring/0.png"), before)
    done = command("predict.py", weights, flat / "ring/0.png", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr


def test_a_table(flat, tmp_path):
    files = [file.relative_to(tmp_path) for file in sorted(flat.rglob("*.png"))]
    write_table(tmp_path / "labels.csv", [("image", "label"), *((file, f"a {file.parent.name}") for file in files)])
    dls = get_dls(tmp_path / "labels.csv", batch_size=8)
    assert dls.vocab == ["a cross", "a ring"] and [len(dl.dataset) for dl in dls.loaders] == [38, 10]
    assert describe(dls).startswith(f"{tmp_path.name}: 2 classes")
    for dl in dls.loaders:  # each image has the label of its row
        assert [dls.vocab[y] for y in dl.targets[0]] == [f"a {file.parent.name}" for file in dl.dataset.items]
    image, label = dls.valid_ds[0]
    assert dls.vocab[label] == f"a {dls.valid_ds.items[0].parent.name}" and image.size == (32, 32)


def test_a_copy_knows_the_labels_of_a_table_and_an_exported_learner_no_file(flat, tmp_path):
    files = sorted(flat.rglob("*.png"))
    write_table(tmp_path / "labels.csv", [("image", "label"), *((file, f"a {file.parent.name}") for file in files)])
    dls = get_dls(tmp_path / "labels.csv", batch_size=8)
    again = copy.deepcopy(dls)
    assert [again.vocab[y] for _, y in again.valid_ds] == [f"a {file.parent.name}" for file in again.valid_ds.items]
    get_learner(dls, width=1, path=tmp_path).export("exported.pkl")
    assert str(flat).encode() not in (tmp_path / "exported.pkl").read_bytes()


def test_a_table_with_splits(flat, tmp_path):
    files, splits = sorted(flat.rglob("*.png")), ["train"] * 16 + ["valid"] * 4 + ["test"] * 4
    rows = [(file, file.parent.name, split) for file, split in zip(files, splits * 2, strict=True)]
    random.Random(0).shuffle(rows)
    write_table(tmp_path / "labels.csv", [("image", "label", "split"), *rows])
    assert [len(dl.dataset) for dl in get_dls(tmp_path / "labels.csv", batch_size=8).loaders] == [32, 8, 8]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("image", "label"), ("a.png", "x"), ("./a.png", "y")], "line 3: image is './a.png'; it is there twice"),
        ([("image", "label"), ("a.png", "x"), ("b.png", "x")], "images of one class only, x"),
        (
            [("image", "label"), ("a.png", "x"), ("b.png", "y")],
            "none of the images that .*labels.csv names in the column image is in .*; pass the folder",
        ),
        ([("image", "label", "split"), ("a.png", "x", "test")], "images of one class only, x"),
        ([("label",), ("x",), ("y",)], "has the columns label; say which one names existing images"),
    ],
)
def test_wrong_tables(tmp_path, rows, says):
    write_table(tmp_path / "labels.csv", rows)
    with pytest.raises(UserError, match=says):
        ImageTable(tmp_path / "labels.csv")


def test_any_size(tmp_path):
    """Crops and Cutout scale with the images, and the caches of two sizes are two."""
    folder = make_images(tmp_path / "images", size=64)
    dls = get_dls(folder, size=48, batch_size=8)
    crop, cutout = (
        next(t for t in dls.train.after_batch.fs if type(t).__name__ == name) for name in ("RandomCrop", "Cutout")
    )
    assert (crop.size, crop.padding, cutout.height) == (48, 6, 12)
    assert dls.one_batch()[0].shape == (8, 3, 48, 48) and dls.train.table.pixels.shape[-1] == 48
    assert get_dls(folder, batch_size=8).one_batch()[0].shape[-1] == 32
    assert describe(dls).endswith("64×64 pixels, resized to 48×48")
    left = len(dls.train_ds) % 30
    assert f"; each epoch skips {left} that don't fill a batch of 30" in describe(get_dls(folder, batch_size=30))
    same = dls.test_dl([dls.valid_ds.items[0]]).one_batch()[0]  # decoded by itself
    assert torch.equal(same[0], next(iter(dls.valid))[0][0])


@pytest.mark.slow
def test_how_images_are_read_is_remembered(tmp_path):
    """By resume, interpret.py and predict.py, wherever they are started; the table's folder may move."""
    flat = make_images(tmp_path / "photos", train=12, test=0) / "train"
    rows = [f"{label}/{i},{label},x\n" for label in ("cross", "ring") for i in range(12)]
    (tmp_path / "list.csv").write_text("id,kind,other\n" + "".join(rows) + "cross/junk,junk,x\n")
    for file in [*flat.glob("*/*.png")]:
        Image.open(file).resize((32, 96)).save(file)
    options = ["--image_column", "id", "--label_column", "kind", "--images", "photos/train", "--skip_classes", "junk"]
    short = ["--epochs", 1, "--batch_size", 4, "--width", 4, "--lr_max", 0.1, "--name", "run", "--resize", "squish"]
    done = command("train.py", "--data", "list.csv", *options, *short, cwd=tmp_path, drawn=False)
    assert done.returncode == 0, done.stderr
    assert "2 classes (cross, ring); 19 training and 5 validation images, 32×96 pixels, resized to 32×32" in done.stdout
    run = tmp_path / "runs/run"
    config, metrics = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "metrics"))
    assert config["options"]["skip_classes"] == ["junk"] and config["options"]["images"] == str(flat)
    assert config["data"]["resize"] == "squish"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = command("interpret.py", run, "--out", "again", cwd=elsewhere, drawn=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((elsewhere / "again/metrics.json").read_text())["accuracy"] == metrics["accuracy"]
    files = sorted(flat.rglob("*.png"))
    classifier = Classifier.load(run)
    reading = dict(skip_classes=["junk"], image_column="id", label_column="kind", images=str(flat))
    expected = ImageTable(tmp_path / "list.csv", resize="squish", **reading)
    pixels = expected.pixels[[expected.row[file] for file in files]]
    assert torch.equal(classifier.predict(files), classifier.classify(pixels))
    assert torch.equal(classifier.predict_files(files)[0], classifier.classify(pixels))

    (run / "metrics.json").unlink()
    done = command("train.py", "--resume", run, "--resize", "crop", cwd=elsewhere)
    assert "can't change --resize on resume: this run was started with resize=squish" in done.stderr
    flat.rename(elsewhere / "images")
    (tmp_path / "list.csv").rename(elsewhere / "list.csv")
    same = ("--data", "list.csv", "--images", "images", "--skip_classes", "junk")
    done = command("train.py", "--resume", run, *same, cwd=elsewhere, drawn=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "config.json").read_text())["options"]["images"] == str(elsewhere / "images")
    beside = elsewhere / "list.csv"  # as is the folder of its images
    done = command("interpret.py", run, "--data", beside, cwd=tmp_path, drawn=False)
    assert done.returncode == 0 and " validation images of " in done.stdout, done.stderr
    (elsewhere / "other.csv").write_text((elsewhere / "list.csv").read_text().replace("id,kind,", "name,sort,"))
    other = ["--data", elsewhere / "other.csv", "--images", elsewhere / "images", "--out", "other"]
    done = command("interpret.py", run, *other, cwd=tmp_path)
    assert done.returncode == 2 and "has no column 'id'; its columns are name, sort, other" in done.stderr
    other += ["--image_column", "name", "--label_column", "sort"]
    done = command("interpret.py", run, *other, cwd=tmp_path, drawn=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_weights_that_do_not_say_how_images_are_resized(tmp_path, shapes):
    """They are from before there was a choice."""
    short = ["--epochs", 1, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--name", "run"]
    assert command("train.py", "--data", shapes, *short, cwd=tmp_path, drawn=False).returncode == 0
    run, image = tmp_path / "runs/run", Image.effect_noise((40, 80), 90)
    before = Classifier.load(run).predict(image)
    config = json.loads((run / "config.json").read_text())
    tensors, about = load_tensors(run / "model.safetensors")
    [(checkpoint, state)] = [(file, load_tensors(file)) for file in (run / "checkpoints").glob("*01.safetensors")]
    for options in (config["options"], state[1]["settings"]["options"]):
        for name in ("skip_classes", "resize", "image_column", "label_column", "split_column", "images"):
            options.pop(name, None)
    for data in (config["data"], about["data"], state[1]["settings"]["data"]):
        del data["resize"]
    save_tensors(checkpoint, state[0], **state[1])
    (run / "config.json").write_text(json.dumps(config))
    save_tensors(run / "model.safetensors", tensors, **about)
    assert torch.equal(Classifier.load(run).predict(image), before)
    assert command("interpret.py", run, cwd=tmp_path, drawn=False).returncode == 0
    (run / "metrics.json").unlink()
    assert command("train.py", "--resume", run, cwd=tmp_path, drawn=False).returncode == 0
    assert load_tensors(run / "model.safetensors")[1]["data"]["resize"] == "crop"


@pytest.mark.parametrize(
    ("option", "value"), [("--size", 30), ("--size", 8), ("--resize", "fit"), ("--valid_pct", 1.5)]
)
def test_wrong_options(option, value, tmp_path):
    done = command("train.py", option, value, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and option[2:] in done.stderr


def test_from_the_disk_as_from_memory(tmp_path, monkeypatch):
    folder = make_images(tmp_path / "images")
    memory = ImageTable(folder)
    monkeypatch.setattr(pixels, "IN_MEMORY", 0)
    monkeypatch.setattr(pixels, "AT_ONCE", 7 * 3 * 32 * 32)  # several chunks
    disk = ImageTable(folder)
    assert isinstance(disk.pixels, PixelFile) and disk.hash == memory.hash and len(disk.pixels) == 64
    rows = torch.tensor([5, 3, 5, 60])
    assert torch.equal(disk.pixels[rows], memory.pixels[rows]) and torch.equal(disk.pixels[7], memory.pixels[7])
    assert disk.stats([*range(48)]) == memory.stats([*range(48)])
    one, other = (get_dls(table, batch_size=8) for table in (disk, memory))
    assert torch.equal(next(iter(one.valid))[0], next(iter(other.valid))[0])
    disk.cache.unlink()
    assert ImageTable(folder).hash == memory.hash  # decoded again, in chunks


def test_a_training_keeps_its_pixels_when_another_program_replaces_the_cache(tmp_path, monkeypatch):
    folder = make_images(tmp_path / "images")
    monkeypatch.setattr(pixels, "IN_MEMORY", 0)
    disk = ImageTable(folder)
    before = disk.pixels[:].clone()
    Image.new("RGB", (32, 32), "red").save(folder / "train/cross/00.png")  # the first one by name
    other = ImageTable(folder)
    assert other.cache == disk.cache and len(other.pixels) == 65 and not torch.equal(other.pixels[:64], before)
    assert torch.equal(disk.pixels[:], before)
    again = pickle.loads(pickle.dumps(other))
    assert torch.equal(again.pixels[:], other.pixels[:])


def test_images_of_many_bits_are_decoded_in_groups(tmp_path, monkeypatch):
    folder = make_images(tmp_path / "images", train=10, test=4)
    for file in folder.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 4).save(file)
    whole, sizes, decode = ImageTable(folder), [], pixels.decode_files
    monkeypatch.setattr(pixels, "AT_ONCE", 5 * 3 * 32 * 32)
    monkeypatch.setattr(pixels, "decode_files", lambda files, *args: sizes.append(len(files)) or decode(files, *args))
    whole.cache.unlink()
    assert ImageTable(folder).hash == whole.hash and max(sizes) == 5 and sum(sizes) == 2 * 28


def test_splits_and_a_part_to_hold_out(three):
    with pytest.raises(UserError, match=r"has splits of its own; add --valid holdout, or leave out --valid_pct"):
        get_dls(three, batch_size=8, valid_pct=0.25)
    assert len(get_dls(three, batch_size=8, valid_pct=0.25, valid="holdout").valid_ds) == 12


@pytest.mark.slow
def test_the_report_of_a_run_in_another_folder(flat, tmp_path):
    """It is about the images that were held out, as in the run's own folder."""
    short = ("--epochs", 1, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--name", "run")
    assert command("train.py", "--data", flat, *short, cwd=tmp_path, drawn=False).returncode == 0
    done = command("interpret.py", "runs/run", "--out", "elsewhere", "--tta", cwd=tmp_path, drawn=False)
    assert "of 10 validation images of train correct" in done.stdout, done.stderr
    run, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("runs/run", "elsewhere"))
    done = command("interpret.py", "runs/run", "--split", "train", "--out", tmp_path / "runs/run", cwd=tmp_path)
    assert done.returncode == 2 and "is the run's own folder; choose another --out" in done.stderr
    done = command("interpret.py", "runs/run", "--out", tmp_path / "runs/run", cwd=tmp_path, drawn=False)
    assert done.returncode == 0 and json.loads((tmp_path / "runs/run/metrics.json").read_text()).keys() == run.keys()
    assert other.pop("data") == str(flat)  # to know its report again
    assert {key: run[key] for key in other} == other and (tmp_path / "elsewhere/report.html").is_file()
    (flat / "ring/broken.png").write_text("no image")
    done = command("interpret.py", "runs/run", "--data", flat, "--skip_broken", cwd=tmp_path, drawn=False)
    assert "of 10 validation images of train correct" in done.stdout, done.stderr
    Image.new("RGB", (32, 32), "red").save(flat / "ring/more.png")
    done = command("interpret.py", "runs/run", "--out", "third", "--skip_broken", cwd=tmp_path)
    assert done.returncode == 2 and "are not those of runs/run; give --data another path" in done.stderr


@pytest.mark.slow
def test_each_data_set_has_a_report_of_its_own(flat, tmp_path):
    """Also if their folders have the same name; the same images again take the place of their own report."""
    short = ("--epochs", 1, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--name", "run")
    assert command("train.py", "--data", flat, *short, cwd=tmp_path, drawn=False).returncode == 0
    for place, count in (("a", 4), ("b", 6)):
        make_images(tmp_path / place / "photos", train=count, test=0)
        (tmp_path / place / "photos/train").rename(tmp_path / place / "photos/all")
        shutil.rmtree(tmp_path / place / "photos/test")
    for place in ("a", "b", "a", "b"):
        done = command("interpret.py", "runs/run", "--data", f"{place}/photos/all", cwd=tmp_path, drawn=False)
        assert done.returncode == 0, done.stderr
    reports = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/run/*/metrics.json")}
    assert {name: report["images"] for name, report in reports.items()} == {"all-all": 8, "all-all-1": 12}
    (tmp_path / "runs/run/all-all/metrics.json").write_text("[")  # it may be a report on other images
    assert free_folder(tmp_path / "runs/run/all-all", str(tmp_path / "a/photos/all")).name == "all-all-2"
    shutil.copytree(tmp_path / "runs/run", tmp_path / "runs/other")
    done = command("interpret.py", "runs/run", "--data", "a/photos/all", "--out", "runs/other", cwd=tmp_path)
    assert done.returncode == 2 and "runs/other is the folder of another run; choose another --out" in done.stderr


def test_classes_are_drawn_equally_often(tmp_path):
    folder = make_images(tmp_path / "images", train=40)
    for file in sorted((folder / "train/ring").iterdir())[4:]:
        file.unlink()

    def drawn(**changes):
        dls = get_dls(folder, batch_size=4, **changes)
        dls.train.rng.seed(0)
        return torch.cat([y for _ in range(20) for _, y in dls.train]).double().mean().item()

    assert drawn() == pytest.approx(4 / 44, abs=0.01)
    assert drawn(weighted=True) == pytest.approx(0.5, abs=0.06)  # 880 draws: 3.5 standard deviations


def test_imbalance_is_told(tmp_path, capsys):
    folder = make_images(tmp_path / "images", train=41)
    for file in sorted((folder / "train/ring").iterdir())[4:]:
        file.unlink()
    get_dls(folder, batch_size=8)
    told = "images: cross has 41 training images and ring 4: look at the accuracy per class, and consider --weighted\n"
    assert told in capsys.readouterr().out
    get_dls(folder, batch_size=8, weighted=True)
    assert "images and ring 4: look at the accuracy per class\n" in capsys.readouterr().out
    (folder / "train/cross/0.png").unlink()
    get_dls(folder, batch_size=8)
    assert "training images and" not in capsys.readouterr().out


@pytest.mark.parametrize("weighted", [False, True])
def test_imbalance_is_told_of_the_images_after_the_hold_out(tmp_path, weighted, capsys):
    """Also the classes of which none is held out."""
    flat = make_images(tmp_path / "images", train=30) / "train"
    for file in sorted((flat / "ring").iterdir())[2:]:
        file.unlink()
    dls = get_dls(flat, batch_size=8, weighted=weighted)
    counts = Counter(dls.vocab[label] for label in dls.train.targets[0])
    said = capsys.readouterr().out
    assert f"cross has {counts['cross']} training images and ring {counts['ring']}: look" in said
    assert ("consider --weighted" in said) == (not weighted)
    assert ("there are no validation images of ring, so they can't be evaluated" in said) == (counts["ring"] == 2)


@pytest.mark.parametrize(
    ("sizes", "reading", "said"),
    [
        ([(127, 500), (200, 127), (128, 128), (400, 127)], dict(resize="pad"), []),
        ([(128, 128), (400, 300), (127, 127)], {}, ["--size 64 shows finer details"]),
        ([(128, 128), (400, 300), (127, 127)], dict(size=64), []),
        (
            [(60, 100), (40, 61), (40, 40)],
            {},
            ["67% of the images are long, and their ends are cut off; --resize squish"],
        ),
        ([(60, 100), (60, 60), (60, 90), (90, 60)], {}, []),
        ([(200, 400), (400, 200)], {}, ["100% of the images are long", "--size 64 shows"]),
    ],
)
def test_large_and_long_images_are_reported(tmp_path, sizes, reading, said, capsys):
    """In a new training, if they are more than a quarter of all images."""
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number, (width, height) in enumerate(5 * sizes):
            pixels = np.random.default_rng(number).integers(256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images/{label}/{number}.png")
    options = Options(data=str(tmp_path / "images"), **reading)
    Session(options, resources=None).open_images()
    printed = capsys.readouterr().out
    assert all(f"images: {hint}" in printed for hint in said)
    assert ("--size 64" in printed, "--resize squish" in printed) == tuple(
        any(option in hint for hint in said) for option in ("--size 64", "are long")
    )


def test_the_ranges_of_another_data_set(tmp_path):
    """A model that was trained on 12 bits sees dark 12-bit images as dark."""
    folder = make_images(tmp_path / "images")
    for file in folder.rglob("*.png"):
        values = np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 4
        Image.fromarray(values).save(file)
    own = ImageTable(folder)
    given = ImageTable(folder, fixed_ranges={"integer": (0, 4095)})
    assert own.ranges == {"integer": (0, 1023)} and given.ranges == {"integer": (0, 4095)}
    torch.testing.assert_close(given.pixels.float() * 4095 / 1023, own.pixels.float(), atol=4, rtol=0)
