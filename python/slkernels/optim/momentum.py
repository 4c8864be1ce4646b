"""Lion and SGD with a quantized momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ._quantized import Launch, Options, QuantizedOptimizer
from ._state import Moment, State
from .ops import momentum_q_

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Momentum(QuantizedOptimizer):
    def _rule(self, group: State) -> dict[str, Any]:
        """rule, beta1 and beta2 of momentum_q_."""
        raise NotImplementedError

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        momentum_q_(
            launch.params,
            launch.grads,
            *launch.lists,
            launch.master,
            launch.step,
            lr,
            weight_decay=group["weight_decay"],
            **self._rule(group),
            **self._call_options(launch, group),
            **scales,
        )


class Lion8bit(_Momentum):
    """Lion with an 8-bit momentum: 1.02 bytes of state a parameter.

    Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2: the step is the sign of
    an interpolation, the decay decoupled. State and defaults are bitsandbytes'.

    Args:
        params, weight_decay: as in :class:`AdamW8bit`. lr: a third to a tenth of AdamW's.
        betas: of the interpolation, and of the momentum.
        options: :class:`Options`; codec ``"dyn8"`` (default), ``"lin8"`` or ``"cmp8"``.

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, or a tensor that momentum_q_
            refuses.
    """

    _moments: ClassVar = (Moment("m"),)
    _shared_options: ClassVar = ("lr", "betas", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    def _check(self, group: State) -> None:
        super()._check(group)
        self._require(group, betas=len(group["betas"]) == 2 and all(0 <= b < 1 for b in group["betas"]))

    def _rule(self, group: State) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"rule": "lion", "beta1": beta1, "beta2": beta2}

    def _group_to_bitsandbytes(self, group: State) -> State:
        return {**super()._group_to_bitsandbytes(group), "eps": 0.0}

    def _group_from_others(self, saved: State) -> State:
        return {**super()._group_from_others(saved), "betas": tuple(saved["betas"][:2])}


class SGD8bit(_Momentum):
    """``torch.optim.SGD`` with an 8-bit momentum: 1.02 bytes of state a parameter. Dampening is 0.

    Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013. State as in
    bitsandbytes' ``SGD8bit``, which has no Nesterov momentum.

    Args:
        params: as in :class:`AdamW8bit`. lr, momentum, weight_decay, nesterov: as in ``torch.optim.SGD``; momentum must
            not be 0, for then there is no state to quantize.
        options: :class:`Options`; codec ``"dyn8"`` (default), ``"lin8"`` or ``"cmp8"``.

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, or a tensor that momentum_q_
            refuses.
    """

    _moments: ClassVar = (Moment("m", "momentum_buffer"),)
    _shared_options: ClassVar = ("lr", "momentum", "weight_decay", "nesterov")
    _fixed_options: ClassVar = {"dampening": 0, "maximize": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, options)

    def _check(self, group: State) -> None:
        super()._check(group)
        self._require(group, momentum=0 < group["momentum"] < 1)

    def _rule(self, group: State) -> dict[str, Any]:
        rule = "nesterov" if group["nesterov"] else "sgd"
        return {"rule": rule, "beta1": group["momentum"], "beta2": 0.0}

    def _group_to_bitsandbytes(self, group: State) -> State:
        if group["nesterov"]:
            raise ValueError("bitsandbytes' SGD8bit has no Nesterov momentum")
        return {k: group[k] for k in ("lr", "weight_decay")} | {"betas": (group["momentum"], 0.0), "eps": 0.0}

    def _group_from_others(self, saved: State) -> State:
        ours = super()._group_from_others(saved)
        return {"momentum": saved["betas"][0], "nesterov": False, **ours} if "betas" in saved else ours

    def _state_to_torch(self, group: State, state: State) -> State:
        return {"momentum_buffer": state["momentum_buffer"]}

    def _state_from_torch(self, group: State, state: State) -> State:
        return {"step": 1.0, **super()._state_from_torch(group, state)}  # only the first step is special
