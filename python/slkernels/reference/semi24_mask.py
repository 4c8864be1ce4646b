"""Family ``semi24``, learned masks, in plain PyTorch. Scalars are Python numbers or tensors of one element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import philox

_STREAM = 0x6D61736B  # the fourth word of the counters that noise is made of ("mask")
PATTERNS = ((1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1))  # in the codes' order


def patterns(dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[6, 4]: the columns that each code keeps."""
    return torch.tensor(PATTERNS, dtype=dtype, device=device)


def mask_spacings(groups: int, seed: int) -> Tensor:
    """int64 [groups, 6]: 2^26 times the spacings of five uniform points, of the Philox draws (group, seed)."""
    group = torch.arange(groups)
    w = philox(int(seed), group & 0xFFFFFFFF, group >> 32, torch.zeros_like(group), torch.full_like(group, _STREAM))
    rest = (w[0] & 127) << 18 | (w[1] & 127) << 11 | (w[2] & 127) << 4 | (w[3] & 15)
    points = torch.stack([*(word >> 7 for word in w), rest], 1).sort(1).values
    ends = points.new_zeros(groups, 1)
    return 2 * torch.diff(points, dim=1, prepend=ends, append=ends + (2**25 - 1)) + 1


def maskllm24(W: Tensor, gate: Tensor, kappa: float | Tensor, tau: float | Tensor, seed: int | Tensor) -> Tensor:
    """See :func:`slkernels.maskllm24`."""
    spacing = mask_spacings(gate.shape[0] * gate.shape[1], int(seed)).to(W.device)
    noise = -(spacing.double() * 2**-23).to(gate.dtype).log().view(gate.shape)
    p = torch.softmax((gate * float(kappa) + noise) / float(tau), -1)
    mask = (p @ patterns(p.dtype, p.device)).flatten(1)[:, : W.shape[1]]
    return W * mask.to(W.dtype)


def gate_to_mask(gate: Tensor, m: int) -> Tensor:
    """See :func:`slkernels.gate_to_mask`."""
    return patterns(torch.bool, gate.device)[gate.argmax(-1)].flatten(1)[:, :m]


def srste_grad(grad: Tensor, W: Tensor, mask: Tensor, lam: float) -> Tensor:
    """The new grad of :func:`slkernels.srste_grad_`."""
    return torch.where(mask, grad, grad + lam * W)


def maskllm_prior(gate: Tensor, mask: Tensor, strength: float = 3.0) -> Tensor:
    """See :func:`slkernels.maskllm_prior`: MaskLLM's loop over the six patterns."""
    padded = F.pad(mask, (0, -mask.shape[1] % 4)).view(gate.shape[0], -1, 4)
    agreement = torch.stack(
        [(padded & torch.tensor(p, dtype=torch.bool, device=mask.device)).sum(-1) for p in PATTERNS], -1
    )
    return gate + (agreement - 1).to(gate.dtype) * gate.std() * strength
