"""Products of 8-bit codes where a device has arithmetic for them, and the plain ones that say what they have to give.

    int8   acc = x · wᵀ in int32, exact; then acc · scales of w's rows · scales of x's rows, in fp32
    fp8    acc = x · wᵀ in fp32; then the same

CUDA and CPU: `torch._int_mm`, `torch._scaled_mm` with scales of one; NPU: `torch_npu.npu_quant_matmul`, which applies
the scales itself and rounds to bfloat16. Knows no model and no format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEAST_ROWS, _MULTIPLE = 17, 8  # cuBLAS refuses int8 products of fewer rows, and of other columns than these
_FP8_MULTIPLE = 16
_FP8_CAPABILITY = (8, 9)


def has_int8(device: torch.device) -> bool:
    """Whether int8 codes are multiplied as such on a device of this kind."""
    return device.type in ("cpu", "cuda", "npu")


def has_fp8(device: torch.device) -> bool:
    """Whether e4m3 codes are: NVIDIA from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def int8_reference(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [m, k] · int8 [n, k]ᵀ -> int32 [m, n]: in float64, which is exact up to 2^53."""
    return (x.double() @ weight.double().T).to(torch.int32)


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """The same by the device's own integer product (CPU, CUDA)."""
    rows, columns, outputs = x.shape[0], x.shape[1], weight.shape[0]
    if x.device.type != "cuda":
        return torch._int_mm(x, weight.T)
    pad = torch.nn.functional.pad  # zeros change no sum
    x = pad(x, (0, -columns % _MULTIPLE, 0, max(0, _LEAST_ROWS - rows)))
    weight = pad(weight, (0, -columns % _MULTIPLE, 0, -outputs % _MULTIPLE))
    return torch._int_mm(x.contiguous(), weight.contiguous().T)[:rows, :outputs]


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, scale: Tensor, offset: float = 0.0) -> Tensor:
    """Codes of x, int8 [m, k], and of a weight, int8 [n, k], -> fp32 [m, n].

    scales: fp32 [n]; scale: fp32 [m, 1], or 0-dim. offset: the code that stands for zero in x.
    """
    if x.device.type == "npu" and not offset:
        return _npu_linear(x, weight, scales, scale)
    product = int8_reference if x.device.type == "npu" else int8_product
    acc = product(x, weight)
    if offset:
        acc = acc - int(offset) * weight.sum(dim=1, dtype=torch.int32)
    return acc.float().mul_(scales).mul_(scale)


def _npu_linear(x: Tensor, weight: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    import torch_npu

    operator: Any = torch_npu.npu_quant_matmul
    tokens = scale.expand(x.shape[0], 1).reshape(-1).contiguous()
    return operator(x, weight.T, scales, pertoken_scale=tokens, output_dtype=torch.bfloat16).float()


def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [m, k] and e4m3 [n, k] -> fp32 [m, n]; scales as in `int8_linear`. Sizes: multiples of 16 (`fits_fp8`)."""
    one = torch.ones((), device=x.device)
    acc = torch._scaled_mm(x, weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)
    return acc.mul_(scales).mul_(scale)


def fits_fp8(columns: int, outputs: int) -> bool:
    """Whether the product of e4m3 codes takes a weight of these sizes."""
    return columns % _FP8_MULTIPLE == outputs % _FP8_MULTIPLE == 0
