"""Family ``optim``: block-wise quantization of optimizer state, and the fused multi-tensor steps on it.

A tensor's state is ``codes`` (uint8) and ``scale`` (float32, one per block of ``block`` elements of the flattened
tensor; the last block may be shorter). What a code means is the codec's affair; ``docs/optim.md`` has the table, and
``include/slkernels/optim_codec.cuh`` the definition.
"""

from __future__ import annotations

from .adam import adam_q_, adam_q_dir_, ademamix_q_
from .momentum import momentum_q_
from .quantize import dequantize_block, quantize_block

__all__ = ["adam_q_", "adam_q_dir_", "ademamix_q_", "dequantize_block", "momentum_q_", "quantize_block"]
