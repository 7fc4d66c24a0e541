"""Orthogonal rotations: of an attention module's q and k at run time, and of a weight's input (ConvRot).

The first is MindIE-SD's (`create_online_hadamard_rot`): R = diag(s) · H / sqrt(n), H Sylvester's Hadamard matrix, s
signs from a generator with a seed of its own. The second is comfy-kitchen's: x · H^T enters W · H^T, H a Kronecker
power of a regular 4 x 4 Hadamard matrix over sqrt(n), in groups of n inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGNS_SEED = 1234  # MindIE-SD's
_REGULAR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def online_hadamard(head_dim: int) -> Tensor:
    """R [head_dim, head_dim] bfloat16, on the host. Raises ValueError for a size that is no power of two."""
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(f"a rotation of size {head_dim}: a power of two is needed")
    matrix = torch.ones(1, 1)
    while len(matrix) < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = 2 * torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(SIGNS_SEED)) - 1
    return (signs.float().unsqueeze(1) * matrix / head_dim**0.5).bfloat16()


def regular_hadamard(size: int) -> Tensor:
    """H [size, size] float32, symmetric and orthogonal; size a power of four. Raises ValueError for another."""
    matrix = base = torch.tensor(_REGULAR, dtype=torch.float32)
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    if len(matrix) != size:
        raise ValueError(f"a rotation of size {size}: a power of four is needed")
    return matrix / size**0.5


def rotate(weight: Tensor, size: int) -> Tensor:
    """W · H^T in groups of `size` along the last dimension, float32. Works for x as well."""
    turn = regular_hadamard(size).to(weight.device)
    return (weight.float().unflatten(-1, (-1, size)) @ turn.T).flatten(-2)


def unrotate(weight: Tensor, size: int) -> Tensor:
    """W' · H: what `rotate` turns back."""
    turn = regular_hadamard(size).to(weight.device)
    return (weight.float().unflatten(-1, (-1, size)) @ turn).flatten(-2)
