"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding that lets later columns make up for earlier ones' errors.

With H = sum x^T x, columns are rounded one after the other; the error of column i, divided by U_ii, is taken from the
columns behind it in the proportions of row i of U, where U^T U = H^-1 and U is upper triangular. Scales are fixed
beforehand, so rows are independent of each other and go through in parts.

U comes from one factorization: with the order of columns reversed, H = L L^T, and U is L^-1 reversed back. That saves
the explicit inverse of the paper's own code, both its time and its rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ATTEMPTS = 6  # the wanted damping, then five times ten times as much
PART_BYTES = 256 << 20  # of fp32 weight rows at once


@dataclass(frozen=True)
class GptqResult:
    """What `gptq` made: `codes`, or with a grid of the caller's own `values`; the other one is None.

    codes: [N, K] int8 (uint8 where qmin >= 0). values: [N, K] fp32 grid values, as `snap` returned them. damping: what
    the factorization took, None: plain rounding.
    """

    codes: Tensor | None
    damping: float | None
    values: Tensor | None = None


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int = 0,
    qmin: int = -128,
    qmax: int = 127,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
    snap: Callable[[Tensor], Tensor] | None = None,
) -> GptqResult:
    """Codes for weight [N, K] (any float dtype, computed in fp32) with gram [K, K] fp32.

    scales, zeros: fp32 [N, 1], or [N, K / group_size] with a group size; W ≈ (q - zero) · scale, a zero may be any
    number. act_order: columns by falling diagonal of H. damping: this share of the mean diagonal is added to it. A
    column without input (diagonal 0) is rounded plainly, and its error goes nowhere.
    snap: rounds to a grid that is not the whole numbers from qmin to qmax, which then say nothing: fp32 w / scale, plus
    zero, of some of the rows [n] -> q, fp32 [n], the same tensor or another. The result has `values` and no `codes`.
    If H has no factorization with up to 10^5 times the damping, all is rounded plainly and `damping` is None.
    Raises ValueError for shapes that do not fit together.
    """
    count, columns = weight.shape
    size = group_size or columns
    groups = -(-columns // size)
    if gram.shape != (columns, columns) or scales.shape != (count, groups):
        raise ValueError(
            f"a weight {[count, columns]} in groups of {size} needs a Gram matrix {[columns, columns]} and scales"
            f" {[count, groups]}; got {list(gram.shape)} and {list(scales.shape)}"
        )
    diagonal = gram.diagonal()
    order = torch.arange(columns, device=gram.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    factor, used = _factor(gram, order, damping)
    if factor is None:
        # All errors go nowhere: the same loop, so plain rounding here is what it is everywhere.
        factor = torch.eye(columns, device=gram.device)
    dtype = torch.float32 if snap else torch.uint8 if qmin >= 0 else torch.int8
    filled = torch.empty(count, columns, dtype=dtype, device=weight.device)

    def whole(q: Tensor) -> Tensor:
        return q.round_().clamp_(qmin, qmax)

    step = max(1, PART_BYTES // (4 * columns))
    for start in range(0, count, step):
        part = slice(start, start + step)
        # Transposed: a column of W is then contiguous, and so is each update.
        left = weight[part].float().T[order].contiguous()
        which = order // size
        offset = None if zeros is None else zeros[part].T
        made = _round_part(left, factor, scales[part].T, offset, which, snap or whole, block)
        filled[part, order] = made.T.to(dtype)
    return GptqResult(None, used, filled) if snap else GptqResult(filled, used)


def _round_part(
    left: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    which: Tensor,
    snap: Callable[[Tensor], Tensor],
    block: int,
) -> Tensor:
    """left [K, n]: the columns of W still to be rounded, overwritten with grid values. scales, zeros [groups, n]."""
    columns, n = left.shape
    errors = torch.empty(min(block, columns), n, device=left.device)
    groups = which.tolist()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        for i in range(start, end):
            w, scale = left[i], scales[groups[i]]
            q = torch.div(w, scale)
            if zeros is not None:
                q += zeros[groups[i]]
            q = snap(q)
            value = q.clone() if zeros is None else q - zeros[groups[i]]
            error = torch.sub(w, value.mul_(scale), out=errors[i - start]).div_(factor[i, i])
            if i + 1 < end:
                left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
            w.copy_(q)
        if end < columns:
            left[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    return left


def _factor(gram: Tensor, order: Tensor, damping: float) -> tuple[Tensor | None, float | None]:
    """(U [K, K] fp32 for H in this order, the damping that it took), or (None, None)."""
    diagonal = gram.diagonal()[order]
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    for attempt in range(ATTEMPTS):
        share = damping * 10**attempt
        back = order.flip(0)
        h = gram[back][:, back]
        # A dead column's row and column are 0 already: any positive diagonal keeps it to itself.
        h.diagonal().add_(share * mean).masked_fill_(dead.flip(0), mean)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            h.zero_().diagonal().fill_(1)
            inverse = torch.linalg.solve_triangular(lower, h, upper=False)
            del lower, h
            upper = inverse.flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return upper, share
    return None, None
