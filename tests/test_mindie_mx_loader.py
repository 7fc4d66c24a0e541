"""mindiesd itself reads the MX types, mixed types, rotations and attention marks that streamq wrote (on a CPU).

As in test_mindiesd.py: in a process of its own, with the `torch_npu` stand-in, whose MX operators follow the formats'
public definition. `mindiesd.quantize` replaces the layers and hangs its own attention on the modules; both are run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import run, write_tiny
from consumer.made import Made, Model, linear, recipe, save_divided
from safetensors.torch import load_file, save_file
from test_mindiesd import IMAGE, LAYERS, load, pytestmark  # noqa: F401 - the mark is this file's, too

CLASSES = {
    "W8A8_MXFP8": "W8A8MXFP8QuantLinear", "W4A4_MXFP4": "W4A4MXFP4QuantLinear", "W8A8_DYNAMIC": "W8A8QuantLinear"
}  # fmt: skip
WEIGHT_ERROR = {"W8A8_MXFP8": 0.05, "W4A4_MXFP4": 0.15}
FLOAT_ERROR = {"W8A8_MXFP8": 0.06, "W4A4_MXFP4": 0.25, "W8A8_DYNAMIC": 0.05}  # of weights and activations
ATTENTION = {"FP8_DYNAMIC": "FP8RotateQuantFA", "MXFP4_DYNAMIC": "MXFP4QuantFA"}


def quantize(source: Path, out: Path, *more: object) -> None:
    result = run("quant", "--model_path", source, "--save_path", out, "--device", "cpu", "--quiet", *more)
    assert result.returncode == 0, result.stderr


def mx(dtype: str, method: str, **keys: Any) -> dict[str, Any]:
    """A `linear_quant` step of an MX type."""
    act, weight = ({"scope": "per_block", "dtype": dtype, "method": how} for how in ("minmax", method))
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, **keys}


def check_layers(report: Any, types: dict[str, str], dtype: str = "bfloat16") -> None:
    """Every layer has its type's class, our codes, and computes what is stored, near the float layer."""
    assert "error" not in report, report
    assert report["wrong"] == {}
    assert {name: layer["type"] for name, layer in report["quantized"].items()} == types
    for name, layer in report["quantized"].items():
        kind = layer["type"]
        assert layer["class"] == CLASSES[kind], name
        assert layer["codes_equal"], name
        assert layer["output"][:3] == [dtype, 2, 24], name
        assert layer["forward_error"] < (0.02 if kind == "W8A8_DYNAMIC" else 0.005), (name, layer)
        assert layer["float_error"] < FLOAT_ERROR[kind], (name, layer)
        assert layer.get("weight_error", 0) < WEIGHT_ERROR.get(kind, 1), (name, layer)


def check_attention(report: Any, marks: dict[str, str]) -> None:
    """Every marked module, and no other, has mindiesd's attention with mindiesd's own rotation, equal for q and k."""
    assert {name: made["class"] for name, made in report["attention"].items()} == {
        name: ATTENTION[kind] for name, kind in marks.items()
    }
    for name, made in report["attention"].items():
        assert made["rotated"] and made["own_rotation"] and made["same_rotation"], (name, made)
        assert made["forward_error"] < 0.1, (name, made)


def test_w4a4f4(tmp_path: Path) -> None:
    """Both MX types by block, both kinds of attention."""
    source = write_tiny(tmp_path / "model", "i2v-14B", blocks=6)
    quantize(source, tmp_path / "out", "--quant_type", "w4a4f4")
    report = load(tmp_path / "out", source)
    layers = [*LAYERS, *IMAGE]
    early = {f"blocks.{i}.{layer}": "W8A8_MXFP8" for i in range(5) for layer in layers}
    check_layers(report, early | {f"blocks.5.{layer}": "W4A4_MXFP4" for layer in layers})
    marks = {f"blocks.{i}.self_attn": "MXFP4_DYNAMIC" if i else "FP8_DYNAMIC" for i in range(6)}
    check_attention(report, marks)
    assert report["model_quant_type"] == "W4A4_MXFP4"


def test_w8a8f8_of_two_experts(tmp_path: Path) -> None:
    """The first block's attention stays as it was."""
    floats = write_tiny(tmp_path / "native", "t2v-A14B", dtype="bf16")
    source = write_tiny(tmp_path / "diffusers", "t2v-A14B", dtype="bf16", layout="diffusers")
    quantize(source, tmp_path / "out", "--quant_type", "w8a8f8", "--match", "msmodelslim")
    report = load(tmp_path / "out" / "low_noise_model", floats / "low_noise_model")
    check_layers(report, {f"blocks.{i}.{layer}": "W8A8_MXFP8" for i in range(2) for layer in LAYERS})
    check_attention(report, {"blocks.1.self_attn": "FP8_DYNAMIC"})


def test_int8_and_mx_in_one_file(tmp_path: Path) -> None:
    """Each layer goes by its own type; what no step takes stays float; attention without a mark is left alone."""
    source = write_tiny(tmp_path / "model", "t2v-1.3B")
    steps = (
        mx("mxfp8", "minmax", include=["*.self_attn.*"]),
        mx("mxfp4", "ceil_x", include=["*.ffn.*"]),
        linear(include=["*.cross_attn.[qkv]"]),
        {"type": "online_quarot", "include": ["*.cross_attn.*"]},
    )
    quantize(source, tmp_path / "out", "--config_path", recipe(tmp_path / "r.yaml", *steps))
    report = load(tmp_path / "out", source, "float16")
    kinds = {"self_attn": "W8A8_MXFP8", "cross_attn": "W8A8_DYNAMIC", "ffn": "W4A4_MXFP4"}
    taken = [layer for layer in LAYERS if layer != "cross_attn.o"]
    types = {f"blocks.{i}.{layer}": kinds[layer.split(".")[0]] for i in range(2) for layer in taken}
    check_layers(report, types, "float16")
    assert {"blocks.0.cross_attn.o", "blocks.1.cross_attn.o"} <= set(report["left_alone"])
    assert report["attention"] == {}


def damaged(tmp_path: Path, change: Any) -> Any:
    """The report on a w8a8f8 folder after `change(tensors, types)`."""
    source, out = write_tiny(tmp_path / "model", "t2v-1.3B"), tmp_path / "out"
    quantize(source, out, "--quant_type", "w8a8f8")
    (path,), (document,) = out.glob("*.safetensors"), out.glob("quant_model_description_*.json")
    tensors, types = load_file(path), json.loads(document.read_text())
    change(tensors, types)
    save_file(tensors, path)
    path.chmod(0o640)
    document.write_text(json.dumps(types))
    return load(out, source)


def test_fp8_attention_asks_for_both_rotations(tmp_path: Path) -> None:
    """Why a recipe of FP8 attention without online_quarot is refused."""
    report = damaged(tmp_path, lambda tensors, types: tensors.pop("blocks.1.self_attn.k_rot"))
    assert report["error"]["type"] == "ParametersInvalid" and "k_rot" in report["error"]["message"]


def test_what_mindiesd_lets_pass_in_silence(tmp_path: Path) -> None:
    """And this check sees: an unknown mark, exponents of other rows, a rotation of its own for k."""

    def change(tensors: dict[str, torch.Tensor], types: dict[str, str]) -> None:
        types["blocks.0.self_attn.quant_type"] = "FP8_DYNAMC"
        tensors["blocks.0.ffn.0.weight_scale"] = tensors["blocks.0.ffn.0.weight_scale"] + 1
        tensors["blocks.1.self_attn.k_rot"] = tensors["blocks.1.self_attn.k_rot"].roll(1, 0).contiguous()

    report = damaged(tmp_path, change)
    assert "error" not in report and list(report["attention"]) == ["blocks.1.self_attn"]
    attention = report["attention"]["blocks.1.self_attn"]
    assert not attention["same_rotation"] and attention["forward_error"] > 0.3
    wrong = {name for name, layer in report["quantized"].items() if layer["weight_error"] > 0.1}
    assert wrong == {"blocks.0.ffn.0"}


def test_smoothing_beside_mx(tmp_path: Path) -> None:
    """MX layers stay unsmoothed; int8 layers beside them carry their scales, o too, whose v cannot take it."""
    model = Model(tmp_path / "model", "t2v-1.3B")
    steps = ({"type": "iter_smooth", "alpha": 0.5}, linear(include=["*.o", "*.ffn.*"]), mx("mxfp8", "mse_round"))
    made = Made(model, tmp_path / "out", "mindie", recipe(tmp_path / "r.yaml", *steps))
    divided = save_divided(made, "", tmp_path / "divided.safetensors")
    report = load(made.out, model.native, "bfloat16", "--divided", divided)
    int8 = {layer: layer.endswith(".o") or layer.startswith("ffn") for layer in LAYERS}
    kinds = {True: "W8A8_DYNAMIC", False: "W8A8_MXFP8"}
    check_layers(report, {f"blocks.{i}.{layer}": kinds[int8[layer]] for i in range(2) for layer in LAYERS})
    for name, layer in report["quantized"].items():
        assert layer["smoothed"] == (layer["type"] == "W8A8_DYNAMIC"), name
    assert run("verify", made.out, "--source", model.diffusers).returncode == 0
