"""Family ``project``: gradients in a small subspace, and the way back as an update of the weight.

W, G are [n, m]. A projection is orthonormal rows ``right`` [r, m] (R = G right^T, GaLore's choice for n >= m),
orthonormal columns ``left`` [n, r] (R = left^T G, for n < m), or both. "GaLore: Memory-Efficient LLM Training by
Gradient Low-Rank Projection", arXiv 2403.03507. APOLLO's update is in
:mod:`slkernels.project_apollo`, quantized weights are in :mod:`slkernels.project_quant`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define, needs_grad

_ops = torch.ops.slkernels

SIDES = ("auto", "left", "right")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# rng: int64 [2] = (seed, step), as in adam_q_.
ROUNDING = "int round_mode=0, Tensor? rng=None"


def check_matrix(op: str, name: str, t: Tensor) -> None:
    check(t.dim() == 2, op, lambda: f"{name} must be [n, m], got {list(t.shape)}")


def check_shape(op: str, name: str, t: Tensor, shape: tuple) -> None:
    check(
        t.dim() == len(shape) and tuple(t.shape) == shape,
        op,
        lambda: f"{name} must be {list(shape)}, got {list(t.shape)}",
    )


def resolve_side(op: str, side: str, n: int, m: int) -> str:
    """The side that is projected: ``"auto"`` projects the longer rows or columns away as GaLore does."""
    check(side in SIDES, op, lambda: f"side must be auto, left or right, got {side}")
    if side != "auto":
        return side
    return "right" if n >= m else "left"


def check_projection(op: str, left: Tensor | None, right: Tensor | None) -> None:
    check(left is not None or right is not None, op, lambda: "left or right must be given")
    if left is not None:
        check(left.dim() == 2, op, lambda: f"left must be [n, rank], got {list(left.shape)}")
    if right is not None:
        check(right.dim() == 2, op, lambda: f"right must be [rank, m], got {list(right.shape)}")


# ---- project, project_back ------------------------------------------------------------------------------------------


def _project_fake(G, left=None, right=None):
    op = "project"
    check_matrix(op, "G", G)
    check_projection(op, left, right)
    n, m = G.shape
    if left is not None:
        check_shape(op, "left", left, (n, left.shape[1]))
    if right is not None:
        check_shape(op, "right", right, (right.shape[0], m))
    return G.new_empty((n if left is None else left.shape[1], m if right is None else right.shape[0]))


def _project_back_fake(N, left=None, right=None):
    op = "project_back"
    check_matrix(op, "N", N)
    check_projection(op, left, right)
    if left is not None:
        check_shape(op, "left", left, (left.shape[0], N.shape[0]))
    if right is not None:
        check_shape(op, "right", right, (N.shape[1], right.shape[1]))
    return N.new_empty((N.shape[0] if left is None else left.shape[0], N.shape[1] if right is None else right.shape[1]))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _project_backward(ctx, dR):
    G, left, right = ctx.saved_tensors
    dG = dleft = dright = None
    if needs_grad(ctx, 0):
        dG = _ops.project_back(dR, left, right)
    if left is not None and needs_grad(ctx, 1):
        dleft = (G if right is None else G @ right.t()) @ dR.t()
    if right is not None and needs_grad(ctx, 2):
        dright = dR.t() @ (G if left is None else left.t() @ G)
    return dG, dleft, dright


def _project_back_backward(ctx, dU):
    N, left, right = ctx.saved_tensors
    dN = dleft = dright = None
    if needs_grad(ctx, 0):
        dN = _ops.project(dU, left, right)
    if left is not None and needs_grad(ctx, 1):
        dleft = (dU if right is None else dU @ right.t()) @ N.t()
    if right is not None and needs_grad(ctx, 2):
        dright = N.t() @ (dU if left is None else left.t() @ dU)
    return dN, dleft, dright


define(
    "project(Tensor G, Tensor? left=None, Tensor? right=None) -> Tensor",
    fake=_project_fake,
    setup_context=_setup,
    backward=_project_backward,
)
define(
    "project_back(Tensor N, Tensor? left=None, Tensor? right=None) -> Tensor",
    fake=_project_back_fake,
    setup_context=_setup,
    backward=_project_back_backward,
)


def project(G: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """R = left^T G right^T; a factor that is not given is the identity.

    Args:
        G: [n, m], float32, bfloat16, float16 or float64. left: [n, rank]. right: [rank, m]. One of the two or both
            (GaLore's ``full``), of G's dtype; any strides.

    Returns:
        [n, rank], [rank, m] or, two-sided, [left's rank, right's rank], G's dtype. Two-sided, the first product is
        rounded to G's dtype.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or neither left nor right.
    """
    return _ops.project(G, left, right)


def project_back(N: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """U = left N right, the adjoint of :func:`project`: [n, m], N's dtype. Arguments and errors as there."""
    return _ops.project_back(N, left, right)


# ---- project_back_add_ ----------------------------------------------------------------------------------------------


def check_rounding(op: str, round_mode: int, rng: Tensor | None) -> None:
    check(round_mode in (0, 1), op, lambda: f"round_mode must be 0 (nearest even) or 1 (stochastic), got {round_mode}")
    check(round_mode == 0 or rng is not None, op, lambda: "round_mode 1 needs rng, int64 [2] = (seed, step)")


def _project_back_add_fake(
    W, N, lr, left=None, right=None, *, alpha=1.0, weight_decay=0.0, found_inf=None, round_mode=0, rng=None
):
    op = "project_back_add_"
    check_matrix(op, "W", W)
    check_matrix(op, "N", N)
    check_projection(op, left, right)
    if left is not None:
        check_shape(op, "left", left, (W.shape[0], N.shape[0]))
    if right is not None:
        check_shape(op, "right", right, (N.shape[1], W.shape[1]))
    check_rounding(op, round_mode, rng)


define(
    "project_back_add_(Tensor(a!) W, Tensor N, Tensor lr, Tensor? left=None, Tensor? right=None, *, float alpha=1.0, "
    f"float weight_decay=0.0, Tensor? found_inf=None, {ROUNDING}) -> ()",
    fake=_project_back_add_fake,
)


def project_back_add_(
    W: Tensor,
    N: Tensor,
    lr: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    alpha: float = 1.0,
    weight_decay: float = 0.0,
    found_inf: Tensor | None = None,
    round_mode: int = 0,
    rng: Tensor | None = None,
) -> None:
    """W <- (1 - lr weight_decay) W - lr alpha left N right, in place: GaLore's update (arXiv 2403.03507, algorithm 2).

    No copy of W and no update of its size: the product is made in slices of rows that stay in cache. W is read and
    written once and rounded once; the product is rounded to N's dtype before it is added.

    Args:
        W: [n, m], float32, bfloat16 or float16, contiguous. Call under ``torch.no_grad()``.
        N: the normalized low-rank update, [n, rank], [rank, m] or two-sided as :func:`project` returns it. W's dtype,
            or float32.
        lr: float32, one element, on W's device; read there, so that a captured graph follows a schedule.
        left, right: [n, rank], [rank, m], of N's dtype, one or both.
        alpha: GaLore's scale. weight_decay: decoupled.
        found_inf: float32, one element: where it is not 0, no bit of W changes.
        round_mode: 0 rounds a 16-bit W to nearest even; 1 stochastically, so that updates far below W's last bit count
            on average. rng: int64 [2], (seed, step), on W's device, not modified: count the step up.
            The random bits of an element depend on rng and its position only.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    _ops.project_back_add_(
        W,
        N,
        lr,
        left,
        right,
        alpha=alpha,
        weight_decay=weight_decay,
        found_inf=found_inf,
        round_mode=round_mode,
        rng=rng,
    )


# ---- randomized_range -----------------------------------------------------------------------------------------------


def _factor_shape(op: str, side: str, n: int, m: int, rank: int) -> tuple[int, int]:
    return (n, rank) if resolve_side(op, side, n, m) == "left" else (rank, m)


def _randomized_range_fake(G, rank, seed, oversample=8, iters=1, side="auto"):
    op = "randomized_range"
    check_matrix(op, "G", G)
    n, m = G.shape
    resolve_side(op, side, n, m)
    check(0 < rank <= min(n, m), op, lambda: f"rank must be from 1 to min(n, m) = {min(n, m)}, got {rank}")
    check(oversample >= 0 and iters >= 0, op, lambda: "oversample and iters must not be negative")
    return G.new_empty(_factor_shape(op, side, n, m, rank), dtype=torch.float32)


define(
    'randomized_range(Tensor G, int rank, Tensor seed, int oversample=8, int iters=1, str side="auto") -> Tensor',
    fake=_randomized_range_fake,
)


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def randomized_range(
    G: Tensor, rank: int, seed: int | Tensor = 0, oversample: int = 8, iters: int = 1, side: str = "auto"
) -> Tensor:
    """The leading singular vectors of G by a randomized range finder, in place of ``torch.linalg.svd``.

    Halko, Martinsson, Tropp, "Finding structure with randomness", arXiv 0909.4061, algorithm 4.4, with Rayleigh-Ritz at
    the end, as GaLore 2 uses it (arXiv 2504.20437). Bases are made orthonormal by Cholesky-QR with float64 Gram
    matrices (Yamamoto et al., CholeskyQR2), after a relative perturbation of 1e-6 that gives rank-deficient G (zeros
    included) full rank: the result is orthonormal to float32 accuracy for every finite G.

    Test vectors are Philox normals: ranks with the same G and seed get the same bits (on one kind of device and number
        of
    threads).

    Args:
        G: [n, m], float32, bfloat16 or float16; the work is in float32.
        rank: singular vectors to return, 1 .. min(n, m).
        seed: int, or int64 with one element on G's device.
        oversample: further vectors that take part and are dropped at the end. iters: power iterations.
        side: ``"right"``: [rank, m], right singular vectors as rows; ``"left"``: [n, rank], left ones as columns;
            ``"auto"``: right where n >= m. As :func:`project` takes them.

    Returns:
        float32, orthonormal, by falling singular value. NaN where G is not finite. On CUDA, ``linalg.eigh`` of a
        [rank + oversample] matrix waits for the device: call it outside of a captured graph.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    return _ops.randomized_range(G.detach(), rank, _seed_tensor(seed, G.device), oversample, iters, side)


# ---- rand_project ---------------------------------------------------------------------------------------------------


def check_seed(op: str, seed: Tensor) -> None:
    check(seed.numel() == 1 and seed.dtype == torch.int64, op, lambda: "seed must be an int64 tensor with one element")


def _rand_matrix_fake(seed, rank, size, dtype=torch.float32):
    check_seed("rand_matrix", seed)
    check(rank >= 0 and size >= 0, "rand_matrix", lambda: "rank and size must not be negative")
    return seed.new_empty((rank, size), dtype=dtype)


def _rand_project_fake(G, seed, rank, side="auto"):
    op = "rand_project"
    check_matrix(op, "G", G)
    check_seed(op, seed)
    n, m = G.shape
    check(rank > 0, op, lambda: f"rank must be at least 1, got {rank}")
    return G.new_empty((rank, m) if resolve_side(op, side, n, m) == "left" else (n, rank))


def _rand_project_back_fake(R, seed, size, side):
    op = "rand_project_back"
    check_matrix(op, "R", R)
    check_seed(op, seed)
    check(side in ("left", "right"), op, lambda: f"side must be left or right, got {side}")
    return R.new_empty((size, R.shape[1]) if side == "left" else (R.shape[0], size))


def _rand_project_setup(ctx, inputs, output):
    G, seed, _, side = inputs
    ctx.save_for_backward(seed)
    ctx.side = resolve_side("rand_project", side, *G.shape)
    ctx.size = G.shape[0 if ctx.side == "left" else 1]


def _rand_project_backward(ctx, dR):
    return _ops.rand_project_back(dR, ctx.saved_tensors[0], ctx.size, ctx.side), None, None, None


def _rand_project_back_setup(ctx, inputs, output):
    R, seed, _, ctx.side = inputs
    ctx.save_for_backward(seed)
    ctx.rank = R.shape[0 if ctx.side == "left" else 1]


def _rand_project_back_backward(ctx, dU):
    return _ops.rand_project(dU, ctx.saved_tensors[0], ctx.rank, ctx.side), None, None, None


define("rand_matrix(Tensor seed, int rank, int size, ScalarType dtype=float) -> Tensor", fake=_rand_matrix_fake)
define(
    'rand_project(Tensor G, Tensor seed, int rank, str side="auto") -> Tensor',
    fake=_rand_project_fake,
    setup_context=_rand_project_setup,
    backward=_rand_project_backward,
)
define(
    "rand_project_back(Tensor R, Tensor seed, int size, str side) -> Tensor",
    fake=_rand_project_back_fake,
    setup_context=_rand_project_back_setup,
    backward=_rand_project_back_backward,
)


def rand_matrix(
    seed: int | Tensor,
    rank: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Z / sqrt(rank) with Z [rank, size] of standard normals: what :func:`rand_project` multiplies with.

    Z[j, i] is a pure function of (seed, j, i): Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller in float32
    operations of fixed order, so that every device and instruction set gives the same bits (docs/project.md).

    Args:
        seed: int, or int64 with one element, whose device is the result's. rank: rows, below 2^32.
        size: columns, below 2^34. dtype: float32, bfloat16, float16 or float64, rounded from float32.
        device: of the result, where seed is an int.
    """
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=device)
    return _ops.rand_matrix(seed, rank, size, dtype)


def rand_project(G: Tensor, seed: int | Tensor, rank: int, side: str = "auto") -> Tensor:
    """R = G P^T (side right) or P^T G (left) with P = ``rand_matrix(seed, rank, ...)`` (left: its transpose).

    P is a function of the seed and never stored: it is made where it is used, a million numbers at a time. Up to 8
    rows take one pass over G (rank 1 is APOLLO-Mini's seeded GEMV). APOLLO: arXiv 2412.05270; Flora: 2402.03293.

    Args:
        G: [n, m], float32, bfloat16, float16 or float64; P is rounded to G's dtype.
        seed: int, or int64 with one element on G's device. rank: at least 1.
        side: ``"right"`` (R is [n, rank]), ``"left"`` ([rank, m]), ``"auto"``: right where n >= m.

    Returns:
        R, G's dtype. Differentiable in G.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit.
    """
    return _ops.rand_project(G, _seed_tensor(seed, G.device), rank, side)


def rand_project_back(R: Tensor, seed: int | Tensor, size: int, side: str) -> Tensor:
    """R P (side right: [n, rank] -> [n, size]) or P R (left: [rank, m] -> [size, m]): :func:`rand_project`'s adjoint.

    Arguments as there; P is rounded to R's dtype, and ``side`` must be named.
    """
    return _ops.rand_project_back(R, _seed_tensor(seed, R.device), size, side)
