"""Damage that `streamq verify` once let pass, gave up on or fell over: each has to be told, and told as a problem."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf_kit
import pytest
from conftest import run
from verify_kit import change, drop

from streamq.verify import verify

Tiny = Callable[..., Path]


def quant(source: Path, out: Path, kind: str, form: str) -> Path:
    argv = ("--save_path", out, "--quant_type", kind, "--format", form, "--device", "cpu", "--quiet")
    assert run("quant", "--model_path", source, *argv).returncode == 0
    return out


def mx(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path, Path]:
    """(source, output without its manifest, its description), of which the last block is in 4 bits."""
    source = tiny("t2v-1.3B", blocks=6, dtype="bf16")
    out = quant(source, tmp_path / "out", "w4a4_mxfp4", "mindie")
    (out / "streamq.json").unlink()
    return source, out, next(out.glob("quant_model_description*.json"))


def test_packed_codes_that_the_description_does_not_name(tiny: Tiny, tmp_path: Path) -> None:
    """Without a type two codes a byte are read as numbers, half as many as there should be."""
    source, out, description = mx(tiny, tmp_path)
    said = json.loads(description.read_text())
    del said["blocks.5.ffn.0.weight"]
    description.write_text(json.dumps(said))
    problems = verify(out, str(source)).problems
    assert any(one.startswith("blocks.5.ffn.0.weight: differs from") for one in problems)
    assert any("blocks.5.ffn.0.weight: in the weights, not in" in one for one in problems)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"model_quant_type": 1}'])
@pytest.mark.parametrize("compared", [False, True])
def test_a_broken_description_is_a_problem_and_not_wrong_use(
    text: str, compared: bool, tiny: Tiny, tmp_path: Path
) -> None:
    source, out, description = mx(tiny, tmp_path)
    description.write_text(text)
    result = run("verify", out, "--json", *(["--source", source] if compared else []))
    report = json.loads(result.stdout)
    assert result.returncode == 1 and not report["ok"]
    assert any(description.name in one for one in report["problems"])


@pytest.mark.parametrize("form, kind", [("comfyui", "fp8"), ("lightx2v", "fp8"), ("comfyui", "w8a8")])
@pytest.mark.parametrize("layer", ["img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.4"])
def test_a_weight_that_is_missing_beside_its_bias(layer: str, form: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """Whether there is an image branch is told by one tensor of it."""
    out = quant(tiny("i2v-14B"), tmp_path / "out", kind, form)
    (out / "streamq.json").unlink()
    assert verify(out, None).problems == []
    change(out, f"{layer}.weight", drop)
    assert f"{layer}.weight: missing beside its bias" in verify(out, None).problems


def test_the_same_in_gguf(tiny: Tiny, tmp_path: Path) -> None:
    out = quant(tiny("i2v-14B"), tmp_path / "out", "w8a16", "gguf")
    (out / "streamq.json").unlink()
    assert verify(out, None).problems == []
    path = gguf_kit.only_file(out)
    gguf_kit.rewrite(path, lambda keys, tensors: tensors.pop("img_emb.proj.1.weight"))
    assert "img_emb.proj.1.weight: missing beside its bias" in verify(out, None).problems


def test_scales_that_are_whole_numbers(tiny: Tiny, tmp_path: Path) -> None:
    """They look like an MX layer's exponents, of which there are 256."""
    source = tiny("t2v-1.3B")
    out = quant(source, tmp_path / "out", "w8a8", "mindie")
    (out / "streamq.json").unlink()
    change(out, "blocks.1.ffn.0.weight_scale", lambda entry: ("I32", *entry[1:]))
    problems = verify(out, str(source)).problems
    assert any("blocks.1.ffn.0.weight_scale: I32" in one for one in problems)
    assert "blocks.1.ffn.0: cannot be dequantized against this source" in problems


@pytest.mark.parametrize("key, value", [("num_layers", 1), ("num_layers", 3), ("dim", 128), ("ffn_dim", 64)])
def test_lightx2v_builds_what_its_configuration_says(key: str, value: int, tiny: Tiny, tmp_path: Path) -> None:
    """With fewer blocks than there are it would run, and make noise."""
    out = quant(tiny("vace-1.3B"), tmp_path / "out", "w8a8", "lightx2v")
    (out / "streamq.json").unlink()
    assert verify(out, None).problems == []
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {key: value}))
    assert [one for one in verify(out, None).problems if one.startswith(f"config.json: {key} {value}, ")]
