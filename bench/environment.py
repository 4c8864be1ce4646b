"""What a measurement depends on: machine, libraries, commit and load. Stands at the head of tables and JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ASSUMED_CACHE = (
    32 * 2**20
)  # where the system does not say: most desktop and server parts have no larger L3 a core group


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()


def cores() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches, for instance {"L1": 32768, "L2": 1048576, "L3": 33554432}."""
    found = {}
    for index in sorted(_CACHES.glob("index*")) if _CACHES.exists() else []:
        if (index / "type").read_text().strip() == "Instruction":
            continue
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip()).groups()
        level = "L" + (index / "level").read_text().strip()
        found[level] = int(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit]
    return found


def largest_cache() -> int:
    """Bytes of the last-level cache, assumed to be 32 MiB where the system does not say."""
    return max(caches().values(), default=_ASSUMED_CACHE)


def blas() -> str:
    """The dense libraries that torch was built with."""
    config = torch.__config__.show()
    found = [
        f"{name} {match.group(1)}"
        for name, pattern in (("MKL", r"Math Kernel Library Version ([\d.]+)"), ("oneDNN", r"MKL-DNN v([\d.]+)"))
        if (match := re.search(pattern, config))
    ]
    info = re.search(r"BLAS_INFO=(\w+)", config)
    return ", ".join(found) or (info.group(1) if info else "unknown")


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str:
    """The GPU driver's version, power limit and clocks as nvidia-smi reports them; "unknown" without nvidia-smi."""
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def gather(device: torch.device) -> dict[str, object]:
    """The environment header, ready for JSON."""
    import slkernels

    build = slkernels.build_info()
    header: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{cpu_name()}, {cores()} cores",
        "device": str(device),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": build["cpu_isa"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "slkernels": build["version"],
        "commit": build["commit"],
        "compiler": build["compiler"],
        "torch": torch.__version__,
        "blas": blas(),
        "peers": {p: version(p) for p in ("bitsandbytes", "torchao")},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        header["machine"] = gpu.name
        header["gpu"] = {"name": gpu.name, "sm": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory}
        header["cuda"] = torch.version.cuda
        header["driver"] = driver()
    return header
