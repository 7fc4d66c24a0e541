"""Symmetric int8 weights, one scale per output channel (or one for the whole matrix).

    s = amax(|row|) / 127        q = round_half_even(w / s)

True division, as in msModelSlim and LightX2V (multiplying by the reciprocal differs in 5e-7 of the codes). A large
matrix goes through in tiles of rows that stay in the processor's cache, with `out=` everywhere: on a CPU fresh
temporaries cost more than the arithmetic. A row's result does not depend on its tile; nor, with `minmax`, on the device
(`mse` compares sums, whose last bit may differ from device to device).

With smoothing the same is done to W · columns / rows, made tile by tile; errors are always those of the weight itself.
With `ext` key `convrot` (ComfyUI's ConvRot, `rotation.rotate`) to that, in fp32, rotated in groups of so many columns.

torchao's own arithmetic, on the weight (smoothed: the product) cast to bf16, after torchao `quantize_affine`:

    s = max(amax / 127.5, 2^-23), in bf16        q = clamp(round_half_even(w · (1 / s)), -128, 127), in fp32

Beside the codes it holds two tiles of fp32 rows (CPU_TILE_BYTES or DEVICE_TILE_BYTES each), with ConvRot five (smaller
ones on an accelerator, `tile_rows`), with GPTQ what `gptq` says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from streamq.device import kernels
from streamq.dtypes import TORCH_DTYPES
from streamq.methods.activation import static_input
from streamq.methods.gptq import gptq
from streamq.methods.report import relative_and_cosine
from streamq.methods.rotation import rotate, unrotate
from streamq.methods.statistics import InputStatistics
from streamq.quantized import QuantizedLinear, Rule, Scheme

QMAX = 127
TORCHAO_QMAX = 127.5  # half of the 255 steps from -128 to 127
TORCHAO_FLOOR = 2.0**-23  # least scale
CPU_TILE_BYTES = 5 << 19  # 2.5 MiB of fp32: 128 rows of 5120; larger tiles fall out of the cache
DEVICE_TILE_BYTES = 64 << 20
# Shares of a row's amax that the `mse` method tries as its clipping point.
MSE_RATIOS = tuple(1 - i / 100 for i in range(0, 61))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "torchao": torch.bfloat16}  # by arithmetic; source: its own


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
    ranges: RowRanges | None = None,
) -> QuantizedLinear:
    """Quantize a weight [out, in] of any float dtype. `out`: int8 [out, in] to be filled, else a new tensor.

    ranges: of this weight, where other schemes are made of it too; the result is the same.
    columns [in], rows [out], fp32: the weight's columns are multiplied, its rows and the bias divided by them first, in
    fp32 whatever the rule says (what follows too, but for torchao's); the bias then is fp32. stats: of the unsmoothed
    input; needed for a per_tensor activation and for method `gptq`, else ValueError, as for gptq with ConvRot. A Gram
    matrix that GPTQ cannot factorize gives plainly rounded codes and a RuntimeWarning. A row that holds NaN or Inf gets
    a scale that is not finite; the caller looks.
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
    job = Job(weight, scheme, out, columns, rows, ranges)
    if config.method == "gptq":
        if stats is None or stats.gram is None:
            raise ValueError("gptq needs the Gram matrix of the layer's input")
        if job.work.rotation:
            raise ValueError("gptq of a rotated weight: its Gram matrix is not rotated")
        job.round_gptq(stats.gram, dict(config.ext))
    else:
        job.round()
    rel_error, cosine = job.errors()
    return QuantizedLinear(scheme, job.codes, job.scales, bias, weight.dtype, rel_error, cosine, columns, rows, static,
                           rotation=job.work.rotation)  # fmt: skip


def tile_rows(width: int, device: torch.device, tiles: int = 2) -> int:
    """Rows of fp32 that make a tile, of which a method holds so many; on an accelerator they take two's memory."""
    size = CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES * 2 // max(2, tiles)
    return max(1, size // (4 * width))


class Job:
    """One matrix on its way: what is filled in tile by tile, and the scratch memory for that."""

    TILES = 2

    def __init__(
        self, weight: Tensor, scheme: Scheme, out: Tensor | None, columns: Tensor | None, rows: Tensor | None,
        ranges: RowRanges | None,
    ) -> None:  # fmt: skip
        count, width = weight.shape
        device = weight.device
        self.weight, self.rule, self.config = weight, scheme.rule, scheme.pair.weight
        self.torchao = self.rule.arithmetic == "torchao"
        self.codes = torch.empty(count, width, dtype=torch.int8, device=device) if out is None else out
        self.scales = torch.empty(count, 1, dtype=torch.float32, device=device)
        # Row norms: of the error, of the weight, and of what it became.
        self.lost = torch.empty(count, dtype=torch.float32, device=device)
        self.norm, self.made = torch.empty_like(self.lost), torch.empty_like(self.lost)
        rotation = int(dict(self.config.ext).get("convrot", 0))
        self.step = tile_rows(width, device, self.TILES + 3 * (rotation > 0))
        dtype = _DTYPES.get(self.rule.arithmetic, weight.dtype)
        if not self.torchao and (columns is not None or rows is not None or rotation):
            self.rule, dtype = replace(self.rule, arithmetic="fp32"), torch.float32
        rows = None if rows is None else rows.unsqueeze(1)
        self.work = Tile(min(self.step, count), width, dtype, device, columns, rows, rotation)
        self.ranges = None if self.work.scaled or self.config.scope == "per_tensor" else ranges

    def parts(self) -> list[slice]:
        count = self.weight.shape[0]
        return [slice(start, min(start + self.step, count)) for start in range(0, count, self.step)]

    def round(self, method: str = "") -> None:
        """Fill scales, codes and norms; by `method`, or the recipe's."""
        work, weight = self.work, self.weight
        mse = (method or self.config.method) == "mse"
        whole = self.whole(mse) if self.config.scope == "per_tensor" else None
        for part in self.parts():
            w = work.cast(weight, part)
            fused = None if mse or whole is not None else self.kernel(w, part)
            if fused is not None:
                self.measure(fused(w, self.codes[part], self.scales[part]), part, w)
                continue
            if whole is not None:
                amax = whole.expand(w.shape[0], 1)
            else:
                amax = work.row_amax(w) if self.ranges is None else self.ranges.amax_of(part, work)
            if mse and whole is None:
                amax = _mse_amax(w, amax, self)
            scale = self.scale(amax)
            q = self.values(w, scale, mse)
            self.codes[part].copy_(q)
            self.scales[part].copy_(scale)
            self.measure(q, part, w)

    def kernel(self, w: Tensor, part: slice) -> Callable[..., Tensor] | None:
        """What stands in for `plain` on this device; None: nothing does."""
        how = self.told() if kernels.possible(w) and self.codes.is_contiguous() else None
        if how is None:
            return None
        found = kernels.chosen("rows", self.plain, w, self.codes[part], self.scales[part], values=self.work.q, **how)
        if found is not None and self.ranges is not None:
            self.ranges.amax_of(part, self.work)  # the norms are asked for later
        return found

    def told(self) -> dict[str, Any] | None:
        """What the kernel needs to know; None for arithmetic that it has not."""
        rule = self.rule
        known = rule.arithmetic == "fp32" and rule.scale_dtype in ("F32", "BF16")
        if not known or rule.amax_floor <= 0 and rule.scale_floor <= 0:  # codes of a scale of 0 differ between devices
            return None
        return {"e4m3": False, "amax_floor": rule.amax_floor, "scale_floor": rule.scale_floor,
                "bf16_scale": rule.scale_dtype == "BF16", "qmin": float(rule.qmin)}  # fmt: skip

    def plain(self, w: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """A tile by rows, as `round` does it; its values, in scratch memory."""
        scale = self.scale(self.work.row_amax(w))
        q = self.values(w, scale, False)
        codes.copy_(q)
        scales.copy_(scale)
        return q

    def scale(self, amax: Tensor) -> Tensor:
        """[rows, 1] amax -> the scale, in amax's dtype, rounded to what the runtime will keep of it."""
        if self.torchao:
            return stored_scale(amax, replace(self.rule, scale_floor=TORCHAO_FLOOR), TORCHAO_QMAX)
        return stored_scale(amax, self.rule, QMAX)

    def values(self, w: Tensor, scale: Tensor, clip: bool) -> Tensor:
        """Whole numbers of a tile, in scratch memory; `clip`: the scale may be less than amax / 127."""
        rule, count = self.rule, w.shape[0]
        if self.torchao:
            wide = self.work.wide[:count].copy_(w)
            return wide.mul_(scale.float().reciprocal_()).round_().clamp_(-128, QMAX)
        q = torch.div(w, scale, out=self.work.q[:count]).round_()
        # In fp32, with a scale that is amax / 127 and no less, |w / s| stays below 127.5 by construction.
        clips = clip or rule.arithmetic != "fp32" or rule.scale_dtype != "F32"
        return q.clamp_(rule.qmin, QMAX) if clips else q

    def whole(self, mse: bool) -> Tensor:
        """[1, 1] amax, or clipping point, of the whole matrix; NaN if any element is."""
        work, parts = self.work, self.parts()
        if work.scaled:
            highs = [work.row_amax(work.cast(self.weight, part)).amax() for part in parts]
            amax = torch.stack(highs).amax().reshape(1, 1)
        else:
            amax = _amax(self.weight, self.step).to(work.dtype)  # rounding keeps the order
        return _mse_whole(self, amax) if mse else amax

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
        changed = self.work.undoes or self.rule.arithmetic in ("bf16", "torchao")
        original = self.weight[part] if changed else w
        norm = None if self.ranges is None else self.ranges.norm_of(part)
        self.work.errors(q, self.scales[part], original, part, self.lost, self.norm, self.made, norm)

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


class Tile:
    """Scratch memory for a tile of rows, allocated once a matrix; and the vectors that scale it."""

    def __init__(
        self,
        count: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        columns: Tensor | None = None,
        rows: Tensor | None = None,
        rotation: int = 0,
    ) -> None:
        self.dtype, self.columns, self.rows, self.rotation = dtype, columns, rows, rotation
        smoothed = columns is not None or rows is not None
        self.scaled = smoothed or rotation > 0
        # For errors a rotation alone need not be taken back: it leaves every norm as it is.
        self.undoes = smoothed or rotation > 0 and dtype != torch.float32
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
        w = self.w[: rows.shape[0]]
        if self.scaled and self.dtype != torch.float32:
            return w.copy_(self.scale(self.wide[: rows.shape[0]].copy_(rows), part))
        return self.scale(w.copy_(rows), part)

    def whole(self, weight: Tensor) -> Tensor:
        """All of it, as fp32."""
        return self.scale(weight.to(torch.float32, copy=self.scaled), slice(None))

    def scale(self, w: Tensor, part: slice) -> Tensor:
        if self.columns is not None:
            w.mul_(self.columns)
        if self.rows is not None:
            w.div_(self.rows[part])
        return w.copy_(rotate(w, self.rotation)) if self.rotation else w

    def undone(self, w: Tensor, part: slice) -> Tensor:
        """`scale` taken back, in place, in w's dtype and on its device."""
        if self.rotation:
            w.copy_(unrotate(w, self.rotation))
        if self.columns is not None:
            w.div_(self.columns.to(w))
        return w if self.rows is None else w.mul_(self.rows[part].to(w))

    def row_amax(self, w: Tensor) -> Tensor:
        high, low = self.high[: w.shape[0]], self.low[: w.shape[0]]
        torch.amax(w, dim=1, keepdim=True, out=high)
        torch.amin(w, dim=1, keepdim=True, out=low)
        return torch.maximum(high, low.neg_(), out=high)

    def errors(
        self, q: Tensor, scale: Tensor, w: Tensor, part: slice, lost: Tensor, norm: Tensor, made: Tensor | None = None,
        known: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Row norms of w - q·s (smoothing undone), w and q·s, in fp32, into [part] of the three. Overwrites q.

        known: those of w [part], where somebody has them already.
        """
        wide = self.wide[: q.shape[0]]
        if wide.data_ptr() != q.data_ptr():
            wide.copy_(q)
        wide.mul_(scale)
        if made is not None:
            torch.linalg.vector_norm(self.undone(wide, part) if self.undoes else wide, dim=1, out=made[part])
        torch.linalg.vector_norm(wide.sub_(w), dim=1, out=lost[part])
        if known is not None:
            norm[part] = known
            return
        if w.dtype != torch.float32:
            w = wide.copy_(w)
        torch.linalg.vector_norm(w, dim=1, out=norm[part])


class RowRanges:
    """max |row| and norm of every row of a weight [out, in], for several schemes that are made of it at once.

    Those of a tile are worked out by the first that asks, while the others wait: the very numbers that each would find.
    """

    def __init__(self, weight: Tensor) -> None:
        count, device = weight.shape[0], weight.device
        self._weight = weight
        self._amax = torch.empty(count, 1, dtype=weight.dtype, device=device)
        self._norm = torch.empty(count, dtype=torch.float32, device=device)
        self._known: set[tuple[int, int]] = set()
        self._lock = Lock()

    def amax_of(self, part: slice, work: Tile) -> Tensor:
        """[rows, 1] in work's dtype, to be changed at will. Rounding keeps the order: it may come after the search."""
        with self._lock:
            if (part.start, part.stop) not in self._known:
                rows = self._weight[part]
                torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True), out=self._amax[part])
                wide = rows if rows.dtype == torch.float32 else work.wide[: rows.shape[0]].copy_(rows)
                torch.linalg.vector_norm(wide, dim=1, out=self._norm[part])
                self._known.add((part.start, part.stop))
        return self._amax[part].to(work.dtype, copy=True)

    def norm_of(self, part: slice) -> Tensor:
        """[rows] fp32, of a part whose amax was asked for."""
        return self._norm[part]


def stored_scale(amax: Tensor, rule: Rule, qmax: float) -> Tensor:
    """[rows, 1] amax / qmax, in amax's dtype, rounded to what the runtime will keep of it."""
    # A divisor on the device: CUDA multiplies by the reciprocal of a Python number, which may cost the last bit.
    top = torch.full((), qmax, dtype=amax.dtype, device=amax.device)
    scale = amax.clamp_min(rule.amax_floor).div_(top).clamp_min_(rule.scale_floor)
    kept = TORCH_DTYPES.get(rule.scale_dtype, scale.dtype)
    return scale.to(kept).to(scale.dtype)


def _amax(weight: Tensor, step: int) -> Tensor:
    """|max| of the whole matrix as [1, 1]; NaN if any element is."""
    parts = [torch.maximum(p.amax(), -p.amin()) for p in weight.split(step)]
    return torch.stack(parts).amax().reshape(1, 1)


def _mse_amax(w: Tensor, amax: Tensor, job: Job) -> Tensor:
    """The clipping point per row, of MSE_RATIOS·amax, whose squared error is least; the largest of equals."""
    best = torch.full_like(amax, float("inf"), dtype=torch.float32)
    chosen = amax.clone()
    lost, norm = (torch.empty(w.shape[0], dtype=torch.float32, device=w.device) for _ in range(2))
    for ratio in MSE_RATIOS:
        candidate = amax * ratio
        _try(w, candidate, job, lost, norm)
        better = lost.unsqueeze(1) < best
        best = torch.where(better, lost.unsqueeze(1), best)
        chosen = torch.where(better, candidate, chosen)
    return torch.where(amax.isfinite(), chosen, amax)


def _mse_whole(job: Job, amax: Tensor) -> Tensor:
    """The same for one scale for the whole matrix; amax is [1, 1]."""
    parts, device = job.parts(), job.weight.device
    best, chosen = float("inf"), amax
    lost, norm = (torch.empty(parts[0].stop, dtype=torch.float32, device=device) for _ in range(2))
    for ratio in MSE_RATIOS:
        candidate, total = amax * ratio, 0.0
        for part in parts:
            w, count = job.work.cast(job.weight, part), part.stop - part.start
            _try(w, candidate, job, lost[:count], norm[:count])
            total += float(lost[:count].cpu().double().square().sum())
        if total < best:
            best, chosen = total, candidate
    return chosen


def _try(w: Tensor, amax: Tensor, job: Job, lost: Tensor, norm: Tensor) -> None:
    """Row errors of a tile, clipped at amax ([rows, 1] or [1, 1])."""
    scale = job.scale(amax)
    q = job.values(w, scale, clip=True)
    job.work.errors(q, scale.float(), w, slice(None), lost, norm)


def _options(ext: dict[str, object]) -> dict[str, Any]:
    """GPTQ's own keys of a recipe's `ext`; the recipe has checked their kinds."""
    return {key: ext[key] for key in ("act_order", "damping", "block") if key in ext}
