"""What the nunchaku format refuses: by plan and by quant, in one line that names the key, before anything is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_error, run, within
from nunchaku_runs import (
    SEARCH,
    SMOOTH,
    Runs,
    Step,
    command,
    one_thread,
    operands,
    source,
    step,
    svdquant,
    write_recipe,
)
from safetensors.torch import load_file, save_file

INT8 = {"type": "linear_quant", "qconfig": {"act": {"scope": "per_token", "dtype": "int8"}, "weight": {}}}
MINMAX = [step("w4a4")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Models, once a module."""
    return Runs(tmp_path_factory.mktemp("refused"))


def refused(model: Path, process: list[Step], tmp: Path, *says: str, options: tuple[object, ...] = ()) -> None:
    """By plan and quant, with exit status 2 and the same line, before anything is read or written."""
    recipe = write_recipe(tmp / "recipes" / "recipe.yaml", process)
    lines = []
    for name in ("plan", "quant"):
        with within(6):
            done = run(name, *command(model, tmp / "out", recipe, "--quiet", *options))
        assert done.returncode == 2 and done.stdout == "", done.stderr
        check_error(done, *says)
        lines.append(done.stderr.splitlines()[-1])
    assert lines[0] == lines[1] and not (tmp / "out").exists()


def test_no_layer_fits(made: Runs, tmp_path: Path) -> None:
    small, ranks = made.model(dim=64, ffn=128), svdquant("w4a4", ext={"rank": 144})
    refused(small, MINMAX, tmp_path, "nunchaku", "64 outputs", "multiples of 128")
    refused(made.model(), ranks, tmp_path, "nunchaku", "rank 144", "128")
    refused(made.model(), svdquant("w4a4", ext={"rank": 144}, include=["*.ffn.0"]), tmp_path, "rank 144", "128")


def changed(one: Step, path: str, value: Any) -> dict[str, Any]:
    """A step with the value at a dotted path set."""
    made = json.loads(json.dumps(one))
    *way, last = path.split(".")
    place = made
    for key in way:
        place = place.setdefault(key, {})
    place[last] = value
    return made


def also(qconfig: Step) -> list[Step]:
    return [{"include": ["*ffn*"], "qconfig": qconfig}]


SVDQUANT, WEIGHT, SMOOTHING = step("w4a4", "svdquant"), "spec.process.0.qconfig.weight", "spec.process.0"
BAD: dict[str, tuple[list[Step], tuple[str, ...]]] = {
    "int8": ([INT8], ("type w8a8", "format nunchaku", "mindie, lightx2v", "w4a4, w4a4_nvfp4, w4a16")),
    "int8 among others": ([step("w4a16", overrides=also(INT8["qconfig"]))], ("spec.process.0.overrides.0|type w8a8",)),
    "two precisions": (
        [step("w4a4", overrides=also(operands("w4a4_nvfp4", "minmax")))],
        ("type w4a4 for blocks.0.self_attn.q", "w4a4_nvfp4 for blocks.0.ffn.0", "w4a16 for some"),
    ),
    "two ranks": (
        [step("w4a4", "svdquant", overrides=also(operands("w4a4", "svdquant", rank=32)))],
        ("rank 16 for blocks.0.self_attn.q", "32 for blocks.0.ffn.0", "one rank"),
    ),
    "a rank and none": (
        [step("w4a4", "svdquant", ext={"rank": 32}, overrides=also({"weight": {"method": "minmax"}}))],
        ("rank 32", "16 for blocks.0.ffn.0", "without svdquant has rank 16"),
    ),
    "rank 24": ([step("w4a4", "svdquant", ext={"rank": 24})], (f"{WEIGHT}.ext.rank: 24", "multiple of 16")),
    "rank 0": ([step("w4a4", "svdquant", ext={"rank": 0})], (f"{WEIGHT}.ext.rank: 0", "from 16 to 1024")),
    "rank 2048": ([step("w4a4", "svdquant", ext={"rank": 2048})], (f"{WEIGHT}.ext.rank: 2048", "from 16 to 1024")),
    "no round": ([step("w4a4", "svdquant", ext={"rounds": 0})], (f"{WEIGHT}.ext.rounds: 0", "from 1")),
    "unknown svd": ([step("w4a4", "svdquant", ext={"svd": "fast"})], (f"{WEIGHT}.ext.svd", "randomised")),
    "misspelt key": ([step("w4a4", "svdquant", ext={"ranks": 32})], (f"{WEIGHT}.ext.ranks", "nearest: rank")),
    "rank without svdquant": (
        [changed(MINMAX[0], "qconfig.weight.ext.rank", 32)],
        (f"{WEIGHT}.ext.rank", "known here"),
    ),
    "awq before w4a4": (
        [{"type": "smooth_quant", "method": "awq"}, SVDQUANT],
        (f"{SMOOTHING}.method: awq", "w4a4", "svdquant, or smoothquant"),
    ),
    "searched alpha before w4a4": (
        [{"type": "smooth_quant", "alpha": "search"}, SVDQUANT], (f"{SMOOTHING}.method: search", "w4a4", "svdquant"),
    ),
    "grid of smoothquant": ([SMOOTH | {"grid": "full"}, SVDQUANT], (f"{SMOOTHING}.grid", "smoothquant")),
    "rows of smoothquant": ([SMOOTH | {"rows": 64}, SVDQUANT], (f"{SMOOTHING}.rows", "smoothquant")),
    "no such grid": ([SEARCH | {"grid": "none"}, SVDQUANT], (f"{SMOOTHING}.grid: 'none'", "full, coarse")),
    "no rows": ([SEARCH | {"rows": 0}, SVDQUANT], (f"{SMOOTHING}.rows: 0", "whole number from 1")),
    "smoothing behind": ([SVDQUANT, SEARCH], ("spec.process.1", "before")),
    "symmetric w4a16": (
        [changed(step("w4a16"), "qconfig.weight.symmetric", True)], (f"{WEIGHT}.symmetric: True", "w4a16"),
    ),
    "asymmetric w4a4": ([changed(SVDQUANT, "qconfig.weight.symmetric", False)], (f"{WEIGHT}.symmetric: False", "w4a4")),
    "asymmetric input": (
        [changed(SVDQUANT, "qconfig.act.symmetric", False)], ("spec.process.0.qconfig.act.symmetric: False",),
    ),
    "clipped input": ([changed(SVDQUANT, "qconfig.act.method", "mse")], ("spec.process.0.qconfig.act.method: 'mse'",)),
    "gptq of w4a4": ([step("w4a4", "gptq")], (f"{WEIGHT}.method: 'gptq'", "minmax, svdquant")),
    "mse of nvfp4": ([step("w4a4_nvfp4", "mse")], (f"{WEIGHT}.method: 'mse'", "w4a4_nvfp4")),
    "svdquant of w4a16": ([step("w4a16", "svdquant")], (f"{WEIGHT}.method: 'svdquant'", "minmax, mse, gptq")),
    "a scale per token": ([changed(SVDQUANT, "qconfig.act.scope", "per_token")], ("spec.process.0.qconfig:", "per_t")),
    "a scale per row": ([changed(SVDQUANT, "qconfig.weight.scope", "per_channel")], ("qconfig", "int4 per_channel")),
    "nvfp4 by int4": ([changed(SVDQUANT, "qconfig.act.dtype", "nvfp4")], ("spec.process.0.qconfig", "nvfp4", "int4")),
    "nothing taken": ([step("w4a4", include=["*nowhere*"])], ("spec.process.0.include.0", "nowhere")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes(made: Runs, tmp_path: Path, name: str) -> None:
    process, says = BAD[name]
    refused(made.model(), process, tmp_path, *says)


OPTIONS: dict[str, tuple[list[Step], tuple[object, ...], tuple[str, ...]]] = {
    "4 bits for mindie": (MINMAX, ("--format", "mindie"), ("type w4a4", "format mindie", "written for nunchaku")),
    "4 bits for lightx2v": ([step("w4a16")], ("--format", "lightx2v"), ("type w4a16", "lightx2v", "for nunchaku")),
    "int8 for both": ([INT8], ("--format", "lightx2v,nunchaku"), ("type w8a8", "nunchaku", "mindie, lightx2v")),
    "4 bits for both": (MINMAX, ("--format", "nunchaku,lightx2v"), ("type w4a4", "lightx2v", "for nunchaku")),
    "single in shards": (MINMAX, ("--layout", "single", "--max_shard_size", "1MB"), ("--layout single", "max_shard")),
    "bytes of another tool": (MINMAX, ("--match", "msmodelslim"), ("--match msmodelslim", "mindie")),
    "no such set": (svdquant("w4a4"), ("--calib", "nowhere"), ("nowhere",)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(made: Runs, tmp_path: Path, name: str) -> None:
    process, options, says = OPTIONS[name]
    refused(made.model(), process, tmp_path, *says, options=options)


@pytest.mark.parametrize(("kind", "form"), [("w4a4", "mindie"), ("w4a4", "lightx2v,nunchaku"), ("w8a8", "nunchaku")])
def test_types_by_name_go_into_their_format(made: Runs, tmp_path: Path, kind: str, form: str) -> None:
    done = run(
        "plan", "--model_path", made.model(), "--save_path", tmp_path / "x", "--quant_type", kind, "--format", form
    )
    assert done.returncode == 2
    check_error(done, f"--quant_type {kind}", "not written in the format", "nunchaku|mindie, lightx2v")


def test_models_that_diffusers_has_no_class_for(tmp_path: Path) -> None:
    for family in ("s2v-14B", "animate-14B"):
        refused(source(tmp_path / family, family), MINMAX, tmp_path, "nunchaku", family.partition("-")[0])


def test_a_quantized_folder_is_no_source(made: Runs, tmp_path: Path) -> None:
    refused(made.out(made.model(), MINMAX), MINMAX, tmp_path, "quantized already|not a Wan transformer")


def changed_source(made: Runs, tmp: Path, change: Any) -> Path:
    """A copy of a model of one block whose tensors `change` has had."""
    model = Path(shutil.copytree(made.model(blocks=1), tmp / "model"))
    (path,) = model.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return model


STRANGE = {
    "a layer without a bias": (lambda t: t.pop("blocks.0.self_attn.q.bias"), "blocks.0.attn1.to_q.bias"),
    "a module too many": (lambda t: t.update({"ref_conv.weight": torch.ones(128, 16)}), "ref_conv.weight"),
    "a module too many in blocks": (
        lambda t: t.update({"blocks.0.face.weight": torch.ones(8)}),
        "blocks.0.face.weight",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_sources_that_diffusers_class_is_not(made: Runs, tmp_path: Path, name: str) -> None:
    """The plan knows all names that would be written, and all that diffusers' class has."""
    change, says = STRANGE[name]
    refused(changed_source(made, tmp_path, change), MINMAX, tmp_path, "nunchaku", says)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_damaged_sources_are_named(made: Runs, tmp_path: Path, value: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.self_attn.q.weight"][3, 5] = float(value)

    model = changed_source(made, tmp_path, spoil)
    for process in (
        [step("w4a4")],
        [step("w4a4_nvfp4")],
        svdquant("w4a4"),
        [step("w4a16", "mse", ext={"weighted": False})],
    ):
        recipe = write_recipe(tmp_path / "recipe.yaml", process)
        with one_thread():
            done = run("quant", *command(model, tmp_path / "out", recipe, "--quiet", "--overwrite", "--no_resume"))
        assert done.returncode == 1
        check_error(done, "blocks.0.self_attn.q.weight in model/", "NaN or Inf")
