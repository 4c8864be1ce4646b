"""Checkpoints of the quantized optimizers: their own, bitsandbytes', safetensors', and broken ones."""

import copy
import io

import pytest
import torch
from slkernels.optim import Adam8bit, AdamW8bit, AdEMAMix8bit, Lion8bit, SGD8bit
from slkernels.reference import optim as reference
from test_optim import random_tensor, same_bits
from test_optim_adamw8bit import make_params, set_grads
from test_optim_family import ALL, make

SIZES = ((64, 128), (70, 100), (5001,), (40,))


def stepped(name, dtype=torch.bfloat16, steps=3, **options):
    params = make_params(SIZES, dtype)
    optimizer = make(name, params, **options)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return params, optimizer


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@ALL
def test_resume_is_bit_exact(name):
    options = {} if name == "Muon8bit" else {"stochastic_rounding": True, "master_bits": 8}
    params, optimizer = stepped(name, **options)
    resumed_params = make_params(SIZES, torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(resumed_params, params, strict=True):
            p.copy_(q)
    resumed = make(name, resumed_params, **options)
    for group in resumed.param_groups:
        group["lr"] = 99.0
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for step in range(3, 6):
        for ps, o in ((params, optimizer), (resumed_params, resumed)):
            set_grads(ps, step)
            o.step()
    for p, q in zip(params, resumed_params, strict=True):
        assert same_bits(p.detach(), q.detach())
        for key, value in optimizer.state[p].items():
            assert same_bits(value, resumed.state[q][key]), key


@ALL
def test_safetensors_round_trip(name):
    safetensors = pytest.importorskip("safetensors.torch")
    params, optimizer = stepped(name)
    state = optimizer.state_dict()
    flat = {f"{i}.{key}": value for i, s in state["state"].items() for key, value in s.items()}
    loaded = safetensors.load(safetensors.save(flat))  # refuses tensors that share memory
    for i, s in state["state"].items():
        state["state"][i] = {key: loaded[f"{i}.{key}"] for key in s}
    again = make(name, make_params(SIZES, torch.bfloat16))
    again.load_state_dict(state)
    for p, q in zip(params, (p for g in again.param_groups for p in g["params"]), strict=False):
        assert p.shape != q.shape or same_bits(optimizer.state[p]["m"], again.state[q]["m"])


@ALL
def test_sharded_format_round_trip(name):
    """Codes where blocks tile rows, float32 elsewhere, and both load."""
    _, optimizer = stepped(name)
    state = optimizer.state_dict("sharded")
    block = optimizer.param_groups[0]["block_size"]
    loaded = make(name, make_params(SIZES, torch.bfloat16))
    loaded.load_state_dict(through_a_file(state))
    flat = [p for g in optimizer.param_groups for p in g["params"]]
    for i, (p, q) in enumerate(zip(flat, (p for g in loaded.param_groups for p in g["params"]), strict=True)):
        s, tiles = state["state"][i], p.dim() == 2 and p.shape[1] % block == 0
        if p.numel() < 4096:
            assert s["m"].dtype == torch.float32 and "m_scale" not in s
        elif tiles:
            assert s["m"].dtype == torch.uint8 and s["m_scale"].shape == (p.shape[0], p.shape[1] // block)
        else:
            assert s["m_float"].dtype == torch.float32 and s["m_float"].shape == p.shape and "m" not in s
        if tiles or p.numel() < 4096:
            for key, value in optimizer.state[p].items():
                assert same_bits(value, loaded.state[q][key])


# ---- broken states --------------------------------------------------------------------------------------------------


def everything(optimizer):
    tensors = [value for s in optimizer.state.values() for value in s.values()]
    tensors += [p.detach() for g in optimizer.param_groups for p in g["params"]]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [t.clone() for t in tensors], copy.deepcopy(groups), [list(map(id, s)) for s in optimizer.state.values()]


def drop(key):
    return lambda state: state["state"][1].pop(key)


def change(key, make_value):
    return lambda state: state["state"][1].update({key: make_value(state["state"][1][key])})


BROKEN = {
    "no m": (drop("m"), "lacks m; got"),
    "no scale": (drop("m_scale"), "lacks m_scale; got"),
    "no step": (drop("step"), "lacks step; got"),
    "codes cut short": (
        change("m", lambda m: m.reshape(-1)[:-16]),
        r"m of a parameter \[70, 100\] must be torch.uint8",
    ),
    "scales cut short": (
        change("m_scale", lambda s: s[:-1]),
        r"m_scale of a parameter \[70, 100\] must be torch.float3",
    ),
    "another shape": (change("m", lambda m: m.reshape(-1)), r"m of a parameter \[70, 100\] must be torch.uint8"),
    "codes as floats": (change("m_scale", lambda s: s.half()), r"must be torch.float32 .* got torch.float16"),
    "not a tensor": (change("m_scale", lambda s: 3), r"m_scale of a parameter .* got int"),
    "a group too few": (lambda s: s["param_groups"].clear(), "the state has 0 parameter groups"),
    "a parameter too few": (lambda s: s["param_groups"][0]["params"].pop(), "a group of the state has"),
    "a state too many": (lambda s: s["state"].update({99: {}}), "of parameters that are in none of its groups"),
    "a group cut short": (lambda s: s["param_groups"][0].pop("lr"), r"a parameter group of the state lacks \['lr'\]"),
    "half a file": (lambda s: s.pop("state"), "a state_dict has state and param_groups"),
    "another optimizer's": (lambda s: s["state"][1].update(u=torch.ones(1)), r"another optimizer: it has \['u'\]"),
    "an unknown codec": (lambda s: s["param_groups"][0].update(codec="dyn2"), "codec is out of range: dyn2"),
    "another block": (lambda s: s["param_groups"][0].update(block_size=512), r"m_scale of a parameter .* must be"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdEMAMix8bit", "Muon8bit"])
def test_a_broken_state_raises_and_changes_nothing(name, fault):
    _, source = stepped(name)
    state = copy.deepcopy(source.state_dict())
    break_it, message = BROKEN[fault]
    break_it(state)
    _, optimizer = stepped(name, steps=2)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = everything(optimizer)
    assert all(same_bits(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


def test_a_state_of_another_optimizer_is_refused():
    _, adam = stepped("AdamW8bit")
    _, lion = stepped("Lion8bit")
    with pytest.raises(ValueError, match="is of another optimizer: it has"):
        lion.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="lacks"):
        adam.load_state_dict(lion.state_dict())


def test_an_unknown_format_is_refused():
    _, optimizer = stepped("AdamW8bit")
    with pytest.raises(ValueError, match="format must be one of slkernels, sharded, torch, bitsandbytes, got 'bnb'"):
        optimizer.state_dict("bnb")


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def bitsandbytes_layout(wrapped):
    """A state_dict as bitsandbytes.optim.AdamW8bit saves it, for a large and a small parameter."""
    m, v = random_tensor(70, 100, seed=1), random_tensor(70, 100, seed=2).square()
    (state1, absmax1), (state2, absmax2) = (reference.quantize_block(m), reference.quantize_block(v, "dyn8u"))
    large = {
        "state1": state1,
        "state2": state2,
        "qmap1": reference.dynamic_map(True),
        "qmap2": reference.dynamic_map(False),
        "absmax1": absmax1,
        "absmax2": absmax2,
    }
    small = {"state1": random_tensor(40, seed=3), "state2": random_tensor(40, seed=4).square()}
    if wrapped:
        large, small = ({"__bnb_optimizer_quant_state__": s} for s in (large, small))
    group = {"lr": 2e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.2, "alpha": 0.0, "params": [0, 1]}
    return {"state": {0: {"step": 17, **large}, 1: {"step": 17, **small}}, "param_groups": [group]}, m, v


@pytest.mark.parametrize("wrapped", [True, False])
def test_bitsandbytes_layout_loads_and_continues(wrapped):
    saved, m, v = bitsandbytes_layout(wrapped)
    params = make_params(((70, 100), (40,)))
    optimizer = AdamW8bit(params, lr=1.0)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-3, (0.8, 0.99), 1e-7, 0.2)
    set_grads(params, 5)
    p = params[0]
    m, v = reference.quantize_block(m), reference.quantize_block(v, "dyn8u")
    want = reference.adam(
        p.detach().double(),
        p.grad.double(),
        reference.dequantize_block(*m).double(),
        reference.dequantize_block(*v, "dyn8u").double(),
        18,
        2e-3,
        beta1=0.8,
        beta2=0.99,
        eps=1e-7,
        weight_decay=0.2,
    )[0]
    optimizer.step()
    torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=1e-7)
    assert float(optimizer.state[p]["step"]) == 18
    back = optimizer.state_dict("bitsandbytes")["state"]
    assert back[0]["step"] == 18 and same_bits(back[0]["qmap1"], reference.dynamic_map(True))
    assert set(back[1]) == {"step", "state1", "state2"}


def test_bitsandbytes_layout_errors():
    saved, _, _ = bitsandbytes_layout(False)
    for change, message in (
        (lambda s: s["state"][0].pop("absmax1"), "only block-wise states"),
        (lambda s: s["state"][0].update(qmap1=torch.linspace(-1, 1, 256)), "qmap1 is not bitsandbytes' dynamic map"),
        (lambda s: s["state"][0].update(absmax1=torch.zeros(3)), "fits neither blocks of 256 nor of 2048"),
        (lambda s: s["state"][0].pop("state1"), "is of another optimizer"),
    ):
        broken = copy.deepcopy(saved)
        change(broken)
        with pytest.raises(ValueError, match=message):
            AdamW8bit(make_params(((70, 100), (40,)))).load_state_dict(broken)


HYPER = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
REAL = {
    "AdamW8bit": (AdamW8bit, {**HYPER, "eps": 1e-8}),
    "Adam8bit": (Adam8bit, {**HYPER, "eps": 1e-8, "weight_decay": 0.0}),
    "Lion8bit": (Lion8bit, HYPER),
    "SGD8bit": (SGD8bit, {"lr": 1e-3, "momentum": 0.8, "weight_decay": 0.1}),
    "AdEMAMix8bit": (AdEMAMix8bit, {**HYPER, "betas": (0.9, 0.99, 0.999), "alpha": 2.0, "t_alpha": 6, "t_beta3": 8}),
}


@pytest.mark.parametrize("name", REAL)
def test_states_of_real_bitsandbytes_continue_and_go_back(name):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    cls, hyper = REAL[name]
    sizes = ((70, 100), (64, 256), (40,))
    theirs, ours = make_params(sizes), make_params(sizes)
    bnb_optimizer = getattr(bnb.optim, name)(theirs, **hyper)
    for step in range(3):
        set_grads(theirs, step)
        bnb_optimizer.step()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    optimizer = cls(ours, lr=77.0)
    optimizer.load_state_dict(through_a_file(bnb_optimizer.state_dict()))
    for key, value in hyper.items():
        assert optimizer.param_groups[0][key] == value, key
    for p, q in zip(ours, theirs, strict=True):
        codes = bnb_optimizer.state[q]["state1"]
        assert torch.equal(optimizer.state[p]["m"], codes[0] if name == "AdEMAMix8bit" else codes)
    # One step from the same state: the update uses unquantized moments, so the parameters agree closely. (Their codes
    # do not: bitsandbytes' CPU quantizer is not exact.)
    start = [p.detach().clone() for p in ours]
    set_grads(theirs, 9), set_grads(ours, 9)
    bnb_optimizer.step(), optimizer.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert (p - s).abs().max() > 1e-4
    # and back: what they make of our state is what we make of it
    again_params = make_params(sizes)
    again = getattr(bnb.optim, name)(again_params, **{**hyper, "lr": 77.0})
    again.load_state_dict(through_a_file(optimizer.state_dict("bitsandbytes")))
    with torch.no_grad():
        for p, q in zip(again_params, ours, strict=True):
            p.copy_(q)
    set_grads(again_params, 10), set_grads(ours, 10)
    again.step(), optimizer.step()
    for p, q in zip(ours, again_params, strict=True):
        assert again.state[q]["step"] == 5
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_bitsandbytes_cannot_hold_is_refused():
    for optimizer, message in (
        (stepped("Muon8bit")[1], "Muon8bit has no counterpart in bitsandbytes"),
        (stepped("AdamW8bit", block_size=128)[1], "bitsandbytes reads codec dyn8 with blocks of 256, .* blocks of 128"),
        (stepped("AdamW4bit")[1], "this state is dyn4 with blocks of 128"),
        (stepped("SGD8bit-nesterov")[1], "no Nesterov momentum"),
        (stepped("Adam8bit")[1], "decays like AdamW"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.state_dict("bitsandbytes")
