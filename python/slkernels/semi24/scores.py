"""Scores that 2:4 masks are chosen by: Wanda's, from a calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Calibration = Callable[[nn.Module], object] | Iterable


def wanda_score(W: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| times the 2-norm of input feature j over a calibration set (Sun et al., arXiv 2306.11695, equation 1).

    Args:
        W: [n, m]. input_norm: [m], any floating dtype; a common factor changes nothing.

    Returns:
        [n, m] float32 (float64 for a float64 W), for :func:`slkernels.prune24` in W's place.

    Raises:
        ValueError: input_norm is not [m].
    """
    if input_norm.shape != W.shape[1:]:
        raise ValueError(f"input_norm must be {list(W.shape[1:])}, got {list(input_norm.shape)}")
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.detach().to(dtype).abs() * input_norm.to(dtype)


@torch.no_grad()
def input_norms(model: nn.Module, layers: Mapping[str, nn.Linear], calibration: Calibration) -> dict[str, Tensor]:
    """The 2-norm of every input feature of ``layers`` over a calibration set, in one pass of the model as it is.

    Wanda's own program prunes layer after layer and feeds each what the pruned layers before it put out; here all are
    measured in the dense model.

    Args:
        model: run in evaluation mode, without gradients; its modes are put back.
        layers: name -> module of ``model``, called with one tensor [..., m].
        calibration: an iterable of batches (a tensor: ``model(batch)``; a mapping: ``model(**batch)``; a tuple or list:
            ``model(*batch)``), or a function that is given the model and runs it.

    Returns:
        name -> float32 [m], on the layer's device.

    Raises:
        ValueError: a layer was not called.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).float().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    modes = [(module, module.training) for module in model.modules()]
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        model.eval()
        if callable(calibration):
            calibration(model)
        else:
            for batch in calibration:
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, (tuple, list)):
                    model(*batch)
                else:
                    model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    silent = [name for name in layers if name not in sums]
    if silent:
        raise ValueError(f"calibration did not call {', '.join(silent)}")
    return {name: total.sqrt() for name, total in sums.items()}
