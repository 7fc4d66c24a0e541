"""Rows of the bad-input table (`test_bad_input.py`): what can be wrong with a source."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import write_tiny
from damage import (
    INDEX,
    NAME,
    QUERY,
    Case,
    Make,
    content,
    drop,
    entry,
    experts,
    header,
    index,
    load,
    put,
    read,
    rename,
    reshape,
    shards,
    shift,
    store,
    then,
)

SHARD_1, SHARD_2, SHARD_3 = (f"diffusion_pytorch_model-0000{number}-of-00004" for number in (1, 2, 3))
FFN = "blocks.1.ffn.2.weight"  # left float by the MindIE recipe
HEAD = "head.head.weight"
W8A8 = "--quant_type w8a8"
LIGHTX2V = f"{W8A8} --format lightx2v"


def nothing(case: Case) -> None:
    """The checkpoint is sound: the options are what is wrong."""


def unlink(case: Case) -> None:
    """The checkpoint's file is gone."""
    case.file.unlink()


def no_second(folder: Path) -> None:
    """The low-noise expert of a pipeline is gone."""
    shutil.rmtree(folder / "transformer_2")


@dataclass(frozen=True)
class Row:
    """`options`: after `COMMAND --model_path … --save_path …`; `{tmp}` and `{model}` are filled in.

    `planned`: `streamq plan` must refuse it too, because headers, options and recipe tell.
    """

    id: str
    make: Make
    says: tuple[str, ...]
    options: str = W8A8
    status: int = 2
    planned: bool = True


HEADERS = [
    Row("empty file", content(b""), (NAME, "0 bytes", "download")),
    Row("header length cut off", content(b"\x10\0\0\0\0\0\0"), (NAME, "truncated")),
    Row("header longer than the file", header(b"{}", length=5000), (NAME, "5000", "2 ")),
    Row("header of 2^64-1 bytes", header(b"{}", length=(1 << 64) - 1), (NAME, "18446744073709551615")),
    Row(
        "header over 100 MB",
        then(header(b"{}", length=100_000_001), lambda case: os.truncate(case.file, 100_000_100)),
        (NAME, "100000001", "100000000"),
    ),
    Row("header of no bytes", header(b"", data=bytes(64)), (NAME, "not valid JSON")),
    Row("header cut short", header(b'{"a": {"dtype": "F32", "sha'), (NAME, "not valid JSON")),
    Row("header not UTF-8", header(b'{"\xff\xfe": 1}'), (NAME, "not valid JSON")),
    Row("header is a list", header(b"[1, 2]"), (NAME, "list", "object")),
    Row("header nested deeply", header(b"[" * 200_000), (NAME, "not valid JSON")),
    Row("header with an endless number", header(b'{"a": ' + b"9" * 5000 + b"}"), (NAME, "not valid JSON")),
    Row("tensor twice in one header", header(b'{"a.b": {}, "a.b": {}}'), (NAME, "a.b", "twice")),
    Row("metadata not text", header(b'{"__metadata__": {"a": 1}}'), (NAME, "__metadata__")),
    Row("unknown dtype", entry(dtype="F7"), (NAME, QUERY, "F7", "BF16")),
    Row("dtype not text", entry(dtype=["F32"]), (NAME, QUERY, "dtype")),
    Row("shape of another size", entry(shape=[64, 65]), (NAME, QUERY, "16384", "16640", "[64, 65]")),
    Row("dtype of another size", entry(dtype="BF16"), (NAME, QUERY, "16384", "8192")),
    Row("negative size", entry(shape=[-64, -64]), (NAME, QUERY, "[-64, -64]")),
    Row("size true", entry(shape=[True, 4096]), (NAME, QUERY, "[True, 4096]")),
    Row("fractional size", entry(shape=[64.0, 64]), (NAME, QUERY, "[64.0, 64]")),
    Row("huge size", entry(shape=[1 << 62, 1 << 62]), (NAME, QUERY, "16384", str(4 << 124))),
    Row("size of 8000 digits", entry(shape=[10**4000, 10**4000]), (NAME, QUERY, "not a list of sizes")),
    Row("shape is a number", entry(shape=4096), (NAME, QUERY, "4096")),
    Row("shape missing", entry(shape=None), (NAME, QUERY, "shape")),
    Row("further key", entry(strides=[1]), (NAME, QUERY, "data_offsets")),
    Row("span backwards", entry(data_offsets=[16384, 0]), (NAME, QUERY, "-16384", "16384")),
    Row("negative offset", entry(data_offsets=[-16384, 0]), (NAME, QUERY, "[-16384, 0]")),
    Row("one offset", entry(data_offsets=[0]), (NAME, QUERY, "data_offsets [0]")),
    Row("overlapping tensors", shift(-64, -64), (NAME, QUERY, "overlaps")),
    Row("tensors on one place", shift(-16384, -16384), (NAME, "overlaps")),
    Row("gap between tensors", shift(64, 64), (NAME, "gap")),
    Row(
        "span behind the end",
        lambda case: shift(1 << 40, 1 << 40, last_of(case))(case),
        (NAME, "gap", str(1 << 40)[:6]),
    ),
    Row(
        "trailing bytes",
        lambda case: case.file.write_bytes(case.file.read_bytes() + bytes(100)),
        (NAME, "trailing", "download"),
    ),
    Row(
        "data truncated",
        lambda case: os.truncate(case.file, case.file.stat().st_size - 1000),
        (NAME, "truncated", "download"),
    ),
    Row(
        "name that forges a message",
        header(json.dumps({"x\nerror: forged\r\n": {"dtype": "F32"}}).encode()),
        (NAME, "x error: forged"),
    ),
]

FILES = [
    Row(
        "tensor in two shards",
        shards(lambda case, files, found: shutil.copy(files[0], files[1]), keep_index=False),
        (SHARD_1, SHARD_2, "two files"),
    ),
    Row(
        "tensor in two shards of an index",
        shards(lambda case, files, found: store(files[1], load(files[1]) | first_of(files[0]))),
        (SHARD_1, SHARD_2, "two files", "blocks.0.cross_attn.k.bias"),
    ),
    Row(
        "shard missing, no index",
        shards(lambda case, files, found: files[1].unlink(), keep_index=False),
        (SHARD_2, "missing"),
    ),
    Row("shard missing", shards(lambda case, files, found: files[1].unlink()), (SHARD_2, "missing", INDEX)),
    Row("index lists what no shard has", index(other=f"{SHARD_1}.safetensors"), ("blocks.1.nothing", INDEX)),
    Row(
        "index has it in the wrong shard",
        shards(lambda case, files, found: found.update({QUERY: files[0].name})),
        (QUERY, INDEX, SHARD_1),
    ),
    Row(
        "tensor that the index lacks",
        shards(lambda case, files, found: found.pop(QUERY)),
        (QUERY, INDEX, SHARD_3, "not listed"),
    ),
    Row("index entry absolute", index(query="/etc/passwd"), (INDEX, QUERY, "/etc/passwd", "outside")),
    Row("index entry climbs out", index(query=f"../model/{NAME}"), (INDEX, QUERY, "..", "outside")),
    Row("index entry climbs inside", index(query=f"a/../../x/{NAME}"), (INDEX, QUERY, "outside")),
    Row("index entry with backslashes", index(query="..\\x.safetensors"), (INDEX, QUERY, "outside")),
    Row("index entry a number", index(query=3), (INDEX, QUERY, "3")),
    Row("index entry empty", index(query=""), (INDEX, QUERY)),
    Row("index entry the folder", index(query="."), ("missing", INDEX)),
    Row("index entry of 5000 characters", index(query="x" * 5000), (INDEX, "xxx")),
    Row(
        "index entry a pickle",
        then(index(query="model.bin"), lambda case: (case.model / "model.bin").write_bytes(b"\x80\x02}.")),
        ("model.bin", "pickle"),
    ),
    Row(
        "index entry another kind of file",
        index(query="config.json"),
        ("config.json", "truncated or not safetensors"),
    ),
    Row("index not JSON", index("{"), (INDEX, "not valid JSON")),
    Row("index without weight_map", index('{"metadata": {}}'), (INDEX, "weight_map")),
    Row("index is a list", index("[]"), (INDEX, "weight_map")),
    Row("index with a tensor twice", index(f'{{"weight_map": {{"{QUERY}": "a", "{QUERY}": "b"}}}}'), (INDEX, "twice")),
    Row(
        "two indexes",
        lambda case: [(case.model / f"{n}.safetensors.index.json").write_text("{}") for n in ("a", "b")],
        ("2 index files", "a.safetensors.index.json", "b.safetensors.index.json"),
    ),
    Row(
        "several files, no index",
        lambda case: (
            shutil.copy(case.file, case.model / "a.safetensors"),
            case.file.rename(case.model / "b.safetensors"),
        ),
        ("2 .safetensors files", "no index"),
    ),
    Row("shards of two models", lambda case: two_sets_of_shards(case), ("4 .safetensors files", "no index")),
    Row("pickle by its suffix", content(b"PK\x03\x04", "model.pth"), ("model.pth", "pickle", "safetensors")),
    Row("pickle under the right name", lambda case: zipped_pickle(case.file), (NAME, "pickle")),
    Row("old pickle under the right name", content(pickle.dumps({"a": [1.0] * 99}, protocol=2)), (NAME, "pickle")),
    Row("GGUF under the right name", content(b"GGUF\3\0\0\0" + bytes(64)), (NAME, "GGUF")),
    Row("GGUF", content(b"GGUF\3\0\0\0" + bytes(64), "model.gguf"), ("model.gguf", "GGUF")),
    Row(
        "only a pickle in the folder",
        lambda case: case.file.rename(case.model / "Wan2.1_VAE.pth"),
        ("Wan2.1_VAE.pth", "pickle", "no .safetensors file"),
    ),
    Row("nothing in the folder", unlink, ("no .safetensors file", "model")),
    Row("no such path", nothing, ("{tmp}/absent", "no such"), f"{W8A8} --model_path {{tmp}}/absent"),
    Row(
        "no such path, and no network", nothing, ("Wan-AI/absent", "hf download"), f"{W8A8} --model_path Wan-AI/absent"
    ),
    Row("neither path nor hub id", nothing, ("models/wan2.1--x",), f"{W8A8} --model_path models/wan2.1--x"),
    Row("path of 5000 characters", nothing, ("--model_path",), f"{W8A8} --model_path /tmp/{'x' * 5000}"),
    Row(
        "a pipe in place of the file",
        then(unlink, lambda case: os.mkfifo(case.file)),
        (NAME, "not a regular file"),
    ),
    Row("a folder in place of the file", then(unlink, lambda case: case.file.mkdir()), (NAME, "directory")),
    Row("a link to nowhere", then(unlink, lambda case: case.file.symlink_to("absent")), (NAME, "No such file")),
]

MODELS = [
    Row("not a Wan model", rename("blocks.", "layers."), ("not a Wan", "blocks.0.self_attn.q.weight", "69 tensors")),
    Row("no tensor at all", header(b"{}"), ("not a Wan", "no tensor")),
    Row("gap in the block numbers", rename("blocks.1.", "blocks.3."), ("blocks.1", "missing", "blocks.3")),
    Row("block number with a zero", rename("blocks.1.", "blocks.01."), ("blocks.01",)),
    Row("block number of 5000 digits", rename("blocks.1.", f"blocks.{'1' * 5000}."), ("blocks.",)),
    Row("block of other shapes", put(FFN, shape=(64, 64)), (NAME, FFN, "[64, 64]", "[64, 128]")),
    Row("block lacks a tensor", drop("blocks.1.norm3.weight"), ("blocks.0.norm2.weight", "blocks.1", "26", "27")),
    Row("block 0 lacks a tensor", drop("blocks.0.cross_attn.norm_q"), ("blocks.1", "norm_q", "blocks.0")),
    Row("every block lacks a layer", drop("cross_attn.o."), ("blocks.0", "missing")),
    Row("block with a further tensor", put("blocks.1.extra.weight"), ("blocks.1.extra.weight", "28", "27")),
    Row("layer that is not square", reshape(QUERY, [32, 128]), (NAME, "blocks.0.self_attn.q.weight", "[32, 128]")),
    Row("layer of one dimension", reshape(QUERY, [4096]), (NAME, "blocks.0.self_attn.q.weight", "[4096]")),
    Row(
        "bias of another length",
        lambda case: [put(f"blocks.{i}.ffn.0.bias", shape=(64,))(case) for i in (0, 1)],
        (NAME, "blocks.0.ffn.0.bias", "[64]", "[128]"),
    ),
    Row("no patch_embedding", drop("patch_embedding"), ("patch_embedding.weight", "missing")),
    Row("no time_projection", drop("time_projection"), ("time_projection.1.weight", "missing")),
    Row("no head.modulation", drop("head.modulation"), ("head.modulation", "missing")),
    Row("no block has a modulation", drop("0.modulation", "1.modulation"), ("blocks.0.modulation", "missing")),
    Row("no block has norm_q", drop("self_attn.norm_q"), ("blocks.0.self_attn.norm_q.weight", "missing")),
    Row(
        "text_embedding of another shape",
        put("text_embedding.0.weight", shape=(3, 5)),
        (NAME, "text_embedding", "[3, 5]"),
    ),
    Row("no head", drop("head.head"), ("head.head.weight", "missing")),
    Row("flat patch_embedding", put("patch_embedding.weight", shape=(64, 64)), (NAME, "patch_embedding", "[64, 64]")),
    Row("head of another width", put(HEAD, shape=(64, 32)), (NAME, HEAD, "[64, 32]")),
    Row("int8 weights", put(QUERY, "I8"), (NAME, QUERY, "I8", "quantized already")),
    Row("fp8 weights", put(QUERY, "F8_E4M3"), (NAME, QUERY, "F8_E4M3", "quantized already")),
    Row(
        "a scale beside a float weight",
        put("blocks.0.ffn.0.scale_weight", shape=(1,)),
        (NAME, "blocks.0.ffn.0.scale_weight", "quantized already"),
    ),
    Row("fp8 marker", put("scaled_fp8", "F8_E4M3", (2,)), (NAME, "scaled_fp8", "quantized already")),
    Row(
        "a VAE in the same file",
        then(rename("", "model.diffusion_model."), put("first_stage_model.a")),
        (NAME, "first_stage_model.a", "model.diffusion_model."),
    ),
    Row(
        "tensor under both names",
        put("blocks.0.attn1.to_q.weight"),
        (NAME, "blocks.0.attn1.to_q.weight", "blocks.0.self_attn.q.weight"),
    ),
    Row(
        "only the high-noise expert",
        experts(lambda f: shutil.rmtree(f / "low_noise_model")),
        ("low_noise_model", "missing"),
    ),
    Row(
        "only the low-noise expert",
        experts(lambda f: shutil.rmtree(f / "high_noise_model")),
        ("high_noise_model", "missing"),
    ),
    Row(
        "second expert listed but absent",
        experts(no_second, layout="diffusers"),
        ("transformer_2", "missing", "model_index.json"),
    ),
    Row(
        "second expert absent, model_index broken",
        experts(no_second, lambda f: (f / "model_index.json").write_text("{"), layout="diffusers"),
        ("model_index.json", "not valid JSON"),
    ),
    Row(
        "pipeline without a transformer",
        experts(no_second, lambda f: shutil.rmtree(f / "transformer"), layout="diffusers"),
        ("transformer/", "model_index.json"),
    ),
    Row(
        "experts of different models",
        experts(lambda f: write_tiny(f / "low_noise_model", "t2v-1.3B", blocks=3)),
        ("do not belong together", "2 blocks", "3 blocks"),
    ),
    Row("unknown model type", nothing, ("Wan2_3", "Wan2_2"), f"{W8A8} --model_type Wan2_3"),
    Row("TI2V said, T2V found", nothing, ("Wan2.2-TI2V-5B", "t2v"), f"{W8A8} --model_type Wan2.2-TI2V-5B"),
    Row(
        "2.2 said, 2.1 found",
        lambda case: case.remake("i2v-14B"),
        ("Wan2_2", "Wan2_1", "i2v"),
        f"{W8A8} --model_type Wan2_2",
    ),
    Row(
        "2.1 said, two experts found",
        experts(lambda f: None),
        ("Wan2.1", "Wan2_2", "two experts"),
        f"{W8A8} --model_type Wan2.1",
    ),
    Row(
        "I2V-A14B said, T2V-A14B found",
        experts(lambda f: None),
        ("Wan2.2-I2V-A14B", "t2v"),
        f"{W8A8} --model_type Wan2.2-I2V-A14B",
    ),
    Row(
        "config not JSON",
        lambda case: (case.model / "config.json").write_text("{"),
        ("config.json", "not valid JSON"),
        LIGHTX2V,
    ),
    Row(
        "no config, and an odd width",
        lambda case: (case.model / "config.json").unlink(),
        ("config.json", "64", "128"),
        LIGHTX2V,
    ),
]


def last_of(case: Case) -> str:
    """The tensor that ends where the file ends."""
    head, _ = read(case.file)
    return max(head, key=lambda name: head[name]["data_offsets"][1])


def first_of(path: Path) -> dict[str, Any]:
    """A file's first tensor."""
    return dict(list(load(path).items())[:1])


def two_sets_of_shards(case: Case) -> None:
    """-of-00002 under two stems, in one folder, without an index."""
    for stem in ("a", "b"):
        for number in (1, 2):
            shutil.copy(case.file, case.model / f"{stem}-0000{number}-of-00002.safetensors")
    case.file.unlink()


def zipped_pickle(path: Path) -> None:
    """What `torch.save` writes is a zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
