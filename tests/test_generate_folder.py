"""What `generate` makes of a quantized folder that is no longer what was written: which file, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_error, run
from generate_kit import TOY, forward, opened, short_toy
from safetensors.torch import save_file
from verify_kit import change

from streamq.calibration.store import VERSION, open_set
from streamq.errors import RunError, UsageError
from streamq.generation import GenerateSettings
from streamq.generation.prepare import prepare

pytestmark = pytest.mark.xdist_group("generate_folder")  # one process makes what all of them damage
FORMATS = ("mindie", "lightx2v", "diffusers", "comfyui")
ANEW = "make it anew with streamq quant --overwrite"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return short_toy(tmp_path_factory.mktemp("toy") / "pipeline")


@pytest.fixture(scope="module")
def sound(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    made = run("quant", "--model_path", toy, "--save_path", folder, "--quant_type", "w8a8", "--format",
               ",".join(FORMATS), "--device", "cpu", "--quiet")  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "quantized"))


def weights_of(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def cut(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-8])


def garble(folder: Path) -> None:
    """A dtype that is none, in a header of the same length."""
    path = weights_of(folder)
    path.write_bytes(path.read_bytes().replace(b'"dtype":"I8"', b'"dtype":"X8"', 1))


def lose(folder: Path) -> None:
    weights_of(folder).unlink()


def no_manifest(folder: Path) -> None:
    (folder.parent / "streamq.json").unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def change_it(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.write_text(text)

    return change_it


def remove(name: str) -> Callable[[Path], None]:
    def remove_it(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.unlink()

    return remove_it


def empty_manifest(folder: Path) -> None:
    (folder.parent / "streamq.json").write_text("[]")


Damage = tuple[str, tuple[Callable[[Path], None], ...], tuple[str, ...]]
REFUSED: dict[str, Damage] = {
    "cut": ("comfyui", (cut,), ("comfyui: wan_", "streamq.json says", ANEW)),
    "cut, no manifest": ("mindie", (no_manifest, cut), ("truncated", "copy it, or make it, again")),
    "garbled": ("comfyui", (garble,), ("unknown dtype 'X8'", "known: F64")),
    "lost": ("lightx2v", (lose,), ("is missing, streamq.json says", ANEW)),
    "index": ("lightx2v", (write("*.index.json", "[]"),), (".index.json: no `weight_map`", ANEW)),
    "another index": (
        "lightx2v", (write("*.index.json", '{"weight_map": {"a": "b"}}'),), ("index.json: says a is in b, it is in no",)
    ),
    "manifest": ("diffusers", (empty_manifest,), ("streamq.json: not a manifest", "make the folder anew")),
    "config": ("lightx2v", (write("config.json", "[]"),), ("config.json: not a JSON object", ANEW)),
    "config of diffusers": ("diffusers", (write("config.json", "[]"),), ("config.json: not a JSON object", ANEW)),
    "config, cut": ("mindie", (write("config.json", '{"dim":'),), ("config.json: not valid JSON", ANEW)),
    "description, cut": ("mindie", (write("quant_model_description*.json", "{"),), ("not valid JSON", ANEW)),
    "description": (
        "mindie", (remove("quant_model_description*.json"),),
        ("streamq.json says mindie", "quant_model_description", "missing", ANEW),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_damage_is_named_with_advice_that_fits(toy: Path, copied: Path, tmp_path: Path, case: str) -> None:
    form, damage, says = REFUSED[case]
    for do in damage:
        do(copied / form)
    place = copied / form
    result = run("generate", "--model_path", toy, "--save_path", tmp_path / "videos", "--prompt", "a", "--size",
                 "64*64", "--frame_num", 1, "--device", "cpu", "--transformer", place)  # fmt: skip
    assert result.returncode == 2
    check_error(result, *says)
    assert "download" not in result.stderr and not (tmp_path / "videos").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_needed_may_be_gone(toy: Path, copied: Path, tmp_path: Path, form: str) -> None:
    """Headers and the pipeline say the same as index, manifest and config."""
    folder = copied / form

    def types() -> Any:
        settings = GenerateSettings(str(toy), tmp_path / "v", ("a",), transformer=folder, size=(64, 64), device="cpu")
        (weights,) = prepare(settings).weights
        return weights.types, weights.model.native_config, sorted(weights.units["blocks.0"].layers)

    before = types()
    assert sum(before[0].values()) > 0
    no_manifest(folder)
    for path in (*folder.glob("*.index.json"), folder / "config.json"):
        path.unlink(missing_ok=True)
    assert types() == before


def test_a_format_that_config_json_tells(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    folder.mkdir()
    tensors = {"qweight": torch.zeros(2, 2, dtype=torch.int32), "weight": torch.zeros(2, 2, dtype=torch.int8)}
    save_file({f"blocks.0.attn1.to_q.{leaf}": tensor for leaf, tensor in tensors.items()}, folder / "a.safetensors")
    result = run("generate", "--model_path", toy, "--save_path", tmp_path / "v", "--prompt", "a", "--transformer",
                 folder)  # fmt: skip
    check_error(result, "cannot be told without its config.json, which is missing")


@pytest.mark.parametrize(("form", "name"), [("mindie", "weight_scale"), ("diffusers", "_weight_scale"),
                                            ("comfyui", "bias")])  # fmt: skip
def test_a_scale_that_is_no_number_is_told_by_its_layer(copied: Path, form: str, name: str) -> None:
    layer = "blocks.0.attn1.to_k" if form == "diffusers" else "blocks.0.self_attn.k"
    stored = f"{layer}.{name}"

    def spoil(entry: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
        dtype, shape, raw = entry
        bad = {"F32": b"\x00\x00\xc0\x7f", "BF16": b"\x80\x7f"}[dtype]
        return dtype, shape, raw[: -len(bad)] + bad

    change(copied / form, stored, spoil)
    with opened(copied / form, torch.float32) as transformer, pytest.raises(RunError) as told:
        forward(transformer.module, torch.float32)
    for text in (f"{stored} in {form}/", ".safetensors: NaN or Inf", str(copied / form), "streamq verify"):
        assert text in str(told.value)


def test_verify_and_inspect_give_the_same_advice(copied: Path) -> None:
    cut(copied / "comfyui")
    problems = json.loads(run("verify", copied / "comfyui", "--json").stdout)["problems"]
    assert any(ANEW in problem for problem in problems) and not any("download" in problem for problem in problems)
    check_error(run("inspect", copied / "comfyui"), ANEW)


@pytest.mark.parametrize(("name", "says"), [("calib.json", "not valid JSON"), ("inputs.safetensors", "truncated")])
def test_a_damaged_calibration_set_is_to_be_made_again(tmp_path: Path, name: str, says: str) -> None:
    about = {"file": "inputs.safetensors", "sha256": "", "shapes": {}, "samples": []}
    (tmp_path / "calib.json").write_text(json.dumps({"calib": VERSION, "experts": {"": about}}))
    save_file({"a": torch.zeros(8)}, tmp_path / "inputs.safetensors")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-8])
    with pytest.raises(UsageError, match=f"{name}.*{says}.*make the set again with streamq calib"):
        open_set(tmp_path)


def test_the_toy_itself_is_no_folder_of_ours(tmp_path: Path) -> None:
    """Of a float folder the advice stays what it was."""
    place = Path(shutil.copytree(TOY / "transformer", tmp_path / "float"))
    cut(place)
    result = run("generate", "--model_path", TOY, "--save_path", tmp_path / "v", "--prompt", "a", "--transformer",
                 place)  # fmt: skip
    check_error(result, "truncated", "download it again")
