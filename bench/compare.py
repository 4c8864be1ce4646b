"""Two benchmark files side by side: ``python -m slkernels.bench.compare old.json new.json``.

A row counts as changed when its ratio leaves 1 by more than the noise of both runs and five per cent. Rows that only
one file has are listed and never fail. Times of two machines, or of a busy and an idle one, cannot be compared: what
differs in the set-up is named, and the ratio to the baseline within each run is then the better guide.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from .extras import MissingExtra, need
from .report import Report, Row, load

_LEAST = 0.05
SAME, FASTER, SLOWER, ONLY_OLD, ONLY_NEW, BROKEN = "same", "faster", "slower", "only old", "only new", "broken"


@dataclass(frozen=True)
class Change:
    """One row of the comparison. ratio: old time over new time, above 1 is faster. noise: both runs' half spreads."""

    key: tuple[str, ...]
    verdict: str
    old_ms: float | None = None
    new_ms: float | None = None
    ratio: float | None = None
    noise: float | None = None


def half_spread(row: Row) -> float:
    """(p80 - p20) / 2 relative to the median."""
    return (row.p80_ms - row.p20_ms) / 2 / row.median_ms


def change(key: tuple[str, ...], old: Row | None, new: Row | None) -> Change:
    """What became of one row. A row that had a time and now fails is broken."""
    old_ms, new_ms = (row.median_ms if row else None for row in (old, new))
    if new is not None and new.failed and old_ms is not None:
        return Change(key, BROKEN, old_ms=old_ms)
    if old_ms is None or new_ms is None:
        return Change(key, ONLY_NEW if old_ms is None else ONLY_OLD, old_ms, new_ms)
    ratio, noise = old_ms / new_ms, half_spread(old) + half_spread(new)
    margin = 1 + max(_LEAST, noise)
    verdict = FASTER if ratio > margin else SLOWER if ratio < 1 / margin else SAME
    return Change(key, verdict, old_ms, new_ms, ratio, noise)


def compare(old: Report, new: Report) -> list[Change]:
    """A change for every row that has a time in at least one of the reports."""
    before, after = ({row.key: row for row in report.rows} for report in (old, new))
    found = []
    for key in dict.fromkeys([*before, *after]):
        rows = before.get(key), after.get(key)
        if any(row is not None and row.median_ms is not None for row in rows):
            found.append(change(key, *rows))
    return found


def differences(old: Report, new: Report) -> list[str]:
    """What of the environments differs and makes times incomparable."""
    keys = ("machine", "device", "threads", "isa", "torch", "blas")
    a, b = old.environment, new.environment
    return [f"{key}: {a.get(key)} against {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def print_changes(changes: list[Change]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .tables import console

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("case", "provider"):
        table.add_column(name, no_wrap=True)
    for name in ("old ms", "new ms", "old / new", "noise"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    colors = {FASTER: "green", SLOWER: "bold red", BROKEN: "bold red"}
    for c in changes:
        numbers = [f"{v:.3f}" if v is not None else "" for v in (c.old_ms, c.new_ms)]
        ratio = [f"{c.ratio:.2f}x", f"{c.noise:.0%}"] if c.ratio is not None else ["", ""]
        verdict = f"[{colors[c.verdict]}]{c.verdict}[/]" if c.verdict in colors else c.verdict
        table.add_row(" ".join(c.key[:4]), c.key[4], *numbers, *ratio, verdict)
    console().print(table)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m slkernels.bench.compare", description=__doc__.split("\n\n")[0])
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--fail-on-slower", action="store_true", help="exit status 1 if a row of ours is slower or broken")
    args = p.parse_args(argv)
    try:
        need("rich")
    except MissingExtra as error:
        print(error, file=sys.stderr)
        return 2
    old, new = load(args.old), load(args.new)
    for difference in differences(old, new):
        print(f"not the same set-up: {difference}")
    changes = compare(old, new)
    print_changes(changes)
    bad = [c for c in changes if c.verdict in (SLOWER, BROKEN) and c.key[4] == "slkernels"]
    return 1 if args.fail_on_slower and bad else 0


if __name__ == "__main__":
    sys.exit(main())
