"""The streams between blocks: what has come out of the last committed block, for every sample.

A generation of a stream is one file, a slot a sample, written under a new name beside the one that is read and
synced before the journal's line that makes it count; only then the old one goes. So a run that was cut off goes on with
exactly the values that the last committed block made, and at most two generations are on the disk. While they fit the
budget the streams are kept in memory too, and the files are only written.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamq.calibration.store import ExpertInputs
from streamq.checkpoint import Source
from streamq.device import Device
from streamq.device.cpu import host_bytes
from streamq.errors import RunError, UsageError
from streamq.savers.shard import disk_errors, sync_folder
from streamq.wan.blocks import Flow

FIRST_STREAMS = {"hidden": "hidden_states", "control": "control"}  # stream -> its tensors in a calibration set
State = dict[str, Any]  # stream -> [file name, [crc32 of each slot]], what the journal keeps


class Cache:
    """One expert's streams. Slots have the shape [1, L, D] and the replay's dtype."""

    def __init__(
        self, folder: Path, inputs: ExpertInputs, dtype: torch.dtype, device: Device, *, in_memory: bool
    ) -> None:  # fmt: skip
        shapes = inputs.shapes
        self.folder, self.inputs, self.dtype, self.device = folder, inputs, dtype, device
        self.shape = (1, shapes.tokens, shapes.dim)
        self.count = len(inputs.samples)
        self.nbytes = shapes.tokens * shapes.dim * dtype.itemsize
        self._source = Source(inputs.checkpoint)
        self._memory: dict[str, list[Tensor | None]] | None = {} if in_memory else None
        self._live: State = {}  # streams that lie in files; the others are still as the set has them
        self._begun: dict[str, tuple[str, int, list[int]]] = {}  # stream -> new file, its descriptor, crcs
        self._descriptors: dict[str, int] = {}
        self._doomed: list[str] = []
        self._dropped: tuple[str, ...] = ()

    def restore(self, state: State) -> None:
        """Go on from what the journal says of the last committed block. Raises UsageError if it is not there."""
        self._live = dict(state)
        slot = torch.empty(self.nbytes, dtype=torch.uint8)
        for stream, (name, sums) in state.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != self.nbytes * self.count or len(sums) != self.count:
                there = "is missing" if size < 0 else f"has {size} bytes, {self.nbytes * self.count} were written"
                raise UsageError(f"{path}: {there}: cannot be resumed; start again with --no_resume")
            for sample, expected in enumerate(sums):
                self._read_file(stream, sample, 0, host_bytes(slot))
                if zlib.crc32(host_bytes(slot)) != expected:
                    raise UsageError(f"{path}: sample {sample} is not what was committed; start again with --no_resume")
        names = {name for name, _ in state.values()}
        for path in self.folder.glob("*.stream"):  # of a block that was cut off
            if path.name not in names:
                path.unlink(missing_ok=True)

    def read(self, stream: str, sample: int) -> Tensor:
        """A slot, on the device; not to be changed."""
        kept = self._memory.get(stream) if self._memory is not None else None
        if kept is not None and (tensor := kept[sample]) is not None:
            if self.device.kind == "cpu":
                return tensor
            view = host_bytes(tensor)
            return self._loaded(lambda start, into: into.__setitem__(slice(None), view[start : start + len(into)]))
        tensor = self._loaded(lambda start, into: self._read_file(stream, sample, start, into))
        if self._memory is not None and self.device.kind == "cpu":
            self._memory.setdefault(stream, [None] * self.count)[sample] = tensor
        return tensor

    def _loaded(self, read: Any) -> Tensor:
        memory = self.device.empty(self.nbytes)
        self.device.wait(self.device.load(read, memory))
        return memory.view(self.dtype).view(self.shape)

    def _read_file(self, stream: str, sample: int, start: int, into: memoryview) -> None:
        if stream not in self._live:
            self._source.read(self.inputs.tensors[f"{FIRST_STREAMS[stream]}.{sample}"], start, into)
            return
        name, position, done = self._live[stream][0], sample * self.nbytes + start, 0
        try:
            if stream not in self._descriptors:
                self._descriptors[stream] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            while done < len(into):
                count = os.preadv(self._descriptors[stream], [into[done:]], position + done)
                if count == 0:
                    raise RunError(f"{self.folder / name}: ends early; start again with --no_resume")
                done += count
        except OSError as error:
            raise RunError(f"{self.folder / name}: {error.strerror}; run the same command again") from error

    def begin(self, flow: Flow, number: int) -> None:
        """New files for what the unit writes. `number` is the unit's, so that names differ from those being read."""
        for stream in flow.writes:
            name = f"{self.inputs.name or 'transformer'}-{stream}-{number}.stream"
            with disk_errors(self.folder / name):
                # Not truncated: another process of the run may have written to it by now.
                descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self._begun[stream] = (name, descriptor, [0] * self.count)
                os.posix_fallocate(descriptor, 0, self.nbytes * self.count)
        self._doomed = [self._live[s][0] for s in (*flow.writes, *flow.drops) if s in self._live]
        self._dropped = flow.drops

    def write(self, stream: str, sample: int, tensor: Tensor) -> None:
        """A sample's new slot. The old one may still be read until `sync`, if it is not in memory."""
        name, descriptor, sums = self._begun[stream]
        assert tensor.dtype == self.dtype and tuple(tensor.shape) == self.shape, (stream, tensor.dtype, tensor.shape)
        tensor = tensor.contiguous()
        keep = None
        if self._memory is not None:
            keep = tensor if self.device.kind == "cpu" else torch.empty(self.shape, dtype=self.dtype)
            self._memory.setdefault(stream, [None] * self.count)[sample] = keep
        position, crc = sample * self.nbytes, 0
        with disk_errors(self.folder / name):
            for view in self.device.store(tensor, self.device.mark()):
                crc, done = zlib.crc32(view, crc), 0
                if keep is not None and self.device.kind != "cpu":
                    start = position - sample * self.nbytes
                    host_bytes(keep)[start : start + len(view)] = view
                while done < len(view):
                    done += os.pwrite(descriptor, view[done:], position + done)
                position += len(view)
        sums[sample] = crc

    def written(self, stream: str, sample: int) -> Tensor:
        """A slot that `write` has had since `begin`, on the device; before `sync`. Raises RunError."""
        name, descriptor, _ = self._begun[stream]

        def read(start: int, into: memoryview) -> None:
            with disk_errors(self.folder / name):
                done = 0
                while done < len(into):
                    count = os.preadv(descriptor, [into[done:]], sample * self.nbytes + start + done)
                    if count == 0:
                        raise RunError(f"{self.folder / name}: ends early; run the same command again")
                    done += count

        return self._loaded(read)

    def sync(self) -> State:
        """Bring the new generation to the disk; returns what the journal is to say.

        Raises RunError, also if the calibration set has changed meanwhile.
        """
        self._source.check_unchanged()
        for stream in list(self._begun):
            name, descriptor, sums = self._begun.pop(stream)
            with disk_errors(self.folder / name):
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)
            self._close(stream)
            self._live[stream] = [name, sums]
        for stream in self._dropped:
            self._live.pop(stream, None)
        sync_folder(self.folder)
        return dict(self._live)

    def adopt(self, state: State) -> None:
        """Go on from what another process of the run has restored."""
        self._live = dict(state)

    def committed(self, *, remove: bool = True) -> None:
        """The journal has the new generation: the old one goes; its file, where this process is to remove it."""
        for name in self._doomed if remove else ():
            with disk_errors(self.folder / name):
                (self.folder / name).unlink(missing_ok=True)
        for stream in self._dropped:
            self._close(stream)
            if self._memory is not None:
                self._memory.pop(stream, None)
        self._doomed, self._dropped = [], ()

    def _close(self, stream: str) -> None:
        if stream in self._descriptors:
            os.close(self._descriptors.pop(stream))

    def close(self) -> None:
        """Close every file; what is committed stays on the disk."""
        for _, descriptor, _ in self._begun.values():
            os.close(descriptor)
        for stream in list(self._descriptors):
            self._close(stream)
        self._begun = {}
        self._source.close()
