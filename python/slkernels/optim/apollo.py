"""APOLLO: the scale of Adam's update, estimated in a random subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..project import rand_project
from ._low_rank import LowRankOptimizer, bias_correction, limited_update
from ._state import State

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._quantized import Options


class APOLLOAdamW(LowRankOptimizer):
    """Gradients scaled by what Adam does to their norms in a random subspace, with memory near SGD's.

    "APOLLO: SGD-like Memory, AdamW-level Performance", Zhu et al., arXiv 2412.05270, algorithm 1:

        R = G P^T (or P^T G);  N = Adam(R);  s = |N| / (|R| + 1e-8)    per channel, or one for the matrix
        U = s G, held to ``limiter`` times the norm of the last U;  W <- (1 - lr weight_decay) W - lr sqrt(scale) U

    P is random, a function of a seed, made where it is used and never stored: the state of a matrix is the moments of R
    (2 rank max(n, m)), a seed and a norm. APOLLO-Mini: :func:`APOLLOMiniAdamW`.

    Args:
        params: tensors or groups, see :func:`low_rank_groups`; matrices take part, other tensors, and groups with rank
            None, are stepped by plain AdamW. float32, bfloat16 or float16, contiguous.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        rank: of P, as long as its rows are counted: it may exceed n and m. None: plain AdamW.
        update_proj_gap: steps after which P is drawn anew.
        scale: the update has the factor sqrt(scale).
        scale_type: "channel" (rows of G where n >= m, else columns), or "tensor".
        scale_front: multiply by sqrt(scale) before the limiter, not after. The limiter compares norms of the same kind
            either way: this only decides which norm the state holds.
        limiter: the largest growth of U's norm from step to step, 1.01 in the paper; 0: none.
        proj_type: "std" projects the shorter side; "left" or "right".
        options: :class:`Options`; codec None (default): float32 moments; "dyn8", "dyn4", "cmp8", "lin8", "fp8". seed:
            of the first P too, the following ones count up; the same on all ranks. max_grad_norm acts on the plain
            tensors; s G does not depend on the size of G. There are no master_bits.

    State of a matrix, besides :class:`LowRankOptimizer`'s: ``seed`` (int64, 0-d), ``norm`` (float32, 0-d).

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, a DTensor with a rank, or a tensor
            that the ops refuse.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        scale_front: bool = False,
        limiter: float = 1.01,
        proj_type: str = "std",
        **options: Unpack[Options],
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "scale_type": scale_type,
            "scale_front": scale_front,
            "limiter": limiter,
            "proj_type": proj_type,
        }
        super().__init__(params, defaults, options)

    def _check(self, group: State) -> None:
        super()._check(group)
        self._require(group, scale=group["scale"] > 0, scale_type=group["scale_type"] in ("channel", "tensor"))
        self._require(group, proj_type=group["proj_type"] in ("std", "left", "right"))
        self._require(group, limiter=group["limiter"] == 0 or group["limiter"] >= 1)

    def _side(self, group: State, p: Tensor) -> str:
        if group["proj_type"] != "std":
            return group["proj_type"]
        return "right" if p.shape[0] >= p.shape[1] else "left"

    def _low_rank_shape(self, group: State, p: Tensor) -> tuple[int, int]:
        n, m = p.shape
        return (n, group["rank"]) if self._side(group, p) == "right" else (group["rank"], m)

    def _subspace_state(self, group: State, p: Tensor) -> State:
        seed = torch.full((), group["seed"] - 1, dtype=torch.int64, device=p.device)  # the first _renew adds one
        return {"seed": seed, "norm": torch.zeros((), dtype=torch.float32, device=p.device)}

    def _renew(self, group: State, p: Tensor, state: State) -> None:
        state["seed"].add_(1)

    def _project(self, group: State, p: Tensor, state: State) -> Tensor:
        return rand_project(p.grad, state["seed"], group["rank"], self._side(group, p))

    def _step_scalars(self, group: State, step: Tensor) -> State:
        return {"correction": bias_correction(step, group["betas"])}

    def _apply(self, group: State, p: Tensor, state: State, R: Tensor, N: Tensor, lr: Tensor, call: State) -> None:
        factor = math.sqrt(group["scale"])
        if group["scale_front"]:
            N, factor = N * factor, 1.0
        side, kind = self._side(group, p), group["scale_type"]
        limited_update(group, p, state, R, N, lr, call, side, kind=kind, alpha=factor)


def APOLLOMiniAdamW(params: Iterable[Any], lr: float | Tensor = 1e-2, **options: Any) -> APOLLOAdamW:
    """APOLLO-Mini: :class:`APOLLOAdamW` with rank 1, one factor a matrix and scale 128 (arXiv 2412.05270, section 4.2):
    the optimizer state of a matrix is two vectors. ``options`` override."""
    return APOLLOAdamW(params, lr, **{"rank": 1, "scale_type": "tensor", "scale": 128.0, **options})
