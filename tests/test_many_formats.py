"""Several formats from one run: one read of the source, and each folder that of a run for it alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from safetensors.torch import load_file, save_file

from streamq import checkpoint, layers, steps
from streamq.cli import main
from streamq.verify import verify

Tiny = Callable[..., Path]
TOGETHER = {
    "w8a8": ("mindie", "lightx2v", "diffusers", "comfyui"),
    "w8a16": ("diffusers", "gguf"),
    "fp8": ("lightx2v", "diffusers", "comfyui"),
    "w8a8_smooth": ("mindie", "lightx2v", "diffusers"),
    "w8a8_static": ("mindie", "diffusers"),
}
CALIBRATED = ("w8a8_smooth", "w8a8_static")


def quant(source: Path, out: Path, kind: str, formats: tuple[str, ...], *options: object) -> Path:
    argv = ["quant", "--model_path", source, "--save_path", out, "--quant_type", kind, "--format", ",".join(formats)]
    assert main([str(one) for one in (*argv, "--device", "cpu", "--quiet", *options)]) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "streamq.json"
    }


@pytest.mark.parametrize("kind, family", [(kind, "t2v-1.3B") for kind in TOGETHER] + [("w8a8", "vace-1.3B")])
def test_each_folder_is_that_of_a_run_for_it_alone(kind: str, family: str, tiny: Tiny, tmp_path: Path) -> None:
    source, formats, inputs = tiny(family, dtype="bf16"), TOGETHER[kind], []
    if kind in CALIBRATED:
        inputs = ["--calib", tmp_path / "set"]
        small = ["--size", "32*32", "--frame_num", 5, "--num_samples", 2, "--device", "cpu", "--quiet"]
        argv = ["calib", "--model_path", source, "--save_path", tmp_path / "set", *small]
        assert main([str(one) for one in argv]) == 0
    together = quant(source, tmp_path / "all", kind, formats, *inputs)
    for form in formats:
        alone = files(quant(source, tmp_path / form, kind, (form,), *inputs))
        assert files(together / form) == alone and len(alone) >= 2


@pytest.mark.slow
def test_data_free_beside_calibrated(tmp_path: Path) -> None:
    """The one knows nothing of the other's calibration: its card has no figures of outputs."""
    source, kind = tmp_path / "model", "w4a16"
    synthetic.write(source, replace(synthetic.tiny(synthetic.FAMILIES["vace-1.3B"], 2), dim=128, ffn=256))
    small = ["--size", "32*32", "--frame_num", 5, "--num_samples", 2, "--device", "cpu", "--quiet"]
    assert main([str(one) for one in ("calib", "--model_path", source, "--save_path", tmp_path / "set", *small)]) == 0
    inputs = ("--calib", tmp_path / "set")
    together = quant(source, tmp_path / "all", kind, ("nunchaku", "gguf"), *inputs)
    assert files(together / "gguf") == files(quant(source, tmp_path / "gguf", kind, ("gguf",)))
    assert files(together / "nunchaku") == files(quant(source, tmp_path / "nunchaku", kind, ("nunchaku",), *inputs))


def test_what_would_differ_from_a_single_run_is_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPTQ goes on from the quantized blocks' outputs, and each format has its own."""
    argv = ["plan", "--model_path", tiny("t2v-1.3B"), "--save_path", tmp_path / "out", "--quant_type", "w8a8_gptq"]
    assert main([str(one) for one in (*argv, "--format", "mindie,lightx2v")]) == 2
    said = capsys.readouterr().err
    assert "next_input" in said and "float" in said and not (tmp_path / "out").exists()


def test_the_source_is_read_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = tiny("i2v-14B", dtype="bf16"), Counter[str]()
    plain = checkpoint.Source.read

    def counted(self: Any, info: Any, start: int, into: memoryview) -> Any:
        read[info.name] += len(into)
        return plain(self, info, start, into)

    monkeypatch.setattr(checkpoint.Source, "read", counted)
    quant(source, tmp_path / "out", "w8a8", TOGETHER["w8a8"])
    infos = checkpoint.open_checkpoint(source).tensors
    assert read == {name: info.nbytes for name, info in infos.items()}


def test_equal_schemes_are_worked_out_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lightx2v and comfyui have the same arithmetic, mindie another."""
    source, count = tiny("t2v-1.3B"), Counter[str]()

    def counted(name: str, *args: Any) -> Any:
        count[name] += 1
        return layers.quantize(name, *args)

    monkeypatch.setattr(steps, "quantize", counted)
    quant(source, tmp_path / "out", "w8a8", ("lightx2v", "comfyui"))
    assert set(count.values()) == {1} and len(count) == 20
    quant(source, tmp_path / "more", "w8a8", ("lightx2v", "comfyui", "mindie"))
    assert count["blocks.0.attn1.to_q"] == 3 and count["blocks.0.ffn.net.2"] == 2  # which mindie leaves float


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_bytes_do_not_depend_on_threads(depth: int, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("t2v-1.3B", dtype="bf16", blocks=3)
    plain = files(quant(source, tmp_path / "plain", "w8a8", TOGETHER["w8a8"]))
    assert files(quant(source, tmp_path / "other", "w8a8", TOGETHER["w8a8"], "--read_ahead", depth)) == plain


@pytest.mark.parametrize("form", ["mindie", "lightx2v", "diffusers"])
def test_rotated_weights_go_only_where_inputs_are_rotated(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model"
    synthetic.write(source, replace(synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"], 1), dim=256, ffn=512))
    recipe = Path(__file__).parents[1] / "recipes" / "w8a8_convrot.yaml"
    argv = ["plan", "--model_path", source, "--save_path", tmp_path / "out", "--config_path", recipe, "--format", form]
    assert main([str(one) for one in argv]) == 2
    assert "convrot" in capsys.readouterr().err


def test_a_dead_row_is_seen_without_a_manifest(tiny: Tiny, tmp_path: Path) -> None:
    """Of a wide layer it hardly shows in the error of the whole."""
    source = tiny("t2v-1.3B")
    out = quant(source, tmp_path / "out", "w8a8", ("comfyui",))
    (out / "streamq.json").unlink()
    assert not verify(out, str(source)).problems
    file = out / "wan_int8.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.ffn.0.weight"][7] = 0
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    save_file(tensors, file, header.get("__metadata__"))
    assert "blocks.1.ffn.0: nothing of the source is left in row 7" in verify(out, str(source)).problems


def test_numbers_that_are_none_are_seen_without_a_source(tiny: Tiny, tmp_path: Path) -> None:
    out = quant(tiny("t2v-1.3B"), tmp_path / "out", "w8a8", ("lightx2v",))
    (out / "streamq.json").unlink()
    tensors = load_file(out / "block_1.safetensors")
    tensors["blocks.1.modulation"][0, 2, 5] = float("nan")
    save_file(tensors, out / "block_1.safetensors")
    assert verify(out, None).problems == ["blocks.1.modulation: a number that is not finite"]
