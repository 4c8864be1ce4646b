"""Optimizers with quantized state, :func:`per_layer`, and the ops below them."""

from ._quantized import Options, QuantizedOptimizer
from .adam import Adam8bit, AdamW4bit, AdamW8bit, AdamWFp8
from .ademamix import AdEMAMix8bit
from .clip import clip_coef, global_norm_sq, grad_norm_sq
from .momentum import Lion8bit, SGD8bit
from .muon import Muon8bit
from .ops import adam_q_, adam_q_dir_, ademamix_q_, dequantize_block, momentum_q_, quantize_block
from .per_layer import PerLayerOptimizer, per_layer

__all__ = [
    "AdEMAMix8bit",
    "Adam8bit",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "Lion8bit",
    "Muon8bit",
    "Options",
    "PerLayerOptimizer",
    "QuantizedOptimizer",
    "SGD8bit",
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
