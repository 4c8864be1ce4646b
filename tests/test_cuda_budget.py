"""Compiled kernels keep to cuda_budget.json, and tensor-core kernels have the instructions that they are about."""

from __future__ import annotations

import json
from pathlib import Path

import cuda_budget
import pytest
import slkernels

USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function slk::cuda::(anonymous namespace)::f_kernel(slk::Args, void (*)(int), int):
  REG:40 STACK:8 SHARED:128 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function void slk::cuda::(anonymous namespace)::g_kernel<short, slk::Mode>(long, int const*):
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
\t\tFunction : slk::cuda::(anonymous namespace)::f_kernel(slk::Args, void (*)(int), int)
        /*0000*/                   MOV R1, c[0x0][0x28] ;               /* 0x00000a0000017a02 */
        /*0050*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R10, R4 ; /* 0x0000000a0804723c */
"""


def test_reports_are_understood():
    assert cuda_budget.parse_usage(USAGE) == {
        "f_kernel": {"sm_80": {"registers": 40, "stack": 8, "shared": 128}},
        "g_kernel<short, Mode>": {"sm_80": {"registers": 32, "stack": 0, "shared": 0}},
    }
    assert cuda_budget.parse_instructions(SASS) == {"f_kernel": {"MOV", "HMMA.16816.F32.BF16"}}


def test_of_kernels_of_the_same_name_the_larger_counts():
    text = "arch = sm_80\n" + "".join(
        f" Function slk::cuda::(anonymous namespace)::count_kernel(int{stars}):\n  REG:{r} STACK:0 SHARED:{s} LOCAL:0\n"
        for stars, r, s in (("", 40, 0), ("*", 20, 64))
    )
    assert cuda_budget.parse_usage(text) == {"count_kernel": {"sm_80": {"registers": 40, "stack": 0, "shared": 64}}}


def test_violations_are_found():
    budget = {
        "f_kernel": {"instructions": ["HMMA.16816", "LDSM"], "sm_80": {"registers": 39, "stack": 0, "shared": 128}},
        "gone_kernel": {},
    }
    usage, instructions = cuda_budget.parse_usage(USAGE), cuda_budget.parse_instructions(SASS)
    assert cuda_budget.violations(budget, usage, instructions) == [
        "f_kernel sm_80: 40 registers, allowed 39",
        "f_kernel sm_80: 8 stack, allowed 0",
        "f_kernel: has no LDSM",
        "g_kernel<short, Mode>: no budget for sm_80; it needs {'registers': 32, 'stack': 0, 'shared': 0}",
        "gone_kernel: in the budget, but not in the library",
    ]


def test_no_budget_allows_spills():
    for kernel, allowed in json.loads(cuda_budget.BUDGET.read_text()).items():
        for architecture, numbers in allowed.items():
            if architecture != "instructions":
                assert numbers["stack"] == 0, f"{kernel} {architecture}"


def test_library_keeps_to_the_budget():
    if not slkernels.build_info()["cuda"]:
        pytest.skip("this build of slkernels has no CUDA kernels (SLKERNELS_CUDA=ON builds them)")
    if cuda_budget.find_cuobjdump() is None:
        pytest.skip("no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    library = Path(slkernels._C.__file__)
    instructions = cuda_budget.parse_instructions(cuda_budget.cuobjdump("-sass", str(library)))
    budget = json.loads(cuda_budget.BUDGET.read_text())
    wrong = cuda_budget.violations(budget, cuda_budget.measure(library), instructions)
    assert not wrong, "\n".join(wrong)
