"""Export a finished run to run elsewhere: `python export.py RUN --onnx model.onnx`, or `--torch model.pt2`.

Both take uint8 images `(N, 3, size, size)`, any number at a time, and return probabilities `(N, classes)`. The class
names are in the metadata.
"""

import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar10 import cli
from cifar10.cli import import_extra
from cifar10.errors import UserError
from cifar10.files import OutputFile, write
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
        self.register_buffer("mean", classifier.mean)
        self.register_buffer("std", classifier.std)

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images.float() / 255 - self.mean) / self.std).softmax(dim=1)


def check(name: str, expected: Tensor, found: Tensor):
    """Raise `UserError` unless an exported file gives the same probabilities and classes as PyTorch."""
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE or not torch.equal(expected.argmax(dim=1), found.argmax(dim=1)):
        raise UserError(f"{name} differs from PyTorch by up to {difference:.1g}; please report this with `pip freeze`")
    print(f"{name}: the same classes as PyTorch on {N_CHECK_IMAGES} images, probabilities within {difference:.0e}")


def export(run: str, onnx: str | None, pt2: str | None):
    """Write the files that are asked for, and check them."""
    classifier = ImageClassifier.load(run, ResNet, device="cpu")
    module = WithPreprocessing(classifier).eval()
    about = {"classes": json.dumps(classifier.classes, ensure_ascii=False), "data": classifier.name}
    generator, shape = torch.Generator().manual_seed(0), (N_CHECK_IMAGES, 3, classifier.size, classifier.size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        expected = module(images)
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})
    if pt2:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files=about)
        write(Path(pt2), file.getvalue())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how PyTorch itself reads the file
            check(pt2, expected, torch.export.load(pt2).module()(images))
    if onnx:
        for package in ("onnx", "onnxscript"):  # which PyTorch imports
            import_extra(package, "export")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["probabilities"])
        exported.model.metadata_props.update(about)
        write(Path(onnx), exported.model_proto.SerializeToString())
        session = import_extra("onnxruntime", "export").InferenceSession(onnx)
        check(onnx, expected, torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))


def main(
    run: str,  # folder of a finished run, or its model.safetensors
    onnx: OutputFile = None,  # file for ONNX
    torch: OutputFile = None,  # file for torch.export
):
    "Export a finished run to ONNX or torch.export, and compare the file with PyTorch."
    if not (onnx or torch):
        raise UserError("there is nothing to do; give --onnx or --torch, or both")
    export(run, onnx, torch)


if __name__ == "__main__":
    cli.run(main)
