"""Which products are worth the sparse tensor cores."""

from __future__ import annotations

from .. import _C


def sparse_pays24(tokens: int, n: int, m: int) -> bool:
    """Whether a GPU is expected to multiply ``tokens`` rows with a 2:4 weight [n, m] faster than with a dense one.

    The rule by which :func:`linear24` chooses on CUDA (docs/semi24_cuda.md). A layer that must not be slower than a
    dense one at small sizes keeps a dense weight for the products where this is False: linear24 can only decompress
    one, each time. The rule's constants are not measured yet.
    """
    return _C.sparse_pays24(tokens, n, m)
