"""The streaming writer: header first, then every tensor at its offset, in order, as it comes.

A header depends on names, dtypes and shapes alone, so it is written before the first tensor exists: safetensors' is
made here, GGUF's in `gguf_file`. A file is allocated in full under a temporary name (a full disk shows before the work,
not after it), hashed while it is written, synced, given its mode and only then its final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq.errors import RunError
from streamq.savers import Spec

PARTIAL = ".partial"  # runtimes glob *.safetensors and *.json
HASH_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: file number in the plan, absolute offset and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file to be: path relative to the output folder, total size, header bytes, file mode.

    `alignment`: a tensor that does not end at a multiple of it is followed by zeros up to the next one.
    """

    path: str
    size: int
    header: bytes
    mode: int
    alignment: int = 1


def layout(
    path: str, number: int, specs: Sequence[Spec], mode: int, metadata: Mapping[str, str] | None = None
) -> tuple[TensorFile, list[Place]]:
    """Compute a file's header and the place of every tensor, in the given order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    sizes, position = [], 0
    for spec in specs:
        nbytes = spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + nbytes],
        }
        sizes.append(nbytes)
        position += nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    places, offset = [], len(header)
    for spec, nbytes in zip(specs, sizes, strict=True):
        places.append(Place(spec.name, spec.dtype, spec.shape, number, offset, nbytes))
        offset += nbytes
    return TensorFile(path, offset, header, mode), places


class ShardWriter:
    """One file that is being written front to back. One thread writes; another may sync.

    `shared`: other processes write other tensors of it, so these come at any place, and the file is hashed at the end.
    """

    def __init__(self, folder: Path, file: TensorFile, *, shared: bool = False) -> None:
        self.file = file
        self.shared = shared
        self.folder = folder
        self.final = folder / file.path
        self.partial = folder / (file.path + PARTIAL)
        self.position = 0
        self._sha256 = hashlib.sha256()
        self._tensor_sha256 = hashlib.sha256()
        self._tensor_end = 0
        self._descriptor = -1

    def create(self) -> None:
        """Allocate the whole file under its temporary name and write the header. Raises RunError on a full disk."""
        with disk_errors(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self.file.size)
            finally:
                os.close(descriptor)
        if not self.shared:
            self._sha256.update(self.file.header)
        self._write(self.file.header)
        self.sync()
        self.close()
        place = self.partial.parent
        sync_folder(place)
        while place != self.folder:  # folders that are new have to be entered in theirs, too
            place = place.parent
            sync_folder(place)

    def reopen(self, committed: Sequence[tuple[Place, str]]) -> str | None:
        """Take up an earlier run's file: hash its committed tensors again, which must have the sha256 given with each.

        Returns what is wrong with the file, or None.
        """
        path = self.partial if self.partial.exists() else self.final
        if not path.is_file() or path.stat().st_size != self.file.size:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            return f"{path.name} {found}, {self.file.size} were allocated"
        with open(path, "rb") as stream:
            header = stream.read(len(self.file.header))
            if header != self.file.header:
                return f"{path.name} starts with another header than this plan's"
            self._advance(header)
            for place, expected in committed:
                digest, left = hashlib.sha256(), place.nbytes
                while left:
                    chunk = stream.read(min(left, HASH_CHUNK))
                    digest.update(chunk)
                    self._advance(chunk)
                    left -= len(chunk)
                if digest.hexdigest() != expected:
                    return f"{place.name} in {path.name} is not what was committed"
                zeros = self._zeros()
                if stream.read(len(zeros)) != zeros:
                    return f"{path.name}: no zeros behind {place.name}"
                self._advance(zeros)
        return None

    def _zeros(self) -> bytes:
        """What belongs between the tensor that ends here and the next one."""
        return bytes(-self.position % self.file.alignment)

    def _advance(self, data: bytes | memoryview) -> None:
        if not self.shared:
            self._sha256.update(data)
        self.position += len(data)

    def begin(self, place: Place) -> None:
        """The next tensor. Tensors come in the order of their offsets."""
        if self.shared:
            self.position = place.offset
        assert place.offset == self.position, f"{place.name}: begun at {self.position}, belongs at {place.offset}"
        self._tensor_end = place.offset + place.nbytes
        self._tensor_sha256 = hashlib.sha256()

    def append(self, data: memoryview, beside: Callable[..., Future[Any]]) -> None:
        """The tensor's next bytes. `beside(job, *args)` begins a job, maybe in another thread: the file's hash.

        Raises RunError on a full disk.
        """
        hashed = None if self.shared else beside(self._sha256.update, data)
        try:
            self._tensor_sha256.update(data)
            self._write(data)
        finally:
            if hashed is not None:
                hashed.result()  # the caller's memory may change as soon as this returns

    def end(self) -> str:
        """The tensor is complete; returns its sha256."""
        assert self.position == self._tensor_end, f"tensor ends at {self.position}, must end at {self._tensor_end}"
        if zeros := self._zeros():
            if not self.shared:
                self._sha256.update(zeros)
            self._write(zeros)
        return self._tensor_sha256.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        with disk_errors(self.partial):
            if self._descriptor < 0:
                self._descriptor = os.open(self.partial, os.O_RDWR | os.O_CLOEXEC)
            done, view = 0, memoryview(data)
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], self.position + done)
            # Begins to bring them to the disk, so that `sync` finds little left to wait for.
            os.posix_fadvise(self._descriptor, self.position, len(view), os.POSIX_FADV_DONTNEED)
        self.position += len(data)

    def sync(self) -> None:
        """Bring what was written to the disk, and let its pages go. May run beside the thread that writes more."""
        if self._descriptor >= 0:
            position = self.position  # what is written from here on is not synced by this call
            with disk_errors(self.partial):
                os.fdatasync(self._descriptor)
            if os.fstat(self._descriptor).st_nlink == 0:
                raise RunError(f"{self.partial}: removed while it was written; start again with --no_resume")
            os.posix_fadvise(self._descriptor, 0, position, os.POSIX_FADV_DONTNEED)
            if position == self.file.size:
                self.close()

    def close(self) -> None:
        """Close the file; `write` opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def digest(self) -> str:
        """The sha256 of a shared file, complete by now: read again."""
        self.close()
        return sha256_of(self.partial if self.partial.exists() else self.final)

    def publish(self, digest: str = "") -> str:
        """Sync, set the mode, give the complete file its final name; returns the file's sha256. May be called again.

        `digest`: of a shared file.
        """
        whole = self.shared or self.position == self.file.size
        assert whole, f"{self.file.path}: {self.position} of {self.file.size} bytes written"
        self.close()
        if self.partial.exists():
            publish(self.partial, self.final, self.file.mode)
        elif not self.final.is_file() or self.final.stat().st_size != self.file.size:
            raise RunError(f"{self.partial}: gone, removed by another program; start again with --no_resume")
        return digest or self._sha256.hexdigest()


def publish(partial: Path, final: Path, mode: int) -> None:
    """fsync, fchmod, rename, fsync the folder: after a power cut the file is there whole, or not at all."""
    with disk_errors(partial):
        descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, final)
        sync_folder(final.parent)


def write_whole(final: Path, content: bytes, mode: int) -> str:
    """Write a small file in the same way; returns its sha256."""
    partial = final.with_name(final.name + PARTIAL)
    with disk_errors(partial):
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
    publish(partial, final, mode)
    return hashlib.sha256(content).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. Raises RunError."""
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """A file's sha256, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class disk_errors:
    """Turns what the operating system says while writing into a RunError that names the file and the way on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "make room" if full else "check the disk and its permissions"
            raise RunError(
                f"{self.path}: {error.strerror}; what is complete is kept: {advice}, then run the same command"
            ) from error
