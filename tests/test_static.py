"""Static W8A8 for MindIE: msModelSlim's own output, the formulas, and what the runtime makes of the written tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, run
from consumer.made import FAMILIES, GROUPS, Made, Model, linear, recipe
from consumer.read_mindie import MindIE
from consumer.wan_block import Weights, apart
from consumer.wan_block import run as forward
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "data" / "mindie_static"
EPS = 2.0**-23
SMOOTH = {"type": "smooth_quant", "alpha": 0.5}
# Some layers static, some dynamic, some float, some smoothed, and some of each.
MIXED = (
    {"type": "smooth_quant", "alpha": 0.5, "include": ["*ffn.0", "*cross_attn*"]},
    linear("per_tensor", False, include=["*cross_attn.*", "blocks.0.ffn.2"]),
    linear("per_token", include=["*self_attn.*", "blocks.0.ffn.0"], exclude=["blocks.1.self_attn.v"]),
    linear("per_tensor", include=["blocks.1.ffn.0"]),
)
pytestmark = pytest.mark.usefixtures("one_core")
Make = Callable[..., Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make("t2v-1.3B", "static", *steps)`: once a module."""
    root = tmp_path_factory.mktemp("static")
    models: dict[tuple[str, str], Model] = {}
    made: dict[tuple[str, ...], Made] = {}

    def give(family: str, name: str, *steps: dict[str, Any], dtype: str = "fp32") -> Made:
        model = models.get((family, dtype)) or Model(root / f"{family}-{dtype}", family, dtype)
        models[family, dtype] = model
        key = (family, name, dtype)
        if key not in made:
            made[key] = Made(model, root / "-".join(key), "mindie", recipe(root / f"{name}.yaml", *steps))
        return made[key]

    return give


def reader(made: Made, expert: str = "", **how: Any) -> MindIE:
    found = made.reader(expert, **how)
    assert isinstance(found, MindIE)
    return found


# -- msModelSlim's own -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """streamq's output from the golden source, calibrated on the golden calls."""
    root = tmp_path_factory.mktemp("golden")
    made = run("calib", "--model_path", GOLDEN / "source", "--save_path", root / "set", "--mode", "dump", "--dump",
               GOLDEN / "calls.safetensors", "--dtype", "fp32", "--device", "cpu")  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = run("quant", "--model_path", GOLDEN / "source", "--save_path", root / "out", "--config_path",
               GOLDEN / "static.yaml", "--calib", root / "set", "--device", "cpu", "--quiet")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "out", done


def both(golden: tuple[Path, Result]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mine = load_file(golden[0] / "quant_model_weight_w8a8.safetensors")
    return mine, load_file(GOLDEN / "quantized.safetensors")


def test_golden_names_types_codes_and_biases(golden: tuple[Path, Result]) -> None:
    mine, theirs = both(golden)
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        if name.endswith(".weight") or name.endswith(".bias"):
            assert torch.equal(mine[name], tensor), name
    source = load_file(GOLDEN / "source" / "diffusion_pytorch_model.safetensors")
    for name in mine.keys() - theirs.keys():
        assert torch.equal(mine[name], source[name]), name
    path = "quant_model_description_w8a8.json"
    assert json.loads((golden[0] / path).read_text()) == json.loads((GOLDEN / path).read_text())
    verdict = run("verify", golden[0], "--source", GOLDEN / "source", "--json")
    assert verdict.returncode == 0, verdict.stdout


def test_golden_ranges(golden: tuple[Path, Result]) -> None:
    """Equal bit for bit where no quantized layer lies before; msModelSlim's others come from fake-quantized inputs."""
    mine, theirs = both(golden)
    exact = {f"blocks.0.self_attn.{part}" for part in "qkv"} | {
        f"blocks.{i}.cross_attn.{part}" for i in (0, 1) for part in "kv"
    }
    layers = {name.removesuffix(".input_scale") for name in theirs if name.endswith(".input_scale")}
    assert len(layers) == 18 and exact < layers
    for layer in layers:
        scale, due = mine[f"{layer}.input_scale"], theirs[f"{layer}.input_scale"]
        offset, whole = mine[f"{layer}.input_offset"], theirs[f"{layer}.input_offset"]
        if layer in exact:
            assert torch.equal(scale, due) and torch.equal(offset, whole), layer
            assert torch.equal(mine[f"{layer}.deq_scale"], theirs[f"{layer}.deq_scale"]), layer
            assert torch.equal(mine[f"{layer}.quant_bias"], theirs[f"{layer}.quant_bias"]), layer
        else:
            assert abs(float(scale / due) - 1) < 0.01 and abs(float(offset - whole)) <= 2, layer
        assert torch.equal(offset, offset.round()) and -128 <= float(offset) <= 127, layer


def test_golden_warns_of_what_it_costs(golden: tuple[Path, Result]) -> None:
    assert "warning: w8a8_static: " in golden[1].stderr and "costs accuracy" in golden[1].stderr


# -- The formulas ------------------------------------------------------------------------------------------------------


def seen_by_the_float_model(made: Made, expert: str) -> Weights:
    weights = Weights(made.model.floats(expert))
    for sample in made.model.samples(expert):
        forward(weights, sample, 2, made.model.vace_layers)
    return weights


def check_static(made: Made, expert: str, layers: list[str], symmetric: bool) -> None:
    """Ranges from an independent forward, the other tensors exactly from the written ranges."""
    folder, divided, seen = reader(made, expert), made.divided(expert), seen_by_the_float_model(made, expert)
    floats = made.model.floats(expert)
    for layer in layers:
        assert folder.typed(layer) == "W8A8", layer
        s, r = divided[layer]
        lo = float((seen.low[layer] / s).amin().clamp_max(0))
        hi = float((seen.high[layer] / s).amax().clamp_min(0))
        scale, offset = folder.of(layer, "input_scale"), folder.of(layer, "input_offset")
        due = max(max(-lo, hi) / 127 if symmetric else (hi - lo) / 255, EPS)
        assert float(scale) == pytest.approx(due, rel=2e-5), layer
        assert abs(float(offset) - (0 if symmetric else round(-lo / due) - 128)) <= (0 if symmetric else 1), layer
        weight = floats[f"{layer}.weight"].float() * s.float() / r.float().unsqueeze(-1)
        steps = weight.abs().amax(1) / 127
        codes, bias = folder.of(layer, "weight"), folder.of(layer, "bias")
        assert torch.allclose(codes.float(), (weight / steps.unsqueeze(1)).round(), atol=1), layer
        assert torch.allclose(folder.of(layer, "deq_scale"), scale * steps, rtol=1e-6, atol=0), layer
        assert torch.equal(bias, floats[f"{layer}.bias"].float() / (r.float() if r.numel() > 1 else 1)), layer
        deq = folder.of(layer, "deq_scale")
        whole = torch.round(bias / deq - codes.sum(1, dtype=torch.int64).float() * offset)
        assert torch.equal(folder.of(layer, "quant_bias"), whole.int()), layer


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "plain"])
def test_ranges_and_formulas(make: Make, smooth: bool, symmetric: bool) -> None:
    steps = ([SMOOTH] if smooth else []) + [linear("per_tensor", symmetric)]
    made = make("i2v-14B", f"static-{symmetric}-{smooth}", *steps)
    layers = made.layers("")
    assert len(layers) == 24
    check_static(made, "", layers, symmetric)


@pytest.mark.parametrize("family", ["t2v-A14B", "ti2v-5B", "vace-1.3B"])
def test_families(make: Make, family: str) -> None:
    made = make(family, "static-smooth", SMOOTH, linear("per_tensor", False))
    for expert in made.model.experts:
        check_static(made, expert, made.layers(expert), False)


def test_experts_have_ranges_of_their_own(make: Make) -> None:
    made = make("t2v-A14B", "static-smooth", SMOOTH, linear("per_tensor", False))
    high, low = (reader(made, expert).of("blocks.0.cross_attn.o", "input_scale") for expert in made.model.experts)
    assert float(high) != float(low)


def test_layers_with_one_input_have_one_range(make: Make) -> None:
    made = make("i2v-14B", "static", linear("per_tensor", False))
    folder = reader(made)
    ranges: dict[str, tuple[float, float]] = {}
    for layer in made.layers(""):
        unit, inner = ".".join(layer.split(".")[:2]), ".".join(layer.split(".")[2:])
        group = next(name for name, members in GROUPS.items() if inner in members)
        mine = float(folder.of(layer, "input_scale")), float(folder.of(layer, "input_offset"))
        assert ranges.setdefault(f"{unit}.{group}", mine) == mine, layer
    # text and image states are the same tensors in every block
    assert ranges["blocks.0.attn2.text"] == ranges["blocks.1.attn2.text"] != ranges["blocks.1.attn2.image"]


# -- As the runtime runs it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [*((f, "fp32") for f in FAMILIES), ("i2v-14B", "bf16")])
def test_the_error_at_run_time(make: Make, family: str, dtype: str) -> None:
    for name, steps in {"static": [], "static-smooth": [SMOOTH]}.items():
        made = make(family, name, *steps, linear("per_tensor", False), dtype=dtype)
        for expert in made.model.experts:
            floats = Weights(made.model.floats(expert))
            for sample in made.model.samples(expert):
                both = (forward(w, sample, 2, made.model.vace_layers) for w in (reader(made, expert), floats))
                found, due = (end - sample.hidden.double() for end in both)
                assert 1e-5 < apart(found, due) < 0.03, name


def test_a_mixed_recipe(make: Make) -> None:
    made = make("t2v-1.3B", "mixed", *MIXED)
    folder = reader(made)
    cross = [f"blocks.{i}.cross_attn.{part}" for i in (0, 1) for part in "qkvo"]
    plain = [f"blocks.{i}.self_attn.{part}" for i in (0, 1) for part in "qkvo" if (i, part) != (1, "v")]
    check_static(made, "", [*cross, "blocks.0.ffn.2"], False)
    check_static(made, "", ["blocks.1.ffn.0"], True)
    types = {layer: folder.typed(layer) for layer in made.layers("")}
    expected = dict.fromkeys([*cross, "blocks.0.ffn.2", "blocks.1.ffn.0"], "W8A8")
    assert types == expected | dict.fromkeys([*plain, "blocks.0.ffn.0"], "W8A8_DYNAMIC")
    assert folder.typed("blocks.1.ffn.2") == folder.typed("blocks.1.self_attn.v") == "FLOAT"
    assert folder.quant_type == "W8A8", "the type of the last quantized layer"
    smoothed = {layer for layer in types if f"{layer}.div.mul_scale" in folder.made}
    assert smoothed == {*cross, "blocks.0.ffn.0", "blocks.1.ffn.0"} - {f"blocks.{i}.cross_attn.o" for i in (0, 1)}
    due = [forward(Weights(made.model.floats("")), s, 2, []) for s in made.model.samples("")]
    found = [forward(folder, s, 2, []) for s in made.model.samples("")]
    assert max(apart(a, b) for a, b in zip(found, due, strict=True)) < 0.02


@pytest.mark.parametrize("name", ["mixed", "static", "static-smooth"])
def test_every_tensor_is_described_once(make: Make, name: str) -> None:
    steps = {"mixed": MIXED, "static": (linear("per_tensor", False),)}
    made = make("t2v-1.3B", name, *steps.get(name, (SMOOTH, linear("per_tensor", False))))
    (path,) = made.out.glob("quant_model_description_*.json")
    keys = [key for key, _ in json.loads(path.read_text(), object_pairs_hook=list)]
    folder = reader(made)
    assert len(keys) == len(set(keys)) and set(keys) - {"model_quant_type"} == folder.made.keys()
    for layer in made.layers(""):
        below = ".linear" if f"{layer}.div.mul_scale" in folder.made else ""
        kind = folder.typed(layer)
        leaves = {"W8A8": ["weight", "quant_bias", "input_scale", "input_offset", "deq_scale"],
                  "W8A8_DYNAMIC": ["weight", "weight_scale", "weight_offset"]}[kind]  # fmt: skip
        dues = {f"{layer}{below}.{leaf}": kind for leaf in leaves} | {f"{layer}{below}.bias": "FLOAT"}
        dues |= {f"{layer}.div.mul_scale": "FLOAT"} if below else {}
        found = {key: word for key, word in folder.description.items() if key.startswith(f"{layer}.")}
        assert found == dues


@pytest.mark.parametrize("name", ["mixed", "static-smooth"])
def test_verify_plan_and_inspect(make: Make, name: str) -> None:
    made = make("t2v-1.3B", name, *(MIXED if name == "mixed" else (SMOOTH, linear("per_tensor", False))))
    verdict = run("verify", made.out, "--source", made.model.native, "--json")
    assert verdict.returncode == 0, verdict.stdout
    plan = json.loads(run("plan", *made.command[:3], made.out.with_name("none"), *made.command[4:], "--json").stdout)
    files = {str(p.relative_to(made.out)): p.stat().st_size for p in made.out.rglob("*") if p.is_file()}
    del files["streamq.json"]
    assert {file["path"]: file["bytes"] for file in plan["files"]} == files
    types = {layer: about["type"] for layer, about in made.manifest["layers"].items()}
    assert plan["layers"] == types
    inspected = json.loads(run("inspect", made.out, "--json").stdout)["layers"]
    assert inspected == types
    kinds = {"mixed": {"w8a8_static", "w8a8", "w8a8_static_smooth", "w8a8_smooth", "float"}}
    assert set(types.values()) == kinds.get(name, {"w8a8_static_smooth"})


def test_static_warns_and_lightx2v_has_no_static(make: Make, tmp_path: Path) -> None:
    made = make("t2v-1.3B", "mixed", *MIXED)
    assert "one activation range for all tokens and time steps costs accuracy" in made.done.stderr
    path = recipe(tmp_path / "static.yaml", linear("per_tensor", False))
    refused = run("quant", "--model_path", made.model.native, "--save_path", tmp_path / "out", "--config_path", path,
                  "--format", "lightx2v", "--device", "cpu")  # fmt: skip
    assert refused.returncode == 2 and "lightx2v" in refused.stderr
