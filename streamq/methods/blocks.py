"""A matrix in blocks of 32 columns on its way through a method: tiles in, codes and scales out, errors at the end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamq.methods import int8
from streamq.methods.floats import BLOCK
from streamq.methods.report import relative_and_cosine, weight_error
from streamq.quantized import QuantizedLinear, Scheme

TILES = 6  # the most that a method holds, with what comes and goes


class BlockJob:
    """What is filled in tile by tile, and the scratch memory for that, as large as a tile: `w`, `x` and `scratch`."""

    def __init__(self, weight: Tensor, scheme: Scheme, out: Tensor | None, kept: torch.dtype = torch.float32) -> None:
        """kept: what the weight is rounded to first, if that is narrower than its own dtype."""
        count, width = weight.shape
        if width % BLOCK:
            raise ValueError(f"{scheme.type} of {width} columns: no multiple of the block size {BLOCK}")
        device = weight.device
        self.weight, self.scheme = weight, scheme
        self.kept = weight.dtype if kept == torch.float32 else kept
        self.codes = torch.empty(count, width, dtype=torch.int8, device=device) if out is None else out
        self.scales = torch.empty(count, width // BLOCK, device=device)
        self.step = int8.tile_rows(width, device, TILES)
        shape = min(self.step, count), width // BLOCK, BLOCK
        self.w, self.x, self.scratch = (torch.empty(shape, device=device) for _ in range(3))
        # Row norms: of the error, of the weight, and of what it became.
        self.lost, self.norm, self.made = (torch.empty(count, device=device) for _ in range(3))

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows, these as fp32 in blocks [n, blocks, 32], `x` and `scratch` in that shape), tile by tile.

        A tile that is fp32 already is a view of the weight.
        """
        count = self.weight.shape[0]
        for start in range(0, count, self.step):
            part = slice(start, min(start + self.step, count))
            rows, size = self.weight[part].unflatten(1, (-1, BLOCK)), part.stop - part.start
            if rows.dtype != torch.float32 or self.kept != rows.dtype:
                rows = self.w[:size].copy_(rows.to(self.kept))
            yield part, rows, self.x[:size], self.scratch[:size]

    def keep(self, part: slice, blocks: Tensor, values: Tensor, scales: Tensor) -> None:
        """A tile's scales [n, blocks], and its errors: values [n, blocks, 32] fp32, times these, is what it became.

        values: overwritten.
        """
        self.scales[part] = scales
        made = values.mul_(scales.unsqueeze(2)).flatten(1)
        if self.kept != self.weight.dtype:  # the error is against what the source holds
            blocks = self.w[: len(blocks)].copy_(self.weight[part].unflatten(1, (-1, BLOCK)))
        torch.linalg.vector_norm(made, dim=1, out=self.made[part])
        torch.linalg.vector_norm(blocks.flatten(1), dim=1, out=self.norm[part])
        torch.linalg.vector_norm(made.sub_(blocks.flatten(1)), dim=1, out=self.lost[part])

    def result(self, bias: Tensor | None, zeros: Tensor | None = None) -> QuantizedLinear:
        """The record, with the errors over the whole matrix."""
        layer = QuantizedLinear(self.scheme, self.codes, self.scales, bias, self.weight.dtype, 0.0, zeros=zeros)
        if torch.isfinite(self.lost).all():
            a, b, lost = (float(t.cpu().double().square().sum()) for t in (self.norm, self.made, self.lost))
            layer.rel_error, layer.cosine = relative_and_cosine(a, b, lost)
        else:  # squares beyond fp32
            layer.rel_error, layer.cosine = weight_error(self.weight, layer)
        return layer
