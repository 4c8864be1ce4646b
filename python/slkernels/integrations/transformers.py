"""Block-sparse attention as an ``attn_implementation`` of Hugging Face transformers (5.0 or newer)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import attend, patterns

# Arguments with which a model asks for what the kernels do not do. (The names are those of the models' forward.)
_UNSUPPORTED = ("head_mask", "position_bias", "s_aux", "cache", "block_table", "cu_seq_lens_q", "cu_seq_lens_k")


def register_attention(pattern: str = "causal", name: str | None = None, **options: Any) -> str:
    """Register a pattern as an attention implementation, for training and generation::

        name = register_attention("sliding_window", window=1024)
        model = LlamaForCausalLM.from_pretrained(..., attn_implementation=name)

    Args:
        pattern: one of ``slkernels.attention.patterns.NAMES``; ``options`` are the pattern's own.
        name: to register under; default "slkernels_<pattern>". A name that is taken is replaced.

    Returns:
        The name.

    Queries behind a cache, single tokens say, are served by the same pattern, except for those that are for whole
    prompts (``patterns.PROMPTS_ONLY``): after the prompt these attend densely, as in MInference.

    Raises:
        ValueError: no such pattern. Models that run with it raise NotImplementedError for what would change the mask or
            the result and is not served: padding or 4-D masks, masks that are not causal (packed sequences, the model's
            own sliding window), static caches, attention dropout, attention weights as a result.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if pattern not in patterns.NAMES:
        raise ValueError(f"pattern must be one of {', '.join(patterns.NAMES)}, got {pattern!r}")
    name = name or f"slkernels_{pattern}"

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        _refuse(name, module, attention_mask, dropout, others)
        decoding = query.shape[2] != key.shape[2]
        if decoding and pattern in patterns.PROMPTS_ONLY:
            layout = patterns.build("causal", query, key)
        else:
            layout = patterns.build(pattern, query, key, **options)
        o = attend(query, key, value, layout, scaling, softcap or 0.0)
        return o.transpose(1, 2).contiguous(), None

    def mask(*args: Any, **kwargs: Any) -> None:
        return _check_mask(name, *args, **kwargs)

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)
    return name


def _refuse(name: str, module: torch.nn.Module, attention_mask: Tensor | None, dropout: float, others: dict) -> None:
    def no(what: str) -> NotImplementedError:
        return NotImplementedError(f"attention implementation {name}: {what}")

    if attention_mask is not None:
        raise no("no mask besides the pattern's; pass none, or ones for every token")
    if dropout:
        raise no(f"no dropout on attention weights, got {dropout}")
    if others.get("output_attentions"):
        raise no("the attention weights are never formed, so output_attentions must be False")
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise no("causal attention only")
    if others.get("sliding_window") is not None:
        raise no(
            f"the model's own sliding_window ({others['sliding_window']}) must be None: the pattern has the window"
        )
    for option in _UNSUPPORTED:
        if others.get(option) is not None:
            raise no(f"{option} is not supported")


def _check_mask(
    name: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> None:
    """In place of making a mask: refuse what a causal pattern cannot stand for."""
    from transformers.masking_utils import causal_mask_function

    if mask_function not in (None, causal_mask_function):
        raise NotImplementedError(
            f"attention implementation {name}: the model asks for a mask that is not plain causal (packed sequences, a "
            "sliding window of its own, bidirectional attention)"
        )
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_length or kv_offset:
        raise NotImplementedError(
            f"attention implementation {name}: needs a cache without empty places, not a static one"
        )
    if attention_mask is not None and not bool(attention_mask[:, :kv_length].all()):
        raise NotImplementedError(
            f"attention implementation {name}: padding is not supported: give sequences of one length, or pack them "
            "(slkernels.attention.patterns.packed)"
        )
