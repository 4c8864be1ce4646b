"""Which kind of support learns best: ``python -m slkernels.bench.supports [PATH] [--run]``.

Trains the tiny LLaMA of bench/pretrain.py with every kind of support at equal density, and without S, over several
seeds (``--run``), and prints Markdown for docs/supports.md from the results. The structured kinds have faster kernels;
this says what they cost in loss. The seed sets the weights, the support and the order of the text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from . import corpus, environment
from .__main__ import default_folder
from .trainer import SUPPORTS, Run, Settings

_NO_S = "none"
_SEEDS = (0, 1, 2)


def settings(kind: str, seed: int, steps: int, threads: int) -> Settings:
    """The same recipe for all; without S the layer is the low-rank one."""
    common = {"seed": seed, "steps": steps, "threads": threads, "optimizer": "adamw8bit", "lr": 3e-3}
    if kind == _NO_S:
        return Settings(method="lowrank", **common).resolved()
    return Settings(method="sltrain", support=kind, **common).resolved()


def train(path: Path, steps: int, seeds: tuple[int, ...], threads: int) -> None:
    """Every kind and seed, one after another; PATH is rewritten after each, and holds what was done before."""
    text = corpus.load()
    done = json.loads(path.read_text())["runs"] if path.exists() else []
    known = [run["settings"] for run in done]
    for seed in seeds:
        for kind in (*SUPPORTS, _NO_S):
            s = settings(kind, seed, steps, threads)
            if vars(s) in known:
                continue
            run = Run(s, text, path.parent / "supports")
            run.train()
            done.append({"kind": kind, **run.result()})
            print(f"{kind} seed {seed}: {run.validation[-1]['loss']:.4f}", file=sys.stderr, flush=True)
            header = environment.gather(torch.device("cpu"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"environment": header, "runs": done}, indent=1) + "\n")


def markdown(found: dict) -> str:
    """A row a kind: validation loss of each seed, their mean, and the mean difference to uniform, seed by seed, with
    its standard error."""
    losses: dict[str, dict[int, float]] = {}
    for run in found["runs"]:
        losses.setdefault(run["kind"], {})[run["settings"]["seed"]] = run["validation"][-1]["loss"]
    s, e = found["runs"][0]["settings"], found["environment"]
    seeds = sorted(losses["uniform"])
    tokens = s["steps"] * s["batch"] * s["sequence"] * s["accumulate"]
    lines = [
        f"{s['config']} (r = {s['rank']}), density {s['density']:.0%}, {s['steps']} steps, {tokens:,} bytes of text; "
        f"{e['machine']}, slkernels {e['commit']}, {e['date'][:10]}. Validation loss, nats a byte.",
        "",
        "| support | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | difference to uniform |",
        "|---|" + "--:|" * (len(seeds) + 2),
    ]
    for kind, by_seed in losses.items():
        if sorted(by_seed) != seeds:
            continue  # interrupted
        differences = [by_seed[seed] - losses["uniform"][seed] for seed in seeds]
        error = statistics.stdev(differences) / len(seeds) ** 0.5 if len(seeds) > 1 else float("nan")
        away = "" if kind == "uniform" else f"{statistics.mean(differences):+.4f} ± {error:.4f}"
        cells = " | ".join(f"{by_seed[seed]:.4f}" for seed in seeds)
        lines.append(f"| {kind} | {cells} | {statistics.mean(by_seed.values()):.4f} | {away} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m slkernels.bench.supports", description=__doc__.split("\n\n")[0])
    p.add_argument("path", type=Path, nargs="?", default=default_folder() / "supports.json")
    p.add_argument("--run", action="store_true", help="train what PATH does not hold yet, and write it there")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--seeds", type=int, nargs="+", default=_SEEDS)
    p.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    args = p.parse_args(argv)
    if args.run:
        if args.threads:
            torch.set_num_threads(args.threads)
        train(args.path, args.steps, tuple(args.seeds), args.threads)
    elif not args.path.exists():
        print(f"slkernels.bench.supports: {args.path} does not exist; --run trains and writes it", file=sys.stderr)
        return 2
    print(markdown(json.loads(args.path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
