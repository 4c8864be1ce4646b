"""Family semi24 on a GPU: products with 2:4 weights and a training layer, against cuBLAS and torch's own 2:4 tensors
with the CUTLASS and the cuSPARSELt backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import slkernels
import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DENSE, OURS, Absent, Case, Provider, Target, compare_with
from ..data import generator, nbytes, uniform

_SM80 = "slkernels sm80"
_TORCH_BACKENDS = {"torch cutlass": True, "torch cusparselt": False}


def _pruned(n: int, m: int, dtype: torch.dtype, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight with the two largest of every four along a row, and where they are."""
    w = uniform(n, m, dtype=dtype, gen=gen, scale=m**-0.5)
    groups = w.view(n, m // 4, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(2).indices, True)
    return (groups * kept).view(n, m), kept.view(n, m)


def _torch_product(w: Tensor, x: Tensor, cutlass: bool) -> Callable[[], Tensor] | Absent:
    """F.linear with torch's 2:4 tensor of one backend, or why it cannot run here."""
    base = torch.sparse.SparseSemiStructuredTensor
    was, base._FORCE_CUTLASS = base._FORCE_CUTLASS, cutlass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "in prototype stage"
            sparse = torch.sparse.to_sparse_semi_structured(w)
            F.linear(x, sparse)
    except (RuntimeError, NotImplementedError) as error:
        return Absent(str(error).splitlines()[0])
    finally:
        base._FORCE_CUTLASS = was
    return lambda: F.linear(x, sparse)


def product_problem(tokens: int, n: int, m: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        (w, mask), x = _pruned(n, m, dtype, gen), uniform(tokens, m, dtype=dtype, gen=gen)
        error = compare_with(cache(lambda: (x.double() @ w.double().t(),)), dtype)
        flops, output = 2.0 * tokens * n * m, tokens * n * w.element_size()
        packed = flops / 2, nbytes(x) + w.numel() * w.element_size() * 9 // 16 + output

        def ours(layout: str) -> Provider:
            values, meta = slkernels.compress24(w, mask, layout)
            return Provider(lambda: slkernels.linear24_packed(x, values, meta, n, layout), error, *packed)

        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        providers = {
            OURS: ours("sm90" if hopper else "sm80"),
            DENSE: Provider(lambda: F.linear(x, w), error, flops, nbytes(x, w) + output),
        }
        if hopper:
            providers[_SM80] = ours("sm80")
        for name, cutlass in _TORCH_BACKENDS.items():
            run = _torch_product(w, x, cutlass)
            providers[name] = run if isinstance(run, Absent) else Provider(run, error, *packed)
        return providers

    return make


def layer_problem(tokens: int, hidden: int, dtype: torch.dtype):
    """Forward and backward of a layer with fixed masks: y, dx, and the dense gradient of the weight."""

    def make(device, seed):
        gen = generator(device, seed)
        layout = "sm90" if torch.cuda.get_device_capability(device) == (9, 0) else "sm80"
        w, _ = _pruned(hidden, hidden, dtype, gen)
        pack = slkernels.prune_compress24(w, layout=layout)
        kept_t = slkernels.decompress24(pack[2], pack[3], hidden, hidden, layout)  # W^T as the backward pass has it
        x, dy = (uniform(tokens, hidden, dtype=dtype, gen=gen) for _ in range(2))
        x.requires_grad_()
        w.requires_grad_()

        def reference(back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            a, b, d = (t.detach().double() for t in (x, w, dy))
            return a @ b.t(), d @ back.detach().double(), d.t() @ a

        def step(y: Tensor) -> tuple[Tensor, ...]:
            return (y, *torch.autograd.grad(y, (x, w), dy))

        def ours() -> tuple[Tensor, ...]:
            return step(slkernels.linear24_train(x, *pack, hidden, weight=w, layout=layout))

        flops, traffic = 6.0 * tokens * hidden**2, 2 * nbytes(x, w, dy)
        return {
            OURS: Provider(ours, compare_with(cache(lambda: reference(kept_t.t())), dtype), flops * 2 / 3, traffic),
            DENSE: Provider(
                lambda: step(F.linear(x, w)), compare_with(cache(lambda: reference(w)), dtype), flops, traffic
            ),
        }

    return make


# tokens, n, m, target against dense. The small ones are for the rule by which linear24 leaves a product to dense.
_PRODUCTS = (
    (4096, 4096, 4096, 1.5),
    (16384, 4096, 11008, 1.5),
    (16384, 11008, 4096, None),
    (2048, 2048, 2048, None),
    (1024, 1024, 1024, None),
    (256, 4096, 4096, None),
    (16, 4096, 4096, None),
)


def cases() -> list[Case]:
    products = [
        Case(
            "semi24_gpu",
            "product",
            f"T={tokens} {n}x{m}",
            dtype,
            product_problem(tokens, n, m, dtype),
            targets=(Target(DENSE, target),) if target else (),
            quick=target is not None and dtype is torch.bfloat16,
            devices=("cuda",),
        )
        for dtype in (torch.bfloat16, torch.float16)
        for tokens, n, m, target in _PRODUCTS
    ]
    layer = Case(
        "semi24_gpu",
        "forward+backward",
        "T=16384 4096x4096",
        torch.bfloat16,
        layer_problem(16384, 4096, torch.bfloat16),
        targets=(Target(DENSE, 1.25),),
        quick=True,
        devices=("cuda",),
    )
    return [*products, layer]
