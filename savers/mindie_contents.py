"""What a MindIE folder holds: the words and tensors of each type, and what the runtime would trip over or pass over.

mindiesd (Ascend/MindIE-SD, `mindiesd/quantization`) leaves a layer float, without a word, whose type it does not know,
and rotates q and k by whatever it finds.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamq.checkpoint import load_json
from streamq.errors import UsageError

TYPES = {
    "w8a8": "W8A8_DYNAMIC", "w8a8_static": "W8A8", "w8a8_mxfp8": "W8A8_MXFP8", "w4a4_mxfp4": "W4A4_MXFP4"
}  # fmt: skip
MODE = 0o640  # mindiesd raises PermissionError for anything wider
FLOAT = "FLOAT"
MX_TYPES = ("w8a8_mxfp8", "w4a4_mxfp4")
MAX_DOCUMENT_BYTES = 64 << 20
MX_BLOCK = 32  # weights that share an exponent
# What attention is computed in -> the word in the description, and whether mindiesd refuses it without a rotation.
MARKS = {"fp8_e4m3": "FP8_DYNAMIC", "mxfp4": "MXFP4_DYNAMIC"}
MARKED, ROTATIONS = "quant_type", ("q_rot", "k_rot")
KNOWN_MARKS = {"FP8_DYNAMIC": True, "MXFP8_DYNAMIC": True, "MXFP4_DYNAMIC": False}
ROTATION_ERROR = 2.0**-7  # of R · R^T against 1: bf16 keeps 8 bits
# A layer that carries a smoothing scale: the linear's tensors lie below LINEAR, the scale is MUL_SCALE.
LINEAR, MUL_SCALE = "linear", "div.mul_scale"


def tensors_of(kind: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a layer, but for its bias, which is typed FLOAT."""
    if kind == "W8A8":
        return {"weight": ("I8", (rows, columns)), "quant_bias": ("I32", (rows,)), "input_scale": ("F32", (1,)),
                "input_offset": ("F32", (1,)), "deq_scale": ("F32", (rows,))}  # fmt: skip
    if kind == "W8A8_MXFP8":
        return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("U8", (rows, columns // MX_BLOCK))}
    if kind == "W4A4_MXFP4":
        return {"weight": ("U8", (rows, columns // 2)), "weight_scale": ("U8", (rows, columns // MX_BLOCK))}
    return {"weight": ("I8", (rows, columns)), "weight_scale": ("F32", (rows, 1)), "weight_offset": ("F32", (rows, 1))}


def read_description(folder: Path) -> dict[str, str]:
    """Tensor, or attention module's mark -> its type. Raises UsageError for what is no description."""
    path = next(iter(folder.glob("quant_model_description*.json")))
    document = load_json(path, MAX_DOCUMENT_BYTES)
    if not isinstance(document, dict) or not all(isinstance(kind, str) for kind in document.values()):
        raise UsageError(f"{path}: not an object of texts; not a MindIE description")
    return document


def layers_in(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> streamq's type, by the description."""
    back = {word: kind for kind, word in TYPES.items()} | {FLOAT: "float"}
    description, found = read_description(folder), {}
    for name, kind in description.items():
        if name.endswith(".weight") and len(tensors[name].shape if name in tensors else ()) == 2:
            layer = name.removesuffix(".weight").removesuffix(f".{LINEAR}")
            smooth = "_smooth" if f"{layer}.{MUL_SCALE}" in description else ""
            found[layer] = back.get(kind, kind) + smooth
    return found


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """mindiesd ignores an unknown type without a word, and reads the weights under one name only."""
    description = read_description(folder)
    path = next(iter(folder.glob("quant_model_description*.json")))
    found = []
    quant_type = description.pop("model_quant_type", None)
    if quant_type is None:
        found.append(f"{path.name}: no model_quant_type")
    else:
        wanted = f"quant_model_weight_{quant_type.lower()}.safetensors"
        sharded = (folder / "quant_model_weight.safetensors.index.json").is_file()
        if not sharded and not (folder / wanted).is_file():
            found.append(f"{wanted} is missing: mindiesd looks for it by model_quant_type {quant_type}")
        if path.name != f"quant_model_description_{quant_type.lower()}.json":
            found.append(f"{path.name}: its model_quant_type is {quant_type}")
    for file in (path, *folder.glob("quant_model_weight*.safetensors")):
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & ~MODE:
            found.append(f"{file.name}: mode {mode:04o}, mindiesd refuses anything wider than {MODE:04o}; chmod 640 it")
        if file.is_symlink():
            found.append(f"{file.name}: a symbolic link, which mindiesd refuses")
    found += [f"{name}: in the weights, not in {path.name}" for name in tensors if name not in description]
    marks = {name: kind for name, kind in description.items() if name.endswith(f".{MARKED}") and name not in tensors}
    description = {name: kind for name, kind in description.items() if name not in marks}
    found += [f"{name}: in {path.name}, not in the weights" for name in description if name not in tensors]
    found += _attention_problems(folder, marks, tensors)
    known = {FLOAT, *TYPES.values()}
    found += [f"{name}: unknown type {kind!r}" for name, kind in description.items() if kind not in known]
    layers = [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]
    layers = [layer for layer in layers if description.get(f"{layer}.weight") in TYPES.values()]
    biased = any(f"{layer}.bias" in tensors for layer in layers)
    for layer in layers:
        found += _layer_problems(layer, tensors[f"{layer}.weight"], tensors, description, biased)
    return found


def _layer_problems(
    layer: str, weight: Any, tensors: Mapping[str, Any], description: Mapping[str, str], biased: bool
) -> list[str]:  # fmt: skip
    found = []
    kind = description[f"{layer}.weight"]
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    columns *= 2 if kind == "W4A4_MXFP4" else 1
    for suffix, (dtype, shape) in tensors_of(kind, rows, columns).items():
        info = tensors.get(f"{layer}.{suffix}")
        if info is None:
            found.append(f"{layer}.{suffix}: missing")
        elif (info.dtype, tuple(info.shape)) != (dtype, tuple(shape)):
            found.append(f"{layer}.{suffix}: {info.dtype} {list(info.shape)}, must be {dtype} {list(shape)}")
        elif description.get(f"{layer}.{suffix}") != kind:
            found.append(f"{layer}.{suffix}: typed {description.get(f'{layer}.{suffix}')}, must be {kind}")
    bias = tensors.get(f"{layer}.bias")
    if bias is None and biased:
        found.append(f"{layer}.bias: missing, though other layers have theirs; mindiesd refuses a layer without it")
    if bias is not None and (bias.dtype, tuple(bias.shape)) != ("F32", (rows,)):
        found.append(f"{layer}.bias: {bias.dtype} {list(bias.shape)}, must be F32 [{rows}]")
    if layer.endswith(f".{LINEAR}"):
        name = f"{layer.removesuffix(LINEAR)}{MUL_SCALE}"
        scale = tensors.get(name)
        if scale is None:
            found.append(f"{name}: missing; without it mindiesd looks for {layer.removesuffix(f'.{LINEAR}')}.weight")
        elif (scale.dtype, tuple(scale.shape)) != ("F32", (columns,)):
            found.append(f"{name}: {scale.dtype} {list(scale.shape)}, must be F32 [{columns}]")
    return found


def _attention_problems(folder: Path, marks: Mapping[str, str], tensors: Mapping[str, Any]) -> list[str]:
    """Of words that mindiesd passes over in silence, and rotations that it needs or that would change the result."""
    found = []
    rotated = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in ROTATIONS)
    for name, kind in marks.items():
        module = name.removesuffix(f".{MARKED}")
        if kind not in KNOWN_MARKS:
            known = ", ".join(KNOWN_MARKS)
            found.append(
                f"{name}: unknown type {kind!r}, which mindiesd ignores: attention stays float; known: {known}"
            )
        if not any(f"{module}.q.{leaf}" in tensors for leaf in ("weight", f"{LINEAR}.weight")):
            found.append(f"{name}: no attention module of this model; mindiesd ignores it")
        if KNOWN_MARKS.get(kind) and module not in rotated:
            found.append(f"{module}.q_rot, {module}.k_rot: missing; mindiesd refuses {kind} without them")
    for module in rotated:
        found += _rotation_problems(folder, module, tensors)
    return found


def _rotation_problems(folder: Path, module: str, tensors: Mapping[str, Any]) -> list[str]:
    """q · R · (k · R)^T is q · k^T for one orthogonal R; nothing at run time would notice another."""
    import torch

    names = [f"{module}.{leaf}" for leaf in ROTATIONS]
    missing = [name for name in names if name not in tensors]
    if missing:
        return [f"{missing[0]}: missing; q and k must be rotated together"]
    pair = {name: tensors[name] for name in names}
    rows = next((tensors[n].shape[0] for n in (f"{module}.q.bias", f"{module}.q.{LINEAR}.bias") if n in tensors), 0)
    for name, info in pair.items():
        size = info.shape[0] if info.shape else 0
        if info.dtype != "BF16" or tuple(info.shape) != (size, size) or not size or rows % size:
            return [f"{name}: {info.dtype} {list(info.shape)}, must be BF16 and square, of a head's size"]
    files = sorted(folder.glob("*.safetensors"))  # the order in which `Output.checkpoint` numbers them
    raw = []
    for info in pair.values():
        with open(files[info.file], "rb") as stream:
            stream.seek(info.offset)
            raw.append(stream.read(info.nbytes))
    if raw[0] != raw[1]:
        return [f"{module}.k_rot: not equal to q_rot; q and k must be rotated by the same matrix"]
    turn = torch.frombuffer(bytearray(raw[0]), dtype=torch.bfloat16).view(size, size).double()
    error = float((turn @ turn.T - torch.eye(size, dtype=torch.float64)).abs().max())
    if not error <= ROTATION_ERROR:
        return [f"{module}.q_rot, {module}.k_rot: not orthogonal (R · R^T is off by {error:.3g})"]
    return []
