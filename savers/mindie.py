"""MindIE (Ascend): one safetensors file with native names, and a description JSON that types every tensor.

Names, dtypes and files as written by msModelSlim (Ascend/msmodelslim, `mindie_format_saver`) and read by MindIE-SD
(Ascend/MindIE-SD, `mindiesd/quantization`), which refuses files that others may read and finds the weights by a name
made of `model_quant_type`.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import load_json
from streamq.errors import UsageError
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.savers import Document, SaveOptions, Schemes, Spec
from streamq.wan import Linear, Model, unit_of

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"w8a8": "W8A8_DYNAMIC", "w8a8_static": "W8A8"}
CONTAINER = "safetensors"
OUTER = False
ATTENTION = ("fa3_quant", "online_quarot")
NAMES = "native"
EXPERTS = {name: name for name in ("", "high_noise_model", "low_noise_model")}
LAYOUTS = ()
# Norms come from the original checkpoint, so nothing can be folded into them.
WAYS = dict.fromkeys(TYPES, ("rows", "layer"))
MODE = 0o640  # mindiesd raises PermissionError for anything wider
FP32_EPS = 2.0**-23
RULES: Mapping[str | None, Rule] = {
    None: Rule(scale_floor=FP32_EPS),
    "msmodelslim": Rule(scale_floor=FP32_EPS, scale_dtype="source", arithmetic="source"),
}
FLOAT = "FLOAT"
MAX_FILE_BYTES = 100 << 30  # what mindiesd reads
MAX_DOCUMENT_BYTES = 64 << 20
# A layer that carries a smoothing scale: the linear's tensors lie below LINEAR, the scale is MUL_SCALE.
LINEAR, MUL_SCALE = "linear", "div.mul_scale"


def _tensors(kind: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of a layer, but for its bias, which is typed FLOAT."""
    if kind == "W8A8":
        return {"weight": ("I8", (rows, columns)), "quant_bias": ("I32", (rows,)), "input_scale": ("F32", (1,)),
                "input_offset": ("F32", (1,)), "deq_scale": ("F32", (rows,))}  # fmt: skip
    return {"weight": ("I8", (rows, columns)), "weight_scale": ("F32", (rows, 1)), "weight_offset": ("F32", (rows, 1))}


_TYPED = {suffix for kind in TYPES.values() for suffix in _tensors(kind, 1, 1)}


def _carries(scheme: Scheme) -> bool:
    return scheme.smooth is not None and scheme.smooth.way == "layer"


def unfit(layer: Linear, scheme: Scheme) -> str | None:
    """Any size does."""
    return None


def quantized_specs(layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
    """The type's tensors, the bias (always in F32), and the scale of the input where the layer carries one."""
    rows, columns = layer.weight.shape
    unit, name = unit_of(layer.name), f"{layer.native}.{LINEAR}" if _carries(scheme) else layer.native
    found = _tensors(TYPES[scheme.type], rows, columns)
    specs = [Spec(f"{name}.{suffix}", dtype, shape, unit) for suffix, (dtype, shape) in found.items()]
    specs += [] if layer.bias is None else [Spec(f"{name}.bias", "F32", (rows,), unit)]
    return specs + ([Spec(f"{layer.native}.{MUL_SCALE}", "F32", (columns,), unit)] if _carries(scheme) else [])


def encode(layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
    """Offsets are zero (symmetric) and never read, but msModelSlim writes them."""
    if layer.scheme.type == "w8a8_static":
        from streamq.methods.activation import static_tensors

        input_scale, input_offset, deq_scale, quant_bias, _ = static_tensors(layer)
        tensors = [layer.codes, quant_bias, input_scale, input_offset, deq_scale]
    else:
        tensors = [layer.codes, layer.scales, layer.scales.new_zeros(layer.scales.shape)]
    tensors += [] if layer.bias is None else [layer.bias.float()]
    return tensors + ([layer.smooth.reciprocal()] if _carries(layer.scheme) and layer.smooth is not None else [])


def vector_specs(name: str, dim: int) -> list[Spec]:
    """Nothing lies beside a norm."""
    return []


def encode_vector(smooth: Tensor) -> list[Tensor]:
    """Nothing lies beside a norm."""
    return []


def rotation_specs(attention: str, head_dim: int) -> list[Spec]:
    """`q_rot` and `k_rot`, which are equal."""
    return [
        Spec(f"{attention}.{leaf}", "BF16", (head_dim, head_dim), unit_of(attention)) for leaf in ("q_rot", "k_rot")
    ]


def passed_spec(name: str, dtype: str, shape: tuple[int, ...], unit: str) -> Spec:
    """FLOAT tensors keep the source's dtype and bytes; mindiesd does not read them."""
    return Spec(name, dtype, shape, unit)


def check(schemes: Schemes, options: SaveOptions) -> list[str]:
    """Warns of shards, which the present runtime does not read."""
    if not options.max_shard_size:
        return []
    return [
        "mindie in shards: mindiesd 3.1.0 reads only the single file; leave --max_shard_size and part_file_size out"
    ]


def _quant_type(schemes: Schemes) -> str:
    """`model_quant_type`: the type of the last quantized layer in model order."""
    return TYPES[[scheme.type for scheme in schemes.values() if scheme][-1]]


def files(specs: Sequence[Spec], schemes: Schemes, options: SaveOptions) -> list[tuple[str, list[Spec]]]:
    """One file, or msModelSlim's shards: a tensor that would reach the limit starts a new one."""
    if not options.max_shard_size:
        size = sum(spec.nbytes for spec in specs)
        if size > MAX_FILE_BYTES:
            raise UsageError(f"mindie: {size} bytes of weights, mindiesd reads at most {MAX_FILE_BYTES}")
        return [(f"quant_model_weight_{_quant_type(schemes).lower()}.safetensors", list(specs))]
    shards: list[list[Spec]] = [[]]
    room = options.max_shard_size
    for spec in specs:
        if shards[-1] and spec.nbytes >= room:
            shards.append([])
            room = options.max_shard_size
        shards[-1].append(spec)
        room -= spec.nbytes
    count = len(shards)
    return [(f"quant_model_weight-{i:05d}-of-{count:05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def metadata(model: Model, schemes: Schemes, options: SaveOptions) -> dict[str, str]:
    """None."""
    return {}


def documents(
    model: Model, files: list[tuple[str, list[Spec]]], schemes: Schemes, options: SaveOptions,
    beside: Iterable[Path],
) -> list[Document]:  # fmt: skip
    """The description, an index where there are shards, and the `*.json` and `*.py` that lie beside the weights."""
    specs = [spec for _, shard in files for spec in shard]
    description: dict[str, str] = {}
    for spec in specs:
        layer, _, suffix = spec.name.rpartition(".")
        scheme = schemes.get(layer.removesuffix(f".{LINEAR}"))
        description[spec.name] = TYPES[scheme.type] if scheme and suffix in _TYPED else FLOAT
    description["model_quant_type"] = _quant_type(schemes)
    name = f"quant_model_description_{_quant_type(schemes).lower()}.json"
    found = {name: json.dumps(description, indent=4).encode()}
    if options.max_shard_size:
        total = sum(spec.nbytes for spec in specs)
        weight_map = {spec.name: file for file, shard in files for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        found["quant_model_weight.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    for folder in beside:
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.py")]):
            wanted = path.is_file() and not path.name.endswith("index.json") and path.name != "streamq.json"
            wanted = wanted and not path.name.startswith("quant_model_")  # another output's
            if wanted and path.name not in found and path.stat().st_size <= MAX_DOCUMENT_BYTES:
                found[path.name] = path.read_bytes()
    return [Document(file, content) for file, content in found.items()]


def root_documents(experts: Sequence[str], model: Model, schemes: Schemes) -> list[Document]:
    """None."""
    return []


def usage(folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
    """MindIE-SD replaces the layers of a float model that the pipeline has built."""
    lines = ["# the float model goes by Wan-AI's own module names (blocks.0.self_attn.q), whatever the source's were"]
    lines += ["import torch", "from mindiesd import quantize"]
    for expert, folder in folders.items():
        description = f"{folder}/quant_model_description_{_quant_type(schemes).lower()}.json"
        lines.append(f'quantize({expert or "transformer"}, "{description}", dtype=torch.bfloat16)')
    return lines


def recognise(folder: Path) -> bool:
    """Whether there is exactly one MindIE description in the folder."""
    return len(list(folder.glob("quant_model_description*.json"))) == 1


def _description(folder: Path) -> dict[str, str]:
    path = next(iter(folder.glob("quant_model_description*.json")))
    document = load_json(path, MAX_DOCUMENT_BYTES)
    if not isinstance(document, dict) or not all(isinstance(kind, str) for kind in document.values()):
        raise UsageError(f"{path}: not an object of texts; not a MindIE description")
    return document


def layers_in(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> streamq's type, by the description."""
    back = {word: kind for kind, word in TYPES.items()} | {FLOAT: "float"}
    description, found = _description(folder), {}
    for name, kind in description.items():
        if name.endswith(".weight") and len(tensors[name].shape if name in tensors else ()) == 2:
            layer = name.removesuffix(".weight").removesuffix(f".{LINEAR}")
            smooth = "_smooth" if f"{layer}.{MUL_SCALE}" in description else ""
            found[layer] = back.get(kind, kind) + smooth
    return found


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """mindiesd ignores an unknown type without a word, and reads the weights under one name only."""
    description = _description(folder)
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
    found += [f"{name}: in {path.name}, not in the weights" for name in description if name not in tensors]
    known = {FLOAT, *TYPES.values()}
    found += [f"{name}: unknown type {kind!r}" for name, kind in description.items() if kind not in known]
    for name, info in tensors.items():
        if description.get(name) in TYPES.values() and name.endswith(".weight"):
            found += _layer_problems(name.removesuffix(".weight"), info, tensors, description)
    return found


def _layer_problems(
    layer: str, weight: Any, tensors: Mapping[str, Any], description: Mapping[str, str]
) -> list[str]:  # fmt: skip
    found = []
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    kind = description[f"{layer}.weight"]
    for suffix, (dtype, shape) in _tensors(kind, rows, columns).items():
        info = tensors.get(f"{layer}.{suffix}")
        if info is None:
            found.append(f"{layer}.{suffix}: missing")
        elif (info.dtype, tuple(info.shape)) != (dtype, tuple(shape)):
            found.append(f"{layer}.{suffix}: {info.dtype} {list(info.shape)}, must be {dtype} {list(shape)}")
        elif description.get(f"{layer}.{suffix}") != kind:
            found.append(f"{layer}.{suffix}: typed {description.get(f'{layer}.{suffix}')}, must be {kind}")
    bias = tensors.get(f"{layer}.bias")
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


def float_shape(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Nothing is packed."""
    return shape


def float_name(name: str) -> str | None:
    """The native name: that of the layer itself where a linear below it holds its tensors."""
    layer, _, suffix = name.rpartition(".")
    if name.endswith(f".{MUL_SCALE}") or suffix in _TYPED and suffix != "weight":
        return None
    return f"{layer.removesuffix(f'.{LINEAR}')}.{suffix}" if layer else name


def contradictions(tensors: Mapping[str, Tensor]) -> list[str]:
    """A static layer's quant_bias follows from its bias, codes, scale and offset."""
    below = f"{LINEAR}." if f"{LINEAR}.weight" in tensors else ""
    if f"{below}deq_scale" not in tensors:
        return []
    from streamq.methods.activation import static_bias

    offset = tensors[f"{below}input_offset"]
    found = []
    if not bool((offset.round() == offset).all() and (offset.abs() <= 128).all()):
        found.append(f"{below}input_offset: {offset.tolist()}, must be a whole number from -128 to 127")
    due, _ = static_bias(
        tensors.get(f"{below}bias"), tensors[f"{below}weight"], tensors[f"{below}deq_scale"], float(offset)
    )
    if not bool((due == tensors[f"{below}quant_bias"]).all()):
        found.append(f"{below}quant_bias: not what follows from bias, weight, deq_scale and input_offset")
    return found


def decode(tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
    """codes · scale, float32 [out, in], times the input's scale where the layer carries one."""
    below = f"{LINEAR}." if f"{LINEAR}.weight" in tensors else ""
    codes = tensors[f"{below}weight"]
    if f"{below}deq_scale" in tensors:
        scales = (tensors[f"{below}deq_scale"] / tensors[f"{below}input_scale"]).unsqueeze(1)
    else:
        scales = tensors[f"{below}weight_scale"]

    def rows_of(rows: slice) -> Tensor:
        weight = codes[rows].float() * scales[rows]
        return weight * tensors[MUL_SCALE] if below else weight

    return rows_of


def unpack(tensors: Mapping[str, Tensor]) -> QuantizedLinear | None:
    """Nothing is packed."""
    return None


def bias(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """As it is."""
    return tensors.get(f"{LINEAR}.bias", tensors.get("bias"))
