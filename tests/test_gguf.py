"""The gguf format against gguf's own package, against files that it made, and in stock diffusers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import synthetic
import torch
from conftest import Tiny, run, run_process
from gguf_kit import DATA, SOURCE, STRING, TYPES, UINT32, due_type, floats, load, only_file, quantize, verify
from safetensors.torch import load_file
from torch import Tensor

from streamq import compare, outputs
from streamq.checkpoint import Source
from streamq.pairs import Pair, QConfig
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.savers import SaveOptions
from streamq.savers import gguf as saver

MiB = 1 << 20
RECIPE = """
apiversion: multimodal_sd_modelslim_v1
spec:
  process:
    - type: "linear_quant"
      qconfig:
        weight: {scope: "per_block", dtype: "int8"}
      include: ["*"]
      exclude: ["*cross_attn.o"]
      overrides:
        - include: ["*ffn*"]
          qconfig: {weight: {dtype: "int4"}}
  save:
    - type: "gguf_format_saver"
"""


def golden(kind: str) -> Path:
    return DATA / f"gguf/golden_{TYPES[kind]}.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("w8a16")`: the golden files' source, quantized; nobody changes it."""
    folder, known = tmp_path_factory.mktemp("made"), dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in known:
            known[kind] = quantize(folder / kind, kind)
        return known[kind]

    return make


@pytest.mark.parametrize("kind", TYPES)
def test_the_golden_file(made: Callable[[str], Path], kind: str) -> None:
    """Same keys, names, types, shapes and bytes, in an order of our own."""
    (keys, tensors), (due_keys, due) = load(made(kind)), load(golden(kind))
    assert keys == due_keys == {
        "general.architecture": (STRING, "wan"), "general.quantization_version": (UINT32, 2),
        "general.file_type": (UINT32, {"w8a16": 7, "w4a16": 2}[kind]),
    }  # fmt: skip
    assert tensors == due
    assert made(kind).stat().st_size == golden(kind).stat().st_size
    assert made(kind).name == f"wan-{TYPES[kind].upper()}.gguf"


def test_any_depth_makes_the_same_bytes(made: Callable[[str], Path], tmp_path: Path) -> None:
    for depth in (0, 3):
        other = quantize(tmp_path / str(depth), "w4a16", SOURCE, "--read_ahead", depth)
        assert other.read_bytes() == made("w4a16").read_bytes()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_values_are_ggufs(made: Callable[[str], Path], kind: str, whose: str) -> None:
    """Headers, bytes and values as streamq reads them, against gguf's reader and its `dequantize`, bit for bit."""
    path = made(kind) if whose == "ours" else golden(kind)
    label = {"ours": "", "theirs": "gguf"}[whose]
    output = outputs.Output("gguf", saver, label, path.parent, "")
    infos = {info.name: info for info in outputs.header_of(path, path.parent)[1]}
    checkpoint = outputs.Checkpoint(path.parent, (outputs.header_of(path, path.parent)[0],), infos)
    assert whose == "theirs" or output.checkpoint().tensors == infos
    source, seen = Source(checkpoint), set()
    for tensor in gguf.GGUFReader(path).tensors:
        info, stored = infos[tensor.name], compare.read(source, infos[tensor.name])
        assert info.dtype == tensor.tensor_type.name and info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        if info.dtype in saver.FILE_TYPES:
            values = saver.decode({"weight": stored})(slice(None))
            due = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(values.numpy().view(np.int32), due.view(np.int32)), tensor.name
            assert saver.contradictions({"weight": stored}) == []
            assert torch.equal(values[1:3], saver.decode({"weight": stored})(slice(1, 3)))
        else:
            assert stored.shape == info.shape
        seen.add(tensor.name)
    source.close()
    assert seen == infos.keys()


def record(kind: str, rows: int, columns: int) -> QuantizedLinear:
    """A layer of random codes and scales."""
    rng = torch.Generator().manual_seed(rows)
    pair = Pair(QConfig("per_tensor", "float"), QConfig("per_block", "int8" if kind == "q8_0" else "int4"))
    scales = torch.randn(rows, columns // 32, generator=rng).half().float()
    low, high = (-127, 128) if kind == "q8_0" else (0, 16)
    codes = torch.randint(low, high, (rows, columns), generator=rng, dtype=torch.int8)
    zeros = None if kind == "q8_0" else -8 * scales
    bias = torch.randn(rows, generator=rng).bfloat16()
    return QuantizedLinear(Scheme(kind, pair, Rule()), codes, scales, bias, torch.bfloat16, 0.0, zeros=zeros)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("tile", [1, 300, 1 << 17])
def test_packing(monkeypatch: pytest.MonkeyPatch, kind: str, tile: int) -> None:
    monkeypatch.setattr(saver, "_TILE", tile)
    layer = record(kind, 37, 96)
    weight, bias = saver.encode(layer, SaveOptions())
    assert weight.dtype == torch.uint8 and bias.dtype == torch.float32 and layer.bias is not None
    assert torch.equal(bias, layer.bias.float())
    word = gguf.GGMLQuantizationType[kind.upper()]
    due = layer.dequantize()
    assert np.array_equal(gguf.quants.dequantize(weight.numpy(), word), due.numpy())
    blocks = weight.view(37, 3, -1)
    assert torch.equal(saver.decode({"weight": blocks})(slice(None)), due)
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16).squeeze(2).float(), layer.scales)
    if kind == "q4_0":  # the order within a block, in plain words
        codes = layer.codes.view(37, 3, 32)
        for i in (0, 7, 15):
            assert torch.equal(blocks[..., 2 + i], (codes[..., i] + 16 * codes[..., i + 16].int()).to(torch.uint8))


@pytest.mark.parametrize(
    ("family", "kind", "how"),
    [
        ("i2v-14B", "w8a16", {"dtype": "bf16"}),
        ("flf2v-14B", "w4a16", {"dtype": "bf16", "layout": "diffusers"}),
        ("ti2v-5B", "w4a16", {"dtype": "fp16"}),
        ("vace-1.3B", "w8a16", {"layout": "diffusers", "shard_bytes": 150_000}),
        ("t2v-A14B", "w4a16", {"dtype": "fp32"}),
        ("s2v-14B", "w8a16", {"dtype": "fp16"}),
        ("animate-14B", "w8a16", {"prefix": "model.diffusion_model.", "single_file": "wan.safetensors"}),
    ],
)
def test_families(tmp_path: Path, tiny: Tiny, family: str, kind: str, how: dict[str, Any]) -> None:
    """Native names and the rules' types whatever the source; read back, inspected, and equal to the source's values."""
    source, out = tiny(family, **how), tmp_path / "out"
    quantize(out, kind, source)
    found = json.loads(run("inspect", out, "--json").stdout)
    assert (found["format"], found["layout"]) == ("gguf", "native")
    assert set(found["layers"].values()) == {kind} and len(found["layers"]) == found["linears"] * len(found["experts"])
    assert verify(out) == verify(out, "--source", source) == []
    (out / "streamq.json").unlink()
    assert verify(out) == verify(out, "--source", source) == []
    names = synthetic.shapes(synthetic.tiny(synthetic.FAMILIES[family]))
    half = "F16" if how.get("dtype") == "fp16" else "BF16"
    experts = [out] if len(found["experts"]) == 1 else [out / name for name in found["experts"]]
    assert len(experts) == synthetic.FAMILIES[family].experts
    for folder in experts:
        _, tensors = load(only_file(folder))
        assert {name: one.shape for name, one in tensors.items()} == names
        for name, one in tensors.items():
            assert one.kind == due_type(name, one.shape, TYPES[kind].upper(), half), name
        assert (folder / "config.json").exists() == (family not in ("s2v-14B", "animate-14B", "flf2v-14B"))


def test_names_of_either_style_make_one_file(tmp_path: Path, tiny: Tiny) -> None:
    files = [quantize(tmp_path / style, "w8a16", tiny(layout=style)) for style in ("native", "diffusers")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_mixed(tmp_path: Path, tiny: Tiny) -> None:
    """Q8_0, Q4_0 and float layers in one file, which is called after most of them."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    source = tiny(dtype="bf16")
    done = run("quant", "--model_path", source, "--save_path", tmp_path / "out", "--device", "cpu", "--quiet",
               "--config_path", tmp_path / "recipe.yaml")  # fmt: skip
    assert done.returncode == 0, done.stderr
    keys, tensors = load(tmp_path / "out/wan-Q8_0.gguf")
    assert keys["general.file_type"] == (UINT32, 7)
    kinds = {name.removeprefix("blocks.1."): one.kind for name, one in tensors.items() if name.startswith("blocks.1.")}
    assert kinds["self_attn.q.weight"] == kinds["cross_attn.k.weight"] == "Q8_0"
    assert kinds["ffn.0.weight"] == kinds["ffn.2.weight"] == "Q4_0"
    assert kinds["cross_attn.o.weight"] == "BF16" and kinds["cross_attn.o.bias"] == kinds["modulation"] == "F32"
    assert verify(tmp_path / "out", "--source", source) == []
    layers = json.loads((tmp_path / "out/streamq.json").read_text())["formats"]["gguf"]["layers"]
    assert [layers[f"blocks.0.{name}"]["type"] for name in ("self_attn.o", "cross_attn.o", "ffn.0")] == [
        "w8a16", "float", "w4a16",
    ]  # fmt: skip


def test_layers_that_do_not_fit_stay_float(tmp_path: Path) -> None:
    """A width of 36 leaves ffn.2 alone whole blocks; a matrix of 1024 elements is kept in F32."""
    family = replace(synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"]), dim=36, ffn=64, heads=2)
    synthetic.write(tmp_path / "odd", family)
    done = run("plan", "--model_path", tmp_path / "odd", "--save_path", tmp_path / "x", "--quant_type", "w4a16",
               "--format", "gguf", "--device", "cpu", "--json")  # fmt: skip
    plan = json.loads(done.stdout)
    assert {name for name, kind in plan["layers"].items() if kind != "float"} == {"blocks.0.ffn.2", "blocks.1.ffn.2"}
    assert any("36 in features, not a multiple of GGUF's blocks of 32" in text for text in plan["warnings"])
    synthetic.write(tmp_path / "small", replace(family, dim=32, ffn=64))
    path = quantize(tmp_path / "out", "w8a16", tmp_path / "small")
    kinds = {name: one.kind for name, one in load(path)[1].items()}
    assert kinds["blocks.0.ffn.2.weight"] == "Q8_0" and kinds["blocks.0.self_attn.q.weight"] == "F32"
    assert verify(tmp_path / "out", "--source", tmp_path / "small") == []


# What is refused.


def refusal(tmp_path: Path, *more: object) -> str:
    done = run("quant", "--model_path", SOURCE, "--save_path", tmp_path / "out", "--format", "gguf", "--device", "cpu",
               *more)  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "out").exists(), done.stderr
    return done.stderr


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q8 = ("--quant_type", "w8a16")
    assert "leave --max_shard_size out" in refusal(tmp_path, *q8, "--max_shard_size", "1GB")
    assert "--quant_type w8a8 is not written in the format gguf" in refusal(tmp_path, "--quant_type", "w8a8")
    assert "--layout single: a setting of" in refusal(tmp_path, *q8, "--layout", "single")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'pip install "streamq[gguf]"' in refusal(tmp_path, *q8)


def test_neither_plan_nor_inspect_needs_torch(made: Callable[[str], Path], tmp_path: Path) -> None:
    code = (
        "import sys; from streamq.cli import main; out = sys.argv[1]\n"
        f"plan = ['plan', '--model_path', {str(SOURCE)!r}, '--save_path', out + '/x', '--quant_type', 'w4a16']\n"
        "assert main([*plan, '--format', 'gguf', '--json']) == 0 and 'gguf' in sys.modules\n"
        "assert main(['inspect', sys.argv[2], '--json']) == 0\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path), str(made("w4a16").parent)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory_is_within_the_plan(tmp_path: Path) -> None:
    """Four blocks of 38 MB in fp32, of which a few layers are held at once."""
    wide = replace(synthetic.FAMILIES["t2v-1.3B"], dim=768, ffn=3072, text_dim=256, blocks=4)
    synthetic.write(tmp_path / "model", wide, sparse=True)
    command = ["--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--quant_type", "w8a16",
               "--format", "gguf", "--device", "cpu", "--json"]  # fmt: skip
    planned = json.loads(run("plan", *command).stdout)
    done = run_process("quant", *command, "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_host_bytes"] <= planned["peak_host_bytes"] < 330 * MiB
    (size,) = (file["bytes"] for file in planned["files"] if file["path"].endswith(".gguf"))
    assert size == only_file(tmp_path / "out").stat().st_size


# In stock diffusers.


def transformer(path: Path, config: Path, kind: str = "WanTransformer3DModel") -> torch.nn.Module:
    import diffusers

    how = diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    return getattr(diffusers, kind).from_single_file(
        str(path), config=str(config), quantization_config=how, torch_dtype=torch.bfloat16
    )


@torch.no_grad()
def forward(model: torch.nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("kind", TYPES)
def test_diffusers_computes_what_the_golden_file_does(made: Callable[[str], Path], kind: str) -> None:
    tensors = load_file(DATA / "gguf/io.safetensors")
    inputs = {name: tensor for name, tensor in tensors.items() if not name.startswith("out_")}
    mine = forward(transformer(made(kind), made(kind).parent), **inputs)
    theirs = forward(transformer(golden(kind), SOURCE), **inputs)
    assert torch.equal(mine, theirs)
    due, exact = tensors[f"out_{TYPES[kind]}"].float(), tensors["out_bf16"].float()
    assert (mine.float() - due).norm() <= 0.01 * due.norm()  # of another machine
    assert (mine.float() - exact).norm() <= {"w8a16": 0.01, "w4a16": 0.1}[kind] * exact.norm()


INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "t2v-1.3B": {}, "ti2v-5B": {"hidden_states": (1, 48, 2, 8, 8)},
    "i2v-14B": {"hidden_states": (1, 36, 2, 8, 8), "encoder_hidden_states_image": (1, 257, 64)},
    "vace-1.3B": {"control_hidden_states": (1, 96, 2, 8, 8)},
}  # fmt: skip


@pytest.mark.parametrize("family", INPUTS)
def test_diffusers_agrees_with_the_dequantized_model(tmp_path: Path, tiny: Tiny, family: str) -> None:
    """The lines of the model card, run as they are; against the float model with the file's values in it.

    diffusers multiplies a block's scale and codes in fp16, then casts to the dtype of its computations.
    """
    import diffusers

    source = tiny(family, layout="diffusers", dtype="bf16")
    path = quantize(tmp_path / "out", "w8a16", source)
    card = (tmp_path / "out/README.md").read_text().replace("PATH_TO_THIS_FOLDER", str(tmp_path / "out"))
    place: dict[str, Any] = {}
    exec(card.split("```")[1], place)
    loaded = place["transformer"]
    kind = getattr(diffusers, type(loaded).__name__)
    shutil.copy(path.with_name("config.json"), source / "transformer")
    reference = kind.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    weights = dict(reference.named_parameters())
    for name, one in load(path)[1].items():
        if one.kind == "Q8_0":
            values = torch.from_numpy(floats(one)).half()
            weights[f"{outputs.wan.to_diffusers(name)}"].data.copy_(values.bfloat16())
    shapes = {"hidden_states": (1, 16, 2, 8, 8), "encoder_hidden_states": (1, 12, 64)} | INPUTS[family]
    rng = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}
    inputs["timestep"] = torch.tensor([500])
    assert torch.equal(forward(loaded, **inputs), forward(reference, **inputs))


def test_both_experts_of_a_card_load(tmp_path: Path, tiny: Tiny) -> None:
    quantize(tmp_path / "out", "w8a16", tiny("t2v-A14B", blocks=1))
    card = (tmp_path / "out/README.md").read_text().replace("PATH_TO_THIS_FOLDER", str(tmp_path / "out"))
    place: dict[str, Any] = {}
    exec(card.split("```")[1], place)
    names = [dict(place[name].named_parameters())["proj_out.weight"] for name in ("transformer", "transformer_2")]
    assert not torch.equal(names[0].data, names[1].data)
