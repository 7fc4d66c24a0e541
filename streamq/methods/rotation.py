"""Orthogonal rotations: of an attention module's q and k at run time, and of a weight's input (ConvRot).

The first is MindIE-SD's (`create_online_hadamard_rot`): R = diag(s) · H / sqrt(n), H Sylvester's Hadamard matrix, s
signs from a generator with a seed of its own. The second is comfy-kitchen's: x · H^T enters W · H^T, H a Kronecker
power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] over sqrt(n), in groups of n inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGNS_SEED = 1234  # MindIE-SD's


def online_hadamard(head_dim: int) -> Tensor:
    """R [head_dim, head_dim] bfloat16, on the host. Raises ValueError for a size that is no power of two."""
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(f"a rotation of size {head_dim}: a power of two is needed")
    matrix = torch.ones(1, 1)
    while len(matrix) < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = 2 * torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(SIGNS_SEED)) - 1
    return (signs.float().unsqueeze(1) * matrix / head_dim**0.5).bfloat16()


def rotate(weight: Tensor, size: int) -> Tensor:
    """W · H^T in groups of `size` along the last dimension, as a new tensor: float64 of float64, else float32.

    Works for x as well. By sums of four in a fixed order, one power of four after the other, so that the bits of a row
    depend neither on the other rows nor on the device; a matrix product's do. Needs three times the result's memory.
    Raises ValueError for a size that is no power of four, or does not divide the last dimension.
    """
    if size < 4 or size & (size - 1) or size.bit_length() % 2 == 0:
        raise ValueError(f"a rotation of size {size}: a power of four is needed")
    if weight.shape[-1] % size:
        raise ValueError(f"{weight.shape[-1]} columns are no multiple of the rotation's size {size}")
    wide = weight if weight.dtype == torch.float64 else weight.float()
    # Groups side by side, so that every sum below is one of long rows; a copy in any case.
    turned = wide.reshape(-1, size).T.clone(memory_format=torch.contiguous_format)
    step = turned.shape[1]
    while step < turned.numel():
        a, b, c, d = turned.view(-1, 4, step).unbind(1)
        total = (a + b).add_(c).add_(d)
        for part in (a, b, c, d):  # a sum of four with one sign turned: the results, last one first
            torch.sub(total, part, alpha=2, out=part)
        step *= 4
    return turned.flip(0).T.div_(size**0.5).reshape(weight.shape)


def unrotate(weight: Tensor, size: int) -> Tensor:
    """W' · H: what `rotate` turns back. H is its own inverse."""
    return rotate(weight, size)
