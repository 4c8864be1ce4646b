"""Real text that every machine has: the source files of the running Python's standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NOT_STANDARD = {"site-packages", "dist-packages"}
_HELD_OUT = 20  # one file in so many is for validation


@dataclass(frozen=True)
class Corpus:
    """train and validation: uint8 [bytes], the files' contents with a zero byte after each."""

    train: Tensor
    validation: Tensor
    files: int
    sha256: str

    def batch(self, seed: int, step: int, part: int, shape: tuple[int, int]) -> Tensor:
        """int64 [sequences, length] from random places of the training text: a function of (seed, step, part), so that
        a resumed run needs no reader's state."""
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, part, step]))
        count, length = shape
        starts = torch.from_numpy(generator.integers(0, len(self.train) - length, size=count))
        return self.train[starts[:, None] + torch.arange(length)].long()

    def validation_windows(self, count: int, length: int) -> Tensor:
        """int64 [count, length], spread evenly over the validation text: always the same."""
        starts = torch.linspace(0, len(self.validation) - length, count, dtype=torch.float64).long()
        return self.validation[starts[:, None] + torch.arange(length)].long()


def load(root: Path | None = None) -> Corpus:
    """The *.py files below ``root`` (default: the standard library), by name; a hash of the relative path decides which
    are held out.

    Raises:
        RuntimeError: fewer files than a training and a validation text need.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train, validation, digest = [], [], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_STANDARD.intersection(name.parts):
            continue
        content = path.read_bytes() + b"\0"
        digest.update(content)
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % _HELD_OUT == 0
        (validation if held_out else train).append(content)
    if not train or not validation:
        raise RuntimeError(f"{root} holds {len(train)} training and {len(validation)} validation files: too few")
    texts = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in (train, validation))
    return Corpus(*texts, files=len(train) + len(validation), sha256=digest.hexdigest())
