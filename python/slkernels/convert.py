"""Swap the linear layers of any model: into SLTrain's, low-rank, 2:4 sparse or 8-bit ones, and back into
``nn.Linear``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .nn import Int8Linear, Linear24, LowRankLinear, MaskLinear24, SLLinear, exclude_indices_from_ddp
from .nn.sl_linear import draw_seed
from .semi24.scores import Calibration, input_norms, wanda_score

_ops = torch.ops.slkernels

_LAYERS = (SLLinear, LowRankLinear, Int8Linear, Linear24, MaskLinear24)


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
        return [swap.name for swap in self.swaps if swap.before]

    def rows(self) -> list[tuple[str, ...]]:
        """The table: layers of the same name but for their number are one row."""
        groups: dict[tuple, list[Swap]] = {}
        for swap in self.swaps:
            groups.setdefault((re.sub(r"\d+", "*", swap.name), swap.shape, swap.outcome), []).append(swap)
        rows = []
        for (name, shape, outcome), swaps in groups.items():
            before, after = sum(s.before for s in swaps), sum(s.after for s in swaps)
            counts = (f"{before:,}", f"{after:,}") if before else ("", "")
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
    again: Callable[[nn.Module], bool] = lambda module: False,
) -> Report:
    """Replace every nn.Linear whose qualified name contains a target by make(name, linear); layers of this
    library too where ``again`` says so."""
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
        if not isinstance(module, (nn.Linear, *_LAYERS)):
            continue
        shape = (module.out_features, module.in_features)
        if isinstance(module, _LAYERS) and not again(module):
            report.swaps.append(Swap(name, shape, "kept: already converted"))
            continue
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            report.swaps.append(Swap(name, shape, f"kept: a {type(module).__name__}"))
            continue
        if type(module) is nn.Linear and owners[id(module.weight)] > 1:
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


def _matching(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """The linears that :func:`_swap` would swap if no weight is tied."""
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    return {
        name: module
        for name, module in model.named_modules()
        if name and type(module) is nn.Linear and any(target in name for target in targets)
    }


def _norms(
    model: nn.Module, targets: Iterable[str], score: str, calibration: Calibration | None
) -> Callable[[nn.Linear], Tensor | None]:
    """Of a linear, the norms of its input features that Wanda's score needs; None where the score is the magnitude."""
    if score not in ("magnitude", "wanda"):
        raise ValueError(f'score must be "magnitude" or "wanda", got {score!r}')
    if (score == "wanda") != (calibration is not None):
        raise ValueError('score="wanda" needs calibration, "magnitude" takes none')
    if calibration is None:
        return lambda linear: None
    layers = _matching(model, targets)
    norms = input_norms(model, layers, calibration)
    found = {id(module): norms[name] for name, module in layers.items()}
    return lambda linear: found[id(linear)]


def semi24(
    model: nn.Module,
    mode: str = "dynamic",
    targets: Iterable[str] = ("attn", "mlp"),
    *,
    by: str | None = None,
    refresh: int | None = None,
    decay: float = 0.0,
    score: str = "magnitude",
    calibration: Calibration | None = None,
    verbose: bool = True,
    return_report: bool = False,
):
    """Swap the linears of ``model``, in place, for :class:`slkernels.nn.Linear24`: two of every four weights are kept.
    Make the optimizer afterwards, and :func:`slkernels.nn.track24` from both. ``mode="inference"`` packs what
    was trained too: layers of other modes and MaskLLM's, with the masks they have. The rest is as in :func:`sltrain`.

    Args:
        mode, by, refresh, decay: see :class:`slkernels.nn.Linear24`. "inference" prunes and packs in one go.
        score: what masks are chosen by: "magnitude", or "wanda", the magnitude times the norm of the input feature.
        calibration: for "wanda": batches, or a function of the model: see :func:`slkernels.semi24.input_norms`.

    Raises:
        ValueError: no linear matches ``targets``; arguments that do not fit the mode; calibration without "wanda".
    """
    norms = _norms(model, targets, score, calibration)

    def make(_: str, module: nn.Module) -> Linear24:
        if isinstance(module, MaskLinear24):
            return module.to_linear24("inference")
        if isinstance(module, Linear24):
            return module.to_inference()
        start = {"mode": "static", "by": by or "row"} if mode == "inference" else {"mode": mode, "by": by}
        new = Linear24.from_linear(module, **start, refresh=refresh, decay=decay, input_norm=norms(module))
        return new.to_inference() if mode == "inference" else new

    def again(module: nn.Module) -> bool:
        trained = isinstance(module, (MaskLinear24, Linear24)) and getattr(module, "mode", None) != "inference"
        return mode == "inference" and trained

    report = _swap(model, targets, make, lambda new: f"Linear24 {new.mode}", again)
    return _finish(model, report, verbose, return_report)


def maskllm(
    model: nn.Module,
    targets: Iterable[str] = ("attn", "mlp"),
    *,
    steps: int = 2000,
    kappa: tuple[float, float] = (1e2, 5e2),
    tau: tuple[float, float] = (4.0, 0.05),
    score: str = "magnitude",
    calibration: Calibration | None = None,
    strength: float = 3.0,
    seed: int | None = None,
    gate_dtype: torch.dtype = torch.float32,
    verbose: bool = True,
    return_report: bool = False,
):
    """Swap the linears of a trained ``model``, in place, for :class:`slkernels.nn.MaskLinear24`, and freeze every other
    parameter: only masks are learned (MaskLLM, arXiv 2409.17481). ``semi24(model, "inference")`` packs the result.

    Args:
        steps, kappa, tau, gate_dtype: see :class:`slkernels.nn.MaskLinear24`.
        score, calibration, strength: of the prior: see :func:`semi24` and ``MaskLinear24.set_prior``; 0: no prior.
        seed: of the whole model, as in :func:`sltrain`, whose other arguments these are too.

    Raises:
        ValueError: no linear matches ``targets``; calibration without "wanda".
    """
    seed = draw_seed() if seed is None else seed
    norms = _norms(model, targets, score, calibration)

    def make(name: str, linear: nn.Linear) -> MaskLinear24:
        norm = norms(linear)
        mask = None if norm is None else _ops.prune24(wanda_score(linear.weight, norm), "row", None)
        options = {"steps": steps, "kappa": kappa, "tau": tau, "gate_dtype": gate_dtype}
        return MaskLinear24.from_linear(linear, mask=mask, strength=strength, seed=module_seed(seed, name), **options)

    report = _swap(model, targets, make, lambda new: f"MaskLinear24 gates={new.gate.numel():,}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, MaskLinear24):
            module.gate.requires_grad_(True)
    return _finish(model, report, verbose, return_report)


def dense(model: nn.Module) -> nn.Module:
    """Swap every layer of this library in ``model``, in place, for the ``nn.Linear`` with the same W; returns it.

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
