"""Swap the linear layers of any model: into SLTrain's, low-rank or 8-bit ones, and back into ``nn.Linear``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from .nn import Int8Linear, LowRankLinear, SLLinear, exclude_indices_from_ddp
from .nn.sl_linear import draw_seed

_LAYERS = (SLLinear, LowRankLinear, Int8Linear)


@dataclass
class Swap:
    """One module name: what it is now, and its parameters before and after (0 and 0 where it was kept)."""

    name: str
    shape: tuple[int, int]
    outcome: str
    before: int = 0
    after: int = 0


@dataclass
class Report:
    """What a conversion did: one :class:`Swap` a matching module name, and the sizes of the whole model.

    ``parameters`` and ``nbytes`` are (before, after); bytes count parameters and buffers, so indices too.
    """

    swaps: list[Swap] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    nbytes: tuple[int, int] = (0, 0)

    @property
    def swapped(self) -> list[str]:
        """The names of the modules that were swapped."""
        return [swap.name for swap in self.swaps if swap.after]

    def rows(self) -> list[tuple[str, ...]]:
        """The table: layers of the same name but for their number are one row."""
        groups: dict[tuple, list[Swap]] = {}
        for swap in self.swaps:
            groups.setdefault((re.sub(r"\d+", "*", swap.name), swap.shape, swap.outcome), []).append(swap)
        rows = []
        for (name, shape, outcome), swaps in groups.items():
            before, after = sum(s.before for s in swaps), sum(s.after for s in swaps)
            counts = (f"{before:,}", f"{after:,}") if after else ("", "")
            rows.append((name, str(len(swaps)), f"{shape[0]}x{shape[1]}", outcome, *counts))
        return rows

    def print(self) -> None:
        """Print the table, with rich if it is installed."""
        header = ("module", "count", "shape", "now", "parameters before", "after")
        (p0, p1), (b0, b1) = self.parameters, self.nbytes
        total = f"parameters {p0:,} -> {p1:,} ({_change(p0, p1)}), bytes {b0:,} -> {b1:,} ({_change(b0, b1)})"
        rows = self.rows()
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
            for row in [header, *rows]:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            print(total)
            return
        table = Table()
        for i, title in enumerate(header):
            table.add_column(title, justify="right" if i in (1, 4, 5) else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console = Console()
        if not console.is_terminal:
            console = Console(width=120)  # in a log, wide lines are better than folded names
        console.print(table)
        console.print(total, highlight=False)


def _change(before: int, after: int) -> str:
    return f"{100 * (after - before) / max(before, 1):+.1f} %"


def _size(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    tensors = parameters + list(model.buffers())
    return sum(p.numel() for p in parameters), sum(t.numel() * t.element_size() for t in tensors)


def module_seed(seed: int, name: str) -> int:
    """The seed of one module, a function of the model's seed and the module's name only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _swap(
    model: nn.Module,
    targets: Iterable[str],
    make: Callable[[str, nn.Linear], nn.Module],
    describe: Callable[[nn.Module], str],
) -> Report:
    """Replace every nn.Linear whose qualified name contains a target by make(name, linear)."""
    if isinstance(targets, str):
        targets = (targets,)
    targets = tuple(targets)
    report = Report()
    before = _size(model)
    owners: dict[int, int] = {}  # how many modules hold a parameter
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    made: dict[int, nn.Module] = {}  # a module that is used under two names stays one module
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or not any(target in name for target in targets):
            continue
        if isinstance(module, _LAYERS):
            report.swaps.append(Swap(name, (module.out_features, module.in_features), "kept: already converted"))
            continue
        if not isinstance(module, nn.Linear):
            continue
        shape = (module.out_features, module.in_features)
        if type(module) is not nn.Linear:
            report.swaps.append(Swap(name, shape, f"kept: a {type(module).__name__}"))
            continue
        if owners[id(module.weight)] > 1:
            report.swaps.append(Swap(name, shape, "kept: its weight is tied"))
            continue
        shared = id(module) in made
        new = made[id(module)] if shared else made.setdefault(id(module), make(name, module))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
        count = [0 if shared else sum(p.numel() for p in m.parameters()) for m in (module, new)]
        report.swaps.append(Swap(name, shape, describe(new) + (" (shared)" if shared else ""), count[0], count[1]))
    if not report.swaps:
        raise ValueError(f"no nn.Linear of {type(model).__name__} has a name that contains any of {targets}")
    after = _size(model)
    report.parameters, report.nbytes = (before[0], after[0]), (before[1], after[1])
    exclude_indices_from_ddp(model)
    return report


def _finish(model: nn.Module, report: Report, verbose: bool, return_report: bool):
    if verbose:
        report.print()
    return (model, report) if return_report else model


def sltrain(
    model: nn.Module,
    rank: int,
    density: float,
    alpha: float,
    targets: Iterable[str] = ("attn", "mlp"),
    kind: str = "uniform",
    seed: int | None = None,
    *,
    init: str = "sltrain",
    path: str = "auto",
    verbose: bool = True,
    return_report: bool = False,
):
    """Swap the linears of ``model``, in place, for :class:`slkernels.nn.SLLinear` (SLTrain, arXiv 2406.02214).

    Args:
        model: any module, Hugging Face models included; may be on the meta device. Make its optimizer afterwards.
        rank, density, alpha, kind, init, path: see :class:`slkernels.nn.SLLinear` and its ``from_linear``.
        targets: an ``nn.Linear`` is swapped if its qualified name contains one of these. Subclasses of ``nn.Linear``,
            linears whose weight is tied to another module, and layers already converted are kept, and reported.
        seed: of the whole model; a module's seed derives from it and from the module's name, so that every rank makes
            the same layers. None draws it from torch's default CPU generator.
        verbose: print what was swapped, and parameters and bytes before and after.
        return_report: return (model, :class:`Report`).

    Returns:
        The same model.

    Raises:
        ValueError: no linear matches ``targets``.
    """
    seed = draw_seed() if seed is None else seed
    report = _swap(
        model,
        targets,
        lambda name, linear: SLLinear.from_linear(
            linear, rank, density, alpha, init=init, seed=module_seed(seed, name), kind=kind, path=path
        ),
        lambda new: f"SLLinear r={rank} nnz={new.values.numel():,}",
    )
    return _finish(model, report, verbose, return_report)


def lowrank(
    model: nn.Module,
    rank: int,
    targets: Iterable[str] = ("attn", "mlp"),
    *,
    init: str = "random",
    verbose: bool = True,
    return_report: bool = False,
):
    """Swap the linears of ``model``, in place, for :class:`slkernels.nn.LowRankLinear`: the low-rank baseline.

    ``init="random"`` is for pretraining, ``init="svd"`` keeps the best approximation of the weights. The rest is as in
    :func:`sltrain`.
    """
    report = _swap(
        model,
        targets,
        lambda name, linear: LowRankLinear.from_linear(linear, rank, init=init),
        lambda new: f"LowRankLinear r={rank}",
    )
    return _finish(model, report, verbose, return_report)


def int8(
    model: nn.Module,
    group: int = 256,
    targets: Iterable[str] = ("attn", "mlp"),
    *,
    verbose: bool = True,
    return_report: bool = False,
):
    """Swap the linears of ``model``, in place, for :class:`slkernels.nn.Int8Linear`: weights in 8 bits, which
    :class:`slkernels.optim.QGaLoreAdamW8bit` trains (Q-GaLore, arXiv 2407.08296). The rest is as in :func:`sltrain`.
    """
    report = _swap(
        model,
        targets,
        lambda name, linear: Int8Linear.from_linear(linear, group),
        lambda new: f"Int8Linear group={group}",
    )
    return _finish(model, report, verbose, return_report)


def dense(model: nn.Module) -> nn.Module:
    """Swap every SLLinear, LowRankLinear and Int8Linear of ``model``, in place, for the ``nn.Linear`` with the same W;
    returns it.

    Raises:
        ValueError: a LowRankLinear with an activation, which is no single matrix.
    """
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and isinstance(module, _LAYERS):
            parent, _, attribute = name.rpartition(".")
            new = made[id(module)] if id(module) in made else made.setdefault(id(module), module.to_dense())
            setattr(model.get_submodule(parent), attribute, new)
    if hasattr(model, "_ddp_params_and_buffers_to_ignore"):
        buffers = dict(model.named_buffers())
        ignored = model._ddp_params_and_buffers_to_ignore
        model._ddp_params_and_buffers_to_ignore = [name for name in ignored if name in buffers]
    return model
