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
from .ops._checks import FOUR_BITS, STATE_CODECS

State = dict[str, Any]
Shape = tuple[int, ...]


# The usual block of a codec.
BLOCKS = {"dyn8": 256, "lin8": 256, "cmp8": 32, "dyn4": 128, "fp8": 256}


@dataclass(frozen=True)
class Moment:
    """One of an optimizer's moments: its key in the state, its key in torch.optim's (or "" if torch has none), and
    whether it has a sign."""

    key: str
    torch_key: str = ""
    signed: bool = True

    def codec(self, group: State) -> str:
        return group["codec"] if self.signed else STATE_CODECS[group["codec"]]


# ---- shapes ---------------------------------------------------------------------------------------------------------


def is_quantized(group: State, p: Tensor) -> bool:
    """By the size of the whole tensor, so that sharding does not change which parameters are quantized."""
    return p.numel() >= group["min_numel"]


def code_shape(codec: str, shape: Shape) -> Shape:
    """Two 4-bit codes are packed in a byte, along the last dimension where it is even."""
    if codec not in FOUR_BITS:
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
    codes = torch.zeros(code_shape(codec, mine.shape), dtype=torch.uint8, device=mine.device)
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


# ---- master weights -------------------------------------------------------------------------------------------------

_REMAINDERS = {8: torch.int8, 16: torch.int16}


def master_dtype(group: State, p: Tensor) -> torch.dtype | None:
    """Of the low bits of p's master weight, or None if it has none."""
    return _REMAINDERS.get(group["master_bits"]) if p.dtype == torch.bfloat16 else None


def new_master(group: State, p: Tensor) -> State:
    """The low bits of p as it stands: zeros."""
    dtype = master_dtype(group, p)
    if dtype is None:
        return {}
    mine = local(p)
    return {"master_lo": like(p, torch.zeros(mine.shape, dtype=dtype, device=mine.device), p.shape)}


# ---- between codes and numbers --------------------------------------------------------------------------------------


def decode(group: State, p: Tensor, moment: Moment, state: State) -> Tensor:
    """The moment as float32 of p's shape, sharded as p is."""
    value = state[moment.key]
    if value.dtype == torch.uint8:
        scale = local(state[moment.key + "_scale"]).reshape(-1)
        shape = local(p).shape
        codec, block = moment.codec(group), group["block_size"]
        numbers = dequantize_block(local(value), scale, codec, block, numel=shape.numel())
        return like(p, numbers.view(shape), p.shape)
    return value


def encode(group: State, p: Tensor, moment: Moment, value: Tensor) -> State:
    """The state of a moment from its values of any floating dtype; rounded to nearest if p is quantized."""
    if not value.is_floating_point():
        raise ValueError(f"{moment.key} of a parameter {list(p.shape)} must be floating, got {value.dtype}")
    value = check_tensor(moment.key, p, value.float(), torch.float32, p.shape)
    state = new_moment(group, p, moment)
    if not is_quantized(group, p):
        return {**state, moment.key: value}
    codes, scale = quantize_block(local(value), moment.codec(group), group["block_size"])
    for key, got in ((moment.key, codes), (moment.key + "_scale", scale)):
        mine = local(state[key])
        mine.copy_(got.view(mine.shape))
    return state
