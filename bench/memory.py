"""Bytes of a training step, counted on the meta device or measured on a GPU: ``python -m slkernels.bench.memory``.

    python -m slkernels.bench.memory                        # 350M, 1B and 7B, counted; needs neither a GPU nor memory
    python -m slkernels.bench.memory --device cuda          # measured by torch's allocator
    python -m slkernels.bench.memory --markdown PATH.json   # the tables of docs/memory.md, from a result

Every row is a real forward, backward and update of the whole model (bench/llama.py with a vocabulary of 32000, in
bfloat16) on a micro-batch of 1 x 256 tokens, several steps long; docs/memory.md says what is counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from slkernels import convert
from slkernels.bench import environment, frugal, published
from slkernels.bench.__main__ import default_folder
from slkernels.bench.extras import MissingExtra, need
from slkernels.bench.live_bytes import LiveBytes, distinct_bytes, fused_attention
from slkernels.bench.llama import CONFIGS, Llama, LlamaConfig
from slkernels.bench.trainer import StepMeter
from slkernels.nn import Int8Linear
from slkernels.optim import (
    AdamW4bit,
    AdamW8bit,
    APOLLOMiniAdamW,
    GaLoreAdamW,
    QGaLoreAdamW8bit,
    low_rank_groups,
    per_layer,
)
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
    """A way to train. swap: changes a dense model in place. optimize: makes the optimizers. hooks: they step in
    backward by themselves, and freed the gradients. published: as its authors' code does it, in whose programs
    attention is not fused."""

    title: str
    optimize: Callable[[nn.Module, LlamaConfig], list]
    swap: Callable[[nn.Module, LlamaConfig], object] = lambda model, config: None
    hooks: bool = True
    published: bool = False


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


def _published_sltrain(model: nn.Module, config: LlamaConfig) -> None:
    published.sltrain(model, config.rank, config.density, config.alpha)


def _sltrain(model: nn.Module, config: LlamaConfig) -> None:
    convert.sltrain(model, config.rank, config.density, config.alpha, seed=0, verbose=False)


def _frugal_sltrain(model: nn.Module, config: LlamaConfig) -> None:
    _sltrain(model, config)
    frugal.frugal(model)


def _int8(model: nn.Module, config: LlamaConfig) -> None:
    convert.int8(model, verbose=False)


def _per_layer(optimizer: type[torch.optim.Optimizer]):
    return lambda model, config: [per_layer(model, lambda params: optimizer(params, weight_decay=0.0))]


def _low_rank(optimizer: type[torch.optim.Optimizer], **options: object):
    def make(model: nn.Module, config: LlamaConfig) -> list:
        rank = {"rank": config.rank, **options}.get("rank")

        def inner(params: list[nn.Parameter]) -> torch.optim.Optimizer:
            groups = low_rank_groups(model, rank, params=params)
            return optimizer(groups, update_proj_gap=_GAP, **{k: v for k, v in options.items() if k != "rank"})

        return [per_layer(model, inner)]

    return make


RECIPES = {
    "adam": Recipe("Adam", _adam, hooks=False, published=True),
    "adam8bit": Recipe("8-bit Adam per layer", _adam8bit, published=True),
    "galore8bit": Recipe("8-bit GaLore per layer", _galore8bit, published=True),
    "sltrain8bit": Recipe("8-bit SLTrain per layer", _adam8bit, _published_sltrain, published=True),
    "ours-galore8bit": Recipe("GaLoreAdamW, 8-bit states", _low_rank(GaLoreAdamW, codec="dyn8")),
    "ours-qgalore": Recipe("QGaLoreAdamW8bit, 8-bit weights", _low_rank(QGaLoreAdamW8bit), _int8),
    "ours-apollo-mini": Recipe("APOLLOMiniAdamW", _low_rank(APOLLOMiniAdamW, rank=1)),
    "ours-8bit": Recipe("SLTrain, 8-bit states", _per_layer(AdamW8bit), _sltrain),
    "ours-4bit": Recipe("SLTrain, 4-bit states", _per_layer(AdamW4bit), _sltrain),
    "frugal-8bit": Recipe("SLTrain, 8-bit states, frugal", _per_layer(AdamW8bit), _frugal_sltrain),
    "frugal-4bit": Recipe("SLTrain, 4-bit states, frugal", _per_layer(AdamW4bit), _frugal_sltrain),
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
            if not (recipe.hooks and recipe.published):  # per_layer's step() ends its step
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            peaks.append(meter.peak)
        parameters = list(model.parameters())
        codes = [b for m in model.modules() if isinstance(m, Int8Linear) for b in m.buffers()]
        indices = [b for m in model.modules() if not isinstance(m, Int8Linear) for b in m.buffers(recurse=False)]
        return Row(
            model_name,
            recipe_name,
            sum(p.numel() for p in parameters),
            distinct_bytes([*parameters, *codes]),
            distinct_bytes(indices),
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


# ---- all rows, table, command line ----------------------------------------------------------------------------------


def run(models: Iterable[str], recipes: Iterable[str], device: str, tokens: tuple[int, int]) -> dict[str, object]:
    """Every row, ready for JSON."""
    rows = [asdict(measure(model, recipe, device=device, tokens=tokens)) for model in models for recipe in recipes]
    return {
        "environment": environment.gather(torch.device("cpu" if device == "meta" else device)),
        "device": device,
        "tokens": list(tokens),
        "vocabulary": VOCABULARY,
        "rows": rows,
        "published": {"source": "SLTrain, arXiv 2406.02214, figure 3, one A100 80GB", "gigabytes": PAPER},
    }


_HEADER = ("", "parameters", "indices", "states", "gradients", "peak", "published")


def cells(row: dict) -> tuple[str, ...]:
    """A row of the table: gigabytes (10^9 bytes)."""
    parts = [row[name] / GB for name in ("parameters", "indices", "states", "gradients", "peak")]
    found = PAPER.get(row["recipe"], {}).get(row["model"])
    return (RECIPES[row["recipe"]].title, *(f"{x:.2f}" for x in parts), f"{found:.1f}" if found else "")


def print_table(result: dict) -> None:
    """The rows with rich."""
    from rich.console import Console
    from rich.table import Table

    how = "measured by torch's allocator" if result["device"] == "cuda" else f"counted on the {result['device']} device"
    table = Table(title=f"GB (10^9 bytes) of a training step, micro-batch {_times(result)}, bfloat16, {how}")
    for i, name in enumerate(("model", *_HEADER)):
        table.add_column(name, justify="right" if i > 1 else "left", no_wrap=True)
    for row, after in zip(result["rows"], [*result["rows"][1:], None], strict=True):
        table.add_row(row["model"].upper(), *cells(row), end_section=after is None or after["model"] != row["model"])
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _times(result: dict) -> str:
    return " x ".join(map(str, result["tokens"]))


def markdown(result: dict) -> str:
    """The tables of docs/memory.md, a model each."""
    e = result["environment"]
    lines = [
        f"slkernels {e['commit']}, torch {e['torch']}, {e['date'][:10]}. Micro-batch {_times(result)}, bfloat16, "
        f"vocabulary {result['vocabulary']}. GB are 10^9 bytes."
    ]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        lines += ["", f"**LLaMA {model.upper()}**", "", "| " + " | ".join(_HEADER) + " |", "|---" + "|--:" * 6 + "|"]
        rows = [row for row in result["rows"] if row["model"] == model]
        for kind, ours in (("as published", False), ("slkernels, per layer", True)):
            lines.append(f"| *{kind}* |" + " |" * 6)
            lines += ["| " + " | ".join(cells(r)) + " |" for r in rows if RECIPES[r["recipe"]].published != ours]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m slkernels.bench.memory", description=__doc__.partition("\n")[0])
    p.add_argument("--model", action="append", choices=MODELS, help="only this; may be repeated")
    p.add_argument("--recipe", action="append", choices=RECIPES, help="only this; may be repeated")
    p.add_argument("--device", choices=("meta", "cuda"), default="meta")
    p.add_argument("--tokens", type=int, nargs=2, default=(1, 256), metavar=("BATCH", "SEQUENCE"))
    p.add_argument(
        "--json", metavar="PATH", type=Path, help="where the result goes (default: memory.json in bench/out)"
    )
    p.add_argument("--markdown", metavar="PATH", type=Path, help="print an earlier result as Markdown; run nothing")
    args = p.parse_args(argv)
    if args.markdown:
        print(markdown(json.loads(args.markdown.read_text())))
        return 0
    try:
        need("rich")
    except MissingExtra as error:
        print(error, file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("slkernels.bench.memory: --device cuda needs a CUDA build of torch and a visible GPU", file=sys.stderr)
        return 2
    result = run(args.model or MODELS, args.recipe or RECIPES, args.device, tuple(args.tokens))
    print_table(result)
    path = args.json or default_folder() / "memory.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print(f"result: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
