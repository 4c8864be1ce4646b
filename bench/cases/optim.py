"""Family optim: steps on quantized state, and the block codec, against torch's fused optimizers, bitsandbytes and
torchao."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import slkernels
import torch
from slkernels.reference import optim as reference

from ..case import OURS, Absent, Case, Provider, Target
from ..data import generator, nbytes, uniform

FUSED = "torch fused"
BNB = "bitsandbytes"
TORCHAO = "torchao"
TORCH = "torch ops"
BUCKETIZE = "torch.bucketize"
LOOKUP = "torch lookup"

_HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
_MOMENTUM = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01}
# Two steps in: relative error of the change of the parameters that 8-bit states may cause (bitsandbytes' own is 0.02).
_ALLOWED_CHANGE = 0.05
# How much further from x than the nearest code a code may lie, relative to the block's scale: a rounding, where two
# codes are equally near. On a CPU bitsandbytes looks codes up in 65,536 bins over [-1, 1], and is off by up to a bin.
_ALLOWED_EXCESS = 1e-6
_ALLOWED_EXCESS_BNB = 1.5 * 2 / 65536


def _ours(params):
    from slkernels.optim import AdamW8bit

    return AdamW8bit(params, **_HYPER)


def _fused(params):
    return torch.optim.AdamW(params, fused=True, **_HYPER)


def _bitsandbytes(params):
    return importlib.import_module("bitsandbytes").optim.AdamW8bit(params, **_HYPER)


def _torchao(params):
    return importlib.import_module("torchao.optim").AdamW8bit(params, **_HYPER)


class _OpStep:
    """An op of the family as an optimizer: ``op(params, grads, *states, [], step, lr, **options)``."""

    def __init__(self, params, op, moments, codec, block, **options):
        self.params, self.op, self.options = params, op, {**options, "codec": codec, "block": block}
        self.states = []
        for _ in range(moments):
            sizes = [p.numel() // (2 if codec == "dyn4" else 1) for p in params]
            self.states.append([torch.zeros(n, dtype=torch.uint8, device=params[0].device) for n in sizes])
            self.states.append([torch.zeros(-(-p.numel() // block), device=p.device) for p in params])
        self.count = torch.zeros((), device=params[0].device)
        self.lr = torch.tensor(_HYPER["lr"], device=params[0].device)

    @torch.no_grad()
    def step(self):
        self.count += 1
        grads = [p.grad for p in self.params]
        self.op(self.params, grads, *self.states, [], self.count, self.lr, **self.options)


class _TorchRule:
    """A rule of momentum_q_ in torch operations on state of the parameters' dtype."""

    def __init__(self, params, rule):
        self.params, self.rule, self.count = params, rule, 0
        self.m = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self):
        self.count += 1
        for p, m in zip(self.params, self.m, strict=True):
            scalars = (self.count, _HYPER["lr"])
            new_p, new_m = reference.momentum(p, p.grad, m, *scalars, rule=self.rule, **_MOMENTUM)
            p.copy_(new_p), m.copy_(new_m)


@dataclass(frozen=True)
class _Kind:
    """What steps: our optimizer, the exact one in float64, and peers by name with the package that they need."""

    ours: Callable
    exact: Callable
    peers: dict[str, tuple[str | None, Callable]]
    state_bytes: float  # ours, a parameter
    peer_bytes: float  # the first peer's, in elements of the parameters' dtype
    allowed: float = _ALLOWED_CHANGE


def _exact_adam(params):
    return torch.optim.AdamW(params, **_HYPER)


# By codec: block, relative error of the change, torchao's optimizer.
_CODECS = {
    "dyn8": (256, _ALLOWED_CHANGE, "AdamW8bit"),
    "lin8": (256, 0.13, None),
    "cmp8": (32, _ALLOWED_CHANGE, None),
    "dyn4": (128, 0.27, "AdamW4bit"),
    "fp8": (256, _ALLOWED_CHANGE, "AdamWFp8"),
}


def adam_kind(codec: str) -> _Kind:
    """``adam_q_`` with a codec."""
    block, allowed, peer = _CODECS[codec]
    hyper = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    peers = {FUSED: (None, _fused)}
    if codec == "dyn8":
        peers[BNB] = ("bitsandbytes", _bitsandbytes)
    if peer:
        peers[TORCHAO] = ("torchao", lambda ps: getattr(importlib.import_module("torchao.optim"), peer)(ps, **_HYPER))
    bytes = 2 * ((0.5 if codec == "dyn4" else 1) + 4 / block)
    return _Kind(
        lambda ps: _OpStep(ps, slkernels.adam_q_, 2, codec, block, **hyper), _exact_adam, peers, bytes, 2, allowed
    )


def momentum_kind(rule: str) -> _Kind:
    """``momentum_q_`` with a rule, on dyn8 state."""
    peers: dict[str, tuple[str | None, Callable]] = {}
    more = {"lr": _HYPER["lr"], "weight_decay": _MOMENTUM["weight_decay"]}
    if rule in ("sgd", "nesterov"):
        sgd = {**more, "momentum": 0.9, "nesterov": rule == "nesterov"}
        # Its fused CPU kernel leaves bf16 parameters as they are (torch 2.13).
        peers[TORCH] = (None, lambda ps: torch.optim.SGD(ps, foreach=True, **sgd))
    else:
        peers[TORCH] = (None, lambda ps: _TorchRule(ps, rule))
    if rule == "sgd":
        peers[BNB] = ("bitsandbytes", lambda ps: _bnb_optim().SGD8bit(ps, momentum=0.9, **more))
    if rule == "lion":
        peers[BNB] = ("bitsandbytes", lambda ps: _bnb_optim().Lion8bit(ps, betas=(0.9, 0.99), **more))
    ours = lambda ps: _OpStep(ps, slkernels.momentum_q_, 1, "dyn8", 256, rule=rule, **_MOMENTUM)  # noqa: E731
    return _Kind(ours, lambda ps: _TorchRule(ps, rule), peers, 1 + 4 / 256, 1)


class _ExactAdEMAMix:
    """AdEMAMix in torch operations, its moments in the parameters' dtype."""

    def __init__(self, params, beta3: float, alpha: float):
        self.params, self.slow, self.count = params, (beta3, alpha), 0
        self.moments = [tuple(torch.zeros_like(p) for _ in range(3)) for p in params]

    @torch.no_grad()
    def step(self):
        self.count += 1
        hyper = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        for i, p in enumerate(self.params):
            found = reference.ademamix(p, p.grad, *self.moments[i], self.count, _HYPER["lr"], *self.slow, **hyper)
            p.copy_(found[0])
            self.moments[i] = found[1:]


def ademamix_kind() -> _Kind:
    """``AdEMAMix8bit``."""
    beta3, alpha = 0.9999, 5.0
    options = {**_HYPER, "betas": (0.9, 0.999, beta3), "alpha": alpha}
    peers = {
        TORCH: (None, lambda ps: _ExactAdEMAMix(ps, beta3, alpha)),
        BNB: ("bitsandbytes", lambda ps: _bnb_optim().AdEMAMix8bit(ps, **options)),
    }
    ours = lambda ps: slkernels.optim.AdEMAMix8bit(ps, **options)  # noqa: E731
    return _Kind(ours, lambda ps: _ExactAdEMAMix(ps, beta3, alpha), peers, 3 * (1 + 4 / 256), 3)


def _bnb_optim():
    return importlib.import_module("bitsandbytes").optim


_ADAMW8BIT = _Kind(
    _ours,
    _exact_adam,
    {FUSED: (None, _fused), BNB: ("bitsandbytes", _bitsandbytes), TORCHAO: ("torchao", _torchao)},
    2 * (1 + 4 / 256),
    2,
)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _adam_bytes(params: list[torch.Tensor], state_bytes: float) -> float:
    """Parameters are read and written, gradients read, states read and written."""
    return 3.0 * nbytes(*params) + 2.0 * state_bytes


def step_problem(tensors: int, size: int, dtype: torch.dtype, kind: _Kind = _ADAMW8BIT):
    count = tensors * size

    def make(device, seed):
        gen = generator(device, seed)
        start = [uniform(size, dtype=dtype, gen=gen, scale=0.02) for _ in range(tensors)]
        grads = [uniform(size, dtype=dtype, gen=gen) for _ in range(tensors)]

        @cache
        def expected():
            params = [torch.nn.Parameter(p.double()) for p in start]
            for p, g in zip(params, grads, strict=True):
                p.grad = g.double()
            optimizer = kind.exact(params)
            for _ in range(2):
                optimizer.step()
            return [p.detach() for p in params]

        def provider(build, state_bytes: float) -> Provider:
            params = [torch.nn.Parameter(p.clone()) for p in start]
            for p, g in zip(params, grads, strict=True):
                p.grad = g  # shared: nobody writes to it
            optimizer = build(params)

            def error(_) -> float:
                optimizer.step()  # the first step, which ``run`` made, never reads a quantized state
                change = [p.detach().double() - q.double() for p, q in zip(params, start, strict=True)]
                want = [p - q.double() for p, q in zip(expected(), start, strict=True)]
                off = sum(float((c - w).square().sum()) for c, w in zip(change, want, strict=True))
                return (off / sum(float(w.square().sum()) for w in want)) ** 0.5 / kind.allowed

            return Provider(optimizer.step, error, 0.0, _adam_bytes(start, state_bytes))

        ours = count * kind.state_bytes
        providers = {OURS: provider(kind.ours, ours)}
        for name, (package, build) in kind.peers.items():
            state = ours if package else kind.peer_bytes * nbytes(*start)
            ready = package is None or _installed(package)
            providers[name] = provider(build, state) if ready else Absent("not installed")
        return providers

    return make


def direction_problem(count: int, dtype: torch.dtype):
    """adam_q_dir_: what GaLore and APOLLO take from Adam. The gradient and the bias corrections of step 1 stay."""

    def make(device, seed):
        gen = generator(device, seed)
        grad = uniform(count, dtype=dtype, gen=gen)
        step = torch.ones((), device=device)

        class Direction:
            def __init__(self, run):
                self.run, self.calls, self.out = run, 0, torch.empty_like(grad)

            def __call__(self):
                self.calls += 1
                return self.run(self.out)

            def error(self, out) -> float:
                """After k steps m is (1 - 0.9^k) g and v (1 - 0.999^k) g^2."""
                size = (1 - 0.9**self.calls) / 0.1 / ((1 - 0.999**self.calls) / 0.001) ** 0.5
                return float((out.float() - size * grad.sign().float()).square().mean()) ** 0.5 / size / 0.1

        quantized = [[torch.zeros(count, dtype=torch.uint8, device=device)] for _ in range(2)]
        scales = [[torch.zeros(-(-count // 256), device=device)] for _ in range(2)]
        moments = (quantized[0], scales[0], quantized[1], scales[1])
        m, v = (torch.zeros(count, dtype=dtype, device=device) for _ in range(2))

        def ours(out):
            slkernels.adam_q_dir_([grad], *moments, [out], step, beta1=0.9, beta2=0.999, eps=1e-8)
            return out

        def formula(out):
            """galore_torch/adamw.py, on moments of the gradient's dtype."""
            m.mul_(0.9).add_(grad, alpha=0.1)
            v.mul_(0.999).addcmul_(grad, grad, value=0.001)
            return torch.div(m / 0.1, (v / 0.001).sqrt().add_(1e-8), out=out)

        def provider(run, state_bytes: float) -> Provider:
            direction = Direction(run)
            return Provider(direction, direction.error, 0.0, 2.0 * nbytes(grad) + 2 * state_bytes)

        return {OURS: provider(ours, count * 2 * (1 + 4 / 256)), TORCH: provider(formula, nbytes(m, v))}

    return make


def norm_problem(tensors: int, size: int, dtype: torch.dtype):
    """Clipping by global norm up to the step: grad_norm_sq and clip_coef against clip_grad_norm_, which also writes."""

    def make(device, seed):
        gen = generator(device, seed)
        params = [torch.nn.Parameter(torch.empty(size, dtype=dtype, device=device)) for _ in range(tensors)]
        grads = [uniform(size, dtype=dtype, gen=gen) for _ in range(tensors)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g

        @cache
        def norm() -> float:
            return float(torch.stack([g.double().norm() for g in grads]).norm())

        # A limit above the norm, so that nobody changes the gradients.
        most = 2 * norm()

        def ours():
            norm_sq = slkernels.optim.grad_norm_sq(grads)
            slkernels.optim.clip_coef(norm_sq, most)
            return norm_sq.sqrt()

        def error(found) -> float:
            return abs(float(found) / norm() - 1) / 1e-2

        bytes = float(nbytes(*grads))
        return {
            OURS: Provider(ours, error, 0.0, bytes),
            TORCH: Provider(lambda: torch.nn.utils.clip_grad_norm_(params, most), error, 0.0, 3 * bytes),
        }

    return make


def quantize_problem(count: int, dtype: torch.dtype):
    block = 256

    def make(device, seed):
        gen = generator(device, seed)
        x = torch.randn(count, device=device, generator=gen).to(dtype)
        codes = torch.arange(256, dtype=torch.uint8, device=device)
        table = slkernels.dequantize_block(codes, torch.ones(1, device=device))
        middles = (table[1:] + table[:-1]) / 2

        def bucketize():
            rows = x.view(-1, block).float()
            scale = rows.abs().amax(1)
            return torch.bucketize(rows / scale[:, None], middles, out_int32=True).to(torch.uint8).view(-1), scale

        reference = cache(bucketize)

        def nearest_within(allowed: float):
            def error(result) -> float:
                codes, scale = result
                nearest, want_scale = reference()
                if not torch.equal(scale, want_scale):
                    return float("inf")
                y = x.view(-1, block).float() / scale[:, None]
                distance, least = ((table[c.int()].view(-1, block) - y).abs() for c in (codes, nearest))
                return float((distance - least).max()) / allowed

            return error

        error = nearest_within(_ALLOWED_EXCESS)
        bytes = nbytes(x) + count * (1 + 4 / block)
        providers = {
            OURS: Provider(lambda: slkernels.quantize_block(x), error, 0.0, bytes),
            BUCKETIZE: Provider(bucketize, error, 0.0, bytes),
        }
        if _installed(BNB):
            functional = importlib.import_module("bitsandbytes").functional

            def bnb():
                codes, state = functional.quantize_blockwise(x, blocksize=block)
                return codes, state.absmax

            providers[BNB] = Provider(bnb, nearest_within(_ALLOWED_EXCESS_BNB), 0.0, bytes)
        else:
            providers[BNB] = Absent("not installed")
        return providers

    return make


def dequantize_problem(count: int, dtype: torch.dtype):
    block = 256

    def make(device, seed):
        gen = generator(device, seed)
        codes = torch.randint(0, 256, (count,), device=device, generator=gen, dtype=torch.uint8)
        scale = torch.rand(count // block, device=device, generator=gen)
        table = slkernels.dequantize_block(
            torch.arange(256, dtype=torch.uint8, device=device), torch.ones(1, device=device)
        )

        def lookup():
            return (table[codes.int()].view(-1, block) * scale[:, None]).to(dtype).view(-1)

        def error(result) -> float:
            return 0.0 if torch.equal(result, lookup()) else float("inf")

        bytes = count * (1 + 4 / block) + count * torch.empty((), dtype=dtype).element_size()
        return {
            OURS: Provider(lambda: slkernels.dequantize_block(codes, scale, dtype=dtype), error, 0.0, bytes),
            LOOKUP: Provider(lookup, error, 0.0, bytes),
        }

    return make


def cases() -> list[Case]:
    """All cases of the family."""
    one = 4096 * 4096
    adam = (
        (1, one, torch.bfloat16, (Target(BNB, 20.0), Target(FUSED, 1 / 1.4)), True),
        (256, 8192, torch.bfloat16, (Target(FUSED, 1.0),), True),
        (1, one, torch.float32, (), False),
        (256, 8192, torch.float32, (), False),
    )
    found = []
    for tensors, size, dtype, goals, quick in adam:
        shape = f"{tensors} x {size}"
        make = step_problem(tensors, size, dtype)
        found.append(
            Case(
                "optim",
                "AdamW8bit step",
                shape,
                dtype,
                make,
                baseline=FUSED,
                targets=goals,
                items=tensors * size,
                item="parameter",
                quick=quick,
            )
        )
    goals = {"dyn8": 1.0, "cmp8": 1 / 0.85}
    kinds = [(f"adam_q_ {codec}", adam_kind(codec), goals.get(codec)) for codec in _CODECS]
    kinds += [(f"momentum_q_ {rule}", momentum_kind(rule), None) for rule in ("lion", "sgd", "nesterov", "signum")]
    for name, kind, goal in kinds:
        found.append(
            Case(
                "optim",
                name,
                f"1 x {one}",
                torch.bfloat16,
                step_problem(1, one, torch.bfloat16, kind),
                baseline=next(iter(kind.peers)),
                targets=(Target(FUSED, goal),) if goal else (Target(BNB, 20.0),) if BNB in kind.peers else (),
                items=one,
                item="parameter",
                quick=False,
            )
        )
    mix = ademamix_kind()
    one_of = {"items": one, "item": "parameter"}
    for name, make, baseline, goals in (
        ("AdEMAMix8bit step", step_problem(1, one, torch.bfloat16, mix), TORCH, (Target(BNB, 20.0),)),
        ("adam_q_dir_", direction_problem(one, torch.bfloat16), TORCH, ()),
        ("clipping", norm_problem(1, one, torch.bfloat16), TORCH, ()),
    ):
        shape = f"1 x {one}"
        found.append(Case("optim", name, shape, torch.bfloat16, make, baseline=baseline, targets=goals, **one_of))
    many = norm_problem(256, 8192, torch.bfloat16)
    found.append(Case("optim", "clipping", "256 x 8192", torch.bfloat16, many, baseline=TORCH))
    for dtype in (torch.float32, torch.bfloat16):
        for name, make, baseline in (
            ("quantize_block", quantize_problem(one, dtype), BUCKETIZE),
            ("dequantize_block", dequantize_problem(one, dtype), LOOKUP),
        ):
            found.append(Case("optim", name, f"{one}", dtype, make, baseline=baseline, quick=dtype == torch.float32))
    return found
