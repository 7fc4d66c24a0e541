"""`streamq verify` on GGUF folders with damage that a loader takes without a word, as if a writer had been wrong.

Each damage three times: beside the manifest of the sound folder; with a manifest that agrees with the damaged bytes, so
that only their meaning is wrong; and without any.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run, write_tiny
from gguf_kit import STRING, UINT32, Change, Keys, Stored, Tensors, floats, load, only_file, quantize, rewrite, verify

Q, BIAS = "blocks.1.self_attn.q.weight", "blocks.1.self_attn.q.bias"
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "model", "t2v-1.3B", dtype="bf16")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Folders:
    """`sound("w8a16")`: an output that nobody changes."""
    place = tmp_path_factory.mktemp("sound")

    def folder(kind: str) -> Path:
        if not (place / kind).exists():
            quantize(place / kind, kind, source)
        return place / kind

    return folder


def sign(folder: Path) -> None:
    """Make the manifest say what the files are."""
    document = json.loads((folder / "streamq.json").read_text())
    for name, about in document["files"].items():
        raw = (folder / name).read_bytes()
        about |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        if "tensors" in about:
            about["tensors"] = {n: hashlib.sha256(t.data).hexdigest() for n, t in load(folder / name)[1].items()}
    (folder / "streamq.json").write_text(json.dumps(document))


def drop(*names: str) -> Change:
    return lambda keys, tensors: [tensors.pop(name) for name in names]


def key(name: str, kind: int = UINT32, value: Any = None) -> Change:
    """A key gets another value, or goes."""
    return lambda keys, tensors: keys.pop(name) if value is None else keys.update({name: (kind, value)})


def bf16(values: np.ndarray[Any, Any]) -> bytes:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def as_bf16(name: str) -> Change:
    """The same values in another type."""
    return lambda keys, t: t.update({name: Stored("BF16", t[name].shape, bf16(floats(t[name])))})


def as_q8_0(name: str) -> Change:
    def change(keys: Keys, tensors: Tensors) -> None:
        one = tensors[name]
        blocks = int(np.prod(one.shape)) // 32
        tensors[name] = Stored("Q8_0", one.shape, (b"\0\x3c" + bytes([127] * 32)) * blocks)

    return change


def scaled(name: str, factor: float) -> Change:
    """An F32 tensor times a number."""

    def change(keys: Keys, tensors: Tensors) -> None:
        tensors[name].data = (np.frombuffer(tensors[name].data, np.float32) * np.float32(factor)).tobytes()

    return change


def flipped(name: str) -> Change:
    """The rows in reverse."""

    def change(keys: Keys, tensors: Tensors) -> None:
        rows = np.frombuffer(tensors[name].data, np.uint8).reshape(tensors[name].shape[0], -1)
        tensors[name].data = rows[::-1].tobytes()

    return change


def blocks(make: Callable[[np.ndarray[Any, Any]], object], name: str = Q) -> Change:
    """`make` changes a quantized weight's blocks, uint8 [n, 34 or 18], in place."""

    def change(keys: Keys, tensors: Tensors) -> None:
        raw = np.frombuffer(tensors[name].data, np.uint8).reshape(-1, {"Q8_0": 34, "Q4_0": 18}[str(tensors[name].kind)])
        changed = raw.copy()
        make(changed)
        tensors[name].data = changed.tobytes()

    return change


def scales(factor: float) -> Change:
    def make(raw: np.ndarray[Any, Any]) -> None:
        d = raw[:, :2].copy().view(np.float16) * np.float16(factor)
        raw[:, :2] = d.view(np.uint8)

    return blocks(make)


def poke(column: int, *values: int) -> Change:
    """Bytes of the third block."""
    return blocks(lambda raw: raw[2].__setitem__(slice(column, column + len(values)), values))


def nibbles(raw: np.ndarray[Any, Any]) -> None:
    """The two codes of each byte have changed places."""
    raw[:, 2:] = raw[:, 2:] >> 4 | raw[:, 2:] << 4


def shape(name: str, *sizes: int) -> Change:
    return lambda keys, tensors: tensors.update({name: replace(tensors[name], shape=sizes)})


def shortened(name: str) -> Change:
    def change(keys: Keys, tensors: Tensors) -> None:
        one = tensors[name]
        tensors[name] = Stored(one.kind, (one.shape[0] // 2,), one.data[: len(one.data) // 2])

    return change


def swapped(keys: Keys, tensors: Tensors) -> None:
    other = "blocks.1.self_attn.k.weight"
    tensors[Q], tensors[other] = tensors[other], tensors[Q]


def last_block(keys: Keys, tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("blocks.1.")]:
        del tensors[name]


# Seen without a source: keys, names, types, shapes, numbers that no quantizer makes.
FORM: dict[str, tuple[str, Change, str]] = {
    "no architecture": ("w8a16", key("general.architecture"), "no general.architecture, must be wan"),
    "another one": ("w8a16", key("general.architecture", STRING, "flux"), "general.architecture 'flux', must be wan"),
    "no version": ("w4a16", key("general.quantization_version"), "no general.quantization_version, must be 2"),
    "version 3": ("w4a16", key("general.quantization_version", UINT32, 3), "quantization_version 3, must be 2"),
    "no file type": ("w8a16", key("general.file_type"), "no general.file_type, must be 7"),
    "another file type": ("w4a16", key("general.file_type", UINT32, 7), "general.file_type 7, must be 2"),
    "a file type in words": ("w8a16", key("general.file_type", STRING, "7"), "general.file_type '7', must be 7"),
    "a weight dropped": ("w8a16", drop(Q), "attn1.to_q.weight has no counterpart"),
    "a weight dropped in every block": ("w8a16", drop(Q, Q.replace("1", "0", 1)), "not a Wan transformer"),
    "a bias dropped": ("w4a16", drop(BIAS), f"{BIAS}: missing"),
    "an output bias dropped": ("w4a16", drop("head.head.bias"), "head.head.bias: missing"),
    "a time bias dropped": ("w8a16", drop("time_projection.1.bias"), "time_projection.1.bias: missing"),
    "a norm dropped": ("w8a16", drop("blocks.0.norm3.weight"), "norm2.weight"),
    "a norm's bias dropped": ("w8a16", drop("blocks.0.norm3.bias"), "blocks.0.norm3.bias: missing"),
    "an attention norm dropped": ("w8a16", drop("blocks.0.self_attn.norm_q.weight"), "norm_q.weight"),
    "modulation dropped": ("w8a16", drop("blocks.0.modulation"), "scale_shift_table"),
    "patches dropped": ("w8a16", drop("patch_embedding.weight"), "patch_embedding.weight is missing"),
    "a bias in bf16": ("w8a16", as_bf16(BIAS), f"{BIAS}: BF16 [64], must be F32"),
    "a norm in bf16": ("w8a16", as_bf16("blocks.0.norm3.weight"), "norm3.weight: BF16 [64], must be F32"),
    "modulation in bf16": ("w8a16", as_bf16("head.modulation"), "head.modulation: BF16 [1, 2, 64], must be F32"),
    "patches in bf16": ("w8a16", as_bf16("patch_embedding.weight"), "BF16 [64, 16, 1, 2, 2], must be F32"),
    "a quantized modulation": (
        "w8a16", as_q8_0("blocks.1.modulation"), "blocks.1.modulation: Q8_0 [1, 6, 64], must be F32",
    ),
    "a quantized bias": ("w8a16", as_q8_0(BIAS), f"{BIAS}: Q8_0 [64], must be F32"),
    "a quantized embedding": (
        "w8a16", as_q8_0("text_embedding.0.weight"), "text_embedding.0.weight: Q8_0 [64, 64], must be BF16, F16 or F32",
    ),
    "a quantized head": ("w4a16", as_q8_0("head.head.weight"), "head.head.weight: Q8_0 [64, 64], must be BF16"),
    "the other type's name": (
        "w8a16", lambda k, t: t.update({Q: replace(t[Q], kind="Q4_0")}), "is not where it belongs after",
    ),
    "a type of no float": ("w8a16", lambda k, t: t.update({BIAS: replace(t[BIAS], kind=26)}), "ggml's type 26"),
    "sides swapped": ("w8a16", shape("blocks.1.ffn.0.weight", 64, 128), "ffn.net.0.proj.weight|ffn.0.weight"),
    "a shorter bias": ("w8a16", shortened(BIAS), "self_attn.q.bias"),
    "a shorter time bias": ("w4a16", shortened("time_projection.1.bias"), "time_projection.1.bias"),
    "an infinite scale": ("w8a16", poke(0, 0, 0x7C), f"{Q}: a scale that is not finite"),
    "a scale that is no number": ("w4a16", poke(0, 1, 0x7C), f"{Q}: a scale that is not finite"),
    "code -128": ("w8a16", poke(5, 128), f"{Q}: code -128, which Q8_0 does not use"),
    "no last block": ("w8a16", last_block, "config.json: num_layers 2, the file has 1 blocks"),
    "codes cleared": ("w8a16", poke(2, *[0] * 32), f"{Q}: a block whose largest code is not its scale's"),
    "4-bit codes cleared": ("w4a16", poke(2, *[0x88] * 16), f"{Q}: a block whose largest code is not its scale's"),
}  # fmt: skip
# Right in form: only the source tells.
MEANING: dict[str, tuple[str, Change]] = {
    "twice the scale": ("w8a16", scales(2)),
    "a hundredth more": ("w8a16", scales(1.02)),
    "4-bit scales negated": ("w4a16", scales(-1)),
    "4-bit scales doubled": ("w4a16", scales(2)),
    "two codes of a byte swapped": ("w4a16", blocks(nibbles)),
    "rows in reverse": ("w8a16", flipped(Q)),
    "two layers swapped": ("w8a16", swapped),
    "a bias scaled": ("w4a16", scaled(BIAS, 2)),
    "a norm scaled": ("w8a16", scaled("blocks.0.norm3.weight", 1.01)),
    "modulation scaled": ("w8a16", scaled("blocks.0.modulation", 2)),
    "patches in reverse": ("w8a16", flipped("patch_embedding.weight")),
    "another embedding": ("w4a16", flipped("text_embedding.2.weight")),
    "bf16 called fp16": (
        "w8a16", lambda k, t: t.update({"head.head.weight": replace(t["head.head.weight"], kind="F16")}),
    ),
    "a layer dequantized": ("w4a16", as_bf16(Q)),
}  # fmt: skip


def damaged(sound: Path, tmp: Path, change: Change) -> dict[str, Path]:
    """A folder for each of the three ways."""
    found = {}
    for how in ("old manifest", "new manifest", "no manifest"):
        found[how] = Path(shutil.copytree(sound, tmp / how))
        rewrite(only_file(found[how]), change)
    (found["no manifest"] / "streamq.json").unlink()
    return found


@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_sound(sound: Folders, source: Path, tmp_path: Path, kind: str) -> None:
    """Taken apart and put together by the kit it is the same file: what the others show is the damage."""
    for folder in damaged(sound(kind), tmp_path, lambda keys, tensors: None).values():
        assert only_file(folder).read_bytes() == only_file(sound(kind)).read_bytes()
        assert verify(folder) == verify(folder, "--source", source) == []


@pytest.mark.parametrize("name", FORM)
def test_damaged_form(sound: Folders, tmp_path: Path, name: str) -> None:
    kind, change, says = FORM[name]
    folders = damaged(sound(kind), tmp_path, change)
    assert any("sha256" in problem for problem in verify(folders["old manifest"]))
    problems = verify(folders["no manifest"])
    assert any(word in problem for word in says.split("|") for problem in problems), problems
    assert len(problems) == len(set(problems))


@pytest.mark.parametrize("name", MEANING)
def test_damaged_meaning(sound: Folders, source: Path, tmp_path: Path, name: str) -> None:
    kind, change = MEANING[name]
    folders = damaged(sound(kind), tmp_path, change)
    assert any("sha256" in problem for problem in verify(folders["old manifest"]))
    sign(folders["new manifest"])
    assert verify(folders["new manifest"]) == []
    problems = verify(folders["new manifest"], "--source", source)
    assert problems and not any("sha256" in problem for problem in problems)
    bare = verify(folders["no manifest"], "--source", source)
    # Without a recorded error a layer may be as far off as its type usually is at the worst.
    assert bare or name == "a hundredth more"


def test_damaged_files(sound: Folders, source: Path, tmp_path: Path) -> None:
    """Cut, longer, another kind, another file beside it, gone; a changed tensor is named."""

    def look(change: Callable[[Path], object], *more: object) -> str:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        folder = Path(shutil.copytree(sound("w4a16"), tmp_path / "x"))
        change(only_file(folder))
        with_manifest = verify(folder, *more)
        (folder / "streamq.json").unlink()
        bare = verify(folder, *more)
        assert with_manifest and bare
        return "\n".join([*with_manifest, *bare])

    def last_byte(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    assert "truncated" in look(lambda path: path.write_bytes(path.read_bytes()[:-500]))
    assert "truncated" in look(lambda path: path.write_bytes(b""))
    assert "trailing bytes" in look(lambda path: path.write_bytes(path.read_bytes() + bytes(64)))
    assert "begins with" in look(lambda path: path.write_bytes(b"GGML" + path.read_bytes()[4:]))
    assert "in two files, a.gguf and wan-Q4_0.gguf" in look(lambda path: shutil.copy(path, path.parent / "a.gguf"))
    assert "no longer recognisable" in look(lambda path: path.rename(path.with_suffix(".bin")))
    assert "head.head.bias in wan-Q4_0.gguf: not the bytes" in look(last_byte, "--source", source)


def test_of_two_experts_each_is_looked_at(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "t2v-A14B", blocks=1)
    quantize(tmp_path / "out", "w8a16", model)
    assert verify(tmp_path / "out", "--source", model) == []
    rewrite(only_file(tmp_path / "out/low_noise_model"), drop("head.head.bias"))
    (tmp_path / "out/streamq.json").unlink()
    assert "low_noise_model: head.head.bias: missing" in verify(tmp_path / "out")
    shutil.copy(only_file(tmp_path / "out/high_noise_model"), tmp_path / "out/low_noise_model")
    assert verify(tmp_path / "out", "--source", model) != []


def test_a_file_of_another_tool(source: Path, sound: Folders, tmp_path: Path) -> None:
    """F16 for floats, other keys, any name: sound, and compared with its source. A type of llama.cpp's: said so."""

    def change(keys: Keys, tensors: Tensors) -> None:
        keys["general.name"] = (STRING, "Wan")
        for name in ("text_embedding.2.weight", "blocks.0.ffn.2.weight"):
            tensors[name] = Stored("F16", tensors[name].shape, floats(tensors[name]).astype(np.float16).tobytes())
        named = {f"model.diffusion_model.{name}": one for name, one in tensors.items()}
        tensors.clear()
        tensors.update(named)

    shutil.copy(only_file(sound("w8a16")), tmp_path / "any.gguf")
    rewrite(tmp_path / "any.gguf", change)
    assert verify(tmp_path) == []
    found = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert found["layers"]["blocks.0.ffn.2"] == "float" and found["layers"][Q.removesuffix(".weight")] == "w8a16"
    assert [one for one in verify(tmp_path, "--source", source) if "blocks.0.ffn.2.weight" not in one] == []
    rewrite(tmp_path / "any.gguf", lambda k, t: t.update({Q: Stored("Q4_K", (64, 256), bytes(64 * 144))}))
    assert any("ggml's type 12; streamq reads" in problem for problem in verify(tmp_path))
