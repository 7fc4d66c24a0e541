"""Quantization methods: pure functions, tensors in, `QuantizedLinear` out, on the tensors' own device."""

from __future__ import annotations

from collections.abc import Callable

from streamq.methods import int4, int8, svdquant
from streamq.quantized import QuantizedLinear

METHODS: dict[str, Callable[..., QuantizedLinear]] = {
    "w8a8": int8.quantize,
    "w8a8_static": int8.quantize,
    "w4a4": svdquant.quantize,
    "w4a4_nvfp4": svdquant.quantize,
    "w4a16": int4.quantize,
}
