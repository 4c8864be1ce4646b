"""Adam and AdamW with quantized moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ._quantized import Launch, Options, QuantizedOptimizer
from ._state import Moment, State
from .ops import adam_q_

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_betas(optimizer: QuantizedOptimizer, group: State, count: int) -> None:
    """``count`` of them in [0, 1), and eps not negative."""
    betas = group["betas"]
    right = len(betas) == count and all(0 <= b < 1 for b in betas)
    optimizer._require(group, betas=right, eps=group["eps"] >= 0)


def adam_step(
    optimizer: QuantizedOptimizer,
    launch: Launch,
    group: State,
    lr: Tensor,
    scales: dict[str, Tensor | None],
    decoupled: bool = True,
) -> None:
    """Adam(W) on a launch."""
    beta1, beta2 = group["betas"]
    adam_q_(
        launch.params,
        launch.grads,
        *launch.lists,
        launch.master,
        launch.step,
        lr,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=decoupled,
        **optimizer._call_options(launch, group),
        **scales,
    )


ADAM_MOMENTS = (Moment("m", "exp_avg"), Moment("v", "exp_avg_sq", signed=False))


class _Adam(QuantizedOptimizer):
    _moments: ClassVar = ADAM_MOMENTS
    _shared_options: ClassVar = ("lr", "betas", "eps", "weight_decay")
    _fixed_options: ClassVar = {"amsgrad": False, "maximize": False}
    _decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)

    def _check(self, group: State) -> None:
        super()._check(group)
        check_betas(self, group, 2)

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        adam_step(self, launch, group, lr, scales, self._decoupled)

    def _group_from_others(self, saved: State) -> State:
        return {**super()._group_from_others(saved), "betas": tuple(saved["betas"][:2])}


class AdamW8bit(_Adam):
    """AdamW with block-wise 8-bit moments: 2.03 bytes of state a parameter instead of 8 (float32) or 4 (bfloat16).

    State and codec (``dyn8``) are bitsandbytes' (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv
    2110.02861); the formula and its order are ``torch.optim.AdamW``'s (Loshchilov and Hutter, arXiv 1711.05101). Codec
    ``cmp8`` is FlashOptim's companding in blocks of 32, 2.25 bytes.

    Args:
        params: tensors or groups; float32, bfloat16 or float16, contiguous, on one device; DTensors of any sharding.
        lr: a float, or a float32 tensor with one element.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        options: :class:`Options`; codec ``"dyn8"`` (default), ``"lin8"`` or ``"cmp8"``.

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, or a tensor that adam_q_ refuses.
    """


class AdamW4bit(_Adam):
    """AdamW with 4-bit moments in blocks of 128: 1.06 bytes of state a parameter.

    Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507, without its rank-1 scales: m on
    the dynamic map with three exponent bits, v linear without a zero. Arguments and errors: :class:`AdamW8bit`'s.
    """

    _codecs: ClassVar = ("dyn4",)


class AdamWFp8(_Adam):
    """AdamW with e4m3 moments, one float32 scale for a block of 256: 2.03 bytes of state a parameter.

    The format of torchao's ``AdamWFp8`` (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433), but
    for v: a non-zero one never becomes zero. Arguments and errors: :class:`AdamW8bit`'s.
    """

    _codecs: ClassVar = ("fp8",)


class Adam8bit(_Adam):
    """Adam with block-wise 8-bit moments: :class:`AdamW8bit` with ``torch.optim.Adam``'s L2 term in place of the decay
    (Kingma and Ba, arXiv 1412.6980), and weight_decay 0 by default.

    bitsandbytes' ``Adam8bit`` decays like AdamW: continue its states with :class:`AdamW8bit` if weight_decay is not 0.
    """

    _decoupled: ClassVar = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ):
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def _group_to_bitsandbytes(self, group: State) -> State:
        if group["weight_decay"] != 0:
            raise ValueError("bitsandbytes' Adam8bit decays like AdamW, not like torch.optim.Adam")
        return super()._group_to_bitsandbytes(group)
