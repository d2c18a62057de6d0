"""What a recipe is, which ones there are, and how they differ: all in one place."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """How to train the ResNet in one cycle of the learning rate; transforms, loss and optimizer are always the same."""

    epochs: int
    peak_epoch: float  # at which the learning rate is highest
    lr_max: float | None  # None: found on the learning-rate finder's curve, and with it lr_min
    annihilate: bool  # end with a learning rate near zero instead of lr_min
    sizes: tuple[tuple[int, float], ...]  # (side of the training images in pixels, until which part of the training)
    validate: str  # after "each" epoch, or after the "last"

    def side(self, done: float) -> int:
        """Pixels along each side of a training image after this part of the training, from 0 to 1."""
        return next((side for side, until in self.sizes if done < until), self.sizes[-1][0])

    def work_left(self, done: float) -> float:
        """How long the rest of the training takes in units of a whole one at the present size of the images."""
        begins = [0.0, *(until for _, until in self.sizes)]
        left = sum(side**2 * max(0.0, until - max(begin, done)) for (side, until), begin in zip(self.sizes, begins))
        return left / self.side(done) ** 2


# The assignment as written.
ASSIGNMENT = Recipe(
    epochs=24,
    peak_epoch=5,
    lr_max=None,
    annihilate=False,
    sizes=((32, 1.0),),
    validate="each",
)

# For people without a GPU: small images first, because an epoch on 24×24 takes less than two thirds of the time;
# down to a rate near zero, which leaves no noise; one validation, at the end.
FAST = Recipe(
    epochs=20,
    peak_epoch=3,
    lr_max=0.2,
    annihilate=True,
    sizes=((24, 0.5), (32, 1.0)),
    validate="last",
)

# For people without patience: the same in a quarter of the time, with larger steps, for there are fewer.
FASTER = FAST._replace(epochs=5, peak_epoch=1, lr_max=0.3)

RECIPES = {"assignment": ASSIGNMENT, "fast": FAST, "faster": FASTER}
