"""The metrics' definitions, with window, sampling and units, and how numbers are written."""

from __future__ import annotations

import math
from typing import Any

DEFINITIONS = {
    "psnr_video": "10·log10(255² / MSE) in dB, the mean squared error over the whole video, 8-bit RGB",
    "psnr_frame": "mean over frames of each frame's PSNR in dB; an identical frame counts as 100 dB",
    "ssim": "structural similarity a frame, RGB averaged, Gaussian window 11×11, σ 1.5, data range 255; then the mean",
    "mae": "mean absolute difference over all pixels, in 8-bit levels",
    "rel_l2": "‖a − b‖ / ‖b‖ over all pixels, b the float video",
    "cos": "cosine of the two videos, over all pixels",
    "latent_rel_l2": "‖a − b‖ / ‖b‖ of the final latents before the VAE, b the float model's",
    "latent_cos": "cosine of the final latents before the VAE",
    "flicker": "(255 − mean absolute difference of consecutive frames) / 255, as VBench has it",
    "motion": "mean length of the optical flow in pixels a frame, OpenCV Farneback (0.5, 3, 15, 3, 5, 1.2, 0), grey",
    "motion_norm": "motion × fps / min(height, width): short sides a second",
    "motion_series_dev": "mean |mᵢ − mᵢ of float| / mean m of float over frame pairs: a frozen or jumpy video",
    "clip_t": "mean over sampled frames of the cosine of CLIP's image and text features",
    "clip_score": "100 · max(cosine, 0) of CLIP's image and text features, averaged over sampled frames",
    "clip_f": "temporal consistency: mean cosine of CLIP's image features of consecutive sampled frames",
    "background_consistency": "VBench: CLIP ViT-B/32 features of each frame against the one before and the first",
    "subject_consistency": "VBench: DINO ViT-B/16 features of each frame against the one before and the first",
    "lpips": "LPIPS a frame, averaged over frames",
}


BETTER = {
    "higher": "higher is better", "lower": "lower is better", "same": "best as float has it", "zero": "best at 0",
    "": "",
}  # fmt: skip


def definition(metric: str) -> str:
    """A metric's definition; "" for one that is not known."""
    if metric.startswith("vbench_"):
        return "as VBench measured it"
    whole = metric.removesuffix("_diff")
    if whole != metric:
        return f"{whole} less float's {whole}, pair by pair" if whole in DEFINITIONS else ""
    return DEFINITIONS.get(metric, "")


def number(value: Any) -> float | None:
    """A number, also one that a CSV holds as text; None for anything else and for NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return None if math.isnan(found) else found


def shown(metric: str, value: Any) -> str:
    """A metric's value: PSNR with two decimals, cosines with as many as tell them from 1, others with four digits."""
    found = number(value)
    if found is None:
        return "–" if value is None or not str(value) or str(value) == "nan" else str(value)
    if math.isinf(found):
        return "∞" if found > 0 else "−∞"
    if metric.endswith("_diff"):
        text = f"{found:+.4g}" if found else "0"
    elif metric.startswith("psnr"):
        text = f"{found:.2f}"
    elif metric.startswith(("ssim", "cos", "latent_cos", "clip_t", "clip_f", "flicker", "background", "subject")):
        off = abs(1 - abs(found))
        text = f"{found:.{min(9, max(4, 1 - math.floor(math.log10(off) + 1e-6))) if off else 4}f}"
    else:
        text = f"{found:.4g}"
    return text.replace("-", "−")


def probability(value: Any) -> str:
    """`0.00012` -> `< 0.001`."""
    found = number(value)
    if found is None:
        return "–"
    return "< 0.001" if found < 0.001 else f"{found:.2g}"


def seconds(value: Any) -> str:
    """Seconds with three digits, from a minute on as minutes, from 100 minutes on as hours."""
    found = number(value)
    if found is None:
        return "–"
    if found < 100:
        return f"{found:.3g} s"
    minutes = round(found / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
