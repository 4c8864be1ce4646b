"""GaLoreAdamW, and what all low-rank optimizers have from their base class."""

import copy
import math

import pytest
import torch
from low_rank import Model, make_params, regression_losses, same, saved, set_grads, snapshot, train
from slkernels.optim import (
    APOLLOAdamW,
    APOLLOMiniAdamW,
    Fira,
    GaLoreAdamW,
    QGaLoreAdamW8bit,
    low_rank_groups,
    per_layer,
)
from torch import nn

# Every optimizer of the family, as make(params).
FAMILY = {
    "galore": lambda params, **o: GaLoreAdamW(params, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, **o}),
    "galore-8bit": lambda params, **o: GaLoreAdamW(
        params, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, "codec": "dyn8", "min_numel": 64, **o}
    ),
    "galore-full": lambda params, **o: GaLoreAdamW(
        params, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, "proj_type": "full", **o}
    ),
    "qgalore": lambda params, **o: QGaLoreAdamW8bit(
        params, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, "min_numel": 64, **o}
    ),
    "apollo": lambda params, **o: APOLLOAdamW(params, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, **o}),
    "apollo-mini": lambda params, **o: APOLLOMiniAdamW(params, **{"lr": 1e-3, "update_proj_gap": 3, **o}),
    "fira": lambda params, **o: Fira(params, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, **o}),
}
family = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)


# ---- the formula ----------------------------------------------------------------------------------------------------


def galore_step(W, G, left, right, m, v, t, lr, scale, wd, eps):
    """Algorithm 2 of the paper in the tensors' dtype; m and v are changed."""
    R = G if left is None else left.t() @ G
    R = R if right is None else R @ right.t()
    m.mul_(0.9).add_(R, alpha=0.1)
    v.mul_(0.999).addcmul_(R, R, value=0.001)
    N = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
    U = N if left is None else left @ N
    U = U if right is None else U @ right
    return (1 - lr * wd) * W - lr * scale * U


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_steps_are_the_papers(proj_type):
    """Every step from the same point, over two changes of the subspace, with weight decay."""
    params = make_params(((40, 24), (24, 40), (32, 32)))
    lr = float(torch.tensor(1e-2))
    optimizer = GaLoreAdamW(params, lr, rank=8, update_proj_gap=4, scale=0.5, weight_decay=0.3, proj_type=proj_type)
    moments = {}
    for step in range(1, 11):
        set_grads(params, step)
        before = [p.detach().double() for p in params]
        optimizer.step()
        for p, W in zip(params, before, strict=True):
            state = optimizer.state[p]
            left, right = (state[k].double() if k in state else None for k in ("left", "right"))
            expected_sides = {
                "std": {"right"} if p.shape[0] >= p.shape[1] else {"left"},
                "reverse_std": {"left"} if p.shape[0] >= p.shape[1] else {"right"},
                "left": {"left"},
                "right": {"right"},
                "full": {"left", "right"},
            }
            assert {k for k in ("left", "right") if k in state} == expected_sides[proj_type]
            m, v = moments.setdefault(p, [torch.zeros(state["m"].shape, dtype=torch.float64) for _ in range(2)])
            want = galore_step(W, p.grad.double(), left, right, m, v, step, lr, 0.5, 0.3, 1e-8)
            torch.testing.assert_close(p.detach().double(), want, rtol=3e-6, atol=3e-7)


def test_the_public_float32_code_differs_in_eps_only():
    """galore-torch: lr sqrt(bc2) / bc1 m / (sqrt(v) + eps), so its eps is ours times sqrt(bc2)."""
    (p,) = make_params(((32, 24),))
    optimizer = GaLoreAdamW([p], 1e-2, rank=4, scale=0.25, eps=1e-3)
    lr, W = float(torch.tensor(1e-2)), p.detach().double()
    m, v = torch.zeros(32, 4, dtype=torch.float64), torch.zeros(32, 4, dtype=torch.float64)
    for t in range(1, 6):
        set_grads([p], t)
        optimizer.step()
        P = optimizer.state[p]["right"].double()
        R = p.grad.double() @ P.t()
        m.mul_(0.9).add_(R, alpha=0.1)
        v.mul_(0.999).addcmul_(R, R, value=0.001)
        bc1, bc2 = 1 - 0.9**t, 1 - 0.999**t
        W = W - lr * math.sqrt(bc2) / bc1 * 0.25 * ((m / (v.sqrt() + 1e-3 * math.sqrt(bc2))) @ P)
        torch.testing.assert_close(p.detach().double(), W, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("subspace", ["randomized", "svd"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_subspace_is_that_of_the_leading_singular_vectors(subspace, shape):
    (p,) = make_params((shape,))
    set_grads([p], 0)
    optimizer = GaLoreAdamW([p], rank=6, subspace=subspace)
    optimizer.step()
    U, _, Vh = torch.linalg.svd(p.grad.double(), full_matrices=False)
    side, want = ("right", Vh[:6].t()) if shape[0] >= shape[1] else ("left", U[:, :6])
    got = optimizer.state[p][side].double()
    got = got.t() if side == "right" else got
    torch.testing.assert_close(got.t() @ got, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    cosines = torch.linalg.svdvals(got.t() @ want)
    assert cosines.min() > (1 - 1e-6 if subspace == "svd" else 0.99)


def test_quantized_moments_stay_close_to_float32():
    moved = []
    for codec in (None, "dyn8"):
        params = make_params(((128, 32),))
        start = params[0].detach().clone()
        optimizer = GaLoreAdamW(params, rank=32, codec=codec)
        train(optimizer, params, 10)
        state = optimizer.state[params[0]]
        assert state["m"].dtype == (torch.float32 if codec is None else torch.uint8) and state["m"].numel() == 128 * 32
        moved.append(params[0].detach() - start)
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()


def test_bytes_of_the_state():
    """2 rank max(n, m) moments and rank min(n, m) projection."""
    params = make_params(((96, 64), (64, 96)), torch.bfloat16)
    optimizer = GaLoreAdamW(params, rank=16)
    train(optimizer, params, 1)
    for p in params:
        nbytes = {k: v.nbytes for k, v in optimizer.state[p].items()}
        assert nbytes.pop("left", 0) + nbytes.pop("right", 0) == 2 * 16 * 64
        assert nbytes["m"] == nbytes["v"] == 4 * 16 * 96
        assert sum(nbytes.values()) < 2 * 4 * 16 * 96 + 64


# ---- which tensors take part ----------------------------------------------------------------------------------------


@family
def test_other_tensors_are_left_to_plain_adamw(make):
    """Vectors, tensors of three dimensions, and matrices of groups without a rank: embeddings."""
    ours, theirs = make_params(((24,), (6, 4, 3), (12, 8))), make_params(((24,), (6, 4, 3), (12, 8)))
    groups = [{"params": ours[:2]}, {"params": ours[2:], "rank": None}]
    optimizer = make(groups, lr=1e-2, weight_decay=0.1, eps=1e-8, min_numel=4096)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(8):
        for params in (ours, theirs):
            set_grads(params, step)
        optimizer.step(), reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert "calls" not in optimizer.state[p]


def test_low_rank_groups():
    model = Model()
    low, rest = low_rank_groups(model, 8, update_proj_gap=7)
    assert low["params"] == [model.attn.weight, model.mlp.weight] and low["rank"] == 8 and low["update_proj_gap"] == 7
    assert rest["rank"] is None and len(rest["params"]) == 5
    (only,) = low_rank_groups(model, 8, params=[model.embedding.weight])
    assert only["rank"] is None
    with pytest.raises(ValueError, match="no linear layer of Model has a name that contains any of"):
        low_rank_groups(model, 8, targets=["nothing"])


@family
def test_a_rank_beyond_the_matrix(make):
    params = make_params(((40, 6), (6, 40)))
    optimizer = make(params, rank=50)
    train(optimizer, params, 5)
    assert all(p.isfinite().all() for p in params)
    if isinstance(optimizer, GaLoreAdamW):  # as many vectors as there are
        full = optimizer.param_groups[0]["proj_type"] == "full"
        for p in params:
            assert optimizer.state[p]["m"].shape == ((6, 6) if full else p.shape)


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_odd_sizes(make, dtype):
    params = make_params(((43, 29), (1, 17), (17, 1), (5,), (0, 4)), dtype)
    before = [p.detach().clone() for p in params]
    optimizer = make(params)
    train(optimizer, params, 4)
    assert all(p.isfinite().all() and p.dtype == dtype for p in params)
    assert not any(map(torch.equal, params[:4], before))


# ---- the schedule of subspaces, checkpoints -------------------------------------------------------------------------


def test_subspaces_change_every_gap_steps():
    params = make_params(((40, 24),))
    optimizer = GaLoreAdamW(params, rank=4, update_proj_gap=3)
    subspaces = []
    for step in range(8):
        train(optimizer, params, 1, step)
        subspaces.append(optimizer.state[params[0]]["right"].clone())
    changes = [step for step in range(1, 8) if not torch.equal(subspaces[step], subspaces[step - 1])]
    assert changes == [3, 6]


@family
@pytest.mark.parametrize("stop", [2, 3, 4])  # just before, at and after a new subspace
def test_resume_is_bit_exact(make, stop):
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, stop)
    weights, state = [p.detach().clone() for p in params], saved(optimizer)
    train(optimizer, params, 6, stop)

    others = make_params(seed=5)
    resumed = make(others)
    train(resumed, others, 1)  # what it had is replaced
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(state)
    train(resumed, others, 6, stop)
    assert same(snapshot(optimizer, params), snapshot(resumed, others))


@family
def test_a_state_that_does_not_fit_changes_nothing(make):
    params = make_params(((40, 24), (24,)))
    optimizer = make(params)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)
    good = saved(optimizer)

    def broken(change):
        state = copy.deepcopy(good)
        change(state)
        return state

    for change, message in (
        (lambda s: s["state"][0].pop("m"), "must hold"),
        (lambda s: s["state"][0].update(m=s["state"][0]["m"][1:]), r"m of a parameter \[40, 24\] must be"),
        (lambda s: s["state"][0].update(v=s["state"][0]["v"].double()), r"v of a parameter \[40, 24\] must be"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"groups of \[1\] parameters, this optimizer of \[2\]"),
        (lambda s: s["param_groups"][0].update(update_proj_gap=0), "update_proj_gap is out of range: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(broken(change))
        assert same(before, snapshot(optimizer, params))


# ---- traps of the public code ---------------------------------------------------------------------------------------


def optimizer_of(make, model):
    return make(low_rank_groups(model, 8))


@family
def test_trap_per_layer_steps_once_an_accumulation_not_once_a_micro_batch(make):
    """GaLore issue 78, Q-GaLore 13: the hook of the public recipe steps on every micro-batch."""
    whole_model, layered_model = Model(), Model()
    whole = optimizer_of(make, whole_model)
    layered = per_layer(layered_model, lambda params: make(low_rank_groups(layered_model, 8, params=params)), 3)
    for step in range(4):
        for micro in range(3):
            start = copy.deepcopy(layered_model.state_dict())
            for model in (whole_model, layered_model):
                (model.loss(10 * step + micro) / 3).backward()
            if micro < 2:
                assert all(torch.equal(start[k], v) for k, v in layered_model.state_dict().items())
        whole.step(), whole.zero_grad(), layered.step()
        assert all(p.grad is None for p in layered_model.parameters())
        for p, q in zip(whole_model.parameters(), layered_model.parameters(), strict=True):
            assert torch.equal(p, q)
    counted = {int(s["step"]) for o in layered.optimizers for s in o.state.values()}
    assert counted == {4}


@family
def test_trap_per_layer_schedules_at_full_pace(make):
    """APOLLO issue 14: schedulers of the public recipes are built for twice the steps."""
    model = Model()
    optimizer = per_layer(model, lambda params: make(low_rank_groups(model, 8, params=params)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    start = optimizer.param_groups[0]["lr"]
    for step in range(1, 4):
        model.loss(step).backward()
        optimizer.step(), scheduler.step()
        assert {g["lr"] for o in optimizer.optimizers for g in o.param_groups} == {start * (1 - step / 4)}


@family
def test_trap_the_step_is_counted_once_and_gradients_keep_their_shape(make):
    """Seen in ports of GaLore: a counter that advances twice a step, p.grad and p.data left in the subspace's shape."""
    params = make_params()
    optimizer = make(params)
    for step in range(1, 6):
        set_grads(params, step)
        gradients = [p.grad.clone() for p in params]
        shapes = [p.shape for p in params]
        optimizer.step()
        assert all(map(torch.equal, gradients, (p.grad for p in params)))
        assert shapes == [p.shape for p in params]
        assert {float(optimizer.state[p]["step"]) for p in params} == {step}
        assert {int(optimizer.state[p]["calls"]) for p in params[:3]} == {step}


@family
def test_trap_a_step_asks_the_device_for_nothing(make):
    """On the meta device whatever waits for a value raises; the public code synchronizes once a tensor and step."""
    params = [nn.Parameter(p.detach().to("meta")) for p in make_params()]
    optimizer = make(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step(grad_scale=torch.empty((), device="meta"), found_inf=torch.empty((), device="meta"))


@family
def test_trap_all_parameters_train(make):
    """Q-GaLore's per-layer mode never updates embeddings, norms and the head."""
    model = Model()
    start = copy.deepcopy(model.state_dict())
    optimizer = per_layer(model, lambda params: make(low_rank_groups(model, 8, params=params)))
    for step in range(3):
        model.loss(step).backward()
        optimizer.step()
    assert not any(torch.equal(start[k], v) for k, v in model.state_dict().items())


# ---- mixed precision training ---------------------------------------------------------------------------------------


@family
def test_found_inf_changes_no_bit(make):
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, 5)  # the next step would draw no subspace
    before = snapshot(optimizer, params)
    for p in params:
        p.grad.fill_(float("inf"))
    optimizer.step(found_inf=torch.ones(()))
    after = snapshot(optimizer, params)
    for state in (*before[1], *after[1]):
        state.pop("calls", None)
    assert same(before, after)


@family
def test_a_skipped_step_draws_no_subspace_from_infinite_gradients(make):
    params, others = make_params(), make_params()
    optimizer, undisturbed = make(params), make(others)
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(found_inf=torch.ones(()))
    train(optimizer, params, 5), train(undisturbed, others, 5)
    assert same(snapshot(optimizer, params), snapshot(undisturbed, others))


@family
def test_grad_scale_is_divided_out(make):
    params, others = make_params(), make_params()
    plain, scaled = make(params), make(others)
    for step in range(5):
        for tensors in (params, others):
            set_grads(tensors, step)
        for p in others:
            p.grad *= 1024.0
        plain.step(), scaled.step(grad_scale=torch.tensor(1024.0))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- learning, errors -----------------------------------------------------------------------------------------------

LEARNING = {
    FAMILY["galore"]: {"lr": 6e-2, "scale": 1.0, "update_proj_gap": 10},
    FAMILY["galore-8bit"]: {"lr": 6e-2, "scale": 1.0, "update_proj_gap": 10},
    FAMILY["galore-full"]: {"lr": 1e-1, "scale": 1.0, "update_proj_gap": 10, "rank": 16},
    FAMILY["qgalore"]: {"lr": 6e-2, "scale": 1.0, "update_proj_gap": 10},
    FAMILY["apollo"]: {"lr": 3e-2},
    FAMILY["apollo-mini"]: {"lr": 1e-2},
    FAMILY["fira"]: {"lr": 3e-2, "scale": 1.0, "update_proj_gap": 10},
}


@family
def test_a_regression_converges(make):
    losses = regression_losses(lambda params: make(params, **LEARNING[make]), 300)
    assert losses[-1] < 0.02 * losses[0]


@family
def test_errors(make):
    with pytest.raises(ValueError, match="rank is out of range: 0"):
        make(make_params(), rank=0)
    with pytest.raises(ValueError, match="update_proj_gap is out of range: 0"):
        make(make_params(), update_proj_gap=0)
    with pytest.raises(ValueError, match="proj_type is out of range: diagonal"):
        make(make_params(), proj_type="diagonal")
    params = make_params(((8, 8),))
    optimizer = make(params)
    params[0].grad = torch.eye(8).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
