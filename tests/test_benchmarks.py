"""The benchmark suite measures what it says: bytes of stages against files, their own seconds, its tables."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import big
import numpy as np
import pytest
import quant
import stages
import suite
import synthetic
import tables
from conftest import ROOT, run
from safetensors.numpy import load_file

LABEL, COPY = "streamq mindie", "copy, as mindie"
FAMILY = synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"])


def tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with open(path, "rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `suite.py --quick` writes of two contestants."""
    folder = tmp_path_factory.mktemp("suite")
    command = [sys.executable, ROOT / "benchmarks" / "suite.py", "--quick", "--only", "data_free", "--data", folder,
               "--rows", f"^({LABEL}|{COPY})$", "--json", folder / "found.json"]  # fmt: skip
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"| {LABEL} | {COPY} |" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["found.json"], "models and outputs go"
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model, made here, and what streamq makes of it."""
    folder = tmp_path_factory.mktemp("same")
    synthetic.write(folder / "model", FAMILY, layout="diffusers")
    command = ["--model_path", folder / "model", "--save_path", folder / "out", "--quant_type", "w8a8", "--quiet"]
    done = run("quant", *command, "--device", "cpu", "--format", "mindie")
    assert done.returncode == 0, done.stderr
    return folder / "model", folder / "out"


def test_bytes_of_stages_are_those_of_the_files(document: dict[str, Any], output: tuple[Path, Path]) -> None:
    section = document["sections"]["data_free"]
    report = section["stages"][LABEL]
    rows = {row["stage"]: row for row in report["rows"]}
    (weights,) = (output[0] / "transformer").glob("*.safetensors")
    (made,) = output[1].glob("*.safetensors")
    files = [path for path in output[1].rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    manifest = json.loads((output[1] / "streamq.json").read_text())

    assert section["about"]["source"] == weights.stat().st_size
    assert rows["read"]["bytes"] == tensor_bytes(weights)  # each source byte once
    assert rows["write"]["bytes"] == total == report["written"] == section["rows"][LABEL]["written"]
    of_manifest = sum(about["bytes"] for about in manifest["files"].values())
    assert rows["write"]["bytes"] == of_manifest + (output[1] / "streamq.json").stat().st_size
    assert rows["hash"]["bytes"] == total + tensor_bytes(made)  # a tensor's bytes for itself and for its file
    codes = sum(tensor.size for tensor in load_file(made).values() if tensor.dtype == np.int8)
    assert rows["quantize"]["bytes"] == 4 * codes > 0  # of fp32
    assert section["rows"][COPY]["written"] == of_manifest


def test_seconds_of_stages_are_those_of_the_run(document: dict[str, Any]) -> None:
    report = document["sections"]["data_free"]["stages"][LABEL]
    assert {row["stage"] for row in report["rows"]} >= {"start", "plan", "read", "quantize", "encode", "hash", "write",
                                                        "sync", "wait", "rest"}  # fmt: skip
    wall = report["wall"]
    threads = {name: sum(spent.values()) for name, spent in report["threads"].items()}
    assert 0.9 * wall < threads["MainThread"] <= 1.02 * wall  # every second of it has a stage
    assert {"reader", "writer", "hasher", "committer"} <= set(threads)
    assert all(0 < seconds <= wall for seconds in threads.values())
    for row in report["rows"]:
        assert row["seconds"] >= 0 and row["share"] == pytest.approx(row["seconds"] / wall, abs=1e-4)
        if row["mb_per_s"]:
            assert row["mb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e6, rel=0.01, abs=0.1)


def test_stages_on_a_device(output: tuple[Path, Path], tmp_path: Path) -> None:
    """On the stand-in: what is read is copied in, and what is written of tensors is copied back."""
    text = (
        "import json, sys; sys.path[:0] = sys.argv[1:3]; import npu_standin; npu_standin.install(); import stages;"
        " found = stages.run(sys.argv[3:], device='npu', calibrated=False, synchronize=True); print(json.dumps(found))"
    )
    command = ["quant", "--model_path", output[0], "--save_path", tmp_path / "out", "--quant_type", "w8a8", "--device",
               "npu", "--format", "lightx2v", "--quiet"]  # fmt: skip
    argv = [sys.executable, "-c", text, ROOT / "tests", ROOT / "benchmarks", *command]
    done = subprocess.run([str(one) for one in argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["stage"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    (weights,) = (output[0] / "transformer").glob("*.safetensors")
    assert rows["read"]["bytes"] == tensor_bytes(weights)
    manifest = json.loads((tmp_path / "out" / "streamq.json").read_text())
    (layers,) = (made["layers"] for made in manifest["formats"].values())
    made = raw_tensors(sorted((tmp_path / "out").glob("block_*.safetensors")))
    of_layers = [len(data) for name, data in made.items() if name.rpartition(".")[0] in layers]
    assert rows["copy back"]["bytes"] == sum(of_layers) > 0
    assert rows["copy in"]["bytes"] == sum(
        4 * len(data) for name, data in made.items() if name.endswith(".weight") and name.rpartition(".")[0] in layers
    ) + sum(len(data) for name, data in made.items() if name.endswith(".bias") and name.rpartition(".")[0] in layers)
    assert rows["copy in"]["calls"] > 0 and rows["quantize"]["seconds"] > 0


def test_ratios_are_those_of_the_rounds(document: dict[str, Any]) -> None:
    section = document["sections"]["data_free"]
    rows, ratios = section["rows"], section["ratios"]
    for figure in ("wall", "cpu", "work"):
        due = rows[LABEL]["runs"][0][figure] / rows[COPY]["runs"][0][figure]
        assert ratios[LABEL][COPY][figure] == pytest.approx(due, rel=1e-3, abs=1e-3)
    assert rows[LABEL]["peak"] > rows[LABEL]["over_import"] > 0
    assert rows[LABEL]["wall"] > rows[LABEL]["work"] > 0
    assert document["machine"]["cpus"] == len(os.sched_getaffinity(0))
    assert document["versions"]["torch"]


def test_tables_and_plot(document: dict[str, Any], tmp_path: Path) -> None:
    text = tables.markdown(document)
    assert f"| {LABEL} | {COPY} |" in text and "Stages of streamq mindie" in text
    rows = document["sections"]["data_free"]["rows"]
    document["sections"]["data_free"]["rows"] = rows | {"torchao": {"not_run": "not installed"}}
    assert "| torchao | not installed |" in tables.markdown(document)
    tables.plot(document, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    document["sections"]["data_free"]["rows"] = rows


def test_a_stage_has_its_own_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(value=0.0)
    fake = SimpleNamespace(perf_counter=lambda: now.value, thread_time=lambda: now.value / 2)
    monkeypatch.setattr(stages, "time", fake)
    clock = stages.Clock()

    def takes(seconds: float) -> None:
        now.value += seconds

    def writes(data: bytes) -> None:
        takes(2)
        hashes(data)
        takes(1)

    hashes = clock.timed("hash", len, lambda data: takes(4))
    clock.run("rest", None, clock.timed("write", len, writes), b"12345")
    other = threading.Thread(target=hashes, args=(b"123",), name="hasher_0")
    other.start()
    other.join()
    report = clock.report(wall=16)
    rows = {row["stage"]: (row["seconds"], row["cpu"], row["bytes"], row["calls"]) for row in report["rows"]}
    assert rows == {"hash": (8, 4, 8, 2), "write": (3, 1.5, 5, 1), "rest": (0, 0, 0, 1)}
    assert report["threads"] == {"MainThread": {"hash": 4, "write": 3, "rest": 0}, "hasher": {"hash": 4}}
    assert report["rows"][0]["share"] == 0.5


DEVICE = tuple((f"{stages.ACCELERATOR}.{verb}", "copy in", None) for verb in ("load", "store"))


@pytest.mark.parametrize(
    "verbs",
    [stages.QUANT + DEVICE, pytest.param(stages.CALIBRATED + stages.GENERATE, marks=pytest.mark.slow)],
    ids=["quant", "what imports diffusers"],
)
def test_every_verb_is_still_there(verbs: tuple[tuple[str, str, Any], ...]) -> None:
    """A name that has moved would be found out on the day of the benchmark."""
    for target, stage, _ in verbs:
        assert stage in stages.STAGES
        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        for name in path.split("."):
            owner = getattr(owner, name)
        assert callable(owner), target
    with pytest.raises(SystemExit, match="streamq.steps:nothing"):
        stages._replace("streamq.steps:nothing", lambda call: call)


def test_a_peer_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, Any]:
        raise SystemExit("no kernel for it")

    monkeypatch.setattr(quant, "run_cold", fails)
    args = argparse.Namespace(device="cpu", runs=2)
    entries = {
        "torchao": suite.Entry("torchao", {}, tmp_path, peer=True),
        "other": suite.Entry("other", {}, tmp_path, against=("torchao",), unavailable="not installed"),
    }
    found = suite.compare(entries, args, tmp_path)
    assert found == {
        "rows": {"torchao": {"not_run": "no kernel for it"}, "other": {"not_run": "not installed"}}, "ratios": {}
    }  # fmt: skip
    with pytest.raises(SystemExit, match="no kernel"):
        suite.compare({"streamq": suite.Entry("streamq", {}, tmp_path)}, args, tmp_path)


def test_the_big_checkpoint_is_blocks_that_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(big, "SHARD", 150_000)
    monkeypatch.setattr(big, "CHUNK", 5_000)  # so that tensors take several
    family = synthetic.tiny(synthetic.FAMILIES["t2v-14B"], blocks=3)
    made = big.make(tmp_path / "model", family, "bf16")
    paths = sorted((tmp_path / "model").glob("*.safetensors"))
    assert made["files"] == len(paths) > 2 and made["bytes"] == sum(path.stat().st_size for path in paths)
    synthetic.write(tmp_path / "whole", family, dtype="bf16")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("model", "whole")] == []
    due = raw_tensors([*(tmp_path / "whole").glob("*.safetensors")])
    found = raw_tensors(paths)
    assert found.keys() == due.keys()
    for name, data in found.items():
        first, _, rest = name.partition(".")
        assert data == due[f"blocks.0.{rest.partition('.')[2]}" if first == "blocks" else name], name


@pytest.mark.slow
def test_the_big_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.FAMILIES, "t2v-14B", synthetic.tiny(synthetic.FAMILIES["t2v-14B"], blocks=3))
    monkeypatch.setattr(big, "SHARD", 150_000)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(
        sys, "argv", ["big.py", "--data", f"{tmp_path}/data", "--verify_source", "--json", f"{tmp_path}/found.json"]
    )
    assert big.main() == 0
    assert list((tmp_path / "data").iterdir()) == []
    text = (tmp_path / "found.json").read_text()
    found = json.loads(text)
    assert found["problems"] == [] and f"{tmp_path}/data/" not in text
    assert found["plan"]["bytes_to_write"] < found["quant"]["written"]  # the manifest besides
    rows = {row["stage"]: row for row in found["quant"]["stages"]["rows"]}
    assert rows["read"]["bytes"] == found["plan"]["bytes_to_read"]
    assert found["quant"]["bytes_read"] > found["plan"]["bytes_to_read"]
    assert found["quant"]["bytes_written"] > found["plan"]["bytes_to_write"]
    assert 0 < found["quant"]["over_import"] < found["quant"]["peak"] < found["plan"]["peak_host_bytes"]
    assert found["verify"]["wall"] > 0 < found["verify_source"]["wall"]


def raw_tensors(paths: list[Path]) -> dict[str, bytes]:
    found = {}
    for path in paths:
        raw = path.read_bytes()
        size = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:size]).items():
            start, end = entry["data_offsets"]
            found[name] = raw[size + start : size + end]
    return found
