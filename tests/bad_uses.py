"""Rows of the bad-input table (`test_bad_input.py`): options, output folders, bad values, failing work."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_sources import FFN, HEAD, LIGHTX2V, W8A8, Row, nothing
from conftest import run
from damage import NAME, QUERY, Case, Make, entry, fail_on, poison, then, while_reading

BAD_SIZE = ("--max_host_memory", "not a size", "GiB")
RECIPE = """
apiversion: multimodal_sd_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig: {act: {scope: per_token}, weight: {}}
      exclude: ["*ffn.2*"]
"""
WEIGHT_ONLY = RECIPE.replace("act: {scope: per_token}, ", "")


OPTIONS = [
    Row("unknown format", nothing, ("mindy", "mindie", "lightx2v"), f"{W8A8} --format mindy"),
    Row("one of two formats unknown", nothing, ("nunchuk", "mindie"), f"{W8A8} --format mindie,nunchuk"),
    Row("empty format", nothing, ("--format", "mindie"), f"{W8A8} --format mindie,"),
    Row("unknown type", nothing, ("w8a9", "nearest", "w8a8"), "--quant_type w8a9"),
    Row("no type and no recipe", nothing, ("--quant_type", "--config_path"), ""),
    Row(
        "a type and a recipe",
        lambda case: case.recipe(RECIPE),
        ("--quant_type", "--config_path", "one of"),
        f"{W8A8} --config_path {{tmp}}/recipe.yaml",
    ),
    Row("no such recipe", nothing, ("absent.yaml", "--config_path"), "--config_path {tmp}/absent.yaml"),
    Row("recipe is a folder", nothing, ("--config_path", "directory"), "--config_path {tmp}"),
    Row(
        "type that the format lacks",
        lambda case: case.recipe(WEIGHT_ONLY),
        ("w8a16", "mindie", "w8a8"),
        "--config_path {tmp}/recipe.yaml",
    ),
    Row(
        "lightx2v with excludes",
        lambda case: case.recipe(RECIPE),
        ("lightx2v", "2 of 20", "blocks.0.ffn.2", "w8a8_all"),
        "--config_path {tmp}/recipe.yaml --format lightx2v",
    ),
    Row("lightx2v in shards", nothing, ("lightx2v", "--max_shard_size"), f"{LIGHTX2V} --max_shard_size 5GB"),
    Row("mindie in lightx2v's layout", nothing, ("--layout single", "lightx2v"), f"{W8A8} --layout single"),
    Row("unknown layout", nothing, ("--layout", "tiles", "single"), f"{W8A8} --layout tiles"),
    Row("unknown device", nothing, ("gpu", "cuda"), f"{W8A8} --device gpu"),
    Row("device index not a number", nothing, ("cuda:x", "cuda:0"), f"{W8A8} --device cuda:x"),
    Row("list of devices", nothing, ("npu:0,1", "accelerate launch"), f"{W8A8} --device npu:0,1"),
    Row("absent GPU", nothing, ("--device cuda", "cpu|counted"), f"{W8A8} --device cuda:99", planned=False),
    Row("unknown tool to match", nothing, ("torchao", "msmodelslim", "lightx2v"), f"{W8A8} --match torchao"),
    Row("tool of another format", nothing, ("lightx2v", "msmodelslim"), f"{W8A8} --match lightx2v"),
    Row("size with an unknown unit", nothing, (*BAD_SIZE, "5XB"), f"{W8A8} --max_host_memory 5XB"),
    Row("size without a number", nothing, (*BAD_SIZE, "lots"), f"{W8A8} --max_host_memory lots"),
    Row("negative budget", nothing, (*BAD_SIZE, "-1GB"), f"{W8A8} --max_host_memory=-1GB"),
    Row("size zero", nothing, ("--max_shard_size", "0GB", "above zero"), f"{W8A8} --max_shard_size 0GB"),
    Row("size below a byte", nothing, ("--max_shard_size", "0.1B", "above zero"), f"{W8A8} --max_shard_size 0.1B"),
    Row("size of 400 digits", nothing, ("--max_device_memory",), f"{W8A8} --max_device_memory {'9' * 400}GB"),
    Row("host budget too small", nothing, ("--max_host_memory", "1048576", "raise"), f"{W8A8} --max_host_memory 1MiB"),
    Row(
        "device budget too small",
        nothing,
        ("--max_device_memory", "2000000", "raise"),
        f"{W8A8} --device cuda --max_device_memory 2MB",
    ),
    Row("negative depth", nothing, ("--read_ahead", "-1", "64"), f"{W8A8} --read_ahead=-1"),
    Row("depth not a number", nothing, ("--read_ahead", "far"), f"{W8A8} --read_ahead far"),
    Row("seed not a number", nothing, ("--seed", "1.5"), f"{W8A8} --seed 1.5"),
    Row("trust neither true nor false", nothing, ("--trust_remote_code", "yes"), f"{W8A8} --trust_remote_code yes"),
    Row("misspelt option", nothing, ("--overwrit", "nearest", "--overwrite"), f"{W8A8} --overwrit"),
    Row("abbreviated option", nothing, ("--over",), f"{W8A8} --over"),
    Row("option without its value", nothing, ("--device", "expected"), f"{W8A8} --device"),
    Row("one argument too many", nothing, ("elsewhere",), f"{W8A8} elsewhere"),
]


def save_to(path: str) -> Make:
    """SAVE_PATH is this path below the test's folder; `{model}` for the checkpoint's."""

    def make(case: Case) -> None:
        case.save = Path(path.format(tmp=case.tmp, model=case.model))

    return make


def little_room(case: Case) -> None:
    """The disk has 12345 bytes left."""
    case.patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12345))


SAVE_PATHS = [
    Row("save to the model", save_to("{model}"), ("same as --model_path",)),
    Row("save to the model, overwriting", save_to("{model}"), ("same as --model_path",), f"{W8A8} --overwrite"),
    Row("save by another spelling", save_to("{model}/../model"), ("same as --model_path",)),
    Row(
        "save to a link to the model",
        then(lambda case: (case.tmp / "link").symlink_to(case.model), save_to("{tmp}/link")),
        ("same as --model_path",),
    ),
    Row("save inside the model", save_to("{model}/out"), ("inside --model_path",)),
    Row("save inside, overwriting", save_to("{model}/a/b"), ("inside --model_path",), f"{W8A8} --overwrite"),
    Row("save above the model", save_to("{tmp}"), ("above --model_path",)),
    Row("save above, overwriting", save_to("{tmp}"), ("above --model_path",), f"{W8A8} --overwrite"),
    Row(
        "save beside the file",
        save_to("{model}"),
        ("above --model_path",),
        f"{W8A8} --overwrite --model_path {{model}}/{NAME}",
    ),
    Row(
        "save to where the links lead", lambda case: linked_blobs(case), ("blobs", "source file"), f"{W8A8} --overwrite"
    ),
    Row("save to a file", lambda case: save_to(f"{{model}}_{content_of(case)}")(case), ("a file", "folder")),
    Row("save below a file", save_to("{model}/config.json/out"), ("inside --model_path",)),
    Row(
        "save below a file elsewhere",
        then(lambda case: case.recipe("a"), save_to("{tmp}/recipe.yaml/out")),
        ("recipe.yaml", "cannot be written|Not a directory"),
    ),
    Row(
        "save to a link to nowhere",
        then(lambda case: (case.tmp / "link").symlink_to(case.tmp / "absent"), save_to("{tmp}/link")),
        ("link", "nowhere|dangling|points to|does not exist|is missing"),
    ),
    Row("save to a name of 300 characters", save_to(f"{{tmp}}/{'x' * 300}"), ("--save_path", "xxx")),
    Row("save where nobody may write", lambda case: forbidden(case), ("--save_path", "cannot be written to")),
    Row(
        "too little room",
        little_room,
        ("--save_path", "12345", "bytes are to be written"),
    ),
    Row(
        "foreign folder",
        then(lambda case: case.save.mkdir(), lambda case: (case.save / "holiday.jpg").write_bytes(b"x")),
        ("holiday.jpg", "--overwrite"),
        planned=False,
    ),
    Row(
        "another tool's output",
        then(lambda case: case.save.mkdir(), lambda case: shutil.copy(case.file, case.save / "block_0.safetensors")),
        ("block_0.safetensors", "--overwrite"),
        planned=False,
    ),
    Row(
        "another plan's output",
        lambda case: made(case, "--seed 1"),
        ("another plan's finished", "--overwrite"),
        planned=False,
    ),
    Row(
        "another plan's unfinished output",
        lambda case: unfinished(case, "--seed 1"),
        ("another plan's unfinished", "--overwrite"),
        planned=False,
    ),
    Row("another run at work", lambda case: locked(case), ("another run is at work",), planned=False),
    Row(
        "another run at work, overwriting",
        lambda case: locked(case),
        ("another run is at work",),
        f"{W8A8} --overwrite",
        planned=False,
    ),
    Row("overwriting with a wrong option", lambda case: made(case, ""), ("w8a9",), "--quant_type w8a9 --overwrite"),
    Row(
        "overwriting from a damaged source",
        then(lambda case: made(case, ""), entry(shape=[64, 65])),
        (NAME, QUERY, "16640"),
        f"{W8A8} --overwrite",
    ),
    Row(
        "overwriting with too little room",
        then(lambda case: made(case, ""), little_room),
        ("--save_path", "bytes are to be written"),
        f"{W8A8} --overwrite",
    ),
    Row("manifest not JSON", lambda case: manifest(case, "{"), ("streamq.json", "--overwrite"), planned=False),
    Row("manifest a list", lambda case: manifest(case, "[]"), ("streamq.json", "--overwrite"), planned=False),
    Row(
        "manifest nested deeply",
        lambda case: manifest(case, "[" * 200_000),
        ("streamq.json", "--overwrite"),
        planned=False,
    ),
    Row(
        "manifest without files",
        lambda case: changed_manifest(case, files=None),
        ("streamq.json", "--overwrite"),
        planned=False,
    ),
    Row(
        "manifest with a list of files",
        lambda case: changed_manifest(case, files=["a"]),
        ("streamq.json", "--overwrite"),
        planned=False,
    ),
    Row(
        "journal of garbage beside weights", lambda case: foreign_journal(case, "x\n"), ("--overwrite",), planned=False
    ),
    Row("empty journal beside weights", lambda case: foreign_journal(case, ""), ("--overwrite",), planned=False),
    Row(
        "journal nested deeply beside weights",
        lambda case: foreign_journal(case, "[" * 200_000 + "\n"),
        ("--overwrite",),
        planned=False,
    ),
    Row(
        "journal a folder",
        lambda case: (case.save / "streamq-journal.jsonl").mkdir(parents=True),
        ("streamq-journal.jsonl",),
        planned=False,
    ),
    Row(
        "journal with a foreign line",
        lambda case: unfinished(case, "", '{"x": 1}\n'),
        ("streamq-journal.jsonl", "--no_resume|--overwrite"),
        planned=False,
    ),
    Row(
        "journal with a unit that the plan lacks",
        lambda case: unfinished(case, "", '{"unit": "blocks.9", "tensors": {}, "layers": {}}\n'),
        ("streamq-journal.jsonl", "--no_resume|--overwrite"),
        planned=False,
    ),
]

BAD_VALUES = [
    Row(
        f"{value} in {name} ({dtype}, {options[17:] or 'mindie'})",
        poison(name, value, at=at, dtype=dtype),
        (name, NAME, "NaN or Inf"),
        options,
        1,
        False,
    )
    for name, value, at, dtype, options in [
        (QUERY, "nan", 0, "F32", W8A8),
        (QUERY, "+inf", -1, "F32", W8A8),
        (QUERY, "-inf", 77, "F32", W8A8),
        (QUERY, "nan", -1, "BF16", W8A8),
        (QUERY, "-inf", 5, "F16", W8A8),
        (QUERY, "nan", 9, "BF16", f"{LIGHTX2V} --match lightx2v"),
        (QUERY, "+inf", 9, "F32", LIGHTX2V),
        (FFN, "nan", 9, "F32", f"{W8A8} --format mindie,lightx2v"),
        ("blocks.1.ffn.0.bias", "nan", -1, "F32", W8A8),
        ("blocks.0.self_attn.k.bias", "-inf", 0, "BF16", LIGHTX2V),
        (FFN, "+inf", -1, "F32", W8A8),
        ("blocks.0.ffn.2.bias", "nan", 3, "F16", W8A8),
        ("blocks.1.modulation", "nan", 0, "F32", W8A8),
        (HEAD, "-inf", -1, "BF16", W8A8),
        ("patch_embedding.bias", "nan", 1, "F16", LIGHTX2V),
    ]
]
FAILURES = [
    Row(
        "disk full at the start",
        fail_on("posix_fallocate", 0, errno.ENOSPC),
        ("No space", "same command"),
        W8A8,
        1,
        False,
    ),
    Row("disk full in the middle", fail_on("pwrite", 30, errno.ENOSPC), ("No space", "same command"), W8A8, 1, False),
    Row("quota used up", fail_on("pwrite", 30, errno.EDQUOT), ("uota", "make room"), W8A8, 1, False),
    Row("disk fails at a sync", fail_on("fdatasync", 2, errno.EIO), ("output error", "same command"), W8A8, 1, False),
    Row("no room for a rename", fail_on("replace", 0, errno.ENOSPC), ("No space", "same command"), W8A8, 1, False),
    Row("source cannot be read", fail_on("preadv", 3, errno.EIO), (NAME, "output error", "byte"), W8A8, 1, False),
    Row("source touched", while_reading(lambda f: os.utime(f, (1, 1))), (NAME, "changed while"), W8A8, 1, False),
    Row("source cut off", while_reading(lambda f: os.truncate(f, 9000)), (NAME, "changed while"), W8A8, 1, False),
]


def content_of(case: Case) -> str:
    """Makes `tmp/model_file`; returns the end of its name."""
    (case.tmp / "model_file").write_text("precious")
    return "file"


def linked_blobs(case: Case) -> None:
    """As in the hub's cache: the model's files are links into a folder of blobs, and that folder is SAVE_PATH."""
    case.save = case.tmp / "blobs"
    case.save.mkdir()
    case.file.rename(case.save / "0123abcd")
    case.file.symlink_to(case.save / "0123abcd")


def forbidden(case: Case) -> None:
    """A folder without permission to write; root, who may write anywhere, is told that it may not."""
    (case.tmp / "closed").mkdir(mode=0o500)
    if os.geteuid() == 0:
        case.patch.setattr(os, "access", lambda *_: False)
    case.save = case.tmp / "closed" / "out"


def made(case: Case, options: str) -> None:
    """SAVE_PATH holds a finished output."""
    assert (
        run("quant", "--model_path", case.model, "--save_path", case.save, *f"{W8A8} {options}".split()).returncode == 0
    )


def unfinished(case: Case, options: str, further: str = "") -> None:
    """SAVE_PATH holds a run that stopped after its first commit; `further` goes at the end of its journal."""
    with pytest.MonkeyPatch.context() as patch:
        fail_on("fdatasync", 2, errno.EIO)(Case(case.tmp, patch, case.model, case.save))
        result = run("quant", "--model_path", case.model, "--save_path", case.save, *f"{W8A8} {options}".split())
    journal = case.save / "streamq-journal.jsonl"
    assert result.returncode == 1 and journal.read_text().count("\n") == 2
    journal.write_text(journal.read_text() + further)


def foreign_journal(case: Case, text: str) -> None:
    """SAVE_PATH holds somebody's weights, and a journal that says nothing: no reason to delete them."""
    case.save.mkdir()
    (case.save / "block_0.safetensors").write_bytes(case.file.read_bytes())
    (case.save / "streamq-journal.jsonl").write_text(text)


def locked(case: Case) -> None:
    """Another run holds SAVE_PATH's journal, until the test's end."""
    unfinished(case, "")
    descriptor = os.open(case.save / "streamq-journal.jsonl", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    case.held.append(descriptor)


def manifest(case: Case, text: str) -> None:
    """SAVE_PATH holds a manifest of this text."""
    case.save.mkdir()
    (case.save / "streamq.json").write_text(text)


def changed_manifest(case: Case, **changes: object) -> None:
    """SAVE_PATH holds this plan's finished output, but its manifest has changed; None takes a key away."""
    made(case, "")
    path = case.save / "streamq.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
