"""CPU stand-in for ``torch_npu``, for tests only.

It lets ``mindiesd`` be imported on a machine without an Ascend NPU. A few operators
follow the formulas and the int8 dtype rules of the public operator documentation;
intermediate results are kept in float32, so the last bit may differ from an NPU.
Every other name resolves to a function that raises, so nothing passes by accident.

Importing it changes ``torch`` (``torch.npu``, ``Tensor.npu``): use it only in a process
of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import mx, npu

__all__ = [
    "float4_e2m1fn_x2",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "npu",
    "npu_dtype_cast",
    "npu_dynamic_block_quant",
    "npu_dynamic_mx_quant",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_quant_matmul",
    "npu_quantize",
]

float8_e4m3fn = torch.float8_e4m3fn
float8_e8m0fnu = torch.float8_e8m0fnu
float4_e2m1fn_x2 = torch.float4_e2m1fn_x2


def npu_dynamic_quant(x: Tensor, *, smooth_scales: Tensor | None = None, dst_type: Any = None) -> tuple[Tensor, Tensor]:
    """Quantize each token (row of the last axis) to int8: ``scale = amax / 127``."""
    if dst_type not in (None, torch.int8):
        raise NotImplementedError(f"npu_dynamic_quant stand-in: dst_type {dst_type}")
    if x.dtype not in (torch.float16, torch.bfloat16) or x.ndim < 2:
        raise TypeError(f"npu_dynamic_quant: {x.dtype} of {x.ndim} axes")
    rows = x.float() if smooth_scales is None else x.float() * smooth_scales.float()
    scale = rows.abs().amax(dim=-1) / 127
    divisor = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    return (rows / divisor).round().clamp(-128, 127).to(torch.int8), scale


def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: torch.dtype,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """Quantize to int8 along ``axis``: ``round(input / scales + zero_points)``."""
    if dtype not in (torch.qint8, torch.int8):
        raise NotImplementedError(f"npu_quantize stand-in: dtype {dtype}")
    shape = [1] * input.ndim
    shape[axis] = -1
    factor = scales.float().reshape(shape)
    value = input.float() / factor if div_mode else input.float() * factor
    if zero_points is not None:
        value = value + zero_points.float().reshape(shape)
    return value.round().clamp(-128, 127).to(torch.int8)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    **mx_only: Any,
) -> Tensor:
    """Multiply int8 by int8 with int32 sums, scale, add the bias, cast.

    An int32 bias is added to the int32 sums before scaling, a float one after it. With
    ``group_sizes``: MX by MX.
    """
    if mx_only:
        formats = mx_only.pop("x1_dtype", None), mx_only.pop("x2_dtype", None)
        wanted = {"scale_dtype": float8_e8m0fnu, "pertoken_scale_dtype": float8_e8m0fnu, "group_sizes": [1, 1, 32]}
        if mx_only != wanted or pertoken_scale is None or output_dtype is None:
            raise NotImplementedError(f"npu_quant_matmul stand-in: {mx_only}")
        return mx.mx_matmul(x1, x2, scale, pertoken_scale, bias, output_dtype, formats)
    if x1.dtype != torch.int8 or x2.dtype != torch.int8:
        raise TypeError(f"npu_quant_matmul: {x1.dtype} @ {x2.dtype}, int8 expected")
    if output_dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"npu_quant_matmul stand-in: output_dtype {output_dtype}")
    bf16_scale = scale.dtype == torch.bfloat16 and output_dtype == torch.bfloat16
    if scale.dtype != torch.float32 and not bf16_scale:
        raise TypeError(f"npu_quant_matmul: {scale.dtype} scale for {output_dtype}")
    if scale.ndim != 1 or scale.numel() not in (1, x2.shape[-1]):
        raise ValueError(f"npu_quant_matmul: scale of shape {tuple(scale.shape)}")
    sums = x1.to(torch.int32) @ x2.to(torch.int32)
    if bias is not None and bias.dtype == torch.int32:
        sums, bias = sums + bias, None
    result = sums.float() * scale.float()
    if pertoken_scale is not None:
        if pertoken_scale.dtype != torch.float32:
            raise TypeError(f"npu_quant_matmul: {pertoken_scale.dtype} pertoken_scale")
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None:
        result = result + bias.float()
    return result.to(output_dtype)


npu_dynamic_mx_quant = mx.dynamic_mx_quant
npu_dynamic_block_quant = mx.dynamic_block_quant


def npu_format_cast(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``input``: a storage format has no meaning on a CPU."""
    return input


def npu_dtype_cast(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``input`` unchanged."""
    return input


def _tensor_npu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for ``Tensor.npu``: the tensor stays on the CPU."""
    return self


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Give any other public name as a function that raises when it is called."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"torch_npu stand-in: {name} is not implemented")

    return missing


torch.npu = npu  # type: ignore[attr-defined]
sys.modules["torch.npu"] = npu
Tensor.npu = _tensor_npu  # type: ignore[attr-defined]
