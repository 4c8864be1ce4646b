"""Tables of a report for the terminal (rich)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from .case import OURS
from .report import ABSENT, ERROR, OK, WRONG, Ratio, Report, Row, busy_at_start, digits

_PIPE_WIDTH = 160  # a pipe has no width of its own
_MARK = {OK: "[green]✓[/]", WRONG: "[bold red]✗[/]", ERROR: "[bold red]✗[/]", ABSENT: ""}

LEGEND = (
    "spread: p20..p80. % roof: share of the ceiling measured in this run, c: bound by the GEMM rate, m: by memory. "
    "slkernels is .. faster: median of the rounds' ratios (p20..p80). ✓: checked before timing; under goal, ✗: missed."
)


def console(stream: TextIO | None = None):
    """A rich console on stream (default: standard output)."""
    from rich.console import Console

    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def header(report: Report) -> str:
    """The environment in a few lines."""
    e, r = report.environment, report.roofline
    caches = ", ".join(f"{level} {size // 1024} KiB" for level, size in e["caches"].items())
    load = e["load_average"]
    peers = ", ".join(f"{name} {version or 'not installed'}" for name, version in e["peers"].items())
    gemm = ", ".join(f"{dtype} GEMM {value:,.0f} GFLOP/s" for dtype, value in r["gflops"].items())
    lines = [
        f"slkernels {e['slkernels']} ({e['commit']}, {e['compiler']}), {e['date']}",
        f"{e['machine']}, threads: {e['threads']}, ISA {e['isa']} (torch: {e['torch_isa']}), {caches}",
        f"torch {e['torch']}, {e['blas']}; {peers}; {e['system']}",
        f"load average at the start {', '.join(f'{x:.2f}' for x in load)}" if load else "load average unknown",
        f"measured ceilings: {gemm}, memory {r['gbs']:.1f} GB/s",
    ]
    if busy_at_start(report):
        lines.append("[yellow]the machine was busy: times are noisy[/]")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Column:
    """cell: what a timed row shows. spare: columns of a higher number go first where the terminal is narrow."""

    name: str
    cell: Callable[[Row, Row | None], str]
    spare: int = 0
    justify: str = "right"


_COLUMNS = (
    _Column("median ms", lambda row, ours: digits(row.median_ms)),
    _Column("spread", lambda row, ours: f"{digits(row.p20_ms)}..{digits(row.p80_ms)}", spare=1),
    _Column("rate", lambda row, ours: rate(row), spare=2),
    _Column("% roof", lambda row, ours: f"{row.roofline_percent:.0f}{row.bound[0]}", spare=4),
    _Column("vs baseline", lambda row, ours: _versus_baseline(row), spare=3),
    _Column("slkernels is .. faster", lambda row, ours: _ratio(ours.ratios.get(row.provider) if ours else None)),
    _Column("goal", lambda row, ours: _goal(row, ours), justify="left"),
)


def family_table(rows: list[Row], width: int):
    """One family's rows as a rich table, with as many columns as the width has room for."""
    from rich.console import Console
    from rich.measure import Measurement

    columns = list(_COLUMNS)
    probe = Console(width=10_000)
    while True:
        table = _build(rows, columns)
        if Measurement.get(probe, probe.options, table).maximum <= width or not any(c.spare for c in columns):
            return table
        columns.remove(max(columns, key=lambda c: c.spare))


def _build(rows: list[Row], columns: list[_Column]):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"[bold]family {rows[0].family}[/]"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("case", no_wrap=True)
    table.add_column("provider", no_wrap=True)
    for column in columns:
        table.add_column(column.name, justify=column.justify, no_wrap=True)
    table.add_column("✓", justify="left")
    for _, group in itertools.groupby(rows, key=lambda row: row.key[:4]):
        _add_case(table, list(group), columns)
    return table


def _add_case(table, rows: list[Row], columns: list[_Column]) -> None:
    """The case's name stands beside its first row, its shape beside the second."""
    ours = next((row for row in rows if row.provider == OURS), None)
    names = [f"{rows[0].case} {rows[0].dtype}", f"  {rows[0].shape}"]
    if len(rows) == 1:
        names = ["".join(names)]
    for row, name in itertools.zip_longest(rows, names, fillvalue=""):
        timed = row.median_ms is not None
        cells = [c.cell(row, ours) if timed or c.name == "goal" else "" for c in columns]
        if not timed:
            cells[0] = "absent" if row.status == ABSENT else "not timed"
        provider = row.provider + (f" ({row.note})" if row.note else "")
        table.add_row(name, provider, *cells, _MARK[row.status], end_section=row is rows[-1])


def rate(row: Row) -> str:
    """The row's rate in the unit of its case."""
    if row.ns_per_item is not None:
        return f"{digits(row.ns_per_item)} ns/{row.item}"
    if row.gflops is not None and row.bound == "compute":
        return f"{digits(row.gflops)} GFLOP/s"
    return f"{digits(row.gbs)} GB/s"


def _versus_baseline(row: Row) -> str:
    if row.provider == row.baseline:
        return "baseline"
    ratio = row.ratios.get(row.baseline)
    return f"{digits(ratio.median)}x" if ratio else ""


def _ratio(ratio: Ratio | None) -> str:
    return f"{digits(ratio.median)}x ({digits(ratio.low)}..{digits(ratio.high)})" if ratio else ""


def _goal(row: Row, ours: Row | None) -> str:
    for goal in ours.goals if ours else ():
        if goal.against == row.provider:
            if goal.reached is None:
                return f"{goal.at_least:.2g}x not measured"
            return f"{goal.at_least:.2g}x " + ("[green]✓[/]" if goal.met else "[bold yellow]✗[/]")
    return ""


def print_report(report: Report, stream: TextIO | None = None) -> None:
    """Header and all families' tables."""
    out = console(stream)
    out.print(header(report))
    for family in report.families:
        print_family(report, family, out)
    print_summary(report, out)


def print_family(report: Report, family: str, out) -> None:
    """One family's table, and below it why absent providers are absent."""
    from rich.markup import escape

    rows = [row for row in report.rows if row.family == family]
    out.print()
    out.print(family_table(rows, out.width))
    absent = {(row.provider, row.dtype, row.message) for row in rows if row.status == ABSENT}
    for provider, dtype, message in sorted(absent):
        out.print(f"absent: {provider} ({dtype}): {escape(message)}")


def print_summary(report: Report, out) -> None:
    """Legend, goals reached, and failures."""
    from rich.markup import escape

    out.print(f"\n[dim]{LEGEND}[/]")
    goals = [goal for row in report.rows for goal in row.goals]
    if goals:
        out.print(f"goals: {sum(goal.met for goal in goals)} of {len(goals)} reached")
    for row in report.failures():
        out.print(f"[bold red]✗[/] {' '.join(row.key)}: {escape(row.message)}", soft_wrap=True)
