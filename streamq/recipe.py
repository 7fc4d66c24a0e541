"""Recipes: msModelSlim's YAML protocol, read strictly, and turned into a type for each layer.

A recipe is `apiversion: multimodal_sd_modelslim_v1` with `spec.process` (what to do to which layers), `spec.save` (the
format) and `spec.multimodal_sd_config` (calibration settings). Whatever is not understood is an error that names the
key's dotted path, because a key that is silently ignored is a model that is silently not quantized.

Knows names and patterns; opens no checkpoint and needs no torch. `overrides` in a `linear_quant` step is streamq's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bracex
import yaml
from wcmatch import fnmatch

from streamq.errors import UsageError, nearest

APIVERSION = "multimodal_sd_modelslim_v1"
MAX_RECIPE_BYTES = 1 << 20
MAX_RECIPE_NODES = 100_000
MAX_EXPANSIONS = 1000  # of the braces in one pattern
MAX_PATTERN_LENGTH, MAX_PATTERN_STARS = 200, 8  # msModelSlim's length; more stars only make matching slow

SAVERS = {"mindie_format_saver": "mindie", "lightx2v_format_saver": "lightx2v"}
PROCESS_KINDS = {
    "linear_quant": {"type", "qconfig", "include", "exclude", "overrides"},
}
LATER_KINDS = {
    "online_quarot": "needs the MXFP types, which this version does not write",
    "fa3_quant": "needs the MXFP types, which this version does not write",
    "iter_smooth": "needs calibration data, which this version does not make",
    "smooth_quant": "needs calibration data, which this version does not make",
}
QCONFIG_VALUES: dict[str, tuple[str, ...]] = {
    "act.scope": ("per_token", "per_tensor", "per_block", "per_group"),
    "act.dtype": ("int8", "mxfp8", "mxfp4", "float"),
    "act.method": ("minmax", "none"),
    "weight.scope": ("per_channel", "per_tensor", "per_block"),
    "weight.dtype": ("int8", "mxfp8", "mxfp4"),
    "weight.method": ("minmax", "mse", "mse_round", "ceil_x"),
}
_INTS = (
    "frame_num sample_steps base_seed cfg_size ulysses_size ring_size tp_size attentioncache_interval start_step"
    " end_step sparse_start_step"
)
_FLOATS = "sample_shift attentioncache_ratio sparsity"
_BOOLS = (
    "offload_model convert_model_dtype vae_parallel t5_fsdp t5_cpu dit_fsdp use_prompt_extend use_attentioncache"
    " use_rainfusion"
)
_TEXTS = (
    "prompt size task image sample_solver ckpt_dir save_file quant_dit_path prompt_extend_method prompt_extend_model"
    " prompt_extend_target_lang"
)
MODEL_CONFIG_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_INTS.split(), (int,)),
    **dict.fromkeys(_FLOATS.split(), (int, float)),
    **dict.fromkeys(_BOOLS.split(), (bool,)),
    **dict.fromkeys(_TEXTS.split(), (str,)),
    "sample_guide_scale": (int, float, list),
}


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
        blocks = self.weight.dtype.startswith("mx")
        if blocks != (self.weight.scope == "per_block"):
            return None
        return _TYPES.get((self.act.scope if self.act.dtype != "float" else "", self.act.dtype, self.weight.dtype))


_TYPES = {
    ("per_token", "int8", "int8"): "w8a8",
    ("per_tensor", "int8", "int8"): "w8a8_static",
    ("", "float", "int8"): "w8a16",
    ("per_block", "mxfp8", "mxfp8"): "w8a8_mxfp8",
    ("per_block", "mxfp4", "mxfp4"): "w4a4_mxfp4",
}


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
class Recipe:
    """A recipe, checked. `document` is what the manifest keeps: the YAML without keys that only carry anchors."""

    name: str
    process: tuple[LinearQuant, ...]
    format: str | None
    part_file_size: int
    model_config: dict[str, Any]
    document: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping (plain YAML keeps the last one silently)."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        checked = self.__dict__.setdefault("_checked", set())
        seen: set[str] = set()
        for key, _ in node.value if id(node) not in checked else ():  # flattening adds merged keys: look before it
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands twice in one mapping", key.start_mark
                    )
                seen.add(key.value)
        checked.add(id(node))
        super().flatten_mapping(node)
        # Later pairs win. Without this, merges of merges grow without bound.
        node.value = list(
            {k.value if isinstance(k, yaml.ScalarNode) else id(k): (k, v) for k, v in node.value}.values()
        )


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
        document = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        # The latter are what PyYAML itself raises for e.g. `!!timestamp soon` or `!!int ''`.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{where}: not a readable recipe: {reason}") from error
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
            raise self.fail(path, f"{_kind(value)} where a mapping belongs")
        names = None if known is None else sorted(known)
        for key in value:
            if not isinstance(key, str):
                raise self.fail(path, f"key {key!r} is {_kind(key)}, not text")
            if names is not None and key not in names:
                full = f"{path}.{key}" if path else key
                here = f"known here: {', '.join(names)}" if names else "none is known here"
                raise self.fail(full, f"unknown key{nearest(key, tuple(names))} ({here})")
        return value

    def optional(self, value: Any, path: str, known: Iterable[str] | None) -> dict[str, Any]:
        return {} if value is None else self.mapping(value, path, known)

    def sequence(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(path, f"{_kind(value)} where a list belongs")
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
                _regexes(pattern)
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
        known = ("process", "save", "dataset", "runner", "prior", "multimodal_sd_config")
        spec = self.mapping(top["spec"], "spec", known)
        if spec.get("prior"):
            raise self.fail("spec.prior", "prior stages are not supported; take them out")
        if not spec.get("process"):
            raise self.fail("spec.process", "no step at all: nothing would be quantized")
        steps = self.sequence(spec["process"], "spec.process")
        process = tuple(self.step(step, f"spec.process.{i}") for i, step in enumerate(steps))
        form, part_file_size = self.save(spec.get("save"))
        model_config = self.multimodal(spec.get("multimodal_sd_config"))
        kept: dict[str, Any] = {key: _plain(top[key]) for key in ("apiversion", "metadata", "spec") if key in top}
        return Recipe(name, process, form, part_file_size, model_config, kept, tuple(self.warnings))

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

    def step(self, value: Any, path: str) -> LinearQuant:
        if not isinstance(value, dict):
            raise self.fail(path, f"{_kind(value)} where a mapping with `type` belongs")
        kind = value.get("type")
        if isinstance(kind, str) and kind in LATER_KINDS:
            raise self.fail(f"{path}.type", f"{kind} {LATER_KINDS[kind]}; supported: {', '.join(PROCESS_KINDS)}")
        if not isinstance(kind, str) or kind not in PROCESS_KINDS:
            close = nearest(str(kind), tuple(PROCESS_KINDS))
            raise self.fail(f"{path}.type", f"unknown step {kind!r}; supported: {', '.join(PROCESS_KINDS)}{close}")
        self.mapping(value, path, PROCESS_KINDS[kind])
        pair = self.pair(value.get("qconfig"), f"{path}.qconfig", None)
        include = self.patterns(value.get("include", ["*"]), f"{path}.include")
        exclude = self.patterns(value.get("exclude", []), f"{path}.exclude")
        overrides = tuple(
            self.override(item, f"{path}.overrides.{i}", pair)
            for i, item in enumerate(self.sequence(value.get("overrides", []), f"{path}.overrides"))
        )
        return LinearQuant(pair, include, exclude, overrides, path)

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
            raise self.fail(
                path,
                f"activations {pair.act.dtype} {pair.act.scope} with weights {pair.weight.dtype} {pair.weight.scope}:"
                " no such type; int8 per_token with int8 per_channel is w8a8",
            )
        if pair.weight.dtype == "int8" and not pair.weight.symmetric:
            raise self.fail(f"{path}.weight.symmetric", "False; int8 weights are symmetric in every supported runtime")
        if pair.type == "w8a8" and not pair.act.symmetric:
            raise self.fail(f"{path}.act.symmetric", "False; per-token activations are symmetric in the runtimes")
        if pair.weight.dtype == "int8" and pair.weight.method not in ("minmax", "mse"):
            raise self.fail(f"{path}.weight.method", f"{pair.weight.method!r}; int8 weights have minmax, mse")
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
        ext = self.optional(given.get("ext"), f"{path}.ext", ())
        changes: dict[str, Any] = {k: given[k] for k in ("scope", "dtype", "symmetric", "method") if k in given}
        if "ext" in given:
            changes["ext"] = tuple(sorted(ext.items()))
        return replace(default, **changes)

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
                raise self.fail(f"{path}.{name}.{key}", f"{given!r} is {_kind(given)}, which this setting cannot be")
        return config


def _plain(value: Any) -> Any:
    """The same value as JSON has it: YAML also knows dates, sets and keys that are not text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, set):
        return sorted(str(item) for item in value)
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def matches(name: str, pattern: str) -> bool:
    """msModelSlim's rule: equal, or `wcmatch.fnmatch` with braces. `*` crosses dots, case matters, whole names only."""
    return name == pattern or any(regex.fullmatch(name) for regex in _regexes(pattern))


@lru_cache(maxsize=1000)
def _regexes(pattern: str) -> list[re.Pattern[str]]:
    expanded = bracex.expand(pattern, keep_escapes=True, limit=MAX_EXPANSIONS)
    return [re.compile(text) for text in fnmatch.translate(expanded, flags=fnmatch.CASE)[0]]


def resolve(recipe: Recipe, layers: Iterable[str]) -> tuple[dict[str, Pair | None], list[str]]:
    """Decide for every layer (native module name without `.weight`) what the recipe does to it; None leaves it float.

    The first step that takes a layer keeps it. Returns the decisions and warnings.
    Raises UsageError for an `include` that matches nothing and for a recipe that quantizes nothing.
    """
    names = list(layers)
    chosen: dict[str, Pair | None] = dict.fromkeys(names)
    warnings = list(recipe.warnings)
    taken: set[str] = set()
    for step in recipe.process:
        _check_includes(recipe, step.include, f"{step.path}.include", names)
        for i, pattern in enumerate(step.exclude):
            if not any(matches(name, pattern) for name in names):
                warnings.append(f"recipe {recipe.name}: {step.path}.exclude.{i}: {pattern!r} matches no layer")
        for override in step.overrides:
            _check_includes(recipe, override.include, f"{override.path}.include", names)
        for name in names:
            if name in taken or not any(matches(name, p) for p in step.include):
                continue
            if any(matches(name, p) for p in step.exclude):
                continue
            taken.add(name)
            chosen[name] = step.pair
            for override in step.overrides:
                if any(matches(name, p) for p in override.include):
                    chosen[name] = override.pair
    if not any(chosen.values()):
        raise UsageError(
            f"recipe {recipe.name}: spec.process: quantizes none of the {len(names)} linear layers; loosen include or"
            f" exclude (layers are named like {names[0]})"
        )
    return chosen, warnings


def _check_includes(recipe: Recipe, patterns: tuple[str, ...], path: str, names: list[str]) -> None:
    for i, pattern in enumerate(patterns):
        if pattern != "*" and not any(matches(name, pattern) for name in names):
            close = nearest(pattern, tuple(names)) or f"; layers are named like {names[0]}"
            raise UsageError(f"recipe {recipe.name}: {path}.{i}: {pattern!r} matches no linear layer{close}")


def library() -> dict[str, str]:
    """The shipped recipes: name -> YAML text."""
    # A folder of YAML alone is no package, and an editable install does not map it: it lies beside the savers.
    savers = find_spec("streamq.savers")
    assert savers is not None and savers.origin is not None
    folder = Path(savers.origin).parents[1] / "recipes"
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.yaml"))}


def recipe_for(quant_type: str, form: str | None) -> Recipe:
    """The library's recipe for a quantization type and a format (None: the type's first format), or one by its name.

    A library recipe says in `metadata` which `quant_type` it is and which `formats` it serves. Raises UsageError.
    """
    recipes = {name: parse_recipe(text, name, f"recipe {name}") for name, text in library().items()}
    served: dict[str, list[tuple[str, Recipe]]] = {}
    for recipe in recipes.values():
        about = recipe.document["metadata"]
        served.setdefault(about["quant_type"], []).extend((f, recipe) for f in about["formats"])
    if quant_type in served:
        rows = sorted(served[quant_type], key=lambda row: row[0] != row[1].format)
        for row_format, recipe in rows:
            if form in (None, row_format):
                return recipe
        formats = ", ".join(row_format for row_format, _ in rows)
        raise UsageError(f"--quant_type {quant_type} is not written in the format {form}; it is in: {formats}")
    if quant_type in recipes:
        return recipes[quant_type]
    known = tuple(served)
    raise UsageError(
        f"--quant_type {quant_type}: no such type here; have: {', '.join(known)}{nearest(quant_type, known)}"
    )
