"""What the tests of the low-rank optimizers share: parameters, gradients, a small model, and how they are run."""

import io

import torch
from torch import nn

SHAPES = ((40, 24), (24, 40), (32, 32), (24,), (6, 4, 3))


def make_params(shapes=SHAPES, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter((0.1 * torch.randn(*s, generator=gen)).to(dtype)) for s in shapes]


def set_grads(params, step):
    """Gradients with a spectrum that falls, which turns slowly from step to step."""
    for i, p in enumerate(params):
        gen = torch.Generator().manual_seed(i)
        base, change = (torch.randn(*p.shape, generator=gen, dtype=torch.float64) for _ in range(2))
        g = base + 0.1 * step * change
        if p.dim() == 2:
            g = g * 0.9 ** torch.arange(p.shape[1])
        p.grad = g.to(p.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_grads(params, step)
        optimizer.step()


def saved(optimizer):
    """The state dict as a file gives it back."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(optimizer, params):
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params if p in optimizer.state]
    return [p.detach().clone() for p in params], state


def same_bits(a, b):
    """NaN is NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    )


def same(a, b):
    """Two snapshots, bit for bit."""
    (params, states), (others, theirs) = a, b
    return all(map(same_bits, params, others)) and all(
        s.keys() == t.keys() and all(same_bits(s[k], t[k]) for k in s) for s, t in zip(states, theirs, strict=True)
    )


class Model(nn.Module):
    """An embedding, two linear layers that low_rank_groups finds, a norm and a head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(48, 32)
        self.attn = nn.Linear(32, 64)
        self.mlp = nn.Linear(64, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 48, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.mlp(torch.relu(self.attn(x)))))

    def loss(self, seed):
        tokens = torch.randint(0, 48, (8, 16), generator=torch.Generator().manual_seed(seed))
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), (tokens * 5 + 3).remainder(48).flatten())


def regression_losses(make, steps, shape=(32, 24), dtype=torch.float32):
    """Losses of fitting a linear map with make(params), a line for every step."""
    gen = torch.Generator().manual_seed(1)
    target, x = torch.randn(*shape, generator=gen), torch.randn(256, shape[1], generator=gen)
    weight, bias = nn.Parameter(torch.zeros(*shape, dtype=dtype)), nn.Parameter(torch.zeros(shape[0], dtype=dtype))
    optimizer = make([weight, bias])
    losses = []
    for _ in range(steps):
        loss = (x.to(dtype) @ weight.t() + bias - (x @ target.t() + 1).to(dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
