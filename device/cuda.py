"""NVIDIA GPUs (and AMD ones under ROCm's torch, which goes by the same name)."""

from __future__ import annotations

import torch

from streamq.device.accelerator import Accelerator
from streamq.errors import UsageError


def open_cuda(index: int) -> Accelerator:
    """Raises UsageError when this torch has no CUDA, or there is no such GPU."""
    if not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU and driver"
        raise UsageError(f"--device cuda: torch {torch.__version__} {built}; use --device cpu, or install a CUDA build")
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return Accelerator("cuda", index)
