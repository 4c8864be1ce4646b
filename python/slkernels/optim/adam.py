"""Adam and AdamW with quantized moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from ._quantized import Launch, QuantizedOptimizer
from ._state import CODECS, Moment, State
from .ops import adam_q_


class _Adam(QuantizedOptimizer):
    _moments: ClassVar = (Moment("m", "exp_avg"), Moment("v", "exp_avg_sq", signed=False))
    _shared_options: ClassVar = ("lr", "betas", "eps", "weight_decay")
    _decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        codec: str,
        block_size: int | None,
        min_numel: int,
        max_grad_norm: float | None,
    ):
        if block_size is None:
            block_size = CODECS[codec].block if codec in CODECS else 256
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "codec": codec,
            "block_size": block_size,
            "min_numel": min_numel,
        }
        super().__init__(params, defaults, max_grad_norm)

    def _check(self, group: State) -> None:
        super()._check(group)
        betas = group["betas"]
        self._require(group, betas=len(betas) == 2 and all(0 <= b < 1 for b in betas), eps=group["eps"] >= 0)

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        beta1, beta2 = group["betas"]
        adam_q_(
            launch.params,
            launch.grads,
            *launch.lists,
            [],
            launch.step,
            lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=self._decoupled,
            codec=group["codec"],
            block=group["block_size"],
            **scales,
        )


class AdamW8bit(_Adam):
    """AdamW with block-wise 8-bit moments: 2.03 bytes of state a parameter instead of 8 (float32) or 4 (bfloat16).

    State format and codec are bitsandbytes' (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv
    2110.02861); the formula and its order are ``torch.optim.AdamW``'s. See :func:`slkernels.adam_q_` for rounding and
    for NaN and infinite gradients.

    Args:
        params: tensors or groups; float32, bfloat16 or float16, contiguous, on one device.
        lr: a float, or a float32 tensor with one element.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        codec: ``"dyn8"``.
        block_size: elements per scale, a multiple of 16 up to 4096; None: the codec's default.
        min_numel: smaller tensors keep float32 moments.
        max_grad_norm: clip by global norm; see :meth:`step`.

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, or a tensor that adam_q_ refuses.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        codec: str = "dyn8",
        block_size: int | None = None,
        min_numel: int = 4096,
        max_grad_norm: float | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, codec, block_size, min_numel, max_grad_norm)
