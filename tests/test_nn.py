"""SLLinear and LowRankLinear: what they compute, their state dicts, and how they move."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from slkernels import Support
from slkernels.nn import LowRankLinear, SLLinear, exclude_indices_from_ddp
from torch import nn

M, N, RANK, DENSITY, ALPHA = 40, 56, 8, 0.1, 4.0


def sl_linear(**changes):
    """A layer whose B is not zero, so that no term can go missing."""
    options = {"bias": True, "seed": 5} | changes
    module = SLLinear(M, N, RANK, DENSITY, ALPHA, **options)
    with torch.no_grad():
        module.lora_B.copy_(torch.randn(N, RANK, generator=torch.Generator().manual_seed(1)))
    return module


def dense_weight(module):
    """W by its definition, from the parameters."""
    weight = (module.alpha / module.rank) * module.lora_B.double() @ module.lora_A.double()
    return weight.flatten().index_add(0, module.support.to_flat(), module.values.double()).view(N, M)


def test_forward_and_gradients_are_those_of_the_definition():
    torch.manual_seed(0)
    module, x = sl_linear(), torch.randn(3, 7, M, requires_grad=True)
    dy = torch.randn(3, 7, N)
    parameters = dict(module.named_parameters())
    y = module(x)
    got = torch.autograd.grad(y, [x, *parameters.values()], dy)
    expected = nn.functional.linear(x.double(), dense_weight(module), module.bias.double())
    want = torch.autograd.grad(expected, [x, *parameters.values()], dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(["x", *parameters], got, want, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_weight_to_dense_and_paths_agree():
    torch.manual_seed(0)
    x = torch.randn(5, M)
    modules = [sl_linear(path=path) for path in ("auto", "chain", "compose")]
    expected = nn.functional.linear(x.double(), dense_weight(modules[0]), modules[0].bias.double())
    for module in modules:
        torch.testing.assert_close(module.weight.double(), dense_weight(module), rtol=1e-5, atol=1e-6)
        dense = module.eval().to_dense()
        assert type(dense) is nn.Linear and not dense.training and dense.weight.requires_grad
        for y in (module(x), dense(x)):
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_initialisation_is_sltrains():
    module = SLLinear(400, 300, 64, 0.1, 32, bias=True, seed=0)
    assert module.scale == 0.5
    assert not module.lora_B.any()
    for name, fan in (("lora_A", 400), ("values", 400), ("bias", 300)):
        values, bound = getattr(module, name).detach(), fan**-0.5  # kaiming_uniform(a=sqrt(5)) is U(+-1/sqrt(fan_in))
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.95 * bound and abs(values.std() / (bound / 3**0.5) - 1) < 0.1
    assert len(module.values) == int(0.1 * 300 * 400)


def test_a_seed_fixes_everything_and_none_follows_manual_seed():
    state = sl_linear().state_dict()
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), sl_linear().state_dict().values(), strict=True))
    assert not torch.equal(state["col"], sl_linear(seed=6).col)
    seeds = []
    for _ in range(2):
        torch.manual_seed(11)
        seeds += [sl_linear(seed=None).seed, sl_linear(seed=None).seed]
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


def test_state_dict_is_plain_and_goes_through_safetensors():
    module = sl_linear()
    state = module.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "lora_A": (torch.float32, (RANK, M)),
        "lora_B": (torch.float32, (N, RANK)),
        "values": (torch.float32, (224,)),
        "bias": (torch.float32, (N,)),
        "crow": (torch.int32, (N + 1,)),
        "col": (torch.int16, (224,)),
        "support_seed": (torch.int64, ()),
    }
    assert all(t.is_contiguous() for t in state.values())
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    other = sl_linear(seed=9)
    other.load_state_dict(load(save(state)))
    assert other.seed == 5
    x = torch.randn(4, M)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("col", 7, M, r"inner: .*col\[7\] = 40 in row \d+ is out of range"),
        ("col", 7, -3, r"inner: .*col\[7\] = -3"),
        ("crow", 0, 1, r"inner: .*crow\[0\] must be 0"),
        ("crow", N, 10**6, r"inner: .*crow\[56\] must be nnz"),
    ],
)
def test_corrupt_indices_raise_on_loading_and_do_not_enter(assign, name, position, value, message):
    model = nn.ModuleDict({"inner": sl_linear()})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in before.items()}
    state[f"inner.{name}"] = state[f"inner.{name}"].int()
    state[f"inner.{name}"][position] = value
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_int64_columns_are_checked_before_they_are_narrowed():
    module = sl_linear()
    state = module.state_dict()
    state["col"] = state["col"].long()
    module.load_state_dict(state, assign=True)
    assert module.col.dtype == torch.int16
    state["col"] = state["col"].clone()
    state["col"][3] += 2**16  # the same int16
    with pytest.raises(RuntimeError, match=r"col\[3\]"):
        module.load_state_dict(state)


@pytest.mark.parametrize("shuffle", [False, True])
def test_sltrains_checkpoints_load(shuffle):
    torch.manual_seed(3)
    count = int(DENSITY * N * M)
    index = torch.randperm(N * M)[:count]
    index = index if shuffle else index.sort()[0]
    state = {
        "lora_A": torch.randn(RANK, M),
        "lora_B": torch.randn(N, RANK),
        "sparse_value": torch.randn(count),
        "sparse_index": index,
        "bias": torch.randn(N),
    }
    module = sl_linear()
    module.load_state_dict({k: v.clone() for k, v in state.items()})
    weight = (ALPHA / RANK) * state["lora_B"] @ state["lora_A"]
    weight.view(-1).index_add_(0, index, state["sparse_value"])
    torch.testing.assert_close(module.weight, weight)
    assert module.seed == -1 and int(module.support_seed) == -1
    module.reset_parameters()  # keeps a support that comes from no seed
    assert torch.equal(module.support.to_flat(), index.sort()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["sparse_index"].__setitem__(4, N * M), r"index\[4\] = 2240 is out of range"),
        (lambda s: s["sparse_index"].__setitem__(4, s["sparse_index"][3]), r"index\[4\] = 3 is a duplicate"),
        (lambda s: s.pop("sparse_value"), "sparse_index without sparse_value"),
        (lambda s: s.update(scaling=torch.ones(1)), "trainable_scaling"),
    ],
)
def test_faulty_sltrain_checkpoints_raise(change, message):
    state = {"lora_A": torch.zeros(RANK, M), "lora_B": torch.zeros(N, RANK), "bias": torch.zeros(N)}
    state |= {"sparse_index": torch.arange(224), "sparse_value": torch.zeros(224)}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        sl_linear().load_state_dict(state)


def test_a_checkpoint_of_another_density_does_not_fit():
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        sl_linear().load_state_dict(SLLinear(M, N, RANK, 0.2, ALPHA, bias=True).state_dict())


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_dtype_moves_leave_the_indices_alone(move):
    module = sl_linear()
    crow, col = module.crow, module.col
    dtype = move(module).lora_A.dtype
    assert dtype != torch.float32 and module.values.dtype == module.bias.dtype == dtype
    assert module.crow is crow and module.col is col
    assert module(torch.randn(3, M, dtype=dtype)).dtype == dtype


def test_copies_and_pickles_compute_the_same():
    module, x = sl_linear(), torch.randn(3, M)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False))
    for other in others:
        assert torch.equal(other(x), module(x))
        assert other.col.data_ptr() != module.col.data_ptr()


def test_meta_then_reset_is_direct_construction():
    with torch.device("meta"):
        module = SLLinear(M, N, RANK, DENSITY, ALPHA, bias=True, seed=5)
    assert all(t.is_meta for t in module.state_dict().values())
    assert module(torch.empty(3, M, device="meta")).shape == (3, N)
    module.to_empty(device="cpu")
    module.reset_parameters()
    direct = SLLinear(M, N, RANK, DENSITY, ALPHA, bias=True, seed=5)
    for (name, a), b in zip(module.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("assign", [False, True])
def test_meta_then_load(assign):
    source = sl_linear()
    module = SLLinear(M, N, RANK, DENSITY, ALPHA, bias=True, device="meta")
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(3, M)
    assert torch.equal(module(x), source(x))


def test_indices_from_to_empty_are_caught_before_they_are_used():
    module = sl_linear().to_empty(device="cpu")
    module.crow.fill_(0)
    module.col.fill_(1000)
    for use in (lambda: module(torch.randn(3, M)), lambda: module.weight, lambda: module.support):
        with pytest.raises(RuntimeError, match="crow"):
            use()


def test_compiles_as_one_graph():
    module, x = sl_linear(), torch.randn(3, M)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    got = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    module(x).sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear(dtype):
    linear = nn.Linear(M, N, dtype=dtype).eval()
    module = SLLinear.from_linear(linear, RANK, DENSITY, ALPHA, seed=2)
    assert not module.training and module.lora_A.dtype == dtype
    assert torch.equal(module.bias, linear.bias) and module.bias.data_ptr() != linear.bias.data_ptr()
    assert not module.lora_B.any()
    assert SLLinear.from_linear(nn.Linear(M, N, bias=False), RANK, DENSITY).bias is None


def test_from_linear_by_svd_is_exact_at_the_support_and_best_beside_it():
    linear = nn.Linear(M, N)
    module = SLLinear.from_linear(linear, RANK, DENSITY, ALPHA, init="svd", seed=2)
    U, S, Vh = torch.linalg.svd(linear.weight.detach())
    truncated = U[:, :RANK] * S[:RANK] @ Vh[:RANK]
    expected = torch.where(module.support.to_mask(), linear.weight, truncated)
    torch.testing.assert_close(module.weight, expected, rtol=1e-4, atol=1e-5)
    assert (module.weight - linear.weight).norm() < (truncated - linear.weight).norm()


def test_a_given_support_is_used():
    mask = torch.zeros(N, M, dtype=torch.bool)
    mask[3, 4] = mask[50, 39] = True
    module = SLLinear(M, N, RANK, alpha=ALPHA, support=Support.from_dense_mask(mask))
    assert torch.equal(module.weight != 0, mask)  # B is zero
    with pytest.raises(ValueError, match=r"support must be \[56, 40\], got \[40, 56\]"):
        SLLinear(M, N, RANK, support=Support.from_dense_mask(mask.t()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "density": 0.1}, "rank must be at least 1, got 0"),
        ({"rank": 4, "density": 1.5}, r"density must be in \[0, 1\], got 1.5"),
        ({"rank": 4}, "density must be in"),
        ({"rank": 4, "density": 0.1, "seed": -1}, "seed must be in"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SLLinear(M, N, **arguments)


def test_extra_repr():
    assert repr(SLLinear(M, N, RANK, DENSITY, ALPHA)) == (
        "SLLinear(in_features=40, out_features=56, rank=8, density=0.1, alpha=4, bias=False, kind=uniform)"
    )
    assert repr(LowRankLinear(M, N, RANK, gate=True, activation="silu")) == (
        "LowRankLinear(in_features=40, out_features=56, rank=8, alpha=1, bias=False, gate=True, activation=silu)"
    )


def test_ddp_wraps_a_model_with_its_indices_excluded(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(sl_linear(), nn.ReLU(), nn.Linear(N, 1))
        exclude_indices_from_ddp(model)
        assert model._ddp_params_and_buffers_to_ignore == ["0.crow", "0.col", "0.support_seed"]
        ddp = nn.parallel.DistributedDataParallel(model)
        ddp(torch.randn(4, M)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


# ---- LowRankLinear --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
def test_lowrank_forward_and_gradients(gate, activation):
    torch.manual_seed(0)
    module = LowRankLinear(M, N, 5, alpha=0.7, gate=gate, activation=activation, bias=True)
    if gate:
        nn.init.uniform_(module.gate)
    x, dy = torch.randn(6, M, requires_grad=True), torch.randn(6, N)
    parameters = list(module.parameters())
    y = module(x)
    got = torch.autograd.grad(y, [x, *parameters], dy)
    z = x.double() @ module.lora_A.double().t()
    z = z if activation == "none" else getattr(nn.functional, activation)(z)
    z = z * module.gate.double() if gate else z
    expected = 0.7 * z @ module.lora_B.double().t() + module.bias.double()
    want = torch.autograd.grad(expected, [x, *parameters], dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_lowrank_to_dense_needs_a_linear_layer():
    x = torch.randn(3, M)
    module = LowRankLinear(M, N, RANK, alpha=0.5, gate=True, bias=True)
    nn.init.uniform_(module.gate)
    torch.testing.assert_close(module.to_dense()(x), module(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="activation silu"):
        LowRankLinear(M, N, RANK, activation="silu").to_dense()


@pytest.mark.parametrize("rank", [1, RANK, M, M + 9])
def test_lowrank_from_linear_is_the_truncated_svd(rank):
    linear = nn.Linear(M, N)
    module = LowRankLinear.from_linear(linear, rank)
    U, S, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    torch.testing.assert_close(module.weight, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-4, atol=1e-5)
    assert torch.equal(module.bias, linear.bias)


def test_lowrank_starts_with_the_variance_of_a_dense_layer():
    torch.manual_seed(0)
    ratio = LowRankLinear(200, 300, 50, alpha=0.25).weight.var() / nn.Linear(200, 300).weight.var()
    assert 0.9 < ratio < 1.1


def test_lowrank_bad_arguments():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LowRankLinear(M, N, 0)
    with pytest.raises(ValueError, match="activation must be"):
        LowRankLinear(M, N, 4, activation="tanh")
