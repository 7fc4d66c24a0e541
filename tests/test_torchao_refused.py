"""What the diffusers format refuses before anything is written, what it leaves float, and what it says of loading."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_error, run
from nunchaku_runs import one_thread, tensors_in
from safetensors.torch import load_file, save_file
from torchao_kit import (
    FP8,
    SMOOTH,
    STATIC,
    W8A8,
    W8A16,
    WHOLE,
    Loaded,
    Runs,
    Step,
    command,
    config_of,
    forward,
    inputs,
    metadata,
    quantized,
    step,
    verify,
)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Everything here is small."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("refused"))


def refused(model: Path, what: str | list[Step], tmp: Path, *says: str) -> None:
    """By `plan` and `quant` alike, and nothing is written."""
    for verb in ("plan", "quant"):
        done = run(verb, *command(model, tmp / "out", what))
        assert done.returncode == 2
        check_error(done, *says)
        assert not (tmp / "out").exists()


@pytest.mark.parametrize("family", ["s2v-14B", "animate-14B"])
def test_models_that_diffusers_does_not_know(made: Runs, tmp_path: Path, family: str) -> None:
    model = made.model(family, layout="native", dim=128)
    refused(model, [W8A8], tmp_path, "diffusers: ", f"is a {family.partition('-')[0]} model", "another --format")


def asymmetric() -> Step:
    made = json.loads(json.dumps(STATIC))
    made["qconfig"]["act"]["symmetric"] = False
    return dict(made)


def rotated() -> Step:
    made = json.loads(json.dumps(W8A8))
    made["qconfig"]["weight"] |= {"method": "minmax", "ext": {"convrot": 16}}
    return dict(made)


RECIPES: dict[str, tuple[list[Step], tuple[str, ...]]] = {
    "asymmetric": ([asymmetric()], ("blocks.0.self_attn.q has an asymmetric activation", "act: {symmetric: True}")),
    "rotated": ([rotated()], ("weight.ext.convrot", "comfyui")),
    "fixed outside blocks": (
        [step("int8", scope="per_tensor")], ("lies outside the blocks", 'include: ["blocks.*"]'),
    ),
    "another runtime's type": (
        [{"type": "linear_quant", "qconfig": {"weight": {"scope": "per_block", "dtype": "int4"}}}], ("w4a16", "gguf"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", RECIPES)
def test_recipes_that_torchao_has_no_place_for(made: Runs, tmp_path: Path, wrong: str) -> None:
    process, says = RECIPES[wrong]
    refused(made.model(), process, tmp_path, *says)


def test_smoothing_without_a_place(made: Runs, tmp_path: Path) -> None:
    """Of inputs that are not rounded: said, and quantized without it."""
    done = run("plan", *command(made.model(), tmp_path / "out", [SMOOTH, W8A16]))
    assert done.returncode == 0 and "diffusers: no place for a smoothing scale before" in done.stderr


def test_layouts(made: Runs, tmp_path: Path) -> None:
    done = run("plan", *command(made.model(), tmp_path / "out", [W8A8], "--layout", "single"))
    assert done.returncode == 2
    check_error(done, "--layout single", "not of diffusers")


SOURCES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a bias less": (lambda tensors: tensors.pop("blocks.0.attn1.to_q.bias"), "blocks.0.attn1.to_q.bias is missing"),
    "a norm less": (
        lambda tensors: tensors.pop("condition_embedder.image_embedder.norm1.bias"), "norm1.bias is missing",
    ),
    "a tensor more": (
        lambda tensors: tensors.update({"blocks.0.attn1.to_q.lora": torch.ones(4, 4)}), "lora is no parameter of it",
    ),
    "another width": (
        lambda tensors: tensors.update({"blocks.0.attn2.norm_added_k.weight": torch.ones(4)}), "is [4], [64] there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", SOURCES)
def test_sources_that_are_not_diffusers_class(made: Runs, tmp_path: Path, wrong: str) -> None:
    change, says = SOURCES[wrong]
    model = made.model("i2v-14B", blocks=1) / "transformer"
    changed = tmp_path / "changed"
    changed.mkdir()
    tensors = load_file(model / WHOLE)
    change(tensors)
    save_file(tensors, changed / WHOLE)
    (changed / "config.json").write_text((model / "config.json").read_text())
    refused(changed, [W8A8], tmp_path, "other tensors than diffusers' WanTransformer3DModel", says, "another --format")


def test_sizes_that_e4m3_products_refuse(made: Runs, tmp_path: Path) -> None:
    """The layers stay float, are said to, and listed; the model loads and runs."""
    model = made.model(ffn=136)
    out = made.out(model, [FP8])
    plan = run("plan", *command(model, tmp_path / "out", [FP8]))
    assert "136 outputs and 64 inputs, e4m3 products take multiples of 16" in plan.stderr
    stored = tensors_in(out)
    left = {f"blocks.{i}.ffn.net.{name}" for i in range(2) for name in ("0.proj", "2")}
    assert len(quantized(stored)) == 20 and not left & set(quantized(stored))
    assert set(config_of(out)["quantization_config"]["modules_to_not_convert"]) == left
    loaded = Loaded(out)
    assert bool(torch.isfinite(forward(loaded.model, inputs(loaded.config))).all())
    assert verify(out, "--source", model) == []


def test_int8_takes_any_size(made: Runs) -> None:
    model = made.model(ffn=139)
    out = made.out(model, [W8A8])
    loaded = Loaded(out)
    assert "blocks.0.ffn.net.2" in loaded.layers and len(loaded.layers) == 24
    assert bool(torch.isfinite(forward(loaded.model, inputs(loaded.config))).all())
    assert verify(out, "--source", model) == []


def test_the_padding_of_the_text_is_not_nan(made: Runs) -> None:
    """With torchao's own settings a token of zeros is: without the bound, one NaN is in every output."""
    loaded = Loaded(made.out(made.model(), [FP8]))
    given = inputs(loaded.config)
    assert not given["encoder_hidden_states"][:, -1].any()
    assert bool(torch.isfinite(forward(loaded.model, given)).all())
    first = loaded.model.condition_embedder.text_embedder.linear_1.weight
    assert first.act_quant_kwargs.hp_value_lb == 1e-12
    first.act_quant_kwargs.hp_value_lb = None
    assert not bool(torch.isfinite(forward(loaded.model, given)).any())


# -- What is said of loading -------------------------------------------------------------------------------------------

USAGE: dict[str, tuple[str, list[Step], str, str]] = {
    "t2v": ("t2v-1.3B", [W8A8], "WanTransformer3DModel", "WanPipeline"),
    "i2v": ("i2v-14B", [W8A16], "WanTransformer3DModel", "WanImageToVideoPipeline"),
    "vace": ("vace-1.3B", [FP8], "WanVACETransformer3DModel", "WanVACEPipeline"),
    "experts": ("t2v-A14B", [W8A8], "WanTransformer3DModel", "WanPipeline"),
}


@pytest.mark.parametrize("case", USAGE)
def test_the_card_has_a_program(made: Runs, case: str) -> None:
    """It runs, as far as it needs nothing but what was written."""
    family, process, kind, pipeline = USAGE[case]
    out = made.out(made.model(family, blocks=1), process)
    blocks = (out / "README.md").read_text().split("```")
    program = next(text for text in blocks if "from_pretrained" in text).partition("\n")[2]
    assert f"from diffusers import {kind}, {pipeline}" in program and "torchao==0.18" in program
    assert "bfloat16 only" in program and ("8.9" in program) == (case == "vace")
    *lines, last = program.strip().splitlines()
    folders = [out / "transformer", out / "transformer_2"] if case == "experts" else [out]
    names = ["transformer", "transformer_2"][: len(folders)]
    assert last.startswith(f"pipe = {pipeline}.from_pretrained(") and all(f"{n}={n}" in last for n in names)
    found: dict[str, Any] = {}
    exec("\n".join(lines).replace("PATH_TO_THIS_FOLDER", str(out)), found)
    for name, folder in zip(names, folders, strict=True):
        check_same(found[name].state_dict(), folder)


def check_same(state: Mapping[str, Any], folder: Path) -> None:
    assert list(state) == metadata(folder / WHOLE)["tensor_names"]
    for name, tensor in tensors_in(folder).items():
        if "._weight_" not in name:
            assert torch.equal(state[name], tensor), name
    assert not any(tensor.is_meta for tensor in state.values())
