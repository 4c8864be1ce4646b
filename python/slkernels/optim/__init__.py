"""Optimizers with quantized state: :class:`AdamW8bit`, :func:`per_layer`, and the ops below them."""

from .adamw8bit import AdamW8bit
from .ops import adam_q_, dequantize_block, quantize_block
from .per_layer import PerLayerOptimizer, per_layer

__all__ = ["AdamW8bit", "PerLayerOptimizer", "adam_q_", "dequantize_block", "per_layer", "quantize_block"]
