"""Fixtures that every test file shares."""

from __future__ import annotations

import os

# Small parallel regions by the thousand, on machines that run other jobs too: waiting threads should sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads its OpenMP runtime

import hypothesis
import pytest
import slkernels
import torch
from supports import FAULTS

hypothesis.settings.register_profile(
    "slkernels",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("slkernels")

DEVICES = ["cpu"]
if torch.cuda.is_available() and slkernels.build_info()["cuda"]:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


def pytest_report_header(config: pytest.Config) -> str:
    info = slkernels.build_info()
    return f"slkernels {info['version']} ({info['commit']}), cpu isa {info['cpu_isa']}, cuda {info['cuda']}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case``, ``error`` and ``faulty`` come from the class; see OpTests."""
    if metafunc.cls is None:
        return
    if "case" in metafunc.fixturenames:
        cases = [c for c in metafunc.cls.cases if metafunc.cls.selects(metafunc.function.__name__, c)]
        metafunc.parametrize("case", cases, ids=[c.id for c in cases])
    if "error" in metafunc.fixturenames:
        metafunc.parametrize("error", metafunc.cls.errors, ids=[e.id for e in metafunc.cls.errors])
    if "faulty" in metafunc.fixturenames:
        pairs = [(op, fault) for op in metafunc.cls.fault_calls for fault in FAULTS]
        metafunc.parametrize("faulty", pairs, ids=[f"{op}-{fault.id}" for op, fault in pairs])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poison_memory():
    """A function after whose call torch.empty, new_empty and the like, from C++ too, return NaN (integers: their
    maximum)."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()

    def poison() -> None:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)

    yield poison
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session", autouse=True)
def isa_in_use() -> None:
    """A run that asks for an instruction set must get it, or its results would say nothing about it."""
    wanted = os.environ.get("SLKERNELS_CPU_ISA")
    if wanted:
        assert slkernels.build_info()["cpu_isa"] == wanted
