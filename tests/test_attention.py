"""block_sparse_attention, forward and backward, over layouts that are written out here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention_cases import GARBAGE, AttentionCase, assert_attention, layout_of, make_cases, mask_arguments
from harness import FLOATS, LAYOUTS, Inputs, assert_bitwise_equal, is_float, with_grad
from op_tests import ErrorCase, OpTests, assert_compiled_equals_eager
from slkernels import reference
from torch import Tensor

ops = torch.ops.slkernels
attention = ops.block_sparse_attention
NAMES = [argument.name for argument in attention.default._schema.arguments]


def arguments(**changes) -> tuple:
    """A valid call with some arguments changed: 2 batches, 4 heads on 2, 70 queries, 130 keys."""
    q, k, v = torch.ones(2, 4, 70, 8), torch.ones(2, 2, 130, 8), torch.ones(2, 2, 130, 16)
    given = dict(zip(NAMES, (q, k, v, *mask_arguments("random", 1, 2, 70, 130, 64, 64), None, 0.0), strict=True))
    return tuple({**given, **changes}.values())


def changed(name: str, position: tuple, value: int, **others) -> tuple:
    """A valid call with one number of the layout changed."""
    given = dict(zip(NAMES, arguments(**others), strict=True))
    tensor = given[name].clone()
    tensor[position] = value
    return arguments(**{**others, name: tensor})


def error(id: str, message: str, *args) -> ErrorCase:
    return ErrorCase("block_sparse_attention", id, lambda: attention(*(args or arguments())), message)


def change(id: str, message: str, **changes) -> ErrorCase:
    return error(id, message, *arguments(**changes))


def corrupt(id: str, message: str, name: str, position: tuple, value: int, **others) -> ErrorCase:
    return error(id, message, *changed(name, position, value, **others))


COLUMNS = dict(col_ptr=torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32), col_idx=torch.tensor([5, 0, 129]).int())


class TestAttention(OpTests):
    cases = make_cases()
    errors = [  # noqa: RUF012
        change("q_3d", "q must be [B, Hq, Sq, Dk], got [4, 70, 8]", q=torch.ones(4, 70, 8)),
        change("q_int", "q must be float32, bfloat16, float16 or float64, got int64", q=torch.ones(2, 4, 70, 8).long()),
        change("k_features", "k must be [2, Hkv, Sk, 8], got [2, 2, 130, 9]", k=torch.ones(2, 2, 130, 9)),
        change("v_keys", "v must be [2, 2, 130, Dv], got [2, 2, 131, 8]", v=torch.ones(2, 2, 131, 8)),
        change("heads", "q's heads must be a multiple of k's, got 5 and 2", q=torch.ones(2, 5, 70, 8)),
        change("k_dtype", "k must have q's dtype float32, got float16", k=torch.ones(2, 2, 130, 8).half()),
        change("block_m", "block_m must be 64 or 128, got 32", block_m=32),
        change("block_n", "block_n must be 64 or 128, got 96", block_n=96),
        change("unit", "unit must be 1 or block_n = 64, got 2", unit=2),
        change("sink", "sink must not be negative, got -1", sink=-1),
        change("scale", "scale must be finite, got inf", scale=math.inf),
        change("softcap", "softcap must be finite and not negative, got -1", softcap=-1.0),
        change(
            "rows", "row_ptr must be [1 or 2, one of 1, 2, 4, 2], got [1, 3, 2]", row_ptr=torch.zeros(1, 3, 2).int()
        ),
        change("row_cnt", "row_cnt must be [1, 2, 2], got [1, 1, 2]", row_cnt=torch.zeros(1, 1, 2).int()),
        change("row_nmask", "row_nmask must be int32, got int64", row_nmask=torch.zeros(1, 2, 2).long()),
        change("idx", "idx must be [entries], got [1, 4]", idx=torch.zeros(1, 4).int()),
        change("bits_alone", "bits and bit_id go together", bit_id=None),
        change("bits", "bits must be [1, 64, 2], got [1, 64, 4]", bits=torch.zeros(1, 64, 4).int()),
        change("lo", "lo must be [1 or 2, 1 or 2, 70], got [1, 4, 70]", lo=torch.zeros(1, 4, 70).int()),
        change("hi", "hi must be int32, got float32", hi=torch.zeros(1, 1, 70)),
        change("col_alone", "col_ptr and col_idx go together", col_ptr=COLUMNS["col_ptr"]),
        change("col_ptr", "col_ptr must be [5], got [4]", **COLUMNS | dict(col_ptr=torch.zeros(4).int())),
        corrupt("ptr_negative", "row_ptr[0] = -1 and row_cnt[0] = ", "row_ptr", (0, 0, 0), -1),
        corrupt("ptr_large", f"row_ptr[0] = {GARBAGE} and row_cnt[0]", "row_ptr", (0, 0, 0), GARBAGE),
        corrupt("cnt_large", "row_cnt[3] = 1000 must stay within the", "row_cnt", (0, 1, 1), 1000),
        corrupt("cnt_overflow", "row_cnt[3] = 2147483647 must stay within", "row_cnt", (0, 1, 1), 2**31 - 1),
        corrupt("cnt_negative", "row_cnt[1] = -1 must stay within", "row_cnt", (0, 0, 1), -1),
        corrupt("nmask", "row_nmask[0] must be in [0, 3], got 4", "row_nmask", (0, 0, 0), 4),
        corrupt("nmask_negative", "row_nmask[1] must be in [0, 3], got -1", "row_nmask", (0, 0, 1), -1),
        corrupt("idx_large", "idx[4] of list 0 must be in [0, 3), got 3", "idx", (4,), 3),
        corrupt("idx_overflow", f"idx[4] of list 0 must be in [0, 3), got {2**31 - 1}", "idx", (4,), 2**31 - 1),
        corrupt("idx_negative", "idx[3] of list 0 must be in [0, 3), got -1", "idx", (3,), -1),
        corrupt("bit_id", "bit_id[3] of list 0 must be below", "bit_id", (3,), GARBAGE),
        corrupt("col_ptr_0", "col_ptr[0] must not be negative, got -1", "col_ptr", (0,), -1, **COLUMNS),
        corrupt("col_ptr_falls", "col_ptr[3] must be in [1, 3], got 0", "col_ptr", (3,), 0, **COLUMNS),
        corrupt("col_ptr_large", "col_ptr[4] must be in [3, 3], got 4", "col_ptr", (4,), 4, **COLUMNS),
        corrupt("col_idx", "col_idx[2] must be in [0, 130), got 130", "col_idx", (2,), 130, **COLUMNS),
        corrupt("col_idx_negative", "col_idx[0] must be in [0, 130), got -1", "col_idx", (0,), -1, **COLUMNS),
    ]

    @pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
    def test_numeric_reference(self, case: AttentionCase, dtype: torch.dtype, device: torch.device) -> None:
        assert_attention(case, case.make(Inputs(dtype, device)))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_numeric_layout(self, case: AttentionCase, layout: str, dtype: torch.dtype, device: torch.device) -> None:
        args = case.make(Inputs(dtype, device))
        assert_attention(case, tuple(LAYOUTS[layout](a) if is_float(a) else a for a in args))

    def test_compile(self, case: AttentionCase, device: torch.device) -> None:
        args = with_grad(case.make(Inputs(torch.float32, device)))
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: case(*a) * 2, fullgraph=True, backend="aot_eager")
        assert_compiled_equals_eager(compiled, lambda *a: case(*a) * 2, args, str(case))
