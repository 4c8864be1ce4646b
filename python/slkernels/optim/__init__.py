"""Optimizers with quantized state: :class:`AdamW8bit`, :func:`per_layer`, and the ops below them."""

from .adam import AdamW8bit
from .clip import clip_coef, global_norm_sq, grad_norm_sq
from .ops import adam_q_, adam_q_dir_, ademamix_q_, dequantize_block, momentum_q_, quantize_block
from .per_layer import PerLayerOptimizer, per_layer

__all__ = [
    "AdamW8bit",
    "PerLayerOptimizer",
    "adam_q_",
    "adam_q_dir_",
    "ademamix_q_",
    "clip_coef",
    "dequantize_block",
    "global_norm_sq",
    "grad_norm_sq",
    "momentum_q_",
    "per_layer",
    "quantize_block",
]
