"""MindIE's own loader, the public package `mindiesd`, reads what streamq wrote (on a CPU, without an NPU).

`consumer/load_mindie.py` does it in a process of its own, with the stand-in `consumer/torch_npu_standin`, so that
neither mindiesd nor the stand-in enters this process. bin/test installs mindiesd where it can be installed.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import pytest
from consumer.made import Made as Calibrated
from consumer.made import Model, linear, recipe, save_divided

SCRIPT = Path(__file__).resolve().parent / "consumer" / "load_mindie.py"
WEIGHTS = "quant_model_weight_w8a8_dynamic.safetensors"
DESCRIPTION = "quant_model_description_w8a8_dynamic.json"
ATTENTION = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
OUTSIDE = {
    "head.head",
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
}

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("mindiesd") and importlib.util.find_spec("einops")),
    reason="mindiesd 3.1.0 is not installed (pip install einops; pip install --no-deps mindiesd==3.1.0)",
)
Made = tuple[Path, Path]


@pytest.fixture
def make(tiny: Callable[..., Path], run: Callable[..., Any], tmp_path: Path) -> Callable[..., Made]:
    """`make(family, options, **source)`: a float model under native names, and what streamq made of it for MindIE.

    The model that is quantized holds the same weights, written as `source` says.
    """

    def quantize(family: str = "t2v-1.3B", options: tuple[object, ...] = (), **source: Any) -> Made:
        floats = tiny(family, **source | {"layout": "native", "prefix": "", "shard_bytes": 0})
        given, save = tiny(family, **source) if source else floats, tmp_path / "quantized"
        what = options or ("--quant_type", "w8a8")
        done = run(
            "quant",
            "--model_path",
            given,
            "--save_path",
            save,
            *what,
            "--format",
            "mindie",
            "--device",
            "cpu",
            "--quiet",
        )
        assert done.returncode == 0, done.stderr
        return floats, save

    return quantize


def load(folder: Path, source: Path, dtype: str = "bfloat16", *more: object) -> Any:
    """Run the loader on a folder; returns its report, which has `error` when mindiesd refused."""
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, source, "--dtype", dtype, *map(str, more)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == (1 if "error" in report else 0), done.stderr
    return report


def assert_loaded(report: Any, dtype: str) -> None:
    """Every layer that the description types was replaced, holds our codes and computes what the folder says."""
    assert "error" not in report, report
    assert report["wrong"] == {}
    for name, layer in report["quantized"].items():
        assert layer["class"] == "W8A8QuantLinear", name
        assert layer["codes_equal"], name
        assert layer["output"][:3] == [dtype, 2, 24], name
        assert layer["forward_error"] < 0.01, (name, layer)
        assert layer["channel_error"] < 0.02, (name, layer)
        assert layer["float_error"] < 0.05, (name, layer)
        # rounding to nearest: no weight is further than half a step from the float one
        assert layer["weight_steps"] < 0.501, (name, layer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "source", [{}, {"layout": "diffusers"}, {"prefix": "model.diffusion_model.", "shard_bytes": 60_000}], ids=str
)
def test_every_layer_is_replaced_and_right(make: Callable[..., Made], source: dict[str, Any], dtype: str) -> None:
    floats, save = make(**source)
    report = load(save, floats, dtype)
    assert_loaded(report, dtype)
    assert set(report["quantized"]) == {f"blocks.{i}.{layer}" for i in range(2) for layer in [*ATTENTION, "ffn.0"]}
    assert set(report["left_alone"]) == {"blocks.0.ffn.2", "blocks.1.ffn.2"} | OUTSIDE


def test_image_branch(make: Callable[..., Made]) -> None:
    floats, save = make("i2v-14B", dtype="bf16")
    report = load(save, floats)
    assert_loaded(report, "bfloat16")
    layers = [*ATTENTION, "cross_attn.k_img", "cross_attn.v_img", "ffn.0"]
    assert set(report["quantized"]) == {f"blocks.{i}.{layer}" for i in range(2) for layer in layers}


@pytest.mark.slow
def test_two_experts(make: Callable[..., Made]) -> None:
    floats, save = make("t2v-A14B", layout="diffusers")
    for expert in ("high_noise_model", "low_noise_model"):
        assert_loaded(load(save / expert, floats / expert), "bfloat16")


def test_a_recipe_of_ones_own(make: Callable[..., Made], tmp_path: Path) -> None:
    recipe = tmp_path / "some.yaml"
    recipe.write_text(
        "apiversion: multimodal_sd_modelslim_v1\n"
        "spec:\n"
        "  process:\n"
        "    - type: linear_quant\n"
        "      qconfig: {act: {scope: per_token}, weight: {scope: per_tensor}}\n"
        '      include: ["blocks.1.*"]\n'
        '      exclude: ["*self_attn*"]\n'
    )
    floats, save = make(options=("--config_path", recipe))
    report = load(save, floats)
    assert_loaded(report, "bfloat16")
    layers = [layer for layer in ATTENTION if layer.startswith("cross")] + ["ffn.0", "ffn.2"]
    assert set(report["quantized"]) == {f"blocks.1.{layer}" for layer in layers}


def test_float32_is_refused(make: Callable[..., Made]) -> None:
    floats, save = make()
    error = load(save, floats, "float32")["error"]
    assert error["type"] == "ParametersInvalid"
    assert "torch.float16 or torch.bfloat16" in error["message"]


@pytest.mark.parametrize("file", [DESCRIPTION, WEIGHTS])
def test_our_mode_matters(make: Callable[..., Made], file: str) -> None:
    floats, save = make()
    (save / file).chmod(0o644)
    assert load(save, floats)["error"]["type"] == "PermissionError"


def test_the_loader_check_sees_an_unknown_type(make: Callable[..., Made]) -> None:
    floats, save = make()
    description = json.loads((save / DESCRIPTION).read_text())
    description["blocks.1.ffn.0.weight"] = "W8A8_DYNAMC"
    (save / DESCRIPTION).write_text(json.dumps(description))
    report = load(save, floats)
    assert set(report["wrong"]) == {"blocks.1.ffn.0"}
    assert len(report["quantized"]) == 17


def test_the_loader_check_sees_a_wrong_scale(make: Callable[..., Made]) -> None:
    floats, save = make()
    data = bytearray((save / WEIGHTS).read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + length])["blocks.1.self_attn.q.weight_scale"]
    start = 8 + length + entry["data_offsets"][0]
    (scale,) = struct.unpack_from("<f", data, start)
    struct.pack_into("<f", data, start, 2 * scale)
    (save / WEIGHTS).write_bytes(data)
    layers = load(save, floats)["quantized"]
    assert {name for name, layer in layers.items() if layer["weight_steps"] > 0.501} == {"blocks.1.self_attn.q"}


# Calibrated types.

LAYERS = [*ATTENTION, "ffn.0", "ffn.2"]
IMAGE = ["cross_attn.k_img", "cross_attn.v_img"]
SMOOTH = {"type": "smooth_quant", "alpha": 0.5}
STEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "smooth": (SMOOTH, linear()),
    "static": (linear("per_tensor", False),),
    "static-smooth": (SMOOTH, linear("per_tensor", False)),
    "mixed": (
        SMOOTH | {"include": ["*ffn.0", "*cross_attn*"]},
        linear("per_tensor", False, include=["*cross_attn.*", "blocks.0.ffn.2"]),
        linear(include=["*self_attn.*", "*ffn.0"], exclude=["blocks.1.self_attn.v"]),
        linear("per_tensor", True, include=["blocks.1.ffn.2"]),
    ),
}


def calibrated(tmp_path: Path, family: str, name: str, dtype: str = "fp32") -> Calibrated:
    """A calibrated output for MindIE, from a diffusers source."""
    model = Model(tmp_path / "model", family, dtype)
    return Calibrated(model, tmp_path / "out", "mindie", recipe(tmp_path / "r.yaml", *STEPS[name]))


def check_calibrated(made: Calibrated, expert: str, dtype: str, tmp_path: Path) -> dict[str, Any]:
    """Every layer has the right class and mode, our codes, and computes what the folder says; returns the layers."""
    divided = save_divided(made, expert, tmp_path / f"divided{expert}.safetensors")
    report = load(made.out / expert, made.model.native / expert, dtype, "--divided", divided)
    assert "error" not in report, report
    assert report["wrong"] == {}
    assert set(report["quantized"]) == set(made.layers(expert))
    label = f"{expert}/" if expert else ""
    vectors = made.vectors(expert)
    for name, layer in report["quantized"].items():
        kind = made.manifest["layers"][label + name]["type"]
        assert layer["class"] == "W8A8QuantLinear" and layer["codes_equal"], name
        assert layer["dynamic"] == (not kind.startswith("w8a8_static")), name
        folded = name.endswith("attn.o") and kind.endswith("_smooth")
        assert layer["smoothed"] == (kind.endswith("_smooth") and not folded), name
        assert not folded or f"{name.partition('.')[0]}.{name.split('.')[1]}." in " ".join(vectors)
        assert layer["output"][:3] == [dtype.removeprefix("torch."), 2, 24], name
        assert layer["weight_steps"] < 0.501, (name, layer)
        # a static range rounded to bf16 costs up to 2^-9 of every value
        assert layer["forward_error"] < 0.015 and layer["float_error"] < 0.05, (name, layer)
    return report["quantized"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "source"), [("t2v-1.3B", "fp32"), ("i2v-14B", "bf16")])
@pytest.mark.parametrize("name", ["smooth", "static", "static-smooth"])
def test_calibrated(tmp_path: Path, family: str, source: str, name: str) -> None:
    made = calibrated(tmp_path, family, name, source)
    for dtype in ("bfloat16", "float16") if (family, name) == ("t2v-1.3B", "static-smooth") else ("bfloat16",):
        found = check_calibrated(made, "", dtype, tmp_path)
        layers = [*LAYERS, *(IMAGE if family == "i2v-14B" else [])]
        assert set(found) == {f"blocks.{i}.{layer}" for i in range(2) for layer in layers}


@pytest.mark.slow
def test_calibrated_mixed_and_two_experts(tmp_path: Path) -> None:
    made = calibrated(tmp_path, "t2v-A14B", "mixed")
    for expert in made.model.experts:
        found = check_calibrated(made, expert, "bfloat16", tmp_path)
        assert {layer["dynamic"] for layer in found.values()} == {True, False}
        assert {layer["smoothed"] for layer in found.values()} == {True, False}


def test_calibrated_native_source_gives_the_same_folder(tmp_path: Path) -> None:
    made = calibrated(tmp_path, "t2v-1.3B", "static-smooth")
    native = list(made.command)
    native[1], native[3] = made.model.native, tmp_path / "native"
    assert conftest.run("quant", *native, "--quiet").returncode == 0
    (path,) = made.out.glob("*.safetensors")
    assert (tmp_path / "native" / path.name).read_bytes() == path.read_bytes()
