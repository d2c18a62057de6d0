"""A model as a web page that needs no server: index.html, the model as ONNX, and ONNX Runtime Web beside it."""

import base64
import hashlib
import html
import json
import re
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar10.data.sources import TIMEOUT, make_once
from cifar10.errors import UserError
from cifar10.files import replacing
from cifar10.interpretation.classifier import ImageClassifier
from cifar10.text import plural, printable

TEMPLATE, LICENSE = Path(__file__).with_name("page.html"), Path(__file__).parents[2] / "LICENSE"
# Nothing is loaded from elsewhere: the page may only ask for files beside it, and run the script that is in it.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' {script}; style-src {style}; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'"
)
FOOTER = (
    "The network has {parameters:,} parameters and takes {model:.1f} MB; ONNX Runtime Web {version}, which computes it,"
    " takes {runtime:.1f} MB (MIT License). The code of the network and of this page is under the"
    ' <a href="LICENSE.txt">Apache License 2.0</a>.'
)
MAX_NAMES = 50  # classes to list
VERSION = "1.30.0"  # of ONNX Runtime Web
PACKAGE = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
# File in the package's dist/ → SHA-256. No smaller ones suffice: a script, and WebAssembly for the CPU.
RUNTIME = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}


def read_files(folder: Path, remedy: str) -> dict[str, bytes]:
    """The files of `RUNTIME` in a folder, by name. Raises `UserError` if one is missing, or differs in a single bit."""
    files = {}
    for name, expected in RUNTIME.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as reason:
            raise UserError(f"{folder} holds no {name} ({reason.strerror}); {remedy}") from None
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise UserError(f"{folder / name} is not that of version {VERSION} (its SHA-256 differs); {remedy}")
    return files


def download(folder: Path):
    """Make the folder's files from the package in the npm registry."""
    print(f"Downloading ONNX Runtime Web {VERSION} (33 MB) …")
    files, remedy = {}, f"connect to the network, or pass --runtime with a copy of onnxruntime-web@{VERSION}"
    try:
        with (
            urllib.request.urlopen(PACKAGE, timeout=TIMEOUT) as answer,
            tarfile.open(fileobj=answer, mode="r|gz") as tar,
        ):
            for member in tar:
                if (name := member.name.removeprefix("package/dist/")) in RUNTIME:
                    files[name] = tar.extractfile(member).read()  # type: ignore
    except Exception as reason:  # connections and decompressors fail in many ways
        raise UserError(f"{PACKAGE} can't be downloaded ({reason or type(reason).__name__}); {remedy}") from None
    for name, content in files.items():
        (folder / name).write_bytes(content)
    read_files(folder, remedy)


def read_runtime(copy: str | None = None) -> dict[str, bytes]:
    """ONNX Runtime Web's files by name: from a copy of its npm package, or downloaded once to fastai's folder.

    Raises `UserError` if they can't be had, or if a file's SHA-256 is another one.
    """
    if copy:
        folder = Path(copy, "dist") if Path(copy, "dist").is_dir() else Path(copy)
        return read_files(folder, f"pass --runtime with a copy of the npm package onnxruntime-web@{VERSION}")
    folder = make_once(f"onnxruntime-web-{VERSION}", download)
    return read_files(folder, "remove this folder, and it is downloaded again")


def in_script(value) -> str:
    """A value as JSON in a script element, which no text in it can end."""
    return json.dumps(value).replace("<", "\\u003c")


def source(element: str) -> str:
    """What allows the text of a script or style element in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(element.encode()).digest()).decode()}'"


def introduce(names: Sequence[str], metrics: Mapping[str, Any]) -> str:
    """What the model can tell apart, how well, and what it can't know, as HTML."""
    listed = ", ".join(f"<bdi>{html.escape(name)}</bdi>" for name in names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        listed += f" and {len(names) - MAX_NAMES:,} more"
    measured = ""
    if metrics:
        images = plural(metrics["images"], "image") if "images" in metrics else "images"  # which older runs don't count
        measured = f" Tested on {images} that it was not trained on, it was right for {metrics['accuracy']:.1%}."
    return f"The model knows these classes: {listed}. It always chooses one, whatever the image shows.{measured}"


def write_page(folder: Path, classifier: ImageClassifier, model: bytes, examples: Sequence[Path],
               metrics: Mapping[str, Any], runtime: dict[str, bytes]):  # fmt: skip
    """Write the page as a new folder, or in the place of an empty one.

    `model` is an ONNX file: `images`, uint8 `(1, 3, size, size)`, → `probabilities` `(1, classes)` and `evidence`
    `(1, classes, h, w)`, the maps that Grad-CAM resizes. `examples` are PNG files named `NN-label.png`, `metrics` are
    those of the run, or none, and `runtime` is what `read_runtime` returns.
    """
    about = dict(
        classes=classifier.names,
        size=classifier.size,
        resize=classifier.resize,
        examples=[file.stem.partition("-")[2] for file in examples],
    )
    footer = FOOTER.format(
        parameters=sum(parameter.numel() for parameter in classifier.model.parameters()),
        model=len(model) / 1e6,
        runtime=sum(map(len, runtime.values())) / 1e6,
        version=VERSION,
    )
    template = TEMPLATE.read_text(encoding="utf-8")
    (style,), (script,) = (re.findall(f"<{name}>(.*?)</{name}>", template, re.DOTALL) for name in ("style", "script"))
    contents = {
        "policy": POLICY.format(script=source(script), style=source(style)),
        "title": html.escape(f"{printable(classifier.name)}: which of {plural(len(classifier.classes), 'class')}?"),
        "introduction": introduce(classifier.names, metrics),
        "probabilities": classifier.temperature_note.capitalize() or "Probabilities",
        "footer": footer,
        "about": in_script(about),
    }
    page = re.sub(r"{{(\w+)}}", lambda name: contents[name[1]], template)
    files = {"index.html": page.encode(), "model.onnx": model, "LICENSE.txt": LICENSE.read_bytes()}
    files |= {f"examples/{number}.png": file.read_bytes() for number, file in enumerate(examples)}
    # Servers that don't know .mjs send it as a type that browsers don't run.
    files |= {f"runtime/{name.replace('.mjs', '.js')}": content for name, content in runtime.items()}
    with replacing(folder) as new:
        for name, content in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content)
        if folder.is_dir():
            folder.resolve().rmdir()  # which is empty
