"""Exact bytes of the tensors alive at any moment of a computation, on any device, the meta device included."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces every use of it on stderr


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each counted once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class LiveBytes(TorchDispatchMode):
    """Within, follows every storage from the op that returns it to the moment at which nothing refers to it.

    live: bytes of the storages on ``device_type`` that exist now. peak: the most there have been since :meth:`restart`,
    with what ops of this library allocate and free inside: on the meta device an op's body does not run, so an op is
    run once on the CPU for each combination of shapes. What torch's own ops allocate inside is not seen.
    """

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.device_type = device_type
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._inside: dict[tuple, int] = {}

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        inside = self._allocated_inside(func, args, kwargs) if func.namespace == "slkernels" else 0
        self.peak = max(self.peak, self.live + inside)
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _allocated_inside(self, func, args, kwargs) -> int:
        if any(a.alias_info and a.type.annotation_str == "List[Tensor]" for a in func._schema.arguments):
            return 0  # optimizer steps: in place, and too large to run
        key = (func, *(_signature(leaf) for leaf in tree_leaves((args, kwargs))))
        if key not in self._inside:
            self._inside[key] = bytes_inside(func, args, kwargs)
        return self._inside[key]


def _signature(leaf: object) -> object:
    return (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf


# ---- what an op allocates besides its results -----------------------------------------------------------------------


def bytes_inside(func, args: tuple, kwargs: dict) -> int:
    """The most bytes that op ``func`` holds on the CPU beyond its arguments and results, from a real call on zeros of
    the arguments' shapes (supports: rows of equal length), as torch's CPU allocator reports it."""
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    real = tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu"), given)
    if "crow" in given:
        n, nnz = given["crow"].numel() - 1, given["col"].numel()
        crow = torch.arange(n + 1) * nnz // max(n, 1)
        col = torch.arange(nnz) - torch.repeat_interleave(crow[:-1], crow.diff())
        real |= {"crow": crow.to(given["crow"].dtype), "col": col.to(given["col"].dtype)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = func(**real)
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - distinct_bytes(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


# ---- attention ------------------------------------------------------------------------------------------------------


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within, attention on the meta device is the fused kernel that a CPU takes; else it would be decomposed into ops
    that hold the scores [batch, heads, sequence, sequence]."""
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        if not q.is_meta:
            return original(q, k, v, is_causal=is_causal)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
