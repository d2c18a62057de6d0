"""The optimizer: Muon for convolutions, SGD for all other parameters, in one class."""

import torch
from fastai.vision.all import norm_bias_params
from torch import Tensor, nn

from cifar10.recipes import Recipe

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's, chosen to raise small singular values quickly


def zeropower_via_newtonschulz(matrix: Tensor, steps: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthogonalize a matrix approximately: its singular values come near 1. `(m, n)` → `(m, n)`.

    A few steps of Newton-Schulz iteration, without a decomposition. All steps are polynomials in the same small
    Gram matrix, so they are multiplied there, and the matrix itself is used only twice.
    These two products are computed in `dtype`; rounding to bfloat16 changes the result by less than a hundredth.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return zeropower_via_newtonschulz(matrix.T, steps, dtype).T
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    square = (x @ x.T).float()
    identity = torch.eye(len(x), device=x.device)
    a, b, c = NS_COEFFICIENTS
    step = product = a * identity + b * square + c * square @ square
    for _ in range(steps - 1):
        square = step @ square @ step
        step = a * identity + b * square + c * square @ square
        product = step @ product
    return (product.to(dtype) @ x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose updates are orthogonalized in parameter groups with `use_muon` (Muon).

    A convolution's momentum `(out, in, h, w)` is orthogonalized as the matrix `(out, in·h·w)`. Its weights are
    rescaled to the norm √out before each update, which the following normalization layer compensates. An update has
    about that norm, too, so `lr` × `lr_scale` is the relative size of a step. The other groups follow
    `torch.optim.SGD(nesterov=True)` with `weight_decay`. `dtype` is that of the large matrix products.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, and Jordan's CIFAR-10
    record, which rescales the weights as well. `torch.optim.Muon` takes matrices only.
    """

    def __init__(self, params, lr: float = 0.3, momentum: float = 0.9, weight_decay: float = 0.0,
                 use_muon: bool = False, lr_scale: float = 1.0, ns_steps: int = 3, dtype=torch.float32):  # fmt: skip
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, use_muon=use_muon, lr_scale=lr_scale)
        super().__init__(params, defaults)
        self.ns_steps, self.dtype = ns_steps, dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=weight_decay) if weight_decay else p.grad
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
                update = gradient.add(buffer, alpha=momentum)
                scale = group["lr_scale"]
                if group["use_muon"]:
                    out, inputs = len(p), p[0].numel()
                    p.mul_(out**0.5 / p.norm().clamp_min(1e-7))
                    update = zeropower_via_newtonschulz(update.flatten(1), self.ns_steps, self.dtype).view_as(p)
                    scale *= max(1, out / inputs) ** 0.5
                p.add_(update * scale if scale != 1 else update, alpha=-lr)


def param_groups_weight_decay(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Three parameter groups: convolutions, other weights, and biases with normalization layers.

    Weight decay is for weights only, and with Muon not for convolutions, whose norm is fixed anyway.
    """
    free = list(norm_bias_params(model))
    ids = {id(p) for p in free}
    weights = [p for p in model.parameters() if id(p) not in ids]
    use_muon = recipe.optimizer == "muon"
    conv = dict(use_muon=True, lr_scale=recipe.muon_lr_scale, weight_decay=0.0) if use_muon else {}
    sgd = dict(use_muon=False, lr_scale=1.0, weight_decay=recipe.weight_decay)
    return [
        {"params": [p for p in weights if p.ndim == 4], **sgd, **conv},
        {"params": [p for p in weights if p.ndim != 4], **sgd},
        {"params": free, **sgd, "weight_decay": 0.0},
    ]
