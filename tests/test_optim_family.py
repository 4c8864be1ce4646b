"""Every optimizer with quantized state against its formula, in float32 and in its codecs."""

import copy
import math

import pytest
import torch
from slkernels.optim import (
    Adam8bit,
    AdamW4bit,
    AdamW8bit,
    AdamWFp8,
    AdEMAMix8bit,
    Lion8bit,
    Muon8bit,
    SGD8bit,
)
from slkernels.optim.muon import newton_schulz
from slkernels.reference import optim as reference
from test_optim import random_tensor, same_bits
from test_optim_adamw8bit import make_params, set_grads

ADAM = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
SECOND = {"dyn8": "dyn8u", "lin8": "lin8u", "cmp8": "cmp8u", "dyn4": "lin4u", "fp8": "fp8u"}

# How each is made for these tests, with every hyper-parameter away from its default.
MAKE = {
    "AdamW8bit": lambda ps, **o: AdamW8bit(ps, **ADAM, **o),
    "AdamW8bit-lin8": lambda ps, **o: AdamW8bit(ps, **ADAM, codec="lin8", **o),
    "AdamW8bit-cmp8": lambda ps, **o: AdamW8bit(ps, **ADAM, codec="cmp8", **o),
    "AdamW4bit": lambda ps, **o: AdamW4bit(ps, **ADAM, **o),
    "AdamWFp8": lambda ps, **o: AdamWFp8(ps, **ADAM, **o),
    "Adam8bit": lambda ps, **o: Adam8bit(ps, **ADAM, **o),
    "Lion8bit": lambda ps, **o: Lion8bit(ps, 3e-3, (0.8, 0.9), 0.3, **o),
    "SGD8bit": lambda ps, **o: SGD8bit(ps, 3e-2, 0.8, 0.3, **o),
    "SGD8bit-nesterov": lambda ps, **o: SGD8bit(ps, 3e-2, 0.8, 0.3, nesterov=True, **o),
    "AdEMAMix8bit": lambda ps, **o: AdEMAMix8bit(ps, 1e-2, (0.8, 0.99, 0.999), 3.0, 7, 5, 1e-6, 0.3, **o),
    "Muon8bit": lambda ps, **o: Muon8bit(ps, 1e-2, 0.3, 0.9, **o),
}
ALL = pytest.mark.parametrize("name", MAKE)


def make(name, params, **options):
    """Muon with AdamW for what is not a matrix."""
    if name != "Muon8bit":
        return MAKE[name](params, **options)
    groups = [{"params": [p for p in params if p.dim() > 1]}]
    rest = [p for p in params if p.dim() < 2]
    groups += [{"params": rest, "use_muon": False, "lr": 5e-3}] if rest else []
    return MAKE[name](groups, **options)


def formula(optimizer, group, p, grad, moments, step):
    """(p, moments) after a step in float64, by the definition."""
    lr, decay = float(torch.tensor(group["lr"])), group["weight_decay"]
    if isinstance(optimizer, Muon8bit) and group["use_muon"]:
        rule = "nesterov" if group["nesterov"] else "sgd"
        momentum = {"rule": rule, "beta1": group["momentum"], "beta2": 0.0, "weight_decay": 0.0}
        direction, m = reference.momentum(torch.zeros_like(moments[0]), grad, *moments, step, -1.0, **momentum)
        update = newton_schulz(direction.to(p.dtype)).double() * math.sqrt(max(1, p.shape[0] / p.shape[1]))
        return p.double() * (1 - lr * decay) - lr * update, (m,)
    if isinstance(optimizer, (Lion8bit, SGD8bit)):
        betas = group.get("betas") or (group["momentum"], 0.0)
        rule = "lion" if isinstance(optimizer, Lion8bit) else "nesterov" if group["nesterov"] else "sgd"
        options = {"rule": rule, "beta1": betas[0], "beta2": betas[1], "weight_decay": decay}
        new = reference.momentum(p, grad, *moments, step, lr, **options)
        return new[0], new[1:]
    options = {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"], "weight_decay": decay}
    if isinstance(optimizer, AdEMAMix8bit):  # its schedules: arXiv 2409.03137, equations 4 and 5
        beta1, _, beta3 = group["betas"]
        done = min(1.0, step / group["t_beta3"])
        logs = math.log(beta1), math.log(beta3)
        beta3 = math.exp(logs[0] * logs[1] / ((1 - done) * logs[1] + done * logs[0]))
        alpha = min(1.0, step / group["t_alpha"]) * group["alpha"]
        new = reference.ademamix(p, grad, *moments, step, lr, beta3, alpha, **options)
        return new[0], new[1:]
    new = reference.adam(p, grad, *moments, step, lr, decoupled=not isinstance(optimizer, Adam8bit), **options)
    return new[0], new[1:]


def decoded(optimizer, group, p, state):
    """The moments in float64, by the reference's codecs."""
    out = []
    for moment in optimizer._moments_of(group):
        x, scale = state[moment.key], state[moment.key + "_scale"].reshape(-1)
        if x.dtype == torch.uint8:
            codec = group["codec"] if moment.signed else SECOND[group["codec"]]
            x = reference.dequantize_block(x.reshape(-1), scale, codec, group["block_size"], numel=p.numel())
        out.append(x.double().view(p.shape))
    return out


def on_cpu(state):
    return {key: value.cpu().clone() for key, value in state.items()}


@pytest.mark.parametrize("min_numel", [0, 1 << 30], ids=["quantized", "float32"])
@ALL
def test_steps_follow_the_formula(name, min_numel, device):
    """Every step from the optimizer's own state at that point: parameters, and codes or float32 moments."""
    params = [torch.nn.Parameter(p.detach().to(device)) for p in make_params(((64, 96), (70, 33), (5001,)))]
    optimizer = make(name, params, min_numel=min_numel)
    for step in range(1, 6):
        set_grads(params, step)
        before = {p: (p.detach().cpu().clone(), on_cpu(optimizer.state.get(p, {}))) for p in params}
        optimizer.step()
        for group in optimizer.param_groups:
            for p in group["params"]:
                (old, state), now = before[p], on_cpu(optimizer.state[p])
                zeros = [torch.zeros(p.shape, dtype=torch.float64) for _ in optimizer._moments_of(group)]
                moments = decoded(optimizer, group, p, state) if state else zeros
                want, want_moments = formula(optimizer, group, old, p.grad.cpu(), moments, step)
                # bfloat16 products in Muon: the sums' order may differ.
                loose = isinstance(optimizer, Muon8bit) and group["use_muon"]
                torch.testing.assert_close(p.cpu().double(), want, rtol=1e-6, atol=3e-4 if loose else 2e-6)
                assert float(now["step"]) == step
                for moment, exact in zip(optimizer._moments_of(group), want_moments, strict=True):
                    got = now[moment.key]
                    if min_numel:
                        assert got.dtype == torch.float32
                        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
                        continue
                    codec = group["codec"] if moment.signed else SECOND[group["codec"]]
                    codes, scale = reference.quantize_block(exact.float(), codec, group["block_size"])
                    torch.testing.assert_close(now[moment.key + "_scale"].reshape(-1), scale, rtol=1e-5, atol=0)
                    assert (codes.reshape(-1) != got.reshape(-1)).float().mean() <= 3e-3, moment.key


TORCH = {
    "AdamW8bit": lambda ps: torch.optim.AdamW(ps, **ADAM),
    "AdamW8bit-cmp8": lambda ps: torch.optim.AdamW(ps, **ADAM),
    "AdamW4bit": lambda ps: torch.optim.AdamW(ps, **ADAM),
    "AdamWFp8": lambda ps: torch.optim.AdamW(ps, **ADAM),
    "Adam8bit": lambda ps: torch.optim.Adam(ps, **ADAM),
    "SGD8bit": lambda ps: torch.optim.SGD(ps, lr=3e-2, momentum=0.8, weight_decay=0.3),
    "SGD8bit-nesterov": lambda ps: torch.optim.SGD(ps, lr=3e-2, momentum=0.8, weight_decay=0.3, nesterov=True),
    "Muon8bit": lambda ps: torch.optim.Muon(ps, 1e-2, 0.3, 0.9),
}
MATRICES = ((64, 128), (96, 70))


@pytest.mark.parametrize("name", TORCH)
def test_float32_states_follow_torch_optim(name):
    ours, theirs = make_params(MATRICES), make_params(MATRICES)
    a, b = make(name, ours, min_numel=1 << 30), TORCH[name](theirs)
    for step in range(1, 20):
        set_grads(ours, step), set_grads(theirs, step)
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-3 if name == "Muon8bit" else 2e-5)
        assert (p - make_params(MATRICES)[0 if p.shape == (64, 128) else 1]).abs().max() > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCH)
def test_torch_states_are_continued_and_go_back(name, dtype):
    """torch -> ours -> torch: exact where moments stay in float32, else up to the codec."""
    theirs, ours = make_params(MATRICES, dtype), make_params(MATRICES, dtype)
    b = TORCH[name](theirs)
    for step in range(1, 6):
        set_grads(theirs, step)
        b.step()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    for min_numel in (1 << 30, 0):
        a = make(name, ours, min_numel=min_numel)
        a.param_groups[0]["lr"] = 123.0
        a.load_state_dict(copy.deepcopy(b.state_dict()))
        group = a.param_groups[0]
        assert group["lr"] == b.param_groups[0]["lr"] and group["weight_decay"] == 0.3
        back = a.state_dict("torch")
        again = make_params(MATRICES, dtype)
        c = TORCH[name](again)
        c.load_state_dict(back)
        for q, r in zip(theirs, again, strict=True):
            for key, value in b.state[q].items():
                got = c.state[r][key]
                assert got.dtype == value.dtype and got.shape == value.shape
                if key == "step" or min_numel:
                    torch.testing.assert_close(got, value, rtol=1e-6, atol=0)
                else:  # to within the step of the codec: at most 1/7 of the block's largest, in 4 bits
                    assert (got - value).abs().max() <= 0.15 * value.abs().max()
        c.param_groups[0]["params"][0].grad = torch.ones_like(again[0])
        c.step()


def test_options_that_torch_has_and_we_have_not_are_refused():
    for theirs, ours, message in (
        (lambda ps: torch.optim.AdamW(ps, amsgrad=True), AdamW8bit, "no amsgrad = True"),
        (lambda ps: torch.optim.AdamW(ps, maximize=True), AdamW8bit, "no maximize = True"),
        (lambda ps: torch.optim.SGD(ps, momentum=0.9, dampening=0.1), SGD8bit, "no dampening = 0.1"),
    ):
        params = make_params()
        optimizer = theirs(params)
        set_grads(params, 1)
        optimizer.step()
        with pytest.raises(ValueError, match=message):
            ours(make_params()).load_state_dict(optimizer.state_dict())
    for make_ours, message in ((Lion8bit, "Lion8bit has no counterpart"), (AdEMAMix8bit, "AdEMAMix8bit has no count")):
        params = make_params()
        optimizer = make_ours(params)
        set_grads(params, 1)
        optimizer.step()
        with pytest.raises(ValueError, match=message):
            optimizer.state_dict("torch")


# ---- rounding of parameters -----------------------------------------------------------------------------------------

ROUNDED = ["AdamW8bit", "AdamW4bit", "Adam8bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit"]


@pytest.mark.parametrize("name", ROUNDED)
def test_stochastic_rounding_moves_what_nearest_leaves(name):
    """Steps of a hundredth of bfloat16's: to nearest nothing moves, at random the mean does."""

    def run(dtype=torch.bfloat16, **options):
        params = [torch.nn.Parameter(torch.ones(100, 100, dtype=dtype))]
        optimizer = make(name, params, **options)
        group = optimizer.param_groups[0]
        group["weight_decay"] = 0.0
        group["lr"] = 4e-5 / (1 + (group.get("alpha") or 0)) if name != "SGD8bit" else 4e-6
        for _ in range(20):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
        return params[0].detach()

    assert (run() == 1).all()
    random = run(stochastic_rounding=True)
    moved = 1 - run(torch.float32).double().mean()
    # A step is 2^-8, an element takes one with a probability of at most 0.3: sigma of the mean is 2e-5.
    assert 2e-4 < moved < 1.2e-3 and abs((1 - random.double().mean()) - moved) < 1e-4
    assert same_bits(random, run(stochastic_rounding=True))
    assert not same_bits(random, run(stochastic_rounding=True, seed=1))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ROUNDED)
def test_master_bits_follow_float32(name, bits):
    """bfloat16 with 16 more bits is a float32 parameter; with 8 it stays within bfloat16 of one."""
    narrow, wide = make_params(MATRICES, torch.bfloat16), make_params(MATRICES, torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in wide]
    a, b = make(name, narrow, master_bits=bits), make(name, wide)
    for step in range(1, 16):
        set_grads(narrow, step)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
        a.step(), b.step()
    for p, q in zip(narrow, wide, strict=True):
        low = a.state[p]["master_lo"]
        assert low.dtype == (torch.int8 if bits == 8 else torch.int16) and low.shape == p.shape
        master = reference.join_master(p.detach(), low)
        if bits == 16:
            assert same_bits(master, q.detach())
        else:
            torch.testing.assert_close(master, q.detach(), rtol=2**-10, atol=1e-2)
        torch.testing.assert_close(p.float(), q, rtol=2**-8, atol=0 if bits == 16 else 1e-2)


# ---- Muon -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (64, 64)])
def test_newton_schulz_is_nearly_orthogonal(shape):
    g = random_tensor(*shape, decades=1.0)
    x = newton_schulz(g).float()
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(x.flatten(), (u @ vt).flatten(), dim=0) > 0.95
    assert (newton_schulz(torch.zeros(shape)) == 0).all()


def test_muon_groups():
    conv, bias = torch.nn.Parameter(torch.randn(8, 4, 3, 3)), torch.nn.Parameter(torch.randn(8))
    optimizer = Muon8bit([{"params": [conv]}, {"params": [bias], "use_muon": False, "lr": 1e-3}], min_numel=0)
    assert [group["codec"] for group in optimizer.param_groups] == ["lin8", "dyn8"]
    conv.grad, bias.grad = torch.randn(8, 4, 3, 3), torch.randn(8)
    before = conv.detach().clone(), bias.detach().clone()
    optimizer.step()
    assert set(optimizer.state[conv]) == {"step", "m", "m_scale"} and "v" in optimizer.state[bias]
    assert (conv - before[0]).abs().max() > 1e-5 and (bias - before[1]).abs().max() > 5e-4
    with pytest.raises(ValueError, match=r"Muon8bit is for matrices, got \[8\]"):
        wrong = Muon8bit([bias])
        wrong.step()
    with pytest.raises(ValueError, match="stochastic_rounding is out of range"):
        Muon8bit([conv], stochastic_rounding=True)


def test_muon_found_inf_does_not_decay():
    params = make_params(MATRICES)
    optimizer = Muon8bit(params, max_grad_norm=1.0)
    set_grads(params, 1)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    set_grads(params, 2)
    params[0].grad[3, 3] = float("inf")
    optimizer.step()
    assert all(same_bits(p.detach(), q) for p, q in zip(params, before, strict=True))


# ---- what docs/optimizers.md says -----------------------------------------------------------------------------------


STATE_BYTES = {
    "AdamW8bit": 2.03125,
    "AdamW8bit-cmp8": 2.25,
    "AdamW4bit": 1.0625,
    "AdamWFp8": 2.03125,
    "Adam8bit": 2.03125,
    "Lion8bit": 1.015625,
    "SGD8bit": 1.015625,
    "AdEMAMix8bit": 3.046875,
    "Muon8bit": 1.015625,
}


@pytest.mark.parametrize("name", STATE_BYTES)
def test_bytes_of_state(name):
    params = [torch.nn.Parameter(torch.zeros(256, 512))]
    optimizer = make(name, params)
    params[0].grad = torch.ones(256, 512)
    optimizer.step()
    state = optimizer.state[params[0]]
    held = sum(value.numel() * value.element_size() for key, value in state.items() if key != "step")
    assert held == STATE_BYTES[name] * params[0].numel()
