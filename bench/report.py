"""Results as data: rows, the report that holds them, and its JSON. Tables and plots are drawn from this only."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1

OK, WRONG, ERROR, ABSENT = "ok", "wrong", "error", "absent"


@dataclass
class Ratio:
    """How many times faster a row's provider is than another one: median, p20 and p80 over the rounds."""

    median: float
    low: float
    high: float


@dataclass
class Goal:
    """A target of the case, judged on the median of the ratio."""

    against: str
    at_least: float
    reached: float | None
    met: bool


@dataclass
class Row:
    """One provider on one case. Times in milliseconds; ``error`` is a multiple of what is allowed, wrong above 1."""

    family: str
    case: str
    shape: str
    dtype: str
    provider: str
    status: str
    baseline: str
    message: str = ""
    note: str = ""
    error: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    gflops: float | None = None
    gbs: float | None = None
    ns_per_item: float | None = None
    item: str = ""
    roofline_percent: float | None = None
    bound: str = ""
    ratios: dict[str, Ratio] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        return self.family, self.case, self.shape, self.dtype, self.provider

    @property
    def failed(self) -> bool:
        return self.status in (WRONG, ERROR)


@dataclass
class Report:
    """All rows of a run with the environment, the measured roofline and the settings."""

    environment: dict[str, Any]
    roofline: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(row.family for row in self.rows))

    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.failed]

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"a benchmark file of schema {SCHEMA} is needed, got schema {_schema_of(data)}")
        rows = []
        for row in data["rows"]:
            ratios = {name: Ratio(**ratio) for name, ratio in row.pop("ratios").items()}
            goals = [Goal(**goal) for goal in row.pop("goals")]
            rows.append(Row(**row, ratios=ratios, goals=goals))
        return cls(data["environment"], data["roofline"], data["settings"], rows)


def busy_at_start(report: Report) -> bool:
    """Whether other work ran when the measurement began, so that its times are noisy."""
    load = report.environment["load_average"]
    return bool(load) and load[0] > 0.3 * report.environment["cores"]


def digits(value: float) -> str:
    """Three significant digits, without an exponent for large values."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def _schema_of(data: Any) -> Any:
    return data.get("schema") if isinstance(data, dict) else None


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.to_json())


def load(path: Path) -> Report:
    return Report.from_json(path.read_text())
