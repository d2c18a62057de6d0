"""Images become the pixels that a viewer shows: upright, on white, in the range of values that the files use."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from fastai.vision.all import PILImage, TensorImage, load_learner
from PIL import EpsImagePlugin, Image, ImageOps

from cifar10.data.decode import IMAGE_SUFFIXES, decode_image
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from train import get_dls, get_learner

METHODS = Image.Transpose
# EXIF orientation → how an upright image is stored.
STORED = {
    1: None, 2: METHODS.FLIP_LEFT_RIGHT, 3: METHODS.ROTATE_180, 4: METHODS.FLIP_TOP_BOTTOM, 5: METHODS.TRANSPOSE,
    6: METHODS.ROTATE_90, 7: METHODS.TRANSVERSE, 8: METHODS.ROTATE_270,
}  # fmt: skip


def gradient() -> Image.Image:
    """Different under all eight orientations."""
    y, x = np.mgrid[:32, :32]
    return Image.fromarray(np.stack([8 * x, 8 * y, 4 * (x + y)], axis=2).astype(np.uint8))


def png16(values: np.ndarray, exif: bytes = b"", transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG file with 16 bits per value `(H, W, C)`, as Pillow can't write them in colors."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"".join([
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)),
        chunk(b"eXIf", exif) if exif else b"",
        chunk(b"tRNS", struct.pack(f">{channels}H", *transparent)) if transparent else b"",
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ])  # fmt: skip


def tiff16(values: np.ndarray) -> bytes:
    """A TIFF file with 16 bits per color `(H, W, 3)`."""
    height, width, _ = values.shape
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 136),
        (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, values.size * 2),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
    head = b"II*\0" + struct.pack("<I", 16) + struct.pack("<HHH", 16, 16, 16) + bytes(2)
    return (head + directory).ljust(136, b"\0") + values.astype("<u2").tobytes()


# ---- Orientation


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "16.png", "pil"])
def test_every_exif_orientation(tmp_path, orientation, suffix):
    upright = gradient()
    stored = upright.transpose(STORED[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"turned.{suffix}"
    if suffix == "16.png":
        file.write_bytes(png16(np.asarray(stored).astype(np.uint16) * 257, exif.tobytes().removeprefix(b"Exif\0\0")))
    else:
        options = dict(quality=100, lossless=True) if suffix in ("jpg", "webp") else {}
        stored.save(file, "png" if suffix == "pil" else None, exif=exif, **options)
    decoded = decode_image(Image.open(file) if suffix == "pil" else file)
    difference = np.abs(decoded.astype(int) - np.asarray(upright).transpose(2, 0, 1))
    assert difference.max() <= (12 if suffix == "jpg" else 1)


def test_orientation_comes_before_the_square_is_cut_out(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rising = Image.fromarray(np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[:, None], 48, axis=1)).convert("RGB")
    rising.save(tmp_path / "upright.png")
    rising.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(decode_image(tmp_path / "upright.png"), decode_image(tmp_path / "turned.png"))


# ---- Transparency


def black_right_half(mode: str) -> Image.Image:
    """All pixels are black, and those of the left half are transparent."""
    alpha = np.zeros((32, 32), np.uint8)
    alpha[:, 16:] = 255
    image = Image.new("LA" if mode in ("LA", "La") else "RGBA", (32, 32))
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode) if mode in ("La", "RGBa") else image


def with_transparent_color(mode: str, path: Path):
    """The left half has the one color that the file declares transparent."""
    values = np.zeros((32, 32), np.uint8)
    values[:, :16] = 1
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([0, 0, 0, 1, 1, 1])
        image.save(path, transparency=1)
    elif mode == "1":
        Image.fromarray(values > 0).save(path, transparency=1)
    else:
        image.convert(mode).save(path, transparency=(1, 1, 1) if mode == "RGB" else 1)


def assert_black_on_white(item):
    pixels = decode_image(item)
    assert (pixels[:, :, :16] == 255).all() and (pixels[:, :, 16:] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
def test_transparency_becomes_white(mode):
    assert_black_on_white(black_right_half(mode))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "ico", "gif", "tga", "avif", "jp2"])
def test_transparency_of_file_formats(tmp_path, suffix):
    options = dict(lossless=True) if suffix == "webp" else dict(quality=100) if suffix == "avif" else {}
    black_right_half("RGBA").save(tmp_path / f"icon.{suffix}", **options)
    assert_black_on_white(tmp_path / f"icon.{suffix}")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_color(tmp_path, mode):
    with_transparent_color(mode, tmp_path / "icon.png")
    assert_black_on_white(tmp_path / "icon.png")


def test_transparency_of_16_bits():
    values = np.zeros((32, 32, 4), np.uint16)
    values[:, 16:, 3] = 65535
    for kept in ([0, 3], [0, 1, 2, 3]):
        assert_black_on_white(png16(values[:, :, kept]))
    values[:, :16] = 7
    for channels in (1, 3):
        assert_black_on_white(png16(values[:, :, :channels] // 7 * 7, transparent=(7,) * channels))


def test_half_transparent_pixels_are_mixed_with_white():
    assert decode_image(Image.new("RGBA", (32, 32), (0, 100, 200, 128)))[:, 0, 0].tolist() == [127, 177, 227]


@pytest.mark.parametrize(("width", "height"), [(103, 289), (289, 103), (64, 64)])
def test_ways_to_make_an_image_square(tmp_path, width, height):
    """A defect at the edge is cut away by the first one only; each is Pillow's function with the bilinear filter."""
    pixels = np.random.default_rng(0).integers(0, 100, (height, width, 3), dtype=np.uint8)
    pixels[:20, :20] = 255
    image, size, bilinear = Image.fromarray(pixels), (32, 32), Image.Resampling.BILINEAR
    expected = {
        "crop": ImageOps.fit(image, size, bilinear),
        "squish": image.resize(size, bilinear),
        "pad": ImageOps.pad(image, size, bilinear),
    }
    image.save(tmp_path / "image.png")
    for resize, square in expected.items():
        found = decode_image(tmp_path / "image.png", resize=resize)
        np.testing.assert_array_equal(found, np.asarray(square).transpose(2, 0, 1))
        assert (found.max() > 150) == (resize != "crop" or width == height)
    np.testing.assert_array_equal(decode_image(tmp_path / "image.png"), decode_image(image, resize="crop"))


@pytest.mark.parametrize(("width", "height"), [(700, 10), (4, 300), (2000, 4)])
def test_of_a_very_long_image_a_line_stays(width, height):
    found = decode_image(Image.new("RGB", (width, height), "white"), resize="pad")
    white = (found == 255).all(axis=(0, 2 if width > height else 1))
    assert (found.max(axis=0) > 0).sum() == white.sum() * 32 == 32


def test_sixteen_bits_for_three_colors_together_are_eight_for_each(tmp_path):
    """A BMP file with 5, 6 and 5 bits: what Pillow reads is final."""
    header = struct.pack("<2sIHHI IiiHHIIiiII III", b"BM", 66 + 2 * 64, 0, 0, 66, 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0,
                         0xF800, 0x07E0, 0x001F)  # fmt: skip
    (tmp_path / "dark.bmp").write_bytes(header + struct.pack("<64H", *(((12 << 11) + i % 8) for i in range(64))))
    expected = Image.open(tmp_path / "dark.bmp")
    assert expected.tile[0][3][0] == "BGR;16" and np.asarray(expected).max() == 98
    squared = ImageOps.fit(expected.convert("RGB"), (32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode_image(tmp_path / "dark.bmp"), np.asarray(squared).transpose(2, 0, 1))


def test_each_way_has_a_cache_of_its_own(tmp_path):
    folder = make_images(tmp_path / "set", train=3, test=2)
    for file in folder.rglob("*.png"):
        Image.open(file).resize((40, 80)).save(file)
    tables = {resize: ImageTable(folder, resize=resize) for resize in ("crop", "squish", "pad")}
    assert len({table.hash for table in tables.values()}) == len({table.cache for table in tables.values()}) == 3
    for resize, table in tables.items():
        dls = get_dls(folder, batch_size=2, resize=resize)
        assert dls.train.table.hash == table.hash and table.sizes == [(40, 80)] * 2
        (tmp_path / "other.png").write_bytes(table.files[0].read_bytes())
        learn = get_learner(dls, width=1, path=tmp_path)
        learn.export("exported.pkl")
        for found in (dls, load_learner(tmp_path / "exported.pkl").dls):
            assert torch.equal(found.test_dl([tmp_path / "other.png"]).pixels[0], table.pixels[0])
    with pytest.raises(UserError, match="resize is 'stretch'; it must be one of crop, squish, pad"):
        get_dls(folder, resize="stretch")


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.eps"])
def test_a_program_in_place_of_an_image_is_not_run(tmp_path, monkeypatch, name):
    """Pillow would start Ghostscript for PostScript, whatever the suffix is."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started Ghostscript"))
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n")
    for item in (tmp_path / name, (tmp_path / name).read_bytes(), io.BytesIO((tmp_path / name).read_bytes())):
        with pytest.raises(UserError, match="its format is EPS, save it as PNG"):
            decode_image(item)


# ---- The range of values


def table_of(tmp_path, *images) -> tuple[ImageTable, list[int]]:
    """A data set of 2 × 3 training images, of which the given ones, bytes or PIL images, are the first."""
    folder = tmp_path / "set"
    if not folder.exists():
        make_images(folder, train=3, test=2)
    files = [folder / f"train/cross/{i}.png" for i in range(len(images))]
    for file, image in zip(files, images):
        file.write_bytes(image) if isinstance(image, bytes) else image.save(file, "tiff")
    table = ImageTable(folder)
    return table, [table.row[file] for file in files]


def gray(values, dtype) -> Image.Image:
    """The first rows have the given values, the rest the first one."""
    image = np.full((32, 32), values[0], dtype)
    for row, value in enumerate(values):
        image[row] = value
    return Image.fromarray(image)


@pytest.mark.parametrize(
    ("dtype", "values", "pixels"),
    [
        (np.uint16, [20, 250], [20, 250]),  # 8 bits stored in 16
        (np.uint8, [20, 250], [20, 250]),
        (np.uint16, [0, 4000], [0, 249]),  # a camera's 12 bits
        (np.uint16, [257, 65535], [1, 255]),
        (np.uint16, [0, 1], [0, 255]),  # a mask
        (np.int32, [20, 250], [20, 250]),
        (np.int32, [-1000, 0, 3000], [0, 64, 255]),  # computer tomography
        (np.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
        (np.float32, [20.0, 250.0], [20, 250]),
        (np.float32, [0.0, 1e-3], [0, 255]),
        (np.float32, [-1.0, 0.0, 1.0], [0, 128, 255]),
        (np.float32, [np.nan, 0.0, 1.0], [0, 0, 255]),
    ],
)
def test_the_range_that_files_use(tmp_path, dtype, values, pixels):
    table, (row,) = table_of(tmp_path, gray(values, dtype))
    assert table.pixels[row, :, : len(values), 5].tolist() == [pixels] * 3


def test_one_range_for_the_whole_data_set(tmp_path):
    """An image with low values stays darker than one with high values, and a file predicted later is treated alike."""
    table, (dark, bright) = table_of(tmp_path, gray([0, 255], np.uint16), gray([0, 4095], np.uint16))
    assert table.ranges == {"integer": (0, 4095)}
    assert table.pixels[dark].max() == 16 and table.pixels[bright].max() == 255
    again = ImageTable(tmp_path / "set")  # from the cache
    assert again.ranges == table.ranges and torch.equal(again.pixels, table.pixels) and again.hash == table.hash
    np.testing.assert_array_equal(decode_image(table.files[dark], table.ranges), table.pixels[dark])
    assert decode_image(table.files[dark]).max() == 255


def test_whole_numbers_and_floats_have_ranges_of_their_own(tmp_path):
    table, (whole, floats) = table_of(tmp_path, gray([0, 1023], np.uint16), gray([0, 1.0], np.float32))
    assert table.ranges == {"float": (0, 1), "integer": (0, 1023)}
    assert table.pixels[whole].max() == table.pixels[floats].max() == 255


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_colors_of_16_bits(tmp_path, top):
    values = np.zeros((32, 32, 3), np.uint16)
    values[:16] = [top, top // 2, 0]
    table, (row,) = table_of(tmp_path, png16(values))
    assert table.pixels[row, :, 0, 0].tolist() == [255, 127, 0] and table.pixels[row].float().mean() < 65
    if top > 255:  # of TIFF, Pillow reads the higher half of the bits
        table, (row,) = table_of(tmp_path, tiff16(values))
        assert (table.pixels[row, :, 0, 0].int() - torch.tensor([255, 127, 0])).abs().max() <= 16


def test_images_of_one_color_are_named(tmp_path, capsys):
    table_of(tmp_path, tiff16(np.full((32, 32, 3), np.arange(96).reshape(32, 3) % 256, np.uint16)))  # all lost
    assert "set: 1 of 10 images show one color only: train/cross/0.png" in capsys.readouterr().out
    black = Image.new("RGB", (40, 40))
    with pytest.raises(UserError, match=r"6 of 10 images show one color only: train/cross/0.png, .*; all are the same"):
        for file in (tmp_path / "set/train").rglob("*.png"):
            black.save(file)
        ImageTable(tmp_path / "set")


@pytest.mark.parametrize(
    ("item", "color"),
    [
        (np.full((9, 9, 3), (10, 20, 30), np.uint8), (10, 20, 30)),
        (np.full((9, 9), 100), (100, 100, 100)),
        (np.full((9, 9), True), (255, 255, 255)),
        (np.full((9, 9, 3), (0.0, 0.2, 0.4)), (0, 51, 102)),
        (np.full((9, 9, 4), (0, 0, 0, 1), np.uint8), (254, 254, 254)),
        (torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 9, 9), (10, 20, 30)),
        (torch.tensor([0.0, 0.2, 0.4]).view(3, 1, 1).expand(3, 9, 9), (0, 51, 102)),
        (torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1).expand(3, 9, 9), (10, 20, 30)),
        (PILImage.create(np.full((9, 9, 3), 7, np.uint8)), (7, 7, 7)),
    ],
)
def test_arrays_and_tensors(item, color):
    pixels = decode_image(item)
    assert pixels.shape == (3, 32, 32) and (pixels == np.array(color).reshape(3, 1, 1)).all()


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (torch.full((3, 9, 9), -1.0), "this Tensor can't be used as an image (its values must be from 0 to 255"),
        (torch.zeros(2, 3, 9, 9), "its shape is (2, 3, 9, 9)"),
        (np.zeros((0, 9)), "its shape is (0, 9)"),
        (Image.new("RGB", (3, 9)), "too small, 3×9 pixels"),
        ("nowhere.png", "nowhere.png can't be used as an image (No such file or directory); repair or remove it"),
        (b"not an image", "this bytes can't be used as an image (cannot identify image file"),
    ],
)
def test_what_is_no_image(item, says):
    with pytest.raises(UserError) as error:
        decode_image(item)
    assert says in str(error.value)


def test_suffixes():
    assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"} <= IMAGE_SUFFIXES
    assert not {".txt", ".h5", ".mpg", ".pdf", ".svg", ""} & IMAGE_SUFFIXES


def test_floats_that_overshoot_by_resizing():
    values = np.linspace(-1e-7, 1.05, 32, dtype=np.float32)[None].repeat(32, 0)
    for item in (values, Image.fromarray(values), torch.tensor(values)):
        pixels = decode_image(item)[0, 0]
        assert pixels[0] == 0 and pixels[-1] == 255 and pixels[16] == round(255 * float(values[0, 16]))


def test_a_wrong_value_that_darkens_everything_else_is_told(tmp_path, capsys):
    table_of(tmp_path, gray([0, 255, 65535], np.uint16), gray([0, 255], np.uint16), gray([0, 250], np.uint16))
    expected = "2 of 10 images use less than a tenth of the range from 0 to 65535: train/cross/1.png, train/cross/2.png"
    assert expected in capsys.readouterr().out


def test_an_alpha_channel_that_is_not_used():
    """It is zero everywhere, so that a viewer would show nothing at all."""
    image = gradient().convert("RGBA")
    image.putalpha(0)
    np.testing.assert_array_equal(decode_image(image), np.asarray(gradient()).transpose(2, 0, 1))


def tiff_of(values: np.ndarray, **tags) -> bytes:
    """A TIFF file of gray values with tags of its own: 262 is 0 if white is, 339 the kind of numbers."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "tiff", tiffinfo={int(tag[1:]): value for tag, value in tags.items()})
    kind = struct.Struct("<HHII")
    return file.getvalue().replace(kind.pack(339, 3, 1, 2), kind.pack(339, 3, 1, tags.get("t339", 2)))


def test_kinds_of_tiff_that_pillow_misreads():
    values = np.tile(np.linspace(0, 2**32 - 1, 32), (32, 1)).astype(np.uint32).view(np.int32)
    ramp = decode_image(tiff_of(values, t339=1))[0, 0].astype(int)
    assert (np.diff(ramp) > 0).all() and ramp[0] == 0 and ramp[-1] == 255
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    for data in (tiff_of(deep, t262=0), tiff_of(deep.astype(np.uint8), t339=2)):
        with pytest.raises(UserError, match="this kind of TIFF file is not supported, save it as PNG"):
            decode_image(data)


@pytest.mark.parametrize("kind", ["16 bits", "float", "transparent", "turned"])
def test_new_files_become_the_same_pixels_as_those_of_the_data_set(tmp_path, kind):
    """Whatever way they come: as a path, its text, relative, as bytes, or to an exported Learner."""
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "16 bits": gray([300, 4000], np.uint16), "float": gray([0.0, 0.9], np.float32),
        "transparent": black_right_half("RGBA"), "turned": gradient(),
    }[kind]  # fmt: skip
    made.save(tmp_path / "new.tif", **(dict(exif=exif) if kind == "turned" else {}))
    table, (row,) = table_of(tmp_path, (tmp_path / "new.tif").read_bytes())
    dls = get_dls(table, bs=2)
    learn = get_learner(dls, width=1, precision="fp32", path=tmp_path)
    expected = learn.predict(table.files[row])[2]
    learn.export("exported.pkl")
    exported = load_learner(tmp_path / "exported.pkl")
    file = tmp_path / "new.tif"
    for item in (file, str(file), os.path.relpath(file), file.read_bytes()):
        for each in (learn, exported):
            torch.testing.assert_close(each.predict(item)[2], expected)
            assert torch.equal(each.dls.test_dl([item]).pixels[0], table.pixels[row])


def test_predictions_of_arrays_and_tensors(tmp_path):
    dls = get_dls(make_images(tmp_path / "set", train=3, test=2), bs=2)
    learn = get_learner(dls, width=1, precision="fp32")
    values = np.asarray(gradient())
    expected = learn.predict(gradient())[2]
    channels_first = torch.tensor(values.transpose(2, 0, 1))
    for item in (values, values / 255, values.astype(int), channels_first, channels_first / 255, torch.tensor(values)):
        torch.testing.assert_close(learn.predict(item)[2], expected)
    torch.testing.assert_close(learn.predict(TensorImage(channels_first / 255))[2], expected)
