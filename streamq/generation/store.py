"""Where a transformer's blocks are while it runs: as many as the budget allows stay, the others come from disk.

    borrow(unit):  kept on the device -> as it is
                   kept in RAM        -> copied to the device (accelerators)
                   not kept           -> read from disk, one unit ahead of the one that computes

Quantized layers are kept as they are stored, float tensors in the dtype that they are computed in. Held at any time:
what is kept, the block at work, and the one that is read ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamq.checkpoint import BLOCK_SIZE, Source, TensorInfo
from streamq.device import READER, Device
from streamq.device.cpu import give_memory_back, host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.generation.layers import Weights
from streamq.wan.blocks import parameter_dtype

Tensors = dict[str, Tensor]  # by stored name


@dataclass
class Room:
    """Bytes that kept blocks may take, on the device and in host memory beside one; shared by two experts.

    Only one of them keeps blocks at a time: when the other is asked for its first, these are dropped.
    """

    device: int
    host: int = 0
    owner: BlockStore | None = None

    def claim(self, store: BlockStore) -> None:
        """Make all of it a store's."""
        if self.owner is not store:
            if self.owner is not None:
                self.owner.drop()
            self.owner = store


class BlockStore:
    """One transformer's weights, a block at a time. `close()` when done.

    Raises RunError from `borrow` when a file cannot be read.
    """

    def __init__(self, weights: Weights, device: Device, room: Room, dtype: torch.dtype) -> None:
        self.weights, self.device, self.room, self.dtype = weights, device, room, dtype
        self.order = weights.model.replay_order
        self.source = Source(weights.checkpoint)
        self._kept: dict[str, Tensors] = {}
        self._hosted: dict[str, Tensors] = {}
        self._pending: tuple[str, Future[tuple[Tensors, Any]]] | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")

    def kept_nbytes(self, unit: str) -> int:
        """What a unit takes in memory."""
        return kept_nbytes(self.weights, unit, self.dtype)

    @property
    def resident(self) -> tuple[int, int]:
        """Bytes of what is kept now: on the device, and in host memory beside it."""
        return sum(map(self.kept_nbytes, self._kept)), sum(map(self.kept_nbytes, self._hosted))

    @contextmanager
    def borrow(self, unit: str) -> Iterator[Tensors]:
        """A block's tensors on the device, by stored name, while the next one is read."""
        self.room.claim(self)
        tensors = self._take(unit)
        self._read_ahead(unit)
        yield tensors

    def outside(self) -> Tensors:
        """The tensors outside blocks, which the caller keeps."""
        return self._ready(*self._load("rest"))

    def clear(self) -> None:
        """Keep nothing on the device, which others need. What is asked for next is brought there again."""
        self._forget_pending()
        self._kept.clear()
        give_memory_back()

    def drop(self) -> None:
        """Keep nothing at all."""
        self._forget_pending()
        self._hosted.clear()
        self.clear()

    def close(self) -> None:
        """Let go of memory, thread and files."""
        self.drop()
        self._reader.shutdown()
        self.source.close()

    def _take(self, unit: str) -> Tensors:
        if unit in self._kept:
            return self._kept[unit]
        if self._pending is not None and self._pending[0] == unit:
            future = self._pending[1]
            self._pending = None
            tensors = self._ready(*future.result())
        else:
            self._forget_pending()
            tensors = self._ready(*self._load(unit))
        if self.resident[0] + self.kept_nbytes(unit) <= self.room.device:
            self._kept[unit] = tensors
            self._hosted.pop(unit, None)
        return tensors

    def _read_ahead(self, unit: str) -> None:
        """Start to read what is needed next and not kept; in the end the first again, for the next forward."""
        if self._pending is not None:
            return
        place = self.order.index(unit)
        for name in (*self.order[place + 1 :], *self.order[:place]):
            if name not in self._kept:
                self._pending = name, self._reader.submit(self._load, name)
                return

    def _forget_pending(self) -> None:
        if self._pending is not None:
            future, self._pending = self._pending[1], None
            # Whoever frees memory that is copied to waits for the copy. An error of what nobody needs is none.
            if not future.cancel() and future.exception() is None:
                self._ready(*future.result())

    def _ready(self, tensors: Tensors, token: Any) -> Tensors:
        self.device.wait(token)
        return tensors

    def _load(self, name: str) -> tuple[Tensors, Any]:
        """In the reading thread: a unit's tensors, and what to wait for before they are used."""
        unit, found, token = self.weights.units[name], {}, None
        hosted = self._hosted.get(name)
        if hosted is None and self.device.kind != "cpu" and name != "rest":
            hosted = self._host(name)
        dtypes = {info.name: parameter_dtype(own, self.dtype) for own, info in unit.floats.items()}
        for info in unit.infos:
            read = partial(self.source.read, info) if hosted is None else _reader_of(hosted[info.name])
            memory = self.device.empty(info.nbytes)
            token = self.device.load(read, memory)
            tensor = shaped(memory, info)
            if info.name in dtypes and tensor.dtype != dtypes[info.name]:
                self.device.wait(token)
                tensor = tensor.to(dtypes[info.name])
            found[info.name] = tensor
        return found, token

    def _host(self, name: str) -> Tensors | None:
        """A unit's bytes in host memory, if there is room; they stay there."""
        if self.resident[0] + self.kept_nbytes(name) <= self.room.device:
            return None  # it will be kept on the device
        infos = self.weights.units[name].infos
        if self.resident[1] + sum(info.nbytes for info in infos) > self.room.host:
            return None
        found = {}
        for info in infos:
            found[info.name] = torch.empty(info.nbytes, dtype=torch.uint8)
            self.source.read(info, 0, host_bytes(found[info.name]))
        self._hosted[name] = found
        return found


def kept_nbytes(weights: Weights, unit: str, dtype: torch.dtype) -> int:
    """Bytes of a unit as it is kept: float tensors in the dtype that they are computed in."""
    one, wide = weights.units[unit], 0
    for name, info in one.floats.items():
        stored = TORCH_DTYPES[info.dtype].itemsize
        wide += info.nbytes // stored * parameter_dtype(name, dtype).itemsize - info.nbytes
    return wide + sum(info.nbytes for info in one.infos)


def _reader_of(memory: Tensor) -> READER:
    view = host_bytes(memory)

    def read(start: int, into: memoryview) -> None:
        into[:] = view[start : start + len(into)]

    return read


def shaped(memory: Tensor, info: TensorInfo) -> Tensor:
    """Bytes as the tensor that they are; of a GGUF type uint8 [out, blocks, bytes of one]."""
    if info.dtype in BLOCK_SIZE:
        return memory.view(*info.shape[:-1], -1, BLOCK_SIZE[info.dtype][1])
    return memory.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def by_name(tensors: Tensors, infos: Mapping[str, TensorInfo]) -> Tensors:
    """The tensors of a mapping to what is stored, by its keys."""
    return {name: tensors[info.name] for name, info in infos.items()}
