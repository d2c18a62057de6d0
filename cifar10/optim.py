"""The optimizer: Muon for convolutions, SGD for all other parameters, in one class."""

import torch
from fastai.optimizer import OptimWrapper, set_item_pg
from torch import Tensor

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
    """SGD with Nesterov momentum, whose updates of convolutions are orthogonalized (Muon) unless `use_muon` is false.

    A convolution's momentum `(out, in, h, w)` is orthogonalized as the matrix `(out, in·h·w)`. Its weights are
    rescaled to the norm √out before each update, which the following normalization layer compensates. An update has
    about that norm, too, so `lr` × `lr_scale` is the relative size of a step. All other parameters follow
    `torch.optim.SGD(nesterov=True)`. `weight_decay` is for weights only: neither for parameters with one dimension
    (biases and normalization layers) nor for rescaled ones. Parameter groups play no part in this, because fastai uses
    them for freezing and discriminative learning rates. `dtype` is that of the large matrix products.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, and Jordan's CIFAR-10
    record, which rescales the weights as well. `torch.optim.Muon` takes matrices only.
    """

    def __init__(self, params, lr: float = 0.3, momentum: float = 0.9, weight_decay: float = 0.0,
                 use_muon: bool = True, lr_scale: float = 1.0, ns_steps: int = 3, dtype=torch.float32):  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.use_muon, self.lr_scale, self.ns_steps, self.dtype = use_muon, lr_scale, ns_steps, dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                muon = self.use_muon and p.ndim == 4
                gradient = p.grad.add(p, alpha=weight_decay) if weight_decay and p.ndim > 1 and not muon else p.grad
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
                update = gradient.add(buffer, alpha=momentum)
                scale = 1.0
                if muon:
                    out, inputs = len(p), p[0].numel()
                    p.mul_(out**0.5 / p.norm().clamp_min(1e-7))
                    update = zeropower_via_newtonschulz(update.flatten(1), self.ns_steps, self.dtype).view_as(p)
                    scale = self.lr_scale * max(1, out / inputs) ** 0.5
                p.add_(update * scale if scale != 1 else update, alpha=-lr)


class LiveHypers(dict):
    """Hyperparameters of a parameter group under fastai's names; what is assigned to them reaches the group."""

    def __init__(self, values: dict, group: dict, names: dict):
        super().__init__(values)
        self.group, self.names = group, names

    def __setitem__(self, name: str, value):
        super().__setitem__(name, value)
        set_item_pg(self.group, self.names.get(name, name), value)


class LiveOptimWrapper(OptimWrapper):
    """fastai's wrapper of PyTorch's optimizers, but callbacks like `ReduceLROnPlateau` can assign to `hypers`."""

    @property
    def hypers(self) -> list[LiveHypers]:
        return [LiveHypers(values, group, self.bwd_map) for values, group in zip(super().hypers, self.opt.param_groups)]
