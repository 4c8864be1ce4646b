"""Layouts, cases and error bounds of block-sparse attention, for the tests of every device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from harness import Inputs, OpCase, floats, with_grad
from slkernels import reference
from torch import Tensor

GARBAGE = 2**30  # in the slots that no row counts


# ---- layouts --------------------------------------------------------------------------------------------------------


def _int(values, shape=None) -> Tensor:
    t = torch.tensor(values, dtype=torch.int32)
    return t if shape is None else t.view(shape)


def _pack_lists(lists: list[list[tuple[int, int]]], partial: list[int], shape: tuple, with_bits: bool) -> tuple:
    """(ptr, cnt, nmask, idx, bit_id) of lists of (idx, bit_id), with garbage before, between and behind them."""
    ptr, idx, bit_id = [], [GARBAGE] * 3, [GARBAGE] * 3
    for entries in lists:
        ptr.append(len(idx))
        idx += [i for i, _ in entries] + [GARBAGE] * 2
        bit_id += [b for _, b in entries] + [GARBAGE] * 2
    cnt = [len(entries) for entries in lists]
    return (
        _int(ptr, shape),
        _int(cnt, shape),
        _int(partial, shape),
        _int(idx),
        _int(bit_id) if with_bits else None,
    )


def pack_bits(tile: Tensor, block_m: int, block_n: int) -> Tensor:
    """A bool tile as int32 [block_m, block_n / 32]; bit j % 32 of word j / 32 is column j. What is outside is set."""
    full = torch.ones(block_m, block_n, dtype=torch.bool)
    full[: tile.shape[0], : tile.shape[1]] = tile
    words = (full.view(block_m, -1, 32).long() << torch.arange(32)).sum(-1)
    return (words - (words >= 2**31) * 2**32).int()


def layout_of(keep: Tensor, block_m: int, block_n: int, lo=None, hi=None, sink=0, bits=True) -> tuple:
    """The op's layout arguments, with the transposed lists, for a mask bool [B', Hm, Sq, Sk]: tiles of ones are FULL,
    the others PARTIAL, with bits or (where the interval says it all) without."""
    batches, heads, queries, keys = keep.shape
    rows, columns = -(-queries // block_m), -(-keys // block_n)
    tiles: list[Tensor] = []
    lists, partial, transposed, transposed_partial = [], [], [], []
    for b in range(batches):
        for h in range(heads):
            found: dict[tuple[int, int], tuple[bool, int]] = {}
            for i in range(rows):
                for j in range(columns):
                    tile = keep[b, h, i * block_m : (i + 1) * block_m, j * block_n : (j + 1) * block_n]
                    if tile.all():
                        found[i, j] = (True, -1)
                    elif tile.any():
                        found[i, j] = (False, len(tiles) if bits else -1)
                        if bits:
                            tiles.append(pack_bits(tile, block_m, block_n))
            for lines, own, counts, of in (
                (rows, lists, partial, lambda i, n: (i, n)),
                (columns, transposed, transposed_partial, lambda j, n: (n, j)),
            ):
                others = columns if own is lists else rows
                for line in range(lines):
                    entries = [(n, *found[of(line, n)]) for n in range(others) if of(line, n) in found]
                    own.append([(n, b) for n, full, b in entries if not full] + [(n, b) for n, f, b in entries if f])
                    counts.append(sum(not full for _, full, _ in entries))
    *own, bit_id = _pack_lists(lists, partial, (batches, heads, rows), bits)
    packed = (
        (torch.stack(tiles) if tiles else torch.zeros(0, block_m, block_n // 32, dtype=torch.int32)) if bits else None
    )
    other = _pack_lists(transposed, transposed_partial, (batches, heads, columns), bits)
    return (*own, block_m, block_n, block_n, lo, hi, sink, packed, bit_id, None, None, *other)


def window(queries: int, keys: int, batches: int, heads: int, sink: int) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, lo, hi) of a causal sliding window of another width and offset for every batch and head."""
    j = torch.arange(keys)
    lo, hi = torch.empty(batches, heads, queries, dtype=torch.int32), torch.empty(batches, heads, queries).int()
    for b in range(batches):
        for h in range(heads):
            at = torch.arange(queries) + keys - queries + 5 * b
            lo[b, h], hi[b, h] = at - 20 - 50 * h, at + 1
    keep = (j < hi[..., None]) & ((j >= lo[..., None]) | (j < sink))
    return keep, lo, hi


def random_mask(queries: int, keys: int, batches: int, heads: int, generator: torch.Generator) -> Tensor:
    """30 % of the pairs, and: empty rows, empty columns, a full block, and, of several heads, an empty one."""
    keep = torch.rand(batches, heads, queries, keys, generator=generator) < 0.3
    if queries > 64 and keys > 64:
        keep[:, :, :64, 64:] = True
        keep[:, :, 64:, : keys // 3] = False
    if queries > 2:
        keep[:, :, queries // 2 : queries // 2 + 2] = False
    if heads > 1:
        keep[:, 1] = False
    return keep


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCase(OpCase):
    """A case of one of the two results, so that each is also differentiated alone; lse has 0 for -infinity."""

    output: int = 0

    def _choose(self, results: tuple[Tensor, Tensor]) -> Tensor:
        chosen = results[self.output]
        return chosen.masked_fill(chosen == -math.inf, 0) if self.output else chosen

    def __call__(self, *args) -> Tensor:
        return self._choose(self.overload(*args))

    def in_torch(self, *args) -> Tensor:
        return self._choose(self.reference(*args))


# id: B, Hq, Hkv, B', Hm, Sq, Sk, Dk, Dv, block_m, block_n, mask, softcap, small
CASES = {
    "small": (1, 2, 1, 1, 1, 5, 9, 4, 3, 64, 64, "random", 0.0, True),
    "small_tiles": (1, 2, 2, 1, 2, 66, 67, 2, 2, 64, 64, "random", 2.0, True),
    "small_window": (2, 2, 1, 2, 1, 4, 70, 2, 3, 64, 64, "window", 0.0, True),
    "one": (1, 1, 1, 1, 1, 1, 1, 64, 64, 64, 64, "full", 0.0, False),
    "queries_1": (1, 5, 1, 1, 1, 1, 521, 64, 64, 64, 128, "random", 0.0, False),
    "keys_1": (1, 3, 1, 1, 3, 521, 1, 64, 64, 128, 64, "random", 0.0, False),
    "63_127": (2, 3, 3, 1, 3, 63, 127, 80, 80, 64, 64, "random", 0.0, False),
    "127_63": (1, 8, 1, 1, 8, 127, 63, 96, 64, 128, 128, "window", 5.0, False),
    "129": (2, 7, 1, 2, 1, 129, 129, 128, 128, 64, 64, "window_bits", 0.0, False),
    "248": (1, 4, 2, 1, 2, 248, 248, 64, 64, 128, 64, "causal", 0.0, False),
    "320": (1, 6, 2, 1, 6, 320, 320, 192, 128, 128, 128, "random", 0.0, False),
    "521": (1, 2, 1, 1, 1, 521, 521, 256, 256, 128, 128, "causal", 30.0, False),
    "248_521": (1, 2, 2, 1, 1, 248, 521, 37, 50, 64, 128, "window", 0.0, False),
    "all_full": (1, 4, 4, 1, 1, 129, 320, 64, 128, 64, 64, "full", 0.0, False),
    "nothing": (2, 2, 1, 1, 1, 129, 70, 16, 16, 64, 64, "nothing", 0.0, False),
    "no_queries": (1, 2, 1, 1, 1, 0, 70, 16, 16, 64, 64, "full", 0.0, False),
    "no_keys": (1, 2, 1, 1, 1, 70, 0, 16, 16, 64, 64, "full", 0.0, False),
    "no_batch": (0, 2, 1, 1, 1, 70, 70, 16, 16, 64, 64, "full", 0.0, False),
}


def mask_arguments(kind: str, batches: int, heads: int, sq: int, sk: int, block_m: int, block_n: int) -> tuple:
    generator = torch.Generator().manual_seed(3)
    ones = torch.ones(batches, heads, sq, sk, dtype=torch.bool)
    if kind == "full":
        return layout_of(ones, block_m, block_n)
    if kind == "nothing":
        return layout_of(~ones, block_m, block_n)
    if kind == "random":
        return layout_of(random_mask(sq, sk, batches, heads, generator), block_m, block_n)
    if kind == "causal":
        hi = (torch.arange(sq, dtype=torch.int32) + 1 + sk - sq).view(1, 1, sq)
        return layout_of(ones.tril(sk - sq), block_m, block_n, hi=hi, bits=False)
    keep, lo, hi = window(sq, sk, batches, heads, sink=3)
    if kind == "window":
        return layout_of(keep, block_m, block_n, lo=lo, hi=hi, sink=3, bits=False)
    bits = torch.rand(keep.shape, generator=generator) < 0.7  # window_bits: the two together
    layout = layout_of(keep & bits, block_m, block_n, lo=lo, hi=hi, sink=3)
    return layout


def make_cases() -> list[AttentionCase]:
    cases = []
    for name, (b, hq, hkv, mb, hm, sq, sk, dk, dv, m, n, kind, softcap, small) in CASES.items():
        layout = mask_arguments(kind, mb, hm, sq, sk, m, n)

        def make(inputs: Inputs, layout=layout, b=b, hq=hq, hkv=hkv, sq=sq, sk=sk, dk=dk, dv=dv, cap=softcap) -> tuple:
            if torch.device(inputs.device).type == "cuda" and inputs.dtype not in (torch.bfloat16, torch.float16):
                pytest.skip("CUDA takes bfloat16 and float16, and refuses others: test_attention_cuda.py")
            q, k, v = inputs.tensor(b, hq, sq, dk), inputs.tensor(b, hkv, sk, dk), inputs.tensor(b, hkv, sk, dv)
            moved = tuple(t.to(inputs.device) if isinstance(t, Tensor) else t for t in layout)
            return q, k, v, *moved, (1.3 * dk**-0.5 if cap else None), cap

        for output, result in enumerate(("o", "lse")):
            cases.append(
                AttentionCase(
                    op="block_sparse_attention",
                    id=f"{name}-{result}",
                    make=make,
                    reference=reference.attention.block_sparse_attention,
                    terms=1,
                    small=small,
                    exact=False,
                    output=output,
                )
            )
    return cases


# ---- exact results and their error bounds ---------------------------------------------------------------------------


@dataclass
class Bounded:
    """A result in float64, its first-order error bound element by element, the largest sum of absolute values."""

    value: Tensor
    bound: Tensor
    magnitude: float


def bounded_results(args: tuple, do: Tensor | None, dlse: Tensor | None) -> dict[str, Bounded]:
    """o, lse, dq, dk, dv by their formulas in float64, and how far roundings of a kernel may move each: every product
    of n terms by (sqrt(n) + 4) roundings of its absolute terms, every result by one rounding to its dtype."""
    q, k, v, *layout = args[: 3 + reference.attention.LAYOUT_ARGUMENTS]
    scale, softcap = args[-2:]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    u_out = torch.finfo(dtype).eps / 2
    group = q.shape[1] // k.shape[1]
    keep = reference.attention.keep_mask(q.shape[2], k.shape[2], *layout)
    keep = keep.repeat_interleave(q.shape[1] // keep.shape[1], 1).expand(q.shape[0], -1, -1, -1)
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    do = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device) if do is None else do.double()
    dlse = torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device) if dlse is None else dlse.double()

    def product(a: Tensor, b: Tensor, error_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terms = a.abs() @ b.abs()
        return a @ b, error_a @ b.abs() + u * (math.sqrt(a.shape[-1]) + 4) * terms, terms

    def over_group(t: Tensor) -> Tensor:
        return t.unflatten(1, (t.shape[1] // group, group)).sum(2)

    def rounded(value: Tensor, bound: Tensor, terms: Tensor, unit: float) -> Bounded:
        return Bounded(value, bound + unit * value.abs(), float(terms.max()) if terms.numel() else 0.0)

    s, e_s, _ = product(q * scale, k.mT, torch.zeros_like(q))
    slope, e_slope = torch.ones_like(s), torch.zeros_like(s)
    if softcap:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
        e_slope = 2 * t.abs() * e_s / softcap + 4 * u
    e_s = e_s + 4 * u * s.abs()
    empty = ~keep.any(-1)
    lse = s.masked_fill(~keep, -math.inf).masked_fill(empty[..., None], 0).logsumexp(-1).masked_fill(empty, 0)
    p = (s - lse[..., None]).exp() * keep
    e_lse = (p * e_s).sum(-1) + u * (math.sqrt(s.shape[-1]) + 4 + 2 * lse.abs())
    e_p = p * (e_s + e_lse[..., None] + 4 * u)
    o, e_o, o_terms = product(p, v, e_p)
    found = {"o": rounded(o, e_o, o_terms, u_out), "lse": rounded(lse, e_lse, lse.abs() + 1, u)}
    dp, e_dp, _ = product(do, v.mT, torch.zeros_like(do))
    delta = (do * o).sum(-1, keepdim=True) - dlse[..., None]
    e_delta = (do.abs() * found["o"].bound).sum(-1, keepdim=True)
    e_delta = e_delta + u * (math.sqrt(v.shape[-1]) + 4) * ((do * o).abs().sum(-1) + dlse.abs())[..., None]
    ds = p * (dp - delta) * slope
    e_ds = e_p * (dp - delta).abs() * slope + p * slope * (e_dp + e_delta) + p * (dp - delta).abs() * (e_slope + 4 * u)
    terms_ds = p * (dp.abs() + delta.abs()) * scale
    dq, e_dq, _ = product(ds * scale, k, e_ds * scale)
    dk, e_dk, _ = product((ds * scale).mT, q, (e_ds * scale).mT)
    dv, e_dv, dv_terms = product(p.mT, do, e_p.mT)
    found["dq"] = rounded(dq, e_dq, terms_ds @ k.abs(), u_out)
    found["dk"] = rounded(over_group(dk), over_group(e_dk), over_group(terms_ds.mT @ q.abs()), u_out)
    found["dv"] = rounded(over_group(dv), over_group(e_dv), over_group(dv_terms), u_out)
    return found


def assert_bounded(got: Tensor, want: Bounded, in_torch: Tensor, what: str) -> None:
    """Every element within three times the first-order bound; the largest error at most twice that of the formula in
    PyTorch, plus one rounding of the largest result and of the largest sum (FlashAttention's rule)."""
    assert got.shape == want.value.shape and got.dtype == in_torch.dtype, f"{what}: {got.shape} {got.dtype}"
    if not got.numel():
        return
    assert got.isfinite().all(), f"{what}: not finite at {(~got.isfinite()).nonzero()[0].tolist()}"
    tiny = torch.finfo(got.dtype).smallest_normal
    error = (got.double() - want.value).abs()
    ratio = error / (3 * want.bound + tiny)
    worst = [int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape)]
    at = f"{what} at {worst}: got {got[tuple(worst)]:.9g}, want {want.value[tuple(worst)]:.9g}"
    assert ratio.max() <= 1, f"{at}, {ratio.max():.3g} times what is allowed"
    if got.dtype == torch.float64:
        return
    torch_error = (in_torch.double() - want.value).abs().max()
    rounding = torch.finfo(got.dtype).eps / 2 * want.value.abs().max() + 2**-24 * want.magnitude + tiny
    assert error.max() <= 2 * torch_error + rounding, (
        f"{what}: error {error.max():.3g}, PyTorch's own {torch_error:.3g}, one rounding {rounding:.3g}"
    )


def assert_attention(case: AttentionCase, args: tuple) -> None:
    """One result and its gradients, by the bounds of assert_bounded."""
    result = ("o", "lse")[case.output]
    own, in_torch = with_grad(args), with_grad(args)
    y, z = case(*own), case.in_torch(*in_torch)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent = cotangent.to(y.device, y.dtype)
    want = bounded_results(args, *((cotangent, None) if case.output == 0 else (None, cotangent)))
    assert_bounded(y.detach(), want[result], z.detach(), f"{case}")
    if not y.numel():
        return
    gots = torch.autograd.grad(y, floats(own), cotangent)
    theirs = torch.autograd.grad(z, floats(in_torch), cotangent, allow_unused=True)
    for name, got, other in zip(("dq", "dk", "dv"), gots, theirs, strict=True):
        assert_bounded(got, want[name], torch.zeros_like(got) if other is None else other, f"{case} {name}")
