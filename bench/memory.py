"""Bytes of a training step, counted on the meta device or measured on a GPU: ``python -m slkernels.bench.memory``.

    python -m slkernels.bench.memory                        # 350M, 1B and 7B, counted; needs neither a GPU nor memory
    python -m slkernels.bench.memory --device cuda          # measured by torch's allocator
    python -m slkernels.bench.memory --markdown PATH.json   # the tables of docs/memory.md, from a result

Every row is a real forward, backward and update of the whole model (bench/llama.py with a vocabulary of 32000, in
bfloat16) on a micro-batch of 1 x 256 tokens, several steps long; docs/memory.md says what is counted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from slkernels import convert
from slkernels.bench import frugal, published
from slkernels.bench.live_bytes import LiveBytes, distinct_bytes, fused_attention
from slkernels.bench.llama import CONFIGS, Llama, LlamaConfig
from slkernels.bench.trainer import StepMeter
from slkernels.optim import AdamW8bit, per_layer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

VOCABULARY = 32_000
MODELS = ("350m", "1b", "7b")
GB = 1e9
_GAP = 2  # steps between two subspaces: the third step has a new one, as every 200th has

# SLTrain, arXiv 2406.02214, figure 3: GB on one A100 80GB.
PAPER = {
    "adam": {"350m": 4.5, "1b": 16.3, "7b": 67.4},
    "adam8bit": {"350m": 3.5, "1b": 11.8, "7b": 29.4},
    "galore8bit": {"350m": 3.1, "1b": 10.3, "7b": 22.0},
    "sltrain8bit": {"350m": 2.2, "1b": 6.8, "7b": 18.3},
}


# ---- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A way to train: ``swap`` changes a dense model in place; ``optimize`` gives the optimizers, of which those that
    step in hooks are not stepped again. published: as its authors' code does it, with attention in separate ops."""

    title: str
    optimize: Callable[[nn.Module, LlamaConfig], list]
    swap: Callable[[nn.Module, LlamaConfig], object] = lambda model, config: None
    hooks: bool = True
    published: bool = True


def _adam(model: nn.Module, config: LlamaConfig) -> list:
    return [torch.optim.Adam(model.parameters(), foreach=True)]  # foreach is torch's default on a GPU


def _adam8bit(model: nn.Module, config: LlamaConfig) -> list:
    return published.per_parameter(model, lambda p: AdamW8bit([p], weight_decay=0.0))


def _galore8bit(model: nn.Module, config: LlamaConfig) -> list:
    projected = {m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in name}

    def make(p: nn.Parameter):
        if p in projected:
            return published.GaLoreAdamW8bit(p, config.rank, _GAP)
        return AdamW8bit([p], weight_decay=0.0)

    return published.per_parameter(model, make)


def _sltrain(model: nn.Module, config: LlamaConfig) -> None:
    published.sltrain(model, config.rank, config.density, config.alpha)


def _ours(model: nn.Module, config: LlamaConfig) -> None:
    convert.sltrain(model, config.rank, config.density, config.alpha, seed=0, verbose=False)


def _ours_frugal(model: nn.Module, config: LlamaConfig) -> None:
    _ours(model, config)
    frugal.frugal(model)


def _per_layer(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
    return lambda model, config: [per_layer(model, make)]


RECIPES = {
    "adam": Recipe("Adam", _adam, hooks=False),
    "adam8bit": Recipe("8-bit Adam per layer", _adam8bit),
    "galore8bit": Recipe("8-bit GaLore per layer", _galore8bit),
    "sltrain8bit": Recipe("8-bit SLTrain per layer", _adam8bit, _sltrain),
    "ours8bit": Recipe(
        "slkernels: SLTrain, 8-bit, per layer",
        _per_layer(lambda params: AdamW8bit(params, weight_decay=0.0)),
        _ours,
        published=False,
    ),
    "frugal8bit": Recipe(
        "slkernels: the same, frugal",
        _per_layer(lambda params: AdamW8bit(params, weight_decay=0.0)),
        _ours_frugal,
        published=False,
    ),
}


# ---- one row --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Bytes of one recipe on one model. gradients: the most at any moment. peak: the most of everything; steady: the
    same in a step that computes no new subspace."""

    model: str
    recipe: str
    trained: int
    parameters: int
    indices: int
    states: int
    gradients: int
    steady: int
    peak: int


def build(config: LlamaConfig, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of ``recipe``, made in ``dtype`` on ``device``."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Llama(config)
            recipe.swap(model, config)
    finally:
        torch.set_default_dtype(default)
    return model


def _state_tensors(optimizers: list) -> Iterable[Tensor]:
    for optimizer in optimizers:
        for inner in getattr(optimizer, "optimizers", [optimizer]):
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def measure(
    model_name: str,
    recipe_name: str,
    *,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    tokens: tuple[int, int] = (1, 256),
    config: LlamaConfig | None = None,
    recipe: Recipe | None = None,
) -> Row:
    """Train three steps and report the bytes; ``config`` and ``recipe`` default to those of the names."""
    config = config or replace(CONFIGS[model_name], vocabulary=VOCABULARY)
    recipe = recipe or RECIPES[recipe_name]
    where = torch.device(device)
    meter = _GpuMeter(where) if where.type == "cuda" else LiveBytes(where.type)
    with ExitStack() as stack:
        stack.enter_context(meter)
        # The published code turns torch's fused attention off.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH) if recipe.published else fused_attention())
        model = build(config, recipe, where, dtype)
        gradients = StepMeter(model)
        optimizers = recipe.optimize(model, config)
        batch = torch.zeros(tokens[0], tokens[1] + 1, dtype=torch.int64, device=where)
        peaks = []
        for _ in range(1 + _GAP):
            meter.restart()
            model.loss(batch).backward()
            if not recipe.hooks or not recipe.published:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            peaks.append(meter.peak)
        parameters = list(model.parameters())
        return Row(
            model_name,
            recipe_name,
            sum(p.numel() for p in parameters),
            distinct_bytes(parameters),
            distinct_bytes(model.buffers()),
            distinct_bytes(t for t in _state_tensors(optimizers) if t.device.type == where.type),
            gradients.peak,
            peaks[1],
            max(peaks[1:]),
        )


class _GpuMeter:
    """:class:`LiveBytes`' words for torch's CUDA allocator: bytes above what was allocated at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self):
        gc.collect()
        torch.cuda.empty_cache()
        self.start = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error) -> None:
        pass

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.start
