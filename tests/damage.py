"""Ways to damage a checkpoint: safetensors files taken apart, changed and put together again without any check."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny

NAME = "diffusion_pytorch_model.safetensors"
INDEX = NAME + ".index.json"
QUERY = "blocks.1.self_attn.q.weight"  # F32 [64, 64], 16384 bytes, in every tiny native checkpoint
ITEM = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I8": 1, "F8_E4M3": 1}
BITS = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}
INFINITY = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}

Header = dict[str, Any]
Tensors = dict[str, tuple[str, list[int], bytes]]


@dataclass
class Case:
    """One bad input in the making. `model` and `save` become --model_path and --save_path."""

    tmp: Path
    patch: pytest.MonkeyPatch
    model: Path
    save: Path
    held: list[int] = field(default_factory=list)  # file descriptors to be closed in the end

    @property
    def file(self) -> Path:
        """The checkpoint's only file."""
        return self.model / NAME

    def remake(self, family: str = "t2v-1.3B", **how: Any) -> Path:
        """Another checkpoint in place of the usual one; returns its folder."""
        self.model = write_tiny(self.tmp / "other", family, **how)
        return self.model

    def recipe(self, text: str) -> Path:
        """A recipe file, `tmp/recipe.yaml`."""
        path = self.tmp / "recipe.yaml"
        path.write_text(text)
        return path


Make = Callable[[Case], object]


def read(path: Path) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def assemble(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file's bytes, with a header length that may lie."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def load(path: Path) -> Tensors:
    """Name -> dtype, shape, bytes."""
    header, data = read(path)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def store(path: Path, tensors: Tensors) -> None:
    """Write a sound safetensors file of these tensors."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    path.write_bytes(assemble(json.dumps(header).encode(), data))


def then(*makes: Make) -> Make:
    """One after the other."""
    return lambda case: [make(case) for make in makes]


def header(raw: bytes, length: int | None = None, data: bytes = b"") -> Make:
    """The whole file is these bytes of header, and this data."""
    return lambda case: case.file.write_bytes(assemble(raw, data, length))


def content(raw: bytes, name: str = NAME) -> Make:
    """The file is these bytes, under this name; it becomes the model path where it has another name."""

    def make(case: Case) -> None:
        (case.model / name).write_bytes(raw)
        if name != NAME:
            case.model = case.model / name

    return make


def entry(name: str = QUERY, /, **changes: object) -> Make:
    """One tensor's header entry is changed; None takes a key away. The data stays."""

    def make(case: Case) -> None:
        head, data = read(case.file)
        head[name] = {key: value for key, value in (head[name] | changes).items() if value is not None}
        case.file.write_bytes(assemble(json.dumps(head).encode(), data))

    return make


def shift(begin: int, end: int, name: str = QUERY) -> Make:
    """One tensor's span is moved by so many bytes at each end."""

    def make(case: Case) -> None:
        head, _ = read(case.file)
        first, last = head[name]["data_offsets"]
        entry(name, data_offsets=[first + begin, last + end])(case)

    return make


def tensors(change: Callable[[Tensors], object]) -> Make:
    """The file is written anew, sound, after `change` has changed its tensors in place."""

    def make(case: Case) -> None:
        found = load(case.file)
        change(found)
        store(case.file, found)

    return make


def drop(*names: str) -> Make:
    """The tensors whose names contain one of these words are left out."""

    def change(found: Tensors) -> None:
        for name in [n for n in found if any(word in n for word in names)]:
            del found[name]

    return tensors(change)


def put(name: str, dtype: str = "F32", shape: tuple[int, ...] = (64, 64)) -> Make:
    """A tensor of zeros is added, or takes the place of the one of that name."""
    return tensors(lambda found: found.update({name: (dtype, list(shape), bytes(int(np.prod(shape)) * ITEM[dtype]))}))


def reshape(name: str, shape: list[int]) -> Make:
    """A tensor of both blocks gets another shape over the same bytes."""
    return lambda case: [
        entry(name.replace("blocks.1", block), shape=shape)(case) for block in ("blocks.0", "blocks.1")
    ]


def rename(old: str, new: str) -> Make:
    """Names that begin with `old` begin with `new` instead."""

    def change(found: Tensors) -> None:
        renamed = {new + name[len(old) :] if name.startswith(old) else name: value for name, value in found.items()}
        found.clear()
        found.update(renamed)

    return tensors(change)


def poison(name: str, value: str, *, at: int = -1, dtype: str = "F32") -> Make:
    """One element becomes NaN, +Inf or -Inf."""

    def make(case: Case) -> None:
        if dtype != "F32":
            case.remake(dtype={"BF16": "bf16", "F16": "fp16"}[dtype])

        def change(found: Tensors) -> None:
            kind, shape, raw = found[name]
            bits = np.frombuffer(raw, BITS[kind]).copy()
            sign = 1 << (8 * ITEM[kind] - 1) if value == "-inf" else 0
            bits[at] = INFINITY[kind] | sign | (value == "nan")
            found[name] = (kind, shape, bits.tobytes())

        tensors(change)(case)

    return make


def shards(change: Callable[[Case, list[Path], dict[str, str]], object], *, keep_index: bool = True) -> Make:
    """A sharded checkpoint: `change` gets the case, its shards and the index's weight map, which is written back."""

    def make(case: Case) -> None:
        folder = case.remake(shard_bytes=200_000)
        index = folder / INDEX
        document = json.loads(index.read_text())
        change(case, sorted(folder.glob("*.safetensors")), document["weight_map"])
        index.write_text(json.dumps(document)) if keep_index else index.unlink()

    return make


def index(text: str | None = None, **weight_map: object) -> Make:
    """The index is this text, or gets these entries (under `QUERY`, `other` a tensor that no shard has)."""

    def make(case: Case) -> None:
        path = case.remake(shard_bytes=200_000) / INDEX
        document = json.loads(path.read_text())
        document["weight_map"] |= {{"query": QUERY, "other": "blocks.1.nothing"}[k]: v for k, v in weight_map.items()}
        path.write_text(json.dumps(document) if text is None else text)

    return make


def experts(*changes: Callable[[Path], object], layout: str = "native") -> Make:
    """A Wan2.2 folder with two experts, changed."""

    def make(case: Case) -> None:
        folder = case.remake("t2v-A14B", layout=layout)
        for change in changes:
            change(folder)

    return make


def fail_on(name: str, after: int, error: int) -> Make:
    """`os.NAME` fails with this error from its n-th call on."""

    def make(case: Case) -> None:
        real, calls = getattr(os, name), [0]

        def broken(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise OSError(error, os.strerror(error))
            return real(*args)

        case.patch.setattr(os, name, broken)

    return make


def while_reading(change: Callable[[Path], object]) -> Make:
    """The source is changed once three reads of it are done."""

    def make(case: Case) -> None:
        real, calls = os.preadv, [0]

        def reading(*args: Any) -> int:
            calls[0] += 1
            if calls[0] == 4:
                change(case.file)
            return real(*args)

        case.patch.setattr(os, "preadv", reading)

    return make
