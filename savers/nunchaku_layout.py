"""How Nunchaku's kernels order the numbers of a 4-bit layer: permutations there and back, and nothing else.

A stored position is a mixed-radix number whose digits are those of the row and the column, in another order; each
function splits the sizes into these digits, permutes and joins them. Digits as in nunchaku-tech/nunchaku
`src/kernels/zgemm/gemm_w4a4.cuh`, `lora.cuh` and `src/kernels/awq/gemv_awq.cu`, a name per digit in the comments, the
slowest first. N: outputs, K: inputs, R: rank, n and k: one of them; t: tile.

Everything happens on the tensors' own device. Matrices of codes go through in slices of whole tiles, so that what is
held besides input and result stays below 64 MiB. Raises ValueError for sizes that no whole number of tiles makes up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CODES_AT_A_TIME = 1 << 24
_TILE = 128  # rows


def pack_qweight(codes: Tensor) -> Tensor:
    """Codes [N, K] int8 or uint8, of which the low four bits count -> int8 [N, K/2]. N % 128 = K % 64 = 0."""
    import torch

    rows, columns = codes.shape
    tiles = _whole(columns, 64, "inputs")
    packed = torch.empty((rows, columns // 2), dtype=torch.int8, device=codes.device)
    for part in _slices(rows, columns, _TILE):
        # Eight codes of one row are a word of the result; only whole words change places.
        words = _pairs(codes[part].contiguous().unflatten(1, (-1, 2))).view(torch.int32)
        digits = words.view(-1, 8, 2, 8, tiles, 2, 4)  # nt a ns l, kt ks kl
        stored = packed[part].view(torch.int32).view(-1, tiles, 8, 8, 4, 2, 2)  # nt kt a l kl ns ks
        stored.copy_(digits.permute(0, 4, 1, 3, 6, 2, 5))
    return packed


def unpack_qweight(packed: Tensor, *, signed: bool) -> Tensor:
    """`pack_qweight` back: int8 [N, K/2] -> codes [N, K] int8, -8..7 if signed (int4), else 0..15 (nvfp4)."""
    import torch

    rows, columns = packed.shape[0], 2 * packed.shape[1]
    tiles = _whole(columns, 64, "inputs")
    codes = torch.empty((rows, columns), dtype=torch.int8, device=packed.device)
    for part in _slices(rows, columns, _TILE):
        stored = _aligned(packed[part]).view(torch.int32).view(-1, tiles, 8, 8, 4, 2, 2)  # nt kt a l kl ns ks
        words = stored.permute(0, 2, 5, 3, 1, 6, 4).contiguous()  # nt a ns l, kt ks kl
        _split(words.view(-1, columns // 8).view(torch.uint8), codes[part].unflatten(1, (-1, 2)))
        if signed:
            codes[part].bitwise_xor_(8).sub_(8)
    return codes


def pack_scales(scales: Tensor) -> Tensor:
    """One scale per row and group, [N, G] -> [G, N], dtype kept. N % 128 = 0."""
    rows, groups = scales.shape
    tiles = _whole(rows, _TILE, "outputs")
    digits = scales.unflatten(0, (tiles, 8, 2, 4, 2))  # nt a b c d, g
    return digits.permute(0, 5, 1, 3, 2, 4).reshape(groups, rows)  # nt g a c b d


def unpack_scales(packed: Tensor) -> Tensor:
    """`pack_scales` back: [G, N] -> [N, G]."""
    groups, rows = packed.shape
    tiles = _whole(rows, _TILE, "outputs")
    digits = packed.reshape(tiles, groups, 8, 4, 2, 2)  # nt g a c b d
    return digits.permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def pack_vector(vector: Tensor) -> Tensor:
    """A smoothing vector, bias or channel scale [N], ordered like scales of a single group. N % 128 = 0."""
    return pack_scales(vector.unsqueeze(1)).flatten()


def unpack_vector(packed: Tensor) -> Tensor:
    """`pack_vector` back: [N] -> [N]."""
    return unpack_scales(packed.unsqueeze(0)).flatten()


def pack_micro_scales(scales: Tensor) -> Tensor:
    """nvfp4's scales, float8_e4m3fn [N, K/16] -> [K/16, N]. N % 128 = K % 64 = 0."""
    import torch

    rows, groups = scales.shape
    tiles, fours = _whole(rows, _TILE, "outputs"), _whole(groups, 4, "groups")
    digits = scales.view(torch.uint8).unflatten(1, (fours, 4)).unflatten(0, (tiles, 4, 4, 8))  # nt p q l, gk j
    return digits.permute(0, 4, 3, 2, 1, 5).reshape(groups, rows).view(scales.dtype)  # nt gk l q p j


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """`pack_micro_scales` back: float8_e4m3fn [K/16, N] -> [N, K/16]."""
    import torch

    groups, rows = packed.shape
    tiles, fours = _whole(rows, _TILE, "outputs"), _whole(groups, 4, "groups")
    digits = packed.view(torch.uint8).reshape(tiles, fours, 8, 4, 4, 4)  # nt gk l q p j
    return digits.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups).view(packed.dtype)


def pack_down(down: Tensor) -> Tensor:
    """The low-rank branch's first factor [R, K] -> [K, R], dtype kept. R % 16 = K % 16 = 0."""
    tiles = _low_rank(down)  # tn ns l, tk ks kl e
    return tiles.permute(3, 0, 2, 5, 1, 4, 6).reshape(down.shape[1], down.shape[0])  # tk tn l kl ns ks e


def unpack_down(packed: Tensor) -> Tensor:
    """`pack_down` back: [K, R] -> [R, K]."""
    columns, rank = packed.shape
    tiles = _low_rank_tiles(packed)  # tk tn l kl ns ks e
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, columns)


def pack_up(up: Tensor) -> Tensor:
    """The second factor [N, R] -> [N, R], dtype kept. N % 16 = R % 16 = 0."""
    tiles = _low_rank(up)  # tn ns l, tk ks kl e
    return tiles.permute(0, 3, 2, 5, 1, 4, 6).reshape(up.shape)  # tn tk l kl ns ks e


def unpack_up(packed: Tensor) -> Tensor:
    """`pack_up` back: [N, R] -> [N, R]."""
    tiles = _low_rank_tiles(packed)  # tn tk l kl ns ks e
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(packed.shape)


def pack_awq(codes: Tensor) -> Tensor:
    """Codes 0..15 [N, K], int8 or uint8 -> int32 [N/4, K/2], eight in each, lowest bits first. N % 4 = K % 64 = 0."""
    import torch

    rows, columns = codes.shape
    fours, chunks = _whole(rows, 4, "outputs"), _whole(columns, 64, "inputs")
    packed = torch.empty((fours, 2 * columns), dtype=torch.uint8, device=codes.device)
    for part in _slices(rows, columns, 4):
        pairs = _pairs(codes[part].unflatten(1, (chunks, 2, 2, 2, 8)).movedim(4, -1))
        digits = pairs.unflatten(0, (-1, 4))  # ob oi, kc h a/2 b
        stored = packed[part.start // 4 : part.stop // 4].view(-1, chunks, 4, 2, 8, 2)  # ob kc oi h b a/2
        stored.copy_(digits.permute(0, 2, 1, 3, 5, 4))
    return packed.view(torch.int32)


def unpack_awq(packed: Tensor) -> Tensor:
    """`pack_awq` back: int32 [N/4, K/2] -> codes [N, K] int8, 0..15."""
    import torch

    rows, columns = 4 * packed.shape[0], 2 * packed.shape[1]
    chunks = _whole(columns, 64, "inputs")
    codes = torch.empty((rows, columns), dtype=torch.int8, device=packed.device)
    for part in _slices(rows, columns, 4):
        words = packed[part.start // 4 : part.stop // 4].contiguous()
        stored = words.view(torch.uint8).view(-1, chunks, 4, 2, 8, 2)  # ob kc oi h b a/2
        digits = stored.permute(0, 2, 1, 3, 5, 4).flatten(0, 1)
        _split(digits, codes[part].view(-1, chunks, 2, 2, 2, 8).movedim(4, -1))
    return codes


def _whole(size: int, by: int, what: str) -> int:
    if size % by:
        raise ValueError(f"{size} {what} are no multiple of {by}")
    return size // by


def _slices(rows: int, columns: int, step: int) -> Iterator[slice]:
    """Slices of whole tiles of `step` rows."""
    _whole(rows, step, "outputs")
    size = max(step, CODES_AT_A_TIME // columns // step * step)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _pairs(codes: Tensor) -> Tensor:
    """Pairs of codes [..., 2] -> bytes [...] uint8, the first code in the low half."""
    import torch

    raw = codes.view(torch.uint8)
    # A product, because shifts of bytes are not on every device.
    return (raw[..., 1] & 15).mul_(16).add_(raw[..., 0] & 15)


def _split(raw: Tensor, pairs: Tensor) -> None:
    """Bytes [...] -> codes 0..15 into `pairs` [..., 2]."""
    pairs[..., 0] = raw & 15
    pairs[..., 1] = raw >> 4


def _aligned(raw: Tensor) -> Tensor:
    """Contiguous, and at an address at which 32-bit words may begin."""
    raw = raw.contiguous()
    return raw.clone() if raw.storage_offset() % 4 else raw


def _low_rank(matrix: Tensor) -> Tensor:
    """Either factor, as it is meant, in 16 x 16 tiles: tn ns l, tk ks kl e."""
    rows, columns = matrix.shape
    tiles = _whole(columns, 16, "columns of a low-rank factor")
    return matrix.unflatten(1, (tiles, 2, 4, 2)).unflatten(0, (_whole(rows, 16, "rows of a low-rank factor"), 2, 8))


def _low_rank_tiles(packed: Tensor) -> Tensor:
    """Either factor as it is stored: size/16, R/16, l kl ns ks e."""
    size, rank = packed.shape
    return packed.reshape(_whole(size, 16, "rows of a low-rank factor"), _whole(rank, 16, "ranks"), 8, 4, 2, 2, 2)
