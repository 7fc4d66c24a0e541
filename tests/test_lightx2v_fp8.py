"""fp8 for LightX2V: its converter's bytes, the default arithmetic, the loader's reading, the configuration, damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import check_error, run, write_tiny
from consumer.load_lightx2v import LightX2V, registered
from consumer.made import Made, Model, linear, recipe
from consumer.wan_block import Weights, apart
from consumer.wan_block import run as forward
from safetensors.torch import load_file
from verify_kit import change, copied, drop, load_all, look, names, rescale, retype, sign, truncate

DATA = Path(__file__).parent / "data" / "lightx2v"
SAMPLE = "lightx2v_config.json"
SCALES = ("--quant_type", "fp8", "--format", "lightx2v", "--device", "cpu", "--quiet")
pytestmark = pytest.mark.usefixtures("one_core")


def fp8(scope: str = "per_channel", **keys: Any) -> dict[str, Any]:
    """A `linear_quant` step."""
    qconfig = {
        "act": {"scope": "per_token", "dtype": "fp8_e4m3", "symmetric": True, "method": "minmax"},
        "weight": {"scope": scope, "dtype": "fp8_e4m3", "symmetric": True, "method": "minmax"},
    }
    return {"type": "linear_quant", "qconfig": qconfig, **keys}


def quantize(source: Path, out: Path, *more: object) -> Path:
    done = run("quant", "--model_path", source, "--save_path", out, *(more or SCALES))
    assert done.returncode == 0, done.stderr
    return out


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# -- Arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single", "block"])
@pytest.mark.parametrize("case", ["t2v_bf16", "i2v_fp32"])
def test_match_is_its_converters(tmp_path: Path, case: str, layout: str) -> None:
    source = DATA / f"source_{case}"
    out = quantize(source, tmp_path / "out", *SCALES, "--match", "lightx2v", "--layout", layout)
    mine, theirs = load_all(out), load_file(DATA / f"golden_{case}_fp8.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(mine[name]) == raw(tensor), name
    assert look(out, source).problems == []


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The code of the nearest e4m3 number, half to even, by comparing with all 127 of them."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    at = torch.searchsorted(grid, x.abs().double().clamp_max(448.0)).clamp_max(126)
    below = (at - 1).clamp_min(0)
    low, high = x.abs().double() - grid[below], grid[at] - x.abs().double()
    up = (high < low) | ((high == low) & (at % 2 == 0))
    code = torch.where(up, at, below)
    return (code + 128 * torch.signbit(x)).to(torch.uint8)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_default_is_fp32_with_a_scale_that_bf16_holds(tmp_path: Path, dtype: str) -> None:
    source = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1, dtype=dtype)
    floats, mine = load_all(source), load_all(quantize(source, tmp_path / "out"))
    codes = [name for name, tensor in mine.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(codes) == 10
    for name in codes:
        weight = floats[name].float()
        scale = (weight.abs().amax(1, keepdim=True).clamp_min(1e-5) / 448).bfloat16().float()
        assert torch.equal(mine[name.replace("weight", "weight_scale")], scale), name
        due = nearest_e4m3(weight / scale)
        assert torch.equal(mine[name].view(torch.uint8), due), name
        assert raw(mine[name.replace("weight", "bias")]) == raw(floats[name.replace("weight", "bias")])


def test_default_beats_the_converter_as_loaded(tmp_path: Path) -> None:
    """LightX2V's plain load rounds scales to bf16, in this source's converter output they are bf16 already."""
    source = DATA / "source_t2v_bf16"
    floats, mine = load_all(source), load_all(quantize(source, tmp_path / "out"))
    theirs = load_file(DATA / "golden_t2v_bf16_fp8.safetensors")

    def error(made: dict[str, torch.Tensor]) -> float:
        lost = 0.0
        for name in (n for n, tensor in made.items() if tensor.dtype == torch.float8_e4m3fn):
            scale = made[name.replace("weight", "weight_scale")].bfloat16().float()
            lost += float((made[name].float() * scale - floats[name].float())[7:].square().sum())  # behind edge cases
        return lost

    assert error(mine) < error(theirs)


# -- Loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["block", "single"])
@pytest.mark.parametrize("family", ["i2v-14B", "t2v-A14B", "vace-1.3B"])
def test_every_registered_name_is_there_and_no_other(tmp_path: Path, family: str, layout: str) -> None:
    source = write_tiny(tmp_path / "model", family, dtype="bf16")
    out = quantize(source, tmp_path / "out", *SCALES, "--layout", layout)
    experts = ("high_noise_model", "low_noise_model") if "A14B" in family else ("",)
    for expert in experts:
        loaded = LightX2V(out / expert, branch=family == "i2v-14B")
        assert loaded.scheme == "fp8" and loaded.unused() == set()
        names = registered(loaded.config, branch=family == "i2v-14B")
        assert set(loaded.layers) == set(names.layers) and len(names.layers) >= 20
    assert look(out, source).problems == []


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """fp8 with and without smoothing, and smoothed int8, of one model on one calibration set."""
    root = tmp_path_factory.mktemp("lightx2v-fp8")
    model = Model(root / "model", "t2v-1.3B")
    smooth = {"type": "smooth_quant", "alpha": 0.5}
    steps = {"plain": [fp8()], "smooth": [smooth, fp8()], "int8": [smooth, linear()]}
    return {
        name: Made(model, root / name, "lightx2v", recipe(root / f"{name}.yaml", *step)) for name, step in steps.items()
    }


@pytest.mark.parametrize("name", ["plain", "smooth"])
def test_the_block_computes_the_float_blocks_output(smoothed: dict[str, Made], name: str) -> None:
    """Activations in fp8, too; loaded plainly and lazily. Affine tensors are looked up where config.json says so."""
    made = smoothed[name]
    for how in ({}, {"exact": True}):
        mine, floats = made.reader("", **how), Weights(made.model.floats(""))
        assert isinstance(mine, LightX2V) and mine.scheme == "fp8" and mine.unused() == set()
        for sample in made.model.samples(""):
            assert apart(*(forward(w, sample, 2, []) for w in (mine, floats))) < 0.04
    assert (mine.config.get("quant_method") == "advanced_ptq") == (name == "smooth")
    assert any(".affine_norm" in tensor for tensor in mine.tensors) == (name == "smooth")
    assert look(made.out, made.model.native).problems == []


def test_smoothing_is_the_same_for_both_families(smoothed: dict[str, Made]) -> None:
    """s comes from inputs and float weights, its places from the groups: the codes' type has no part in it."""
    vectors = {name: smoothed[name].vectors("") for name in ("smooth", "int8")}
    assert vectors["smooth"].keys() == vectors["int8"].keys() and len(vectors["int8"]) == 2 * 5
    for group, (way, vector) in vectors["smooth"].items():
        assert way == vectors["int8"][group][0] and torch.equal(vector, vectors["int8"][group][1]), group


# -- The configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("t2v-1.3B", {"infer_steps": 50, "sample_shift": 8, "target_height": 480}),
        ("i2v-14B", {"infer_steps": 40, "sample_guide_scale": 5}),
        ("flf2v-14B", {"sample_shift": 16, "target_width": 1280}),
        ("vace-1.3B", {"sample_shift": 16}),
        ("ti2v-5B", {"vae_stride": [4, 16, 16], "num_channels_latents": 48, "target_video_length": 121}),
        ("t2v-A14B", {"boundary": 0.875, "sample_guide_scale": [4.0, 3.0]}),
        ("i2v-A14B", {"boundary": 0.9, "use_image_encoder": False}),
    ],
)
@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
def test_a_sample_configuration(tmp_path: Path, family: str, settings: dict[str, Any], kind: str) -> None:
    out = quantize(write_tiny(tmp_path / "model", family, blocks=1), tmp_path / "out", "--quant_type", kind,
                   "--format", "lightx2v", "--device", "cpu", "--quiet")  # fmt: skip
    config = json.loads((out / SAMPLE).read_text())
    assert settings.items() <= config.items()
    assert config["dit_quantized"] is True
    assert config["dit_quant_scheme"] == {"w8a8": "int8-vllm", "fp8": "fp8-vllm"}[kind]
    assert "quant_method" not in config
    paths = {key: value for key, value in config.items() if key.endswith("_ckpt")}
    if "A14B" in family:
        assert paths == {f"{e}_quantized_ckpt": f"PATH_TO_THIS_FOLDER/{e}_model" for e in ("high_noise", "low_noise")}
        assert not list(out.glob("*/" + SAMPLE))
    else:
        assert paths == {"dit_quantized_ckpt": "PATH_TO_THIS_FOLDER"}
    assert str(tmp_path) not in (out / SAMPLE).read_text()


def test_an_expert_alone_has_no_settings_of_another_model(tmp_path: Path) -> None:
    """36 channels without an image branch is Wan2.2's I2V, which LightX2V loads with both experts."""
    source = write_tiny(tmp_path / "model", "i2v-A14B", blocks=1) / "high_noise_model"
    config = json.loads((quantize(source, tmp_path / "out") / SAMPLE).read_text())
    assert config.keys() == {"dit_quantized", "dit_quant_scheme", "dit_quantized_ckpt"}


def test_a_smoothed_model_is_asked_for_in_the_json_too(smoothed: dict[str, Made]) -> None:
    """With two experts LightX2V reads no config.json beside the weights."""
    for name, due in (("smooth", "advanced_ptq"), ("plain", None)):
        assert json.loads((smoothed[name].out / SAMPLE).read_text()).get("quant_method") == due


def test_the_end_of_a_run_says_the_same(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", "t2v-A14B", blocks=1)
    done = run("quant", "--model_path", source, "--save_path", tmp_path / "out", "--quant_type", "w8a8",
               "--format", "lightx2v", "--device", "cpu", "--quiet", "--json")  # fmt: skip
    lines = json.loads(done.stdout)["usage"]["lightx2v"]
    keys = json.loads(lines[1])
    assert keys["high_noise_quantized_ckpt"] == str(tmp_path / "out" / "high_noise_model")
    assert "dit_quantized_ckpt" not in keys
    assert "--model_cls wan2.2_moe --task t2v" in lines[3] and str(tmp_path / "out" / SAMPLE) in lines[3]
    assert any("npu" in line and "lazy_load" in line for line in lines[4:])


# -- What is refused ---------------------------------------------------------------------------------------------------

CONVROT = linear()
CONVROT["qconfig"]["weight"] = CONVROT["qconfig"]["weight"] | {"ext": {"convrot": 16}}
REFUSED: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "mixed": ([fp8(include=["*self_attn*"]), linear()], ("fp8", "w8a8", "one scheme")),
    "one scale": ([fp8("per_tensor")], ("per_tensor", "per_channel", "streamq recipes fp8")),
    "rotated": ([CONVROT], ("convrot", "comfyui")),
    "some float": ([fp8(exclude=["*ffn.2"])], ("1 of 10", "ffn.2")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    steps, says = REFUSED[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"apiversion": "multimodal_sd_modelslim_v1", "spec": {"process": steps}}))
    done = run("quant", "--model_path", write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1),
               "--save_path", tmp_path / "out", "--config_path", path, "--format", "lightx2v")  # fmt: skip
    check_error(done, "lightx2v", *says)
    assert done.returncode == 2 and not (tmp_path / "out").exists()


# -- Damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["w8a8", "fp8"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, output) of a small model in bf16."""
    root = tmp_path_factory.mktemp(request.param)
    source = write_tiny(root / "model", "i2v-14B", blocks=2, dtype="bf16")
    return source, quantize(source, root / "out", "--quant_type", request.param, "--format", "lightx2v", "--device",
                            "cpu", "--quiet")  # fmt: skip


NAMES = (
    "blocks.1.self_attn.q.weight", "blocks.1.self_attn.q.weight_scale", "blocks.1.self_attn.q.bias",
    "blocks.1.cross_attn.k_img.bias", "blocks.0.norm3.bias", "blocks.0.self_attn.norm_q.weight", "blocks.1.modulation",
    "text_embedding.0.weight", "head.head.bias", "patch_embedding.weight", "img_emb.proj.0.bias",
)  # fmt: skip
WAYS = {"dropped": drop, "truncated": truncate, "retyped": retype}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_lost_or_bent_tensor_shows(written: tuple[Path, Path], tmp_path: Path, name: str, way: str) -> None:
    """By checksums; with a manifest that was signed anew; without any; and beside the source."""
    source, out = written
    folder = copied(out, tmp_path / "out", manifest=True)
    change(folder, name, WAYS[way])
    assert any("sha256" in problem for problem in look(folder).problems)
    sign(folder)
    assert names(name, look(folder).problems)
    (folder / "streamq.json").unlink()
    assert names(name, look(folder).problems)
    assert look(folder, source).problems != []


@pytest.mark.parametrize("name", NAMES)
def test_another_value_shows_beside_the_source(written: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    source, out = written
    folder = copied(out, tmp_path / "out", manifest=False)
    change(folder, name, rescale)
    assert names(name, look(folder, source).problems)


def test_an_undamaged_folder_has_no_problem(written: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = written
    assert look(out).problems == look(out, source).problems == []
    assert look(copied(out, tmp_path / "out", manifest=False), source).problems == []


def test_a_scale_that_was_never_rounded(written: tuple[Path, Path], tmp_path: Path) -> None:
    """The manifest says whose arithmetic it was; LightX2V's converter, and its bytes, have such scales."""
    source, out = written
    folder = copied(out, tmp_path / "out", manifest=True)
    name = "blocks.0.ffn.0.weight_scale"
    change(folder, name, lambda e: (e[0], e[1], raw(torch.frombuffer(bytearray(e[2]), dtype=torch.float32) * 1.003)))
    sign(folder)
    assert [p for p in look(folder).problems if "bf16" in p] == look(folder).problems != []
    manifest = json.loads((folder / "streamq.json").read_text())
    manifest["options"]["match"] = "lightx2v"
    (folder / "streamq.json").write_text(json.dumps(manifest))
    assert look(folder).problems == []


Spoil = Callable[[Path], object]


def other_scheme(folder: Path) -> None:
    """One layer's codes taken for the other family's."""
    swap = {"I8": "F8_E4M3", "F8_E4M3": "I8"}
    change(folder, "blocks.1.ffn.2.weight", lambda entry: (swap[entry[0]], entry[1], entry[2]))


def config(**keys: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        held = json.loads(path.read_text()) | keys
        path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return spoil


FOLDERS: dict[str, tuple[Spoil, str]] = {
    "both schemes": (other_scheme, "one scheme"),
    "no dim": (config(dim=None), "no dim"),
    "affine tensors asked for": (config(quant_method="advanced_ptq"), "no affine tensor"),
    "a stray file": (lambda folder: (folder / "lora.safetensors").write_bytes(
        (folder / "block_0.safetensors").read_bytes()), "block_0.safetensors and lora.safetensors"),
    "a missing block": (lambda folder: (folder / "block_1.safetensors").unlink(), "block_1.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_lightx2v_would_read_wrong(written: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    spoil, says = FOLDERS[case]
    folder = copied(written[1], tmp_path / "out", manifest=case == "a missing block")
    assert look(folder).problems == []
    spoil(folder)
    assert any(says in problem for problem in look(folder).problems)
