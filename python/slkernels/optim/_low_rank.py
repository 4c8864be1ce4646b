"""The base class of the optimizers that keep Adam's moments of a matrix in a small subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..project_apollo import apollo_scale_update_
from ._dtensor import is_dtensor
from ._quantized import Launch, Options, QuantizedOptimizer
from ._state import State, new_moment
from .adam import _Adam
from .ops import adam_q_dir_

_NEVER = 2**62  # min_numel with which no moment is quantized
_CALLS, _DUE = "calls", "due"


def low_rank_groups(
    model: nn.Module,
    rank: int,
    targets: Iterable[str] = ("attn", "mlp"),
    *,
    params: Iterable[Tensor] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Two parameter groups: the weights of the linear layers whose name contains one of ``targets``, with ``rank`` and
    ``options``, and everything else (embeddings, head, norms, biases) with rank None, for plain AdamW.

    Args:
        params: only these; for :func:`per_layer`, whose ``make_optimizer`` gets one module's parameters at a time::

            per_layer(model, lambda params: GaLoreAdamW(low_rank_groups(model, 256, params=params), lr=1e-2))

    Raises:
        ValueError: without ``params``, no linear layer has such a name.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = {
        p
        for name, module in model.named_modules()
        if any(target in name for target in targets) and hasattr(module, "in_features")
        for p in module.parameters(recurse=False)
        if p.dim() == 2 and p.requires_grad
    }
    if params is None and not chosen:
        raise ValueError(f"no linear layer of {type(model).__name__} has a name that contains any of {targets}")
    everything = [p for p in (model.parameters() if params is None else params) if p.requires_grad]
    low_rank = [p for p in everything if p in chosen]
    rest = [p for p in everything if p not in chosen]
    groups = [{"params": low_rank, "rank": rank, **options}, {"params": rest, "rank": None}]
    return [group for group in groups if group["params"]]


class LowRankOptimizer(_Adam):
    """What they share: which tensors take part, plain AdamW for the others, the schedule of subspaces, checkpoints.

    A matrix of a group with a ``rank`` takes part; tensors of other dimensions, and groups whose rank is None, are
    stepped by plain AdamW in one call. Moments, projected or not, are float32, or quantized as in :class:`AdamW8bit`.
    Only a step that draws a subspace may wait for the device.

    ``state[p]`` of a matrix holds plain tensors: ``step``; ``m``, ``v`` and their scales in the subspace; ``calls`` and
    ``due`` (int64 on the CPU: the steps made, and the step that draws the next subspace); and what a subclass adds.
    """

    _codecs: ClassVar = ("dyn8", "lin8", "cmp8", "dyn4", "fp8")

    # Further options of a group with their defaults, and other defaults for those that all optimizers have.
    _own_options: ClassVar[dict[str, Any]] = {}
    _option_defaults: ClassVar[dict[str, Any]] = {"codec": None}

    def __init__(self, params: Iterable[Any], defaults: State, options: Options):
        options = {**self._option_defaults, **options}
        defaults = {**defaults, **{name: options.pop(name, value) for name, value in self._own_options.items()}}
        if options["codec"] is None:
            options |= {"codec": "dyn8", "min_numel": _NEVER}
        QuantizedOptimizer.__init__(self, params, defaults, options)

    def _check(self, group: State) -> None:
        super()._check(group)
        rank = group["rank"]
        self._require(group, rank=rank is None or rank >= 1, update_proj_gap=group["update_proj_gap"] >= 1)
        self._require(group, master_bits=group["master_bits"] == 0)

    # ---- what a subclass defines -------------------------------------------------------------------------------------

    def _low_rank_shape(self, group: State, p: Tensor) -> tuple[int, int]:
        """Of the projected gradient."""
        raise NotImplementedError

    def _subspace_state(self, group: State, p: Tensor) -> State:
        """What describes the subspace, before there is one."""
        raise NotImplementedError

    def _renew(self, group: State, p: Tensor, state: State) -> None:
        """A new subspace from p.grad. May wait for the device."""
        raise NotImplementedError

    def _project(self, group: State, p: Tensor, state: State) -> Tensor:
        """The gradient in the subspace."""
        raise NotImplementedError

    def _apply(self, group: State, p: Tensor, state: State, R: Tensor, N: Tensor, lr: Tensor, call: State) -> None:
        """Update p; R, N: the projected gradient and Adam's direction there. call: found_inf, round_mode, rng and
        :meth:`_step_scalars`."""
        raise NotImplementedError

    # ---- the step ----------------------------------------------------------------------------------------------------

    def _takes_part(self, group: State, p: Tensor) -> bool:
        return group["rank"] is not None and p.dim() == 2 and p.numel() > 0

    def _new_state(self, group: State, p: Tensor) -> State:
        if not self._takes_part(group, p):
            return super()._new_state(group, p)
        if is_dtensor(p):
            raise RuntimeError(f"{type(self).__name__} needs whole matrices; give DTensors to a group with rank None")
        small = torch.empty((), device=p.device).expand(self._low_rank_shape(group, p))
        state = {k: v for moment in self._moments_of(group) for k, v in new_moment(group, small, moment).items()}
        state |= {_CALLS: torch.zeros((), dtype=torch.int64), _DUE: torch.zeros((), dtype=torch.int64)}
        return {**state, **self._subspace_state(group, p)}

    def _cohort(self, group: State, p: Tensor) -> tuple:
        return (*super()._cohort(group, p), self._takes_part(group, p))

    def _update(self, launch: Launch, group: State, lr: Tensor, scales: dict[str, Tensor | None]) -> None:
        if not self._takes_part(group, launch.whole[0]):
            super()._update(launch, group, lr, scales)
            return
        params, states = launch.params, [self.state[p] for p in launch.whole]
        for p, state in zip(params, states, strict=True):
            self._renew_if_due(group, p, state, scales["found_inf"])
        R = [self._project(group, p, state) for p, state in zip(params, states, strict=True)]
        N = [torch.empty_like(r) for r in R]
        beta1, beta2 = group["betas"]
        options = {"codec": group["codec"], "block": group["block_size"], **scales}
        adam_q_dir_(R, *launch.lists, N, launch.step, beta1=beta1, beta2=beta2, eps=group["eps"], **options)
        scalars = {"found_inf": scales["found_inf"], **self._step_scalars(group, launch.step)}
        for index, (p, state, r, n) in enumerate(zip(params, states, R, N, strict=True)):
            self._apply(group, p, state, r, n, lr, {**scalars, **_rounding(launch, index)})

    def _step_scalars(self, group: State, step: Tensor) -> State:
        """0-d tensors that all updates of a step share."""
        return {}

    def _renew_if_due(self, group: State, p: Tensor, state: State, found_inf: Tensor | None) -> None:
        calls = int(state[_CALLS])
        if calls >= int(state[_DUE]):
            # A step that is skipped for infinite gradients has no directions to offer: the next one is asked.
            if found_inf is not None and not found_inf.is_meta and bool(found_inf):
                return
            self._renew(group, p, state)
            state[_DUE].fill_(calls + self._gap(group, state))
        state[_CALLS].add_(1)

    def _gap(self, group: State, state: State) -> int:
        return group["update_proj_gap"]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``torch.optim.Optimizer.state_dict``, plain tensors, with a ``step`` of its own for every parameter. Holds
        the subspaces and the seeds: training continues from it bit for bit."""
        out = torch.optim.Optimizer.state_dict(self)
        own = ("step", _CALLS, _DUE)
        copied = {k: {**s, **{key: s[key].clone() for key in own if key in s}} for k, s in out["state"].items()}
        return {**out, "state": copied}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Nothing changes if it raises.

        Raises:
            ValueError: groups, keys, shapes or dtypes that do not fit these parameters.
        """
        loaded = self._read(state_dict)
        empty = {**state_dict, "state": {}}
        torch.optim.Optimizer.load_state_dict(self, empty)
        self.state.update(loaded)
        self._forget()

    def _read(self, given: dict[str, Any]) -> dict[Tensor, State]:
        ours, theirs = self.param_groups, given["param_groups"]
        sizes = [[len(group["params"]) for group in groups] for groups in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the state has groups of {sizes[1]} parameters, this optimizer of {sizes[0]}")
        loaded: dict[Tensor, State] = {}
        for group, saved in zip(ours, theirs, strict=True):
            merged = {**saved, "params": group["params"]}
            self._check(merged)
            counters: dict[tuple[float, torch.device], Tensor] = {}
            for key, p in zip(saved["params"], group["params"], strict=True):
                source = given["state"].get(key)
                if source:
                    state = self._read_one(merged, p, source)
                    counter = (float(state["step"]), p.device)
                    state["step"] = counters.setdefault(counter, state["step"])
                    loaded[p] = state
        return loaded

    def _read_one(self, group: State, p: Tensor, source: State) -> State:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        expected = {**self._new_state(group, p), "step": step}
        if source.keys() != expected.keys():
            raise ValueError(
                f"the state of a parameter {list(p.shape)} must hold {sorted(expected)}, got {sorted(source)}"
            )
        state = {}
        for key, want in expected.items():
            got = source[key]
            if got.dtype != want.dtype or got.shape != want.shape:
                raise ValueError(
                    f"{key} of a parameter {list(p.shape)} must be {want.dtype} {list(want.shape)}, "
                    f"got {got.dtype} {list(got.shape)}"
                )
            state[key] = got.detach().to(want.device, copy=True)
        return state


def _rounding(launch: Launch, index: int) -> State:
    """How a matrix is rounded: every one of a launch with random bits of its own."""
    if launch.rng is None:
        return {"round_mode": 0, "rng": None}
    seed, step = launch.rng
    return {"round_mode": 1, "rng": torch.stack((seed + (index << 16), step))}


def limited_update(
    group: State,
    p: Tensor,
    state: State,
    R: Tensor,
    N: Tensor,
    lr: Tensor,
    call: State,
    side: str,
    **options: Any,
) -> None:
    """:func:`slkernels.apollo_scale_update_` with the limiter on norms without Adam's bias correction, as in the public
    code: N has the correction, so the last norm is brought to its units and the new one back."""
    correction, found_inf = call["correction"], call["found_inf"]
    norm = state["norm"] * correction
    apollo_scale_update_(
        p,
        p.grad,
        N,
        R,
        norm,
        lr,
        side,
        limiter=group["limiter"],
        weight_decay=group["weight_decay"],
        found_inf=found_inf,
        round_mode=call["round_mode"],
        rng=call["rng"],
        **options,
    )
    norm = norm / correction
    state["norm"].copy_(norm if found_inf is None else torch.where(found_inf.reshape(()) == 0, norm, state["norm"]))


def bias_correction(step: Tensor, betas: tuple[float, float]) -> Tensor:
    """sqrt(1 - beta2^t) / (1 - beta1^t), 0-d on step's device: what turns m / sqrt(v) into mhat / sqrt(vhat)."""
    t = step.reshape(()).clamp(min=1)
    one, two = (-torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t) for beta in betas)
    return two.sqrt() / one
