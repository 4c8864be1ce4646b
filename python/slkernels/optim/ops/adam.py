"""``adam_q_``, ``adam_q_dir_`` and ``ademamix_q_``: multi-tensor Adam steps on quantized moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._library import define
from ._checks import STATE_CODECS, check_block, check_codec, check_lists, check_rounding

_ops = torch.ops.slkernels


def _check_step(op, codec, block, round_mode=0, rng=None):
    check_codec(op, codec, tuple(STATE_CODECS))
    check_block(op, block)
    check_rounding(op, round_mode, rng)


def _adam_q_fake(
    params,
    grads,
    m,
    m_scale,
    v,
    v_scale,
    master_lo,
    step,
    lr,
    *,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled=True,
    codec="dyn8",
    block=256,
    grad_scale=None,
    found_inf=None,
    round_mode=0,
    rng=None,
    nonfinite=None,
):
    op = "adam_q_"
    _check_step(op, codec, block, round_mode, rng)
    check_lists(op, "params", len(params), grads=grads, m=m, m_scale=m_scale, v=v, v_scale=v_scale)
    if master_lo:
        check_lists(op, "params", len(params), master_lo=master_lo)


def _adam_q_dir_fake(
    grads,
    m,
    m_scale,
    v,
    v_scale,
    out,
    step,
    *,
    beta1,
    beta2,
    eps,
    codec="dyn8",
    block=256,
    grad_scale=None,
    found_inf=None,
    nonfinite=None,
):
    op = "adam_q_dir_"
    _check_step(op, codec, block)
    check_lists(op, "grads", len(grads), m=m, m_scale=m_scale, v=v, v_scale=v_scale, out=out)


def _ademamix_q_fake(
    params,
    grads,
    m,
    m_scale,
    m_slow,
    m_slow_scale,
    v,
    v_scale,
    master_lo,
    step,
    lr,
    beta3,
    alpha,
    *,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled=True,
    codec="dyn8",
    block=256,
    grad_scale=None,
    found_inf=None,
    round_mode=0,
    rng=None,
    nonfinite=None,
):
    op = "ademamix_q_"
    _check_step(op, codec, block, round_mode, rng)
    lists = {"m_scale": m_scale, "m_slow": m_slow, "m_slow_scale": m_slow_scale, "v": v, "v_scale": v_scale}
    check_lists(op, "params", len(params), grads=grads, m=m, **lists)
    if master_lo:
        check_lists(op, "params", len(params), master_lo=master_lo)


define(
    "adam_q_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] m_scale, Tensor(d!)[] v, "
    "Tensor(e!)[] v_scale, Tensor(f!)[] master_lo, Tensor step, Tensor lr, *, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled=True, str codec='dyn8', int block=256, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, int round_mode=0, Tensor? rng=None, Tensor(g!)? nonfinite=None) -> ()",
    fake=_adam_q_fake,
)
define(
    "adam_q_dir_(Tensor[] grads, Tensor(a!)[] m, Tensor(b!)[] m_scale, Tensor(c!)[] v, Tensor(d!)[] v_scale, "
    "Tensor(e!)[] out, Tensor step, *, float beta1, float beta2, float eps, str codec='dyn8', int block=256, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(f!)? nonfinite=None) -> ()",
    fake=_adam_q_dir_fake,
)
define(
    "ademamix_q_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] m_scale, Tensor(d!)[] m_slow, "
    "Tensor(e!)[] m_slow_scale, Tensor(f!)[] v, Tensor(g!)[] v_scale, Tensor(h!)[] master_lo, Tensor step, Tensor lr, "
    "Tensor beta3, Tensor alpha, *, float beta1, float beta2, float eps, float weight_decay, bool decoupled=True, "
    "str codec='dyn8', int block=256, Tensor? grad_scale=None, Tensor? found_inf=None, int round_mode=0, "
    "Tensor? rng=None, Tensor(i!)? nonfinite=None) -> ()",
    fake=_ademamix_q_fake,
)


def adam_q_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    m_scale: Sequence[Tensor],
    v: Sequence[Tensor],
    v_scale: Sequence[Tensor],
    master_lo: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    codec: str = "dyn8",
    block: int = 256,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    round_mode: int = 0,
    rng: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """One Adam(W) step on a list of tensors, in place and in one pass: decode m and v, step in float32, encode again.

    The formula and the order are ``torch.optim.AdamW``'s (decay before the update; Loshchilov and Hutter, arXiv
    1711.05101) or, with ``decoupled=False``, ``torch.optim.Adam``'s L2 term. The update uses m and v before they are
    quantized; p is rounded once. There is no sign correction of m's code (bitsandbytes' GPU kernel has one, its CPU
    code none): m takes the nearest code, zero included.

    A gradient element that is NaN or infinite, or whose square overflows: its m and v keep their old values, and so do
    the scale and the other elements of its block; its p follows the formula (NaN for NaN and infinity, as in torch);
    ``nonfinite`` counts it.

    Args:
        params: contiguous float32, bfloat16 or float16, distinct storage. Call under ``torch.no_grad()``.
        grads: the same shapes and dtypes; a copy is made of one that is not contiguous. Not modified.
        m, v: per tensor either uint8 codes (the parameter's numel; with 4 bits half of it, rounded up) or float32 (the
            parameter's numel), contiguous. A new state is zeros everywhere: where the scale is 0, codes say nothing.
        m_scale, v_scale: float32 [ceil(numel / block)], or empty where m and v are float32.
        master_lo: empty list, or per (bfloat16) parameter a contiguous int16 or int8 tensor of its numel: the low bits
            of a master weight. int16: p and it together are a float32 number (as in TransformerEngine); int8: the first
            16 significand bits of one. Start from zeros. p is then the master rounded to bfloat16, ties away from zero.
        step: float32, one element: the number of this step, from 1. lr: float32, one element. Both on the parameters'
            device, and read there.
        codec: ``"dyn8"`` (v: dyn8u), ``"lin8"`` (lin8u), ``"cmp8"`` (cmp8u), ``"dyn4"`` (lin4u), ``"fp8"`` (fp8u): see
            :func:`quantize_block`.
        block: elements per scale, a multiple of 16 up to 4096. Usual: 256; cmp8: 32; dyn4: 128.
        grad_scale: float32, one element: gradients are divided by it (times its reciprocal), as in torch's fused Adam.
        found_inf: float32, one element: if it is not 0, nothing is changed.
        round_mode: 0, p is rounded to nearest even; 1, stochastically (bfloat16, float16; with int8 master_lo, the
            master is). float32 parameters and int16 masters are not rounded.
        rng: int64 [2] = (seed, step) on the parameters' device, for round_mode 1: element i of tensor k draws from
            Philox 4x32-10 with key seed and counter (i / 8, k, step), whatever the number of threads.
        nonfinite: int64, one element, or None: the number of elements whose moments were kept is added to it.

    Raises:
        RuntimeError: shapes, dtypes, list lengths that do not fit, or an unknown option.
    """
    _ops.adam_q_(
        params,
        grads,
        m,
        m_scale,
        v,
        v_scale,
        master_lo,
        step,
        lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        codec=codec,
        block=block,
        grad_scale=grad_scale,
        found_inf=found_inf,
        round_mode=round_mode,
        rng=rng,
        nonfinite=nonfinite,
    )


def adam_q_dir_(
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    m_scale: Sequence[Tensor],
    v: Sequence[Tensor],
    v_scale: Sequence[Tensor],
    out: Sequence[Tensor],
    step: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    codec: str = "dyn8",
    block: int = 256,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Adam's direction instead of its step: ``out = mhat / (sqrt(vhat) + eps)``, with m and v updated as
    :func:`adam_q_` does. What GaLore (arXiv 2403.03507) and APOLLO (arXiv 2412.05270) need in their small space.

    Args:
        grads: float32, bfloat16 or float16; a copy is made of one that is not contiguous.
        m, m_scale, v, v_scale, step, codec, block, grad_scale, nonfinite: as in :func:`adam_q_`.
        out: contiguous, the gradients' shapes, their dtype or float32.
        found_inf: float32, one element: if it is not 0, m and v stay as they are and ``out`` is zeros.

    Raises:
        RuntimeError: shapes, dtypes, list lengths that do not fit, or an unknown option.
    """
    _ops.adam_q_dir_(
        grads,
        m,
        m_scale,
        v,
        v_scale,
        out,
        step,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        codec=codec,
        block=block,
        grad_scale=grad_scale,
        found_inf=found_inf,
        nonfinite=nonfinite,
    )


def ademamix_q_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    m_scale: Sequence[Tensor],
    m_slow: Sequence[Tensor],
    m_slow_scale: Sequence[Tensor],
    v: Sequence[Tensor],
    v_scale: Sequence[Tensor],
    master_lo: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    beta3: Tensor,
    alpha: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    codec: str = "dyn8",
    block: int = 256,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    round_mode: int = 0,
    rng: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """One AdEMAMix step (Pagliardini, Ablin, Grangier, arXiv 2409.03137): Adam with a second, slow first moment.

    ``m_slow = beta3 m_slow + (1 - beta3) g`` (not bias-corrected), and the update is
    ``(mhat + alpha m_slow) / (sqrt(vhat) + eps)``. Everything else is :func:`adam_q_`'s.

    Args:
        m_slow, m_slow_scale: like m and m_scale, in m's codec.
        beta3, alpha: float32, one element, on the parameters' device: they follow schedules.
        others: as in :func:`adam_q_`.

    Raises:
        RuntimeError: shapes, dtypes, list lengths that do not fit, or an unknown option.
    """
    _ops.ademamix_q_(
        params,
        grads,
        m,
        m_scale,
        m_slow,
        m_slow_scale,
        v,
        v_scale,
        master_lo,
        step,
        lr,
        beta3,
        alpha,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        codec=codec,
        block=block,
        grad_scale=grad_scale,
        found_inf=found_inf,
        round_mode=round_mode,
        rng=rng,
        nonfinite=nonfinite,
    )
