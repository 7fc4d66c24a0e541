"""What `verify` asks of every folder with native names: floats that are floats, biases, scales as streamq rounds them.

A runtime takes a missing bias for none, and a float tensor of another dtype as it comes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import load_json
from streamq.errors import UsageError
from streamq.wan import to_diffusers
from streamq.wan.names import RMS_NORMS

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F32", "BF16", "F16")
_MANIFEST = "streamq.json"
_MAX_MANIFEST_BYTES = 256 << 20
_AT_A_TIME = 1 << 22


def wrong_floats(tensors: Mapping[str, Any], quantized: Collection[str]) -> list[str]:
    """What is wrong with tensors, by native name, that are no part of a quantized layer."""
    found = []
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in quantized or to_diffusers(name) is None:
            continue
        if info.dtype not in FLOATS:
            found.append(f"{name}: {info.dtype}, must be a float")
        elif leaf == "weight" and module.rpartition(".")[2] not in RMS_NORMS:
            found += wrong_bias(tensors, module, info.shape[:1])
        elif leaf == "bias" and f"{module}.weight" not in tensors:
            found.append(f"{module}.weight: missing beside its bias")
    return found


def wrong_bias(tensors: Mapping[str, Any], layer: str, shape: tuple[int, ...], missing: str = "") -> list[str]:
    """What is wrong with a layer's bias. `missing`: what the runtime makes of a missing one."""
    bias = tensors.get(f"{layer}.bias")
    if bias is None:
        return [f"{layer}.bias: missing{missing}"]
    if bias.dtype not in FLOATS or tuple(bias.shape) != tuple(shape):
        return [f"{layer}.bias: {bias.dtype} {list(bias.shape)}, must be a float {list(shape)}"]
    return []


def wrong_codes(weight: Tensor) -> list[str]:
    """Whether there is an e4m3 code that is no number (it has no infinity, and a NaN of either sign)."""
    import torch

    if weight.dtype != torch.float8_e4m3fn:
        return []
    raw = weight.view(torch.uint8)
    nan = any(bool(((part & 127) == 127).any()) for part in raw.split(max(1, _AT_A_TIME // max(1, raw.shape[1]))))
    return ["weight: NaN among the e4m3 codes"] if nan else []


def unrounded_scales(folder: Path, tensors: Mapping[str, Any], form: str, match: str | None = None) -> list[str]:
    """F32 scales that bf16 cannot hold, though streamq rounds them so: a runtime would round them behind the codes.

    Only where a manifest says that streamq's own arithmetic made them, not that of the tool `match`.
    """
    if not _ours(folder, form, match):
        return []
    paths = sorted(folder.glob("*.safetensors"))
    found = []
    for name, info in tensors.items():
        if not name.endswith(".weight_scale") or info.dtype != "F32":
            continue
        with open(paths[info.file], "rb") as stream:
            stream.seek(info.offset)
            raw = stream.read(info.nbytes)
        if any(raw[0::4]) or any(raw[1::4]):
            found.append(f"{name}: a scale that bf16 cannot hold; it is rounded so before the codes are made")
    return found


def _ours(folder: Path, form: str, match: str | None) -> bool:
    """By the manifest in the folder or above it: of one format or several, of one expert or two."""
    for place in (folder, *list(folder.resolve().parents)[:2]):
        path = place / _MANIFEST
        if not path.is_file():
            continue
        try:
            document = load_json(path, _MAX_MANIFEST_BYTES)
        except UsageError:
            return False
        if not isinstance(document, dict) or form not in document.get("formats", {}):
            return False
        return match is None or document.get("options", {}).get("match") != match
    return False
