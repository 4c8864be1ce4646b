"""state_dicts of the quantized optimizers in their own layouts, torch.optim's and bitsandbytes'."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._dtensor import is_dtensor
from ._state import (
    Moment,
    State,
    check_tensor,
    code_shape,
    decode,
    encode,
    master_dtype,
    moves_as_codes,
    new_master,
    scale_shape,
)
from .ops import dequantize_block

if TYPE_CHECKING:
    from ._quantized import QuantizedOptimizer

FORMATS = ("slkernels", "sharded", "torch", "bitsandbytes")

# What bitsandbytes' state_dict() hides its tensors under since 0.49, and the block sizes it has had.
_BNB_WRAPPER = "__bnb_optimizer_quant_state__"
_BNB_BLOCKS = (256, 2048)
_FLOAT = "_float"  # the suffix of moments that were quantized and travel as float32


# ---- writing --------------------------------------------------------------------------------------------------------


def write(optimizer: QuantizedOptimizer, packed: dict[str, Any], format: str) -> dict[str, Any]:
    """``packed``, torch's state_dict of the optimizer, in another format."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got '{format}'")
    make = {"torch": _to_torch, "bitsandbytes": _to_bitsandbytes}.get(format)
    groups = packed["param_groups"]
    if make:
        export = optimizer._group_to_torch if format == "torch" else optimizer._group_to_bitsandbytes
        common = ("params", "param_names", "initial_lr")
        groups = [{**{k: group[k] for k in common if k in group}, **export(group)} for group in groups]
    state = {}
    for group, saved in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        for key, p in zip(saved["params"], group["params"], strict=True):
            source = packed["state"].get(key)
            if not source:
                continue
            if make:
                state[key] = make(optimizer, group, p, source)
            else:
                state[key] = _own(optimizer, group, p, source, format)
    return {**packed, "state": state, "param_groups": groups}


def _own(optimizer: QuantizedOptimizer, group: State, p: Tensor, source: State, format: str) -> State:
    state = {**source, "step": source["step"].clone()}
    for moment in optimizer._moments_of(group):
        key, scale = moment.key, moment.key + "_scale"
        if state[key].dtype != torch.uint8:
            if is_dtensor(p) or format == "sharded":
                del state[scale]
        elif (is_dtensor(p) or format == "sharded") and not moves_as_codes(p, group["block_size"]):
            state[key + _FLOAT] = decode(group, p, moment, source)
            del state[key], state[scale]
    return state


def _to_torch(optimizer: QuantizedOptimizer, group: State, p: Tensor, source: State) -> State:
    state = {"step": source["step"].clone()}
    for moment in optimizer._moments_of(group):
        state[moment.torch_key] = decode(group, p, moment, source).clone()
    return optimizer._state_to_torch(group, state)


def _bitsandbytes_keys(optimizer: QuantizedOptimizer, group: State) -> list[tuple[str, list[Moment]]]:
    """Its number in the keys of bitsandbytes, "1" or "2", and the moments that are stacked under it."""
    moments = optimizer._moments_of(group)
    first, second = [m for m in moments if m.signed], [m for m in moments if not m.signed]
    return [("1", first), *([("2", second)] if second else [])]


def _to_bitsandbytes(optimizer: QuantizedOptimizer, group: State, p: Tensor, source: State) -> State:
    if is_dtensor(p):
        raise ValueError("bitsandbytes' optimizers have no state for DTensors")
    state: State = {"step": int(source["step"])}
    for index, moments in _bitsandbytes_keys(optimizer, group):
        codes = [source[m.key] for m in moments]
        state["state" + index] = torch.stack(codes) if len(codes) > 1 else codes[0]
        if codes[0].dtype != torch.uint8:
            continue
        if group["codec"] != "dyn8" or group["block_size"] != _BNB_BLOCKS[0]:
            raise ValueError(
                "bitsandbytes reads codec dyn8 with blocks of 256, "
                f"this state is {group['codec']} with blocks of {group['block_size']}"
            )
        scales = [source[m.key + "_scale"].reshape(-1) for m in moments]
        state["absmax" + index] = torch.stack(scales) if len(scales) > 1 else scales[0]
        state["qmap" + index] = _dynamic_map(moments[0].signed).to(p.device)
    return state


def _dynamic_map(signed: bool) -> Tensor:
    return dequantize_block(torch.arange(256, dtype=torch.uint8), torch.ones(1), "dyn8" if signed else "dyn8u")


# ---- reading --------------------------------------------------------------------------------------------------------


def read(optimizer: QuantizedOptimizer, given: dict[str, Any]) -> tuple[list[State], dict[Tensor, State]]:
    """The groups (with the ids of ``given``) and the state of every parameter. Changes nothing."""
    if not {"state", "param_groups"} <= given.keys():
        raise ValueError(f"a state_dict has state and param_groups, this one {sorted(map(str, given))}")
    ours, theirs = optimizer.param_groups, given["param_groups"]
    if len(ours) != len(theirs):
        raise ValueError(f"the state has {len(theirs)} parameter groups, this optimizer {len(ours)}")
    for group, saved in zip(ours, theirs, strict=True):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"a group of the state has {len(saved['params'])} parameters, here it has {len(group['params'])}"
            )
    known = set(chain.from_iterable(group["params"] for group in theirs))
    if unknown := sorted(map(str, given["state"].keys() - known)):
        raise ValueError(f"the state is of parameters that are in none of its groups: {unknown}")
    groups, states = [], {}
    for group, saved in zip(ours, theirs, strict=True):
        sources = [given["state"].get(key) or {} for key in saved["params"]]
        sources = [{**source, **source.get(_BNB_WRAPPER, {})} for source in sources]
        merged = _merge_group(optimizer, group, saved, sources)
        optimizer._check(merged)
        counters: dict[tuple[float, torch.device], Tensor] = {}
        for p, source in zip(group["params"], sources, strict=True):
            if source:
                state = _read_one(optimizer, merged, p, source)
                state["step"] = counters.setdefault((float(state["step"]), p.device), state["step"])
                states[p] = state
        groups.append(merged)
    return groups, states


def _merge_group(optimizer: QuantizedOptimizer, group: State, saved: State, sources: list[State]) -> State:
    if "codec" in saved:
        if missing := optimizer.defaults.keys() - saved.keys():
            raise ValueError(f"a parameter group of the state lacks {sorted(missing)}")
        return dict(saved)
    for option, value in optimizer._fixed_options.items():
        if saved.get(option, value) != value:
            raise ValueError(f"{type(optimizer).__name__} has no {option} = {saved[option]}, which the state is with")
    common = {k: saved[k] for k in ("params", "param_names", "initial_lr") if k in saved}
    merged = {**group, **common, **optimizer._group_from_others(saved)}
    blocks = [
        (p.numel(), source["absmax1"].shape[-1])
        for p, source in zip(group["params"], sources, strict=True)
        if isinstance(source.get("absmax1"), Tensor)
    ]
    if blocks:
        merged.update(codec="dyn8", block_size=_bitsandbytes_block(group["block_size"], blocks))
    return merged


def _bitsandbytes_block(preferred: int, found: list[tuple[int, int]]) -> int:
    for block in dict.fromkeys((preferred, *_BNB_BLOCKS)):
        if all(-(-numel // block) == scales for numel, scales in found):
            return block
    raise ValueError("the number of absmax values fits neither blocks of 256 nor of 2048 elements")


def _read_one(optimizer: QuantizedOptimizer, group: State, p: Tensor, source: State) -> State:
    if "state1" in source:
        source = _from_bitsandbytes(optimizer, group, p, source)
    elif optimizer._is_torch_state(group, source):
        source = optimizer._state_from_torch(group, source)
    if "step" not in source:
        raise ValueError(f"the state of a parameter {list(p.shape)} lacks step; got {sorted(source)}")
    state: State = {"step": torch.tensor(float(source["step"]), dtype=torch.float32, device=p.device)}
    state.update(_read_master(group, p, source))
    moments = optimizer._moments_of(group)
    known = {"step", "master_lo", *(m.key + end for m in moments for end in ("", "_scale", _FLOAT))}
    if unknown := source.keys() - known:
        raise ValueError(f"the state of a parameter {list(p.shape)} is of another optimizer: it has {sorted(unknown)}")
    for moment in moments:
        key, scale = moment.key, moment.key + "_scale"
        as_float = source.get(key + _FLOAT)
        if as_float is not None:
            state.update(encode(group, p, moment, as_float))
        elif key not in source:
            raise ValueError(f"the state of a parameter {list(p.shape)} lacks {key}; got {sorted(source)}")
        elif source[key].dtype != torch.uint8:
            state[key] = check_tensor(key, p, source[key], torch.float32, p.shape)
            state[scale] = torch.empty(0, dtype=torch.float32, device=p.device)
        elif scale not in source:
            raise ValueError(f"the state of a parameter {list(p.shape)} lacks {scale}; got {sorted(source)}")
        else:
            block = group["block_size"]
            codes = code_shape(group["codec"], p.shape)
            state[key] = check_tensor(key, p, source[key], torch.uint8, codes)
            state[scale] = check_tensor(scale, p, source[scale], torch.float32, scale_shape(p.shape, block))
    return state


def _read_master(group: State, p: Tensor, source: State) -> State:
    """Zeros, the low bits of p as it stands, where the source has none."""
    dtype = master_dtype(group, p)
    if dtype is None or "master_lo" not in source:
        return new_master(group, p)
    return {"master_lo": check_tensor("master_lo", p, source["master_lo"], dtype, p.shape)}


def _from_bitsandbytes(optimizer: QuantizedOptimizer, group: State, p: Tensor, source: State) -> State:
    """Under our keys; what has the wrong shape keeps it, for the caller to refuse."""
    state: State = {"step": source.get("step")} if "step" in source else {}
    for index, moments in _bitsandbytes_keys(optimizer, group):
        if "state" + index not in source:
            raise ValueError(f"the state of a parameter {list(p.shape)} lacks state{index}; got {sorted(source)}")
        codes = source["state" + index]
        codes = list(codes) if len(moments) > 1 else [codes]
        if len(codes) != len(moments):
            raise ValueError(f"state{index} must hold {len(moments)} moments, got {len(codes)}")
        state.update({moment.key: c for moment, c in zip(moments, codes, strict=True)})
        if codes[0].dtype != torch.uint8:
            continue
        if f"absmax{index}" not in source or f"qmap{index}" not in source:
            raise ValueError(f"only block-wise states can be loaded, with absmax{index} and qmap{index}")
        # On a CPU without FMA torch builds the map one unit in the last place off.
        if not torch.allclose(source[f"qmap{index}"].cpu(), _dynamic_map(moments[0].signed), rtol=1e-6, atol=0):
            raise ValueError(f"qmap{index} is not bitsandbytes' dynamic map")
        shape = scale_shape(p.shape, group["block_size"])
        scales = source["absmax" + index]
        scales = list(scales) if len(moments) > 1 else [scales]
        for moment, scale in zip(moments, scales, strict=True):
            state[moment.key + "_scale"] = scale.view(shape) if scale.numel() == math.prod(shape) else scale
    return state
