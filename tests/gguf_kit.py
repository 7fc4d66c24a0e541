"""GGUF files taken apart with gguf's own reader, and put together again without any check. For `test_gguf*.py`."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from conftest import run

DATA = Path(__file__).parent / "data"
SOURCE = DATA / "torchao/source"
TYPES = {"w8a16": "q8_0", "w4a16": "q4_0"}
UINT32, STRING = 4, 8
NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
Keys = dict[str, tuple[int, Any]]


@dataclass
class Stored:
    """A tensor of a file: its type by name or number, shape in torch's order, bytes; and where it claims to be."""

    kind: str | int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None
    name: str | None = None


Tensors = dict[str, Stored]
Change = Callable[[Keys, Tensors], object]


def only_file(folder: Path) -> Path:
    """The folder's GGUF file."""
    (path,) = folder.glob("*.gguf")
    return path


def load(path: Path) -> tuple[Keys, Tensors]:
    """What gguf's reader finds in a file."""
    reader = gguf.GGUFReader(path)
    keys = {k: (int(f.types[0]), f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    tensors = {
        t.name: Stored(t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data.tobytes())
        for t in reader.tensors
    }
    return keys, tensors


def text(value: str) -> bytes:
    """A string as a header has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pad(raw: bytes) -> bytes:
    """With zeros up to a multiple of 32."""
    return raw + bytes(-len(raw) % 32)


def header(keys: Keys, tensors: Tensors, *, version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    """Magic to tensor table, zeros included. `counts`: of tensors and keys, where they are to lie."""
    raw = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    for key, (kind, value) in keys.items():
        if not isinstance(value, bytes):
            letter = {UINT32: "I", 10: "Q", 6: "f"}.get(kind)
            value = text(value) if letter is None else struct.pack(f"<{letter}", value)
        raw += text(key) + struct.pack("<I", kind) + value
    position = 0
    for name, one in tensors.items():
        kind = NUMBERS[one.kind] if isinstance(one.kind, str) else one.kind
        raw += text(one.name or name) + struct.pack("<I", len(one.shape))
        raw += struct.pack(f"<{len(one.shape)}Q", *reversed(one.shape))
        raw += struct.pack("<IQ", kind, position if one.offset is None else one.offset)
        position += len(pad(one.data))
    return pad(raw)


def store(path: Path, keys: Keys, tensors: Tensors) -> None:
    """Write a file of these."""
    path.write_bytes(header(keys, tensors) + b"".join(pad(one.data) for one in tensors.values()))


def rewrite(path: Path, change: Change) -> None:
    """Change a file."""
    keys, tensors = load(path)
    change(keys, tensors)
    store(path, keys, tensors)


def quantize(out: Path, kind: str, source: Path = SOURCE, *more: object) -> Path:
    """Run `streamq quant --format gguf`; returns the file."""
    done = run("quant", "--model_path", source, "--save_path", out, "--quant_type", kind, "--format", "gguf",
               "--device", "cpu", "--quiet", *more)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return only_file(out if list(out.glob("*.gguf")) else out / "high_noise_model")


def verify(folder: Path, *more: object) -> list[str]:
    """What `streamq verify` finds wrong."""
    result = run("verify", folder, *more, "--json")
    if result.returncode == 2:
        return [result.stderr]
    report = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0) == (not report["problems"])
    return report["problems"]


def due_type(name: str, shape: tuple[int, ...], block: str, half: str) -> str:
    """ComfyUI-GGUF's rules, said once more: what a tensor of a recipe without exceptions is stored as."""
    if len(shape) != 2 or math.prod(shape) <= 1024 or name.endswith("modulation"):
        return "F32"
    outside = ("patch_embedding.", "text_embedding.", "time_projection.", "time_embedding.", "img_emb.", "head.")
    extra = ("audio_injector.", "casual_audio_encoder.", "face_adapter.")
    if any(part in name for part in outside) or name.startswith(extra) or shape[1] % 32:
        return half
    return block


def floats(one: Stored) -> np.ndarray[Any, Any]:
    """A tensor's values in fp32, by gguf's own arithmetic."""
    kind = gguf.GGMLQuantizationType[str(one.kind)]
    raw = np.frombuffer(one.data, np.uint8)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return gguf.quants.dequantize(raw, kind).reshape(one.shape)
    return gguf.quants.dequantize(raw.reshape(*one.shape[:-1], -1), kind).reshape(one.shape)
