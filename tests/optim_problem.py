"""Steps of family `optim` to be tested: parameters, gradients, states; and the check of one step."""

from __future__ import annotations

import copy
import itertools

import slkernels
import torch
from optim_data import BLOCKS, PAIRS, random_tensor, same_bits
from slkernels.reference import optim as reference
from slkernels.reference import optim_codec

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
MOMENTUM = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
RULES = ["lion", "sgd", "nesterov", "signum"]
OPS = ["adam", "ademamix", *RULES]
SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 511, 512, 1000, 5461, 0]


class Problem:
    """Parameters, gradients and states of a step, in separate poisoned allocations with canaries around them.

    ``op``: "adam", "ademamix" or a rule of momentum_q_. States are lists by name: m, v, m_slow as the op has them.
    """

    PAD = 64

    def __init__(
        self,
        sizes,
        dtype=torch.float32,
        *,
        op="adam",
        codec="dyn8",
        block=None,
        quantized=True,
        seed=0,
        warm=True,
        master=None,
    ):
        self.op, self.codec, self.block, self.guards = op, codec, block or BLOCKS[codec], []
        self.moment_codecs = {"m": codec}
        if op == "ademamix":
            self.moment_codecs["m_slow"] = codec
        if op in ("adam", "ademamix"):
            self.moment_codecs["v"] = PAIRS[codec]
        self.params, self.grads, self.master_lo = [], [], []
        self.states = {name: ([], []) for name in self.moment_codecs}
        for i, n in enumerate(sizes):
            q = quantized[i] if isinstance(quantized, list) else quantized
            m = random_tensor(n, seed=seed + 3 * i, decades=3.0) * (1.0 if warm else 0.0)
            values = {
                "m": m,
                "m_slow": random_tensor(n, seed=seed + 5 * i + 1, decades=3.0) * (1.0 if warm else 0.0),
                "v": m.square() * (0.5 + torch.rand(n, generator=torch.Generator().manual_seed(seed + i))),
            }
            self.params.append(self.guarded(random_tensor(n, seed=seed + 7 * i + 2, decades=2.0).to(dtype)))
            self.grads.append(self.guarded(random_tensor(n, seed=seed + 11 * i + 3, decades=3.0).to(dtype)))
            for name, state_codec in self.moment_codecs.items():
                value = values[name]
                codes, s = reference.quantize_block(value, state_codec, self.block) if q else (value, torch.empty(0))
                self.states[name][0].append(self.guarded(codes))
                self.states[name][1].append(self.guarded(s))
            if master:
                low = torch.randint(-128, 128, (n,), generator=torch.Generator().manual_seed(seed + i))
                low = torch.where(self.params[-1] == 0, 0, low * (256 if master == torch.int16 else 1))
                self.master_lo.append(self.guarded(low.to(master)))
        self.step, self.lr = torch.tensor(3.0), torch.tensor(1e-2)
        self.beta3, self.alpha = torch.tensor(0.9999), torch.tensor(5.0)

    def guarded(self, x):
        raw = torch.full((x.numel() + 2 * self.PAD,), 77).to(x.dtype)
        self.guards.append((raw, x.numel()))
        out = raw[self.PAD : self.PAD + x.numel()]
        return out.copy_(x)

    def check_guards(self):
        for raw, n in self.guards:
            assert (raw[: self.PAD] == 77).all() and (raw[self.PAD + n :] == 77).all()

    @property
    def m(self):
        return self.states["m"][0]

    @property
    def m_scale(self):
        return self.states["m"][1]

    @property
    def v(self):
        return self.states["v"][0]

    @property
    def v_scale(self):
        return self.states["v"][1]

    def clone(self):
        other = copy.copy(self)
        for name in ("params", "grads", "master_lo"):
            setattr(other, name, [t.clone() for t in getattr(self, name)])
        other.states = {k: tuple([t.clone() for t in part] for part in s) for k, s in self.states.items()}
        return other

    def only(self, i):
        """Tensor i alone, sharing memory."""
        other = copy.copy(self)
        other.params, other.grads, other.master_lo = [self.params[i]], [self.grads[i]], self.master_lo[i : i + 1]
        other.states = {k: tuple([part[i]] for part in s) for k, s in self.states.items()}
        return other

    def arguments(self):
        states = [part for s in self.states.values() for part in s]
        scalars = [self.step, self.lr] + ([self.beta3, self.alpha] if self.op == "ademamix" else [])
        return [self.params, self.grads, *states, self.master_lo, *scalars]

    @property
    def options(self):
        more = {"codec": self.codec, "block": self.block}
        return {**HYPER, **more} if self.op in ("adam", "ademamix") else {**MOMENTUM, "rule": self.op, **more}

    @property
    def function(self):
        return {"adam": slkernels.adam_q_, "ademamix": slkernels.ademamix_q_}.get(self.op, slkernels.momentum_q_)

    def run(self, **options):
        self.function(*self.arguments(), **{**self.options, **options})
        return self

    def tensors(self):
        return [*self.params, *self.grads, *self.master_lo, *itertools.chain(*itertools.chain(*self.states.values()))]

    def same_as(self, other):
        return all(same_bits(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))

    def moment(self, name, i):
        """A moment of tensor i, as the step reads it."""
        codes, scale = (part[i] for part in self.states[name])
        if codes.dtype != torch.uint8:
            return codes
        return reference.decode_in_step(codes, scale, self.moment_codecs[name], self.block, self.params[i].numel())

    def reference(self, dtype, magnitudes=False, **options):
        """(p, {moment: value}) of every tensor by the definition, before the moments are quantized; or from absolute
        values, which bounds the roundings."""
        f = (lambda x: x.to(dtype).abs()) if magnitudes else (lambda x: x.to(dtype))
        formula = {"adam": reference.adam, "ademamix": reference.ademamix}.get(self.op, reference.momentum)
        scalars = [float(self.step), float(self.lr)]
        if self.op == "ademamix":
            scalars += [float(self.beta3), float(self.alpha)]
        known = {k: x for k, x in {**self.options, **options}.items() if k not in ("codec", "block")}
        out = []
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            if self.master_lo:
                p = reference.join_master(p, self.master_lo[i])
            moments = [f(self.moment(name, i)) for name in self.moment_codecs]
            p, *moments = formula(f(p), f(g), *moments, *scalars, **known)
            out.append((p, dict(zip(self.moment_codecs, moments, strict=True))))
        return out


def check_step(problem, **options):
    """Runs a step. p against the definition in float64: over all elements, at most twice the error of the same formula
    in PyTorch; for every element, the rounding of p and 8 roundings of what was added up. Moments: the codes are those
    of the exact ones, but for values that a rounding takes across a midpoint; fp32 ones within 4 roundings."""
    exact, formula = (problem.reference(dtype, **options) for dtype in (torch.float64, torch.float32))
    sums = problem.reference(torch.float64, magnitudes=True, **options)
    starts = [p.double().abs() for p in problem.params]
    problem.run(**options)
    problem.check_guards()
    dtype = problem.params[0].dtype
    eps = torch.finfo(torch.float32).eps
    ours, theirs = [], []
    for p, start, (want, _), (approx, _), (down, _) in zip(problem.params, starts, exact, formula, sums, strict=True):
        ours.append((p.double() - want).abs())
        theirs.append((approx.to(dtype).double() - want).abs())
        added = 2 * start + (start - down).abs()  # |p| and the update, with nothing cancelled
        rounding = 0.501 * torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal * 2**-10
        assert problem.op in ("lion", "signum") or (ours[-1] <= rounding + 8 * eps * added).all()
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert ours.max() <= 2 * theirs.max() and ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()
    for i, ((_, moments), (_, magnitudes)) in enumerate(zip(exact, sums, strict=True)):
        for name, codec in problem.moment_codecs.items():
            state, scale = (part[i] for part in problem.states[name])
            if state.dtype != torch.uint8:
                error = (state.double() - moments[name]).abs()
                assert (error <= 4 * eps * magnitudes[name] + 1e-44).all()
                continue
            codes, scales = reference.quantize_block(moments[name].float(), codec, problem.block)
            torch.testing.assert_close(scale, scales, rtol=1e-6, atol=0)
            got, codes = (optim_codec.unpack(c, codec).int() for c in (state, codes))
            wrong = torch.minimum((codes - got).abs(), 256 - (codes - got).abs())
            assert wrong.sum() <= 1 + 1e-3 * wrong.numel() and wrong.le(1).all()


def cancel_nothing(problem):
    """Where grad + weight_decay * p cancels, the moments and the error have no bound."""
    for p, g in zip(problem.params, problem.grads, strict=True):
        g.copy_(g.abs() * p.sign())
    return problem
