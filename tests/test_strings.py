"""Arguments of type str: torch's own conversion in the stable ABI leaves a copy on the heap at every call."""

from __future__ import annotations

import pytest
import slkernels
import torch
from slkernels.bench.trainer import live_heap

CALLS = 2000
W, X, A, B = torch.ones(8, 8), torch.ones(2, 8), torch.ones(2, 8), torch.ones(8, 2)
OPS = {
    "random_support": lambda: slkernels.random_support(8, 8, 0.5, 3),
    "lowrank_linear": lambda: slkernels.lowrank_linear(X, A, B, 1.0, None, "silu"),
    "prune24": lambda: slkernels.prune24(W, "transposable"),
    "quantize_block": lambda: slkernels.quantize_block(X, "lin8"),
}


@pytest.mark.skipif(live_heap() == 0, reason="the C library does not tell what is allocated")
@pytest.mark.parametrize("name", OPS)
def test_strings_leave_nothing_on_the_heap(name: str) -> None:
    call = OPS[name]
    for _ in range(50):
        call()
    before = live_heap()
    for _ in range(CALLS):
        call()
    assert live_heap() - before < 16 * CALLS  # an empty string alone takes 32
