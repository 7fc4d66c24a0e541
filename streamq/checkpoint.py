"""Safetensors on disk: which files make a checkpoint, what their headers promise, and their bytes.

Headers are checked once and in full before anything is read: length, JSON, names, dtypes, shapes against spans, and
that the spans tile the data exactly (the rules of safetensors' `src/tensor.rs`). Bytes are read with `pread` into
buffers that the caller owns; no file is ever mapped, because a kept mapping makes a whole shard resident.

Knows nothing of what the tensors mean, and needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq.errors import DOWNLOAD, DamagedError, RunError, UsageError

DTYPE_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# GGUF's words for blocks along the last dimension: elements and bytes of one.
BLOCK_SIZE = {"Q8_0": (32, 34), "Q4_0": (32, 18)}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_INDEX_BYTES = 64 << 20
MAX_DIMENSIONS = 16
PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle"}
SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint. `offset` is absolute in its file, in bytes; `dtype` is safetensors' word."""

    name: str
    file: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a stored tensor, in safetensors' or GGUF's word for its dtype."""
    if dtype in BLOCK_SIZE:
        elements, size = BLOCK_SIZE[dtype]
        return math.prod(shape) // elements * size
    return math.prod(shape) * DTYPE_SIZE[dtype]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file whose header has been read and found sound. `name` is relative to the checkpoint's folder."""

    path: Path
    name: str
    size: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of one model: a single file, or shards."""

    root: Path
    files: tuple[SourceFile, ...]
    tensors: dict[str, TensorInfo]

    def where(self, info: TensorInfo) -> str:
        """`blocks.0.ffn.0.weight in transformer/model-00001-of-00002.safetensors`, for messages."""
        return f"{info.name} in {self.root.name}/{self.files[info.file].name}"


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check the headers of a `.safetensors` file, or of a folder's shards.

    Raises UsageError for everything that makes the checkpoint unreadable or ambiguous.
    """
    if path.is_file():
        return _assemble(path.parent, [path])
    index = _find_index(path)
    if index is not None:
        return _from_index(path, index)
    return _assemble(path, _without_index(path))


def _find_index(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.safetensors.index.json"))
    if len(found) <= 1:
        return found[0] if found else None
    usual = folder / "diffusion_pytorch_model.safetensors.index.json"
    if usual in found:
        return usual
    raise UsageError(
        f"{folder}: {len(found)} index files ({', '.join(f.name for f in found)}); keep the one to be read"
    )


def _without_index(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
        hint = f"; {pickles[0]} is a pickle, which streamq never opens: convert it to safetensors" if pickles else ""
        raise UsageError(f"{folder}: no .safetensors file here{hint}")
    usual = folder / "diffusion_pytorch_model.safetensors"
    if usual in files:
        return [usual]
    if len(files) == 1 and not SHARD_NAME.fullmatch(files[0].name):
        return files
    stems: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := SHARD_NAME.fullmatch(file.name):
            stems.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    if len(stems) != 1 or len(next(iter(stems.values()))) != len(files):
        raise UsageError(f"{folder}: {len(files)} .safetensors files and no index; give the one to be read as the path")
    (stem, count), present = next(iter(stems.items()))
    for number in range(1, count + 1):
        if number not in present:
            name = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
            raise DamagedError(f"{folder}: shard {name} is missing ({len(present)} of {count} are here)", "download it")
    return files


def _from_index(folder: Path, index: Path) -> Checkpoint:
    document = load_json(index, MAX_INDEX_BYTES)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedError(f"{index}: no `weight_map` object in it", "download the index again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not 0 < len(file) < 256:
            what = f"{index}: weight_map.{tensor} is {str(file)[:80]!r}, not a file name"
            raise DamagedError(what, "download the index again")
        if os.path.isabs(file) or ".." in Path(file).parts or "\\" in file or "\0" in file:
            raise UsageError(
                f"{index}: weight_map.{tensor} points outside the folder: {file!r}; such an index is not followed"
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name}: missing, but {index.name} lists it", "download this shard")
    checkpoint = _assemble(folder, [folder / name for name in names])
    for tensor, name in weight_map.items():
        info = checkpoint.tensors.get(tensor)
        if info is None or checkpoint.files[info.file].name != name:
            what = f"{tensor}: {index.name} says it is in {name}, whose header has no such tensor"
            raise DamagedError(what, "download both again")
    for tensor, info in checkpoint.tensors.items():
        if tensor not in weight_map:
            raise UsageError(
                f"{checkpoint.where(info)}: not listed in {index.name}; index and shards do not belong together"
            )
    return checkpoint


def _assemble(root: Path, paths: list[Path]) -> Checkpoint:
    files: list[SourceFile] = []
    tensors: dict[str, TensorInfo] = {}
    for number, path in enumerate(paths):
        file, infos = read_header(path, root, number)
        for info in infos:
            if info.name in tensors:
                first = files[tensors[info.name].file].name
                raise UsageError(
                    f"{info.name}: in two files, {first} and {file.name}; remove the one that does not belong"
                )
            tensors[info.name] = info
        files.append(file)
    return Checkpoint(root, tuple(files), tensors)


def read_header(path: Path, root: Path, number: int = 0) -> tuple[SourceFile, list[TensorInfo]]:
    """Read and check one file's header. `number` becomes `TensorInfo.file`.

    Raises UsageError, naming the file, the tensor and both numbers, when a rule of the format is violated.
    """
    name = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
    if path.suffix in PICKLE_SUFFIXES:
        raise UsageError(f"{path}: a pickle ({path.suffix}), which streamq never opens: convert it to safetensors")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            kind = "a directory" if path.is_dir() else "a pipe or device"
            raise UsageError(f"{path}: {kind}, not a regular file; put the weights there, or remove it")
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > status.st_size - 8:
                _refuse_other_kinds(path, first)
                raise DamagedError(
                    f"{path}: header length says {length} bytes, the file has {max(0, status.st_size - 8)} after it;"
                    " truncated or not safetensors"
                )
            if length > MAX_HEADER_BYTES:
                raise UsageError(
                    f"{path}: header of {length} bytes, the format allows {MAX_HEADER_BYTES}; not safetensors"
                )
            raw = file.read(length)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check the path and its permissions") from error
    header = parse_json(raw, f"{path}: header")
    if not isinstance(header, dict):
        raise UsageError(f"{path}: header is JSON of type {type(header).__name__}, not an object; not safetensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UsageError(f"{path}: __metadata__ is not an object of strings; not safetensors")
    start = 8 + length
    infos = [_tensor(path, name, entry, start, number) for name, entry in header.items()]
    _check_tiling(path, infos, start, status.st_size)
    digest = hashlib.sha256(first + raw).hexdigest()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns, digest), infos


def _refuse_other_kinds(path: Path, first: bytes) -> None:
    """A better message for what is known to be something else: a sound header length may look like a pickle."""
    if first[:4] in (b"PK\x03\x04", b"GGUF") or first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        kind = "a GGUF file" if first[:4] == b"GGUF" else "a pickle"
        raise UsageError(f"{path}: {kind}, not safetensors; streamq reads float safetensors only")


def _tensor(path: Path, name: str, entry: Any, start: int, number: int) -> TensorInfo:
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedError(f"{where}: header entry must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZE:
        raise UsageError(f"{where}: unknown dtype {dtype!r}; known: {' '.join(DTYPE_SIZE)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise DamagedError(f"{where}: shape {str(shape)[:80]} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise DamagedError(f"{where}: data_offsets {str(offsets)[:80]} are not two positions")
    begin, end = offsets
    need = math.prod(shape) * DTYPE_SIZE[dtype]
    if end - begin != need:
        raise DamagedError(f"{where}: header spans {end - begin} bytes, shape {shape} {dtype} needs {need}")
    return TensorInfo(name, number, dtype, tuple(shape), start + begin, need)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # True is an int too, but no size


def _check_tiling(path: Path, infos: Iterable[TensorInfo], start: int, size: int) -> None:
    position, before = start, "the header"
    for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):
        if info.offset != position:
            relation = "overlaps" if info.offset < position else "leaves a gap after"
            raise DamagedError(
                f"{path}: {info.name} {relation} {before}: it starts at data byte {info.offset - start},"
                f" {before} ends at {position - start}"
            )
        position, before = info.offset + info.nbytes, info.name
    if position != size:
        what = "truncated" if position > size else "trailing bytes"
        raise DamagedError(
            f"{path}: {what}: header describes {position - start} data bytes, the file holds {size - start}"
        )


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Checks inside are of files that were made here, not downloaded: a DamagedError's advice becomes `advice`."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(error.what, advice) from error


def load_json(path: Path, limit: int, advice: str = DOWNLOAD) -> Any:
    """Parse a JSON file of at most `limit` bytes. Raises UsageError, also for a key that stands twice in an object.

    advice: the next step, for a file that is damaged.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise UsageError(f"{path}: {size} bytes of JSON, more than the {limit} that streamq reads")
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check the path and its permissions") from error
    return parse_json(raw, str(path), advice)


def parse_json(raw: bytes, where: str, advice: str = DOWNLOAD) -> Any:
    """Parse strict UTF-8 JSON without repeated keys. Raises DamagedError that starts with `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise DamagedError(f"{where}: {twice!r} stands twice in one object", advice)
        return result

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not valid JSON ({error})", advice) from error


class Source:
    """A checkpoint's open files. Reads by `pread`, and notices when a file changes under it. Closes with `close()`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._descriptors: list[int] = []
        try:
            for file in checkpoint.files:
                self._descriptors.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise RunError(f"{error.filename}: {error.strerror}; run again once it can be read") from error
        self.check_unchanged()

    def read(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from byte `start` on.

        Raises RunError when the file ends early or cannot be read.
        """
        descriptor, position, done = self._descriptors[info.file], info.offset + start, 0
        while done < len(into):
            try:
                count = os.preadv(descriptor, [into[done:]], position + done)
            except OSError as error:
                raise RunError(f"{self.checkpoint.where(info)}: {error.strerror} at byte {position + done}") from error
            if count == 0:
                raise RunError(
                    f"{self.checkpoint.where(info)}: the file ends at byte {position + done}, {len(into) - done} bytes"
                    " early: it changed while it was read; restore it and run the same command"
                )
            done += count
        self.bytes_read += done

    def drop(self, info: TensorInfo) -> None:
        """Tell the kernel that the tensor's pages are not needed again, so that a server's page cache survives."""
        os.posix_fadvise(self._descriptors[info.file], info.offset, info.nbytes, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Raise RunError if a file's size or time of change is no longer what its header check saw."""
        for file, descriptor in zip(self.checkpoint.files, self._descriptors, strict=True):
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise RunError(
                    f"{file.path}: changed while it was read ({file.size} bytes at the start, {status.st_size} now);"
                    " restore it and run the same command, or start again with --overwrite"
                )

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
