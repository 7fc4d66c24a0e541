"""Frames and differences as pictures inside the page: exact where that fits, else smaller, fewer and lossy.

Every frame is one WebP picture that the page's script draws on a canvas: any browser shows it offline, frames of all
players stay in step, and a lossless one has the video's own bits. Differences are taken here, of the whole frames
before any coding, and are stored as grey pictures; the script colours them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamq.extras import require
from streamq.report.data import ReportData

BUDGET_BYTES = 14_000_000  # of the pictures, as they stand in the page
SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 255)  # 8-bit levels that the last colour may stand for
COLOURS = "inferno"  # matplotlib's: black is none, lightness grows evenly, also without red or green sight


@dataclass(frozen=True)
class Coding:
    """How frames are stored: at most `width` pixels wide, `frames` a clip; `quality` of WebP, None for lossless."""

    width: int | None
    frames: int | None
    quality: int | None


LADDER = (
    Coding(None, None, None),
    Coding(480, 49, 80),
    Coding(480, 33, 72),
    Coding(400, 25, 66),
    Coding(320, 17, 60),
    Coding(256, 9, 50),
)


@dataclass(frozen=True)
class Difference:
    """A candidate's video against the reference's. `curve`: mean |a - b| of each frame, in 8-bit levels.

    `counts`: how many pixels of the whole video differ by 0, 1, … 255 levels in their most different channel.
    """

    curve: tuple[float, ...]
    counts: np.ndarray


@dataclass(frozen=True)
class Strip:
    """A clip as the page holds it: base64 of one WebP picture a frame. `gain`: stored value of a level's difference."""

    frames: tuple[str, ...]
    width: int
    height: int
    gain: float = 1.0


@dataclass(frozen=True)
class PairPictures:
    """The strips of one pair; a candidate's are None where its frames have another size or number."""

    reference: Strip
    candidates: list[Strip]
    heat: list[Strip | None]
    differences: list[Difference | None]
    step: int  # every how manyeth frame is there


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[H, W] uint8: how far the most different of a pixel's three channels is off. a, b: uint8 [H, W, 3]."""
    return (np.maximum(a, b) - np.minimum(a, b)).max(axis=-1)


def compare(a: np.ndarray, b: np.ndarray) -> Difference | None:
    """Frame by frame; None where the shapes differ. a, b: uint8 [F, H, W, 3]."""
    if a.shape != b.shape:
        return None
    curve, counts = [], np.zeros(256, dtype=np.int64)
    for one, other in zip(a, b, strict=True):
        apart = np.maximum(one, other) - np.minimum(one, other)
        curve.append(float(apart.mean(dtype=np.float64)))
        counts += np.bincount(apart.max(axis=-1).ravel(), minlength=256)
    return Difference(tuple(curve), counts)


def scale_of(differences: list[list[Difference | None]]) -> int:
    """One of SCALES that 99 % of the pixels of every candidate stay within: one for the page, so colours compare.

    `differences`: a list a pair, with each candidate's.
    """
    largest = 0
    for candidate in zip(*differences, strict=True):
        counts = sum((found.counts for found in candidate if found is not None), np.zeros(256, dtype=np.int64))
        if counts.any():
            largest = max(largest, int(np.searchsorted(np.cumsum(counts), 0.99 * counts.sum())))
    return next(scale for scale in SCALES if scale >= largest)


def colour_table() -> np.ndarray:
    """[256, 3] uint8: the colours of the heat maps. Raises UsageError without matplotlib."""
    maps = require("matplotlib", "the report's heat maps", "eval").colormaps
    return np.asarray(maps[COLOURS](np.arange(256), bytes=True))[:, :3]


def legend(colours: np.ndarray) -> str:
    """A picture of the colours from left to right, as a data URI."""
    image = require("PIL.Image", "the report's pictures", "eval")
    buffer = io.BytesIO()
    image.fromarray(np.ascontiguousarray(colours[None])).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def encode(picture: np.ndarray, coding: Coding, *, smooth: bool = True) -> bytes:
    """WebP of a uint8 picture, [H, W, 3] or [H, W]. `smooth`: how a frame is made smaller; else by plain means."""
    image = require("PIL.Image", "the report's pictures", "eval")
    shown = image.fromarray(picture)
    if coding.width is not None and shown.width > coding.width:
        size = (coding.width, max(1, round(shown.height * coding.width / shown.width)))
        shown = shown.resize(size, image.Resampling.LANCZOS if smooth else image.Resampling.BOX)
    buffer = io.BytesIO()
    quality = coding.quality
    if quality is None:
        shown.convert("RGB").save(buffer, format="WEBP", lossless=True, quality=50, method=4)
    else:
        shown.convert("RGB").save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _indices(count: int, coding: Coding) -> range:
    return range(0, count, 1 if coding.frames is None else max(1, math.ceil(count / coding.frames)))


def _heat(a: np.ndarray, b: np.ndarray, gain: float) -> np.ndarray:
    apart = difference(a, b)
    if gain == 1:
        return apart
    return np.clip(np.rint(apart.astype(np.float32) * gain), 0, 255).astype(np.uint8)


def _gain(coding: Coding, scale: int) -> float:
    # Lossy coding blurs by some levels: what is stored fills the range, so that it blurs a few hundredths of the scale.
    return 1.0 if coding.quality is None else 255 / scale


def _clips(data: ReportData, pair: int) -> list[np.ndarray]:
    return [data.reference[pair].frames, *(candidate.clips[pair].frames for candidate in data.candidates)]


def _estimate(data: ReportData, pair: int, coding: Coding, scale: int) -> float:
    """Bytes of one pair in the page, judged by the frames in the middle."""
    clips = _clips(data, pair)
    total = 0.0
    for number, frames in enumerate(clips):
        count, middle = len(_indices(len(frames), coding)), len(frames) // 2
        size = len(encode(frames[middle], coding))
        if number and frames.shape == clips[0].shape:
            apart = _heat(clips[0][middle], frames[middle], _gain(coding, scale))
            size += len(encode(apart, coding, smooth=False))
        total += count * size * 4 / 3
    return total * 1.1


def choose(data: ReportData, scale: int) -> tuple[Coding, int]:
    """The first coding of LADDER within the budget, and of how many pairs the page has players."""
    pairs = len(data.reference)
    for coding in LADDER:
        raw = sum(frames.nbytes for pair in range(pairs) for frames in _clips(data, pair))
        if coding.quality is None and raw > 8 * BUDGET_BYTES:
            continue
        sizes = [_estimate(data, pair, coding, scale) for pair in range(pairs)]
        if sum(sizes) <= BUDGET_BYTES:
            return coding, pairs
    fits = int(np.searchsorted(np.cumsum(sizes), BUDGET_BYTES, side="right"))
    return coding, max(1, fits)


def pictures(
    data: ReportData, coding: Coding, scale: int, differences: list[list[Difference | None]]
) -> Iterator[PairPictures]:
    """One pair after the other, as many as `differences` has."""
    for pair, found in enumerate(differences):
        clips = _clips(data, pair)
        shown = _indices(len(clips[0]), coding)
        heat: list[Strip | None] = []
        for frames, known in zip(clips[1:], found, strict=True):
            if known is None:
                heat.append(None)
                continue
            gain = _gain(coding, scale)
            codes = [encode(_heat(clips[0][i], frames[i], gain), coding, smooth=False) for i in shown]
            heat.append(_strip(codes, frames, coding, gain))
        strips = [
            _strip([encode(frames[i], coding) for i in shown if i < len(frames)], frames, coding) for frames in clips
        ]
        yield PairPictures(strips[0], strips[1:], heat, found, shown.step)


def _strip(codes: list[bytes], frames: np.ndarray, coding: Coding, gain: float = 1.0) -> Strip:
    height, width = frames.shape[1:3]
    if coding.width is not None and width > coding.width:
        height, width = max(1, round(height * coding.width / width)), coding.width
    return Strip(tuple(base64.b64encode(code).decode() for code in codes), width, height, gain)
