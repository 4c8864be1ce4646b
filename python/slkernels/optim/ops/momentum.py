"""``momentum_q_``: multi-tensor steps of the rules with one moment, on quantized state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._library import check, define
from ._checks import RULES, STATE_CODECS, check_block, check_codec, check_lists, check_rounding, one_of

_ops = torch.ops.slkernels


def _momentum_q_fake(
    params,
    grads,
    m,
    m_scale,
    master_lo,
    step,
    lr,
    *,
    beta1,
    beta2,
    weight_decay,
    rule,
    codec="dyn8",
    block=256,
    grad_scale=None,
    found_inf=None,
    round_mode=0,
    rng=None,
    nonfinite=None,
):
    op = "momentum_q_"
    check_codec(op, codec, tuple(STATE_CODECS))
    check(rule in RULES, op, lambda: f"rule must be {one_of(RULES)}, got '{rule}'")
    check_block(op, block)
    check_rounding(op, round_mode, rng)
    check_lists(op, "params", len(params), grads=grads, m=m, m_scale=m_scale)
    if master_lo:
        check_lists(op, "params", len(params), master_lo=master_lo)


define(
    "momentum_q_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] m_scale, Tensor(d!)[] master_lo, "
    "Tensor step, Tensor lr, *, float beta1, float beta2, float weight_decay, str rule, str codec='dyn8', "
    "int block=256, Tensor? grad_scale=None, Tensor? found_inf=None, int round_mode=0, Tensor? rng=None, "
    "Tensor(e!)? nonfinite=None) -> ()",
    fake=_momentum_q_fake,
)


def momentum_q_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    m_scale: Sequence[Tensor],
    master_lo: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rule: str,
    codec: str = "dyn8",
    block: int = 256,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    round_mode: int = 0,
    rng: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """One step of a rule with a single moment on a list of tensors, in place and in one pass.

    ============ =========================================================================================
    rule         step (g = the gradient)
    ============ =========================================================================================
    ``lion``     p <- p (1 - lr wd) - lr sign(beta1 m + (1 - beta1) g); m <- beta2 m + (1 - beta2) g
    ``signum``   m <- beta1 m + (1 - beta1) g; p <- p (1 - lr wd) - lr sign(m)
    ``sgd``      g <- g + wd p; m <- beta1 m + g, at step 1 m <- g; p <- p - lr m
    ``nesterov`` m as for ``sgd``; p <- p - lr (g + beta1 m)
    ============ =========================================================================================

    Lion: Chen et al., arXiv 2302.06675. Signum: Bernstein et al., arXiv 1802.04434. The other two are
    ``torch.optim.SGD``'s (dampening 0). sign(0) = 0. A gradient element that makes m NaN or infinite: m keeps its old
    value, p follows the formula, ``nonfinite`` counts it.

    Args:
        beta1: the momentum of ``sgd``, ``nesterov`` and ``signum``. beta2: Lion's second; the others ignore it.
        weight_decay: decoupled for ``lion`` and ``signum``, coupled for ``sgd`` and ``nesterov``, as in their sources.
        codec: of m: ``"dyn8"``, ``"lin8"``, ``"cmp8"``, ``"dyn4"``, ``"fp8"``.
        others: as in :func:`adam_q_`.

    Raises:
        RuntimeError: shapes, dtypes, list lengths that do not fit, or an unknown option.
    """
    _ops.momentum_q_(
        params,
        grads,
        m,
        m_scale,
        master_lo,
        step,
        lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        rule=rule,
        codec=codec,
        block=block,
        grad_scale=grad_scale,
        found_inf=found_inf,
        round_mode=round_mode,
        rng=rng,
        nonfinite=nonfinite,
    )
