"""A quantized layer as its runtime computes it, on any device, in the place of the float one.

int8 and fp8: codes times codes, then the scales. The codes, static ones less their offset too (at most 256 in size),
are numbers that bf16 holds exactly, and the product accumulates in fp32; so a float matrix product stands for the
runtime's, at a float layer's speed and memory. So it does for the MX types, whose values times powers of two bf16 holds
too. Float inputs (w8a16, GGUF) meet codes, or GGUF's blocks dequantized to the compute dtype, as their runtimes have
it. Nunchaku's types: `emulate.forward`, which dequantizes at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamq import emulate
from streamq.methods.activation import quantize_input
from streamq.methods.fourbit import HALF
from streamq.methods.rotation import rotate
from streamq.quantized import QuantizedLinear


class SimulatedLinear(nn.Module):
    """A layer of an 8-bit, MX or GGUF type that takes the float layer's place: [..., in] -> [..., out].

    Input and output have the input's dtype, the product is in `dtype`. Smoothing is undone around it, so that the
    layers next to it may still be float: the input is divided by `smooth` here, and the output multiplied by `rows`,
    which the next layer's `smooth` would cancel. A rotated layer's input is rotated.
    """

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        by_row = layer.scales.shape[1] == 1 and layer.zeros is None
        self.codes = (layer.codes if by_row else layer.dequantize()).to(dtype)
        self.scales = layer.scales.squeeze(1) if by_row else None
        self.bias = None if layer.bias is None else layer.bias.float()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.float()
        if self.layer.smooth is not None:
            x = x / self.layer.smooth
        if self.layer.rotation:
            x = rotate(x, self.layer.rotation)
        codes, scale = quantize_input(x, self.layer.scheme.pair.act, self.layer.static)
        y = nn.functional.linear(codes.to(self.codes.dtype), self.codes).float()
        for factor in (self.scales, scale):
            if factor is not None:
                y = y.mul_(factor)
        if self.bias is not None:
            y = y.add_(self.bias)
        return (y if self.layer.rows is None else y.mul_(self.layer.rows)).to(given)


class EmulatedLinear(nn.Module):
    """A 4-bit layer that takes the float layer's place: [..., in] -> [..., out], in the input's dtype.

    The kernels compute in half precision: an input that is neither bf16 nor fp16 goes through as bf16.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        half = x if x.dtype in emulate.HALVES else x.to(HALF)
        return emulate.forward(half, self.layer).to(x.dtype)


def put_in(module: nn.Module, name: str, layer: QuantizedLinear) -> None:
    """Replace a block's linear layer by one of its type, for as long as the block lives."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear), name
    made = EmulatedLinear(layer) if layer.scheme.four_bit else SimulatedLinear(layer, linear.weight.dtype)
    module.set_submodule(name, made)
