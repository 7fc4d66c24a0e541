"""What a torchao checkpoint must hold, as far as headers, metadata and configuration tell, and what is wrong with one.

Forms as torchao 0.18 writes them (`prototype/safetensors/safetensors_utils.py`, `core/config.py`, the `Int8Tensor` and
`Float8Tensor` of `quantization/quantize_/workflows`), as read by diffusers' `quantizers/torchao/torchao_quantizer.py`.
Tensors are put together by the metadata of the files alone: what it does not name, or names without all of its parts,
diffusers leaves out without a word.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streamq.checkpoint import parse_json
from streamq.errors import UsageError
from streamq.savers.diffusers_model import IGNORED, Shape, config_of, file_problems, metadata_of, stock_shapes
from streamq.wan.config import keeps_fp32

Json = dict[str, Any]
Entries = Mapping[str, Json]  # name of a parameter -> what the metadata says it is made of
NAMES = "tensor_names"
PLAIN: Json = {"_type": "Tensor"}
QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
ACT_SCALE, PRE_SCALE = "_weight_act_quant_scale", "_weight_act_pre_scale"
_PREFIX = "_weight_"
TIME_PROJ = "condition_embedder.time_proj"  # its input has no tokens, but in TI2V
# Layers that are given rows of zeros: the padding of the text, and of VACE's control. torchao divides such a row by an
# e4m3 scale of 0, and one NaN is in every output; unless the row's maximum has a lower bound.
ZERO_ROWS = ("condition_embedder.text_embedder.linear_1.weight", "vace_blocks.0.proj_in.weight")
LOWER_BOUND = 1e-12


def _made(kind: str, data: Any, version: int | None = None) -> Json:
    return {"_type": kind, "_data": data} | ({} if version is None else {"_version": version})


_SYMMETRIC, _BF16 = _made("MappingType", "SYMMETRIC"), _made("torch.dtype", "bfloat16")
_E4M3, _AUTO = _made("torch.dtype", "float8_e4m3fn"), _made("KernelPreference", "AUTO")
_ROW, _WHOLE = {"dim": -1}, {}  # type: ignore[var-annotated]
_MM = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}
_GRANULARITY, _WHOLE_CONFIG = _made("PerRow", _ROW, 1), _made("PerTensor", _WHOLE, 1)

# Type -> `quant_type.default` of the configuration: torchao's own object that makes such layers.
CONFIGS: dict[str, Json] = {
    "w8a16": _made(
        "Int8WeightOnlyConfig", {"group_size": None, "set_inductor_config": True, "granularity": _GRANULARITY}, 2
    ),
    "w8a8": _made(
        "Int8DynamicActivationInt8WeightConfig",
        {
            "act_mapping_type": _SYMMETRIC, "reduce_range": False, "set_inductor_config": True,
            "weight_only_decode": False, "granularity": _GRANULARITY,
        },
        2,
    ),
    "w8a8_static": _made(
        "Int8StaticActivationInt8WeightConfig",
        {
            "act_quant_scale": None, "act_quant_zero_point": None, "granularity": [_WHOLE_CONFIG, _GRANULARITY],
            "act_mapping_type": _SYMMETRIC, "set_inductor_config": True, "reduce_range": False,
        },
        1,
    ),
    "fp8": _made(
        "Float8DynamicActivationFloat8WeightConfig",
        {
            "activation_dtype": _E4M3, "weight_dtype": _E4M3, "granularity": [_GRANULARITY, _GRANULARITY],
            "packing_format": _made("Float8PackingFormat", "PLAIN"), "mm_config": _made("Float8MMConfig", _MM, 1),
            "activation_value_lb": None, "activation_value_ub": None, "kernel_preference": _AUTO,
            "set_inductor_config": True, "alg_id": 0,
        },
        2,
    ),
}  # fmt: skip


def label(kind: str, smoothed: bool) -> str:
    """A type as users see it."""
    return f"{kind}_smooth" if smoothed else kind


def entry(name: str, kind: str, columns: int, smoothed: bool) -> Json:
    """What the metadata says of a quantized weight [out, columns]. `smoothed`: its input is scaled first."""
    if kind == "fp8":
        act = {
            "float8_dtype": _E4M3, "granularity": _made("PerRow", _ROW), "mm_config": None,
            "hp_value_lb": LOWER_BOUND if name in ZERO_ROWS else None, "hp_value_ub": None, "kernel_preference": _AUTO,
        }  # fmt: skip
        data: Json = {
            "block_size": [1, columns], "mm_config": _made("Float8MMConfig", _MM),
            "act_quant_kwargs": _made("QuantizeTensorToFloat8Kwargs", act), "kernel_preference": _AUTO, "dtype": _BF16,
        }  # fmt: skip
        return _made("Float8Tensor", data) | {"_tensor_data_names": ["qdata", "scale"]}
    granularity = _made("PerTensor", _WHOLE) if kind == "w8a8_static" else _made("PerRow", _ROW)
    act = {"granularity": granularity, "mapping_type": _SYMMETRIC, "reduce_range": False}
    kwargs = None if kind == "w8a16" else _made("QuantizeTensorToInt8Kwargs", act)
    data = {"act_quant_kwargs": kwargs, "reduce_range": False, "block_size": [1, columns], "dtype": _BF16}
    names = ["zero_point", *["act_quant_scale"] * (kind == "w8a8_static"), *["act_pre_scale"] * smoothed]
    return _made("Int8Tensor", data) | {"_tensor_data_names": [*names, "qdata", "scale"]}


def tensors_of(kind: str, rows: int, columns: int, smoothed: bool) -> dict[str, tuple[str, Shape]]:
    """Suffix -> (dtype, shape) of a quantized weight [rows, columns], in file order.

    A fixed scale of the input has the input's rank: 3 for every layer inside blocks.
    """
    found: dict[str, tuple[str, Shape]] = {
        QDATA: ("F8_E4M3" if kind == "fp8" else "I8", (rows, columns)),
        SCALE: ("F32", (rows, 1)),
    }
    if kind != "fp8":
        found[ZERO] = "I8", (rows, 1)
    if kind == "w8a8_static":
        found[ACT_SCALE] = "F32", (1, 1, 1)
    return found | ({PRE_SCALE: ("BF16", (columns,))} if smoothed else {})


def quantization(kinds: Iterable[str], left: Iterable[str], quantized: Iterable[str]) -> Json:
    """`quantization_config`: the most common type; `left`: linear layers that stay float, `quantized`: those that are.

    diffusers takes a module for left out where its name and a dot are anywhere in a parameter's name: `blocks.0.ffn`
    would take `vace_blocks.0.ffn`, too, so that such a layer is not listed. Nothing depends on the list.
    """
    counted = Counter(kinds)
    common = max((kind for kind in CONFIGS if counted[kind]), key=lambda kind: counted[kind])
    weights = [f"{name}.weight" for name in quantized]
    listed = [name for name in left if not any(_covers(name, weight) for weight in weights)]
    return {
        "quant_method": "torchao", "modules_to_not_convert": listed or None, "quant_type": {"default": CONFIGS[common]},
    }  # fmt: skip


def _covers(module: str, weight: str) -> bool:
    return f"{module}." in weight or module == weight


def metadata(entries: Entries) -> dict[str, str]:
    """`__metadata__` of every file: all parameters of the model, wherever they lie."""
    named = {name: json.dumps(about) for name, about in entries.items()}
    return {"format": "pt", NAMES: json.dumps(list(entries))} | named


# -- Reading back ------------------------------------------------------------------------------------------------------


def entries_of(folder: Path) -> dict[str, Json]:
    """What diffusers knows of a folder's parameters: the metadata of its files put together, as far as it is sound."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= metadata_of(path)
    return _entries(found)[0]


def _entries(found: Mapping[str, str]) -> tuple[dict[str, Json], list[str]]:
    """(entries, what is wrong with the strings)."""
    names = _parsed(found.get(NAMES, ""))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return {}, [f"metadata: {NAMES} is no list of names; diffusers would take nothing for quantized"]
    entries, wrong = {}, []
    for name in names:
        about = _parsed(found.get(name, ""))
        if isinstance(about, dict) and isinstance(about.get("_type"), str):
            entries[name] = about
        else:
            wrong.append(f"metadata: {name[:80]} is in {NAMES}, but has no entry; diffusers would ignore all metadata")
    if len(set(names)) != len(names):
        wrong.append(f"metadata: a name twice in {NAMES}")
    return entries, wrong


def _parsed(text: str) -> Any:
    try:
        return parse_json(text.encode("utf-8", "surrogatepass"), "metadata")
    except UsageError:
        return None


def kind_of(about: Json) -> tuple[str, bool] | None:
    """(type, smoothed) that an entry comes nearest to; None for a plain tensor and for what streamq does not write."""
    data, names = about.get("_data"), about.get("_tensor_data_names")
    if not isinstance(data, dict) or about["_type"] not in ("Int8Tensor", "Float8Tensor"):
        return None
    if about["_type"] == "Float8Tensor":
        return "fp8", False
    given = names if isinstance(names, list) else []
    kwargs = data.get("act_quant_kwargs")
    if kwargs is None:
        return "w8a16", "act_pre_scale" in given
    static = "act_quant_scale" in given or "PerTensor" in json.dumps(kwargs)
    return "w8a8_static" if static else "w8a8", "act_pre_scale" in given


# -- What is wrong -----------------------------------------------------------------------------------------------------


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """What diffusers or torchao would refuse, or load wrong in silence. Raises UsageError for a broken JSON file."""
    config = config_of(folder)
    entries, wrong = _metadata_problems(folder)
    found = _config_problems(config, entries) + file_problems(folder, tensors) + wrong
    if not entries:
        return found
    return found + wrong_contents(config, entries, tensors) + _wrong_points(folder, tensors)


def _metadata_problems(folder: Path) -> tuple[dict[str, Json], list[str]]:
    """Every file has to say all of it: diffusers goes by whatever the last one says."""
    merged: dict[str, str] = {}
    found: list[str] = []
    first: tuple[str, dict[str, str]] | None = None
    for path in sorted(folder.glob("*.safetensors")):
        one = metadata_of(path)
        merged |= one
        if NAMES not in one:
            found.append(f"{path.name}: no torchao metadata ({NAMES}); of such a file diffusers loads no layer right")
        elif first is None:
            first = path.name, one
        elif one != first[1]:
            name = min(key for key in one.keys() | first[1].keys() if one.get(key) != first[1].get(key))
            found.append(f"{path.name}: other metadata than {first[0]}, of {name[:80]}; every file must have all of it")
    if not merged:
        return {}, found or [f"{folder}: no safetensors file with torchao metadata"]
    entries, wrong = _entries(merged)
    return entries, found + (wrong if NAMES in merged else [])


def _config_problems(config: Mapping[str, Any], entries: Entries) -> list[str]:
    given, where = config.get("quantization_config"), "config.json: quantization_config"
    if not isinstance(given, dict):
        return [f"{where}: missing; diffusers would look for float weights and find none"]
    if given.get("quant_method") != "torchao":
        return [f"{where}.quant_method: {str(given.get('quant_method'))[:80]!r}, must be 'torchao'"]
    found = []
    chosen = given.get("quant_type")
    if not isinstance(chosen, dict) or list(chosen) != ["default"] or not isinstance(chosen["default"], dict):
        found.append(f"{where}.quant_type: must be an object with one key, default")
    else:
        named = {due["_type"]: (kind, due) for kind, due in CONFIGS.items()}.get(str(chosen["default"].get("_type")))
        kinds = {made[0] for about in entries.values() if (made := kind_of(about))}
        if named is None:
            known = ", ".join(due["_type"] for due in CONFIGS.values())
            given_type = str(chosen["default"].get("_type"))[:80]
            found.append(f"{where}.quant_type.default._type: {given_type!r}, must be one of {known}")
        else:
            found += _differences(chosen["default"], named[1], f"{where}.quant_type.default")
            if kinds and named[0] not in kinds:
                found.append(f"{where}.quant_type: {named[0]}, but the layers are {', '.join(sorted(kinds))}")
    listed = given.get("modules_to_not_convert")
    if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        return [*found, f"{where}.modules_to_not_convert: must be null or a list of names"]
    for module in listed or ():
        taken = next((name for name, about in entries.items() if kind_of(about) and _covers(module, name)), None)
        if taken is not None:
            found.append(f"{where}.modules_to_not_convert: {module[:80]!r} takes {taken}, which is quantized")
    return found


def _differences(given: Any, due: Any, where: str) -> list[str]:
    """Where two JSON values first differ, at most one line."""
    if isinstance(given, dict) and isinstance(due, dict):
        for key in due | given:
            if key not in given or key not in due:
                return [f"{where}.{key}: {'missing' if key in due else 'not known to torchao 0.18'}"]
        return next((found for key in due if (found := _differences(given[key], due[key], f"{where}.{key}"))), [])
    same = type(given) is type(due) and given == due
    return [] if same else [f"{where}: {json.dumps(given)[:80]}, must be {json.dumps(due)}"]


def wrong_contents(config: Mapping[str, Any], entries: Entries, tensors: Mapping[str, Any]) -> list[str]:
    """Every tensor that the model has by its configuration and metadata, against those that are there."""
    try:
        stock = stock_shapes(config)
    except UsageError as error:
        return [str(error)]
    absent = (name for name in stock if name not in entries)
    found = [f"{name}: not in {NAMES}; diffusers would leave it without a value" for name in absent]
    due: dict[str, tuple[str, Shape]] = {}
    for name, about in entries.items():
        if name not in stock:
            if IGNORED not in name:
                found.append(f"{name}: in {NAMES}, but no parameter of the model")
            continue
        wrong, parts = _due(name, stock[name], about)
        found += wrong
        due |= parts
        if name not in parts and name in tensors:
            found.append(f"{name}: a plain tensor, the metadata says {about['_type']}")
            parts |= {name: (tensors[name].dtype, tuple(tensors[name].shape))}
            due |= parts
    for name, (dtype, shape) in due.items():
        info = tensors.get(name)
        if info is None:
            found.append(f"{name}: missing; diffusers loads without it, and the output is wrong")
        elif info.dtype != dtype or not _fits(name, tuple(info.shape), shape):
            found.append(f"{name}: {info.dtype} {list(info.shape)}, must be {dtype} {list(shape)}")
    extra = (name for name in tensors if name not in due and IGNORED not in name)
    return found + [f"{name}: the metadata has no use for it" for name in extra]


def _fits(name: str, given: Shape, due: Shape) -> bool:
    return given == due or name == f"{TIME_PROJ}.{ACT_SCALE}" and given == (1, 1)


def _due(name: str, shape: Shape, about: Json) -> tuple[list[str], dict[str, tuple[str, Shape]]]:
    """(what is wrong with a parameter's entry, the tensors that it is made of)."""
    if about == PLAIN:
        return [], {name: ("F32" if keeps_fp32(name) else "BF16", shape)}
    made, layer = kind_of(about), name.removesuffix(".weight")
    if made is None:
        return [f"{name}: {about['_type'][:80]} by its metadata, which is no type that streamq writes"], {}
    if len(shape) != 2 or layer == name or keeps_fp32(name):
        return [f"{name}: {about['_type']} by its metadata, but not a linear layer in half precision"], {}
    (kind, smoothed), (rows, columns) = made, shape
    wrong = _differences(about, entry(name, kind, columns, smoothed), f"{name}: metadata")
    return wrong, {f"{layer}.{suffix}": what for suffix, what in tensors_of(kind, rows, columns, smoothed).items()}


def _wrong_points(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """Zero points that are not zero: products ignore them, and `dequantize` does not."""
    paths = sorted(folder.glob("*.safetensors"))
    return [
        f"{name}: a zero point that is not zero, which torchao's products ignore"
        for name, info in tensors.items()
        if name.endswith(f".{ZERO}") and any(_bytes_of(paths[info.file], info))
    ]


def _bytes_of(path: Path, info: Any) -> bytes:
    with open(path, "rb") as stream:
        return os.pread(stream.fileno(), info.nbytes, info.offset)
