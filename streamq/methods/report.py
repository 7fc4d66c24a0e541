"""What quantizing a layer does to its output, on rows of its real input."""

from __future__ import annotations

import torch
from torch import Tensor

from streamq.methods.activation import fake_quantize
from streamq.quantized import QuantizedLinear
from streamq.recipe import QConfig

TILE_BYTES = 32 << 20


class _Sums:
    """Squared norms of two tensors that come in pieces, and of their difference."""

    def __init__(self) -> None:
        self.a = self.b = self.lost = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a.float(), b.float()
        self.a += float(torch.linalg.vector_norm(a)) ** 2
        self.b += float(torch.linalg.vector_norm(b)) ** 2
        self.lost += float(torch.linalg.vector_norm(a - b)) ** 2

    def result(self) -> tuple[float, float]:
        return relative_and_cosine(self.a, self.b, self.lost)


def relative_and_cosine(a: float, b: float, lost: float) -> tuple[float, float]:
    """(‖a - b‖ / ‖a‖, cosine of a and b) from ‖a‖², ‖b‖² and ‖a - b‖²; (0, 1) for two zeros, cosine 0 for one.

    2 a·b = ‖a‖² + ‖b‖² - ‖a - b‖²: for close tensors more exact than adding up the products.
    """
    if a == 0:
        return (0.0, 1.0) if b == 0 else (float("inf"), 0.0)
    if b == 0:
        return lost**0.5 / a**0.5, 0.0
    cosine = (a + b - lost) / (2 * a**0.5 * b**0.5)
    return lost**0.5 / a**0.5, max(-1.0, min(1.0, cosine))


@torch.no_grad()
def compare(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(relative error, cosine) of b against a, of equal shape and any float dtype."""
    sums = _Sums()
    sums.add(a, b)
    return sums.result()


@torch.no_grad()
def output_error(x_rows: Tensor, weight: Tensor, layer: QuantizedLinear, act: QConfig) -> tuple[float, float]:
    """(relative error, cosine) of the quantized layer's output against x W^T, without the bias, in fp32.

    x_rows [m, in], weight [out, in]: the source's own, of any float dtype. The layer's output is fake_quantize(x /
    smooth) · dequantized^T, times `rows` where the layer has them. Goes through in tiles of output rows.
    """
    x = x_rows.float()
    fed = fake_quantize(x if layer.smooth is None else x / layer.smooth, act, layer.static)
    sums = _Sums()
    step = max(1, TILE_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        made = fed @ layer.codes[part].float().mul_(layer.scales[part]).T
        if layer.rows is not None:
            made.mul_(layer.rows[part])
        sums.add(x @ weight[part].float().T, made)
    return sums.result()
