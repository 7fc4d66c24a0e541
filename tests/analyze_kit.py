"""What the tests of `streamq analyze` share: a small model with a planted outlier, its calibration set, and a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import replay_kit
import torch
from conftest import run
from safetensors.torch import load_file, save_file

from streamq.calibration import plan as calibrations

ROWS = 1 << 14  # more than there are: every row is judged by
SIZE = {"attention_head_dim": 32, "ffn_dim": 128}  # gguf keeps matrices of 1024 elements float


@pytest.fixture
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are measured on all inputs."""
    monkeypatch.setattr(calibrations, "ROWS", ROWS)


def calib(model: Path, out: Path) -> Path:
    made = run(
        "calib", "--model_path", model, "--save_path", out, "--size", "64*64", "--frame_num", 5, "--num_samples", 3,
        "--time_bins", 3, "--dtype", "fp32", "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return out


@pytest.fixture(scope="module", name="model")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks; ffn.2 of the second gets one channel 40 times as large as its maker's others."""
    _, folder = replay_kit.make(
        tmp_path_factory.mktemp("model"), 7, torch.float32, ("", "transformer"), num_layers=2, **SIZE
    )
    path = folder / replay_kit.WEIGHTS
    tensors = load_file(path)
    for leaf in ("weight", "bias"):
        tensors[f"blocks.1.ffn.net.0.proj.{leaf}"][5] *= 40
    save_file(tensors, path)
    return folder


@pytest.fixture(scope="module", name="inputs")
def inputs_fixture(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calib(model, tmp_path_factory.mktemp("calib") / "set")


def analyze(model: Path, inputs: Path, out: Path, *more: object) -> dict[str, Any]:
    ended = run("analyze", "--model_path", model, "--save_path", out, "--calib", inputs, "--device", "cpu",
                "--json", "--quiet", *more)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))
