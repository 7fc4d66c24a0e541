"""The record that methods produce and everybody else consumes, and the numeric rules under which it was made.

`QuantizedLinear.dequantize` is the single definition of what was meant: every packed format is checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamq.recipe import Pair

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Int8Rule:
    """What a runtime, or the tool whose bytes are to be matched, does around `q = round(w / s)`.

    `s = max(max(amax, amax_floor) / 127, scale_floor)`, rounded to `scale_dtype` before it is used. `arithmetic` "fp32"
    and "bf16" cast weight and bias first; "source" does every operation in the checkpoint's own dtype.
    """

    amax_floor: float = 0.0
    scale_floor: float = 0.0
    scale_dtype: str = "F32"
    qmin: int = -128
    arithmetic: str = "fp32"


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized for one format. Two formats with equal schemes share one result."""

    type: str
    pair: Pair
    rule: Int8Rule


@dataclass
class QuantizedLinear:
    """A quantized linear layer, on whatever device it was made.

    codes: int8 [out, in]. scales: float32 [out, 1], equal to what is stored. bias: source dtype [out], or None.
    source_dtype: the float weight's own, in which some formats store scales.
    rel_error: ‖W - dequantized‖ / ‖W‖ (Frobenius), 0.0 for a zero matrix.
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    source_dtype: torch.dtype
    rel_error: float

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [out, in] that the runtime multiplies with."""
        return self.codes.float().mul_(self.scales)
