"""Masks that are learned or refined while a model trains: MaskLLM's gates and SR-STE's gradient.

A gate holds six numbers a group of four columns, in the order of the codes (include/slkernels/semi24.h): the patterns
that keep columns 01, 02, 03, 12, 13, 23.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._library import check, define, needs_grad

_ops = torch.ops.slkernels

_CODES = 6


def _check_gate(op: str, gate: Tensor, n: int, m: int) -> None:
    check(
        gate.dim() == 3 and tuple(gate.shape) == (n, (m + 3) // 4, _CODES),
        op,
        lambda: f"gate must be [{n}, {(m + 3) // 4}, 6], got {list(gate.shape)}",
    )


# ---- maskllm24 ------------------------------------------------------------------------------------------------------


def _maskllm24_fake(W, gate, kappa, tau, seed):
    check(W.dim() == 2, "maskllm24", lambda: f"W must be [n, m], got {list(W.shape)}")
    _check_gate("maskllm24", gate, *W.shape)
    return W.new_empty(W.shape)


def _maskllm24_backward_fake(dY, W, gate, kappa, tau, seed, need_gate=True, need_W=True):
    return gate.new_empty(gate.shape if need_gate else (0,)), W.new_empty(W.shape if need_W else (0,))


def _maskllm24_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _maskllm24_gradients(ctx, dY):
    need_W, need_gate = needs_grad(ctx, 0), needs_grad(ctx, 1)
    if not (need_W or need_gate):
        return None, None, None, None, None
    dgate, dW = _ops.maskllm24_backward(dY, *ctx.saved_tensors, need_gate, need_W)
    return dW if need_W else None, dgate if need_gate else None, None, None, None


define(
    "maskllm24(Tensor W, Tensor gate, Tensor kappa, Tensor tau, Tensor seed) -> Tensor",
    fake=_maskllm24_fake,
    setup_context=_maskllm24_setup,
    backward=_maskllm24_gradients,
)
define(
    "maskllm24_backward(Tensor dY, Tensor W, Tensor gate, Tensor kappa, Tensor tau, Tensor seed, "
    "bool need_gate=True, bool need_W=True) -> (Tensor, Tensor)",
    fake=_maskllm24_backward_fake,
)


def maskllm24(W: Tensor, gate: Tensor, kappa: float | Tensor, tau: float | Tensor, seed: int | Tensor) -> Tensor:
    """W (*) M with the soft 2:4 mask of learned gates: "MaskLLM", arXiv 2409.17481, section 3.

        p = softmax((kappa gate + Gumbel noise) / tau)  over the six patterns of a group;   M = sum_k p_k pattern_k

    The noise is a function of (seed, group) alone, made anew in the backward, which keeps the arguments and nothing
    else. p has exactly the distribution that independent Gumbel noise gives it (docs/semi24_mask.md). In float32 and
    16-bit dtypes every device and instruction set gives the same bits. Where W is frozen its gradient costs nothing.

    Args:
        W: [n, m], float32, bfloat16, float16 or float64.
        gate: [n, ceil(m / 4), 6], float32, bfloat16 or float16, whatever W's dtype; float64 if and only if W is.
        kappa: MaskLLM's scale of the gates (1e2 to 5e2), tau: the temperature (4 to 0.05), above 0. Numbers, or
            float32 tensors with one element on W's device: they are read there, so that a captured graph follows a
            schedule. They get no gradient.
        seed: a number, or an int64 tensor with one element on W's device: another one for every matrix and step.

    Returns:
        [n, m], W's dtype, contiguous. Differentiable in W and gate.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """

    def scalar(x, dtype: torch.dtype) -> Tensor:
        return x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=W.device)

    return _ops.maskllm24(W, gate, scalar(kappa, torch.float32), scalar(tau, torch.float32), scalar(seed, torch.int64))


# ---- gate_to_mask, maskllm_prior ------------------------------------------------------------------------------------


def _gate_to_mask_fake(gate, m):
    check(m >= 0, "gate_to_mask", lambda: f"m must not be negative, got {m}")
    check(gate.dim() == 3, "gate_to_mask", lambda: f"gate must be [n, {(m + 3) // 4}, 6], got {list(gate.shape)}")
    _check_gate("gate_to_mask", gate, gate.shape[0], m)
    return gate.new_empty((gate.shape[0], m), dtype=torch.bool)


define("gate_to_mask(Tensor gate, int m) -> Tensor", fake=_gate_to_mask_fake)


def gate_to_mask(gate: Tensor, m: int) -> Tensor:
    """The 2:4 mask that gates have learned: of each group the pattern of the largest gate.

    Args:
        gate: [n, ceil(m / 4), 6], float32, bfloat16, float16 or float64. m: columns of the mask.

    Returns:
        bool [n, m]. Equal gates: the lowest code, the pattern whose kept columns come first. NaN ranks highest.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    return _ops.gate_to_mask(gate, m)


def maskllm_prior(gate: Tensor, mask: Tensor, strength: float = 3.0) -> Tensor:
    """Gates that lean towards a mask found by other means: MaskLLM's prior (arXiv 2409.17481, section 3.3).

        gate_k + (columns that pattern k and the mask both keep - 1) std(gate) strength

    With strength 3 and normal gates, some 95 % of the groups start at the mask's pattern.

    Args:
        gate: [n, ceil(m / 4), 6], any floating dtype. mask: bool [n, m]. strength: MaskLLM's alpha.

    Returns:
        A new gate, the same shape and dtype.

    Raises:
        RuntimeError: shapes that do not fit.
    """
    n, m = mask.shape
    _check_gate("maskllm_prior", gate, n, m)
    kept = pad(mask, (0, -m % 4)).view(n, -1, 4).to(gate.dtype)
    first, second = torch.triu_indices(4, 4, 1, device=gate.device)  # in the order of the codes
    return gate + (kept[..., first] + kept[..., second] - 1) * (gate.std() * strength)


# ---- srste_grad_ ----------------------------------------------------------------------------------------------------


def _srste_grad_fake(grad, W, mask, lam):
    for name, t in (("W", W), ("mask", mask)):
        check(
            t.shape == grad.shape,
            "srste_grad_",
            lambda name=name, t=t: f"{name} must be {list(grad.shape)}, got {list(t.shape)}",
        )


define("srste_grad_(Tensor(a!) grad, Tensor W, Tensor mask, float lam) -> ()", fake=_srste_grad_fake)


def srste_grad_(grad: Tensor, W: Tensor, mask: Tensor, lam: float) -> None:
    """grad += lam (1 - mask) (*) W, in place: SR-STE's pull of pruned weights towards 0 (arXiv 2102.04010, eq. 9).

    One pass: a kept element is left as it is, whatever W holds there. Call it between the backward and the optimizer.

    Args:
        grad: any shape, float32, bfloat16, float16 or float64, contiguous. W: grad's shape and dtype, any strides.
        mask: bool, grad's shape: True is kept. lam: the paper's lambda_w, 2e-4 there.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or a grad that is not contiguous.
    """
    _ops.srste_grad_(grad, W, mask, lam)
