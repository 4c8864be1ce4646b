"""The picture of a layout."""

from __future__ import annotations

import torch

from .layout import BlockRows

# Legible in print and to the colour-blind: Okabe and Ito's blue, orange and green on white.
COLOURS = {"full": "#0072B2", "partial": "#E69F00", "column": "#009E73"}


def plot_layout(layout: BlockRows, batch: int = 0, head: int = 0, ax=None):
    """See :meth:`BlockRows.plot`."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    host = layout.to("cpu")
    kept = host.to_dense()[batch, head]
    picture = torch.zeros(host.sq, host.sk, dtype=torch.uint8)
    for iq in range(host.row_ptr.shape[2]):
        queries = slice(iq * host.block_m, (iq + 1) * host.block_m)
        first, count, partial = (int(t[batch, head, iq]) for t in (host.row_ptr, host.row_cnt, host.row_nmask))
        for n in range(count):
            start = int(host.idx[first + n]) * host.unit
            picture[queries, start : start + host.block_n] = 2 if n < partial else 1
        if host.col_ptr is not None:
            row = (batch * host.row_ptr.shape[1] + head) * host.row_ptr.shape[2] + iq
            picture[queries, host.col_idx[host.col_ptr[row] : host.col_ptr[row + 1]].long()] = 3
    picture *= kept
    ax = plt.subplots(figsize=(5, 5 * host.sq / max(host.sk, 1) + 0.6))[1] if ax is None else ax
    ax.imshow(
        picture.numpy(), cmap=ListedColormap(["white", *COLOURS.values()]), vmin=0, vmax=3, interpolation="nearest"
    )
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.legend(
        handles=[Patch(color=c, label=name) for code, (name, c) in enumerate(COLOURS.items(), 1) if code in picture],
        loc="upper right",
    )
    return ax
