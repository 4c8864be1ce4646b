"""GaLore: AdamW whose moments live in a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..project import project, project_back_add_, randomized_range
from ._low_rank import LowRankOptimizer
from ._state import State

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._quantized import Options

PROJECTIONS = ("std", "reverse_std", "right", "left", "full")
SUBSPACES = ("randomized", "svd")


def sides(proj_type: str, n: int, m: int) -> tuple[str, ...]:
    """Which of "left" (orthonormal [n, rank]) and "right" ([rank, m]) multiply a gradient [n, m]."""
    if proj_type == "full":
        return ("left", "right")
    if proj_type in ("left", "right"):
        return (proj_type,)
    return ("right",) if (n >= m) == (proj_type == "std") else ("left",)


class GaLoreAdamW(LowRankOptimizer):
    """AdamW in a low-rank subspace of the gradient: 2 rank max(n, m) moments and rank min(n, m) projection a matrix.

    "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", Zhao et al., arXiv 2403.03507, algorithm 2;
    every ``update_proj_gap`` steps, from the gradient G of that step:

        P = the leading singular vectors of G;  R = P^T G (or G P^T);  N = Adam(R)
        W <- (1 - lr weight_decay) W - lr scale P N

    Between two subspaces a step waits for no device and copies no weight: three calls a list of matrices, with the
    update as one product into W. Adam is the paper's, with eps beside the square root of the corrected v (so is 8-bit
    GaLore's public code; its float32 optimizer has eps beside the uncorrected one). Moments go on in the new subspace,
    as there. Works with :func:`per_layer`, gradient accumulation, LR schedulers and GradScaler.

    Args:
        params: tensors or groups, see :func:`low_rank_groups`; matrices take part, other tensors, and groups with rank
            None, are stepped by plain AdamW. float32, bfloat16 or float16, contiguous.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        rank: of the subspace; at most min(n, m) vectors are used, as by the public code. None: plain AdamW.
        update_proj_gap: steps between two subspaces.
        scale: GaLore's alpha, a factor of the update.
        proj_type: "std" projects the shorter side away (rows of G onto ``right`` [rank, m] where n >= m, else columns
            onto ``left`` [n, rank]), "reverse_std" the other one; "right", "left"; "full": both.
        subspace: "randomized" (:func:`slkernels.randomized_range`, GaLore 2, arXiv 2504.20437) or "svd"
            (``torch.linalg.svd`` in float32).
        options: :class:`Options`; codec None (default): float32 moments; "dyn8" (8-bit GaLore), "dyn4", "cmp8", "lin8",
            "fp8". seed: of the range finder too; ranks with the same gradients and seed have the same subspaces. There
            are no master_bits.

    State of a matrix, besides :class:`LowRankOptimizer`'s: ``left``, ``right``, in the parameter's dtype.

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, a DTensor with a rank, or a tensor
            that the ops refuse.
    """

    _proj_types: ClassVar[tuple[str, ...]] = PROJECTIONS

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
        scale: float = 0.25,
        proj_type: str = "std",
        subspace: str = "randomized",
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
            "proj_type": proj_type,
            "subspace": subspace,
        }
        super().__init__(params, defaults, options)

    def _check(self, group: State) -> None:
        super()._check(group)
        self._require(group, proj_type=group["proj_type"] in self._proj_types, subspace=group["subspace"] in SUBSPACES)

    # ---- the subspace ------------------------------------------------------------------------------------------------

    def _factor_shapes(self, group: State, p: Tensor) -> dict[str, tuple[int, int]]:
        n, m = p.shape
        rank = min(group["rank"], n, m)
        shapes = {"left": (n, rank), "right": (rank, m)}
        return {side: shapes[side] for side in sides(group["proj_type"], n, m)}

    def _low_rank_shape(self, group: State, p: Tensor) -> tuple[int, int]:
        shapes = self._factor_shapes(group, p)
        n = shapes["left"][1] if "left" in shapes else p.shape[0]
        return n, shapes["right"][0] if "right" in shapes else p.shape[1]

    def _subspace_state(self, group: State, p: Tensor) -> State:
        shapes = self._factor_shapes(group, p)
        return {side: torch.zeros(shape, dtype=p.dtype, device=p.device) for side, shape in shapes.items()}

    def _renew(self, group: State, p: Tensor, state: State) -> None:
        for side, factor in self._directions(group, p, state).items():
            state[side].copy_(factor)

    def _directions(self, group: State, p: Tensor, state: State) -> dict[str, Tensor]:
        """float32 factors from p.grad."""
        shapes = self._factor_shapes(group, p)
        rank = min(group["rank"], *p.shape)
        if group["subspace"] == "randomized":
            seed = group["seed"] + int(state["calls"])
            return {side: randomized_range(p.grad, rank, seed, side=side) for side in shapes}
        U, _, Vh = torch.linalg.svd(p.grad.float(), full_matrices=False)
        return {side: U[:, :rank] if side == "left" else Vh[:rank] for side in shapes}

    def _factors(self, group: State, p: Tensor, state: State) -> dict[str, Tensor]:
        return {side: state[side] for side in self._factor_shapes(group, p)}

    # ---- the step ----------------------------------------------------------------------------------------------------

    def _project(self, group: State, p: Tensor, state: State) -> Tensor:
        return project(p.grad, **self._factors(group, p, state))

    def _apply(self, group: State, p: Tensor, state: State, R: Tensor, N: Tensor, lr: Tensor, call: State) -> None:
        project_back_add_(
            p,
            N,
            lr,
            **self._factors(group, p, state),
            alpha=group["scale"],
            weight_decay=group["weight_decay"],
            found_inf=call["found_inf"],
            round_mode=call["round_mode"],
            rng=call["rng"],
        )
