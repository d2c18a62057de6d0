"""Grad-CAM: where an image has evidence for a class."""

import torch
from fastai.callback.hook import hook_outputs
from torch import Tensor, nn
from torch.nn import functional as F


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """Where each image has evidence for a class: for each layer a heat map `(N, H, W)` in [0, 1].

    `images` is `(N, 3, H, W)`, normalized; `classes` int64 `(N,)`, the class to explain for each. The heat map is the
    sum of the layer's channels weighted by the mean gradient of the class's logit, without its negative part, resized
    to the images and scaled to [0, 1]; all zero if nothing is positive. One forward and one backward pass serve all
    images and layers; the model's mode and gradients are restored, and hooks are removed whatever happens.
    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks", 2017.
    """
    training = model.training
    model.eval()
    # As plain tensors, without fastai's types; with gradients of the images, in case that all parameters are frozen.
    images, classes = images.detach().as_subclass(Tensor).requires_grad_(), classes.as_subclass(Tensor)
    try:
        with hook_outputs(layers, detach=False) as hooks, torch.enable_grad():
            logits = model(images)
            activations = list(hooks.stored)
            # An image's logit depends on no other image, so the gradient of the sum is each image's own.
            gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), activations)
    finally:
        model.train(training)
    return [heat_map(a.detach().float(), g.float(), images.shape[-2:]) for a, g in zip(activations, gradients)]


def heat_map(activations: Tensor, gradients: Tensor, size) -> Tensor:
    """Two `(N, C, h, w)` → `(N, *size)` in [0, 1]."""
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    cam = F.relu((weights * activations).sum(dim=1, keepdim=True))
    cam = F.interpolate(cam, size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-7)
