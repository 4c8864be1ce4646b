"""Attention over a layout."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BlockRows

_ops = torch.ops.slkernels


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockRows,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o = softmax(scale q k^T) v over the pairs that ``layout`` keeps.

    Args:
        q: [B, Hq, Sq, Dk]; k: [B, Hkv, Sk, Dk]; v: [B, Hkv, Sk, Dv]. Hq is a multiple of Hkv. Transposed views of
            [B, S, H, D] are taken as they are.
        layout: B' is 1 or B, Hm is 1, Hkv or Hq; see :class:`BlockRows`.
        scale: default 1 / sqrt(Dk). softcap: c > 0 replaces the scaled scores s by c tanh(s / c) (Gemma 2, arXiv
            2408.00118, section 2).
        return_lse: return (o, lse) with lse [B, Hq, Sq] float32, the logarithm of each query's softmax denominator. It
            is differentiable, and what :func:`merge_attention_states` needs.

    Returns:
        o [B, Hq, Sq, Dv] in q's dtype. A query that sees nothing has o = 0 and lse = -inf.

    Raises:
        ValueError: the layout's sizes are not those of q and k; gradients asked of a layout that is forward only.
        RuntimeError: shapes or dtypes that do not fit.
    """
    if (q.shape[-2], k.shape[-2]) != (layout.sq, layout.sk):
        raise ValueError(
            f"the layout is for {layout.sq} queries and {layout.sk} keys, got {q.shape[-2]} and {k.shape[-2]}"
        )
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if backward and not layout.trainable:
        raise ValueError("a layout with unit 1 or single columns is forward only: detach q, k and v, or use no_grad")
    o, lse = _ops.block_sparse_attention(q, k, v, *layout.arguments(backward), scale, softcap)
    return (o, lse) if return_lse else o
