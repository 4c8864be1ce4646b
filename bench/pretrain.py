"""Pretrain a byte-level LLaMA on the standard library's source text, as dense, low-rank and SLTrain model, and compare.

    python -m slkernels.bench.pretrain                           # all three, tiny, about a minute on two cores
    python -m slkernels.bench.pretrain --method sltrain --config 60m --batch 8 --accumulate 1 --steps 200
    python -m slkernels.bench.pretrain --method galore           # also qgalore, apollo, apollo-mini, fira
    python -m slkernels.bench.pretrain --method semi24 slope maskllm    # 2:4; maskllm starts from a dense run's weights
    python -m slkernels.bench.pretrain --resume                  # go on after Ctrl-C, with the same options

Every method sees the same bytes in the same order for the same number of steps. Each runs in a process of its own when
there are several, so that its peak memory is its own. Results: pretrain.json and pretrain.png under --out.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from slkernels.bench import corpus, environment, pretrain_report
from slkernels.bench.llama import CONFIGS
from slkernels.bench.trainer import (
    INTERRUPTED,
    LOW_RANK,
    METHODS,
    OPTIMIZERS,
    SEMI24,
    SUPPORTS,
    Run,
    Settings,
    make_step,
    measure_step,
)

__all__ = ["main", "make_step", "measure_step"]


def default_folder() -> Path:
    """bench/out/pretrain of a source checkout; slkernels-bench/pretrain in the current folder when installed."""
    here = Path(__file__).resolve().parent
    checkout = here.name == "bench" and (here.parent / "CMakeLists.txt").exists()
    return (here / "out" if checkout else Path.cwd() / "slkernels-bench") / "pretrain"


def parser() -> argparse.ArgumentParser:
    d = Settings()
    p = argparse.ArgumentParser("slkernels.bench.pretrain", description=__doc__.partition("\n")[0])
    p.add_argument("--config", choices=CONFIGS, default=d.config, help="shapes (default: %(default)s)")
    p.add_argument(
        "--method",
        choices=(*METHODS, *LOW_RANK, *SEMI24, "all"),
        nargs="+",
        default=["all"],
        help=f"one, or several to compare; default: all, which is {', '.join(METHODS)}",
    )
    p.add_argument("--optimizer", choices=OPTIMIZERS, help="default: adamw8bit for sltrain, else torch's fused adamw")
    p.add_argument(
        "--per-layer", action="store_true", help="update within backward and free the gradients (not with adamw)"
    )
    p.add_argument("--rank", type=int, help="default: the config's")
    p.add_argument("--density", type=float, help="of S; default: the config's")
    p.add_argument("--support", choices=SUPPORTS, default=d.support, help="kind of S's support (default: %(default)s)")
    p.add_argument("--alpha", type=float, help="SLTrain's scale is alpha / rank; default: the config's")
    p.add_argument(
        "--gap", type=int, help="steps between two subspaces; default: 200, or an eighth of the steps if less"
    )
    p.add_argument("--refresh", type=int, help="semi24: steps between masks; default: 40, or an eighth of all if less")
    p.add_argument("--decay", type=float, default=d.decay, help="semi24: SR-STE's (default: %(default)s)")
    p.add_argument("--adapter", type=float, default=d.adapter, help="slope: part of the steps (default: %(default)s)")
    p.add_argument("--start", help="weights of a dense run; maskllm: default dense/model.pt under --out")
    p.add_argument("--lr", type=float, help="peak; default: 3e-3 for sltrain, 1e-2 for galore to fira, else 1e-3")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default: the config's")
    length.add_argument("--seconds", type=float, help="as many steps as the methods together take in about this time")
    p.add_argument("--batch", type=int, help="sequences in a micro-batch; default: the config's")
    p.add_argument("--seq", type=int, dest="sequence", help="bytes in a sequence; default: 256")
    p.add_argument("--accumulate", type=int, help="micro-batches a step; default: the config's")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default=d.dtype)
    p.add_argument("--device", default=d.device)
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    p.add_argument("--no-validation", action="store_true", help="for timing")
    p.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="checkpoints besides that of Ctrl-C")
    p.add_argument("--out", type=Path, default=default_folder(), help="default: %(default)s")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoints under --out, bit-exactly")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.add_argument("--untimed", action="store_true", help="no times in the plot: for a machine that others use too")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # one of several methods: results only
    return p


def dense_weights(args: argparse.Namespace) -> Path:
    return args.out / "dense" / "model.pt"


def methods_of(args: argparse.Namespace) -> tuple[str, ...]:
    """What to run, in this order; maskllm starts from a dense model, so that one comes first."""
    methods = METHODS if args.method == ["all"] else tuple(args.method)
    if "maskllm" in methods and not args.start and ("dense" in methods or not dense_weights(args).exists()):
        methods = ("dense", *(m for m in methods if m != "dense"))
    return methods


def settings_of(args: argparse.Namespace, method: str) -> Settings:
    names = ("config", "optimizer", "per_layer", "rank", "density", "support", "alpha", "gap", "lr", "steps", "batch")
    names += ("sequence", "accumulate", "dtype", "device", "seed", "threads", "refresh", "decay", "adapter")
    start = args.start or (str(dense_weights(args)) if method == "maskllm" else None)
    settings = Settings(method=method, start=start, **{name: getattr(args, name) for name in names})
    return (replace(settings, validations=0) if args.no_validation else settings).resolved()


# ---- progress -------------------------------------------------------------------------------------------------------


def progress(run: Run, quiet: bool) -> tuple[Callable[[Run], None], Callable[[], None]]:
    """(to be called after every step, to be called at the end): a bar with loss and tokens/s."""
    if quiet:
        return lambda _: None, lambda: None
    name = pretrain_report.TITLES[run.settings.method]
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:

        def line(run: Run) -> None:
            if run.step % max(1, run.settings.steps // 10) == 0:
                print(f"{name} {run.step}/{run.settings.steps} {status(run)}", flush=True)

        return line, lambda: None
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[status]}"))
    task = bar.add_task(name, total=run.settings.steps, completed=run.step, status="")
    bar.start()
    return lambda run: bar.update(task, completed=run.step, status=status(run)), bar.stop


def status(run: Run) -> str:
    validation = f", validation {run.validation[-1]['loss']:.3f}" if run.validation else ""
    return f"loss {run.losses[-1]:.3f}{validation}, {run.tokens_per_second():,.0f} tokens/s"


# ---- one method, all methods ----------------------------------------------------------------------------------------


def run_one(args: argparse.Namespace, method: str) -> dict | None:
    """Train one method in this process and return its result; None when it was interrupted and left a checkpoint."""
    settings = settings_of(args, method)
    run = Run(settings, corpus.load(), args.out / method)
    result_file = run.folder / "result.json"
    if args.resume and run.checkpoint.exists():
        run.restore()
    elif run.checkpoint.exists():
        kept = run.checkpoint.replace(run.checkpoint.with_suffix(".old"))
        print(f"without --resume this starts anew; the checkpoint that was there is now {kept}")
    result_file.unlink(missing_ok=True)
    on_step, end = progress(run, args.quiet)
    try:
        finished = run.train(on_step, args.save_every)
    finally:
        end()
    if not finished:
        return None
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.save(run.model.state_dict(), run.folder / "model.pt")
    run.checkpoint.unlink(missing_ok=True)
    result = run.result()
    result_file.write_text(json.dumps(result, indent=1))
    return result


def run_child(args: argparse.Namespace, argv: list[str], method: str) -> dict | None:
    """The same in a process of its own; with --resume, a result that is already there is not made again."""
    result_file = args.out / method / "result.json"
    if args.resume and result_file.exists():
        result = json.loads(result_file.read_text())
        if result["settings"] == vars(settings_of(args, method)):
            return result
    options = ["--method", method, "--steps", str(args.steps)] if args.steps else ["--method", method]
    command = [sys.executable, "-m", "slkernels.bench.pretrain", *argv, *options, "--child"]
    interrupted: list[int] = []
    child = subprocess.Popen(command)

    def forward(number: int, _) -> None:
        interrupted.append(number)
        child.send_signal(number)  # a second SIGINT, if the terminal has sent one to both, changes nothing

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(s, forward) for s in signals]
    try:
        code = child.wait()
    finally:
        for s, handler in zip(signals, previous, strict=True):
            signal.signal(s, handler)
    if interrupted or code == INTERRUPTED:
        return None
    if code:
        raise SystemExit(code)
    return json.loads(result_file.read_text())


def steps_for(args: argparse.Namespace, methods: tuple[str, ...]) -> int:
    """As many steps as fit into args.seconds, from a few steps of every method."""
    total = 0.0
    for method in methods:
        s = settings_of(args, method)
        measured = measure_step(
            s.config,
            method,
            s.batch * s.sequence,
            steps=3,
            warmup=1,
            sequence=s.sequence,
            dtype=s.dtype,
            device=s.device,
            optimizer=s.optimizer,
            rank=s.rank,
            density=s.density,
        )
        total += measured["seconds"] * s.accumulate
    return max(1, round(args.seconds / total))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = methods_of(args)
    if args.seconds and "maskllm" in methods:
        parser().error("maskllm takes --steps, not --seconds: nothing can be timed before its dense model is trained")
    if args.seconds:
        if args.resume:
            parser().error("--resume needs the --steps that the run before it printed, not --seconds")
        at = argv.index("--seconds") if "--seconds" in argv else None
        argv = argv[:at] + argv[at + 2 :] if at is not None else [a for a in argv if not a.startswith("--seconds=")]
        args.steps = steps_for(args, methods)
        print(f"--seconds {args.seconds:g} is --steps {args.steps}")
    results = []
    for method in methods:
        result = run_one(args, method) if len(methods) == 1 else run_child(args, argv, method)
        if result is None:
            if not args.child:
                print(f"interrupted; {args.out} holds what was done. To go on: the same command with --resume")
            return INTERRUPTED
        results.append(result)
    if args.child:
        return 0
    header = environment.gather(torch.device(args.device))
    pretrain_report.print_table(results)
    files = [args.out / "pretrain.json"]
    files[0].write_text(json.dumps({"environment": header, "runs": results}, indent=1))
    if pretrain_report.plot(results, header, args.out / "pretrain.png", timed=not args.untimed):
        files.append(args.out / "pretrain.png")
    else:
        print("matplotlib is not installed: no plot")
    print("wrote " + " and ".join(map(str, files)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
