"""Quantization methods: pure functions, tensors in, `QuantizedLinear` out, on the tensors' own device."""

from __future__ import annotations

from collections.abc import Callable

from streamq.methods import int8
from streamq.quantized import QuantizedLinear

METHODS: dict[str, Callable[..., QuantizedLinear]] = {"w8a8": int8.quantize, "w8a8_static": int8.quantize}
