"""`--device cuda`: the CPU's bytes, nothing left behind, and what users without a GPU are told."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, Tiny, run
from nunchaku_runs import source

from streamq.device import STAGE_CHUNKS
from streamq.device.accelerator import Accelerator

CHUNK = 1999  # bytes; odd, and small enough that every tensor goes round the pinned ring more than once

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A small STAGE_CHUNK; the list gets the chunks of every ring that is made."""
    made: list[torch.Tensor] = []
    ring: Callable[[Accelerator], list[tuple[torch.Tensor, Any]]] = Accelerator._ring

    def watched(self: Accelerator) -> list[tuple[torch.Tensor, Any]]:
        chunks = ring(self)
        made.extend(chunk for chunk, _ in chunks)
        return chunks

    monkeypatch.setattr("streamq.device.accelerator.STAGE_CHUNK", CHUNK)
    monkeypatch.setattr(Accelerator, "_ring", watched)
    return made


def written(save: Path) -> dict[str, bytes]:
    """Every safetensors file of an output folder."""
    return {str(path.relative_to(save)): path.read_bytes() for path in sorted(save.rglob("*.safetensors"))}


CASES = {
    "mindie": ("t2v-1.3B", "fp32", ["--format", "mindie"]),
    "both": ("i2v-14B", "bf16", ["--format", "mindie,lightx2v"]),
    "experts": ("t2v-A14B", "bf16", ["--format", "mindie,lightx2v"]),
    "match-msmodelslim": ("t2v-1.3B", "bf16", ["--format", "mindie", "--match", "msmodelslim"]),
    "match-lightx2v": ("t2v-1.3B", "bf16", ["--format", "lightx2v", "--match", "lightx2v"]),
    "mse": ("t2v-1.3B", "bf16", ["--format", "mindie"]),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_cpu(
    case: str, ahead: int, tiny: Tiny, tmp_path: Path, rings: list[torch.Tensor]
) -> None:
    family, dtype, options = CASES[case]
    model = tiny(family, dtype=dtype)
    recipe = ["--quant_type", "w8a8"]
    if case == "mse":
        lines = (ROOT / "recipes" / "w8a8.yaml").read_text().splitlines()
        mse = [line.replace("minmax", "mse") if line.strip().startswith("weight:") else line for line in lines]
        (tmp_path / "mse.yaml").write_text("\n".join(mse))
        recipe = ["--config_path", str(tmp_path / "mse.yaml")]
    command = ["--model_path", model, *recipe, *options, "--read_ahead", ahead]
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for device in ("cpu", "cuda"):
        result = run("quant", *command, "--save_path", tmp_path / device, "--device", device, "--quiet")
        assert result.returncode == 0, result.stderr
    gc.collect()
    assert written(tmp_path / "cuda") == written(tmp_path / "cpu") != {}
    assert torch.cuda.memory_allocated() == before
    plan = run("plan", *command, "--save_path", tmp_path / "plan", "--device", "cuda", "--json")
    assert before < torch.cuda.max_memory_allocated() <= before + json.loads(plan.stdout)["peak_device_bytes"]
    assert all(chunk.is_pinned() for chunk in rings)
    assert [chunk.numel() for chunk in rings] == [CHUNK] * 2 * STAGE_CHUNKS


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["w8a8_static", "w8a8_smooth", "w8a8_gptq", "w4a4", "w4a4_nvfp4_gptq", "w4a16_gptq"])
def test_a_calibrated_run(name: str, tiny: Tiny, tmp_path: Path, rings: list[torch.Tensor]) -> None:
    """Attention and products round otherwise than the CPU's, so figures are compared and not bytes."""
    four = name.startswith("w4")
    model = source(tmp_path / "model", "i2v-14B", dtype="bf16") if four else tiny("i2v-14B", dtype="bf16")
    document = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    document["spec"]["calibration"] = {"num_samples": 3, "time_bins": 2, "size": "64*64", "frame_num": 5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    found = {}
    for device in ("cpu", "cuda"):
        save = tmp_path / device
        result = run("quant", "--model_path", model, "--save_path", save, "--config_path", tmp_path / "recipe.yaml",
                     "--device", device, "--quiet")  # fmt: skip
        assert result.returncode == 0, result.stderr
        (made,) = json.loads((save / "streamq.json").read_text())["formats"].values()
        found[device] = made["layers"]
        assert run("verify", save, "--source", model).returncode == 0
    for layer, row in found["cuda"].items():
        for key in ("rel_error", "output_rel_error") if "output_rel_error" in row else ():
            assert row[key] == pytest.approx(found["cpu"][layer][key], rel=0.1), (layer, key)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    command = ["--model_path", tiny(), "--save_path", tmp_path / "out", "--quant_type", "w8a8"]
    result = run("quant", *command, "--device", f"cuda:{count}", "--quiet")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: --device cuda:{count}: there are {count} GPUs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_no_gpu_at_all(tiny: Tiny, tmp_path: Path) -> None:
    command = ["--model_path", tiny(), "--save_path", tmp_path / "out", "--quant_type", "w8a8"]
    result = run("quant", *command, "--device", "cuda", "--quiet")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: --device cuda: ")
    assert torch.__version__ in result.stderr and "--device cpu" in result.stderr
    assert not (tmp_path / "out").exists()
