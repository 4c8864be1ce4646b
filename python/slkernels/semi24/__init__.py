"""Family ``semi24``: 2:4 sparse weights, of which two of every four along a row are kept.

Formats and layouts: include/slkernels/semi24.h.
"""

from ._mask import gate_to_mask, maskllm24, maskllm_prior, srste_grad_
from .scores import input_norms, wanda_score

__all__ = ["gate_to_mask", "input_norms", "maskllm24", "maskllm_prior", "srste_grad_", "wanda_score"]
