"""What a training loop can leave out of memory by itself: activations within a block, logits, gradients of whole
embeddings. The numbers that are trained stay the same."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from slkernels.bench.llama import Llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class _Blocks(nn.Module):
    """Some consecutive blocks: backward keeps their common input, computes the input of each again, and from it the
    block's activations (nested, as in arXiv 1604.06174, section 4.3)."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def _inputs(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        for block in self.blocks:
            x = _again(block, x, rotary)
        return x

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return _again(self._inputs, x, rotary)


class _Embedding(nn.Module):
    """An ``nn.Embedding`` whose rows are several parameters, each with a gradient of its own."""

    def __init__(self, embedding: nn.Embedding, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.parts = nn.ModuleList(
            nn.Embedding(len(w), w.shape[1], _weight=w.clone()) for w in embedding.weight.detach().split(rows)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        total = 0
        for i, part in enumerate(self.parts):
            inside = (tokens >= i * self.rows) & (tokens < (i + 1) * self.rows)
            total = total + part((tokens - i * self.rows).where(inside, 0)) * inside[..., None]
        return total


class _Loss(nn.Module):
    """Cross-entropy of the head's logits, some rows of the head at a time: no more logits live than those of one part,
    in forward and in backward (the idea of Cut Cross-Entropy, arXiv 2411.09009)."""

    def __init__(self, head: nn.Linear, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.parts = nn.ModuleList()
        for weight in head.weight.detach().split(rows):
            part = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
            part.weight = nn.Parameter(weight.clone())
            self.parts.append(part)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        sums = []
        total = 0
        for i, part in enumerate(self.parts):
            log_sum, picked = _again(self._part, part, x, target - i * self.rows)
            sums.append(log_sum)
            total = total + picked
        return (torch.stack(sums).logsumexp(0) - total).mean()

    @staticmethod
    def _part(head: nn.Linear, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Per token: the log of the summed exponentials of this part's logits, and the target's logit if it is here."""
        logits = head(x).float()
        inside = (target >= 0) & (target < logits.shape[-1])
        picked = logits.gather(-1, target.where(inside, 0)[..., None])[..., 0]
        return logits.logsumexp(-1), picked.where(inside, 0.0)


def frugal(model: Llama, rows: int = 4000, blocks: int = 4) -> None:
    """Change ``model`` in place: backward computes the activations again, and the embedding and the head become parts
    of ``rows`` rows, so that a per-layer optimizer frees each part's gradient before the next one's exists."""
    groups = (model.layers[i : i + blocks] for i in range(0, len(model.layers), blocks))
    model.layers = nn.ModuleList(_Blocks(group) for group in groups)
    model.embed = _Embedding(model.embed, rows)
    model.head = _Loss(model.head, rows)
    model.loss = lambda tokens: model.head(model.hidden(tokens[:, :-1]), tokens[:, 1:])
