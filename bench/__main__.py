"""``python -m slkernels.bench``: check, time and tabulate slkernels against the dense library and its peers.

Exit status: 0 all results are right; 1 a provider raised or was wrong; 2 the run could not start; 130 interrupted.
A missed goal does not change it: goals depend on the machine, and the table shows them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TextIO

import torch

from . import environment, plots, report, roofline, tables
from .case import Case
from .cases import all_cases, families
from .extras import MissingExtra, need
from .run import run_case
from .timing import QUICK, Plan


def default_folder() -> Path:
    """bench/out of a source checkout; slkernels-bench in the current folder when installed from a wheel."""
    here = Path(__file__).resolve().parent
    checkout = here.name == "bench" and (here.parent / "CMakeLists.txt").exists()
    return here / "out" if checkout else Path.cwd() / "slkernels-bench"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m slkernels.bench", description=__doc__.split("\n\n")[0])
    p.add_argument("--quick", action="store_true", help="the cases and times that end within two minutes on two cores")
    p.add_argument("--family", action="append", choices=families(), help="only this family; may be repeated")
    p.add_argument("--case", metavar="TEXT", help="only cases whose line in --list contains this text")
    p.add_argument("--json", metavar="PATH", type=Path, help="where the results go (default: bench.json in bench/out)")
    p.add_argument(
        "--plot", metavar="DIR", type=Path, nargs="?", const=default_folder(), help="draw PNG plots into DIR"
    )
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    p.add_argument("--list", action="store_true", help="list the cases and end")
    p.add_argument(
        "--show", metavar="PATH", type=Path, help="print (and with --plot draw) an earlier JSON; run nothing"
    )
    return p


def select(cases: list[Case], args: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for. Cases named by --case run even when --quick would leave them out."""
    found = [c for c in cases if args.device in c.devices and (not args.family or c.family in args.family)]
    if args.case:
        return [c for c in found if args.case in c.label]
    return [c for c in found if c.quick or not args.quick]


def measure(cases: list[Case], device: torch.device, quick: bool, out: TextIO | None = None) -> report.Report:
    """Run the cases, printing each family's table when it is done. Ctrl-C ends early and keeps what is there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    plan = QUICK if quick else Plan()
    out, bar_out = tables.console(out), tables.console(sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=bar_out, transient=True) as bar:
        task = bar.add_task("measuring the machine's ceilings", total=len(cases))
        header = environment.gather(device)
        dtypes = {case.dtype for case in cases}
        ceilings = roofline.measure(device, dtypes, quick)
        settings = {"quick": quick, **dataclasses.asdict(plan)}
        result = report.Report(header, dataclasses.asdict(ceilings), settings)
        out.print(tables.header(result))
        try:
            for index, case in enumerate(cases):
                if index and cases[index - 1].family != case.family:  # the machine may have been busy at the start
                    ceilings.raise_to(roofline.measure(device, dtypes, quick))
                    result.roofline = dataclasses.asdict(ceilings)
                bar.update(task, description=case.label)
                result.rows += run_case(case, device, plan, ceilings)
                bar.advance(task)
                if index + 1 == len(cases) or cases[index + 1].family != case.family:
                    tables.print_family(result, case.family, out)
        except KeyboardInterrupt:
            result.settings["interrupted"] = True
            if case.family in result.families:
                tables.print_family(result, case.family, out)
    tables.print_summary(result, out)
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        need("rich", *(["matplotlib"] if args.plot else []))
    except MissingExtra as error:
        print(error, file=sys.stderr)
        return 2
    if args.show:
        result = report.load(args.show)
        tables.print_report(result)
        return _draw(result, args.plot)
    cases = select(all_cases(), args)
    if args.list:
        print("\n".join(case.label for case in cases))
        return 0
    if not cases:
        print("slkernels.bench: no case fits; --list shows them all", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("slkernels.bench: --device cuda needs a CUDA build of torch and a visible GPU", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(cases, torch.device(args.device), args.quick)
    path = args.json or default_folder() / "bench.json"
    report.save(result, path)
    print(f"results: {path}")
    _draw(result, args.plot)
    if result.settings.get("interrupted"):
        return 130
    return 1 if result.failures() else 0


def _draw(result: report.Report, folder: Path | None) -> int:
    for path in plots.draw(result, folder) if folder else []:
        print(f"plot: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
