"""DTensors without importing torch.distributed.tensor, which takes half a second."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dtensor(t: Tensor) -> bool:
    return hasattr(t, "device_mesh")


def local(t: Tensor) -> Tensor:
    """This rank's part of t: what the kernels work on."""
    return t.to_local() if is_dtensor(t) else t


def like(t: Tensor, shard: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A tensor of the global ``shape`` whose part on this rank is ``shard``, laid out over ranks as t is."""
    if not is_dtensor(t):
        return shard
    from torch.distributed.tensor import DTensor

    stride, size = [], 1
    for extent in reversed(shape):
        stride.append(size)
        size *= extent
    return DTensor.from_local(
        shard, t.device_mesh, t.placements, run_check=False, shape=torch.Size(shape), stride=tuple(reversed(stride))
    )


def reduced(t: Tensor, sum_of_shard: Tensor) -> Tensor:
    """The sum of every rank's ``sum_of_shard`` over the mesh dimensions that shard t."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if p.is_replicate() else Partial("sum") for p in t.placements]
    return DTensor.from_local(sum_of_shard, t.device_mesh, placements, run_check=False).full_tensor()


def shard_index(t: Tensor) -> int:
    """The number of this rank's shard among t's; 0 for a plain or replicated tensor."""
    index = 0
    for dim, placement in enumerate(t.placements if is_dtensor(t) else ()):
        if not placement.is_replicate():
            index = index * t.device_mesh.size(dim) + t.device_mesh.get_local_rank(dim)
    return index
