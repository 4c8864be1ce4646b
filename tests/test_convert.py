"""Conversion of whole models, Hugging Face's LLaMA included (its configuration is made here, nothing is downloaded)."""

import copy

import pytest
import torch
from slkernels import convert
from slkernels.nn import LowRankLinear, SLLinear
from torch import nn


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(width, width, bias=False), "o": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.mlp(self.attn["o"](self.attn["q"](x))))


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.Sequential(Block(), Block()), "head": nn.Linear(16, 5)})


TARGETS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.q", "attn.o", "mlp.0", "mlp.2")]


def sltrain(model, **options):
    return convert.sltrain(model, 4, 0.1, 8, **({"seed": 3, "verbose": False, "return_report": True} | options))


def test_swaps_the_targets_only_and_in_place():
    model = make_model().eval()
    norm, head = model["blocks"][0].norm, model["head"]
    converted, report = sltrain(model)
    assert converted is model and report.swapped == TARGETS
    for name, module in model.named_modules():
        assert isinstance(module, SLLinear) == (name in TARGETS), name
        assert not module.training
    assert model["blocks"][0].norm is norm and model["head"] is head
    q, o = model["blocks"][0].attn["q"], model["blocks"][0].attn["o"]
    assert q.bias is None and o.bias is not None and (q.rank, q.alpha, q.density) == (4, 8, 0.1)
    assert convert.sltrain(make_model(), 4, 0.1, 8, verbose=False)["head"]  # the model alone by default


def test_counts_are_those_of_the_tensors():
    model = make_model()
    before = sum(p.numel() for p in model.parameters())
    _, report = sltrain(model)
    after = sum(p.numel() for p in model.parameters())
    assert report.parameters == (before, after)
    indices = sum(b.nbytes for b in model.buffers())
    assert report.nbytes == (4 * before, 4 * after + indices) and indices > 0
    assert sum(s.before - s.after for s in report.swaps) == before - after


def test_the_printed_table(capsys):
    convert.sltrain(make_model(), 4, 0.1, 8, seed=3)
    text = capsys.readouterr().out
    assert "parameters 3,349 -> " in text and "bytes 13,396 -> " in text


def test_rows_group_the_layers():
    _, report = sltrain(make_model())
    assert [row[:3] for row in report.rows()] == [
        ("blocks.*.attn.q", "2", "16x16"),
        ("blocks.*.attn.o", "2", "16x16"),
        ("blocks.*.mlp.*", "2", "32x16"),
        ("blocks.*.mlp.*", "2", "16x32"),
    ]


def test_seeds_depend_on_the_name_and_not_on_what_else_is_swapped():
    whole, part, other = (
        sltrain(make_model())[0],
        sltrain(make_model(), targets=["1.mlp"])[0],
        sltrain(make_model(), seed=4)[0],
    )
    a, b, c = (m["blocks"][1].mlp[0] for m in (whole, part, other))
    assert all(torch.equal(s, t) for s, t in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.col, c.col)
    assert not torch.equal(a.col, whole["blocks"][0].mlp[0].col)
    assert isinstance(part["blocks"][0].mlp[0], nn.Linear)


def test_a_seed_that_is_not_given_follows_manual_seed():
    columns = []
    for _ in range(2):
        model = make_model()
        torch.manual_seed(8)
        columns.append(sltrain(model, seed=None)[0]["blocks"][0].attn["q"].col)
    assert torch.equal(*columns)


def test_targets_that_match_nothing_raise():
    for convert_ in (lambda m: sltrain(m, targets=["conv"]), lambda m: convert.lowrank(m, 4, targets="conv")):
        with pytest.raises(ValueError, match=r"no nn\.Linear of ModuleDict has a name that contains any of"):
            convert_(make_model())


def test_a_string_is_one_target():
    assert sltrain(make_model(), targets="attn.q")[1].swapped == ["blocks.0.attn.q", "blocks.1.attn.q"]


def test_converted_layers_are_left_alone():
    model, _ = sltrain(make_model())
    before = {name: id(p) for name, p in model.named_parameters()}
    _, report = sltrain(model, seed=99)
    assert report.swapped == [] and {s.outcome for s in report.swaps} == {"kept: already converted"}
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_tied_weights_are_kept():
    model = nn.ModuleDict(
        {"embed_mlp": nn.Embedding(7, 16), "head_mlp": nn.Linear(16, 7, bias=False), "mlp": nn.Linear(16, 16)}
    )
    model["head_mlp"].weight = model["embed_mlp"].weight
    _, report = sltrain(model)
    assert report.swapped == ["mlp"]
    assert model["head_mlp"].weight is model["embed_mlp"].weight
    assert [s.outcome for s in report.swaps if s.name == "head_mlp"] == ["kept: its weight is tied"]


def test_a_module_under_two_names_stays_one():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"mlp_a": shared, "mlp_b": shared})
    _, report = sltrain(model)
    assert isinstance(model["mlp_a"], SLLinear) and model["mlp_a"] is model["mlp_b"]
    assert report.parameters == (272, sum(p.numel() for p in model.parameters()))


def test_subclasses_of_linear_are_kept():
    model = nn.TransformerEncoderLayer(16, 2, 32)  # its attention reads out_proj.weight itself
    _, report = sltrain(model, targets=["attn", "linear"])
    assert report.swapped == ["linear1", "linear2"]
    assert [s.outcome for s in report.swaps if s.name.endswith("out_proj")] == [
        "kept: a NonDynamicallyQuantizableLinear"
    ]


def test_on_meta():
    with torch.device("meta"):
        model = Block()
    sltrain(model)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert model(torch.randn(3, 16)).isfinite().all()


def test_lowrank_and_back_to_dense():
    x = torch.randn(3, 16)
    for convert_ in (lambda m: convert.lowrank(m, 4, verbose=False), lambda m: sltrain(m, init="svd")[0]):
        model = convert_(make_model())
        assert sum(isinstance(m, (LowRankLinear, SLLinear)) for m in model.modules()) == len(TARGETS)
        y = model["blocks"](x)
        dense = convert.dense(copy.deepcopy(model))
        assert sum(type(m) is nn.Linear for m in dense.modules()) == len(TARGETS) + 1
        torch.testing.assert_close(dense["blocks"](x), y, rtol=1e-4, atol=1e-5)


def test_svd_at_full_rank_keeps_the_function():
    model, x = make_model(), torch.randn(3, 16)
    y = model["blocks"](x)
    torch.testing.assert_close(
        convert.lowrank(model, 16, init="svd", verbose=False)["blocks"](x), y, rtol=1e-4, atol=1e-5
    )


def test_ddp_takes_a_converted_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(sltrain(Block())[0])
        model(torch.randn(3, 16)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )


@pytest.mark.parametrize("method", ["sltrain", "lowrank"])
def test_hugging_face_llama_trains(llama, method):
    if method == "sltrain":
        model, report = sltrain(llama)
    else:
        model, report = convert.lowrank(llama, 4, verbose=False, return_report=True)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.rpartition(".")[2] for name in report.swapped} == set(projections) and len(report.swapped) == 14
    assert type(model.lm_head) is nn.Linear

    tokens = torch.randint(64, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1, losses


def test_hugging_face_llama_saves_and_loads(llama, tmp_path):
    model, _ = sltrain(llama)
    other = copy.deepcopy(model)
    for p in other.parameters():
        nn.init.zeros_(p)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    tokens = torch.randint(64, (1, 9))
    assert torch.equal(other.eval()(tokens).logits, model.eval()(tokens).logits)


def test_hugging_face_llama_generates(llama):
    model = sltrain(llama)[0].eval()
    tokens = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert tokens.shape == (1, 7)
