"""Optimizer steps inside the backward pass, one module at a time, each gradient freed as soon as it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PerLayerOptimizer(torch.optim.Optimizer):
    """What :func:`per_layer` returns: a ``torch.optim.Optimizer`` over the groups of all inner optimizers, so that one
    LR scheduler, built on it, serves them all.

    Attributes:
        optimizers: the inner optimizers, one a module that owns parameters.
        accumulation_steps: backward passes a step.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        accumulation_steps: int = 1,
    ):
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        self.accumulation_steps = accumulation_steps
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
        self.optimizers[owner].step()
        for i in self._members[owner]:
            self._params[i].grad = None
        self._done[owner] = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End the step: update what backward has left over (modules of which some parameter got a gradient in only some
        of the backward passes, or whose gradients were set by hand), then start the next accumulation."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for owner, members in enumerate(self._members):
            if not self._done[owner] and any(self._params[i].grad is not None for i in members):
                self._step(owner)
        self._restart()
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
        for i, p in enumerate(self._params):
            grad = state_dict["grads"].get(i)
            p.grad = None if grad is None else grad.to(p.device, copy=True)


def per_layer(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    accumulation_steps: int = 1,
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
    What needs all gradients at once cannot work: clipping by global norm, ``torch.amp.GradScaler``.

    Args:
        model: parameters that require a gradient now take part.
        make_optimizer: called with a list of parameters for every module.
        accumulation_steps: backward passes a step.

    Returns:
        A ``torch.optim.Optimizer``: ``step``, ``zero_grad``, ``state_dict``, ``load_state_dict``, ``param_groups``
        (those of the inner ``optimizers``), and ``detach`` to remove the hooks.

    Raises:
        ValueError: no trainable parameter, or accumulation_steps < 1. RuntimeError, in backward: a parameter that has
            been updated in this step gets another gradient.
    """
    return PerLayerOptimizer(model, make_optimizer, accumulation_steps)
