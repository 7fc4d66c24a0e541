"""Triton kernels for what several torch operations do one after the other: to the same bits, in one pass or two.

    rows     largest magnitude of each row, its scale, int8 or e4m3 codes          methods.int8, fp8, activation
    weight   groups of columns: int4 or nvfp4 values and their scales, in place     methods.fourbit.round_weight_
    inputs   smoothing, groups, int4 or nvfp4 values, and back if asked             methods.fourbit, emulate
    lost     weighted squared error of 4-bit codes, element by element              methods.int4

What keeps the bits: `/` of fp32 compiles to an approximation, `tl.div_rn` to the correctly rounded quotient. No product
and sum may be joined (`enable_fp_fusion=False`, which also tells ptxas). libdevice's rint does not run in Triton's
interpreter, so whole numbers come from adding and taking away 1.5 · 2^23, exact with halves to even below 2^22; every
caller clamps first. Largest magnitudes are sought among bit patterns, which are in the magnitudes' order with NaN above
Inf, as torch's `amax` has it. bf16 is read and rounded as bits, because the interpreter rounds it otherwise than cards.

Imported by `streamq.device.kernels` alone, and only where there is a CUDA device: Triton is optional.
"""

# Triton reads the kernels' annotations: only those that are for it may stand there.
# mypy: allow-untyped-defs

from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What compiling and its C compiler raise; a missing driver and a failed pass are RuntimeErrors.
FAILURES = (triton.TritonError, RuntimeError, ImportError, OSError, subprocess.CalledProcessError)
BLOCK = 2048  # columns at once
TILE = 2048  # elements of whole groups at once
HOW = {"enable_fp_fusion": False, "num_warps": 4}

GROUP = {"int4": 64, "nvfp4": 16}
TOP = {"int4": 7.0, "nvfp4": 6.0}
E4M3_TOP = 448.0

_MAGNITUDE, _EXPONENT = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)
_SIGN = tl.constexpr(-(1 << 31))
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23
_INVERSE = tl.constexpr(0x7F000000)  # less the bits of a power of two: those of its inverse
_BF16_LOST, _BF16_KEPT = tl.constexpr(0x7FFF), tl.constexpr(-(1 << 16))


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _read(pointer, mask, BF16: tl.constexpr):
    """fp32 of what lies there; bf16 comes as int16."""
    raw = tl.load(pointer, mask=mask, other=0)
    return _number(raw.to(tl.int32) << 16) if BF16 else raw.to(tl.float32)


@triton.jit
def _half(x, BF16: tl.constexpr):
    """fp32 rounded to bf16, else to fp16."""
    if BF16:
        bits = tl.where(x == x, _bits(x), 0)
        rounded = _number((bits + _BF16_LOST + ((bits >> 16) & 1)) & _BF16_KEPT)
        made = tl.where(x == x, rounded, x)
    else:
        made = x.to(tl.float16).to(tl.float32)
    return made


@triton.jit
def _clamp(x, low, high):
    """NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _rint(x):
    """The nearest whole number, halves to even, of |x| < 2^22, Inf or NaN; of a negative number that is zero -0."""
    r = (x + _WHOLE) - _WHOLE
    return _number(_bits(r) | (_bits(x) & _SIGN))


@triton.jit
def _e4m3(x):
    """As floats.round_e4m3_, halves to even. Scaling by powers of two is exact."""
    x = _clamp(x, -448.0, 448.0)
    step = _number(_bits(x) & _EXPONENT) * 0.125
    step = tl.where(step < 0.001953125, 0.001953125, step)
    return _rint(x * _number(-_bits(step) + _INVERSE)) * step


@triton.jit
def _e2m1(x):
    """As fourbit.round_e2m1_."""
    x = _clamp(x, -6.0, 6.0)
    step = _clamp(_number(_bits(x) & _EXPONENT) * 0.5, 0.5, 2.0)
    return _clamp(_rint(x * _number(-_bits(step) + _INVERSE)) * step, -6.0, 6.0)


@triton.jit
def _e4m3_code(x):
    """The byte of an fp32 e4m3 number."""
    bits = _bits(x)
    size = _number(bits & _MAGNITUDE)
    small = tl.where(size < 0.015625, size * 512.0, 0.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, ((bits & _MAGNITUDE) >> 20) - 960)
    code = tl.where(x == x, code, 127)
    return code | ((bits >> 24) & 128)


@triton.jit
def _rows(
    x, codes, scales, values, width, stride, amax_floor, scale_floor, zero_scale, top, low, high,
    BF16: tl.constexpr, E4M3: tl.constexpr, HALF_SCALE: tl.constexpr, CODES: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    most = tl.zeros([BLOCK], tl.int32)
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        most = tl.maximum(most, _bits(_read(x + columns, columns < width, BF16)) & _MAGNITUDE)
    amax = _number(tl.max(most, axis=0))
    amax = tl.where(amax < amax_floor, amax_floor, amax)
    scale = tl.div_rn(amax, top)
    scale = tl.where(scale < scale_floor, scale_floor, scale)
    if HALF_SCALE:
        scale = _half(scale, True)
    scale = tl.where(scale == 0, zero_scale, scale)
    tl.store(scales + row, scale)
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        inside, place = columns < width, row * width + columns
        q = tl.div_rn(_read(x + columns, inside, BF16), scale)
        q = _e4m3(q) if E4M3 else _rint(_clamp(q, low, high))
        tl.store(values + place, q, mask=inside)
        if CODES:
            # NaN as an integer is what a device makes of it: 0, said here.
            code = _e4m3_code(q) if E4M3 else tl.where(q == q, q, 0.0).to(tl.int32)
            tl.store(codes + place, code.to(tl.int8), mask=inside)


@triton.jit
def _weight(
    w, scales, whole, groups, shrink, top,
    NVFP4: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    inside = group < groups
    place = (row * groups + group)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(w + place, mask=inside[:, None], other=0.0)
    amax = _number(tl.max(_bits(x) & _MAGNITUDE, axis=1))
    kept = tl.div_rn(amax * shrink, top)
    if NVFP4:
        one = tl.load(whole)
        kept = tl.div_rn(kept, one)
        kept = _e4m3(tl.where(kept > 448.0, 448.0, kept))
        kept = tl.where(kept == 0, 1.0, kept)
        x = _e2m1(tl.div_rn(x, (kept * one)[:, None]))
    else:
        kept = _half(kept, True)
        kept = tl.where(kept == 0, 1.0, kept)
        x = _rint(_clamp(tl.div_rn(x, kept[:, None]), -7.0, 7.0))
    tl.store(scales + row * groups + group, kept, mask=inside)
    tl.store(w + place, x, mask=inside[:, None])


@triton.jit
def _inputs(
    x, smooth, values, scales, groups, stride, inverse_top, one,
    BF16: tl.constexpr, HALF_BF16: tl.constexpr, SMOOTH: tl.constexpr, NVFP4: tl.constexpr, BACK: tl.constexpr,
    GROUP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = group < groups
    v = _read(x + row * stride + columns, inside[:, None], BF16)
    if SMOOTH:
        v = tl.div_rn(v, tl.load(smooth + columns, mask=inside[:, None], other=1.0))
    v = _half(v, HALF_BF16)
    exact = _number(tl.max(_bits(v) & _MAGNITUDE, axis=1)) * inverse_top
    if NVFP4:
        exact = tl.where(exact > 448.0, 448.0, exact)
        scale = _e4m3(exact)
    else:
        scale = _half(exact, HALF_BF16)
    inverse = tl.where(exact > 0, tl.div_rn(one, exact), 0.0)
    v = v * inverse[:, None]
    v = _e2m1(v) if NVFP4 else _rint(_clamp(v, -8.0, 7.0))
    if BACK:
        v = v * scale[:, None]
    tl.store(values + row * groups * GROUP + columns, v, mask=inside[:, None])
    tl.store(scales + row * groups + group, scale, mask=inside)


@triton.jit
def _lost(
    w, scales, offsets, share, out, width, low, high,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = row * width + columns
    group = row * (width // GROUP) + columns // GROUP
    x = tl.load(w + place, mask=inside, other=0.0)
    scale = tl.load(scales + group, mask=inside, other=1.0)
    offset = tl.load(offsets + group, mask=inside, other=0.0)
    code = _rint(_clamp(tl.div_rn(x, scale) + offset, low, high))
    wrong = (code - offset) * scale - x
    tl.store(out + place, wrong * wrong * tl.load(share + columns, mask=inside, other=0.0), mask=inside)


def rows(
    x: Tensor, codes: Tensor | None, scales: Tensor, *, values: Tensor, e4m3: bool, amax_floor: float = 0.0,
    scale_floor: float = 0.0, zero_scale: float = 0.0, bf16_scale: bool = False, qmin: float = -128.0,
) -> Tensor:  # fmt: skip
    """Fill values [n, K] fp32, codes [n, K] int8 or e4m3 (unless None), scales [n, 1] fp32, of x [n, K]; the values.

    scale = max(max(amax, amax_floor) / 127 or 448, scale_floor), as bf16 if `bf16_scale`, `zero_scale` where it is 0.
    values: more rows than x has do no harm. All contiguous but x, whose rows may lie apart.
    """
    count, width = x.shape
    given, bf16 = _plain(x)
    values = values[:count]
    target = values if codes is None else codes.view(torch.int8)
    top, low = (E4M3_TOP, -E4M3_TOP) if e4m3 else (127.0, qmin)
    with _on(x):
        _rows[(count,)](
            given, target, scales, values, width, given.stride(0), amax_floor, scale_floor, zero_scale, top, low,
            127.0, BF16=bf16, E4M3=e4m3, HALF_SCALE=bf16_scale, CODES=codes is not None, CHUNKS=-(-width // BLOCK),
            BLOCK=BLOCK, **HOW,
        )  # fmt: skip
    return values


def tokens(x: Tensor, *, e4m3: bool, floor: float) -> tuple[Tensor, Tensor]:
    """(values [..., K], scales [..., 1]) fp32 of x [..., K] by rows; scales are `floor` at least."""
    flat = x.reshape(-1, x.shape[-1])
    scales = torch.empty(*x.shape[:-1], 1, device=x.device)
    values = torch.empty(flat.shape, device=x.device)
    rows(flat, None, scales, values=values, e4m3=e4m3, scale_floor=floor)
    return values.view(x.shape), scales


def weight(w: Tensor, precision: str, whole: Tensor | None, shrink: float) -> Tensor:
    """`fourbit.round_weight_`: w [n, K] fp32, contiguous, becomes values; returns the scales [n, K / group]."""
    size = GROUP[precision]
    count, groups = w.shape[0], w.shape[1] // size
    scales = torch.empty(count, groups, device=w.device)
    with _on(w):
        _weight[_grid(count, groups * size, TILE)](
            w, scales, scales if whole is None else whole, groups, shrink, TOP[precision],
            NVFP4=precision == "nvfp4", GROUP=size, COUNT=TILE // size, **HOW,
        )  # fmt: skip
    return scales


def inputs(
    x: Tensor, precision: str, half: torch.dtype, smooth: Tensor | None = None, back: bool = False
) -> tuple[Tensor, Tensor]:
    """`fourbit.quantize_input` of x / smooth: (values [..., K], scales [..., K / group]) fp32.

    back: values times their scales.
    """
    size = GROUP[precision]
    given, bf16 = _plain(x.reshape(-1, x.shape[-1]))
    count, width = given.shape
    values = torch.empty(x.shape, device=x.device)
    scales = torch.empty(*x.shape[:-1], width // size, device=x.device)
    with _on(x):
        _inputs[_grid(count, width, TILE)](
            given, values if smooth is None else smooth, values, scales, width // size, given.stride(0),
            1 / TOP[precision], 1.0, BF16=bf16, HALF_BF16=half == torch.bfloat16, SMOOTH=smooth is not None,
            NVFP4=precision == "nvfp4", BACK=back, GROUP=size, COUNT=TILE // size, **HOW,
        )  # fmt: skip
    return values, scales


def lost(w: Tensor, scale: Tensor, offset: Tensor, share: Tensor, symmetric: bool) -> Tensor:
    """[n, groups, g] fp32: share · (what is left of w - w)², of w [n, groups, g] with scale, offset [n, groups, 1]."""
    count, groups, size = w.shape
    low, high = (-7.0, 7.0) if symmetric else (0.0, 15.0)
    tensors = [t.contiguous() for t in (w, scale, offset, share)]
    out = torch.empty(w.shape, device=w.device)
    with _on(w):
        _lost[_grid(count, groups * size, BLOCK)](
            *tensors, out, groups * size, low, high, GROUP=size, BLOCK=BLOCK, **HOW
        )
    return out


def _plain(x: Tensor) -> tuple[Tensor, bool]:
    """x with contiguous rows, bf16 as int16; and whether it is that."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    bf16 = x.dtype == torch.bfloat16
    return (x.view(torch.int16) if bf16 else x), bf16


def _grid(count: int, width: int, block: int) -> tuple[int, int]:
    return count, -(-width // block)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the thread's current card, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


KERNELS = {"rows": rows, "tokens": tokens, "weight": weight, "inputs": inputs, "lost": lost}
