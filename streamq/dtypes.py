"""safetensors' words for dtypes, and torch's. The one table; `checkpoint.DTYPE_SIZE` says their sizes without torch."""

from __future__ import annotations

import torch

TORCH_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8,
    "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
