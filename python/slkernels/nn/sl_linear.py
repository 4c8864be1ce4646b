"""SLTrain's linear layer: W = (alpha / rank) B A + S, S on a fixed random support (arXiv 2406.02214, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..support import Support

_ops = torch.ops.slkernels
_INT64_MAX = 2**63 - 1


def draw_seed() -> int:
    """A seed from torch's default CPU generator: reproducible under ``torch.manual_seed``, the same on every rank that
    was seeded alike, whatever the device of the module."""
    return int(torch.randint(_INT64_MAX, (), device="cpu"))


class SLLinear(nn.Module):
    """y = x W^T + bias with W [out, in] = (alpha / rank) B A + S, without ever storing W.

    Args:
        in_features, out_features: m and n.
        rank: r >= 1; A is [r, m], B is [n, r].
        density: of S, in [0, 1]; SLTrain uses 0.03 (0.05 at 7B).
        alpha: the numerator of the scale, as in SLTrain's scripts; the factor on B A is ``scale = alpha / rank``.
        bias: add a learned bias [n].
        seed: fixes the support and the initial values on every rank and, for the support, on every device. None draws
            one from torch's default CPU generator. Either way it is recorded, in ``seed`` and in the state dict.
        kind: of the support: see :func:`slkernels.random_support`.
        path: "auto", "chain" or "compose": see :func:`slkernels.sl_linear`.
        support: a :class:`slkernels.Support` to use in place of a random one; density, seed and kind do not apply.
        device, dtype: of the parameters. The device may be "meta"; ``to_empty()`` and ``reset_parameters()`` follow.

    State dict, plain contiguous tensors: ``lora_A`` [r, m], ``lora_B`` [n, r], ``values`` [nnz], ``bias`` [n],
    ``crow`` int32 [n + 1], ``col`` int16 or int32 [nnz], ``support_seed`` int64 [] (-1: not from a seed). SLTrain's
    own checkpoints load too: their ``sparse_index`` (flat, int64, any order) and ``sparse_value`` are converted.
    Indices are checked when they enter: on loading, and at the first call after the buffers were replaced.

    Raises:
        ValueError: rank, density or a support that does not fit.
        RuntimeError: from ``load_state_dict``: corrupt indices, with the position of the first fault.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float | None = None,
        alpha: float = 1.0,
        bias: bool = False,
        seed: int | None = None,
        kind: str = "uniform",
        path: str = "auto",
        support: Support | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.path = rank, float(alpha), path
        if support is None:
            if density is None or not 0 <= density <= 1:
                raise ValueError(f"density must be in [0, 1], got {density}")
            self.seed = draw_seed() if seed is None else seed
            if not 0 <= self.seed <= _INT64_MAX:
                raise ValueError(f"seed must be in [0, 2^63), got {seed}")
            self.density, self.kind = density, kind
            support = Support.random(out_features, in_features, density, self.seed, kind, device)
        else:
            if (support.n, support.m) != (out_features, in_features):
                raise ValueError(f"support must be [{out_features}, {in_features}], got [{support.n}, {support.m}]")
            self.seed, self.density, self.kind = -1, support.density, "given"
            support = support.to(torch.empty(0, device=device).device)

        factory = {"device": device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, **factory))
        self.values = nn.Parameter(torch.empty(support.nnz, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_buffer("crow", support.crow)
        self.register_buffer("col", support.col)
        self.register_buffer("support_seed", torch.tensor(self.seed, dtype=torch.int64, device=device))
        self._indices_checked = True
        self.reset_parameters()

    _cache = None  # a WeightCache within `cached_weights`

    @property
    def scale(self) -> float:
        """The factor on B A: alpha / rank."""
        return self.alpha / self.rank

    @property
    def support(self) -> Support:
        """The support, sharing this module's buffers."""
        return Support(self.crow, self.col, self.out_features, self.in_features, validate=not self._indices_checked)

    @property
    def weight(self) -> Tensor:
        """W [n, m], composed anew at every access; differentiable."""
        low_rank = (self.lora_A, self.lora_B, self.scale)
        return _ops.compose(
            self.values, self.crow, self.col, self.in_features, *low_rank, None, not self._indices_checked
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """SLTrain's initialisation: A kaiming_uniform(a=sqrt(5)), B zero, values U(+-1/sqrt(m)), bias U(+-1/sqrt(n));
        a support that comes from a seed is drawn again, so that this follows ``to_empty()``."""
        if self.values.is_meta:
            return
        generator = None
        if self.seed >= 0:
            support = Support.random(
                self.out_features, self.in_features, self.density, self.seed, self.kind, self.col.device
            )
            self.crow.copy_(support.crow)
            self.col.copy_(support.col)
            self._indices_checked = True
            generator = torch.Generator(self.values.device).manual_seed(self.seed)
        self.support_seed.fill_(self.seed)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B)
        bound = 1 / math.sqrt(max(self.in_features, 1))
        nn.init.uniform_(self.values, -bound, bound, generator=generator)
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.out_features, 1))
            nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., m] in the parameters' dtype -> [..., n]."""
        if self._cache is not None and not torch.compiler.is_compiling():
            return self._cache.linear(self, x)
        y = _ops.sl_linear(
            x,
            self.lora_A,
            self.lora_B,
            self.values,
            self.crow,
            self.col,
            self.scale,
            self.bias,
            self.path,
            not self._indices_checked,
        )
        self._indices_checked = True
        return y

    # ---- to and from nn.Linear ---------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        density: float | None = None,
        alpha: float = 1.0,
        *,
        init: str = "sltrain",
        seed: int | None = None,
        kind: str = "uniform",
        path: str = "auto",
        support: Support | None = None,
    ) -> SLLinear:
        """A layer of ``linear``'s sizes, device, dtype, training mode and bias.

        ``init="sltrain"`` starts from SLTrain's initialisation: for pretraining, ``linear``'s weight is not used.
        ``init="svd"`` approximates it: (alpha / rank) B A is the truncated SVD, S the residual at the support.
        """
        if init not in ("sltrain", "svd"):
            raise ValueError(f'init must be "sltrain" or "svd", got "{init}"')
        weight = linear.weight
        module = cls(
            linear.in_features,
            linear.out_features,
            rank,
            density,
            alpha,
            bias=linear.bias is not None,
            seed=seed,
            kind=kind,
            path=path,
            support=support,
            device=weight.device,
            dtype=weight.dtype,
        ).train(linear.training)
        if linear.bias is not None:
            module.bias.copy_(linear.bias)
        if init == "svd":
            A, B = truncated_svd(weight, rank, 1 / module.scale)
            module.lora_A.copy_(A)
            module.lora_B.copy_(B)
            residual = weight.float() - module.scale * (B @ A)
            module.values.copy_(residual.flatten()[module.support.to_flat()])
        return module

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the composed W and a copy of the bias."""
        return dense_linear(self.weight, self.bias, self.training)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
        text += f"density={self.density:g}, alpha={self.alpha:g}, bias={self.bias is not None}, kind={self.kind}"
        return text if self.path == "auto" else f"{text}, path={self.path}"

    # ---- indices that come from elsewhere ----------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        crow, col = self.crow, self.col
        super()._apply(fn, recurse)
        if self.crow is not crow or self.col is not col:
            self._indices_checked = False  # to_empty() leaves what was in memory
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        try:
            self._accept_indices(state_dict, prefix)
        except (TypeError, ValueError, RuntimeError) as error:
            errors.append(f"{prefix.removesuffix('.') or 'SLLinear'}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        seed = state_dict.get(prefix + "support_seed")
        if seed is not None and not seed.is_meta:
            self.seed = int(seed)

    def _accept_indices(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Checks the indices in state_dict, which is load_state_dict's copy, and brings them to this module's form."""
        n, m = self.out_features, self.in_features
        flat = state_dict.pop(prefix + "sparse_index", None)
        if flat is not None:
            if prefix + "scaling" in state_dict:
                raise ValueError("a checkpoint with SLTrain's trainable_scaling has no fixed scale alpha / rank")
            if prefix + "sparse_value" not in state_dict:
                raise ValueError("sparse_index without sparse_value")
            values = state_dict.pop(prefix + "sparse_value")
            support, values = Support.from_flat_values(flat, values, n, m)
            state_dict[prefix + "values"] = values
            state_dict[prefix + "support_seed"] = torch.tensor(-1, device=flat.device)
        elif prefix + "crow" in state_dict and prefix + "col" in state_dict:
            support = Support.from_csr(state_dict[prefix + "crow"], state_dict[prefix + "col"], n, m)
        else:
            return
        state_dict[prefix + "crow"], state_dict[prefix + "col"] = support.crow, support.col
        self._indices_checked = True


def exclude_indices_from_ddp(model: nn.Module) -> None:
    """Mark the supports of ``model`` as not to be broadcast by DistributedDataParallel, which must then wrap ``model``
    itself: neither NCCL nor gloo knows int16, and the ranks' supports are the same because they come from a seed.
    ``slkernels.convert.sltrain`` has done this for the model that it converts."""
    names = [
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        if isinstance(module, SLLinear)
        for buffer in ("crow", "col", "support_seed")
    ]
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = ignored + [name for name in names if name not in ignored]


def truncated_svd(weight: Tensor, rank: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """A [rank, m] and B [n, rank] in float32 with B A the best rank-``rank`` approximation of ``factor * weight``, the
    singular values split evenly; rows and columns past min(n, m) are zero."""
    U, S, Vh = torch.linalg.svd(weight.float() * factor, full_matrices=False)
    root = S[:rank].sqrt()
    A = weight.new_zeros(rank, weight.shape[1], dtype=torch.float32)
    B = weight.new_zeros(weight.shape[0], rank, dtype=torch.float32)
    A[: len(root)] = root[:, None] * Vh[:rank]
    B[:, : len(root)] = U[:, :rank] * root
    return A, B


def dense_linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """An ``nn.Linear`` that owns ``weight`` [n, m] and a copy of ``bias``."""
    n, m = weight.shape
    linear = nn.Linear(m, n, bias=bias is not None, device="meta").train(training)
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
