"""Quantized optimizers under DDP and FSDP2, and their checkpoints, on two processes with gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_workers import Workers
from slkernels.optim import AdamW8bit, per_layer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

ALIGNED = ("even", "uneven", "bias")  # parameters whose blocks do not depend on the number of shards
HYPER = {"lr": 1e-2, "weight_decay": 0.1}
KINDS = ["AdamW8bit", "AdamW8bit-cmp8", "AdamW4bit", "AdamWFp8", "Lion8bit", "SGD8bit", "AdEMAMix8bit", "Muon8bit"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def two(directory):
    workers = Workers(2, directory)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def one(directory):
    workers = Workers(1, directory)
    yield workers
    workers.close()


# ---- what runs in the processes -------------------------------------------------------------------------------------


class Model(nn.Module):
    """Parameters with every relation between shards and blocks."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)

        def make(*shape):
            return nn.Parameter(torch.randn(*shape, generator=g))

        self.even = make(24, 256)  # 6144 elements: a half has fewer than min_numel
        self.uneven = make(33, 512)
        self.narrow = make(65, 100)  # blocks straddle rows
        self.values = make(5001)
        self.bias = make(70)


def gradient(name, p, step):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + len(name))) * 10.0 ** (-step % 4)


def set_gradients(model, step):
    """The same gradient on every rank, whatever the sharding."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, p in model.named_parameters():
        grad = gradient(name, p, step)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def weights(model):
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def train(model, optimizer, steps):
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def unsharded(steps, **options):
    model = Model()
    optimizer = AdamW8bit(model.parameters(), **HYPER, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_same(got, want, loose=()):
    """Bit for bit, but for the parameters in ``loose``, whose blocks begin elsewhere."""
    for name, w in want.items():
        if name in loose:  # a small part of what 8-bit states may differ by
            assert (got[name] - w).abs().max() <= 0.03 and not torch.equal(w, weights(Model())[name]), name
            assert (got[name] - w).square().mean().sqrt() <= 2e-3, name
        else:
            assert torch.equal(got[name], w), name


def fsdp_steps():
    model = sharded(Model())
    optimizer = AdamW8bit(model.parameters(), **HYPER)
    train(model, optimizer, range(6))
    for p in model.parameters():  # by the size of the whole tensor
        assert (optimizer.state[p]["m"].dtype == torch.uint8) == (p.numel() >= 4096)
        assert p.to_local().numel() < p.numel()
    assert_same(weights(model), weights(unsharded(6)[0]), loose=("narrow", "values"))


def fsdp_of(kind):
    """Parameters, codes and scales of an optimizer under fully_shard are those of one process."""
    from test_optim_family import make as make_optimizer

    model, reference = sharded(Model()), Model()
    optimizers = [make_optimizer(kind, list(m.parameters()), max_grad_norm=1e9) for m in (model, reference)]
    for step in range(3):
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            train(m, optimizer, [step])
    got, want = weights(model), weights(reference)
    for name, p in model.named_parameters():
        assert not torch.equal(want[name], weights(Model())[name])
        if name not in ALIGNED:
            continue
        assert torch.equal(got[name], want[name]), name
        q = dict(reference.named_parameters())[name]
        for key, value in optimizers[1].state[q].items():
            assert torch.equal(whole(optimizers[0].state[p][key]), value), (name, key)


def fsdp_random_bits():
    """Shards draw their own bits; a parameter that every rank holds is rounded in the same way on all."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.ParameterDict({"a": nn.Parameter(torch.ones(8, 1024, dtype=torch.bfloat16))}))
    (p,) = model.parameters()
    bias = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
    optimizer = AdamW8bit([p, bias], lr=1e-3, stochastic_rounding=True)
    p.grad, bias.grad = torch.ones_like(p), torch.ones_like(bias)
    optimizer.step()
    for mine, alike in ((p.detach().to_local(), False), (bias.detach(), True)):
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine.contiguous())
        assert 0.05 < (mine != 1).float().mean() < 0.95
        assert torch.equal(parts[0], parts[1]) == alike


def fsdp_clipping():
    model, reference = sharded(Model()), Model()
    clipped = AdamW8bit(model.parameters(), **HYPER, max_grad_norm=0.5)
    plain = AdamW8bit(reference.parameters(), **HYPER, max_grad_norm=0.5)
    for step in range(3):
        train(model, clipped, [step]), train(reference, plain, [step])
        # Sums in another order; the same number on every rank.
        torch.testing.assert_close(clipped.grad_norm, plain.grad_norm, rtol=1e-6, atol=0)
        set_gradients(model, step)
        want = whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        torch.testing.assert_close(clipped.grad_norm, want, rtol=1e-5, atol=0)
        norms = [torch.empty(()) for _ in range(dist.get_world_size())]
        dist.all_gather(norms, clipped.grad_norm)
        assert all(torch.equal(n, norms[0]) for n in norms)
    for name, w in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], w, rtol=0, atol=2e-3)


def fsdp_infinity_on_one_rank():
    """A gradient that overflowed in one shard skips the step on every rank."""
    model = sharded(Model())
    optimizer = AdamW8bit(model.parameters(), **HYPER, max_grad_norm=1.0)
    train(model, optimizer, range(2))
    before = weights(model)
    set_gradients(model, 2)
    if dist.get_rank() == 1:
        model.even.grad.to_local()[0, 0] = float("inf")
    optimizer.step()
    assert_same(weights(model), before)
    assert all(float(s["step"]) == 2 for s in optimizer.state.values())


def tensor_parallel():
    """Columns sharded: whole blocks where they fit, a rank's own elsewhere; gradients that have not been summed yet."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)  # the same tensors on both ranks
    whole_rows, half_blocks, replicated = ((16, 512), Shard(1)), ((40, 300), Shard(1)), ((64, 90), Replicate())
    for shape, placement in (whole_rows, half_blocks, replicated):
        aligned = shape != half_blocks[0]
        value, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
        p, q = nn.Parameter(distribute_tensor(value, mesh, [placement])), nn.Parameter(value.clone())
        a, b = AdamW8bit([p], **HYPER, max_grad_norm=1e9), AdamW8bit([q], **HYPER)
        for grad in grads:
            p.grad, q.grad = distribute_tensor(grad, mesh, [placement]), grad.clone()
            a.step(), b.step()
        assert not aligned or torch.equal(p.full_tensor(), q)
        torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=0.02)
        scale = a.state[p]["m_scale"]
        assert (isinstance(scale, DTensor) and scale.placements == (placement,)) == aligned
        assert not aligned or torch.equal(scale.full_tensor(), b.state[q]["m_scale"])
    p, q = nn.Parameter(distribute_tensor(value, mesh, [Replicate()])), nn.Parameter(value.clone())
    p.grad, q.grad = DTensor.from_local(grad / 2, mesh, [Partial()]), grad
    for parameter in (p, q):
        AdamW8bit([parameter], **HYPER).step()
    assert torch.equal(p.full_tensor(), q)
    with pytest.raises(RuntimeError, match="has not been reduced"):
        AdamW8bit([p], max_grad_norm=1.0).step()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(256, 256), nn.Linear(256, 64), nn.Linear(64, 16, bias=False)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch(step):
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(step))


def make_adamw(params):
    return AdamW8bit(params, lr=1e-2)


def fsdp_network():
    from torch.distributed.fsdp import fully_shard

    model = Network()
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp_per_layer(accumulation):
    """Hooks under fully_shard, with accumulation, give the bits of a global step."""
    a, b = fsdp_network(), fsdp_network()
    whole_step, layered = make_adamw(a.parameters()), per_layer(b, make_adamw, accumulation)
    for step in range(3):
        for micro in range(accumulation):
            for model in (a, b):
                model(batch(10 * step + micro)).square().mean().backward()
        assert all(p.grad is None for p in b.parameters())
        whole_step.step(), whole_step.zero_grad(), layered.step()
        assert_same(weights(b), weights(a))
    assert not torch.equal(weights(a)["layers.0.weight"], weights(Network())["layers.0.weight"])


def ddp_steps():
    model, reference = nn.parallel.DistributedDataParallel(Network()), Network()
    a, b = make_adamw(model.parameters()), make_adamw(reference.parameters())
    for step in range(3):
        model(batch(10 * step + dist.get_rank())).square().mean().backward()
        losses = [reference(batch(10 * step + rank)).square().mean() for rank in range(2)]
        (sum(losses) / 2).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8)
            q.grad.copy_(p.grad)
        for optimizer in (a, b):
            optimizer.step(), optimizer.zero_grad()
        assert_same(weights(model.module), weights(reference))
    codes = [torch.empty_like(s["m"]) for s in a.state.values() for _ in range(2)]
    for i, s in enumerate(a.state.values()):
        dist.all_gather(codes[2 * i : 2 * i + 2], s["m"])
        assert torch.equal(codes[2 * i], codes[2 * i + 1]), "the ranks' states differ"


def ddp_per_layer():
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        per_layer(nn.parallel.DistributedDataParallel(Network()), make_adamw)


def save_checkpoint(path, model, optimizer):
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


def load_checkpoint(path, model, optimizer):
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def make(kind):
    model = Model() if kind == "plain" else sharded(Model())
    optimizer = AdamW8bit(model.parameters(), **HYPER)
    if kind == "plain":
        optimizer.state_dict_format = "sharded"
    return model, optimizer


def checkpoint_begin(path, kind):
    model, optimizer = make(kind)
    train(model, optimizer, range(3))
    save_checkpoint(path, model, optimizer)
    return weights(model)


def checkpoint_continue(source, target, kind, begin, end):
    """Loads into a model that has another state, goes on, saves."""
    model, optimizer = make(kind)
    train(model, optimizer, [50])
    load_checkpoint(source, model, optimizer)
    assert {float(s["step"]) for s in optimizer.state.values()} == {float(begin)}
    train(model, optimizer, range(begin, end))
    save_checkpoint(target, model, optimizer)
    return weights(model)


def per_layer_checkpoint(path):
    """Names of parameters are the keys: what per_layer saved, a global optimizer continues, and the reverse."""
    a, b = fsdp_network(), fsdp_network()
    layered, whole_step = per_layer(a, make_adamw), make_adamw(b.parameters())
    for step in range(2):
        a(batch(step)).square().mean().backward()
        layered.step()
    save_checkpoint(path, a, layered.optimizers)
    load_checkpoint(path, b, whole_step)
    a(batch(7)).square().mean().backward()
    layered.step()
    b(batch(7)).square().mean().backward()
    whole_step.step()
    assert_same(weights(b), weights(a))


def full_state():
    """A full_state_dict, gathered, is the plain optimizer's, and one rank's copy serves all."""
    model = sharded(Model())
    optimizer = AdamW8bit(model.parameters(), **HYPER)
    train(model, optimizer, range(3))
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    reference, plain = unsharded(3)
    want = get_optimizer_state_dict(reference, plain)
    for name in ALIGNED:
        for key, value in full["state"][name].items():
            assert torch.equal(value, want["state"][name][key]), (name, key)
    assert full["state"]["values"]["m_float"].shape == (5001,)
    again = sharded(Model())
    loaded = AdamW8bit(again.parameters(), **HYPER)
    given = full if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(again, loaded, given, options=options)
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            got = loaded.state[dict(again.named_parameters())[name]][key]
            assert name not in ALIGNED or torch.equal(whole(got), whole(value)), (name, key)


# ---- tests ----------------------------------------------------------------------------------------------------------


def test_fsdp_steps_are_those_of_one_process(two):
    two.run(fsdp_steps)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_states_shard_with_their_parameter(two, kind):
    two.run(fsdp_of, kind)


def test_fsdp_random_bits(two):
    two.run(fsdp_random_bits)


def test_fsdp_clips_by_the_norm_of_all_shards(two):
    two.run(fsdp_clipping)


def test_fsdp_infinity_on_one_rank_skips_the_step_on_all(two):
    two.run(fsdp_infinity_on_one_rank)


def test_tensor_parallel_placements(two):
    two.run(tensor_parallel)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_fsdp_per_layer_is_the_global_step(two, accumulation):
    two.run(fsdp_per_layer, accumulation)


def test_ddp_steps_are_those_of_one_process(two):
    two.run(ddp_steps)


def test_per_layer_refuses_ddp(two):
    """Its gradients are averaged only after the hooks have run."""
    two.run(ddp_per_layer)


@pytest.mark.parametrize("alone", ["fsdp", "plain"])
def test_checkpoint_reshards_from_two_processes_to_one_and_back(two, one, directory, alone):
    paths = [f"{directory}/{alone}{i}" for i in range(3)]
    (first, _) = two.run(checkpoint_begin, paths[0], "fsdp")
    (second,) = one.run(checkpoint_continue, paths[0], paths[1], alone, 3, 5)
    (third, other) = two.run(checkpoint_continue, paths[1], paths[2], "fsdp", 5, 8)
    assert_same(other, third)
    for steps, got in ((3, first), (5, second), (8, third)):
        assert_same(got, weights(unsharded(steps)[0]), loose=("narrow", "values"))


def test_checkpoint_of_per_layer_is_that_of_a_global_optimizer(two, directory):
    two.run(per_layer_checkpoint, f"{directory}/per_layer")


def test_checkpoint_full_state_dict(two):
    two.run(full_state)
