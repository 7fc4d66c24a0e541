"""Every family, layout and dtype is recognised by its tensors, planned at full size, and quantized at small size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from conftest import Tiny, run

# family -> what `inspect` says: family, model_type, linears a block
FACTS = {
    "t2v-1.3B": ("t2v", None, 10),
    "t2v-14B": ("t2v", None, 10),
    "i2v-14B": ("i2v", "Wan2_1", 12),
    "flf2v-14B": ("flf2v", "Wan2_1", 12),
    "vace-1.3B": ("vace", "Wan2_1", 10),
    "vace-14B": ("vace", "Wan2_1", 10),
    "t2v-A14B": ("t2v", "Wan2_2", 10),
    "i2v-A14B": ("i2v", "Wan2_2", 10),
    "ti2v-5B": ("ti2v", "Wan2_2", 10),
    "s2v-14B": ("s2v", "Wan2_2", 10),
    "animate-14B": ("animate", "Wan2_2", 12),
}
# Released sizes: parameters and tensors of one expert (Wan-AI model cards and safetensors headers).
RELEASED = {
    "t2v-1.3B": (1_418_996_800, 825),
    "t2v-14B": (14_288_491_584, 1095),
    "i2v-14B": (16_394_878_784, 1303),
    "flf2v-14B": (16_395_536_704, 1304),
    "vace-1.3B": (2_153_972_032, 1264),
    "vace-14B": (17_337_592_896, 1331),
    "i2v-A14B": (14_288_901_184, 1095),
    "ti2v-5B": (4_999_787_712, 825),
}


def facts(path: Path) -> dict[str, object]:
    result = run("inspect", path, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("family", FACTS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"layout": "diffusers"},
        {"dtype": "bf16", "shard_bytes": 100_000},
        {"layout": "diffusers", "dtype": "fp16", "shard_bytes": 150_000},
        {"prefix": "model.diffusion_model.", "single_file": "wan.safetensors", "dtype": "fp16"},
    ],
    ids=["native", "diffusers", "bf16-shards", "diffusers-fp16-shards", "comfyui"],
)
def test_any_checkpoint(tmp_path: Path, tiny: Tiny, family: str, how: dict[str, object]) -> None:
    two = synthetic.FAMILIES[family].experts == 2
    if how.get("single_file") and two:
        pytest.skip("a single file holds one expert")
    if family == "animate-14B" and how.get("layout") == "diffusers":
        pytest.skip("has no diffusers release; refused, see test_bad_input")
    source = tiny(family, **how)
    found = facts(source)
    assert "format" not in found
    expected, version, linears = FACTS[family]
    vace = found["n_vace_blocks"]
    assert isinstance(vace, int)
    assert found["family"] == expected and found["model_type"] == version
    assert found["layout"] == how.get("layout", "native") and found["prefix"] == how.get("prefix", "")
    assert found["n_blocks"] == 2 and vace == (2 if "vace" in family else 0)
    # VACE blocks have a projection out each, the first one also a projection in.
    assert found["linears"] == 2 * linears + vace * 11 + (vace > 0)
    assert set(found["dtypes"]) == {synthetic.DTYPES[str(how.get("dtype", "fp32"))]}  # type: ignore[call-overload]
    assert len(found["experts"]) == (2 if two else 1)  # type: ignore[arg-type]
    for form in ("mindie", "lightx2v"):
        out = tmp_path / form
        made = run(
            "quant", "--model_path", source, "--save_path", out, "--quant_type", "w8a8", "--format", form, "--quiet"
        )
        if form == "lightx2v" and how.get("single_file"):  # width 64 and no config.json: heads cannot be told
            assert made.returncode == 2 and "config.json" in made.stderr
            continue
        assert made.returncode == 0, made.stderr
        verdict = json.loads(run("verify", out, "--source", source, "--json").stdout)
        assert verdict["ok"], verdict["problems"]
        experts = 2 if two else 1
        left_float = found["n_blocks"] + vace if form == "mindie" else 0
        assert len(verdict["layers"]) == experts * (found["linears"] - left_float)
        assert all(layer["rel_error"] < 0.02 and layer["cosine"] > 0.999 for layer in verdict["layers"].values())
        folders = ["high_noise_model", "low_noise_model"] if two else ["."]
        assert all(list((out / folder).glob("*.safetensors")) for folder in folders)
        again = facts(out)
        assert again["format"] == form and again["family"] == expected
        assert again["linears"] == found["linears"] and len(again["layers"]) == experts * found["linears"]  # type: ignore[arg-type,operator]


@pytest.mark.parametrize("family", RELEASED)
def test_full_size_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Names, shapes and counts of the releases, on headers alone: the data are holes."""
    source = tmp_path / "model"
    synthetic.write(source, replace(synthetic.FAMILIES[family], experts=1), sparse=True, shard_bytes=10**10)
    found = facts(source)
    parameters, tensors = RELEASED[family]
    assert sum(found["dtypes"].values()) == tensors  # type: ignore[attr-defined]
    monkeypatch.setattr("streamq.plan.DISK_RESERVE", -(10**12))  # whatever this machine's disk
    result = run("plan", "--model_path", source, "--save_path", tmp_path / "out", "--quant_type", "w8a8", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["bytes_to_read"] == 4 * parameters
    assert plan["bytes_to_write"] == sum(file["bytes"] for file in plan["files"])
    assert plan["peak_host_bytes"] < 1.5 * 2**30 and plan["peak_device_bytes"] == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t2v-1.3B", "t2v-14B", "i2v-14B"])
def test_real_width(tmp_path: Path, family: str) -> None:
    """One block of the released shapes; bf16, data as holes but for the 1.3B, which is real numbers."""
    source, out = tmp_path / "model", tmp_path / "out"
    synthetic.write(source, replace(synthetic.FAMILIES[family], blocks=1), dtype="bf16", sparse=family != "t2v-1.3B")
    result = run("quant", "--model_path", source, "--save_path", out, "--quant_type", "w8a8", "--quiet", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    verdict = json.loads(run("verify", out, "--json").stdout)
    assert verdict["ok"], verdict["problems"]
    files = {file["path"]: file["bytes"] for file in verdict["files"]}
    assert sum(files.values()) == plan["bytes_written"]
    assert plan["layers"]["mindie"] == {"w8a8": FACTS[family][2] - 1, "float": 1}


def test_model_types_are_checked_against_tensors(tmp_path: Path, tiny: Tiny) -> None:
    def status(family: str, stated: str) -> int:
        return run("plan", "--model_path", tiny(family), "--save_path", tmp_path / "out", "--quant_type", "w8a8",
                   "--model_type", stated).returncode  # fmt: skip

    for family, stated in [
        ("t2v-14B", "Wan2_1"), ("t2v-14B", "Wan2.2-T2V-A14B"), ("i2v-14B", "Wan2.1"), ("i2v-A14B", "Wan2.2-I2V-A14B"),
        ("ti2v-5B", "Wan2.2-TI2V-5B"), ("t2v-A14B", "Wan2_2"), ("flf2v-14B", "Wan2_1"),
    ]:  # fmt: skip
        assert status(family, stated) == 0, (family, stated)
    for family, stated in [
        ("i2v-14B", "Wan2_2"), ("i2v-A14B", "Wan2_1"), ("ti2v-5B", "Wan2_1"), ("t2v-A14B", "Wan2_1"),
        ("t2v-14B", "Wan2.2-I2V-A14B"), ("ti2v-5B", "Wan2.2-T2V-A14B"), ("t2v-14B", "Wan2_3"),
    ]:  # fmt: skip
        assert status(family, stated) == 2, (family, stated)


def test_hub_id_is_entered_through_the_hub_cache(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot in huggingface_hub's cache: symbolic links into blobs, no network."""
    import huggingface_hub.constants

    source = tiny("t2v-1.3B", shard_bytes=100_000)
    cache = tmp_path / "hub"
    repo = cache / "models--Wan-AI--Wan2.1-T2V-1.3B"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (repo / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(repo / "blobs" / path.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = facts(Path("Wan-AI/Wan2.1-T2V-1.3B"))
    assert found["n_blocks"] == 2
    made = run("quant", "--model_path", "Wan-AI/Wan2.1-T2V-1.3B", "--save_path", tmp_path / "a", "--quant_type", "w8a8",
               "--quiet")  # fmt: skip
    assert made.returncode == 0, made.stderr
    run("quant", "--model_path", source, "--save_path", tmp_path / "b", "--quant_type", "w8a8", "--quiet")
    name = "quant_model_weight_w8a8_dynamic.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    missing = run("inspect", "Wan-AI/Wan2.1-T2V-14B")
    assert missing.returncode == 2 and "hf download" in missing.stderr
