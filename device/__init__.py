"""Where tensors are worked on: one small file a backend, behind five verbs. Knows no model and no format."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from streamq.errors import UsageError

if TYPE_CHECKING:
    import torch

KINDS = ("npu", "cuda", "cpu")  # the order in which `auto` looks
MiB = 1 << 20
# Resident bytes of the process before the first weight: Python, torch and its libraries, and on accelerators the
# runtime's context. cpu: measured with torch 2.13 on x86 Linux. cuda, npu: allowances, not measurements.
HOST_BASE = {"cpu": 260 * MiB, "cuda": 1500 * MiB, "npu": 1500 * MiB}
STAGE_CHUNK, STAGE_CHUNKS = 16 * MiB, 4  # an accelerator's fixed ring of pinned memory, each way
READER = Callable[[int, memoryview], None]  # (first byte, buffer to be filled)


class Device(Protocol):
    """A place to work. `load` may run in a reader thread and `store` in a writer thread, beside the main one.

    Tokens order the three: what `load` returns goes to `wait` before the data is used, what `mark` returns goes to
    `store` so that it copies nothing that is still being computed.
    """

    kind: str

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 memory on the device, [nbytes]."""

    def load(self, read: READER, into: torch.Tensor) -> Any:
        """Fill a uint8 tensor, chunk by chunk where the device has memory of its own; returns a token."""

    def wait(self, token: Any) -> None:
        """Make what is computed next come after the load."""

    def mark(self) -> Any:
        """A token for everything that has been asked for so far."""

    def store(self, tensor: torch.Tensor, token: Any) -> Iterator[memoryview]:
        """A contiguous tensor's bytes in host memory, in order; each view is valid until the next is asked for."""

    def memory(self) -> tuple[int, int]:
        """(bytes in use now, most bytes ever in use) on the device; (0, 0) where it is host memory."""


def kind_of(name: str) -> str:
    """The kind behind `auto`, `cpu`, `cuda[:i]` or `npu[:i]`, found without importing torch.

    `auto` looks for device nodes and for what the installed torch was built for. Raises UsageError for other names.
    """
    if "," in name:
        raise UsageError(
            f"--device {name}: one device a process; for {name.count(',') + 1} of them: accelerate launch --multi_gpu"
            f" --num_processes {name.count(',') + 1} -m streamq quant ..."
        )
    if name != "auto":
        match = re.fullmatch(r"(cpu)|(cuda|npu)(:\d+)?", name)
        if match is None:
            raise UsageError(f"--device {name}: unknown; one of auto, cpu, cuda, cuda:0, npu, npu:0")
        return match[1] or match[2]
    if importlib.util.find_spec("torch_npu") and any(Path("/dev").glob("davinci[0-9]*")):
        return "npu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    nodes = [*Path("/dev").glob("nvidia[0-9]*"), *(p for p in (Path("/dev/dxg"), Path("/dev/kfd")) if p.exists())]
    if nodes and not hidden and _torch_has_cuda():
        return "cuda"
    return "cpu"


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return bool(
        version and version.is_file() and re.search(r"^(cuda|hip)\b.*=\s*'\d", version.read_text(), re.MULTILINE)
    )


def open_device(name: str) -> Device:
    """The device itself, ready to be used. Raises UsageError when it is not there."""
    kind = kind_of(name)
    index = int(name.partition(":")[2] or 0)
    if kind == "cpu":
        from streamq.device import cpu

        return cpu.CPU()
    if kind == "cuda":
        from streamq.device import cuda

        return cuda.open_cuda(index)
    from streamq.device import npu

    return npu.open_npu(index)
