"""Family attention: block-sparse attention, against scaled_dot_product_attention and flex_attention with its mask."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from slkernels.attention import BlockRows, attend, patterns
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..case import DENSE, OURS, Absent, Case, Provider, Target, compare_with
from ..data import generator, nbytes

FLEX = "flex_attention"
ATTENTION = "attention forward"
_NO_FLEX_BACKWARD = Absent("flex_attention has no backward on a CPU")
_BLOCK = 128


@cache
def _block_mask(heads: int, tokens: int, density: float, device: torch.device) -> torch.Tensor:
    """Tiles that every head keeps at random, and the diagonal: bool [1, heads, blocks, blocks]."""
    blocks = -(-tokens // _BLOCK)
    drawn = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    off_diagonal = (density * blocks - 1) / (blocks - 1)
    return ((drawn < off_diagonal) | torch.eye(blocks, dtype=torch.bool)).to(device)


@cache
def _layout(heads: int, tokens: int, density: float | None, device: torch.device) -> BlockRows:
    """Random tiles, or (no density) the causal mask."""
    if density is None:
        return patterns.causal(tokens, tokens, block_m=_BLOCK, block_n=_BLOCK, device=device)
    return BlockRows.from_block_mask(_block_mask(heads, tokens, density, device), _BLOCK, _BLOCK, tokens, tokens)


@cache
def _dense_mask(heads: int, tokens: int, density: float, device: torch.device) -> torch.Tensor:
    tiles = _block_mask(heads, tokens, density, device)
    return tiles.repeat_interleave(_BLOCK, 2).repeat_interleave(_BLOCK, 3)[:, :, :tokens, :tokens].contiguous()


@cache
def _flex(heads: int, tokens: int, density: float, device: torch.device):
    mask = _block_mask(heads, tokens, density, device)[0]

    def kept(b, h, i, j):
        return mask[h, i // _BLOCK, j // _BLOCK]

    block_mask = create_block_mask(kept, None, heads, tokens, tokens, device=device, BLOCK_SIZE=_BLOCK)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def attention_problem(
    heads: int, tokens: int, depth: int, density: float | None, dtype: torch.dtype, backward: bool = False
):
    """Attention of one sequence; density None: causal."""

    def make(device, seed):
        gen = generator(device, seed)
        shape = (1, heads, tokens, depth)
        q, k, v, do = (torch.randn(shape, generator=gen, device=device).to(dtype) for _ in range(4))
        layout = _layout(heads, tokens, density, device)
        if density is None:
            options, pairs = dict(is_causal=True), heads * tokens * (tokens + 1) / 2
        else:
            mask = _dense_mask(heads, tokens, density, device)
            options, pairs = dict(attn_mask=mask), float(mask.sum())

        def dense(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, **options)

        def run(attention, inputs=(q, k, v)):
            if not backward:
                with torch.no_grad():
                    return (attention(*inputs),)
            leaves = [t.detach().requires_grad_() for t in inputs]
            o = attention(*leaves)
            return (o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype)))

        error = compare_with(cache(lambda: run(dense, [t.double() for t in (q, k, v)])), dtype)
        # 2 products forward and 5 backward; the least traffic is every tensor once
        flops, moved = 4.0 * depth * pairs * (3.5 if backward else 1), nbytes(q, k, v, q) * (3 if backward else 1)
        dense_flops = 4.0 * depth * heads * tokens**2 * (3.5 if backward else 1) if density is not None else flops
        providers = {
            OURS: Provider(lambda: run(lambda *x: attend(*x, layout)), error, flops, moved),
            DENSE: Provider(lambda: run(dense), error, dense_flops, moved),
        }
        if density is not None:
            found = _NO_FLEX_BACKWARD if backward and device.type == "cpu" else None
            compiled = None if found else _flex(heads, tokens, density, device)
            providers[FLEX] = found or Provider(lambda: run(compiled), error, flops, moved)
        return providers

    return make


def layout_problem(heads: int, tokens: int, depth: int, density: float):
    """Building the layout from a block mask; the baseline is the attention that uses it once."""

    def make(device, seed):
        gen = generator(device, seed)
        q, k, v = (torch.randn(1, heads, tokens, depth, generator=gen, device=device) for _ in range(3))
        mask, layout = _block_mask(heads, tokens, density, device), _layout(heads, tokens, density, device)
        dense = _dense_mask(heads, tokens, density, device)
        kept = int(mask.sum())

        def build():
            return BlockRows.from_block_mask(mask, _BLOCK, _BLOCK, tokens, tokens).arguments()[:4]

        def error(result) -> float:
            ptr, cnt, nmask, idx = (t.flatten().long() for t in result)
            row = torch.arange(len(ptr), device=device).repeat_interleave(cnt)
            listed = idx[ptr[row] + torch.arange(len(row), device=device) - (cnt.cumsum(0) - cnt)[row]]
            want = mask.flatten(0, 2).nonzero()
            right = torch.equal(torch.stack([row, listed], 1), want) and not nmask.any()
            return 0.0 if right else float("inf")

        def expected():
            return (F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=dense),)

        flops = 4.0 * depth * kept * _BLOCK**2
        return {
            OURS: Provider(build, error, float(mask.numel()), nbytes(mask) + 4.0 * kept),
            ATTENTION: Provider(
                lambda: attend(q, k, v, layout), compare_with(cache(expected), torch.float32), flops, nbytes(q, k, v, q)
            ),
        }

    return make


def cases() -> list[Case]:
    """All cases of the family."""
    heads, tokens, sparse = 2, 4096, 0.1
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        full = dtype == torch.float32
        for depth in (64, 128):
            shape = f"H={heads} S={tokens} D={depth}"
            goals = {
                ("causal", False): (Target(DENSE, 1 / 1.15),),
                ("10 % of tiles", False): (Target(DENSE, 7.0), Target(FLEX, 1.5)),
                ("10 % of tiles", True): (Target(DENSE, 6.0),),
            }
            for name, density in (("causal", None), ("10 % of tiles", sparse)):
                for backward in (False, True):
                    found.append(
                        Case(
                            "attention",
                            f"{name} fwd+bwd" if backward else name,
                            shape,
                            dtype,
                            attention_problem(heads, tokens, depth, density, dtype, backward),
                            targets=goals.get((name, backward), ()) if full else (),
                            quick=full and depth == 64 and backward == (density is not None),
                        )
                    )
    found.append(
        Case(
            "attention",
            "layout_from_block_mask",
            f"H=8 S={tokens} 10 %",
            torch.float32,
            layout_problem(8, tokens, 64, sparse),
            baseline=ATTENTION,
            targets=(Target(ATTENTION, 50.0),),
        )
    )
    return found
