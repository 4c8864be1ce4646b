"""Optimizers with quantized state, :func:`per_layer`, and the ops below them."""

from ._low_rank import low_rank_groups
from ._quantized import Options, QuantizedOptimizer
from .adam import Adam8bit, AdamW4bit, AdamW8bit, AdamWFp8
from .ademamix import AdEMAMix8bit
from .apollo import APOLLOAdamW, APOLLOMiniAdamW
from .clip import clip_coef, global_norm_sq, grad_norm_sq
from .fira import Fira
from .galore import GaLoreAdamW
from .momentum import Lion8bit, SGD8bit
from .muon import Muon8bit
from .ops import adam_q_, adam_q_dir_, ademamix_q_, dequantize_block, momentum_q_, quantize_block
from .per_layer import PerLayerOptimizer, per_layer
from .qgalore import QGaLoreAdamW8bit

__all__ = [
    "APOLLOAdamW",
    "APOLLOMiniAdamW",
    "AdEMAMix8bit",
    "Adam8bit",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "Fira",
    "GaLoreAdamW",
    "Lion8bit",
    "Muon8bit",
    "Options",
    "PerLayerOptimizer",
    "QGaLoreAdamW8bit",
    "QuantizedOptimizer",
    "SGD8bit",
    "adam_q_",
    "adam_q_dir_",
    "ademamix_q_",
    "clip_coef",
    "dequantize_block",
    "global_norm_sq",
    "grad_norm_sq",
    "low_rank_groups",
    "momentum_q_",
    "per_layer",
    "quantize_block",
]
