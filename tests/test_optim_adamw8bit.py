"""AdamW8bit: the optimizer above adam_q_, its state, and bitsandbytes' states."""

import copy
import io

import pytest
import torch
from slkernels.optim import AdamW8bit
from slkernels.reference import optim as reference
from test_optim import FLOATS, random_tensor, same_bits


def make_params(sizes=((128, 64), (64,), (5000,)), dtype=torch.float32, seed=0):
    return [torch.nn.Parameter(random_tensor(*s, seed=seed + i, decades=1.0).to(dtype)) for i, s in enumerate(sizes)]


def set_grads(params, seed):
    for i, p in enumerate(params):
        p.grad = random_tensor(*p.shape, seed=1000 * seed + i, decades=3.0).to(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_states_follow_torch_adamw(dtype):
    """Every step against torch.optim.AdamW from the same point, with weight decay: order and formula."""
    ours, theirs = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    a = AdamW8bit(ours, lr=1e-2, weight_decay=0.3, min_numel=1 << 30)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.3)
    for step in range(1, 30):
        set_grads(ours, step), set_grads(theirs, step)
        if dtype == torch.bfloat16:
            for p in ours + theirs:
                p.grad = p.grad.bfloat16().float()
        a.step(), b.step()
        for p, q in zip(ours, theirs, strict=True):
            # Sums cancel: the bounds are relative to what was added, p of up to 4 and m of up to 0.4.
            torch.testing.assert_close(p, q, rtol=3e-6, atol=5e-7)
            torch.testing.assert_close(a.state[p]["m"], b.state[q]["exp_avg"], rtol=3e-6, atol=5e-8)
            torch.testing.assert_close(a.state[p]["v"], b.state[q]["exp_avg_sq"], rtol=3e-6, atol=1e-12)
            with torch.no_grad():
                q.copy_(p)
            b.state[q]["exp_avg"].copy_(a.state[p]["m"]), b.state[q]["exp_avg_sq"].copy_(a.state[p]["v"])


def test_quantized_states_follow_a_quantizing_reference():
    """Eight-bit steps against the definition that quantizes the same way, from the same state at every step."""
    params = make_params(((64, 128),))
    optimizer = AdamW8bit(params, lr=1e-2, weight_decay=0.3)
    p = params[0]
    m = v = torch.zeros(p.shape, dtype=torch.float64)
    for step in range(1, 40):
        set_grads(params, step)
        hyper = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.3}
        lr = float(torch.tensor(1e-2))
        want, m_want, v_want = reference.adam(p.detach().double(), p.grad.double(), m, v, step, lr, **hyper)
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=1e-8)
        state = optimizer.state[p]
        mismatched = 0
        for key, codec, moment in (("m", "dyn8", m_want), ("v", "dyn8u", v_want)):
            codes, scale = reference.quantize_block(moment.float(), codec)
            torch.testing.assert_close(state[key + "_scale"], scale, rtol=1e-6, atol=0)
            mismatched += (codes != state[key]).sum().item()
        assert mismatched <= 8  # of 16384: values whose last bit decides at a midpoint
        m = reference.dequantize_block(state["m"], state["m_scale"]).double()
        v = reference.dequantize_block(state["v"], state["v_scale"], "dyn8u").double()


@pytest.mark.parametrize("dtype", FLOATS)
def test_resume_is_bit_exact(dtype, tmp_path):
    sizes = ((128, 64), (64,), (5000,), (3, 7))

    def make(seed):
        params = make_params(sizes, dtype, seed)
        groups = [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:], "lr": 3e-3}]
        return params, AdamW8bit(groups, lr=1e-2)

    params, optimizer = make(0)
    for step in range(5):
        set_grads(params, step)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed_params, resumed = make(50)
    with torch.no_grad():
        for p, q in zip(resumed_params, params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(torch.load(buffer))
    for step in range(5, 9):
        for ps, o in ((params, optimizer), (resumed_params, resumed)):
            set_grads(ps, step)
            o.step()
    for p, q in zip(params, resumed_params, strict=True):
        assert same_bits(p.detach(), q.detach())
        for key, value in optimizer.state[p].items():
            assert same_bits(value, resumed.state[q][key]), key


def test_state_is_plain_and_fits_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    params = make_params(dtype=torch.bfloat16)
    optimizer = AdamW8bit(params)
    set_grads(params, 0)
    optimizer.step()
    flat = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    loaded = safetensors.load(safetensors.save(flat))  # refuses tensors that share memory
    assert all(same_bits(flat[k], loaded[k]) for k in flat)
    assert flat["0.m"].dtype == torch.uint8 and flat["0.m_scale"].dtype == torch.float32
    assert flat["1.m"].dtype == torch.float32  # 64 elements


def test_parameters_that_skip_steps_count_their_own():
    params, same = make_params(), make_params()
    together, alone = AdamW8bit(params), [AdamW8bit([p]) for p in same]
    pattern = [(0, 1, 2), (0, 2), (0, 1, 2), (1,), (2,), (0, 1, 2)]
    for step, active in enumerate(pattern):
        set_grads(params, step), set_grads(same, step)
        for i in set(range(3)) - set(active):
            params[i].grad = same[i].grad = None
        together.step()
        for o in alone:
            o.step()
    for i, (p, q) in enumerate(zip(params, same, strict=True)):
        assert same_bits(p.detach(), q.detach())
        assert float(together.state[p]["step"]) == sum(i in active for active in pattern)


def test_scheduler_and_tensor_lr():
    a, b = make_params(), make_params()
    lr = torch.tensor(1e-2)
    with_float, with_tensor = AdamW8bit(a, lr=1e-2), AdamW8bit(b, lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(with_float, lambda step: 1 / (1 + step))
    for step in range(4):
        set_grads(a, step), set_grads(b, step)
        lr.fill_(with_float.param_groups[0]["lr"])
        before = a[0].detach().clone()
        with_float.step(), with_tensor.step(), scheduler.step()
        assert not torch.equal(before, a[0])
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(a, b, strict=True))
    with_float.param_groups[0]["lr"] = 0.0
    set_grads(a, 9)
    before = [p.detach().clone() for p in a]
    with_float.step()
    assert all(same_bits(p.detach(), q) for p, q in zip(a, before, strict=True))


def test_closure_sparse_and_arguments():
    params = make_params()
    optimizer = AdamW8bit(params)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
    embedding = torch.nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdamW8bit(embedding.parameters()).step()
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"codec": "dyn2"}, {"block_size": 100}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is out of range"):
            AdamW8bit(params, **bad)


def test_grad_scaler_skips_a_step_with_infinities():
    params = make_params()
    optimizer = AdamW8bit(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for bad in (False, True, False):
        before = [p.detach().clone() for p in params]
        set_grads(params, 3)
        for p in params:
            p.grad.mul_(1024)
        if bad:
            params[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert all(same_bits(p.detach(), q) for p, q in zip(params, before, strict=True)) == bad
        if bad:
            scaler.update(1024.0)
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_copies_and_pickles():
    params = make_params()
    optimizer = AdamW8bit(params)
    set_grads(params, 0)
    optimizer.step()
    both = copy.deepcopy((params, optimizer))
    for ps, o in ((params, optimizer), both):
        set_grads(ps, 1)
        o.step()
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, both[0], strict=True))
