"""Pairs in, rows out: every candidate's videos against the reference's, and what the pairs say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from streamq.evaluation.measure import Models, Own, load_models, measure_own, measure_pair
from streamq.evaluation.metrics import METRICS
from streamq.evaluation.pairs import FLOOR_MAY_DIFFER, Video, match
from streamq.evaluation.settings import EvalSettings
from streamq.evaluation.statistics import FEW, bootstrap, signed_rank
from streamq.videos import pixel_file

REFERENCE, FLOOR = "reference", "noise_floor"  # names that no candidate may have
Row = dict[str, Any]
Pairs = list[tuple[Video, Video]]


@dataclass(frozen=True)
class Results:
    """`per_video`: a row a pair, failed ones too. `own`: a row a video. `summary`: a row for each candidate and metric.

    `compared`: candidate against candidate. `failed`: one text a pair that failed; such pairs are in no mean.
    """

    per_video: list[Row] = field(default_factory=list)
    own: list[Row] = field(default_factory=list)
    summary: list[Row] = field(default_factory=list)
    compared: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def pair_up(
    reference: list[Video], candidates: dict[str, list[Video]], floor: list[Video] | None, allowed: Sequence[str]
) -> dict[str, Pairs]:
    """Name -> (reference, its video) for each candidate and, under `FLOOR`, the second float folder, which may hold
    more than is asked for. Raises UsageError."""
    pairs = {name: match(reference, videos, allowed) for name, videos in candidates.items()}
    if floor is not None:
        asked = [video for video in floor if video.identity in {one.identity for one in reference}]
        pairs[FLOOR] = match(reference, asked or floor, {*allowed, *FLOOR_MAY_DIFFER})
    return pairs


def evaluate(
    reference: list[Video], pairs: dict[str, Pairs], settings: EvalSettings, about: Callable[[str], None]
) -> Results:
    """Measure every pair. `about` is told each video in turn. Raises UsageError for files that cannot be measured."""
    models, results = load_models(settings), Results()
    whole = len(reference) + sum(map(len, pairs.values()))
    counter = iter(range(1, whole + 1))

    def measure(video: Video, name: str) -> Own:
        about(f"video {next(counter)} of {whole}: {name}/{video.stem}")
        own = measure_own(video, settings, models)
        results.own.append(_own_row(name, video, own, settings, models))
        return own

    owns = {video.path: measure(video, REFERENCE) for video in reference}
    for name in sorted(pairs, key=lambda name: name != FLOOR):  # the floor first: others are held against it
        for one, other in pairs[name]:
            both = owns[one.path], measure(other, name)
            results.per_video.append(_row(name, one, other, both, settings, models, results.failed))
    results.notes.extend(_notes(reference, pairs, results, settings))
    _summarise(results, [name for name in pairs if name != FLOOR], FLOOR in pairs, settings)
    return results


def _own_row(name: str, video: Video, own: Own, settings: EvalSettings, models: Models) -> Row:
    row: Row = {"name": name, "stem": video.stem, "prompt": video.sidecar.pair["prompt"],
                "seed": video.sidecar.pair["seed"], "frames": own.facts.frame_num, "failed": own.broken}  # fmt: skip
    if models.clip is not None:
        sampled = min(settings.frames or own.facts.frame_num, own.facts.frame_num)
        row |= {"clip_model": models.clip.name, "clip_t_frames": sampled, "prompt_tokens_cut": own.cut}
    if models.dino is not None:
        row |= {"dino_model": models.dino.name}
    return row | own.values


def _row(
    name: str, one: Video, other: Video, own: tuple[Own, Own], settings: EvalSettings, models: Models, failed: list[str]
) -> Row:
    pair = one.sidecar.pair
    row: Row = {"candidate": name, "stem": one.stem, "prompt": pair["prompt"], "seed": pair["seed"], "failed": ""}
    for who, found in ((REFERENCE, own[0]), (name, own[1])):
        if found.broken:
            row["failed"] = f"{who}: {found.broken}"
            failed.append(f"{name}/{one.stem}: {found.broken}" + (" in the reference" if who == REFERENCE else ""))
            return row
    row |= measure_pair(one, other, own, settings, models)
    for metric, value in own[1].values.items():
        before = own[0].values[metric]
        row |= {metric: value, f"{metric}_reference": before, f"{metric}_diff": value - before}
    return row


def _notes(reference: list[Video], pairs: dict[str, Pairs], results: Results, settings: EvalSettings) -> list[str]:
    notes = []
    if any(pixel_file(video.path, video.sidecar).suffix != ".mkv" for video in reference):
        notes.append("measured on lossy files: h264 at crf 18 hides differences above about 44 dB of PSNR")
    if cut := [row for row in results.own if row.get("prompt_tokens_cut") and row["name"] == REFERENCE]:
        most = max(row["prompt_tokens_cut"] for row in cut)
        notes.append(f"clip_t, clip_score: {len(cut)} prompts are longer than CLIP reads; up to {most} tokens were cut")
    if settings.frames is not None:
        notes.append(f"clip_t, clip_score and lpips look at {settings.frames} evenly spaced frames of a video")
    if settings.allowed:
        notes.append(f"pairs were allowed to differ in {', '.join(settings.allowed)}")
    count = len(reference)
    if count < FEW:
        notes.append(f"{count} pair{'s' * (count != 1)}: fewer than {FEW}, so take intervals as rough")
    notes += [f"failed, and in no mean: {text}" for text in results.failed]
    return notes


def _values(results: Results, name: str, column: str) -> dict[str, float]:
    """The reference's stem -> a column's number, of the pairs that have it."""
    return {row["stem"]: row[column] for row in results.per_video if row["candidate"] == name and column in row}


def columns_of(metrics: Sequence[str]) -> list[str]:
    """The columns that are summed up: pair metrics, and of a video's own the value and its difference."""
    return [c for m in metrics for c in ((m,) if METRICS[m].kind == "pair" else (m, f"{m}_diff"))]


def _summarise(results: Results, names: list[str], with_floor: bool, settings: EvalSettings) -> None:
    own = [metric for metric in settings.metrics if METRICS[metric].kind == "own"]
    for metric in own:
        whole = [row for row in results.own if row["name"] == REFERENCE and not row["failed"]]
        values = [row[metric] for row in whole if metric in row]
        results.summary.extend(_summary_row(REFERENCE, metric, values, settings))
    for name in names:
        for column in columns_of(settings.metrics):
            mine = _values(results, name, column)
            floor = _values(results, FLOOR, column) if with_floor else {}
            rows = _summary_row(name, column, list(mine.values()), settings)
            results.summary.extend(row | _against(column, mine, floor) for row in rows)
    for a, b in combinations(names, 2):
        for column in columns_of(settings.metrics):
            if column.endswith("_diff"):
                continue  # the same numbers as its metric's: the reference cancels
            results.compared.extend(_compared(results, a, b, column, settings))


def summarise_columns(results: Results, names: Sequence[str], columns: Sequence[str], settings: EvalSettings) -> None:
    """Add rows to the summary for columns that came from elsewhere; a `…_diff` gets its p-value."""
    for name in names:
        for column in columns:
            mine = _values(results, name, column)
            rows = _summary_row(name, column, list(mine.values()), settings)
            about = _against(column, mine, {}) if column.endswith("_diff") else {}
            results.summary.extend(row | about for row in rows)


def _summary_row(name: str, column: str, values: list[float], settings: EvalSettings) -> list[Row]:
    interval = bootstrap(values, settings.bootstrap, settings.seed)
    if interval is None:
        return []
    return [{"candidate": name, "metric": column, "mean": interval.mean, "low": interval.low, "high": interval.high,
             "count": interval.count, "noise_floor": None, "within_noise": None, "p_value": None}]  # fmt: skip


def _against(column: str, mine: dict[str, float], floor: dict[str, float]) -> Row:
    """The noise floor's number for a column, whether the candidate's is no worse, and a p-value.

    p: a pair metric's values against the floor's, pair by pair; a difference's against zero.
    """
    if column.endswith("_diff"):
        found: Row = {"p_value": signed_rank(list(mine.values()))}
        if floor:
            noise = sum(map(abs, floor.values())) / len(floor)
            found |= {"noise_floor": noise, "within_noise": abs(sum(mine.values()) / len(mine)) <= noise}
        return found
    if METRICS[column].kind == "own" or not floor:
        return {}
    noise, mean = sum(floor.values()) / len(floor), sum(mine.values()) / len(mine)
    good = mean >= noise if METRICS[column].better == "higher" else mean <= noise
    gaps = [mine[key] - floor[key] if mine[key] != floor[key] else 0.0 for key in mine if key in floor]
    return {"noise_floor": noise, "within_noise": good, "p_value": signed_rank(gaps)}


def _compared(results: Results, a: str, b: str, column: str, settings: EvalSettings) -> list[Row]:
    one, other = _values(results, a, column), _values(results, b, column)
    gaps = [one[key] - other[key] if one[key] != other[key] else 0.0 for key in one if key in other]
    interval = bootstrap(gaps, settings.bootstrap, settings.seed)
    if interval is None:
        return []
    return [{"metric": column, "candidate": a, "other": b, "difference": interval.mean, "low": interval.low,
             "high": interval.high, "count": interval.count, "p_value": signed_rank(gaps)}]  # fmt: skip
