"""W of SLTrain layers, kept over the micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .sl_linear import SLLinear

_ops = torch.ops.slkernels


class WeightCache:
    """W = scale B A + S of one layer, and with ``accumulate`` the sum of its gradients."""

    def __init__(self, accumulate: bool) -> None:
        self.accumulate = accumulate
        self.clear()

    def clear(self) -> None:
        self.weight: Tensor | None = None  # differentiable in A, B and values
        self.shared: Tensor | None = None  # the same numbers as a leaf, whose gradient goes to `gradient`
        self.gradient: Tensor | None = None
        self.made_from: tuple = ()

    def linear(self, module: SLLinear, x: Tensor) -> Tensor:
        """What ``module`` computes, from W as it was or, where a parameter has changed since, composed anew."""
        parameters = (module.lora_A, module.lora_B, module.values)
        state = tuple((p.data_ptr(), p._version) for p in parameters)
        if self.weight is None or state != self.made_from:
            if self.gradient is not None:
                raise RuntimeError(
                    "cached_weights: the parameters changed before their gradients were there; "
                    "leave the context before optimizer.step()"
                )
            with torch.inference_mode(False), torch.set_grad_enabled(self.accumulate):
                self.weight = module.weight
            self.shared = self.weight.detach().requires_grad_(self.weight.requires_grad)
            self.made_from = state
            module._indices_checked = True
        if self.accumulate:
            return _SharedLinear.apply(x, self.shared, module.bias, self)
        return _ops.sl_linear(
            x, *parameters, module.crow, module.col, module.scale, module.bias, "compose", False, self.shared
        )

    def add_gradient(self, dy: Tensor, x: Tensor) -> None:
        if self.gradient is None:
            self.gradient = dy.t() @ x
        else:
            self.gradient.addmm_(dy.t(), x)

    def send_gradient(self) -> None:
        """From W to A, B and values."""
        if self.gradient is not None:
            torch.autograd.backward([self.weight], [self.gradient])


class _SharedLinear(torch.autograd.Function):
    """y = x W^T + bias, whose backward adds dW to the cache as part of the product and hands nothing to W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, cache: WeightCache) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.cache = cache
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if need_weight:
            if ctx.cache.shared is not weight:
                raise RuntimeError("cached_weights: backward of a forward whose W is gone; run both within the context")
            ctx.cache.add_gradient(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        return dy @ weight if need_x else None, None, dy.sum_to_size(dy.shape[-1]) if need_bias else None, None


@contextmanager
def cached_weights(model: nn.Module, accumulate: bool = False) -> Iterator[None]:
    """Within the context, every ``SLLinear`` of ``model`` composes its W once, not in each forward and backward. For
    gradient accumulation with few tokens T a micro-batch, where composing costs 2 r / T of the dense products::

        with slkernels.nn.cached_weights(model):
            for batch in micro_batches:
                loss(model(batch)).backward()
        optimizer.step()

    W is composed anew when a parameter's version counter or storage has changed or any ``torch.optim`` optimizer has
    stepped. Changes that neither sees (a kernel of your own that writes to a parameter) must stay outside the context.

    Args:
        model: a module with ``SLLinear`` layers. Their ``path`` is not asked: the product with W is dense.
        accumulate: add up the gradient of W over the micro-batches (as part of its product: beta = 1) and compute those
            of A, B and values from the sum, once, at the end of the context; until then their ``.grad`` stays as it is.
            The sum has the parameters' dtype, as ``.grad`` has. Not for ``torch.autograd.grad``, second derivatives,
            backward after the context, or DDP, whose buckets wait for every gradient within a backward. An exception
            within the context drops the sum.

    A step of k micro-batches takes k (3 + 2 r / T) + r / T products of a dense layer's forward in place of
    k (3 + 4 r / T); with ``accumulate``, 3 k + 3 r / T.

    Memory: W of each layer that ran, n m elements, until the end of the context; with ``accumulate`` as much again for
    its gradient. Under ``torch.compile`` a layer composes W as without the context. Under FSDP, which gathers the
    parameters anew for every forward, nothing is kept from one to the next.

    Raises:
        RuntimeError: with ``accumulate``, parameters that change between a backward and the end of the context.
    """
    layers = [module for module in model.modules() if isinstance(module, SLLinear)]
    outer = [module._cache for module in layers]
    caches = [WeightCache(accumulate) for _ in layers]

    def forget(*_) -> None:
        for cache in caches:
            if cache.gradient is None:
                cache.clear()
            else:
                cache.made_from = ()  # the next forward raises

    hook = register_optimizer_step_post_hook(forget)
    for module, cache in zip(layers, caches, strict=True):
        module._cache = cache
    try:
        yield
        for cache in caches:
            cache.send_gradient()
    finally:
        hook.remove()
        for module, cache in zip(layers, outer, strict=True):
            module._cache = cache
        for cache in caches:
            cache.clear()
