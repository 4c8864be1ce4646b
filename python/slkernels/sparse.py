"""Family ``sparse``: products with a sparse matrix S [n, m] on a fixed random support in CSR form.

S is given by ``values`` [nnz], ``crow`` int32 [n + 1] and ``col`` [nnz], sorted and unique within a row; ``col`` is
int16 when m <= 32768, else int32. Every op checks the indices in O(nnz) unless ``validate=False``; on a GPU the check
copies them to the CPU and waits, so check once (:func:`check_support`) and pass ``validate=False`` afterwards, as the
modules do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, define, needs_grad

_ops = torch.ops.slkernels


def _check_csr(op: str, values: Tensor | None, crow: Tensor, col: Tensor, n, m) -> None:
    check(crow.dim() == 1 and col.dim() == 1, op, lambda: "crow must be [n + 1] and col [nnz]")
    check(crow.shape[0] == n + 1, op, lambda: f"crow must be [{n + 1}], got {list(crow.shape)}")
    if values is not None:
        check(
            values.dim() == 1 and values.shape[0] == col.shape[0],
            op,
            lambda: f"values must be [{col.shape[0]}], got {list(values.shape)}",
        )


# ---- spmm -----------------------------------------------------------------------------------------------------------


def _spmm_fake(x, values, crow, col, n, validate=True):
    _check_csr("spmm", values, crow, col, n, x.shape[-1])
    return x.new_empty((*x.shape[:-1], n))


def _spmm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])  # x, values, crow, col


def _spmm_backward(ctx, dy):
    x, values, crow, col = ctx.saved_tensors
    need_x, need_values = ctx.needs_input_grad[:2]
    dx = _ops.spmm_t(dy, values, crow, col, x.shape[-1], False) if need_x else None
    dv = _ops.sddmm(dy, x, crow, col, False) if need_values else None
    return dx, dv, None, None, None, None


define(
    "spmm(Tensor x, Tensor values, Tensor crow, Tensor col, SymInt n, bool validate=True) -> Tensor",
    fake=_spmm_fake,
    setup_context=_spmm_setup,
    backward=_spmm_backward,
)

# ---- spmm_t ---------------------------------------------------------------------------------------------------------


def _spmm_t_fake(dy, values, crow, col, m, validate=True):
    _check_csr("spmm_t", values, crow, col, dy.shape[-1], m)
    return dy.new_empty((*dy.shape[:-1], m))


def _spmm_t_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])  # dy, values, crow, col


def _spmm_t_backward(ctx, g):
    dy, values, crow, col = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ddy = _ops.spmm(g, values, crow, col, dy.shape[-1], False) if need_dy else None
    dv = _ops.sddmm(dy, g, crow, col, False) if need_values else None
    return ddy, dv, None, None, None, None


define(
    "spmm_t(Tensor dy, Tensor values, Tensor crow, Tensor col, SymInt m, bool validate=True) -> Tensor",
    fake=_spmm_t_fake,
    setup_context=_spmm_t_setup,
    backward=_spmm_t_backward,
)

# ---- sddmm ----------------------------------------------------------------------------------------------------------


def _sddmm_fake(dy, x, crow, col, validate=True):
    _check_csr("sddmm", None, crow, col, dy.shape[-1], x.shape[-1])
    return x.new_empty((col.shape[0],))


def _sddmm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _sddmm_backward(ctx, g):
    dy, x, crow, col = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = _ops.spmm(x, g, crow, col, dy.shape[-1], False) if need_dy else None
    dx = _ops.spmm_t(dy, g, crow, col, x.shape[-1], False) if need_x else None
    return ddy, dx, None, None, None


define(
    "sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, bool validate=True) -> Tensor",
    fake=_sddmm_fake,
    setup_context=_sddmm_setup,
    backward=_sddmm_backward,
)

define(
    "check_support(Tensor crow, Tensor col, SymInt n, SymInt m) -> ()",
    fake=lambda crow, col, n, m: _check_csr("check_support", None, crow, col, n, m),
)

# ---- gather_support, compose ----------------------------------------------------------------------------------------


def _gather_fake(w, crow, col, validate=True):
    _check_csr("gather_support", None, crow, col, w.shape[0], w.shape[1])
    return w.new_empty((col.shape[0],))


def _gather_setup(ctx, inputs, output):
    w, crow, col, _ = inputs
    ctx.save_for_backward(crow, col)
    ctx.m = w.shape[1]


def _gather_backward(ctx, g):
    crow, col = ctx.saved_tensors
    return _ops.compose(g, crow, col, ctx.m, validate=False), None, None, None


define(
    "gather_support(Tensor w, Tensor crow, Tensor col, bool validate=True) -> Tensor",
    fake=_gather_fake,
    setup_context=_gather_setup,
    backward=_gather_backward,
)


def _compose_fake(values, crow, col, m, A=None, B=None, alpha=1.0, base=None, validate=True):
    n = crow.shape[0] - 1
    _check_csr("compose", values, crow, col, n, m)
    check((A is None) == (B is None), "compose", lambda: "A and B go together")
    if A is not None:
        check(A.shape[1] == m, "compose", lambda: f"A must be [rank, {m}], got {list(A.shape)}")
        check(B.shape[0] == n, "compose", lambda: f"B must be [{n}, rank], got {list(B.shape)}")
        check(A.shape[0] == B.shape[1], "compose", lambda: "A and B must have the same rank")
    if base is not None:
        check(base.shape[0] == n, "compose", lambda: f"base must be [{n}, {m}], got {list(base.shape)}")
        check(base.shape[1] == m, "compose", lambda: f"base must be [{n}, {m}], got {list(base.shape)}")
    return values.new_empty((n, m))


def _compose_setup(ctx, inputs, output):
    _values, crow, col, _m, A, B, alpha, _base, _validate = inputs
    ctx.save_for_backward(crow, col, A, B)
    ctx.alpha = alpha


def _compose_backward(ctx, dw):
    crow, col, A, B = ctx.saved_tensors
    dv = _ops.gather_support(dw, crow, col, False) if needs_grad(ctx, 0) else None
    da = ctx.alpha * (B.t() @ dw) if needs_grad(ctx, 4) else None
    db = ctx.alpha * (dw @ A.t()) if needs_grad(ctx, 5) else None
    return dv, None, None, None, da, db, None, dw if needs_grad(ctx, 7) else None, None


define(
    "compose(Tensor values, Tensor crow, Tensor col, SymInt m, Tensor? A=None, Tensor? B=None, float alpha=1.0, "
    "Tensor? base=None, bool validate=True) -> Tensor",
    fake=_compose_fake,
    setup_context=_compose_setup,
    backward=_compose_backward,
)
# compose in one pass, by the tensor-core kernels (auto, sm80 or sm90) that add S to a tile before it leaves: CUDA,
# bfloat16, m a multiple of 8, indices not checked. compose uses cuBLAS and a scatter until the two have been timed.
define(
    "_compose_tile(Tensor values, Tensor crow, Tensor col, SymInt m, Tensor A, Tensor B, float alpha, "
    'str kernel="auto") -> Tensor',
    fake=lambda values, crow, col, m, A, B, alpha, kernel="auto": _compose_fake(values, crow, col, m, A, B, alpha),
)

# ---- random supports ------------------------------------------------------------------------------------------------


def _index_dtype(columns) -> torch.dtype:
    return torch.int16 if columns <= 32768 else torch.int32


def _random_support_fake(n, m, density, seed, kind="uniform", device=None):
    if kind == "uniform":
        nnz = int(density * n * m)
    elif kind in ("row", "column"):
        nnz = int(density * m) * n
    else:
        check(kind == "block8", "random_support", lambda: f"kind must be uniform, row, column or block8, got {kind}")
        inner, right, bottom, corner = _block_strata(n, m, density)
        nnz = 64 * inner + 8 * (m % 8) * right + 8 * (n % 8) * bottom + (n % 8) * (m % 8) * corner
    crow = torch.empty((n + 1,), dtype=torch.int32, device=device)
    return crow, torch.empty((nnz,), dtype=_index_dtype(m), device=device)


def _block_strata(n, m, density) -> tuple[int, int, int, int]:
    right, bottom = m % 8 != 0, n % 8 != 0
    return (
        int(density * (n // 8) * (m // 8)),
        int(density * (n // 8)) if right else 0,
        int(density * (m // 8)) if bottom else 0,
        int(density) if right and bottom else 0,
    )


def _random_blocks8_fake(n, m, density, seed, device=None):
    rows, columns = (n + 7) // 8, (m + 7) // 8
    crow = torch.empty((rows + 1,), dtype=torch.int32, device=device)
    col = torch.empty((sum(_block_strata(n, m, density)),), dtype=_index_dtype(columns), device=device)
    return crow, col


define(
    'random_support(int n, int m, float density, int seed, str kind="uniform", Device? device=None) '
    "-> (Tensor, Tensor)",
    fake=_random_support_fake,
)
define(
    "random_blocks8(int n, int m, float density, int seed, Device? device=None) -> (Tensor, Tensor)",
    fake=_random_blocks8_fake,
)

# ---- wrappers -------------------------------------------------------------------------------------------------------


def spmm(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, n: int, validate: bool = True) -> Tensor:
    """y = x S^T (SLTrain, arXiv 2406.02214, section 3).

    Args:
        x: [..., m], float32, bfloat16, float16 or float64; all leading dimensions are tokens. Rows may be strided.
        values: [nnz], x's dtype.
        crow, col: the support of S [n, m]; see the module's docstring.
        n: rows of S.
        validate: check the indices first, O(nnz).

    Returns:
        [..., n], x's dtype; sums are in float32 (float64 for float64 inputs).

    Raises:
        RuntimeError: shapes or dtypes that do not fit; with ``validate``, the position of the first bad index.
    """
    return _ops.spmm(x, values, crow, col, n, validate)


def spmm_t(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, m: int, validate: bool = True) -> Tensor:
    """dx = dy S: the gradient of :func:`spmm` with respect to x.

    Args:
        dy: [..., n]; values, crow, col, validate: as in :func:`spmm`.
        m: columns of S.

    Returns:
        [..., m], dy's dtype. S is transposed on the fly, O(nnz) time and 6 to 8 bytes a nonzero.

    Raises:
        RuntimeError: as :func:`spmm`.
    """
    return _ops.spmm_t(dy, values, crow, col, m, validate)


def sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, validate: bool = True) -> Tensor:
    """dv = (dy^T x) at the support: the gradient of :func:`spmm` with respect to values, without the dense dW.

    Args:
        dy: [..., n]; x: [..., m], the same tokens and dtype; crow, col, validate: as in :func:`spmm`.

    Returns:
        [nnz], x's dtype; sums over tokens are in float32, in an order that does not depend on the thread count.

    Raises:
        RuntimeError: as :func:`spmm`.
    """
    return _ops.sddmm(dy, x, crow, col, validate)


def check_support(crow: Tensor, col: Tensor, n: int, m: int) -> None:
    """Raise RuntimeError with the position of the first fault if (crow, col) is not a support of an [n, m] matrix:
    crow int32 [n + 1] from 0 to nnz without decreasing; col int16 (m <= 32768) or int32, in range, sorted, unique."""
    _ops.check_support(crow, col, n, m)


def gather_support(w: Tensor, crow: Tensor, col: Tensor, validate: bool = True) -> Tensor:
    """values[k] = w[row(k), col(k)].

    Args:
        w: [n, m], any floating dtype; crow, col, validate: as in :func:`spmm`.

    Returns:
        [nnz], w's dtype.

    Raises:
        RuntimeError: as :func:`spmm`.
    """
    return _ops.gather_support(w, crow, col, validate)


def compose(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    m: int,
    A: Tensor | None = None,
    B: Tensor | None = None,
    alpha: float = 1.0,
    base: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """W = alpha B A + S + base: the dense weight of an SLTrain layer (arXiv 2406.02214, equation 1).

    Args:
        values: [nnz]; crow, col, validate: as in :func:`spmm`. m: columns of W.
        A, B: [rank, m] and [n, rank], both or neither. base: [n, m]. All of values' dtype.
        alpha: factor of B A.

    Returns:
        [n, m], values' dtype. Deterministic: every entry is written once, without atomics.

    Raises:
        RuntimeError: as :func:`spmm`.
    """
    return _ops.compose(values, crow, col, m, A, B, alpha, base, validate)


def random_support(
    n: int,
    m: int,
    density: float,
    seed: int,
    kind: str = "uniform",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """A random support of an [n, m] matrix, the same on every device and for every world size.

    Counter-based: a keyed permutation of the positions (a Feistel network with cycle walking; Black and Rogaway,
    CT-RSA 2002) is evaluated at 0, 1, ...; O(nnz) time and memory, no randperm of n * m.

    Args:
        n, m: sizes, below 2^31. density: in [0, 1]. seed: any int64.
        kind: ``"uniform"``: int(density n m) of all positions (SLTrain, arXiv 2406.02214);
            ``"row"``: int(density m) in every row; ``"column"``: int(density m) whole columns (LOST, arXiv 2508.02668);
            ``"block8"``: 8x8 blocks, int(density * whole blocks) of them; the blocks that the right and the bottom edge
            cut are drawn separately at the same density. :func:`random_blocks8` gives their list.
        device: where; default torch's default device.

    Returns:
        crow int32 [n + 1], col [nnz] int16 (m <= 32768) or int32; sorted and unique within a row.

    Raises:
        RuntimeError: sizes, density or kind out of range; more than 2^31 - 1 nonzeros; a device without kernels.
    """
    return _ops.random_support(n, m, density, seed, kind, device or torch.get_default_device())


def random_blocks8(
    n: int, m: int, density: float, seed: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The blocks of ``random_support(n, m, density, seed, "block8")`` as a CSR over the [ceil(n/8), ceil(m/8)] grid of
    8x8 blocks: block_crow int32 [ceil(n/8) + 1], block_col int16 or int32 [blocks]. Errors as :func:`random_support`.
    """
    return _ops.random_blocks8(n, m, density, seed, device or torch.get_default_device())
