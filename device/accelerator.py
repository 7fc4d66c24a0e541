"""What CUDA and NPU share: a fixed ring of pinned chunks each way, a copy stream each way, and events in between.

    reader:  pread -> pinned chunk --copy stream, event--> device
    main:                wait event -> arithmetic -> mark
    writer:  wait mark <- pinned chunk <--copy stream, event-- device -> pwrite

Only calls that `torch.get_device_module` offers under the same names on every backend are used. The rings are allocated
once: pinning per tensor would round every size up to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

import torch

from streamq.device import READER, STAGE_CHUNK, STAGE_CHUNKS
from streamq.device.cpu import host_bytes
from streamq.errors import UsageError


class Accelerator:
    """See `streamq.device.Device`."""

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self.device = torch.device(kind, index)
        self.module: Any = torch.get_device_module(self.device)
        self._reading, self._turn = Lock(), 0
        try:
            self.module.set_device(self.device)
            self._inward, self._outward = self.module.Stream(self.device), self.module.Stream(self.device)
            self._ring_in, self._ring_out = self._ring(), self._ring()
        except RuntimeError as error:  # busy in exclusive mode, no memory left, a limit on locked memory
            raise UsageError(f"--device {self.device}: cannot be used ({error}); choose another device") from error

    def _ring(self) -> list[tuple[torch.Tensor, Any]]:
        host = torch.empty(STAGE_CHUNK * STAGE_CHUNKS, dtype=torch.uint8, pin_memory=True)
        return [(chunk, self.module.Event()) for chunk in host.split(STAGE_CHUNK)]

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # It may be memory that was freed while work on it is still queued: a load into it comes after that.
        self._inward.wait_stream(self.module.current_stream(self.device))
        return memory

    def load(self, read: READER, into: torch.Tensor) -> Any:
        self.module.set_device(self.device)  # each thread has its own, card 0 at first
        with self.module.stream(self._inward):
            for start in range(0, into.numel(), STAGE_CHUNK):
                part = into[start : start + STAGE_CHUNK]
                with self._reading:  # layers are read ahead while calibration inputs are read
                    host, copied = self._ring_in[self._turn % STAGE_CHUNKS]
                    self._turn += 1
                    copied.synchronize()  # the chunk's last copy, or nothing
                    staged = host[: part.numel()]
                    read(start, host_bytes(staged))
                    part.copy_(staged, non_blocking=True)
                    copied.record(self._inward)
            ready = self.module.Event()
            ready.record(self._inward)
        return ready

    def wait(self, token: Any) -> None:
        self.module.current_stream(self.device).wait_event(token)

    def mark(self) -> Any:
        event = self.module.Event()
        event.record(self.module.current_stream(self.device))
        return event

    def store(self, tensor: torch.Tensor, token: Any) -> Iterator[memoryview]:
        flat = tensor.reshape(-1).view(torch.uint8)
        pending: list[tuple[torch.Tensor, Any]] = []
        self.module.set_device(self.device)
        self._outward.wait_event(token)
        for number, start in enumerate(range(0, flat.numel(), STAGE_CHUNK)):
            host, copied = self._ring_out[number % STAGE_CHUNKS]
            part = flat[start : start + STAGE_CHUNK]
            with self.module.stream(self._outward):
                staged = host[: part.numel()]
                staged.copy_(part, non_blocking=True)
                copied.record(self._outward)
            pending.append((staged, copied))
            if len(pending) == 2:  # one chunk is written while the next is copied
                yield self._arrived(pending.pop(0))
        while pending:
            yield self._arrived(pending.pop(0))

    @staticmethod
    def _arrived(chunk: tuple[torch.Tensor, Any]) -> memoryview:
        staged, copied = chunk
        copied.synchronize()
        return host_bytes(staged)

    def memory(self) -> tuple[int, int]:
        return self.module.memory_allocated(self.device), self.module.max_memory_allocated(self.device)
