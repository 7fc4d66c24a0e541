"""What one `streamq eval` measures, parsed and checked; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamq.errors import UsageError, nearest
from streamq.evaluation.metrics import METRICS
from streamq.evaluation.pairs import Video

GROUPS = tuple(dict.fromkeys(metric.group for metric in METRICS.values()))
SHORT = {"psnr": "psnr_video", "latent": "latent_rel_l2"}  # what `--fail_under` takes a group's name for


@dataclass(frozen=True)
class EvalSettings:
    """`metrics`: names of `METRICS`. `frames`: how many frames clip_t, clip_score and lpips look at, None for all.
    `bootstrap`: draws. `allowed`: fields that a pair may differ in. `device`: for the models of metrics."""

    metrics: tuple[str, ...]
    clip_model: str | None = None
    dino_model: str | None = None
    lpips_model: str | None = None
    noise_floor: Path | None = None
    frames: int | None = None
    bootstrap: int = 10000
    seed: int = 0
    allowed: tuple[str, ...] = ()
    device: str = "cpu"


def select(asked: str, given: dict[str, str | None]) -> tuple[tuple[str, ...], list[str]]:
    """The metrics of a `--metrics` text ("psnr,ssim", "all"), and a note for each that is left out.

    `given`: option -> model, of those that metrics need. Raises UsageError for an unknown name, and for a metric that
    is asked for by name without its model.
    """
    words = [word.strip() for word in asked.split(",") if word.strip()]
    named = [word for word in words if word != "all"]
    for word in named:
        if word not in METRICS and word not in GROUPS:
            raise UsageError(
                f"--metrics {word}: unknown; have {', '.join(GROUPS)}, all, and {', '.join(METRICS)}"
                + nearest(word, (*METRICS, *GROUPS))
            )
    if not words:
        raise UsageError(f"--metrics {asked!r}: names no metric; have {', '.join(GROUPS)}, all")
    wanted = [m for m, about in METRICS.items() if "all" in words or m in named or about.group in named]
    missing: dict[str, list[str]] = {}
    for metric in wanted:
        needs = METRICS[metric].needs
        if needs and not given.get(needs):
            if metric in named or METRICS[metric].group in named:
                raise UsageError(
                    f"--metrics {metric}: needs --{needs} (a folder or a hub id); give it, or leave it out"
                )
            missing.setdefault(needs, []).append(metric)
    notes = [f"{', '.join(metrics)} left out: no --{needs}" for needs, metrics in missing.items()]
    absent = {metric for metrics in missing.values() for metric in metrics}
    return tuple(metric for metric in wanted if metric not in absent), notes


def without_latents(asked: str, metrics: tuple[str, ...], videos: Sequence[Video]) -> tuple[tuple[str, ...], list[str]]:
    """The metrics that can be had of these videos: latents are files, and may not be there. Raises UsageError."""
    lacking = next((video for video in videos if "latents" not in video.sidecar.files), None)
    wanted = [metric for metric in metrics if METRICS[metric].group == "latent"]
    if lacking is None or not wanted:
        return metrics, []
    if any(word.strip() in ("latent", *wanted) for word in asked.split(",")):
        raise UsageError(f"--metrics latent: {lacking.path} names no file of latents; make it again, or leave it out")
    return (
        tuple(metric for metric in metrics if metric not in wanted),
        [f"{', '.join(wanted)} left out: {lacking.path.name} names no file of latents"],
    )


def parse_limits(given: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """`["psnr=30"]` -> {"psnr_video": 30.0}. Raises UsageError for another form, or a metric that is not measured."""
    limits: dict[str, float] = {}
    for text in given:
        name, equals, value = text.partition("=")
        metric = SHORT.get(name, name)
        try:
            bound = float(value)
        except ValueError:
            bound = float("nan")
        if not equals or bound != bound:
            raise UsageError(f"--fail_under {text}: write METRIC=NUMBER, e.g. psnr=30")
        if metric not in METRICS:
            raise UsageError(
                f"--fail_under {text}: unknown metric; have {', '.join(METRICS)}" + nearest(name, [*METRICS])
            )
        if metric not in metrics:
            raise UsageError(
                f"--fail_under {text}: {metric} is not measured here; see --metrics and the models it needs"
            )
        limits[metric] = bound
    return limits
