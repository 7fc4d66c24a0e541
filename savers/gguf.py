"""GGUF: one `.gguf` file with native names, for ComfyUI-GGUF and for diffusers' `from_single_file`.

Which tensor has which type follows city96/ComfyUI-GGUF `tools/convert.py` and what the two loaders can do: only weights
of linear layers are dequantized when they are used, so that everything else has to be F32 (or F16).

    matrices of block layers, in features a multiple of 32         Q8_0, Q4_0
    vectors, *modulation, anything but a matrix, up to 1024 elements         F32
    other matrices                                                           BF16, or F16 from an fp16 source

A row is in / 32 blocks, each a fp16 scale d and 32 codes: Q8_0 34 bytes, weight = d · q, q int8; Q4_0 18 bytes,
weight = d · (q - 8), byte i = q[i] | q[i + 16] << 4. Source: ggml-org/ggml `src/ggml-common.h`, `src/ggml-quants.c`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import BLOCK_SIZE, load_json
from streamq.errors import UsageError
from streamq.quantized import LABELS, QuantizedLinear, Rule, Scheme
from streamq.savers import Document, SaveOptions, Schemes, Spec, gguf_file
from streamq.savers.plain import bias as bias
from streamq.savers.plain import encode_vector as encode_vector
from streamq.savers.plain import float_shape as float_shape
from streamq.savers.plain import record_of
from streamq.savers.plain import root_documents as root_documents
from streamq.savers.plain import rotation_specs as rotation_specs
from streamq.savers.plain import unpack as unpack
from streamq.savers.plain import vector_specs as vector_specs
from streamq.wan import COMFYUI_PREFIX, Linear, Model, to_diffusers, unit_of
from streamq.wan.config import CLASS, DIFFUSERS_VERSION, VACE_CLASS, diffusers_document
from streamq.wan.names import RMS_NORMS

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"q8_0": "Q8_0", "q4_0": "Q4_0"}
CONTAINER = "gguf"
OUTER = False
ATTENTION = ()
MODE = 0o644
NAMES = "native"
EXPERTS = {name: name for name in ("", "high_noise_model", "low_noise_model")}
LAYOUTS = ()
WAYS: Mapping[str, tuple[str, ...]] = {"q8_0": (), "q4_0": ()}
RULES: Mapping[str | None, Rule] = {None: Rule()}
ARCHITECTURE = "wan"
QUANTIZATION_VERSION = 2
FILE_TYPES = {"Q8_0": 7, "Q4_0": 2}  # llama.cpp's enum llama_ftype
BLOCK = 32
SMALL = 1024  # elements
MAX_CONFIG_BYTES = 4 << 20
WITHOUT_DIFFUSERS = ("s2v", "animate", "flf2v")  # of flf2v, from_single_file leaves the positions out (0.42.1)
_KINDS = {word: LABELS[kind] for kind, word in TYPES.items()}
_TILE = 1 << 17  # codes that are packed or unpacked at a time


def unfit(layer: Linear, scheme: Scheme) -> str | None:
    """Rows that are not whole blocks, and matrices too small to gain by it."""
    rows, columns = layer.weight.shape
    if columns % BLOCK:
        return f"{columns} in features, not a multiple of GGUF's blocks of {BLOCK}"
    if rows * columns <= SMALL:
        return f"{rows * columns} elements, which are kept in F32 up to {SMALL}"
    return None


def quantized_specs(layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
    """The weight in blocks, and the bias."""
    unit = unit_of(layer.name)
    specs = [Spec(f"{layer.native}.weight", TYPES[scheme.type], layer.weight.shape, unit)]
    return specs if layer.bias is None else [*specs, Spec(f"{layer.native}.bias", "F32", layer.bias.shape, unit)]


def encode(layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
    """The weight's bytes, uint8 [out, in / 32 · 34 or 18], and the bias in fp32."""
    import torch

    rows, columns = layer.codes.shape
    word, blocks = TYPES[layer.scheme.type], columns // BLOCK
    size = BLOCK_SIZE[word][1]
    packed = torch.empty(rows, blocks, size, dtype=torch.uint8, device=layer.codes.device)
    for part in _tiles(rows, columns):
        packed[part, :, :2] = layer.scales[part].to(torch.float16).unsqueeze(2).view(torch.uint8)
        codes = layer.codes[part].unflatten(1, (blocks, BLOCK)).view(torch.uint8)
        packed[part, :, 2:] = codes if word == "Q8_0" else codes[..., :16] | (codes[..., 16:] << 4)
    weight = packed.view(rows, blocks * size)
    return [weight] if layer.bias is None else [weight, layer.bias.float()]


def _tiles(rows: int, columns: int) -> list[slice]:
    step = max(1, _TILE // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _kept_in_fp32(name: str, shape: Sequence[int]) -> bool:
    return name.endswith("modulation") or len(shape) != 2 or math.prod(shape) <= SMALL


def passed_spec(name: str, dtype: str, shape: tuple[int, ...], unit: str, options: SaveOptions) -> Spec:
    """F32, or 16 bits for a matrix; five dimensions as they are, which needs no file to be mended by hand."""
    half = "F16" if dtype == "F16" else "BF16"
    return Spec(name, "F32" if _kept_in_fp32(name, shape) else half, shape, unit)


def check(schemes: Schemes, options: SaveOptions) -> list[str]:
    """Its loaders take one file."""
    if options.max_shard_size:
        raise UsageError("gguf has one file, which its loaders take whole; leave --max_shard_size out")
    return []


def _file_type(schemes: Schemes) -> str:
    """The type of most layers: what the file is called after."""
    counts = Counter(TYPES[scheme.type] for scheme in schemes.values() if scheme)
    return max(FILE_TYPES, key=lambda word: counts[word])


def _file_name(schemes: Schemes) -> str:
    return f"{ARCHITECTURE}-{_file_type(schemes)}.gguf"


def files(specs: Sequence[Spec], schemes: Schemes, options: SaveOptions) -> list[tuple[str, list[Spec]]]:
    """`wan-Q8_0.gguf`."""
    return [(_file_name(schemes), list(specs))]


def metadata(model: Model, schemes: Schemes, options: SaveOptions) -> dict[str, str]:
    """The three keys that tell the loaders what it is."""
    return {
        gguf_file.ARCHITECTURE: ARCHITECTURE,
        gguf_file.QUANTIZATION: str(QUANTIZATION_VERSION),
        gguf_file.FILE_TYPE: str(FILE_TYPES[_file_type(schemes)]),
    }


def documents(
    model: Model, files: list[tuple[str, list[Spec]]], schemes: Schemes, options: SaveOptions,
    beside: Iterable[Path],
) -> list[Document]:  # fmt: skip
    """diffusers' config of the float model: without one `from_single_file` would ask the hub for it."""
    if model.family in WITHOUT_DIFFUSERS:
        return []
    config = json.dumps(diffusers_document(model, "gguf"), indent=2, sort_keys=True) + "\n"
    return [Document("config.json", config.encode())]


def usage(folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
    """ComfyUI's node, and the lines of a program with stock diffusers."""
    name = _file_name(schemes)
    lines = [f"# ComfyUI: {name} goes into ComfyUI/models/unet; ComfyUI-GGUF's node Unet Loader (GGUF) loads it"]
    if len(folders) > 1:
        lines.append("# two experts: each file under a name of its own there, and each with a node of its own")
    if model.family in WITHOUT_DIFFUSERS:
        return lines
    kind = VACE_CLASS if model.family == "vace" else CLASS
    lines += [
        f'# diffusers: pip install "diffusers>={DIFFUSERS_VERSION}" gguf accelerate',
        "import torch",
        f"from diffusers import GGUFQuantizationConfig, {kind}",
    ]
    second = {"low_noise_model": "transformer_2"}
    for expert, folder in folders.items():
        path = json.dumps(f"{folder}/{name}")
        lines += [
            f"{second.get(expert, 'transformer')} = {kind}.from_single_file(",
            f"    {path}, config={json.dumps(folder)}, torch_dtype=torch.bfloat16,",
            "    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),",
            ")",
        ]
    given = ", ".join(f"{name}={name}" for name in (second.get(expert, "transformer") for expert in folders))
    return [*lines, f'# DiffusionPipeline.from_pretrained("ORIGINAL_PIPELINE", {given}, torch_dtype=torch.bfloat16)']


# -- Reading back ------------------------------------------------------------------------------------------------------


def recognise(folder: Path) -> bool:
    """Whether there is a GGUF file and no float model beside it. A damaged one counts: what is wrong has to be told."""
    return any(path.is_file() for path in folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def layers_in(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> streamq's type, by the weights' types."""
    return {
        name.removesuffix(".weight"): _KINDS.get(info.dtype, "float")
        for name, info in _native(tensors).items()
        if name.endswith(".weight") and len(info.shape) == 2 and unit_of(name) != "rest"
    }


def _native(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Without ComfyUI's prefix, which its loader takes off."""
    return {name.removeprefix(COMFYUI_PREFIX): info for name, info in tensors.items()}


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """Loaders go by the header's types: a tensor that they do not dequantize is taken as it lies there."""
    found = []
    paths = sorted(folder.glob("*.gguf"))
    if len(paths) > 1:
        found.append(f"{len(paths)} .gguf files ({', '.join(path.name for path in paths)}): loaders take one")
    for path in paths:
        found += [f"{path.name}: {one}" for one in _wrong_keys(path, folder, tensors)]
    tensors = _native(tensors)
    place = folder / "config.json"
    config = load_json(place, MAX_CONFIG_BYTES) if place.is_file() else {}
    blocks = len({unit_of(name) for name in tensors if name.startswith("blocks.")})
    if isinstance(config, dict) and config.get("num_layers", blocks) != blocks:
        found.append(f"config.json: num_layers {config['num_layers']}, the file has {blocks} blocks")
    for name, info in tensors.items():
        if (wrong := _wrong_type(name, info.dtype, info.shape)) is not None:
            found.append(f"{name}: {info.dtype} {list(info.shape)}, {wrong}")
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and f"{module}.weight" not in tensors:
            found.append(f"{module}.weight: missing beside its bias")
        if leaf == "weight" and to_diffusers(module) and module.rpartition(".")[2] not in RMS_NORMS:
            own = tensors.get(f"{module}.bias")
            if own is None:
                found.append(f"{module}.bias: missing")
            elif tuple(own.shape) != tuple(info.shape[:1]):
                found.append(f"{module}.bias: {own.dtype} {list(own.shape)}, must be F32 {list(info.shape[:1])}")
    return found


def _wrong_keys(path: Path, folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    keys = gguf_file.read(path, folder).metadata
    counts = Counter(info.dtype for info in tensors.values() if info.dtype in FILE_TYPES)
    most = max(counts.values(), default=0)
    found = []
    for key, due in (
        (gguf_file.ARCHITECTURE, {ARCHITECTURE}),
        (gguf_file.QUANTIZATION, {QUANTIZATION_VERSION}),
        (gguf_file.FILE_TYPE, {number for word, number in FILE_TYPES.items() if counts[word] == most}),
    ):
        shown = " or ".join(str(value) for value in sorted(due, key=str))
        if key not in keys:
            found.append(f"no {key}, must be {shown}")
        elif keys[key][1] not in due:
            found.append(f"{key} {keys[key][1]!r}, must be {shown}")
    return found


def _wrong_type(name: str, dtype: str, shape: Sequence[int]) -> str | None:
    """What a tensor has to be instead of what it is; None if it may be so."""
    if _kept_in_fp32(name, shape):
        return None if dtype == "F32" else "must be F32: loaders dequantize matrices of linear layers only"
    if dtype not in FILE_TYPES:
        return None
    if unit_of(name) == "rest" or not name.endswith(".weight"):
        return "must be BF16, F16 or F32: only layers of blocks are quantized"
    return None


def float_name(name: str) -> str | None:
    """The native name itself."""
    return name.removeprefix(COMFYUI_PREFIX)


def contradictions(tensors: Mapping[str, Tensor]) -> list[str]:
    """Blocks that no quantizer makes: the value of largest magnitude sets d, and its code is ±127 (Q8_0), 0 (Q4_0)."""
    weight = tensors.get("weight")
    if weight is None or not _in_blocks(weight):
        return []
    q8_0 = weight.shape[2] == BLOCK_SIZE["Q8_0"][1]
    found: dict[str, None] = {}
    for part in _tiles(weight.shape[0], weight.shape[1] * BLOCK):
        scales, codes = _unpacked(weight[part])
        if not bool(scales.isfinite().all()):
            found["weight: a scale that is not finite"] = None
        if q8_0 and bool((codes == -128).any()):
            found["weight: code -128, which Q8_0 does not use"] = None
        off = codes.abs().amax(2) != 127 if q8_0 else codes.amin(2) != 0
        if bool((off & (scales != 0)).any()):
            found["weight: a block whose largest code is not its scale's"] = None
    return list(found)


def _in_blocks(weight: Tensor) -> bool:
    return weight.dim() == 3 and weight.shape[2] in {size for _, size in BLOCK_SIZE.values()}


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [rows, blocks, 34 or 18] -> d fp32 [rows, blocks], codes int16 [rows, blocks, 32] (Q4_0: 0..15)."""
    import torch

    scales = packed[..., :2].contiguous().view(torch.float16).squeeze(2).float()
    stored = packed[..., 2:]
    if packed.shape[2] == BLOCK_SIZE["Q8_0"][1]:
        return scales, stored.contiguous().view(torch.int8).short()
    return scales, torch.cat([stored & 15, stored >> 4], dim=2).short()


def decode(tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
    """d · q, or d · (q - 8), of `weight`, uint8 [out, in / 32, 34 or 18]."""
    weight = tensors["weight"]
    if not _in_blocks(weight):
        raise ValueError(f"weight {weight.dtype} {list(weight.shape)} is not in blocks")

    def rows(part: slice) -> Tensor:
        scales, codes = _unpacked(weight[part])
        middle = 0 if weight.shape[2] == BLOCK_SIZE["Q8_0"][1] else 8
        return (scales.unsqueeze(2) * (codes - middle).float()).flatten(1)

    return rows


def record(tensors: Mapping[str, Tensor], kind: str) -> QuantizedLinear:
    """Codes and scales of `weight`, uint8 [out, in / 32, 34 or 18], which is unpacked."""
    import torch

    weight = tensors["weight"]
    scales, codes = _unpacked(weight)
    q8_0 = weight.shape[2] == BLOCK_SIZE["Q8_0"][1]
    made = record_of("q8_0" if q8_0 else "q4_0", codes.to(torch.int8).flatten(1), scales, tensors.get("bias"))
    made.zeros = None if q8_0 else scales * -8
    return made
