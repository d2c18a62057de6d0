"""Batch normalization over several processes on a CPU."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization over the parts of all processes; PyTorch has it for CUDA only. `(N, C, H, W)` → the same."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance = NormalizeAll.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            running: Any = self  # which has buffers and a momentum, as the ResNet's
            running.num_batches_tracked += 1
            running.running_mean.lerp_(mean, running.momentum)
            running.running_var.lerp_(variance, running.momentum)
        return y


class NormalizeAll(torch.autograd.Function):
    """Normalize by the mean and variance of all processes, which are returned as well; the variance is unbiased.

    PyTorch's own kernels for batch normalization do the work; what they find in a part is added up in between.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        # Without weight and bias, the statistics of bfloat16 values would be rounded to bfloat16, too.
        _, mean, deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        mean, variance = mean.double(), deviation.double() ** -2 - eps  # of this part
        moments = torch.stack([mean, variance + mean.square(), torch.ones_like(mean)]) * (x.numel() / len(mean))
        dist.all_reduce(moments)
        mean, count = moments[0] / moments[2], moments[2]
        variance = moments[1] / count - mean.square()
        ctx.eps, ctx.count, stats = eps, count, [values.to(weight.dtype) for values in (mean, variance)]
        ctx.save_for_backward(x, weight, *stats)
        unbiased = (variance * count / (count - 1)).to(weight.dtype)
        ctx.mark_non_differentiable(stats[0], unbiased)
        return nn.functional.batch_norm(x, *stats, weight, bias, eps=eps), stats[0], unbiased

    @staticmethod
    def backward(ctx, *gradients):
        x, weight, mean, variance = ctx.saved_tensors
        constant = (weight, mean, variance, None, None, False, ctx.eps, [True] * 3)  # as if the statistics were
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(gradients[0], x, *constant)
        sums = torch.stack([dweight, dbias]).double()
        dist.all_reduce(sums)
        sums = (sums / ctx.count).to(weight.dtype)
        deviation = (variance + ctx.eps).rsqrt()
        slope = -weight * deviation.square() * sums[0]  # but they depend on x
        shift = -weight * deviation * sums[1] - slope * mean
        return dx.add_(torch.addcmul(shift[:, None, None], x, slope[:, None, None])), dweight, dbias, None
