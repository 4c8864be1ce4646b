"""The attention module, and patterns as attention implementations of transformers."""

from __future__ import annotations

import pytest
import torch
from slkernels.attention import BlockRows, attend, patterns
from slkernels.nn import BlockSparseAttention
from torch import Tensor

# ---- the module -----------------------------------------------------------------------------------------------------


def by_hand(module: BlockSparseAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (-1, module.head_dim)).mT for p in (module.q_proj, module.k_proj, module.v_proj))
    q, k, v = (t.mT.transpose(1, 2) for t in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return module.o_proj(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("pattern", "options"), [("causal", {}), ("sliding_window", {"window": 40}), ("block_sparse", {"topk": 2})]
)
def test_module(pattern, options) -> None:
    module = BlockSparseAttention(96, 6, 2, pattern, options, bias=True)
    x = torch.randn(2, 200, 96, requires_grad=True)
    q, k = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    mask = patterns.build(pattern, q, k, **options).to_dense()
    want, got = by_hand(module, x, mask), module(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    inputs, cotangent = [x, *module.parameters()], torch.randn_like(want)
    for g, w in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4)


def test_module_takes_a_layout_and_a_rotation() -> None:
    module = BlockSparseAttention(64, 4)
    x, mask = torch.randn(1, 100, 64), torch.rand(1, 4, 100, 100) < 0.5
    mask[..., 0] = True
    layout = BlockRows.from_dense_mask(mask, 64, 64)
    torch.testing.assert_close(module(x, layout), by_hand(module, x, mask), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(x, layout, rotate=lambda q, k: (q, k.flip(2))), module(x, layout))
    assert "pattern=causal" in repr(module)


def test_module_compiles() -> None:
    module = BlockSparseAttention(64, 4, 2, "sliding_window", {"window": 30})
    x = torch.randn(2, 150, 64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    grads = [torch.autograd.grad(m(x).square().sum(), list(module.parameters())) for m in (compiled, module)]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 4, 3), "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ((66, 4), "embed_dim must be a multiple of num_heads, got 66 and 4"),
        ((64, 4, 4, "diagonal"), "pattern must be one of causal, "),
    ],
)
def test_module_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSparseAttention(*arguments)


# ---- attend ---------------------------------------------------------------------------------------------------------


def test_attend_errors() -> None:
    q, k, v = torch.randn(3, 1, 1, 128, 64).unbind()
    with pytest.raises(ValueError, match="the layout is for 100 queries and 128 keys, got 128 and 128"):
        attend(q, k, v, patterns.causal(100, 128))
    prompt = patterns.vertical_slash(q, k, 5, 2)
    with pytest.raises(ValueError, match="forward only"):
        attend(q.requires_grad_(), k, v, prompt)
    with torch.no_grad():
        assert attend(q, k, v, prompt).shape == q.shape


def test_attend_compiles_with_its_gradients() -> None:
    layout = BlockRows.from_dense_mask(torch.rand(1, 2, 130, 100) < 0.5, 64, 64)
    q, k, v = (torch.randn(1, 2, s, 64, requires_grad=True) for s in (130, 100, 100))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = attend(q, k, v, layout, softcap=5.0, return_lse=True)
        return o.square().sum() + lse.clamp(min=-1e30).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for g, w in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(g, w)


# ---- transformers ---------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")


def llama(implementation: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    small = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **config,
    )
    return transformers.LlamaForCausalLM._from_config(small, attn_implementation=implementation)


def register(*args, **options) -> str:
    from slkernels.integrations.transformers import register_attention

    return register_attention(*args, **options)


def tokens(batch: int = 2, length: int = 200) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reference", ["sdpa", "eager"])
def test_causal_llama_is_the_dense_one(reference) -> None:
    ours, theirs = llama(register("causal")), llama(reference)
    ids = tokens()
    got, want = (m(ids, labels=ids) for m in (ours, theirs))
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    got.loss.backward()
    want.loss.backward()
    for (name, g), w in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(g.grad, w.grad, rtol=1e-3, atol=1e-5, msg=name)
    everyone = torch.ones_like(ids)
    torch.testing.assert_close(ours(ids, attention_mask=everyone).logits, got.logits)


def test_sliding_window_llama_trains_and_differs_from_dense() -> None:
    window = llama(register("sliding_window", window=16))
    ids = tokens()
    dense = llama("sdpa")
    short = slice(0, 16)  # within the window nothing is dropped
    torch.testing.assert_close(window(ids).logits[:, short], dense(ids).logits[:, short], rtol=1e-4, atol=1e-4)
    assert (window(ids).logits[:, 40:] - dense(ids).logits[:, 40:]).abs().max() > 1e-2
    optimizer = torch.optim.AdamW(window.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = window(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_window_of_llama_is_the_window_of_mistral() -> None:
    """The same weights in a model that has a sliding window of its own."""
    ours = llama(register("sliding_window", name="sl_window_24", window=24))
    config = {k: v for k, v in ours.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    config = transformers.MistralConfig(**{**config, "sliding_window": 24})
    theirs = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager")
    theirs.load_state_dict(ours.state_dict())
    ids = tokens()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="not plain causal"):
        theirs.config._attn_implementation = "sl_window_24"
        theirs(ids)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("causal", {}),
        ("sliding_window", {"window": 20}),
        ("a_shape", {"sink": 4, "window": 20}),
        ("strided", {"stride": 9}),
    ],
)
def test_generation_with_a_cache_is_generation_without(pattern, options) -> None:
    model = llama(register(pattern, **options)).eval()
    prompt = tokens(2, 70)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    ids = prompt
    for _ in range(6):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(cached, ids)
    if pattern == "causal":
        assert torch.equal(cached, llama("sdpa").eval().generate(prompt, **settings))


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("vertical_slash", {"vertical_size": 16, "slash_size": 16, "recent": 8}),
        ("block_sparse", {"topk": 2}),
        ("hip", {"topk": 1}),
    ],
)
def test_prompts_by_content_then_dense_decoding(pattern, options) -> None:
    model = llama(register(pattern, **options)).eval()
    prompt = tokens(1, 300)
    with torch.no_grad():
        assert (model(prompt).logits - llama("sdpa")(prompt).logits).abs().max() > 1e-3
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, pad_token_id=0)
    assert out.shape == (1, 303)


def test_what_is_not_served_is_refused() -> None:
    name = register("causal")
    model, ids = llama(name), tokens()
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with pytest.raises(NotImplementedError, match=f"{name}: padding is not supported"):
        model(ids, attention_mask=padded)
    with pytest.raises(NotImplementedError, match="no mask besides the pattern's"):
        model(ids, attention_mask=torch.ones(2, 1, 200, 200, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="not plain causal"):
        packed = torch.arange(100).repeat(2)[None].expand(2, -1)
        model(ids, position_ids=packed, use_cache=False)
    with pytest.raises(NotImplementedError, match=r"no dropout on attention weights, got 0\.1"):
        llama(name, attention_dropout=0.1).train()(ids)
    with pytest.raises(NotImplementedError, match="not a static one"):
        model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="pattern must be one of"):
        register("diagonal")
    with pytest.raises(ValueError, match="forward only"):
        prompts = register("vertical_slash", name="sl_vs", vertical_size=9, slash_size=9)
        llama(prompts).train()(ids)
