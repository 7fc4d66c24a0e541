"""Data-free W8A8: streamq beside a load-everything quantizer and a plain copy of the same bytes, in one run.

    python benchmarks/quant.py [--family t2v-1.3B] [--runs 3] [--blocks 4,16,30] [--data DIR] [--json FILE]

Every figure is a whole process's: wall and processor seconds and peak memory as the operating system accounts them,
with Python's and torch's start in it. The source is dropped from the page cache before each run, every output is on the
disk (fsync) when its clock stops, and the contestants take turns. `over import` is the peak above what the process held
when its imports were done. The copy reads every source byte and writes as many bytes as streamq's output has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

CHUNK = 8 << 20
# What w8a8 takes for MindIE, by native names and by diffusers'; and what of a block it leaves float there.
QUANTIZED = re.compile(
    r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.0|attn[12]\.to_([qkv]|out\.0)|ffn\.net\.0\.proj)\.weight"
)
FFN_2 = re.compile(r"blocks\.\d+\.ffn\.(2|net\.2)\.weight")


def load_all(source: Path, out: Path, every: int, device: str = "cpu") -> None:
    """What a whole-model tool does: load the state dict, quantize it eagerly, save it.

    every: 0, the layers that MindIE's recipe takes; 1, all of the blocks; 2, those outside blocks as well.
    """
    import torch
    from safetensors.torch import load_file, save_file

    note_base()
    state: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        state |= load_file(path)
    made: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        chosen = QUANTIZED.fullmatch(name) or every and FFN_2.fullmatch(name)
        if not chosen and not (every == 2 and weight.ndim == 2 and name.endswith(".weight")):
            made[name] = weight
            continue
        weight = weight.to(device)
        scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=2**-23)
        made[name] = torch.clamp(torch.round(weight.float() / scale), -128, 127).to(torch.int8)
        made[name.removesuffix("weight") + "weight_scale"] = scale
        made[name.removesuffix("weight") + "weight_offset"] = torch.zeros_like(scale)
    out.mkdir()
    save_file({name: tensor.cpu() for name, tensor in made.items()}, out / "all.safetensors")
    descriptor = os.open(out / "all.safetensors", os.O_RDWR)
    os.fsync(descriptor)


def copy(source: Path, out: Path, nbytes: int) -> None:
    """The floor: every source byte read once, `nbytes` written once and synced."""
    note_base()
    out.mkdir()
    buffer = memoryview(bytearray(CHUNK))
    target = os.open(out / "copy", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(target, 0, nbytes)
    sources = sorted(source.glob("*.safetensors"))
    total, done, written = sum(path.stat().st_size for path in sources), 0, 0
    for path in sources:
        descriptor, position = os.open(path, os.O_RDONLY), 0
        while count := os.preadv(descriptor, [buffer], position):
            # As streamq does: pages that nobody needs again cost the system more to keep than to drop.
            os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
            position, done = position + count, done + count
            while written < nbytes * done // total:
                size = os.pwrite(target, buffer[: min(CHUNK, nbytes * done // total - written)], written)
                os.posix_fadvise(target, written, size, os.POSIX_FADV_DONTNEED)
                written += size
    os.fdatasync(target)


def streamq(source: Path, out: Path, read_ahead: int) -> None:
    """streamq's own command."""
    import torch  # noqa: F401

    from streamq import cli, display, pipeline  # noqa: F401

    note_base()
    argv = ["quant", "--model_path", str(source), "--save_path", str(out), "--quant_type", "w8a8", "--device", "cpu"]
    assert cli.main([*argv, "--quiet", "--read_ahead", str(read_ahead)]) == 0


CONTESTANTS = {"load_all": load_all, "copy": copy, "streamq": streamq}


def note_base() -> None:
    """Remember what the imports take, and when they were done."""
    globals()["began"] = time.monotonic()
    globals()["base"] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def worker(name: str, source: Path, out: Path, extra: int) -> None:
    """Runs in a process of its own; its last line is its own account."""
    CONTESTANTS[name](source, out, extra)
    print(json.dumps(account()))


def account() -> dict[str, float]:
    """This process's peak of memory and what of it is above `note_base`, `work`: seconds since then, and the bytes
    that it asked the system for and gave to it."""
    work = time.monotonic() - globals()["began"]
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    return {
        "peak": peak, "over_import": peak - globals()["base"], "work": work,
        "bytes_read": int(counted["rchar"]), "bytes_written": int(counted["wchar"]),
    }  # fmt: skip


def measure(name: str, source: Path, extra: int, scratch: Path) -> dict[str, float]:
    """One run of one contestant, from a cold page cache."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    figures = run_cold([sys.executable, __file__, "--worker", name, str(source), str(out), str(extra)], source)
    figures["written"] = sum(path.stat().st_size for path in out.rglob("*") if path.suffix == ".safetensors")
    shutil.rmtree(out)
    return figures


def run_cold(command: Sequence[str], source: Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Wall and processor seconds of a process that finds nothing of `source` in the page cache, and what its last
    line says of itself, in JSON. Raises SystemExit if it fails."""
    os.sync()
    for path in source.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=env)
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        said.seek(0)
        if status or not lines:
            raise SystemExit(f"{' '.join(command)}: failed\n{said.read().decode(errors='replace')[-2000:]}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime} | json.loads(lines[-1])


Runs = dict[str, list[dict[str, Any]]]


def take_turns(entries: Mapping[str, Callable[[], dict[str, Any]]], runs: int) -> Runs:
    """Every contestant `runs` times, in rounds, each of which begins with another one."""
    found: Runs = {label: [] for label in entries}
    labels = list(entries)
    for number in range(runs):
        first = number % max(1, len(labels))
        for label in labels[first:] + labels[:first]:
            found[label].append(entries[label]())
    return found


def ratio(runs: Runs, label: str, other: str, figure: str) -> float:
    """Median of one contestant's figure over another's of the same round."""
    pairs = zip(runs[label], runs[other], strict=True)
    return statistics.median(a[figure] / (b[figure] or 1) for a, b in pairs)


def compare(source: Path, runs: int, scratch: Path, read_ahead: list[int]) -> list[dict[str, Any]]:
    """Every contestant in turn, `runs` times; medians, and ratios to load_all run by run."""
    written = int(measure("streamq", source, 1, scratch)["written"])  # warm-up, and the copy's size
    contestants = {"load_all": ("load_all", 0), "copy": ("copy", written)}
    contestants |= {f"streamq --read_ahead {depth}": ("streamq", depth) for depth in read_ahead}
    rounds = take_turns(
        {label: partial(measure, name, source, extra, scratch) for label, (name, extra) in contestants.items()}, runs
    )
    table = []
    for label in sorted(rounds):
        row: dict[str, Any] = {"name": label}
        for figure in ("wall", "cpu", "peak", "over_import", "bytes_read"):
            row[figure] = statistics.median(run[figure] for run in rounds[label])
        for other in ("load_all", "copy"):
            for figure in ("wall", "cpu", "over_import"):
                row[f"{figure}/{other}"] = ratio(rounds, label, other, figure)
        table.append(row)
    return table


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
        return
    from synthetic import FAMILIES, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="t2v-1.3B", choices=FAMILIES)
    parser.add_argument("--blocks", default="4,16,30", help="numbers of blocks; the last one is compared")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--read_ahead", default="0,1")
    parser.add_argument("--data", type=Path, help="where to make the checkpoints (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    depths = [int(text) for text in args.read_ahead.split(",")]
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        scratch, scaling, table = Path(folder), [], []
        counts = [int(text) for text in args.blocks.split(",")]
        for count in counts:
            source = scratch / "source"
            write(source, replace(FAMILIES[args.family], blocks=count), dtype=args.dtype)
            size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
            scaling.append({"blocks": count, "source": size} | measure("streamq", source, 1, scratch))
            if count == counts[-1]:
                table = compare(source, args.runs, scratch, depths)
            shutil.rmtree(source)
    show(args.family, scaling, table)
    if args.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        document = {"family": args.family, "dtype": args.dtype, "runs": args.runs, "machine": machine}
        args.json.write_text(json.dumps(document | {"scaling": scaling, "table": table}, indent=1) + "\n")


def show(family: str, scaling: list[dict[str, Any]], table: list[dict[str, Any]]) -> None:
    """Both tables as text."""
    print(f"{family}: memory against the number of blocks (streamq, read_ahead 1)")
    for row in scaling:
        print(
            f"  {row['blocks']:3d} blocks  source {row['source'] / 1e9:6.2f} GB  read {row['bytes_read'] / 1e9:6.2f} GB"
            f"  peak {row['peak'] / 2**20:6.0f} MiB  over import {row['over_import'] / 2**20:6.0f} MiB"
        )
    print(f"\n{'':24s}{'wall s':>8s}{'cpu s':>8s}{'peak MiB':>10s}{'over import':>13s}   ratios to the others")
    for row in table:
        ratios = "  ".join(f"{key} {row[key]:.2f}" for key in row if "/" in key and key != "over_import/copy")
        print(
            f"{row['name']:24s}{row['wall']:8.2f}{row['cpu']:8.2f}{row['peak'] / 2**20:10.0f}"
            f"{row['over_import'] / 2**20:9.0f} MiB   {ratios}"
        )


if __name__ == "__main__":
    main()
