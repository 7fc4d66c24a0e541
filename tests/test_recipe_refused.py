"""Recipes that are refused: exit 2, one line with the key's dotted path, no weight read and nothing written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run, within, write_tiny
from recipe_kit import (  # noqa: F401 - fixtures
    DUMP_CONFIG,
    MODEL_CONFIG,
    OUT,
    SEED,
    STEP,
    Plan,
    Refused,
    edited,
    model_fixture,
    plan_fixture,
    refused_fixture,
    step,
    steps,
)

OVERRIDE = {"include": ["*.q"], "qconfig": {"weight": {"method": "mse"}}}
QCONFIG = f"{STEP}.qconfig"
SAVE = "spec.save.0"
MODE = "spec.multimodal_sd_config"

UNKNOWN_KEYS = [
    ("spec.proces", "process"),
    (f"{STEP}.excludes", "exclude"),
    (f"{STEP}.includ", "include"),
    (f"{QCONFIG}.weigth", "weight"),
    (f"{QCONFIG}.act.symetric", "symmetric"),
    (f"{QCONFIG}.weight.dtyp", "dtype"),
    (f"{QCONFIG}.weight.ext.ceil_x_value", "ext"),
    (f"{SAVE}.part_filesize", "part_file_size"),
    (f"{MODE}.dump_cfg", "dump_config"),
    (f"{DUMP_CONFIG}.capture_mod", "capture_mode"),
]


@pytest.mark.parametrize("path, near", UNKNOWN_KEYS, ids=[path for path, _ in UNKNOWN_KEYS])
def test_an_unknown_key(refused: Refused, path: str, near: str) -> None:
    refused(edited((path, "x")), f"{path}: ", "unknown key", near)


@pytest.mark.parametrize(
    "inner, near", [("includes", "include"), ("qconfig.weights", "weight"), ("qconfig.act.scop", "scope")]
)
def test_an_unknown_key_in_an_override(refused: Refused, inner: str, near: str) -> None:
    path = f"{STEP}.overrides.1"
    text = edited((f"{STEP}.overrides", [OVERRIDE, copy.deepcopy(OVERRIDE)]), (f"{path}.{inner}", "x"))
    refused(text, f"{path}.{inner}: ", "unknown key", near)


def test_the_second_step_is_number_1(refused: Refused) -> None:
    refused(steps(step(["*"]), step(["*"], excldue=[])), "spec.process.1.excldue: ", "exclude")


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("spec:", "spec: {}\nspec:", "spec"),
        ("  save:", "  save: []\n  save:", "save"),
        ('      include: ["*"]', '      include: ["*"]\n      include: ["*"]', "include"),
        ('scope: "per_token"', 'scope: "per_token", "scope": "per_token"', "scope"),
        ("frame_num: 121", "frame_num: 121\n      frame_num: 121", "frame_num"),
        ("spec:", "x: {a: 1, a: 2}\nspec:", "a"),
        ("spec:", "metadata: {label: {w_bit: 8, w_bit: 8}}\nspec:", "w_bit"),
        ("spec:", "x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}\nspec:", "b"),
    ],
)
def test_a_key_twice(refused: Refused, old: str, new: str, key: str) -> None:
    refused(SEED.replace(old, new), f"'{key}'", "twice", "line")


WRONG_VALUES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("apiversion", OUT, ("multimodal_sd_modelslim_v1",)),
    ("apiversion", "modelslim_v1", ("modelslim_v1", "multimodal_sd_modelslim_v1")),
    ("apiversion", ["multimodal_sd_modelslim_v1"], ("multimodal_sd_modelslim_v1",)),
    ("metadata", ["x"], ("list",)),
    ("spec", OUT, ("missing",)),
    ("spec", ["x"], ("list", "mapping")),
    ("spec", None, ("mapping",)),
    ("spec.process", OUT, ("nothing would be quantized",)),
    ("spec.process", [], ("nothing would be quantized",)),
    ("spec.process", {"type": "linear_quant"}, ("mapping", "list")),
    ("spec.process", "linear_quant", ("text", "list")),
    (STEP, "linear_quant", ("text", "mapping")),
    ("spec.prior", [{"type": "x"}], ("prior",)),
    (f"{STEP}.include", "*", ("text", "list")),
    (f"{STEP}.include", None, ("nothing", "list")),
    (f"{STEP}.include", {"a": "*"}, ("mapping", "list")),
    (f"{STEP}.include.0", 3, ("3",)),
    (f"{STEP}.include.0", "", ("''",)),
    (f"{STEP}.include.0", None, ("None",)),
    (f"{STEP}.exclude", "*ffn.2*", ("text", "list")),
    (f"{STEP}.exclude.0", ["*"], ("['*']",)),
    (f"{STEP}.overrides", {"include": ["*"]}, ("mapping", "list")),
    (f"{STEP}.overrides", [{"include": ["*"]}], ("qconfig", "missing")),
    (f"{STEP}.overrides", [{"qconfig": None}], ("include", "missing")),
    (f"{STEP}.overrides", [{"include": ["*.to_q"], "qconfig": None}], (f"{STEP}.overrides.0.include.0", "*.to_q")),
    (QCONFIG, OUT, ("missing",)),
    (QCONFIG, ["x"], ("list", "mapping")),
    (f"{QCONFIG}.weight", OUT, ("missing",)),
    (f"{QCONFIG}.weight", "int8", ("text", "mapping")),
    (f"{QCONFIG}.act", ["int8"], ("list", "mapping")),
    (f"{QCONFIG}.act.scope", "per_tokn", ("'per_tokn'", "nearest", "per_token")),
    (f"{QCONFIG}.act.scope", 3, ("3", "per_token")),
    (f"{QCONFIG}.act.scope", ["per_token"], ("per_token",)),
    (f"{QCONFIG}.act.dtype", "int3", ("'int3'", "int8")),
    (f"{QCONFIG}.act.symmetric", "yes", ("'yes'", "True or False")),
    (f"{QCONFIG}.act.symmetric", 1, ("1", "True or False")),
    (f"{QCONFIG}.act.symmetric", False, ("False",)),
    (f"{QCONFIG}.weight.symmetric", False, ("False",)),
    (f"{QCONFIG}.weight.scope", "per_token", ("'per_token'", "per_channel")),
    (f"{QCONFIG}.weight.dtype", True, ("True", "int8")),
    (f"{QCONFIG}.weight.method", "minmix", ("'minmix'", "minmax")),
    (f"{QCONFIG}.weight.method", "ceil_x", ("ceil_x", "minmax")),
    (f"{QCONFIG}.weight.ext", ["x"], ("list", "mapping")),
    ("spec.save", {"type": "mindie_format_saver"}, ("mapping", "list")),
    ("spec.save", [{"type": "mindie_format_saver"}] * 2, ("2 savers", "--format")),
    ("spec.save", [], ("saver",)),
    (SAVE, "mindie_format_saver", ("text", "mapping")),
    (f"{SAVE}.type", "mindy_format_saver", ("mindy_format_saver", "mindie_format_saver")),
    (f"{SAVE}.type", OUT, ("mindie_format_saver",)),
    (f"{SAVE}.part_file_size", -1, ("-1",)),
    (f"{SAVE}.part_file_size", 1.5, ("1.5",)),
    (f"{SAVE}.part_file_size", 4.0, ("4.0",)),
    (f"{SAVE}.part_file_size", "4", ("'4'",)),
    (f"{SAVE}.part_file_size", True, ("True",)),
    (f"{SAVE}.part_file_size", float("inf"), ("inf",)),
    (MODE, ["x"], ("list", "mapping")),
    (MODE, [], ("list", "mapping")),
    (DUMP_CONFIG, ["x"], ("list", "mapping")),
    (DUMP_CONFIG, 0, ("int", "mapping")),
    (f"{DUMP_CONFIG}.capture_mode", "kwargs", ("'kwargs'", "args")),
    (f"{DUMP_CONFIG}.enable_dump", "no", ("'no'",)),
    (f"{DUMP_CONFIG}.dump_data_dir", 3, ("3",)),
    (MODEL_CONFIG, "x", ("text", "mapping")),
    (MODEL_CONFIG, [], ("list", "mapping")),
    (f"{MODEL_CONFIG}.frame_num", "121", ("'121'",)),
    (f"{MODEL_CONFIG}.frame_num", 1.5, ("1.5",)),
    (f"{MODEL_CONFIG}.frame_num", True, ("True",)),
    (f"{MODEL_CONFIG}.offload_model", 1, ("1",)),
    (f"{MODEL_CONFIG}.offload_model", "True", ("'True'",)),
    (f"{MODEL_CONFIG}.prompt", 3, ("3",)),
    (f"{MODEL_CONFIG}.size", [832, 480], ("[832, 480]",)),
    (f"{MODEL_CONFIG}.sample_shift", float("nan"), ("nan",)),
    (f"{MODEL_CONFIG}.sample_guide_scale", "high", ("'high'",)),
]  # fmt: skip


@pytest.mark.parametrize(
    "path, value, says", WRONG_VALUES, ids=[f"{path}={value!r}" for path, value, _ in WRONG_VALUES]
)
def test_a_wrong_value(refused: Refused, path: str, value: Any, says: tuple[str, ...]) -> None:
    refused(edited((path, value)), path, *says)


PEER_S = [
    "awq", "flex_smooth_quant", "flex_awq_ssz", "quarot", "svd_res", "flatquant", "autoround_quant", "kv_smooth",
    "float_sparse", "adapt_rotation", "group", "module_func",
]  # fmt: skip


@pytest.mark.parametrize("kind", PEER_S)
def test_a_step_of_the_peer_s_that_streamq_lacks(refused: Refused, kind: str) -> None:
    refused(steps({"type": kind, "include": ["*"]}, step(["*"])), f"{STEP}.type", kind, "linear_quant")


@pytest.mark.parametrize(
    "kind", ["linear_quan", "", None, 3, True, ["linear_quant"], {"linear_quant": 1}, OUT], ids=repr
)
def test_an_unknown_step(refused: Refused, kind: Any) -> None:
    refused(edited((f"{STEP}.type", kind)), f"{STEP}.type", "linear_quant")


@pytest.mark.parametrize("form", ["mindie", "lightx2v"])
@pytest.mark.parametrize("act", [OUT, None], ids=["omitted", "null"])
def test_weights_alone_are_no_type_of_these_formats(refused: Refused, act: Any, form: str) -> None:
    text = edited((f"{QCONFIG}.act", act), (f"{STEP}.exclude", []))
    refused(text, "w8a16", form, "w8a8", options=("--format", form))


@pytest.mark.parametrize(
    "act, weight, says",
    [
        ({"scope": "per_token"}, {"dtype": "mxfp8", "scope": "per_block"}, (QCONFIG, "mxfp8")),
        ({"scope": "per_block", "dtype": "mxfp8"}, {}, (QCONFIG, "mxfp8")),
        ({"scope": "per_token"}, {"scope": "per_block"}, (QCONFIG, "per_block")),
        ({"scope": "per_tensor"}, {"dtype": "mxfp4", "scope": "per_block"}, (QCONFIG, "mxfp4")),
        ({"scope": "per_block", "dtype": "mxfp8"}, {"scope": "per_block", "dtype": "mxfp4"}, (QCONFIG, "w8a8_mxfp8")),
        ({"scope": "per_token"}, {"dtype": "int4"}, (QCONFIG, "w4a8", "w4a4_mxfp4")),
        ({"scope": "per_token"}, {"scope": "per_group"}, (QCONFIG, "per_group", "w8a8")),
        ({"dtype": "int4", "scope": "per_token"}, {"dtype": "int4"}, (QCONFIG, "int4", "w4a4_mxfp4")),
        ({"dtype": "float"}, {"dtype": "int4"}, (QCONFIG, "int4", "nunchaku", "gguf")),
    ],
)
def test_a_pair_that_no_runtime_here_has(
    refused: Refused, act: dict[str, str], weight: dict[str, str], says: tuple[str, ...]
) -> None:
    refused(edited((QCONFIG, {"act": act, "weight": weight})), *says)


# --- files that are no recipe, or meant to hurt ---

LAUGHS = "l0: &l0 [lol]\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "m0: &m0 {k0: v}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], k{i}: v}}\n" for i in range(1, 12)
)
TAGS = [
    '!!python/object/apply:os.system ["touch {pwned}"]',
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{pwned}']]",
    '!!python/object/new:os.system ["touch {pwned}"]',
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1]",
    "!custom x",
    "!!timestamp soon",
    "!!bool perhaps",
    "!!int ''",
    "!!float ''",
    "!!int x",
    "!!omap x",
]
HOSTILE: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("empty file", b"", ("mapping",)),
    ("only a comment", "# nothing\n", ("mapping",)),
    ("a list", "- spec\n", ("list", "mapping")),
    ("a word", "spec", ("text", "mapping")),
    ("two documents", SEED + "---\n" + SEED, ("document",)),
    ("not YAML", "spec: [", ("not a readable recipe", "line")),
    ("tabs", "spec:\n\tprocess: 1\n", ("not a readable recipe", "line")),
    ("unknown anchor", "spec: *nowhere\n", ("nowhere",)),
    ("not UTF-8", SEED.encode().replace(b"Tokyo", b"T\xf4kyo"), ("UTF-8", "byte")),
    ("UTF-16", SEED.encode("utf-16"), ("UTF-8",)),
    ("control characters", SEED.encode().replace(b"Tokyo", b"\0\1"), ("not a readable recipe",)),
    ("over 1 MiB", SEED + "#" * (1 << 20), (str(len(SEED) + (1 << 20)), "1048576")),
    ("a date that is none", SEED + "metadata: {day: 2024-13-45}\n", ("not a readable recipe",)),
    ("a key that is a list", SEED + "metadata: {? [a] : b}\n", ("not a readable recipe",)),
    ("laughs in metadata", LAUGHS + SEED + "metadata: {x: *l11}\n", ("100000 values",)),
    ("laughs in the step", LAUGHS + SEED.replace('include: ["*"]', "include: *l11"), ("100000 values",)),
    ("laughs in a prompt", LAUGHS + SEED.replace("frame_num: 121", "prompts: *l11"), ("100000 values",)),
    ("metadata within itself", SEED + "metadata: &m {x: *m}\n", ("100000 values",)),
    ("spec within itself", "apiversion: multimodal_sd_modelslim_v1\nspec: &s {process: [*s]}\n", ("100000 values",)),
    ("list within itself", SEED.replace('include: ["*"]', "include: &i [*i]"), ("100000 values",)),
    ("brackets", "x: " + "[" * 50_000, ("not a readable recipe",)),
    ("braces", "x: " + "{a: " * 50_000, ("not a readable recipe",)),
    ("dashes", "- " * 50_000, ("not a readable recipe",)),
]
PATTERNS = [
    ("{0..999999}", "1000"),
    ("{a,b}" * 12, "1000"),
    ("blocks.{0..1000}", "1000"),
    ("{0..40}{0..40}", "1000"),
    ("x" * 201, "200"),
    ("*a" * 9, "8"),
]


@pytest.mark.parametrize("text, says", [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_file_that_is_no_recipe(refused: Refused, text: str | bytes, says: tuple[str, ...]) -> None:
    refused(text, "recipe.yaml", *says)


def test_merged_laughs_end_at_once(plan: Plan) -> None:
    """9^11 merges of eleven keys: refused, or understood for what they are, but not carried out one by one."""
    result = plan(MERGES + SEED + "metadata: {x: {<<: *m11}}\n")
    assert result.returncode in (0, 2)
    assert "bug in streamq" not in result.stderr


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", ["metadata", "x-anchors", f"{MODEL_CONFIG}.prompt"])
def test_a_tag_makes_nothing(refused: Refused, tmp_path: Path, tag: str, place: str) -> None:
    text = edited((place, "TAG")).replace("TAG", tag.format(pwned=tmp_path / "pwned"))
    refused(text, "recipe.yaml", "not a readable recipe")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize("pattern, limit", PATTERNS, ids=[pattern[:30] for pattern, _ in PATTERNS])
def test_a_pattern_that_stands_for_too_much(refused: Refused, pattern: str, limit: str, key: str) -> None:
    refused(edited((f"{STEP}.{key}", ["*.q", pattern])), f"{STEP}.{key}.1", limit)


QUICK = [
    "*a*a*a*a*a*a*a*b",
    "{" * 190,
    "[" * 200,
    "{0..99}{0..9}",
    "{0..99999999999999999999999}",
    "{{{{a,x},c},d},e}*",
]


@pytest.mark.parametrize("pattern", QUICK, ids=[pattern[:30] for pattern in QUICK])
def test_a_pattern_within_the_limits_is_matched_in_no_time(tmp_path: Path, pattern: str) -> None:
    """At the 400 layers of a 14B model; it matches none of them."""
    model = write_tiny(tmp_path / "model", "t2v-14B", blocks=40, sparse=True)
    (tmp_path / "recipe.yaml").write_text(edited((f"{STEP}.exclude", [pattern])))
    with within(6):
        result = run("plan", "--model_path", model, "--save_path", tmp_path / "out", "--json",
                     "--config_path", tmp_path / "recipe.yaml")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)["layers"].values()) == {"w8a8"}
    assert "matches no layer" in result.stdout
