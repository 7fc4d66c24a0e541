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
from nunchaku_runs import one_thread, source

RECIPES = {
    "w8a8_static": "i2v-14B", "w8a8_smooth": "vace-1.3B", "w8a8_smooth_all": "ti2v-5B", "w8a8_gptq": "t2v-A14B",
    "w4a4_gptq": "i2v-14B", "w4a4_nvfp4": "t2v-1.3B", "w4a16": "t2v-1.3B",
}  # fmt: skip
CHILD = """
import json, os, sys
os.sched_getaffinity = lambda _: {0}  # threads that wait for a busy core make small tensors slow
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
    for step in document["spec"]["process"] if name.startswith("w4a4") else ():
        if step["type"] == "smooth_quant":
            step |= {"method": "smoothquant", "alpha": 0.5}
            del step["grid"]
        else:
            step["qconfig"]["weight"]["ext"]["rounds"] = 2
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return folder / f"{name}.yaml"


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer -> its row of the report."""
    (made,) = json.loads((folder / "streamq.json").read_text())["formats"].values()
    return made["layers"]


@pytest.mark.slow
def test_what_is_made_is_what_the_cpu_makes(tmp_path: Path) -> None:
    """Every family whose blocks are fed otherwise, every kind of method; layers are read ahead meanwhile.

    Attention goes through other kernels, so ranges and scales may differ in their last digits, and codes with them.
    """
    jobs: dict[str, dict[str, list[str]]] = {"cpu": {}, "npu": {}}
    for name, family in RECIPES.items():
        if name.startswith("w4"):
            source(tmp_path / "models" / name, family, blocks=1)
        else:
            synthetic.write(tmp_path / "models" / name, synthetic.tiny(synthetic.FAMILIES[family], 2))
        for device, theirs in jobs.items():
            theirs[name] = ["quant", "--model_path", str(tmp_path / "models" / name), "--device", device, "--quiet",
                            "--save_path", str(tmp_path / device / name),
                            "--config_path", str(recipe(name, tmp_path))]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(list(jobs["npu"].values())), text=True,
        capture_output=True, timeout=300, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(outcomes) == len(RECIPES), done.stderr
    for name, (code, hazards, crossed) in zip(RECIPES, outcomes, strict=True):
        assert code == 0 and not hazards and crossed > 0, (name, hazards, done.stderr)
        with one_thread():
            made = run(*jobs["cpu"][name])
        assert made.returncode == 0, made.stderr
        mine, theirs_too = figures(tmp_path / "npu" / name), figures(tmp_path / "cpu" / name)
        assert mine.keys() == theirs_too.keys()
        for layer, row in mine.items():
            assert row["type"] == theirs_too[layer]["type"]
            for key in ("rel_error", "output_rel_error") if "output_rel_error" in row else ():
                assert row[key] == pytest.approx(theirs_too[layer][key], rel=0.1), (name, layer, key)
        checked = run("verify", tmp_path / "npu" / name, "--source", tmp_path / "models" / name)
        assert checked.returncode == 0, checked.stdout
