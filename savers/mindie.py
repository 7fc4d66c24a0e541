"""MindIE (Ascend): one safetensors file with native names, and a description JSON that types every tensor.

Names, dtypes and files as written by msModelSlim (Ascend/msmodelslim, `mindie_format_saver`) and read by MindIE-SD
(Ascend/MindIE-SD, `mindiesd/quantization`), which refuses files that others may read and finds the weights by a name
made of `model_quant_type`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamq.errors import UsageError
from streamq.quantized import QuantizedLinear, Rule, Scheme, StaticInput, e2m1_values
from streamq.savers import Document, SaveOptions, Schemes, Spec
from streamq.savers.mindie_contents import (
    FLOAT,
    KNOWN_MARKS,
    LINEAR,
    MARKED,
    MARKS,
    MAX_DOCUMENT_BYTES,
    MUL_SCALE,
    MX_BLOCK,
    MX_TYPES,
    ROTATIONS,
    tensors_of,
)
from streamq.savers.mindie_contents import MODE as MODE
from streamq.savers.mindie_contents import TYPES as TYPES
from streamq.savers.mindie_contents import layers_in as layers_in
from streamq.savers.mindie_contents import problems as problems
from streamq.savers.plain import encode_vector as encode_vector
from streamq.savers.plain import metadata as metadata
from streamq.savers.plain import record_of
from streamq.savers.plain import root_documents as root_documents
from streamq.savers.plain import unfit as unfit
from streamq.savers.plain import unpack as unpack
from streamq.savers.plain import vector_specs as vector_specs
from streamq.wan import Linear, Model, unit_of

if TYPE_CHECKING:
    from torch import Tensor

CONTAINER = "safetensors"
OUTER = False
ATTENTION = ("fa3_quant", "online_quarot")
NAMES = "native"
EXPERTS = {name: name for name in ("", "high_noise_model", "low_noise_model")}
LAYOUTS = ()
# Norms come from the original checkpoint, so nothing can be folded into them. An MX layer could carry a scale for
# mindiesd, but `methods.mx` makes none.
WAYS: Mapping[str, tuple[str, ...]] = {kind: () if kind in MX_TYPES else ("rows", "layer") for kind in TYPES}
FP32_EPS = 2.0**-23
RULES: Mapping[str | None, Rule] = {
    None: Rule(scale_floor=FP32_EPS),
    "msmodelslim": Rule(scale_floor=FP32_EPS, scale_dtype="source", arithmetic="source"),
}
NAN_CODES = (0x7F, 0xFF)  # of e4m3
MAX_FILE_BYTES = 100 << 30  # what mindiesd reads
_TYPED = {suffix for kind in TYPES.values() for suffix in tensors_of(kind, 1, 1)}


def _carries(scheme: Scheme) -> bool:
    return scheme.smooth is not None and scheme.smooth.way == "layer"


def quantized_specs(layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
    """The type's tensors, the bias (always in F32), and the scale of the input where the layer carries one.

    Raises UsageError for an MX layer whose inputs are no whole number of blocks, or that mindiesd cannot run.
    """
    rows, columns = layer.weight.shape
    if scheme.type in MX_TYPES and columns % MX_BLOCK:
        raise UsageError(
            f"mindie: {layer.native} has {columns} inputs, and {scheme.type} an exponent for every {MX_BLOCK}; exclude"
            " it, or give it another type"
        )
    if scheme.type == "w8a8_mxfp8" and layer.bias is None:
        raise UsageError(f"mindie: {layer.native} has no bias, without which mindiesd runs no w8a8_mxfp8; exclude it")
    unit, name = unit_of(layer.name), f"{layer.native}.{LINEAR}" if _carries(scheme) else layer.native
    found = tensors_of(TYPES[scheme.type], rows, columns)
    specs = [Spec(f"{name}.{suffix}", dtype, shape, unit) for suffix, (dtype, shape) in found.items()]
    specs += [] if layer.bias is None else [Spec(f"{name}.bias", "F32", (rows,), unit)]
    return specs + ([Spec(f"{layer.native}.{MUL_SCALE}", "F32", (columns,), unit)] if _carries(scheme) else [])


def encode(layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
    """int8's offsets are zero (symmetric) and never read, but msModelSlim writes them.

    Two e2m1 codes share a byte, that of the even column in its low half. MX scales are stored as exponent + 127.
    """
    if layer.scheme.type == "w8a8_static":
        from streamq.methods.activation import static_tensors

        input_scale, input_offset, deq_scale, quant_bias, _ = static_tensors(layer)
        tensors = [layer.codes, quant_bias, input_scale, input_offset, deq_scale]
    elif layer.scheme.type in MX_TYPES:
        from streamq.methods.mx import exponents

        packed = layer.scheme.type == "w4a4_mxfp4"
        tensors = [_packed(layer.codes) if packed else layer.codes, exponents(layer.scales)]
    else:
        tensors = [layer.codes, layer.scales, layer.scales.new_zeros(layer.scales.shape)]
    tensors += [] if layer.bias is None else [layer.bias.float()]
    return tensors + ([layer.smooth.reciprocal()] if _carries(layer.scheme) and layer.smooth is not None else [])


def _packed(codes: Tensor) -> Tensor:
    """e2m1 codes 0..15 [out, in] -> uint8 [out, in / 2]."""
    import torch

    wide = codes.view(torch.uint8)
    return (wide[:, 1::2] << 4).bitwise_or_(wide[:, 0::2])


def rotation_specs(attention: str, head_dim: int) -> list[Spec]:
    """`q_rot` and `k_rot`, which are equal. Raises UsageError for a size that no Hadamard matrix here has."""
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise UsageError(
            f"mindie: {attention} has heads of {head_dim}, online_quarot rotates by a power of two; take it out"
        )
    return [Spec(f"{attention}.{leaf}", "BF16", (head_dim, head_dim), unit_of(attention)) for leaf in ROTATIONS]


def passed_spec(name: str, dtype: str, shape: tuple[int, ...], unit: str, options: SaveOptions) -> Spec:
    """FLOAT tensors keep the source's dtype and bytes; mindiesd does not read them."""
    return Spec(name, dtype, shape, unit)


def check(schemes: Schemes, options: SaveOptions) -> list[str]:
    """Warns of shards, which the present runtime does not read, and of rotations that nothing is rotated by.

    Raises UsageError for attention in FP8 without a rotation: mindiesd loads both of its tensors.
    """
    for name, scheme in schemes.items():
        if scheme is not None and "convrot" in dict(scheme.pair.weight.ext):
            raise UsageError(
                f"mindie: {name} has weight.ext.convrot, but mindiesd does not rotate inputs; take it out of the"
                " recipe, or choose --format comfyui"
            )
    marks = options.attention
    for module, mark in marks.items():
        if mark.dtype and KNOWN_MARKS[MARKS[mark.dtype]] and not mark.rotated:
            raise UsageError(
                f"mindie: {module} in {mark.dtype} without q_rot and k_rot, which mindiesd then asks for; add an"
                f" online_quarot step that includes {module}.*"
            )
    found = []
    if options.max_shard_size:
        found.append(
            "mindie in shards: mindiesd 3.1.0 reads only the single file; leave --max_shard_size and part_file_size out"
        )
    if marks and not any(mark.dtype for mark in marks.values()):
        found.append("mindie: online_quarot without fa3_quant: mindiesd rotates nothing where attention stays float")
    return found


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
    for module, mark in options.attention.items():
        if mark.dtype:
            description[f"{module}.{MARKED}"] = MARKS[mark.dtype]
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


def usage(folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
    """MindIE-SD replaces the layers of a float model that the pipeline has built."""
    lines = [
        "# on Ascend, with torch_npu, CANN and mindiesd; after a copy or download: chmod 640, or it refuses the files",
        "# a float model, built by Wan-AI's own code (modules like blocks.0.self_attn.q):",
    ]
    lines += [f"# {expert or 'transformer'} = WanModel.from_pretrained(ORIGINAL_NATIVE_MODEL)" for expert in folders]
    if any(scheme and scheme.type == "w4a4_mxfp4" for scheme in schemes.values()):
        lines.append("# W4A4_MXFP4 needs mindiesd 3.1.0 or newer")
    if any(mark.dtype for mark in options.attention.values()):
        lines.append("# attention in 8 or 4 bits: a model whose attention calls its fa_quant, which quantize() sets")
    lines += ["import torch", "from mindiesd import quantize"]
    for expert, folder in folders.items():
        description = f"{folder}/quant_model_description_{_quant_type(schemes).lower()}.json"
        lines.append(f'quantize({expert or "transformer"}, "{description}", dtype=torch.bfloat16)')
    return lines


def recognise(folder: Path) -> bool:
    """Whether there is exactly one MindIE description in the folder."""
    return len(list(folder.glob("quant_model_description*.json"))) == 1


def float_shape(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Two columns share a byte in MXFP4."""
    return (shape[0], 2 * shape[1]) if dtype == "U8" and len(shape) == 2 else shape


def float_name(name: str) -> str | None:
    """The native name: that of the layer itself where a linear below it holds its tensors."""
    layer, _, suffix = name.rpartition(".")
    if name.endswith(f".{MUL_SCALE}") or suffix in ROTATIONS or suffix in _TYPED and suffix != "weight":
        return None
    return f"{layer.removesuffix(f'.{LINEAR}')}.{suffix}" if layer else name


def contradictions(tensors: Mapping[str, Tensor]) -> list[str]:
    """A static layer's quant_bias follows from its bias, codes, scale and offset; MX has no NaN in it."""
    below = f"{LINEAR}." if f"{LINEAR}.weight" in tensors else ""
    scale = tensors.get(f"{below}weight_scale")
    if scale is not None and not scale.is_floating_point():
        return _not_numbers(tensors[f"{below}weight"], scale, below)
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


def _not_numbers(codes: Tensor, exponents: Tensor, below: str) -> list[str]:
    import torch

    found = []
    if bool((exponents == 255).any()):
        found.append(f"{below}weight_scale: an exponent of 255, which is NaN")
    if not bool(exponents.any()) and bool(codes.view(torch.uint8).any()):
        found.append(f"{below}weight_scale: all exponents are zero beside codes that are not")
    if codes.dtype == torch.float8_e4m3fn:
        raw = codes.view(torch.uint8)
        if any(bool((raw == code).any()) for code in NAN_CODES):
            found.append(f"{below}weight: NaN among its codes")
    return found


def decode(tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
    """codes · scale, float32 [out, in], times the input's scale where the layer carries one."""
    below = f"{LINEAR}." if f"{LINEAR}.weight" in tensors else ""
    codes = tensors[f"{below}weight"]
    scale = tensors.get(f"{below}weight_scale")
    if scale is not None and not scale.is_floating_point():
        return _decode_mx(codes, scale, tensors[MUL_SCALE] if below else None)
    if f"{below}deq_scale" in tensors:
        scales = (tensors[f"{below}deq_scale"] / tensors[f"{below}input_scale"]).unsqueeze(1)
    else:
        scales = tensors[f"{below}weight_scale"]

    def rows_of(rows: slice) -> Tensor:
        weight = codes[rows].float() * scales[rows]
        return weight * tensors[MUL_SCALE] if below else weight

    return rows_of


def _powers() -> Tensor:
    """float32 [256]: what the bytes of a scale stand for."""
    import torch

    # 2^-127 is no normal float32: made in float64, so that it is not lost.
    powers = torch.exp2(torch.arange(256, dtype=torch.float64) - 127)
    powers[255] = float("nan")
    return powers.float()


def _decode_mx(codes: Tensor, exponents: Tensor, mul: Tensor | None) -> Callable[[slice], Tensor]:
    """Raises ValueError for an exponent too many or too few."""
    import torch

    powers = _powers()

    def rows_of(rows: slice) -> Tensor:
        part = codes[rows]
        if part.dtype == torch.uint8:
            part = torch.stack([part & 15, part >> 4], dim=2).flatten(1)
            values = e2m1_values(part)
        else:
            values = part.float()
        scales = powers[exponents[rows].int()]
        if values.shape[1] != MX_BLOCK * scales.shape[1]:
            raise ValueError(f"{scales.shape[1]} exponents for {values.shape[1]} columns")
        weight = values.unflatten(1, (-1, MX_BLOCK)).mul_(scales.unsqueeze(2)).flatten(1)
        return weight if mul is None else weight * mul

    return rows_of


def bias(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """As it is."""
    return tensors.get(f"{LINEAR}.bias", tensors.get("bias"))


def record(tensors: Mapping[str, Tensor], kind: str) -> QuantizedLinear:
    """Codes as they are (mxfp4: unpacked), scales by type, the scale of the input where the layer carries one.

    A static layer's bias is the float one, not quant_bias, which differs by up to half a step of the product.
    """
    import torch

    below = f"{LINEAR}." if f"{LINEAR}.weight" in tensors else ""
    codes, kind, static = tensors[f"{below}weight"], kind.removesuffix("_smooth"), None
    if kind == "w8a8_static":
        scale = tensors[f"{below}input_scale"]
        static = StaticInput(float(scale), float(tensors[f"{below}input_offset"]))
        scales = (tensors[f"{below}deq_scale"] / scale).unsqueeze(1)
    elif kind in MX_TYPES:
        scales = _powers().to(codes.device)[tensors[f"{below}weight_scale"].int()]
        if codes.dtype == torch.uint8:
            codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).to(torch.int8)
    else:
        scales = tensors[f"{below}weight_scale"].float()
    made = record_of(kind, codes, scales, bias(tensors))
    made.static = static
    made.smooth = tensors[MUL_SCALE].float().reciprocal() if below else None
    return made
