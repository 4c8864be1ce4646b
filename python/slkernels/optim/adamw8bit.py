"""AdamW whose moments are stored in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .ops import adam_q_, dequantize_block

# The keys of bitsandbytes' state, here, and what its state_dict() hides them under since 0.49.
_BNB_KEYS = {"m": "state1", "m_scale": "absmax1", "v": "state2", "v_scale": "absmax2"}
_BNB_WRAPPER = "__bnb_optimizer_quant_state__"
_BNB_BLOCKS = (256, 2048)


class _Launch:
    """The cached argument lists of one adam_q_ call: parameters that have always been stepped together."""

    def __init__(self, params: list[Tensor], states: list[dict[str, Tensor]]):
        self.params = params
        self.step = states[0]["step"]
        self.lists = [[state[key] for state in states] for key in ("m", "m_scale", "v", "v_scale")]


def _blocks(numel: int, block: int) -> int:
    return -(-numel // block)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise 8-bit moments: 2.03 bytes of state a parameter instead of 8 (float32) or 4 (bfloat16).

    One :func:`slkernels.adam_q_` call a parameter group. State format and codec are bitsandbytes' (arXiv 2110.02861);
    the formula and its order are ``torch.optim.AdamW``'s. See :func:`slkernels.adam_q_` for rounding and for NaN and
    infinite gradients. Works with LR schedulers, with ``torch.amp.GradScaler``, and with closures. Deterministic: the
    bits depend on neither the number of threads nor the grouping of tensors.

    ``state[p]`` holds plain tensors: ``step`` (float32, 0-d), ``m``, ``v`` (uint8 of p's shape) and ``m_scale``,
    ``v_scale`` (float32 [ceil(numel / block_size)]), or float32 ``m``, ``v`` and empty scales below ``min_numel``.

    Args:
        params: tensors or groups; float32, bfloat16 or float16, contiguous, on one device.
        lr: a float, or a float32 tensor with one element.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        codec: ``"dyn8"``.
        block_size: elements per scale, a multiple of 16 up to 4096.
        min_numel: smaller tensors keep float32 moments.

    Raises:
        ValueError: a hyper-parameter out of range. RuntimeError: a sparse gradient, or a tensor that adam_q_ refuses.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        codec: str = "dyn8",
        block_size: int = 256,
        min_numel: int = 4096,
    ):
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, got {list(lr.shape)}")
        for name, value, ok in (
            ("lr", lr, lr >= 0),
            ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("codec", codec, codec == "dyn8"),
            ("block_size", block_size, 16 <= block_size <= 4096 and block_size % 16 == 0),
            ("min_numel", min_numel, min_numel >= 0),
        ):
            if not ok:
                raise ValueError(f"AdamW8bit: {name} is out of range: {value}")
        self._plans: dict[int, tuple[tuple[int, ...], list[_Launch]]] = {}
        self._lrs: dict[int, tuple[float, Tensor]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "codec": codec,
            "block_size": block_size,
            "min_numel": min_numel,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._lrs = {}, {}

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            lr = self._lr_tensor(index, group["lr"], params[0].device)
            beta1, beta2 = group["betas"]
            for launch in self._launches(index, group, params):
                launch.step.add_(1 if found_inf is None else 1 - found_inf.reshape(()))
                adam_q_(
                    launch.params,
                    [p.grad for p in launch.params],
                    *launch.lists,
                    [],
                    launch.step,
                    lr,
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    codec=group["codec"],
                    block=group["block_size"],
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                )
        return loss

    def _lr_tensor(self, index: int, lr: float | Tensor, device: torch.device) -> Tensor:
        if isinstance(lr, Tensor):
            return lr if lr.dtype == torch.float32 and lr.device == device else lr.to(device, torch.float32)
        cached = self._lrs.get(index)
        if cached is None or cached[0] != lr or cached[1].device != device:
            cached = self._lrs[index] = (lr, torch.tensor(lr, dtype=torch.float32, device=device))
        return cached[1]

    def _launches(self, index: int, group: dict[str, Any], params: list[Tensor]) -> list[_Launch]:
        key = tuple(map(id, params))
        plan = self._plans.get(index)
        if plan is None or plan[0] != key:
            plan = self._plans[index] = (key, self._plan(group, params))
        return plan[1]

    def _plan(self, group: dict[str, Any], params: list[Tensor]) -> list[_Launch]:
        """Group by step counter. Parameters of a group share one counter tensor for as long as all of them are
        stepped together; those that go on without the others get a copy."""
        fresh: Tensor | None = None
        for p in params:
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"AdamW8bit does not support sparse gradients, got {p.grad.layout}")
            if not self.state[p]:
                if fresh is None:
                    fresh = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(_new_state(group, p), step=fresh)
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
        return [_Launch(members, [self.state[p] for p in members]) for members in cohorts.values()]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        self._plans.clear()

    def state_dict(self) -> dict[str, Any]:
        """``torch.optim.Optimizer.state_dict``, with a ``step`` of its own for every parameter."""
        out = super().state_dict()
        out["state"] = {k: {**s, "step": s["step"].clone()} if "step" in s else s for k, s in out["state"].items()}
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit: unlike torch's, it does not cast state to p's dtype.

        Raises:
            ValueError: groups or shapes that do not fit these parameters.
        """
        seen: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, d: seen.update(d))  # last: sees what others made
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(seen), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, saved: dict[str, Any]) -> None:
        ids = chain.from_iterable(g["params"] for g in saved["param_groups"])
        params = chain.from_iterable(((g, p) for p in g["params"]) for g in self.param_groups)
        steps: dict[tuple[int, float, torch.device], Tensor] = {}
        for saved_id, (group, p) in zip(ids, params, strict=True):
            source = saved["state"].get(saved_id)
            if not source:
                continue
            state = {k: v.detach().to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in source.items()}
            _check_state(group, p, state)
            count = float(source["step"])
            counter = torch.tensor(count, dtype=torch.float32, device=p.device)
            state["step"] = steps.setdefault((id(group), count, p.device), counter)
            self.state[p] = state
        self._plans, self._lrs = {}, {}

    # ---- bitsandbytes -----------------------------------------------------------------------------------------------

    def load_bitsandbytes_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the ``state_dict()`` of ``bitsandbytes.optim.AdamW8bit`` (block-wise, blocks of 256 or 2048
        elements) over the same parameters. lr, betas, eps and weight_decay come from it too.

        Raises:
            ValueError: the state is not block-wise, its map is not the dynamic map, or shapes do not fit.
        """
        groups = []
        state = {k: _from_bitsandbytes(s) for k, s in state_dict["state"].items()}
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group = {k: v for k, v in ours.items() if k != "params"}
            group.update({k: theirs[k] for k in ("lr", "eps", "weight_decay")}, betas=tuple(theirs["betas"][:2]))
            if "initial_lr" in theirs:
                group["initial_lr"] = theirs["initial_lr"]
            sizes = [
                (s["m"].numel(), s["m_scale"].numel())
                for s in (state.get(k) for k in theirs["params"])
                if s and s["m"].dtype == torch.uint8
            ]
            for block in dict.fromkeys((ours["block_size"], *_BNB_BLOCKS)):
                if all(_blocks(n, block) == scales for n, scales in sizes):
                    group["block_size"] = block
                    break
            else:
                raise ValueError("the number of absmax values fits neither blocks of 256 nor of 2048 elements")
            group["params"] = theirs["params"]
            groups.append(group)
        self.load_state_dict({"state": state, "param_groups": groups})

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state in the layout of ``bitsandbytes.optim.AdamW8bit.state_dict()``, which loads it."""
        out = self.state_dict()
        maps = {}
        for index, codec in (("1", "dyn8"), ("2", "dyn8u")):
            maps["qmap" + index] = dequantize_block(torch.arange(256, dtype=torch.uint8), torch.ones(1), codec)
        for key, source in out["state"].items():
            quantized = source["m"].dtype == torch.uint8
            keys = _BNB_KEYS if quantized else {"m": "state1", "v": "state2"}
            state = {theirs: source[ours] for ours, theirs in keys.items()}
            if quantized:
                state.update({name: table.to(source["m"].device, copy=True) for name, table in maps.items()})
            out["state"][key] = {"step": int(source["step"]), **state}
        return out


def _new_state(group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    if p.numel() < group["min_numel"]:
        empty = torch.empty(0, dtype=torch.float32, device=p.device)
        zeros = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        return {"m": zeros, "m_scale": empty, "v": zeros.clone(), "v_scale": empty.clone()}
    scale = torch.zeros(_blocks(p.numel(), group["block_size"]), dtype=torch.float32, device=p.device)
    return {
        "m": torch.full(p.shape, 127, dtype=torch.uint8, device=p.device),  # dyn8's code of zero
        "m_scale": scale,
        "v": torch.zeros(p.shape, dtype=torch.uint8, device=p.device),
        "v_scale": scale.clone(),
    }


def _check_state(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
    missing = {"step", "m", "m_scale", "v", "v_scale"} - state.keys()
    if missing:
        raise ValueError(f"the state of a parameter lacks {sorted(missing)}; got {sorted(state)}")
    quantized = state["m"].dtype == torch.uint8
    scales = _blocks(p.numel(), group["block_size"]) if quantized else 0
    for key, dtype, numel in (
        ("m", torch.uint8 if quantized else torch.float32, p.numel()),
        ("v", torch.uint8 if quantized else torch.float32, p.numel()),
        ("m_scale", torch.float32, scales),
        ("v_scale", torch.float32, scales),
    ):
        if state[key].dtype != dtype or state[key].numel() != numel:
            raise ValueError(
                f"{key} of a parameter {list(p.shape)} must be {dtype} with {numel} elements, "
                f"got {state[key].dtype} with {state[key].numel()}"
            )


def _from_bitsandbytes(source: dict[str, Any]) -> dict[str, Any]:
    source = {**source, **source.get(_BNB_WRAPPER, {})}
    if "state1" not in source or "state2" not in source:
        raise ValueError(f"not a state of bitsandbytes' Adam: {sorted(source)}")
    step = torch.tensor(float(source["step"]))
    if source["state1"].dtype == torch.float32:
        empty = torch.empty(0, dtype=torch.float32)
        return {"step": step, "m": source["state1"], "v": source["state2"], "m_scale": empty, "v_scale": empty.clone()}
    if "absmax1" not in source or "absmax2" not in source:
        raise ValueError("only block-wise states (absmax1, absmax2) can be loaded")
    for key, codec in (("qmap1", "dyn8"), ("qmap2", "dyn8u")):
        ours = dequantize_block(torch.arange(256, dtype=torch.uint8), torch.ones(1), codec)
        # On a CPU without FMA torch builds the map one unit in the last place off.
        if not torch.allclose(source[key].cpu(), ours, rtol=1e-6, atol=0):
            raise ValueError(f"{key} is not bitsandbytes' dynamic map")
    return {"step": step, **{ours: source[theirs] for ours, theirs in _BNB_KEYS.items()}}
