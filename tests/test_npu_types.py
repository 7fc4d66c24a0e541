"""Every data-free type and format with `--device npu`, on the stand-in for torch_npu: the bytes that the CPU makes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from conftest import ROOT

from streamq.cli import main

PAIRS = [
    ("w8a8", "comfyui"), ("w8a8", "mindie,lightx2v,diffusers"), ("w8a16", "diffusers"),
    ("w8a16", "gguf"), ("w4a16", "gguf"), ("fp8", "lightx2v"), ("fp8", "diffusers"), ("fp8", "comfyui"),
    ("w8a8_convrot", "comfyui"), ("w4a4_mxfp4", "mindie"), ("w8a8f8", "mindie"),
]  # fmt: skip
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


def files(folder: Path) -> dict[str, bytes]:
    """All but the manifest, which names the device."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "streamq.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def model(folder: Path, kind: str) -> Path:
    """As small as the type allows: convrot turns 256 inputs, recipes with MX name the first five blocks."""
    wide, blocks = 4 if "convrot" in kind else 1, 6 if "mx" in kind or kind == "w8a8f8" else 1
    name = f"{blocks}x{wide}"
    if not (folder / name).exists():
        tiny = synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"], blocks)
        synthetic.write(folder / name, replace(tiny, dim=64 * wide, ffn=128 * wide), dtype="bf16")
    return folder / name


@pytest.mark.slow
def test_the_bytes_are_those_of_the_cpu(tmp_path: Path) -> None:
    jobs = []
    for kind, form in PAIRS:
        common = [
            "quant",
            "--model_path",
            str(model(tmp_path, kind)),
            "--quant_type",
            kind,
            "--format",
            form,
            "--quiet",
        ]
        name = f"{kind}-{form}"
        jobs.append([*common, "--save_path", str(tmp_path / "npu" / name), "--device", "npu"])
        assert main([*common, "--save_path", str(tmp_path / "cpu" / name), "--device", "cpu"]) == 0
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(jobs), capture_output=True, text=True, timeout=300,
        cwd=ROOT / "tests", check=False,
    )  # fmt: skip
    found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(jobs), child.stderr
    for (kind, form), (code, hazards, moved) in zip(PAIRS, found, strict=True):
        assert (code, hazards) == (0, []) and moved > 0, (kind, form, child.stderr)
        name = f"{kind}-{form}"
        made, due = files(tmp_path / "npu" / name), files(tmp_path / "cpu" / name)
        assert made.keys() == due.keys()
        assert [path for path in due if made[path] != due[path]] == [], name
