"""The plan's hours: they follow what is done, and cost nothing to ask for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import yaml
from conftest import ROOT, run

from streamq import cost
from streamq.calibration import plan as calibrations
from streamq.methods import gptq, low_rank, svdquant


def planned(model: Path, recipe: str, tmp_path: Path, *more: object, **calibration: Any) -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    document["spec"]["calibration"] = {"num_samples": 2, "size": "128*128", "frame_num": 5} | calibration
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    done = run("plan", "--model_path", model, "--save_path", tmp_path / "out", "--config_path",
               tmp_path / "recipe.yaml", "--json", "--device", "cpu", *more)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.3B's width, four blocks, without data."""
    path = tmp_path_factory.mktemp("cost") / "model"
    synthetic.write(path, replace(synthetic.FAMILIES["t2v-1.3B"], blocks=4), sparse=True)
    return path


def test_what_does_more_takes_longer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "speed_of", lambda kind: cost.Speed(1e11, 1e8, True))
    seconds = {
        name: planned(model, name, tmp_path)["seconds"] for name in ("w8a8_static", "w4a16", "w4a4_fast", "w4a4")
    }
    assert 0 < seconds["w8a8_static"] < seconds["w4a4_fast"] < seconds["w4a4"] / 2
    longer = planned(model, "w4a4_fast", tmp_path, num_samples=64)["seconds"]
    assert longer > seconds["w4a4_fast"] * 1.2
    assert "seconds" not in json.loads(
        run("plan", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", "w8a8", "--json").stdout
    )


def test_the_speed_is_measured_on_a_cpu_alone() -> None:
    here, there = cost.speed_of("cpu"), cost.speed_of("cuda")
    assert here.measured and 1e8 < here.flops < 1e14 and 1e5 < here.weights < 1e12
    assert not there.measured


def test_work_is_linear() -> None:
    one = cost.Work(3e9, 2e6)
    assert (one + one).seconds(cost.Speed(1e9, 1e6, True)) == pytest.approx(2 * (3 / cost.THIN + 2))


def test_numbers_are_the_methods_own() -> None:
    """The plan may not import torch, so it has them a second time."""
    coarse = len(range(0, svdquant.STEPS, svdquant.COARSE)) * 2 + 2 * (svdquant.COARSE - 1)
    assert {"full": len(svdquant.CANDIDATES), "coarse": coarse} == cost.CANDIDATES
    assert low_rank.OVERSAMPLING == cost.SPARE and low_rank.WARM_ROUNDS + 1 == cost.WARM_ROUNDS
    assert (calibrations.CPU_TILE, calibrations.DEVICE_TILE) == (low_rank.CPU_TILE_BYTES, low_rank.DEVICE_TILE_BYTES)
    assert (calibrations.GPTQ_PART, calibrations.EXACT_SIDE) == (gptq.PART_BYTES, low_rank.EXACT_UP_TO)
