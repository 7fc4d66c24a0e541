"""MX weights, blocks of 32 columns with a power of two as scale: mxfp8 (e4m3) and mxfp4 (e2m1), as MindIE reads them.

`floats` has the formulas, which are msModelSlim's. Methods of the weight:

    mxfp8   minmax; mse_round: of floor and ceil in the exponent's formula the one of less mean squared error in the
            block, floor of equals
    mxfp4   minmax; ceil_x with c = `ext` key ceil_x_value (7.25), or, enable_search, that of search_min (6), then in
            steps of search_step (0.25) to search_max (12), of least mean squared error over the matrix, first of equals

Arithmetic: the largest magnitudes, logarithms and squared errors are in fp32, or, rule "source", rounded to the
checkpoint's dtype after each operation, or, "bf16", to bf16, to which the weight is cast first. Elements are rounded in
fp32 always. Sums of errors: in fp32 over a row, then in double on the host, so that no tile size can be seen in them.

Beside the codes it holds three tiles of fp32 rows (`int8.tile_rows`), with mse_round four, where half precision is the
arithmetic two more, and of a search 4 bytes for each row and c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamq.methods.blocks import BlockJob
from streamq.methods.floats import block_amax, e2m1_codes_signed, mx_exponents, mx_logs, mx_round, powers, rounded
from streamq.methods.statistics import InputStatistics
from streamq.quantized import QuantizedLinear, Scheme

CEIL_X = 7.25
SEARCH = {"search_min": 6.0, "search_max": 12.0, "search_step": 0.25}
KINDS = {"w8a8_mxfp8": "mxfp8", "w4a4_mxfp4": "mxfp4"}


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
    """Quantize a weight [out, in] of any float dtype as w8a8_mxfp8 or w4a4_mxfp4. `out`: int8 [out, in] to be filled.

    Codes: of mxfp8 float8_e4m3fn, a view of `out`; of mxfp4 int8 0..15. Scales [out, in / 32] fp32, powers of two; NaN
    of a block that holds NaN or Inf, which the caller looks for. Inputs are not looked at, and nothing is smoothed.
    Raises ValueError for columns that are no multiple of 32, and for a method that the type does not have.
    """
    assert columns is None and rows is None, "MX types have no smoothing vectors"
    kind, config, arithmetic = KINDS[scheme.type], scheme.pair.weight, scheme.rule.arithmetic
    if config.method not in ("minmax", {"mxfp8": "mse_round", "mxfp4": "ceil_x"}[kind]):
        raise ValueError(f"{kind} weight method {config.method!r}; mxfp8 has minmax, mse_round, mxfp4 minmax, ceil_x")
    kept = {"source": weight.dtype, "bf16": torch.bfloat16}.get(arithmetic, torch.float32)
    if bias is not None and arithmetic == "bf16":
        bias = bias.bfloat16()
    job = BlockJob(weight, scheme, out, kept)
    if kind == "mxfp8":
        job.codes = job.codes.view(torch.float8_e4m3fn)
    divisor = _divisor(job, dict(config.ext), kept) if config.method == "ceil_x" else None
    other = torch.empty_like(job.x if config.method == "mse_round" else job.x[:0])
    for part, blocks, x, scratch in job.tiles():
        m = block_amax(blocks)
        if config.method == "mse_round":
            e = _mse_round(blocks, m, kept, x, other[: len(x)], scratch)
        else:
            e = mx_exponents(m, kind, kept, divisor)
            mx_round(blocks, e, kind, x, scratch)
        scales = powers(e)
        if kind == "mxfp8":
            job.codes[part] = x.flatten(1)
        else:
            job.codes[part] = e2m1_codes_signed(x, scratch).flatten(1)
        job.keep(part, blocks, x, scales)
    return job.result(bias)


def exponents(scales: Tensor) -> Tensor:
    """uint8: what is stored of scales, powers of two from 2^-127 to 2^127: the exponent + 127."""
    # A float32's own exponent field, which 2^-127, no normal number, has as 0.
    return scales.view(torch.int32).bitwise_right_shift(23).to(torch.uint8)


def _mse_round(blocks: Tensor, m: Tensor, kept: torch.dtype, x: Tensor, other: Tensor, scratch: Tensor) -> Tensor:
    """Exponents [n, blocks] of an mxfp8 tile; fills x with the rounded values."""
    down = mx_exponents(m, "mxfp8", kept)
    up = torch.ceil(mx_logs(m, "mxfp8", kept)).sub_(8).clamp_min_(-127).add_(m - m)
    upper = mx_round(blocks, up, "mxfp8", other, scratch)
    lost_up = rounded(_squares(blocks, upper, up, kept, scratch).mean(dim=-1), kept)
    lower = mx_round(blocks, down, "mxfp8", x, scratch)
    lost_down = rounded(_squares(blocks, lower, down, kept, scratch).mean(dim=-1), kept)
    better = lost_up.isfinite() & ((lost_up < lost_down) | ~lost_down.isfinite())
    lower[better] = upper[better]
    return torch.where(better, up, down)


def _divisor(job: BlockJob, ext: dict[str, Any], kept: torch.dtype) -> float:
    """The c of method ceil_x."""
    if not ext.get("enable_search", False):
        return float(ext.get("ceil_x_value", CEIL_X))
    least, most, step = (float(ext.get(key, default)) for key, default in SEARCH.items())
    candidates = [least + i * step for i in range(round((most - least) / step) + 1)]
    totals = torch.zeros(len(candidates), job.weight.shape[0], device=job.weight.device)
    for part, blocks, x, scratch in job.tiles():
        m = block_amax(blocks)
        # Exponents fall with c, by one or two at the most: round once for each, then sum up for every c.
        first = mx_exponents(m, "mxfp4", kept, candidates[0])
        deepest = int((first - mx_exponents(m, "mxfp4", kept, candidates[-1])).nan_to_num_(0.0).amax())
        errors = []
        for depth in range(deepest + 1):
            values = mx_round(blocks, first - depth, "mxfp4", x, scratch)
            errors.append(_squares(blocks, values, first - depth, kept, scratch).sum(dim=-1))
        for i, c in enumerate(candidates):
            taken = first - mx_exponents(m, "mxfp4", kept, c)
            lost = errors[0]
            for depth in range(1, deepest + 1):
                lost = torch.where(taken == depth, errors[depth], lost)
            totals[i, part] = lost.sum(dim=1)
    means = totals.cpu().double().sum(dim=1).div(job.weight.numel()).to(kept).tolist()
    best, chosen = float("inf"), least
    for c, mean in zip(candidates, means, strict=True):
        if mean < best:
            best, chosen = mean, c
    return chosen


def _squares(blocks: Tensor, values: Tensor, e: Tensor, kept: torch.dtype, scratch: Tensor) -> Tensor:
    """(b - q · 2^e)², [n, blocks, 32] fp32, each operation rounded to `kept`; mostly in scratch."""
    made = rounded(torch.mul(values, powers(e).unsqueeze(-1), out=scratch), kept)
    return rounded(rounded(torch.sub(blocks, made, out=made), kept).square_(), kept)
