"""How files become labeled images: the part of a run's options that data sets depend on."""

from dataclasses import dataclass, fields
from unicodedata import normalize

from cifar10.data.decode import RESIZE, SIZE
from cifar10.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read a folder or table, and each image; train.py's options of the same names say more."""

    size: int = SIZE  # pixels along each side
    resize: str = "crop"  # one of `RESIZE`
    valid_pct: float | None = None  # part of the images to validate on where there is no split for it
    skip_broken: bool = False
    skip_classes: list[str] | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    images: str | None = None  # the folder that paths in a table are relative to

    def __post_init__(self):
        if self.resize not in RESIZE:
            raise UserError(f"resize is {self.resize!r}; it must be one of {', '.join(RESIZE)}")

    @property
    def skipped(self) -> set[str]:
        """The names of `skip_classes` in the Unicode form of classes."""
        return {normalize("NFC", name) for name in self.skip_classes or ()}

    @classmethod
    def of(cls, options) -> "Reading":
        """The `Reading` in train.py's options."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})
