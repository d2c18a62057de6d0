"""The optimizer: Muon for convolutions, SGD for all other parameters, in one class."""

from collections.abc import Mapping

import torch
from fastai.optimizer import Optimizer
from fastcore.basics import groupby
from torch import Tensor


def zeropower_via_newtonschulz(matrices: list[Tensor], steps: int = 3, dtype=torch.float32) -> list[Tensor]:
    """Orthogonalize matrices approximately: singular values come near 1. Each `(m, n)` → the same shape and dtype.

    A few steps of Newton-Schulz iteration, without a decomposition. All steps are polynomials in the same small
    Gram matrix, so they are multiplied there, and the matrix itself is used only twice.
    These two products are computed in `dtype`; rounding to bfloat16 changes the result by less than a hundredth.
    A GPU multiplies all Gram matrices of one size at once, because starting a product takes longer than computing it.
    """
    wide = [m.T if m.shape[0] > m.shape[1] else m for m in matrices]  # whose Gram matrices are the smaller ones
    wide = [(m / (m.norm() + 1e-7)).to(dtype) for m in wide]
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's, chosen to raise small singular values quickly
    results: list[Tensor] = [torch.empty(0)] * len(wide)
    batches = [[i] for i in range(len(wide))]
    if any(m.is_cuda for m in wide):
        batches = list(groupby(range(len(wide)), lambda i: len(wide[i])).values())
    for batch in batches:
        gram = torch.stack([wide[i] @ wide[i].T for i in batch]).float()
        identity = a * torch.eye(gram.shape[1], device=gram.device)
        step = product = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + identity  # aI + bG + cG²
        for _ in range(steps - 1):
            gram = step @ gram @ step
            step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + identity
            product = step @ product
        for i, p in zip(batch, product.to(dtype), strict=True):
            results[i] = (p @ wide[i]).to(matrices[i].dtype)
    return [r.T if m.shape[0] > m.shape[1] else r for m, r in zip(matrices, results, strict=True)]


class Muon(Optimizer):
    """SGD with Nesterov momentum, whose updates of convolutions are orthogonalized (Muon) unless `use_muon` is false.

    A convolution's momentum `(out, in, h, w)` is orthogonalized as the matrix `(out, h·w·in)`. Its weights are
    rescaled to the norm √out before each update, which the following normalization layer compensates. An update has
    about that norm, too, so `lr` × `lr_scale` is the relative size of a step. All other parameters follow
    `torch.optim.SGD(nesterov=True)`. `weight_decay` is for weights only: neither for parameters with one dimension
    (biases and normalization layers) nor for rescaled ones. Parameter groups play no part in this, because fastai uses
    them for freezing and discriminative learning rates. `dtype` is that of the large matrix products. Assign
    `lr_scales` for factors of the learning rates of single parameters.

    `hypers` holds `lr`, `mom` and `wd` of each group under fastai's names, `state[p]["momentum_buffer"]` the momentum.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, and Jordan's CIFAR-10
    record, which rescales the weights as well. `torch.optim.Muon` takes matrices only.
    """

    lr_scales: Mapping[Tensor, float] = {}

    def __init__(self, params, lr: float = 0.3, momentum: float = 0.9, weight_decay: float = 0.0,
                 use_muon: bool = True, lr_scale: float = 1.0, ns_steps: int = 3, dtype=torch.float32):  # fmt: skip
        super().__init__(params, cbs=(), lr=lr, mom=momentum, wd=weight_decay)
        self.use_muon, self.lr_scale, self.ns_steps, self.dtype = use_muon, lr_scale, ns_steps, dtype

    def zero_grad(self):
        """Free the gradients; filling them with zeros, as fastai does, would make the backward pass add to them."""
        for p, *_ in self.all_params(with_grad=True):
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all parameters that have a gradient; a `closure` is not supported, as in fastai."""
        for group, hyper in zip(self.param_lists, self.hypers, strict=True):
            if params := [p for p in group if p.grad is not None]:
                self.step_group(params, hyper["lr"], hyper["mom"], hyper["wd"])

    def step_group(self, params: list, lr: float, momentum: float, weight_decay: float):
        """One step of parameters that have gradients and the same hyperparameters."""
        convs = [i for i, p in enumerate(params) if self.use_muon and p.ndim == 4]
        gradients = [p.grad for p in params]
        for i, p in enumerate(params):
            if weight_decay and p.ndim > 1 and i not in convs:
                gradients[i] = p.grad.add(p, alpha=weight_decay)
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        # PyTorch documents its _foreach functions, in spite of their names: one call for all parameters of a group.
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        updates = list(torch._foreach_add(gradients, buffers, alpha=momentum))
        filters = [updates[i].permute(0, 2, 3, 1) for i in convs]  # (out, h, w, in): channels last, which is faster
        matrices = zeropower_via_newtonschulz([f.flatten(1) for f in filters], self.ns_steps, self.dtype)
        for i, update, matrix in zip(convs, filters, matrices, strict=True):
            rows, columns = matrix.shape
            params[i].mul_(rows**0.5 / params[i].norm().clamp_min(1e-7))
            # An orthogonal matrix has the norm √min(rows, columns); this factor makes it √rows.
            scale = self.lr_scale * max(1, rows / columns) ** 0.5
            updates[i] = matrix.view_as(update).permute(0, 3, 1, 2) * scale
        for i, p in enumerate(params):
            if p in self.lr_scales:
                updates[i] = updates[i] * self.lr_scales[p]
        torch._foreach_add_(params, updates, alpha=-lr)
