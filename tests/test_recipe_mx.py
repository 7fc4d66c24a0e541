"""Recipes of the MX types, and of the types that MindIE has not: what is read, what each fault says, what to use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, check_error, run
from recipe_kit import (  # noqa: F401 - fixtures
    OUT,
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

from streamq.pairs import Pair
from streamq.recipe import LinearQuant, parse_recipe
from streamq.resolve import PEER_TYPES, recipe_for, resolve

QCONFIG = f"{STEP}.qconfig"


def mx(dtype: str, method: str = "minmax", include: tuple[str, ...] = ("*",), **ext: Any) -> dict[str, Any]:
    """A step of one of the MX types."""
    weight = {"scope": "per_block", "dtype": dtype, "symmetric": True, "method": method}
    qconfig = {
        "act": {"scope": "per_block", "dtype": dtype, "symmetric": True, "method": "minmax"},
        "weight": weight | ({"ext": ext} if ext else {}),
    }
    return {"type": "linear_quant", "qconfig": qconfig, "include": list(include)}


def pair_of(text: str) -> Pair:
    recipe = parse_recipe(text, "r", "r.yaml")
    (found,) = (one for one in recipe.process if isinstance(one, LinearQuant))
    return found.pair


SEARCH = {"enable_search": True, "search_min": 6, "search_max": 9.5, "search_step": 0.5}


@pytest.mark.parametrize(
    ("dtype", "method", "ext", "kept"),
    [
        ("mxfp8", "minmax", {}, {}),
        ("mxfp8", "minmax", {"axes": -1}, {}),
        ("mxfp8", "mse_round", {"axes": [-1]}, {}),
        ("mxfp4", "minmax", {}, {}),
        ("mxfp4", "ceil_x", {}, {}),
        ("mxfp4", "ceil_x", {"ceil_x_value": 6}, {"ceil_x_value": 6}),
        ("mxfp4", "ceil_x", {"ceil_x_value": 12.0, "axes": 1}, {"ceil_x_value": 12.0}),
        ("mxfp4", "ceil_x", {"enable_search": True}, {"enable_search": True}),
        ("mxfp4", "ceil_x", SEARCH, SEARCH),
        # msModelSlim takes these, and without the search they do nothing
        ("mxfp4", "ceil_x", {"search_min": 9, "search_max": 8}, {"search_min": 9, "search_max": 8}),
    ],
)
def test_what_an_mx_step_says(dtype: str, method: str, ext: dict[str, Any], kept: dict[str, Any]) -> None:
    pair = pair_of(steps(mx(dtype, method, **ext)))
    assert pair.type == {"mxfp8": "w8a8_mxfp8", "mxfp4": "w4a4_mxfp4"}[dtype]
    assert (pair.weight.method, dict(pair.weight.ext)) == (method, kept)
    assert hash(pair) == hash(pair_of(steps(mx(dtype, method, **ext))))


FAULTS: list[tuple[dict[str, Any], tuple[tuple[str, Any], ...], tuple[str, ...]]] = [
    (mx("mxfp8", "ceil_x"), (), (f"{QCONFIG}.weight.method: ", "ceil_x", "minmax, mse_round")),
    (mx("mxfp4", "mse_round"), (), (f"{QCONFIG}.weight.method: ", "mse_round", "minmax, ceil_x")),
    (mx("mxfp4", "gptq"), (), (f"{QCONFIG}.weight.method: ", "gptq", "ceil_x")),
    (mx("mxfp8"), ((f"{QCONFIG}.weight.symmetric", False),), (f"{QCONFIG}.weight.symmetric: ", "False")),
    (mx("mxfp8"), ((f"{QCONFIG}.act.symmetric", False),), (f"{QCONFIG}.act.symmetric: ", "False")),
    (mx("mxfp8"), ((f"{QCONFIG}.act.method", "mse"),), (f"{QCONFIG}.act.method: ", "mse", "minmax")),
    (mx("mxfp8", convrot=64), (), (f"{QCONFIG}.weight.ext.convrot: ", "int8")),
    (mx("mxfp8", "mse_round", ceil_x_value=7), (), (f"{QCONFIG}.weight.ext.ceil_x_value: ", "unknown key", "axes")),
    (mx("mxfp8", axes=0), (), (f"{QCONFIG}.weight.ext.axes: ", "0", "-1")),
    (mx("mxfp8", axes=True), (), (f"{QCONFIG}.weight.ext.axes: ", "True")),
    (mx("mxfp8", axes=[0, 1]), (), (f"{QCONFIG}.weight.ext.axes: ", "[0, 1]")),
    (mx("mxfp4", "ceil_x", ceil_x_value=5.9), (), (f"{QCONFIG}.weight.ext.ceil_x_value: ", "5.9", "6.0", "12.0")),
    (mx("mxfp4", "ceil_x", ceil_x_value="7"), (), (f"{QCONFIG}.weight.ext.ceil_x_value: ", "'7'")),
    (mx("mxfp4", "ceil_x", enable_search=1), (), (f"{QCONFIG}.weight.ext.enable_search: ", "1", "True or False")),
    (mx("mxfp4", "ceil_x", search_step=0), (), (f"{QCONFIG}.weight.ext.search_step: ", "0", "0.01")),
    (mx("mxfp4", "ceil_x", search_max=13), (), (f"{QCONFIG}.weight.ext.search_max: ", "13", "12.0")),
    (mx("mxfp4", "ceil_x", enable_search=True, search_min=8, search_max=8), (),
     (f"{QCONFIG}.weight.ext.search_max: ", "8", "search_min")),
    (mx("mxfp4", "ceil_x", serch_min=8), (), (f"{QCONFIG}.weight.ext.serch_min: ", "nearest", "search_min")),
    (mx("mxfp8"), ((f"{QCONFIG}.weight.scope", OUT),), (f"{QCONFIG}: ", "mxfp8 per_channel", "per_block on both")),
    (mx("mxfp4"), ((f"{QCONFIG}.act.scope", "per_token"),), (f"{QCONFIG}: ", "mxfp4 per_token", "per_block on both")),
]  # fmt: skip


@pytest.mark.parametrize(("given", "changes", "says"), FAULTS)
def test_what_an_mx_step_may_not_say(
    refused: Refused, given: dict[str, Any], changes: tuple[tuple[str, Any], ...], says: tuple[str, ...]
) -> None:
    refused(edited(("spec.process", [given]), *changes), *says)


def test_int8_has_no_axes(refused: Refused) -> None:
    refused(edited((f"{QCONFIG}.weight.ext", {"axes": -1})), f"{QCONFIG}.weight.ext.axes: ", "mxfp8 and mxfp4")


@pytest.mark.parametrize("form", ["lightx2v", "nunchaku"])
def test_mx_is_mindie_s(refused: Refused, form: str) -> None:
    refused(steps(mx("mxfp8")), "w8a8_mxfp8", form, "mindie", options=("--format", form))


def test_columns_that_are_no_whole_number_of_blocks(tmp_path: Path, model: Path) -> None:
    """The layer is named, and nothing is written."""
    import synthetic  # beside the tests

    odd = synthetic.replace(synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"]), ffn=136)
    synthetic.write(tmp_path / "model", odd)
    (tmp_path / "r.yaml").write_text(steps(mx("mxfp8")))
    given = ("quant", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--device", "cpu", "--quiet")
    result = run(*given, "--config_path", tmp_path / "r.yaml")
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    check_error(result, "blocks.0.ffn.2", "136", "w8a8_mxfp8", "32")
    (tmp_path / "r.yaml").write_text(edited(("spec.process", [mx("mxfp8") | {"exclude": ["*ffn.2"]}])))
    assert run("plan", *given[1:], "--config_path", tmp_path / "r.yaml").returncode == 0


def test_smoothing_before_mx_is_left_out_with_a_warning(plan: Plan) -> None:
    result = plan(steps({"type": "iter_smooth"}, mx("mxfp8")))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found["layers"].values()) == {"w8a8_mxfp8"}
    said = [text for text in found["warnings"] if "no place for a smoothing scale" in text]
    assert len(said) == 7 and any("ffn.2 (2 blocks); quantized without it" in text for text in said)


# --- the library ---

LAYERS = [
    f"blocks.{i}.{layer}"
    for i in range(40)
    for layer in (*(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"), "ffn.0", "ffn.2")
]


def test_w8a8_mxfp8_takes_every_layer() -> None:
    pairs, warnings = resolve(recipe_for("w8a8_mxfp8", None), LAYERS)
    assert {(pair.type, pair.weight.method) for pair in pairs.values() if pair} == {("w8a8_mxfp8", "mse_round")}
    assert all(pairs.values()) and warnings == []


def test_w4a4_mxfp4_leaves_five_blocks_to_mxfp8() -> None:
    pairs, warnings = resolve(recipe_for("w4a4_mxfp4", None), LAYERS)
    assert warnings == []
    for name, pair in pairs.items():
        assert pair is not None
        early = int(name.split(".")[1]) < 5
        assert pair.type == ("w8a8_mxfp8" if early else "w4a4_mxfp4"), name
        assert pair.weight.method == ("mse_round" if early else "ceil_x")
        assert dict(pair.weight.ext) == ({} if early else {"enable_search": True})


@pytest.mark.parametrize("kind", ["w8a8_mxfp8", "w4a4_mxfp4", "w8a8f8", "w4a4f8", "w4a4f4"])
def test_every_type_plans(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    result = run("plan", "--model_path", tiny("t2v-1.3B", blocks=6), "--save_path", tmp_path / "out", "--json",
                 "--quant_type", kind)  # fmt: skip
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["formats"] == ["mindie"]
    last = plan["layers"]["blocks.5.ffn.2"]
    assert last == ("w8a8_mxfp8" if kind.startswith("w8a8") else "w4a4_mxfp4")
    assert f"quant_model_weight_{last}.safetensors" in {file["path"] for file in plan["files"]}


@pytest.mark.parametrize("kind", ["w4a8", "w8a8s", "w16a16s", "w8a8c8", "w4a8c8", "w4a4c8"])
@pytest.mark.parametrize("form", [[], ["--format", "mindie"]], ids=["", "mindie"])
def test_a_type_of_msmodelslim_s_that_is_refused(model: Path, tmp_path: Path, kind: str, form: list[str]) -> None:
    result = run("quant", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", kind, *form)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    check_error(result, f"--quant_type {kind}", PEER_TYPES[kind], "w8a8|w4a4f8")


@pytest.mark.parametrize(
    ("kind", "others"), [("w4a4", "nunchaku"), ("w4a16", "nunchaku, gguf"), ("w8a16", "gguf"), ("fp8", "lightx2v")]
)
def test_a_type_that_mindie_has_not(model: Path, tmp_path: Path, kind: str, others: str) -> None:
    """Refused with the formats that have it, and with what MindIE has."""
    result = run("quant", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", kind,
                 "--format", "mindie")  # fmt: skip
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    check_error(result, f"--quant_type {kind}", "mindie", others, "mindie has: ", "w8a8_mxfp8", "w4a4_mxfp4")


@pytest.mark.parametrize(
    ("act", "weight", "says"),
    [
        (None, {"dtype": "int8", "scope": "per_channel"}, ("w8a16", "mindie has w8a8")),
        (None, {"dtype": "int4", "scope": "per_group", "symmetric": False}, ("w4a16", "nunchaku", "mindie has w8a8")),
        ({"dtype": "int4", "scope": "per_group"}, {"dtype": "int4", "scope": "per_group"}, ("w4a4", "nunchaku")),
    ],
    ids=["w8a16", "w4a16", "w4a4"],
)
def test_a_recipe_of_a_type_that_mindie_has_not(
    refused: Refused, act: dict[str, Any] | None, weight: dict[str, Any], says: tuple[str, ...]
) -> None:
    refused(edited((QCONFIG, {"act": act, "weight": weight})), *says)


def test_a_step_without_a_qconfig_is_refused_beside_an_mx_step(refused: Refused) -> None:
    refused(steps(mx("mxfp8"), step(["*"]) | {"qconfig": None}), "spec.process.1.qconfig: ", "missing")
