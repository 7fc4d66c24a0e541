"""Recipes: msModelSlim's YAML protocol, read strictly, and turned into a type for each layer.

A recipe is `apiversion: multimodal_sd_modelslim_v1` with `spec.process` (what to do to which layers), `spec.save` (the
format) and `spec.multimodal_sd_config` (calibration settings). Whatever is not understood is an error that names the
key's dotted path, because a key that is silently ignored is a model that is silently not quantized.

Opens no checkpoint and needs no torch; `streamq.resolve` says what a recipe does to a model's layers. streamq's own are
`overrides` in a `linear_quant` step, `method` and `alpha: search` in a smoothing step, and `spec.calibration`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bracex

from streamq.errors import UsageError, nearest
from streamq.pairs import Pair, QConfig, fault, no_type
from streamq.patterns import MAX_EXPANSIONS, regexes
from streamq.recipe_keys import (
    CALIBRATION_RANGES,
    CALIBRATION_TEXTS,
    EXT_KEYS,
    FA3_SCOPES,
    GRIDS,
    MODEL_CONFIG_KEYS,
    NEXT_INPUTS,
    PEER_KINDS,
    PROCESS_KINDS,
    QCONFIG_VALUES,
    SAVERS,
    SEARCH_ROWS,
    SMOOTH_ALPHA,
    SMOOTH_METHODS,
    SUBGRAPHS,
)
from streamq.recipe_yaml import kind_of, load_yaml, plain

APIVERSION = "multimodal_sd_modelslim_v1"
MAX_RECIPE_BYTES = 1 << 20
MAX_RECIPE_NODES = 100_000
MAX_PATTERN_LENGTH, MAX_PATTERN_STARS = 200, 8  # msModelSlim's length; more stars only make matching slow


@dataclass(frozen=True)
class Override:
    """A change to a step for some of its layers; `pair` None leaves them float."""

    include: tuple[str, ...]
    pair: Pair | None
    path: str


@dataclass(frozen=True)
class LinearQuant:
    """A `linear_quant` step: the layers that it takes and what it does to them."""

    pair: Pair
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    overrides: tuple[Override, ...]
    path: str


@dataclass(frozen=True)
class SmoothStep:
    """A smoothing step: which layers' groups it takes, and how their vectors are found.

    `method` smoothquant (alpha given), search (alpha searched), awq or svdquant (with `grid` and `rows`); see
    `streamq.quantized.Smooth`.
    """

    method: str
    alpha: float
    scale_min: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    path: str
    grid: str = ""
    rows: int = 0


@dataclass(frozen=True)
class AttentionStep:
    """A step about attention itself. `kind` fa3_quant: computed in `dtype` (fp8_e4m3, mxfp4); or online_quarot: q and k
    are rotated at run time."""

    kind: str
    dtype: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    path: str


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked. `document` is what the manifest keeps: the YAML without keys that only carry anchors."""

    name: str
    process: tuple[LinearQuant | SmoothStep | AttentionStep, ...]
    format: str | None
    part_file_size: int
    model_config: dict[str, Any]
    calibration: dict[str, Any]
    document: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises UsageError with the path of the offending key."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes, a recipe has at most {MAX_RECIPE_BYTES}")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check --config_path") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    return parse_recipe(text, path.stem, str(path))


def parse_recipe(text: str, name: str, where: str) -> Recipe:
    """Parse and check a recipe's text; `where` starts every message. Raises UsageError."""
    try:
        document = load_yaml(text)
    except ValueError as error:
        raise UsageError(f"{where}: not a readable recipe: {error}") from error
    return _Reader(where).recipe(document, name)


class _Reader:
    """Walks a parsed document with the path of the key at hand, so that every complaint can name it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.warnings: list[str] = []

    def fail(self, path: str, message: str) -> UsageError:
        return UsageError(f"{self.where}: {path + ': ' if path else ''}{message}")

    def mapping(self, value: Any, path: str, known: Iterable[str] | None) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(path, f"{kind_of(value)} where a mapping belongs")
        names = None if known is None else sorted(known)
        for key in value:
            if not isinstance(key, str):
                raise self.fail(path, f"key {key!r} is {kind_of(key)}, not text")
            if names is not None and key not in names:
                full = f"{path}.{key}" if path else key
                here = f"known here: {', '.join(names)}" if names else "none is known here"
                raise self.fail(full, f"unknown key{nearest(key, tuple(names))} ({here})")
        return value

    def optional(self, value: Any, path: str, known: Iterable[str] | None) -> dict[str, Any]:
        return {} if value is None else self.mapping(value, path, known)

    def sequence(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(path, f"{kind_of(value)} where a list belongs")
        return value

    def word(self, value: Any, path: str, allowed: tuple[str, ...]) -> str:
        if value not in allowed or not isinstance(value, str):
            raise self.fail(path, f"{value!r}; one of {', '.join(allowed)}{nearest(str(value), allowed)}")
        return value

    def patterns(self, value: Any, path: str) -> tuple[str, ...]:
        for i, pattern in enumerate(self.sequence(value, path)):
            if not isinstance(pattern, str) or not pattern:
                raise self.fail(f"{path}.{i}", f"{pattern!r} is not a pattern")
            stars = len(re.findall(r"\*+", pattern))
            if len(pattern) > MAX_PATTERN_LENGTH or stars > MAX_PATTERN_STARS:
                raise self.fail(
                    f"{path}.{i}",
                    f"pattern of {len(pattern)} characters and {stars} stars; at most {MAX_PATTERN_LENGTH} and"
                    f" {MAX_PATTERN_STARS}",
                )
            try:
                regexes(pattern)
            except bracex.ExpansionLimitException as error:
                raise self.fail(f"{path}.{i}", f"{pattern!r} stands for more than {MAX_EXPANSIONS} patterns") from error
        return tuple(value)

    def recipe(self, document: Any, name: str) -> Recipe:
        top = self.mapping(document, "", None)
        self.count_nodes({key: top[key] for key in ("metadata", "spec") if key in top})
        if top.get("apiversion") != APIVERSION:
            raise self.fail("apiversion", f"{top.get('apiversion')!r}, streamq reads {APIVERSION!r}")
        if "metadata" in top:
            self.mapping(top["metadata"], "metadata", None)
        if "spec" not in top:
            close = nearest("spec", tuple(k for k in top if isinstance(k, str)))
            raise self.fail("spec", f"missing: a recipe says under spec.process what to quantize{close}")
        known = ("process", "save", "dataset", "runner", "prior", "multimodal_sd_config", "calibration")
        spec = self.mapping(top["spec"], "spec", known)
        if spec.get("prior"):
            raise self.fail("spec.prior", "prior stages are not supported; take them out")
        if not spec.get("process"):
            raise self.fail("spec.process", "no step at all: nothing would be quantized")
        steps = self.sequence(spec["process"], "spec.process")
        process = tuple(self.step(step, f"spec.process.{i}") for i, step in enumerate(steps))
        for i, step in enumerate(process):
            if isinstance(step, SmoothStep) and any(isinstance(earlier, LinearQuant) for earlier in process[:i]):
                raise self.fail(step.path, "smoothing after linear_quant; put it before: it changes the weights")
        if not any(isinstance(step, LinearQuant) for step in process):
            raise self.fail("spec.process", "no linear_quant step: nothing would be quantized")
        form, part_file_size = self.save(spec.get("save"))
        model_config = self.multimodal(spec.get("multimodal_sd_config"))
        kept: dict[str, Any] = {key: plain(top[key]) for key in ("apiversion", "metadata", "spec") if key in top}
        calibration = self.calibration(spec.get("calibration"))
        return Recipe(name, process, form, part_file_size, model_config, calibration, kept, tuple(self.warnings))

    def count_nodes(self, value: Any) -> None:
        """A few lines of nested anchors can stand for billions of values: count before anything walks them."""
        left, stack = MAX_RECIPE_NODES, [value]
        while stack:
            item = stack.pop()
            left -= 1
            if left < 0:
                raise self.fail("", f"more than {MAX_RECIPE_NODES} values once its anchors are expanded")
            if isinstance(item, dict):
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set)):
                stack.extend(item)

    def step(self, value: Any, path: str) -> LinearQuant | SmoothStep | AttentionStep:
        if not isinstance(value, dict):
            raise self.fail(path, f"{kind_of(value)} where a mapping with `type` belongs")
        kind = value.get("type")
        if isinstance(kind, str) and kind in PEER_KINDS:
            instead = f"{PEER_KINDS[kind]}; " if PEER_KINDS[kind] else ""
            supported = ", ".join(PROCESS_KINDS)
            raise self.fail(f"{path}.type", f"{kind} is msModelSlim's; {instead}supported here: {supported}")
        if not isinstance(kind, str) or kind not in PROCESS_KINDS:
            close = nearest(str(kind), tuple(PROCESS_KINDS))
            raise self.fail(f"{path}.type", f"unknown step {kind!r}; supported: {', '.join(PROCESS_KINDS)}{close}")
        self.mapping(value, path, PROCESS_KINDS[kind])
        if kind in ("online_quarot", "fa3_quant"):
            return self.attention(value, path, kind)
        if kind != "linear_quant":
            return self.smooth(value, path, kind)
        pair = self.pair(value.get("qconfig"), f"{path}.qconfig", None)
        include = self.patterns(value.get("include", ["*"]), f"{path}.include")
        exclude = self.patterns(value.get("exclude", []), f"{path}.exclude")
        overrides = tuple(
            self.override(item, f"{path}.overrides.{i}", pair)
            for i, item in enumerate(self.sequence(value.get("overrides", []), f"{path}.overrides"))
        )
        return LinearQuant(pair, include, exclude, overrides, path)

    def smooth(self, value: dict[str, Any], path: str, kind: str) -> SmoothStep:
        method = self.word(value.get("method", "smoothquant"), f"{path}.method", SMOOTH_METHODS)
        alpha = value.get("alpha", SMOOTH_ALPHA[kind])
        if alpha == "search" and method == "smoothquant":
            method, alpha = "search", 0.0
        self.number(alpha, f"{path}.alpha", (0.0, 1.0))
        scale_min = self.number(value.get("scale_min", 1e-5), f"{path}.scale_min", (1e-12, 1.0))
        if value.get("symmetric", True) is not True:
            raise self.fail(f"{path}.symmetric", f"{value['symmetric']!r}; inputs are scaled here, never shifted")
        for i, subgraph in enumerate(
            self.sequence(value.get("enable_subgraph_type", []), f"{path}.enable_subgraph_type")
        ):
            self.word(subgraph, f"{path}.enable_subgraph_type.{i}", SUBGRAPHS)
        # Wan has no other kind in msModelSlim's adapter, so that a list without it smooths nothing there.
        if value.get("enable_subgraph_type", ["norm-linear"]).count("norm-linear") == 0:
            raise self.fail(f"{path}.enable_subgraph_type", "without norm-linear, which all of Wan's groups are")
        include = self.patterns(_given(value, "include", ["*"]), f"{path}.include")
        exclude = self.patterns(_given(value, "exclude", []), f"{path}.exclude")
        if method != "svdquant":
            for key in ("grid", "rows"):
                if key in value:
                    raise self.fail(f"{path}.{key}", f"only for method svdquant; this step has {method}")
            return SmoothStep(method, float(alpha), scale_min, include, exclude, path)
        for key in ("alpha", "scale_min"):
            if key in value:
                raise self.fail(f"{path}.{key}", "svdquant searches its own exponents; leave it out")
        default, *bounds = SEARCH_ROWS
        grid = self.word(value.get("grid", GRIDS[0]), f"{path}.grid", GRIDS)
        rows = self.number(value.get("rows", default), f"{path}.rows", (bounds[0], bounds[1]))
        return SmoothStep(method, 0.0, scale_min, include, exclude, path, grid, rows)

    def attention(self, value: dict[str, Any], path: str, kind: str) -> AttentionStep:
        include = self.patterns(_given(value, "include", ["*"]), f"{path}.include")
        exclude = self.patterns(_given(value, "exclude", []), f"{path}.exclude")
        if kind == "online_quarot":
            size = value.get("block_size", -1)
            if type(size) is not int or size != -1:
                raise self.fail(f"{path}.block_size", f"{size!r}; only -1, one rotation for the whole of a head")
            return AttentionStep(kind, "", include, exclude, path)
        path_of = f"{path}.qconfig"
        if value.get("qconfig") is None:  # int8 per head in msModelSlim, from calibration data
            raise self.fail(path_of, f"missing: dtype {' or '.join(FA3_SCOPES)}, which MindIE's attention is made for")
        given = self.mapping(value["qconfig"], path_of, ("dtype", "scope", "symmetric", "method"))
        dtype = self.word(given.get("dtype"), f"{path_of}.dtype", tuple(FA3_SCOPES))
        self.word(given.get("scope"), f"{path_of}.scope", (FA3_SCOPES[dtype],))
        self.word(given.get("method", "minmax"), f"{path_of}.method", ("minmax",))
        if given.get("symmetric", True) is not True:
            raise self.fail(f"{path_of}.symmetric", f"{given['symmetric']!r}; attention is quantized symmetrically")
        return AttentionStep(kind, dtype, include, exclude, path)

    def number(self, value: Any, path: str, bounds: tuple[Any, Any]) -> Any:
        """A number between bounds, of their kind: whole if they are whole."""
        least, most = bounds
        whole = isinstance(least, int)
        right = isinstance(value, int) if whole else isinstance(value, (int, float))
        if not right or isinstance(value, bool) or not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            raise self.fail(path, f"{value!r}; {kind} from {least} to {most}")
        return value if whole else float(value)

    def calibration(self, value: Any) -> dict[str, Any]:
        path = "spec.calibration"
        item = self.optional(value, path, (*CALIBRATION_RANGES, *CALIBRATION_TEXTS, "prompts"))
        found: dict[str, Any] = {}
        for key, given in item.items():
            if key in CALIBRATION_RANGES:
                found[key] = self.number(given, f"{path}.{key}", CALIBRATION_RANGES[key])
            elif key == "next_input":
                found[key] = self.word(given, f"{path}.{key}", NEXT_INPUTS)
            elif key == "dtype":
                found[key] = self.word(given, f"{path}.{key}", ("bf16", "fp32"))
            elif key == "prompts":
                texts = self.sequence(given, f"{path}.{key}")
                for i, text in enumerate(texts):
                    if not isinstance(text, str):
                        raise self.fail(f"{path}.prompts.{i}", f"{text!r} is {kind_of(text)}, not text")
                found[key] = texts
            elif not isinstance(given, str):
                raise self.fail(f"{path}.{key}", f"{given!r} is {kind_of(given)}; width*height, e.g. 832*480")
            else:
                found[key] = given
        return found

    def override(self, value: Any, path: str, base: Pair) -> Override:
        item = self.mapping(value, path, ("include", "qconfig"))
        for key in ("include", "qconfig"):
            if key not in item:
                raise self.fail(
                    f"{path}.{key}", "missing: an override needs include and qconfig (qconfig: null = float)"
                )
        pair = None if item["qconfig"] is None else self.pair(item["qconfig"], f"{path}.qconfig", base)
        return Override(self.patterns(item["include"], f"{path}.include"), pair, path)

    def pair(self, value: Any, path: str, base: Pair | None) -> Pair:
        if value is None:
            raise self.fail(path, "missing: say how activations (act) and weights are quantized")
        config = self.mapping(value, path, ("act", "weight"))
        if base is None and config.get("weight") is None:
            raise self.fail(f"{path}.weight", "missing: say how the weights are quantized")
        # msModelSlim takes a missing `act` for float activations, and a given one for int8 unless it says otherwise.
        act = QConfig("per_tensor", "int8") if config.get("act") else QConfig("per_tensor", "float", method="none")
        default = base or Pair(act, QConfig("per_channel", "int8"))
        pair = Pair(
            self.qconfig(config.get("act"), f"{path}.act", "act", default.act),
            self.qconfig(config.get("weight"), f"{path}.weight", "weight", default.weight),
        )
        if pair.type is None:
            raise self.fail(path, no_type(pair))
        if (wrong := fault(pair)) is not None:
            raise self.fail(f"{path}.{wrong[0]}", wrong[1])
        return pair

    def qconfig(self, value: Any, path: str, operand: str, default: QConfig) -> QConfig:
        if value is None:
            return default
        given = self.mapping(value, path, ("scope", "dtype", "symmetric", "method", "ext"))
        for key in ("scope", "dtype", "method"):
            if key in given:
                self.word(given[key], f"{path}.{key}", QCONFIG_VALUES[f"{operand}.{key}"])
        if not isinstance(given.get("symmetric", True), bool):
            raise self.fail(f"{path}.symmetric", f"{given['symmetric']!r} is not True or False")
        method = given.get("method", default.method)
        keys = EXT_KEYS.get(f"{operand}.{method}", {})
        ext = self.optional(given.get("ext"), f"{path}.ext", keys)
        for key, item in ext.items():
            self.ext(item, f"{path}.ext.{key}", keys[key])
        changes: dict[str, Any] = {k: given[k] for k in ("scope", "dtype", "symmetric", "method") if k in given}
        if "ext" in given:
            if "axes" in ext and not changes.get("dtype", default.dtype).startswith("mx"):
                raise self.fail(f"{path}.ext.axes", "only for mxfp8 and mxfp4, whose blocks lie along an axis")
            changes["ext"] = tuple(sorted((key, item) for key, item in ext.items() if key != "axes"))
        if default.dtype == "float" != changes.get("dtype", "float") and "method" not in given:
            changes["method"] = "minmax"  # a float operand has none
        if "ext" not in given and method != default.method:
            changes["ext"] = ()  # those were another method's
        return replace(default, **changes)

    def ext(self, value: Any, path: str, allowed: tuple[Any, ...]) -> None:
        if path.endswith(".axes"):
            if isinstance(value, bool) or value not in allowed:
                raise self.fail(path, f"{value!r}; -1: blocks of 32 lie along the inputs in every runtime")
        elif isinstance(allowed[0], bool):
            if not isinstance(value, bool):
                raise self.fail(path, f"{value!r} is not True or False")
        elif isinstance(allowed[0], str):
            self.word(value, path, allowed)
        else:
            self.number(value, path, (allowed[0], allowed[1]))

    def save(self, value: Any) -> tuple[str | None, int]:
        if value is None:
            return None, 0
        steps = self.sequence(value, "spec.save")
        if len(steps) != 1:
            raise self.fail("spec.save", f"{len(steps)} savers; one here, and --format a,b for several formats")
        item = self.mapping(steps[0], "spec.save.0", ("type", "part_file_size"))
        kind = self.word(item.get("type"), "spec.save.0.type", tuple(SAVERS))
        size = item.get("part_file_size", 0)
        if type(size) is not int or size < 0:
            raise self.fail("spec.save.0.part_file_size", f"{size!r}; a whole number of GB, 0 for one file")
        return SAVERS[kind], size

    def multimodal(self, value: Any) -> dict[str, Any]:
        path = "spec.multimodal_sd_config"
        item = self.optional(value, path, ("dump_config", "inference_config", "model_config"))
        if "inference_config" in item and "model_config" in item:
            raise self.fail(f"{path}.model_config", "given beside inference_config, its new name; keep one of them")
        dump = self.optional(item.get("dump_config"), f"{path}.dump_config",
                            ("enable_dump", "capture_mode", "dump_data_dir"))  # fmt: skip
        if dump.get("capture_mode", "args") != "args":
            raise self.fail(f"{path}.dump_config.capture_mode", f"{dump['capture_mode']!r}; only 'args' exists")
        if not isinstance(dump.get("enable_dump", True), bool):
            raise self.fail(f"{path}.dump_config.enable_dump", f"{dump['enable_dump']!r} is not True or False")
        if not isinstance(dump.get("dump_data_dir") or "", str):
            raise self.fail(f"{path}.dump_config.dump_data_dir", f"{dump['dump_data_dir']!r} is not a path")
        name = "inference_config" if "inference_config" in item else "model_config"
        config = self.optional(item.get(name), f"{path}.{name}", None)
        for key, given in config.items():
            if key not in MODEL_CONFIG_KEYS:
                close = nearest(key, tuple(MODEL_CONFIG_KEYS))
                self.warnings.append(f"{self.where}: {path}.{name}.{key}: streamq does not know this setting{close}")
            elif given is not None and (
                not isinstance(given, MODEL_CONFIG_KEYS[key])
                or (isinstance(given, bool) and bool not in MODEL_CONFIG_KEYS[key])
                or (isinstance(given, float) and not math.isfinite(given))
            ):
                raise self.fail(f"{path}.{name}.{key}", f"{given!r} is {kind_of(given)}, which this setting cannot be")
        return config


def _given(mapping: dict[str, Any], key: str, default: Any) -> Any:
    """msModelSlim writes `include: null` for its default."""
    return default if mapping.get(key) is None else mapping[key]
