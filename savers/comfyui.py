"""ComfyUI: one `.safetensors` file with native names, each quantized layer with a small JSON of its own, `comfy_quant`.

Names, dtypes and JSON as read by Comfy-Org/ComfyUI (`comfy/ops.py`, `comfy/quant_ops.py`, `comfy/utils.py`); the layers
are computed by comfy-kitchen (`TensorWiseINT8Layout`, which takes a scale per row in spite of its name, and
`TensorCoreFP8Layout`, which takes one). A weight without `comfy_quant` is taken as it is, codes as numbers. The file's
metadata may repeat every layer's JSON, and then wins over the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import TensorInfo, parse_json, read_header
from streamq.errors import UsageError
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.savers import Document, SaveOptions, Schemes, Spec, native
from streamq.savers.diffusers_model import metadata_of
from streamq.savers.plain import bias as bias
from streamq.savers.plain import encode_vector as encode_vector
from streamq.savers.plain import float_shape as float_shape
from streamq.savers.plain import record_of
from streamq.savers.plain import root_documents as root_documents
from streamq.savers.plain import rotation_specs as rotation_specs
from streamq.savers.plain import unpack as unpack
from streamq.savers.plain import vector_specs as vector_specs
from streamq.wan import COMFYUI_PREFIX, Linear, Model, unit_of

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"w8a8": "int8_tensorwise", "fp8": "float8_e4m3fn"}
CONTAINER = "safetensors"
OUTER = False
ATTENTION = ()
MODE = 0o644
NAMES = "native"
EXPERTS = {name: name for name in ("", "high_noise_model", "low_noise_model")}
LAYOUTS = ("plain", "prefixed")
WAYS: Mapping[str, tuple[str, ...]] = dict.fromkeys(TYPES, ())  # its loader reads pre_quant_scale for nvfp4 alone
# WanGP rounds row scales to bf16; the same as LightX2V's, so that one result serves both.
RULES: Mapping[str | None, Rule] = {None: Rule(amax_floor=1e-5, scale_dtype="BF16", qmin=-127)}
DTYPES = {"w8a8": "I8", "fp8": "F8_E4M3"}
SCOPES = {"w8a8": "per_channel", "fp8": "per_tensor"}
METADATA = "_quantization_metadata"
ROTATIONS = (16, 64, 256)
_RECIPES = {"w8a8": "w8a8_all", "fp8": "fp8_comfyui"}
_WORDS = {"w8a8": "int8", "fp8": "fp8"}
_OWN = (".weight_scale", ".input_scale", ".comfy_quant")


def _rotation(scheme: Scheme) -> int:
    """ConvRot's group size, 0 without it."""
    return int(dict(scheme.pair.weight.ext).get("convrot", 0))


def _conf(kind: str, rotation: int) -> dict[str, Any]:
    """A layer's JSON, its keys in the order of ComfyUI's own saving."""
    found: dict[str, Any] = {"format": TYPES[kind]}
    return found | ({"convrot": True, "convrot_groupsize": rotation} if rotation else {})


def unfit(layer: Linear, scheme: Scheme) -> str | None:
    """ConvRot turns whole groups of inputs."""
    size, columns = _rotation(scheme) or 1, layer.weight.shape[1]
    return f"{columns} inputs, not a multiple of {size}, which convrot turns at a time" if columns % size else None


def _prefix(options: SaveOptions) -> str:
    """What stands before every name."""
    return COMFYUI_PREFIX if options.layout == "prefixed" else ""


def quantized_specs(layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
    """weight, weight_scale (F32 [out, 1]; fp8: []), comfy_quant (U8 [bytes]), and the bias in the source's dtype."""
    rows, columns = layer.weight.shape
    unit, name = unit_of(layer.name), _prefix(options) + layer.native
    note = len(json.dumps(_conf(scheme.type, _rotation(scheme))).encode())
    specs = [
        Spec(f"{name}.weight", DTYPES[scheme.type], (rows, columns), unit),
        Spec(f"{name}.weight_scale", "F32", (rows, 1) if scheme.type == "w8a8" else (), unit),
        Spec(f"{name}.comfy_quant", "U8", (note,), unit),
    ]
    return specs + ([] if layer.bias is None else [Spec(f"{name}.bias", layer.bias.dtype, (rows,), unit)])


def encode(layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
    """fp8 has one scale a matrix, so that all of them are equal and the first is stored."""
    import torch

    kind = layer.scheme.type
    scales = layer.scales if kind == "w8a8" else layer.scales[0, 0]
    raw = list(json.dumps(_conf(kind, layer.rotation)).encode())
    note = torch.tensor(raw, dtype=torch.uint8, device=layer.codes.device)
    return [layer.codes, scales, note] + ([] if layer.bias is None else [layer.bias])


def passed_spec(name: str, dtype: str, shape: tuple[int, ...], unit: str, options: SaveOptions) -> Spec:
    """Float tensors keep the source's dtype and bytes."""
    return Spec(_prefix(options) + name, dtype, shape, unit)


def check(schemes: Schemes, options: SaveOptions) -> list[str]:
    """One file; int8 with a scale per row, fp8 with one a matrix."""
    if options.max_shard_size:
        raise UsageError("comfyui has one file; leave --max_shard_size and part_file_size out")
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        scope, due = scheme.pair.weight.scope, SCOPES[scheme.type]
        if scope != due:
            raise UsageError(
                f"comfyui: {name} has {_WORDS[scheme.type]} weights {scope}, ComfyUI's loader has them {due}; use"
                f" weight.scope {due} (streamq recipes {_RECIPES[scheme.type]})"
            )
    return []


def files(specs: Sequence[Spec], schemes: Schemes, options: SaveOptions) -> list[tuple[str, list[Spec]]]:
    """`wan_int8.safetensors`, `wan_int8_convrot.safetensors`, `wan_fp8.safetensors`, or both words."""
    words = {_WORDS[s.type] + "_convrot" * bool(_rotation(s)) for s in schemes.values() if s is not None}
    return [(f"wan_{'_'.join(sorted(words))}.safetensors", list(specs))]


def metadata(model: Model, schemes: Schemes, options: SaveOptions) -> dict[str, str]:
    """Every layer's JSON once more, by the name that it has in the file."""
    prefix = _prefix(options)
    layers = {prefix + name: _conf(s.type, _rotation(s)) for name, s in schemes.items() if s is not None}
    return {"format": "pt", METADATA: json.dumps({"format_version": "1.0", "layers": layers})}


def documents(
    model: Model, files: list[tuple[str, list[Spec]]], schemes: Schemes, options: SaveOptions, beside: Iterable[Path]
) -> list[Document]:
    """ComfyUI reads no configuration."""
    return []


def usage(folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
    """Where the file goes, and the node that loads it."""
    ((name, _),) = files([], schemes, options)
    lines = []
    for expert, folder in folders.items():
        stem = f"{expert.removesuffix('_model')}_{name}" if expert else name
        lines.append(f"cp {json.dumps(f'{folder}/{name}')} ComfyUI/models/diffusion_models/{stem}")
    lines += [
        "# in ComfyUI: the node Load Diffusion Model, weight_dtype default; it reads the types off the file",
        "# text encoder and VAE as for the float model; a ComfyUI that has comfy-kitchen among its requirements",
    ]
    return lines


# -- Looking at a folder -----------------------------------------------------------------------------------------------


def recognise(folder: Path) -> bool:
    """Whether a file in it has ComfyUI's marks: a layer's JSON, the metadata, or this module's name and scales."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            _, infos = read_header(path, folder)
        except UsageError:
            if path.name.startswith(("wan_int8", "wan_fp8")):
                return True
            continue
        names = [info.name for info in infos]
        scaled = any(name.endswith(".weight_scale") for name in names)
        if any(name.endswith(".comfy_quant") for name in names) or scaled and path.name.startswith("wan_"):
            return True
        if METADATA in metadata_of(path):
            return True
    return False


def _stored(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same by names without the prefix."""
    return {name.removeprefix(COMFYUI_PREFIX): info for name, info in tensors.items()}


def layers_in(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> streamq's type, by the weights' dtypes."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    return {
        name.removesuffix(".weight"): kinds.get(info.dtype, "float")
        for name, info in _stored(tensors).items()
        if name.endswith(".weight") and len(info.shape) == 2 and unit_of(name) != "rest"
    }


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """What makes ComfyUI take codes for numbers, or multiply them with something else, mostly without a word."""
    paths = sorted(folder.glob("*.safetensors"))
    found = [f"{path.name}: a second file; ComfyUI loads one" for path in paths[1:]]
    prefixed = [name for name in tensors if name.startswith(COMFYUI_PREFIX)]
    if prefixed and len(prefixed) < len(tensors):
        other = next(name for name in tensors if not name.startswith(COMFYUI_PREFIX))
        found.append(f"{other}: without the prefix {COMFYUI_PREFIX!r}, which {prefixed[0]} has; ComfyUI would lose it")
    stored = _stored(tensors)
    notes: dict[str, dict[str, Any]] = {}
    scaled = {name.removesuffix(end) for name in stored for end in _OWN if name.endswith(end)}
    coded = {name.removesuffix(".weight") for name, info in stored.items() if _is_coded(name, info)}
    for layer in [*coded, *sorted(scaled - coded)]:
        found += _layer_problems(paths, layer, stored, notes)
    found += native.wrong_floats(stored, coded | scaled)
    found += native.unrounded_scales(folder, tensors, "comfyui")
    return found + [one for path in paths for one in _metadata_problems(path, notes)]


def _is_coded(name: str, info: Any) -> bool:
    return name.endswith(".weight") and info.dtype not in native.FLOATS


def _layer_problems(
    paths: Sequence[Path], layer: str, tensors: Mapping[str, TensorInfo], notes: dict[str, dict[str, Any]]
) -> list[str]:
    """What is wrong with a quantized layer; its JSON goes to `notes`."""
    weight, scale, note = (tensors.get(f"{layer}.{leaf}") for leaf in ("weight", "weight_scale", "comfy_quant"))
    if weight is None:
        return [f"{layer}.weight: missing beside its scale or comfy_quant"]
    rows = tuple(weight.shape[:1])
    found = native.wrong_bias(tensors, layer, rows, "; ComfyUI would compute with whatever lies in memory")
    if note is None:
        due = "" if weight.dtype in DTYPES.values() else f", and {weight.dtype} is no dtype that streamq writes"
        return [*found, f"{layer}.comfy_quant: missing; ComfyUI would take the codes as the weight's numbers{due}"]
    try:
        conf = _read_note(paths[note.file], note)
    except UsageError as error:
        return [*found, str(error)]
    notes[layer] = conf
    kind = next((kind for kind, word in TYPES.items() if word == conf["format"]), None)
    if kind is None:
        known = ", ".join(TYPES.values())
        return [*found, f"{layer}.comfy_quant: format {str(conf['format'])[:80]!r}; streamq knows {known}"]
    if weight.dtype != DTYPES[kind]:
        found.append(f"{layer}.weight: {weight.dtype}, but comfy_quant says {conf['format']}, which is {DTYPES[kind]}")
    found += _rotation_problems(layer, kind, conf, weight)
    shapes: list[tuple[int, ...]] = [(*rows, 1)] if kind == "w8a8" else [(), (1,)]
    if scale is None:
        found.append(f"{layer}.weight_scale: missing; ComfyUI needs it")
    elif scale.dtype != "F32" or tuple(scale.shape) not in shapes:
        found.append(f"{layer}.weight_scale: {scale.dtype} {list(scale.shape)}, must be F32 {list(shapes[0])}")
    return found


def _rotation_problems(layer: str, kind: str, conf: Mapping[str, Any], weight: TensorInfo) -> list[str]:
    try:
        size = _turned(conf)
    except ValueError as error:
        return [f"{layer}.comfy_quant: {error}"]
    if size and kind != "w8a8":
        return [f"{layer}.comfy_quant: convrot, which ComfyUI knows only of {TYPES['w8a8']}"]
    if size and weight.shape[-1] % size:
        return [f"{layer}.comfy_quant: convrot_groupsize {size}, but there are {weight.shape[-1]} inputs"]
    return []


def _turned(conf: Mapping[str, Any]) -> int:
    """ConvRot's group size by a layer's JSON, 0 without it. Raises ValueError for one that there is not."""
    inner = conf.get("params")
    given = (inner if isinstance(inner, dict) else {}) | dict(conf)
    if not given.get("convrot", False):
        return 0
    size = given.get("convrot_groupsize", 256)
    if size not in ROTATIONS:
        raise ValueError(f"convrot_groupsize {str(size)[:80]}, must be one of {', '.join(map(str, ROTATIONS))}")
    return int(size)


def _read_note(path: Path, info: TensorInfo) -> dict[str, Any]:
    """A layer's JSON off the disk. Raises UsageError for what is none."""
    if info.dtype != "U8" or len(info.shape) != 1:
        raise UsageError(f"{info.name}: {info.dtype} {list(info.shape)}, must be U8 [bytes of JSON]")
    with open(path, "rb") as stream:
        stream.seek(info.offset)
        return _parsed(stream.read(info.nbytes), info.name)


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    conf = parse_json(raw, where)
    if not isinstance(conf, dict) or not isinstance(conf.get("format"), str):
        raise UsageError(f"{where}: JSON without a format: {raw[:80].decode('utf-8', 'replace')}")
    return conf


def _metadata_problems(path: Path, notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metadata are written over the tensors' JSON when the file is loaded."""
    text = metadata_of(path).get(METADATA)
    if text is None:
        return []
    where = f"{path.name}: {METADATA}"
    try:
        document = parse_json(text.encode(), where)
    except UsageError as error:
        return [str(error)]
    layers = document.get("layers") if isinstance(document, dict) else None
    if not isinstance(layers, dict):
        return [f"{where}: no object `layers`"]
    said = {name.removeprefix(COMFYUI_PREFIX): conf for name, conf in layers.items()}
    found = [f"{where}: says nothing of {name}" for name in notes if name not in said]
    for name, conf in said.items():
        if name not in notes:
            found.append(f"{where}: {name}, which has no comfy_quant in the file")
        elif conf != notes[name]:
            found.append(
                f"{where}: {name} is {json.dumps(conf)[:200]}, its comfy_quant {json.dumps(notes[name])[:200]}"
            )
    return found


def float_name(name: str) -> str | None:
    """The native name, without the prefix."""
    return None if name.endswith(_OWN) else name.removeprefix(COMFYUI_PREFIX)


def contradictions(tensors: Mapping[str, Tensor]) -> list[str]:
    """Codes that are no number, and a JSON of another format than the codes."""
    import torch

    weight, kind = tensors["weight"], _note_of(tensors).get("format")
    due = {torch.int8: TYPES["w8a8"], torch.float8_e4m3fn: TYPES["fp8"]}.get(weight.dtype)
    wrong = [] if kind == due else [f"comfy_quant: format {kind}, the codes are {due}'s"]
    return wrong + native.wrong_codes(weight)


def _note_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Raises KeyError or ValueError where there is none."""
    try:
        return _parsed(tensors["comfy_quant"].numpy().tobytes(), "comfy_quant")
    except UsageError as error:
        raise ValueError(str(error)) from error


def decode(tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
    """codes · scale, float32 [out, in], turned back where the JSON says convrot. Raises KeyError without a JSON."""
    from streamq.methods.rotation import unrotate

    weight, scale, size = tensors["weight"], tensors["weight_scale"].float(), _turned(_note_of(tensors))

    def rows(part: slice) -> Tensor:
        made = weight[part].float() * (scale[part] if scale.numel() > 1 else scale)
        return unrotate(made, size) if size else made

    return rows


def record(tensors: Mapping[str, Tensor], kind: str) -> QuantizedLinear:
    """Codes as they are, one scale repeated for every row, the rotation that the JSON says."""
    weight, scale = tensors["weight"], tensors["weight_scale"].float()
    scales = scale.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
    made = record_of(kind, weight, scales, tensors.get("bias"))
    made.rotation = _turned(_note_of({"comfy_quant": tensors["comfy_quant"].cpu()}))
    return made
