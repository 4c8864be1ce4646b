"""Published sparsity patterns by name, each as the :class:`BlockRows` (or the few calls) that it takes.

Positions alone decide ``causal``, ``sliding_window``, ``a_shape``, ``strided`` and ``local_global``; queries and keys
decide ``vertical_slash``, ``block_sparse`` and ``hip``; these eight are what :func:`build` knows by name. The others
describe inputs of their own: ``packed`` prompts, a ``token_tree``, a ``graph``, ``chunked_cross`` attention. Causal
patterns are aligned at the end: query i of sq stands at position i + sk - sq, so that they serve decoding with a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ._selection import block_sparse, hip, vertical_slash
from .attend import attend
from .builders import causal_bound
from .layout import BlockRows

__all__ = [
    "Packing",
    "a_shape",
    "block_sparse",
    "build",
    "causal",
    "chunked_cross",
    "graph",
    "hip",
    "lambda_attention",
    "lambda_mask",
    "latent",
    "local_global",
    "packed",
    "sliding_window",
    "strided",
    "token_tree",
    "vertical_slash",
]

_ops = torch.ops.slkernels
Device = torch.device | str | None


# ---- positions ------------------------------------------------------------------------------------------------------


def causal(
    sq: int, sk: int | None = None, *, block_m: int = 128, block_n: int = 128, device: Device = None
) -> BlockRows:
    """Query i sees the keys j <= i + sk - sq (Vaswani et al., arXiv 1706.03762, section 3.2.3)."""
    sk = sq if sk is None else sk
    return BlockRows.from_interval(None, causal_bound(sq, sk, device), block_m, block_n, sk)


def sliding_window(
    sq: int, window: int, sk: int | None = None, *, block_m: int = 128, block_n: int = 128, device: Device = None
) -> BlockRows:
    """The last ``window`` keys, the query's own among them (Mistral 7B, arXiv 2310.06825, section 2)."""
    return a_shape(sq, 0, window, sk, block_m=block_m, block_n=block_n, device=device)


def a_shape(
    sq: int,
    sink: int,
    window: int,
    sk: int | None = None,
    *,
    block_m: int = 128,
    block_n: int = 128,
    device: Device = None,
) -> BlockRows:
    """The first ``sink`` keys and the last ``window``, causal: MInference's A-shape head (arXiv 2407.02490, section
    3.2) and StreamingLLM's attention sinks (arXiv 2309.17453, section 3.2), positions left as they are."""
    if window < 1 or sink < 0:
        raise ValueError(f"window must be at least 1 and sink at least 0, got {window} and {sink}")
    sk = sq if sk is None else sk
    hi = causal_bound(sq, sk, device)
    return BlockRows.from_interval((hi - window).clamp(min=0), hi, block_m, block_n, sk, sink)


def _from_kinds(kinds: Tensor, bit_id: Tensor, bits: Tensor, hi: Tensor, block_m, block_n, sq, sk) -> BlockRows:
    """From a grid [q blocks, k blocks]: kinds 0 partial, 1 full, 2 not listed; bit_id of each tile, -1 for none."""
    order = kinds.sort(dim=1, stable=True).indices
    counts = [(kinds <= k).sum(1, dtype=torch.int32)[None, None] for k in (1, 0)]
    return BlockRows.from_padded(
        order.to(torch.int32)[None, None],
        counts[0],
        block_m,
        block_n,
        sq,
        sk,
        row_nmask=counts[1],
        hi=hi,
        bits=bits,
        bit_id=bit_id.gather(1, order).to(torch.int32).view(-1),
    )


def _bitmaps(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool [tiles, M, N]: the kind of each (0 partial, 1 full, 2 empty), and bitmaps [tiles, M, N / 32], of which
    those of partial tiles are written."""
    masks = tiles[:, None]
    _, count, partial, _, bits, _ = _ops.layout_from_dense_mask(masks, *tiles.shape[1:])
    return (2 - count - partial).flatten(), bits


def strided(
    sq: int, stride: int, sk: int | None = None, *, block_m: int = 128, block_n: int = 128, device: Device = None
) -> BlockRows:
    """The Sparse Transformer's strided pattern (arXiv 1904.10509, section 4.3), both heads' sets in one: i - j <=
    stride (the local set, max(0, i - stride) to i) or (i - j) mod stride == 0. The mask depends on i - j alone, so
    tiles at the same distance from the diagonal share one bitmap."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    sk = sq if sk is None else sk
    q_blocks, k_blocks = -(-sq // block_m), -(-sk // block_n)
    # Tiles at distance first + n step from the diagonal (of their first query and key), n < count, and where each is.
    step, first = gcd(block_m, block_n), sk - sq - (k_blocks - 1) * block_n
    count = ((q_blocks - 1) * block_m + (k_blocks - 1) * block_n) // step + 1
    rows = torch.arange(q_blocks, device=device)[:, None] * block_m
    tile = (rows + torch.arange(k_blocks - 1, -1, -1, device=device) * block_n) // step
    # The rule for every i - j there is, laid out so that a tile is a window whose rows move by one.
    length = (count - 1) * step + block_m + block_n - 1
    d = torch.arange(length, device=device) + (first - block_n + 1)
    keep = (d >= 0) & ((d <= stride) | (d % stride == 0))
    kind, bits = _bitmaps(keep.as_strided((count, block_m, block_n), (step, 1, 1)).flip(-1))
    kind = kind[tile]
    hi = causal_bound(sq, sk, device)
    return _from_kinds(kind, torch.where(kind == 0, tile, -1), bits, hi, block_m, block_n, sq, sk)


def local_global(
    s: int, length: int, summary: int, *, block_m: int = 128, block_n: int = 128, device: Device = None
) -> BlockRows:
    """The Sparse Transformer's fixed pattern (arXiv 1904.10509, section 4.3), both heads' sets in one: causal; the
    query's own stretch of ``length`` tokens, and the last ``summary`` tokens of every earlier stretch.

    Raises:
        ValueError: length is no multiple of the block sizes (then: ``BlockRows.from_dense_mask``), or summary is not in
            [1, length].
    """
    if length % block_m or length % block_n:
        raise ValueError(f"length must be a multiple of the blocks, {block_m} and {block_n}, got {length}")
    if not 1 <= summary <= length:
        raise ValueError(f"summary must be in [1, {length}], got {summary}")
    q0 = torch.arange(-(-s // block_m), device=device)[:, None] * block_m
    k0 = torch.arange(-(-s // block_n), device=device)[None] * block_n
    column = torch.arange(length, device=device).view(-1, block_n) >= length - summary  # [tiles of a stretch, N]
    of_tile = (k0 // block_n % (length // block_n)).expand(len(q0), -1)
    local = q0 // length == k0 // length
    kind, bits = _bitmaps(column[:, None].expand(-1, block_m, -1))
    earlier = kind[of_tile]
    cut = torch.where(k0 + block_n - 1 <= q0, 1, torch.where(k0 <= q0 + block_m - 1, 0, 2))
    kind = torch.where(local, cut, torch.where(k0 < q0, earlier, 2))
    bit_id = torch.where((kind == 0) & ~local, of_tile, -1)
    return _from_kinds(kind, bit_id, bits, causal_bound(s, s, device), block_m, block_n, s, s)


# ---- LM-Infinite ----------------------------------------------------------------------------------------------------


def lambda_mask(
    s: int, n_global: int, n_local: int, *, block_m: int = 128, block_n: int = 128, device: Device = None
) -> tuple[BlockRows, BlockRows]:
    """LM-Infinite's Lambda-shaped mask (arXiv 2308.16137, section 4.2) as two disjoint layouts, because its branches
    have different logits: (local) distances i - j < n_local; (far) the first ``n_global`` keys at larger distances."""
    hi = causal_bound(s, s, device)
    low = (hi - n_local).clamp(min=0)
    local = BlockRows.from_interval(low, hi, block_m, block_n, s)
    return local, BlockRows.from_interval(None, low.clamp(max=n_global), block_m, block_n, s)


def lambda_attention(
    q: Tensor, k: Tensor, v: Tensor, q_far: Tensor, k_far: Tensor, n_global: int, n_local: int, scale=None
) -> Tensor:
    """LM-Infinite attention: two calls, merged by their log-sum-exp.

    Args:
        q, k, v: [B, H, S, D], rotated as usual, for distances below ``n_local``.
        q_far, k_far: for the first ``n_global`` keys behind that: k_far unrotated, q_far rotated at the distance limit
            (arXiv 2308.16137, section 4.2), so that no distance beyond it occurs.
    """
    local, far = lambda_mask(q.shape[2], n_global, n_local, device=q.device)
    near_o, near_lse = attend(q, k, v, local, scale, return_lse=True)
    far_o, far_lse = attend(q_far, k_far, v, far, scale, return_lse=True)
    return _ops.merge_attention_states(near_o, near_lse, far_o, far_lse)[0]


# ---- inputs with a structure of their own ---------------------------------------------------------------------------


class Packing(NamedTuple):
    """Prompts packed into rows: ``bins[b]`` lists the prompts of row b in order; ``position_ids`` int64 [B, S] restart
    at every prompt (0 in the padding); ``last`` int64 [prompts, 2] is (row, position) of each prompt's last token."""

    layout: BlockRows
    bins: list[list[int]]
    position_ids: Tensor
    last: Tensor


def packed(
    lengths: Sequence[int],
    capacity: int | None = None,
    *,
    block_m: int = 128,
    block_n: int = 128,
    device: Device = None,
) -> Packing:
    """Prepacking (arXiv 2404.09529, section 3.2): prompts of different lengths share rows of ``capacity`` tokens
    (default the longest prompt), by first-fit decreasing; each sees only itself, causally, at positions from 0. The
    padding at the end of a row sees nothing."""
    capacity = max(lengths, default=0) if capacity is None else capacity
    if any(not 0 < n <= capacity for n in lengths):
        raise ValueError(f"lengths must be in [1, {capacity}], got {list(lengths)}")
    bins: list[list[int]] = []
    room: list[int] = []
    for prompt in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        row = next((b for b, free in enumerate(room) if free >= lengths[prompt]), len(bins))
        if row == len(bins):
            bins.append([])
            room.append(capacity)
        bins[row].append(prompt)
        room[row] -= lengths[prompt]
    lo, hi, position = (torch.zeros(len(bins), capacity, dtype=torch.int64) for _ in range(3))
    last = torch.zeros(len(lengths), 2, dtype=torch.int64)
    for row, prompts in enumerate(bins):
        at = 0
        for prompt in prompts:
            here = slice(at, at + lengths[prompt])
            position[row, here] = torch.arange(lengths[prompt])
            lo[row, here], hi[row, here] = at, torch.arange(here.start, here.stop) + 1
            at = here.stop
            last[prompt] = torch.tensor([row, at - 1])
    bounds = (t.to(device=device, dtype=torch.int32)[:, None] for t in (lo, hi))
    layout = BlockRows.from_interval(*bounds, block_m, block_n, capacity)
    return Packing(layout, bins, position.to(device), last.to(device))


def token_tree(
    parent: Tensor, prefix: Tensor | int, sk: int | None = None, *, block_m: int = 64, block_n: int = 64
) -> BlockRows:
    """A tree of draft tokens behind a cached prefix, verified in one pass: each node sees the prefix, its ancestors and
    itself (DySpec, arXiv 2410.11744, section 4; ADED, arXiv 2407.12021; the tree mask of SpecInfer, arXiv 2305.09781).

    Args:
        parent: int [B', nodes], -1 for a root, parents before children. prefix: cached keys, int or [B'].
        sk: keys; default prefix + nodes (needs an int prefix).
    """
    if sk is None:
        if not isinstance(prefix, int):
            raise ValueError("sk is needed where every batch has a prefix of its own")
        sk = prefix + parent.shape[1]
    return BlockRows.from_tree(parent, prefix, block_m, block_n, sk)


def graph(
    tokens: Sequence[int],
    spans: Sequence[Sequence[tuple[int, int]]],
    edges: Sequence[Sequence[Sequence[int]]],
    special: Sequence[Sequence[int]],
    s: int,
    *,
    block_m: int = 64,
    block_n: int = 64,
    device: Device = None,
) -> BlockRows:
    """GraphCodeBERT's graph-guided masked attention (arXiv 2009.08366, section 4.2), bidirectional, one mask a batch.

    Row b holds ``tokens[b]`` code tokens (with [CLS] and [SEP]) at 0.., then its variables at ``tokens[b]``.., padding
    up to s. Code tokens see each other; variable n sees the code tokens of ``spans[b][n]`` = (first, end), which see
    it, and the variables ``edges[b][n]``, from which its value comes; ``special[b]`` (positions of [CLS], [SEP]) see
    everything but the padding.

    Raises:
        ValueError: more than s positions, or a span outside of the code.
    """
    mask = torch.zeros(len(tokens), s, s, dtype=torch.bool)
    for b, count in enumerate(tokens):
        nodes = len(spans[b])
        if count + nodes > s:
            raise ValueError(f"row {b}: {count} tokens and {nodes} variables do not fit in {s}")
        mask[b, :count, :count] = True
        mask[b, list(special[b]), : count + nodes] = True
        for n, (first, end) in enumerate(spans[b]):
            if not 0 <= first <= end <= count:
                raise ValueError(f"row {b}: span {(first, end)} of variable {n} is outside the {count} code tokens")
            mask[b, count + n, first:end] = True
            mask[b, first:end, count + n] = True
            mask[b, count + n, [count + source for source in edges[b][n]]] = True
    return BlockRows.from_dense_mask(mask[:, None].to(device), block_m, block_n)


def chunked_cross(
    sq: int, chunk: int, retrieved: int, *, block_m: int = 128, block_n: int = 128, device: Device = None
) -> BlockRows:
    """RETRO's chunked cross-attention (arXiv 2112.04426, section 2.4): the keys are the encoded neighbours of every
    chunk of ``chunk`` tokens, ``retrieved`` a chunk (neighbours x their length), laid end to end. Token i sees the
    neighbours of chunk floor((i + 1) / chunk) - 1: those of the last chunk that ends at or before it. The first chunk -
    1 tokens see none (o = 0)."""
    seen = (torch.arange(sq, dtype=torch.int32, device=device) + 1) // chunk
    hi = (seen * retrieved).view(1, 1, sq)
    return BlockRows.from_interval((hi - retrieved).clamp(min=0), hi, block_m, block_n, sq // chunk * retrieved)


def latent(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, *, block_m: int = 128, block_n: int = 128
) -> tuple[Tensor, Tensor, BlockRows]:
    """Prefill of multi-head latent attention (TransMLA, arXiv 2502.07864, section 3; DeepSeek-V2, arXiv 2405.04434,
    section 2.1.3): (q, k, causal layout) with Dk = 128 + 64 and values of Dv = 128, which ``attend`` takes as they are.

    Args:
        q_nope [B, H, Sq, 128] and q_rope [B, H, Sq, 64]; k_nope [B, H, Sk, 128]; k_rope [B, 1, Sk, 64], shared by
        heads.
    """
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), -1)
    return q, k, causal(q.shape[2], k.shape[2], block_m=block_m, block_n=block_n, device=q.device)


# ---- by name --------------------------------------------------------------------------------------------------------

_BY_POSITION: dict[str, Callable[..., BlockRows]] = {
    "causal": causal,
    "sliding_window": sliding_window,
    "a_shape": a_shape,
    "strided": strided,
    "local_global": local_global,
}
_BY_CONTENT: dict[str, Callable[..., BlockRows]] = {
    "vertical_slash": vertical_slash,
    "block_sparse": block_sparse,
    "hip": hip,
}
NAMES = (*_BY_POSITION, *_BY_CONTENT)
# Not for queries behind a cache.
PROMPTS_ONLY = ("vertical_slash", "block_sparse", "local_global")


_built: OrderedDict[tuple, BlockRows] = OrderedDict()
_KEPT = 64


def _by_position(name: str, sq: int, sk: int, device: torch.device, options: dict) -> BlockRows:
    if name != "local_global":
        return _BY_POSITION[name](sq, sk=sk, device=device, **options)
    if sq != sk:
        raise ValueError(f"local_global needs as many queries as keys, got {sq} and {sk}")
    return local_global(sq, device=device, **options)


def build(name: str, q: Tensor, k: Tensor, **options) -> BlockRows:
    """The pattern ``name`` for q [B, Hq, Sq, Dk] and k [B, Hkv, Sk, Dk]; ``options`` are the pattern's own. Layouts
    that positions alone decide are built once for each size and kept (the last 64), with their transposes.

    Raises:
        ValueError: no such name, or sizes that the pattern does not serve. TypeError: an option that it does not have.
    """
    if name in _BY_CONTENT:
        return _BY_CONTENT[name](q.detach(), k.detach(), **options)
    if name not in _BY_POSITION:
        raise ValueError(f"pattern must be one of {', '.join(NAMES)}, got {name!r}")
    what = (name, q.shape[2], k.shape[2], q.device)
    if torch.compiler.is_compiling():  # a graph has its own inputs
        return _by_position(*what, options)
    key = (*what, *sorted(options.items()))
    if key not in _built:
        with torch.inference_mode(False):  # training may use it later
            _built[key] = _by_position(*what, options)
        if len(_built) > _KEPT:
            _built.popitem(last=False)
    _built.move_to_end(key)
    return _built[key]
