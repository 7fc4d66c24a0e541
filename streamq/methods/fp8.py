"""FP8 weights, e4m3 (float8_e4m3fn), one scale per output channel (or one for the whole matrix).

    s = amax(|row|) / 448        q = e4m3(clamp(w / s, -448, 448)), halves to even

The default is in fp32, with what the rule does to the scale first. Arithmetic "source" with halves "away" is that of
LightX2V's converter (qtorch's rounding): every operation in the checkpoint's own dtype, then, in fp32,

    a = |x|        u = 2^(max(floor(log2 a), -6) - 3)        q = sign(x) · floor(a / u + 0.5) · u, no negative zero

torchao's: the weight (smoothed: the product) cast to bf16, s = bf16(amax / 448), then in fp32 as the default. A row of
zeros has a scale above 0 whatever the rule: torchao and LightX2V (fp16) would divide by 0, which gives NaN.

Tiles, smoothing vectors and errors are those of `int8`; beside the codes it holds three tiles of fp32 rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamq.methods import int8
from streamq.methods.floats import E4M3_TOP, round_e4m3_
from streamq.methods.statistics import InputStatistics
from streamq.quantized import QuantizedLinear, Scheme

ZERO_SCALE = 2.0**-23  # of a row whose scale came out as 0


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
    ranges: int8.RowRanges | None = None,
) -> QuantizedLinear:
    """Quantize a weight [out, in] of any float dtype. `out`: int8 [out, in] to be filled, else a new tensor.

    The codes are float8_e4m3fn, a view of `out`. columns, rows, ranges: as in `int8.quantize`. A row that holds NaN or
    Inf gets a scale that is not finite; the caller looks. Inputs are not looked at.
    """
    if bias is not None and scheme.rule.arithmetic == "bf16":
        bias = bias.bfloat16()
    if bias is not None and rows is not None:
        bias = bias.float() / rows
    job = _Job(weight, scheme, out, columns, rows, ranges)
    job.round("minmax")
    rel_error, cosine = job.errors()
    return QuantizedLinear(scheme, job.codes, job.scales, bias, weight.dtype, rel_error, cosine, columns, rows)


class _Job(int8.Job):
    """An int8 matrix's way, with other codes."""

    TILES = 3

    def __init__(
        self, weight: Tensor, scheme: Scheme, out: Tensor | None, columns: Tensor | None, rows: Tensor | None,
        ranges: int8.RowRanges | None,
    ) -> None:  # fmt: skip
        super().__init__(weight, scheme, out, columns, rows, ranges)
        self.codes = self.codes.view(torch.float8_e4m3fn)
        self.scratch = torch.empty(self.work.wide.shape, device=weight.device)

    def told(self) -> dict[str, Any] | None:
        """See `int8.Job`."""
        rule = self.rule
        if rule.arithmetic != "fp32" or rule.scale_dtype not in ("F32", "BF16") or rule.fp8_halves != "even":
            return None
        return {"e4m3": True, "amax_floor": rule.amax_floor, "scale_floor": rule.scale_floor,
                "zero_scale": ZERO_SCALE, "bf16_scale": rule.scale_dtype == "BF16"}  # fmt: skip

    def scale(self, amax: Tensor) -> Tensor:
        """[rows, 1] amax -> the scale, in amax's dtype, above 0."""
        scale = int8.stored_scale(amax, self.rule, E4M3_TOP)
        return torch.where(scale == 0, torch.full_like(scale, ZERO_SCALE), scale)

    def values(self, w: Tensor, scale: Tensor, clip: bool) -> Tensor:
        """e4m3 values of a tile as fp32, in scratch memory."""
        work, count = self.work, w.shape[0]
        wide = work.wide[:count]
        if self.torchao:
            torch.div(wide.copy_(w), scale.float(), out=wide)
        elif wide.dtype == w.dtype:
            torch.div(w, scale, out=wide)
        else:
            wide.copy_(torch.div(w, scale, out=work.q[:count]))
        away = self.rule.fp8_halves == "away"
        round_e4m3_(wide, away=away, scratch=self.scratch[:count])
        return wide.add_(0.0) if away else wide
