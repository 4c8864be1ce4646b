"""A trained linear layer whose weight is stored in 8 bits: Q-GaLore's (arXiv 2407.08296)."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..project_quant import dequantize_group, grad_carrier, quantize_group
from .sl_linear import dense_linear

_ops = torch.ops.slkernels

_layers = WeakIdKeyDictionary()  # carrier -> weak reference to its layer


def int8_layer_of(carrier: Tensor) -> Int8Linear | None:
    """The layer whose gradient arrives in this parameter; None for other tensors."""
    layer = _layers.get(carrier)
    return layer and layer()


class Int8Linear(nn.Module):
    """y = x W^T + bias with W [out, in] in 8 bits: asymmetric groups of a row, scale and zero point each.

    W has no floating-point copy. Its gradient arrives in ``carrier.grad``, a parameter of W's shape and one element of
    memory, hooks and accumulation included; :class:`slkernels.optim.QGaLoreAdamW8bit` updates the codes from there,
    with stochastic rounding. Optimizers that do not know the layer cannot train it.

    Args:
        in_features, out_features: m and n.
        bias: add a learned bias [n].
        group: elements of a row that share a scale, a multiple of 16; Q-GaLore's is 256.
        device, dtype: of x, of the bias and of gradients; float32, bfloat16 or float16.

    State dict: ``codes`` uint8 [n, m], ``scale`` float32 and ``zero`` uint8 [n, ceil(m / group)], ``bias`` [n].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        dtype = dtype or torch.get_default_dtype()
        groups = (out_features, -(-in_features // group))
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros(groups, dtype=torch.float32, device=device))
        self.register_buffer("zero", torch.zeros(groups, dtype=torch.uint8, device=device))
        self._attach(grad_carrier(self.codes, dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, group: int = 256) -> Int8Linear:
        """A layer of ``linear``'s sizes, device, dtype, training mode and bias, its weight rounded to nearest."""
        weight = linear.weight
        module = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group,
            device=weight.device,
            dtype=weight.dtype,
        ).train(linear.training)
        module.codes, module.scale, module.zero = quantize_group(weight, 8, group)
        if linear.bias is not None:
            module.bias.copy_(linear.bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., m] -> [..., n]."""
        return _ops.w8a16_linear(x, self.codes, self.scale, self.zero, self.group, self.bias, self.carrier)

    @property
    def weight(self) -> Tensor:
        """W [n, m] in the carrier's dtype, dequantized anew at every access."""
        return dequantize_group(self.codes, self.scale, self.zero, group=self.group, dtype=self.carrier.dtype)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the dequantized W and a copy of the bias."""
        return dense_linear(self.weight, self.bias, self.training)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, group={self.group}"

    # ---- the carrier -------------------------------------------------------------------------------------------------

    def _attach(self, carrier: nn.Parameter) -> None:
        self.carrier = carrier
        _layers[carrier] = weakref.ref(self)

    def _renew_carrier(self, dtype: torch.dtype) -> None:
        """A carrier of one element of memory where the codes are now; copies of an expanded tensor have them all."""
        old = self.carrier
        self._attach(grad_carrier(self.codes, dtype).requires_grad_(old.requires_grad))
        self.carrier.grad = None if old.grad is None else old.grad.to(self.codes.device, dtype)

    def _apply(self, fn, recurse=True):
        carrier, scale = self.carrier, self.scale
        del self.carrier
        super()._apply(fn, recurse)
        if scale.is_meta and self.scale.dtype != torch.float32:
            scale = torch.empty_like(self.scale, dtype=torch.float32)
        self.scale = scale.to(self.codes.device)  # float32 whatever the dtype of x
        self.carrier = carrier
        self._renew_carrier(fn(torch.empty((), dtype=carrier.dtype, device=self.codes.device)).dtype)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._renew_carrier(self.carrier.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "carrier"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, errors)
        missing_keys += [key for key in missing if key != prefix + "carrier"]
