"""What a recipe says about one layer, the type that this makes, and what no runtime has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class QConfig:
    """How one operand (activation or weight) of a linear layer is quantized."""

    scope: str
    dtype: str
    symmetric: bool = True
    method: str = "minmax"
    ext: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Pair:
    """Activation and weight of one layer: what a recipe says about it."""

    act: QConfig
    weight: QConfig

    @property
    def type(self) -> str | None:
        """The quantization type (`w8a8`, …), or None for a pair that no runtime of streamq's has."""
        return _TYPES.get((
            self.act.scope if self.act.dtype != "float" else "", self.act.dtype, self.weight.scope, self.weight.dtype
        ))  # fmt: skip


_WHOLE = ("per_channel", "per_tensor")
# (activation's scope and dtype, weight's scope and dtype) -> type. q8_0 and q4_0 are GGUF's blocks of 32.
_TYPES = {
    **{("per_token", "int8", scope, "int8"): "w8a8" for scope in _WHOLE},
    **{("per_tensor", "int8", scope, "int8"): "w8a8_static" for scope in _WHOLE},
    **{("", "float", scope, "int8"): "w8a16" for scope in _WHOLE},
    **{("per_token", "fp8_e4m3", scope, "fp8_e4m3"): "fp8" for scope in _WHOLE},
    ("", "float", "per_block", "int8"): "q8_0",
    ("", "float", "per_block", "int4"): "q4_0",
    ("per_group", "int4", "per_group", "int4"): "w4a4",
    ("per_group", "nvfp4", "per_group", "nvfp4"): "w4a4_nvfp4",
    ("", "float", "per_group", "int4"): "w4a16",
    ("per_block", "mxfp8", "per_block", "mxfp8"): "w8a8_mxfp8",
    ("per_block", "mxfp4", "per_block", "mxfp4"): "w4a4_mxfp4",
}


def pair_of(kind: str) -> Pair:
    """The plainest pair of a type: what a folder tells of a layer, whose recipe it does not hold."""
    scope, act, whole, weight = next(key for key, found in _TYPES.items() if found == kind)
    return Pair(QConfig(scope or "per_tensor", act), QConfig(whole, weight))


# (activation's, weight's dtype) of pairs that no runtime has -> what to take instead.
_INSTEAD = {
    ("int8", "int4"): "w4a8: take w8a8 (int8 per_channel weights), or w4a4_mxfp4 (mxfp4 per_block both) for 4-bit ones",
    ("mxfp8", "mxfp4"): "w4a8: take mxfp8 per_block both (w8a8_mxfp8), or mxfp4 per_block both (w4a4_mxfp4)",
    ("int4", "int4"): "int4 activations go with int4 weights per_group (w4a4, nunchaku); w4a4_mxfp4 is MindIE's",
    ("float", "int4"): "int4 weights alone are per_group (w4a16, nunchaku) or per_block (gguf)",
    ("float", "int8"): "int8 weights alone are per_channel (w8a16, diffusers) or per_block (gguf)",
    ("mxfp8", "mxfp8"): "mxfp8 is per_block on both sides (w8a8_mxfp8)",
    ("mxfp4", "mxfp4"): "mxfp4 is per_block on both sides (w4a4_mxfp4)",
    ("nvfp4", "nvfp4"): "nvfp4 is per_group on both sides (w4a4_nvfp4)",
    ("fp8_e4m3", "fp8_e4m3"): "fp8_e4m3 is per_token with per_channel or per_tensor weights (fp8)",
}


def no_type(pair: Pair) -> str:
    """What is wrong with a pair that has no type, and what to take instead."""
    act, weight = pair.act, pair.weight
    shown = "float" if act.dtype == "float" else f"{act.dtype} {act.scope}"
    instead = _INSTEAD.get((act.dtype, weight.dtype), "int8 per_token with int8 per_channel is w8a8")
    return f"activations {shown} with weights {weight.dtype} {weight.scope}: no such type; {instead}"


def fault(pair: Pair) -> tuple[str, str] | None:
    """(key below `qconfig`, what is wrong with it) of a pair that has a type; None if it can be worked with."""
    weight, act = pair.weight, pair.act
    if pair.type in ("fp8", "q8_0", "q4_0"):
        return _plain_fault(pair)
    if weight.dtype == "int8":
        return _int8_fault(pair)
    if pair.type in _MX_METHODS:
        return _mx_fault(pair)
    if weight.dtype not in ("int4", "nvfp4"):
        return None
    methods = ("minmax", "mse", "gptq") if pair.type == "w4a16" else ("minmax", "svdquant")
    if weight.method not in methods:
        return "weight.method", f"{weight.method!r}; {pair.type} has {', '.join(methods)}"
    if weight.symmetric == (pair.type == "w4a16"):
        return "weight.symmetric", f"{weight.symmetric}; the runtime's {pair.type} has {not weight.symmetric}"
    if not act.symmetric:
        return "act.symmetric", "False; activations in groups are symmetric in the runtime"
    if act.dtype != "float" and act.method != "minmax":
        return "act.method", f"{act.method!r}; the runtime takes each group's own range, minmax"
    ext = dict(weight.ext)
    for key in ("damping", "act_order") if weight.method == "svdquant" and not ext.get("gptq") else ():
        if key in ext:
            return f"weight.ext.{key}", "of GPTQ, which svdquant uses only with gptq: True"
    rank = ext.get("rank", 16)
    if rank % 16:
        return "weight.ext.rank", f"{rank}; a multiple of 16, which the kernels' tiles are"
    return None


_MX_METHODS = {"w8a8_mxfp8": ("minmax", "mse_round"), "w4a4_mxfp4": ("minmax", "ceil_x")}


def _mx_fault(pair: Pair) -> tuple[str, str] | None:
    weight, act = pair.weight, pair.act
    methods = _MX_METHODS[pair.type or ""]
    if weight.method not in methods:
        return "weight.method", f"{weight.method!r}; {pair.type} has {', '.join(methods)}"
    if act.method != "minmax":
        return "act.method", f"{act.method!r}; each block of an input has its own range, minmax"
    for operand, config in (("weight", weight), ("act", act)):
        if not config.symmetric:
            return f"{operand}.symmetric", f"False; {pair.type} has no zero points"
    ext = dict(weight.ext)
    if "convrot" in ext:
        return "weight.ext.convrot", "only with int8 per_token and int8 per_channel"
    least, most = ext.get("search_min", 6.0), ext.get("search_max", 12.0)
    if ext.get("enable_search") and not least < most:
        return "weight.ext.search_max", f"{most}; must be above search_min, {least}"
    return None


def _plain_fault(pair: Pair) -> tuple[str, str] | None:
    """Of types that are rounded as they are."""
    for operand, config in (("weight", pair.weight), ("act", pair.act)):
        if config.method not in ("minmax", "none"):
            return f"{operand}.method", f"{config.method!r}; {pair.type} has minmax"
        if not config.symmetric:
            return f"{operand}.symmetric", f"False; {pair.type} is symmetric in every runtime"
    if pair.weight.ext:
        return f"weight.ext.{pair.weight.ext[0][0]}", f"not for {pair.type}"
    return None


def _int8_fault(pair: Pair) -> tuple[str, str] | None:
    weight, act = pair.weight, pair.act
    if not weight.symmetric:
        return "weight.symmetric", "False; int8 weights are symmetric in every supported runtime"
    if pair.type == "w8a8" and not act.symmetric:
        return "act.symmetric", "False; per-token activations are symmetric in the runtimes"
    if weight.method not in ("minmax", "mse", "gptq"):
        return "weight.method", f"{weight.method!r}; int8 weights have minmax, mse, gptq"
    if weight.method == "gptq" and weight.scope != "per_channel":
        return "weight.scope", f"{weight.scope!r}; gptq has a scale per_channel"
    convrot = dict(weight.ext).get("convrot")
    if convrot is not None and (convrot not in (16, 64, 256) or pair.type != "w8a8" or weight.scope != "per_channel"):
        return "weight.ext.convrot", f"{convrot}; 16, 64 or 256, with int8 per_token and int8 per_channel"
    if convrot is not None and weight.method != "minmax":
        return "weight.method", f"{weight.method!r}; convrot goes with minmax"
    if "weighted" in dict(weight.ext):
        return "weight.ext.weighted", "only for int4; int8 rows are clipped by their own error"
    if act.method in ("percentile", "mse") and act.scope != "per_tensor":
        return "act.method", f"{act.method!r}; only for per_tensor, which is static"
    return None
