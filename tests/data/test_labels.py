"""Tables of labels as people save them: separators, encodings, columns, ids, links, names in other Unicode forms."""

import os
import shlex
import shutil
import unicodedata

import pytest
from conftest import make_images

from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from train import get_dls

SPLITS = ["train"] * 4 + ["valid", "val", "Validation", "TEST"]


@pytest.fixture
def folder(tmp_path):
    """`img/train/<class>/<number>.png`, eight of each of two classes."""
    make_images(tmp_path / "set/img", train=8, test=0)
    return tmp_path / "set"


def rows_of() -> list[tuple[str, str]]:
    """(path, class) of each image."""
    return [(f"img/train/{label}/{i}.png", f"a {label}") for label in ("cross", "ring") for i in range(8)]


def plain() -> str:
    return "".join(f"{path},{label}\n" for path, label in rows_of())


def check(table, classes=("a cross", "a ring"), **options) -> ImageTable:
    """The images of a table of all images, each with the right class."""
    found = ImageTable(table, **options)
    assert found.classes == [*classes] and len(found.files) == 16
    for file, label in zip(found.files, found.labels):
        assert label == classes[file.parent.name == "ring"]
    return found


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("semicolons.csv", "image;label", "{0};{1}"),
        ("tabs.tsv", "image\tlabel", "{0}\t{1}"),
        ("upper.CSV", "Image|Label", "{0}|{1}"),
        ("spaces.csv", " image ,  label ", " {0} , {1} "),
        ("order.csv", "label,image", "{1}, {0}"),
        ("decimals.csv", "image;size;label", '{0};"1,5";{1}'),
        ("blank.csv", "\n\nimage,label\n\n", "{0},{1}\n \n"),
        ("quoted.csv", '"image","label"', '"{0}","{1}"'),
    ],
)
def test_separators_and_spaces(folder, name, header, row):
    (folder / name).write_text("\n".join([header, *(row.format(*cells) for cells in rows_of())]) + "\n")
    check(folder / name)


def test_aligned_columns_without_a_header(folder, capsys):
    """Of several columns that may be the classes, one must be named, and the error says how."""
    rows = [f"img/train/{label}/{i}.png  {i % 2 / 3:.3f}   {label}" for label in ("cross", "ring") for i in range(8)]
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(
        UserError, match=r"has the columns 1, 2, 3; say which one names the classes, like --data"
    ) as error:
        ImageTable(folder / "labels.csv")
    options = shlex.split(str(error.value).partition("like ")[2])
    assert options == ["--data", str(folder / "labels.csv"), "--image_column", "1", "--label_column", "3"]
    check(options[1], ("cross", "ring"), image_column="1", label_column="3")
    assert "set: images: column 1, classes: column 3\n" in capsys.readouterr().out
    assert ImageTable(folder / "labels.csv", label_column="2").classes == ["0.000", "0.333"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le"])
def test_encodings_with_a_mark(folder, encoding):
    text = ("\ufeff" if encoding.endswith(("be", "le")) else "") + "image,label\n" + plain().replace("a ring", "größe")
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    check(folder / "labels.csv", ("a cross", "größe"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp932"])
def test_other_encodings_are_refused(folder, encoding):
    text = "image,label\n" + plain().replace("a ring", "größe" if encoding == "latin-1" else "緑")
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=r"labels.csv is not in UTF-8; save it as UTF-8"):
        ImageTable(folder / "labels.csv")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_forms_of_paths(folder, form):
    """Of a file and of a folder, as macOS, archives and spreadsheets write them."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (folder / "img/train").rename(folder / "img" / unicodedata.normalize(other, "größe"))
    for file in [*folder.glob("img/*/*/*.png")]:
        file.rename(file.with_stem(unicodedata.normalize(form, f"é{file.stem}")))
    text = "".join(f"img/größe/{label}/é{i}.png,a {label}\n" for label in ("cross", "ring") for i in range(8))
    for written in ("NFC", "NFD"):
        (folder / "labels.csv").write_text(unicodedata.normalize(written, f"image,label\n{text}"))
        check(folder / "labels.csv")


def test_columns_of_other_names(folder, capsys):
    (folder / "labels.csv").write_text(
        "id,file_name,category\n" + "".join(f"{i},{p},{c}\n" for i, (p, c) in enumerate(rows_of()))
    )
    check(folder / "labels.csv")
    assert "set: images: column file_name, classes: column category\n" in capsys.readouterr().out


def test_ids_without_a_suffix_in_a_folder_beside_the_table(folder, capsys):
    for file in [*folder.glob("img/train/*/*.png")]:
        file.rename(folder / "img" / f"{file.parent.name}.{file.name}")
    (folder / "empty").mkdir()
    rows = [f"{label}.{i},{number}" for number, label in enumerate(("cross", "ring")) for i in range(8)]
    (folder / "train.csv").write_text("\n".join(["id_code,diagnosis", *rows]) + "\n")
    table = ImageTable(folder / "train.csv")
    assert table.classes == ["0", "1"] and {
        (file.name[0], label) for file, label in zip(table.files, table.labels)
    } == {
        ("c", "0"),
        ("r", "1"),
    }
    assert "set: images: column id_code in img/, classes: column diagnosis\n" in capsys.readouterr().out
    (folder / "img").rename(folder.parent / "elsewhere")
    with pytest.raises(UserError, match=r"has the columns id_code, diagnosis; say which one names existing images"):
        ImageTable(folder / "train.csv")
    assert ImageTable(folder / "train.csv", images=str(folder.parent / "elsewhere")).hash == table.hash
    (folder.parent / "elsewhere/ring.0.jpg").write_bytes((folder.parent / "elsewhere/ring.0.png").read_bytes())
    with pytest.raises(
        UserError, match=r"line 10: id_code is 'ring.0'; there are images of this name with several suff"
    ):
        ImageTable(folder / "train.csv", images=str(folder.parent / "elsewhere"))


def test_several_folders_with_the_images(folder):
    make_images(folder / "other", train=8, test=0)
    rows = [f"train/{label}/{i}.png,{label}" for label in ("cross", "ring") for i in range(8)]
    (folder / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    with pytest.raises(UserError, match=r"several folders hold the images; add --images .*/img or another"):
        ImageTable(folder / "labels.csv")
    assert {file.parents[2].name for file in ImageTable(folder / "labels.csv", images=str(folder / "img")).files} == {
        "img"
    }


def test_a_split_under_several_names(folder):
    """Also if the column has another name: it is not taken for the classes."""
    splits = SPLITS * 2
    for name in ("split", "part"):
        rows = [f"{path},{label},{split}\n" for (path, label), split in zip(rows_of(), splits)]
        (folder / "labels.csv").write_text(f"image,kind,{name}\n" + "".join(rows))
        table = check(folder / "labels.csv")
        assert [len(rows) for rows in table.split_rows("test")] == [8, 6, 2] and table.split_names == [
            "train",
            "valid",
            "test",
        ]
    assert check(folder / "labels.csv", split_column="part").hash == table.hash
    assert [len(dl.dataset) for dl in get_dls(folder / "labels.csv", batch_size=2).loaders] == [8, 6, 2]


@pytest.mark.parametrize("name", ["img/image.png", "masks/label.png", "split.png"])
def test_a_photo_with_the_name_of_a_column_does_not_make_the_header_a_row(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "img/train/ring/0.png", folder / name)
    rows = [f"{path},{label},{split}\n" for (path, label), split in zip(rows_of(), SPLITS * 2)]
    (folder / "labels.csv").write_text("image,label,split\n" + "".join(rows))
    assert not check(folder / "labels.csv").flat


def test_a_column_that_was_typed_is_no_photo_of_that_name(folder):
    shutil.copy(folder / "img/train/ring/0.png", folder / "photo.png")
    (folder / "labels.csv").write_text("photo,kind\n" + plain())
    check(folder / "labels.csv", image_column="photo", label_column="kind")


@pytest.mark.parametrize("name", ["label", "Class", "image", "split"])
def test_a_class_with_the_name_of_a_column_does_not_make_the_first_row_a_header(folder, name):
    (folder / "labels.csv").write_text(plain().replace("a cross", name))
    for options in ({}, dict(image_column="1", label_column="2")):
        found = ImageTable(folder / "labels.csv", **options)
        assert found.classes == sorted([name, "a ring"]) and len(found.files) == 16


def test_a_table_of_test_images_only_is_not_split(folder, capsys):
    """As for interpret.py; which names of a split there are does not matter."""
    for split in ("test", "Val"):
        rows = [f"{path},{label},{split}\n" for path, label in rows_of()]
        (folder / "labels.csv").write_text("image,label,split\n" + "".join(rows))
        table = check(folder / "labels.csv")
        assert table.flat and table.split_names == ["train"]
        expected = f"all images are in the split {'test' if split == 'test' else 'valid'}, so they count as not split"
        assert expected in capsys.readouterr().out
    rows[0] = rows[0].replace("a cross,Val", "other,train")
    (folder / "labels.csv").write_text("image,label,split\n" + "".join(rows))
    with pytest.raises(UserError, match="holds no images in train"):  # as without the option
        ImageTable(folder / "labels.csv", skip_classes=["other"])
    (folder / "labels.csv").write_text("image,label,split\n" + "".join(rows).replace("Val", "train"))
    with pytest.raises(UserError, match="beside train/; add one or use --valid holdout"):
        get_dls(folder / "labels.csv")


@pytest.mark.parametrize("kind", ["table", "archive", "folder"])
@pytest.mark.parametrize("hops", [1, 2])
def test_a_link_counts_by_its_own_place_and_name(folder, tmp_path, kind, hops):
    """As in a content store, where files have a checksum for a name."""
    (tmp_path / "store").mkdir()
    stored, name = tmp_path / "store/8081ab", {"table": "labels.csv", "archive": "photos.zip", "folder": "photos"}[kind]
    if kind == "table":
        stored.write_text("image,label\n" + plain())
    elif kind == "folder":
        (folder / "img/train").rename(stored)
    else:
        os.rename(shutil.make_archive(str(tmp_path / "a"), "zip", folder / "img/train"), stored)
    for number in range(hops):
        link = folder / name if number == hops - 1 else tmp_path / f"store/{number}"
        link.symlink_to(os.path.relpath(stored, link.parent))
        stored = link
    table = ImageTable(folder / name)
    assert len(table.files) == 16 and table.name.startswith(
        {"table": "set", "archive": "photos", "folder": "photos"}[kind]
    )


@pytest.mark.parametrize(
    ("place", "table", "name"),
    [
        ("data", "birds.csv", "birds"),
        ("birds", "train.csv", "birds"),
        ("Data", "train.csv", "Data"),
        ("a", "b.csv", "a"),
    ],
)
def test_the_name_of_a_table_in_a_folder_whose_name_says_nothing(folder, place, table, name):
    folder.rename(folder.with_name(place))
    (folder.with_name(place) / table).write_text("image,label\n" + plain())
    assert ImageTable(folder.with_name(place) / table).name == name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("image,label\n{0}img/x\0.png,a ring\n", "line 18 holds a NUL byte; remove it"),
        ("image,label\n{0},a ring\n", "line 18: image is ''; it is empty"),
        ("image,label\n{0}x.png,\n\ny.png,\n", "line 18 and 1 more: label is ''; it is empty"),
        ("\n\nimage,label\n\n{0}\nx.png,\n", "line 22: label is ''; it is empty"),
        ('image,label\n{0}\n"x\ny.png",\n', "line 20: label is ''; it is empty"),
        ("image,label,split\n{1}x.png,a,dev\n", "line 18: split is 'dev'; it must be train, valid or test"),
        ("image,label,split\n{1}x.png,a,\n", "line 18: split is ''; it must be train, valid or test"),
        ("image,label\n{0}img/train/ring/0,a ring\n", "line 18: image is 'img/train/ring/0'; it is there twice"),
        ("image,label,label\n{1}", "has the columns image, label, label; give each another name"),
        ("image,label\n{0}x.png,a,ring\n", r"rows longer than its first line; .*\(line 18\)"),
        ("image\nx.png\n", "has the columns image; say which one names the classes"),
        ("\n \n", "can't be read as a table"),
        ("image,label\n", "holds no images"),
        ("image,label\n{0}" + "x" * 2**18 + ",a\n", "can't be read as a table"),
        ("image,label\n{0}" + "x" * 999 + ",a\n", "1 of 17 images can't be used"),
    ],
)
def test_wrong_rows(folder, content, says):
    rows = plain()
    (folder / "labels.csv").write_text(content.format(rows, rows.replace("\n", ",train\n")))
    with pytest.raises(UserError, match=says):
        ImageTable(folder / "labels.csv")


@pytest.mark.parametrize("option", ["image_column", "label_column", "split_column"])
def test_a_column_that_is_not_there(folder, option):
    (folder / "labels.csv").write_text("image,label\n" + plain())
    with pytest.raises(UserError, match=r"has no column 'Kind'; its columns are image, label"):
        ImageTable(folder / "labels.csv", **{option: "Kind"})


def test_skipped_classes_of_a_table(folder, capsys):
    (folder / "labels.csv").write_text("image,label\n" + plain() + "missing.png,junk\nother.png,\n")
    check(folder / "labels.csv", skip_classes=["junk", ""])
    assert "set: 2 files ignored: 2 in skipped classes\n" in capsys.readouterr().out
