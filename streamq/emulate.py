"""Nunchaku's 4-bit layers as its kernels compute them, from a `QuantizedLinear`, on any device.

    w4a4, w4a4_nvfp4   xs = half(x / smooth), codes and scales of it as `fourbit` has them; acc = half(sum over groups);
                       acc = half(acc + bias); y = half(acc + half(x @ down^T) @ up^T)
    w4a16              y = half(half(x @ half(code · scale + zero)^T) + bias)

half: x's dtype. Modelled is every rounding of what the kernels keep: inputs, codes and scales of activations, weights
that are dequantized, each sum that is rounded to half; if asked, also int4's running sum over groups in half. Not
modelled: the order in which fp32 sums are added up, so single results differ in the last bit from device to device;
nvfp4's scale of the whole matrix, which the kernels apply behind the sum and this before it; rows that a caller pads.
Source: nunchaku-tech/nunchaku `src/kernels/zgemm/gemm_w4a4.cuh`, `gemm_base.cuh`, `lora.cuh`, `src/kernels/awq`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamq.methods.fourbit import GROUP, HALF, quantize_input
from streamq.quantized import QuantizedLinear

TILE_BYTES = 32 << 20  # of fp32 weight at once
ROW_BYTES = 128 << 20  # of fp32 input at once
HALVES = (torch.bfloat16, torch.float16)
PRECISION = {"w4a4": "int4", "w4a4_nvfp4": "nvfp4"}


@torch.no_grad()
def forward(x: Tensor, layer: QuantizedLinear, *, half_accumulation: bool = False) -> Tensor:
    """x [..., K] bf16 or fp16 -> [..., N] in the same dtype, on x's device, which must be the layer's.

    half_accumulation: int4 (w4a4) adds its groups' sums up in half precision, as the kernel is written; else in fp32,
    which is the better estimate of the format itself. Raises ValueError for another dtype of x, another type of layer,
    or a K that is not the layer's.
    """
    kind, columns = layer.scheme.type, layer.codes.shape[1]
    if x.dtype not in HALVES:
        raise ValueError(f"an input of {x.dtype}: the kernels take bfloat16 and float16")
    if kind not in PRECISION and kind != "w4a16":
        raise ValueError(f"type {kind}: w4a4, w4a4_nvfp4 and w4a16 are emulated")
    if x.shape[-1] != columns:
        raise ValueError(f"an input {list(x.shape)} for a layer of {columns} columns")
    flat = x.reshape(-1, columns)
    y = torch.empty(flat.shape[0], layer.codes.shape[0], dtype=x.dtype, device=x.device)
    for part in _slices(flat.shape[0], max(1, ROW_BYTES // (4 * columns))):
        if kind == "w4a16":
            _awq(flat[part], layer, y[part])
        else:
            _svdq(flat[part], layer, y[part], half_accumulation and kind == "w4a4")
    return y.view(*x.shape[:-1], y.shape[1])


def _svdq(x: Tensor, layer: QuantizedLinear, y: Tensor, half_accumulation: bool) -> None:
    """Fill y [m, N] from x [m, K]."""
    half, branch = x.dtype, layer.low_rank
    # Codes times scales are exact: few bits each.
    codes, scales = quantize_input(x, PRECISION[layer.scheme.type], half, layer.smooth, back=not half_accumulation)
    # The branch reads x itself.
    inner = None if branch is None else (x.float() @ branch.down.float().T).to(half).float()
    for part in _tiles(layer):
        if half_accumulation:
            made = _added_in_half(codes, scales, layer, part, half)
        else:
            made = (codes @ layer.dequantize(part).T).to(half)
        if layer.bias is not None:
            made = (made.float() + layer.bias[part].to(HALF).float()).to(half)
        if branch is not None and inner is not None:
            made = (made.float() + inner @ branch.up[part].float().T).to(half)
        y[:, part] = made


def _added_in_half(codes: Tensor, scales: Tensor, layer: QuantizedLinear, part: slice, half: torch.dtype) -> Tensor:
    """int4's product [m, n] as the kernel adds it up: acc = half(half(sum of a group) · half(scales) + acc)."""
    weight, size = layer.codes[part].float(), GROUP["int4"]
    made = torch.zeros(codes.shape[0], weight.shape[0], dtype=half, device=codes.device)
    for group in range(scales.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        whole = (codes[:, columns] @ weight[:, columns].T).to(half).float()
        scale = (scales[:, group : group + 1] * layer.scales[part, group]).to(half).float()
        made = (whole * scale + made.float()).to(half)
    return made


def _awq(x: Tensor, layer: QuantizedLinear, y: Tensor) -> None:
    half, wide = x.dtype, x.float()
    for part in _tiles(layer):
        made = (wide @ layer.dequantize(part).to(half).float().T).to(half)
        y[:, part] = made if layer.bias is None else made + layer.bias[part].to(HALF).to(half)


def _tiles(layer: QuantizedLinear) -> Iterator[slice]:
    count, columns = layer.codes.shape
    return _slices(count, max(1, TILE_BYTES // (4 * columns)))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))
