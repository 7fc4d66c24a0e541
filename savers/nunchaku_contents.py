"""What a Nunchaku checkpoint must hold, as far as headers and configuration tell, and what is wrong with one.

Names, dtypes and shapes as diffusers' `quantizers/nunchaku/utils.py` creates them; everything else is in
`diffusers_model`. diffusers raises only for a wrong shape: of a missing, an unknown or a cast tensor it warns at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamq.checkpoint import parse_json
from streamq.errors import UsageError
from streamq.savers.diffusers_model import FLOATS, IGNORED, Shape, config_of, file_problems, metadata_of, stock_shapes

SVDQ, AWQ = "svdq_w4a4", "awq_w4a16"
SECTIONS = {"w4a4": SVDQ, "w4a4_nvfp4": SVDQ, "w4a16": AWQ}
PRECISION = {"w4a4": "int4", "w4a4_nvfp4": "nvfp4", "w4a16": "int4"}
GROUP = {"w4a4": 64, "w4a4_nvfp4": 16, "w4a16": 64}
RANKS = range(16, 1025, 16)
ORIG = "smooth_factor_orig"
# Suffixes that only a packed layer has; `bias` it shares with a float one.
PACKED = frozenset(
    ("qweight", "wscales", "wzeros", "smooth_factor", ORIG, "proj_down", "proj_up", "wcscales", "wtscale")
)
_HALF = {"bfloat16": "BF16", "float16": "F16"}


def tensors_of(kind: str, rows: int, columns: int, rank: int, *, single: bool = False) -> dict[str, tuple[str, Shape]]:
    """Suffix -> (dtype, shape) of a packed layer [rows, columns] but for its bias, in file order."""
    groups = (columns // GROUP[kind], rows)
    if kind == "w4a16":
        return {"qweight": ("I32", (rows // 4, columns // 2)), "wscales": ("BF16", groups), "wzeros": ("BF16", groups)}
    nvfp4 = kind == "w4a4_nvfp4"
    found: dict[str, tuple[str, Shape]] = {
        "qweight": ("I8", (rows, columns // 2)),
        "wscales": ("F8_E4M3" if nvfp4 else "BF16", groups),
        "smooth_factor": ("BF16", (columns,)),
    }
    if single:
        found[ORIG] = found["smooth_factor"]
    found |= {"proj_down": ("BF16", (columns, rank)), "proj_up": ("BF16", (rows, rank))}
    return found | ({"wcscales": ("BF16", (rows,)), "wtscale": ("BF16", (1,))} if nvfp4 else {})


def misfit(kind: str, rows: int, columns: int, rank: int) -> str | None:
    """Why no kernel takes a layer of these sizes; None if one does."""
    output, input_ = (8, 64) if kind == "w4a16" else (128, 128)
    if rows % output:
        return f"{rows} outputs, {SECTIONS[kind]} takes multiples of {output}"
    if columns % input_:
        return f"{columns} inputs, {SECTIONS[kind]} takes multiples of {input_}"
    if kind == "w4a16":
        return None
    if rank not in RANKS:
        return f"rank {rank}, {SVDQ} takes multiples of {RANKS.step} from {RANKS[0]} to {RANKS[-1]}"
    if rank > min(rows, columns):
        return f"rank {rank}, more than the smaller size of the layer, {min(rows, columns)}"
    return None


def kind_in(layer: str, tensors: Mapping[str, Any]) -> str | None:
    """The type of a packed layer by its tensors' headers; None where there is no `qweight`."""
    qweight, scales = tensors.get(f"{layer}.qweight"), tensors.get(f"{layer}.wscales")
    if qweight is None:
        return None
    if qweight.dtype == "I32":
        return "w4a16"
    nvfp4 = f"{layer}.wtscale" in tensors or scales is not None and scales.dtype.startswith("F8")
    return "w4a4_nvfp4" if nvfp4 else "w4a4"


def single_words(kind: str) -> dict[str, Any]:
    """The single-file container's words for weights and activations of an SVDQ type."""
    nvfp4 = kind == "w4a4_nvfp4"
    dtype, scale = ("fp4_e2m1_all", [None, "fp8_e4m3_nan"]) if nvfp4 else ("int4", None)
    return {"dtype": dtype, "scale_dtype": scale, "group_size": GROUP[kind]}


def packed_layers(tensors: Mapping[str, Any]) -> list[str]:
    """Diffusers names of the layers that have a `qweight`, in the tensors' order."""
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def single_file(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """The older container's file in a folder and its metadata; None unless there is exactly one that has any."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.name.startswith(("svdq-", "awq-"))]
    if len(found) != 1:
        return None
    metadata = metadata_of(found[0])
    return (found[0], metadata) if "quantization_config" in metadata else None


def problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """What diffusers would refuse, or load wrong in silence. Raises UsageError for a config.json that is no JSON."""
    config = config_of(folder)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        single = single_file(folder)
        return ["config.json: no quantization_config object"] if single is None else _single_problems(*single, tensors)
    half = _HALF.get(str(quantization.get("compute_dtype", "bfloat16")))
    found = (
        [] if half else [f"config.json: compute_dtype {str(quantization['compute_dtype'])[:80]!r}, must be bfloat16"]
    )
    targets, wrong = _targets(quantization)
    rank = quantization[SVDQ].get("rank") if isinstance(quantization.get(SVDQ), dict) else 0
    found += wrong
    found += wrong_contents(config, targets, rank if type(rank) is int else 0, tensors, half or "BF16", single=False)
    return found + file_problems(folder, tensors)


def targets_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Target (diffusers name of a layer) -> type, by a `config.json`, as far as it can be read."""
    quantization = config.get("quantization_config")
    return _targets(quantization)[0] if isinstance(quantization, dict) else {}


def _targets(quantization: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """(target -> type, what is wrong with the configuration)."""
    targets: dict[str, str] = {}
    found = []
    for section in (SVDQ, AWQ):
        entry = quantization.get(section)
        where = f"config.json: quantization_config.{section}"
        if entry is None:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("targets"), list):
            found.append(f"{where}: not an object with a list of targets")
            continue
        kinds = {PRECISION[kind]: kind for kind, name in SECTIONS.items() if name == section}
        precision, group, rank = (entry.get(key) for key in ("precision", "group_size", "rank"))
        kind = kinds.get(str(precision))
        if kind is None:
            found.append(f"{where}: precision {str(precision)[:80]!r}, must be {' or '.join(kinds)}")
            continue
        if group != GROUP[kind]:
            found.append(f"{where}: group_size {str(group)[:80]}, must be {GROUP[kind]} for {precision}")
        if section == SVDQ and (type(rank) is not int or rank not in RANKS):
            found.append(f"{where}: rank {str(rank)[:80]}, must be a multiple of {RANKS.step} up to {RANKS[-1]}")
        if not entry["targets"]:
            found.append(f"{where}: no target at all; a section without any is left out")
        for target in entry["targets"]:
            if not isinstance(target, str):
                found.append(f"{where}: target {str(target)[:80]} is no text")
            elif target in targets:
                found.append(f"{target}: twice among the targets of config.json")
            else:
                targets[target] = kind
    if not targets and not found:
        found.append(f"config.json: quantization_config has neither {SVDQ} nor {AWQ}")
    return targets, found


def wrong_contents(
    config: Mapping[str, Any], targets: Mapping[str, str], rank: int, tensors: Mapping[str, Any], half: str, *,
    single: bool,
) -> list[str]:  # fmt: skip
    """Every tensor that the model has once `targets` are replaced, against those that are there."""
    try:
        due: dict[str, tuple[tuple[str, ...], Shape]] = {
            name: (FLOATS, shape) for name, shape in stock_shapes(config).items()
        }
    except UsageError as error:
        return [str(error)]
    found: list[str] = []
    for layer in packed_layers(tensors):
        if layer not in targets:
            found.append(f"{layer}: packed in the weights, but no target in config.json")
            due |= _as_they_are(layer, tensors)
            due.pop(f"{layer}.weight", None)
    for layer, kind in targets.items():
        known = due.pop(f"{layer}.weight", None)
        if known is None or len(known[1]) != 2:
            found.append(f"{layer}: a target in config.json, but not a linear layer of the model")
            continue
        rows, columns = known[1]
        reason = misfit(kind, rows, columns, rank if rank in RANKS else RANKS[0])
        if reason is not None:
            found.append(f"{layer}: {reason}")
        own = kind_in(layer, tensors)
        if own != kind:
            found.append(f"{layer}: {kind} by its section of config.json, {own or 'not packed'} by its tensors")
            due |= _as_they_are(layer, tensors)
            continue
        for suffix, (dtype, shape) in tensors_of(kind, rows, columns, rank, single=single).items():
            due[f"{layer}.{suffix}"] = (half if dtype == "BF16" else dtype,), shape
        due[f"{layer}.bias"] = (half,), (rows,)
    found += [f"{name}: missing; diffusers warns and runs without it" for name in due if name not in tensors]
    for name, info in tensors.items():
        if name not in due and IGNORED in name:
            continue
        if name not in due:
            older = "; it belongs to the older single-file container" if name.endswith(f".{ORIG}") else ""
            found.append(f"{name}: no parameter of the quantized model{older}")
            continue
        dtypes, shape = due[name]
        if info.dtype not in dtypes or tuple(info.shape) != shape:
            wanted = f"{' or '.join(dtypes)} {list(shape)}"
            found.append(f"{name}: {info.dtype} {list(info.shape)}, must be {wanted}")
    return found


def _as_they_are(layer: str, tensors: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], Shape]]:
    """A layer's tensors, for one of which enough has been said."""
    names = (f"{layer}.{suffix}" for suffix in ("weight", "bias", *PACKED))
    return {name: ((tensors[name].dtype,), tuple(tensors[name].shape)) for name in names if name in tensors}


def _single_problems(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> list[str]:
    """The single file: its strings must be JSON and agree with its tensors."""
    found = []
    documents: dict[str, dict[str, Any]] = {}
    for key in ("config", "quantization_config"):
        try:
            document = parse_json(metadata.get(key, "").encode(), f"{path.name}: {key}")
        except UsageError as error:
            return [str(error)]
        if not isinstance(document, dict):
            return [f"{path.name}: {key} is no JSON object"]
        documents[key] = document
    quantization = documents["quantization_config"]
    targets = {layer: kind_in(layer, tensors) or "" for layer in packed_layers(tensors)}
    weight = quantization.get("weight")
    if any(kind != "w4a16" for kind in targets.values()):
        due = {single_words(kind)["dtype"] for kind in targets.values() if kind != "w4a16"}
        given = weight.get("dtype") if isinstance(weight, dict) else None
        if due != {str(given)}:
            found.append(f"{path.name}: weight.dtype {str(given)[:80]}, its layers are {' and '.join(sorted(due))}")
    config = documents["config"] | {"_class_name": metadata.get("model_class")}
    rank = quantization.get("rank", 0)
    return found + wrong_contents(config, targets, rank if type(rank) is int else 0, tensors, "BF16", single=True)
