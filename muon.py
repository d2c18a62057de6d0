"""Muon, an optimizer that makes as much use of the rare directions of a gradient as of the frequent ones."""

import torch
from torch import Tensor

NS_STEPS = 3  # of Newton-Schulz; more come closer to orthogonal and take longer
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's, chosen to raise small singular values quickly
CONV_LR = 0.2  # of the learning rate for the other parameters, so that one schedule serves both


def orthogonalised(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix with its singular values brought near 1, very small ones only nearer: `(m, n)` → the same shape.

    That takes a few steps of Newton-Schulz iteration, and no decomposition. All steps are polynomials of the same small
    square, the matrix times its transpose, so they are multiplied there, and the matrix itself is touched only twice.
    These two products are computed in `dtype`; what bfloat16 rounds off is less than a hundredth of the result.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T, dtype).T
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    square = (x @ x.T).float()
    identity = torch.eye(len(x), device=x.device)
    a, b, c = NS_COEFFICIENTS
    steps = None
    for left in reversed(range(NS_STEPS)):
        step = a * identity + b * square + c * square @ square
        steps = step if steps is None else step @ steps
        if left:
            square = step @ square @ step
    return (steps.to(dtype) @ x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, SGD with Nesterov momentum and weight decay for all other parameters.

    A convolution's momentum `(out, in, h, w)` is orthogonalised as the matrix `(out, in·h·w)`. Its weights are
    brought back to the length √out before each update, which the normalisation layer behind it makes up for. An update
    has about that length, too, so the learning rate of convolutions, `CONV_LR` times that of the others, is the
    relative size of a step. `torch.optim.Muon` takes matrices only. Source: Jordan et al., "Muon: An optimizer for
    hidden layers in neural networks", 2024, and Jordan's CIFAR-10 record, whose weights keep their length as well.
    `dtype` is that of the large matrix products, bfloat16 where the hardware has it.
    """

    def __init__(
        self,
        params,
        lr: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                is_conv = p.ndim == 4
                gradient = p.grad if is_conv else p.grad.add(p, alpha=weight_decay)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
                update = gradient.add(buffer, alpha=momentum)
                if is_conv:
                    out, inputs = len(p), p[0].numel()
                    p.mul_(out**0.5 / p.norm().clamp_min(1e-7))
                    update = orthogonalised(update.flatten(1), self.dtype).view_as(p)
                    update *= CONV_LR * max(1, out / inputs) ** 0.5
                p.add_(update, alpha=-lr)
