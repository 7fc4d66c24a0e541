"""SVDQuant (Li et al. 2024, arXiv 2411.05007): 4-bit weights and inputs beside a low-rank branch in bf16.

    W · S ≈ Q + U D        y ≈ quant(x / S) Q^T + x (D / S)^T U^T

The algorithm is mit-han-lab/deepcompressor's, layer by layer on rows of the float model's inputs. S comes from a search
over exponents of the ranges of x and W; U and D from turns of factors of W · S - Q and rounding of W · S - U D, which
leaves 13 to 16 % less output error than the first turn (on the toy model, for prompts that calibration has not seen).
What is judged is what is stored and how Nunchaku's kernels compute with it: S, U and D / S in bf16, the residual taken
against those.

Weights go through in tiles of T rows, of low_rank.CPU_TILE_BYTES or DEVICE_TILE_BYTES in fp32. Peak of memory in bytes
beside what the caller holds, for m rows, r = R + 8 and groups of G columns:

    search     8 m K + 4 m (N of all weights) + 4 r (K of all weights) + 28 r (N + K) + 4 T (8 K + m)
    quantize   4 N K / G, N K without `out`, 4 T (8 K + m), and the larger of
      branch   4 N K + 8 m K + 4 m N + 28 r (N + K)
      GPTQ     4 N K + 20 K², then 8 N K (int4: 5 N K) + 8 K² + two of gptq.PART_BYTES, or 8 N K where that is less

Without a branch there is neither of the two. `exact` factors take 16 N K + 24 min(N, K)² more, on the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamq.methods.fourbit import (
    GROUP,
    HALF,
    codes_of,
    fake_quantize_input,
    round_e2m1_,
    round_weight_,
    tensor_scale,
)
from streamq.methods.gptq import gptq
from streamq.methods.low_rank import COLD_ROUNDS, factors, tile_rows
from streamq.methods.report import weight_error
from streamq.methods.smooth import column_amax
from streamq.methods.statistics import InputStatistics, spread
from streamq.quantized import LowRank, QuantizedLinear, Scheme

STEPS = 20
# Exponents (of the input's range, of the weight's): two families, each one a path along which S changes little by
# little.
CANDIDATES = tuple((i / STEPS, 0.0) for i in range(STEPS)) + tuple((i / STEPS, 1 - i / STEPS) for i in range(1, STEPS))
COARSE = 3
GRIDS = ("full", "coarse")


@dataclass(frozen=True)
class Options:
    """How weights are rounded. rank 0: no branch, plainly. rounds: at most, of the branch's search. svd: of `factors`.

    gptq, damping, act_order: whether and how what the branch leaves is rounded by GPTQ.
    """

    precision: str
    rank: int = 0
    rounds: int = 100
    gptq: bool = False
    damping: float = 0.01
    act_order: bool = True
    svd: str = "auto"


@dataclass(frozen=True)
class Found:
    """A search's result. s: [K] fp32, bf16 numbers. choice: the exponents (of x, of W).

    error, plain: squared output error over the rows tried, of s and of s = 1, relative to the squared output.
    """

    s: Tensor
    choice: tuple[float, float]
    error: float
    plain: float


def options_of(scheme: Scheme) -> Options:
    """What a recipe says about a w4a4 or w4a4_nvfp4 weight. Raises ValueError for a method that these have not."""
    weight = scheme.pair.weight
    if weight.method not in ("minmax", "svdquant"):
        raise ValueError(f"weight method {weight.method!r}; {scheme.type} has minmax, svdquant")
    if weight.method == "minmax":
        return Options(weight.dtype)
    return Options(weight.dtype, **{"rank": 32, **dict(weight.ext)})


# --- one smoothing vector for the layers that share an input ---


@torch.no_grad()
def search(
    stats: InputStatistics,
    weights: Sequence[Tensor],
    options: Options,
    *,
    grid: str = "full",
    rows: int = 0,
    settle: Callable[[Tensor], Tensor] | None = None,
) -> Found:
    """S = xa^a / wa^b of least output error for all `weights` [N, K] (any float dtype) together, the later of equals.

    xa, wa [K]: the largest |x| over all calibration rows, the largest |W| over all weights. S is 1 where it would be 0,
    all ones where anything of it is not finite, and rounded to bf16. Exponents: 39 pairs (`grid` full), or every third
    and then those near the best (coarse). Each is tried with factors of its own on `rows` of the kept rows, evenly
    spaced; 0: all of them. settle: adjusts each S before it is rounded.
    Raises ValueError if no rows were kept, for another grid, or if K is no multiple of the group size.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid {grid!r}; have {', '.join(GRIDS)}")
    kept = stats.rows
    if not len(kept):
        raise ValueError("a smoothing search needs kept input rows, and there are none")
    x = kept[spread(rows or len(kept), len(kept), 0).to(kept.device)].float()
    smooths = candidates(stats.amax, column_amax(weights), settle)
    floats = [outputs(weight, x) for weight in weights]
    errors: dict[int, float] = {}
    bases: list[Tensor | None] = [None] * len(weights)
    last = -STEPS

    def attempt(index: int) -> None:
        nonlocal last
        # From the candidate before; farther away more has to be found anew.
        rounds = None if abs(index - last) <= COARSE and not last < STEPS <= index else COLD_ROUNDS
        seen, last, total = InputRows(x, smooths[index], options.precision), index, 0.0
        for i, weight in enumerate(weights):
            branch = None
            if options.rank:
                up, down, bases[i] = factors(weight, options.rank, columns=seen.smooth, start=bases[i],
                                             svd=options.svd, rounds=rounds)  # fmt: skip
                branch = _branch(up, down, seen.smooth)
            total += _error(weight, seen, branch, floats[i])
        errors[index] = total if total == total else float("inf")

    def best() -> int:
        return min(errors, key=lambda index: (errors[index], -index))

    for index in _first_choice(grid):
        attempt(index)
    if grid == "coarse":
        found = best()
        for index in sorted(_near(found)):
            attempt(index)
    norm = sum(float(torch.linalg.vector_norm(y)) ** 2 for y in floats) or 1.0
    return Found(smooths[best()], CANDIDATES[best()], errors[best()] / norm, errors[0] / norm)


def candidates(x: Tensor, w: Tensor, settle: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """S [K] fp32, bf16 numbers, for each of CANDIDATES; x, w: [K] fp32, the ranges of input and weight."""
    found = []
    for a, b in CANDIDATES:
        s = x.pow(a).div_(w.pow(b))
        s = torch.where(s == 0, torch.ones_like(s), s)
        s = torch.where(torch.isfinite(s).all(), s, torch.ones_like(s))
        found.append((s if settle is None else settle(s)).to(HALF).float())
    return found


def _first_choice(grid: str) -> list[int]:
    step = COARSE if grid == "coarse" else 1
    return [*range(0, STEPS, step), *range(STEPS, len(CANDIDATES), step)]


def _near(index: int) -> list[int]:
    """What a coarse grid has left out around one of its candidates, in the same family."""
    family = range(STEPS) if index < STEPS else range(STEPS, len(CANDIDATES))
    return [i for i in range(index - COARSE + 1, index + COARSE) if i in family and i != index]


# --- one layer ---


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
    """Quantize a weight [N, K] of any float dtype to w4a4 or w4a4_nvfp4. `out`: int8 [N, K] to be filled, else new.

    columns: S [K] fp32, bf16 numbers. rows: no runtime of these types has any use for it (ValueError). stats: of the
    unsmoothed input; method `svdquant` needs its kept rows, with `gptq` its Gram matrix (else ValueError). A Gram
    matrix that GPTQ cannot factorize gives plainly rounded codes and a RuntimeWarning.
    Raises ValueError if K is no multiple of the group size, or the rank is above N or K.
    """
    if rows is not None:
        raise ValueError(f"{scheme.type} layers take no division of their rows")
    options = options_of(scheme)
    count, width = weight.shape
    branch = noise = None
    if options.rank:
        if stats is None or not len(stats.rows) or options.gptq and stats.gram is None:
            raise ValueError("svdquant needs kept rows of the layer's input, and with gptq its Gram matrix")
        seen = InputRows(stats.rows.float(), columns, options.precision)
        branch, _ = alternate(weight, seen, outputs(weight, seen.x), options)
        noise = seen.noise() if options.gptq else None
        del seen
    whole = _whole(weight, columns, branch, options.precision)
    codes = torch.empty(count, width, dtype=torch.int8, device=weight.device) if out is None else out
    scales = torch.empty(count, width // GROUP[options.precision], device=weight.device)
    for part, values, steps in _rounded(weight, columns, branch, options.precision, whole):
        codes[part] = codes_of(values, options.precision)
        scales[part] = steps
    layer = QuantizedLinear(scheme, codes, scales, bias, weight.dtype, 0.0, smooth=columns, tensor_scale=whole,
                            low_rank=branch)  # fmt: skip
    if noise is not None:
        assert stats is not None
        _round_gptq(weight, layer, _gram(stats, columns, noise), options)
    layer.rel_error, layer.cosine = weight_error(weight, layer)
    return layer


def alternate(weight: Tensor, seen: InputRows, y: Tensor, options: Options) -> tuple[LowRank, list[float]]:
    """The branch whose rounded residual has the least squared output error, and each turn's error.

    Turn t factors W · S - Q of turn t - 1, where Q is what rounding W · S less the branch left; Q before the first is
    0. Ends with the first turn that is no better than the best, or after `options.rounds`. y: [N, m] float outputs.
    """
    left = torch.empty(weight.shape, device=weight.device)
    basis, kept, errors = None, None, []
    for turn in range(options.rounds):
        matrix, columns = (weight, seen.smooth) if turn == 0 else (left, None)
        # From the second turn on the branch stands out of what it is in: one round finds it again to 1e-7.
        rounds = 1 if turn else None
        up, down, basis = factors(matrix, options.rank, columns=columns, start=basis, svd=options.svd, rounds=rounds)
        branch = _branch(up, down, seen.smooth)
        errors.append(_error(weight, seen, branch, y, left))
        if kept is not None and not errors[-1] < min(errors[:-1]):
            break
        kept = branch
    assert kept is not None
    return kept, errors


class InputRows:
    """Rows x [m, K] fp32 of a layer's input; `fed`: as the runtime's 4-bit product takes them with this `smooth`."""

    def __init__(self, x: Tensor, smooth: Tensor | None, precision: str) -> None:
        self.x, self.smooth, self.precision = x, smooth, precision
        self.fed = torch.empty_like(x)
        for part, given in zip(self._tiles(self.fed), self._tiles(x), strict=True):
            part.copy_(fake_quantize_input(given if smooth is None else given / smooth, precision))

    def noise(self) -> Tensor:
        """[K] fp32: mean square of what rounding does to each column of x / smooth."""
        total = torch.zeros_like(self.x[0])
        for part, given in zip(self._tiles(self.fed), self._tiles(self.x), strict=True):
            total += (given if self.smooth is None else given / self.smooth).sub(part).square_().sum(dim=0)
        return total.div_(torch.full((), float(len(self.x)), device=total.device))

    def _tiles(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(tile_rows(x.shape[1], x.device))


def _branch(up: Tensor, down: Tensor, smooth: Tensor | None) -> LowRank:
    """Factors of W · S as they are stored. By fp64 the quotients would not differ: torch rounds that by way of fp32."""
    return LowRank((down if smooth is None else down / smooth).to(HALF), up.to(HALF))


def outputs(weight: Tensor, x: Tensor) -> Tensor:
    """[N, m] fp32: the float layer's outputs for x [m, K] fp32, transposed, without the bias."""
    made = torch.empty(weight.shape[0], len(x), device=weight.device)
    step = tile_rows(weight.shape[1], weight.device)
    for part, y in zip(weight.split(step), made.split(step), strict=True):
        torch.mm(part.float(), x.T, out=y)
    return made


def _residuals(weight: Tensor, smooth: Tensor | None, branch: LowRank | None) -> Iterator[tuple[slice, Tensor]]:
    """W · S less the branch, fp32, tile by tile of rows in the same memory."""
    count, width = weight.shape
    step = tile_rows(width, weight.device)
    tile = torch.empty(min(step, count), width, device=weight.device)
    if branch is not None:
        up, down = branch.up.float(), branch.down.float()
        if smooth is not None:
            down.mul_(smooth)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        w = tile[: part.stop - start].copy_(weight[part])
        if smooth is not None:
            w.mul_(smooth)
        if branch is not None:
            w.addmm_(up[part], down, alpha=-1)
        yield part, w


def _whole(weight: Tensor, smooth: Tensor | None, branch: LowRank | None, precision: str) -> Tensor | None:
    """nvfp4's scale of the whole residual; None for int4."""
    if precision == "int4":
        return None
    highs = [torch.maximum(w.amax(), -w.amin()) for _, w in _residuals(weight, smooth, branch)]
    return tensor_scale(torch.stack(highs).amax(), precision)


def _rounded(
    weight: Tensor, smooth: Tensor | None, branch: LowRank | None, precision: str, whole: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The residuals as grid values, and their groups' scales."""
    for part, w in _residuals(weight, smooth, branch):
        scales = round_weight_(w, precision, whole)
        yield part, w, scales


def _error(weight: Tensor, seen: InputRows, branch: LowRank | None, y: Tensor, left: Tensor | None = None) -> float:
    """Squared output error of the rounded layer. left: [N, K] fp32, becomes W · S less what was rounded."""
    whole = _whole(weight, seen.smooth, branch, seen.precision)
    lost = torch.empty(weight.shape[0], device=weight.device)
    side = None if branch is None else (branch.up.float(), _inner(seen.x, branch).T)
    for part, q, scales in _rounded(weight, seen.smooth, branch, seen.precision, whole):
        q.unflatten(1, (scales.shape[1], -1)).mul_((scales if whole is None else scales * whole).unsqueeze(2))
        wrong = torch.addmm(y[part], q, seen.fed.T, beta=-1)
        if side is not None:
            wrong.addmm_(side[0][part], side[1])
        torch.linalg.vector_norm(wrong, dim=1, out=lost[part])
        if left is not None:
            left[part].copy_(weight[part])
            if seen.smooth is not None:
                left[part].mul_(seen.smooth)
            left[part].sub_(q)
    return float(lost.cpu().double().square().sum())


def _inner(x: Tensor, branch: LowRank) -> Tensor:
    """[m, R] fp32: what the runtime keeps, in bf16, between the branch's two products."""
    return (x @ branch.down.float().T).to(HALF).float()


def _gram(stats: InputStatistics, smooth: Tensor | None, noise: Tensor) -> Tensor:
    """H of the input as the 4-bit product takes it: rounding adds noise that no two columns share."""
    assert stats.gram is not None
    gram = stats.gram.clone() if smooth is None else (stats.gram / smooth).div_(smooth.unsqueeze(1))
    gram.diagonal().add_(noise, alpha=stats.gram_count)
    return gram


def _round_gptq(weight: Tensor, layer: QuantizedLinear, gram: Tensor, options: Options) -> None:
    """Other codes for `layer`, by GPTQ; scales stay."""
    whole = layer.tensor_scale
    left = torch.empty(weight.shape, device=weight.device)
    for part, w in _residuals(weight, layer.smooth, layer.low_rank):
        left[part] = w
    made = gptq(left, gram, layer.scales if whole is None else layer.scales * whole,
                group_size=GROUP[options.precision], qmin=-7, qmax=7, act_order=options.act_order,
                damping=options.damping, snap=None if whole is None else round_e2m1_)  # fmt: skip
    if made.damping is None:
        warnings.warn("the Gram matrix has no factorization: rounded without GPTQ", RuntimeWarning, stacklevel=3)
        return
    values = made.codes if made.values is None else made.values
    assert values is not None
    step = tile_rows(weight.shape[1], weight.device)
    for codes, found in zip(layer.codes.split(step), values.split(step), strict=True):
        codes.copy_(codes_of(found, options.precision))
