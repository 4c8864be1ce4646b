"""The plain PyTorch definition of every op: the spec that tests compare with. Slow, and not exported at top level."""

from . import optim

__all__ = ["optim"]
