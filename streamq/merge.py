"""The arithmetic of merging LoRAs into a weight, in fp32 and in row tiles. `streamq.lora` says what goes where.

    for every tile of rows of W:  acc = fp32(W);  acc += scale · (up @ down), or scale · diff, LoRA after LoRA;  W = acc

`scale · (…)` is rounded before it is added, as two operations of a plain program are. A tile has a multiple of 64 rows:
on the CPUs that this was tried on its products then have the bits of the whole product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamq.checkpoint import Source, TensorInfo
from streamq.device.cpu import host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.errors import RunError
from streamq.layers import is_finite
from streamq.lora import Delta, MergedSource, matrix_of, merge_nbytes, tile_rows


class _Room:
    """Memory for temporaries, handed out front to back as fp32 at multiples of 64 bytes."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._used = memory, 0

    def take(self, rows: int, columns: int) -> Tensor:
        start, nbytes = self._used, 4 * rows * columns
        self._used += -(-nbytes // 64) * 64
        return self._memory[start : start + nbytes].view(torch.float32).view(rows, columns)


@torch.no_grad()
def merge(
    source: MergedSource, info: TensorInfo, tensor: Tensor, factors: Sequence[Sequence[Tensor]], room: Tensor
) -> None:
    """Add a tensor's deltas to it, in place. `factors`: of each delta, in the files' dtypes, on the tensor's device.

    `room`: uint8, at least `merge_nbytes`, at a multiple of 64 bytes. Raises RunError for NaN or Inf in the weight, in
    a factor, or in what comes of them.
    """
    deltas, where = source.deltas(info), source.checkpoint.where(info)
    _check(source, info, tensor, factors)
    rows, columns = matrix_of(info.shape)
    step, matrix, memory = tile_rows(info.shape), tensor.view(rows, columns), _Room(room)
    wide, product = memory.take(step, columns), memory.take(step, columns)
    up = memory.take(step, max((delta.rank for delta in deltas if len(delta.factors) == 2), default=0))
    pairs = []
    for delta, tensors in zip(deltas, factors, strict=True):
        first = tensors[0].reshape(-1, columns)
        if len(tensors) == 2:
            first = first if first.dtype == torch.float32 else memory.take(*first.shape).copy_(first)
        pairs.append((source.scale(delta), first, tensors[1].reshape(rows, -1) if len(tensors) == 2 else None))
    for start in range(0, rows, step):
        part = matrix[start : start + step]
        count = len(part)
        acc, add = wide[:count].copy_(part), product[:count]
        for scale, first, second in pairs:
            if second is None:
                add.copy_(first[start : start + step])
            else:
                left = up.view(-1)[: count * len(first)].view(count, len(first)).copy_(second[start : start + step])
                torch.mm(left, first, out=add)
            acc.add_(add.mul_(scale))
        part.copy_(acc)
    if not is_finite(tensor):
        names = ", ".join(dict.fromkeys(source.where(d, d.factors[0]).rpartition("/")[2] for d in deltas))
        raise RunError(f"{where}: too large for {info.dtype} once {names} is merged; give a smaller strength")


def _check(source: MergedSource, info: TensorInfo, tensor: Tensor, factors: Sequence[Sequence[Tensor]]) -> None:
    for delta, tensors in zip(source.deltas(info), factors, strict=True):
        for factor, values in zip(delta.factors, tensors, strict=True):
            if not is_finite(values):
                raise RunError(
                    f"--lora: {source.where(delta, factor)}: NaN or Inf in it; the LoRA is damaged: download it again,"
                    " then run the same command with --no_resume"
                )
    if not is_finite(tensor):
        raise RunError(
            f"{source.checkpoint.where(info)}: NaN or Inf in it; the source is damaged: download it again, then run the"
            " same command with --no_resume"
        )


def merged(source: Source, info: TensorInfo, tensor: Tensor) -> Tensor:
    """A whole tensor that was read from a source, with its LoRAs in it; the tensor itself where it has none."""
    if not isinstance(source, MergedSource) or not source.deltas(info):
        return tensor
    deltas = source.deltas(info)
    factors = [[_read(source, delta, factor).to(tensor.device) for factor in delta.factors] for delta in deltas]
    room = torch.empty(merge_nbytes(info.shape, deltas), dtype=torch.uint8, device=tensor.device)
    merge(source, info, tensor, factors, room)
    return tensor


def _read(source: MergedSource, delta: Delta, factor: TensorInfo) -> Tensor:
    tensor = torch.empty(factor.shape, dtype=TORCH_DTYPES[factor.dtype])
    source.read_factor(delta, factor, 0, host_bytes(tensor))
    source.drop_factor(delta, factor)
    return tensor
