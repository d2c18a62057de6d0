"""Training in several processes, each on its part of every batch: `torchrun --nproc_per_node 2 train.py`

All processes draw the same random numbers. Each loads, augments and trains on its own part of every batch, PyTorch's
DistributedDataParallel averages the gradients, and batch normalization is computed over all parts: the result is that
of a single process, up to rounding. Only the first process prints and writes.
"""

from typing import Any

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.torch_core import get_model, num_distrib, rank_distrib
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifar10.errors import UserError
from cifar10.processes import from_rank0
from cifar10.training.randomness import random_states, set_random_states


class Distributed(Callback):
    """Train in all processes together. Batches, losses, metrics and the model are those of a single process."""

    order = MixedPrecision.order + 1  # after layers are frozen, before anything is recorded

    def before_train(self):  # other events also come from predictions, which the first process makes alone
        if not isinstance(self.model, DistributedDataParallel):
            self.join()
        self.flop = self.recorder.flop
        for value in get_model(self.model).state_dict().values():  # hosts with different processors may have drifted
            dist.broadcast(value, 0)

    def join(self):
        """Take a part of each batch from now on."""
        if (bs := self.dls.train.bs) < num_distrib():
            raise UserError(f"batch_size is {bs}, below the {num_distrib()} processes; use fewer of them")
        self.loaders = self.dls.loaders
        set_random_states(self.dls, from_rank0(random_states)(self.dls))
        for loader in self.loaders:
            loader.share = slice(rank_distrib(), None, num_distrib())
        self.norms = [module for module in self.model.modules() if type(module) is nn.BatchNorm2d]
        for norm in self.norms:
            on_cpu, norm.process_group = norm.weight.device.type == "cpu", None
            norm.__class__ = SyncBatchNorm2d if on_cpu else nn.SyncBatchNorm
        self.wrap()

    def wrap(self):
        model = get_model(self.model)
        self.trained = [p.requires_grad for p in model.parameters()]
        self.learn.model = DistributedDataParallel(model, broadcast_buffers=False)

    def before_batch(self):
        if self.training and self.trained != [p.requires_grad for p in get_model(self.model).parameters()]:
            self.wrap()  # because it takes note of them only in the beginning

    def after_loss(self):
        if self.training:
            part = len(self.xb[0]) / self.dl.whole  # of the batch
            if part != 1 / num_distrib():
                self.learn.loss_grad = self.loss_grad * (part * num_distrib())
            self.learn.loss = self.loss.detach() * part
            dist.all_reduce(self.learn.loss)

    def after_train(self):
        recorder = self.recorder
        self.sum_up(recorder._train_mets)
        sums = self.tensor(recorder.correct, recorder.seen, recorder.flop - self.flop)
        dist.all_reduce(sums)
        recorder.correct, recorder.seen, recorder.flop = sums[0], int(sums[1]), self.flop + sums[2].item()

    def after_validate(self):
        if isinstance(self.model, DistributedDataParallel):
            self.sum_up(self.recorder._valid_mets)

    def sum_up(self, metrics):
        """Add up what the processes found."""
        for metric in metrics:
            metric.total = self.tensor(metric.total, metric.count)
            dist.all_reduce(metric.total)
            metric.total, metric.count = metric.total[0], int(metric.total[1])

    def tensor(self, *values) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.dls.device)

    def after_fit(self):
        if isinstance(self.model, DistributedDataParallel):
            self.learn.model = get_model(self.model)
            for norm in self.norms:
                norm.__class__ = nn.BatchNorm2d
            for loader in self.loaders:
                loader.share = None
                for transform in getattr(loader.after_batch, "fs", []):
                    if hasattr(transform, "part"):
                        transform.part = None


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
