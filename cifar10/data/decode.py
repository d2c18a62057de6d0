"""One image → uint8 pixels: orientation, transparency, range of values, size."""

import io
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.vision.all import num_cpus, parallel
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_png

from cifar10.errors import UserError
from cifar10.text import printable

SIZE = 32  # pixels along each side, as in CIFAR-10
MIN_SIDE = 4  # pixels; a smaller image is a mistake
OVERSHOOT = 0.1  # how far resizing may take floats out of the range from 0 to 1
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
Image.init()
# What Pillow only recognizes, videos, and vector graphics: PostScript is a program, which Ghostscript would run.
UNSUPPORTED = {"BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS"}
FORMATS = set(Image.OPEN) - UNSUPPORTED
IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def pad(image: Image.Image, size: tuple[int, int], method: int) -> Image.Image:
    """`ImageOps.pad`, but of a very long image a line stays, where Pillow would round it to nothing."""
    longest, shortest = max(image.size), min(image.size)
    if round(shortest / longest * size[0]) == 0:
        image = image.resize((size[0], 1) if image.width == longest else (1, size[1]), method)
    return ImageOps.pad(image, size, method)


# How an image becomes square, by the names of fastai's ResizeMethod: the central square, the whole image out of
# proportion, or the whole image between black bars.
RESIZE: dict[str, Callable[..., Image.Image]] = {
    "crop": ImageOps.fit,
    "squish": Image.Image.resize,
    "pad": pad,
}

# "integer" or "float" → the values that become 0 and 255. Only images with more than 8 bits per value need it.
ValueRanges = Mapping[str, tuple[float, float]]


class Decoded(NamedTuple):
    """What a file holds."""

    pixels: np.ndarray  # uint8 (3, size, size)
    used: tuple[str, float, float] | None  # the `used_range` of an image with more than 8 bits per value
    size: tuple[int, int]  # width and height before it was resized
    damaged: bool  # metadata that can't be read, like a part of EXIF


def decode_image(item, ranges: ValueRanges | None = None, size: int = SIZE, resize: str = "crop") -> np.ndarray:
    """A path, file, PIL image, array or tensor → uint8 `(3, size, size)` in RGB.

    The image is turned upright as its EXIF orientation says, put on a white background if it is transparent, and made
    square by one of `RESIZE`. Values of more than 8 bits are scaled by the `ranges` of the data set, or by the image's
    own. Arrays are `(H, W)` or `(H, W, C)`, tensors `(H, W)` or `(C, H, W)`, from 0 to 255, or floats from 0
    to 1. Raises `UserError` for what is not an image, is damaged, or has a side of less than `MIN_SIDE` pixels.
    """
    try:
        return decode(item, ranges or {}, size, resize).pixels
    except ValueError as why:
        name = printable(item) if isinstance(item, (str, Path)) else f"this {type(item).__name__}"
        raise UserError(f"{name} can't be used as an image ({why}); repair or remove it") from None


def decode(item, ranges: ValueRanges, size: int, resize: str) -> Decoded:
    """Like `decode_image`, but it raises `ValueError`."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            image, used = read_image(item), None
        if isinstance(image, np.ndarray):
            used = used_range(image)
            image = to_8_bits(image, *(ranges.get(used[0]) or full_range(*used)))
        if image.has_transparency_data:
            image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            if image.getchannel("A").getextrema() != (0, 0):  # otherwise nothing at all would be seen
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as reason:  # Pillow's plugins fail on damaged files in many ways
        # Without the name, which Pillow's message may hold again.
        why = getattr(reason, "strerror", None) or str(reason).replace(f" {str(item)!r}", "") or type(reason).__name__
        raise ValueError(printable(why)) from None
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"too small, {image.width}×{image.height} pixels")
    found = image.size
    if found != (size, size):
        image = RESIZE[resize](image, (size, size), Image.Resampling.BILINEAR)
    damaged = any(warning.category is UserWarning for warning in told)
    return Decoded(np.array(image).transpose(2, 0, 1), used, found, damaged)


def decode_files(files: list[Path], ranges: ValueRanges, size: int, resize: str) -> list:
    """What `decode` returns for each file, or why it can't be used, on all cores."""
    # Starting processes takes longer than a few images.
    many = len(files) > 100 and len(files) * size**2 > 4_000 * SIZE**2
    workers, chunk = (num_cpus(), min(100, len(files) // (4 * num_cpus()))) if many else (0, 1)
    settings = dict(n_workers=workers, chunksize=max(1, chunk), progress=many)
    return list(parallel(decode_or_reason, files, ranges=dict(ranges), size=size, resize=resize, **settings))


def decode_or_reason(file: Path, ranges: ValueRanges, size: int, resize: str) -> Decoded | str:
    try:
        return decode(file, ranges, size, resize)
    except ValueError as why:
        return str(why)


def read_image(item) -> Image.Image | np.ndarray:
    """An upright image with 8 bits per value, or the values of one that has more: `(H, W, C)`, C from 1 to 4.

    Damaged metadata are ignored with a `UserWarning`, as Pillow does in most cases.
    """
    if isinstance(item, (Tensor, np.ndarray)):
        return read_array(item)
    try:
        return read_file(item)
    except Exception:
        with suppress(Exception):
            image = read_file(without_text(item))
            warnings.warn("damaged text", stacklevel=1)
            return image
        raise


def read_file(item) -> Image.Image | np.ndarray:
    """`read_image` for an image that is not an array."""
    image = item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
    if image.format in UNSUPPORTED:  # whatever the suffix of the file
        raise ValueError(f"its format is {image.format}, save it as PNG")
    modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    # Pillow keeps 8 of a color's 16 bits. "BGR;16" is another thing: 16 bits for three colors together.
    deep = any(";16" in mode and "BGR;16" not in mode for mode in modes)
    if deep and image.format == "PNG":
        return read_16_bit_png(image)
    tags = getattr(image, "tag_v2", {})  # only TIFF files have them
    bits = tags.get(ExifTags.Base.BitsPerSample, (8,))[0]
    signed = tags.get(ExifTags.Base.SampleFormat, (1,))[0] == 2
    white_is_0 = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    if (bits == 8 and signed) or (bits > 8 and white_is_0):
        raise ValueError("this kind of TIFF file is not supported, save it as PNG")
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)[..., None]
        return values.view(np.uint32) if values.dtype == np.int32 and tags and not signed else values
    if deep:
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")).astype(np.uint16) * 257
    return image


def upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF orientation says, if that can be read."""
    image.load()  # damaged pixels are an error
    try:
        return ImageOps.exif_transpose(image)
    except Exception as reason:
        warnings.warn(f"damaged EXIF: {reason}", stacklevel=1)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # Pillow remembers what it could read
    image = image.copy()
    image.info = {key: value for key, value in image.info.items() if "exif" not in key}
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


def without_text(item: str | Path | bytes) -> bytes:
    """A PNG file without its texts and its color profile, which pixels don't depend on, and without damaged EXIF."""
    data = item if isinstance(item, bytes) else Path(item).read_bytes()
    if not data.startswith(PNG):
        raise ValueError("not a PNG file")
    kept, rest = [PNG], data.removeprefix(PNG)
    while rest:
        end = 12 + int.from_bytes(rest[:4])  # a length, a kind, as many bytes, and a checksum
        chunk, rest = rest[:end], rest[end:]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf") or (chunk[4:8] == b"eXIf" and intact):
            kept.append(chunk)
    return b"".join(kept)


def read_array(item: Tensor | np.ndarray) -> Image.Image | np.ndarray:
    """Like `read_image`. Raises `ValueError` for a shape or for values that no image has."""
    values = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and isinstance(item, Tensor) and len(values) <= 4:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in (1, 2, 3, 4) or not values.size:
        raise ValueError(f"its shape is {tuple(item.shape)}")
    if not np.isfinite(values).all() or values.min() < -OVERSHOOT:
        raise ValueError("its values must be from 0 to 255, or floats from 0 to 1")
    if values.dtype.kind in "fb":
        values = (values * (255.0 if values.max() <= 1 + OVERSHOOT else 1.0)).clip(0, 255).round()
    return as_image(values) if values.max() <= 255 else values


def read_16_bit_png(image: Image.Image) -> np.ndarray:
    """All 16 bits of a PNG file, for whose colors Pillow has no mode."""
    file: io.BufferedIOBase = image.fp  # type: ignore
    file.seek(0)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    values = decode_png(data, ImageReadMode.UNCHANGED, apply_exif_orientation=True).permute(1, 2, 0).numpy()
    if "transparency" in image.info:  # the one color that is transparent
        transparent = (values == image.info["transparency"]).all(axis=2)
        values = np.dstack([values, np.where(transparent, 0, 65535).astype(np.uint16)])
    return values


def as_image(values: np.ndarray) -> Image.Image:
    """`(H, W, C)` from 0 to 255: gray, gray and alpha, RGB, or RGB and alpha."""
    return Image.fromarray(np.ascontiguousarray(values.squeeze(2) if values.shape[2] == 1 else values, dtype=np.uint8))


def used_range(values: np.ndarray) -> tuple[str, float, float]:
    """The kind of the values, and the lowest and the highest that a color has."""
    n_colors = 1 if values.shape[2] <= 2 else 3  # the channel after them is alpha
    colors = values[..., :n_colors].astype(float)
    colors = colors[np.isfinite(colors)]
    kind = "float" if values.dtype.kind == "f" else "integer"
    return kind, float(colors.min(initial=np.inf)), float(colors.max(initial=-np.inf))


def full_range(kind: str, lowest: float, highest: float) -> tuple[float, float]:
    """The range of values of a data set that uses these: from 0 to 1, or to what 8 or more bits can hold.

    For example, the 12 bits of a camera are stored in 16. Negative values, and floats that are all small, follow no
    such convention and are scaled from the lowest to the highest.
    """
    if kind == "float" and lowest >= -OVERSHOOT and 0.5 < highest <= 1 + OVERSHOOT:
        return 0, 1
    if lowest < 0 or (kind == "float" and highest <= 0.5):
        return min(lowest, 0), highest
    if highest <= 1:
        return 0, 1
    return 0, 2 ** max(8, int(highest).bit_length()) - 1


def to_8_bits(values: np.ndarray, low: float, high: float) -> Image.Image:
    """`(H, W, C)` as an image in which `low` is 0 and `high` is 255; alpha always uses all of 16 bits."""
    finite = np.nan_to_num(values.astype(float), nan=low, posinf=high, neginf=low)
    scaled = (finite - low) * 255 / max(high - low, 1e-30)
    if values.shape[2] in (2, 4):
        scaled[..., -1] = values[..., -1] / 257
    return as_image(scaled.clip(0, 255).round())
