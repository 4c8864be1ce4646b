"""AdEMAMix with quantized moments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ._quantized import Launch, Options, QuantizedOptimizer
from ._state import Moment, State
from .adam import check_betas
from .ops import ademamix_q_

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AdEMAMix8bit(QuantizedOptimizer):
    """AdamW with a second, slow first moment, all in 8 bits: 3.05 bytes of state a parameter.

    Pagliardini, Ablin, Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", arXiv 2409.03137, with its schedules
    of alpha (equation 5) and beta3 (equation 4), computed on the device. State and defaults are bitsandbytes'.

    Args:
        params, lr, eps, weight_decay: as in :class:`AdamW8bit`.
        betas: of the fast and the second moment, and of the slow one.
        alpha: the weight of the slow moment.
        t_alpha, t_beta3: steps over which alpha and beta3 grow to their values, or None.
        options: :class:`Options`; codec ``"dyn8"`` (default), ``"lin8"`` or ``"cmp8"``.

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, or a tensor that ademamix_q_
            refuses.
    """

    _moments: ClassVar = (Moment("m"), Moment("m_slow"), Moment("v", signed=False))
    _shared_options: ClassVar = ("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}, options)

    def _check(self, group: State) -> None:
        super()._check(group)
        check_betas(self, group, 3)
        self._require(group, alpha=group["alpha"] >= 0)
        for name in ("t_alpha", "t_beta3"):
            self._require(group, **{name: group[name] is None or group[name] > 0})
        beta1, _, beta3 = group["betas"]
        self._require(group, betas=group["t_beta3"] is None or 0 < beta1 <= beta3)

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        beta1, beta2, beta3 = group["betas"]
        ademamix_q_(
            launch.params,
            launch.grads,
            *launch.lists,
            launch.master,
            launch.step,
            lr,
            _beta3(launch.step, beta1, beta3, group["t_beta3"]),
            _alpha(launch.step, group["alpha"], group["t_alpha"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            **self._call_options(launch, group),
            **scales,
        )

    def _group_from_others(self, saved: State) -> State:
        return {**super()._group_from_others(saved), "betas": tuple(saved["betas"])}


def _alpha(step: Tensor, alpha: float, steps: int | None) -> Tensor:
    return torch.full_like(step, alpha) if steps is None else (step * (alpha / steps)).clamp(max=alpha)


def _beta3(step: Tensor, beta1: float, beta3: float, steps: int | None) -> Tensor:
    """The half-life grows linearly from beta1's to beta3's."""
    if steps is None:
        return torch.full_like(step, beta3)
    first, last = math.log(beta1), math.log(beta3)
    done = (step.double() / steps).clamp(max=1.0)
    return (first * last / ((1 - done) * last + done * first)).exp().float()
