"""Runs one case: checks every provider, times those that are right, and makes the rows."""

from __future__ import annotations

import re

import torch

from .case import OURS, Absent, Case, Provider
from .environment import largest_cache
from .report import ABSENT, ERROR, OK, WRONG, Goal, Ratio, Row
from .roofline import Roofline
from .timing import CpuTimer, CudaTimer, Plan, Timings, copies_beyond_cache, interleave, speedup

# What the dispatcher says of an op of ours that has only CPU kernels so far.
_NO_KERNEL = re.compile(r"Could not run '(slkernels::\w+)' with arguments from the '(\w+)' backend")


def run_case(case: Case, device: torch.device, plan: Plan, roofline: Roofline) -> list[Row]:
    """Rows of all providers of the case. A provider that raises or is wrong has a row that says so and no time."""
    try:
        providers = case.make(device, 0)
    except Exception as error:
        return [_row(case, OURS, ERROR, message=_first_line(error))]
    rows, sound = [], []
    for name, provider in providers.items():
        row = _check(case, name, provider)
        rows.append(row)
        if row.status == OK:
            sound.append(name)
    if sound:
        smallest = min(providers[name].bytes for name in sound)
        del provider, providers  # the references that the checks made in float64 go with them
        _fill(rows, case, *_time(case, sound, smallest, device, plan), roofline)
    _judge_goals(rows, case)
    return rows


def _check(case: Case, name: str, provider: Provider | Absent) -> Row:
    if isinstance(provider, Absent):
        return _row(case, name, ABSENT, message=provider.reason)
    try:
        result = provider.run()
        error = provider.error(result)
        note = provider.note(result) if provider.note else ""
    except Exception as exception:
        missing = _NO_KERNEL.search(str(exception))
        if missing:
            return _row(case, name, ABSENT, message=f"no {missing[2]} kernel yet: {missing[1]}")
        return _row(case, name, ERROR, message=_first_line(exception))
    status = OK if error <= 1 else WRONG  # a NaN is wrong
    message = "" if status == OK else f"error is {error:.3g} times what is allowed"
    return _row(case, name, status, message=message, note=note, error=error)


def _time(
    case: Case, names: list[str], working_set: float, device: torch.device, plan: Plan
) -> tuple[dict[str, Provider], dict[str, Timings]]:
    cuda = device.type == "cuda"  # its timer overwrites the cache
    copies = 1 if cuda else copies_beyond_cache(working_set, largest_cache())
    sets = [case.make(device, seed) for seed in range(1, copies + 1)]
    runs = {name: [providers[name].run for providers in sets] for name in names}
    return sets[0], interleave(runs, plan, CudaTimer(device) if cuda else CpuTimer())


def _fill(
    rows: list[Row], case: Case, providers: dict[str, Provider], timings: dict[str, Timings], roofline: Roofline
) -> None:
    for row in rows:
        if row.provider not in timings:
            continue
        times, provider = timings[row.provider], providers[row.provider]
        seconds = times.median
        row.median_ms, row.p20_ms, row.p80_ms = seconds * 1e3, times.p20 * 1e3, times.p80 * 1e3
        row.samples = len(times.samples)
        row.flops, row.bytes = provider.flops, provider.bytes
        row.gflops = provider.flops / seconds / 1e9 if provider.flops else None
        row.gbs = provider.bytes / seconds / 1e9
        row.ns_per_item = seconds * 1e9 / case.items if case.items else None
        row.roofline_percent = 100 * roofline.least_seconds(provider.flops, provider.bytes, row.dtype) / seconds
        row.bound = roofline.bound(provider.flops, provider.bytes, row.dtype)
        row.ratios = {name: Ratio(*speedup(times, other)) for name, other in timings.items() if name != row.provider}


def _judge_goals(rows: list[Row], case: Case) -> None:
    for row in rows:
        if row.provider != OURS:
            continue
        for target in case.targets:
            ratio = row.ratios.get(target.against)
            reached = ratio.median if ratio else None
            met = reached is not None and reached >= target.at_least
            row.goals.append(Goal(target.against, target.at_least, reached, met))


def _row(case: Case, provider: str, status: str, **fields) -> Row:
    return Row(
        family=case.family,
        case=case.name,
        shape=case.shape,
        dtype=case.dtype_name,
        provider=provider,
        status=status,
        baseline=case.baseline,
        item=case.item,
        parameters=dict(case.parameters),
        **fields,
    )


def _first_line(error: Exception) -> str:
    """The exception in one line of a bearable length: the dispatcher's messages list every backend."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: " + (text if len(text) <= 160 else text[:157] + "...")
