"""The built package: what the binary says of itself, what it links to, and what a wheel and a source archive hold."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import slkernels
import torch
from slkernels import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "slkernels"
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
SITE = Path(torch.__file__).parents[1]


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    options = {"text": True, "capture_output": True, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run([str(c) for c in command], **options)


def run_ok(*command: str | Path, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_seeing(*folders: Path, **variables: str) -> dict:
    """Options of ``run`` for a Python that imports from these folders and then from torch's site-packages. With ``-S``:
    an editable install's import hook would come before any folder."""
    path = os.pathsep.join(map(str, [*folders, SITE]))
    return {"env": {**os.environ, "PYTHONPATH": path, **variables}}


# ---- build_info and import ------------------------------------------------------------------------------------------


def test_build_info():
    info = slkernels.build_info()
    assert {k: type(v) for k, v in info.items()} == {
        "version": str,
        "commit": str,
        "compiler": str,
        "cuda": bool,
        "cuda_archs": str,
        "torch_abi_target": str,
        "cpu_isa": str,
        "cpu_isas": list,
    }
    project_version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert slkernels.__version__ == info["version"] == project_version
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", info["commit"])
    assert re.match(r"(gcc|clang) \d+\.", info["compiler"])
    assert info["torch_abi_target"] == "0x020a000000000000"
    assert bool(info["cuda_archs"]) == info["cuda"]
    assert info["cpu_isas"][0] == "generic" and info["cpu_isa"] in info["cpu_isas"]


def test_build_info_is_a_fresh_dict():
    slkernels.build_info().clear()
    assert slkernels.build_info()


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
def test_instruction_set_can_be_chosen(isa):
    code = "import slkernels; print(slkernels.build_info()['cpu_isa'])"
    done = run(sys.executable, "-c", code, env={**os.environ, "SLKERNELS_CPU_ISA": isa})
    if done.returncode:  # this CPU lacks it
        assert f"SLKERNELS_CPU_ISA={isa} is not available on this machine; choose one of: generic" in done.stderr
    else:
        assert done.stdout.strip() == isa


def test_unknown_instruction_set_is_refused():
    done = run(
        sys.executable,
        "-c",
        "import slkernels; slkernels.build_info()",
        env={**os.environ, "SLKERNELS_CPU_ISA": "mmx"},
    )
    assert done.returncode != 0
    assert "SLKERNELS_CPU_ISA=mmx is not available on this machine; choose one of: generic" in done.stderr


@pytest.mark.parametrize("core", [None, b"", b"not a shared library"], ids=["missing", "empty", "garbage"])
def test_import_error_says_what_to_do(tmp_path, core):
    shutil.copytree(PACKAGE, tmp_path / "slkernels", ignore=shutil.ignore_patterns("*.so", "bench"))
    if core is not None:
        (tmp_path / "slkernels" / f"_C{EXTENSION}").write_bytes(core)
    done = run(sys.executable, "-S", "-c", "import slkernels", cwd=tmp_path, **python_seeing(tmp_path))
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: slkernels: the compiled core slkernels._C did not load (")
    for advice in ("`pip install --no-build-isolation -e .`", "`make test`", "torch must be >= 2.10"):
        assert advice in message


def test_import_without_a_gpu():
    code = "import slkernels, torch; assert not torch.cuda.is_available(); print(slkernels.build_info()['version'])"
    assert run_ok(sys.executable, "-c", code, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).strip()


# ---- the binary -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readelf():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    return lambda *options: run_ok("readelf", "-W", *options, _C.__file__)


def dynamic_symbols(readelf) -> list[tuple[str, str, bool]]:
    """(name, binding, defined) of every dynamic symbol."""
    symbols = []
    for line in readelf("--dyn-syms").splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[0].rstrip(":").isdigit():
            symbols.append((fields[7].split("@")[0], fields[4], fields[6] != "UND"))
    assert symbols
    return symbols


def test_torch_abi_is_stable():
    audit = pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed (it needs Python >= 3.11)")
    verdict = audit.inspect_extension(Path(_C.__file__)).torch
    assert verdict.uses_torch and verdict.stable, verdict.unstable_symbols
    assert not verdict.unknown_shim_symbols
    assert tuple(map(int, verdict.min_torch_version.split("."))) <= (2, 10, 0), verdict.version_defining_symbols


def test_linked_libraries(readelf):
    """libtorch.so is the only library that is not the system's; no CUDA runtime, no driver, no second OpenMP."""
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d")))
    assert "libtorch.so" in needed
    system = r"lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so\.\d+|ld-linux[-\w]*\.so\.\d+"
    assert [n for n in needed if n != "libtorch.so" and not re.fullmatch(system, n)] == []


def test_cuda_symbols_are_weak(readelf):
    """What lives in libtorch_cuda is null in a CPU-only torch; a strong reference would keep _C from loading there.
    (aoti_torch_device_type_cuda, an enumerator, is in every libtorch.)"""
    undefined = {name: binding for name, binding, defined in dynamic_symbols(readelf) if not defined}
    cuda = {n: b for n, b in undefined.items() if re.search("cuda|cublas|^cu[A-Z]", n)}
    cuda.pop("aoti_torch_device_type_cuda", None)
    assert set(cuda.values()) <= {"WEAK"}, cuda
    if slkernels.build_info()["cuda"]:
        assert "aoti_torch_get_current_cuda_stream" in cuda


def test_exports_only_the_module(readelf):
    """The static CUDA runtime and the kernels stay inside: torch brings a runtime of its own."""
    linker = {"_edata", "_end", "__bss_start", "_init", "_fini"}
    exported = {name for name, binding, defined in dynamic_symbols(readelf) if defined and binding == "GLOBAL"}
    assert exported - linker == {"PyInit__C"}


def test_hardening(readelf):
    dynamic, segments = readelf("-d"), readelf("-l")
    assert "BIND_NOW" in dynamic and "GNU_RELRO" in segments  # full RELRO
    assert "TEXTREL" not in dynamic
    assert re.search(r"GNU_STACK(\s+0x\w+){5}\s+RW\s", segments), "the stack must not be executable"
    runpath = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
    assert runpath in ([], ["$ORIGIN/../torch/lib"])  # an empty entry would be the current folder
    names = {name for name, _, _ in dynamic_symbols(readelf)}
    assert "__stack_chk_fail" in names  # -fstack-protector-strong
    assert any(n.endswith("_chk") for n in names)  # -D_FORTIFY_SOURCE


@pytest.mark.parametrize("isa", [i for i in _C.build_info()["cpu_isas"] if i != "generic"])
def test_instruction_sets_do_not_mix(isa):
    """Objects built for AVX define no weak symbol that another object may define too, say an inline std:: function: the
    linker keeps one copy of each for all callers, and one with AVX-512 in it would crash on a CPU without. Names that
    hold the instruction set's own namespace have no such namesake."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    trees = list((ROOT / "build").glob(f"*/CMakeFiles/slkernels_cpu_{isa}.dir/csrc/cpu"))
    trees = [tree for tree in trees if "asan" not in tree.parts]  # sanitizers bring weak symbols of their own
    if not trees:
        pytest.skip("no build tree beside the tests")
    newest = max(trees, key=lambda tree: tree.stat().st_mtime)
    for file in newest.glob("*.o"):
        weak = re.findall(r"^\w+ [WVu] .*$", run_ok("nm", "--defined-only", "-C", file), re.MULTILINE)
        shared = [line for line in weak if f"::{isa}::" not in line]
        assert shared == [], f"{file.relative_to(ROOT)}: mark the functions that need these inline in namespace SLK_ISA"


def test_stub_names_what_the_core_exports():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    defined = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign)}
    assert defined == {n for n in dir(_C) if not n.startswith("__")}


# ---- wheel and source archive ---------------------------------------------------------------------------------------


def python_files(folder: Path) -> set[str]:
    """Names of the .py files under a folder, links followed, results and outputs left out."""
    found = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if f not in ("results", "out", "__pycache__")]
        found |= {(Path(here) / f).relative_to(folder).as_posix() for f in files if f.endswith(".py")}
    return found


def need_build_tools() -> None:
    for name in ("scikit_build_core", "pybind11", "build"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the source tree, without the CUDA half: what it holds does not depend on it, and it is soon built."""
    need_build_tools()
    out = tmp_path_factory.mktemp("wheel")
    run_ok(
        *(sys.executable, "-m", "pip", "wheel", ROOT, "--no-build-isolation", "--no-deps", "-q", "-w", out),
        # A build folder of its own: sharing the development build's would switch its settings.
        f"-Cbuild-dir={ROOT / 'build' / 'test-wheel'}",
        env={**os.environ, "SLKERNELS_CUDA": "OFF", "SLKERNELS_TORCH_DIR": str(Path(torch.__file__).parent)},
    )
    (file,) = out.glob("*.whl")
    return file


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    sources = {f"slkernels/{name}" for name in python_files(PACKAGE)}
    assert any(n.startswith("slkernels/bench/") for n in sources)
    in_package = {n for n in names if ".dist-info/" not in n}
    assert in_package - sources == {f"slkernels/_C{EXTENSION}", "slkernels/_C.pyi", "slkernels/py.typed"}
    assert sources - in_package == set()
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    assert "Requires-Dist: torch>=2.10" in metadata and "License-Expression: Apache-2.0" in metadata


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of a clean environment with the wheel; torch comes from this Python's packages, so that no network is
    needed."""
    venv = tmp_path_factory.mktemp("venv") / "venv"
    run_ok(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    run_ok(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    purelib = Path(run_ok(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A plain path line: torch's folder comes last, and the .pth files in it, an editable slkernels', are not read.
    (purelib / "torch_from_outside.pth").write_text(f"{SITE}\n")
    return python


def test_wheel_works_outside_the_source_tree(installed, tmp_path):
    code = """
import slkernels, torch
crow = torch.tensor([0, 1, 3], dtype=torch.int32)
col = torch.tensor([2, 0, 1], dtype=torch.int16)
y = slkernels.spmm(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([1.0, 10.0, 100.0]), crow, col, 2)
assert y.tolist() == [[4.0, 210.0]], y
print(slkernels.__file__)
print(slkernels.build_info()["version"])
"""
    file, version = run_ok(installed, "-c", code, cwd=tmp_path, env=clean_environment()).split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert version == slkernels.__version__


def test_benchmarks_come_with_the_wheel(installed, tmp_path):
    listed = run_ok(installed, "-m", "slkernels.bench", "--list", cwd=tmp_path, env=clean_environment())
    for family in ("sparse", "lowrank", "sl", "optim"):
        assert re.search(rf"\b{family}\b", listed)
    assert not list(tmp_path.iterdir())


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def test_source_archive(tmp_path):
    """It holds everything that a build and the tests need, bench/ as the folder that the link led to."""
    need_build_tools()
    run_ok(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, ROOT)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    tracked = {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "tests/test_packaging.py"}
    for folder in ("cmake", "csrc", "include"):
        tracked |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
    tracked |= {f"python/slkernels/{name}" for name in {"_C.pyi", "py.typed"} | python_files(PACKAGE)}
    assert tracked - names == set()
    assert [n for n in names if n.endswith(".so") or "/results/" in n or n.startswith("build/")] == []
