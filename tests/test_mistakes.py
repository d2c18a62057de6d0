"""What a user can get wrong: each case ends with status 2 and one sentence, and leaves nothing behind."""

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commandline import command
from conftest import make_images
from fastai.vision.all import fastai_path
from PIL import Image

from cifar10.data.table import ImageTable
from cifar10.files import load_tensors, save_tensors
from model import ResNet
from train import get_dls

QUICK = ["--width", "4", "--epochs", "1", "--lr_max", "0.01", "--batch_size", "8"]


def left_behind(folder: Path) -> set:
    """Every file below `folder` and in fastai's folders, but for decoded images."""
    files = {path for place in (folder, fastai_path("data")) for path in place.rglob("*")}
    return {path for path in files if "decoded" not in (path.name, path.parent.name)}


def refused(*arguments, cwd: Path, says: str, script: str = "train.py"):
    """The command ends with status 2 and one line that says `says`, and leaves no file behind."""
    before = left_behind(cwd)
    done = command(script, *arguments, cwd=cwd)
    assert done.returncode == 2, done
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert says in done.stderr
    assert left_behind(cwd) == before


# ---- Options


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--epoch_count 3", "there is no option --epoch-count"),
        ("--epochs 3 --peek_epoch 1", "did you mean --peak-epoch?"),
        ("--bs 16", "there is no option --bs; did you mean --batch-size?"),
        ("--pdb", "there is no option --pdb; did you mean --debug?"),
        ("--xtra 1", "there is no option --xtra"),
        ("--epochs abc", "argument --epochs: invalid number: 'abc'"),
        ("--batch_size 1000", "batch_size is 1000, above the 48 training images"),
        ("--precision fp16", "precision is 'fp16'; on cpu it must be auto, fp32 or bf16"),
        ("--device cuda", "device is 'cuda', and PyTorch finds none here"),
        ("--recipe quick", "invalid choice: 'quick'"),
        ("--data cifra10", "there is no cifra10; --data takes auto, cifar10, digits"),
        ("--data ~nobody-of-this-name/images", "can't be read"),
        ("epochs 3", "options begin with --"),
        ("--runs_dir file", "choose another --runs_dir"),
        ("--runs_dir file/below --data no_images", "file is no folder to write to; choose another --runs_dir"),
        ("--runs_dir . --name file --data no_images", "file exists already; choose another --name"),  # before decoding
        ("--runs_dir /proc/runs", "choose another --runs_dir"),
        ("--resume nowhere", "nowhere is not the folder of a run"),
        ("--resume file", "file is not the folder of a run"),
        ("--resume last", "runs holds no run"),
    ],
)
def test_options(shapes, tmp_path, arguments, says):
    (tmp_path / "file").write_text("")
    arguments = arguments.split()
    if "--data" not in arguments and "--resume" not in arguments:
        arguments += ["--data", str(shapes)]
    get_dls(shapes)  # so that decoding them leaves nothing new behind
    refused(*arguments, cwd=tmp_path, says=says)


# ---- Images


def no_test_split(images):
    shutil.rmtree(images / "test")


def empty_test_split(images):
    for file in (images / "test").rglob("*.png"):
        file.unlink()


def no_images(images):
    for file in (images / "train").rglob("*.png"):
        file.unlink()


def one_class(images):
    shutil.rmtree(images / "train/ring")
    shutil.rmtree(images / "test/ring")


def unknown_class(images):
    shutil.copytree(images / "test/ring", images / "test/square")


def text_file(images):
    (images / "train/ring/notes.png").write_text("no image")


def cut_off(images):
    file = images / "train/ring/3.png"
    file.write_bytes(file.read_bytes()[:-400])


def empty_file(images):
    (images / "test/ring/3.png").write_bytes(b"")


def tiny(images):
    Image.new("RGB", (1, 1)).save(images / "test/ring/dot.png")


def dangling(images):
    (images / "train/ring/link.png").symlink_to("nowhere.png")


def no_access(images):
    (images / "train/ring").chmod(0)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "there is no "),
        (lambda images: shutil.rmtree(images) or images.mkdir(), "holds no folders; it needs train/<class>/, or"),
        (no_test_split, "with class folders beside train/; add one or use --valid holdout"),
        (empty_test_split, "has class folders without images: test/cross, test/ring; add some or remove them"),
        (no_images, "holds no images in train/<class>/"),
        (one_class, "of one class only, cross"),
        (unknown_class, "has classes that train lacks, 'square'; rename, remove or add them"),
        (text_file, "1 of 65 images can't be used: train/ring/notes.png (cannot identify image file)"),
        (cut_off, "train/ring/3.png (image file is truncated"),
        (empty_file, "test/ring/3.png (cannot identify image file)"),
        (tiny, "dot.png (too small, 1×1 pixels); repair or remove them, or leave them out with --skip_broken"),
        (dangling, "train/ring/link.png (No such file or directory)"),
        pytest.param(
            no_access, "train/ring can't be read (Permission",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_image_folders(tmp_path, spoil, says):
    images = make_images(tmp_path / "images")
    spoil(images)
    refused("--data", images, *QUICK, cwd=tmp_path, says=says)


def test_too_few_images_to_hold_some_out(tmp_path):
    images = make_images(tmp_path / "images", train=1)
    refused(
        "--data",
        images,
        *QUICK,
        "--valid",
        "holdout",
        cwd=tmp_path,
        says="has a single training image of cross, ring; add another",
    )


# ---- Archives


def tar_of(*members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.isfile() else None)
    return out.getvalue()


def member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_of(name: str, mode: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, b"x")
    return out.getvalue()


def huge_tar() -> bytes:
    return member("images/train/cat/0.png", size=10**16).tobuf() + bytes(1024)


def huge_zip() -> bytes:
    """One that claims to hold a file of ten petabytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.png", b"x")
        archive.infolist()[0].file_size = 10**16
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tgz", lambda packed: b"not an archive", "it is neither a tar nor a zip archive"),
        ("a.zip", lambda packed: b"", "it is neither a tar nor a zip archive"),
        ("a.tgz", lambda packed: packed[: len(packed) // 2], "can't be unpacked: "),
        ("a.zip", lambda packed: zip_of("a.png")[:-30], "it is neither"),
        ("a.tgz", lambda packed: tar_of(member("../evil", size=1)), "unsafe path in the archive, '../evil'"),
        ("a.zip", lambda packed: zip_of("images/../../evil"), "unsafe path in the archive, 'images/../../evil'"),
        ("a.tgz", lambda packed: tar_of(member("/tmp/evil", size=1)), "unsafe path in the archive, '/tmp/evil'"),
        ("a.zip", lambda packed: zip_of("/tmp/evil"), "unsafe path in the archive, '/tmp/evil'"),
        ("a.tgz", lambda packed: tar_of(member("link", type=tarfile.SYMTYPE, linkname="../../evil")), "link"),
        ("a.tgz", lambda packed: tar_of(member("link", type=tarfile.LNKTYPE, linkname="/etc/passwd")), "link"),
        ("a.zip", lambda packed: zip_of("link", 0o120777), "'link' in it is neither a file nor a folder"),
        ("a.tgz", lambda packed: tar_of(member("device", type=tarfile.CHRTYPE, devmajor=1)), "special file"),
        ("a.tar", lambda packed: huge_tar(), "10,000,000.0 GB, and only"),
        ("a.zip", lambda packed: huge_zip(), "10,000,000.0 GB, and only"),
    ],
)
def test_archives(shapes, tmp_path, name, content, says):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(shapes, "shapes")
    (tmp_path / name).write_bytes(content(packed.getvalue()))
    refused("--data", name, *QUICK, cwd=tmp_path, says=says)
    assert not Path("/tmp/evil").exists()


# ---- What works


def works(images: Path, cwd: Path, drawn: bool = False):
    done = command("train.py", "--data", images, *QUICK, cwd=cwd, drawn=drawn)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_size_and_mode(tmp_path):
    """Different sizes, and grayscale, palette, RGBA, 16 bits, PNG and JPEG in one folder: the values are right."""
    images = make_images(tmp_path / "images")
    folder = images / "train/ring"
    gray = np.full((40, 60), 77, dtype=np.uint8)
    Image.fromarray(gray).save(folder / "gray.png")
    Image.fromarray(gray).convert("P").save(folder / "palette.png")
    Image.new("RGBA", (5, 9), (10, 20, 30, 128)).save(folder / "rgba.png")
    Image.new("LA", (32, 32), (90, 255)).save(folder / "la.png")
    deep = np.full((32, 32), 77 * 257, dtype=np.uint16)
    deep[:, 0] = 65535
    Image.fromarray(deep).save(folder / "16bits.png")
    Image.fromarray(deep).save(folder / "16bits.tif")
    Image.new("RGB", (100, 100), (200, 100, 50)).save(folder / "photo.JPG", quality=100)
    Image.new("CMYK", (32, 32), (0, 0, 0, 0)).save(folder / "print.jpeg")
    works(images, tmp_path)
    table = ImageTable(images)
    for name, color in {
        "gray.png": (77, 77, 77), "palette.png": (77, 77, 77), "rgba.png": (132, 137, 142), "la.png": (90, 90, 90),
        "16bits.png": (77, 77, 77), "16bits.tif": (77, 77, 77), "photo.JPG": (200, 100, 50),
        "print.jpeg": (255, 255, 255),
    }.items():  # fmt: skip
        pixels = table.pixels[table.row[folder / name], :, :, 1:].flatten(1)
        assert (pixels.int() - np.array(color)[:, None]).abs().max() <= 2, name


def test_a_channel_that_is_the_same_everywhere(tmp_path):
    images = make_images(tmp_path / "images")
    for file in images.rglob("*.png"):
        pixels = np.array(Image.open(file))
        pixels[:, :, 2] = 0
        Image.fromarray(pixels).save(file)
    works(images, tmp_path)


@pytest.mark.slow
def test_odd_names(tmp_path):
    images = make_images(tmp_path / "my images ✓\nof 2026 $x_1$")
    for split in ("train", "test"):
        (images / split / "ring").rename(images / split / "ring | größe $a^{b$\n2")
        (images / split / "cross").rename(images / split / os.fsdecode(b"cross \xff"))
        (images / split / "ring | größe $a^{b$\n2" / "0.png").rename(
            images / split / "ring | größe $a^{b$\n2" / "0 ü\n.png"
        )
    works(images, tmp_path, drawn=True)
    (run,) = (tmp_path / "runs").iterdir()
    done = command("interpret.py", run, cwd=tmp_path, drawn=False)
    assert done.returncode == 0, done.stderr
    assert r"| ring \| größe \$a^\{b\$\\n2 | " in (run / "report.md").read_text()


# ---- Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes):
    """A finished run on a folder of its own."""
    cwd = tmp_path_factory.mktemp("finished")
    shutil.copytree(shapes, cwd / "images")
    works(cwd / "images", cwd)
    (run,) = (cwd / "runs").iterdir()
    return run.rename(cwd / "runs/run")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that looks as if it had been stopped before its last file."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    return tmp_path / "run"


def finish(run: Path):
    """Make it look finished again."""
    (run / "metrics.json").write_text("{}")


def change_config(run: Path, change):
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config["options"].update(seed="abc"), "seed is 'abc'; it must be a whole number"),
        (lambda config: config["options"].update(norm="group"), "norm is 'group'; it must be one of"),
        (lambda config: config["options"].update(unknown=1), "unexpected keyword argument 'unknown'"),
        (lambda config: config["recipe"].update(epochs=-3), "epochs is -3; it must be at least 1"),
        (lambda config: config["recipe"].update(annihilate="no"), "annihilate is 'no'"),
        (lambda config: config["recipe"].pop("name"), "missing 1 required keyword-only argument: 'name'"),
        (lambda config: config.pop("options"), "KeyError: 'options'"),
        (lambda config: config.update(format=1), "run has format 1, not 3"),
        (lambda config: config["options"].update(data="gone"), "there is no gone"),
        (lambda config: config["data"].pop("mean"), "KeyError: 'mean'"),
        (lambda config: config["data"].update(sha256="0" * 64), "are not those of run; give --data another path"),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "interpret.py"])
def test_configs(run, script, change, says):
    change_config(run, change)
    if script == "interpret.py":
        finish(run)
    refused(*(["--resume"] if script == "train.py" else []), "run", cwd=run.parent, script=script, says=says)


@pytest.mark.parametrize("content", ["{", "", "[]", "null", "[" * 100_000, "\ud800"])
def test_config_that_is_none(run, content):
    (run / "config.json").write_text(content, errors="surrogatepass")
    refused("--resume", "run", cwd=run.parent, says="config.json is not the config of a run")


def test_options_of_a_run_stay(run):
    cwd = run.parent
    start = "can't change --{} on resume: this run was started with {}"
    refused("--resume", "run", "--epochs", 3, cwd=cwd, says=start.format("epochs", "epochs=1"))
    refused("--resume", "run", "--norm", "layer", cwd=cwd, says=start.format("norm", "norm=batch"))
    refused("--resume", "run", "--seed=7", cwd=cwd, says=start.format("seed", "seed=42"))
    refused("--resume", "run", "--no-flip", cwd=cwd, says=start.format("flip", "flip=True"))
    refused(
        "--resume", "run", "--valid_pct", 0.1, cwd=cwd, says="--valid_pct on resume: this run was started without it"
    )
    refused("--resume", "run", "--name", "other", cwd=cwd, says=start.format("name", "name=run"))
    same = (
        "--norm",
        "batch",
        "--epochs",
        1,
        "--batch_size",
        8,
        "--flip",
        "--data",
        "auto",
        "--device",
        "auto",
        "--precision",
        "auto",
        "--device",
        "cpu",
    )
    assert command("train.py", "--resume", "run", *same, cwd=cwd, drawn=False).returncode == 0


@pytest.mark.slow
def test_images_that_have_moved(run):
    config = json.loads((run / "config.json").read_text())
    images = Path(config["options"]["data"]).expanduser()
    moved = shutil.copytree(images, run.parent / "moved")
    change_config(run, lambda config: config["options"].update(data="gone"))
    again = command("train.py", "--resume", "run", "--data", "moved", cwd=run.parent, drawn=False)
    assert again.returncode == 0
    saved = json.loads((run / "config.json").read_text())["options"]["data"]
    assert Path(saved).expanduser() == moved
    assert command("interpret.py", "run", cwd=run.parent, drawn=False).returncode == 0  # it knows the new place
    moved = moved.rename(run.parent / "moved again")
    refused("run", cwd=run.parent, script="interpret.py", says="there is no ")
    assert command("interpret.py", "run", "--data", moved, cwd=run.parent, drawn=False).returncode == 0


def test_histories(run):
    (run / "history.csv").write_text("")
    finish(run)
    refused("run", cwd=run.parent, script="interpret.py", says="history.csv can't be read as a table of numbers")
    (run / "metrics.json").unlink()
    resumed = command("train.py", "--resume", "run", cwd=run.parent, drawn=False)
    assert resumed.returncode == 0  # the checkpoint has them as well
    assert command("interpret.py", "run", cwd=run.parent, drawn=False).returncode == 0
    (run / "batches.csv").write_bytes(b"\xff,\n\n")
    refused("run", cwd=run.parent, script="interpret.py", says="batches.csv can't be read as a table of numbers")


def test_a_finished_run_says_so(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for arguments in (["--resume", "last"], ["--resume", finished]):
        done = command("train.py", *arguments, cwd=finished.parents[1])
        assert done.returncode == 0 and "is finished" in done.stdout and not done.stderr
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights(run):
    weights, cwd = run / "model.safetensors", run.parent
    refused("run", cwd=cwd, script="interpret.py", says="run is not a finished run; finish it with ")
    finish(run)
    _, about = load_tensors(weights)
    other = ResNet(num_classes=2, width=2)
    save_tensors(weights, other.state_dict(), **about | dict(model=other.args))
    refused("run", cwd=cwd, script="interpret.py", says="run holds the weights of another model; copy those")
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("run", cwd=cwd, script="interpret.py", says="model.safetensors is damaged")
    weights.write_bytes(pickle.dumps(Trap(run / "sprung")))
    refused("run", cwd=cwd, script="interpret.py", says="model.safetensors is damaged")
    weights.unlink()
    refused("run", cwd=cwd, script="interpret.py", says="run holds no model.safetensors; copy it there")


def test_a_checkpoint_is_never_unpickled(run):
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(pickle.dumps(Trap(run / "sprung")))
    refused("--resume", "run", cwd=run.parent, says="no checkpoint in run is intact")


def test_a_checkpoint_of_another_model(run):
    for checkpoint in (run / "checkpoints").iterdir():
        save_tensors(checkpoint, {"model.fc.weight": ResNet().fc.weight}, epochs=1)
    refused("--resume", "run", cwd=run.parent, says="does not belong to this run")


def test_interpreting_no_run(tmp_path):
    refused(cwd=tmp_path, script="interpret.py", says="the following arguments are required: run")
    refused("nowhere", cwd=tmp_path, script="interpret.py", says="is not the folder of a run")
