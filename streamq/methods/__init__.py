"""Quantization methods: pure functions, tensors in, `QuantizedLinear` out, on the tensors' own device."""

from __future__ import annotations

from collections.abc import Callable

from streamq.methods import fp8, ggml, int4, int8, mx, svdquant
from streamq.quantized import QuantizedLinear

METHODS: dict[str, Callable[..., QuantizedLinear]] = {
    "w8a8": int8.quantize,
    "w8a8_static": int8.quantize,
    "w8a16": int8.quantize,
    "fp8": fp8.quantize,
    "q8_0": ggml.quantize,
    "q4_0": ggml.quantize,
    "w8a8_mxfp8": mx.quantize,
    "w4a4_mxfp4": mx.quantize,
    "w4a4": svdquant.quantize,
    "w4a4_nvfp4": svdquant.quantize,
    "w4a16": int4.quantize,
}
# Those that look at whole rows, and take what another scheme has seen in them (`int8.RowRanges`).
RANGED = ("w8a8", "w8a8_static", "w8a16", "fp8")
