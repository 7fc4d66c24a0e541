"""Calibrated runs with `--device npu`, on the stand-in for torch_npu: the same calls, and the bytes of the CPU."""

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
from streamq.calibration import make
import contextlib
make.all_threads = contextlib.nullcontext  # sums of another number of threads would round differently
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


def test_bytes_are_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family whose blocks are fed otherwise, every kind of method; layers are read ahead meanwhile."""
    import contextlib

    from streamq.calibration import make

    monkeypatch.setattr(make, "all_threads", contextlib.nullcontext)
    jobs = []
    for family, name in zip(FAMILIES, RECIPES, strict=True):
        synthetic.write(tmp_path / family, synthetic.tiny(synthetic.FAMILIES[family], 2))
        for device in ("cpu", "npu"):
            jobs.append(["quant", "--model_path", str(tmp_path / family), "--save_path", str(tmp_path / device / family),
                         "--config_path", str(recipe(name, tmp_path)), "--device", device, "--quiet"])  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([job for job in jobs if "npu" in job]), text=True,
        capture_output=True, timeout=300, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(outcomes) == len(FAMILIES), done.stderr
    for (code, hazards, crossed), job in zip(outcomes, (job for job in jobs if "npu" in job), strict=True):
        assert code == 0 and not hazards and crossed > 0, (job, hazards, done.stderr)
    for job in (job for job in jobs if "cpu" in job):
        made = run(*job)
        assert made.returncode == 0, made.stderr
    for family in FAMILIES:
        ours = {p.relative_to(tmp_path / "cpu"): p for p in (tmp_path / "cpu" / family).rglob("*.safetensors")}
        theirs = {p.relative_to(tmp_path / "npu"): p for p in (tmp_path / "npu" / family).rglob("*.safetensors")}
        assert ours and ours.keys() == theirs.keys()
        for name, path in ours.items():
            assert path.read_bytes() == theirs[name].read_bytes(), name
