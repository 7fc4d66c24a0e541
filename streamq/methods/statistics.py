"""What a linear layer's inputs were like over all calibration samples, gathered in one pass and in fixed memory.

The ranges see every row; the Gram matrix and the kept rows see evenly spaced ones, at other positions in each sample.
Nothing here grows with the number of samples, and nothing is random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 2048
LEAST_RANGE = 2.0**-40  # of a histogram; a first sample that is all zero must not pin it to nothing
TILE_ROWS = 128  # 2.5 MiB of fp32 at 5120 columns: in the processor's cache
GRAM_TILE_ROWS = 2048
# Numerators of golden-ratio steps over 2^16: consecutive samples' phases lie as far apart as they can.
PHASE, PHASES = 40503, 1 << 16


@dataclass(frozen=True)
class Wanted:
    """What to accumulate besides the ranges.

    rows: how many input rows to keep in all, spread over samples and positions. gram_rows: at most so many rows of each
    sample enter the Gram matrix, evenly spaced; 0 for all of them.
    """

    mean: bool = False
    histogram: bool = False
    gram: bool = False
    rows: int = 0
    gram_rows: int = 2048


class Histogram:
    """Counts [2048] int64 of values in equal bins over [-limit, limit), limit a power of two.

    A value beyond doubles the limit, for which bins merge in pairs. Bin edges are then multiples of a power of two, so
    scaling and merging are exact, and the counts do not depend on the order of what was added.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.limit = LEAST_RANGE

    def add(self, x: Tensor, amax: float) -> None:
        """Count all of x [rows, columns], any float dtype; `amax`: its finite max |x|."""
        while self.limit <= amax:  # strictly above: then nothing has to be clamped into the last bin
            self._double()
        # By a power of two: exact, also as a product with a reciprocal.
        factor = BINS / 2 / self.limit
        for tile in x.split(TILE_ROWS):
            index = (tile.float() * factor).floor_()
            # A negative value may underflow to zero, where it would be on the other side.
            index.sub_(((tile < 0) & (index == 0)).float()).add_(BINS // 2)
            self.counts += torch.bincount(index.int().flatten(), minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Count what another one has counted, and double its limit to this one's if it is less."""
        while self.limit < other.limit:
            self._double()
        while other.limit < self.limit:
            other._double()
        self.counts += other.counts.to(self.counts.device)

    def _double(self) -> None:
        merged = self.counts.view(-1, 2).sum(dim=1)
        self.counts.zero_()
        self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
        self.limit *= 2

    def edges(self) -> Tensor:
        """[2049] fp64 on the host."""
        return torch.arange(-BINS // 2, BINS // 2 + 1, dtype=torch.float64) * (2 * self.limit / BINS)


def spread(count: int, length: int, phase: int) -> Tensor:
    """[min(count, length)] int64 row numbers below `length`, evenly spaced, rising; `phase` shifts them all."""
    if count >= length:
        return torch.arange(length)
    return (torch.arange(count) * PHASES + phase * PHASE % PHASES) * length // (count * PHASES)


class InputStatistics:
    """Accumulates over `n_samples` inputs [..., columns] of one layer (or of layers that share their input).

    columns_lo, columns_hi: [K] fp32, min(0, min) and max(0, max) of each channel over all rows so far. gram: [K, K]
    fp32 sum of x^T x over `gram_count` rows, or None. rows: [m, K] in x's dtype, m <= wanted.rows. histogram: or None.
    sample_amax: [n_samples] fp32, max |x| of each sample, 0 of those to come.
    NaN and Inf stay visible in `amax`; they enter neither histogram nor anything that needs it.
    """

    def __init__(self, columns: int, wanted: Wanted, n_samples: int, device: torch.device) -> None:
        self.columns, self.wanted, self.n_samples, self.device = columns, wanted, n_samples, device
        self.samples = self.count = self.gram_count = self._filled = 0
        self.columns_lo = torch.zeros(columns, device=device)
        self.columns_hi = torch.zeros(columns, device=device)
        self.sample_amax = torch.zeros(n_samples, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if wanted.gram else None
        self.histogram = Histogram(device) if wanted.histogram else None
        self._mean = torch.zeros(columns, device=device) if wanted.mean else None
        self._rows: Tensor | None = None

    @property
    def amax(self) -> Tensor:
        """[K] fp32, max |x| of each channel; not finite where x was not."""
        return torch.maximum(self.columns_hi, -self.columns_lo)

    @property
    def lo(self) -> Tensor:
        """0-dim fp32: min(0, min x)."""
        return self.columns_lo.amin()

    @property
    def hi(self) -> Tensor:
        """0-dim fp32: max(0, max x)."""
        return self.columns_hi.amax()

    @property
    def mean(self) -> Tensor:
        """[K] fp32, mean |x| of each channel. Raises ValueError if it was not wanted."""
        if self._mean is None:
            raise ValueError("the mean of the inputs was not wanted")
        return self._mean

    @property
    def rows(self) -> Tensor:
        """[m, K] rows kept so far, in the order of samples."""
        return torch.empty(0, self.columns, device=self.device) if self._rows is None else self._rows[: self._filled]

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take one sample's input [..., K], of any float dtype. Raises ValueError for another width or one too many."""
        self.add(self.look(x, self.samples))

    @torch.no_grad()
    def look(self, x: Tensor, number: int) -> Sample:
        """What the `number`-th sample's input [..., K], any float dtype, is to add. Raises ValueError as `update`."""
        if x.shape[-1] != self.columns or number >= self.n_samples:
            raise ValueError(f"sample {number} of {self.n_samples} is {list(x.shape)}, not {self.columns} wide")
        x = x.detach().reshape(-1, self.columns)
        zeros, length = torch.zeros(self.columns, device=self.device), x.shape[0]
        if not length:
            return Sample(number, 0, zeros, zeros)
        # max and min of bf16 are exact, and reducing over rows is as fast as memory: no fp32 copy.
        seen = Sample(number, length, x.amax(dim=0).float(), x.amin(dim=0).float())
        if self._mean is not None:
            seen.mean = _mean(x)
        if self.histogram is not None:
            amax = float(torch.maximum(seen.high, -seen.low).amax())
            if amax < float("inf"):  # a NaN compares false too
                seen.histogram = Histogram(self.device)
                seen.histogram.limit = self.histogram.limit  # to which it would be doubled anyway
                seen.histogram.add(x, amax)
        if self.gram is not None:
            seen.gram_rows = _chosen(x, self.wanted.gram_rows or length, number)
        if self.wanted.rows:
            # Shares that add up to the total, also where there are more samples than rows.
            total, n = self.wanted.rows, self.n_samples
            seen.rows = _chosen(x, total * (number + 1) // n - total * number // n, number)
        return seen

    @torch.no_grad()
    def add(self, seen: Sample) -> None:
        """Take what was seen of a sample, here or by another process: in the order of samples, as sums round."""
        if seen.number != self.samples:
            raise ValueError(f"sample {seen.number} after {self.samples} others")
        self.samples += 1
        if not seen.length:
            return
        seen.to(self.device)
        torch.maximum(self.columns_hi, seen.high, out=self.columns_hi)
        torch.minimum(self.columns_lo, seen.low, out=self.columns_lo)
        self.sample_amax[seen.number] = torch.maximum(seen.high, -seen.low).amax()
        self.count += seen.length
        if self._mean is not None and seen.mean is not None:
            # A running mean: its rounding error does not grow as that of a sum over millions of rows would.
            self._mean += seen.mean.sub_(self._mean).mul_(seen.length / self.count)
        if self.histogram is not None and seen.histogram is not None:
            self.histogram.merge(seen.histogram)
        if self.gram is not None and seen.gram_rows is not None:
            for part in seen.gram_rows.split(GRAM_TILE_ROWS):
                rows = part.float()
                self.gram.addmm_(rows.T, rows)
            self.gram_count += len(seen.gram_rows)
        if seen.rows is not None:
            if self._rows is None:
                self._rows = torch.empty(self.wanted.rows, self.columns, dtype=seen.rows.dtype, device=self.device)
            self._rows[self._filled : self._filled + len(seen.rows)] = seen.rows
            self._filled += len(seen.rows)


@dataclass
class Sample:
    """What one sample's input [length, K] adds: high, low, mean: [K] fp32 max, min and mean |x| of its columns.

    gram_rows, rows: those that enter the Gram matrix, and those that are kept, [m, K] in the input's dtype.
    """

    number: int
    length: int
    high: Tensor
    low: Tensor
    mean: Tensor | None = None
    histogram: Histogram | None = None
    gram_rows: Tensor | None = None
    rows: Tensor | None = None

    def to(self, device: torch.device) -> Sample:
        """Itself, with its tensors moved."""
        self.high, self.low = self.high.to(device), self.low.to(device)
        for name in ("mean", "gram_rows", "rows"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))
        if self.histogram is not None:
            self.histogram.counts = self.histogram.counts.to(device)
        return self


def _mean(x: Tensor) -> Tensor:
    """[K] fp32, of |x|."""
    total = torch.zeros(x.shape[1], device=x.device)
    for tile in x.split(TILE_ROWS):
        total += tile.float().abs().sum(dim=0)
    return total.div_(torch.full((), float(x.shape[0]), device=x.device))


def _chosen(x: Tensor, count: int, number: int) -> Tensor:
    """At most `count` rows of x, evenly spaced; x itself where that is all."""
    return x if count >= x.shape[0] else x[spread(count, x.shape[0], number).to(x.device)]
