"""Training in several processes, each on its part of every batch: `torchrun --nproc_per_node 2 train.py`

All processes draw the same random numbers. Each loads, augments and trains on its own part of every batch, PyTorch's
DistributedDataParallel averages the gradients, and batch normalization is computed over all parts: the result is that
of a single process, up to rounding. Only rank 0 prints and writes.
"""

from typing import Any

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.torch_core import get_model, num_distrib, rank_distrib
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from cifar10.errors import UserError
from cifar10.processes import from_rank0
from cifar10.training.randomness import random_states, set_random_states


class Distributed(Callback):
    """Train in all processes together. Batches, losses, metrics and the model are those of a single process."""

    order = MixedPrecision.order + 1  # after layers are frozen, before anything is recorded

    def before_train(self):  # other events also come from predictions, which rank 0 makes alone
        if not isinstance(self.model, DistributedDataParallel):
            self.join()
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
            # Not `convert_sync_batchnorm`: its new modules are without the hooks that callbacks have registered.
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
        self.sum_up([recorder.train_loss, recorder.train_accuracy, *(self.metrics if recorder.train_metrics else [])])

    def after_validate(self):
        recorder = self.recorder
        if isinstance(self.model, DistributedDataParallel) and recorder.valid_metrics and not recorder.cancel_valid:
            self.sum_up([recorder.loss, *self.metrics])

    def sum_up(self, metrics):
        """Replace the sums in the metrics by those of all processes."""
        for metric in metrics:
            sums = torch.tensor([float(metric.total), metric.count], dtype=torch.float64, device=self.dls.device)
            dist.all_reduce(sums)
            metric.total, metric.count = sums[0], int(sums[1])

    def after_fit(self):
        if isinstance(self.model, DistributedDataParallel):
            self.learn.model = get_model(self.model)
            for norm in self.norms:
                norm.__class__ = nn.BatchNorm2d
            for loader in self.loaders:
                loader.share = None
                for transform in getattr(loader.after_batch, "fs", []):
                    if hasattr(transform, "shard"):
                        transform.shard = None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization over the parts of all processes; PyTorch has it for CUDA only. `(N, C, H, W)` → the same."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        norm: Any = self  # which has weights, buffers and a momentum, as the ResNet's
        values = x.to(norm.weight.dtype)  # the statistics of bfloat16 values would be rounded to bfloat16
        mean = values.mean(dim=(0, 2, 3))  # of this part; `torch.var_mean` is many times slower
        variance = (values - mean[:, None, None]).square().mean(dim=(0, 2, 3)).double()
        moments = torch.stack([mean.double(), variance + mean.double().square(), torch.ones_like(variance)])
        mean, square, count = all_reduce(moments * (x.numel() / len(mean)))  # adds up the gradients, too
        mean, square = mean / count, square / count
        variance = square - mean.square()
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.to(values.dtype), norm.momentum)
            norm.running_var.lerp_((variance * count / (count - 1)).to(values.dtype), norm.momentum)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift, scale = (v.to(values.dtype)[:, None, None] for v in (norm.bias - mean * scale, scale))
        return torch.addcmul(shift, values, scale).to(x.dtype)
