"""Recipes: every hyperparameter of a training run, with its reason. A run saves its recipe whole."""

import math
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from cifar10.errors import UserError
from cifar10.text import plural


class Bounds(NamedTuple):
    """The range of a number: `low` ≤ value ≤ `high`, or `low` < value if `exclusive`."""

    low: float = 0
    high: float = math.inf
    exclusive: bool = False

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high and not (self.exclusive and value == self.low)

    def __str__(self):
        low = f"above {self.low:g}" if self.exclusive else f"at least {self.low:g}"
        return low if self.high == math.inf else f"{low} and at most {self.high:.10g}"


POSITIVE = Bounds(0, 1e30, exclusive=True)
AT_LEAST_0 = Bounds(0, 1e30)
FRACTION = Bounds(0, 1)
LAYERS = ("prep", "layer1", "layer2", "layer3")  # that can be frozen
SMALL_DATASET = 10_000  # training images; with fewer, batches of 512 would leave only a handful of steps per epoch
EPOCH_STEPS = 20  # of such a data set
REFERENCE_SIDE = 32  # pixels along each side of the images that a recipe's pixel counts are for; others in proportion


def check_fields(values):
    """Raise `UserError` for the first field of a dataclass whose type, `Bounds` or `choices` don't allow its value."""
    for name, annotation in get_type_hints(type(values), include_extras=True).items():
        value = getattr(values, name)
        kind, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if value is None and NoneType in kinds:
            continue
        kind = kinds[0]
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        types = (int, float) if kind is float else kind
        if kind in words and (not isinstance(value, types) or (isinstance(value, bool) and kind is not bool)):
            raise UserError(f"{name} is {value!r}; it must be {words[kind]}")
        for extra in extras:
            if isinstance(extra, Bounds) and value not in extra:
                raise UserError(f"{name} is {value}; it must be {extra}")
            if isinstance(extra, dict) and value not in extra.get("choices", [value]):
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(extra['choices'])}")


def choices(*values: str) -> dict:
    """The values of an option, the way fastcore's `call_parse` and `check_fields` read them."""
    return {"choices": list(values)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train the ResNet in one cycle of the learning rate. The defaults are for the assignment's 24 epochs.

    Raises `UserError` for a value that makes no sense. Learning rates are for a loss that is a mean over the batch.
    """

    name: str

    # Schedule. As assigned: 24 epochs, the peak at epoch 5, learning rates from the LR finder, no annihilation.
    epochs: Annotated[int, Bounds(1, 99_999)] = 24
    peak_epoch: Annotated[float, POSITIVE] = 5  # when the learning rate is highest
    lr_max: Annotated[float | None, POSITIVE] = None  # None: found by the LR finder, and lr_min with it
    lr_min: Annotated[float | None, POSITIVE] = None  # None: found, or a hundredth of a given lr_max
    annihilate: bool = False  # end near zero instead of at lr_min
    anneal_strategy: Annotated[str, choices("cos", "linear")] = "cos"  # how the learning rate rises and falls
    validate: Annotated[str, choices("each", "last")] = "each"  # after each epoch, or after the last one only

    # Data. As assigned: batches of 512, RandomCrop after padding by 4 → FlipLR → Cutout 8×8. Pixels are those of 32×32
    # images; for larger images they grow in proportion.
    batch_size: Annotated[int, Bounds(1)] = 512
    weighted: bool = False  # draw all classes equally often
    crop_padding: Annotated[int, Bounds(0, 31)] = 4  # pixels on each side
    # Reflection invents no border that the model could learn to see.
    crop_mode: Annotated[str, choices("reflect", "constant", "edge", "symmetric")] = "reflect"
    flip: bool = True
    alternate_flips: bool = False  # mirror one half of the images in even epochs, the other in odd ones
    cutout: Annotated[int, Bounds(0, 32)] = 8  # side of the square in pixels
    # Side of the training images in pixels, and the fraction of the training run until which it is used.
    sizes: tuple[tuple[int, float], ...] = ((32, 1.0),)
    # Layers of the model, and the fraction of the training run from which on each is frozen.
    freeze: tuple[tuple[str, float], ...] = ()

    # Initialization: Dirac filters pass their input on, and the first filters whiten the images and are not trained, so
    # that later layers get useful input from the first step on. "default" is PyTorch's initialization.
    init: Annotated[str, choices("default", "dirac")] = "default"
    whiten: bool = False

    # Optimizer. "muon" trains convolutions with Muon and the rest with SGD; "sgd" trains everything with SGD.
    optimizer: Annotated[str, choices("muon", "sgd")] = "muon"
    momentum: Annotated[float, FRACTION] = 0.85  # in Nesterov's form
    weight_decay: Annotated[float, AT_LEAST_0] = 5e-4  # only of the FC layer's weights if Muon is used
    muon_lr_scale: Annotated[float, POSITIVE] = 0.4  # learning rate of convolutions relative to the others'
    norm_bias_lr_scale: Annotated[float, POSITIVE] = 1.0  # learning rate of normalization layers' biases, likewise
    train_norm_scales: bool = True  # or leave the scales of normalization layers as they are
    train_norm_stats: bool = True  # or keep the running statistics of batch normalization, and train with them
    ns_steps: Annotated[int, Bounds(1, 20)] = 3  # of Newton-Schulz; more come closer to orthogonal and take longer
    clip: Annotated[float, AT_LEAST_0] = 0.0  # limit for each value of the gradient; 0 for none

    # Model. As assigned: 64 channels after the first layer, and 128, 256 and 512 after the others.
    width: Annotated[int, Bounds(1, 4096)] = 64

    # Loss and head.
    label_smoothing: Annotated[float, FRACTION] = 0.1  # limits overconfidence
    l1: Annotated[float, AT_LEAST_0] = 0.0  # weight of an L1 penalty on all parameters
    # The head sums 512 maxima, so fresh logits are several units apart, and plain SGD diverges from a learning rate of
    # 0.005. At an eighth they start near the uniform distribution, and learning rates of 0.3 and more work.
    logit_scale: Annotated[float, POSITIVE] = 1 / 8

    def __post_init__(self):
        check_fields(self)
        sides, untils = zip(*self.sizes)
        if not {*sides} <= {16, 20, 24, 28, 32} or [*untils] != sorted({*untils}) or untils[0] <= 0 or untils[-1] != 1:
            raise UserError(f"sizes is {self.sizes}; it must pair sides of 16, 20, … or 32 with rising parts up to 1")
        if any(layer not in LAYERS or begin not in FRACTION for layer, begin in self.freeze):
            raise UserError(f"freeze is {self.freeze}; it must pair {', '.join(LAYERS)} with parts from 0 to 1")
        if self.peak_epoch > self.epochs:
            raise UserError(f"peak_epoch is {self.peak_epoch:g}; it must be at most epochs, {self.epochs}")
        if self.lr_min and self.lr_max and self.lr_min > self.lr_max:
            raise UserError(f"lr_min is {self.lr_min:g}; it must be at most lr_max, {self.lr_max:g}")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe that `asdict` and JSON made `values` of. A field that was added since then has its default."""
        # JSON has no tuples.
        pairs: dict[str, Any] = {name: tuple(map(tuple, v)) for name, v in values.items() if isinstance(v, list)}
        return cls(**values | pairs)

    def adapted(self, train_images: int, **changes) -> "Recipe":
        """The recipe for a data set, with `changes`: its peak and its lowest learning rate stay in proportion.

        A small data set gets batches of the largest power of 2, from 16 to 64, that leaves `EPOCH_STEPS` in an epoch.
        """
        epochs = changes.get("epochs", self.epochs)
        changes.setdefault("peak_epoch", self.peak_epoch * epochs / self.epochs)
        if "lr_max" in changes and self.lr_min and self.lr_max:
            changes.setdefault("lr_min", self.lr_min * changes["lr_max"] / self.lr_max)
        if train_images < SMALL_DATASET:
            largest = 2 ** int(math.log2(max(1, train_images / EPOCH_STEPS)))
            changes.setdefault("batch_size", max(1, min(64, max(16, largest), train_images)))
        return replace(self, **changes)

    def describe_cycle(self) -> str:
        """The cycle, once its learning rates are known: `5 epochs, batches of 512, learning rate 0.1 → 0.5 …`."""
        epochs = f"{plural(self.epochs, 'epoch')}, batches of {self.batch_size}"
        end = 0 if self.annihilate else self.lr_min
        return (
            f"{epochs}, learning rate {self.lr_min:.2g} → {self.lr_max:.2g} at epoch {self.peak_epoch:.3g} → {end:.2g}"
        )

    def side(self, pct_train: float) -> int:
        """Side in pixels of the training images after this fraction of the training run."""
        return next((side for side, until in self.sizes if pct_train < until), self.sizes[-1][0])


# The assignment as written; what it leaves open is chosen above and here.
ASSIGNMENT = Recipe(name="assignment", init="dirac", whiten=True)

# A third of the epochs, with larger steps. The biases of batch normalization have a higher learning rate, its scales
# are not trained. Label smoothing replaces Cutout and large shifts, which help in long runs only. Small images in the
# beginning and frozen layers in the end save operations.
FAST = replace(
    ASSIGNMENT, name="fast", epochs=8, peak_epoch=1.6, lr_max=0.5, lr_min=0.1, annihilate=True,
    anneal_strategy="linear", validate="last", crop_padding=2, cutout=0, label_smoothing=0.2,
    sizes=((24, 0.25), (28, 0.45), (32, 1.0)), freeze=(("prep", 0.15), ("layer1", 0.8)), muon_lr_scale=0.18,
    norm_bias_lr_scale=32, train_norm_scales=False, weight_decay=2e-3,
)  # fmt: skip

# Three epochs fewer, and more of them on small images. The flip alternates, so that two epochs in a row show an image
# both ways. Less label smoothing is better; the scales of normalization are trained, as is usual.
FASTER = replace(
    FAST, name="faster", epochs=5, peak_epoch=1, alternate_flips=True, label_smoothing=0.12,
    sizes=((24, 0.35), (28, 0.5), (32, 1.0)), train_norm_scales=True,
)  # fmt: skip

# 24 epochs with free choices: twice as many steps, a larger Cutout, and down to a learning rate near zero.
BEST = replace(
    ASSIGNMENT, name="best", batch_size=256, peak_epoch=4.8, lr_max=0.084, annihilate=True, anneal_strategy="linear",
    cutout=12, muon_lr_scale=0.286,
)  # fmt: skip

# From the weights of another run. The last layer is fitted first; small steps, with the statistics of batch
# normalization as they are, keep what the other layers know.
FINETUNE = replace(
    ASSIGNMENT, name="finetune", epochs=24, peak_epoch=6, lr_max=0.02, annihilate=True, train_norm_stats=False,
    cutout=4, muon_lr_scale=0.2,
)  # fmt: skip

RECIPES = {recipe.name: recipe for recipe in (ASSIGNMENT, FAST, FASTER, BEST, FINETUNE)}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises `UserError` if there is none."""
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}; it must be one of {', '.join(RECIPES)}")
    return RECIPES[name]
