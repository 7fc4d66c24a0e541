"""Smoothing vectors: the s [in] by which a layer's input is divided and its weight's columns are multiplied.

SmoothQuant (Xiao et al. 2023) and AWQ (Lin et al. 2024) in the form of LLMC and msModelSlim. One vector serves all
layers that read the same input. A channel that calibration never saw alive gets 1: the formulas would give it the least
s there is, and should it come alive at run time, x / s would drown all other channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamq.methods.activation import fake_quantize, static_input
from streamq.methods.statistics import InputStatistics
from streamq.pairs import QConfig

ALPHAS = tuple(i / 20 for i in range(21))
RATIOS = tuple(i / 20 for i in range(20))
WEIGHT_FLOOR = 1e-5
AWQ_FLOOR = 1e-4
TILE_BYTES = 32 << 20  # of fp32 weight rows in a trial: large enough for a fast product
# Far enough from the ends of bf16 and fp32 for s and 1 / s to be normal numbers in both.
S_LEAST, S_MOST = 2.0**-100, 2.0**100

Quantizer = Callable[[Tensor], Tensor]
"""Rows of a weight, fp32 [n, K], to what its rounding leaves of them; each row for itself."""


@dataclass(frozen=True)
class Found:
    """A search's result. s: [K] fp32. choice: the alpha or ratio, None for s = 1.

    error, plain: squared output error over the kept rows, of s and of s = 1, relative to the squared output.
    """

    s: Tensor
    choice: float | None
    error: float
    plain: float


def column_amax(weights: Sequence[Tensor]) -> Tensor:
    """[K] fp32, max |W[:, j]| over all weights [N, K] of any float dtype. Makes no copy of any of them."""
    highs = [torch.maximum(w.amax(dim=0), -w.amin(dim=0)).float() for w in weights]
    return torch.stack(highs).amax(dim=0)


@torch.no_grad()
def smoothquant(x_amax: Tensor, weights: Sequence[Tensor], alpha: float, scale_min: float = 1e-5) -> Tensor:
    """s = max(x^alpha / w^(1 - alpha), scale_min), w = max |W[:, j]| over the weights, at least 1e-5; 1 where x is 0.

    x_amax: [K] fp32. Returns [K] fp32. What is not finite in x_amax stays so.
    """
    return _smoothquant(x_amax, column_amax(weights), alpha, scale_min)


def _smoothquant(x: Tensor, w: Tensor, alpha: float, scale_min: float) -> Tensor:
    s = x.pow(alpha).div_(w.clamp_min(WEIGHT_FLOOR).pow_(1 - alpha)).clamp_min_(scale_min)
    return torch.where(x == 0, torch.ones_like(s), s)


def _awq(mean: Tensor, ratio: float) -> Tensor:
    """s = max(mean^r, 1e-4) / sqrt(max(s) · min(s)), over the channels that are alive; the others 1."""
    alive = mean > 0
    if not alive.any():
        return torch.ones_like(mean)
    s = mean.pow(ratio).clamp_min_(AWQ_FLOOR)
    live = s[alive]
    return torch.where(alive, s / (live.amax() * live.amin()).sqrt(), torch.ones_like(s))


@torch.no_grad()
def search_alpha(
    stats: InputStatistics,
    weights: Sequence[Tensor],
    act: QConfig,
    quantizer: Quantizer,
    *,
    scale_min: float = 1e-5,
    alphas: Sequence[float] = ALPHAS,
    settle: Quantizer | None = None,
) -> Found:
    """SmoothQuant's alpha of least output error for a whole group, or s = 1 where nothing is better.

    Needs kept rows (else ValueError). `settle` adjusts each candidate before it is tried (`exact`, `exact_for_norm`):
    what is judged is what will be stored. Channels below the mean amax count as the mean: only hot ones are cooled.
    A quiet channel that is scaled up to the others' range may not stay quiet on data that calibration has not seen
    (benchmarks/methods.py: on 16 small samples the plain formula is worse than no smoothing, this one is better).
    """
    w, amax = column_amax(weights), stats.amax
    x = torch.where(amax == 0, amax, amax.clamp_min(amax.mean()))
    made = [(alpha, _smoothquant(x, w, alpha, scale_min)) for alpha in alphas]
    return _search(stats, weights, act, quantizer, made, settle)


@torch.no_grad()
def awq(
    stats: InputStatistics,
    weights: Sequence[Tensor],
    act: QConfig,
    quantizer: Quantizer,
    *,
    ratios: Sequence[float] = RATIOS,
    settle: Quantizer | None = None,
) -> Found:
    """AWQ v2 as in LLMC: s = mean|x|^r, normalized, r of least output error, or s = 1.

    Needs kept rows and the mean (else ValueError). LLMC compares inside its loop over samples, so its first sample
    decides; here the error is summed first.
    """
    made = [(ratio, _awq(stats.mean, ratio)) for ratio in ratios]
    return _search(stats, weights, act, quantizer, made, settle)


def _search(
    stats: InputStatistics,
    weights: Sequence[Tensor],
    act: QConfig,
    quantizer: Quantizer,
    made: list[tuple[float, Tensor]],
    settle: Quantizer | None,
) -> Found:
    if not len(stats.rows):
        raise ValueError("a smoothing search needs kept input rows, and there are none")
    ones = torch.ones_like(stats.amax)
    candidates: list[tuple[float | None, Tensor]] = [(None, ones)]
    candidates += [(choice, s if settle is None else settle(s)) for choice, s in made]
    candidates = [(choice, s) for choice, s in candidates if bool(torch.isfinite(s).all())]
    losses, norm = output_losses(stats, weights, act, quantizer, [s for _, s in candidates])
    # The first of equals, so s = 1 before all others. A loss that is not a number never wins.
    best = min(range(len(losses)), key=lambda i: losses[i] if losses[i] == losses[i] else float("inf"))
    choice, s = candidates[best]
    return Found(s, choice, losses[best] / norm if norm else 0.0, losses[0] / norm if norm else 0.0)


@torch.no_grad()
def output_losses(
    stats: InputStatistics, weights: Sequence[Tensor], act: QConfig, quantizer: Quantizer, candidates: Sequence[Tensor]
) -> tuple[list[float], float]:
    """Squared error of the outputs, summed over kept rows and weights, for each s; and the squared outputs.

    Candidates inside, tiles of weight rows outside: the float output is computed once, and no full matrix is copied.
    """
    x = stats.rows.float()
    ranges = [static_input(stats, act, s) if act.scope == "per_tensor" and act.dtype != "float" else None
              for s in candidates]  # fmt: skip
    losses, norm = [0.0] * len(candidates), 0.0
    step = max(1, TILE_BYTES // (4 * x.shape[1]))
    for weight in weights:
        for part in weight.split(step):
            w = part.float()
            y = x @ w.T
            norm += float(torch.linalg.vector_norm(y)) ** 2
            for i, s in enumerate(candidates):
                made = fake_quantize(x / s, act, ranges[i]) @ quantizer(w * s).T
                losses[i] += float(torch.linalg.vector_norm(made.sub_(y))) ** 2
    return losses, norm


@torch.no_grad()
def exact(s: Tensor) -> Tensor:
    """The fp32 vector next to s > 0 whose reciprocals are bf16 numbers m, so that a runtime may keep 1 / s in bf16.

    Computed in fp32, 1 / result is m but for the last bit (for some m no fp32 s gives it), and rounds to m in bf16.
    Values beyond 2^±100 are cut to that.
    """
    one = torch.ones_like(s, dtype=torch.float32)
    return one / (one / s.float().clamp(S_LEAST, S_MOST)).bfloat16().float()


@torch.no_grad()
def exact_for_norm(s: Tensor, norm_weight: Tensor) -> Tensor:
    """The fp32 vector next to s for which (w / s).to(w.dtype), the folded norm weight, loses nothing.

    t = (w / s).to(dtype), s' = w / t: dividing by s' and rounding gives t again, and the layer's weight is multiplied
    by what the norm really divides by. Where t is not finite, or 0 with w != 0, s' = 1, for which t = w. Where w is 0,
    t is 0 for any s, which stays. In fp32 s stays: t is off by 2^-24 at most, and w / t would be rounded as well.
    """
    s = s.float()
    if norm_weight.dtype == torch.float32:
        return s
    w = norm_weight.float()
    t = (w / s).to(norm_weight.dtype).float()
    made = w / t
    fits = torch.isfinite(t) & (t != 0) & torch.isfinite(made) & (made > 0)
    # Near the end of the range w / t itself may round to what folds into a neighbour of t.
    fits &= (w / made).to(norm_weight.dtype).float() == t
    return torch.where(w == 0, s, torch.where(fits, made, torch.ones_like(s)))
