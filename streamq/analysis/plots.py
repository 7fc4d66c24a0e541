"""Plots of an analysis, by matplotlib (`pip install "streamq[plots]"`), without a display. Same rows, same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from streamq.extras import require

Row = dict[str, Any]

SALT = {"svg.hashsalt": "streamq", "svg.fonttype": "none"}  # ids that do not change from run to run
KINDS = ("png", "svg")


def draw(layers: Sequence[Row], blocks: Sequence[Row]) -> dict[str, bytes]:
    """File name -> content. Raises UsageError without matplotlib."""
    matplotlib = require("matplotlib", "plots", "plots")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, bytes] = {}
    with matplotlib.rc_context(SALT):
        for name, figure in (("layers", _layers(pyplot, layers)), ("blocks", _blocks(pyplot, blocks))):
            for kind in KINDS:
                out = io.BytesIO()
                about = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
                figure.savefig(out, format=kind, dpi=120, metadata=about)
                found[f"{name}.{kind}"] = out.getvalue()
            pyplot.close(figure)
    return found


def _label(row: Row, key: str) -> str:
    return "/".join(part for part in (row["expert"], row[key]) if part)


def _kind(row: Row) -> str:
    """A layer's name within its block."""
    return str(row["layer"]).removeprefix(f"{row['block']}.")


def _layers(pyplot: Any, rows: Sequence[Row]) -> Any:
    """A map for each type, by its own scale: blocks across, layers of a block down, the output's SQNR as colour."""
    import numpy as np

    types = list(dict.fromkeys(row["type"] for row in rows))
    blocks = list(dict.fromkeys(_label(row, "block") for row in rows))
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    size = (max(6.0, 2.5 + 0.28 * len(blocks)), 0.7 + len(types) * (0.6 + 0.24 * len(kinds)))
    figure, axes = pyplot.subplots(len(types), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, kind in zip(axes[:, 0], types, strict=True):
        values = np.full((len(kinds), len(blocks)), np.nan)
        for row in (row for row in rows if row["type"] == kind):
            values[kinds.index(_kind(row)), blocks.index(_label(row, "block"))] = row["output_sqnr_db"]
        values[np.isinf(values)] = np.nan  # without any error: left white, as what stays float
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        axis.set_title(f"{kind}: SQNR of each layer's output, dB", fontsize=9, loc="left")
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
        step = max(1, len(blocks) // 40)
        axis.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize=7, rotation=90)
        figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _blocks(pyplot: Any, rows: Sequence[Row]) -> Any:
    """The error of each block's output, a line for each type."""
    types = list(dict.fromkeys(row["type"] for row in rows))
    blocks = list(dict.fromkeys(_label(row, "block") for row in rows))
    figure, axis = pyplot.subplots(figsize=(max(6.0, 2.0 + 0.25 * len(blocks)), 3.6), layout="constrained")
    for kind in types:
        mine = [row for row in rows if row["type"] == kind]
        places = [blocks.index(_label(row, "block")) for row in mine]
        axis.plot(places, [row["update_rel_error"] for row in mine], marker="o", markersize=3, linewidth=1, label=kind)
    axis.set_yscale("log")
    axis.set_ylabel("error relative to what the block adds", fontsize=8)
    step = max(1, len(blocks) // 40)
    axis.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize=7, rotation=90)
    axis.tick_params(axis="y", which="both", labelsize=7)
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8)
    return figure
