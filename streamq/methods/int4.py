"""Weights in 4 bits, in groups of 64 columns with a scale and a zero of their own.

Range by min and max (16 codes; symmetric: 15), optionally clipped where the error is least (AWQ's clip search, Lin et
al. 2024, on the weight with the input's mean squares as importance), codes by plain rounding or GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamq.methods.gptq import gptq
from streamq.methods.smooth import RATIOS, _awq

GROUP = 64
TILE_BYTES = 4 << 20  # of fp32 rows: a clip search goes over a tile once a candidate
# Shares of a group's range that the clip search tries.
SHRINK = tuple(1 - i / 20 for i in range(11))


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
    if width % group_size:
        raise ValueError(f"{width} columns are no multiple of the group size {group_size}")
    groups = width // group_size
    if importance is None and gram is not None:
        importance = gram.diagonal()
    share = None if importance is None else importance.float().view(groups, group_size)
    codes = torch.empty(count, width, dtype=torch.int8 if symmetric else torch.uint8, device=weight.device)
    scales = torch.empty(count, groups, device=weight.device)
    zeros = torch.empty_like(scales)
    for part in _parts(count, width):
        w = _scaled(weight[part], columns).unflatten(1, (groups, group_size))
        scale, zero = _clipped(w, symmetric, share) if clip else _fit(w, symmetric, 1.0)
        scales[part], zeros[part] = scale.squeeze(2), zero.squeeze(2)
        if gram is None:
            codes[part] = _codes(w, scale, zero, symmetric).flatten(1).to(codes.dtype)
    made = GroupQuantized(codes, scales, zeros, group_size)
    if gram is not None:
        low, high = _limits(symmetric)
        result = gptq(weight if columns is None else _scaled(weight, columns), gram, scales, zeros,
                      group_size=group_size, qmin=low, qmax=high, act_order=act_order, damping=damping)  # fmt: skip
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
    for part in _parts(*weight.shape):
        w = weight[part].float()
        for i, s in enumerate(candidates):
            made = quantize_groups(w, group_size=group_size, symmetric=symmetric, columns=s).dequantize()
            losses[i] += float(made.div_(s).sub_(w).square_().matmul(share).sum())
    s = candidates[min(range(len(losses)), key=losses.__getitem__)]
    made4 = quantize_groups(weight, group_size=group_size, symmetric=symmetric, clip=clip, columns=s,
                            importance=share / s.square())  # fmt: skip
    return s, made4


def _parts(count: int, width: int) -> list[slice]:
    step = max(1, TILE_BYTES // (4 * width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _scaled(weight: Tensor, columns: Tensor | None) -> Tensor:
    return weight.float() if columns is None else weight.float() * columns


def _limits(symmetric: bool) -> tuple[int, int]:
    return (-7, 7) if symmetric else (0, 15)


def _fit(w: Tensor, symmetric: bool, shrink: float) -> tuple[Tensor, Tensor]:
    """w [n, groups, g] -> scale, zero [n, groups, 1] for a range of `shrink` of each group's own."""
    high, low = w.amax(dim=2, keepdim=True), w.amin(dim=2, keepdim=True)
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


def _codes(w: Tensor, scale: Tensor, zero: Tensor, symmetric: bool) -> Tensor:
    return torch.div(w, scale).add_(zero).round_().clamp_(*_limits(symmetric))


def _clipped(w: Tensor, symmetric: bool, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scale and zero of least squared error in each group, weighted by share [groups, g]; the widest of equals."""
    best: Tensor | None = None
    scale, zero = _fit(w, symmetric, 1.0)
    for shrink in SHRINK:
        tried, offset = _fit(w, symmetric, shrink)
        lost = _codes(w, tried, offset, symmetric).sub_(offset).mul_(tried).sub_(w).square_()
        error = (lost if share is None else lost.mul_(share)).sum(dim=2, keepdim=True)
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    return scale, zero
