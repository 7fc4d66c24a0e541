"""Recipes: the seed runs as it is, patterns mean what they mean in msModelSlim, steps and overrides take their layers.

The contract is `spec/mindie.md` section 7. What is refused is in `test_recipe_refused.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, run, run_process, write_tiny
from damage import load
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_kit import (  # noqa: F401 - fixtures
    DUMP_CONFIG,
    MODEL_CONFIG,
    OUT,
    SEED,
    STEP,
    WEIGHTS,
    Plan,
    Refused,
    edited,
    model_fixture,
    plan_fixture,
    refused_fixture,
    step,
    steps,
)
from wcmatch import fnmatch

from streamq import patterns


def layers(result: Result) -> dict[str, str]:
    """Layer -> type, of a plan that was made."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["layers"]


def taken(result: Result) -> set[str]:
    """The layers that are quantized."""
    return {name for name, kind in layers(result).items() if kind != "float"}


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The tensors of a run with this recipe, by name; a recipe runs once a session."""
    folder = tmp_path_factory.mktemp("made")
    known: dict[str, dict[str, Any]] = {}

    def make(text: str) -> dict[str, Any]:
        if text not in known:
            path, out = folder / f"{len(known)}.yaml", folder / str(len(known))
            path.write_text(text)
            result = run("quant", "--model_path", model, "--save_path", out, "--config_path", path, "--quiet")
            assert (result.returncode, result.stderr) == (0, "")
            known[text] = load(out / WEIGHTS)
        return known[text]

    return make


# --- the seed, and what else must run ---


def test_the_seed_recipe_runs_as_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "seed.yaml").write_text(SEED)
    out, library = tmp_path / "out", tmp_path / "library"
    common = ("quant", "--model_path", model, "--model_type", "Wan2_1", "--quiet", "--save_path")
    result = run(*common, out, "--config_path", tmp_path / "seed.yaml")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert {path.name for path in out.iterdir()} == {
        WEIGHTS, "quant_model_description_w8a8_dynamic.json", "config.json", "streamq.json", "README.md",
    }  # fmt: skip
    description = json.loads((out / "quant_model_description_w8a8_dynamic.json").read_text())
    kinds = {name: kind for name, kind in description.items() if name.endswith(".weight") and ".ffn." in name}
    assert kinds == {
        "blocks.0.ffn.0.weight": "W8A8_DYNAMIC", "blocks.0.ffn.2.weight": "FLOAT",
        "blocks.1.ffn.0.weight": "W8A8_DYNAMIC", "blocks.1.ffn.2.weight": "FLOAT",
    }  # fmt: skip
    checked = run("verify", out, "--source", model, "--json")
    report = json.loads(checked.stdout)
    assert (checked.returncode, report["problems"], len(report["layers"])) == (0, [], 18)
    assert run(*common, library, "--quant_type", "w8a8").returncode == 0
    assert (library / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


def test_known_calibration_settings_are_no_warning(plan: Plan) -> None:
    settings_ = {"task": "t2v-14B", "size": "832*480", "sample_steps": 40, "base_seed": 42, "sample_shift": 5,
                 "sample_guide_scale": [3.0, 4.0], "convert_model_dtype": False, "image": None}  # fmt: skip
    result = plan(edited(*((f"{MODEL_CONFIG}.{key}", value) for key, value in settings_.items())), command="quant")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "change",
    [
        ("spec.dataset", "calib.jsonl"),
        ("spec.runner", {"type": "layer_wise"}),
        ("spec.prior", []),
        ("metadata", {"config_id": "x", "score": 90.5, "label": {"w_bit": 8}, "anything": [1]}),
        ("default_w8a8", {"not": "a recipe"}),
        ("spec.multimodal_sd_config", OUT),
        ("spec.multimodal_sd_config", None),
        ("spec.save", OUT),
        ("spec.save.0.part_file_size", OUT),
        (f"{DUMP_CONFIG}.enable_dump", True),
        (MODEL_CONFIG, OUT),
        (f"{STEP}.include", OUT),
        (f"{STEP}.qconfig.weight", {}),
        (f"{STEP}.qconfig.act", {"scope": "per_token"}),
    ],
    ids=lambda change: f"{change[0]}={change[1]!r}",
)
def test_what_the_protocol_allows_changes_nothing(plan: Plan, change: tuple[str, Any]) -> None:
    result = plan(edited(change))
    assert result.stderr == ""
    assert layers(result) == layers(plan(SEED))


def test_inference_config_is_the_new_name_of_model_config(plan: Plan, refused: Refused) -> None:
    path = "spec.multimodal_sd_config"
    good = edited((MODEL_CONFIG, OUT), (f"{path}.inference_config", {"frame_num": 81}))
    assert len(taken(plan(good))) == 18
    refused(edited((f"{path}.inference_config", {"frame_num": 81})), f"{path}.model_config", "inference_config")


def test_a_byte_order_mark_and_windows_lines(plan: Plan) -> None:
    assert len(taken(plan(b"\xef\xbb\xbf" + SEED.replace("\n", "\r\n").encode()))) == 18


@pytest.mark.parametrize("name", ["w8a8", "w8a8_all"])
def test_a_printed_recipe_is_the_library_s(plan: Plan, model: Path, tmp_path: Path, name: str) -> None:
    printed = run("recipes", name)
    assert printed.returncode == 0
    library = run("plan", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", name, "--json")
    assert layers(plan(printed.stdout)) == layers(library)
    assert name in json.loads(run("recipes", "--json").stdout)


@pytest.mark.parametrize(
    "given_, formats",
    [
        ([("spec.save", OUT)], ["mindie"]),
        ([("spec.save", [{"type": "lightx2v_format_saver"}]), (f"{STEP}.exclude", OUT)], ["lightx2v"]),
    ],
)
def test_the_saver_says_the_format(plan: Plan, given_: list[tuple[str, Any]], formats: list[str]) -> None:
    assert json.loads(plan(edited(*given_)).stdout)["formats"] == formats


def test_the_option_beats_the_saver(plan: Plan) -> None:
    result = plan(edited((f"{STEP}.exclude", OUT)), "--format", "lightx2v")
    assert json.loads(result.stdout)["formats"] == ["lightx2v"]


ANCHORS = """
apiversion: multimodal_sd_modelslim_v1
x-base: &base {dtype: int8, symmetric: True, method: minmax}
x-act: &act
  <<: *base
  scope: per_token
x-weight: &weight
  <<: *base
  scope: per_tensor
x-step: &step {type: linear_quant, exclude: ["*ffn.2*"]}
spec:
  process:
    - <<: *step
      qconfig: {act: *act, weight: {<<: *weight, scope: per_channel}}
"""


@pytest.mark.parametrize(
    "text",
    [
        ANCHORS,
        ANCHORS.replace("{<<: *weight, scope: per_channel}", "{<<: [{scope: per_channel}, *weight]}"),
        ANCHORS.replace("x-act: &act\n  <<: *base", "x-act: &act\n  <<: *base\n  method: minmax").replace(
            "act: *act", "act: {<<: *act}"
        ),
    ],
    ids=["merge", "merge of two", "merge of a merge that overrides"],
)
def test_anchors_at_other_keys(plan: Plan, text: str) -> None:
    """YAML's own rules: a key beside `<<` beats the merged one, and of several merged mappings the first wins."""
    assert layers(plan(text)) == layers(plan(SEED))


def test_the_manifest_holds_strict_json_whatever_the_metadata(plan: Plan, tmp_path: Path) -> None:
    def never(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = SEED + "metadata: {score: .nan, best: .inf, date: 2024-01-02, raw: !!binary aGk=, tags: !!set {a}}\n"
    assert plan(text, command="quant").returncode == 0
    manifest = json.loads((tmp_path / "out" / "streamq.json").read_text(), parse_constant=never)
    assert manifest["formats"]["mindie"]["recipe"]["metadata"]["date"] == "2024-01-02"


def test_the_plan_of_a_recipe_is_the_same_in_every_process(model: Path, tmp_path: Path) -> None:
    """Or an interrupted run could not be resumed."""
    path = tmp_path / "recipe.yaml"
    path.write_text(SEED + "metadata: {verified_tags: !!set {alpha, beta, gamma, delta, epsilon}}\n")
    plans = [
        run_process("plan", "--model_path", model, "--save_path", tmp_path / "out", "--config_path", path, "--json",
                    env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]  # fmt: skip
    assert [result.returncode for result in plans] == [0, 0]
    assert json.loads(plans[0].stdout)["hash"] == json.loads(plans[1].stdout)["hash"]


# --- patterns ---

NAMES = [
    f"{block}.{layer}"
    for block in ("blocks.0", "blocks.1", "blocks.10", "blocks.21", "xblocks.0", "vace_blocks.1")
    for layer in ("self_attn.q", "self_attn.k", "self_attn.o", "cross_attn.k_img", "ffn.0", "ffn.2", "before_proj")
]
PATTERNS = [
    "*", "**", "?*", "*ffn.2*", "*ffn.2", "ffn.2", "*.ffn.?", "blocks.0*", "blocks.?.ffn.0", "blocks.??.ffn.0",
    "blocks.1*", "blocks.1.*", "*.self_attn.[qk]", "*.self_attn.[!o]", "*.self_attn.[^o]", "*.self_attn.[a-o]",
    "*.ffn.{0,2}", "blocks.{0..4}.ffn.0", "blocks.{0,1}.{self_attn.{q,k},ffn.*}", "{blocks,vace_blocks}.1.*",
    "blocks.{01..03}.*", "blocks.{0..20..10}.ffn.0", "BLOCKS.0.*", "Blocks.0.ffn.0", "*.FFN.0", "blocks.0.ffn.0",
    "blocks.0.ffn", "blocks", "*img", "*_attn*", "*self_attn.q*", "*{q,k}", "[b]locks.0*", "[[]*", "[]b]*", "[b", "{b",
    "{}", "{,x}blocks.0.ffn.0", "blocks.{0}.ffn.0", r"blocks\.0.*", r"\*", "!blocks.0*", "-*", "*|ffn", "@(blocks*)",
    "~", "blocks/0/*", ".*", "*.", " *", "[[:digit:]]*", "*[[:digit:]]", "*.[0-2]",
]  # fmt: skip


def reference(name: str, pattern: str) -> bool:
    """msModelSlim's rule, by its own library."""
    return name == pattern or fnmatch.fnmatch(name, pattern, flags=fnmatch.BRACE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_as_in_msmodelslim(pattern: str) -> None:
    assert [n for n in NAMES if patterns.matches(n, pattern)] == [n for n in NAMES if reference(n, pattern)]


def test_the_patterns_of_the_table_tell_names_apart() -> None:
    """Most of them match some names and not others, or the comparison above would compare nothing."""
    partial = [p for p in PATTERNS if 0 < sum(patterns.matches(name, p) for name in NAMES) < len(NAMES)]
    assert len(partial) > 25


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.text("abB.01*?[]!-{},\\", max_size=10), st.text("abB.01[]{}*\\", min_size=1, max_size=6))
def test_any_pattern_matches_as_in_msmodelslim(pattern: str, name: str) -> None:
    assert patterns.matches(name, pattern) == reference(name, pattern)
    assert patterns.matches(pattern, pattern)


BOTH = {f"blocks.{block}." for block in (0, 1)}
SIX = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2"}


@pytest.mark.parametrize(
    "include, exclude, expected",
    [
        (["*.self_attn.[qk]"], [], {f"{b}self_attn.{x}" for b in BOTH for x in "qk"}),
        (["blocks.{0..1}.ffn.{0,2}"], [], {f"{b}ffn.{x}" for b in BOTH for x in "02"}),
        (["blocks.0*"], ["*cross*"], {f"blocks.0.{layer}" for layer in SIX}),
        (["*"], ["*cross*", "blocks.[!0]*"], {f"blocks.0.{layer}" for layer in SIX}),
        (["blocks.1.ffn.0"], [], {"blocks.1.ffn.0"}),
        (["*.self_attn.[!o]"], ["*.[qk]"], {f"{b}self_attn.v" for b in BOTH}),
        (["*ffn.0", "*ffn.2"], ["blocks.0.ffn.2"], {"blocks.0.ffn.0", "blocks.1.ffn.0", "blocks.1.ffn.2"}),
    ],
)
def test_include_and_exclude(plan: Plan, include: list[str], exclude: list[str], expected: set[str]) -> None:
    result = plan(steps(step(include, exclude=exclude)))
    assert taken(result) == expected
    assert len(layers(result)) == 20


def test_native_names_are_matched_whatever_the_layout(model: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "diffusers", "t2v-1.3B", layout="diffusers")
    (tmp_path / "recipe.yaml").write_text(steps(step(["*.self_attn.q"])))
    result = run("plan", "--model_path", other, "--save_path", tmp_path / "out", "--json",
                 "--config_path", tmp_path / "recipe.yaml")  # fmt: skip
    assert taken(result) == {f"{block}self_attn.q" for block in BOTH}


def test_an_exclude_that_matches_nothing_is_a_warning(plan: Plan) -> None:
    result = plan(edited((f"{STEP}.exclude", ["*ffn.2*", "*k_img*"])), command="quant")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: ") and f"{STEP}.exclude.1" in line and "*k_img*" in line


@pytest.mark.parametrize(
    "include, says",
    [
        (["*", "*.attn1.to_q"], (f"{STEP}.include.1", "*.attn1.to_q")),
        (["blocks.0.self_atn.q"], (f"{STEP}.include.0", "blocks.0.self_atn.q", "blocks.0.self_attn.q")),
        (["BLOCKS.*"], (f"{STEP}.include.0", "BLOCKS.*", "blocks.0.")),
        (["blocks.0"], (f"{STEP}.include.0",)),
        (["blocks.7.*"], (f"{STEP}.include.0", "blocks.7.*")),
        (["patch_embedding"], (f"{STEP}.include.0", "patch_embedding")),
        (["blocks.0.modulation"], (f"{STEP}.include.0", "blocks.0.modulation")),
    ],
)
def test_an_include_that_matches_nothing_is_refused(
    refused: Refused, include: list[str], says: tuple[str, ...]
) -> None:
    refused(steps(step(include)), *says)


@pytest.mark.parametrize(
    "text",
    [
        steps(step([])),
        steps(step(["*"], exclude=["*"])),
        steps(step(["*ffn.2*"], exclude=["*ffn*"])),
        steps(step(["*"], overrides=[{"include": ["*"], "qconfig": None}])),
    ],
    ids=["no include", "everything excluded", "all included excluded", "all overridden"],
)
def test_a_recipe_that_quantizes_nothing_is_refused(refused: Refused, text: str) -> None:
    refused(text, "spec.process", "none of the 20")


# --- steps and overrides: told apart by what they write ---

MINMAX, MSE = steps(step(["*"])), steps(step(["*"], "mse"))
QUERIES = ("blocks.0.self_attn.q", "blocks.1.self_attn.q")
TO_MSE = {"include": ["*.self_attn.q"], "qconfig": {"weight": {"method": "mse"}}}
TO_FLOAT = {"include": ["*.self_attn.[qo]"], "qconfig": None}


@pytest.mark.parametrize(
    "text, mse, floats",
    [
        (steps(step(["*.self_attn.q"], "mse"), step(["*"])), QUERIES, ()),
        (steps(step(["*"]), step(["*.self_attn.q"], "mse")), (), ()),
        (steps(step(["*.self_attn.q"], "mse"), step(["*.self_attn.q"]), step(["*"])), QUERIES, ()),
        (steps(step(["*"], "mse", exclude=["*.self_attn.[!q]", "*cross*", "*ffn*"]), step(["*"])), QUERIES, ()),
        (steps(step(["*"], overrides=[TO_MSE])), QUERIES, ()),
        (steps(step(["*"], overrides=[TO_MSE, TO_FLOAT])), (), ("q", "o")),
        (steps(step(["*"], overrides=[TO_FLOAT, TO_MSE])), QUERIES, ("o",)),
        (steps(step(["*"], overrides=[TO_FLOAT]), step(["*"], "mse")), (), ("q", "o")),
    ],
    ids=["first wins", "second is late", "third too", "excluded goes on to the next", "override", "last override wins",
         "the other way round", "overridden to float is taken"],
)  # fmt: skip
def test_which_step_a_layer_goes_by(
    made: Callable[[str], dict[str, Any]], text: str, mse: tuple[str, ...], floats: tuple[str, ...]
) -> None:
    result, minmax, least = made(text), made(MINMAX), made(MSE)
    assert all(minmax[f"{name}.weight"] != least[f"{name}.weight"] for name in QUERIES)
    names = [name.removesuffix(".weight_scale") for name in minmax if name.endswith(".weight_scale")]
    assert len(names) == 20
    for name in names:
        if name.rpartition(".")[2] in floats and "self_attn" in name:
            assert result[f"{name}.weight"][0] == "F32" and f"{name}.weight_scale" not in result
        else:
            expected = least if name in mse else minmax
            assert result[f"{name}.weight"] == expected[f"{name}.weight"], name
            assert result[f"{name}.weight_scale"] == expected[f"{name}.weight_scale"], name


# --- methods and scopes of weights ---


@pytest.fixture(scope="session")
def weights(model: Path) -> dict[str, np.ndarray]:
    """The float weights of the source's linear layers."""
    found = load(next(model.glob("*.safetensors")))
    return {name: floats(value) for name, value in found.items() if len(value[1]) == 2 and name.startswith("blocks")}


def floats(value: tuple[str, list[int], bytes]) -> np.ndarray:
    """An F32 or I8 tensor as float64."""
    return np.frombuffer(value[2], {"F32": np.float32, "I8": np.int8}[value[0]]).reshape(value[1]).astype(np.float64)


def decoded(tensors: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a layer's weight."""
    return floats(tensors[name]), floats(tensors[name.replace(".weight", ".weight_scale")])


def test_mse_is_never_worse_than_minmax_in_any_row(
    made: Callable[[str], dict[str, Any]], weights: dict[str, np.ndarray]
) -> None:
    better = rows = 0
    for name, weight in weights.items():
        lost = []
        for text in (MINMAX, MSE):
            codes, scales = decoded(made(text), name)
            assert np.abs(codes).max() <= 128
            lost.append(((codes * scales - weight) ** 2).sum(axis=1))
        assert (lost[1] <= lost[0] * (1 + 1e-5)).all(), name
        better += int((lost[1] < lost[0] * 0.999).sum())
        rows += len(weight)
    assert better > rows / 4, "clipping helps many rows of Gaussian weights"


def test_minmax_is_one_scale_a_row(made: Callable[[str], dict[str, Any]], weights: dict[str, np.ndarray]) -> None:
    for name, weight in weights.items():
        codes, scales = decoded(made(MINMAX), name)
        expected = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
        assert np.array_equal(scales, expected.astype(np.float64))
        assert np.array_equal(codes, np.rint(weight.astype(np.float32) / expected).astype(np.float64))


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_per_tensor_weights_have_one_scale(
    made: Callable[[str], dict[str, Any]], weights: dict[str, np.ndarray], method: str
) -> None:
    made_ = made(edited((f"{STEP}.qconfig.weight", {"scope": "per_tensor", "method": method}), (f"{STEP}.exclude", [])))
    for name, weight in weights.items():
        codes, scales = decoded(made_, name)
        assert scales.shape == (len(weight), 1)
        assert len(np.unique(scales)) == 1, f"{name}: {len(np.unique(scales))} scales"
        amax = np.float32(np.abs(weight).max() / 127)
        assert np.isclose(scales[0, 0], amax, rtol=1e-6) if method == "minmax" else scales[0, 0] <= amax * 1.000001
        assert np.array_equal(codes, np.clip(np.rint(np.float32(weight) / np.float32(scales)), -128, 127))


@pytest.mark.parametrize("size, count", [(0, 1), (1, 1)])
def test_part_file_size(plan: Plan, tmp_path: Path, size: int, count: int) -> None:
    """0 is the one file; anything above is msModelSlim's sharded form, with a warning."""
    result = plan(edited(("spec.save.0.part_file_size", size)), command="quant")
    assert result.returncode == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ([WEIGHTS] if size == 0 else ["quant_model_weight-00001-of-00001.safetensors"])
    assert (tmp_path / "out" / "quant_model_weight.safetensors.index.json").exists() == (size > 0)
    assert result.stderr.count("warning: ") == (size > 0)


def test_an_unknown_calibration_setting_is_a_warning(plan: Plan, tmp_path: Path) -> None:
    result = plan(edited((f"{MODEL_CONFIG}.fram_num", 81)), command="quant")
    assert result.returncode == 0 and (tmp_path / "out" / "streamq.json").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: ") and f"{MODEL_CONFIG}.fram_num" in line and "frame_num" in line
