"""Family semi24, learned masks: MaskLLM's training step on one weight, against its public formula in torch."""

from __future__ import annotations

from functools import cache

import slkernels
import torch

from ..case import OURS, Case, Provider, Target, compare_with
from ..data import generator, nbytes, uniform

MASKLLM = "maskllm formula"
WHERE = "torch.where"

_KAPPA, _TAU, _LAM = 100.0, 2.0, 2e-4  # MaskLLM's at the start, SR-STE's


def patterns(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    kept = ((1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1))
    return torch.tensor(kept, dtype=dtype, device=device)


def soft_mask_problem(n: int, m: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        W, dY = uniform(n, m, dtype=dtype, gen=gen), uniform(n, m, dtype=dtype, gen=gen)
        gate = uniform(n, m // 4, 6, dtype=torch.float32, gen=gen, scale=0.02).requires_grad_()
        kappa, tau = torch.tensor(_KAPPA, device=device), torch.tensor(_TAU, device=device)
        key = torch.tensor(seed, device=device)
        kept = patterns(torch.float32, device)

        def ours():
            y = torch.ops.slkernels.maskllm24(W, gate, kappa, tau, key)
            return y.detach(), *torch.autograd.grad(y, gate, dY)

        def formula(W=W, gate=gate, dY=dY, kept=kept, noise=None):
            """learnable_sparsity/differentiable_mask.py, forward and backward."""
            if noise is None:
                noise = -torch.empty_like(gate).exponential_(generator=gen).log()
            p = torch.softmax((gate * _KAPPA + noise) / _TAU, -1)
            y = W * (p @ kept).view(n, m).to(W.dtype)
            return y.detach(), *torch.autograd.grad(y, gate, dY)

        @cache
        def expected():
            """The formula in float64 with our noise."""
            spacing = slkernels.reference.semi24_mask.mask_spacings(n * m // 4, seed).to(device)
            noise = -(spacing.double() * 2**-23).log().view(gate.shape)
            wide = gate.detach().double().requires_grad_()
            return formula(W.double(), wide, dY.double(), kept.double(), noise)

        def noise_free(result) -> float:
            """Other noise gives other masks: on average, Y keeps half of W."""
            y, dgate = result
            off = abs(float((y.double() * W.double()).sum() / W.double().square().sum()) - 0.5)
            return max(off / (10 / (n * m) ** 0.5), 0.0 if bool(dgate.isfinite().all()) else float("inf"))

        traffic = 2.0 * nbytes(gate) + 4.0 * nbytes(W) + nbytes(gate)
        return {
            OURS: Provider(ours, compare_with(expected, dtype), 0.0, traffic),
            MASKLLM: Provider(formula, noise_free, 0.0, traffic),
        }

    return make


def gate_to_mask_problem(n: int, m: int):
    def make(device, seed):
        gate = uniform(n, m // 4, 6, dtype=torch.float32, gen=generator(device, seed))
        kept = patterns(torch.bool, device)

        def formula():
            return kept[gate.argmax(-1)].view(n, m)

        want = cache(formula)

        def error(mask) -> float:
            return 0.0 if torch.equal(mask, want()) else float("inf")

        traffic = nbytes(gate) + float(n * m)
        return {
            OURS: Provider(lambda: slkernels.gate_to_mask(gate, m), error, 0.0, traffic),
            MASKLLM: Provider(formula, error, 0.0, traffic),
        }

    return make


def srste_problem(n: int, m: int, dtype: torch.dtype):
    def make(device, seed):
        gen = generator(device, seed)
        start, W = uniform(n, m, dtype=dtype, gen=gen), uniform(n, m, dtype=dtype, gen=gen)
        mask = uniform(n, m, dtype=torch.float32, gen=gen) > 0
        grads = {OURS: start.clone(), WHERE: start.clone()}

        @cache
        def expected():
            return (start.double() + _LAM * ~mask * W.double(),)

        def provider(name, step):
            def run():
                step(grads[name])
                return run

            def error(step) -> float:
                grads[name].copy_(start)
                step()
                return compare_with(expected, dtype)(grads[name])

            return Provider(run, error, 0.0, 3.0 * nbytes(W) + nbytes(mask))

        return {
            OURS: provider(OURS, lambda grad: slkernels.srste_grad_(grad, W, mask, _LAM)),
            WHERE: provider(WHERE, lambda grad: grad.add_((~mask) * W, alpha=_LAM)),
        }

    return make


def cases() -> list[Case]:
    """All cases of the family."""
    found = []
    for size, dtype in ((1024, torch.float32), (1024, torch.bfloat16), (4096, torch.bfloat16)):
        found.append(
            Case(
                "semi24_mask",
                "maskllm24 fwd+bwd",
                f"{size}x{size}",
                dtype,
                soft_mask_problem(size, size, dtype),
                baseline=MASKLLM,
                targets=(Target(MASKLLM, 5.0),),
                items=float(size * size),
                item="element",
                quick=size == 1024 and dtype == torch.float32,
            )
        )
    make = gate_to_mask_problem(4096, 4096)
    found.append(Case("semi24_mask", "gate_to_mask", "4096x4096", torch.float32, make, baseline=MASKLLM))
    for dtype in (torch.float32, torch.bfloat16):
        make = srste_problem(4096, 4096, dtype)
        found.append(Case("semi24_mask", "srste_grad_", "4096x4096", dtype, make, baseline=WHERE))
    return found
