"""Clipping by global norm: one pass over the gradients, nothing written back, no host synchronization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._library import check, define
from ._dtensor import is_dtensor, local, reduced

_ops = torch.ops.slkernels

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _grad_norm_sq_fake(grads):
    op = "grad_norm_sq"
    check(len(grads) > 0, op, lambda: "grads must hold at least one tensor")
    for i, g in enumerate(grads):
        check(
            g.dtype in _FLOATS,
            op,
            lambda i=i, g=g: f"grads[{i}] must be float32, bfloat16 or float16, got {_name(g.dtype)}",
        )
    return grads[0].new_empty((), dtype=torch.float32)


def _clip_coef_fake(norm_sq, max_norm):
    op = "clip_coef"
    check(
        norm_sq.dtype == torch.float32 and norm_sq.numel() == 1,
        op,
        lambda: f"norm_sq must be a float32 tensor with one element, got {_name(norm_sq.dtype)} {list(norm_sq.shape)}",
    )
    check(max_norm > 0, op, lambda: f"max_norm must be positive, got {max_norm}")
    return norm_sq.new_empty(())


define("grad_norm_sq(Tensor[] grads) -> Tensor", fake=_grad_norm_sq_fake)
define("clip_coef(Tensor norm_sq, float max_norm) -> Tensor", fake=_clip_coef_fake)


def grad_norm_sq(grads: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements of all tensors: the square of their global 2-norm.

    Sums of 16384 elements are float32, those of the whole list float64. The result has the same bits for every number
    of threads and on every instruction set. A NaN gives NaN; an infinity, or a square beyond float32, gives infinity.
    Not differentiable.

    Args:
        grads: at least one tensor, any shapes, float32, bfloat16 or float16, on one device; a copy is made of one that
            is not contiguous.

    Returns:
        float32, 0-d, on that device.

    Raises:
        RuntimeError: an empty list or another dtype.
    """
    return _ops.grad_norm_sq(grads)


def clip_coef(norm_sq: Tensor, max_norm: float) -> Tensor:
    """What gradients must be divided by so that their norm is at most ``max_norm``: max(1, (norm + 1e-6) / max_norm).

    The reciprocal of ``torch.nn.utils.clip_grad_norm_``'s coefficient, in the form that ``grad_scale`` of
    :func:`slkernels.adam_q_` takes, so that clipping costs no pass that writes gradients. (Pascanu et al., "On the
    difficulty of training recurrent neural networks", arXiv 1211.5063, section 3.2.)

    Args:
        norm_sq: float32, one element, of :func:`grad_norm_sq`.
        max_norm: positive.

    Returns:
        float32, 0-d, on norm_sq's device; NaN or infinity if norm_sq is.

    Raises:
        RuntimeError: another dtype or size, or max_norm <= 0.
    """
    return _ops.clip_coef(norm_sq, max_norm)


def global_norm_sq(grads: Iterable[Tensor]) -> Tensor:
    """:func:`grad_norm_sq` of whole tensors where some are DTensors: the local shards' sums are added over the mesh
    dimensions that shard them; a replicated tensor counts once. Every rank gets the same number.

    Args:
        grads: plain tensors and DTensors (``fully_shard``'s), at least one.

    Returns:
        float32, 0-d.

    Raises:
        RuntimeError: a gradient that is a sum still to be made (placement ``Partial``).
    """
    plain: list[Tensor] = []
    sharded: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        if not is_dtensor(grad):
            plain.append(grad)
            continue
        if any(placement.is_partial() for placement in grad.placements):
            raise RuntimeError(f"global_norm_sq: a gradient has not been reduced: {grad.placements}")
        sharded.setdefault((grad.device_mesh, grad.placements), []).append(grad)
    sums = [grad_norm_sq(plain)] if plain else []
    sums += [reduced(shards[0], grad_norm_sq([local(g) for g in shards])) for shards in sharded.values()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
