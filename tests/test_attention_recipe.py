"""`online_quarot` and `fa3_quant`: what the steps say, which attention modules they take, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, check_error, run
from recipe_kit import (  # noqa: F401 - fixtures
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

from streamq import resolve
from streamq.errors import UsageError
from streamq.recipe import AttentionStep, Recipe, parse_recipe
from streamq.savers import Attention

FP8 = {"dtype": "fp8_e4m3", "scope": "per_token", "symmetric": True, "method": "minmax"}
MXFP4 = {"dtype": "mxfp4", "scope": "per_block", "symmetric": True, "method": "minmax"}
MODULES = [f"blocks.{i}.{kind}_attn" for i in range(3) for kind in ("self", "cross")]
SELF, CROSS = MODULES[::2], MODULES[1::2]


def rotation(*include: str, **more: Any) -> dict[str, Any]:
    """An `online_quarot` step."""
    return {"type": "online_quarot"} | ({"include": list(include)} if include else {}) | more


def attention(*include: str, qconfig: dict[str, Any] = FP8, **more: Any) -> dict[str, Any]:
    """A `fa3_quant` step."""
    return {"type": "fa3_quant", "qconfig": qconfig} | ({"include": list(include)} if include else {}) | more


def recipe(*given: dict[str, Any]) -> Recipe:
    """Of these steps behind a linear_quant."""
    return parse_recipe(steps(step(["*"]), *given), "r", "r.yaml")


def resolved(*given: dict[str, Any]) -> dict[str, Attention]:
    """Module -> what these steps do to it."""
    return resolve.resolve_attention(recipe(*given), MODULES)


def test_what_the_steps_say() -> None:
    _, first, second, third = recipe(
        rotation("*.self_attn.*", exclude=["*.0.*"], block_size=-1),
        attention("*self_attn"),
        attention("*cross_attn", qconfig={"dtype": "mxfp4", "scope": "per_block"}, exclude=None),
    ).process
    assert first == AttentionStep("online_quarot", "", ("*.self_attn.*",), ("*.0.*",), "spec.process.1")
    assert second == AttentionStep("fa3_quant", "fp8_e4m3", ("*self_attn",), (), "spec.process.2")
    assert third == AttentionStep("fa3_quant", "mxfp4", ("*cross_attn",), (), "spec.process.3")


ROTATED, FP8_ROTATED, MXFP4_ROTATED = Attention("", True), Attention("fp8_e4m3", True), Attention("mxfp4", True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # left out, a pattern takes self-attention and cross-attention alike, as in msModelSlim
        ([rotation()], dict.fromkeys(MODULES, ROTATED)),
        ([rotation(include=None, exclude=None)], dict.fromkeys(MODULES, ROTATED)),
        ([attention(qconfig=MXFP4)], dict.fromkeys(MODULES, Attention("mxfp4"))),
        ([rotation("*.self_attn.*"), attention("*self_attn")], dict.fromkeys(SELF, FP8_ROTATED)),
        ([attention("*self_attn"), rotation("*.self_attn.*")], dict.fromkeys(SELF, FP8_ROTATED)),
        (
            [rotation("*.self_attn.*"), attention("*self_attn", exclude=["blocks.0*"])],
            {SELF[0]: ROTATED} | dict.fromkeys(SELF[1:], FP8_ROTATED),
        ),
        (
            [
                rotation("*.self_attn.*"),
                attention("*self_attn", qconfig=MXFP4, exclude=["blocks.0*"]),
                attention("blocks.0.self_attn"),
            ],
            {SELF[0]: FP8_ROTATED} | dict.fromkeys(SELF[1:], MXFP4_ROTATED),
        ),
        ([rotation("blocks.1.self_attn.{q,k}_rot"), attention("blocks.1.self_attn")], {SELF[1]: FP8_ROTATED}),
        # two steps may rotate one module, and q by one of them and k by the other
        ([rotation("*.self_attn.q_rot"), rotation("*.self_attn.k_rot")], dict.fromkeys(SELF, ROTATED)),
        ([rotation("*"), rotation("*.cross_attn.*")], dict.fromkeys(MODULES, ROTATED)),
        ([], {}),
    ],
)
def test_which_modules_are_taken(given: list[dict[str, Any]], expected: dict[str, Attention]) -> None:
    found = resolved(*given)
    assert found == expected
    assert list(found) == [module for module in MODULES if module in expected]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([attention("*self_atn")], ("spec.process.1.include.0", "'*self_atn'", "attention module")),
        ([attention("*", "*.self_attn.*")], ("spec.process.1.include.1", "'*.self_attn.*'")),
        ([rotation("*self_attn")], ("spec.process.1.include.0", "'*self_attn'", "q_rot")),
        ([attention(exclude=["*"])], ("spec.process.1", "none of the 6", "blocks.0.self_attn")),
        ([rotation(include=[])], ("spec.process.1", "none of the 6", "q_rot")),
        ([attention(), attention("blocks.1.self_attn")], ("spec.process.2", "blocks.1.self_attn", "spec.process.1")),
        (
            [attention("*self_attn"), attention("blocks.0*", qconfig=MXFP4)],
            ("spec.process.2", "blocks.0.self_attn", "spec.process.1", "exclude"),
        ),
        ([rotation("*.q_rot")], ("online_quarot", "blocks.0.self_attn.q_rot", "q and k")),
        ([rotation(exclude=["blocks.2.cross_attn.q_rot"])], ("blocks.2.cross_attn.k_rot", "q and k")),
    ],
)
def test_what_does_not_resolve(given: list[dict[str, Any]], says: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as error:
        resolved(*given)
    for text in says:
        assert text in str(error.value)


def test_an_exclude_that_matches_no_module_is_a_warning() -> None:
    layers = [f"{module}.q" for module in MODULES]
    given = recipe(rotation(exclude=["*self_attn"]), attention(exclude=["*.self_attn.q_rot", "*cross_attn"]))
    _, warnings = resolve.resolve(given, layers)
    assert [text.split(": ")[1] for text in warnings] == ["spec.process.1.exclude.0", "spec.process.2.exclude.0"]


FA3 = f"{STEP}.qconfig"
WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (rotation(block_size=32), (f"{STEP}.block_size: ", "32", "-1")),
    (rotation(block_size=-1.0), (f"{STEP}.block_size: ", "-1.0")),
    (rotation(seed=1), (f"{STEP}.seed: ", "unknown key")),
    (rotation(include="*"), (f"{STEP}.include: ", "list")),
    (rotation(qconfig=FP8), (f"{STEP}.qconfig: ", "unknown key", "exclude")),
    ({"type": "fa3_quant"}, (f"{FA3}: ", "missing", "fp8_e4m3", "mxfp4")),
    ({"type": "fa3_quant", "details": {"fa_q": FP8}}, (f"{STEP}.details: ", "unknown key", "qconfig")),
    (attention(qconfig=["x"]), (f"{FA3}: ", "list", "mapping")),  # type: ignore[arg-type]
    (attention(qconfig={}), (f"{FA3}.dtype: ", "None", "fp8_e4m3")),
    (attention(qconfig={"dtype": "int8", "scope": "per_head"}), (f"{FA3}.dtype: ", "'int8'", "fp8_e4m3, mxfp4")),
    (attention(qconfig=FP8 | {"dtype": "fp8_e4m"}), (f"{FA3}.dtype: ", "nearest", "fp8_e4m3")),
    (attention(qconfig=FP8 | {"scope": "per_block"}), (f"{FA3}.scope: ", "'per_block'", "per_token")),
    (attention(qconfig=MXFP4 | {"scope": "per_token"}), (f"{FA3}.scope: ", "'per_token'", "per_block")),
    (attention(qconfig={"dtype": "mxfp4"}), (f"{FA3}.scope: ", "None", "per_block")),
    (attention(qconfig=FP8 | {"symmetric": False}), (f"{FA3}.symmetric: ", "False")),
    (attention(qconfig=FP8 | {"method": "mse"}), (f"{FA3}.method: ", "'mse'", "minmax")),
    (attention(qconfig=FP8 | {"symetric": True}), (f"{FA3}.symetric: ", "unknown key", "symmetric")),
    (attention(include=[3]), (f"{STEP}.include.0: ", "3")),
]


@pytest.mark.parametrize(("given", "says"), WRONG)
def test_a_step_that_is_not_read(refused: Refused, given: dict[str, Any], says: tuple[str, ...]) -> None:
    refused(steps(given, step(["*"])), *says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([attention("*self_attn")], ("blocks.0.self_attn", "fp8_e4m3", "q_rot", "online_quarot")),
        ([rotation("*self_attn.*"), attention()], ("blocks.0.cross_attn", "online_quarot")),
        ([attention("blocks.7.self_attn")], ("spec.process.1.include.0", "blocks.7.self_attn")),
        ([attention(), attention()], ("spec.process.2", "blocks.0.self_attn")),
    ],
    ids=["no rotation", "too few rotations", "no such module", "twice"],
)
def test_a_step_that_does_not_fit_the_model(
    refused: Refused, given: list[dict[str, Any]], says: tuple[str, ...]
) -> None:
    refused(steps(step(["*"]), *given), *says)


def test_attention_alone_quantizes_no_layer(refused: Refused) -> None:
    refused(steps(rotation(), attention()), "spec.process", "no linear_quant")


@pytest.mark.parametrize("given", [rotation(), attention(qconfig=MXFP4)], ids=["online_quarot", "fa3_quant"])
def test_other_formats_have_nothing_like_it(refused: Refused, given: dict[str, Any]) -> None:
    text = steps(given, step(["*"]))
    refused(text, STEP, str(given["type"]), "lightx2v", "mindie", options=("--format", "lightx2v"))


def test_heads_that_no_hadamard_matrix_has(tmp_path: Path, model: Path) -> None:
    import synthetic  # beside the tests

    odd = synthetic.replace(synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"]), dim=96)
    synthetic.write(tmp_path / "model", odd)
    (tmp_path / "r.yaml").write_text(steps(step(["*"]), rotation()))
    result = run("quant", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--config_path",
                 tmp_path / "r.yaml", "--device", "cpu", "--quiet")  # fmt: skip
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    check_error(result, "blocks.0.self_attn", "48", "power of two")


def test_rotations_that_nothing_uses_are_a_warning(plan: Plan) -> None:
    result = plan(steps(step(["*"]), rotation()), command="quant")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: ") and "online_quarot without fa3_quant" in line


# --- recipes with every key that msModelSlim's own for Wan2.2 have ---

SHIPPED = """
apiversion: multimodal_sd_modelslim_v1
metadata:
  config_id: some_w4a4f4
  score: 90
  verified_tags:
    Wan2.2-T2V-A14B:
      - - MindIE-SD
        - Ascend_950
  label: {w_bit: 4, a_bit: 4, is_sparse: False, fa_quant: True, fa_bit: 4}

early: &early ["*blocks.0.*", "*blocks.1.*"]
mxfp4: &mxfp4
  act: {scope: "per_block", dtype: "mxfp4", symmetric: True, method: "minmax"}
  weight:
    scope: "per_block"
    dtype: "mxfp4"
    symmetric: True
    method: "ceil_x"
    ext: {
      enable_search: True
    }
mxfp8: &mxfp8
  act: {scope: "per_block", dtype: "mxfp8", symmetric: True, method: "minmax"}
  weight: {scope: "per_block", dtype: "mxfp8", symmetric: True, method: "mse_round"}
fp8_attention: &fp8 {dtype: "fp8_e4m3", scope: "per_token", symmetric: True, method: "minmax"}

spec:
  process:
    - {type: "linear_quant", qconfig: *mxfp4, include: ["*"], exclude: *early}
    - {type: "linear_quant", qconfig: *mxfp8, include: *early}
    - type: "online_quarot"
      include: ["*.self_attn.*"]
    - type: "fa3_quant"
      qconfig: {dtype: "mxfp4", scope: "per_block", symmetric: True, method: "minmax"}
      include: ["*self_attn"]
      exclude: ["blocks.0*"]
    - type: "fa3_quant"
      qconfig: *fp8
      include: ["blocks.0.self_attn"]
  dataset: wan2_2_t2v
  save:
    - type: "mindie_format_saver"
      part_file_size: 0
  multimodal_sd_config:
    dump_config: {enable_dump: False, capture_mode: "args", dump_data_dir: ""}
    inference_config:
      size: "1280*720"
      frame_num: 81
      sample_steps: 40
      convert_model_dtype: True
      task: "t2v-A14B"
"""


def test_a_recipe_with_every_key_of_theirs_runs(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SHIPPED)
    source = tiny("t2v-A14B", blocks=3)
    out = tmp_path / "out"
    result = run("quant", "--model_path", source, "--save_path", out, "--config_path", tmp_path / "r.yaml",
                 "--model_type", "Wan2.2-T2V-A14B", "--device", "cpu", "--quiet")  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    for expert in ("high_noise_model", "low_noise_model"):
        description = json.loads((out / expert / "quant_model_description_w4a4_mxfp4.json").read_text())
        assert description["model_quant_type"] == "W4A4_MXFP4"
        marks = {name: kind for name, kind in description.items() if name.endswith(".quant_type")}
        assert marks == {
            "blocks.0.self_attn.quant_type": "FP8_DYNAMIC",
            "blocks.1.self_attn.quant_type": "MXFP4_DYNAMIC",
            "blocks.2.self_attn.quant_type": "MXFP4_DYNAMIC",
        }
        for i in range(3):
            assert description[f"blocks.{i}.ffn.2.weight"] == ("W8A8_MXFP8" if i < 2 else "W4A4_MXFP4")
            assert {description[f"blocks.{i}.self_attn.{leaf}"] for leaf in ("q_rot", "k_rot")} == {"FLOAT"}
            assert f"blocks.{i}.cross_attn.q_rot" not in description
    checked = run("verify", out, "--source", source)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("kind", "marks"),
    [
        ("w8a8f8", {0: Attention(), 1: Attention("fp8_e4m3", True), 39: Attention("fp8_e4m3", True)}),
        ("w4a4f8", {0: Attention("", True), 1: Attention("fp8_e4m3", True), 39: Attention("fp8_e4m3", True)}),
        ("w4a4f4", {0: Attention("fp8_e4m3", True), 1: Attention("mxfp4", True), 39: Attention("mxfp4", True)}),
    ],
)
def test_the_library_s(kind: str, marks: dict[int, Attention]) -> None:
    modules = [f"blocks.{i}.{which}_attn" for i in range(40) for which in ("self", "cross")]
    found = resolve.resolve_attention(resolve.recipe_for(kind, "mindie"), modules)
    assert not any("cross" in module for module in found)
    for block, mark in marks.items():
        assert found.get(f"blocks.{block}.self_attn", Attention()) == mark
    linear = resolve.recipe_for({"w8a8f8": "w8a8_mxfp8"}.get(kind, "w4a4_mxfp4"), "mindie")
    layers = [f"{module}.{part}" for module in modules for part in "qkvo"]
    assert resolve.resolve(resolve.recipe_for(kind, "mindie"), layers) == resolve.resolve(linear, layers)
