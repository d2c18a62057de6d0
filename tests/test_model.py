import ast
import csv

import pytest
import torch
from conftest import ROOT
from torch import nn

from model import NORMS, ResBlock, ResNet


def rows(model: nn.Module) -> list[tuple[str, list[int], int]]:
    """(kind, output shape, own parameters) of each layer, in the order of the forward pass."""
    found, hooks = [], []
    for module in model.modules():
        if isinstance(module, ResBlock) or not list(module.children()):

            def hook(module, _, output):
                found.append((type(module).__name__, [-1, *output.shape[1:]], own_parameters(module)))

            hooks.append(module.register_forward_hook(hook))
    model.eval()(torch.randn(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return found


def own_parameters(module: nn.Module) -> int:
    return 0 if isinstance(module, ResBlock) else sum(p.numel() for p in module.parameters())


def test_layer_by_layer_as_the_notebook():
    with (ROOT / "results/notebook/layers.csv").open() as file:
        notebook = [
            (row["layer"].split("-")[0], ast.literal_eval(row["output_shape"]), int(row["params"]))
            for row in csv.DictReader(file)
        ]
    notebook[1], notebook[2] = notebook[2], notebook[1]  # PrepLayer: the assignment has BN → ReLU
    names = {"BasicBlock": "ResBlock", "MaxPool2d": "MaxPool2d"}
    expected = [(names.get(kind, kind), shape, params) for kind, shape, params in notebook]
    ours = [(kind.replace("Adaptive", ""), shape, params) for kind, shape, params in rows(ResNet())]
    assert len(expected) == 27
    assert ours == expected


def test_parameters():
    assert sum(p.numel() for p in ResNet().parameters() if p.requires_grad) == 6_574_090


@pytest.mark.parametrize("size", [16, 24, 32, 40, 64])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_sizes_norms_and_classes(size, norm):
    logits = ResNet(num_classes=7, norm=norm, width=4)(torch.randn(3, 3, size, size))
    assert logits.shape == (3, 7)
    logits.sum().backward()


def test_layer_norm_replaces_every_normalization():
    batch, layer = (list(ResNet(norm=norm, width=4).modules()) for norm in ("batch", "layer"))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in batch) == 8
    assert not any(isinstance(m, nn.BatchNorm2d) for m in layer)
    groups = [m for m in layer if isinstance(m, nn.GroupNorm)]
    assert len(groups) == 8 and all(m.num_groups == 1 for m in groups)


def test_the_norm_layer_is_layer_norm():
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(NORMS["layer"](8)(x), nn.functional.layer_norm(x, x.shape[1:]))


def test_res_block_adds_its_input():
    block = ResBlock(4, nn.BatchNorm2d).eval()
    x = torch.randn(2, 4, 8, 8)
    nn.init.zeros_(block.norm2.weight)  # R(x) is now ReLU(0)
    assert torch.equal(block(x), x)


def test_pool_is_max_pool_4_on_32_pixel_images():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResNet(width=1).pool(x), nn.MaxPool2d(4)(x))


def test_fresh_logits_are_near_the_uniform_distribution():
    torch.manual_seed(0)
    model = ResNet()
    logits = model(torch.randn(32, 3, 32, 32))
    assert nn.functional.cross_entropy(logits, torch.arange(32) % 10) < 2.5
    assert nn.functional.cross_entropy(logits / model.logit_scale, torch.arange(32) % 10) > 2.5


@pytest.mark.parametrize("wrong", [{"norm": "group"}, {"width": 0}, {"num_classes": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ResNet(**wrong)


def test_its_arguments_build_it_again():
    model = ResNet(num_classes=3, norm="layer", width=2, logit_scale=0.5)
    again = ResNet(**model.args)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert again.args == model.args and torch.equal(again(x), model(x))
