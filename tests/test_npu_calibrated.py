"""Calibrated runs with `--device npu`, on the stand-in for torch_npu: the same calls, and what the CPU makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import synthetic
import yaml
from conftest import ROOT, run

FAMILIES = ("i2v-14B", "vace-1.3B", "ti2v-5B", "t2v-A14B")
RECIPES = ("w8a8_static", "w8a8_smooth", "w8a8_smooth_all", "w8a8_gptq")
CHILD = """
import json, sys
import npu_standin
npu_standin.install()
from streamq import cli
for argv in json.load(sys.stdin):
    npu_standin.reset()
    code = cli.main(argv)
    print(json.dumps([code, npu_standin.counts.hazards, npu_standin.counts.to_device_bytes]), flush=True)
"""


def recipe(name: str, folder: Path) -> Path:
    """A library recipe with few and small samples."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    document["spec"]["calibration"] = {"num_samples": 3, "time_bins": 2, "size": "64*64", "frame_num": 5}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return folder / f"{name}.yaml"


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer -> its row of the report."""
    (made,) = json.loads((folder / "streamq.json").read_text())["formats"].values()
    return made["layers"]


def test_what_is_made_is_what_the_cpu_makes(tmp_path: Path) -> None:
    """Every family whose blocks are fed otherwise, every kind of method; layers are read ahead meanwhile.

    Attention goes through other kernels, so ranges and scales may differ in their last digits, and codes with them.
    """
    jobs: dict[str, dict[str, list[str]]] = {"cpu": {}, "npu": {}}
    for family, name in zip(FAMILIES, RECIPES, strict=True):
        synthetic.write(tmp_path / family, synthetic.tiny(synthetic.FAMILIES[family], 2))
        for device, theirs in jobs.items():
            theirs[family] = ["quant", "--model_path", str(tmp_path / family), "--device", device, "--quiet",
                              "--save_path", str(tmp_path / device / family),
                              "--config_path", str(recipe(name, tmp_path))]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(list(jobs["npu"].values())), text=True,
        capture_output=True, timeout=300, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(outcomes) == len(FAMILIES), done.stderr
    for family, (code, hazards, crossed) in zip(FAMILIES, outcomes, strict=True):
        assert code == 0 and not hazards and crossed > 0, (family, hazards, done.stderr)
        made = run(*jobs["cpu"][family])
        assert made.returncode == 0, made.stderr
        mine, theirs_too = figures(tmp_path / "npu" / family), figures(tmp_path / "cpu" / family)
        assert mine.keys() == theirs_too.keys()
        for layer, row in mine.items():
            assert row["type"] == theirs_too[layer]["type"]
            for key in ("rel_error", "output_rel_error") if "output_rel_error" in row else ():
                assert row[key] == pytest.approx(theirs_too[layer][key], rel=0.1), (family, layer, key)
        checked = run("verify", tmp_path / "npu" / family, "--source", tmp_path / family)
        assert checked.returncode == 0, checked.stdout
