"""Exported files give what PyTorch gives, for any number of images, and name their classes."""

import json
import shutil

import onnx
import onnxruntime
import pytest
import torch
from commandline import command
from conftest import make_images, save_classifier
from torch.nn import functional as F

import export
from cifar10.interpretation import ImageClassifier
from model import ResNet


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, and the folder with both of its files."""
    cwd = tmp_path_factory.mktemp("cwd")
    folder = make_images(cwd / "images", classes=("cross", "ring — 環"))
    short = ("--epochs", 1, "--peak_epoch", 0.5, "--batch_size", 8, "--width", 4, "--lr_max", 0.1, "--size", 40)
    assert command("train.py", "--data", folder, *short, "--name", "run", cwd=cwd, drawn=False).returncode == 0
    done = command("export.py", cwd / "runs/run", "--onnx", "m.onnx", "--torch", "m.pt2", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same classes as PyTorch on 100 images") == 2
    return cwd / "runs/run", cwd


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7])
def test_any_number_of_images(exported, count):
    run, folder = exported
    images = torch.randint(256, (count, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    classifier = ImageClassifier.load(run, ResNet)
    classifier.precision = "fp32"
    expected = classifier.classify(images)
    session = onnxruntime.InferenceSession(folder / "m.onnx")
    assert [tuple(i.shape)[1:] for i in session.get_inputs()] == [(3, 40, 40)]
    assert session.get_inputs()[0].type == "tensor(uint8)"
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected)
    torch.testing.assert_close(torch.export.load(folder / "m.pt2").module()(images), expected)


@pytest.mark.slow
def test_the_metadata_name_the_classes(exported):
    _, folder = exported
    about = {entry.key: entry.value for entry in onnx.load(folder / "m.onnx").metadata_props}
    files = {"classes": "", "data": ""}
    torch.export.load(folder / "m.pt2", extra_files=files)
    assert json.loads(about["classes"]) == json.loads(files["classes"]) == ["cross", "ring — 環"]
    assert about["data"] == "images"


@pytest.mark.parametrize("size, half", [(32, True), (64, False)])
def test_the_page_gets_grad_cam_without_a_backward_pass(tmp_path, size, half):
    """For all classes, as `grad_cam` computes it; weights are in half precision only where that changes nothing."""
    run = save_classifier(tmp_path / "run", ("a", "b", "c"), size, half=half)
    classifier = ImageClassifier.load(run, ResNet, "cpu")
    classifier.temperature = 1.5
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    probabilities = classifier.classify(images)
    expected = torch.stack([torch.stack([classifier.grad_cam(image, k)[-1] for k in range(3)]) for image in images])
    content = export.to_browser_onnx(classifier, images, {})
    found, evidence = map(torch.from_numpy, onnxruntime.InferenceSession(content).run(None, {"images": images.numpy()}))
    assert evidence.shape == (3, 3, size // 8, size // 8) and (evidence.amax(dim=(2, 3)) > 0).any()
    torch.testing.assert_close(found, probabilities)
    # What page.html does with a map.
    heat = F.interpolate(evidence, size=(size, size), mode="bilinear", align_corners=False)
    heat -= heat.amin(dim=(2, 3), keepdim=True)
    heat /= heat.amax(dim=(2, 3), keepdim=True).clamp_min(1e-7)
    torch.testing.assert_close(heat, expected, atol=1e-4, rtol=0)
    stored = onnx.load_from_string(content).graph.initializer
    weights = [tensor for tensor in stored if tensor.name.startswith("model") and len(tensor.dims) > 1]
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in weights}
    assert len(weights) == 9 and kinds == {"FLOAT16" if half else "FLOAT"}


@pytest.mark.slow
def test_a_page_shows_the_accuracy_of_its_own_weights_only(exported, tmp_path):
    run = shutil.copytree(exported[0], tmp_path / "run")
    classifier = ImageClassifier.load(run, ResNet)
    examples, metrics = export.find_examples(run / "model.safetensors", classifier)
    assert len(examples) > 1 and metrics["images"] == json.loads((run / "metrics.json").read_text())["images"]
    shutil.copy(run / "model.safetensors", run / "pretrained.safetensors")  # as in a run with --weights
    assert export.find_examples(run / "pretrained.safetensors", classifier) == ([], {})
    other = ImageClassifier.load(save_classifier(tmp_path / "other", ("ring", "bar")), ResNet)
    assert export.find_examples(run / "model.safetensors", other) == (examples, {})
    for damaged in ('{"accuracy": 0.9', "[1, 2]", "7", '{"loss": 1}'):
        (run / "metrics.json").write_text(damaged)
        assert export.find_examples(run / "model.safetensors", classifier) == (examples, {}), damaged
    (run / "config.json").write_text('{"model_type": "resnet"}')  # of another program
    assert export.find_examples(run / "model.safetensors", classifier) == (examples, {})


def test_a_difference_is_an_error():
    probabilities = torch.tensor([[0.6, 0.4]])
    export.check("x", probabilities, probabilities + 1e-6)
    for other in (probabilities + 1e-3, torch.tensor([[0.4, 0.6]]), torch.tensor([[float("nan")] * 2])):
        with pytest.raises(export.UserError, match="x differs from PyTorch by up to"):
            export.check("x", probabilities, other)
