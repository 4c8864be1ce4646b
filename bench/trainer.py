"""One pretraining run: model, optimizer, steps, validation, and checkpoints that continue bit-exactly."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from slkernels import convert, optim
from slkernels.bench.corpus import Corpus
from slkernels.bench.llama import CONFIGS, Llama
from slkernels.nn import Linear24, track24
from torch import Tensor, nn

METHODS = ("dense", "lowrank", "sltrain")
SEMI24 = ("semi24", "slope", "maskllm")  # 2:4 masks that change, static ones on SLoPe's recipe, learned ones
LOW_RANK = ("galore", "qgalore", "apollo", "apollo-mini", "fira")  # a dense model (qgalore: in 8 bits), its optimizer
OPTIMIZERS = ("adamw", "adamw8bit")
SUPPORTS = ("uniform", "row", "block8", "column")
INTERRUPTED = 130  # exit code of a process that SIGINT ended


@dataclass(frozen=True)
class Settings:
    """Everything that a run's numbers depend on, besides the machine. None: the default of the config or the method."""

    config: str = "tiny"
    method: str = "sltrain"
    optimizer: str | None = None  # adamw8bit for sltrain, the method's own if it is one of LOW_RANK, else adamw
    per_layer: bool = False  # update in backward; not for adamw
    gap: int | None = None  # steps between two subspaces; default: 200, or an eighth of the steps if that is less
    rank: int | None = None
    density: float | None = None
    support: str = "uniform"  # kind of S's support: see slkernels.random_support
    refresh: int | None = None  # semi24: steps between two masks; default: 40, or an eighth of the steps if less
    decay: float = 0.0  # semi24: SR-STE's
    adapter: float = 0.01  # slope: the part of the steps at the end that have a low-rank adapter
    start: str | None = None  # file of weights of a dense run to start from; maskllm needs one
    alpha: float | None = None
    lr: float | None = None
    warmup: float = 0.1  # part of the steps
    steps: int | None = None
    batch: int | None = None
    sequence: int | None = None
    accumulate: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    threads: int = 0  # 0: torch's choice
    validations: int = 6  # how often in a run
    validation_windows: int = 32

    def resolved(self) -> Settings:
        """The same with every default filled in."""
        config = CONFIGS[self.config]
        filled = asdict(self)
        defaults = {name: getattr(config, name) for name in ("rank", "density", "alpha", "steps", "batch", "sequence")}
        defaults["accumulate"] = config.accumulate
        low_rank = self.method in LOW_RANK
        defaults["optimizer"] = self.method if low_rank else "adamw8bit" if self.method == "sltrain" else "adamw"
        defaults["lr"] = 1e-2 if low_rank else {"sltrain": 3e-3}.get(self.method, 1e-3)
        filled.update({name: value for name, value in defaults.items() if filled[name] is None})
        if filled["optimizer"] not in ((self.method,) if low_rank else OPTIMIZERS):
            raise ValueError(f"method {self.method} cannot be trained with {filled['optimizer']}")
        filled["gap"] = self.gap or min(200, max(1, filled["steps"] // 8))
        filled["refresh"] = self.refresh or min(40, max(1, filled["steps"] // 8))
        filled["per_layer"] = self.per_layer and filled["optimizer"] != "adamw"
        if self.method == "slope" and filled["per_layer"]:
            raise ValueError("method slope adds parameters to its optimizer, which a per-layer optimizer does not take")
        if self.method == "maskllm" and self.start is None:
            raise ValueError("method maskllm learns masks of trained weights: it needs start, a dense run's model.pt")
        filled["threads"] = self.threads or torch.get_num_threads()
        return Settings(**filled)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence * self.accumulate


def build_model(settings: Settings) -> nn.Module:
    """The model of ``settings`` on its device; attention's and MLP's linears are swapped where the method says so."""
    torch.manual_seed(settings.seed)
    model = Llama(CONFIGS[settings.config]).to(settings.device, getattr(torch, settings.dtype))
    if settings.start:
        model.load_state_dict(torch.load(settings.start, map_location=settings.device, weights_only=True))
    if settings.method == "lowrank":
        convert.lowrank(model, settings.rank, verbose=False)
    elif settings.method == "sltrain":
        layer = {"kind": settings.support, "seed": settings.seed}
        convert.sltrain(model, settings.rank, settings.density, settings.alpha, **layer, verbose=False)
    elif settings.method == "qgalore":
        convert.int8(model, verbose=False)
    elif settings.method == "semi24":
        convert.semi24(model, refresh=settings.refresh, decay=settings.decay, verbose=False)
    elif settings.method == "slope":
        convert.semi24(model, "slope", verbose=False)
    elif settings.method == "maskllm":
        convert.maskllm(model, steps=settings.steps, seed=settings.seed, verbose=False)
    return model


def build_optimizer(model: nn.Module, settings: Settings):
    """An optimizer over model's parameters, no weight decay as in the papers' recipes."""
    if settings.optimizer == "adamw":
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, fused=True)
    make = low_rank_optimizer(model, settings) if settings.optimizer in LOW_RANK else adamw8bit(settings)
    if settings.per_layer:
        return optim.per_layer(model, make, accumulation_steps=settings.accumulate)
    return make([p for p in model.parameters() if p.requires_grad])


def adamw8bit(settings: Settings) -> Callable:
    return lambda parameters: optim.AdamW8bit(parameters, lr=settings.lr, weight_decay=0.0)


def low_rank_optimizer(model: nn.Module, settings: Settings) -> Callable:
    """The optimizer of method ``settings.optimizer`` as a function of parameters of ``model``, with the rank of the
    config (APOLLO-Mini: 1) for attention's and MLP's weights; moments in 8 bits for qgalore, else in float32."""
    optimizers = {
        "galore": optim.GaLoreAdamW,
        "qgalore": optim.QGaLoreAdamW8bit,
        "apollo": optim.APOLLOAdamW,
        "apollo-mini": optim.APOLLOMiniAdamW,
        "fira": optim.Fira,
    }
    rank = 1 if settings.optimizer == "apollo-mini" else settings.rank

    def make(parameters: list[nn.Parameter]):
        groups = optim.low_rank_groups(model, rank, params=parameters)
        options = {"update_proj_gap": settings.gap, "seed": settings.seed, "weight_decay": 0.0}
        return optimizers[settings.optimizer](groups, lr=settings.lr, **options)

    return make


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def train_step(model: nn.Module, optimizer, settings: Settings, step: int, parts: Iterator[Tensor]) -> float:
    """One optimizer step over ``accumulate`` micro-batches; returns the mean loss. A per-layer optimizer updates within
    the last backward, and its step() and zero_grad() have nothing left to do."""
    set_learning_rate(optimizer, learning_rate(settings, step))
    total = 0.0
    for tokens in parts:
        loss = model.loss(tokens.to(settings.device)) / settings.accumulate
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


# ---- bytes ----------------------------------------------------------------------------------------------------------


class StepMeter:
    """The most bytes of gradients, and of live heap, at any moment at which a gradient arrives. Attach it before the
    optimizer, whose hooks may free them."""

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        self.heap = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._look) for p in self._parameters]

    def _look(self, _: Tensor) -> None:
        self.peak = max(self.peak, sum(p.grad.nbytes for p in self._parameters if p.grad is not None))
        self.heap = max(self.heap, live_heap())

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()


def state_bytes(state: object) -> int:
    """Bytes of the distinct tensors in nested dicts, lists and tuples."""
    found: dict[int, int] = {}

    def visit(item: object) -> None:
        if isinstance(item, Tensor):
            found[item.data_ptr()] = item.nbytes
        elif isinstance(item, dict):
            for value in item.values():
                visit(value)
        elif isinstance(item, (list, tuple)):
            for value in item:
                visit(value)

    visit(state)
    return sum(found.values())


class _MallocInfo(ctypes.Structure):  # struct mallinfo2 of malloc.h
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in names)


def live_heap() -> int:
    """Bytes that malloc has handed out and not got back; 0 where the C library cannot tell. Unlike the process's size
    it leaves out what the allocator keeps: glibc before 2.38 reuses freed aligned blocks badly."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def peak_memory(device: str) -> int:
    """Bytes: of the process on a CPU, of torch's allocator on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- a run ----------------------------------------------------------------------------------------------------------


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM only set a flag, so that the step in progress ends; yields the flag's reader."""
    caught: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(s, lambda number, _: caught.append(number)) for s in signals]
    try:
        yield lambda: bool(caught)
    finally:
        for s, handler in zip(signals, previous, strict=True):
            signal.signal(s, handler)


@dataclass
class Run:
    """A training run of ``settings`` (resolved) with its files under ``folder``.

    After :meth:`train`: ``model``; ``losses``, one a step; ``validation``, a list of {step, tokens, seconds, loss};
    its seconds count training only.
    """

    settings: Settings
    corpus: Corpus
    folder: Path

    def __post_init__(self) -> None:
        self.baseline_memory = peak_memory(self.settings.device)
        self.baseline_heap = live_heap()
        self.model = build_model(self.settings)
        self.meter = StepMeter(self.model)
        self.optimizer = build_optimizer(self.model, self.settings)
        if self.settings.method in SEMI24:
            track24(self.model, self.optimizer)
        self._adapted: list[Linear24] = []
        self.step = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[dict[str, float]] = []

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint; a file under this name is always a whole one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "corpus": self.corpus.sha256,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "step": self.step,
            "losses": self.losses,
            "seconds": self.seconds,
            "validation": self.validation,
            "gradient_bytes": self.meter.peak,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def restore(self) -> None:
        """Continue from the checkpoint. Raises RuntimeError if it is of other settings or another text."""
        state = torch.load(self.checkpoint, map_location=self.settings.device, weights_only=True)
        mine = asdict(self.settings)
        differ = [
            f"{k}: {state['settings'].get(k)} there, {v} here" for k, v in mine.items() if state["settings"].get(k) != v
        ]
        if state["corpus"] != self.corpus.sha256:
            differ.append("the training text")
        if differ:
            raise RuntimeError(f"{self.checkpoint} cannot continue, it has other settings: {'; '.join(differ)}")
        self._add_adapters(state["step"] - 1)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
        self.step, self.losses, self.seconds = state["step"], state["losses"], state["seconds"]
        self.validation, self.meter.peak = state["validation"], state["gradient_bytes"]

    def parts(self, step: int) -> Iterator[Tensor]:
        """The micro-batches of a step."""
        s = self.settings
        return (self.corpus.batch(s.seed, step, part, (s.batch, s.sequence + 1)) for part in range(s.accumulate))

    @torch.no_grad()
    def validate(self) -> float:
        s = self.settings
        windows = self.corpus.validation_windows(s.validation_windows, s.sequence + 1).split(s.batch)
        self.model.eval()
        losses = [self.model.loss(tokens.to(s.device)).item() * len(tokens) for tokens in windows]
        self.model.train()
        return sum(losses) / s.validation_windows

    def _add_adapters(self, step: int) -> None:
        """SLoPe's lazy adapters, once step ``step`` is among those that have them."""
        s = self.settings
        if s.method != "slope" or step < s.steps - max(1, round(s.adapter * s.steps)) or len(self._adapted):
            return
        self._adapted = [layer for layer in self.model.modules() if isinstance(layer, Linear24)]
        with torch.random.fork_rng():
            torch.manual_seed(s.seed)
            factors = [factor for layer in self._adapted for factor in layer.add_adapter(s.rank)]
        self.optimizer.add_param_group({"params": factors})

    def train(self, on_step: Callable[[Run], None] = lambda run: None, save_every: int = 0) -> bool:
        """Train from ``step`` to the end and return True; on SIGINT or SIGTERM finish the step, leave a checkpoint and
        return False. ``on_step`` is called after every step; ``save_every``: a checkpoint every so many steps."""
        s = self.settings
        with interruptible() as interrupted:
            self._validate_now()
            while self.step < s.steps:
                self._add_adapters(self.step)
                start = time.perf_counter()
                loss = train_step(self.model, self.optimizer, s, self.step, self.parts(self.step))
                self.seconds.append(time.perf_counter() - start)
                self.losses.append(loss)
                if not math.isfinite(loss):
                    raise RuntimeError(f"the loss of step {self.step} is {loss}: try a smaller --lr")
                self.step += 1
                self.meter.detach()  # one step shows the most there is
                on_step(self)
                self._validate_now()
                if self.step < s.steps and (interrupted() or (save_every and self.step % save_every == 0)):
                    self.save()
                    if interrupted():
                        return False
        return True

    def _validate_now(self) -> None:
        """Validate at the start, at the end, and at even distances in between; once a step, also after a resume."""
        s = self.settings
        due = s.validations and self.step in {round(i * s.steps / s.validations) for i in range(s.validations + 1)}
        if due and (not self.validation or self.validation[-1]["step"] != self.step):
            tokens, seconds = self.step * s.tokens_per_step, sum(self.seconds)
            self.validation.append({"step": self.step, "tokens": tokens, "seconds": seconds, "loss": self.validate()})

    def _live_peak(self, peak: int) -> int:
        """The most bytes of a step above what the process held before the model was made."""
        if torch.device(self.settings.device).type == "cuda" or not self.meter.heap:
            return peak - self.baseline_memory
        return self.meter.heap - self.baseline_heap

    def tokens_per_second(self) -> float:
        """From the median step; the first two only warm up, where there are more."""
        steady = self.seconds[2:] or self.seconds
        return self.settings.tokens_per_step / statistics.median(steady) if steady else 0.0

    def result(self) -> dict[str, object]:
        """All numbers of the run, ready for JSON. Bytes are those of the tensors, but for the peak."""
        parameters = list(self.model.parameters())
        packed = sum(m.packed_bytes for m in self.model.modules() if isinstance(m, Linear24))
        peak = peak_memory(self.settings.device)
        return {
            "settings": asdict(self.settings),
            "steps": self.step,
            "tokens": self.step * self.settings.tokens_per_step,
            "validation": self.validation,
            "losses": self.losses,
            "step_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second(),
            "parameters": sum(p.numel() for p in parameters),
            "parameter_bytes": sum(p.nbytes for p in parameters),
            "index_bytes": sum(b.nbytes for b in self.model.buffers()) + packed,
            "optimizer_bytes": state_bytes(self.optimizer.state_dict()),
            "gradient_bytes": self.meter.peak,
            "peak_bytes": peak,
            "peak_above_start_bytes": self._live_peak(peak),
        }


# ---- one step, to be timed ------------------------------------------------------------------------------------------


def make_step(
    config: str = "60m", method: str = "sltrain", tokens: int = 2048, **settings: object
) -> Callable[[], float]:
    """A function that does one training step (forward, backward, update) on ``tokens`` random bytes and returns its
    loss. ``settings`` are fields of :class:`Settings`: optimizer, per_layer, sequence (default 256), dtype, device, ...
    """
    sequence = settings.pop("sequence", min(256, tokens))
    if tokens % sequence:
        raise ValueError(f"tokens must be a multiple of the sequence {sequence}, got {tokens}")
    resolved = Settings(
        config, method, sequence=sequence, batch=tokens // sequence, accumulate=1, steps=1000, **settings
    ).resolved()
    model = build_model(resolved)
    optimizer = build_optimizer(model, resolved)
    generator = torch.Generator().manual_seed(resolved.seed)
    batch = torch.randint(256, (resolved.batch, sequence + 1), generator=generator)
    return lambda: train_step(model, optimizer, resolved, 0, iter([batch]))


def measure_step(
    config: str = "60m",
    method: str = "sltrain",
    tokens: int = 2048,
    *,
    steps: int = 5,
    warmup: int = 2,
    **settings: object,
) -> dict[str, float]:
    """Median, least and most seconds of ``steps`` steps of :func:`make_step`, and tokens a second from the median."""
    step = make_step(config, method, tokens, **settings)
    wait = torch.cuda.synchronize if torch.device(settings.get("device", "cpu")).type == "cuda" else lambda: None
    seconds = []
    for i in range(warmup + steps):
        start = time.perf_counter()
        step()
        wait()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {"seconds": median, "least": min(seconds), "most": max(seconds), "tokens_per_second": tokens / median}
