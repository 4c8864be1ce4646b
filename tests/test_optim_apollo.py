"""APOLLOAdamW and Fira against the formulas of their papers; what they share with the family: test_optim_galore.py."""

import math

import pytest
import torch
from low_rank import make_params, saved, set_grads, train
from slkernels.optim import APOLLOAdamW, APOLLOMiniAdamW, Fira
from slkernels.reference.project import rand_matrix


class Moments:
    """m / (sqrt(v) + eps) as the papers write it, and the bias correction that the public code puts on lr."""

    def __init__(self, shape):
        self.m, self.v, self.t = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), 0

    def __call__(self, R, eps):
        self.t += 1
        self.m.mul_(0.9).add_(R, alpha=0.1)
        self.v.mul_(0.999).addcmul_(R, R, value=0.001)
        bc1, bc2 = 1 - 0.9**self.t, 1 - 0.999**self.t
        # eps stands beside the root of the corrected v here, as in Adam's paper.
        return self.m / (self.v.sqrt() + eps * math.sqrt(bc2)), math.sqrt(bc2) / bc1


def limited(U, last, gamma=1.01):
    """The norm-growth limiter: (U, its norm)."""
    norm = U.norm()
    if last is not None and norm > gamma * last:
        U, norm = U * (gamma * last / norm), gamma * last
    return U, norm


def scaling(N, R, shape, kind):
    if kind == "tensor":
        return N.norm() / (R.norm() + 1e-8)
    dim = 0 if shape[0] < shape[1] else 1
    return N.norm(dim=dim, keepdim=True) / (R.norm(dim=dim, keepdim=True) + 1e-8)


def grow(params, step):
    """Gradients that jump in size, so that the limiter acts at some steps and at others not."""
    set_grads(params, step)
    for p in params:
        p.grad *= 2.0 if step % 3 else 0.5


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_apollo_steps_are_the_papers(kind, front):
    """Every step from the same point, over two changes of the projection, with weight decay and an acting limiter."""
    params = make_params(((40, 24), (24, 40), (32, 32)))
    lr, scale, wd, seed = float(torch.tensor(1e-2)), 4.0, 0.3, 77
    options = {"rank": 6, "update_proj_gap": 4, "scale": scale, "scale_type": kind, "scale_front": front, "seed": seed}
    optimizer = APOLLOAdamW(params, lr, weight_decay=wd, **options)
    moments, norms, acted = {}, {}, 0
    for step in range(10):
        grow(params, step)
        before = [p.detach().double() for p in params]
        optimizer.step()
        for p, W in zip(params, before, strict=True):
            G, tall = p.grad.double(), p.shape[0] >= p.shape[1]
            P = rand_matrix(seed + step // 4, 6, min(p.shape))
            R = G @ P.t() if tall else P @ G
            N, correction = moments.setdefault(p, Moments(R.shape))(R, 1e-8)
            free = G * scaling(N, R, p.shape, kind)
            U, norms[p] = limited(free, norms.get(p))
            acted += not torch.equal(U, free)
            want = (1 - lr * wd) * W - lr * correction * math.sqrt(scale) * U
            torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-6)
    assert 3 < acted < 27


@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_fira_steps_are_the_papers(proj_type):
    params = make_params(((40, 24), (24, 40)))
    lr, scale, wd = float(torch.tensor(1e-2)), 0.5, 0.3
    optimizer = Fira(params, lr, rank=6, update_proj_gap=4, scale=scale, weight_decay=wd, proj_type=proj_type)
    moments, norms, acted = {}, {}, 0
    for step in range(10):
        grow(params, step)
        before = [p.detach().double() for p in params]
        optimizer.step()
        for p, W in zip(params, before, strict=True):
            G, state = p.grad.double(), optimizer.state[p]
            right = "right" in state
            P = state["right" if right else "left"].double()
            R = G @ P.t() if right else P.t() @ G
            back = (lambda X, P=P: X @ P) if right else (lambda X, P=P: P @ X)
            N, correction = moments.setdefault(p, Moments(R.shape))(R, 1e-8)
            dim = 1 if right else 0
            s = N.norm(dim=dim, keepdim=True) / (R.norm(dim=dim, keepdim=True) + 1e-8)
            free = s * (G - back(R))
            U, norms[p] = limited(free, norms.get(p))
            acted += not torch.equal(U, free)
            want = (1 - lr * wd) * W - lr * correction * scale * (back(N) + U)
            torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-5)
    assert 2 < acted < 18


def test_without_a_limiter():
    updates = []
    for limiter in (0.0, 1.01):
        params = make_params(((32, 24),))
        optimizer = APOLLOAdamW(params, rank=6, limiter=limiter)
        train(optimizer, params, 1)
        start = params[0].detach().clone()
        set_grads(params, 1)
        params[0].grad *= 8
        optimizer.step()
        updates.append((params[0].detach() - start).norm())
    assert updates[0] > 1.1 * updates[1]


def test_the_projection_is_not_stored():
    """A checkpoint holds a seed; two optimizers with the same seed project alike, with another one they do not."""
    (p,) = make_params(((64, 48),))
    optimizer = APOLLOAdamW([p], rank=16, seed=3, update_proj_gap=2)
    train(optimizer, [p], 5)
    state = saved(optimizer)["state"][0]
    assert int(state["seed"]) == 3 + 2
    assert {k for k, v in state.items() if v.numel() > 1} == {"m", "v"} and state["m"].shape == (64, 16)
    moved = []
    for seed in (3, 3, 4):
        (q,) = make_params(((64, 48),))
        train(APOLLOAdamW([q], rank=16, seed=seed), [q], 2)
        moved.append(q.detach())
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])


def test_mini_keeps_two_vectors():
    params = make_params(((64, 48), (48, 64)))
    optimizer = APOLLOMiniAdamW(params)
    train(optimizer, params, 2)
    group = optimizer.param_groups[0]
    assert (group["rank"], group["scale"], group["scale_type"]) == (1, 128.0, "tensor")
    for p in params:
        assert sum(v.nbytes for v in optimizer.state[p].values()) < 2 * 4 * 64 + 64


def test_zero_gradients_do_not_hold_the_next_step():
    """A limiter that remembers a norm of 0 would let updates grow from nothing at 1 % a step."""
    for make in (APOLLOAdamW, Fira):
        (p,) = make_params(((32, 24),))
        optimizer = make([p], rank=4)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        start = p.detach().clone()
        train(optimizer, [p], 1)
        assert (p.detach() - start).abs().max() > 1e-4


def test_errors():
    for options, message in (
        ({"scale": 0.0}, "scale is out of range: 0.0"),
        ({"scale_type": "row"}, "scale_type is out of range: row"),
        ({"limiter": 0.5}, "limiter is out of range: 0.5"),
        ({"proj_type": "full"}, "proj_type is out of range: full"),
        ({"codec": "dyn9"}, "codec is out of range: dyn9"),
    ):
        with pytest.raises(ValueError, match=message):
            APOLLOAdamW(make_params(), **options)
    with pytest.raises(ValueError, match="proj_type is out of range: full"):
        Fira(make_params(), proj_type="full")
