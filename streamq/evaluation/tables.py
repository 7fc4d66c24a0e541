"""Rows to files and to the terminal. A file of numbers is the same for the same videos: no times, no paths."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamq.evaluation.evaluate import Results, Row
from streamq.evaluation.metrics import METRICS
from streamq.evaluation.statistics import FEW
from streamq.savers.shard import write_whole

DIGITS = 9  # sums in another order, on another machine, differ after these
# Who lets what pass for videos of the same seed: (metric, bound, whether more is better), read in their sources.
THRESHOLDS = {
    "vLLM-Omni smoke": (("psnr_video", 20.0), ("mae", 12.0), ("cos", 0.98), ("rel_l2", 0.20)),
    "vLLM-Omni strict": (("psnr_video", 25.0), ("mae", 6.0), ("cos", 0.995), ("rel_l2", 0.08)),
    "Unsloth video": (("ssim", 0.75),),
}
ARROWS = {"higher": "↑", "lower": "↓", "same": "=", "zero": "0", "": ""}
BETTER = "↑ higher is better, ↓ lower is better, = as float has it, 0 nearer to zero"
UNSLOTH_WARN = 0.50  # below this its check fails, between it and the bound it warns
CLIP_TEMPORAL = ("clip_t", "clip_score", "clip_f", "background_consistency", "subject_consistency", "flicker")
SUMMARY_COLUMNS = ("candidate", "metric", "mean", "low", "high", "count", "noise_floor", "within_noise", "p_value")


def rounded(value: Any) -> Any:
    """A float to `DIGITS` significant digits; anything else as it is."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """A header and a line a row; a column that a row lacks is empty, infinity is `inf`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else value


def write_tables(folder: Path, results: Results, metrics: Sequence[str]) -> list[Path]:
    """Write the CSV files, each whole or not at all; a file without a row is written with its header. RunError."""
    own = [metric for metric in metrics if METRICS[metric].kind == "own"]
    per_video = ["candidate", "stem", "prompt", "seed", "failed"]
    for metric in metrics:
        per_video += [metric, f"{metric}_reference", f"{metric}_diff"] if metric in own else [metric]
    extra = sorted({key for row in results.per_video for key in row if key.startswith("vbench_")})
    clip_columns = ["name", "stem", "prompt", "seed", "frames", "clip_model", "clip_t_frames", "prompt_tokens_cut",
                    "dino_model", *(metric for metric in CLIP_TEMPORAL if metric in own)]  # fmt: skip
    temporal = {name for metric in CLIP_TEMPORAL for name in (metric, f"{metric}_diff")}
    moving = {name for name, about in METRICS.items() if about.group == "motion"}
    moving |= {f"{name}_diff" for name in moving}
    files = {
        "fidelity_per_video.csv": to_csv(results.per_video, [*per_video, *extra]),
        "fidelity_summary.csv": to_csv(
            [row for row in results.summary if row["metric"] not in temporal | moving], SUMMARY_COLUMNS
        ),
        "clip_temporal_per_video.csv": to_csv(results.own, clip_columns),
        "clip_temporal_summary.csv": to_csv([r for r in results.summary if r["metric"] in temporal], SUMMARY_COLUMNS),
        "motion_summary.csv": to_csv([r for r in results.summary if r["metric"] in moving], SUMMARY_COLUMNS),
    }
    if results.compared:
        columns = ("metric", "candidate", "other", "difference", "low", "high", "count", "p_value")
        files["candidates_compared.csv"] = to_csv(results.compared, columns)
    for name, content in files.items():
        write_whole(folder / name, content, 0o644)
    return [folder / name for name in files]


def verdicts(results: Results, candidate: str) -> dict[str, str]:
    """Who -> "pass", "warn" or what falls short, by a candidate's means; "" where a metric was not measured."""
    means = {row["metric"]: row["mean"] for row in results.summary if row["candidate"] == candidate}
    found = {}
    for who, bounds in THRESHOLDS.items():
        if any(metric not in means for metric, _ in bounds):
            found[who] = ""
            continue
        short = [metric for metric, bound in bounds if worse(metric, means[metric], bound)]
        warn = short == ["ssim"] and means["ssim"] >= UNSLOTH_WARN
        found[who] = ("warn: " if warn else "fail: ") + ", ".join(short) if short else "pass"
    return found


def direction(metric: str) -> str:
    """Which way a metric of the summary is better: "higher", "lower", "same" as float's, "zero"; "" for VBench's."""
    whole = metric.removesuffix("_diff")
    if whole not in METRICS:
        return ""
    better = METRICS[whole].better
    return "zero" if metric != whole and better == "same" else better


def worse(metric: str, mean: float, bound: float) -> bool:
    """Whether a mean misses a bound: above it for a metric of which less is better, else below it; NaN does."""
    return not (mean <= bound if METRICS[metric].better == "lower" else mean >= bound)


def to_json(results: Results, files: Sequence[Path], candidates: Sequence[str]) -> str:
    """One JSON object. Infinity, which JSON has not, is the text "inf"."""
    document = {
        "summary": results.summary,
        "per_video": results.per_video,
        "compared": results.compared,
        "thresholds": {name: verdicts(results, name) for name in candidates},
        "failed": results.failed,
        "notes": results.notes,
        "files": [str(path) for path in files],
    }
    return json.dumps(_plain(document), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else rounded(value)


def show(results: Results, candidates: Sequence[str]) -> None:
    """The summary and the thresholds of others, as tables on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    for name in candidates:
        rows = [row for row in results.summary if row["candidate"] == name]
        table = Table(title=f"{name} against the reference", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for heading in ("metric", "mean", "95 % interval", "noise floor", "p"):
            table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
        for row in rows:
            count = f" ({row['count']})" if row["count"] < FEW else ""
            interval = "" if row["low"] is None else f"{row['low']:.4g} … {row['high']:.4g}"
            floor = _short(row["noise_floor"], 4) + (" *" if row["within_noise"] else "")
            metric = f"{row['metric']} {ARROWS[direction(row['metric'])]}".strip()
            table.add_row(metric, f"{row['mean']:.4g}{count}", interval, floor, _short(row["p_value"], 2))
        console.print(table)
        said = "; ".join(f"{who}: {verdict}" for who, verdict in verdicts(results, name).items() if verdict)
        if said:
            print(f"Thresholds of others: {said}")
    print(BETTER)
    if any(row["within_noise"] for row in results.summary):
        print("* no worse than float against float: means nothing")


def _short(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}g}"
