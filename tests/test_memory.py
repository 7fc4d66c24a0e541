"""The promise: memory does not grow with the number of blocks, and the plan says how much it will be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from conftest import run, run_process

MiB = 1 << 20
# A block of 40 MB: small enough for a test, and large enough that holding a few of them would show.
WIDE = replace(synthetic.FAMILIES["t2v-1.3B"], dim=1024, ffn=4096, text_dim=256)


def peak(tmp_path: Path, blocks: int, *more: object, kind: str = "w8a8") -> tuple[int, int]:
    """(measured, predicted) peak of resident memory of a whole process, in bytes."""
    source = tmp_path / f"model{blocks}"
    if not source.exists():
        synthetic.write(source, replace(WIDE, blocks=blocks), sparse=True)
    command = [
        "--model_path",
        source,
        "--save_path",
        tmp_path / "out",
        "--quant_type",
        kind,
        "--device",
        "cpu",
        *more,
    ]
    predicted = json.loads(run("plan", *command, "--json").stdout)["peak_host_bytes"]
    made = run_process("quant", *command, "--overwrite", "--quiet", "--json")
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)["peak_host_bytes"], predicted


@pytest.mark.parametrize("read_ahead", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_memory_is_flat_in_blocks(tmp_path: Path, read_ahead: int) -> None:
    (few, plan_few), (many, plan_many) = (peak(tmp_path, n, "--read_ahead", read_ahead) for n in (2, 12))
    assert plan_few == plan_many
    assert abs(many - few) < 24 * MiB  # ten more blocks are 400 MiB
    assert many <= plan_many


def test_plan_predicts_and_budget_binds(tmp_path: Path) -> None:
    wide, predicted = peak(tmp_path, 4, "--read_ahead", 8)
    assert 0.75 * predicted < wide <= predicted
    tight, allowed = peak(tmp_path, 4, "--read_ahead", 8, "--max_host_memory", "300MiB")
    assert allowed <= 300 * MiB < predicted
    assert tight <= allowed


@pytest.mark.parametrize(
    "kind, formats", [("w4a16", "gguf"), ("w4a4_mxfp4", "mindie"), ("w8a8", "mindie,lightx2v,diffusers,comfyui")]
)
def test_what_lies_outside_the_arena_is_in_the_plan(kind: str, formats: str, tmp_path: Path) -> None:
    """Scales of blocks, packed codes, and the tiles of methods side by side."""
    made, predicted = peak(tmp_path, 4, "--format", formats, kind=kind)
    assert 0.75 * predicted < made <= predicted
