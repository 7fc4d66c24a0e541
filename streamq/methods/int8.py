"""Symmetric int8 weights, one scale per output channel (or one for the whole matrix).

    s = amax(|row|) / 127        q = round_half_even(w / s)

True division, as in msModelSlim and LightX2V (multiplying by the reciprocal differs in 5e-7 of the codes). A large
matrix goes through in tiles of rows that stay in the processor's cache, with `out=` everywhere: on a CPU fresh
temporaries cost more than the arithmetic. A row's result does not depend on its tile; nor, with `minmax`, on the device
(`mse` compares sums, whose last bit may differ from device to device).
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamq.quantized import Int8Rule, QuantizedLinear, Scheme

QMAX = 127
CPU_TILE_BYTES = 5 << 19  # 2.5 MiB of fp32: 128 rows of 5120; larger tiles fall out of the cache
DEVICE_TILE_BYTES = 64 << 20
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Shares of a row's amax that the `mse` method tries as its clipping point.
MSE_RATIOS = tuple(1 - i / 100 for i in range(0, 61))


@torch.no_grad()
def quantize(weight: Tensor, bias: Tensor | None, scheme: Scheme, out: Tensor | None = None) -> QuantizedLinear:
    """Quantize a weight [out, in] of any float dtype. `out`: int8 [out, in] to be filled, else a new tensor.

    A row that holds NaN or Inf gets a scale that is not finite; the caller looks.
    """
    rows, columns = weight.shape
    rule, config = scheme.rule, scheme.pair.weight
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device) if out is None else out
    scales = torch.empty(rows, 1, dtype=torch.float32, device=weight.device)
    lost = torch.empty(rows, dtype=torch.float32, device=weight.device)
    norm = torch.empty_like(lost)
    tile = CPU_TILE_BYTES if weight.device.type == "cpu" else DEVICE_TILE_BYTES
    step = max(1, tile // (4 * columns))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(rule.arithmetic, weight.dtype)
    if bias is not None and rule.arithmetic == "bf16":
        bias = bias.bfloat16()
    work = _Tile(min(step, rows), columns, dtype, weight.device)
    # In fp32, with a scale that is amax / 127 and no less, |w / s| stays below 127.5 by construction.
    clips = config.method == "mse" or rule.arithmetic != "fp32" or rule.scale_dtype != "F32"
    whole = _amax(weight, step).to(dtype) if config.scope == "per_tensor" else None
    if whole is not None and config.method == "mse":
        whole = _mse_whole(weight, whole, rule, work, step)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        w = work.cast(weight[part])
        amax = work.row_amax(w) if whole is None else whole.expand(w.shape[0], 1)
        if config.method == "mse" and whole is None:
            amax = _mse_amax(w, amax, rule, work)
        scale = _scale(amax, rule)
        q = torch.div(w, scale, out=work.q[: w.shape[0]]).round_()
        if clips:
            q.clamp_(rule.qmin, QMAX)
        codes[part].copy_(q)
        scales[part].copy_(scale)
        # The error is against what the source holds, also where it was cast to bf16 first.
        work.errors(q, scales[part], weight[part] if rule.arithmetic == "bf16" else w, lost[part], norm[part])
    if not torch.isfinite(lost).all():  # squares beyond fp32: once more, in double
        for start in range(0, rows, step):
            # On the host: an accelerator may have no fp64, and this happens to no sane weight.
            w, q, s = (t[start : start + step].cpu().double() for t in (weight, codes, scales))
            lost[start : start + step] = (w - q * s).norm(dim=1).to(lost.device)
            norm[start : start + step] = w.norm(dim=1).to(lost.device)
    return QuantizedLinear(scheme, codes, scales, bias, weight.dtype, _relative(lost, norm))


class _Tile:
    """Scratch memory for a tile of rows, allocated once a matrix."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.w = torch.empty(rows, columns, dtype=dtype, device=device)
        self.q = torch.empty(rows, columns, dtype=dtype, device=device)
        self.wide = self.q if dtype == torch.float32 else torch.empty(rows, columns, device=device)
        self.high = torch.empty(rows, 1, dtype=dtype, device=device)
        self.low = torch.empty(rows, 1, dtype=dtype, device=device)

    def cast(self, rows: Tensor) -> Tensor:
        return rows if rows.dtype == self.dtype else self.w[: rows.shape[0]].copy_(rows)

    def row_amax(self, w: Tensor) -> Tensor:
        high, low = self.high[: w.shape[0]], self.low[: w.shape[0]]
        torch.amax(w, dim=1, keepdim=True, out=high)
        torch.amin(w, dim=1, keepdim=True, out=low)
        return torch.maximum(high, low.neg_(), out=high)

    def errors(self, q: Tensor, scale: Tensor, w: Tensor, lost: Tensor, norm: Tensor) -> None:
        """Row norms of w - q·s and of w, in fp32. Overwrites q."""
        wide = self.wide[: q.shape[0]]
        if wide.data_ptr() != q.data_ptr():
            wide.copy_(q)
        torch.linalg.vector_norm(wide.mul_(scale).sub_(w), dim=1, out=lost)
        if w.dtype != torch.float32:
            w = wide.copy_(w)
        torch.linalg.vector_norm(w, dim=1, out=norm)


def _scale(amax: Tensor, rule: Int8Rule) -> Tensor:
    """[rows, 1] amax -> the scale, in amax's dtype, rounded to what the runtime will keep of it."""
    # A divisor on the device: CUDA multiplies by the reciprocal of a Python number, which may cost the last bit.
    qmax = torch.full((), QMAX, dtype=amax.dtype, device=amax.device)
    scale = amax.clamp_min(rule.amax_floor).div_(qmax).clamp_min_(rule.scale_floor)
    kept = DTYPES.get(rule.scale_dtype, scale.dtype)
    return scale.to(kept).to(scale.dtype)


def _amax(weight: Tensor, step: int) -> Tensor:
    """|max| of the whole matrix as [1, 1]; NaN if any element is."""
    parts = [torch.maximum(p.amax(), -p.amin()) for p in weight.split(step)]
    return torch.stack(parts).amax().reshape(1, 1)


def _mse_amax(w: Tensor, amax: Tensor, rule: Int8Rule, work: _Tile) -> Tensor:
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


def _mse_whole(weight: Tensor, amax: Tensor, rule: Int8Rule, work: _Tile, step: int) -> Tensor:
    """The same for one scale for the whole matrix; amax is [1, 1]."""
    best, chosen = float("inf"), amax
    lost, norm = (torch.empty(step, dtype=torch.float32, device=weight.device) for _ in range(2))
    for ratio in MSE_RATIOS:
        candidate, total = amax * ratio, 0.0
        for part in weight.split(step):
            w, count = work.cast(part), part.shape[0]
            _try(w, candidate, rule, work, lost[:count], norm[:count])
            total += float(lost[:count].cpu().double().square().sum())
        if total < best:
            best, chosen = total, candidate
    return chosen


def _try(w: Tensor, amax: Tensor, rule: Int8Rule, work: _Tile, lost: Tensor, norm: Tensor) -> None:
    """Row errors of a tile, clipped at amax ([rows, 1] or [1, 1])."""
    scale = _scale(amax, rule)
    q = torch.div(w, scale, out=work.q[: w.shape[0]]).round_().clamp_(rule.qmin, QMAX)
    work.errors(q, scale.float(), w, lost, norm)


def _relative(lost: Tensor, norm: Tensor) -> float:
    lost, norm = lost.cpu().double(), norm.cpu().double()
    total = norm.square().sum().sqrt().item()
    return lost.square().sum().sqrt().item() / total if total else 0.0
