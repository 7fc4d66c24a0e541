"""Safetensors files of an output taken apart as raw bytes, changed in one place, and put together again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from streamq.verify import Report, verify
from streamq.wan import to_diffusers

Entry = tuple[str, list[int], bytes]  # safetensors' dtype, shape, bytes
Change = Callable[[dict[str, Entry]], object]
ITEM = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I32": 4, "I16": 2}
OTHER = {"F32": "I32", "BF16": "I16", "I8": "U8", "F8_E4M3": "U8", "U8": "I8"}
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}


def take_apart(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """A file's metadata and its tensors, in their order."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    spans = {name: (e["dtype"], e["shape"], [start + at for at in e["data_offsets"]]) for name, e in header.items()}
    return metadata, {name: (dtype, shape, raw[at[0] : at[1]]) for name, (dtype, shape, at) in spans.items()}


def put_together(path: Path, metadata: dict[str, str], tensors: dict[str, Entry]) -> None:
    """The same back."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def change(folder: Path, name: str, do: Callable[[Entry], Entry | None]) -> None:
    """Change one tensor in whichever file holds it; None: take it out."""
    for path in sorted(folder.rglob("*.safetensors")):
        metadata, tensors = take_apart(path)
        if name not in tensors:
            continue
        made = do(tensors[name])
        left = {n: made if n == name else entry for n, entry in tensors.items()}
        put_together(path, metadata, {n: entry for n, entry in left.items() if entry is not None})
        return
    raise AssertionError(f"{name} is in no file of {folder}")


def drop(entry: Entry) -> None:
    """Taken out."""


def truncate(entry: Entry) -> Entry:
    """Half its rows; of a number, none."""
    dtype, shape, raw = entry
    cut = [shape[0] // 2, *shape[1:]] if shape else [0]
    size = ITEM[dtype]
    for width in cut:
        size *= width
    return dtype, cut, raw[:size]


def retype(entry: Entry) -> Entry:
    """The same bytes under another dtype."""
    return OTHER[entry[0]], entry[1], entry[2]


def rescale(entry: Entry) -> Entry:
    """Every value times 1.5 (codes: turned about in their rows)."""
    dtype, shape, raw = entry
    values = torch.frombuffer(bytearray(raw), dtype=TORCH[dtype]).reshape(shape)
    values = values.view(torch.int8).flip(-1) if ITEM[dtype] == 1 else (values * 1.5).to(values.dtype)
    return dtype, shape, values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def copied(folder: Path, to: Path, *, manifest: bool) -> Path:
    """A copy to be damaged, with or without streamq.json."""
    shutil.copytree(folder, to)
    if not manifest:
        (to / "streamq.json").unlink()
    return to


def sign(folder: Path) -> None:
    """Make the manifest's sizes and checksums those of the files."""
    manifest = json.loads((folder / "streamq.json").read_text())
    for name, about in manifest["files"].items():
        data = (folder / name).read_bytes()
        about |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if "tensors" in about:
            parts = take_apart(folder / name)[1].items()
            about["tensors"] = {key: hashlib.sha256(raw).hexdigest() for key, (_, _, raw) in parts}
    (folder / "streamq.json").write_text(json.dumps(manifest))


def names(name: str, problems: list[str]) -> bool:
    """Whether one of them says where to look: the tensor's module, by its native or its diffusers name."""
    inside = re.sub(r"^(model\.diffusion_model\.)?(blocks\.\d+\.)?", "", name)
    module = inside.removesuffix(".weight").removesuffix(".bias").removesuffix("_scale").removesuffix(".weight")
    module = module.removesuffix(".comfy_quant")
    words = (module, (to_diffusers(f"blocks.0.{module}") or module).removeprefix("blocks.0."))
    return any(word in one for one in problems for word in words)


def look(folder: Path, source: Path | None = None) -> Report:
    """What `streamq verify` finds."""
    return verify(folder, None if source is None else str(source))


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's .safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
