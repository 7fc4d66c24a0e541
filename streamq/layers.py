"""One layer's turn: its smoothing vectors, its codes for every target, and how far they are from the float layer.

Data-free layers take the same way with nothing to look at. Everything is on the device that the weights are on.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamq.methods import METHODS, RANGED, svdquant
from streamq.methods.activation import static_tensors
from streamq.methods.fourbit import HALF
from streamq.methods.int8 import RowRanges
from streamq.methods.report import output_error
from streamq.methods.smooth import awq, exact, exact_for_norm, search_alpha, smoothquant
from streamq.methods.statistics import InputStatistics
from streamq.pairs import QConfig
from streamq.quantized import OUTPUT_LIMIT, QuantizedLinear, Scheme, Smooth
from streamq.wan import block_of, group_of

if TYPE_CHECKING:
    from streamq.calibration.replay import Seen

FP16_SAFE = (2.0**-15, 2.0**14)  # of s, where the layer carries 1/s: a runtime may keep it in fp16


@dataclass
class Block:
    """What the layers of a unit at work share. `seen` None: data-free. `vectors`: made when first asked for.

    `layers`: those that are quantized already, by diffusers name; the first target's where there are several.
    """

    seen: Seen | None = None
    vectors: dict[Smooth, Tensor] = field(default_factory=dict)
    layers: dict[str, QuantizedLinear] = field(default_factory=dict)

    def vector(self, smooth: Smooth) -> Tensor:
        """The group's s [in] fp32, so rounded that its inverse is exact where it is kept."""
        if smooth not in self.vectors:
            self.vectors[smooth] = self._make(smooth)
        return self.vectors[smooth]

    def _make(self, smooth: Smooth) -> Tensor:
        assert self.seen is not None
        scheme = smooth.base
        if smooth.method == "ones":
            weight = self.seen.tensors[f"{smooth.layers[0]}.weight"]
            return torch.ones(weight.shape[1], device=weight.device)
        statistics = self.seen.statistics[smooth.group]
        weights = [self.seen.tensors[f"{layer}.weight"] for layer in smooth.layers]

        def settle(s: Tensor) -> Tensor:
            assert self.seen is not None
            if scheme.four_bit:  # whose runtime keeps s itself
                return s.clamp(*FP16_SAFE).to(HALF).float()
            norm = f"{block_of(smooth.group)}.{group_of(smooth.layers[0]).norm}.weight"
            if smooth.way == "norm":
                return exact_for_norm(s, self.seen.tensors[norm])
            return exact(s.clamp(*FP16_SAFE) if smooth.way == "layer" else s)

        # Of the weight alone: what happens to the input is the search's own business.
        rounded = replace(plain(scheme), pair=replace(plain(scheme).pair, act=QConfig("per_token", "int8")))

        def quantizer(w: Tensor) -> Tensor:
            return METHODS["fp8" if scheme.type == "fp8" else "w8a8"](w, None, rounded).dequantize()

        if smooth.method == "smoothquant":
            return settle(smoothquant(statistics.amax, weights, smooth.alpha, smooth.scale_min))
        if smooth.method == "svdquant":
            options = svdquant.options_of(scheme)
            return svdquant.search(statistics, weights, options, grid=smooth.grid, rows=smooth.rows).s
        if smooth.method == "search":
            return search_alpha(
                statistics, weights, scheme.pair.act, quantizer, scale_min=smooth.scale_min, settle=settle
            ).s
        return awq(statistics, weights, scheme.pair.act, quantizer, settle=settle).s


def plain(scheme: Scheme) -> Scheme:
    """The same type without any method: round to nearest, which is what a method is measured against."""
    given = scheme.pair.weight
    weight = QConfig(given.scope, given.dtype, given.symmetric)
    act = replace(scheme.pair.act, method="minmax", ext=()) if scheme.pair.act.dtype != "float" else scheme.pair.act
    return replace(scheme, smooth=None, rows=None, pair=replace(scheme.pair, act=act, weight=weight))


@torch.no_grad()
def quantize(
    name: str, weight: Tensor, bias: Tensor | None, scheme: Scheme, block: Block, out: Tensor,
    ranges: RowRanges | None = None,
) -> tuple[QuantizedLinear, dict[str, object]]:  # fmt: skip
    """A layer's codes, and its row of the report. `name`: diffusers name; `out`: int8 [out, in] to be filled.

    ranges: of this weight, where several schemes share it; for types in RANGED.
    """
    statistics = _statistics(name, block)
    columns = block.vector(scheme.smooth) if scheme.smooth else None
    rows = block.vector(scheme.rows) if scheme.rows else None
    # What needs no data warns of nothing, and may be at work in several threads, which share the process's filters.
    with warnings.catch_warnings(record=True) if scheme.needs_data else nullcontext([]) as said:
        if scheme.needs_data:
            warnings.simplefilter("always", RuntimeWarning)
        shared = {"ranges": ranges} if scheme.type in RANGED else {}
        layer = METHODS[scheme.type](weight, bias, scheme, out, columns=columns, rows=rows, stats=statistics, **shared)
    report: dict[str, object] = dict(_figures(layer, weight, statistics))
    notes = [str(one.message) for one in said or () if one.category is RuntimeWarning]
    if layer.static is not None and (saturated := static_tensors(layer)[-1]):
        notes.append(f"{saturated} biases are too large for int32 at their scale, and were cut to it")
    error = report.get("output_rel_error")
    if scheme.four_bit and isinstance(error, float) and error > OUTPUT_LIMIT:
        notes.append(f"its output is off by {error:.0%} on calibration data: leave it float, or give it another type")
    if notes:
        report["note"] = "; ".join(notes)
    if statistics is not None and plain(scheme) != scheme:
        before = METHODS[scheme.type](weight, bias, plain(scheme), stats=statistics)
        report["before"] = _figures(before, weight, statistics)
    return layer, report


def _statistics(name: str, block: Block) -> InputStatistics | None:
    if block.seen is None:
        return None
    return block.seen.statistics[f"{block_of(name)}.{group_of(name).name}"]


def _figures(layer: QuantizedLinear, weight: Tensor, statistics: InputStatistics | None) -> dict[str, float]:
    found = {"rel_error": layer.rel_error, "cosine": layer.cosine}
    if statistics is not None:
        error, cosine = output_error(statistics.rows, weight, layer, layer.scheme.pair.act)
        if math.isfinite(error):  # against an output of zeros it is not, and says nothing
            found |= {"output_rel_error": error, "output_cosine": cosine}
    return {key: _short(value) for key, value in found.items()}


def _short(value: float) -> float:
    """Six digits; of a cosine near 1, six digits of what it lacks."""
    return float(f"{value:.6g}") if not 0.9 < value <= 1 else 1 - float(f"{1 - value:.6g}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor is, without a mask of its size: amax and amin both hand a NaN on."""
    return math.isfinite(float(tensor.amax())) and math.isfinite(float(tensor.amin()))
