"""Linear24 and MaskLinear24: what they compute, when masks change, their state dicts, and how they move."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from slkernels import optim
from slkernels.nn import Linear24, MaskLinear24, track24
from slkernels.nn.linear24 import kernel_layout
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_ops = torch.ops.slkernels

pytestmark = pytest.mark.usefixtures("one_thread")

N, M = 24, 40
RAGGED = (13, 27)  # no multiples of four
TRAINED = ("dynamic", "static", "slope")
MODES = (*TRAINED, "inference")


def layer(mode="dynamic", n=N, m=M, seed=0, **options):
    torch.manual_seed(seed)
    return Linear24(m, n, bias=True, mode=mode, **options)


def main(module):
    """The parameter that a layer trains."""
    return module.values if module.mode == "slope" else module.weight


def kept_by(weight, mask):
    """The kept elements [n, 2 G] of weight under a mask that is 2:4, padded with zero columns, by sorting positions."""
    pad = -weight.shape[1] % 4
    weight, mask = (F.pad(t, (0, pad)).view(len(weight), -1, 4) for t in (weight, mask.to(torch.int8)))
    order = mask.argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1)[0]
    return weight.gather(-1, order).flatten(1)


def double_pruned(module):
    """What dx is computed with, as [n, m], from the layer's own transposed metadata."""
    n, m = module.out_features, module.in_features
    return module.sparse_weight() * _ops.mask_of24(module.meta_t, m, n, "plain").t()


def gradients(module, x, dy):
    """y and its gradients in x and the parameters, float64, by name."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)
    y = module(x)
    found = torch.autograd.grad(y, [x, *parameters], dy)
    return y.detach().double(), {name: g.double() for name, g in zip(("x", *names), found, strict=True)}


def assert_close(got, want):
    for name in want:
        torch.testing.assert_close(
            got[name], want[name].double(), rtol=1e-4, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )


# ---- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("shape", [(N, M), RAGGED], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_dense_modes_go_straight_through(mode, shape, tracked):
    n, m = shape
    module = layer(mode, n, m)
    if tracked:
        track24(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x, dy = torch.randn(3, 5, m), torch.randn(3, 5, n)
    mask = _ops.prune24(module.weight.detach(), "transposable")
    assert torch.equal(module.mask, mask)
    sparse = module.weight.detach().double() * mask
    assert torch.equal(module.sparse_weight().double(), sparse)
    y, got = gradients(module, x, dy)
    torch.testing.assert_close(y, F.linear(x.double(), sparse, module.bias.double()), rtol=1e-5, atol=1e-5)
    rows, columns = dy.flatten(0, 1).double(), x.flatten(0, 1).double()
    assert_close(got, {"x": dy.double() @ sparse, "weight": rows.t() @ columns, "bias": rows.sum(0)})


def test_a_row_mask_takes_dx_from_the_double_pruned_transpose():
    module = layer("static", by="row")
    x, dy = torch.randn(6, M), torch.randn(6, N)
    sparse = module.weight.detach() * _ops.prune24(module.weight.detach(), "row")
    again = sparse * _ops.prune24(sparse.t().contiguous(), "row").t()
    y, got = gradients(module, x, dy)
    torch.testing.assert_close(y, F.linear(x, sparse, module.bias.detach()).double(), rtol=1e-5, atol=1e-5)
    assert_close(got, {"x": dy @ again, "weight": dy.t() @ x})
    assert not torch.allclose(again, sparse)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("shape", [(N, M), RAGGED], ids=str)
def test_slope(shape, tracked):
    n, m = shape
    module = layer("slope", n, m)
    if tracked:
        track24(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x, dy = torch.randn(3, 5, m), torch.randn(3, 5, n)
    sparse, mask = module.sparse_weight(), module.mask
    assert torch.equal(module.values.detach(), kept_by(sparse, mask))
    y, got = gradients(module, x, dy)
    torch.testing.assert_close(y, F.linear(x, sparse, module.bias.detach()).double(), rtol=1e-5, atol=1e-5)
    rows, columns = dy.flatten(0, 1), x.flatten(0, 1)
    again = double_pruned(module)
    assert_close(got, {"x": dy @ again, "values": kept_by(rows.t() @ columns, mask), "bias": rows.sum(0)})
    # Double pruning keeps the two largest of four along a column of what the rows kept.
    assert torch.equal(again, sparse * _ops.prune24(sparse.t().contiguous(), "row").t())


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("mode", TRAINED)
def test_a_step_is_seen_by_the_next_call(mode, tracked):
    module = layer(mode)
    optimizer = optim.AdamW8bit(module.parameters(), lr=0.05)
    if tracked:
        track24(module, optimizer)
    x, dy, mask = torch.randn(6, M), torch.randn(6, N), module.mask
    for _ in range(3):
        module(x).backward(dy)
        before = main(module).detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(main(module).detach(), before)
        assert torch.equal(module.mask, mask)  # 3 steps are less than the interval
        sparse = module.sparse_weight()
        y, got = gradients(module, x, dy)
        torch.testing.assert_close(y, F.linear(x, sparse, module.bias.detach()).double(), rtol=1e-5, atol=1e-5)
        assert_close(got, {"x": dy @ (double_pruned(module) if mode == "slope" else sparse)})


def test_padding_stays_zero_in_slope():
    module = layer("slope", *RAGGED)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(3):
        module(torch.randn(8, RAGGED[1])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = _ops.decompress24(module.values.detach(), module.meta, RAGGED[0], 28)
    assert not whole[:, 27:].any() and whole[:, :27].any()


def test_the_adapter_starts_as_nothing_and_then_trains():
    module, x = layer("slope"), torch.randn(6, M)
    before = module(x)
    A, B = module.add_adapter(3)
    assert A is module.lora_A and (A.shape, B.shape) == ((3, M), (N, 3))
    assert torch.equal(module(x), before)
    nn.init.normal_(B)
    y, got = gradients(module, x, torch.ones(6, N))
    dense = module.sparse_weight() + B.detach() @ A.detach()
    torch.testing.assert_close(y, F.linear(x, dense, module.bias.detach()).double(), rtol=1e-4, atol=1e-4)
    assert_close(
        got, {"lora_A": B.detach().sum(0)[:, None] * x.sum(0), "x": (double_pruned(module) + B @ A).sum(0).expand(6, M)}
    )
    for other in (module.to_dense(), module.to_inference()):
        torch.testing.assert_close(other(x), module(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="an adapter of rank 3 already"):
        module.add_adapter(3)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        layer("slope").add_adapter(0)


@pytest.mark.parametrize("shape", [(N, M), RAGGED], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_inference_and_dense_compute_the_same(mode, shape):
    module, x = layer(mode, *shape).eval(), torch.randn(2, 3, shape[1], requires_grad=True)
    y = module(x)
    packed, dense = module.to_inference(), module.to_dense()
    assert packed.mode == "inference" and not packed.training and not dense.training and type(dense) is nn.Linear
    assert {name: p.requires_grad for name, p in packed.named_parameters()} == {"values": False, "bias": True}
    assert packed.values.numel() == shape[0] * 2 * -(-shape[1] // 4) and torch.equal(packed.mask, module.mask)
    for other in (packed, dense):
        torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(packed(x).sum(), x)  # for adapters in front of it
    torch.testing.assert_close(dx, dense.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["sm80", "sm90"])
def test_packed_layouts_are_plain_in_the_state_dict(layout):
    module = layer("static").bfloat16()
    packed, x = module.to_inference(layout), torch.randn(3, M, dtype=torch.bfloat16)
    assert packed.layout == layout and torch.equal(packed.mask, module.mask)
    assert torch.equal(packed.sparse_weight(), module.sparse_weight())
    with torch.no_grad():
        torch.testing.assert_close(packed(x), module(x), rtol=2e-2, atol=2e-2)
    plain = module.to_inference("plain")
    state = packed.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    other = layer("static", seed=1).bfloat16().to_inference(layout)
    other.load_state_dict(state)
    assert torch.equal(other.meta, packed.meta) and torch.equal(other.values, packed.values)


def test_a_given_mask_is_used():
    linear = nn.Linear(M, N)
    mask = torch.tensor([False, True, False, True]).repeat(N, M // 4)
    for mode in TRAINED:
        module = Linear24.from_linear(linear, mode, mask=mask)
        assert torch.equal(module.mask, mask) and torch.equal(module.sparse_weight(), linear.weight.detach() * mask)
        assert torch.equal(module.bias, linear.bias) and module.bias.data_ptr() != linear.bias.data_ptr()
    mask[2, 4:8] = True
    with pytest.raises(RuntimeError, match="mask"):
        Linear24.from_linear(linear, "slope", mask=mask)


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_masks_change_every_refresh_steps_and_never_in_between():
    module = layer(refresh=3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    tracking = track24(module, optimizer)
    generator, changes = torch.Generator().manual_seed(2), []
    for _ in range(7):
        module.weight.grad = torch.randn(N, M, generator=generator)
        before = module.mask
        optimizer.step()
        changes.append(not torch.equal(module.mask, before))
        if changes[-1]:
            assert torch.equal(module.mask, _ops.prune24(module.weight.detach(), "transposable"))
    assert changes == [False, False, True, False, False, True, False]
    tracking.remove()
    for _ in range(3):
        optimizer.step()
    assert module.state_dict()["age"] == 7


def test_wandas_score_is_used_at_every_refresh():
    linear, norm = nn.Linear(M, N), torch.rand(M) * 5
    module = Linear24.from_linear(linear, "dynamic", by="row", refresh=1, input_norm=norm)
    assert torch.equal(module.mask, _ops.prune24(linear.weight.detach(), "row", linear.weight.detach().abs() * norm))
    assert not torch.equal(module.mask, _ops.prune24(linear.weight.detach(), "row"))
    nn.init.normal_(module.weight)
    module.after_step()
    assert torch.equal(module.mask, _ops.prune24(module.weight.detach(), "row", module.weight.detach().abs() * norm))
    assert torch.equal(module.state_dict()["input_norm"], norm)


def test_slope_chooses_the_transposes_mask_anew_where_asked():
    module = layer("slope", refresh=2)
    mask, meta_t = module.mask, module.meta_t.clone()
    nn.init.normal_(module.values)
    module.after_step()
    assert torch.equal(module.meta_t, meta_t)
    module.after_step()
    assert not torch.equal(module.meta_t, meta_t) and torch.equal(module.mask, mask)
    x, dy = torch.randn(4, M), torch.randn(4, N)
    assert_close(gradients(module, x, dy)[1], {"x": dy @ double_pruned(module)})


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_srste_decays_what_is_pruned_once_a_step(mode):
    module = layer(mode, decay=0.3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    track24(module, optimizer)
    weight, mask = module.weight.detach().clone(), module.mask
    total = torch.zeros(N, M)
    for _ in range(2):  # two passes that accumulate
        x, dy = torch.randn(6, M), torch.randn(6, N)
        module(x).backward(dy)
        total += dy.t() @ x
    optimizer.step()
    torch.testing.assert_close(
        module.weight.detach(), weight - 0.1 * (total + 0.3 * ~mask * weight), rtol=1e-4, atol=1e-5
    )


def test_a_layer_is_tracked_once():
    for module in (layer(), mask_layer()):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        tracking = track24(module, optimizer)
        with pytest.raises(ValueError, match="is tracked already"):
            track24(module, optimizer)
        other = copy.deepcopy(module)
        track24(other, torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1))
        tracking.remove()
        track24(module, optimizer)


def test_repack_follows_changes_that_are_not_the_optimizers():
    for mode in TRAINED:
        module, x = layer(mode), torch.randn(3, M)
        track24(module, torch.optim.SGD(module.parameters(), lr=0.1))
        nn.init.normal_(main(module))
        module.repack_()
        torch.testing.assert_close(module(x), F.linear(x, module.sparse_weight(), module.bias), rtol=1e-5, atol=1e-5)
        _, got = gradients(module, x, torch.ones(3, N))
        assert_close(
            got, {"x": (double_pruned(module) if mode == "slope" else module.sparse_weight()).sum(0).expand(3, M)}
        )


def test_per_layer_updates_are_followed():
    for mode in TRAINED:
        model = nn.Sequential(layer(mode), nn.ReLU(), nn.Linear(N, 1))
        optimizer = optim.per_layer(model, lambda p: optim.AdamW8bit(p, lr=0.01), accumulation_steps=2)
        track24(model, optimizer)
        x, before = torch.randn(8, M), main(model[0]).detach().clone()
        for _ in range(4):
            model(x).square().mean().backward()
            model(x).square().mean().backward()
            optimizer.step()
        assert not torch.equal(main(model[0]).detach(), before)
        expected = F.linear(x, model[0].sparse_weight(), model[0].bias)
        torch.testing.assert_close(model[0](x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: track24(nn.Linear(4, 4), torch.optim.SGD(m.parameters())), "Linear has no Linear24 in training"),
        (lambda m: track24(m.to_inference(), torch.optim.SGD(m.parameters())), "no Linear24 in training"),
        (lambda m: track24(m, torch.optim.SGD([m.bias])), "the SGD does not hold the parameters of"),
        (
            lambda m: track24(m, optim.per_layer(m, lambda p: optim.AdamW8bit(p))),
            "decay needs gradients that live until the step",
        ),
    ],
)
def test_what_cannot_be_tracked(make, message):
    with pytest.raises(ValueError, match=message):
        make(layer(decay=0.1))


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mode": "static"}, {"mode": "slope"}, {"decay": 2e-3, "refresh": 5}], ids=str)
def test_training_reduces_the_loss(options):
    torch.manual_seed(0)
    options = {"mode": "dynamic"} | options
    model = nn.Sequential(layer(**options), nn.ReLU(), layer(options["mode"], 8, N, seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    track24(model, optimizer)
    x = torch.randn(64, M)
    target = torch.relu(x @ torch.randn(M, 16)) @ torch.randn(16, 8) / 16
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize("mode", TRAINED)
def test_checkpointing_recomputes_the_same(mode):
    module, x, dy = layer(mode), torch.randn(6, M, requires_grad=True), torch.randn(6, N)
    y, want = gradients(module, x, dy)
    again = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(again.double(), y)
    again.backward(dy)
    assert torch.equal(x.grad.double(), want["x"]) and torch.equal(main(module).grad.double(), list(want.values())[1])


# ---- compiled, moved, copied, saved ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("mode", TRAINED)
def test_compiled_training_is_the_same(mode, tracked):
    """No graph break, no new graph when a mask changes, and no weights of the step before."""
    torch._dynamo.reset()
    eager = layer(mode, **({"refresh": 2} if mode == "dynamic" else {}))
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (eager, compiled)]
    if tracked:
        for module, optimizer in zip((eager, compiled), optimizers, strict=True):
            track24(module, optimizer)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            x = torch.randn(6, M, generator=torch.Generator().manual_seed(step))
            results = []
            for function, optimizer in zip((eager, call), optimizers, strict=True):
                y = function(x)
                y.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                results.append(y.detach())
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert torch.equal(eager.mask, compiled.mask)
    torch.testing.assert_close(main(eager), main(compiled), rtol=1e-6, atol=1e-6)


EXPECTED_STATE = {
    "dynamic": {"weight": (torch.float32, (N, M)), "age": (torch.int64, ())},
    "static": {"weight": (torch.float32, (N, M)), "age": (torch.int64, ())},
    "slope": {"values": (torch.float32, (N, 20)), "meta_t": (torch.uint8, (M, 3)), "age": (torch.int64, ())},
    "inference": {"values": (torch.float32, (N, 20))},
}


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_is_plain_and_goes_through_safetensors(mode):
    module, x = layer(mode), torch.randn(4, M)
    state = module.state_dict()
    expected = EXPECTED_STATE[mode] | {"bias": (torch.float32, (N,)), "meta": (torch.uint8, (N, 5))}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == expected
    assert all(t.is_contiguous() for t in state.values())
    other = layer(mode, seed=1)
    other.load_state_dict(load(save(state)))
    dy = torch.randn(4, N)
    a, b = (gradients(m, x, dy) if mode != "inference" else (m(x), {}) for m in (module, other))
    assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.mark.parametrize("mode", ["dynamic", "slope"])
def test_a_run_resumes_bit_exactly_between_two_masks(mode):
    def run(module, optimizer, steps):
        track24(module, optimizer)
        for step in steps:
            x = torch.randn(6, M, generator=torch.Generator().manual_seed(step))
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def start(seed):
        module = layer(mode, refresh=3, seed=seed)
        return module, torch.optim.AdamW(module.parameters(), lr=0.05)

    straight, optimizer = start(0)
    run(straight, optimizer, range(8))
    first, optimizer = start(0)
    run(first, optimizer, range(4))
    second, other = start(1)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    run(second, other, range(4, 8))
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_loading_brings_a_tracked_layer_up_to_date():
    for mode in TRAINED:
        module, other, x = layer(mode), layer(mode, seed=1), torch.randn(3, M)
        track24(module, torch.optim.SGD(module.parameters(), lr=0.1))
        module.load_state_dict(other.state_dict())
        assert torch.equal(module(x), other(x))


@pytest.mark.parametrize("mode", MODES)
def test_corrupt_metadata_raise_on_loading_and_do_not_enter(mode):
    model = nn.ModuleDict({"inner": layer(mode)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in before.items()}
    state["inner.meta"][3, 2] = 0x5C
    with pytest.raises(
        RuntimeError, match=r"inner: meta: slkernels::check24: meta must hold codes .* row 3, columns 20 to 23"
    ):
        model.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    state["inner.meta"] = before["inner.meta"].int()
    with pytest.raises(RuntimeError, match=r"inner: meta: slkernels::check24: meta must be uint8, got int32"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"meta must be \[24, 5\], got \[24, 6\]"):
        layer(mode).load_state_dict(layer(mode, N, M + 8).state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_compute_the_same_and_are_not_tracked(mode):
    module, x = layer(mode), torch.randn(3, M)
    if mode != "inference":
        track24(module, torch.optim.SGD(module.parameters(), lr=0.1))
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False))
    for other in others:
        assert torch.equal(other(x), module(x))
        if mode != "inference":
            nn.init.normal_(main(other))  # an average of weights, say
        torch.testing.assert_close(other(x), F.linear(x, other.sparse_weight(), other.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_moves_leave_the_metadata_alone(mode, dtype):
    module = layer(mode)
    if mode != "inference":
        track24(module, torch.optim.SGD(module.parameters(), lr=0.1))
    mask = module.mask
    module.to(dtype)
    assert module.meta.dtype == torch.uint8 and torch.equal(module.mask, mask)
    x = torch.randn(3, M, dtype=dtype)
    y = module(x)
    expected = F.linear(x.double(), module.sparse_weight().double(), module.bias.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", MODES)
def test_on_meta(mode):
    module = layer(mode, device="meta")
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu").reset_parameters()
    assert module(torch.randn(3, M)).isfinite().all() and module.mask.sum() == N * M // 2


@pytest.mark.parametrize("mode", TRAINED)
def test_ddp_takes_it(mode, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(layer(mode), nn.ReLU(), nn.Linear(N, 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        track24(model, optimizer)
        for _ in range(2):
            model(torch.randn(4, M)).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("mode", TRAINED)
def test_on_a_gpu_it_computes_the_same(gpu, mode, tracked):
    n, m = 128, 256
    module = layer(mode, n, m).to(gpu, torch.bfloat16)
    if tracked:
        track24(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x, dy = (torch.randn(64, size, device=gpu, dtype=torch.bfloat16) for size in (m, n))
    sparse = module.sparse_weight().double()
    y, got = gradients(module, x, dy)
    want = F.linear(x.double(), sparse, module.bias.double())
    dx = dy.double() @ (double_pruned(module).double() if mode == "slope" else sparse)
    for a, b in ((y, want), (got["x"], dx)):
        assert (a - b).abs().max() < 0.01 * b.abs().max()
    packed = module.to_inference()
    assert packed.layout == kernel_layout(gpu, torch.bfloat16)
    with torch.no_grad():
        assert (packed(x).double() - want).abs().max() < 0.01 * want.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sparse"}, "mode must be one of dynamic, static, slope, inference, got 'sparse'"),
        ({"by": "column"}, "by must be"),
        ({"mode": "slope", "by": "transposable"}, "by must be \"row\".*got 'transposable' in mode 'slope'"),
        ({"refresh": 0}, "refresh must be at least 1"),
        ({"mode": "static", "refresh": 5}, 'refresh must be .* in mode "dynamic" or "slope"; got 5'),
        ({"decay": -1.0}, "decay must not be negative"),
        ({"mode": "slope", "decay": 0.1}, 'decay .* in mode "dynamic" or "static"; got 0.1'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Linear24(M, N, **options)


def test_a_mask_that_stays_is_not_chosen_anew():
    for mode in ("static", "inference"):
        with pytest.raises(ValueError, match=f"the mask of a layer in mode '{mode}' stays"):
            layer(mode).prune_()


def test_extra_repr():
    assert repr(layer()) == (
        "Linear24(in_features=40, out_features=24, bias=True, mode=dynamic, by=transposable, refresh=40)"
    )
    module = layer("slope")
    module.add_adapter(2)
    assert repr(module) == "Linear24(in_features=40, out_features=24, bias=True, mode=slope, rank=2)"


# ---- MaskLinear24 ---------------------------------------------------------------------------------------------------


def mask_layer(n=N, m=M, **options):
    torch.manual_seed(0)
    return MaskLinear24.from_linear(nn.Linear(m, n), **({"seed": 5, "steps": 10} | options))


@pytest.mark.parametrize("shape", [(N, M), RAGGED], ids=str)
def test_soft_masks_in_training_and_hard_ones_in_evaluation(shape):
    module = mask_layer(*shape)
    x = torch.randn(4, shape[1])
    soft = module.soft_weight().detach() / module.weight.detach()
    pairs = F.pad(soft, (0, -shape[1] % 4)).view(shape[0], -1, 4)[:, :-1].sum(-1)
    torch.testing.assert_close(pairs, torch.full_like(pairs, 2), rtol=1e-4, atol=1e-4)  # p sums to one
    assert ((soft > 0.05) & (soft < 0.95)).any()
    assert torch.equal(module(x), F.linear(x, module.soft_weight(), module.bias))
    assert torch.equal(module.kept_norm(), module.soft_weight().float().square().sum())
    mask = module.eval().mask
    assert mask.dtype == torch.bool and torch.equal(module(x), F.linear(x, module.weight * mask, module.bias))
    packed = module.to_linear24()
    assert packed.mode == "inference" and torch.equal(packed.mask, mask)
    for other in (packed, module.to_linear24("slope"), module.to_dense()):
        torch.testing.assert_close(other(x), module(x), rtol=1e-5, atol=1e-5)


def test_noise_is_a_function_of_seed_and_step():
    module, other = mask_layer(), mask_layer()
    first = module.soft_weight()
    assert torch.equal(first, module.soft_weight()) and torch.equal(first, other.soft_weight())
    kappa, tau = module.kappa.clone(), module.tau.clone()
    module.after_step()
    module.kappa.copy_(kappa)
    module.tau.copy_(tau)
    second = module.soft_weight()
    assert not torch.equal(first, second)
    assert not torch.equal(first, mask_layer(seed=6).soft_weight())
    restored = mask_layer(seed=9)
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored.soft_weight(), second)


def test_only_the_gate_gets_a_gradient_and_checkpointing_the_same_one():
    module, x = mask_layer(), torch.randn(4, M, requires_grad=True)
    module(x).square().sum().backward()
    assert module.weight.grad is None and module.bias.grad is None and x.grad.any()
    want = module.gate.grad
    module.gate.grad = None
    checkpoint(module, x, use_reentrant=False).square().sum().backward()
    assert want.any() and torch.equal(module.gate.grad, want)


def test_the_gates_gradient_is_that_of_the_masked_weight():
    module = mask_layer(4, 8).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    loss = lambda: module(x).square().sum()  # noqa: E731
    (got,) = torch.autograd.grad(loss(), module.gate)
    for index in [(0, 0, 0), (1, 1, 3), (3, 0, 5)]:
        step, moved = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                module.gate[index] += sign * step
                moved.append(loss())
                module.gate[index] -= sign * step
        torch.testing.assert_close(got[index], (moved[0] - moved[1]) / (2 * step), rtol=1e-3, atol=1e-5)


def test_schedules_are_linear_and_stay_at_their_end():
    module = mask_layer()
    module.gate.grad = None
    optimizer = torch.optim.SGD([module.gate], lr=0.1)
    track24(module, optimizer)
    found = [(module.kappa.item(), module.tau.item())]
    for _ in range(12):
        optimizer.step()
        found.append((module.kappa.item(), module.tau.item()))
    expected = [(100 + 40 * min(i, 10), 4 - 0.395 * min(i, 10)) for i in range(13)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_the_prior_is_where_most_groups_start():
    linear = nn.Linear(256, 256)
    mask = _ops.prune24(torch.randn(256, 256), "row")
    start = MaskLinear24.from_linear(linear, mask=mask, seed=1).mask
    agree = (start == mask).view(-1, 4).all(1).float().mean()
    assert 0.9 < agree < 0.99  # strength 3 leaves some of them to chance: the paper's formula agrees in 94.7 %
    chance = (MaskLinear24.from_linear(linear, strength=0, seed=1).mask == mask).view(-1, 4).all(1).float().mean()
    assert 0.1 < chance < 0.25
    magnitude = MaskLinear24.from_linear(linear, seed=1).mask == _ops.prune24(linear.weight.detach(), "row")
    assert 0.9 < magnitude.view(-1, 4).all(1).float().mean() < 0.99
    with pytest.raises(ValueError, match=r"mask must be \[256, 256\], got \[256, 255\]"):
        MaskLinear24.from_linear(linear).set_prior(mask[:, :-1])


def test_gates_find_a_planted_mask():
    torch.manual_seed(0)
    linear = nn.Linear(16, 12, bias=False)
    planted = _ops.prune24(torch.randn(12, 16), "row")
    module = MaskLinear24.from_linear(linear, steps=150, seed=0)
    optimizer = torch.optim.AdamW([module.gate], lr=2e-3, weight_decay=0.0)
    track24(module, optimizer)
    before = (module.mask == planted).view(-1, 4).all(1).float().mean()
    for _ in range(150):
        x = torch.randn(64, 16)
        loss = F.mse_loss(module(x), F.linear(x, linear.weight * planted))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = (module.mask == planted).view(-1, 4).all(1).float().mean()
    assert before < 0.5 and after > 0.9, (before, after)


def test_gates_keep_their_dtype_when_the_module_moves():
    module = mask_layer()
    module(torch.randn(2, M)).sum().backward()
    gate = module.gate.detach().clone()
    for moved in (module.to(torch.bfloat16), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert moved.weight.dtype == torch.bfloat16 and moved.gate.dtype == torch.float32 == moved.kappa.dtype
        assert torch.equal(moved.gate, gate)
        y = moved(torch.randn(2, M, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
    assert module.gate.grad.dtype == torch.float32
    assert mask_layer(gate_dtype=torch.bfloat16).gate.dtype == torch.bfloat16
    assert module.double().gate.dtype == torch.float64 and module.gate.grad.dtype == torch.float64
    assert module.float().gate.dtype == torch.float32


def test_mask_layers_compile_and_go_on_without_a_new_graph():
    torch._dynamo.reset()
    eager, x = mask_layer(), torch.randn(4, M)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            results = []
            for module, function in ((eager, eager), (compiled, call)):
                module.gate.grad = None
                function(x).square().sum().backward()
                results.append(module.gate.grad)
                module.after_step()
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_mask_layers_on_meta():
    module = MaskLinear24(M, N, seed=3, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.gate, MaskLinear24(M, N, seed=3).gate) and module.kappa == 100 and module.step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"tau": (1.0, 0.0)}, "tau must be positive"),
        ({"gate_dtype": torch.float16}, "gate_dtype must be float32 or bfloat16, got torch.float16"),
    ],
)
def test_mask_layers_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MaskLinear24(M, N, **options)
