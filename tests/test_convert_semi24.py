"""convert.semi24 and convert.maskllm: what is swapped, by which score, and what of a model still trains."""

import copy

import pytest
import torch
from slkernels import convert
from slkernels.nn import Linear24, MaskLinear24, track24
from slkernels.semi24 import input_norms, wanda_score
from test_convert import TARGETS, Block, llama, make_model  # noqa: F401  (llama is a fixture)
from torch import nn

_ops = torch.ops.slkernels

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"verbose": False, "return_report": True}
TRAINED = ("dynamic", "static", "slope")


def calibration():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 5, 16, generator=generator) * torch.linspace(0, 3, 16) for _ in range(2)]


@pytest.mark.parametrize("mode", [*TRAINED, "inference"])
def test_swaps_the_targets_only_and_in_place(mode):
    model = make_model().eval()
    head, weight = model["head"], model["blocks"][0].mlp[0].weight.detach().clone()
    converted, report = convert.semi24(model, mode, **QUIET)
    assert converted is model and report.swapped == TARGETS and model["head"] is head
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear24)}
    assert list(layers) == TARGETS and all(m.mode == mode and not m.training for m in layers.values())
    assert {swap.outcome for swap in report.swaps} == {f"Linear24 {mode}"}
    by = "transposable" if mode in ("dynamic", "static") else "row"
    mask = _ops.prune24(weight, by)
    assert torch.equal(layers["blocks.0.mlp.0"].sparse_weight(), weight * mask)
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    assert [row[3] for row in report.rows()] == [f"Linear24 {mode}"] * 4


def test_options_reach_every_layer():
    model, _ = convert.semi24(make_model(), by="row", refresh=7, decay=2e-4, **QUIET)
    layers = [m for m in model.modules() if isinstance(m, Linear24)]
    assert len(layers) == 8 and {(m.by, m.refresh, m.decay) for m in layers} == {("row", 7, 2e-4)}


def test_converted_layers_are_left_alone_but_by_inference():
    x = torch.randn(3, 16)
    for convert_ in (lambda m: convert.semi24(m, "slope", **QUIET), lambda m: convert.maskllm(m, seed=0, **QUIET)):
        model = convert_(make_model())[0].eval()
        before = {name: id(p) for name, p in model.named_parameters()}
        for again in (convert.semi24, convert.maskllm):
            assert {s.outcome for s in again(model, **QUIET)[1].swaps} == {"kept: already converted"}
        assert {name: id(p) for name, p in model.named_parameters()} == before
        y = model["blocks"](x)
        packed, report = convert.semi24(copy.deepcopy(model), "inference", **QUIET)
        assert report.swapped == TARGETS and report.nbytes[1] < report.nbytes[0]
        torch.testing.assert_close(packed["blocks"](x), y, rtol=1e-4, atol=1e-5)
        assert convert.semi24(packed, "inference", **QUIET)[1].swapped == []
        dense = convert.dense(model)
        assert sum(type(m) is nn.Linear for m in dense.modules()) == 9
        torch.testing.assert_close(dense["blocks"](x), y, rtol=1e-4, atol=1e-5)


def test_wandas_score_is_the_magnitude_times_the_norm_of_the_input():
    model = make_model()
    inputs = {}
    for name in TARGETS:
        hook = lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2))  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    for batch in calibration():
        model["blocks"](batch)
    wanted = {name: torch.cat(rows).norm(dim=0) for name, rows in inputs.items()}
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in TARGETS}
    norms = input_norms(model["blocks"], {name: model.get_submodule(name) for name in TARGETS}, calibration())
    differs = False
    for name in TARGETS:
        torch.testing.assert_close(norms[name], wanted[name])
        score = weights[name].abs() * norms[name]
        assert torch.equal(wanda_score(weights[name], norms[name]), score)
    run = lambda model: [model["blocks"](batch) for batch in calibration()]  # noqa: E731
    for mode, by in (("dynamic", "transposable"), ("static", "row"), ("slope", "row"), ("inference", "row")):
        converted, _ = convert.semi24(copy.deepcopy(model), mode, by=by, score="wanda", calibration=run, **QUIET)
        for name in TARGETS:
            mask = _ops.prune24(weights[name], by, weights[name].abs() * norms[name])
            assert torch.equal(converted.get_submodule(name).mask, mask)
            differs |= not torch.equal(mask, _ops.prune24(weights[name], by))
    assert differs
    masks, _ = convert.maskllm(copy.deepcopy(model), score="wanda", calibration=run, strength=20.0, **QUIET)
    name = TARGETS[2]
    agree = masks.get_submodule(name).mask == _ops.prune24(weights[name], "row", weights[name].abs() * norms[name])
    assert agree.view(-1, 4).all(1).float().mean() > 0.99


@pytest.mark.parametrize("form", [lambda t: t, lambda t: (t,), lambda t: {"x": t}], ids=["tensor", "tuple", "mapping"])
def test_calibration_takes_batches_of_any_form_and_leaves_the_model_as_it_was(form):
    model = Block().train()
    model.mlp[1].eval()
    modes = [m.training for m in model.modules()]
    batches = [form(batch) for batch in calibration()]
    norms = input_norms(model, {"q": model.attn["q"]}, batches)
    torch.testing.assert_close(norms["q"], torch.cat(calibration()).flatten(0, 1).norm(dim=0))
    assert [m.training for m in model.modules()] == modes and not model.attn["q"]._forward_pre_hooks


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"no nn\.Linear of ModuleDict has a name that contains any of"):
        convert.semi24(make_model(), targets="conv", verbose=False)
    with pytest.raises(ValueError, match="mode must be one of"):
        convert.semi24(make_model(), "magnitude", verbose=False)
    with pytest.raises(ValueError, match='score must be "magnitude" or "wanda", got \'hessian\''):
        convert.semi24(make_model(), score="hessian", verbose=False)
    for options in ({"score": "wanda"}, {"calibration": calibration()}):
        with pytest.raises(ValueError, match='score="wanda" needs calibration'):
            convert.maskllm(make_model(), verbose=False, **options)
    with pytest.raises(ValueError, match=r"calibration did not call blocks\.1\.attn\.q"):
        model = make_model()
        run = lambda model: model["blocks"][0](calibration()[0])  # noqa: E731
        convert.semi24(model, targets=["attn.q"], score="wanda", calibration=run, verbose=False)
    with pytest.raises(ValueError, match=r"input_norm must be \[16\], got \[15\]"):
        wanda_score(torch.ones(2, 16), torch.ones(15))


def test_only_gates_train_after_maskllm():
    model, report = convert.maskllm(make_model(), seed=3, steps=50, kappa=(10, 20), tau=(2, 1), **QUIET)
    assert report.swapped == TARGETS
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{name}.gate" for name in TARGETS}
    layers = [m for m in model.modules() if isinstance(m, MaskLinear24)]
    assert {(m.steps, m.kappa.item(), m.tau.item()) for m in layers} == {(50, 10.0, 2.0)}
    assert len({m.seed.item() for m in layers}) == len(layers)
    again, _ = convert.maskllm(make_model(), seed=3, **QUIET)
    for name in TARGETS:
        assert torch.equal(model.get_submodule(name).gate, again.get_submodule(name).gate)
    torch.manual_seed(1)
    other = convert.maskllm(make_model(), verbose=False)
    assert not torch.equal(other.get_submodule(TARGETS[0]).gate, again.get_submodule(TARGETS[0]).gate)


def test_a_module_under_two_names_stays_one():
    shared = nn.Linear(16, 16)
    for mode in (*TRAINED, "inference"):
        model = nn.ModuleDict({"mlp_a": copy.deepcopy(shared)})
        model["mlp_b"] = model["mlp_a"]
        convert.semi24(model, mode, verbose=False)
        assert isinstance(model["mlp_a"], Linear24) and model["mlp_a"] is model["mlp_b"]


@pytest.mark.parametrize("mode", [*TRAINED, "maskllm"])
def test_on_meta(mode):
    with torch.device("meta"):
        model = Block()
    model = convert.maskllm(model, verbose=False) if mode == "maskllm" else convert.semi24(model, mode, verbose=False)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert model(torch.randn(3, 16)).isfinite().all()


def test_ddp_takes_a_converted_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for convert_ in (convert.semi24, convert.maskllm):
            model = nn.parallel.DistributedDataParallel(convert_(Block(), verbose=False))
            model(torch.randn(3, 16)).sum().backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", [*TRAINED, "maskllm"])
def test_hugging_face_llama_trains(llama, mode):  # noqa: F811
    if mode == "maskllm":
        model, report = convert.maskllm(llama, steps=16, seed=0, **QUIET)
    else:
        model, report = convert.semi24(llama, mode, **QUIET)
    assert len(report.swapped) == 14 and type(model.lm_head) is nn.Linear
    tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    track24(model, optimizer)
    losses = []
    for _ in range(16):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - (0.05 if mode == "maskllm" else 1), losses


def test_hugging_face_llama_saves_loads_and_generates(llama, tmp_path):  # noqa: F811
    from safetensors.torch import load_file

    for mode in ("slope", "inference"):
        model = convert.semi24(copy.deepcopy(llama), mode, verbose=False).eval()
        model.save_pretrained(tmp_path / mode)
        other = convert.semi24(copy.deepcopy(llama), mode, verbose=False).eval()
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.zero_()
        other.load_state_dict(load_file(tmp_path / mode / "model.safetensors"))
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.equal(other(tokens).logits, model(tokens).logits)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert other.generate(tokens, **options).shape == (1, 6)
