"""Rounding to 4 bits in groups along a layer's input, as Nunchaku's kernels keep weights and take activations.

int4, groups of 64: s = bf16(amax / 7), q = clamp(round(w / s), -7, 7). nvfp4, groups of 16: e2m1 values with a scale in
e4m3 for each group and one in bf16 for the matrix. Weights are divided by the stored scale, never by the exact one.
Activations: codes by the exact scale's reciprocal, product by the rounded one. Source: nunchaku-tech/nunchaku
`src/kernels/zgemm/gemm_w4a4.cuh`, mit-han-lab/deepcompressor `quantizer/impl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamq.device import kernels

HALF = torch.bfloat16  # what the kernels compute in besides codes
GROUP = {"int4": 64, "nvfp4": 16}
TOP = {"int4": 7.0, "nvfp4": 6.0}
E4M3_MOST = 448.0
_EXPONENT = 0x7F800000  # bits of a float32


def round_e2m1_(x: Tensor) -> Tensor:
    """The nearest e2m1 values of fp32 x, in place: ties to the even mantissa, beyond 6 is 6."""
    # The step is half the power of two below |x|, from 0.5 to 2; dividing by it is exact.
    step = x.clamp(-6, 6).view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32).mul_(0.5).clamp_(0.5, 2)
    return x.div_(step).round_().mul_(step).clamp_(-6, 6)


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes 0..15 int8 of fp32 e2m1 values; -0 is 0."""
    magnitude = values.abs()
    # From 1 on, exponent and first mantissa bit count up together: 1 is 254 and code 2.
    code = torch.where(magnitude < 1, magnitude * 2, (magnitude.view(torch.int32) >> 22).float() - 252)
    return code.add_((values < 0).float(), alpha=8).to(torch.int8)


def tensor_scale(amax: Tensor, precision: str) -> Tensor | None:
    """nvfp4: s0 [1] fp32, a bf16 number, from a matrix's largest magnitude; None for int4, which has no such scale."""
    if precision == "int4":
        return None
    most = torch.full((1,), TOP["nvfp4"] * E4M3_MOST, device=amax.device)
    scale = (amax.reshape(1).float() / most).to(HALF).float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_weight_(w: Tensor, precision: str, whole: Tensor | None = None, shrink: float = 1.0) -> Tensor:
    """Overwrite w [n, K] fp32, contiguous, with grid values (int4: whole numbers); returns the groups' scales.

    Scales: [n, K / group] fp32, as stored. W ≈ values · scales · whole. `whole`: `tensor_scale` of the whole matrix.
    shrink: share of each group's range that is kept. Raises ValueError if K is no multiple of the group size.
    """
    _grouped(w, GROUP[precision])
    kernel = kernels.chosen("weight", _round_weight_, w, precision, whole, shrink)
    return (kernel or _round_weight_)(w, precision, whole, shrink)


def _round_weight_(w: Tensor, precision: str, whole: Tensor | None, shrink: float) -> Tensor:
    scales = weight_scales(w, precision, whole, shrink)
    grouped = w.unflatten(1, (scales.shape[1], -1))
    grouped.div_((scales if whole is None else scales * whole).unsqueeze(2))
    if precision == "int4":
        grouped.round_().clamp_(-7, 7)
    else:
        round_e2m1_(grouped)
    return scales


def weight_scales(w: Tensor, precision: str, whole: Tensor | None = None, shrink: float = 1.0) -> Tensor:
    """The scales of `round_weight_`, without rounding."""
    grouped = _grouped(w, GROUP[precision])
    amax = torch.maximum(grouped.amax(dim=2), grouped.amin(dim=2).neg_()).mul_(shrink)
    exact = amax.div_(torch.full((), TOP[precision], device=w.device))
    if precision == "int4":
        kept = exact.to(HALF).float()
    else:
        assert whole is not None
        kept = exact.div_(whole).clamp_max_(E4M3_MOST).to(torch.float8_e4m3fn).float()
    return torch.where(kept == 0, torch.ones_like(kept), kept)


def codes_of(values: Tensor, precision: str) -> Tensor:
    """Grid values, of `round_weight_`, as the codes that a `QuantizedLinear` holds: int8."""
    return values.to(torch.int8) if precision == "int4" else e2m1_codes(values)


@torch.no_grad()
def quantize_input(
    x: Tensor, precision: str, half: torch.dtype = HALF, smooth: Tensor | None = None, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """x [..., K] as the kernel quantizes x / smooth: (grid values [..., K] fp32, scales [..., K / group] fp32).

    What is quantized is rounded to `half` first. Values come from the exact scale, int4 from -8 to 7; scales are
    numbers of `half`, or of e4m3. back: values times their scales. smooth: [K] fp32.
    """
    _grouped(x, GROUP[precision])
    kernel = kernels.chosen("inputs", _quantize_input, kernels.by_rows(x), precision, half, smooth, back)
    return (kernel or _quantize_input)(x, precision, half, smooth, back)


def _quantize_input(
    x: Tensor, precision: str, half: torch.dtype, smooth: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    x = x if smooth is None else x.float() / smooth
    groups = _grouped(x.to(half).float(), GROUP[precision])
    amax = torch.maximum(groups.amax(dim=-1), groups.amin(dim=-1).neg_()).abs_()  # of zeros +0 on every device
    exact = amax.mul_(1 / TOP[precision])  # the kernels multiply by the fp32 reciprocal
    if precision == "nvfp4":
        exact.clamp_max_(E4M3_MOST)
    inverse = torch.where(exact > 0, exact.reciprocal(), torch.zeros_like(exact)).unsqueeze(-1)
    values = groups.mul_(inverse)
    values = values.round_().clamp_(-8, 7) if precision == "int4" else round_e2m1_(values)
    scales = exact.to(half if precision == "int4" else torch.float8_e4m3fn).float()
    return (values.mul_(scales.unsqueeze(-1)) if back else values).flatten(-2), scales


@torch.no_grad()
def fake_quantize_input(x: Tensor, precision: str) -> Tensor:
    """What the kernel's rounding leaves of x [..., K], smoothed: fp32, a new tensor."""
    return quantize_input(x, precision, back=True)[0]


def _grouped(x: Tensor, size: int) -> Tensor:
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} columns are no multiple of the group size {size}")
    return x.unflatten(-1, (-1, size))
