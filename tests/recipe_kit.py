"""The seed recipe, ways to change it, and fixtures that plan or refuse the result. For `test_recipe*.py`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml
from conftest import Result, check_error, run, within, write_tiny

SEED = """
apiversion: multimodal_sd_modelslim_v1
spec:
  process:
    - type: "linear_quant"
      qconfig:
        act: {scope: "per_token", dtype: "int8", symmetric: True, method: "minmax"}
        weight: {scope: "per_channel", dtype: "int8", symmetric: True, method: "minmax"}
      include: ["*"]
      exclude: ["*ffn.2*"]
  save:
    - type: "mindie_format_saver"
      part_file_size: 0
  multimodal_sd_config:
    dump_config: {capture_mode: "args", dump_data_dir: ""}
    model_config:
      prompt: "A stylish woman walks down a Tokyo street filled with warm glowing neon and animated city signage."
      offload_model: True
      frame_num: 121
"""
STEP = "spec.process.0"
MODEL_CONFIG = "spec.multimodal_sd_config.model_config"
DUMP_CONFIG = "spec.multimodal_sd_config.dump_config"
WEIGHTS = "quant_model_weight_w8a8_dynamic.safetensors"
Plan: TypeAlias = "Callable[..., Result]"
Refused: TypeAlias = "Callable[..., None]"


class _Out:
    """What deletes a key, in `edited`."""

    def __repr__(self) -> str:
        return "OUT"


OUT = _Out()


def edited(*changes: tuple[str, Any]) -> str:
    """The seed recipe with values set at dotted paths; `OUT` takes a key away."""
    document = yaml.safe_load(SEED)
    for path, value in changes:
        *way, last = path.split(".")
        place: Any = document
        for key in way:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if value is OUT:
            del place[last]
        elif isinstance(place, list):
            place[int(last) : int(last) + 1] = [copy.deepcopy(value)]
        else:
            place[last] = copy.deepcopy(value)
    return yaml.safe_dump(document, sort_keys=False)


def step(include: list[str], method: str = "minmax", **more: Any) -> dict[str, Any]:
    """A w8a8 step."""
    act, weight = {"scope": "per_token"}, {"scope": "per_channel", "method": method}
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, "include": include} | more


def steps(*given: dict[str, Any]) -> str:
    """A recipe of these steps."""
    return edited(("spec.process", list(given)))


@pytest.fixture(name="model", scope="session")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of native T2V in fp32; nobody writes to it."""
    return write_tiny(tmp_path_factory.mktemp("recipes") / "model", "t2v-1.3B")


@pytest.fixture(name="plan")
def plan_fixture(model: Path, tmp_path: Path) -> Plan:
    """`plan(text or bytes, *options)` runs `streamq plan --json` with this recipe."""

    def call(text: str | bytes, *options: str, command: str = "plan") -> Result:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with within(6):
            return run(
                command, "--model_path", model, "--save_path", tmp_path / "out", "--config_path", path, "--json",
                "--device", "cpu", "--quiet", *options,
            )  # fmt: skip

    return call


@pytest.fixture(name="refused")
def refused_fixture(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """`refused(text, *says)`: `quant` exits 2 with this message, and has neither read a weight nor written anything."""

    def check(text: str | bytes, *says: str, options: tuple[str, ...] = ()) -> None:
        def never(*_: object) -> int:
            raise AssertionError("a weight was read")

        monkeypatch.setattr(os, "preadv", never)
        result = plan(text, *options, command="quant")
        assert result.returncode == 2, result.stderr
        check_error(result, *says)
        assert result.stdout == ""
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]

    return check
