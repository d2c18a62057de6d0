"""Grad-CAM: where an image has evidence for a class."""

from collections.abc import Sequence

import torch
from fastai.callback.hook import hook_outputs
from torch import Tensor, nn
from torch.nn import functional as F

GRADCAM_LAYERS = ("layer1", "layer2", "layer3")  # as in the assignment's notebook


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, layers: Sequence[nn.Module] = ()) -> Tensor:
    """Where each image has evidence for a class: heat maps `(layers, N, H, W)` in [0, 1].

    `images` is `(N, 3, H, W)`, normalized; `classes` int64 `(N,)`, the class to explain for each; `layers` are modules
    of the model, by default those of `GRADCAM_LAYERS`. A heat map is the sum of a layer's channels weighted by the
    mean gradient of the class's logit, without its negative part, resized to the images and scaled to [0, 1]; all zero
    if nothing is positive. One forward and one backward pass serve all images and layers; the model's mode and
    gradients are restored, and hooks are removed whatever happens.
    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks", 2017.
    """
    layers = layers or [model.get_submodule(name) for name in GRADCAM_LAYERS]
    training = model.training
    model.eval()
    # As plain tensors, without fastai's types; with gradients of the images, in case that all parameters are frozen.
    images, classes = images.detach().as_subclass(Tensor).requires_grad_(), classes.as_subclass(Tensor)
    try:
        with hook_outputs(layers, detach=False) as hooks, torch.enable_grad():
            logits = model(images)
            activations = list(hooks.stored)
            # An image's logit depends on no other image, so the gradient of the sum is each image's own.
            explained = logits.gather(1, classes.to(images.device)[:, None]).sum()
            gradients = torch.autograd.grad(explained, activations)
    finally:
        model.train(training)
    maps = [heat_map(a.detach().float(), g.float(), images.shape[-2:]) for a, g in zip(activations, gradients)]
    return torch.stack(maps)


def heat_map(activations: Tensor, gradients: Tensor, size) -> Tensor:
    """Two `(N, C, h, w)` → `(N, *size)` in [0, 1]."""
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    cam = F.relu((weights * activations).sum(dim=1, keepdim=True))
    cam = F.interpolate(cam, size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-7)
