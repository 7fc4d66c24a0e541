"""LightX2V: native names, a file a block (or one file), and a native `config.json`; int8, or fp8 (e4m3).

Names, dtypes and files as read by ModelTC/LightX2V (`lightx2v/models/networks/wan/weights/`,
`lightx2v/common/ops/mm/mm_weight.py`). Its plain loader rounds scales to bf16, so the scale is rounded first and the
codes are made against the rounded one: what is computed with is what was meant.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import load_json, read_header
from streamq.errors import UsageError
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.savers import Document, SaveOptions, Schemes, Spec, lightx2v_config, native
from streamq.savers.plain import bias as bias
from streamq.savers.plain import float_shape as float_shape
from streamq.savers.plain import metadata as metadata
from streamq.savers.plain import record_of
from streamq.savers.plain import rotation_specs as rotation_specs
from streamq.savers.plain import unfit as unfit
from streamq.savers.plain import unpack as unpack
from streamq.wan import Linear, Model, unit_of

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"w8a8": "int8", "fp8": "fp8"}
CONTAINER = "safetensors"
OUTER = False
ATTENTION = ()
MODE = 0o644
NAMES = "native"
EXPERTS = {name: name for name in ("", "high_noise_model", "low_noise_model")}
LAYOUTS = ("block", "single")
WAYS = dict.fromkeys(TYPES, ("norm", "adaln", "rows"))
RULES: Mapping[str | None, Rule] = {
    None: Rule(amax_floor=1e-5, scale_dtype="BF16", qmin=-127),
    "lightx2v": Rule(amax_floor=1e-5, scale_dtype="source", arithmetic="source", fp8_halves="away"),
}
DTYPES = {"w8a8": "I8", "fp8": "F8_E4M3"}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
CONFIG_KEYS = ("dim", "ffn_dim", "in_dim", "num_heads", "num_layers")
MAX_JSON_BYTES = 64 << 20


def quantized_specs(layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
    """weight, weight_scale, and the bias in the source's dtype, or in F32 where smoothing has divided it."""
    rows, columns = layer.weight.shape
    unit = unit_of(layer.name)
    scale_dtype = layer.weight.dtype if scheme.rule.scale_dtype == "source" else "F32"
    specs = [
        Spec(f"{layer.native}.weight", DTYPES[scheme.type], (rows, columns), unit),
        Spec(f"{layer.native}.weight_scale", scale_dtype, (rows, 1), unit),
    ]
    if layer.bias is None:
        return specs
    return [*specs, Spec(f"{layer.native}.bias", "F32" if scheme.rows else layer.bias.dtype, (rows,), unit)]


def encode(layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
    """Nothing about activations is on disk."""
    scales = layer.scales
    if layer.scheme.rule.scale_dtype == "source":
        scales = scales.to(layer.source_dtype)
    return [layer.codes, scales] + ([] if layer.bias is None else [layer.bias])


def vector_specs(name: str, dim: int) -> list[Spec]:
    """`affine_norm1` and `affine_norm3`: y = LN(x) · (1 + scale) · weight + shift · bias, so both are 1/s."""
    block, _, norm = name.rpartition(".")
    return [Spec(f"{block}.affine_{norm}.{leaf}", "F32", (dim,), unit_of(name)) for leaf in ("weight", "bias")]


def encode_vector(smooth: Tensor) -> list[Tensor]:
    """The bias multiplies AdaLN's shift; it is not added."""
    inverse = smooth.reciprocal()
    return [inverse, inverse]


def passed_spec(name: str, dtype: str, shape: tuple[int, ...], unit: str, options: SaveOptions) -> Spec:
    """Float tensors keep the source's dtype and bytes."""
    return Spec(name, dtype, shape, unit)


def check(schemes: Schemes, options: SaveOptions) -> list[str]:
    """LightX2V reads every block linear with one scheme: one left float would be multiplied without its scale.

    Its scales are per row. The fp8 that it has with one scale a matrix, `fp8-pertensor`, is another, static one.
    """
    if options.max_shard_size:
        raise UsageError("lightx2v has a file a block, or one with --layout single; leave --max_shard_size out")
    left = [name for name, scheme in schemes.items() if scheme is None]
    if left:
        raise UsageError(
            f"lightx2v: the recipe leaves {len(left)} of {len(schemes)} block linears float ({left[0]}, …), but"
            " LightX2V reads all of them with one scheme; use a recipe without excludes (streamq recipes w8a8_all)"
        )
    first: dict[str, str] = {}
    for name, scheme in schemes.items():
        assert scheme is not None
        first.setdefault(scheme.type, name)
        weight = scheme.pair.weight
        if scheme.type == "fp8" and weight.scope != "per_channel":
            raise UsageError(
                f"lightx2v: {name} has fp8 weights {weight.scope}, LightX2V reads a scale per row; use weight.scope"
                " per_channel (streamq recipes fp8)"
            )
        if dict(weight.ext).get("convrot"):
            raise UsageError(
                f"lightx2v: {name} has convrot, but LightX2V turns no inputs: take it out of weight.ext, or choose"
                " --format comfyui"
            )
    if len(first) > 1:
        (one, name), (two, other) = list(first.items())[:2]
        raise UsageError(
            f"lightx2v: {one} for {name} and {two} for {other}, but LightX2V reads all block linears with one scheme;"
            " give all of them the same one"
        )
    return []


def files(specs: Sequence[Spec], schemes: Schemes, options: SaveOptions) -> list[tuple[str, list[Spec]]]:
    """`block_N.safetensors` for blocks, `non_block.safetensors` for all else; or a single file."""
    if options.layout == "single":
        return [(SINGLE, list(specs))]
    found: dict[str, list[Spec]] = {}
    for spec in specs:
        kind, _, number = spec.unit.partition(".")
        name = f"block_{number}.safetensors" if kind == "blocks" else "non_block.safetensors"
        found.setdefault(name, []).append(spec)
    return list(found.items())


def documents(
    model: Model, files: list[tuple[str, list[Spec]]], schemes: Schemes, options: SaveOptions,
    beside: Iterable[Path],
) -> list[Document]:  # fmt: skip
    """The native config, and an index where there are several files. LightX2V itself ignores the index."""
    native = dict(model.native_config)
    if any(".affine_norm" in spec.name for _, specs in files for spec in specs):
        native["quant_method"] = "advanced_ptq"  # without it LightX2V leaves the affine tensors out, without a word
    config = json.dumps(native, indent=2, sort_keys=True) + "\n"
    found = [Document("config.json", config.encode())]
    if options.layout != "single":
        total = sum(s.nbytes for _, specs in files for s in specs)
        weight_map = {spec.name: file for file, specs in files for spec in specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        found.append(Document(INDEX, (json.dumps(index, indent=2) + "\n").encode()))
    return found


def root_documents(experts: Sequence[str], model: Model, schemes: Schemes) -> list[Document]:
    """A configuration to begin with; LightX2V takes none from here by itself."""
    made = lightx2v_config.sample(model, _scheme(schemes), experts, smoothed=_smoothed(schemes))
    return [Document(lightx2v_config.NAME, made)]


def usage(folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
    """The keys of LightX2V's JSON, the command that takes it, and what fits which machine."""
    scheme = _scheme(schemes)
    keys = lightx2v_config.keys(scheme, folders, smoothed=_smoothed(schemes))
    lines = [
        f"# {lightx2v_config.NAME} has LightX2V's own settings and these keys; write into it where the folder lies:",
        json.dumps(keys, indent=1),
        "# then, ORIGINAL_MODEL being the native folder with text encoder and VAE:",
        lightx2v_config.command(model, folders),
        "# without FlashAttention 3: torch_sdpa for its three *_type",
    ]
    others = {"int8": "sgl, q8f, triton, torchao, npu", "fp8": "sgl, q8f, triton, torchao, intel-xpu"}[scheme]
    lines.append(f"# without vllm: the same files serve {scheme}- with {others}")
    lines.append("# the keys *_original_ckpt are for float weights, never for this folder")
    if scheme == "int8":
        lines.append("# int8-npu: a plain load, without lazy_load, which fails there")
    return lines


def _scheme(schemes: Schemes) -> str:
    """`int8` or `fp8`: `check` sees to it that all layers have one."""
    return next(TYPES[scheme.type] for scheme in schemes.values() if scheme is not None)


def _smoothed(schemes: Schemes) -> bool:
    """Whether there are affine tensors beside norms."""
    return any(s is not None and s.smooth is not None and s.smooth.way == "adaln" for s in schemes.values())


def recognise(folder: Path) -> bool:
    """Whether the folder has LightX2V's blocks, or its single file: a native checkpoint's, but for the scales in it."""
    if (folder / "non_block.safetensors").is_file() and (folder / "block_0.safetensors").is_file():
        return True
    try:
        _, infos = read_header(folder / SINGLE, folder)
    except UsageError:
        return False
    names = [info.name for info in infos]
    return any(name.endswith(".weight_scale") for name in names) and not any(n.endswith(".comfy_quant") for n in names)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = load_json(path, MAX_JSON_BYTES) if path.is_file() else {}
    return config if isinstance(config, dict) else {}


def layers_in(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> streamq's type, by the weights' dtypes."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    return {
        name.removesuffix(".weight"): kinds.get(info.dtype, "float")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and unit_of(name) != "rest"
    }


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """LightX2V loads a missing scale or bias as None, and every .safetensors in the folder, both without a word."""
    config = _config(folder)
    found = [f"config.json: no {key}, which LightX2V needs" for key in CONFIG_KEYS if key not in config]
    found += [f"config.json: {key} {config[key]}, the tensors say {due}" for key, due in _sizes(tensors).items()
              if config.get(key, due) != due]  # fmt: skip
    kinds = layers_in(folder, tensors)
    common = Counter(kind for kind in kinds.values() if kind != "float").most_common(1)
    wanted = DTYPES[common[0][0]] if common else " or ".join(DTYPES.values())
    for layer in kinds:
        found += _layer_problems(layer, tensors, wanted)
    lost = [name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")]
    found += [f"{name}: missing beside its scale" for name in lost if name not in tensors]
    found += native.wrong_floats(tensors, kinds)
    found += native.unrounded_scales(folder, tensors, "lightx2v", "lightx2v")
    blocks = sorted({unit_of(name) for name in tensors if unit_of(name) != "rest"})
    found += _affine_problems(config, blocks, tensors)
    ours = {"non_block.safetensors", SINGLE} | {f"block_{block.partition('.')[2]}.safetensors" for block in blocks}
    present = {path.name for path in folder.glob("*.safetensors")}
    found += [f"{name}: LightX2V would load this file too; move it elsewhere" for name in sorted(present - ours)]
    if SINGLE in present and len(present & ours) > 1:
        found.append(f"{SINGLE}: beside files of blocks, and LightX2V would load both; move one of them elsewhere")
    return found


def _sizes(tensors: Mapping[str, Any]) -> dict[str, int]:
    """LightX2V builds as many blocks as the configuration says, and runs without those that it does not."""
    weight = tensors.get("blocks.0.ffn.0.weight")
    shape = weight.shape if weight is not None and len(weight.shape) == 2 else ()
    blocks = {unit_of(name) for name in tensors if name.startswith("blocks.")}
    return {"num_layers": len(blocks)} | dict(zip(("ffn_dim", "dim"), shape, strict=False))


def _layer_problems(layer: str, tensors: Mapping[str, Any], wanted: str) -> list[str]:
    """What is wrong with a block's linear layer. `wanted`: the weight's dtype, which all of them share."""
    weight, scale = tensors[f"{layer}.weight"], tensors.get(f"{layer}.weight_scale")
    rows = weight.shape[0]
    found = native.wrong_bias(tensors, layer, (rows,), "; LightX2V would load None")
    if weight.dtype != wanted:
        return [*found, f"{layer}.weight: {weight.dtype}, must be {wanted}: LightX2V reads one scheme"]
    if scale is None:
        found.append(f"{layer}.weight_scale: missing; LightX2V would load None")
    elif scale.dtype not in native.FLOATS or tuple(scale.shape) != (rows, 1):
        found.append(f"{layer}.weight_scale: {scale.dtype} {list(scale.shape)}, must be F32 or BF16 [{rows}, 1]")
    return found


def _affine_problems(config: Mapping[str, Any], blocks: Sequence[str], tensors: Mapping[str, Any]) -> list[str]:
    """Tensors beside norms: in every block or in none, and config.json says so."""
    affine, found = [name for name in tensors if ".affine_norm" in name], []
    if affine and config.get("quant_method") != "advanced_ptq":
        found.append(f"config.json: no quant_method advanced_ptq, so LightX2V would leave {affine[0]} out")
    elif not affine and "quant_method" in config:
        found.append("config.json: quant_method, but there is no affine tensor, which LightX2V would look for")
    for block in blocks if affine else ():
        for name in (f"{block}.affine_{norm}.{leaf}" for norm in ("norm1", "norm3") for leaf in ("weight", "bias")):
            info = tensors.get(name)
            if info is None:
                found.append(f"{name}: missing; LightX2V reads it in every block or in none")
            elif info.dtype not in native.FLOATS or tuple(info.shape) != (config.get("dim"),):
                found.append(f"{name}: {info.dtype} {list(info.shape)}, must be F32 [{config.get('dim')}]")
    return found


def float_name(name: str) -> str | None:
    """The native name itself."""
    return None if name.endswith(".weight_scale") or ".affine_norm" in name else name


def contradictions(tensors: Mapping[str, Tensor]) -> list[str]:
    """None of a layer's tensors follows from another; but e4m3 has codes that are no number."""
    return native.wrong_codes(tensors["weight"])


def decode(tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
    """codes · scale, float32 [out, in]."""
    return lambda rows: tensors["weight"][rows].float() * tensors["weight_scale"][rows].float()


def record(tensors: Mapping[str, Tensor], kind: str) -> QuantizedLinear:
    """Codes as they are, a scale a row."""
    return record_of(kind, tensors["weight"], tensors["weight_scale"].float(), tensors.get("bias"))
