"""MaskLLM's linear layer (arXiv 2409.17481): the weight is frozen, which two of every four it keeps is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..semi24 import maskllm_prior
from .linear24 import Linear24
from .sl_linear import dense_linear, draw_seed

_ops = torch.ops.slkernels


class MaskLinear24(nn.Module):
    """y = x (W (*) mask)^T + bias, W [out, in] = [n, m] frozen. In training mode the mask is soft: p = softmax((kappa
    gate + Gumbel noise) / tau) over the six patterns of a group, mask = p times the patterns; in evaluation it is the
    most likely one. Only ``gate`` is trained.

    The noise is a function of ``seed`` and ``step``: all calls of a step have the same, a recomputation by activation
    checkpointing too; :func:`track24` goes on to the next step's, and moves kappa and tau linearly.

    Args:
        in_features, out_features: m and n.
        bias: a frozen bias [n].
        steps: those of the schedules; MaskLLM: 2000.
        kappa, tau: (first, last) value; MaskLLM's are the defaults.
        seed: of the gate and of the noise; None draws one from torch's default CPU generator.
        gate_std: of the normal gates at the start (0.01), before :meth:`set_prior`.
        gate_dtype: float32 (default) or bfloat16; stays when the module is moved to another dtype, but that a float64
            weight has float64 gates.
        device, dtype: of weight and bias.

    State dict: ``weight`` [n, m], ``bias`` [n], ``gate`` [n, ceil(m / 4), 6], and the scalars ``kappa``, ``tau``
    (float32), ``step``, ``seed`` (int64).

    Raises:
        ValueError: schedules or gate_dtype that do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        steps: int = 2000,
        kappa: tuple[float, float] = (1e2, 5e2),
        tau: tuple[float, float] = (4.0, 0.05),
        seed: int | None = None,
        gate_std: float = 0.01,
        gate_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if min(tau) <= 0:
            raise ValueError(f"tau must be positive, got {tau}")
        if gate_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"gate_dtype must be float32 or bfloat16, got {gate_dtype}")
        n, m = out_features, in_features
        self.in_features, self.out_features, self.steps = m, n, steps
        self.schedules = {"kappa": tuple(map(float, kappa)), "tau": tuple(map(float, tau))}
        self.gate_std, self._first_seed = gate_std, draw_seed() if seed is None else seed
        self.weight = nn.Parameter(torch.empty(n, m, device=device, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(n, device=device, dtype=dtype), requires_grad=False) if bias else None
        self._gate_dtype, self._tracked = gate_dtype, False
        gate_dtype = torch.float64 if self.weight.dtype == torch.float64 else gate_dtype
        self.gate = nn.Parameter(torch.empty(n, -(-m // 4), 6, device=device, dtype=gate_dtype))
        for name in ("kappa", "tau", "step", "seed"):
            scalar = torch.empty((), device=device, dtype=torch.float32 if name in self.schedules else torch.int64)
            self.register_buffer(name, scalar)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal gates from the seed, the schedules' first values; the weight and bias of ``nn.Linear``."""
        if self.gate.is_meta:
            return
        bound = 1 / max(self.in_features, 1) ** 0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        self._reset_gate()

    def _reset_gate(self) -> None:
        generator = torch.Generator(self.gate.device).manual_seed(self._first_seed)
        nn.init.normal_(self.gate, std=self.gate_std, generator=generator)
        self.step.zero_()
        self.seed.fill_(self._first_seed)
        self._set_schedules()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., m] in the weight's dtype -> [..., n]."""
        return F.linear(x, self.soft_weight() if self.training else self.sparse_weight(), self.bias)

    def soft_weight(self) -> Tensor:
        """W (*) soft mask of this step, [n, m]; differentiable in ``gate``."""
        return _ops.maskllm24(self.weight, self.gate, self.kappa, self.tau, self.seed + self.step)

    def kept_norm(self) -> Tensor:
        """|W (*) soft mask|^2, the sum of squares, float32: MaskLLM subtracts 1e-5 (falling to 0) times it from the
        loss, so that large weights are kept."""
        return self.soft_weight().float().square().sum()

    @property
    def mask(self) -> Tensor:
        """The most likely mask: bool [n, m]."""
        return _ops.gate_to_mask(self.gate.detach(), self.in_features)

    @torch.no_grad()
    def sparse_weight(self) -> Tensor:
        """W (*) mask as a dense [n, m]."""
        return self.weight.masked_fill(~self.mask, 0)

    @torch.no_grad()
    def set_prior(self, mask: Tensor, strength: float = 3.0) -> None:
        """Favour the patterns that agree with ``mask`` [n, m], from any pruning method: a pattern's gate grows by
        (positions in common - 1) std(gate) strength."""
        n, m = self.out_features, self.in_features
        if mask.shape != (n, m):
            raise ValueError(f"mask must be [{n}, {m}], got {list(mask.shape)}")
        self.gate.copy_(maskllm_prior(self.gate, mask.to(self.gate.device), strength))

    def extra_repr(self) -> str:
        schedules = ", ".join(f"{name}={first:g}..{last:g}" for name, (first, last) in self.schedules.items())
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, steps={self.steps}, {schedules}"

    # ---- steps -------------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Nothing is due before a step."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Go on to the next step's noise, kappa and tau, on the device. :func:`track24` calls it."""
        self.step += 1
        self._set_schedules()

    def _set_schedules(self) -> None:
        progress = (self.step / self.steps).clamp(max=1)
        for name, (first, last) in self.schedules.items():
            getattr(self, name).copy_(first + (last - first) * progress)

    def _track(self, on: bool) -> None:
        self._tracked = on

    # ---- to and from other layers ------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, *, mask: Tensor | None = None, strength: float = 3.0, **options: object
    ) -> MaskLinear24:
        """A layer of ``linear``'s sizes, device, dtype, training mode, weight and bias, whose gates start at the prior
        ``mask`` bool [n, m] (default: by magnitude, two of four) with :meth:`set_prior`'s ``strength``; 0: without.

        ``options``: the class's steps, kappa, tau, seed, gate_std, gate_dtype."""
        weight = linear.weight
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        module = cls(*sizes, **options, device="meta", dtype=weight.dtype).train(linear.training)
        module.to_empty(device=weight.device)
        module.weight.copy_(weight)
        if linear.bias is not None:
            module.bias.copy_(linear.bias)
        if not weight.is_meta:
            module._reset_gate()
            if strength:
                module.set_prior(_ops.prune24(weight.detach(), "row", None) if mask is None else mask, strength)
        return module

    def to_linear24(self, mode: str = "inference", **options: object) -> Linear24:
        """The :class:`Linear24` with the most likely mask; ``options``: those of its ``from_linear``."""
        linear = dense_linear(self.weight, self.bias, self.training)
        return Linear24.from_linear(linear, mode, mask=self.mask, **options)

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with W (*) the most likely mask, and a copy of the bias."""
        return dense_linear(self.sparse_weight(), self.bias, self.training)

    # ---- dtypes that stay --------------------------------------------------------------------------------------------

    def __getstate__(self):
        """Copies are not tracked: the optimizer that is followed does not step them."""
        return self.__dict__ | {"_tracked": False}

    def _apply(self, fn, recurse=True):
        own = {name: getattr(self, name).detach() for name in ("gate", "kappa", "tau")}
        grad = self.gate.grad
        super()._apply(fn, recurse)
        gate_dtype = torch.float64 if self.weight.dtype == torch.float64 else self._gate_dtype
        for name, old in own.items():
            new, dtype = getattr(self, name), gate_dtype if name == "gate" else torch.float32
            if new.dtype != dtype:
                new.data = torch.empty_like(new, dtype=dtype) if old.is_meta else old.to(new.device, dtype)
        if grad is not None and self.gate.grad.dtype != gate_dtype:
            self.gate.grad = grad.to(self.gate.device, gate_dtype)
        return self
