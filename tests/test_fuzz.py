"""Whatever is in a file: a `UserError` or a result, never another exception, never a hang, never a file outside."""

import io
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar10.data.decode import SIZE, decode_image
from cifar10.data.sources import unpack
from cifar10.errors import UserError
from cifar10.files import save_tensors
from cifar10.interpretation import ImageClassifier
from cifar10.options import Options
from cifar10.recipes import ASSIGNMENT
from cifar10.runs.checkpoint import last_checkpoint
from cifar10.runs.checkpoint import settings as settings_of
from cifar10.runs.run import Run
from model import ResNet
from train import get_dls, get_learner

EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 2**20), st.integers(0, 255)),
        st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.integers(0, 2**20), st.integers(1, 64)),
        st.tuples(st.just("repeat"), st.integers(0, 2**20), st.integers(1, 64)),
        st.tuples(st.just("end"), st.integers(0, 2**20), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits) -> bytes:
    """`content` with bytes set, bits flipped, pieces cut out or repeated, or the end missing."""
    content = bytearray(content)
    for kind, place, value in edits:
        if not content:
            break
        place %= len(content)
        if kind == "set":
            content[place] = value
        elif kind == "flip":
            content[place] ^= 1 << value
        elif kind == "cut":
            del content[place : place + value]
        elif kind == "repeat":
            content[place:place] = content[place : place + value]
        else:
            del content[place:]
    return bytes(content)


def fuzz(examples: int):
    """Try so many inputs, the same in each run; one that takes more than a minute counts as a hang."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=60_000, derandomize=True, database=None, suppress_health_check=quiet
    )


# ---- Archives


def archives() -> dict[str, bytes]:
    files = {f"images/{split}/{label}/{i}.png": bytes(range(60)) for split in "ab" for label in "cd" for i in "12"}
    result = {}
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("images/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "a/c/1.png"
            tar.addfile(link)
        result[f"tar {mode}"] = out.getvalue()
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compression) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        result[f"zip {compression}"] = out.getvalue()
    return result


@pytest.mark.parametrize("kind", archives())
def test_archives(kind):
    whole = archives()[kind]

    @fuzz(300)
    @given(EDITS)
    def check(edits):
        with tempfile.TemporaryDirectory() as place:
            archive, target = Path(place) / "archive", Path(place) / "a/b/target"
            archive.write_bytes(edited(whole, edits))
            target.mkdir(parents=True)
            try:
                unpack(archive, target)
            except UserError as told:
                assert str(archive) in str(told)
            outside = [path for path in Path(place).rglob("*") if not path.is_relative_to(target)]
            assert sorted(outside) == [Path(place) / "a", Path(place) / "a/b", archive]

    check()


# ---- Images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_images(kind, tmp_path):
    out = io.BytesIO()
    Image.linear_gradient("L").resize((40, 20)).convert("RGB").save(out, kind)
    file = tmp_path / "image"

    @fuzz(300)
    @given(EDITS)
    def check(edits):
        file.write_bytes(edited(out.getvalue(), edits))
        try:
            assert decode_image(file).shape == (3, SIZE, SIZE)
        except UserError as told:
            assert str(file) in str(told)

    check()


# ---- Files of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes) -> Path:
    """What there is of a run that is trained but not plotted."""
    learn = get_learner(get_dls(shapes, batch_size=16), width=4)
    run = Run.create(Options(runs_dir=str(tmp_path_factory.mktemp("runs")), name="run"), ASSIGNMENT, learn)
    run.save_weights(learn.model)
    (run.path / "checkpoints").mkdir()
    tensors = {"a": torch.arange(20.0), "b": torch.zeros(3, 4, dtype=torch.uint8), "c": torch.tensor(7)}
    about = settings_of(run)
    for epoch in (0, 1):
        save_tensors(run.path / f"checkpoints/epoch-0000{epoch}.safetensors", tensors, settings=about, epochs=epoch)
    return run.path


def test_configs(run, tmp_path):
    whole = (run / "config.json").read_bytes()

    @fuzz(1000)
    @given(EDITS)
    def check(edits):
        (tmp_path / "config.json").write_bytes(edited(whole, edits))
        try:
            assert Run.open(tmp_path).recipe.epochs > 0
        except UserError as told:
            assert str(tmp_path) in str(told)

    check()


def test_checkpoints(run, tmp_path):
    copy = Run.open(shutil.copytree(run, tmp_path / "run"))
    _, newest = sorted((copy.path / "checkpoints").iterdir())
    whole = newest.read_bytes()

    @fuzz(1000)
    @given(EDITS)
    def check(edits):
        content = edited(whole, edits)
        newest.write_bytes(content)
        assert last_checkpoint(copy)[1]["epochs"] == (1 if content == whole else 0)

    check()


def test_weights(run, tmp_path):
    weights = Path(shutil.copytree(run, tmp_path / "run"), "model.safetensors")
    whole = weights.read_bytes()

    @fuzz(500)
    @given(EDITS)
    def check(edits):
        content = edited(whole, edits)
        weights.write_bytes(content)
        if content == whole:
            ImageClassifier.load(weights, ResNet)
        else:
            with pytest.raises(UserError, match="is damaged"):
                ImageClassifier.load(weights, ResNet)

    check()
