"""What the formats write besides numbers: files, modes, documents; and that formats made together equal those alone."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, run
from safetensors import safe_open

WEIGHTS = "quant_model_weight_w8a8_dynamic.safetensors"


def quantize(source: Path, out: Path, *more: object) -> Path:
    result = run("quant", "--model_path", source, "--save_path", out, "--quant_type", "w8a8", "--quiet", *more)
    assert result.returncode == 0, result.stderr
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "streamq.json"
    }


def test_plan_is_exactly_what_is_written(tmp_path: Path, tiny: Tiny) -> None:
    source = tiny("i2v-A14B", layout="diffusers")
    command = [
        "--model_path",
        source,
        "--save_path",
        tmp_path / "out",
        "--quant_type",
        "w8a8",
        "--format",
        "mindie,lightx2v",
    ]
    plan = json.loads(run("plan", *command, "--json").stdout)
    assert not (tmp_path / "out").exists()
    done = run("quant", *command, "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    written = {name: len(data) for name, data in contents(tmp_path / "out").items()}
    assert written == {file["path"]: file["bytes"] for file in plan["files"]}
    figures = json.loads(done.stdout)
    assert figures["bytes_written"] == plan["bytes_to_write"] == sum(written.values())
    assert figures["bytes_read"] == plan["bytes_to_read"] and figures["plan"] == plan["hash"]
    manifest = json.loads((tmp_path / "out" / "streamq.json").read_text())
    for form, layers in plan["layers"].items():
        assert {name: about["type"] for name, about in manifest["formats"][form]["layers"].items()} == layers


@pytest.mark.parametrize("family", ["t2v-1.3B", "t2v-A14B"])
def test_formats_together_equal_formats_alone(tmp_path: Path, tiny: Tiny, family: str) -> None:
    source = tiny(family)
    together = quantize(source, tmp_path / "both", "--format", "mindie,lightx2v")
    assert {path.name for path in together.iterdir()} == {"mindie", "lightx2v", "streamq.json"}
    for form in ("mindie", "lightx2v"):
        alone = quantize(source, tmp_path / form, "--format", form)
        assert contents(together / form) == contents(alone)


def test_mindie_folder(tmp_path: Path, tiny: Tiny) -> None:
    source = tiny("t2v-A14B", layout="diffusers")
    (source / "configuration.json").write_text('{"a": 1}')
    (source / "pipeline.py").write_text("raise SystemExit('never run')")
    (source / "notes.txt").write_text("stays")
    (source / "transformer" / "deep").mkdir()
    (source / "transformer" / "deep" / "config.json").write_text("{}")
    out = quantize(source, tmp_path / "out")
    expected = {
        WEIGHTS,
        "quant_model_description_w8a8_dynamic.json",
        "config.json",
        "configuration.json",
        "pipeline.py",
    }
    assert {path.name for path in out.iterdir()} == {"high_noise_model", "low_noise_model", "streamq.json", "README.md"}
    for expert, folder in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        assert {path.name for path in (out / expert).iterdir()} == expected
        for path in (out / expert).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o640 and not path.is_symlink()
        assert (out / expert / "config.json").read_bytes() == (source / folder / "config.json").read_bytes()
    assert (out / "high_noise_model" / WEIGHTS).read_bytes() != (out / "low_noise_model" / WEIGHTS).read_bytes()


def test_mindie_shards_split_as_msmodelslims(tmp_path: Path, tiny: Tiny) -> None:
    """Its rule: a tensor that would bring a shard to the limit starts the next one; only data bytes count."""
    limit = 60_000
    source = tiny("t2v-1.3B")
    one = quantize(source, tmp_path / "one")
    result = run("quant", "--model_path", source, "--save_path", tmp_path / "shards", "--quant_type", "w8a8",
                 "--quiet", "--max_shard_size", limit)  # fmt: skip
    assert result.returncode == 0 and "warning: " in result.stderr and "single file" in result.stderr
    index = json.loads((tmp_path / "shards" / "quant_model_weight.safetensors.index.json").read_text())
    description = json.loads((tmp_path / "shards" / "quant_model_description_w8a8_dynamic.json").read_text())
    assert list(index["weight_map"]) == [name for name in description if name != "model_quant_type"]
    with safe_open(one / WEIGHTS, "pt") as single:
        tensors = {name: single.get_tensor(name) for name in single.keys()}  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    expected, pending = [[]], 0  # type: ignore[var-annotated]
    for name in index["weight_map"]:
        if pending + tensors[name].nbytes >= limit and expected[-1]:
            expected.append([])
            pending = 0
        expected[-1].append(name)
        pending += tensors[name].nbytes
    assert len(expected) > 3
    for number, names in enumerate(expected, 1):
        file = f"quant_model_weight-{number:05d}-of-{len(expected):05d}.safetensors"
        with safe_open(tmp_path / "shards" / file, "pt") as shard:
            assert set(shard.keys()) == set(names)
            assert all(bool((shard.get_tensor(name) == tensors[name]).all()) for name in names)
            assert all(index["weight_map"][name] == file for name in names)
    verdict = run("verify", tmp_path / "shards", "--source", source, "--json")
    assert verdict.returncode == 0, verdict.stdout


def test_part_file_size_is_in_gib(tmp_path: Path, tiny: Tiny) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = run("recipes", "w8a8").stdout
    assert "part_file_size: 0" in text
    recipe.write_text(text.replace("part_file_size: 0", "part_file_size: 1"))
    source = tiny("t2v-1.3B")
    result = run("plan", "--model_path", source, "--save_path", tmp_path / "out", "--config_path", recipe, "--json")
    assert result.returncode == 0, result.stderr
    names = [file["path"] for file in json.loads(result.stdout)["files"]]
    assert "quant_model_weight-00001-of-00001.safetensors" in names
    assert "quant_model_weight.safetensors.index.json" in names


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_lightx2v_folder(tmp_path: Path, tiny: Tiny, layout: str) -> None:
    source = tiny("i2v-14B", layout=layout)
    out = quantize(source, tmp_path / "out", "--format", "lightx2v")
    blocks = {"block_0.safetensors", "block_1.safetensors", "non_block.safetensors"}
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert {path.name for path in out.iterdir()} == blocks | {
        "config.json",
        index,
        "streamq.json",
        "README.md",
        "lightx2v_config.json",
    }
    config = json.loads((out / "config.json").read_text())
    expected: dict[str, Any] = {"dim": 64, "ffn_dim": 128, "in_dim": 36, "out_dim": 16, "num_heads": 2, "num_layers": 2,
                                "eps": 1e-6, "freq_dim": 256, "text_len": 512, "model_type": "i2v"}  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    weight_map = json.loads((out / index).read_text())["weight_map"]
    for file in blocks:
        with safe_open(out / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                assert weight_map[name] == file
                assert name.startswith(f"blocks.{file[6]}.") == file.startswith("block_")
                assert name.endswith("scale_shift_table") is False and "attn1" not in name
    single = quantize(source, tmp_path / "single", "--format", "lightx2v", "--layout", "single")
    assert {path.name for path in single.iterdir()} == {
        "diffusion_pytorch_model.safetensors",
        "config.json",
        "streamq.json",
        "README.md",
        "lightx2v_config.json",
    }


def test_manifest_holds_no_times_and_no_paths(tmp_path: Path, tiny: Tiny) -> None:
    source = tiny("t2v-1.3B", shard_bytes=100_000)
    first = quantize(source, tmp_path / "first")
    elsewhere = tmp_path / "moved" / "model"
    elsewhere.parent.mkdir()
    source.rename(elsewhere)
    second = quantize(elsewhere, tmp_path / "deeper" / "second", "--read_ahead", "0")
    assert (first / "streamq.json").read_bytes() == (second / "streamq.json").read_bytes()
    assert str(tmp_path) not in (first / "streamq.json").read_text()
