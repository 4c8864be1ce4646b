"""Q-GaLore: GaLore with 8-bit weights, a 4-bit projection, and subspaces that are drawn less often once they settle."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.int8_linear import int8_layer_of
from ..project_quant import dequantize_group, project_back_add_q_, quantize_group
from ._state import State
from .galore import GaLoreAdamW

_BITS, _GROUP = 4, 256  # of the projection
_KEYS = ("codes", "scale", "zero")


class QGaLoreAdamW8bit(GaLoreAdamW):
    """:class:`GaLoreAdamW` with 8-bit moments, the projection in 4 bits (packed: half a byte an element), and the
    weights of :class:`slkernels.nn.Int8Linear` trained in 8 bits with stochastic rounding.

    "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", Zhang et al., arXiv
    2407.08296. A weight in 8 bits is dequantized, decayed, updated and quantized again, with fresh ranges, in one pass,
    and no copy of it is made. All other tensors take part as in GaLoreAdamW: floating-point matrices of a group with a
    rank, and plain AdamW on 8-bit moments for the rest, so that embeddings, norms and the head train too.

    When a subspace is drawn, the cosine between its leading vector and the last one's (its absolute value: a singular
    vector has no sign) joins a queue; when the mean of the last ``queue_size`` reaches ``cos_threshold``, the matrix'
    interval is multiplied by ``gamma_proj``.

    Args:
        update_proj_gap: the first interval of every matrix.
        cos_threshold, gamma_proj, queue_size: 0.4, 2 and 5 in the paper.
        proj_type: all of GaLoreAdamW's but "full".
        options: as in :class:`GaLoreAdamW`, but codec "dyn8" by default, and stochastic_rounding True, of 8-bit weights
            and of 16-bit tensors: rounded to nearest, 8-bit weights lose small steps.
        others: as in :class:`GaLoreAdamW`.

    State of a matrix, besides :class:`LowRankOptimizer`'s: ``codes``, ``scale``, ``zero`` of the projection
    (:func:`slkernels.quantize_group`, 4 bits, groups of 256), ``leading`` (its first vector), ``similarity`` (float32
    [queue_size]) and ``gap`` (int64) on the CPU.

    Raises:
        as :class:`GaLoreAdamW`. ValueError: an Int8Linear in a group with rank None.
    """

    _proj_types: ClassVar = ("std", "reverse_std", "right", "left")

    _own_options: ClassVar = {"cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    _option_defaults: ClassVar = {"codec": "dyn8", "stochastic_rounding": True}

    def _check(self, group: State) -> None:
        super()._check(group)
        self._require(group, gamma_proj=group["gamma_proj"] >= 1, queue_size=group["queue_size"] >= 1)

    def _new_state(self, group: State, p: Tensor) -> State:
        if int8_layer_of(p) is not None and not self._takes_part(group, p):
            raise ValueError("the weight of an Int8Linear must be in a group with a rank")
        return super()._new_state(group, p)

    # ---- the subspace ------------------------------------------------------------------------------------------------

    def _subspace_state(self, group: State, p: Tensor) -> State:
        (shape,) = self._factor_shapes(group, p).values()
        factor = torch.zeros(shape, dtype=p.dtype, device=p.device)
        state = dict(zip(_KEYS, quantize_group(factor, _BITS, _GROUP), strict=True))
        state["leading"] = torch.zeros(max(shape), dtype=torch.float32, device=p.device)
        state["similarity"] = torch.full((group["queue_size"],), -torch.inf)
        state["gap"] = torch.tensor(group["update_proj_gap"])
        return state

    def _renew(self, group: State, p: Tensor, state: State) -> None:
        ((side, factor),) = self._directions(group, p, state).items()
        for key, value in zip(_KEYS, quantize_group(factor, _BITS, _GROUP), strict=True):
            state[key].copy_(value)
        leading = _leading(side, factor)
        if int(state["due"]) > 0 and not leading.is_meta:
            self._adapt(group, state, float(F.cosine_similarity(state["leading"], leading, dim=0)))
        state["leading"].copy_(leading)

    def _adapt(self, group: State, state: State, cosine: float) -> None:
        queue = state["similarity"]
        queue.copy_(queue.roll(-1))
        queue[-1] = abs(cosine)
        if float(queue.mean()) >= group["cos_threshold"]:  # -inf until the queue is full
            state["gap"].mul_(group["gamma_proj"])

    def _gap(self, group: State, state: State) -> int:
        return int(state["gap"])

    def _factors(self, group: State, p: Tensor, state: State) -> dict[str, Tensor]:
        ((side, shape),) = self._factor_shapes(group, p).items()
        codes = (state[key] for key in _KEYS)
        return {side: dequantize_group(*codes, columns=shape[1], bits=_BITS, group=_GROUP, dtype=p.dtype)}

    # ---- the step ----------------------------------------------------------------------------------------------------

    def _apply(self, group: State, p: Tensor, state: State, R: Tensor, N: Tensor, lr: Tensor, call: State) -> None:
        layer = int8_layer_of(p)
        if layer is None:
            super()._apply(group, p, state, R, N, lr, call)
            return
        project_back_add_q_(
            layer.codes,
            layer.scale,
            layer.zero,
            N,
            lr,
            **self._factors(group, p, state),
            group=layer.group,
            alpha=group["scale"],
            weight_decay=group["weight_decay"],
            found_inf=call["found_inf"],
            round_mode=call["round_mode"],
            rng=call["rng"],
        )


def _leading(side: str, factor: Tensor) -> Tensor:
    return factor[0] if side == "right" else factor[:, 0]
