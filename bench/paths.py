"""The table of sl_linear's two paths for docs/paths.md: ``python -m slkernels.bench.paths [PATH] [--run]``.

Reads a benchmark file with the sweep of family sl (``--run`` measures it first, some minutes on two cores), and prints
Markdown: times of chain, compose and dense, and whether ``path="auto"`` picked the faster one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from .__main__ import default_folder, measure
from .case import DENSE, OURS
from .cases.sl import sweep
from .extras import MissingExtra, need
from .report import Report, Row, digits, load, save

_TIE = 0.05  # paths whose times differ by less than this, or by less than their noise, are equally good


def verdict(rows: dict[str, Row]) -> tuple[str, str]:
    """(the faster path, how auto's pick did) of one point; rows by provider."""
    against = rows["chain"].ratios["compose"]  # above 1: chain is faster
    winner = "chain" if against.median > 1 else "compose"
    picked = rows[OURS].note
    if picked == winner:
        return winner, "✓"
    loss = max(against.median, 1 / against.median)
    if loss < 1 + _TIE or against.low <= 1 <= against.high:
        return winner, "✓ (tie)"
    return winner, f"✗ {loss:.2f}x slower"


def points(report: Report) -> list[dict[str, Row]]:
    """The rows of each fully timed point of the sweep, by provider."""
    swept = [row for row in report.rows if "mode" in row.parameters]
    groups = ({row.provider: row for row in group} for _, group in itertools.groupby(swept, key=lambda r: r.key[:4]))
    needed = (OURS, "chain", "compose", DENSE)
    return [g for g in groups if all(name in g and g[name].median_ms is not None for name in needed)]


def markdown(report: Report) -> str:
    """The table, with the machine above it and the score below."""
    e, found = report.environment, points(report)
    lines = [
        f"{e['machine']}, {e['threads']} threads, ISA {e['isa']}; torch {e['torch']} ({e['blas']}); "
        f"slkernels {e['commit']}; {e['date'][:10]}. Median milliseconds, float32.",
        "",
        "| layer | r | density | pass | T | chain | compose | dense | faster | auto picks | |",
        "|---|--:|--:|---|--:|--:|--:|--:|---|---|---|",
    ]
    right = 0
    for rows in sorted(found, key=_order):
        p = rows[OURS].parameters
        winner, judged = verdict(rows)
        right += judged.startswith("✓")
        times = " | ".join(f"{digits(rows[name].median_ms)}" for name in ("chain", "compose", DENSE))
        lines.append(
            f"| {p['m']}→{p['n']} | {p['r']} | {p['density']:.0%} | {p['mode']} | {p['T']} | {times} "
            f"| {winner} | {rows[OURS].note} | {judged} |"
        )
    lines += ["", f"`auto` picked the faster path, or one as fast, in {right} of {len(found)} rows."]
    return "\n".join(lines)


def _order(rows: dict[str, Row]) -> tuple:
    p = rows[OURS].parameters
    return p["n"], p["m"], p["r"], p["density"], p["mode"], p["T"]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m slkernels.bench.paths", description=__doc__.split("\n\n")[0])
    p.add_argument("path", type=Path, nargs="?", default=default_folder() / "paths.json")
    p.add_argument("--run", action="store_true", help="measure the sweep first, and write it to PATH")
    args = p.parse_args(argv)
    if args.run:
        try:
            need("rich")
        except MissingExtra as error:
            print(error, file=sys.stderr)
            return 2
        save(measure(sweep(), torch.device("cpu"), quick=True, out=sys.stderr), args.path)
    elif not args.path.exists():
        print(f"slkernels.bench.paths: {args.path} does not exist; --run measures and writes it", file=sys.stderr)
        return 2
    report = load(args.path)
    if not points(report):
        print(f"slkernels.bench.paths: {args.path} holds no timed point of the sweep", file=sys.stderr)
        return 1
    print(markdown(report))
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
