"""Numbers of a video and of a pair of videos that need no weights. Frames come one at a time: none is kept.

Frames are uint8 [H, W, 3] RGB; in a pair, the first is the candidate's and the second the reference's (the float
model's). Sums of pixels are whole numbers, so they are exact and the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamq.errors import UsageError
from streamq.extras import require

if TYPE_CHECKING:
    import torch

SAME_FRAME_DB = 100.0  # what psnr_frame counts for a frame without a difference
BLACK = 2  # a frame with no value above it is black: h264 turns 0 into at most this
SSIM_WINDOW, SSIM_SIGMA, SSIM_K = 11, 1.5, (0.01, 0.03)
FARNEBACK: dict[str, Any] = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5,
                             "poly_sigma": 1.2, "flags": 0}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """`kind`: "pair" compares two videos, "own" is of one. `better`: "higher", "lower", or "same" as the reference.

    `group`: what `--metrics` calls it, besides its own name. `needs`: the option whose model it needs, or "".
    """

    group: str
    kind: str
    better: str
    needs: str = ""


METRICS = {
    "latent_rel_l2": Metric("latent", "pair", "lower"),
    "latent_cos": Metric("latent", "pair", "higher"),
    "psnr_video": Metric("psnr", "pair", "higher"),
    "psnr_frame": Metric("psnr", "pair", "higher"),
    "ssim": Metric("ssim", "pair", "higher"),
    "mae": Metric("pixel", "pair", "lower"),
    "rel_l2": Metric("pixel", "pair", "lower"),
    "cos": Metric("pixel", "pair", "higher"),
    "lpips": Metric("lpips", "pair", "lower", "lpips_model"),
    "flicker": Metric("flicker", "own", "same"),
    "motion": Metric("motion", "own", "same"),
    "motion_norm": Metric("motion", "own", "same"),
    "motion_series_dev": Metric("motion", "pair", "lower"),
    "clip_t": Metric("clip_t", "own", "higher", "clip_model"),
    "clip_score": Metric("clip_t", "own", "higher", "clip_model"),
    "clip_f": Metric("clip_f", "own", "same", "clip_model"),
    "background_consistency": Metric("background_consistency", "own", "same", "clip_model"),
    "subject_consistency": Metric("subject_consistency", "own", "same", "dino_model"),
}
PIXELS = ("psnr_video", "psnr_frame", "ssim", "mae", "rel_l2", "cos")


def latent_metrics(candidate: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """`latent_rel_l2` = |a - b| / |b| and `latent_cos` of final latents [C, f, h, w], summed in fp64.

    Raises UsageError for shapes that differ.
    """
    if candidate.shape != reference.shape:
        raise UsageError(f"latents {list(candidate.shape)} and {list(reference.shape)}: a pair has equal shapes")
    a, b = (one.astype(np.float64).ravel() for one in (candidate, reference))
    difference, norms = math.sqrt(_dot(a - b, a - b)), (math.sqrt(_dot(a, a)), math.sqrt(_dot(b, b)))
    return {
        "latent_rel_l2": _ratio(difference, norms[1]),
        "latent_cos": 1.0 if not difference else _ratio(_dot(a, b), norms[0] * norms[1]),
    }


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b))  # not a @ b: BLAS adds in an order that depends on its threads


def _ratio(above: float, below: float) -> float:
    if below:
        return above / below
    return math.inf if above else 0.0


def frame_sums(candidate: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Exact int64 sums over a frame's pixels: of (a - b)^2, |a - b|, a * b, a^2, b^2, and how many values."""
    a, b = candidate.astype(np.int32).ravel(), reference.astype(np.int32).ravel()
    difference = a - b
    sums = [(x.sum(dtype=np.int64)) for x in (difference * difference, np.abs(difference), a * b, a * a, b * b)]
    return np.array([*sums, a.size], dtype=np.int64)


def psnr(squares: float, count: float) -> float:
    """10 log10(255^2 / MSE) in dB of a sum of squared differences over `count` 8-bit values; inf for none."""
    return 10 * math.log10(255.0**2 * count / squares) if squares else math.inf


def pixel_metrics(pairs: Iterable[tuple[np.ndarray, np.ndarray]], *, with_ssim: bool = True) -> dict[str, float]:
    """`PIXELS` of (candidate, reference) frames; `ssim` only on request, since it is most of the work.

    Raises UsageError for no frames and for shapes that differ.
    """
    total, frames, similar = np.zeros(6, dtype=np.int64), [], []
    for candidate, reference in pairs:
        if candidate.shape != reference.shape:
            raise UsageError(f"frames {list(candidate.shape)} and {list(reference.shape)}: a pair has equal sizes")
        sums = frame_sums(candidate, reference)
        total += sums
        frames.append(min(psnr(int(sums[0]), int(sums[5])), SAME_FRAME_DB) if sums[0] else SAME_FRAME_DB)
        if with_ssim:
            similar.append(ssim_frame(candidate, reference))
    if not frames:
        raise UsageError("a pair of videos without a frame; make them again")
    squares, absolute, product, own, other, count = map(int, total)
    found = {
        "psnr_video": psnr(squares, count),
        "psnr_frame": math.fsum(frames) / len(frames),
        "mae": absolute / count,
        "rel_l2": _ratio(math.sqrt(squares), math.sqrt(other)),
        "cos": 1.0 if not squares else _ratio(product, math.sqrt(own) * math.sqrt(other)),
    }
    if with_ssim:
        found["ssim"] = math.fsum(similar) / len(similar)
    return found


def ssim_frame(candidate: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two frames: Gaussian window 11 * 11, sigma 1.5, K .01 and .03, range
    255, population covariance, the mean over positions where the window fits and over the three channels, in fp64.

    Equals scikit-image's with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`. Raises UsageError for
    frames smaller than the window.
    """
    import torch

    if min(candidate.shape[:2]) < SSIM_WINDOW:
        raise UsageError(
            f"frames of {candidate.shape[1]}*{candidate.shape[0]}: ssim's window needs {SSIM_WINDOW} pixels each way;"
            " leave ssim out with --metrics"
        )
    channels = [
        _ssim_channel(
            torch.from_numpy(np.ascontiguousarray(candidate[..., c])).double(),
            torch.from_numpy(np.ascontiguousarray(reference[..., c])).double(),
        )
        for c in range(3)
    ]
    return math.fsum(channels) / 3


def _ssim_channel(a: torch.Tensor, b: torch.Tensor) -> float:
    import torch

    means = _window(torch.stack([a, b, a * a, b * b, a * b]))
    mean_a, mean_b = means[0], means[1]
    var_a, var_b, covariance = means[2] - mean_a**2, means[3] - mean_b**2, means[4] - mean_a * mean_b
    c1, c2 = ((k * 255) ** 2 for k in SSIM_K)
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _window(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian means where the window fits: [n, H, W] -> [n, H - 10, W - 10]. Sums of shifted maps, no convolution:
    a convolution's order of adding depends on the machine."""
    half = SSIM_WINDOW // 2
    weights = [math.exp(-((i - half) ** 2) / (2 * SSIM_SIGMA**2)) for i in range(SSIM_WINDOW)]
    total = math.fsum(weights)
    for dim in (1, 2):
        size = maps.shape[dim] - 2 * half
        total_map = maps.narrow(dim, 0, size) * (weights[0] / total)
        for i in range(1, SSIM_WINDOW):
            total_map.add_(maps.narrow(dim, i, size), alpha=weights[i] / total)
        maps = total_map
    return maps


@dataclass(frozen=True)
class OwnFacts:
    """What one pass over a video found. `series`: motion of each pair of consecutive frames, pixels per frame.

    `flicker`: None with a single frame. `black`: numbers of the frames that are black.
    """

    frame_num: int
    height: int
    width: int
    flicker: float | None
    series: tuple[float, ...]
    black: tuple[int, ...]


def own_facts(frames: Iterable[np.ndarray], *, with_motion: bool) -> OwnFacts:
    """One pass over a video. `flicker` is VBench's temporal flickering: (255 - m) / 255, m the mean over pairs of
    consecutive frames of their mean absolute difference. Raises UsageError for no frames, or without OpenCV."""
    before: np.ndarray | None = None
    differences, series, black, shape, count = [], [], [], (0, 0), 0
    for frame in frames:
        if int(frame.max()) <= BLACK:
            black.append(count)
        if before is not None:
            gap = np.abs(frame.astype(np.int16) - before.astype(np.int16))
            differences.append(int(gap.sum(dtype=np.int64)) / gap.size)
            if with_motion:
                series.append(motion_between(before, frame))
        before, shape, count = frame, frame.shape[:2], count + 1
    if not count:
        raise UsageError("a video without a frame; make it again")
    flicker = (255 - math.fsum(differences) / len(differences)) / 255 if differences else None
    return OwnFacts(count, shape[0], shape[1], flicker, tuple(series), tuple(black))


def motion_between(before: np.ndarray, after: np.ndarray) -> float:
    """Mean length of OpenCV's Farneback flow (`FARNEBACK`) between two frames' grey values, pixels.

    0 for two equal frames, where OpenCV finds some thousandths of a pixel near the borders.
    """
    cv2 = require("cv2", "motion", "eval")
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    if np.array_equal(*grey):
        return 0.0
    flow = cv2.calcOpticalFlowFarneback(grey[0], grey[1], None, **FARNEBACK).astype(np.float64)
    return float(np.mean(np.hypot(flow[..., 0], flow[..., 1])))


def motion_metrics(facts: OwnFacts, fps: float) -> dict[str, float]:
    """`motion`, pixels per frame, and `motion_norm` = motion * fps / min(h, w), short sides per second."""
    if not facts.series:
        return {}
    motion = math.fsum(facts.series) / len(facts.series)
    return {"motion": motion, "motion_norm": motion * fps / min(facts.height, facts.width)}


def motion_series_dev(candidate: tuple[float, ...], reference: tuple[float, ...]) -> float:
    """mean |m_i^candidate - m_i^reference| / mean m^reference: a frozen or jumpy video with the same mean shows."""
    gaps = [abs(a - b) for a, b in zip(candidate, reference, strict=True)]
    return _ratio(math.fsum(gaps), math.fsum(reference))
