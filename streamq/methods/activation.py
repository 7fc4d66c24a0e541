"""Ranges and rounding of activations: what a runtime will do to a layer's input, and what it stores for that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streamq.device import kernels
from streamq.methods.floats import E4M3_TOP, mx_fake_quantize, round_e4m3_
from streamq.methods.statistics import Histogram, InputStatistics
from streamq.pairs import QConfig
from streamq.quantized import QuantizedLinear, StaticInput

EPS = 2.0**-23  # least scale, msModelSlim's
TOKEN_FLOOR = 1e-8  # least scale of a row; keeps a row of zeros from 0 / 0
PERCENTILE = 99.99
# Shares of the range that `mse` tries, eight to an octave, down to 1/64.
MSE_SHARES = tuple(2.0 ** (-i / 8) for i in range(49))
MSE_POINTS = 8  # in each histogram bin: a range clipped to 1/64 has steps narrower than a bin
INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1


@torch.no_grad()
def static_input(stats: InputStatistics, config: QConfig, smooth: Tensor | None = None) -> StaticInput:
    """The fixed int8 range of an input, or of x / smooth ([K] fp32) with statistics of the unsmoothed x.

    minmax: msModelSlim's formula, in fp32. percentile: a share of the values (`ext` key `percentile`, percent) stays
    inside, what is cut off divided evenly between the sides. mse: the clipping of least expected squared error.
    The latter two use the histogram; with `smooth`, one of the kept rows divided by it, as the histogram of all
    channels cannot be divided. Raises ValueError for an unknown method, or statistics that lack what it needs.
    """
    lo, hi = stats.lo, stats.hi
    if smooth is not None:
        lo, hi = (stats.columns_lo / smooth).amin(), (stats.columns_hi / smooth).amax()
    if config.method == "minmax":
        return _range(lo, hi, config.symmetric)
    histogram = _histogram(stats, smooth)
    if config.method == "percentile":
        percent = float(dict(config.ext).get("percentile", PERCENTILE))
        if not 0 < percent <= 100:
            raise ValueError(f"percentile {percent}: above 0, at most 100")
        cut = _percentile(histogram, percent / 100, config.symmetric)
        return _range(torch.maximum(lo, cut[0].to(lo)), torch.minimum(hi, cut[1].to(hi)), config.symmetric)
    if config.method == "mse":
        return _mse(histogram, lo, hi, config.symmetric)
    raise ValueError(f"activation method {config.method!r}; have minmax, percentile, mse")


def _range(lo: Tensor, hi: Tensor, symmetric: bool) -> StaticInput:
    """lo <= 0 <= hi, 0-dim fp32 -> msModelSlim's scale and offset."""
    levels = torch.full((), 127.0 if symmetric else 255.0, device=lo.device)
    if symmetric:
        return StaticInput(float(torch.maximum(-lo, hi).div(levels).clamp_min(EPS)), 0.0)
    scale = hi.div(levels).sub(lo.div(levels)).clamp_min(EPS)
    return StaticInput(float(scale), float(torch.round(-lo / scale) - 128))


def _histogram(stats: InputStatistics, smooth: Tensor | None) -> Histogram:
    if smooth is None:
        if stats.histogram is None:
            raise ValueError("percentile and mse need a histogram of the inputs, which was not wanted")
        return stats.histogram
    if not len(stats.rows):
        raise ValueError("percentile and mse of a smoothed input need kept rows, and there are none")
    rows = stats.rows.float() / smooth
    found = Histogram(rows.device)
    found.add(rows, float(rows.abs().amax()))
    return found


def _percentile(histogram: Histogram, share: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(lo, hi) fp64: outer edges of the bins in which the wanted share of all values is reached."""
    counts, edges = histogram.counts.cpu(), histogram.edges()
    half = len(counts) // 2
    total = int(counts.sum())
    if symmetric:
        folded = (counts[half:] + counts[:half].flip(0)).cumsum(0)
        high = edges[half + 1 :][int(torch.searchsorted(folded, share * total).clamp_max(half - 1))]
        return -high, high
    tail = (1 - share) / 2 * total
    above = counts.cumsum(0)
    below = above - counts  # values under each bin's lower edge
    lowest = int((below <= tail).nonzero().max())
    highest = int((total - above <= tail).nonzero().min())
    return edges[lowest].clamp_max(0), edges[highest + 1].clamp_min(0)


def _mse(histogram: Histogram, lo: Tensor, hi: Tensor, symmetric: bool) -> StaticInput:
    """Try shares of the whole range; then, if asymmetric, of each side by itself. Values are even within a bin."""
    counts, edges = histogram.counts.cpu().double(), histogram.edges()
    width = edges[1] - edges[0]
    used = counts.nonzero().flatten()
    inside = (torch.arange(MSE_POINTS, dtype=torch.float64) + 0.5) / MSE_POINTS
    points = (edges[used].unsqueeze(1) + width * inside).flatten()
    weights = (counts[used] / MSE_POINTS).repeat_interleave(MSE_POINTS)

    def error(static: StaticInput) -> float:
        q = torch.round(points / static.scale).add_(static.offset).clamp_(-128, 127)
        return float((q.sub_(static.offset).mul_(static.scale).sub_(points).square_() * weights).sum())

    def clipped(low: float, high: float) -> StaticInput:
        return _range(lo * low, hi * high, symmetric)

    # min() keeps the first of equals: the widest.
    low = high = min(MSE_SHARES, key=lambda share: error(clipped(share, share)))
    if not symmetric:
        low = min(MSE_SHARES, key=lambda share: error(clipped(share, high)))
        high = min(MSE_SHARES, key=lambda share: error(clipped(low, share)))
    return clipped(low, high)


@torch.no_grad()
def fake_quantize(x: Tensor, config: QConfig, static: StaticInput | None = None) -> Tensor:
    """What the runtime's rounding leaves of x [..., K] fp32, as a new tensor (float: x itself).

    int8 per_token: scale amax(row) / 127. int8 per_tensor: by `static`. fp8_e4m3 per_token: scale amax(row) / 448,
    halves to even. mxfp8, mxfp4 per_block: `floats.mx_fake_quantize`. Raises ValueError for anything else (4 bits in
    groups: `fourbit.fake_quantize_input`), without `static`, and for columns that are not whole blocks.
    """
    codes, factor = quantize_input(x, config, static)
    return codes if factor is None else codes.mul_(factor)


@torch.no_grad()
def quantize_input(x: Tensor, config: QConfig, static: StaticInput | None = None) -> tuple[Tensor, Tensor | None]:
    """x [..., K] fp32 as codes' values and what they are multiples of: [..., 1], or 0-dim if static.

    A static input's whole numbers come less their offset. Float: x itself, and None; in blocks: what is left of x, and
    None. Raises ValueError as `fake_quantize` does.
    """
    if config.dtype == "float":
        return x, None
    if (config.dtype, config.scope) == ("int8", "per_token"):
        return _tokens(_int8_tokens, x, e4m3=False)
    if (config.dtype, config.scope) == ("fp8_e4m3", "per_token"):
        return _tokens(_fp8_tokens, x, e4m3=True)
    if config.dtype in ("mxfp8", "mxfp4") and config.scope == "per_block":
        return mx_fake_quantize(x, config.dtype), None
    if (config.dtype, config.scope) == ("int8", "per_tensor"):
        if static is None:
            raise ValueError("a per_tensor input needs its static range")
        # The runtime rounds x / scale, then adds the whole-numbered offset.
        scale = torch.full((), static.scale, device=x.device)
        q = torch.div(x, scale).round_().add_(static.offset).clamp_(-128, 127)
        return q.sub_(static.offset), scale
    raise ValueError(f"activations {config.dtype} {config.scope}: no such rounding")


def _tokens(reference: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, *, e4m3: bool) -> tuple[Tensor, Tensor]:
    kernel = kernels.chosen("tokens", reference, kernels.by_rows(x), e4m3=e4m3, floor=TOKEN_FLOOR)
    return (kernel or reference)(x)


def _int8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = _token_scale(x, 127)
    return torch.div(x, scale).round_().clamp_(-128, 127), scale


def _fp8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = _token_scale(x, E4M3_TOP)
    return round_e4m3_(torch.div(x, scale)), scale


def _token_scale(x: Tensor, top: float) -> Tensor:
    """[..., 1]: largest magnitude along the last dimension, over top."""
    amax = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
    return amax.div_(torch.full((), top, device=x.device)).clamp_min_(TOKEN_FLOOR)


@torch.no_grad()
def static_tensors(layer: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """MindIE's static W8A8 tensors: input_scale [1], input_offset [1], deq_scale [out] fp32, quant_bias [out] int32.

    msModelSlim's formula: deq_scale = input_scale · scale, quant_bias = round(bias / deq_scale - rowsum(q) · offset),
    in fp32. A bias that is huge against its scale is cut to int32; the last item says how many were.
    Raises ValueError if the layer has no static range.
    """
    if layer.static is None:
        raise ValueError("the layer has no static input range")
    device = layer.codes.device
    scale = torch.tensor([layer.static.scale], device=device)
    offset = torch.tensor([layer.static.offset], device=device)
    deq = scale * layer.scales.flatten()
    whole, saturated = static_bias(layer.bias, layer.codes, deq, layer.static.offset)
    return scale, offset, deq, whole, saturated


@torch.no_grad()
def static_bias(bias: Tensor | None, codes: Tensor, deq: Tensor, offset: float) -> tuple[Tensor, int]:
    """quant_bias [out] int32 of `static_tensors`, and how many of its elements were cut to int32."""
    summed = codes.sum(dim=1, dtype=torch.int64).float() * offset
    bias = torch.zeros_like(deq) if bias is None else bias.float()
    # A zero row may have a scale so small that deq is 0; its bias of 0 must not become NaN.
    whole = torch.where(bias == 0, bias, bias / deq).sub_(summed).round_()
    # 2^31 - 1 is no fp32 number: saturate in int64, from where fp32 still converts.
    wide = whole.clamp(-(2.0**40), 2.0**40).long()
    kept = wide.clamp(INT32_MIN, INT32_MAX)
    return kept.int(), int((wide != kept).sum())
