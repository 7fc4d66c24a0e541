"""What quantizing a layer does to its output, on rows of its real input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamq.methods import fourbit
from streamq.methods.activation import fake_quantize
from streamq.methods.rotation import rotate
from streamq.pairs import QConfig
from streamq.quantized import QuantizedLinear

TILE_BYTES = 32 << 20
WEIGHT_TILE_BYTES = 4 << 20


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
def weight_error(weight: Tensor, layer: QuantizedLinear) -> tuple[float, float]:
    """(relative error, cosine) of `layer.effective()` against weight [out, in] of any float dtype, tile by tile."""
    # Row norms: of the weight, of what it became, and of the difference.
    a, b, lost = (torch.empty(weight.shape[0], device=weight.device) for _ in range(3))
    for part in _tiles(weight, WEIGHT_TILE_BYTES):
        w, made = weight[part].float(), layer.effective(part)
        for kept, value in ((a, w), (b, made), (lost, w - made)):
            torch.linalg.vector_norm(value, dim=1, out=kept[part])
    if not torch.isfinite(lost).all():  # squares beyond fp32: once more, in double
        a, b, lost = (t.cpu().double() for t in (a, b, lost))
        for part in _tiles(weight, WEIGHT_TILE_BYTES):
            # On the host: an accelerator may have no fp64, and this happens to no sane weight.
            w, made = (t.cpu().double() for t in (weight[part], layer.effective(part)))
            for kept, value in ((a, w), (b, made), (lost, w - made)):
                kept[part] = value.norm(dim=1)
    norms = (float(t.cpu().double().square().sum()) for t in (a, b, lost))
    return relative_and_cosine(*norms)


@torch.no_grad()
def output_error(x_rows: Tensor, weight: Tensor, layer: QuantizedLinear, act: QConfig) -> tuple[float, float]:
    """(relative error, cosine) of the quantized layer's output against x W^T, without the bias, in fp32.

    x_rows [m, in], weight [out, in]: the source's own, of any float dtype. The layer's output is fake_quantize(x /
    smooth, rotated) · dequantized^T, with Nunchaku's activations as its kernels round them, plus the low-rank branch of
    x itself, times `rows`, where the layer has these. Sums and their results are not rounded to half precision, as they
    are in the kernels. Goes through in tiles of output rows.
    """
    x, branch = x_rows.float(), layer.low_rank
    smoothed = x if layer.smooth is None else x / layer.smooth
    if layer.rotation:
        smoothed = rotate(smoothed, layer.rotation)
    if act.dtype in fourbit.GROUP:
        fed = fourbit.fake_quantize_input(smoothed, act.dtype)
    else:
        fed = fake_quantize(smoothed, act, layer.static)
    inner = None if branch is None else x @ branch.down.float().T
    sums = _Sums()
    for part in _tiles(weight, TILE_BYTES):
        made = fed @ layer.dequantize(part).T
        if branch is not None and inner is not None:
            made.addmm_(inner, branch.up[part].float().T)
        if layer.rows is not None:
            made.mul_(layer.rows[part])
        sums.add(x @ weight[part].float().T, made)
    return sums.result()


def _tiles(weight: Tensor, size: int) -> Iterator[slice]:
    step = max(1, size // (4 * weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
