"""What reviews found, kept found: conditions around a run that must not spoil it, or be taken for something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Tiny, run

from streamq import journal
from streamq.device.cpu import CPU


def quantize(source: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return run("quant", "--model_path", source, "--save_path", out, "--quant_type", "w8a8", *more)


def test_other_weights_under_equal_headers_are_not_already_done(tmp_path: Path, tiny: Tiny) -> None:
    first, second = tiny("t2v-1.3B", seed=0), tiny("t2v-1.3B", seed=1)
    assert quantize(first, tmp_path / "out", "--quiet").returncode == 0
    assert "already done" in quantize(first, tmp_path / "out", "--quiet").stdout
    result = quantize(second, tmp_path / "out", "--quiet")
    assert result.returncode == 2 and "other weights" in result.stderr


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_output_removed_under_a_run_is_not_done(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, read_ahead: int
) -> None:
    source, out = tiny("t2v-1.3B"), tmp_path / "out"
    append = journal.Journal.append

    def vanish(self: journal.Journal, commit: journal.Commit) -> None:
        append(self, commit)
        for path in out.glob("*.partial"):
            path.unlink()

    monkeypatch.setattr(journal.Journal, "append", vanish)
    result = quantize(source, out, "--quiet", "--read_ahead", read_ahead)
    assert result.returncode == 1 and "removed" in result.stderr
    assert not (out / "streamq.json").exists()


@pytest.mark.parametrize("name", ["oy[/x]", "v[bold]", "[red]"])
def test_paths_that_look_like_markup(tmp_path: Path, tiny: Tiny, name: str) -> None:
    source = tiny("t2v-1.3B")
    renamed = tmp_path / f"source {name}"  # a slash makes two folders, and still markup of the whole path
    renamed.parent.mkdir(exist_ok=True)
    source.rename(renamed)
    result = quantize(renamed, tmp_path / name)
    assert result.returncode == 0, result.stderr
    assert name in result.stdout
    assert run("verify", tmp_path / name, "--source", renamed).returncode == 0


def test_match_of_a_cast_model_verifies(tmp_path: Path, tiny: Tiny) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = run("recipes", "w8a8").stdout
    recipe.write_text(text + "  multimodal_sd_config: {model_config: {convert_model_dtype: True}}\n")
    source = tiny("t2v-1.3B")
    command = ["quant", "--model_path", source, "--config_path", recipe, "--quiet", "--format"]
    made = run(*command, "mindie", "--match", "msmodelslim", "--save_path", tmp_path / "a")
    assert made.returncode == 0, made.stderr
    report = run("verify", tmp_path / "a", "--source", source, "--json")
    assert report.returncode == 0, report.stdout
    # LightX2V's converter does not know the setting: its arithmetic stays its own.
    text = run("recipes", "w8a8_all").stdout
    recipe.write_text(text + "  multimodal_sd_config: {model_config: {convert_model_dtype: True}}\n")
    made = run(*command, "lightx2v", "--match", "lightx2v", "--save_path", tmp_path / "b")
    assert made.returncode == 0, made.stderr


def test_what_overwrite_began_is_resumed_by_the_same_command(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny("t2v-1.3B", blocks=3), tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").write_bytes(b"old")
    append = journal.Journal.append

    def interrupt(self: journal.Journal, commit: journal.Commit) -> None:
        append(self, commit)
        if len(self.commits) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", interrupt)
        assert quantize(source, out, "--quiet", "--overwrite").returncode == 130
    assert not (out / "old.safetensors").exists()
    result = quantize(source, out, "--overwrite")
    assert result.returncode == 0 and "resuming: 2 of 4" in result.stderr
    # A finished output is discarded all the same, and an unfinished one that was begun without it.
    assert "resuming" not in quantize(source, out, "--overwrite").stderr


def test_a_closed_stderr_does_not_stop_a_run(tmp_path: Path, tiny: Tiny) -> None:
    source = tiny("t2v-1.3B", blocks=3)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "streamq", "quant", "--quant_type", "w8a8"]
    command += ["--model_path", str(source), "--save_path", str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=writing, check=False)
    os.close(writing)
    assert (tmp_path / "out" / "streamq.json").is_file()
    assert done.returncode in (0, 120)  # 120: Python could not flush its own stderr at exit


def test_a_terminal_without_box_characters(tmp_path: Path, tiny: Tiny) -> None:
    command = [sys.executable, "-m", "streamq", "inspect", str(tiny("t2v-1.3B"))]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0 and b"t2v" in done.stdout, done.stderr


def test_no_memory_is_not_a_bug(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CPU, nbytes: int) -> torch.Tensor:
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] tried to allocate {nbytes} bytes")

    monkeypatch.setattr(CPU, "empty", refuse)
    result = quantize(tiny("t2v-1.3B"), tmp_path / "out", "--quiet")
    assert result.returncode == 1 and "out of memory" in result.stderr and "--read_ahead 0" in result.stderr


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_vace_config_says_where_its_blocks_are(tmp_path: Path, tiny: Tiny, layout: str) -> None:
    """Spread evenly where no config tells: 0, 2, … in the 1.3B."""
    source = tiny("vace-1.3B", blocks=4, layout=layout)
    assert quantize(source, tmp_path / "out", "--quiet", "--format", "lightx2v").returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vace_layers"], config["vace_in_dim"]) == ([0, 2], 96)
    assert config["_class_name"] == "VaceWanModel"


def test_the_scale_is_a_true_quotient() -> None:
    """Not amax times the reciprocal of 127, as CUDA has it for a Python divisor: that differs in some last bits."""
    from streamq.methods.int8 import QMAX, stored_scale
    from streamq.quantized import Rule

    amax = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)) + 0.01
    exact = torch.from_numpy(amax.numpy() / torch.tensor(127, dtype=torch.float32).numpy())
    assert torch.equal(stored_scale(amax.clone(), Rule(), QMAX), exact)
    assert not torch.equal(amax * (1 / torch.tensor(127.0)), exact)
