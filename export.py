"""Export a finished run to run elsewhere: `python export.py RUN --onnx model.onnx`, or `--torch model.pt2`.

Both take uint8 images `(N, 3, size, size)`, any number at a time, and return probabilities `(N, classes)`. The class
names, and the temperature of the probabilities, are in the metadata.
"""

from dataclasses import dataclass
from typing import Annotated

from cifar10 import cli
from cifar10.errors import UserError


@dataclass(frozen=True)
class Options:
    """Export a finished run to ONNX or torch.export, and compare the file with PyTorch."""

    run: Annotated[str, "folder of a finished run, or its model.safetensors"]
    onnx: Annotated[cli.OutputFile, "file for ONNX"] = None
    torch: Annotated[cli.OutputFile, "file for torch.export"] = None

    def __post_init__(self):
        if not (self.onnx or self.torch):
            raise UserError("there is nothing to do; give --onnx or --torch, or both")


if __name__ == "__main__":
    typed = cli.start(Options)  # before what takes seconds to import: a mistake is answered at once

import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar10.cli import import_extra
from cifar10.files import write
from cifar10.interpretation import ImageClassifier
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


def check(name: str, expected: Tensor, found: Tensor):
    """Raise `UserError` unless an exported file gives the same probabilities and classes as PyTorch."""
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE or not torch.equal(expected.argmax(dim=1), found.argmax(dim=1)):
        raise UserError(f"{name} differs from PyTorch by up to {difference:.1g}; please report this with `pip freeze`")
    print(f"{name}: the same classes as PyTorch on {N_CHECK_IMAGES} images, probabilities within {difference:.0e}")


def main(**typed):
    """Write the files that are asked for, and check them. `typed`: the options on the command line (see `Options`)."""
    options = Options(**typed)
    classifier = ImageClassifier.load(options.run, ResNet, device="cpu")
    module = WithPreprocessing(classifier).eval()
    about = {"classes": json.dumps(classifier.classes, ensure_ascii=False), "data": classifier.name}
    about["temperature"] = str(classifier.temperature)
    if classifier.temperature_note:
        print(classifier.temperature_note)
    generator, shape = torch.Generator().manual_seed(0), (N_CHECK_IMAGES, 3, classifier.size, classifier.size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        expected = module(images)
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})
    if options.torch:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files=about)
        write(Path(options.torch), file.getvalue())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how PyTorch itself reads the file
            check(options.torch, expected, torch.export.load(options.torch).module()(images))
    if options.onnx:
        for package in ("onnx", "onnxscript"):  # which PyTorch imports
            import_extra(package, "export")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["probabilities"])
        exported.model.metadata_props.update(about)
        write(Path(options.onnx), exported.model_proto.SerializeToString())
        session = import_extra("onnxruntime", "export").InferenceSession(options.onnx)
        check(options.onnx, expected, torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))


if __name__ == "__main__":
    cli.run(main, typed)
