"""Optimizers with quantized state: :class:`AdamW8bit`, :func:`per_layer`, and the ops below them."""

from ._low_rank import low_rank_groups
from .adam import AdamW8bit
from .apollo import APOLLOAdamW, APOLLOMiniAdamW
from .clip import clip_coef, global_norm_sq, grad_norm_sq
from .fira import Fira
from .galore import GaLoreAdamW
from .ops import adam_q_, adam_q_dir_, ademamix_q_, dequantize_block, momentum_q_, quantize_block
from .per_layer import PerLayerOptimizer, per_layer
from .qgalore import QGaLoreAdamW8bit

__all__ = [
    "APOLLOAdamW",
    "APOLLOMiniAdamW",
    "AdamW8bit",
    "Fira",
    "GaLoreAdamW",
    "PerLayerOptimizer",
    "QGaLoreAdamW8bit",
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
