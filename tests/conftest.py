"""Fixtures that every test file shares."""

from __future__ import annotations

import os
import re

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

ON_GPU = torch.cuda.is_available() and slkernels.build_info()["cuda"]
DEVICES = ["cpu"]
if ON_GPU:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))
# What the dispatcher says of an op of ours without a CUDA kernel.
_NO_KERNEL = re.compile(r"Could not run '(slkernels::\w+)' with arguments from the 'CUDA' backend")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the fixture ``gpu`` are CUDA tests, and exist only where there is one. The reduced suite that runs under
    compute-sanitizer takes the small cases against the reference, and what is marked by hand."""
    kept, dropped = [], []
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cuda)
            (kept if ON_GPU else dropped).append(item)
        else:
            kept.append(item)
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if item.get_closest_marker("cuda") and getattr(case, "small", False) and "numeric_reference" in item.name:
            item.add_marker(pytest.mark.sanitize)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """On a GPU, an op that has only CPU kernels so far is skipped by name; the GPU run lists and counts these."""
    try:
        return (yield)
    except Exception as error:
        missing = pyfuncitem.get_closest_marker("cuda") and _NO_KERNEL.search(str(error))
        if not missing:
            raise
        pytest.skip(f"no CUDA kernel yet: {missing[1]}")


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


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


@pytest.fixture(scope="module")
def one_thread():
    """For a file whose models are too small for more; on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
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
