"""Symmetric int8 weights, one scale per output channel (or one for the whole matrix).

    s = amax(|row|) / 127        q = round_half_even(w / s)

True division, as in msModelSlim and LightX2V (multiplying by the reciprocal differs in 5e-7 of the codes). A large
matrix goes through in tiles of rows that stay in the processor's cache, with `out=` everywhere: on a CPU fresh
temporaries cost more than the arithmetic. A row's result does not depend on its tile; nor, with `minmax`, on the device
(`mse` compares sums, whose last bit may differ from device to device).

With smoothing the same is done to W · columns / rows, made tile by tile; errors are always those of the weight itself.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamq.dtypes import TORCH_DTYPES
from streamq.methods.activation import static_input
from streamq.methods.gptq import gptq
from streamq.methods.report import relative_and_cosine
from streamq.methods.statistics import InputStatistics
from streamq.quantized import QuantizedLinear, Rule, Scheme

QMAX = 127
CPU_TILE_BYTES = 5 << 19  # 2.5 MiB of fp32: 128 rows of 5120; larger tiles fall out of the cache
DEVICE_TILE_BYTES = 64 << 20
# Shares of a row's amax that the `mse` method tries as its clipping point.
MSE_RATIOS = tuple(1 - i / 100 for i in range(0, 61))


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
    """Quantize a weight [out, in] of any float dtype. `out`: int8 [out, in] to be filled, else a new tensor.

    columns [in], rows [out], fp32: the weight's columns are multiplied, its rows and the bias divided by them first, in
    fp32 whatever the rule says; the bias then is fp32. stats: of the unsmoothed input; needed for a per_tensor
    activation and for method `gptq`, else ValueError. A Gram matrix that GPTQ cannot factorize gives plainly rounded
    codes and a RuntimeWarning. A row that holds NaN or Inf gets a scale that is not finite; the caller looks.
    """
    act, config = scheme.pair.act, scheme.pair.weight
    static = None
    if act.scope == "per_tensor" and act.dtype == "int8":
        if stats is None:
            raise ValueError("a per_tensor activation needs statistics of the layer's input")
        static = static_input(stats, act, columns)
    if bias is not None and scheme.rule.arithmetic == "bf16":
        bias = bias.bfloat16()
    if bias is not None and rows is not None:
        bias = bias.float() / rows
    job = _Job(weight, scheme, out, columns, rows)
    if config.method == "gptq":
        if stats is None or stats.gram is None:
            raise ValueError("gptq needs the Gram matrix of the layer's input")
        job.round_gptq(stats.gram, dict(config.ext))
    else:
        job.round()
    rel_error, cosine = job.errors()
    return QuantizedLinear(scheme, job.codes, job.scales, bias, weight.dtype, rel_error, cosine, columns, rows, static)


class _Job:
    """One matrix on its way: what is filled in tile by tile, and the scratch memory for that."""

    def __init__(
        self, weight: Tensor, scheme: Scheme, out: Tensor | None, columns: Tensor | None, rows: Tensor | None
    ) -> None:
        count, width = weight.shape
        device = weight.device
        self.weight, self.rule, self.config = weight, scheme.rule, scheme.pair.weight
        self.codes = torch.empty(count, width, dtype=torch.int8, device=device) if out is None else out
        self.scales = torch.empty(count, 1, dtype=torch.float32, device=device)
        # Row norms: of the error, of the weight, and of what it became.
        self.lost = torch.empty(count, dtype=torch.float32, device=device)
        self.norm, self.made = torch.empty_like(self.lost), torch.empty_like(self.lost)
        self.step = max(1, (CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES) // (4 * width))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(self.rule.arithmetic, weight.dtype)
        if columns is not None or rows is not None:
            self.rule, dtype = replace(self.rule, arithmetic="fp32"), torch.float32
        rows = None if rows is None else rows.unsqueeze(1)
        self.work = _Tile(min(self.step, count), width, dtype, device, columns, rows)

    def parts(self) -> list[slice]:
        count = self.weight.shape[0]
        return [slice(start, min(start + self.step, count)) for start in range(0, count, self.step)]

    def round(self, method: str = "") -> None:
        """Fill scales, codes and norms; by `method`, or the recipe's."""
        rule, work, weight = self.rule, self.work, self.weight
        mse = (method or self.config.method) == "mse"
        # In fp32, with a scale that is amax / 127 and no less, |w / s| stays below 127.5 by construction.
        clips = mse or rule.arithmetic != "fp32" or rule.scale_dtype != "F32"
        whole = self.whole(mse) if self.config.scope == "per_tensor" else None
        for part in self.parts():
            w = work.cast(weight, part)
            amax = work.row_amax(w) if whole is None else whole.expand(w.shape[0], 1)
            if mse and whole is None:
                amax = _mse_amax(w, amax, rule, work)
            scale = _scale(amax, rule)
            q = torch.div(w, scale, out=work.q[: w.shape[0]]).round_()
            if clips:
                q.clamp_(rule.qmin, QMAX)
            self.codes[part].copy_(q)
            self.scales[part].copy_(scale)
            self.measure(q, part, w)

    def whole(self, mse: bool) -> Tensor:
        """[1, 1] amax, or clipping point, of the whole matrix; NaN if any element is."""
        work, parts = self.work, self.parts()
        if work.scaled:
            highs = [work.row_amax(work.cast(self.weight, part)).amax() for part in parts]
            amax = torch.stack(highs).amax().reshape(1, 1)
        else:
            amax = _amax(self.weight, self.step).to(work.dtype)
        return _mse_whole(self.weight, amax, self.rule, work, parts) if mse else amax

    def round_gptq(self, gram: Tensor, ext: dict[str, object]) -> None:
        """Scales as without GPTQ (`ext` key `scales`: minmax or mse), codes by it. Holds the weight in fp32 once."""
        self.round(str(ext.get("scales", "minmax")))
        w = self.work.whole(self.weight)
        if self.work.columns is not None:
            # x / s is what the smoothed weight will see.
            gram = gram / self.work.columns / self.work.columns.unsqueeze(1)
        made = gptq(w, gram, self.scales, qmin=self.rule.qmin, qmax=QMAX, **_options(ext))
        if made.damping is None:
            warnings.warn("the Gram matrix has no factorization: rounded without GPTQ", RuntimeWarning, stacklevel=3)
        assert made.codes is not None  # without a snap of our own
        self.codes.copy_(made.codes)
        for part in self.parts():
            q = self.work.wide[: part.stop - part.start].copy_(self.codes[part])
            self.measure(q, part, self.work.cast(self.weight, part))

    def measure(self, q: Tensor, part: slice, w: Tensor) -> None:
        # The error is against what the source holds, also where it was cast to bf16 or smoothed first.
        original = self.weight[part] if self.work.scaled or self.rule.arithmetic == "bf16" else w
        self.work.errors(q, self.scales[part], original, part, self.lost, self.norm, self.made)

    def errors(self) -> tuple[float, float]:
        """(relative error, cosine) over the whole matrix."""
        if not torch.isfinite(self.lost).all():  # squares beyond fp32: once more, in double
            for part in self.parts():
                # On the host: an accelerator may have no fp64, and this happens to no sane weight.
                w, q, s = (t[part].cpu().double() for t in (self.weight, self.codes, self.scales))
                made = self.work.undone(q * s, part)
                for kept, value in ((self.lost, w - made), (self.norm, w), (self.made, made)):
                    kept[part] = value.norm(dim=1).to(kept.device)
        a, b, lost = (float(t.cpu().double().square().sum()) for t in (self.norm, self.made, self.lost))
        return relative_and_cosine(a, b, lost)


class _Tile:
    """Scratch memory for a tile of rows, allocated once a matrix; and the vectors that scale it."""

    def __init__(
        self,
        count: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        columns: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.dtype, self.columns, self.rows = dtype, columns, rows
        self.scaled = columns is not None or rows is not None
        self.w = torch.empty(count, width, dtype=dtype, device=device)
        self.q = torch.empty(count, width, dtype=dtype, device=device)
        self.wide = self.q if dtype == torch.float32 else torch.empty(count, width, device=device)
        self.high = torch.empty(count, 1, dtype=dtype, device=device)
        self.low = torch.empty(count, 1, dtype=dtype, device=device)

    def cast(self, weight: Tensor, part: slice) -> Tensor:
        """These rows in the working dtype, smoothed: a view where nothing is to be done, else of `w`."""
        rows = weight[part]
        if rows.dtype == self.dtype and not self.scaled:
            return rows
        return self.scale(self.w[: rows.shape[0]].copy_(rows), part)

    def whole(self, weight: Tensor) -> Tensor:
        """All of it, as fp32."""
        return self.scale(weight.to(torch.float32, copy=self.scaled), slice(None))

    def scale(self, w: Tensor, part: slice) -> Tensor:
        if self.columns is not None:
            w.mul_(self.columns)
        return w if self.rows is None else w.div_(self.rows[part])

    def undone(self, w: Tensor, part: slice) -> Tensor:
        """`scale` taken back, in place, in w's dtype and on its device."""
        if self.columns is not None:
            w.div_(self.columns.to(w))
        return w if self.rows is None else w.mul_(self.rows[part].to(w))

    def row_amax(self, w: Tensor) -> Tensor:
        high, low = self.high[: w.shape[0]], self.low[: w.shape[0]]
        torch.amax(w, dim=1, keepdim=True, out=high)
        torch.amin(w, dim=1, keepdim=True, out=low)
        return torch.maximum(high, low.neg_(), out=high)

    def errors(
        self, q: Tensor, scale: Tensor, w: Tensor, part: slice, lost: Tensor, norm: Tensor, made: Tensor | None = None
    ) -> None:
        """Row norms of w - q·s (smoothing undone), w and q·s, in fp32, into [part] of the three. Overwrites q."""
        wide = self.wide[: q.shape[0]]
        if wide.data_ptr() != q.data_ptr():
            wide.copy_(q)
        wide.mul_(scale)
        if made is not None:
            torch.linalg.vector_norm(self.undone(wide, part), dim=1, out=made[part])
        torch.linalg.vector_norm(wide.sub_(w), dim=1, out=lost[part])
        if w.dtype != torch.float32:
            w = wide.copy_(w)
        torch.linalg.vector_norm(w, dim=1, out=norm[part])


def _scale(amax: Tensor, rule: Rule) -> Tensor:
    """[rows, 1] amax -> the scale, in amax's dtype, rounded to what the runtime will keep of it."""
    # A divisor on the device: CUDA multiplies by the reciprocal of a Python number, which may cost the last bit.
    qmax = torch.full((), QMAX, dtype=amax.dtype, device=amax.device)
    scale = amax.clamp_min(rule.amax_floor).div_(qmax).clamp_min_(rule.scale_floor)
    kept = TORCH_DTYPES.get(rule.scale_dtype, scale.dtype)
    return scale.to(kept).to(scale.dtype)


def _amax(weight: Tensor, step: int) -> Tensor:
    """|max| of the whole matrix as [1, 1]; NaN if any element is."""
    parts = [torch.maximum(p.amax(), -p.amin()) for p in weight.split(step)]
    return torch.stack(parts).amax().reshape(1, 1)


def _mse_amax(w: Tensor, amax: Tensor, rule: Rule, work: _Tile) -> Tensor:
    """The clipping point per row, of MSE_RATIOS·amax, whose squared error is least; the largest of equals."""
    best = torch.full_like(amax, float("inf"), dtype=torch.float32)
    chosen = amax.clone()
    lost, norm = (torch.empty(w.shape[0], dtype=torch.float32, device=w.device) for _ in range(2))
    for ratio in MSE_RATIOS:
        candidate = amax * ratio
        _try(w, candidate, rule, work, lost, norm)
        better = lost.unsqueeze(1) < best
        best = torch.where(better, lost.unsqueeze(1), best)
        chosen = torch.where(better, candidate, chosen)
    return torch.where(amax.isfinite(), chosen, amax)


def _mse_whole(weight: Tensor, amax: Tensor, rule: Rule, work: _Tile, parts: list[slice]) -> Tensor:
    """The same for one scale for the whole matrix; amax is [1, 1]."""
    best, chosen = float("inf"), amax
    lost, norm = (torch.empty(parts[0].stop, dtype=torch.float32, device=weight.device) for _ in range(2))
    for ratio in MSE_RATIOS:
        candidate, total = amax * ratio, 0.0
        for part in parts:
            w, count = work.cast(weight, part), part.stop - part.start
            _try(w, candidate, rule, work, lost[:count], norm[:count])
            total += float(lost[:count].cpu().double().square().sum())
        if total < best:
            best, chosen = total, candidate
    return chosen


def _try(w: Tensor, amax: Tensor, rule: Rule, work: _Tile, lost: Tensor, norm: Tensor) -> None:
    """Row errors of a tile, clipped at amax ([rows, 1] or [1, 1])."""
    scale = _scale(amax, rule)
    q = torch.div(w, scale, out=work.q[: w.shape[0]]).round_().clamp_(rule.qmin, QMAX)
    work.errors(q, scale.float(), w, slice(None), lost, norm)


def _options(ext: dict[str, object]) -> dict[str, Any]:
    """GPTQ's own keys of a recipe's `ext`; the recipe has checked their kinds."""
    return {key: ext[key] for key in ("act_order", "damping", "block") if key in ext}
