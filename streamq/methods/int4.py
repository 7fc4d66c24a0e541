"""Weights in 4 bits, in groups of 64 columns with a scale and a zero of their own.

Range by min and max (16 codes; symmetric: 15), optionally clipped where the error is least (AWQ's clip search, Lin et
al. 2024, arXiv 2306.00978, on the weight with the input's mean squares as importance), codes by plain rounding or GPTQ.

`quantize` makes what Nunchaku's w4a16 kernels read, W ≈ codes · scale + zero: scale and zero are bf16 numbers, and
codes are made for these, so that both roundings are made up for. Its search moves each end of a range by itself, then
fits scale and zero to the codes by least squares, as long as that lowers the error. A row's result does not depend on
its tile. On the way, zeros are in codes, as in GPTQ: W ≈ (codes - offset) · scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from streamq.device import kernels
from streamq.methods.fourbit import HALF
from streamq.methods.gptq import gptq
from streamq.methods.report import weight_error
from streamq.methods.smooth import RATIOS, _awq
from streamq.methods.statistics import TILE_ROWS, InputStatistics
from streamq.quantized import QuantizedLinear, Scheme

GROUP = 64
# Of fp32 rows: a clip search goes over a tile many times for each candidate, on a CPU in its cache.
TILE_BYTES = 4 << 20
DEVICE_TILE_BYTES = 64 << 20
# Shares of a group's range that the clip search of `quantize_groups` tries, about the middle.
SHRINK = tuple(1 - i / 20 for i in range(11))
# Shares of a group's range by which `quantize` tries to move either end inwards.
ENDS = (0.0, -0.04, 0.04, 0.08, 0.12, 0.16)
REFITS = 3
# Of the mean importance, added to each column's: other prompts than those calibrated on use other columns.
LEAST_IMPORTANCE = 0.5
MOST_STEP = 2.0**124  # 15 of them are still an fp32 number
_FRACTION = 0xFFFF  # bits of a float32 that a bfloat16 lacks

Fit = tuple[Tensor, Tensor, Tensor]  # error, scale, offset of each group, [n, groups, 1]


@torch.no_grad()
def quantize(
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    out: Tensor | None = None,
    *,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    stats: InputStatistics | None = None,
) -> QuantizedLinear:
    """Quantize a weight [out, in] of any float dtype as type w4a16. `out`: int8 [out, in] to be filled.

    By `scheme.pair.weight.method`: minmax; mse, the range of least squared error in each group, columns weighted by
    their mean x² over the kept rows (`ext` key `weighted`, default True); gptq, with ranges by `ext` key `scales`
    (minmax or mse, the default, weighted by the Gram matrix's diagonal) and GPTQ's own keys.
    A Gram matrix that GPTQ cannot factorize gives plainly rounded codes and a RuntimeWarning. Scales are above 0
    wherever the weight is finite; a group that holds NaN or Inf gets a scale or zero that is not.
    Raises ValueError for an unknown method, columns that are no multiple of 64, vectors to smooth by (the format has
    none), and statistics that lack what the method needs.
    """
    if columns is not None or rows is not None:
        raise ValueError("w4a16 has no smoothing vectors")
    count, width = weight.shape
    groups = _groups(width, GROUP)
    ext = dict(scheme.pair.weight.ext)
    gram = _gram(scheme, stats)
    method = scheme.pair.weight.method if gram is None else ext.get("scales", "mse")
    share = torch.ones(groups, GROUP, device=weight.device)
    if method == "mse" and ext.get("weighted", True):
        share = _importance(gram, stats).view(groups, GROUP)
    codes = torch.empty(count, width, dtype=torch.int8, device=weight.device) if out is None else out
    scales, offsets = (torch.empty(count, groups, device=weight.device) for _ in range(2))
    for part in _parts(weight):
        w = weight[part].float().unflatten(1, (groups, GROUP))
        scale, offset = _searched(w, share) if method == "mse" else _stored(*_ends(w))
        scales[part], offsets[part] = scale.squeeze(2), offset.squeeze(2)
        if gram is None:
            codes[part] = _codes(w, scale, offset).flatten(1).to(torch.int8)
    if gram is not None:
        options: dict[str, Any] = {key: ext[key] for key in ("act_order", "damping", "block") if key in ext}
        made = gptq(weight, gram, scales, offsets, group_size=GROUP, qmin=0, qmax=15, **options)
        if made.damping is None:
            warnings.warn("the Gram matrix has no factorization: rounded without GPTQ", RuntimeWarning, stacklevel=2)
        assert made.codes is not None
        codes.copy_(made.codes)
    # Offsets were made from bf16 zeros: rounding finds exactly these again.
    zeros = (-offsets * scales).to(HALF).float()
    layer = QuantizedLinear(scheme, codes, scales, bias, weight.dtype, 0.0, zeros=zeros)
    layer.rel_error, layer.cosine = weight_error(weight, layer)
    return layer


def _gram(scheme: Scheme, stats: InputStatistics | None) -> Tensor | None:
    """What GPTQ needs, None for the other methods."""
    method = scheme.pair.weight.method
    if method not in ("minmax", "mse", "gptq"):
        raise ValueError(f"w4a16 weight method {method!r}; have minmax, mse, gptq")
    if method != "gptq":
        return None
    if stats is None or stats.gram is None:
        raise ValueError("gptq needs the Gram matrix of the layer's input")
    return stats.gram


def _importance(gram: Tensor | None, stats: InputStatistics | None) -> Tensor:
    """[K] fp32: what a column's squared error counts, 1 on average, none without."""
    if gram is not None:
        squares = gram.diagonal().clone()
    elif stats is not None and len(stats.rows):
        squares = torch.zeros(stats.columns, device=stats.device)
        for tile in stats.rows.split(TILE_ROWS):
            squares += tile.float().square().sum(dim=0)
    else:
        raise ValueError("a weighted mse needs kept rows of the layer's input")
    mean = squares.mean()
    squares.div_(torch.where(mean > 0, mean, torch.ones_like(mean)))
    return squares.add_(LEAST_IMPORTANCE).div_(torch.full((), 1 + LEAST_IMPORTANCE, device=squares.device))


def _searched(w: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of least squared error in each group, weighted by share [groups, g]."""
    low, high = _ends(w)
    span = (high - low).clamp_max_(torch.finfo(torch.float32).max)  # a share of 0 must be 0
    best: Fit | None = None
    for up, down in product(ENDS, ENDS):  # the range itself first: of equals it stays
        best = _better(best, w, *_stored(low + span * up, high - span * down), share)
    assert best is not None
    for _ in range(REFITS):
        best = _better(best, w, *_refit(w, best[1], best[2], share), share)
    return best[1], best[2]


def _refit(w: Tensor, scale: Tensor, offset: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The line through (code, w) of least weighted squared error; the same again where there is none."""
    codes = _codes(w, scale, offset)
    total = share.sum(dim=1, keepdim=True)
    centre = (codes * share).sum(dim=2, keepdim=True).div_(total)
    middle = (w * share).sum(dim=2, keepdim=True).div_(total)
    codes.sub_(centre)
    slope = (codes * share).mul_(w - middle).sum(dim=2, keepdim=True)
    slope = slope.div_(codes.square_().mul_(share).sum(dim=2, keepdim=True)).to(HALF).float()
    zero = (middle - slope * centre).to(HALF).float()
    fits = (slope > 0) & (slope <= MOST_STEP) & zero.isfinite()  # of one code only: NaN
    return torch.where(fits, slope, scale), torch.where(fits, -zero / slope, offset)


def _stored(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset for codes 0..15 from low to high, fp32; scale, and zero = -offset · scale, are bf16 numbers."""
    # Rounded down: above `low`, the zero of a group far from 0 would leave most of it outside.
    bits = low.view(torch.int32)
    zero = torch.where(bits < 0, bits + _FRACTION, bits).bitwise_and_(~_FRACTION).view(torch.float32)
    zero = torch.where(low.isfinite(), zero.clamp_min_(torch.finfo(HALF).min), low)
    # Halves: the whole difference may be beyond fp32.
    scale = (high * 0.5).sub_(zero * 0.5).div_(torch.full((), 7.5, device=low.device))
    scale = torch.where(high.isfinite(), scale.clamp_max(MOST_STEP), scale).to(HALF).float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, -zero / scale


# --- for studies of what a method is worth: fp32 scales and zeros, symmetric groups, scaled columns ---


@dataclass
class GroupQuantized:
    """W ≈ (codes - zeros) · scales. codes: [N, K], uint8 0..15, symmetric: int8 -7..7.

    scales, zeros: fp32 [N, K / group_size]; a zero is any number, not only a code. damping: what GPTQ took; None
    without it, and where its factorization failed and codes are plainly rounded.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    damping: float | None = None

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        codes = self.codes.float().unflatten(1, (-1, self.group_size))
        return codes.sub_(self.zeros.unsqueeze(2)).mul_(self.scales.unsqueeze(2)).flatten(1)


@torch.no_grad()
def quantize_groups(
    weight: Tensor,
    *,
    group_size: int = GROUP,
    symmetric: bool = False,
    clip: bool = False,
    importance: Tensor | None = None,
    gram: Tensor | None = None,
    act_order: bool = True,
    damping: float = 0.01,
    columns: Tensor | None = None,
) -> GroupQuantized:
    """Quantize weight [N, K] of any float dtype, or its columns times `columns` [K] fp32, in fp32.

    importance: [K] mean x², what the clip search weighs a column's error with (default: the diagonal of `gram`, else
    all alike). gram: [K, K] sum x^T x of the input as the weight sees it (divided by `columns`); makes the codes by
    GPTQ.
    Raises ValueError if K is no multiple of the group size.
    """
    count, width = weight.shape
    groups = _groups(width, group_size)
    if importance is None:
        importance = torch.ones(width, device=weight.device) if gram is None else gram.diagonal()
    share = importance.float().view(groups, group_size)
    codes = torch.empty(count, width, dtype=torch.int8 if symmetric else torch.uint8, device=weight.device)
    scales = torch.empty(count, groups, device=weight.device)
    zeros = torch.empty_like(scales)
    for part in _parts(weight):
        w = _scaled(weight[part], columns).unflatten(1, (groups, group_size))
        best: Fit | None = None
        for shrink in SHRINK if clip else SHRINK[:1]:
            best = _better(best, w, *_fit(w, symmetric, shrink), share, symmetric)
        assert best is not None
        _, scale, zero = best
        scales[part], zeros[part] = scale.squeeze(2), zero.squeeze(2)
        if gram is None:
            codes[part] = _codes(w, scale, zero, symmetric).flatten(1).to(codes.dtype)
    made = GroupQuantized(codes, scales, zeros, group_size)
    if gram is not None:
        low, high = _limits(symmetric)
        result = gptq(weight if columns is None else _scaled(weight, columns), gram, scales, zeros,
                      group_size=group_size, qmin=low, qmax=high, act_order=act_order, damping=damping)  # fmt: skip
        assert result.codes is not None
        made.codes, made.damping = result.codes, result.damping
    return made


@torch.no_grad()
def awq4(
    weight: Tensor,
    mean: Tensor,
    *,
    importance: Tensor | None = None,
    group_size: int = GROUP,
    symmetric: bool = False,
    clip: bool = False,
    ratios: Sequence[float] = RATIOS,
) -> tuple[Tensor, GroupQuantized]:
    """(s [K] fp32, the quantized W · s) for the AWQ ratio of least weight error; s = 1 where none is better.

    mean: [K] mean |x|. importance: [K] mean x² (default: mean²), for the loss sum_k importance_k (Ŵ_k / s_k - W_k)²:
    the expected output error if channels were independent. `clip` only enters the final quantization.
    """
    share = mean.square() if importance is None else importance.float()
    candidates = [torch.ones_like(mean)] + [_awq(mean, ratio) for ratio in ratios]
    losses = [0.0] * len(candidates)
    for part in _parts(weight):
        w = weight[part].float()
        for i, s in enumerate(candidates):
            made = quantize_groups(w, group_size=group_size, symmetric=symmetric, columns=s).dequantize()
            losses[i] += float(made.div_(s).sub_(w).square_().matmul(share).sum())
    s = candidates[min(range(len(losses)), key=losses.__getitem__)]
    made4 = quantize_groups(weight, group_size=group_size, symmetric=symmetric, clip=clip, columns=s,
                            importance=share / s.square())  # fmt: skip
    return s, made4


def _fit(w: Tensor, symmetric: bool, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and offset for a range of `shrink` of each group's own."""
    low, high = _ends(w)
    if symmetric:
        scale = torch.maximum(high, -low).mul_(shrink).div_(torch.full((), 7.0, device=w.device))
        return torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale)
    # About the middle: a group far from 0 keeps its place when its range shrinks.
    middle, half = (high + low).div_(2), (high - low).div_(2).mul_(shrink)
    scale = half.mul(2).div_(torch.full((), 15.0, device=w.device))
    # A group of equal values: its value is code 0 with any zero; |value| as scale makes it exact.
    value = torch.where(low == 0, torch.ones_like(low), low.abs())
    scale = torch.where(scale == 0, value, scale)
    return scale, (half - middle).div_(scale)


def _scaled(weight: Tensor, columns: Tensor | None) -> Tensor:
    return weight.float() if columns is None else weight.float() * columns


# --- what both share ---


def _groups(width: int, size: int) -> int:
    if width % size:
        raise ValueError(f"{width} columns are no multiple of the group size {size}")
    return width // size


def _parts(weight: Tensor) -> Iterator[slice]:
    count, width = weight.shape
    step = max(1, (TILE_BYTES if weight.device.type == "cpu" else DEVICE_TILE_BYTES) // (4 * width))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _limits(symmetric: bool) -> tuple[int, int]:
    return (-7, 7) if symmetric else (0, 15)


def _ends(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [n, groups, g] -> min and max [n, groups, 1]."""
    return w.amin(dim=2, keepdim=True), w.amax(dim=2, keepdim=True)


def _codes(w: Tensor, scale: Tensor, offset: Tensor, symmetric: bool = False) -> Tensor:
    return torch.div(w, scale).add_(offset).round_().clamp_(*_limits(symmetric))


def _better(best: Fit | None, w: Tensor, scale: Tensor, offset: Tensor, share: Tensor, symmetric: bool = False) -> Fit:
    """For each group the scale and offset of less error, weighted by share [groups, g]: the best so far, or these."""
    args = (w, scale, offset, share.unsqueeze(0), symmetric)
    error = (kernels.chosen("lost", _lost, *args) or _lost)(*args).sum(dim=2, keepdim=True)
    if best is None:
        return error, scale, offset
    less = error < best[0]
    return torch.where(less, error, best[0]), torch.where(less, scale, best[1]), torch.where(less, offset, best[2])


def _lost(w: Tensor, scale: Tensor, offset: Tensor, share: Tensor, symmetric: bool) -> Tensor:
    """Squared error of every code's number, times its share."""
    return _codes(w, scale, offset, symmetric).sub_(offset).mul_(scale).sub_(w).square_().mul_(share)
