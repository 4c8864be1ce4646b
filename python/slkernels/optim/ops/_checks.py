"""What the fake formulas of the family check; the C++ side says the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._library import check

CODECS = ("dyn8", "dyn8u", "lin8", "lin8u", "cmp8", "cmp8u", "dyn4", "lin4u", "fp8", "fp8u")
# The codec of m; that of v goes with it.
STATE_CODECS = {"dyn8": "dyn8u", "lin8": "lin8u", "cmp8": "cmp8u", "dyn4": "lin4u", "fp8": "fp8u"}
FOUR_BITS = ("dyn4", "lin4u")
RULES = ("lion", "sgd", "nesterov", "signum")

_MULTIPLE, _MAX_BLOCK = 16, 4096
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def one_of(names: Sequence[str]) -> str:
    """'a', 'b' or 'c'."""
    quoted = [f"'{name}'" for name in names]
    return ", ".join(quoted[:-1]) + " or " + quoted[-1]


def check_block(op: str, block: int) -> None:
    """A multiple of 16 from 16 to 4096."""
    check(
        _MULTIPLE <= block <= _MAX_BLOCK and block % _MULTIPLE == 0,
        op,
        lambda: f"block must be a multiple of {_MULTIPLE} from {_MULTIPLE} to {_MAX_BLOCK}, got {block}",
    )


def check_codec(op: str, codec: str, names: Sequence[str] = CODECS) -> None:
    """One of ``names``."""
    check(codec in names, op, lambda: f"codec must be {one_of(tuple(names))}, got '{codec}'")


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    """float32, bfloat16 or float16."""
    check(dtype in _FLOATS, op, lambda: f"{name} must be float32, bfloat16 or float16, got {dtype}")


def check_lists(op: str, first: str, count: int, **lists: Sequence[Tensor]) -> None:
    """Every list as long as the first one."""
    for name, tensors in lists.items():
        check(
            len(tensors) == count,
            op,
            lambda name=name, tensors=tensors: (
                f"{name} must have as many tensors as {first}, {count}, got {len(tensors)}"
            ),
        )


def check_rounding(op: str, round_mode: int, rng: Tensor | None) -> None:
    """round_mode 0, or 1 with an rng."""
    check(round_mode in (0, 1), op, lambda: f"round_mode must be 0 (nearest even) or 1 (stochastic), got {round_mode}")
    check(round_mode == 0 or rng is not None, op, lambda: "round_mode 1 needs rng, int64 [2] = (seed, step)")


def blocks(numel: int, block: int) -> int:
    """Scales of a tensor."""
    return (numel + block - 1) // block
