"""ComfyUI's file as comfy-kitchen reads and computes it: names, dtypes, JSON, both experts, the prefix, ConvRot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comfy_kitchen.tensor import QuantizedTensor
from conftest import check_error, run, write_tiny
from consumer.load_comfyui import PREFIX, ComfyUI
from consumer.made import linear
from safetensors.torch import load_file, save_file
from torch import Tensor
from verify_kit import load_all, look, take_apart

from streamq.options import QuantOptions
from streamq.planner import make_plan

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "comfyui/golden_t2v_bf16_int8.safetensors"
SOURCE = DATA / "lightx2v/source_t2v_bf16"
KINDS = {"w8a8": "wan_int8.safetensors", "fp8": "wan_fp8.safetensors"}
CONVROT = "wan_int8_convrot.safetensors"
pytestmark = pytest.mark.usefixtures("one_core")


def quantize(source: Path, out: Path, *more: object, form: str = "comfyui") -> Path:
    done = run("quant", "--model_path", source, "--save_path", out, "--format", form, "--device", "cpu", "--quiet",
               *more)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def rotated(path: Path, size: int, **keys: Any) -> Path:
    """A recipe with ConvRot in groups of `size`."""
    step = linear(**keys)
    step["qconfig"]["weight"] = step["qconfig"]["weight"] | {"ext": {"convrot": size}}
    path.write_text(yaml.safe_dump({"apiversion": "multimodal_sd_modelslim_v1", "spec": {"process": [step]}}))
    return path


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def turn(x: Tensor, size: int) -> Tensor:
    """x · H^T in groups of `size`, H the Kronecker power of the regular Hadamard matrix of size 4."""
    matrix = base = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    return (x.double().unflatten(-1, (-1, size)) @ matrix.T).flatten(-2)


# -- comfy-kitchen's own file ------------------------------------------------------------------------------------------


def test_the_same_file_as_comfy_kitchen_makes(tmp_path: Path) -> None:
    """Names, dtypes, shapes, every layer's JSON to the byte, the metadata; and no weight further off than there."""
    out = quantize(SOURCE, tmp_path / "out", "--quant_type", "w8a8")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "streamq.json", "wan_int8.safetensors"]
    (metadata, mine), (due, theirs) = take_apart(out / KINDS["w8a8"]), take_apart(GOLDEN)
    assert metadata.keys() == due.keys() and metadata["format"] == due["format"] == "pt"
    named = [json.loads(one["_quantization_metadata"]) for one in (metadata, due)]
    assert named[0] == named[1] and len(named[0]["layers"]) == 20
    assert {name: entry[:2] for name, entry in mine.items()} == {name: entry[:2] for name, entry in theirs.items()}
    for name, (dtype, _, raw) in theirs.items():
        if dtype != "I8" and not name.endswith("weight_scale"):
            assert mine[name][2] == raw, name
    floats, made, golden = load_all(SOURCE), ComfyUI(out / KINDS["w8a8"]), ComfyUI(GOLDEN)
    assert made.layers.keys() == golden.layers.keys()
    for name in golden.layers:
        weight = floats[f"{name}.weight"]
        assert apart(made.weight(name), weight) <= 1.03 * apart(golden.weight(name), weight), name
        scale = made.held[f"{name}.weight_scale"]
        assert torch.equal(scale, scale.bfloat16().float()), name


def test_verify_takes_comfy_kitchens_own_file(tmp_path: Path) -> None:
    """Written by another tool: no manifest, scales that bf16 cannot hold, other places in the file."""
    (tmp_path / "wan.safetensors").write_bytes(GOLDEN.read_bytes())
    report = look(tmp_path, SOURCE)
    assert report.problems == [] and len(report.layers) == 20
    assert json.loads(run("inspect", tmp_path, "--json").stdout)["format"] == "comfyui"


# -- What is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_comfy_kitchen_computes_what_was_meant(tmp_path: Path, kind: str, dtype: str) -> None:
    source = write_tiny(tmp_path / "model", "i2v-14B", blocks=1, dtype=dtype)
    out = quantize(source, tmp_path / "out", "--quant_type", kind)
    made, floats = ComfyUI(out / KINDS[kind]), load_all(source)
    own = {f"{name}.{leaf}" for name in made.layers for leaf in ("weight", "bias")}
    assert len(made.layers) == 12 and made.floats.keys() | own == floats.keys()
    for name, tensor in made.floats.items():
        assert tensor.dtype == floats[name].dtype and torch.equal(tensor, floats[name]), name
    generator = torch.Generator().manual_seed(0)
    for name in made.layers:
        held, weight = made.held, floats[f"{name}.weight"].float()
        scale = held[f"{name}.weight_scale"]
        assert scale.shape == ((len(weight), 1) if kind == "w8a8" else ()) and scale.dtype == torch.float32
        meant = held[f"{name}.weight"].float() * scale
        assert torch.equal(made.weight(name), meant), name
        assert apart(meant, weight) < (0.012 if kind == "w8a8" else 0.03), name
        assert torch.equal(held[f"{name}.bias"], floats[f"{name}.bias"]) and held[f"{name}.bias"].dtype == (
            floats[f"{name}.bias"].dtype)  # fmt: skip
        x = torch.randn(7, weight.shape[1], generator=generator)
        most = x.abs().amax(-1, keepdim=True) / 127
        seen = (x / most).round() * most if kind == "w8a8" else x
        due = seen.double() @ meant.double().T + held[f"{name}.bias"].double()
        assert apart(made.product(name, x), due) < (1e-5 if kind == "w8a8" else 0.04), name


@pytest.mark.parametrize("size", [16, 64])
def test_convrot_is_comfy_kitchens(tmp_path: Path, size: int) -> None:
    """The weight is turned before, the input at run time; what is stored is in the turned basis."""
    source = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1)
    out = quantize(source, tmp_path / "out", "--config_path", rotated(tmp_path / "recipe.yaml", size))
    made, floats = ComfyUI(out / CONVROT), load_all(source)
    generator = torch.Generator().manual_seed(1)
    assert len(made.layers) == 10
    for name, tensor in made.layers.items():
        assert made.conf[name] == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        weight, held = floats[f"{name}.weight"].float(), made.held
        stored = held[f"{name}.weight"].float() * held[f"{name}.weight_scale"]
        assert apart(stored, turn(weight, size)) < 0.012 < apart(stored, weight), name
        assert apart(made.weight(name), weight) < 0.012, name
        theirs = QuantizedTensor.from_float(
            weight, "TensorWiseINT8Layout", per_channel=True, convrot=True, convrot_groupsize=size
        )
        assert apart(made.weight(name), weight) <= 1.03 * apart(theirs.dequantize(), weight), name
        assert int((tensor._qdata.int() - theirs._qdata.int()).abs().max()) <= 1, name
        x = torch.randn(7, weight.shape[1], generator=generator)
        turned = turn(x, size)
        most = turned.abs().amax(-1, keepdim=True) / 127
        due = ((turned / most).round() * most) @ stored.double().T + held[f"{name}.bias"].double()
        assert apart(made.product(name, x), due) < 2e-3, name  # a half may be rounded the other way
    report = look(out, source)
    assert report.problems == [] and max(about["rel_error"] for about in report.layers.values()) < 0.012


def test_convrot_helps_a_weight_with_outliers(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1)
    path = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.ffn.0.weight"][:, 5] *= 40
    save_file(tensors, path)
    errors = {}
    for name, more in {
        KINDS["w8a8"]: ("--quant_type", "w8a8"),
        CONVROT: ("--config_path", rotated(tmp_path / "recipe.yaml", 64)),
    }.items():
        out = quantize(source, tmp_path / name, *more)
        errors[name] = apart(ComfyUI(out / name).weight("blocks.0.ffn.0"), tensors["blocks.0.ffn.0.weight"])
    assert errors[CONVROT] < 0.5 * errors[KINDS["w8a8"]]


def test_a_layer_that_convrot_does_not_fit_stays_float(tmp_path: Path) -> None:
    """ffn.2 of this source has 160 inputs."""
    out = tmp_path / "out"
    done = run("quant", "--model_path", SOURCE, "--save_path", out, "--format", "comfyui", "--device", "cpu", "--quiet",
               "--config_path", rotated(tmp_path / "recipe.yaml", 64))  # fmt: skip
    assert done.returncode == 0 and "160 inputs, not a multiple of 64" in done.stderr
    made, floats = ComfyUI(out / CONVROT), load_all(SOURCE)
    assert len(made.layers) == 18 and "blocks.1.ffn.2" not in made.layers
    assert torch.equal(made.floats["blocks.1.ffn.2.weight"], floats["blocks.1.ffn.2.weight"])
    assert look(out, SOURCE).problems == []


def test_one_file_may_hold_both_types(tmp_path: Path) -> None:
    """Each layer says what it is."""
    scales = {"scope": "per_tensor", "dtype": "fp8_e4m3"}
    fp8 = {"act": {"scope": "per_token", "dtype": "fp8_e4m3"}, "weight": scales}
    steps = [{"type": "linear_quant", "qconfig": fp8, "include": ["*self_attn*"]}, linear(exclude=["*ffn.2"])]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"apiversion": "multimodal_sd_modelslim_v1", "spec": {"process": steps}}))
    source = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1)
    out = quantize(source, tmp_path / "out", "--config_path", path)
    made = ComfyUI(out / "wan_fp8_int8.safetensors")
    formats = [made.conf[name]["format"] for name in made.layers]
    assert (formats.count("float8_e4m3fn"), formats.count("int8_tensorwise"), len(formats)) == (4, 5, 9)
    assert look(out, source).problems == []


# -- Names and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix(tmp_path: Path, kind: str) -> None:
    """On every name, in the metadata too; a source's own prefix changes nothing."""
    plain = write_tiny(tmp_path / "plain", "t2v-1.3B", blocks=1)
    source = write_tiny(tmp_path / "prefixed", "t2v-1.3B", blocks=1, prefix=PREFIX)
    made = {}
    for name, given, more in (
        ("without", source, ()), ("said", plain, ("--layout", "plain")), ("with", source, ("--layout", "prefixed")),
    ):  # fmt: skip
        out = quantize(given, tmp_path / name, "--quant_type", kind, *more)
        made[name] = take_apart(out / KINDS[kind])
        for original in (source, plain):
            report = look(out, original)
            assert report.problems == [] and len(report.layers) == 10
            assert all(about["rel_error"] < 0.03 for about in report.layers.values())
    assert made["without"] == made["said"]
    seen = {name: json.loads(run("inspect", tmp_path / name, "--json").stdout)["prefix"] for name in made}
    assert seen == {"without": "", "said": "", "with": PREFIX}
    assert {PREFIX + name: entry for name, entry in made["without"][1].items()} == made["with"][1]
    layers = [json.loads(made[name][0]["_quantization_metadata"])["layers"] for name in ("without", "with")]
    assert {PREFIX + name: conf for name, conf in layers[0].items()} == layers[1]
    loaded = ComfyUI(tmp_path / "with" / KINDS[kind])
    assert loaded.prefixed and len(loaded.layers) == 10
    assert json.loads(run("inspect", tmp_path / "with", "--json").stdout)["layers"]["blocks.0.ffn.0"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_both_experts(tmp_path: Path, kind: str) -> None:
    source = write_tiny(tmp_path / "model", "t2v-A14B", blocks=1, dtype="bf16")
    out = quantize(source, tmp_path / "out", "--quant_type", kind)
    found = {path.parent.name: ComfyUI(path) for path in sorted(out.rglob("*.safetensors"))}
    assert list(found) == ["high_noise_model", "low_noise_model"]
    for name, made in found.items():
        floats = load_all(source / name)
        assert all(apart(made.weight(layer), floats[f"{layer}.weight"]) < 0.03 for layer in made.layers)
    assert look(out, source).problems == []
    assert [line.split()[-1].rpartition("/")[2] for line in usage(source, tmp_path, kind)[:2]] == [
        f"high_noise_{KINDS[kind]}", f"low_noise_{KINDS[kind]}",
    ]  # fmt: skip


def usage(source: Path, tmp_path: Path, kind: str) -> list[str]:
    done = run("quant", "--model_path", source, "--save_path", tmp_path / "again", "--format", "comfyui", "--device",
               "cpu", "--quiet", "--json", "--quant_type", kind)  # fmt: skip
    lines: list[str] = json.loads(done.stdout)["usage"]["comfyui"]
    return lines


def test_lightx2v_shares_the_result(tmp_path: Path) -> None:
    """Equal schemes, so that a layer is quantized once for both; each folder is what a run of its own writes."""
    source = write_tiny(tmp_path / "model", "t2v-1.3B", dtype="bf16")
    both = quantize(source, tmp_path / "both", "--quant_type", "w8a8", form="lightx2v,comfyui")
    for form in ("lightx2v", "comfyui"):
        alone = quantize(source, tmp_path / form, "--quant_type", "w8a8", form=form)
        names = {path.name for path in (both / form).iterdir()}
        assert names == {path.name for path in alone.iterdir()} - {"streamq.json"}
        assert all((both / form / name).read_bytes() == (alone / name).read_bytes() for name in names)
    mine, theirs = load_all(both / "comfyui"), load_all(both / "lightx2v")
    assert mine.keys() - theirs.keys() == {name for name in mine if name.endswith(".comfy_quant")}
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    options = QuantOptions(str(source), tmp_path / "planned", quant_type="w8a8", formats=("lightx2v", "comfyui"),
                           device="cpu")  # fmt: skip
    steps = [step for unit in make_plan(options, download=False).experts[0].units for step in unit.steps]
    quantized = [step for step in steps if any(output.scheme for output in step.outputs)]
    assert len(quantized) == 20
    assert all(len({output.scheme for output in step.outputs}) == 1 for step in quantized)


def test_fp8_with_two_recipes(tmp_path: Path) -> None:
    """LightX2V has a scale per row, ComfyUI one a matrix: one run reads the source once for both."""
    source = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1)
    both = quantize(source, tmp_path / "both", "--quant_type", "fp8", form="lightx2v,comfyui")
    scales = {form: load_all(both / form)["blocks.0.ffn.0.weight_scale"] for form in ("lightx2v", "comfyui")}
    assert scales["lightx2v"].shape == (128, 1) and scales["comfyui"].shape == ()
    assert scales["comfyui"] == scales["lightx2v"].max()
    assert look(both, source).problems == []


# -- What is refused ---------------------------------------------------------------------------------------------------


def one_step(path: Path, qconfig: dict[str, Any]) -> Path:
    step = {"type": "linear_quant", "qconfig": qconfig}
    path.write_text(yaml.safe_dump({"apiversion": "multimodal_sd_modelslim_v1", "spec": {"process": [step]}}))
    return path


FP8 = {"scope": "per_token", "dtype": "fp8_e4m3"}
INT8 = {"scope": "per_token", "dtype": "int8"}
REFUSED: dict[str, tuple[tuple[object, ...], dict[str, Any] | None, tuple[str, ...]]] = {
    "shards": (("--quant_type", "w8a8", "--max_shard_size", "5GB"), None, ("comfyui", "--max_shard_size")),
    "smoothing": (("--quant_type", "w8a8_smooth"), None, ("w8a8_smooth", "comfyui", "lightx2v")),
    "no such type": (("--quant_type", "w4a16"), None, ("w4a16", "comfyui")),
    "fp8 per row": ((), {"act": FP8, "weight": {"scope": "per_channel", "dtype": "fp8_e4m3"}},
                    ("fp8", "per_channel", "per_tensor", "fp8_comfyui")),
    "int8 with one scale": ((), {"act": INT8, "weight": {"scope": "per_tensor", "dtype": "int8"}},
                            ("int8", "per_tensor", "per_channel", "w8a8_all")),
    "static": ((), {"act": {"scope": "per_tensor", "dtype": "int8"}, "weight": {"scope": "per_channel",
                                                                               "dtype": "int8"}},
               ("w8a8_static", "comfyui", "w8a8, fp8")),
    "nothing fits": (("--quant_type", "w8a8_convrot"), None, ("64 inputs", "256", "comfyui")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    more, qconfig, says = REFUSED[case]
    if qconfig is not None:
        more = ("--config_path", one_step(tmp_path / "recipe.yaml", qconfig))
    done = run("quant", "--model_path", write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1),
               "--save_path", tmp_path / "out", "--format", "comfyui", "--device", "cpu", *more)  # fmt: skip
    check_error(done, *says)
    assert done.returncode == 2 and not (tmp_path / "out").exists()


def test_other_formats_have_no_prefix(tmp_path: Path) -> None:
    done = run("plan", "--model_path", write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1), "--save_path",
               tmp_path / "out", "--quant_type", "w8a8", "--format", "lightx2v", "--layout", "prefixed")  # fmt: skip
    check_error(done, "--layout prefixed", "comfyui", "lightx2v")
    assert done.returncode == 2
