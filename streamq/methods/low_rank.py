"""The best approximation of a matrix by one of low rank: M [N, K] ≈ up [N, R] · down [R, K].

exact: eigenvectors of the smaller Gram matrix, in fp64 on the host; as good as an SVD, and no accelerator needs to have
one. randomised: subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061) with 8 directions to spare, from a
fixed random start or from where a similar matrix ended. Each round is one pass over M; what is decomposed are matrices
of R + 8 columns, in fp64 on the host.

Measured on matrices like Wan's weights (a slowly falling spectrum, hot columns), R = 32, one CPU core; excess: of the
error ‖M - up · down‖ above the exact one's.

    sides    exact   8 rounds   excess after 2, 4, 8 rounds     a round from the factors of the residual before
    256      0.01 s  0.003 s    1.6 %    0.2 %    0.01 %        7e-8
    1024     0.35 s  0.03 s     0.1 %    0.001 %  < 1e-8        < 1e-8
    2048     3.5 s   0.11 s     0.9 %    0.06 %   0.001 %       2e-9
    5120     47 s    0.70 s     2.1 %    0.4 %    0.05 %
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 8
EXACT_UP_TO = 256  # of the smaller side, for `auto`
COLD_ROUNDS, WARM_ROUNDS = 8, 2
SVD = ("auto", "exact", "randomised")
CPU_TILE_BYTES, DEVICE_TILE_BYTES = 10 << 20, 64 << 20  # of fp32 rows: small enough for a cache, large for a product


@torch.no_grad()
def factors(
    matrix: Tensor,
    rank: int,
    *,
    columns: Tensor | None = None,
    start: Tensor | None = None,
    svd: str = "auto",
    rounds: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(up [N, R], down [R, K], basis [K, r]) fp32 on the matrix's device, for matrix [N, K] of any float dtype.

    columns: [K] fp32, by which the matrix's columns are multiplied first; no product of its size is made unless exact.
    down has orthonormal rows, by falling singular value; up carries those values. basis: orthonormal, for the next
    `start` [K, r], r >= R. rounds: of subspace iteration; default 8, or 2 from a start. svd: one of SVD; auto is exact
    while the smaller side is at most 256. Deterministic. Raises ValueError for another `svd`, or a rank above a side.
    """
    if svd not in SVD:
        raise ValueError(f"svd {svd!r}; have {', '.join(SVD)}")
    if not 0 < rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} of a matrix {list(matrix.shape)}")
    if svd == "exact" or svd == "auto" and min(matrix.shape) <= EXACT_UP_TO:
        return _exact(matrix, rank, columns)
    return _iterate(matrix, rank, columns, start, rounds)


def _exact(matrix: Tensor, rank: int, columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    count, width = matrix.shape
    m = matrix.cpu().double()
    if columns is not None:
        m = m * columns.cpu().double()
    tall = count > width
    vectors = torch.linalg.eigh(m.T @ m if tall else m @ m.T)[1][:, -rank:].flip(1)
    # From the left: down = vectors^T M less its lengths, made orthonormal also where singular values are 0.
    down = vectors if tall else torch.linalg.qr(m.T @ vectors)[0]
    up = m @ down
    basis = down.float().to(matrix.device)
    return up.float().to(matrix.device), basis.T.contiguous(), basis


def _iterate(
    matrix: Tensor, rank: int, columns: Tensor | None, start: Tensor | None, rounds: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    width = matrix.shape[1]
    if rounds is None:
        rounds = COLD_ROUNDS if start is None else WARM_ROUNDS
    if start is None:
        # On the host, so that every device starts from the same.
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(width, min(rank + OVERSAMPLING, *matrix.shape), generator=generator)
        start = torch.linalg.qr(start.double())[0].float()
    basis = start.to(matrix.device)
    for _ in range(rounds):
        # Columns stay ordered by singular value: each keeps its own precision though M^T M squares their ratios.
        after = torch.linalg.qr(_there_and_back(matrix, columns, basis).cpu().double())[0]
        basis = after.float().to(matrix.device)
    image = _times(matrix, columns, basis).cpu().double()
    turn = torch.linalg.eigh(image.T @ image)[1].flip(1)
    turned = basis.cpu().double() @ turn
    up = (image @ turn[:, :rank]).float().to(matrix.device)
    basis = turned.float().to(matrix.device)
    return up, basis[:, :rank].T.contiguous(), basis


def tile_rows(width: int, device: torch.device) -> int:
    """How many rows of `width` fp32 numbers go through at once."""
    return max(1, (CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES) // (4 * width))


def _times(matrix: Tensor, columns: Tensor | None, v: Tensor) -> Tensor:
    """M v [N, r], for v [K, r]."""
    v = v if columns is None else v * columns.unsqueeze(1)
    return torch.cat([part.float() @ v for part in matrix.split(tile_rows(matrix.shape[1], matrix.device))])


def _there_and_back(matrix: Tensor, columns: Tensor | None, v: Tensor) -> Tensor:
    """M^T M v [K, r], reading M once."""
    scaled = v if columns is None else v * columns.unsqueeze(1)
    total = torch.zeros_like(v)
    for part in matrix.split(tile_rows(matrix.shape[1], matrix.device)):
        w = part.float()
        total.addmm_(w.T, w @ scaled)
    return total if columns is None else total.mul_(columns.unsqueeze(1))
