"""Timing of providers side by side: interleaved rounds, buffers rotated beyond the caches, medians and quantiles.

Within a round every provider gets the same slice of time (at least one call), and the order of providers changes from
round to round. So a disturbance of the machine falls on all of them, and a ratio is taken within a round.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Plan:
    """rounds: how often every provider has its turn. slice_seconds: how long a turn is, at least one call.
    case_seconds: after this long no further round begins, once ``least_rounds`` are done."""

    rounds: int = 9
    least_rounds: int = 3
    slice_seconds: float = 0.1
    case_seconds: float = 30.0
    warmup_seconds: float = 0.1


QUICK = Plan(rounds=7, slice_seconds=0.03, case_seconds=2.5, warmup_seconds=0.03)


@dataclass(frozen=True)
class Timings:
    """Seconds of each call, by round."""

    rounds: list[list[float]]

    @property
    def samples(self) -> list[float]:
        return [s for r in self.rounds for s in r]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def speedup(ours: Timings, other: Timings) -> tuple[float, float, float]:
    """How many times faster ours is than other: (median, p20, p80) of the rounds' ratios of medians."""
    ratios = [median(b) / median(a) for a, b in zip(ours.rounds, other.rounds, strict=True)]
    return median(ratios), quantile(ratios, 0.2), quantile(ratios, 0.8)


class CpuTimer:
    """Seconds of one call by a monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock

    def __call__(self, run: Callable[[], object]) -> float:
        start = self.clock()
        run()
        return self.clock() - start


class CudaTimer:
    """Seconds between two CUDA events around one call, after twice the L2 cache was overwritten. The overwrite also
    keeps the device busy while the host launches, so that launch time counts only when it is longer than that."""

    def __init__(self, device: torch.device):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * l2, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def copies_beyond_cache(working_set: float, cache: int, most: int = 16) -> int:
    """How many sets of buffers make a working set twice the cache; at most ``most``, which bounds the memory."""
    return max(1, min(most, math.ceil(2 * cache / max(working_set, 1))))


def interleave(
    runs: dict[str, Sequence[Callable[[], object]]],
    plan: Plan,
    timer: Callable[[Callable[[], object]], float],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timings]:
    """Time every provider of ``runs``; each has one callable for each set of buffers. Successive calls, whoever makes
    them, use successive sets, so that nobody finds what another provider has just read in the cache."""
    turn = 0

    def call(name: str) -> float:
        nonlocal turn
        sets = runs[name]
        turn += 1
        return timer(sets[turn % len(sets)])

    def spend(name: str, seconds: float) -> list[float]:
        start, samples = clock(), [call(name)]
        while clock() - start < seconds:
            samples.append(call(name))
        return samples

    start = clock()
    for name, sets in runs.items():
        for _ in sets:  # each set once: lazily made state, page faults
            call(name)
        spend(name, plan.warmup_seconds)
    rounds: dict[str, list[list[float]]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for index in range(plan.rounds):
        if index >= plan.least_rounds and clock() - start > plan.case_seconds:
            break
        shuffle(order)
        for name in order:
            rounds[name].append(spend(name, plan.slice_seconds))
    return {name: Timings(r) for name, r in rounds.items()}
