"""GGUF's blocks of 32 columns: Q8_0, and Q4_0 with a signed scale. Bit-equal to gguf-py (`gguf/quants.py`).

    Q8_0   d = max|x| / 127                                q = round_half_away(x · (1 / d))
    Q4_0   d = (x of the largest magnitude, the first) / -8    q = min(floor(x · (1 / d) + 8.5), 15)

In fp32, of the weight as it is; 1 / d is 0 where d is. d is stored in fp16, and the codes are those of the fp32 d. Q4_0
stands for (q - 8) · d. Where 1 / d is beyond fp32, d is 0 in fp16 too: the codes are 0.

Beside the codes it holds three tiles of fp32 rows (`int8.tile_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamq.methods.blocks import BlockJob
from streamq.methods.floats import BLOCK, block_amax
from streamq.methods.statistics import InputStatistics
from streamq.quantized import QuantizedLinear, Scheme


@torch.no_grad()
def quantize(
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    out: Tensor | None = None,
    *,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    stats: InputStatistics | None = None,
) -> QuantizedLinear:
    """Quantize a weight [out, in] of any float dtype as type q8_0 or q4_0. `out`: int8 [out, in] to be filled.

    Scales: d as fp16 keeps it, [out, in / 32] fp32; of q4_0 it may be negative, and zeros are -8 d. A block that holds
    NaN or Inf, or whose d is beyond fp16, gets a scale that is not finite; the caller looks.
    Raises ValueError for columns that are no multiple of 32. Inputs are not looked at, and nothing is smoothed.
    """
    assert columns is None and rows is None, "GGUF has no smoothing vectors"
    job = BlockJob(weight, scheme, out)
    for part, blocks, x, scratch in job.tiles():
        codes = job.codes[part].unflatten(1, (-1, BLOCK))
        d = _q8_0(blocks, codes, x, scratch) if scheme.type == "q8_0" else _q4_0(blocks, codes, x)
        job.keep(part, blocks, x, d.half().float())
    return job.result(bias, job.scales * -8 if scheme.type == "q4_0" else None)


def _q8_0(blocks: Tensor, codes: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    """d [n, blocks] fp32; fills codes, and x with what they are times d."""
    d = block_amax(blocks).div_(torch.full((), 127.0, device=blocks.device))
    torch.mul(blocks, _inverse(d).unsqueeze(2), out=x)
    codes.copy_(x)  # towards zero; on a CPU much faster than `trunc`
    # What is left is exact, and so is its double: an honest round half away, which |x| + 0.5 is not just below 0.5.
    codes.add_(x.sub_(scratch.copy_(codes)).mul_(2).to(torch.int8))
    x.copy_(codes)
    return d


def _q4_0(blocks: Tensor, codes: Tensor, x: Tensor) -> Tensor:
    """The same; a code less 8 is what is times d."""
    high, low = blocks.amax(dim=2), blocks.amin(dim=2)
    most = torch.where(high > -low, high, low)
    tied = high == -low
    if tied.any():
        among = blocks[tied]
        most[tied] = among.gather(1, among.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    d = most.div_(torch.full((), -8.0, device=blocks.device))
    inverse = _inverse(d)
    middle = torch.where((inverse == 0) & (d != 0), 0.5, 8.5).unsqueeze(2)
    codes.copy_(torch.mul(blocks, inverse.unsqueeze(2), out=x).add_(middle).floor_().clamp_(0, 15))
    x.sub_(8)
    return d


def _inverse(d: Tensor) -> Tensor:
    """1 / d, 0 where that is not finite."""
    inverse = d.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
