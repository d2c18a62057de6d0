"""A finished run as a web page: `python app.py RUN`."""

from dataclasses import dataclass
from typing import Annotated, Any

from cifar10 import cli
from cifar10.errors import UserError


@dataclass(frozen=True)
class Options:
    """Serve a finished run as a web page on this computer."""

    run: Annotated[str, "folder of a finished run, its model.safetensors, or last"]
    host: Annotated[str | None, "address to listen on; 0.0.0.0 in a container (default: this computer's only)"] = None
    port: Annotated[int | None, "port to listen on (default: the first free one from 7860)"] = None
    share: Annotated[bool, "also make a public link through Gradio's servers"] = False

    def __post_init__(self):
        if self.port is not None and not 0 < self.port < 65536:
            raise UserError(f"port is {self.port}; it must be from 1 to 65535")


if __name__ == "__main__":
    typed = cli.start(Options)  # before what takes seconds to import: a mistake is answered at once

import os
import socket
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from PIL import ExifTags, Image

from cifar10.cli import import_extra
from cifar10.interpretation import GRADCAM_LAYERS, ImageClassifier, overlay
from cifar10.runs import weights_file
from cifar10.text import printable
from model import ResNet

DISPLAY_SIDE = 320  # pixels of the shown images
LIKELIEST = "the likeliest class"
MAX_UPLOAD = "50mb"
KEPT = (600, 3600)  # seconds between two looks for old uploads and answers, and how old they are when they are deleted
STYLE = """
/* Small images fill their frames. */
#image img, #heat img { width: 100%; height: 100%; object-fit: contain; }
/* Ten images in a row, or fewer on a small screen. */
#misclassified .grid-wrap { min-height: 0; padding-top: 2rem; }
#misclassified .grid-container { grid-template-columns: repeat(auto-fill, minmax(max(5rem, 9%), 1fr)); }
/* Whole captions below the images, or the prediction would be cut off. */
#misclassified .thumbnail-item { aspect-ratio: auto; display: flex; flex-direction: column; }
#misclassified .thumbnail-item img { aspect-ratio: 1; height: auto; }
#misclassified .caption-label { position: static; white-space: normal; max-width: 100%; border: 0; }
"""
# Enlarged images keep their pixels, and reduced ones, such as photos, are smoothed.
SCRIPT = """() => document.addEventListener("load", ({target: image}) => {
  if (image instanceof HTMLImageElement) {
    const enlarged = image.naturalWidth < image.clientWidth && image.naturalHeight < image.clientHeight;
    image.style.imageRendering = enlarged ? "pixelated" : "auto";
  }
}, true)"""


def explain(
    classifier: ImageClassifier, file: str | None, topk: int, layer: str, label: str, opacity: float
) -> tuple[dict[str, float], Image.Image] | tuple[None, None]:
    """Class → probability for the `topk` likeliest classes, and the image with the evidence for a class over it.

    Raises Gradio's error for what is not an image.
    """
    if not file:
        return None, None
    try:
        pixels = torch.from_numpy(classifier.decode(Path(file)))
    except UserError:
        raise import_extra("gradio", "app").Error("This file can't be read as an image; choose another one.") from None
    best = classifier.classify(pixels[None])[0].topk(int(topk))
    names = [classifier.names[k] for k in best.indices]
    number = classifier.names.index(names[0] if label == LIKELIEST else label)
    heat = classifier.grad_cam(pixels, number)[GRADCAM_LAYERS.index(layer)]
    image = overlay(pixels, heat, opacity).resize((DISPLAY_SIDE, DISPLAY_SIDE), Image.Resampling.NEAREST)
    exif = Image.Exif()  # Gradio would write equal images to the same file, also while somebody downloads it
    exif[ExifTags.Base.ImageUniqueID] = uuid4().hex
    image.info["exif"] = exif.tobytes()
    return dict(zip(names, best.values.tolist(), strict=True)), image


def build(classifier: ImageClassifier, folder: Path):
    """The page, as Gradio's Blocks."""
    gr = import_extra("gradio", "app")
    many = len(classifier.classes)
    examples = [str(file) for file in sorted((folder / "examples").glob("*.png"))]
    wrong = [(str(file), file.stem.partition("-")[2]) for file in sorted((folder / "misclassified").glob("*.png"))]
    plot = folder / "misclassified.png"
    with gr.Blocks(title=f"{classifier.name} classifier", analytics_enabled=False, delete_cache=KEPT) as page:
        gr.Markdown(f"# {printable(classifier.name)}: which of {many} classes?")
        with gr.Row():
            with gr.Column():
                file = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], elem_id="image",
                                height=DISPLAY_SIDE)  # fmt: skip
                file.preprocess = lambda photo: photo.path if photo else None  # `explain` takes the file as it is
                topk = gr.Slider(1, many, min(3, many), step=1, label="Classes to show", elem_id="topk")
                if examples:
                    gr.Examples(examples, file, label="Images that the model has not been trained on")
            with gr.Column():
                label = gr.Label(label=(classifier.temperature_note or "probabilities").capitalize(), elem_id="label")
                heat = gr.Image(
                    label="Grad-CAM: where the evidence lies", elem_id="heat", interactive=False, height=DISPLAY_SIDE,
                    buttons=["download", "fullscreen"],  # and none that shares it
                )  # fmt: skip
                layer = gr.Radio(GRADCAM_LAYERS, value=GRADCAM_LAYERS[-1], label="Layer")
                chosen = gr.Dropdown([LIKELIEST, *classifier.names], value=LIKELIEST, label="Evidence for")
                opacity = gr.Slider(0, 1, 0.5, label="Opacity", elem_id="opacity")
        if wrong:
            gallery = dict(columns=10, buttons=["download", "fullscreen"], elem_id="misclassified")
            gr.Gallery(wrong, label="Misclassified images", **gallery)
        elif plot.is_file():
            gr.Image(str(plot), label="Misclassified images", interactive=False, buttons=["download", "fullscreen"])
        inputs = [file, topk, layer, chosen, opacity]
        # One at a time: the hooks of Grad-CAM would see the activations of another request.
        one = dict(concurrency_id="model", concurrency_limit=1)
        changes = [part.change for part in inputs]
        gr.on(changes, partial(explain, classifier), inputs, [label, heat], api_name="explain", **one)
    return page


def check_address(host: str, port: int | None):
    """Raise `UserError` for an address or a port that can't be listened to; Gradio would try for minutes."""
    why: Any = None
    try:
        found = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as reason:  # Python encodes the name of a host
        found, why = [], reason
    for family, kind, _, _, address in found:  # a name may have an IPv6 address that this computer does not use
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return
        except OSError as reason:
            why = reason
    where = host if port is None else f"{host}, port {port},"
    why = getattr(why, "strerror", None) or why
    raise UserError(f"{where} can't be listened to ({why}); give another --host or --port")


def main(**typed):
    """Serve the page. `typed`: the options given on the command line, by name (see `Options`)."""
    options = Options(**typed)
    weights = weights_file(options.run)
    classifier = ImageClassifier.load(options.run, ResNet)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = f"{direct},127.0.0.1,localhost".strip(",")  # Gradio asks its own server whether it answers
    page = build(classifier, weights.parent)
    address = options.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    check_address(address, options.port)
    images = [str(weights.parent.resolve() / name) for name in ("examples", "misclassified", "misclassified.png")]
    _, url, shared = page.launch(
        server_name=address, server_port=options.port, share=options.share, allowed_paths=images, css=STYLE,
        js=SCRIPT, quiet=True, prevent_thread_lock=True, max_file_size=MAX_UPLOAD,
    )  # fmt: skip
    print(f"The page is at {shared or url}; stop it with Ctrl-C", flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.run(main, typed)
