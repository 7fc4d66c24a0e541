"""What a handful of pairs allows to be said: means, bootstrap intervals, a signed-rank test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamq.extras import require

LEVEL = 0.95
FEW = 20  # with fewer pairs the count stands next to every mean
CHUNK = 1 << 20  # draws at a time


@dataclass(frozen=True)
class Interval:
    """A mean and its interval; `low` and `high` are None for a single value, which has none."""

    mean: float
    low: float | None
    high: float | None
    count: int


def bootstrap(values: Sequence[float], draws: int, seed: int) -> Interval | None:
    """The mean and the percentile bootstrap interval (Efron 1979) of 95 %; None for no values.

    Pairs are drawn with replacement, `draws` times. The ends are values that were drawn, so that an infinite value
    (the PSNR of two equal videos) gives an infinite mean or end, never a NaN. Same values and seed: same interval.
    """
    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    mean = math.fsum(values) / len(values) if np.isfinite(data).all() else float(data.mean())
    if len(values) == 1 or draws < 2:
        return Interval(mean, None, None, len(values))
    generator, means, size = np.random.default_rng(seed), [], max(1, CHUNK // len(values))
    for start in range(0, draws, size):
        picks = generator.integers(0, len(values), (min(size, draws - start), len(values)))
        means.append(data[picks].mean(axis=1))
    found = np.sort(np.concatenate(means))
    tail = (1 - LEVEL) / 2
    low, high = found[math.floor(tail * (draws - 1))], found[math.ceil((1 - tail) * (draws - 1))]
    return Interval(mean, float(low), float(high), len(values))


def signed_rank(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test that differences lie around zero; None for fewer than two.

    All zero: 1. Differences that are no numbers (inf - inf: both pairs without a difference) count as zero. Below six
    pairs p cannot fall under 0.05. Raises UsageError without scipy.
    """
    data = np.nan_to_num(np.asarray(differences, dtype=np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if len(data) < 2:
        return None
    if not data.any():
        return 1.0
    return float(require("scipy.stats", "the signed-rank test", "eval").wilcoxon(data).pvalue)
