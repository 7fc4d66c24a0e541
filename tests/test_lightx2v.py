"""LightX2V's reading of its folders: names, dtypes, both layouts, two experts; and what `verify` sees of damage."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from consumer.load_lightx2v import LightX2V
from consumer.made import FAMILIES, Made, Model, decode, linear, recipe
from consumer.wan_block import Weights, apart
from consumer.wan_block import run as forward
from safetensors.torch import load_file, save_file
from torch import Tensor

SMOOTH = {"type": "smooth_quant", "alpha": 0.5}
pytestmark = pytest.mark.usefixtures("one_core")
Make = Callable[..., Made]
Poke = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make("t2v-1.3B", "smooth")`: once a module."""
    root = tmp_path_factory.mktemp("lightx2v")
    models: dict[tuple[str, str], Model] = {}
    made: dict[tuple[str, ...], Made] = {}
    steps: dict[str, list[dict[str, Any]]] = {
        "smooth": [SMOOTH, linear()],
        "plain": [linear()],
        "cross": [SMOOTH | {"include": ["*cross_attn*"]}, linear()],
        "self": [SMOOTH | {"include": ["*self_attn*"]}, linear()],
        "ffn": [SMOOTH | {"include": ["*ffn.0"]}, linear()],
        "one-block": [SMOOTH | {"include": ["blocks.1.*"]}, linear()],
        "static": [SMOOTH, linear("per_tensor", False)],
    }

    def give(family: str, name: str, form: str = "lightx2v", dtype: str = "fp32", *more: object) -> Made:
        model = models.get((family, dtype)) or Model(root / f"{family}-{dtype}", family, dtype)
        models[family, dtype] = model
        key = (family, name, form, dtype, *map(str, more))
        if key not in made:
            path = recipe(root / f"{name}.yaml", *steps[name])
            made[key] = Made(model, root / "-".join(key).replace("/", ""), form, path, *more)
        return made[key]

    return give


def read(made: Made, expert: str = "", **how: Any) -> LightX2V:
    found = made.reader(expert, **how)
    assert isinstance(found, LightX2V)
    return found


def worst(made: Made, expert: str = "", **how: Any) -> float:
    """The output's error against the float model, over the set's samples."""
    floats, mine = Weights(made.model.floats(expert)), read(made, expert, **how)
    ends = ((forward(w, s, 2, made.model.vace_layers) for w in (mine, floats)) for s in made.model.samples(expert))
    return max(apart(*pair) for pair in ends)


# -- Loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["block", "single"])
@pytest.mark.parametrize("name", ["smooth", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_registered_name_is_there_and_no_other(make: Make, family: str, name: str, layout: str) -> None:
    made = make(family, name, "lightx2v", "fp32", "--layout", layout)
    for expert in made.model.experts:
        loaded = read(made, expert)
        assert loaded.unused() == set()
        assert (loaded.config.get("quant_method") == "advanced_ptq") == (name == "smooth")
        assert any(".affine_norm" in tensor for tensor in loaded.tensors) == (name == "smooth")
        assert set(loaded.names.layers) == set(made.layers(expert))
        for tensor, value in loaded.tensors.items():
            if ".affine_norm" in tensor:
                assert value.dtype == torch.float32 and value.shape == (loaded.config["dim"],)
                assert bool((value > 0).all())
        files = sorted(path.name for path in (made.out / expert).glob("*.safetensors"))
        if layout == "single":
            assert files == ["diffusion_pytorch_model.safetensors"]
            continue
        assert files == ["block_0.safetensors", "block_1.safetensors", "non_block.safetensors"]
        for path in (made.out / expert).glob("block_*.safetensors"):
            number = path.stem.removeprefix("block_")
            assert all(tensor.startswith(f"blocks.{number}.") for tensor in load_file(path))
        index = json.loads((made.out / expert / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(loaded.tensors)


def test_layouts_hold_the_same_tensors(make: Make) -> None:
    block, single = (read(make("i2v-14B", "smooth", "lightx2v", "fp32", "--layout", layout)).tensors
                     for layout in ("block", "single"))  # fmt: skip
    assert block.keys() == single.keys()
    assert all(torch.equal(block[name], single[name]) for name in block)


def test_experts_have_vectors_of_their_own(make: Make) -> None:
    made = make("t2v-A14B", "smooth", "lightx2v", "fp32", "--layout", "block")
    high, low = (read(made, expert).tensors["blocks.0.affine_norm1.weight"] for expert in made.model.experts)
    assert not torch.equal(high, low)


@pytest.mark.parametrize("name", ["cross", "self", "ffn", "one-block"])
def test_a_recipe_that_smooths_a_part_is_loaded_and_right(make: Make, name: str) -> None:
    """With `advanced_ptq` LightX2V looks up both affine tensors in every block."""
    made = make("t2v-1.3B", name)
    assert read(made).unused() == set()
    assert worst(made) < 0.02 and worst(made, act=False, exact=True) < 0.02
    verdict = run("verify", made.out, "--source", made.model.native, "--json")
    assert verdict.returncode == 0, verdict.stdout


def test_verify_misses_no_affine_tensor_that_lightx2v_looks_up(make: Make, tmp_path: Path) -> None:
    made = make("t2v-1.3B", "smooth")
    folder = Path(shutil.copytree(made.out, tmp_path / "out"))
    change(folder, {f"blocks.0.affine_norm3.{leaf}": None for leaf in ("weight", "bias")})
    assert run("verify", folder, "--json").returncode == 1


@pytest.mark.parametrize("name", ["smooth", "plain"])
def test_match_and_smoothing(make: Make, name: str) -> None:
    """`--match lightx2v` keeps the converter's arithmetic where nothing is smoothed; the folder is sound either way."""
    made = make("t2v-1.3B", name, "lightx2v", "bf16", "--match", "lightx2v")
    verdict = run("verify", made.out, "--source", made.model.native, "--json")
    assert verdict.returncode == 0, verdict.stdout


# -- Damage ------------------------------------------------------------------------------------------------------------


def change(folder: Path, tensors: dict[str, Poke | None]) -> None:
    """Change tensors (None: remove), and sign the folder anew, so that no checksum tells."""
    left = set(tensors)
    for path in folder.rglob("*.safetensors"):
        held, mode = load_file(path), path.stat().st_mode
        mine = left & held.keys()
        for name in mine:
            poke = tensors[name]
            if poke is None:
                del held[name]
            else:
                held[name] = poke(held[name].clone()).contiguous()
        if mine:
            save_file(held, path)
            path.chmod(mode)
        left -= mine
    assert not left, left
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    for name in (n for n, poke in tensors.items() if poke is None and index.is_file()):
        document = json.loads(index.read_text())
        del document["weight_map"][name]
        index.write_text(json.dumps(document))
    description = next(folder.glob("quant_model_description*.json"), None)
    assert description is None or None not in tensors.values()
    sign(folder)


def sign(folder: Path) -> None:
    """Make the manifest's sizes and checksums those of the files."""
    manifest = json.loads((folder / "streamq.json").read_text())
    for name, about in manifest["files"].items():
        data = (folder / name).read_bytes()
        about |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if "tensors" in about:
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            spans = {key: value["data_offsets"] for key, value in header.items()}
            about["tensors"] = {
                key: hashlib.sha256(data[8 + length + a : 8 + length + b]).hexdigest() for key, (a, b) in spans.items()
            }
    (folder / "streamq.json").write_text(json.dumps(manifest))


def one(factor: float) -> Poke:
    """A single element, the largest, times a factor."""

    def poke(tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        flat[int(flat.abs().argmax())] = flat[int(flat.abs().argmax())] * factor
        return tensor

    return poke


def whole(factor: float) -> Poke:
    return lambda tensor: (tensor * factor).to(tensor.dtype)


def vector(group: str, poke: Poke) -> Callable[[Path], None]:
    """Change a vector in streamq.json."""

    def act(folder: Path) -> None:
        manifest = json.loads((folder / "streamq.json").read_text())
        (made,) = manifest["formats"].values()
        values = poke(decode(made["smoothing"][group]["values"]))
        made["smoothing"][group]["values"] = base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
        (folder / "streamq.json").write_text(json.dumps(manifest))

    return act


def tensors(*names: str, poke: Poke) -> Callable[[Path], None]:
    return lambda folder: change(folder, dict.fromkeys(names, poke))


Q, V = "blocks.1.self_attn.q", "blocks.1.self_attn.v"
DAMAGE: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "affine weight": ("smooth", "lightx2v", tensors("blocks.1.affine_norm1.weight", poke=one(1.5))),
    "affine bias": ("smooth", "lightx2v", tensors("blocks.1.affine_norm3.bias", poke=one(1.5))),
    "all affine": ("smooth", "lightx2v", tensors("blocks.1.affine_norm1.weight", "blocks.1.affine_norm1.bias",
                                                  poke=whole(2))),
    "folded norm weight": ("smooth", "lightx2v", tensors("blocks.1.norm3.weight", poke=one(1.01))),
    "folded norm bias": ("smooth", "lightx2v", tensors("blocks.1.norm3.bias", poke=one(1.01))),
    "folded v scale": ("smooth", "lightx2v", tensors(f"{V}.weight_scale", poke=one(1.5))),
    "folded v bias": ("smooth", "lightx2v", tensors(f"{V}.bias", poke=one(1.01))),
    "vector beside a norm": ("smooth", "lightx2v", vector("blocks.1.attn1.in", one(2))),
    "vector in a norm": ("smooth", "lightx2v", vector("blocks.1.attn2.in", one(1.01))),
    "vector in rows": ("smooth", "lightx2v", vector("blocks.1.attn1.out", one(1.01))),
    "mul_scale": ("static", "mindie", tensors(f"{Q}.div.mul_scale", poke=one(1.5))),
    "all mul_scale": ("static", "mindie", tensors(f"{Q}.div.mul_scale", poke=whole(1.05))),
    "mindie rows bias": ("static", "mindie", tensors(f"{V}.linear.bias", poke=one(1.01))),
    "mindie vector in rows": ("static", "mindie", vector("blocks.1.attn1.out", one(1.01))),
    "input_scale": ("static", "mindie", tensors(f"{Q}.linear.input_scale", poke=whole(1.05))),
    "deq_scale": ("static", "mindie", tensors(f"{Q}.linear.deq_scale", poke=whole(1.05))),
    "quant_bias": ("static", "mindie", tensors(f"{Q}.linear.quant_bias", poke=one(1.5))),
    "input_offset": ("static", "mindie", tensors(f"{Q}.linear.input_offset", poke=lambda t: t + 5)),
    "range of everything": ("static", "mindie", tensors(f"{Q}.linear.input_scale", f"{Q}.linear.deq_scale",
                                                        poke=whole(1.5))),
}  # fmt: skip
# Damage that `verify --source` still overlooks when the checksums agree, as after a fault of streamq's own.


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_sees_damage_behind_right_checksums(make: Make, tmp_path: Path, damage: str) -> None:
    name, form, spoil = DAMAGE[damage]
    made = make("t2v-1.3B", name, form)
    folder = Path(shutil.copytree(made.out, tmp_path / "out"))
    sign(folder)
    assert run("verify", folder, "--source", made.model.native, "--json").returncode == 0
    spoil(folder)
    done = run("verify", folder, "--source", made.model.native, "--json")
    assert done.returncode == 1, damage


@pytest.mark.parametrize("damage", [name for name in DAMAGE if "vector" not in name])
def test_checksums_see_damage(make: Make, tmp_path: Path, damage: str) -> None:
    name, form, spoil = DAMAGE[damage]
    made = make("t2v-1.3B", name, form)
    folder = Path(shutil.copytree(made.out, tmp_path / "out"))
    spoil(folder)
    shutil.copy(made.out / "streamq.json", folder / "streamq.json")
    assert run("verify", folder, "--json").returncode == 1
