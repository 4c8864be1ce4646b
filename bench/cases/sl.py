"""Family sl: the SLTrain layer y = x (alpha B A + S)^T, against nn.Linear and SLTrain's own formula."""

from __future__ import annotations

from functools import cache

import slkernels
import torch
import torch.nn.functional as F

from ..case import DENSE, OURS, Case, Provider, Target, compare_with
from ..data import Sparse, generator, nbytes, sparse, uniform

SLTRAIN = "sltrain"
_ALPHA = 0.5


class SLTrainFunction(torch.autograd.Function):
    """SLTrain's formula (arXiv 2406.02214; its repository's sparse_linear.cpp) in PyTorch: the dense W is made again in
    the backward pass, and the gradients of A, B and the values are taken from a dense dW."""

    @staticmethod
    def weight(a, b, values, flat, alpha):
        w = torch.mm(b, a) * alpha
        w.view(-1).scatter_add_(0, flat, values)
        return w

    @staticmethod
    def forward(ctx, x, a, b, values, flat, alpha):
        ctx.save_for_backward(x, a, b, values, flat)
        ctx.alpha = alpha
        return F.linear(x, SLTrainFunction.weight(a, b, values, flat, alpha))

    @staticmethod
    def backward(ctx, dy):
        x, a, b, values, flat = ctx.saved_tensors
        dx = dy @ SLTrainFunction.weight(a, b, values, flat, ctx.alpha)
        dw = dy.t() @ x
        da = (b.t() @ dw) * ctx.alpha
        db = (dw @ a.t()) * ctx.alpha
        return dx, da, db, dw.view(-1).gather(0, flat), None, None


class _Layer:
    """Buffers of one layer, and what float64 says that its outputs and gradients are."""

    def __init__(self, device, seed, tokens, n, m, r, density, dtype, backward):
        gen = generator(device, seed)
        self.backward, self.dtype = backward, dtype
        self.s: Sparse = sparse(n, m, density, dtype, gen)
        self.a = uniform(r, m, dtype=dtype, gen=gen, scale=m**-0.5)
        self.b = uniform(n, r, dtype=dtype, gen=gen, scale=r**-0.5)
        self.x = uniform(tokens, m, dtype=dtype, gen=gen)
        self.dy = uniform(tokens, n, dtype=dtype, gen=gen)
        self.w = (_ALPHA * (self.b.float() @ self.a.float()) + self.s.dense(torch.float32)).to(dtype)
        for tensor in (self.x, self.a, self.b, self.s.values, self.w):
            tensor.requires_grad_(backward)
        self.reference = cache(self._reference)

    def step(self, y, *inputs):
        """y, and with ``backward`` also the gradients of the inputs."""
        return (y, *torch.autograd.grad(y, inputs, self.dy)) if self.backward else y

    def parameters(self):
        return self.x, self.a, self.b, self.s.values

    def ours(self, path):
        s = self.s
        y = slkernels.sl_linear(self.x, self.a, self.b, s.values, s.crow, s.col, _ALPHA, path=path, validate=False)
        return self.step(y, *self.parameters())

    def sltrain(self):
        return self.step(SLTrainFunction.apply(*self.parameters(), self.s.flat, _ALPHA), *self.parameters())

    def dense(self):
        return self.step(F.linear(self.x, self.w), self.x, self.w)

    def _reference(self):
        """In float64: y, and with ``backward`` the gradients of x, W, A, B and the values."""
        x, a, b, dy = (t.detach().double() for t in (self.x, self.a, self.b, self.dy))
        w = _ALPHA * (b @ a) + self.s.dense(torch.float64).detach()
        if not self.backward:
            return (F.linear(x, w),)
        dw = dy.t() @ x
        da, db = _ALPHA * (b.t() @ dw), _ALPHA * (dw @ a.t())
        return F.linear(x, w), dy @ w, dw, da, db, dw.view(-1)[self.s.flat]

    def error(self):
        return compare_with(lambda: self.reference()[:2] + self.reference()[3:], self.dtype)

    def dense_error(self):
        return compare_with(lambda: self.reference()[:3], self.dtype)

    def chain_work(self) -> tuple[float, float]:
        """(flops, bytes) that the chain path needs: three passes over every factor for forward and backward, each
        tensor read once a pass and each gradient written once."""
        tokens, (n, r), m = self.x.shape[0], self.b.shape, self.x.shape[1]
        flops = 2.0 * tokens * (r * (n + m) + self.s.nnz)
        tensors = nbytes(self.x, self.a, self.b) + self.s.nbytes
        return (3 * flops, 2 * tensors + 2 * nbytes(self.dy)) if self.backward else (flops, tensors + nbytes(self.dy))

    def dense_work(self) -> tuple[float, float]:
        flops, bytes = 2.0 * self.x.shape[0] * self.w.numel(), nbytes(self.x, self.w, self.dy)
        return (3 * flops, 2 * bytes) if self.backward else (flops, bytes)

    def sltrain_work(self) -> tuple[float, float]:
        """W is made once a pass (B A), and its gradient gives two products with the factors."""
        flops, bytes = self.dense_work()
        factors = 2.0 * self.w.numel() * self.a.shape[0]
        extra = nbytes(self.a, self.b, self.s.values, self.s.flat, self.w)
        return (flops + 4 * factors, bytes + 2 * extra) if self.backward else (flops + factors, bytes + extra)


def layer_problem(tokens, n, m, r, density, dtype, backward):
    def make(device, seed):
        layer = _Layer(device, seed, tokens, n, m, r, density, dtype, backward)
        providers = {
            OURS: Provider(lambda: layer.ours("auto"), layer.error(), *layer.chain_work()),
            DENSE: Provider(layer.dense, layer.dense_error(), *layer.dense_work()),
        }
        if backward or tokens == 1:  # a formula that makes W takes the same hundred-fold time for any few tokens
            providers[SLTRAIN] = Provider(layer.sltrain, layer.error(), *layer.sltrain_work())
        if device.type == "cuda":  # the cost model that picks between them is to be fitted to these
            for path in ("chain", "compose"):
                providers[path] = Provider(lambda path=path: layer.ours(path), layer.error(), *layer.chain_work())
        return providers

    return make


def paths_problem(tokens, n, m, r, density, dtype, backward):
    """Both paths and auto's choice, which is read from the bits of its result: each path is deterministic, and the two
    do not round alike."""

    def make(device, seed):
        layer = _Layer(device, seed, tokens, n, m, r, density, dtype, backward)

        def picked(result) -> str:
            def same(path):
                y, ours = (t if isinstance(t, tuple) else (t,) for t in (layer.ours(path), result))
                return all(torch.equal(p, q) for p, q in zip(y, ours, strict=True))

            matches = [path for path in ("chain", "compose") if same(path)]
            return matches[0] if len(matches) == 1 else "undecided"

        work = layer.chain_work()
        return {
            OURS: Provider(lambda: layer.ours("auto"), layer.error(), *work, note=picked),
            "chain": Provider(lambda: layer.ours("chain"), layer.error(), *work),
            "compose": Provider(lambda: layer.ours("compose"), layer.error(), *work),
            DENSE: Provider(layer.dense, layer.dense_error(), *layer.dense_work()),
        }

    return make


MICRO_BATCHES = 4


def micro_batches_problem(tokens, n, m, r, density, dtype):
    """A step of gradient accumulation over MICRO_BATCHES: forward and backward, with W kept or made anew."""

    def make(device, seed):
        layer = _Layer(device, seed, tokens, n, m, r, density, dtype, True)
        module = slkernels.nn.SLLinear(m, n, r, density, _ALPHA * r, path="compose", seed=0, device=device, dtype=dtype)
        s, flat = module.values, module.support.to_flat()
        with torch.no_grad():
            module.lora_A.copy_(layer.a)
            module.lora_B.copy_(layer.b)
        factors = [module.lora_A, module.lora_B, s]

        def step(f, *leaves):
            for leaf in (layer.x, *leaves):
                leaf.grad = None
            for _ in range(MICRO_BATCHES):
                f(layer.x).backward(layer.dy)
            return tuple(leaf.grad for leaf in leaves)

        def cached(accumulate):
            with slkernels.nn.cached_weights(module, accumulate):
                step(module, *factors)
            return tuple(leaf.grad for leaf in factors)

        def expected():
            a, b, x, dy = (t.detach().double() for t in (layer.a, layer.b, layer.x, layer.dy))
            dw = MICRO_BATCHES * (dy.t() @ x)
            return dw, _ALPHA * (b.t() @ dw), _ALPHA * (dw @ a.t()), dw.view(-1)[flat]

        expected = cache(expected)
        error = compare_with(lambda: expected()[1:], dtype)
        flops, size = layer.dense_work()
        made = 2.0 * n * m * r
        # W made once; its gradient summed and taken apart once
        least = MICRO_BATCHES * flops + 3 * made, MICRO_BATCHES * size
        each = MICRO_BATCHES * (flops + 2 * made) + made, MICRO_BATCHES * size
        sltrain = MICRO_BATCHES * (flops + 4 * made), MICRO_BATCHES * size
        return {
            OURS: Provider(lambda: cached(True), error, *least),
            "W kept": Provider(lambda: cached(False), error, *each),
            "W made anew": Provider(lambda: step(module, *factors), error, *sltrain),
            DENSE: Provider(
                lambda: step(lambda x: F.linear(x, layer.w), layer.w),
                compare_with(lambda: expected()[:1], dtype),
                MICRO_BATCHES * flops,
                MICRO_BATCHES * size,
            ),
            SLTRAIN: Provider(
                lambda: step(lambda x: SLTrainFunction.apply(x, *factors, flat, _ALPHA), *factors), error, *sltrain
            ),
        }

    return make


SWEEP_TOKENS = (1, 8, 64, 512, 2048, 8192)
SWEEP_LAYERS = (  # n, m, r, density
    (1024, 1024, 64, 0.03),
    (1024, 1024, 256, 0.01),
    (1024, 1024, 256, 0.03),
    (1024, 1024, 256, 0.1),
    (1024, 1024, 512, 0.03),
    (2736, 1024, 256, 0.03),
)


def sweep() -> list[Case]:
    """Both paths against tokens, rank and density: what docs/paths.md is made of. Not in --quick."""
    found = []
    for n, m, r, density in SWEEP_LAYERS:
        for tokens in SWEEP_TOKENS:
            for mode, backward in (("fwd", False), ("fwd+bwd", True)):
                parameters = {"T": tokens, "n": n, "m": m, "r": r, "density": density, "mode": mode}
                make = paths_problem(tokens, n, m, r, density, torch.float32, backward)
                shape = f"T={tokens} {m}→{n} r={r} {density:.0%}"
                case = Case("sl", f"path {mode}", shape, torch.float32, make, parameters=parameters, devices=("cpu",))
                found.append(case)
    return found


# n, m, r, density of the LLaMA shapes that SLTrain trains (arXiv 2406.02214, table 1 and its repository's configs): the
# square projections and the widest one of 60M, 350M, 1B and 7B. 1B's intermediate size 5461 is odd.
LLAMA_LAYERS = {
    "60M": ((512, 512, 128, 0.03), (1376, 512, 128, 0.03)),
    "350M": ((1024, 1024, 256, 0.03), (2736, 1024, 256, 0.03)),
    "1B": ((2048, 2048, 512, 0.03), (5461, 2048, 512, 0.03)),
    "7B": ((4096, 4096, 1024, 0.05), (11008, 4096, 1024, 0.05)),
}
LLAMA_TOKENS = (1, 8, 64, 2048, 16384)
_QUICK_LAYERS = ("350M", "7B")


def llama() -> list[Case]:
    """The layers of LLaMA on a GPU, in bfloat16: forward alone for few tokens, forward and backward for many."""
    found = []
    for model, layers in LLAMA_LAYERS.items():
        for n, m, r, density in layers:
            for tokens in LLAMA_TOKENS:
                backward = tokens >= 2048
                goals = (Target(DENSE, 1.6),) if model == "7B" and tokens <= 8 and n == m else ()
                if backward and model == "7B":
                    # dense's time times 1.05 (1 + 4 r / 3 T), and 1.2 times as fast as SLTrain's formula
                    goals = (Target(DENSE, 1 / (1.05 * (1 + 4 * r / (3 * tokens)))), Target(SLTRAIN, 1.2))
                found.append(
                    Case(
                        "sl",
                        f"{model} sl_linear {'fwd+bwd' if backward else 'fwd'}",
                        f"T={tokens} {m}→{n} r={r} {density:.0%}",
                        torch.bfloat16,
                        layer_problem(tokens, n, m, r, density, torch.bfloat16, backward),
                        targets=goals,
                        quick=model in _QUICK_LAYERS,
                        devices=("cuda",),
                    )
                )
    return found


def cases() -> list[Case]:
    """All cases of the family."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        full = dtype == torch.float32
        for n, goals in (
            (1024, (Target(DENSE, 1.3),)),
            (2736, (Target(DENSE, 1.6), Target(SLTRAIN, 1.6))),
        ):
            make = layer_problem(4096, n, 1024, 256, 0.03, dtype, backward=True)
            found.append(
                Case(
                    "sl",
                    "sl_linear fwd+bwd",
                    f"T=4096 1024→{n} r=256 3%",
                    dtype,
                    make,
                    targets=goals if full else (),
                    quick=full,
                    devices=("cpu",),
                )
            )
        for tokens in (1, 2, 4, 8):
            make = layer_problem(tokens, 4096, 4096, 1024, 0.05, dtype, backward=False)
            shape = f"T={tokens} 4096→4096 r=1024 5%"
            goals = (Target(DENSE, 1.5),) if full else ()
            quick = tokens == 1 or (full and tokens == 8)
            case = Case("sl", "sl_linear decode", shape, dtype, make, targets=goals, quick=quick, devices=("cpu",))
            found.append(case)
    for n, m, r, density, on in ((1024, 1024, 256, 0.03, ("cpu", "cuda")), (4096, 4096, 1024, 0.05, ("cuda",))):
        for dtype in (torch.float32, torch.bfloat16) if "cpu" in on else (torch.bfloat16,):
            make = micro_batches_problem(2048, n, m, r, density, dtype)
            shape = f"{MICRO_BATCHES} x T=2048 {m}→{n} r={r} {density:.0%}"
            goals = (Target(SLTRAIN, 1.4),) if on == ("cuda",) else ()
            found.append(Case("sl", "SLLinear cached_weights", shape, dtype, make, targets=goals, devices=on))
    return found + llama() + sweep()
