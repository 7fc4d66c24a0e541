"""The numbers of one video and of one pair, each file read front to back with a frame or two in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamq import hub
from streamq.errors import UsageError
from streamq.evaluation import clip, lpips
from streamq.evaluation.clip import Encoder
from streamq.evaluation.metrics import (
    METRICS,
    PIXELS,
    OwnFacts,
    latent_metrics,
    motion_metrics,
    motion_series_dev,
    own_facts,
    pixel_metrics,
)
from streamq.evaluation.pairs import Video
from streamq.evaluation.settings import EvalSettings
from streamq.extras import require
from streamq.videos import iter_frames, pixel_file

Distance = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Models:
    """The loaded models of metrics; None for those that no metric needs."""

    clip: Encoder | None = None
    dino: Encoder | None = None
    lpips: Distance | None = None


@dataclass(frozen=True)
class Own:
    """One video's own numbers. `broken`: why its pair fails, or "". `cut`: tokens of the prompt that CLIP never saw."""

    values: dict[str, float]
    facts: OwnFacts
    broken: str
    cut: int = 0


def check_models(settings: EvalSettings) -> None:
    """Find the models' files, fetching what a hub id names, without loading one. Raises UsageError."""
    needed = {METRICS[metric].needs for metric in settings.metrics}
    for option, model, kind in (
        ("clip_model", settings.clip_model, "clip"),
        ("dino_model", settings.dino_model, "vit"),
    ):
        if option in needed:
            clip.find_model(str(model), f"--{option}", kind)
    if "lpips_model" in needed:
        _lpips_file(settings)


def _lpips_file(settings: EvalSettings) -> Path:
    model = str(settings.lpips_model)
    wanted = ["*.safetensors"]
    return lpips.find_weights(hub.resolve(model, download=True, option="--lpips_model", wanted=wanted, unwanted=None))


def load_models(settings: EvalSettings) -> Models:
    """Load what the metrics need. Raises UsageError for a model that cannot be used."""
    import torch

    needed = {METRICS[metric].needs for metric in settings.metrics} - {""}
    if not needed:
        return Models()
    device = torch.device(settings.device)
    found = Models(
        clip.load_clip(str(settings.clip_model), device) if "clip_model" in needed else None,
        clip.load_dino(str(settings.dino_model), device) if "dino_model" in needed else None,
    )
    if "lpips_model" not in needed:
        return found
    return Models(found.clip, found.dino, lpips.load_lpips(_lpips_file(settings), device))


def measure_own(video: Video, settings: EvalSettings, models: Models) -> Own:
    """One video's own metrics of `settings.metrics`. Raises UsageError for a file that is not what its JSON says."""
    file, pair, wanted = pixel_file(video.path, video.sidecar), video.sidecar.pair, settings.metrics
    facts = own_facts(iter_frames(file), with_motion=any(METRICS[m].group == "motion" for m in wanted))
    for name, has in (("frame_num", facts.frame_num), ("width", facts.width), ("height", facts.height)):
        if has != pair[name]:
            raise UsageError(f"{file}: {name} is {has}, its JSON says {pair[name]}; make the video again")
    values = motion_metrics(facts, float(pair["fps"]))
    if facts.flicker is not None:
        values["flicker"] = facts.flicker
    cut = 0
    if models.clip is not None:
        images = clip.embed(models.clip, iter_frames(file))
        found = {"clip_f": clip.consecutive(images), "background_consistency": clip.consistency(images)}
        values |= {name: value for name, value in found.items() if value is not None}
        if models.clip.text is not None:
            text, cut = models.clip.text(pair["prompt"])
            values |= clip.alignment(images[clip.sampled(len(images), settings.frames)], text)
    if models.dino is not None:
        subject = clip.consistency(clip.embed(models.dino, iter_frames(file)))
        values |= {"subject_consistency": subject} if subject is not None else {}
    kept = {name: value for name, value in values.items() if name in wanted}
    return Own(kept, facts, _broken(video, facts, wanted), cut)


def _broken(video: Video, facts: OwnFacts, wanted: tuple[str, ...]) -> str:
    if facts.black:
        return f"frame {facts.black[0]} is black" + (f" ({len(facts.black)} are)" if len(facts.black) > 1 else "")
    if "latents" in video.sidecar.files and any(METRICS[m].group == "latent" for m in wanted):
        finite = np.isfinite(read_latents(video.path.parent / video.sidecar.files["latents"]))
        return "" if finite.all() else f"{finite.size - int(finite.sum())} of {finite.size} latents are NaN or Inf"
    return ""


def read_latents(path: Path) -> np.ndarray:
    """The tensor `latents` of a .safetensors file, fp32. Raises UsageError."""
    unreadable = require("safetensors", "latents").SafetensorError
    try:
        tensors = require("safetensors.numpy", "latents").load_file(path)
    except (OSError, unreadable, TypeError) as error:
        raise UsageError(f"{path}: latents that cannot be read ({error}); make the video again") from error
    if "latents" not in tensors or tensors["latents"].dtype != np.float32:
        raise UsageError(f"{path}: has no fp32 tensor `latents`; make the video again")
    return np.asarray(tensors["latents"])


def measure_pair(
    reference: Video, candidate: Video, own: tuple[Own, Own], settings: EvalSettings, models: Models
) -> dict[str, float]:
    """The pair's metrics of `settings.metrics`; `own`: the reference's and the candidate's. Raises UsageError."""
    wanted = settings.metrics
    values: dict[str, float] = {}
    if any(METRICS[metric].group == "latent" for metric in wanted):
        values |= latent_metrics(
            *(read_latents(v.path.parent / v.sidecar.files["latents"]) for v in (candidate, reference))
        )
    if any(metric in PIXELS for metric in wanted):
        values |= pixel_metrics(_frame_pairs(candidate, reference), with_ssim="ssim" in wanted)
    if own[0].facts.series:
        values["motion_series_dev"] = motion_series_dev(own[1].facts.series, own[0].facts.series)
    if models.lpips is not None:
        picked = set(clip.sampled(own[0].facts.frame_num, settings.frames))
        frames = enumerate(_frame_pairs(candidate, reference))
        distances = [models.lpips(*pair) for number, pair in frames if number in picked]
        values["lpips"] = math.fsum(distances) / len(distances)
    return {name: value for name, value in values.items() if name in wanted}


def _frame_pairs(candidate: Video, reference: Video) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    files = [pixel_file(video.path, video.sidecar) for video in (candidate, reference)]
    if [file.suffix for file in files].count(".mkv") == 1:
        raise UsageError(f"{files[0]} and {files[1]}: one is lossless and one is not; make both with streamq generate")
    try:
        yield from zip(*map(iter_frames, files), strict=True)
    except ValueError as error:
        raise UsageError(
            f"{files[0]}: has not as many frames as {files[1]}; give a video of the same length"
        ) from error
