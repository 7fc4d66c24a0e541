"""Ascend NPUs, through torch_npu, which registers itself as torch's PrivateUse1 backend under the name `npu`."""

from __future__ import annotations

import torch

from streamq.device.accelerator import Accelerator
from streamq.errors import UsageError

_ADVICE = "install torch_npu for this torch and CANN, and `source .../ascend-toolkit/set_env.sh` first; or --device cpu"


def open_npu(index: int) -> Accelerator:
    """Raises UsageError that tells a missing torch_npu from a missing CANN and a missing card."""
    if not hasattr(torch, "npu"):
        try:
            import torch_npu  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError(f"--device npu: no module {error.name}; {_ADVICE}") from error
        except ImportError as error:  # libhccl.so not found: no CANN; an undefined symbol: made for another torch
            why = "CANN is missing, or torch_npu is made for another torch"
            raise UsageError(f"--device npu: torch_npu does not load ({error}): {why}; {_ADVICE}") from error
    count = torch.get_device_module("npu").device_count()
    if index >= count:
        raise UsageError(f"--device npu:{index}: there are {count} NPUs, counted from 0; {_ADVICE}")
    return Accelerator("npu", index)
