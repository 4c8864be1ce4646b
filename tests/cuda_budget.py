"""Registers, stack and static shared memory of every compiled CUDA kernel, against what cuda_budget.json allows.

``python tests/cuda_budget.py`` prints what the built library needs; with ``--update``, it becomes the budget: for a
change that is worth its registers, and says so in its commit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

BUDGET = Path(__file__).parent / "cuda_budget.json"
FIELDS = {"registers": "REG", "stack": "STACK", "shared": "SHARED"}

Usage = dict[str, dict[str, dict[str, int]]]  # kernel: architecture: field: number


def find_cuobjdump() -> Path | None:
    """cuobjdump of PyPI's nvidia-cuda-cuobjdump (with nvidia-cuda-nvdisasm beside it), of CUDA_HOME, or on PATH."""
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    if spec := importlib.util.find_spec("nvidia"):
        folders += [p for root in spec.submodule_search_locations or [] for p in sorted(Path(root).glob("*/bin"))]
    if on_path := shutil.which("cuobjdump"):
        folders.append(Path(on_path).parent)
    return next((f / "cuobjdump" for f in folders if (f / "cuobjdump").exists()), None)


def cuobjdump(*arguments: str) -> str:
    tool = find_cuobjdump()
    assert tool is not None
    env = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, env=env, check=True)
    return subprocess.run(["c++filt"], input=done.stdout, capture_output=True, text=True, check=True).stdout


def short_name(function: str) -> str:
    """``void slk::cuda::(anonymous namespace)::f<short>(int)`` -> ``f<short>``."""
    function = function.replace("(anonymous namespace)::", "")
    function = re.sub(r"\((?!anonymous)[^()]*(\([^()]*\)[^()]*)*\)$", "", function.strip())
    return re.sub(r"(?:\w+::)+", "", function.removeprefix("void "))


def parse_usage(text: str) -> Usage:
    usage: Usage = {}
    architecture = kernel = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found.group(1)
        elif found := re.match(r"\s*Function (.*):$", line):
            kernel = short_name(found.group(1))
        elif "REG:" in line:
            numbers = {field: int(re.search(rf"\b{key}:(\d+)", line).group(1)) for field, key in FIELDS.items()}
            seen = usage.setdefault(kernel, {}).setdefault(architecture, numbers)
            # Two files may have a kernel of the same name: the larger one speaks for both.
            usage[kernel][architecture] = {field: max(seen[field], numbers[field]) for field in FIELDS}
    return usage


def parse_instructions(text: str) -> dict[str, set[str]]:
    """The instructions of every kernel, with their modifiers, of all architectures together."""
    found: dict[str, set[str]] = {}
    kernel = ""
    for line in text.splitlines():
        if function := re.match(r"\s*Function : (.*)$", line):
            kernel = short_name(function.group(1))
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line):
            found.setdefault(kernel, set()).add(instruction.group(1))
    return found


def violations(budget: dict[str, dict], usage: Usage, instructions: dict[str, set[str]]) -> list[str]:
    """What is over the budget, not in it, or no longer there; and instructions that a kernel should have and lacks."""
    wrong = [f"{kernel}: in the budget, but not in the library" for kernel in budget.keys() - usage.keys()]
    for kernel, architectures in usage.items():
        allowed = budget.get(kernel, {})
        for name in allowed.get("instructions", []):
            if not any(i == name or i.startswith(name + ".") for i in instructions.get(kernel, ())):
                wrong.append(f"{kernel}: has no {name}")
        for architecture, numbers in architectures.items():
            if architecture not in allowed:
                wrong.append(f"{kernel}: no budget for {architecture}; it needs {numbers}")
                continue
            for field, number in numbers.items():
                if number > allowed[architecture][field]:
                    wrong.append(f"{kernel} {architecture}: {number} {field}, allowed {allowed[architecture][field]}")
    return sorted(wrong)


def measure(library: Path) -> Usage:
    return parse_usage(cuobjdump("--dump-resource-usage", str(library)))


def as_text(budget: dict[str, dict]) -> str:
    """The budget as JSON, one line an architecture."""
    text = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", r"{\1}", json.dumps(budget, indent=2))
    return re.sub(r"(\"registers\": \d+,)\s+(\"stack\": \d+,)\s+", r"\1 \2 ", text) + "\n"


def main() -> None:
    import slkernels

    usage = measure(Path(slkernels._C.__file__))
    old = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    new: dict[str, dict] = {}
    for kernel, architectures in sorted(usage.items()):
        new[kernel] = {key: old[kernel][key] for key in ("instructions",) if key in old.get(kernel, {})} | architectures
    text = as_text(new)
    if "--update" in sys.argv:
        BUDGET.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
