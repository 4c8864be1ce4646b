"""Family `optim`: the codecs, by themselves and as quantize_block and dequantize_block."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import slkernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_data import CODECS, FLOATS, bits, random_tensor, same_bits
from slkernels.reference import optim as reference
from slkernels.reference import optim_codec
from slkernels.reference.philox import philox

# Whether a non-zero value may decode to 0, for the codecs of v.
KEEPS_NONZERO = ["lin8u", "cmp8u", "lin4u", "fp8u"]


def code_count(codec):
    return 16 if codec in optim_codec.FOUR_BITS else 256


def all_codes(codec):
    return optim_codec.pack(torch.arange(code_count(codec), dtype=torch.uint8), codec)


def code_values(codec, scale=1.0):
    """Every code's value, by the op."""
    scale = scale**0.5 if codec == "cmp8u" else scale
    return slkernels.dequantize_block(all_codes(codec), torch.full((1,), scale), codec)


# ---- the maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_every_value_is_bit_equal_to_the_table(codec):
    ours, table = code_values(codec), optim_codec.code_values(codec)
    known = table.isfinite()
    assert known.sum() == len(table) - {"lin8": 1, "cmp8": 1, "fp8": 2, "fp8u": 129}.get(codec, 0)
    assert same_bits(ours[known], table[known])
    if codec != "lin4u":
        assert ours[optim_codec.ZERO_CODE.get(codec, 0)] == 0


@pytest.mark.parametrize("codec", ["dyn8", "dyn8u"])
def test_map_is_bitsandbytes_map(codec):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    theirs = functional.create_dynamic_map(signed=codec == "dyn8")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # linspace without FMA
        torch.testing.assert_close(reference.dynamic_map(codec == "dyn8"), theirs, rtol=2e-7, atol=0)
    else:
        assert same_bits(reference.dynamic_map(codec == "dyn8"), theirs)


def test_four_bit_maps_are_torchaos():
    quant_utils = pytest.importorskip("torchao.optim.quant_utils", reason="torchao is not installed")
    assert same_bits(code_values("dyn4"), torch.tensor([float(v) for v in quant_utils.create_dynamic_map(True, 3, 4)]))
    assert same_bits(code_values("lin4u"), torch.linspace(0, 1, 17)[1:])


@pytest.mark.parametrize("codec", ["fp8", "fp8u"])
def test_fp8_values_are_e4m3(codec):
    codes = all_codes(codec)
    theirs = codes.view(torch.float8_e4m3fn).float()
    known = theirs.isfinite()
    assert known.sum() == 254 and same_bits(code_values(codec)[known], theirs[known])


@pytest.mark.parametrize("codec", CODECS)
def test_steps_read_what_dequantize_gives(codec):
    codes = all_codes(codec)
    exact = reference.dequantize_block(codes, torch.full((1,), 0.37), codec)
    read = reference.decode_in_step(codes, torch.full((1,), 0.37), codec, 256)
    assert ((read - exact).abs() <= 2e-6 * exact.abs())[exact.isfinite()].all()


# ---- nearest --------------------------------------------------------------------------------------------------------


def near_midpoints(codec, ulps):
    """Every midpoint of the map, relative to the largest value, as the float32 values around it; the values themselves;
    and random ones."""
    table = optim_codec.code_values(codec)
    table = table[table.isfinite()].sort().values.double()
    table = (table / table.max()).numpy()
    mid = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    points, up, down = [mid, table.astype(np.float32)], mid, mid
    for _ in range(ulps):
        up, down = np.nextafter(up, np.float32(2)), np.nextafter(down, np.float32(-2))
        points += [up, down]
    x = torch.from_numpy(np.concatenate(points))
    x = torch.cat([x, random_tensor(20000, seed=1, decades=9.0).clamp(-1, 1)])
    return x if codec in optim_codec.SIGNED else x[x >= 0]


def midpoint_blocks(codec, largest):
    """near_midpoints in blocks of 16 that start with `largest`."""
    x = near_midpoints(codec, ulps=4)
    x = x[: x.numel() // 15 * 15].view(-1, 15) * largest
    return torch.cat([torch.full((x.shape[0], 1), largest), x], 1).clamp(-largest, largest)


SCALES = [1.0, 3.7e-5, 1.9999999, 1.2e20, 3e38, 1.2e-38, 7e-42, 1e-45]


@pytest.mark.parametrize("largest", SCALES)
@pytest.mark.parametrize("codec", CODECS)
def test_nearest_is_exact_at_every_midpoint(codec, largest):
    x = midpoint_blocks(codec, largest)
    codes, scale = slkernels.quantize_block(x, codec, 16)
    want, want_scale = reference.quantize_block(x, codec, 16)
    assert same_bits(scale, want_scale) and torch.equal(codes, want)


def nearest_by_definition(codec, x, scale):
    """Distance to the nearest value of the table, in float64."""
    values = optim_codec.code_values(codec).double()
    values = values[values.isfinite()].sort().values * (scale.double() ** (2 if codec == "cmp8u" else 1))
    right = torch.searchsorted(values, x.double()).clamp(1, len(values) - 1)
    return torch.minimum((x.double() - values[right - 1]).abs(), (values[right] - x.double()).abs())


@pytest.mark.parametrize("codec", [c for c in CODECS if c not in ("cmp8", "cmp8u")])
def test_codes_are_the_nearest(codec):
    """Independent of the reference's encoder. (cmp8 and cmp8u round in the companded domain.)"""
    x = random_tensor(256, seed=5, decades=2.0)
    x = x if codec in optim_codec.SIGNED else x.abs()
    codes, scale = slkernels.quantize_block(x, codec)
    error = (slkernels.dequantize_block(codes, scale, codec).double() - x.double()).abs()
    excess = error - nearest_by_definition(codec, x, scale)
    if codec in KEEPS_NONZERO:
        smallest = optim_codec.magnitudes(codec)[1] * scale
        excess = excess[x > smallest]
    assert (excess <= 3e-7 * x.abs().max()).all()


@pytest.mark.parametrize("codec", CODECS)
def test_every_code_survives_a_round_trip(codec):
    values = code_values(codec, 0.37)
    known = optim_codec.code_values(codec).isfinite()
    x = torch.where(known, values, values[known].max())
    codes, _ = slkernels.quantize_block(x, codec)
    again = optim_codec.unpack(codes, codec)
    assert torch.equal(again[known], torch.arange(code_count(codec), dtype=torch.uint8)[known])


@pytest.mark.parametrize("codec", CODECS)
def test_zero_and_non_zero(codec):
    x = random_tensor(100, 256, seed=3, decades=25.0)
    x[:, 0] = 1.0
    x = x if codec in optim_codec.SIGNED else x.abs()
    out = slkernels.dequantize_block(*slkernels.quantize_block(x, codec), codec).view(x.shape)
    if codec == "lin4u":
        assert same_bits(out[x == 0], (x.amax(1, keepdim=True) / 16).expand_as(x)[x == 0])
    else:
        assert (out[x == 0] == 0).all()
    if codec in KEEPS_NONZERO:
        assert (out[x > 0] > 0).all()
    else:
        assert (out[x.abs() < 1e-12] == 0).all()


@pytest.mark.parametrize("codec", CODECS)
def test_special_blocks(codec):
    zero = optim_codec.ZERO_CODE.get(codec, 0)
    x = random_tensor(5, 64)
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 5] = float("inf")
    x = x if codec in optim_codec.SIGNED else x.abs()
    packed, scale = slkernels.quantize_block(x, codec, 64)
    codes = optim_codec.unpack(packed, codec).view(5, 64)
    assert scale[1] == 0 and (codes[1:4] == zero).all()
    assert scale[2:4].isnan().all() and scale[[0, 4]].isfinite().all()
    out = slkernels.dequantize_block(packed, scale, codec, 64).view(5, 64)
    assert (out[1] == 0).all() and out[2:4].isnan().all() and out[[0, 4]].isfinite().all()
    if codec not in optim_codec.SIGNED:
        codes, scale = slkernels.quantize_block(torch.tensor([-3.0, 0.5]), codec)
        assert torch.equal(scale, slkernels.quantize_block(torch.tensor([0.0, 0.5]), codec)[1])
        assert torch.equal(codes, slkernels.quantize_block(torch.tensor([0.0, 0.5]), codec)[0])


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 1500),
    block=st.sampled_from([16, 32, 48, 256, 4096]),
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-40, 30),
    stochastic=st.booleans(),
)
def test_quantize_matches_reference(n, block, codec, dtype, seed, exponent, stochastic):
    x = (random_tensor(n, seed=seed, decades=8.0) * 10.0**exponent).to(dtype)
    rounding = (1, torch.tensor([seed * 2**32 - seed, n])) if stochastic else (0, None)
    codes, scale = slkernels.quantize_block(x, codec, block, *rounding)
    want, want_scale = reference.quantize_block(x, codec, block, *rounding)
    assert torch.equal(codes, want)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(scale, want_scale, **exactly)
    for out_dtype in FLOATS:
        out = slkernels.dequantize_block(codes, scale, codec, block, out_dtype, n)
        want = reference.dequantize_block(codes, scale, codec, block, out_dtype, n)
        torch.testing.assert_close(out, want, **exactly)
    if codec == "dyn8" and not stochastic:  # half of the widest step, 0.9 / 64; -1 is that far from -0.993
        each = scale.repeat_interleave(block)[:n].double()
        error = (slkernels.dequantize_block(codes, scale, codec, block).double() - x.double()).abs()
        assert (error <= 0.0070315 * each + 2e-45)[each.isfinite()].all()


# ---- stochastic rounding --------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """Random123's known-answer test (kat_vectors, philox4x32 10)."""
    ones = torch.full((1,), 0xFFFFFFFF)
    zeros = torch.zeros(1, dtype=torch.int64)
    got = [int(w) for w in philox(0, zeros, zeros, zeros, zeros)]
    assert got == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    got = [int(w) for w in philox(0xFFFFFFFFFFFFFFFF, ones, ones, ones, ones)]
    assert got == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("codec", ["dyn8", "lin8", "cmp8", "cmp8u", "dyn4", "fp8"])
def test_stochastic_rounding_is_unbiased(codec):
    """The mean over n draws of a value between two codes: 5 standard errors, at most half a gap / sqrt(n) each."""
    x = torch.tensor([1.0, 0.3, -0.2, 0.047, 0.6, -0.0031, 0.81, 0.02] * 2)
    x = x if codec in optim_codec.SIGNED else x.abs()
    draws = 4000
    total = torch.zeros(16, dtype=torch.float64)
    seen = [set() for _ in range(16)]
    for t in range(draws):
        codes, scale = slkernels.quantize_block(x, codec, 16, 1, torch.tensor([11, t]))
        out = slkernels.dequantize_block(codes, scale, codec, 16).double()
        total += out
        for i, v in enumerate(out.tolist()):
            seen[i].add(v)
    assert all(len(s) <= 2 for s in seen)
    gap = torch.tensor([max(s) - min(s) for s in seen], dtype=torch.float64)
    assert ((total / draws - x.double()).abs() <= 2.5 * gap / draws**0.5 + 2.0**-15 * gap + 1e-7).all()
    assert (gap > 0).sum() >= 8


def test_stochastic_rounding_is_reproducible(threads):
    x, rng = random_tensor(100_000, decades=2.0), torch.tensor([3, 9])
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(slkernels.quantize_block(x, "lin8", 32, 1, rng)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for other in (torch.tensor([4, 9]), torch.tensor([3, 10])):
        assert not torch.equal(results[0], slkernels.quantize_block(x, "lin8", 32, 1, other)[0])


# ---- the scalar definition ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scalar(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    here = Path(__file__).parent
    library = tmp_path_factory.mktemp("scalar") / "libscalar.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{here.parent / 'include'}"]
    subprocess.run([compiler, *flags, str(here / "codec_scalar.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("codec", CODECS)
def test_vector_codes_are_the_scalar_codes(scalar, codec):
    for largest in SCALES:
        x = midpoint_blocks(codec, largest)
        packed, scale = slkernels.quantize_block(x, codec, 16)
        codes = optim_codec.unpack(packed, codec).view(-1)
        want, want_scale = torch.empty(x.numel(), dtype=torch.uint8), torch.empty(1)
        count = ctypes.c_int64(x.numel())
        args = (pointer(x), count, ctypes.c_float(x[0, 0]), pointer(want), pointer(want_scale))
        scalar.scalar_encode(CODECS.index(codec), *args)
        assert torch.equal(codes, want) and same_bits(scale[:1], want_scale)


@pytest.mark.parametrize("codec", CODECS)
def test_vector_values_are_the_scalar_values(scalar, codec):
    count = code_count(codec)
    for s in (1.0, 0.37, 1.1e-30, 7.7e20):
        exact, in_step = torch.empty(count), torch.empty(count)
        arguments = (ctypes.c_int64(count), ctypes.c_float(s), pointer(exact), pointer(in_step))
        scalar.scalar_decode(CODECS.index(codec), *arguments)
        known = optim_codec.code_values(codec).isfinite()
        scale = torch.full((1,), s)
        assert same_bits(slkernels.dequantize_block(all_codes(codec), scale, codec)[known], exact[known])
        assert same_bits(reference.decode_in_step(all_codes(codec), scale, codec, 256)[known], in_step[known])


def test_master_weights_survive_split_and_join(scalar):
    scalar.scalar_master_faults.restype = ctypes.c_int64
    assert scalar.scalar_master_faults() == 0


# ---- shapes and errors ----------------------------------------------------------------------------------------------


def test_quantize_shapes():
    x = random_tensor(3, 5, 7)
    codes, scale = slkernels.quantize_block(x, "dyn8", 16)
    assert codes.shape == x.shape and scale.shape == (7,)
    codes, scale = slkernels.quantize_block(x, "dyn4", 16)
    assert codes.shape == (53,) and scale.shape == (7,) and codes[-1] & 15 == 0
    assert slkernels.dequantize_block(codes, scale, "dyn4", 16, numel=105).shape == (105,)
    assert slkernels.dequantize_block(codes, scale, "dyn4", 16).shape == (106,)
    strided = random_tensor(7, 10)[:, ::2].t()
    assert torch.equal(
        slkernels.quantize_block(strided)[0], slkernels.quantize_block(strided.contiguous())[0]
    ) and torch.equal(slkernels.quantize_block(strided)[0], reference.quantize_block(strided)[0])
    codes, scale = slkernels.quantize_block(torch.empty(0, 4))
    assert codes.shape == (0, 4) and scale.shape == (0,)
    assert slkernels.dequantize_block(codes, scale).shape == (0, 4)
    assert (bits(slkernels.dequantize_block(*slkernels.quantize_block(torch.zeros(33)))) == 0).all()


def test_opcheck():
    x, rng = random_tensor(300), torch.tensor([1, 2])
    for codec in ("dyn8", "cmp8", "lin4u"):
        torch.library.opcheck(torch.ops.slkernels.quantize_block.default, (x, codec, 64))
        torch.library.opcheck(torch.ops.slkernels.quantize_block.default, (x, codec, 64, 1, rng))
        codes, scale = slkernels.quantize_block(x, codec)
        torch.library.opcheck(torch.ops.slkernels.dequantize_block.default, (codes, scale, codec))


def test_compile():
    x = random_tensor(3, 200)

    def round_trip(x):
        return slkernels.dequantize_block(*slkernels.quantize_block(x, "dyn4", 128), "dyn4", 128, numel=600)

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert same_bits(round_trip(x), compiled(x))


def test_errors():
    x = torch.zeros(300)
    codes, scale = slkernels.quantize_block(x)
    packed, _ = slkernels.quantize_block(x, "dyn4")
    q, d = slkernels.quantize_block, slkernels.dequantize_block
    for call, message in (
        (lambda: q(x.double()), "quantize_block: x must be float32, bfloat16 or float16"),
        (lambda: q(x, "int8"), "quantize_block: codec must be 'dyn8', 'dyn8u', .* 'fp8' or 'fp8u', got 'int8'"),
        (lambda: q(x, block=8), "quantize_block: block must be a multiple of 16"),
        (lambda: q(x, round_mode=2), "quantize_block: round_mode must be 0 .* or 1 .*, got 2"),
        (lambda: q(x, round_mode=1), r"quantize_block: round_mode 1 needs rng, int64 \[2\]"),
        (lambda: q(x, "lin8", 32, 1, torch.zeros(2)), r"rng must be contiguous int64 \[2\] = \(seed, step\), got fl"),
        (lambda: d(x, scale), "dequantize_block: codes must be uint8, got float32"),
        (lambda: d(codes, scale[:1]), r"dequantize_block: scale must be \[2\], got \[1\]"),
        (lambda: d(codes, scale.double()), "dequantize_block: scale must be float32"),
        (lambda: d(codes, scale, dtype=torch.int32), "dtype must be float32, bfloat16 or"),
        (lambda: d(codes, scale, numel=299), "numel must be the number of codes, 300, got 299"),
        (lambda: d(packed, scale, "dyn4", numel=298), "numel must be 300 or one less, got 298"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
