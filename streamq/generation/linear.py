"""A quantized layer in the place of a float one while a video is made: stored form in, nothing of it expanded for long.

int8 codes meet int8 codes, and e4m3 meets e4m3, where the device has such a product (`streamq.device.products`).
Everything else is computed as `streamq.simulate` has it, one layer expanded at a time, for the time of one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from streamq.device import products
from streamq.methods.activation import quantize_input
from streamq.methods.rotation import rotate
from streamq.quantized import QuantizedLinear
from streamq.simulate import EmulatedLinear, SimulatedLinear

ROWS_AT_A_TIME = 8192  # of the input: fp32 copies and int32 sums are as large as these need


class StoredLinear(nn.Module):
    """[..., in] -> [..., out] in the input's dtype. `dtype`: of the products that are not of codes.

    record: makes the layer out of what is stored; asked at each call, so that nothing unpacked outlives it.
    """

    def __init__(self, record: Callable[[], QuantizedLinear], dtype: torch.dtype) -> None:
        super().__init__()
        self.record = record
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        layer = self.record()
        kind = arithmetic(layer)
        if kind == "float":
            made = EmulatedLinear(layer) if layer.scheme.four_bit else SimulatedLinear(layer, self.dtype)
            return made(x)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.empty(flat.shape[0], layer.codes.shape[0], dtype=x.dtype, device=x.device)
        for start in range(0, flat.shape[0], ROWS_AT_A_TIME):
            part = slice(start, start + ROWS_AT_A_TIME)
            y[part] = _rows(flat[part].float(), layer, kind)
        return y.view(*x.shape[:-1], y.shape[1])


def arithmetic(layer: QuantizedLinear) -> str:
    """What a layer is computed in: `int8`, `fp8`, or `float` for everything that is expanded."""
    codes, act = layer.codes, layer.scheme.pair.act
    if layer.scales.shape[1] != 1 or layer.zeros is not None or layer.scheme.four_bit:
        return "float"
    if codes.dtype == torch.int8 and act.dtype == "int8" and products.has_int8(codes.device):
        return "int8"
    fits = products.fits_fp8(codes.shape[1], codes.shape[0])
    if codes.dtype == torch.float8_e4m3fn and fits and products.has_fp8(codes.device):
        return "fp8"
    return "float"


def _rows(x: Tensor, layer: QuantizedLinear, kind: str) -> Tensor:
    """[m, in] fp32 -> [m, out] fp32."""
    if layer.smooth is not None:
        x = x / layer.smooth
    if layer.rotation:
        x = rotate(x, layer.rotation)
    codes, scale = quantize_input(x, layer.scheme.pair.act, layer.static)
    assert scale is not None
    scales = layer.scales.squeeze(1)
    if kind == "fp8":
        y = products.fp8_linear(codes.to(torch.float8_e4m3fn), layer.codes, scales, scale)
    else:
        offset = layer.static.offset if layer.static is not None else 0.0
        y = products.int8_linear(codes.add_(offset).to(torch.int8), layer.codes, scales, scale, offset)
    return y if layer.bias is None else y.add_(layer.bias.float())
