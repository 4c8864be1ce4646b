"""Whole training steps of the byte-level LLaMA (bench/llama.py): forward, backward and the optimizer's update.

ours: SLTrain's layers with 8-bit AdamW; dense: ``torch.nn.Linear`` with ``torch.optim.AdamW(fused=True)``. Both do one
step on the same random bytes. Attention, norms and embeddings are torch's in both. Some seconds a step: not in --quick.
"""

from __future__ import annotations

import math

import torch

from ..case import DENSE, OURS, Case, Provider, Target
from ..trainer import Settings, build_model, make_step

# An untrained model knows nothing: its loss on random bytes is ln 256, off by what the initial weights add.
_UNTRAINED = math.log(256)
_ALLOWED = 0.05 * _UNTRAINED


def step_problem(config: str, tokens: int, dtype: torch.dtype):
    name = str(dtype).removeprefix("torch.")

    def make(device, seed):
        def provider(method: str) -> Provider:
            settings = {"dtype": name, "device": str(device), "seed": seed}
            weights = sum(p.numel() for p in build_model(Settings(config, method, **settings).resolved()).parameters())
            step = make_step(config, method, tokens, **settings)
            # Forward, gradient of the input and of the weights: two FLOPs a weight and token each. Weights are read
            # three times and written once, gradients written and read.
            return Provider(
                step, lambda loss: abs(loss - _UNTRAINED) / _ALLOWED, 6.0 * weights * tokens, 6.0 * weights * 4
            )

        return {OURS: provider("sltrain"), DENSE: provider("dense")}

    return make


def cases() -> list[Case]:
    return [
        Case(
            family="model",
            name="train step",
            shape=f"{config} T=2048",
            dtype=torch.float32,
            make=step_problem(config, 2048, torch.float32),
            targets=targets,
            items=2048,
            item="token",
        )
        for config, targets in (("60m", (Target(DENSE, 1.0),)), ("130m", ()))
    ]
