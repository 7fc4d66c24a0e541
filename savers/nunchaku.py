"""Nunchaku (NVIDIA, 4 bits): diffusers' `nunchaku_lite` folder, which stock diffusers loads; or the older single file.

Names, dtypes and configuration as diffusers reads them (`quantizers/nunchaku`, `quantization_config.py`); the order of
the numbers is in `nunchaku_layout`, what a whole checkpoint has in `nunchaku_contents`. No model class for Wan exists
for the single file (nunchaku-tech/nunchaku `nunchaku/models/transformers`): nothing loads it at present.

A layer computes Q(x / smooth) · dequant(codes)ᵀ + (x · downᵀ) · upᵀ + bias: `smooth` lies in the layer, so that no
other tensor changes. Vectors are packed like scales, biases included, though their shape does not show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.errors import RunError, UsageError
from streamq.pairs import Pair, QConfig
from streamq.quantized import LowRank, QuantizedLinear, Rule, Scheme
from streamq.savers import Document, SaveOptions, Schemes, Spec
from streamq.savers import nunchaku_contents as contents
from streamq.savers import nunchaku_layout as layout
from streamq.savers.diffusers_model import EXPERTS as EXPERTS
from streamq.savers.diffusers_model import FLOATS, config_of, described, program, split
from streamq.savers.plain import encode_vector as encode_vector
from streamq.savers.plain import root_documents as root_documents
from streamq.savers.plain import rotation_specs as rotation_specs
from streamq.savers.plain import vector_specs as vector_specs
from streamq.wan import Linear, Model, to_native, unit_of
from streamq.wan.config import DIFFUSERS_VERSION, diffusers_document, keeps_fp32

if TYPE_CHECKING:
    from torch import Tensor

TYPES = contents.SECTIONS
CONTAINER = "safetensors"
OUTER = False
ATTENTION = ()
MODE = 0o644
NAMES = "diffusers"
LAYOUTS = ("folder", "single")
WAYS: Mapping[str, tuple[str, ...]] = {"w4a4": ("layer",), "w4a4_nvfp4": ("layer",), "w4a16": ()}
RULES: Mapping[str | None, Rule] = {None: Rule()}
PLAIN_RANK = 16  # the least that the kernels take: zeros, where there is no low-rank branch
_INT4, _NVFP4 = QConfig("per_group", "int4"), QConfig("per_group", "nvfp4")
_PAIRS = {
    "w4a4": Pair(_INT4, _INT4),
    "w4a4_nvfp4": Pair(_NVFP4, _NVFP4),
    "w4a16": Pair(QConfig("per_token", "float"), QConfig("per_group", "int4", symmetric=False)),
}


def rank_of(scheme: Scheme) -> int:
    """Columns of the low-rank factors that a layer of this scheme is stored with."""
    weight = scheme.pair.weight
    return int(dict(weight.ext).get("rank", 32)) if weight.method == "svdquant" else PLAIN_RANK


def unfit(layer: Linear, scheme: Scheme) -> str | None:
    """Sizes that the kernels have no tiles for: diffusers allocates exactly [out, in / 2], so nothing can be padded."""
    rows, columns = layer.weight.shape
    return contents.misfit(scheme.type, rows, columns, rank_of(scheme))


def quantized_specs(layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
    """SVDQ: qweight, wscales, smooth_factor, proj_down, proj_up, and for nvfp4 wcscales and wtscale; then the bias.

    AWQ: qweight, wscales, wzeros, bias. The single file has smooth_factor_orig, too.
    """
    rows, columns = layer.weight.shape
    tensors = contents.tensors_of(scheme.type, rows, columns, rank_of(scheme), single=options.layout == "single")
    if layer.bias is not None:
        tensors["bias"] = "BF16", (rows,)
    unit = unit_of(layer.name)
    return [Spec(f"{layer.name}.{suffix}", dtype, shape, unit) for suffix, (dtype, shape) in tensors.items()]


def encode(layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
    """The tensors of `quantized_specs`, unpacked again and compared with what went in.

    Raises RunError where they differ, or hold a number that the kernels cannot work with.
    """
    tensors = _packed(layer)
    _check_packed(layer, tensors)
    if options.layout == "single" and "smooth_factor" in tensors:
        names = list(tensors)
        names.insert(names.index("smooth_factor") + 1, contents.ORIG)  # never read by the kernels
        tensors[contents.ORIG] = tensors["smooth_factor"]
        return [tensors[name] for name in names]
    return list(tensors.values())


def _packed(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Suffix -> tensor, in file order."""
    import torch

    half, codes, scales = torch.bfloat16, layer.codes, layer.scales
    assert layer.rows is None, "the format has no layer whose rows are divided"
    bias = None if layer.bias is None else layer.bias.to(half)
    if layer.scheme.type == "w4a16":
        assert layer.zeros is not None and layer.smooth is None and layer.low_rank is None
        plain = {"wscales": scales.to(half).T.contiguous(), "wzeros": layer.zeros.to(half).T.contiguous()}
        return {"qweight": layout.pack_awq(codes)} | plain | ({} if bias is None else {"bias": bias.contiguous()})
    nvfp4, branch = layer.scheme.type == "w4a4_nvfp4", _branch(layer)
    micro = torch.float8_e4m3fn
    found = {
        "qweight": layout.pack_qweight(codes),
        "wscales": layout.pack_micro_scales(scales.to(micro)) if nvfp4 else layout.pack_scales(scales.to(half)),
        "smooth_factor": layout.pack_vector(_smooth(layer).to(half)),
        "proj_down": layout.pack_down(branch.down.to(half)),
        "proj_up": layout.pack_up(branch.up.to(half)),
    }
    if nvfp4:
        assert layer.tensor_scale is not None
        found["wcscales"] = torch.ones(codes.shape[0], dtype=half, device=codes.device)
        found["wtscale"] = layer.tensor_scale.to(half).reshape(1)
    return found | ({} if bias is None else {"bias": layout.pack_vector(bias)})


def _smooth(layer: QuantizedLinear) -> Tensor:
    """The smoothing vector [in] fp32, ones where there is none."""
    return layer.scales.new_ones(layer.codes.shape[1]) if layer.smooth is None else layer.smooth


def _branch(layer: QuantizedLinear) -> LowRank:
    """The low-rank branch, zeros where there is none."""
    import torch

    if layer.low_rank is not None:
        return layer.low_rank
    rank, (rows, columns) = rank_of(layer.scheme), layer.codes.shape
    down, up = (layer.codes.new_zeros(shape, dtype=torch.bfloat16) for shape in ((rank, columns), (rows, rank)))
    return LowRank(down, up)


def _check_packed(layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> None:
    import torch

    back = unpack(tensors)
    bias_due = None if layer.bias is None else layer.bias.to(torch.bfloat16)
    given: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "codes": (layer.codes, back.codes),
        "scales": (layer.scales, back.scales),
        "zeros": (layer.zeros, back.zeros),
        "tensor scale": (layer.tensor_scale, back.tensor_scale),
        "bias": (bias_due, back.bias),
    }
    if back.low_rank is not None:
        branch = _branch(layer)
        given["smoothing vector"] = _smooth(layer), back.smooth
        given["first low-rank factor"] = branch.down, back.low_rank.down
        given["second low-rank factor"] = branch.up, back.low_rank.up
    wrong = [f"{what} came back changed" for what, pair in given.items() if not _same_bits(*pair)]
    wrong += contradictions(tensors)
    if back.scheme.type != layer.scheme.type:
        wrong.append(f"packed as {back.scheme.type}")
    if back.low_rank is not None and back.low_rank.up.shape[1] != rank_of(layer.scheme):
        wrong.append(f"rank {back.low_rank.up.shape[1]}, {rank_of(layer.scheme)} was planned")
    if wrong:
        rows, columns = layer.codes.shape
        raise RunError(
            f"nunchaku: a {layer.scheme.type} layer of {rows} x {columns} failed the check of its packed tensors:"
            f" {'; '.join(wrong)}; this is a bug in streamq or damaged memory: run the same command again, and report"
            " it if the same layer fails"
        )


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    import torch

    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def passed_spec(name: str, dtype: str, shape: tuple[int, ...], unit: str, options: SaveOptions) -> Spec:
    """bf16, which the model runs in, but for the parameters that diffusers keeps in fp32 where it can."""
    return Spec(name, "BF16" if dtype in FLOATS and not keeps_fp32(name) else dtype, shape, unit)


def check(schemes: Schemes, options: SaveOptions) -> list[str]:
    """The configuration has one precision and one rank for all SVDQ layers. Warns of the single file."""
    if options.layout == "single" and options.max_shard_size:
        raise UsageError("nunchaku: --layout single is one file; leave --max_shard_size and part_file_size out")
    svdq = {name: scheme for name, scheme in schemes.items() if scheme and TYPES[scheme.type] == contents.SVDQ}
    for what, of in (("type", lambda scheme: scheme.type), ("rank", rank_of)):
        first: dict[Any, str] = {}
        for name, scheme in svdq.items():
            first.setdefault(of(scheme), name)
        if len(first) > 1:
            (one, name), (two, other) = list(first.items())[:2]
            hint = f"; a layer without svdquant has rank {PLAIN_RANK}" if what == "rank" else ""
            raise UsageError(
                f"nunchaku: {what} {one} for {name} and {two} for {other}, but its configuration has one {what} for all"
                f" layers with 4-bit activations{hint}; give all of them the same one, or use w4a16 for some"
            )
    if options.layout != "single":
        return []
    return [
        "nunchaku: nothing loads Wan from the single file at present; diffusers loads what is written without --layout"
    ]


def files(specs: Sequence[Spec], schemes: Schemes, options: SaveOptions) -> list[tuple[str, list[Spec]]]:
    """One file, or shards of at most `max_shard_size` bytes of tensors, between layers wherever one fits a shard."""
    if options.layout == "single":
        return [(_single_name(schemes), list(specs))]
    return split(specs, options.max_shard_size)


def _svdq(schemes: Schemes) -> Scheme | None:
    """The scheme of the first SVDQ layer: `check` sees to it that type and rank are all layers'."""
    return next((s for s in schemes.values() if s is not None and TYPES[s.type] == contents.SVDQ), None)


def _single_name(schemes: Schemes) -> str:
    svdq = _svdq(schemes)
    if svdq is None:
        return "awq-int4.safetensors"
    return f"svdq-{contents.PRECISION[svdq.type]}_r{rank_of(svdq)}.safetensors"


def metadata(model: Model, schemes: Schemes, options: SaveOptions) -> dict[str, str]:
    """`format` for every loader; the single file has its configuration here (nunchaku `merge_safetensors.py`).

    There its layers are not fused, and nvfp4 has both its scales, so that a layer is what it is in the folder. With
    AWQ layers alone the method is `awq`.
    """
    found = {"format": "pt"}
    if options.layout != "single":
        return found
    config, svdq = diffusers_document(model, "nunchaku"), _svdq(schemes)
    if svdq is None:
        words: dict[str, Any] = {"method": "awq", "weight": contents.single_words("w4a16")}
    else:
        both = contents.single_words(svdq.type)
        words = {"method": "svdquant", "weight": both, "activation": both, "rank": rank_of(svdq)}
    named = {"config": config, "quantization_config": words}
    found |= {key: json.dumps(value, sort_keys=True) for key, value in named.items()}
    return found | {"model_class": config["_class_name"]}


def documents(
    model: Model, files: list[tuple[str, list[Spec]]], schemes: Schemes, options: SaveOptions, beside: Iterable[Path]
) -> list[Document]:
    """`config.json`, and an index where there are shards. The single file needs neither."""
    if options.layout == "single":
        return []
    quantization: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}
    for linear in model.linears:
        scheme = schemes.get(linear.native)
        if scheme is None:
            continue
        section = {"precision": contents.PRECISION[scheme.type], "group_size": contents.GROUP[scheme.type]}
        if TYPES[scheme.type] == contents.SVDQ:
            section["rank"] = rank_of(scheme)
        quantization.setdefault(TYPES[scheme.type], section | {"targets": []})["targets"].append(linear.name)
    config = json.loads(json.dumps(diffusers_document(model, "nunchaku") | {"quantization_config": quantization}))
    _check_names(model, config, files, schemes)
    return described(config, files)


def _check_names(
    model: Model, config: dict[str, Any], files: list[tuple[str, list[Spec]]], schemes: Schemes
) -> None:  # fmt: skip
    """Raise UsageError where the source's tensors are not those of diffusers' class: it would load, with holes."""
    svdq, written = _svdq(schemes), {spec.name: spec for _, specs in files for spec in specs}
    rank = 0 if svdq is None else rank_of(svdq)
    wrong = contents.wrong_contents(config, contents.targets_of(config), rank, written, "BF16", single=False)
    if wrong:
        raise UsageError(
            f"nunchaku: {model.checkpoint.root} has other tensors than diffusers' {config['_class_name']}, which would"
            f" load it without a word: {wrong[0]} ({len(wrong)} in all); choose another --format"
        )


def usage(folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
    """The lines of a program with stock diffusers; the other parts come from the original pipeline."""
    if options.layout == "single":
        return ["nothing loads Wan from this single file at present; diffusers loads what is written without --layout"]
    return [
        f'# pip install "diffusers>={DIFFUSERS_VERSION}" kernels accelerate',
        "# an NVIDIA GPU: int4 from compute capability 7.5 on, nvfp4 from 10.0 on; neither runs on 9.0 (H100, H200)",
        "import os",
        'os.environ["DIFFUSERS_TRUST_REMOTE_KERNELS"] = "true"  # before diffusers is imported; it fetches the kernels',
        *program(diffusers_document(model, "nunchaku"), folders),
    ]


def recognise(folder: Path) -> bool:
    """Whether diffusers would take the folder for a nunchaku_lite one, or the older container's file is in it."""
    try:
        quantization = config_of(folder).get("quantization_config")
    except UsageError:
        return False
    if isinstance(quantization, dict):
        return quantization.get("quant_method") == "nunchaku_lite"
    return contents.single_file(folder) is not None


def layers_in(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> streamq's type: by its tensors; a target without any, by its section of config.json."""
    found: dict[str, str] = {}
    for name, info in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            found[to_native(layer)] = contents.kind_in(layer, tensors) or "float"
        elif suffix == "weight" and len(info.shape) == 2 and unit_of(name) != "rest":
            found.setdefault(to_native(layer), "float")
    for layer, kind in contents.targets_of(config_of(folder)).items():
        found.setdefault(to_native(layer), kind)
    return found


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """diffusers only warns of a missing tensor, and runs; of what was never packed, it knows nothing."""
    return contents.problems(folder, tensors)


def float_name(name: str) -> str | None:
    """The native name; `qweight` stands for the layer's weight."""
    layer, _, suffix = name.rpartition(".")
    if suffix == "qweight":
        return to_native(f"{layer}.weight")
    return None if suffix in contents.PACKED else to_native(name)


def float_shape(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] of a packed weight: SVDQ has [out, in / 2] I8, AWQ [out / 4, in / 2] I32, and only the dtype tells."""
    if not name.endswith(".qweight") or len(shape) != 2:
        return shape
    return (shape[0] * (4 if dtype == "I32" else 1), shape[1] * 2)


def contradictions(tensors: Mapping[str, Tensor]) -> list[str]:
    """Numbers that no kernel gives a meaning to: scales and smoothing not above zero, int4's -8, NaN, infinity."""
    import torch

    found = []
    for suffix, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float()
        if not bool(torch.isfinite(values).all()):
            found.append(f"{suffix}: a number that is not finite")
        elif suffix in ("wscales", "wtscale", "smooth_factor", contents.ORIG) and not bool((values > 0).all()):
            found.append(f"{suffix}: a number that is not above zero")
    if _kind(tensors) == "w4a4":
        raw = tensors["qweight"].contiguous().view(torch.uint8)
        for part in raw.split(max(1, layout.CODES_AT_A_TIME // max(1, raw.shape[1]))):
            if bool((((part & 15) == 8) | ((part >> 4) == 8)).any()):
                found.append("qweight: code -8, the codes go from -7 to 7")
                break
    return found


def decode(tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
    """dequant(codes) / smooth + up · down, fp32: rows of the weight that the layer stands for. Errors as `unpack`."""
    return unpack(tensors).effective


def bias(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The bias [out] in order: an SVDQ layer's is packed, an AWQ layer's is not."""
    stored = tensors.get("bias")
    return stored if stored is None or _kind(tensors) == "w4a16" else layout.unpack_vector(stored)


def _kind(tensors: Mapping[str, Tensor]) -> str:
    import torch

    if tensors["qweight"].dtype == torch.int32:
        return "w4a16"
    return "w4a4_nvfp4" if "wtscale" in tensors or tensors["wscales"].element_size() == 1 else "w4a4"


def unpack(tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """A layer's tensors, by suffix, as the record that they were packed from. Its errors, long lost, are NaN.

    Channel scales (wcscales), which streamq writes as ones, go into the scales. Raises KeyError for a missing tensor,
    RuntimeError or ValueError for one of another shape.
    """
    import torch

    kind, zeros, smooth, low_rank, whole = _kind(tensors), None, None, None, None
    if kind == "w4a16":
        codes, scales = layout.unpack_awq(tensors["qweight"]), tensors["wscales"].float().T.contiguous()
        zeros = tensors["wzeros"].float().T.contiguous()
    else:
        codes = layout.unpack_qweight(tensors["qweight"], signed=kind == "w4a4")
        smooth = layout.unpack_vector(tensors["smooth_factor"]).float()
        low_rank = LowRank(layout.unpack_down(tensors["proj_down"]), layout.unpack_up(tensors["proj_up"]))
        if kind == "w4a4":
            scales = layout.unpack_scales(tensors["wscales"]).float()
        else:
            scales = layout.unpack_micro_scales(tensors["wscales"]).float()
            whole = tensors["wtscale"].float()
            scales.mul_(layout.unpack_vector(tensors["wcscales"]).float().unsqueeze(1))
    scheme = Scheme(kind, _PAIRS[kind], RULES[None])
    return QuantizedLinear(
        scheme, codes, scales, bias(tensors), torch.bfloat16, math.nan, math.nan,
        smooth=smooth, zeros=zeros, tensor_scale=whole, low_rank=low_rank,
    )  # fmt: skip


def record(tensors: Mapping[str, Tensor], kind: str) -> QuantizedLinear:
    """As `unpack`, which tells the type by the tensors."""
    return unpack(tensors)
