"""Muon with a quantized momentum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ._dtensor import is_dtensor, like
from ._quantized import Launch, Options, QuantizedOptimizer
from ._state import Moment, State
from .adam import ADAM_MOMENTS, adam_step, check_betas
from .ops import momentum_q_

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Keller Jordan's quintic: the steepest at 0 for which five steps take all of (0, 1] near 1 (to 0.7 .. 1.2).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly the orthogonal factor U V^T of g = U S V^T: singular values come out between 0.7 and 1.2.

    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
    (https://kellerjordan.github.io/posts/muon), with its coefficients: X <- a X + (b A + c A^2) X, A = X X^T, from
    g / |g|.

    Args:
        g: [n, m]. dtype: of the products, all of which are torch's.

    Returns:
        [n, m], ``dtype``; zeros for zeros.
    """
    a, b, c = _QUINTIC
    x = g.to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    tall = g.shape[0] > g.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon8bit(QuantizedOptimizer):
    """Muon with an 8-bit momentum: 1.02 bytes of state a parameter.

    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024: the step is the Nesterov
    momentum made nearly orthogonal by :func:`newton_schulz`. Linear 8 bits suffice for its momentum: "Effective
    Quantization of Muon Optimizer States", arXiv 2509.23106. Formula and defaults are ``torch.optim.Muon``'s.

    Muon is for the matrices of hidden layers. What is not a matrix, embeddings and the output layer go in a group with
    ``use_muon=False``: AdamW with that group's lr, betas and eps, and codec ``dyn8``. Convolutions count as matrices
    [out, rest]. Of a sharded matrix every rank gathers the momentum and computes the whole step.

    A NaN or infinite gradient element keeps its momentum, and counts as 0 in the step: one element would otherwise
    reach every element of its matrix.

    Args:
        params: as in :class:`AdamW8bit`; groups with ``use_muon=False`` for AdamW.
        lr, weight_decay: as in ``torch.optim.Muon``; in groups with use_muon=False AdamW's.
        momentum, nesterov, ns_steps: as in ``torch.optim.Muon``.
        adjust_lr_fn: lr is multiplied by sqrt(max(1, n / m)) (``"original"``) or by 0.2 sqrt(max(n, m))
            (``"match_rms_adamw"``: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).
        betas, eps: of AdamW.
        options: :class:`Options`; codec ``"lin8"`` (default; AdamW's: ``"dyn8"``), ``"dyn8"`` or ``"cmp8"``. Not for
            matrices: master_bits and stochastic_rounding.

    Raises:
        ValueError: a hyper-parameter out of range, or a tensor of less than two dimensions in a Muon group.
        RuntimeError: a sparse gradient, or a tensor that momentum_q_ refuses.
    """

    _moments: ClassVar = (Moment("m", "momentum_buffer"),)
    _shared_options: ClassVar = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")
    _fixed_options: ClassVar = {"ns_coefficients": _QUINTIC, "eps": 1e-7}
    _codecs: ClassVar = ("lin8", "dyn8", "cmp8")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **options: Unpack[Options],
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn, "betas": betas, "eps": eps, "use_muon": True}
        self._units: dict[torch.device, Tensor] = {}
        super().__init__(params, defaults, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._units = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; ``use_muon=False`` makes it a group for AdamW."""
        if not param_group.get("use_muon", True):
            param_group = {"codec": "dyn8", **param_group}
        super().add_param_group(param_group)

    def _check(self, group: State) -> None:
        super()._check(group)
        check_betas(self, group, 2)
        self._require(group, momentum=0 < group["momentum"] < 1, ns_steps=group["ns_steps"] > 0)
        self._require(group, adjust_lr_fn=group["adjust_lr_fn"] in (None, "original", "match_rms_adamw"))
        if group["use_muon"]:
            self._require(group, master_bits=not group["master_bits"])
            self._require(group, stochastic_rounding=not group["stochastic_rounding"])

    def _moments_of(self, group: State) -> tuple[Moment, ...]:
        return self._moments if group["use_muon"] else ADAM_MOMENTS

    def _new_state(self, group: State, p: Tensor) -> State:
        if group["use_muon"] and p.dim() < 2:
            raise ValueError(f"Muon8bit is for matrices, got {list(p.shape)}; put it in a group with use_muon=False")
        return super()._new_state(group, p)

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        if not group["use_muon"]:
            return adam_step(self, launch, group, lr, scales)
        grads = launch.grads
        # The op adds lr times its direction to a parameter; here to zeros, with lr = -1.
        directions = [torch.zeros_like(g, memory_format=torch.contiguous_format) for g in grads]
        momentum_q_(
            directions,
            grads,
            *launch.lists,
            [],
            launch.step,
            self._minus_one(lr),
            beta1=group["momentum"],
            beta2=0.0,
            weight_decay=0.0,
            rule="nesterov" if group["nesterov"] else "sgd",
            **self._call_options(launch, group),
            **scales,
        )
        found_inf = scales["found_inf"]
        if found_inf is not None:  # then directions are 0, and nothing must decay
            lr = lr * (found_inf.reshape(()) == 0)
        decay = 1 - lr * group["weight_decay"]
        for whole, p, direction in zip(launch.whole, launch.params, directions, strict=True):
            direction = _orthogonal(whole, direction.nan_to_num_(0.0, 0.0, 0.0), group["ns_steps"])
            rate = lr * _adjustment(group["adjust_lr_fn"], whole.shape)
            p.copy_(p.float().mul_(decay).sub_(direction.float().mul_(rate)))  # rounded once

    def _minus_one(self, lr: Tensor) -> Tensor:
        if lr.device not in self._units:
            self._units[lr.device] = torch.full((), -1.0, dtype=torch.float32, device=lr.device)
        return self._units[lr.device]

    # torch.optim.Muon's buffer is an average, ours a sum: (1 - momentum) times smaller.

    def _group_to_torch(self, group: State) -> State:
        if not group["use_muon"]:
            raise ValueError("torch.optim.Muon has no groups for AdamW")
        return super()._group_to_torch(group)

    def _group_to_bitsandbytes(self, group: State) -> State:
        raise ValueError("Muon8bit has no counterpart in bitsandbytes")

    def _state_to_torch(self, group: State, state: State) -> State:
        return {"momentum_buffer": state["momentum_buffer"] * (1 - group["momentum"])}

    def _state_from_torch(self, group: State, state: State) -> State:
        buffer = state["momentum_buffer"].float() / (1 - group["momentum"])
        return {"step": 1.0, "m_float": buffer}  # only the first step is special


def _orthogonal(p: Tensor, direction: Tensor, steps: int) -> Tensor:
    """This rank's part of newton_schulz of p's whole direction, of which ``direction`` is this rank's part."""
    if not is_dtensor(p):
        return newton_schulz(direction.flatten(1), steps).view(direction.shape)
    from torch.distributed.tensor import DTensor, Replicate

    whole = like(p, direction, p.shape).full_tensor()
    whole = newton_schulz(whole.flatten(1), steps).view(whole.shape)
    replicated = DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()


def _adjustment(name: str | None, shape: torch.Size) -> float:
    rows, columns = shape[0], math.prod(shape[1:])
    return 0.2 * math.sqrt(max(rows, columns)) if name == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))
