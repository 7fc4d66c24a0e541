"""What a format answers that has nothing of the kind: no smoothing beside norms, no rotation, nothing packed.

A format imports those that are true of it, by the names that `savers.Format` has for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from streamq.pairs import pair_of
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.savers import Document, SaveOptions, Schemes, Spec
from streamq.wan import Linear, Model

if TYPE_CHECKING:
    from torch import Tensor


def unfit(layer: Linear, scheme: Scheme) -> str | None:
    """Any size does."""
    return None


def vector_specs(name: str, dim: int) -> list[Spec]:
    """Nothing lies beside a norm."""
    return []


def encode_vector(smooth: Tensor) -> list[Tensor]:
    """Nothing lies beside a norm."""
    return []


def rotation_specs(attention: str, head_dim: int) -> list[Spec]:
    """No attention is rotated."""
    return []


def metadata(model: Model, schemes: Schemes, options: SaveOptions) -> dict[str, str]:
    """A file has no metadata."""
    return {}


def root_documents(experts: Sequence[str], model: Model, schemes: Schemes) -> list[Document]:
    """Nothing lies beside the experts' folders."""
    return []


def float_shape(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What is stored has the float tensor's shape."""
    return shape


def unpack(tensors: Mapping[str, Tensor]) -> QuantizedLinear | None:
    """Nothing is packed."""
    return None


def bias(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """A layer's bias lies there as it is."""
    return tensors.get("bias")


def record_of(kind: str, codes: Tensor, scales: Tensor, bias: Tensor | None) -> QuantizedLinear:
    """A layer as it was read back: of its recipe only the type is known, its errors are NaN."""
    import torch

    scheme = Scheme(kind, pair_of(kind), Rule())
    return QuantizedLinear(scheme, codes, scales, bias, torch.bfloat16, math.nan, math.nan)
