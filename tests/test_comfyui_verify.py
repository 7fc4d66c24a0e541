"""`streamq verify` on ComfyUI's file with damage that is loaded without a word, or with one that says little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, write_tiny
from consumer.load_comfyui import PREFIX, ComfyUI
from test_comfyui import CONVROT, KINDS, rotated
from verify_kit import (
    Entry,
    change,
    copied,
    drop,
    load_all,
    look,
    names,
    put_together,
    rescale,
    retype,
    sign,
    take_apart,
    truncate,
)

from streamq.savers import comfyui

FILES = KINDS | {"convrot": CONVROT}
LAYER = "blocks.1.self_attn.q"
pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module", params=[*FILES, "prefixed"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(source, output, what stands before every name) of a small model in bf16."""
    root, prefix = tmp_path_factory.mktemp(request.param), PREFIX if request.param == "prefixed" else ""
    source = write_tiny(root / "model", "t2v-1.3B", blocks=2, dtype="bf16")
    more: dict[str, tuple[object, ...]] = {
        "convrot": ("--config_path", rotated(root / "recipe.yaml", 16)),
        "prefixed": ("--quant_type", "w8a8", "--layout", "prefixed"),
    }
    done = run("quant", "--model_path", source, "--save_path", root / "out", "--format", "comfyui", "--device", "cpu",
               "--quiet", *more.get(request.param, ("--quant_type", request.param)))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return source, root / "out", prefix


NAMES = (
    f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{LAYER}.comfy_quant", f"{LAYER}.bias", "blocks.0.norm3.bias",
    "blocks.0.cross_attn.norm_k.weight", "blocks.1.modulation", "text_embedding.2.bias", "head.head.weight",
)  # fmt: skip
WAYS = {"dropped": drop, "truncated": truncate, "retyped": retype}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_lost_or_bent_tensor_shows(written: tuple[Path, Path, str], tmp_path: Path, name: str, way: str) -> None:
    """By checksums; with a manifest that was signed anew; without any; and beside the source."""
    source, out, prefix = written
    folder = copied(out, tmp_path / "out", manifest=True)
    change(folder, prefix + name, WAYS[way])
    assert any("sha256" in problem for problem in look(folder).problems)
    sign(folder)
    assert names(name, look(folder).problems)
    (folder / "streamq.json").unlink()
    assert names(name, look(folder).problems)
    assert look(folder, source).problems != []


@pytest.mark.parametrize("name", [name for name in NAMES if "comfy_quant" not in name])
def test_another_value_shows_beside_the_source(written: tuple[Path, Path, str], tmp_path: Path, name: str) -> None:
    source, out, prefix = written
    folder = copied(out, tmp_path / "out", manifest=False)
    change(folder, prefix + name, rescale)
    assert names(name, look(folder, source).problems)


def test_an_undamaged_folder_has_no_problem(written: tuple[Path, Path, str], tmp_path: Path) -> None:
    source, out, _ = written
    assert look(out).problems == look(out, source).problems == []
    assert look(copied(out, tmp_path / "out", manifest=False), source).problems == []


# -- A layer's JSON, and the metadata ----------------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def note(text: str | bytes) -> Spoil:
    """A layer's JSON becomes this, in the tensor alone."""
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda folder: change(folder, f"{LAYER}.comfy_quant", lambda entry: ("U8", [len(raw)], raw))


def everywhere(conf: dict[str, Any]) -> Spoil:
    """A layer's JSON becomes this, in the tensor and in the metadata."""

    def spoil(folder: Path) -> None:
        note(json.dumps(conf))(folder)
        metadata(lambda layers: layers.update({LAYER: conf}))(folder)

    return spoil


def metadata(do: Callable[[dict[str, Any]], object]) -> Spoil:
    """The metadata's `layers` are changed."""

    def spoil(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        held, tensors = take_apart(path)
        document = json.loads(held["_quantization_metadata"])
        do(document["layers"])
        put_together(path, held | {"_quantization_metadata": json.dumps(document)}, tensors)

    return spoil


def text(value: str | None) -> Spoil:
    """The metadata become this."""

    def spoil(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        held, tensors = take_apart(path)
        put_together(path, {} if value is None else held | {"_quantization_metadata": value}, tensors)

    return spoil


def tensors(do: Callable[[dict[str, Entry]], dict[str, Entry]]) -> Spoil:
    def spoil(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        held, found = take_apart(path)
        put_together(path, held, do(found))

    return spoil


def add(name: str, entry: Entry) -> Spoil:
    return tensors(lambda found: found | {name: entry})


def prefix_one(folder: Path) -> None:
    """A single tensor without the others' prefix, or with one that they have not."""
    tensors(lambda found: {(PREFIX + n if n == "head.head.bias" else n): e for n, e in found.items()})(folder)


def second(folder: Path) -> None:
    (folder / "lora.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")


INT8 = {"format": "int8_tensorwise"}
FP8 = {"format": "float8_e4m3fn"}
DAMAGE: dict[str, tuple[str, Spoil, str]] = {
    "no JSON": ("w8a8", note("not JSON"), "not valid JSON"),
    "JSON in another encoding": ("w8a8", note(json.dumps(INT8).encode("utf-16")), "not valid JSON"),
    "a list": ("w8a8", note("[]"), "without a format"),
    "no format": ("w8a8", note('{"convrot": false}'), "without a format"),
    "another loader's format": ("w8a8", everywhere({"format": "nvfp4"}), "'nvfp4'; streamq knows int8_tensorwise"),
    "int8 said to be fp8": ("w8a8", everywhere(FP8), "I8, but comfy_quant says float8_e4m3fn"),
    "fp8 said to be int8": ("fp8", everywhere(INT8), "F8_E4M3, but comfy_quant says int8_tensorwise"),
    "convrot of fp8": ("fp8", everywhere(FP8 | {"convrot": True, "convrot_groupsize": 16}), "only of int8_tensorwise"),
    "convrot in groups of 7": ("convrot", everywhere(INT8 | {"convrot": True, "convrot_groupsize": 7}), "one of 16"),
    "convrot in no number": ("convrot", everywhere(INT8 | {"convrot": True, "convrot_groupsize": []}), "one of 16"),
    "convrot in larger groups": ("convrot", everywhere(INT8 | {"convrot": True}), "convrot_groupsize 256, but there"),
    "convrot inside params": ("convrot", everywhere(INT8 | {"params": {"convrot": True}}), "256, but there are 64"),
    "metadata win over the JSON": ("w8a8", metadata(lambda layers: layers.update({LAYER: FP8})), "its comfy_quant"),
    "metadata without a layer": ("w8a8", metadata(lambda layers: layers.pop(LAYER)), f"says nothing of {LAYER}"),
    "metadata of a float layer": ("w8a8", metadata(lambda layers: layers.update({"head.head": INT8})), "head.head"),
    "metadata that are no JSON": ("w8a8", text("{"), "not valid JSON"),
    "metadata without layers": ("w8a8", text("[]"), "no object `layers`"),
    "no mark at all": ("w8a8", tensors(lambda found: {n: e for n, e in found.items() if "comfy_quant" not in n}),
                       "comfy_quant: missing"),
    "a scale beside a float": ("w8a8", add("head.head.weight_scale", ("F32", [], bytes(4))), "head.head"),
    "a JSON beside a float": ("w8a8", add("head.head.comfy_quant", ("U8", [29], json.dumps(INT8).encode())),
                              "head.head"),
    "a second file": ("w8a8", second, "a second file"),
    "a prefix on one": ("w8a8", prefix_one, "without the prefix"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each type."""
    root = tmp_path_factory.mktemp("comfyui-json")
    source = write_tiny(root / "model", "t2v-1.3B", blocks=2)
    for kind in FILES:
        how = ("--config_path", rotated(root / "recipe.yaml", 16)) if kind == "convrot" else ("--quant_type", kind)
        done = run("quant", "--model_path", source, "--save_path", root / kind, "--format", "comfyui", "--device",
                   "cpu", "--quiet", *how)  # fmt: skip
        assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("case", DAMAGE)
def test_a_json_that_comfyui_would_take_for_another(outputs: Path, tmp_path: Path, case: str) -> None:
    """By itself, without a manifest: and it is a problem of this place only, and no crash beside the source."""
    kind, spoil, says = DAMAGE[case]
    folder = copied(outputs / kind, tmp_path / "out", manifest=False)
    spoil(folder)
    found = look(folder).problems
    assert any(says in problem for problem in found), found
    assert look(folder, outputs / "model").problems != []


def test_every_mark_gone(outputs: Path, tmp_path: Path) -> None:
    """The file's name and its scales still say what it was; with a manifest, so do the checksums."""
    folder = copied(outputs / "w8a8", tmp_path / "out", manifest=True)
    tensors(lambda found: {n: e for n, e in found.items() if "comfy_quant" not in n})(folder)
    text(None)(folder)
    sign(folder)
    found = look(folder).problems
    assert sum("comfy_quant: missing" in problem for problem in found) == 20


def test_convrot_forgotten(outputs: Path, tmp_path: Path) -> None:
    """Sound JSON, sound codes, and another weight: only the source tells."""
    folder = copied(outputs / "convrot", tmp_path / "out", manifest=False)
    everywhere(INT8)(folder)
    assert look(folder).problems == []
    assert any("relative error" in problem and LAYER in problem for problem in look(folder, outputs / "model").problems)


@pytest.mark.parametrize("conf", [INT8 | {"full_precision_matrix_mult": True}, INT8 | {"per_row": True}])
def test_what_is_optional_is_no_problem(outputs: Path, tmp_path: Path, conf: dict[str, Any]) -> None:
    folder = copied(outputs / "w8a8", tmp_path / "out", manifest=False)
    everywhere(conf)(folder)
    assert look(folder, outputs / "model").problems == []
    text(None)(folder)
    assert look(folder, outputs / "model").problems == []
    assert ComfyUI(folder / KINDS["w8a8"]).conf[LAYER] == conf


def test_a_scale_that_was_never_rounded(outputs: Path, tmp_path: Path) -> None:
    """The manifest says that streamq made it; another tool's scales are its own business."""
    for kind in ("w8a8", "fp8"):
        folder = copied(outputs / kind, tmp_path / kind, manifest=True)

        def bend(entry: Entry) -> Entry:
            values = torch.frombuffer(bytearray(entry[2]), dtype=torch.float32) * 1.003
            return entry[0], entry[1], values.numpy().tobytes()

        change(folder, f"{LAYER}.weight_scale", bend)
        sign(folder)
        (problem,) = look(folder).problems
        assert f"{LAYER}.weight_scale" in problem and "bf16" in problem
        (folder / "streamq.json").unlink()
        assert look(folder).problems == []


def test_codes_that_are_no_number(outputs: Path, tmp_path: Path) -> None:
    folder = copied(outputs / "fp8", tmp_path / "out", manifest=False)
    change(folder, f"{LAYER}.weight", lambda entry: (entry[0], entry[1], entry[2][:-1] + b"\xff"))
    assert any("NaN" in problem for problem in look(folder, outputs / "model").problems)


@pytest.mark.parametrize("kind", FILES)
def test_decode_is_comfy_kitchens(outputs: Path, kind: str) -> None:
    """What verify compares with the source is what is computed with."""
    held, made = load_all(outputs / kind), ComfyUI(outputs / kind / FILES[kind])
    for layer in made.layers:
        tensors = {n.removeprefix(f"{layer}."): t for n, t in held.items() if n.startswith(f"{layer}.")}
        rows = comfyui.decode(tensors)
        whole = torch.cat([rows(slice(0, 5)), rows(slice(5, None))])
        assert torch.allclose(whole, made.weight(layer), rtol=1e-6, atol=1e-7), layer
        assert comfyui.contradictions(tensors) == []
