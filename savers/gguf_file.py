"""A GGUF file's header: made before any tensor exists, and read back.

    magic, version, counts | key-values | tensor table | zeros | tensors, each followed by zeros up to the alignment

Headers are made by the `gguf` package (ggml-org/llama.cpp `gguf-py`); tensors are streamed behind them. They are read
here by streamq's own parser: gguf's reader maps the whole file for as long as its arrays live, takes any offset for
granted, and follows a damaged count for hours. The rules are those of ggml-org/ggml `docs/gguf.md`. Needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from streamq.checkpoint import BLOCK_SIZE, MAX_DIMENSIONS, SourceFile, TensorInfo, nbytes_of
from streamq.errors import DamagedError, UsageError
from streamq.savers import Spec
from streamq.savers.shard import Place, TensorFile

ALIGNMENT = 32
MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 allows big-endian files besides, which are refused
ARCHITECTURE, QUANTIZATION, FILE_TYPE = "general.architecture", "general.quantization_version", "general.file_type"
NUMBERS = (QUANTIZATION, FILE_TYPE)  # uint32; other keys that are written are strings
DTYPES = {0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0", 30: "BF16"}  # ggml's number of a type
MAX_HEADER_BYTES = 16 << 20  # of the largest Wan: 0.1 MB
MAX_NAME_BYTES = 127  # ComfyUI-GGUF's own limit; ggml's is 63, which Wan's names keep to
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Header:
    """What a file's header says, checked. `metadata`: key -> (its type's number, value); an array's value is None."""

    file: SourceFile
    tensors: list[TensorInfo]
    metadata: dict[str, tuple[int, Any]]


def padded(position: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


# -- Writing -----------------------------------------------------------------------------------------------------------


def layout(
    path: str, number: int, specs: Sequence[Spec], mode: int, metadata: Mapping[str, str] | None = None
) -> tuple[TensorFile, list[Place]]:
    """Compute a file's header and the place of every tensor, in the given order; see `shard.layout`.

    Raises UsageError where the `gguf` package is not installed, and for names that a file cannot hold.
    """
    header = _header(specs, metadata or {})
    places, offset = [], len(header)
    for spec in specs:
        places.append(Place(spec.name, spec.dtype, spec.shape, number, offset, spec.nbytes))
        offset = padded(offset + spec.nbytes)
    return TensorFile(path, offset, header, mode, ALIGNMENT), places


def _header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """Everything up to the first tensor, its zeros included."""
    try:
        import gguf
        import numpy
    except ImportError as error:
        raise UsageError(
            f'--format gguf: the package gguf cannot be imported ({error}); pip install "streamq[gguf]"'
        ) from error
    writer = gguf.GGUFWriter(None, metadata[ARCHITECTURE])
    for key, value in metadata.items():
        if key in NUMBERS:
            writer.add_uint32(key, int(value))
        elif key != ARCHITECTURE:
            writer.add_string(key, value)
    names: set[str] = set()
    for spec in specs:
        if spec.name in names:
            raise UsageError(f"{spec.name}: two source tensors would be written under this name")
        if len(spec.name.encode()) > MAX_NAME_BYTES:
            raise UsageError(
                f"{spec.name}: a name of {len(spec.name.encode())} bytes, GGUF's readers take {MAX_NAME_BYTES};"
                " choose another --format"
            )
        names.add(spec.name)
        kind = gguf.GGMLQuantizationType[spec.dtype]
        writer.add_tensor_info(spec.name, spec.shape, numpy.dtype("float32"), spec.nbytes, raw_dtype=kind)
    sink = BytesIO()
    writer.fout = [cast(BufferedWriter, sink)]  # in place of the file that it would open
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    raw = sink.getvalue()
    return raw.ljust(padded(len(raw)), b"\0")


# -- Reading -----------------------------------------------------------------------------------------------------------


def read_header(path: Path, root: Path, number: int = 0) -> tuple[SourceFile, list[TensorInfo]]:
    """As `checkpoint.read_header`, of a GGUF file: shapes in torch's order, dtypes F32, F16, BF16, Q8_0, Q4_0."""
    header = read(path, root, number)
    return header.file, header.tensors


def read(path: Path, root: Path, number: int = 0) -> Header:
    """Read and check a file's header. `number` becomes `TensorInfo.file`.

    Raises UsageError, naming the file, the tensor and both numbers, when a rule of the format is violated: counts and
    lengths within the file, known types, no name or key twice, tensors that tile the file but for the zeros between.
    """
    name = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise UsageError(f"{path}: not a regular file; put the weights there, or remove it")
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            cursor = _Cursor(path, stream, status.st_size)
            tensors, metadata = _parse(cursor, number)
            digest = cursor.sha256.hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check the path and its permissions") from error
    return Header(SourceFile(path, name, status.st_size, status.st_mtime_ns, digest), tensors, metadata)


class _Cursor:
    """Reads a header front to back and never beyond the file."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self.sha256 = hashlib.sha256()
        self._stream = stream

    def fail(self, what: str) -> UsageError:
        return DamagedError(f"{self.path}: {what}; not a sound GGUF file", "make or download it again")

    def check(self, count: int, what: str) -> None:
        """Raise UsageError if `count` bytes more are more than the file has, or than a header may be long."""
        if count > self.size - self.position:
            raise self.fail(f"truncated: {what} takes {count} bytes, {self.size - self.position} are left")
        if self.position + count > MAX_HEADER_BYTES:
            raise self.fail(f"a header of more than {MAX_HEADER_BYTES} bytes ({what})")

    def take(self, count: int, what: str) -> bytes:
        self.check(count, what)
        raw = self._stream.read(count)
        if len(raw) != count:
            raise self.fail(f"truncated while it was read: {what} takes {count} bytes, {len(raw)} came")
        self.position += count
        self.sha256.update(raw)
        return raw

    def number(self, letter: str, what: str) -> Any:
        """A number of struct's format letter, little-endian."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _parse(cursor: _Cursor, number: int) -> tuple[list[TensorInfo], dict[str, tuple[int, Any]]]:
    magic = cursor.take(len(MAGIC), "the magic")
    if magic != MAGIC:
        raise cursor.fail(f"begins with {magic!r}, GGUF begins with {MAGIC!r}")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        raise cursor.fail(f"version {version}, streamq reads {' and '.join(map(str, VERSIONS))}, little-endian")
    n_tensors, n_keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    cursor.check(24 * n_tensors + 13 * n_keys, f"a header of {n_tensors} tensors and {n_keys} keys")  # at the least
    metadata: dict[str, tuple[int, Any]] = {}
    for _ in range(n_keys):
        key = cursor.text("a key")
        if key in metadata:
            raise cursor.fail(f"the key {key!r} stands twice")
        metadata[key] = _value(cursor, key)
    kind, alignment = metadata.get("general.alignment", (_UINT32, ALIGNMENT))
    if kind != _UINT32 or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.fail(f"general.alignment {alignment!r} of type {kind}, must be a uint32 and a power of two from 8")
    entries = [_entry(cursor) for _ in range(n_tensors)]
    start = padded(cursor.position, alignment)
    cursor.take(start - cursor.position, "the zeros behind the tensor table")
    infos = [
        TensorInfo(name, number, dtype, shape, start + offset, nbytes_of(dtype, shape))
        for name, dtype, shape, offset in entries
    ]
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            raise cursor.fail(f"{info.name} stands twice in the tensor table")
        seen.add(info.name)
    _check_tiling(cursor, infos, start, alignment)
    return infos, metadata


def _value(cursor: _Cursor, key: str) -> tuple[int, Any]:
    """(type, value) of a key; None for an array, which is passed over."""
    kind = cursor.number("I", f"the type of {key!r}")
    if kind == _STRING:
        return kind, cursor.text(f"the value of {key!r}")
    if kind in _SCALARS:
        return kind, cursor.number(_SCALARS[kind], f"the value of {key!r}")
    if kind != _ARRAY:
        raise cursor.fail(f"the key {key!r} has a value of type {kind}, which GGUF does not have")
    inner, count = cursor.number("I", f"the type of {key!r}"), cursor.number("Q", f"the length of {key!r}")
    if inner in _SCALARS:
        cursor.take(count * struct.calcsize(f"<{_SCALARS[inner]}"), f"the array {key!r}")
    elif inner == _STRING:
        cursor.check(8 * count, f"the array {key!r}")
        for _ in range(count):
            cursor.text(f"an item of {key!r}")
    else:
        raise cursor.fail(f"the key {key!r} has an array of type {inner}, which streamq does not read")
    return kind, None


def _entry(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    """(name, dtype, shape in torch's order, offset from the first tensor)."""
    name = cursor.text("a tensor's name")
    if not name:
        raise cursor.fail("a tensor without a name")
    count = cursor.number("I", f"the rank of {name}")
    if count > MAX_DIMENSIONS:
        raise cursor.fail(f"{name}: {count} dimensions, {MAX_DIMENSIONS} at most")
    shape = tuple(reversed(struct.unpack(f"<{count}Q", cursor.take(8 * count, f"the shape of {name}"))))
    kind, offset = cursor.number("I", f"the type of {name}"), cursor.number("Q", f"the offset of {name}")
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise UsageError(
            f"{cursor.path}: {name}: ggml's type {kind}; streamq reads {' '.join(DTYPES.values())} only: give a file of"
            " these"
        )
    if not all(0 < size < 1 << 40 for size in shape):
        raise cursor.fail(f"{name}: shape {list(shape)}")
    if dtype in BLOCK_SIZE and (not shape or shape[-1] % BLOCK_SIZE[dtype][0]):
        raise cursor.fail(f"{name}: {dtype} of shape {list(shape)}, whose rows are not whole blocks of 32")
    return name, dtype, shape, offset


def _check_tiling(cursor: _Cursor, infos: Iterable[TensorInfo], start: int, alignment: int) -> None:
    position, before = start, "the header"
    for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):
        due = padded(position, alignment)
        if info.offset != due:
            relation = "overlaps" if info.offset < position else "is not where it belongs after"
            raise cursor.fail(
                f"{info.name} {relation} {before}: it starts at data byte {info.offset - start}, {due - start} is due"
                f" (multiples of {alignment})"
            )
        position, before = info.offset + info.nbytes, info.name
    if not position <= cursor.size <= padded(position, alignment):
        what = "truncated" if position > cursor.size else "trailing bytes"
        raise cursor.fail(
            f"{what}: the header describes {position - start} data bytes, the file holds {cursor.size - start}"
        )
