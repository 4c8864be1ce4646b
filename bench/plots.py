"""Plots of a report, drawn from its data only: a figure of ratios for each family, and one of all families."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import fmean

from .case import OURS
from .report import Report, Row, busy_at_start, digits

_COLORS = {OURS: "#1f6f8b", "baseline": "#9a9a9a"}
_OTHERS = ("#d98c3f", "#8f6bb3", "#6a9f58", "#c0504d", "#b5a642")
_INK = "#222222"


def caption(report: Report) -> str:
    """Machine, versions and date in one line."""
    e = report.environment
    busy = " · the machine was busy" if busy_at_start(report) else ""
    return (
        f"{e['machine']}, {e['threads']} threads, ISA {e['isa']} · torch {e['torch']} ({e['blas']}) · "
        f"slkernels {e['commit']} · {e['date'][:10]}{busy}"
    )


def draw(report: Report, folder: Path) -> list[Path]:
    """Write ratio_<family>.png for each family and overview.png; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for family in report.families:
        rows = [row for row in report.rows if row.family == family and not row.parameters]
        if any(row.ratios for row in rows):
            written.append(_ratios(report, family, rows, folder / f"ratio_{family}.png"))
    if _timed_ours(report):
        written.append(_overview(report, folder / "overview.png"))
    sweep = [row for row in report.rows if row.parameters and row.median_ms is not None]
    if sweep:
        written.append(_path_sweep(report, sweep, folder / "paths.png"))
    return written


def _timed_ours(report: Report) -> list[Row]:
    """Our timed rows that have a ratio to their baseline, without the sweeps."""
    return [r for r in report.rows if r.provider == OURS and r.baseline in r.ratios and not r.parameters]


def _speed(row: Row) -> tuple[float, float, float] | None:
    """Speed against the baseline (median, p20, p80); 1 for the baseline itself; None when not timed."""
    if row.median_ms is None:
        return None
    if row.provider == row.baseline:
        return 1.0, 1.0, 1.0
    ratio = row.ratios.get(row.baseline)
    return (ratio.median, ratio.low, ratio.high) if ratio else None


def _ratios(report: Report, family: str, rows: list[Row], path: Path) -> Path:
    """Horizontal bars: speed of each provider against the baseline, on a logarithmic axis that starts at 1."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.key[:4])]
    bars = [(row, _speed(row)) for group in groups for row in group]
    figure, axes = _figure(0.24 * len(bars) + 0.32 * len(groups) + 1.5)
    others = list(dict.fromkeys(r.provider for r in rows if r.provider not in (OURS, r.baseline)))
    colors = dict(zip(others, itertools.cycle(_OTHERS), strict=False))
    speeds = [s for _, speed in bars if speed for s in speed]
    low, high = min([*speeds, 0.8]) * 0.8, max([*speeds, 2.0]) * 1.25
    y, ticks, labels = 0.0, [], []
    for group in groups:
        y += 0.9
        title = axes.text(0.005, y, _title(group[0]), transform=axes.get_yaxis_transform(), va="center", size=8.5)
        title.set(weight="bold", backgroundcolor="white", zorder=5)
        for row in group:
            y += 1.0
            ticks.append(y)
            labels.append(row.provider + (" (baseline)" if row.provider == row.baseline else ""))
            _bar(axes, row, _speed(row), y, low, _color(row, colors))
        for goal in (g for r in group for g in r.goals if r.provider == OURS and g.against == r.baseline):
            top = y - len(group) + 0.45
            axes.plot([goal.at_least] * 2, [top, top + 1.1], color="#b00020", lw=1.8, zorder=4)
        y += 0.35
    axes.axvline(1, color=_INK, lw=0.9, zorder=3)
    axes.set(xscale="log", xlim=(low, high), ylim=(y + 0.5, 0.2), yticks=ticks)
    axes.set_yticklabels(labels, size=8)
    _ratio_axis(axes, low, high)
    names = sorted({row.baseline for row in rows})
    goal = "; red mark: goal" if any(r.goals for r in rows) else ""
    _finish(figure, axes, report, f"{family}: speed against {' / '.join(names)} (= 1, more is faster{goal})", path)
    return path


def _title(row: Row) -> str:
    return f"{row.case} · {row.shape} · {row.dtype}"


def _color(row: Row, colors: dict[str, str]) -> str:
    if row.provider == OURS:
        return _COLORS[OURS]
    return _COLORS["baseline"] if row.provider == row.baseline else colors[row.provider]


def _bar(axes, row: Row, speed: tuple[float, float, float] | None, y: float, low: float, color: str) -> None:
    """A provider's bar from 1 to its speed, the p20 to p80 line, and the numbers in the right margin."""
    if speed is None:
        axes.text(low * 1.03, y, _reason(row), va="center", size=7.5, style="italic", color="#777777")
        return
    middle, least, most = speed
    margin = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "size": 8, "color": _INK}
    axes.text(1.08, y, f"{digits(row.median_ms)} ms", **margin)
    if row.provider == row.baseline:
        axes.plot([1], [y], "s", color=color, ms=6, zorder=4)
        return
    axes.text(1.15, y, f"{digits(middle)}x", weight="bold" if row.provider == OURS else "normal", **margin)
    axes.barh(y, middle - 1, left=1, height=0.8, color=color, zorder=2)
    axes.plot([least, most], [y, y], color=_INK, lw=1.0, zorder=4)


def _reason(row: Row) -> str:
    return row.message if len(row.message) <= 80 else row.message[:77] + "..."


def _overview(report: Report, path: Path) -> Path:
    """One line for each family and baseline: a point a case, and the geometric mean. Baselines are not mixed, for a
    mean over easy and hard ones says nothing."""
    lines: dict[tuple[str, str], list[float]] = {}
    for row in _timed_ours(report):
        lines.setdefault((row.family, row.baseline), []).append(row.ratios[row.baseline].median)
    figure, axes = _figure(0.5 * len(lines) + 1.6)
    every = [s for values in lines.values() for s in values]
    low, high = min([*every, 0.8]) * 0.8, max([*every, 2.0]) * 1.25
    labels = []
    for index, ((family, baseline), speeds) in enumerate(lines.items()):
        mean = math.exp(fmean(math.log(s) for s in speeds))
        axes.barh(index, mean - 1, left=1, height=0.55, color=_COLORS[OURS], alpha=0.35, zorder=2)
        axes.scatter(speeds, [index] * len(speeds), s=26, color=_COLORS[OURS], zorder=4, lw=0)
        axes.plot([mean] * 2, [index - 0.34, index + 0.34], color=_INK, lw=2, zorder=5)
        axes.text(1.01, index, f"mean {digits(mean)}x", transform=axes.get_yaxis_transform(), va="center", size=9)
        labels.append(f"{family} vs {baseline} ({len(speeds)})")
    axes.axvline(1, color=_INK, lw=0.9, zorder=3)
    axes.set(xscale="log", xlim=(low, high), ylim=(len(lines) - 0.4, -0.6), yticks=range(len(lines)))
    axes.set_yticklabels(labels, size=8.5)
    _ratio_axis(axes, low, high)
    _finish(figure, axes, report, "slkernels against the baseline: a point a case, bar to the geometric mean", path)
    return path


def _path_sweep(report: Report, rows: list[Row], path: Path) -> Path:
    """Time against tokens of both paths and dense, relative to dense, a panel for each layer and mode."""
    import matplotlib.pyplot as plt

    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        p = row.parameters
        panels.setdefault((p["mode"], p["n"], p["m"], p["r"], p["density"]), []).append(row)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4 * columns, 2.7 * lines + 0.6), squeeze=False, dpi=130)
    styles = {"chain": ("#1f6f8b", "o-"), "compose": ("#d98c3f", "s-"), OURS: (_INK, ":")}
    for axes, (key, members) in itertools.zip_longest(grid.flat, sorted(panels.items()), fillvalue=(None, ())):
        if key is None:
            axes.set_visible(False)
            continue
        mode, n, m, r, density = key
        for provider, (color, style) in styles.items():
            points = sorted(
                (q.parameters["T"], q.ratios[q.baseline].median)
                for q in members
                if q.provider == provider and q.baseline in q.ratios
            )
            label = "auto" if provider == OURS else provider
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, ms=4, lw=1.6, label=label)
        axes.axhline(1, color="#9a9a9a", lw=1)
        axes.set(xscale="log", yscale="log")
        axes.set_title(f"{mode}  {m}→{n}  r={r}  {density:.0%}", size=9)
        tokens = sorted({q.parameters["T"] for q in members})
        axes.set_xticks(tokens, [str(t) for t in tokens], size=7.5)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        _ratio_axis(axes, low, high, axis="y", label=False)
        axes.grid(alpha=0.25)
    grid.flat[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("tokens", size=9)
    figure.supylabel("speed against dense (= 1)", size=9)
    figure.suptitle("sl_linear: chain and compose paths", size=11)
    figure.text(0.5, -0.01, caption(report), ha="center", va="top", size=7.5, color="#666666")
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def _figure(height: float):
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(10, height), dpi=130)


def _ratio_axis(axes, low: float, high: float, axis: str = "x", label: bool = True) -> None:
    """Ticks at 1, 2, 5 of each decade, written as 0.5x, 1x, 2x."""
    from matplotlib.ticker import NullLocator

    steps = [d * 10.0**e for e in range(-4, 5) for d in (1, 2, 5)]
    shown = [s for s in steps if low <= s <= high]
    which = axes.xaxis if axis == "x" else axes.yaxis
    which.set_ticks(shown, [f"{s:g}x" for s in shown], size=8)
    which.set_minor_locator(NullLocator())
    if label:
        axes.grid(axis=axis, alpha=0.25, zorder=0)


def _finish(figure, axes, report: Report, title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    axes.set_title(title, loc="left", size=10.5)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.text(0.5, 0.0, caption(report), ha="center", va="top", size=7.5, color="#666666")
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
