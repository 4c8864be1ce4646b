"""What layers of family ``semi24`` do once a step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .linear24 import Linear24
from .mask_linear24 import MaskLinear24


class Tracking:
    """What :func:`track24` returns; ``remove()`` ends it, and layers compute what they need in every call again."""

    def __init__(self, layers: list[Linear24 | MaskLinear24], handles: list) -> None:
        self.layers, self._handles = layers, handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            layer._track(False)


def track24(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tracking:
    """Let every :class:`Linear24` and :class:`MaskLinear24` of ``model`` follow the steps of ``optimizer``.

    Before a step: SR-STE's decay is added to gradients. After it: packed weights are brought up to date, once and not
    in every call; every ``refresh`` steps masks are chosen anew; MaskLLM's kappa, tau and noise go on. All of it reads
    and writes tensors in place and waits for nothing, so that a captured forward and backward sees it; it belongs
    between two replays. A step that GradScaler skips counts for none of these.

    Parameters that something else changes (an EMA that is swapped in, say) need ``layer.repack_()``. Copies of a layer
    are not tracked.

    Args:
        model: the model; wrap it in DistributedDataParallel first, which gives all ranks the same weights and masks.
        optimizer: any ``torch.optim.Optimizer`` that holds the layers' trained parameters.

    Returns:
        A handle with ``remove()``.

    Raises:
        ValueError: there is no such layer, one's parameter is not among the optimizer's, or SR-STE's decay is asked of
            a per-layer optimizer, whose gradients are gone before its step; sharded parameters; a layer is tracked.
    """
    from ..optim._dtensor import is_dtensor  # here, not above: optim needs this package's 8-bit layers
    from ..optim.per_layer import PerLayerOptimizer

    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, MaskLinear24):
            parameter = layer.gate
        elif isinstance(layer, Linear24) and layer.mode != "inference":
            parameter = layer.values if layer.mode == "slope" else layer.weight
        else:
            continue
        if is_dtensor(parameter):
            raise ValueError(f"{name} is sharded (FSDP2): a shard's rows and columns are not whole groups of a mask")
        if layer._tracked:
            raise ValueError(f"{name} is tracked already: remove() what track24 returned, or steps count twice")
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(f"the {type(optimizer).__name__} does not hold the parameters of {name}")
        if getattr(layer, "decay", 0) and isinstance(optimizer, PerLayerOptimizer):
            raise ValueError(
                f"{name}: decay needs gradients that live until the step; a per-layer optimizer frees them"
            )
        layers.append(layer)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear24 in training and no MaskLinear24")

    def each(method: str) -> Callable:
        def hook(*_) -> None:
            for layer in layers:
                getattr(layer, method)()

        return hook

    for layer in layers:
        layer._track(True)
    before = optimizer.register_step_pre_hook(each("before_step"))
    return Tracking(layers, [before, optimizer.register_step_post_hook(each("after_step"))])
