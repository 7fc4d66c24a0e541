"""What must answer at once: neither help, plans and inspections nor refusals import torch, and a plan creates nothing.

Each case is a process of its own, which says at its end what it has imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Result, run, write_tiny
from recipe_kit import SEED

# torch, and what brings it along or is heavy by itself
HEAVY = ("torch", "torch_npu", "triton", "diffusers", "transformers", "accelerate", "safetensors.torch")
PROBE = f"""
import sys
from streamq.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code or 0
print("imported:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""
QUANT = "quant --save_path {place}/new"
PLAN = "plan --save_path {place}/new"
W8A8 = "--quant_type w8a8"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, recipes and outputs in one folder; no case changes anything in it."""
    place = tmp_path_factory.mktemp("place")
    write_tiny(place / "model", "t2v-1.3B")
    write_tiny(place / "experts", "t2v-A14B", layout="diffusers", shard_bytes=200_000)
    write_tiny(place / "damaged", "t2v-1.3B")
    with open(place / "damaged" / "diffusion_pytorch_model.safetensors", "ab") as stream:
        stream.write(b"trailing")
    (place / "recipe.yaml").write_text(SEED)
    (place / "wrong.yaml").write_text(SEED.replace("exclude", "excludes"))
    for form in ("mindie", "lightx2v"):
        done = run(
            "quant", "--model_path", place / "model", "--save_path", place / form, *W8A8.split(), "--format", form
        )
        assert done.returncode == 0, done.stderr
    return place


def probe(place: Path, command: str) -> Result:
    """Run a command in a process that says what it has imported, in an empty home and away from any checkout."""
    argv = command.format(place=place).split()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    env |= {"HF_HUB_OFFLINE": "1", "HOME": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROBE, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=place,
        env=env,
        check=False,
    )


def imported(result: Result) -> list[str]:
    """The heavy modules that the process had at its end."""
    return result.stderr.splitlines()[-1].removeprefix("imported:").split()


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Path -> mode, size and time of change of everything in a folder."""
    found = {str(path.relative_to(folder)): path.lstat() for path in sorted(folder.rglob("*"))}
    return {name: (status.st_mode, status.st_size, status.st_mtime_ns) for name, status in found.items()}


CASES = [
    ("--version", 0, "streamq"),
    ("--help", 0, "quant"),
    ("quant --help", 0, "--model_path"),
    ("recipes", 0, "w8a8"),
    ("recipes w8a8", 0, "linear_quant"),
    ("recipes --json", 0, "w8a8_all"),
    ("inspect {place}/model", 0, "t2v"),
    ("inspect {place}/model --json", 0, '"family": "t2v"'),
    ("inspect {place}/experts --json", 0, '"model_type": "Wan2_2"'),
    ("inspect {place}/mindie --json", 0, '"format": "mindie"'),
    ("inspect {place}/lightx2v --json", 0, '"format": "lightx2v"'),
    (f"{PLAN} --model_path {{place}}/model {W8A8}", 0, "w8a8"),
    (f"{PLAN} --model_path {{place}}/model {W8A8} --json", 0, '"bytes_to_write"'),
    (f"{PLAN} --model_path {{place}}/model {W8A8} --json --format mindie,lightx2v", 0, "lightx2v/block_0.safetensors"),
    (f"{PLAN} --model_path {{place}}/experts {W8A8} --json --device npu --max_shard_size 1GB", 0, '"device": "npu"'),
    (f"{PLAN} --model_path {{place}}/model --config_path {{place}}/recipe.yaml --json", 0, '"layers"'),
    (f"{PLAN} --model_path {{place}}/model {W8A8} --max_host_memory 1MiB", 2, "--max_host_memory"),
    ("", 2, "COMMAND"),
    ("quanti", 2, "quant"),
    (QUANT, 2, "--model_path"),
    (f"{QUANT} --model_path {{place}}/model", 2, "--quant_type"),
    (f"{QUANT} --model_path {{place}}/model {W8A8} --frmat mindie", 2, "--frmat"),
    (f"{QUANT} --model_path {{place}}/model --quant_type w8a9", 2, "w8a9"),
    (f"{QUANT} --model_path {{place}}/model {W8A8} --format x", 2, "mindie"),
    (f"{QUANT} --model_path {{place}}/model {W8A8} --device npu:0,1", 2, "accelerate launch"),
    (f"{QUANT} --model_path {{place}}/model --config_path {{place}}/wrong.yaml", 2, "spec.process.0.excludes"),
    (f"{QUANT} --model_path {{place}}/damaged {W8A8}", 2, "trailing"),
    (f"{QUANT} --model_path {{place}}/absent {W8A8}", 2, "absent"),
    (f"{QUANT} --model_path some/model {W8A8}", 2, "some/model"),
    (f"{QUANT} --model_path {{place}}/model {W8A8} --max_host_memory 1MiB", 2, "1048576"),
    ("inspect {place}/damaged", 2, "trailing"),
    ("inspect {place}/absent", 2, "absent"),
]


@pytest.mark.parametrize(
    "command, status, says", CASES, ids=[command.replace("{place}/", "") for command, _, _ in CASES]
)
def test_it_needs_no_torch(place: Path, command: str, status: int, says: str) -> None:
    before = snapshot(place)
    result = probe(place, command)
    assert result.returncode == status, result.stderr
    assert imported(result) == []
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (status == 2)
    assert says in (result.stdout if status == 0 else errors[0])
    assert snapshot(place) == before, "nothing may be created or changed"


def test_the_probe_sees_torch_where_there_is_work(place: Path, tmp_path: Path) -> None:
    """Otherwise the cases above would show nothing."""
    result = probe(place, f"quant --model_path {place}/model --save_path {tmp_path}/out --quiet {W8A8}")
    assert result.returncode == 0
    assert "torch" in imported(result)


def test_a_plan_says_exactly_what_a_run_writes(place: Path) -> None:
    """Names and bytes of every file but the manifest."""
    planned = json.loads(probe(place, f"{PLAN} --model_path {place}/model {W8A8} --json").stdout)
    written = {p.name: p.stat().st_size for p in (place / "mindie").iterdir() if p.name != "streamq.json"}
    assert {file["path"]: file["bytes"] for file in planned["files"]} == written
    assert planned["bytes_to_write"] == sum(written.values())
