"""No file of a folder is left out in silence, and classes whose names only look alike are told apart."""

import os
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from conftest import make_images
from PIL import Image

from cifar10.data.decode import decode_image
from cifar10.data.folders import split_of
from cifar10.data.listing import list_folder
from cifar10.data.reading import Reading
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from train import get_dls


@pytest.fixture
def folder(tmp_path):
    return make_images(tmp_path / "set", train=4, test=2, classes=("cross", "ring", "bar"))


def counts(folder) -> dict[str, int]:
    """Class → training images."""
    labels = [image.label for image in list_folder(folder).images if image.split == "train"]
    return {label: labels.count(label) for label in sorted({*labels})}


@pytest.mark.parametrize("suffix", ["jfif", "JPG", "jpe", "webp", "tif", "bmp", "gif", "ppm", "tga", "avif", "jp2"])
def test_every_suffix_that_pillow_opens(folder, suffix):
    for file in folder.glob("*/ring/*.png"):
        kind = "JPEG" if suffix in ("jfif", "jpe") else None
        Image.open(file).convert("RGB").save(file.with_suffix(f".{suffix}"), kind)
        file.unlink()
    assert counts(folder) == {"bar": 4, "cross": 4, "ring": 4}
    assert len(ImageTable(folder).pixels) == 18


def test_folders_within_a_class(folder):
    """At any depth, behind links, too; a link that leads back is followed once."""
    ring = folder / "train/ring"
    (ring / "a/b").mkdir(parents=True)
    (ring / "0.png").rename(ring / "a/0.png")
    (ring / "1.png").rename(ring / "a/b/1.png")
    (ring / "a/again").symlink_to(ring, target_is_directory=True)
    elsewhere = folder.parent / "elsewhere"
    (ring / "a/b").rename(elsewhere)
    (ring / "linked").symlink_to(elsewhere, target_is_directory=True)
    assert counts(folder) == {"bar": 4, "cross": 4, "ring": 4}
    dls = get_dls(folder, batch_size=4)
    nested = [i for i, file in enumerate(dls.train.items) if file.parent.name in ("a", "linked")]
    assert len(nested) == 2 and {dls.vocab[dls.train_ds[i][1]] for i in nested} == {"ring"}
    assert {dls.vocab[dls.train.targets[0][i]] for i in nested} == {"ring"}


def test_files_that_are_ignored_are_counted(folder, capsys):
    for name in ("notes.txt", "more.txt", "photo.heic", ".hidden.png", "noname", "deep/x.csv"):
        file = folder / "train/cross" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    (folder / "train/cross/.cache").mkdir()
    (folder / "train/cross/folder.png").mkdir()
    (folder / "train/stray.png").write_text("x")
    (folder / "test/readme.md").write_text("x")
    ImageTable(folder)
    expected = (
        "set: 9 files ignored: 2 .txt, 2 hidden, 1 .heic, 1 without a suffix, 1 .csv, 1 directly in train/,"
        " 1 directly in test/"
    )
    said = capsys.readouterr().out.splitlines()
    assert sorted(said[-1].replace(": ", ", ").split(", ")) == sorted(expected.replace(": ", ", ").split(", "))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("content", [None, "notes.txt", "photo.heic"])
def test_a_class_without_images_is_an_error(folder, split, content):
    (folder / split / "star").mkdir()
    if content:
        (folder / split / "star" / content).write_text("x")
    with pytest.raises(UserError, match=f"has class folders without images: {split}/star.*--skip_classes star"):
        list_folder(folder)
    assert {image.label for image in list_folder(folder, Reading(skip_classes=["star"])).images} == {
        "bar",
        "cross",
        "ring",
    }


def rename(folder, old, new):
    os.rename(folder / "test" / old, folder / "test" / new)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("Ring", "letter case"),
        ("ring ", "spaces at the beginning or end"),
        ("ri-ng", "letter case, spaces, punctuation or similar characters"),
        ("circle", None),
        ("\uff52ing", "letter case, spaces, punctuation or similar characters"),  # a wide r
        ("Ring ", "letter case, spaces, punctuation or similar characters"),
    ],
)
def test_a_class_of_the_test_split_that_only_looks_like_one_of_train(folder, other, difference):
    rename(folder, "ring", other)
    with pytest.raises(UserError) as error:
        list_folder(folder)
    assert f"set/test has classes that train lacks, {other!r}" in str(error.value)
    hint = f"; {other!r} differs from 'ring' by {difference}; rename, remove or add them"
    assert hint in str(error.value) if difference else "differs" not in str(error.value)


def test_unicode_normalization_makes_no_difference(folder):
    name = "caf\u00e9"
    for split, form in (("train", "NFC"), ("test", "NFD")):
        os.rename(folder / split / "ring", folder / split / unicodedata.normalize(form, name))
    table = ImageTable(folder)
    assert table.classes == ["bar", name, "cross"] and table.labels.count(name) == 6
    assert len(get_dls(folder, batch_size=4).valid_ds) == 6


def test_classes_of_train_that_look_alike_are_told(folder, capsys):
    os.rename(folder / "train/ring", folder / "train/Cross")
    os.rename(folder / "test/ring", folder / "test/Cross")
    ImageTable(folder)
    assert "set: the classes 'Cross' and 'cross' differ by letter case only" in capsys.readouterr().out


@pytest.mark.parametrize("unlabelled", ["flat", "one folder"])
@pytest.mark.parametrize("labelled", ["valid", "val"])
def test_labelled_images_beside_unlabelled_ones(folder, capsys, labelled, unlabelled):
    """As Kaggle gives them: the images in test/ have no classes."""
    os.rename(folder / "test", folder / labelled)
    target = folder / "test" / ("unknown" if unlabelled == "one folder" else "")
    target.mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (9, 9)).save(target / f"{i}.png")
    table = ImageTable(folder)
    assert [len(rows) for rows in table.split_rows("test")] == [12, 6] and table.split_names == ["train", "valid"]
    why = "its files have no class folders" if unlabelled == "flat" else "it has none of train's classes"
    assert f"set: test/ is not used: {why}" in capsys.readouterr().out


def test_a_third_split_is_told(folder, capsys):
    make_images(folder.parent / "more", classes=("cross", "ring", "bar"), test=3)
    os.rename(folder.parent / "more/test", folder / "valid")
    os.rename(folder / "test", folder / "val")
    assert ImageTable(folder).split_names == ["train", "valid"]
    assert "set: val/ is not used: valid/ is" in capsys.readouterr().out


def test_only_an_unlabelled_test_split(tmp_path):
    folder = make_images(tmp_path / "set", train=10, test=2, classes=("cross", "ring", "bar"))
    for number, file in enumerate(folder.glob("test/*/*.png")):
        file.rename(folder / f"test/{number}.png")
    for name in ("cross", "ring", "bar"):
        (folder / "test" / name).rmdir()
    with pytest.raises(UserError, match="no test/, valid/ or val/ with class folders"):
        get_dls(folder, batch_size=2)
    assert len(get_dls(folder, batch_size=2, valid="holdout").valid_ds) == 3


def told(folder, capsys) -> str:
    """What is printed about a folder, without the progress bar."""
    capsys.readouterr()
    get_dls(folder, batch_size=2)
    return "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{folder.name}: "))


def test_classes_without_validation_images_are_told(folder, capsys):
    shutil.rmtree(folder / "test/bar")
    assert told(folder, capsys) == "set: there are no test images of bar, so they can't be evaluated"


def test_what_systems_leave_in_folders_is_no_class(folder, capsys):
    for name in ("train/@eaDir", "train/cross/@eaDir", "train/.ipynb_checkpoints", "test/__MACOSX", "train/cross/.old"):
        shutil.copytree(folder / "train/ring", folder / name)
    assert counts(folder) == {"bar": 4, "cross": 4, "ring": 4}
    assert told(folder, capsys) == "set: 5 files ignored: 5 hidden"


def test_folders_beside_the_splits_are_told(folder, capsys):
    for name in ("extra", "more", ".hidden"):
        (folder / name / "ring").mkdir(parents=True, exist_ok=True)
    (folder / "test").rename(folder / "valid")
    assert told(folder, capsys) == "set: not used, beside train/: extra, more"


def test_images_in_folders_within_a_class_are_told(folder, capsys):
    (folder / "train/cross/masks").mkdir()
    for i in range(2):
        (folder / f"train/cross/{i}.png").rename(folder / f"train/cross/masks/{i}.png")
    assert told(folder, capsys) == "set: 2 images in folders within a class, counted as part of it"


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train", "validation", "valid"),
        ("Train", "Test", "test"),
        ("training", "testing", "test"),
        ("seg_train", "seg_test", "test"),
        ("train_images", "val_images", "valid"),
        ("images_train", "images_test", "test"),
        ("flowers-TRAIN", "flowers-VALID", "valid"),
        ("trainset", "testset", "test"),
        ("train2017", "val2017", "valid"),
    ],
)
def test_names_that_mean_a_split(folder, train, other, split):
    os.rename(folder / "train", folder / train)
    os.rename(folder / "test", folder / other)
    table = ImageTable(folder)
    assert table.split_names == ["train", split] and [table.splits.count(name) for name in table.split_names] == [12, 6]


@pytest.mark.parametrize("name", ["contest", "latest", "training_and_test", "trainers", "vale", "retrain"])
def test_names_that_mean_no_split(name):
    assert split_of(name) is None


@pytest.mark.parametrize("root", ["", "set"])
def test_a_folder_in_one_of_its_own_name(folder, root):
    for name in ("train", "test"):
        os.rename(folder / name, folder / "inner")
        (folder / f"seg_{name}").mkdir()
        os.rename(folder / "inner", folder / f"seg_{name}/seg_{name}")
    if root:
        os.rename(folder, folder.with_name("inner"))
        folder.mkdir()
        os.rename(folder.with_name("inner"), folder / root)
    table = ImageTable(folder)
    assert table.classes == ["bar", "cross", "ring"] and table.split_names == ["train", "test"]


def test_splits_without_class_folders_name_the_table(folder):
    for path in [*folder.glob("*/*/*.png")]:
        split, label = path.parent.parent, path.parent.name
        path.rename(split / f"{label}{path.name}")
    for name in ("train", "test"):
        for label in ("bar", "cross", "ring"):
            (folder / name / label).rmdir()
        os.rename(folder / name, folder / f"{name}_images")
    with pytest.raises(
        UserError, match="holds train_images, test_images, but no class folders in train_images; they need"
    ):
        ImageTable(folder)
    (folder / "sample.csv").write_text("id\n")
    rows = [f"{file.stem},{file.stem[:-1]}\n" for file in sorted((folder / "train_images").iterdir())]
    (folder / "train.csv").write_text("id,kind\n" + "".join(rows))
    with pytest.raises(UserError, match=r"if the labels are in train.csv, pass --data (.*train.csv)") as error:
        ImageTable(folder)
    table = ImageTable(str(error.value).rpartition(" ")[2])  # with the only folder that holds all of them
    assert table.classes == ["bar", "cross", "ring"] and len(table.files) == 12


def test_classes_that_are_named_like_splits(folder):
    """They stay possible in the way that the error names."""
    flat = folder / "train"
    os.rename(flat / "ring", flat / "test")
    shutil.rmtree(folder / "test")
    with pytest.raises(UserError, match=r"holds test, but no train/; .* put all folders into one named train, and add"):
        ImageTable(flat)
    assert get_dls(folder, valid="holdout", valid_pct=0.25, batch_size=2).vocab == ["bar", "cross", "test"]
    os.rename(flat / "test", flat / "train_station")
    assert ImageTable(flat).classes == ["bar", "cross", "train_station"]


@pytest.mark.parametrize("annotations", ["annotations/masks", "Masks", "ground_truth", "labels"])
@pytest.mark.parametrize("images", ["images", "JPEGImages"])
def test_images_beside_annotations_are_no_classes(folder, images, annotations):
    flat = folder / "train"
    os.rename(flat / "ring", flat / images)
    (flat / annotations).parent.mkdir(exist_ok=True)
    os.rename(flat / "cross", flat / annotations)
    for place in (folder, flat):
        with pytest.raises(
            UserError, match=rf"holds {images}/ beside .*/, which are no classes; .* CSV file of labels"
        ):
            ImageTable(place)
    (flat / "list.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"pass --data .*list.csv"):
        ImageTable(flat)


def test_masks_beside_photos_are_told(folder, capsys):
    for file in [*folder.glob("train/ring/*.png")]:
        Image.open(file).save(file.with_suffix(".jpg"))
    note = (
        "set: 8 images differ by the suffix of their names only, like 0.jpg and 0.png; remove those that are masks or"
    )
    assert told(folder, capsys) == f"{note} copies"


@pytest.mark.parametrize("numbered", [True, False])
def test_classes_whose_files_have_the_same_names_are_told(folder, capsys, numbered):
    for file in [*folder.glob("train/[cr]*/*.png")]:
        file.rename(file.with_stem(f"{'' if numbered or file.stem in '12' else 'b'}{file.stem}"))
    said = told(folder, capsys)
    assert (
        said == ""
        if numbered
        else said == "set: the files of cross, ring have the same names; are they masks or copies?"
    )


@pytest.mark.parametrize("deeper", [("ring",), ("ring", "cross", "bar")])
def test_a_folder_that_is_one_level_too_high_is_told(folder, capsys, deeper):
    flat = folder / "train"
    for name in deeper:
        for i in range(4):
            (flat / name / f"{i % 2}").mkdir(exist_ok=True)
            (flat / name / f"{i}.png").rename(flat / name / f"{i % 2}/{i}.png")
    ImageTable(flat)
    note = f"train: {4 * len(deeper)} images in folders within a class, counted as part of it"
    hint = f"; if these folders are the classes, pass --data {flat / 'ring'}" if len(deeper) == 1 else ""
    assert f"{note}{hint}\n" in capsys.readouterr().out
    assert ImageTable(flat / "ring").classes == ["0", "1"]


def test_skipped_classes_are_counted(folder, capsys):
    table = ImageTable(folder, skip_classes=["ring", "nothing"])
    assert table.classes == ["bar", "cross"] and table.split_names == ["train", "test"]
    said = capsys.readouterr().out
    assert "set: 6 files ignored: 6 in skipped classes\n" in said
    assert "set: there is no class 'nothing' to skip\n" in said


@pytest.mark.parametrize("layout", ["splits", "flat", "table"])
def test_a_class_to_skip_is_found_and_a_misspelled_one_told(folder, capsys, layout):
    """A shell that completes the name of a folder adds a slash."""
    data = {"splits": folder, "flat": folder / "train", "table": folder / "labels.csv"}[layout]
    wrong = "test" if layout == "splits" else "Bar"  # a split is no class
    paths = [file.relative_to(folder) for file in sorted(folder.rglob("*.png"))]
    (folder / "labels.csv").write_text("image,label\n" + "".join(f"{path},{path.parent.name}\n" for path in paths))
    given = "ring" if layout == "table" else "ring/"
    assert ImageTable(data, skip_classes=[given, wrong]).classes == ["bar", "cross"]
    assert f"there is no class '{wrong}' to skip\n" in capsys.readouterr().out


def test_leaks_and_contradictions_are_told(folder, capsys):
    shutil.copy(folder / "train/ring/1.png", folder / "test/ring/copied.png")
    shutil.copy(folder / "train/bar/2.png", folder / "train/cross/also.png")
    assert told(folder, capsys).splitlines() == [
        "set: 2 of 20 images are identical to images of another class: train/bar/2.png = train/cross/also.png",
        "set: 2 of 20 images are identical to images of another split: train/ring/1.png = test/ring/copied.png",
    ]


def test_a_class_of_photos_that_pillow_does_not_open_is_named_with_them(folder):
    for file in folder.glob("train/ring/*.png"):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"images: train/ring \(ignored files: 4 .heic\); add some or remove them, or"):
        list_folder(folder)


# ---- Files that can't be read


def test_all_broken_images_are_named_at_once(folder):
    for i in range(3):
        (folder / f"train/cross/{i}.png").write_bytes(b"no image")
    (folder / "test/ring/0.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        ImageTable(folder)
    message = str(error.value)
    assert "4 of 18 images can't be used: train/cross/0.png (cannot identify image file), train/cross/1.png" in message
    assert (
        "train/cross/2.png" in message
        and "test/ring/0.png" in message
        and message.endswith("or leave them out with --skip_broken")
    )
    with pytest.raises(UserError) as again:  # from the cache
        ImageTable(folder)
    assert str(again.value) == message
    (folder / "train/cross/0.png").unlink()
    with pytest.raises(UserError, match="3 of 17 images"):
        ImageTable(folder)


def test_at_most_twenty_are_named(tmp_path):
    folder = make_images(tmp_path / "set", train=30)
    for file in folder.glob("train/ring/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        ImageTable(folder)
    assert str(error.value).count("(cannot identify") == 20 and "and 10 more; repair" in str(error.value)


def test_broken_images_are_left_out_on_request(folder, capsys):
    (folder / "train/cross/1.png").write_bytes(b"no image")
    (folder / "train/ring/link.png").symlink_to("nowhere.png")
    table = ImageTable(folder, skip_broken=True)
    assert len(table.pixels) == len(table.files) == len(table.labels) == 17
    said = capsys.readouterr().out
    assert "set: left out, because 2 of 19 images can't be used: train/cross/1.png (cannot identify image file)" in said
    whole = make_images(folder.parent / "whole", train=4, test=2, classes=("cross", "ring", "bar"))
    same = ImageTable(whole)
    for file, pixels in zip(table.files, table.pixels):
        assert (pixels == same.pixels[same.row[whole / file.relative_to(folder)]]).all()
    assert len(get_dls(folder, batch_size=4, skip_broken=True).train_ds) == 11


def test_a_class_that_is_broken_altogether(folder):
    for file in folder.glob("train/ring/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no image of ring in .*set/train can be used"):
        ImageTable(folder, skip_broken=True)


def test_a_split_that_is_broken_altogether(folder):
    for file in folder.glob("test/*/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no test image in .*set can be used; repair or remove them"):
        get_dls(folder, skip_broken=True, batch_size=2)
    assert len(get_dls(folder, skip_broken=True, batch_size=2, valid="holdout", valid_pct=0.25).valid_ds) == 3


def test_names_of_the_greatest_length(tmp_path):
    folder = make_images(tmp_path / ("猫" * 80), train=2, test=2, classes=("x" * 250, "y" * 250))
    table = ImageTable(folder)
    assert table.cache.is_file() and len(os.fsencode(table.cache.name)) < 150


# ---- Metadata


def chunk(kind: bytes, data: bytes, checksum: bool = True) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) + (not checksum))


EXIF = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # orientation 6
METADATA = {
    "exif.webp": b"Exif\0\0junkjunk",
    "exif.jpg": b"Exif\0\0" + EXIF[:-8],
    "exif.png": chunk(b"eXIf", b"junkjunk"),
    "exif-checksum.png": chunk(b"eXIf", EXIF, checksum=False),
    "profile.png": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      20\nzz not hex\n"),
    "text-checksum.png": chunk(b"tEXt", b"a\0b", checksum=False),
    "text-too-long.png": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22))),
    "text-method.png": chunk(b"zTXt", b"a\0\1b"),
    "colors-too-long.png": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**22))),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", [name for name in METADATA if "checksum" not in name])
def test_damaged_metadata_are_ignored_and_counted(folder, capsys, recwarn, name, place):
    image, file = Image.open(folder / "train/ring/0.png"), folder / "train/ring" / name
    options = dict(lossless=True) if name.endswith("webp") else dict(quality=100)
    if name.endswith("png"):
        image.save(file)
        data = file.read_bytes()
        end = data.index(b"IDAT" if place == "before" else b"IEND") - 4
        file.write_bytes(data[:end] + METADATA[name] + data[end:])
        intact = data
    else:
        image.save(file, **options)
        intact = file.read_bytes()
        image.save(file, exif=METADATA[name], **options)
    table = ImageTable(folder)
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    np.testing.assert_array_equal(table.pixels[table.row[file]], decode_image(intact))
    told = f"set: 1 of 19 images have damaged metadata, which is ignored: train/ring/{name}\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in METADATA if "checksum" in name])
def test_metadata_with_a_wrong_checksum(folder, capsys, recwarn, name):
    """Which Pillow compares before the pixels only."""
    test_damaged_metadata_are_ignored_and_counted(folder, capsys, recwarn, name, "before")


def test_orientation_that_is_readable_beside_damaged_metadata(folder):
    """Another EXIF entry that can't be encoded again, and a text with a wrong checksum."""
    upright = decode_image(folder / "train/ring/0.png")
    stored = Image.open(folder / "train/ring/0.png").transpose(Image.Transpose.ROTATE_90)
    stored.save(folder / "turned.png", exif=b"Exif\0\0" + EXIF)
    data = (folder / "turned.png").read_bytes()
    at = data.index(b"IDAT") - 4
    np.testing.assert_array_equal(decode_image(data), upright)
    damaged = data[:at] + chunk(b"tEXt", b"a\0b", checksum=False) + data[at:]
    np.testing.assert_array_equal(decode_image(damaged), upright)


def test_damaged_pixels_are_refused_whatever_the_metadata(folder):
    data = (folder / "train/ring/0.png").read_bytes()
    at = data.index(b"IDAT") - 4
    damaged = chunk(b"tEXt", b"a\0b", checksum=False)
    for broken in (data[: len(data) // 2], data[:at] + damaged + data[at : len(data) // 2]):
        with pytest.raises(UserError, match="can't be used as an image"):
            decode_image(broken)
