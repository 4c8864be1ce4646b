"""A linear layer of low rank, W = alpha B diag(gate) A; the gate is SoRA's, the activation CoLA's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .sl_linear import dense_linear, truncated_svd

_ops = torch.ops.slkernels


class LowRankLinear(nn.Module):
    """y = alpha (act(x A^T) * gate) B^T + bias.

    Args:
        in_features, out_features: m and n.
        rank: r >= 1, any integer; A is [r, m], B is [n, r].
        alpha: the factor itself (not divided by the rank).
        gate: a learned gate [r], ones at the start (SoRA, arXiv 2311.11696).
        activation: "none", "relu", "silu" (CoLA, arXiv 2502.10940) or "gelu".
        bias: add a learned bias [n].
        device, dtype: of the parameters.

    State dict: ``lora_A`` [r, m], ``lora_B`` [n, r], ``gate`` [r] and ``bias`` [n] where they exist.

    Raises:
        ValueError: rank or activation that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 1.0,
        gate: bool = False,
        activation: str = "none",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if activation not in ("none", "relu", "silu", "gelu"):
            raise ValueError(f"activation must be none, relu, silu or gelu, got {activation}")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.activation = rank, float(alpha), activation
        factory = {"device": device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, **factory))
        self.gate = nn.Parameter(torch.empty(rank, **factory)) if gate else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and bias as ``nn.Linear``; B such that the entries of alpha B A have the variance of its weight."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        bound = math.sqrt(3 / self.rank) / (abs(self.alpha) or 1)
        nn.init.uniform_(self.lora_B, -bound, bound)
        if self.gate is not None:
            nn.init.ones_(self.gate)
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.in_features, 1))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., m] in the parameters' dtype -> [..., n]."""
        return _ops.lowrank_linear(x, self.lora_A, self.lora_B, self.alpha, self.gate, self.activation, self.bias)

    @property
    def weight(self) -> Tensor:
        """W [n, m], composed anew at every access; ValueError with an activation, where no W exists."""
        if self.activation != "none":
            raise ValueError(f"a low-rank layer with activation {self.activation} is no single matrix")
        B = self.lora_B if self.gate is None else self.lora_B * self.gate
        return self.alpha * (B @ self.lora_A)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int, *, init: str = "svd", gate: bool = False) -> LowRankLinear:
        """A layer of ``linear``'s sizes, device, dtype, training mode and bias.

        ``init="svd"``: B A is the truncated SVD of its weight, the singular values split evenly (WeLore, PELA);
        ``init="random"``: :meth:`reset_parameters`, for pretraining.
        """
        if init not in ("svd", "random"):
            raise ValueError(f'init must be "svd" or "random", got "{init}"')
        module = cls(
            linear.in_features,
            linear.out_features,
            rank,
            gate=gate,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        ).train(linear.training)
        if linear.bias is not None:
            module.bias.copy_(linear.bias)
        if init == "svd":
            A, B = truncated_svd(linear.weight, rank)
            module.lora_A.copy_(A)
            module.lora_B.copy_(B)
        return module

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with W = alpha B diag(gate) A; ValueError with an activation."""
        return dense_linear(self.weight, self.bias, self.training)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
        text += f"alpha={self.alpha:g}, bias={self.bias is not None}"
        text += ", gate=True" if self.gate is not None else ""
        return text if self.activation == "none" else f"{text}, activation={self.activation}"
