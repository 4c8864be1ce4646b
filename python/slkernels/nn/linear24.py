"""A linear layer with a 2:4 sparse weight: trained with dynamic or static masks, or by SLoPe; packed for inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..semi24.scores import wanda_score
from .sl_linear import dense_linear

_ops = torch.ops.slkernels

MODES = ("dynamic", "static", "slope", "inference")


def kernel_layout(device: torch.device, dtype: torch.dtype) -> str:
    """The layout whose products run on sparse tensor cores there; "plain" where there is none."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return {8: "sm80", 9: "sm90"}.get(torch.cuda.get_device_capability(device)[0], "plain")
    return "plain"


class Linear24(nn.Module):
    """y = x W^T + bias with two of every four weights along a row kept (W [out, in] = [n, m], any sizes).

    ``mode``:

    * "dynamic": the parameter is the dense ``weight``; its mask is found anew every ``refresh`` steps of the optimizer.
      By default the mask is transposable, so that dx is exact too, and the gradient goes straight through to all of
      ``weight``; ``decay`` adds SR-STE's lam (1 - mask) W to it (arXiv 2102.04010; refresh: arXiv 2404.01847).
    * "static": the same with the mask it starts with.
    * "slope": the parameter is ``values`` [n, 2 ceil(m / 4)], on a row mask that stays. dx comes from the transpose,
      pruned a second time (SLoPe, arXiv 2405.16325); :meth:`add_adapter` adds its lazy low-rank adapter.
    * "inference": frozen values and their mask; on a GPU in the layout that its tensor cores read.

    What follows from the parameters (packed weights, and their transpose) is computed in every call, so that a step of
    any optimizer is seen; :func:`track24` moves that work to once a step, and counts the steps of ``refresh``.

    Args:
        in_features, out_features: m and n.
        bias: add a learned bias [n].
        mode: see above.
        by: "transposable" or "row": see :func:`slkernels.prune24`. Default: "transposable" for "dynamic" and "static".
            With "row" their dx is that of the double-pruned transpose, as in "slope", which knows "row" only.
        refresh: steps between two masks. Default: 40 for "dynamic"; never for the others. "slope": steps between two
            choices of the transpose's mask (default: never).
        decay: SR-STE's lam, applied by :func:`track24` once a step ("dynamic" and "static").
        device, dtype: of the parameters. The device may be "meta"; ``to_empty()`` and ``reset_parameters()`` follow.

    State dict, in the plain layout of include/slkernels/semi24.h whatever the device: ``meta`` uint8
    [n, ceil(ceil(m / 4) / 2)], ``weight`` [n, m] or ``values`` [n, 2 ceil(m / 4)], ``bias`` [n]; ``age`` int64 [], the
    steps counted ("inference": none); ``meta_t`` ("slope"); ``input_norm`` [m] ("dynamic" by Wanda's score); ``lora_A``
    [r, m] and ``lora_B`` [n, r] where there is an adapter. ``meta`` is checked on loading.

    Raises:
        ValueError: arguments that do not fit the mode.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        mode: str = "dynamic",
        by: str | None = None,
        refresh: int | None = None,
        decay: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        dense = mode in ("dynamic", "static")
        by = by or ("transposable" if dense else "row")
        if by != "row" and not (dense and by == "transposable"):
            raise ValueError(f'by must be "row", or "transposable" where weight is dense; got {by!r} in mode {mode!r}')
        if refresh is not None and (refresh < 1 or mode not in ("dynamic", "slope")):
            raise ValueError(f'refresh must be at least 1, in mode "dynamic" or "slope"; got {refresh} in {mode!r}')
        if decay < 0 or (decay and not dense):
            raise ValueError(f'decay must not be negative, in mode "dynamic" or "static"; got {decay} in {mode!r}')
        n, m = out_features, in_features
        self.in_features, self.out_features, self.mode, self.by = m, n, mode, by
        self.refresh = 40 if refresh is None and mode == "dynamic" else refresh
        self.decay = float(decay)
        self.layout = "plain"  # of an inference module's values and meta
        self._packs: tuple[Tensor, ...] | None = None  # see track24
        self._age = 0

        factory = {"device": device, "dtype": dtype}
        groups, groups_t = -(-m // 4), -(-n // 4)
        if dense:
            self.weight = nn.Parameter(torch.empty(n, m, **factory))
        else:
            self.values = nn.Parameter(torch.empty(n, 2 * groups, **factory), requires_grad=mode == "slope")
        if mode == "slope":
            self.register_buffer("meta_t", torch.empty(m, -(-groups_t // 2), dtype=torch.uint8, device=device))
            perm = torch.empty(m, 2 * groups_t, dtype=torch.int32, device=device)
            self.register_buffer("perm", perm, persistent=False)
        self.register_buffer("meta", torch.empty(n, -(-groups // 2), dtype=torch.uint8, device=device))
        if mode != "inference":
            self.register_buffer("age", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("input_norm", None)
        self.bias = nn.Parameter(torch.empty(n, **factory)) if bias else None
        self.lora_A = self.lora_B = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weight (before it is pruned) and bias as ``nn.Linear``; A as LoRA, B zero; the mask by magnitude."""
        if self.meta.is_meta:
            return
        bound = 1 / math.sqrt(max(self.in_features, 1))
        weight = self.weight if self._dense else self.values.new_empty(self.out_features, self.in_features)
        nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.lora_A is not None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
        self._age = 0
        self._set_mask(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., m] in the parameters' dtype -> [..., n]."""
        if self.mode == "inference":
            y = self._forward_packed(x)
        elif self._dense:
            values, meta, values_t, meta_t = self._packs or self._pack()
            layout = kernel_layout(self.weight.device, self.weight.dtype)
            y = _ops.linear24_train(
                x, values, meta, values_t, meta_t, self.out_features, self.bias, "none", self.weight, layout
            )
        else:
            (values_t,) = self._packs or self._pack()
            y = _ops.linear24_train(
                x, self.values, self.meta, values_t, self.meta_t, self.out_features, self.bias, "none", None, "plain"
            )
        return y if self.lora_A is None else y + _ops.lowrank_linear(x, self.lora_A, self.lora_B)

    def _forward_packed(self, x: Tensor) -> Tensor:
        if self.layout == "plain":
            return _ops.linear24(x, self.values, self.meta, self.out_features, self.bias, "none")
        return _ops.linear24_packed(x, self.values, self.meta, self.out_features, self.layout, self.bias, "none")

    # ---- what it holds -----------------------------------------------------------------------------------------------

    @property
    def _dense(self) -> bool:
        return self.mode in ("dynamic", "static")

    @property
    def mask(self) -> Tensor:
        """What is kept: bool [n, m]."""
        return _ops.mask_of24(self.meta, self.out_features, self.in_features, self.layout)

    @torch.no_grad()
    def sparse_weight(self) -> Tensor:
        """W (*) mask as a dense [n, m], without the adapter."""
        if self._dense:
            return self.weight.masked_fill(~self.mask, 0)
        return _ops.decompress24(self.values, self.meta, self.out_features, self.in_features, self.layout)

    def add_adapter(self, rank: int) -> list[nn.Parameter]:
        """Add B A, of rank ``rank``, to the weight: SLoPe's lazy adapter, for the last 1 % of training (arXiv
        2405.16325). A is kaiming_uniform(a=sqrt(5)), B zero, so that the layer's function stays what it is.

        Returns:
            The parameters [A, B], for ``optimizer.add_param_group({"params": ...})``.

        Raises:
            ValueError: rank < 1, or the layer has an adapter already.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if self.lora_A is not None:
            raise ValueError(f"the layer has an adapter of rank {len(self.lora_A)} already")
        like = self.weight if self._dense else self.values
        self.lora_A = nn.Parameter(like.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        return [self.lora_A, self.lora_B]

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        text += f"mode={self.mode}"
        if self._dense:
            text += f", by={self.by}"
        text += f", refresh={self.refresh}" if self.refresh else ""
        text += f", decay={self.decay:g}" if self.decay else ""
        text += f", layout={self.layout}" if self.layout != "plain" else ""
        return text if self.lora_A is None else f"{text}, rank={len(self.lora_A)}"

    # ---- steps -------------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Add SR-STE's ``decay`` (1 - mask) W to ``weight.grad``: once a step, after the last backward pass and after
        gradients were unscaled. :func:`track24` calls it."""
        if self.decay and self.weight.grad is not None:
            _ops.srste_grad_(self.weight.grad, self.weight.detach(), self.mask, self.decay)

    def after_step(self) -> None:
        """Count a step, and every ``refresh`` steps choose a new mask. :func:`track24` calls it."""
        self._age += 1
        if self.refresh and self._age % self.refresh == 0:
            self.prune_()
        elif self._packs is not None:
            self.repack_()

    @torch.no_grad()
    def prune_(self) -> None:
        """Choose the mask anew from what the weights are now: W's in mode "dynamic", the transpose's in "slope".

        Raises:
            ValueError: a mode whose mask stays.
        """
        if self.mode == "dynamic":
            self._set_mask(self.weight, None, self.input_norm)
        elif self.mode == "slope":
            self._prune_transpose()
        else:
            raise ValueError(f"the mask of a layer in mode {self.mode!r} stays")

    @torch.no_grad()
    def repack_(self) -> None:
        """Bring what :func:`track24` keeps up to date, in place: only needed where a tracked layer's parameters were
        changed by something other than the optimizer's step."""
        if self._packs is None:
            return
        if self.mode == "slope":
            _ops.repack24_t_(self._packs[0], self.values, self.perm)
        else:
            for old, new in zip(self._packs, self._pack(), strict=True):
                old.copy_(new)

    @torch.no_grad()
    def _pack(self) -> tuple[Tensor, ...]:
        """Slope: (values_t,). Dense: (values, meta, values_t, meta_t) of W (*) mask; a mask is what has been zeroed, so
        pruning by magnitude finds it again, and in the transpose keeps all of a transposable one."""
        if self.mode == "slope":
            values_t = self.values.new_empty(self.perm.shape)
            _ops.repack24_t_(values_t, self.values, self.perm)
            return (values_t,)
        weight = self.weight
        return _ops.prune_compress24(self.sparse_weight(), "row", None, kernel_layout(weight.device, weight.dtype))

    @property
    def _tracked(self) -> bool:
        return self._packs is not None

    @property
    def packed_bytes(self) -> int:
        """What :func:`track24` keeps besides parameters and buffers."""
        return sum(t.nbytes for t in self._packs or ())

    def _track(self, on: bool) -> None:
        self._packs = tuple(self._pack()) if on and self.mode != "inference" else None

    @torch.no_grad()
    def _set_mask(self, weight: Tensor, mask: Tensor | None = None, input_norm: Tensor | None = None) -> None:
        """Take ``mask`` [n, m], else the one by Wanda's score, else by magnitude; outside the dense modes the values of
        ``weight`` under it too."""
        given = mask is not None
        if not given:
            mask = _ops.prune24(weight if input_norm is None else wanda_score(weight, input_norm), self.by, None)
        values, meta = _ops.compress24(weight, mask, "plain", given)
        self.meta.copy_(meta)
        if not self._dense:
            self.values.copy_(values)
        if self.mode == "slope":
            self._prune_transpose()
        else:
            self.repack_()

    @torch.no_grad()
    def _prune_transpose(self) -> None:
        self.meta_t.copy_(_ops.prune_compress24(self.sparse_weight(), "row", None, "plain")[3])
        self._derive()

    @torch.no_grad()
    def _derive(self) -> None:
        """What the state dict leaves out."""
        if self.mode == "slope":
            self.perm.copy_(_ops.repack24_perm(self.meta, self.meta_t, self.out_features, self.in_features))
        self.repack_()

    # ---- to and from other layers ------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        mode: str = "dynamic",
        by: str | None = None,
        refresh: int | None = None,
        decay: float = 0.0,
        *,
        mask: Tensor | None = None,
        input_norm: Tensor | None = None,
    ) -> Linear24:
        """A layer of ``linear``'s sizes, device, dtype, training mode, weight and bias.

        Args:
            mode, by, refresh, decay: see the class.
            mask: bool [n, m], what to keep; default: by ``by`` from the score.
            input_norm: float [m], the 2-norm of every input feature over a calibration set: the score is Wanda's,
                |W| times it (arXiv 2306.11695), also at later refreshes; default: |W|. See
                :func:`slkernels.semi24.input_norms`.

        Raises:
            ValueError: arguments that do not fit the mode. RuntimeError: ``mask`` is not 2:4.
        """
        weight = linear.weight
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        module = cls(*sizes, mode, by, refresh, decay, device="meta", dtype=weight.dtype).train(linear.training)
        module.to_empty(device=weight.device)
        if input_norm is not None and mode == "dynamic":
            module.input_norm = input_norm.to(weight.device, torch.float32)
        if linear.bias is not None:
            module.bias.copy_(linear.bias)
        if module._dense:
            module.weight.copy_(weight)
        if weight.is_meta:
            return module
        module._set_mask(weight, mask, None if input_norm is None else input_norm.to(weight.device))
        return module

    @torch.no_grad()
    def to_inference(self, layout: str | None = None) -> Linear24:
        """The layer in mode "inference" with copies of what it needs: half the weights and their metadata.

        Args:
            layout: "plain", "sm80" or "sm90"; default: the one that this device's tensor cores read for this dtype, or
                plain. sm80 and sm90 take bfloat16 and float16, and have no gradient.
        """
        sizes = (self.in_features, self.out_features)
        module = Linear24(*sizes, self.bias is not None, "inference", device="meta").train(self.training)
        if self._dense:
            values, meta = _ops.compress24(self.weight.detach(), self.mask, "plain", False)
        else:
            values, meta = _ops.convert24(self.values.detach(), self.meta, *sizes[::-1], self.layout, "plain")
        module.layout = kernel_layout(values.device, values.dtype) if layout is None else layout
        values, meta = _ops.convert24(values, meta, *sizes[::-1], "plain", module.layout)
        module.values, module.meta = nn.Parameter(values.clone(), requires_grad=False), meta.clone()
        for name in ("bias", "lora_A", "lora_B"):
            tensor = getattr(self, name)
            setattr(module, name, None if tensor is None else nn.Parameter(tensor.detach().clone()))
        return module

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with W (*) mask, plus B A of an adapter, and a copy of the bias."""
        weight = self.sparse_weight()
        if self.lora_A is not None:
            weight = torch.addmm(weight, self.lora_B, self.lora_A)
        return dense_linear(weight, self.bias, self.training)

    # ---- state that comes and goes -----------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.input_norm is not None and self.input_norm.dtype != torch.float32:
            self.input_norm = self.input_norm.float()
        if self._packs is not None:
            self._packs = tuple(self._pack())
        return self

    def __getstate__(self):
        """Copies are not tracked: the optimizer that is followed does not step them."""
        return self.__dict__ | {"_packs": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.mode != "inference":
            self.age.fill_(self._age)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "plain":
            packed = (destination[prefix + "values"], destination[prefix + "meta"])
            plain = _ops.convert24(*packed, self.out_features, self.in_features, self.layout, "plain")
            destination[prefix + "values"], destination[prefix + "meta"] = plain

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        n, m = self.out_features, self.in_features
        try:
            for name, sizes in (("meta", (n, m)), ("meta_t", (m, n))):
                meta = state_dict.get(prefix + name)
                if meta is not None and not meta.is_meta:
                    _ops.check24(meta, *sizes, "plain")
        except RuntimeError as error:
            errors.append(f"{prefix.removesuffix('.') or 'Linear24'}: {name}: {error}")
            return
        if self.layout != "plain" and prefix + "meta" in state_dict and prefix + "values" in state_dict:
            plain = [state_dict[prefix + name].to(self.values.device) for name in ("values", "meta")]
            packed = _ops.convert24(*plain, n, m, "plain", self.layout)
            state_dict[prefix + "values"], state_dict[prefix + "meta"] = packed
        if self.mode == "dynamic" and prefix + "input_norm" in state_dict and self.input_norm is None:
            self.input_norm = torch.empty_like(state_dict[prefix + "input_norm"], device=self.meta.device)
        faults = len(errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        if self.mode != "inference" and prefix + "age" in state_dict and not state_dict[prefix + "age"].is_meta:
            self._age = int(state_dict[prefix + "age"])
        if len(errors) == faults and not self.meta.is_meta:
            self._derive()
