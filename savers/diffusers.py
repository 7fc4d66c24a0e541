"""diffusers (any device that torchao runs on): a folder that stock `from_pretrained` loads where torchao is installed.

Written without torchao. Names, files and configuration as huggingface/diffusers reads them, tensors and metadata as
pytorch/ao's safetensors support puts them together again (`diffusers_contents`). Of `w8a16` and `w8a8` every tensor
and every string is what diffusers saves after torchao has quantized the model: `RULES` is torchao's arithmetic.

A layer computes (x · act_pre_scale) · codesᵀ · scale + bias, x in int8 or e4m3 where the type says so: smoothing lies
in the layer, so that no other tensor changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import read_header
from streamq.errors import UsageError
from streamq.quantized import QuantizedLinear, Rule, Scheme, StaticInput
from streamq.savers import Document, SaveOptions, Schemes, Spec
from streamq.savers import diffusers_contents as contents
from streamq.savers.diffusers_contents import ACT_SCALE, PRE_SCALE, QDATA, SCALE, ZERO
from streamq.savers.diffusers_model import EXPERTS as EXPERTS
from streamq.savers.diffusers_model import STEM, config_of, described, program, split, stock_shapes
from streamq.savers.plain import bias as bias
from streamq.savers.plain import encode_vector as encode_vector
from streamq.savers.plain import float_shape as float_shape
from streamq.savers.plain import record_of
from streamq.savers.plain import root_documents as root_documents
from streamq.savers.plain import rotation_specs as rotation_specs
from streamq.savers.plain import unpack as unpack
from streamq.savers.plain import vector_specs as vector_specs
from streamq.wan import Linear, Model, to_diffusers, to_native, unit_of
from streamq.wan.config import DIFFUSERS_VERSION, diffusers_document, keeps_fp32

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {kind: config["_type"] for kind, config in contents.CONFIGS.items()}
CONTAINER = "safetensors"
OUTER = True
ATTENTION = ()
MODE = 0o644
NAMES = "diffusers"
LAYOUTS = ()
WAYS: Mapping[str, tuple[str, ...]] = {"w8a16": (), "w8a8": ("layer",), "w8a8_static": ("layer",), "fp8": ()}
RULES: Mapping[str | None, Rule] = {None: Rule(arithmetic="torchao")}
FP8_TILE = 16  # both sizes of a matrix, or torch's scaled product refuses it


def unfit(layer: Linear, scheme: Scheme) -> str | None:
    """e4m3 products need sizes that are multiples of 16; int8 ones take any."""
    rows, columns = layer.weight.shape
    if scheme.type != "fp8" or rows % FP8_TILE == columns % FP8_TILE == 0:
        return None
    return f"{rows} outputs and {columns} inputs, e4m3 products take multiples of {FP8_TILE}"


def quantized_specs(layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
    """The parts of torchao's tensor, then the bias."""
    unit, (rows, columns) = unit_of(layer.name), layer.weight.shape
    tensors = contents.tensors_of(scheme.type, rows, columns, scheme.smooth is not None)
    if layer.bias is not None:
        tensors["bias"] = "BF16", (rows,)
    return [Spec(f"{layer.name}.{suffix}", dtype, shape, unit) for suffix, (dtype, shape) in tensors.items()]


def encode(layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
    """Their values. `act_pre_scale` is 1 / s, which is a bf16 number already."""
    import torch

    assert layer.rows is None and not layer.rotation, "the format has no place for either"
    found = [layer.codes, layer.scales]
    if layer.scheme.type != "fp8":
        found.append(torch.zeros_like(layer.scales, dtype=torch.int8))
    if layer.scheme.type == "w8a8_static":
        assert layer.static is not None and not layer.static.offset
        found.append(layer.scales.new_full((1, 1, 1), layer.static.scale))
    if layer.scheme.smooth is not None:
        assert layer.smooth is not None
        found.append(layer.smooth.reciprocal().bfloat16())
    return found if layer.bias is None else [*found, layer.bias.bfloat16()]


def passed_spec(name: str, dtype: str, shape: tuple[int, ...], unit: str, options: SaveOptions) -> Spec:
    """bf16, which the model runs in, but for the parameters that diffusers keeps in fp32."""
    return Spec(name, "F32" if keeps_fp32(name) else "BF16", shape, unit)


def check(schemes: Schemes, options: SaveOptions) -> list[str]:
    """torchao's fixed ranges are symmetric here, and it rotates nothing."""
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        if scheme.type == "w8a8_static" and not scheme.pair.act.symmetric:
            raise UsageError(
                f"diffusers: {name} has an asymmetric activation, and its form of w8a8_static has no place for an"
                " offset; write act: {symmetric: True} into that step of the recipe, or take --quant_type w8a8_static"
            )
        if "convrot" in dict(scheme.pair.weight.ext):
            raise UsageError(
                f"diffusers: {name} has weight.ext.convrot, but torchao does not rotate inputs; take it out of the"
                " recipe, or choose --format comfyui"
            )
    return []


def files(specs: Sequence[Spec], schemes: Schemes, options: SaveOptions) -> list[tuple[str, list[Spec]]]:
    """One file, or shards of at most `max_shard_size` bytes of tensors, between layers wherever one fits a shard."""
    return split(specs, options.max_shard_size)


def metadata(model: Model, schemes: Schemes, options: SaveOptions) -> dict[str, str]:
    """All parameters of the model, in every file. Raises UsageError for a model that diffusers' classes are not."""
    return contents.metadata(_entries(model, schemes))


def _config(model: Model) -> dict[str, Any]:
    """diffusers' `config.json` of the float model, as JSON has it."""
    config: dict[str, Any] = json.loads(json.dumps(diffusers_document(model, "diffusers")))
    return config


def _entries(model: Model, schemes: Schemes) -> dict[str, contents.Json]:
    """In the order of the model's `state_dict()`; what its class does not have comes last."""
    stock = [name for name in stock_shapes(_config(model)) if name in model.tensors]
    found = {}
    for name in dict.fromkeys([*stock, *model.tensors]):
        layer, _, leaf = name.rpartition(".")
        scheme = schemes.get(to_native(layer)) if leaf == "weight" else None
        columns = model.tensors[name].shape[-1]
        smoothed = scheme is not None and scheme.smooth is not None
        found[name] = contents.PLAIN if scheme is None else contents.entry(name, scheme.type, columns, smoothed)
    return found


def documents(
    model: Model, files: list[tuple[str, list[Spec]]], schemes: Schemes, options: SaveOptions, beside: Iterable[Path]
) -> list[Document]:
    """`config.json`, and an index where there are shards.

    Raises UsageError where the source's tensors are not those of diffusers' class.
    """
    config = _config(model)
    by_name = {to_diffusers(native) or native: scheme for native, scheme in schemes.items()}
    kinds = {name: scheme.type for name, scheme in by_name.items() if scheme is not None}
    left = [name for name, scheme in by_name.items() if scheme is None]
    config["quantization_config"] = contents.quantization(kinds.values(), left, kinds)
    _check_source(model, config)
    return described(config, files)


def _check_source(model: Model, config: Mapping[str, Any]) -> None:
    """Raise UsageError where the source's tensors are not those of diffusers' class: it would load with holes."""
    stock, given = stock_shapes(config), {name: info.shape for name, info in model.tensors.items()}
    wrong = [f"{name} is missing" for name in stock if name not in given]
    wrong += [f"{name} is no parameter of it" for name in given if name not in stock]
    for name, shape in given.items():
        if shape != stock.get(name, shape):
            wrong.append(f"{name} is {list(shape)}, {list(stock[name])} there")
    if wrong:
        raise UsageError(
            f"diffusers: {model.checkpoint.root} has other tensors than diffusers' {config['_class_name']}: {wrong[0]}"
            f" ({len(wrong)} in all); choose another --format"
        )


def usage(folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
    """The lines of a program with stock diffusers; the other parts come from the original pipeline."""
    lines = [
        f'# pip install "diffusers>={DIFFUSERS_VERSION}" "torchao==0.18.*" accelerate',
        "# bfloat16 only: with another torch_dtype the quantized layers stay bfloat16, and dtypes are mixed",
    ]
    if any(scheme is not None and scheme.type == "fp8" for scheme in schemes.values()):
        lines.append(
            "# fp8: on a GPU compute capability 8.9 or higher (Ada, Hopper, Blackwell); a CPU computes it, slowly"
        )
    return [*lines, *program(diffusers_document(model, "diffusers"), folders)]


def recognise(folder: Path) -> bool:
    """Whether diffusers would hand the folder to torchao, or parts of torchao's tensors are in it."""
    try:
        quantization = config_of(folder).get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == "torchao":
            return True
        paths = sorted(folder.glob(f"{STEM}*.safetensors"))[:1]
        return any(info.name.endswith(f".{QDATA}") for path in paths for info in read_header(path, folder)[1])
    except UsageError:
        return False


def layers_in(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> streamq's type, by the metadata; also of the linear layers outside blocks."""
    entries = contents.entries_of(folder)
    found: dict[str, str] = {}
    for name, info in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == QDATA:
            found[to_native(layer)] = _label(entries.get(f"{layer}.weight", contents.PLAIN), info.dtype)
        elif suffix == "weight" and len(info.shape) == 2 and not keeps_fp32(name):
            found.setdefault(to_native(layer), "float")
    for name, about in entries.items():
        if contents.kind_of(about):  # none of whose parts may be there
            found.setdefault(to_native(name.removesuffix(".weight")), _label(about, ""))
    return found


def _label(about: contents.Json, dtype: str) -> str:
    """Without metadata only the dtype of the codes is left to tell."""
    made = contents.kind_of(about)
    if made is None:
        return "fp8" if dtype == "F8_E4M3" else "w8a16"
    return contents.label(*made)


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """diffusers leaves out what the metadata does not describe, and runs with what is left, without a word."""
    return contents.problems(folder, tensors)


def float_name(name: str) -> str | None:
    """The native name; `_weight_qdata` stands for the layer's weight."""
    layer, _, suffix = name.rpartition(".")
    if suffix == QDATA:
        return to_native(f"{layer}.weight")
    return None if suffix in (SCALE, ZERO, ACT_SCALE, PRE_SCALE) else to_native(name)


def contradictions(tensors: Mapping[str, Tensor]) -> list[str]:
    """The zero point of a symmetric weight is zero."""
    zero = tensors.get(ZERO)
    return [] if zero is None or not bool(zero.any()) else [f"{ZERO}: not zero, which torchao's products ignore"]


def decode(tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
    """codes · scale · act_pre_scale, float32 [out, in]: the weight for an input that is not scaled."""

    def rows(part: slice) -> Tensor:
        weight = tensors[QDATA][part].float() * tensors[SCALE][part]
        return weight * tensors[PRE_SCALE].float() if PRE_SCALE in tensors else weight

    return rows


def record(tensors: Mapping[str, Tensor], kind: str) -> QuantizedLinear:
    """Codes as they are; the fixed range and the scale of the input where there are such."""
    made = record_of(kind.removesuffix("_smooth"), tensors[QDATA], tensors[SCALE].float(), tensors.get("bias"))
    if ACT_SCALE in tensors:
        made.static = StaticInput(float(tensors[ACT_SCALE].flatten()[0]), 0.0)
    if PRE_SCALE in tensors:
        made.smooth = tensors[PRE_SCALE].float().reciprocal()
    return made
