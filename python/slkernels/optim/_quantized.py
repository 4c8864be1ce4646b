"""The base class of the optimizers with quantized state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import _formats
from ._dtensor import is_dtensor, local, shard_index
from ._state import BLOCKS, Moment, State, master_dtype, new_master, new_moment
from .clip import clip_coef, global_norm_sq


class Options(TypedDict, total=False):
    """What every optimizer takes by keyword, for all groups; all but the last can be set in a group too.

    codec: how moments are stored, see :func:`quantize_block`. The class has a default and a list of its choices.
    block_size: elements per scale, a multiple of 16 up to 4096. Default: 256; cmp8: 32; dyn4: 128.
    min_numel: smaller tensors keep float32 moments. Default 4096. Of a DTensor the whole counts, not a shard.
    master_bits: 0, or 8 or 16 more bits for every bfloat16 parameter: the parameter and ``master_lo`` in its state are
        together a float32 number (16) or its first 16 significant bits (8).
    stochastic_rounding: round bfloat16 and float16 parameters (with 8 master_bits: the master) up or down at random
        instead of to the nearest, so that small updates count on average. Default False.
    seed: of the random bits. They depend on the seed, the step and a parameter's place in its group.
    max_grad_norm: clip by global norm, see :meth:`QuantizedOptimizer.step`. Default None.
    """

    codec: str
    block_size: int | None
    min_numel: int
    master_bits: int
    stochastic_rounding: bool
    seed: int
    max_grad_norm: float | None


class Launch:
    """The cached argument lists of one call: parameters that have always been stepped together."""

    def __init__(self, params: list[Tensor], states: list[State], moments: tuple[Moment, ...], seed: int | None):
        self.whole = params  # as the optimizer was given them, DTensors included
        self._sharded = any(map(is_dtensor, params))
        self.step = states[0]["step"]
        keys = [key for moment in moments for key in (moment.key, moment.key + "_scale")]
        self.lists = [[local(state[key]) for state in states] for key in keys]
        self.master = [local(state["master_lo"]) for state in states if "master_lo" in state]
        self.rng = None if seed is None else torch.tensor([seed, 0], device=self.step.device)

    @property
    def params(self) -> list[Tensor]:
        """What the kernels write: this rank's parts."""
        return [local(p) for p in self.whole] if self._sharded else self.whole

    @property
    def grads(self) -> list[Tensor]:
        """This rank's parts of the gradients, laid out as the parameters are."""
        if not self._sharded:
            return [p.grad for p in self.whole]
        return [local(p.grad if _alike(p) else p.grad.redistribute(placements=p.placements)) for p in self.whole]


class Plan(NamedTuple):
    """A group's step: the counters to advance, each once, and the calls to make."""

    steps: list[Tensor]
    launches: list[Launch]


def _alike(p: Tensor) -> bool:
    return not is_dtensor(p) or p.grad.placements == p.placements


class QuantizedOptimizer(torch.optim.Optimizer):
    """What they share: state, launches, clipping, checkpoints. A subclass names its moments and makes the call.

    One call of an op a parameter group. Works with LR schedulers, ``torch.amp.GradScaler``, closures, DDP, FSDP2
    (``fully_shard``) and ``torch.compile``. Deterministic: the bits depend on neither the number of threads nor the
    grouping of tensors (random bits of ``stochastic_rounding`` do depend on that).

    Attributes:
        max_grad_norm: clip gradients to this global norm, or None. See :meth:`step`.
        state_dict_format: what :meth:`state_dict` writes when it is not told: ``"slkernels"`` at first.
    """

    _step_supports_amp_scaling = True
    _moments: ClassVar[tuple[Moment, ...]] = ()
    # The keys of a parameter group that other libraries have too.
    _shared_options: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    # What torch.optim's counterpart can do and this cannot: {option: the only value}.
    _fixed_options: ClassVar[dict[str, Any]] = {"maximize": False}
    _codecs: ClassVar[tuple[str, ...]] = ("dyn8", "lin8", "cmp8")  # the first is the default

    def __init__(self, params: Iterable[Any], defaults: State, options: Options):
        known = {"min_numel": 4096, "master_bits": 0, "stochastic_rounding": False, "seed": 0}
        known = {"codec": self._codecs[0], "block_size": None, **known, "max_grad_norm": None}
        if unknown := options.keys() - known.keys():
            raise TypeError(f"{type(self).__name__} got unexpected arguments: {', '.join(sorted(unknown))}")
        defaults = {**defaults, **known, **options}
        self.max_grad_norm = defaults.pop("max_grad_norm")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"{type(self).__name__}: max_grad_norm is out of range: {self.max_grad_norm}")
        # A dict, because torch.compile keeps what is put into one, but drops what is assigned to an optimizer.
        self._measured: dict[str, Tensor] = {}
        self.state_dict_format = "slkernels"
        self._forget()
        super().__init__(params, defaults)

    def _check(self, group: State) -> None:
        """Raises ValueError for options that are out of range."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, got {list(lr.shape)}")
        block = group["block_size"]
        self._require(group, lr=lr >= 0, weight_decay=group["weight_decay"] >= 0, min_numel=group["min_numel"] >= 0)
        self._require(group, codec=group["codec"] in self._codecs, master_bits=group["master_bits"] in (0, 8, 16))
        self._require(group, seed=0 <= group["seed"] < 1 << 32)
        self._require(group, block_size=block is None or (16 <= block <= 4096 and block % 16 == 0))

    def _require(self, group: State, **conditions: bool) -> None:
        for name, holds in conditions.items():
            if not holds:
                raise ValueError(f"{type(self).__name__}: {name} is out of range: {group[name]}")

    def _moments_of(self, group: State) -> tuple[Moment, ...]:
        """In the order of the op's arguments."""
        return self._moments

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        """One step of the launch's parameters; ``scales``: grad_scale, found_inf and nonfinite."""
        raise NotImplementedError

    def _call_options(self, launch: Launch, group: State) -> dict[str, Any]:
        """The keyword arguments that the ops of all rules have in common."""
        return {
            "codec": group["codec"],
            "block": group["block_size"],
            "round_mode": int(launch.rng is not None),
            "rng": launch.rng,
        }

    def _forget(self) -> None:
        """What was cached from groups and state."""
        self._plans: dict[int, tuple[tuple[int, ...], Plan]] = {}
        self._lrs: dict[int, tuple[float, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_grad_norm", "state_dict_format", "_measured")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm that the last step clipped by, float32, 0-d; None before."""
        return self._measured.get("grad_norm")

    @property
    def nonfinite(self) -> Tensor | None:
        """How many elements, since the optimizer was made, kept their moments because the gradient was NaN, infinite or
        too large: int64, 0-d, counted on the device; None before the first step."""
        return self._measured.get("nonfinite")

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
            if "nonfinite" not in self._measured:
                self._measured["nonfinite"] = torch.zeros((), dtype=torch.int64, device=lr.device)
            scales["nonfinite"] = self._measured["nonfinite"]
            plan = self._cached_plan(index, group, params)
            for step in plan.steps:
                step.add_(1 if found_inf is None else (found_inf.reshape(()) == 0))
            for launch in plan.launches:
                if launch.rng is not None:
                    launch.rng[1].copy_(launch.step)
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
        self._measured["grad_norm"] = norm_sq.sqrt()
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

    def _cached_plan(self, index: int, group: State, params: list[Tensor]) -> Plan:
        key = tuple(map(id, params))
        plan = self._plans.get(index)
        if plan is None or plan[0] != key:
            plan = self._plans[index] = (key, self._plan(group, params))
        return plan[1]

    def _plan(self, group: State, params: list[Tensor]) -> Plan:
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
        steps = {id(step): step for step in (self.state[p]["step"] for p in params)}
        for counter in left_behind & steps.keys():
            steps[counter] = steps[counter].clone()
        cohorts: dict[tuple, list[Tensor]] = {}
        for p in params:
            counter = id(self.state[p]["step"])
            self.state[p]["step"] = steps[counter]
            cohorts.setdefault((counter, *self._cohort(group, p)), []).append(p)
        launches = [self._launch(group, members, number) for number, members in enumerate(cohorts.values())]
        return Plan(list(steps.values()), launches)

    def _cohort(self, group: State, p: Tensor) -> tuple:
        """Parameters of one call agree in this: they have master weights or have not. And random bits are a shard's
        own, but the same for all ranks that hold the same parameter."""
        rounds = group["stochastic_rounding"] and is_dtensor(p)
        return (master_dtype(group, p), p.placements if rounds else None)

    def _launch(self, group: State, params: list[Tensor], number: int) -> Launch:
        seed = None
        if group["stochastic_rounding"]:
            seed = group["seed"] + (number << 48) + (shard_index(params[0]) << 32)
        return Launch(params, [self.state[p] for p in params], self._moments_of(group), seed)

    def _new_state(self, group: State, p: Tensor) -> State:
        moments = [new_moment(group, p, moment) for moment in self._moments_of(group)]
        return {k: v for part in (*moments, new_master(group, p)) for k, v in part.items()}

    # ---- what other libraries call things -----------------------------------------------------------------------

    def _group_to_torch(self, group: State) -> State:
        if not all(moment.torch_key for moment in self._moments_of(group)):
            raise ValueError(f"{type(self).__name__} has no counterpart in torch.optim")
        return {**{k: group[k] for k in self._shared_options}, **self._fixed_options}

    def _group_to_bitsandbytes(self, group: State) -> State:
        return {k: group[k] for k in self._shared_options}

    def _group_from_others(self, saved: State) -> State:
        """Our options of a group of torch.optim or bitsandbytes."""
        return {k: saved[k] for k in self._shared_options if k in saved}

    def _is_torch_state(self, group: State, source: State) -> bool:
        return any(moment.torch_key in source for moment in self._moments_of(group))

    def _state_to_torch(self, group: State, state: State) -> State:
        return state

    def _state_from_torch(self, group: State, state: State) -> State:
        """Under our keys, as moments that travel as float32."""
        keys = {moment.torch_key: moment.key + "_float" for moment in self._moments_of(group)}
        return {keys.get(key, key): value for key, value in state.items()}

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``."""
        group = {**self.defaults, **param_group}
        self._check(group)
        if group["block_size"] is None:
            param_group = {**param_group, "block_size": BLOCKS[group["codec"]]}
        super().add_param_group(param_group)
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
