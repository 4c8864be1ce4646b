"""The quantized optimizers inside training: compiled steps, CUDA graphs, NaN, schedules, and the traps that other
libraries' users fell into, each named after what went wrong there."""

import copy

import pytest
import torch
from slkernels.optim import AdamW8bit, per_layer
from test_optim import same_bits
from test_optim_adamw8bit import make_params, set_grads
from test_optim_family import ALL, make
from torch import nn

SIZES = ((64, 128), (70, 100), (5001,), (40,))


def every(optimizer):
    return [t for s in optimizer.state.values() for t in s.values()]


def assert_same(a_params, a, b_params, b):
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(a_params, b_params, strict=True))
    assert all(same_bits(x, y) for x, y in zip(every(a), every(b), strict=True))


# ---- torch.compile --------------------------------------------------------------------------------------------------


@ALL
def test_compiled_step_is_one_graph_with_the_same_bits(name):
    """fullgraph: nothing in a step reads a tensor on the host. After the first step, which makes the state, one graph
    serves all while lr, a tensor, changes."""
    lr_a, lr_b = torch.tensor(1e-2), torch.tensor(1e-2)
    ours, compiled = make_params(SIZES), make_params(SIZES)
    a, b = make(name, ours, max_grad_norm=1.0), make(name, compiled, max_grad_norm=1.0)
    for optimizer, lr in ((a, lr_a), (b, lr_b)):
        for group in optimizer.param_groups:
            group["lr"] = lr
    torch._dynamo.reset()
    step = torch.compile(b.step, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for i in range(5):
        lr_a.fill_(1e-2 / (i + 1)), lr_b.fill_(1e-2 / (i + 1))
        set_grads(ours, i), set_grads(compiled, i)
        a.step(), step()
        assert_same(ours, a, compiled, b)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))

    def forward(self, x):
        return self.layers(x).square().mean()


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace backward")
@pytest.mark.parametrize("name", ["AdamW8bit", "Muon8bit"])
def test_compiled_training_step_is_one_graph(name):
    """Forward, backward, clipping and step."""
    models = Network(), Network()
    optimizers = [make(name, list(m.parameters()), max_grad_norm=0.1, min_numel=0) for m in models]
    x = torch.randn(8, 64)

    def train(model, optimizer):
        loss = model(x)
        loss.backward()
        optimizer.step()
        for p in model.parameters():  # zero_grad() breaks the graph
            p.grad = None
        return loss.detach()

    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        losses = [(train(models[0], optimizers[0]), compiled(models[1], optimizers[1])) for _ in range(6)]
    for eager, traced in losses:
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=0)
    assert losses[-1][1] < losses[0][1]


def test_inductor_compiles_a_step():
    params, compiled = make_params(SIZES), make_params(SIZES)
    a, b = AdamW8bit(params, max_grad_norm=1.0), AdamW8bit(compiled, max_grad_norm=1.0)
    set_grads(params, 0), set_grads(compiled, 0)
    a.step(), b.step()  # makes the state
    torch._dynamo.reset()
    step = torch.compile(b.step, fullgraph=True)
    for i in range(1, 4):
        set_grads(params, i), set_grads(compiled, i)
        a.step(), step()
    assert_same(params, a, compiled, b)


@pytest.mark.cuda
@ALL
def test_cuda_graph_replays_with_changing_lr(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def build():
        params = [nn.Parameter(p.detach().cuda()) for p in make_params(SIZES, torch.bfloat16)]
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = make(name, params, max_grad_norm=1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in params:
            p.grad = torch.zeros_like(p)
        return params, optimizer, lr

    def feed(params, lr, i):
        lr.fill_(1e-2 / (i + 1))
        for k, p in enumerate(params):
            p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + k)))

    (a_params, a, a_lr), (b_params, b, b_lr) = build(), build()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # makes the state
        feed(b_params, b_lr, 0)
        b.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            b.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i in range(5):
        feed(a_params, a_lr, i)
        a.step()
        if i:
            feed(b_params, b_lr, i)
            graph.replay()
    assert_same(a_params, a, b_params, b)


# ---- NaN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@ALL
def test_one_bad_gradient_element_is_counted_and_erases_nothing(name, bad):
    """bitsandbytes' GPU kernel zeroes the state of such an element, its block-wise maximum becomes NaN on the CPU. Here
    its moments stay, its block's too, and the device counts it."""
    params, clean = make_params(SIZES), make_params(SIZES)
    a, b = make(name, params), make(name, clean)
    for step in range(3):
        set_grads(params, step), set_grads(clean, step)
        for p, q in zip(params, clean, strict=True):  # not what sets a scale
            p.grad.view(-1)[5] = q.grad.view(-1)[5] = 0.0
        if step == 2:
            params[1].grad.view(-1)[5] = bad
            assert int(a.nonfinite) == 0
        a.step(), b.step()
    assert a.nonfinite.dtype == torch.int64 and int(a.nonfinite) == 1 and int(b.nonfinite) == 0
    for p, q in zip(params, clean, strict=True):
        for key, value in a.state[p].items():
            other = b.state[q][key]
            if value.dtype == torch.uint8 and value.shape == p.shape and p is params[1]:
                value, other = (x.view(-1)[torch.arange(x.numel()) != 5] for x in (value, other))
            if p is not params[1] or (value.shape == other.shape and "scale" in key):
                assert same_bits(value, other), key
        if name == "Muon8bit" and p.dim() == 2:
            assert p.isfinite().all()
        else:
            others = torch.arange(p.numel()) != (5 if p is params[1] else -1)
            assert same_bits(p.detach().view(-1)[others], q.detach().view(-1)[others])
    set_grads(params, 7)
    a.step()
    assert all(t.isfinite().all() for t in every(a) if t.is_floating_point())


# ---- clipping -------------------------------------------------------------------------------------------------------


@ALL
def test_clipping_is_dividing_the_gradients(name):
    params, divided = make_params(SIZES), make_params(SIZES)
    a, b = make(name, params, max_grad_norm=0.5), make(name, divided)
    for step in range(4):
        set_grads(params, step), set_grads(divided, step)
        kept = [p.grad.clone() for p in params]
        a.step()
        assert all(same_bits(p.grad, g) for p, g in zip(params, kept, strict=True))  # read only
        norm = torch.stack([g.double().square().sum() for g in kept]).sum().sqrt()
        torch.testing.assert_close(a.grad_norm.double(), norm, rtol=1e-6, atol=0)
        b.step(grad_scale=((norm + 1e-6) / 0.5).clamp(min=1).float())
    for p, q in zip(params, divided, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3 if name == "Muon8bit" else 1e-4)


def test_clipping_after_a_grad_scaler_is_of_unscaled_gradients():
    params, plain = make_params(SIZES), make_params(SIZES)
    a, b = AdamW8bit(params, max_grad_norm=0.5), AdamW8bit(plain, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        set_grads(params, step), set_grads(plain, step)
        for p in params:
            p.grad.mul_(1024)
        scaler.step(a), scaler.update(), b.step()
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_nan_norm_skips_the_step_and_does_not_count_it():
    params = make_params(SIZES)
    optimizer = AdamW8bit(params, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params], [t.clone() for t in every(optimizer)]
    set_grads(params, 1)
    params[2].grad[17] = float("nan")
    optimizer.step()
    assert optimizer.grad_norm.isnan() and int(optimizer.nonfinite) == 0
    assert all(same_bits(p.detach(), q) for p, q in zip(params, before[0], strict=True))
    assert all(same_bits(t, u) for t, u in zip(every(optimizer), before[1], strict=True))


# ---- traps ----------------------------------------------------------------------------------------------------------


@ALL
def test_trap_zero_gradients_drift(name):
    """Where 0 has no code (unsloth-zoo 962; bitsandbytes on a CPU), parameters without a gradient wander."""
    params = make_params(((64, 128), (5001,)))
    optimizer = make(name, params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in params]
    for _ in range(500 if name == "AdamW8bit" else 60):
        for p in params:
            p.grad = torch.zeros_like(p)
            p.grad.view(-1)[::256] = 1.0  # the blocks' scales are not zero
        optimizer.step()
    for p, start in zip(params, before, strict=True):
        others = torch.arange(p.numel()) % 256 != 0
        if name == "Muon8bit" and p.dim() == 2:
            continue  # the step mixes a matrix' elements
        assert same_bits(p.detach().view(-1)[others], start.view(-1)[others])
        assert (p.detach() - start).abs().max() > 1e-2


@ALL
def test_trap_small_parameters_never_move(name):
    """bitsandbytes >= 0.50 under old positional arguments (unsloth 10874): tensors below min_8bit_size got updates of
    norm 0. Here options are keywords, and every size moves."""
    params = make_params(((64, 128), (40,), (4095,), (4096,), (1,)))
    optimizer = make(name, params)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        set_grads(params, step)
        params[4].grad.fill_(1.0)
        optimizer.step()
        assert all(not same_bits(p.detach(), q) for p, q in zip(params, before, strict=True))
    positional = {"Muon8bit": 10, "AdEMAMix8bit": 9, "SGD8bit": 6, "SGD8bit-nesterov": 6, "Lion8bit": 5}
    with pytest.raises(TypeError, match="positional argument"):
        type(optimizer)(params, *[0.1] * positional.get(name, 6))
    with pytest.raises(TypeError, match="unexpected arguments: percentile_clipping"):
        type(optimizer)(params, percentile_clipping=100)


@ALL
def test_trap_step_is_counted_twice(name):
    """unsloth 10842. Once a step, whatever the number of groups and launches."""
    params = make_params(SIZES) + make_params(SIZES, torch.bfloat16)
    options = {} if name == "Muon8bit" else {"master_bits": 8}  # master weights of half of them: two launches
    optimizer = make(name, params, **options)
    for step in range(1, 4):
        set_grads(params, step)
        optimizer.step()
        assert {float(optimizer.state[p]["step"]) for p in params} == {step}


@ALL
def test_trap_gradients_are_left_in_another_shape(name):
    """unsloth 10878: p.grad kept the projected shape. A step reads gradients and changes nothing about them."""
    params = make_params(SIZES)
    optimizer = make(name, params)
    set_grads(params, 0)
    grads = [(p.grad, p.grad.clone()) for p in params]
    optimizer.step()
    for p, (grad, copied) in zip(params, grads, strict=True):
        assert p.grad is grad and same_bits(grad, copied)


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.head = nn.Embedding(50, 96), nn.LayerNorm(96), nn.Linear(96, 50, bias=False)
        self.block = nn.Linear(96, 96)

    def forward(self, tokens):
        return self.head(self.norm(self.block(self.embedding(tokens))))


def per_layer_of(name, model, accumulation=1):
    return per_layer(model, lambda params: make(name, params), accumulation)


def language_loss(model, seed):
    tokens = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


@ALL
def test_trap_per_layer_steps_on_every_micro_batch(name):
    """GaLore 78, Q-GaLore 13, SLTrain: with accumulation, per-layer hooks stepped after each backward pass."""
    a, b = Language(), Language()
    whole, layered = make(name, list(a.parameters())), per_layer_of(name, b, accumulation=4)
    for step in range(3):
        start = copy.deepcopy(b.state_dict())
        for micro in range(4):
            assert all(torch.equal(start[k], v) for k, v in b.state_dict().items()), "moved before the last pass"
            for model in (a, b):
                language_loss(model, 4 * step + micro).backward()
        whole.step(), whole.zero_grad(), layered.step()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def test_trap_per_layer_schedules_at_half_pace():
    """APOLLO 14, and GaLore, Q-GaLore, SLTrain: the schedules were made for twice the steps."""
    model = Language()
    layered = per_layer_of("AdamW8bit", model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(layered, T_max=8)
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-2)
    want = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=8)
    for step in range(8):
        language_loss(model, step).backward()
        used = {group["lr"] for optimizer in layered.optimizers for group in optimizer.param_groups}
        assert used == {reference.param_groups[0]["lr"]}
        layered.step(), scheduler.step(), reference.step(), want.step()
    assert max(used) < 0.05 * 1e-2


@ALL
def test_trap_per_layer_leaves_embeddings_norms_and_the_head_untrained(name):
    """Q-GaLore 13: what was not quantized got an attribute in place of a hook."""
    model = Language()
    before = copy.deepcopy(model.state_dict())
    layered = per_layer_of(name, model)
    for step in range(2):
        language_loss(model, step).backward()
        layered.step()
    for key, value in model.state_dict().items():
        assert not torch.equal(value, before[key]), key


def test_trap_eligibility_depends_on_how_parameters_are_wrapped():
    """bitsandbytes 2080, torchao 4912: what is quantized follows from the whole parameter (see also
    test_distributed.py), so that grouping and per_layer give the same states."""
    a, b = Language(), Language()
    whole, layered = make("AdamW8bit", list(a.parameters())), per_layer_of("AdamW8bit", b)
    for model in (a, b):
        language_loss(model, 0).backward()
    whole.step(), layered.step()
    states = {p: s for optimizer in layered.optimizers for p, s in optimizer.state.items()}
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert all(same_bits(whole.state[p][key], states[q][key]) for key in whole.state[p])
        assert (whole.state[p]["m"].dtype == torch.uint8) == (p.numel() >= 4096)
