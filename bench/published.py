"""The memory behaviour of published training code, in plain PyTorch: what it keeps, what it copies, and when.

SLTrain: andyjm3/SLTrain at ec9894b (splora/splora_linear.py, sparse-lora/sparse_linear.cpp, train_utils.py). GaLore:
jiaweizzhao/GaLore at 1317b5f (galore_torch/adamw8bit.py, galore_projector.py). 8-bit Adam is bitsandbytes' on both; its
GPU kernel steps in place on the state format of :class:`slkernels.optim.AdamW8bit`, which stands in for it here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from slkernels.optim import AdamW8bit
from torch import Tensor, nn

# ---- SLTrain's layer -------------------------------------------------------------------------------------------------


class _SparseLinear(torch.autograd.Function):
    """W = B A' + scatter(values), built in forward and again in backward; A', the scaled A, is kept in between."""

    @staticmethod
    def _weight(B: Tensor, A: Tensor, values: Tensor, index: Tensor) -> Tensor:
        W = B.mm(A)
        W.view(-1).scatter_add_(0, index, values)
        return W

    @staticmethod
    def forward(ctx, x, B, A, values, index):
        ctx.save_for_backward(x, B, A, values, index)
        return F.linear(x, _SparseLinear._weight(B, A, values, index))

    @staticmethod
    def backward(ctx, dy):
        x, B, A, values, index = ctx.saved_tensors
        W = _SparseLinear._weight(B, A, values, index)
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dy.mm(W).view_as(x)
        dW = dy.t().mm(x.reshape(-1, x.shape[-1]))
        return dx, dW.mm(A.t()), B.t().mm(dW), dW.view(-1).gather(0, index), None


class SpLoRaLinear(nn.Module):
    """SLTrain's linear layer with int64 flat indices (arXiv 2406.02214)."""

    def __init__(self, linear: nn.Linear, rank: int, density: float, alpha: float) -> None:
        super().__init__()
        n, m = linear.weight.shape
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        count = int(density * n * m)
        index = torch.randperm(n * m)[:count].sort()[0] if like["device"].type != "meta" else torch.empty(count)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(nn.init.normal_(torch.empty(rank, m, **like)))
        self.lora_B = nn.Parameter(torch.zeros(n, rank, **like))
        self.values = nn.Parameter(torch.zeros(count, **like))
        self.register_buffer("index", index.to(like["device"], torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return _SparseLinear.apply(x, self.lora_B, self.lora_A * self.scale, self.values, self.index)


def sltrain(model: nn.Module, rank: int, density: float, alpha: float) -> None:
    """Swap the linears of attention and MLP of ``model``, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "proj" in name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, SpLoRaLinear(module, rank, density, alpha))


# ---- steps in hooks --------------------------------------------------------------------------------------------------


def per_parameter(model: nn.Module, make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> list:
    """One optimizer a parameter, stepped by a hook as soon as the gradient is there. Returns the optimizers."""
    optimizers = {}
    for p in model.parameters():
        optimizers[p] = make(p)

        def hook(p: nn.Parameter) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    return list(optimizers.values())


class GaLoreAdamW8bit:
    """GaLore's 8-bit AdamW on one weight [n, m] (arXiv 2403.03507): singular vectors of the gradient every ``gap``
    steps; the low-rank step is made on a zero "weight" that takes the place of the real one, which is copied aside."""

    def __init__(self, p: nn.Parameter, rank: int, gap: int, scale: float = 0.25) -> None:
        self.p, self.rank, self.gap, self.scale = p, rank, gap, scale
        self.steps, self.projection, self.adam = 0, None, None

    @property
    def state(self) -> dict:
        return {self.p: {"projection": self.projection, **next(iter(self.adam.state.values()))}}

    @torch.no_grad()
    def step(self) -> None:
        p, tall = self.p, self.p.shape[0] >= self.p.shape[1]
        if self.steps % self.gap == 0:
            U, _, Vh = torch.linalg.svd(p.grad.float(), full_matrices=False)
            self.projection = (Vh[: self.rank] if tall else U[:, : self.rank]).to(p.dtype)
            del U, Vh
        self.steps += 1
        P = self.projection
        grad = p.grad @ P.t() if tall else P.t() @ p.grad
        saved = p.data.clone()
        p.data = grad.clone()
        p.data.zero_()
        p.grad = grad
        if self.adam is None:
            self.adam = AdamW8bit([p], weight_decay=0.0)
        self.adam.step()
        p.data = saved.add_((p.data @ P if tall else P @ p.data) * self.scale)

    def zero_grad(self) -> None:
        self.p.grad = None
