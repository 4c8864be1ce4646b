"""slkernels.optim.per_layer: updates inside backward."""

import copy
import gc
import io
import weakref

import pytest
import torch
from slkernels.optim import AdamW8bit, per_layer
from torch import nn


class Tied(nn.Module):
    """An embedding tied to the head, a module that some batches skip, and one that none uses."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 128)
        self.first = nn.Linear(128, 96)
        self.norm = nn.LayerNorm(96)
        self.sometimes = nn.Linear(96, 96)
        self.never = nn.Linear(7, 7)
        self.second = nn.Linear(96, 128, bias=False)
        self.head = nn.Linear(128, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens, use):
        x = self.norm(torch.relu(self.first(self.embedding(tokens))))
        if use:
            x = x + self.sometimes(x)
        return self.head(self.second(x))


def make_model(seed=0):
    torch.manual_seed(seed)
    return Tied()


def make_optimizer(params):
    return AdamW8bit(params, lr=1e-2, weight_decay=0.1)


def backward(model, seed, use=True):
    tokens = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens, use).flatten(0, 1), tokens.roll(1, 1).flatten())
    loss.backward()
    return loss


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)


def use_sometimes(step, micro):
    return (step, micro) not in {(1, 0), (2, 0), (2, 1), (2, 2)}  # in some passes of step 1, in none of step 2


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("make", [make_optimizer, lambda ps: torch.optim.AdamW(ps, lr=1e-2)], ids=["8bit", "torch"])
def test_same_bits_as_a_global_step(make, accumulation):
    a, b = make_model(), make_model()
    whole, layered = make([p for p in a.parameters() if p.requires_grad]), per_layer(b, make, accumulation)
    whole_lr, layered_lr = schedule(whole), schedule(layered)
    for step in range(5):
        for micro in range(accumulation):
            start = copy.deepcopy(b.state_dict())
            for model in (a, b):
                backward(model, 10 * step + micro, use_sometimes(step, micro))
            if micro < accumulation - 1:  # nothing moves before the boundary
                assert all(torch.equal(start[k], v) for k, v in b.state_dict().items())
        whole.step(), whole.zero_grad(), whole_lr.step()
        layered.step(), layered_lr.step()
        assert same_weights(a, b), step
        assert all(p.grad is None for p in b.parameters())
        rates = [g["lr"] for g in layered.param_groups]  # full pace, in every inner optimizer
        assert rates == [whole.param_groups[0]["lr"]] * len(rates)
        assert all(o.param_groups[0]["lr"] == rates[0] for o in layered.optimizers)
    assert not same_weights(a, make_model())


def test_gradients_are_freed_during_backward():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    alive, most = [], 0

    def watch(p):  # registered before per_layer's hooks, so it runs before them
        nonlocal most
        alive.append(weakref.ref(p.grad))
        most = max(most, sum(r() is not None for r in alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)
    optimizer = per_layer(model, make_optimizer)
    gc.disable()
    try:
        model(torch.randn(2, 64)).sum().backward()
    finally:
        gc.enable()
    assert len(alive) == 12 and most <= 2
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_one_call_a_module(monkeypatch):
    calls = []
    from slkernels.optim import adam

    real = adam.adam_q_

    def counted(params, *args, **options):
        calls.append(len(params))
        real(params, *args, **options)

    monkeypatch.setattr(adam, "adam_q_", counted)
    model = make_model()
    optimizer = per_layer(model, make_optimizer)
    backward(model, 0)
    assert sorted(calls) == [1, 1, 2, 2, 2]  # embedding = head, second; first, norm, sometimes
    assert len(optimizer.optimizers) == 6
    optimizer.step()
    assert len(calls) == 5


# ---- clipping -------------------------------------------------------------------------------------------------------


def torch_adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("make", [make_optimizer, torch_adamw], ids=["8bit", "torch"])
def test_global_norm_clip_in_two_passes(make, accumulation):
    a, b = make_model(), make_model()
    whole = make([p for p in a.parameters() if p.requires_grad])
    layered = per_layer(b, make, accumulation, max_grad_norm=0.3)
    for step in range(4):
        for micro in range(accumulation):
            backward(a, 10 * step + micro, use_sometimes(step, micro))
        before = copy.deepcopy(b)
        with layered.measure():
            for micro in range(accumulation):
                backward(b, 10 * step + micro, use_sometimes(step, micro))
        assert same_weights(b, before) and all(p.grad is None for p in b.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in a.parameters() if p.grad is not None])
        torch.testing.assert_close(layered.grad_norm, norm, rtol=1e-5, atol=0)
        divisor = layered._divisor.clone()
        torch.testing.assert_close(divisor, norm / 0.3, rtol=1e-5, atol=0)
        assert norm > 0.3
        for p in a.parameters():
            if p.grad is not None and make is torch_adamw:
                p.grad.div_(divisor)
        for micro in range(accumulation):
            backward(b, 10 * step + micro, use_sometimes(step, micro))
        if make is make_optimizer:
            whole.step(grad_scale=divisor)
        else:
            whole.step()
        layered.step(), whole.zero_grad()
        assert same_weights(a, b), step


def test_both_passes_draw_the_same_random_numbers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    optimizer = per_layer(model, make_optimizer, max_grad_norm=1.0)
    drawn = []
    model[1].register_forward_hook(lambda _, __, y: drawn.append(y == 0))
    x = torch.randn(4, 64)
    for _ in range(2):
        with optimizer.measure():
            model(x).square().sum().backward()
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("make", [make_optimizer, torch_adamw], ids=["8bit", "torch"])
def test_clip_by_the_norm_of_each_module(make):
    a, b = make_model(), make_model()
    modules = [m for m in a.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    whole = make([p for p in a.parameters() if p.requires_grad])
    layered = per_layer(b, make, max_layer_norm=0.1)
    norms = []
    for step in range(3):
        backward(a, step), backward(b, step)
        for module in modules[:-1]:  # the last one is the head, whose weight is the embedding's
            norms.append(float(nn.utils.clip_grad_norm_(module.parameters(recurse=False), 0.1)))
        for optimizer in (whole, layered):
            optimizer.step(), optimizer.zero_grad()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    assert min(norms) < 0.1 < max(norms)


def test_an_infinite_norm_skips_the_step():
    for options in ({"max_grad_norm": 1.0}, {"max_layer_norm": 1.0}):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        optimizer = per_layer(model, make_optimizer, **options)
        before = copy.deepcopy(model)

        def run(model=model):
            loss = model(torch.ones(1, 64)).sum()
            (loss * float("inf")).backward()

        if "max_grad_norm" in options:
            with optimizer.measure():
                run()
        run()
        optimizer.step()
        assert same_weights(model, before), options
        assert not optimizer.optimizers[0].nonfinite


def test_clipping_errors():
    model = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="either by max_grad_norm or by max_layer_norm"):
        per_layer(model, make_optimizer, max_grad_norm=1.0, max_layer_norm=1.0)
    optimizer = per_layer(model, make_optimizer, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="run this step's passes under measure"):
        model(torch.ones(1, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="no backward pass ran under measure"), optimizer.measure():
        pass
    with pytest.raises(ZeroDivisionError), optimizer.measure():  # leaves nothing behind
        model(torch.ones(1, 64)).sum().backward()
        raise ZeroDivisionError
    assert optimizer._norms is None and model.weight.grad is None
    optimizer.detach()
    with (
        pytest.raises(RuntimeError, match="nothing to measure without max_grad_norm"),
        per_layer(model, make_optimizer).measure(),
    ):
        pass


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_save_and_resume_in_the_middle_of_an_accumulation(stop):
    def run(model, optimizer, scheduler, begin, end):
        for i in range(begin, end):
            backward(model, i, use_sometimes(*divmod(i, 3)))
            if i % 3 == 2:
                optimizer.step(), scheduler.step()

    a = make_model()
    optimizer = per_layer(a, make_optimizer, 3)
    scheduler = schedule(optimizer)
    run(a, optimizer, scheduler, 0, 6 + stop)
    buffer = io.BytesIO()
    torch.save([a.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
    run(a, optimizer, scheduler, 6 + stop, 15)

    buffer.seek(0)
    weights, state, schedule_state = torch.load(buffer)
    b = make_model(1)
    b.load_state_dict(weights)
    resumed = per_layer(b, make_optimizer, 3)
    resumed_scheduler = schedule(resumed)
    resumed.load_state_dict(state)
    resumed_scheduler.load_state_dict(schedule_state)
    run(b, resumed, resumed_scheduler, 6 + stop, 15)
    assert same_weights(a, b)


def test_a_short_last_accumulation_is_stepped():
    a, b = make_model(), make_model()
    whole, layered = make_optimizer([p for p in a.parameters() if p.requires_grad]), per_layer(b, make_optimizer, 4)
    for model, optimizer in ((a, whole), (b, layered)):
        backward(model, 0), backward(model, 1)
        optimizer.step(), optimizer.zero_grad()
    assert same_weights(a, b) and not same_weights(a, make_model())


def test_zero_grad_discards_what_is_waiting():
    a, b = make_model(), make_model()
    whole, layered = make_optimizer([p for p in a.parameters() if p.requires_grad]), per_layer(b, make_optimizer, 2)
    backward(b, 7)
    layered.zero_grad()
    for model, optimizer in ((a, whole), (b, layered)):
        backward(model, 0), backward(model, 1)
        optimizer.step(), optimizer.zero_grad()
    assert same_weights(a, b)


def test_detach_leaves_an_ordinary_optimizer():
    a, b = make_model(), make_model()
    whole, layered = make_optimizer([p for p in a.parameters() if p.requires_grad]), per_layer(b, make_optimizer)
    layered.detach()
    for model, optimizer in ((a, whole), (b, layered)):
        before = copy.deepcopy(model)
        backward(model, 0)
        assert same_weights(model, before)
        optimizer.step(), optimizer.zero_grad()
    assert same_weights(a, b)


def test_closure():
    model = make_model()
    optimizer = per_layer(model, make_optimizer)
    losses = [optimizer.step(lambda: backward(model, 0)).item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_errors():
    model = make_model()
    optimizer = per_layer(model, make_optimizer)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="after it had been updated in this step"):
        backward(model, 1)
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1"):
        per_layer(make_model(), make_optimizer, 0)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        per_layer(nn.ReLU(), make_optimizer)
    with pytest.raises(RuntimeError, match="cannot be added later"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="the state is of 1 modules with 2 parameters"):
        optimizer.load_state_dict(per_layer(nn.Linear(3, 3), make_optimizer).state_dict())
    other = make_model()
    waiting = per_layer(other, make_optimizer, 2)
    backward(other, 0)
    with pytest.raises(ValueError, match="in the middle of 2 accumulation steps, here accumulation_steps is 1"):
        per_layer(make_model(), make_optimizer).load_state_dict(waiting.state_dict())
