"""The host itself: bytes are read straight into the tensor's own memory, and written straight out of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from streamq.device import READER, MiB

WRITE_CHUNK = 4 * MiB  # hashed and written while it is in the cache


class CPU:
    """See `streamq.device.Device`.

    Sets torch to one thread: tiles of a few MiB are bound by memory, and threads that wait for the next tile cost more
    processor time than they save (two cores: twice the CPU seconds, no less wall time).
    """

    kind = "cpu"

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def load(self, read: READER, into: torch.Tensor) -> None:
        read(0, host_bytes(into))

    def wait(self, token: None) -> None:
        pass

    def mark(self) -> None:
        pass

    def store(self, tensor: torch.Tensor, token: None) -> Iterator[memoryview]:
        view = host_bytes(tensor)
        for start in range(0, len(view), WRITE_CHUNK):
            yield view[start : start + WRITE_CHUNK]

    def memory(self) -> tuple[int, int]:
        return 0, 0


def give_memory_back() -> None:
    """Return what the C library keeps of freed tensors to the system; otherwise a run's peak creeps up block by block.

    glibc only; elsewhere nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
