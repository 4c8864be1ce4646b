from .ops import adam_q_, dequantize_block, quantize_block

__all__ = ["adam_q_", "dequantize_block", "quantize_block"]
