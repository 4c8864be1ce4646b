"""What a comparison of pretraining runs shows: a table, and the curves as PNG. Both are drawn from the results only."""

from __future__ import annotations

from pathlib import Path

TITLES = {
    "dense": "dense",
    "lowrank": "low-rank",
    "sltrain": "SLTrain",
    "galore": "GaLore",
    "qgalore": "Q-GaLore",
    "apollo": "APOLLO",
    "apollo-mini": "APOLLO-Mini",
    "fira": "Fira",
    "semi24": "2:4",
    "slope": "SLoPe",
    "maskllm": "MaskLLM",
}
COLORS = {
    "dense": "#9a9a9a",
    "lowrank": "#d98c3f",
    "sltrain": "#1f6f8b",
    "galore": "#6a9f58",
    "qgalore": "#a3505e",
    "apollo": "#7a5ba8",
    "apollo-mini": "#b59bd6",
    "fira": "#222222",
    "semi24": "#c0392b",
    "slope": "#2e8b7a",
    "maskllm": "#c99a2e",
}


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f}"


def title(result: dict) -> str:
    settings = result["settings"]
    return TITLES[settings["method"]]


def optimizer(result: dict) -> str:
    settings = result["settings"]
    return settings["optimizer"] + (" per layer" if settings["per_layer"] else "")


def tensor_bytes(result: dict) -> list[int]:
    return [result[f"{what}_bytes"] for what in ("parameter", "index", "optimizer", "gradient")]


def rows(results: list[dict]) -> list[tuple[str, ...]]:
    """The comparison, a column a run: each row is a name and a cell for every run."""
    lines = {
        "": [title(r) for r in results],
        "optimizer": [optimizer(r) for r in results],
        "validation loss, nats a byte": [
            f"{r['validation'][-1]['loss']:.4f}" if r["validation"] else "-" for r in results
        ],
        "tokens/s": [f"{r['tokens_per_second']:,.0f}" for r in results],
        "parameters": [f"{r['parameters']:,}" for r in results],
        "MiB of parameters": [mebibytes(r["parameter_bytes"]) for r in results],
        "MiB of indices and packed copies": [mebibytes(r["index_bytes"]) for r in results],
        "MiB of optimizer state": [mebibytes(r["optimizer_bytes"]) for r in results],
        "MiB of gradients": [mebibytes(r["gradient_bytes"]) for r in results],
        "MiB of these four": [mebibytes(sum(tensor_bytes(r))) for r in results],
        "MiB, peak of the process": [mebibytes(r["peak_bytes"]) for r in results],
        "MiB, live at the peak of a step": [mebibytes(r["peak_above_start_bytes"]) for r in results],
    }
    return [(name, *cells) for name, cells in lines.items()]


def print_table(results: list[dict]) -> None:
    """Print the comparison, with rich if it is installed. The process's peak holds Python, torch and what malloc keeps;
    the live bytes are above the start; on a GPU both are torch's allocator's."""
    s = results[0]["settings"]
    step = f"{s['batch'] * s['accumulate']}x{s['sequence']} bytes"
    caption = f"{s['config']}, {results[0]['steps']} steps of {step}, {s['dtype']}"
    header, *lines = rows(results)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(caption)
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
        for line in (header, *lines):
            print(
                "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            )
        return
    table = Table(title=caption)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def plot(results: list[dict], environment: dict, path: Path, timed: bool = True) -> bool:
    """Write the PNG: validation loss against tokens and, if ``timed``, against training time, and bytes. False without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = 3 if timed else 2
    figure, (tokens, *seconds, memory) = plt.subplots(1, panels, figsize=(5 * panels, 4.5), constrained_layout=True)
    for result in results:
        method = result["settings"]["method"]
        style = {
            "color": COLORS[method],
            "label": f"{title(result)}, {optimizer(result)}",
            "marker": "o",
            "markersize": 3,
        }
        losses = [v["loss"] for v in result["validation"]]
        tokens.plot([v["tokens"] / 1e6 for v in result["validation"]], losses, **style)
        for axes in seconds:
            axes.plot([v["seconds"] for v in result["validation"]], losses, **style)
    tokens.set(xlabel="training tokens (million bytes)", ylabel="validation loss (nats a byte)")
    for axes in seconds:
        axes.set(xlabel="training time (s)", ylabel="validation loss (nats a byte)")
    names = [title(result) for result in results]
    bottom = [0.0] * len(results)
    for i, (what, color) in enumerate(
        zip(
            ("parameters", "indices, packed", "optimizer", "gradients"),
            ("#1f6f8b", "#222222", "#d98c3f", "#6a9f58"),
            strict=True,
        )
    ):
        heights = [tensor_bytes(result)[i] / 2**20 for result in results]
        memory.bar(names, heights, bottom=bottom, color=color, label=what)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    memory.set(ylabel="MiB of tensors")
    for axes in (tokens, *seconds, memory):
        axes.legend()
        axes.grid(alpha=0.3)
    settings = results[0]["settings"]
    figure.suptitle(
        f"byte-level LLaMA {settings['config']}, {settings['dtype']} · {environment['machine']}, "
        f"{settings['threads']} threads · torch {environment['torch']} · slkernels {environment['commit']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
