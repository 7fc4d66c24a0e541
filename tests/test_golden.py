"""Bytes against the peers' own: msModelSlim for MindIE, LightX2V's converter; and against plain NumPy arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Result, write_tiny
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
WEIGHTS = "quant_model_weight_w8a8_dynamic.safetensors"
DESCRIPTION = "quant_model_description_w8a8_dynamic.json"
Run = Callable[..., Result]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def quantize(run: Run, source: Path, out: Path, *more: object) -> dict[str, torch.Tensor]:
    result = run("quant", "--model_path", source, "--save_path", out, "--quiet", *more)
    assert result.returncode == 0, result.stderr
    return load_all(out)


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
@pytest.mark.parametrize(
    ("golden", "source", "more"),
    [
        ("w8a8", "t2v_fp32", []),
        ("w8a8_bf16source", "t2v_bf16", []),
        ("w8a8_bf16source_match", "t2v_bf16", ["--match", "msmodelslim"]),
        ("w8a8", "t2v_fp32", ["--match", "msmodelslim"]),
    ],
)
def test_mindie_is_msmodelslims(
    run: Run, tmp_path: Path, golden: str, source: str, more: list[str], read_ahead: int
) -> None:
    recipe = DATA / "mindie/w8a8.yaml"
    mine = quantize(run, DATA / "mindie" / source, tmp_path / "out", "--config_path", recipe,
                    "--read_ahead", read_ahead, *more)  # fmt: skip
    theirs = load_all(DATA / "mindie" / golden)
    floats = load_all(DATA / "mindie" / source)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert mine[name].shape == tensor.shape, name
        assert raw(mine[name]) == raw(tensor), name
    for name in mine.keys() - theirs.keys():
        assert raw(mine[name]) == raw(floats[name]), name
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    expected = json.loads((DATA / "mindie" / golden / DESCRIPTION).read_text())
    assert list(described.items()) == list(expected.items())
    assert described.keys() - {"model_quant_type"} == mine.keys()


@pytest.mark.parametrize("case", ["t2v_bf16", "i2v_fp32"])
@pytest.mark.parametrize("layout", ["single", "block"])
def test_lightx2v_is_its_converters(run: Run, tmp_path: Path, case: str, layout: str) -> None:
    mine = quantize(run, DATA / f"lightx2v/source_{case}", tmp_path / "out", "--quant_type", "w8a8",
                    "--format", "lightx2v", "--layout", layout, "--match", "lightx2v")  # fmt: skip
    theirs = load_file(DATA / f"lightx2v/golden_{case}_int8.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(mine[name]) == raw(tensor), name


@pytest.mark.parametrize("case", ["t2v_bf16", "i2v_fp32"])
def test_lightx2v_default_beats_its_converter_as_loaded(run: Run, tmp_path: Path, case: str) -> None:
    """LightX2V's plain loader rounds scales to bf16: that must cost our files nothing, and theirs something."""
    source = load_all(DATA / f"lightx2v/source_{case}")
    mine = quantize(run, DATA / f"lightx2v/source_{case}", tmp_path / "out", "--quant_type", "w8a8",
                    "--format", "lightx2v")  # fmt: skip
    theirs = load_file(DATA / f"lightx2v/golden_{case}_int8.safetensors")

    def error(made: dict[str, torch.Tensor]) -> float:
        lost = norm = 0.0
        for name in (n for n, t in made.items() if t.dtype == torch.int8):
            scale = made[name.replace("weight", "weight_scale")].bfloat16().float()
            rows = torch.arange(7, len(source[name]))  # behind the edge cases
            lost += float((made[name] * scale - source[name].float())[rows].square().sum())
            norm += float(source[name].float()[rows].square().sum())
        return (lost / norm) ** 0.5

    for name, tensor in mine.items():
        if name.endswith("weight_scale"):
            assert torch.equal(tensor, tensor.bfloat16().float()), name
    assert error(mine) < error(theirs)


@pytest.mark.parametrize("family", ["t2v", "i2v21", "ti2v22", "vace"])
@pytest.mark.parametrize("form", ["mindie", "lightx2v"])
def test_both_name_styles_give_the_same_bytes(run: Run, tmp_path: Path, family: str, form: str) -> None:
    made = {}
    for layout in ("native", "diffusers"):
        quantize(run, DATA / "wan" / family / layout, tmp_path / layout, "--quant_type", "w8a8", "--format", form)
        files = sorted((tmp_path / layout).glob("*.safetensors"))
        made[layout] = {path.name: path.read_bytes() for path in files}
    assert made["native"] and made["native"] == made["diffusers"]
    native = load_all(DATA / "wan" / family / "native")
    assert native.keys() <= load_all(tmp_path / "diffusers").keys()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_int8_is_what_numpy_computes(run: Run, tmp_path: Path, dtype: str) -> None:
    source = write_tiny(tmp_path / "model", "i2v-14B", dtype=dtype)
    floats, mine = load_all(source), quantize(run, source, tmp_path / "out", "--quant_type", "w8a8")
    codes = [name for name, tensor in mine.items() if tensor.dtype == torch.int8]
    assert len(codes) == 2 * 11  # ffn.2 stays float
    for name in codes:
        weight = floats[name].float().numpy()
        scale = np.maximum(np.abs(weight).max(1, keepdims=True) / np.float32(127), np.float32(2**-23))
        assert np.array_equal(mine[name.replace("weight", "weight_scale")].numpy(), scale), name
        assert np.array_equal(mine[name].numpy(), np.rint(weight / scale)), name
        bias = name.replace("weight", "bias")
        assert mine[bias].dtype == torch.float32 and torch.equal(mine[bias], floats[bias].float())


RECIPE = """
apiversion: multimodal_sd_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: True, method: minmax}
        weight: {scope: SCOPE, dtype: int8, symmetric: True, method: METHOD}
"""


def with_recipe(run: Run, source: Path, out: Path, scope: str, method: str) -> dict[str, torch.Tensor]:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(RECIPE.replace("SCOPE", scope).replace("METHOD", method))
    return quantize(run, source, out, "--config_path", recipe)


def test_mse_is_the_best_of_its_grid(run: Run, tmp_path: Path) -> None:
    """Rows with a large outlier gain by clipping; the clipping point is the grid's best, found here by brute force."""
    source = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1)
    tensors = load_all(source)
    generator = torch.Generator().manual_seed(0)
    name = "blocks.0.ffn.0.weight"
    tensors[name] = torch.randn(128, 64, generator=generator)
    tensors[name][::2, 0] *= 5
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    mine = with_recipe(run, source, tmp_path / "out", "per_channel", "mse")
    weight = tensors[name].double()
    amax = tensors[name].abs().amax(1, keepdim=True)
    best = torch.full((128,), float("inf"), dtype=torch.float64)
    for ratio in [1 - i / 100 for i in range(61)]:
        scale = amax * ratio / 127
        codes = (tensors[name] / scale).round().clamp(-128, 127)
        best = torch.minimum(best, (codes.double() * scale.double() - weight).square().sum(1))
    got = (mine[name].double() * mine["blocks.0.ffn.0.weight_scale"].double() - weight).square().sum(1)
    assert torch.allclose(got, best, rtol=1e-5)
    plain = with_recipe(run, source, tmp_path / "plain", "per_channel", "minmax")
    minmax = (plain[name].double() * plain["blocks.0.ffn.0.weight_scale"].double() - weight).square().sum(1)
    assert bool((got <= minmax * (1 + 1e-6)).all()) and bool((got < 0.99 * minmax).any())


def test_per_tensor_weights_have_one_scale(run: Run, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1)
    mine = with_recipe(run, source, tmp_path / "out", "per_tensor", "minmax")
    for name, weight in load_all(source).items():
        if mine[name].dtype == torch.int8:
            scale = mine[name.replace("weight", "weight_scale")]
            assert torch.equal(scale, (weight.abs().max() / 127).expand_as(scale)), name
            assert torch.equal(mine[name], (weight / scale).round().to(torch.int8)), name


def test_convert_model_dtype_matches_a_model_cast_first(run: Run, tmp_path: Path) -> None:
    """With --match msmodelslim the setting casts the weights to bf16 before anything else; without it has no effect."""
    source = write_tiny(tmp_path / "fp32", "t2v-1.3B", dtype="fp32")
    cast = write_tiny(tmp_path / "bf16", "t2v-1.3B", dtype="bf16")
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.replace("SCOPE", "per_channel").replace("METHOD", "minmax")
    recipe.write_text(text + "  multimodal_sd_config: {model_config: {convert_model_dtype: True}}\n")
    plain = tmp_path / "plain.yaml"
    plain.write_text(text)
    match = ["--match", "msmodelslim"]
    mine = quantize(run, source, tmp_path / "a", "--config_path", recipe, *match)
    theirs = quantize(run, cast, tmp_path / "b", "--config_path", plain, *match)
    without = quantize(run, source, tmp_path / "c", "--config_path", recipe)
    fp32 = quantize(run, source, tmp_path / "d", "--config_path", plain)
    layers = [name.removesuffix("weight") for name, tensor in mine.items() if tensor.dtype == torch.int8]
    assert len(layers) == 20
    for name in (layer + leaf for layer in layers for leaf in ("weight", "weight_scale", "bias")):
        assert raw(mine[name]) == raw(theirs[name]), name
        assert raw(without[name]) == raw(fp32[name]), name
    assert any(raw(mine[layer + "weight"]) != raw(fp32[layer + "weight"]) for layer in layers)
