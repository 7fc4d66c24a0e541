"""What an analysis prints and writes as text: CSV files, and tables of what is most sensitive. Needs no torch."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

WIDTH = 120  # of tables where there is no terminal

LAYER_COLUMNS = (
    "expert", "block", "layer", "type", "format", "outputs", "inputs", "bytes", "float_bytes", "weight_rel_error",
    "weight_cosine", "weight_sqnr_db", "output_rel_error", "output_cosine", "output_sqnr_db", "sensitivity",
    "input_amax", "outlier_channels", "outlier_ratio", "time_spread", "note",
)  # fmt: skip
BLOCK_COLUMNS = (
    "expert", "block", "type", "format", "layers", "bytes", "float_bytes", "rel_error", "cosine", "sqnr_db",
    "update_rel_error", "sensitivity",
)  # fmt: skip


def sqnr(error: float) -> float:
    """Signal to quantization noise in dB of a relative error: -20 log10(error); infinite for none."""
    return math.inf if error <= 0 else -20 * math.log10(error)


def completed(layers: Sequence[Row], blocks: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows with what follows from others: decibels, and the error over the median of the same type's errors."""
    made_layers = _relative(layers, "output_rel_error")
    for row in made_layers:
        row["weight_sqnr_db"], row["output_sqnr_db"] = sqnr(row["weight_rel_error"]), sqnr(row["output_rel_error"])
    made_blocks = _relative(blocks, "rel_error")
    for row in made_blocks:
        row["sqnr_db"] = sqnr(row["rel_error"])
    return made_layers, made_blocks


def _relative(rows: Sequence[Row], key: str) -> list[Row]:
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        errors[row["type"]].append(row[key])
    usual = {kind: statistics.median(found) for kind, found in errors.items()}
    return [dict(row) | {"sensitivity": row[key] / usual[row["type"]] if usual[row["type"]] else 0.0} for row in rows]


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """Comma-separated, a header line, "\\n" at the ends; numbers with nine digits, `inf` for an infinite one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{row[c]:.9g}" if isinstance(row[c], float) else row[c] for c in columns])
    return out.getvalue().encode()


def finite(row: Row) -> Row:
    """A row for JSON, which has no infinity: null instead."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def most_sensitive(rows: Sequence[Row], name: str, error: str, count: int) -> list[Row]:
    """The `count` layers or blocks (by the column `name`) with the largest mean sensitivity over the types.

    Each: expert, name, sensitivity, and `errors`: type -> the column `error`.
    """
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["expert"], row[name]].append(row)
    ranked = sorted(found.items(), key=lambda one: -statistics.fmean(row["sensitivity"] for row in one[1]))
    return [
        {
            "expert": expert, name: value,
            "sensitivity": statistics.fmean(row["sensitivity"] for row in mine),
            "errors": {row["type"]: row[error] for row in mine},
            **{k: mine[0][k] for k in ("outlier_channels", "outlier_ratio", "time_spread") if k in mine[0]},
        }
        for (expert, value), mine in ranked[:count]
    ]  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    """The closing tables, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    types = [one["type"] for one in figures["types"]]
    for key, name, title in (("top_layers", "layer", "layers"), ("top_blocks", "block", "blocks")):
        if not figures[key]:
            continue
        console.print(f"Most sensitive {title}: relative error of the output")
        table = Table()
        columns = ["outliers", "worst", "time spread"] if name == "layer" else []
        for column in (name, "× median", *types, *columns):
            left = column == name
            table.add_column(column, justify="left" if left else "right", no_wrap=left)
        for row in figures[key]:
            errors = [f"{row['errors'][kind]:.3g}" if kind in row["errors"] else "float" for kind in types]
            seen = []
            if columns:
                seen = [str(row["outlier_channels"]), f"{row['outlier_ratio']:.3g}×", f"{row['time_spread']:.3g}×"]
            label = "/".join(part for part in (row["expert"], row[name]) if part)
            table.add_row(label, f"{row['sensitivity']:.3g}", *errors, *seen)
        console.print(table)
    if (found := figures["recipe"]) is not None:
        counts = ", ".join(f"{count} {kind}" for kind, count in found["types"].items())
        print(f"recipe.yaml: {counts}; {found['bytes']:,} bytes in {found['format']}, error {found['error']:.4g}")
    for note in figures["notes"]:
        print("note:", note)
    print(f"{figures['status']}: {figures['save_path']}: {', '.join(figures['files'])}")
