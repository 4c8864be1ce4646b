"""Multi-head attention over a block-sparse pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import BlockRows, attend, patterns

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class BlockSparseAttention(nn.Module):
    """Self-attention with grouped queries (arXiv 2305.13245) over a named pattern.

    Args:
        embed_dim: features of the input and the output.
        num_heads: query heads; num_kv_heads: key and value heads, a divisor of it (default num_heads).
        pattern: one of ``slkernels.attention.patterns.NAMES``; ``options``: the pattern's own arguments.
        head_dim: default embed_dim / num_heads.
        bias: biases in the projections. softcap: see :func:`slkernels.attention.attend`.
        device, dtype: of the parameters.

    State dict: those of ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` (``nn.Linear``; Llama's names).

    Raises:
        ValueError: sizes that do not divide, or no such pattern.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        pattern: str = "causal",
        options: dict[str, Any] | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        softcap: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if pattern not in patterns.NAMES:
            raise ValueError(f"pattern must be one of {', '.join(patterns.NAMES)}, got {pattern!r}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.pattern, self.options, self.softcap = pattern, dict(options or {}), softcap
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, **factory)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, **factory)

    def forward(self, x: Tensor, layout: BlockRows | None = None, rotate: Rotation | None = None) -> Tensor:
        """x [B, S, embed_dim] -> [B, S, embed_dim].

        Args:
            layout: in place of the pattern's. rotate: maps (q, k), both [B, heads, S, head_dim], to rotated ones.
        """
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotate is not None:
            q, k = rotate(q, k)
        if layout is None:
            layout = patterns.build(self.pattern, q, k, **self.options)
        o = attend(q, k, v, layout, softcap=self.softcap)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"pattern={self.pattern}{options}, head_dim={self.head_dim}"
