"""Rounding to 8- and 4-bit floating-point numbers, e4m3 and e2m1, and the blocks of 32 with one exponent (MX).

Of a block with largest magnitude m, in fp32 unless said otherwise (msModelSlim's formulas):

    mxfp8   e = max(floor(log2(m)) - 8, -127), of m = 0: -127
    mxfp4   e = floor(log2(m / 0.875 + 9.6e-7)) - 2, or, method ceil_x: ceil(log2(m / c + 9.6e-7))
    x = b / 2^e, rounded to the nearest e4m3 number up to 448, or e2m1 number up to 6; halves away from zero

In MX blocks a negative number that rounds to zero is -0, and -0 itself +0. All functions are plain tensor arithmetic,
whose result for one block does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
E4M3_TOP = 448.0
LEAST = 2.0**-126  # stands for a block of zeros
ROUND_UP = 9.6e-7  # msModelSlim's, before a logarithm
MXFP4_SHARE = 0.875  # from 7/8 of the next power of two on, e2m1 values take the next exponent
_LEAST_STEP = 2.0**-9  # between e4m3's subnormal numbers
_EXPONENT, _MAGNITUDE = 0x7F800000, 0x7FFFFFFF  # bits of a float32
_SUBNORMAL = 0x00400000  # 2^-127


def round_e4m3_(x: Tensor, *, away: bool = False, scratch: Tensor | None = None) -> Tensor:
    """The nearest e4m3 numbers of contiguous fp32 x, clamped to ±448, in place. NaN stays.

    Halves go to the even code, as in a cast; or `away` from zero: sign(x) · floor(|x| / u + 0.5) · u for a step of u,
    where the sum is rounded, as it is in the tools that are matched. scratch: as x, else allocated.
    """
    step = _power_below(x.clamp_(-E4M3_TOP, E4M3_TOP), scratch).mul_(2.0**-3).clamp_min_(_LEAST_STEP)
    if not away:
        return x.div_(step).round_().mul_(step)  # exact but for the rounding: a power of two
    return _half_away_(x, step)


def round_e2m1_away_(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """The nearest e2m1 numbers of contiguous fp32 x, clamped to ±6, in place; halves away from zero. NaN stays."""
    return _half_away_(x, _power_below(x, scratch).clamp_(1, 4).mul_(0.5)).clamp_(-6, 6)


def _power_below(x: Tensor, scratch: Tensor | None) -> Tensor:
    """2^floor(log2|x|), 0 below 2^-126; in scratch."""
    bits = torch.empty_like(x) if scratch is None else scratch
    return torch.bitwise_and(x.view(torch.int32), _EXPONENT, out=bits.view(torch.int32)).view(torch.float32)


def _half_away_(x: Tensor, step: Tensor) -> Tensor:
    """Overwrites the step with its sign. On a CPU `trunc` would take ten times as long."""
    torch.copysign(step, x, out=step)
    return x.div_(step).add_(0.5).floor_().mul_(step)


def e2m1_codes_signed(values: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Codes 0..15 int8 of contiguous fp32 e2m1 values; -0 is 8. scratch: as values, else allocated."""
    scratch = torch.empty_like(values) if scratch is None else scratch
    bits, code = values.view(torch.int32), scratch.view(torch.int32)
    sign = torch.bitwise_right_shift(bits, 28, out=code).bitwise_and_(8).to(torch.int8)
    # From 1 on, exponent and first mantissa bit count up together: 1 is 254 and code 2. Below, the code is 2 |v|.
    torch.bitwise_and(bits, _MAGNITUDE, out=code).bitwise_right_shift_(22).sub_(252).clamp_min_(0)
    large, small = code.to(torch.int8), torch.abs(values, out=scratch).mul_(2).clamp_max_(2).to(torch.int8)
    return torch.maximum(large, small, out=large).add_(sign)


def mx_logs(m: Tensor, kind: str, kept: torch.dtype = torch.float32, divisor: float = MXFP4_SHARE) -> Tensor:
    """log2 of a block's largest magnitude m, fp32 numbers of `kept`, as the exponent is made from it.

    Every operation is rounded to `kept`. divisor: of mxfp4.
    """
    if kind == "mxfp8":
        return rounded(torch.log2(torch.where(m == 0, rounded(torch.full_like(m, LEAST), kept), m)), kept)
    # A divisor on the device: CUDA multiplies by the reciprocal of a Python number, which may cost the last bit.
    share = rounded(m / torch.full((), divisor, device=m.device), kept)
    return rounded(torch.log2(rounded(share + ROUND_UP, kept)), kept)


def mx_exponents(m: Tensor, kind: str, kept: torch.dtype = torch.float32, divisor: float | None = None) -> Tensor:
    """Whole numbers e, fp32, of blocks with largest magnitudes m, fp32; NaN where m is not finite.

    divisor: mxfp4's c of method ceil_x; None: minmax.
    """
    if kind == "mxfp8":
        e = torch.floor(mx_logs(m, kind, kept)).sub_(8).clamp_min_(-127)
    elif divisor is None:
        e = torch.floor(mx_logs(m, kind, kept)).sub_(2).clamp_(-129, 125)
    else:
        e = torch.ceil(mx_logs(m, kind, kept, divisor)).clamp_(-129, 125)
    return e.add_(m - m)  # NaN of Inf


def powers(e: Tensor) -> Tensor:
    """2^e, exact, fp32, of whole numbers from -127 to 127; NaN of NaN."""
    bits = e.nan_to_num(0.0).add_(127).int().bitwise_left_shift_(23).clamp_min_(_SUBNORMAL)
    return torch.where(e.isnan(), e, bits.view(torch.float32))


def mx_round(blocks: Tensor, e: Tensor, kind: str, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
    """blocks [..., n, 32] fp32 over 2^e, e [..., n]: the nearest e4m3 or e2m1 numbers, fp32.

    out, scratch: as blocks, contiguous; else allocated.
    """
    # Times 2^-e: of 2^-127, which is not a normal number, some devices make 0. Plus 0: -0 is no negative number here.
    x = torch.mul(blocks, powers(-e).unsqueeze(-1), out=out).add_(0.0)
    return round_e4m3_(x, away=True, scratch=scratch) if kind == "mxfp8" else round_e2m1_away_(x, scratch)


def mx_fake_quantize(x: Tensor, kind: str) -> Tensor:
    """What is left of x [..., K] fp32 in blocks of 32 by minmax, a new tensor. Raises ValueError for another K."""
    if x.shape[-1] % BLOCK:
        raise ValueError(f"{x.shape[-1]} columns are no multiple of the block size {BLOCK}")
    blocks = x.unflatten(-1, (-1, BLOCK))
    e = mx_exponents(block_amax(blocks), kind)
    return mx_round(blocks, e, kind).mul_(powers(e).unsqueeze(-1)).flatten(-2)


def block_amax(blocks: Tensor) -> Tensor:
    """[..., n, 32] -> the largest magnitude of each [..., n]; NaN if any element is."""
    return torch.maximum(blocks.amax(dim=-1), blocks.amin(dim=-1).neg_()).abs_()  # of zeros +0


def rounded(x: Tensor, kept: torch.dtype) -> Tensor:
    """fp32 x rounded to the numbers of `kept`."""
    return x if kept == torch.float32 else x.to(kept).float()
