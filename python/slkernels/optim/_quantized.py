"""The base class of the optimizers with quantized state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _formats
from ._dtensor import is_dtensor, local
from ._state import CODECS, Moment, State, new_moment
from .clip import clip_coef, global_norm_sq


class Launch:
    """The cached argument lists of one call: parameters that have always been stepped together."""

    def __init__(self, params: list[Tensor], states: list[State], moments: tuple[Moment, ...]):
        self._params = params
        self._sharded = any(map(is_dtensor, params))
        self.step = states[0]["step"]
        keys = [key for moment in moments for key in (moment.key, moment.key + "_scale")]
        self.lists = [[local(state[key]) for state in states] for key in keys]

    @property
    def whole(self) -> list[Tensor]:
        """The parameters as the optimizer was given them, DTensors included."""
        return self._params

    @property
    def params(self) -> list[Tensor]:
        return [local(p) for p in self._params] if self._sharded else self._params

    @property
    def grads(self) -> list[Tensor]:
        if not self._sharded:
            return [p.grad for p in self._params]
        return [local(p.grad if _alike(p) else p.grad.redistribute(placements=p.placements)) for p in self._params]


def _alike(p: Tensor) -> bool:
    return not is_dtensor(p) or p.grad.placements == p.placements


class QuantizedOptimizer(torch.optim.Optimizer):
    """What they share: state, launches, clipping, checkpoints. A subclass names its moments and makes the call.

    One call of an op a parameter group. Works with LR schedulers, ``torch.amp.GradScaler``, closures, DDP, FSDP2
    (``fully_shard``) and ``torch.compile``. Deterministic: the bits depend on neither the number of threads nor the
    grouping of tensors.

    Attributes:
        max_grad_norm: clip gradients to this global norm, or None. See :meth:`step`.
        grad_norm: the norm that the last step clipped by, a 0-d tensor; None before.
        state_dict_format: what :meth:`state_dict` writes when it is not told: ``"slkernels"`` at first.
    """

    _step_supports_amp_scaling = True
    _moments: ClassVar[tuple[Moment, ...]] = ()
    # The keys of a parameter group that other libraries have too.
    _shared_options: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    _bitsandbytes: ClassVar[bool] = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], max_grad_norm: float | None):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{type(self).__name__}: max_grad_norm is out of range: {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.state_dict_format = "slkernels"
        self._forget()
        self._check(defaults)
        super().__init__(params, defaults)

    def _check(self, group: State) -> None:
        """Raises ValueError for options that are out of range."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, got {list(lr.shape)}")
        block = group["block_size"]
        self._require(group, lr=lr >= 0, weight_decay=group["weight_decay"] >= 0)
        self._require(group, codec=group["codec"] in CODECS, min_numel=group["min_numel"] >= 0)
        self._require(group, block_size=16 <= block <= 4096 and block % 16 == 0)

    def _require(self, group: State, **conditions: bool) -> None:
        for name, holds in conditions.items():
            if not holds:
                raise ValueError(f"{type(self).__name__}: {name} is out of range: {group[name]}")

    def _moments_of(self, group: State) -> tuple[Moment, ...]:
        return self._moments

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        """One step of the launch's parameters; ``scales`` are ``grad_scale`` and ``found_inf``."""
        raise NotImplementedError

    def _forget(self) -> None:
        self._plans: dict[int, tuple[tuple[int, ...], list[Launch]]] = {}
        self._lrs: dict[int, tuple[float, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_grad_norm", "grad_norm", "state_dict_format")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """One step on every parameter that has a gradient.

        With ``max_grad_norm`` gradients are divided by :func:`clip_coef` of the norm of all of them, on all ranks,
        inside the step: no host synchronization, and no pass that writes gradients. If that norm is NaN or infinite the
        step is skipped as for ``found_inf``.

        Args:
            closure: computes the loss again; as in ``torch.optim.Optimizer``.
            grad_scale: float32, one element: gradients are divided by it. ``torch.amp.GradScaler`` sets it by itself.
            found_inf: float32, one element: if it is not 0, nothing changes and the step is not counted.

        Returns:
            the closure's loss, if there is a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scales = {
            "grad_scale": getattr(self, "grad_scale", None) if grad_scale is None else grad_scale,
            "found_inf": getattr(self, "found_inf", None) if found_inf is None else found_inf,
        }
        if self.max_grad_norm is not None:
            scales = self._clip(**scales)
        found_inf = scales["found_inf"]
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            lr = self._lr_tensor(index, group["lr"], params[0].device)
            for launch in self._launches(index, group, params):
                launch.step.add_(1 if found_inf is None else (found_inf.reshape(()) == 0))
                self._update(launch, group, lr, scales)
        return loss

    def _clip(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> dict[str, Tensor | None]:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return {"grad_scale": grad_scale, "found_inf": found_inf}
        norm_sq = global_norm_sq(grads)
        scale = None if grad_scale is None else grad_scale.to(norm_sq.device).reshape(())
        if scale is not None:
            norm_sq = norm_sq / scale.square()
        self.grad_norm = norm_sq.sqrt()
        divisor = clip_coef(norm_sq, self.max_grad_norm)
        skip = (~divisor.isfinite()).float()
        return {
            "grad_scale": divisor if scale is None else divisor * scale,
            "found_inf": skip if found_inf is None else torch.maximum(skip, found_inf.reshape(()).to(skip.device)),
        }

    def _lr_tensor(self, index: int, lr: float | Tensor, device: torch.device) -> Tensor:
        if isinstance(lr, Tensor):
            return lr if lr.dtype == torch.float32 and lr.device == device else lr.to(device, torch.float32)
        cached = self._lrs.get(index)
        if cached is None or cached[0] != lr or cached[1].device != device:
            cached = self._lrs[index] = (lr, torch.tensor(lr, dtype=torch.float32, device=device))
        return cached[1]

    def _launches(self, index: int, group: State, params: list[Tensor]) -> list[Launch]:
        key = tuple(map(id, params))
        plan = self._plans.get(index)
        if plan is None or plan[0] != key:
            plan = self._plans[index] = (key, self._plan(group, params))
        return plan[1]

    def _plan(self, group: State, params: list[Tensor]) -> list[Launch]:
        """Group by step counter. Parameters of a group share one counter tensor for as long as all of them are
        stepped together; those that go on without the others get a copy."""
        fresh: Tensor | None = None
        for p in params:
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients, got {p.grad.layout}")
            if not self.state[p]:
                if fresh is None:
                    fresh = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(self._new_state(group, p), step=fresh)
        active = set(map(id, params))
        left_behind = {id(self.state[p]["step"]) for p in group["params"] if id(p) not in active and self.state.get(p)}
        cohorts: dict[int, list[Tensor]] = {}
        for p in params:
            cohorts.setdefault(id(self.state[p]["step"]), []).append(p)
        for counter, members in cohorts.items():
            if counter in left_behind:
                step = self.state[members[0]]["step"].clone()
                for p in members:
                    self.state[p]["step"] = step
        moments = self._moments_of(group)
        return [Launch(members, [self.state[p] for p in members], moments) for members in cohorts.values()]

    def _new_state(self, group: State, p: Tensor) -> State:
        return {k: v for moment in self._moments_of(group) for k, v in new_moment(group, p, moment).items()}

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        self._check(self.param_groups[-1])
        self._plans.clear()

    def state_dict(self, format: str | None = None) -> dict[str, Any]:
        """``torch.optim.Optimizer.state_dict``: plain tensors, with a ``step`` of its own for every parameter.

        Args:
            format:
                ``"slkernels"``: codes and scales; continues bit for bit.
                ``"sharded"``: the same where blocks tile the rows of a parameter, float32 moments elsewhere: any
                number of processes can read that with ``torch.distributed.checkpoint``. DTensors are always written
                so.
                ``"torch"``: float32 moments, for the optimizer of ``torch.optim`` that this one stands for.
                ``"bitsandbytes"``: what the optimizer of that name in bitsandbytes loads (codec dyn8, block 256).
                None: the attribute ``state_dict_format``.

        Raises:
            ValueError: an unknown format, or one that this optimizer or its codec has no counterpart in.
        """
        return _formats.write(self, super().state_dict(), format or self.state_dict_format)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` in any of its formats, from a state of bitsandbytes or of ``torch.optim``.

        Unlike torch's it does not cast state to the parameters' dtype. Nothing changes if it raises. From other
        libraries come lr, betas, eps, weight_decay and the like, but not codec, block size (but for bitsandbytes' old
        blocks of 2048) and min_numel; float32 moments are quantized here.

        Raises:
            ValueError: groups, keys, shapes or dtypes that do not fit these parameters.
        """
        loaded: dict[Tensor, State] = {}

        def read(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            groups, states = _formats.read(self, given)
            loaded.update(states)
            return {**given, "param_groups": groups, "state": {}}

        def install(_: Any) -> None:
            self.state.update(loaded)
            self._forget()

        before = self.register_load_state_dict_pre_hook(read)  # last: sees what others made
        after = self.register_load_state_dict_post_hook(install, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
