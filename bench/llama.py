"""A compact LLaMA (arXiv 2302.13971) in plain PyTorch, with the shapes of the low-rank pretraining papers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes; what SLTrain uses with them (rank, density, alpha); and the recipe: ``batch`` sequences in a micro-batch,
    ``accumulate`` micro-batches a step, steps."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    rank: int
    density: float
    alpha: float
    batch: int
    accumulate: int
    steps: int
    sequence: int = 256
    vocabulary: int = 256


CONFIGS = {
    "tiny": LlamaConfig(256, 688, 4, 4, rank=64, density=0.03, alpha=16, batch=4, accumulate=1, steps=80),
    # SLTrain (arXiv 2406.02214) and GaLore (arXiv 2403.03507, table 5), but for the vocabulary: 512 sequences a step.
    "60m": LlamaConfig(512, 1376, 8, 8, rank=128, density=0.03, alpha=32, batch=256, accumulate=2, steps=11_000),
    "130m": LlamaConfig(768, 2048, 12, 12, rank=256, density=0.03, alpha=16, batch=256, accumulate=2, steps=22_000),
    "350m": LlamaConfig(1024, 2736, 16, 24, rank=256, density=0.03, alpha=16, batch=128, accumulate=4, steps=65_000),
    "1b": LlamaConfig(2048, 5461, 32, 24, rank=512, density=0.03, alpha=8, batch=32, accumulate=16, steps=140_000),
    "7b": LlamaConfig(4096, 11008, 32, 32, rank=1024, density=0.05, alpha=8, batch=8, accumulate=64, steps=150_000),
}


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(config.hidden, config.hidden, bias=False))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(rotate(q, *rotary), rotate(k, *rotary), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """tokens int64 [batch, sequence] -> logits [batch, sequence, vocabulary]; the head is not tied to the embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head sees: [batch, sequence, hidden]."""
        x = self.embed(tokens)
        rotary = rotary_table(tokens.shape[1], self.config.hidden // self.config.heads, x)
        for layer in self.layers:
            x = layer(x, rotary)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a byte, of tokens [batch, sequence + 1], each predicted from those before it."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def rotary_table(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [length, width] of the rotary embedding (RoFormer, arXiv 2104.09864), base 10000, in like's dtype."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
