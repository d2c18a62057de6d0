import pytest
import torch
from fastai.vision.all import Normalize, TensorImage
from scipy.stats import binomtest, chisquare
from torchvision.transforms.v2.functional import pad

from augment import AlternatingFlip, Cutout, FlipLR, RandomCrop
from train import get_dls

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
TRANSFORMS = pytest.mark.parametrize(
    "transform", [RandomCrop(), FlipLR(), AlternatingFlip(), Cutout()], ids=lambda t: type(t).__name__
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def coordinates(n: int, dtype=torch.float32) -> TensorImage:
    """n images `(n, 3, 32, 32)` whose channels are row + 1, column + 1, and 1: no pixel is 0."""
    position = torch.arange(1.0, 33)
    image = torch.stack([position[:, None].expand(32, 32), position.expand(32, 32), torch.ones(32, 32)])
    return TensorImage(image.expand(n, 3, 32, 32).to(dtype))


def train(transform, x):
    return transform(x, split_idx=0)


@DTYPES
def test_cutout_fills_exactly_one_square_of_64_pixels(dtype):
    x = coordinates(500, dtype)
    y = train(Cutout(8, 8), x)
    assert y.dtype == dtype
    changed = (y != x).any(dim=1)
    assert (changed.sum(dim=(1, 2)) == 64).all()
    assert (changed.any(dim=2).sum(dim=1) == 8).all() and (changed.any(dim=1).sum(dim=1) == 8).all()
    assert (y[changed[:, None].expand_as(y)] == 0).all()


def test_cutout_positions_are_uniform_and_inside():
    filled = train(Cutout(8, 8), coordinates(20_000))[:, 2] == 0
    for axis in (2, 1):
        first = filled.any(dim=axis).int().argmax(dim=1)
        assert chisquare(torch.bincount(first, minlength=25)).pvalue > 1e-3
        assert first.max() == 24


def test_cutout_fills_with_the_mean_of_the_data_set(digits):
    means = digits.train.table.stats(digits.train.rows)[0]
    digits.train.before_iter()
    x, _ = digits.train.after_batch(digits.train.batch(torch.arange(64)))
    filled = (x == 0).all(dim=1)
    assert (filled.sum(dim=(1, 2)) >= 64).all()
    normalize = next(t for t in digits.train.after_batch.fs if isinstance(t, Normalize))
    decoded = torch.Tensor(normalize.decode(x)).movedim(1, 0)[:, filled]
    torch.testing.assert_close(decoded, torch.tensor(means).view(3, 1).expand_as(decoded))


@DTYPES
def test_crop_offsets_are_uniform(dtype):
    y = train(RandomCrop(32, padding=4), coordinates(20_000, dtype))
    assert y.shape == (20_000, 3, 32, 32) and y.dtype == dtype
    for channel in (0, 1):  # the pixel at (16, 16) comes from (12 … 20), where no padding reaches
        offset = y[:, channel, 16, 16].long() - 1 - 12
        assert chisquare(torch.bincount(offset, minlength=9)).pvalue > 1e-3
        assert offset.min() == 0 and offset.max() == 8


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_crop_is_a_window_of_the_padded_image(pad_mode):
    image = torch.rand(1, 3, 32, 32)
    image[:, :2] = coordinates(1)[:, :2]
    padded = pad(image, 4, padding_mode=pad_mode)[0]
    for y in train(RandomCrop(32, padding=4, pad_mode=pad_mode), TensorImage(image.expand(200, -1, -1, -1))):
        top, left = (int(y[c, 16, 16]) - 1 - 12 for c in (0, 1))
        assert torch.equal(torch.Tensor(y), padded[:, top : top + 32, left : left + 32])


@DTYPES
@pytest.mark.parametrize("transform", [FlipLR(), AlternatingFlip()], ids=["FlipLR", "AlternatingFlip"])
def test_flip_mirrors_half_of_the_images(dtype, transform):
    x = coordinates(10_000, dtype)
    y = train(transform, x)
    assert y.dtype == dtype
    flipped = (y == x.flip(-1)).flatten(1).all(dim=1)
    kept = (y == x).flatten(1).all(dim=1)
    assert (flipped ^ kept).all()
    assert binomtest(int(flipped.sum()), len(x)).pvalue > 1e-3


def test_alternating_flip_mirrors_each_image_in_every_second_epoch():
    x = TensorImage(torch.randint(256, (10_000, 3, 8, 8), dtype=torch.uint8))
    transform, mirrored = AlternatingFlip(), []
    for transform.epoch in range(3):
        y = train(transform, x)
        assert y.dtype == x.dtype and torch.equal(train(transform, x.flip(0)), y.flip(0))  # in any order
        mirrored.append((y == x.flip(-1)).flatten(1).all(dim=1))
        assert (mirrored[-1] ^ (y == x).flatten(1).all(dim=1)).all()
    assert torch.equal(mirrored[1], ~mirrored[0]) and torch.equal(mirrored[2], mirrored[0])
    assert binomtest(int(mirrored[0].sum()), len(x)).pvalue > 1e-3


@TRANSFORMS
def test_validation_batches_stay_untouched(transform):
    x = coordinates(8)
    assert torch.equal(transform(x, split_idx=1), x)


@TRANSFORMS
def test_a_seed_repeats_it_and_images_differ(transform):
    x = coordinates(64)
    torch.manual_seed(1)
    first = train(transform, x)
    torch.manual_seed(1)
    assert torch.equal(train(transform, x), first)
    assert not torch.equal(train(transform, x), first)
    assert len(torch.unique(first.flatten(1), dim=0)) > 1


def test_the_assignments_order(shapes):
    names = [type(transform).__name__ for transform in get_dls(shapes).after_batch.fs]
    assert [name for name in names if name in ("RandomCrop", "FlipLR", "Cutout")] == ["RandomCrop", "FlipLR", "Cutout"]
