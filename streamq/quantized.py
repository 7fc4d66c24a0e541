"""The record that methods produce and everybody else consumes, and the numeric rules under which it was made.

`QuantizedLinear.dequantize` is the single definition of what was meant: every packed format is checked against it.
"""

from __future__ import annotations

import base64
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
class Smooth:
    """How the layers that share an input get their smoothing vector s: x / s is fed to W · s.

    `method`: smoothquant (s = amax_x^alpha / amax_w^(1 - alpha)), search (the alpha of least output error), awq
    (s = mean_x^r, r searched), or ones, where a format wants a vector and there is none. `layers`: diffusers names of
    the quantized layers that it is made over. `way`: where 1/s goes, one of wan.WAYS. `base`: the first layer's scheme
    without smoothing, by which candidates are tried.
    """

    method: str
    alpha: float
    scale_min: float
    group: str
    layers: tuple[str, ...]
    way: str
    base: Scheme


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized for one format. Two formats with equal schemes share one result.

    smooth: the vector by which the input is divided and the weight's columns are multiplied. rows: the vector by which
    the weight's rows and the bias are divided, because the layer behind takes it as its own `smooth`.
    """

    type: str
    pair: Pair
    rule: Int8Rule
    smooth: Smooth | None = None
    rows: Smooth | None = None

    @property
    def label(self) -> str:
        """The type as users see it."""
        return f"{self.type}_smooth" if self.smooth else self.type


@dataclass(frozen=True)
class StaticInput:
    """A static int8 activation: x ≈ (q - offset) · scale, q from -128 to 127 (symmetric: offset 0)."""

    scale: float
    offset: float


@dataclass
class QuantizedLinear:
    """A quantized linear layer, on whatever device it was made.

    codes: int8 [out, in]. scales: float32 [out, 1], equal to what is stored. bias: source dtype [out], or None; divided
    by `rows` already. source_dtype: the float weight's own, in which some formats store scales.
    smooth: float32 [in], by which the runtime divides the input; rows: float32 [out], by which weight and bias are
    divided; static: the activation's fixed range.
    rel_error, cosine: of the weight against `effective()`, over all elements; 0.0 and 1.0 for a zero matrix.
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    source_dtype: torch.dtype
    rel_error: float
    cosine: float = 1.0
    smooth: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    static: StaticInput | None = None

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [out, in] that the runtime multiplies with."""
        return self.codes.float().mul_(self.scales)

    def effective(self) -> torch.Tensor:
        """The float32 weight [out, in] that this stands for, smoothing undone: what is compared with the source."""
        weight = self.dequantize()
        if self.smooth is not None:
            weight = weight.div_(self.smooth)
        return weight if self.rows is None else weight.mul_(self.rows.unsqueeze(1))


def encode_vector(vector: torch.Tensor) -> str:
    """A vector as the journal and the manifest hold it: base64 of little-endian float32."""
    return base64.b64encode(vector.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def decode_vector(text: str) -> torch.Tensor:
    """The same back, float32 [n]. Raises ValueError for what is not such a text."""
    import torch

    raw = bytearray(base64.b64decode(text, validate=True))
    if len(raw) % 4 or not raw:
        raise ValueError(f"{len(raw)} bytes are no float32 vector")
    return torch.frombuffer(raw, dtype=torch.float32)
