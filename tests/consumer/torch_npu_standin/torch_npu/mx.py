"""The block-scaled operators of the stand-in: OCP Microscaling (MX) formats, and FP8 with a scale for each tile.

Shapes and dtypes follow the public operator documentation: exponents of MX come in pairs, uint8 [..., K / 64, 2]; two
e2m1 codes share a byte, the even element in its low half. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST = {torch.float8_e4m3fn: 8, torch.float4_e2m1fn_x2: 2}  # exponent of the largest number


def powers(exponents: Tensor) -> Tensor:
    """2^(stored - 127), float64."""
    return torch.exp2(exponents.double() - 127)


def e2m1_codes(values: Tensor) -> Tensor:
    """Nearest e2m1 code 0..15, ties to the even code, beyond 6 the 6."""
    distance = (values.abs().clamp_max(6).unsqueeze(-1) - E2M1.to(values.dtype)).abs()
    nearest = distance.amin(-1, keepdim=True)
    tied = distance == nearest
    # of two that are as near, the even one: order even codes first
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    code = order[tied[..., order].to(torch.int8).argmax(-1)]
    return (code + 8 * torch.signbit(values)).to(torch.uint8)


def e2m1_values(packed: Tensor) -> Tensor:
    """[..., K / 2] bytes -> [..., K] float64."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    return torch.cat([E2M1, -E2M1]).double()[codes]


def dynamic_mx_quant(x: Tensor, *, axis: int = -1, dst_type: Any = None) -> tuple[Tensor, Tensor]:
    """x [..., K] bf16 or fp16, K a multiple of 64 -> (elements, exponents uint8 [..., K / 64, 2])."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"npu_dynamic_mx_quant: {x.dtype}")
    if dst_type not in LARGEST or axis not in (-1, x.ndim - 1) or x.shape[-1] % (2 * BLOCK):
        raise NotImplementedError(f"npu_dynamic_mx_quant stand-in: {dst_type}, axis {axis}, shape {list(x.shape)}")
    blocks = x.double().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    exponent = (torch.frexp(amax)[1] - 1).clamp_min(-126) - LARGEST[dst_type]
    exponent = torch.where(amax == 0, -127, exponent).clamp(-127, 127)
    scaled = (blocks / torch.exp2(exponent.double()).unsqueeze(-1)).flatten(-2)
    scale = (exponent + 127).to(torch.uint8).unflatten(-1, (-1, 2))
    if dst_type == torch.float8_e4m3fn:
        return scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn), scale
    codes = e2m1_codes(scaled)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale


def mx_values(elements: Tensor, exponents: Tensor) -> Tensor:
    """[..., K] float64 of what `dynamic_mx_quant` gives, or of a weight [N, K] with its exponents [N, K / 64, 2]."""
    values = e2m1_values(elements) if elements.dtype == torch.uint8 else elements.double()
    scale = powers(exponents).flatten(-2)
    return (values.unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2)


def mx_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype,
    formats: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """x1 [M, K] by x2 [K, N], exponents [M, K / 64, 2] and [K / 64, N, 2]; MXFP4 both ways has half as many bytes."""
    wanted = torch.uint8 if formats == (torch.float4_e2m1fn_x2,) * 2 else torch.float8_e4m3fn
    if x1.dtype != wanted or x2.dtype != wanted or {scale.dtype, pertoken_scale.dtype} != {torch.uint8}:
        raise TypeError(
            f"npu_quant_matmul: {x1.dtype} @ {x2.dtype} as {formats}, {scale.dtype}, {pertoken_scale.dtype}"
        )
    if bias is not None and bias.dtype != torch.float32:
        raise TypeError(f"npu_quant_matmul: {bias.dtype} bias for MX")
    result = mx_values(x1, pertoken_scale) @ mx_values(x2.transpose(0, 1), scale.transpose(0, 1)).T
    return (result if bias is None else result + bias).to(output_dtype)


def dynamic_block_quant(
    x: Tensor, *, dst_type: Any, row_block_size: int, col_block_size: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [N, S, D] -> e4m3 of the same shape, float32 scales [N, ceil(S / rows), ceil(D / columns)]."""
    if dst_type != torch.float8_e4m3fn:
        raise NotImplementedError(f"npu_dynamic_block_quant stand-in: {dst_type}")
    count, rows, columns = x.shape
    scales = torch.zeros(count, -(-rows // row_block_size), -(-columns // col_block_size))
    made = torch.empty(x.shape, dtype=dst_type)
    for i in range(scales.shape[1]):
        for j in range(scales.shape[2]):
            tile = (
                slice(None),
                slice(i * row_block_size, (i + 1) * row_block_size),
                slice(j * col_block_size, (j + 1) * col_block_size),
            )
            part = x[tile].float()
            scales[:, i, j] = part.abs().amax((1, 2)) / 448
            made[tile] = (part / scales[:, i, j].clamp_min(1e-30).view(-1, 1, 1)).to(dst_type)
    return made, scales
