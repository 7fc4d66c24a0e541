"""The report's tables: headline, metrics, sizes and times, settings, versions. Numbers in, text for cells out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import fmean
from typing import Any

from streamq.errors import format_bytes
from streamq.evaluation.metrics import METRICS
from streamq.evaluation.statistics import FEW
from streamq.evaluation.tables import THRESHOLDS, worse
from streamq.report import words
from streamq.report.data import Candidate, Clip, ReportData
from streamq.report.layers import Layer, made_format

HEADLINE = (("psnr_video", "PSNR", "dB"), ("ssim", "SSIM", ""))
ROW_KEYS = ("candidate", "stem", "prompt", "seed", "failed")
RESOURCES = ("weights on disk", "smaller by", "time a video", "time a step", "host memory, peak", "device memory, peak")
VERSIONS = ("streamq", "torch", "diffusers", "format", "transformer")


@dataclass(frozen=True)
class Figure:
    """A number of the headline: `small`: its interval and count; `floor`: the noise floor, "" where unknown."""

    label: str
    value: str
    unit: str
    small: list[str]
    floor: str


@dataclass(frozen=True)
class Headline:
    """One candidate in plain numbers. `share`: its size as a part of float's, 0 where either is unknown."""

    name: str
    series: int
    types: list[tuple[str, int]]
    before: str
    after: str
    ratio: str
    share: float
    figures: list[Figure]


def stem(clip: Clip) -> str:
    """The name that a video's files share, "" if its sidecar names none."""
    return next((PurePath(name).stem for name in clip.sidecar.files.values()), "")


def mean_made(clips: Sequence[Clip], key: str) -> float | None:
    """The mean of a number in `made` over the videos that state it."""
    found = [value for clip in clips if (value := words.number(clip.sidecar.made.get(key))) is not None]
    return fmean(found) if found else None


def largest_made(clips: Sequence[Clip], key: str) -> float | None:
    """The largest of a number in `made` over the videos that state it."""
    return max((v for clip in clips if (v := words.number(clip.sidecar.made.get(key))) is not None), default=None)


def source_bytes(manifest: dict[str, Any] | None) -> int | None:
    """Bytes of the float weights that a candidate was made of, by its manifest."""
    source = (manifest or {}).get("source")
    if not isinstance(source, dict) or not source:
        return None
    sizes = [file.get("bytes") for files in source.values() for file in files]
    return sum(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None


def types_of(candidate: Candidate, layers: Sequence[Layer], series: int) -> list[tuple[str, int]]:
    """Type -> number of layers, the most frequent first: by the manifest, else by the videos' sidecars."""
    counts = Counter(layer.type for layer in layers if layer.series == series)
    made = candidate.clips[0].sidecar.made.get("types") if candidate.clips else None
    if not counts and isinstance(made, dict):
        counts.update({str(kind): count for kind, count in made.items() if isinstance(count, int)})
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def headlines(data: ReportData, layers: Sequence[Layer]) -> list[Headline]:
    """One for each candidate, in order."""
    made = []
    for series, candidate in enumerate(data.candidates):
        before = largest_made(data.reference, "transformer_bytes") or source_bytes(candidate.manifest)
        after = largest_made(candidate.clips, "transformer_bytes")
        both = bool(before and after)
        ratio = before / after if before and after else 0.0
        figures = [
            figure for metric, label, unit in HEADLINE if (figure := _figure(data, candidate, metric, label, unit))
        ]
        made.append(
            Headline(
                candidate.name, series, types_of(candidate, layers, series),
                format_bytes(before) if before else "", format_bytes(after) if after else "",
                f"{ratio:.2f}" if both else "", min(1.0, 1 / ratio) if ratio else 0.0, figures,
            )
        )  # fmt: skip
    return made


def _figure(data: ReportData, candidate: Candidate, metric: str, label: str, unit: str) -> Figure | None:
    for row in data.summary:
        if row.get("candidate") == candidate.name and row.get("metric") == metric:
            small = [interval(row), counted(row)]
            floor = "" if words.number(row.get("noise_floor")) is None else words.shown(metric, row["noise_floor"])
            return Figure(label, words.shown(metric, row.get("mean")), unit, [text for text in small if text], floor)
    return None


def pairs(count: Any) -> str:
    """`3` -> `3 pairs`."""
    found = words.number(count)
    return "" if found is None else f"{found:.0f} pair" + "s" * (found != 1)


def counted(row: dict[str, Any]) -> str:
    """`rough: 2 pairs` beside an interval of few, else `2 pairs`."""
    count = words.number(row.get("count"))
    rough = count is not None and count < FEW and bool(interval(row))
    return f"rough: {pairs(count)}" if rough else pairs(count)


def interval(row: dict[str, Any]) -> str:
    """`54.1 … 56.3`; "" where there is none."""
    low, high = words.number(row.get("low")), words.number(row.get("high"))
    metric = str(row.get("metric"))
    return "" if low is None or high is None else f"{words.shown(metric, low)} … {words.shown(metric, high)}"


def summary(data: ReportData) -> list[tuple[str, list[dict[str, Any]]]]:
    """Metric -> its rows as text, one a candidate, in the order in which the summary has them."""
    series = {candidate.name: number for number, candidate in enumerate(data.candidates)}
    made: dict[str, list[dict[str, Any]]] = {}
    for row in data.summary:
        metric = str(row.get("metric"))
        made.setdefault(metric, []).append(
            {
                "candidate": str(row.get("candidate")),
                "series": series.get(str(row.get("candidate"))),
                "mean": words.shown(metric, row.get("mean")),
                "interval": interval(row),
                "count": counted(row),
                "floor": words.shown(metric, row.get("noise_floor")).replace("+", "±"),
                "within": row.get("within_noise") is True,
                "p": words.probability(row.get("p_value")),
            }
        )
    return list(made.items())


def limits(data: ReportData) -> list[tuple[str, str, list[str]]]:
    """Other projects' bounds: who, what they ask for, what each candidate's means keep of it. [] without metrics."""
    made = []
    for who, bounds in THRESHOLDS.items():
        said = [f"{metric} {'≤' if METRICS[metric].better == 'lower' else '≥'} {bound:g}" for metric, bound in bounds]
        made.append((who, ", ".join(said), [_kept(_means(data, one), bounds) for one in data.candidates]))
    return made if data.summary else []


def _means(data: ReportData, candidate: Candidate) -> dict[str, float]:
    rows = [row for row in data.summary if row.get("candidate") == candidate.name]
    return {str(row["metric"]): mean for row in rows if (mean := words.number(row.get("mean"))) is not None}


def _kept(means: dict[str, float], bounds: Sequence[tuple[str, float]]) -> str:
    known = [(metric, bound) for metric, bound in bounds if metric in means]
    kept = sum(not worse(metric, means[metric], bound) for metric, bound in known)
    return f"{kept} of {len(known)} kept" if known else "–"


def pair_metrics(data: ReportData, index: int) -> list[tuple[str, list[str]]]:
    """Metric -> one pair's value for each candidate, as text."""
    rows = [_row_of(data, candidate, index) for candidate in data.candidates]
    metrics = dict.fromkeys(key for row in rows for key in row if key not in ROW_KEYS)
    return [(metric, [words.shown(metric, row.get(metric)) for row in rows]) for metric in metrics]


def pair_short(data: ReportData, index: int) -> list[str]:
    """One pair's PSNR and SSIM for each candidate, as text for a caption; "" where neither is known."""
    made = []
    for candidate in data.candidates:
        row = _row_of(data, candidate, index)
        known = [(metric, label, unit) for metric, label, unit in HEADLINE if row.get(metric) is not None]
        made.append(
            ", ".join(f"{label} {words.shown(metric, row[metric])} {unit}".strip() for metric, label, unit in known)
        )
    return made


def pair_failures(data: ReportData, index: int) -> list[str]:
    """Why a pair is in no mean, for each candidate that it failed with."""
    rows = [(candidate.name, _row_of(data, candidate, index).get("failed")) for candidate in data.candidates]
    return [f"{name}: {failed}" for name, failed in rows if failed]


def _row_of(data: ReportData, candidate: Candidate, index: int) -> dict[str, Any]:
    clip = data.reference[index]
    own = [row for row in data.per_video if row.get("candidate") == candidate.name]
    for row in own:
        if stem(clip) and row.get("stem") == stem(clip):
            return row
    pair = clip.sidecar.pair
    for row in own:
        if row.get("prompt") == pair.get("prompt") and str(row.get("seed")) == str(pair.get("seed")):
            return row
    return {}


def resources(data: ReportData) -> list[tuple[str, list[str]]]:
    """Sizes, times and memory: what, and a cell for float and each candidate. Rows without a number are left out."""
    before = largest_made(data.reference, "transformer_bytes")
    columns = [_resources(clips, before) for clips in (data.reference, *(c.clips for c in data.candidates))]
    rows = [(name, [column[place] for column in columns]) for place, name in enumerate(RESOURCES)]
    return [(name, cells) for name, cells in rows if any(cell != "–" for cell in cells)]


def _resources(clips: Sequence[Clip], before: float | None) -> list[str]:
    size = largest_made(clips, "transformer_bytes")
    times = (words.seconds(mean_made(clips, key)) for key in ("seconds", "seconds_per_step"))
    peaks = (_bytes(largest_made(clips, key)) for key in ("peak_host_bytes", "peak_device_bytes"))
    return [_bytes(size), f"{before / size:.2f}×" if before and size else "–", *times, *peaks]


def _bytes(count: float | None) -> str:
    return "–" if not count else format_bytes(count)


def versions(data: ReportData) -> list[tuple[str, list[str]]]:
    """What made the videos: key -> a cell for float and each candidate."""
    sets = [data.reference, *(candidate.clips for candidate in data.candidates)]
    rows = [(key, [_values(clips, key, "made") for clips in sets]) for key in VERSIONS]
    rows += [
        (key, [_values(clips, key, "pair") for clips in sets]) for key in ("device_kind", "compute_dtype", "scheduler")
    ]
    manifests = [candidate.manifest or {} for candidate in data.candidates]
    rows.append(("quantized by streamq", ["–", *(str(manifest.get("streamq", "–")) for manifest in manifests)]))
    rows.append(("plan", ["–", *(str(manifest.get("plan", "–"))[:12] for manifest in manifests)]))
    return rows


def _values(clips: Sequence[Clip], key: str, part: str) -> str:
    found = [getattr(clip.sidecar, part).get(key) for clip in clips]
    return ", ".join(dict.fromkeys(str(value) for value in found if value is not None)) or "–"


def recipes(data: ReportData) -> list[tuple[str, str]]:
    """Candidate -> its recipe as YAML, for those with a manifest."""
    import yaml

    made = []
    for candidate in data.candidates:
        recipe = (made_format(candidate) or {}).get("recipe")
        if recipe is not None:
            made.append((candidate.name, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)))
    return made
