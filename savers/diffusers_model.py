"""diffusers' two Wan classes as a loader sees them: their parameters, their folders of files, their pipelines' lines.

Shared by the formats that stock diffusers loads. Names and shapes as `models/transformers/transformer_wan.py` and
`transformer_wan_vace.py` create them; files as `models/modeling_utils.py` looks for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from streamq.checkpoint import MAX_HEADER_BYTES, load_json, parse_json
from streamq.errors import UsageError
from streamq.savers import Document, Spec
from streamq.wan.config import CLASS, VACE_CLASS
from streamq.wan.names import BLOCK_LINEARS

STEM = "diffusion_pytorch_model"
WHOLE, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
SHARD_BYTES = 10**10  # diffusers' own default
EXPERTS = {"": "", "high_noise_model": "transformer", "low_noise_model": "transformer_2"}
FLOATS = ("F32", "BF16", "F16")
IGNORED = ".norm_added_q."  # in some files, and skipped by diffusers itself
_MAX_JSON_BYTES = 64 << 20
_MOST, _MOST_BLOCKS = 1 << 20, 1000  # of any size in a configuration
Shape = tuple[int, ...]


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`; {} where there is none. Raises UsageError for one that is no JSON object."""
    path = folder / "config.json"
    config = load_json(path, _MAX_JSON_BYTES) if path.is_file() else {}
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a JSON object; not a diffusers configuration")
    return config


def metadata_of(path: Path) -> dict[str, str]:
    """`__metadata__` of a safetensors file; {} where there is none, or no sound header."""
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length), str(path)) if length <= MAX_HEADER_BYTES else {}
    except (OSError, UsageError):
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        return {}
    return {key: text for key, text in metadata.items() if isinstance(text, str)}


def stock_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every parameter of the diffusers class that a `config.json` names -> its shape, before anything is quantized.

    In the order of its `state_dict()`. Raises UsageError for a configuration that no such class could be built from.
    """
    kind = config.get("_class_name")
    if kind not in (CLASS, VACE_CLASS):
        raise UsageError(f"config.json: _class_name {str(kind)[:80]!r}, must be {CLASS} or {VACE_CLASS}")
    patch = config.get("patch_size", [1, 2, 2])
    if not isinstance(patch, list) or len(patch) != 3 or not all(type(size) is int for size in patch):
        raise UsageError(f"config.json: patch_size {str(patch)[:80]}, must be three whole numbers")
    width = _whole(config, "num_attention_heads", 40) * _whole(config, "attention_head_dim", 128)
    blocks = _whole(config, "num_layers", 40, _MOST_BLOCKS)
    found: dict[str, Shape] = {"scale_shift_table": (1, 2, width)}
    found |= _linear("patch_embedding", width, _whole(config, "in_channels", 16), *patch)
    if kind == VACE_CLASS:
        found |= _linear("vace_patch_embedding", width, _whole(config, "vace_in_channels", 96), *patch)
    found |= _embedder(config, width)
    inside = _block(config, width)
    for i in range(blocks):
        found |= {f"blocks.{i}.{name}": shape for name, shape in inside.items()}
    if kind == VACE_CLASS:
        layers = config.get("vace_layers", list(range(0, 40, 5)))
        if not isinstance(layers, list) or not 0 < len(layers) <= blocks:
            raise UsageError(f"config.json: vace_layers {str(layers)[:80]}, must be a list of at most {blocks} blocks")
        table = inside.pop("scale_shift_table")
        for i in range(len(layers)):
            first = {"scale_shift_table": table} | (_linear("proj_in", width, width) if i == 0 else {})
            whole = first | inside | _linear("proj_out", width, width)
            found |= {f"vace_blocks.{i}.{name}": shape for name, shape in whole.items()}
    given = config.get("out_channels", 16)
    channels = _whole(config, "out_channels", 16) if given else _whole(config, "in_channels", 16)
    return found | _linear("proj_out", channels * math.prod(patch), width)


def _embedder(config: Mapping[str, Any], width: int) -> dict[str, Shape]:
    embedder, text = "condition_embedder", _whole(config, "text_dim", 4096)
    found: dict[str, Shape] = {}
    for part, size in (("time", _whole(config, "freq_dim", 256)), ("text", text)):
        found |= _linear(f"{embedder}.{part}_embedder.linear_1", width, size)
        found |= _linear(f"{embedder}.{part}_embedder.linear_2", width, width)
        if part == "time":
            found |= _linear(f"{embedder}.time_proj", 6 * width, width)
    if config.get("image_dim") is None:
        return found
    image, embedder = _whole(config, "image_dim", 0), f"{embedder}.image_embedder"
    if config.get("pos_embed_seq_len") is not None:
        found[f"{embedder}.pos_embed"] = (1, _whole(config, "pos_embed_seq_len", 0), image)
    found |= _linear(f"{embedder}.norm1", image)
    found |= _linear(f"{embedder}.ff.net.0.proj", image, image) | _linear(f"{embedder}.ff.net.2", width, image)
    return found | _linear(f"{embedder}.norm2", width)


def _block(config: Mapping[str, Any], width: int) -> dict[str, Shape]:
    """A block's parameters, by their names in it."""
    found: dict[str, Shape] = {"scale_shift_table": (1, 6, width)}
    for attention in ("attn1", "attn2"):
        for layer in (name for name in BLOCK_LINEARS if name.startswith(attention)):
            found |= _linear(layer, width, width)
        found |= {f"{attention}.norm_{part}.weight": (width,) for part in "qk"}
    if config.get("added_kv_proj_dim") is not None:
        added = _whole(config, "added_kv_proj_dim", 0)
        found |= _linear("attn2.add_k_proj", width, added) | _linear("attn2.add_v_proj", width, added)
        found["attn2.norm_added_k.weight"] = (width,)
    if config.get("cross_attn_norm", True):
        found |= _linear("norm2", width)
    feed = _whole(config, "ffn_dim", 13824)
    return found | _linear("ffn.net.0.proj", feed, width) | _linear("ffn.net.2", width, feed)


def _linear(name: str, *shape: int) -> dict[str, Shape]:
    """Weight and bias, of a norm, too."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _whole(config: Mapping[str, Any], key: str, default: int, most: int = _MOST) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 0 < value <= most:
        raise UsageError(f"config.json: {key} {str(value)[:80]!r}, must be a whole number from 1 to {most}")
    return value


def file_problems(folder: Path, tensors: Mapping[str, Any]) -> list[str]:
    """diffusers reads the shards that the index lists, or one file of a fixed name; what lies beside it ignores."""
    here = [path.name for path in sorted(folder.glob("*.safetensors"))]  # `file` of the tensors counts in this order
    if not (folder / INDEX).is_file():
        found = [] if WHOLE in here else [f"{WHOLE}: missing, and there is no {INDEX}"]
        return found + [f"{name}: diffusers would not read it; remove it" for name in here if name != WHOLE]
    document = load_json(folder / INDEX, _MAX_JSON_BYTES)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(document.get("metadata"), dict):
        return [f"{INDEX}: no weight_map and metadata objects in it"]
    listed = {file for file in weight_map.values() if isinstance(file, str)}
    found = [f"{file}: in {INDEX}, but missing" for file in sorted(listed.difference(here))]
    found += [
        f"{name}: not in {INDEX}, so diffusers would not read it; remove it" for name in here if name not in listed
    ]
    for name, info in tensors.items():
        file = here[info.file]
        if file in listed and weight_map.get(name) != file:
            found.append(f"{name}: in {file}, {INDEX} says {str(weight_map.get(name))[:80]}")
    return found + [f"{name}: in {INDEX}, not in the weights" for name in weight_map if name not in tensors]


def split(specs: Sequence[Spec], limit: int) -> list[tuple[str, list[Spec]]]:
    """One file, or shards of at most `limit` bytes of tensors (0: diffusers' own limit), by diffusers' names for them.

    Between layers wherever one fits a shard.
    """
    limit, room = limit or SHARD_BYTES, 0
    shards: list[list[Spec]] = []
    for _, group in groupby(specs, lambda spec: spec.name.rpartition(".")[0]):
        layer = list(group)
        size = sum(spec.nbytes for spec in layer)
        for part in [layer] if size <= limit else [[spec] for spec in layer]:
            size = sum(spec.nbytes for spec in part)
            if not shards or size > room:
                shards.append([])
                room = limit
            shards[-1] += part
            room -= size
    if len(shards) == 1:
        return [(WHOLE, shards[0])]
    count = len(shards)
    return [(f"{STEM}-{i:05d}-of-{count:05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def described(config: Mapping[str, Any], files: Sequence[tuple[str, Sequence[Spec]]]) -> list[Document]:
    """`config.json`, and an index where there are shards."""
    found = [Document("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())]
    if len(files) > 1:
        total = sum(spec.nbytes for _, specs in files for spec in specs)
        weight_map = {spec.name: file for file, specs in files for spec in specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        found.append(Document(INDEX, (json.dumps(index, indent=2) + "\n").encode()))
    return found


def program(config: Mapping[str, Any], folders: Mapping[str, str]) -> list[str]:
    """The lines that load the transformers and put them into their pipeline, the other parts of which are given."""
    kind = config.get("_class_name", CLASS)
    image = config.get("image_dim") is not None or config.get("in_channels", 16) > config.get("out_channels", 16)
    pipeline = "WanVACEPipeline" if kind == VACE_CLASS else "WanImageToVideoPipeline" if image else "WanPipeline"
    lines, names = ["import torch", f"from diffusers import {kind}, {pipeline}"], []
    for expert, folder in folders.items():
        names.append(EXPERTS[expert] or "transformer")
        lines.append(f"{names[-1]} = {kind}.from_pretrained({json.dumps(folder)}, torch_dtype=torch.bfloat16)")
    given = ", ".join(f"{name}={name}" for name in names)
    return [*lines, f'pipe = {pipeline}.from_pretrained("ORIGINAL_PIPELINE", {given}, torch_dtype=torch.bfloat16)']
