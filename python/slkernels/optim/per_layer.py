"""Optimizer steps inside the backward pass, one module at a time, each gradient freed as soon as it is used."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .clip import clip_coef, global_norm_sq


class PerLayerOptimizer(torch.optim.Optimizer):
    """What :func:`per_layer` returns: a ``torch.optim.Optimizer`` over the groups of all inner optimizers, so that one
    LR scheduler, built on it, serves them all.

    Attributes:
        optimizers: the inner optimizers, one a module that owns parameters.
        accumulation_steps: backward passes a step.
        max_grad_norm, max_layer_norm: what gradients are clipped to, or None.
        grad_norm: the norm that :meth:`measure` found, a 0-d tensor; None before.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        max_layer_norm: float | None = None,
    ):
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        if max_grad_norm is not None and max_layer_norm is not None:
            raise ValueError("per_layer: clip either by max_grad_norm or by max_layer_norm")
        if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "per_layer: DistributedDataParallel averages gradients after the hooks have used them; use fully_shard"
            )
        self.accumulation_steps = accumulation_steps
        self.max_grad_norm, self.max_layer_norm = max_grad_norm, max_layer_norm
        self.grad_norm: Tensor | None = None
        self._norms: list[Tensor] | None = None  # of the modules, while they are measured
        self._divisor: Tensor | None = None  # of this step's gradients, once they have been measured
        self.optimizers: list[torch.optim.Optimizer] = []
        self._params: list[nn.Parameter] = []
        self._owner: list[int] = []  # parameter -> inner optimizer
        self._members: list[list[int]] = []  # inner optimizer -> parameters
        seen: set[int] = set()
        for module in model.modules():
            params = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
            params = list({id(p): p for p in params}.values())  # a tensor may be tied within a module too
            if not params:
                continue
            seen.update(map(id, params))
            first = len(self._params)
            self._members.append(list(range(first, first + len(params))))
            self._owner += [len(self.optimizers)] * len(params)
            self._params += params
            self.optimizers.append(make_optimizer(params))
        if not self._params:
            raise ValueError("the model has no parameter that requires a gradient")
        super().__init__(self._params, self.optimizers[0].defaults)
        # Ours divide by grad_scale as they read; what others step on has to be divided first.
        self._scales = ["grad_scale" in inspect.signature(o.step).parameters for o in self.optimizers]
        self._share_groups()
        self._counts = [0] * len(self._params)  # gradients that a parameter has received since the last step
        self._done = [False] * len(self.optimizers)  # stepped already, in this step's last backward pass
        self._hooks = [p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in enumerate(self._params)]

    def _share_groups(self) -> None:
        self.param_groups[:] = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            owner = self._owner[index]
            if self._done[owner]:
                raise RuntimeError(
                    "per_layer: a parameter received a gradient after it had been updated in this step. Call step() "
                    f"after every {self.accumulation_steps} backward pass(es); a tensor that is used in several "
                    "reentrant checkpoints gets several gradients in one pass, use use_reentrant=False"
                )
            self._counts[index] += 1
            if all(self._counts[i] == self.accumulation_steps for i in self._members[owner]):
                self._step(owner)

        return hook

    def _step(self, owner: int) -> None:
        params = [self._params[i] for i in self._members[owner]]
        grads = [p.grad for p in params if p.grad is not None]
        if self._norms is not None:
            self._norms.append(global_norm_sq(grads))
        else:
            self._update(owner, grads)
        for p in params:
            p.grad = None
        self._done[owner] = True

    def _update(self, owner: int, grads: list[Tensor]) -> None:
        divisor = self._divisor
        if self.max_layer_norm is not None:
            divisor = clip_coef(global_norm_sq(grads), self.max_layer_norm)
        elif self.max_grad_norm is not None and divisor is None:
            raise RuntimeError("per_layer: max_grad_norm needs the norm first: run this step's passes under measure()")
        if divisor is None:
            self.optimizers[owner].step()
        elif self._scales[owner]:
            self.optimizers[owner].step(grad_scale=divisor, found_inf=(~divisor.isfinite()).float())
        else:
            for grad in grads:
                grad.div_(divisor)
            self.optimizers[owner].step()

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """The first of two passes that clip by ``max_grad_norm``: backward passes in here update nothing; they find the
        norm of all gradients, which die as early as in the second pass, of the same batches, which updates::

            with optimizer.measure():
                for micro_batch in micro_batches:
                    loss(model, micro_batch).backward()
            for micro_batch in micro_batches:
                loss(model, micro_batch).backward()
            optimizer.step()

        Random numbers, and so dropout, are the same in both passes. (Two passes as in LOMO: Lv et al., "Full Parameter
        Fine-tuning for Large Language Models with Limited Resources", arXiv 2306.09782, section 3.2.)
        """
        if self.max_grad_norm is None:
            raise RuntimeError("per_layer: there is nothing to measure without max_grad_norm")
        devices = sorted({p.device for p in self._params if p.device.type != "cpu"}, key=str)
        self.zero_grad()
        self._norms = []
        try:
            with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
                yield
            self._finish()
            if not self._norms:
                raise RuntimeError("per_layer: no backward pass ran under measure()")
            norm_sq = torch.stack(self._norms).sum()
        finally:
            self._norms = None
            self.zero_grad()
        self.grad_norm = norm_sq.sqrt()
        self._divisor = clip_coef(norm_sq, self.max_grad_norm)

    def _finish(self) -> None:
        """What backward has left over: modules of which some parameter got a gradient in only some of the passes, or
        whose gradients were set by hand."""
        for owner, members in enumerate(self._members):
            if not self._done[owner] and any(self._params[i].grad is not None for i in members):
                self._step(owner)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End the step: update what backward has left over (modules of which some parameter got a gradient in only some
        of the backward passes, or whose gradients were set by hand), then start the next accumulation."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._finish()
        self._restart()
        self._divisor = None
        return loss

    def _restart(self) -> None:
        self._counts = [0] * len(self._params)
        self._done = [False] * len(self.optimizers)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard gradients that are waiting, and start the accumulation again."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)
        self._restart()

    def detach(self) -> None:
        """Remove the hooks from the model: from here on gradients stay, and :meth:`step` updates everything."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups."""
        if hasattr(self, "_counts"):
            raise RuntimeError("per_layer: parameters cannot be added later")
        super().add_param_group(param_group)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizers' states, and what an unfinished accumulation holds: gradients and their counts."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "accumulation_steps": self.accumulation_steps,
            "counts": list(self._counts),
            "done": list(self._done),
            "divisor": None if self._divisor is None else self._divisor.clone(),
            "grads": {i: p.grad.detach().clone() for i, p in enumerate(self._params) if p.grad is not None},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, in the middle of an accumulation too: it restores gradients.

        Raises:
            ValueError: the state is of a model with other modules or parameters, or the accumulation that it is in the
                middle of has another length.
        """
        inner, counts = state_dict["optimizers"], state_dict["counts"]
        if len(inner) != len(self.optimizers) or len(counts) != len(self._params):
            raise ValueError(
                f"the state is of {len(inner)} modules with {len(counts)} parameters, "
                f"this model has {len(self.optimizers)} with {len(self._params)}"
            )
        if any(counts) and state_dict["accumulation_steps"] != self.accumulation_steps:
            raise ValueError(
                f"the state is in the middle of {state_dict['accumulation_steps']} accumulation steps, "
                f"here accumulation_steps is {self.accumulation_steps}"
            )
        for optimizer, state in zip(self.optimizers, inner, strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()
        self._counts, self._done = list(counts), list(state_dict["done"])
        divisor = state_dict["divisor"]
        self._divisor = None if divisor is None else divisor.to(self._params[0].device)
        for i, p in enumerate(self._params):
            grad = state_dict["grads"].get(i)
            p.grad = None if grad is None else grad.to(p.device, copy=True)


def per_layer(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    max_layer_norm: float | None = None,
) -> PerLayerOptimizer:
    """Update each module's parameters inside ``backward()``, as soon as its gradients are complete, and free them.

    In the last backward pass of a step no more gradients live than one module's (the earlier passes of an accumulation
    must keep theirs). The result has the same bits as one global optimizer's step. Use it like any optimizer::

        optimizer = per_layer(model, lambda params: AdamW8bit(params, lr=1e-3), accumulation_steps=4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, ...)
        for batch in data:
            for micro_batch in batch.chunk(4):
                loss(model, micro_batch).backward()     # the fourth one updates
            optimizer.step()                            # ends the step
            scheduler.step()

    A module is one that owns parameters itself; the tensors of a Linear go in one call. A tied tensor belongs to the
    first module that has it and is updated once. A parameter without a gradient is left alone, as by a global step.
    Works under FSDP2 (``fully_shard``; every pass must reduce gradients, the default). ``torch.amp.GradScaler``, which
    needs all gradients at once, cannot work; nor can DDP, which averages gradients too late.

    Clipping: by the norm of each module's gradients (``max_layer_norm``), free; or by the norm of all
    (``max_grad_norm``), for which a step takes a second pass: :meth:`PerLayerOptimizer.measure`. A norm that is NaN or
    infinite skips the update (of the module, or of all) with the optimizers of slkernels; others take it as it is.

    Args:
        model: parameters that require a gradient now take part.
        make_optimizer: called with a list of parameters for every module.
        accumulation_steps: backward passes a step.
        max_grad_norm, max_layer_norm: at most one of them.

    Returns:
        A ``torch.optim.Optimizer``: ``step``, ``zero_grad``, ``state_dict``, ``load_state_dict``, ``param_groups``
        (those of the inner ``optimizers``), ``measure``, and ``detach`` to remove the hooks.

    Raises:
        ValueError: no trainable parameter, accumulation_steps < 1, both norms, or a DDP model. RuntimeError, in
            backward: a parameter that has been updated in this step gets another gradient.
    """
    return PerLayerOptimizer(model, make_optimizer, accumulation_steps, max_grad_norm, max_layer_norm)
