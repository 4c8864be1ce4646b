"""What the quantized optimizers keep of a parameter: allocation, checks, sharding, and its forms in checkpoints.

A parameter's state is a dict of plain tensors: ``step`` (float32, 0-d), and for every moment, here ``m``, the codes
``m`` (uint8) and ``m_scale`` (float32, one a block), or float32 ``m`` and an empty ``m_scale`` for a small parameter.

Where the blocks tile the rows p[i], ``m_scale`` is [p.shape[0], blocks in a row], else [blocks]. In the first case a
DTensor's codes and scales are DTensors that shard as it does, and its blocks are those of the whole tensor. In the
second case blocks begin anew in every shard; such codes mean nothing on other shards, so that checkpoints hold float32
``m_float`` instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._dtensor import is_dtensor, like, local
from .ops import dequantize_block, quantize_block

State = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Codec:
    """``second``: the codec of unsigned moments. ``zeros``: a byte of codes of zero. ``block``: the default size."""

    second: str
    block: int
    zeros: int = 0
    bits: int = 8


CODECS = {
    "dyn8": Codec("dyn8u", 256, zeros=127),
    "lin8": Codec("lin8u", 256),
    "cmp8": Codec("cmp8u", 32),
    "dyn4": Codec("lin4u", 128, zeros=0x77, bits=4),
    "fp8": Codec("fp8u", 256),
}


@dataclass(frozen=True)
class Moment:
    """One of an optimizer's moments: its key in the state, its sign, and what others call it."""

    key: str
    torch_key: str
    signed: bool = True

    def codec(self, group: State) -> str:
        return group["codec"] if self.signed else CODECS[group["codec"]].second

    def zero_byte(self, group: State) -> int:
        return CODECS[group["codec"]].zeros if self.signed else 0


# ---- shapes ---------------------------------------------------------------------------------------------------------


def is_quantized(group: State, p: Tensor) -> bool:
    """By the size of the whole tensor, so that sharding does not change which parameters are quantized."""
    return p.numel() >= group["min_numel"]


def code_shape(codec: str, shape: Shape) -> Shape:
    """Two 4-bit codes are packed in a byte, along the last dimension where it is even."""
    if CODECS[codec].bits == 8:
        return tuple(shape)
    if shape and shape[-1] % 2 == 0:
        return (*shape[:-1], shape[-1] // 2)
    return (-(-math.prod(shape) // 2),)


def blocks_tile_rows(shape: Shape, block: int) -> bool:
    return len(shape) >= 2 and math.prod(shape[1:]) % block == 0


def scale_shape(shape: Shape, block: int) -> Shape:
    if blocks_tile_rows(shape, block):
        return (shape[0], math.prod(shape[1:]) // block)
    return (-(-math.prod(shape) // block),)


def blocks_shard(p: Tensor, block: int) -> bool:
    """Whether the blocks of every shard of a DTensor are blocks of the whole tensor, scales being sharded as p."""
    shards = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if all(p.placements[i].is_shard(0) for i in shards):
        return not shards or blocks_tile_rows(p.shape, block)
    if p.dim() != 2 or not all(p.placements[i].is_shard(1) for i in shards):
        return False
    return p.shape[1] % (block * math.prod(p.device_mesh.size(i) for i in shards)) == 0


def moves_as_codes(p: Tensor, block: int) -> bool:
    """Whether codes can be checkpointed so that any number of processes can read them."""
    return blocks_shard(p, block) if is_dtensor(p) else blocks_tile_rows(p.shape, block)


# ---- allocation and checks ------------------------------------------------------------------------------------------


def wrap(p: Tensor, shard: Tensor, shape: Shape, block: int) -> Tensor:
    return like(p, shard, shape) if is_dtensor(p) and blocks_shard(p, block) else shard


def new_moment(group: State, p: Tensor, moment: Moment) -> State:
    """A moment of zeros."""
    mine = local(p)
    if not is_quantized(group, p):
        zeros = torch.zeros(mine.shape, dtype=torch.float32, device=mine.device)
        return {moment.key: like(p, zeros, p.shape), moment.key + "_scale": zeros.new_empty(0)}
    codec, block = group["codec"], group["block_size"]
    codes = torch.full(code_shape(codec, mine.shape), moment.zero_byte(group), dtype=torch.uint8, device=mine.device)
    scale = torch.zeros(scale_shape(mine.shape, block), dtype=torch.float32, device=mine.device)
    return {
        moment.key: wrap(p, codes, code_shape(codec, p.shape), block),
        moment.key + "_scale": wrap(p, scale, scale_shape(p.shape, block), block),
    }


def check_tensor(key: str, p: Tensor, got: Any, dtype: torch.dtype, shape: Shape) -> Tensor:
    """got, if it is what the state of p must hold: that dtype and global shape, and sharded as p is."""
    if not isinstance(got, Tensor) or got.dtype != dtype or tuple(got.shape) != tuple(shape):
        what = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{key} of a parameter {list(p.shape)} must be {dtype} {list(shape)}, got {what}")
    if is_dtensor(p) != is_dtensor(got) or (is_dtensor(p) and p.placements != got.placements):
        raise ValueError(
            f"{key} of a parameter {list(p.shape)} must be sharded as the parameter is. "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict does that"
        )
    return got.detach().to(p.device, copy=True)


# ---- between codes and numbers --------------------------------------------------------------------------------------


def decode(group: State, p: Tensor, moment: Moment, state: State) -> Tensor:
    """The moment as float32 of p's shape, sharded as p is."""
    value = state[moment.key]
    if value.dtype == torch.uint8:
        scale = local(state[moment.key + "_scale"]).reshape(-1)
        shape = local(p).shape
        value = dequantize_block(local(value), scale, moment.codec(group), group["block_size"]).view(shape)
        return like(p, value, p.shape)
    return value


def encode(group: State, p: Tensor, moment: Moment, value: Tensor) -> State:
    """The state of a moment from its float32 value; rounded to nearest if p is quantized."""
    value = check_tensor(moment.key, p, value, torch.float32, p.shape)
    state = new_moment(group, p, moment)
    if not is_quantized(group, p):
        return {**state, moment.key: value}
    codes, scale = quantize_block(local(value), moment.codec(group), group["block_size"])
    for key, got in ((moment.key, codes), (moment.key + "_scale", scale)):
        mine = local(state[key])
        mine.copy_(got.view(mine.shape))
    return state
