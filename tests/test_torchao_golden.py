"""The diffusers format against what diffusers and torchao themselves saved of the same model (`tests/data/torchao`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import run
from nunchaku_runs import one_thread, tensors_in, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao_kit import DATA, STEM, WHOLE, Runs, bits, config_of, forward, header, layer, metadata, quantized, verify

from streamq import wan

SOURCE = DATA / "source"
TYPES = ("w8a16", "w8a8")
INDEX = f"{WHOLE}.index.json"


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Everything here is small."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("golden"))


def out_of(made: Runs, kind: str, *more: object, model: Path = SOURCE) -> Path:
    return made.out(model, f"{kind}_diffusers", *more)


def output(folder: Path) -> Tensor:
    """Of stock diffusers, on the golden data's inputs."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    io = load_file(DATA / "io.safetensors")
    given = {name: io[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    return forward(model, given | {"timestep": io["timestep"]})


def check_equal(folder: Path, golden: Path) -> None:
    made, due = tensors_in(folder), tensors_in(golden)
    assert made.keys() == due.keys()
    for name, tensor in due.items():
        assert (made[name].dtype, made[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(made[name]) == bits(tensor), name


@pytest.mark.parametrize("kind", TYPES)
def test_equal_to_what_torchao_saved(made: Runs, kind: str) -> None:
    folder, golden = out_of(made, kind), DATA / f"golden_{kind}"
    check_equal(folder, golden)
    assert metadata(folder / WHOLE) == metadata(golden / WHOLE)
    assert config_of(folder) == config_of(golden)
    assert {path.name for path in folder.iterdir()} == {WHOLE, "config.json", "README.md", "streamq.json"}
    assert torch.equal(output(folder), output(golden))
    assert verify(folder, "--source", SOURCE) == verify(golden) == verify(golden, "--source", SOURCE) == []


def test_the_command_line(made: Runs, tmp_path: Path) -> None:
    """By type and format, without a recipe, in a process like a user's."""
    more = ("--quant_type", "w8a16", "--format", "diffusers", "--device", "cpu", "--quiet")
    done = run("quant", "--model_path", SOURCE, "--save_path", tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == weights(out_of(made, "w8a16"))


@pytest.mark.parametrize("kind", TYPES)
def test_shards(made: Runs, kind: str) -> None:
    """All of the metadata is in every shard; nothing else depends on where a tensor lies."""
    whole, folder = out_of(made, kind), out_of(made, kind, "--max_shard_size", "30KB")
    paths = sorted(folder.glob("*.safetensors"))
    count = len(paths)
    assert count > 4 and [path.name for path in paths] == [
        f"{STEM}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert all(metadata(path) == metadata(whole / WHOLE) for path in paths)
    check_equal(folder, whole)
    index = json.loads((folder / INDEX).read_text())
    due = {name: path.name for path in paths for name in header(path) if name != "__metadata__"}
    assert index["weight_map"] == due
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(folder).values())
    assert torch.equal(output(folder), output(whole))
    assert verify(folder, "--source", SOURCE) == []


def test_parts_of_one_layer_in_two_shards(made: Runs) -> None:
    """diffusers keeps the parts of a layer until it has all of them."""
    folder = out_of(made, "w8a8", "--max_shard_size", "5KB")
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    layers = quantized(where)
    split = [name for name in layers if len({file for key, file in where.items() if key.startswith(f"{name}.")}) > 1]
    assert split
    assert torch.equal(output(folder), output(out_of(made, "w8a8")))


@pytest.mark.parametrize("kind", TYPES)
def test_a_native_source(made: Runs, tmp_path: Path, kind: str) -> None:
    """Other names, another config: the same bytes."""
    native = tmp_path / "native"
    native.mkdir()
    tensors = {wan.to_native(name): tensor for name, tensor in load_file(SOURCE / WHOLE).items()}
    assert "blocks.0.self_attn.q.weight" in tensors and "head.modulation" in tensors
    save_file(tensors, native / "model.safetensors")
    (native / "config.json").write_text(json.dumps({"num_heads": 1, "eps": 1e-6, "dim": 64}))
    folder, due = out_of(made, kind, model=native), out_of(made, kind)
    assert weights(folder) == weights(due)
    mine, theirs = config_of(folder), config_of(due)
    assert mine | {"rope_max_seq_len": theirs["rope_max_seq_len"]} == theirs  # which a native config does not have


def test_a_bf16_source(made: Runs, tmp_path: Path) -> None:
    """The same codes; what diffusers keeps in fp32 is written so."""
    half = Path(shutil.copytree(SOURCE, tmp_path / "half"))
    save_file({name: tensor.bfloat16() for name, tensor in load_file(SOURCE / WHOLE).items()}, half / WHOLE)
    folder, due = tensors_in(out_of(made, "w8a8", model=half)), tensors_in(out_of(made, "w8a8"))
    assert folder.keys() == due.keys()
    for name, tensor in due.items():
        assert folder[name].dtype == tensor.dtype, name
        kept = tensor.dtype == torch.float32 and not name.endswith("_scale")
        assert bits(folder[name]) == bits(tensor.bfloat16().float() if kept else tensor), name


def test_beside_another_format(made: Runs) -> None:
    both = out_of(made, "w8a8", "--format", "mindie,diffusers")
    assert weights(both / "diffusers") == weights(out_of(made, "w8a8"))
    assert (both / "diffusers" / "config.json").read_bytes() == (out_of(made, "w8a8") / "config.json").read_bytes()


def test_fp8_of_a_row_of_zeros(made: Runs) -> None:
    """torchao's own scale of it is 0, and its codes are NaN."""
    folder = out_of(made, "fp8")
    source, stored, seen = load_file(SOURCE / WHOLE), tensors_in(folder), 0
    for name in quantized(stored):
        parts, zero = layer(stored, name), (source[f"{name}.weight"] == 0).all(dim=1)
        seen += int(zero.sum())
        assert (parts["_weight_scale"][zero] == 2.0**-23).all() and not parts["_weight_qdata"].float()[zero].any()
    assert seen
    assert bool(torch.isfinite(output(folder)).all())
