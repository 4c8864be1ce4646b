"""bench/pretrain.py: the text, the model, runs that an interrupt does not change by a bit, and the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from slkernels.bench import corpus as corpus_module
from slkernels.bench import pretrain, supports
from slkernels.bench.llama import Llama, LlamaConfig
from slkernels.bench.pretrain import measure_step
from slkernels.bench.trainer import (
    SUPPORTS,
    Run,
    Settings,
    StepMeter,
    build_model,
    build_optimizer,
    learning_rate,
)
from slkernels.nn import Linear24, MaskLinear24, SLLinear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small tree of sources; with 200 files, some are held out."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(200):
        path = folder / f"package{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"def function_{i}(argument):\n    return argument + {i}\n" * 3)
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text("not the standard library")
    (folder / "notes.txt").write_text("not Python")
    return folder


@pytest.fixture(scope="module")
def corpus(root):
    return corpus_module.load(root)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_the_text_is_every_source_file_once(root, corpus):
    assert corpus.files == 200
    parts = [bytes(t.numpy()).split(b"\0")[:-1] for t in (corpus.train, corpus.validation)]
    assert sorted(parts[0] + parts[1]) == sorted(p.read_bytes() for p in root.glob("package*/*.py"))
    assert parts[0] and parts[1] and not set(parts[0]) & set(parts[1])


def test_batches_are_a_function_of_seed_step_and_part(corpus):
    shape = (4, 17)
    batch = corpus.batch(1, 5, 0, shape)
    assert batch.shape == shape and batch.dtype == torch.int64
    assert torch.equal(batch, corpus.batch(1, 5, 0, shape))
    assert not any(torch.equal(batch, corpus.batch(*other, shape)) for other in ((2, 5, 0), (1, 6, 0), (1, 5, 1)))
    text = bytes(corpus.train.numpy())
    assert all(bytes(row.to(torch.uint8).numpy()) in text for row in batch)


def test_the_standard_library_is_there():
    text = corpus_module.load()
    assert len(text.train) > 5_000_000 and 0.01 < len(text.validation) / len(text.train) < 0.2


def test_too_few_files_raise(tmp_path):
    with pytest.raises(RuntimeError, match="0 training and 0 validation files"):
        corpus_module.load(tmp_path)


# ---- model ----------------------------------------------------------------------------------------------------------


def test_the_model_is_hugging_faces_llama():
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    torch.manual_seed(0)
    ours = Llama(LlamaConfig(48, 80, 3, 2, rank=4, density=0.1, alpha=4, batch=1, accumulate=1, steps=1))
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        rms_norm_eps=1e-6,
    )
    theirs = transformers.LlamaForCausalLM(config)
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    state = {}
    for name, p in ours.state_dict().items():
        first, _, rest = name.partition(".")
        name = f"{names[first]}.{rest}" if first in names else f"model.{name}"
        name = name.replace("attn_norm", "input_layernorm").replace("mlp_norm", "post_attention_layernorm")
        state[name.replace(".attn.", ".self_attn.")] = p
    theirs.load_state_dict(state)
    tokens = torch.randint(256, (2, 12))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    expected = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(ours.loss(tokens), expected, rtol=1e-4, atol=1e-5)


def test_the_paper_shapes_have_the_papers_parameters():
    # Linear parameters of attention and MLP and SLTrain's nonzeros, in millions: GaLore's configurations.
    papers = (("60m", 25.3, 0.76), ("350m", 302.4, 9.07), ("1b", 1207.9, 36.2), ("7b", 6476.0, 323.8))
    for config, linear, nonzeros in papers:
        with torch.device("meta"):
            settings = Settings(config, "dense", device="meta").resolved()
            dense = build_model(settings)
            sparse = build_model(replace(settings, method="sltrain"))
        weights = [m.weight.numel() for n, m in dense.named_modules() if "proj" in n]
        assert sum(weights) / 1e6 == pytest.approx(linear, abs=0.06)
        values = [m.values.numel() for n, m in sparse.named_modules() if "proj" in n]
        assert sum(values) / 1e6 == pytest.approx(nonzeros, abs=0.06)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    settings = Settings(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 <= rates[-1] < 0.102


# ---- runs -----------------------------------------------------------------------------------------------------------

SMALL = {"steps": 6, "batch": 2, "sequence": 24, "accumulate": 1, "validations": 2, "validation_windows": 4}
RUNS = {
    "dense": {"method": "dense"},
    "lowrank": {"method": "lowrank"},
    "sltrain": {"method": "sltrain"},
    "sltrain-bf16": {"method": "sltrain", "dtype": "bfloat16"},
    "sltrain-per-layer": {"method": "sltrain", "per_layer": True, "accumulate": 2},
    "galore": {"method": "galore", "gap": 2},
    "qgalore-bf16": {"method": "qgalore", "gap": 2, "dtype": "bfloat16"},
    "apollo-per-layer": {"method": "apollo", "gap": 2, "per_layer": True, "accumulate": 2},
    "semi24": {"method": "semi24", "refresh": 2, "decay": 1e-3, "accumulate": 2},
    "semi24-per-layer": {"method": "semi24", "refresh": 2, "optimizer": "adamw8bit", "per_layer": True},
    "slope": {"method": "slope", "adapter": 0.67},  # the checkpoint at step 3 has adapters
    "maskllm": {"method": "maskllm"},
}


def dense_weights(folder):
    """A file of a dense model's weights, not trained."""
    path = folder / "dense.pt"
    torch.save(build_model(Settings(method="dense").resolved()).state_dict(), path)
    return str(path)


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupt_changes_no_bit(name, corpus, tmp_path):
    start = {"start": dense_weights(tmp_path)} if name == "maskllm" else {}
    settings = Settings(**(SMALL | RUNS[name] | start)).resolved()
    straight = Run(settings, corpus, tmp_path / "straight")
    assert straight.train() and not straight.checkpoint.exists()

    def interrupt(run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    first = Run(settings, corpus, tmp_path / "broken")
    assert not first.train(interrupt) and first.step == 3 and first.checkpoint.exists()
    assert signal.getsignal(signal.SIGINT) is handler
    second = Run(settings, corpus, tmp_path / "broken")
    torch.rand(7)
    second.restore()
    assert second.train() and second.step == 6

    assert second.losses == straight.losses
    assert [(v["step"], v["loss"]) for v in second.validation] == [(v["step"], v["loss"]) for v in straight.validation]
    assert [v["step"] for v in second.validation] == [0, 3, 6]
    pairs = zip(straight.model.state_dict().items(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert second.result()["gradient_bytes"] == straight.result()["gradient_bytes"]


def test_a_checkpoint_of_other_settings_does_not_continue(corpus, tmp_path):
    settings = Settings(**(SMALL | RUNS["dense"])).resolved()
    Run(settings, corpus, tmp_path).save()
    with pytest.raises(RuntimeError, match=r"lr: 0.001 there, 0.5 here"):
        Run(replace(settings, lr=0.5), corpus, tmp_path).restore()
    with pytest.raises(RuntimeError, match="the training text"):
        Run(settings, replace(corpus, sha256="other"), tmp_path).restore()


@pytest.mark.parametrize(
    "method", ["dense", "lowrank", "sltrain", "galore", "qgalore", "apollo", "apollo-mini", "fira", "semi24", "slope"]
)
def test_the_validation_loss_falls(method, corpus, tmp_path):
    run = Run(Settings(**(SMALL | {"method": method, "steps": 12})).resolved(), corpus, tmp_path)
    run.train()
    losses = [v["loss"] for v in run.validation]
    assert losses[0] == pytest.approx(5.5, abs=0.6) and losses[-1] < losses[0] - 1.5
    assert len(run.losses) == 12 and run.tokens_per_second() > 0


def test_maskllm_learns_gates_of_trained_weights_and_nothing_else(corpus, tmp_path):
    first = Run(Settings(**(SMALL | {"method": "dense", "steps": 12})).resolved(), corpus, tmp_path)
    first.train()
    torch.save(first.model.state_dict(), tmp_path / "model.pt")
    options = SMALL | {"method": "maskllm", "steps": 12, "start": str(tmp_path / "model.pt"), "lr": 1e-2}
    run = Run(Settings(**options).resolved(), corpus, tmp_path)
    assert run.validation == [] and sum(m.gate.numel() for m in mask_layers(run)) == 6 * 4 * (4 * 256 + 3 * 688) * 64
    masks = [m.mask for m in mask_layers(run)]
    run.train()
    dense = first.model.state_dict()
    for name, tensor in run.model.state_dict().items():
        if name in dense:
            assert torch.equal(tensor, dense[name]), name
    assert not all(torch.equal(m.mask, mask) for m, mask in zip(mask_layers(run), masks, strict=True))
    losses = [v["loss"] for v in run.validation]
    assert losses[0] > first.validation[-1]["loss"]  # half of the weights are gone
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="maskllm learns masks of trained weights: it needs start"):
        Settings(method="maskllm").resolved()


def mask_layers(run):
    return [m for m in run.model.modules() if isinstance(m, MaskLinear24)]


def test_bytes_are_those_of_the_tensors(corpus, tmp_path):
    dense, sparse = (
        Run(Settings(**(SMALL | {"method": method, "steps": 1})).resolved(), corpus, tmp_path)
        for method in ("dense", "sltrain")
    )
    for run in (dense, sparse):
        run.train()
    a, b = dense.result(), sparse.result()
    assert a["parameter_bytes"] == a["gradient_bytes"] == 4 * a["parameters"]
    assert a["index_bytes"] == 0
    assert 8 * a["parameters"] <= a["optimizer_bytes"] < 8.1 * a["parameters"]  # and the step counters
    nonzeros = sum(p.numel() for n, p in sparse.model.named_parameters() if n.endswith("values"))
    assert 2 * nonzeros < b["index_bytes"] < 3 * nonzeros
    assert 2 * b["parameters"] < b["optimizer_bytes"] < 2.5 * b["parameters"]
    assert b["gradient_bytes"] == b["parameter_bytes"]
    assert a["peak_bytes"] > a["parameter_bytes"]


def test_packed_weights_are_counted(corpus, tmp_path):
    dense, semi24 = (
        Run(Settings(method=m, steps=1).resolved(), corpus, tmp_path).result() for m in ("dense", "semi24")
    )
    weights = (
        4 * (4 * 256 * 256 + 3 * 688 * 256) * 4
    )  # of the swapped layers, in bytes; values of W and of W^T: as many
    masks = weights // 4 // 8  # four bits for four weights
    assert semi24["index_bytes"] - dense["index_bytes"] == weights + 3 * masks + 28 * 8  # and the counters of steps


def test_slopes_adapters_come_at_the_end(corpus, tmp_path):
    run = Run(Settings(**(SMALL | {"method": "slope", "adapter": 0.3})).resolved(), corpus, tmp_path)
    layers = [m for m in run.model.modules() if isinstance(m, Linear24)]
    assert len(layers) == 28
    seen = []
    run.train(lambda run: seen.append(sum(layer.lora_A is not None for layer in layers)))
    assert seen == [0, 0, 0, 0, 28, 28] and all(layer.lora_B.any() for layer in layers)
    with pytest.raises(ValueError, match="slope adds parameters to its optimizer"):
        Settings(method="slope", optimizer="adamw8bit", per_layer=True).resolved()


def test_per_layer_frees_gradients_as_it_goes(corpus):
    settings = Settings(**(SMALL | RUNS["sltrain"] | {"per_layer": True, "accumulate": 1})).resolved()
    model = build_model(settings)
    meter = StepMeter(model)
    build_optimizer(model, settings)
    model.loss(corpus.batch(0, 0, 0, (1, 9))).backward()
    assert 0 < meter.peak < 0.2 * sum(p.nbytes for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
    run = Run(Settings(**(SMALL | RUNS["dense"])).resolved(), corpus, tmp_path)
    with torch.no_grad():
        run.model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss of step 0 is nan"):
        run.train()


def test_measure_step():
    measured = measure_step("tiny", "sltrain", 64, sequence=32, steps=2, warmup=1)
    assert 0 < measured["least"] <= measured["seconds"] <= measured["most"]
    assert measured["tokens_per_second"] == 64 / measured["seconds"]
    with pytest.raises(ValueError, match="tokens must be a multiple of the sequence 32, got 65"):
        measure_step("tiny", "sltrain", 65, sequence=32)


# ---- command line ---------------------------------------------------------------------------------------------------


def test_ctrl_c_and_resume_of_a_comparison(tmp_path):
    options = ["--steps", "24", "--batch", "1", "--seq", "16", "--save-every", "4", "--threads", "1", "--quiet"]
    command = [sys.executable, "-m", "slkernels.bench.pretrain", *options, "--out", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **pipes)
    while not (tmp_path / "dense" / "checkpoint.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "--resume" in output, output
    assert not (tmp_path / "pretrain.json").exists()

    done = subprocess.run([*command, "--resume"], **pipes, timeout=300)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "pretrain.json").read_text())
    assert [run["settings"]["method"] for run in report["runs"]] == ["dense", "lowrank", "sltrain"]
    assert all(len(run["losses"]) == run["steps"] == 24 for run in report["runs"])
    assert report["environment"]["torch"] == torch.__version__
    assert (tmp_path / "pretrain.png").read_bytes().startswith(b"\x89PNG")
    assert all((tmp_path / run / "model.pt").exists() for run in ("dense", "lowrank", "sltrain"))
    assert "SLTrain" in done.stdout and "pretrain.json" in done.stdout


def test_maskllm_trains_its_dense_model_first(tmp_path):
    options = ["--steps", "2", "--batch", "1", "--seq", "16", "--threads", "1", "--quiet", "--no-validation"]
    command = [
        sys.executable,
        "-m",
        "slkernels.bench.pretrain",
        *options,
        "--method",
        "maskllm",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "pretrain.json").read_text())
    assert [run["settings"]["method"] for run in report["runs"]] == ["dense", "maskllm"]
    assert report["runs"][1]["settings"]["start"] == str(tmp_path / "dense" / "model.pt")
    assert "MaskLLM" in done.stdout


def test_methods_are_run_in_the_order_that_they_need(tmp_path, capsys):
    def order(*options):
        return pretrain.methods_of(pretrain.parser().parse_args(["--out", str(tmp_path), *options]))

    assert order() == ("dense", "lowrank", "sltrain")
    assert order("--method", "slope", "semi24") == ("slope", "semi24")
    assert order("--method", "maskllm", "slope", "dense") == ("dense", "maskllm", "slope")
    assert order("--method", "maskllm", "--start", "weights.pt") == ("maskllm",)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.pt").touch()
    assert order("--method", "maskllm") == ("maskllm",)
    with pytest.raises(SystemExit):
        pretrain.main(["--method", "maskllm", "--seconds", "5", "--out", str(tmp_path)])
    assert "maskllm takes --steps, not --seconds" in capsys.readouterr().err


# ---- supports -------------------------------------------------------------------------------------------------------


def test_the_kind_of_support_reaches_every_layer():
    for kind in SUPPORTS:
        model = build_model(Settings(support=kind).resolved())
        layers = [m for m in model.modules() if isinstance(m, SLLinear)]
        assert layers and all(layer.kind == kind for layer in layers)


def test_supports_are_compared_seed_by_seed(tmp_path, monkeypatch, corpus, capsys):
    """Two seeds and all kinds, two steps each; a second call trains nothing again; the table is drawn from the file."""
    monkeypatch.setattr(supports.corpus, "load", lambda: corpus)
    monkeypatch.setattr(supports, "Settings", lambda **kw: Settings(**kw, batch=1, sequence=16, validation_windows=2))
    path = tmp_path / "supports.json"
    command = [str(path), "--run", "--steps", "2", "--seeds", "0", "1"]
    assert supports.main(command) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [(r["kind"], r["settings"]["seed"]) for r in runs] == [
        (kind, seed) for seed in (0, 1) for kind in (*SUPPORTS, "none")
    ]
    before = path.read_text()
    assert supports.main(command) == 0 and path.read_text() == before
    table = capsys.readouterr().out
    block8 = {r["settings"]["seed"]: r["validation"][-1]["loss"] for r in runs if r["kind"] == "block8"}
    assert f"| block8 | {block8[0]:.4f} | {block8[1]:.4f} | {sum(block8.values()) / 2:.4f} |" in table
