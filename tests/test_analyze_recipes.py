"""The recipe that `streamq analyze` recommends: against every other, and what quant makes of it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import replay_kit
import torch
from analyze_kit import ROWS, SIZE, analyze, calib, every_row, inputs_fixture, model_fixture, rows_of  # noqa: F401
from conftest import check_error, run

from streamq.analysis import recipes
from streamq.calibration import plan as calibrations
from streamq.resolve import recipe_for

TYPES = ("--quant_type", "w8a16,w4a16", "--format", "gguf")


@pytest.fixture(autouse=True)
def quick(every_row: None, one_core: None) -> None:  # noqa: F811
    """In every test."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two types of gguf, one block's layers of each: 3^10 recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda _: {0})
        patch.setattr(calibrations, "ROWS", ROWS)
        small = tmp_path_factory.mktemp("one")
        _, folder = replay_kit.make(small, 8, torch.float32, ("", "transformer"), num_layers=1, **SIZE)
        inputs = calib(folder, small / "set")
        analyze(folder, inputs, small / "out", *TYPES)
        return small, rows_of(small / "out" / "layers.csv")


def again(small: Path, *more: object) -> dict[str, Any]:
    """The same analysis under a budget."""
    return analyze(small / "diffusers/transformer", small / "set", small / "out", *TYPES, *more)


def choices(rows: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    """(squared error, bytes) of each layer's options, float first."""
    by_layer: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_layer[row["layer"]].append(row)
    return [
        [(0.0, float(mine[0]["float_bytes"])), *((float(r["output_rel_error"]) ** 2, float(r["bytes"])) for r in mine)]
        for mine in by_layer.values()
    ]


def every(options: list[list[tuple[float, float]]]) -> torch.Tensor:
    """[n, 2] fp64: sums of error and bytes of every recipe."""
    sums = torch.zeros(1, 2, dtype=torch.float64)
    for part in options:
        sums = (sums[:, None] + torch.tensor(part, dtype=torch.float64)[None]).reshape(-1, 2)
    return sums


@pytest.mark.parametrize("share", [0.35, 0.8])
def test_least_error_within_bytes(mixed: tuple[Path, list[dict[str, Any]]], share: float, tmp_path: Path) -> None:
    small, rows = mixed
    sums = every(choices(rows))
    largest, smallest = float(sums[:, 1].max()), float(sums[:, 1].min())
    # What the files have besides the layers: from a first look at a recipe.
    probe = again(small, "--max_error", 1e9)["recipe"]
    beside = probe["bytes"] - smallest
    limit = int(beside + smallest + share * (largest - smallest))
    found = again(small, "--max_size", limit)["recipe"]
    assert found["bytes"] <= limit
    by_name = {(row["layer"], row["type"]): row for row in rows}
    stay = {row["layer"]: float(row["float_bytes"]) for row in rows}
    mine = [by_name.get((layer, kind)) for layer, kind in found["layers"].items()]
    mine_bytes = sum(float(r["bytes"]) if r else stay[n] for r, n in zip(mine, found["layers"], strict=True))
    own = found["bytes"] - mine_bytes
    within = sums[sums[:, 1] <= limit - own]
    assert found["error"] == pytest.approx(math.sqrt(float(within[:, 0].min()) / 10), rel=1e-6)
    planned = run("plan", "--model_path", small / "diffusers/transformer", "--save_path", tmp_path / "no",
                  "--config_path", small / "out/recipe.yaml", "--device", "cpu", "--json")  # fmt: skip
    assert json.loads(planned.stdout)["bytes_to_write"] == found["bytes"]


def test_least_bytes_within_error(mixed: tuple[Path, list[dict[str, Any]]]) -> None:
    small, rows = mixed
    sums = every(choices(rows))
    most = math.sqrt(float(sums[:, 0].max()) / 10) * 0.6
    found = again(small, "--max_error", most)["recipe"]
    assert found["error"] <= most
    least = float(sums[sums[:, 0] <= most**2 * 10][:, 1].min())
    by_name = {(row["layer"], row["type"]): float(row["bytes"]) for row in rows}
    stay = {row["layer"]: float(row["float_bytes"]) for row in rows}
    assert sum(by_name.get((n, kind), stay[n]) for n, kind in found["layers"].items()) == least


def test_recipe_goes_through_quant(model: Path, inputs: Path, tmp_path: Path) -> None:
    """Smoothed layers, and layers of one group, get what was measured; the files have the bytes that were said."""
    out = tmp_path / "out"
    types = ("--quant_type", "w8a8_smooth", "--quant_type", "w8a8_static", "--format", "mindie")
    figures = analyze(model, inputs, out, *types, "--max_size", 420_000)
    found = figures["recipe"]
    assert set(found["layers"].values()) - {"float"}, found
    made = run("quant", "--model_path", model, "--save_path", tmp_path / "q", "--config_path", out / "recipe.yaml",
               "--calib", inputs, "--device", "cpu", "--json", "--quiet")  # fmt: skip
    assert made.returncode == 0, made.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "q").rglob("*") if path.name != "streamq.json")
    assert size == found["bytes"] <= 420_000
    manifest = json.loads((tmp_path / "q/streamq.json").read_text())
    assert not any("smoothing is not what was measured" in note for note in figures["notes"])
    layers = manifest["formats"]["mindie"]["layers"]
    measured = {(row["layer"], row["type"]): row for row in rows_of(out / "layers.csv")}
    for layer, kind in found["layers"].items():
        if kind == "float":
            continue
        assert layers[layer]["output_rel_error"] == pytest.approx(
            float(measured[layer, kind]["output_rel_error"]), rel=1e-4
        )


def test_one_scheme_for_all_in_lightx2v(model: Path, inputs: Path, tmp_path: Path) -> None:
    """LightX2V can have neither two types nor float layers: the better type, for all."""
    types = ("--quant_type", "w8a8,fp8", "--format", "lightx2v", "--max_error", 0.9)
    found = analyze(model, inputs, tmp_path / "out", *types)["recipe"]
    assert len(set(found["layers"].values())) == 1


def test_default_formats_are_those_of_quant() -> None:
    for kind, forms in recipes.served().items():
        assert forms[0] == (recipe_for(kind, None).format or forms[0]), kind


def test_the_float_model_is_small_enough(mixed: tuple[Path, list[dict[str, Any]]]) -> None:
    small, _ = mixed
    found = again(small, "--max_size", "1GB")
    assert found["recipe"] is None and any("float model is within" in note for note in found["notes"])


def test_an_error_that_cannot_be_met(mixed: tuple[Path, list[dict[str, Any]]]) -> None:
    small, _ = mixed
    ended = run("analyze", "--model_path", small / "diffusers/transformer", "--save_path", small / "out", "--calib",
                small / "set", "--device", "cpu", *TYPES, "--max_error", 1e-9)  # fmt: skip
    check_error(ended, "no mixture of w8a16, w4a16")
    assert ended.returncode == 1 and (small / "out/layers.csv").exists() and not (small / "out/recipe.yaml").exists()
