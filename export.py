"""Export a finished run to run elsewhere: `python export.py RUN --onnx model.onnx`, `--torch model.pt2` or `--web DIR`.

The files take uint8 images `(N, 3, size, size)`, any number at a time, and return probabilities `(N, classes)`. The
class names, and the temperature of the probabilities, are in the metadata. `--web` writes a page that needs no server.
"""

from dataclasses import dataclass
from typing import Annotated

from cifar10 import cli
from cifar10.errors import UserError


@dataclass(frozen=True)
class Options:
    """Export a finished run to ONNX, torch.export or a web page, and compare the model with PyTorch."""

    run: Annotated[str, "folder of a finished run, its model.safetensors, or last"]
    onnx: Annotated[cli.OutputFile, "file for ONNX"] = None
    torch: Annotated[cli.OutputFile, "file for torch.export"] = None
    web: Annotated[cli.OutputFolder, "new folder for a page that classifies images in the browser"] = None
    runtime: Annotated[str | None, "copy of the npm package onnxruntime-web, for --web (default: download it)"] = None

    def __post_init__(self):
        if not (self.onnx or self.torch or self.web):
            raise UserError("there is nothing to do; give --onnx, --torch or --web")
        if self.runtime and not self.web:
            raise UserError("--runtime is for the page of --web; add --web, or leave it out")


if __name__ == "__main__":
    typed = cli.start(Options)  # before what takes seconds to import: a mistake is answered at once

import io
import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fastai.callback.hook import hook_output
from torch import Tensor, nn
from torch.nn import functional as F

from cifar10.cli import import_extra
from cifar10.files import write
from cifar10.interpretation import ImageClassifier, read_runtime, write_page
from cifar10.runs import WEIGHTS, Run, weights_file
from cifar10.text import plural
from model import ResNet

N_CHECK_IMAGES = 100  # images on which an exported file is compared with PyTorch
TOLERANCE = 1e-4  # of probabilities


class WithPreprocessing(nn.Module):
    """uint8 `(N, 3, size, size)` → probabilities `(N, classes)`."""

    def __init__(self, classifier: ImageClassifier):
        super().__init__()
        self.model = classifier.model.to(memory_format=torch.contiguous_format)
        self.model.pool = nn.MaxPool2d(classifier.size // 8)  # ONNX has no AdaptiveMaxPool2d
        self.temperature = classifier.temperature
        self.register_buffer("mean", classifier.mean)
        self.register_buffer("std", classifier.std)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model((images.float() / 255 - self.mean) / self.std)
        return (logits / self.temperature).softmax(dim=1)


class WithGradCAM(WithPreprocessing):
    """The same, and Grad-CAM of layer3 for all classes, `(N, classes, h, w)`, before it is resized and scaled.

    This needs no backward pass. With layer3's output A, a logit is scale · (W · max of A over places) + b, so its
    gradient is scale · W[k] at one place of channel k and zero elsewhere, and the mean gradient, Grad-CAM's weight of
    the channel, is scale · W[k] / (h · w).
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with hook_output(self.model.layer3, detach=False) as hook:
            probabilities = super().forward(images)
        features = hook.stored
        weights = self.model.fc.weight * (self.model.logit_scale / features[0, 0].numel())
        return probabilities, F.relu(F.conv2d(features, weights[:, :, None, None]))


def check(name: str, expected: Tensor, found: Tensor):
    """Raise `UserError` unless an exported file gives the same probabilities and classes as PyTorch."""
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE or not torch.equal(expected.argmax(dim=1), found.argmax(dim=1)):
        raise UserError(f"{name} differs from PyTorch by up to {difference:.1g}; please report this with `pip freeze`")
    print(f"{name}: the same classes as PyTorch on {N_CHECK_IMAGES} images, probabilities within {difference:.0e}")


def trace(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The module's program for any number of images."""
    return torch.export.export(module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})


def to_onnx(program: torch.export.ExportedProgram, outputs: list[str], about: dict[str, str], optimize: bool = True):
    """The program as ONNX's ModelProto, with names for its outputs and metadata."""
    for package in ("onnx", "onnxscript"):  # which PyTorch imports
        import_extra(package, "export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=optimize, output_names=outputs)
    exported.model.metadata_props.update(about)
    return exported.model_proto


def halve(model):
    """Store weights in half precision where that changes none of them, as in results/cifar10-best: half the download.

    Rounded weights would change the probabilities of CIFAR-10's images by up to 0.007.
    """
    onnx = import_extra("onnx", "export")
    for weights in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weights)
        half = values.astype("float16")
        if values.dtype == "float32" and values.ndim > 1 and (half == values).all():
            name, stored = weights.name, f"{weights.name}.half"
            weights.CopyFrom(onnx.numpy_helper.from_array(half, stored))
            model.graph.node.insert(0, onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))


def to_browser_onnx(classifier: ImageClassifier, images: Tensor, about: dict[str, str]) -> bytes:
    """The ONNX file of the page, with Grad-CAM's maps as its second output, `evidence`."""
    program = trace(WithGradCAM(classifier).eval(), images)
    # ONNX Runtime optimizes it when it is loaded; before, that would change the weights.
    model = to_onnx(program, ["probabilities", "evidence"], about, optimize=False)
    halve(model)
    return model.SerializeToString()


def run_onnx(content: bytes, images: Tensor) -> Tensor:
    """The probabilities that an ONNX file gives."""
    session = import_extra("onnxruntime", "export").InferenceSession(content)
    return torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])


def find_examples(weights: Path, classifier: ImageClassifier) -> tuple[list[Path], dict[str, Any]]:
    """The example images and the metrics beside a run's weights, as far as they are of these weights."""
    if weights.name != WEIGHTS:
        return [], {}
    examples = sorted(weights.parent.glob("examples/*.png"))
    with suppress(UserError, TypeError, ValueError):
        run = Run.open(weights.parent)
        if run.classes == classifier.classes and "accuracy" in run.metrics:
            return examples, run.metrics
    return examples, {}


def main(**typed):
    """Write what is asked for, and check it. `typed`: the options on the command line (see `Options`)."""
    options = Options(**typed)
    classifier = ImageClassifier.load(options.run, ResNet, device="cpu")
    runtime = read_runtime(options.runtime) if options.web else {}
    module = WithPreprocessing(classifier).eval()
    about = {"classes": json.dumps(classifier.classes, ensure_ascii=False), "data": classifier.name}
    about["temperature"] = str(classifier.temperature)
    if classifier.temperature_note:
        print(classifier.temperature_note)
    generator, shape = torch.Generator().manual_seed(0), (N_CHECK_IMAGES, 3, classifier.size, classifier.size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        expected = module(images)
    program = trace(module, images)
    if options.torch:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files=about)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how PyTorch itself reads the file
            file.seek(0)
            check(options.torch, expected, torch.export.load(file).module()(images))
        write(Path(options.torch), file.getvalue())
    if options.onnx:
        content = to_onnx(program, ["probabilities"], about).SerializeToString()
        check(options.onnx, expected, run_onnx(content, images))
        write(Path(options.onnx), content)
    if options.web:
        content = to_browser_onnx(classifier, images, about)
        check(f"{options.web}/model.onnx", expected, run_onnx(content, images))
        examples, metrics = find_examples(weights_file(options.run), classifier)
        write_page(Path(options.web), classifier, content, examples, metrics, runtime)
        shown = f", with {plural(len(examples), 'image')} of {examples[0].parent}" if examples else ""
        how = f"try it with `python -m http.server --directory {options.web}`"
        print(f"{options.web} is ready for any web server{shown}; {how}")


if __name__ == "__main__":
    cli.run(main, typed)
