"""Registration of ops: the schema, the fake (meta) formula and the autograd formula live here in Python, the
implementation in ``_C``. A call through the C++ dispatcher costs about 4 us; ``torch.library.custom_op`` 17 or more."""

from __future__ import annotations

from collections.abc import Callable

import torch

_lib = torch.library.Library("slkernels", "DEF")


def define(
    schema: str,
    *,
    fake: Callable | None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define ``slkernels::<schema>`` with its fake formula and, for differentiable ops, its autograd formula. An op
    that ``_C`` implements by calling other ops has neither of its own: ``fake=None``."""
    name = "slkernels::" + schema.split("(", 1)[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    if fake is not None:
        torch.library.register_fake(name, fake, lib=_lib)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_lib)


def check(condition: bool, op: str, message: Callable[[], str]) -> None:
    """The fake formulas' check; says what the C++ check says."""
    torch._check(condition, lambda: f"slkernels::{op}: {message()}")


def needs_grad(ctx, index: int) -> bool:
    """Whether input ``index`` needs a gradient. The dispatcher drops trailing arguments that equal their defaults, and
    ``ctx.needs_input_grad`` with them."""
    return index < len(ctx.needs_input_grad) and ctx.needs_input_grad[index]
