"""MindIE's MX types and attention marks: msModelSlim's own bytes, what is written, and every damage that is found.

mindiesd itself reads these folders in test_mindie_mx_loader.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, Tiny, run, write_tiny
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data/mindie"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Tensors = dict[str, torch.Tensor]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def quantize(source: Path, out: Path, *more: object) -> Tensors:
    result = run("quant", "--model_path", source, "--save_path", out, "--device", "cpu", "--quiet", *more)
    assert result.returncode == 0, result.stderr
    return {name: t for path in sorted(out.glob("*.safetensors")) for name, t in load_file(path).items()}


def described(folder: Path) -> dict[str, str]:
    (path,) = folder.glob("quant_model_description_*.json")
    document: dict[str, str] = json.loads(path.read_text())
    return document


def decoded(tensors: Tensors, layer: str) -> torch.Tensor:
    """What a layer's tensors stand for, float64, by the formats' definition."""
    codes, exponents = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
    if codes.dtype == torch.uint8:
        halves = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).long()
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)[halves]
    else:
        values = codes.double()
    return (values.unflatten(1, (-1, 32)) * torch.exp2(exponents.double() - 127).unsqueeze(2)).flatten(1)


# --- what msModelSlim made ---


@pytest.mark.parametrize("more", [[], ["--match", "msmodelslim"]], ids=["default", "match"])
@pytest.mark.parametrize(("golden", "recipe"), [("w8a8_mxfp8", "mxfp8.yaml"), ("w4a4_mxfp4", "mxfp4.yaml")])
def test_the_bytes_are_msmodelslims(tmp_path: Path, golden: str, recipe: str, more: list[str]) -> None:
    """Of an fp32 source, where both arithmetics are one."""
    mine = quantize(DATA / "t2v_fp32", tmp_path / "out", "--config_path", DATA / recipe, *more)
    theirs = load_file(DATA / golden / "quantized.safetensors")
    floats = load_file(next((DATA / "t2v_fp32").glob("*.safetensors")))
    assert len(theirs) > 30 and theirs.keys() <= mine.keys()
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(mine[name]) == raw(tensor), name
    for name in mine.keys() - theirs.keys():
        assert raw(mine[name]) == raw(floats[name]), name
    expected = json.loads(next((DATA / golden).glob("*.json")).read_text())
    assert described(tmp_path / "out") == expected
    assert expected.keys() - {"model_quant_type"} == mine.keys()


def test_verify_knows_what_msmodelslim_made(tmp_path: Path) -> None:
    """Without a manifest, against the source; and `inspect` names its types."""
    for golden, recipe in (("w8a8_mxfp8", "mxfp8.yaml"), ("w4a4_mxfp4", "mxfp4.yaml")):
        out = tmp_path / golden
        quantize(DATA / "t2v_fp32", out, "--config_path", DATA / recipe)
        (out / "streamq.json").unlink()
        report = json.loads(run("verify", out, "--source", DATA / "t2v_fp32", "--json").stdout)
        assert report["problems"] == []
        errors = [layer["rel_error"] for layer in report["layers"].values()]
        assert len(errors) in (18, 20) and all(0.01 < error < 0.2 for error in errors)
        kinds = json.loads(run("inspect", out, "--json").stdout)["layers"]
        assert set(kinds.values()) - {"float"} == {golden}


# --- what is written ---


@pytest.fixture(scope="module", name="source")
def source_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("mx") / "source", "t2v-1.3B", blocks=6)


@pytest.fixture(scope="module", name="made")
def made_fixture(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w4a4f4: both MX types, both kinds of attention, rotations. Nobody writes to it."""
    out = tmp_path_factory.mktemp("mx") / "made"
    quantize(source, out, "--quant_type", "w4a4f4")
    return out


def tensors_of(folder: Path) -> Tensors:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def test_tensors_dtypes_and_types(source: Path, made: Path) -> None:
    floats, tensors, types = load_file(next(source.glob("*.safetensors"))), tensors_of(made), described(made)
    assert types.pop("model_quant_type") == "W4A4_MXFP4"
    marks = {name: types.pop(name) for name in list(types) if name.endswith(".quant_type")}
    assert types.keys() == tensors.keys()
    layers = [name.removesuffix(".weight") for name, t in floats.items() if t.ndim == 2 and name.startswith("blocks.")]
    assert len(layers) == 60
    for layer in layers:
        out, width = floats[f"{layer}.weight"].shape
        early = int(layer.split(".")[1]) < 5
        kind, dtype, packed = ("W8A8_MXFP8", torch.float8_e4m3fn, 1) if early else ("W4A4_MXFP4", torch.uint8, 2)
        weight, scale, bias = (tensors[f"{layer}.{leaf}"] for leaf in ("weight", "weight_scale", "bias"))
        assert (weight.dtype, tuple(weight.shape)) == (dtype, (out, width // packed)), layer
        assert (scale.dtype, tuple(scale.shape)) == (torch.uint8, (out, width // 32)), layer
        assert bias.dtype == torch.float32 and torch.equal(bias, floats[f"{layer}.bias"])
        assert types[f"{layer}.weight"] == types[f"{layer}.weight_scale"] == kind
        assert types[f"{layer}.bias"] == "FLOAT"
        assert f"{layer}.weight_offset" not in tensors
        exact = floats[f"{layer}.weight"].double()
        error = float((decoded(tensors, layer) - exact).norm() / exact.norm())
        assert error < (0.04 if early else 0.15), (layer, error)
    assert marks == {f"blocks.{i}.self_attn.quant_type": "MXFP4_DYNAMIC" if i else "FP8_DYNAMIC" for i in range(6)}
    rotations = {name: t for name, t in tensors.items() if name.endswith("_rot")}
    assert set(rotations) == {f"blocks.{i}.self_attn.{leaf}" for i in range(6) for leaf in ("q_rot", "k_rot")}
    for name, turn in rotations.items():
        assert turn.dtype == torch.bfloat16 and turn.shape == (32, 32) and types[name] == "FLOAT"
        assert torch.equal(turn, rotations["blocks.0.self_attn.q_rot"])
        assert torch.allclose(turn.double() @ turn.double().T, torch.eye(32, dtype=torch.float64), atol=1e-3)
    own = {name for layer in layers for name in (f"{layer}.weight", f"{layer}.weight_scale", f"{layer}.bias")}
    for name in tensors.keys() - own - rotations.keys():
        assert raw(tensors[name]) == raw(floats[name]), name


def test_the_even_column_is_the_low_half(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("t2v-1.3B", blocks=1)
    (path,) = source.glob("*.safetensors")
    floats = load_file(path)
    floats["blocks.0.ffn.0.weight"] = torch.tensor([6.0, 0.5, -6.0, -0.5] * 16).repeat(128, 1)
    save_file(floats, path)
    made = quantize(source, tmp_path / "out", "--config_path", DATA / "mxfp4.yaml")
    # codes of e2m1: 6 is 7, 0.5 is 1, and 8 more where negative
    assert made["blocks.0.ffn.0.weight"][0, :2].tolist() == [0x17, 0x9F]
    assert made["blocks.0.ffn.0.weight_scale"].unique().tolist() == [127]


def recipe_of(tmp_path: Path, *kinds: tuple[str, str]) -> Path:
    """A recipe that gives each (pattern, type) in turn."""
    steps = []
    for pattern, kind in kinds:
        scopes = {"int8": ("per_token", "per_channel")}.get(kind, ("per_block", "per_block"))
        act, weight = ({"scope": scope, "dtype": kind, "method": "minmax"} for scope in scopes)
        steps.append({"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, "include": [pattern]})
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"apiversion": "multimodal_sd_modelslim_v1", "spec": {"process": steps}}))
    return path


@pytest.mark.parametrize(
    ("kinds", "quant_type"),
    [
        ([("blocks.0.*", "int8"), ("*ffn*", "mxfp4"), ("*", "mxfp8")], "W4A4_MXFP4"),
        ([("*ffn.2", "int8"), ("*", "mxfp8")], "W8A8_DYNAMIC"),
        ([("blocks.0.*", "mxfp4"), ("*.ffn.2", "mxfp8"), ("*", "int8")], "W8A8_MXFP8"),
    ],
)
def test_mixed_types_go_by_the_last_layer_s_name(
    tiny: Tiny, tmp_path: Path, kinds: list[tuple[str, str]], quant_type: str
) -> None:
    source = tiny("t2v-1.3B")
    made = quantize(source, tmp_path / "out", "--config_path", recipe_of(tmp_path, *kinds))
    assert {path.name for path in (tmp_path / "out").glob("quant_model_*")} == {
        f"quant_model_weight_{quant_type.lower()}.safetensors",
        f"quant_model_description_{quant_type.lower()}.json",
    }
    types = described(tmp_path / "out")
    assert types["model_quant_type"] == quant_type == types["blocks.1.ffn.2.weight"]
    assert len(set(types.values()) - {"FLOAT"}) == len(kinds)
    assert types.keys() - {"model_quant_type"} == made.keys()
    checked = run("verify", tmp_path / "out", "--source", source)
    assert checked.returncode == 0, checked.stdout


def test_both_experts_carry_their_own(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("t2v-A14B", dtype="bf16", layout="diffusers")
    quantize(source, tmp_path / "out", "--quant_type", "w8a8f8")
    for expert in ("high_noise_model", "low_noise_model"):
        types = described(tmp_path / "out" / expert)
        assert types["blocks.1.self_attn.quant_type"] == "FP8_DYNAMIC"
        assert "blocks.0.self_attn.quant_type" not in types and "blocks.0.self_attn.q_rot" not in types
        assert tensors_of(tmp_path / "out" / expert)["blocks.1.self_attn.k_rot"].shape == (32, 32)
    assert run("verify", tmp_path / "out", "--source", source).returncode == 0


def test_the_card_says_what_the_runtime_must_be(made: Path) -> None:
    text = (made / "README.md").read_text()
    assert "mindiesd 3.1.0" in text and "fa_quant" in text and "quant_model_description_w4a4_mxfp4.json" in text


def test_match_rounds_in_the_source_s_dtype(tmp_path: Path) -> None:
    """A few blocks of a bf16 matrix get another exponent, because its logarithms are rounded, too."""
    source = DATA / "t2v_bf16"
    plain = quantize(source, tmp_path / "a", "--config_path", DATA / "mxfp8.yaml")
    matched = quantize(source, tmp_path / "b", "--config_path", DATA / "mxfp8.yaml", "--match", "msmodelslim")
    scales = [name for name in plain if name.endswith("weight_scale")]
    differ = sum(int((plain[name] != matched[name]).sum()) for name in scales)
    assert 0 < differ < 0.05 * sum(plain[name].numel() for name in scales)
    assert all(int((plain[n].int() - matched[n].int()).abs().max()) <= 1 for n in scales)


# --- damage ---

MXFP8, MXFP4 = "blocks.1.self_attn.k", "blocks.5.ffn.2"
TURN = "blocks.2.self_attn"
Change = Callable[[Tensors, dict[str, str]], object]


def drop(*names: str, quietly: bool = False) -> Change:
    """Tensors are left out, `quietly` from the description as well."""

    def change(tensors: Tensors, types: dict[str, str]) -> None:
        for name in names:
            del tensors[name]
            if quietly:
                del types[name]

    return change


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, types: tensors.update({name: make(tensors[name].clone()).contiguous()})


def say(name: str, kind: str | None) -> Change:
    return lambda tensors, types: types.pop(name) if kind is None else types.update({name: kind})


def both(make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """To q_rot and k_rot alike."""

    def change(tensors: Tensors, types: dict[str, str]) -> None:
        for leaf in ("q_rot", "k_rot"):
            put(f"{TURN}.{leaf}", make)(tensors, types)

    return change


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.view(torch.uint8).view(-1) if tensor.dtype == torch.float8_e4m3fn else tensor.view(-1)
        flat[3] = value
        return tensor

    return make


# What must be found without manifest and source; and in which words.
DAMAGE: dict[str, tuple[Change, str]] = {
    "drop exponents": (drop(f"{MXFP8}.weight_scale"), "weight_scale"),
    "drop exponents quietly": (drop(f"{MXFP4}.weight_scale", quietly=True), "weight_scale"),
    "drop codes": (drop(f"{MXFP4}.weight"), f"{MXFP4}.weight"),
    "drop bias": (drop(f"{MXFP8}.bias"), f"{MXFP8}.bias"),
    "drop bias quietly": (drop(f"{MXFP8}.bias", quietly=True), f"{MXFP8}.bias"),
    "exponents as floats": (put(f"{MXFP8}.weight_scale", lambda t: torch.exp2(t.float() - 127)), "must be U8"),
    "exponents signed": (put(f"{MXFP4}.weight_scale", lambda t: (t.int() - 127).to(torch.int8)), "must be U8"),
    "exponents in pairs": (put(f"{MXFP4}.weight_scale", lambda t: t.unflatten(1, (-1, 2))), "must be U8 [64, 4]"),
    "exponents transposed": (put("blocks.1.ffn.0.weight_scale", lambda t: t.T), "must be U8 [128, 2]"),
    "exponents cut": (put(f"{MXFP8}.weight_scale", lambda t: t[:, :1]), "must be U8 [64, 2]"),
    "exponent rows cut": (put(f"{MXFP4}.weight_scale", lambda t: t[:-1]), "must be U8 [64, 4]"),
    "codes as bf16": (put(f"{MXFP8}.weight", lambda t: t.bfloat16()), "must be F8_E4M3"),
    "codes as bytes": (put(f"{MXFP8}.weight", lambda t: t.view(torch.uint8)), "F8_E4M3"),
    "codes unpacked": (put(f"{MXFP4}.weight", lambda t: torch.stack([t & 15, t >> 4], 2).flatten(1)), MXFP4),
    "codes as int8": (put(f"{MXFP4}.weight", lambda t: t.view(torch.int8)), "must be U8"),
    "bias in bf16": (put(f"{MXFP4}.bias", lambda t: t.bfloat16()), "must be F32"),
    "bias cut": (put(f"{MXFP4}.bias", lambda t: t[:-1]), f"{MXFP4}.bias"),
    "type with a typo": (say(f"{MXFP8}.weight", "W8A8_MXPF8"), "unknown type"),
    "type of the peer's SVD": (say(f"{MXFP4}.weight", "W4A4_MXFP4_SVD"), "unknown type"),
    "types swapped": (say(f"{MXFP8}.weight", "W4A4_MXFP4"), MXFP8),
    "exponents typed float": (say(f"{MXFP8}.weight_scale", "FLOAT"), "typed FLOAT"),
    "model type": (say("model_quant_type", "W8A8_MXFP8"), "model_quant_type"),
    "drop q_rot": (drop(f"{TURN}.q_rot"), f"{TURN}.q_rot"),
    "drop k_rot quietly": (drop(f"{TURN}.k_rot", quietly=True), f"{TURN}.k_rot"),
    "drop rotations of FP8": (drop("blocks.0.self_attn.q_rot", "blocks.0.self_attn.k_rot", quietly=True), "FP8"),
    "rotation in fp32": (both(lambda t: t.float()), "must be BF16"),
    "rotation in fp16": (put(f"{TURN}.q_rot", lambda t: t.half()), "must be BF16"),
    "rotation cut": (both(lambda t: t[:-1]), "square"),
    "rotation of another size": (both(lambda t: t[:24, :24]), "of a head's size"),
    "rotation flat": (both(lambda t: t.flatten()), "square"),
    "rotation of k alone rescaled": (put(f"{TURN}.k_rot", lambda t: t * 2), "not equal to q_rot"),
    "rotation of q in another order": (put(f"{TURN}.q_rot", lambda t: t.flip(0)), "not equal"),
    "rotations rescaled": (both(lambda t: t * 1.0625), "not orthogonal"),
    "rotations with a wrong element": (both(poke(1.0)), "not orthogonal"),
    "rotations with a NaN": (both(poke(float("nan"))), "not orthogonal"),
    "rotations of zeros": (both(torch.zeros_like), "not orthogonal"),
    "rotation typed": (say(f"{TURN}.q_rot", "MXFP4_DYNAMIC"), "unknown type"),
    "mark with a typo": (say(f"{TURN}.quant_type", "MXFP4_DYNAMC"), "unknown type"),
    "mark of no runtime": (say(f"{TURN}.quant_type", "INT8_DYNAMIC"), "FP8_DYNAMIC"),
    "mark of a layer's type": (say(f"{TURN}.quant_type", "W8A8_MXFP8"), "unknown type"),
    "mark FLOAT": (say(f"{TURN}.quant_type", "FLOAT"), "unknown type"),
    "mark of no module": (say("blocks.2.self_atn.quant_type", "MXFP4_DYNAMIC"), "no attention module"),
    "FP8 mark without rotation": (say("blocks.2.cross_attn.quant_type", "FP8_DYNAMIC"), "cross_attn.q_rot"),
    "MXFP8 mark without rotation": (say("blocks.2.cross_attn.quant_type", "MXFP8_DYNAMIC"), "cross_attn.q_rot"),
}  # fmt: skip
# Only the manifest or the source can tell these: any exponent is a good one.
VALUES: dict[str, Change] = {
    "exponents one more": put(f"{MXFP8}.weight_scale", lambda t: t + 1),
    "exponents of the other rows": put(f"{MXFP4}.weight_scale", lambda t: t.flip(0)),
    "one exponent far off": put(f"{MXFP4}.weight_scale", lambda t: poke(140)(t)),
    "an exponent of NaN": put(f"{MXFP8}.weight_scale", poke(255)),
    "codes of zero": put(f"{MXFP4}.weight", torch.zeros_like),
    "a code of NaN": put(f"{MXFP8}.weight", poke(0x7F)),
    "halves swapped": put(f"{MXFP4}.weight", lambda t: (t >> 4) | (t << 4)),
    "signs turned": put(f"{MXFP8}.weight", lambda t: (t.view(torch.uint8) ^ 0x80).view(torch.float8_e4m3fn)),
    "bias doubled": put(f"{MXFP4}.bias", lambda t: 2 * t),
}
# Only the manifest can: nothing in the source says that a module was to be rotated or marked.
MARKS: dict[str, Change] = {
    "mark gone": say(f"{TURN}.quant_type", None),
    "another mark": say(f"{TURN}.quant_type", "FP8_DYNAMIC"),
    "another rotation": both(lambda t: t.roll(1, 0)),
}


@pytest.fixture(name="copy")
def copy_fixture(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def damage(folder: Path, change: Change) -> None:
    (path,), (document,) = folder.glob("*.safetensors"), folder.glob("quant_model_description_*.json")
    tensors, types = load_file(path), json.loads(document.read_text())
    change(tensors, types)
    save_file(tensors, path)
    document.write_text(json.dumps(types))
    path.chmod(0o640)


def verify(folder: Path, *more: object) -> tuple[Result, list[str]]:
    result = run("verify", folder, *more, "--json")
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0) == (not report["problems"])
    return result, report["problems"]


def test_a_good_folder_has_no_problem(made: Path, source: Path, copy: Path) -> None:
    assert verify(made)[1] == [] == verify(made, "--source", source)[1]
    (copy / "streamq.json").unlink()
    assert verify(copy)[1] == [] == verify(copy, "--source", source)[1]


def test_a_rotation_beside_attention_that_stays_float_is_no_problem(copy: Path) -> None:
    """As in w4a4f8, whose first block is rotated and not marked."""
    (copy / "streamq.json").unlink()
    damage(copy, say(f"{TURN}.quant_type", None))
    assert verify(copy)[1] == []


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_without_manifest_and_source(copy: Path, name: str) -> None:
    (copy / "streamq.json").unlink()
    change, says = DAMAGE[name]
    damage(copy, change)
    result, problems = verify(copy)
    assert result.returncode == 1
    assert any(says in problem for problem in problems), problems


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values_are_found_against_the_source(copy: Path, source: Path, name: str) -> None:
    (copy / "streamq.json").unlink()
    damage(copy, VALUES[name])
    result, problems = verify(copy, "--source", source)
    assert result.returncode == 1
    layer = MXFP8 if name in ("exponents one more", "an exponent of NaN", "a code of NaN", "signs turned") else MXFP4
    assert any(problem.startswith(layer) for problem in problems), problems


@pytest.mark.parametrize("name", [*DAMAGE, *VALUES, *MARKS])
def test_all_damage_is_found_with_the_manifest(copy: Path, name: str) -> None:
    damage(copy, DAMAGE[name][0] if name in DAMAGE else {**VALUES, **MARKS}[name])
    result, problems = verify(copy)
    assert result.returncode == 1 and any("sha256" in problem for problem in problems)
