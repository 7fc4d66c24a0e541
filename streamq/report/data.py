"""What a report is made of: the videos in memory, their sidecars, the manifests and the rows of the metrics' files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from streamq.videos import Sidecar


@dataclass(frozen=True)
class Clip:
    """One video. `frames`: uint8 [F, H, W, 3], RGB."""

    frames: np.ndarray
    fps: float
    sidecar: Sidecar


@dataclass(frozen=True)
class Candidate:
    """One quantized transformer's videos, in the order of the reference's. `manifest`: its folder's `streamq.json`."""

    name: str
    manifest: dict[str, Any] | None
    clips: list[Clip]


@dataclass(frozen=True)
class ReportData:
    """`build`'s input. `per_video` and `summary` are the rows of the CSV files that `streamq eval` writes.

    A row of `per_video`: candidate, stem, prompt, seed, then a column a metric. A row of `summary`: candidate, metric,
    mean, low, high (of the 95 % interval), count, noise_floor, p_value; the last two may be None.
    """

    title: str
    reference: list[Clip]
    candidates: list[Candidate]
    per_video: list[dict[str, Any]] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
