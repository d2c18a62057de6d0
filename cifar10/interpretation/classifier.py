"""A trained model as a classifier: files or images → probabilities. It needs nothing but the run's weights file."""

import sys
from collections.abc import Iterable, Sequence
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
from cifar10.interpretation.gradcam import grad_cam
from cifar10.interpretation.predictions import TTA
from cifar10.recipes import Recipe
from cifar10.runs.run import FORMAT, WEIGHTS, find_run, weights_file
from cifar10.text import printable

MIN_BATCHES_FOR_BAR = 8  # fewer end before anyone could read a progress bar


class ImageClassifier:
    """A model with everything that its inputs and outputs depend on.

    `classes` are the names of the outputs, and `names` how they are displayed. `size` is the images' side in pixels;
    `resize`, `ranges`, `mean` and `std` turn images into inputs, as in training. `device` and `precision` are as in
    training, "auto" for the fastest here. Probabilities are softmax(logits / `temperature`), which is 1 unless the run
    had validation images beside the test images to fit it on.
    """

    def __init__(self, model: nn.Module, data: dict[str, Any], recipe: Recipe, device="auto", precision="auto",
                 temperature: float = 1.0):  # fmt: skip
        self.device = get_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()  # type: ignore
        self.recipe, self.name, self.classes, self.size = recipe, data["name"], list(data["classes"]), int(data["size"])
        self.temperature = temperature
        self.names = [printable(label) for label in self.classes]
        self.resize = data.get("resize", "crop")  # as all weights were trained that don't say
        self.ranges = {kind: tuple(limits) for kind, limits in data["ranges"].items()}
        self.mean, self.std = (torch.tensor(data[key]).to(self.device)[:, None, None] for key in ("mean", "std"))

    @classmethod
    def load(cls, run: str | Path, model_class, device="auto") -> "ImageClassifier":
        """Load the classifier from the folder of a run, or from its weights file alone. Nothing is unpickled.

        `model_class` builds the model from its saved arguments.
        Raises `UserError` if there are no weights, or if they are damaged or of another format.
        """
        run = find_run(run)
        path = weights_file(run)
        try:
            tensors, about = load_tensors(path)
            if about.get("format") != FORMAT:
                raise UserError(f"{path} has format {about.get('format')}, not {FORMAT}; train again")
            model = model_class(**about["model"])
            model.load_state_dict(tensors)
            recipe = Recipe.from_json(about["recipe"])
            precision = "fp32" if about.get("precision") == "fp32" else "auto"
            temperature = float(about.get("temperature") or 1)  # older weights have none
            return cls(model, about["data"], recipe, device, precision, temperature)
        except CorruptFileError as damage:
            raise UserError(f"{damage}; copy it again, or train again") from None
        except OSError:
            if (run / "config.json").is_file():
                finish = "" if (run / "metrics.json").is_file() else "finish the run, or "
                raise UserError(f"{run} holds no {WEIGHTS}; {finish}copy it there") from None
            raise UserError(f"{run} is neither the folder of a finished run nor its {WEIGHTS}; give either") from None
        except (LookupError, RuntimeError, TypeError, AttributeError) as reason:
            raise UserError(f"{path} does not hold a model of this program ({str(reason)[:200]})") from None

    @property
    def temperature_note(self) -> str:
        """What a user should know about the probabilities; empty if they are the model's own."""
        if self.temperature == 1:
            return ""
        return f"probabilities with a temperature of {self.temperature:.2f}, fitted on the run's validation images"

    def decode(self, image) -> np.ndarray:
        """Like `decode_image`, as in training."""
        return decode_image(image, self.ranges, self.size, self.resize)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 `(N, 3, size, size)` → the model's inputs, on its device, as fastai's transforms compute them."""
        return (pixels.to(self.device).float().div_(255.0) - self.mean) / self.std

    @torch.no_grad()
    def classify(self, pixels: Tensor | list[np.ndarray], tta: bool = False) -> Tensor:
        """Probabilities `(N, classes)` for uint8 `(N, 3, size, size)`, in batches as large as in training."""
        images = torch.from_numpy(np.asarray(pixels, np.uint8).reshape(-1, 3, self.size, self.size))
        model = TTA(self.model, self.recipe.flip) if tta else self.model
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        probabilities, batches = [], images.split(self.recipe.batch_size)
        # The output of predict.py may be a table in a file.
        visible = len(batches) > MIN_BATCHES_FOR_BAR and sys.stdout.isatty()
        for batch in progress_bar(batches, leave=False) if visible else batches:
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits = model(self.normalize(batch)).float()
            probabilities.append((logits / self.temperature).softmax(dim=1).cpu())
        return torch.cat([torch.empty(0, len(self.classes)), *probabilities])

    def predict(self, images: Sequence | Any, tta: bool = False) -> Tensor:
        """Probabilities `(N, classes)` of images: paths, PIL images, arrays or tensors, see `decode_image`; or of one.

        `tta` is test-time augmentation, see `TTA`. Raises `UserError` for what is not an image.
        """
        single = isinstance(images, (str, Path)) or getattr(images, "ndim", 4) < 4 or not isinstance(images, Iterable)
        decoded = [self.decode(image) for image in ([images] if single else images)]
        return self.classify(decoded, tta)

    def predict_files(self, files: Sequence[Path], tta: bool = False) -> tuple[Tensor, list[int], dict[int, str]]:
        """Probabilities of the images that can be read, their positions, and position → reason for the others."""
        decoded = decode_files(list(files), self.ranges, self.size, self.resize)
        broken = {i: item for i, item in enumerate(decoded) if isinstance(item, str)}
        good = [i for i in range(len(decoded)) if i not in broken]
        return self.classify([decoded[i].pixels for i in good], tta), good, broken

    def grad_cam(self, pixels: Tensor, label: int) -> Tensor:
        """Where an image, uint8 `(3, size, size)`, has evidence for a class: `(layers, size, size)`, see `grad_cam`."""
        return grad_cam(self.model, self.normalize(pixels[None]), torch.tensor([label]))[:, 0].cpu()
