"""`streamq quant` in the nunchaku format as a whole: what is planned is written, from every source; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, check_error, run
from faults import snapshot
from nunchaku_runs import (
    CALIBRATION,
    SEARCH,
    Runs,
    Step,
    command,
    one_thread,
    operands,
    quant,
    source,
    step,
    svdquant,
    tensors_in,
    weights,
    write_recipe,
)
from safetensors.torch import load_file, save_file

from streamq.wan.config import keeps_fp32

INT8 = {"type": "linear_quant", "qconfig": {"act": {"scope": "per_token", "dtype": "int8"}, "weight": {}}}
WHOLE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
MINMAX = [step("w4a4")]
FEW = ["blocks.1.self_attn.*", "blocks.1.ffn.0"]
AWQ = operands("w4a16", "minmax") | {"act": {"scope": "per_token", "dtype": "float"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Models and outputs, once a module."""
    return Runs(tmp_path_factory.mktemp("nunchaku"))


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Everything here is small."""
    with one_thread():
        yield


def planned(model: Path, out: Path, process: list[Step], *more: object, **calibration: Any) -> dict[str, Any]:
    recipe = write_recipe(out.with_name("recipe.yaml"), process, **calibration)
    done = run("plan", *command(model, out, recipe, "--json", *more))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def verified(out: Path, model: Path) -> dict[str, Any]:
    done = run("verify", out, "--source", model, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], report["problems"]
    return report


def inspected(out: Path) -> dict[str, Any]:
    done = run("inspect", out, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "streamq.json").read_text())


# -- The plan, the files, and what reads them again --------------------------------------------------------------------

SOME_AWQ = [{"include": FEW, "qconfig": AWQ}]
RUNS: dict[str, tuple[str, list[Step], tuple[object, ...], dict[str, Any]]] = {
    "w4a4": ("t2v-1.3B", svdquant("w4a4"), (), {}),
    "w4a4 searched, gptq": ("ti2v-5B", [SEARCH, step("w4a4", "svdquant", ext={"gptq": True})], (), {"blocks": 1}),
    "nvfp4": ("i2v-14B", svdquant("w4a4_nvfp4"), (), {"dtype": "bf16"}),
    "nvfp4 without data": ("vace-1.3B", [step("w4a4_nvfp4")], (), {"dtype": "fp16"}),
    "w4a16": ("flf2v-14B", [step("w4a16", "mse")], (), {"blocks": 1}),
    "w4a16 gptq": ("vace-1.3B", [step("w4a16", "gptq", ext={"scales": "minmax"})], (), {"blocks": 1}),
    "shards": ("t2v-1.3B", MINMAX, ("--max_shard_size", "200KB"), {}),
    "single": ("t2v-1.3B", [step("w4a4_nvfp4", overrides=SOME_AWQ)], ("--layout", "single"), {}),
    "experts": ("t2v-A14B", svdquant("w4a4"), (), {"blocks": 1}),
    "experts in shards": ("i2v-A14B", [step("w4a16")], ("--max_shard_size", "300KB"), {"layout": "diffusers"}),
    "some layers": ("t2v-1.3B", svdquant("w4a4", include=FEW), (), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_what_is_planned_is_written(made: Runs, tmp_path: Path, name: str) -> None:
    family, process, options, how = RUNS[name]
    model = made.model(family, **how)
    out = made.out(model, process, *options)
    plan = planned(model, tmp_path / "none", process, *options)
    files = {str(path.relative_to(out)): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    recorded = manifest(out)
    del files["streamq.json"]
    assert {file["path"]: file["bytes"] for file in plan["files"]} == files == _sizes(recorded["files"])
    layers = recorded["formats"]["nunchaku"]["layers"]
    assert {layer: about["type"] for layer, about in layers.items()} == plan["layers"]
    report, seen = verified(out, model), inspected(out)
    assert plan["layers"] == seen["layers"] and seen["format"] == "nunchaku"
    assert len(plan["layers"]) == seen["linears"] * len(seen["experts"])
    packed = {layer for layer, kind in plan["layers"].items() if kind != "float"}
    assert report["layers"].keys() == packed and packed
    for layer, about in layers.items():
        if layer in packed:
            found = report["layers"][layer]
            assert found["rel_error"] == pytest.approx(about["rel_error"], rel=2e-3), layer
            assert 0 < found["emulated_rel_error"] < 0.3 and 0 < found["emulated_rel_error_half"] < 0.3, layer
            assert ("output_rel_error" in about) == ("calibration" in plan), layer
    check_index(out)


def _sizes(files: Mapping[str, Any]) -> dict[str, int]:
    return {name: about["bytes"] for name, about in files.items()}


def check_index(out: Path) -> None:
    """An index wherever there are shards, and nowhere else; it names each tensor's file."""
    for folder in {path.parent for path in out.rglob("*.safetensors")}:
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        assert (folder / INDEX).exists() == (len(shards) > 1)
        if len(shards) > 1:
            index = json.loads((folder / INDEX).read_text())
            inside = {name: shard for shard in shards for name in load_file(folder / shard)}
            assert index["weight_map"] == inside
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(folder).values())
            assert shards[0].endswith(f"-00001-of-{len(shards):05d}.safetensors")


def test_shards_hold_what_they_may(made: Runs) -> None:
    model = made.model()
    out = made.out(model, MINMAX, "--max_shard_size", "200KB")
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in out.glob("*.safetensors")]
    assert len(sizes) > 4 and max(sizes) <= 200_000
    assert tensors_in(out).keys() == tensors_in(made.out(model, MINMAX)).keys()
    whole = tensors_in(made.out(model, MINMAX))
    assert all(torch.equal(_raw(t), _raw(whole[name])) for name, t in tensors_in(out).items())


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_single_file_says_who_loads_it(made: Runs, tmp_path: Path) -> None:
    model, out = made.model(), tmp_path / "out"
    done = quant(model, out, MINMAX, "--layout", "single")
    assert "nothing loads Wan from the single file" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "streamq.json", "svdq-int4_r16.safetensors"]
    folder, single = tensors_in(made.out(model, MINMAX)), tensors_in(out)
    assert set(single) - set(folder) == {n.replace(".qweight", ".smooth_factor_orig") for n in folder if "qweight" in n}
    assert all(torch.equal(_raw(tensor), _raw(single[name])) for name, tensor in folder.items())


def test_advice_is_an_option_that_exists(made: Runs, tmp_path: Path) -> None:
    """Whatever a message says to give can be given."""
    done = quant(made.model(), tmp_path / "out", MINMAX, "--layout", "single")
    for layout in re.findall(r"--layout (\w+)", done.stderr):
        again = run("plan", *command(made.model(), tmp_path / "x", tmp_path / "out.yaml", "--layout", layout))
        assert again.returncode == 0, (layout, again.stderr)


# -- Sources -----------------------------------------------------------------------------------------------------------

SOURCES: dict[str, dict[str, Any]] = {
    "diffusers": {"layout": "diffusers"},
    "comfyui": {"prefix": "model.diffusion_model.", "single_file": "wan.safetensors"},
    "shards": {"shard_bytes": 300_000},
}


@pytest.mark.parametrize("process", [svdquant("w4a4"), [step("w4a16", "mse")]], ids=["w4a4", "w4a16"])
def test_every_layout_gives_the_same_bytes(made: Runs, process: list[Step]) -> None:
    native = made.out(made.model(), process)
    for name, how in SOURCES.items():
        out = made.out(made.model(**how), process)
        assert weights(out) == weights(native), name
        configs = [json.loads((folder / "config.json").read_text()) for folder in (out, native)]
        assert configs[0] == configs[1], name


def test_experts_of_every_layout(made: Runs) -> None:
    found = [made.out(made.model("t2v-A14B", blocks=1, layout=layout), MINMAX) for layout in ("native", "diffusers")]
    assert weights(found[0]) == weights(found[1]) and len(weights(found[0])) == 2
    high, low = weights(found[0]).values()
    assert high != low
    for name, expert in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        alone = made.out(made.model("t2v-A14B", blocks=1) / name, MINMAX)
        assert weights(alone)[WHOLE] == weights(found[0])[f"{expert}/{WHOLE}"]


@pytest.mark.parametrize(
    ("dtype", "kept"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtypes_of_what_stays_float(made: Runs, dtype: str, kept: torch.dtype) -> None:
    """bf16, but for what diffusers keeps in fp32 where it can: that has the source's own."""
    first = {"include": ["blocks.0.*"], "qconfig": None}
    model = made.model("i2v-14B", dtype=dtype)
    out = made.out(model, [step("w4a4_nvfp4", overrides=[first])])
    counted: Counter[bool] = Counter()
    for name, tensor in tensors_in(out).items():
        module, _, leaf = name.rpartition(".")
        if f"{module}.qweight" in tensors_in(out):
            assert leaf != "bias" or tensor.dtype == torch.bfloat16, name
            continue
        counted[keeps_fp32(name)] += 1
        assert tensor.dtype == (kept if keeps_fp32(name) else torch.bfloat16), name
    assert counted[True] == 15 and counted[False] > 30
    verified(out, model)


# -- Layers that do not fit --------------------------------------------------------------------------------------------


def test_some_layers_do_not_fit(made: Runs, tmp_path: Path) -> None:
    """They stay float: a warning, in the plan, in the manifest, in the weights, and for verify."""
    process, model = svdquant("w4a4", ext={"rank": 32}), made.model(ffn=192)
    done = quant(model, tmp_path / "out", process)
    for name, why in (("blocks.0.ffn.0", "192 outputs"), ("blocks.0.ffn.2", "192 inputs")):
        assert re.search(rf"2 layers stay float \({name}, …\): {why}, svdq_w4a4 takes multiples of 128", done.stderr)
    plan = planned(model, tmp_path / "none", process)
    float_layers = {layer for layer, kind in plan["layers"].items() if kind == "float"}
    assert float_layers == {f"blocks.{i}.ffn.{j}" for i in (0, 1) for j in (0, 2)} and len(plan["layers"]) == 20
    assert any("stay float" in line for line in plan["warnings"])
    layers = manifest(tmp_path / "out")["formats"]["nunchaku"]["layers"]
    assert {name for name, about in layers.items() if about == {"type": "float"}} == float_layers
    written = tensors_in(tmp_path / "out")
    assert written["blocks.1.ffn.net.2.weight"].dtype == torch.bfloat16 and "blocks.1.ffn.net.2.qweight" not in written
    assert verified(tmp_path / "out", model)["layers"].keys() == plan["layers"].keys() - float_layers


def test_a_type_with_smaller_tiles(made: Runs, tmp_path: Path) -> None:
    """AWQ takes inputs in 64s and outputs in 8s: what SVDQ refuses may fit."""
    model = made.model(dim=64, ffn=192)
    plan = planned(model, tmp_path / "none", [step("w4a16")])
    assert set(plan["layers"].values()) == {"w4a16"} and not plan["warnings"]
    verified(made.out(model, [step("w4a16")]), model)
    plan = planned(made.model(ffn=100), tmp_path / "none", [step("w4a16")])
    assert Counter(plan["layers"].values()) == {"w4a16": 16, "float": 4} and len(plan["warnings"]) == 2


def test_an_override_for_what_does_not_fit(made: Runs, tmp_path: Path) -> None:
    """Some layers by another type, some float by choice: nothing left that does not fit."""
    model, kept = made.model(ffn=192), {"include": ["blocks.1.cross_attn.o"], "qconfig": None}
    process = svdquant("w4a4", overrides=[{"include": ["*ffn*"], "qconfig": AWQ}, kept])
    plan = planned(model, tmp_path / "none", process)
    assert Counter(plan["layers"].values()) == {"w4a4": 15, "w4a16": 4, "float": 1}
    assert not any("stay float" in line for line in plan["warnings"])
    out = made.out(model, process)
    verified(out, model)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(quantization["svdq_w4a4"]["targets"]) == 15 and len(quantization["awq_w4a16"]["targets"]) == 4
    assert inspected(out)["layers"]["blocks.1.ffn.2"] == "w4a16"


# -- Layers out of the ordinary ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of zeros, one of equal weights, dead channels and outputs, and an input that is far too large."""
    model = source(tmp_path_factory.mktemp("odd") / "model", blocks=1)
    tensors = load_file(model / WHOLE)
    tensors["blocks.0.self_attn.q.weight"].zero_()
    tensors["blocks.0.self_attn.k.weight"].fill_(0.25)
    tensors["blocks.0.cross_attn.q.weight"][:, 30:70] = 0
    tensors["blocks.0.ffn.0.weight"][:40] = 0
    for leaf in ("weight", "bias"):
        tensors[f"blocks.0.norm3.{leaf}"][64:] = 0
    tensors["blocks.0.norm3.weight"][3] = 1e5
    save_file(tensors, model / WHOLE)
    return model


ODD: dict[str, list[Step]] = {
    "w4a4": [step("w4a4")],
    "nvfp4": [step("w4a4_nvfp4")],
    "w4a16": [step("w4a16", "mse")],
    "w4a16 gptq": [step("w4a16", "gptq")],
    "w4a4 searched": [SEARCH, step("w4a4", "svdquant", ext={"gptq": True})],
    "nvfp4 smoothed": svdquant("w4a4_nvfp4", ext={"gptq": True}),
    "w4a4 of full rank": svdquant("w4a4", ext={"rank": 128}),
    "nvfp4 of full rank": svdquant("w4a4_nvfp4", ext={"rank": 128, "svd": "randomised"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_layers(odd: Path, tmp_path: Path, name: str) -> None:
    quant(odd, tmp_path / "out", ODD[name], rows=32, gram_rows=32)
    layers = manifest(tmp_path / "out")["formats"]["nunchaku"]["layers"]
    found = verified(tmp_path / "out", odd)["layers"]
    assert layers["blocks.0.self_attn.q"]["rel_error"] == 0 == found["blocks.0.self_attn.q"]["emulated_rel_error"]
    for layer, about in layers.items():
        limit = 2e-3 if "full" in name else 0.15
        assert about.get("output_rel_error", 0) < limit and found[layer]["emulated_rel_error"] < 0.3, layer


def test_one_row_to_calibrate_on(made: Runs, tmp_path: Path) -> None:
    process, model = [SEARCH | {"rows": 1}, step("w4a4", "svdquant", ext={"gptq": True})], made.model(blocks=1)
    quant(model, tmp_path / "out", process, num_samples=1, rows=1, gram_rows=1, size="16*16", frame_num=1)
    verified(tmp_path / "out", model)


def test_overwritten_by_another_layout(made: Runs, tmp_path: Path) -> None:
    """No shard, index or expert of before is left for a loader to find."""
    out, model = tmp_path / "out", made.model(blocks=1)
    for other, options in (
        (model, ("--max_shard_size", "200KB")), (model, ()), (model, ("--layout", "single")),
        (made.model("t2v-A14B", blocks=1), ()), (model, ()),
    ):  # fmt: skip
        quant(other, out, MINMAX, "--overwrite", *options)
        assert weights(out) == weights(made.out(other, MINMAX, *options))
        assert {path.name for path in out.rglob("*.json")} == {
            path.name for path in made.out(other, MINMAX, *options).rglob("*.json")
        }
        verified(out, other)


# -- The library's recipes ---------------------------------------------------------------------------------------------

LIBRARY = sorted(path.stem for path in (ROOT / "recipes").glob("w4a*.yaml") if "[nunchaku]" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_the_librarys_recipes(made: Runs, tmp_path: Path, name: str) -> None:
    """By its own name, and as a file with a small set: all layers, by its type, into its format."""
    model = made.model(blocks=1)
    done = run("plan", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", name, "--json")
    plan = json.loads(done.stdout)
    kind = name.removesuffix("_fast").removesuffix("_gptq")
    assert set(plan["layers"].values()) == {kind} and not plan["warnings"]
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    recipe["spec"]["calibration"] = CALIBRATION
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run("quant", *command(model, tmp_path / "out", tmp_path / "recipe.yaml", "--quiet"))
    assert done.returncode == 0, done.stderr
    for layer in verified(tmp_path / "out", model)["layers"].values():
        assert layer["output_rel_error"] < min(0.13, layer["before"]["output_rel_error"]), layer


# -- The same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "process"), [
    ("vace-1.3B", svdquant("w4a4")),
    ("t2v-1.3B", [SEARCH, step("w4a4_nvfp4", "svdquant", ext={"gptq": True}, include=FEW)]),
    ("t2v-A14B", [step("w4a16", "gptq")]),
], ids=["w4a4", "nvfp4", "w4a16"])  # fmt: skip
def test_same_inputs_same_bytes(made: Runs, tmp_path: Path, family: str, process: list[Step]) -> None:
    """At every depth, and from a second run; the manifest included."""
    model, found = made.model(family, blocks=2 if family.startswith("t2v-1") else 1), []
    for depth in (0, 1, 3):
        quant(model, tmp_path / str(depth), process, "--read_ahead", depth)
        found.append(snapshot(tmp_path / str(depth)))
    assert found[0] == found[1] == found[2] and len(found[0]) >= 3
    again = run("quant", *command(model, tmp_path / "0", tmp_path / "0.yaml"))
    assert again.returncode == 0 and "already done" in again.stdout and snapshot(tmp_path / "0") == found[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_finished_run_is_known_again(tmp_path: Path, dtype: str) -> None:
    """Though its floats are not in the source's dtype; and so are other weights in the source's place."""
    model, out = source(tmp_path / "model", blocks=1, dtype=dtype), tmp_path / "out"
    quant(model, out, MINMAX)
    before = snapshot(out)
    again = run("quant", *command(model, out, tmp_path / "out.yaml"))
    assert again.returncode == 0 and "already done" in again.stdout and snapshot(out) == before, again.stderr
    shutil.rmtree(model)
    source(model, blocks=1, dtype=dtype, seed=1)
    again = run("quant", *command(model, out, tmp_path / "out.yaml"))
    assert again.returncode == 2 and snapshot(out) == before
    check_error(again, "finished, but from other weights", "--overwrite")


def test_a_set_of_ones_own(made: Runs, tmp_path: Path) -> None:
    """--calib decides the bytes; a run that makes the same inputs itself writes the same weights."""
    model, process = made.model(), svdquant("w4a4", include=FEW)
    sizes = [f"--{key}={CALIBRATION[key]}" for key in ("num_samples", "time_bins", "size", "frame_num")]
    for seed in (0, 1):
        done = run("calib", "--model_path", model, "--save_path", tmp_path / f"set{seed}", *sizes, "--seed", seed,
                   "--device", "cpu", "--quiet")  # fmt: skip
        assert done.returncode == 0, done.stderr
        quant(model, tmp_path / f"out{seed}", process, "--calib", tmp_path / f"set{seed}")
    own = weights(made.out(model, process))
    assert weights(tmp_path / "out0") == own != weights(tmp_path / "out1")
    done = quant(model, tmp_path / "free", MINMAX, "--calib", tmp_path / "set0")
    assert "not used, this recipe needs no data" in done.stderr
