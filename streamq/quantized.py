"""The record that methods produce and everybody else consumes, and the numeric rules under which it was made.

`QuantizedLinear.dequantize` is the single definition of what was meant: every packed format is checked against it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamq.pairs import Pair

if TYPE_CHECKING:
    import torch

E2M1_TYPES = ("w4a4_nvfp4", "w4a4_mxfp4")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
ALL = slice(None)
OUTPUT_LIMIT = 0.5  # of a 4-bit layer on calibration data: beyond, nothing of its output is left
FOUR_BIT = ("w4a4", "w4a4_nvfp4", "w4a16")  # Nunchaku's, whose smoothing and scales are part of the type
PACKED = (*FOUR_BIT, "w4a4_mxfp4", "q8_0", "q4_0")  # stored in other bytes than the codes
# Bytes a weight of what is held beside codes: fp32 scales of blocks of columns, zeros, mxfp8's exponents.
SCALE_BYTES = {"q8_0": 4 / 32, "q4_0": 8 / 32, "w8a8_mxfp8": 5 / 32, "w4a4_mxfp4": 4 / 32,
               "w4a4": 4 / 64, "w4a16": 8 / 64, "w4a4_nvfp4": 4 / 16}  # fmt: skip
LABELS = {"q8_0": "w8a16", "q4_0": "w4a16"}  # GGUF's blocks of 32 are its form of these types


@dataclass(frozen=True)
class Rule:
    """What a runtime, or the tool whose bytes are to be matched, does around `q = round(w / s)`.

    `s = max(max(amax, amax_floor) / 127, scale_floor)` (e4m3: 448), rounded to `scale_dtype` before it is used.
    `arithmetic`: "fp32" and "bf16" cast weight and bias first; "source" does every operation in the checkpoint's own
    dtype; "torchao" is that library's (`methods.int8`, `methods.fp8`). `fp8_halves`: "even", or "away" from zero.
    """

    amax_floor: float = 0.0
    scale_floor: float = 0.0
    scale_dtype: str = "F32"
    qmin: int = -128
    arithmetic: str = "fp32"
    fp8_halves: str = "even"


@dataclass(frozen=True)
class Smooth:
    """How the layers that share an input get their smoothing vector s: x / s is fed to W · s.

    `method`: smoothquant (s = amax_x^alpha / amax_w^(1 - alpha)), search (the alpha of least output error), awq
    (s = mean_x^r, r searched), svdquant (both exponents searched, with what the low-rank branch leaves; `grid`: full,
    coarse, `rows`: of the kept ones, how many try a candidate), or ones, where a format wants a vector and there is
    none. `layers`: diffusers names of the quantized layers that it is made over. `way`: where 1/s goes, one of
    wan.WAYS. `base`: the first layer's scheme without smoothing, by which candidates are tried.
    """

    method: str
    alpha: float
    scale_min: float
    group: str
    layers: tuple[str, ...]
    way: str
    base: Scheme
    grid: str = ""
    rows: int = 0


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized for one format. Two formats with equal schemes share one result.

    smooth: the vector by which the input is divided and the weight's columns are multiplied. rows: the vector by which
    the weight's rows and the bias are divided, because the layer behind takes it as its own `smooth`.
    """

    type: str
    pair: Pair
    rule: Rule
    smooth: Smooth | None = None
    rows: Smooth | None = None

    @property
    def label(self) -> str:
        """The type as users see it. Smoothing is part of what Nunchaku's types are."""
        kind = LABELS.get(self.type, self.type)
        return f"{kind}_smooth" if self.smooth and not self.four_bit else kind

    @property
    def four_bit(self) -> bool:
        """Whether it is one of Nunchaku's types."""
        return self.type in FOUR_BIT

    @property
    def gram(self) -> bool:
        """Whether its method needs the Gram matrix of the input."""
        weight = self.pair.weight
        return weight.method == "gptq" or weight.method == "svdquant" and bool(dict(weight.ext).get("gptq"))

    @property
    def needs_data(self) -> bool:
        """Whether anything about it is made from the layer's inputs."""
        weight, act = self.pair.weight, self.pair.act
        weighted = weight.dtype == "int4" and weight.method == "mse" and dict(weight.ext).get("weighted", True)
        static = act.scope == "per_tensor" and act.dtype != "float"
        return bool(self.smooth or self.rows or static or weighted or weight.method in ("gptq", "svdquant"))

    @property
    def scale_bytes(self) -> float:
        """Bytes of scales and zeros for each weight; 0.0 where there is one scale a row."""
        return SCALE_BYTES.get(self.type, 0.0)

    @property
    def packed(self) -> bool:
        """Whether a format stores other bytes than the codes: two in a byte, or scales among them."""
        return self.type in PACKED


@dataclass(frozen=True)
class StaticInput:
    """A static int8 activation: x ≈ (q - offset) · scale, q from -128 to 127 (symmetric: offset 0)."""

    scale: float
    offset: float


@dataclass(frozen=True)
class LowRank:
    """What is added to a layer's output in half precision: y += (x @ down^T) @ up^T, of x as it comes, not smoothed.

    down: bfloat16 [R, in]; up: bfloat16 [out, R].
    """

    down: torch.Tensor
    up: torch.Tensor


@dataclass
class QuantizedLinear:
    """A quantized linear layer, on whatever device it was made.

    codes: int8 [out, in]: whole numbers (int8, int4 -7..7, w4a16 and q4_0 0..15), or e2m1's 4 bits as a number 0..15
    (nvfp4, mxfp4); for fp8 and mxfp8 float8_e4m3fn [out, in].
    scales: float32, equal to what is stored: [out, 1] (fp8 with one scale a matrix too: all equal), or
    [out, in / group] where columns are in groups (mx: powers of two).
    zeros: float32 [out, in / group], added behind the scales (w4a16, q4_0). tensor_scale: float32 [1] (nvfp4).
    bias: source dtype [out], or None; divided by `rows` already. source_dtype: the float weight's own, in which some
    formats store scales. smooth: float32 [in], by which the runtime divides the input; rows: float32 [out], by which
    weight and bias are divided; static: the activation's fixed range; low_rank: the branch beside the codes.
    rotation: 0, or the group size n of ConvRot: the codes stand for W · H^T, and x · H^T is fed to them
    (`methods.rotation`).
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
    zeros: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None
    low_rank: LowRank | None = None
    rotation: int = 0

    def dequantize(self, part: slice = ALL) -> torch.Tensor:
        """The float32 weight [out, in], or some of its rows, that the runtime multiplies the codes of x with."""
        codes, scales = self.codes[part], self.scales[part]
        weight = e2m1_values(codes) if self.scheme.type in E2M1_TYPES else codes.float()
        if scales.shape[1] == 1 and self.zeros is None:
            return weight.mul_(scales)
        if self.tensor_scale is not None:
            scales = scales * self.tensor_scale
        grouped = weight.unflatten(1, (scales.shape[1], -1)).mul_(scales.unsqueeze(2))
        if self.zeros is not None:
            grouped.add_(self.zeros[part].unsqueeze(2))
        return weight

    def effective(self, part: slice = ALL) -> torch.Tensor:
        """The float32 weight [out, in], or some rows, that all of it stands for: what is compared with the source."""
        weight = self.dequantize(part)
        if self.rotation:
            from streamq.methods.rotation import unrotate

            weight = unrotate(weight, self.rotation)
        if self.smooth is not None:
            weight = weight.div_(self.smooth)
        if self.low_rank is not None:
            weight.addmm_(self.low_rank.up[part].float(), self.low_rank.down.float())
        return weight if self.rows is None else weight.mul_(self.rows[part].unsqueeze(1))


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes 0..15 of any integer dtype -> float32: 0, .5, 1, 1.5, 2, 3, 4, 6, and the same negative from 8 on."""
    import torch

    return torch.tensor((*E2M1, *(-value for value in E2M1)), device=codes.device)[codes.int()]


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
