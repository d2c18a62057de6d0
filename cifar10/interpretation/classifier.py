"""A trained model as a classifier: files or images → probabilities, with nothing but the run's weights."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastprogress.fastprogress import progress_bar
from torch import Tensor, nn

from cifar10.data.decode import decode_files, decode_image
from cifar10.errors import CorruptFileError, UserError
from cifar10.files import load_tensors
from cifar10.hardware import get_device, resolve_precision
from cifar10.interpretation.predictions import views
from cifar10.runs.run import FORMAT, WEIGHTS
from cifar10.training.recipes import Recipe

MIN_BATCHES_FOR_BAR = 8  # fewer are done before a progress bar would be read


class ImageClassifier:
    """A model with all that its inputs and outputs depend on.

    `classes` are the names of the outputs, `size` is the images' side in pixels; `ranges`, `mean` and `std` are how
    images become inputs, as in training. `device` and `precision` are as in training, "auto" for the fastest here.
    """

    def __init__(self, model: nn.Module, data: dict[str, Any], recipe: Recipe, device="auto", precision="auto"):
        self.device = get_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()  # type: ignore
        self.recipe, self.name, self.classes, self.size = recipe, data["name"], list(data["classes"]), int(data["size"])
        self.ranges = {kind: tuple(limits) for kind, limits in data["ranges"].items()}
        self.mean, self.std = (torch.tensor(data[key]).to(self.device)[:, None, None] for key in ("mean", "std"))

    @classmethod
    def load(cls, run: str | Path, model_class, device="auto") -> "ImageClassifier":
        """The classifier in the folder of a run, or in its weights file alone. Nothing is unpickled.

        `model_class` builds the model from its saved arguments.
        Raises `UserError` if there are no weights, or if they are damaged or of another format.
        """
        path = Path(run) / WEIGHTS if Path(run).is_dir() else Path(run)
        try:
            tensors, about = load_tensors(path)
            if about.get("format") != FORMAT:
                raise UserError(f"{path} has format {about.get('format')}, not {FORMAT}; train again")
            model = model_class(**about["model"])
            model.load_state_dict(tensors)
            recipe = Recipe.from_json(about["recipe"])
            return cls(model, about["data"], recipe, device, "fp32" if about.get("precision") == "fp32" else "auto")
        except CorruptFileError as damage:
            raise UserError(f"{damage}; copy it again, or train again") from None
        except OSError:
            if (Path(run) / "config.json").is_file():
                raise UserError(f"{run} holds no {WEIGHTS}; finish the run, or copy its weights there") from None
            raise UserError(f"{run} is neither the folder of a finished run nor its {WEIGHTS}; give either") from None
        except (LookupError, RuntimeError, TypeError, AttributeError) as reason:
            raise UserError(f"{path} does not hold a model of this program ({str(reason)[:200]})") from None

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 `(N, 3, size, size)` → the model's inputs, on its device, as fastai's transforms compute them."""
        pixels = pixels.to(self.device)
        return ((pixels.float().div_(255.0)) - self.mean) / self.std

    @torch.no_grad()
    def classify(self, pixels: Tensor, tta: bool = False) -> Tensor:
        """Probabilities `(N, classes)` for uint8 `(N, 3, size, size)`, in batches as large as in training."""
        probabilities, batches = [], pixels.split(self.recipe.batch_size)
        visible = (
            len(batches) > MIN_BATCHES_FOR_BAR and sys.stdout.isatty()
        )  # the output of predict.py may be a table in a file
        for batch in progress_bar(batches, leave=False) if visible else batches:
            x = self.normalize(batch)
            if tta:
                weighted = [weight * self.logits(view(x)) for weight, view in views(self.recipe.flip)]
                logits = torch.stack(weighted).sum(dim=0)
            else:
                logits = self.logits(x)
            probabilities.append(logits.softmax(dim=1).cpu())
        return torch.cat([torch.empty(0, len(self.classes)), *probabilities])

    def logits(self, x: Tensor) -> Tensor:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext():
            return self.model(x).float()

    def predict(self, images: Sequence | Any, tta: bool = False) -> Tensor:
        """Probabilities `(N, classes)` of images: paths, PIL images, arrays or tensors, see `decode_image`; or of one.

        `tta` averages six views, as `tta_accuracy` does. Raises `UserError` for what is not an image.
        """
        single = isinstance(images, (str, Path)) or getattr(images, "ndim", 4) < 4 or not isinstance(images, Iterable)
        decoded = [decode_image(image, self.ranges, self.size) for image in ([images] if single else images)]
        return self.classify(torch.from_numpy(np.array(decoded, np.uint8).reshape(-1, 3, self.size, self.size)), tta)

    def predict_files(self, files: Sequence[Path], tta: bool = False) -> tuple[Tensor, list[int], dict[int, str]]:
        """Probabilities of the images that can be read, their numbers, and number → why of the others."""
        decoded = decode_files(list(files), self.ranges, self.size)
        broken = {i: item for i, item in enumerate(decoded) if isinstance(item, str)}
        good = [i for i in range(len(decoded)) if i not in broken]
        pixels = np.array([decoded[i].pixels for i in good], np.uint8).reshape(-1, 3, self.size, self.size)
        return self.classify(torch.from_numpy(pixels), tta), good, broken
