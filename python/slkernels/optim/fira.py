"""Fira: GaLore, and the part of the gradient that GaLore leaves out."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ._low_rank import bias_correction, limited_update
from ._state import State
from .galore import GaLoreAdamW


class Fira(GaLoreAdamW):
    """:class:`GaLoreAdamW` with a full-rank update: what of G lies outside of the subspace takes part, scaled by what
    Adam did to the norms inside.

    "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", Chen et al., arXiv 2410.01623:

        R = P^T G;  N = Adam(R);  s_j = |N_j| / (|R_j| + 1e-8)    for every column (for R = G P^T: row)
        U = s (G - P R), held to ``limiter`` times the norm of the last U
        W <- (1 - lr weight_decay) W - lr scale (P N + U)

    ``scale`` multiplies the whole update and the remainder is exact. The public code is not the paper's here: it scales
    P N only and takes G - scale P R for the remainder.

    Args:
        limiter: the largest growth of U's norm from step to step, 1.01 in the paper; 0: none.
        proj_type: all of GaLoreAdamW's but "full".
        others: as in :class:`GaLoreAdamW`.

    State of a matrix, besides GaLoreAdamW's: ``norm`` (float32, 0-d).

    Raises:
        as :class:`GaLoreAdamW`.
    """

    _proj_types: ClassVar = ("std", "reverse_std", "right", "left")

    _own_options: ClassVar = {"limiter": 1.01}

    def _check(self, group: State) -> None:
        super()._check(group)
        self._require(group, limiter=group["limiter"] == 0 or group["limiter"] >= 1)

    def _subspace_state(self, group: State, p: Tensor) -> State:
        norm = torch.zeros((), dtype=torch.float32, device=p.device)
        return {**super()._subspace_state(group, p), "norm": norm}

    def _step_scalars(self, group: State, step: Tensor) -> State:
        return {"correction": bias_correction(step, group["betas"])}

    def _apply(self, group: State, p: Tensor, state: State, R: Tensor, N: Tensor, lr: Tensor, call: State) -> None:
        factors = self._factors(group, p, state)
        (side,) = factors
        limited_update(group, p, state, R, N, lr, call, side, alpha=group["scale"], **factors)
