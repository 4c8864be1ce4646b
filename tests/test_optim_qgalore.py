"""QGaLoreAdamW8bit and the 8-bit layer that it trains; what it shares with the family: test_optim_galore.py."""

import copy
import io

import pytest
import torch
from low_rank import Model, make_params, same, saved, set_grads, snapshot, train
from slkernels import convert
from slkernels.nn import Int8Linear
from slkernels.optim import QGaLoreAdamW8bit, low_rank_groups, per_layer
from slkernels.reference.project import dequantize_group, quantize_group
from torch import nn


def int8_model(seed=0):
    """Model with the linear layers of attn and mlp in 8 bits."""
    model = Model(seed)
    for name in ("attn", "mlp"):
        setattr(model, name, Int8Linear.from_linear(getattr(model, name), group=16))
    return model


def make(params, **options):
    return QGaLoreAdamW8bit(params, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, "min_numel": 64, **options})


# ---- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_a_linear_with_the_quantized_weight(bias):
    torch.manual_seed(0)
    linear = nn.Linear(45, 30, bias=bias)
    layer = Int8Linear.from_linear(linear, group=16)
    codes, scale, zero = quantize_group(linear.weight.detach(), 8, 16)
    assert torch.equal(layer.codes, codes) and torch.equal(layer.zero, zero)
    dense = copy.deepcopy(linear)
    dense.weight.data = dequantize_group(codes, scale, zero, group=16)
    torch.testing.assert_close(layer.weight, dense.weight.data, rtol=1e-6, atol=0)
    x = torch.randn(3, 7, 45)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(i) for module, i in zip((layer, dense), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.carrier.grad, dense.weight.grad, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-5, atol=1e-5)


def test_trap_weights_of_one_sign_keep_their_accuracy():
    """Q-GaLore's public quantizer clamps the zero point of such groups: errors of 1.0 on values from 1 to 2."""
    linear = nn.Linear(64, 8, bias=False)
    nn.init.uniform_(linear.weight, 1.0, 2.0)
    for sign in (1.0, -1.0):
        linear.weight.data.abs_().mul_(sign)
        error = (Int8Linear.from_linear(linear).weight - linear.weight).abs().max()
        assert error <= 0.51 * 2.0 / 255


def test_the_weight_takes_one_byte_an_element():
    layer = Int8Linear.from_linear(nn.Linear(512, 256, bias=False))
    tensors = [*layer.buffers(), *layer.parameters()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(held.values()) == 256 * 512 + 256 * 2 * (4 + 1) + 4


def test_copies_and_checkpoints_of_the_layer():
    model = int8_model()
    state = model.state_dict()
    assert not any("carrier" in key for key in state)
    other = int8_model(1)
    assert not other.load_state_dict(state).missing_keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (other, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert again.loss(0).item() == model.loss(0).item()
        assert again.attn.carrier.untyped_storage().nbytes() == 4
        before = again.attn.codes.clone()
        optimizer = make(low_rank_groups(again, 8))
        again.loss(0).backward()
        optimizer.step()
        assert not torch.equal(before, again.attn.codes) and torch.equal(model.attn.codes, before)


def test_the_layer_follows_dtypes():
    layer = Int8Linear.from_linear(nn.Linear(48, 32)).to(torch.bfloat16)
    assert layer.carrier.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32 and layer.codes.dtype == torch.uint8
    layer(torch.randn(4, 48, dtype=torch.bfloat16)).sum().backward()
    assert layer.carrier.grad.dtype == torch.bfloat16
    optimizer = make(layer.parameters())
    before = layer.codes.clone()
    optimizer.step()
    assert not torch.equal(before, layer.codes)


def test_convert_swaps_linears_into_8_bits_and_back():
    model = Model()
    report = convert.int8(model, group=16, verbose=False, return_report=True)[1]
    assert report.swapped == ["attn", "mlp"] and isinstance(model.attn, Int8Linear)
    weight, loss = model.attn.weight, model.loss(0)
    convert.dense(model)
    assert type(model.attn) is nn.Linear and torch.equal(model.attn.weight, weight)
    torch.testing.assert_close(model.loss(0), loss)


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_an_int8_step_is_the_float_step_of_the_same_weight_rounded():
    linear = nn.Linear(64, 48, bias=False)
    layer = Int8Linear.from_linear(linear, group=16)
    weight = nn.Parameter(layer.weight.clone())
    quantized, floating = make([layer.carrier], weight_decay=0.1), make([weight], weight_decay=0.1)
    for tensors in ([layer.carrier], [weight]):
        set_grads(tensors, 0)
    quantized.step(), floating.step()
    for key in ("m", "v", "codes", "scale", "zero"):
        assert torch.equal(quantized.state[layer.carrier][key], floating.state[weight][key])
    steps = (layer.weight - weight.detach()).abs() / layer.scale.repeat_interleave(16, dim=1)
    assert steps.max() < 1.001  # up or down to a neighbour
    assert (steps > 0.51).any()  # stochastically: not always to the nearer one


def test_stochastic_rounding_lets_8_bit_weights_follow_small_steps():
    """Steps of a tenth of the distance of two codes: to nearest nothing moves, stochastically the mean does."""
    moved = {}
    for stochastic in (False, True):
        layer = Int8Linear(256, 64)
        layer.codes.fill_(128), layer.zero.fill_(128), layer.scale.fill_(1 / 128)
        layer.codes[:, 0], layer.codes[:, 1] = 0, 255  # keep the range
        start = layer.weight.clone()
        optimizer = make(
            [layer.carrier], lr=1e-3, rank=64, scale=1.0, stochastic_rounding=stochastic, betas=(0.0, 0.999)
        )
        for _ in range(20):
            layer.carrier.grad = torch.ones(64, 256)
            optimizer.step()
        moved[stochastic] = (layer.weight - start)[:, 2:].mean()
    assert abs(moved[False]) < 1e-6
    assert moved[True] < -0.2 * 20 * 1e-3


def test_rounding_differs_from_step_to_step_and_goes_on_after_a_resume():
    model = int8_model()
    optimizer = make(low_rank_groups(model, 8))

    def run(model, optimizer, begin, end):
        for step in range(begin, end):
            model.loss(step).backward()
            optimizer.step(), optimizer.zero_grad()

    run(model, optimizer, 0, 4)
    state, weights = saved(optimizer), copy.deepcopy(model.state_dict())
    run(model, optimizer, 4, 9)

    other = int8_model(1)
    resumed = make(low_rank_groups(other, 8))
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(other, resumed, 4, 9)
    assert same(snapshot(optimizer, model.parameters()), snapshot(resumed, other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_trap_embeddings_norms_and_head_train_beside_8_bit_weights():
    """In Q-GaLore's per-layer mode they only get an attribute named backward_hook, which nothing calls."""
    model = int8_model()
    start = copy.deepcopy(model.state_dict())
    optimizer = per_layer(model, lambda params: make(low_rank_groups(model, 8, params=params)), accumulation_steps=2)
    for step in range(4):
        for micro in range(2):
            model.loss(2 * step + micro).backward()
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    unchanged = [k for k, v in model.state_dict().items() if torch.equal(start[k], v) and not k.endswith("zero")]
    assert unchanged == []


def test_an_8_bit_model_learns():
    model = int8_model()
    optimizer = make(low_rank_groups(model, 8, scale=1.0))
    losses = []
    for step in range(60):
        loss = model.loss(step)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- the projection -------------------------------------------------------------------------------------------------


def test_the_projection_takes_half_a_byte_an_element():
    """The public code keeps one 4-bit value in every byte."""
    (p,) = make_params(((1024, 512),))
    optimizer = make([p], rank=128)
    train(optimizer, [p], 1)
    state = optimizer.state[p]
    assert state["codes"].dtype == torch.uint8 and state["codes"].shape == (128, 256)
    assert state["scale"].shape == state["zero"].shape == (128, 2)


def test_the_interval_grows_where_the_subspace_stays():
    """Three matrices: one with the same gradient all the time, one whose sign flips, one with other gradients."""
    params = make_params(((32, 24), (32, 24), (160, 128)))
    optimizer = make(params, update_proj_gap=2, queue_size=3)
    gen = torch.Generator().manual_seed(0)
    fixed = torch.randn(32, 24, generator=gen) * 0.5 ** torch.arange(24)
    drawn = []
    for step in range(40):
        params[0].grad, params[1].grad = fixed.clone(), fixed * (-1) ** step
        params[2].grad = torch.randn(160, 128, generator=gen)
        due = int(optimizer.state[params[0]]["due"]) if optimizer.state else 0
        if step == due:
            drawn.append(step)
        optimizer.step()
    # Every second step until three cosines are known, then at intervals of 4, 8 and 16.
    assert drawn == [0, 2, 4, 6, 10, 18, 34]
    assert int(optimizer.state[params[1]]["gap"]) == int(optimizer.state[params[0]]["gap"]) == 32
    assert int(optimizer.state[params[2]]["gap"]) == 2


def test_errors():
    layer = Int8Linear(32, 16)
    optimizer = make([{"params": [layer.carrier], "rank": None}])
    layer.carrier.grad = torch.ones(16, 32)
    with pytest.raises(ValueError, match="the weight of an Int8Linear must be in a group with a rank"):
        optimizer.step()
    for options, message in (
        ({"gamma_proj": 0}, "gamma_proj is out of range: 0"),
        ({"queue_size": 0}, "queue_size is out of range: 0"),
        ({"proj_type": "full"}, "proj_type is out of range: full"),
    ):
        with pytest.raises(ValueError, match=message):
            make(make_params(), **options)
