"""Every named pattern against the mask that its source describes, written here pair by pair from that description."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from slkernels.attention import BlockRows, attend, patterns
from test_attention_layout import decode
from torch import Tensor

BLOCKS = [(64, 64), (128, 128), (64, 128), (128, 64)]


def mask_of(sq: int, sk: int, keep) -> Tensor:
    """[sq, sk] from a rule for one query (at position i of sk) and one key."""
    return torch.tensor([[bool(keep(i + sk - sq, j)) for j in range(sk)] for i in range(sq)]).view(sq, sk)


def assert_mask(layout: BlockRows, mask: Tensor) -> None:
    got = decode(layout.check())
    want = mask.expand(got.shape) if mask.dim() == 2 else mask
    assert torch.equal(got, want), f"first difference at {(got != want).nonzero()[0].tolist()}"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense attention with a mask, as the textbook has it; a query that sees nothing gives 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def assert_attends(q: Tensor, k: Tensor, v: Tensor, layout: BlockRows, mask: Tensor) -> None:
    """attend follows the mask, and a mask that drops something changes the result."""
    got = attend(q, k, v, layout)
    torch.testing.assert_close(got, attention(q, k, v, mask), rtol=1e-4, atol=1e-5)
    dense = attention(q, k, v, torch.ones_like(mask))
    assert mask.all() or (got - dense).abs().max() > 1e-2


def qkv(sq: int, sk: int, heads: int = 2, kv_heads: int = 1, depth: int = 64, batch: int = 1):
    return [torch.randn(batch, h, s, depth) for h, s in ((heads, sq), (kv_heads, sk), (kv_heads, sk))]


# ---- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (129, 129), (200, 200), (1, 150), (70, 200)])
def test_causal_window_and_a_shape(sq, sk, block_m, block_n, device) -> None:
    sizes = {"sk": sk, "block_m": block_m, "block_n": block_n, "device": device}
    assert_mask(patterns.causal(sq, **sizes), mask_of(sq, sk, lambda i, j: j <= i))
    for window in (1, 64, 100):
        layout = patterns.sliding_window(sq, window, **sizes)
        assert_mask(layout, mask_of(sq, sk, lambda i, j: i - window < j <= i))  # noqa: B023
        layout = patterns.a_shape(sq, 5, window, **sizes)
        assert_mask(layout, mask_of(sq, sk, lambda i, j: j <= i and (j < 5 or i - j < window)))  # noqa: B023


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize("stride", [1, 7, 64, 100])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (300, 300), (65, 270)])
def test_strided(sq, sk, stride, block_m, block_n, device) -> None:
    """A(1) = {t, t + 1, ..., i}, t = max(0, i - l), and A(2) = {j <= i: (i - j) mod l = 0}."""
    layout = patterns.strided(sq, stride, sk, block_m=block_m, block_n=block_n, device=device)

    def keep(i: int, j: int) -> bool:
        return j in range(max(0, i - stride), i + 1) or (j <= i and (i - j) % stride == 0)

    assert_mask(layout, mask_of(sq, sk, keep))


def test_strided_shares_bitmaps() -> None:
    layout = patterns.strided(1024, 96, block_m=64, block_n=64)
    assert len(layout.bits) < layout.row_nmask.sum() / 3


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize(("s", "length", "summary"), [(1, 128, 8), (300, 128, 8), (520, 256, 130), (300, 128, 128)])
def test_local_global(s, length, summary, block_m, block_n, device) -> None:
    """A(1) = {j: floor(j / l) = floor(i / l)}, A(2) = {j: j mod l in {t, ..., l}, t = l - c}, both causal."""
    layout = patterns.local_global(s, length, summary, block_m=block_m, block_n=block_n, device=device)

    def keep(i: int, j: int) -> bool:
        return j <= i and (j // length == i // length or j % length >= length - summary)

    assert_mask(layout, mask_of(s, s, keep))


# ---- queries and keys -----------------------------------------------------------------------------------------------


def peaked(s: int, heads: int, kv_heads: int, depth: int = 16) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(2, heads, s, depth), torch.randn(2, kv_heads, s, depth)


@pytest.mark.parametrize("s", [50, 130, 321])
def test_vertical_slash(s, device) -> None:
    """Algorithm 2: A = softmax(Q[-last:] K^T / sqrt(d) + causal); the top columns by sum over queries, the top
    diagonals by sum along them; then the index of the chosen."""
    from test_attention_layout import vertical_slash_mask

    q, k = peaked(s, 4, 2)
    layout = patterns.vertical_slash(q.to(device), k.to(device), 12, 3, last_q=16, first=2, recent=1)
    want = torch.zeros(2, 4, s, s, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            scores = q[b, h] @ k[b, h // 2].T / q.shape[-1] ** 0.5
            column, diagonal = [0.0] * s, [0.0] * s
            for i in range(s - 16, s):
                p = scores[i, : i + 1].softmax(0)
                for j in range(i + 1):
                    column[j] += float(p[j])
                    diagonal[i - j] += float(p[j])
            column[:2], diagonal[:1] = [torch.inf] * 2, [torch.inf]
            vertical = sorted(range(s), key=lambda j: -column[j])[:12]
            slash = sorted(range(s), key=lambda d: -diagonal[d])[:3]
            want[b, h] = vertical_slash_mask(sorted(vertical), slash, s, 64)
    assert_mask(layout, want)


@pytest.mark.parametrize("s", [50, 128, 500])
def test_block_sparse(s, device) -> None:
    """Algorithm 3: mean-pool Q and K by blocks, scores of the causal pairs of blocks, the top-k of each row."""
    q, k = peaked(s, 4, 2)
    layout = patterns.block_sparse(q.to(device), k.to(device), 3)
    want = torch.zeros(2, 4, s, s, dtype=torch.bool)
    blocks = range(0, s, 64)
    for b in range(2):
        for h in range(4):
            for i in blocks:
                query = q[b, h, i : i + 64].mean(0)
                score = {j: float(query @ k[b, h // 2, j : j + 64].mean(0)) for j in blocks if j <= i}
                for j in sorted(score, key=lambda j: -score[j])[:3]:
                    want[b, h, i : i + 64, j : j + 64] = True
    assert_mask(layout, want & mask_of(s, s, lambda i, j: j <= i))


@pytest.mark.parametrize(("sq", "sk"), [(40, 40), (700, 700), (100, 1000), (1, 900)])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_hip(sq, sk, topk, device) -> None:
    """Cut what is seen into 2k ranges; score each by its centre token; keep k, halve them; until ranges are blocks."""
    q, k = peaked(sq, 2, 1)
    k = torch.randn(2, 1, sk, 16)
    layout = patterns.hip(q.to(device), k.to(device), topk, block_m=64, block_n=64)
    want = torch.zeros(2, 2, sq, sk, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            for first in range(0, sq, 64):
                queries = q[b, h, first : first + 64]
                seen = min(first + 64, sq) + sk - sq
                blocks = -(-seen // 64)

                def score(r: tuple[int, int], queries=queries, seen=seen, b=b) -> float:
                    centre = (r[0] * 64 + min(r[1] * 64, seen)) // 2
                    return float((queries @ k[b, 0, centre]).max())

                cuts = [n * blocks // (2 * topk) for n in range(2 * topk + 1)]
                ranges = [(a, e) for a, e in pairwise(cuts) if a < e]
                while True:
                    ranges = sorted(ranges, key=score, reverse=True)[:topk]
                    if all(e - a == 1 for a, e in ranges):
                        break
                    halves = [((a, (a + e + 1) // 2), ((a + e + 1) // 2, e)) for a, e in ranges]
                    ranges = [r for pair in halves for r in pair if r[0] < r[1]]
                for j in {a for a, _ in ranges} | {0, blocks - 1}:
                    want[b, h, first : first + 64, j * 64 : (j + 1) * 64] = True
    assert_mask(layout, want & mask_of(sq, sk, lambda i, j: j <= i))


def test_estimators_find_what_is_there() -> None:
    """Keys around one that all queries look for are columns, and its block is chosen by block_sparse and hip."""
    s, at = 640, 200
    q, k = torch.randn(1, 1, s, 32) * 0.01, torch.randn(1, 1, s, 32) * 0.01
    direction = torch.randn(32)
    q += direction
    k += direction * (1 - (torch.arange(s) - at).abs() / 500)[:, None]
    for layout in (
        patterns.vertical_slash(q, k, 64, 2, first=0, recent=1),
        patterns.block_sparse(q, k, 1),
        patterns.hip(q, k, 1, sink=0, recent=0),
    ):
        assert layout.to_dense()[0, 0, -64:, at].all() and not layout.to_dense()[0, 0, -64:, at + 64].any()


# ---- inputs with a structure of their own ---------------------------------------------------------------------------


def test_lambda_attention() -> None:
    """LM-Infinite: token i attends to j <= i with i - j < n_local, at their own distance, and to the first n_global
    tokens, at a distance of at most the limit; one softmax over both."""
    s, n_global, n_local, depth = 300, 10, 70, 64
    q, k, v = qkv(s, s, kv_heads=2)
    q_far, k_far, _ = qkv(s, s, kv_heads=2)
    near, far = (patterns.lambda_mask(s, n_global, n_local)[n] for n in range(2))
    near_mask = mask_of(s, s, lambda i, j: 0 <= i - j < n_local)
    far_mask = mask_of(s, s, lambda i, j: i - j >= n_local and j < n_global)
    assert_mask(near, near_mask)
    assert_mask(far, far_mask)
    scores = torch.where(near_mask, q @ k.mT, q_far @ k_far.mT) * depth**-0.5
    want = scores.masked_fill(~(near_mask | far_mask), -torch.inf).softmax(-1) @ v
    got = patterns.lambda_attention(q, k, v, q_far, k_far, n_global, n_local)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [100, 30, 70, 1, 64, 65, 99], [20] * 7])
def test_packed(lengths) -> None:
    """Each prompt, wherever it was packed, computes what it computes alone."""
    packing = patterns.packed(lengths)
    assert sorted(p for b in packing.bins for p in b) == list(range(len(lengths)))
    capacity = max(lengths)
    assert all(sum(lengths[p] for p in b) <= capacity for b in packing.bins)
    rows = [[] for _ in packing.bins]  # (prompt, position) of every place
    for row, prompts in zip(rows, packing.bins, strict=True):
        row += [(p, n) for p in prompts for n in range(lengths[p])]
    mask = torch.zeros(len(rows), 1, capacity, capacity, dtype=torch.bool)
    for b, row in enumerate(rows):
        assert packing.position_ids[b].tolist() == [n for _, n in row] + [0] * (capacity - len(row))
        for i, (p, n) in enumerate(row):
            mask[b, 0, i, : len(row)] = torch.tensor([p == p2 and n2 <= n for p2, n2 in row])
    assert_mask(packing.layout, mask)
    for p, (row, at) in enumerate(packing.last.tolist()):
        assert rows[row][at] == (p, lengths[p] - 1)


def test_packed_by_first_fit_decreasing_is_dense() -> None:
    packing = patterns.packed([60, 50, 40, 30, 20], capacity=100)
    assert packing.bins == [[0, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 10\]"):
        patterns.packed([3, 11], capacity=10)


def test_token_tree() -> None:
    """A tree of nine nodes: every path from the root, run by itself as a plain causal sequence, gives the nodes'
    outputs."""
    parent = [-1, 0, 0, 1, 1, 2, 3, 6, -1]
    prefix, nodes = 100, len(parent)
    q, k, v = qkv(nodes, prefix + nodes, heads=4, kv_heads=2)
    layout = patterns.token_tree(torch.tensor([parent]), prefix)
    got = attend(q, k, v, layout)
    for leaf in range(nodes):
        path, node = [], leaf
        while node >= 0:
            path.insert(0, node)
            node = parent[node]
        keys = [*range(prefix), *(prefix + n for n in path)]
        seen = torch.ones(1, 1, 1, len(keys), dtype=torch.bool)
        want = attention(q[:, :, leaf : leaf + 1], k[:, :, keys], v[:, :, keys], seen)
        torch.testing.assert_close(got[:, :, leaf : leaf + 1], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sk is needed"):
        patterns.token_tree(torch.tensor([parent]), torch.tensor([prefix]))


def test_graph(device) -> None:
    """Equation 5 of GraphCodeBERT: (i, j) is kept if i is special; or both are code (the paper's words are all
    connected); or one is a variable and the other a code token that it is identified from; or an edge j -> i of the
    data flow."""
    s, tokens = 150, [90, 40]
    special = [[0, 89], [0, 20, 39]]
    spans = [[(3, 5), (7, 8), (60, 70)], [(1, 2), (5, 5)]]
    edges = [[[], [0], [0, 1, 2]], [[1], []]]
    layout = patterns.graph(tokens, spans, edges, special, s, device=device)
    mask = torch.zeros(2, 1, s, s, dtype=torch.bool)
    for b in range(2):
        count, end = tokens[b], tokens[b] + len(spans[b])
        for i in range(end):
            for j in range(end):
                if i in special[b] or (i < count and j < count):
                    keep = True
                elif i >= count and j < count:
                    keep = spans[b][i - count][0] <= j < spans[b][i - count][1]
                elif i < count:
                    keep = spans[b][j - count][0] <= i < spans[b][j - count][1]
                else:
                    keep = j - count in edges[b][i - count]
                mask[b, 0, i, j] = keep
    assert_mask(layout, mask)
    with pytest.raises(ValueError, match="span"):
        patterns.graph([4], [[(2, 5)]], [[[]]], [[0]], 10)
    with pytest.raises(ValueError, match="do not fit in 5"):
        patterns.graph([4], [[(2, 3), (1, 2)]], [[[], []]], [[0]], 5)


@pytest.mark.parametrize(("s", "chunk", "retrieved"), [(12, 4, 3), (256, 64, 128), (260, 20, 50)])
def test_chunked_cross(s, chunk, retrieved, device) -> None:
    """RETRO, counted from 1: the attending chunk H_u+ = (h_{um+i-1}), i in [1, m], attends to E_u; the last token to
    the last set; h_1 .. h_{m-1} to nothing."""
    chunks = s // chunk
    mask = torch.zeros(s, chunks * retrieved, dtype=torch.bool)
    for u in range(1, chunks + 1):
        for i in range(1, chunk + 1):
            token = u * chunk + i - 1
            if token <= s:
                mask[token - 1, (u - 1) * retrieved : u * retrieved] = True
    assert_mask(patterns.chunked_cross(s, chunk, retrieved, device=device), mask)


def test_latent() -> None:
    """Multi-head latent attention: scores are the sum of a product of the unrotated and of the rotated parts, whose
    key is shared by the heads."""
    s = 200
    q_nope, k_nope, v = (torch.randn(1, 2, s, 128) for _ in range(3))
    q_rope, k_rope = torch.randn(1, 2, s, 64), torch.randn(1, 1, s, 64)
    q, k, layout = patterns.latent(q_nope, q_rope, k_nope, k_rope)
    scores = (q_nope @ k_nope.mT + q_rope @ k_rope.mT) / 192**0.5
    want = scores.masked_fill(~mask_of(s, s, lambda i, j: j <= i), -torch.inf).softmax(-1) @ v
    got = attend(q, k, v, layout)
    assert got.shape == (1, 2, s, 128)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- attention over each --------------------------------------------------------------------------------------------

NAMED = {
    "causal": {},
    "sliding_window": {"window": 50},
    "a_shape": {"sink": 10, "window": 50},
    "strided": {"stride": 60},
    "local_global": {"length": 128, "summary": 16},
    "vertical_slash": {"vertical_size": 20, "slash_size": 2, "recent": 1, "first": 5},
    "block_sparse": {"topk": 2},
    "hip": {"topk": 1},
}


@pytest.mark.parametrize("name", NAMED)
def test_attend_by_name(name) -> None:
    assert set(NAMED) == set(patterns.NAMES)
    q, k, v = qkv(330, 330, heads=4, kv_heads=2)
    layout = patterns.build(name, q, k, **NAMED[name])
    assert_attends(q, k, v, layout, decode(layout))
    if name in ("vertical_slash", "block_sparse", "hip"):
        assert layout.shape[1] == 4
    else:
        assert patterns.build(name, q, k, **NAMED[name]) is layout  # built once


def test_a_layout_built_for_inference_serves_training() -> None:
    q, k, v = qkv(140, 140)
    with torch.inference_mode():
        layout = patterns.build("sliding_window", q, k, window=41)
    assert patterns.build("sliding_window", q, k, window=41) is layout
    attend(q.requires_grad_(), k, v, layout).sum().backward()
    assert q.grad.abs().max() > 0


def test_build_errors() -> None:
    q, k, _ = qkv(10, 10)
    with pytest.raises(ValueError, match=r"pattern must be one of causal, sliding_window, .*, got 'diagonal'"):
        patterns.build("diagonal", q, k)
    with pytest.raises(TypeError, match="width"):
        patterns.build("sliding_window", q, k, width=3)
    with pytest.raises(ValueError, match="window must be at least 1"):
        patterns.build("sliding_window", q, k, window=0)
    for name in ("vertical_slash", "block_sparse", "local_global"):
        with pytest.raises(ValueError, match="as many queries as keys, got 9 and 10"):
            patterns.build(name, q[:, :, 1:], k, **NAMED[name])
    with pytest.raises(ValueError, match="length must be a multiple"):
        patterns.local_global(100, 100, 5)
    with pytest.raises(ValueError, match="summary must be in"):
        patterns.local_global(100, 128, 0)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        patterns.strided(100, 0)
